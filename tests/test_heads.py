"""Predictive knowledge by head: which loss a model gets, and that neither padding nor batches change it."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from data import collate, rows
from models import EVERY_HEAD, classes, shallow
from torch import Tensor
from transformers import BertModel, BertPreTrainedModel, PreTrainedModel
from transformers.modeling_outputs import (
    BaseModelOutput,
    ModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
)
from zoo import make

from hf_kprune import ArgumentError, KPruneArguments, KPrunePruner, PruningReport
from hf_kprune.calibration.knowledge import CLASS, Draws, Knowledge, KnowledgeLoss
from hf_kprune.calibration.loss_check import check_loss
from hf_kprune.calibration.losses import (
    bernoulli_kl_divergence,
    kl_divergence,
    of_embeddings,
    of_tokens,
    squared_error,
)
from hf_kprune.calibration.tasks import knowledge_loss
from hf_kprune.structure.sublayers import find_sublayers


QUICK: dict[str, Any] = {"sparsity": 0.5, "method": "magnitude", "tune": False, "disable_tqdm": True}
NAMES = {
    "": "embedding (mean)",
    "CAUSAL_LM": "causal language model",
    "MASKED_LM": "masked language model",
    "MULTIPLE_CHOICE": "multiple choice",
    "NEXT_SENTENCE_PREDICTION": "next sentence prediction",
    "PRETRAINING": "pretraining heads",
    "QUESTION_ANSWERING": "extractive question answering",
    "SEQUENCE_CLASSIFICATION": "classification",
    "TOKEN_CLASSIFICATION": "token classification",
}
PROBLEMS = [
    ("classification", {"num_labels": 3, "problem_type": "single_label_classification"}),
    ("classification", {"num_labels": 2}),
    ("classification", {"num_labels": 2, "problem_type": "single_label_classification"}),
    ("regression", {"num_labels": 1}),
    ("regression", {"num_labels": 3, "problem_type": "regression"}),
    ("multi-label classification", {"num_labels": 3, "problem_type": "multi_label_classification"}),
]


def batch(head: str, count: int = 5, padding: int = 0) -> dict[str, Tensor]:
    inputs = collate(rows(count, choices=3 if head == "MULTIPLE_CHOICE" else 0))
    pad = torch.nn.functional.pad
    return {
        "input_ids": pad(inputs["input_ids"], (0, padding), value=1),
        "attention_mask": pad(inputs["attention_mask"], (0, padding)),
    }


def collate_without_labels(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    return collate([{key: value for key, value in row.items() if key != "labels"} for row in rows])


def losses(
    loss: KnowledgeLoss, student: PreTrainedModel, teacher: PreTrainedModel, inputs: dict[str, Tensor]
) -> Tensor:
    valid = inputs["attention_mask"].flatten(0, -2).bool()
    return loss(student(**inputs), teacher(**inputs), valid)


def students(model_type: str, head: str, **config: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Two models of different weights, in float64 so that differences are those of the loss."""
    return shallow(model_type, head, seed=1, **config).double(), shallow(model_type, head, **config).double()


def gradient_norm(
    loss: KnowledgeLoss, student: PreTrainedModel, teacher: PreTrainedModel, inputs: dict[str, Tensor]
) -> float:
    weights = [p for name, p in student.named_parameters() if "layer.0." in name]
    student.requires_grad_(True)
    gradients = torch.autograd.grad(losses(loss, student, teacher, inputs).sum(), weights, allow_unused=True)
    return sum(float(g.norm()) for g in gradients if g is not None)


@pytest.mark.parametrize(("model_type", "head"), EVERY_HEAD)
def test_every_head_of_every_family_has_its_loss(model_type: str, head: str) -> None:
    student, teacher = students(model_type, head)
    loss = knowledge_loss(student, 2.0, "mean")
    name = loss.name
    if head == "PRETRAINING" and classes(model_type)[head] is classes(model_type).get("MASKED_LM"):
        head = "MASKED_LM"  # families pretrained by masked words alone have one class for both
    assert name == NAMES[head]
    inputs = batch(head)
    values = losses(loss, student, teacher, inputs).detach()

    assert values.shape == (5,)
    assert float(values.min()) > 0
    padded = losses(loss, student, teacher, batch(head, padding=7)).detach()
    torch.testing.assert_close(padded, values, rtol=1e-9, atol=1e-12)
    singly = [losses(loss, student, teacher, {k: v[i : i + 1] for k, v in inputs.items()}) for i in range(5)]
    torch.testing.assert_close(torch.cat(singly).detach(), values, rtol=1e-9, atol=1e-12)

    same = losses(loss, teacher, teacher, inputs).detach()
    assert float(same.abs().max()) < 1e-12
    assert (
        gradient_norm(loss, teacher, teacher, inputs)
        < 1e-6
        < 1e-4
        < gradient_norm(loss, student, teacher, inputs)
    )


@pytest.mark.parametrize(("expected", "config"), PROBLEMS)
def test_a_sequence_head_is_told_by_problem_type_and_labels(expected: str, config: dict[str, Any]) -> None:
    student, teacher = students("bert", "SEQUENCE_CLASSIFICATION", **config)
    loss = knowledge_loss(student, 2.0, "mean")
    name = loss.name
    assert name == expected
    inputs = batch("")
    s, t = student(**inputs).logits, teacher(**inputs).logits
    by_hand: dict[str, Callable[[], Tensor]] = {
        "classification": lambda: kl_divergence(s, t, 2.0),
        "regression": lambda: ((s - t) ** 2).mean(1),
        "multi-label classification": lambda: bernoulli_kl_divergence(s, t, 2.0),
    }
    torch.testing.assert_close(losses(loss, student, teacher, inputs), by_hand[expected]())
    assert (
        gradient_norm(loss, teacher, teacher, inputs) < 1e-6 < gradient_norm(loss, student, teacher, inputs)
    )


def test_regression_is_per_sample_and_has_no_gradient_at_the_teacher_unlike_a_broadcast_one() -> None:
    """METHOD 1.13, B1: what the published code computes is wrong by the pairs of different samples."""
    model = shallow(num_labels=1)
    loss = knowledge_loss(model, 2.0, "mean")
    z = torch.tensor([[1.0], [2.0], [4.0]], requires_grad=True)
    outputs = SequenceClassifierOutput(logits=z)
    valid = torch.ones(3, 1).bool()
    (gradient,) = torch.autograd.grad(
        loss(outputs, SequenceClassifierOutput(logits=z.detach()), valid).sum(), [z]
    )
    assert torch.equal(gradient, torch.zeros_like(z))
    (broadcast,) = torch.autograd.grad((z - z.detach().squeeze(1)).square().mean(), [z])
    assert broadcast.abs().max() > 0.1
    with pytest.raises(ValueError, match="must have one shape"):
        loss(outputs, SequenceClassifierOutput(logits=z.detach().squeeze(1)), valid)


@pytest.mark.parametrize("temperature", [0.1, 1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_question_answering_is_the_mean_of_two_softmaxes_over_tokens_without_padding(
    temperature: float, dtype: torch.dtype
) -> None:
    """METHOD 1.13, B8: the published softmax goes over padding too."""
    loss = knowledge_loss(shallow("bert", "QUESTION_ANSWERING"), temperature, "mean")
    generator = torch.Generator().manual_seed(0)
    starts, ends, other_starts, other_ends = (
        torch.randn(2, 6, generator=generator).to(dtype) for _ in range(4)
    )
    valid = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]).bool()

    def outputs(filler: float, start: Tensor, end: Tensor) -> QuestionAnsweringModelOutput:
        start, end = (torch.where(valid, z, torch.tensor(filler, dtype=dtype)) for z in (start, end))
        return QuestionAnsweringModelOutput(start_logits=start, end_logits=end)

    values = loss(outputs(100.0, starts, ends), outputs(-3.0, other_starts, other_ends), valid)
    by_hand = [
        (kl_divergence(s[v], t[v], temperature) + kl_divergence(e[v], f[v], temperature)) / 2
        for s, e, t, f, v in zip(starts, ends, other_starts, other_ends, valid, strict=True)
    ]
    torch.testing.assert_close(values, torch.stack(by_hand))


def test_pretraining_heads_count_each() -> None:
    """BERT: words, as the mean over tokens, and next sentence; ELECTRA: replaced or not, as the mean over tokens."""
    inputs = batch("")
    valid = inputs["attention_mask"].bool()
    student, teacher = students("bert", "PRETRAINING")
    loss = knowledge_loss(student, 2.0, "mean")
    s, t = student(**inputs), teacher(**inputs)
    words = kl_divergence(s.prediction_logits, t.prediction_logits, 2.0)
    pair = kl_divergence(s.seq_relationship_logits, t.seq_relationship_logits, 2.0)
    by_hand = torch.stack([w[v].mean() for w, v in zip(words, valid, strict=True)]) + pair
    torch.testing.assert_close(losses(loss, student, teacher, inputs), by_hand)

    student, teacher = students("electra", "PRETRAINING")
    loss = knowledge_loss(student, 2.0, "mean")
    s, t = (torch.stack([z, -z], -1) / 2 for z in (student(**inputs).logits, teacher(**inputs).logits))
    by_hand = torch.stack([w[v].mean() for w, v in zip(kl_divergence(s, t, 2.0), valid, strict=True)])
    torch.testing.assert_close(losses(loss, student, teacher, inputs), by_hand)


@pytest.mark.parametrize("pooling", ["mean", "cls", "pooler", "none"])
def test_embedding_is_pooled_and_normalised(pooling: str) -> None:
    student, teacher = students("bert", "")
    loss = knowledge_loss(student, 2.0, pooling)
    name = loss.name
    assert name == f"embedding ({pooling})"
    inputs = batch("")
    s, t, valid = student(**inputs), teacher(**inputs), inputs["attention_mask"].bool()
    by_hand = []
    for i in range(5):
        a, b = (outputs.last_hidden_state[i][valid[i]] for outputs in (s, t))
        if pooling == "none":
            by_hand.append(squared_error(a, b).mean())
            continue
        if pooling == "mean":
            a, b = a.mean(0), b.mean(0)
        else:
            a, b = (a[0], b[0]) if pooling == "cls" else (s.pooler_output[i], t.pooler_output[i])
        by_hand.append(2 - 2 * torch.cosine_similarity(a, b, dim=0))  # of vectors of length 1
    torch.testing.assert_close(losses(loss, student, teacher, inputs), torch.stack(by_hand))


def test_normalised_embeddings_have_no_scale_and_hidden_states_do() -> None:
    hidden = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    valid = torch.ones(2, 4).bool()
    one, three = (BaseModelOutput(last_hidden_state=hidden * factor) for factor in (1, 3))
    assert of_embeddings(2.0, three, one, valid, "mean").max() < 1e-10
    pooled, other = ModelOutput(pooler_output=hidden[:, 0]), ModelOutput(pooler_output=hidden[:, 1])
    for pooling in ("mean", "cls", "pooler", "none"):  # there is nothing else to compare
        assert of_embeddings(2.0, pooled, pooled, valid, pooling).max() < 1e-10
        assert of_embeddings(2.0, pooled, other, valid, pooling).min() > 1e-3
    torch.testing.assert_close(
        of_embeddings(2.0, three, one, valid, "none"), (4 * hidden.square()).mean((1, 2))
    )


def test_a_subclass_has_the_head_of_its_parent() -> None:
    class Mine(classes("bert")["QUESTION_ANSWERING"]):  # type: ignore[misc]
        pass

    assert knowledge_loss(Mine(shallow().config), 2.0, "mean").name == "extractive question answering"


def test_what_an_unknown_head_reads_is_compared_and_that_is_said() -> None:
    class Odd(BertPreTrainedModel):
        def __init__(self, config: Any):
            super().__init__(config)
            self.bert = BertModel(config)
            self.post_init()

    model = Odd(shallow().config)
    with pytest.warns(
        UserWarning,
        match=r"head of Odd, so what is preserved are the hidden states above encoder.layer, .*pass compute_loss",
    ):
        loss = knowledge_loss(model, 2.0, "mean", sublayers=find_sublayers(model))
    assert loss.name == "hidden states"
    teacher = torch.tensor(
        [[[3.0, 4.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]]
    )  # the second token is padding
    student = teacher + torch.tensor([[[0.0, 1.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, -1.0]]])
    distances = loss({"bert.encoder.layer": student}, {"bert.encoder.layer": teacher}, torch.ones(2, 2))
    torch.testing.assert_close(distances, torch.tensor([1 / 25, 2 / 2]))


def test_a_model_without_a_head_is_said_to_have_none() -> None:
    model = make("align_text_model")
    with pytest.warns(
        UserWarning, match="^AlignTextModel has no head, so what is preserved are the hidden states"
    ):
        assert knowledge_loss(model, 2.0, "mean", sublayers=find_sublayers(model)).name == "hidden states"


DRAWN = [
    (
        "SEQUENCE_CLASSIFICATION",
        {"num_labels": 3, "problem_type": "single_label_classification"},
        {"logits": (1, 3)},
    ),
    (
        "SEQUENCE_CLASSIFICATION",
        {"num_labels": 3, "problem_type": "multi_label_classification"},
        {"logits": (1, 3)},
    ),
    ("SEQUENCE_CLASSIFICATION", {"num_labels": 2, "problem_type": "regression"}, {"logits": (1, 2)}),
    ("TOKEN_CLASSIFICATION", {}, {"logits": (1, 4, 3)}),
    ("QUESTION_ANSWERING", {}, {"start_logits": (1, 4), "end_logits": (1, 4)}),
    ("", {}, {"last_hidden_state": (1, 4, 3)}),
]


@pytest.mark.parametrize(("head", "config", "shapes"), DRAWN)
def test_gradients_against_draws_have_the_loss_for_a_curvature(
    head: str, config: dict[str, Any], shapes: dict[str, tuple[int, ...]]
) -> None:
    """The Fisher information: the mean of g g^T is, but for a factor, the Hessian of the loss where both are the same."""
    loss = knowledge_loss(shallow("bert", head, **config), 2.0, "mean")
    generator = torch.Generator().manual_seed(0)
    point = torch.cat(
        [torch.randn(math.prod(s), generator=generator, dtype=torch.float64) for s in shapes.values()]
    )
    valid = torch.tensor([[True, True, True, False]])

    def outputs(flat: Tensor) -> ModelOutput:
        """Of so many samples as there are rows."""
        parts = flat.split([math.prod(s) for s in shapes.values()], 1)
        return ModelOutput(
            {key: part.reshape(-1, *s[1:]) for (key, s), part in zip(shapes.items(), parts, strict=True)}
        )

    curvature = torch.autograd.functional.hessian(
        lambda x: loss(outputs(x[None]), outputs(point[None]), valid).sum(), point
    )
    count = 2000
    variable, every = point.repeat(count, 1).requires_grad_(), valid.repeat(count, 1)
    predicted = outputs(variable)
    draw = loss.draw(predicted, loss.noise(predicted, Draws(0, list(range(count)), every)), every)
    (gradients,) = torch.autograd.grad(loss(predicted, draw, every).sum(), variable)
    information, mean = gradients.T @ gradients / count, gradients.mean(0)
    if head in ("", "TOKEN_CLASSIFICATION"):  # the factor differs: one draw for all tokens, or one for each
        pairs = [(information.diagonal(), curvature.diagonal())]
    else:
        pairs = [(information, curvature)]
    for estimate, expected in pairs:
        assert float(torch.cosine_similarity(estimate.flatten(), expected.flatten(), 0)) > 0.98
    assert float(mean.norm()) < 0.1 * float(information.trace().sqrt())


def test_draws_belong_to_rows_and_tokens() -> None:
    """Whatever batch a row is in, on whichever side it is padded."""
    alone = Draws(3, [7], torch.ones(1, 5, dtype=torch.bool))
    valid = torch.zeros(2, 8, dtype=torch.bool)
    valid[0, :6], valid[1, 3:] = True, True
    beside = Draws(3, [2, 7], valid)
    torch.testing.assert_close(alone.uniform_of_tokens()[0], beside.uniform_of_tokens()[1, 3:])
    torch.testing.assert_close(alone.normal(1, 4)[0], beside.normal(2, 4)[1])
    torch.testing.assert_close(alone.uniform(1)[0], beside.uniform(2)[1])


LABELS = [
    ([0, 1, 1], 3, "multi-label classification", "such as .0, 1, 1.: .* as multi_label_classification"),
    ([1.0, 0.0, 0.0], 3, "multi-label classification", "as multi_label_classification"),
    (torch.tensor([True, False, True]), 3, "multi-label classification", "as multi_label_classification"),
    (["toxic", "rude"], 3, "multi-label classification", "as multi_label_classification"),
    ([0.3, 2.5], 2, "regression", "as regression"),
    (None, 3, "classification", "3 labels are compared as classes of which one is right"),
]


@pytest.mark.parametrize(("label", "count", "expected", "warning"), LABELS)
def test_a_missing_problem_type_is_read_from_the_labels_and_said(
    label: Any, count: int, expected: str, warning: str
) -> None:
    data = [{**row, **({} if label is None else {"labels": label})} for row in rows(30)]
    model = shallow(num_labels=count)
    with pytest.warns(UserWarning, match=warning) as caught:
        report = KPrunePruner(model, KPruneArguments(**QUICK), data, collate_without_labels).prune()
    assert "model.config.problem_type" in str(caught[0].message)
    assert report.knowledge == expected


@pytest.mark.parametrize(
    ("label", "config"), [(2, {}), ("LABEL_1", {}), ([0, 1, 0], {"problem_type": "regression"}), (None, {})]
)
def test_what_is_known_of_labels_needs_no_warning(label: Any, config: dict[str, Any]) -> None:
    """A class for each row, or a config that says it, or two labels."""
    data = [{**row, **({} if label is None else {"labels": label})} for row in rows(30)]
    model = shallow(num_labels=2 if label is None else 3, **config)
    report = KPrunePruner(model, KPruneArguments(**QUICK), data, collate_without_labels).prune()
    assert report.knowledge == ("regression" if config else "classification")
    assert report.compared == ["logits"]
    assert report.ignored == []


@pytest.mark.parametrize(
    ("head", "config", "message"),
    [
        (
            "SEQUENCE_CLASSIFICATION",
            {"num_labels": 1, "problem_type": "single_label_classification"},
            "num_labels is 1, of which",
        ),
        (
            "SEQUENCE_CLASSIFICATION",
            {"num_labels": 3, "problem_type": "ordinal"},
            "'ordinal', expected None or one of regression",
        ),
        ("TOKEN_CLASSIFICATION", {"num_labels": 1}, "does not depend on the outputs .logits."),
    ],
)
def test_heads_with_nothing_to_preserve_are_refused_before_any_work(
    head: str, config: dict[str, Any], message: str
) -> None:
    model = shallow("bert", head, num_labels=config["num_labels"])
    model.config.problem_type = config.get("problem_type")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ArgumentError, match=message):
        KPrunePruner(model, KPruneArguments(**QUICK), rows(30), collate).prune()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def squares(student: Any, teacher: Any) -> Tensor:
    losses: Tensor = (student.logits - teacher.logits).square().sum(1)
    return losses


LOSSES = [
    (
        lambda s, t, v: squares(s, t).detach(),
        r"compute_loss returned numbers without a graph, .*leave out torch.no_grad\(\)",
    ),
    (torch.no_grad()(lambda s, t, v: squares(s, t)), "without a graph"),
    (lambda s, t, v: torch.from_numpy(squares(s, t).detach().numpy()), "without a graph"),
    (lambda s, t, v: squares(s, t).long(), "returned numbers of torch.int64"),
    (lambda s, t, v: squares(s, t) > 0, "returned numbers of torch.bool"),
    (lambda s, t, v: squares(s, t).mean(), r"gave \(\) for 15 samples, expected one number each"),
    (lambda s, t, v: squares(s, t).unsqueeze(1), r"gave \(15, 1\) for 15 samples"),
    (lambda s, t, v: squares(s, t).tolist(), "returned a list"),
    (lambda s, t, v: float(squares(s, t).sum().detach()), "returned a float"),
    (lambda s, t, v: None, "returned a NoneType"),
    (lambda s, t, v: squares(s, t) * math.nan, r"returned \[nan, nan.*\], expected finite"),
    (lambda s, t, v: squares(s, t) / 0, "returned .inf, inf"),
    (lambda s, t, v: (squares(s, t) * 0).sqrt(), "gradient of compute_loss to logits is NaN or infinite"),
]


@pytest.mark.parametrize(("compute_loss", "message"), LOSSES)
def test_a_loss_of_the_callers_that_cannot_be_used_is_refused_before_any_work(
    compute_loss: Any, message: str
) -> None:
    model = shallow()
    pruner = KPrunePruner(model, KPruneArguments(**QUICK), rows(30), collate, compute_loss=compute_loss)
    with pytest.raises(ArgumentError, match=message):
        pruner.prune()


class TwoHeads(BertPreTrainedModel):
    """With an answer beside the one that its loss is about."""

    def __init__(self, config: Any):
        super().__init__(config)
        self.bert = BertModel(config)
        self.first, self.second = (torch.nn.Linear(config.hidden_size, 3) for _ in range(2))
        self.post_init()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, return_dict: bool = True
    ) -> ModelOutput:
        pooled = self.bert(input_ids, attention_mask).pooler_output
        return ModelOutput(logits=self.first(pooled), mood_logits=self.second(pooled))


def test_a_second_head_that_the_loss_does_not_read_is_named() -> None:
    """In a warning and in the report; a loss that reads both is silent."""
    torch.manual_seed(0)
    model = TwoHeads(shallow().config)

    def both(student: Any, teacher: Any, valid: Tensor) -> Tensor:
        moods: Tensor = (student.mood_logits - teacher.mood_logits).square().sum(1)
        return squares(student, teacher) + moods

    one = KPrunePruner(
        model, KPruneArguments(**QUICK), rows(30), collate, compute_loss=lambda s, t, v: squares(s, t)
    )
    with pytest.warns(
        UserWarning, match=r"\(custom\) compares logits of TwoHeads and ignores mood_logits.*count them in"
    ):
        report = one.plan()
    assert (report.compared, report.ignored) == (["logits"], ["mood_logits"])
    report = KPrunePruner(model, KPruneArguments(**QUICK), rows(30), collate, compute_loss=both).plan()
    assert (report.compared, report.ignored) == (["logits", "mood_logits"], [])
    assert PruningReport.from_json(report.to_json()).compared == report.compared
    assert "logits, mood_logits" in str(report)


def test_hidden_states_that_were_asked_for_are_named() -> None:
    model = shallow()
    model.config.output_hidden_states = True
    with pytest.warns(UserWarning, match="ignores hidden_states"):
        report = KPrunePruner(model, KPruneArguments(**QUICK), rows(30), collate).plan()
    assert report.ignored == ["hidden_states"]


@pytest.mark.parametrize(
    ("head", "read", "ignored"),
    [
        ("", ["last_hidden_state"], ["pooler_output"]),
        ("PRETRAINING", ["prediction_logits", "seq_relationship_logits"], []),
        ("QUESTION_ANSWERING", ["start_logits", "end_logits"], []),
        ("MASKED_LM", ["logits"], []),
    ],
)
def test_what_the_loss_is_made_of_is_in_the_report(head: str, read: list[str], ignored: list[str]) -> None:
    report = KPrunePruner(shallow("bert", head), KPruneArguments(**QUICK), rows(30), collate).plan()
    assert (report.compared, report.ignored) == (read, ignored)


def test_a_head_that_answers_by_other_tokens_than_the_layers_give_is_refused() -> None:
    """As where the decoder of a model is left alone, and its encoder reads more."""
    loss = Knowledge("of tokens", partial(of_tokens, 1.0), 1.0, {"logits": CLASS}, per_token=True)
    valid = torch.ones(2, 9, dtype=torch.bool)
    outputs = ModelOutput(logits=torch.randn(2, 7, 5))
    with pytest.raises(
        ArgumentError, match=r"logits of shape \(2, 7, 5\), and the last layers .* begin with 9 tokens"
    ):
        check_loss(loss, outputs, valid, Draws(0, [0, 1], valid), 2)
    same = ModelOutput(logits=torch.randn(2, 9, 5))
    assert check_loss(loss, same, valid, Draws(0, [0, 1], valid), 2) == (["logits"], [])
