"""Drafters by name, as command lines and configs give them: ``model``, ``ngram``, ``hybrid``, ``hybrid:skip=0.8``.

Other packages add drafters in the entry-point group ``speckv_online.drafters``: a class with the methods of
:class:`~speckv_online.drafters.base.Drafter`. Its constructor takes ``(model, vocab_size, head_ids, quick)`` as
:class:`~speckv_online.drafters.model.ModelDrafter` does, or nothing if the class says ``needs_model = False``; then no
draft model is loaded. Further keyword parameters are the drafter's options, read as those of policies are:
``--drafter name:option=value``.

Nothing heavy is imported before a plug-in is asked for or a drafter is built.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from speckv_online.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from speckv_online.drafters.base import Drafter
    from speckv_online.modeling.forward_backend import CompiledForward

GROUP = "speckv_online.drafters"
KINDS = ("model", "ngram", "hybrid")
#: Help of the command-line flag.
HELP = (
    "what drafts: model, ngram (no draft model needed) or hybrid, also hybrid:skip=0.8,gate=FILE, or a "
    "plug-in's NAME:OPTION=VALUE"
)
#: What a plug-in's constructor is given besides its options, if it needs a model.
_GIVEN = ("model", "vocab_size", "head_ids", "compiled")


@dataclass(frozen=True)
class DrafterSpec:
    """A drafter's name and options.

    Attributes
    ----------
    kind : str
        One of :data:`KINDS`, or a plug-in's name.
    skip : float or None
        How sure the hybrid's lookup has to be for the model not to be asked; None for what the gate says.
    gate : str
        File of the hybrid's gate, empty for the one that ships.
    plugin : type or None
        Class of a plug-in's drafter.
    options : dict
        Options of a plug-in's drafter.
    """

    kind: str = "model"
    skip: float | None = None
    gate: str = ""
    plugin: type | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def needs_model(self) -> bool:
        """Return whether a draft model has to be loaded."""
        return self.kind != "ngram" if self.plugin is None else bool(getattr(self.plugin, "needs_model", True))

    def check_models(self, target: str | None, draft: str | None) -> None:
        """Raise :class:`UserError` unless these two models, or a named pair for neither, are what it needs."""
        if not self.needs_model:
            if draft is not None:
                raise UserError(f"--drafter {self.kind} uses no draft model: leave --draft out, or choose hybrid")
        elif (target is None) != (draft is None):
            raise UserError(
                "--target and --draft go together: give both or neither (only --drafter ngram needs no draft)"
            )

    def build(
        self,
        model: PreTrainedModel | None,
        vocab_size: int,
        head_ids: torch.Tensor | None = None,
        compiled: CompiledForward | None = None,
        graphs: bool = False,
    ) -> Drafter:
        """Return the drafter; ``model`` and the rest as for :class:`~speckv_online.drafters.ModelDrafter`.

        With ``graphs`` the plain model is read through CUDA graphs.

        Raises
        ------
        UserError
            If the gate's file is missing or damaged, or a plug-in's drafter cannot be built.
        """
        if model is None and self.needs_model:
            raise ValueError(f"the {self.kind} drafter needs a model")
        if self.plugin is not None:
            given = (model, vocab_size, head_ids, compiled) if self.needs_model else ()
            try:
                return self.plugin(*given, **self.options)
            except UserError:
                raise
            except Exception as e:  # anybody's constructor
                from policies.base import reason

                raise UserError(f"the drafter {self.kind} cannot be built: {type(e).__name__}: {reason(e)}") from e
        from speckv_online.drafters.chunked import ChunkedDrafter
        from speckv_online.drafters.hybrid import HybridDrafter
        from speckv_online.drafters.model import ModelDrafter
        from speckv_online.drafters.ngram import NgramDrafter
        from speckv_online.lookup.gate import Gate

        if self.kind == "ngram":
            return NgramDrafter()
        assert model is not None
        if self.kind == "model" and graphs:
            return ChunkedDrafter(model, vocab_size, head_ids)
        if self.kind == "model":
            return ModelDrafter(model, vocab_size, head_ids, compiled)
        gate = Gate.load(self.gate or None)
        return HybridDrafter(model, vocab_size, head_ids, compiled, gate=gate, skip=self.skip)


def parse_drafter(text: str) -> DrafterSpec:
    """Read a spec; raises :class:`UserError` for names and options that there are not.

    >>> parse_drafter("hybrid:skip=0.8").skip, parse_drafter("ngram").needs_model
    (0.8, False)
    """
    kind, _, rest = text.partition(":")
    if kind not in KINDS:
        return _parse_plugin(kind, rest)
    options = dict(piece.partition("=")[::2] for piece in rest.split(",") if piece)
    if unknown := sorted(set(options) - ({"skip", "gate"} if kind == "hybrid" else set())):
        raise UserError(f"the drafter {kind} has no option {unknown[0]!r}; hybrid has skip and gate")
    try:
        skip = float(options["skip"]) if "skip" in options else None
    except ValueError:
        skip = -1.0
    if skip is not None and not 0.0 <= skip <= 1.0:
        raise UserError(f"the drafter's option skip must be a probability, got {options['skip']!r}")
    return DrafterSpec(kind, skip, options.get("gate", ""))


def _parse_plugin(name: str, text: str) -> DrafterSpec:
    from policies.base import PolicyError
    from policies.plugins import constructor_options, load_object, parse_options, plugins

    points = plugins(GROUP)
    if name not in points:
        raise UserError(f"unknown drafter {name!r}: choose {', '.join((*KINDS, *sorted(points)))}")
    try:
        cls = load_object(points[name].value, "drafter")
        if not isinstance(cls, type):
            raise UserError(f"the drafter {name} is no class: {points[name].value}")
        hints = {key: hint for key, (hint, _) in constructor_options(cls, leave_out=_GIVEN).items()}
        return DrafterSpec(name, plugin=cls, options=parse_options(name, text, hints))
    except PolicyError as e:
        package = f" of the package {point.dist.name}" if (point := points[name]).dist is not None else ""
        raise UserError(f"the drafter {name}{package}: {e}") from e
