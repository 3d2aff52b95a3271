"""Checkpoints of older transformers compute what the dense model with masked units does, or are refused in one clear line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import masked
from data import tokenizer
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForSequenceClassification,
    PreTrainedModel,
)
from zoo import ZOO, make, outputs_of

from hf_kprune import (
    ArgumentError,
    CheckpointError,
    KPruneArguments,
    KPrunePruner,
    UnsupportedArchitectureError,
    UnsupportedModelError,
    from_legacy,
)
from hf_kprune.cli.terminal import main
from hf_kprune.structure.sublayers import find_sublayers


HEADS = {
    "0": [1, 1],
    "2": [3, 0],
}  # gone, as config.json has it; a head may be named twice and a layer not at all
FFN = {0: [1, 2, 5, 7], 1: [0, 11], 2: list(range(12))}  # neurons left

BERT = {
    r"attention\.self\.(query|key|value)": "head rows",
    r"attention\.output\.dense": "head columns",
    r"intermediate\.dense": "neuron rows",
    r"(?<!attention\.)output\.dense": "neuron columns",
}
DISTILBERT = {
    r"attention\.[qkv]_lin": "head rows",
    r"attention\.out_lin": "head columns",
    r"ffn\.lin1": "neuron rows",
    r"ffn\.lin2": "neuron columns",
}
MPNET = {
    r"attention\.attn\.[qkv]": "head rows",
    r"attention\.attn\.o": "head columns",
    r"intermediate\.dense": "neuron rows",
    r"(?<!attention\.)output\.dense": "neuron columns",
}
VIT = {  # transformers 5 calls them otherwise
    r"attention\.attention\.(query|key|value)": "head rows",
    r"attention\.output\.dense": "head columns",
    r"intermediate\.dense": "neuron rows",
    r"(?<!attention\.)output\.dense": "neuron columns",
}
GPT2 = {  # the weights lie the other way round
    r"attn\.c_attn": "head columns fused",
    r"attn\.c_proj": "head rows",
    r"mlp\.c_fc": "neuron columns",
    r"mlp\.c_proj": "neuron rows",
}
PATHS = {
    "bert": BERT,
    "roberta": BERT,
    "electra": BERT,
    "distilbert": DISTILBERT,
    "mpnet": MPNET,
    "vit": VIT,
    "gpt2": GPT2,
}


def prune_file(
    name: str, tensors: dict[str, Tensor], heads: dict[str, list[int]], ffn: dict[int, list[int]]
) -> dict[str, Tensor]:
    """What `prune_heads` of transformers 4 did to the weights of a model of 4 heads of 4, and a cut of neurons."""
    pruned = {}
    for key, value in tensors.items():
        part = value
        for path, what in PATHS[name].items():
            match = re.search(rf"(?:layer|h)\.(\d+)\.{path}\.(weight|bias)$", key)
            if match is None or (
                match[match.lastindex or 0] == "bias" and what.endswith("rows") is (name == "gpt2")
            ):
                continue
            index = int(match[1])
            left = [head for head in range(4) if head not in heads.get(str(index), [])]
            features = [4 * head + d for head in left for d in range(4)]
            if what.startswith("neuron"):
                features = ffn.get(index, list(range(12)))
            if what.endswith("fused"):
                features = [start + f for start in (0, 16, 32) for f in features]
            part = value.index_select(
                0 if what.endswith("rows") or value.dim() == 1 else 1, torch.tensor(features).long()
            )
        pruned[key] = part.contiguous()
    return pruned


def save_legacy(
    name: str,
    path: Path,
    heads: dict[str, list[int]] = HEADS,
    ffn: dict[int, list[int]] = FFN,
    rename: Callable[[str], str] = str,
    old_file: bool = False,
    **config: Any,
) -> PreTrainedModel:
    """Save a tiny model as transformers 4 would have, pruned; return it, dense."""
    dense = make(name)
    dense.save_pretrained(path)
    tensors = prune_file(name, load_file(path / "model.safetensors"), heads, ffn)
    tensors = {rename(key): value for key, value in tensors.items()}
    if old_file:
        (path / "model.safetensors").unlink()
        torch.save(tensors, path / "pytorch_model.bin")
    else:
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    edit_config(path, pruned_heads=heads, **config)
    return dense


def edit_config(path: Path, **values: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    config = {k: v for k, v in {**config, **values}.items() if v is not None}
    (path / "config.json").write_text(json.dumps(config))


def edit_weights(path: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def masked_outputs(
    dense: PreTrainedModel, kind: str, heads: dict[str, list[int]] = HEADS, ffn: Any = FFN
) -> Tensor:
    sublayers = find_sublayers(dense)
    masks = []
    for s in sublayers:
        mask = torch.ones(4, 4) if s.kind == "attention" else torch.zeros(12)
        mask[heads.get(str(s.index), []) if s.kind == "attention" else ffn.get(s.index, list(range(12)))] = (
            s.kind == "ffn"
        )
        masks.append(mask.flatten())
    with masked(sublayers, masks):
        return outputs_of(dense, kind)


def assert_legacy(dense: PreTrainedModel, model: PreTrainedModel, kind: str = "text", **gone: Any) -> None:
    assert type(model) is type(dense)
    torch.testing.assert_close(
        outputs_of(model, kind), masked_outputs(dense, kind, **gone), rtol=1e-4, atol=1e-5
    )


def units(model: PreTrainedModel) -> list[int]:
    return [s.num_units for s in find_sublayers(model)]


# ---------------------------------------------------------------------------------------------------------------------
# It is the model that was saved
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PATHS)
def test_computes_what_the_masked_dense_model_does_and_is_saved_in_todays_format(
    tmp_path: Path, name: str
) -> None:
    dense, kind = save_legacy(name, tmp_path / "old"), ZOO[name][2]
    model = from_legacy(tmp_path / "old")
    assert units(model) == [3, 4, 4, 2, 2, 12]
    assert_legacy(dense, model, kind)
    assert model.config.kprune
    model.save_pretrained(tmp_path / "new")
    assert "pruned_heads" not in json.loads((tmp_path / "new" / "config.json").read_text())
    again = type(model).from_pretrained(tmp_path / "new")
    assert torch.equal(outputs_of(again, kind), outputs_of(model, kind))
    assert units(AutoModel.from_pretrained(tmp_path / "new")) == units(model)


def gamma_and_beta(key: str) -> str:
    return key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


def test_weights_of_early_versions(tmp_path: Path) -> None:
    """pytorch_model.bin, gamma and beta, a config that names neither the class nor its own kind."""
    dense = save_legacy(
        "bert", tmp_path, rename=gamma_and_beta, old_file=True, architectures=None, model_type=None
    )
    assert_legacy(dense, from_legacy(tmp_path, BertForSequenceClassification))
    with pytest.raises(ValueError, match="model_type"):
        from_legacy(tmp_path)


def test_shards(tmp_path: Path) -> None:
    dense = save_legacy("bert", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    halves = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    where = {key: halves[i % 2] for i, key in enumerate(tensors)}
    for half in halves:
        save_file(
            {k: tensors[k] for k, file in where.items() if file == half},
            tmp_path / half,
            metadata={"format": "pt"},
        )
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    assert_legacy(dense, from_legacy(tmp_path))


@pytest.mark.parametrize("prefixed", [True, False])
def test_a_base_model_and_a_model_with_a_head_read_each_others_weights(
    tmp_path: Path, prefixed: bool
) -> None:
    def without_prefix(key: str) -> str:
        return key if prefixed else key.removeprefix("bert.")

    dense = save_legacy("bert", tmp_path, rename=without_prefix)
    if prefixed:
        base = from_legacy(tmp_path, AutoModel)
        assert_legacy(dense.bert, base)
    else:
        assert_legacy(dense, from_legacy(tmp_path))


def test_another_head_and_other_options(tmp_path: Path) -> None:
    save_legacy("bert", tmp_path / "parent" / "child")
    model = from_legacy(
        str(tmp_path / "parent"), AutoModelForSequenceClassification, subfolder="child", num_labels=5,
        ignore_mismatched_sizes=True, dtype=torch.bfloat16, attn_implementation="eager",
    )  # fmt: skip
    assert model.classifier.weight.shape == (5, 16)
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"
    assert units(model) == [3, 4, 4, 2, 2, 12]
    asked = from_legacy(tmp_path / "parent" / "child", AutoModelForQuestionAnswering)
    assert units(asked) == units(model)


@pytest.mark.parametrize("name", ["bert", "distilbert", "gpt2"])
def test_all_heads_and_all_neurons_of_a_layer(tmp_path: Path, name: str) -> None:
    """transformers 4 wrote tensors without entries; its models ran in some families only."""
    gone: dict[str, Any] = {"heads": {"1": [0, 1, 2, 3], "2": [2]}, "ffn": {0: []}}
    dense = save_legacy(name, tmp_path / "old", **gone)
    model = from_legacy(tmp_path / "old")
    assert units(model) == [4, 0, 0, 12, 3, 12]
    assert_legacy(dense, model, ZOO[name][2], **gone)
    model.save_pretrained(tmp_path / "new")
    again = type(model).from_pretrained(tmp_path / "new")
    assert torch.equal(outputs_of(again, ZOO[name][2]), outputs_of(model, ZOO[name][2]))


def test_heads_alone_and_neurons_alone(tmp_path: Path) -> None:
    dense = save_legacy("bert", tmp_path / "heads", ffn={})
    assert_legacy(dense, from_legacy(tmp_path / "heads"), ffn={})
    dense = save_legacy("bert", tmp_path / "neurons", heads={})
    assert_legacy(dense, from_legacy(tmp_path / "neurons"), heads={})


def test_a_uniform_ffn_that_the_config_tells(tmp_path: Path) -> None:
    """TextPruner's way."""
    ffn = {layer: [0, 3, 4, 9, 10] for layer in range(3)}
    dense = save_legacy("roberta", tmp_path, ffn=ffn, old_file=True, intermediate_size=5)
    model = from_legacy(tmp_path)
    assert_legacy(dense, model, ffn=ffn)
    assert all(s.plan["of"] == 5 for s in find_sublayers(model) if s.kind == "ffn")


def test_narrow_ffns_of_t5_leave_its_shared_table_of_positions_shared(tmp_path: Path) -> None:
    dense = make("t5")
    dense.save_pretrained(tmp_path)
    first = "encoder.block.1.layer.1.DenseReluDense"

    def narrower(tensors: dict[str, Tensor]) -> None:
        tensors[f"{first}.wi.weight"] = tensors[f"{first}.wi.weight"][2:].clone()
        tensors[f"{first}.wo.weight"] = tensors[f"{first}.wo.weight"][:, 2:].clone()

    edit_weights(tmp_path, narrower)
    edit_config(tmp_path, pruned_heads={"0": [], "1": []})
    model = from_legacy(tmp_path)
    with torch.no_grad():
        dense.get_submodule(first).wo.weight[:, :2] = 0
    torch.testing.assert_close(outputs_of(model, "seq2seq"), outputs_of(dense, "seq2seq"))
    model.save_pretrained(tmp_path / "new")
    again = type(model).from_pretrained(tmp_path / "new")
    assert torch.equal(outputs_of(again, "seq2seq"), outputs_of(model, "seq2seq"))


def test_a_dense_checkpoint_stays_dense(tmp_path: Path) -> None:
    dense = save_legacy("bert", tmp_path, heads={}, ffn={})
    model = from_legacy(tmp_path)
    assert not hasattr(model.config, "kprune")
    assert not hasattr(model.config, "pruned_heads")
    assert torch.equal(outputs_of(model, "text"), outputs_of(dense, "text"))


def test_it_can_be_pruned_again(tmp_path: Path) -> None:
    save_legacy("mpnet", tmp_path)
    model = from_legacy(tmp_path)
    rows = [{"input_ids": torch.randint(4, 60, (12,)).tolist()} for _ in range(30)]
    KPrunePruner(model, KPruneArguments(num_tokens=200, disable_tqdm=True), rows).prune()
    assert sum(units(model)) < 3 + 4 + 4 + 2 + 2 + 12
    assert outputs_of(model, "text").isfinite().all()


# ---------------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------------


def test_convert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense = save_legacy("bert", tmp_path / "old")
    tokenizer().save_pretrained(tmp_path / "old")
    old, new = str(tmp_path / "old"), str(tmp_path / "new")
    assert main(["convert", old, new]) == 0
    assert f"model = BertForSequenceClassification.from_pretrained({new!r})" in capsys.readouterr().out
    assert_legacy(dense, AutoModelForSequenceClassification.from_pretrained(new))
    assert AutoTokenizer.from_pretrained(new)("w7")["input_ids"] == tokenizer()("w7")["input_ids"]
    assert main(["convert", old, new]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert main(["convert", new, str(tmp_path / "newer")]) == 2
    assert "in today's format" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "none"), str(tmp_path / "newer")]) == 2
    assert "cannot load the model" in capsys.readouterr().err
    assert not (tmp_path / "newer").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Refusals
# ---------------------------------------------------------------------------------------------------------------------

LAYER = "bert.encoder.layer.1"


def shorten(key: str, to: int, dim: int = 0) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{LAYER}.{key}"] = tensors[f"{LAYER}.{key}"].narrow(dim, 0, to).clone()

    return change


def widen(tensors: dict[str, Tensor]) -> None:
    tensors[f"{LAYER}.output.dense.weight"] = torch.ones(16, 13)


REFUSED: dict[str, tuple[dict[str, Any], Callable[[dict[str, Tensor]], Any], str]] = {
    "a head more": (
        {"pruned_heads": {"0": [1, 2], "2": [3, 0]}},
        len,
        r"leaves 2 heads in .*layer.0 .*files hold 3",
    ),
    "a layer more": (
        {"pruned_heads": {**HEADS, "1": [0]}},
        len,
        r"leaves 3 heads in .*layer.1 .*files hold 4",
    ),
    "no pruned_heads": ({"pruned_heads": None}, len, r"leaves 4 heads in .*layer.0 .*files hold 3"),
    "no such head": (
        {"pruned_heads": {"0": [4]}},
        len,
        "names head 4 of layer 0; there are 3 layers of 4 heads",
    ),
    "no such layer": (
        {"pruned_heads": {"3": [1]}},
        len,
        "names head 1 of layer 3; there are 3 layers of 4 heads",
    ),
    "a list": (
        {"pruned_heads": [1, 2]},
        len,
        r"pruned_heads is \[1, 2\], expected a list of heads for each layer",
    ),
    "a word": ({"pruned_heads": {"0": "all"}}, len, "expected a list of heads for each layer"),
    "part of a head": (
        {},
        shorten("attention.output.dense.weight", 14, 1),
        "has 14 columns .* a multiple of 4 and at most 16",
    ),
    "wider": ({}, widen, "has 13 columns .* at most 12"),
    "inputs without outputs": (
        {},
        shorten("intermediate.dense.weight", 1),
        r"is \[1, 16\] in the weight files, \[2, 16\] by",
    ),
    "outputs without inputs": (
        {},
        shorten("output.dense.weight", 1, 1),
        r"is \[2\] in the weight files, \[1\] by",
    ),
    "another hidden size": (
        {},
        shorten("output.LayerNorm.weight", 8),
        r"is \[8\] in the weight files, \[16\] by",
    ),
    "another vocabulary": ({"vocab_size": 61}, len, r"is \[60, 16\] in the weight files, \[61, 16\] by"),
    "no bias": (
        {},
        lambda t: t.pop(f"{LAYER}.attention.self.query.bias"),
        "1 tensors of the layers are not in .*query.bias",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_contradictions_are_refused_in_one_line(tmp_path: Path, case: str) -> None:
    config, change, message = REFUSED[case]
    save_legacy("bert", tmp_path)
    edit_weights(tmp_path, change)
    edit_config(tmp_path, **config)
    with pytest.raises(CheckpointError, match=message) as error:
        from_legacy(tmp_path)
    assert str(error.value).startswith(f"{tmp_path}: ")
    assert "\n" not in str(error.value)


def test_what_transformers_has_no_layers_for_is_refused(tmp_path: Path) -> None:
    save_legacy("bert", tmp_path / "bert", layer_norm_type="no_norm")
    with pytest.raises(UnsupportedModelError, match="layer_norm_type is 'no_norm'"):
        from_legacy(tmp_path / "bert")
    edit_config(tmp_path / "bert", layer_norm_type="layer_norm")
    assert units(from_legacy(tmp_path / "bert")) == [3, 4, 4, 2, 2, 12]
    config = AutoConfig.for_model("xlnet", vocab_size=60, d_model=8, n_layer=1, n_head=2, d_inner=8)
    AutoModel.from_config(config).save_pretrained(tmp_path / "xlnet")
    with pytest.raises(UnsupportedArchitectureError, match="its attention weights are no projections"):
        from_legacy(tmp_path / "xlnet")


def test_heads_of_one_of_several_stacks_are_refused(tmp_path: Path) -> None:
    make("t5").save_pretrained(tmp_path)
    edit_config(tmp_path, pruned_heads={"0": [1]})
    with pytest.raises(CheckpointError, match="which of several stacks"):
        from_legacy(tmp_path)


def test_todays_format_is_refused(tmp_path: Path) -> None:
    save_legacy("bert", tmp_path / "old")
    from_legacy(tmp_path / "old").save_pretrained(tmp_path / "new")
    with pytest.raises(ArgumentError, match="load it with from_pretrained"):
        from_legacy(tmp_path / "new")


def test_plain_from_pretrained_says_the_way_out(tmp_path: Path) -> None:
    save_legacy("bert", tmp_path)
    for load in (
        AutoModelForSequenceClassification.from_pretrained,
        BertForSequenceClassification.from_pretrained,
    ):
        with pytest.raises(CheckpointError, match=r"pruned_heads.* load it with hf_kprune\.from_legacy"):
            load(tmp_path)
