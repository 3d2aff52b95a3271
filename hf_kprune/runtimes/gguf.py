"""Language models as GGUF for llama.cpp, with heads and neurons per layer.

llama.cpp has two architectures in which each layer may have its own number of heads and neurons: `deci`
otherwise computes what Llama does, and `openelm`, with norms of queries and keys, what Qwen3 does. A sublayer
without units is written with zeros, which compute nothing, exactly: one head, or 32 neurons, a multiple of
the blocks that quantised types are made of.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from ..errors import ArgumentError, CheckpointError


NAME = "model.gguf"
NORMED = "openelm"
"""The architecture that has norms of queries and keys. Their projections and that of values are one tensor
there, without biases; what is rotated together lies half a head apart; the embeddings are the output, too."""
TYPES = {"llama": "deci", "mistral": "deci", "qwen2": "deci", "qwen3": NORMED}
"""The architecture of llama.cpp that computes what a model type does."""
LEAST = 32
"""Neurons of an FFN that has none left."""
WHOLE = {
    "model.embed_tokens.weight": "token_embd",
    "model.norm.weight": "output_norm",
    "lm_head.weight": "output",
}
"""Names of tensors in GGUF, without their endings."""
LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""The same, of tensors of a layer."""
PARTS = ("weight", "bias")
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITTING = {
    rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|{WORDS % digits}": name
    for digits, name in ((r"\p{N}", "qwen2"), (r"\p{N}{1,3}", "llama-bpe"))
}
"""Names in llama.cpp for how texts are split into words, by the expression that does it."""


def write_gguf(model: PreTrainedModel, folder: Path) -> None:
    """Write a language model as GGUF, with the tokenizer that lies in the folder if llama.cpp knows how it
    splits texts, and compare its metadata with its tensors.

    Raises:
        ArgumentError: If the package gguf is not there, if llama.cpp does not compute what the model does, or
            if the tokenizer has tokens that the model has not.
        CheckpointError: If what was written contradicts itself.
    """
    if find_spec("gguf") is None:
        raise ArgumentError("format 'gguf' takes another package: pip install gguf")
    check_type(model)
    from gguf import GGUFWriter

    config: Any = model.config
    tensors, heads, kv_heads, neurons = layout(model)
    writer = GGUFWriter(folder / NAME, TYPES[config.model_type])
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_feed_forward_length(neurons)
    for add in (writer.add_key_length, writer.add_value_length, writer.add_rope_dimension_count):
        add(head_size(config))
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    add_tokenizer(writer, folder, config.vocab_size)
    for name, tensor in tensors.items():
        add_tensor(writer, name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    verify(folder / NAME, head_size(config))


def check_type(model: PreTrainedModel) -> None:
    """Raise `ArgumentError` if llama.cpp would compute something else."""
    config: Any = model.config
    reason = ""
    if config.model_type not in TYPES or not model.can_generate():
        reason = (
            f"{type(model).__name__} is of type {config.model_type!r}, expected a language model of one of "
        )
        reason += ", ".join(TYPES)
    elif TYPES[config.model_type] == NORMED and not config.tie_word_embeddings:
        reason = (
            f"its output projection is a tensor of its own, and {NORMED!r}, the only architecture with norms "
            "of queries and keys and with heads per layer, has none"
        )
    elif config.rope_parameters.get("rope_type", "default") != "default":
        reason = f"its rotations are of type {config.rope_parameters['rope_type']!r}, expected 'default'"
    elif getattr(config, "use_sliding_window", getattr(config, "sliding_window", None)):
        reason = f"its attention sees a window of {config.sliding_window} tokens, expected all of them"
    if reason:
        raise ArgumentError(
            f"format 'gguf' cannot hold this model: {reason}; what is pruned with uniform=True can be "
            "converted by llama.cpp itself"
        )


def head_size(config: Any) -> int:
    """Columns of a head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def layout(model: PreTrainedModel) -> tuple[dict[str, Tensor], list[int], list[int], list[int]]:
    """The tensors of a model by their names in GGUF, and the query heads, key-value heads and neurons of each
    layer.

    Raises:
        ArgumentError: If the model has a tensor that there is no name for.
    """
    state, size, width = model.state_dict(), head_size(model.config), model.config.hidden_size
    normed = TYPES[model.config.model_type] == NORMED
    tensors = {f"{new}.weight": state.pop(old) for old, new in WHOLE.items() if old in state}
    if model.config.tie_word_embeddings:
        tensors.pop("output.weight", None)
    heads, kv_heads, neurons = list[int](), list[int](), list[int]()
    for layer in range(model.config.num_hidden_layers):
        of_layer = tensors_of_layer(state, layer, size, width)
        if normed and (biases := [name for name in of_layer if name.endswith(".bias")]):
            raise ArgumentError(f"format 'gguf' cannot hold this model: there is no place for {biases[0]}")
        heads.append(len(of_layer["attn_q.weight"]) // size)
        kv_heads.append(len(of_layer["attn_k.weight"]) // size)
        neurons.append(len(of_layer["ffn_up.weight"]))
        of_layer = join(of_layer, size) if normed else rotate(of_layer, heads[-1], kv_heads[-1])
        tensors |= {f"blk.{layer}.{name}": tensor for name, tensor in of_layer.items()}
    unnamed = [name for name, tensor in state.items() if tensor.numel() and "rotary_emb" not in name]
    if unnamed:
        raise ArgumentError(f"format 'gguf' cannot hold this model: there is no place for {unnamed[0]}")
    return tensors, heads, kv_heads, neurons


def tensors_of_layer(state: dict[str, Tensor], layer: int, size: int, width: int) -> dict[str, Tensor]:
    """Take the tensors of a layer out of a state; where a sublayer is empty, there are zeros.

    Args:
        state: Tensors by their names in the model.
        layer: Its number.
        size: Columns of a head.
        width: Columns of the residual stream.
    """
    of_layer = {}
    for old, new in LAYER.items():
        for part in PARTS:
            tensor = state.pop(f"model.layers.{layer}.{old}.{part}", None)
            if tensor is not None and tensor.numel():
                of_layer[f"{new}.{part}"] = tensor
    if "attn_q.weight" not in of_layer:
        rows = dict.fromkeys(("attn_q.weight", "attn_k.weight", "attn_v.weight"), torch.zeros(size, width))
        of_layer |= rows | {"attn_output.weight": torch.zeros(width, size)}
    if "ffn_up.weight" not in of_layer:
        of_layer |= dict.fromkeys(("ffn_gate.weight", "ffn_up.weight"), torch.zeros(LEAST, width))
        of_layer |= {"ffn_down.weight": torch.zeros(width, LEAST)}
    return of_layer


def join(of_layer: dict[str, Tensor], size: int) -> dict[str, Tensor]:
    """The tensors of a layer with queries, keys and values in one, and with norms of queries and keys, also
    where there are no heads; a head has `size` columns."""
    parts = [of_layer.pop(f"attn_{name}.weight") for name in "qkv"]
    ones = dict.fromkeys(("attn_q_norm.weight", "attn_k_norm.weight"), torch.ones(size))
    return {**ones, **of_layer, "attn_qkv.weight": torch.cat(parts)}


def rotate(of_layer: dict[str, Tensor], heads: int, kv_heads: int) -> dict[str, Tensor]:
    """The tensors of a layer with queries and keys in the order of llama.cpp."""
    counts = {f"{name}.{part}": n for name, n in (("attn_q", heads), ("attn_k", kv_heads)) for part in PARTS}
    return {name: rotated(t, counts[name]) if name in counts else t for name, t in of_layer.items()}


def rotated(tensor: Tensor, heads: int) -> Tensor:
    """Rows of queries or keys (heads w, ...) in the order of llama.cpp: the two that are rotated together are
    neighbours there, and half a head apart in Transformers.
    """
    halves = tensor.reshape(heads, 2, len(tensor) // heads // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def add_tensor(writer: Any, name: str, tensor: Tensor) -> None:
    """Add a tensor in its own precision; vectors are in float32, as llama.cpp has them."""
    from gguf import GGMLQuantizationType, quantize

    values: np.ndarray[Any, Any] = tensor.detach().cpu().float().numpy()
    if tensor.dim() == 1 or tensor.dtype == torch.float32:
        writer.add_tensor(name, values)
    elif tensor.dtype == torch.float16:
        writer.add_tensor(name, values.astype(np.float16))
    else:
        form = GGMLQuantizationType.BF16
        writer.add_tensor(name, quantize(values, form), raw_dtype=form)


def add_tokenizer(writer: Any, folder: Path, size: int) -> None:
    """Add the tokenizer that lies in a folder, if llama.cpp knows how it splits texts.

    Args:
        writer: Of the GGUF.
        folder: With a `tokenizer.json`, or without.
        size: Rows of the table of embeddings.
    """
    from gguf import BpeVocab, SpecialVocab, TokenType

    path = folder / "tokenizer.json"
    split = splitting(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None
    if split is None:
        writer.add_tokenizer_model("none")
        return
    tokens = [(text, kind) for text, _, kind in BpeVocab(folder).all_tokens()]
    if len(tokens) > size:
        raise ArgumentError(
            f"format 'gguf' cannot hold this model: its tokenizer has {len(tokens)} tokens, and its "
            f"embeddings are those of {size}, expected as many or more"
        )
    tokens += [(f"[UNUSED{i}]", TokenType.UNUSED) for i in range(len(tokens), size)]
    writer.add_tokenizer_model(BpeVocab.tokenizer_model)
    writer.add_tokenizer_pre(split)
    writer.add_token_list([text for text, _ in tokens])
    writer.add_token_types([kind for _, kind in tokens])
    special = SpecialVocab(folder, load_merges=True, n_vocab=size)
    special.add_special_token = added_around(folder)
    special.add_to_gguf(writer, quiet=True)


def added_around(folder: Path) -> dict[str, bool]:
    """Whether the tokenizer in a folder puts its tokens for the beginning and the end around a text, which
    llama.cpp would else decide by the way in which texts are split."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("a")["input_ids"]
    return {"bos": ids[0] == tokenizer.bos_token_id, "eos": ids[-1] == tokenizer.eos_token_id}


def splitting(tokenizer: Mapping[str, Any]) -> str | None:
    """The name that llama.cpp has for how a tokenizer splits texts into words; None if it is not known here.

    Args:
        tokenizer: What `tokenizer.json` holds.
    """
    steps = tokenizer["pre_tokenizer"] or {}
    steps = steps.get("pretokenizers", [steps])
    by_bytes = tokenizer["model"]["type"] == "BPE" and bool(steps) and steps[-1].get("type") == "ByteLevel"
    if not by_bytes or steps[-1]["add_prefix_space"]:
        return None
    digits = [{"type": "Digits", "individual_digits": True}]
    if steps[-1]["use_regex"]:
        return "gpt-2" if not steps[:-1] else "smollm" if steps[:-1] == digits else None
    patterns = [step.get("pattern", {}).get("Regex") for step in steps[:-1]]
    return SPLITTING.get(patterns[0]) if len(patterns) == 1 else None


def verify(path: Path, size: int) -> None:
    """Raise `CheckpointError` unless the heads and neurons of each layer in a GGUF are those of its tensors.

    Args:
        path: Of the file.
        size: Columns of a head.
    """
    from gguf import GGUFReader

    reader = GGUFReader(path)
    architecture = reader.fields["general.architecture"].contents()
    shapes = {tensor.name: [int(length) for length in tensor.shape] for tensor in reader.tensors}
    keys = ("attention.head_count", "attention.head_count_kv", "feed_forward_length")
    counts = (reader.fields[f"{architecture}.{key}"].contents() for key in keys)
    for layer, (heads, kv_heads, neurons) in enumerate(zip(*counts, strict=True)):
        rows = {"attn_q": heads, "attn_k": kv_heads, "attn_v": kv_heads}
        rows = {"attn_qkv": heads + 2 * kv_heads} if architecture == NORMED else rows
        wanted = {(name, 1): count * size for name, count in rows.items()}
        wanted |= {("attn_output", 0): heads * size, ("ffn_up", 1): neurons, ("ffn_down", 0): neurons}
        for (name, axis), length in wanted.items():  # a GGUF names the columns first
            if (there := shapes[f"blk.{layer}.{name}.weight"][axis]) != length:
                raise CheckpointError(
                    f"layer {layer} has {heads} heads, {kv_heads} key-value heads and {neurons} neurons, but "
                    f"its {name} has {there} {'rows' if axis else 'columns'}"
                )
