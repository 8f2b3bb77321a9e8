"""Llamas for a CPU as the engine wants them, kept in the user's cache and mapped the next time.

A file has two parts: the model's own weights at its level, quantized or rounded, and the same laid out for the engine.
Decoding reads the second. The first is in memory only where somebody asks for it, and then it is the very model that
``from_pretrained`` gives.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from speckv_online.cpu_engine.kernels.int8_blocks import lanes
from speckv_online.cpu_engine.pack import laid_out
from speckv_online.cpu_engine.start import start_engine
from speckv_online.cpu_engine.verdicts import LARGE_BYTES, environment
from speckv_online.io.mapped_tensors import MappedFiles
from speckv_online.io.user_cache import key_of
from speckv_online.modeling.fingerprint import fingerprint, know_fingerprint
from speckv_online.models.levels import Level
from speckv_online.models.skeleton import without_weights

log = logging.getLogger(__name__)
KEPT = MappedFiles("weights", 2_000_000_000)
#: What these files hold; another number is another file.
FORMAT = "1"
_LEVELS = ("fp32", "fp16", "bf16", "int8", "nf4", "fp4")
_WEIGHTS, _OWN, _LAID = "model.safetensors", "own/", "laid/"


class KeptModel:
    """A model that may be kept.

    Parameters
    ----------
    source : Path
        Its folder.
    level : Level
    """

    def __init__(self, source: Path, level: Level) -> None:
        self.source, self.level = source, level
        self.key = key_of(FORMAT, str(source.resolve()), level.name, *stamps(source), *environment())

    def load(self) -> PreTrainedModel | None:
        """Return the model, run by the engine, with mapped weights; None if it is not kept."""
        if (found := KEPT.get(self.key)) is None:
            return None
        facts, tensors = found
        try:
            model = self._build(facts, tensors)
        except (AttributeError, ImportError, KeyError, OSError, RuntimeError, TypeError, ValueError) as e:
            log.warning("%s is loaded anew: %s: %s", self.source, type(e).__name__, " ".join(str(e).split())[:200])
            return None
        know_fingerprint(model, facts["fingerprint"])
        if any(type(m).__name__ == "Linear4bit" for m in model.modules()):
            model._fingerprint = facts["fingerprint"]
        start_engine(model, "auto", layouts_of(tensors))
        return model

    def keep(self, model: PreTrainedModel, own: dict[str, torch.Tensor], taken: str) -> bool:
        """Keep a model that the engine runs, with its own weights and fingerprint as they were before."""
        laid = laid_out(model)
        if not laid:
            return False
        shared, tensors = list[str](), dict[str, torch.Tensor]()
        with safe_open(self.source / _WEIGHTS, "pt") as file:
            there = set(file.keys())
            for name, tensor in own.items():
                if name in there and _same(file.get_tensor(name), tensor):
                    shared.append(name)
                else:
                    tensors[_OWN + name] = tensor
        # First all weights: those of layers with the same input are one matrix.
        for part in range(max(map(len, laid.values()))):
            tensors |= {f"{_LAID}{name}/{part}": parts[part] for name, parts in laid.items() if part < len(parts)}
        config = model.config.to_dict()
        config.pop("quantization_config", None)
        facts = {"config": config, "shared": shared, "fingerprint": taken, "mode": model.config._attn_implementation}
        return KEPT.put(self.key, facts, tensors)

    def _build(self, facts: Any, tensors: dict[str, torch.Tensor]) -> PreTrainedModel:
        """Return the model with its own weights, as ``from_pretrained`` does."""
        arguments = self.level.load_arguments(torch.device("cpu"))
        config, quantizer = LlamaConfig.from_dict(facts["config"]), None
        if self.level.quantization is not None:
            from transformers.quantizers.auto import AutoHfQuantizer

            config.quantization_config = arguments["quantization_config"]
            quantizer = AutoHfQuantizer.from_config(config.quantization_config, pre_quantized=False)
        config.name_or_path = str(self.source)
        with without_weights():
            model = LlamaForCausalLM(config)
            if quantizer is not None:
                quantizer.preprocess_model(model=model, dtype=torch.float32, device_map={"": "cpu"})
        own = {name.removeprefix(_OWN): t for name, t in tensors.items() if name.startswith(_OWN)}
        with safe_open(self.source / _WEIGHTS, "pt") as file:
            own |= {name: file.get_tensor(name) for name in facts["shared"]}
        fill(model, own)
        model.tie_weights()
        if any(p.device.type == "meta" for p in model.parameters()):
            raise ValueError("weights are missing")
        if quantizer is not None:
            model.hf_quantizer = quantizer
            quantizer.postprocess_model(model)
        for part in (*model.modules(), *model.parameters()):
            setattr(part, "_is_hf_initialized", True)  # noqa: B010 (else transformers may initialise them later)
        if (self.source / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(self.source)
        return model.eval()


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are equal; of rounded ones hardly anything is read."""
    return a.dtype == b.dtype and torch.equal(a[:1], b[:1]) and torch.equal(a, b)


def layouts_of(tensors: dict[str, torch.Tensor]) -> dict[str, list[torch.Tensor]]:
    """Return what was laid out, by the names of layers."""
    laid = dict[str, list[torch.Tensor]]()
    for name in [name for name in tensors if name.startswith(_LAID)]:
        laid.setdefault(name.split("/")[1], []).append(tensors[name])
    return laid


def stamps(path: Path) -> list[str]:
    """Return what tells a file, or a folder's models and settings, from others of the same names."""
    files = [path] if path.is_file() else sorted(f for f in path.iterdir() if f.suffix in (".json", ".safetensors"))
    found = [(f.name, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for f in files for s in (f.stat(),)]
    return [*map(str, found)]


def fill(model: PreTrainedModel, own: dict[str, torch.Tensor]) -> None:
    """Put weights in their places; those of bitsandbytes with what belongs to them."""
    for name, module in model.named_modules():
        mine, prefix = own.get(f"{name}.weight"), f"{name}.weight."
        if mine is None:
            continue
        if type(module).__name__ == "Linear4bit":
            from bitsandbytes.nn.modules import Params4bit

            stats = {key.removeprefix(prefix): t for key, t in own.items() if key.startswith(prefix)}
            module.weight = Params4bit.from_prequantized(mine, stats, device="cpu", module=module)
        elif type(module).__name__ == "Linear8bitLt":
            from bitsandbytes.nn.modules import Int8Params

            scales = own[f"{name}.SCB"]
            module.weight = Int8Params(mine, requires_grad=False, CB=mine, SCB=scales)
        else:
            module.weight = nn.Parameter(mine, requires_grad=module.weight.requires_grad)


def give_back_memory() -> None:
    """Let the system have what was freed."""
    with contextlib.suppress(AttributeError, OSError):  # of glibc alone
        ctypes.CDLL(None).malloc_trim(0)


def own_weights(model: PreTrainedModel) -> tuple[dict[str, torch.Tensor], str]:
    """Return a model's own weights, each once, and its fingerprint, before the engine has it."""
    seen, own = set[int](), dict[str, torch.Tensor]()
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, torch.Tensor) and not (tensor.numel() and tensor.data_ptr() in seen):
            seen.add(tensor.data_ptr())
            own[name] = tensor
    return own, fingerprint(model)


def kept_model(source: str | Path, level: Level, where: torch.device, engine: str) -> KeptModel | None:
    """Return what a model may be kept as; None for one that is not, by its kind, its size or its level."""
    folder = Path(source).expanduser()
    if where.type != "cpu" or engine == "off" or level.name not in _LEVELS or lanes() is None:
        return None
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        size = (folder / _WEIGHTS).stat().st_size
        if config["architectures"] != [LlamaForCausalLM.__name__] or "quantization_config" in config:
            return None
        return KeptModel(folder, level) if size >= LARGE_BYTES else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
