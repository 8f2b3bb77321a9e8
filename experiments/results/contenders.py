"""All contenders of :mod:`experiments.results` at one level: models, policies, and the calls that are timed."""

from __future__ import annotations

import gc
import random
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from policies.base import Policy
from policies.guards.fault import FaultGuard
from policies.registry import make_policy
from speckv_online.drafters.spec import parse_drafter
from speckv_online.io.prompts import Prompt

if TYPE_CHECKING:
    from experiments.results.config import ResultsConfig
    from experiments.results.transformers_baseline import Schedule, Stock
    from speckv_online.models.pairs import LoadedPair

#: Name of transformers' own generation, with a schedule behind a colon.
PEER = "transformers"


def is_peer(name: str) -> bool:
    """Whether a contender is transformers itself."""
    return name.partition(":")[0] == PEER


class Bench:
    """All contenders at one level.

    Attributes
    ----------
    facts : dict
        What the manifest says of the level. An earlier process's are kept, and its calibration is used on.
    """

    def __init__(self, config: ResultsConfig, level: str, out: Path, known: Iterable[dict[str, Any]] = ()) -> None:
        self.config, self.level, self.out = config, level, out
        self.policies: dict[str, Policy] = {}
        self.calls: dict[str, Callable[[list[int]], tuple[list[int], float, list[Any]]]] = {}
        self.pair: LoadedPair | None = None
        self.stock: Stock | None = None
        self.reached: dict[Schedule, int] = {}  # by transformers' schedules, which go on in the next round
        self.facts: dict[str, Any] = next((facts for facts in known if facts["level"] == level), {"level": level})

    def run(self, prompts: Sequence[tuple[int, Prompt]]) -> int:
        """Decode every unit of these numbered prompts that is missing; return how many those were."""
        from tqdm import tqdm

        from speckv_online.io.run_directory import StepWriter, Unit, save_arrays

        c = self.config
        writer = StepWriter(self.out / f"steps-{self.level}.jsonl")
        plan = []
        for i, prompt in prompts:
            names = c.leading if i >= c.some else tuple(dict.fromkeys((*c.leading, *c.others)))
            # Another order each time, so that a slow moment of the machine hits others each time.
            shuffled = random.Random(f"{c.seed} {i}").sample(names, len(names))
            plan += [(Unit(self.level, n, prompt.id, prompt.task, c.seed), prompt) for n in shuffled]
        missing = [item for item in plan if item[0].key not in writer.done]
        if missing:
            self.load(any(is_peer(unit.policy) for unit, _ in missing))
        said = f"{self.level}, prompts {prompts[0][0] + 1} to {prompts[-1][0] + 1} of {c.prompts}"
        bar = tqdm(missing, desc=said, unit="call", disable=not sys.stderr.isatty(), file=sys.stderr)
        for number, (unit, prompt) in enumerate(bar, start=1):
            tokens, seconds, steps = self.call(unit.policy)(self.prompt_ids(prompt))
            writer.write(unit, steps, {"output": tokens, "call_seconds": seconds})
            policy = self.policies.get(unit.policy)
            if policy is not None and (state := policy.state_dict()):
                save_arrays(self.checkpoint(unit.policy), state)
            if bar.disable and number % 20 == 0:
                print(f"{said}: {number} of {len(missing)} calls", file=sys.stderr, flush=True)
        writer.close()
        self.calls.clear()
        self.pair = self.stock = None
        gc.collect()  # the next level's models must not have to fit beside these
        return len(missing)

    def load(self, peers: bool) -> None:
        """Load our models, and for ``peers`` theirs, and calibrate our costs, once in a run."""
        import torch

        from experiments.results.transformers_baseline import SCHEDULES, Stock
        from speckv_online.io.manifest import cores
        from speckv_online.models.pairs import chat_prompt, load_pair
        from speckv_online.models.quiet import quiet_libraries
        from speckv_online.profiling.calibration import WARM_UP, calibrate
        from speckv_online.simulate.cost_table import LevelCost

        c = self.config
        quiet_libraries()
        torch.set_num_threads(c.threads or cores())
        self.pair = pair = load_pair(c.pair, level=self.level, device=c.device, engine=c.engine)
        warm = chat_prompt(pair.tokenizer, WARM_UP)
        cost = calibrate(pair.target, pair.drafter, self.level, warm)  # also warms up, so it runs at every load
        if peers:
            self.stock = stock = Stock(c.pair, self.level, c.device)
            for name in SCHEDULES:  # warm-up calls are no data
                stock.generate(warm, 8, SCHEDULES[name])
            stock.reached = self.reached
        self.facts.setdefault("calibration", asdict(cost))
        self.cost = LevelCost(**self.facts["calibration"])
        self.facts |= {
            "threads": torch.get_num_threads(),
            "arithmetic": pair.level.arithmetic(pair.device),
            "engine": {role: asdict(status) for role, status in pair.engine.items()},
            "models": dict(pair.revision),
        }

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Return the prompt's tokens in the target's chat format."""
        from speckv_online.models.pairs import chat_prompt

        assert self.pair is not None
        return chat_prompt(self.pair.tokenizer, prompt.text)

    def checkpoint(self, name: str) -> Path:
        """Return where a contender's policy is kept."""
        return self.out / f"policy-{self.level}-{name.replace(':', '-').replace('+', '-')}.npz"

    def call(self, name: str) -> Callable[[list[int]], tuple[list[int], float, list[Any]]]:
        """Return what decodes for a contender, made at its first use."""
        if name not in self.calls:
            self.calls[name] = self._peer(name) if is_peer(name) else self._ours(name)
        return self.calls[name]

    def _peer(self, name: str) -> Callable[[list[int]], tuple[list[int], float, list[Any]]]:
        from experiments.results.transformers_baseline import SCHEDULES

        assert self.stock is not None
        stock = self.stock

        def decode(ids: list[int]) -> tuple[list[int], float, list[Any]]:
            return *stock.generate(ids, self.config.max_new_tokens, SCHEDULES[name]), []

        return decode

    def _ours(self, name: str) -> Callable[[list[int]], tuple[list[int], float, list[Any]]]:
        import torch

        from speckv_online.decoding.decoder import SpeculativeDecoder
        from speckv_online.io.run_directory import load_arrays

        assert self.pair is not None
        pair = self.pair
        spec, _, other = name.partition("+")
        drafter: Any = pair.drafter
        if other:
            rows = None if drafter.head_ids is None else torch.tensor(drafter.head_ids)
            drafter = parse_drafter(other).build(drafter.model, pair.target.config.vocab_size, rows, drafter.quick)
        policy = self.policies.get(name)  # one that has decoded an earlier round goes on
        if policy is None:
            policy = self.policies[name] = make_policy(spec, seed=self.config.seed)
            if self.checkpoint(name).exists():
                policy.load_state_dict(load_arrays(self.checkpoint(name)))
            FaultGuard(policy).set_costs(self.level, self.cost)
        decoder = SpeculativeDecoder(drafter, policy=policy, target=pair.target, level=self.level)

        def decode(ids: list[int]) -> tuple[list[int], float, list[Any]]:
            result = decoder.generate(ids, self.config.max_new_tokens)
            return result.tokens, result.seconds, result.steps

        return decode
