"""Models and checkpoints of transformers' MoE families to FarSkip connectivity and back.

Importing this package registers the types of converted checkpoints with transformers' Auto classes, and the kernels
with its experts implementations.
"""

from farskip_fused.errors import UsageError

try:
    import transformers  # noqa: F401
except ModuleNotFoundError as error:
    raise UsageError("Conversion needs transformers; run: pip install 'farskip-fused[hf]'.") from error

from farskip_fused import transformers_experts  # noqa: F401
from farskip_fused.conversion.checkpoints import check_checkpoint, convert_checkpoint, load
from farskip_fused.conversion.families import FAMILIES
from farskip_fused.conversion.instella import export as export_instella
from farskip_fused.conversion.models import decoder_layers, register_all
from farskip_fused.conversion.parallel_experts import parallelize
from farskip_fused.conversion.rewiring import (
    as_teacher,
    connectivity_of,
    convert,
    experts_are_transposed,
    moe_blocks,
    revert,
    set_additions,
)

__all__ = [
    "FAMILIES",
    "as_teacher",
    "check_checkpoint",
    "connectivity_of",
    "convert",
    "convert_checkpoint",
    "decoder_layers",
    "experts_are_transposed",
    "export_instella",
    "load",
    "moe_blocks",
    "parallelize",
    "revert",
    "set_additions",
]

register_all()
