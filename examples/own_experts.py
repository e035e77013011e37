"""Your own expert GEMMs between our dispatch and combine, trained on two processes of this machine.

    python examples/own_experts.py                  # on CPU, in Triton's interpreter
    python examples/own_experts.py --device cuda    # a GPU a rank, or both on one under CUDA MPS

Whatever runs between a send and its wait hides it: here the shared expert hides dispatch. Under torchrun a script opens
the symmetric memory itself, by ff.init().
"""

import argparse
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import nn

import farskip_fused as ff
from farskip_fused.launch import run_ranks

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, TOKENS = 16, 32, 4, 2, 16


class Experts(nn.Module):
    """SwiGLU experts of this rank by torch's products; a grouped GEMM of yours takes the same rows and offsets."""

    def __init__(self, count):
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(count, HIDDEN, 2 * INTERMEDIATE))
        self.down = nn.Parameter(torch.empty(count, INTERMEDIATE, HIDDEN))

    def forward(self, rows, offsets):
        bounds, outputs = offsets.tolist(), []  # waits on the host; a grouped GEMM reads the offsets on the device
        for expert, (start, end) in enumerate(pairwise(bounds)):
            gate, up = (rows[start:end] @ self.gate_up[expert]).chunk(2, dim=-1)
            outputs.append(nn.functional.silu(gate) * up @ self.down[expert])
        return torch.cat([*outputs, torch.zeros_like(rows[bounds[-1] :])])  # rows past the last offset are undefined


class MoE(nn.Module):
    def __init__(self, exchange, world):
        super().__init__()
        self.exchange = exchange
        self.router, self.shared = nn.Linear(HIDDEN, EXPERTS, bias=False), nn.Linear(HIDDEN, HIDDEN)
        self.experts = Experts(EXPERTS // world)

    def forward(self, x):
        weights, ids = self.router(x).softmax(dim=-1).topk(TOP_K)
        handle = ff.dispatch_send(self.exchange, x, ids, weights)
        shared = self.shared(x)
        rows, offsets = ff.dispatch_wait(handle)
        ff.combine_send(handle, self.experts(rows, offsets))
        return ff.combine_wait(handle, shared=shared, residual=x)


def train(memory, steps, group=None):
    """Losses, means over all ranks' tokens; the same for any number of ranks. group: the ranks of ``memory``."""
    exchange = ff.TokenExchange(
        memory, hidden_size=HIDDEN, num_experts=EXPERTS, top_k=TOP_K, max_tokens=TOKENS // memory.world
    )
    exchange.setup()
    generator = torch.Generator().manual_seed(0)
    random = lambda *shape: torch.randn(*shape, generator=generator) * shape[-2] ** -0.5  # noqa: E731
    layer = MoE(exchange, memory.world)
    everywhere = [*layer.router.parameters(), *layer.shared.parameters()]
    with torch.no_grad():  # all ranks draw all experts and keep their own
        for weight in layer.experts.parameters():
            weight.copy_(random(EXPERTS, *weight.shape[1:]).chunk(memory.world)[memory.rank])
        for weight in everywhere:
            weight.copy_(random(weight.shape[0], weight.shape[-1]) if weight.dim() == 2 else torch.zeros_like(weight))
    layer.to(memory.device)
    inputs, target = random(TOKENS, HIDDEN) * TOKENS**0.5, random(HIDDEN, HIDDEN)
    x = inputs.chunk(memory.world)[memory.rank].to(memory.device)
    y = (inputs @ target).tanh().chunk(memory.world)[memory.rank].to(memory.device)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = (layer(x) - y).square().mean() / memory.world
        loss.backward()  # experts' gradients sum over all ranks' tokens; the others are of this rank's
        for each in (*(weight.grad for weight in everywhere), loss := loss.detach()):
            dist.all_reduce(each, group=group)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name, default in {"device": "cpu", "ranks": 2, "steps": 20}.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    arguments = parser.parse_args()
    losses = run_ranks(train, arguments.ranks, arguments.steps, device=arguments.device)[0]
    print("\n".join(f"{loss:.4f}" for loss in losses))
