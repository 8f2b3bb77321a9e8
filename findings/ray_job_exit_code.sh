#!/usr/bin/env bash
# `ray job submit` exits with 1 whatever code the job's driver exits with; the real one is in the job's record only.
set -euo pipefail
work=$(mktemp -d)
head=
finish() {
    if [ -n "$head" ]; then
        kill "$head" 2>/dev/null || true
        wait "$head" 2>/dev/null || true
    fi
    rm -rf "$work"
}
trap finish EXIT
cd "$work"
python3.11 -m venv venv
venv/bin/python -m pip install --quiet "ray[default]==2.60.0" numpy==2.4.6
export HOME="$work" PATH="$work/venv/bin:$PATH" RAY_USAGE_STATS_ENABLED=0 RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0
unset RAY_ADDRESS
read -r gcs dashboard client agent metrics < <(python -I -c '
import socket
found = [socket.create_server(("127.0.0.1", 0)) for _ in range(5)]
print(*(s.getsockname()[1] for s in found))')
ray start --head --block --node-ip-address=127.0.0.1 --port="$gcs" --dashboard-host=127.0.0.1 --dashboard-port="$dashboard" \
    --ray-client-server-port="$client" --dashboard-agent-listen-port="$agent" --metrics-export-port="$metrics" --num-cpus=2 \
    --object-store-memory=100000000 --disable-usage-stats --temp-dir="$work/ray" >start.log 2>&1 &
head=$!
cat >ask.py <<'PY'
import sys
import time

import ray
from ray.job_submission import JobSubmissionClient

address = sys.argv[1]
for _ in range(60):
    try:
        client = JobSubmissionClient(address)
        break
    except (ConnectionError, RuntimeError):
        time.sleep(1)
else:
    sys.exit("the cluster did not start")
jobs = client.list_jobs()
for job in jobs:
    print(f"seen: record: status {job.status}, driver_exit_code {job.driver_exit_code}, message {job.message[:48]!r}...")
if len(sys.argv) > 2:
    codes = sorted(int(job.driver_exit_code) for job in jobs)
    print(f"ray {ray.__version__}: exit codes of `ray job submit`: {sys.argv[2:]}, of the drivers: {codes}")
    found = sys.argv[2:] == ["1", "1"] and codes == [2, 3] and all(job.status == "FAILED" for job in jobs)
    print("as found" if found else "CHANGED")
    sys.exit(not found)
PY
python -I ask.py "http://127.0.0.1:$dashboard"
echo "expected: as with ssh, docker run or srun, the command exits with the code of the program that it ran: 2, then 3"
codes=()
for code in 2 3; do
    got=0
    ray job submit --address "http://127.0.0.1:$dashboard" -- python -I -c "raise SystemExit($code)" >submit.log 2>&1 || got=$?
    echo "seen: driver exits with $code, \`ray job submit\` with $got"
    codes+=("$got")
done
python -I ask.py "http://127.0.0.1:$dashboard" "${codes[@]}"
