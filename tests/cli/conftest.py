"""What the tests of the command line share."""

from __future__ import annotations

import pytest

from speckv_online.cli.app import main
from tests.support.cli import Run


@pytest.fixture
def speckv(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: object) -> tuple[int, str, str]:
        try:
            code = main([str(a) for a in arguments])
        except SystemExit as e:  # argparse
            code = int(e.code or 0)
        out = capsys.readouterr()
        return code, out.out, out.err

    return run
