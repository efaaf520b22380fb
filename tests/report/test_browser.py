"""The report in headless Chromium: its script works under its policy, by keyboard too, and axe-core finds nothing."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from robustdiff.report.html import write_report
from robustdiff.report.pictures import Pictures

ROOT = Path(__file__).resolve().parents[2]
AXE = """
document.documentElement.dataset.theme = "%s";
document.querySelectorAll("details").forEach((one) => { one.open = true; });
axe.run(document, {resultTypes: ["violations"]}).then((found) => report(found.violations.map(
  (one) => `${one.id}: ${one.nodes.length} × ${one.nodes[0].html.slice(0, 200)} ${one.nodes[0].failureSummary}`)));
"""


@pytest.fixture(scope="module")
def pages(make_run, tmp_path_factory) -> dict[str, Path]:
    """A report of two runs, and one of a study."""
    folder = tmp_path_factory.mktemp("pages")
    runs = [str(make_run(folder / "free")), str(make_run(folder / "plain", gains=(1.0,), finished=False))]
    write_report(runs, folder / "runs.html", pictures=Pictures(4, samplers=["ddim", "dpm++"], steps=[2, 3]))
    name = "fashion-16-consistency"
    study = ROOT / "benchmarks" / "studies" / f"{name}.yaml"
    write_report([str(study)], folder / "study.html", ROOT / "benchmarks" / "results" / name)
    return {"runs": folder / "runs.html", "study": folder / "study.html"}


@pytest.fixture(scope="module")
def ask(browse, tmp_path_factory) -> Callable[..., Any]:
    """ask(page, script, width): what the script passes to report() in a copy of the page without its policy."""

    def run(page: Path, script: str, width: int = 1280, library: str = "") -> Any:
        contents = page.read_text(encoding="utf-8")
        contents = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", contents)
        define = "const report = (value) => parent.postMessage(JSON.stringify(value), '*');"
        more = f"<script>{library}</script><script>{define}\n{script}</script>"
        folder = tmp_path_factory.mktemp("copy")
        (folder / "page.html").write_text(contents.replace("</body>", f"{more}</body>"), encoding="utf-8")
        # In a frame, since the window of a browser without a screen is not narrower than 500 pixels.
        listen = (
            "addEventListener('message', (event) => { document.getElementById('answer').textContent = event.data; });"
        )
        frame = f'<iframe src="page.html" width="{width}" height="900" style="border: 0"></iframe>'
        host = f"<!DOCTYPE html><title>host</title><pre id='answer'></pre><script>{listen}</script>{frame}"
        (folder / "host.html").write_text(host, encoding="utf-8")
        (answer,) = re.findall(r'<pre id="answer">(.*?)</pre>', browse(folder / "host.html"), re.DOTALL)
        return json.loads(html.unescape(answer))

    return run


@pytest.fixture(scope="module")
def axe() -> str:
    """Return the script of axe-core."""
    module = pytest.importorskip("axe_core_python", reason="axe-core is not there: pip install axe-core-python")
    return (Path(module.__file__).parent / "axe.min.js").read_text(encoding="utf-8")


def test_the_script_runs_under_the_policy_and_foreign_ones_do_not(pages, browse, tmp_path):
    page = tmp_path / "page.html"
    foreign = "<script>document.title = 'foreign'</script><img src='x' onerror=\"document.title = 'foreign'\">"
    page.write_text(pages["runs"].read_text(encoding="utf-8").replace("<main", f"{foreign}<main"), encoding="utf-8")
    document = browse(page)
    assert re.search(r'<button type="button" id="theme">(Dark|Light) theme</button>', document)
    assert "<title>foreign" not in document


@pytest.mark.parametrize(
    ("page", "theme", "width"),
    [("runs", "light", 1280), ("runs", "dark", 375), ("study", "light", 375), ("study", "dark", 1280)],
)
def test_axe_finds_nothing(pages, ask, axe, page, theme, width):
    assert ask(pages[page], AXE % theme, width, axe) == []


def test_axe_would_find_something(pages, ask, axe):
    """A picture without its words, and text that is too pale."""
    spoil = "document.querySelector('.frame:not([hidden]) img').removeAttribute('alt');"
    spoil += "document.querySelector('.what').style.color = '#999';"
    found = ask(pages["runs"], spoil + AXE % "light", 1280, axe)
    assert [line.split(":")[0] for line in found] == ["color-contrast", "image-alt"]


@pytest.mark.parametrize("page", ["runs", "study"])
def test_nothing_is_wider_than_a_phone(pages, ask, page):
    script = """
    const scrolled = ".scroll, pre, svg, .unseen, .skip";
    const wide = [...document.querySelectorAll("body *")].filter((one) => !one.closest(scrolled)
      && one.getBoundingClientRect().right > innerWidth + 1).map((one) => one.outerHTML.slice(0, 100));
    report([innerWidth, document.documentElement.scrollWidth - innerWidth, wide]);
    """
    assert ask(pages[page], script, 375) == [375, 0, []]


def test_arrow_keys_show_the_numbers_of_a_chart(pages, ask):
    script = """
    const plot = document.querySelector("#watch .plot"), tip = plot.querySelector(".tip");
    const press = (key) => plot.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
    const seen = [tip.hidden];
    for (const key of ["ArrowRight", "ArrowRight", "End", "ArrowLeft", "Escape"]) {
      press(key);
      seen.push(tip.hidden ? null : [...tip.children].map((one) => one.textContent));
    }
    report([plot.tabIndex, seen]);
    """
    none = ["0 updates", "2 steps: +0.0", "5 steps: +0.0"]
    first, last, before = (
        [f"{step} updates", f"2 steps: {two}", f"5 steps: {five}"]
        for step, two, five in (
            (20, "−8.3 (−12.5 … −4.2)", "−12.5 (−18.8 … −6.2)"),
            (60, "+8.3 (+4.2 … +12.5)", "+12.5 (+6.2 … +18.8)"),
            (40, "−16.7 (−20.8 … −12.5)", "−25.0 (−31.2 … −18.8)"),
        )
    )
    assert ask(pages["runs"], script) == [0, [True, none, first, last, before, None]]


def test_the_slider_chooses_the_steps_and_the_boxes_the_checkpoints(pages, ask):
    script = """
    const gallery = document.querySelector(".gallery"), slider = gallery.querySelector("input[type=range]");
    const shown = () => [...gallery.querySelectorAll("img")].filter((one) => one.offsetParent).map((one) => one.alt);
    const label = document.querySelector(`label[for="${slider.id}"]`).textContent;
    const seen = [label, slider.getAttribute("aria-valuetext"), shown()];
    const change = (one) => one.dispatchEvent(new Event("input", {bubbles: true}));
    slider.value = 0; change(slider);
    const sampler = gallery.querySelector("select");
    sampler.selectedIndex = 1; change(sampler);
    gallery.querySelectorAll("input[type=checkbox]").forEach((box, i) => { box.checked = i < 1; change(box); });
    seen.push(slider.getAttribute("aria-valuetext"), shown());
    report(seen);
    """
    label, before, first, after, last = ask(pages["runs"], script)
    assert (label, before, after) == ("Steps", "3 steps", "2 steps")
    names = ["start, fashion-16", "free, best (update 40)", "free, last model"]
    assert first == [f"4 samples of {name} by ddim at 3 steps, in 2 columns" for name in names]
    assert last == ["4 samples of start, fashion-16 by dpm++ at 2 steps, in 2 columns"]


def test_the_theme_can_be_chosen(pages, ask):
    script = """
    const button = document.getElementById("theme"), back = () => getComputedStyle(document.body).backgroundColor;
    const seen = [button.textContent, back()];
    button.click();
    seen.push(button.textContent, back());
    report(seen);
    """
    before, light, after, dark = ask(pages["runs"], script)
    assert {before, after} == {"Dark theme", "Light theme"}
    assert light != dark


def test_without_a_script_everything_is_shown(pages, browse, tmp_path):
    """The slider is hidden, and each frame is shown."""
    contents = re.sub(r"<script>.*?</script>", "", pages["runs"].read_text(encoding="utf-8"), flags=re.DOTALL)
    (tmp_path / "page.html").write_text(contents, encoding="utf-8")
    document = browse(tmp_path / "page.html")
    assert document.count('<div class="frame"') == 4
    assert not re.search(r'<div class="frame"[^>]*hidden', document)
    assert '<div class="controls" hidden' in document
