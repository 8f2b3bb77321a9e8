"""A stream that changes its tasks, its level and its draft while policies learn, decoded on real models.

Every policy decodes every prompt, one after the other, and keeps what it has learnt when the stream changes. No policy
is told of a change of draft or of tasks; the level is part of what it sees. The other drafts are ``layers:N``, the
first N layers of the target itself, undistilled (right nearly never), and ``ngram``, a lookup in the context.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from experiments.common.bundled_prompts import TASKS, bundled, prompts_digest
from experiments.common.documents import check_place
from experiments.config import launch
from experiments.drift.config import DriftConfig, Phase
from experiments.runtime.run_manifest import earlier_manifest, where_measured
from speckv_online.errors import UserError
from speckv_online.io import manifest
from speckv_online.io.files import exclusive
from speckv_online.io.prompts import Prompt, choose, read_prompts
from speckv_online.io.run_directory import RunDir, StepWriter, Unit, check_writable


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return launch(drift, DriftConfig, argv)


def drift(config: DriftConfig) -> int:
    """Decode the stream, or what is left of it, and write ``drift.json``, ``drift.md`` and ``drift.png``."""
    from experiments.drift.report import publish, write_drift
    from policies.registry import make_policy
    from speckv_online.models.levels import get_level

    units = plan(config)
    for phase in config.stream():
        get_level(phase.level)
    for spec in config.policies:
        make_policy(spec)
    check_place(config.doc, "drift")
    path = Path(config.out or f"runs/drift__{config.seed}__{time.strftime('%Y%m%d-%H%M%S')}").expanduser().resolve()
    extra = {"prompts_sha256": prompts_digest([prompt for _, _, prompt in units])} if config.prompts else {}
    check_writable(path)
    with exclusive(path):
        run = RunDir.open(path, asdict(config) | extra, volatile=DriftConfig.VOLATILE)
        writer = StepWriter(path / "steps-drift.jsonl")
        files = {k: Path(v).name for k in ("target", "draft", "prompts") if (v := getattr(config, k))}
        ids = list(dict.fromkeys(unit.prompt for unit, _, _ in units))
        # A count is understood as one for each level.
        count = {"count": len(ids)} if len({phase.level for phase in config.stream()}) == 1 else {}
        earlier = earlier_manifest(path)
        facts = manifest.collect(
            command="python -m experiments.drift",
            config=asdict(config) | {"out": "", "doc": "", "plot": ""} | files,
            seeds=[config.seed],
            prompts=count | {"ids": ids},
            workers=earlier.get("workers", {}),
        )  # fmt: skip
        left = any(unit.key not in writer.done for unit, _, _ in units)
        if not left:
            facts |= where_measured(earlier)
        run.write_manifest(facts)
        if left:
            decode(config, units, path, writer, facts["workers"])
        writer.close()
        run.write_manifest(facts | {"status": "finished", "finished": manifest.now()})
        print(write_drift(path, config.stream(), config.threshold) + f"\nRun: {path}")
    publish(path, config.doc, config.plot)
    return 0


def plan(config: DriftConfig) -> list[tuple[Unit, Phase, Prompt]]:
    """Return everything that is to be decoded, in order: by phase and prompt, the policies taking turns to go first.

    Prompts are chosen without repetition while there are enough of a task; a phase's number is part of the prompt id.
    """
    pool = read_prompts(config.prompts) if config.prompts else bundled()
    used: set[str] = set()
    found: list[tuple[Unit, Phase, Prompt]] = []
    for number, phase in enumerate(config.stream()):
        own = [prompt for prompt in pool if prompt.task in phase.tasks]
        if missing := set(phase.tasks) - {prompt.task for prompt in own}:
            known = ", ".join(TASKS) if not config.prompts else ", ".join(sorted({p.task for p in pool}))
            raise UserError(f"there are no prompts of task {', '.join(sorted(missing))}: choose from {known}")
        fresh = [prompt for prompt in own if prompt.id not in used]
        chosen = choose(fresh if len(fresh) >= config.per_phase else own, config.per_phase, config.seed)
        chosen = [chosen[i % len(chosen)] for i in range(config.per_phase)]
        for i, prompt in enumerate(chosen):
            used.add(prompt.id)
            k = (len(found) // len(config.policies)) % len(config.policies)
            for spec in config.policies[k:] + config.policies[:k]:
                unit = Unit(phase.level, spec, f"{number}.{i}:{prompt.id}", prompt.task, config.seed)
                found.append((unit, phase, prompt))
    return found


def decode(
    config: DriftConfig,
    units: Sequence[tuple[Unit, Phase, Prompt]],
    path: Path,
    writer: StepWriter,
    workers: dict[str, Any],
) -> None:
    """Decode the units that the records lack; a policy goes on from its checkpoint."""
    from tqdm import tqdm

    from experiments.drift.stage import Stage

    stage = Stage(config, path)
    bar = tqdm(units, unit="unit", disable=not sys.stderr.isatty(), file=sys.stderr)
    for number, (unit, phase, prompt) in enumerate(bar, start=1):
        if unit.key in writer.done:
            continue
        result = stage.decode(unit, phase, prompt)
        workers |= stage.facts
        writer.write(unit, result.steps, {"output": result.tokens, "phase": phase.name, "finish": result.finish})
        stage.save(unit.policy)
        if bar.disable:
            text = f"{number}/{len(units)} {phase.name} {unit.policy} on {prompt.id}: {result.goodput:.1f} tokens/s"
            print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
