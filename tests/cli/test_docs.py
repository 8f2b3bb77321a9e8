"""The documents name commands, flags, modules and files that exist; guides have short sentences. Nothing is run."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path

import pytest

from experiments.config import add_options
from experiments.distill.__main__ import parse as parse_distill
from speckv_online.cli.app import build_parser
from speckv_online.cli.jobs import JOBS

ROOT = Path(__file__).parents[2]
DOCS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
#: Documents that say what to do: all but what experiments write, and the notes on what was tried.
GUIDES = [path for path in DOCS if path.parent in (ROOT, ROOT / "docs") and path.name != "results.md"]
PLACES = [*DOCS, ROOT / "Makefile", *sorted((ROOT / "experiments" / "configs").glob("*.yaml"))]


def commands(path: Path) -> Iterator[list[str]]:
    """Yield the words of each command of ours in code blocks, `backticks`, recipes and comments."""
    fenced = False
    for line in path.read_text(encoding="utf-8").replace("\\\n", " ").split("\n"):
        fenced ^= line.startswith("```")
        code = fenced or path.suffix != ".md" or line.startswith("    ")
        for text in [line] if code and "`" not in line else re.findall(r"`([^`]*)`", line):
            if found := re.search(r"python -m (experiments[\w.]*)(.*)|(?<!\w)speckv (\w+)(.*)", text):
                # Variables of make may hold flags, and an ellipsis without quotes stands for some.
                flags = re.sub(r"\$\(\w+\)(?!/)| …(?= |$)", "", found[2] or found[4] or "")
                yield [found[1] or f"speckv {found[3]}", *shlex.split(flags, comments=True)]


def parse(name: str, flags: list[str]) -> None:
    """Parse a command as it would be on the command line; one without flags may be a mention only."""
    verb = name.removeprefix("speckv ")
    if name != verb and verb not in JOBS:
        build_parser().parse_args([verb, *(flags or ["--help"])])
        return
    name = f"experiments.{verb}" if name != verb else name
    module = importlib.import_module(name)
    if hasattr(module, "__path__"):
        module = importlib.import_module(f"{name}.__main__")
    if name == "experiments.distill":
        parse_distill(flags)
    elif name != "experiments.distill.plot":
        (config,) = (c for c in vars(module).values() if is_dataclass(c) and f"``python -m {name}``" in str(c.__doc__))
        parser = argparse.ArgumentParser(allow_abbrev=False)
        add_options(parser, config)
        parser.parse_args(flags)


@pytest.mark.parametrize("path", PLACES, ids=lambda path: path.name)
def test_commands_parse(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, *flags in commands(path):
        try:
            parse(name, flags)
        except (SystemExit, ImportError) as error:
            if getattr(error, "code", 2):
                pytest.fail(f"{name} {shlex.join(flags)}: {error} {capsys.readouterr().err}")


def test_links_lead_somewhere() -> None:
    for doc in DOCS:
        for target, anchor in re.findall(r"\]\((?!http)([^)#\s]*)#?([^)\s]*)\)", doc.read_text(encoding="utf-8")):
            file = (doc.parent / target) if target else doc
            assert file.exists(), f"{doc.name}: {target}"
            if anchor:
                heads = re.findall(r"^#+ (.*)", file.read_text(encoding="utf-8"), re.MULTILINE)
                slugs = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}
                assert anchor in slugs, f"{doc.name}: {target}#{anchor}"


def test_files_and_folders_are_there() -> None:
    for doc in DOCS:
        text = doc.read_text(encoding="utf-8")
        for path in re.findall(r"`((?:policies|speckv_online|experiments|tests|docs)/[\w./-]*)(?:::\w+)?`", text):
            assert (ROOT / path).exists(), f"{doc.name}: {path}"


def prose(path: Path) -> Iterator[str]:
    """Yield the paragraphs and list items of a document, without code, tables, headings and pictures."""
    text = re.sub(r"```.*?```|<!--.*?-->", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    text = re.sub(r"^\s*\|.*$|^#.*$|^    .*$|!\[.*?\]\(.*?\)", "", text, flags=re.MULTILINE)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    for block in re.split(r"\n\s*\n|\n\s*[-*] |\n\s*\d+\. ", text):
        if block.strip():
            yield " ".join(block.split())


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.name)
def test_guides_have_short_sentences_and_paragraphs(path: Path) -> None:
    for block in prose(path):
        long = [s for s in re.split(r"(?<=[.!?:;])\s+", block) if len(s.split()) > 30]
        assert not long, f"more than 30 words: {long[0]}"
        assert len(re.split(r"(?<=[.!?])\s+", block)) <= 5, f"more than five sentences: {block[:90]}"
