"""``farskip bench``: one command a microbenchmark, which imports what it runs inside its body."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer

from farskip_fused.cli_json import JsonFile, write_json

bench = typer.Typer(help="Microbenchmarks of the kernels; they need a GPU.")

SHAPES = "Named shapes or hidden,intermediate,experts,top_k; {} by default."
AllShapes = Annotated[list[str] | None, typer.Argument(help=SHAPES.format("all"))]
TwoShapes = Annotated[list[str] | None, typer.Argument(help=SHAPES.format("two"))]
FourRanks = Annotated[list[int] | None, typer.Option(min=2, help="Ranks; repeat for several. 4 by default.")]
Multiprocessors = Annotated[list[int] | None, typer.Option(min=1, help="Multiprocessors a rank; repeat for several.")]
CommunicationSms = Annotated[
    list[int] | None, typer.Option(min=1, help="Multiprocessors a rank that communication takes; repeat for several.")
]
Tokens = Annotated[list[int] | None, typer.Option(min=1, help="Tokens of a rank; repeat for several.")]


@bench.command("experts")
def bench_experts(
    shapes: AllShapes = None,
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
    from farskip_fused.bench.shapes import SHAPES as NAMED

    sizes = tokens or list(room.DECODE_TOKENS if decode else room.TOKENS)
    names, found = shapes or list(NAMED), peer or list(peers.PEERS)
    result = room.run(names, sizes, found, skewed=skew, decode=decode, gemms=gemms)
    report.render(result)
    if figure is not None:
        report.draw_roofline(result, figure)
    write_json(json_file, result)


@bench.command("tune")
def bench_tune(
    output: Annotated[Path, typer.Option(metavar="FILE", help="Table to write, or to add to.")],
    shapes: AllShapes = None,
    tokens: Annotated[list[int] | None, typer.Option(min=1, help="Tokens of a call; repeat for several.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Find the fastest block sizes of the expert layer's forward pass on this GPU; FARSKIP_TUNED=FILE applies them."""
    from farskip_fused.bench import experts, tune
    from farskip_fused.bench.shapes import SHAPES as NAMED

    result = tune.run(shapes or list(NAMED), tokens or list(experts.DECODE_TOKENS), output)
    tune.render(result, output)
    write_json(json_file, result)


@bench.command("comm")
def bench_comm(
    shapes: TwoShapes = None,
    ranks: Annotated[list[int] | None, typer.Option(min=2, help="Ranks; repeat for several.")] = None,
    sms: Multiprocessors = None,
    tokens: Tokens = None,
    json_file: JsonFile = None,
) -> None:
    """Time dispatch and combine between ranks, side by side on one GPU where there are not enough."""
    from farskip_fused.bench import comm as room

    result = room.run(
        shapes or list(room.SHAPES), ranks or list(room.RANKS), sms or list(room.SMS), tokens or list(room.TOKENS)
    )
    _report(room, result, json_file)


@bench.command("all-reduce")
def bench_all_reduce(
    ranks: Annotated[
        list[int] | None, typer.Option(min=2, help="Ranks; repeat for several. 2 and 4 by default.")
    ] = None,
    sms: Multiprocessors = None,
    hidden: Annotated[list[int] | None, typer.Option(min=1, help="Hidden size; repeat for several.")] = None,
    tokens: Annotated[list[int] | None, typer.Option(min=1, help="Tokens of a message; repeat for several.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Time all-reduces by size of the message: ours in one shot and two, NCCL's and torch's symmetric memory's."""
    from farskip_fused.bench import all_reduce as room

    result = room.run(
        ranks or list(room.RANKS), sms or list(room.SMS), hidden or list(room.HIDDEN), tokens or list(room.TOKENS)
    )
    _report(room, result, json_file)


@bench.command("fused")
def bench_fused(
    shapes: TwoShapes = None,
    ranks: FourRanks = None,
    link: Annotated[
        list[str] | None,
        typer.Option(help="none, nvlink4 or GB/s of a GPU; repeat for several. The first two by default."),
    ] = None,
    sms: CommunicationSms = None,
    tokens: Tokens = None,
    json_file: JsonFile = None,
) -> None:
    """Time communication and GEMMs of the expert layer apart, one after the other and fused, between ranks."""
    from farskip_fused.bench import fused as room

    result = room.run(
        shapes or list(room.SHAPES), ranks or list(room.RANKS), link or list(room.LINKS), sms or [None],
        tokens or list(room.TOKENS),
    )  # fmt: skip
    _report(room, result, json_file)


@bench.command("layer")
def bench_layer(
    shapes: Annotated[
        list[str] | None, typer.Argument(help="deepseek-v2-lite, qwen3-30b-a3b; both by default.")
    ] = None,
    ranks: FourRanks = None,
    link: Annotated[
        list[str] | None,
        typer.Option(
            help="none, nvlink4, ib400, ib200 or GB/s of a GPU; repeat for several. The first two by default."
        ),
    ] = None,
    sms: CommunicationSms = None,
    tokens: Annotated[
        list[int] | None, typer.Option(min=1, help="Tokens of a rank; repeat for several. 4096 by default.")
    ] = None,
    layers: Annotated[int, typer.Option(min=3, help="Layers of the stack; a time is over all but two.")] = 8,
    iterations: Annotated[int, typer.Option(min=2, help="Passes of each kind.")] = 20,
    trace: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a Chrome/Perfetto trace of rank 0, of a single case.")
    ] = None,
    figure: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw one layer from that trace to this PNG or SVG.")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Time decoder layers whose communication blocks, goes by streams or is fused, and how much of it they hide."""
    from farskip_fused.bench import layer as room

    result = room.run(
        shapes or list(room.SHAPES), ranks or list(room.RANKS), link or list(room.LINKS), sms or [None],
        tokens or list(room.TOKENS), layers=layers, iterations=iterations, trace=trace, figure=figure,
    )  # fmt: skip
    _report(room, result, json_file)


@bench.command("vllm")
def bench_vllm(
    models: Annotated[
        list[str] | None, typer.Argument(help="qwen3-30b-a3b, deepseek-v2-lite; both by default.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=2, help="Measurements of a point.")] = 15,
    ranks: Annotated[int, typer.Option(min=1, help="GPUs: tensor-parallel ranks, with the experts split.")] = 1,
    seconds: Annotated[float | None, typer.Option(min=0, help="For a model; fewer rounds if it takes longer.")] = None,
    gpu_time: Annotated[bool, typer.Option("--gpu-time", help="How long the GPU is busy instead.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Time prefill and decode in vLLM: a stock model, the same on our expert kernels, and with FarSkip wiring."""
    from farskip_fused.bench import vllm_bench as room

    result = room.run(models or list(room.MODELS), rounds, ranks, seconds, gpu_time)
    _report(room, result, json_file)


def _report(room: ModuleType, result: dict[str, Any], json_file: Path | None) -> None:
    """Print and write what was measured; exit code 1 where some of it failed."""
    room.render(result)
    write_json(json_file, result)
    if result.get("failed"):
        raise typer.Exit(1)
