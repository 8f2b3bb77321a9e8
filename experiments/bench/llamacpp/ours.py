"""Our decoder as an engine of the benchmark."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from experiments.bench.llamacpp.worker import serve
from policies.base import CONFIDENCE
from policies.registry import make_policy
from speckv_online.decoding.decoder import SpeculativeDecoder
from speckv_online.drafters.base import NO_PROPOSAL, Drafter
from speckv_online.drafters.spec import parse_drafter
from speckv_online.modeling.sampling import Sampler
from speckv_online.models.kept_draft import load_default_draft
from speckv_online.models.pairs import DEFAULT_PAIR, load_pair, load_target, prepare
from speckv_online.profiling.calibration import calibrate
from speckv_online.simulate.cost_table import LevelCost


class Recorded:
    """A drafter that proposes a text which is known."""

    names: tuple[str, ...] = ("recorded",)
    max_length = 1 << 30
    lag = 1

    def __init__(self, text: list[int]) -> None:
        self.text, self.proposals = text, list[torch.Tensor | None]()

    def begin(self, tokens: list[int], capacity: int, sampler: Sampler | None = None) -> None:
        """Start a sequence of that text."""
        self.at = 0

    def use(self, name: str) -> str:
        """There is one drafter here."""
        return self.names[0]

    def draft(self, signals: np.ndarray) -> int:
        """Propose the next token, or nothing behind the last one."""
        at = self.at + len(self.proposals)
        if at >= len(self.text):
            return NO_PROPOSAL
        signals[CONFIDENCE] = 1.0
        self.proposals.append(None)
        return self.text[at]

    def lookup_confidence(self) -> float:
        """Return 1: no proposal takes a forward."""
        return 1.0

    def lookup_alternative(self) -> float:
        """Return 0: there is none."""
        return 0.0

    def end(self, accepted: int) -> None:
        """Forget the step's drafts."""
        self.proposals = []

    def extend(self, tokens: list[int]) -> None:
        """Go on in the text."""
        self.at += len(tokens)


class Ours:
    """A target, and decoders of it by mode.

    Parameters
    ----------
    file, level : str, optional
        A GGUF file as it comes, or a level of the default target.
    draft : bool
        Whether the default draft fits.
    threads : int
        Most threads.
    """

    def __init__(self, file: str | None, level: str | None, draft: bool, threads: int) -> None:
        torch.set_num_threads(threads)
        self.drafter: Drafter | None = None
        self.target: PreTrainedModel
        if file is None:
            pair = load_pair(DEFAULT_PAIR, level=level, device="cpu", engine="auto")
            self.target, self.drafter, self.level = pair.target, pair.drafter, pair.level.name
        else:
            self.target, self.level = load_target(file, None, "cpu", "auto"), ""
            if draft:
                small, head, _, compiled = load_default_draft(
                    Path(prepare(DEFAULT_PAIR)), torch.device("cpu"), "auto", None
                )
                vocabulary = int(self.target.config.vocab_size)
                self.drafter = parse_drafter("model").build(small, vocabulary, head, compiled)
        self.decoders = dict[str, SpeculativeDecoder]()
        self.cost: LevelCost | None = None

    def engine(self) -> str:
        """Return why the CPU engine does not run the target, nothing if it does."""
        decoder = self._decoder("autoregressive", None)
        self.level = decoder.level
        return "" if decoder.engine.on else decoder.engine.reason

    def warm(self, prompt: list[int]) -> None:
        """Measure what steps cost, as commands do, for policies that are made from now on."""
        if self.drafter is not None:
            self.cost = calibrate(self.target, self.drafter, self.level, prompt)

    def _decoder(self, spec: str, drafter: Drafter | None) -> SpeculativeDecoder:
        return SpeculativeDecoder(drafter, policy=make_policy(spec), target=self.target, level=self.level or None)

    def generate(self, prompt: list[int], tokens: int, mode: str, text: list[int] | None = None) -> dict[str, Any]:
        """Decode greedily: ``plain``, ``perfect:4`` with ``text`` as the draft, or with a policy of that name."""
        kind, _, rest = mode.partition(":")
        if kind == "perfect":
            decoder = self._decoder(f"fixed:{rest}", Recorded(text or []))
        elif mode not in self.decoders:
            decoder = self._decoder("autoregressive" if mode == "plain" else mode, self.drafter)
            if self.cost is not None:
                decoder.policy.set_costs(decoder.level, self.cost)
            self.decoders[mode] = decoder
        else:
            decoder = self.decoders[mode]
        stamps = list[tuple[float, int]]()
        started = perf_counter()
        out = decoder.generate(
            prompt, tokens, eos_ids=(), on_tokens=lambda new: stamps.append((perf_counter(), len(new)))
        )
        ended, (first, before) = perf_counter(), stamps[0]
        return {
            "tokens": out.tokens, "prompt_seconds": first - started, "seconds": ended - first,
            "decoded": len(out.tokens) - before, "drafted": sum(s.drafted for s in out.steps), "steps": len(out.steps),
        }  # fmt: skip

    def forwards(self, prompt: list[int], width: int, repeats: int) -> list[float]:
        """Return the seconds of forwards of ``width`` tokens behind a prompt; no draft in them is right."""
        plain = self.generate(prompt, repeats + width + 1, "plain")["tokens"]
        wrong = [(token + 1) % self.target.config.vocab_size for token in plain]
        decoder = self._decoder(f"fixed:{width - 1}", Recorded(wrong))
        out = decoder.generate(prompt, repeats + width, eos_ids=())
        return [s.verify_seconds for s in out.steps[1:] if s.drafted == width - 1][:repeats]


if __name__ == "__main__":
    serve(Ours)
