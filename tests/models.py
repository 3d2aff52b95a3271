"""Tiny random models, and what makes pruned ones of them."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from zoo import DECODER, DISTILBERT, ENCODER, IMAGE, ZOO

from hf_kprune.structure.families import FAMILIES
from hf_kprune.structure.sublayers import find_sublayers
from hf_kprune.structure.surgery import cut, write_plan


BERT_LIKE = {**ENCODER, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
CONFIGS: dict[str, dict[str, Any]] = {
    "bert": BERT_LIKE,
    "roberta": BERT_LIKE,
    "xlm-roberta": BERT_LIKE,
    "camembert": BERT_LIKE,
    "electra": {**BERT_LIKE, "embedding_size": 8},
    "distilbert": DISTILBERT,
    "mpnet": BERT_LIKE,
}
MODEL_TYPES = list(CONFIGS)
HEADS = (
    "",
    "CAUSAL_LM",
    "MASKED_LM",
    "MULTIPLE_CHOICE",
    "NEXT_SENTENCE_PREDICTION",
    "PRETRAINING",
    "QUESTION_ANSWERING",
    "SEQUENCE_CLASSIFICATION",
    "TOKEN_CLASSIFICATION",
)


def classes(model_type: str) -> dict[str, type[PreTrainedModel]]:
    """Every class of the AutoModel tables for a model type, by table (`""` is the base model)."""
    tables = {head: f"MODEL_FOR_{head}_MAPPING_NAMES" if head else "MODEL_MAPPING_NAMES" for head in HEADS}
    names = {head: getattr(modeling_auto, table).get(model_type) for head, table in tables.items()}
    return {head: getattr(transformers, name) for head, name in names.items() if name}


def slow_unless_in(default: Collection[Any], every: Iterable[Any]) -> list[Any]:
    """Parameters for a test of each of `every`; of those that are not in `default` it is a slow test."""
    return [
        pytest.param(
            *(one if isinstance(one, tuple) else (one,)), marks=() if one in default else pytest.mark.slow
        )
        for one in every
    ]


ONE_HEAD = [
    ("bert", "SEQUENCE_CLASSIFICATION"),
    ("distilbert", "MASKED_LM"),
    ("electra", "SEQUENCE_CLASSIFICATION"),
    ("mpnet", "TOKEN_CLASSIFICATION"),
    ("roberta", "MASKED_LM"),
    ("camembert", "QUESTION_ANSWERING"),
    ("xlm-roberta", ""),
]
"""A head for each model type."""
EVERY_HEAD = slow_unless_in(
    [
        *(ONE_HEAD[0], *ONE_HEAD[3:]),
        *(("distilbert", "MASKED_LM"), ("electra", "MULTIPLE_CHOICE"), ("roberta", "CAUSAL_LM")),
        *(("bert", head) for head in ("NEXT_SENTENCE_PREDICTION", "PRETRAINING")),
    ],
    [(model_type, head) for model_type in MODEL_TYPES for head in classes(model_type)],
)
"""All heads of all model types: by default each head of one type, and one head or two of each type."""
EVERY_TYPE = slow_unless_in(
    [model_type for model_type in MODEL_TYPES if model_type not in ("camembert", "xlm-roberta")], MODEL_TYPES
)
"""All model types: by default those of which no two are built alike."""


MIXTURES = [
    name
    for name in ZOO
    if name != "gemma4_text"  # has some where its config says so
    and any(block.kind == "experts" for stack in FAMILIES.get(name, ()) for block in stack.blocks)
]
"""Mixtures of experts in the zoo."""


def tiny(
    model_type: str = "bert", head: str = "SEQUENCE_CLASSIFICATION", seed: int = 0, **config: Any
) -> PreTrainedModel:
    """A tiny random model whose every parameter, biases and norms too, is away from its initial value."""
    settings = {**CONFIGS[model_type], **({"is_decoder": True} if head == "CAUSAL_LM" else {}), **config}
    torch.default_generator.manual_seed(seed)
    model = classes(model_type)[head](AutoConfig.for_model(model_type, **settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def shallow(
    model_type: str = "bert", head: str = "SEQUENCE_CLASSIFICATION", **config: Any
) -> PreTrainedModel:
    """A tiny model of two layers, where what is tested asks no more of depth than a lower layer and an upper one."""
    depth = "n_layers" if model_type == "distilbert" else "num_hidden_layers"
    return tiny(model_type, head, **{depth: 2, **config})


def cut_all(model: PreTrainedModel, masks: Sequence[torch.Tensor], by: str | None = None) -> PreTrainedModel:
    """A copy that keeps the units of each sublayer that `masks` tell."""
    student = copy.deepcopy(model)
    sublayers = find_sublayers(student, by)
    for sublayer, mask in zip(sublayers, masks, strict=True):
        cut(sublayer, mask)
    write_plan(sublayers)
    return student


KEPT = (2, 5, 0, 12, 3, 0)  # units in the sublayers of the three layers: 4 heads and 12 neurons each before


def cut_randomly(model: PreTrainedModel, kept: tuple[int, ...] = KEPT, seed: int = 1) -> PreTrainedModel:
    """Cut random units, so that `kept` are left."""
    sublayers = find_sublayers(model)
    generator = torch.Generator().manual_seed(seed)
    for sublayer, units in zip(sublayers, kept, strict=True):
        keep = torch.zeros(sublayer.num_units, dtype=torch.bool)
        keep[torch.randperm(sublayer.num_units, generator=generator)[:units]] = True
        cut(sublayer, keep)
    write_plan(sublayers)
    return model


def pruned(model_type: str = "bert", head: str = "SEQUENCE_CLASSIFICATION", **config: Any) -> PreTrainedModel:
    return cut_randomly(tiny(model_type, head, **config))


def pruned_layer() -> PreTrainedModel:
    """A pruned model of one layer, where what is tested is how files are written and not what is in them."""
    return cut_randomly(tiny(num_hidden_layers=1), (2, 5))


VOCABULARY = 60
SIZES = {
    "d_model": 8,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 8,
    "decoder_ffn_dim": 8,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 20,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
SMALL_T5 = {
    "d_model": 8,
    "d_kv": 4,
    "d_ff": 8,
    "num_layers": 1,
    "num_heads": 2,
    "vocab_size": VOCABULARY,
    "decoder_start_token_id": 1,
    "pad_token_id": 1,
}
VISION = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
TEXT_SIZES = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 20,
}
CONFIGS_BY_CLASS: dict[str, dict[str, Any]] = {
    "Bart": SIZES,
    "Pegasus": SIZES,
    "Whisper": {
        **SIZES,
        "max_position_embeddings": None,
        "max_source_positions": 8,
        "max_target_positions": 12,
        "num_mel_bins": 4,
        "suppress_tokens": None,
    },
    "T5": SMALL_T5,
    "ViT": VISION,
    "CLIP": {"text_config": TEXT_SIZES, "vision_config": VISION, "projection_dim": 8},
    "Wav2Vec2": {
        **TEXT_SIZES,
        "conv_dim": [8],
        "conv_kernel": [4],
        "conv_stride": [2],
        "num_conv_pos_embeddings": 4,
    }
    | {"num_conv_pos_embedding_groups": 2, "feat_extract_norm": "layer", "num_feat_extract_layers": 1},
    "GPT2": {
        "n_embd": 8,
        "n_layer": 1,
        "n_head": 2,
        "n_positions": 20,
        "vocab_size": VOCABULARY,
        "bos_token_id": 3,
    }
    | {"eos_token_id": 3},
}


def tiny_of_class(name: str) -> PreTrainedModel:
    """A tiny random model of a class."""
    family = next(family for family in CONFIGS_BY_CLASS if name.startswith(family))
    torch.default_generator.manual_seed(0)
    return getattr(transformers, name)(
        getattr(transformers, f"{family}Config")(**CONFIGS_BY_CLASS[family])
    ).eval()


IMAGE_TOKEN = 70
TOKENS = {"image_token_index": IMAGE_TOKEN, "image_token_id": IMAGE_TOKEN}
SEEING: dict[str, tuple[str, dict[str, Any]]] = {
    "llava": (
        "LlavaForConditionalGeneration",
        {
            "text_config": {**DECODER, "model_type": "llama", "vocab_size": 80},
            "vision_config": {**IMAGE, "model_type": "clip_vision_model"},
            "image_seq_length": 4,
            "vision_feature_layer": -1,
        },
    ),
    "paligemma": (
        "PaliGemmaForConditionalGeneration",
        {
            "text_config": {**DECODER, "model_type": "gemma", "vocab_size": 80, "head_dim": 4},
            "vision_config": {**IMAGE, "model_type": "siglip_vision_model"},
            "projection_dim": 16,
            "hidden_size": 16,
        },
    ),
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        {
            "text_config": {**DECODER, "model_type": "gemma3_text", "vocab_size": 80, "head_dim": 4},
            "vision_config": {**IMAGE, "model_type": "siglip_vision_model"},
            "mm_tokens_per_image": 4,
        },
    ),
}


def seeing(model_type: str, **config: Any) -> PreTrainedModel:
    """A tiny language model that sees images, each as four tokens."""
    name, settings = SEEING[model_type]
    torch.manual_seed(0)
    return getattr(transformers, name)(
        AutoConfig.for_model(model_type, **{**settings, **TOKENS, **config})
    ).eval()
