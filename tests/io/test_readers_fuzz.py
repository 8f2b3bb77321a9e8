"""Readers given damaged files: each reads them, or says in one line that names the file what is wrong."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from policies.acceptance.mlp16 import load_weights
from policies.base import PolicyError
from speckv_online.errors import UserError
from speckv_online.evaluation.release_runs import read_runs
from speckv_online.evaluation.release_steps import COLUMNS, read_rows
from speckv_online.io.csv_rows import read_csv
from speckv_online.io.prompts import read_prompts
from speckv_online.io.run_directory import StepWriter, Unit, read_units
from speckv_online.io.step_records import StepRecord
from speckv_online.simulate.cost_table import RTX3090_RELEASE, load_cost
from speckv_online.traces.trace import Trace
from tests.support.made_traces import made_trace

STEPS = [
    ",".join(COLUMNS),
    "fp16,4,code,0,1,0.25,2,1.5,0.6,2.0,0.4",
    "fp16,4,code,1,4,1.0,5,0.5,0.9,0.75,0.8",
    "fp16,4,code,2,0,0.0,1,2.5,0.4,3.0,0.1",
    "nf4,4,chat,0,2,0.5,3,1.0,0.7,1.5,0.5",
]
RUNS = [
    "compression,gamma,task,prompt,num_tokens,elapsed_sec,tokens_per_sec,mean_acceptance_rate,mean_draft_entropy,"
    "mean_draft_confidence,num_steps",
    'fp16,4,code,"Sort, please",8,0.2,40.0,0.4,1.5,0.6,3',
    "nf4,4,chat,Hello,3,0.1,30.0,0.5,1.0,0.7,1",
]
PROMPTS = [
    '{"task":"chat","prompt":"Hello"}',
    '{"question":"2+2?","answer":"4"}',
    '{"question_id":81,"category":"coding","turns":["Write it","Test it"]}',
]


def npz(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def a_trace(folder: Path) -> bytes:
    return made_trace(3, length=6).save(folder / "whole.npz").read_bytes()


def a_cost(folder: Path) -> bytes:
    return RTX3090_RELEASE.save(folder / "whole.json").read_bytes()


def some_weights(_: Path) -> bytes:
    return npz(W1=np.ones((6, 16)), b1=np.zeros(16), W2=np.ones((16, 1)), b2=np.zeros(1))


def some_records(folder: Path) -> bytes:
    folder = folder / "whole"
    folder.mkdir(exist_ok=True)
    path = folder / "steps-fp16.jsonl"
    path.unlink(missing_ok=True)
    step = StepRecord(0, 4, 4, 1, 2, 2, 1.5, 0.6, 2.0, 0.4, 10, 1.0, 0, 0, 1e-5, 0.01, 0.02, 0.03)
    writer = StepWriter(path)
    writer.write(Unit("fp16", "fixed:4", "p", "chat", 0), [step])
    writer.close()
    return path.read_bytes()


def lines(rows: list[str]) -> Callable[[Path], bytes]:
    return lambda _: "\n".join([*rows, ""]).encode()


#: Name -> (file name, a whole file, its reader).
READERS: dict[str, tuple[str, Callable[[Path], bytes], Callable[[Path], object]]] = {
    "steps": ("steps.csv", lines(STEPS), read_rows),
    "experiments": ("runs.csv", lines(RUNS), read_runs),
    "prompts": ("set.jsonl", lines(PROMPTS), read_prompts),
    "trace": ("t.npz", a_trace, Trace.load),
    "cost": ("cost.json", a_cost, load_cost),
    "weights": ("w.npz", some_weights, load_weights),
    "records": ("steps-fp16.jsonl", some_records, lambda path: read_units(path.parent)),
}
ODD = [
    "",
    "nan",
    "NaN",
    "inf",
    "-1",
    "1e999",
    "9" * 400,
    "two",
    "null",
    "true",
    "[]",
    '"',
    "\x00",
    "\ufeff",
    "é",
    "4.5",
]


def refusal(read: Callable[[Path], object], path: Path) -> str | None:
    """What a reader says against a file; None if it reads it. Any other exception is a bug and passes through."""
    try:
        read(path)
    except (UserError, PolicyError) as error:
        return str(error)
    return None


def damage(draw: st.DrawFn, data: bytes) -> bytes:
    """One or two kinds of damage that files meet in life, and some that only a fuzzer thinks of."""
    for kind in draw(
        st.lists(st.sampled_from(["cut", "bytes", "lines", "cell", "bom", "crlf"]), min_size=1, max_size=2)
    ):
        where = draw(st.integers(0, max(len(data) - 1, 0)))
        if kind == "cut":
            data = data[:where]
        elif kind == "bytes":
            data = data[:where] + draw(st.binary(min_size=1, max_size=4)) + data[where + 1 :]
        elif kind == "lines":
            data = b"\n".join(draw(st.permutations(data.split(b"\n")[:50])))
        elif kind == "cell":
            end = min(
                (i for i in (data.find(c, where) for c in (b",", b"\n", b":", b"}")) if i >= 0), default=len(data)
            )
            data = data[:where] + draw(st.sampled_from(ODD)).encode() + data[end:]
        elif kind == "bom":
            data = b"\xef\xbb\xbf" + data
        else:
            data = data.replace(b"\n", b"\r\n")
    return data


@pytest.mark.parametrize("name", READERS)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_files_are_read_or_refused_in_one_line(tmp_path: Path, name: str, data: st.DataObject) -> None:
    file, make, read = READERS[name]
    path = tmp_path / file
    path.write_bytes(damage(data.draw, make(tmp_path)))
    said = refusal(read, path)
    assert said is None or (str(tmp_path) in said and "\n" not in said and len(said) < 1000)


@pytest.mark.parametrize("name", ["trace", "weights"])
def test_a_refusal_does_not_quote_a_damaged_file_at_length(tmp_path: Path, name: str) -> None:
    """An archive whose first member's name is said to have a thousand characters: zipfile quotes them all."""
    file, make, read = READERS[name]
    path, data = tmp_path / file, bytearray(make(tmp_path))
    data[27] = 4
    path.write_bytes(data)
    said = refusal(read, path)
    assert said is not None
    assert "differ" in said or "..." in said
    assert len(said) < 600


@pytest.mark.parametrize("name", READERS)
def test_whole_files_are_read(tmp_path: Path, name: str) -> None:
    file, make, read = READERS[name]
    (tmp_path / file).write_bytes(make(tmp_path))
    assert read(tmp_path / file)


@pytest.mark.parametrize("kind", ["bom", "crlf", "columns"])
def test_harmless_differences_change_nothing(tmp_path: Path, kind: str) -> None:
    plain, other = tmp_path / "plain.csv", tmp_path / "other.csv"
    plain.write_text("\n".join(STEPS) + "\n")
    text = plain.read_text()
    if kind == "columns":
        cells = [line.split(",") for line in STEPS]
        text = "\n".join(",".join([*row[::-1], "extra"]) for row in cells)
    other.write_bytes((b"\xef\xbb\xbf" if kind == "bom" else b"") + text.replace("\n", "\r\n").encode())
    assert read_rows(other) == read_rows(plain)


@pytest.mark.parametrize(
    ("line", "column", "cell", "said"),
    [
        (3, "gamma", "two", "line 3, column gamma: expected a whole number, got 'two'"),
        (3, "gamma", "", "line 3, column gamma: expected a whole number, got ''"),
        (3, "gamma", "4.5", "line 3, column gamma"),
        (3, "gamma", "9" * 400, "line 3, column gamma"),
        (3, "mean_draft_entropy", "nan", "line 3, column mean_draft_entropy: expected a finite number"),
        (3, "mean_draft_entropy", "1e999", "line 3, column mean_draft_entropy"),
        (3, "min_draft_confidence", "1.5", "line 3, column min_draft_confidence: must be from 0 to 1"),
        (3, "accepted", "-1", "line 3, column accepted: must be from 0 to 4"),
        (3, "acceptance_rate", "0.3", "line 3, column acceptance_rate: 4 of 4 tokens accepted is 1, got 0.3"),
        (3, "acceptance_rate", "", "line 3, column acceptance_rate"),
        (3, "tokens_produced", "6", "line 3, column tokens_produced: must be from 0 to 5, got 6"),
        (3, "step", "7", "line 3, column step: expected 1 or 0, got 7"),
        (5, "step", "1", "line 5, column step: a run must start at step 0"),
    ],
)
def test_a_wrong_cell_is_named_by_line_and_column(tmp_path: Path, line: int, column: str, cell: str, said: str) -> None:
    rows = [row.split(",") for row in STEPS]
    rows[line - 1][COLUMNS.index(column)] = cell
    path = tmp_path / "steps.csv"
    path.write_text("\n".join(map(",".join, rows)))
    with pytest.raises(UserError) as caught:
        read_rows(path)
    assert f"{path} {said}" in str(caught.value)


def test_rows_of_the_wrong_length_and_text_of_the_wrong_kind_are_named(tmp_path: Path) -> None:
    path = tmp_path / "steps.csv"
    for broken, said in (
        ("fp16,4,code", "line 6, column step: missing"),
        (STEPS[1] + ",1", "line 6, column 12: one cell more"),
        ('"fp16,4', "line 6: not valid CSV"),
    ):
        path.write_text("\n".join([*STEPS, broken]))
        with pytest.raises(UserError, match=said):
            read_rows(path)
    path.write_bytes("\n".join([*STEPS, "fp16,4,é"]).encode("latin-1"))
    with pytest.raises(UserError, match="line 6: not UTF-8"):
        read_rows(path)
    path.write_text(",".join([*COLUMNS, "gamma"]))
    with pytest.raises(UserError, match="column gamma: named twice"):
        list(read_csv(path, {"gamma": int}, ("gamma",)))
    path.write_text("")
    with pytest.raises(UserError, match="line 1: the file is empty"):
        read_rows(path)


def test_an_experiment_without_time_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_text("\n".join([RUNS[0], RUNS[1].replace(",0.2,", ",0,")]))
    with pytest.raises(UserError, match="line 2, column elapsed_sec: must be above zero"):
        read_runs(path)


def test_arrays_of_the_wrong_kind_are_no_weights(tmp_path: Path) -> None:
    path = tmp_path / "w.npz"
    good = {"W1": np.ones((6, 16)), "b1": np.zeros(16), "W2": np.ones((16, 1)), "b2": np.zeros(1)}
    for name, value in (
        ("W1", np.full((6, 16), np.nan)),
        ("b1", np.zeros(15)),
        ("W2", np.full((16, 1), "x")),
        ("b2", np.array([None], dtype=object)),
    ):
        path.write_bytes(npz(**(good | {name: value})))
        with pytest.raises(PolicyError, match=r"w\.npz"):
            load_weights(path)


def test_a_cost_file_with_strings_for_seconds_is_refused(tmp_path: Path) -> None:
    document = json.loads(RTX3090_RELEASE.save(tmp_path / "cost.json").read_text())
    for value in ("fast", None, -1, [], float("nan")):
        document["levels"]["nf4"]["draft_seconds"] = value
        (tmp_path / "cost.json").write_text(json.dumps(document))
        with pytest.raises(UserError, match=r"cost\.json"):
            load_cost(tmp_path / "cost.json")
