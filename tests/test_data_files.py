"""Data by the name of a file or a directory: every kind of file gives the same rows, and what is wrong is said."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import datasets
import pandas as pd
import pytest
from zoo import make

from hf_kprune import ArgumentError
from hf_kprune.cli.data_files import FORMATS, load_data
from hf_kprune.cli.terminal import main


FRAME = pd.DataFrame({"text": ["a b", "None", "", "NA", "für"], "label": [0, 1, 0, 1, 0]})
"""Texts that a reader of tables could take for missing values, an empty one, and one that is not ASCII."""


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "EXTRACTED_DATASETS_PATH", str(tmp_path / "cache" / "extracted"))


def write(folder: Path, ending: str) -> Path:
    """The frame as a file of this kind."""
    path = folder / f"rows{ending}"
    plain = ending.lower().removesuffix(".gz")
    if plain == ".parquet":
        FRAME.to_parquet(path)
    elif plain in (".csv", ".tsv"):
        path.write_text(FRAME.to_csv(index=False, sep="," if plain == ".csv" else "\t"))
    elif plain == ".txt":
        path.write_text("\n".join(FRAME["text"]) + "\n")
    else:
        path.write_text(FRAME.to_json(orient="records", lines=plain == ".jsonl"))
    if ending.endswith(".gz"):
        path.write_bytes(gzip.compress(path.read_bytes()))
    return path


@pytest.mark.parametrize("ending", [*FORMATS, *(f"{ending}.gz" for ending in FORMATS), ".CSV"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, ending: str) -> None:
    data = load_data(None, None, "train", str(write(tmp_path, ending)), ["text"])
    assert list(data["text"]) == list(FRAME["text"])
    if ".txt" not in ending:
        assert list(data["label"]) == list(FRAME["label"])


def test_a_quote_at_the_beginning_of_a_field_of_a_tsv_swallows_no_lines(tmp_path: Path) -> None:
    path = tmp_path / "glue.tsv"
    path.write_text('text\tlabel\n"a lone quote\t0\nb\t1\n"c\t0\n')
    assert list(load_data(None, None, "train", str(path), [])["text"]) == ['"a lone quote', "b", '"c']


def test_json_may_be_a_list_of_texts(tmp_path: Path) -> None:
    path = tmp_path / "texts.json"
    path.write_text(json.dumps(["a", "b"]))
    assert list(load_data(None, None, "train", str(path), ["text"])["text"]) == ["a", "b"]


BROKEN = {
    "empty.csv": (b"", "has no rows or is damaged; expected a line of column names"),
    "header.csv": (b"text,label\n", "has no rows or is damaged"),
    "ragged.csv": (
        b"text,label\na,1\nb,c,2\n",
        "expected a line of column names, then a line with as many values",
    ),
    "latin.csv": ("text\nfür\n".encode("latin1"), "expected a line of column names.* in UTF-8"),
    "latin.txt": ("für\n".encode("latin1"), "expected a text a line, in UTF-8"),
    "empty.txt": (b"", "has no rows or is damaged; expected a text a line"),
    "empty.json": (b"", "expected a list of objects, or an object a line"),
    "broken.jsonl": (b'{"text": "a"}\n{text}\n', "expected a list of objects, or an object a line"),
    "number.json": (b"5", "expected a list of objects, or an object a line"),
    "empty.parquet": (b"", "expected a Parquet table"),
    "broken.parquet": (b"no parquet at all", "expected a Parquet table"),
    "broken.parquet.gz": (b"no gzip at all", "expected a Parquet table, compressed by gzip"),
    "broken.csv.gz": (b"no gzip at all", "compressed by gzip"),
    "data.xml": (
        b"<a/>",
        r"ends with '.xml', expected one of .parquet, .csv, .tsv, .json, .jsonl, .txt, or these with .gz",
    ),
    "data.gz": (gzip.compress(b"a"), "ends with '.gz', expected one of"),
    "data": (b"a", "ends with '', expected one of"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_cannot_be_read_is_refused_in_words_of_its_own(tmp_path: Path, name: str) -> None:
    content, message = BROKEN[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ArgumentError, match=message):
        load_data(None, None, "train", str(path), ["text"])


def test_files_and_directories_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="there is no file"):
        load_data(None, None, "train", str(tmp_path / "none.csv"), [])
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(ArgumentError, match="is a directory, expected a file"):
        load_data(None, None, "train", str(tmp_path / "folder.csv"), [])
    with pytest.raises(ArgumentError, match="there is no such directory here, and"):
        load_data(str(tmp_path / "none"), None, "train", None, [])
    (tmp_path / "bare").mkdir()
    with pytest.raises(ArgumentError, match="the directory holds no files of data"):
        load_data(str(tmp_path / "bare"), None, "train", None, [])


def test_directories_of_data(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    FRAME.to_csv(tmp_path / "files" / "train.csv", index=False)
    assert len(load_data(str(tmp_path / "files"), None, "train[:3]", None, ["text"])) == 3
    with pytest.raises(ArgumentError, match="it has the splits train; name one of them"):
        load_data(str(tmp_path / "files"), None, "test", None, [])
    with pytest.raises(ArgumentError, match="no column sentence in the data, which has: text, label"):
        load_data(str(tmp_path / "files"), None, "train", None, ["sentence"])
    rows = datasets.Dataset.from_pandas(FRAME)
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "splits")
    for name in ("one", "splits"):
        assert list(load_data(str(tmp_path / name), None, "train", None, ["text"])["text"]) == list(
            FRAME["text"]
        )
    with pytest.raises(ArgumentError, match="it has the splits train; name one of them"):
        load_data(str(tmp_path / "splits"), None, "test", None, [])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "vit",
            "ViTForImageClassification takes images, expected one column of them in the data, which have: text",
        ),
        ("wav2vec2", "takes input_values, but the command line takes texts and images only"),
    ],
)
def test_the_command_line_says_what_it_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, message: str
) -> None:
    make(name).save_pretrained(tmp_path / "model")
    data = write(tmp_path, ".csv")
    assert main(["plan", "--model_name_or_path", str(tmp_path / "model"), "--dataset_file", str(data)]) == 2
    assert message in capsys.readouterr().err
