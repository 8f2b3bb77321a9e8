"""The worker: one model pair at one compression level, decoding every prompt under every policy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

from experiments.config import CompareConfig
from experiments.learner import Key, Merged, checkpoint_name, read_checkpoint
from policies.base import Policy, State
from policies.registry import make_policy
from speckv_online.calibrate import calibrate
from speckv_online.cost import as_prior
from speckv_online.decoding import Generation, SpeculativeDecoder
from speckv_online.errors import UserError
from speckv_online.manifest import now, weight_hashes
from speckv_online.models import chat_prompt, load_pair
from speckv_online.prompts import Prompt
from speckv_online.rundir import StepWriter, Unit, save_arrays
from speckv_online.session import quiet_libraries

#: Adds this worker's statistics to the learner's and returns the merged ones: (worker, sequence, deltas) -> merged.
Sync = Callable[[str, int, Mapping[Key, State]], dict[Key, Merged]]

WARM_UP = "Write a short note that thanks a colleague for their help with a project."


@dataclass(frozen=True, slots=True)
class Progress:
    """One finished unit, as a progress display wants it."""

    level: str
    unit: Unit
    done: int
    total: int
    tokens: int
    seconds: float


class Worker:
    """Decodes all prompts under all policies at one level, interleaved prompt by prompt.

    Policies take turns in going first, so that a drift of the machine hits all alike. Finished units go to
    ``steps-LEVEL.jsonl``; those that the file already holds are skipped. After each prompt the statistics of the
    policies that learn go to the learner and come back merged.

    Parameters
    ----------
    config : CompareConfig
        Settings of the run.
    level : str
        Compression level of the target.
    index : int
        Number of the worker, from 0.
    threads : int
        CPU threads that it may use.
    prompts : list of Prompt
        What to decode.
    out : str or Path
        Run directory.
    sync : callable
        See :data:`Sync`.
    """

    def __init__(
        self,
        config: CompareConfig,
        level: str,
        index: int,
        threads: int,
        prompts: list[Prompt],
        out: str | Path,
        sync: Sync,
    ) -> None:
        self.config, self.level, self.index, self.threads = config, level, index, threads
        self.prompts, self.out, self.sync = prompts, Path(out), sync
        self.writer = StepWriter(self.out / f"steps-{level}.jsonl")
        self.units = list(self._plan())
        self.position = 0
        self.facts: dict[str, Any] = {}
        self.policies: dict[Key, Policy] = {}
        self.versions: dict[Key, int] = {}
        self.decoders: dict[Key, SpeculativeDecoder] = {}

    def load(self) -> dict[str, Any]:
        """Load the pair, warm up and calibrate, once; return facts for the manifest."""
        if not self.facts:
            self.facts = self._load()
        return self.facts

    def _load(self) -> dict[str, Any]:
        quiet_libraries()
        torch.set_num_threads(self.threads)
        started = now()
        clock = perf_counter()
        c = self.config
        pair = load_pair(c.pair, level=self.level, device=c.device, target=c.target, draft=c.draft, drafter=c.drafter)
        self.pair = pair
        self.ids = {prompt.id: self._tokenize(prompt) for prompt in self.prompts}
        loaded = perf_counter() - clock
        self.cost = calibrate(pair.target, pair.drafter, self.level, chat_prompt(pair.tokenizer, WARM_UP))
        models: dict[str, Any] = dict(pair.revision)
        for role, source in (("target", c.target), ("draft", c.draft)):
            if source is not None and (hashes := weight_hashes(source)):
                models[role] = {"source": Path(source).name, "sha256": hashes}
        return {
            "level": self.level,
            "started": started,
            "threads": torch.get_num_threads(),
            "device": str(pair.device),
            "arithmetic": pair.level.arithmetic(pair.device),
            "models": models,
            "load_seconds": round(loaded, 2),
            "calibration": {
                "draft_seconds": self.cost.draft_seconds,
                "verify_seconds": list(self.cost.verify_seconds),
                "overhead_seconds": self.cost.overhead_seconds,
            },
        }

    def advance(self) -> Progress | None:
        """Decode the next unit that is not done yet; None when there is none."""
        self.load()  # again, where an actor was restarted
        while self.position < len(self.units):
            index = self.position
            unit, prompt = self.units[index]
            self.position += 1
            progress = None
            if unit.key not in self.writer.done:
                progress = self._decode(unit, prompt)
            if (index + 1) % len(self.config.policies) == 0:
                self._share(unit.seed, index // len(self.config.policies))
            if progress is not None:
                return progress
        return None

    def finish(self) -> dict[str, Any]:
        """Close the records and return facts for the manifest."""
        self.writer.close()
        faults = {f"{spec} seed {seed}": d.policy.faults.total() for (spec, seed), d in self.decoders.items()}
        return {"finished": now(), "faults": {name: count for name, count in faults.items() if count}}

    def _plan(self) -> Iterator[tuple[Unit, Prompt]]:
        """Yield all units in order: seeded orders of the prompts, within a prompt the policies, rotated."""
        policies = self.config.policies
        for order in range(self.config.orders):
            seed = self.config.seed + order
            for i, p in enumerate(np.random.default_rng(seed).permutation(len(self.prompts))):
                prompt = self.prompts[p]
                for j in range(len(policies)):
                    policy = policies[(i + j) % len(policies)]
                    yield Unit(self.level, policy, prompt.id, prompt.task, seed), prompt

    def _decode(self, unit: Unit, prompt: Prompt) -> Progress:
        key = (unit.policy, unit.seed)
        decoder = self._decoder(key)
        ids = self.ids[prompt.id]
        result = decoder.generate(ids, self.config.max_new_tokens, task=prompt.task)
        self.writer.write(unit, result.steps, _facts(result, len(ids)) | {"merged_version": self.versions[key]})
        done = len(self.writer.done)
        return Progress(self.level, unit, done, len(self.units), len(result.tokens), result.decode_seconds)

    def _tokenize(self, prompt: Prompt) -> list[int]:
        """Return a prompt's tokens; refuse one that does not fit, before anything is decoded."""
        ids = chat_prompt(self.pair.tokenizer, prompt.text)
        config = self.pair.target.config
        room = min(int(getattr(config, "max_position_embeddings", len(ids) + 1)), self.pair.drafter.max_length)
        if len(ids) >= room:
            raise UserError(f"prompt {prompt.id} has {len(ids)} tokens, but the models hold only {room}: shorten it")
        return ids

    def _decoder(self, key: Key) -> SpeculativeDecoder:
        """The decoder of a policy in one seeded order, made at first use and started from what is known by then."""
        if key not in self.decoders:
            spec, seed = key
            policy = make_policy(spec, seed=seed, worker=self.index)
            self.policies[key] = policy
            self.decoders[key] = SpeculativeDecoder(
                self.pair.drafter, policy=policy, target=self.pair.target, level=self.level
            )
            local = self.out / checkpoint_name(key, self.level)
            merged = (0, read_checkpoint(local)[0]) if local.exists() else self.sync(self.level, -1, {key: {}})[key]
            self._restore(key, merged)
        return self.decoders[key]

    def _restore(self, key: Key, merged: Merged) -> None:
        policy = self.policies[key]
        self.versions[key], state = merged
        if state:
            policy.load_state_dict(state)
        if hasattr(policy, "set_costs"):  # the calibration is this worker's own and not part of what is shared
            policy.set_costs(self.level, as_prior(self.cost))

    def _share(self, seed: int, sequence: int) -> None:
        """Send the statistics of the prompt that has just ended, and take the merged ones over."""
        deltas: dict[Key, State] = {}
        for key, policy in self.policies.items():
            if key[1] != seed:
                continue
            if delta := policy.take_delta():
                deltas[key] = delta
            elif state := policy.state_dict():
                # It learns, but not in a form that adds up: it stays this worker's own.
                save_arrays(self.out / checkpoint_name(key, self.level), state)
        if deltas:
            for key, merged in self.sync(self.level, sequence, deltas).items():
                self._restore(key, merged)


def _facts(result: Generation, prompt_tokens: int) -> dict[str, Any]:
    return {
        "output": result.tokens,
        "finish": result.finish,
        "prompt_tokens": prompt_tokens,
        "prefill_seconds": result.prefill_seconds,
    }
