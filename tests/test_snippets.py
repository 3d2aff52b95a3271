"""What the README and the pages of docs/ show runs, as it stands there, on the bundled model and on tiny ones.

The blocks of a page run in their order, Python in one namespace, in a folder in which the files that the pages name
are there. A block that cannot run has its reason before it, in a comment that readers do not see.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from data import PLAIN, ROOT, word_tokenizer
from models import cut_randomly, shallow
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from zoo import make

import hf_kprune
from hf_kprune import KPruneArguments
from hf_kprune.cli.terminal import main
from hf_kprune.structure.families import FAMILIES
from hf_kprune.structure.sublayers import find_sublayers


PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(
    r"(?:<!-- not run: (?P<reason>[^\n]*) -->\n)?(?P<indent> *)```(?P<language>\w+)\n(?P<code>.*?)\n(?P=indent)```",
    re.DOTALL,
)
SHORTER = {
    "minutes=2": "minutes=0.03",
    "--recover_minutes 2": "--recover_minutes 0.03",
    "--budgets 0.4 0.5 0.6 0.7 0.8": "--budgets 0.4 0.8",
    "--budgets 0.4 0.6 0.8 --max_drop 0.03": "--budgets 0.4 0.8 --max_drop 0.3",
    "--lengths 16 128": "--lengths 16",
    "--target_speedup 2 --num_tokens 10000": "--target_speedup 1.5 --latency_batch_size 2 --num_tokens 2000",
}
"""What would take long, and what is run in its place."""
USUAL = {
    "--model_name_or_path": "my-classifier",
    "--dataset_file": "sentences.csv",
    "--text_columns": "sentence",
    "--eval_file": "labelled.csv",
    "--method": "magnitude",
}
"""What `...` stands for in a command, without the options that it names itself."""


@dataclass
class Snippet:
    page: str
    line: int
    language: str
    code: str
    reason: str | None

    @property
    def runs(self) -> bool:
        return self.language in ("bash", "python") and self.reason is None


def snippets(page: str) -> Iterator[Snippet]:
    text = (ROOT / page).read_text()
    for match in BLOCK.finditer(text):
        indent, line = match["indent"], text.count("\n", 0, match.start("code")) + 1
        code = "\n".join(each.removeprefix(indent) for each in match["code"].split("\n"))
        yield Snippet(page, line, match["language"], code, match["reason"])


INDENTED = re.compile(r"\n\n    (hf-kprune|python|pip|torchrun|import|from|\w+ =) ")
"""Code that is indented and not fenced, which the tests would not see."""


def test_every_block_is_of_a_known_language_and_says_why_it_does_not_run() -> None:
    for page in PAGES:
        text = (ROOT / page).read_text()
        assert not INDENTED.search(text), page
        for snippet in snippets(page):
            assert snippet.language in ("bash", "python", "text", "yaml"), (page, snippet.line)
            assert snippet.reason is None or snippet.language in ("bash", "python"), (page, snippet.line)
        reasons = [snippet.reason for snippet in snippets(page) if snippet.reason is not None]
        assert all(len(reason) > 10 for reason in reasons), page
        assert text.count("<!-- not run") == len(reasons), page


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that the pages name: models, data, and what was pruned before."""
    folder = tmp_path_factory.mktemp("shown")
    (folder / "examples").symlink_to(ROOT / "examples")
    for name in ("bert-base-uncased-sst2", "minilm-sst2", "my-classifier", "my-model"):
        (folder / name).symlink_to(ROOT / "examples" / "sst2-tiny")
    (folder / "path" / "or").mkdir(parents=True)
    (folder / "path" / "or" / "name").symlink_to(ROOT / "examples" / "sst2-tiny")
    sentences = pd.read_parquet(ROOT / "examples" / "data" / "sst2_calibration.parquet")[:120]
    sentences.to_csv(folder / "sentences.csv", index=False)
    for name in ("texts", "train"):
        sentences.to_parquet(folder / f"{name}.parquet")
    pd.read_parquet(ROOT / "examples" / "data" / "sst2_validation.parquet")[:20].to_csv(
        folder / "labelled.csv", index=False
    )
    words = word_tokenizer()
    words.chat_template = PLAIN
    for each in (make("llama"), words):
        each.save_pretrained(folder / "org" / "large-model")
    small = AutoModelForSequenceClassification.from_pretrained(ROOT / "examples" / "sst2-tiny")
    for each in (
        cut_randomly(small, (2, 40) * 4),
        AutoTokenizer.from_pretrained(ROOT / "examples" / "sst2-tiny"),
    ):
        each.save_pretrained(folder / "pruned")
    dense = shallow()
    config = {**dense.config.to_dict(), "pruned_heads": {"0": [1]}}
    heads = [sublayer.num_units for sublayer in find_sublayers(dense)]
    older = cut_randomly(dense, (heads[0] - 1, *heads[1:]))
    (folder / "old").mkdir()
    (folder / "old" / "config.json").write_text(json.dumps(config))
    save_file(
        {name: value.contiguous() for name, value in older.state_dict().items()},
        folder / "old" / "model.safetensors",
    )
    word_tokenizer().save_pretrained(folder / "old")
    save_file({"input_ids": torch.randint(4, 60, (3, 7))}, folder / "batch.safetensors")
    return folder


def known(page: str) -> dict[str, Any]:
    """What a reader of a page has at hand, beside what the page itself makes."""
    name = "org/large-model" if page == "docs/language_models.md" else "my-classifier"
    model: Any = AutoModelForSequenceClassification.from_pretrained("my-classifier")
    texts = pd.read_csv("sentences.csv")["sentence"].tolist()
    tokenizer = AutoTokenizer.from_pretrained(name)
    dev = [{**tokenizer(text), "label": i % 2} for i, text in enumerate(texts[:8])]
    return {
        **{"__name__": page, "hf_kprune": hf_kprune, "model": model, "texts": texts, "dev": dev},
        **{"tokenizer": tokenizer, "inputs": tokenizer(texts[:3], padding=True, return_tensors="pt")},
        **{"args": KPruneArguments(), "path": "old", "new": "new"},
    }


def run_command(command: str) -> None:
    """Run a line as a shell would: what it prints goes to a file, if it says so."""
    words = shlex.split(command, comments=True)
    target = words[words.index(">") + 1] if ">" in words else os.devnull
    words = words[: words.index(">")] if ">" in words else words
    assert words[0] == "hf-kprune", command
    if "..." in words:
        place = words.index("...")
        usual = USUAL | ({} if words[1] == "plan" else {"--output_dir": "out"})
        words[place : place + 1] = [w for option in usual.items() if option[0] not in words for w in option]
    clear(" ".join(words))
    with open(target, "w") as file, contextlib.redirect_stdout(file):
        try:
            code = main(words[1:])
        except SystemExit as exit_:
            code = int(exit_.code or 0)
    assert code == 0, command


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if any(s.runs for s in snippets(page))])
@pytest.mark.filterwarnings("ignore")  # of what libraries say of themselves, and of rows that are few
def test_the_snippets_of_a_page_run(
    page: str, shown: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    shutil.copytree(shown, tmp_path, symlinks=True, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(FAMILIES, "bert", FAMILIES["bert"])  # which a page describes anew
    monkeypatch.setattr("hf_kprune.latency.timing.PATIENCE", 0.0)
    namespace = known(page)
    printed = ""
    for snippet in snippets(page):
        if snippet.language == "text" and printed:
            assert printed.splitlines()[-1] == snippet.code
        if not snippet.runs:
            continue
        code = snippet.code
        for shown_, run in SHORTER.items():
            code = code.replace(shown_, run)
        where = f"{page}:{snippet.line}"
        capsys.readouterr()
        if snippet.language == "python":
            clear(code)
            exec(compile("\n" * snippet.line + code, where, "exec"), namespace)
        else:
            for command in code.replace("\\\n", " ").split("\n"):
                run_command(command)
        printed = capsys.readouterr().out


def clear(code: str) -> None:
    """Remove what code is going to write, as a reader has not run the page before."""
    for name in re.findall(r"(?:output_dir[ =]|save_model\(|export pruned|convert old)[ \"]*(\w+)", code):
        shutil.rmtree(name, ignore_errors=True)
