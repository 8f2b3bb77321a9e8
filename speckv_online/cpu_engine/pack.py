"""Linear layers that take hardly longer for the few tokens of a verification than for one, on a CPU.

A stock fp32 ``nn.Linear`` on a CPU is quick for one row and slow for 4 to 16: a verification of five tokens takes up to
twice the time of one. The kernels of :mod:`speckv_online.cpu_engine.kernels.linear` are nearly flat, and read weights
in the smallest type that holds them exactly, which for weights rounded to fp16 is half of what fp32 takes. They are
tried before they are used, and where they are missing or wrong the model stays as it is. docs/performance.md has the
measurements.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

import torch
from torch import nn
from transformers import PreTrainedModel

from speckv_online.cpu_engine import bnb_layers
from speckv_online.cpu_engine.backend import CompiledForward
from speckv_online.cpu_engine.kernels.linear import Shape, compiled, lay_out, shape
from speckv_online.cpu_engine.layer_patches import patch_layers
from speckv_online.cpu_engine.notes import EngineNotes, describe, notes_of
from speckv_online.cpu_engine.target_forward import compile_forward
from speckv_online.cpu_engine.verdicts import Verdicts
from speckv_online.cpu_engine.weight_version import weight_version
from speckv_online.modeling.grouped_attention import group

#: Most rows for which the kernels are the quicker ones: more are a prompt.
MOST_ROWS = 32
#: Most bytes of weights that are kept twice; larger models stay as they are.
MOST_BYTES = 4 << 30
#: Largest difference from nn.Linear, relative to the largest output, that passes for rounding.
_TOLERANCE = 1e-5


class PackedLinear(nn.Linear):
    """An ``nn.Linear`` for inference whose weight is laid out for few rows too.

    A row's result has the same bits whatever the number of rows, up to :data:`MOST_ROWS`. Where the weight was changed
    it is laid out anew.

    Parameters
    ----------
    linear : nn.Linear
        In fp32 on the CPU; its parameters are shared.
    use : Shape
        Outputs are a multiple of its ``features`` and inputs of its ``lanes``.
    kept : sequence of Tensor, optional
        What :func:`~speckv_online.cpu_engine.kernels.linear.lay_out` once returned of the weight.
    """

    def __init__(self, linear: nn.Linear, use: Shape, kept: Sequence[torch.Tensor] | None = None) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self._use = use
        self._lay_out(kept)
        self.eval()

    def _lay_out(self, kept: Sequence[torch.Tensor] | None = None) -> None:
        # Not buffers: neither saved nor hashed.
        # While it is held, no other weight lies where it lies.
        self._made_of, self._source = weight_version(self), self.weight.detach()
        self._packed = lay_out(self.weight.detach(), self._use) if kept is None else tuple(kept)
        self._kernel = compiled(self._use)[self._packed[0].dtype]

    @property
    def kind(self) -> torch.dtype:
        """Type that the weight is laid out in."""
        return self._packed[0].dtype

    @torch.inference_mode()
    def agrees(self, rows: int = 3) -> bool:
        """Return True if the kernel's results for random rows are those of ``nn.Linear`` up to rounding."""
        x = torch.randn(rows, self.in_features, generator=torch.Generator().manual_seed(0))
        found, expected = self(x), nn.functional.linear(x, self.weight, self.bias)
        return bool((found - expected).abs().max() <= _TOLERANCE * expected.abs().max())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``x @ weight.T + bias``, shape (..., out_features)."""
        rows = x.numel() // self.in_features
        plain = x.dtype == torch.float32 and x.is_contiguous() and x.is_cpu and not torch.is_grad_enabled()
        if not plain or not 0 < rows <= MOST_ROWS:
            return nn.functional.linear(x, self.weight, self.bias)
        if self._made_of != weight_version(self):
            self._lay_out()
        weight, scales = self._packed
        out = x.new_empty(*x.shape[:-1], self.out_features)
        pointers = x.data_ptr(), weight.data_ptr(), out.data_ptr()
        self._kernel(*pointers, rows, self.in_features, self.out_features, scales.data_ptr())
        return out if self.bias is None else out.add_(self.bias)


@cache
def why_not(use: Shape) -> str:
    """Return why no linear layer can be packed here, empty if it can."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(160, 96, generator=generator)
    whole = (weight * 40).round().clamp(-127, 127)
    whole[:, ::32] = 127.0
    with torch.inference_mode():
        for kept in (weight, weight.bfloat16().float(), weight.half().float(), whole / 64):
            linear = nn.Linear(96, 160)
            linear.weight = nn.Parameter(kept)
            try:
                right = PackedLinear(linear, use).agrees(use.rows + 2)
            except (AttributeError, ImportError, OSError, RuntimeError) as error:  # no llvmlite, another torch or LLVM
                return describe(error)
            if not right:
                return "its results are not those of nn.Linear"
    return ""


def pack(model: nn.Module, kept: Mapping[str, Sequence[torch.Tensor]] | None = None) -> int:
    """Pack the fp32 linear layers of a model on the CPU, in place; return how many.

    Other layers take a short way where there is one, see :mod:`speckv_online.cpu_engine.layer_patches`, and so do
    attention, see :mod:`speckv_online.modeling.grouped_attention`, and the whole forward, see
    :mod:`speckv_online.cpu_engine.target_forward`. Linear layers stay where packing does not work, and in a model whose
    weights are too large to be kept twice. Logits change by rounding only. A model whose weights change later need not
    be packed again, unless they change through ``weight.data``.

    With what :func:`laid_out` returned of the same model as ``kept``, nothing is laid out or compared again, and no
    weight of the model is read.
    """
    notes = model._engine_notes = EngineNotes(type(model).__name__)  # type: ignore[assignment]
    notes.patched = patch_layers(model, notes, kept)
    if isinstance(model, PreTrainedModel):
        model._forward_backend = CompiledForward(model)  # type: ignore[assignment]
        if model.device.type == "cpu":
            group(model)
    use, count = shape(), 0
    if isinstance(model, PreTrainedModel) and model.device.type != "cpu":
        notes.lacks("engine", f"the model is on {model.device.type}, the engine is for CPUs")
    elif use is None:
        notes.lacks("compiled kernels", "none for this processor, or no llvmlite", failed=True)
    else:
        verdicts = Verdicts(model) if kept is None else None
        count = _pack_linears(model, use, notes, verdicts, kept or {})
        notes.packed = count + sum(type(m).__name__ == "GgufLinear" for m in model.modules())
        if "packed linear layers" not in notes.missing:
            compile_forward(model, verdicts, kept is not None)
    notes.report()
    return count


def laid_out(model: nn.Module) -> dict[str, tuple[torch.Tensor, ...]]:
    """Return by the names of layers what the engine has laid out of a model, empty if it does not run all of it."""
    if not notes_of(model).compiled:
        return {}
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, PackedLinear):
            found[name] = layer._packed
        elif type(layer).__name__ in ("Linear4bit", "Linear8bitLt"):
            if not hasattr(layer, "_patched"):
                return {}
            found[name] = bnb_layers.laid_out(layer)
    return found


def _pack_linears(
    model: nn.Module,
    use: Shape,
    notes: EngineNotes,
    verdicts: Verdicts | None,
    kept: Mapping[str, Sequence[torch.Tensor]],
) -> int:
    """Pack a model's linear layers and return how many; note why where they stay."""
    part = "packed linear layers"
    found = [
        (parent, name, child, kept.get(f"{prefix}.{name}".lstrip(".")))
        for prefix, parent in model.named_modules()
        for name, child in parent.named_children()
        # The exact type: bitsandbytes' layers are subclasses with weights of their own.
        if type(child) is nn.Linear or type(child) is PackedLinear
        if child.weight.dtype == torch.float32 and child.weight.device.type == "cpu"
        if child.out_features % use.features == 0 and child.in_features % use.lanes == 0
    ]
    if sum(child.weight.nbytes for _, _, child, _ in found) > MOST_BYTES:
        notes.lacks(part, f"they have more than {MOST_BYTES >> 30} GiB, which would be kept twice")
        return 0
    if verdicts is not None and (reason := why_not(use)):
        notes.lacks(part, reason, failed=True)
        return 0
    made = [(parent, name, PackedLinear(child, use, known)) for parent, name, child, known in found]
    about = " ".join([part, *(f"{layer.weight.shape} {layer.kind}" for _, _, layer in made)])
    if verdicts is not None and not verdicts.known(about):
        if wrong := [name for _, name, layer in made if not layer.agrees()]:
            notes.lacks(part, f"the results of {wrong[0]} are not the layer's", failed=True)
            return 0
        verdicts.keep(about)
    for parent, name, layer in made:
        setattr(parent, name, layer)
    return len(found)
