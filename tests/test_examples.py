"""What the README, the demo and the notebook show is what happens, on the bundled model, offline."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from data import PLAIN, ROOT, word_tokenizer
from nbclient import NotebookClient
from zoo import make


EXAMPLES = ROOT / "examples"
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT)}
for name in ("HF_TOKEN", "OMP_NUM_THREADS"):
    ENVIRONMENT.pop(name, None)


def test_the_readme_shows_a_short_snippet_at_once() -> None:
    """That it prints what the README says is tested in test_snippets.py."""
    readme = (ROOT / "README.md").read_text()
    code, printed = re.search(r"```python\n(.*?)```\n\n```text\n(.*?)```", readme, re.DOTALL).groups()  # type: ignore[union-attr]
    assert readme[: readme.index(printed)].count("\n") < 47
    assert len(code.strip().replace("\n\n", "\n").splitlines()) <= 13  # twelve lines and the imports' own


def test_bundled_files_are_small_and_calibration_does_not_overlap_evaluation() -> None:
    shipped = [p for folder in ("sst2-tiny", "data") for p in (EXAMPLES / folder).rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in shipped) <= 12_000_000
    calibration = pd.read_parquet(EXAMPLES / "data/sst2_calibration.parquet")
    validation = pd.read_parquet(EXAMPLES / "data/sst2_validation.parquet")
    assert list(calibration.columns) == ["sentence"]
    assert (len(calibration), len(validation)) == (2000, 872)
    overlap = set(calibration["sentence"].str.strip()) & set(validation["sentence"].str.strip())
    assert not overlap


@pytest.mark.slow
def test_demo_prunes_the_bundled_model_and_keeps_its_accuracy(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "prune_sst2.py"), "--output_dir", str(tmp_path / "pruned")]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    dense, pruned = re.search(r"accuracy.*?([\d.]+)%\s+([\d.]+)%", done.stdout).groups()  # type: ignore[union-attr]
    assert float(dense) >= 84
    assert float(pruned) >= float(dense) - 6
    report = json.loads((tmp_path / "pruned" / "kprune_report.json").read_text())
    assert report["after"]["flops"] <= 0.5 * report["before"]["flops"]


def test_a_chat_model_is_calibrated_on_its_own_answers_and_on_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = word_tokenizer()
    words.chat_template = PLAIN
    words.save_pretrained(tmp_path / "dense")
    make("llama").save_pretrained(tmp_path / "dense")
    questions = pd.DataFrame({"about": [f"w{4 + i}" for i in range(9)], "question": ["w20 w21"] * 9})
    questions.to_parquet(tmp_path / "questions.parquet")
    paragraphs = pd.DataFrame({"text": ["w30 w31 " * 30, "w5", ""] * 4})
    paragraphs.to_parquet(tmp_path / "texts.parquet")
    options = (
        f"{tmp_path}/dense --questions {tmp_path}/questions.parquet --columns about question --texts {tmp_path}/texts.parquet "
        f"--rows 6 --show 2 --new 5 --num_measure_tokens 200 --output_dir {tmp_path}/pruned"
    )
    monkeypatch.setattr(sys, "argv", ["prune_chat_model.py", *options.split()])
    runpy.run_path(str(EXAMPLES / "prune_chat_model.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert printed.count("question: w") == printed.count("pruned:") == 2
    assert "of 10 rows" in printed  # six chats, and the four texts that are no short lines
    report = json.loads((tmp_path / "pruned" / "kprune_report.json").read_text())
    assert report["calibration"]["rows"] == 10
    assert report["after"]["flops"] < report["before"]["flops"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["quickstart.ipynb", "embeddings.ipynb"])
def test_notebook_runs_offline_and_its_stored_outputs_are_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    pytest.importorskip("sentence_transformers")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    for needed in ("sst2-tiny", "data"):
        (tmp_path / needed).symlink_to(EXAMPLES / needed)
    stored = nbformat.read(EXAMPLES / name, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    ran = NotebookClient(
        nbformat.read(EXAMPLES / name, as_version=4), timeout=600, resources=resources
    ).execute()

    def printed(notebook: nbformat.NotebookNode) -> list[str]:
        """Printed lines without those that hold times."""
        texts = [
            o["text"]
            for c in notebook.cells
            if c.cell_type == "code"
            for o in c.outputs
            if o.get("name") == "stdout"
        ]
        return [line for line in "".join(texts).splitlines() if not line.endswith(" s")]

    def without_figures(lines: list[str]) -> list[str]:
        return [re.sub(r"[\d.,]+", "#", line) for line in lines]

    assert printed(stored)
    assert without_figures(printed(ran)) == without_figures(printed(stored))
