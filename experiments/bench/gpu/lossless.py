"""Whether speculation changes a token on this device: greedy identity by level, and draws by a chi-square test."""

from __future__ import annotations

import tempfile
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch

from experiments.bench.gpu.models import FAMILIES, free, open_pair
from experiments.bench.gpu.settings import Stage
from experiments.common.bundled_prompts import bundled
from experiments.lossless import LosslessConfig, check_level
from speckv_online.decoding.decoder import SpeculativeDecoder
from speckv_online.io.prompts import choose
from speckv_online.modeling.sampling import Sampler
from speckv_online.models.pairs import DEFAULT_PAIR, load_target, prepare

LEVELS = ("fp32", "fp16", "int8", "nf4")
POLICIES = ("fixed:4", "fixed:8", "online")
#: Largest gap in logits at which another token counts as a tie of rounding on a GPU, where fp16 is fp16 throughout. A
#: guess from the types' precision, until one was measured.
ALLOWED = {"fp32": 1e-3, "fp16": 0.1, "int8": 1.25, "nf4": 0.25}
#: Draws whose distribution is tested, and the likeliest tokens that are drawn from.
DRAWS, TOP = 400, 8


def run(stage: Stage) -> None:
    """Check the tiny families and the default pair at all levels, the default pair first."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kinds = ["", *FAMILIES] if not stage.tiny else list(FAMILIES)
        for kind in kinds:
            for level in LEVELS:
                what = f"{kind or 'default pair'} at {level}"
                rows = stage.attempt(what, partial(greedy, stage, level, kind, folder))
                for row in rows or ():
                    stage.add("greedy", {"model": kind or "default", **row})
                free()
            if kind in ("", FAMILIES[0]):
                row = stage.attempt(f"draws of {kind or 'default pair'}", partial(sampled, stage, kind, folder))
                if row is not None:
                    stage.add("sampled", {"model": kind or "default", **row})


def greedy(stage: Stage, level: str, kind: str, folder: Path) -> list[dict[str, Any]]:
    """Return a row per policy: how many tokens differ from plain greedy decoding, and by how much."""
    pair = open_pair(stage, level, kind, folder)
    few = stage.tiny or kind
    config = LosslessConfig(policies=POLICIES, max_new_tokens=16 if few else 48)
    prompts = choose(bundled(), 2 if few else 6)
    source = folder / f"{kind}-target" if kind else prepare(DEFAULT_PAIR)
    plain = load_target(source, level, str(stage.device), engine="off")
    rows = check_level(config, level, prompts, pair, plain)
    for row in rows:
        row |= {"allowed": ALLOWED[level], "within": not row["short"] and row["largest_gap"] <= ALLOWED[level]}
    return rows


def sampled(stage: Stage, kind: str, folder: Path) -> dict[str, Any]:
    """Test the first two tokens that are said after a prompt against the target's own probabilities, at fp32.

    The second of them is drafted and judged. Only what follows the commonest first token is tested there.
    """
    pair = open_pair(stage, "fp32", kind, folder)
    decoder = SpeculativeDecoder(pair.drafter, policy="fixed:2", target=pair.target, level="fp32")
    prompt = pair.tokenizer("The best thing about").input_ids
    sampler = Sampler(top_k=TOP, seed=1, device=stage.device)
    said: list[list[int]] = []
    for _ in range(60 if stage.tiny else DRAWS):
        if stage.left() <= 0:
            break
        said.append(decoder.generate(prompt, 3, eos_ids=(), sampler=sampler).tokens)
    first = Counter(tokens[0] for tokens in said)
    likeliest = first.most_common(1)[0][0]
    second = Counter(tokens[1] for tokens in said if tokens[0] == likeliest)
    tests = {}
    for name, counts, context in (("first", first, prompt), ("second", second, [*prompt, likeliest])):
        with torch.inference_mode():
            logits = pair.target(input_ids=torch.tensor([context], device=stage.device)).logits[:, -1].float()
        top = logits[0].topk(TOP)
        p = top.values.double().softmax(-1).tolist()
        statistic, freedom, chance = chi_square([counts[int(t)] for t in top.indices], p)
        outside = sum(counts.values()) - sum(counts[int(t)] for t in top.indices)
        tests[name] = {
            "draws": sum(counts.values()), "statistic": statistic, "freedom": freedom, "p_value": chance,
            "outside": outside,
        }  # fmt: skip
    return {"draws": len(said), "accepted": decoder.totals.accepted, "drafted": decoder.totals.drafted, "tests": tests}


def chi_square(counts: list[int], p: list[float]) -> tuple[float, int, float]:
    """Return Pearson's statistic, its degrees of freedom and its p-value; cells of fewer than five are put together."""
    total = sum(counts)
    cells: list[list[float]] = [[0.0, 0.0]]
    for count, chance in sorted(zip(counts, p, strict=True), key=lambda cell: cell[1]):
        if cells[-1][1] >= 5.0:
            cells.append([0.0, 0.0])
        cells[-1][0] += count
        cells[-1][1] += total * chance
    if len(cells) > 1 and cells[-1][1] < 5.0:
        last = cells.pop()
        cells[-1] = [cells[-1][0] + last[0], cells[-1][1] + last[1]]
    statistic, freedom = sum((seen - due) ** 2 / due for seen, due in cells if due > 0), len(cells) - 1
    if not freedom:
        return statistic, 0, 1.0
    halves = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    return statistic, freedom, float(torch.special.gammaincc(halves[0], halves[1]))
