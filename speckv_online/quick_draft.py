"""The former place of :mod:`speckv_online.cpu_engine.int8_draft`."""

from speckv_online.cpu_engine.int8_draft import QuickDraft, quicken

__all__ = ["QuickDraft", "quicken"]
