"""Who teaches: the same module with connectivity off, or a model of its own, whole, offloaded or in 8 bits."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from farskip_fused.connectivity import Connectivity
from farskip_fused.distillation.blocks import Blocks
from farskip_fused.distillation.forward import eval_mode, head_of, hidden_states
from farskip_fused.distillation.int8 import quantize
from farskip_fused.distillation.loss import Head
from farskip_fused.distillation.offload import copy_offloaded
from farskip_fused.distillation.states import layer_outputs
from farskip_fused.errors import UsageError

FORMS = ("shared", "copy", "offload", "int8")


class Taught(NamedTuple):
    """Final hidden states [M, H] of the counted predictions; o_k [B, T, H] of each layer but the last, if asked for."""

    hidden: Tensor
    states: list[Tensor]


class Weights(NamedTuple):
    """An output head apart from its module."""

    weight: Tensor
    bias: Tensor | None


class Teacher(Protocol):
    @property
    def head(self) -> Head: ...

    def teach(self, blocks: Blocks, *, with_states: bool = False) -> Taught: ...


class Separate:
    """A model of its own, run as it is, in eval mode."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @property
    def head(self) -> Head:
        if isinstance(self.model, FSDPModule):
            self.model.unshard()
        return head_of(self.model)

    def teach(self, blocks: Blocks, *, with_states: bool = False) -> Taught:
        return _teach(self.model, blocks, with_states)


class Shared:
    """The student itself with standard connectivity; only of what is trained there are two versions.

    Weights that are frozen, all but a few in LoRA or when the last layers are trained, exist once. Those that are
    trained are kept as they were when this was made, and take their place while it teaches.
    """

    def __init__(self, model: nn.Module) -> None:
        refuse_standard(model)
        self.model = model
        # Balancing moves the routers' biases, which are buffers.
        changing = [*(each for each in model.parameters() if each.requires_grad), *model.buffers()]
        self._pairs = [(each, each.detach().clone()) for each in changing]
        original = {id(mine): was for mine, was in self._pairs}
        head = head_of(model)
        bias = None if head.bias is None else original.get(id(head.bias), head.bias.detach())
        self._head = Weights(original.get(id(head.weight), head.weight.detach()), bias)

    @property
    def head(self) -> Head:
        return self._head

    def teach(self, blocks: Blocks, *, with_states: bool = False) -> Taught:
        with self._as_it_was():
            return _teach(self.model, blocks, with_states)

    @contextmanager
    def _as_it_was(self) -> Iterator[None]:
        from farskip_fused.conversion import as_teacher

        now = [mine.data for mine, _ in self._pairs]
        for mine, was in self._pairs:
            mine.data = was
        try:
            with as_teacher(self.model):
                yield
        finally:
            for (mine, _), own in zip(self._pairs, now, strict=True):
                mine.data = own


@contextmanager
def teacher_of(model: nn.Module, given: nn.Module | None, form: str) -> Iterator[Separate]:
    """A model that teaches another one: ``given``, or what the model is before training, with standard connectivity.

    form: how it is kept. "copy": a model of its own. "offload": one whose layers lie in the processor's memory and come
    to the device one at a time. "int8": one whose matrices are in 8 bits, one scale a row. A given teacher is never
    changed: it is used as it is, or the last two forms are copies of it. For the fourth form see ``Shared``.
    """
    from farskip_fused.conversion import as_teacher

    if given is model:
        raise UsageError("The teacher is the model itself and would change with it; leave it out to have a copy.")
    if given is None:
        refuse_standard(model)
    source = model if given is None else given
    if form == "offload":
        kept = copy_offloaded(source)
    elif form == "int8":
        kept = quantize(source)
    elif given is None:
        kept = copy.deepcopy(source).requires_grad_(False)
    else:
        kept = given
    with eval_mode(kept), as_teacher(kept) if given is None else nullcontext():
        yield Separate(kept)


def refuse_standard(model: nn.Module) -> None:
    from farskip_fused.conversion import connectivity_of

    if all(connectivity == Connectivity.standard() for connectivity in connectivity_of(model)):
        raise UsageError("The model has standard connectivity, so it equals its teacher; convert it with ff.convert.")


@torch.no_grad()
def _teach(model: nn.Module, blocks: Blocks, with_states: bool) -> Taught:
    noting: AbstractContextManager[list[Tensor]] = layer_outputs(model) if with_states else nullcontext([])
    with eval_mode(model), noting as states:
        return Taught(hidden_states(model, blocks), states)
