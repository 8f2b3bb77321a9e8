"""Frozen dataclass configs: one declaration gives the defaults, the command-line flags with their help, and YAML."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, field, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

from speckv_online.console import run_command, split_specs
from speckv_online.errors import UserError
from speckv_online.io.files import read_settings

T = TypeVar("T")


def option(default: Any, help: str, **metadata: Any) -> Any:
    """Declare a config field with its default and a line of help; with default None it holds text or ``type``."""
    return field(default=default, metadata={"help": help, **metadata})


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
    name = name.removesuffix(".__main__")
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
    if f.name == "engine" and value is False:  # what YAML makes of off
        return "off"
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
