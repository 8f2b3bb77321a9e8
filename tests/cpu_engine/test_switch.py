"""The engine's switch, what is said of it, and that a kernel that is slightly wrong is refused with a reason."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from speckv_online.cpu_engine import layer_patches, llama_program, products
from speckv_online.cpu_engine import pack as packed
from speckv_online.cpu_engine.backend import CompiledForward
from speckv_online.cpu_engine.int8_draft import Int8Draft
from speckv_online.cpu_engine.logit_check import LOGITS, UPDATE
from speckv_online.cpu_engine.pack import pack
from speckv_online.cpu_engine.start import int8_draft, start_engine
from speckv_online.cpu_engine.target_forward import CompiledTarget
from speckv_online.decoding.decoder import SpeculativeDecoder
from speckv_online.drafters.model import ModelDrafter
from speckv_online.drafters.ngram import NgramDrafter
from speckv_online.errors import UserError
from speckv_online.modeling.engine import EngineStatus, choose_engine
from speckv_online.modeling.forward_backend import UNTOUCHED, PlainForward, backend_of
from speckv_online.modeling.kv_cache import KVCache
from speckv_online.models.pairs import LoadedPair, load_pair, load_target
from tests.support.engine import needs_engine, needs_level, small_llama
from tests.support.tiny_models import TinyPair, tiny_llama

TEXT = torch.arange(3, 30)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that the engine takes at every level."""
    path = tmp_path_factory.mktemp("llama")
    small_llama(hidden_size=128, intermediate_size=192, num_attention_heads=4).save_pretrained(path)
    return path


def said(caplog: pytest.LogCaptureFixture, *levels: int) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno in levels and "engine" in r.name]


def test_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPECKV_ENGINE", raising=False)
    assert choose_engine() == "auto"
    monkeypatch.setenv("SPECKV_ENGINE", "off")
    assert choose_engine() == "off"
    assert choose_engine("auto") == "auto"
    with pytest.raises(UserError, match="--engine must be auto or off, got 'on'"):
        choose_engine("on")
    monkeypatch.setenv("SPECKV_ENGINE", "yes")
    with pytest.raises(UserError, match=r"\$SPECKV_ENGINE must be auto or off"):
        choose_engine()
    monkeypatch.setenv("SPECKV_ENGINE", "")
    assert choose_engine() == "auto"


@pytest.mark.parametrize("level", ["fp32", "fp16", "int8", "nf4"])
def test_off_means_plain_transformers(
    tiny_pair: TinyPair, level: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPECKV_ENGINE", "auto")  # what is given wins
    caplog.set_level(logging.INFO)
    folders = {"target": str(tiny_pair.target_dir), "draft": str(tiny_pair.draft_dir)}
    pair = load_pair(**folders, level=level, device="cpu", engine="off")
    assert isinstance(pair.drafter, ModelDrafter)
    assert said(caplog, logging.INFO) == ["LlamaForCausalLM: the CPU engine is off (switched off)"] * 2
    assert not said(caplog, logging.WARNING)
    prompt = TEXT.tolist()
    decoder = SpeculativeDecoder(pair.drafter, policy="fixed:3", target=pair.target)
    tokens = decoder.generate(prompt, 12, eos_ids=()).tokens
    assert decoder.decode_batch([prompt, prompt[:5]], 12, eos_ids=())[0].tokens == tokens
    for model in (pair.target, pair.drafter.model):
        assert not any("forward" in vars(m) for m in model.modules())
        assert not any(type(m).__module__.startswith("speckv_online") for m in model.modules())
        assert model.config._attn_implementation == "sdpa"
        assert type(backend_of(model)) is PlainForward
    assert pair.drafter.compiled is None
    assert decoder.engine == EngineStatus(False, "switched off")
    assert pair.engine == {"target": decoder.engine, "draft": decoder.engine}


def test_the_environment_switches_a_pair_off(tiny_pair: TinyPair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECKV_ENGINE", "off")
    pair = load_pair(target=str(tiny_pair.target_dir), level="fp32", device="cpu", drafter="ngram")
    assert pair.engine == {"target": EngineStatus(False, "switched off")}
    assert type(pair.target.lm_head) is nn.Linear
    assert int8_draft(tiny_pair.draft) is None


@needs_engine
@pytest.mark.parametrize("level", ["fp32", "fp16", "bf16", "int8", "nf4", "fp4"])
def test_auto_is_on_and_says_so_once(folder: Path, level: str, caplog: pytest.LogCaptureFixture) -> None:
    needs_level(level)
    caplog.set_level(logging.INFO)
    target = load_target(folder, level, "cpu", engine="auto")
    (line,) = said(caplog, logging.INFO, logging.WARNING)
    assert line.startswith("LlamaForCausalLM: the CPU engine is on (compiled forward, ")
    decoder = SpeculativeDecoder(NgramDrafter(), policy="fixed:2", target=target)
    assert decoder.engine.on
    assert f"on ({decoder.engine.reason})" in line
    plain = SpeculativeDecoder(NgramDrafter(), policy="fixed:2", target=load_target(folder, level, "cpu"))
    assert not plain.engine.on
    decoder.generate(TEXT.tolist(), 4)
    decoder.decode_batch([TEXT.tolist()] * 2, 4)
    assert len(said(caplog, logging.INFO, logging.WARNING)) == 2  # that of the plain one


@needs_engine
def test_the_reason_is_of_the_part_that_is_missing(caplog: pytest.LogCaptureFixture) -> None:
    config = Qwen2Config(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=1)  # fmt: skip
    caplog.set_level(logging.INFO)
    model = Qwen2ForCausalLM(config).eval()
    status = start_engine(model, "auto")
    assert status == backend_of(model).status
    assert status.on
    assert status.reason.startswith("8 packed linear layers, 3 patched layers; no compiled forward: Qwen2ForCausalLM")
    assert len(said(caplog, logging.INFO)) == 1
    assert not said(caplog, logging.WARNING)  # nothing failed
    assert backend_of(tiny_llama()).status == UNTOUCHED


@needs_engine
@pytest.mark.parametrize("error", [ImportError, OSError, RuntimeError, KeyError])
def test_what_fails_is_a_warning_with_the_reason(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(form: Any, names: Any) -> Any:
        raise error("no compiler here")

    monkeypatch.setattr(llama_program, "compiled", broken)
    model = small_llama()
    status = start_engine(model, "auto")
    assert f"no compiled forward: {error.__name__}: " in status.reason
    assert "no compiler here" in status.reason
    (line,) = said(caplog, logging.WARNING)
    assert status.reason in line
    SpeculativeDecoder(None, policy="autoregressive", target=model).generate([5, 6], 4)
    assert int8_draft(small_llama(), "auto") is None
    assert error.__name__ in said(caplog, logging.WARNING)[-1]
    assert len(said(caplog, logging.WARNING)) == 2


@needs_engine
def test_a_layer_that_fails_says_so_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def broken(layer: Any, x: torch.Tensor) -> torch.Tensor:
        raise OSError("no kernel")

    ready, _ = layer_patches.WAYS["LlamaRMSNorm"]
    monkeypatch.setitem(layer_patches.WAYS, "LlamaRMSNorm", (ready, broken))
    model = small_llama()
    assert "no short way for LlamaRMSNorm: OSError: no kernel" in start_engine(model, "auto").reason
    with torch.inference_mode():
        for _ in range(2):
            model(input_ids=TEXT[None])
    assert len(said(caplog, logging.WARNING)) == 1  # of five layers, at load
    # A model that is not run at load says it at its first forward.
    other = nn.Sequential(small_llama().model.norm, small_llama().model.norm)
    pack(other)
    with torch.inference_mode():
        other(torch.ones(2, 96))
    assert said(caplog, logging.WARNING)[1:] == ["Sequential: no short way for LlamaRMSNorm: OSError: no kernel"]


def damage(how: str) -> dict[str, Any]:
    """The engine's products with one output that is 3 % too large, or with all of them 2 % too large."""

    def scaled(scales: torch.Tensor, axis: int) -> None:
        part = scales.select(axis, 0) if how == "one row" else scales
        part *= 1.03 if how == "one row" else 1.02

    class Packed(products.Packed):
        def __init__(self, layers: list[Any]) -> None:
            super().__init__(layers)
            self.weight = self.weight.clone()
            # Weights of two outputs lie together, some inputs of one and the same of the other.
            pair = self.weight.view(self.outputs // 2, -1, 2, packed.shape().lanes)  # type: ignore[union-attr]
            (pair[0, :, 0] if how == "one row" else pair).mul_(1.03 if how == "one row" else 1.02)

    class FourBit(products.FourBit):
        def __init__(self, layers: list[Any]) -> None:
            super().__init__(layers)
            scaled(self.scales, 1)

    class Int8(products.Int8):
        def __init__(self, layers: list[Any]) -> None:
            super().__init__(layers)
            scaled(self.sizes.view(-1), 0)

    return {"PackedLinear": Packed, "Linear4bit": FourBit, "Linear8bitLt": Int8}


@needs_engine
@pytest.mark.parametrize("how", ["one row", "all rows"])
@pytest.mark.parametrize("level", ["fp32", "fp16", "bf16", "int8", "nf4", "fp4"])
def test_a_compiled_forward_that_is_slightly_wrong_is_refused(
    folder: Path, level: str, how: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    needs_level(level)
    model = load_target(folder, level, "cpu")
    real = dict(products._KINDS)
    kind = type(model.model.layers[1].mlp.down_proj).__name__
    kind = kind if kind in real else "PackedLinear"
    wrong = damage(how)[kind]
    # Only the last matrix of the second layer: the least that a layer can be wrong by.
    at = iter(range(100))
    monkeypatch.setitem(products._KINDS, kind, lambda layers: (wrong if next(at) == 7 else real[kind])(layers))
    status = start_engine(model, "auto")
    assert not isinstance(model.__dict__.get("_compiled"), CompiledTarget)
    assert "no compiled forward: " in status.reason
    assert f"{UPDATE if level in ('int8', 'nf4', 'fp4') else LOGITS['float']:g} is allowed" in status.reason
    assert said(caplog, logging.WARNING) == [f"LlamaForCausalLM: the CPU engine is {status}"]
    prompt, plain = TEXT[None], load_target(folder, level, "cpu")
    with torch.inference_mode():
        found, expected = (m(input_ids=prompt, past_key_values=KVCache(2, 40)).logits for m in (model, plain))
    assert (found - expected).abs().max() < 1e-4 * expected.std()


@needs_engine
def test_a_packed_layer_with_one_wrong_row_is_refused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = packed.lay_out

    def wrong(weight: torch.Tensor, use: Any) -> Any:
        weight = weight.clone()
        if len(weight) == 304:  # the head alone
            weight[17] *= 1.03
        return real(weight, use)

    monkeypatch.setattr(packed, "lay_out", wrong)
    model = small_llama()
    status = start_engine(model, "auto")
    assert "no packed linear layers: the results of lm_head are not the layer's" in status.reason
    assert type(model.lm_head) is nn.Linear
    assert len(said(caplog, logging.WARNING)) == 1


@needs_engine
def test_weights_that_no_longer_fit_change_the_status(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    model = small_llama()
    start_engine(model, "auto")
    decoder = SpeculativeDecoder(None, policy="autoregressive", target=model)
    assert "compiled forward, " in decoder.engine.reason
    model.lm_head = nn.Linear(96, 304, bias=False)
    decoder.generate(TEXT.tolist(), 2)
    assert "no compiled forward: " in decoder.engine.reason
    assert sum("compiled forward" in line for line in said(caplog, logging.INFO, logging.WARNING)) == 2


@needs_engine
def test_copies_have_a_backend_of_their_own() -> None:
    model = small_llama()
    start_engine(model, "auto")
    deep, shallow = copy.deepcopy(model), copy.copy(model)
    found = backend_of(deep)
    assert isinstance(found, CompiledForward)
    assert found.model is deep
    assert found.status.on
    assert type(backend_of(shallow)) is PlainForward


@needs_engine
@torch.inference_mode()
def test_every_backend_reads_the_same(tiny_pair: TinyPair) -> None:
    """Tokens given as a list, as a tensor, and in both ways; one by one and in a batch."""
    stock, engine, draft = small_llama(), small_llama(), small_llama()
    start_engine(engine, "auto")
    compiled = int8_draft(draft, "auto")
    assert isinstance(compiled, Int8Draft)
    assert compiled.status.on
    for backend, tolerance in ((backend_of(stock), 1e-5), (backend_of(engine), 1e-4), (compiled, 0.1)):
        expected = stock(input_ids=TEXT[None, :9]).logits[0]
        cache = KVCache(2, 20)
        parts = [
            backend.forward(TEXT[:4].tolist(), cache, 4),
            backend.forward(TEXT[4:6].tolist(), cache, 3, TEXT[6:7].float()),
            backend.forward([], cache, 2, TEXT[7:9]),
        ]
        assert (torch.cat(parts) - expected).std() < tolerance * expected.std()
        rows = backend.batch([TEXT[:5].tolist(), TEXT[:2].tolist()], 20)
        rows.feed([TEXT[:5].tolist(), TEXT[:2].tolist()], last=True)
        found = rows.feed([TEXT[5:9].tolist(), TEXT[2:3].tolist()])
        assert (found[0] - expected[5:]).std() < tolerance * expected.std()
        rows.keep([1])
        assert rows.cached == [3]


def test_a_pair_loaded_for_a_missing_processor(tiny_pair: TinyPair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "shape", lambda: None)
    folders = {"target": str(tiny_pair.target_dir), "draft": str(tiny_pair.draft_dir)}
    pair: LoadedPair = load_pair(**folders, level="fp32", device="cpu", engine="auto")
    assert "no compiled kernels: none for this processor" in pair.engine["target"].reason
