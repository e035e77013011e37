"""What bench/recovery.py works on: Python source of this machine, and two models that are trained on it here."""

from __future__ import annotations

import importlib.util
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, DeepseekV3Config, DeepseekV3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from farskip_fused.conversion import moe_blocks
from farskip_fused.distillation import read_documents, split, standard_library, token_blocks, train_tokenizer
from farskip_fused.distillation.data import Document
from farskip_fused.distillation.tasks import training_documents

# Packages whose source is read where they are installed, beside the standard library.
PACKAGES = ("torch", "transformers", "numpy", "sympy", "scipy", "pandas", "sklearn", "networkx", "matplotlib", "jax")
SKIPPED = ("tests", "test", "testing", "_vendor", "__pycache__")


@dataclass(frozen=True)
class Sizes:
    """How large everything is; ``FULL`` is for one H100, ``TOY`` for a try on a processor.

    solved: documents of solved small functions in the text. recovery_tokens: of each recovery, whose batch is
    ``recovery_batch``. teacher_seconds: of training each model.
    """

    vocabulary: int = 8192
    text_bytes: int = 120_000_000
    solved: int = 60_000
    block_length: int = 1024
    validation_blocks: int = 192
    tasks: int = 1000
    hidden: int = 512
    layers: int = 12
    experts: int = 32
    top_k: int = 4
    intermediate: int = 256
    teacher_batch: int = 2**16
    teacher_seconds: tuple[float, float] = (270.0, 180.0)
    teacher_rate: float = 1e-3
    recovery_tokens: int = 5_000_000
    recovery_batch: int = 2**15
    micro_batch: int = 2**15
    swept_rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3)
    sweep_tokens: int = 1_000_000
    seeds: int = 3


FULL = Sizes()
TOY = Sizes(
    vocabulary=384, text_bytes=1_000_000, solved=99, block_length=64, validation_blocks=8, tasks=8, hidden=32, layers=4,
    experts=4, top_k=2, intermediate=16, teacher_batch=256, teacher_seconds=(4.0, 2.0), recovery_tokens=1024,
    recovery_batch=256, micro_batch=256, swept_rates=(1e-3, 3e-3), sweep_tokens=512, seeds=2,
)  # fmt: skip


@dataclass(frozen=True)
class Corpus:
    """Blocks of token ids [N, T], the tokenizer that made them, and where the text is from."""

    tokenizer: Any
    training: Tensor
    validation: Tensor
    sources: dict[str, int]


def corpus(folder: Path, sizes: Sizes) -> Corpus:
    """Read and tokenized once, then from ``folder``."""
    file = folder / "corpus.pt"
    if not file.exists():
        documents, sources = _documents(sizes)
        training, validation = split(documents)
        solved = training_documents(sizes.solved)
        tokenizer = train_tokenizer(training[:2000] + solved[: sizes.solved // 10], sizes.vocabulary)
        tokenizer.save_pretrained(folder / "tokenizer")
        mixed = [*training, *solved]
        random.Random(0).shuffle(mixed)
        held_out = token_blocks(validation, tokenizer, sizes.block_length)
        choice = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(0))[: sizes.validation_blocks]
        torch.save((token_blocks(mixed, tokenizer, sizes.block_length), held_out[choice], sources), file)
    training_blocks, validation_blocks, sources = torch.load(file)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    return Corpus(tokenizer, training_blocks, validation_blocks, sources)


def _documents(sizes: Sizes) -> tuple[list[Document], dict[str, int]]:
    """Distinct documents up to the wanted size, and how many bytes are of which package."""
    found: dict[str, Document] = {}
    sources: dict[str, int] = {}
    for name in ("standard library", *PACKAGES):
        if sum(sources.values()) >= sizes.text_bytes:
            break
        for document in standard_library() if name == "standard library" else _package(name):
            if sum(sources.values()) < sizes.text_bytes and document.digest not in found:
                found[document.digest] = document
                sources[name] = sources.get(name, 0) + len(document.text)
    return list(found.values()), sources


def _package(name: str) -> list[Document]:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        return []
    return read_documents(spec.submodule_search_locations[0], "*.py", SKIPPED)


def build(shape: str, sizes: Sizes, end_of_text: int) -> Any:
    """A randomly initialised model in bfloat16: "deepseek" with a shared expert, "qwen" without, half as large."""
    torch.manual_seed(0)
    common: dict[str, Any] = {
        "vocab_size": sizes.vocabulary, "num_experts_per_tok": sizes.top_k, "max_position_embeddings": 2048,
        "moe_intermediate_size": sizes.intermediate, "bos_token_id": end_of_text, "eos_token_id": end_of_text,
        "initializer_range": 0.02,
    }  # fmt: skip
    if shape == "deepseek":
        heads = max(2, sizes.hidden // 64)
        head = sizes.hidden // heads
        model: Any = DeepseekV3ForCausalLM(
            DeepseekV3Config(
                **common, hidden_size=sizes.hidden, intermediate_size=4 * sizes.hidden, num_hidden_layers=sizes.layers,
                first_k_dense_replace=1, num_attention_heads=heads, num_key_value_heads=heads, q_lora_rank=None,
                kv_lora_rank=sizes.hidden // 2, qk_nope_head_dim=head // 2, qk_rope_head_dim=head // 2, v_head_dim=head,
                n_routed_experts=sizes.experts, n_shared_experts=1, n_group=1, topk_group=1, routed_scaling_factor=1.0,
            )
        )  # fmt: skip
    else:
        hidden, heads = sizes.hidden * 3 // 4, max(2, sizes.hidden // 128)
        common |= {"head_dim": hidden // heads // 2}
        model = Qwen3MoeForCausalLM(
            Qwen3MoeConfig(
                **common, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=sizes.layers * 2 // 3,
                num_attention_heads=2 * heads, num_key_value_heads=heads,
                num_experts=sizes.experts // 2,
            )
        )  # fmt: skip
    model.to(torch.bfloat16)
    for _, block in moe_blocks(model):
        if hasattr(block.gate, "e_score_correction_bias"):  # moved in steps that bfloat16 would round away
            block.gate.e_score_correction_bias = block.gate.e_score_correction_bias.float()
    return model
