"""Settings of a comparison, and the resources of its workers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from experiments.config import option
from speckv_online.drafters.spec import HELP as DRAFTERS
from speckv_online.drafters.spec import parse_drafter
from speckv_online.errors import UserError
from speckv_online.modeling.engine import HELP as ENGINE
from speckv_online.modeling.engine import choose_engine


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
    target: str | None = option(None, "target model: a Hugging Face id, a directory or a GGUF file (with --draft)")
    draft: str | None = option(None, "draft model with the same tokenizer: an id or a directory")
    drafter: str = option("model", DRAFTERS)
    levels: tuple[str, ...] = option(("fp16", "int8", "nf4"), "compression levels of the target, comma separated")
    policies: tuple[str, ...] = option(
        ("autoregressive", "fixed:4", "mlp16", "online"), "policies to compare, comma separated, see `speckv policies`"
    )
    prompts: str = option("16", "how many of the bundled held-out prompts, or a JSONL file")
    limit: int = option(0, "at most this many prompts of a file, tasks in turn (0: all)")
    max_new_tokens: int = option(64, "tokens to decode per prompt")
    orders: int = option(1, "how many seeded orders of the prompts to run; learning policies start afresh in each")
    seed: int = option(0, "seed of the prompt choice, the orders and the policies")
    sharing: str = option("global", "who learns together: none (each worker alone), per-level, or global (all levels)")
    remember: bool = option(
        False, "start from what earlier runs learnt here, and add to it; levels then learn apart from each other"
    )
    sync_every: int = option(32, "steps after which a worker sends what a policy learnt and pulls the merged one")
    call_seconds: float = option(60.0, "seconds that one call of a policy may take, before the policy is given up")
    workers: int = option(1, "workers per level, on Ray")
    threads: int = option(0, "CPU threads per worker (0: its part of the cores, up to 8)")
    resources: dict[str, Resources] = field(
        default_factory=dict,
        metadata={"help": "workers, threads and gpus by level; `default` for the rest", "of": Resources},
    )
    device: str = option("auto", "auto, cpu or cuda")
    engine: str | None = option(None, ENGINE)
    out: str = option("", "run directory, continued if it holds the same run (default: runs/compare__SEED__TIME)")
    address: str = option("", "Ray cluster (default: RAY_ADDRESS or that of the surrounding job, else one of its own)")
    local: bool = option(False, "run in this process, without Ray")
    json: bool = option(False, "print the report as JSON instead of text")

    #: Settings that may change when a run is continued.
    VOLATILE = ("out", "json", "local", "threads", "workers", "resources", "address", "call_seconds")
    #: ``--resume RUN_DIR`` takes the settings of an earlier run.
    RESUMES = True
    #: What a run's ``config.yaml`` holds besides.
    EXTRA = ("prompts_sha256",)

    def __post_init__(self) -> None:
        object.__setattr__(self, "engine", choose_engine(self.engine))
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
        if not 0 < self.call_seconds < math.inf:
            raise UserError(f"--call-seconds must be above 0, got {self.call_seconds}")
        if self.sharing not in SHARING:
            raise UserError(f"--sharing must be one of {', '.join(SHARING)}, got {self.sharing!r}")
        if unknown := set(self.resources) - {*self.levels, "default"}:
            raise UserError(f"resources: {', '.join(sorted(unknown))} is none of the levels {', '.join(self.levels)}")
        parse_drafter(self.drafter).check_models(self.target, self.draft)

    def for_level(self, level: str) -> Resources:
        """Return what a level's workers may use, the general settings filled in."""
        own = self.resources.get(level) or self.resources.get("default") or Resources()
        return Resources(own.workers or self.workers, own.threads or self.threads, own.gpus)
