"""What the comparison of learning with a frozen copy is told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from experiments.common.trace_sources import check_traces
from experiments.config import option
from speckv_online.errors import UserError
from speckv_online.modeling.engine import HELP as ENGINE
from speckv_online.modeling.engine import choose_engine

#: What ships: a few traces, and times of the default pair on two cores of a CPU.
DATA = Path(__file__).parents[1] / "data"
SAMPLE, COSTS = DATA / "sample-traces.npz", DATA / "cost-cpu.json"
#: Conditions, and what changes in them.
CONDITIONS = {
    "unchanged": "nothing changes",
    "level": "a level that pretraining never saw",
    "task": "a task that pretraining never saw",
    "draft": "a draft that pretraining never saw",
    "costs": "other seconds than were calibrated",
    "long": "one user's prompts, for long",
}


@dataclass(frozen=True)
class AdaptationConfig:
    """Settings of ``python -m experiments.adaptation``."""

    traces: tuple[str, ...] = option(
        (), "traces to adapt to by pair, NAME=DIRECTORY, comma separated (default: a few that ship)"
    )
    settled: tuple[str, ...] = option((), "traces of other prompts, by pair as in --traces, to settle on before")
    costs: tuple[str, ...] = option((), "cost tables, files or built-in names, comma separated (default: one of a CPU)")
    policy: str = option("online", "the policy that learns; its frozen copy is the same with learn=none")
    conditions: tuple[str, ...] = option(tuple(CONDITIONS), "what to compare under, comma separated")
    steps: int = option(2000, "steps of adaptation")
    tokens: int = option(20_000, "tokens of one user's prompts")
    orders: int = option(3, "seeded orders of the prompts")
    quick: bool = option(False, "a look in less than a minute: 300 steps, 1,000 tokens, one order")
    measured: bool = option(False, "decode on real models, both copies in turns, instead of replaying traces")
    pair: str = option("smollm2", "measured: named model pair, see `speckv models`")
    target: str | None = option(None, "measured: target model, a Hugging Face id or a directory (with --draft)")
    draft: str | None = option(None, "measured: draft model with the same tokenizer: an id or a directory")
    device: str = option("auto", "measured: auto, cpu or cuda")
    engine: str | None = option(None, ENGINE)
    threads: int = option(0, "measured: CPU threads (0: all cores)")
    levels: tuple[str, ...] = option(("fp16", "int8", "nf4"), "measured: compression levels, comma separated")
    prompts: int = option(16, "measured: prompts to settle on, and to adapt to, of each condition")
    prompt_file: str = option("", "measured: JSONL of prompts of both splits (default: the bundled ones)")
    max_new_tokens: int = option(64, "measured: tokens to decode per prompt")
    ray: bool = option(False, "play cells as Ray tasks: on RAY_ADDRESS, in a Ray job, or on this machine")
    processes: int = option(1, "without Ray: how many cells to play at a time (measured: one)")
    seed: int = option(0, "seed of the first order")
    json: bool = option(False, "print the result as JSON")
    doc: str = option("", "document to put the tables into, between its markers")
    images: str = option("", "directory of the plot (default: beside the tables)")
    out: str = option("runs/adaptation", "run directory, continued if it holds the same run")

    VOLATILE = ("conditions", "ray", "processes", "json", "doc", "images", "out")

    def __post_init__(self) -> None:
        object.__setattr__(self, "engine", choose_engine(self.engine))
        if (self.target is None) != (self.draft is None):
            raise UserError("--target and --draft go together: give both, or --pair")
        if bool(self.traces) != bool(self.settled):
            raise UserError("--traces and --settled go together: what is adapted to, and what was settled on before")
        if self.traces:
            check_traces(self.traces)
            check_traces(self.settled, "--settled")
            if [t.partition("=")[0] for t in self.traces] != [t.partition("=")[0] for t in self.settled]:
                raise UserError("--settled must name the pairs of --traces, in the same order")
        if self.measured and (self.traces or self.quick):
            raise UserError("--measured decodes: leave --traces, --settled and --quick away")
        if not self.conditions or not set(self.conditions) <= set(CONDITIONS):
            raise UserError(f"--conditions must be of {', '.join(CONDITIONS)}")
        if self.traces and not self.costs:
            raise UserError("--traces needs --costs: a cost.json that was measured with them, or rtx3090-release")
        if not self.costs:
            object.__setattr__(self, "costs", (str(COSTS),))
        if not self.levels:
            raise UserError("--levels must name at least one")
        counts = ("steps", "tokens", "orders", "prompts", "max_new_tokens", "processes")
        if min(getattr(self, name) for name in counts) < 1 or min(self.seed, self.threads) < 0:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in counts)
            raise UserError(f"{names} must be at least 1, --seed and --threads not negative")
