"""The loss of a micro-batch: FCSD's divergence, cross-entropy of the text, divergence and distance of the layers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from farskip_fused.distillation.blocks import Blocks
from farskip_fused.distillation.config import DistillationConfig
from farskip_fused.distillation.forward import at_head, head_of
from farskip_fused.distillation.loss import cross_entropy, kl_divergence
from farskip_fused.distillation.states import layer_outputs
from farskip_fused.distillation.teacher import Teacher
from farskip_fused.errors import UsageError

Objective = Callable[[Blocks], Tensor]


def objective(model: nn.Module, teacher: Teacher | None, config: DistillationConfig) -> Objective:
    """The loss as a function of a micro-batch: a mean over its predictions that count."""
    head = head_of(model)

    def sft(blocks: Blocks) -> Tensor:
        targets = blocks.targets()
        return at_head(model, blocks, lambda hidden: cross_entropy(hidden, head, targets.to(hidden.device), chunk))

    def kl(blocks: Blocks) -> Tensor:
        taught = taught_by.teach(blocks).hidden
        return at_head(model, blocks, lambda hidden: kl_divergence(hidden, head, taught, taught_by.head, chunk))

    def kl_and_l2(blocks: Blocks) -> Tensor:
        taught = taught_by.teach(blocks, with_states=True)
        with layer_outputs(model) as states:
            divergence = at_head(
                model, blocks, lambda hidden: kl_divergence(hidden, head, taught.hidden, taught_by.head, chunk)
            )
        return divergence + config.l2_weight * relative_distance(states, taught.states)

    chunk = config.chunk_size
    if config.objective == "sft":
        return sft
    assert teacher is not None
    taught_by = teacher
    return kl if config.objective == "kl" else kl_and_l2


def relative_distance(states: list[Tensor], taught: list[Tensor]) -> Tensor:
    """Mean over layers of the squared distance from the teacher's states, relative to their squared size."""
    if not states or [each.shape for each in states] != [each.shape for each in taught]:
        raise UsageError(
            'Objective "kl+l2" needs a teacher with as many layers, two or more, and the same hidden size.'
        )
    distances = []
    for mine, theirs in zip(states, taught, strict=True):
        theirs = theirs.to(mine.device).float()
        distances.append((mine.float() - theirs).square().sum() / theirs.square().sum())
    return torch.stack(distances).mean()
