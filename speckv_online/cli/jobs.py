"""``speckv adaptation``, ``profile``, ``quality`` and ``train``: jobs of the ``experiments`` package under one command.

``experiments`` builds on this package, never the other way round. So a job is run as a module, as ``python -m`` would,
and only if the package is there.
"""

from __future__ import annotations

import importlib.util
import runpy
import sys
from collections.abc import Sequence

from speckv_online.errors import UserError

#: Subcommand -> what it does; each is the module of that name.
JOBS = {
    "adaptation": "does learning pay? a policy against its own frozen copy",
    "profile": "collect traces and a cost table of a model pair",
    "quality": "what compression levels cost: agreement of the next token with fp16, and KL",
    "train": "train the weights that policies start from",
}


def run_job(name: str, argv: Sequence[str]) -> int:
    """Run ``python -m experiments.NAME ARGV...`` in this process and return its exit code.

    Raises
    ------
    UserError
        If the ``experiments`` package is not installed.
    """
    module = f"experiments.{name}"
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        found = None
    if found is None:
        raise UserError(f"speckv {name} needs the experiments package: install speckv_online from its repository")
    before = sys.argv
    sys.argv = [f"speckv {name}", *argv]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        # sys.exit(None) means success; argparse leaves with 0 after --help and with 2 after a mistake.
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.argv = before
    return 0
