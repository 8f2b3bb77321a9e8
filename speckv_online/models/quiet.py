"""Keeping the libraries quiet that talk while models load."""

from __future__ import annotations

import logging
import sys
import warnings

from huggingface_hub.utils import enable_progress_bars  # type: ignore[attr-defined]
from transformers.utils import logging as transformers_logging


def quiet_libraries() -> None:
    """Keep bars of loading, the hub client's retries and bitsandbytes' notes on casts out of the output."""
    transformers_logging.disable_progress_bar()
    if sys.stderr.isatty():
        enable_progress_bars()  # of downloads, which the line before turns off too
    transformers_logging.set_verbosity_error()
    for name in ("bitsandbytes", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=r"MatMul8bitLt: inputs will be cast")
