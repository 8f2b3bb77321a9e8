"""llama.cpp through ``llama-cpp-python``: its own forwards, with the loops of speculation around them.

Choosing the likeliest token is numpy's ``argmax`` here, which takes less than llama.cpp's own samplers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from time import perf_counter
from typing import Any

import numpy as np

from experiments.bench.llamacpp.worker import serve
from speckv_online.errors import UserError

MISSING = "llama.cpp is not installed: pip install 'speckv-online[peers]' (it compiles for some minutes)"
#: Most tokens of a forward.
WIDEST = 512
#: Lengths of the suffix that a lookup looks for, the longest first.
SUFFIXES = (4, 3, 2)


class Context:
    """One sequence of one model."""

    def __init__(self, lib: Any, model: Any, length: int, threads: int, flash: bool) -> None:
        self.lib = lib
        settings = lib.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = length, WIDEST, WIDEST
        settings.n_threads = settings.n_threads_batch = threads
        settings.flash_attn_type = int(flash)
        settings.no_perf = True
        self.context = lib.llama_init_from_model(model, settings)
        if not self.context:
            raise UserError("llama.cpp makes no context")
        self.memory = lib.llama_get_memory(self.context)
        self.vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
        self.batch = lib.llama_batch_init(WIDEST, 0, 1)
        for i in range(WIDEST):
            self.batch.n_seq_id[i], self.batch.seq_id[i][0] = 1, 0
        self.tokens = list[int]()

    def read(self, tokens: Sequence[int], rows: int = 1) -> list[np.ndarray]:
        """Read tokens; return the logits after each of the last ``rows``."""
        if len(tokens) > WIDEST:
            raise UserError(f"a prompt of {len(tokens)} tokens is too long here: at most {WIDEST}")
        batch, held, first = self.batch, len(self.tokens), len(tokens) - rows
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = token, held + i, i >= first
        if code := self.lib.llama_decode(self.context, batch):
            raise UserError(f"llama.cpp's forward failed with code {code}")
        self.tokens += tokens
        given = (self.lib.llama_get_logits_ith(self.context, i) for i in range(first, len(tokens)))
        return [np.ctypeslib.as_array(row, shape=(self.vocabulary,)) for row in given]

    def keep(self, count: int) -> None:
        """Forget all tokens but the first ``count``."""
        if count < len(self.tokens):
            self.lib.llama_memory_seq_rm(self.memory, 0, count, -1)
            del self.tokens[count:]

    def close(self) -> None:
        """Free it."""
        self.lib.llama_batch_free(self.batch)
        self.lib.llama_free(self.context)


class Lookup:
    """Proposes what followed the latest occurrence of the text's longest suffix."""

    def __init__(self) -> None:
        self.seen, self.read = dict[tuple[int, ...], int](), 0

    def propose(self, text: list[int], count: int) -> list[int]:
        """Return at most ``count`` tokens that may follow."""
        for end in range(self.read, len(text)):
            for size in SUFFIXES:  # what ends before the latest token: it has a follower
                self.seen[tuple(text[max(end - size, 0) : end])] = end
        self.read = len(text)
        for size in SUFFIXES:
            if (at := self.seen.get(tuple(text[-size:]))) is not None and len(text) > size:
                return text[at : at + count]
        return []


class LlamaCpp:
    """A GGUF file in llama.cpp, and the file of a draft."""

    def __init__(self, file: str, draft: str | None, length: int, threads: int, flash: bool = False) -> None:
        try:
            import llama_cpp
        except ModuleNotFoundError as e:
            raise UserError(MISSING) from e
        except Exception as e:  # libraries that were built for another machine, or are not found
            raise UserError(f"llama.cpp cannot be loaded: {' '.join(str(e).split())[:300]}") from e
        self.lib: Any = llama_cpp
        self._quiet = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self.models = [self._load(name) for name in (file, draft) if name]
        self.length, self.contexts = length, list[Context]()
        self.set(threads, flash)

    def _load(self, file: str) -> Any:
        settings = self.lib.llama_model_default_params()
        settings.n_gpu_layers = 0
        if not (model := self.lib.llama_model_load_from_file(file.encode(), settings)):
            raise UserError(f"llama.cpp does not load {file}")
        return model

    def set(self, threads: int, flash: bool) -> None:
        """Decode on so many threads from now on, with flash attention or without."""
        for context in self.contexts:
            context.close()
        self.contexts = [Context(self.lib, model, self.length, threads, flash) for model in self.models]

    def about(self) -> dict[str, str]:
        """Return versions, and what it was compiled for."""
        system = self.lib.llama_print_system_info().decode()
        on = [part.split(" = ")[0].strip() for part in system.split(":", 1)[-1].split("|") if part.endswith("= 1 ")]
        return {"llama-cpp-python": self.lib.__version__, "compiled for": " ".join(on)}

    def generate(self, prompt: list[int], tokens: int, mode: str, text: list[int] | None = None) -> dict[str, Any]:
        """Decode greedily: ``plain``, or with ``lookup:4``, ``draft:4``, ``draft:4:0.75``, ``perfect:4`` tokens.

        A draft ends before a token that it gives less than the probability after its length. ``perfect`` proposes
        ``text``.
        """
        kind, _, rest = mode.partition(":")
        length, _, chance = rest.partition(":")
        count, least = int(length or 0), float(chance or 0)
        target, lookup, out = self.contexts[0], Lookup(), list[int]()
        for context in self.contexts:
            context.keep(0)
        started = perf_counter()
        out.append(int(target.read(prompt)[0].argmax()))
        if kind == "draft":
            self.contexts[1].read(prompt)
        first, drafted, steps = perf_counter(), 0, 0
        while len(out) < tokens:
            room = min(count, tokens - len(out) - 1)
            if kind == "lookup":
                proposed = lookup.propose(prompt + out, room)
            elif kind == "draft":
                proposed = self._draft([*prompt, *out], room, least)
            else:
                proposed = (text or [])[len(out) : len(out) + room]
            rows = target.read([out[-1], *proposed], 1 + len(proposed))
            for proposal, row in zip([*proposed, -1], rows, strict=True):
                out.append(int(row.argmax()))
                if out[-1] != proposal:
                    break
            target.keep(len(prompt) + len(out) - 1)
            drafted, steps = drafted + len(proposed), steps + 1
        ended = perf_counter()
        return {
            "tokens": out, "prompt_seconds": first - started, "seconds": ended - first, "decoded": len(out) - 1,
            "drafted": drafted, "steps": steps,
        }  # fmt: skip

    def _draft(self, text: list[int], count: int, least: float) -> list[int]:
        """Let the draft propose tokens."""
        draft, proposed = self.contexts[1], list[int]()
        same = 0
        for a, b in zip(draft.tokens, text[:-1], strict=False):
            if a != b:
                break
            same += 1
        draft.keep(same)
        unread = text[same:]
        while len(proposed) < count:
            row = draft.read(unread)[0]
            token = int(row.argmax())
            if least and 1.0 / np.exp(row - row[token]).sum() < least:
                break
            proposed.append(token)
            unread = [token]
        return proposed

    def forwards(self, prompt: list[int], width: int, repeats: int) -> list[float]:
        """Return the seconds of forwards of ``width`` tokens behind a prompt, their likeliest tokens included."""
        target, seconds = self.contexts[0], list[float]()
        target.keep(0)
        target.read(prompt)
        for _ in range(repeats):
            started = perf_counter()
            for row in target.read(prompt[-width:], width):
                row.argmax()
            seconds.append(perf_counter() - started)
            target.keep(len(prompt))
        return seconds


if __name__ == "__main__":
    serve(LlamaCpp)
