"""The decoder inside transformers: ``model.generate(**inputs, custom_generate=SpeculativeDecoder(draft, policy=...))``.

``generate`` prepares processors, stopping criteria and lengths as it does for its own methods, hands them over, and the
answer is what its own greedy or sampled decoding would have given.
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import torch
from transformers import (
    DynamicCache,
    EosTokenCriteria,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedModel,
    StoppingCriteriaList,
    StopStringCriteria,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from speckv_online.decoding.batch import MAX_BATCH, decode_batch
from speckv_online.decoding.generation import Generation
from speckv_online.decoding.hf_row import Row, of_row
from speckv_online.decoding.loop import DecodingLoop
from speckv_online.errors import UserError
from speckv_online.modeling.kv_cache import KVCache

#: What ``generate`` passes to the model besides the tokens, and what the decoder does in its own way.
_KNOWN = {
    "attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "cache_position",
    "token_type_ids", "output_attentions", "output_hidden_states", "return_dict",
}  # fmt: skip
#: The last one is what a config with ``prompt_lookup_num_tokens`` asks for: the decoder's drafter takes its place.
_MODES = {GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE, GenerationMode.ASSISTED_GENERATION}
#: Processors that count their calls or run the model themselves: drafted tokens would go through them as well.
_STATEFUL = (SynthIDTextWatermarkLogitsProcessor, UnbatchedClassifierFreeGuidanceLogitsProcessor)


def run(
    decoder: DecodingLoop,
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    *,
    generation_config: GenerationConfig,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    stop_strings: str | list[str] | None = None,
    task: str = "",
    streamer: BaseStreamer | None = None,
    synced_gpus: bool = False,
    **model_kwargs: Any,
) -> torch.Tensor | GenerateDecoderOnlyOutput:
    """Decode what ``generate`` prepared.

    Parameters
    ----------
    input_ids : Tensor, shape (batch, length)
        Prompts, padded on the left.
    stop_strings, task
        Extra arguments of ``generate``: transformers loses its ``tokenizer`` on the way to a custom method, so stop
        strings need the decoder's own.

    Returns
    -------
    Tensor of shape (batch, length + new), or GenerateDecoderOnlyOutput
        As the generation config asks.

    Raises
    ------
    UserError
        For what cannot be done exactly.
    """
    _refuse(generation_config, logits_processor, model_kwargs, synced_gpus)
    decoder.bind(model)
    streamer = streamer or _streamer_of_caller()
    if stop_strings:
        if decoder.tokenizer is None:
            raise UserError("stop_strings need a tokenizer: give it to SpeculativeDecoder(..., tokenizer=...)")
        criterion = StopStringCriteria(decoder.tokenizer, stop_strings)
        stopping_criteria = StoppingCriteriaList([*stopping_criteria, criterion])
    eos = {int(t) for c in stopping_criteria if isinstance(c, EosTokenCriteria) for t in c.eos_token_id.view(-1)}
    most = [c.max_length for c in stopping_criteria if isinstance(c, MaxLengthCriteria)]
    budget = max(1, min(most, default=generation_config.max_length) - input_ids.shape[1])
    rest = [c for c in stopping_criteria if not isinstance(c, EosTokenCriteria | MaxLengthCriteria)]

    wanted = bool(generation_config.return_dict_in_generate)
    keep_logits = wanted and bool(generation_config.output_scores or generation_config.output_logits)
    parts = _split(input_ids, model_kwargs.get("attention_mask"))
    _check_positions(model_kwargs.get("position_ids"), parts)
    rows = [
        Row(
            ids, pads, of_row(logits_processor, i, len(input_ids)), StoppingCriteriaList(rest), generation_config,
            model.device, keep_logits,
        )
        for i, (ids, pads) in enumerate(parts)
    ]  # fmt: skip
    cache: KVCache | None = None
    if len(rows) == 1:
        row = rows[0]
        cache = KVCache(decoder.layers, len(row.prompt) + budget + decoder.max_gamma + 1)
        on_tokens = row.on_tokens(streamer)
        decoder.generate(
            row.prompt, budget, task=task, eos_ids=eos, sampler=row.sampler, cache=cache, on_tokens=on_tokens,
            on_logits=row.see if keep_logits else None, should_stop=row.should_stop if rest else None,
        )  # fmt: skip
    else:
        if keep_logits or streamer is not None:
            what = "output_scores and output_logits need" if keep_logits else "a streamer needs"
            raise UserError(f"{what} a single sequence, but there are {len(rows)}")
        found: list[Generation] = []
        for i in range(0, len(rows), MAX_BATCH):
            part = rows[i : i + MAX_BATCH]
            found += decode_batch(
                decoder, [row.prompt for row in part], budget, tasks=[task] * len(part), eos_ids=eos,
                samplers=[row.sampler for row in part], should_stop=[row.should_stop for row in part] if rest else None,
            )  # fmt: skip
        decoder.last = found
    if streamer is not None:
        streamer.end()
    answers = decoder.last if isinstance(decoder.last, list) else [decoder.last]
    sequences = _join(input_ids, answers, generation_config)
    if not wanted:
        return sequences
    raw, processed = generation_config.output_logits, generation_config.output_scores
    return GenerateDecoderOnlyOutput(
        sequences=sequences,  # type: ignore[arg-type]
        scores=tuple(s.clone() for s in rows[0].scores(answers[0].tokens)) if processed else None,  # type: ignore[arg-type]
        logits=tuple(r.clone() for r in rows[0].logits) if raw else None,  # type: ignore[arg-type]
        past_key_values=None if cache is None else _dynamic(cache),
    )


def _refuse(
    config: GenerationConfig, processors: LogitsProcessorList, model_kwargs: dict[str, Any], synced_gpus: bool
) -> None:
    """Raise for what the decoder cannot do exactly."""
    if (config.num_beams or 1) > 1:
        raise UserError("speculative decoding has no beams: use num_beams=1")
    mode = config.get_generation_mode()
    if mode not in _MODES:
        raise UserError(f"{mode.value.replace('_', ' ')} is not supported: only greedy decoding and sampling are")
    if config.return_dict_in_generate and (config.output_attentions or config.output_hidden_states):
        raise UserError("output_attentions and output_hidden_states are not supported with speculative decoding")
    if synced_gpus:
        raise UserError("synced_gpus is not supported: every process would take other numbers of steps")
    for processor in processors:
        if isinstance(processor, _STATEFUL):
            raise UserError(f"{type(processor).__name__} keeps a state of its own and cannot see drafted tokens")
    extra = sorted(k for k, v in model_kwargs.items() if v is not None and k not in _KNOWN)
    if extra:
        raise UserError(f"only token ids can be decoded from, but generate also got {', '.join(extra)}")


def _streamer_of_caller() -> BaseStreamer | None:
    """Return the streamer that ``generate`` was given.

    transformers (5.23) feeds it the prompt and then leaves it out of what a custom method gets, so that it would wait
    for ever. It is still a local variable of the calling ``generate``.
    """
    code = getattr(GenerationMixin.generate, "__wrapped__", GenerationMixin.generate).__code__
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return None if frame is None else frame.f_locals.get("streamer")


def _split(input_ids: torch.Tensor, mask: torch.Tensor | None) -> list[tuple[list[int], list[int]]]:
    """Return (prompt, padding before it) of each row."""
    ids = input_ids.tolist()
    if mask is None:
        return [(row, []) for row in ids]
    if mask.dim() != 2 or mask.shape != input_ids.shape:
        raise UserError(f"the attention mask must have the shape of input_ids, {tuple(input_ids.shape)}")
    found = []
    for row, seen in zip(ids, mask.tolist(), strict=True):
        pads = seen.index(1) if 1 in seen else len(seen)
        if not all(seen[pads:]):
            raise UserError("the attention mask hides tokens after the first visible one: pad prompts on the left")
        found.append((row[pads:], row[:pads]))
    return found


def _check_positions(positions: torch.Tensor | None, parts: list[tuple[list[int], list[int]]]) -> None:
    """Raise if positions were given (``generate`` prepares the usual ones itself) that do not count from zero."""
    if positions is None or positions.shape != (len(parts), sum(map(len, parts[0]))):
        return  # none, or those of the tokens that a cache lacks
    for (prompt, pads), row in zip(parts, positions.tolist(), strict=True):
        if row[len(pads) :] != list(range(len(prompt))):
            raise UserError("position_ids of your own are not supported: leave them to generate")


def _join(input_ids: torch.Tensor, answers: list[Generation], config: GenerationConfig) -> torch.Tensor:
    """Return prompts and answers, shorter answers padded on the right."""
    longest = max(len(a.tokens) for a in answers)
    pad = getattr(config, "_pad_token_tensor", None)
    fill = 0 if pad is None else int(pad)
    new = [a.tokens + [fill] * (longest - len(a.tokens)) for a in answers]
    return torch.cat((input_ids, torch.tensor(new, dtype=input_ids.dtype, device=input_ids.device)), dim=1)


def _dynamic(cache: KVCache) -> DynamicCache:
    """Copy a cache into transformers' own kind, which the next call of ``generate`` may go on with."""
    found, layers = DynamicCache(), list[Any](cache.layers)
    for i, layer in enumerate(layers):
        found.update(layer.keys[..., : len(cache), :].clone(), layer.values[..., : len(cache), :].clone(), i)
    return found
