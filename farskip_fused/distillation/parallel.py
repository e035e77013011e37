"""How training is split over ranks: not at all, by FSDP2, or by expert parallelism."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from farskip_fused.distillation.blocks import Blocks
from farskip_fused.errors import UsageError
from farskip_fused.symmetric import SymmetricMemory, init

MODES = ("fsdp", "ep")


class Parallel:
    """What the training loop asks of the ranks; as it stands, of one process.

    Collective calls are made by all ranks in the same order.
    loss_scale: what a rank's loss is multiplied by, so that gradients are sums over the ranks' tokens.
    """

    rank, world, loss_scale = 0, 1, 1.0

    def share(self, blocks: Blocks) -> Blocks:
        """This rank's part of the blocks, as many for each rank; what does not divide is left out."""
        return blocks

    def sum(self, values: Sequence[float]) -> list[float]:
        """The sums over the ranks."""
        return list(values)

    def reduce(self, gradients: dict[nn.Parameter, Tensor]) -> None:
        """Completes the gradients of a step, in place."""

    def norm(self, gradients: dict[nn.Parameter, Tensor]) -> Tensor:
        """Norm of the complete gradient, the same on every rank."""
        return torch.nn.utils.get_total_norm(gradients.values())

    def key(self, parameter: nn.Parameter, name: str) -> str:
        """The name under which a parameter is stored beside those of other ranks."""
        return name


class _Ranks(Parallel):
    """What holds for any group of ranks that share the data."""

    def __init__(self, device: torch.device) -> None:
        self.rank, self.world, self.device = dist.get_rank(), dist.get_world_size(), device

    def share(self, blocks: Blocks) -> Blocks:
        each = len(blocks) // self.world
        if each == 0:
            raise UsageError(f"{len(blocks)} blocks do not reach for {self.world} ranks; give more data.")
        return blocks[self.rank * each : (self.rank + 1) * each]

    def sum(self, values: Sequence[float]) -> list[float]:
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()


class Sharded(_Ranks):
    """FSDP2: every rank holds a part of each weight, in float32, and computes in the model's own precision."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        super().__init__(device)
        # FSDP2 averages over the ranks.
        self.loss_scale = float(self.world)
        shard(model, device, trained=True)

    def norm(self, gradients: dict[nn.Parameter, Tensor]) -> Tensor:
        total = super().norm(gradients)
        return total.full_tensor() if isinstance(total, DTensor) else total


class SplitExperts(_Ranks):
    """``ff.parallelize``: every rank holds its experts and all of the rest, whose gradients are summed here."""

    def __init__(self, model: nn.Module, memory: SymmetricMemory, max_tokens: int) -> None:
        from farskip_fused.conversion import moe_blocks, parallelize

        super().__init__(memory.device)
        parallelize(model, memory, max_tokens=max_tokens)
        self._local = {p for _, block in moe_blocks(model) for p in cast(Any, block).experts.parameters()}

    def reduce(self, gradients: dict[nn.Parameter, Tensor]) -> None:
        for parameter, gradient in gradients.items():
            if parameter not in self._local:
                dist.all_reduce(gradient)

    def norm(self, gradients: dict[nn.Parameter, Tensor]) -> Tensor:
        local = [gradient for parameter, gradient in gradients.items() if parameter in self._local]
        others = [gradient for parameter, gradient in gradients.items() if parameter not in self._local]
        of_experts = torch.nn.utils.get_total_norm(local).square().to(self.device)
        dist.all_reduce(of_experts)
        return (of_experts + torch.nn.utils.get_total_norm(others).square()).sqrt()

    def key(self, parameter: nn.Parameter, name: str) -> str:
        return f"{name}.rank{self.rank}" if parameter in self._local else name


def distribute(model: nn.Module, mode: str | None, max_tokens: int) -> Parallel:
    """Splits a model over the ranks of torch.distributed, in place; collective.

    mode: None, "fsdp" or "ep". max_tokens: most tokens of a rank's forward pass, which "ep" needs to know.
    """
    if mode is None:
        return Parallel()
    if mode not in MODES:
        raise UsageError(f"Unknown parallel mode {mode!r}; use one of {', '.join(MODES)}.")
    if not dist.is_initialized():
        raise UsageError(f"Parallel mode {mode!r} needs torch.distributed; start with torchrun and init_process_group.")
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    if mode == "fsdp":
        return Sharded(model, device)
    model.to(device)
    return SplitExperts(model, init(device=device), max_tokens)


def shard(model: nn.Module, device: torch.device, *, trained: bool) -> None:
    """FSDP2 on every decoder layer and on the rest: float32 weights and gradients, computation in the model's dtype.

    trained: False for a teacher, whose head is needed in full after its forward pass.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    from farskip_fused.conversion import decoder_layers

    computing = next(p.dtype for p in model.parameters() if p.ndim > 1)
    policy = MixedPrecisionPolicy(param_dtype=computing, reduce_dtype=torch.float32, cast_forward_inputs=False)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    if trained:
        model.float()
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    # What is trained gives back its head and embeddings, too, so that its parameters are the shards between passes.
    cast(FSDPModule, model).set_reshard_after_forward(trained, recurse=False)


def local(tensor: Tensor) -> Tensor:
    """What of a tensor is on this rank; shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
