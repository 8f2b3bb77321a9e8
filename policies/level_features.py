"""What describes a compression level by more than its name: numbers that carry over to a level never met before."""

from __future__ import annotations

import re
from functools import lru_cache

#: Bits per weight of the linear layers; four-bit types of bitsandbytes keep a scale for every 64 weights besides, those
#: of GGUF files for every 32, and ``q4_1`` a minimum too.
BITS = {"fp32": 32.0, "fp16": 16.0, "bf16": 16.0, "int8": 8.0, "nf4": 4.5, "fp4": 4.5}
BITS |= {"q4_0": 4.5, "q4_1": 5.0, "q8_0": 8.5}
#: Numbers in a description: bits per weight, cost of a drafted token, growth of verify time with width.
N_LEVEL = 3


@lru_cache(maxsize=256)
def level_bits(level: str) -> float:
    """Return a level's bits per weight.

    >>> level_bits("nf4"), level_bits("hqq:nbits=3"), level_bits("unknown")
    (4.5, 3.0, 16.0)
    >>> level_bits("q4_1")
    5.0

    Parameters
    ----------
    level : str
        A name of :data:`BITS`, a quantization such as ``gptq-4bit`` or ``hqq:nbits=3``, either with the size of a batch
        behind an ``@``. Of other names the number behind ``bits=`` counts, else one in the name of the method, else
        that of a type among the options (``weights=int2``); a quantization that says none is taken for 4 bits, and any
        other name for 16.
    """
    name = level.partition("@")[0]
    if name in BITS:
        return BITS[name]
    method, _, arguments = name.partition(":")
    types = r"(?:^|=)\W*[uq]?(?:int|float|fp|nf)(\d+)"
    for text, pattern in ((arguments, r"bits?=(\d+)"), (method, r"(\d+)"), (arguments, types)):
        found = [int(b) for b in re.findall(pattern, text) if 1 <= int(b) <= 64]
        if found:
            return float(found[0])
    return 4.0 if ":" in name else 16.0


@lru_cache(maxsize=256)
def batch_size(level: str) -> int:
    """Return the size of the batch that a level's name tells: 8 for ``nf4@8``, 1 where it tells none."""
    size = level.rpartition("@")[2] if "@" in level else ""
    return max(int(size), 1) if size.isascii() and size.isdigit() else 1


def describe(bits: float, draft_seconds: float, verify: float, wide: float) -> tuple[float, float, float]:
    """Return a level's description, (3,): finite and of order one, whatever the times are.

    >>> describe(4.0, draft_seconds=0.01, verify=0.04, wide=0.06)
    (0.25, 0.25, 0.5)

    Parameters
    ----------
    bits : float
        Bits per weight.
    draft_seconds : float
        t_d, seconds to draft one token.
    verify, wide : float
        T_v(1) and T_v(9), seconds to verify one token and nine.

    Returns
    -------
    tuple of float
        ``bits / 16``, ``t_d / T_v(1)`` of at most 2, and ``T_v(9) / T_v(1) - 1`` from 0 to 4.
    """
    if not verify > 0.0:
        return bits / 16.0, 0.0, 0.0
    return bits / 16.0, min(draft_seconds / verify, 2.0), min(max(wide / verify - 1.0, 0.0), 4.0)
