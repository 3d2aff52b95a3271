"""Reports and sweeps as pages and pictures: what is in them, and how a browser shows them."""

from __future__ import annotations

import re
import shutil
import subprocess
from html import escape
from pathlib import Path

import pytest
from checks import report
from models import shallow

from hf_kprune import PruningReport, SublayerReport
from hf_kprune.charts import losses_of_trials, reconstruction_errors, units_kept
from hf_kprune.cli.terminal import main
from hf_kprune.report import HTML_NAME
from hf_kprune.reports import to_html
from hf_kprune.sweep import Sweep, SweepPoint


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def layers(stack: str, heads: list[int], neurons: list[int]) -> list[SublayerReport]:
    """Sublayers of four heads and of eight neurons each, of which so many are left."""
    entries = []
    for i, (head, neuron) in enumerate(zip(heads, neurons, strict=True)):
        errors = (0.2, 0.1) if i else (None, None)
        for kind, units, left in (("attention", 4, head), ("ffn", 8, neuron)):
            entry = SublayerReport(f"{stack}.{i}.{kind}", kind, units, list(range(left)))
            entry.error_before, entry.error_after = errors
            entries.append(entry)
    return entries


def full_report() -> PruningReport:
    done = report()
    done.sublayers, done.trials = layers("layers", [4, 0, 3], [8, 2, 4]), {"0.0": 0.3, "0.5": 0.2}
    return done


def sweep() -> Sweep:
    points = [SweepPoint({}, 0, 10e9, 5, 0.0, 1.0), SweepPoint({"sparsity": 0.5}, 0.5, 5e9, 3, 0.1, 1.5)]
    return Sweep([*points, SweepPoint({"sparsity": 0.4}, 0.4, 6e9, 4, 0.2, 1.4)])


def test_charts_show_the_numbers_of_the_report() -> None:
    done = full_report()
    (left,) = units_kept(done.sublayers)
    assert left.series == {
        "heads": (["0", "1", "2"], [100.0, 0.0, 75.0]),
        "neurons": (["0", "1", "2"], [100.0, 25.0, 50.0]),
    }
    (errors,) = reconstruction_errors(done.sublayers)
    assert errors.series == {
        "after the cut": ([2, 3, 4, 5], [0.2] * 4),
        "after tuning": ([2, 3, 4, 5], [0.1] * 4),
    }
    (losses,) = losses_of_trials(done.trials)
    assert losses.series == {"": (["0.0", "0.5"], [0.3, 0.2])}
    assert losses_of_trials({"0.5": 0.2}) == reconstruction_errors(layers("layers", [4], [8])) == []
    stacks = units_kept(layers("encoder.layers", [1], [2]) + layers("decoder.layers", [3], [4]))
    assert [chart.title.rpartition(" ")[2] for chart in stacks] == ["encoder.layers", "decoder.layers"]


def test_charts_of_a_sweep_tell_the_front_from_the_others() -> None:
    size, speed = sweep().charts()
    assert size.series == {"Pareto front": ([5.0, 10.0], [0.1, 0.0]), "others": ([6.0], [0.2])}
    assert speed.series == {"Pareto front": ([1.0, 1.5], [0.0, 0.1]), "others": ([1.4], [0.2])}


def test_a_page_needs_nothing_else_and_shows_all() -> None:
    done = full_report()
    page = done.to_html()
    assert page.count("<svg") == page.count("<figure>") == 3
    for word in ("layers.1.ffn", "error tuned", *(chart.title for chart in done.charts())):
        assert word in page
    assert not re.search(r"<script|<link|@import|url\((?!#)|(src|href)=[\"'](?!#)", page)
    assert "color-scheme: light dark" in page
    assert 'name="viewport"' in page
    assert page == done.to_html()  # to the letter, without dates or random names


def test_notebooks_show_reports_and_sweeps() -> None:
    for shown, pictures in ((report(), 0), (sweep(), 2)):
        html = shown._repr_html_()
        assert html.startswith("<article")
        assert html.count("<svg") == pictures
        assert "<td" in html


def test_text_of_any_origin_makes_no_markup() -> None:
    evil = "<script>alert(1)</script>\x1b[2J&"
    page = to_html([[evil, evil]])
    assert "<script" not in page
    assert "\x1b" not in page
    assert page.count(escape("<script>alert(1)</script>")) == 4


def test_without_matplotlib_a_page_says_how_to_have_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    page = full_report().to_html()
    assert "<svg" not in page
    assert "pip install matplotlib" in page


def test_the_command_writes_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shallow().save_pretrained(tmp_path)
    assert main(["report", str(tmp_path)]) == 2
    assert "there is no kprune_report.json" in capsys.readouterr().err
    report().save(tmp_path)
    assert not (tmp_path / HTML_NAME).exists()
    assert main(["report", str(tmp_path)]) == main(["report", str(tmp_path), str(tmp_path / "a.html")]) == 0
    assert str(tmp_path / HTML_NAME) in capsys.readouterr().out
    assert (tmp_path / HTML_NAME).read_text("utf-8") == report().to_html()
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / HTML_NAME).read_bytes()
    assert main(["report", str(tmp_path), str(tmp_path / "nowhere" / "a.html")]) == 2
    assert "cannot write the page" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_shows_the_page_on_a_telephone(tmp_path: Path, dark: bool) -> None:
    """In a frame as wide as a telephone nothing is wider than the page, and words stand out from the ground."""
    probe = """<iframe id="f" width="390" height="800" srcdoc="PAGE"></iframe><script>
    onload = () => { const page = f.contentDocument, style = getComputedStyle(page.querySelector("h1"));
      document.title = [page.documentElement.scrollWidth, style.color, page.querySelectorAll("svg").length].join(";") }
    </script>"""
    page = tmp_path / "page.html"
    page.write_text(
        f"<!DOCTYPE html><meta name=color-scheme content='light dark'>{probe.replace('PAGE', escape(full_report().to_html()))}"
    )
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    options += ["--blink-settings=preferredColorScheme=0"] if dark else []
    shot = [f"--screenshot={tmp_path / 'page.png'}", "--window-size=500,900"]
    for wanted in (["--dump-dom"], shot):
        done = subprocess.run(
            [str(CHROMIUM), *options, *wanted, page.as_uri()], capture_output=True, text=True, timeout=240
        )
        if wanted != shot:
            width, colour, pictures = re.search(r"<title>(.*?)</title>", done.stdout)[1].split(";")  # type: ignore[index]
    assert int(width) <= 390
    assert int(pictures) == 3
    assert (min(map(int, re.findall(r"\d+", colour)[:3])) > 200) == dark
    assert (tmp_path / "page.png").stat().st_size > 5_000
