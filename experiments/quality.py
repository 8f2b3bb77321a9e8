"""What compression levels cost in quality: agreement of the next token with fp16, and KL.

All positions of some prompts are read at each level and at the reference: fp16, or for a GGUF file the file
de-quantized to fp32. What was measured is kept in the cache, and reports of later comparisons show it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from experiments.config import launch, option
from speckv_online.errors import UserError


@dataclass(frozen=True)
class QualityConfig:
    """Settings of ``python -m experiments.quality``."""

    pair: str = option("smollm2", "named model pair, see `speckv models`")
    target: str | None = option(None, "target model: a Hugging Face id, a directory or a GGUF file")
    levels: tuple[str, ...] = option((), "levels, comma separated (default: int8, nf4 and a file's own)")
    prompts: int = option(16, "how many of the bundled held-out prompts")
    device: str = option("auto", "auto, cpu or cuda")
    again: bool = option(False, "measure what is known already, too")
    json: bool = option(False, "print JSON instead of text")

    def __post_init__(self) -> None:
        if self.prompts < 1:
            raise UserError(f"--prompts must be at least 1, got {self.prompts}")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return launch(run, QualityConfig, argv)


def run(config: QualityConfig) -> int:
    """Measure what is not known, and print."""
    from experiments.common.bundled_prompts import bundled
    from speckv_online.io.prompts import choose
    from speckv_online.models.gguf_file import is_gguf
    from speckv_online.models.pairs import at_level, chat_prompt, load_target, load_tokenizer, prepare
    from speckv_online.models.quality import keep_quality, known_quality, measure
    from speckv_online.models.quiet import quiet_libraries

    quiet_libraries()
    file = config.target is not None and is_gguf(config.target)
    usual = (at_level(config.pair, config.target, None)[0].name,) if file else ("int8", "nf4", "q4_1")
    levels = config.levels or (usual if config.target is None or file else ("int8", "nf4"))
    for level in levels:  # a typo should show at once
        at_level(config.pair, config.target, level)
    known = {level: None if config.again else known_quality(config.pair, config.target, level) for level in levels}
    missing = [level for level, quality in known.items() if quality is None]
    if missing:
        source = config.target or str(prepare(config.pair))
        tokenizer = load_tokenizer(source)
        prompts = [chat_prompt(tokenizer, prompt.text) for prompt in choose(bundled(), config.prompts, 0)]
        name = "the de-quantized file" if file else "fp16"
        reference = load_target(source, None if file else "fp16", config.device, "off")
    for level in missing:
        model = load_target(source, level, config.device, "auto")
        measured = measure(model, reference, name, prompts)
        keep_quality(config.pair, config.target, level, measured)
        known[level] = measured
        del model
    if config.json:
        print(json.dumps({level: asdict(quality) for level, quality in known.items() if quality is not None}))
    else:
        for level, quality in known.items():
            print(f"{level}: {quality}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
