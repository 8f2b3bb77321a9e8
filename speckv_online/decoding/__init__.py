"""Decoding: one sequence, batches, and inside transformers' ``generate``."""

import lazy_loader

# The names are listed in __init__.pyi: each is imported when it is first asked for.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
