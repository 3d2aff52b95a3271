"""Models that were written for other runtimes compute the same there."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
import pytest
import torch
from data import collate, rows
from models import cut_randomly, pruned_layer, shallow, slow_unless_in
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX
from zoo import make

import hf_kprune
from hf_kprune import ArgumentError, CheckpointError, KPruneArguments, KPrunePruner, UnsupportedModelError
from hf_kprune.cli.terminal import main
from hf_kprune.runtimes.gguf import (
    NAME,
    SPLITTING,
    check_type,
    head_size,
    layout,
    rotated,
    splitting,
    verify,
)
from hf_kprune.runtimes.graphs import EXACT, compare
from hf_kprune.runtimes.vllm import layer_configs, register


TEXTS = ("a warm film", "That's 12345 films,  isn't it?\n\nYes: Käse!", "nothing<|end|>")
DIGITS = pre_tokenizers.Digits(individual_digits=True)


def uneven(model_type: str, **more: Any) -> Any:
    """A tiny language model that lost all heads of its first layer, all neurons of its second, and some elsewhere."""
    model = make(model_type)
    if model_type == "qwen3":  # which llama.cpp has with the output of the embeddings alone
        model.config.tie_word_embeddings = True
        model.tie_weights()
    for module in (model.model.layers[0].self_attn, model.model.layers[1].mlp):  # so that they are the least
        for parameter in module.parameters():
            parameter.data *= 1e-6
    options: dict[str, Any] = {"method": "magnitude", "tune": False, "use_cpu": True, "disable_tqdm": True}
    pruner = KPrunePruner(model, KPruneArguments(**{"sparsity": 0.7, **options, **more}), rows(), collate)
    pruner.prune()
    return pruner.model.eval()


def test_what_cannot_be_exported_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    for arguments, message in (
        (
            (shallow(), str(tmp_path / "out"), "tflite"),
            "format is 'tflite', expected one of onnx, openvino, gguf",
        ),
        ((shallow(), str(tmp_path / "full"), "onnx"), "is not empty"),
        (
            (shallow(), str(tmp_path / "out"), "gguf"),
            "is of type 'bert', expected a language model of one of llama",
        ),
    ):
        pytest.importorskip("gguf") if arguments[2] == "gguf" else None
        with pytest.raises(ArgumentError, match=message):
            hf_kprune.export(*arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("hf_kprune.runtimes.graphs.find_spec", lambda name: None)
    monkeypatch.setattr("hf_kprune.runtimes.gguf.find_spec", lambda name: None)
    for format, command in (
        ("onnx", "pip install onnx onnxscript onnxruntime"),
        ("openvino", "pip install openvino"),
        ("gguf", "pip install gguf"),
    ):
        with pytest.raises(ArgumentError, match=command):
            hf_kprune.export(shallow(), str(tmp_path / "out"), format)
    shallow().save_pretrained(tmp_path / "dense")
    assert main(["export", str(tmp_path / "dense"), str(tmp_path / "out")]) == 2
    assert "pip install onnx" in capsys.readouterr().err


def test_other_outputs_are_found() -> None:
    wanted = {"logits": torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])}
    compare({"logits": np.array([[[1.0, 2.0], [3.0, 4.0001]]])}, wanted)
    compare({"logits": np.array([[[3.0, 4.0]]])}, wanted)  # the last token alone
    for wrong in ([[[1.0, 2.0], [3.0, 4.1]]], [[[1.0, 2.0]]], [[[1.0, float("nan")], [3.0, 4.0]]]):
        with pytest.raises(CheckpointError, match="gives other logits"):
            compare({"logits": np.array(wrong)}, wanted)


def test_rows_that_are_rotated_together_become_neighbours() -> None:
    """Two heads of four rows: rows 0 and 2 of a head are a pair, as are 1 and 3."""
    assert rotated(torch.arange(8), 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_queries_keys_and_values_are_one_tensor_where_they_have_norms(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = uneven("qwen3", sparsity=0.4)
    (tensors, heads, kv_heads, _), size = layout(model), head_size(model.config)
    empty, whole = (f"blk.{layer}.{{}}.weight".format for layer in range(2))
    assert not tensors[empty("attn_qkv")].any()
    assert tensors[empty("attn_qkv")].shape == (3 * size, model.config.hidden_size)
    assert torch.equal(tensors[empty("attn_q_norm")], torch.ones(size))
    attention = model.model.layers[1].self_attn
    parts = [getattr(attention, f"{name}_proj").weight for name in "qkv"]
    assert torch.equal(tensors[whole("attn_qkv")], torch.cat(parts))
    assert len(tensors[whole("attn_qkv")]) == (heads[1] + 2 * kv_heads[1]) * size
    assert torch.equal(tensors[whole("attn_k_norm")], attention.k_norm.weight)
    attention.k_proj.bias = torch.nn.Parameter(torch.zeros(len(parts[1])))
    with pytest.raises(ArgumentError, match=r"no place for attn_k\.bias"):
        layout(model)
    monkeypatch.setattr(model.config, "tie_word_embeddings", False)
    with pytest.raises(ArgumentError, match="output projection is a tensor of its own, and 'openelm'"):
        check_type(model)


def test_the_layout_of_a_gguf_names_every_tensor_and_fills_what_is_empty() -> None:
    model = uneven("llama")
    tensors, heads, kv_heads, neurons = layout(model)
    size = head_size(model.config)
    for layer, counts in enumerate(zip(heads, kv_heads, neurons, strict=True)):
        for name, rows_ in zip(("attn_q", "attn_k", "ffn_up"), counts, strict=True):
            assert len(tensors[f"blk.{layer}.{name}.weight"]) == rows_ * (size if "attn" in name else 1)
        assert tensors[f"blk.{layer}.attn_output.weight"].shape[1] == counts[0] * size
    assert not any(
        tensors[f"blk.{name}.weight"].any() for name in ("0.attn_q", "0.attn_output", "1.ffn_down")
    )
    assert (heads[0], kv_heads[0], neurons[1]) == (1, 1, 32)
    total = sum(tensor.numel() for tensor in tensors.values() if tensor.any())
    assert total == sum(p.numel() for p in model.parameters())
    model.model.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ArgumentError, match=r"no place for model\.extra\.weight"):
        layout(model)


@pytest.mark.parametrize("model_type", slow_unless_in(("llama",), ("llama", "qwen2", "qwen3")))
def test_a_gguf_holds_the_model(tmp_path: Path, model_type: str) -> None:
    gguf = pytest.importorskip("gguf")
    model = uneven(model_type)
    hf_kprune.export(model, str(tmp_path / "out"), "gguf")
    reader = gguf.GGUFReader(tmp_path / "out" / NAME)
    tensors, heads, kv_heads, neurons = layout(model)
    fields = {key.partition(".")[2]: field.contents() for key, field in reader.fields.items()}
    assert fields["attention.head_count"] == heads
    assert fields["attention.head_count_kv"] == kv_heads
    assert fields["feed_forward_length"] == neurons
    assert {tensor.name for tensor in reader.tensors} == set(tensors)
    for tensor in reader.tensors:
        assert np.array_equal(tensor.data, tensors[tensor.name].detach().float().numpy()), tensor.name
    with pytest.raises(CheckpointError, match=r"layer 0 has \d+ heads, .* but its attn_\w+ has"):
        verify(tmp_path / "out" / NAME, 2 * head_size(model.config))


def bytes_tokenizer(split: Any) -> PreTrainedTokenizerFast:
    """Byte pairs of a few sentences, with a special token, within words that are split in some way."""
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.Sequence(split)
    words.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words.train_from_iterator(["a warm and funny film of 1984", "nothing is as warm as that film"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|end|>")


def split_by(expression: str) -> list[Any]:
    by_expression = pre_tokenizers.Split(Regex(expression), "isolated")
    return [by_expression, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]


@pytest.mark.slow
@pytest.mark.parametrize("expression", SPLITTING)
def test_a_gguf_carries_the_tokenizer_as_transformers_reads_it(tmp_path: Path, expression: str) -> None:
    pytest.importorskip("gguf")
    tokenizer = bytes_tokenizer(split_by(expression))
    model = uneven("llama")
    model.resize_token_embeddings(len(tokenizer) + 4)
    for each in (model, tokenizer):
        each.save_pretrained(tmp_path / "pruned")
    hf_kprune.export(str(tmp_path / "pruned"), str(tmp_path / "out"), "gguf")
    (tmp_path / "alone").mkdir()
    (tmp_path / "out" / NAME).rename(tmp_path / "alone" / NAME)
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path / "alone", gguf_file=NAME)
    for text in TEXTS:
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"], text
    assert again.eos_token_id == tokenizer.eos_token_id
    model.resize_token_embeddings(20)
    model.save_pretrained(tmp_path / "pruned")
    with pytest.raises(ArgumentError, match="its tokenizer has .* and its embeddings are those of 20"):
        hf_kprune.export(str(tmp_path / "pruned"), str(tmp_path / "small"), "gguf")


def test_what_llama_cpp_calls_the_ways_to_split_texts() -> None:
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for split, name in (
        ([by_bytes], "gpt-2"),
        ([DIGITS, by_bytes], "smollm"),
        (split_by(PRETOKENIZE_REGEX), "qwen2"),
        (split_by(r"\w+"), None),
        ([pre_tokenizers.Whitespace()], None),
    ):
        words = Tokenizer(models.BPE())
        words.pre_tokenizer = pre_tokenizers.Sequence(split)
        assert splitting(json.loads(words.to_str())) == name


@pytest.mark.slow
@pytest.mark.parametrize(("format", "package"), [("onnx", "onnxruntime"), ("openvino", "openvino")])
@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.filterwarnings("ignore")  # of the exporters
def test_graphs_give_what_the_model_gives(tmp_path: Path, format: str, package: str, kind: str) -> None:
    """`export` itself compares; here it is compared once more for an encoder, for rows of other lengths."""
    pytest.importorskip(package)
    pytest.importorskip("onnxscript")
    heads: dict[str, Any] = {
        "onnx": {"sparsity": 0.5, "min_heads": 1},
        "openvino": {"sparsity": 0.25, "prune_heads": False, "min_neurons": 1},
    }
    model = pruned_layer().eval() if kind == "bert" else uneven("llama", **heads[format])
    model.save_pretrained(tmp_path / "pruned")
    assert main(["export", str(tmp_path / "pruned"), str(tmp_path / "out"), "--format", format]) == 0
    from transformers.exporters.base import ExportedModel

    running = EXACT if format == "openvino" else {}
    exported = ExportedModel.from_pretrained(tmp_path / "out", **running)
    assert set(exported.components) == ({"model"} if kind == "bert" else {"prefill", "decode"})
    if kind == "bert":
        for shape in ((1, 4), (5, 17)):
            ids = torch.randint(5, 50, shape)
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": ids * 0}
            torch.testing.assert_close(
                exported(**inputs).logits, model(**inputs).logits, rtol=1e-4, atol=1e-4
            )


class Convertor:
    """What vLLM reads configs by, as far as it is asked for those of layers."""

    def __init__(self, hf_config: Any, hf_text_config: Any):
        self.hf_config, self.hf_text_config = hf_config, hf_text_config

    def get_per_layer_hf_configs(self) -> Any:
        return None


def as_vllm(monkeypatch: pytest.MonkeyPatch, convertor: type) -> None:
    for name in ("vllm", "vllm.config", "vllm.transformers_utils"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    convertors = ModuleType("vllm.transformers_utils.model_arch_config_convertor")
    convertors.ModelArchConfigConvertorBase = convertor  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, convertors.__name__, convertors)


def test_vllm_is_told_the_heads_of_each_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    as_vllm(monkeypatch, Convertor)
    register()
    once = Convertor.get_per_layer_hf_configs
    register()
    assert Convertor.get_per_layer_hf_configs is once
    dense = make("llama").config
    assert Convertor(dense, dense).get_per_layer_hf_configs() is None
    model = cut_randomly(make("llama"), (2, 9, 1, 5, 2, 1))
    config, size = model.config, head_size(model.config)
    config.architectures = ["LlamaForCausalLM"]
    layers = Convertor(config, config).get_per_layer_hf_configs()
    assert config.architectures == ["TransformersForCausalLM"]
    heads = [(one.num_attention_heads, one.num_key_value_heads) for one, same in layers if one is same]
    attentions = [layer.self_attn for layer in model.model.layers]
    assert heads == [(len(a.q_proj.weight) // size, len(a.k_proj.weight) // size) for a in attentions]
    assert config.num_attention_heads == dense.num_attention_heads


def test_what_vllm_cannot_serve_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    as_vllm(monkeypatch, type("Convertor", (), {}))
    with pytest.warns(UserWarning, match="this version of vLLM has one number of heads for all layers"):
        register()
    config = make("llama").config
    plan: Any = cut_randomly(make("llama"), (2, 0, 1, 5, 2, 1)).config.kprune
    with pytest.raises(
        UnsupportedModelError, match="without neurons, expected min_heads=1 and min_neurons=1"
    ):
        layer_configs(config, plan)
    plan = cut_randomly(make("llama"), (2, 9, 1, 5, 2, 1)).config.kprune
    plan["stacks"][0]["blocks"][0]["by"] = "query"
    with pytest.raises(UnsupportedModelError, match="expected head_unit='group'"):
        layer_configs(config, plan)
    plan["stacks"] *= 2
    with pytest.raises(UnsupportedModelError, match="more was pruned than the attentions and FFNs"):
        layer_configs(config, plan)


@contextmanager
def llama_cpp(path: Path) -> Iterator[Callable[[str, dict[str, Any]], Any]]:
    """What the server of llama.cpp answers where a model is."""
    package = pytest.importorskip("xllamacpp")
    options = package.CommonParams()
    options.model.path, options.n_ctx, options.warmup = str(path), 64, False
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = 1
    server = package.Server(options)

    def ask(what: str, body: dict[str, Any]) -> Any:
        request = Request(
            f"{server.listening_address}/{what}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urlopen(request, timeout=60) as answer:
            return json.load(answer)

    yield ask


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "sparsity"), [("llama", 0.7), ("qwen2", 0.7), ("qwen3", 0.4)])
def test_llama_cpp_gives_the_same_greedy_tokens(tmp_path: Path, model_type: str, sparsity: float) -> None:
    """A model that lost all heads of its first layer, too, where llama.cpp reads the size of a head from."""
    pytest.importorskip("gguf")
    tokenizer, model = bytes_tokenizer(split_by(PRETOKENIZE_REGEX)), uneven(model_type, sparsity=sparsity)
    model.resize_token_embeddings(len(tokenizer) + 4, mean_resizing=False)
    for each in (model, tokenizer):
        each.save_pretrained(tmp_path / "pruned")
    hf_kprune.export(str(tmp_path / "pruned"), str(tmp_path / "out"), "gguf")
    prompt, count = [7, 11, 13, 17], 12
    tokens = torch.tensor([prompt])
    for _ in range(count):  # without a word that ends it
        logits = model(input_ids=tokens).logits
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
    with llama_cpp(tmp_path / "out" / NAME) as ask:
        body = {"prompt": prompt, "n_predict": count, "temperature": 0, "n_probs": 1, "ignore_eos": True}
        answers = ask("completion", body)["completion_probabilities"]
    assert [token["id"] for token in answers] == tokens[0, len(prompt) :].tolist()
    wanted = logits[0, len(prompt) - 1 :].log_softmax(-1).amax(-1)
    np.testing.assert_allclose([token["logprob"] for token in answers], wanted.detach(), rtol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "split",
    [
        *(pytest.param(split_by(expression), id=name) for expression, name in SPLITTING.items()),
        pytest.param([pre_tokenizers.ByteLevel(add_prefix_space=False)], id="gpt-2"),
        pytest.param([DIGITS, pre_tokenizers.ByteLevel(add_prefix_space=False)], id="smollm"),
    ],
)
def test_llama_cpp_splits_texts_as_the_tokenizer_does(tmp_path: Path, split: list[Any]) -> None:
    pytest.importorskip("gguf")
    tokenizer, model = bytes_tokenizer(split), uneven("llama")
    model.resize_token_embeddings(len(tokenizer) + 4, mean_resizing=False)
    for each in (model, tokenizer):
        each.save_pretrained(tmp_path / "pruned")
    hf_kprune.export(str(tmp_path / "pruned"), str(tmp_path / "out"), "gguf")
    with llama_cpp(tmp_path / "out" / NAME) as ask:
        for text in TEXTS:
            tokens = ask("tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]
            assert tokens == tokenizer(text)["input_ids"], text
