"""`python -m farskip_fused.bench.architecture --write docs/architecture.md`: the flow of data through a FarSkip layer.

Drawn from ``schedule.py``, forward and backward, time running downwards: docs/layer-flow.svg, and between marks of the
page which file owns each action and each arrow.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from farskip_fused.bench.report import replace_between
from farskip_fused.connectivity import Connectivity
from farskip_fused.plan.rendering import LOOKS
from farskip_fused.schedule import Action, backward_order, forward_order

CONNECTIVITY = Connectivity.farskip()
MARKS = ("<!-- flow -->", "<!-- end of flow -->")
FIGURE = "layer-flow.svg"


@dataclass(frozen=True)
class Way:
    """The arrows of a transfer. sent_by, awaited_by: the file with that kernel. data: what travels."""

    sent_by: str
    awaited_by: str
    data: str


@dataclass(frozen=True)
class Work:
    """What an action does, and in which files; an attention and shared experts are modules of the caller's own."""

    what: str
    files: tuple[str, ...] = ("farskip_fused/layer.py",)


WORK = {
    "attention_projections": Work("norm, queries, keys and values: `SplitAttention.project`"),
    "attention_core": Work("core attention and output projection: `SplitAttention.attend`"),
    "finish_combine": Work("sum of a token's experts, shared output and residual", ("kernels/combine.py",)),
    "start_dispatch": Work(
        "norm, router logits, top-k, and the launch of the rows",
        ("farskip_fused/router.py", "kernels/gate.py", "kernels/routing.py"),
    ),
    "experts": Work(
        "sort by expert, up-projection with SwiGLU, down-projection", ("kernels/layout.py", "kernels/experts.py")
    ),
    "shared_experts": Work("shared experts on the MoE's normed input"),
    "attention_projections_backward": Work("autograd of the caller's attention"),
    "attention_core_backward": Work("autograd of the caller's attention"),
    "start_combine_gradients": Work(
        "the gradient of combine, which is a dispatch along the same layout", ("farskip_fused/expert_parallel.py",)
    ),
    "finish_dispatch_gradients": Work(
        "the gradient of dispatch, which is a combine; that of the router",
        ("kernels/combine.py", "kernels/routing.py", "kernels/gate.py"),
    ),
    "experts_input_gradients": Work(
        "through down-projection, SwiGLU and up-projection", ("kernels/experts_backward.py",)
    ),
    "experts_weight_gradients": Work("of w13 and w2, while the input's travel", ("kernels/experts_backward.py",)),
    "shared_experts_backward": Work("autograd of the caller's shared experts"),
}
WAYS = {
    "dispatch": Way(
        "kernels/dispatch.py", "kernels/experts.py", "routing, and each token once to each rank of its experts"
    ),
    "combine": Way(
        "kernels/experts_to_owner.py", "kernels/combine.py", "each expert's output to the rank of its token"
    ),
    "combine_gradients": Way(
        "kernels/dispatch.py",
        "kernels/experts_backward.py",
        "the output's gradient to the ranks of its token's experts",
    ),
    "dispatch_gradients": Way(
        "kernels/experts_to_owner.py", "kernels/combine.py", "the gradients of the input and of the router's weights"
    ),
}
STREAMS = ("full", "partial")  # by what they lack, as in ``connectivity.Streams``
STREAM_OF = {
    "attention_projections": f"reads {STREAMS[CONNECTIVITY.attention_lacks]}",
    "finish_combine": f"completes {STREAMS[CONNECTIVITY.mlp_lacks]}",
}

# Sizes of the figure, in pixels.
ROW, BOX, GAP, BAR, LEFT, TOP, PANEL = 46, 34, 138, 92, 104, 64, 552
BOX_WIDTH = 200


@dataclass(frozen=True)
class Row:
    """An action in the figure. layer: counted from the first one drawn, in the order of their turns."""

    action: Action
    layer: int


def rows(order: Sequence[Action], layers: int = 2) -> list[Row]:
    return [Row(action, layer) for layer in range(layers) for action in order]


def arrows(drawn: Sequence[Row], forward: bool) -> list[tuple[str, int, int]]:
    """Transfers between the rows: name, the row that launches it, the row that waits for it."""
    later = 1 if forward else -1  # backward, the layer before comes next

    def ends(attribute: str) -> dict[tuple[str, int], int]:
        found = {}
        for number, row in enumerate(drawn):
            if (transfer := getattr(row.action, attribute)) is not None:
                found[transfer[0], row.layer + later * transfer[1]] = number
        return found

    launched, awaited = ends("launches"), ends("waits_for")
    return sorted((key[0], launched[key], awaited[key]) for key in launched.keys() & awaited.keys())


def figure() -> str:
    """The SVG: two layers, forward at the left and backward at the right."""
    forward, backward = rows(forward_order(CONNECTIVITY)), rows(backward_order(CONNECTIVITY))
    height = TOP + ROW * max(len(forward), len(backward)) + 30
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * PANEL} {height}" font-family="sans-serif" '
        'font-size="12">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 L8 4 L0 8 Z"/></marker></defs>',
        f'<rect width="{2 * PANEL}" height="{height}" fill="white"/>',
    )
    panels = [*_panel(forward, 0, True), *_panel(backward, PANEL, False)]
    return "\n".join([*head, *panels, "</svg>", ""])


def _panel(drawn: Sequence[Row], x: int, forward: bool) -> list[str]:
    box, bar = x + LEFT, x + LEFT + BOX_WIDTH + GAP
    title = "Forward" if forward else "Backward"
    parts = [
        _text(x + 12, 24, f"{title}, {CONNECTIVITY.name} connectivity", size=15),
        _text(box, 46, "main stream"),
        _text(bar, 46, "in flight"),
    ]
    names = ("layer k", "layer k + 1") if forward else ("layer k", "layer k - 1")
    for number, row in enumerate(drawn):
        y = TOP + ROW * number
        if number == 0 or drawn[number - 1].layer != row.layer:
            parts.append(_line(x + 12, y - 6, bar + BAR, y - 6, dash=True))
            parts.append(_text(x + 12, y + 12, names[row.layer], size=12))
        name = row.action.name
        colour = LOOKS[name][1]
        parts.append(_rectangle(box, y, BOX_WIDTH, BOX, colour))
        files = ", ".join(Path(file).name for file in WORK[name].files)
        parts.append(_text(box + 6, y + 14, name.replace("_", " "), colour=_ink(colour)))
        parts.append(_text(box + 6, y + 28, files, size=10, colour=_ink(colour)))
        if forward and name in STREAM_OF:
            parts.append(_text(x + 12, y + 28, STREAM_OF[name], size=10))
    for name, start, end in arrows(drawn, forward):
        top, bottom = TOP + ROW * start + BOX - 8, TOP + ROW * end + 8
        colour = LOOKS[name][1]
        parts.append(_rectangle(bar, top, BAR, bottom - top, colour))
        for line, word in enumerate(name.split("_")):
            parts.append(_text(bar + 8, (top + bottom) // 2 + 4 + 15 * line, word, colour=_ink(colour)))
        for at, label, sends in ((top, WAYS[name].sent_by, True), (bottom, WAYS[name].awaited_by, False)):
            ends = (box + BOX_WIDTH, bar) if sends else (bar, box + BOX_WIDTH)
            parts.append(_line(ends[0], at, ends[1], at, arrow=True))
            parts.append(_text(box + BOX_WIDTH + 10, at + 13 if sends else at - 4, Path(label).name, size=10))
    return parts


def _ink(colour: str) -> str:
    """What can be read on a colour, #rrggbb."""
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return "black" if 0.3 * red + 0.6 * green + 0.1 * blue > 120 else "white"


def _text(x: int, y: int, text: str, size: int = 12, colour: str = "black") -> str:
    return f'<text x="{x}" y="{y}" font-size="{size}" fill="{colour}">{escape(text)}</text>'


def _rectangle(x: int, y: int, width: int, height: int, colour: str) -> str:
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="3" fill="{colour}"/>'


def _line(x: int, y: int, to_x: int, to_y: int, arrow: bool = False, dash: bool = False) -> str:
    style = ' marker-end="url(#tip)"' * arrow + ' stroke-dasharray="4 3"' * dash
    return f'<line x1="{x}" y1="{y}" x2="{to_x}" y2="{to_y}" stroke="black"{style}/>'


def table() -> str:
    """Markdown: the figure's place, its actions and its arrows, with their files."""
    lines = [f"![A layer's data flow, forward and backward]({FIGURE})", ""]
    for title, order in (("Forward", forward_order(CONNECTIVITY)), ("Backward", backward_order(CONNECTIVITY))):
        lines += [f"| {title} | what | where |", "|---|---|---|"]
        for action in order:
            work = WORK[action.name]
            lines.append(f"| {action.name.replace('_', ' ')} | {work.what} | {_quoted(*work.files)} |")
            if action.launches is not None:
                way = WAYS[action.launches[0]]
                name = action.launches[0].replace("_", " ")
                lines.append(f"| → *{name}* | {way.data} | from {_quoted(way.sent_by)} to {_quoted(way.awaited_by)} |")
        lines.append("")
    return "\n".join(lines).rstrip()


def _quoted(*files: str) -> str:
    return ", ".join(f"`{file}`" for file in files)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, metavar="PAGE", help="replace what is between the marks, and the figure")
    page = parser.parse_args().write
    if page is None:
        print(table())
        return
    page.write_text(replace_between(page.read_text(encoding="utf-8"), MARKS, table()), encoding="utf-8")
    (page.parent / FIGURE).write_text(figure(), encoding="utf-8")


if __name__ == "__main__":
    main()
