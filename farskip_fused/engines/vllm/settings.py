"""What ``--additional-config`` says of this package: each setting is true, false or left out."""

from __future__ import annotations

from vllm.config import VllmConfig

from farskip_fused.errors import UsageError

EXPERTS = "farskip_experts"
ALL_REDUCE = "farskip_all_reduce"
ALL_TO_ALL = "farskip_all_to_all"


def read(vllm_config: VllmConfig, name: str) -> bool | None:
    """None where it is left out; UsageError for anything but true and false."""
    given = vllm_config.additional_config
    value = given.get(name) if isinstance(given, dict) else None
    if value is not None and not isinstance(value, bool):
        raise UsageError(f'{name} is {value!r} in --additional-config; write {{"{name}": true}} or false.')
    return value
