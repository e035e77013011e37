"""Checkpoints for SGLang's tests and what transformers answers: ``python -m tests.engines.sglang_reference FOLDER``.

A process of the main environment: SGLang wants a transformers that is too old for conversion.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ANSWERS = "answers.json"
CASES = [
    ("deepseek_v2", "farskip", "all"),
    ("deepseek_v3", "farskip", "all"),
    ("qwen3_moe", "farskip", "all"),
    ("deepseek_v3", "attention_only", "all"),
    ("deepseek_v3", "moe_only", "all"),
    ("deepseek_v3", "farskip", "last:50%"),
    ("qwen3_moe", "attention_only", "0:3"),
    ("deepseek_v3", "standard", "all"),
    ("deepseek_v3", None, "all"),
]


def folder_of(family: str, connectivity: str | None, layers: str = "all") -> str:
    return f"{family}-{connectivity}-{layers.replace(':', '-')}"


def main(folder: Path) -> None:
    import torch

    import farskip_fused as ff
    from tests.engines.served import FAMILIES, NEW_TOKENS, make, prompts

    torch.set_num_threads(1)  # the models are too small for more
    # What SGLang asks for and transformers' configurations do not name; on CPU it has this rotary embedding alone.
    asked: dict[str, Any] = {
        "moe_layer_freq": 1,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "mscale": 0.7,
            "mscale_all_dim": 0.7,
        },
    }
    entries = {
        "deepseek_v2": FAMILIES["deepseek_v2"] | asked | {"scoring_func": "softmax"},
        "deepseek_v3": FAMILIES["deepseek_v3"] | asked,
        "qwen3_moe": FAMILIES["qwen3_moe"],
    }
    for family, connectivity, layers in CASES:
        path = make(family, folder, connectivity, layers, entries)
        assert path.name == folder_of(family, connectivity, layers)
        if connectivity in (None, "standard"):
            continue
        model: Any = ff.load(path, dtype=torch.float32).eval()
        answers = []
        for prompt in prompts():
            tokens: list[int] = []
            logprobs = []
            for _ in range(NEW_TOKENS):
                with torch.no_grad():
                    logits = model(torch.tensor([prompt + tokens]), use_cache=False).logits[0, -1]
                logprobs.append(logits.log_softmax(dim=-1).tolist())
                tokens.append(int(logits.argmax()))
            answers.append({"tokens": tokens, "logprobs": logprobs})
        (path / ANSWERS).write_text(json.dumps(answers))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
