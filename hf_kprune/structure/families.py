"""Where each model family keeps its heads and neurons. Data only: no torch, no code keyed on a name.

To add a family, describe one of its layers (docs/add_a_family.md walks through it):

    register_family("bert", Stack("encoder.layer", (
        Block("attention",
              inputs={"attention.self.query": "q", "attention.self.key": "kv", "attention.self.value": "kv"},
              output="attention.output.dense", core="attention.self",
              sizes={"attention.self.num_attention_heads": "heads", "attention.self.all_head_size": "width"}),
        Block("ffn",
              inputs={"intermediate.dense": "f"}, output="output.dense", stream="intermediate.dense"))))

What the strings of a description mean:

    field             value               meaning
    inputs            "q"                 rows of query heads
                      "2q"                rows of query heads, those of each followed by those of its gate
                      "h"                 one row of each query head
                      "kv"                rows of key heads, or of value heads
                      "2kv"               both, one after the other
                      "kv:latent"         of each head its part of keys, then its values
                      "qkv"               all three fused, one after the other
                      "qkv:perhead"       all three fused, group by group
                      "f"                 rows of neurons
                      "2f"                gate and up projections fused, one after the other
    returns           "y"                 the output of an attention, or the hidden states of a layer
                      "y+x"               that, with the argument x of the attention added
                      None                None
                      ("y", None)         a tuple of such; a lone "y" that is in no tuple is written "y"
                      "[y]"               a list of it
    stream            "path"              the module reads the residual stream that the output joins
                      "a|b"               the one of two modules that runs first, where an option decides
                      ""                  the stream is the input of the layer
                      None                the output is normalised or scaled before it joins
    sizes             "heads"             number of query heads
                      "kv_heads"          number of key-value heads
                      "groups"            query heads for each key-value head
                      "width"             query heads times the size of a head, or neurons of an expert
                      "kv_width"          key-value heads times the size of a head
                      "experts"           number of experts
    select            0, 1                one slice for each head in this dimension
                      "0:batch"           the same in dimension 0, with the batch folded in before it
                      "none"              the argument is replaced by None
    slices            0, 1, 2             one slice for each unit in this dimension, or several
    router            0, 1                one slice for each expert in this dimension
    kv_heads          "name"              the config attribute
                      "flag ? a : b"      the attribute a where the attribute flag is true, else b
    head_dim          "name"              the config attribute
                      "a / b"             the attribute a divided by the attribute b
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal


Kind = Literal["attention", "cross_attention", "ffn", "experts"]
Layout = Literal["q", "2q", "h", "kv", "2kv", "kv:latent", "qkv", "qkv:perhead", "f", "2f"]
Returns = tuple[str | None, ...] | str
Size = Literal["heads", "kv_heads", "groups", "width", "kv_width", "experts"]
Place = Literal[0, 1, "0", "1", "0:batch", "none"]
Dimension = Literal[0, 1, 2, "0", "1"]
"""Earlier versions took the numbers as strings, which are still taken."""

KEYS = ("kv", "2kv")
"""Layouts of projections that read what keys are made of: in cross-attention tokens of another stack."""


@dataclass(frozen=True)
class Block:
    """One prunable sublayer of a layer. All paths are module paths relative to the layer.

    A *unit* is what is kept or pruned as one: an attention head (with grouped queries, a key-value head and
    its query heads, or one query head of every group), an FFN neuron, or a neuron of one expert.

    A layer that lacks the `output` lacks the block (experts may be in its place), and so does one without
    what makes an attention's keys (linear attention may be). Another input that a layer lacks is skipped, so
    one entry serves variants. What a layer has and the entry does not name is refused.

    Args:
        kind: Which sublayer it is; its units are of the class in `units.UNITS`.
        inputs: Projections whose output rows belong to units, each with the layout of its rows.
        output: Projection whose input columns belong to units, or the module of all experts of a layer (see
            experts.py). Its output is the sublayer's output.
        stream: Module that reads the residual stream which the output joins: a norm in pre-norm models, the
            first projection of the FFN in post-norm ones. If it is None, weight tuning rebuilds the output
            alone.
        core: Attention module that is replaced when no head is left.
        returns: What `core` returns.
        sizes: Attributes to refresh after a cut, `"path.of.module.attribute"`. Missing ones are skipped. A
            path through a config (`"self_attn.config.num_attention_heads"`) gives the module a view of it
            with that value.
        select: Arguments of `core` that carry one slice for each head, and where.
        slices: Parameters, none of a linear module, that hold one slice for each head, or several for each
            neuron of an expert, and where.
        router: Parameters and buffers outside of the module of the experts that hold one slice for each of
            them, and where: what goes with a whole expert. Those that a layer lacks are skipped.
        table: An embedding of relative positions with one column for each head, which the first layer of the
            stack holds for all (T5). In a pruned model every layer has its own.
        obstacle: Why its heads cannot be told apart (a norm across all of them), or the config attribute that
            says whether they cannot. Then all of them are one unit. `""` if they can.
        stays: An attribute, `"path.of.module.attribute"`, of layers where it stays as it is, if it is true
            there: attentions whose keys and values later layers read.
        norm: A module of `core` that reads the sum of the output and the first argument of `core`, where the
            output joins the stream inside of it; `""` if it does so outside.
        weights: Whether its model can take the attention weights of no heads, (B, 0, T, T). If not, it
            refuses `output_attentions=True` once an attention is emptied.

    Example:

        >>> from hf_kprune import Block
        >>> Block("ffn", inputs={"fc1": "f"}, output="fc2", stream="fc1").weights
        True
    """

    kind: Kind
    inputs: Mapping[str, Layout]
    output: str
    stream: str | None = ""
    core: str = ""
    returns: Returns = ("y", None)
    sizes: Mapping[str, Size] = field(default_factory=dict)
    select: Mapping[str, Place] = field(default_factory=dict)
    slices: Mapping[str, Dimension] = field(default_factory=dict)
    router: Mapping[str, Dimension] = field(default_factory=dict)
    table: str = ""
    obstacle: str = ""
    stays: str = ""
    norm: str = ""
    weights: bool = True


@dataclass(frozen=True)
class Stack:
    """A list of layers of one kind.

    Args:
        layers: Path of the `ModuleList`, seen from the base model.
        blocks: The sublayers of one layer, in the order in which they run.
        returns: What a layer returns.
        parallel: Whether all blocks of a layer read the layer's input and their outputs are added up.
        residual: Config attribute that multiplies every sublayer's output before it joins the stream; `""`
            for none.
        untouched: Module paths in the layer whose projections are left as they are (routers). A mapping
            says of each why its heads or neurons stay, which users are told; `""` if it has none.
        heads: Config attribute with the number of query heads.
        kv_heads: Config attribute with the number of key-value heads, where there is one; True is one for
            all.
        head_dim: Config attribute with the size of a head, where there is one. Else it is hidden size /
            heads.
        routes: Config attribute with the number of experts that a token is sent to, where there are experts.
        experts: Config attributes that may say how many experts there are; those that a config has do.
        groups: Config attributes with the number of groups of experts, and of those that a router chooses,
            where it does.
        mask: Model input that marks padding of this stack's tokens; `""` if there is none.
        reads: Path of the stack that the keys and values of cross-attention come from. Where the model has
            no such stack and is a part of another one, they come from elsewhere in that.
        shares: Argument of a layer that holds what layers make for later ones, a tensor or a mapping from
            names to tuples of tensors, (B, ...) or (B * n, ...); `""` if there is none. An attention that
            finds its keys and values there has no projections for them, and each of its units is a query head
            of every group.
        runs: Config attribute with the number of layers that run, where that may be more than there are, as
            each runs several times in turn: number i is layer i * layers // runs. `""` if each runs once.
        versions: Config attribute with the number V of versions of the hidden states that its layers hand on,
            (V, B, T, D); `""` if there is one, (B, T, D).
        packed: Whether its layers read the tokens of all rows as one sequence without a batch, (T, D).
        outlets: Config attribute with the numbers of layers whose outputs the model reads beside that of the
            last one; `""` if there are none.
        shifts: Whether the base model, when it gets nothing for this decoder, passes on the encoder's tokens,
            shifted.
        pads: Whether the model itself pads sequences further, at their end.
        refuses: Config flags with which the description does not hold, or `"attribute=value"`, and why.
        uniform: Config attributes that can say a uniform size: `"heads"`, `"kv_heads"`, `"ffn"` to attribute.
            A family that does not list `"heads"` derives the head size from their number, so stock
            transformers cannot hold fewer heads of the same size.

    Example:

        >>> from hf_kprune import Block, Stack
        >>> ffn = Block("ffn", inputs={"fc1": "f"}, output="fc2", stream="fc1")
        >>> len(Stack("encoder.layers", blocks=(ffn,)).blocks)
        1
    """

    layers: str
    blocks: tuple[Block, ...]
    returns: Returns = "y"
    parallel: bool = False
    residual: str = ""
    untouched: tuple[str, ...] | Mapping[str, str] = ()
    heads: str = "num_attention_heads"
    kv_heads: str = "num_key_value_heads"
    head_dim: str = "head_dim"
    routes: str = "num_experts_per_tok"
    experts: tuple[str, ...] = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    groups: tuple[str, str] = ("n_group", "topk_group")
    mask: str = "attention_mask"
    reads: str = ""
    shares: str = ""
    runs: str = ""
    versions: str = ""
    packed: bool = False
    outlets: str = ""
    shifts: bool = False
    pads: bool = False
    refuses: Mapping[str, str] = field(default_factory=dict)
    uniform: Mapping[str, str] = field(default_factory=dict)


def _attention(
    module: str, output: str, qkv: str = "q_proj k_proj v_proj", kind: Kind = "attention", **rest: Any
) -> Block:
    """Attention whose `module` holds the three projections."""
    q, k, v = (f"{module}.{name}" for name in qkv.split())
    return Block(kind, inputs={q: "q", k: "kv", v: "kv"}, output=output, core=module, **rest)


def _ffn(inputs: str, output: str, stream: str | None) -> Block:
    return Block("ffn", inputs=dict.fromkeys(inputs.split(), "f"), output=output, stream=stream)


def _bert(
    reads: str | None = "intermediate.dense", core: str = "attention.self", **rest: Any
) -> tuple[Block, Block]:
    """BERT's layer. `reads` is the FFN's stream: a layer norm, where that comes first."""
    sizes: dict[str, Size] = {f"{core}.num_attention_heads": "heads", f"{core}.all_head_size": "width"}
    attention = _attention(core, "attention.output.dense", "query key value", sizes=sizes)
    return replace(attention, **rest), _ffn("intermediate.dense", "output.dense", reads)


def _albert(layer: str) -> tuple[Block, Block]:
    """One of the layers of a group of ALBERT's, which run in turn and as often as the group does."""
    core = f"{layer}.attention"
    sizes: dict[str, Size] = {f"{core}.num_attention_heads": "heads", f"{core}.all_head_size": "width"}
    attention = _attention(
        core, f"{core}.dense", "query key value", stream=core, norm=f"{core}.LayerNorm", sizes=sizes
    )
    return attention, _ffn(f"{layer}.ffn", f"{layer}.ffn_output", f"{layer}.ffn")


def _bart(
    pre_norm: bool, shifts: bool = False, sizes: Mapping[str, Size] = {"num_heads": "heads"}, **rest: Any
) -> tuple[Stack, Stack]:
    """BART's encoder and decoder. `pre_norm`: layer norms come before what they are for."""

    def attention(module: str, kind: Kind, stream: str) -> Block:
        paths = {f"{module}.{name}": size for name, size in sizes.items()}
        return _attention(module, f"{module}.out_proj", kind=kind, stream=stream, sizes=paths, **rest)

    itself = attention("self_attn", "attention", "")
    cross = attention(
        "encoder_attn", "cross_attention", "encoder_attn_layer_norm" if pre_norm else "encoder_attn"
    )
    ffn = _ffn("fc1", "fc2", "final_layer_norm" if pre_norm else "fc1")
    below = Stack(
        "encoder.layers", (itself, ffn), heads="encoder_attention_heads", uniform={"ffn": "encoder_ffn_dim"}
    )
    above = Stack(
        "decoder.layers",
        (itself, cross, ffn),
        heads="decoder_attention_heads",
        uniform={"ffn": "decoder_ffn_dim"},
    )
    return below, replace(above, mask="decoder_attention_mask", reads="encoder.layers", shifts=shifts)


def _t5(
    encoder: str = "SelfAttention",
    ffn: str = "DenseReluDense",
    core: Returns = ("y", None, None),
    **rest: object,
) -> tuple[Stack, Stack]:
    """T5's encoder and decoder. Every layer asks its own table of positions, not the layer below."""

    def attention(number: int, name: str, kind: Kind = "attention") -> Block:
        module = f"layer.{number}.{name}"
        return _attention(
            module,
            f"{module}.o",
            "q k v",
            kind,
            stream=f"layer.{number}.layer_norm",
            returns=core,
            sizes={f"{module}.n_heads": "heads", f"{module}.inner_dim": "width"},
            table=f"{module}.relative_attention_bias" if kind == "attention" else "",
            select={"position_bias": "none"},
        )

    def feed_forward(number: int) -> Block:
        layer = f"layer.{number}"
        return _ffn(
            " ".join(f"{layer}.{ffn}.{name}" for name in ("wi", "wi_0", "wi_1")),
            f"{layer}.{ffn}.wo",
            f"{layer}.layer_norm",
        )

    below = Stack("encoder.block", (attention(0, encoder), feed_forward(1)))
    blocks = (
        attention(0, "SelfAttention"),
        attention(1, "EncDecAttention", "cross_attention"),
        feed_forward(2),
    )
    above = Stack("decoder.block", blocks, mask="decoder_attention_mask", reads="encoder.block")
    shared: dict[str, Any] = {"returns": core, "heads": "num_heads", "head_dim": "d_kv", **rest}
    return replace(below, **shared), replace(above, **shared)


_FFN_SIZE = {"ffn": "intermediate_size"}
_BERT = Stack("encoder.layer", _bert(), uniform=_FFN_SIZE)


def _bert_cross(core: str = "crossattention.self") -> Block:
    """The cross-attention of a BERT that is a decoder."""
    sizes: dict[str, Size] = {f"{core}.num_attention_heads": "heads", f"{core}.all_head_size": "width"}
    output, qkv = "crossattention.output.dense", "query key value"
    return _attention(core, output, qkv, "cross_attention", stream=core, sizes=sizes)


_BERT_DECODER = replace(_BERT, blocks=(_BERT.blocks[0], _bert_cross(), _BERT.blocks[1]))
_QFORMER = replace(
    _BERT,
    blocks=(
        _bert(core="attention.attention")[0],
        _bert_cross("crossattention.attention"),
        _ffn("intermediate_query.dense", "output_query.dense", "intermediate_query.dense"),
    ),
    untouched=("intermediate", "output"),
    mask="",
)
_BERT_PAIR = replace(_BERT, returns=("y", None))
_BERT_SINGLE = replace(_BERT, blocks=_bert(returns=("y",)), returns=("y",))
_VIT = Stack(
    "layers",
    (
        _attention("attention", "attention.o_proj", sizes={"attention.num_attention_heads": "heads"}),
        _ffn("mlp.fc1", "mlp.fc2", "layernorm_after"),
    ),
    mask="",
    uniform={"heads": "num_attention_heads", **_FFN_SIZE},
)
_VIT_NESTED = replace(_BERT, blocks=_bert("layernorm_after", "attention.attention"), mask="")
_DINO = Stack(
    "encoder.layer",
    (
        _attention(
            "attention", "attention.o_proj", sizes={"attention.num_attention_heads": "heads"}, stream=None
        ),
        _ffn("mlp.fc1", "mlp.fc2", None),
        _ffn("mlp.gate_proj mlp.up_proj", "mlp.down_proj", None),
    ),
    mask="",
)
_CLIP = Stack(
    "encoder.layers",
    (
        _attention("self_attn", "self_attn.out_proj", sizes={"self_attn.num_heads": "heads"}),
        _ffn("mlp.fc1", "mlp.fc2", "layer_norm2"),
    ),
    uniform=_FFN_SIZE,
)
_CLIP_VISION = replace(_CLIP, mask="")
_BLIP_VISION = replace(
    _CLIP_VISION,
    blocks=(
        Block(
            "attention",
            inputs={"self_attn.qkv": "qkv"},
            output="self_attn.projection",
            core="self_attn",
            obstacle="its heads are reshaped to the hidden size",
        ),
        _CLIP.blocks[1],
    ),
)
_WAV2VEC2 = Stack(
    "encoder.layers",
    (
        _attention("attention", "attention.out_proj", sizes={"attention.num_heads": "heads"}),
        _ffn(
            "feed_forward.intermediate_dense",
            "feed_forward.output_dense",
            "final_layer_norm|feed_forward.intermediate_dense",  # with and without do_stable_layer_norm
        ),
    ),
    untouched=("adapter_layer",),
    uniform=_FFN_SIZE,
)
_HEAD_SIZES = {"heads": "num_attention_heads", "kv_heads": "num_key_value_heads"}
_LLAMA_ATTENTION = _attention(
    "self_attn",
    "self_attn.o_proj",
    sizes={
        "self_attn.num_heads": "heads",
        "self_attn.num_attention_heads": "heads",
        "self_attn.num_key_value_heads": "kv_heads",
        "self_attn.num_key_value_groups": "groups",
    },
    slices={"self_attn.sinks": 0},
)
_LLAMA_FFN = Block(
    "ffn",
    inputs={"mlp.gate_proj": "f", "mlp.up_proj": "f", "mlp.gate_up_proj": "2f"},
    output="mlp.down_proj",
    stream="post_attention_layernorm",
)
_LLAMA = Stack("layers", (_LLAMA_ATTENTION, _LLAMA_FFN), uniform={**_HEAD_SIZES, **_FFN_SIZE})
_LLAMA_WHOLE = replace(_LLAMA_ATTENTION, obstacle="its queries and keys are normalised across heads")
_NORM_AFTER = replace(
    _LLAMA, blocks=(replace(_LLAMA_ATTENTION, stream=None), replace(_LLAMA_FFN, stream=None))
)
_OLMO2 = replace(
    _NORM_AFTER, blocks=(replace(_LLAMA_WHOLE, stream=None), _NORM_AFTER.blocks[1]), uniform=_FFN_SIZE
)
# `parallel` also where an option of the model says no: the stream is what came in and what was added, either
# way
_PARALLEL = replace(
    _LLAMA, blocks=(_LLAMA_ATTENTION, replace(_LLAMA_FFN, stream="")), parallel=True, uniform=_FFN_SIZE
)


def _experts(module: str = "mlp.experts", stream: str | None = "post_attention_layernorm") -> Block:
    """Experts whose tensors are (experts, rows, columns), beside a router of any of the names that such have.

    Its logits, and what is added to them, are of its own or of the module that both are in.
    """
    around = module.removesuffix("experts")
    routers = tuple(f"{around}{name}" for name in ("gate", "router", "gate.wg", "router.gate", "router.proj"))
    biases = (
        "e_score_correction_bias",
        "expert_bias",
        "gate.e_score_correction_bias",
        "router.per_expert_scale",
    )
    return Block(
        "experts",
        inputs={},
        output=module,
        stream=stream,
        slices={f"{module}.gate_up_proj": 1, f"{module}.up_proj": 1, f"{module}.down_proj": 2},
        router={
            **{f"{path}.{name}": 0 for path in routers for name in ("weight", "bias")},
            **{f"{around}{name}": 0 for name in biases},
            f"{around}gate.moe_statics.e_score_correction_bias": 1,
        },
        sizes={
            f"{module}.intermediate_dim": "width",
            **{f"{path}.num_experts": "experts" for path in (module, *routers)},
            **{f"{path}.out_features": "experts" for path in routers},
        },
    )


_EXPERTS = _experts()
_GEMMA4 = replace(
    _NORM_AFTER,
    blocks=(
        replace(_NORM_AFTER.blocks[0], stays="self_attn.store_full_length_kv"),
        _NORM_AFTER.blocks[1],
        _experts("experts", None),
    ),
    untouched=("router", "per_layer_input_gate", "per_layer_projection"),
    routes="top_k_experts",
    shares="shared_kv_states",
    uniform={},
)
_GEMMA4_VISION = replace(
    _NORM_AFTER,
    layers="encoder.layers",
    # each projection is in a module that clips what it reads and gives
    blocks=tuple(
        replace(
            block,
            inputs={f"{p}.linear": layout for p, layout in block.inputs.items()},
            output=f"{block.output}.linear",
        )
        for block in _NORM_AFTER.blocks
    ),
    mask="",
)
_GEMMA3N = replace(
    _GEMMA4,
    blocks=(_GEMMA4.blocks[0], replace(_GEMMA4.blocks[1], stays="mlp.activation_sparsity")),
    untouched=("altup", "laurel", "per_layer_input_gate", "per_layer_projection"),
    versions="altup_num_inputs",
)
_SHARED_EXPERT, _SHARED_EXPERTS = (
    _ffn(f"mlp.{shared}.gate_proj mlp.{shared}.up_proj", f"mlp.{shared}.down_proj", None)
    for shared in ("shared_expert", "shared_experts")
)
_MOE = replace(
    _LLAMA,
    blocks=(_LLAMA_ATTENTION, _LLAMA_FFN, _SHARED_EXPERT, _EXPERTS, _SHARED_EXPERTS),
    untouched=("mlp.gate", "mlp.router", "mlp.shared_expert_gate"),
    uniform=_HEAD_SIZES,
)
# heads of latent attention are rows of the projections from the latent vectors, which all heads share
_LATENT_DENSE = replace(
    _LLAMA,
    blocks=(
        Block(
            "attention",
            inputs={"self_attn.q_proj": "q", "self_attn.q_b_proj": "q", "self_attn.kv_b_proj": "kv:latent"},
            output="self_attn.o_proj",
            core="self_attn",
            sizes={"self_attn.num_heads": "heads"},
        ),
        _LLAMA_FFN,
    ),
    untouched=("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"),
    head_dim="v_head_dim",
    uniform={},
)
_LATENT = replace(
    _LATENT_DENSE,
    blocks=(_LATENT_DENSE.blocks[0], *_MOE.blocks[1:]),
    untouched=(*_MOE.untouched, *_LATENT_DENSE.untouched),
)
# in some layers linear attention stands where attention does in others, with projections of the same names
_KIMI_LINEAR = replace(
    _LATENT,
    untouched=(
        *_LATENT.untouched,
        *(f"self_attn.{name}" for name in ("k_proj", "v_proj", "b_proj", "g_a_proj", "g_b_proj")),
        "self_attn.conv1d",
        "self_attn.forget_gate",
    ),
)
# two attentions and two FFNs in a layer; what the experts give joins together with the second FFN
_LONGCAT = replace(
    _LATENT_DENSE,
    blocks=tuple(
        block
        for number in (0, 1)
        for block in (
            replace(
                _LATENT_DENSE.blocks[0],
                inputs={f"self_attn.{number}.q_b_proj": "q", f"self_attn.{number}.kv_b_proj": "kv:latent"},
                output=f"self_attn.{number}.o_proj",
                stream=f"input_layernorm.{number}",
                core=f"self_attn.{number}",
                sizes={f"self_attn.{number}.num_heads": "heads"},
            ),
            _ffn(
                f"mlps.{number}.gate_proj mlps.{number}.up_proj",
                f"mlps.{number}.down_proj",
                None if number else "post_attention_layernorm.0",
            ),
        )
    ),
    untouched={
        "mlp": "some of its experts pass tokens on as they are, and its parameters differ in their number",
        **dict.fromkeys(
            (
                f"self_attn.{number}.{name}"
                for number in (0, 1)
                for name in ("q_a_proj", "kv_a_proj_with_mqa")
            ),
            "",
        ),
    },
)
_MOE_LAST = replace(_MOE, blocks=(_LLAMA_ATTENTION, _LLAMA_FFN, _SHARED_EXPERTS, _EXPERTS))
_MOE_ALONE = replace(_MOE, uniform={**_HEAD_SIZES, "experts": "intermediate_size"})
_MOE_WHOLE = replace(_MOE, blocks=(_LLAMA_WHOLE, _EXPERTS), uniform={"experts": "intermediate_size"})
_GPT_OSS = replace(
    _MOE_ALONE,
    blocks=(
        _LLAMA_ATTENTION,
        replace(
            _EXPERTS,
            slices={
                "mlp.experts.gate_up_proj": 2,
                "mlp.experts.gate_up_proj_bias": 1,
                "mlp.experts.down_proj": 1,
            },
            sizes={**_EXPERTS.sizes, "mlp.experts.intermediate_size": "width"},
        ),
    ),
)
_GRANITE_MOE = replace(
    _LLAMA,
    blocks=(
        _LLAMA_ATTENTION,
        _experts("block_sparse_moe.experts"),
        Block(
            "ffn", inputs={"shared_mlp.input_linear": "2f"}, output="shared_mlp.output_linear", stream=None
        ),
    ),
    residual="residual_multiplier",
    untouched=("block_sparse_moe.router",),
    uniform={**_HEAD_SIZES, "ffn": "shared_intermediate_size", "experts": "intermediate_size"},
)
_LLAMA4 = replace(
    _LLAMA,
    blocks=(
        _LLAMA_ATTENTION,
        *(
            _ffn(f"{path}.gate_proj {path}.up_proj", f"{path}.down_proj", "post_attention_layernorm")
            for path in ("feed_forward", "feed_forward.shared_expert")
        ),
    ),
    untouched={
        "feed_forward.router": "",
        "feed_forward.experts": (
            "its experts read what was multiplied by the router's weights before, and give one output each"
        ),
    },
    uniform=_HEAD_SIZES,
)
# hybrids: what mixes tokens otherwise in some layers (a convolution, Mamba, linear attention) stays as it is
_LLAMA_GATED = replace(
    _LLAMA_ATTENTION,
    inputs={"self_attn.q_proj": "2q", "self_attn.k_proj": "kv", "self_attn.v_proj": "kv"},
)
_QWEN3_NEXT = replace(
    _MOE, blocks=(_LLAMA_GATED, *_MOE.blocks[1:]), untouched=(*_MOE.untouched, "linear_attn")
)
_BAMBA_FFN = _ffn("feed_forward.gate_proj feed_forward.up_proj", "feed_forward.down_proj", "pre_ff_layernorm")
_BAMBA = replace(_LLAMA, blocks=(_LLAMA_ATTENTION, _BAMBA_FFN), untouched=("mamba",), returns=("y", None))
_LFM2 = replace(
    _LLAMA,
    blocks=(
        _attention("self_attn", "self_attn.out_proj", sizes={"self_attn.num_key_value_groups": "groups"}),
        _ffn("feed_forward.w1 feed_forward.w3", "feed_forward.w2", "ffn_norm"),
    ),
    untouched=("conv",),
    uniform=_HEAD_SIZES,
)
_RECURRENT_GEMMA = replace(
    _LLAMA,
    blocks=(
        _attention(
            "temporal_block",
            "temporal_block.o_proj",
            sizes={
                "temporal_block.num_attention_heads": "heads",
                "temporal_block.num_key_value_heads": "kv_heads",
                "temporal_block.num_key_value_groups": "groups",
            },
        ),
        _ffn("mlp_block.gate_proj mlp_block.up_proj", "mlp_block.down_proj", "channel_pre_norm"),
    ),
    untouched=tuple(
        f"temporal_block.{name}" for name in ("linear_y", "linear_x", "linear_out", "conv_1d", "rg_lru")
    ),
    uniform={},
)
_NEMOTRON_H = replace(
    _LLAMA,
    blocks=(
        _attention("mixer", "mixer.o_proj", sizes={"mixer.num_key_value_groups": "groups"}),
        _ffn("mixer.up_proj", "mixer.down_proj", ""),
        _experts("mixer.experts", None),
        _ffn("mixer.shared_experts.up_proj", "mixer.shared_experts.down_proj", ""),
    ),
    untouched=tuple(
        f"mixer.{name}"
        for name in (
            "in_proj",
            "conv1d",
            "norm",
            "out_proj",
            "gate",
            "fc1_latent_proj",
            "fc2_latent_proj",
        )
    ),
    uniform=_HEAD_SIZES,
)
_CONFORMER_ATTENTION = _attention(
    "self_attn",
    "self_attn.linear_out",
    "linear_q linear_k linear_v",
    sizes={"self_attn.num_heads": "heads"},
    slices={"self_attn.pos_bias_u": 0, "self_attn.pos_bias_v": 0},
    stream="self_attn_layer_norm",
)
_CONFORMER = Stack(
    "encoder.layers",
    (
        _ffn("ffn1.intermediate_dense", "ffn1.output_dense", None),  # half of its output joins the stream
        replace(_CONFORMER_ATTENTION, inputs={**_CONFORMER_ATTENTION.inputs, "self_attn.linear_pos": "kv"}),
        _ffn("ffn2.intermediate_dense", "ffn2.output_dense", None),
    ),
    untouched=("conv_module",),
    uniform=_FFN_SIZE,
    refuses={
        "position_embeddings_type=rotary": (
            "what its queries and keys are made of is cut into as many parts as there are heads, before any "
            "projection"
        )
    },
)
_PARAKEET_ATTENTION = _attention(
    "self_attn",
    "self_attn.o_proj",
    sizes={"self_attn.num_key_value_groups": "groups", "self_attn.config.num_attention_heads": "heads"},
    slices={"self_attn.bias_u": 0, "self_attn.bias_v": 0},
    stream="norm_self_att",
)
_PARAKEET = Stack(
    "layers",
    (
        _ffn("feed_forward1.linear1", "feed_forward1.linear2", None),
        replace(
            _PARAKEET_ATTENTION, inputs={**_PARAKEET_ATTENTION.inputs, "self_attn.relative_k_proj": "kv"}
        ),
        _ffn("feed_forward2.linear1", "feed_forward2.linear2", None),
    ),
    untouched=("conv",),
    uniform=_FFN_SIZE,
)
_NEOX_FFN = _ffn("mlp.dense_h_to_4h", "mlp.dense_4h_to_h", "post_attention_layernorm")
_OPT = Stack(
    "decoder.layers",
    (
        _attention(
            "self_attn",
            "self_attn.out_proj",
            sizes={"self_attn.num_heads": "heads", "self_attn.embed_dim": "width"},
        ),
        _ffn("fc1", "fc2", "final_layer_norm|fc1"),
    ),
    uniform={"ffn": "ffn_dim"},
)
_GPT2 = Stack(
    "h",
    (
        Block(
            "attention",
            inputs={"attn.c_attn": "qkv"},
            output="attn.c_proj",
            core="attn",
            sizes={"attn.num_heads": "heads", "attn.embed_dim": "width", "attn.split_size": "width"},
        ),
        Block(
            "cross_attention",
            inputs={"crossattention.q_attn": "q", "crossattention.c_attn": "2kv"},
            output="crossattention.c_proj",
            core="crossattention",
            stream="ln_cross_attn",
            sizes={"crossattention.num_heads": "heads", "crossattention.split_size": "width"},
        ),
        _ffn("mlp.c_fc", "mlp.c_proj", "ln_2"),
    ),
    uniform={"ffn": "n_inner"},
)
_BLOOM = Stack(
    "h",
    (
        Block(
            "attention",
            inputs={"self_attention.query_key_value": "qkv:perhead"},
            output="self_attention.dense",
            core="self_attention",
            returns=("y+residual", None),
            sizes={"self_attention.num_heads": "heads", "self_attention.num_kv_heads": "kv_heads"},
            select={"alibi": "0:batch"},
        ),
        _NEOX_FFN,
    ),
    returns=("y", None),
    refuses={
        "apply_residual_connection_post_layernorm": (
            "the residual is then the output of a norm, which is not described"
        )
    },
)

# types of which parts stay: users are told why
_NEURONS = replace(_BERT, blocks=_BERT.blocks[1:])
_FUSED_IN_FOUR = (
    "its fused projection holds four parts of queries, values and keys, which must stay of one size"
)
_WINDOWS = "its windows lie beside the images of a batch, which are not what calibration tells apart"


def _swin(
    *ffn: Block, returns: Returns = ("y",), stages: str = "layers", layers: str = "blocks"
) -> tuple[Stack, ...]:
    """Swin's stages, each of which may have its own width."""
    return tuple(
        Stack(
            f"encoder.{stages}.{stage}.{layers}",
            ffn,
            returns=returns,
            mask="",
            untouched={"attention": _WINDOWS},
        )
        for stage in range(8)
    )


_SWIN = _swin(
    _ffn("mlp.fc1", "mlp.fc2", "layernorm_after"),
    _ffn("intermediate.dense", "output.dense", "layernorm_after"),  # in MaskFormer
    returns=("y", None),
)


def _detr(heads: str, *attentions: Block) -> Stack:
    """A list of DETR's layers: attentions, and an FFN."""
    return Stack("", (*attentions, _ffn("mlp.fc1", "mlp.fc2", "mlp")), heads=heads, mask="")


_DETR_ATTENTION = _attention("self_attn", "self_attn.o_proj")
_DETR_ENCODER = replace(_detr("encoder_attention_heads", _DETR_ATTENTION), layers="encoder.layers")
_DETR_DECODER = replace(
    _detr(
        "decoder_attention_heads",
        _DETR_ATTENTION,
        _attention("encoder_attn", "encoder_attn.o_proj", kind="cross_attention", stream="encoder_attn"),
    ),
    layers="decoder.layers",
    reads="encoder.layers",
)
_RESHAPED = "its heads are reshaped to the hidden size"
_DETR_WHOLE = replace(
    _DETR_ENCODER,
    blocks=(
        _attention("self_attn", "self_attn.out_proj", obstacle=_RESHAPED),
        _ffn("fc1", "fc2", "final_layer_norm|fc1"),
    ),
    returns=("y",),
)
_TABLE_TRANSFORMER = replace(
    _DETR_DECODER,
    blocks=(
        _DETR_WHOLE.blocks[0],
        _attention(
            "encoder_attn",
            "encoder_attn.out_proj",
            kind="cross_attention",
            stream="encoder_attn_layer_norm",
            obstacle=_RESHAPED,
        ),
        _DETR_WHOLE.blocks[1],
    ),
    returns=("y",),
)


def _conditional(module: str, kind: Kind, stream: str) -> Block:
    """Attention whose queries and keys have projections of their own for positions."""
    queries, keys = ("q_content_proj", "q_pos_proj", "q_pos_sine_proj"), ("k_content_proj", "k_pos_proj")
    inputs: dict[str, Layout] = {f"{module}.{name}": "q" for name in queries}
    return Block(
        kind,
        inputs={**inputs, **{f"{module}.{name}": "kv" for name in (*keys, "v_proj")}},
        output=f"{module}.o_proj",
        core=module,
        stream=stream,
        sizes={f"{module}.num_attention_heads": "heads"},
    )


_CONDITIONAL_DETR = replace(
    _DETR_DECODER,
    blocks=(
        _conditional("self_attn", "attention", ""),
        _conditional("encoder_attn", "cross_attention", "encoder_attn"),
        _DETR_DECODER.blocks[2],
    ),
)
_RT_DETR = replace(
    _DETR_ENCODER,
    layers="encoder.aifi.0.layers",
    head_dim="encoder_hidden_dim / encoder_attention_heads",
)
_SAMPLED = "its heads read a few points each, which other projections than queries and keys choose"
_DEFORMABLE_DETR = replace(_DETR_ENCODER, blocks=_DETR_ENCODER.blocks[1:], untouched={"self_attn": _SAMPLED})
_MERGED = "its keys and values are those of fewer tokens, which a convolution merges"


def _mixed(stage: str, ffn: Block, returns: Returns) -> tuple[Stack, ...]:
    """SegFormer's stages, each of which has its own width: a convolution mixes each neuron over the image."""
    neurons = replace(
        ffn,
        core="mlp",
        returns="y",
        slices={"mlp.dwconv.dwconv.weight": 0, "mlp.dwconv.dwconv.bias": 0},
        sizes={f"mlp.dwconv.dwconv.{size}": "width" for size in ("in_channels", "out_channels", "groups")},
    )
    return tuple(
        Stack(stage.format(i), (neurons,), returns=returns, mask="", untouched={"attention": _MERGED})
        for i in range(8)
    )


_PVT_FFN = _ffn("mlp.dense1", "mlp.dense2", "layer_norm_2")

_MOBILEBERT = replace(
    _BERT,
    blocks=(
        replace(_BERT.blocks[0], stream=None),
        *(
            _ffn(f"ffn.{i}.intermediate.dense", f"ffn.{i}.output.dense", f"ffn.{i}.intermediate.dense")
            for i in range(3)
        ),
        _BERT.blocks[1],
    ),
    untouched=("bottleneck", "output.bottleneck"),
    head_dim="true_hidden_size / num_attention_heads",
    uniform={},
)
_BIG_BIRD = {
    "attention_type=block_sparse": (
        "it then exchanges its attention modules while it runs, by the length of the input; load it with "
        "attention_type='original_full'"
    )
}
_AIMV2 = replace(
    _CLIP,
    blocks=(
        _attention("attention", "attention.out_proj", sizes={"attention.num_heads": "heads"}),
        _ffn("ffn.gate_proj ffn.up_proj", "ffn.down_proj", "rms_norm2"),
    ),
)
_GATED = replace(_LLAMA_ATTENTION, inputs={**_LLAMA_ATTENTION.inputs, "self_attn.gate_proj": "q"})
_GATED_HEADS = replace(_LLAMA_ATTENTION, inputs={**_LLAMA_ATTENTION.inputs, "self_attn.g_proj": "h"})


def _packed(
    ffn: Block, width: str = "hidden_size", outlets: str = "", qkv: Mapping[str, Layout] = {"attn.qkv": "qkv"}
) -> tuple[Stack]:
    """A tower of images that reads the patches of all of them as one sequence."""
    attention = Block(
        "attention",
        inputs=qkv,
        output="attn.proj",
        stream="norm1",
        core="attn",
        returns="y",
        sizes={
            "attn.num_heads": "heads",
            "attn.num_key_value_heads": "kv_heads",
            "attn.num_key_value_groups": "groups",
            "attn.q_dim": "width",
            "attn.kv_dim": "kv_width",
        },
    )
    stack = Stack("blocks", (attention, ffn), mask="", packed=True, outlets=outlets, uniform=_FFN_SIZE)
    return (replace(stack, heads="num_heads", head_dim=f"{width} / num_heads"),)


_PACKED = _packed(_ffn("mlp.linear_fc1", "mlp.linear_fc2", "norm2"))
_PACKED_GATED = _packed(_ffn("mlp.gate_proj mlp.up_proj", "mlp.down_proj", "norm2"))
_PACKED_GLM = (replace(_PACKED_GATED[0], uniform={}),)  # what merges its patches is of that size too
_DEEPSTACK = _packed(_PACKED[0].blocks[1], outlets="deepstack_visual_indexes")
_PACKED_SOUND = (
    replace(
        _bart(pre_norm=True, returns="y")[0],
        layers="layers",
        mask="",
        packed=True,
        returns=("y",),
        uniform={},
    ),
)


FAMILIES: dict[str, tuple[Stack, ...]] = {
    # BERT and its kin
    "bert": (_BERT_DECODER,),
    "bert-generation": (_BERT_DECODER,),
    "camembert": (_BERT_DECODER,),
    "chinese_clip_text_model": (_BERT,),
    "altclip_text_model": (replace(_BERT, layers="roberta.encoder.layers"),),
    "data2vec-text": (_BERT_DECODER,),
    "electra": (_BERT_DECODER,),
    "ernie": (_BERT_DECODER,),
    "layoutlm": (_BERT,),
    "markuplm": (_BERT,),
    "roberta": (_BERT_DECODER,),
    "roc_bert": (_BERT_DECODER,),
    "splinter": (_BERT,),
    "xlm-roberta": (_BERT_DECODER,),
    "esm": (replace(_BERT, blocks=_bert("LayerNorm")),),
    "megatron-bert": (replace(_BERT_PAIR, blocks=_bert("ln")),),
    "rembert": (_BERT_PAIR,),
    "roberta-prelayernorm": (replace(_BERT, blocks=_bert("intermediate.LayerNorm")),),
    "roformer": (_BERT_PAIR,),
    "tapas": (_BERT_SINGLE,),
    "visual_bert": (_BERT_SINGLE,),
    "xlm-roberta-xl": (replace(_BERT, blocks=_bert("LayerNorm")),),
    "xmod": (
        replace(
            _BERT,
            blocks=_bert("output.LayerNorm|intermediate.dense"),  # with and without pre_norm
            untouched=("output.adapter_modules",),
        ),
    ),
    "yoso": (_BERT_SINGLE,),
    # other encoders of text
    "align_text_model": (_BERT,),
    "clap_text_model": (_BERT,),
    "dpr": (replace(_BERT, layers="bert_model.encoder.layer"),),
    "gte": (_NORM_AFTER,),
    "ultrabert": (_LLAMA,),
    "deberta": (
        replace(
            _BERT_PAIR,
            blocks=_bert(
                inputs={
                    "attention.self.in_proj": "qkv:perhead",
                    "attention.self.pos_proj": "kv",
                    "attention.self.pos_q_proj": "q",
                },
                slices={"attention.self.q_bias": 0, "attention.self.v_bias": 0},
            ),
        ),
    ),
    "deberta-v2": (
        replace(
            _BERT_PAIR,
            blocks=_bert(
                inputs={
                    "attention.self.query_proj": "q",
                    "attention.self.key_proj": "kv",
                    "attention.self.value_proj": "kv",
                    "attention.self.pos_key_proj": "kv",
                    "attention.self.pos_query_proj": "q",
                },
            ),
            head_dim="attention_head_size",
        ),
    ),
    "distilbert": (
        Stack(
            "transformer.layer",
            (
                _attention(
                    "attention",
                    "attention.out_lin",
                    "q_lin k_lin v_lin",
                    sizes={"attention.n_heads": "heads"},
                ),
                _ffn("ffn.lin1", "ffn.lin2", "ffn.lin1"),
            ),
            uniform={"ffn": "hidden_dim"},
        ),
    ),
    "longformer": (
        replace(
            _BERT_SINGLE,
            pads=True,
            blocks=_bert(
                inputs={
                    "attention.self.query": "q",
                    "attention.self.query_global": "q",
                    "attention.self.key": "kv",
                    "attention.self.key_global": "kv",
                    "attention.self.value": "kv",
                    "attention.self.value_global": "kv",
                },
                sizes={},
                returns=("y",),
                obstacle="its heads are reshaped to the hidden size",
                weights=False,
            ),
        ),
    ),
    "modernbert": (
        Stack(
            "layers",
            (
                Block("attention", inputs={"attn.Wqkv": "qkv"}, output="attn.Wo", core="attn"),
                Block("ffn", inputs={"mlp.Wi": "2f"}, output="mlp.Wo", stream="mlp_norm"),
            ),
            uniform=_FFN_SIZE,
        ),
    ),
    "mpnet": (
        replace(
            _BERT,
            blocks=(
                _attention(
                    "attention.attn",
                    "attention.attn.o",
                    "q k v",
                    sizes={
                        "attention.attn.num_attention_heads": "heads",
                        "attention.attn.all_head_size": "width",
                    },
                    select={"position_bias": 1},
                ),
                _BERT.blocks[1],
            ),
            returns=("y",),
        ),
    ),
    "eurobert": (_LLAMA,),
    "jina_embeddings_v3": (
        Stack(
            "layers",
            (_attention("self_attn", "self_attn.o_proj"), _ffn("mlp.fc1", "mlp.fc2", "mlp")),
            uniform=_FFN_SIZE,
        ),
    ),
    "nomic_bert": (
        Stack(
            "layers",
            (
                _attention("self_attn", "self_attn.o_proj"),
                _ffn("mlp.gate_proj mlp.up_proj", "mlp.down_proj", "mlp"),
            ),
            uniform={"heads": "num_attention_heads", **_FFN_SIZE},
        ),
    ),
    # encoder-decoders
    "bart": _bart(pre_norm=False, shifts=True),
    "blenderbot": _bart(pre_norm=True),
    "blenderbot-small": _bart(pre_norm=False),
    "led": (
        replace(
            _bart(pre_norm=False)[0],
            blocks=(
                replace(
                    _attention(
                        "self_attn.longformer_self_attn",
                        "self_attn.output",
                        "query key value",
                    ),
                    inputs={
                        f"self_attn.longformer_self_attn.{name}": "q" if "query" in name else "kv"
                        for name in ["query", "query_global", "key", "key_global", "value", "value_global"]
                    },
                    returns=("y",),
                    obstacle="its heads are reshaped to the hidden size",
                    weights=False,
                ),
                _ffn("fc1", "fc2", "fc1"),
            ),
            pads=True,
            returns=("y",),
        ),
        replace(
            _bart(
                pre_norm=False,
                shifts=True,
                returns=("y", None, None),
                obstacle="its heads are reshaped to the hidden size",
            )[1],
            returns=("y", None),
        ),
    ),
    "m2m_100": _bart(pre_norm=True),
    "marian": _bart(pre_norm=False),
    "mbart": _bart(pre_norm=True, shifts=True),
    "mvp": tuple(
        replace(stack, returns=returns)
        for stack, returns in zip(
            _bart(
                False,
                shifts=True,
                sizes={"num_heads": "heads", "embed_dim": "width"},
                select={"attn_prompt": 1},
            ),
            (("y", None), ("y",)),
            strict=True,
        )
    ),
    "pegasus": _bart(pre_norm=True),
    "plbart": _bart(pre_norm=False, shifts=True),
    "speech_to_text": _bart(pre_norm=True),
    "whisper": (replace(_bart(pre_norm=True)[0], mask=""), _bart(pre_norm=True)[1]),
    "longt5": (
        replace(_t5("LocalSelfAttention")[0], returns=("y", None)),
        replace(_t5()[1], returns=("y", None, None, None, None)),
    ),
    "mt5": _t5(),
    "pop2piano": _t5(),
    "switch_transformers": _t5(
        ffn="mlp",
        untouched={
            **dict.fromkeys(("layer.1.mlp.router", "layer.2.mlp.router"), ""),
            **dict.fromkeys(
                ("layer.1.mlp.experts", "layer.2.mlp.experts"),
                "each of its experts is a module by itself, and takes no more tokens than it has room for",
            ),
        },
    ),
    "t5": _t5(),
    "trocr": (
        replace(
            _bart(pre_norm=False, obstacle="its heads are reshaped to the hidden size")[1], returns=("y",)
        ),
    ),
    "umt5": _t5(core=("y", None), returns="y", uniform={"ffn": "d_ff"}),
    # images
    "pixio": (replace(_DINO, layers="layers"),),
    "radio": (_DINO,),
    "sapiens2": (replace(_DINO, layers="layer"),),
    "tipsv2_vision_model": (_DINO,),
    "beit": (
        replace(
            _VIT,
            blocks=(
                replace(_VIT.blocks[0], stream=None, select={"attention_mask": 1}),
                replace(_VIT.blocks[1], stream=None),
            ),
            uniform=_FFN_SIZE,
        ),
    ),
    "data2vec-vision": (
        replace(
            _BERT_PAIR,
            blocks=_bert(
                None,
                "attention.attention",
                stream=None,
                select={"relative_position_bias": 1},
                slices={"attention.attention.relative_position_bias.relative_position_bias_table": 1},
            ),
            mask="",
        ),
    ),
    "deit": (_VIT,),
    "dinov2": (_DINO,),
    "dinov2_with_registers": (_DINO,),
    "dinov3_vit": (
        Stack(
            "model.layer",
            (
                _attention(
                    "attention", "attention.o_proj", sizes={"attention.num_heads": "heads"}, stream=None
                ),
                _ffn("mlp.gate_proj mlp.up_proj", "mlp.down_proj", None),
            ),
            mask="",
            uniform=_FFN_SIZE,
        ),
    ),
    "dpt": (_VIT_NESTED,),
    "ijepa": (_VIT,),
    "videomae": (_VIT_NESTED,),
    "vit": (_VIT,),
    "vit_msn": (_VIT,),
    "vivit": (_VIT,),
    "yolos": (_VIT_NESTED,),
    # detection, segmentation, depth
    "conditional_detr": (_DETR_ENCODER, _CONDITIONAL_DETR),
    "d_fine": (replace(_RT_DETR, blocks=(_DETR_ATTENTION, _ffn("mlp.layers.0", "mlp.layers.1", "mlp"))),),
    "dab-detr": (_DETR_WHOLE,),
    "deformable_detr": (_DEFORMABLE_DETR,),
    "detr": (_DETR_ENCODER, _DETR_DECODER, replace(_DETR_DECODER, layers="layers")),  # MaskFormer's
    "glpn": _mixed("encoder.block.{}", _PVT_FFN, ("y",)),
    "maskformer-swin": _SWIN,
    "pvt_v2": _mixed("encoder.layers.{}.blocks", _PVT_FFN, ("y",)),
    "rt_detr": (_RT_DETR,),
    "rt_detr_v2": (_RT_DETR,),
    "sam_vision_model": (
        replace(
            _CLIP_VISION,
            layers="layers",
            blocks=(_ffn("mlp.lin1", "mlp.lin2", "layer_norm2"),),
            untouched={"attn": _WINDOWS},
            uniform={},
        ),
    ),
    "segformer": _mixed("stages.{}.blocks", _ffn("mlp.fc1", "mlp.fc2", "layernorm_after"), "y"),
    "table-transformer": (_DETR_WHOLE, _TABLE_TRANSFORMER),
    # images and text, tower by tower
    "clipseg_text_model": (_CLIP,),
    "clipseg_vision_model": (_CLIP_VISION,),
    "aimv2_vision_model": (replace(_AIMV2, mask=""),),
    "aimv2_text_model": (_AIMV2,),
    "flava_image_model": (replace(_VIT_NESTED, returns=("y",)),),
    "flava_text_model": (replace(_VIT_NESTED, returns=("y",), mask="attention_mask"),),
    "git_vision_model": (replace(_CLIP_VISION, layers="vision_model.encoder.layers"),),
    "owlvit_text_model": (_CLIP,),
    "owlvit_vision_model": (_CLIP_VISION,),
    "owlv2_text_model": (_CLIP,),
    "owlv2_vision_model": (_CLIP_VISION,),
    "tipsv2_text_model": (_CLIP,),
    "xclip_text_model": (_CLIP,),
    "blip_2_qformer": (_QFORMER,),
    "blip_2_vision_model": (_BLIP_VISION,),
    "blip_text_model": (_BERT_DECODER,),
    "blip_vision_model": (_BLIP_VISION,),
    "instructblip_qformer": (
        replace(
            _QFORMER,
            blocks=_QFORMER.blocks[:1],
            untouched=dict.fromkeys(
                (
                    "crossattention",
                    *(f"{name}{of}" for name in ("intermediate", "output") for of in ("", "_query")),
                ),
                "it reads a part of the tokens of its layer: the queries, or what is asked",
            ),
            mask="qformer_attention_mask",
        ),
    ),
    "instructblip_vision_model": (_BLIP_VISION,),
    "altclip_vision_model": (_CLIP_VISION,),
    "chinese_clip_vision_model": (_CLIP_VISION,),
    "clip_text_model": (_CLIP,),
    "clip_vision_model": (_CLIP_VISION,),
    "metaclip_2_text_model": (_CLIP,),
    "metaclip_2_vision_model": (_CLIP_VISION,),
    "siglip2_text_model": (_CLIP,),
    "siglip2_vision_model": (
        replace(_CLIP, mask="pixel_attention_mask", uniform={}),
    ),  # its head has an FFN of that size too
    "siglip_text_model": (_CLIP,),
    "siglip_vision_model": (replace(_CLIP_VISION, uniform={}),),
    "gemma4_vision": (_GEMMA4_VISION,),
    # sound
    "glmasr_encoder": (
        replace(
            _LLAMA,
            blocks=(_LLAMA_ATTENTION, _ffn("mlp.fc1", "mlp.fc2", "post_attention_layernorm")),
            mask="",
            uniform={},
        ),
    ),
    "audio-spectrogram-transformer": (_VIT,),
    "data2vec-audio": (_WAV2VEC2,),
    "hubert": (_WAV2VEC2,),
    "qwen2_audio_encoder": (replace(_bart(pre_norm=True)[0], layers="layers", mask=""),),
    "unispeech": (_WAV2VEC2,),
    "unispeech-sat": (_WAV2VEC2,),
    "voxtral_encoder": (replace(_bart(pre_norm=True)[0], layers="layers", mask=""),),
    "voxtral_realtime_encoder": (replace(_NORM_AFTER, mask="", uniform={}),),
    "wav2vec2": (_WAV2VEC2,),
    # decoders
    "afmoe": (
        replace(
            _MOE,
            blocks=(
                replace(_GATED, stream=None),
                replace(_LLAMA_FFN, stream=None),
                _SHARED_EXPERTS,
                replace(_EXPERTS, stream=None),
            ),
            uniform={},
        ),
    ),
    "aria_text": (
        replace(
            _MOE,
            blocks=(
                _LLAMA_ATTENTION,
                replace(_EXPERTS, slices={"mlp.experts.gate_up_proj": 2, "mlp.experts.down_proj": 1}),
                _SHARED_EXPERTS,
            ),
            routes="moe_topk",
            uniform={},
        ),
    ),
    "cohere2_moe": (
        replace(
            _MOE,
            parallel=True,
            blocks=(
                _LLAMA_ATTENTION,
                replace(_LLAMA_FFN, stream=""),
                replace(_EXPERTS, stream=""),
                _SHARED_EXPERTS,
            ),
            uniform={},
        ),
    ),
    "csm_depth_decoder_model": (_LLAMA,),
    "emu3_text_model": (_LLAMA,),
    "flint": (replace(_MOE, blocks=(_LLAMA_ATTENTION, _LLAMA_FFN, _EXPERTS, _SHARED_EXPERT)),),
    "granite4_vision_text": (replace(_LLAMA, residual="residual_multiplier"),),
    "hunyuan_v1_moe": (
        replace(
            _MOE,
            blocks=(
                _LLAMA_ATTENTION,
                _ffn("mlp.shared_mlp.gate_proj mlp.shared_mlp.up_proj", "mlp.shared_mlp.down_proj", None),
                _EXPERTS,
            ),
            routes="moe_topk",
            uniform={},
        ),
    ),
    "hy_v3": (_MOE,),
    "laguna": (
        replace(
            _MOE, blocks=(_GATED_HEADS, _LLAMA_FFN, _SHARED_EXPERT, _SHARED_EXPERTS, _EXPERTS), uniform={}
        ),
    ),
    "lfm3": (
        replace(
            _LFM2,
            blocks=(
                replace(_GATED_HEADS, stream=None),
                replace(_LFM2.blocks[1], stream=None),
            ),
        ),
    ),
    "mellum": (_MOE,),
    "minimax_m3_vl_text": (
        replace(
            _MOE,
            blocks=(
                _LLAMA_ATTENTION,
                _LLAMA_FFN,
                Block(
                    "ffn",
                    inputs={"mlp.shared_experts.gate_up_proj": "2f"},
                    output="mlp.shared_experts.down_proj",
                    stream=None,
                ),
                _EXPERTS,
            ),
            uniform={},
        ),
    ),
    "molmo2_text": (_LLAMA,),
    "muse_glimmer_text": (
        replace(_NORM_AFTER, blocks=(replace(_GATED, stream=None), _NORM_AFTER.blocks[1])),
    ),
    "openai_privacy_filter": (
        replace(_GPT_OSS, blocks=(_LLAMA_ATTENTION, replace(_GPT_OSS.blocks[1], stream=None)), uniform={}),
    ),
    "solar_open": (_MOE,),
    "apertus": (
        replace(_LLAMA, blocks=(_LLAMA_ATTENTION, replace(_LLAMA_FFN, stream="feedforward_layernorm"))),
    ),
    "arcee": (_LLAMA,),
    "biogpt": (replace(_OPT, layers="layers", uniform=_FFN_SIZE),),
    "bloom": (_BLOOM,),
    "cohere": (
        replace(
            _PARALLEL,
            blocks=(replace(_LLAMA_ATTENTION, obstacle="use_qk_norm"), replace(_LLAMA_FFN, stream="")),
        ),
    ),
    "cohere2": (_PARALLEL,),
    "ctrl": (
        Stack(
            "h",
            (
                _attention("multi_head_attention", "multi_head_attention.dense", "Wq Wk Wv"),
                _ffn("ffn.0", "ffn.2", "layernorm2"),
            ),
            uniform={"ffn": "dff"},
        ),
    ),
    "cwm": (_LLAMA,),
    "dots1": (_MOE,),
    "ernie4_5": (_LLAMA,),
    "ernie4_5_moe": (_MOE_LAST,),
    "exaone4": (_NORM_AFTER,),
    "exaone_moe": (_MOE,),
    "falcon": (
        replace(
            _BLOOM,
            blocks=(
                replace(_BLOOM.blocks[0], returns=("y", None), select={"alibi": 1, "attention_mask": 1}),
                replace(_NEOX_FFN, stream=""),
            ),
            parallel=True,
            kv_heads="new_decoder_architecture ? num_kv_heads : multi_query",
            uniform={"ffn": "ffn_hidden_size"},
        ),
    ),
    "flex_olmo": (replace(_MOE_WHOLE, blocks=(_OLMO2.blocks[0], replace(_EXPERTS, stream=None))),),
    "gemma": (_LLAMA,),
    "gemma2": (_NORM_AFTER,),
    "gemma3_text": (_NORM_AFTER,),
    "gemma4_text": (_GEMMA4,),
    "gemma3n_text": (_GEMMA3N,),
    "glm": (_LLAMA,),
    "glm4": (_NORM_AFTER,),
    "glm4_moe": (_MOE,),
    "gpt2": (_GPT2,),
    "gpt_bigcode": (
        replace(
            _GPT2,
            blocks=(
                replace(
                    _GPT2.blocks[0],
                    inputs={"attn.c_attn": "qkv:perhead"},
                    sizes={
                        **_GPT2.blocks[0].sizes,
                        "attn.kv_heads": "kv_heads",
                        "attn.num_key_value_groups": "groups",
                    },
                ),
                _GPT2.blocks[-1],
            ),
            kv_heads="multi_query",
        ),
    ),
    "gpt_neo": (
        Stack(
            "h",
            (
                _attention(
                    "attn.attention", "attn.attention.out_proj", sizes={"attn.attention.num_heads": "heads"}
                ),
                _GPT2.blocks[-1],
            ),
            returns=("y", None),
            uniform=_FFN_SIZE,
        ),
    ),
    "gpt_neox": (
        Stack(
            "layers",
            (
                Block(
                    "attention",
                    inputs={"attention.query_key_value": "qkv:perhead"},
                    output="attention.dense",
                    core="attention",
                ),
                replace(_NEOX_FFN, stream=""),
            ),
            parallel=True,
            uniform=_FFN_SIZE,
        ),
    ),
    "gpt_oss": (_GPT_OSS,),
    "gptj": (
        Stack(
            "h",
            (
                _attention("attn", "attn.out_proj", sizes={"attn.num_attention_heads": "heads"}),
                _ffn("mlp.fc_in", "mlp.fc_out", ""),
            ),
            returns=("y", None),
            parallel=True,
            uniform={"ffn": "n_inner"},
        ),
    ),
    "granite": (replace(_LLAMA, residual="residual_multiplier"),),
    "granite_swa": (replace(_LLAMA, residual="residual_multiplier"),),
    "granitemoe": (_GRANITE_MOE,),
    "granitemoe_swa": (_GRANITE_MOE,),
    "granitemoeshared": (_GRANITE_MOE,),
    "helium": (replace(_LLAMA, uniform=_FFN_SIZE),),
    "hunyuan_v1_dense": (_LLAMA,),
    "internlm3": (_LLAMA,),
    "iquestcoder": (_LLAMA,),
    "jais2": (_LLAMA,),
    "llama": (_LLAMA,),
    "llama4_text": (_LLAMA4,),
    "minimax_m2": (_MOE_WHOLE,),
    "ministral": (_LLAMA,),
    "ministral3": (_LLAMA,),
    "mistral": (_LLAMA,),
    "mixtral": (_MOE_ALONE,),
    "modernbert-decoder": (
        Stack(
            "layers",
            (
                _attention(
                    "attn", "attn.Wo", sizes={"attn.num_heads": "heads", "attn.all_head_size": "width"}
                ),
                Block("ffn", inputs={"mlp.Wi": "2f"}, output="mlp.Wo", stream="mlp_norm"),
            ),
            uniform=_FFN_SIZE,
        ),
    ),
    "mpt": (
        Stack(
            "blocks",
            (
                Block(
                    "attention",
                    inputs={"attn.Wqkv": "qkv"},
                    output="attn.out_proj",
                    core="attn",
                    sizes={"attn.n_heads": "heads"},
                    select={"position_bias": 0},
                ),
                _ffn("ffn.up_proj", "ffn.down_proj", "norm_2"),
            ),
            returns=("y", None),
        ),
    ),
    "nanochat": (
        replace(_LLAMA, blocks=(_LLAMA_ATTENTION, _ffn("mlp.fc1", "mlp.fc2", "post_attention_layernorm"))),
    ),
    "nemotron": (_LLAMA,),
    "olmo": (_LLAMA,),
    "olmo2": (_OLMO2,),
    "olmo3": (_OLMO2,),
    "olmoe": (_MOE_WHOLE,),
    "opt": (_OPT,),
    "persimmon": (
        Stack(
            "layers",
            (
                Block(
                    "attention",
                    inputs={"self_attn.query_key_value": "qkv:perhead"},
                    output="self_attn.dense",
                    core="self_attn",
                    sizes={"self_attn.num_heads": "heads"},
                ),
                _NEOX_FFN,
            ),
            uniform=_FFN_SIZE,
        ),
    ),
    "phi": (
        replace(
            _PARALLEL,
            blocks=(replace(_LLAMA_ATTENTION, output="self_attn.dense"), _ffn("mlp.fc1", "mlp.fc2", "")),
        ),
    ),
    "phi3": (
        replace(
            _LLAMA,
            blocks=(
                replace(
                    _LLAMA_ATTENTION,
                    inputs={"self_attn.qkv_proj": "qkv"},
                    sizes={**_LLAMA_ATTENTION.sizes, "self_attn.config.num_attention_heads": "heads"},
                ),
                _LLAMA_FFN,
            ),
        ),
    ),
    "phimoe": (_MOE_ALONE,),
    "qwen2": (_LLAMA,),
    "qwen2_moe": (_MOE,),
    "qwen3": (_LLAMA,),
    "qwen3_moe": (_MOE,),
    "seed_oss": (_LLAMA,),
    "smollm3": (_LLAMA,),
    "unlimited_ocr_text": (_MOE,),
    "stablelm": (
        replace(
            _PARALLEL,
            blocks=(replace(_LLAMA_ATTENTION, obstacle="qk_layernorm"), replace(_LLAMA_FFN, stream="")),
        ),
    ),
    "starcoder2": (
        replace(
            _LLAMA, blocks=(_LLAMA_ATTENTION, _ffn("mlp.c_fc", "mlp.c_proj", "post_attention_layernorm"))
        ),
    ),
    "vaultgemma": (
        replace(_LLAMA, blocks=(_LLAMA_ATTENTION, replace(_LLAMA_FFN, stream="pre_feedforward_layernorm"))),
    ),
    "xglm": (replace(_OPT, layers="layers"),),
    # latent attention
    "axk1": (_LATENT,),
    "deepseek_v2": (_LATENT,),
    "deepseek_v3": (_LATENT,),
    "deepseek_v32": (replace(_LATENT, untouched=(*_LATENT.untouched, "self_attn.indexer")),),
    "glm4_moe_lite": (_LATENT,),
    "minicpm3": (
        replace(_LATENT_DENSE, blocks=tuple(replace(block, stream=None) for block in _LATENT_DENSE.blocks)),
    ),
    "kimi_linear": (_KIMI_LINEAR,),
    "longcat_flash": (_LONGCAT,),
    "mistral4": (_LATENT,),
    "youtu": (_LATENT_DENSE,),
    # language towers
    "glm_image_text": (_NORM_AFTER,),
    "glm_ocr_text": (_NORM_AFTER,),
    "hunyuan_vl_text": (_LLAMA,),
    "paddleocr_vl_text": (_LLAMA,),
    "qwen2_5_omni_text": (_LLAMA,),
    "qwen3_omni_moe_text": (_MOE,),
    "glm4v_moe_text": (_MOE,),
    "glm4v_text": (_NORM_AFTER,),
    "qwen2_5_vl_text": (_LLAMA,),
    "qwen2_vl_text": (_LLAMA,),
    "qwen3_vl_moe_text": (_MOE,),
    "qwen3_vl_text": (_LLAMA,),
    # towers of images in vision-language models
    "idefics3_vision": (_CLIP_VISION,),
    "internvl_vision": (
        Stack(
            "encoder.layer",
            (
                _attention(
                    "attention",
                    "attention.projection_layer",
                    sizes={"attention.num_heads": "heads", "attention.embed_dim": "width"},
                    stream=None,
                    obstacle="use_qk_norm",
                ),
                _ffn("mlp.fc1", "mlp.fc2", None),
            ),
            mask="",
        ),
    ),
    "pixtral": (
        Stack(
            "transformer.layers",
            (
                _attention("attention", "attention.o_proj", sizes={"attention.num_heads": "heads"}),
                _ffn("feed_forward.gate_proj feed_forward.up_proj", "feed_forward.down_proj", "ffn_norm"),
            ),
            mask="",
            head_dim="hidden_size / num_attention_heads",
        ),
    ),
    "smolvlm_vision": (_CLIP_VISION,),
    "ovis2_vision": (replace(_AIMV2, layers="transformer.encoder.layers", mask="", uniform={}),),
    "video_llama_3_vision": (replace(_CLIP_VISION, packed=True),),
    "paddleocr_vl_vision": (replace(_CLIP_VISION, packed=True),),
    "exaone4_5_vision": _PACKED_GATED,
    "kimi_k25_vision": (
        replace(
            _packed(
                _ffn("mlp.fc1", "mlp.fc2", "norm2"),
                qkv={"attn.q_proj": "q", "attn.k_proj": "kv", "attn.v_proj": "kv"},
            )[0],
            layers="layers",
            heads="num_attention_heads",
            head_dim="hidden_size / num_attention_heads",
        ),
    ),
    "qwen2_5_omni_vision_encoder": _packed(
        _PACKED_GATED[0].blocks[1], qkv={"attn.q": "q", "attn.k": "kv", "attn.v": "kv"}
    ),
    "qwen3_omni_moe_vision_encoder": _DEEPSTACK,
    "qwen2_5_omni_audio_encoder": _PACKED_SOUND,
    "qwen3_omni_moe_audio_encoder": _PACKED_SOUND,
    "lfm3_vl_vision": (replace(_LFM2, mask="", packed=True, uniform={}),),
    "glm_ocr_vision": _PACKED_GLM,
    "glm4v_vision": _PACKED_GLM,
    "glm4v_moe_vision": _PACKED_GLM,
    "qwen2_vl_vision": (
        replace(_packed(_ffn("mlp.fc1", "mlp.fc2", "norm2"), width="embed_dim")[0], uniform={}),
    ),
    "qwen2_5_vl_vision": _PACKED_GATED,
    "qwen3_vl_vision": _DEEPSTACK,
    "qwen3_vl_moe_vision": _DEEPSTACK,
    "qwen3_5_vision": _PACKED,
    "qwen3_5_moe_vision": _PACKED,
    # hybrids
    "bamba": (_BAMBA,),
    "falcon_h1": (
        replace(
            _BAMBA,
            blocks=(replace(_LLAMA_ATTENTION, stream=None), replace(_BAMBA_FFN, stream=None)),
            returns=("y",),
        ),
    ),
    "granitemoehybrid": (replace(_GRANITE_MOE, untouched=("block_sparse_moe.router", "mamba")),),
    "jamba": (
        replace(
            _BAMBA,
            blocks=(*_BAMBA.blocks, _experts("feed_forward.experts", "pre_ff_layernorm")),
            returns="y",
            untouched=("mamba", "feed_forward.router"),
            uniform=_HEAD_SIZES,
        ),
    ),
    "lfm2": (_LFM2,),
    "lfm2_moe": (
        replace(
            _LFM2,
            blocks=(*_LFM2.blocks, _experts("feed_forward.experts", "ffn_norm")),
            untouched=("conv", "feed_forward.gate"),
        ),
    ),
    "minimax": (
        replace(
            _LLAMA,
            blocks=(replace(_LLAMA_ATTENTION, stream=None), _experts(stream=None)),
            untouched=(
                *(f"self_attn.{name}" for name in ("norm", "qkv_proj", "out_proj", "output_gate")),
                "mlp.gate",
            ),
            uniform={**_HEAD_SIZES, "experts": "intermediate_size"},
        ),
    ),
    "nemotron_h": (_NEMOTRON_H,),
    "olmo_hybrid": (replace(_OLMO2, untouched=("linear_attn",)),),
    "qwen3_5_text": (replace(_LLAMA, blocks=(_LLAMA_GATED, _LLAMA_FFN), untouched=("linear_attn",)),),
    "qwen3_5_moe_text": (_QWEN3_NEXT,),
    "qwen3_next": (_QWEN3_NEXT,),
    "recurrent_gemma": (_RECURRENT_GEMMA,),
    # layers that run several times
    "albert": (
        Stack(
            "encoder.albert_layer_groups",
            tuple(block for number in range(4) for block in _albert(f"albert_layers.{number}")),
            runs="num_hidden_layers",
            uniform=_FFN_SIZE,
        ),
    ),
    # types of which parts stay
    "big_bird": (replace(_BERT, refuses=_BIG_BIRD),),
    "bigbird_pegasus": (
        replace(
            _bart(pre_norm=True)[0],
            blocks=(
                _attention(
                    "self_attn.self",
                    "self_attn.output",
                    "query key value",
                    sizes={
                        "self_attn.self.num_attention_heads": "heads",
                        "self_attn.self.all_head_size": "width",
                    },
                ),
                _ffn("fc1", "fc2", "final_layer_norm"),
            ),
            refuses=_BIG_BIRD,
        ),
        _bart(pre_norm=True, shifts=True)[1],
    ),
    "bitnet": (
        replace(
            _LLAMA,
            blocks=(
                replace(
                    _LLAMA_ATTENTION, obstacle="its heads are normalised together before they are projected"
                ),
            ),
            untouched={"mlp": "its neurons are normalised together before they are projected"},
            uniform={},
        ),
    ),
    "codegen": (
        Stack(
            "h",
            (
                Block(
                    "attention",
                    inputs={"attn.qkv_proj": "qkv"},
                    output="attn.out_proj",
                    core="attn",
                    obstacle=_FUSED_IN_FOUR,
                ),
                _ffn("mlp.fc_in", "mlp.fc_out", ""),
            ),
            returns=("y", None),
            parallel=True,
            uniform={"ffn": "n_inner"},
        ),
    ),
    "convbert": (
        replace(
            _NEURONS,
            untouched={"attention": "half of it is a convolution whose kernels are made from all heads"},
        ),
    ),
    "diffllama": (
        replace(
            _LLAMA,
            blocks=(
                replace(
                    _LLAMA_ATTENTION, obstacle="its heads work in pairs, across the two halves of the heads"
                ),
                _LLAMA_FFN,
            ),
            uniform=_FFN_SIZE,
        ),
    ),
    "doge": (
        replace(
            _NORM_AFTER,
            blocks=(
                replace(
                    _LLAMA_ATTENTION, stream=None, obstacle="its mask is made from the values of all heads"
                ),
                replace(_LLAMA_FFN, stream=None),
            ),
            untouched=("self_attn.dt_proj",),
            uniform=_FFN_SIZE,
        ),
    ),
    "donut-swin": _swin(_ffn("intermediate.dense", "output.dense", "layernorm_after")),
    "fnet": (replace(_NEURONS, returns=("y",), mask=""),),
    "gpt_neox_japanese": (
        Stack(
            "layers",
            (_NEOX_FFN,),
            returns=("y", None),
            untouched={"attention": "the bias of its last attention is not one of a projection"},
        ),
    ),
    "mobilebert": (_MOBILEBERT,),
    "openai-gpt": (
        replace(
            _GPT2,
            blocks=(
                replace(
                    _GPT2.blocks[0],
                    sizes={"attn.n_head": "heads", "attn.split_size": "width"},
                    returns="[y]",
                ),
                _ffn("mlp.c_fc", "mlp.c_proj", "mlp.c_fc"),
            ),
            returns=("y",),
            uniform={},
        ),
    ),
    "swin": _SWIN,
    "swin2sr": _swin(_ffn("intermediate.dense", "output.dense", None), stages="stages", layers="layers"),
    "swinv2": _swin(_ffn("intermediate.dense", "output.dense", None)),
    "timesformer": (
        replace(
            _NEURONS,
            returns=("y",),
            mask="",
            blocks=(_ffn("intermediate.dense", "output.dense", "layernorm_after"),),
            untouched={
                "attention": "it takes the frames of a video apart",
                "temporal_attention": "it takes the patches of a video apart",
                "temporal_dense": "",
            },
        ),
    ),
    "wavlm": (
        replace(
            _WAV2VEC2,
            blocks=_WAV2VEC2.blocks[1:],
            returns=("y", None),
            shares="position_bias",
            untouched={
                "attention": "it is one torch function that takes no narrower projections",
                "adapter_layer": "",
            },
        ),
    ),
    # conformers
    "lasr_encoder": (_PARAKEET,),
    "wav2vec2-conformer": (_CONFORMER,),
    "parakeet_encoder": (_PARAKEET,),
    "wav2vec2-bert": (_CONFORMER,),
}


REFUSED: dict[str, str] = {
    "cpmant": "it puts tokens of a prompt before those that it is given",
    "flaubert": "its attentions and FFNs lie in lists of their own and no module is a layer",
    "fsmt": "its layers put time before the batch and reshape heads to the hidden size",
    "funnel": "it pools tokens between layers, and what its heads know of positions lies in no projections",
    "ibert": "its projections are modules of its own that can compute with integers, not nn.Linear",
    "reformer": "its layers are reversible and hash the queries",
    "sew": "its layers run on fewer tokens than its heads read",
    "sew-d": "its layers run on fewer tokens than its heads read",
    "squeezebert": "its projections are grouped convolutions",
    "vilt": "it draws anew in every pass which patches of an image it sees, and in which order",
    "vit_mae": "it hides other patches in every pass; load its encoder as a ViTModel",
    "xlm": "its attentions and FFNs lie in lists of their own and no module is a layer",
    "xlnet": "its attention weights are no projections, and it has two streams",
    "zamba": "layers far apart, with Mamba between them, share one attention and one FFN",
    "zamba2": "layers far apart, with Mamba between them, share attentions and FFNs, each with adapters",
}
"""Model types that cannot be described, and why."""


FEATURES = ("vision_feature_layer", "vision_feature_layers")
"""Config attributes by which models say which hidden states of their tower of images they read."""


_BOXES = {
    "decoder": "each of its layers moves the boxes that the next one looks at",
    "bbox_embed": "it makes boxes of what the layers give",
}
_JOINED = "it joins hidden states of several layers to an image"
PARTS: dict[str, dict[str, str]] = {
    "dpt": {"neck": _JOINED},
    "segformer": {"decode_head": _JOINED},
    **dict.fromkeys(
        ("qwen3_vl_vision", "qwen3_vl_moe_vision"),
        {"deepstack_merger_list": "each of it merges patches for one layer of language"},
    ),
    "qwen3_omni_moe_vision_encoder": {"merger_list": "each of it merges patches for one layer of language"},
    "zoedepth": {"neck": _JOINED, "metric_head": "it makes depths of what the neck gives"},
    **dict.fromkeys(("d_fine", "dab-detr", "deformable_detr", "rt_detr", "rt_detr_v2"), _BOXES),
    "mask2former": {
        "pixel_level_module.decoder": _SAMPLED,
        "transformer_module": "each of its layers decides where the next one looks",
    },
    "sam": {"mask_decoder": "it reads prompts and image in turns, so that no layers hand on one stream"},
}
"""Parts of models, by model type and path in the base model, that stay as they are, and why."""


def register_family(model_type: str, *stacks: Stack) -> None:
    """Describe the layers of a `model_type`, the one in a config, that is not known yet, or override one.

    Args:
        model_type: What the configs of such models name.
        stacks: Each list of layers of the model, from the lowest to the highest.

    Example:

        >>> from hf_kprune import Block, Stack, register_family
        >>> ffn = Block("ffn", inputs={"fc1": "f"}, output="fc2", stream="fc1")
        >>> register_family("mlp_only", Stack("encoder.layers", blocks=(ffn,)))
    """
    FAMILIES[model_type] = stacks
