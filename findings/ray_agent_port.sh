#!/usr/bin/env bash
# A Ray head whose agent's port is taken starts without a word, and never takes a job.
set -euo pipefail
work=$(mktemp -d /tmp/raXXXXXX)
head=
trap '[ -z "$head" ] || kill -9 -- "-$head" 2>/dev/null || true; kill $(jobs -p) 2>/dev/null || true; sleep 1; rm -rf "$work"' EXIT
cd "$work"
python3.11 -m venv venv
venv/bin/python -m pip install --quiet "ray[default]==2.60.0"
export RAY_TMPDIR=$work RAY_USAGE_STATS_ENABLED=0 RAY_AUTH_MODE=disabled
port() { venv/bin/python -c "import socket; s = socket.socket(); s.bind(('127.0.0.1', 0)); print(s.getsockname()[1])"; }
taken=$(port) board=$(port)
venv/bin/python -c "import socket, time; s = socket.socket(); s.bind(('127.0.0.1', $taken)); s.listen(); time.sleep(300)" &
sleep 1
echo "ray $(venv/bin/python -c 'import ray; print(ray.__version__)'), one machine, loopback"
echo "expected: ray start fails where a port that it is given is taken, or the job server says so"
setsid venv/bin/ray start --head --block --port="$(port)" --node-ip-address=127.0.0.1 --num-cpus=1 --dashboard-port="$board" \
    --dashboard-agent-listen-port="$taken" --object-store-memory=100000000 --disable-usage-stats >start.log 2>&1 &
head=$!
for _ in $(seq 60); do
    venv/bin/python -c "import socket; socket.create_connection(('127.0.0.1', $board), 1)" 2>/dev/null && break
    sleep 1
done
sleep 30
running=no
kill -0 "$head" && running=yes
refused=0
venv/bin/ray job submit --address "http://127.0.0.1:$board" -- true >submit.log 2>&1 || refused=$?
said=$(grep -o "No available agent[^.]*" submit.log | head -1 || true)
echo "seen: the head runs: $running; 30 s later ray job submit exits with $refused and says: $said"
if [ "$running" = yes ] && [ "$refused" != 0 ] && [ -n "$said" ]; then echo "as found"; else echo "CHANGED"; exit 1; fi
