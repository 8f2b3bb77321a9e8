"""The types of a GGUF file's tensors that are read: how their blocks are laid out, and what they stand for."""

from __future__ import annotations

from dataclasses import dataclass

import torch

#: Weights of a quantized block.
BLOCK = 32


@dataclass(frozen=True)
class BlockType:
    """A type of tensor.

    Attributes
    ----------
    name : str
        As GGUF has it.
    level : str
        Compression level of a model whose matrices have it.
    size, bytes : int
        Weights of a block, and its bytes.
    bits : int
        Bits of a whole number in a block; 0 for floating point.
    offset : int
        What is subtracted from an unsigned number.
    minimum : bool
        Whether a block has a minimum besides its scale.
    """

    name: str
    level: str
    size: int
    bytes: int
    bits: int = 0
    offset: int = 0
    minimum: bool = False

    @property
    def head(self) -> int:
        """Bytes of a block before its numbers."""
        return 4 if self.minimum else 2


#: By GGML's number of the type.
TYPES = {
    0: BlockType("F32", "fp32", 1, 4),
    1: BlockType("F16", "fp16", 1, 2),
    2: BlockType("Q4_0", "q4_0", BLOCK, 18, 4, 8),
    3: BlockType("Q4_1", "q4_1", BLOCK, 20, 4, 0, True),
    8: BlockType("Q8_0", "q8_0", BLOCK, 34, 8, 128),
    30: BlockType("BF16", "bf16", 1, 2),
}
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def floats(data: torch.Tensor, kind: BlockType) -> torch.Tensor:
    """Return the numbers of a tensor in floating point, in its own type.

    Parameters
    ----------
    data : Tensor of uint8, shape (rows, bytes)
    kind : BlockType
        With 0 bits.
    """
    return data.view(_FLOATS[kind.name])


def parts(data: torch.Tensor, kind: BlockType) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the heads of a quantized tensor's blocks and the bytes of its numbers.

    Returns
    -------
    tuple of Tensor
        fp16 of shape (rows, blocks, 1 or 2), and uint8 of shape (rows, blocks, 16 or 32).
    """
    blocks = data.view(len(data), -1, kind.bytes)
    return blocks[..., : kind.head].contiguous().view(torch.float16), blocks[..., kind.head :]


def dequantize(data: torch.Tensor, kind: BlockType) -> torch.Tensor:
    """Return a matrix in fp32.

    Parameters
    ----------
    data : Tensor of uint8, shape (rows, bytes)
        Its blocks, row by row.
    kind : BlockType
    """
    if not kind.bits:
        return floats(data, kind).float()
    head, numbers = parts(data, kind)
    if kind.bits == 4:
        numbers = torch.cat((numbers & 15, numbers >> 4), -1)
        whole = numbers.float() - kind.offset
    else:
        whole = numbers.contiguous().view(torch.int8).float()
    found = whole * head[..., :1].float()
    if kind.minimum:
        found += head[..., 1:].float()
    return found.reshape(len(data), -1)
