#!/usr/bin/env bash
# ADWIN's alarm is up for one update, and the next update throws away window and counts: asked after batches, there was no change.
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
print("expected: after a batch, drift_detected or n_detections tells whether it held a change; the window keeps the new level's values")
chance = random.Random(0)
stream = [float(chance.random() < (0.8 if i < 1000 else 0.2)) for i in range(2000)]
detector, alarms = drift.ADWIN(), []
for i, x in enumerate(stream, 1):
    before = detector.drift_detected
    detector.update(x)
    if detector.drift_detected:
        alarms.append(i)
        at_alarm = f"window {detector.width:g}, estimate {detector.estimation:.2f}, n_detections {detector.n_detections}"
        print(f"seen: 0.8 becomes 0.2 after update 1000; alarm at {i}, {at_alarm}")
    if before:
        print(f"seen: one update later: window {detector.width:g}, n_detections {detector.n_detections}")
        left = detector.width
total = detector.n_detections
detector, polled = drift.ADWIN(), 0
for start in range(0, 2000, 50):
    for x in stream[start : start + 50]:
        detector.update(x)
    polled += detector.drift_detected
print(f"seen: asked after every batch of 50: {polled} alarms; n_detections at the end {detector.n_detections}")
found = len(alarms) == 1 and alarms[0] % 32 == 0 and left == 1 and total == 0 and polled == 0
print("as found" if found else "CHANGED")
sys.exit(not found)
PY
