"""GGUF files as models: the right numbers, the same bits at every width, and one line for a file that is bad."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from experiments.common.bundled_prompts import bundled
from experiments.compare.__main__ import main as compare
from speckv_online.cli import main
from speckv_online.cpu_engine.gguf_layers import GgufLinear
from speckv_online.decoding.batch import decode_batch
from speckv_online.decoding.decoder import SpeculativeDecoder
from speckv_online.drafters.model import ModelDrafter
from speckv_online.drafters.ngram import NgramDrafter
from speckv_online.errors import UserError
from speckv_online.modeling.gguf_types import TYPES, dequantize
from speckv_online.modeling.introspection import level_of
from speckv_online.modeling.kv_cache import KVCache
from speckv_online.models import gguf_model
from speckv_online.models.gguf_file import GgufFile
from speckv_online.models.gguf_model import load_gguf
from speckv_online.models.pairs import chat_prompt, load_pair, load_target, load_tokenizer
from speckv_online.models.smollm2 import find_gguf
from tests.support.engine import needs_engine
from tests.support.gguf_files import KINDS, small_model, write_gguf

CPU = torch.device("cpu")
IDS = torch.randint(0, 272, (80,), generator=torch.Generator().manual_seed(3))
LAYERS = 2


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "small.gguf", small_model(), "Q4_1")


@torch.inference_mode()
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_weights_are_the_models(tmp_path: Path, family: str) -> None:
    model = small_model(family)
    found = load_target(write_gguf(tmp_path / "m.gguf", model, "F32"), None, "cpu")
    assert type(found) is type(model)
    ours = found.state_dict()
    assert ours.keys() == model.state_dict().keys()
    assert all(torch.equal(ours[name], value) for name, value in model.state_dict().items())
    torch.testing.assert_close(found(input_ids=IDS[None]).logits, model(input_ids=IDS[None]).logits)
    assert found.generation_config.eos_token_id == [0]


@pytest.mark.parametrize("number", TYPES)
def test_dequantized_as_the_gguf_package_does(number: int) -> None:
    kind = TYPES[number]
    data = torch.randint(0, 256, (8, 64 // kind.size * kind.bytes), dtype=torch.uint8)
    if not kind.bits:
        data = torch.randn(8, 64).to(
            torch.bfloat16 if kind.name == "BF16" else getattr(torch, f"float{8 * kind.bytes}")
        )
        data = data.view(torch.uint8)
    expected = gguf.quants.dequantize(data.numpy(), gguf.GGMLQuantizationType[kind.name])
    torch.testing.assert_close(dequantize(data, kind), torch.from_numpy(expected), rtol=0, atol=0, equal_nan=True)


@needs_engine
@torch.inference_mode()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_logits_are_those_of_the_dequantized_model(
    tmp_path: Path, family: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tmp_path / "m.gguf", small_model(family), kind)
    expected = load_target(path, None, "cpu", "off")(input_ids=IDS[None]).logits[0]
    for inputs, allowed in (("16", 1e-3), ("8", 0.2)):
        monkeypatch.setenv("SPECKV_GGUF_INPUTS", inputs)
        model = load_target(path, None, "cpu", "auto")
        assert level_of(model) == TYPES[int(gguf.GGMLQuantizationType[kind])].level
        assert model._engine_notes.compiled == (family == "llama")
        for found in (
            model(input_ids=IDS[None], past_key_values=KVCache(LAYERS, 90)).logits[0],
            type(model).forward(model, input_ids=IDS[None]).logits[0],
        ):
            assert float((found - expected).abs().max()) <= allowed * float(expected.std())


@needs_engine
@torch.inference_mode()
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(widths=st.lists(st.integers(1, 30), min_size=1, max_size=6))
@pytest.mark.parametrize("mixed", [{}, {"blk.0.attn_v.weight": "Q8_0", "blk.1.ffn_down.weight": "F16"}], ids=str)
def test_same_bits_at_every_width(tmp_path: Path, mixed: dict[str, str], widths: list[int]) -> None:
    path = tmp_path / "m.gguf"
    if not path.exists():
        write_gguf(path, small_model(), "Q4_1", mixed)
    model: Any = load_target(path, None, "cpu", "auto")
    assert level_of(model) == "q4_1"
    assert model._engine_notes.compiled
    whole = model(input_ids=IDS[None], past_key_values=KVCache(LAYERS, 4)).logits[0]
    cache, at = KVCache(LAYERS, 4), 0
    for width in widths:
        some = IDS[None, at : at + width]
        if some.numel():
            found = model(input_ids=some, past_key_values=cache).logits[0]
            assert torch.equal(found, whole[at : at + width])
        at += width


@needs_engine
def test_decoding_a_file(
    file: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPECKV_ENGINE", "auto")
    pair = load_pair(target=str(file), drafter="ngram", device="cpu")
    assert (pair.level.name, pair.engine["target"].on) == ("q4_1", True)
    prompt = pair.tokenizer("so it goes, so it goes").input_ids
    expected = SpeculativeDecoder(None, policy="autoregressive", target=pair.target).generate(prompt, 24).tokens
    found = SpeculativeDecoder(NgramDrafter(), policy="fixed:4", target=pair.target).generate(prompt, 24).tokens
    assert found == expected
    decoder, other = SpeculativeDecoder(NgramDrafter(), policy="fixed:2", target=pair.target), prompt[:9]
    alone = SpeculativeDecoder(None, policy="autoregressive", target=pair.target).generate(other, 24).tokens
    assert [out.tokens for out in decode_batch(decoder, [prompt, other], 24)] == [expected, alone]
    flags = ["--target", str(file), "--drafter", "ngram", "--device", "cpu"]
    assert main(["generate", *flags, "--prompt", "so it goes, so it goes", "--max-new-tokens", "24", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["token_ids"], facts["compression"]) == (expected, "q4_1")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "so it goes, so it goes", "task": "chat"}\n')
    more = ["--local", "--prompts", str(prompts), "--policies", "autoregressive,online", "--max-new-tokens", "12"]
    assert compare([*flags, *more, "--levels", "q4_1", "--out", str(tmp_path / "run"), "--json"]) == 0
    assert "q4_1" in capsys.readouterr().out
    assert compare([*flags, *more, "--levels", "fp16"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("error: small.gguf holds the level q4_1, not fp16: give q4_1, or another file")


@needs_engine
def test_a_file_drafts_for_a_file(tmp_path: Path, file: Path) -> None:
    draft = write_gguf(tmp_path / "draft.gguf", small_model(), "Q8_0")
    pair = load_pair(target=str(file), draft=str(draft), device="cpu")
    prompt = pair.tokenizer("hello there").input_ids
    expected = SpeculativeDecoder(None, policy="autoregressive", target=pair.target).generate(prompt, 24).tokens
    found = SpeculativeDecoder(pair.drafter, policy="fixed:4", target=pair.target).generate(prompt, 24)
    assert found.tokens == expected
    assert sum(step.accepted for step in found.steps) > 0


def test_the_tokenizer_is_kept(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECKV_CACHE", str(tmp_path))
    first = load_tokenizer(str(file))
    (folder,) = (tmp_path / "tokenizers").iterdir()
    again = load_tokenizer(str(file))
    text = "the tide, the tide"
    assert again(text).input_ids == first(text).input_ids
    assert again.decode(again(text).input_ids) == text
    assert again.eos_token == first.eos_token == "<eos>"
    (folder / "tokenizer.json").write_text("{")
    assert load_tokenizer(str(file))(text).input_ids == first(text).input_ids


def refusal(path: Path) -> str:
    """Return why a file is refused; it must be one line."""
    with pytest.raises(UserError) as error:
        load_gguf(GgufFile(path), CPU, "off")
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def test_files_that_are_refused(file: Path, tmp_path: Path) -> None:
    def written(model: PreTrainedModel | None = None, kind: str = "Q8_0", **fields: Any) -> Path:
        return write_gguf(tmp_path / "m.gguf", model or small_model(), kind, **fields)

    whole, path = file.read_bytes(), tmp_path / "bad.gguf"
    for content, reason in (
        (b"", "it is empty"),
        (b"GGML" + whole[4:], "it is no GGUF file"),
        (whole[:4] + struct.pack("<I", 1) + whole[8:], "GGUF of version 1, 2 and 3 are read"),
        (whole[:4] + struct.pack("<IQ", 3, 1 << 60) + whole[16:], "its header is damaged"),
        (whole[:100], "it ends within its header"),
        (whole[:-64], "it ends within 'output.weight'"),
    ):
        path.write_bytes(content)
        assert reason in refusal(path)
    assert "No such file" in refusal(tmp_path / "none.gguf")
    for options, reason in (
        ({"split__count": 3}, "it is one part of 3: merge them"),
        ({"general__alignment": 0}, "general.alignment is 0"),
        ({"llama__expert_count": 8}, "a mixture of experts is not read"),
        ({"llama__rope__scaling__type": "yarn"}, "rotary embeddings scaled by 'yarn' are not read"),
    ):
        assert reason in refusal(written(**options))
    assert "has the type Q5_0; F32, F16" in refusal(written(kind="Q5_0"))
    for old, new, reason in (
        (b"llama", b"gemma", "its architecture is 'gemma'"),
        (b"blk.1.attn_q.weight", b"blk.1.attn_p.weight", "blk.1.attn_q.weight is missing"),
        (b"blk.1.attn_q.weight", b"blk.0.attn_q.weight", "two tensors of the same name"),
        (b"token_embd.weight", b"token_embe.weight", "token_embd.weight is missing"),
        (b"llama.block_count", b"llama.block_cound", "llama.block_count is missing"),
    ):
        path.write_bytes(whole.replace(old, new))
        assert reason in refusal(path)


def test_every_truncation_is_one_line(file: Path, tmp_path: Path) -> None:
    whole, path = file.read_bytes(), tmp_path / "cut.gguf"
    header = len(GgufFile(file).header)
    for size in [*range(0, 400, 7), *range(400, header, 997), *range(header, len(whole) - 32, 20011)]:
        path.write_bytes(whole[:size])
        refusal(path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_is_one_line_or_a_model(file: Path, tmp_path: Path, data: st.DataObject) -> None:
    whole, path = bytearray(file.read_bytes()), tmp_path / "damaged.gguf"
    header = GgufFile(file).header
    # Most of the header is the list of tokens: fields lie before it, tensors behind it.
    ends = [(4, header.index(b"tokenizer.ggml.tokens")), (header.rindex(b"tokenizer.ggml.eos"), len(header) - 1)]
    for _ in range(data.draw(st.integers(1, 3))):
        first, last = data.draw(st.sampled_from(ends))
        whole[data.draw(st.integers(first, last))] = data.draw(st.sampled_from([0, 1, 2, 8, 9, 127, 128, 255]))
    path.write_bytes(whole)
    reason = ""
    try:
        load_gguf(GgufFile(path), CPU, "off")
    except UserError as error:
        reason = str(error)
    assert "\n" not in reason


def test_bad_files_on_the_command_line(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(file.read_bytes()[:5000])
    for flags, reason in (
        (["--target", str(bad)], f"cannot read {bad}: it ends within its header: fetch it again"),
        (["--target", str(file), "--level", "int8"], "small.gguf holds the level q4_1, not int8"),
        (["--target", str(tmp_path), "--level", "q4_1"], "only a GGUF file has the level q4_1"),
        (["--pair", "other", "--level", "q4_1"], "unknown model pair 'other'"),
    ):
        capsys.readouterr()
        assert main(["generate", "--prompt", "hi", "--drafter", "ngram", *flags]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert reason in lines[-1]
        assert len(lines) == 1


def test_a_processor_without_kernels(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("speckv_online.models.gguf_model.why_not", lambda kind, to: "this processor has no AVX2")
    with pytest.raises(UserError, match="this processor has no AVX2: give --engine off to de-quantize it"):
        load_target(file, None, "cpu", "auto")
    load_target(file, None, "cpu", "off")


@pytest.mark.slow
@needs_engine
@torch.inference_mode()
def test_the_default_pair_says_what_its_weights_are() -> None:
    """At q4_1 greedy tokens are those of the de-quantized model in fp32, but where its two best are close."""
    epsilon, close, positions = 0.5, 0, 0
    pair = load_pair(level="q4_1", device="cpu", engine="auto")
    exact = load_target(find_gguf(), None, "cpu", "off")
    assert isinstance(pair.drafter, ModelDrafter)
    plain, drafted = (
        SpeculativeDecoder(drafter, policy=policy, target=pair.target)
        for drafter, policy in ((None, "autoregressive"), (pair.drafter, "fixed:4"))
    )
    for prompt in bundled()[:4]:
        ids = chat_prompt(pair.tokenizer, prompt.text)[:200]
        tokens = plain.generate(ids, 40).tokens
        assert drafted.generate(ids, 40).tokens == tokens
        text = torch.tensor([*ids, *tokens])[None, :-1]
        top = exact(input_ids=text, logits_to_keep=len(tokens)).logits[0].topk(2)
        gaps = top.values[:, 0] - top.values[:, 1]
        close, positions = close + int((gaps < epsilon).sum()), positions + len(tokens)
        other = top.indices[:, 0] != torch.tensor(tokens)
        assert not bool((other & (gaps >= epsilon)).any())
    assert positions >= 100
    assert close <= positions // 4


@needs_engine
@torch.inference_mode()
def test_a_first_start_maps_what_it_laid_out(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_model, "LARGE_BYTES", 0)
    monkeypatch.setenv("SPECKV_CACHE", str(tmp_path))
    first, second = (load_target(file, None, "cpu", "auto") for _ in range(2))
    for model in (first, second):
        mapped = Path("/proc/self/maps").read_text()
        addresses = [layer.weight.data_ptr() for layer in model.modules() if isinstance(layer, GgufLinear)]
        lines = [line for line in mapped.splitlines() if str(tmp_path) in line]
        ranges = [[int(end, 16) for end in line.split()[0].split("-")] for line in lines]
        assert addresses
        assert all(any(low <= a < high for low, high in ranges) for a in addresses)
    assert torch.equal(first(input_ids=IDS[None]).logits, second(input_ids=IDS[None]).logits)
