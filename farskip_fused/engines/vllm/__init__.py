"""FarSkip in vLLM, as a plugin that vLLM finds by its entry point ``vllm.general_plugins``.

Installed next to vLLM, it lets ``vllm serve`` take converted checkpoints, and puts the expert kernels under vLLM's
fused MoE layer where ``--additional-config '{"farskip_experts": true}'`` says so. See docs/serving.md.
"""

from __future__ import annotations

from farskip_fused.record import CLASS_PREFIX

MODELS = "farskip_fused.engines.vllm.models"
ARCHITECTURES = (
    "FarSkipDeepseekV2ForCausalLM",
    "FarSkipDeepseekV3ForCausalLM",
    "FarSkipLlama4ForCausalLM",
    "FarSkipQwen3MoeForCausalLM",
)


def register() -> None:
    """What vLLM calls once in each of its processes; may be called again."""
    from vllm import ModelRegistry
    from vllm.config import vllm as settings

    from farskip_fused.engines.vllm import configs, experts

    configs.register()
    experts.register()
    # By name, so that the models are imported only where one of them is served.
    for architecture in ARCHITECTURES:
        ModelRegistry.register_model(architecture, f"{MODELS}:{architecture}")
    # Some releases choose their newer model runner by the architecture's name; a converted model runs as its stock one.
    if hasattr(settings, "DEFAULT_V2_MODEL_RUNNER_ARCHITECTURES"):
        stock = settings.DEFAULT_V2_MODEL_RUNNER_ARCHITECTURES
        converted = {name for name in ARCHITECTURES if name.removeprefix(CLASS_PREFIX) in stock}
        settings.DEFAULT_V2_MODEL_RUNNER_ARCHITECTURES = frozenset(stock | converted)
