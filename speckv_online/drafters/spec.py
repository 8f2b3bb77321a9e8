"""Drafters by name, as command lines and configs give them: ``model``, ``ngram``, ``hybrid``, ``hybrid:online=true``.

Nothing heavy is imported before a drafter is built.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from speckv_online.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from speckv_online.cpu_engine.int8_draft import QuickDraft
    from speckv_online.drafters.base import Drafter

KINDS = ("model", "ngram", "hybrid")
#: Help of the command-line flag.
HELP = "what drafts: model, ngram (no draft model needed) or hybrid, also hybrid:online=true,skip=0.8,gate=FILE"


@dataclass(frozen=True)
class DrafterSpec:
    """A drafter's name and options.

    Attributes
    ----------
    kind : str
        One of :data:`KINDS`.
    online : bool
        The hybrid's gate goes on learning.
    skip : float or None
        How sure the hybrid's lookup has to be for the model not to be asked; None for what the gate says.
    gate : str
        File of the hybrid's gate, empty for the one that ships.
    """

    kind: str = "model"
    online: bool = False
    skip: float | None = None
    gate: str = ""

    def check_models(self, target: str | None, draft: str | None) -> None:
        """Raise :class:`UserError` unless these two models, or a named pair for neither, are what it needs."""
        if self.kind == "ngram":
            if draft is not None:
                raise UserError("--drafter ngram uses no draft model: leave --draft out, or choose hybrid")
        elif (target is None) != (draft is None):
            raise UserError(
                "--target and --draft go together: give both or neither (only --drafter ngram needs no draft)"
            )

    def build(
        self,
        model: PreTrainedModel | None,
        vocab_size: int,
        head_ids: torch.Tensor | None = None,
        quick: QuickDraft | None = None,
        graphs: bool = False,
    ) -> Drafter:
        """Return the drafter; ``model`` and the rest as for :class:`~speckv_online.drafters.ModelDrafter`. With
        ``graphs`` the plain model is read through CUDA graphs.

        Raises
        ------
        UserError
            If the gate's file is missing or damaged.
        """
        from speckv_online.drafters.chunked import ChunkedDrafter
        from speckv_online.drafters.hybrid import HybridDrafter
        from speckv_online.drafters.model import ModelDrafter
        from speckv_online.drafters.ngram import NgramDrafter
        from speckv_online.lookup.gate import Gate

        if self.kind == "ngram":
            return NgramDrafter()
        if model is None:
            raise ValueError(f"the {self.kind} drafter needs a model")
        if self.kind == "model" and graphs:
            return ChunkedDrafter(model, vocab_size, head_ids)
        if self.kind == "model":
            return ModelDrafter(model, vocab_size, head_ids, quick)
        gate = Gate.load(self.gate or None)
        return HybridDrafter(model, vocab_size, head_ids, quick, gate=gate, online=self.online, skip=self.skip)


def parse_drafter(text: str) -> DrafterSpec:
    """Read a spec; raises :class:`UserError` for names and options that there are not."""
    kind, _, rest = text.partition(":")
    if kind not in KINDS:
        raise UserError(f"unknown drafter {kind!r}: choose {', '.join(KINDS)}")
    options = dict(piece.partition("=")[::2] for piece in rest.split(",") if piece)
    if unknown := sorted(set(options) - ({"online", "skip", "gate"} if kind == "hybrid" else set())):
        raise UserError(f"the drafter {kind} has no option {unknown[0]!r}; hybrid has online, skip and gate")
    online = options.get("online", "false").lower()
    if online not in ("true", "false"):
        raise UserError(f"the drafter's option online must be true or false, got {online!r}")
    try:
        skip = float(options["skip"]) if "skip" in options else None
    except ValueError:
        skip = -1.0
    if skip is not None and not 0.0 <= skip <= 1.0:
        raise UserError(f"the drafter's option skip must be a probability, got {options['skip']!r}")
    return DrafterSpec(kind, online == "true", skip, options.get("gate", ""))
