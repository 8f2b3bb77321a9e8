"""What ``--worker-extension-cls speckv_online.serving.vllm_worker.LazyWorker`` brings into a vLLM worker's process.

The import is all of it: drafters run lazily from then on (:mod:`speckv_online.serving.lazy_draft`).
"""

from __future__ import annotations

from speckv_online.serving.lazy_draft import install

install()


class LazyWorker:
    """Adds nothing to the worker itself."""
