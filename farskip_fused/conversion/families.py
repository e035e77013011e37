"""The model families that can be converted, and how their MoE blocks split. Free of torch.

All have the stock pre-norm decoder layer (``input_layernorm``, ``self_attn``, ``post_attention_layernorm``, ``mlp``)
and an MoE block with ``gate(flat) -> (logits, weights [N, K], indices [N, K])`` and
``experts(flat [N, H], indices, weights) -> [N, H]``. They differ in their shared experts only.
"""

from __future__ import annotations

from dataclasses import dataclass

from farskip_fused.errors import UsageError

TYPE_PREFIX = "farskip_"
CLASS_PREFIX = "FarSkip"


@dataclass(frozen=True)
class Family:
    """One transformers ``model_type``.

    shared: name of the shared experts inside the MoE block; None if the family has none. A block of a family that has
        them may still hold None there.
    shared_gate: name of the linear map whose sigmoid scales the shared experts' output; None if there is none.
    """

    model_type: str
    shared: str | None = None
    shared_gate: str | None = None

    @property
    def farskip_type(self) -> str:
        """The ``model_type`` of its converted checkpoints."""
        return TYPE_PREFIX + self.model_type


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
