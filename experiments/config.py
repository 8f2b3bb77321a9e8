"""Frozen dataclass configs: one declaration gives the defaults, the command-line flags with their help, and YAML."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

from speckv_online.commands import run_command, split_specs
from speckv_online.drafter_spec import HELP as DRAFTERS
from speckv_online.drafter_spec import parse_drafter
from speckv_online.errors import UserError
from speckv_online.files import read_settings

T = TypeVar("T")


def option(default: Any, help: str, **metadata: Any) -> Any:
    """Declare a config field with its default and a line of help; with default None it holds text or ``type``."""
    return field(default=default, metadata={"help": help, **metadata})


@dataclass(frozen=True)
class Resources:
    """What the workers of a compression level may use."""

    workers: int = option(0, "workers that share this level's prompts, on Ray (0: as --workers)")
    threads: int = option(0, "CPU threads per worker (0: as --threads)")
    gpus: float | None = option(None, "GPUs per worker, also a fraction (default: 1 where there are any)", type=float)

    def __post_init__(self) -> None:
        for name in ("workers", "threads", "gpus"):
            if (getattr(self, name) or 0) < 0:
                raise UserError(f"resources: {name} must not be negative, got {getattr(self, name)}")


#: Who learns together: nobody, the workers of one level, or all.
SHARING = ("none", "per-level", "global")


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
    sharing: str = option("global", "who learns together: none (each worker alone), per-level, or global (all levels)")
    sync_every: int = option(32, "steps after which a worker sends what a policy learnt and pulls the merged one")
    workers: int = option(1, "workers per level, on Ray")
    threads: int = option(0, "CPU threads per worker (0: its part of the cores, up to 8)")
    resources: dict[str, Resources] = field(
        default_factory=dict,
        metadata={"help": "workers, threads and gpus by level; `default` for the rest", "of": Resources},
    )
    device: str = option("auto", "auto, cpu or cuda")
    out: str = option("", "run directory, continued if it holds the same run (default: runs/compare__SEED__TIME)")
    address: str = option("", "Ray cluster (default: RAY_ADDRESS or that of the surrounding job, else one of its own)")
    local: bool = option(False, "run in this process, without Ray")
    json: bool = option(False, "print the report as JSON instead of text")

    #: Settings that may change when a run is continued.
    VOLATILE = ("out", "json", "local", "threads", "workers", "resources", "address")
    #: ``--resume RUN_DIR`` takes the settings of an earlier run.
    RESUMES = True
    #: What a run's ``config.yaml`` holds besides.
    EXTRA = ("prompts_sha256",)

    def __post_init__(self) -> None:
        for name in ("levels", "policies"):
            values = getattr(self, name)
            if not values:
                raise UserError(f"--{name} is empty: name at least one")
            if len(set(values)) < len(values):
                raise UserError(f"--{name} names something twice: {', '.join(values)}")
        least = {"max_new_tokens": 1, "orders": 1, "sync_every": 1, "workers": 1, "threads": 0, "limit": 0, "seed": 0}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise UserError(f"--{name.replace('_', '-')} must be at least {value}, got {getattr(self, name)}")
        if self.sharing not in SHARING:
            raise UserError(f"--sharing must be one of {', '.join(SHARING)}, got {self.sharing!r}")
        if unknown := set(self.resources) - {*self.levels, "default"}:
            raise UserError(f"resources: {', '.join(sorted(unknown))} is none of the levels {', '.join(self.levels)}")
        parse_drafter(self.drafter).check_models(self.target, self.draft)

    def for_level(self, level: str) -> Resources:
        """Return what a level's workers may use, the general settings filled in."""
        own = self.resources.get(level) or self.resources.get("default") or Resources()
        return Resources(own.workers or self.workers, own.threads or self.threads, own.gpus)


def add_options(parser: argparse.ArgumentParser, cls: type) -> None:
    """Add a flag for every plain field of a config class, ``--config`` for a YAML file, and ``--set`` for any field."""
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings; flags given here win over it")
    text = "set anything that the YAML file may hold, e.g. resources.nf4.gpus=0.5; may be repeated"
    parser.add_argument("--set", metavar="NAME=VALUE", action="append", default=[], help=text)
    if getattr(cls, "RESUMES", False):
        parser.add_argument("--resume", metavar="RUN_DIR", help="continue a run that was stopped or killed")
    for f in fields(cls):
        text = f.metadata["help"]
        if "of" in f.metadata:
            continue  # no flag could say it: YAML or --set
        if "default:" not in text:
            text += f" (default: {_show(f)})"
        flag, kwargs = f"--{f.name.replace('_', '-')}", {"default": argparse.SUPPRESS, "help": text}
        if isinstance(f.default, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **kwargs)
        elif isinstance(f.default, tuple):
            parser.add_argument(flag, type=split_specs, metavar="A,B,…", **kwargs)
        elif isinstance(f.default, int | float):
            parser.add_argument(flag, type=type(f.default), metavar="N", **kwargs)
        else:
            parser.add_argument(flag, metavar=f.name.upper(), **kwargs)


def parse(cls: type[T], argv: Sequence[str] | None, prog: str, description: str) -> T:
    """Read the command line into a config; raises :class:`UserError` for values that make no sense.

    Later ones win: defaults, ``--resume`` or ``--config``, ``--set``, the other flags.
    """
    parser = argparse.ArgumentParser(prog=prog, description=description, allow_abbrev=False)
    add_options(parser, cls)
    given = vars(parser.parse_args(argv))
    file, folder, sets = given.pop("config", None), given.pop("resume", None), given.pop("set")
    if folder:
        if file or "out" in given:
            raise UserError("--resume takes the settings and the directory of a run: leave --config and --out away")
        folder = Path(folder).expanduser()
        file, given["out"] = folder / "config.yaml", str(folder)
    values = {str(k).replace("-", "_"): v for k, v in read_settings(file).items()} if file else {}
    check(cls, values, str(file))
    for text in sets:
        name, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--set {text}: must be of the form name=value")
        *path, last = [part if i else part.replace("-", "_") for i, part in enumerate(name.strip().split("."))]
        inner = values
        for part in path:
            inner = inner.setdefault(part, {}) if isinstance(inner, dict) else inner
        if not isinstance(inner, dict):
            raise UserError(f"--set {text}: {'.'.join(path)} holds no settings of its own")
        try:
            inner[last] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError) as e:  # the latter for a day that no calendar has
            raise UserError(f"--set {text}: not a valid value") from e
    return cls(**(check(cls, values, "--set" if sets else str(file)) | given))


def launch(job: Callable[[T], int | None], cls: type[T], argv: Sequence[str] | None) -> int:
    """Run a module's job with the settings of its command line, whose help is the head of its docstring.

    Returns
    -------
    int
        The exit code: the job's own, 2 for what a user can put right.
    """
    module = sys.modules[job.__module__]
    name = module.__spec__.name if module.__spec__ else module.__name__  # __name__ is __main__ under `python -m`
    description = (module.__doc__ or "").split("\n\n")[0]
    return run_command(name.partition(".")[2], lambda: job(parse(cls, argv, f"python -m {name}", description)))


def check(cls: type, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return settings as a config class wants them; raises :class:`UserError` for unknown names and wrong types."""
    known = {f.name: f for f in fields(cls)}
    result = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name in getattr(cls, "EXTRA", ()):
            continue
        if name not in known:
            raise UserError(f"{where}: unknown setting {key!r}; known are {', '.join(known)}")
        result[name] = _checked(known[name], value, where)
    return result


def _checked(f: Field[Any], value: Any, where: str) -> Any:
    if cls := f.metadata.get("of"):
        if isinstance(value, dict) and all(isinstance(v, dict) for v in value.values()):
            return {str(k): cls(**check(cls, v, f"{where}: {f.name}.{k}")) for k, v in value.items()}
        raise UserError(f"{where}: {f.name} must hold settings by name, e.g. {{nf4: {{threads: 2}}}}")
    if isinstance(f.default, tuple):
        if isinstance(value, str):
            return split_specs(value)
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return tuple(value)
        raise UserError(f"{where}: {f.name} must be a list of names")
    if f.name == "prompts" and isinstance(f.default, str) and type(value) is int:  # a count needs no quotes in YAML
        return str(value)
    wanted = f.metadata.get("type") or (str if f.default is None else type(f.default))
    if wanted is float and type(value) is int:
        return float(value)
    if type(value) is not wanted and not (f.default is None and value is None):
        raise UserError(f"{where}: {f.name} must be of type {wanted.__name__}, got {value!r}")
    return value


def _show(f: Field[Any]) -> str:
    if f.default is MISSING or f.default is None:
        return "none"
    if isinstance(f.default, bool):
        return "yes" if f.default else "no"
    return ",".join(f.default) if isinstance(f.default, tuple) else str(f.default)
