"""Two models side by side: sizes, FLOPs, times, figures, agreement, and why a model is no faster."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from data import collate, rows, save_with_words, texts
from models import cut_randomly, shallow

from hf_kprune import ArgumentError, KPruneArguments, KPrunePruner, comparison
from hf_kprune.cli.terminal import main
from hf_kprune.comparison import Timing, agreement, compare, embeddings_of, reasons, same_neighbours
from hf_kprune.sizes import prunable_flops
from hf_kprune.structure.sublayers import find_sublayers


KEPT = (2, 5, 0, 12)


@pytest.fixture(autouse=True)
def _clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock by which the second model is twice as fast."""

    def take_turns(_models: object, _inputs: object, rounds: int) -> list[list[float]]:
        return [[2.0 + 0.5 * (i % 2), 1.0 + 0.25 * (i % 2)] for i in range(rounds)]

    monkeypatch.setattr(comparison, "take_turns", take_turns)


def test_sizes_times_figures_and_agreement_are_those_of_both_models() -> None:
    dense = shallow()
    pruned = cut_randomly(dense, KEPT)
    data: list[dict[str, Any]] = [{**row, "labels": i % 2} for i, row in enumerate(rows(12))]
    found = compare(dense, pruned, data, batch_sizes=[3], lengths=[5, 7], rounds=4, data_collator=with_labels)
    assert [size.parameters for size in found.sizes] == [dense.num_parameters(), pruned.num_parameters()]
    for timing in found.timings:
        lengths = {s.stack_name: float(timing.length) for s in find_sublayers(dense)}
        flops = [prunable_flops(find_sublayers(model), lengths) for model in (dense, pruned)]
        assert timing.flops[0] - timing.flops[1] == pytest.approx(flops[0] - flops[1])
        assert (timing.seconds, timing.speedup) == ([2.25, 1.125], 2.0)
    with torch.no_grad():
        answers = [model(**collate(data)).logits.argmax(-1) for model in (dense.eval(), pruned.eval())]
    labels = torch.tensor([row["labels"] for row in data])
    assert found.agreement == pytest.approx(float((answers[0] == answers[1]).float().mean()))
    expected = [float((answer == labels).float().mean()) for answer in answers]
    assert found.metrics["accuracy"] == pytest.approx(expected)
    text = str(found)
    assert "3 x 5" in text
    assert "2.00x" in text
    assert f"| agreement |  | {found.agreement:.4f} |" in text
    assert not found.remarks


def with_labels(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {**collate(batch), "labels": torch.tensor([row["labels"] for row in batch])}


@pytest.mark.parametrize(
    ("left", "seconds", "reason"),
    [
        (0.95, (1.0, 1.0), "because 95% of the FLOPs are left"),
        (0.5, (0.5, 0.5), "because the batch is so small .* 0.2 GFLOPs a second here, and 1 at best"),
        (0.5, (0.1, 0.1), "because 50% of the FLOPs are left, but products of these sizes are slower"),
        (0.5, (0.1, 0.05), None),
    ],
)
def test_where_a_model_is_no_faster_the_reason_is_told(
    left: float, seconds: Sequence[float], reason: str | None
) -> None:
    large = Timing(32, 128, [1e8 / 32, 1e8 / 64], [0.1, 0.05], [0.0, 0.0], 2.0)
    small = Timing(1, 16, [1e8, left * 1e8], list(seconds), [0.0, 0.0], seconds[0] / seconds[1])
    remarks = reasons([large, small])
    if reason is None:
        assert not remarks
    else:
        (remark,) = remarks
        assert remark.startswith("1 x 16 tokens: no speed-up is to be expected here, ")
        assert re.search(reason, remark)


def test_padding_is_no_agreement_and_numbers_agree_by_their_correlation() -> None:
    first = np.array([[[1.0, 0.0], [-100.0, -100.0]], [[0.0, 1.0], [0.0, 1.0]]])
    second = np.array([[[1.0, 0.0], [-100.0, -100.0]], [[1.0, 0.0], [0.0, 1.0]]])
    assert agreement(first, second) == pytest.approx(2 / 3)
    numbers = np.array([[1.0], [2.0], [3.0]])
    assert agreement(numbers, 2 * numbers + 1) == pytest.approx(1)
    assert agreement(numbers, -numbers) == pytest.approx(-1)
    assert agreement(numbers, numbers[:2]) is None


def test_embeddings_agree_where_the_nearest_row_is_the_same() -> None:
    first = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]]))
    turned = first[[0, 2, 1, 3]]
    assert same_neighbours(first, first) == 1
    assert same_neighbours(first, turned) == 0
    assert same_neighbours(first[:2], first[:2]) is None


def test_the_embeddings_of_a_base_model_are_compared_without_padding() -> None:
    dense = shallow().base_model.eval()
    data = rows(7)
    pruner = KPrunePruner(dense, KPruneArguments(disable_tqdm=True, per_device_batch_size=3), None, collate)
    embeddings = embeddings_of(pruner, data)
    for row, one in zip(data, embeddings, strict=True):
        alone = dense(**collate([row])).last_hidden_state[0].mean(0)
        torch.testing.assert_close(one, alone / alone.norm(), rtol=1e-4, atol=1e-5)
    same = compare(dense, copy.deepcopy(dense), data, lengths=[4], batch_sizes=[1], data_collator=collate)
    assert (same.agreement, same.metrics) == (1.0, {})


def test_no_round_is_refused() -> None:
    with pytest.raises(ArgumentError, match="rounds is 0, expected at least 1"):
        compare("nowhere", "nowhere", rounds=0)


def test_the_command_line_evaluates_and_compares(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    model = shallow(num_hidden_layers=1)
    dense = save_with_words(model, tmp_path / "dense")
    pruned = save_with_words(cut_randomly(model, KEPT[:2]), tmp_path / "pruned")
    frame = pd.DataFrame({"text": texts(10, 0), "label": [i % 2 for i in range(10)]})
    frame.to_csv(tmp_path / "rows.csv", index=False)
    assert main(["evaluate", pruned, "--eval_file", str(tmp_path / "rows.csv")]) == 0
    alone = capsys.readouterr().out
    assert "| eval_accuracy |" in alone
    share = alone.split("| eval_accuracy | ")[1].split(" |")[0]
    line = [
        "compare",
        dense,
        pruned,
        "--eval_file",
        str(tmp_path / "rows.csv"),
        "--lengths",
        "4",
        "--rounds",
        "2",
    ]
    assert main(line) == 0
    printed = capsys.readouterr().out
    assert "| 1 x 4 |" in printed
    assert "| 32 x 4 |" in printed
    assert share in printed.split("| accuracy |")[1].splitlines()[0]
    assert "| agreement |" in printed
    assert main(["compare", dense, pruned, "--lengths", "4", "--batch_sizes", "2"]) == 0
    assert "accuracy" not in capsys.readouterr().out
    assert main(["evaluate", pruned]) == 2
    assert "pass the evaluation data as --eval_dataset_name or --eval_file" in capsys.readouterr().err
