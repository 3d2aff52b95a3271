"""The command line, in process, on a tiny model and local files."""

from __future__ import annotations

import filecmp
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest
import torch
from checks import kept
from data import ROOT, save_with_words, texts
from models import classes, shallow, slow_unless_in
from safetensors.torch import save_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    CanineConfig,
    DecisionTransformerConfig,
    XLNetConfig,
)
from zoo import make

from hf_kprune import KPruneArguments, KPrunePruner, PruningReport, __version__
from hf_kprune.arguments import METHOD_NAMES
from hf_kprune.cli import parser
from hf_kprune.cli.terminal import main
from hf_kprune.methods import METHODS


METRIC = '''
import datasets
import evaluate


class Share(evaluate.Metric):
    """Share of right answers."""

    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        right = [p == r for p, r in zip(predictions, references)]
        return {"share": sum(right) / len(right)}
'''


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_with_words(shallow(), tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data")
    frame = pd.DataFrame({"text": texts(30, 0), "other": texts(30, 1), "label": [i % 2 for i in range(30)]})
    frame.to_parquet(path / "train.parquet")
    frame.to_csv(path / "train.csv", index=False)
    frame.to_json(path / "train.json", orient="records")
    frame.to_json(path / "train.jsonl", orient="records", lines=True)
    (path / "train.txt").write_text("\n".join(frame["text"]) + "\n")
    frame.assign(label=["LABEL_1" if i % 3 else "LABEL_0" for i in range(30)]).to_csv(
        path / "named.csv", index=False
    )
    frame.assign(label=[i % 3 for i in range(30)]).to_csv(path / "three.csv", index=False)
    (path / "broken.parquet").write_bytes(b"no parquet at all")
    (path / "data.xml").write_text("<a/>")
    (path / "share.py").write_text(METRIC)
    return path


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def hf_kprune(capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a command line: exit code, stdout, stderr."""

    def run(*arguments: Any) -> tuple[int, str, str]:
        try:
            code = main([str(a) for a in arguments])
        except SystemExit as exit:  # argparse's own, for --help, --version and a missing command
            code = int(exit.code or 0)
        return code, *capsys.readouterr()

    return run


def options(dense: str, data: Path, **more: Any) -> list[Any]:
    chosen = {
        "model_name_or_path": dense,
        "dataset_file": data / "train.parquet",
        "sparsity": 0.6,
        "method": "magnitude",
        "disable_tqdm": True,
    }
    chosen |= more
    return [x for key, value in chosen.items() if value is not None for x in (f"--{key}", value)]


# ---------------------------------------------------------------------------------------------------------------------
# prune
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "named", slow_unless_in([False], [False, True]), ids=["beside output_dir", "in a directory"]
)
def test_an_interrupted_prune_goes_on(
    hf_kprune: Any, dense: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    out, states = tmp_path / "out", tmp_path / "states"
    words = options(dense, data, method="magnitude", output_dir=out)
    resume = [*words, "--resume-from-checkpoint", *([states] if named else [])]
    with monkeypatch.context() as patch:

        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr("hf_kprune.pruner.warn_of", interrupt)
        assert hf_kprune("prune", *resume)[0] == 130
    assert not out.exists()
    other = [*resume[: resume.index("--sparsity") + 1], 0.4, *resume[resume.index("--sparsity") + 2 :]]
    code, _, errors = hf_kprune("prune", *other)
    assert code == 2
    assert "is of another run; --sparsity is 0.4 and was 0.6 then." in errors
    with monkeypatch.context() as patch:
        patch.setattr("hf_kprune.pruning.choose", interrupt)
        code, printed, errors = hf_kprune("prune", *resume)
    assert code == 0, errors
    assert "pruned by magnitude" in printed
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert states.exists() is named


@pytest.mark.parametrize("ending", slow_unless_in(("csv",), ("parquet", "csv", "json", "jsonl", "txt")))
def test_prune_reads_every_kind_of_file_and_gives_one_result(
    hf_kprune: Any, dense: str, data: Path, tmp_path: Path, ending: str
) -> None:
    out = tmp_path / "out"
    code, stdout, _ = hf_kprune(
        "prune", *options(dense, data, dataset_file=data / f"train.{ending}", output_dir=out)
    )
    assert code == 0
    report = PruningReport.from_json((out / "kprune_report.json").read_text())
    assert report.summary() in stdout
    assert "| encoder.layer" not in stdout
    assert str(out) in stdout
    assert "BertForSequenceClassification.from_pretrained" in stdout
    assert report.sparsity >= 0.6
    pruned = AutoModelForSequenceClassification.from_pretrained(out)
    assert sum(p.numel() for p in pruned.parameters()) == report.after.parameters < report.before.parameters

    # what the file is read into is what the library gets when the texts are passed to it
    same = KPrunePruner(
        dense, KPruneArguments(sparsity=0.6, method="magnitude", disable_tqdm=True), texts(30, 0)
    ).plan()
    assert report.calibration["sha256"] == same.calibration["sha256"]
    assert kept(report) == kept(same)
    assert AutoTokenizer.from_pretrained(out)("w1 w2")["input_ids"] == [2, 6, 7, 3]


def test_prune_reads_a_dataset_by_name_and_split(
    hf_kprune: Any, dense: str, data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    shutil.copy(data / "train.parquet", folder / "train.parquet")
    pd.DataFrame({"text": texts(9, 8)}).to_parquet(folder / "validation.parquet")
    for split, rows in (("train", 30), ("validation", 9)):
        chosen = options(
            dense,
            data,
            dataset_file=None,
            dataset_name=folder,
            dataset_split=split,
            output_dir=tmp_path / split,
        )
        assert hf_kprune("prune", *chosen)[0] == 0
        assert (
            PruningReport.from_json((tmp_path / split / "kprune_report.json").read_text()).calibration["rows"]
            == rows
        )


def test_pairs_of_texts_are_read_and_truncated(
    hf_kprune: Any, dense: str, data: Path, tmp_path: Path
) -> None:
    frame = pd.read_parquet(data / "train.parquet")
    tokenizer = AutoTokenizer.from_pretrained(dense)
    tokens = {}
    for limit in (None, 7):
        out = tmp_path / str(limit)
        chosen = options(dense, data, text_columns="text, other", max_seq_length=limit, output_dir=out)
        assert hf_kprune("prune", *chosen)[0] == 0
        tokens[limit] = PruningReport.from_json((out / "kprune_report.json").read_text()).calibration[
            "tokens"
        ]
    pairs = [tokenizer(a, b)["input_ids"] for a, b in zip(frame["text"], frame["other"], strict=True)]
    assert tokens[None] == sum(map(len, pairs))
    assert tokens[7] == sum(min(7, len(p)) for p in pairs) < tokens[None]


def test_evaluation_before_and_after(hf_kprune: Any, dense: str, data: Path, tmp_path: Path) -> None:
    """At sparsity 0 dense and pruned agree, and with what a loop over the file gives; named labels are numbers."""
    evaluation = {"eval_file": data / "train.csv", "metric": data / "share.py"}
    code, stdout, _ = hf_kprune(
        "prune", *options(dense, data, sparsity=0, output_dir=tmp_path / "a", **evaluation)
    )
    assert code == 0
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(dense),
        AutoTokenizer.from_pretrained(dense),
    )
    frame = pd.read_csv(data / "train.csv")
    with torch.no_grad():
        answers = [int(model(**tokenizer(t, return_tensors="pt")).logits.argmax()) for t in frame["text"]]
    share = sum(a == b for a, b in zip(answers, frame["label"], strict=True)) / len(frame)
    assert f"| eval_share | {share:.4f} | {share:.4f} |" in stdout
    assert "eval_loss" in stdout
    assert "{'eval_loss'" not in stdout  # as Trainer prints it
    assert "| eval_runtime" not in stdout

    evaluation["eval_file"], recovery = data / "named.csv", {"recover_minutes": 1}
    code, stdout, _ = hf_kprune(
        "prune", *options(dense, data, sparsity=0, output_dir=tmp_path / "b", **evaluation, **recovery)
    )
    share = sum(a == bool(i % 3) for i, a in enumerate(answers)) / len(answers)
    assert "| evaluation | dense | pruned | recovered |" in stdout
    assert f"| eval_share | {share:.4f} | {share:.4f} | {share:.4f} |" in stdout
    assert "Recovered afterwards: distance 0 -> 0 on" in stdout


@pytest.mark.slow
def test_regression_is_evaluated_without_classes(hf_kprune: Any, data: Path, tmp_path: Path) -> None:
    model = shallow(num_labels=1)
    path = save_with_words(model, tmp_path / "regression")
    chosen = options(path, data, sparsity=0, output_dir=tmp_path / "out", eval_file=data / "train.csv")
    code, stdout, _ = hf_kprune("prune", *chosen)
    assert code == 0
    tokenizer, frame = AutoTokenizer.from_pretrained(path), pd.read_csv(data / "train.csv")
    with torch.no_grad():
        values = [float(model(**tokenizer(t, return_tensors="pt")).logits) for t in frame["text"]]
    loss = sum((v - label) ** 2 for v, label in zip(values, frame["label"], strict=True)) / len(frame)
    printed = next(line for line in stdout.splitlines() if line.startswith("| eval_loss"))
    assert float(printed.split("|")[2]) == pytest.approx(loss, abs=1e-3)


@pytest.mark.parametrize(
    ("task", "head", "more"),
    [
        ("multiple-choice", "MULTIPLE_CHOICE", {"text_columns": "text,other,text,other"}),
        *slow_unless_in(
            (),
            [
                ("fill-mask", "MASKED_LM", {}),
                ("feature-extraction", "", {}),
                ("token-classification", "TOKEN_CLASSIFICATION", {}),
                ("question-answering", "QUESTION_ANSWERING", {"text_columns": "text,other"}),
            ],
        ),
    ],
)
def test_task_picks_the_class(
    hf_kprune: Any, data: Path, tmp_path: Path, task: str, head: str, more: Any
) -> None:
    """The same class as the config names, so the same plan with and without `--task`."""
    path, plans = save_with_words(shallow(head=head), tmp_path / "dense"), []
    for number, chosen_task in enumerate((None, task)):
        out = tmp_path / str(number)
        code, _, stderr = hf_kprune("prune", *options(path, data, task=chosen_task, output_dir=out, **more))
        assert code == 0, stderr
        report = PruningReport.from_json((out / "kprune_report.json").read_text())
        assert report.model.endswith(f"({classes('bert')[head].__name__})")
        plans.append(kept(report))
    assert plans[0] == plans[1]


def test_multiple_choice_is_evaluated(hf_kprune: Any, data: Path, tmp_path: Path) -> None:
    path = save_with_words(shallow(head="MULTIPLE_CHOICE"), tmp_path / "dense")
    evaluation = {
        "eval_file": data / "train.csv",
        "metric": data / "share.py",
        "text_columns": "text,other,text",
    }
    code, stdout, stderr = hf_kprune("prune", *options(path, data, output_dir=tmp_path / "out", **evaluation))
    assert code == 0, stderr
    assert "| eval_share |" in stdout


def test_sources_and_targets_are_read_by_an_encoder_and_its_decoder(
    hf_kprune: Any, data: Path, tmp_path: Path
) -> None:
    path, lines = save_with_words(make("t5"), tmp_path / "dense"), texts(30, 0)
    pairs = pd.DataFrame({"document": lines, "summary": [line[:9] for line in lines], "number": range(30)})
    pairs.to_parquet(tmp_path / "pairs.parquet")
    chosen = options(path, data, dataset_file=tmp_path / "pairs.parquet", text_columns=None)
    code, stdout, stderr = hf_kprune("plan", *chosen)
    assert code == 0, stderr
    assert "decoder.block.1.cross_attention" in stdout


def test_words_are_tokenised_as_words(hf_kprune: Any, data: Path, tmp_path: Path) -> None:
    path, lines = save_with_words(shallow(head="TOKEN_CLASSIFICATION"), tmp_path / "dense"), texts(30, 0)
    pd.DataFrame({"text": [line.split() for line in lines]}).to_parquet(tmp_path / "words.parquet")
    chosen = options(path, data, dataset_file=tmp_path / "words.parquet", output_dir=tmp_path / "out")
    assert hf_kprune("prune", *chosen)[0] == 0
    report = PruningReport.from_json((tmp_path / "out" / "kprune_report.json").read_text())
    assert report.calibration["tokens"] == sum(len(line.split()) + 2 for line in lines)


# ---------------------------------------------------------------------------------------------------------------------
# plan
# ---------------------------------------------------------------------------------------------------------------------


def test_plan_touches_nothing_and_foretells_prune(
    hf_kprune: Any, dense: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = shutil.copytree(dense, tmp_path / "before")
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    code, planned, _ = hf_kprune("plan", *options(dense, data))
    assert code == 0
    assert not os.listdir(empty)
    names = os.listdir(dense)
    assert filecmp.cmpfiles(dense, before, names, shallow=False) == (names, [], [])

    code, pruned, _ = hf_kprune("prune", *options(dense, data, output_dir=tmp_path / "out"), "--verbose")
    assert code == 0

    def table(text: str) -> list[list[str]]:  # without the last column, seconds
        rows = [
            line.split("|")[1:-1]
            for line in text.splitlines()
            if line.startswith(("| encoder.layer", "| parameters"))
        ]
        return [row[:-1] for row in rows]

    assert len(table(planned)) == len(table(pruned)) == 1 + 4
    assert [row[0] for row in table(planned)] == [row[0] for row in table(pruned)]


# ---------------------------------------------------------------------------------------------------------------------
# inspect
# ---------------------------------------------------------------------------------------------------------------------


def test_inspect(hf_kprune: Any, dense: str, data: Path, tmp_path: Path) -> None:
    model = shallow()
    count = sum(p.numel() for p in model.parameters())
    code, stdout, _ = hf_kprune("inspect", dense)
    assert code == 0
    assert "BertForSequenceClassification (bert), dense" in stdout
    assert f"parameters: {count:,} " in stdout
    assert "| encoder.layer.1 | 4 | 4 | 12 | 12 |" in stdout
    assert "trust_remote_code" not in stdout

    out = tmp_path / "out"
    assert hf_kprune("prune", *options(dense, data, sparsity=0.8, output_dir=out))[0] == 0
    report = PruningReport.from_json((out / "kprune_report.json").read_text())
    code, stdout, _ = hf_kprune("inspect", out)
    assert code == 0
    assert "(bert), pruned" in stdout
    assert f"parameters: {report.after.parameters:,} " in stdout
    assert f"without embeddings: {report.after.parameters_without_embeddings:,} " in stdout
    for layer in range(2):
        heads, neurons = report.sublayers[2 * layer : 2 * layer + 2]
        assert f"| encoder.layer.{layer} | {len(heads.kept)} | 4 | {len(neurons.kept)} | 12 |" in stdout
    assert "trust_remote_code=True" in stdout
    assert f"{report.sparsity:.2%} of the prunable FLOPs removed (80.00% asked)" in stdout
    (out / "kprune_report.json").unlink()
    lineage = hf_kprune("inspect", out)[1]
    assert "(80.00% asked)" not in lineage
    assert f"{report.sparsity:.2%} of the prunable FLOPs removed by magnitude" in lineage


def test_inspect_allocates_no_weights(hf_kprune: Any, tmp_path: Path) -> None:
    """A config of a model of 10 TB, without any weights, can be inspected."""
    config = BertConfig(
        hidden_size=2**16, num_attention_heads=64, intermediate_size=2**18, num_hidden_layers=48
    )
    config.architectures, config.dtype = ["BertModel"], torch.float16
    config.save_pretrained(tmp_path)
    code, stdout, _ = hf_kprune("inspect", tmp_path)
    assert code == 0
    parameters = int(stdout.split("parameters: ")[1].split(" ")[0].replace(",", ""))
    assert parameters > 2**41
    assert f"({2 * parameters / 1e6:,.1f} MB in float16)" in stdout


def test_inspect_of_an_unknown_family_says_so(hf_kprune: Any, tmp_path: Path) -> None:
    XLNetConfig(d_model=16, n_head=2, n_layer=2, d_inner=8, vocab_size=60).save_pretrained(tmp_path)
    code, stdout, _ = hf_kprune("inspect", tmp_path)
    assert code == 0
    assert "cannot be pruned: 'xlnet' (XLNetModel) cannot be pruned: " in stdout


@pytest.mark.slow
def test_inspect_of_a_family_that_is_not_listed_detects_it(hf_kprune: Any, tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
    CanineConfig(**sizes, num_hash_buckets=64).save_pretrained(tmp_path)
    code, stdout, _ = hf_kprune("inspect", tmp_path)
    assert code == 0
    assert "can be pruned; its structure is detected, and proved" in stdout
    assert "| 2 | 2 | 12 | 12 |" in stdout


@pytest.mark.slow
def test_inspect_proves_on_the_batch_that_it_is_given_what_no_made_up_inputs_run(
    hf_kprune: Any, tmp_path: Path
) -> None:
    sizes = {"hidden_size": 16, "n_layer": 2, "n_head": 2, "max_ep_len": 20, "vocab_size": 60}
    DecisionTransformerConfig(
        **sizes, state_dim=3, act_dim=2, bos_token_id=2, eos_token_id=3
    ).save_pretrained(tmp_path)
    code, stdout, _ = hf_kprune("inspect", tmp_path)
    assert code == 0
    assert "hf_kprune.describe(model, batch), or hf-kprune inspect MODEL --batch FILE" in stdout
    widths = {"states": 3, "actions": 2, "rewards": 1, "returns_to_go": 1}
    batch = {name: torch.randn(3, 6, width) for name, width in widths.items()}
    save_file(batch | {"timesteps": torch.arange(6).repeat(3, 1)}, tmp_path / "batch.safetensors")
    code, stdout, _ = hf_kprune("inspect", tmp_path, "--batch", tmp_path / "batch.safetensors")
    assert code == 0
    assert "can be pruned; its structure is detected, and proved" in stdout
    code, _, stderr = hf_kprune("inspect", tmp_path, "--batch", tmp_path / "config.json")
    assert code == 2
    assert "expected a safetensors file of the model's inputs by name" in stderr


def test_options_are_printed_as_a_file_and_read_from_it(hf_kprune: Any, tmp_path: Path) -> None:
    line = ["prune", "--model_name_or_path", "m", "--dataset_file", "f", "--output_dir", "o"]
    more = ["--sparsity", "0.7", "--no_prune_heads", "--text_columns", "a", "b", "--hub_token", "secret"]
    kwargs = ["--method", "kprune", "--method_kwargs", '{"mu": 64}', "--resume_from_checkpoint"]
    code, printed, _ = hf_kprune(*line, *more, *kwargs, "--save_config")
    assert code == 0
    assert "secret" not in printed
    assert "temperature" not in printed
    file = tmp_path / "run.yaml"
    file.write_text(printed)
    expected = parser.parse(
        [*line, *(word for word in (*more, *kwargs) if word not in ("--hub_token", "secret"))]
    )
    assert parser.parse(["--config", str(file)]) == expected
    assert parser.parse(["prune", f"--config={file}", "--sparsity", "0.2"])[1][1].sparsity == 0.2
    file.write_text("sparsity: 0.5\n")
    code, _, stderr = hf_kprune("--config", file)
    assert code == 2
    assert "expected one of prune, plan, sweep: write it there as 'command: prune'" in stderr
    file.write_text("- sparsity\n")
    assert "expected options, such as 'sparsity: 0.5'" in hf_kprune("prune", "--config", file)[2]
    assert "cannot read the options in" in hf_kprune("prune", "--config", tmp_path / "nowhere")[2]


# ---------------------------------------------------------------------------------------------------------------------
# Help, errors
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["prune", "plan", "sweep"])
def test_help_lists_every_option_once_with_its_default(hf_kprune: Any, command: str) -> None:
    code, stdout, _ = hf_kprune(command, "--help")
    assert code == 0
    words, squeezed = " ".join(stdout.split()), "".join(stdout.split())
    for name, option in parser.options_of(command).items():
        flag = f"--no_{name}" if option.default is True else f"--{name}"
        assert len(re.findall(rf"^  {flag}\b", stdout, re.MULTILINE)) == 1, name
        assert not re.search(rf"^  --(no_)?{name}\b(?<!{flag})", stdout, re.MULTILINE), name
        text = parser.OFF.get(name) or option.metadata["help"].split(".")[0]
        text = parser.as_options(text, list(parser.options_of("sweep")))
        assert "".join(text.split()) in squeezed, name
        assert f"--{name.replace('_', '-')} " not in words or "_" not in name
    for default in ("(default: 0.5)", "(default: 100000)", "(default: 2.0)", "(default: surgeon)"):
        assert default in words
    assert "(default: None)" not in words
    assert "None:" not in words


def test_help_is_grouped_by_question_and_marks_what_single_methods_read(hf_kprune: Any) -> None:
    _, stdout, _ = hf_kprune("sweep", "--help")
    titles = re.findall(r"^(\w.*):$", stdout, re.MULTILINE)
    assert titles == ["options", *parser.QUESTIONS]  # no option is in no group
    args = KPruneArguments()
    readers = {
        name: {key for key, make in METHODS.items() if name in make(args).options} for name in vars(args)
    }
    assert tuple(METHODS) == METHOD_NAMES
    for title, members in parser.QUESTIONS.items():
        for name in members:
            named = set(title.partition("--method ")[2].replace(" or ", " ").split())
            assert named == readers.get(name, set()), name


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        ("--prune-heads false", "prune_heads", False),
        ("--prune_heads=False", "prune_heads", False),
        ("--no-prune-heads", "prune_heads", False),
        ("--no_prune_heads", "prune_heads", False),
        ("--prune_heads", "prune_heads", True),
        ("--packing", "packing", True),
        ("--packing true", "packing", True),
        ("--packing no", "packing", False),
        ("--tune_bias", "tune_bias", True),
        ("--no_tune_bias", "tune_bias", False),
        ("", "tune_bias", None),
        ("--text_columns a b", "text_columns", ["a", "b"]),
        ("--text-columns a,b", "text_columns", ["a", "b"]),
        ("--text_columns=a,b", "text_columns", ["a", "b"]),
        ("--report_to tensorboard wandb", "report_to", ["tensorboard", "wandb"]),
        ("--num-tokens 5", "num_tokens", 5),
        ("--num_tokens=5", "num_tokens", 5),
        ("--run_name a-b", "run_name", "a-b"),
        ("--target_params 5e6", "target_params", 5e6),
        ('--method kprune --method_kwargs {"mu":64}', "method_kwargs", {"mu": 64}),
    ],
)
def test_every_spelling_is_understood(words: str, name: str, value: Any) -> None:
    more = ["--model_name_or_path", "m", "--dataset_file", "f", "--output_dir", "o"]
    _, (_, args, *_) = parser.parse(["prune", *more, *words.split()])
    assert getattr(args, name) == value


@pytest.mark.filterwarnings("default:pass mu")
def test_an_old_name_of_an_option_of_a_method_is_taken_and_said_where_it_is(hf_kprune: Any) -> None:
    more = ["--model_name_or_path", "m", "--dataset_file", "f", "--output_dir", "o"]
    code, _, stderr = hf_kprune("prune", *more, "--method", "kprune", "--mu", "64")
    assert code == 2  # there is no such file
    assert "hf-kprune: warning: pass mu in --method_kwargs: '{\"mu\": 64.0}'\n" in stderr


def test_budgets_are_separated_by_spaces_or_commas() -> None:
    more = ["--model_name_or_path", "m", "--dataset_file", "f", "--output_dir", "o"]
    for words in ("0.4 0.5", "0.4,0.5", "0.4, 0.5"):
        assert parser.parse(["sweep", *more, "--budgets", *words.split()])[1][2].budgets == [0.4, 0.5]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--compare_by accuracy", "--compare_by needs evaluation data: --eval_file or --eval_dataset_name"),
        ("--lower_is_better", "--lower_is_better is said of a metric: name it by --metric"),
    ],
)
def test_options_of_a_sweep_that_lack_another_are_refused_at_once(
    hf_kprune: Any, words: str, message: str
) -> None:
    more = ["--model_name_or_path", "m", "--dataset_file", "f", "--output_dir", "o"]
    assert hf_kprune("sweep", *more, *words.split()) == (2, "", f"hf-kprune: error: {message}\n")


@pytest.mark.parametrize(
    ("message", "rendered"),
    [
        (
            "output_dir 'a/num_tokens' is not empty; set overwrite_output_dir=True",
            "--output_dir 'a/num_tokens' is not empty; set --overwrite_output_dir",
        ),
        ("sparsity is 1.5, expected the fraction", "--sparsity is 1.5, expected the fraction"),
        (
            "columns of x.num_tokens; raise num_tokens (now 5)",
            "columns of x.num_tokens; raise --num_tokens (now 5)",
        ),
        ("prune_ffn=False, min_heads=0 and round_to=1", "--no_prune_ffn, --min_heads 0 and --round_to 1"),
        ('take method="kprune"', "take --method kprune"),
        ("the method and the metric of the model's task", "the method and the metric of the model's task"),
        ("method is 'x', expected one", "--method is 'x', expected one"),
        ("--output_dir is missing", "--output_dir is missing"),
        ("method_kwargs names 'm', which", "--method_kwargs names 'm', which"),
        ("/srv/max_drop/text_columns is gone", "/srv/max_drop/text_columns is gone"),
    ],
)
def test_messages_name_options_as_options(message: str, rendered: str) -> None:
    assert parser.as_options(message, list(parser.options_of("sweep"))) == rendered


def test_version_and_help(hf_kprune: Any) -> None:
    assert hf_kprune("--version") == (0, f"hf-kprune {__version__}\n", "")
    code, stdout, _ = hf_kprune("--help")
    assert code == 0
    for command in ("prune", "plan", "inspect"):
        assert f"    {command} " in stdout
    assert hf_kprune("inspect", "--help")[0] == 0


@pytest.mark.parametrize("arguments", [(), ("shrink",), ("--nothing",)])
def test_no_command_or_an_unknown_one_gives_usage(hf_kprune: Any, arguments: tuple[str, ...]) -> None:
    code, stdout, stderr = hf_kprune(*arguments)
    assert (code, stdout) == (2, "")
    *usage, error = stderr.splitlines()
    assert usage[0].startswith("usage: hf-kprune")
    assert error.startswith("hf-kprune: error: ")


ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "unparsable": ({"sparsity": "half"}, "--sparsity is 'half', expected a number"),
    "unparsable whole number": (
        {"num_tokens": "1e4"},
        "--num_tokens is '1e4', expected a whole number: 10000",
    ),
    "unparsable list": (
        {"report_to": None, "sparsity": "0.5,0.6"},
        "--sparsity is '0.5,0.6', expected a number",
    ),
    "unparsable switch": ({"tune": "perhaps"}, "--tune is 'perhaps', expected true or false"),
    "choice": ({"pooling": "max"}, "--pooling: invalid choice: 'max'"),
    "unknown option": ({"sparsty": 0.5}, "no such options: --sparsty 0.5; did you mean --sparsity?"),
    "unknown option with dashes": (
        {"out-put-dir": "x"},
        "no such options: --out_put_dir x; did you mean --output_dir?",
    ),
    "no model": ({"model_name_or_path": None}, "required: --model_name_or_path"),
    "option value": ({"sparsity": 1.5}, "error: --sparsity is 1.5"),
    "method": ({"method": "magic"}, "invalid choice: 'magic' (choose from"),
    "report_to": ({"report_to": "paper"}, "paper is not supported"),
    "no output_dir": ({"output_dir": None}, "--output_dir is missing: name a directory"),
    "full output_dir": ({"output_dir": "{data}"}, "is not empty"),
    "file as output_dir": ({"output_dir": "{data}/train.csv"}, "is a file"),
    "output_dir in a file": (
        {"output_dir": "{data}/train.csv/out"},
        "cannot write to '{data}/train.csv/out'",
    ),
    "no data": ({"dataset_file": None}, "either --dataset_name or --dataset_file"),
    "data twice": ({"dataset_name": "glue"}, "either --dataset_name or --dataset_file"),
    "eval data twice": (
        {"eval_dataset_name": "glue", "eval_file": "{data}/train.csv"},
        "either --eval_dataset_name or",
    ),
    "metric alone": ({"metric": "{data}/share.py"}, "--metric needs evaluation data"),
    "missing model": ({"model_name_or_path": "{data}/nothing"}, "there is no directory '{data}/nothing'"),
    "missing model by a short name": (
        {"model_name_or_path": "no-such-model"},
        "there is no directory 'no-such-model', and no such model",
    ),
    "file as a model": (
        {"model_name_or_path": "{data}/train.csv"},
        "'{data}/train.csv' is a file, expected the directory",
    ),
    "directory without a model": (
        {"model_name_or_path": "{data}"},
        "the directory '{data}' holds no config.json",
    ),
    "missing file": ({"dataset_file": "{data}/nothing.csv"}, "there is no file '{data}/nothing.csv'"),
    "missing eval file": ({"eval_file": "{data}/nothing.csv"}, "there is no file '{data}/nothing.csv'"),
    "strange file": ({"dataset_file": "{data}/data.xml"}, "ends with '.xml', expected one of .parquet, .csv"),
    "broken file": (
        {"dataset_file": "{data}/broken.parquet"},
        "cannot load the file '{data}/broken.parquet'",
    ),
    "unknown dataset": (
        {"dataset_file": None, "dataset_name": "{data}/nothing"},
        "cannot load the dataset '{data}/nothing'",
    ),
    "unknown column": (
        {"text_columns": "text,sentence"},
        "no column sentence in the data, which has: text, other, label",
    ),
    "three columns": (
        {"text_columns": "text,other,text"},
        "names 3 columns, BertForSequenceClassification takes one or two",
    ),
    "numbers as texts": ({"text_columns": "label"}, ", expected texts or lists of words"),
    "unknown task": ({"task": "divination"}, "task is 'divination', expected one of "),
    "other task": (
        {"task": "token-classification", "model_name_or_path": "{base}"},
        "was not trained for token-classification",
    ),
    "unknown metric": (
        {"eval_file": "{data}/train.csv", "metric": "{data}/none.py"},
        "cannot load the metric '{data}/none.py'",
    ),
    "unknown label": (
        {"eval_file": "{data}/three.csv"},
        "have the labels ['2'], the model LABEL_0, LABEL_1, or their numbers",
    ),
    "no label column": (
        {"eval_file": "{data}/train.csv", "label_column": "gold"},
        "no column gold in the data",
    ),
    "evaluation of tokens": (
        {"eval_file": "{data}/train.csv", "model_name_or_path": "{tokens}"},
        "BertForTokenClassification cannot be evaluated here",
    ),
    "unreachable": ({"sparsity": 0.9, "prune_ffn": False}, "this model can reach 0 to"),
    "too few tokens": ({"num_tokens": 5, "method": "surgeon"}, "raise --num_tokens (now 5)"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_one_clear_line(hf_kprune: Any, dense: str, data: Path, tmp_path: Path, case: str) -> None:
    changes, message = ERRORS[case]
    places = {"data": str(data), "base": "", "tokens": ""}
    if case == "other task":
        places["base"] = save_with_words(shallow(head=""), tmp_path / "base")
    if case == "evaluation of tokens":
        places["tokens"] = save_with_words(shallow(head="TOKEN_CLASSIFICATION"), tmp_path / "tokens")
    changes = {k: v.format(**places) if isinstance(v, str) else v for k, v in changes.items()}
    code, stdout, stderr = hf_kprune(
        "prune", *options(dense, data, **{"output_dir": tmp_path / "out", **changes})
    )
    assert code == 2
    assert stdout == ""
    (line,) = [line for line in stderr.splitlines() if "hf-kprune" in line]
    assert stderr.endswith(line + "\n")
    assert line.startswith("hf-kprune: error: ")
    assert message.format(**places) in line
    assert not (tmp_path / "out").exists()


def test_missing_tokenizer_is_an_error(hf_kprune: Any, dense: str, data: Path, tmp_path: Path) -> None:
    shallow().save_pretrained(tmp_path / "bare")
    code, _, stderr = hf_kprune("prune", *options(str(tmp_path / "bare"), data, output_dir=tmp_path / "out"))
    assert code == 2
    assert stderr.splitlines()[-1].startswith(
        f"hf-kprune: error: there is no tokenizer with the model '{tmp_path / 'bare'}'"
    )


@pytest.mark.parametrize("name", ["nothing", "damaged"])
def test_inspect_of_what_is_no_model_is_an_error(
    hf_kprune: Any, dense: str, tmp_path: Path, name: str
) -> None:
    shutil.copytree(dense, tmp_path / "damaged")
    (tmp_path / "damaged" / "config.json").write_text('{"model_type": "ber')
    code, stdout, stderr = hf_kprune("inspect", tmp_path / name)
    assert (code, stdout) == (2, "")
    message = {"nothing": "there is no directory", "damaged": "cannot load the model"}[name]
    assert stderr.splitlines()[-1].startswith(f"hf-kprune: error: {message}")


def test_ctrl_c_ends_with_130(
    hf_kprune: Any, dense: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_kprune.structure.walk.cut", interrupt)
    code, _, stderr = hf_kprune("prune", *options(dense, data, output_dir=tmp_path / "out"))
    assert code == 130
    assert stderr.splitlines()[-1] == "hf-kprune: interrupted"
    assert not (tmp_path / "out").exists()


def test_a_bug_keeps_its_traceback(
    dense: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bug(*_: Any, **__: Any) -> None:
        raise ValueError("a bug, not the user's doing")

    monkeypatch.setattr("hf_kprune.structure.walk.cut", bug)
    with pytest.raises(ValueError, match="a bug, not the user's doing"):
        main([str(a) for a in ("prune", *options(dense, data, output_dir=tmp_path / "out"))])


def test_processes_but_the_first_are_quiet_about_errors(
    hf_kprune: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert hf_kprune("inspect") == (2, "", "")


@pytest.mark.slow  # test_command.py starts the program once by default
def test_the_command_line_runs_as_a_module(dense: str) -> None:
    command = [sys.executable, "-m", "hf_kprune", "inspect", dense]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "BertForSequenceClassification (bert), dense" in done.stdout
