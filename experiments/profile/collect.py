"""Collecting the exact traces of one level: settings, resuming, and the work itself."""

from __future__ import annotations

import gc
import hashlib
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.common.bundled_prompts import bundled
from experiments.config import option
from speckv_online.console import say
from speckv_online.drafters.spec import HELP as DRAFTERS
from speckv_online.drafters.spec import parse_drafter
from speckv_online.errors import UserError
from speckv_online.io.prompts import Prompt, choose, read_prompts
from speckv_online.modeling.engine import HELP as ENGINE
from speckv_online.modeling.engine import choose_engine

if TYPE_CHECKING:
    from speckv_online.traces.trace import Trace


@dataclass(frozen=True)
class ProfileConfig:
    """Settings of ``python -m experiments.profile``."""

    pair: str = option("smollm2", "named model pair, see `speckv models`")
    target: str | None = option(None, "target model: a Hugging Face id or a directory (with --draft)")
    draft: str | None = option(None, "draft model with the same tokenizer: an id or a directory")
    draft_level: str = option("", "compression level of --draft (default: uncompressed)")
    drafter: str = option("model", DRAFTERS)
    levels: tuple[str, ...] = option(("fp16", "int8", "nf4"), "compression levels of the target, comma separated")
    prompts: str = option("24", "how many of the bundled prompts, or a JSONL file")
    split: str = option("train", "which split of the prompts: train, test or all")
    limit: int = option(0, "at most this many prompts of a file, tasks in turn (0: all)")
    max_new_tokens: int = option(64, "tokens to decode per prompt")
    gammas: tuple[str, ...] = option(
        ("0", "1", "2", "4", "8", "16"), "gammas drawn at random while decoding: what the cost table is fitted to"
    )
    reuse: str = option("", "directory of earlier traces: take the outputs of the same target from there, draft anew")
    seed: int = option(0, "seed of the prompt choice and of the schedules")
    threads: int = option(0, "CPU threads (0: all cores)")
    device: str = option("auto", "auto, cpu or cuda")
    engine: str | None = option(None, ENGINE)
    out: str = option("runs/profile", "directory of the traces")

    def __post_init__(self) -> None:
        object.__setattr__(self, "engine", choose_engine(self.engine))
        if self.split not in ("train", "test", "all"):
            raise UserError(f"--split must be train, test or all, got {self.split!r}")
        for name, least in (("max_new_tokens", 1), ("threads", 0), ("limit", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise UserError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(self, name)}")
        if self.threads > 1024:
            raise UserError(f"--threads must be at most 1024, got {self.threads}")
        parse_drafter(self.drafter).check_models(self.target, self.draft)
        if self.draft_level and self.draft is None:
            raise UserError("--draft-level is that of --draft: give --target and --draft too, or leave it out")
        if not self.levels:
            raise UserError("--levels is empty: name at least one")
        if not self.gammas or not all(g.isdecimal() and int(g) <= 16 for g in self.gammas):
            raise UserError(f"--gammas must be whole numbers from 0 to 16, got {','.join(self.gammas)}")
        if self.reuse and not Path(self.reuse).expanduser().is_dir():
            raise UserError(f"--reuse {self.reuse}: there is no such directory")


def select_prompts(config: ProfileConfig) -> list[Prompt]:
    """Return the prompts of a config, those of its split only where the file names splits."""
    counted = config.prompts.isdecimal()
    if counted:
        splits = ("train", "test") if config.split == "all" else (config.split,)
        prompts = [p for split in splits for p in bundled(split)]
    else:
        prompts = read_prompts(config.prompts)
        if config.split != "all":
            prompts = [p for p in prompts if p.split in ("", config.split)]
        if not prompts:
            raise UserError(f"{config.prompts} holds no prompts of the split {config.split!r}: give --split all")
    limit = int(config.prompts) if counted else config.limit or len(prompts)
    return choose(prompts, limit, config.seed)


def request(config: ProfileConfig) -> dict[str, Any]:
    """Return what all traces of a directory have in common, as their heads say it."""
    found: dict[str, Any] = {name: getattr(config, name) for name in ("draft_level", "drafter", "max_new_tokens")}
    for role in ("target", "draft"):
        model = getattr(config, role)
        # Of a folder its name: traces are shared, and where it lies is nobody's business.
        found[role] = Path(model).resolve().name if model and Path(model).is_dir() else model
    return found | {"pair": config.pair if config.target is None and config.draft is None else ""}


def check_request(wanted: dict[str, Any], out: Path) -> None:
    """Refuse a directory with traces of other models, drafters or budgets, whether or not any are missing."""
    for folder, meta in collected(out):
        theirs = {"max_new_tokens": meta.get("max_new_tokens")} | meta.get("request", {})
        for name, value in theirs.items():
            if value != wanted.get(name, value):
                said = f"{name} {value!r}, not {wanted.get(name)!r}"
                raise UserError(f"{folder} holds traces collected with {said}: give another --out")


def collected(out: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield each level's folder with what one of its traces says of where it comes from."""
    from speckv_online.traces.trace import Trace

    for folder in sorted({path.parent for path in out.glob("*/*.npz")}):
        yield folder, Trace.load(min(folder.glob("*.npz"))).meta


def timed_units(out: Path) -> int:
    """Return how many prompts were decoded on the clock: they only ever grow."""
    from speckv_online.io.run_directory import read_units

    return len(read_units(out)) if any(out.glob("steps-*.jsonl")) else 0


def trace_path(out: Path, level: str, prompt_id: str) -> Path:
    """Return a trace's file; ids that are no plain file name get one that stays unique."""
    name = re.sub(r"[^\w.-]+", "_", prompt_id).lstrip(".")
    if name != prompt_id:
        name += "-" + hashlib.sha256(prompt_id.encode()).hexdigest()[:6]
    return out / level / f"{name}.npz"


def collect_level(config: ProfileConfig, level: str, prompts: list[Prompt], out: Path) -> None:
    """Collect the traces of one level that are not there yet."""
    from tqdm import tqdm

    missing = [p for p in prompts if not trace_path(out, level, p.id).exists()]
    say(f"{level}: {len(prompts) - len(missing)} of {len(prompts)} traces are there")
    if not missing:
        return

    import torch

    from speckv_online.drafters.fingerprint import drafter_fingerprint
    from speckv_online.io.manifest import cores, software
    from speckv_online.io.run_directory import StepWriter, Unit
    from speckv_online.modeling.fingerprint import fingerprint
    from speckv_online.models.pairs import chat_prompt, load_pair
    from speckv_online.models.quiet import quiet_libraries
    from speckv_online.profiling.trace_collection import collect_trace, redraft
    from speckv_online.training.schedules import Schedule

    quiet_libraries()
    torch.set_num_threads(config.threads or cores())
    pair = load_pair(
        config.pair,
        level=level,
        device=config.device,
        target=config.target,
        draft=config.draft,
        draft_level=config.draft_level or None,
        drafter=config.drafter,
        engine=config.engine,
    )
    meta: dict[str, Any] = {
        "target": pair.revision["target"],
        "draft": pair.revision["draft"],
        "target_fingerprint": fingerprint(pair.target),
        "draft_fingerprint": drafter_fingerprint(pair.drafter),
        "max_new_tokens": config.max_new_tokens,
        "request": request(config),
        "arithmetic": pair.level.arithmetic(pair.device),
        "engine": {role: str(status) for role, status in pair.engine.items()},
        "software": software(),
    }
    check_same(out / level, meta)
    room = getattr(pair.target.config.get_text_config(decoder=True), "max_position_embeddings", sys.maxsize)
    for prompt in missing:  # before anything is decoded
        if (length := len(chat_prompt(pair.tokenizer, prompt.text))) > room:
            raise UserError(f"prompt {prompt.id} has {length} tokens, the target holds only {room}: shorten it")
    writer = StepWriter(out / f"steps-{level}.jsonl")
    gammas = [int(g) for g in config.gammas]
    warm = False
    bar = tqdm(missing, desc=level, unit="trace", disable=not sys.stderr.isatty(), file=sys.stderr)
    for number, prompt in enumerate(bar, start=1):
        ids = chat_prompt(pair.tokenizer, prompt.text)
        about: dict[str, Any] = {"task": prompt.task, "prompt_id": prompt.id, "split": prompt.split}
        earlier = find_output(config, level, prompt.id, ids, meta)
        if earlier is not None:
            trace = redraft(pair.drafter, earlier, **about, meta=meta)
            said = "output reused"
        else:
            if not warm:  # the first steps of a process warm caches up: they are no data
                collect_trace(pair.target, pair.drafter, ids, 8, level=level, policy=Schedule(gammas))
                warm = True
            policy = Schedule(gammas, seed=config.seed + number)
            trace, steps = collect_trace(
                pair.target, pair.drafter, ids, config.max_new_tokens, level=level, policy=policy, **about, meta=meta
            )
            writer.write(Unit(level, "profile", prompt.id, prompt.task, config.seed), steps)
            said = f"{len(trace) / sum(s.seconds for s in steps):.1f} tokens/s"
        trace.save(trace_path(out, level, prompt.id))
        if bar.disable:
            where = f"{level} {number}/{len(missing)} {prompt.id}"
            say(f"{where}: {len(trace)} tokens, {said}")
    writer.close()
    del pair
    gc.collect()  # the next level's target must not have to fit beside this one


def find_output(
    config: ProfileConfig, level: str, prompt_id: str, ids: Sequence[int], meta: dict[str, Any]
) -> Trace | None:
    """Return an earlier trace of the same target, prompt and budget to take the output from, if there is one."""
    from speckv_online.traces.trace import Trace, prompt_hash

    path = trace_path(Path(config.reuse).expanduser(), level, prompt_id) if config.reuse else None
    if path is None or not path.exists():
        return None
    trace = Trace.load(path)
    wanted = {key: meta[key] for key in ("target_fingerprint", "max_new_tokens")} | {"prompt_sha256": prompt_hash(ids)}
    return trace if all(trace.meta.get(key) == value for key, value in wanted.items()) else None


def check_same(folder: Path, meta: dict[str, Any]) -> None:
    """Refuse to mix traces of models with other weights into a directory; another level's have another target."""
    for other, theirs in collected(folder.parent):
        for key in ("draft_fingerprint", "target_fingerprint") if other == folder else ("draft_fingerprint",):
            if key in meta and theirs.get(key) != meta[key]:
                raise UserError(f"{other} holds traces with another {key} ({theirs.get(key)}): give another --out")
