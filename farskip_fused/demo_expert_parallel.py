"""The demo's expert-parallel part: a saved model's MoE layers split over processes, against the same model in one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import farskip_fused as ff
from farskip_fused.launch import RankFailed, run_ranks

# Few: on CPU the kernels run in Triton's interpreter.
SEQUENCES, SEQUENCE_LENGTH = 2, 24


def run(model_path: Path, world: int = 2, device: str | None = None) -> dict[str, Any]:
    """Forward and backward of the checkpoint's MoE layers over ``world`` ranks, through the Triton kernels.

    Returns world, backend, and the relative errors of the logits and of all gradients against the unsplit model, whose
    experts are transformers' own. Where the GPU cannot host several ranks the world is 1 and ``note`` says why.
    device: see ``run_ranks``; by default "cuda" where there is a GPU.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    note = {}
    if device != "cpu":
        try:
            run_ranks(_meet, world, device=device)
        except (OSError, RankFailed) as error:
            note = {"note": f"world 1, since {world} ranks could not share the GPU: {str(error).splitlines()[0]}"}
            world = 1
    outcomes = run_ranks(_compare, world, str(model_path), device=device)
    worst = {name: max(outcome[name] for outcome in outcomes) for name in ("forward_rel_error", "backward_rel_error")}
    return {**outcomes[0], **worst, **note}


def _meet(memory: ff.SymmetricMemory) -> None:
    """Nothing but the set-up of the ranks, which is what a machine may be unable to do."""
    memory.barrier()


def _compare(memory: ff.SymmetricMemory, model_path: str) -> dict[str, Any]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(memory.rank)
        plain: Any = ff.load(Path(model_path))
        plain.to(memory.device).float().train()
        tokens = torch.randint(plain.config.vocab_size, (SEQUENCES, SEQUENCE_LENGTH)).to(memory.device)
    expected, expected_gradients = _logits_and_gradients(plain, tokens, memory)
    tokens_of_a_rank = SEQUENCES * SEQUENCE_LENGTH
    split = ff.parallelize(plain, memory, max_tokens=tokens_of_a_rank)
    logits, gradients = _logits_and_gradients(split, tokens, memory)
    return {
        "world": memory.world,
        "backend": memory.backend,
        "forward_rel_error": _relative_error([logits], [expected]),
        "backward_rel_error": _relative_error(gradients, expected_gradients),
    }


def _logits_and_gradients(model: Any, tokens: Tensor, memory: ff.SymmetricMemory) -> tuple[Tensor, list[Tensor]]:
    """Gradients of the expert weights that this rank holds, over the tokens of all ranks, then of all others."""
    import torch.distributed as dist

    model.zero_grad(set_to_none=True)
    logits = model(tokens).logits
    logits.float().logsumexp(dim=-1).mean().backward()
    experts: list[Tensor] = []
    others: list[Tensor] = []
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            continue
        gradient = parameter.grad
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            total = gradient.cpu()
            dist.all_reduce(total)
            gradient = total.chunk(memory.world)[memory.rank].to(gradient.device)
        (experts if ".experts." in name else others).append(gradient)
    return logits.detach(), experts + others


def _relative_error(values: list[Tensor], references: list[Tensor]) -> float:
    difference = sum(float((a - b).double().square().sum()) for a, b in zip(values, references, strict=True))
    size = sum(float(b.double().square().sum()) for b in references)
    return float((difference / size) ** 0.5)
