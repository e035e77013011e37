"""AdamW on float32 weights, its learning rate over the steps, and which weights it trains."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from farskip_fused.connectivity import parse_layers
from farskip_fused.distillation.config import WARMUP_STEPS, DistillationConfig
from farskip_fused.distillation.parallel import Parallel, local
from farskip_fused.errors import UsageError


class Trained(NamedTuple):
    """A parameter of the model, and the one that is optimised: itself, or its float32 version."""

    name: str
    parameter: nn.Parameter
    master: nn.Parameter


class Optimiser:
    """AdamW; parameters of 16 bits are trained through float32 versions, which also add up their gradients."""

    def __init__(self, model: nn.Module, config: DistillationConfig, steps: int) -> None:
        self._config, self._steps = config, steps
        chosen = [(name, each) for name, each in model.named_parameters() if each.requires_grad]
        if not chosen:
            raise UsageError("No parameter of the model requires a gradient; unfreeze what is to be trained.")
        self.trained = [Trained(name, each, _master(each)) for name, each in chosen]
        self._hooks = [
            each.parameter.register_post_accumulate_grad_hook(_adding_to(each.master))
            for each in self.trained
            if each.master is not each.parameter
        ]
        masters = [each.master for each in self.trained]
        groups: list[dict[str, Any]] = [
            {"params": [each for each in masters if each.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [each for each in masters if each.ndim <= 1], "weight_decay": 0.0},
        ]
        self.adamw = torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)

    def close(self) -> None:
        """Leaves the model's parameters without hooks and gradients."""
        self.clear()
        for hook in self._hooks:
            hook.remove()

    def learning_rate(self, step: int) -> float:
        config = self._config
        warmup = config.warmup_steps if config.warmup_steps is not None else min(WARMUP_STEPS, self._steps // 10)
        return config.learning_rate * learning_rate_factor(step, self._steps, warmup, config.final_learning_rate)

    def gradient_norm(self, parallel: Parallel) -> float:
        """Completes the gradients over the ranks and returns their norm."""
        gradients = {each.parameter: each.master.grad for each in self.trained if each.master.grad is not None}
        parallel.reduce(gradients)
        return parallel.norm(gradients).item()

    def step(self, step: int, norm: float) -> None:
        """Clips the gradients, whose norm is given, and moves the weights."""
        scale = self._config.gradient_clip / (norm + 1e-6)
        gradients = [local(each.master.grad) for each in self.trained if each.master.grad is not None]
        if scale < 1:
            torch._foreach_mul_(gradients, scale)
        for group in self.adamw.param_groups:
            group["lr"] = self.learning_rate(step)
        self.adamw.step()
        self.clear()
        self.round()

    def clear(self) -> None:
        for each in self.trained:
            each.parameter.grad = each.master.grad = None

    @torch.no_grad()
    def round(self) -> None:
        """The model's weights of 16 bits from the float32 ones."""
        for each in self.trained:
            if each.master is not each.parameter:
                each.parameter.copy_(each.master)

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Float32 weights and AdamW's moments by name; the tensors themselves, so that they can be loaded into."""
        return {each.name: {"weight": each.master.data, **self._moments(each.master)} for each in self.trained}

    def _moments(self, master: nn.Parameter) -> dict[str, Tensor]:
        state = self.adamw.state[master]
        if not state:  # no step yet: as AdamW itself begins
            state["step"] = torch.zeros((), dtype=torch.float32, device=local(master).device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(master.data), torch.zeros_like(master.data)
        return cast(dict[str, Tensor], state)


def learning_rate_factor(step: int, steps: int, warmup: int, final: float) -> float:
    """Share of the peak learning rate at optimizer step ``step`` of ``steps``, counted from 0."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


@contextmanager
def choose_parameters(model: nn.Module, config: DistillationConfig) -> Iterator[None]:
    """Within it only what the configuration trains requires a gradient. Raises UsageError for a model in float16."""
    if any(parameter.dtype == torch.float16 for parameter in model.parameters()):
        raise UsageError("The model is in float16, in which small gradients vanish; load it in bfloat16.")
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    frozen = set(cast(Any, model).get_input_embeddings().parameters()) if config.freeze_embeddings else set()
    if config.train_layers != "all":
        from farskip_fused.conversion import decoder_layers

        layers = decoder_layers(model)
        chosen = {p for i in parse_layers(config.train_layers, len(layers)) for p in layers[i].parameters()}
        frozen |= set(model.parameters()) - chosen
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        # By name: splitting a model over ranks makes new parameters.
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(before.get(name, parameter.requires_grad))


def _master(parameter: nn.Parameter) -> nn.Parameter:
    if parameter.dtype in (torch.float32, torch.float64):
        return parameter
    return nn.Parameter(parameter.detach().float())


def _adding_to(master: nn.Parameter) -> Any:
    def add(parameter: Tensor) -> None:
        gradient = cast(Tensor, parameter.grad)
        parameter.grad = None
        if master.grad is None:
            master.grad = gradient.float()
        else:
            master.grad += gradient

    return add
