"""Tiny random checkpoints of the families that engines serve, what transformers says of them, and what vLLM says."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

import farskip_fused as ff

COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# Sizes that vLLM's latent attention has kernels for.
DEEPSEEK: dict[str, Any] = {
    "moe_intermediate_size": 64,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 1.5,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v2": DEEPSEEK | {"topk_method": "group_limited_greedy", "q_lora_rank": None},
    # What vLLM asks of the router, transformers' configuration does not name.
    "deepseek_v3": DEEPSEEK
    | {"q_lora_rank": 64, "norm_topk_prob": True, "topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    "llama4_text": {
        "intermediate_size": 64,
        "intermediate_size_mlp": 96,
        "num_local_experts": 8,
        "num_experts_per_tok": 1,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "interleave_moe_layer_step": 1,
        "attention_chunk_size": 64,
        "attn_temperature_tuning": False,
    },
    "qwen3_moe": {
        "moe_intermediate_size": 64,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 2,
        "head_dim": 32,
    },
}
NEW_TOKENS = 6


class Answer(NamedTuple):
    """tokens: the greedy ones; logprobs: of each, those of the likeliest tokens by id."""

    tokens: list[int]
    logprobs: list[dict[int, float]]


def make(
    family: str,
    folder: Path,
    connectivity: str | None,
    layers: str = "all",
    entries: dict[str, dict[str, Any]] = FAMILIES,
) -> Path:
    """The checkpoint of a family's random model, the same weights at every call; unconverted without connectivity.

    entries: each family's configuration, beyond ``COMMON``.
    """
    path = folder / f"{family}-{connectivity}-{layers.replace(':', '-')}"
    if not path.exists():
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(family, **(COMMON | entries[family]))
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                torch.nn.init.uniform_(buffer, 0.0, 0.2)
        if connectivity is not None:
            ff.convert(model, connectivity, layers)
        model.save_pretrained(path)
    return path


def prompts() -> list[list[int]]:
    """Of several lengths, some longer than what vLLM is told to compute at once."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 120, (length,), generator=generator).tolist() for length in (5, 40, 17, 70, 1)]


def serve(path: Path, *, eager: bool = True, traces: Path | None = None, **options: Any) -> list[Answer]:
    """vLLM's answers to ``prompts``, in float32, from an engine of its own in this process.

    traces: where the profiler shall write what each rank ran.
    """
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    # vLLM 0.32's rotary kernel for CPUs takes the heads of latent attention for contiguous, which they are not. Without
    # its kernels it computes in torch, as it does when it compiles.
    options = {"compilation_config": {"custom_ops": ["none"]}, "block_size": 32, "max_num_batched_tokens": 32} | options
    if traces is not None:
        options["profiler_config"] = {
            "profiler": "torch",
            "torch_profiler_dir": str(traces),
            "torch_profiler_use_gzip": False,
            "torch_profiler_with_stack": False,  # of interpreted kernels it would be gigabytes
        }
    engine = LLM(
        str(path),
        dtype="float32",
        enforce_eager=eager,
        skip_tokenizer_init=True,
        max_model_len=128,
        max_num_seqs=4,
        **options,
    )
    how = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, logprobs=4, detokenize=False, ignore_eos=True)
    try:
        if traces is not None:
            engine.start_profile()
        outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts()], how, use_tqdm=False)
        if traces is not None:
            engine.stop_profile()
        return [
            Answer(
                list(output.outputs[0].token_ids),
                [{token: entry.logprob for token, entry in step.items()} for step in output.outputs[0].logprobs],
            )
            for output in outputs
        ]
    finally:
        del engine
        cleanup_dist_env_and_memory()
        torch._dynamo.reset()
        gc.collect()


def assert_same_answers(answers: list[Answer], path: Path) -> None:
    """As transformers computes them, from the whole sequence at once: greedy tokens and float32 log-probabilities."""
    converted = "farskip" in json.loads((path / "config.json").read_text())
    load = ff.load if converted else transformers.AutoModelForCausalLM.from_pretrained
    model: Any = load(path, dtype=torch.float32).eval()
    for prompt, answer in zip(prompts(), answers, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer.tokens]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(dim=-1)
        assert_same_answer(answer, expected.argmax(dim=-1).tolist(), expected)


def assert_same_answer(answer: Answer, tokens: list[int], logprobs: torch.Tensor) -> None:
    """Greedy tokens, and of the likeliest the log-probabilities. logprobs: [tokens, vocabulary], float32."""
    assert answer.tokens == tokens
    for step, values in zip(answer.logprobs, logprobs, strict=True):
        ids = list(step)
        torch.testing.assert_close(torch.tensor([step[i] for i in ids]), values[ids], rtol=0, atol=1e-4)
