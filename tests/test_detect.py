"""Detection: what it finds equals what is listed, what it must refuse it refuses, and it leaves no trace."""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from data import rows
from models import slow_unless_in
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    PatchTSTConfig,
    PatchTSTForRegression,
    PreTrainedConfig,
    PreTrainedModel,
    ViTMAEModel,
    XLNetModel,
)
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.modeling_outputs import BaseModelOutput
from zoo import DECODER, IMAGE, ZOO, inputs_for, make

import hf_kprune.structure.families
from hf_kprune import (
    Block,
    KPruneArguments,
    KPrunePruner,
    Stack,
    UnsupportedArchitectureError,
    UnsupportedModelError,
    register_family,
)
from hf_kprune.calibration.batch import BatchMaker
from hf_kprune.modeling_kprune import get_size
from hf_kprune.structure.configs import read
from hf_kprune.structure.coverage import untouched
from hf_kprune.structure.describe import describe
from hf_kprune.structure.descriptions import Detected, as_code, keep
from hf_kprune.structure.detect import NO_LAYERS, detect
from hf_kprune.structure.facts import example_inputs
from hf_kprune.structure.hooks import State
from hf_kprune.structure.layer_lists import outermost
from hf_kprune.structure.proof import implementations, prove, step, trial_masks
from hf_kprune.structure.reach import parts_left_alone
from hf_kprune.structure.runs import run_sublayer
from hf_kprune.structure.sublayers import find_sublayers
from hf_kprune.structure.surgery import cut_twin, twin


# ---------------------------------------------------------------------------------------------------------------------
# Detected == listed
# ---------------------------------------------------------------------------------------------------------------------

SAME = [
    "bert",
    "bloom",
    "cohere2",
    "falcon:alibi",
    "gemma2",
    "glm",
    "gpt2",
    "gpt_neo",
    "gpt_neox",
    "gptj",
    "llama",
    "llama:multi-query",
    "mpt",
    "opt",
    "opt:post-norm",
    "persimmon",
    "phi",
    "phi3",
    "qwen3",
    "stablelm:parallel",
    "xglm",
    "olmo2",
    "deberta-v2",
    "distilbert",
    "esm",
    "megatron-bert",
    "modernbert",
    "mpnet",
    "tapas",
    "bart",
    "m2m_100",
    "speech_to_text",
    "dinov2:swiglu",
    "dinov3_vit",
    "vit",
    "clip",
    "chinese_clip",
    "hubert",
]

FOUND = ["bloom", "phi3"]
"""By default: projections together and apart, and gated neurons."""

APART: dict[str, set[str]] = {
    "deberta-v2": {"inputs"},  # what positions ask is q or kv: of as many rows
    "dinov3_vit": {"name"},  # the same list, seen from the model or from what lies in it
    "phi3": {"heads"},  # that of its config's key-value heads too, which is not read
    "mpnet": {"returns"},  # one None more, which nobody reads
}
"""Where a description of the same thing may be another."""


def facts(model: PreTrainedModel, inputs: dict[str, Any]) -> list[dict[str, Any]]:
    """What matters of a description: what is cut and replaced, and the stream, by its values."""
    sublayers, state, told = find_sublayers(model), State(), []
    for position, s in enumerate(sublayers):
        tap = run_sublayer(model, inputs, sublayers, position, state)
        state = tap.above
        sizes = {path: n for path, n in s.plan["sizes"].items() if get_size(s.layer, path) is not None}
        told.append(
            {
                "name": (s.name, s.reads),
                "kind": (s.kind, s.unit, s.stack.mask),
                "inputs": {
                    p: layout for p, layout in s.block.inputs.items() if p in s.plan["rows"] or s.unit.strided
                },
                "returns": s.plan["returns"],
                "stream": (s.block.stream is None, tap.stream),
                "heads": {
                    p: n for p, n in sizes.items() if "head" in p.rpartition(".")[2] and "size" not in p
                },
                **{
                    key: s.plan[key]
                    for key in ("rows", "columns", "core", "select", "slices", "table", "of", "kept")
                },
            }
        )
    return told


@pytest.mark.parametrize("name", slow_unless_in(FOUND, SAME))
def test_detected_equals_listed(name: str) -> None:
    model = make(name)
    inputs = inputs_for(model, ZOO[name][2], batch=3)
    detected = keep(twin(model), detect(model, inputs))
    prove(detected, inputs)
    found, listed = facts(detected, inputs), facts(model, inputs)
    assert len(found) == len(listed)
    for ours, theirs in zip(found, listed, strict=True):
        for key in ours.keys() - APART.get(name, set()) - {"stream", "inputs"}:
            assert ours[key] == theirs[key], (ours["name"], key)
        if "inputs" not in APART.get(name, set()):
            assert ours["inputs"].items() <= theirs["inputs"].items()
        assert ours["stream"][0] == theirs["stream"][0], ours["name"]
        torch.testing.assert_close(
            ours["stream"][1], theirs["stream"][1], msg=partial("{}: {}".format, ours["name"])
        )


@pytest.mark.parametrize("name", slow_unless_in(("olmo2",), ("olmo2", "stablelm:qk-norm", "longformer")))
def test_heads_that_cannot_be_told_apart_stay_together(name: str) -> None:
    model = make(name)
    inputs = inputs_for(model, ZOO[name][2], batch=3)
    keep(model, detect(model, inputs))
    assert {s.num_units for s in find_sublayers(model) if s.kind == "attention"} == {1}
    assert all(
        s.block.obstacle == "its heads cannot be cut one by one"
        for s in find_sublayers(model)
        if s.kind != "ffn"
    )


REFUSALS = {
    "t5": "emptied, from number . on: encoder.block.1.attention is ",  # the table of positions that layer 0 holds for all
    "mt5": "emptied, from number . on: encoder.block.1.attention is ",
}

LEFT: dict[str, tuple[str, str]] = {
    "mixtral": ("mlp.experts.down_proj", "it is a weight of neither nn.Linear nor an attention"),
    "qwen2_moe": ("mlp.shared_expert_gate", "no attention and no FFN was seen that it opens or closes"),
    "siglip_vision_model": ("head.", "it is an attention that lies outside of all lists of layers"),
    "deberta": ("attention.self.in_proj", "no attributes of DebertaConfig tell a number of heads"),
    "deberta-v2:v3": ("attention.self.key_proj", "it runs more than once in a layer"),
}
"""What stays as it is where the rest is described, and why."""


@pytest.mark.parametrize("name", slow_unless_in(("mixtral", "deberta"), LEFT))
def test_what_cannot_be_described_stays_and_the_rest_is_proved(name: str) -> None:
    model = make(name)
    inputs = inputs_for(model, ZOO[name][2], batch=3)
    detected = detect(model, inputs)
    prove(keep(twin(model), detected), inputs)
    (stacks,) = detected.families.values()
    left, why = LEFT[name]
    reasons = dict(detected.rest)
    for stack in stacks:
        assert isinstance(stack.untouched, Mapping)
        reasons |= stack.untouched
    assert reasons[left].startswith(why)


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSALS)
def test_refused_with_the_reason(name: str) -> None:
    model = make(name)
    inputs = inputs_for(model, ZOO[name][2], batch=3)
    with pytest.raises(UnsupportedArchitectureError, match=REFUSALS[name]):
        prove(keep(twin(model), detect(model, inputs)), inputs)


@pytest.mark.slow
def test_random_patches_are_the_same_on_both_sides() -> None:
    """ViT-MAE hides other patches in every pass; from the same seed, the same."""
    config = AutoConfig.for_model("vit_mae", **IMAGE, decoder_hidden_size=8, decoder_num_attention_heads=2)
    config.decoder_intermediate_size, config.decoder_num_hidden_layers, config.mask_ratio = 8, 1, 0.5
    torch.manual_seed(0)
    model = ViTMAEModel(config).eval()
    inputs = {"pixel_values": torch.randn(3, 3, 8, 8)}
    assert not torch.equal(model(**inputs)[0], model(**inputs)[0])
    prove(keep(twin(model), detect(model, inputs)), inputs)


# ---------------------------------------------------------------------------------------------------------------------
# A model of no known type
# ---------------------------------------------------------------------------------------------------------------------


class ToyConfig(PreTrainedConfig):
    model_type = "toy"

    def __init__(self, oddity: str = "", **kwargs: Any):
        self.hidden_size, self.num_attention_heads, self.intermediate_size, self.num_hidden_layers = (
            16,
            4,
            12,
            3,
        )
        self.vocab_size, self.oddity = 60, oddity
        super().__init__(**kwargs)


class ToyAttention(nn.Module):
    def __init__(self, config: ToyConfig):
        super().__init__()
        self.oddity, self.heads = config.oddity, 4
        self.to_qkv, self.to_out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, states: Tensor) -> Tensor:
        packed = self.oddity == "packed"
        projected = self.to_qkv(states)[None] if packed else self.to_qkv(states)
        q, k, v = projected.unflatten(-1, (self.heads, 3, -1)).permute(3, 0, 2, 1, 4)
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        if self.oddity == "mixed heads":
            mixed = mixed + mixed.roll(1, 1)
        features = mixed.transpose(1, 2).flatten(2)
        output: Tensor = self.to_out(features[0] if packed else features)
        if self.oddity == "nothing carried":
            output = output + projected[..., :16].roll(1, 1)
        return output


class ToyLayer(nn.Module):
    def __init__(self, config: ToyConfig):
        super().__init__()
        self.oddity = config.oddity
        self.one, self.two = nn.LayerNorm(16), nn.LayerNorm(16)
        self.mix, self.up, self.down = ToyAttention(config), nn.Linear(16, 12), nn.Linear(12, 16)
        if self.oddity == "normed neurons":
            self.inner = nn.LayerNorm(12)
        if self.oddity == "unused":
            self.spare = nn.Linear(16, 16)
        if self.oddity == "experts":
            self.experts = nn.Parameter(torch.randn(4, 16, 16))
        if self.oddity == "three in turn":
            self.third = nn.Linear(16, 16)
        if self.oddity == "gate":
            self.gate = nn.Linear(16, 1)
        if self.oddity == "blind":
            self.seeker = nn.Linear(12, 1)

    def forward(self, states: Tensor) -> Tensor:
        if self.oddity == "streams":
            states = states + self.mix(self.one(states.sum(2))).unsqueeze(2)
            neurons = torch.relu(self.up(self.two(states.sum(2))))
            joined: Tensor = states + self.down(neurons).unsqueeze(2)
            return joined
        states = self.mix(self.one(states)) + (0 if self.oddity == "nothing carried" else states)
        neurons = torch.relu(self.up(self.two(states)))
        if self.oddity == "normed neurons":
            neurons = self.inner(neurons)
        if self.oddity == "experts":
            states = states + states @ self.experts[0]
        if self.oddity == "blind":
            with torch.no_grad():
                weights = torch.sigmoid(self.seeker(neurons))
            neurons = neurons * weights
        if self.oddity == "fixed width":
            neurons = neurons.view(*neurons.shape[:2], 3, 4).flatten(2)
        output: Tensor = self.down(neurons)
        if self.oddity == "three in turn":
            output = self.third(torch.relu(output))
        if self.oddity == "gate":
            output = torch.sigmoid(self.gate(states)) * output
        return states + output


class ToyModel(PreTrainedModel):
    config_class = ToyConfig

    def __init__(self, config: ToyConfig):
        super().__init__(config)
        self.words = nn.Embedding(60, 16)
        self.layers: Any = nn.ModuleList(ToyLayer(config) for _ in range(3))
        if config.oddity == "shared layers":
            self.layers = nn.ModuleList([self.layers[0]])
        if config.oddity == "shared weights":
            self.layers[2].up.weight = self.layers[1].up.weight
        if config.oddity == "no layers":
            self.layers = nn.ModuleList()
        if config.oddity in ("of its own", "no layers"):
            self.pool = ToyAttention(config)
        if config.oddity == "sequence":
            self.layers = nn.Sequential(*self.layers)
        if config.oddity == "dead":
            self.layers[1].down.weight.data.zero_()
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        pass

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, return_dict: bool = True
    ) -> BaseModelOutput:
        states = self.words(input_ids)
        if self.config.oddity == "packed":
            states = states.flatten(0, 1)
        if self.config.oddity == "streams":
            states = torch.stack([states, states.tanh()], 2)
        for layer in list(self.layers) * (3 if self.config.oddity == "shared layers" else 1):
            states = layer(states)
            if self.config.oddity == "in place":
                states += states.tanh()
        if self.config.oddity in ("of its own", "no layers"):
            states = states + self.pool(states)
        if self.config.oddity == "chance":
            states = states * (1 + random.random())
        if self.config.oddity == "streams":
            states = states.sum(2)
        return BaseModelOutput(states.view(*input_ids.shape, 16))


def toy(oddity: str = "") -> ToyModel:
    torch.manual_seed(0)
    model = ToyModel(ToyConfig(oddity))
    model.eval()
    return model


def test_a_model_of_no_known_type_is_described_proved_and_pruned(tmp_path: Path) -> None:
    model = toy()
    describe(model)
    assert [s.num_units for s in find_sublayers(model)] == [4, 12] * 3
    assert find_sublayers(model)[0].block == Block(
        "attention",
        inputs={"mix.to_qkv": "qkv:perhead"},
        output="mix.to_out",
        core="mix",
        returns="y",
        sizes={"mix.heads": "heads"},
    )
    assert find_sublayers(model)[1].block == Block("ffn", inputs={"up": "f"}, output="down", stream="two")
    assert find_sublayers(model)[0].stack.mask == "attention_mask"

    def collate(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        return {"input_ids": torch.tensor([row["input_ids"][:3] for row in batch])}

    args = KPruneArguments(sparsity=0.5, num_tokens=400, seed=0)
    pruner = KPrunePruner(
        model, args, rows(200), collate, compute_loss=lambda s, t, _: (s[0] - t[0]).square().sum((1, 2))
    )
    pruner.prune()
    with pytest.warns(UserWarning, match="ToyModel is a class of test_detect, not of transformers"):
        pruner.save_model(str(tmp_path))
    again = ToyModel.from_pretrained(tmp_path).eval()
    ids = torch.arange(12).view(2, 6)
    assert torch.equal(again(ids)[0], model(ids)[0])
    with pytest.raises(UnsupportedArchitectureError, match="pruned before.*register_family"):
        describe(again)


class ToyOfSignals(ToyModel):
    """It runs on nothing that is made up."""

    main_input_name = "signals"

    def forward(self, signals: Tensor, return_dict: bool = True) -> BaseModelOutput:  # type: ignore[override]
        for layer in self.layers:
            signals = layer(signals)
        return BaseModelOutput(signals)


def test_of_several_streams_of_a_token_its_head_answers_for_one() -> None:
    model, ids = toy("streams"), torch.arange(22).view(2, 11)
    describe(model)
    sublayers = find_sublayers(model)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    maker = BatchMaker(torch.device("cpu"), model, sublayers, sublayers[-1])
    batch = maker.batch({"input_ids": ids, "attention_mask": mask}, None)
    assert torch.equal(batch.counted, mask.bool())
    assert torch.equal(batch.tokens(sublayers[-1], torch.zeros(2, 11, 12)), mask.bool())


class ToyOfTensors(ToyModel):
    """It gives a tensor, whatever it is asked for."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        states: Tensor = super().forward(input_ids)[0]
        return states


@pytest.mark.slow
def test_a_model_that_gives_a_tensor_is_pruned_by_a_loss_on_it() -> None:
    torch.manual_seed(0)

    def loss(student: Any, teacher: Any, _: Tensor) -> Tensor:
        distance: Tensor = (student["output 0"] - teacher["output 0"]).square().mean((1, 2))
        return distance

    rows = [{"input_ids": torch.randint(4, 60, (11,))} for _ in range(8)]
    args = KPruneArguments(sparsity=0.5, seed=0)
    report = KPrunePruner(ToyOfTensors(ToyConfig()).eval(), args, rows, compute_loss=loss).prune()
    assert report.sparsity >= 0.5


def test_a_model_is_proved_on_the_rows_that_it_is_pruned_with() -> None:
    torch.manual_seed(0)
    args = KPruneArguments(sparsity=0.5, num_tokens=400, seed=0)
    with pytest.raises(UnsupportedArchitectureError, match="runs on none of the inputs that were made up"):
        KPrunePruner(ToyOfSignals(ToyConfig()), args)
    signals = [{"signals": torch.randn(6, 16)} for _ in range(100)]
    pruner = KPrunePruner(
        ToyOfSignals(ToyConfig()),
        args,
        signals,
        compute_loss=lambda s, t, _: (s[0] - t[0]).square().sum((1, 2)),
    )
    assert [s.num_units for s in find_sublayers(pruner.model)] == [4, 12] * 3
    assert pruner.prune().sparsity >= 0.5


ODDITIES = {
    "shared layers": "layers.0 runs more than once",
    "shared weights": "layers.1.up.weight and layers.2.up.weight are one and the same weight",
    "chance": "of its largest value off",
}

PARTS = {
    "normed neurons": (
        "attention",
        "layers.*.down",
        "of all that was tried, nothing was right: layers.*.down: odd units",
    ),
    "fixed width": (
        "attention",
        "layers.*.down",
        "of all that was tried, nothing was right: layers.*.down: odd units cut: it does not run then",
    ),
    "blind": (
        "attention",
        "layers.*.down",
        "seeker runs where gradients are turned off, so that it cannot be seen what feeds it",
    ),
    "unused": ("attention ffn", "layers.*.spare", "it does not run on these inputs"),
    "experts": ("attention ffn", "layers.*.experts", "it is a weight of neither nn.Linear nor an attention"),
    "gate": ("attention ffn", "layers.*.gate", "no attention and no FFN was seen that it opens or closes"),
    "of its own": (
        "attention ffn",
        "pool.",
        "it is like what its layers are made of, and lies outside of them",
    ),
    "sequence": ("attention ffn", "", ""),
    "packed": ("attention ffn", "", ""),
    "in place": ("attention ffn", "", ""),
    "three in turn": ("attention ffn", "layers.*.third", "it follows down, which ends an FFN"),
    "nothing carried": (
        "ffn",
        "layers.*.mix.to_qkv",
        "it is of what mixes tokens here, and no module within the layer holds all of that",
    ),
    "dead": (
        "attention",
        "layers.*.down",
        "of all that was tried, nothing was right: layers.*.down: odd units",
    ),
}
"""The kinds of sublayers that are described of odd models, what of them stays as it is, and why."""


@pytest.mark.parametrize("oddity", PARTS)
def test_oddities_stay_and_the_rest_is_described(oddity: str) -> None:
    model, (kinds, left, why) = toy(oddity), PARTS[oddity]
    describe(model)
    assert [s.kind for s in find_sublayers(model)] == kinds.split() * 3
    reasons = {**untouched(model), **parts_left_alone(model)}
    assert reasons[left].startswith(why) if left else not reasons
    assert not any("error above" in reason for reason in reasons.values())  # none is shown beside it


def test_what_its_config_does_not_make_is_said_of_the_model_and_not_of_a_description() -> None:
    model = toy()
    model.layers = model.layers[:2]
    with pytest.raises(
        UnsupportedModelError, match=r"ToyModel lacks layers\.2.*, which the config of ToyModel makes"
    ):
        describe(model)


def test_an_error_that_a_refusal_speaks_of_is_shown_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, raised = toy(), RuntimeError("size mismatch")

    def fail(*_: object) -> None:
        raise raised

    monkeypatch.setattr("hf_kprune.structure.proof.prove_carrying", fail)
    with pytest.raises(
        UnsupportedArchitectureError, match="it does not run then, as the error above shows"
    ) as error:
        describe(model)
    cause: BaseException | None = error.value
    while cause is not None and cause is not raised:
        cause = cause.__cause__
    assert cause is raised


@pytest.mark.parametrize("oddity", ODDITIES)
def test_oddities_are_refused_with_the_reason_and_the_way_out(oddity: str) -> None:
    model = toy(oddity)
    with pytest.raises(UnsupportedArchitectureError) as error:
        describe(model)
    assert ODDITIES[oddity] in str(error.value)
    assert "model_type 'toy' (ToyModel)" in str(error.value)
    assert "hf_kprune.register_family: docs/add_a_family.md" in str(error.value)
    with pytest.raises(UnsupportedArchitectureError, match="no family describes model_type 'toy'"):
        find_sublayers(model)


def test_a_model_without_layers_is_sent_to_no_description() -> None:
    with pytest.raises(UnsupportedArchitectureError) as error:
        describe(toy("no layers"))
    assert str(error.value).startswith(f"ToyModel cannot be pruned: detection: {NO_LAYERS}")
    assert "register_family" not in str(error.value)


def test_mixed_heads_are_cut_together() -> None:
    model = toy("mixed heads")
    describe(model)
    assert [s.num_units for s in find_sublayers(model)] == [1, 12] * 3


class Interleaved(ConversionOps):
    """Rows of the two halves of each head, in turn, of as many heads as the config says."""

    def convert(self, input_dict: dict[str, Any], config: Any, **_: object) -> dict[str, Tensor]:
        rows = {key: w[0] if isinstance(w, list) else w for key, w in input_dict.items()}
        shapes = {key: (config.num_attention_heads, 2, len(w) // 8, 16) for key, w in rows.items()}
        return {key: w.view(shapes[key]).transpose(1, 2).reshape(w.shape) for key, w in rows.items()}

    @property
    def reverse_op(self) -> ConversionOps:
        return self


def test_heads_that_checkpoints_hold_in_another_form_are_cut_as_far_as_they_fit_it(tmp_path: Path) -> None:
    model, name = toy(), "to_qkv.weight"
    describe(model)
    model._weight_conversions = [WeightConverter(name, name, operations=[Interleaved()])]
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        cut_twin(model, [s.numbers == 0 for s in find_sublayers(model)]).save_pretrained(tmp_path)
    keep(model, Detected({}, {}))
    describe(model)
    assert [s.num_units for s in find_sublayers(model)] == [1, 12] * 3
    cut_twin(model, [s.numbers < 0 for s in find_sublayers(model)]).save_pretrained(tmp_path)


def test_a_refusal_prints_what_was_found() -> None:
    """The start it gives can be pasted, and registered it is what was detected."""
    model = toy("shared weights")
    with pytest.raises(UnsupportedArchitectureError) as error:
        describe(model)
    code = str(error.value).split("to start from:")[1]
    registered: dict[str, Any] = {}
    exec(code, {"register_family": lambda t, *s: registered.update({t: s}), "Stack": Stack, "Block": Block})
    (stacks,) = detect(model, example_inputs(model)).families.values()
    assert registered == {"toy": stacks}
    assert as_code("toy", stacks) in code


def test_nothing_leaks() -> None:
    """Neither into other models of the type, nor into the model, but for the note that its copies share."""
    model, before = toy().train(), dict(hf_kprune.structure.families.FAMILIES)
    state, config = copy.deepcopy(model.state_dict()), model.config.to_dict()
    ids, generator = [id(p) for p in model.parameters()], torch.get_rng_state()
    describe(model)
    assert before == hf_kprune.structure.families.FAMILIES
    assert model.config.to_dict() == config
    assert [id(p) for p in model.parameters()] == ids
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(m.training and not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), generator)
    assert find_sublayers(copy.deepcopy(model))
    with pytest.raises(UnsupportedArchitectureError):
        find_sublayers(toy())


def test_listed_models_are_not_detected() -> None:
    model = make("bert")
    describe(model)
    assert "kprune_family" not in vars(model)


def test_what_is_known_not_to_work_is_not_tried() -> None:
    config = AutoConfig.for_model("xlnet", vocab_size=60, d_model=8, n_layer=1, n_head=2, d_inner=8)
    with pytest.raises(UnsupportedArchitectureError, match="its attention weights are no projections"):
        describe(XLNetModel(config))


def test_what_a_user_registers_is_proved_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_kprune.structure.families.FAMILIES", hf_kprune.structure.families.FAMILIES | {})
    for module in ("coverage", "sublayers"):
        path = f"hf_kprune.structure.{module}.FAMILIES"
        monkeypatch.setattr(path, hf_kprune.structure.families.FAMILIES)
    right = Block(
        "attention",
        {"mix.to_qkv": "qkv:perhead"},
        "mix.to_out",
        core="mix",
        returns="y",
        sizes={"mix.heads": "heads"},
    )
    wrong = Block(
        "attention",
        {"mix.to_qkv": "qkv"},
        "mix.to_out",
        core="mix",
        returns="y",
        sizes={"mix.heads": "heads"},
    )
    ffn = Block("ffn", {"up": "f"}, "down", stream="two")
    model = toy()
    register_family("toy", Stack("layers", (right, ffn)))
    prove(model, example_inputs(model))
    for blocks, why in (
        ((wrong, ffn), "odd units cut: layers.0.attention is"),
        ((ffn, right), "in the order described"),
    ):
        register_family("toy", Stack("layers", blocks))
        with pytest.raises(UnsupportedArchitectureError, match=why):
            prove(model, example_inputs(model))


def test_a_size_that_differs_from_layer_to_layer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 4's config raises on a plain read of it: what it raises is chained, and never the reason given."""
    families = hf_kprune.structure.families.FAMILIES
    monkeypatch.delitem(families, "gemma4_text")  # as a type would be that is not listed
    layers = {"layer_types": ["sliding_attention", "full_attention"], "num_hidden_layers": 2}
    config = {**DECODER, **layers, "head_dim": 4, "global_head_dim": 8, "hidden_size_per_layer_input": 0}
    model = Gemma4ForCausalLM(Gemma4TextConfig(**config, vocab_size_per_layer_input=60))
    describe(model, inputs_for(model, "text", batch=3))
    assert {s.kind for s in find_sublayers(model)} == {"ffn"}
    why = parts_left_alone(model)["layers.*.self_attn.o_proj"]
    assert why.startswith("the layers differ in head_dim, for which Gemma4Text")


class Unreadable(PreTrainedConfig):
    model_type = "unreadable"

    @property
    def head_dim(self) -> int:
        raise RuntimeError("ask each layer")


def test_an_attribute_that_cannot_be_read_is_named() -> None:
    assert read(Unreadable(), "missing") is None
    with pytest.raises(
        UnsupportedArchitectureError, match="the layers differ in head_dim, for which Unreadable has no one"
    ):
        read(Unreadable(), "head_dim")


def test_sizes_that_a_config_tells_wrongly_are_named() -> None:
    model = make("llama")
    model.config.num_attention_heads = 0
    with pytest.raises(
        UnsupportedArchitectureError, match="num_attention_heads of 0 and a head size .* expected both over 0"
    ):
        find_sublayers(model)
    model = make("llama")
    model.config.head_dim = 3
    with pytest.raises(
        UnsupportedArchitectureError, match="o_proj reads 16 features, which heads of 6 do not make"
    ):
        find_sublayers(model)


def test_errors_of_others_are_chained_and_never_the_reason() -> None:
    for raised in (RuntimeError("size mismatch"), KeyError("a.b"), StopIteration()):
        with (
            pytest.raises(
                UnsupportedArchitectureError,
                match="^odd units cut: it does not run then, as the error above shows$",
            ) as e,
            step("odd units cut"),
        ):
            raise raised
        assert e.value.__cause__ is raised
    with pytest.raises(torch.OutOfMemoryError), step("odd units cut"):
        raise torch.OutOfMemoryError("full")


@pytest.mark.parametrize(
    "name",
    slow_unless_in(
        ("bert", "bart", "clip"),
        ("bert", "llama", "bart", "t5", "vit", "clip", "hubert", "whisper", "videomae"),
    ),
)
def test_example_inputs_run(name: str) -> None:
    model = make(name)
    with torch.no_grad():
        assert model(**example_inputs(model)) is not None


def test_half_precision_is_proved_in_float32() -> None:
    model = make("vit", dtype=torch.bfloat16)
    inputs = {key: value.bfloat16() for key, value in inputs_for(model, "image", batch=3).items()}
    before = copy.deepcopy(model.state_dict())
    prove(keep(twin(model), detect(model, inputs)), inputs)
    assert all(
        torch.equal(value, before[key]) and value.dtype == before[key].dtype
        for key, value in model.state_dict().items()
    )


def test_layers_at_one_place_in_several_stacks_are_not_emptied_together() -> None:
    one = find_sublayers(make("bert"))
    stacks = [*one, *(replace(s, name=f"others.{s.name}") for s in one)]
    emptied = [
        [not mask.any() for mask in masks] for what, masks in trial_masks(stacks).items() if "emptied" in what
    ]
    assert [sum(each) for each in zip(*emptied, strict=True)] == [1] * len(stacks)
    assert not any(turn[place] and turn[place + len(one)] for turn in emptied for place in range(len(one)))


def test_a_list_may_have_gaps() -> None:
    """As where some layers are followed by a convolution, and others by none."""
    module = nn.Module()
    module.layers = nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(2))
    module.after = nn.ModuleList([nn.Conv1d(2, 2, 1), None])  # type: ignore[list-item]
    module.mixed = nn.ModuleList([nn.Sequential(nn.Linear(2, 2), nn.ReLU()), None])  # type: ignore[list-item]
    assert outermost(module, ()) == ["layers", "mixed"]


def test_a_function_of_attention_that_gives_no_numbers_is_not_asked_for_any(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make("bert").eval()
    inputs = inputs_for(model, ZOO["bert"][2], batch=3)
    assert [m.config._attn_implementation for m in implementations(model, inputs)] == ["sdpa", "eager"]
    layer = type(model.bert.encoder.layer[0])
    forward = layer.forward

    def broken(self: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        return forward(self, hidden * (float("nan") if eager(self) else 1), *args, **kwargs)

    def eager(layer: Any) -> bool:
        return bool(layer.attention.self.config._attn_implementation == "eager")

    monkeypatch.setattr(layer, "forward", broken)
    assert len(list(implementations(model, inputs))) == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:no knowledge loss is known")
def test_series_of_several_channels_are_pruned(tmp_path: Path) -> None:
    """PatchTST attends within a channel, to (batch * channels, patches, width), and carries all channels."""
    torch.manual_seed(0)
    config = PatchTSTConfig(
        num_input_channels=3,
        context_length=16,
        patch_length=4,
        patch_stride=4,
        d_model=16,
        ffn_dim=24,
        num_attention_heads=4,
        num_hidden_layers=2,
        num_targets=2,
    )
    model = PatchTSTForRegression(config).eval()
    rows = [{"past_values": torch.randn(16, 3)} for _ in range(40)]
    args = KPruneArguments(
        sparsity=0.3, num_tokens=400, output_dir=str(tmp_path / "pruned"), disable_tqdm=True, use_cpu=True
    )
    pruner = KPrunePruner(model, args, rows)
    report = pruner.prune()
    assert any(s.kind == "attention" and len(s.kept) < s.units for s in report.sublayers)
    pruner.save_model()
    again = PatchTSTForRegression.from_pretrained(tmp_path / "pruned").eval()
    values = torch.randn(5, 16, 3)
    with torch.no_grad():
        expected, outputs = (each(past_values=values).regression_outputs for each in (pruner.model, again))
    torch.testing.assert_close(outputs, expected)
