"""Runs vLLM's load generator, one block per line of standard input. Needs nothing of this project."""

from __future__ import annotations

import argparse
import json
import sys


def main() -> None:
    """Play blocks until the input ends."""
    from vllm.benchmarks import serve

    for line in sys.stdin:
        parser = argparse.ArgumentParser()
        serve.add_cli_args(parser)
        found = serve.main(parser.parse_args(json.loads(line)))
        plain = {key: value for key, value in found.items() if isinstance(value, int | float | str)}
        print("RESULT " + json.dumps(plain), flush=True)


if __name__ == "__main__":
    main()
