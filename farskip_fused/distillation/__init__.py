"""FCSD: a converted model learns from what it was before; and how good either is."""

from farskip_fused.distillation.data import (
    Document,
    read_documents,
    split,
    standard_library,
    token_blocks,
    train_tokenizer,
)
from farskip_fused.distillation.evaluation import Evaluation, evaluate, unigram_cross_entropy
from farskip_fused.distillation.loss import cross_entropy, kl_divergence
from farskip_fused.distillation.trainer import DistillationConfig, DistillationReport, distill

__all__ = [
    "DistillationConfig",
    "DistillationReport",
    "Document",
    "Evaluation",
    "cross_entropy",
    "distill",
    "evaluate",
    "kl_divergence",
    "read_documents",
    "split",
    "standard_library",
    "token_blocks",
    "train_tokenizer",
    "unigram_cross_entropy",
]
