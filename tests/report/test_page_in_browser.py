"""The report page in a real browser: drawn, quiet, and usable by mouse, keyboard and screen reader."""

from __future__ import annotations

import gzip
import hashlib
import re
from pathlib import Path

import pytest
from browser import dom, in_a_browser
from federation import run_tiny

from fl_sim import Report
from fl_sim.report import write_page
from fl_sim.report.bundle import SHA256, VERSION, compressed, licence


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a dense and a sparse run."""
    out = tmp_path_factory.mktemp("runs")
    topk = ("name=topk", "client=clients.presets:topk", "network.links.4G=1")
    runs: list[Report] = [run_tiny(out, "model.name=mlp", *extra) for extra in ((), topk)]
    path = out / "page.html"
    write_page(runs, path)
    return path


def test_the_library_is_npms_and_carries_its_licence(page: Path) -> None:
    code = gzip.decompress(compressed())
    assert hashlib.sha256(code).hexdigest() == SHA256
    assert f"plotly.js (cartesian - minified) v{VERSION}" in code[:200].decode()
    assert "MIT License" in licence()
    assert licence() in page.read_text()


def test_a_page_of_small_runs_is_below_a_megabyte(page: Path) -> None:
    assert page.stat().st_size < 1_000_000


@in_a_browser
@pytest.mark.parametrize(
    ("width", "scheme"),
    [
        (390, "light"),
        (1400, "dark"),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in ((390, "dark"), (1000, "light"), (1000, "dark"))),
    ],
)
def test_every_chart_is_drawn_and_a_phone_says_that_tables_scroll(
    page: Path, tmp_path: Path, width: int, scheme: str
) -> None:
    cues = "[...document.querySelectorAll('.cue')].filter((cue) => getComputedStyle(cue).display === 'block').length;"
    paper = "[...document.styleSheets].flatMap((sheet) => [...sheet.cssRules]).filter((rule) => rule.media?.mediaText === 'print')"
    paper += ".forEach((rule) => { rule.media.mediaText = 'screen'; });"  # from here on, the page looks as it prints
    cues = f"document.body.dataset.cues = {cues} {paper} document.body.dataset.printed = {cues}"
    dark = ["--force-dark-mode"] if scheme == "dark" else []
    shown = dom(page, tmp_path / "profile", *dark, script=cues, width=width)
    figures = shown.count('class="figure"')
    assert figures >= 6
    assert f'data-drawn="{figures}"' in shown
    assert shown.count('class="main-svg"') >= figures
    assert 'data-printed="0"' in shown  # paper does not scroll
    found = re.search(r'data-cues="(\d+)"', shown)
    assert found is not None
    if width == 390:
        assert int(found[1]) > 1
    if width == 1400:
        assert int(found[1]) == 0


@in_a_browser
def test_buttons_and_keys(page: Path, tmp_path: Path) -> None:
    """A legend's button hides its series; reset undoes a zoom; arrows read values aloud; a picture is made."""
    script = """
      const section = document.querySelector(".figure"), chart = section.querySelector(".chart"), told = {};
      const [first] = section.querySelectorAll(".legend button");
      first.click();
      await new Promise((done) => setTimeout(done, 100));
      told.pressed = first.getAttribute("aria-pressed");
      told.visible = chart.data.map((trace) => trace.visible);
      first.click();
      await Plotly.relayout(chart, { "xaxis.range": [0, 1] });
      section.querySelector("[data-do=reset]").click();
      await new Promise((done) => setTimeout(done, 100));
      told.range = chart.layout.xaxis.range[1] > 1;
      chart.focus();
      for (const key of ["ArrowRight", "ArrowRight", "ArrowDown"])
        chart.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
      told.said = section.querySelector(".said").textContent;
      const save = URL.createObjectURL; told.pictures = 0;
      URL.createObjectURL = (blob) => { told.pictures += blob.size > 1000; return save(blob); };
      section.querySelector("[data-do=svg]").click();
      await new Promise((done) => setTimeout(done, 1500));
      document.body.dataset.told = JSON.stringify(told);
    """
    shown = dom(page, tmp_path / "profile", script=script)
    told = re.search(r'data-told="([^"]*)"', shown)
    assert told is not None
    found = told.group(1).replace("&quot;", '"')
    assert '"pressed":"false"' in found
    assert '"visible":[false,true]' in found
    assert '"range":true' in found
    assert re.search(r'"said":"topk 2: [\d.]+ \(round and test accuracy \[%\]\)"', found), found
    assert '"pictures":0' not in found


def test_controls_have_names(page: Path) -> None:
    text = page.read_text()
    for label in re.findall(r'class="(?:chart|views|tools|legend|scroll)"[^>]*?aria-label="([^"]*)"', text, re.DOTALL):
        assert label
    assert text.count('role="application" tabindex="0"') == text.count('class="figure"')
