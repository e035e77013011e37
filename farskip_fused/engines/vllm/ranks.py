"""Between the ranks that vLLM has started: this package's communication where it can be had, vLLM's elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from vllm.config import VllmConfig
from vllm.distributed import GroupCoordinator
from vllm.logger import init_logger
from vllm.platforms import current_platform

import farskip_fused as ff
from farskip_fused.engines.vllm import settings
from farskip_fused.errors import UsageError

# One rank may compile or capture for minutes while another waits for its first message.
TIMEOUT_SECONDS = 600.0

logger = init_logger("vllm.farskip_fused")  # vLLM shows what goes to loggers under its own name

Communication = TypeVar("Communication")

_memory: ff.SymmetricMemory | None = None


def symmetric_memory(group: GroupCoordinator) -> ff.SymmetricMemory:
    """Symmetric memory among the ranks of a group of vLLM's; opened once a process, whose ranks are one group.

    Collective. Raises UsageError without nvshmem4py on GPUs.
    """
    global _memory
    if _memory is None:
        _memory = ff.init(group.cpu_group, timeout=TIMEOUT_SECONDS)
    return _memory


def ours_or_none(
    name: str, vllm_config: VllmConfig, setting: str, make: Callable[[], Communication]
) -> Communication | None:
    """What ``make`` opens, or None where vLLM's own communication stays: said in a line of the log.

    setting: of ``settings.py``; false keeps vLLM's, true raises the UsageError with which ``make`` refuses, and takes
        the interpreted kernels on CPU, which are for tests.
    """
    wanted = settings.read(vllm_config, setting)
    made, reason = None, f"{setting} is false"
    if wanted is None and not current_platform.is_cuda():
        reason = "there is no GPU"
    elif wanted is not False:
        try:
            made = make()
        except UsageError as error:
            if wanted:
                raise
            reason = str(error)
    logger.info_once("%s: %s", name, "farskip_fused's" if made is not None else f"vLLM's own ({reason})")
    return made
