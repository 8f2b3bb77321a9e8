#!/usr/bin/env bash
# Importing bitsandbytes imports torch's inductor too: a decorated function costs a second before anything is compiled.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3.11 -m venv venv
venv/bin/python -m pip install --quiet torch==2.13.0 numpy==2.4.6 bitsandbytes==0.50.2
OMP_NUM_THREADS=1 venv/bin/python -I - <<'PY'
import sys
import time

import torch
from importlib.metadata import version

print(f"torch {torch.__version__}, bitsandbytes {version('bitsandbytes')}, CPU")
print("expected: to import a library, or to decorate a function with torch.compile, compiles nothing and loads no compiler")
before, started = "torch._inductor.compile_fx" in sys.modules, time.perf_counter()
import bitsandbytes

taken, after = time.perf_counter() - started, "torch._inductor.compile_fx" in sys.modules
print(f"seen: inductor is loaded before the import: {before}; after it: {after}, which took {taken:.1f} s")
found = not before and after
print("as found" if found else "CHANGED")
sys.exit(not found)
PY
