"""Does learning pay? A policy that learns against its own frozen copy, on the same prompts.

The frozen copy is the same policy as it is after learning from all training prompts, seconds included; it never learns
again. Both go on: where nothing changes, and where something does that pretraining never saw. On exact traces by
default (modelled), on real models with ``--measured``. Writes ``adaptation.json``, ``adaptation.md`` and
``adaptation.png``. A run that was stopped is continued by the same command.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from experiments.adaptation.config import SAMPLE, AdaptationConfig
from experiments.common.documents import check_place, insert
from experiments.config import launch

MARKER = "adaptation"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return launch(adaptation, AdaptationConfig, argv)


def adaptation(config: AdaptationConfig) -> int:
    """Play what is left to play, and write what it came to."""
    if config.ray:
        from experiments.runtime.ray_runner import set_environment

        set_environment(os.environ.get("RAY_ADDRESS", ""))  # some library below imports ray
    from experiments.adaptation.report import document, plot, sentence, summarise, table
    from experiments.common.cached_cells import contents, run
    from speckv_online.io import manifest
    from speckv_online.io.files import exclusive, write_atomically
    from speckv_online.io.run_directory import RunDir, check_writable
    from speckv_online.reporting.report import markdown_table, text_table

    if config.quick:
        config = replace(config, steps=300, tokens=1000, orders=1)
    check_place(config.doc, MARKER)
    out = Path(config.out).expanduser()
    images = Path(config.images).expanduser() if config.images else out
    check_writable(images)
    kind = "measured" if config.measured else "modelled"
    directory = RunDir.open(out, asdict(config), volatile=AdaptationConfig.VOLATILE)
    with exclusive(out):
        facts = manifest.collect(
            command="python -m experiments.adaptation", config=asdict(config) | {"out": "", "doc": "", "images": ""}
        )
        directory.write_manifest(facts)
        traces = [text.partition("=")[2] for text in (*config.traces, *config.settled)] or [str(SAMPLE)]
        held = contents([*traces, *config.costs])
        how: dict[str, Any] = {"processes": config.processes}
        if config.ray:
            from experiments.common.ray_cells import play_on_ray

            how["elsewhere"] = partial(play_on_ray, whole_machines=config.measured)
        if config.measured:
            from experiments.adaptation import measured

            todo, play, code = measured.cells(config), partial(measured.play, config), measured.__name__
        else:
            from experiments.adaptation import cells, replay

            todo, code = cells.cells(config), replay.__name__
            play = partial(replay.play, config, replay.fit(config, todo, out / "weights", held))
        how |= {"code": [code], "policies": [config.policy], "settings": held}
        found = run(todo, play, out / "cells.jsonl", **how)
        directory.write_manifest(facts | {"status": "finished", "finished": manifest.now()})
    conditions = summarise({cell: found[cell] for cell in todo})
    answer = document(conditions, kind)
    write_atomically(out / "adaptation.json", lambda f: f.write(json.dumps(answer, indent=1) + "\n"))
    rows, costs = table(conditions), "" if config.measured else f", costs of {', '.join(config.costs)}"
    about = f"{sentence(conditions)}\n\nGeometric means over cells, {kind}; intervals are over prompts."
    text = "\n".join([about, "", *markdown_table(rows)]) + "\n"
    write_atomically(out / "adaptation.md", lambda f: f.write(text))
    plot(conditions, kind, images / "adaptation.png")
    if config.doc:
        insert(Path(config.doc), f"{text}\n![Cumulative gain over the frozen copy](img/adaptation.png)\n", MARKER)
    if config.json:
        print(json.dumps(answer, indent=1))
    else:
        print("\n".join([kind + costs, "", *text_table(rows), "", sentence(conditions)]))
        print(f"Picture: {images / 'adaptation.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
