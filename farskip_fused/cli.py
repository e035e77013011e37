"""The ``farskip`` command: signatures and help only; a command imports what it runs inside its body."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from farskip_fused.errors import UsageError

app = typer.Typer(
    name="farskip",
    help="FarSkip for mixture-of-experts models: convert, distil, run expert-parallel, measure.",
    add_completion=False,
    pretty_exceptions_enable=False,
)

# The base of all wrong command lines. Typer does not export it: it is click's in older releases, its own in newer ones.
CommandLineError = cast(type[typer.BadParameter], typer.BadParameter.__base__)


def _checked_json_path(path: Path | None) -> Path | None:
    """Refuses a path that cannot be written before the work of a command is done, not after."""
    if path is not None and not path.parent.is_dir():
        raise UsageError(f"--json {path}: the directory {path.parent} does not exist; create it or name another.")
    if path is not None and path.is_dir():
        raise UsageError(f"--json {path} is a directory; name a file.")
    return path


JsonFile = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", callback=_checked_json_path, help="Write the result to FILE as JSON."),
]


def write_json(path: Path | None, report: Any) -> None:
    """What every command does with its ``json_file: JsonFile = None``: write ``report`` there if a file was named."""
    if path is not None:
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _print_version(wanted: bool) -> None:
    if wanted:
        import farskip_fused

        typer.echo(f"farskip-fused {farskip_fused.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """FarSkip for mixture-of-experts models: convert, distil, run expert-parallel, measure."""


@app.command()
def doctor(json_file: JsonFile = None) -> None:
    """Say what is installed, what does not fit together, and the command that mends it."""
    from rich.console import Console

    from farskip_fused.doctor import examine
    from farskip_fused.doctor.rendering import render

    with Console(stderr=True).status("Looking around"):
        report = examine()
    render(report)
    write_json(json_file, report.to_dict())
    raise typer.Exit(0 if report.usable else 1)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="Directory of a checkpoint of a supported model family.")],
    target: Annotated[Path | None, typer.Argument(help="Directory to make; may be left out with --check.")] = None,
    connectivity: Annotated[str, typer.Option(help="farskip, attention_only, moe_only or standard.")] = "farskip",
    layers: Annotated[str, typer.Option(help='"all", "last:75%", "first:4", "4:20" or indices "0,2,5".')] = "all",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace TARGET if it exists.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Compare names and shapes of all tensors with the model's; alone: SOURCE's.")
    ] = False,
    json_file: JsonFile = None,
) -> None:
    """Make a FarSkip checkpoint from a stock one. Only config.json changes; weights are linked, not rewritten."""
    if target is None and not check:
        raise UsageError("Name a TARGET directory, or give --check to examine SOURCE.")
    from farskip_fused.conversion import command

    write_json(json_file, command.run(source, target, connectivity, layers, overwrite=overwrite, check=check))


DataPath = Annotated[Path, typer.Option("--data", help="A text file or a directory of text files.")]
Device = Annotated[str | None, typer.Option(help="A torch device; the GPU, where there is one, by default.")]
BlockLength = Annotated[int, typer.Option(help="Tokens that are seen together.")]


@app.command()
def distill(
    model_dir: Annotated[Path, typer.Argument(help="FarSkip checkpoint with a tokenizer.")],
    output: Annotated[Path, typer.Argument(help="Directory to make.")],
    data: DataPath,
    validation: Annotated[Path | None, typer.Option(help="Text to evaluate on, after the last step.")] = None,
    teacher: Annotated[
        Path | None, typer.Option(help="Another model to learn from; the unconverted one if left out.")
    ] = None,
    objective: Annotated[str, typer.Option(help="kl (FCSD) or sft (cross-entropy of the text).")] = "kl",
    steps: Annotated[int | None, typer.Option(help="Optimizer steps; one pass over the data if left out.")] = None,
    batch_tokens: Annotated[int, typer.Option(help="Tokens of a step.")] = 2**16,
    micro_batch_tokens: Annotated[int, typer.Option(help="Tokens of a forward pass.")] = 2**13,
    block_length: BlockLength = 1024,
    learning_rate: Annotated[float, typer.Option(help="At its peak.")] = 2e-5,
    seed: Annotated[int, typer.Option(help="Of the order of the data.")] = 0,
    device: Device = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write into OUTPUT though it exists.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Recover a converted checkpoint by self-distillation (FCSD) on text."""
    from farskip_fused.distillation import DistillationConfig, command

    config = DistillationConfig(
        objective=objective,
        steps=steps,
        batch_tokens=batch_tokens,
        micro_batch_tokens=micro_batch_tokens,
        block_length=block_length,
        learning_rate=learning_rate,
        seed=seed,
    )
    report = command.run_distill(
        model_dir, output, data, validation, config, teacher=teacher, device=device, overwrite=overwrite
    )
    write_json(json_file, report)


@app.command("eval")
def evaluate(
    model_dir: Annotated[Path, typer.Argument(help="Checkpoint, FarSkip or stock, with a tokenizer.")],
    data: DataPath,
    teacher: Annotated[Path | None, typer.Option(help="Checkpoint to compare with.")] = None,
    block_length: BlockLength = 1024,
    device: Device = None,
    json_file: JsonFile = None,
) -> None:
    """Cross-entropy of a checkpoint on text, and its distance from a teacher."""
    from farskip_fused.distillation import command

    write_json(json_file, command.run_eval(model_dir, data, teacher=teacher, block_length=block_length, device=device))


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Directory for the report, the figures and the model.")] = Path("demo"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the files of an earlier demo.")] = False,
    json_file: JsonFile = None,
) -> None:
    """The whole path on a small model: train, convert, recover, reload, split over processes."""
    from farskip_fused import demo as room

    write_json(json_file, room.run(output, overwrite=overwrite))


bench = typer.Typer(help="Microbenchmarks of the kernels; they need a GPU.")
app.add_typer(bench, name="bench")


@bench.command("experts")
def bench_experts(
    shapes: Annotated[
        list[str] | None, typer.Argument(help="Named shapes or hidden,intermediate,experts,top_k; all by default.")
    ] = None,
    tokens: Annotated[list[int] | None, typer.Option(min=1, help="Tokens of the rank; repeat for several.")] = None,
    peer: Annotated[list[str] | None, typer.Option(help="grouped_mm, vllm, sonicmoe; all by default.")] = None,
    skew: Annotated[bool, typer.Option(help="Zipf routing instead of uniform.")] = False,
    decode: Annotated[bool, typer.Option(help="Small sizes under CUDA-graph replay, weights rotated.")] = False,
    gemms: Annotated[bool, typer.Option(help="Our kernels one by one instead of whole layers.")] = False,
    figure: Annotated[Path | None, typer.Option(help="Write the roofline to this PNG or SVG.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Time the expert layer on one rank beside dense cuBLAS, torch's grouped_mm, vLLM and SonicMoE."""
    from farskip_fused.bench import experts as room
    from farskip_fused.bench import peers, report

    sizes = tokens or list(room.DECODE_TOKENS if decode else room.TOKENS)
    names, found = shapes or list(room.SHAPES), peer or list(peers.PEERS)
    result = room.run(names, sizes, found, skewed=skew, decode=decode, gemms=gemms)
    report.render(result)
    if figure is not None:
        report.draw_roofline(result, figure)
    write_json(json_file, result)


@bench.command("tune")
def bench_tune(
    output: Annotated[Path, typer.Option(metavar="FILE", help="Table to write, or to add to.")],
    shapes: Annotated[
        list[str] | None, typer.Argument(help="Named shapes or hidden,intermediate,experts,top_k; all by default.")
    ] = None,
    tokens: Annotated[list[int] | None, typer.Option(min=1, help="Tokens of a call; repeat for several.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Find the fastest block sizes of the expert layer's forward pass on this GPU; FARSKIP_TUNED=FILE applies them."""
    from farskip_fused.bench import experts, tune

    result = tune.run(shapes or list(experts.SHAPES), tokens or list(experts.DECODE_TOKENS), output)
    tune.render(result, output)
    write_json(json_file, result)


@bench.command("comm")
def bench_comm(
    shapes: Annotated[
        list[str] | None, typer.Argument(help="Named shapes or hidden,intermediate,experts,top_k; two by default.")
    ] = None,
    ranks: Annotated[list[int] | None, typer.Option(min=2, help="Ranks; repeat for several.")] = None,
    sms: Annotated[list[int] | None, typer.Option(min=1, help="Multiprocessors a rank; repeat for several.")] = None,
    tokens: Annotated[list[int] | None, typer.Option(min=1, help="Tokens of a rank; repeat for several.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Time dispatch and combine between ranks, side by side on one GPU where there are not enough."""
    from farskip_fused.bench import comm as room

    result = room.run(
        shapes or list(room.SHAPES), ranks or list(room.RANKS), sms or list(room.SMS), tokens or list(room.TOKENS)
    )
    room.render(result)
    write_json(json_file, result)


@bench.command("fused")
def bench_fused(
    shapes: Annotated[
        list[str] | None, typer.Argument(help="Named shapes or hidden,intermediate,experts,top_k; two by default.")
    ] = None,
    ranks: Annotated[list[int] | None, typer.Option(min=2, help="Ranks; repeat for several. 4 by default.")] = None,
    link: Annotated[
        list[str] | None,
        typer.Option(help="none, nvlink4 or GB/s of a GPU; repeat for several. The first two by default."),
    ] = None,
    sms: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Multiprocessors a rank that communication takes; repeat for several."),
    ] = None,
    tokens: Annotated[list[int] | None, typer.Option(min=1, help="Tokens of a rank; repeat for several.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Time communication and GEMMs of the expert layer apart, one after the other and fused, between ranks."""
    from farskip_fused.bench import fused as room

    result = room.run(
        shapes or list(room.SHAPES), ranks or list(room.RANKS), link or list(room.LINKS), sms or [None],
        tokens or list(room.TOKENS),
    )  # fmt: skip
    room.render(result)
    write_json(json_file, result)
    raise typer.Exit(1 if result["failed"] else 0)


@bench.command("vllm")
def bench_vllm(
    models: Annotated[
        list[str] | None, typer.Argument(help="qwen3-30b-a3b, deepseek-v2-lite; both by default.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=2, help="Measurements of a point.")] = 9,
    json_file: JsonFile = None,
) -> None:
    """Time prefill and decode in vLLM: a stock model, the same on our expert kernels, and with FarSkip wiring."""
    from farskip_fused.bench import vllm_bench as room

    result = room.run(models or list(room.MODELS), rounds)
    room.render(result)
    write_json(json_file, result)


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="A named model such as deepseek-v3, or the path of a config.json.")],
    cluster: Annotated[str, typer.Option(help="A named cluster, or a YAML file of rates.")] = "h100-ib400",
    ep: Annotated[int, typer.Option(help="Expert-parallel ranks.")] = 8,
    tp: Annotated[int, typer.Option(help="Tensor-parallel ranks.")] = 1,
    dp: Annotated[int | None, typer.Option(help="Replicas of the attention; as many as EP needs by default.")] = None,
    sequence: Annotated[int, typer.Option(help="Tokens of a sequence; of its context in decode.")] = 4096,
    batch: Annotated[int, typer.Option(help="Sequences of a replica at a time (micro-batch).")] = 1,
    phase: Annotated[str, typer.Option(help="training, prefill or decode.")] = "training",
    precision: Annotated[str, typer.Option(help="bf16 or fp8.")] = "bf16",
    connectivity: Annotated[str, typer.Option(help="farskip, attention_only, moe_only or standard.")] = "farskip",
    depth: Annotated[int, typer.Option(help="Layers that the MoE's input is behind, 1 to 3.")] = 1,
    transport: Annotated[str, typer.Option(help="streams, all-to-all or fused.")] = "streams",
    skew: Annotated[float, typer.Option(help="Exponent of a Zipf law over experts; 0 is uniform.")] = 0.0,
    layers: Annotated[int | None, typer.Option(help="Cut the model to its first layers.")] = None,
    micro_batches: Annotated[int, typer.Option(help="Forward and backward passes of an optimizer step.")] = 1,
    sweep: Annotated[str | None, typer.Option(help="ep,tp: all splits of the same GPUs, same tokens a GPU.")] = None,
    figure: Annotated[Path | None, typer.Option(help="Write timeline and frontier to this PNG or SVG.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with the timeline to hover over.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Predict what conversion gains, standard against FarSkip, by simulating the schedule; needs no GPU."""
    from farskip_fused.plan import command

    job = {
        "model": model, "cluster": cluster, "ep": ep, "tp": tp, "dp": dp, "sequence": sequence, "batch": batch,
        "phase": phase, "precision": precision, "connectivity": connectivity, "depth": depth, "transport": transport,
        "skew": skew, "layers": layers, "micro_batches": micro_batches,
    }  # fmt: skip
    write_json(json_file, command.run(job, swept=sweep, figure=figure, html=html))


def main(arguments: list[str] | None = None) -> None:
    """Entry point. Exit code 2 and one sentence on stderr for bad input, 130 for an interrupt."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        # Without standalone mode typer returns the code of typer.Exit and raises the rest.
        result = app(args=arguments or ["--help"], prog_name="farskip", standalone_mode=False)
    except UsageError as error:
        _refuse(str(error))
    except CommandLineError as error:
        _refuse(error.format_message())
    except typer.Abort:
        sys.exit(130)
    sys.exit(result if isinstance(result, int) else 0)


def _refuse(message: str) -> None:
    typer.echo(f"farskip: {' '.join(message.split())}", err=True)
    sys.exit(2)


if __name__ == "__main__":
    main()
