"""FCSD: a converted model learns from what it was before; and how good either is."""

from farskip_fused.distillation.blocks import Blocks
from farskip_fused.distillation.config import PRESETS, DistillationConfig
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
from farskip_fused.distillation.report import DistillationReport
from farskip_fused.distillation.saving import save_trained
from farskip_fused.distillation.trainer import distill

__all__ = [
    "PRESETS",
    "Blocks",
    "DistillationConfig",
    "DistillationReport",
    "Document",
    "Evaluation",
    "cross_entropy",
    "distill",
    "evaluate",
    "kl_divergence",
    "read_documents",
    "save_trained",
    "split",
    "standard_library",
    "token_blocks",
    "train_tokenizer",
    "unigram_cross_entropy",
]
