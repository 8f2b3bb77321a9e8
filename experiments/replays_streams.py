"""The former name of ``python -m experiments.streams``."""

import runpy
import sys

if __name__ == "__main__":
    print("experiments.replays_streams is called experiments.streams now", file=sys.stderr)
    runpy.run_module("experiments.streams", run_name="__main__", alter_sys=True)
