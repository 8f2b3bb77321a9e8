#!/usr/bin/env bash
# ADWIN is not free of scale: the same stream in other units is found to change earlier, later or never; its delta holds for values in [0, 1] only.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3.11 -m venv venv
venv/bin/python -m pip install --quiet river==0.26.1 numpy==2.4.6
OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 venv/bin/python -I - <<'PY'
import random
import sys

import river
from river import drift

print(f"river {river.__version__}")
print("expected: counts instead of rates, or milliseconds instead of seconds, are found to change at the same update")
chance = random.Random(0)
seconds = [chance.gauss(0.30 if i < 500 else 0.35, 0.05) for i in range(1000)]


def first(unit: float, shift: float = 0.0) -> int | None:
    """The update of the first alarm."""
    detector = drift.ADWIN()
    for i, x in enumerate(seconds, 1):
        detector.update(unit * x + shift)
        if detector.drift_detected:
            return i
    return None


seen = {unit: first(unit) for unit in (0.1, 1.0, 10.0, 1000.0)}
for unit, at in seen.items():
    print(f"seen: the level rises by a deviation after update 500; values times {unit:g}: alarm at {at}")
print(f"seen: plus 100: alarm at {first(1.0, 100.0)}, so a shift does not matter")
found = seen[0.1] is None and seen[1.0] > seen[10.0] >= seen[1000.0] > 500 and first(1.0, 100.0) == seen[1.0]
print("as found" if found else "CHANGED")
sys.exit(not found)
PY
