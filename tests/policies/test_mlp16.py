"""MLP16: weight files, the numpy forward pass, and the frozen policy."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from policies.acceptance.mlp16 import Mlp16, Weights, level_code, load_weights
from policies.base import ARMS, Context, PolicyError
from policies.costs.cost_model import CostPrior
from policies.registry import make_policy
from tests.support.tapes import make_tapes, play, trained


@pytest.fixture
def weights() -> Weights:
    rng = np.random.default_rng(0)
    return Weights(rng.normal(size=(6, 16)), rng.normal(size=16), rng.normal(size=(16, 1)) * 0.1, np.array([0.3]))


@pytest.fixture
def arrays(weights: Weights) -> dict[str, np.ndarray]:
    return {"W1": weights.W1, "b1": weights.b1, "W2": weights.W2, "b2": weights.b2}


def test_round_trip(arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    full = arrays | {"phi_cov": np.eye(17)}
    np.savez(tmp_path / "w.npz", **full)
    again = load_weights(tmp_path / "w.npz")
    for name, value in full.items():
        assert np.array_equal(getattr(again, name), value)


def test_standardisation_is_folded_in(arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    mean, scale, x = rng.normal(size=6), rng.uniform(0.5, 2, size=6), rng.normal(size=(20, 6))
    np.savez(tmp_path / "s.npz", x_mean=mean, x_scale=scale, **arrays)
    np.savez(tmp_path / "w.npz", **arrays)
    plain, folded = load_weights(tmp_path / "w.npz"), load_weights(tmp_path / "s.npz")
    assert np.allclose(folded.predict(x), plain.predict((x - mean) / scale), atol=1e-12)


def test_forward_pass_by_hand(weights: Weights) -> None:
    context = Context(level="int8", mean_entropy=1.5, mean_confidence=0.6, max_entropy=3.0, min_confidence=0.2)
    got = Mlp16(weights).predict(context)
    for gamma, rate in zip(ARMS, got, strict=True):
        x = [1.5, 0.6, 3.0, 0.2, 1.0, gamma]
        hidden = [max(0.0, sum(x[i] * weights.W1[i, j] for i in range(6)) + weights.b1[j]) for j in range(16)]
        want = sum(h * w for h, w in zip(hidden, weights.W2[:, 0], strict=True)) + weights.b2[0]
        assert rate == pytest.approx(min(max(want, 0.0), 1.0), abs=1e-12)


def test_agrees_with_scikit_learn(tmp_path: Path) -> None:
    from sklearn.neural_network import MLPRegressor

    rng = np.random.default_rng(2)
    x, y = rng.random((200, 6)), rng.random(200)
    model = MLPRegressor(hidden_layer_sizes=(16,), max_iter=30, random_state=42, tol=0.1).fit(x, y)
    (W1, W2), (b1, b2) = model.coefs_, model.intercepts_
    np.savez(tmp_path / "w.npz", W1=W1, b1=b1, W2=W2, b2=b2)
    assert np.allclose(load_weights(tmp_path / "w.npz").predict(x), model.predict(x).clip(0, 1), atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"W1": np.zeros((5, 16))}, "W1 has shape (5, 16), MLP16 needs (6, 16)"),
        ({"W2": np.zeros(16)}, "W2 has shape (16,), MLP16 needs (16, 1)"),
        ({"b1": np.full(16, np.nan)}, "b1 must hold finite numbers only"),
        ({"b2": np.array(["x"])}, "b2 must hold finite numbers only"),
        ({"b2": None}, "lacks the arrays b2"),
        ({"x_mean": np.zeros(6)}, "x_mean and x_scale come together"),
        ({"x_mean": np.zeros(6), "x_scale": np.zeros(6)}, "x_scale must be positive"),
        ({"phi_cov": np.eye(16)}, "phi_cov has shape (16, 16)"),
    ],
)
def test_wrong_arrays_are_refused(
    change: dict[str, np.ndarray | None], message: str, arrays: dict[str, np.ndarray], tmp_path: Path
) -> None:
    kept = {key: value for key, value in (arrays | change).items() if value is not None}
    np.savez(tmp_path / "w.npz", **kept)
    with pytest.raises(PolicyError) as caught:
        load_weights(tmp_path / "w.npz")
    assert message in str(caught.value)


class Bomb:
    """Unpickling this would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", ["w.pkl", "w.npz"])
def test_pickles_are_refused_unread(name: str, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    (tmp_path / name).write_bytes(pickle.dumps(Bomb(trap)))
    with pytest.raises(PolicyError, match=r"pickles are refused.*np\.savez"):
        load_weights(tmp_path / name)
    assert not trap.exists()


def test_pickled_arrays_inside_an_npz_are_refused(arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    arrays["b1"] = np.array([Bomb(trap)], dtype=object)
    np.savez(tmp_path / "w.npz", **arrays)
    with pytest.raises(PolicyError, match="cannot read weights"):
        load_weights(tmp_path / "w.npz")
    assert not trap.exists()


def test_missing_and_cut_files(arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="no weights at"):
        make_policy("mlp16", weights=str(tmp_path / "none.npz"))
    np.savez(tmp_path / "w.npz", **arrays)
    whole = (tmp_path / "w.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(PolicyError):
        load_weights(tmp_path / "cut.npz")


@pytest.mark.parametrize(("at", "value"), [(8, 1), (10, 99)])
def test_damaged_directories(at: int, value: int, arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    """A bit that says encrypted, or a method of compression that nobody knows."""
    np.savez(tmp_path / "w.npz", **arrays)
    data = bytearray((tmp_path / "w.npz").read_bytes())
    data[data.index(b"PK\x01\x02") + at] |= value
    (tmp_path / "w.npz").write_bytes(data)
    with pytest.raises(PolicyError, match="cannot read weights"):
        load_weights(tmp_path / "w.npz")


@pytest.mark.parametrize(
    ("level", "code"),
    [("fp16", 0), ("int8", 1), ("nf4", 2), ("fp32", 0), ("bf16", 0), ("fp4", 2), ("gptq-3bit", 2), ("mystery", 0)],
)
def test_level_codes_by_nearest_bits(level: str, code: float) -> None:
    assert level_code(level) == code


def test_objectives_by_hand(weights: Weights) -> None:
    context = Context(level="nf4")
    rates = Mlp16(weights).predict(context).copy()
    per_step = make_policy("mlp16:tokens_per_step", weights=weights)
    assert per_step.decide(context).gamma == ARMS[int(np.argmax(rates * ARMS + 1))]
    timed = make_policy("mlp16", weights=weights)
    timed.set_costs("nf4", CostPrior(0.02, (0.1, 0.1), weight=1e6))
    seconds = 0.1 + 0.02 * np.array(ARMS)
    assert timed.decide(context).gamma == ARMS[int(np.argmax(rates * ARMS + 1 - seconds / 0.1))]


def test_a_dear_draft_is_not_used_and_a_free_one_is() -> None:
    context = Context(level="nf4", mean_confidence=0.95, mean_entropy=0.2, max_entropy=0.5, min_confidence=0.9)
    for t_d, test in ((1.0, lambda g: g == 0), (1e-6, lambda g: g >= 8)):
        policy = make_policy("mlp16", weights=trained())
        policy.set_costs("nf4", CostPrior(t_d, (0.1, 0.1)))
        assert test(policy.decide(context).gamma)


def test_gamma_zero_is_not_for_ever() -> None:
    """After a hard stretch the lagged signals stand still while nothing is drafted; the policy must come back."""
    policy = make_policy("mlp16", weights=trained())
    policy.set_costs("nf4", CostPrior(0.03, (0.1, 0.1)))
    context = Context(level="nf4", mean_entropy=4, mean_confidence=0.05, max_entropy=4.5, min_confidence=0.01, step=3)
    gammas = []
    for _ in range(60):
        gammas.append(policy.decide(context).gamma)
        if gammas[-1]:
            break
        context.idle += 1
    assert gammas[0] == 0
    assert gammas[-1] > 0


def test_seconds_beat_tokens_per_step_where_drafting_is_dear() -> None:
    tapes = make_tapes(11, 6)
    frozen, paper = (make_policy(spec, weights=trained()) for spec in ("mlp16", "mlp16:tokens_per_step"))
    assert play(frozen, tapes, "fp16").goodput > 1.5 * play(paper, tapes, "fp16").goodput
