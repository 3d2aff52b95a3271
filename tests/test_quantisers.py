"""Quantisers leave what has no inputs or outputs alone, while a checkpoint is loaded and afterwards. GGUF is read."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checks import assert_same_state, logits
from data import collate, rows
from models import pruned, slow_unless_in, tiny
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from zoo import make

from hf_kprune import KPruneArguments, KPrunePruner
from hf_kprune.modeling_kprune import EmptyLinear


def torchao_int8(dynamic: bool) -> Any:
    quantization = pytest.importorskip("torchao.quantization")
    return (
        quantization.Int8DynamicActivationInt8WeightConfig()
        if dynamic
        else quantization.Int8WeightOnlyConfig()
    )


def by_torchao(folder: Path, dynamic: bool = False) -> PreTrainedModel:
    config = transformers.TorchAoConfig(torchao_int8(dynamic))
    return AutoModelForSequenceClassification.from_pretrained(folder, quantization_config=config)


def by_torchao_afterwards(folder: Path) -> PreTrainedModel:
    config, model = torchao_int8(False), AutoModelForSequenceClassification.from_pretrained(folder)
    pytest.importorskip("torchao.quantization").quantize_(model, config)
    return model


def by_torch_afterwards(folder: Path) -> PreTrainedModel:
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def by_quanto(folder: Path) -> PreTrainedModel:
    pytest.importorskip("optimum.quanto")
    config = transformers.QuantoConfig(weights="int8")
    return AutoModelForSequenceClassification.from_pretrained(folder, quantization_config=config)


def by_bitsandbytes(folder: Path, bits: int = 8) -> PreTrainedModel:
    pytest.importorskip("bitsandbytes")
    config = transformers.BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    return AutoModelForSequenceClassification.from_pretrained(folder, quantization_config=config)


WAYS: dict[str, Callable[[Path], PreTrainedModel]] = {
    "torchao, weights": by_torchao,
    "torchao, activations too": lambda folder: by_torchao(folder, dynamic=True),
    "torchao, afterwards": by_torchao_afterwards,
    "torch, afterwards": by_torch_afterwards,
    "quanto": by_quanto,
    "bitsandbytes, 8 bits": by_bitsandbytes,
    "bitsandbytes, 4 bits": lambda folder: by_bitsandbytes(folder, bits=4),
}


@pytest.mark.parametrize("way", slow_unless_in(("torch, afterwards", "quanto", "bitsandbytes, 8 bits"), WAYS))
def test_a_checkpoint_with_emptied_sublayers_is_quantised(tmp_path: Path, way: str) -> None:
    model = pruned()
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of the quantisers about themselves
        quantised = WAYS[way](tmp_path)
        close = logits(quantised) - logits(model)
    assert close.abs().max() < 0.5 * logits(model).abs().max()
    sizes = ("in_features", "out_features")
    empty = [module for module in quantised.modules() if 0 in [getattr(module, size, 1) for size in sizes]]
    assert {type(module) for module in empty} == {EmptyLinear}


def test_nothing_is_spared_where_nothing_is_quantised(tmp_path: Path) -> None:
    model = pruned()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float16)
    assert {value.dtype for value in loaded.state_dict().values()} == {torch.float16}
    empty = [module for module in loaded.modules() if isinstance(module, EmptyLinear)]
    assert len(empty) == 3  # the output of an emptied attention, and both projections of an emptied FFN
    assert not any(isinstance(module, EmptyLinear) for module in tiny().modules())


def write_gguf(model: PreTrainedModel, path: Path) -> None:
    """A Llama as llama.cpp keeps it, in 16 bits."""
    gguf = pytest.importorskip("gguf")
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        dtype = torch.float16 if tensor.dim() > 1 else torch.float32
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor.to(dtype).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_model_that_was_read_from_gguf_is_pruned_saved_and_loaded(tmp_path: Path) -> None:
    write_gguf(make("llama"), tmp_path / "dense.gguf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="dense.gguf")
    args = KPruneArguments(sparsity=0.4, num_tokens=100, disable_tqdm=True)
    pruner = KPrunePruner(model, args, rows(12), collate)
    pruner.prune()
    pruner.save_model(str(tmp_path / "pruned"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    assert_same_state(loaded.state_dict(), pruner.model.state_dict())
    assert not hasattr(loaded.config, "quantization_config")
