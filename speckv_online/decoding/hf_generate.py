"""The decoder inside transformers: ``model.generate(**inputs, custom_generate=SpeculativeDecoder(draft, policy=...))``.

``generate`` prepares processors, stopping criteria and lengths as it does for its own methods, hands them over, and the
answer is what its own greedy or sampled decoding would have given.
"""

from __future__ import annotations

import inspect
import sys
from types import FrameType
from typing import Any

import torch
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from speckv_online.decoding.batch import MAX_BATCH, decode_batch
from speckv_online.decoding.generation import Generation
from speckv_online.decoding.hf_cache import check_positions, given_cache, hand_over, load, split
from speckv_online.decoding.hf_row import Row, Together, of_row, taken_apart
from speckv_online.decoding.loop import DecodingLoop
from speckv_online.errors import UserError
from speckv_online.modeling.sampling import is_pure

NO_TOKENIZER = (
    "stop strings need a tokenizer: give it to SpeculativeDecoder(..., tokenizer=...) or generate(..., tokenizer=...)"
)
#: What ``generate`` passes to the model besides the tokens, and what the decoder does in its own way.
_KNOWN = {
    "attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "cache_position",
    "token_type_ids", "output_attentions", "output_hidden_states", "return_dict",
}  # fmt: skip
#: The last one is what a config with ``prompt_lookup_num_tokens`` asks for: the decoder's drafter takes its place.
_MODES = {GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE, GenerationMode.ASSISTED_GENERATION}


def run(
    decoder: DecodingLoop,
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    *,
    generation_config: GenerationConfig,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    stop_strings: str | list[str] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
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
    stop_strings, tokenizer, task
        Extra arguments of ``generate``; the tokenizer is by default the decoder's own.

    Returns
    -------
    Tensor of shape (batch, length + new), or GenerateDecoderOnlyOutput
        As the generation config asks.

    Raises
    ------
    UserError
        For what cannot be done exactly.
    """
    decoder.bind(model)
    _refuse(generation_config, model_kwargs, synced_gpus)
    streamer = streamer or _streamer_of_caller()
    if stop_strings:
        tokenizer = tokenizer or decoder.tokenizer
        if tokenizer is None:
            raise UserError(NO_TOKENIZER)
        criterion = StopStringCriteria(tokenizer, stop_strings)
        stopping_criteria = StoppingCriteriaList([*stopping_criteria, criterion])
    eos = {int(t) for c in stopping_criteria if isinstance(c, EosTokenCriteria) for t in c.eos_token_id.view(-1)}
    most = [c.max_length for c in stopping_criteria if isinstance(c, MaxLengthCriteria)]
    budget = max(1, min(most, default=generation_config.max_length) - input_ids.shape[1])
    rest = [c for c in stopping_criteria if not isinstance(c, EosTokenCriteria | MaxLengthCriteria)]

    wanted = bool(generation_config.return_dict_in_generate)
    keep_logits = wanted and bool(generation_config.output_scores or generation_config.output_logits)
    given = given_cache(model_kwargs)
    prompts = split(input_ids, model_kwargs.get("attention_mask"), given, generation_config)
    check_positions(model_kwargs.get("position_ids"), prompts)
    together = None
    if len(prompts) > 1 and not taken_apart(logits_processor, StoppingCriteriaList(rest), bool(eos)):
        if len(prompts) > MAX_BATCH:
            raise UserError(f"processors and criteria of your own see at most {MAX_BATCH} sequences: split the batch")
        own, pad = StoppingCriteriaList(rest), _fill(generation_config)
        together, rest = Together(logits_processor, own, input_ids, pad, bool(eos)), []
        logits_processor = LogitsProcessorList(p for p in logits_processor if is_pure(p))
    rows = [
        Row(
            prompt.ids, prompt.pads, of_row(logits_processor, i, len(prompts)), StoppingCriteriaList(rest),
            generation_config, model.device, keep_logits, together is not None,
        )
        for i, prompt in enumerate(prompts)
    ]  # fmt: skip
    keeps_cache = given is not None or (wanted and generation_config.use_cache is not False)
    caches = load(decoder, given, prompts, budget) if keeps_cache else None
    if len(rows) == 1:
        row = rows[0]
        on_tokens = row.on_tokens(streamer)
        decoder.generate(
            row.prompt, budget, task=task, eos_ids=eos, sampler=row.sampler, on_tokens=on_tokens,
            cache=caches[0] if caches else None,
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
                caches=caches[i : i + MAX_BATCH] if caches else None, together=together,
            )  # fmt: skip
        decoder.last = found
    if streamer is not None:
        streamer.end()
    answers = decoder.last if isinstance(decoder.last, list) else [decoder.last]
    fill = _fill(generation_config)
    sequences = _join(input_ids, answers, fill)
    cache = hand_over(decoder, given, caches, prompts, [a.tokens for a in answers], fill) if caches else None
    if not wanted:
        return sequences
    raw, processed = generation_config.output_logits, generation_config.output_scores
    return GenerateDecoderOnlyOutput(
        sequences=sequences,  # type: ignore[arg-type]
        scores=tuple(s.clone() for s in rows[0].scores(answers[0].tokens)) if processed else None,  # type: ignore[arg-type]
        logits=tuple(r.clone() for r in rows[0].logits) if raw else None,  # type: ignore[arg-type]
        past_key_values=cache,
    )


def _refuse(config: GenerationConfig, model_kwargs: dict[str, Any], synced_gpus: bool) -> None:
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
    # transformers adds empty containers of its own for models with other inputs beside tokens.
    extra = sorted(k for k, v in model_kwargs.items() if v is not None and v != {} and k not in _KNOWN)
    if extra:
        raise UserError(f"only token ids can be decoded from, but generate also got {', '.join(extra)}")


class CallSignature:
    """The signature of the decoder's call, and the tokenizer that ``generate`` was given.

    transformers (5.23) takes ``tokenizer`` out of the arguments, and does not hand it to a custom method. It then finds
    none for stop strings and token healing. In between, and for nothing else, it looks the signature up.
    """

    def __get__(self, decoder: DecodingLoop | None, owner: type) -> inspect.Signature:
        if decoder is None:
            raise AttributeError("__signature__")  # the class has its usual one
        code = getattr(getattr(GenerationMixin, "_extract_generation_mode_kwargs", None), "__code__", None)
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code is not code:
            frame = frame.f_back
        usual = inspect.signature(decoder.__call__)  # type: ignore[operator]
        if frame is None:
            return usual
        _hand_tokenizer_on(decoder, frame)
        # With a tokenizer, transformers makes the criterion of stop strings itself, whoever asked for them.
        return usual.replace(parameters=[p for name, p in usual.parameters.items() if name != "stop_strings"])


def _hand_tokenizer_on(decoder: DecodingLoop, frame: FrameType) -> None:
    """Put the tokenizer back among the arguments that :class:`CallSignature` reads them from."""
    found, caller = frame.f_locals, frame.f_back.f_locals if frame.f_back else {}
    tokenizer = found.get("generation_mode_kwargs", {}).get("tokenizer") or decoder.tokenizer
    configs = caller.get("generation_config"), getattr(found.get("self"), "generation_config", None)
    arguments = found["kwargs"]
    heals = arguments.get("token_healing") or any(getattr(config, "token_healing", None) for config in configs)
    if heals and getattr(tokenizer, "pad_token", None) is None:
        raise UserError("token healing needs a tokenizer with a pad token: give it to generate(..., tokenizer=...)")
    if tokenizer is not None:
        arguments["tokenizer"] = tokenizer
    elif arguments.get("stop_strings") or any(getattr(config, "stop_strings", None) for config in configs):
        raise UserError(NO_TOKENIZER)


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


def _fill(config: GenerationConfig) -> int:
    """Return the token that follows the end of a sequence."""
    pad = getattr(config, "_pad_token_tensor", None)
    return 0 if pad is None else int(pad)


def _join(input_ids: torch.Tensor, answers: list[Generation], fill: int) -> torch.Tensor:
    """Return prompts and answers, shorter answers padded on the right."""
    longest = max(len(a.tokens) for a in answers)
    new = [a.tokens + [fill] * (longest - len(a.tokens)) for a in answers]
    return torch.cat((input_ids, torch.tensor(new, dtype=input_ids.dtype, device=input_ids.device)), dim=1)
