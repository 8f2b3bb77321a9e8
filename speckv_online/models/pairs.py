"""Model pairs: where the weights come from, and how a target and its draft are loaded."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from speckv_online.console import say
from speckv_online.cpu_engine.gguf_layers import GgufEmbedding
from speckv_online.cpu_engine.start import start_engine
from speckv_online.drafters.base import Drafter
from speckv_online.drafters.model import ModelDrafter
from speckv_online.drafters.spec import parse_drafter
from speckv_online.errors import UserError
from speckv_online.gpu_engine.graphed_llama import attach
from speckv_online.modeling.engine import EngineStatus, choose_engine
from speckv_online.modeling.forward_backend import backend_of
from speckv_online.modeling.introspection import check_config, check_model
from speckv_online.models.gguf_file import GgufFile, is_gguf
from speckv_online.models.gguf_model import check_level, load_gguf, load_gguf_tokenizer, read_config
from speckv_online.models.kept_draft import load_default_draft
from speckv_online.models.kept_model import KEPT, give_back_memory, kept_model, own_weights
from speckv_online.models.levels import Level, get_level
from speckv_online.models.smollm2 import find_gguf, prepare_smollm2, smollm2_dir, smollm2_ready

DEFAULT_PAIR = "smollm2"


@dataclass
class LoadedPair:
    """A target at some level with its drafter.

    Attributes
    ----------
    target : PreTrainedModel
    drafter : Drafter
    tokenizer : PreTrainedTokenizerBase
    level : Level
    device : torch.device
    revision : dict
        Where each model came from, for reports.
    """

    target: PreTrainedModel
    drafter: Drafter
    tokenizer: PreTrainedTokenizerBase
    level: Level
    device: torch.device
    revision: dict[str, str]

    @property
    def engine(self) -> dict[str, EngineStatus]:
        """Whether the CPU engine runs the target, and the draft if that is a model."""
        found = {"target": backend_of(self.target).status}
        if isinstance(self.drafter, ModelDrafter):
            found["draft"] = self.drafter.backend.status
        return found


def pick_device(device: str = "auto") -> torch.device:
    """Return the device called ``device``; ``auto`` is CUDA where there is a GPU, else the CPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as e:
        raise UserError(f"unknown device {device!r}: use auto, cpu or cuda") from e
    if chosen.type not in ("cpu", "cuda"):
        raise UserError(f"the device {device!r} is not supported: use auto, cpu or cuda")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise UserError("no CUDA device was found: use --device cpu")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise UserError(f"there is no {device}: the devices are cuda:0 to cuda:{torch.cuda.device_count() - 1}")
    return chosen


def _is_news(record: logging.LogRecord) -> bool:
    """Return False for two expected log lines of bitsandbytes on a CPU; one comes with every layer and call."""
    return not str(record.msg).startswith(("MatMul8bitLt: inputs will be cast", "Failed to load CPU gemm_4bit_forward"))


def _quiet_bitsandbytes() -> None:
    for name in ("bitsandbytes.autograd._functions", "bitsandbytes.backends.cpu.ops"):
        logging.getLogger(name).addFilter(_is_news)  # the same filter is added only once


def _from_pretrained(kind: Any, source: str, **kwargs: Any) -> Any:
    """Call ``kind.from_pretrained`` and turn what a user can put right into one line."""
    if Path(source).expanduser().is_file():
        raise UserError(f"cannot load {source!r}: it is a file, give a GGUF file, a folder or a model id")
    if source.startswith(("/", ".", "~")) and not _is_folder(source):
        raise UserError(f"there is no model folder {source}: check --target and --draft")
    try:
        return kind.from_pretrained(str(Path(source).expanduser()) if source[:1] == "~" else source, **kwargs)
    except Exception as e:  # whatever transformers makes of a damaged folder, or of what this machine lacks
        reason = " ".join(str(e).split()) or type(e).__name__
        where = "" if _is_folder(source) else "it is no folder here, and as a model id: "
        raise UserError(f"cannot load {source!r}: {where}{reason[:300]}") from e


def _is_folder(source: str) -> bool:
    return Path(source).expanduser().is_dir()


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model id, folder or GGUF file."""
    if is_gguf(source):
        return load_gguf_tokenizer(GgufFile(source))
    return _from_pretrained(AutoTokenizer, source)


def load_target(
    source: str | Path, level: str | Level | None, device: str = "auto", engine: str | None = "off"
) -> PreTrainedModel:
    """Load a model at a compression level, in eval mode.

    Parameters
    ----------
    source : str or Path
        Folder, model id or GGUF file.
    level : str or Level, optional
        See :mod:`speckv_online.models.levels`. A GGUF file's own by default, else fp16.
    device : str
        ``auto``, ``cpu`` or ``cuda``.
    engine : str, optional
        ``off`` for plain transformers modules, ``auto`` to let the CPU engine run it; None as for :func:`load_pair`.
    """
    where, engine = pick_device(device), choose_engine(engine)
    return _load(source, *at_level(DEFAULT_PAIR, str(source), level), where, engine)


def _load(source: str | Path, level: Level, file: GgufFile | None, where: torch.device, engine: str) -> PreTrainedModel:
    """Do what :func:`load_target` does, with what :func:`at_level` found."""
    if file is not None:
        model = load_gguf(file, where, engine)
        start_engine(model, engine)
        return model
    if level.quantization is not None:
        _quiet_bitsandbytes()
    if (kept := kept_model(source, level, where, engine)) is None:
        model = _read(source, level, where)
        start_engine(model, engine)
        return model
    if (found := kept.load()) is not None:
        return found
    with KEPT.lock():
        if (found := kept.load()) is not None:  # another process has made it meanwhile
            return found
        model = _read(source, level, where)
        own, taken = own_weights(model)
        start_engine(model, engine)
        if not kept.keep(model, own, taken):
            return model
    del model, own
    give_back_memory()
    found = kept.load()
    if found is None:  # somebody has taken it away since
        start_engine(found := _read(source, level, where), engine)
    return found


def _read(source: str | Path, level: Level, where: torch.device) -> PreTrainedModel:
    """Load a model as transformers does."""
    arguments = level.load_arguments(where)
    model = _from_pretrained(AutoModelForCausalLM, str(source), use_safetensors=True, **arguments)
    if level.widen(where):
        model = model.float()
    if level.quantization is None:
        model = model.to(where)
    return model.eval()


def at_level(pair: str, target: str | None, level: str | Level | None) -> tuple[Level, GgufFile | None]:
    """Return the level of a target, and the GGUF file that it is in, if any.

    Raises
    ------
    UserError
        If there is no such level or file, or if the file is at another level.
    """
    asked = get_level(level) if isinstance(level, str) else level
    if target is not None and Path(target).expanduser() == smollm2_dir():
        pair, target = DEFAULT_PAIR, None
    if target is not None and is_gguf(target):
        file = GgufFile(target)
    elif asked is None or not asked.gguf:
        return asked or get_level("fp16"), None
    elif target is not None:
        raise UserError(f"only a GGUF file has the level {asked.name}, and {target} is none: give --target FILE.gguf")
    else:
        check_pair(pair)
        file = GgufFile(find_gguf())
    return get_level(check_level(file, None if asked is None else asked.name)), file


def check_pair(pair: str) -> None:
    """Raise :class:`UserError` unless there is such a named pair."""
    if pair != DEFAULT_PAIR:
        raise UserError(f"unknown model pair {pair!r}: choose {DEFAULT_PAIR}, or give --target and --draft")


def check_tokenizers(target: PreTrainedTokenizerBase, draft: PreTrainedTokenizerBase) -> None:
    """Raise :class:`UserError` unless both tokenizers give the same ids to the same tokens."""
    a, b = target.get_vocab(), draft.get_vocab()
    if a != b:
        different = sum(a.get(t) != i for t, i in b.items()) + sum(t not in b for t in a)
        raise UserError(
            f"target and draft have different tokenizers ({different} of {len(a)} tokens differ): "
            "use a draft of the target's own family"
        )


def prepare(pair: str, check: bool = False) -> Path:
    """Make the target of a named pair ready in the cache and return its folder; ``check`` compares checksums too."""
    check_pair(pair)
    return prepare_smollm2(check)


def list_pairs() -> list[dict[str, Any]]:
    """Describe the named pairs: name, what it is, whether it is cached, and where."""
    return [
        {
            "name": DEFAULT_PAIR,
            "summary": "SmolLM2-135M-Instruct with a 4-layer draft distilled from it",
            "cached": smollm2_ready(),
            "path": str(smollm2_dir()),
        }
    ]


def load_pair(
    pair: str = DEFAULT_PAIR,
    *,
    level: str | Level | None = None,
    device: str = "auto",
    target: str | None = None,
    draft: str | None = None,
    draft_level: str | None = None,
    drafter: str = "model",
    engine: str | None = None,
) -> LoadedPair:
    """Load a target at a level, and its draft. On a CPU the engine runs both where it can.

    Parameters
    ----------
    pair : str
        A named pair; not used where ``target`` and ``draft`` are given.
    level : str or Level, optional
        Compression level of the target: fp16 by default, of a GGUF file its own. A named pair's draft has its quick
        form where there is one, see :mod:`speckv_online.cpu_engine.int8_draft`.
    device : str
        ``auto``, ``cpu`` or ``cuda``.
    target, draft : str, optional
        Model ids, folders or GGUF files of any two models with one tokenizer; for ``drafter="ngram"`` the target alone.
    draft_level : str, optional
        Compression level of ``draft``; by default it is uncompressed. A target may be drafted by its own 4-bit self.
    drafter : str
        ``model``, ``ngram`` (no draft is loaded) or ``hybrid``, see :mod:`speckv_online.drafters.spec`.
    engine : str, optional
        ``auto``: the CPU engine where it works, on a GPU CUDA graphs for plain Llamas. ``off``: plain transformers
        modules. By default what ``$SPECKV_ENGINE`` says, else ``auto``.

    Raises
    ------
    UserError
        Unknown pair, level, drafter or engine, a model that cannot be loaded, two different tokenizers.
    """
    where, spec, engine = pick_device(device), parse_drafter(drafter), choose_engine(engine)
    spec.check_models(target, draft)
    level, file = at_level(pair, target, level)
    source = target or str(prepare(pair))
    for name in (source, draft):
        if name and not _is_folder(name) and name[0] not in "/.~" and not is_gguf(name):
            say(f"loading {name} from the Hugging Face hub, or its cache")  # a download may take long
    for role, name in (("target", target), ("draft", draft)):
        if name is not None:  # what cannot be decoded with is refused before anything large is read
            given = file if role == "target" else GgufFile(name) if is_gguf(name) else None
            config = _from_pretrained(AutoConfig, name) if given is None else read_config(given)
            check_config(config, role)
    tokenizer = load_tokenizer(source) if file is None or target is None else load_gguf_tokenizer(file)
    if draft is not None:
        check_tokenizers(tokenizer, load_tokenizer(draft))
    big = _load(source, level, file, where, engine)
    check_model(big, "target")
    graphs = where.type == "cuda" and engine != "off"
    if graphs:
        attach(big)
    small, head_ids, compiled = None, None, None
    if not spec.needs_model:
        draft_revision = spec.kind
    elif draft is not None:
        usual = None if is_gguf(draft) else "fp32" if where.type == "cpu" else "fp16"
        small = load_target(draft, draft_level or usual, device, engine)
        check_model(small, "draft")
        draft_revision = _revision(small, draft)
    else:
        own = big.get_input_embeddings()  # blocks of a file are read by the draft too
        shared = own if isinstance(own, GgufEmbedding) else None
        small, head_ids, digest, compiled = load_default_draft(Path(source), where, engine, shared)
        draft_revision = f"{pair}:sha256:{digest[:16]}"
        if compiled is not None:
            draft_revision += ":w8a8"
    made_of = Path(source) if file is None else file.path
    revision = {"target": _revision(big, target) if target else f"{pair}:{made_of.name}", "draft": draft_revision}
    vocabulary = int(big.config.get_text_config(decoder=True).vocab_size)
    return LoadedPair(big, spec.build(small, vocabulary, head_ids, compiled, graphs), tokenizer, level, where, revision)


def _revision(model: PreTrainedModel, source: str) -> str:
    commit = getattr(model.config, "_commit_hash", None)
    return f"{source}@{commit}" if commit else source


def chat_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the token ids of a user's message, in the model's chat format if it has one.

    Raises
    ------
    UserError
        If the chat template fails.
    """
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": text}]
        try:
            rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as e:  # a template is a program, and may raise anything
            reason = " ".join(str(e).split())[:200] or type(e).__name__
            raise UserError(f"the tokenizer's chat template fails on a user's message: {reason}") from e
        return list(tokenizer(rendered, add_special_tokens=False).input_ids)
    return list(tokenizer(text).input_ids)
