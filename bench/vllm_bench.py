"""vLLM on one GPU or several: a stock model, the stock model on our expert kernels, and the model with FarSkip wiring.

Models are cut to 8 layers and have dummy weights, so that a config.json is all they need. One engine a variant, each in
processes of its own on the same GPUs, started together and all alive at once. A round measures every point, its
variants in random order with the same prompts: what disturbs the host for a while is then in a few rounds of every
point, not in all of one. Engines of several ranks have logical processors of their own, since their workers spin for a
second before they sleep. CUDA graphs are on, prefix caching is off. Several GPUs are tensor-parallel ranks with the
experts split over them, as vLLM's --tensor-parallel-size with --enable-expert-parallel.

Eight layers often wait for the processor, and engines that do the same then differ by a third. ``gpu_time`` asks
instead how long the GPU is busy: what is left of a request's time where nothing waits for the processor, but for how
several prompts fall into steps. Of each request it is that of the rank which waits for the others least, since a rank's
waits are kernels, too.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import tempfile
import time
import traceback
from contextlib import suppress
from multiprocessing import connection
from pathlib import Path
from typing import Any, NamedTuple

from farskip_fused.bench.report import environment, open_console
from farskip_fused.bench.timing import summarise
from farskip_fused.bench.vllm_gpu_time import GpuTime
from farskip_fused.connectivity import Connectivity
from farskip_fused.errors import UsageError
from farskip_fused.record import CLASS_PREFIX, TYPE_PREFIX, to_record

LAYERS = 8
ROUNDS = 15
NEW_TOKENS = 64
LONGEST_PROMPT = 8000
TOKENS_A_STEP = 8192
VARIANTS = ("stock", "kernels", "farskip")
# Given to each engine, so that it does not measure what is free while the others start. The largest point takes 1 GiB.
KV_CACHE_BYTES = 4 * 2**30
GPU_SHARE = 0.27  # of the GPU that must be free when an engine starts
TOLERANCE = 1.02


class Point(NamedTuple):
    """batch prompts of so many tokens; new_tokens: 0 for prefill, otherwise the decode steps after it."""

    batch: int
    prompt: int
    new_tokens: int = 0


POINTS = (
    Point(1, 512), Point(1, 2048), Point(1, LONGEST_PROMPT), Point(4, 2048), Point(16, 512), Point(64, 512),
    Point(8, LONGEST_PROMPT),
    Point(1, 512, NEW_TOKENS), Point(4, 2048, NEW_TOKENS), Point(16, 512, NEW_TOKENS), Point(64, 512, NEW_TOKENS),
)  # fmt: skip

_COMMON = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 16384, "dtype": "bfloat16"}
# The published configurations, but for the number of layers and the extension of positions.
MODELS: dict[str, dict[str, Any]] = {
    "qwen3-30b-a3b": _COMMON
    | {
        "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "vocab_size": 151936, "hidden_size": 2048,
        "intermediate_size": 6144, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "rope_theta": 1e6, "tie_word_embeddings": False,
    },
    "deepseek-v2-lite": _COMMON
    | {
        "model_type": "deepseek_v2", "architectures": ["DeepseekV2ForCausalLM"], "vocab_size": 102400,
        "hidden_size": 2048, "intermediate_size": 10944, "num_attention_heads": 16, "num_key_value_heads": 16,
        "moe_intermediate_size": 1408, "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6,
        "first_k_dense_replace": 1, "moe_layer_freq": 1, "n_group": 1, "topk_group": 1, "topk_method": "greedy",
        "scoring_func": "softmax", "norm_topk_prob": False, "routed_scaling_factor": 1.0, "kv_lora_rank": 512,
        "q_lora_rank": None, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "rope_theta": 1e4,
        "tie_word_embeddings": False,
    },
}  # fmt: skip


def run(
    models: list[str], rounds: int = ROUNDS, ranks: int = 1, seconds: float | None = None, gpu_time: bool = False
) -> dict[str, Any]:
    """Measure every point of the models; UsageError for an unknown model and without vLLM or as many GPUs.

    seconds: no round of a model begins later than that after its engines have started, beyond the second measured one.
    gpu_time: how long the GPU is busy, instead of how long a request takes.
    """
    unknown = [name for name in models if name not in MODELS]
    if unknown:
        raise UsageError(f"Unknown model {unknown[0]!r}; use {' or '.join(MODELS)}.")
    try:
        import torch
        import vllm  # noqa: F401
    except ModuleNotFoundError as error:
        raise UsageError("This needs vLLM; run: pip install 'farskip-fused[vllm]'.") from error
    if (gpus := torch.cuda.device_count()) < ranks:
        raise UsageError(f"--ranks {ranks} needs as many GPUs and there are {gpus}; ask for fewer.")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    points = [cell for model in models for cell in _measure_model(model, rounds, ranks, seconds, gpu_time)]
    return {"environment": environment(), "ranks": ranks, "layers": LAYERS, "gpu_time": gpu_time, "points": points}


def config_of(model: str, variant: str) -> dict[str, Any]:
    """What config.json says of a variant."""
    config = MODELS[model] | {"num_hidden_layers": LAYERS}
    if variant != "farskip":
        return config
    return config | {
        "model_type": TYPE_PREFIX + config["model_type"],
        "architectures": [CLASS_PREFIX + name for name in config["architectures"]],
        "farskip": to_record(Connectivity.farskip(), range(LAYERS)),
    }


def _measure_model(model: str, rounds: int, ranks: int, seconds: float | None, gpu_time: bool) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        processors = sorted(os.sched_getaffinity(0))
        share = len(processors) // len(VARIANTS)
        engines = {}
        for at, variant in enumerate(VARIANTS):
            own = processors[at * share :][:share] if ranks > 1 and share else processors
            engines[variant] = _Engine(model, variant, Path(folder), ranks, own, gpu_time)
        try:
            for engine in engines.values():
                engine.answer()  # it has started
            cells = []
            for point, times in _measure(engines, MODELS[model]["vocab_size"], rounds, seconds).items():
                timings = {name: summarise(ms) for name, ms in times.items()}
                variants = {name: {"ms": timing.ms, "spread_ms": timing.spread_ms} for name, timing in timings.items()}
                measured = len(times["stock"])
                cells.append({"model": model, **point._asdict(), "rounds": measured, "variants": variants})
            return cells
        finally:
            for engine in engines.values():
                engine.pipe.close()
            for engine in engines.values():
                engine.stop()


class _Engine:
    """vLLM in a process of its own, which takes the time of its requests."""

    def __init__(
        self, model: str, variant: str, folder: Path, ranks: int, processors: list[int], gpu_time: bool
    ) -> None:
        self.name = f"{model}, {variant}"
        path = folder / f"{model}-{variant}"
        path.mkdir()
        (path / "config.json").write_text(json.dumps(config_of(model, variant)))
        settings = {
            "model": str(path),
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "gpu_memory_utilization": GPU_SHARE,
            "kv_cache_memory_bytes": KV_CACHE_BYTES,
            "max_model_len": LONGEST_PROMPT + 2 * NEW_TOKENS,
            "max_num_batched_tokens": TOKENS_A_STEP,
            "max_num_seqs": max(point.batch for point in POINTS),
            "enable_prefix_caching": False,
            "tensor_parallel_size": ranks,
            "enable_expert_parallel": ranks > 1,
            "additional_config": {} if variant == "stock" else {"farskip_experts": True},
        }
        if gpu_time:
            settings["worker_extension_cls"] = f"{GpuTime.__module__}.{GpuTime.__name__}"
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()  # closed, it ends the engine
        self._process = context.Process(target=_serve, args=(theirs, settings, processors, gpu_time))
        self._process.start()
        theirs.close()

    def ms_of(self, prompts: list[list[int]], new_tokens: int) -> float:
        """ms from the request to all of its tokens, or that the GPU is busy with it."""
        with suppress(BrokenPipeError):  # the process is gone; ``answer`` says how
            self.pipe.send((prompts, new_tokens))
        return self.answer()

    def answer(self) -> float:
        """What the process says next; RuntimeError with its traceback if it failed."""
        # Not the end of the pipe alone: the engine's own processes have inherited it, and may outlive this one.
        ready = connection.wait([self.pipe, self._process.sentinel])
        try:
            said = self.pipe.recv() if self.pipe in ready else f"exit code {self._process.exitcode}"
        except EOFError:
            self._process.join()
            said = f"exit code {self._process.exitcode}"
        if isinstance(said, str):
            raise RuntimeError(f"The engine of {self.name} failed:\n{said}")
        return float(said)

    def stop(self) -> None:
        """Wait until the engine has ended, and end what is left of its processes."""
        self._process.join(30)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid or 0, signal.SIGKILL)
        self._process.join()


def _serve(pipe: Any, settings: dict[str, Any], processors: list[int], gpu_time: bool) -> None:
    """Answer requests until the pipe is closed: first, when the engine has started, then each when it is done."""
    os.setsid()  # a group of its own, which ends as a whole
    os.sched_setaffinity(0, processors)
    engine = None
    try:
        from vllm import LLM, SamplingParams

        engine = LLM(**settings)
        pipe.send(0.0)
        while True:
            prompts, new_tokens = pipe.recv()
            how = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
            if gpu_time:
                engine.collective_rpc("farskip_begin_trace")
            start = time.perf_counter()
            engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], how, use_tqdm=False)
            elapsed = (time.perf_counter() - start) * 1e3
            pipe.send(min(engine.collective_rpc("farskip_busy_ms")) if gpu_time else elapsed)
    except (EOFError, BrokenPipeError):
        pass
    except Exception:
        with suppress(BrokenPipeError):
            pipe.send(traceback.format_exc())
    if engine is not None:
        engine.llm_engine.engine_core.shutdown()


def _measure(
    engines: dict[str, _Engine], vocabulary: int, rounds: int, seconds: float | None
) -> dict[Point, dict[str, list[float]]]:
    """ms of every prefill, or of all decode steps together: the same request with and without them, taken off."""
    draw = random.Random(0)
    times: dict[Point, dict[str, list[float]]] = {point: {variant: [] for variant in engines} for point in POINTS}
    start = time.monotonic()
    for number in range(-2, rounds):  # two to warm up
        if number >= 2 and seconds is not None and time.monotonic() - start > seconds:
            break
        for point, of_variant in times.items():
            prompts = [[draw.randrange(10, vocabulary) for _ in range(point.prompt)] for _ in range(point.batch)]
            for variant in draw.sample(list(engines), len(engines)):
                ms = engines[variant].ms_of(prompts, 1 + point.new_tokens)
                if point.new_tokens:
                    ms -= engines[variant].ms_of(prompts, 1)
                if number >= 0:
                    of_variant[variant].append(ms)
    return times


def render(report: dict[str, Any]) -> None:
    """Print the table of a report; what is slower than stock by more than 2 % is marked."""
    from rich.table import Table

    console = open_console(report)
    what, second = ("a GPU is busy", "busy s") if report["gpu_time"] else ("from a request to its tokens", "s")
    console.print(f"{report['ranks']} GPUs, {report['layers']} layers; ms: {what}")
    table = Table("model", "batch", "prompt", "phase", "variant", "ms", "± ms", f"tokens/{second}", "of stock")
    for cell in report["points"]:
        tokens = cell["batch"] * (cell["new_tokens"] or cell["prompt"])
        phase = f"{cell['new_tokens']} decode steps" if cell["new_tokens"] else "prefill"
        for name, timing in cell["variants"].items():
            ratio = timing["ms"] / cell["variants"]["stock"]["ms"]
            table.add_row(
                cell["model"], str(cell["batch"]), str(cell["prompt"]), phase, name, f"{timing['ms']:.2f}",
                f"{timing['spread_ms']:.2f}", f"{tokens / timing['ms'] * 1e3:.0f}",
                f"{ratio:.3f}" + (" slower" if ratio > TOLERANCE else ""),
            )  # fmt: skip
    console.print(table)
