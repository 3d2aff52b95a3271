"""What is written tells nothing of the machine; what is printed of foreign files steers no terminal and breaks no table."""

from __future__ import annotations

import getpass
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from data import collate, rows
from models import shallow, slow_unless_in
from transformers import BertTokenizer

from hf_kprune import ArgumentError, KPruneArguments, KPrunePruner, PruningReport
from hf_kprune.checkpoint.card import model_card
from hf_kprune.cli.terminal import main
from hf_kprune.entries import SublayerReport
from hf_kprune.report import JSON_NAME
from hf_kprune.sweep import Sweep, SweepPoint
from hf_kprune.text import in_markdown, public_name


EVIL = "a|b`c`\n| x | <img src=x> [y](http://z) **d**\x1b[2J\x1b]0;t\x07\u202e"


@pytest.mark.parametrize("relative", slow_unless_in((False,), (False, True)))
def test_no_path_and_no_person_reaches_what_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, relative: bool
) -> None:
    home = tmp_path / "home-of-jane"
    (home / "secret-client").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home)
    place = Path("secret-client/model") if relative else home / "secret-client" / "model"
    shallow().save_pretrained(place)
    BertTokenizer(
        {w: i for i, w in enumerate(["[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]"])}
    ).save_pretrained(place)
    out = home / "secret-client" / "out"
    args = KPruneArguments(method="magnitude", output_dir=str(out), use_cpu=True, disable_tqdm=True)
    pruner = KPrunePruner(str(place), args, rows(), collate)
    pruner.prune()
    pruner.save_model()
    KPrunePruner(str(out), replace(args, output_dir=None), rows(), collate).prune()
    written = {
        file: file.read_text("utf-8", "replace")
        for file in out.rglob("*")
        if file.suffix in (".json", ".md", ".txt")
    }
    assert {"README.md", JSON_NAME, "config.json", "tokenizer_config.json"} <= {file.name for file in written}
    for file, text in written.items():
        for secret in (str(home), "home-of-jane", "secret-client", str(tmp_path)):
            assert secret not in text, (file.name, secret)
    report = PruningReport.from_json((out / JSON_NAME).read_text())
    assert report.model == "model (BertForSequenceClassification)"
    assert report.arguments["output_dir"] == "out"


@pytest.mark.parametrize(
    ("name", "public"),
    [
        ("google-bert/bert-base-uncased", "google-bert/bert-base-uncased"),
        ("bert-base-uncased", "bert-base-uncased"),
        ("a model", "a model"),
        ("/srv/clients/acme/bert", "bert"),
        ("/srv/clients/acme/bert/", "bert"),
        ("../acme/bert", "bert"),
        ("clients/acme/bert", "bert"),
        ("C:\\Users\\jane\\bert", "bert"),
        ("~/models/bert", "bert"),
        ("~", "model"),
        ("/", "model"),
        ("/home/jane/.cache/huggingface/hub/models--org--bert/snapshots/0123abc", "org/bert"),
    ],
)
def test_a_name_tells_nothing_of_where_it_lies(name: str, public: str) -> None:
    assert public_name(name) == public


def test_the_person_who_runs_it_is_not_named() -> None:
    assert public_name(os.path.expanduser("~")) == "model"
    assert getpass.getuser() not in public_name("~/x")


@pytest.mark.parametrize("base", ["/srv/clients/acme/bert", "~/bert", "../bert", "C:\\jane\\bert"])
def test_the_card_names_no_local_model_as_its_base(base: str) -> None:
    model = shallow()
    model.config._name_or_path = base
    card = model_card(model, None)
    assert "base_model" not in card
    assert "acme" not in card
    assert "jane" not in card
    model.config._name_or_path = "google-bert/bert-base-uncased"
    assert "base_model: google-bert/bert-base-uncased" in model_card(model, None)


def evil_report() -> PruningReport:
    sublayers = [SublayerReport(EVIL, "ffn", 4, [0], error_before=0.5, error_after=0.1)]
    return PruningReport(
        EVIL,
        EVIL,
        EVIL,
        {EVIL: 0.5},
        sublayers=sublayers,
        calibration={"dataset": EVIL},
        versions={EVIL: EVIL},
        device=EVIL,
    )


def test_foreign_names_break_no_table_and_steer_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    report = evil_report()
    for text in (str(report), report.summary(), str(report.sublayers[0])):
        assert text.replace("\n", "").isprintable()
        assert "\n| x |" not in text
    row = next(line for line in str(report).splitlines() if "| 1 | 4 |" in line)
    assert row.replace("\\|", "").count("|") == 7
    assert "<img" not in str(report).replace("\\<", "")
    point = SweepPoint({}, 0.5, 1.0, 1, 0.1, 1.0, {EVIL: 0.5}, EVIL)
    table = str(Sweep([point], EVIL))
    assert table.replace("\n", "").isprintable()
    assert {line.replace("\\|", "").count("|") for line in table.splitlines()} == {8}
    assert in_markdown("encoder.layer_1.ffn") == "encoder.layer_1.ffn"


def test_inspect_of_a_foreign_folder_steers_no_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shallow().save_pretrained(tmp_path)
    evil_report().save(tmp_path)
    capsys.readouterr()
    assert main(["inspect", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert (out + err).replace("\n", "").isprintable()
    assert not any(line.startswith("| x |") for line in out.splitlines())


@pytest.mark.parametrize(
    "change",
    [
        lambda data: "{",
        lambda data: "[]",
        lambda data: "null",
        lambda data: {**data, "sparsity": "\x1b[2J"},
        lambda data: {**data, "surprise": 1},
        lambda data: {key: value for key, value in data.items() if key != "sublayers"},
        lambda data: {**data, "sublayers": [{"name": 5}]},
        lambda data: {**data, "before": 5},
        lambda data: {**data, "asked": []},
    ],
)
def test_a_report_that_is_none_is_refused_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Any
) -> None:
    shallow().save_pretrained(tmp_path)
    changed = change(json.loads(evil_report().to_json()))
    text = changed if isinstance(changed, str) else json.dumps(changed)
    with pytest.raises(ArgumentError, match="is damaged or of another version"):
        PruningReport.from_json(text)
    (tmp_path / JSON_NAME).write_text(text)
    capsys.readouterr()
    assert main(["inspect", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("hf-kprune: error: kprune_report.json is damaged")
