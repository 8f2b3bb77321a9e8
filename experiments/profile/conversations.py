"""Traces of conversations that the target wrote itself: many more than decoding gives in the same time.

Reads the shards that ``python -m experiments.distill --stages generate --work DIR`` writes (128 conversations side by
side), and drafts from every position of their answers. The draft must not have been trained on them: generate them with
a seed of their own. They feed ``python -m experiments.train --more``; policies are judged on hand-written prompts.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experiments.config import launch, option
from experiments.profile.collect import check_request, check_same
from speckv_online.errors import UserError
from speckv_online.io.files import exclusive


@dataclass(frozen=True)
class ConversationsConfig:
    """Settings of ``python -m experiments.profile.conversations``."""

    conversations: str = option("", "folder of shard-*.npz files")
    pair: str = option("smollm2", "named model pair")
    drafter: str = option("model", "what drafts, see python -m experiments.profile")
    limit: int = option(1000, "at most this many conversations")
    threads: int = option(1, "CPU threads")
    out: str = option("runs/conversations", "directory of the traces")

    def __post_init__(self) -> None:
        if not sorted(Path(self.conversations).expanduser().glob("shard-*.npz")) or not self.conversations:
            raise UserError("--conversations wants a folder of shards: python -m experiments.distill --stages generate")
        if self.limit < 1 or self.threads < 1:
            raise UserError("--limit and --threads must be at least 1")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return launch(collect, ConversationsConfig, argv)


def collect(config: ConversationsConfig) -> int:
    """Write a trace per conversation; those that are there already are kept."""
    from speckv_online.io.run_directory import check_writable

    out = Path(config.out).expanduser()
    check_writable(out)
    with exclusive(out):
        request = {"pair": config.pair, "drafter": config.drafter}
        check_request(request, out)
        count = collect_missing(config, out, request)
    print(f"{count} traces: {out}")
    return 0


def collect_missing(config: ConversationsConfig, out: Path, request: dict[str, str]) -> int:
    """Write the traces that are not there yet; return how many there are then."""
    import torch
    from tqdm import tqdm

    from experiments.distill.__main__ import system_prefix
    from experiments.distill.data import ANSWER, load_conversations
    from policies.base import MAX_GAMMA
    from speckv_online.drafters.fingerprint import drafter_fingerprint
    from speckv_online.models.pairs import load_pair
    from speckv_online.profiling.draft_table import draft_table
    from speckv_online.traces.trace import Trace, agreement, prompt_hash

    torch.set_num_threads(config.threads)
    pair = load_pair(config.pair, level="fp16", drafter=config.drafter)
    prefix, eos = system_prefix(pair.tokenizer), pair.tokenizer.eos_token_id
    data = load_conversations(Path(config.conversations).expanduser())
    meta = {
        "target": pair.revision["target"],
        "draft": pair.revision["draft"],
        "draft_fingerprint": drafter_fingerprint(pair.drafter),
        "arithmetic": "fp32, many conversations in one batch",
        "drafter": pair.drafter.names[0],
        "request": request,
    }
    check_same(out / "conversations", meta)
    count = min(len(data), config.limit)
    for i in tqdm(range(count), unit="trace", disable=not sys.stderr.isatty(), file=sys.stderr):
        path = out / "conversations" / f"{i:05d}.npz"
        part = slice(data.offsets[i], data.offsets[i + 1])
        ids, answer = data.ids[part].astype(np.int32), data.role[part] == ANSWER
        prompt, tokens = np.append(np.array(prefix, dtype=np.int32), ids[~answer]), ids[answer]
        if path.exists():
            check_conversation(path, prompt, tokens)
            continue
        drafts, signals, lookups = draft_table(pair.drafter, prompt.tolist(), tokens.tolist(), MAX_GAMMA)
        ended = int(tokens[-1]) == eos
        Trace(
            level="fp16", task="", prompt_id=f"conversation-{i:05d}", split="", prompt=prompt, tokens=tokens,
            drafts=drafts, accepted=agreement(drafts, tokens), signals=signals, lookups=lookups,
            budget=len(tokens) + ended, finish="eos" if ended else "length",
            meta=meta | {"prompt_sha256": prompt_hash(prompt.tolist()), "max_new_tokens": len(tokens)},
        ).save(path)  # fmt: skip
    return count


def check_conversation(path: Path, prompt: np.ndarray, tokens: np.ndarray) -> None:
    """Refuse to go on where a trace is of another conversation."""
    from speckv_online.traces.trace import Trace

    trace = Trace.load(path)
    if not (np.array_equal(trace.prompt, prompt) and np.array_equal(trace.tokens, tokens)):
        raise UserError(f"{path} is the trace of another conversation: give another --out")


if __name__ == "__main__":
    sys.exit(main())
