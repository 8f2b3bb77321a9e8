"""Distil the default draft: ``python -m experiments.distill [--stages generate,train,export]``.

Every stage reads what the one before left in the working folder, so that each can be run again, or go on after it was
interrupted: ``conversations/shard-*.npz``, ``checkpoint.safetensors``, ``settings.json``. How good the draft is,
:mod:`experiments.profile` says.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import speckv_online
from experiments.distill.data import Conversations, choose_head_ids, load_conversations
from experiments.distill.draft import Draft
from experiments.distill.export import export_draft, write_card
from experiments.distill.generate import generate
from experiments.distill.settings import Settings
from experiments.distill.train import load_checkpoint, train
from speckv_online.console import run_command
from speckv_online.errors import UserError
from speckv_online.io.files import write_atomically
from speckv_online.io.manifest import sha256
from speckv_online.io.user_cache import cache_dir
from speckv_online.models.pairs import load_target, load_tokenizer, prepare

log = logging.getLogger(__name__)

STAGES = ("generate", "train", "export")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; every field of :class:`Settings` is an option."""
    parser = argparse.ArgumentParser(prog="python -m experiments.distill", description=__doc__.splitlines()[0])
    parser.add_argument("--stages", default=",".join(STAGES), help="comma-separated, of: %(default)s")
    parser.add_argument("--work", type=Path, help="working folder (default: distill/PAIR in the cache)")
    parser.add_argument("--out", type=Path, help="draft file to write (default: the one in the package)")
    parser.add_argument("--init", type=Path, help="checkpoint whose weights training starts from")
    parser.add_argument("--shards", type=int, help="train on the first N shards only")
    parser.add_argument(
        "--max-minutes", type=float, default=float("inf"), help="cut the training so that it ends in time"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    for field in dataclasses.fields(Settings):
        flag = "--" + field.name.replace("_", "-")
        if field.name == "kept_layers":
            parser.add_argument(flag, type=lambda s: tuple(map(int, s.split(","))), default=field.default)
        else:
            parser.add_argument(flag, type=type(field.default), default=field.default)
    return parser.parse_args(argv)


def system_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that precede the text of a user's first message."""
    text = str(tokenizer.apply_chat_template([{"role": "user", "content": "\0"}], tokenize=False))
    return list(tokenizer(text.split("\0")[0], add_special_tokens=False).input_ids)


def _write(path: Path, text: str) -> None:
    write_atomically(path, lambda f: f.write(text))


class Distillation:
    """The three stages, with the models and the working folder that they share."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.settings = Settings(**{f.name: getattr(args, f.name) for f in dataclasses.fields(Settings)})
        self.work: Path = args.work or cache_dir() / "distill" / self.settings.pair
        self.out: Path = (
            args.out or Path(speckv_online.__file__).parent / "data" / f"draft-{self.settings.pair}.safetensors"
        )
        self.checkpoint = self.work / "checkpoint.safetensors"
        self.folder = prepare(self.settings.pair)
        self.tokenizer = load_tokenizer(str(self.folder))
        self.target: PreTrainedModel = load_target(self.folder, "fp32", "cpu")

    def generate(self) -> None:
        """Write conversations until there are enough answer tokens; a file ``STOP`` in the working folder ends it."""
        generate(
            self.target,
            self.tokenizer,
            self.work / "conversations",
            answer_tokens=self.settings.answer_tokens,
            seed=self.settings.generation_seed,
            stop_file=self.work / "STOP",
        )

    def _draft(self, data: Conversations, head_ids: torch.Tensor | None = None) -> Draft:
        if head_ids is not None:  # going on: the head must stay what it was
            return Draft(self.target, self.settings.kept_layers, head_ids.numpy())
        special = [i for i in self.tokenizer.all_special_ids if i is not None]
        head = choose_head_ids(data, self.target.config.vocab_size, self.settings.head_size, special)
        return Draft(self.target, self.settings.kept_layers, head)

    def _trained(self) -> tuple[Draft, dict[str, Any]]:
        if not self.checkpoint.exists():
            raise UserError(f"no checkpoint in {self.work}: run the stage train first")
        tensors, notes = load_checkpoint(self.checkpoint)
        draft = Draft(self.target, notes["settings"]["kept_layers"], tensors["head_ids"].numpy())
        draft.load_trained(tensors)
        return draft.eval(), notes

    def train(self) -> None:
        """Train from the pruned layers, from ``--init``, or from the checkpoint of a run that was interrupted."""
        shards = self.args.shards or len(list((self.work / "conversations").glob("shard-*.npz")))
        tensors: dict[str, torch.Tensor] = {}
        if self.checkpoint.exists():
            tensors, notes = load_checkpoint(self.checkpoint)
            shards = notes["shards"]
            if notes["settings"] != self.settings.as_dict():
                raise UserError(f"{self.checkpoint} was made with other settings: move it away, or repeat its settings")
        data = load_conversations(self.work / "conversations", shards)
        draft = self._draft(data, tensors.get("head_ids"))
        if self.args.init:
            draft.load_trained(load_checkpoint(self.args.init)[0])
        _write(self.work / "settings.json", json.dumps(self.settings.as_dict(), indent=1))
        train(
            draft, data, system_prefix(self.tokenizer), self.settings, self.checkpoint,
            shards=shards,
            init=self.args.init.name if self.args.init else "", max_seconds=self.args.max_minutes * 60,
        )  # fmt: skip

    def export(self) -> None:
        """Write the draft file and its card."""
        draft, notes = self._trained()
        export_draft(draft, notes["settings"]["pair"], self.out)
        write_card(
            self.out.with_suffix(".json"),
            notes,
            sha256(self.folder / "model.safetensors"),
            sha256(self.out),
        )
        log.info("wrote %s (%.1f MB) and its card", self.out, self.out.stat().st_size / 1e6)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the chosen stages and return the exit code."""
    args = parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads)
    return run_command("distill", lambda: distil(args))


def distil(args: argparse.Namespace) -> None:
    """Run the chosen stages."""
    stages = args.stages.split(",")
    if unknown := set(stages) - set(STAGES):
        raise UserError(f"unknown stage {sorted(unknown)[0]!r}: choose of {', '.join(STAGES)}")
    run = Distillation(args)
    for stage in stages:
        log.info("stage %s", stage)
        getattr(run, stage)()


if __name__ == "__main__":
    sys.exit(main())
