"""The whole path on a small model: train, convert, lose accuracy, recover it, save, reload, split over processes.

Written on the public API alone. Text, model and schedule are small enough for two CPU cores; a GPU is used if there.
"""

from __future__ import annotations

import copy
import json
import platform
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

import farskip_fused as ff
from farskip_fused import demo_expert_parallel
from farskip_fused.demo_figures import draw_recovery, results_table
from farskip_fused.distillation import (
    DistillationReport,
    Evaluation,
    evaluate,
    split,
    standard_library,
    token_blocks,
    train_tokenizer,
    unigram_cross_entropy,
)
from farskip_fused.errors import UsageError
from farskip_fused.plan import Job
from farskip_fused.plan.figure import draw

# Name in the report: connectivity and layers, as ff.convert takes them.
CONVERSIONS = {
    "last_half": ("farskip", "last:50%"),
    "attention_only": ("attention_only", "all"),
    "moe_only": ("moe_only", "all"),
    "all": ("farskip", "all"),
}
MODEL, REPORT, RECOVERY, SCHEDULE = "model", "report.json", "recovery.png", "schedule.png"
# More threads than this slow matrices of this size down.
MAX_THREADS = 4


@dataclass(frozen=True)
class DemoSettings:
    """Sizes of the demo. Tokens a second and steps were chosen together: about six minutes on two cores."""

    vocab_size: int = 1024
    hidden_size: int = 96
    num_layers: int = 8
    num_experts: int = 16
    moe_intermediate_size: int = 64
    block_length: int = 128
    batch_tokens: int = 1024
    teacher_steps: int = 1600
    teacher_learning_rate: float = 5e-3
    recovery_steps: int = 320
    recovery_learning_rate: float = 2e-3
    validation_blocks: int = 256
    evaluations: int = 5
    seed: int = 0
    prompt: str = "import os\n\n\ndef read_lines(path):\n"
    new_tokens: int = 64


@dataclass(frozen=True)
class Corpus:
    """Blocks of token ids [N, T] and the tokenizer that made them."""

    tokenizer: Any
    training: Tensor
    validation: Tensor
    documents: int


def run(output: Path, *, overwrite: bool = False, settings: DemoSettings | None = None) -> dict[str, Any]:
    """Runs the demo, writes its files to ``output``, prints its table and returns the report.

    Raises UsageError if ``output`` exists and ``overwrite`` is not set; with it, files of the same names are replaced.
    """
    if output.exists() and not (overwrite and output.is_dir()):
        advice = "name another directory" if not output.is_dir() else "name another or pass --overwrite"
        raise UsageError(f"The output {output} exists; {advice}.")
    settings = settings or DemoSettings()
    started = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    console = Console()
    output.mkdir(parents=True, exist_ok=True)
    with _threads(MAX_THREADS):
        with console.status("Reading the standard library and training a tokenizer"):
            corpus = read_corpus(settings)
        unigram = unigram_cross_entropy(corpus.training, corpus.validation, settings.vocab_size)
        teacher, teaching = train_teacher(corpus, settings, device, console)
        with console.status("Converting"):
            damage = convert_and_evaluate(teacher, corpus)
        trained, reports = recover(teacher, corpus, settings, console)
        with console.status("Saving, and reloading in a new process"):
            reload = save_and_reload(trained["fcsd"], corpus, settings, output / MODEL)
    with console.status("Splitting the experts over processes"):
        ep = demo_expert_parallel.run(output / MODEL)
    after = {name: report.evaluations[-1][1] for name, report in reports.items()}
    before = teaching.evaluations[-1][1]
    report = {
        "unigram": {"val_ce": unigram},
        "teacher": before.to_dict(),
        "converted": {name: evaluation.to_dict() for name, evaluation in damage.items()},
        **{name: evaluation.to_dict() for name, evaluation in after.items()},
        "damage_left": (after["fcsd"].val_ce - before.val_ce) / (damage["all"].val_ce - before.val_ce),
        **reload,
        "ep": ep,
        "corpus": {
            "documents": corpus.documents,
            "training_tokens": corpus.training.numel(),
            "validation_tokens": corpus.validation.numel(),
        },
        "parameters": sum(parameter.numel() for parameter in teacher.parameters()),
        "training": {name: _summary(each) for name, each in {"teacher": teaching, **reports}.items()},
        "settings": asdict(settings),
        "environment": environment(device),
    }
    draw_recovery(output / RECOVERY, before, damage["all"], reports)
    draw(output / SCHEDULE, Job("deepseek-v2-lite", "h100-ib400", ep=8, batch=8))
    report["seconds"] = time.perf_counter() - started
    (output / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    console.print(results_table(report))
    return report


def read_corpus(settings: DemoSettings) -> Corpus:
    """The standard library as blocks; validation blocks are a fixed random choice from all validation files."""
    documents = standard_library()
    training, validation = split(documents)
    tokenizer = train_tokenizer(training, settings.vocab_size)
    held_out = token_blocks(validation, tokenizer, settings.block_length)
    choice = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(settings.seed))
    return Corpus(
        tokenizer,
        token_blocks(training, tokenizer, settings.block_length),
        held_out[choice[: settings.validation_blocks]],
        len(documents),
    )


def build_model(settings: DemoSettings, end_of_text: int) -> DeepseekV3ForCausalLM:
    """A stock model of the DeepSeek-V3 shape, randomly initialised."""
    head_size = settings.hidden_size // 4
    torch.manual_seed(settings.seed)
    return DeepseekV3ForCausalLM(
        DeepseekV3Config(
            vocab_size=settings.vocab_size,
            hidden_size=settings.hidden_size,
            intermediate_size=2 * settings.hidden_size,
            moe_intermediate_size=settings.moe_intermediate_size,
            num_hidden_layers=settings.num_layers,
            first_k_dense_replace=1,
            num_attention_heads=4,
            num_key_value_heads=4,
            q_lora_rank=None,
            kv_lora_rank=settings.hidden_size // 2,
            qk_nope_head_dim=head_size // 2,
            qk_rope_head_dim=head_size // 2,
            v_head_dim=head_size,
            n_routed_experts=settings.num_experts,
            num_experts_per_tok=2,
            n_shared_experts=1,
            n_group=1,
            topk_group=1,
            routed_scaling_factor=1.0,
            max_position_embeddings=1024,
            # Larger than usual for large models: at this width it learns faster, and sub-blocks matter from the start.
            initializer_range=0.03,
            bos_token_id=end_of_text,
            eos_token_id=end_of_text,
        )
    )


def train_teacher(
    corpus: Corpus, settings: DemoSettings, device: torch.device, console: Console
) -> tuple[DeepseekV3ForCausalLM, DistillationReport]:
    model = build_model(settings, corpus.tokenizer.eos_token_id)
    torch.nn.Module.to(model, device)
    report = ff.distill(
        model,
        corpus.training,
        objective="sft",
        steps=settings.teacher_steps,
        batch_tokens=settings.batch_tokens,
        learning_rate=settings.teacher_learning_rate,
        balance_rate=0.01,
        validation=corpus.validation,
        seed=settings.seed,
        description="Training the teacher",
        console=console,
    )
    return model.eval(), report


def convert_and_evaluate(teacher: DeepseekV3ForCausalLM, corpus: Corpus) -> dict[str, Evaluation]:
    """What each conversion does to the teacher before any recovery."""
    converted = copy.deepcopy(teacher)
    damage = {}
    for name, (connectivity, layers) in CONVERSIONS.items():
        ff.convert(converted, connectivity, layers)
        damage[name] = evaluate(converted, corpus.validation, teacher)
    return damage


def recover(
    teacher: DeepseekV3ForCausalLM, corpus: Corpus, settings: DemoSettings, console: Console
) -> tuple[dict[str, DeepseekV3ForCausalLM], dict[str, DistillationReport]]:
    """FCSD, SFT of the converted model, and training of the unconverted model, on the same tokens and schedule."""
    runs = {
        "fcsd": (ff.convert(copy.deepcopy(teacher)), "kl", "Recovering by FCSD"),
        "sft": (ff.convert(copy.deepcopy(teacher)), "sft", "SFT on the same tokens"),
        "control": (copy.deepcopy(teacher), "sft", "Control: the unconverted model"),
    }
    reports = {}
    for name, (model, objective, description) in runs.items():
        reports[name] = ff.distill(
            model,
            corpus.training,
            objective=objective,
            teacher=teacher,
            steps=settings.recovery_steps,
            batch_tokens=settings.batch_tokens,
            learning_rate=settings.recovery_learning_rate,
            validation=corpus.validation,
            evaluations=settings.evaluations,
            # Not the teacher's: its first blocks would be seen again in the same order.
            seed=settings.seed + 1,
            description=description,
            console=console,
        )
    return {name: model for name, (model, _, _) in runs.items()}, reports


def save_and_reload(model: DeepseekV3ForCausalLM, corpus: Corpus, settings: DemoSettings, path: Path) -> dict[str, Any]:
    """Saves the model and its tokenizer; a new process computes logits, to be compared, and continues a prompt."""
    model.eval().save_pretrained(path)
    corpus.tokenizer.save_pretrained(path)
    ids = corpus.validation[:4]
    with torch.no_grad():
        expected = model(ids.to(model.device)).logits.cpu()
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        there = process.submit(_reload, path, ids.numpy(), settings, str(model.device), torch.get_num_threads())
        logits, sample = there.result()
    return {
        "reload_max_abs_diff": (torch.from_numpy(logits) - expected).abs().max().item(),
        "sample": {"prompt": settings.prompt, "text": sample},
    }


def _reload(path: Path, ids: Any, settings: DemoSettings, device: str, threads: int) -> tuple[Any, str]:
    """In a new process: logits [B, T, V] of ids [B, T] as arrays, and the prompt with its continuation."""
    # The order of a matrix product's sums depends on the number of threads.
    torch.set_num_threads(threads)
    transformers.utils.logging.disable_progress_bar()
    model = ff.load(path, device_map=device).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
    with torch.no_grad():
        logits = model(torch.from_numpy(ids).to(device)).logits.cpu().numpy()
    torch.manual_seed(settings.seed)
    prompt = tokenizer(settings.prompt, return_tensors="pt", add_special_tokens=False).to(device)
    generated = model.generate(
        input_ids=prompt["input_ids"],
        attention_mask=prompt["attention_mask"],
        max_new_tokens=settings.new_tokens,
        do_sample=True,
        temperature=0.7,
        top_k=20,
    )
    return logits, str(tokenizer.decode(generated[0]))


def environment(device: torch.device) -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": min(torch.get_num_threads(), MAX_THREADS),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "farskip_fused": ff.__version__,
    }


def _summary(report: DistillationReport) -> dict[str, Any]:
    summary = report.to_dict()
    del summary["losses"]  # one a step; the evaluations show the course
    return summary


@contextmanager
def _threads(most: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, most))
    try:
        yield
    finally:
        torch.set_num_threads(before)
