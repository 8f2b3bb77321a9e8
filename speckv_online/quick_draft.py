"""The former place of :mod:`speckv_online.cpu_engine.int8_draft`, with the former names."""

from speckv_online.cpu_engine.int8_draft import Int8Draft as QuickDraft
from speckv_online.cpu_engine.int8_draft import compile_forward as quicken

__all__ = ["QuickDraft", "quicken"]
