"""Real decoding for ``python -m experiments.drift``: models are loaded once per level, drafts change under way."""

from __future__ import annotations

import copy
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from experiments.runtime.learner import checkpoint_name
from policies.base import Policy
from policies.guards.fault import FaultGuard
from policies.registry import make_policy
from speckv_online.decoding.decoder import SpeculativeDecoder
from speckv_online.decoding.generation import Generation
from speckv_online.drafters.base import Drafter
from speckv_online.drafters.model import ModelDrafter
from speckv_online.drafters.ngram import NgramDrafter
from speckv_online.errors import UserError
from speckv_online.io.manifest import cores
from speckv_online.io.prompts import Prompt
from speckv_online.io.run_directory import Unit, load_arrays, save_arrays
from speckv_online.models.pairs import LoadedPair, chat_prompt, load_pair
from speckv_online.models.quiet import quiet_libraries
from speckv_online.profiling.calibration import WARM_UP, calibrate
from speckv_online.simulate.cost_table import LevelCost

if TYPE_CHECKING:
    from experiments.drift.config import DriftConfig, Phase


#: What :class:`Models` takes of a config.
SETTINGS = ("pair", "target", "draft", "device", "engine", "threads", "max_new_tokens")


class Models:
    """Models by level, each loaded and calibrated once, and drafters for them.

    Parameters
    ----------
    threads, max_new_tokens : int
        CPU threads (0: all cores), and most tokens of an output.
    **pair
        Which models, and where: options of :func:`~speckv_online.models.pairs.load_pair`.

    Attributes
    ----------
    costs : dict of str to LevelCost
        Calibrations with the pair's own draft, by level.
    facts : dict of str to dict
        What a run manifest says of each level.
    """

    def __init__(self, *, threads: int, max_new_tokens: int, **pair: Any) -> None:
        quiet_libraries()
        torch.set_num_threads(threads or cores())
        self.pair, self.max_new_tokens = pair, max_new_tokens
        self.pairs: dict[str, LoadedPair] = {}
        self.drafters: dict[tuple[str, str], Drafter] = {}
        self.costs: dict[str, LevelCost] = {}
        self.facts: dict[str, Any] = {}

    def generate(self, policy: Policy, level: str, draft: str, prompt: Prompt) -> Generation:
        """Decode a prompt under a policy, with the target at a level and a draft."""
        pair = self.load(level)
        if (level, draft) not in self.drafters:
            self.drafters[level, draft] = _drafter(pair, draft)
        decoder = SpeculativeDecoder(self.drafters[level, draft], policy=policy, target=pair.target, level=level)
        return decoder.generate(chat_prompt(pair.tokenizer, prompt.text), self.max_new_tokens, task=prompt.task)

    def load(self, level: str) -> LoadedPair:
        """Return the pair at a level; loads and calibrates it at first."""
        if level not in self.pairs:
            pair = load_pair(level=level, **self.pair)
            cost = calibrate(pair.target, pair.drafter, level, chat_prompt(pair.tokenizer, WARM_UP))
            self.facts[level] = {
                "level": level,
                "threads": torch.get_num_threads(),
                "device": str(pair.device),
                "arithmetic": pair.level.arithmetic(pair.device),
                "engine": {role: asdict(status) for role, status in pair.engine.items()},
                "models": pair.revision,
                "calibration": asdict(cost),
            }
            self.pairs[level], self.costs[level] = pair, cost
        return self.pairs[level]


class Stage(Models):
    """Policies that live through the whole stream, and the models that it is decoded on.

    Policies are told a level's calibration with the pair's own draft when it is loaded, and no other.

    Parameters
    ----------
    config : DriftConfig
        Settings of the run.
    out : Path
        Run directory; checkpoints ``policy-*.npz`` that are there are taken up. A run that was killed loses at most
        one prompt of a policy's experience: the one whose records came to be written, but not its checkpoint.
    """

    def __init__(self, config: DriftConfig, out: Path) -> None:
        super().__init__(**{name: getattr(config, name) for name in SETTINGS})
        self.seed, self.out = config.seed, out
        self.policies = {spec: self._policy(spec) for spec in config.policies}

    def decode(self, unit: Unit, phase: Phase, prompt: Prompt) -> Generation:
        """Decode a prompt under a policy, with the target and the draft of a phase."""
        if phase.level not in self.pairs:
            self.load(phase.level)
            for policy in self.policies.values():
                FaultGuard(policy).set_costs(phase.level, self.costs[phase.level])
        return self.generate(self.policies[unit.policy], phase.level, phase.draft, prompt)

    def save(self, spec: str) -> None:
        """Write a policy's checkpoint."""
        if state := self.policies[spec].state_dict():
            save_arrays(self.out / checkpoint_name((spec, self.seed)), state)

    def _policy(self, spec: str) -> Policy:
        policy = make_policy(spec, seed=self.seed)
        file = self.out / checkpoint_name((spec, self.seed))
        if file.exists():
            policy.load_state_dict(load_arrays(file))
        return policy


def _drafter(pair: LoadedPair, draft: str) -> Drafter:
    kind, _, count = draft.partition(":")
    if kind == "own":
        return pair.drafter
    if kind == "ngram":
        return NgramDrafter()
    return ModelDrafter(first_layers(pair.target, int(count)), pair.target.config.vocab_size)


def first_layers(target: PreTrainedModel, count: int) -> PreTrainedModel:
    """Return a model of the target's first layers, its own norm and head behind them; all weights are shared.

    Raises
    ------
    UserError
        If the target has no list of layers where Llama has it, or fewer of them.
    """
    inner = getattr(target, "model", None)
    layers = getattr(inner, "layers", None)
    if inner is None or not isinstance(layers, nn.ModuleList):
        raise UserError(f"the layers of a {type(target).__name__} are not where Llama's are: use no draft layers:N")
    if not 0 < count <= len(layers):
        raise UserError(f"a draft of layers:{count}: the target has {len(layers)} layers")
    config = copy.deepcopy(target.config)
    config.num_hidden_layers = count
    small, body = _shallow(target), _shallow(inner)
    body.layers, body.config = layers[:count], config
    small.model, small.config = body, config
    small.__dict__.pop("forward", None)  # a quick one is the target's, with all of its layers
    return small


def _shallow(module: Any) -> Any:
    """A copy of a module with a list of submodules of its own; the submodules themselves are shared."""
    made = copy.copy(module)
    made._modules = module._modules.copy()
    return made
