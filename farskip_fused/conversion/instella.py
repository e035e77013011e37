"""AMD's Instella-MoE, the one public family that was trained with FarSkip connectivity, without its remote code.

A DeepSeek-V3 whose attention output is multiplied by ``sigmoid(gate_proj(x))`` before ``o_proj``. Its checkpoints say
``model_type: deepseek_v3``, so that transformers alone builds a stock DeepSeek-V3 of them, without the gate and with
standard connectivity; what they are is in ``architectures`` and in the keys of ``Keys``. Here they are read as a type
of their own, "instella_moe" (converted: "farskip_instella_moe"), and written back as they were.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, PreTrainedModel

from farskip_fused.connectivity import Connectivity
from farskip_fused.conversion.rewired import Rewired, register_classes
from farskip_fused.errors import UsageError
from farskip_fused.record import from_record, to_record

ARCHITECTURE, STOCK_TYPE, TYPE = "InstellaMoEForCausalLM", "deepseek_v3", "instella_moe"


@dataclass(frozen=True)
class Keys:
    """What an Instella config.json says of FarSkip, with its defaults. farskip_end_idx: the last layer, included."""

    farskip: bool = True
    farskip_start_idx: int = 0
    farskip_end_idx: int = 10_000
    attn_only_farskip: bool = False
    mlp_only_farskip: bool = False
    gated_attention: bool = True

    @classmethod
    def of(cls, config: dict[str, Any]) -> Keys:
        return cls(**{each.name: config[each.name] for each in fields(cls) if each.name in config})

    def record(self, num_layers: int) -> dict[str, Any]:
        """The same as this package writes it. Both partial modes together are standard connectivity."""
        if not self.farskip or (self.attn_only_farskip and self.mlp_only_farskip):
            return to_record(Connectivity.standard(), range(num_layers))
        last = min(self.farskip_end_idx, num_layers - 1)
        if not 0 <= self.farskip_start_idx <= last:
            raise UsageError(
                f"farskip_start_idx is {self.farskip_start_idx} and farskip_end_idx {self.farskip_end_idx}; of"
                f" {num_layers} layers that is none."
            )
        connectivity = Connectivity(not self.mlp_only_farskip, not self.attn_only_farskip)
        return to_record(connectivity, range(self.farskip_start_idx, last + 1))

    @classmethod
    def of_record(cls, record: Any, num_layers: int, *, gated: bool) -> Keys:
        """Raises UsageError for layers that do not follow each other, and for a depth of more than 1."""
        connectivity, layers = from_record(record, num_layers)
        if connectivity.depth > 1:
            raise UsageError(f"The model has depth {connectivity.depth}; an Instella checkpoint can only say depth 1.")
        if connectivity == Connectivity.standard():
            return cls(farskip=False, gated_attention=gated)
        if layers != list(range(layers[0], layers[-1] + 1)):
            raise UsageError(f"Layers {layers} are converted; an Instella checkpoint can only say one range of layers.")
        attention, mlp = connectivity.attention_reads_partial, connectivity.mlp_reads_before_attention
        return cls(True, layers[0], layers[-1], not mlp, not attention, gated)


class GatedAttention(Rewired):
    """The behaviour of Instella's attention: a gate on what goes into ``o_proj``."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        attention = cast(Any, self)
        attention.o_proj.gate = torch.sigmoid(attention.gate_proj(hidden_states))
        try:
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        finally:
            del attention.o_proj.gate


class GatedProjection(Rewired):
    """The behaviour of the output projection of such an attention."""

    gate: Tensor

    def forward(self, attended: Tensor) -> Tensor:
        return cast(Tensor, super().forward(attended * self.gate))  # type: ignore[misc]


class InstellaConfig(Rewired):
    """The behaviour of its configuration: DeepSeek-V3's, of another type, with ``gated_attention``."""

    gated_attention: bool = True

    @classmethod
    def _attributes(cls, stock: type) -> dict[str, Any]:
        return {"__name__": "InstellaMoEConfig", "__module__": __name__, "model_type": TYPE}


class InstellaModel(Rewired):
    """The behaviour of the model: DeepSeek-V3's, with gates. Without conversion its connectivity is standard."""

    @classmethod
    def _attributes(cls, stock: type) -> dict[str, Any]:
        return {"__name__": ARCHITECTURE, "config_class": InstellaConfig.of(stock.config_class)}  # type: ignore[attr-defined]

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        if not config.gated_attention:
            return
        for layer in cast(Any, self).model.layers:
            attention = layer.self_attn
            gate = nn.Linear(config.hidden_size, attention.o_proj.in_features, bias=False)
            nn.init.normal_(gate.weight, std=config.initializer_range)
            attention.gate_proj = gate.to(attention.o_proj.weight.dtype)
            attention.__class__ = GatedAttention.of(type(attention))
            attention.o_proj.__class__ = GatedProjection.of(type(attention.o_proj))


def is_instella(config: dict[str, Any]) -> bool:
    """Whether a config.json is that of an Instella checkpoint, as it says of itself or as only its keys can mean."""
    return ARCHITECTURE in (config.get("architectures") or []) or (
        config.get("model_type") == STOCK_TYPE
        and ("farskip_start_idx" in config or config.get("gated_attention") is True)
    )


def farskip_config(config: dict[str, Any]) -> Any:
    """The configuration of the converted type, from an Instella config.json."""
    from farskip_fused.conversion.models import FarSkipConfig

    keys = Keys.of(config)
    known = {each.name for each in fields(Keys)} | {"model_type", "architectures", "auto_map"}
    rest = {name: value for name, value in config.items() if name not in known}
    record = keys.record(rest["num_hidden_layers"])
    stock: Any = FarSkipConfig.of(InstellaConfig.of(DeepseekV3Config))
    return stock(**rest, farskip=record, gated_attention=keys.gated_attention)


def export(model: PreTrainedModel, path: Path) -> None:
    """Saves a converted Instella model in the layout that it came in.

    Raises UsageError for a model of another family, and for converted layers that its keys cannot say.
    """
    config: Any = model.config
    if config.model_type.removeprefix("farskip_") != TYPE:
        raise UsageError(f"A model of type {config.model_type} was given; only Instella's are written in its layout.")
    layers = config.num_hidden_layers
    standard = to_record(Connectivity.standard(), range(layers))
    keys = Keys.of_record(getattr(config, "farskip", standard), layers, gated=config.gated_attention)
    model.save_pretrained(path)
    file = path / "config.json"
    written = json.loads(file.read_text(encoding="utf-8"))
    identity = {"architectures": [ARCHITECTURE], "model_type": STOCK_TYPE}
    file.write_text(json.dumps(written | identity | asdict(keys), indent=2) + "\n", encoding="utf-8")


def register_instella() -> None:
    """Makes transformers' Auto classes know the type, as ``models.register`` does its converted form."""
    config_class, model_class = InstellaConfig.of(DeepseekV3Config), InstellaModel.of(DeepseekV3ForCausalLM)
    register_classes(TYPE, config_class, model_class, STOCK_TYPE)
