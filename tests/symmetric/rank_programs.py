"""What the ranks of the tests run; functions of a module, so that spawned processes find them."""

from __future__ import annotations

import os
import time
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

import farskip_fused as ff
from farskip_fused import _C, reference
from farskip_fused.kernels import dispatch, layout
from farskip_fused.local_experts import LocalPending
from tests.capture import capture
from tests.numerics import RELATIVE_ERROR, assert_close, relative_error


class Shape(NamedTuple):
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    max_tokens: int


SMALL = Shape(48, 40, 8, 3, 64)
FOR_HOPPER = Shape(512, 320, 8, 2, 600)  # tiles of 128 rows, sizes that fill whole chunks


def make_layers(
    memory: ff.SymmetricMemory, dtype: torch.dtype, shape: Shape = SMALL, **options: Any
) -> tuple[ff.FusedExperts, ff.FusedExperts]:
    """The same experts twice: split over the ranks, and whole at every rank."""
    whole = ff.FusedExperts(*shape[:4], max_tokens=shape.max_tokens, device=memory.device, dtype=dtype)
    exchange = ff.ExchangeOptions(**options)
    split = ff.FusedExperts(*shape[:4], max_tokens=shape.max_tokens, ep=memory, exchange=exchange, dtype=dtype)
    local = shape.experts // memory.world
    torch.manual_seed(0)
    with torch.no_grad():
        for name in ("w13", "w2"):
            weight = getattr(whole, name)
            weight.copy_(torch.randn(weight.shape) / weight.shape[-1] ** 0.5)
            getattr(split, name).copy_(weight[memory.rank * local : (memory.rank + 1) * local])
    split.setup()
    return split, whole


def start_alone(
    whole: ff.FusedExperts, split: ff.FusedExperts, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
) -> LocalPending:
    """The layer on one rank with the tiles of the layer on several, so that its GEMMs sum in the same order."""
    where = layout.local_layout(index.int().contiguous(), whole.num_experts, split._exchange.tile_rows)
    return LocalPending(hidden, where, weights, whole.w13, whole.w2)


def random_routing(
    tokens: int, mode: int, device: torch.device, shape: Shape = SMALL
) -> tuple[torch.Tensor, torch.Tensor]:
    if mode == 0:  # everything to one expert
        index = torch.full((tokens, shape.top_k), -1)
        index[:, 1] = 5
    else:
        index = torch.rand(tokens, shape.experts).argsort(dim=-1)[:, : shape.top_k]
    if mode == 1:  # some positions and whole tokens unrouted
        index = torch.where(torch.rand(index.shape) < 0.3, -1, index)
        index[::3] = -1
    return index.to(device), (torch.rand(tokens, shape.top_k) + 0.1).to(device)


def compare_with_world_of_one(
    memory: ff.SymmetricMemory,
    rounds: int,
    dtype: torch.dtype,
    worst_delay: float,
    options: dict[str, Any],
    shape: Shape = SMALL,
) -> dict[str, Any]:
    """Rounds of random size, routing and delay: outputs and input gradients are bitwise those of one rank, unless
    ranks sum before they send.
    """
    split, whole = make_layers(memory, dtype, shape, **options)
    is_bitwise = options.get("combine") != "presummed"
    generator = torch.manual_seed(1000 + memory.rank)
    exact = [weight.detach().double().requires_grad_() for weight in (whole.w13, whole.w2)]
    worst = 0.0
    for round_ in range(rounds):
        # Every rank has its own number of tokens; in each round of four one rank has none, one has the most.
        turn = (round_ + memory.rank) % 4
        most = shape.max_tokens
        tokens = 0 if turn == 0 else most if turn == 1 else int(torch.randint(1, most, ()))
        index, weights = random_routing(tokens, round_ % 3, memory.device, shape)
        hidden, gradient = (
            torch.randn(tokens, shape.hidden, generator=generator).to(memory.device, dtype) for _ in range(2)
        )
        results = []
        for start in (split.dispatch, partial(start_alone, whole, split)):
            inputs = (hidden.clone().requires_grad_(), weights.clone().requires_grad_())
            delay(memory, worst_delay)
            pending = start(inputs[0], index, inputs[1])
            delay(memory, worst_delay)
            pending.experts()
            delay(memory, worst_delay)
            result = pending.finish()
            delay(memory, worst_delay)
            result.backward(gradient)
            results.append([result.detach(), inputs[0].grad, inputs[1].grad])
        for name, value, alone in zip(("output", "input gradient", "weight gradient"), *results, strict=True):
            assert not is_bitwise or torch.equal(value, alone), (
                f"round {round_}, rank {memory.rank}: the {name} differs from one rank's"
            )
        precise = hidden.double().requires_grad_()
        expected = reference.experts(precise, index, weights.double(), *exact)
        expected.backward(gradient.double())
        if tokens and bool((index >= 0).any()):
            worst = max(worst, relative_error(results[0][0], expected), relative_error(results[0][1], precise.grad))
    local = shape.experts // memory.world
    for name, weight in zip(("w13", "w2"), exact, strict=True):
        total = weight.grad.cpu()
        dist.all_reduce(total)
        mine = total[memory.rank * local : (memory.rank + 1) * local]
        worst = max(worst, relative_error(getattr(split, name).grad.cpu(), mine))
    assert worst <= RELATIVE_ERROR[dtype], f"relative error {worst:.3g}"
    return {"rank": memory.rank, "worst_relative_error": worst}


def compare_with_routing_in_blocks(memory: ff.SymmetricMemory, *args: Any) -> dict[str, Any]:
    """``compare_with_world_of_one`` where many programs push a rank's routing, as on a GPU."""
    dispatch.ROUTING_BLOCK = 16
    return compare_with_world_of_one(memory, *args)


def delay(
    memory: ff.SymmetricMemory, worst: float, share: float = 0.2, generator: torch.Generator | None = None
) -> None:
    """In that share of the calls let this rank fall behind: its stream on a GPU, its process on a CPU."""
    late, how_late = torch.rand(2, generator=generator).tolist()
    if late >= share:
        return
    seconds = how_late * worst
    if memory.device.type == "cuda" and _C.has_cuda:
        _C.hold(torch.cuda.current_stream().cuda_stream, 1, int(seconds * 1e6))
    else:
        time.sleep(seconds)


def replay_graphs(memory: ff.SymmetricMemory, replays: int, dtype: torch.dtype, shape: Shape) -> None:
    """Captured passes, forward alone and with backward, replayed on inputs and routing that change every time."""
    split, whole = make_layers(memory, dtype, shape)
    tokens = shape.max_tokens
    index, weights = random_routing(tokens, 2, memory.device, shape)
    hidden, gradient = torch.randn(2, tokens, shape.hidden, device=memory.device).to(dtype)
    hidden.requires_grad_(), weights.requires_grad_()

    def forward() -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            return (split(hidden, index, weights),)

    def with_backward() -> tuple[torch.Tensor, ...]:
        result = split(hidden, index, weights)
        return result, *torch.autograd.grad(result, (hidden, weights, split.w13, split.w2), gradient)

    for call in (forward, with_backward):
        graph, found = capture(memory, call)
        wrong = torch.zeros((), dtype=torch.int64, device=memory.device)
        for replay in range(replays):
            new_index, new_weights = random_routing(tokens, replay % 3, memory.device, shape)
            with torch.no_grad():
                hidden.normal_(), gradient.normal_(), index.copy_(new_index), weights.copy_(new_weights)
            graph.replay()
            if replay % 10 == 0:  # the eager pass of one rank takes longer than the replay
                alone = [tensor.detach().clone().requires_grad_() for tensor in (hidden, weights)]
                expected = start_alone(whole, split, alone[0], index, alone[1]).finish()
                wrong += (found[0] != expected).any()
                if len(found) > 1:
                    for value, exact in zip(found[1:3], torch.autograd.grad(expected, alone, gradient), strict=True):
                        wrong += (value != exact).any()
        memory.synchronize()
        assert int(wrong) == 0, f"rank {memory.rank}: {int(wrong)} results of {call.__name__} differ under replay"
        memory.barrier()


PHASES = ("before dispatch", "before experts", "before finish", "before backward")


def lose_a_peer(memory: ff.SymmetricMemory, phase: str, killed: bool) -> dict[str, Any]:
    """Rank 1 is lost at ``phase`` of the second round; says what the others see, and how long it took."""
    split, _ = make_layers(memory, torch.float32)
    for round_ in range(2):
        lost = round_ == 1 and memory.rank == 1
        index, weights = random_routing(20, 2, memory.device)
        hidden = torch.randn(20, SMALL.hidden).to(memory.device).requires_grad_()
        start = time.monotonic()
        try:
            if lost and phase == "before dispatch":
                vanish(memory, killed)
            pending = split.dispatch(hidden, index, weights)
            if lost and phase == "before experts":
                vanish(memory, killed)
            pending.experts()
            if lost and phase == "before finish":
                vanish(memory, killed)
            result = pending.finish()
            if lost and phase == "before backward":
                vanish(memory, killed)
            result.sum().backward()
            memory.synchronize()
        except ff.PeerTimeout as error:
            return {"message": str(error), "seconds": time.monotonic() - start}
    return {"message": None}


class Vanished(Exception):
    """Raised by a rank that goes silent."""


def vanish(memory: ff.SymmetricMemory, killed: bool) -> None:
    if killed:
        os._exit(9)
    time.sleep(3 * memory.timeout)
    raise Vanished


def repeat_experts(memory: ff.SymmetricMemory) -> str:
    """Every token names one expert twice, and more entries arrive at its rank than distinct experts could give."""
    tokens = SMALL.max_tokens
    layer = ff.FusedExperts(SMALL.hidden, SMALL.intermediate, memory.world, 2, max_tokens=tokens, ep=memory)
    layer.setup()
    index = torch.ones(tokens, 2, dtype=torch.long, device=memory.device)
    hidden = torch.zeros(tokens, SMALL.hidden, device=memory.device)
    try:
        layer(hidden, index, torch.ones(tokens, 2, device=memory.device))
        memory.synchronize()
    except (ff.UsageError, ff.PeerTimeout) as error:
        return str(error)
    return "nothing was said"


def give_a_tensor(memory: ff.SymmetricMemory) -> torch.Tensor:
    return torch.full((1000,), float(memory.rank))


def raise_an_error(memory: ff.SymmetricMemory) -> None:
    raise ArithmeticError(f"of rank {memory.rank}")


def disagree(memory: ff.SymmetricMemory) -> str:
    layer = ff.FusedExperts(*SMALL[:4], max_tokens=8 * (memory.rank + 1), ep=memory)
    try:
        layer.setup()
    except ff.UsageError as error:
        return str(error)
    return "nothing was said"


def experts_of_a_user(rows: torch.Tensor, offsets: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
    """SwiGLU experts in plain torch, on rows as ``dispatch_wait`` returns them; an expert without rows is left out."""
    outputs = torch.zeros_like(rows)
    bounds = offsets.tolist()
    for expert, (start, end) in enumerate(pairwise(bounds)):
        if end > start:
            gate, up = (rows[start:end] @ w13[expert].T).chunk(2, dim=-1)
            outputs[start:end] = (torch.nn.functional.silu(gate) * up) @ w2[expert].T
    return outputs


def exchange_with_own_experts(memory: ff.SymmetricMemory, rounds: int, worst_delay: float) -> None:
    """Rounds of the split calls around a user's experts, of random size, routing and delay, against float64."""
    dtype, most = torch.float32, 24
    exchange = ff.TokenExchange(
        memory, hidden_size=SMALL.hidden, num_experts=SMALL.experts, top_k=SMALL.top_k, max_tokens=most, dtype=dtype
    )
    exchange.setup()
    torch.manual_seed(0)
    shapes = ((SMALL.experts, 2 * SMALL.intermediate, SMALL.hidden), (SMALL.experts, SMALL.hidden, SMALL.intermediate))
    exact = [(torch.randn(shape).double() / shape[-1] ** 0.5).requires_grad_() for shape in shapes]
    mine = slice(memory.rank * SMALL.experts // memory.world, (memory.rank + 1) * SMALL.experts // memory.world)
    own = [weight.detach()[mine].to(memory.device, dtype).requires_grad_() for weight in exact]
    torch.manual_seed(1000 + memory.rank)
    for round_ in range(rounds):
        turn = (round_ + memory.rank) % 4
        tokens = 0 if turn == 0 else most if turn == 1 else int(torch.randint(1, most, ()))
        index, weights = random_routing(tokens, round_ % 3, memory.device)
        hidden, gradient = (torch.randn(tokens, SMALL.hidden).to(memory.device, dtype) for _ in range(2))
        hidden.requires_grad_(), weights.requires_grad_()
        delay(memory, worst_delay)
        handle = ff.dispatch_send(exchange, hidden, index, weights)
        delay(memory, worst_delay)
        rows, offsets = ff.dispatch_wait(handle)
        outputs = experts_of_a_user(rows, offsets, *own)
        delay(memory, worst_delay)
        ff.combine_send(handle, outputs)
        delay(memory, worst_delay)
        result = ff.combine_wait(handle)
        delay(memory, worst_delay)
        result.backward(gradient)
        inputs = [value.detach().cpu().double().requires_grad_() for value in (hidden, weights)]
        expected = reference.experts(inputs[0], index.cpu(), inputs[1], *exact)
        expected.backward(gradient.cpu().double())
        for value, wanted in zip(
            (result, hidden.grad, weights.grad), (expected, inputs[0].grad, inputs[1].grad), strict=True
        ):
            assert_close(value.cpu(), wanted, dtype)
    for weight, wanted in zip(own, exact, strict=True):
        dist.all_reduce(wanted.grad)
        assert_close(weight.grad.cpu(), wanted.grad[mine], dtype)
