"""Tiny random models, which make tests of anything but their answers quick."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from speckv_online.drafters.model import ModelDrafter

EOS = 0


def loaded_after(code: str, *names: str) -> list[str]:
    """Return which of some modules a fresh Python has loaded after running ``code``."""
    code += f"\nimport sys; print(*(m for m in {names} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout.split()


def tiny_tokenizer(words: int = 0) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: <eos>, the 256 bytes, and ``words`` made-up extra tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<eos>", *alphabet, *(f"<extra{i}>" for i in range(words))])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def tiny_llama(
    seed: int = 0, layers: int = 3, vocab: int = 260, positions: int = 512, **options: object
) -> PreTrainedModel:
    """A random Llama with grouped-query attention, in fp32; its answers do not settle into one token."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=positions, eos_token_id=EOS, bos_token_id=None, pad_token_id=EOS,
        tie_word_embeddings=False, initializer_range=0.15, **options,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(3)  # random logits are nearly flat; real ones are not
    return model


def perturbed(model: PreTrainedModel, scale: float, seed: int = 1) -> PreTrainedModel:
    """A copy of a model with noise on its weights: a draft that is right some of the time."""
    import copy

    torch.manual_seed(seed)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(torch.randn_like(p) * scale * p.std())
    return other


@dataclass
class TinyPair:
    """Folders of a saved tiny target and draft, and the models themselves."""

    target_dir: Path
    draft_dir: Path
    target: PreTrainedModel
    draft: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast

    def drafter(self) -> ModelDrafter:
        return ModelDrafter(self.draft, self.target.config.vocab_size)
