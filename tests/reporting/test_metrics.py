"""Metrics: their sums, and that they can be read from the metrics port of a real Ray."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.runtime.metrics import Meter, accepted_at, totals
from tests.support.records import STEP, steps

ROOT = Path(__file__).parents[2]

#: A worker actor counts three steps of a prompt; the driver reads its node's metrics port until they are there.
SCRIPT = """
import sys, time, urllib.request, ray
from experiments.runtime.metrics import Meter
from tests.support.records import steps

port = int(sys.argv[1])
ray.init(
    address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=100_000_000,
    _node_ip_address="127.0.0.1", _metrics_export_port=port, _system_config={"metrics_report_interval_ms": 500},
)
class Decoding:
    def __init__(self):
        self.meter = Meter("nf4")
    def add(self):
        self.meter.add("fixed:4", steps(3), fallbacks=1)
actor = ray.remote(Decoding).options(num_cpus=0).remote()
ray.get(actor.add.remote())
text, deadline = "", time.monotonic() + 90
while "speckv_goodput_count" not in text and time.monotonic() < deadline:
    time.sleep(0.5)
    try:
        text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
    except OSError:
        pass
print(text)
"""


def test_totals_over_steps() -> None:
    some = [*steps(3), replace(STEP, gamma=0, drafted=0, accepted=0, labelled=0, produced=1)]
    assert totals(some, fallbacks=2) == {
        "drafts": 3, "steps": 4, "drafted_tokens": 12, "accepted_tokens": 6, "produced_tokens": 10,
        "decoding_seconds": pytest.approx(4 * 0.071), "fallbacks": 2,
    }  # fmt: skip
    assert accepted_at([*some, replace(STEP, accepted=3)]) == [4, 4, 1]
    assert accepted_at([]) == []


def test_without_ray_nothing_is_imported() -> None:
    code = "import sys; from experiments.runtime.metrics import Meter; from tests.io.test_run_directory import steps; "
    code += "Meter('nf4').add('fixed:4', steps(2)); sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120).returncode == 0
    Meter("nf4").add("fixed:4", steps(2))  # this process may have imported Ray, but runs none


@pytest.mark.ray
def test_metrics_can_be_read_from_the_metrics_port() -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    env |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(port)], capture_output=True, text=True, cwd=ROOT, env=env, timeout=200
    )
    assert done.returncode == 0, done.stderr
    found = {}
    for name, tags, value in re.findall(r"^ray_speckv_(\w+)\{(.*)\} (\S+)$", done.stdout, re.MULTILINE):
        assert 'level="nf4"' in tags
        assert 'policy="fixed:4"' in tags
        position = re.search(r'position="(\d)"', tags)
        found[name + (position[1] if position else "")] = float(value)
    expected = {"drafts_total": 3, "steps_total": 3, "drafted_tokens_total": 12, "accepted_tokens_total": 6}
    expected |= {"produced_tokens_total": 9, "fallbacks_total": 1, "accepted_at_total1": 3, "accepted_at_total2": 3}
    expected |= {"decide_seconds_count": 3, "goodput_count": 1}
    assert found.items() >= expected.items()
    assert found["decoding_seconds_total"] == pytest.approx(3 * 0.071)
