"""Compare policies on real models: every prompt under every policy, at every compression level, interleaved.

Run it with ``python -m experiments.compare``, or as a job: ``ray job submit --working-dir . -- python -m
experiments.compare --out /absolute/path``.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from experiments.common.bundled_prompts import bundled, prompts_digest
from experiments.config import launch
from experiments.runtime.display import Display
from experiments.runtime.run_manifest import RunManifest
from experiments.runtime.settings import CompareConfig, Resources
from speckv_online.errors import UserError
from speckv_online.io import manifest
from speckv_online.io.files import exclusive
from speckv_online.io.prompts import Prompt, choose, read_prompts
from speckv_online.io.run_directory import RunDir, check_writable

#: What a reader of figures has to know of a run that did not start from nothing.
REMEMBERED = "Policies started from what earlier runs had learnt (--remember): see `remembered_steps` of each worker."
#: What a reader of figures has to know about a named pair.
PAIR_NOTES = {"smollm2": "The target smollm2 was stored in 4 bits before any compression level was applied to it."}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return launch(compare, CompareConfig, argv)


def compare(config: CompareConfig) -> int:
    """Run a comparison and print its report. Everything that can be refused is refused before a model is loaded.

    Returns
    -------
    int
        Exit code: 0 if every unit was decoded, 1 if a level failed; the report then says what is missing.
    """
    prompts = select_prompts(config)
    path = run_path(config)
    digest = prompts_digest(prompts)
    check_names(config)
    check_writable(path)

    # Imported late: torch and transformers take seconds, and mistakes should show at once.
    from experiments.runtime.local_runner import run_local
    from experiments.runtime.ray_runner import RayRun, connect
    from experiments.runtime.schedule import Node, plan
    from experiments.runtime.work_queue import Job
    from speckv_online.models.pairs import prepare

    with exclusive(path), contextlib.ExitStack() as stack:
        run = RunDir.open(path, asdict(config) | {"prompts_sha256": digest}, volatile=CompareConfig.VOLATILE)
        display = stack.enter_context(Display(config, len(prompts)))
        for left in path.glob(".*.part"):  # a killed run was writing it
            left.unlink()
        if config.target is None:
            display.say(f"preparing the model pair {config.pair}")
            prepare(config.pair)
        if not config.local:
            cluster = config.address or os.environ.get("RAY_ADDRESS")
            display.say("connecting to Ray" if cluster else "starting Ray")
        names = {key: _name(getattr(config, key)) for key in ("target", "draft", "prompts")}
        with contextlib.nullcontext([Node(manifest.cores())]) if config.local else connect(config.address) as nodes:
            schedule = plan(config, nodes, len(prompts) * config.orders)
            facts = manifest.collect(
                command="python -m experiments.compare " + shlex.join(_flags(config)),
                config=asdict(config) | {"out": "", "address": ""} | names,
                prompts={"count": len(prompts), "sha256": digest, "ids": [p.id for p in prompts]},
                seeds=[config.seed + i for i in range(config.orders)],
                schedule=schedule.describe() | {"actors": "none" if config.local else "ray"},
                notes=[note for pair, note in PAIR_NOTES.items() if pair == config.pair and not config.target]
                + ([REMEMBERED] if config.remember else []),
            )
            ledger = RunManifest(run, facts, display)
            ledger.save()
            job = Job(config, prompts, path, schedule)
            try:
                for event in run_local(job, resumed=run.resumed) if config.local else RayRun(job).events():
                    failed = ledger.other_weights(event)
                    display.show(failed or event)
                    ledger.note(failed or event)
                    if failed:
                        break  # all levels load the same folders
            except BaseException:
                display.say(f"stopped; go on from here with --resume {path}")
                raise
        return ledger.finish(as_json=config.json)


def select_prompts(config: CompareConfig) -> list[Prompt]:
    """Return the prompts of a config: a number of the bundled held-out ones, or those of a file."""
    if config.prompts.isdecimal():
        return choose(bundled(), int(config.prompts), config.seed)
    prompts = read_prompts(config.prompts)
    return choose(prompts, config.limit, config.seed) if config.limit else prompts


def run_path(config: CompareConfig) -> Path:
    """Return the run directory, absolute: workers may run elsewhere."""
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ and not Path(config.out).expanduser().is_absolute():
        raise UserError("a Ray job runs in a copy of the code that is deleted later: give --out an absolute path")
    name = config.out or f"runs/compare__{config.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    return Path(name).expanduser().resolve()


def check_names(config: CompareConfig) -> None:
    """Refuse unknown levels, policies and pairs, each with a message of its own."""
    from policies.registry import make_policy
    from speckv_online.models.levels import get_level
    from speckv_online.models.pairs import at_level, list_pairs

    for level in config.levels:
        if config.target is not None and Path(config.target).expanduser().is_file():
            at_level(config.pair, config.target, level)
        else:  # of a folder on other machines nothing is known here
            get_level(level)
    for spec in config.policies:
        make_policy(spec)
    names = [pair["name"] for pair in list_pairs()]
    if config.target is None and config.pair not in names:
        raise UserError(f"unknown model pair {config.pair!r}: choose {', '.join(names)}, or give --target and --draft")


def _flags(config: CompareConfig) -> Iterator[str]:
    """The flags that make this config again, but for where it runs and writes; paths are cut to their last part."""
    default = CompareConfig()
    for key, value in asdict(config).items():
        if value == getattr(default, key) or key in ("out", "address"):
            continue
        if key == "resources":
            for level, own in value.items():
                yield from (f"--set=resources.{level}.{k}={v}" for k, v in own.items() if v != getattr(Resources(), k))
            continue
        flag = f"--{key.replace('_', '-')}"
        if isinstance(value, bool):
            yield flag if value else flag.replace("--", "--no-", 1)
        else:
            yield flag
            yield ",".join(value) if isinstance(value, tuple) else str(_name(value))


def _name(value: Any) -> Any:
    """Return a path that exists here as its last part, anything else as it is."""
    return Path(value).name if isinstance(value, str) and value and Path(value).exists() else value


if __name__ == "__main__":
    sys.exit(main())
