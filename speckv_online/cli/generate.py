"""What ``speckv generate`` shows: the text as it comes, and the figures of a generation."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, TextIO

from transformers import PreTrainedTokenizerBase

from speckv_online.decoding.generation import Generation
from speckv_online.learned.memory import Memory
from speckv_online.models.pairs import LoadedPair


class Streamer:
    """Writes text as its tokens come; call it with new token ids.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
    file : text file
        Where the text goes.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, file: TextIO) -> None:
        self.tokenizer, self.file = tokenizer, file
        self.tokens: list[int] = []
        self.shown = ""

    def __call__(self, tokens: list[int]) -> None:
        self.tokens += tokens
        text = decode(self.tokenizer, self.tokens)
        if not text.endswith("\ufffd"):  # else a character is still short of some of its bytes
            self._show(text)

    def end(self) -> None:
        """Write what was held back, and a line end."""
        self._show(decode(self.tokenizer, self.tokens))
        self.file.write("\n")
        self.file.flush()

    def _show(self, text: str) -> None:
        # Bytes that turn out to be no character are replaced as a whole, those shown already too: go on behind them.
        if len(text) > len(self.shown):
            self.file.write(text[len(self.shown) :])
            self.file.flush()
            self.shown = text


def decode(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    """Return the text of tokens, special ones left out."""
    return str(tokenizer.decode(tokens, skip_special_tokens=True))


def as_json(result: Generation, pair: LoadedPair, level: str, policy: str) -> dict[str, Any]:
    """Return a generation as a dict for JSON; times in seconds."""
    steps = result.steps
    parts = {
        "prefill": result.prefill_seconds,
        "draft": sum(s.draft_seconds for s in steps),
        "verify": sum(s.verify_seconds for s in steps),
        "decide": sum(s.decide_seconds for s in steps),
        "learn": sum(s.learn_seconds for s in steps),
    }
    return {
        "text": decode(pair.tokenizer, result.tokens),
        "tokens": len(result.tokens),
        "steps": len(steps),
        "accepted_per_step": [s.accepted for s in steps],
        "gamma_per_step": [s.drafted for s in steps],
        "allowed_per_step": [s.gamma for s in steps],
        "seconds": parts | {"decode": result.decode_seconds, "total": result.seconds},
        "tokens_per_second": result.goodput,
        "kind": "measured",
        "finish": result.finish,
        "token_ids": result.tokens,
        "compression": level,
        "arithmetic": pair.level.arithmetic(pair.device),
        "policy": policy,
        "models": pair.revision,
        "engine": {role: asdict(status) for role, status in pair.engine.items()},
    }


def remembered(memory: Memory | None) -> dict[str, Any] | None:
    """Write what was learnt; return its key, and the steps that it started from and has now. None without a memory."""
    if memory is None:
        return None
    started = memory.steps
    memory.save()
    return {"key": memory.key, "steps_before": started, "steps": memory.steps}


def summary(facts: dict[str, Any]) -> str:
    """Return a generation's figures in one line."""
    seconds, drafted, accepted = facts["seconds"], sum(facts["gamma_per_step"]), sum(facts["accepted_per_step"])
    known = facts["remembered"]
    learnt = f"; started from {known['steps_before']} remembered steps" if known else ""
    return (
        f"[{facts['tokens']} tokens in {facts['steps']} steps, {facts['tokens_per_second']:.1f} tokens/s (measured); "
        f"accepted {accepted} of {drafted} drafted; draft {seconds['draft']:.2f} s, verify {seconds['verify']:.2f} s, "
        f"decide {seconds['decide'] * 1e3:.1f} ms; {facts['compression']}, {facts['policy']}{learnt}]"
    )
