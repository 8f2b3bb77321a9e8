"""A stream that changes its tasks, its level and its draft while policies learn, decoded on real models.

Every policy decodes every prompt, one after the other, and keeps what it has learnt when the stream changes. No policy
is told of a change of draft or of tasks; the level is part of what it sees. The other drafts are ``layers:N``, the
first N layers of the target itself, undistilled (right nearly never), and ``ngram``, a lookup in the context.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from experiments.compare import TASKS, bundled, prompts_digest
from experiments.config import launch, option
from experiments.documents import check_place
from experiments.ledger import earlier_manifest, where_measured
from speckv_online import manifest
from speckv_online.errors import UserError
from speckv_online.files import exclusive
from speckv_online.prompts import Prompt, choose, read_prompts
from speckv_online.rundir import RunDir, StepWriter, Unit, check_writable

#: One stage of the stream: tasks, level, draft.
PHASES = ("code+math@fp16", "chat@fp16", "chat@nf4", "chat+code@nf4@layers:4", "code+math@nf4", "code+math@fp16@ngram")


@dataclass(frozen=True)
class Phase:
    """Part of the stream between two changes: tasks of its prompts, level of the target, and what drafts."""

    name: str
    tasks: tuple[str, ...]
    level: str
    draft: str = "own"

    @classmethod
    def read(cls, text: str) -> Phase:
        """Read ``TASK+TASK@LEVEL`` or ``TASK+TASK@LEVEL@DRAFT``; raises :class:`UserError` for anything else."""
        tasks, *rest = text.split("@")
        draft = rest[1] if len(rest) == 2 else "own"
        kind, _, count = draft.partition(":")
        known = draft in ("own", "ngram") or (kind == "layers" and count.isdecimal() and int(count) > 0)
        if len(rest) not in (1, 2) or not tasks or not known:
            raise UserError(f"--phases {text}: write TASK+TASK@LEVEL or TASK+TASK@LEVEL@own, @ngram or @layers:N")
        return cls(text, tuple(tasks.split("+")), rest[0], draft)


@dataclass(frozen=True)
class DriftConfig:
    """Settings of ``python -m experiments.drift``."""

    pair: str = option("smollm2", "named model pair, see `speckv models`")
    target: str | None = option(None, "target model: a Hugging Face id or a directory (with --draft)")
    draft: str | None = option(None, "draft model with the same tokenizer: an id or a directory")
    phases: tuple[str, ...] = option(PHASES, "the stream, TASK+TASK@LEVEL[@DRAFT], comma separated")
    policies: tuple[str, ...] = option(("autoregressive", "mlp16", "online", "goodput"), "policies, comma separated")
    per_phase: int = option(8, "prompts per phase")
    prompts: str = option("", "JSONL file of prompts (default: the bundled held-out ones)")
    max_new_tokens: int = option(64, "tokens to decode per prompt")
    seed: int = option(0, "seed of the prompts and the policies")
    threads: int = option(0, "CPU threads (0: all cores)")
    device: str = option("auto", "auto, cpu or cuda")
    threshold: float = option(10.0, "Page-Hinkley: summed change of the acceptance that is an alarm")
    doc: str = option("", "document to put the tables into, between its markers")
    plot: str = option("", "where the plot goes besides the run directory, e.g. docs/img/drift-measured.png")
    out: str = option("", "run directory, continued if it holds the same run (default: runs/drift__SEED__TIME)")

    VOLATILE = ("out", "threads", "threshold", "doc", "plot")
    RESUMES = True
    #: What a run's ``config.yaml`` holds besides, if its prompts come from a file.
    EXTRA = ("prompts_sha256",)

    def __post_init__(self) -> None:
        if not self.phases or not self.policies or len(set(self.policies)) < len(self.policies):
            raise UserError("--phases and --policies must name at least one each, and no policy twice")
        for name in ("per_phase", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        if self.seed < 0 or self.threads < 0 or not self.threshold > 0:
            raise UserError("--seed and --threads must not be negative, --threshold must be above zero")
        if (self.target is None) != (self.draft is None):
            raise UserError("--target and --draft go together: give both, or --pair")
        self.stream()

    def stream(self) -> list[Phase]:
        """Return the phases."""
        return [Phase.read(text) for text in self.phases]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return launch(drift, DriftConfig, argv)


def drift(config: DriftConfig) -> int:
    """Decode the stream, or what is left of it, and write ``drift.json``, ``drift.md`` and ``drift.png``."""
    from experiments.drift_report import publish, write_drift
    from policies.registry import make_policy
    from speckv_online.levels import get_level

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

    from experiments.drift_models import Stage

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
