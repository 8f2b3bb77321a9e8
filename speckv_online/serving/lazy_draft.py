"""vLLM's drafters, which do not run in a step that drafts nothing; a draft model reads later what it missed.

vLLM itself runs the draft model's first forward in every step, also where no token is asked for: that keeps its cache
complete. On a small target this is a tenth of the step. Here such a step leaves it out. Each request's tokens that the
draft model has read are counted. The next step that drafts has it read the missing ones first, in the same forward.

vLLM's rejection sampler runs in every step, too. Here a step that has nothing to verify samples as without speculation.

This happens in the worker's process: :mod:`speckv_online.serving.vllm_worker` brings it there. It is for one device.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch

from speckv_online.serving import carried

log = logging.getLogger("vllm.speckv")
#: Methods whose drafter may be left out.
METHODS = ("draft_model", "ngram")
#: What vLLM's own way has to take.
NEEDED = {"common_attn_metadata", "num_rejected_tokens_gpu", "target_token_ids", "target_positions"}


class LazyDraft:
    """Runs a draft model only where it drafts.

    Attributes
    ----------
    read : dict of str to int
        How many tokens of each request are in the draft model's cache.
    skips : bool
        Whether a step that drafts nothing leaves the drafter out.
    batch : object
        The runner's ``input_batch`` of the step under way.
    """

    def __init__(self) -> None:
        self.read: dict[str, int] = {}
        self.skips = True
        self.batch: Any = None

    def forget(self, ids: Iterable[str]) -> None:
        """Drop requests whose cache is gone."""
        for id in ids:
            self.read.pop(id, None)

    def propose(self, run: Any, drafter: Any, count: int, arguments: dict[str, Any]) -> torch.Tensor:
        """Draft for a batch; ``run`` is vLLM's own way."""
        cad, rejected = arguments["common_attn_metadata"], arguments["num_rejected_tokens_gpu"]
        batch = self.batch
        ids, at = batch.req_ids, cad.query_start_loc_cpu.tolist()
        tokens, positions = arguments["target_token_ids"], arguments["target_positions"]
        starts = positions[cad.query_start_loc[:-1].long()].tolist()
        missing = [(self.read.get(id, 0), start) for id, start in zip(ids, starts, strict=True)]
        room = drafter.max_num_tokens - len(tokens) - 2 * len(ids)
        parts, places, query = list[torch.Tensor](), list[torch.Tensor](), [0]
        late, reading = [False] * len(ids), 0
        for i, (have, start) in enumerate(missing):
            if have < start:
                late[i] = start - have > room
                if not late[i]:
                    room -= start - have
                    reading += start - have
                    before = torch.from_numpy(batch.token_ids_cpu[i, have:start])
                    parts.append(before.to(tokens.device, tokens.dtype))
                    places.append(torch.arange(have, start, device=positions.device, dtype=positions.dtype))
            parts.append(tokens[at[i] : at[i + 1]])
            places.append(positions[at[i] : at[i + 1]])
            query.append(query[-1] + (0 if late[i] else max(start - have, 0)) + at[i + 1] - at[i])
        if reading:
            lengths = torch.tensor(query, dtype=cad.query_start_loc_cpu.dtype)
            arguments["target_token_ids"], arguments["target_positions"] = torch.cat(parts), torch.cat(places)
            # A draft model of its own gets no hidden states; they only have to be as many.
            hidden = arguments["target_hidden_states"]
            arguments["target_hidden_states"] = hidden[:1].expand(query[-1], *hidden.shape[1:])
            arguments["common_attn_metadata"] = replace(
                cad, query_start_loc=lengths.to(cad.query_start_loc.device), query_start_loc_cpu=lengths,
                num_actual_tokens=query[-1], max_query_len=int(lengths.diff().max()),
            )  # fmt: skip
        found: torch.Tensor = run(drafter, count, **arguments)
        dropped = [0] * len(ids) if rejected is None else rejected.tolist()
        for i, id in enumerate(ids):
            if not late[i]:
                self.read[id] = starts[i] + at[i + 1] - at[i] - dropped[i]
        return found


def install() -> LazyDraft | None:
    """Have vLLM's drafters of this process run lazily; None where this vLLM's are other ones."""
    from vllm.v1.spec_decode.draft_model import DraftModelProposer
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    lazy = LazyDraft()
    run, ask, update, sample = map(
        inspect.unwrap,
        (
            DraftModelProposer.propose, GPUModelRunner.propose_draft_token_ids, GPUModelRunner._update_states,
            GPUModelRunner._sample,
        ),
    )  # fmt: skip
    if NEEDED - set(inspect.signature(run).parameters):
        log.warning("speckv: this vLLM's draft model is not known here: it runs in steps that draft nothing, too")
        return None

    @functools.wraps(run)
    def propose(drafter: Any, num_speculative_tokens: int, **arguments: Any) -> torch.Tensor:
        return lazy.propose(run, drafter, num_speculative_tokens, arguments)

    @functools.wraps(ask)
    def propose_draft_token_ids(runner: Any, scheduler_output: Any, *arguments: Any, **named: Any) -> Any:
        lazy.batch, method = runner.input_batch, runner.speculative_config.method
        if scheduler_output.num_spec_tokens_to_schedule or method not in METHODS or not (lazy.skips and _alone(runner)):
            return ask(runner, scheduler_output, *arguments, **named)
        runner._draft_probs = runner._draft_prob_req_ids = None
        rows = len(runner.input_batch.req_ids)
        if method == "ngram":
            return [[] for _ in range(rows)]
        return torch.empty(rows, 0, device=runner.device, dtype=torch.int64)

    @functools.wraps(update)
    def update_states(runner: Any, scheduler_output: Any) -> Any:
        lazy.forget(scheduler_output.finished_req_ids)
        lazy.forget(scheduler_output.preempted_req_ids or ())
        return update(runner, scheduler_output)

    @functools.wraps(sample)
    def sample_once(runner: Any, logits: Any, spec_decode_metadata: Any) -> Any:
        verifies = spec_decode_metadata is not None and any(spec_decode_metadata.num_draft_tokens)
        return sample(runner, logits, spec_decode_metadata if verifies else None)

    DraftModelProposer.propose = propose
    GPUModelRunner.propose_draft_token_ids = propose_draft_token_ids
    GPUModelRunner._update_states = update_states
    GPUModelRunner._sample = sample_once
    carried.send()
    return lazy


def _alone(runner: Any) -> bool:
    """Whether no other device waits for this one's forwards."""
    config = runner.parallel_config
    return config.world_size == 1 and config.data_parallel_size == 1
