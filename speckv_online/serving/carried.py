"""Drafts that travel with the tokens of their step, from vLLM's worker to its scheduler.

After each step the engine asks the worker for the drafts, in a message of its own, also where there are none. Worker
and engine both wait for messages by spinning. On few cores the answer comes a time slice of the system later. Here the
worker puts the drafts into the message that brings the step's tokens.
"""

from __future__ import annotations

import functools
from typing import Any

#: Name of the attribute of vLLM's output that holds the drafts; None where there are none.
DRAFTS = "speckv_drafts"


def send() -> None:
    """Have the workers of this process put drafts into their outputs."""
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    run = _plain(GPUModelRunner.sample_tokens)

    @functools.wraps(run)
    def sample_tokens(runner: Any, *arguments: Any, **named: Any) -> Any:
        ran = runner.execute_model_state is not None
        output = run(runner, *arguments, **named)
        if ran and isinstance(output, ModelRunnerOutput) and runner.parallel_config.world_size == 1:
            drafts = runner.take_draft_token_ids()
            setattr(output, DRAFTS, drafts if drafts is not None and any(drafts.draft_token_ids) else None)
        return output

    sample_tokens.speckv_plain = run  # type: ignore[attr-defined]
    GPUModelRunner.sample_tokens = sample_tokens


def receive() -> None:
    """Have the engines of this process not ask for drafts that a scheduler has already (its ``drafts_came``)."""
    from vllm.v1.engine.core import EngineCore

    run = _plain(EngineCore.post_step)

    @functools.wraps(run)
    def post_step(core: Any, *arguments: Any, **named: Any) -> None:
        if not getattr(core.scheduler, "drafts_came", False):
            run(core, *arguments, **named)

    post_step.speckv_plain = run  # type: ignore[attr-defined]
    EngineCore.post_step = post_step


def _plain(function: Any) -> Any:
    """Return vLLM's own function."""
    return getattr(function, "speckv_plain", function)
