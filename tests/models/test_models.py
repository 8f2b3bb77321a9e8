"""Loading models: the level registry, any pair of one tokenizer, and what goes wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from speckv_online.decoding.decoder import SpeculativeDecoder
from speckv_online.decoding.greedy_check import check_greedy
from speckv_online.errors import UserError
from speckv_online.lookup.ngram_index import NgramIndex
from speckv_online.modeling.engine import ENGINES
from speckv_online.modeling.fingerprint import fingerprint
from speckv_online.modeling.kv_cache import KVCache
from speckv_online.models import smollm2
from speckv_online.models.distilled_draft import load_shipped_draft
from speckv_online.models.levels import LEVELS, get_level
from speckv_online.models.pairs import LoadedPair, chat_prompt, load_pair, load_target, prepare
from tests.support.decoding import Scripted, plain, prompt_of
from tests.support.engine import SUPPORTED, needs_level
from tests.support.tiny_models import TinyPair, tiny_llama, tiny_tokenizer


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("level", sorted(LEVELS))
def test_every_level_loads_and_decodes(tiny_pair: TinyPair, level: str, engine: str) -> None:
    folders = {"target": str(tiny_pair.target_dir), "draft": str(tiny_pair.draft_dir)}
    pair = load_pair(**folders, level=level, device="cpu", engine=engine)
    prompt = prompt_of(10)
    out = SpeculativeDecoder(pair.drafter, policy=Scripted([4]), target=pair.target, level=level).generate(
        prompt, 16, eos_ids=()
    )
    assert len(out.tokens) == 16
    check = check_greedy(pair.target, prompt, out.tokens)
    assert check.within(0.5), check
    layer = pair.target.model.layers[0].mlp.up_proj
    kind = {"int8": "Linear8bitLt", "nf4": "Linear4bit", "fp4": "Linear4bit"}.get(level)
    kind = kind or ("PackedLinear" if SUPPORTED and engine == "auto" else "Linear")
    assert type(layer).__name__ == kind
    if kind == "Linear4bit":
        assert layer.weight.quant_type == level


def test_any_quantization_by_a_spec_string(tiny_pair: TinyPair) -> None:
    level = "bitsandbytes_4bit:bnb_4bit_quant_type=fp4,bnb_4bit_use_double_quant=true"
    pair = load_pair(target=str(tiny_pair.target_dir), draft=str(tiny_pair.draft_dir), level=level, device="cpu")
    prompt = [3, 4, 5, 6]
    plain = SpeculativeDecoder(None, policy=Scripted([0]), target=pair.target).generate(prompt, 12, eos_ids=())
    out = SpeculativeDecoder(pair.drafter, policy=Scripted([4]), target=pair.target).generate(prompt, 12, eos_ids=())
    assert out.tokens == plain.tokens
    weight = pair.target.model.layers[0].mlp.up_proj.weight
    assert weight.quant_type == "fp4"
    assert pair.target.config.quantization_config.bnb_4bit_use_double_quant


@pytest.mark.parametrize(
    ("level", "message"),
    [
        ("gptk:bits=4", "unknown quantization method 'gptk'.*gptq"),
        ("bitsandbytes_4bit:double", "'double' is no key=value"),
        ("bitsandbytes_4bit:bnb_4bit_quant_type=7", "must be a string"),
        ("bitsandbytes_4bit:bnb_4bit_quant_type=[", "no value of YAML"),
        ("bitsandbytes_4bit:bnb_4bit_quant_type=nf5", "cannot load"),
        ("bitsandbytes_4bit:bnb_4bit_quant_type=2026-13-45", "no value of YAML"),
    ],
)
def test_bad_quantization_specs_are_refused(tiny_pair: TinyPair, level: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_target(tiny_pair.target_dir, level, "cpu")


def test_a_used_four_bit_model_is_not_fingerprinted(tiny_pair: TinyPair) -> None:
    """Since bitsandbytes' state_dict damages weights that it has repacked for the CPU."""
    needs_level("nf4")
    target = load_target(tiny_pair.target_dir, "nf4", "cpu")
    before = fingerprint(target)
    assert before == fingerprint(load_target(tiny_pair.target_dir, "nf4", "cpu"))
    ids = torch.arange(3, 12)[None]
    with torch.inference_mode():
        logits = target(ids).logits
        assert getattr(target.model.layers[0].mlp.up_proj.weight.quant_state, "packing_format_for_cpu", False)
        with pytest.raises(RuntimeError, match="before its first forward"):
            fingerprint(target)
        assert torch.equal(target(ids).logits, logits)


def test_sixteen_bit_levels_round_the_weights(tiny_pair: TinyPair) -> None:
    exact = tiny_pair.target.model.layers[0].mlp.up_proj.weight
    for level, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        weight = load_target(tiny_pair.target_dir, level, "cpu").model.layers[0].mlp.up_proj.weight
        assert weight.dtype == torch.float32
        assert torch.equal(weight, exact.to(dtype).float())
        assert "arithmetic in fp32" in get_level(level).arithmetic(torch.device("cpu"))


def test_unknown_names() -> None:
    with pytest.raises(UserError, match=r"level 'int3'.*nf4"):
        get_level("int3")
    with pytest.raises(UserError, match="pair 'gpt9'"):
        prepare("gpt9")
    for device in ("tpu9", "mps", "meta", "cuda:99"):
        with pytest.raises(UserError, match="device"):
            load_pair(device=device)
    with pytest.raises(UserError, match="no model folder"):
        load_pair(target="/does/not/exist", draft="/nor/this")
    with pytest.raises(UserError, match="give both"):
        load_pair(target="/does/not/exist")


def test_a_model_id_may_have_to_be_fetched_and_that_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="no folder here, and as a model id: "):
        load_pair(target="no-such-owner/no-such-model", draft="/nor/this", device="cpu")
    assert capsys.readouterr().err == "loading no-such-owner/no-such-model from the Hugging Face hub, or its cache\n"


def test_two_tokenizers_are_refused(tiny_pair: TinyPair, tmp_path: Path) -> None:
    tiny_pair.draft.save_pretrained(tmp_path)
    tiny_tokenizer(words=3).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"different tokenizers \(3 of"):
        load_pair(target=str(tiny_pair.target_dir), draft=str(tmp_path), device="cpu")


def test_pickled_weights_are_refused(tiny_pair: TinyPair, tmp_path: Path) -> None:
    shutil.copytree(tiny_pair.target_dir, tmp_path / "m")
    weights = load_file(tmp_path / "m" / "model.safetensors")
    (tmp_path / "m" / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "m" / "pytorch_model.bin")
    with pytest.raises(UserError, match="safetensors"):
        load_target(tmp_path / "m", "fp32", "cpu")


def test_broken_weights_are_one_line(tiny_pair: TinyPair, tmp_path: Path) -> None:
    shutil.copytree(tiny_pair.target_dir, tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot load") as error:
        load_target(tmp_path / "m", "fp32", "cpu")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("config", ["{", "[]", '{"model_type": "llama", "num_hidden_layers": "three"}'])
def test_broken_configs_are_one_line(tiny_pair: TinyPair, tmp_path: Path, config: str) -> None:
    folder = shutil.copytree(tiny_pair.target_dir, tmp_path / "broken")
    (folder / "config.json").write_text(config)
    with pytest.raises(UserError, match="cannot load") as error:
        load_pair(target=str(folder), drafter="ngram", device="cpu")
    assert "\n" not in str(error.value)


def test_chat_prompt_without_a_template(tiny_pair: TinyPair) -> None:
    assert tiny_pair.tokenizer.decode(chat_prompt(tiny_pair.tokenizer, "hello")) == "hello"


def test_cache_grows_and_truncates_like_a_fresh_one() -> None:
    model = tiny_llama()
    ids = torch.tensor([prompt_of(50)])
    small, large = KVCache(3, capacity=4), KVCache(3, capacity=64)
    with torch.inference_mode():
        for cache in (small, large):
            model(input_ids=ids, past_key_values=cache)
            cache.truncate(20)
            out = model(input_ids=ids[:, 20:], past_key_values=cache).logits
            torch.testing.assert_close(out, model(ids).logits[:, 20:], atol=1e-4, rtol=1e-4)
    assert len(small) == 50
    with pytest.raises(ValueError, match="truncate"):
        small.truncate(51)


def test_ngram_lookup_prefers_the_longest_and_latest() -> None:
    index = NgramIndex([1, 2, 3, 9, 2, 3, 7, 1, 2, 3])
    assert index.lookup() == (9, 3)  # "1 2 3" was followed by 9; the shorter "2 3" later by 7
    assert index.lookup([9]) == (2, 4)
    assert index.lookup([5]) == (-1, 0)
    assert index.signal([], 9) == 3
    assert index.signal([], 7) == -3
    assert index.signal([5], 7) == 0
    index.extend([7, 2, 3])
    assert index.lookup() == (7, 2)


def shipped(tmp_path: Path) -> tuple[Path, Path]:
    """A draft file for a tiny target, in the format of the shipped one: layers 0 and 2 of three, half of the head."""
    target = tiny_llama()
    target.save_pretrained(tmp_path / "target")
    state = {}
    for new, old in enumerate((0, 2)):
        for name, t in target.model.layers[old].state_dict().items():
            state[f"model.layers.{new}.{name}"] = t.half().contiguous()
    state["model.norm.weight"] = target.model.norm.weight.detach().half()
    state["head_ids"] = torch.arange(0, 260, 2, dtype=torch.int32)
    meta = {"format": "speckv-draft", "version": "1", "target": "tiny", "kept_layers": "0,2"}
    save_file(state, tmp_path / "draft.safetensors", metadata=meta)
    return tmp_path / "target", tmp_path / "draft.safetensors"


def test_shipped_draft_format(tmp_path: Path) -> None:
    target, path = shipped(tmp_path)
    model, head_ids, digest = load_shipped_draft(target, torch.device("cpu"), path)
    assert model.config.num_hidden_layers == 2
    assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 130)
    assert head_ids.tolist() == list(range(0, 260, 2))
    assert len(digest) == 64
    embedding = load_file(target / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(model.lm_head.weight, embedding[::2])


def test_foreign_draft_files_are_refused(tmp_path: Path) -> None:
    target, path = shipped(tmp_path)
    state = load_file(path)
    save_file(state, tmp_path / "other.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="no speckv-draft"):
        load_shipped_draft(target, torch.device("cpu"), tmp_path / "other.safetensors")
    state.pop("model.norm.weight")
    meta = {"format": "speckv-draft", "version": "1", "kept_layers": "0,2"}
    save_file(state, tmp_path / "short.safetensors", metadata=meta)
    with pytest.raises(UserError, match="does not fit"):
        load_shipped_draft(target, torch.device("cpu"), tmp_path / "short.safetensors")
    (tmp_path / "noise.safetensors").write_bytes(b"noise")
    with pytest.raises(UserError, match="cannot read the draft"):
        load_shipped_draft(target, torch.device("cpu"), tmp_path / "noise.safetensors")


def test_default_target_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing half-made stays behind, and every message says what to do."""
    monkeypatch.setenv("SPECKV_CACHE", str(tmp_path / "cache"))
    assert not smollm2.smollm2_ready()
    models = tmp_path / "cache" / "models"
    monkeypatch.setattr(smollm2, "NEEDED_BYTES", 1 << 60)
    with pytest.raises(UserError, match="MB free"):
        smollm2.prepare_smollm2()
    monkeypatch.setattr(smollm2, "NEEDED_BYTES", 0)
    monkeypatch.setattr(smollm2, "GGUF_SHA256", "0" * 64)
    with pytest.raises(UserError, match="install it again"):
        smollm2.prepare_smollm2()
    assert [p.name for p in models.iterdir()] == ["prepare.lock"]
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPECKV_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="cannot write"):
        smollm2.prepare_smollm2()


def test_checksums_find_damage(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    sums = {"a": {"bytes": 3, "sha256": smollm2.sha256(tmp_path / "a")}}
    (tmp_path / smollm2.CHECKSUMS).write_text(json.dumps(sums))
    smollm2.verify(tmp_path)
    (tmp_path / "a").write_bytes(b"abd")
    with pytest.raises(UserError, match="damaged"):
        smollm2.verify(tmp_path)


def test_preparing_again_checks_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECKV_CACHE", str(tmp_path))
    folder = smollm2.smollm2_dir()
    folder.mkdir(parents=True)
    (folder / "a").write_bytes(b"abc")
    sums = {"a": {"bytes": 3, "sha256": smollm2.sha256(folder / "a")}}
    (folder / smollm2.CHECKSUMS).write_text(json.dumps(sums))
    assert prepare("smollm2", check=True) == folder
    (folder / "a").write_bytes(b"abd")
    assert prepare("smollm2") == folder  # sizes alone do not tell
    with pytest.raises(UserError, match="damaged"):
        prepare("smollm2", check=True)


@pytest.mark.slow
def test_the_shipped_draft_belongs_to_the_default_target(real_pair: LoadedPair) -> None:
    pair = real_pair
    assert pair.target.config.num_hidden_layers == 30
    prompt = chat_prompt(pair.tokenizer, "Name three rivers in Europe.")
    policy = Scripted([4])
    out = SpeculativeDecoder(pair.drafter, policy=policy, target=pair.target, level="fp32").generate(prompt, 24)
    assert out.tokens == plain(pair.target, prompt, 24)
    assert sum(s.accepted for s in out.steps) > 0


def test_bitsandbytes_is_imported_without_a_compiler() -> None:
    """torch.compile loads inductor where a function is decorated: over a second that no level needs."""
    code = """
import sys
import torch
from speckv_online.models.levels import get_level
compile = torch.compile
get_level("nf4").load_arguments(torch.device("cpu"))
assert "torch._inductor.compile_fx" not in sys.modules and torch.compile is compile
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
x = torch.randn(64, 64)
assert (dequantize_4bit(*quantize_4bit(x, quant_type="nf4")) - x).abs().mean() < 0.1
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
