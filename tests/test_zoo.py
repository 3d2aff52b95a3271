"""Every family: masked == cut, carried == run, keep-all == dense, saved == loaded, pruned twice == pruned once.

    pytest -m "slow or not slow" tests/test_zoo.py tests/test_generation.py tests/test_uniform.py --table

prints which of them hold for which model type, and writes docs/supported_models.md.
"""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import by_column, masked, plans
from data import ROOT
from models import cut_all, slow_unless_in
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedModel
from zoo import DISTINCT, ZOO, inputs_for, make, outputs_of

from hf_kprune import UnsupportedModelError
from hf_kprune.modeling_kprune import tensors_of
from hf_kprune.structure.families import FAMILIES, PARTS, REFUSED
from hf_kprune.structure.hooks import State, resumed
from hf_kprune.structure.runs import run_sublayer, run_to_top
from hf_kprune.structure.sublayers import find_sublayers
from hf_kprune.structure.surgery import with_table_per_layer


Record = Callable[[str, object], None]
every = pytest.mark.parametrize("name", slow_unless_in(DISTINCT, ZOO))
PLANS = ("even", "odd", "without 0", "nothing")


def masked_outputs(model: PreTrainedModel, masks: list[Tensor], kind: str, by: str | None = None) -> Tensor:
    sublayers = find_sublayers(model, by)
    with masked(sublayers, by_column(sublayers, masks)):
        return outputs_of(model, kind)


def close(result: Tensor, expected: Tensor, why: str) -> None:
    scale = float(expected.abs().max().clamp(min=1))
    torch.testing.assert_close(result, expected, rtol=2e-5, atol=2e-5 * scale, msg=lambda m: f"{why}: {m}")


def check_cut_equals_masked(model: PreTrainedModel, kind: str, wanted: Sequence[str]) -> None:
    dense, every_plan = outputs_of(model, kind), plans(find_sublayers(model))
    for plan in wanted:
        masks = every_plan[plan]
        student = cut_all(model, masks)
        outputs = outputs_of(student, kind)
        close(outputs, masked_outputs(model, masks, kind), plan)
        moved = (outputs - dense).abs().max() > 1e-4
        assert moved or all(mask.all() for mask in masks), f"{plan}: cutting did nothing"
        assert [s.num_units for s in find_sublayers(student)] == [int(m.sum()) for m in masks]


def implementations(model: PreTrainedModel) -> list[str]:
    """What to set, the present one first, which some parts of a model (backbones of convolutions) may lack."""
    return list(dict.fromkeys([model.config._attn_implementation, "eager"]))


def set_implementation(model: PreTrainedModel, attention: str) -> None:
    if attention != model.config._attn_implementation:
        model.set_attn_implementation(attention)


@every
def test_cut_equals_masked(name: str, record_property: Record) -> None:
    """Each plan, and each implementation of attention."""
    record_property("family", (name, "masked == cut"))
    record_property("family", (name, "emptied"))
    model, kind = make(name), ZOO[name][2]
    ways = implementations(model)
    for attention, wanted in zip(ways, (PLANS[::2], PLANS[1::2]) if ways[1:] else (PLANS,), strict=True):
        set_implementation(model, attention)
        check_cut_equals_masked(model, kind, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_each_sublayer_can_be_emptied(name: str, record_property: Record) -> None:
    record_property("family", (name, "emptied"))
    model = make(name)
    count = len(find_sublayers(model))
    check_cut_equals_masked(model, ZOO[name][2], [f"without {i}" for i in range(1, count)])


def attentions_of(model: PreTrainedModel, kind: str) -> dict[str, list[Tensor | None]]:
    """Attention weights, layer by layer, of each of the stacks of a model, by their names in its output."""
    with torch.no_grad():
        output = model(**inputs_for(model, kind), output_attentions=True)
    towers = [entry for entry in output.values() if hasattr(entry, "keys")]
    return {
        f"{number} {name}": list(value)
        for number, tower in enumerate([output, *towers])
        for name, value in tower.items()
        if name.endswith("attentions") and value is not None
    }


@pytest.mark.parametrize(
    ("name", "hooked"),
    slow_unless_in(
        [*((name, False) for name in DISTINCT), ("bert", True), ("t5", True)],
        [*((name, False) for name in ZOO), *((name, True) for name in DISTINCT)],
    ),
)
def test_an_emptied_attention_has_its_place_among_the_attention_weights(name: str, hooked: bool) -> None:
    """transformers hooks the modules that it collects weights from at the first time that it is asked for them."""
    if not any(s.unit.has_heads for s in find_sublayers(make(name))):
        pytest.skip("no attention that can be emptied")
    if name == "minimax":
        pytest.skip("what it gives beside attention weights are states of linear attention")
    model, kind = make(name), ZOO[name][2]
    for attention in implementations(model):
        set_implementation(model, attention)
        dense, model = attentions_of(model if hooked else copy.deepcopy(model), kind), copy.deepcopy(model)
        attentions = [s for s in find_sublayers(model) if s.unit.has_heads]
        lowest = {s.name for s in attentions if s.index == 0 and not s.name.endswith("_2")}
        emptied = {*lowest, attentions[-1].name}
        masks = [torch.full((s.num_units,), s.name not in emptied) for s in find_sublayers(model)]
        student = cut_all(model, masks)
        if name in ("led", "longformer"):
            with pytest.raises(
                NotImplementedError, match=r"output_attentions is True, but \w*SelfAttention cannot return"
            ):
                attentions_of(student, kind)
            continue
        pruned = attentions_of(student, kind)
        assert {stack: len(weights) for stack, weights in pruned.items()} == {
            s: len(w) for s, w in dense.items()
        }
        for stack, weights in pruned.items():
            usual = not (
                name in ("yoso", "longt5", "mvp:prompt", *PARTS) or None in dense[stack]
            )  # weights of (B, heads, T, keys), of attentions that do not stay
            for index, (some, before) in enumerate(zip(weights, dense[stack], strict=True)):
                if usual and lowest and before is not None and some is not None and index == 0:
                    assert some.shape == (len(before), 0, *before.shape[2:]), stack
                elif 0 < index < len(weights) - 1 and before is not None and not attentions[0].stack.runs:
                    assert some is not None
                    assert some.shape == before.shape, stack


@every
def test_a_query_head_of_every_group_is_a_unit_too(name: str, tmp_path: Path) -> None:
    model, kind = make(name), ZOO[name][2]
    sublayers = find_sublayers(model, "query")
    if not any(s.unit.strided for s in sublayers):
        pytest.skip("no grouped queries, or one key-value head, whose query heads are units anyway")
    for plan, masks in plans(sublayers).items():
        if plan in ("even", "odd", "without 0"):
            student = cut_all(model, masks, "query")
            close(outputs_of(student, kind), masked_outputs(model, masks, kind, "query"), plan)
            assert [s.num_units for s in find_sublayers(student)] == [int(m.sum()) for m in masks]
    student.save_pretrained(tmp_path)
    close(outputs_of(type(model).from_pretrained(tmp_path), kind), outputs_of(student, kind), "loaded")


@every
def test_carried_equals_run(name: str, record_property: Record) -> None:
    """Also of a pruned model, whose positions with nothing left are carried too."""
    record_property("family", (name, "carried"))
    kind, dense = ZOO[name][2], with_table_per_layer(make(name))
    for model in (dense, cut_all(dense, plans(find_sublayers(dense))["without ends"])):
        sublayers, inputs = find_sublayers(model), inputs_for(model, kind)
        expected, state = outputs_of(model, kind), State()
        for position in range(len(sublayers) + 1):
            with resumed(sublayers, position, state):
                close(outputs_of(model, kind), expected, f"resumed at {position}")
            if position < len(sublayers):
                tap = run_sublayer(model, inputs, sublayers, position, state)
                assert tap.features.shape[:-1] == tap.output.shape[:-1] == tap.stream.shape[:-1]
                state = tap.above
        with torch.no_grad():
            tops = run_to_top(model, inputs, sublayers)
        assert state.inputs.keys() == tops.inputs.keys()
        for stack, top in tops.inputs.items():
            close(state.inputs[stack], top, stack)


@every
def test_the_stream_is_what_the_output_joins(name: str, record_property: Record) -> None:
    """The stream of a tap plus its output is a sum that the model itself computes: some module takes or gives it, the next
    sublayer in a pre-norm layer, the norm in a post-norm one. Of sublayers side by side only the sum of all is, and of
    experts not where shared ones lie beside them, whose output is scaled.
    """
    record_property("family", (name, "stream"))
    kind, model = ZOO[name][2], with_table_per_layer(make(name))
    sublayers, inputs = find_sublayers(model), inputs_for(model, kind)
    state = State()
    for position, sublayer in enumerate(sublayers):
        tap = run_sublayer(model, inputs, sublayers, position, state)
        beside = sublayer.stack.parallel and any(s.layer is sublayer.layer for s in sublayers[position + 1 :])
        shared = {"experts", "ffn"} <= {s.kind for s in sublayers if s.layer is sublayer.layer}
        shared = shared or "shared_expert" in sublayer.block.output
        if sublayer.block.stream is not None and not (beside or shared):
            totals = ((tap.stream + tap.output) * sublayer.residual).chunk(sublayer.uses, 1)
            tensors: list[Tensor] = []
            hooks = [
                m.register_forward_hook(
                    lambda _, args, kwargs, out, tensors=tensors: tensors.extend(
                        t
                        for t in (*args, *kwargs.values(), *(out if isinstance(out, tuple) else (out,)))
                        if isinstance(t, Tensor)
                    ),
                    with_kwargs=True,
                )
                for m in sublayer.owner.modules()
            ]
            with torch.no_grad(), resumed(sublayers, position, state):
                model(**inputs)
            for hook in hooks:
                hook.remove()
            for total in totals:
                parts = (t for t in tensors if t.numel() == total.numel() and t.is_floating_point())
                assert any(torch.allclose(t.reshape_as(total), total, rtol=1e-4, atol=1e-4) for t in parts), (
                    f"{sublayer.name}: no such sum"
                )
        state = tap.above


@every
def test_keeping_all_changes_nothing(name: str, record_property: Record) -> None:
    record_property("family", (name, "keep-all"))
    model, kind = make(name), ZOO[name][2]
    student = cut_all(model, [torch.ones(s.num_units).bool() for s in find_sublayers(model)])
    assert student.config.to_dict() == model.config.to_dict()
    assert student.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(outputs_of(student, kind), outputs_of(model, kind))


def saved_and_loaded(student: PreTrainedModel, kind: str, folder: Path) -> PreTrainedModel:
    """The model again, from its checkpoint, once it is sure that it is the same and holds no tensor without elements."""
    student.save_pretrained(folder)
    assert all(
        0 not in shape for file in folder.glob("*.safetensors") for _, *shape in tensors_of(file).values()
    )
    again = type(student).from_pretrained(folder).eval()
    state = again.state_dict()
    assert state.keys() == student.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in student.state_dict().items())
    close(outputs_of(again, kind), outputs_of(student, kind), folder.name)
    return again


@every
def test_saved_equals_loaded_and_pruned_twice_equals_pruned_once(
    name: str, tmp_path: Path, record_property: Record
) -> None:
    record_property("family", (name, "saved == loaded"))
    record_property("family", (name, "re-prune"))
    model, kind = make(name), ZOO[name][2]
    sublayers = find_sublayers(model)
    for plan in ("without ends", "nothing"):
        saved_and_loaded(cut_all(model, plans(sublayers)[plan]), kind, tmp_path / plan)
    first = [(s.numbers % 4 != i % 4) | (s.num_units == 1) for i, s in enumerate(sublayers)]
    halfway = saved_and_loaded(cut_all(model, first), kind, tmp_path / "first")
    second = [s.numbers % 2 == 1 for s in find_sublayers(halfway)]
    both = [m.clone().masked_scatter(m, s) for m, s in zip(first, second, strict=True)]
    twice, once = cut_all(halfway, second), cut_all(model, both)
    close(outputs_of(twice, kind), outputs_of(once, kind), "twice")
    plan_twice, plan_once = (copy.deepcopy(getattr(m.config, "kprune", None)) for m in (twice, once))
    assert plan_twice == plan_once


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> dict[str, Any]:
    """What models of the zoo give in a process without hf_kprune, loaded from their checkpoints with trust_remote_code."""
    wanted = {
        str(item.callspec.params["name"])
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.name.startswith("test_loaded_elsewhere")
    }
    folder, tasks = tmp_path_factory.mktemp("elsewhere"), {}
    for name in wanted:
        model, kind = make(name), ZOO[name][2]
        student = cut_all(model, plans(find_sublayers(model))["without 0"])
        path = folder / name.replace(":", "_")
        student.save_pretrained(path)
        tasks[name] = {
            "path": str(path),
            "class": type(model).__name__,
            "kind": kind,
            "expected": outputs_of(student, kind),
        }
    torch.save(tasks, folder / "tasks.pt")
    subprocess.run([sys.executable, Path(__file__).with_name("zoo_elsewhere.py"), folder], check=True)
    results: dict[str, Any] = torch.load(folder / "results.pt")
    return results


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_loaded_elsewhere_with_the_code_it_brings(
    name: str, elsewhere: dict[str, Any], record_property: Record
) -> None:
    record_property("family", (name, "remote code"))
    if elsewhere[name] == "no Auto class has it":
        pytest.skip(f"{ZOO[name][0]} is in no Auto table of transformers")
    assert elsewhere[name] == ""


@pytest.mark.parametrize("model_type", sorted(REFUSED))
def test_refused_with_the_reason(model_type: str, record_property: Record) -> None:
    record_property("refused", (model_type, REFUSED[model_type]))
    model: Any = type(
        "Model", (), {"config": AutoConfig.for_model(model_type), "named_modules": lambda self: []}
    )()
    with pytest.raises(UnsupportedModelError, match=model_type):
        find_sublayers(model)


def test_counts_and_rows_of_the_table_are_those_of_the_zoo_and_the_readme() -> None:
    page = (ROOT / "docs" / "supported_models.md").read_text(encoding="utf-8")
    rows = set(re.findall(r"^\| ([\w:.-]+) \| yes", page, re.MULTILINE))
    assert set(ZOO) <= rows  # a later version of transformers has more
    lines = [line for line in page.splitlines() if line]
    assert sorted(lines) == sorted(set(lines))
    types = {name.split(":")[0] for name in rows}
    assert f"\n{len(rows)} of {len(rows)} green, {len(types)} model types.\n" in page
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"(\d+) model types", readme) == [str(len(types))]
    for name, why in REFUSED.items():
        assert f"| {name} | {why} |" in page


@pytest.mark.slow
def test_every_family_is_in_the_zoo() -> None:
    inside = {inner for name in ZOO for inner in inner_types(name)}
    inside.add("maskformer-swin")  # as MaskFormer's Swin is called once it was saved and loaded
    assert {model_type for model_type in FAMILIES if model_type in CONFIG_MAPPING} <= inside


def inner_types(name: str) -> set[str]:
    """Model types of the models in a model of the zoo."""
    return {m.config.model_type for m in make(name).modules() if isinstance(m, PreTrainedModel)}
