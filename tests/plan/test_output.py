"""What a plan prints, draws and writes; the page in a real browser."""

import json
import re

import pytest
from rich.console import Console

from farskip_fused import cli
from farskip_fused.errors import UsageError
from farskip_fused.plan import Job, predict
from farskip_fused.plan.figure import draw
from farskip_fused.plan.page import write_page
from farskip_fused.plan.rendering import LOOKS, lane_text, render, render_sweep
from farskip_fused.plan.splits import sweep
from farskip_fused.plan.timeline import LINK, Interval, Timeline
from farskip_fused.schedule import ACTIONS, BACKWARD_ACTIONS, BACKWARD_TRANSFERS, REDUCTIONS, TRANSFERS
from tests.plan.browser import Page, find_browser

JOB = Job("deepseek-v2-lite", "mi300x-400", ep=8, batch=2)
PREFILL = Job("llama-4-scout", "mi300x-400", ep=8, tp=8, dp=1, phase="prefill", batch=4, precision="fp8")


def printed(function, *arguments):
    console = Console(record=True, width=100, file=open("/dev/null", "w"))  # noqa: SIM115
    function(*arguments, console)
    return console.export_text()


@pytest.mark.parametrize("job", [JOB, PREFILL], ids=["training", "prefill"])
def test_a_plan_fits_on_a_screen_and_answers(job):
    text = printed(render, predict(job))
    assert len(text.splitlines()) <= 40
    text = " ".join(text.split())
    for expected in ("standard compute", "farskip compute", "where a layer's time goes", "over blocking", "are hidden"):
        assert expected in text


def test_everything_that_is_scheduled_has_a_look():
    names = {action.name for action in (*ACTIONS, *BACKWARD_ACTIONS)}
    assert names | {"gate", *TRANSFERS, *BACKWARD_TRANSFERS, *REDUCTIONS} == set(LOOKS)


def test_a_lane_shows_what_runs_when():
    intervals = [Interval("compute", "experts", 1, 10.0, 20.0), Interval(LINK, "combine", 1, 14.0, 16.0)]
    timeline = Timeline(intervals, [10.0 * (turn - 7) for turn in range(16)])
    assert timeline.layer_time == timeline.turns[8] == 10.0
    assert lane_text(timeline, "compute", 1.0).plain == "E" * 10
    assert lane_text(timeline, LINK, 1.0).plain == "····cc····"


def test_a_sweep_is_a_table_with_the_best_splits():
    text = printed(render_sweep, sweep(JOB))
    assert "best standard: EP" in text and "best farskip: EP" in text and "fastest first" in text


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_the_figure_is_drawn(tmp_path, suffix):
    draw(tmp_path / f"plan{suffix}", JOB, sweep(JOB))
    content = (tmp_path / f"plan{suffix}").read_bytes()
    assert content.startswith(b"\x89PNG") if suffix == ".png" else b"<svg" in content
    assert len(content) < 200_000


def test_files_that_cannot_be_written_are_refused(tmp_path):
    with pytest.raises(UsageError, match=r"must end in \.png or \.svg"):
        draw(tmp_path / "plan.gif", JOB)
    with pytest.raises(UsageError, match="does not exist"):
        write_page(tmp_path / "nowhere" / "plan.html", predict(JOB))


def test_the_page_needs_nothing_else(tmp_path):
    write_page(tmp_path / "plan.html", predict(JOB))
    page = (tmp_path / "plan.html").read_text()
    assert not re.search(r"(src|href)=|@import|url\(|https?://(?!www\.w3\.org/2000/svg)", page)
    assert "@DATA@" not in page and len(page) < 200_000


def test_a_name_cannot_break_out_of_the_page(tmp_path):
    from dataclasses import replace

    named = replace(JOB.sizes, name="</script><b>&")
    write_page(tmp_path / "plan.html", predict(replace(JOB, model=named)))
    page = (tmp_path / "plan.html").read_text()
    assert page.count("</script>") == 1 and "<b>" not in page


@pytest.mark.skipif(find_browser() is None, reason="needs a Chromium; Debian: apt install chromium")
def test_hovering_over_the_page_says_what_a_bar_is(tmp_path):
    write_page(tmp_path / "plan.html", predict(JOB))
    with Page(find_browser(), (tmp_path / "plan.html").as_uri(), tmp_path / "profile") as page:
        assert page.evaluate("document.querySelectorAll('svg').length") == 6
        for label in ("experts", "dispatch", "experts weight gradients"):
            # The middle of the widest bar of that name, on the screen.
            x, y = page.evaluate(
                "(() => { const bars = [...document.querySelectorAll('rect.bar')]"
                f".filter(bar => bar.textContent.startsWith('{label}, '));"
                "const bar = bars.sort((a, b) => b.width.baseVal.value - a.width.baseVal.value)[0];"
                "bar.scrollIntoView({block: 'center'}); const box = bar.getBoundingClientRect();"
                "return [box.x + box.width / 2, box.y + box.height / 2]; })()"
            )
            page.hover(x, y)
            said = page.evaluate("document.getElementById('details').textContent")
            assert re.fullmatch(rf"{label}, layer \d+: \d+\.\d+ ms, from .* \((for|back)ward, \w+\)", said)
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_the_command_writes_what_is_asked_for(tmp_path, capsys):
    files = [tmp_path / name for name in ("plan.json", "plan.html", "plan.svg")]
    arguments = [
        "--cluster",
        "h200-ib400",
        "--ep",
        "16",
        "--transport",
        "fused",
        "--json",
        files[0],
        "--html",
        files[1],
    ]
    with pytest.raises(SystemExit, match="0"):
        cli.main(["plan", "qwen3-30b-a3b", *map(str, arguments), "--figure", str(files[2])])
    report = json.loads(files[0].read_text())
    assert report["job"]["ep"] == 16 and report["speedup"] >= report["gain"] >= 1
    assert report["gain_range"][0] <= report["gain"] <= report["gain_range"][1]
    assert all(file.is_file() for file in files)
    assert "qwen3-30b-a3b on 16 x h200-ib400" in capsys.readouterr().out


def test_the_command_sweeps(tmp_path):
    with pytest.raises(SystemExit, match="0"):
        cli.main(
            [
                "plan",
                "qwen3-30b-a3b",
                "--cluster",
                "h200-ib400",
                "--sweep",
                "ep,tp",
                "--json",
                str(tmp_path / "sweep.json"),
            ]
        )
    report = json.loads((tmp_path / "sweep.json").read_text())
    assert len(report["predictions"]) + len(report["refused"]) == 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gpt-9"], "Unknown model 'gpt-9'; use"),
        (["mixtral-8x7b", "--ep", "3"], "8 experts of mixtral-8x7b do not divide over EP 3"),
        (["deepseek-v2-lite", "--sweep", "pp"], "--sweep 'pp'; use"),
        (["deepseek-v2-lite", "--html", "x.html", "--sweep", "ep"], "--html shows one split"),
        (["deepseek-v2-lite", "--figure", "x.gif"], "must end in .png or .svg"),
    ],
)
def test_bad_command_lines_exit_with_2(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["plan", *arguments])
    assert message in capsys.readouterr().err
