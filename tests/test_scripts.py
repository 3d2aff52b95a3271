"""The scripts of examples/ prune, compare and save, on tiny models and files of this machine."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from data import ROOT, word_tokenizer
from models import shallow
from transformers import BertForQuestionAnswering, BertModel, ViTImageProcessor
from zoo import make

from hf_kprune.report import JSON_NAME, PruningReport


pytestmark = pytest.mark.slow
OPTIONS = "--method magnitude --tune false --num_tokens 300 --use_cpu true --disable_tqdm true --sparsity 0.4"


def run(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *options: object) -> PruningReport:
    """Run a script on the model in `tmp_path / "dense"`, and read the report that it leaves."""
    words = ["--model_name_or_path", tmp_path / "dense", *options, "--output_dir", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", [script, *map(str, words), *OPTIONS.split()])
    runpy.run_path(str(ROOT / "examples" / script), run_name="__main__")
    report = PruningReport.from_json((tmp_path / "out" / JSON_NAME).read_text())
    assert report.after.flops < report.before.flops
    return report


def files(tmp_path: Path, rows: list[dict[str, Any]]) -> list[object]:
    """Options that name a file of these rows for both splits."""
    pd.DataFrame(rows).to_parquet(tmp_path / "rows.parquet")
    return ["--train_file", tmp_path / "rows.parquet", "--validation_file", tmp_path / "rows.parquet"]


def save(model: Any, tmp_path: Path, tokenizer: Any = None) -> None:
    model.save_pretrained(tmp_path / "dense")
    (tokenizer or word_tokenizer()).save_pretrained(tmp_path / "dense")


def test_glue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(shallow(), tmp_path)
    rows = [{"sentence1": f"w{4 + i} w9", "sentence2": "w20 w21 w22", "label": i % 2} for i in range(12)]
    report = run("prune_glue.py", tmp_path, monkeypatch, "--task_name", "mrpc", *files(tmp_path, rows))
    assert {"accuracy", "f1"} <= report.metrics["before"].keys() == report.metrics["after"].keys()


def test_squad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(BertForQuestionAnswering(shallow().config), tmp_path)
    answers = {"text": ["w8"], "answer_start": [3]}
    rows = [{"question": f"w{4 + i}", "context": "w7 w8 w9 w10", "answers": answers} for i in range(8)]
    report = run("prune_squad.py", tmp_path, monkeypatch, "--max_seq_length", 16, *files(tmp_path, rows))
    assert report.metrics["before"].keys() == report.metrics["after"].keys() == {"exact_match", "f1"}


def test_a_language_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    save(make("llama"), tmp_path)
    rows = [{"text": f"w{4 + i} w20 w21 w22 w23"} for i in range(10)] + [{"text": ""}]
    report = run("prune_clm.py", tmp_path, monkeypatch, *files(tmp_path, rows), "--prompt", "w5 w6")
    assert report.metrics["after"]["perplexity"] > 1
    printed = capsys.readouterr().out
    assert "\ndense: w5 w6" in printed
    assert "\npruned: w5 w6" in printed


def test_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = pytest.importorskip("PIL.Image")
    model = make("vit")
    side = model.config.image_size
    processor = ViTImageProcessor(size={"height": side, "width": side})
    save(model, tmp_path, processor)
    for split in ("train", "validation"):
        for i in range(4):
            folder = tmp_path / "images" / split / f"LABEL_{i % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(i).integers(0, 255, (side, side, 3), np.uint8)
            image.fromarray(pixels).save(folder / f"{i}.png")
    report = run("prune_vision.py", tmp_path, monkeypatch, "--dataset_dir", tmp_path / "images")
    assert report.metrics["before"].keys() == report.metrics["after"].keys() >= {"accuracy"}


def test_embeddings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    library = pytest.importorskip("sentence_transformers")
    save(BertModel(shallow().config), tmp_path / "bert")
    library.SentenceTransformer(str(tmp_path / "bert" / "dense"), device="cpu").save(str(tmp_path / "dense"))
    rows = [{"sentence1": f"w{4 + i} w9", "sentence2": "w20 w21", "score": i / 8} for i in range(8)]
    run("prune_embeddings.py", tmp_path, monkeypatch, *files(tmp_path, rows))
    assert capsys.readouterr().out.count("Spearman's correlation") == 2
