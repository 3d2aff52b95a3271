"""Figures of each task without the hub: by hand on small cases, and those of the pack on its models."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from data import save_with_words, texts
from models import shallow, slow_unless_in
from scipy import stats
from transformers import (
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    EvalPrediction,
    OPTConfig,
    OPTForCausalLM,
)

from hf_kprune import ArgumentError, KPruneArguments, KPrunePruner
from hf_kprune.calibration.metrics import (
    answer_figures,
    best_span,
    evaluate_texts,
    metrics_of,
    named_metric,
    perplexity,
)
from hf_kprune.calibration.tasks import task_of
from hf_kprune.cli.terminal import main


def figures(model: Any, scores: Any, labels: Any) -> dict[str, float]:
    compute = metrics_of(model)
    assert compute is not None
    return compute(
        EvalPrediction(predictions=torch.tensor(scores).numpy(), label_ids=torch.tensor(labels).numpy())
    )


def test_two_classes() -> None:
    scores = [[2.0, 1.0], [0.0, 1.0], [0.0, 3.0], [1.0, 0.0], [0.0, 1.0]]  # 0 1 1 0 1
    results = figures(shallow(), scores, [0, 1, 0, 1, 1])
    assert results["accuracy"] == pytest.approx(3 / 5)
    assert results["f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert results["matthews"] == pytest.approx((2 * 1 - 1 * 1) / math.sqrt(3 * 3 * 2 * 2))


def test_many_classes_and_tokens_that_do_not_count() -> None:
    eye = torch.eye(3)
    results = figures(shallow(num_labels=3), eye[[0, 1, 2, 2]].tolist(), [0, 1, 2, 0])
    assert results["accuracy"] == pytest.approx(3 / 4)
    assert results["f1"] == pytest.approx((2 / 3 + 1 + 2 / 3) / 3)
    tagger = shallow("bert", "TOKEN_CLASSIFICATION", num_labels=3)
    scores = eye[torch.tensor([[0, 1, 2], [2, 2, 1]])].tolist()
    assert figures(tagger, scores, [[0, 1, -100], [2, 0, -100]])["accuracy"] == pytest.approx(3 / 4)


def test_numbers() -> None:
    model = shallow(num_labels=1)
    values, labels = [[1.0], [2.0], [3.0], [10.0], [2.0]], [0.5, 2.0, 2.5, 3.0, 2.5]
    results = figures(model, values, labels)
    flat = [value[0] for value in values]
    assert results["pearson"] == pytest.approx(stats.pearsonr(flat, labels)[0])
    assert results["spearman"] == pytest.approx(stats.spearmanr(flat, labels)[0])
    assert all(math.isnan(value) for value in figures(model, [[1.0], [1.0]], [0.0, 1.0]).values())


def test_several_labels_at_once() -> None:
    model = shallow(num_labels=3, problem_type="multi_label_classification")
    results = figures(model, [[1.0, -1.0, 2.0], [-1.0, -1.0, 1.0]], [[1.0, 0.0, 1.0], [1.0, 0.0, 1.0]])
    assert results == {"accuracy": 0.5, "f1": pytest.approx(2 * 3 / (2 * 3 + 1))}


def test_a_name_gives_one_figure_and_other_names_are_for_evaluate() -> None:
    prediction = EvalPrediction(predictions=torch.eye(2).numpy(), label_ids=torch.tensor([0, 1]).numpy())
    for name in ("accuracy", "f1", "matthews_correlation"):
        compute = named_metric(name, shallow())
        assert compute is not None
        assert compute(prediction) == {name: 1.0}
    assert named_metric("rouge", shallow()) is None
    assert named_metric("pearsonr", shallow()) is None
    assert task_of(shallow("bert", "MASKED_LM")).figures == ()


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_with_words(shallow("bert", "QUESTION_ANSWERING"), tmp_path_factory.mktemp("qa"))


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> str:
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "word_embed_proj_dim": 16,
        "ffn_dim": 12,
        "num_attention_heads": 4,
    }
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=60, num_hidden_layers=2, max_position_embeddings=20, pad_token_id=1, **sizes
    )
    return save_with_words(OPTForCausalLM(config), tmp_path_factory.mktemp("lm"))


def test_the_best_span_is_inside_the_context_in_order_and_short() -> None:
    context = "a bb ccc dddd"
    characters = [None, (0, 1), (2, 4), (5, 8), (9, 13), None]
    first, last = torch.tensor([9.0, 0, 3, 0, 5, 9]), torch.tensor([9.0, 6, 0, 4, 0, 9])
    assert best_span(first, last, characters, context) == (7.0, "bb ccc")
    many = [(i, i + 1) for i in range(40)]
    score, text = best_span(
        torch.eye(40)[0] * 5, torch.eye(40)[35] * 5, many, "x" * 40
    )  # 36 tokens are too many
    assert score == 5.0
    assert len(text) <= 30


def test_long_contexts_are_read_in_windows_whose_best_answer_counts(reader: str) -> None:
    """A model whose logits point at one word wherever it is finds it in the third window as in the first."""
    tokenizer = AutoTokenizer.from_pretrained(reader)
    target = tokenizer.convert_tokens_to_ids("w50")
    model = AutoModelForQuestionAnswering.from_pretrained(reader)

    def pointing(*args: Any, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        logits = 10.0 * (input_ids == target)
        return type("Outputs", (), {"start_logits": logits, "end_logits": logits})()

    model.forward = pointing
    rows = [
        {"question": " w1 w2", "context": "w3 w50 w4", "answers": {"text": ["w50"], "answer_start": [3]}},
        {
            "question": "w1",
            "context": " ".join(["w5"] * 40 + ["W50", "w6"]),
            "answers": {"text": ["W50 w6", "the w50!"]},
        },
        {"question": "w1", "context": "w9 w50", "answers": {"text": ["w9 w50"], "answer_start": [0]}},
    ]
    results = answer_figures(
        model, rows, tokenizer, KPruneArguments(max_seq_length=16, per_device_eval_batch_size=2)
    )
    assert results["exact_match"] == pytest.approx(100 * 2 / 3)
    assert results["f1"] == pytest.approx(100 * (1 + 1 + 2 / 3) / 3)
    without = [*rows[:1], {"question": "w1", "context": "w9 w8", "answers": {"text": [], "answer_start": []}}]
    assert answer_figures(model, without, tokenizer, KPruneArguments())["exact_match"] == pytest.approx(50.0)
    with pytest.raises(ArgumentError, match="expected question, context and answers"):
        answer_figures(model, [{"question": "w1", "context": "w2"}], tokenizer, KPruneArguments())


def test_perplexity_is_of_all_tokens_in_windows(writer: str) -> None:
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(writer).eval(),
        AutoTokenizer.from_pretrained(writer),
    )
    lines = texts(12, 4)
    ids = torch.tensor(tokenizer("\n\n".join(lines), add_special_tokens=False)["input_ids"])
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, 10):
            window = ids[start : start + 11][None]
            logits = model(window[:, :-1]).logits.log_softmax(-1)
            total -= float(logits.gather(-1, window[:, 1:, None]).sum())
        results = perplexity(model, lines, tokenizer, KPruneArguments(max_seq_length=10))
    assert results == pytest.approx(math.exp(total / (len(ids) - 1)), rel=1e-5)
    with pytest.raises(ArgumentError, match="hold 1 tokens, expected at least 2"):
        perplexity(model, ["w1", ""], tokenizer, KPruneArguments())


def test_evaluate_takes_texts_or_rows(writer: str, reader: str) -> None:
    """In Python: strings and columns alike; labelled tokens go to `Trainer`; modes and settings of the model stay."""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(writer).train(),
        AutoTokenizer.from_pretrained(writer),
    )
    pruner = KPrunePruner(model, KPruneArguments(disable_tqdm=True, use_cpu=True), processing_class=tokenizer)
    results = pruner.evaluate(texts(9, 3))
    assert results == pruner.evaluate([{"text": text, "label": 0} for text in texts(9, 3)])
    assert list(results) == ["eval_perplexity"]
    assert model.training
    ids = tokenizer("w1 w2 w3 w4")["input_ids"]
    rows = [{"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids}] * 4
    trained = pruner.evaluate(rows)
    assert trained["eval_perplexity"] == pytest.approx(math.exp(trained["eval_loss"]))
    with pytest.raises(ArgumentError, match="set text_columns"):
        pruner.evaluate([{"a": "w1", "b": "w2"}])
    assert evaluate_texts(shallow(), ["w1"], tokenizer, KPruneArguments()) is None


def test_a_classifier_gets_its_figures_by_default() -> None:
    model = shallow()
    rows = [{"input_ids": [2, 5, 7 + i % 3], "attention_mask": [1, 1, 1], "label": i % 2} for i in range(12)]
    pruner = KPrunePruner(model, KPruneArguments(disable_tqdm=True, use_cpu=True), eval_dataset=rows)
    assert {"eval_accuracy", "eval_f1", "eval_matthews", "eval_loss"} <= pruner.evaluate().keys()


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("reader", ["eval_exact_match", "eval_f1"]),
        *slow_unless_in(
            (),
            [
                ("classifier", ["eval_accuracy", "eval_f1", "eval_matthews"]),
                ("regressor", ["eval_pearson", "eval_spearman"]),
                ("writer", ["eval_perplexity"]),
            ],
        ),
    ],
)
def test_the_command_line_reports_the_figures_of_the_task(
    kind: str, names: list[str], reader: str, writer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Dense and pruned, by default; without evaluation data one line says how."""
    models = {"reader": reader, "writer": writer}
    if kind not in models:
        models[kind] = save_with_words(
            shallow(num_labels=2 if kind == "classifier" else 1), tmp_path / "dense"
        )
    frame = pd.DataFrame({"text": texts(30, 0)})
    evaluation = pd.DataFrame(
        {"text": texts(12, 1), "label": [i % 2 + (0.25 * i if kind == "regressor" else 0) for i in range(12)]}
    )
    if kind == "reader":
        frame = pd.DataFrame({"question": texts(30, 0), "context": texts(30, 1)})
        answers = [{"text": [context.split()[0]], "answer_start": [0]} for context in texts(12, 3)]
        evaluation = pd.DataFrame({"question": texts(12, 2), "context": texts(12, 3), "answers": answers})
    frame.to_parquet(tmp_path / "train.parquet")
    evaluation.to_parquet(tmp_path / "eval.parquet")
    options = [
        "--model_name_or_path",
        models[kind],
        "--dataset_file",
        tmp_path / "train.parquet",
        "--method",
        "magnitude",
    ]
    options += ["--disable_tqdm", "--no_tune"]
    assert (
        main(
            [
                "prune",
                *map(str, options),
                "--output_dir",
                str(tmp_path / "a"),
                "--eval_file",
                str(tmp_path / "eval.parquet"),
            ]
        )
        == 0
    )
    printed = capsys.readouterr().out
    for name in names:
        cells = next(line for line in printed.splitlines() if line.startswith(f"| {name} |")).split("|")
        assert len([float(cell) for cell in cells[2:4]]) == 2
    assert "No evaluation data" not in printed
    assert "calibration rows too" not in printed
    assert main(["prune", *map(str, options), "--output_dir", str(tmp_path / "b")]) == 0
    printed = capsys.readouterr().out
    assert (
        f"--eval_file FILE shows {', '.join(name.removeprefix('eval_') for name in names)} of the dense"
        in printed
    )


def test_evaluation_rows_among_the_calibration_rows_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_with_words(shallow(), tmp_path / "dense")
    pd.DataFrame({"text": texts(30, 0), "label": [0, 1] * 15}).to_csv(tmp_path / "all.csv", index=False)
    some = pd.DataFrame({"text": [*texts(30, 0)[:4], "w1 w1 w1", "w2 w2 w2"], "label": [0, 1] * 3})
    some.to_csv(tmp_path / "some.csv", index=False)
    options = [
        "--model_name_or_path",
        model,
        "--dataset_file",
        tmp_path / "all.csv",
        "--eval_file",
        tmp_path / "some.csv",
    ]
    options += [
        "--method",
        "magnitude",
        "--disable_tqdm",
        "--metric",
        "accuracy",
        "--output_dir",
        tmp_path / "out",
    ]
    assert main(["prune", *map(str, options)]) == 0
    printed = capsys.readouterr().out
    assert "4 of 6 evaluation rows are calibration rows too" in printed
    assert "| eval_accuracy |" in printed
    assert "| eval_f1 |" not in printed


PAIRS = ["sentence1", "sentence2"]
PUBLISHED: dict[str, tuple[Any, str, list[str], dict[str, float]]] = {
    "minilm-sst2": (
        AutoModelForSequenceClassification,
        "sst2/validation.parquet",
        ["sentence"],
        {"accuracy": 0.8956, "f1": 0.8988},
    ),
    "minilm-stsb": (
        AutoModelForSequenceClassification,
        "stsb/test.parquet",
        PAIRS,
        {"pearson": 0.8091, "spearman": 0.8065},
    ),
    "minilm-squad": (
        AutoModelForQuestionAnswering,
        "squad/validation_1k.parquet",
        [],
        {"exact_match": 37.0, "f1": 52.5},
    ),
    "opt-wikitext2": (AutoModelForCausalLM, "wikitext2/test.parquet", [], {"perplexity": 193.72}),
}
FIRST = {"minilm-squad": 100, "opt-wikitext2": 726}
"""Rows of those that take long. Of all rows the figures are 43.6 and 57.46, and 179.8, as the README of the pack has them."""


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_figures_of_the_pack(pack: Path, name: str) -> None:
    """As its README has them, to the last digit there, or as they are of the first rows."""
    auto, file, columns, expected = PUBLISHED[name]
    path, frame = str(pack / "models" / name), pd.read_parquet(pack / "data" / file)
    tokenizer = AutoTokenizer.from_pretrained(path)
    rows = frame.to_dict("records")[: FIRST.get(name)]
    if columns:
        rows = [
            {
                **tokenizer(*(row[column] for column in columns), truncation=True, max_length=128),
                "label": row["label"],
            }
            for row in rows
        ]
    length = 256 if name == "minilm-squad" else None
    args = KPruneArguments(disable_tqdm=True, use_cpu=True, max_seq_length=length)
    results = KPrunePruner(auto.from_pretrained(path), args, processing_class=tokenizer).evaluate(rows)
    digits = {"exact_match": 2, "perplexity": 2, "f1": 2 if name == "minilm-squad" else 4}
    figures = {key: round(results[f"eval_{key}"], digits.get(key, 4)) for key in expected}
    assert figures == expected
