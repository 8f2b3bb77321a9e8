"""What the load experiment is told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from experiments.config import option
from speckv_online.errors import UserError

#: Contenders: no speculation, fixed numbers of drafts, vLLM's table tuned in hindsight, and our policy.
NONE, TABLE = "none", "table"
#: Shortest and longest run of tokens that vLLM's lookups match.
NGRAMS = 2, 4
#: What stands before the name of a policy that starts from a state.
WARM = "warm "
METHODS = ("ngram", "draft_model")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class LoadConfig:
    """Settings of ``python -m experiments.load``."""

    python: str = option("", "interpreter that has vLLM (default: this one)")
    methods: tuple[str, ...] = option(METHODS, "how drafts are made: ngram, draft_model, comma separated")
    dtypes: tuple[str, ...] = option(("bfloat16",), "the target's dtype, comma separated")
    contenders: tuple[str, ...] = option(
        (NONE, "1", "2", "4", TABLE, "online"),
        "none, fixed numbers, table (vLLM's, tuned here in hindsight), or spec strings of policies, comma separated",
    )
    concurrency: tuple[str, ...] = option(
        ("1", "2", "4", "8", "16"), "closed loop: requests at a time, comma separated"
    )
    rates: tuple[str, ...] = option(("1", "2", "4"), "open loop: Poisson arrivals per second, comma separated")
    requests: int = option(12, "requests per block, and four more for each one at a time")
    output_tokens: int = option(64, "most tokens of an answer")
    varied: bool = option(True, "answers of half as many tokens to all of them; else all alike, and in step")
    repeats: int = option(3, "blocks of each contender and load, in turns")
    most_drafts: int = option(8, "most drafts that a policy may choose")
    compiled: bool = option(False, "let vLLM compile the model, which takes minutes per server")
    quick: bool = option(False, "a look in less than five minutes: two loads, three contenders, one method")
    threads: int = option(0, "cores of each server (0: vLLM's choice)")
    gigabytes: int = option(1, "memory for each server's cache")
    lock: str = option("", "file to lock while blocks are played, for a machine that others use, too")
    ray: bool = option(False, "each method and dtype as a Ray task on a machine of its own")
    json: bool = option(False, "print the result as JSON")
    seed: int = option(0, "seed of prompts and arrivals")
    warm: bool = option(False, "play each policy also with a state that a server of its own has learnt at these loads")
    calibrated: str = option("", "directory of experiments.load.calibrate: the simulator's predictions stand beside")
    models: str = option("", "folder of the exported models (default: in the cache)")
    doc: str = option("", "document to put the tables into, between its markers")
    images: str = option("", "folder for the picture, beside the document (default: the run directory alone)")
    out: str = option("runs/load", "run directory")

    def __post_init__(self) -> None:
        if bad := [m for m in self.methods if m not in METHODS] + [d for d in self.dtypes if d not in DTYPES]:
            raise UserError(f"--methods takes {', '.join(METHODS)}, and --dtypes {', '.join(DTYPES)}, not '{bad[0]}'")
        if not all(n.isdigit() and 1 <= int(n) <= 256 for n in self.concurrency) or not self.concurrency:
            raise UserError("--concurrency takes whole numbers from 1 to 256")
        try:
            if not all(float(rate) > 0 for rate in self.rates):
                raise ValueError
        except ValueError:
            raise UserError("--rates takes numbers above 0") from None
        if min(self.requests, self.output_tokens, self.repeats, self.gigabytes) < 1 or not 1 <= self.most_drafts <= 16:
            raise UserError(
                "--requests, --output-tokens, --repeats and --gigabytes start at 1, --most-drafts at 1 to 16"
            )
        if self.python and not Path(self.python).is_file():
            raise UserError(f"--python {self.python}: there is no such file")
        if not self.contenders or (TABLE in self.contenders and not self.fixed()):
            raise UserError("--contenders: the table is tuned on fixed numbers and 'none': name some")

    def all_contenders(self) -> list[str]:
        """Return the contenders, with those that start from a state."""
        more = [f"{WARM}{name}" for name in self.contenders if name not in (*self.fixed(), TABLE)]
        return [*self.contenders, *more] if self.warm else list(self.contenders)

    def fixed(self) -> list[str]:
        """Return the contenders that the table is tuned on."""
        return [name for name in self.contenders if name == NONE or name.isdigit()]
