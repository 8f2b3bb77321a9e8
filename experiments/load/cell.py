"""One method and dtype: all contenders' servers, and blocks of load in turns."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from experiments.common.bundled_prompts import bundled
from experiments.common.quiet import Quiet
from experiments.load.blocks import Blocks
from experiments.load.config import NGRAMS, NONE, TABLE, WARM, LoadConfig
from experiments.load.export import export
from experiments.load.server import SCHEDULER, WORKER, Client, Server, environment, interpreter
from speckv_online.errors import UserError
from speckv_online.io.prompts import Prompt
from speckv_online.io.user_cache import cache_dir

log = logging.getLogger(__name__)
#: How often a server that makes a state plays the loads, at most.
WARM_UPS = 4
#: What is kept of a block.
KEPT = (
    "output_throughput", "request_throughput", "median_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "p99_tpot_ms",
    "duration", "completed", "failed", "spec_decode_acceptance_rate", "spec_decode_acceptance_length",
)  # fmt: skip


def loads(config: LoadConfig) -> list[tuple[str, float]]:
    """Return the loads: ``closed`` with requests at a time, ``open`` with arrivals per second."""
    return [("closed", float(n)) for n in config.concurrency] + [("open", float(r)) for r in config.rates]


def in_turns() -> list[Prompt]:
    """Return the held-out prompts of the four tasks, one of each in turns."""
    tasks: dict[str, list[Prompt]] = {}
    for prompt in bundled():
        tasks.setdefault(prompt.task, []).append(prompt)
    return [own[i] for i in range(max(map(len, tasks.values()))) for own in tasks.values() if i < len(own)]


def answers(config: LoadConfig) -> dict[str, int]:
    """Return how many tokens each prompt's answer has: from half of the most to all of them."""
    most, rng = config.output_tokens, random.Random(0)
    lengths = [rng.randint((most + 1) // 2, most) for _ in in_turns()]
    return {prompt.id: n if config.varied else most for prompt, n in zip(in_turns(), lengths, strict=True)}


def write_prompts(config: LoadConfig, path: Path) -> None:
    """Write these prompts for the load generator."""
    tokens = answers(config)
    rows = [{"prompt": prompt.text, "output_tokens": tokens[prompt.id]} for prompt in in_turns()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def models_of(config: LoadConfig) -> tuple[Path, Path]:
    """Return the folders of target and draft, written first where they are missing."""
    return export(Path(config.models) if config.models else cache_dir() / "load-models")


def arguments(
    config: LoadConfig,
    method: str,
    dtype: str,
    contender: str,
    table: list[list[int]],
    steps: str = "",
    state: str = "",
) -> list[str]:
    """Return a contender's arguments of the server; a policy starts from ``state`` and keeps it."""
    target, draft = models_of(config)
    rows = max(int(n) for n in config.concurrency)
    found = [
        "--model", str(target), "--served-model-name", "target", "--dtype", dtype, "--max-model-len", "1024",
        "--max-num-seqs", str(rows), "--gpu-memory-utilization", "0.1", "--no-enable-prefix-caching",
    ]  # fmt: skip
    found += [] if config.compiled else ["--enforce-eager"]
    if contender == NONE:
        return found
    count = int(contender) if contender.isdigit() else config.most_drafts
    if contender == TABLE:
        count = max(k for _, _, k in table) or 1
    about: dict[str, Any] = {"method": method, "num_speculative_tokens": count}
    about |= (
        {"prompt_lookup_min": NGRAMS[0], "prompt_lookup_max": NGRAMS[1]} if method == "ngram" else {"model": str(draft)}
    )
    if contender == TABLE:
        about["num_speculative_tokens_per_batch_size"] = table
    elif not contender.isdigit():
        settings = {"speckv": {"policy": contender.removeprefix(WARM), "steps": steps, "state": state}}
        found += ["--scheduler-cls", SCHEDULER, "--worker-extension-cls", WORKER, "--no-async-scheduling"]
        found += ["--additional-config", json.dumps(settings)]
    return [*found, "--speculative-config", json.dumps(about)]


def tune(blocks: list[dict[str, Any]], names: list[str]) -> list[list[int]]:
    """Return vLLM's table: for each size of the batch the number that was best in closed loop."""
    table: list[list[int]] = []
    first = 1
    for size in sorted({int(b["load"]) for b in blocks if b["loop"] == "closed"}):
        rates = {
            name: geometric_mean(
                b["output_throughput"]
                for b in blocks
                if (b["loop"], int(b["load"]), b["contender"]) == ("closed", size, name)
            )
            for name in names
        }
        best = max(rates, key=rates.__getitem__)
        table.append([first, size, 0 if best == NONE else int(best)])
        first = size + 1
    return table


def settings(config: LoadConfig, method: str, dtype: str) -> dict[str, Any]:
    """Return what a cell's blocks depend on; there may always be more repetitions."""
    names = (
        "contenders", "concurrency", "rates", "requests", "output_tokens", "varied", "most_drafts", "compiled",
        "threads", "gigabytes", "seed", "warm",
    )  # fmt: skip
    return {"method": method, "dtype": dtype} | {name: getattr(config, name) for name in names}


def play(config: LoadConfig, method: str, dtype: str, steps: str = "") -> dict[str, Any]:
    """Run all blocks of a cell; contenders and loads take turns. Policies note their steps in the file ``steps``.

    Blocks that an earlier run has finished are not played again.
    """
    python = interpreter(config.python)
    out = Path(config.out).expanduser() / f"{method}-{dtype}"
    out.mkdir(parents=True, exist_ok=True)
    blocks = Blocks(out / "blocks.jsonl", settings(config, method, dtype))
    write_prompts(config, out / "prompts.jsonl")
    surroundings = environment(config.gigabytes, config.threads)
    tuned = TABLE in config.contenders
    plan = [(name, "closed", float(n), 0) for n in config.concurrency for name in config.fixed()] if tuned else []
    plan += [(*block, repeat) for repeat in range(1, config.repeats + 1) for block in _turns(config, repeat)]
    plan = [block for block in plan if not blocks.has(*block)]
    if len(blocks.found):
        log.info("%s %s: %d blocks are there, %d to come", method, dtype, len(blocks.found), len(plan))
    with ExitStack() as stack:
        quiet = Quiet(config.lock)
        stack.callback(quiet.release)
        client = Client(python, surroundings, out / "generator.log")
        stack.callback(client.stop)
        servers: dict[str, Server] = {}

        def start(name: str, table: list[list[int]]) -> None:
            quiet.share()
            log.info("%s %s: starting %s", method, dtype, name)
            safe = "".join(c if c.isalnum() else "-" for c in name)
            state = out / f"{safe}.npz" if name.startswith(WARM) else None
            given = arguments(config, method, dtype, name, table, steps, str(state or ""))
            if state is not None and not state.exists():
                with _running(python, given, surroundings, out / f"{safe}-before.log") as before:
                    for turn in range(WARM_UPS):  # a state is kept every few seconds
                        for load in map(float, config.concurrency):
                            if not turn or not state.exists():
                                _block(config, client, before, out, "closed", load, 98 - turn)
                if not state.exists():
                    raise UserError(f"the server of '{name}' left no state: see {out / f'{safe}-before.log'}")
            servers[name] = stack.enter_context(_running(python, given, surroundings, out / f"{safe}.log"))
            _block(config, client, servers[name], out, "closed", 4.0, 99)  # warms it up; it does not count

        for name in dict.fromkeys(name for name, _, _, _ in plan if name != TABLE):
            start(name, [])
        for name, loop, load, repeat in plan:
            if name not in servers:
                start(name, tune([b for b in blocks.found if not b["repeat"]], config.fixed()))
            quiet.keep()
            found = _block(config, client, servers[name], out, loop, load, repeat)
            blocks.add({"contender": name, "loop": loop, "load": load, "repeat": repeat} | found)
    table = tune([b for b in blocks.found if not b["repeat"]], config.fixed()) if tuned else []
    played = [block for block in blocks.found if 1 <= block["repeat"] <= config.repeats]
    return {"method": method, "dtype": dtype, "table": table, "blocks": played}


@contextmanager
def _running(python: str, given: list[str], surroundings: dict[str, str], log: Path) -> Iterator[Server]:
    """Start a server, and stop it in the end."""
    server = Server(python, given, surroundings, log)
    try:
        server.wait()
        yield server
    finally:
        server.stop()


def _turns(config: LoadConfig, repeat: int) -> Iterator[tuple[str, str, float]]:
    """Yield contenders and loads of a repetition, in an order that rotates."""
    for i, (loop, load) in enumerate(loads(config)):
        names = config.all_contenders()
        at = (i + repeat) % len(names)
        for name in names[at:] + names[:at]:
            yield name, loop, load


def _block(
    config: LoadConfig, client: Client, server: Server, out: Path, loop: str, load: float, repeat: int
) -> dict[str, Any]:
    """Play a block; all contenders get the same prompts and arrivals in it."""
    count = config.requests + (4 * int(load) if loop == "closed" else 8)
    given = [
        "--base-url", server.url, "--backend", "openai-chat", "--endpoint", "/v1/chat/completions", "--model", "target",
        "--tokenizer", arguments(config, "ngram", "float32", NONE, [])[1], "--dataset-name", "custom", "--dataset-path",
        str(out / "prompts.jsonl"), "--skip-chat-template", "--custom-output-len", "-1",
        "--num-prompts", str(count), "--ignore-eos", "--temperature", "0", "--seed", str(config.seed + repeat),
        "--percentile-metrics", "ttft,tpot", "--metric-percentiles", "50,99", "--disable-tqdm",
    ]  # fmt: skip
    given += ["--max-concurrency", str(int(load))] if loop == "closed" else ["--request-rate", str(load)]
    before = server.counts()
    found = client.run(given)
    after = server.counts()
    kept = {key: found[key] for key in KEPT if key in found}
    return kept | {"counts": {key: value - before.get(key, 0.0) for key, value in after.items()}}
