"""Layers that run several times with one set of weights: costs, measurements and fits are those of all runs."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from checks import calibration, kept
from data import collate, rows
from torch import Tensor
from transformers import AlbertConfig, AlbertForSequenceClassification
from zoo import ENCODER, make

from hf_kprune import KPruneArguments, KPrunePruner
from hf_kprune.calibration.equations import Reference, input_equations, normal_equations
from hf_kprune.calibration.measure import measure_dense
from hf_kprune.run import Run
from hf_kprune.sizes import model_size, prunable_flops
from hf_kprune.structure.sublayers import find_sublayers
from hf_kprune.structure.walk import Walk


def albert(**config: Any) -> AlbertForSequenceClassification:
    torch.manual_seed(0)
    return AlbertForSequenceClassification(AlbertConfig(**ENCODER | {"embedding_size": 8, **config})).eval()


def prune(model: Any, **options: Any) -> KPrunePruner:
    options = {"sparsity": 0.4, "num_tokens": 1_000, "disable_tqdm": True, "use_cpu": True, **options}
    pruner = KPrunePruner(model, KPruneArguments(**options), rows(60), collate)
    pruner.callback_handler.callbacks.clear()
    pruner.prune()
    return pruner


def test_computation_counts_once_for_each_run_and_weights_count_once() -> None:
    flops, parameters = [], []
    for runs in (1, 3):
        model = albert(num_hidden_layers=runs)
        sublayers = find_sublayers(model)
        flops.append(prunable_flops(sublayers, {s.stack_name: 7.0 for s in sublayers}))
        parameters.append(model_size(model, sublayers).prunable_parameters)
    assert flops[1] == 3 * flops[0]
    assert parameters[0] == parameters[1]


def test_runs_are_spread_over_groups_as_the_model_does() -> None:
    """Five runs of two groups: three of the lower one."""
    sublayers = find_sublayers(albert(num_hidden_layers=5, num_hidden_groups=2))
    assert [(s.index, s.uses) for s in sublayers] == [(0, 3), (0, 3), (1, 2), (1, 2)]


def of_one_run_each(model: AlbertForSequenceClassification) -> AlbertForSequenceClassification:
    """The same function by a model with a copy of the weights for each run."""
    config = AlbertConfig(**model.config.to_dict() | {"num_hidden_groups": model.config.num_hidden_layers})
    apart = AlbertForSequenceClassification(config).eval()
    state = model.state_dict()
    apart.load_state_dict({key: state[re.sub(r"groups\.\d+", "groups.0", key)] for key in apart.state_dict()})
    return apart


def test_what_is_measured_is_the_sum_over_runs() -> None:
    """Of moments of features and of Fisher information; gradients to a mask that all runs share add up first."""
    model, sides = albert(), []
    for each in (model, of_one_run_each(model)):
        pruner = KPrunePruner(
            each, KPruneArguments(num_tokens=300, disable_tqdm=True, use_cpu=True), rows(30), collate
        )
        with Run(pruner, None, [pruner.args]).open() as run:
            pruning = run.pruning
            walk = pruning.calibration.walk(pruning.teacher.requires_grad_(False), pruning.references)
            measured = measure_dense(
                pruning.calibration, walk, ("curvature",), pruning.loss, [1.0] * len(walk.sublayers)
            )
            sides.append(dict(measured))
    together, apart = sides
    for place in (0, 1):
        runs = [apart[position] for position in range(place, len(apart), 2)]
        for name in ("energy", "feature_sum", "gram", "weighted_sum", "total_weight", "metric"):
            total = sum(getattr(run, name) for run in runs)
            assert isinstance(total, Tensor)
            torch.testing.assert_close(
                getattr(together[place], name), total, rtol=1e-4, atol=1e-5 * float(total.abs().max())
            )
        assert together[place].tokens == sum(run.tokens for run in runs)


def test_weights_are_fitted_on_what_each_run_of_the_teacher_reads() -> None:
    """By hand: the layer of the student, called with that."""
    model = albert()
    data = calibration(model, rows(30))
    teacher, student = data.walk(copy.deepcopy(model)), data.walk(copy.deepcopy(model))
    for walk in (student, teacher):  # to the FFN, behind an attention that was cut
        if walk is student:
            walk.cut(walk.sublayer.numbers % 2 == 0)
        data.advance(walk)
    student.cut(student.sublayer.numbers % 3 != 0)
    gram, cross, shift = (torch.zeros(()).double() for _ in range(3))
    for batch in data.batches:
        mask = torch.zeros(batch.counted.shape).masked_fill(~batch.counted, -1e30)[:, None, None]
        for x, y in runs_of(teacher, batch.inputs):
            tap = features_of(student, x, mask)
            a, target = (t[batch.counted].double() for t in (tap["features"], y - tap["stream"]))
            gram, cross = gram + a.T @ a, cross + a.T @ target
            moved = (tap["stream"] - features_of(teacher, x, mask)["stream"])[batch.counted]
            shift = shift + moved.double().square().sum()
    reference, data.readers = Reference(teacher), [[], [["albert_layers.0.ffn"]]]
    ((_, inputs),) = input_equations(data, student, reference)
    (equations,) = normal_equations(data, student, reference)
    torch.testing.assert_close(equations.gram, gram, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(equations.cross, cross, rtol=1e-4, atol=1e-4)
    apart = inputs.gram.trace() + inputs.target_square - 2 * inputs.cross.trace()
    torch.testing.assert_close(apart, shift, rtol=1e-3, atol=1e-5)


def runs_of(walk: Walk, inputs: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
    """What the layer reads and what its FFN makes of the stream, before the norm, of each run."""
    read: list[Tensor] = []
    joined: list[Tensor] = []
    layer: Any = walk.sublayer.layer.get_submodule("albert_layers.0")
    hooks = [
        layer.register_forward_pre_hook(lambda _, args: read.append(args[0])),
        layer.full_layer_layer_norm.register_forward_pre_hook(lambda _, args: joined.append(args[0])),
    ]
    with torch.no_grad():
        walk.model(**inputs)
    for hook in hooks:
        hook.remove()
    return list(zip(read, joined, strict=True))


def features_of(walk: Walk, x: Tensor, mask: Tensor) -> dict[str, Tensor]:
    layer: Any = walk.sublayer.layer.get_submodule("albert_layers.0")
    with torch.no_grad():
        stream = layer.attention(x, mask)[0]
        return {"stream": stream, "features": layer.activation(layer.ffn(stream))}


@pytest.mark.slow
def test_tuning_brings_the_whole_nearer_and_batches_do_not_matter() -> None:
    model = make("albert")
    inputs = collate(rows(20, seed=3))
    distances = {}
    with torch.no_grad():
        hidden = model.albert(**inputs)[0]
        for tune in (False, True):
            result = prune(copy.deepcopy(model), tune=tune).model.albert(**inputs)[0]
            distances[tune] = float((result - hidden).square().mean())
    assert distances[True] < distances[False]
    one, other = (prune(copy.deepcopy(model), per_device_batch_size=size) for size in (4, 9))
    assert one.report is not None
    assert other.report is not None
    assert kept(one.report) == kept(other.report)
    for name, value in one.model.state_dict().items():
        torch.testing.assert_close(value, other.model.state_dict()[name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_stock_config_says_another_width_of_its_ffn(tmp_path: Any) -> None:
    result = prune(make("albert"), uniform=True, prune_heads=False, sparsity=0.15)
    result.save_model(tmp_path)
    again = AlbertForSequenceClassification.from_pretrained(tmp_path).eval()
    assert again.config.intermediate_size < ENCODER["intermediate_size"]
    assert not hasattr(again.config, "kprune")
    inputs = collate(rows(5))
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, result.model(**inputs).logits)
