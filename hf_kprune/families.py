"""Where each model family keeps its heads and neurons. Data only: no torch, no code keyed on a name.

To add a family, describe one of its layers (docs/add_a_family.md walks through it):

    register_family("bert", Stack("encoder.layer", (
        Block("attention",
              inputs={"attention.self.query": "q", "attention.self.key": "kv", "attention.self.value": "kv"},
              output="attention.output.dense", core="attention.self",
              sizes={"attention.self.num_attention_heads": "heads", "attention.self.all_head_size": "width"}),
        Block("ffn", inputs={"intermediate.dense": "f"}, output="output.dense", stream="intermediate.dense"))))
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Block:
    """One prunable sublayer of a layer. All paths are module paths relative to the layer.

    A *unit* is what is kept or pruned whole: an attention head (with grouped queries: a key-value head and its query
    heads, or one query head of every group) or an FFN neuron.

    A layer that lacks the `output` lacks the block (experts in its place, say), and an input that a layer lacks is not
    asked for, so one entry serves variants. What a layer has and the entry does not name is refused.

    Args:
        kind: `"attention"`, `"cross_attention"` or `"ffn"`.
        inputs: Projections whose output rows belong to units, each with the layout of its rows:
            `"q"` query heads, `"kv"` key or value heads, `"qkv"` all three fused one after the other, `"qkv:perhead"`
            the three fused group by group, `"f"` neurons, `"2f"` gate and up projections fused one after the other.
        output: Projection whose input columns belong to units. Its output is the sublayer's output.
        stream: Module that reads the residual stream which the output joins (a norm in pre-norm models, the FFN's
            first projection in post-norm ones); `""` if it is the layer's own input; None if the output is normalised or
            scaled before it joins: then weight tuning rebuilds the output alone.
        core: Attention module that is replaced when no head is left.
        returns: What `core` returns: `"y"` stands for the attention's output, `None` for None. A lone `"y"` that is not
            in a tuple is written `"y"`.
        sizes: Attributes to refresh after a cut, `"path.of.module.attribute"`: `"heads"` (query heads), `"kv_heads"`,
            `"groups"` (query heads per key-value head) or `"width"` (heads x head size). Missing ones are skipped. A path
            through a config (`"self_attn.config.num_attention_heads"`) gives the module a view of it with that value.
        select: Arguments of `core` that carry one slice per head, and where: `"1"` in dimension 1, `"0"` in dimension 0,
            `"0:batch"` in dimension 0 with the batch folded in before it; `"none"` passes None in its place.
        table: An embedding of relative positions with one column per head, which the first layer of the stack holds for
            all (T5). In a pruned model every layer has its own.
        whole: Why its heads cannot be told apart (a norm across all of them): then all of them are one unit. `""` if
            they can.
    """

    kind: str
    inputs: Mapping[str, str]
    output: str
    stream: str | None = ""
    core: str = ""
    returns: tuple[str | None, ...] | str = ("y", None)
    sizes: Mapping[str, str] = field(default_factory=dict)
    select: Mapping[str, str] = field(default_factory=dict)
    table: str = ""
    whole: str = ""


@dataclass(frozen=True)
class Stack:
    """A list of layers of one kind.

    Args:
        layers: Path of the `ModuleList`, seen from the base model.
        blocks: The sublayers of one layer, in the order in which they run.
        returns: What a layer returns: `"y"` (the hidden states alone) or a tuple in which `"y"` stands for them.
        parallel: Whether all blocks of a layer read the layer's input and their outputs are added up; or the config
            attribute that tells.
        residual: Config attribute that multiplies every sublayer's output before it joins the stream; `""` for none.
        untouched: Module paths in the layer whose projections are left as they are (experts, routers).
        heads: Config attribute with the number of query heads.
        kv_heads: Config attribute with the number of key-value heads, where there is one.
        head_dim: Config attribute with the size of a head, where there is one; else hidden size / heads.
        mask: Model input that tells padding of this stack's tokens; `""` if there is none.
        reads: Path of the stack that the keys and values of cross-attention come from.
        uniform: Config attributes that can say a uniform size: `"heads"`, `"kv_heads"`, `"ffn"` to attribute. A family
            that does not list `"heads"` derives the head size from them, so stock transformers cannot hold fewer heads.
    """

    layers: str
    blocks: tuple[Block, ...]
    returns: tuple[str | None, ...] | str = "y"
    parallel: bool | str = False
    residual: str = ""
    untouched: tuple[str, ...] = ()
    heads: str = "num_attention_heads"
    kv_heads: str = "num_key_value_heads"
    head_dim: str = "head_dim"
    mask: str = "attention_mask"
    reads: str = ""
    uniform: Mapping[str, str] = field(default_factory=dict)


_BERT = Stack(
    "encoder.layer",
    (
        Block(
            "attention",
            inputs={"attention.self.query": "q", "attention.self.key": "kv", "attention.self.value": "kv"},
            output="attention.output.dense",
            core="attention.self",
            sizes={"attention.self.num_attention_heads": "heads", "attention.self.all_head_size": "width"},
        ),
        Block("ffn", inputs={"intermediate.dense": "f"}, output="output.dense", stream="intermediate.dense"),
    ),
)

FAMILIES: dict[str, tuple[Stack, ...]] = {
    "bert": (_BERT,),
    "camembert": (_BERT,),
    "electra": (_BERT,),
    "roberta": (_BERT,),
    "xlm-roberta": (_BERT,),
    "distilbert": (
        Stack(
            "transformer.layer",
            (
                Block(
                    "attention",
                    inputs={"attention.q_lin": "q", "attention.k_lin": "kv", "attention.v_lin": "kv"},
                    output="attention.out_lin",
                    core="attention",
                    sizes={"attention.n_heads": "heads"},
                ),
                Block("ffn", inputs={"ffn.lin1": "f"}, output="ffn.lin2", stream="ffn.lin1"),
            ),
        ),
    ),
    "mpnet": (
        Stack(
            "encoder.layer",
            (
                Block(
                    "attention",
                    inputs={"attention.attn.q": "q", "attention.attn.k": "kv", "attention.attn.v": "kv"},
                    output="attention.attn.o",
                    core="attention.attn",
                    sizes={"attention.attn.num_attention_heads": "heads", "attention.attn.all_head_size": "width"},
                    select={"position_bias": "1"},
                ),
                Block("ffn", inputs={"intermediate.dense": "f"}, output="output.dense", stream="intermediate.dense"),
            ),
            returns=("y",),
        ),
    ),
}


REFUSED: dict[str, str] = {}
"""Model types that cannot be described, and why."""


def register_family(model_type: str, *stacks: Stack) -> None:
    """Describe the layers of a `model_type` (the one in its config) that hf_kprune does not know, or override one."""
    FAMILIES[model_type] = stacks
