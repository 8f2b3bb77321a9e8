"""The former name of ``python -m experiments.profile.conversations``."""

import runpy
import sys

if __name__ == "__main__":
    print("experiments.profile_conversations is called experiments.profile.conversations now", file=sys.stderr)
    runpy.run_module("experiments.profile.conversations", run_name="__main__", alter_sys=True)
