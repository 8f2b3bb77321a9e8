"""JSON schemas by a grammar library, whose matcher keeps a state and takes each token once, over the default pair."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from speckv_online.decoding.decoder import SpeculativeDecoder
from speckv_online.drafters.hybrid import HybridDrafter
from speckv_online.drafters.ngram import NgramDrafter
from speckv_online.models.pairs import LoadedPair, chat_prompt
from tests.support.decoding import Scripted

outlines_core = pytest.importorskip("outlines_core")
pytestmark = pytest.mark.slow

#: Calls in all; SPECKV_GRAMMAR_CALLS=100 for more of them.
CALLS = int(os.environ.get("SPECKV_GRAMMAR_CALLS", "20"))
SCHEMAS: list[dict[str, Any]] = [
    {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 12}, "visited": {"type": "boolean"}},
        "required": ["city", "visited"],
    },
    {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "green", "blue"]}, "shade": {"enum": ["light", "dark"]}},
        "required": ["colour", "shade"],
    },
    {"type": "array", "items": {"enum": ["rain", "sun", "snow"]}, "minItems": 2, "maxItems": 5},
]
ASKED = ["a town by the sea", "the sky", "the weather this week", "a fruit", "your favourite place"]


class Schema(LogitsProcessor):
    """Allows what continues a schema; it follows one text, token by token."""

    def __init__(self, index: Any, start: int, eos: int) -> None:
        self.guide, self.start, self.length, self.eos = outlines_core.Guide(index), start, start, eos

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        assert input_ids.shape == (1, self.length), "asked about another prefix than the next one"
        last = int(input_ids[0, -1])
        if self.length == self.start:
            found = self.guide.get_tokens()
        else:
            assert last != self.eos, "asked about what follows the end"
            found = self.guide.advance(last)  # an error for a token that the schema does not allow
        self.length += 1
        allowed = torch.tensor(found)
        return torch.full_like(scores, float("-inf")).index_copy(1, allowed, scores[:, allowed])


def vocabulary(tokenizer: PreTrainedTokenizerBase) -> Any:
    """The tokenizer's tokens as bytes, but for the special ones."""
    byte_of = {letter: byte for byte, letter in bytes_to_unicode().items()}
    found: dict[bytes, list[int]] = {}
    for token, i in tokenizer.get_vocab().items():
        if i not in tokenizer.all_special_ids and all(letter in byte_of for letter in token):
            found.setdefault(bytes(byte_of[letter] for letter in token), []).append(i)
    return outlines_core.Vocabulary(tokenizer.eos_token_id, found)


@pytest.fixture(scope="module")
def indices(real_pair: LoadedPair) -> list[Any]:
    known = vocabulary(real_pair.tokenizer)
    regexes = [outlines_core.json_schema.build_regex_from_schema(json.dumps(schema)) for schema in SCHEMAS]
    return [outlines_core.Index(regex, known) for regex in regexes]


def conforms(value: Any, schema: dict[str, Any]) -> bool:
    if "enum" in schema:
        return value in schema["enum"]
    if schema["type"] == "array":
        return schema["minItems"] <= len(value) <= schema["maxItems"] and all(
            conforms(item, schema["items"]) for item in value
        )
    if schema["type"] == "object":
        return list(value) == schema["required"] and all(
            conforms(value[name], part) for name, part in schema["properties"].items()
        )
    return isinstance(value, {"string": str, "boolean": bool}[schema["type"]])


def test_json_of_a_schema(real_pair: LoadedPair, indices: list[Any]) -> None:
    """Greedy: the tokens of plain decoding. Sampled: JSON of the schema. The matcher is never asked out of turn."""
    pair = real_pair
    model: Any = pair.drafter
    hybrid = HybridDrafter(model.model, model.vocab_size, model._head_ids)
    drafters = [model, NgramDrafter(), hybrid]
    eos, accepted = pair.tokenizer.eos_token_id, 0
    for call in range(CALLS):
        which = call % len(SCHEMAS)
        sampled = call % 2 == 1
        policy = Scripted([[4, 0, 7], [8], [2]][call // 2 % 3])
        decoder = SpeculativeDecoder(drafters[call % 5 % 3], policy=policy)
        asked = ASKED[call % len(ASKED)]
        prompt = torch.tensor([chat_prompt(pair.tokenizer, f"Describe {asked} as JSON: {json.dumps(SCHEMAS[which])}")])
        options: dict[str, Any] = {
            "attention_mask": torch.ones_like(prompt),
            "max_new_tokens": 48,
            "do_sample": sampled,
        }
        torch.manual_seed(call)
        out = pair.target.generate(
            prompt, custom_generate=decoder, logits_processor=[Schema(indices[which], prompt.shape[1], eos)], **options
        )
        assert not decoder.policy.faults
        new = out[0, prompt.shape[1] :].tolist()
        if not sampled:
            plainly = pair.target.generate(
                prompt, logits_processor=[Schema(indices[which], prompt.shape[1], eos)], **options
            )
            assert new == plainly[0, prompt.shape[1] :].tolist()
        assert new[-1] == eos
        assert conforms(json.loads(pair.tokenizer.decode(new[:-1])), SCHEMAS[which])
        accepted += decoder.totals.accepted
    assert accepted > CALLS
