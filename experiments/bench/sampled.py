"""Tokens per second where tokens are drawn: what sampling costs, and what speculation with and without lookups gains.

Four contenders decode every prompt, one after the other, in an order that rotates from prompt to prompt: plain greedy
decoding, plain sampled decoding, and the learned policy sampled, with and without lookups. A rate is tokens over the
seconds of whole calls, prompt included; a ratio is paired by prompt, with a 95 % interval over prompts. Outputs have
the same length, as nothing ends them. The policies know the costs of the level, and go on learning from prompt to
prompt; the first prompts warm all up and do not count.
"""

from __future__ import annotations

import json
import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from experiments.common.bundled_prompts import bundled
from experiments.config import launch, option
from policies.registry import make_policy
from speckv_online.decoding.decoder import SpeculativeDecoder
from speckv_online.errors import UserError
from speckv_online.io.manifest import cores
from speckv_online.io.prompts import choose
from speckv_online.modeling.engine import HELP as ENGINE
from speckv_online.modeling.engine import choose_engine
from speckv_online.modeling.sampling import Sampler
from speckv_online.models.pairs import chat_prompt, load_pair
from speckv_online.models.quiet import quiet_libraries
from speckv_online.profiling.calibration import calibrate
from speckv_online.stats import goodput, paired_ratio

GREEDY, PLAIN, LOOKUPS, ALONE = "plain greedy", "plain sampled", "policy", "policy without lookups"
#: What each ratio divides.
RATIOS = {
    "plain sampled over plain greedy": (PLAIN, GREEDY),
    "policy over plain sampled": (LOOKUPS, PLAIN),
    "policy without lookups over plain sampled": (ALONE, PLAIN),
    "lookups": (LOOKUPS, ALONE),
}


@dataclass(frozen=True)
class SampledConfig:
    """Settings of ``python -m experiments.bench.sampled``."""

    pair: str = option("smollm2", "named model pair, see `speckv models`")
    target: str | None = option(None, "target model: a Hugging Face id or a directory (with --draft)")
    draft: str | None = option(None, "draft model with the same tokenizer")
    levels: tuple[str, ...] = option(("fp16", "int8", "nf4"), "compression levels, comma separated")
    policy: str = option("online", "learned policy; it must take the option lookups")
    temperature: float = option(0.7, "temperature of the draws")
    top_k: int = option(0, "keep the k likeliest tokens; 0 keeps all")
    top_p: float = option(1.0, "keep the smallest set of likeliest tokens that holds this much probability")
    prompts: int = option(40, "how many of the bundled held-out prompts")
    warm_up: int = option(2, "prompts before them that do not count")
    max_new_tokens: int = option(64, "tokens to decode per prompt")
    threads: int = option(0, "CPU threads (0: all cores)")
    device: str = option("auto", "auto, cpu or cuda")
    engine: str | None = option(None, ENGINE)
    json: bool = option(False, "print JSON instead of a table")

    def __post_init__(self) -> None:
        object.__setattr__(self, "engine", choose_engine(self.engine))
        if self.prompts < 1 or self.max_new_tokens < 1 or self.warm_up < 1 or not 0 <= self.threads <= 1024:
            raise UserError("--prompts, --warm-up and --max-new-tokens must be at least 1, --threads from 0 to 1024")
        if not self.levels or self.temperature == 0:
            raise UserError("--levels must name at least one, and --temperature must be above 0")
        Sampler(self.temperature, self.top_k, self.top_p)  # which refuses what it cannot do
        for spec in self.policies().values():
            make_policy(spec)

    def policies(self) -> dict[str, str]:
        """Return each contender's policy."""
        off = f"{self.policy}{',' if ':' in self.policy else ':'}lookups=off"
        return {GREEDY: "autoregressive", PLAIN: "autoregressive", LOOKUPS: self.policy, ALONE: off}


def bench_level(config: SampledConfig, level: str) -> dict[str, Any]:
    """Run one level; seconds are wall clock."""
    pair = load_pair(
        config.pair, level=level, device=config.device, target=config.target, draft=config.draft, engine=config.engine
    )
    device = pair.target.device
    asked = choose(bundled("train"), config.warm_up, seed=0) + choose(bundled("test"), config.prompts, seed=0)
    prompts = [chat_prompt(pair.tokenizer, p.text) for p in asked]
    cost = calibrate(pair.target, pair.drafter, level, prompts[0])
    decoders = dict[str, SpeculativeDecoder]()
    for name, spec in config.policies().items():
        decoders[name] = SpeculativeDecoder(pair.drafter, policy=make_policy(spec), target=pair.target, level=level)
        decoders[name].policy.set_costs(level, cost)
    names, calls = list(decoders), defaultdict[str, list[tuple[int, float]]](list)
    accepted, drafted, looked_up = (dict.fromkeys(names, 0) for _ in range(3))
    for number, prompt in enumerate(prompts):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            sampler = None
            if name != GREEDY:
                sampler = Sampler(config.temperature, config.top_k, config.top_p, seed=number, device=device)
            out = decoders[name].generate(prompt, config.max_new_tokens, eos_ids=(), sampler=sampler)
            if number < config.warm_up:
                continue
            calls[name].append((len(out.tokens), out.seconds))
            accepted[name] += sum(s.accepted for s in out.steps)
            drafted[name] += sum(s.drafted for s in out.steps)
            looked_up[name] += sum(max(s.drafted - s.forwards, 0) for s in out.steps)
        print(f"{level}: prompt {number + 1}/{len(prompts)}", file=sys.stderr, flush=True)
    columns = {name: tuple(map(list, zip(*found, strict=True))) for name, found in calls.items()}
    ratios = {}
    for what, (mine, base) in RATIOS.items():
        found = paired_ratio(*columns[mine], *columns[base])
        # JSON has no NaN, which is what the interval over a single prompt is.
        low, high = (None, None) if math.isnan(found.low) else (found.low, found.high)
        ratios[what] = {"ratio": found.value, "low": low, "high": high}
    rates = {name: goodput(*columns[name]) for name in names}
    counts = {
        name: {"drafted": drafted[name], "accepted": accepted[name], "looked_up": looked_up[name]} for name in names
    }
    return {"level": level, "prompts": config.prompts, "tokens_per_second": rates, "ratios": ratios, "tokens": counts}


def geometric_means(results: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return each ratio's geometric mean over the levels."""
    return {what: float(np.exp(np.mean([np.log(r["ratios"][what]["ratio"]) for r in results]))) for what in RATIOS}


def show(config: SampledConfig, results: Sequence[dict[str, Any]]) -> str:
    """Format the measurements as tables."""
    lines = [f"temperature {config.temperature:g}: tokens/s of whole calls, measured side by side", ""]
    for r in results:
        lines.append(f"{r['level']:6} " + "  ".join(f"{n}: {v:.1f}" for n, v in r["tokens_per_second"].items()))
        c = r["tokens"][LOOKUPS]
        lines.append(f"       of {c['drafted']} drafted tokens {c['accepted']} accepted, {c['looked_up']} looked up")
        for what, x in r["ratios"].items():
            interval = "" if x["low"] is None else f" [{x['low']:.3f}, {x['high']:.3f}]"
            lines.append(f"       {what}: {x['ratio']:.3f}{interval}")
    means = geometric_means(results)
    lines += ["", "geometric mean over the levels", *(f"       {what}: {mean:.3f}" for what, mean in means.items())]
    return "\n".join(lines)


def bench(config: SampledConfig) -> int:
    """Run the benchmark and print it."""
    quiet_libraries()
    torch.set_num_threads(config.threads or cores())
    results = [bench_level(config, level) for level in config.levels]
    found = {"kind": "measured", "temperature": config.temperature, "levels": results, "mean": geometric_means(results)}
    print(json.dumps(found, indent=1) if config.json else show(config, results))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return launch(bench, SampledConfig, argv)


if __name__ == "__main__":
    sys.exit(main())
