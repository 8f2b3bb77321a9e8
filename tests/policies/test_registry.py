"""Spec strings, options and plug-in policies."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from policies import plugins, registry
from policies.base import Context, Decision, Policy, PolicyError
from policies.fixed import Fixed
from policies.registry import available, canonical, make_policy, options
from tests.support.tiny_models import loaded_after


class Halves(Policy):
    """A policy outside the registry, with an option of each kind."""

    summary = "half of what is allowed"

    def __init__(self, *, factor: float = 0.5, on: bool = True, arms: tuple[int, ...] = (1,), seed: int = 0) -> None:
        super().__init__(seed=seed)
        self.factor, self.on, self.arms = factor, on, arms

    def decide(self, context: Context) -> Decision:
        return Decision(self.new_id(), int(context.max_gamma * self.factor))


def test_builds_from_positional_and_named_options() -> None:
    assert make_policy("fixed:7").decide(Context()).gamma == 7
    assert make_policy("fixed:gamma=7").decide(Context()).gamma == 7
    assert make_policy("fixed").decide(Context()).gamma == 4
    assert make_policy("autoregressive").decide(Context()).gamma == 0
    assert make_policy("fixed:16").decide(Context(max_gamma=3)).gamma == 3


def test_defaults_yield_to_the_spec_and_to_policies_without_the_option() -> None:
    a, b = (
        make_policy("fixed:1", seed=3, worker=2, weights="nowhere.npz"),
        make_policy("fixed:1,seed=9,worker=2", seed=3),
    )
    assert a.rng.random() == Fixed(seed=3, worker=2).rng.random()
    assert b.rng.random() == Fixed(seed=9, worker=2).rng.random()
    assert a.new_id() != make_policy("fixed:1", worker=3).new_id()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("fixed:x", "fixed: gamma must be a whole number, got 'x'"),
        ("fixed:2.5", "fixed: gamma must be a whole number"),
        ("fixed:-1", "fixed: gamma must be from 0 to 16, got -1"),
        ("fixed:99", "fixed: gamma must be from 0 to 16, got 99"),
        ("fixed:gama=3", "did you mean gamma"),
        ("fixed:3,4", "'4' is not of the form option=value"),
        ("fixed:gamma=3,gamma=4", "given twice"),
        ("autoregressive:3", "not of the form option=value"),
        ("fixd:3", "unknown policy 'fixd': did you mean fixed"),
        ("fixd", "did you mean fixed"),
        ("onlin:greedy", "unknown policy 'onlin': did you mean online"),
        ("zzz", "choose from adaedl, autoregressive"),
        ("", "unknown policy ''"),
        ("no.such.module:Thing", "no module named 'no'"),
        ("policies.fixed:Nothing", "has no attribute 'Nothing'"),
        ("policies.base:Context", "not a subclass of policies.base.Policy"),
        ("mlp16:objective=best", "must be one of tokens_per_second, tokens_per_step"),
        ("mlp16:arms=4/x", "arms must be whole numbers separated by slashes"),
    ],
)
def test_bad_specs_are_refused_in_one_line(spec: str, message: str) -> None:
    with pytest.raises(PolicyError) as caught:
        make_policy(spec)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("uses_nothing_there:Mine", "no module named 'nothing_there'"),
        ("misspells_an_import:Mine", "cannot import name 'Polisy' from 'policies.base'"),
        ("half_written:Mine", "half_written.py, line 1"),
        ("uses_numpy:Myne", "module 'uses_numpy' has no attribute 'Myne'"),
        ("raises:Mine", "cannot import policy raises:Mine: it raised RuntimeError: no luck"),
        ("leaves:Mine", "cannot import policy leaves:Mine: it raised SystemExit: 3"),
        ("will_not_build:Mine", "cannot be built from {}: KeyError: 'there'"),
        ("mistypes:Mine", "cannot read the options of Mine: name 'flote' is not defined"),
        ("nobody_wrote_it:Mine", "unknown policy 'nobody_wrote_it'"),
        ("folder/uses_numpy.py:Mine", "name its module, uses_numpy:Mine"),
    ],
)
def test_what_is_wrong_with_a_policy_of_ones_own_is_said(
    spec: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    own = "from policies.fixed import Fixed\nclass Mine(Fixed):\n    def __init__(self):"
    files = {
        "uses_nothing_there": "import nothing_there",
        "misspells_an_import": "from policies.base import Polisy",
        "half_written": "class Mine(",
        "uses_numpy": "import numpy",
        "raises": "raise RuntimeError('no luck')",
        "leaves": "import sys; sys.exit(3)",
        "will_not_build": f"{own}\n        {{}}['there']",
        "mistypes": f"from __future__ import annotations\n{own.replace('self', 'self, x: flote = 1')}\n        pass",
    }
    for name, text in files.items():
        (tmp_path / f"{name}.py").write_text(text + "\n")
    with pytest.raises(PolicyError) as caught:
        make_policy(spec)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "own"),
    [
        ("goodput", "online"),
        ("goodput:cap=4", "online:cap=4"),
        ("mlp16:read=step", "online:learn=costs"),
        ("mlp16:cap=4,read=step,refresh=8", "online:cap=4,learn=costs,refresh=8"),
        ("mlp16:tokens_per_step", "mlp16:objective=tokens_per_step"),
        ("mlp16:read=lagged", "mlp16:read=lagged"),
    ],
)
def test_other_names(spec: str, own: str) -> None:
    assert canonical(spec) == own


@pytest.mark.parametrize("spec", ["goodput:,cap=4", "mlp16:read=step,", "mlp16:read=step,tokens_per_step"])
def test_bad_options_behind_another_name_are_refused(spec: str) -> None:
    with pytest.raises(PolicyError, match="not of the form option=value"):
        make_policy(spec)


def test_another_name_is_told_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_told", set())
    for spec in ("goodput", "goodput:cap=4", "mlp16:read=step", "mlp16:read=step", "mlp16"):
        make_policy(spec)
    assert [r.getMessage() for r in caplog.records] == [
        "policy 'goodput' is called 'online' now",
        "policy 'mlp16:read=step' is called 'online:learn=costs' now",
    ]


def test_policies_by_import_path() -> None:
    path = f"{__name__}:Halves"
    assert make_policy(path).decide(Context(max_gamma=8)).gamma == 4
    built = make_policy(f"{path}:factor=0.25,on=off,arms=2/4")
    assert (built.decide(Context(max_gamma=8)).gamma, built.on, built.arms) == (2, False, (2, 4))
    with pytest.raises(PolicyError, match="on must be on or off, got 'perhaps'"):
        make_policy(f"{path}:on=perhaps")


def test_entry_points_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("halves", f"{__name__}:Halves", registry.GROUP)
    monkeypatch.setattr(plugins, "entry_points", lambda group: [point] if group == registry.GROUP else [])
    assert isinstance(make_policy("halves:factor=1"), Halves)
    assert ("halves", Halves.summary) in available()


@pytest.mark.parametrize(
    ("value", "why"), [("nowhere_at_all.x:Y", "no module named 'nowhere_at_all'"), ("bp", "names no class")]
)
def test_an_entry_point_that_does_not_load_hides_no_other(
    value: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = [EntryPoint("broken", value, registry.GROUP), EntryPoint("halves", f"{__name__}:Halves", registry.GROUP)]
    monkeypatch.setattr(plugins, "entry_points", lambda group: points)
    rows = dict(available())
    assert rows["halves"] == Halves.summary
    assert rows["broken"].startswith("does not load: cannot import policy ")
    assert why in rows["broken"]


def test_every_registered_policy_has_one_line() -> None:
    rows = available()
    assert [name for name, _ in rows] == sorted(name for name, _ in rows)
    assert {"fixed", "autoregressive", "mlp16", "online"} <= {name for name, _ in rows}
    for name, line in rows:
        assert line, name
        assert "\n" not in line, name


def test_options_are_listed_with_types_and_defaults() -> None:
    assert options("fixed")["gamma"] == ("a whole number", 4)
    assert options("mlp16")["objective"][0] == "one of tokens_per_second, tokens_per_step"
    assert "seed" in options("mlp16")


def test_policies_do_not_import_the_rest_of_the_project() -> None:
    code = "import policies.registry as r; r.available()"
    assert not loaded_after(code, "speckv_online", "experiments", "transformers", "ray", "sklearn")
