"""Compression levels of the target: the named ones, and any quantization of transformers by a spec string."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
import yaml

from speckv_online.errors import UserError


@dataclass(frozen=True)
class Level:
    """One way of storing the target's weights.

    Attributes
    ----------
    name, summary : str
        Name on the command line, and one line about it.
    dtype : torch.dtype
        Type that the checkpoint is loaded as; a quantized level is loaded in its compute type instead.
    quantization : callable or None
        Makes the transformers quantization config for a compute dtype, if the level is quantized.
    """

    name: str
    summary: str
    dtype: torch.dtype
    quantization: Callable[[torch.dtype], Any] | None = None

    def load_arguments(self, device: torch.device) -> dict[str, Any]:
        """Return the keyword arguments of ``from_pretrained`` that give this level on ``device``."""
        if self.quantization is None:
            return {"dtype": self.dtype}
        # bitsandbytes' CPU kernels are fastest, and free of rounding in between, with fp32 activations.
        compute = torch.float16 if device.type == "cuda" else torch.float32
        return {
            "dtype": compute,
            "quantization_config": self.quantization(compute),
            "device_map": {"": str(device)},
        }

    def widen(self, device: torch.device) -> bool:
        """Return True if weights of this level are widened to fp32 for arithmetic on ``device``."""
        return self.quantization is None and device.type == "cpu" and self.dtype != torch.float32

    def arithmetic(self, device: torch.device) -> str:
        """Describe for reports how this level computes on ``device``."""
        if self.widen(device):
            return f"weights rounded to {self.name}, arithmetic in fp32"
        if self.quantization is not None:
            compute = "fp16" if device.type == "cuda" else "fp32"
            return f"{'' if ':' in self.name else 'bitsandbytes '}{self.name}, activations in {compute}"
        return f"weights and arithmetic in {self.name}"


def _int8(compute: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    _require_bitsandbytes("int8")
    return BitsAndBytesConfig(load_in_8bit=True)


def _require_bitsandbytes(level: str) -> None:
    """Say what to install now: transformers would ask for it later, in several lines."""
    try:
        with _compiling_later():
            import bitsandbytes  # noqa: F401
    except ImportError as e:
        raise UserError(
            f"the level {level} needs bitsandbytes, which cannot be imported ({' '.join(str(e).split())[:200]}): "
            "pip install bitsandbytes, or choose fp32, fp16 or bf16"
        ) from e


@contextmanager
def _compiling_later() -> Iterator[None]:
    """Let functions that are decorated with ``torch.compile`` be compiled when they are called first.

    bitsandbytes (0.50) decorates four as it is imported, and ``torch.compile`` then imports all of inductor: 1.3 s.
    """
    compile_now = torch.compile

    def compile_later(function: Any = None, **options: Any) -> Any:
        if function is None:
            return lambda function: compile_later(function, **options)
        compiled: list[Any] = []

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not compiled:
                compiled.append(compile_now(function, **options))
            return compiled[0](*args, **kwargs)

        return call

    torch.compile = compile_later
    try:
        yield
    finally:
        torch.compile = compile_now


def _four_bit(kind: str) -> Callable[[torch.dtype], Any]:
    def make(compute: torch.dtype) -> Any:
        from transformers import BitsAndBytesConfig

        _require_bitsandbytes(kind)
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_compute_dtype=compute)

    return make


LEVELS = {
    level.name: level
    for level in (
        Level("fp32", "32-bit floats, the reference for exactness", torch.float32),
        Level("fp16", "16-bit floats (on a CPU: fp16 weights, fp32 arithmetic)", torch.float16),
        Level("bf16", "bfloat16 (on a CPU: bf16 weights, fp32 arithmetic)", torch.bfloat16),
        Level("int8", "bitsandbytes LLM.int8", torch.float16, _int8),
        Level("nf4", "bitsandbytes 4-bit NormalFloat", torch.float16, _four_bit("nf4")),
        Level("fp4", "bitsandbytes 4-bit float", torch.float16, _four_bit("fp4")),
    )
}


def get_level(name: str) -> Level:
    """Return a level.

    >>> import torch
    >>> get_level("nf4").arithmetic(torch.device("cpu"))
    'bitsandbytes nf4, activations in fp32'

    Parameters
    ----------
    name : str
        One of :data:`LEVELS`, or ``METHOD:key=value,key=value``: a quantization method of transformers (``hqq``,
        ``quanto``, ``torchao``, ``bitsandbytes_4bit``, ...) and the arguments of its config, values as in YAML. For
        example ``bitsandbytes_4bit:bnb_4bit_quant_type=fp4,bnb_4bit_use_double_quant=true``.

    Raises
    ------
    UserError
        If there is no such level, or the method's config refuses an argument.
    """
    if name in LEVELS:
        return LEVELS[name]
    method, _, text = name.partition(":")
    if ":" not in name:
        raise UserError(f"unknown compression level {name!r}: choose from {', '.join(LEVELS)}, or METHOD:key=value,...")
    return Level(name, f"transformers' {method}", torch.float16, _by_spec(method, text))


def _by_spec(method: str, text: str) -> Callable[[torch.dtype], Any]:
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    known = AUTO_QUANTIZATION_CONFIG_MAPPING
    if method not in known:
        raise UserError(f"unknown quantization method {method!r}: transformers has {', '.join(sorted(known))}")
    arguments = {}
    for piece in filter(None, text.split(",")):
        key, equals, value = piece.partition("=")
        if not equals:
            raise UserError(f"{method}:{text}: {piece!r} is no key=value")
        try:
            arguments[key.strip()] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError) as e:
            raise UserError(f"{method}:{text}: {value!r} is no value of YAML") from e
    if method.startswith("bitsandbytes"):
        arguments.setdefault("load_in_8bit" if method.endswith("8bit") else "load_in_4bit", True)

    def make(compute: torch.dtype) -> Any:
        if method.startswith("bitsandbytes"):
            _require_bitsandbytes(method)
        own = {"bnb_4bit_compute_dtype": compute} if "load_in_4bit" in arguments else {}
        try:
            return known[method](**(own | arguments))
        except (TypeError, ValueError, ImportError) as e:
            raise UserError(f"{method} does not take {text!r}: {' '.join(str(e).split())[:200]}") from e

    return make
