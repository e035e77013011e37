"""FarSkip in SGLang: an external model package, and the plugin (entry point ``sglang.srt.plugins``) that names it.

Installed next to SGLang, it lets ``python -m sglang.launch_server`` take converted checkpoints. SGLang imports every
module of an external model package and registers what it calls ``EntryClass``, here in ``models``. See docs/serving.md.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from farskip_fused.errors import UsageError
from farskip_fused.record import CLASS_PREFIX

VARIABLE = "SGLANG_EXTERNAL_MODEL_PACKAGE"


def register() -> None:
    """What SGLang calls once in each of its processes; may be called again.

    Raises UsageError where ``SGLANG_EXTERNAL_MODEL_PACKAGE`` names another package: SGLang takes one.
    """
    named = os.environ.get(VARIABLE) or __name__
    if named != __name__:
        raise UsageError(f"{VARIABLE} is {named}, and SGLang takes one package; unset it to serve FarSkip models.")
    os.environ[VARIABLE] = named
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from farskip_fused.engines.sglang import configs

    configs.register()
    shapes = "sglang.srt.configs.model_config.ModelConfig._derive_model_shapes"
    HookRegistry.register(shapes, as_stock_architecture, HookType.AROUND)
    if registry := sys.modules.get("sglang.srt.models.registry"):  # it has read the variable already
        registry.ModelRegistry.register(__name__, overwrite=True)


def as_stock_architecture(derive: Callable[..., None], model_config: Any) -> None:
    """Runs ``derive``, which knows latent attention by the architecture's name, on that of the stock model."""
    config = model_config.hf_config
    written = config.architectures
    config.architectures = [name.removeprefix(CLASS_PREFIX) for name in written]
    try:
        derive(model_config)
    finally:
        config.architectures = written
