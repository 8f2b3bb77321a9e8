#!/usr/bin/env bash
# What an actor has printed survives its SIGKILL, unflushed and without a newline, unlike that of a plain Python process with its output in a file.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3.11 -m venv venv
venv/bin/python -m pip install --quiet "ray[default]==2.60.0" numpy==2.4.6
env -u RAY_ADDRESS -u OMP_NUM_THREADS HOME="$work" RAY_USAGE_STATS_ENABLED=0 RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 venv/bin/python -I - <<'PY'
import glob
import logging
import os
import signal
import subprocess
import sys
import time

import ray

print(f"ray {ray.__version__}")
print("expected: standard output that goes to a file is buffered, so a SIGKILL loses the last lines")
code = "import os, signal\nfor i in range(5): print('PLAIN', i, end=' ')\nos.kill(os.getpid(), signal.SIGKILL)"
plain = os.path.join(os.environ["HOME"], "plain.txt")
with open(plain, "w") as f:
    subprocess.run([sys.executable, "-I", "-c", code], stdout=f)
lost = open(plain).read().count("PLAIN")
ray.init(
    address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR,
    object_store_memory=100_000_000, _node_ip_address="127.0.0.1", _temp_dir=os.path.join(os.environ["HOME"], "ray"),
)


@ray.remote(max_restarts=0)
class Talker:
    def say(self) -> int:
        """Print without newline or flush."""
        for i in range(5):
            print("ACTOR", i, end=" ")
        return os.getpid()


talker = Talker.remote()
os.kill(ray.get(talker.say.remote()), signal.SIGKILL)
time.sleep(1)
kept = sum(open(p, errors="replace").read().count("ACTOR") for p in glob.glob(os.path.join(os.environ["HOME"], "ray", "session_2*", "logs", "worker-*.out")))
ray.shutdown()
print(f"seen: of 5 prints before a SIGKILL: plain Python keeps {lost}, a Ray actor {kept}")
found = lost == 0 and kept == 5
print("as found" if found else "CHANGED")
sys.exit(not found)
PY
