"""The model families that can be converted, and how their MoE blocks split. Free of torch.

All have the stock pre-norm decoder layer (``input_layernorm``, ``self_attn``, ``post_attention_layernorm``, ``mlp``)
and an MoE block with ``gate(flat) -> (logits, weights [N, K], indices [N, K])`` and
``experts(flat [N, H], indices, weights) -> [N, H]``. They differ in their shared experts and in names. Llama-4's
scores multiply the input of its experts instead of their output (llama4.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from farskip_fused.errors import UsageError

TYPE_PREFIX = "farskip_"
CLASS_PREFIX = "FarSkip"


@dataclass(frozen=True)
class Family:
    """One transformers ``model_type``.

    shared: name of the shared experts inside the MoE block; None if the family has none. A block of a family that has
        them may still hold None there.
    shared_gate: name of the linear map whose sigmoid scales the shared experts' output; None if there is none.
    mlp, router: names of the MLP or MoE block inside the decoder layer, and of the router inside the block.
    scales_inputs: whether the router's scores multiply the input of the experts, as only Llama-4's do.
    reads_images: whether the model is of transformers' image-text-to-text classes, with the decoder layers in its
        ``language_model``.
    """

    model_type: str
    shared: str | None = None
    shared_gate: str | None = None
    mlp: str = "mlp"
    router: str = "gate"
    scales_inputs: bool = False
    reads_images: bool = False

    @property
    def farskip_type(self) -> str:
        """The ``model_type`` of its converted checkpoints."""
        return TYPE_PREFIX + self.model_type


_LLAMA4: dict[str, Any] = {
    "shared": "shared_expert",
    "mlp": "feed_forward",
    "router": "router",
    "scales_inputs": True,
}

FAMILIES = {
    family.model_type: family
    for family in (
        Family("deepseek_v2", shared="shared_experts"),
        Family("deepseek_v3", shared="shared_experts"),
        Family("dots1", shared="shared_experts"),
        Family("ernie4_5_moe", shared="shared_experts"),
        Family("glm4_moe", shared="shared_experts"),
        Family("glm4_moe_lite", shared="shared_experts"),
        Family("hunyuan_v1_moe", shared="shared_mlp"),
        Family("llama4", reads_images=True, **_LLAMA4),
        Family("llama4_text", **_LLAMA4),
        Family("mixtral"),
        Family("olmoe"),
        Family("qwen2_moe", shared="shared_expert", shared_gate="shared_expert_gate"),
        Family("qwen3_moe"),
    )
}


def family_of(model_type: str) -> Family:
    """The family of a stock or converted ``model_type``; UsageError if it is not supported."""
    family = FAMILIES.get(str(model_type).removeprefix(TYPE_PREFIX))
    if family is None:
        raise UsageError(f"Model family {model_type!r} is not supported; supported are {', '.join(FAMILIES)}.")
    return family
