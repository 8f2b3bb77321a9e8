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
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.common.bundled_prompts import bundled
from experiments.common.documents import check_place
from experiments.config import launch
from experiments.results.config import PLACES, ResultsConfig
from experiments.results.contenders import PEER, Bench, is_peer
from policies.registry import make_policy
from speckv_online.drafters.spec import parse_drafter
from speckv_online.errors import UserError
from speckv_online.io.files import exclusive
from speckv_online.io.prompts import choose

if TYPE_CHECKING:
    from speckv_online.io.run_directory import RunDir


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return launch(results, ResultsConfig, argv)


def results(config: ResultsConfig) -> int:
    """Decode what is missing, then write the tables. Everything that can be refused is refused before that."""
    from experiments.results.headline import MARKER as HEADLINE
    from experiments.results.tables import MARKER
    from speckv_online.io.run_directory import RunDir, check_writable

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
    from experiments.results.transformers_baseline import SCHEDULES
    from speckv_online.models.levels import get_level
    from speckv_online.models.pairs import list_pairs

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
    from experiments.results.headline import publish_headline
    from experiments.results.tables import publish
    from speckv_online.io import manifest
    from speckv_online.io.run_directory import read_manifest

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
