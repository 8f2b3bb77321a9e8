"""Training MLP16: six inputs, sixteen ReLU units, one output, the acceptance rate (arXiv 2605.02888).

The network is SpecKV's; what differs is the data. With ``causal`` features the four signals are the lagged ones, which
exist when gamma is chosen; with ``step-mean`` they are those of the very tokens whose number is being chosen, as in the
publication. Held out are whole prompts, never rows: the steps of one prompt are alike.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from policies.acceptance.mlp16 import HIDDEN, INPUTS, Mlp16, Weights, level_code
from policies.base import ARMS, Context, Decision
from speckv_online.context import summarise
from speckv_online.errors import UserError
from speckv_online.traces.trace import Trace
from speckv_online.training.schedules import Schedule, replay_untimed, schedule_gammas

GAMMAS = ARMS[1:]


@dataclass(frozen=True)
class Data:
    """Rows to train on.

    Attributes
    ----------
    x : ndarray, shape (N, 6)
        Mean entropy (bits), mean confidence, max entropy, min confidence, compression code, gamma.
    y : ndarray, shape (N,)
        Acceptance rate n/k, or min(a, gamma)/gamma for a gamma that was not played.
    prompt, level, task : ndarray of str, shape (N,)
    """

    x: np.ndarray
    y: np.ndarray
    prompt: np.ndarray
    level: np.ndarray
    task: np.ndarray

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, mask: np.ndarray) -> Data:
        return Data(self.x[mask], self.y[mask], self.prompt[mask], self.level[mask], self.task[mask])

    def sha256(self) -> str:
        """Return a hash of inputs and labels."""
        return hashlib.sha256(np.ascontiguousarray(np.c_[self.x, self.y]).tobytes()).hexdigest()


def data_from_traces(
    traces: Iterable[Trace], features: str = "causal", gammas: Sequence[int] = GAMMAS, seed: int = 0
) -> Data:
    """Make one row per gamma and step start, over replays of every trace under several schedules of gamma.

    A trace knows what each gamma would have had accepted at a step's start, so all of them are labelled there, evenly;
    those that the budget would have cut short are left out. The causal signals are what MLP16's policies read.
    """
    x: list[list[float]] = []
    y: list[float] = []
    names: list[tuple[str, str, str]] = []
    schedules = [_Reader(drawn, seed=seed + i) for i, drawn in enumerate(schedule_gammas().values())]
    for trace in traces:
        code = level_code(trace.level)
        for schedule in schedules:
            replay = replay_untimed(trace, schedule)
            for t, lagged in zip(replay.position.tolist(), schedule.read, strict=True):
                for gamma in gammas:
                    if gamma > min(trace.gamma, trace.budget - t - 1):
                        continue
                    signals = lagged
                    if features != "causal":
                        mean_h, max_h, mean_c, min_c = summarise(trace.signals[t, :gamma])
                        signals = [mean_h, mean_c, max_h, min_c]
                    x.append([*signals, code, gamma])
                    y.append(min(int(trace.accepted[t]), gamma) / gamma)
                    names.append((trace.prompt_id, trace.level, trace.task))
    return _data(x, y, names)


class _Reader(Schedule):
    """A schedule that notes the signals as MLP16's policies read them: lagged, and fading while nothing is drafted."""

    def begin(self, context: Context) -> None:
        super().begin(context)
        # Reading needs no weights, and remembers nothing of an earlier sequence.
        self.net = Mlp16(Weights(np.zeros((INPUTS, HIDDEN)), np.zeros(HIDDEN), np.zeros((HIDDEN, 1)), np.zeros(1)))
        self.read: list[list[float]] = []

    def decide(self, context: Context) -> Decision:
        self.read.append(self.net.read(context)[:4].tolist())
        return super().decide(context)


def _data(x: list[list[float]], y: list[float], names: list[tuple[str, str, str]]) -> Data:
    if not x:
        raise UserError("no step drafted anything, so there is nothing to train on: profile with gamma above 0")
    prompts, levels, tasks = map(np.array, zip(*names, strict=True))
    return Data(np.array(x, dtype=float), np.array(y, dtype=float), prompts, levels, tasks)


def split_by_prompt(prompt: np.ndarray, fraction: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return two masks over rows, training and held out, that share no prompt; ``prompt`` (N,) names each row's.

    Raises
    ------
    UserError
        If there are too few prompts to hold one out.
    """
    prompts = np.unique(prompt)
    if len(prompts) < 2:
        raise UserError("training needs at least two prompts, one of them to hold out: profile more prompts")
    count = min(max(1, round(fraction * len(prompts))), len(prompts) - 1)
    held = np.isin(prompt, np.random.default_rng(seed).permutation(prompts)[:count])
    return ~held, held


@dataclass(frozen=True)
class Fit:
    """A trained network and how it did.

    Attributes
    ----------
    weights : Weights
        In raw units: the scaling of the inputs is folded into W1 and b1. ``phi_cov`` is the mean of phi phi^T over all
        rows, with phi = [relu(x W1 + b1), 1].
    noise_var : float
        Variance of the residuals over all rows.
    metrics : dict
        Figures on the held-out prompts.
    runs : list of dict
        Seed, epochs and held-out error of every start.
    """

    weights: Weights
    noise_var: float
    metrics: dict[str, Any]
    runs: list[dict[str, Any]]

    def arrays(self, n_records: int) -> dict[str, np.ndarray]:
        """Return the arrays of a weight file."""
        w = self.weights
        assert w.phi_cov is not None
        extra = {"phi_cov": w.phi_cov, "n_records": np.array(n_records), "noise_var": np.array(self.noise_var)}
        return {"W1": w.W1, "b1": w.b1, "W2": w.W2, "b2": w.b2} | extra


def train_mlp16(
    data: Data,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    holdout: float = 0.25,
    split_seed: int = 0,
    epochs: int = 200,
    patience: int = 12,
    learning_rate: float = 3e-3,
    batch: int = 1024,
) -> Fit:
    """Train from several starts, stop each where the error on held-out prompts is least, and keep the best.

    Parameters
    ----------
    data : Data
    seeds : sequence of int
        Seeds of initial weights and batches.
    holdout : float
        Share of the prompts to hold out; they also decide when to stop.
    split_seed : int
        Seed of their choice.
    epochs, patience, learning_rate, batch
        Adam, at most ``epochs`` passes, stopped ``patience`` passes after the best.
    """
    train, held = split_by_prompt(data.prompt, holdout, split_seed)
    inside, outside = data[train], data[held]
    mean, scale = inside.x.mean(0), inside.x.std(0)
    scale[scale < 1e-8] = 1.0  # e.g. the level's code where there is one level only
    fits = [_train(inside, outside, mean, scale, seed, epochs, patience, learning_rate, batch) for seed in seeds]
    runs = [{"seed": s, "epochs": e, "held_out_mse": float(m)} for s, (_, e, m) in zip(seeds, fits, strict=True)]
    weights = min(fits, key=lambda fit: fit[2])[0]
    phi = np.c_[weights.hidden(data.x), np.ones(len(data))]
    full = Weights(weights.W1, weights.b1, weights.W2, weights.b2, phi.T @ phi / len(data))
    noise = float(np.mean((phi @ full.head - data.y) ** 2))
    return Fit(full, noise, evaluate(full, outside, inside), runs)


def _train(
    inside: Data,
    outside: Data,
    mean: np.ndarray,
    scale: np.ndarray,
    seed: int,
    epochs: int,
    patience: int,
    learning_rate: float,
    batch: int,
) -> tuple[Weights, int, float]:
    """One start: return weights in raw units, epochs to the best, and its held-out error with outputs clipped."""
    rng = torch.Generator().manual_seed(seed)
    x, x_out = (torch.from_numpy((d.x - mean) / scale).float() for d in (inside, outside))
    y, y_out = (torch.from_numpy(d.y).float()[:, None] for d in (inside, outside))
    # He's initialisation; the output starts at the mean rate.
    W1 = torch.randn((INPUTS, HIDDEN), generator=rng) * (2 / INPUTS) ** 0.5
    W2 = torch.randn((HIDDEN, 1), generator=rng) * (2 / HIDDEN) ** 0.5
    b1, b2 = torch.zeros(HIDDEN), y.mean().reshape(1)
    W1[torch.from_numpy(np.ptp(inside.x, axis=0) == 0)] = 0  # nothing is known of an input that never varied
    parameters = [p.requires_grad_() for p in (W1, b1, W2, b2)]
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    best, best_epoch, kept = float("inf"), 0, [p.detach().clone() for p in parameters]
    for epoch in range(1, epochs + 1):
        for rows in torch.randperm(len(x), generator=rng).split(batch):
            loss = torch.nn.functional.mse_loss(torch.relu(x[rows] @ W1 + b1) @ W2 + b2, y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            error = float(((torch.relu(x_out @ W1 + b1) @ W2 + b2).clamp(0, 1) - y_out).square().mean())
        if error < best:
            best, best_epoch, kept = error, epoch, [p.detach().clone() for p in parameters]
        elif epoch - best_epoch >= patience:
            break
    a1, c1, a2, c2 = (p.double().numpy() for p in kept)
    raw = a1 / scale[:, None]
    return Weights(raw, c1 - mean @ raw, a2, c2), best_epoch, best


def evaluate(weights: Weights, held_out: Data, reference: Data | None = None) -> dict[str, Any]:
    """Return mean squared error and correlation, in all, per level and per gamma.

    Parameters
    ----------
    weights : Weights
    held_out : Data
        Rows to score.
    reference : Data, optional
        Rows whose mean rate per level and gamma is scored as the baseline that uses no signals.
    """
    predicted = weights.predict(held_out.x)

    def score(mask: np.ndarray) -> dict[str, Any]:
        p, y = predicted[mask], held_out.y[mask]
        related = len(y) > 1 and p.std() > 0 and y.std() > 0
        correlation = float(np.corrcoef(p, y)[0, 1]) if related else None
        return {"rows": int(mask.sum()), "mse": float(np.mean((p - y) ** 2)), "correlation": correlation}

    gammas = held_out.x[:, -1]
    metrics = score(np.ones(len(held_out), dtype=bool)) | {"prompts": len(np.unique(held_out.prompt))}
    metrics["by_level"] = {str(level): score(held_out.level == level) for level in np.unique(held_out.level)}
    metrics["by_gamma"] = {str(int(gamma)): score(gammas == gamma) for gamma in np.unique(gammas)}
    if reference is not None:
        baseline = np.full(len(held_out), reference.y.mean())
        for level, gamma in {(str(a), float(b)) for a, b in zip(held_out.level, gammas, strict=True)}:
            same = (reference.level == level) & (reference.x[:, -1] == gamma)
            if same.any():
                baseline[(held_out.level == level) & (gammas == gamma)] = reference.y[same].mean()
        metrics["mse_of_mean_per_level_and_gamma"] = float(np.mean((baseline - held_out.y) ** 2))
    return metrics
