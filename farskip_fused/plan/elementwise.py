"""What a layer does beside products, attention itself and transfers: norms, rotary embedding, activations, additions.

Two ways to run them. ``Fused`` takes each group in one pass over what it reads and writes, as Megatron with
TransformerEngine and vLLM come near to. ``Separate`` takes the operations of stock modules one by one, as PyTorch runs
them without a compiler: counted on ``bench/attention.py``, the shared experts of ``bench/layer_ranks.py`` and the
schedule's sums, forward and in autograd's backward. All times in ms of one rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from farskip_fused.plan.job import Job
from farskip_fused.plan.kernels import Machine


class Elementwise(ABC):
    """Beside the products of an action, forward or backward.

    of_tokens: numbers of the rank's hidden states. queries, keys, values: of all heads that it attends with.
    """

    def __init__(self, job: Job, machine: Machine) -> None:
        self.job, self.model, self.machine = job, job.sizes, machine
        model, seen = self.model, job.replica_tokens
        self.of_tokens = job.tokens * model.hidden
        self.heads = model.heads / job.tp
        self.key_heads = self.heads if model.latent_rank else max(1.0, model.key_value_heads / job.tp)
        self.queries, self.keys = (seen * heads * model.query_head for heads in (self.heads, self.key_heads))
        self.values = seen * self.key_heads * model.value_head

    @abstractmethod
    def projections(self, backward: bool) -> float:
        """The attention's norm, norms of latents or heads, rotary embedding."""

    def core(self) -> float:
        """The addition of the attention's output; backward, of the gradients of the sum's two readers."""
        return self.machine.memory(6 * self.of_tokens)

    @abstractmethod
    def gate(self, backward: bool) -> float:
        """The MoE's norm; and the router's product, which is float32 where autograd multiplies."""

    @abstractmethod
    def activation(self, size: float, tokens: int, backward: bool) -> float:
        """SwiGLU of a dense MLP of intermediate ``size``."""


def elementwise(job: Job, machine: Machine) -> Elementwise:
    return (Separate if job.elementwise == "separate" else Fused)(job, machine)


class Fused(Elementwise):
    """Backward, gradients are read and written beside what is read again."""

    def projections(self, backward: bool) -> float:
        times = 2 if backward else 1
        keys = self.job.replica_tokens * self.model.rope_head if self.model.latent_rank else self.keys
        norm = self.machine.memory(times * 4 * self.of_tokens, times)
        return norm + self.machine.memory(times * 4 * (self.queries + keys), times)

    def gate(self, backward: bool) -> float:
        times = 2 if backward else 1
        sizes = self.job.tokens, self.model.hidden, self.model.experts
        return self.machine.linear(*sizes, backward=backward) + self.machine.memory(times * 4 * self.of_tokens, times)

    def activation(self, size: float, tokens: int, backward: bool) -> float:
        times = 2 if backward else 1
        return self.machine.memory(times * tokens * 3 * size * 2, times)


class Separate(Elementwise):
    """bfloat16: an addition moves 6 bytes a number, a concatenation of contiguous tensors 4."""

    def projections(self, backward: bool) -> float:
        return self.machine.norm(self.of_tokens, backward=backward) + (
            self._latent(backward) if self.model.latent_rank else self._grouped(backward)
        )

    def _latent(self, backward: bool) -> float:
        """Queries and keys are concatenated from a part without and a part with rotary embedding; keys share theirs."""
        machine, model, seen = self.machine, self.model, self.job.replica_tokens
        shared, latent = seen * model.rope_head, seen * model.latent_rank
        time = self._rotary(self.heads * shared, backward) + self._rotary(shared, backward)
        time += self._norm_of_slice(latent, backward)
        if model.query_rank:
            time += machine.norm(seen * model.query_rank, backward=backward)
        if not backward:
            return time + machine.strided(self.queries) + machine.strided(self.keys)
        # Slices' gradients are concatenated; those of the shared keys are summed over heads; those of the norm's
        # output are added, as two projections read it.
        unrotated = self.keys - self.heads * shared
        time += machine.strided(self.queries) + machine.strided(unrotated + self.values)
        time += machine.memory(4 * (latent + shared)) + machine.strided(self.heads * shared)
        return time + machine.memory(6 * self.of_tokens)

    def _grouped(self, backward: bool) -> float:
        """One projection makes queries, keys and values; some families norm each head's query and key."""
        machine, model = self.machine, self.model
        time = self._rotary(self.queries, backward) + self._rotary(self.keys, backward)
        if model.head_norms:
            time += sum(self._norm_of_slice(numbers, backward) for numbers in (self.queries, self.keys))
        return time + (machine.memory(4 * (self.queries + self.keys + self.values)) if backward else 0.0)

    def _norm_of_slice(self, numbers: float, backward: bool) -> float:
        """Norms take contiguous tensors: in either direction a slice of a projection is copied first."""
        return self.machine.strided(numbers) + self.machine.norm(numbers, backward=backward)

    def _rotary(self, numbers: float, backward: bool) -> float:
        """Each half of a head's columns times a cosine, plus the other half times a sine; the halves concatenated."""
        half, machine = numbers / 2, self.machine
        time = machine.strided(4 * half, 4) + machine.memory(4 * numbers)
        # Each half's gradients of its two products are added, and each sine is scaled anew.
        return time + (machine.memory(2 * 6 * half, 2) + machine.memory(0, 2) if backward else 0.0)

    def gate(self, backward: bool) -> float:
        machine, norm = self.machine, self.machine.norm(self.of_tokens, backward=backward)
        sizes = self.job.tokens, self.model.hidden, self.model.experts
        if not backward:
            return norm + machine.matmul(*sizes)
        # Casts of the normed states and of their gradient; the gradients of the norm's readers are added.
        casts = machine.memory(2 * 6 * self.of_tokens, 2)
        readers = 3 if self.model.shared else 2
        added = machine.memory((readers - 1) * 6 * self.of_tokens, readers - 1)
        return norm + 2 * machine.matmul_float32(*sizes) + casts + added

    def activation(self, size: float, tokens: int, backward: bool) -> float:
        """SiLU and product, of two halves of one product's columns."""
        machine, numbers = self.machine, tokens * size
        # Backward, gradients of SiLU and of the product's two factors, one of which reads contiguous tensors, and then
        # the two halves are concatenated.
        contiguous = machine.memory((6 + 8) * numbers, 2) if backward else 0.0
        return machine.strided(2 * numbers, 2) + contiguous
