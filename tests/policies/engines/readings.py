"""Other engines' rules once more, each read from its formulas: plain lists and loops, nothing of the policies' code."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import ClassVar

import numpy as np


class VllmReading:
    """Adaptive verification of one request, vLLM 0.32."""

    def __init__(self, gamma: int) -> None:
        self.gamma, self.w, self.b = gamma, 0.5, [-0.2] * gamma
        self.graded: list[tuple[int, float, float, int]] = []  # position, log-odds, prediction, label
        self.steps = 0
        self.stale = [1.0] * gamma
        self.refits = self.dropped = 0

    def odds(self, confidence: float) -> float:
        if confidence <= 0.0:
            return -40.0
        if confidence >= 1.0:
            return 40.0
        return min(max(math.log(confidence / (1.0 - confidence)), -40.0), 40.0)

    def draft(self, confidences: list[float]) -> None:
        self.x = [self.odds(c) for c in confidences]
        self.p = [1.0 / (1.0 + math.exp(-(self.w * x + b))) for x, b in zip(self.x, self.b, strict=False)]

    def budget(self, draft_seconds: float, verify_seconds: list[float]) -> int:
        """Tokens to verify, by the confidences of the step before."""
        best, found = -1.0, 0
        for k in range(len(self.x) + 1):
            tokens = 1.0 + sum(math.prod(self.stale[: j + 1]) for j in range(k))
            rate = tokens / (draft_seconds + max(verify_seconds[: k + 1]))
            if rate > best:
                best, found = rate, k
        self.stale[: len(self.p)] = self.p
        return found

    def grade(self, submitted: int, accepted: int) -> None:
        for k in range(min(accepted + 1, submitted)):
            self.graded.append((k, self.x[k], self.p[k], int(k < accepted)))
        self.steps += 1
        if self.steps % 100 == 0:
            self.refit()

    def refit(self) -> None:
        """One Newton step by the whole matrix; then the biases anew, under the damped step of the slope."""
        size = self.gamma + 1
        hessian, gradient = 1e-3 * np.eye(size), np.zeros(size)
        for k, x, p, y in self.graded:
            row = np.zeros(size)
            row[0], row[k + 1] = x, 1.0
            hessian += p * (1.0 - p) * np.outer(row, row)
            gradient += (y - p) * row
        counts = [sum(k == i for k, *_ in self.graded) for i in range(self.gamma)]
        slope = float(np.linalg.solve(hessian, gradient)[0]) * len(self.graded) / (len(self.graded) + 50)
        self.refits += 1
        if self.w + slope < 0:
            slope, self.dropped = 0.0, self.dropped + 1
        self.w += slope
        for i, n in enumerate(counts):
            self.b[i] += (gradient[i + 1] - hessian[i + 1, 0] * slope) / hessian[i + 1, i + 1] * n / (n + 50)
        self.graded = []


class SgLangReading:
    """Adaptive steps of SGLang 0.5.23 with its default configuration."""

    CONFIG: ClassVar = {1: ([1, 3, 5, 7], -0.25), 8: ([0, 1, 3], 0.0), 32: ([0, 1], 0.0), 64: ([0], 0.0)}

    def __init__(self, start: int = 3) -> None:
        self.now = {b: start if start in tiers else tiers[len(tiers) // 2] for b, (tiers, _) in self.CONFIG.items()}
        self.ema = {b: float(now - 1) for b, now in self.now.items()}
        self.count: dict[int, int] = defaultdict(int)

    def key(self, size: int) -> int:
        return max([b for b in self.CONFIG if b <= size])

    def update(self, size: int, accepted: list[int]) -> None:
        b = self.key(size)
        tiers, down = self.CONFIG[b]
        now = self.now[b]
        if now > 0:
            self.ema[b] = 0.8 * self.ema[b] + 0.2 * float(np.mean(accepted))
        self.count[b] += 1
        if self.count[b] <= 10 or (self.count[b] - 10) % 5:
            return
        i, e = tiers.index(now), self.ema[b]
        if now == 0:
            if len(tiers) > 1:
                self.now[b] = tiers[i + 1]
                if e < 0:
                    self.ema[b] = tiers[i + 1] - 1.0
            return
        moved = i
        while moved > 0 and e <= (0.5 if tiers[moved - 1] == 0 else tiers[moved - 1] - 0.5) + down:
            moved -= 1
        while moved >= i and moved + 1 < len(tiers) and e > tiers[moved] - 0.5:
            moved += 1
        self.now[b] = tiers[moved]


class IkReading:
    """ik_llama.cpp's tuner for a draft model, drawing its chances from a numpy generator."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        grid = sorted([0.95 * i / 10 for i in range(11)] + [0.75])
        self.values = [list(range(1, 17)), grid, list(range(7))]
        self.user = [15, grid.index(0.75), 0]
        self.best = [0, 0, 0]
        self.rewards: list[dict[int, list[float]]] = [defaultdict(list) for _ in range(3)]
        self.ema, self.low, self.cooldown, self.resets = 0.0, 0, 0, 0

    def propose(self) -> tuple[int, float, int]:
        self.at = []
        for i in range(3):
            explore = self.rng.random() < 0.15
            self.at.append(int(self.rng.integers(len(self.values[i]))) if explore else self.best[i])
        n_max, p_min, n_min = (v[i] for v, i in zip(self.values, self.at, strict=True))
        return int(n_max), float(p_min), min(int(n_min), int(n_max))

    def feedback(self, accepted: int, seconds: float) -> None:
        tps = (accepted + 1) / seconds if seconds > 1e-4 else 0.0
        for i in range(3):
            self.rewards[i][self.at[i]].append(tps)
            means = {arm: float(np.mean(r)) for arm, r in self.rewards[i].items()}
            self.best[i] = min(arm for arm in means if means[arm] >= max(means.values()) * (1 - 1e-12))
        if self.cooldown > 0:
            self.cooldown -= 1
        elif self.ema > 0:
            self.low = self.low + 1 if tps < 0.7 * self.ema else 0
            if self.low >= 30:
                self.best, self.rewards = list(self.user), [defaultdict(list) for _ in range(3)]
                self.ema, self.low, self.cooldown = 0.0, 0, 50
                self.resets += 1
                return
        self.ema = tps if self.ema <= 0 else 0.05 * tps + 0.95 * self.ema


class OnnxReading:
    """ONNX Runtime GenAI's adaptive K and cooldown, of one sequence."""

    def __init__(self, least: int) -> None:
        self.least = self.k = least
        self.seen: dict[int, list[tuple[float, float, float]]] = defaultdict(list)
        self.origin: int | None = None
        self.probe = self.stable = self.wait = self.zeros = 0
        self.skip = False

    def mean(self, k: int) -> tuple[float, float]:
        """Throughput and acceptance of a K: the first round, then a quarter of each new one."""
        rows = np.array(self.seen[k])
        if not len(rows):
            return 0.0, 0.0
        weights = np.array(
            [0.75 ** (len(rows) - 1)] + [0.25 * 0.75 ** (len(rows) - 1 - i) for i in range(1, len(rows))]
        )
        tokens, ms, acceptance = weights @ rows
        return tokens / ms, acceptance

    def round(self, drafted: int, accepted: int, ms: float) -> None:
        if drafted == 0:
            return
        self.zeros = self.zeros + 1 if accepted == 0 and drafted == self.least else 0
        if self.zeros == 3:
            self.zeros, self.skip = 0, True
        if drafted != self.k:
            return
        self.seen[self.k].append((accepted + 1.0, ms, accepted / min(accepted + 1, drafted)))
        speed, acceptance = self.mean(self.k)
        if self.origin is not None:
            self.probe += 1
            before = self.mean(self.origin)[0]
            if before > 0 and speed < 0.8 * before:
                self.end(keep=False)
            elif self.probe >= 2:
                up = self.k > self.origin
                self.end(keep=(before <= 0 or speed >= 0.97 * before) and (not up or acceptance >= 0.75))
            return
        self.stable += 1
        if self.wait > 0:
            self.wait -= 1
        elif len(self.seen[self.k]) < 2:
            return
        elif acceptance < 0.5 and self.k > self.least:
            self.origin, self.k, self.probe, self.stable = self.k, self.k - 1, 0, 0
        elif acceptance >= 0.75 and self.k < 16 and self.stable >= 2:
            self.origin, self.k, self.probe, self.stable = self.k, self.k + 1, 0, 0

    def end(self, keep: bool) -> None:
        assert self.origin is not None
        self.k = self.k if keep else self.origin
        self.origin, self.probe, self.stable, self.wait = None, 0, 0, 1 if keep else 6
