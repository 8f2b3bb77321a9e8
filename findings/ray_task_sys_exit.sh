#!/usr/bin/env bash
# sys.exit("why") in a Ray task runs the task four times and loses the reason: it counts as a lost machine, an exception does not.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3.11 -m venv venv
venv/bin/python -m pip install --quiet "ray[default]==2.60.0" numpy==2.4.6
env -u RAY_ADDRESS -u OMP_NUM_THREADS HOME="$work" RAY_USAGE_STATS_ENABLED=0 RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 venv/bin/python -I - <<'PY'
import logging
import os
import sys

import ray

print(f"ray {ray.__version__}")
print("expected: SystemExit is raised where the result is asked for, as other exceptions are, after one run")
ray.init(
    address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR,
    object_store_memory=100_000_000, _node_ip_address="127.0.0.1", _temp_dir=os.path.join(os.environ["HOME"], "ray"),
)
counter = os.path.join(os.environ["HOME"], "runs.txt")


@ray.remote
def refuse(how: str) -> None:
    """Note the run, then end."""
    with open(counter, "a") as f:
        f.write("x")
    if how == "sys.exit":
        sys.exit("no such model")
    raise ValueError("no such model")


seen = {}
for how in ("raise ValueError", "sys.exit"):
    open(counter, "w").close()
    try:
        ray.get(refuse.remote(how))
    except BaseException as e:
        seen[how] = (type(e).__name__, "no such model" in str(e), os.path.getsize(counter))
    print(f"seen: {how}: {seen[how][0]}, reason in its text {seen[how][1]}, runs {seen[how][2]}")
ray.shutdown()
found = seen["raise ValueError"] == ("RayTaskError(ValueError)", True, 1) and seen["sys.exit"] == ("WorkerCrashedError", False, 4)
print("as found" if found else "CHANGED")
sys.exit(not found)
PY
