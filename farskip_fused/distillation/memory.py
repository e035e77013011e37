"""How much memory the loss of a micro-batch takes, found without allocating it."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from farskip_fused.distillation.loss import CHUNK_SIZE, kl_divergence

GIB = 2**30


class _Peak(TorchDispatchMode):
    """Most bytes that tensors made within it, all but ``existing``, occupied at a time."""

    def __init__(self, existing: Iterable[Tensor]) -> None:
        super().__init__()
        self.live = self.most = 0
        self._seen = {each.untyped_storage()._cdata for each in existing}

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        result = function(*arguments, **(keywords or {}))
        for each in tree_leaves(result):
            if isinstance(each, Tensor):
                self._note(each.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.live += size
        self.most = max(self.most, self.live)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


def loss_bytes(
    tokens: int,
    hidden_size: int,
    vocabulary: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    chunk_size: int | None = CHUNK_SIZE,
) -> int:
    """Peak bytes of the divergence of so many tokens and its gradients, states and heads aside.

    chunk_size: None for the naive way, in which the logits of all tokens exist in float32 for both models.
    """
    with FakeTensorMode():
        student, teacher = (torch.empty(tokens, hidden_size, dtype=dtype) for _ in range(2))
        heads = [nn.Linear(hidden_size, vocabulary, bias=False, dtype=dtype) for _ in range(2)]
        student.requires_grad_()
        heads[1].requires_grad_(False)
        pairs = (student, heads[0], teacher, heads[1])
        with _Peak([student, teacher, *(head.weight for head in heads)]) as peak:
            loss = naive_kl_divergence(*pairs) if chunk_size is None else kl_divergence(*pairs, chunk_size)
            loss.backward()
    return int(peak.most)


def naive_kl_divergence(student: Tensor, student_head: nn.Linear, teacher: Tensor, teacher_head: nn.Linear) -> Tensor:
    """KL(teacher || student), a mean over tokens, from whole logits: the reference of ``kl_divergence``."""
    log_p, log_q = (
        F.log_softmax(head(hidden), dim=-1, dtype=torch.promote_types(hidden.dtype, torch.float32))
        for hidden, head in ((student, student_head), (teacher, teacher_head))
    )
    return F.kl_div(log_p, log_q, log_target=True, reduction="batchmean")


def loss_memory(tokens: int, head: nn.Linear, chunk_size: int) -> str:
    """A sentence on the loss of a micro-batch, for people."""
    ours, naive = (
        loss_bytes(tokens, head.in_features, head.out_features, dtype=head.weight.dtype, chunk_size=chunk)
        for chunk in (chunk_size, None)
    )
    return (
        f"The loss of {tokens:,} tokens takes {ours / GIB:.2f} GiB at its peak, in chunks of {chunk_size:,};"
        f" with whole logits it would take {naive / GIB:.2f} GiB."
    )
