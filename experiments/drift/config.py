"""What a drift experiment is told: its phases and its settings."""

from __future__ import annotations

from dataclasses import dataclass

from experiments.config import option
from speckv_online.errors import UserError
from speckv_online.modeling.engine import HELP as ENGINE
from speckv_online.modeling.engine import choose_engine

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
    policies: tuple[str, ...] = option(("autoregressive", "mlp16", "online"), "policies, comma separated")
    per_phase: int = option(8, "prompts per phase")
    prompts: str = option("", "JSONL file of prompts (default: the bundled held-out ones)")
    max_new_tokens: int = option(64, "tokens to decode per prompt")
    seed: int = option(0, "seed of the prompts and the policies")
    threads: int = option(0, "CPU threads (0: all cores)")
    device: str = option("auto", "auto, cpu or cuda")
    engine: str | None = option(None, ENGINE)
    threshold: float = option(10.0, "Page-Hinkley: summed change of the acceptance that is an alarm")
    doc: str = option("", "document to put the tables into, between its markers")
    plot: str = option("", "where the plot goes besides the run directory, e.g. docs/img/drift-measured.png")
    out: str = option("", "run directory, continued if it holds the same run (default: runs/drift__SEED__TIME)")

    VOLATILE = ("out", "threads", "threshold", "doc", "plot")
    RESUMES = True
    #: What a run's ``config.yaml`` holds besides, if its prompts come from a file.
    EXTRA = ("prompts_sha256",)

    def __post_init__(self) -> None:
        object.__setattr__(self, "engine", choose_engine(self.engine))
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
