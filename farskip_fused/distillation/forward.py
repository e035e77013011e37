"""Running a causal language model up to its output head, where losses take over from logits.

The model itself is called, with something else in place of its head's forward: so every wrapper around it (FSDP, PEFT,
hooks) does what it does in any forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from farskip_fused.distillation.blocks import Blocks, model_inputs
from farskip_fused.errors import UsageError

# Relative to the largest logit: far above the rounding of bfloat16, far below a factor or a cap.
SAME_LOGITS = 1e-2


def at_head(model: nn.Module, blocks: Blocks, function: Callable[[Tensor], Tensor]) -> Tensor:
    """``function`` of the final hidden states, after the last norm, of all counted predictions: [M, H]."""
    head, inputs = head_of(model), model_inputs(blocks, device_of(model))

    def predicting(hidden: Tensor) -> Tensor:
        return function(blocks.of_predictions(hidden[:, :-1]))

    with _in_place_of(head, predicting):
        result: Tensor = model(**inputs).logits
    return result


def hidden_states(model: nn.Module, blocks: Blocks) -> Tensor:
    """Final hidden states, after the last norm, of all counted predictions: [M, H]."""
    return at_head(model, blocks, lambda hidden: hidden)


def head_of(model: nn.Module) -> nn.Linear:
    return cast(nn.Linear, cast(Any, model).get_output_embeddings())


def device_of(model: nn.Module) -> torch.device:
    return head_of(model).weight.device


def checked_head(model: nn.Module, blocks: Blocks, vocabulary: int | None = None) -> nn.Linear:
    """The output head of a causal language model that can run on ``blocks``, with logits that are the head's output.

    Raises UsageError for models that do more to their logits (scale or cap them), for ids that the model does not know,
    for blocks longer than it knows, for documents that it cannot keep apart, and for a head that is not of size
    ``vocabulary``.
    """
    head = head_of(model)
    if not isinstance(head, nn.Linear):
        raise UsageError(f"The {type(model).__name__} has no linear output head; give a causal language model.")
    if vocabulary not in (None, head.out_features):
        raise UsageError(f"The teacher has a vocabulary of {head.out_features}, the model one of {vocabulary}.")
    lowest, highest = int(blocks.ids.min()), int(blocks.ids.max())
    known = cast(Any, model).get_input_embeddings().num_embeddings
    if lowest < 0 or highest >= known:
        raise UsageError(
            f"The data has token ids {lowest} to {highest}, the model knows 0 to {known - 1};"
            " use the model's own tokenizer."
        )
    longest = getattr(cast(Any, model).config, "max_position_embeddings", None)
    if longest is not None and blocks.block_length > longest:
        raise UsageError(
            f"Blocks of {blocks.block_length} tokens are longer than the model's {longest}; cut them shorter."
        )
    with eval_mode(model), torch.no_grad():
        _check_logits(model, head, blocks)
        if blocks.positions is not None:
            _check_bounds(model, blocks)
    return head


def _check_logits(model: nn.Module, head: nn.Linear, blocks: Blocks) -> None:
    probe = Blocks(blocks.ids[:1, :8])
    seen: list[Tensor] = []

    def note(hidden: Tensor) -> Tensor:
        seen.append(nn.functional.linear(hidden, head.weight, head.bias))
        return seen[0]

    with _in_place_of(head, note):
        logits = cast(Any, model)(**model_inputs(probe, head.weight.device)).logits
    if not _same(logits, seen[0]):
        raise UsageError(f"The {type(model).__name__} changes its logits after the output head; it is not supported.")


def _check_bounds(model: nn.Module, blocks: Blocks) -> None:
    """Whether a document's states are the same behind another one as alone."""
    # Two rows: some implementations of attention take packed positions of a single one only.
    ids = blocks.ids[[0, -1], :8]
    half = ids.shape[1] // 2
    positions = torch.cat([torch.arange(half), torch.arange(ids.shape[1] - half)]).expand(2, -1)
    alone = hidden_states(model, Blocks(ids[:, half:]))
    behind = hidden_states(model, Blocks(ids, positions)).unflatten(0, (2, -1))[:, half:].flatten(0, 1)
    if not _same(behind, alone):
        raise UsageError(
            f"The {type(model).__name__} cannot keep packed documents apart (flash attention cannot in batches); load"
            " it with attn_implementation='sdpa', or give blocks of token ids, which are taken as one text each."
        )


def _same(found: Tensor, expected: Tensor) -> bool:
    # What is not finite comes from the weights and is for the training to notice.
    found, expected = found.float().nan_to_num(), expected.float().nan_to_num()
    # Not the largest difference: between experts a rounding may decide, for a token or two.
    difference = (found - expected).abs().amax(dim=-1).flatten()
    return bool(difference.median() <= SAME_LOGITS * expected.abs().max())


@contextmanager
def _in_place_of(head: nn.Linear, function: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within it, calling the head calls ``function`` of its input."""
    before = vars(head).get("forward")
    head.forward = function  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        if before is None:
            del head.forward
        else:
            head.forward = before  # type: ignore[method-assign]


@contextmanager
def eval_mode(*models: nn.Module | None) -> Iterator[None]:
    """Within it the models are in eval mode; each is put back into its own."""
    given = [model for model in models if model is not None]
    training = [model.training for model in given]
    for model in given:
        model.eval()
    try:
        yield
    finally:
        for model, mode in zip(given, training, strict=True):
            model.train(mode)
