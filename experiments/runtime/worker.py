"""The worker: one model pair at one compression level, decoding one prompt after the other under any policy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from experiments.runtime.call_watch import CallWatch, LateCall, PolicyGivenUp
from experiments.runtime.learner import START, Key, Merged
from experiments.runtime.metrics import Meter
from experiments.runtime.patches import patched
from experiments.runtime.remembered import Learnt, Remembered
from experiments.runtime.settings import CompareConfig
from policies.base import PolicyError, State
from policies.guards.fault import FaultGuard
from policies.guards.watched import Watched
from policies.registry import make_policy, policy_class
from speckv_online.decoding.decoder import SpeculativeDecoder
from speckv_online.errors import UserError
from speckv_online.io.manifest import now, weight_hashes
from speckv_online.io.prompts import Prompt
from speckv_online.io.run_directory import Unit
from speckv_online.io.step_records import StepRecord
from speckv_online.models.pairs import chat_prompt, load_pair
from speckv_online.models.quality import known_quality
from speckv_online.models.quiet import quiet_libraries
from speckv_online.profiling.calibration import WARM_UP, calibrate

#: :meth:`experiments.runtime.learner.Learner.sync`, here or on another machine.
Sync = Callable[[str, int, Mapping[Key, State], bool, Mapping[Key, int]], dict[Key, Merged]]


@dataclass(slots=True)
class Decoded:
    """A finished unit: its step records, what its last line says besides, and its seconds of decoding."""

    unit: Unit
    steps: list[StepRecord]
    facts: dict[str, Any]
    seconds: float


@dataclass(slots=True)
class Failed:
    """A unit that its policy keeps from being decoded, and what the policy did."""

    unit: Unit
    reason: str


@dataclass(slots=True)
class Seat:
    """A policy at work in one seeded order, and the version of the merged statistics that it took over last."""

    policy: FaultGuard
    decoder: SpeculativeDecoder
    key: Key
    version: int = 0
    state: State = field(default_factory=dict)
    #: What is kept for later runs, if anything.
    learnt: Learnt | None = None
    #: What the unit at hand has to say: steps since the last exchange, exchanges, and (step, version, lag) of each.
    steps: int = 0
    sent: int = 0
    pulls: list[tuple[int, int, int]] = field(default_factory=list)


class Worker:
    """Decodes what it is given, and learns locally; every so many steps it exchanges statistics with the learner.

    What a policy learnt from a unit is sent before the unit counts as finished, under a name made of the unit, so that
    a unit which has to be decoded again (its worker died in between) teaches once.

    Parameters
    ----------
    config : CompareConfig
        Settings of the run.
    level : str
        Compression level of the target.
    index : int
        Number of the worker within its level, from 0.
    threads : int
        CPU threads that it may use.
    prompts : sequence of Prompt
        All prompts of the run.
    sync : callable
        See :data:`Sync`.
    watch : CallWatch, optional
        Notes which policy is being called, and ends calls that take too long; by default nobody does.
    """

    def __init__(
        self,
        config: CompareConfig,
        level: str,
        index: int,
        threads: int,
        prompts: Sequence[Prompt],
        sync: Sync,
        watch: CallWatch | None = None,
    ) -> None:
        self.config, self.level, self.index, self.threads = config, level, index, threads
        self.prompts, self.sync = prompts, sync
        self.watch = watch or CallWatch(None, config.call_seconds)
        self.seats: dict[tuple[str, int], Seat] = {}
        self.meter = Meter(level)

    def load(self) -> dict[str, Any]:
        """Load the pair, warm up and calibrate; return facts for the manifest."""
        quiet_libraries()
        torch.set_num_threads(self.threads)
        started = now()
        clock = perf_counter()
        c = self.config
        pair = load_pair(
            c.pair,
            level=self.level,
            device=c.device,
            target=c.target,
            draft=c.draft,
            drafter=c.drafter,
            engine=c.engine,
        )
        self.pair = pair
        self.remembered = Remembered(pair, self.level) if c.remember else None
        self.ids = [self._tokenize(prompt) for prompt in self.prompts]
        loaded = perf_counter() - clock
        self.cost = calibrate(pair.target, pair.drafter, self.level, chat_prompt(pair.tokenizer, WARM_UP))
        models: dict[str, Any] = dict(pair.revision)
        for role, source in (("target", c.target), ("draft", c.draft)):
            if source is not None and (hashes := weight_hashes(source)):
                models[role] = {"source": Path(source).name, "sha256": hashes}
        quality = known_quality(c.pair, c.target, self.level)
        return {
            "level": self.level,
            "quality": None if quality is None else asdict(quality),
            "started": started,
            "threads": torch.get_num_threads(),
            "device": str(pair.device),
            "arithmetic": pair.level.arithmetic(pair.device),
            "engine": {role: asdict(status) for role, status in pair.engine.items()},
            "models": models,
            "load_seconds": round(loaded, 2),
            "calibration": asdict(self.cost),
        }

    def decode(self, unit: Unit, prompt: int) -> Decoded | Failed:
        """Decode a unit, whose prompt has the given number, and exchange what was learnt.

        A unit that fails for what its policy does says so, and leaves the worker as it was.
        """
        self.watch.about(unit.policy, f"prompt {unit.prompt} at {unit.level}")
        try:
            return self._decode(unit, prompt)
        except PolicyGivenUp as error:
            reason = error.reason
        except LateCall as error:
            reason = self.watch.at_hand(str(error), late=True).reason(self.watch.limit)
        except (Exception, KeyboardInterrupt):
            raise
        except BaseException as error:  # what no guard catches, such as a panic of native code
            reason = f"it raised {type(error).__name__}: {error}"
        self.watch.leave()
        self.seats.pop((unit.policy, unit.seed), None)
        return Failed(unit, reason)

    def _decode(self, unit: Unit, prompt: int) -> Decoded:
        seat = self._seat(unit.policy, unit.seed)
        seat.steps = seat.sent = 0
        seat.pulls = []
        version, ids = seat.version, self.ids[prompt]
        faults = seat.policy.faults.total()

        def after_step(tokens: list[int]) -> None:  # not part of the step's time
            seat.steps += 1
            if seat.steps == self.config.sync_every:
                self._share(seat, unit)

        result = seat.decoder.generate(ids, self.config.max_new_tokens, task=unit.task, on_tokens=after_step)
        if seat.steps:
            self._share(seat, unit)
        if self.remembered is not None and seat.learnt is not None:
            self.remembered.add(seat.learnt, seat.policy.state_dict(), len(result.steps), len(result.tokens))
        self.meter.add(unit.policy, result.steps, seat.policy.faults.total() - faults)
        facts = {
            "output": result.tokens,
            "finish": result.finish,
            "prompt_tokens": len(ids),
            "prefill_seconds": result.prefill_seconds,
            "worker": self.index,
            "merged_version": version,
            "version_lag": max((lag for _, _, lag in seat.pulls), default=0),
            "pulls": seat.pulls,
        }
        return Decoded(unit, result.steps, facts, result.decode_seconds)

    def finish(self) -> dict[str, Any]:
        """Return facts for the manifest at the end."""
        faults = {f"{spec} seed {seed}": s.policy.faults.total() for (spec, seed), s in self.seats.items()}
        known = {} if self.remembered is None else {"remembered_steps": self.remembered.steps()}
        return {"finished": now(), "faults": {name: count for name, count in faults.items() if count}} | known

    def _tokenize(self, prompt: Prompt) -> list[int]:
        """Return a prompt's tokens; refuse one that does not fit, before anything is decoded."""
        ids = chat_prompt(self.pair.tokenizer, prompt.text)
        config = self.pair.target.config
        room = min(int(getattr(config, "max_position_embeddings", len(ids) + 1)), self.pair.drafter.max_length)
        if len(ids) >= room:
            raise UserError(f"prompt {prompt.id} has {len(ids)} tokens, but the models hold only {room}: shorten it")
        return ids

    def _seat(self, spec: str, seed: int) -> Seat:
        """The policy of a spec in one seeded order, made at first use and started from what is known by then."""
        if (spec, seed) not in self.seats:
            try:
                policy_class(spec)  # what it imports may take its time
                with self.watch.calling("its constructor"):
                    policy = Watched(make_policy(spec, seed=seed, worker=self.index), self.watch)
            except PolicyError as error:
                raise PolicyGivenUp(spec, str(error)) from error
            decoder = SpeculativeDecoder(self.pair.drafter, policy=policy, target=self.pair.target, level=self.level)
            shared, own = self._keys(spec, seed)
            learnt, start = None, dict[Key, State]()
            if self.remembered is not None:
                learnt, sums = self.remembered.start(spec, decoder.policy)
                start = {shared if decoder.policy.take_delta() else own: sums}  # where what it learns goes, too
            known = self.sync(START, 0, {shared: {}, own: {}} | start, True, {})
            # A policy that cannot share left its state under this worker's own name.
            key = shared if known[shared].version else own
            self.seats[spec, seed] = Seat(decoder.policy, decoder, key, learnt=learnt)
            self._take_over(self.seats[spec, seed], known[key])
        return self.seats[spec, seed]

    def _keys(self, spec: str, seed: int) -> tuple[Key, Key]:
        """Where a policy's statistics go if it shares any, and where its state goes if not."""
        own = f"{self.level}.{self.index}"
        together = "" if not self.config.remember else self.level  # what is remembered is kept by level
        shared = {"none": own, "per-level": self.level, "global": together}[self.config.sharing]
        return Key(spec, seed, shared), Key(spec, seed, own)

    def _take_over(self, seat: Seat, merged: Merged) -> None:
        seat.version, seat.state = merged.version, patched(seat.state, merged.state)
        if seat.state:
            try:
                seat.policy.load_state_dict(seat.state)
            except PolicyError as error:
                raise PolicyGivenUp(seat.key.spec, f"it refuses the merged statistics: {error}") from error
        # The calibration is this worker's own and not part of what is shared.
        seat.policy.set_costs(self.level, self.cost)

    def _share(self, seat: Seat, unit: Unit) -> None:
        """Send what the policy learnt since the last exchange, if anything, and take the merged statistics over."""
        step = seat.steps + (self.config.sync_every * seat.sent)
        seat.steps = 0
        shared, own = self._keys(seat.key.spec, seat.key.seed)
        delta, whole = seat.policy.take_delta(), False
        if delta and seat.key != shared:
            seat.key, seat.version, seat.state = shared, 0, {}
        elif not delta and seat.key == own:
            # It has shared nothing yet, so perhaps it has nothing that adds up: its state stays this worker's own.
            delta, whole = seat.policy.state_dict(), True
        if seat.learnt is not None and delta and not whole:
            seat.learnt.deltas.append(delta)
        if delta:
            known = {seat.key: seat.version}
            merged = self.sync(f"{self.level} {unit.prompt}", seat.sent, {seat.key: delta}, whole, known)[seat.key]
            lag = max(0, merged.version - seat.version - 1)  # batches of others that this policy did without
            self._take_over(seat, merged)
            seat.pulls.append((step, merged.version, lag))
        seat.sent += 1
