"""Every family of causal language models that can be made tiny: decoded as in ``generate``, or refused beforehand.

docs/families.md says which family is which; run this file as a script to write its table anew.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest
import torch

from speckv_online.decoding.decoder import SpeculativeDecoder
from speckv_online.errors import UserError
from tests.support.decoding import Scripted
from tests.support.tiny_families import LEFT_OUT, VOCABULARY, families, tiny_model
from tests.support.tiny_models import perturbed

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
ROWS = {"both": "| alone and in batches |", "single": "| alone only |", "none": "| refused |"}
HEAD = "| decodes | families |\n|---|---|\n"
NEW = 14
LENGTHS = (13, 5)


def prompts() -> list[list[int]]:
    """Return two prompts, the first of which reaches past every window."""
    seeds = [torch.Generator().manual_seed(i) for i in range(len(LENGTHS))]
    return [torch.randint(2, VOCABULARY - 9, (n,), generator=g).tolist() for n, g in zip(LENGTHS, seeds, strict=True)]


def attempt(family: str) -> str:
    """Decode with a family and return where it is right: ``both``, ``single`` (prompts alone) or ``none``.

    What is not refused must be right, and what is refused must not have begun.
    """
    model = tiny_model(family)
    policy, refusals = Scripted([4, 0, 6, 2]), list[str]()
    rows = [torch.tensor([p]) for p in prompts()]
    expected = [
        model.generate(row, attention_mask=torch.ones_like(row), do_sample=False, max_new_tokens=NEW)[0, row.shape[1] :]
        for row in rows
    ]
    try:
        decoder = SpeculativeDecoder(perturbed(model, 0.02), policy=policy, target=model)
        alone = [decoder.generate(p, NEW).tokens for p in prompts()]
    except UserError as error:
        refusals = str(error).splitlines()
    if refusals:
        assert len(refusals) == 1
        assert not policy.contexts  # nothing was decoded
        return "none"
    assert alone == [e.tolist() for e in expected], f"{family}, alone"
    assert decoder.totals.drafted > 0
    asked = len(policy.contexts)
    try:
        together = decoder.decode_batch(prompts(), NEW)
    except UserError as error:
        refusals = str(error).splitlines()
    if refusals:
        assert len(refusals) == 1
        assert "one prompt at a time" in refusals[0]
        assert len(policy.contexts) == asked
        return "single"
    assert [out.tokens for out in together] == alone, f"{family}, in a batch"
    assert not decoder.policy.faults
    return "both"


@cache
def documented() -> dict[str, str]:
    """Return what docs/families.md says of each family."""
    found = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        for kind, start in ROWS.items():
            if line.startswith(start):
                found |= dict.fromkeys(re.findall(r"`([^`]+)`", line), kind)
    return found


def table() -> str:
    """Return the table of docs/families.md, and what follows it."""
    kinds: dict[str, list[str]] = {kind: [] for kind in ROWS}
    for family in families():
        if family not in LEFT_OUT:
            kinds[attempt(family)].append(f"`{family}`")
    rows = [f"{start} {', '.join(kinds[kind])} |" for kind, start in ROWS.items()]
    rest = [f"- `{family}`: {why}." for family, why in LEFT_OUT.items()]
    return HEAD + "\n".join(rows) + "\n\nNot tried:\n\n" + "\n".join(rest) + "\n"


def test_every_family_is_accounted_for() -> None:
    assert sorted([*documented(), *LEFT_OUT]) == families()


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in families() if family not in LEFT_OUT])
def test_family(family: str) -> None:
    assert attempt(family) == documented()[family]


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(text[: text.index(HEAD)] + table(), encoding="utf-8")
