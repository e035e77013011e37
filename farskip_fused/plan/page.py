"""A prediction as one HTML page that needs nothing else: the timelines to hover over, and the numbers."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any

from farskip_fused.plan.figure import checked_path
from farskip_fused.plan.prediction import Prediction, recommendation, timelines
from farskip_fused.plan.rendering import LOOKS, shown, title, ways
from farskip_fused.plan.timeline import COMPUTE, merged

_TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>farskip plan: @MODEL@</title>
<style>
body { font: 15px/1.45 system-ui, sans-serif; max-width: 70rem; margin: 1.5rem auto; padding: 0 1rem; color: #222 }
h1 { font-size: 1.25rem }
h2 { font-size: 1rem; margin: 1.2rem 0 .2rem }
table { border-collapse: collapse }
td, th { padding: .15rem .7rem; text-align: right }
td:first-child { text-align: left }
th { border-bottom: 1px solid #999; font-weight: 600 }
svg { width: 100%; display: block }
rect.bar { stroke: #fff; stroke-width: .5 }
rect.bar:hover { stroke: #000; stroke-width: 1.5 }
text { font: 11px system-ui, sans-serif }
#details { position: sticky; top: 0; background: #fffbe6; border: 1px solid #e6d98c; padding: .3rem .7rem }
.answer { font-weight: 600 }
</style></head><body>
<h1>@TITLE@</h1>
<p>@WAYS@. Simulated, not measured.</p>
<p class="answer">@ANSWER@</p>
<table><tr><th></th><th>blocking</th><th>standard</th><th>@CONNECTIVITY@</th><th>computation</th><th>overlap</th></tr>
@ROWS@</table>
<p id="details">Hover over a bar.</p>
<div id="timelines"></div>
<script>
const panels = @DATA@;
const details = document.getElementById("details"), space = "http://www.w3.org/2000/svg";
function add(parent, kind, attributes, text) {
  const element = document.createElementNS(space, kind);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  return parent.appendChild(element);
}
for (const panel of panels) {
  const heading = document.createElement("h2");
  heading.textContent = `${panel.direction}, ${panel.name}: ${panel.layer_time.toFixed(3)} ms a layer`;
  document.getElementById("timelines").append(heading);
  const svg = add(document.getElementById("timelines"), "svg", {viewBox: "0 0 1000 84"});
  const scale = 930 / panel.widest;
  add(svg, "text", {x: 0, y: 20}, "compute"); add(svg, "text", {x: 0, y: 54}, "link");
  for (const bar of panel.bars) {
    const rect = add(svg, "rect", {
      class: "bar", x: 60 + bar.start * scale, y: bar.lane === "@COMPUTE@" ? 4 : 38, height: 26,
      width: Math.max(0.5, (bar.end - bar.start) * scale), fill: bar.colour, "fill-opacity": bar.middle ? 1 : 0.4,
    });
    const name = bar.name.replaceAll("_", " ");
    const text = `${name}, layer ${bar.layer}: ${(bar.end - bar.start).toFixed(3)} ms, ` +
      `from ${bar.start.toFixed(3)} to ${bar.end.toFixed(3)} ms (${panel.direction}, ${panel.name})`;
    rect.addEventListener("mouseenter", () => { details.textContent = text; });
    add(rect, "title", {}, text);
  }
  const step = 10 ** Math.floor(Math.log10(panel.widest)), ticks = panel.widest / step < 3 ? step / 4 : step;
  for (let at = 0; at <= panel.widest; at += ticks) {
    add(svg, "text", {x: 60 + at * scale, y: 80, "text-anchor": "middle"}, `${+at.toPrecision(3)} ms`);
  }
}
</script></body></html>
"""


def write_page(path: Path, prediction: Prediction) -> None:
    """Write the page. Raises UsageError for a path that cannot be written."""
    checked_path(path, ".html")
    job = prediction.job
    rows = "".join(
        f"<tr><td>{one.name}, ms a layer</td>"
        + "".join(f"<td>{time:.3f}</td>" for time in (one.blocking, one.standard, one.farskip, one.compute))
        + f"<td>{'none to hide' if one.overlap is None else format(one.overlap, '.0%')}</td></tr>"
        for one in prediction.directions
    )
    step = prediction.step
    rows += f"<tr><td>step, ms</td>{''.join(f'<td>{step[name]:.1f}</td>' for name in step)}<td></td><td></td></tr>"
    answer = (
        f"{recommendation(prediction)} Over blocking: {prediction.speedup:.2f} times; conversion itself"
        f" {prediction.gain:.2f} times ({prediction.low:.2f} to {prediction.high:.2f})."
    )
    # "<" is escaped, so that nothing in a name can close the script.
    data = json.dumps(_panels(prediction)).replace("<", "\\u003c")
    page = _TEMPLATE
    for key, value in (
        ("MODEL", escape(job.sizes.name)), ("TITLE", escape(title(job))), ("ROWS", rows), ("ANSWER", escape(answer)),
        ("WAYS", "; ".join(map(escape, ways(job)))), ("COMPUTE", COMPUTE),
        ("CONNECTIVITY", escape(job.connectivity)), ("DATA", data),
    ):  # fmt: skip
        page = page.replace(f"@{key}@", value)
    path.write_text(page, encoding="utf-8")


def _panels(prediction: Prediction) -> list[dict[str, Any]]:
    panels = []
    for direction in prediction.directions:
        found = timelines(prediction.job, direction.name == "backward")
        widest = 2 * max(timeline.layer_time for _, timeline in found.values())
        for name, (_, timeline) in found.items():
            origin, middle, intervals = shown(timeline)
            bars = [
                {
                    "lane": one.lane, "name": one.name, "layer": one.layer, "start": max(0.0, one.start - origin),
                    "end": min(widest, one.end - origin), "colour": LOOKS[one.name][1], "middle": one.layer == middle,
                }
                for one in merged(intervals)
            ]  # fmt: skip
            label = prediction.job.connectivity if name == "farskip" else name
            panels.append(
                {"direction": direction.name, "name": label, "layer_time": timeline.layer_time, "widest": widest,
                 "bars": bars}
            )  # fmt: skip
    return panels
