"""Rounds without end between ranks, every output bitwise that of the unfused path: `make soak`.

Every pair of rounds takes two of several layers of different shapes, random numbers of tokens (none, too), random or
heavily skewed routing, and lets ranks fall behind before any phase; the second dispatch is launched before the first
combine is awaited, as in an overlapped stack. A slice is one start of the ranks; ``--state`` remembers how far all
slices have come, so that a soak can be stopped and gone on with.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

import farskip_fused as ff
from farskip_fused.launch import run_ranks
from tests.symmetric.rank_programs import Shape, delay, make_layers, start_alone

MAX_TOKENS = 48
# And how rows travel.
SHAPES: tuple[tuple[Shape, dict[str, Any]], ...] = (
    (Shape(48, 40, 8, 3, MAX_TOKENS), {}),
    (Shape(33, 16, 4, 1, MAX_TOKENS), {}),
    (Shape(48, 24, 16, 4, MAX_TOKENS), {"keep_received": False}),
)
ROUNDS_OF_A_PAIR = 4  # two forward, two for the gradients
DELAYED, WORST_DELAY = 0.01, 0.05  # share of the phases, seconds
CHECK_EVERY = 25 if torch.cuda.is_available() else 5  # pairs; between checks a GPU runs ahead


def soak(memory: ff.SymmetricMemory, first_pair: int, pairs: int, seed: int, seconds: float) -> int:
    """Run pairs of rounds until all are done or the time is over; returns how many were done, the same everywhere."""
    layers = [make_layers(memory, torch.float32, shape, **options) for shape, options in SHAPES]
    wrong = torch.zeros((), dtype=torch.int64, device=memory.device)
    start = time.monotonic()
    end = start + seconds
    for pair in range(first_pair, first_pair + pairs):
        common = torch.Generator().manual_seed(seed + pair)  # what all ranks must agree on
        own = torch.Generator().manual_seed(seed + 7919 * pair + 104729 * (memory.rank + 1))
        chosen = torch.randint(0, len(layers), (2,), generator=common).tolist()
        inputs = [random_inputs(layers[index], own, common, memory.device) for index in chosen]
        found = [run(memory, [layers[index] for index in chosen], inputs, own, alone) for alone in (False, True)]
        for value, expected in zip(*found, strict=True):
            wrong += (value != expected).any()
        if (pair - first_pair + 1) % CHECK_EVERY == 0 or pair == first_pair + pairs - 1:
            memory.synchronize()
            assert int(wrong) == 0, f"rank {memory.rank}: a result differs in pairs {pair - CHECK_EVERY + 1} to {pair}"
            # Whether to go on is decided by one rank: the others would wait for rounds that it never opens.
            if memory.rank == 0:
                print(f"{(pair + 1) * ROUNDS_OF_A_PAIR} rounds, {time.monotonic() - start:.0f} s", flush=True)
            if memory.gather(time.monotonic() > end)[0]:
                return pair - first_pair + 1
    return pairs


def random_inputs(
    layers: tuple[ff.FusedExperts, ff.FusedExperts], own: torch.Generator, common: torch.Generator, device: torch.device
) -> list[torch.Tensor]:
    """Hidden states, ids, weights and the output's gradient."""
    layer = layers[1]
    hidden, top_k, experts = layer.w13.shape[2], layer.top_k, layer.num_experts
    kind = int(torch.randint(0, 4, (), generator=common))
    tokens = int(torch.randint(0, MAX_TOKENS + 1, (), generator=own))
    tokens = (tokens, 0 if tokens % 3 == 0 else tokens, MAX_TOKENS, tokens)[kind]
    scores = torch.rand(tokens, experts, generator=own)
    if kind == 1:
        scores[:, :1] += 2 * (torch.rand(tokens, 1, generator=own) < 0.9)  # nearly everything to one expert
    index = scores.argsort(dim=-1, descending=True)[:, :top_k]
    if kind == 2:
        index = torch.where(torch.rand(index.shape, generator=own) < 0.4, -1, index)
    values = [torch.randn(tokens, hidden, generator=own) for _ in range(2)]
    weights = torch.rand(tokens, top_k, generator=own) + 0.1
    return [tensor.to(device) for tensor in (values[0], index, weights, values[1])]


def run(
    memory: ff.SymmetricMemory,
    layers: list[tuple[ff.FusedExperts, ff.FusedExperts]],
    inputs: list[list[torch.Tensor]],
    own: torch.Generator,
    alone: bool,
) -> list[torch.Tensor]:
    """Outputs and gradients of two rounds, split or alone; only the split ones are delayed."""
    leaves = [(hidden.clone().requires_grad_(), weights.clone().requires_grad_()) for hidden, _, weights, _ in inputs]

    def start(which: int) -> Any:
        (split, whole), (hidden, weights), index = layers[which], leaves[which], inputs[which][1]
        if not alone:
            delay(memory, WORST_DELAY, DELAYED, own)
            return split.dispatch(hidden, index, weights)
        return start_alone(whole, split, hidden, index, weights)

    def then(step: Any) -> Any:
        if not alone:
            delay(memory, WORST_DELAY, DELAYED, own)
        return step()

    first = start(0)
    then(first.experts)
    second = start(1)
    outputs = [then(first.finish)]
    then(second.experts)
    outputs.append(then(second.finish))
    then(lambda: torch.autograd.backward(outputs, [gradient for *_, gradient in inputs]))
    for split, whole in layers:
        split.zero_grad(), whole.zero_grad()
    return [*(output.detach() for output in outputs), *(leaf.grad for pair in leaves for leaf in pair)]


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200_000 if device == "cuda" else 2_000, help="in all")
    parser.add_argument("--world", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=480, help="of this slice")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--state", type=Path, default=Path("soak.json"), help="how far all slices have come")
    options = parser.parse_args()
    state = json.loads(options.state.read_text()) if options.state.is_file() else {}
    key = f"{device}, {options.world} ranks, seed {options.seed}"
    done, total = state.get(key, 0), -(-options.rounds // ROUNDS_OF_A_PAIR)
    print(f"{key}: {done * ROUNDS_OF_A_PAIR} of {options.rounds} rounds done before")
    if done < total:
        counts = run_ranks(
            soak, options.world, done, total - done, options.seed, options.seconds,
            device=device, limit=options.seconds + 240, wait_timeout=60.0,
        )  # fmt: skip
        assert len(set(counts)) == 1, counts
        state[key] = done = done + counts[0]
        options.state.write_text(json.dumps(state, indent=1))
    print(f"{key}: {done * ROUNDS_OF_A_PAIR} of {options.rounds} rounds, every result bitwise equal")


if __name__ == "__main__":
    main()
