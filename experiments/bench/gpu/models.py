"""Models of the GPU benchmark: the default pair, tiny random ones, and Llamas of usual shapes with random weights."""

from __future__ import annotations

import gc
import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from experiments.bench.gpu.settings import Skip, Stage
from speckv_online.drafters.chunked import ChunkedDrafter
from speckv_online.drafters.model import ModelDrafter
from speckv_online.gpu_engine.graphed_llama import attach
from speckv_online.models.pairs import LoadedPair, load_pair

#: Hidden size, inner size, layers, heads, heads of keys, size of a head: Llama-3.2-1B, Llama-3.2-3B, Llama-3.1-8B.
SHAPES = {
    "1b": (2048, 8192, 16, 32, 8, 64),
    "3b": (3072, 8192, 28, 24, 8, 128),
    "8b": (4096, 14336, 32, 32, 8, 128),
}
TINY_SHAPES = {"1b": (128, 256, 2, 4, 2, 32), "3b": (128, 256, 3, 4, 2, 32), "8b": (256, 512, 3, 4, 2, 64)}
VOCABULARY, TINY_VOCABULARY, POSITIONS = 128_256, 300, 4096
FAMILIES = ("llama", "qwen3", "gemma")


def need_bitsandbytes(level: str) -> None:
    """Raise :class:`Skip` where a level's library is not installed."""
    if level in ("int8", "nf4") and importlib.util.find_spec("bitsandbytes") is None:
        raise Skip("bitsandbytes is not installed")


def noisy(model: PreTrainedModel, scale: float, seed: int) -> None:
    """Add noise to a model's weights: a draft that is right some of the time."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * scale * p.std())


def random_family(kind: str) -> PreTrainedModel:
    """Return a tiny random model of a family, in fp32 on the CPU, the same each time."""
    torch.manual_seed(0)
    make: Any = CONFIG_MAPPING[kind]  # each family's has arguments of its own
    config = make(
        vocab_size=TINY_VOCABULARY, hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=POSITIONS, initializer_range=0.15,
        bos_token_id=None, eos_token_id=0, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(3)  # random logits are nearly flat; real ones are not
    return model


def save_family(kind: str, folder: Path) -> tuple[Path, Path]:
    """Write a tiny target and its draft; return their folders."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={token: i for i, token in enumerate(["<eos>", *alphabet])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    model, folders = random_family(kind), (folder / f"{kind}-target", folder / f"{kind}-draft")
    for where in folders:
        model.save_pretrained(where)
        fast.save_pretrained(where)
        noisy(model, 0.03, 1)
    return folders


def open_pair(stage: Stage, level: str, kind: str = "", folder: Path | None = None) -> LoadedPair:
    """Load a pair at a level: a tiny family's, or the default one; everything is read through graphs.

    Off a GPU the stand-in takes the graphs' place, so that the same code runs.

    Raises
    ------
    Skip, UserError
        If the machine lacks a library or the model.
    """
    need_bitsandbytes(level)
    engine = (
        "auto" if stage.device.type == "cuda" else None
    )  # graphs are what is measured, whatever $SPECKV_ENGINE says
    if kind:
        assert folder is not None
        target, draft = save_family(kind, folder)
        pair = load_pair(level=level, device=str(stage.device), target=str(target), draft=str(draft), engine=engine)
    else:
        pair = load_pair(level=level, device=str(stage.device), engine=engine)
    drafter = pair.drafter
    if stage.device.type == "cpu" and isinstance(drafter, ModelDrafter):
        attach(pair.target)
        ids = None if drafter.head_ids is None else torch.tensor(drafter.head_ids)
        pair = replace(pair, drafter=ChunkedDrafter(drafter.model, drafter.vocab_size, ids))
    return pair


def record(pair: LoadedPair, length: int) -> int:
    """Record all graphs of a pair for texts of up to so many tokens; return how many there are."""
    graphs: Any = [pair.target.__dict__.get("_graphs"), getattr(pair.drafter, "graphs", None)]
    return sum(g.record(length) for g in graphs if g is not None)


def random_llama(stage: Stage, shape: str, level: str, layers: int = 0) -> LlamaForCausalLM:
    """Return a Llama of a usual shape with random weights at ``bf16`` or ``nf4``; ``layers`` may shorten it."""
    need_bitsandbytes(level)
    hidden, inner, all_layers, heads, groups, size = (TINY_SHAPES if stage.tiny else SHAPES)[shape]
    config = LlamaConfig(
        vocab_size=TINY_VOCABULARY if stage.tiny else VOCABULARY, hidden_size=hidden, intermediate_size=inner,
        num_hidden_layers=layers or all_layers, num_attention_heads=heads, num_key_value_heads=groups, head_dim=size,
        max_position_embeddings=POSITIONS, tie_word_embeddings=False, bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with stage.device:
            model = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    return model if level == "bf16" else _in_four_bits(model)


def _in_four_bits(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Replace the linear layers of a model, but its head, by bitsandbytes' 4-bit ones."""
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    for layer in model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, child in list(part.named_children()):
                if type(child) is not torch.nn.Linear:
                    continue
                device, weight = child.weight.device, child.weight.detach()
                new = Linear4bit(
                    child.in_features, child.out_features, bias=False, compute_dtype=weight.dtype, quant_type="nf4",
                    device="meta",
                )  # fmt: skip
                new.weight = Params4bit(weight, requires_grad=False, compress_statistics=False, quant_type="nf4")
                setattr(part, name, new.to(device))
    return model.eval()


def free() -> None:
    """Give the memory of models back that nobody has any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
