"""The ``speckv`` command. Heavy imports happen inside the commands, so that ``speckv --help`` answers at once."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence

import speckv_online
from speckv_online.cli.jobs import JOBS, run_job
from speckv_online.cli.learned import add_arguments as learned_arguments
from speckv_online.cli.simulate import add_arguments as simulation_arguments
from speckv_online.cli.simulate import run as simulate
from speckv_online.cli.submit import add_arguments as submit_arguments
from speckv_online.cli.submit import run as submit
from speckv_online.console import run_command, say, waiting
from speckv_online.drafters.spec import HELP as DRAFTERS
from speckv_online.errors import UserError
from speckv_online.evaluation.command import add_arguments as evaluation_arguments
from speckv_online.evaluation.command import run as evaluate
from speckv_online.modeling.engine import HELP as ENGINE
from speckv_online.modeling.engine import choose_engine


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if "" not in sys.path:
        sys.path.append("")  # the working directory: a policy of one's own, MODULE:CLASS, is found as with `python -m`
    if argv[:2] == ["models", "quality"]:
        del argv[0]
    if argv and argv[0] in JOBS:
        return run_command("speckv", lambda: run_job(argv[0], argv[1:]))
    arguments = build_parser().parse_args(argv)
    return run_command("speckv", lambda: arguments.command(arguments))


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all subcommands."""
    parser = argparse.ArgumentParser(
        prog="speckv", description="Speculative decoding with a speculation length that is learned online."
    )
    parser.add_argument("--version", action="version", version=f"speckv {speckv_online.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    add = commands.add_parser("generate", help="continue a prompt", description="Continue a prompt with a model pair.")
    add.set_defaults(command=generate)
    add.add_argument("--prompt", required=True, help="what to say to the model; - reads standard input")
    add.add_argument("--pair", default="smollm2", help="named model pair (default: %(default)s)")
    add.add_argument("--target", help="target model: a Hugging Face id, a directory or a GGUF file (with --draft)")
    add.add_argument("--draft", help="draft model with the same tokenizer")
    add.add_argument("--drafter", default="model", metavar="NAME", help=f"{DRAFTERS} (default: %(default)s)")
    text = "compression level of the target (default: a GGUF file's own, else fp16)"
    add.add_argument("--compression", "--level", metavar="LEVEL", help=text)
    add.add_argument("--policy", default="online", help="policy, see `speckv policies` (default: %(default)s)")
    add.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="at most N tokens (default: 64)")
    add.add_argument("--task", default="", help="task label that the policy may use")
    add.add_argument("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    add.add_argument("--engine", help=ENGINE)
    add.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads (default: torch's choice)")
    add.add_argument("--seed", type=int, default=0, help="seed of the policy (default: %(default)s)")
    add.add_argument("--remember", action="store_true", help="start from what earlier runs learnt, and add to it")
    add.add_argument("--json", action="store_true", help="print one JSON object instead of streaming the text")

    add = commands.add_parser("models", help="list model pairs, or prepare one")
    add.set_defaults(command=models)
    add.add_argument("--json", action="store_true", help="print JSON")
    verbs = add.add_subparsers(metavar="[prepare|quality]")
    verbs.add_parser("quality", help=JOBS["quality"], add_help=False)  # main() hands it over
    verb = verbs.add_parser("prepare", help="fetch and convert a pair into the cache")
    verb.set_defaults(command=prepare)
    verb.add_argument("pair", help="name of the pair")

    add = commands.add_parser("policies", help="list policies and their options")
    add.set_defaults(command=policies)
    add.add_argument("--json", action="store_true", help="print JSON")

    add = commands.add_parser("learned", help="list, show or forget what --remember kept")
    learned_arguments(add)

    add = commands.add_parser("evaluate", help="reproduce SpecKV's published evaluation from its records")
    add.set_defaults(command=evaluate)
    evaluation_arguments(add)

    for name, summary in JOBS.items():  # listed here; main() hands them over before their flags are parsed
        commands.add_parser(name, help=summary, add_help=False)

    add = commands.add_parser("simulate", help="replay policies on traces, with what hindsight knows beside them")
    add.set_defaults(command=simulate)
    simulation_arguments(add)

    add = commands.add_parser("submit", help="run a comparison as a job on a Ray cluster and bring its results back")
    add.set_defaults(command=submit)
    submit_arguments(add)

    add = commands.add_parser("report", help="write and show the report of a run, or of several side by side")
    add.set_defaults(command=report)
    add.add_argument("run", metavar="RUN_DIR", nargs="+", help="directory that a run wrote")
    add.add_argument("--out", metavar="DIR", help="where the report of several runs goes (default: report)")
    add.add_argument("--json", action="store_true", help="print JSON")

    add = commands.add_parser("watch", help="show a run while it goes on")
    add.set_defaults(command=watch)
    add.add_argument("run", metavar="RUN_DIR", help="directory that a run is writing")
    add.add_argument("--once", action="store_true", help="show what there is and return")
    add.add_argument("--json", action="store_true", help="print JSON, one object per line")
    add.add_argument("--interval", type=float, default=2.0, metavar="S", help="seconds between looks (default: 2)")
    return parser


def generate(arguments: argparse.Namespace) -> None:
    """Run ``speckv generate``."""
    if arguments.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens must be at least 1, got {arguments.max_new_tokens}")
    if not 0 <= arguments.threads <= 1024:
        raise UserError(f"--threads must be from 1 to 1024, or 0 for torch's choice, got {arguments.threads}")
    engine = choose_engine(arguments.engine)
    try:
        text = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    except UnicodeDecodeError as e:
        raise UserError("the prompt is not UTF-8 text: save it as UTF-8") from e
    if not text.strip():
        raise UserError("the prompt is empty: give some text to --prompt")
    if any("\ud800" <= letter <= "\udfff" for letter in text):  # what Python makes of bytes that are no UTF-8
        raise UserError("the prompt is not UTF-8 text: save it as UTF-8")

    from speckv_online.cli.lean_imports import import_transformers

    import_transformers()
    import torch

    from policies.registry import canonical, make_policy
    from speckv_online.cli.generate import Streamer, as_json, remembered, summary
    from speckv_online.decoding.decoder import SpeculativeDecoder
    from speckv_online.learned.memory import Memory
    from speckv_online.models.pairs import chat_prompt, load_pair
    from speckv_online.models.quiet import quiet_libraries

    quiet_libraries()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    policy = make_policy(arguments.policy, seed=arguments.seed)  # before the models: a typo should show at once
    with waiting("loading the models") if sys.stderr.isatty() else contextlib.nullcontext():
        pair = load_pair(
            arguments.pair,
            level=arguments.compression,
            device=arguments.device,
            target=arguments.target,
            draft=arguments.draft,
            drafter=arguments.drafter,
            engine=engine,
        )
    decoder = SpeculativeDecoder(pair.drafter, policy=policy, target=pair.target, level=pair.level.name)
    if arguments.remember:
        decoder.memory = Memory(decoder.policy, canonical(arguments.policy), arguments.policy)
    streamer = None if arguments.json else Streamer(pair.tokenizer, sys.stdout)
    result = decoder.generate(
        chat_prompt(pair.tokenizer, text), arguments.max_new_tokens, task=arguments.task, on_tokens=streamer
    )
    facts = as_json(result, pair, pair.level.name, arguments.policy) | {"remembered": remembered(decoder.memory)}
    if streamer is None:
        print(json.dumps(facts))
    else:
        streamer.end()
        print(summary(facts))


def models(arguments: argparse.Namespace) -> None:
    """Run ``speckv models``."""
    from speckv_online.models.pairs import list_pairs

    pairs = list_pairs()
    if arguments.json:
        print(json.dumps(pairs))
        return
    for pair in pairs:
        state = f"cached in {pair['path']}" if pair["cached"] else f"not cached: speckv models prepare {pair['name']}"
        print(f"{pair['name']}: {pair['summary']} ({state})")
    print("Any two models with one tokenizer: --target ID_DIR_OR_GGUF --draft ID_DIR_OR_GGUF")


def prepare(arguments: argparse.Namespace) -> None:
    """Run ``speckv models prepare``."""
    from speckv_online.models.pairs import prepare as prepare_pair
    from speckv_online.models.quiet import quiet_libraries

    quiet_libraries()
    say(f"preparing {arguments.pair}")
    print(f"{arguments.pair} is ready in {prepare_pair(arguments.pair, check=True)}")


def policies(arguments: argparse.Namespace) -> None:
    """Run ``speckv policies``."""
    from speckv_online.cli.policies import listing

    print(listing(as_json=arguments.json))


def report(arguments: argparse.Namespace) -> None:
    """Run ``speckv report``."""
    from speckv_online.reporting.report import text_table, to_json, to_text, write_report, write_reports
    from speckv_online.reporting.table import side_by_side

    if len(arguments.run) == 1:
        if arguments.out:
            raise UserError("--out is for several runs: the report of one goes into its own directory")
        found = write_report(arguments.run[0])
        shown = f"{to_text(found)}\nReport: {arguments.run[0].rstrip('/')}/report.html"
        print(json.dumps(to_json(found)) if arguments.json else shown)
        return
    out = arguments.out or "report"
    several = write_reports(arguments.run, out)
    if arguments.json:
        print(json.dumps([to_json(one) for one in several]))
    else:
        print("\n".join(text_table(side_by_side(several))))
        print("".join(f"\n{one.name}: {one.verdict}" for one in several) + f"\nReport: {out.rstrip('/')}/report.html")


def watch(arguments: argparse.Namespace) -> None:
    """Run ``speckv watch``."""
    from speckv_online.reporting.watch import watch as show

    show(arguments.run, once=arguments.once, as_json=arguments.json, interval=arguments.interval)
