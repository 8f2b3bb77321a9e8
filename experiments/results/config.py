"""What the comparison on the clock is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from experiments.config import option
from speckv_online.errors import UserError
from speckv_online.modeling.engine import HELP as ENGINE
from speckv_online.modeling.engine import choose_engine

if TYPE_CHECKING:
    pass

#: Decoded for every prompt, and those that only the first ``--some`` prompts are decoded by. ``fixed:16`` is there for
#: the cost model, see :mod:`experiments.results.model_check`: several others draft as many.
LEADING = (
    "autoregressive", "fixed:1", "fixed:2", "fixed:4", "mlp16", "online:lookups=off", "online",
    "online+hybrid",
)  # fmt: skip


OTHERS = (
    "transformers", "transformers:constant-4", "transformers:heuristic", "transformers:default", "fixed:8", "fixed:16",
    "mlp16:tokens_per_step", "hf-heuristic", "hf-confidence", "svip", "adaedl", "ucbspec", "vllm", "sglang",
    "fixed:2+hybrid",
)  # fmt: skip


PLACES = ("doc", "readme", "plot", "out")


@dataclass(frozen=True)
class ResultsConfig:
    """Settings of ``python -m experiments.results``."""

    pair: str = option("smollm2", "named model pair")
    levels: tuple[str, ...] = option(("fp16", "int8", "nf4"), "compression levels, comma separated")
    leading: tuple[str, ...] = option(LEADING, "contenders that decode all prompts, comma separated")
    others: tuple[str, ...] = option(OTHERS, "contenders that decode the first --some prompts only")
    prompts: int = option(80, "how many of the bundled held-out prompts")
    some: int = option(20, "how many of them the others decode")
    round: int = option(10, "prompts that a level decodes before the next level's turn; models load anew each time")
    max_new_tokens: int = option(64, "tokens to decode per prompt")
    seed: int = option(0, "seed of the prompt choice and of the policies")
    threads: int = option(0, "CPU threads (0: all cores)")
    device: str = option("auto", "auto, cpu or cuda")
    engine: str | None = option(None, ENGINE)
    doc: str = option("", "document to put the tables into, between its markers")
    readme: str = option("", "document to put the short table into, between its markers")
    plot: str = option("", "PNG file of the plot (default: results.png in --out)")
    out: str = option("runs/results", "run directory; a run that is there is continued")

    #: Settings that may change when a run is continued.
    VOLATILE = (*PLACES, "prompts", "some", "round", "leading", "others", "levels")

    def __post_init__(self) -> None:
        object.__setattr__(self, "engine", choose_engine(self.engine))
        for name in ("levels", "leading", "others"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise UserError(f"--{name} names something twice: {', '.join(values)}")
        if not self.levels:
            raise UserError("--levels is empty: name at least one")
        least = {"prompts": 1, "some": 1, "round": 1, "max_new_tokens": 1, "seed": 0, "threads": 0}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise UserError(f"--{name.replace('_', '-')} must be at least {value}, got {getattr(self, name)}")
