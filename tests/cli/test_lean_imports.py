"""The short way to import transformers: what it leaves out, and that all of it works afterwards."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

#: Imports transformers in the short way, perhaps with a module that is not there, and prints what was found.
SCRIPT = """
import json, sys
from speckv_online.cli import lean_imports
lean_imports._WANTED += tuple({more!r})
lean_imports.import_transformers()
late = ("scipy", "sklearn", "pandas", "torch._dynamo", "torch.distributed.tensor")
found = {{"left out": [name for name in late if name not in sys.modules]}}
found["there"] = "transformers.modeling_utils" in sys.modules
import torch, scipy.optimize, torch._dynamo, torch.distributed
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM
found["distributed"] = torch.distributed.is_available()
found["compiler"] = torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)).item()
sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9)
model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes))
found["tokens"] = len(model.generate(torch.tensor([[1, 2]]), max_new_tokens=3, min_new_tokens=3, do_sample=False)[0])
found["real compiler"] = hasattr(torch._dynamo, "optimize") and torch._dynamo.disable is not None
print(json.dumps(found))
"""


@pytest.mark.parametrize("more", [[], ["no_such_module"]], ids=["as it is", "where the short way fails"])
def test_all_works_afterwards(more: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT.format(more=more)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    if not more:
        assert {"scipy", "torch._dynamo", "torch.distributed.tensor"} <= set(found["left out"])
    assert found["there"] == (not more)
    assert (found["distributed"], found["compiler"], found["tokens"], found["real compiler"]) == (True, 2.0, 5, True)
