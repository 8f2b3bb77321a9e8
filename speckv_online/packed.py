"""The former place of :mod:`speckv_online.cpu_engine.pack`."""

from speckv_online.cpu_engine.pack import PackedLinear, can_pack, pack

__all__ = ["PackedLinear", "can_pack", "pack"]
