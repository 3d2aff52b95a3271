"""Calibration: which rows are drawn, and that what is summed over them == a naive computation row by row."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from checks import Collator, assert_same_plan_and_weights, calibration, masked, plan_and_weights
from data import collate, plain_tokenizer, rows, text
from models import shallow, slow_unless_in, tiny
from torch import Tensor, nn
from transformers import PreTrainedModel
from zoo import make

import hf_kprune.calibration.measure
from hf_kprune import ArgumentError, CalibrationError, KPruneArguments, KPruneCallback, KPrunePruner
from hf_kprune.calibration.batches import Calibration
from hf_kprune.calibration.distance import Judge, distance
from hf_kprune.calibration.draw import draw_rows
from hf_kprune.calibration.equations import Reference, Sample, normal_equations
from hf_kprune.calibration.knowledge import Knowledge
from hf_kprune.calibration.measure import measure_knowledge, tops_of
from hf_kprune.calibration.rows import Rows, row_length, row_tokens
from hf_kprune.calibration.tasks import knowledge_loss
from hf_kprune.methods.base import Statistics
from hf_kprune.methods.least_squares import NormalEquations
from hf_kprune.structure.sublayers import find_sublayers
from hf_kprune.structure.surgery import cut, write_plan


def wide(count: int) -> Collator:
    """A collator that pads more than it must."""

    def pad(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        inputs = collate(batch)
        padded = torch.nn.functional.pad
        return {
            "input_ids": padded(inputs["input_ids"], (0, count), value=1),
            "attention_mask": padded(inputs["attention_mask"], (0, count)),
        }

    return pad


# ---------------------------------------------------------------------------------------------------------------------
# Rows
# ---------------------------------------------------------------------------------------------------------------------


def drawn(dataset: Any, processing_class: Any = None, keep_labels: bool = False, **options: Any) -> Rows:
    return draw_rows(tiny(), dataset, processing_class, KPruneArguments(**options), keep_labels)


class MapStyle(torch.utils.data.Dataset[dict[str, Any]]):
    """A dataset of torch's, whose rows are lists, tensors or arrays."""

    def __init__(self, data: list[dict[str, Any]], convert: Callable[[Any], Any] = list):
        self.data, self.convert = data, convert

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {key: self.convert(value) for key, value in self.data[index].items()}


class Stream(torch.utils.data.IterableDataset[dict[str, Any]]):
    def __init__(self, data: list[dict[str, Any]]):
        self.data = data

    def __iter__(self) -> Any:
        return iter(self.data)


def ids(rows_: Rows) -> list[list[int]]:
    return [torch.as_tensor(row["input_ids"]).tolist() for row in rows_.rows]


def test_every_kind_of_dataset_gives_the_same_rows() -> None:
    data = rows(30)
    expected = drawn(data, num_tokens=100)
    assert 100 <= expected.tokens < 112
    words = plain_tokenizer()
    frozen = datasets.Dataset.from_list(data)
    kinds = {
        "datasets": drawn(frozen, num_tokens=100),
        "datasets in torch's format": drawn(frozen.with_format("torch"), num_tokens=100),
        "map-style": drawn(MapStyle(data), num_tokens=100),
        "map-style of tensors": drawn(MapStyle(data, torch.tensor), num_tokens=100),
        "map-style of arrays": drawn(MapStyle(data, np.array), num_tokens=100),
        "texts": drawn([text(row) for row in data], words, num_tokens=100),
        "pairs": drawn([(text(row),) for row in data], words, num_tokens=100),
    }
    for kind, rows_ in kinds.items():
        assert ids(rows_) == ids(expected), kind
        assert (rows_.tokens, rows_.measured) == (expected.tokens, expected.measured), kind
        assert rows_.fingerprint["sha256"] == expected.fingerprint["sha256"], kind


def test_a_stream_is_read_from_its_beginning() -> None:
    data = rows(30)
    for stream in (Stream(data), datasets.Dataset.from_list(data).to_iterable_dataset(), iter(data)):
        rows_ = drawn(stream, num_tokens=100)
        assert ids(rows_) == [row["input_ids"] for row in data[: len(rows_.rows)]]
        assert sum(map(len, ids(rows_)[:-1])) < 100 <= rows_.tokens == sum(map(len, ids(rows_)))


def test_pairs_of_texts_are_one_row() -> None:
    rows_ = drawn([("w5 w6", "w7"), ["w8", "w9 w10"]], plain_tokenizer())
    assert sorted(ids(rows_)) == [[5, 6, 2, 7], [8, 2, 9, 10]]


def test_texts_are_truncated_to_what_is_asked_or_to_what_the_model_takes() -> None:
    long = " ".join(["w7"] * 60)
    assert drawn([long], plain_tokenizer(), max_seq_length=9).tokens == 9
    assert drawn([long], plain_tokenizer(), max_seq_length=50).tokens == 40
    assert drawn([long], plain_tokenizer()).tokens == 40
    roberta = tiny("roberta")  # it numbers positions from 2
    assert draw_rows(roberta, [long], plain_tokenizer(), KPruneArguments(), False).tokens == 38
    inputs = {"input_ids": torch.full((1, 38), 7)}
    assert bool(torch.isfinite(roberta(**inputs).logits).all())


def test_rows_are_drawn_without_replacement_and_decided_by_the_seed() -> None:
    data = [{"input_ids": [i, i, i]} for i in range(2, 52)]
    everything = drawn(data)
    assert sorted(ids(everything)) == [row["input_ids"] for row in data]
    assert ids(everything) != [row["input_ids"] for row in data]
    some, again, other = (drawn(data, num_tokens=60, seed=seed) for seed in (42, 42, 43))
    assert ids(some) == ids(again) == ids(everything)[:20]
    assert ids(other) != ids(some)
    assert some.fingerprint == again.fingerprint
    assert some.fingerprint["sha256"] != other.fingerprint["sha256"]


@pytest.mark.parametrize("tokens", [1, 7, 50, 100_000])
def test_tokens_are_as_many_as_asked_and_padding_is_none(tokens: int) -> None:
    data = rows(20)
    padded = [{k: v + [1 if k == "input_ids" else 0] * (15 - len(v)) for k, v in row.items()} for row in data]
    rows_, from_padded = drawn(data, num_tokens=tokens), drawn(padded, num_tokens=tokens)
    assert (from_padded.tokens, len(from_padded.rows)) == (rows_.tokens, len(rows_.rows))
    lengths = [len(row) for row in ids(rows_)]
    assert rows_.tokens == sum(lengths)
    assert rows_.tokens >= min(tokens, sum(len(row["input_ids"]) for row in data))
    assert sum(lengths[:-1]) < tokens


def test_measured_rows_are_the_first_ones() -> None:
    data = rows(30)
    for measure in (1, 20, 100):
        rows_ = drawn(data, num_tokens=100, num_measure_tokens=measure)
        assert ids(rows_) == ids(drawn(data, num_tokens=100))
        lengths = [len(row) for row in ids(rows_)]
        assert sum(lengths[: rows_.measured - 1]) < measure <= sum(lengths[: rows_.measured])
    assert drawn(data, num_tokens=100).measured == len(rows_.rows)
    exact = drawn([{"input_ids": [5, 6, 7]}] * 9, num_tokens=9, num_measure_tokens=6)
    assert (len(exact.rows), exact.measured) == (3, 2)


def test_empty_rows_are_passed_over_and_nothing_else_is_an_error() -> None:
    assert ids(drawn([{"input_ids": []}, {"input_ids": [5, 6]}])) == [[5, 6]]
    assert ids(
        drawn([{"input_ids": [5], "attention_mask": [0]}, {"input_ids": [6], "attention_mask": [1]}])
    ) == [[6]]
    empty: list[Any] = [[], [{"input_ids": []}], Stream([])]
    for nothing in empty:
        with pytest.raises(CalibrationError, match="the calibration dataset is empty"):
            drawn(nothing)


def test_a_text_and_a_dict_of_splits_are_no_datasets() -> None:
    splits = datasets.DatasetDict({"train": datasets.Dataset.from_list(rows(3))})
    for dataset, name in (
        ("w5 w6", "str"),
        (splits, "DatasetDict"),
        (dict(splits), "dict"),
        (5, "int"),
        (None, "NoneType"),
    ):
        with pytest.raises(
            CalibrationError, match=f"is a {name}, expected a dataset of rows or a list of texts"
        ):
            drawn(dataset, plain_tokenizer())


def test_choices_count_each_and_may_differ_in_length() -> None:
    row = {"input_ids": [[5, 6, 7], [8]], "attention_mask": [[1, 1, 1], [1]]}
    square = {key: torch.tensor(value) for key, value in rows(1, choices=3)[0].items()}
    assert (row_tokens(row), row_length(row)) == (4, 3)
    assert row_tokens(square) == square["input_ids"].numel()
    assert row_length(square) == square["input_ids"].shape[1]
    rows_ = draw_rows(tiny(head="MULTIPLE_CHOICE"), [row], None, KPruneArguments(), False)
    assert (rows_.tokens, rows_.rows) == (4, [row])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"input_ids": [5] * 41},
            "has 41 tokens, BertForSequenceClassification takes at most 40.*max_length=40",
        ),
        ({"input_ids": [5, 60]}, "token ids 5 to 60, the model's vocabulary has 60"),
        ({"input_ids": [5, -1]}, "token ids -1 to 5, the model's vocabulary has 60"),
        ({"phrase": "w5"}, r"has the columns \['phrase'\].*tokenise the texts"),
        ({"inputs_embeds": [0.5]}, r"has inputs_embeds of .*, expected floats, \(tokens, width\)"),
        (5 * ("w5",), r"expected a string or a pair of strings"),
        (
            (3, "w5", "w6", "w7"),
            r"a calibration text is \['w5', 'w6', 'w7'\], expected a string or a pair of strings",
        ),
    ],
)
def test_rows_that_cannot_be_used_are_refused(row: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        drawn([row], plain_tokenizer())


@pytest.mark.slow
def test_rows_of_embeddings_prune_as_those_of_the_ids_that_they_are_of() -> None:
    torch.manual_seed(0)
    words = torch.randint(4, 60, (24, 8))
    pruned = []
    for embeds in (False, True):
        model = shallow()
        table = model.get_input_embeddings().weight.detach()
        each = [{"inputs_embeds": table[ids]} if embeds else {"input_ids": ids.tolist()} for ids in words]
        KPrunePruner(model, KPruneArguments(sparsity=0.5, seed=0), each).prune()
        pruned.append(model)
    ids, other = (model(input_ids=words).logits for model in pruned)
    assert torch.allclose(ids, other, atol=1e-5)


def test_texts_without_a_tokenizer_and_surplus_columns_are_refused() -> None:
    with pytest.raises(ArgumentError, match="pass processing_class"):
        drawn(["w5 w6"])
    surplus = [{**row, "idx": 3} for row in rows(4)]
    assert ids(drawn(surplus)) == ids(drawn(rows(4)))
    with pytest.raises(
        CalibrationError, match=r"'idx'.*drop the other columns or set remove_unused_columns=True"
    ):
        drawn(surplus, remove_unused_columns=False)


def test_labels_are_dropped_or_left_to_the_caller_s_collator() -> None:
    data = [{**row, "labels": i % 2, "label": i} for i, row in enumerate(rows(4))]
    assert {key for row in drawn(data).rows for key in row} == {"input_ids", "attention_mask"}
    assert {key for row in drawn(data, keep_labels=True).rows for key in row} == {*data[0]}
    assert ids(drawn(data, remove_unused_columns=False)) == ids(drawn(rows(4)))


# ---------------------------------------------------------------------------------------------------------------------
# Sums
# ---------------------------------------------------------------------------------------------------------------------


def sums_of(s: Statistics) -> tuple[Tensor, Tensor, Tensor]:
    """Energies, sums of gradients, and sums of their squares, which were measured."""
    assert s.gradient_sum is not None
    assert s.gradient_square is not None
    return s.energy, s.gradient_sum, s.gradient_square


def pruned(teacher: PreTrainedModel, below: int) -> PreTrainedModel:
    """A student of which the sublayers below are cut and tuned, as they are when the one there is measured."""
    student = copy.deepcopy(teacher)
    sublayers = find_sublayers(student)
    torch.manual_seed(1)
    for i, sublayer in enumerate(sublayers[:below]):
        cut(
            sublayer, torch.arange(sublayer.num_units) % 2 == (i % 2 if i != 1 else 2)
        )  # the first FFN is emptied
        with torch.no_grad():
            sublayer.weight.add_(0.1 * torch.randn_like(sublayer.weight))
    write_plan(sublayers)
    return student.requires_grad_(False)


def measure(
    data: Calibration, student: PreTrainedModel, teacher: PreTrainedModel, position: int
) -> list[Statistics]:
    student_walk, teacher_walk = data.walk(student), data.walk(teacher)
    tops = tops_of(data, teacher_walk)
    for _ in range(position):
        data.advance(student_walk)
    student_walk.differs = True
    loss = knowledge_loss(student, 2.0, "mean")
    costs = [s.unit_flops(data.flops_lengths) for s in student_walk.sublayers]
    return measure_knowledge(data, student_walk, teacher_walk, tops, loss, costs)


def naively(
    student: PreTrainedModel, teacher: PreTrainedModel, position: int, data: list[dict[str, Any]]
) -> list[dict[str, Tensor]]:
    """Row by row, without padding, through the whole model, with real masks."""
    sublayers = find_sublayers(student)[position:]
    loss = knowledge_loss(student, 2.0, "mean")
    masks = [torch.ones(s.weight.shape[1], requires_grad=True) for s in sublayers]
    sums = [
        {k: torch.zeros(len(m), dtype=torch.float64) for k in ("energy", "total", "square")} for m in masks
    ]
    for row in data:
        inputs = collate([row])
        valid = inputs["attention_mask"].flatten(0, -2).bool()
        features: list[Tensor] = []

        def see(_: nn.Module, args: tuple[Tensor], seen: list[Tensor] = features) -> None:
            seen.append(args[0].detach().double())

        with ExitStack() as stack, masked(sublayers, masks):
            for sublayer in sublayers:
                stack.callback(sublayer.output.register_forward_pre_hook(see).remove)
            outputs = student(**inputs)
        with torch.no_grad():
            expected = teacher(**inputs)
        there = [mask for mask in masks if len(mask)]  # nothing reads the mask of what is empty
        gradients = iter(torch.autograd.grad(loss(outputs, expected, valid).sum(), there))
        for entry, a, mask in zip(sums, features, masks, strict=True):
            g = next(gradients) if len(mask) else mask.detach()
            entry["energy"] += a[valid].square().sum(0)
            entry["total"] += g.double()
            entry["square"] += g.double().square()
    return sums


def check(results: list[Statistics], expected: list[dict[str, Tensor]], rtol: float = 1e-3) -> None:
    assert len(results) == len(expected)
    for s, wanted in zip(results, expected, strict=True):
        for value, name in ((s.energy, "energy"), (s.gradient_sum, "total"), (s.gradient_square, "square")):
            scale = float(wanted[name].abs().max()) if len(wanted[name]) else 0.0
            torch.testing.assert_close(value, wanted[name], rtol=rtol, atol=1e-5 * scale)


CASES = [
    ("bert", "SEQUENCE_CLASSIFICATION"),
    ("bert", "MULTIPLE_CHOICE"),
    ("bert", "QUESTION_ANSWERING"),
    ("distilbert", "TOKEN_CLASSIFICATION"),
    ("roberta", "MASKED_LM"),
    ("mpnet", ""),
    ("electra", "PRETRAINING"),
]


@pytest.mark.parametrize(
    ("model_type", "head", "position"),
    slow_unless_in(
        [(*case, 1 + i % 2) for i, case in enumerate(CASES)],
        [(*case, position) for case in CASES for position in (1, 2, 5)],
    ),
)
def test_measured_sums_are_those_of_real_masks_row_by_row(model_type: str, head: str, position: int) -> None:
    data = rows(9, choices=3 if head == "MULTIPLE_CHOICE" else 0)
    teacher = tiny(model_type, head)
    student = pruned(teacher, position)
    results = measure(calibration(student, data, per_device_batch_size=4), student, teacher, position)
    expected = naively(student, teacher, position, data)
    check(results, expected)
    assert all(float(s["square"].max()) > 0 for s in expected), "nothing was measured"
    assert {s.samples for s in results} == {9}
    assert {s.tokens for s in results} == {sum(map(row_tokens, data))}
    sublayers = find_sublayers(student)[position:]
    mean = sum(map(row_tokens, data)) / (
        27 if head == "MULTIPLE_CHOICE" else 9
    )  # FLOPs are those of one sequence
    assert [(s.has_heads, s.unit_width, s.cost) for s in results] == [
        (s.unit.has_heads, s.unit_width, s.unit_flops({s.stack_name: mean})) for s in sublayers
    ]
    assert all(s.weight is sublayer.output.weight for s, sublayer in zip(results, sublayers, strict=True))


def test_a_student_with_emptied_sublayers_above_is_measured_too() -> None:
    """When a pruned checkpoint is pruned again."""
    teacher = pruned(tiny(), 4)
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        find_sublayers(student)[0].weight.mul_(1.1)
    results = measure(calibration(student, rows(9), per_device_batch_size=4), student, teacher, 0)
    assert results[1].energy.shape == (0,)
    check(results, naively(student, teacher, 0, rows(9)))


@pytest.mark.parametrize("head", ["SEQUENCE_CLASSIFICATION", "MULTIPLE_CHOICE"])
def test_batch_size_row_order_padding_and_slices_do_not_change_what_is_measured(
    head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = rows(9, choices=3 if head == "MULTIPLE_CHOICE" else 0)
    teacher = tiny("bert", head)
    student = pruned(teacher, 1)

    def summed(*args: Any, **kwargs: Any) -> list[tuple[Tensor, ...]]:
        made = measure(calibration(student, *args, **kwargs), student, teacher, 1)
        return [sums_of(s) for s in made]

    def compare(made: list[tuple[Tensor, ...]]) -> None:
        for sums, wanted in zip(made, expected, strict=True):
            for a, b in zip(sums, wanted, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))

    expected = summed(data, per_device_batch_size=9)
    for batch in (1, 2, 4, 32):
        compare(summed(data, per_device_batch_size=batch))
    compare(summed(data[::-1], per_device_batch_size=4))
    compare(summed(data, wide(11), per_device_batch_size=4))
    for layers in (1, 2):  # 3 slices and 2 of a batch of 9
        monkeypatch.setattr(hf_kprune.calibration.backward, "GRAPH_LAYERS", layers)
        compare(summed(data, per_device_batch_size=9))


def test_only_measured_rows_are_measured() -> None:
    data, teacher = rows(9), tiny()
    student = pruned(teacher, 2)
    results = measure(calibration(student, data, measured=4, per_device_batch_size=3), student, teacher, 2)
    check(results, naively(student, teacher, 2, data[:4]))
    assert {s.samples for s in results} == {4}


def test_without_a_loss_only_energy_is_measured() -> None:
    data, teacher = rows(9), tiny()
    batches = calibration(teacher, data)
    walk, loss = batches.walk(teacher), knowledge_loss(teacher, 2.0, "mean")
    statistics = measure_knowledge(batches, walk, walk, [], loss, [1.0] * len(walk.sublayers))
    expected = naively(pruned(teacher, 0), teacher, 0, data)
    for s, wanted in zip(statistics, expected, strict=True):
        torch.testing.assert_close(s.energy, wanted["energy"], rtol=1e-4, atol=1e-4)
        assert not any(total.any() for total in sums_of(s)[1:])


def test_the_distance_is_the_mean_loss_of_the_rows_held_out() -> None:
    data, teacher = rows(12), tiny()
    student, batches = pruned(teacher, 4), calibration(teacher, rows(12), per_device_batch_size=2)
    loss = knowledge_loss(student, 2.0, "mean")
    numbers = [number for batch in batches.batches if batch.held_out for number in batch.rows]
    assert 1 < len(numbers) < len(data)
    losses = []
    for number in numbers:
        inputs = collate([data[number]])
        with torch.no_grad():
            ours, theirs = (model.eval()(**inputs) for model in (student, teacher))
        losses.append(float(loss(ours, theirs, inputs["attention_mask"].bool())))
    assert distance(batches, student, teacher, loss) == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_bfloat16_measures_about_the_same() -> None:
    data, teacher = rows(9), tiny()
    student = pruned(teacher, 2)
    exact, rounded = (
        measure(calibration(student, data, measure_dtype=dtype), student, teacher, 2)
        for dtype in ("float32", "bfloat16")
    )
    for a, b in zip(exact, rounded, strict=True):
        for one, other in zip(sums_of(a)[::2], sums_of(b)[::2], strict=True):
            assert not torch.equal(one, other)
            assert torch.cosine_similarity(one, other, dim=0) > 0.99


def test_a_loss_of_the_wrong_shape_is_refused() -> None:
    teacher = tiny()
    student, batches = pruned(teacher, 1), calibration(teacher, rows(5))
    student_walk, teacher_walk = batches.walk(student), batches.walk(teacher)
    tops, costs = tops_of(batches, teacher_walk), [1.0] * len(student_walk.sublayers)
    student_walk.differs = True

    def mean(s: Any, t: Any, valid: Tensor) -> Tensor:
        loss: Tensor = (s.logits - t.logits).square().mean()
        return loss

    loss = Knowledge("custom", mean, 2.0, None)
    with pytest.raises(ArgumentError, match=r"gave \(\) for 2 samples, expected one number each"):
        measure_knowledge(batches, student_walk, teacher_walk, tops, loss, costs)


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "mpnet"])
@pytest.mark.parametrize("position", slow_unless_in((0, 5), (0, 1, 2, 5)))
@pytest.mark.parametrize(
    "options", [{"per_device_batch_size": 2}, *slow_unless_in((), [{}, {"collator": wide(5)}])]
)
def test_normal_equations_are_those_of_the_stacked_features(
    model_type: str, position: int, options: dict[str, Any]
) -> None:
    """A, Y and the reference row by row from whole forward passes, without padding."""
    data, teacher = rows(9), tiny(model_type)
    student = pruned(teacher, position)
    ours = find_sublayers(student)
    cut(ours[position], torch.arange(ours[position].num_units) % 2 == 0)
    batches = calibration(student, data[::-1], **options)
    student_walk, teacher_walk = batches.walk(student, ours), batches.walk(teacher)
    for _ in range(position):
        batches.advance(student_walk)
        batches.advance(teacher_walk)
    (equations,) = normal_equations(batches, student_walk, Reference(teacher_walk))

    def seen(model: PreTrainedModel, row: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Residual input, features and output of the sublayer."""
        sublayer, found = find_sublayers(model)[position], dict[str, Tensor]()
        assert sublayer.block.stream is not None
        reader = sublayer.layer.get_submodule(sublayer.block.stream)
        hooks = [
            reader.register_forward_pre_hook(
                lambda _, args, kwargs: found.update(x=args[0] if args else kwargs["hidden_states"]),
                with_kwargs=True,
            ),
            sublayer.output.register_forward_hook(lambda _, args, output: found.update(a=args[0], y=output)),
        ]
        with torch.no_grad():
            model(**collate([row]))
        for hook in hooks:
            hook.remove()
        return found["x"][0], found["a"][0], found["y"][0]

    features, target = [], []
    for row in data:
        x_s, a_s, _ = seen(student, row)
        x_t, _, y_t = seen(teacher, row)
        features.append(a_s)
        target.append(x_t + y_t - x_s)
    expected = NormalEquations.zeros(ours[position].weight.shape[1], 16, torch.device("cpu"))
    expected.add(torch.cat(features), torch.cat(target))
    assert int(equations.tokens) == sum(map(row_tokens, data))
    for value, wanted in zip(equations.tensors(), expected.tensors(), strict=True):
        scale = float(wanted.abs().max()) if wanted.numel() else 0.0
        torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-5 * scale)


def test_a_huge_token_does_not_hide_the_error_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its error is relative to its own stream; and the tokens are the same ones, whatever batches they are in."""
    data = rows(23)
    model = tiny()
    sublayer = find_sublayers(model)[1]
    columns, width = sublayer.weight.shape[1], len(sublayer.weight)
    generator = torch.Generator().manual_seed(0)
    lengths = [len(row["input_ids"]) for row in data]
    features, reference = (
        [torch.randn(n, size, generator=generator) for n in lengths] for size in (columns, width)
    )
    for first in reference:
        first[0] *= 1e4
    weight = torch.randn(width, columns, generator=generator).double() / 10
    bias = torch.randn(width, generator=generator)
    streams = [r - 0.9 * (f @ weight.T.float() + bias) for f, r in zip(features, reference, strict=True)]

    def error(size: int) -> float:
        of_size = calibration(model, data, per_device_batch_size=size)
        sample = Sample(of_size, sublayer)
        for batch in of_size.batches:
            stacked = [
                torch.nn.utils.rnn.pad_sequence([each[i] for i in batch.rows], True)
                for each in (features, streams, reference)
            ]
            sample.add(batch, batch.tokens(sublayer, stacked[0]), *stacked)
        numbers.append(sum(len(scale) for *_, scale in sample.tokens))
        return sample.error(weight, bias)

    numbers: list[int] = []
    tokens = [torch.cat(each).double() for each in (features, streams, reference)]
    rest = (tokens[2] - tokens[1] - tokens[0] @ weight.T - bias.double()).norm(dim=1)
    exact = float((rest / tokens[2].norm(dim=1)).square().mean().sqrt())
    assert error(32) == pytest.approx(exact, rel=1e-6)
    together = float(rest.norm() / tokens[2].norm())
    assert together < 1e-3 * exact  # which says nothing of all but the first tokens
    monkeypatch.setattr("hf_kprune.calibration.equations.SAMPLE", 30)
    assert error(4) == pytest.approx(error(7), rel=1e-9)
    assert numbers == [sum(lengths), numbers[1], numbers[1]]
    assert 20 < numbers[1] < 40


def test_nan_in_activations_names_the_sublayer() -> None:
    teacher = tiny()
    student = copy.deepcopy(teacher).requires_grad_(False)
    with torch.no_grad():
        student.get_parameter("bert.encoder.layer.1.attention.self.value.weight")[0] = float("nan")
    with pytest.raises(
        CalibrationError, match=r"NaN or Inf in the activations of encoder\.layer\.1\.attention"
    ):
        measure(calibration(student, rows(5)), student, teacher, 0)


# ---------------------------------------------------------------------------------------------------------------------
# Through the pruner
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("collated", slow_unless_in((True,), (False, True)))
def test_labels_do_not_matter(collated: bool) -> None:
    """Right, shuffled, absurd and no labels: the identical plan and weights, to the bit."""
    data = rows(24)
    labels = torch.randint(2, (24,), generator=torch.Generator().manual_seed(0)).tolist()
    words = plain_tokenizer()
    labelled: list[bool] = []

    def collator(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        tensors = collate(batch)
        labelled.append("labels" in batch[0])
        return (
            {**tensors, "labels": torch.tensor([row["labels"] for row in batch])} if labelled[-1] else tensors
        )

    how: dict[str, Any] = {"data_collator": collator} if collated else {"processing_class": words}
    expected = plan_and_weights(data, **how)
    assert any(len(kept) < 12 for kept in expected[0])
    for answers in (labels, labels[::-1], [-100 + i for i in range(24)]):
        assert_same_plan_and_weights(
            expected,
            plan_and_weights([{**row, "labels": y} for row, y in zip(data, answers, strict=True)], **how),
        )
    assert any(labelled) == collated


@pytest.mark.slow
def test_texts_and_datasets_prune_alike() -> None:
    data, words = rows(24), plain_tokenizer()
    expected = plan_and_weights(data, processing_class=words)
    assert_same_plan_and_weights(
        expected, plan_and_weights([text(row) for row in data], processing_class=words)
    )
    assert_same_plan_and_weights(
        expected, plan_and_weights(datasets.Dataset.from_list(data), processing_class=words)
    )
    assert_same_plan_and_weights(
        expected, plan_and_weights(MapStyle(data, torch.tensor), processing_class=words)
    )
    assert_same_plan_and_weights(expected, plan_and_weights(data, data_collator=collate))


@pytest.mark.slow
def test_batch_size_does_not_change_plan_or_weights() -> None:
    data, exact = rows(24), {"statistics_dtype": "float64"}
    expected = plan_and_weights(data, data_collator=collate, options=exact)
    for batch in (1, 5):
        result = plan_and_weights(
            data, data_collator=collate, options={"per_device_batch_size": batch, **exact}
        )
        assert_same_plan_and_weights(expected, result, rtol=1e-3, atol=1e-4)
    assert_same_plan_and_weights(
        expected, plan_and_weights(data, data_collator=wide(9), options=exact), rtol=1e-3, atol=1e-4
    )


def test_rows_of_different_length_need_something_that_pads() -> None:
    with pytest.raises(ArgumentError, match="differ in length.*pass processing_class"):
        plan_and_weights(rows(24))
    assert plan_and_weights([row for row in rows(400) if len(row["input_ids"]) == 7])[0]


def test_what_a_collator_makes_up_is_refused() -> None:
    with pytest.raises(
        CalibrationError, match=r"made \['texts'\], expected tensors that BertForSequenceClassification takes"
    ):
        plan_and_weights(
            rows(24), data_collator=lambda batch: {**collate(batch), "texts": ["?"] * len(batch)}
        )


def test_a_family_that_orders_its_blocks_wrongly_is_refused_and_the_model_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Cutting is right in any order, carrying is not."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    from hf_kprune import Block, Stack, UnsupportedArchitectureError
    from hf_kprune.structure.families import FAMILIES

    blocks = (
        Block(
            "attention",
            inputs={"attention.query_key_value": "qkv:perhead"},
            output="attention.dense",
            stream="input_layernorm",
            core="attention",
        ),
        Block(
            "ffn",
            inputs={"mlp.dense_h_to_4h": "f"},
            output="mlp.dense_4h_to_h",
            stream="post_attention_layernorm",
        ),
    )
    sizes = {
        "vocab_size": 60,
        "hidden_size": 16,
        "num_attention_heads": 4,
        "intermediate_size": 12,
        "num_hidden_layers": 2,
    }
    for wrong in (False, True):
        monkeypatch.setitem(FAMILIES, "gpt_neox", (Stack("layers", blocks[::-1] if wrong else blocks),))
        torch.manual_seed(0)
        model = GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, use_parallel_residual=wrong)).eval()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        args = KPruneArguments(sparsity=0.3, disable_tqdm=True, use_cpu=True)
        pruner = KPrunePruner(model, args, rows(20), data_collator=collate)
        if not wrong:
            assert pruner.prune().sparsity >= 0.3
            continue
        with pytest.raises(
            UnsupportedArchitectureError,
            match="runs layers.0.attention of layers where layers.0.ffn is due, as its family says",
        ):
            pruner.prune()
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("head", ["CAUSAL_LM", "MASKED_LM"])
@pytest.mark.parametrize("logits", [1, 60 * 9 * 2, 60 * 9 * 5])
def test_the_vocabulary_in_parts_is_the_vocabulary(
    monkeypatch: pytest.MonkeyPatch, head: str, logits: int
) -> None:
    """No more logits exist at once than asked (one token's at least), and the sums are the same."""
    data, teacher = rows(9), tiny("bert", head)
    student = pruned(teacher, 2)
    expected = measure(calibration(student, data), student, teacher, 2)
    most: list[int] = []
    for model in (student, teacher):
        model.get_output_embeddings().register_forward_hook(
            lambda _, args, output: most.append(output.numel())
        )
    monkeypatch.setattr("hf_kprune.calibration.outputs.LOGITS", logits)
    results = measure(calibration(student, data), student, teacher, 2)
    assert max(most) <= max(logits, 60 * 9)
    for a, b in zip(results, expected, strict=True):
        torch.testing.assert_close(a.gradient_sum, b.gradient_sum, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(a.gradient_square, b.gradient_square, rtol=1e-4, atol=1e-9)


def test_the_distance_of_a_vocabulary_in_parts_is_that_of_the_vocabulary(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of whole models, and of states above the highest sublayer."""
    teacher = tiny("bert", "CAUSAL_LM")
    student, batches = pruned(teacher, 2), calibration(teacher, rows(12), per_device_batch_size=2)
    loss = knowledge_loss(teacher, 2.0, "mean")
    expected = distance(batches, student, teacher, loss)
    monkeypatch.setattr("hf_kprune.calibration.outputs.LOGITS", 60 * 2 * 2)
    judge, walk = Judge(batches, batches.walk(teacher), loss), batches.walk(student)
    for _ in walk.sublayers:
        batches.advance(walk)
    most: list[int] = []
    for model in (student, teacher):
        model.get_output_embeddings().register_forward_hook(
            lambda _, args, output: most.append(output.numel())
        )
    assert judge.distance(walk) == pytest.approx(expected, rel=1e-4)
    assert 0 < max(most) <= 60 * 2 * 2
    assert distance(batches, student, teacher, loss) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("count", "measured", "held_out"),
    [
        (100, 40, range(40, 60)),
        (55, 40, range(40, 55)),
        (45, 40, range(30, 40)),
        (40, 40, range(30, 40)),
        (3, 3, range(0)),
    ],
)
def test_students_are_compared_on_rows_that_were_not_measured_if_there_are_any(
    count: int, measured: int, held_out: range
) -> None:
    drawn = Rows([{"input_ids": [1]}] * count, measured, count, {})
    assert list(drawn.held_out) == list(held_out)


def test_batches_of_a_trial_are_tuned_on_and_compared_on_other_rows() -> None:
    batches = calibration(tiny(), rows(24), measured=8, per_device_batch_size=3).batches
    tried, held_out, measured = (
        {number for batch in batches if getattr(batch, name) for number in batch.rows}
        for name in ("tried", "held_out", "measured")
    )
    assert (tried, measured, held_out) == ({*range(4)}, {*range(8)}, {*range(8, 12)})


@pytest.mark.several_splits
@pytest.mark.parametrize(
    ("first", "which"), [(0, "10 .* are measured"), (10, "5 .* are held out to compare")]
)
def test_rows_in_which_no_token_counts_are_refused_before_anything_is_measured(
    first: int, which: str
) -> None:
    """Of chats that were cut off before the answer all labels are -100, so that all models are alike on them."""
    data = [
        {"input_ids": [4, 5, 6, 7, 8, row], "labels": [-100 if row >= first else 8] * 6} for row in range(40)
    ]
    stream = datasets.Dataset.from_list(data).to_iterable_dataset()  # which is read from its beginning
    args = KPruneArguments(num_tokens=240, num_measure_tokens=60, disable_tqdm=True, use_cpu=True)
    pruner = KPrunePruner(make("llama"), args, stream)
    pruner.add_callback(Unmeasured)
    with pytest.raises(CalibrationError, match=f"no token counts in the {which}"):
        pruner.prune()


class Unmeasured(KPruneCallback):
    """Fails where measuring begins."""

    def on_phase_begin(self, args: Any, report: Any, phase: str, **kwargs: Any) -> None:
        assert phase == "prepare"
