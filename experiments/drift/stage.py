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

if TYPE_CHECKING:
    from experiments.drift.config import DriftConfig, Phase


class Stage:
    """Policies that live through the whole stream, and the models that it is decoded on.

    Parameters
    ----------
    config : DriftConfig
        Settings of the run.
    out : Path
        Run directory; checkpoints ``policy-*.npz`` that are there are taken up. A run that was killed loses at most
        one prompt of a policy's experience: the one whose records came to be written, but not its checkpoint.
    """

    def __init__(self, config: DriftConfig, out: Path) -> None:
        quiet_libraries()
        torch.set_num_threads(config.threads or cores())
        self.config, self.out = config, out
        self.pairs: dict[str, LoadedPair] = {}
        self.drafters: dict[tuple[str, str], Drafter] = {}
        self.facts: dict[str, Any] = {}
        self.policies = {spec: self._policy(spec) for spec in config.policies}

    def decode(self, unit: Unit, phase: Phase, prompt: Prompt) -> Generation:
        """Decode a prompt under a policy, with the target and the draft of a phase."""
        pair = self._pair(phase.level)
        key = phase.level, phase.draft
        if key not in self.drafters:
            self.drafters[key] = self._drafter(pair, phase)
        decoder = SpeculativeDecoder(
            self.drafters[key], policy=self.policies[unit.policy], target=pair.target, level=phase.level
        )
        return decoder.generate(chat_prompt(pair.tokenizer, prompt.text), self.config.max_new_tokens, task=prompt.task)

    def save(self, spec: str) -> None:
        """Write a policy's checkpoint."""
        if state := self.policies[spec].state_dict():
            save_arrays(self.out / checkpoint_name((spec, self.config.seed)), state)

    def _policy(self, spec: str) -> Policy:
        policy = make_policy(spec, seed=self.config.seed)
        file = self.out / checkpoint_name((spec, self.config.seed))
        if file.exists():
            policy.load_state_dict(load_arrays(file))
        return policy

    def _pair(self, level: str) -> LoadedPair:
        """Load a level once; policies are told its calibration with the pair's own draft, and no other."""
        if level not in self.pairs:
            c = self.config
            pair = load_pair(c.pair, level=level, device=c.device, target=c.target, draft=c.draft, engine=c.engine)
            cost = calibrate(pair.target, pair.drafter, level, chat_prompt(pair.tokenizer, WARM_UP))
            for policy in self.policies.values():
                FaultGuard(policy).set_costs(level, cost)
            self.facts[level] = {
                "level": level,
                "threads": torch.get_num_threads(),
                "device": str(pair.device),
                "arithmetic": pair.level.arithmetic(pair.device),
                "engine": {role: asdict(status) for role, status in pair.engine.items()},
                "models": pair.revision,
                "calibration": asdict(cost),
            }
            self.pairs[level] = pair
        return self.pairs[level]

    def _drafter(self, pair: LoadedPair, phase: Phase) -> Drafter:
        kind, _, count = phase.draft.partition(":")
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
