"""Families: cutting == masking on every model type and head, and the description carries to other architectures."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any, get_args

import pytest
import torch
import transformers
from checks import by_column, logits, masked
from models import EVERY_HEAD, EVERY_TYPE, MODEL_TYPES, cut_all, shallow, slow_unless_in, tiny
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from zoo import ENCODER, GEMMA4, make

from hf_kprune import Block, KPrunePruner, Stack, UnsupportedArchitectureError, register_family
from hf_kprune.modeling_kprune import fill, shrink_layer, with_weights
from hf_kprune.structure.configs import ask, at_layer
from hf_kprune.structure.families import FAMILIES, Kind
from hf_kprune.structure.reach import parts_left_alone
from hf_kprune.structure.sublayers import Sublayer, find_sublayers
from hf_kprune.structure.surgery import cut
from hf_kprune.structure.units import KINDS, UNITS, WHOLE_EXPERTS, Head, Neuron, QueryHead, Unit


def plans(sublayers: list[Sublayer]) -> dict[str, list[Tensor]]:
    """Keep-masks by name: ragged ones, each sublayer emptied with the rest halved, all emptied."""
    every = [torch.arange(s.num_units) for s in sublayers]
    masks = {
        "even units": [units % 2 == 0 for units in every],
        "odd units": [units % 2 == 1 for units in every],
        "ragged": [units >= i % 4 for i, units in enumerate(every)],
        "nothing": [units < 0 for units in every],
    }
    for i, sublayer in enumerate(sublayers):
        masks[f"without {sublayer.name}"] = [
            units < 0 if k == i else units % 2 == k % 2 for k, units in enumerate(every)
        ]
    return masks


def masked_logits(model: PreTrainedModel, masks: list[Tensor], head: str) -> Tensor:
    sublayers = find_sublayers(model)
    with masked(sublayers, by_column(sublayers, masks)):
        return logits(model, head)


def check_cut_equals_masked(model: PreTrainedModel, head: str) -> None:
    dense = logits(model, head)
    for name, masks in plans(find_sublayers(model)).items():
        student = cut_all(model, masks)
        results = logits(student, head)
        expected = masked_logits(model, masks, head)
        torch.testing.assert_close(
            results, expected, rtol=1e-5, atol=1e-5, msg=partial("{}: {}".format, name)
        )
        assert (results - dense).abs().max() > 1e-3, f"{name}: cutting did nothing"
        assert [s.num_units for s in find_sublayers(student)] == [int(m.sum()) for m in masks]


@pytest.mark.parametrize(("model_type", "head"), EVERY_HEAD)
def test_cut_equals_masked_for_every_head(model_type: str, head: str) -> None:
    check_cut_equals_masked(shallow(model_type, head), head)


@pytest.mark.parametrize(
    "model_type", slow_unless_in(("bert", "electra"), [m for m in MODEL_TYPES if m != "mpnet"])
)  # which has eager attention only
def test_cut_equals_masked_in_sdpa_and_in_eager(model_type: str) -> None:
    model = shallow(model_type)
    for attention in ("eager", "sdpa"):
        model.set_attn_implementation(attention)
        assert model.config._attn_implementation == attention
        check_cut_equals_masked(model, "SEQUENCE_CLASSIFICATION")


def test_layers_of_other_sizes_have_units_of_their_own() -> None:
    """Heads as the config of each layer says, and FFNs as wide as they are in it: each has its own entry in the plan."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("gemma4_text", **{**GEMMA4, "intermediate_size": 8})
    model: Any = transformers.Gemma4ForCausalLM(config).eval()
    wide = transformers.Gemma4ForCausalLM(
        AutoConfig.for_model("gemma4_text", **{**GEMMA4, "intermediate_size": 16})
    )
    model.model.layers[2].mlp = wide.model.layers[2].mlp
    sublayers = find_sublayers(model)
    sizes = [(s.unit.heads, s.unit.head_dim, s.num_units, s.plan["of"]) for s in sublayers]
    assert sizes == [(2, 4, 2, 2), (1, 1, 8, 8), (1, 8, 4, 4), (1, 1, 8, 8), (1, 8, 4, 4), (1, 1, 16, 16)]
    assert not hasattr(cut_all(model, [torch.ones(s.num_units).bool() for s in sublayers]).config, "kprune")
    masks = [torch.arange(s.num_units) % 2 == 0 for s in sublayers]
    student = cut_all(model, masks)
    kept = [block["kept"] for block in student.config.kprune["stacks"][0]["blocks"]]
    assert kept == [[1, None, None], [4, 4, None], [None, 2, 2], [None, None, 8]]
    with masked(sublayers, by_column(sublayers, masks)):
        expected = model(torch.arange(4, 12)[None]).logits
    torch.testing.assert_close(student(torch.arange(4, 12)[None]).logits, expected, rtol=1e-5, atol=1e-5)


def test_a_config_may_list_the_heads_of_each_layer() -> None:
    config: Any = PreTrainedConfig(num_attention_heads=[4, 8], hidden_size=16, head_dim=2)
    layers = [at_layer(config, index, ("num_attention_heads", "head_dim", "missing")) for index in (0, 1)]
    assert [(layer.num_attention_heads, layer.head_dim) for layer in layers] == [(4, 2), (8, 2)]
    assert at_layer(config, 0, ("head_dim",)) is config


def test_a_size_may_be_a_quotient_of_two_attributes() -> None:
    config = PreTrainedConfig(true_hidden_size=8, num_attention_heads=4, nothing=None)
    assert ask(config, "true_hidden_size / num_attention_heads") == 2
    assert ask(config, "nothing / num_attention_heads") is None


def test_a_gate_with_one_row_for_each_head_is_cut_with_its_heads() -> None:
    assert Head(4, heads=2).rows("h", 3).tolist() == [[0, 1], [2, 3], [4, 5]]
    assert QueryHead(4, heads=2, kv_heads=0).rows("h", 3).tolist() == [[0, 3], [1, 4], [2, 5]]


def test_attentions_that_return_lists_are_stood_in_for_by_lists() -> None:
    y, weights = torch.ones(1), torch.zeros(0)
    assert fill("[y]", y, {}) == [y]
    assert with_weights([y], weights, appended=True) == [y, weights]
    assert with_weights([y], weights, appended=False) == [y]


def test_a_projection_may_lie_in_a_module_that_clips_what_it_gives() -> None:
    class Clipped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(4, 3)

        def forward(self, hidden: Tensor) -> Tensor:
            output: Tensor = self.linear(hidden)
            return output.clamp(-0.1, 0.1)

    layer: Any = torch.nn.Module()
    layer.attention = torch.nn.Module()
    layer.attention.o_proj = Clipped()
    layer.attention.o_proj.linear.bias.data = torch.tensor([-1.0, 0.0, 1.0])
    plan: Any = dict.fromkeys(("rows", "sizes", "table", "slices", "select"), {})
    columns = {"attention.o_proj.linear": 4}
    plan |= {"kind": "attention", "kept": [0], "of": 1, "heads": 1, "core": "attention", "columns": columns}
    shrink_layer(layer, plan | {"returns": "y"}, 0)
    assert layer.attention(torch.ones(1, 2, 3)).tolist() == [[pytest.approx([-0.1, 0.0, 0.1])] * 2]


def test_what_stays_of_a_layer_is_named_with_its_reason() -> None:
    """Only of those stages of Swin that the model has; and the list of stages is no list of layers beside them."""
    model = make("swin")
    names = [s.name for s in find_sublayers(model)]
    assert names == [
        "encoder.layers.0.blocks.0.ffn",
        "encoder.layers.0.blocks.1.ffn",
        "encoder.layers.1.blocks.0.ffn",
    ]
    reasons = parts_left_alone(model)
    assert list(reasons) == [f"encoder.layers.{stage}.blocks.*.attention" for stage in (0, 1)]
    assert "windows" in next(iter(reasons.values()))
    assert parts_left_alone(make("mixtral")) == {}  # a router has no heads that could go


def test_linear_attention_with_projections_of_the_same_names_is_no_attention() -> None:
    """It makes no keys from a latent vector; an attention that is empty does not, either, but is one."""
    model = make("kimi_linear")
    sublayers = find_sublayers(model)
    attentions = ["layers.0.attention", "layers.2.attention"]
    assert [s.name for s in sublayers if s.unit.has_heads] == attentions
    student = cut_all(model, [torch.full((s.num_units,), not s.unit.has_heads) for s in sublayers])
    assert {s.name: s.num_units for s in find_sublayers(student) if s.unit.has_heads} == dict.fromkeys(
        attentions, 0
    )


@pytest.mark.parametrize(
    ("name", "experts"),
    [("jamba", 1), ("lfm2_moe", 2), ("minimax", 3), ("nemotron_h", 1), ("nemotron_h:latent", 1)],
)
def test_experts_of_hybrids_are_sublayers(name: str, experts: int) -> None:
    assert sum(s.unit.in_experts for s in find_sublayers(make(name))) == experts


def test_experts_of_another_form_stay_with_a_reason() -> None:
    for name in ("llama4_text", "longcat_flash", "switch_transformers"):
        reasons = parts_left_alone(make(name))
        assert any("its experts" in why for why in reasons.values()), name


def test_a_projection_of_another_kind_is_refused() -> None:
    config = {**ENCODER, "embedding_size": 16, "conv_kernel_size": 3, "num_groups": 2}
    model = transformers.ConvBertModel(AutoConfig.for_model("convbert", **config))
    with pytest.raises(
        UnsupportedArchitectureError, match=r"output.dense of ConvBertModel is a GroupedLinearLayer"
    ):
        find_sublayers(model)


@pytest.mark.parametrize(("model_type", "head"), EVERY_HEAD)
def test_keeping_all_changes_nothing(model_type: str, head: str) -> None:
    model = tiny(model_type, head)
    config, state = model.config.to_dict(), model.state_dict()
    student = cut_all(model, [torch.ones(s.num_units).bool() for s in find_sublayers(model)])
    assert not hasattr(student.config, "kprune")
    assert student.config.to_dict() == config
    assert all(torch.equal(value, state[name]) for name, value in student.state_dict().items())
    assert torch.equal(logits(student, head), logits(model, head))


@pytest.mark.parametrize("model_type", EVERY_TYPE)
def test_cutting_twice_equals_cutting_once(model_type: str) -> None:
    model = tiny(model_type)
    units = [s.num_units for s in find_sublayers(model)]
    first = [torch.arange(n) % 4 != i % 4 for i, n in enumerate(units)]
    for empty in (None, 0, 1):
        second = [torch.arange(int(m.sum())) % 2 == 1 for m in first]
        if empty is not None:
            second[empty][:] = False
        both = [m.clone().masked_scatter(m, s) for m, s in zip(first, second, strict=True)]
        halfway = cut_all(model, first)
        before = copy.deepcopy(halfway.config.kprune)
        twice, once = cut_all(halfway, second), cut_all(model, both)
        assert halfway.config.kprune == before, (
            "cutting a copy changed the plan of the model it was copied from"
        )
        assert twice.config.kprune == once.config.kprune
        torch.testing.assert_close(logits(twice), logits(once), rtol=0, atol=0)
        torch.testing.assert_close(logits(twice), masked_logits(model, both, ""), rtol=1e-5, atol=1e-5)
        assert [(s.name, s.num_units, s.plan["of"]) for s in find_sublayers(twice)] == [
            (s.name, int(m.sum()), n) for s, m, n in zip(find_sublayers(model), both, units, strict=True)
        ]


@pytest.mark.parametrize("model_type", EVERY_TYPE)
def test_modules_know_how_many_heads_they_have(model_type: str) -> None:
    """Whether or not their forward asks."""
    student = cut_all(tiny(model_type), plans(find_sublayers(tiny(model_type)))["ragged"])
    sizes = {"num_attention_heads": 1, "n_heads": 1, "all_head_size": 4}
    names = set()
    for sublayer in find_sublayers(student):
        for module in sublayer.layer.modules() if sublayer.kind == "attention" else ():
            for name in sizes.keys() & vars(module).keys():
                assert getattr(module, name) == sublayer.num_units * sizes[name], f"{sublayer.name}: {name}"
                names.add(sublayer.num_units)
    assert len(names) > 1


@pytest.mark.parametrize("model_type", EVERY_TYPE)
def test_gradients_and_dtype_of_the_cut_weights_are_kept(model_type: str) -> None:
    model = tiny(model_type).half()
    for parameter in model.base_model.parameters():
        parameter.requires_grad_(False)
    student = cut_all(model, plans(find_sublayers(model))["odd units"])
    assert {p.dtype for p in student.parameters()} == {torch.float16}
    assert {n: p.requires_grad for n, p in student.named_parameters()} == {
        n: p.requires_grad for n, p in model.named_parameters()
    }


@pytest.mark.parametrize("model_type", EVERY_TYPE)
def test_the_plan_is_data_that_survives_json(model_type: str) -> None:
    model = tiny(model_type)
    student = cut_all(model, plans(find_sublayers(model))["without " + find_sublayers(model)[2].name])
    again = type(model)(AutoConfig.for_model(**student.config.to_dict())).eval()
    assert {n: p.shape for n, p in again.named_parameters()} == {
        n: p.shape for n, p in student.named_parameters()
    }
    again.load_state_dict(student.state_dict())
    assert torch.equal(logits(again), logits(student))


@pytest.mark.parametrize("model_type", EVERY_TYPE)
@pytest.mark.parametrize("tokens", [1, 31.47, 128])
def test_flops_of_a_unit_are_the_papers(model_type: str, tokens: float) -> None:
    """METHOD 1.6: F_head = 8 s d d_h + 4 s^2 d_h and F_neuron = 4 s d, before and after a cut."""
    model = tiny(model_type)
    d, d_h = 16, 4
    student = cut_all(model, plans(find_sublayers(model))["odd units"])
    for sublayer in find_sublayers(model) + find_sublayers(student):
        expected = (
            8 * tokens * d * d_h + 4 * tokens**2 * d_h if sublayer.kind == "attention" else 4 * tokens * d
        )
        assert sublayer.unit_flops({sublayer.stack_name: tokens}) == pytest.approx(expected, rel=1e-12)


def test_flops_are_those_that_torch_counts() -> None:
    """The products of all units of a layer on one sequence, counted by torch.utils.flop_counter."""
    from torch.utils.flop_counter import FlopCounterMode

    model = tiny("bert", "", attn_implementation="eager")
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model.encoder(torch.randn(1, 11, 16))
    assert counter.get_total_flops() == sum(
        s.num_units * s.unit_flops({s.stack_name: 11}) for s in find_sublayers(model)
    )


HEADS, HEAD_DIM, GROUP = 3, 2, 2
"""A layout by hand: 3 units, each a key-value head of 2 rows and its 2 query heads."""


def hand_built(layout: str) -> list[list[int]]:
    """Label every row of a projection with its unit, as the layout says, and read off the rows of each unit."""
    q, kv = (
        [u for u in range(HEADS) for _ in range(GROUP * HEAD_DIM)],
        [u for u in range(HEADS) for _ in range(HEAD_DIM)],
    )
    neurons = list(range(HEADS))
    owners = {
        "q": q,
        "kv": kv,
        "qkv": q + kv + kv,
        "qkv:perhead": [u for u in range(HEADS) for _ in range((GROUP + 2) * HEAD_DIM)],
        "f": neurons,
        "2f": neurons + neurons,
    }[layout]
    return [[row for row, owner in enumerate(owners) if owner == unit] for unit in range(HEADS)]


@pytest.mark.parametrize("layout", ["q", "kv", "qkv", "qkv:perhead", "f", "2f"])
def test_rows_of_a_unit(layout: str) -> None:
    unit = Neuron() if "f" in layout else Head(HEAD_DIM, GROUP)
    assert unit.rows(layout, HEADS).tolist() == hand_built(layout)
    assert unit.rows(layout, 0).shape == (0, len(hand_built(layout)[0]))


@pytest.mark.parametrize(
    ("layout", "rest"), [("q", 0), ("qkv", 0), ("qkv:perhead", 2 * HEAD_DIM), ("kv", None)]
)
def test_rows_of_a_query_head_of_every_group(layout: str, rest: int | None) -> None:
    """Of each group the rows of its query heads, of which each unit has one, and then the `rest`, keys and values."""
    group = [u for u in range(HEADS) for _ in range(HEAD_DIM)] + [-1] * (rest or 0)
    owners = [] if rest is None else group * GROUP
    expected = [[row for row, owner in enumerate(owners) if owner == unit] for unit in range(HEADS)]
    assert QueryHead(HEAD_DIM, GROUP, 0).rows(layout, HEADS).tolist() == expected


def test_what_units_cost_and_are_called() -> None:
    head, query, neuron = Head(4, 3), QueryHead(4, 3, 0), Neuron()
    assert [unit.width for unit in (head, query, neuron)] == [12, 12, 1]
    assert [unit.token_flops(10, 7) for unit in (head, query, neuron)] == [4 * 10 * 7 * 12] * 2 + [0]
    assert [unit.cached(5) for unit in (head, query, neuron)] == [2 * 5 * 4, 2 * 12, 0]
    assert [unit.cached(0) for unit in (head, query, neuron)] == [0, 0, 0]
    assert head.columns(2, 6).tolist() == [[*range(6)], [*range(6, 12)]]
    assert query.columns(2, 6).tolist() == [[0, 1, 4, 5, 8, 9], [2, 3, 6, 7, 10, 11]]
    assert head.rows("2q", 2).tolist() == [[*range(24)], [*range(24, 48)]]
    assert query.rows("2q", 2)[0].tolist() == [*range(8), *range(16, 24), *range(32, 40)]
    assert set(get_args(Kind)) == UNITS.keys() == KINDS.keys() - {WHOLE_EXPERTS}


def test_a_head_of_latent_attention() -> None:
    """Queries and keys are of one size, values of another, and the cache is of the latent vector."""
    config = PreTrainedConfig(
        num_attention_heads=4, v_head_dim=5, qk_rope_head_dim=2, qk_nope_head_dim=3, kv_lora_rank=8
    )
    (stack,) = FAMILIES["deepseek_v3"]
    unit = Head.of(config, stack, stack.blocks[0], "group")
    assert unit.width == 5
    assert unit.rows("q", 2).tolist() == [[*range(5)], [*range(5, 10)]]
    assert unit.rows("kv:latent", 2).tolist() == [[*range(8)], [*range(8, 16)]]
    assert unit.token_flops(10, 7) == 2 * 10 * 7 * (5 + 5)
    assert [unit.cached(count) for count in (0, 1, 4)] == [0, 10, 10]


@pytest.mark.parametrize(
    ("unit", "sizes"),
    [
        (Head(4, 3), {"head_dim": 4, "n_head": 15, "n_kv": 5}),
        (QueryHead(4, 3, 0), {"head_dim": 4, "n_head": 15}),
        (Neuron(), {"n_inner": 5}),
    ],
)
def test_sizes_in_a_stock_config(unit: Unit, sizes: dict[str, int]) -> None:
    stack = Stack("layers", (), uniform={"heads": "n_head", "kv_heads": "n_kv", "ffn": "n_inner"})
    assert unit.stock_sizes(stack, 5) == sizes


def test_an_unknown_layout_is_an_error() -> None:
    with pytest.raises(KeyError):
        Head(4).rows("kqv", 2)


# ---------------------------------------------------------------------------------------------------------------------
# Refusals
# ---------------------------------------------------------------------------------------------------------------------


def test_an_unknown_architecture_is_refused_and_told_the_way_out_if_there_is_one() -> None:
    config = AutoConfig.for_model("poolformer", depths=[1] * 4, hidden_sizes=[8] * 4)
    model = transformers.PoolFormerModel(config)
    with pytest.raises(
        UnsupportedArchitectureError,
        match=r"(?s)'poolformer' \(PoolFormerModel\); known: .*bert, .*register_family",
    ):
        find_sublayers(model)
    with pytest.raises(
        UnsupportedArchitectureError, match="PoolFormerModel cannot be pruned.* no list of layers"
    ):
        KPrunePruner(model)


def test_projections_that_the_family_does_not_describe_are_refused() -> None:
    model = tiny("bert")
    model.bert.encoder.layer[1].attention.self.gate = nn.Linear(2, 2)
    with pytest.raises(
        UnsupportedArchitectureError, match=r"(?s)attention\.self\.gate.*describes.*register_family"
    ):
        find_sublayers(model)


@pytest.fixture
def families() -> Iterator[None]:
    """Let a test describe families, and forget them afterwards."""
    before = dict(FAMILIES)
    yield
    FAMILIES.clear()
    FAMILIES.update(before)


@pytest.mark.usefixtures("families")
def test_layers_that_are_not_where_the_family_says_are_refused() -> None:
    register_family("bert", Stack("encoder.layers", FAMILIES["bert"][0].blocks))
    with pytest.raises(
        UnsupportedArchitectureError, match=r"no list of layers at 'encoder\.layers'.*register_family"
    ):
        find_sublayers(tiny())


@pytest.mark.usefixtures("families")
def test_a_registered_family_replaces_the_one_that_was_there() -> None:
    """Only the FFNs described: then the attention's projections are not, which is refused too."""
    (stack,) = FAMILIES["bert"]
    register_family("bert", Stack(stack.layers, stack.blocks[1:]))
    with pytest.raises(UnsupportedArchitectureError, match=r"attention\.self\.query"):
        find_sublayers(tiny())


# ---------------------------------------------------------------------------------------------------------------------
# The description on architectures that hf_kprune does not bring: grouped queries, gated FFNs, fused projections, pre-norm
# ---------------------------------------------------------------------------------------------------------------------

DECODER = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "use_cache": False,
}
OTHERS: dict[str, tuple[str, dict[str, Any], Stack]] = {
    "llama": (
        "LlamaForCausalLM",
        {**DECODER, "num_key_value_heads": 2, "intermediate_size": 12, "attention_bias": True},
        Stack(
            "layers",
            (
                Block(
                    "attention",
                    inputs={"self_attn.q_proj": "q", "self_attn.k_proj": "kv", "self_attn.v_proj": "kv"},
                    output="self_attn.o_proj",
                    core="self_attn",
                    stream="input_layernorm",
                ),
                Block(
                    "ffn",
                    inputs={"mlp.gate_proj": "f", "mlp.up_proj": "f"},
                    output="mlp.down_proj",
                    stream="post_attention_layernorm",
                ),
            ),
        ),
    ),
    "gpt_neox": (
        "GPTNeoXForCausalLM",
        {**DECODER, "intermediate_size": 12, "use_parallel_residual": False},
        Stack(
            "layers",
            (
                Block(
                    "attention",
                    inputs={"attention.query_key_value": "qkv:perhead"},
                    output="attention.dense",
                    core="attention",
                    stream="input_layernorm",
                ),
                Block(
                    "ffn",
                    inputs={"mlp.dense_h_to_4h": "f"},
                    output="mlp.dense_4h_to_h",
                    stream="post_attention_layernorm",
                ),
            ),
        ),
    ),
    "modernbert": (
        "ModernBertForSequenceClassification",
        {
            **{k: v for k, v in DECODER.items() if k != "use_cache"},
            "intermediate_size": 12,
            "attention_bias": True,
            "mlp_bias": True,
            "cls_token_id": 2,
            "sep_token_id": 3,
        },
        Stack(
            "layers",
            (
                Block(
                    "attention",
                    inputs={"attn.Wqkv": "qkv"},
                    output="attn.Wo",
                    core="attn",
                    stream="attn_norm",
                ),
                Block("ffn", inputs={"mlp.Wi": "2f"}, output="mlp.Wo", stream="mlp_norm"),
            ),
        ),
    ),
    "opt": (
        "OPTForCausalLM",
        {**DECODER, "ffn_dim": 12, "word_embed_proj_dim": 16},
        Stack(
            "decoder.layers",
            (
                Block(
                    "attention",
                    inputs={"self_attn.q_proj": "q", "self_attn.k_proj": "kv", "self_attn.v_proj": "kv"},
                    output="self_attn.out_proj",
                    core="self_attn",
                    stream="self_attn_layer_norm",
                    sizes={"self_attn.num_heads": "heads", "self_attn.embed_dim": "width"},
                ),
                Block("ffn", inputs={"fc1": "f"}, output="fc2", stream="final_layer_norm"),
            ),
        ),
    ),
    "phi3": (
        "Phi3ForCausalLM",
        {**DECODER, "num_key_value_heads": 2, "intermediate_size": 12},
        Stack(
            "layers",
            (
                Block(
                    "attention",
                    inputs={"self_attn.qkv_proj": "qkv"},
                    output="self_attn.o_proj",
                    core="self_attn",
                    stream="input_layernorm",
                    sizes={"self_attn.num_key_value_heads": "kv_heads"},
                ),
                Block(
                    "ffn",
                    inputs={"mlp.gate_up_proj": "2f"},
                    output="mlp.down_proj",
                    stream="post_attention_layernorm",
                ),
            ),
        ),
    ),
}


def other(model_type: str) -> PreTrainedModel:
    """A tiny random model of an architecture that is described here, and its description registered."""
    name, settings, stack = OTHERS[model_type]
    register_family(model_type, stack)
    torch.manual_seed(0)
    model = getattr(transformers, name)(AutoConfig.for_model(model_type, **settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


@pytest.mark.usefixtures("families")
@pytest.mark.parametrize("model_type", [m for m in OTHERS if m != "phi3"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_cut_equals_masked_on_architectures_described_here(model_type: str, attention: str) -> None:
    model = other(model_type)
    model.set_attn_implementation(attention)
    check_cut_equals_masked(model, "")


@pytest.mark.usefixtures("families")
def test_phi3_can_lose_neurons_and_whole_attentions() -> None:
    """Its attention reads the number of heads from the config of the whole model, which no attribute path reaches."""
    model = other("phi3")
    sublayers = find_sublayers(model)
    for empty in (None, 0, 2, 4):
        masks = [torch.full((s.num_units,), i != empty) for i, s in enumerate(sublayers)]
        for i in (1, 3, 5):
            masks[i] = torch.arange(sublayers[i].num_units) % 3 == i // 2
        student = cut_all(model, masks)
        torch.testing.assert_close(logits(student), masked_logits(model, masks, ""), rtol=1e-5, atol=1e-5)
        assert (logits(student) - logits(model)).abs().max() > 1e-3


@pytest.mark.usefixtures("families")
def test_grouped_queries_leave_by_groups_and_cost_what_they_have() -> None:
    model = other("llama")
    attention, ffn = find_sublayers(model)[:2]
    assert (attention.num_units, attention.unit_width) == (2, 8)
    s, d, d_h = 11, 16, 4
    # two query heads, one key and one value head, and two heads' columns of the output
    assert attention.unit_flops({"layers": s}) == 2 * s * d * (2 + 1 + 1 + 2) * d_h + 4 * s**2 * 2 * d_h
    assert ffn.unit_flops({"layers": s}) == 2 * s * d * 3  # gate, up, down
    cut(attention, torch.tensor([False, True]))
    module: Any = attention.layer.self_attn
    assert (module.q_proj.out_features, module.k_proj.out_features, module.v_proj.out_features) == (8, 4, 4)


def test_heads_that_read_the_keys_of_another_layer_are_units() -> None:
    """One of every group; the attentions that make those keys stay, and are told apart in the plan from layers without."""
    for name in ("gemma4_text:shared", "gemma3n_text"):
        sublayers = find_sublayers(make(name))
        heads = [s for s in sublayers if s.unit.has_heads]
        assert [(s.index, s.num_units, s.unit.heads) for s in heads] == [(2, 2, 2), (3, 2, 2)]
        assert heads[0].plan["stays"] == [0, 1]
        assert heads[0].plan["by"] == "borrowed"
