"""One number per level that says how good the draft is, and the weights that depend on it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from policies.acceptance.context_table import SHAPE
from policies.acceptance.draft_quality import HOPE, MEAN, PRECISION, DraftQuality, quality
from policies.acceptance.features import BEFORE, OWN, rows, token_features
from policies.acceptance.model import HEADS, AcceptanceModel
from policies.acceptance.step import Step
from policies.base import CONFIDENCE, MARGIN, Context, Outcome, PolicyError


def prior(path: Path, slope: float = 3.0) -> Path:
    """Weights under which the constant is ``slope`` times draft quality, and nothing else tells anything."""
    arrays = {name: np.zeros(2 * d + 1) for name, d in HEADS.items()}
    for name, d in HEADS.items():
        arrays[name][d] = slope
        arrays[f"{name}_precision"] = 1e6 * np.eye(d)
    np.savez(path, history=np.zeros(SHAPE), **arrays)
    return path


def feed(acceptance_model: AcceptanceModel, level: str, rate: float, steps: int, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    signals = np.zeros((4, 4))
    signals[:, CONFIDENCE], signals[:, MARGIN] = 0.5, 1.0
    for _ in range(steps):
        n = int(np.argmin(np.append(rng.random(4) < rate, False)))
        outcome = Outcome(4, n, min(n + 1, 4), n + 1, signals=signals, level=level)
        step = Step(Context(level=level), acceptance_model)
        step.extend(outcome.labelled, outcome)
        acceptance_model.add(step, outcome.labelled, outcome.accepted)
        acceptance_model.refresh()


@pytest.mark.parametrize("rate", [0.4, 0.85])
def test_finds_the_quality_that_explains_the_acceptances(tmp_path: Path, rate: float) -> None:
    acceptance_model = AcceptanceModel(prior(tmp_path / "w.npz"), strength=1e9, discount=1.0)
    feed(acceptance_model, "nf4", rate, 600)
    assert acceptance_model.quality.value("nf4") == pytest.approx(np.log(rate / (1 - rate)) / 3, abs=0.06)
    step = Step(Context(level="nf4"), acceptance_model)
    assert step.chance() == pytest.approx(rate, abs=0.04)
    # A level that was never met starts from there, less sure of it.
    assert acceptance_model.quality.value("fp16") - acceptance_model.quality.value("nf4") == pytest.approx(
        HOPE * PRECISION**-0.5, abs=0.05
    )
    assert DraftQuality(0.9).value("fp16") == pytest.approx(MEAN + HOPE * PRECISION**-0.5)


@pytest.mark.parametrize(("rate", "then"), [(0.9, 0.3), (0.3, 0.9)])
def test_another_draft_is_noticed(tmp_path: Path, rate: float, then: float) -> None:
    acceptance_model = AcceptanceModel(prior(tmp_path / "w.npz"), strength=1e9, discount=1.0)
    known = 0.0
    for seed in range(20):  # the same draft all the time: nothing that is known of it is dropped
        feed(acceptance_model, "nf4", rate, 50, seed)
        feed(acceptance_model, "fp16", rate, 5, seed)
        assert acceptance_model.quality.information("nf4") > known
        known = acceptance_model.quality.information("nf4")
    other = acceptance_model.quality.information("fp16")
    feed(acceptance_model, "nf4", then, 60)
    assert acceptance_model.quality.information("nf4") < known / 3
    assert acceptance_model.quality.value("nf4") == pytest.approx(np.log(then / (1 - then)) / 3, abs=0.25)
    assert acceptance_model.quality.information("fp16") == other
    # Nothing of the first draft is handed out any more.
    assert acceptance_model.take_delta()["quality.nf4"][0] == pytest.approx(acceptance_model.quality.information("nf4"))


def test_what_was_dropped_comes_back_after_a_hard_text(tmp_path: Path) -> None:
    """A text in which hardly anything is accepted looks like another draft; after it, the draft is the former again."""
    acceptance_model = AcceptanceModel(prior(tmp_path / "w.npz"), strength=1e9, discount=1.0)
    feed(acceptance_model, "nf4", 0.85, 300)
    usual, known = acceptance_model.quality.value("nf4"), acceptance_model.quality.information("nf4")
    feed(acceptance_model, "nf4", 0.1, 12)
    assert acceptance_model.quality.information("nf4") < known / 3
    assert "nf4" in acceptance_model.quality.formers()
    feed(acceptance_model, "nf4", 0.85, 25)
    assert acceptance_model.quality.formers() == {}
    assert acceptance_model.quality.information("nf4") > 0.5 * known
    assert acceptance_model.quality.value("nf4") == pytest.approx(usual, abs=0.15)


def test_what_was_dropped_stays_away_while_the_draft_is_another_one(tmp_path: Path) -> None:
    acceptance_model = AcceptanceModel(prior(tmp_path / "w.npz"), strength=1e9, discount=1.0)
    feed(acceptance_model, "nf4", 0.9, 300)
    for seed in range(10):
        feed(acceptance_model, "nf4", 0.3, 60, seed)
        assert acceptance_model.quality.value("nf4") == pytest.approx(np.log(0.3 / 0.7) / 3, abs=0.25)
    feed(acceptance_model, "nf4", 0.9, 25)  # the first draft again
    assert acceptance_model.quality.value("nf4") == pytest.approx(np.log(0.9 / 0.1) / 3, abs=0.25)


def test_what_was_dropped_is_saved() -> None:
    one, again = DraftQuality(0.99), DraftQuality(0.99)
    one.add({"a": np.array([50.0, 30.0])}, 1)
    while not one.surprised("a", -1.0, 0.2):
        pass
    one.compare("a", 1.0)
    again.load(one.state())
    assert again.formers() == one.formers() != {}
    for quality_now in (one, again):
        quality_now.compare("a", 4.5)
        assert quality_now.formers() == {}
        assert quality_now.information("a") == 50.0
    with pytest.raises(PolicyError, match="surprise_former"):
        again.load({"surprise_former.a": np.zeros(2)})


def test_what_was_surprising_so_far_is_saved() -> None:
    one, again = DraftQuality(0.99), DraftQuality(0.99)
    assert not any(one.surprised("a", -1.0, 0.2) for _ in range(5))
    again.load(one.state())
    more = [(one.surprised("a", -1.0, 0.2), again.surprised("a", -1.0, 0.2)) for _ in range(5)]
    assert more[0] == (False, False)
    assert (True, True) in more
    assert (True, False) not in more
    with pytest.raises(PolicyError, match="surprise"):
        again.load({"surprise.a": np.zeros(3)})


def test_unknown_drafts_are_given_the_benefit_of_the_doubt() -> None:
    sums, excess = DraftQuality(0.99), []
    for _ in range(3):
        excess.append(sums.value("x") - MEAN)
        sums.add({"x": np.array([10.0, 10.0 * MEAN])}, 1)
    assert excess[0] > excess[1] > excess[2] > 0


def test_quality_merges_and_saves_like_the_rest() -> None:
    alone, learner, workers = DraftQuality(0.99), DraftQuality(0.99), [DraftQuality(0.99) for _ in range(2)]
    rng = np.random.default_rng(0)
    for i in range(8):
        sums = {"a": rng.random(2), "b": rng.random(2)} if i % 3 else {"b": rng.random(2)}
        alone.add(sums, 2)
        workers[i // 4].add(sums, 2)
    for worker in workers:
        delta = worker.take_delta()
        learner.merge(delta)
        assert set(worker.take_delta()) == {"quality_steps"}
    again = DraftQuality(0.99)
    again.load(learner.state())
    for level in ("a", "b", "c"):
        assert learner.value(level) == pytest.approx(alone.value(level), abs=1e-12)
        assert again.value(level) == pytest.approx(alone.value(level), abs=1e-12)
    with pytest.raises(PolicyError, match="negative"):
        again.load({"quality.a": np.array([-1.0, 0.0])})


def test_quality_of_training_rows() -> None:
    assert quality(0.0, 0.0) == 0.0
    assert quality(9_000, 10_000) == pytest.approx(np.log(9) / 3, abs=0.01)
    assert quality(100, 100) < quality(1_000, 1_000) < 3.0


def test_agreement_has_weights_of_its_own() -> None:
    after = {}
    for n in (-4.0, 0.0, 4.0):
        own = token_features([1.0, 0.5, 1.0, n])
        numbers = (0.2, 0.3, 0.0, 0.0, 0.0, 0.1, 0.0, *own, 0, 0.0, 0.0, 0.0)
        after[n] = rows(np.array([numbers]))[1, 0].tolist()
        assert len(after[n]) == OWN
        assert after[n][1:4] == list(own[:3])
    assert after[4.0][8:12] == [1.0, 1.0, *after[4.0][1:3]]
    assert not any(after[4.0][12:])
    assert after[-4.0][12:] == [1.0, 1.0, *after[-4.0][1:3]]
    assert not any(after[-4.0][8:12])
    assert not any(after[0.0][8:])
    assert BEFORE == OWN == 16


def test_taking_merged_sums_over_does_not_calm_down() -> None:
    one, learner = DraftQuality(0.99), DraftQuality(0.99)
    found = []
    for _ in range(12):
        found.append(one.surprised("a", -1.0, 0.2))
        one.load(learner.state())
    assert any(found)
