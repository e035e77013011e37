"""examples/serve.py: what vLLM writes after a prompt is what transformers does."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

import torch
import transformers
from vllm.distributed import cleanup_dist_env_and_memory

import farskip_fused as ff
from farskip_fused.conversion import convert_checkpoint
from tests.engines.served import make
from tests.engines.test_vllm_server import write_tokenizer

SCRIPT = Path(__file__).parents[2] / "examples" / "serve.py"
PROMPT = "w5 w17 w101"


def test_a_converted_checkpoint_continues_a_prompt_as_in_transformers(checkpoints: Path, tmp_path: Path) -> None:
    stock, path = make("qwen3_moe", checkpoints, None), tmp_path / "converted"
    write_tokenizer(stock)
    convert_checkpoint(stock, path, layers="last:50%")
    spec = importlib.util.spec_from_file_location("serve", SCRIPT)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    options = {"dtype": "float32", "max_model_len": 64, "max_num_seqs": 1, "enforce_eager": True}
    try:
        text = script.answer(path, PROMPT, 6, **options)
    finally:
        cleanup_dist_env_and_memory()

    tokenizer, model = transformers.AutoTokenizer.from_pretrained(path), ff.load(path, dtype=torch.float32).eval()
    prompt = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    generated = model.generate(prompt, max_new_tokens=6, do_sample=False)
    assert text.split() == tokenizer.decode(generated[0, prompt.shape[1] :], skip_special_tokens=True).split()
    assert text
