"""Whether a family of models decodes here as it does in transformers, tried before a text is decoded.

Families build masks, positions, windows and caches in ways of their own. A family that is not listed in :data:`KNOWN`
is tried once: a few positions of made-up tokens are read as the decoder reads them, and the logits are compared with
those of transformers' plain ``generate``. A text that reaches past the model's window is preceded by a trial that does
so too. A family that differs is refused.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from speckv_online.errors import UserError
from speckv_online.modeling.batched_model import BatchModel
from speckv_online.modeling.forward_backend import PlainForward
from speckv_online.modeling.introspection import is_known, text_config
from speckv_online.modeling.kv_cache import KVCache

#: Tokens of a trial's prompt, and how many more it has where it must reach past a window.
PROMPT, PAST = 12, 16
#: Tokens that ``generate`` adds.
_NEW = 4
#: Config fields that say how far back a layer looks.
WINDOWS = (
    "sliding_window", "window_size", "attention_window_size", "sliding_window_size", "local_attention",
    "attention_chunk_size", "index_topk",
)  # fmt: skip
#: Largest error of a logit that passes for rounding, in standard deviations of the logits, by type of the weights.
TOLERANCE = {torch.float32: 2e-3, torch.float64: 1e-6}
#: The same for types of 16 bits, and for quantized models, whose layers round their inputs.
LOOSE, QUANTIZED = 0.1, 0.6
#: Texts that are tried: in low precision a tie between two experts of a mixture can tip over in one of them.
_TRIALS = 3

#: What was wrong with a family, empty if nothing; by config, kind of trial and window.
_found: dict[tuple[str, str, int], str] = {}


def check_family(model: PreTrainedModel, role: str, end: int, batch: bool = False) -> None:
    """Refuse a model whose answers would differ from those of transformers' ``generate``.

    Parameters
    ----------
    model : PreTrainedModel
    role : str
        What the model is here, for the message.
    end : int
        Tokens that the text, or the longest of a batch, may come to.
    batch : bool
        Whether several sequences are to be decoded at once.

    Raises
    ------
    UserError
        If they would.
    """
    if is_known(type(model)):
        return
    window = max((size for size in _windows(model) if size < end), default=0)
    for kind in ("single", "batch")[: 1 + batch]:
        key = _name(model), kind, window
        if key not in _found:
            _found[key] = _try(model, _single if kind == "single" else _batch, window)
        if reason := _found[key]:
            what, instead = (
                ("does not decode here as in transformers", "decode with transformers instead")
                if kind == "single"
                else ("does not decode in batches here", "decode one prompt at a time")
            )
            raise UserError(f"the {role} is a {type(model).__name__}, which {what} ({reason}): {instead}")


def _windows(model: PreTrainedModel) -> list[int]:
    config = text_config(model)
    found = [getattr(config, name, None) for name in WINDOWS]
    return [size for size in found if isinstance(size, int) and not isinstance(size, bool) and size > 0]


def _name(model: PreTrainedModel) -> str:
    """Return a name for a class and all that its config says: a family's forms differ."""
    kind, config = type(model), model.config
    text = f"{kind.__module__}.{kind.__qualname__} {config._attn_implementation} {model.dtype} {model.training} "
    return hashlib.sha256((text + config.to_json_string(use_diff=False)).encode()).hexdigest()


@torch.inference_mode()
def _try(model: PreTrainedModel, trial: Callable[[PreTrainedModel, int, int], float], window: int) -> str:
    """Return why a trial failed with every text, empty if it passed with one."""
    length = window + PAST if window else PROMPT
    most = getattr(text_config(model), "max_position_embeddings", None) or length + _NEW
    if 0 < most < length + _NEW:
        length = max(most - _NEW, 1)
    reason = ""
    with torch.random.fork_rng(devices=[]):
        for seed in range(_TRIALS):
            try:
                error = trial(model, length, seed)
            except torch.OutOfMemoryError:
                raise
            except Exception as problem:  # whatever a family makes of a cache or a mask that it does not expect
                return f"{type(problem).__name__}: {' '.join(str(problem).split())[:120]}"
            if error <= _tolerance(model):
                return ""
            reason = f"logits are off by {error:.2g} of their deviation"
    return reason


def _tolerance(model: PreTrainedModel) -> float:
    if getattr(model.config, "quantization_config", None) is not None:
        return QUANTIZED
    return TOLERANCE.get(model.dtype, LOOSE)


def _prompt(model: PreTrainedModel, length: int, seed: int) -> list[int]:
    """Return made-up tokens, none of which the config gives a meaning to."""
    config = text_config(model)
    special: set[int] = set()
    for part in (config, model.config):
        for name, value in part.to_dict().items():
            if name.endswith(("token_id", "token_index", "token_ids")):
                special |= set(value if isinstance(value, list) else [value])
    size = min(int(config.vocab_size), len(model.get_input_embeddings().weight))  # type: ignore[arg-type]
    ids = [int(i) for i in torch.randperm(size, generator=torch.Generator().manual_seed(seed))[: length + 64]]
    usable = [i for i in ids if i not in special] or ids
    return (usable * (1 + length // len(usable)))[:length]


def _expected(model: PreTrainedModel, prompt: list[int]) -> tuple[list[int], torch.Tensor]:
    """Return the tokens that plain ``generate`` adds, and the logits that it chose them by."""
    plain: Any = copy.copy(model)  # with the same parts, and settings of its own
    plain.generation_config = GenerationConfig(pad_token_id=0)
    ids = torch.tensor([prompt], device=model.device)
    out = plain.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=_NEW, use_cache=True,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    return out.sequences[0, len(prompt) :].tolist(), torch.cat(list(out.logits))


def _other(tokens: list[int], prompt: list[int]) -> list[int]:
    """Return drafts that are wrong."""
    return [next(t for t in [*prompt, *range(len(tokens) + 1)] if t != token) for token in tokens]


def _single(model: PreTrainedModel, length: int, seed: int) -> float:
    """Read a prompt with two wrong drafts, forget them, and verify the right ones; return the largest error."""
    prompt = _prompt(model, length, seed)
    tokens, expected = _expected(model, prompt)
    backend, cache = PlainForward(model), KVCache(int(text_config(model).num_hidden_layers))
    wrong = _other(tokens[:2], prompt)
    first = backend.forward([*prompt, *wrong], cache, 3)[:1]
    if len(cache) != length + 2:
        raise ValueError(f"its cache holds {len(cache)} of {length + 2} tokens")
    cache.truncate(length)
    rest = backend.forward(tokens[: _NEW - 1], cache, _NEW - 1)
    return _error(torch.cat((first, rest)), expected)


def _batch(model: PreTrainedModel, length: int, seed: int) -> float:
    """Do what :func:`_single` does for two texts of different lengths at once."""
    long = _prompt(model, length, seed)
    prompts = [long, long[max(length // 3, 1) :][::-1] or long]
    answers, expected = zip(*(_expected(model, prompt) for prompt in prompts), strict=True)
    reader, lengths = BatchModel(model, 2, length + 8), [len(p) for p in prompts]
    if length > 1:
        reader.feed([p[:-1] for p in prompts], last=True)
    wrong = _other(answers[0][:2], long)
    first = reader.feed([[long[-1], *wrong], prompts[1][-1:]])[:, :1]
    reader.cached[:] = lengths
    rest = reader.feed([answers[0][: _NEW - 1], answers[1][:1]])
    found = torch.cat((first, rest), 1)
    return max(_error(found[0], expected[0]), _error(found[1, :2], expected[1][:2]))


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest error of a logit, relative to the deviation of what was expected."""
    found, expected = found.float(), expected.float().to(found.device)
    real = expected.isfinite()
    if not torch.equal(real, found.isfinite()):
        return float("inf")
    return float((found - expected)[real].abs().max() / expected[real].std().clamp_min(1e-9))
