"""The main claim on the clock: our decoder and policies beside transformers' own assisted generation, on real models.

At every level each prompt is decoded by every contender in turn, the order drawn anew for each prompt, in this one
process: transformers' ``generate`` with its schedules; every policy in our decoder with the draft model; and, after
``+``, with another drafter (``goodput+hybrid`` is the whole product). Goodput is tokens over the seconds of whole
calls, prompt included. Prompts come in rounds: each level decodes a few, then the next level, and after each round the
tables are written, so that a run that is stopped has tables with the same prompts at all levels. Started again, it
goes on where it was. With ``--doc`` the tables go into a document.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.compare import bundled
from experiments.config import launch, option
from experiments.documents import check_place
from experiments.results_bench import PEER, Bench, is_peer
from policies.registry import make_policy
from speckv_online.drafter_spec import parse_drafter
from speckv_online.errors import UserError
from speckv_online.files import exclusive
from speckv_online.prompts import choose

if TYPE_CHECKING:
    from speckv_online.rundir import RunDir

#: Decoded for every prompt, and those that only the first ``--some`` prompts are decoded by. ``fixed:16`` is there for
#: the cost model, see :mod:`experiments.results_model`: several others draft as many.
LEADING = (
    "autoregressive", "fixed:1", "fixed:2", "fixed:4", "mlp16", "online", "goodput:lookups=off", "goodput",
    "goodput+hybrid",
)  # fmt: skip
OTHERS = (
    "transformers", "transformers:constant-4", "transformers:heuristic", "transformers:default", "fixed:8", "fixed:16",
    "mlp16:tokens_per_step", "hf-heuristic", "hf-confidence", "svip", "adaedl", "ucbspec", "vllm", "sglang",
    "fixed:2+hybrid",
)  # fmt: skip
PLACES = ("doc", "readme", "plot", "out")


@dataclass(frozen=True)
class ResultsConfig:
    """Settings of ``python -m experiments.results``."""

    pair: str = option("smollm2", "named model pair")
    levels: tuple[str, ...] = option(("fp16", "int8", "nf4"), "compression levels, comma separated")
    leading: tuple[str, ...] = option(LEADING, "contenders that decode all prompts, comma separated")
    others: tuple[str, ...] = option(OTHERS, "contenders that decode the first --some prompts only")
    prompts: int = option(80, "how many of the bundled held-out prompts")
    some: int = option(20, "how many of them the others decode")
    round: int = option(10, "prompts that a level decodes before the next level's turn; models load anew each time")
    max_new_tokens: int = option(64, "tokens to decode per prompt")
    seed: int = option(0, "seed of the prompt choice and of the policies")
    threads: int = option(0, "CPU threads (0: all cores)")
    device: str = option("auto", "auto, cpu or cuda")
    doc: str = option("", "document to put the tables into, between its markers")
    readme: str = option("", "document to put the short table into, between its markers")
    plot: str = option("", "PNG file of the plot (default: results.png in --out)")
    out: str = option("runs/results", "run directory; a run that is there is continued")

    #: Settings that may change when a run is continued.
    VOLATILE = (*PLACES, "prompts", "some", "round", "leading", "others", "levels")

    def __post_init__(self) -> None:
        for name in ("levels", "leading", "others"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise UserError(f"--{name} names something twice: {', '.join(values)}")
        if not self.levels:
            raise UserError("--levels is empty: name at least one")
        least = {"prompts": 1, "some": 1, "round": 1, "max_new_tokens": 1, "seed": 0, "threads": 0}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise UserError(f"--{name.replace('_', '-')} must be at least {value}, got {getattr(self, name)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return launch(results, ResultsConfig, argv)


def results(config: ResultsConfig) -> int:
    """Decode what is missing, then write the tables. Everything that can be refused is refused before that."""
    from experiments.results_headline import MARKER as HEADLINE
    from experiments.results_tables import MARKER
    from speckv_online.rundir import RunDir, check_writable

    check_names(config)
    given = asdict(config)
    places: dict[str, Any] = {name: str(Path(given[name]).expanduser()) for name in PLACES if given[name]}
    config = replace(config, **places)
    check_place(config.doc, MARKER)
    check_place(config.readme, HEADLINE)
    check_writable(Path(config.out))
    with exclusive(config.out):
        run = RunDir.open(config.out, given, volatile=ResultsConfig.VOLATILE)
        print(decode(config, run))
    return 0


def check_names(config: ResultsConfig) -> None:
    """Refuse unknown pairs, levels and contenders, and contenders that nothing could be compared with."""
    from experiments.peers import SCHEDULES
    from speckv_online.levels import get_level
    from speckv_online.models import list_pairs

    names = [pair["name"] for pair in list_pairs()]
    if config.pair not in names:
        raise UserError(f"unknown model pair {config.pair!r}: choose {', '.join(names)}")
    for level in config.levels:
        get_level(level)
    for name in (*config.leading, *config.others):
        spec, _, drafter = name.partition("+")
        if is_peer(spec):
            if name not in SCHEDULES:
                raise UserError(f"unknown schedule {name!r}: choose {', '.join(SCHEDULES)}")
        else:
            make_policy(spec)  # a typo should show at once
            parse_drafter(drafter or "model")
    for family in ((PEER,), ("fixed", "autoregressive")):
        if not any(name.startswith(family) and "+" not in name for name in (*config.leading, *config.others)):
            raise UserError(f"--leading and --others name no {' or '.join(family)}: the tables compare with one")


def decode(config: ResultsConfig, run: RunDir) -> str:
    """Decode round by round, and write manifest and tables after each; return the tables."""
    from experiments.results_headline import publish_headline
    from experiments.results_tables import publish
    from speckv_online import manifest
    from speckv_online.rundir import read_manifest

    prompts = list(enumerate(choose(bundled("test"), config.prompts, config.seed)))
    # Where nothing is decoded now, the figures are of the machine and code that the manifest names already.
    origin = read_manifest(run.path) if (run.path / "run.json").exists() else {}
    known = origin.get("levels", ())
    benches = [Bench(config, level, run.path, known) for level in config.levels]
    others = [facts for facts in known if facts["level"] not in config.levels]
    settings = {name: value for name, value in asdict(config).items() if name not in PLACES}
    text, here = "", manifest.collect()  # before the documents change, which are of the same repository
    for start in range(0, len(prompts), config.round):
        group = prompts[start : start + config.round]
        decoded = sum(bench.run(group) for bench in benches)
        if decoded or not origin:
            origin = here
        if decoded or start + config.round >= len(prompts):
            facts = {"levels": [bench.facts for bench in benches] + others, "settings": settings}
            run.write_manifest(origin | facts)
            text = publish(run.path, config.doc, config.plot, config.leading, config.levels)
            if config.readme:
                publish_headline(run.path, config.readme, config.leading, config.levels)
    return text


if __name__ == "__main__":
    sys.exit(main())
