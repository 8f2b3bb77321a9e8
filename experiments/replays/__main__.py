"""Replay every policy on exact traces: all pairs of models x levels x cost files, against what hindsight knows.

Each cell (one pair, level and cost file) is a contest of its own: policies start from what ships, are told the costs as
after a calibration, and learn from prompt to prompt, in several seeded orders. All seconds are modelled. Writes
``replays.json`` and ``replays.md``, and with ``--doc`` puts the tables between the markers of a document.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.common.documents import check_place, insert
from experiments.config import launch
from experiments.replays.cell import ReplaysConfig, is_learned, run_cells
from policies.registry import make_policy

if TYPE_CHECKING:
    pass

MARKER = "replays"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return launch(replays, ReplaysConfig, argv)


def replays(config: ReplaysConfig) -> int:
    """Run all contests and write the tables."""
    from experiments.replays.tables import as_document, as_json
    from speckv_online.io import manifest
    from speckv_online.io.files import write_atomically
    from speckv_online.io.run_directory import check_writable

    for spec in config.policies:
        make_policy(spec)  # a typo should show at once
    check_place(config.doc, MARKER)
    out = Path(config.out).expanduser()
    check_writable(out)
    cells = run_cells(config)
    facts = {"git": manifest.git_state(), "settings": asdict(config), "made": manifest.now()}
    learned = [spec for spec in config.policies if is_learned(spec)]
    text = as_document(cells, learned, facts)
    document = json.dumps(as_json(cells, learned, facts), indent=1) + "\n"
    write_atomically(out / "replays.json", lambda f: f.write(document))
    write_atomically(out / "replays.md", lambda f: f.write(text))
    if config.doc:
        insert(Path(config.doc), text, MARKER)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
