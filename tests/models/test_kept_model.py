"""Models that are kept and mapped: they are what ``from_pretrained`` gives, held once, and safe to change."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from experiments.bench.start import start
from speckv_online.cpu_engine.layer_patches import stock_layers
from speckv_online.cpu_engine.pack import pack
from speckv_online.decoding.decoder import SpeculativeDecoder
from speckv_online.modeling.fingerprint import fingerprint
from speckv_online.modeling.kv_cache import KVCache
from speckv_online.models import kept_model
from speckv_online.models.pairs import load_target
from speckv_online.models.smollm2 import smollm2_dir
from tests.support.decoding import Scripted
from tests.support.engine import needs_engine, needs_level, small_llama

pytestmark = needs_engine
PROMPT = torch.randint(1, 304, (20,), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model's folder, and a cache of its own that keeps small models too."""
    monkeypatch.setenv("SPECKV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(kept_model, "LARGE_BYTES", 0)
    made = small_llama(hidden_size=128, intermediate_size=192, num_attention_heads=4)
    made.generation_config.eos_token_id = [7, 9]
    made.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def kept_files(folder: Path) -> list[Path]:
    return sorted((folder.parent / "cache" / "weights").glob("[0-9a-f]*"))


@torch.inference_mode()
def read(model: PreTrainedModel) -> torch.Tensor:
    """A prompt's logits over a cache of ours, then of a token alone: the engine's, where it runs the model."""
    cache = KVCache(2, 4)
    return torch.cat([model(input_ids=ids[None], past_key_values=cache).logits[0] for ids in (PROMPT, PROMPT[:1])])


@torch.inference_mode()
def own(model: PreTrainedModel) -> torch.Tensor:
    """What the model's own forward says, with its own layers."""
    with stock_layers(model):
        found: torch.Tensor = type(model).forward(model, input_ids=PROMPT[None]).logits[0]
    return found


@pytest.mark.parametrize("level", ["fp32", "fp16", "bf16", "int8", "nf4", "fp4"])
def test_a_kept_model_is_the_model(folder: Path, level: str) -> None:
    needs_level(level)
    made = load_target(folder, level, "cpu", "auto")
    assert len(kept_files(folder)) == 1
    kept, plain = load_target(folder, level, "cpu", "auto"), load_target(folder, level, "cpu", "off")
    compiled = load_target(folder, level, "cpu", "off")
    assert fingerprint(kept) == fingerprint(plain)
    pack(compiled)
    expected = dict(plain.state_dict())
    for model in (made, kept):
        assert str(model._engine_notes.status).startswith("on (compiled forward")
        assert model.config.to_dict() == plain.config.to_dict()
        assert model.generation_config.to_dict() == plain.generation_config.to_dict()
        ours = {"_compiled", "_compiled_of", "_engine_notes", "_fingerprint", "_forward_backend", "forward"}
        theirs = {"_use_kernels", "_weight_conversions"}  # as where they are missing: False, and none
        assert set(vars(model)) - ours - {"_kept_fingerprint"} == set(vars(plain)) - ours - theirs
        named = dict(model.state_dict())
        assert named.keys() == expected.keys()
        for name, tensor in expected.items():
            assert named[name].dtype == tensor.dtype
            assert torch.equal(named[name], tensor)
        flags = [(name, type(p), p.requires_grad, p.device) for name, p in plain.named_parameters()]
        assert [(name, type(p), p.requires_grad, p.device) for name, p in model.named_parameters()] == flags
        assert [(n, b.dtype) for n, b in model.named_buffers()] == [(n, b.dtype) for n, b in plain.named_buffers()]
        assert torch.equal(read(model), read(compiled))
        assert torch.equal(own(model), own(plain))
        assert torch.equal(read(model), read(compiled))


@pytest.mark.parametrize("level", ["fp16", "int8", "nf4"])
def test_weights_are_held_once_and_mapped(folder: Path, level: str) -> None:
    needs_level(level)
    load_target(folder, level, "cpu", "auto")
    kept = load_target(folder, level, "cpu", "auto")
    (path,) = kept_files(folder)
    files = str(path), str(folder / "model.safetensors")  # a weight that is not rounded stays where it is
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(files)]
    ranges = [tuple(int(end, 16) for end in line.split()[0].split("-")) for line in lines]
    products = [part for part in kept._compiled._kept if hasattr(part, "weight")]
    assert len(products) > 4
    layers = [m for name, m in kept.named_modules() if name.endswith("_proj")]
    for weight in [part.weight for part in products] + [layer.weight for layer in layers]:
        assert any(low <= weight.data_ptr() < high for low, high in ranges)


@pytest.mark.parametrize("level", ["fp16", "int8", "nf4"])
def test_a_changed_model_is_what_is_decoded_next(folder: Path, level: str) -> None:
    needs_level(level)
    load_target(folder, level, "cpu", "auto")
    kept = load_target(folder, level, "cpu", "auto")
    (path,) = kept_files(folder)
    before, file, taken = read(kept), path.read_bytes(), fingerprint(kept)
    decoder = SpeculativeDecoder(None, policy=Scripted([0]), target=kept)
    unchanged = decoder.generate(PROMPT.tolist(), 12, eos_ids=()).tokens
    with torch.no_grad():
        kept.model.embed_tokens.weight.mul_(-1.5)
        kept.model.layers[1].mlp.down_proj = nn.Linear(192, 128, bias=False)
    assert not torch.equal(read(kept), before)
    changed = decoder.generate(PROMPT.tolist(), 12, eos_ids=()).tokens
    assert changed != unchanged
    ids, cache = PROMPT.tolist(), KVCache(2, 40)
    assert changed == plainly(kept, ids, cache, 12)
    assert level == "nf4" or fingerprint(kept) != taken
    assert path.read_bytes() == file
    assert torch.equal(read(load_target(folder, level, "cpu", "auto")), before)


@torch.inference_mode()
def plainly(model: PreTrainedModel, ids: list[int], cache: KVCache, count: int) -> list[int]:
    """Greedy tokens of the model's own forward, one by one."""
    found, given = list[int](), ids
    for _ in range(count):
        logits = type(model).forward(model, input_ids=torch.tensor([given]), past_key_values=cache).logits
        given = [int(logits[0, -1].argmax())]
        found += given
    return found


def test_another_model_in_the_same_folder_is_another_model(folder: Path) -> None:
    load_target(folder, "fp16", "cpu", "auto")
    other = small_llama(hidden_size=128, intermediate_size=192, num_attention_heads=4)
    with torch.no_grad():
        other.lm_head.weight.mul_(-1)
    other.save_pretrained(folder)
    plain = load_target(folder, "fp16", "cpu", "off")
    assert torch.equal(own(load_target(folder, "fp16", "cpu", "auto")), own(plain))
    assert len(kept_files(folder)) == 2


def test_a_damaged_file_is_made_anew(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = read(load_target(folder, "fp16", "cpu", "auto"))
    (path,) = kept_files(folder)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(read(load_target(folder, "fp16", "cpu", "auto")), expected)
    assert [r.getMessage().count("set aside") for r in caplog.records] == [1]
    assert (path.parent / "damaged").exists()
    assert path.exists()
    assert torch.equal(read(load_target(folder, "fp16", "cpu", "auto")), expected)


@pytest.mark.parametrize("engine", ["off", "auto"])
def test_nothing_is_kept_without_the_engine_or_of_a_small_model(
    folder: Path, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if engine == "auto":
        monkeypatch.undo()
        monkeypatch.setenv("SPECKV_CACHE", str(folder.parent / "cache"))
    load_target(folder, "fp16", "cpu", engine)
    assert not kept_files(folder)


CODE = """
import sys, torch
from speckv_online.models import kept_model
from speckv_online.models.pairs import load_target
kept_model.LARGE_BYTES = 0
torch.set_num_threads(1)
model = load_target(sys.argv[1], "fp16", "cpu", "auto")
print(float(model(input_ids=torch.arange(1, 9)[None]).logits.double().sum()), model._engine_notes.compiled)
"""


def test_processes_may_start_at_once(folder: Path) -> None:
    command = [sys.executable, "-c", CODE, str(folder)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    answers = [one.communicate(timeout=300)[0].strip() for one in running]
    assert [one.returncode for one in running] == [0] * 3
    assert answers[0].endswith("True")
    assert len(set(answers)) == 1
    assert len(kept_files(folder)) == 1
    assert not list(kept_files(folder)[0].parent.glob("*.part"))


@pytest.mark.slow
@pytest.mark.parametrize("level", ["fp16", "int8", "nf4"])
def test_the_kept_default_target_is_the_target(level: str) -> None:
    needs_level(level)
    load_target(smollm2_dir(), level, "cpu", "auto")
    kept, plain = (load_target(smollm2_dir(), level, "cpu", engine) for engine in ("auto", "off"))
    assert fingerprint(kept) == fingerprint(plain)
    for (name, mine), (other, theirs) in zip(kept.named_parameters(), plain.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(mine, theirs)
    compiled = load_target(smollm2_dir(), level, "cpu", "off")
    pack(compiled)
    cache, other = KVCache(30, 40), KVCache(30, 40)
    with torch.inference_mode():
        for ids in (PROMPT, PROMPT[:1], PROMPT[3:8]):
            found, expected = (
                m(input_ids=ids[None], past_key_values=c).logits for m, c in ((kept, cache), (compiled, other))
            )
            assert torch.equal(found, expected)
    assert torch.equal(own(kept), own(plain))


@pytest.mark.slow
@pytest.mark.parametrize("level", ["fp16", "int8", "nf4", "q4_1"])
def test_the_default_pair_is_in_memory_once(level: str) -> None:
    """``speckv generate`` maps kept weights: what is its own is libraries' data and caches, and no copy of weights.

    It is 256 MB at each level here. The smallest weights are 80 MB. How much of the mapped files is in memory beside it
    is up to the system: 575 to 650 MB in all at int8, by how new the files are. ``python -m experiments.bench.start``
    prints both.
    """
    needs_level("fp16" if level == "q4_1" else level)
    assert any(start(level, 24)["own_mb"] <= 330 for _ in range(2))  # the first may have to make the kept ones
