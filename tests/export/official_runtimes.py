"""The greedy answer of a bundle's program by ExecuTorch's Python runtime and by its TextLLMRunner: official_runtimes.py BUNDLE"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401  registers llama::*
from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner
from executorch.kernels import quantized  # noqa: F401
from executorch.runtime import Runtime
from tokenizers import Tokenizer

PROMPT, TOKENS = "Once upon a time there was", 24


def by_runtime(bundle: Path, ids: list[int]) -> tuple[list[int], float]:
    """Greedy tokens of `forward`, and the largest difference of its logits from those of `forward_tap`."""
    program = Runtime.get().load_program(bundle / "model.pte", data_path=next(bundle.glob("model.ptd"), None))
    forward, tapped = program.load_method("forward"), program.load_method("forward_tap")
    fed, position, tokens, largest = ids, 0, [], 0.0
    while len(tokens) < TOKENS:
        step = (torch.tensor([fed]), torch.tensor([position]))
        logits = forward.execute(step)[0].clone()
        largest = max(largest, float((tapped.execute(step)[0] - logits).abs().max()))
        position += len(fed)
        tokens.append(int(logits.argmax()))
        fed = tokens[-1:]
    return tokens, largest


def by_runner(bundle: Path) -> str:
    data = [str(path) for path in bundle.glob("model.ptd")]  # a program in a single file has none
    runner = TextLLMRunner(str(bundle / "model.pte"), str(bundle / "tokenizer.json"), *data)
    config = GenerationConfig(echo=False, temperature=0.0, max_new_tokens=TOKENS, num_bos=1)
    pieces: list[str] = []
    runner.generate(PROMPT, config, token_callback=pieces.append)
    return "".join(pieces)


def main(bundle: Path) -> None:
    tokenizer = Tokenizer.from_file(str(bundle / "tokenizer.json"))
    ids = tokenizer.encode(PROMPT).ids
    tokens, largest = by_runtime(bundle, ids)
    text = tokenizer.decode(tokens, skip_special_tokens=False)
    print(json.dumps({"runtime": text, "runner": by_runner(bundle), "largest_difference": largest}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
