"""llama.cpp and this decoder on the same GGUF files, in turns by prompt: decoding, prompts, forwards, start, memory.

llama.cpp gets the better of one and all threads, and of its two kinds of attention, and the best of its own modes. The
extra ``[peers]`` installs it. With ``--out`` and ``--seconds`` a run stops after so long, and the next one goes on.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.bench.company import company
from experiments.bench.llamacpp.files import FORMATS, SHAPES, library, made, target_file, write_draft
from experiments.bench.llamacpp.peer import MISSING
from experiments.bench.llamacpp.summary import show, summarise
from experiments.bench.llamacpp.turns import PEER, PLAIN, ROUNDS, Kept, OutOfTime, Plan, measure, say
from experiments.bench.llamacpp.worker import Worker
from experiments.common.bundled_prompts import bundled
from experiments.config import launch, option
from policies.registry import make_policy
from speckv_online.errors import UserError
from speckv_online.io.manifest import cores
from speckv_online.io.prompts import choose
from speckv_online.io.user_cache import cache_dir
from speckv_online.models.pairs import DEFAULT_PAIR, chat_prompt, load_tokenizer, prepare

#: The mission's level that is measured beside a format's file.
LEVELS = {"f16": "fp16", "q8_0": "int8", "q4_1": "nf4"}
#: Tokens of a random model's prompts.
RANDOM_PROMPT = 64


@dataclass(frozen=True)
class LlamaCppConfig:
    """Settings of ``python -m experiments.bench.llamacpp``."""

    shape: str = option(DEFAULT_PAIR, f"target: {DEFAULT_PAIR}, or random weights of the shape {', '.join(SHAPES)}")
    formats: tuple[str, ...] = option(FORMATS, "types of the target's file, comma separated")
    levels: bool = option(True, "also measure fp16, int8 and nf4 of the default target, beside F16, Q8_0 and Q4_1")
    modes: tuple[str, ...] = option(
        ("plain", "lookup:2", "lookup:4", "draft:1", "draft:4:0.75"),
        "llama.cpp's: plain, lookup:LENGTH, draft:LENGTH, draft:LENGTH:LEAST-PROBABILITY, perfect:LENGTH",
    )
    policies: tuple[str, ...] = option(("online",), "policies beside plain decoding; a random model has fixed:4 alone")
    prompts: int = option(12, "how many of the bundled held-out prompts")
    max_new_tokens: int = option(64, "tokens to decode per prompt")
    busy: int = option(0, "busy processes meanwhile")
    threads: int = option(0, "most CPU threads (0: all cores)")
    runs: int = option(3, "starts of each, for seconds and memory")
    files: str | None = option(None, "folder of the files that are made; default: peers in the cache directory")
    out: str | None = option(None, "JSON-lines file of what is measured: a run goes on with what it holds")
    seconds: float = option(0.0, "stop after so many seconds with what there is (0: when all is measured)")
    json: bool = option(False, "print JSON instead of text")

    def __post_init__(self) -> None:
        if self.shape not in (DEFAULT_PAIR, *SHAPES):
            raise UserError(f"unknown shape {self.shape!r}: choose {', '.join((DEFAULT_PAIR, *SHAPES))}")
        if unknown := [name for name in self.formats if name not in FORMATS]:
            raise UserError(f"unknown format {unknown[0]!r}: choose from {', '.join(FORMATS)}")
        if not self.formats or min(self.prompts, self.runs) < 1 or self.max_new_tokens < 2:
            raise UserError("--formats must name one, --prompts and --runs be at least 1, --max-new-tokens at least 2")
        if not 0 <= self.busy <= 1024 or not 0 <= self.threads <= 1024 or not 0.0 <= self.seconds < 1e6:
            raise UserError("--busy and --threads must be from 0 to 1024, --seconds not below 0")
        for mode in self.modes:
            check_mode(mode)
        for policy in self.policies:
            make_policy(policy)
        if PLAIN not in self.modes:
            raise UserError("--modes must hold plain: it is what others are compared with")

    @property
    def folder(self) -> Path:
        """Where files are made."""
        return Path(self.files).expanduser() if self.files else cache_dir() / "peers"


def check_mode(mode: str) -> None:
    """Raise :class:`UserError` unless llama.cpp's side has this mode."""
    kind, *numbers = mode.split(":")
    most = {PLAIN: 0, "lookup": 1, "draft": 2, "perfect": 1}.get(kind, -1)
    try:
        length, least = int(numbers[0]) if numbers else 0, float(numbers[1]) if len(numbers) > 1 else 0.0
    except ValueError:
        length = -1
    if not bool(most) == bool(numbers) or len(numbers) > most or not (bool(most) <= length <= 64 and 0 <= least <= 1):
        raise UserError(f"{mode!r} is no mode of llama.cpp here: give plain, lookup:4, draft:4 or draft:4:0.75")


def plan_of(config: LlamaCppConfig, kind: str) -> Plan:
    """Return what a format is measured with; files are written."""
    own = config.shape == DEFAULT_PAIR
    prompts, modes, draft = random_prompts(config), [PLAIN, "perfect:4"], None
    policies: tuple[str, ...] = ("perfect:4",)
    if own:
        tokenizer, asked = load_tokenizer(str(prepare(DEFAULT_PAIR))), choose(bundled("train"), 1, seed=0)
        asked = [*asked, *choose(bundled("test"), config.prompts, seed=0)]
        prompts = [chat_prompt(tokenizer, prompt.text) for prompt in asked]
        policies, modes = config.policies, list(config.modes)
    file = target_file(kind, config.folder, config.shape)
    if own and any(mode.startswith("draft") for mode in modes):
        draft = made(config.folder / "draft-q8_0.gguf", write_draft)
    ours: dict[str, dict[str, Any]] = {kind: {"file": str(file), "level": None, "draft": own}}
    if own and config.levels:
        ours[LEVELS[kind]] = {"file": None, "level": LEVELS[kind], "draft": True}
    key = f"{config.shape} {kind} beside {config.busy} busy"
    most, rounds = config.threads or cores(), ROUNDS if own else 1
    return Plan(key, file, draft, ours, prompts, config.max_new_tokens, modes, policies, most, config.busy, rounds)


def random_prompts(config: LlamaCppConfig) -> list[list[int]]:
    """Return prompts of random tokens."""
    if config.shape == DEFAULT_PAIR:
        return []
    size = (config.prompts + 1, RANDOM_PROMPT)
    found: list[list[int]] = np.random.default_rng(0).integers(0, SHAPES[config.shape].vocabulary, size).tolist()
    return found


def starts(plan: Plan, runs: int, chosen: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return seconds to the first token and bytes in memory after a text, medians over processes of their own."""
    peer = {"file": str(plan.file), "draft": None, "length": plan.context}
    made_with = {PEER: ("peer", peer | {what: chosen[what] for what in ("threads", "flash")})}
    made_with |= {name: ("ours", settings | {"threads": plan.threads}) for name, settings in plan.ours.items()}
    found = {name: list[dict[str, float]]() for name in made_with}
    for number in range(runs + 1):  # the first makes what later ones map
        for name, (module, settings) in made_with.items():
            worker = Worker(module, **settings)
            try:
                first = worker.ask("generate", prompt=plan.prompts[0], tokens=1, mode=PLAIN)
                seconds = worker.start_seconds + first["prompt_seconds"]
                worker.ask("generate", prompt=plan.prompts[0], tokens=plan.tokens, mode=PLAIN)
                if number:
                    found[name].append({"first_token_seconds": seconds, **worker.memory()})
            finally:
                worker.close()
    rows = {name: {what: float(np.median([r[what] for r in all_])) for what in all_[0]} for name, all_ in found.items()}
    return {"file": {"size": float(plan.file.stat().st_size)}, **rows}


def bench(config: LlamaCppConfig) -> int:
    """Run the benchmark and print it; what there is, if it is interrupted."""
    if importlib.util.find_spec("llama_cpp") is None:
        raise UserError(MISSING)
    library()
    kept = Kept(Path(config.out).expanduser() if config.out else None, config.seconds)
    keys = [f"{config.shape} {kind} beside {config.busy} busy" for kind in config.formats]
    code = 0
    try:
        for kind in config.formats:
            plan = plan_of(config, kind)
            with company(config.busy):
                measure(plan, kept)
                if not config.busy and kept.need(f"{plan.key}/memory"):
                    kept.put(f"{plan.key}/memory", starts(plan, config.runs, kept.found[f"{plan.key}/chosen"]))
    except OutOfTime:
        say("out of time: this is what there is")
    except KeyboardInterrupt:
        say("interrupted: this is what there is")
        code = 130
    rows = [summarise(key, kept.found) for key in keys if any(name.startswith(f"{key}/") for name in kept.found)]
    print(json.dumps({"kind": "measured", "rows": rows}, indent=1) if config.json else show(rows))
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return launch(bench, LlamaCppConfig, argv)


if __name__ == "__main__":
    sys.exit(main())
