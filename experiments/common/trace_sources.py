"""Traces and cost tables that an experiment is given by name, read and checked."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

from speckv_online.errors import UserError
from speckv_online.simulate.cost_table import CostTable, load_cost

if TYPE_CHECKING:
    pass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


def check_traces(traces: Sequence[str], said: str = "--traces") -> None:
    """Raise :class:`UserError` unless every item is NAME=DIRECTORY with a name of its own; ``said`` is the option."""
    names = [text.partition("=")[0] for text in traces]
    if not traces or not all("=" in text for text in traces) or len(set(names)) < len(names):
        raise UserError(f"{said} wants NAME=DIRECTORY, each name once, e.g. default=runs/test,high=runs/high")


@cache
def named_costs(specs: tuple[str, ...]) -> tuple[tuple[str, CostTable], ...]:
    """Load the cost tables once per process; each goes by its name."""
    tables = [load_cost(spec) for spec in specs]
    names = [table.name for table in tables]
    if len(set(names)) < len(names):
        raise UserError(f"two cost tables have the same name: {', '.join(names)}")
    return tuple(zip(names, tables, strict=True))
