"""Carrying a model upwards one sublayer at a time == running it whole; and nothing is left on it afterwards."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from checks import masked
from data import collate, rows
from models import EVERY_HEAD, EVERY_TYPE, tiny
from torch import Tensor, nn
from transformers import PreTrainedModel
from zoo import ZOO, inputs_for, make, outputs_of

from hf_kprune import UnsupportedArchitectureError
from hf_kprune.structure.families import FAMILIES
from hf_kprune.structure.hooks import State, resumed
from hf_kprune.structure.probes import probed
from hf_kprune.structure.runs import run_above, run_sublayer, run_to_top
from hf_kprune.structure.sublayers import Sublayer, find_sublayers
from hf_kprune.structure.surgery import cut, with_table_per_layer, write_plan


def batch(head: str = "") -> dict[str, Tensor]:
    return collate(rows(5, choices=3 if head == "MULTIPLE_CHOICE" else 0))


def pruned(model: PreTrainedModel, empty: int | None = None) -> PreTrainedModel:
    """A cut copy: every second unit is gone, and all of one sublayer."""
    student = copy.deepcopy(model)
    sublayers = find_sublayers(student)
    for i, sublayer in enumerate(sublayers):
        cut(sublayer, torch.arange(sublayer.num_units) % 2 == (i % 2 if i != empty else 2))
    write_plan(sublayers)
    return student


def floats(outputs: Any) -> list[Tensor]:
    return [v for v in outputs.to_tuple() if isinstance(v, Tensor) and v.is_floating_point()]


def traces(model: nn.Module) -> list[Any]:
    """All that a context could leave on a model."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    found: list[Any] = []
    for name, module in model.named_modules():
        found += [(name, kind, list(getattr(module, kind).values())) for kind in kinds]
        found += [(name, "forward", module.__dict__.get("forward")), (name, "training", module.training)]
    return found + [(name, p.requires_grad, p.grad) for name, p in model.named_parameters()]


@contextmanager
def counted(modules: list[nn.Module]) -> Iterator[list[nn.Module]]:
    """Collect which of these modules are called."""
    called: list[nn.Module] = []
    handles = [m.register_forward_hook(lambda m, *_: called.append(m)) for m in modules]
    yield called
    for handle in handles:
        handle.remove()


def check_walk(model: PreTrainedModel, head: str) -> None:
    """Walk up all sublayers; at each, what is above resumed from the stream == the whole model."""
    sublayers, inputs = find_sublayers(model), batch(head)
    with torch.no_grad():
        expected = floats(model(**inputs))
        last = model.base_model(**{k: v.flatten(0, -2) for k, v in inputs.items()}).last_hidden_state
        stream = State()
        for position in range(len(sublayers) + 1):
            with resumed(sublayers, position, stream):
                outputs = floats(model(**inputs))
            assert len(outputs) == len(expected)
            for value, wanted in zip(outputs, expected, strict=True):
                torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-5)
            if position < len(sublayers):
                stream = run_sublayer(model, inputs, sublayers, position, stream).above
    for state in (stream, run_to_top(model, inputs, sublayers)):
        (top,) = state.inputs.values()
        torch.testing.assert_close(top, last, rtol=1e-5, atol=1e-5)
        assert not state.outputs
    with resumed(sublayers, 3, State()), torch.no_grad():  # nothing was carried: the whole model
        assert all(torch.equal(a, b) for a, b in zip(floats(model(**inputs)), expected, strict=True))


@pytest.mark.parametrize(("model_type", "head"), EVERY_HEAD)
def test_walking_up_is_running_the_model(model_type: str, head: str) -> None:
    check_walk(tiny(model_type, head), head)


@pytest.mark.parametrize("model_type", EVERY_TYPE)
@pytest.mark.parametrize("empty", [0, 1, 4, 5])
def test_walking_up_a_pruned_model_is_running_it(model_type: str, empty: int) -> None:
    check_walk(pruned(tiny(model_type), empty), "SEQUENCE_CLASSIFICATION")


@pytest.mark.parametrize("model_type", EVERY_TYPE)
@pytest.mark.parametrize("empty", [None, 0, 3])
def test_a_tap_tells_what_the_sublayer_did(model_type: str, empty: int | None) -> None:
    """Features, output and residual input are those that hooks see in a whole forward pass."""
    model = pruned(tiny(model_type), empty)
    sublayers, inputs = find_sublayers(model), batch()
    outputs: dict[int, Tensor] = {}
    streams: dict[int, Tensor] = {}
    with ExitStack() as stack, torch.no_grad():
        for i, s in enumerate(sublayers):
            hook = s.output.register_forward_pre_hook(lambda _, args, i=i: outputs.__setitem__(i, args[0]))
            stack.callback(hook.remove)
            assert s.block.stream is not None
            reader = s.layer.get_submodule(s.block.stream)
            hook = reader.register_forward_pre_hook(
                lambda _, args, kwargs, i=i: streams.__setitem__(
                    i, args[0] if args else kwargs["hidden_states"]
                ),
                with_kwargs=True,
            )
            stack.callback(hook.remove)
        model(**inputs)
    below = State()
    for i, sublayer in enumerate(sublayers):
        tap = run_sublayer(model, inputs, sublayers, i, below)
        torch.testing.assert_close(tap.features, outputs[i], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(tap.stream, streams[i], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(tap.output, sublayer.output(outputs[i]), rtol=1e-5, atol=1e-5)
        below = tap.above


@pytest.mark.parametrize("model_type", EVERY_TYPE)
def test_nothing_below_is_computed_again(model_type: str) -> None:
    model = tiny(model_type)
    sublayers, inputs = find_sublayers(model), batch()
    stream = State()
    for position, sublayer in enumerate(sublayers):
        insides = [[s.layer.get_submodule(path) for path in s.block.inputs] for s in sublayers]
        with counted(sum(insides, [])) as called:
            above = run_sublayer(model, inputs, sublayers, position, stream).above
            assert called, "the counter sees nothing"
            assert {id(m) for m in called} == {id(m) for m in insides[position]}, (
                f"{sublayer.name} is not all that ran"
            )
            called.clear()
            with resumed(sublayers, position, stream), torch.no_grad():
                model(**inputs)
            assert [id(m) for m in called] == [id(m) for part in insides[position:] for m in part]
        stream = above
    with counted(sum(insides, [])) as called, resumed(sublayers, len(sublayers), stream), torch.no_grad():
        model(**inputs)
    assert not called


def test_what_stops_a_pass_stops_it_early() -> None:
    """No pass that does not need the head reaches it."""
    model = tiny()
    sublayers, inputs = find_sublayers(model), batch()
    above = [model.classifier, model.bert.pooler]
    with counted([*above, *(s.layer for s in sublayers)]) as called:
        state = run_sublayer(model, inputs, sublayers, 0, State()).above
        run_sublayer(model, inputs, sublayers, 1, state)
        run_to_top(model, inputs, sublayers)
    assert not {id(m) for m in above} & {id(m) for m in called}


def test_masks_of_ones_change_nothing_and_gradients_of_features_are_those_of_masks() -> None:
    model, inputs = tiny(), batch()
    model.requires_grad_(False)
    sublayers = find_sublayers(model)
    masks = [torch.ones(s.weight.shape[1], requires_grad=True) for s in sublayers]
    with masked(sublayers, masks):
        by_mask = torch.autograd.grad(model(**inputs).logits.square().sum(), masks)
    with probed(sublayers) as each_time:
        logits = model(**inputs).logits
    torch.testing.assert_close(logits, model(**inputs).logits)
    features = {place: tensor for place, (tensor,) in each_time.items()}
    by_feature = torch.autograd.grad(logits.square().sum(), list(features.values()))
    assert list(features) == list(range(len(sublayers)))
    for mask, a, gradient in zip(by_mask, features.values(), by_feature, strict=True):
        torch.testing.assert_close(torch.einsum("btc,btc->c", a, gradient), mask, rtol=1e-4, atol=1e-4)


def test_probing_without_gradients_builds_no_graph() -> None:
    model = tiny()
    with torch.no_grad(), probed(find_sublayers(model)) as features:
        assert not model(**batch()).logits.requires_grad
    assert not any(f.requires_grad for (f,) in features.values())


def below(sublayers: list[Sublayer]) -> State:
    """Some state below the second FFN."""
    return State(
        {sublayers[3].stack_name: torch.zeros(5, 12, 16)}, {sublayers[2].name: torch.zeros(5, 12, 16)}
    )


Use = Callable[[PreTrainedModel, list[Sublayer], dict[str, Tensor]], Any]


def use_resumed(model: PreTrainedModel, sublayers: list[Sublayer], inputs: dict[str, Tensor]) -> None:
    with resumed(sublayers, 3, below(sublayers)):
        model(**inputs)


def use_probed(model: PreTrainedModel, sublayers: list[Sublayer], inputs: dict[str, Tensor]) -> None:
    with probed(sublayers):
        model(**inputs)


def use_masked(model: PreTrainedModel, sublayers: list[Sublayer], inputs: dict[str, Tensor]) -> None:
    with masked(sublayers, [torch.zeros(1)] * len(sublayers)):
        model(**inputs)


USES: dict[str, Use] = {
    "run_sublayer": lambda model, sublayers, inputs: run_sublayer(
        model, inputs, sublayers, 3, below(sublayers)
    ),
    "run_to_top": lambda model, sublayers, inputs: run_to_top(model, inputs, sublayers),
    "resumed": use_resumed,
    "probed": use_probed,
    "masked": use_masked,
}


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "mpnet"])
@pytest.mark.parametrize("use", USES)
def test_nothing_is_left_on_the_model_also_after_an_error(model_type: str, use: str) -> None:
    model = pruned(tiny(model_type), 2)
    sublayers, inputs = find_sublayers(model), batch()
    before, expected = traces(model), model(**inputs).logits
    assert inputs["input_ids"].shape == (5, 12)
    USES[use](model, sublayers, inputs)
    assert traces(model) == before

    def fail(*_: Any) -> None:
        raise RuntimeError("in the middle")

    hook = sublayers[3].output.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        USES[use](model, sublayers, inputs)
    hook.remove()
    assert traces(model) == before
    assert torch.equal(model(**inputs).logits, expected)


def test_a_forward_that_was_already_replaced_is_put_back() -> None:
    """As accelerate and others do: an attribute on the instance."""
    model, inputs = tiny(), batch()
    sublayers = find_sublayers(model)
    core = sublayers[2].layer.get_submodule("attention.self")
    original = core.forward
    core.forward = replaced = lambda *args, **kwargs: original(*args, **kwargs)
    run_sublayer(model, inputs, sublayers, 3, below(sublayers))
    assert core.__dict__["forward"] is replaced


def test_a_sublayer_that_never_runs_is_an_error() -> None:
    model, inputs = tiny(), batch()
    sublayers = find_sublayers(model)
    model.bert.encoder.layer = model.bert.encoder.layer[:1]
    with pytest.raises(
        UnsupportedArchitectureError,
        match="BertForSequenceClassification does not reach on inputs of",
    ):
        run_sublayer(model, inputs, sublayers, 4, State())


def test_what_a_layer_reads_above_layers_without_sublayers_is_what_they_give() -> None:
    """As where convolutions come first in a list of layers."""
    model, inputs = tiny(), batch()
    sublayers = find_sublayers(model)[2:]
    tap = run_sublayer(model, inputs, sublayers, 0, State())
    above = run_above(model, inputs, sublayers, 0, State(), tap.entry)
    assert above.inputs.keys() == tap.above.inputs.keys()
    for name, tensor in above.inputs.items():
        assert torch.equal(tensor, tap.above.inputs[name])


def test_inputs_that_do_not_run_a_tower_are_named() -> None:
    model = make("clip")
    texts = {k: v for k, v in inputs_for(model, ZOO["clip"][2]).items() if k != "pixel_values"}
    model.forward = model.get_text_features
    with pytest.raises(
        UnsupportedArchitectureError,
        match=r"CLIPModel does not run vision_model\.encoder\.layers to the end on inputs of input_ids",
    ):
        run_to_top(model, texts, find_sublayers(model))


@pytest.mark.parametrize(
    ("name", "declared"),
    [("gptj", "y"), ("bert", ("y", None)), ("bart", ("y",)), ("t5", "y"), ("llama", ("y", None, None))],
)
def test_layers_return_what_they_return_whatever_the_family_says(
    name: str, declared: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hidden states alone or in a tuple: in that, releases of transformers differ."""
    kind = ZOO[name][2]
    model = with_table_per_layer(make(name))
    expected, inputs = outputs_of(model, kind), inputs_for(model, kind)
    monkeypatch.setitem(FAMILIES, name, tuple(replace(stack, returns=declared) for stack in FAMILIES[name]))
    sublayers, state = find_sublayers(model), State()
    for position in range(len(sublayers) + 1):
        with resumed(sublayers, position, state):
            torch.testing.assert_close(outputs_of(model, kind), expected, rtol=2e-5, atol=2e-5)
        if position < len(sublayers):
            state = run_sublayer(model, inputs, sublayers, position, state).above
    with torch.no_grad():
        tops = run_to_top(model, inputs, sublayers)
    for stack, top in tops.inputs.items():
        torch.testing.assert_close(state.inputs[stack], top, rtol=2e-5, atol=2e-5)
