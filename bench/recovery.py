"""`python -m farskip_fused.bench.recovery`: what conversion costs and what brings it back, on models trained here.

Two small MoE models learn Python on one GPU; converted in many ways they are measured untrained and after FCSD, SFT and
variants of both (the paper's Fig. 3 and Tab. 2, and its first open question). The work is cut into units; every call
does those that fit into ``--seconds`` and are not done yet, in ``--state``, until it says that nothing is left. Then,
and at any time, ``--write FOLDER`` writes recovery.md with its tables and figures there.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import farskip_fused as ff
from farskip_fused.bench.recovery_report import write
from farskip_fused.bench.recovery_subjects import FULL, TOY, Corpus, Sizes, build, corpus
from farskip_fused.bench.report import environment
from farskip_fused.distillation import DistillationConfig, evaluate
from farskip_fused.distillation.sweep import sweep
from farskip_fused.distillation.tasks import function_tasks, pass_rate

SHAPES = ("deepseek", "qwen")
# Steps whose speed decides how long a teacher is trained; the first are not counted.
PROBE_STEPS, PROBE_WARM_UP = 12, 4
MAX_NEW_TOKENS = 64
SHARES = ("25%", "50%", "75%")


@dataclass(frozen=True)
class Recovery:
    """A training of a converted model: how it is converted, and what differs from FCSD at the swept learning rate.

    depth: of farskip. batch: factor of the usual batch; the tokens stay the same.
    """

    connectivity: str = "farskip"
    depth: int = 1
    layers: str = "all"
    objective: str = "kl"
    batch: float = 1.0
    freeze_embeddings: bool = False
    seed: int = 0


def recoveries(shape: str, sizes: Sizes) -> dict[str, Recovery]:
    """By name, the important ones first."""
    found = {"fcsd-0": Recovery(), "sft-0": Recovery(objective="sft")}
    if shape == "deepseek":
        for seed in range(1, sizes.seeds):
            found |= {f"fcsd-{seed}": Recovery(seed=seed), f"sft-{seed}": Recovery(objective="sft", seed=seed)}
        found |= {
            "control": Recovery("standard", objective="sft"),
            "kl+l2": Recovery(objective="kl+l2"),
            "frozen-embeddings": Recovery(freeze_embeddings=True),
            "quarter-batch": Recovery(batch=0.25),
            "four-fold-batch": Recovery(batch=4.0),
            "attention-only": Recovery("attention_only"),
            "moe-only": Recovery("moe_only"),
            "depth-2": Recovery(depth=2),
            "last-50%": Recovery(layers="last:50%"),
            "last-75%": Recovery(layers="last:75%"),
        }
    return found


def conversions() -> dict[str, tuple[str, str]]:
    """What is measured without training: name to connectivity and layers."""
    sides = {
        f"{side}-{share}": ("farskip", f"{side}:{share}") for share in ("1", *SHARES) for side in ("first", "last")
    }
    partial = {"attention-only": ("attention_only", "all"), "moe-only": ("moe_only", "all")}
    return sides | {"all": ("farskip", "all")} | partial


class Bench:
    """The units of work and their results, one JSON file each in ``state``."""

    def __init__(self, state: Path, sizes: Sizes, device: torch.device) -> None:
        self.state, self.sizes, self.device = state, sizes, device
        self.console = Console()
        (state / "units").mkdir(parents=True, exist_ok=True)
        record = json.dumps(asdict(sizes))
        sizes_file = state / "sizes.json"
        if not sizes_file.exists():
            sizes_file.write_text(record)
        elif sizes_file.read_text() != record:
            raise ff.UsageError(f"{state} holds a run of other sizes; name another --state.")
        self._teachers: dict[str, Any] = {}
        self.tasks = function_tasks(sizes.tasks)

    def units(self) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
        """Name and work of every unit, in the order in which they are needed."""
        for shape in SHAPES:
            yield f"{shape}/teacher", partial(self._train_teacher, shape)
        for shape in SHAPES:
            for objective in ("kl", "sft"):
                yield f"{shape}/sweep-{objective}", partial(self._sweep, shape, objective)
            for name, recovery in recoveries(shape, self.sizes).items():
                yield f"{shape}/{name}", partial(self._recover, shape, recovery)
            for name, how in conversions().items():
                yield f"{shape}/untrained-{name}", partial(self._damage, shape, *how)

    def result(self, name: str) -> dict[str, Any] | None:
        file = self.state / "units" / f"{name.replace('/', '.')}.json"
        return json.loads(file.read_text()) if file.exists() else None

    def run(self, seconds: float) -> list[str]:
        """Does units until the time is spent; returns the names of those that are left."""
        started = time.perf_counter()
        left = [name for name, _ in self.units() if self.result(name) is None]
        for name, work in self.units():
            if name not in left:
                continue
            spent = time.perf_counter() - started
            if spent > 0.1 * seconds and spent + self._expected(name) > seconds:
                break
            began = time.perf_counter()
            found = work() | {"seconds": time.perf_counter() - began}
            (self.state / "units" / f"{name.replace('/', '.')}.json").write_text(json.dumps(found))
            left.remove(name)
            short = {key: found[key] for key in ("kl", "val_ce", "pass_at_1", "seconds") if key in found}
            self.console.print(name, {key: round(value, 4) for key, value in short.items()})
        return left

    def _teacher_seconds(self, shape: str) -> float:
        return self.sizes.teacher_seconds[SHAPES.index(shape)]

    def _expected(self, name: str) -> float:
        """Seconds, from units of the same kind that are done."""
        if name.endswith("/teacher"):
            return 1.3 * self._teacher_seconds(name.partition("/")[0])
        untrained = "untrained" in name
        done = [each["seconds"] for n, _ in self.units() if ("untrained" in n) == untrained and (each := self.result(n))
                and not n.endswith("/teacher")]  # fmt: skip
        return 1.2 * max(done, default=60.0)

    @cached_property
    def corpus(self) -> Corpus:
        with self.console.status("Reading the source on this machine"):
            return corpus(self.state, self.sizes)

    def _teacher(self, shape: str) -> Any:
        if shape not in self._teachers:
            from transformers import AutoModelForCausalLM

            model = AutoModelForCausalLM.from_pretrained(self.state / shape, local_files_only=True, dtype="auto")
            self._teachers = {shape: self._placed(model).eval()}
        return self._teachers[shape]

    def _placed(self, model: Any) -> Any:
        """On the device, with the kernels where they are compiled."""
        model.to(self.device)
        return ff.use_fused_experts(model) if self.device.type == "cuda" else model

    def _train_teacher(self, shape: str) -> dict[str, Any]:
        sizes, data = self.sizes, self.corpus
        model = self._placed(build(shape, sizes, data.tokenizer.eos_token_id))
        config = DistillationConfig(
            objective="sft", batch_tokens=sizes.teacher_batch, micro_batch_tokens=sizes.micro_batch,
            learning_rate=sizes.teacher_rate, final_learning_rate=0.02, weight_decay=0.1, warmup_steps=100,
            balance_rate=0.01 if shape == "deepseek" else 0.0,
        )  # fmt: skip
        before = copy.deepcopy(model)
        ff.distill(model, data.training, config, steps=PROBE_WARM_UP, console=self.console)
        probe = ff.distill(model, data.training, config, steps=PROBE_STEPS, console=self.console)
        seconds = self._teacher_seconds(shape)
        steps = max(10, int(seconds * probe.tokens_per_second / sizes.teacher_batch))
        report = ff.distill(
            before, data.training, config, steps=steps, warmup_steps=min(100, steps // 10),
            description=f"Teacher, {shape}", console=self.console,
        )  # fmt: skip
        before.save_pretrained(self.state / shape)
        trained = {"tokens": report.tokens, "tokens_per_second": report.tokens_per_second, "peak": report.peak_bytes}
        parameters = sum(parameter.numel() for parameter in before.parameters())
        about = {"sources": data.sources, "training_tokens": data.training.numel(), "parameters": parameters}
        return trained | about | self._measured(before.eval(), None)

    def _config(self, recovery: Recovery, rate: float) -> DistillationConfig:
        batch = int(self.sizes.recovery_batch * recovery.batch)
        return DistillationConfig(
            objective=recovery.objective, steps=max(2, self.sizes.recovery_tokens // batch), batch_tokens=batch,
            micro_batch_tokens=min(batch, self.sizes.micro_batch), learning_rate=rate,
            freeze_embeddings=recovery.freeze_embeddings, seed=1 + recovery.seed,
        )  # fmt: skip

    def _sweep(self, shape: str, objective: str) -> dict[str, Any]:
        teacher = self._teacher(shape)
        model = ff.convert(copy.deepcopy(teacher))
        config = self._config(Recovery(objective=objective), self.sizes.swept_rates[0])
        steps = max(2, self.sizes.sweep_tokens // config.batch_tokens)
        found = sweep(
            model, self.corpus.training, config, "lr", values=self.sizes.swept_rates, steps=steps, teacher=teacher,
            console=self.console,
        )  # fmt: skip
        return found.to_dict()

    def _recover(self, shape: str, recovery: Recovery) -> dict[str, Any]:
        teacher = self._teacher(shape)
        connectivity = replace(ff.Connectivity.named(recovery.connectivity), depth=recovery.depth)
        model = ff.convert(copy.deepcopy(teacher), connectivity, recovery.layers)
        swept = self.result(f"{shape}/sweep-{'sft' if recovery.objective == 'sft' else 'kl'}")
        assert swept is not None
        config = self._config(recovery, swept["winner"])
        report = ff.distill(
            model,
            self.corpus.training,
            config,
            teacher=teacher,
            description=f"{shape} {recovery}",
            console=self.console,
        )
        trained = {"tokens": report.tokens, "rate": swept["winner"], "skipped": len(report.skipped)}
        return asdict(recovery) | trained | self._measured(model, teacher)

    def _damage(self, shape: str, connectivity: str, layers: str) -> dict[str, Any]:
        teacher = self._teacher(shape)
        model = ff.convert(copy.deepcopy(teacher), connectivity, layers)
        return {"connectivity": connectivity, "layers": layers} | self._measured(model, teacher)

    def _measured(self, model: Any, teacher: Any) -> dict[str, Any]:
        text = evaluate(model, self.corpus.validation, teacher, batch_tokens=self.sizes.micro_batch)
        solved = pass_rate(model, self.corpus.tokenizer, self.tasks, max_new_tokens=MAX_NEW_TOKENS, batch=512)
        return text.to_dict() | solved.to_dict()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--state", type=Path, default=Path("build/recovery"))
    parser.add_argument("--seconds", type=float, default=500.0, help="that this call may take")
    parser.add_argument("--toy", action="store_true", help="sizes for a try without a GPU")
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="write recovery.md and its figures")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write results as JSON once nothing is left")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bench = Bench(options.state, TOY if options.toy else FULL, device)
    left = bench.run(options.seconds)
    results = {name: found for name, _ in bench.units() if (found := bench.result(name)) is not None}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    write(results, {"device": name, "torch": torch.__version__}, options.write, bench.console)
    if options.json is not None and not left:
        facts = environment() if device.type == "cuda" else {"gpu": name, "torch": torch.__version__}
        units = {unit: {key: each for key, each in found.items() if key != "solved"} for unit, found in results.items()}
        options.json.write_text(json.dumps({"environment": facts, "units": units}, indent=1))
    print(f"{len(left)} units left: {', '.join(left)}" if left else "Nothing is left.")


if __name__ == "__main__":
    main()
