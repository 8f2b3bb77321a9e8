"""The former name of ``python -m experiments.replays.drafters``."""

import runpy
import sys

if __name__ == "__main__":
    print("experiments.replays_drafters is called experiments.replays.drafters now", file=sys.stderr)
    runpy.run_module("experiments.replays.drafters", run_name="__main__", alter_sys=True)
