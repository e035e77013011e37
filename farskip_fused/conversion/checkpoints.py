"""Converted checkpoints: load one, make one from a stock checkpoint, check one."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from farskip_fused.connectivity import Connectivity, parse_layers
from farskip_fused.conversion.instella import TYPE as INSTELLA
from farskip_fused.conversion.instella import farskip_config, is_instella
from farskip_fused.conversion.llama4 import choose_kernels
from farskip_fused.conversion.models import FarSkipModel, checked_stock_classes, register
from farskip_fused.conversion.rewiring import set_additions
from farskip_fused.conversion.stored import CONFIG, StoredCheckpoint, compare_names, read_checkpoint, some
from farskip_fused.errors import UsageError
from farskip_fused.record import CLASS_PREFIX, TYPE_PREFIX, from_record, to_record


def load(path: str | os.PathLike[str], *, additions: str = "stock", **from_pretrained_kwargs: Any) -> PreTrainedModel:
    """The converted model of a local checkpoint, with every tensor accounted for.

    path: a directory written by ``save_pretrained`` of a converted model or by ``farskip convert``, or one of AMD's
        Instella-MoE.
    additions: the order in which the streams are added up, see ``set_additions``.
    from_pretrained_kwargs: handed to transformers' ``from_pretrained``, for example ``dtype`` and ``device_map``.
    Raises UsageError for a checkpoint that is missing, damaged, incomplete or not FarSkip.
    """
    stored = read_checkpoint(path)
    model_class: Any = AutoModelForCausalLM
    if is_instella(stored.config):
        from_pretrained_kwargs = {"config": farskip_config(stored.config)} | from_pretrained_kwargs
        model_class = FarSkipModel.of(checked_stock_classes(INSTELLA)[1])
    else:
        _require_farskip(stored)
    options = {"local_files_only": True} | from_pretrained_kwargs | {"output_loading_info": True}
    try:
        loaded: Any = model_class.from_pretrained(stored.path, **options)
    except RuntimeError as error:  # what transformers raises for tensors of another shape
        raise UsageError(f"{stored.path} does not hold this model's weights: {str(error).splitlines()[0]}") from error
    model, report = loaded
    for kind in ("missing", "unexpected", "mismatched"):
        names = sorted(str(name) for name in report[f"{kind}_keys"])
        if names:
            raise UsageError(f"{stored.path} is not complete: {kind} tensors {some(names)}.")
    if "experts_implementation" not in from_pretrained_kwargs:
        choose_kernels(model)
    return cast(PreTrainedModel, set_additions(model, additions))


def convert_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    connectivity: str | Connectivity = "farskip",
    layers: str | int | Iterable[int] = "all",
    *,
    overwrite: bool = False,
    check: bool = False,
    on_file: Callable[[Path], None] = lambda file: None,
) -> dict[str, Any]:
    """Makes a converted checkpoint from a stock (or converted) one: only config.json differs.

    The weights are hard links to those of the source, or copies on another file system; all other files are copies.
    Writing a checkpoint with safetensors replaces a file instead of changing it, so saving a model over the target
    leaves the source as it is. ``target`` appears complete or not at all.

    source: a checkpoint directory. target: the directory to make. connectivity, layers: as ``convert`` takes them.
    overwrite: replace an existing target.
    check: verify the tensors' names and shapes as ``check_checkpoint`` does, before the target appears.
    on_file: called with every file once it is there.
    Returns the report of ``describe``. Raises UsageError for bad arguments and checkpoints.
    """
    stored = read_checkpoint(source)
    chosen = Connectivity.named(connectivity)
    converted = parse_layers(layers, stored.num_layers)
    config = _farskip_config(stored) | {"farskip": to_record(chosen, converted)}
    place = _checked_target(stored.path, Path(target), overwrite)
    place.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
    try:
        made = scratch / "made"

        def put(here: str, there: str) -> None:
            _link_or_copy(Path(here), Path(there))
            on_file(Path(here))

        shutil.copytree(stored.path, made, copy_function=put, ignore=shutil.ignore_patterns(".*"))
        (made / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if check:
            check_checkpoint(made)
        if place.exists():
            place.rename(scratch / "replaced")
        made.rename(place)
    finally:
        if not place.exists() and (scratch / "replaced").exists():
            (scratch / "replaced").rename(place)
        shutil.rmtree(scratch)
    return describe(read_checkpoint(place))


def check_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Verifies a converted checkpoint without reading its weights and returns the report of ``describe``.

    Compares names and shapes of all tensors in the safetensors headers with those of the model that the configuration
    describes. Raises UsageError, naming tensors, if they differ, and for a quantised checkpoint, whose scales it does
    not know.
    """
    stored = read_checkpoint(path)
    _require_farskip(stored)
    if "quantization_config" in stored.config:
        raise UsageError(f"{stored.path} is quantised; its tensors cannot be checked without loading them.")
    config = AutoConfig.from_pretrained(stored.path, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    own = model.state_dict()
    tied = set(model.all_tied_weights_keys)
    ignored = list(model._keys_to_ignore_on_load_unexpected or [])
    # transformers reads both forms: one tensor an expert, as on the hub, and all experts in one tensor.
    problems = [
        compare_names(stored.shapes, {name: list(tensor.shape) for name, tensor in form.items()}, tied, ignored)
        for form in (revert_weight_conversion(model, own), own)
    ]
    if all(problems):
        raise UsageError(f"{stored.path} is not complete: tensors {'; '.join(problems[0])}.")
    return describe(stored)


def describe(stored: StoredCheckpoint) -> dict[str, Any]:
    """A converted checkpoint in words and numbers, for people and JSON."""
    connectivity, layers = from_record(stored.config.get("farskip"), stored.num_layers)
    return {
        "path": str(stored.path),
        "model_type": stored.config["model_type"],
        "connectivity": connectivity.name,
        "depth": connectivity.depth,
        "layers": layers,
        "num_layers": stored.num_layers,
        "tensors": len(stored.shapes),
        "bytes": sum(file.stat().st_size for file in stored.files),
    }


def _refuse_instella(stored: StoredCheckpoint) -> None:
    if is_instella(stored.config):
        raise UsageError(f"{stored.path} is an Instella-MoE checkpoint, FarSkip already; ff.load reads it as it is.")


def _require_farskip(stored: StoredCheckpoint) -> None:
    _refuse_instella(stored)
    if not stored.is_farskip:
        raise UsageError(
            f"{stored.path} is a stock {stored.stock_type} checkpoint, not a FarSkip one;"
            " convert it with `farskip convert`."
        )
    checked_stock_classes(stored.stock_type)
    register(stored.stock_type)
    from_record(stored.config.get("farskip"), stored.num_layers)


def _farskip_config(stored: StoredCheckpoint) -> dict[str, Any]:
    """config.json of the converted checkpoint, the record of the connectivity aside.

    ``auto_map`` names code that comes with a checkpoint and knows nothing of FarSkip, so it is left out.
    """
    _refuse_instella(stored)
    stock_name = checked_stock_classes(stored.stock_type)[1].__name__
    written = stored.config.get("architectures") or [stock_name]
    if [str(name).removeprefix(CLASS_PREFIX) for name in written] != [stock_name]:
        raise UsageError(
            f"{stored.path} has architectures {written}, but model_type {stored.stock_type}; only {stock_name}"
            " is supported."
        )
    identity = {"model_type": TYPE_PREFIX + stored.stock_type, "architectures": [CLASS_PREFIX + stock_name]}
    return {name: value for name, value in stored.config.items() if name != "auto_map"} | identity


def _checked_target(source: Path, target: Path, overwrite: bool) -> Path:
    source, place = source.resolve(), target.resolve()
    if place.is_relative_to(source) or source.is_relative_to(place):
        raise UsageError(f"Target {target} and source {source} lie in each other; name another target.")
    if place.exists() and not place.is_dir():
        raise UsageError(f"Target {target} is a file; name a directory.")
    if place.exists() and not overwrite:
        raise UsageError(f"Target {target} exists; name another or pass overwrite=True (--overwrite).")
    return place


def _link_or_copy(file: Path, to: Path) -> None:
    # Files of a download cache are links themselves. Small files are copied, as people edit them in place.
    file = file.resolve()
    if file.suffix == ".safetensors":
        try:
            os.link(file, to)
            return
        except OSError:  # another file system, or one without hard links
            pass
    shutil.copy2(file, to)
