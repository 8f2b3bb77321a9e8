"""Everything that is to be measured on one GPU, in stages that each write a JSON file; it needs no network.

Stages run one after the other, each in a process of its own: one that breaks the device, or hangs, does not take the
others with it. A stage that is over its seconds ends with what it has. What the machine lacks is named in one line.
"""

from __future__ import annotations

import importlib
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from time import monotonic

from experiments.bench.gpu.settings import BUDGETS, START, TOTAL, GpuConfig, Stage
from experiments.bench.gpu.targets import targets
from experiments.config import launch
from speckv_online.console import say
from speckv_online.io.run_directory import check_writable

#: Stage -> its module.
MODULES = {name: "ray_jobs" if name == "ray" else name for name in BUDGETS}
#: Seconds that a stage may take beyond its budget, starting included, before it is ended.
GRACE = 40
#: Seconds that it then has to end what it has started, before it is killed.
TIDY = 15


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return launch(bench, GpuConfig, argv)


def bench(config: GpuConfig) -> int:
    """Run the stages; return 0 if each wrote its file and none of them broke."""
    check_writable(Path(config.out).expanduser())
    if len(config.stages) == 1:
        return one_stage(config, config.stages[0])
    forget(Path(config.out).expanduser(), config.stages)
    started, codes = monotonic(), []
    for name in config.stages:
        left = config.budget(name) if config.seconds else TOTAL - START - (monotonic() - started)
        codes.append(in_a_process(config, name, int(min(config.budget(name), left))))
    for target in targets(Path(config.out).expanduser()):
        print(target.line())
    print(f"{len(codes) - sum(map(bool, codes))} of {len(codes)} stages ended well, "
          f"{monotonic() - started:.0f} s: {config.out}")  # fmt: skip
    return int(any(codes))


def forget(folder: Path, stages: Sequence[str]) -> None:
    """Delete what an earlier run of these stages wrote: where one is skipped now, that would pass as measured now."""
    for name in stages:
        for path in (folder / f"{name}.json", *(folder.glob("cost-*.json") if name == "costs" else ())):
            path.unlink(missing_ok=True)


def in_a_process(config: GpuConfig, name: str, seconds: int) -> int:
    """Run a stage in a process of its own; return its exit code."""
    if seconds <= 0:
        say(f"{name} skipped: the time for all stages, {TOTAL} s, is over")
        return 0
    command = [sys.executable, "-m", "experiments.bench.gpu", "--stages", name, "--device", config.device]
    command += ["--out", config.out, "--seconds", str(seconds), *(["--tiny"] if config.tiny else [])]
    return run_command(command, name, seconds + GRACE)


def run_command(command: list[str], name: str, limit: int) -> int:
    """Run a stage's command for so many seconds at most; return its exit code.

    A stage that is late is interrupted, so that it ends what it has started (Ray has processes of its own); one that
    hangs in the device does not notice, and is killed.
    """
    with subprocess.Popen(command) as process:
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            say(f"{name}: ended after {limit} s; its file has what was there by then")
            process.send_signal(signal.SIGINT)
            try:
                process.wait(TIDY)
            except subprocess.TimeoutExpired:
                process.kill()
            return 1
        except BaseException:
            process.kill()
            raise


def one_stage(config: GpuConfig, name: str) -> int:
    """Run a stage in this process."""
    import torch

    from speckv_online.io.manifest import hardware, software
    from speckv_online.models.pairs import pick_device
    from speckv_online.models.quiet import quiet_libraries

    quiet_libraries()
    asked = "cuda" if config.device == "auto" else config.device
    stage = Stage(name, config, torch.device(asked))
    if asked == "cuda" and not torch.cuda.is_available():
        stage.skip("the whole stage", "no CUDA device was found: use --device cpu --tiny to try the script")
        return 0
    forget(stage.folder, (name,))
    stage.device = pick_device(asked)
    stage.found |= {"device": asked, "tiny": config.tiny, "hardware": hardware(), "software": software()}
    stage.save()
    importlib.import_module(f"experiments.bench.gpu.{MODULES[name]}").run(stage)
    skipped, failed = len(stage.found["skipped"]), len(stage.found["failed"])
    stage.found["complete"] = not skipped + failed
    path = stage.save()
    say(f"{name}: {stage.found['seconds']:.0f} s, {skipped} parts skipped, {failed} failed: {path}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
