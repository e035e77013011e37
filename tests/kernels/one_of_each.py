"""Launches every family of kernels once, forward and backward, on shapes small enough for compute-sanitizer.

bench/gpu_check.sh sanitize runs it under memcheck and racecheck; what the kernels compute, the tests check. Without a
GPU it runs in the interpreter.
"""

from __future__ import annotations

import torch

import farskip_fused as ff
from farskip_fused.kernels import layout

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16
# tokens, hidden, intermediate, experts, top_k; then dtype and whether the weights are transposed.
CALLS = [
    ((150, 66, 70, 2, 2), HALF, False),  # plain Triton, 128 rows a tile
    ((100, 66, 70, 4, 2), HALF, True),  # 64
    ((60, 66, 70, 4, 2), HALF, False),  # 32
    ((9, 66, 70, 4, 2), HALF, False),  # 16
    ((60, 66, 70, 4, 2), torch.float32, False),
]
# To the interpreter they are plain ones that take long.
CALLS_FOR_HOPPER = [
    ((150, 192, 320, 2, 2), HALF, False),  # partial row and column tiles
    ((150, 192, 320, 2, 2), HALF, True),
    ((130, 64, 4096, 1, 1), HALF, False),  # they read a sorted copy
]


def call_experts(shape: tuple[int, ...], dtype: torch.dtype, transposed: bool, backward: bool = True) -> None:
    tokens, hidden, intermediate, num_experts, top_k = shape
    w13 = torch.randn(num_experts, 2 * intermediate, hidden, device=DEVICE, dtype=dtype)
    w2 = torch.randn(num_experts, hidden, intermediate, device=DEVICE, dtype=dtype)
    if transposed:
        w13, w2 = w13.transpose(1, 2).contiguous(), w2.transpose(1, 2).contiguous()
    x = torch.randn(tokens, hidden, device=DEVICE, dtype=dtype)
    weights = torch.rand(tokens, top_k, device=DEVICE)
    index = torch.rand(tokens, num_experts, device=DEVICE).argsort(dim=-1)[:, :top_k]
    index[tokens // 2, 0] = -1
    inputs = [tensor.requires_grad_(backward) for tensor in (x, weights, w13, w2)]
    with torch.set_grad_enabled(backward):
        result = ff.fused_experts(x, index, *inputs[1:], transposed=transposed)
    if backward:
        torch.autograd.grad(result.sum(), inputs)


def call_layer(tokens: int, hidden: int, **options: object) -> None:
    """Router and experts, gradients into ``main_grad`` where that is asked for; with ``ep``, dispatch and combine."""
    layer = ff.FusedMoE(hidden, 64, 8, 2, max_tokens=tokens, device=DEVICE, dtype=HALF, **options)  # type: ignore[arg-type]
    layer.setup()
    for weight in (layer.w13, layer.w2):
        weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)
    x = torch.randn(tokens, hidden, device=DEVICE, dtype=HALF, requires_grad=True)
    layer(x).sum().backward()
    with torch.no_grad():
        layer(x)


def call_exchange(memory: ff.SymmetricMemory) -> None:
    """The split calls, around experts that return their rows."""
    exchange = ff.TokenExchange(memory, hidden_size=66, num_experts=4, top_k=2, max_tokens=50, dtype=HALF)
    exchange.setup()
    x = torch.randn(50, 66, device=DEVICE, dtype=HALF, requires_grad=True)
    index = torch.rand(50, 4, device=DEVICE).argsort(dim=-1)[:, :2]
    handle = ff.dispatch_send(exchange, x, index, torch.rand(50, 2, device=DEVICE, requires_grad=True))
    rows, _ = ff.dispatch_wait(handle)
    ff.combine_send(handle, rows)
    ff.combine_wait(handle).sum().backward()


def call_all_reduce(memory: ff.SymmetricMemory) -> None:
    """In one shot and in two, of rows that divide into loads of 16 bytes and of others."""
    for hidden in (66, 64):
        all_reduce = ff.AllReduce(
            memory, max_tokens=300, hidden_size=hidden, dtype=HALF, one_shot_bytes=50 * hidden * HALF.itemsize
        )
        all_reduce.setup()
        for tokens in (50, 300):
            x = torch.randn(tokens, hidden, device=DEVICE, dtype=HALF)
            all_reduce(all_reduce(x), residual=x)


def main() -> None:
    for shape, dtype, transposed in CALLS + (CALLS_FOR_HOPPER if DEVICE == "cuda" else []):
        call_experts(shape, dtype, transposed)
    call_experts((1, 66, 70, 4, 2), HALF, False, backward=False)  # unsorted
    layout.local_layout(torch.randint(0, 8, (1200, 2), device=DEVICE), 8, 16)  # several programs
    call_layer(5, 128, accumulate_into_main_grad=True)
    call_layer(2200, 64, scoring="sigmoid", correction_bias=True, num_groups=4, top_k_groups=2)
    ff.FusedExperts.is_alone = False  # type: ignore[assignment,method-assign]  # a world of one takes the slots too
    memory = ff.init(device=DEVICE)
    call_layer(50, 66, ep=memory)
    if DEVICE == "cuda":
        call_layer(600, 192, ep=memory)  # Hopper's kernels
    call_layer(50, 66, ep=memory, exchange=ff.ExchangeOptions(keep_received=False))
    call_layer(50, 66, ep=memory, exchange=ff.ExchangeOptions(combine="presummed"))
    call_layer(50, 66, ep=memory, exchange=ff.ExchangeOptions(fp8=True))
    call_exchange(memory)
    call_all_reduce(memory)
    memory.close()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    print("every family of kernels was launched")


if __name__ == "__main__":
    main()
