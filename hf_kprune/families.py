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
    heads) or an FFN neuron.

    Args:
        kind: `"attention"` or `"ffn"`.
        inputs: Projections whose output rows belong to units, each with the layout of its rows:
            `"q"` query heads, `"kv"` key or value heads, `"qkv"` all three fused one after the other, `"qkv:perhead"`
            the three fused unit by unit, `"f"` neurons, `"2f"` gate and up projections fused one after the other.
        output: Projection whose input columns belong to units. Its output is the sublayer's output.
        stream: Module that reads the residual stream which the output joins (a norm in pre-norm models, the FFN's
            first projection in post-norm ones); `""` if it is the layer's own input.
        core: Attention module that is replaced when no head is left.
        returns: What `core` returns: `"y"` stands for the attention's output, `None` for None.
        sizes: Attributes to refresh after a cut: `"heads"` (query heads), `"kv_heads"` or `"width"` (heads x head size).
        select: Arguments of `core` that carry one slice per head in dimension 1 (a shared position bias).
    """

    kind: str
    inputs: Mapping[str, str]
    output: str
    stream: str = ""
    core: str = ""
    returns: tuple[str | None, ...] = ("y", None)
    sizes: Mapping[str, str] = field(default_factory=dict)
    select: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stack:
    """A list of equal layers.

    Args:
        layers: Path of the `ModuleList`, seen from the base model.
        blocks: The sublayers of one layer, in the order in which they run.
        returns_tuple: Whether a layer returns a tuple that begins with the hidden states, or the hidden states alone.
    """

    layers: str
    blocks: tuple[Block, ...]
    returns_tuple: bool = False


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
                    select=("position_bias",),
                ),
                Block("ffn", inputs={"intermediate.dense": "f"}, output="output.dense", stream="intermediate.dense"),
            ),
            returns_tuple=True,
        ),
    ),
}


def register_family(model_type: str, *stacks: Stack) -> None:
    """Describe the layers of a `model_type` (the one in its config) that hf_kprune does not know, or override one."""
    FAMILIES[model_type] = stacks
