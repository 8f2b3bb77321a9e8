"""The former place of :mod:`speckv_online.decoding.hf_assistant`."""

from speckv_online.decoding.hf_assistant import PolicyAssistant

__all__ = ["PolicyAssistant"]
