"""What the turns say: rates, ratios with intervals over prompts, forwards, agreement."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from experiments.bench.llamacpp.turns import PEER, PLAIN
from speckv_online.stats import Estimate, goodput, paired_ratio

Columns = tuple[list[int], list[float]]


def summarise(key: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is known of a plan, by the key of it."""
    groups = dict[str, list[Any]]()
    for name, calls in found.items():
        if name.startswith(f"{key}/") and "/prompt " in name:
            groups.setdefault(name.rpartition("/")[0], []).append(calls)
    turns = list(groups.values())[-1] if groups else []  # the latest settings
    others = [turn["others"] for turn in turns if turn["others"] is not None]
    turns = [turn["found"] for turn in turns]
    out: dict[str, Any] = {"of": key, "prompts": len(turns), "llama.cpp": found.get(f"{key}/chosen")}
    out["others"] = max(others, default=None)
    out["memory"] = found.get(f"{key}/memory")
    if widths := found.get(f"{key}/forwards"):
        out["forwards"] = {name: {w: median(s) for w, s in by.items() if s} for name, by in widths["found"].items()}
    if not turns:
        return out
    names = dict.fromkeys((call["name"], call["mode"]) for call in turns[0])
    calls = {name: [next(c for c in t if (c["name"], c["mode"]) == name) for t in turns] for name in names}
    decoded = {name: _columns(c, "decoded", "seconds") for name, c in calls.items()}
    prompts = {name[0]: _columns(c, "prompt", "prompt_seconds") for name, c in calls.items() if name[1] == PLAIN}
    out["tokens_per_second"] = {" ".join(name): goodput(*c) for name, c in decoded.items()}
    out["prompt_tokens_per_second"] = {name: goodput(*c) for name, c in prompts.items()}
    usual = [name for name in decoded if name[0] == PEER and not name[1].startswith("perfect")]
    best = max(usual, key=lambda name: goodput(*decoded[name]))
    out["best_mode"] = best[1]
    out["ratios"] = {}
    for name, mode in names:
        if name != PEER:
            base = (PEER, PLAIN) if mode == PLAIN or mode.startswith("perfect") else best
            out["ratios"][f"{name} {mode}"] = _plain(paired_ratio(*decoded[name, mode], *decoded[base]))
            if mode == PLAIN:
                out["ratios"][f"{name} prompt"] = _plain(paired_ratio(*prompts[name], *prompts[PEER]))
    theirs = calls[PEER, PLAIN]
    out["agreement"] = {
        name: sum(map(_same, calls[name, PLAIN], theirs)) / sum(len(c["tokens"]) for c in theirs)
        for name in prompts if name != PEER
    }  # fmt: skip
    out["differing"] = {
        name: sum(a["tokens"] != b["tokens"] for (n, m) in names if n == name
                  for a, b in zip(calls[n, m], calls[n, PLAIN], strict=True))
        for name in prompts
    }  # fmt: skip
    return out


def _columns(calls: Sequence[dict[str, Any]], count: str, seconds: str) -> Columns:
    return [call[count] for call in calls], [call[seconds] for call in calls]


def _same(a: dict[str, Any], b: dict[str, Any]) -> int:
    """Return how many tokens two outputs share before the first that differs."""
    pairs = list(zip(a["tokens"], b["tokens"], strict=True))
    return next((i for i, (x, y) in enumerate(pairs) if x != y), len(pairs))


def _plain(ratio: Estimate) -> dict[str, float | None]:
    low, high = (None, None) if math.isnan(ratio.low) else (ratio.low, ratio.high)  # JSON has no NaN
    return {"ratio": ratio.value, "low": low, "high": high}


def show(rows: Sequence[dict[str, Any]]) -> str:
    """Format the measurements."""
    lines = ["decoding after the first forward, in turns by prompt; ratios [95 % over prompts]; measured"]
    for row in rows:
        quiet = "" if row["others"] is None else f", others took at most {row['others']:.2f} cores"
        lines += ["", f"{row['of']}: {row['prompts']} prompts{quiet}"]
        if chosen := row["llama.cpp"]:
            flash = "on" if chosen["flash"] else "off"
            lines.append(f"  llama.cpp: threads {chosen['threads']}, flash attention {flash}; {chosen['compiled for']}")
        for name, rate in row.get("tokens_per_second", {}).items():
            versus = row["ratios"].get(name)
            mode = name.rpartition(" ")[2]
            base = PLAIN if mode == PLAIN or mode.startswith("perfect") else row["best_mode"]
            lines.append(
                f"  {name:28} {rate:8.1f} tokens/s" + (f"  {_text(versus)} of {PEER} {base}" if versus else "")
            )
        for name, rate in row.get("prompt_tokens_per_second", {}).items():
            versus = row["ratios"].get(f"{name} prompt")
            lines.append(
                f"  {name + ' reads prompts':28} {rate:8.1f} tokens/s" + (f"  {_text(versus)}" if versus else "")
            )
        for name, share in row.get("agreement", {}).items():
            lines.append(f"  {name}: {share:.0%} of tokens come before its first difference from {PEER}; "
                         f"outputs of its modes that differ from plain: {row['differing'][name]}")  # fmt: skip
        for name, by in row.get("forwards", {}).items():
            texts = [f"T({w}) {1e3 * s:.1f} ms ({s / by['1']:.2f})" for w, s in by.items()]
            lines.append(f"  {name:28} {', '.join(texts)}")
        for name, facts in (row["memory"] or {}).items():
            parts = [f"{what.replace('_', ' ')} {_size(what, value)}" for what, value in facts.items()]
            lines.append(f"  {name:28} {', '.join(parts)}")
    return "\n".join(lines)


def _size(what: str, value: float) -> str:
    return f"{value:.2f} s" if what.endswith("seconds") else f"{value / 1e9:.2f} GB"


def _text(ratio: Mapping[str, float | None]) -> str:
    interval = "" if ratio["low"] is None else f" [{ratio['low']:.2f}, {ratio['high']:.2f}]"
    return f"{ratio['ratio']:.2f}{interval}"
