"""Check on real models that speculation changes no token: ``python -m experiments.lossless``.

Every policy decodes the same prompts at every level, and each answer is compared with plain greedy decoding, one token
a forward, by a second target of plain transformers modules without the CPU engine. At fp32 every token must be the
same. Below it, kernels may round differently for one token than for several, and the engine's differently from others.
There a token may differ only where the target's two best logits are closer than the level's epsilon
(:data:`EPSILON`), and the comparison goes on from that prefix. Exit code 1 if anything else differs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from time import monotonic
from typing import Any

import torch
from transformers import PreTrainedModel

from experiments.common.bundled_prompts import bundled
from experiments.config import launch, option
from policies.registry import make_policy
from speckv_online.console import say
from speckv_online.decoding.decoder import SpeculativeDecoder
from speckv_online.decoding.greedy_check import check_greedy
from speckv_online.errors import UserError
from speckv_online.io.prompts import Prompt, choose
from speckv_online.modeling.engine import HELP as ENGINE
from speckv_online.modeling.engine import choose_engine
from speckv_online.models.levels import get_level
from speckv_online.models.pairs import LoadedPair, chat_prompt, load_pair, load_target, prepare
from speckv_online.models.quiet import quiet_libraries

#: Largest gap in logits at which a differing token counts as a tie of rounding. fp16 and bf16 weights compute in fp32
#: on a CPU. LLM.int8 rounds activations to 8 bits and picks its outlier columns over all rows of a forward, so that one
#: token's result depends on its neighbours (by how much: docs/decoding.md). The 4-bit kernels for one row and for
#: several add up in another order. Inputs of a GGUF file's matrices have 8 bits, and the plain target has its weights
#: de-quantized and its inputs in fp32.
EPSILON = {"fp32": 0.0, "fp16": 1e-3, "bf16": 1e-3, "int8": 1.25, "nf4": 0.25, "fp4": 0.25}
EPSILON |= dict.fromkeys(("q4_0", "q4_1", "q8_0"), 0.5)


@dataclass(frozen=True)
class LosslessConfig:
    """Settings of ``python -m experiments.lossless``."""

    pair: str = option("smollm2", "named model pair, see `speckv models`")
    target: str | None = option(None, "target model: a Hugging Face id or a directory (with --draft)")
    draft: str | None = option(None, "draft model with the same tokenizer")
    levels: tuple[str, ...] = option(("fp32", "fp16", "int8", "nf4"), "compression levels of the target")
    policies: tuple[str, ...] = option(("fixed:1", "fixed:4", "fixed:8", "mlp16", "online"), "policies to check")
    prompts: int = option(20, "how many of the bundled held-out prompts")
    max_new_tokens: int = option(32, "tokens to decode per prompt")
    seed: int = option(0, "seed of the prompt choice and the policies")
    threads: int = option(0, "CPU threads (0: as torch chooses)")
    device: str = option("auto", "auto, cpu or cuda")
    engine: str | None = option(None, ENGINE)
    json: bool = option(False, "print JSON instead of text")

    def __post_init__(self) -> None:
        object.__setattr__(self, "engine", choose_engine(self.engine))
        if not self.levels or not self.policies:
            raise UserError("--levels and --policies must name at least one each")
        if min(self.prompts, self.max_new_tokens) < 1 or self.seed < 0 or not 0 <= self.threads <= 1024:
            raise UserError(
                "--prompts and --max-new-tokens must be at least 1, --seed not negative, --threads from 0 to 1024"
            )
        for level in self.levels:
            get_level(level)
        for spec in self.policies:  # before an hour of decoding: a typo should show at once
            make_policy(spec)


def check_level(
    config: LosslessConfig, level: str, prompts: list[Prompt], pair: LoadedPair, plain: PreTrainedModel
) -> list[dict[str, Any]]:
    """Check every policy at one level against a plain target; return a row per policy."""
    rows = []
    reference: dict[str, list[int]] = {}
    for spec in ("autoregressive", *config.policies):
        policy = make_policy(spec, seed=config.seed)
        decoder = SpeculativeDecoder(pair.drafter, policy=policy, target=pair.target, level=level)
        ties: list[float] = []
        tokens = differing = short = 0
        for prompt in prompts:
            ids = chat_prompt(pair.tokenizer, prompt.text)
            out = decoder.generate(ids, config.max_new_tokens, task=prompt.task)
            tokens += len(out.tokens)
            # An answer ends with its budget, an end of sequence or the model's context, and nowhere else.
            ended = bool(out.tokens) and out.tokens[-1] in decoder.eos_ids
            room = min(config.max_new_tokens, decoder.max_length - len(ids))
            short += not ended and len(out.tokens) < room
            # Equal to an answer that was found plain already: no need to run the model again.
            if reference.get(prompt.id) != out.tokens:
                check = check_greedy(plain, ids, out.tokens, decoder.eos_ids)
                ties += [gap for _, gap in check.ties]
                differing += not check.identical
                if check.identical:
                    reference.setdefault(prompt.id, out.tokens)
        largest = max(ties, default=0.0)
        rows.append(
            {
                "level": level, "policy": spec, "prompts": len(prompts), "tokens": tokens, "differing": differing,
                "ties": len(ties), "largest_gap": largest, "epsilon": EPSILON.get(level, 0.0),
                "engine": asdict(decoder.engine),
                "faults": sum(decoder.policy.faults.values()), "short": short,
                "ok": not short and (not ties or largest < EPSILON.get(level, 0.0)),
            }
        )  # fmt: skip
    return rows


def lossless(config: LosslessConfig) -> int:
    """Run the check and print it; return 1 if a token differs where it may not."""
    quiet_libraries()
    if config.threads:
        torch.set_num_threads(config.threads)
    started = monotonic()
    prompts = choose(bundled(), config.prompts, config.seed)
    rows: list[dict[str, Any]] = []
    for level in config.levels:
        pair = load_pair(
            config.pair, level=level, device=config.device, target=config.target, draft=config.draft,
            engine=config.engine,
        )  # fmt: skip
        plain = load_target(config.target or prepare(config.pair), level, config.device, engine="off")
        rows += check_level(config, level, prompts, pair, plain)
        say(f"[{monotonic() - started:6.1f} s] {level} done, CPU engine {pair.engine['target']}")
    if config.json:
        print(json.dumps({"rows": rows, "torch": torch.__version__, "threads": torch.get_num_threads()}))
    else:
        print(
            f"{'level':<6} {'policy':<15} {'prompts':>7} {'tokens':>7} {'ties':>5} {'largest gap':>12} {'allowed':>8}"
        )
        for r in rows:
            print(
                f"{r['level']:<6} {r['policy']:<15} {r['prompts']:>7} {r['tokens']:>7} {r['ties']:>5} "
                f"{r['largest_gap']:>12.5f} {r['epsilon']:>8.3f}  {'ok' if r['ok'] else 'DIFFERS'}"
            )
    return 0 if all(r["ok"] for r in rows) else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return launch(lossless, LosslessConfig, argv)


if __name__ == "__main__":
    sys.exit(main())
