"""Frozen dataclass configs: one declaration gives the defaults, the command-line flags with their help, and YAML."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

from speckv_online.drafter_spec import HELP as DRAFTERS
from speckv_online.drafter_spec import parse_drafter
from speckv_online.errors import UserError

T = TypeVar("T")


def option(default: Any, help: str, **metadata: Any) -> Any:
    """Declare a config field with its default and one line of help."""
    return field(default=default, metadata={"help": help, **metadata})


@dataclass(frozen=True)
class CompareConfig:
    """Settings of ``python -m experiments.compare``."""

    pair: str = option("smollm2", "named model pair, see `speckv models`")
    target: str | None = option(None, "target model: a Hugging Face id or a directory (with --draft)")
    draft: str | None = option(None, "draft model with the same tokenizer: an id or a directory")
    drafter: str = option("model", DRAFTERS)
    levels: tuple[str, ...] = option(("fp16", "int8", "nf4"), "compression levels of the target, comma separated")
    policies: tuple[str, ...] = option(
        ("autoregressive", "fixed:4", "mlp16", "online"), "policies to compare, comma separated, see `speckv policies`"
    )
    prompts: str = option("6", "how many of the bundled held-out prompts, or a JSONL file")
    limit: int = option(0, "at most this many prompts of a file, tasks in turn (0: all)")
    max_new_tokens: int = option(32, "tokens to decode per prompt")
    orders: int = option(1, "how many seeded orders of the prompts to run; learning policies start afresh in each")
    seed: int = option(0, "seed of the prompt choice, the orders and the policies")
    threads: int = option(0, "CPU threads per worker; levels run side by side if the cores allow it (0: all cores)")
    device: str = option("auto", "auto, cpu or cuda")
    out: str = option("", "run directory, continued if it holds the same run (default: runs/compare__SEED__TIME)")
    local: bool = option(False, "run in this process, without Ray")
    json: bool = option(False, "print the report as JSON instead of text")

    #: Flags that may change when a run is continued.
    VOLATILE = ("out", "json", "local", "threads")

    def __post_init__(self) -> None:
        for name in ("levels", "policies"):
            values = getattr(self, name)
            if not values:
                raise UserError(f"--{name} is empty: name at least one")
            if len(set(values)) < len(values):
                raise UserError(f"--{name} names something twice: {', '.join(values)}")
        for name, least in (("max_new_tokens", 1), ("orders", 1), ("threads", 0), ("limit", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise UserError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(self, name)}")
        parse_drafter(self.drafter).check_models(self.target, self.draft)


def split_specs(text: str) -> tuple[str, ...]:
    """Split a comma-separated list whose items may hold commas themselves, as in ``fixed:4,online:seed=3,strength=9``.

    A piece that has a ``=`` but no ``:`` before it is one more option of the item to its left.
    """
    items: list[str] = []
    for piece in (p.strip() for p in text.split(",")):
        if items and "=" in piece and ":" not in piece.split("=")[0] and ":" in items[-1]:
            items[-1] += f",{piece}"
        elif piece:
            items.append(piece)
    return tuple(items)


def add_options(parser: argparse.ArgumentParser, cls: type) -> None:
    """Add a flag for every field of a config class, and ``--config`` for a YAML file with the same names."""
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings; flags given here win over it")
    for f in fields(cls):
        text = f.metadata["help"]
        if "default:" not in text:
            text += f" (default: {_show(f)})"
        flag, kwargs = f"--{f.name.replace('_', '-')}", {"default": argparse.SUPPRESS, "help": text}
        if isinstance(f.default, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **kwargs)
        elif isinstance(f.default, tuple):
            parser.add_argument(flag, type=split_specs, metavar="A,B,…", **kwargs)
        elif isinstance(f.default, int):
            parser.add_argument(flag, type=int, metavar="N", **kwargs)
        else:
            parser.add_argument(flag, metavar=f.name.upper(), **kwargs)


def parse(cls: type[T], argv: Sequence[str] | None, prog: str, description: str) -> T:
    """Read the command line into a config; raises :class:`UserError` for values that make no sense."""
    parser = argparse.ArgumentParser(prog=prog, description=description, allow_abbrev=False)
    add_options(parser, cls)
    given = vars(parser.parse_args(argv))
    file = given.pop("config", None)
    return cls(**((load_yaml(cls, file) if file else {}) | given))


def load_yaml(cls: type, file: str | Path) -> dict[str, Any]:
    """Read settings of a config class from YAML, with their types checked."""
    try:
        values = yaml.safe_load(Path(file).read_text(encoding="utf-8")) or {}
    except OSError as e:
        raise UserError(f"cannot read the config {file}: {e.strerror or e}") from e
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise UserError(f"{file} is not valid YAML: {' '.join(str(e).split())}") from e
    if not isinstance(values, dict):
        raise UserError(f"{file} is not a mapping of settings to values")
    known = {f.name: f for f in fields(cls)}
    result = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise UserError(f"{file}: unknown setting {key!r}; known are {', '.join(known)}")
        result[name] = _checked(known[name], value, file)
    return result


def resolved(config: Any) -> dict[str, Any]:
    """Return a config as a plain dict."""
    return asdict(config)


def _checked(f: Field[Any], value: Any, file: str | Path) -> Any:
    if isinstance(f.default, tuple):
        if isinstance(value, str):
            return split_specs(value)
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return tuple(value)
        raise UserError(f"{file}: {f.name} must be a list of names")
    if f.name == "prompts" and type(value) is int:  # the count needs no quotes in YAML
        return str(value)
    wanted = str if f.default is None else type(f.default)
    if type(value) is not wanted and not (f.default is None and value is None):
        raise UserError(f"{file}: {f.name} must be of type {wanted.__name__}, got {value!r}")
    return value


def _show(f: Field[Any]) -> str:
    if f.default is MISSING or f.default is None:
        return "none"
    if isinstance(f.default, bool):
        return "yes" if f.default else "no"
    return ",".join(f.default) if isinstance(f.default, tuple) else str(f.default)
