"""Training states on disk, from which training goes on bit for bit."""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from farskip_fused.distillation.blocks import Blocks
from farskip_fused.distillation.config import DistillationConfig
from farskip_fused.distillation.parallel import Parallel, local
from farskip_fused.errors import UsageError

PREFIX = "step-"
PROGRESS = "progress.json"
# The last one, and one in case that is lost.
KEPT = 2


class Checkpoints:
    """States of one training, ``folder/step-<n>``: tensors by torch.distributed.checkpoint, the rest as JSON.

    A state appears complete or not at all. fingerprint: of what the training began with; another one is refused.
    """

    def __init__(self, folder: Path, fingerprint: str, parallel: Parallel) -> None:
        self.folder, self.fingerprint, self.parallel = folder, fingerprint, parallel

    def steps(self) -> list[int]:
        found = (each.name.removeprefix(PREFIX) for each in self.folder.glob(f"{PREFIX}*"))
        return sorted(int(name) for name in found if name.isdigit())

    def save(self, step: int, tensors: dict[str, Any], progress: dict[str, Any]) -> None:
        place = self.folder / f"{PREFIX}{step:08d}"
        scratch = place.with_suffix(".partial")
        if self.parallel.rank == 0:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
            record = {"fingerprint": self.fingerprint, **progress}
            (scratch / PROGRESS).write_text(json.dumps(record), encoding="utf-8")
        self._meet()
        with _quiet():
            dcp.save(tensors, checkpoint_id=scratch, no_dist=self.parallel.world == 1)
        if self.parallel.rank == 0:
            shutil.rmtree(place, ignore_errors=True)
            scratch.rename(place)
            for old in self.steps()[:-KEPT]:
                shutil.rmtree(self.folder / f"{PREFIX}{old:08d}")
        self._meet()

    def progress(self) -> dict[str, Any]:
        """That of the last state. UsageError if it belongs to another training."""
        place = self._last()
        record: dict[str, Any] = json.loads((place / PROGRESS).read_text(encoding="utf-8"))
        if record.pop("fingerprint") != self.fingerprint:
            raise UsageError(
                f"{place} belongs to a training with another model, data, configuration or number of ranks; go on with"
                " the same, or name another folder."
            )
        return record

    def load(self, tensors: dict[str, Any]) -> None:
        """Fills the tensors from the last state."""
        with _quiet():
            dcp.load(tensors, checkpoint_id=self._last(), no_dist=self.parallel.world == 1)

    def _last(self) -> Path:
        return self.folder / f"{PREFIX}{self.steps()[-1]:08d}"

    def _meet(self) -> None:
        if self.parallel.world > 1:
            dist.barrier()


@contextmanager
def _quiet() -> Iterator[None]:
    """Within it torch does not warn that one process is saving, which is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


def fingerprint(model: nn.Module, blocks: Blocks, config: DistillationConfig, parallel: Parallel) -> str:
    """A hash of what decides the course of a training, the same at all ranks; of weights and data a sample."""
    digest = hashlib.sha256(json.dumps([asdict(config), parallel.world, list(blocks.ids.shape)]).encode())
    rows = torch.linspace(0, len(blocks) - 1, min(len(blocks), 1024)).long()
    for tensor in [blocks.ids[rows], *(local(each).detach().flatten()[:8] for each in model.parameters())]:
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    agreed = [digest.hexdigest()]
    if parallel.world > 1:  # every rank has other weights
        dist.broadcast_object_list(agreed)
    return agreed[0]


def generators(device: torch.device) -> dict[str, Tensor]:
    """States of torch's generators that training draws from."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_generators(states: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)


def numbered(tensors: Iterable[Tensor]) -> dict[str, Tensor]:
    return {str(index): tensor for index, tensor in enumerate(tensors)}
