"""Sixty model types drawn by lot, as users would bring them: pruned, refused, or worse.

    python benchmarks/detection_draw.py --draw 7   the table of the last draw in benchmarks/results/detection_draw.md

The types of a draw were drawn by `drawn` from all that Transformers has and that no family, no test and no earlier list named, after
the last family was added and before any of them was tried. Configs are made by a rule: sizes that a config class has by default
are replaced by small ones, in configs inside it, too. `AMENDED` and `INPUTS` have what else a model of the first draw needed to
be built and to run, which was found out without hf_kprune; of the second draw several rules are tried one after the other
(`configs_of`), and inputs are made for every argument that has a usual name (`inputs_of`).
"""

from __future__ import annotations

import argparse
import copy
import importlib
import inspect
import random
import re
import resource
import tempfile
import warnings
from collections.abc import Collection, Iterator
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from detection_holdout import judge, outputs_of
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.utils import logging

from hf_kprune import (
    KPruneArguments,
    KPruneError,
    KPrunePruner,
    UnsupportedArchitectureError,
    UnsupportedModelError,
)
from hf_kprune.structure.checks import check_described
from hf_kprune.structure.configs import text_config
from hf_kprune.structure.describe import describe
from hf_kprune.structure.facts import example_inputs
from hf_kprune.structure.families import FAMILIES, REFUSED
from hf_kprune.structure.sublayers import find_sublayers


SEED = 13
DRAWN = [
    "axk2",
    "blip_2_qformer",
    "clvp_encoder",
    "colpali",
    "deepseek_vl",
    "deformable_detr",
    "dia",
    "diffusion_gemma_text",
    "encodec",
    "fastspeech2_conformer",
    "florence2",
    "fun_asr_nano",
    "fun_asr_nano_encoder",
    "gemma4_unified_audio",
    "gemma4_unified_text",
    "gemma4_vision",
    "glm5_next",
    "glm_ocr",
    "glmasr",
    "granite_docling_vision",
    "idefics2",
    "idefics3_vision",
    "kosmos_2_vision_model",
    "kyutai_speech_to_text",
    "levit",
    "llama4_text",
    "minicpm_ocr_vision",
    "molmo2_vision",
    "muse_glimmer_assistant",
    "musicgen",
    "paddleocr_vl_vision",
    "phi4_multimodal_audio",
    "pi0",
    "pocket_tts",
    "pp_doclayout_v3",
    "pp_formulanet",
    "pp_ocrv5_mobile_rec",
    "qwen3_asr",
    "qwen3_omni_moe_thinker",
    "qwen4_exp_text",
    "sam3",
    "sam3_lite_text",
    "sam3_lite_text_detr_encoder",
    "sam3_lite_text_mask_decoder",
    "sam3_video",
    "sam_hq_mask_decoder",
    "sam_hq_prompt_encoder",
    "sapiens2_head",
    "seamless_m4t",
    "seamless_m4t_v2",
    "speecht5_hifigan",
    "step3p5",
    "superglue",
    "t5gemma2",
    "t5gemma2_decoder",
    "textnet",
    "tipsv2_dpt",
    "video_llava",
    "xcodec",
    "zoedepth",
]

SEED_2 = 29
DRAWN_2 = [
    "bark",
    "blt_patcher",
    "cosmos3_edge_text",
    "dac",
    "dbrx",
    "deepseek_ocr2_vision",
    "deimv2",
    "edgetam_vision_model",
    "efficientnet",
    "exaone4_5_vision",
    "gemma3n_vision",
    "gemma4_assistant",
    "glm_image_vision",
    "glm_ocr_vision",
    "hiera",
    "hyperclovax",
    "idefics_perciever",
    "inkling2_text",
    "inkling2_vision",
    "inkling_vision",
    "kolibri1",
    "lfm2_vl",
    "lfm3_vl",
    "lfm3_vl_vision",
    "mgp-str",
    "mistral_large4_text",
    "mlcd_vision_model",
    "mobilenet_v1",
    "mobilevit",
    "modernvbert",
    "molmo2_adapter",
    "moonshine_streaming_encoder",
    "muse_glimmer",
    "muse_spark_vision",
    "musicflamingo",
    "nemotron_h_omni",
    "patchtst",
    "pegasus_x",
    "perception_lm",
    "phi4_multimodal_vision",
    "pocket_tts_audio_tokenizer",
    "pp_formulanet_vision",
    "pp_lcnet",
    "pp_lcnet_v4",
    "prompt_depth_anything",
    "qwen3_asr_encoder",
    "qwen4_exp",
    "rf_detr",
    "rf_detr_dinov2",
    "sam2_prompt_encoder",
    "sam3_tracker_prompt_encoder",
    "sam3_tracker_video_prompt_encoder",
    "speecht5",
    "swin2sr",
    "univnet",
    "vibevoice_acoustic_tokenizer_encoder",
    "vibevoice_asr",
    "vitpose",
    "vitpose_backbone",
    "vjepa2",
]
"""The second draw, from 397 types."""

SEED_3 = 43
DRAWN_3 = [
    "beam",
    "canary_decoder",
    "clvp",
    "cohere_compass",
    "cohere_compass_vision",
    "colmodernvbert",
    "cvt",
    "deepseek_ocr2",
    "depth_pro",
    "dia_decoder",
    "dinat",
    "dots3_note",
    "edgetam_video_prompt_encoder",
    "efficientloftr",
    "embedding_gemma2",
    "ernie4_5_vl_moe_vision",
    "falcon_mamba",
    "flava",
    "flava_multimodal_model",
    "florence_vision",
    "gemma4",
    "gemma4_unified_assistant",
    "git",
    "instructblipvideo_qformer",
    "instructblipvideo_vision_model",
    "kimi_k25",
    "kosmos_2_5_vision_model",
    "mimo_v2_flash",
    "moss_transcribe_diarize",
    "moss_transcribe_diarize_audio",
    "muse_glimmer_vision",
    "musicgen_melody_decoder",
    "nemotron3_5_transcribe_asr_audio",
    "pe_audio_encoder",
    "pe_audio_video",
    "pe_video",
    "poolformer",
    "pp_chart2table_vision",
    "pp_doclayout_v4",
    "qwen2_5_omni_talker",
    "qwen2_5_omni_token2wav",
    "qwen3_omni_moe_audio_encoder",
    "qwen3_omni_moe_vision_encoder",
    "qwen4_exp_vision",
    "sam2",
    "sam2_video",
    "sam3_mask_decoder",
    "slanext",
    "slanext_vision",
    "step3p5_vision",
    "swiftformer",
    "timm_backbone",
    "timm_wrapper",
    "unlimited_ocr",
    "vibevoice",
    "vibevoice_acoustic_tokenizer",
    "voxtral",
    "voxtral_realtime",
    "xclip",
    "zaya",
]

SEED_4 = 57
DRAWN_4 = [
    "EvollaModel",
    "align",
    "autoformer",
    "bit",
    "blt",
    "blt_global_transformer",
    "clap",
    "clvp_decoder",
    "cohere_asr",
    "convnextv2",
    "eomt_dinov3",
    "gemma4_audio",
    "gemma4_unified",
    "gemma4_unified_vision",
    "glm5_next_vision",
    "glmga",
    "got_ocr2",
    "gpt-sw3",
    "granite4_vision",
    "granite_speech_encoder",
    "inkling2",
    "inkling_audio",
    "instructblipvideo",
    "kimi_k25_vision",
    "layoutlmv2",
    "llama4",
    "llava_next_video",
    "lw_detr_vit",
    "minicpmv4_6",
    "mistral_large4",
    "mm-grounding-dino",
    "mobilevitv2",
    "musicgen_decoder",
    "neomme",
    "omdet-turbo",
    "pe_audio",
    "pe_audio_video_encoder",
    "pe_video_encoder",
    "pix2struct",
    "pocket_tts_audio_tokenizer_decoder",
    "pocket_tts_audio_tokenizer_encoder",
    "pp_lcnet_v3",
    "pp_ocrv6_medium_det",
    "pp_ocrv6_small_det",
    "qwen2_5_omni_dit",
    "qwen2_5_omni_thinker",
    "qwen3_omni_moe_talker_text",
    "regnet",
    "sam2_mask_decoder",
    "sam2_video_mask_decoder",
    "sam3_detr_encoder",
    "sam3_tracker_mask_decoder",
    "sam3_vit_model",
    "sam_mask_decoder",
    "shieldgemma2",
    "t5_gemma_module",
    "uvdoc",
    "vibevoice_acoustic_tokenizer_decoder",
    "vibevoice_diffusion",
    "video_llama_3",
]
"""The fourth draw, from 278 types."""


DRAWN_5 = [
    "audioflamingo3",
    "bailing_hybrid",
    "blt_local_decoder",
    "blt_local_encoder",
    "bridgetower",
    "bridgetower_vision_model",
    "clap_audio_model",
    "cosmos3_edge",
    "deepseek_ocr2_encoder",
    "deepseek_ocr2_text",
    "deepseek_v4",
    "dots3_note_vision_encoder",
    "edgetam_mask_decoder",
    "edgetam_video",
    "edgetam_video_mask_decoder",
    "embedding_gemma2_text",
    "eomt",
    "flava_image_codebook",
    "focalnet",
    "gemma3n",
    "glm46v",
    "granite_speech5_ctc",
    "granite_speech5_encoder",
    "grounding-dino",
    "hy_v4",
    "hyperclovax_vision_v2",
    "informer",
    "jev",
    "kosmos-2",
    "kosmos_2_text_model",
    "lw_detr",
    "lxmert",
    "mllama_text_model",
    "molmo2",
    "moshi_depth",
    "nemotron_asr_streaming",
    "nemotron_asr_streaming_encoder",
    "neucodec",
    "oneformer",
    "pp_ocrv6_small_rec",
    "pp_ocrv6_tiny_rec",
    "qianfan_ocr_vision",
    "qwen2_5_omni_bigvgan",
    "qwen2_5_omni_vision_encoder",
    "rag",
    "sam2_hiera_det_model",
    "sam3_geometry_encoder",
    "sam3_lite_text_detr_decoder",
    "sam3_lite_text_geometry_encoder",
    "seggpt",
    "step3p7",
    "t5gemma2_text",
    "timesfm",
    "ultravbert",
    "video_llama_3_vision",
    "videomt",
    "videoprism_vision_model",
    "vitmatte",
    "vits",
    "xlstm",
]
"""The fifth draw, with seed 71 from 204 types."""

DRAWN_6 = [
    "aria",
    "audioflamingo3_encoder",
    "canary",
    "chameleon",
    "chameleon_vqgan",
    "chmv2",
    "cohere_compass_text",
    "colqwen2",
    "cosmos3_edge_vision",
    "decision_transformer",
    "depth_anything",
    "dia_encoder",
    "diffusion_gemma",
    "dinov3_convnext",
    "edgetam_prompt_encoder",
    "emu3_vqgan",
    "ernie4_5_vl_moe_text",
    "esmc",
    "evolla",
    "fast_vlm",
    "gemma3n_audio",
    "granite_speech_plus",
    "granite_speech_plus_encoder",
    "groupvit_text_model",
    "groupvit_vision_model",
    "idefics2_perceiver",
    "inkling_text",
    "janus_vision_model",
    "kosmos_2_5_text_model",
    "layoutxlm",
    "llama4_vision_model",
    "mamba2",
    "mimi",
    "minicpm_ocr",
    "minicpmv4_6_vision",
    "minicpmv4_7",
    "moshi",
    "musicgen_melody",
    "nemo_speechlm",
    "nemotron3_diarization",
    "nllb-moe",
    "nougat",
    "patchtsmixer",
    "pp_chart2table",
    "pp_doclayout_v2",
    "pp_ocrv5_mobile_det",
    "qwen2_5_omni",
    "qwen3_omni_moe_talker_code_predictor",
    "sam2_video_prompt_encoder",
    "sam3_detr_decoder",
    "sam3_tracker",
    "sam_hq_vision_model",
    "sam_prompt_encoder",
    "tipsv2",
    "udop",
    "unlimited_ocr_vision_encoder",
    "uvdoc_backbone",
    "videoprism",
    "vipllava",
    "voxtral_realtime_text",
]
"""The sixth draw, with seed 97 from 151 types."""

DRAWN_7 = [
    "align_vision_model",
    "bridgetower_text_model",
    "cosmos3_omni",
    "deepseek_ocr2_sam_vision_model",
    "deepseek_vl_hybrid",
    "dots3_note_audio_encoder",
    "dots3_note_text",
    "edgetam",
    "emu3",
    "ernie4_5_vl_moe",
    "esmfold2",
    "fastspeech2_conformer_hifigan",
    "fastspeech2_conformer_with_hifigan",
    "glm5_next_text",
    "glm_image",
    "glm_moe_dsa",
    "granite_docling",
    "granite_speech",
    "groupvit",
    "hgnet_v2",
    "higgs_audio_v2",
    "higgs_audio_v2_tokenizer",
    "hrm_text",
    "hunyuan_vl",
    "idefics",
    "idefics_vision",
    "imagegpt",
    "janus",
    "jetmoe",
    "kosmos-2.5",
    "lightglue",
    "lighton_ocr",
    "mimi_encoder",
    "minimax_m3_vl",
    "minimax_m3_vl_vision",
    "mllama",
    "mllama_vision_model",
    "moonshine_streaming",
    "muse_spark_audio",
    "muse_spark_text",
    "nemotron3_5_asr",
    "nemotron3_5_transcribe_word_timestamp",
    "nemotron3_diarization_audio",
    "parakeet_rnnt",
    "parakeet_tdt",
    "phi4_multimodal",
    "pix2struct_vision_model",
    "pp_ocrv5_server_det",
    "pp_ocrv5_server_rec",
    "pvt",
    "qianfan_ocr",
    "qwen3_omni_moe",
    "sam2_vision_model",
    "sam3_tracker_video",
    "sam3_tracker_video_mask_decoder",
    "sam_hq",
    "superpoint",
    "timesfm2_5",
    "unlimited_ocr_vision",
    "videoprism_text_model",
]
"""The seventh draw, with seed 131 from 91 types."""

DRAWS = {1: DRAWN, 2: DRAWN_2, 3: DRAWN_3, 4: DRAWN_4, 5: DRAWN_5, 6: DRAWN_6, 7: DRAWN_7}

SIZES: dict[int, str] = {
    60: "vocab_size",
    64: "max_position_embeddings n_positions max_target_positions",
    16: "hidden_size d_model n_embd dim embed_dim hidden_dim projection_dim encoder_hidden_size out_hidden_size",
    12: "intermediate_size encoder_ffn_dim decoder_ffn_dim ffn_dim n_inner d_ff mlp_dim",
    8: "image_size moe_intermediate_size q_lora_rank kv_lora_rank num_mel_bins max_source_positions",
    5: "v_head_dim",
    4: "num_attention_heads n_head encoder_attention_heads decoder_attention_heads num_heads attention_heads head_dim "
    "patch_size num_experts num_local_experts n_routed_experts d_kv sliding_window qk_nope_head_dim",
    3: "eos_token_id",
    2: "num_hidden_layers n_layer encoder_layers decoder_layers num_layers depth num_experts_per_tok "
    "num_key_value_heads bos_token_id decoder_start_token_id qk_rope_head_dim",
    1: "pad_token_id n_group topk_group n_shared_experts first_k_dense_replace",
}
SMALL = {name: size for size, names in SIZES.items() for name in names.split()}
MROPE = {"rope_type": "default", "mrope_section": [1, 1, 0], "rope_theta": 10_000.0}
AMENDED: dict[str, dict[str, Any]] = {
    "axk2": {"num_key_value_heads": 4, "index_n_heads": 2, "index_head_dim": 4, "index_topk": 4},
    "clvp_encoder": {"hidden_size": 128},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "global_head_dim": 8},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 4}},
    "glm5_next": {"text_config": {"num_key_value_heads": 4, "qk_rope_head_dim": 0}},
    "glm_ocr": {"text_config": {"rope_parameters": MROPE}},
    "kyutai_speech_to_text": {"audio_pad_token_id": 1, "audio_bos_token_id": 2, "codebook_vocab_size": 60},
    "levit": {"image_size": 224, "patch_size": 16},
}
"""What a config needs besides."""

PLACES = torch.stack(torch.meshgrid(torch.arange(3), torch.arange(3), indexing="xy"), -1).flatten(0, 1)
INPUTS: dict[str, dict[str, Tensor]] = {
    "blip_2_qformer": {"query_embeds": torch.randn(3, 6, 16), "encoder_hidden_states": torch.randn(3, 5, 16)},
    "encodec": {"input_values": torch.randn(3, 1, 640)},
    "fun_asr_nano_encoder": {
        "input_features": torch.randn(3, 12, 56),
        "input_features_mask": torch.ones(3, 12).long(),
    },
    "gemma4_vision": {
        "pixel_values": torch.randn(3, 9, 48),
        "pixel_position_ids": PLACES.expand(3, 9, 2).clone(),
    },
    "kyutai_speech_to_text": {"input_ids": torch.randint(4, 60, (3, 11, 33))},
    "speecht5_hifigan": {"spectrogram": torch.randn(3, 10, 80)},
    "xcodec": {"input_values": torch.randn(3, 1, 3200)},
}
"""Inputs of models for which none are guessed."""

LARGEST = 60_000_000
"""Parameters of a model that is tried."""

MEMORY = 16 * 2**30
"""Bytes of a process that tries a type."""

TABLES = ("MODEL_FOR_CAUSAL_LM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM", "MODEL_FOR_IMAGE_TEXT_TO_TEXT", "MODEL")


def named() -> set[str]:
    """What families, tests and the earlier lists name: every listed type, and every word in quotes."""
    root = Path(__file__).parent.parent
    files = [
        root / "hf_kprune/structure/families.py",
        *(root / "tests").glob("*.py"),
        *(root / "benchmarks").glob("*.py"),
    ]
    words = {word for file in files for word in re.findall(r'"([\w-]+?)(?::[^"]*)?"', file.read_text())}
    return words | {*FAMILIES, *REFUSED}


def drawn(known: Collection[str], seed: int) -> list[str]:
    """Sixty of the model types that are not `known`."""
    return sorted(random.Random(seed).sample(sorted(set(CONFIG_MAPPING.keys()) - set(known)), 60))


def tiny(config: Any) -> dict[str, Any]:
    """Small values for the sizes that a config has."""
    values: dict[str, Any] = {}
    for name, value in config.to_dict().items():
        inner = vars(config).get(name)
        if isinstance(value, dict) and hasattr(inner, "to_dict"):
            values[name] = {**tiny(inner), "model_type": value.get("model_type")}
        elif name in SMALL and not isinstance(value, (list, tuple, dict)):
            values[name] = SMALL[name]
    each = [getattr(config, name, None) for name in ("num_key_value_heads", "num_attention_heads")]
    if each[0] == each[1] is not None and "num_key_value_heads" in values:  # it may know no groups
        values["num_key_value_heads"] = values["num_attention_heads"]
    kinds = list(dict.fromkeys(config.to_dict().get("layer_types") or ()))
    return values | ({"layer_types": [kinds[i % len(kinds)] for i in range(2)]} if kinds else {})


LIKE: tuple[tuple[str, int, int], ...] = (
    (r"vocab", 60, 60),
    (r"(^|_)(num_)?(hidden_|encoder_|decoder_|transformer_)?(layers?|blocks?)$|^depth$|layers$", 2, 2),
    (r"key_value_heads|kv_heads", 2, 2),
    (r"heads?$|num_attention_head", 4, 4),
    (r"head_dim|head_size", 4, 4),
    (r"intermediate|ffn|mlp_dim|mlp_hidden", 12, 12),
    (r"experts_per_tok|top_k", 2, 2),
    (r"experts", 4, 4),
    (r"image_size|input_size|crop_size", 16, 8),
    (r"patch_size", 4, 4),
    (r"lora_rank", 8, 8),
    (
        r"(hidden|embed|model|width|projection|context|output|in|out)(_|s$)?(dim|size|channels|features)?$|d_model|dim$|_size$",
        16,
        16,
    ),
)
"""Patterns of names of sizes, with what numbers of at least so much become, and from what on."""


def tiny_like(config: Any) -> dict[str, Any]:
    """Small values for what is named like a size in a config, and in those inside it."""
    values = tiny(config)
    for name, value in config.to_dict().items():
        inner = vars(config).get(name)
        if isinstance(value, dict) and hasattr(inner, "to_dict"):
            values[name] = {**tiny_like(inner), "model_type": value.get("model_type")}
        elif name in values or isinstance(value, bool) or re.search(r"kernel|stride", name):
            continue
        elif isinstance(value, int) or (
            isinstance(value, (list, tuple)) and value and all(isinstance(v, int) for v in value)
        ):
            size = next(((to, least) for like, to, least in LIKE if re.search(like, name)), None)
            if size is not None:
                small = [min(v, size[0]) for v in (value if isinstance(value, (list, tuple)) else [value])]
                values[name] = small[0] if isinstance(value, int) else small
    return values


KEPT = (
    r"image|patch|kernel|window|stride|groups|channels$|token|_id$|_index$|layer_id|version|theta|bins|max_"
)
"""Names of whole numbers that are no widths."""


def scaled(config: Any, factor: int) -> dict[str, Any]:
    """Two layers of a config, of at most 500 words and four experts, whose widths are divided by a factor, so that
    their ratios stay."""
    values: dict[str, Any] = {}

    def small(name: str, value: int) -> int:
        if re.search(r"layers?$|blocks?$|depths?$", name):
            return min(value, 2)
        if re.search(r"vocab|entity_", name):
            return min(value, 500)
        if re.search(r"experts", name) and "tok" not in name:
            return min(value, 4)
        if re.search(KEPT, name) or value < 8 * factor or value % factor:
            return value
        return value // factor

    for name, value in config.to_dict().items():
        inner = vars(config).get(name)
        if isinstance(value, dict) and hasattr(inner, "to_dict"):
            values[name] = {**value, **scaled(inner, factor)}
        elif isinstance(value, dict) and isinstance(value.get("mrope_section"), list):
            values[name] = {**value, "mrope_section": [v // factor for v in value["mrope_section"]]}
        elif isinstance(value, bool) or name in ("dtype", "model_type"):
            continue
        elif isinstance(value, int):
            id_of_word = name.endswith("_token_id") and value >= 500
            values[name] = 499 if id_of_word else small(name, value)
        elif name == "layer_types" and value:
            kinds = list(dict.fromkeys(value))
            values[name] = [kinds[i % len(kinds)] for i in range(2)]
        elif isinstance(value, (list, tuple)) and value and all(type(v) is int for v in value):
            values[name] = [small(name, v) for v in value]
    return values


def fitting(values: dict[str, Any]) -> dict[str, Any]:
    """The values of a config of two layers, in which what is told of single layers and of stages is of two, too."""
    layers = 2
    fit: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and "model_type" in value:
            fit[name] = fitting(value)
        elif isinstance(value, (list, tuple)) and re.search(r"layer_types$|layers$|_layer_ids$", name):
            fit[name] = list(value)[:layers]
        else:
            fit[name] = value
    if isinstance(values.get("out_features"), (list, tuple)):
        ends = [f"stage{place % layers + 1}" for place in range(min(layers, len(values["out_features"])))]
        fit |= {"out_features": ends[-1:] if len(ends) == 1 else ends, "out_indices": None}
    if "per_layer_config" in values:
        fit["per_layer_config"] = {}
    return fit


def configs_of(model_type: str) -> Iterator[dict[str, Any]]:
    """What a config of a type may be made of, one rule after the other; the last ones keep ratios of widths."""
    config = AutoConfig.for_model(model_type)
    yield from every_config(config)
    for values in every_config(config):
        unknown = config.to_dict().get("prediction_length", 0) is None
        yield fitting(values) | ({"prediction_length": 6} if unknown else {})


def every_config(config: Any) -> Iterator[dict[str, Any]]:
    """What a config may be made of by each of the rules."""
    yield tiny(config)
    yield tiny_like(config)
    yield {k: v for k, v in tiny_like(config).items() if not isinstance(v, (list, tuple))}
    for factor in (8, 4, 1):
        yield scaled(config, factor)


def merged(config: dict[str, Any], amendments: dict[str, Any]) -> dict[str, Any]:
    """A config with amendments, also in the configs inside it."""
    inner = {
        name: merged(config[name], value)
        for name, value in amendments.items()
        if isinstance(value, dict) and isinstance(config.get(name), dict)
    }
    return {**config, **amendments, **inner}


def classes_of(model_type: str) -> list[Any]:
    """The model classes of a type: those of the Auto tables, or else those in its module with such a config."""
    names: list[str] = []
    for table in TABLES:
        name = getattr(modeling_auto, f"{table}_MAPPING_NAMES").get(model_type)
        names += [] if name is None else [name if isinstance(name, str) else name[0]]
    if names:
        return [getattr(transformers, name) for name in dict.fromkeys(names)]
    config_class = CONFIG_MAPPING[model_type]
    module = importlib.import_module(config_class.__module__.replace("configuration_", "modeling_"))
    classes = [
        found
        for found in vars(module).values()
        if isinstance(found, type)
        and issubclass(found, PreTrainedModel)
        and getattr(found, "config_class", None) is config_class
        and not found.__name__.endswith("PreTrainedModel")
    ]
    if not classes:
        raise LookupError("Transformers has no model of this type alone")
    return sorted(classes, key=lambda each: (not each.__name__.endswith("Model"), len(each.__name__)))


def build(model_type: str, config: dict[str, Any], seed: int, kind: Any = None) -> PreTrainedModel:
    """A random model of a config, and of a class, with biases and norms away from their initial values too."""
    kind = kind or classes_of(model_type)[0]
    small = AutoConfig.for_model(model_type, **copy.deepcopy(config))
    with torch.device("meta"):
        size = sum(p.numel() for p in kind(copy.deepcopy(small)).parameters())
    if size > LARGEST:
        raise ValueError(f"{size:,} parameters are too many to try")
    torch.manual_seed(seed)
    model: PreTrainedModel = kind(small).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                scale = min(0.2, 0.8 * parameter.shape[-1] ** -0.5) if parameter.dim() > 1 else 0.2
                parameter += scale * torch.randn_like(parameter)
    return model


def words_but(token: int, *shape: int) -> Tensor:
    """Random words that are not this one."""
    words = torch.randint(4, 50, shape, generator=torch.Generator().manual_seed(shape[-1]))
    return torch.where(words == token, 50, words)


def image_token(config: Any) -> int:
    """The word that stands for an image in texts; -1 if there is none."""
    tokens = [getattr(config, name, None) for name in ("image_token_id", "image_token_index")]
    return next((t for t in tokens if isinstance(t, int)), -1)


def texts_with(model: PreTrainedModel, images: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """Texts with the places of images in them, as many as the model makes features of these."""
    token, features = image_token(model.config), getattr(model, "get_image_features", None)
    if features is None or not 0 <= token < getattr(text_config(model.config), "vocab_size", 0):
        return None
    takes = inspect.signature(features).parameters
    try:
        with torch.no_grad():
            patches = features(**{name: value for name, value in images.items() if name in takes})
    except Exception:  # it wants others
        return None
    patches = getattr(patches, "pooler_output", patches)
    patches = (
        torch.cat([part.flatten(0, -2) for part in patches])
        if isinstance(patches, (list, tuple))
        else patches
    )
    if not isinstance(patches, Tensor) or patches.shape[:-1].numel() % 3:
        return None
    places = torch.full((3, patches.shape[:-1].numel() // 3), token)
    before, after = words_but(token, 3, 4), words_but(token, 3, 7)
    ids = torch.cat([before, places, after], 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **images}


def part(config: Any, name: str) -> Any:
    """A config that has a value of this name: this one, or the first inside it; this one if none has."""
    inner = [value for value in vars(config).values() if hasattr(value, "to_dict")]
    return next((each for each in (config, *inner) if getattr(each, name, None)), config)


UNUSUAL: tuple[tuple[str, str], ...] = (
    (r"mask|padding", "attention_mask"),
    (r"pixel|image|frame|picture", "pixel_values"),
    (r"mel|spectrogram|audio", "input_features"),
    (r"ids$|token", "input_ids"),
    (r"embed|state|feat|hidden|pos|latent|memory|query|key|value|^x$|^input$", ""),
)
"""Patterns of names of arguments that are not usual, with the usual argument that they are made like; `""` is any of floats."""


def with_unusual(usual: dict[str, Tensor], needed: Collection[str]) -> dict[str, Tensor]:
    """Inputs with what they lack of the arguments that a model cannot do without, like one that they have."""
    inputs = dict(usual)
    for name in [name for name in needed if name not in usual]:
        like = next((like for pattern, like in UNUSUAL if re.search(pattern, name)), None)
        floats = [value for value in usual.values() if value.is_floating_point()]
        if like == "" and floats:
            inputs[name] = floats[0].clone()
        elif like in usual:
            inputs[name] = usual[like].clone()
    return inputs


def usual_inputs(config: Any) -> Iterator[dict[str, Tensor]]:
    """Random inputs of three samples, by the names that arguments of models usually have."""
    text, image = text_config(config), getattr(config, "vision_config", None) or part(config, "patch_size")
    sound = part(config, "num_mel_bins")
    generator = torch.Generator().manual_seed(0)

    def size(of: Any, names: str, default: int) -> int:
        values = [getattr(of, name, None) for name in names.split()]
        flat = [v[0] if isinstance(v, (list, tuple)) and v else v for v in values]
        return next((v for v in flat if isinstance(v, int) and v > 0), default)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    width = size(config, "hidden_size d_model embed_dim hidden_dim width dim", 16)
    channels, patch = size(image, "num_channels in_channels in_chans", 3), size(image, "patch_size", 4)
    ids = torch.randint(4, size(text, "vocab_size", 60), (3, 11), generator=generator)
    texts = {"input_ids": ids, "attention_mask": torch.ones(3, 11).long()}
    tokens = {name: noise(3, 9, width) for name in ("hidden_states", "inputs_embeds", "embeddings", "x")}
    yield {**texts, "encoder_hidden_states": noise(3, 5, width), "context": noise(3, 5, width)}
    yield {**tokens, "encoder_hidden_states": noise(3, 5, width), "context": noise(3, 5, width)}
    for side in dict.fromkeys((size(image, "image_size input_size crop_size img_size", 16), 16, 32, 64, 224)):
        picture = noise(3, channels, side, side)
        yield {"pixel_values": picture, "images": picture, "image": picture}
        yield {**texts, "pixel_values": picture}
        yield {"pixel_values": picture, "bool_masked_pos": torch.zeros(3, (side // patch) ** 2).bool()}
        video = noise(3, 4, channels, side, side)
        yield {"pixel_values_videos": video, "pixel_values": video}
    for folded in (1, 2):
        grid = torch.tensor([[1, 4, 4]] * 3)
        packed = noise(48, channels * folded * patch**2)
        for main in ("pixel_values", "hidden_states"):
            grids = {
                "grid_thw": grid,
                "image_grid_thw": grid,
                "grid_hws": grid[:, 1:],
                "image_grid_hw": grid[:, 1:],
            }
            yield {main: packed, **grids, "target_sizes": grid[:, 1:]}
    yield {
        "pixel_values": noise(3, 9, channels * patch**2),
        "pixel_position_ids": PLACES.expand(3, 9, 2).clone(),
    }
    bins = size(sound, "num_mel_bins feature_size input_size input_dim num_mels", 80)
    for frames in (64, 200, 400, 3000):
        mask = torch.ones(3, frames).long()
        for features in (noise(3, bins, frames), noise(3, frames, bins)):
            yield {"input_features": features, "attention_mask": mask, "input_features_mask": mask.bool()}
            yield {
                "input_features": features,
                "spectrogram": features,
                **{f"decoder_{k}": v for k, v in texts.items()},
            }
    for books in (4, 8, 16, 32):
        codes = torch.randint(4, 50, (3, 11, books), generator=generator)
        yield {"input_ids": codes, "attention_mask": texts["attention_mask"]}
        yield {
            "audio_codes": codes.transpose(1, 2),
            "input_ids": codes.transpose(1, 2),
            "codes": codes.transpose(1, 2),
        }
    for waves in (noise(3, 6400), noise(3, 1, 6400)):
        yield {"input_values": waves, "decoder_input_ids": ids, "decoder_input_values": noise(3, 7, bins)}
    depth = size(config, "num_channels num_codebooks n_codebooks", 4)
    words = torch.randint(4, 50, (3, 7, depth), generator=generator)
    yield {"input_ids": words, "encoder_hidden_states": noise(3, 5, size(config, "cross_hidden_size", width))}
    flat = torch.cat(
        [PLACES.expand(3, 9, 2) + 1.0, noise(3, 9, size(image, "patch_embed_hidden_size", 48))], -1
    )
    yield {"flattened_patches": flat, "attention_mask": torch.ones(3, 9), "decoder_input_ids": ids}
    side = size(image, "image_size", 16)
    count = size(image, "num_position_embeddings", (side // patch) ** 2)
    if count <= 1024:
        yield {"pixel_values": noise(3, count, channels * patch**2)}
    for pictures in (1, 2, size(image, "num_frames", 8)):
        yield {"pixel_values": noise(3, pictures, channels, side, side), **texts}
    for frames in (64, 96):
        features = noise(3, frames, bins)
        yield {
            "hidden_states": features,
            "mask": torch.ones(3, frames).bool(),
            "input_features": features,
            **texts,
        }
        yield {"input_features": features[:, None], **texts}
        yield {"input_features": features.mT, **texts}
        yield {
            "input_features": features,
            "decoder_input_ids": ids,
            "attention_mask": torch.ones(3, frames).long(),
        }
    latents = noise(3, size(config, "latent_dim codebook_dim hidden_size", 16), 9)
    yield {"latents": latents, "hidden_states": latents, "x": latents}
    lags = max(config.lags_sequence) if getattr(config, "lags_sequence", None) else 0
    length = size(config, "context_length prediction_length", 12) + lags
    parts_of_time = size(config, "num_time_features", 0)
    yield {
        "past_values": noise(3, length),
        "past_time_features": noise(3, length, parts_of_time),
        "past_observed_mask": torch.ones(3, length),
        "future_values": noise(3, size(config, "prediction_length", 6)),
        "future_time_features": noise(3, size(config, "prediction_length", 6), parts_of_time),
    }
    past = noise(3, size(config, "context_length", 32), size(config, "num_input_channels", 1))
    yield {"past_values": past, "past_observed_mask": torch.ones_like(past)}
    yield {**texts, "decoder_input_ids": ids, "bbox": torch.tensor([1, 2, 9, 12]).expand(3, 11, 4).clone()}


def inputs_of(model: PreTrainedModel) -> dict[str, Any]:
    """Inputs of three samples that a model runs on.

    Raises:
        UnsupportedArchitectureError: If it runs on none that were tried.
    """
    parameters = inspect.signature(model.forward).parameters
    for images in usual_inputs(model.config) if {"input_ids", "pixel_values"} <= parameters.keys() else ():
        if "pixel_values" in images and "input_ids" not in images:
            shown = texts_with(model, {k: v for k, v in images.items() if k in parameters})
            with suppress(Exception):  # it wants others
                if shown is not None:
                    outputs_of(model, shown)
                    return {**shown, **({"use_cache": False} if "use_cache" in parameters else {})}
    try:
        return example_inputs(model)
    except UnsupportedArchitectureError:
        needed = {
            p.name for p in parameters.values() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
        }
        for usual in usual_inputs(model.config):
            usual = with_unusual(usual, needed)
            inputs: dict[str, Any] = {name: value for name, value in usual.items() if name in parameters}
            inputs |= {"use_cache": False} if "use_cache" in parameters else {}
            read = [name for name in inputs if "mask" not in name and name != "use_cache"]
            if not read or not needed <= inputs.keys():
                continue
            try:
                outputs_of(model, inputs)
            except Exception:  # it wants others
                continue
            return inputs
        raise


def built(model_type: str) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """A class and a config by which a model of a type is built and runs, and inputs for it.

    Raises:
        Exception: What the first rule failed with, if none does.
    """
    if model_type in {*AMENDED, *INPUTS}:
        config = merged(tiny(AutoConfig.for_model(model_type)), AMENDED.get(model_type, {}))
        kind = classes_of(model_type)[0]
        return kind, config, INPUTS.get(model_type) or example_inputs(build(model_type, config, 0, kind))
    first: Exception | None = None
    stuck: tuple[Any, dict[str, Any], dict[str, Any]] | None = None
    for config in configs_of(model_type):
        for kind in classes_of(model_type):
            try:
                model = build(model_type, config, 0, kind)
                inputs = inputs_of(model)
                for samples in (3, 5):
                    tried = inputs if samples == 3 else other_inputs(inputs, 5, image_token(model.config))
                    if not all(bool(t.isfinite().all()) for t in outputs_of(model, tried)):
                        raise ValueError("what it gives is not finite")
                if loads(model):
                    return kind, config, inputs
                stuck = stuck or (kind, config, inputs)
            except Exception as error:
                known = first is not None and not isinstance(error, UnsupportedArchitectureError)
                first = first if known else error
    if stuck:
        return stuck
    assert first is not None
    raise first


def loads(model: PreTrainedModel) -> bool:
    """Whether Transformers reads what it writes of a model, as of any that users have."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            model.save_pretrained(folder)
            _, info = type(model).from_pretrained(folder, output_loading_info=True)
        except Exception:
            return False
    return not info["missing_keys"] and not info["unexpected_keys"]


def other_inputs(inputs: dict[str, Any], samples: int, token: int = -1) -> dict[str, Any]:
    """Inputs of the same kind, of so many samples and with other values; images are where this word is."""
    generator = torch.Generator().manual_seed(samples)

    def other(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.dim():
            return value
        shape = (samples * len(value) // 3, *value.shape[1:])  # those of three samples may be packed
        if name.endswith("mask"):
            return torch.ones(shape, dtype=value.dtype)
        if value.is_floating_point() and value.dim() == 1:
            return torch.rand(shape, generator=generator)
        if value.is_floating_point():
            places = 2 if name == "flattened_patches" else 0  # the row and the column of a patch
            first = value[:1, ..., :places].expand(*shape[:-1], places)
            return torch.cat([first, torch.randn(*shape[:-1], shape[-1] - places, generator=generator)], -1)
        if "position" in name or "grid" in name or name.endswith("_sizes"):
            return value[:1].expand(shape).clone()
        words = torch.randint(4, 50, shape, generator=generator)
        words = torch.where(words == token, 50, words)
        return torch.where(value[:1] == token, value[:1], words)

    return {name: other(name, value) for name, value in inputs.items()}


def row_of(batch: dict[str, Tensor], number: int, samples: int) -> dict[str, Tensor]:
    """One sample of a batch, in which those of a packed input lie one after the other."""
    packed = any(len(value) != samples for value in batch.values())
    each = {name: len(value) // samples for name, value in batch.items()}
    return {
        name: value[number * each[name] : (number + 1) * each[name]]
        if packed and not name.endswith(("_ids", "_mask"))
        else value[number]
        for name, value in batch.items()
    }


def prune(model: PreTrainedModel, inputs: dict[str, Any]) -> str:
    """What happens when a model is pruned by half: `""`, or why it was refused."""
    tokens = max(8, *(value.shape[1] for name, value in inputs.items() if name.endswith("input_ids")), 0)
    columns = max(s.shape[1] // s.experts for s in find_sublayers(model))
    count = max(48, min(1_000, -(-5 * columns // (4 * tokens))))
    batch = other_inputs(inputs, count, image_token(model.config))
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
    rows = [row_of(tensors, number, count) for number in range(count)]
    with tempfile.TemporaryDirectory() as folder:
        args = KPruneArguments(output_dir=folder, sparsity=0.5, disable_tqdm=True, use_cpu=True)
        pruner = KPrunePruner(model, args, rows)
        pruner.callback_handler.callbacks.clear()
        try:
            report = pruner.prune()
        except KPruneError as error:
            return str(error)
    assert report.sparsity >= 0.499
    return ""


def outcome(model_type: str) -> tuple[str, str, str]:
    """The counts of what was found in a model, the result, and a remark."""
    try:
        kind, config, inputs = built(model_type)
        model = build(model_type, config, 0, kind)
    except Exception as error:
        return "-", "not tried", f"{type(error).__name__}: {error}"
    try:
        describe(model, inputs)
        check_described(model)
        sublayers = find_sublayers(model)
    except (UnsupportedArchitectureError, UnsupportedModelError) as error:
        return "-", "refused", str(error).split(". Describe one")[0]
    except Exception as error:
        return "-", "**crashed**", f"{type(error).__name__}: {error}"
    ffns = sum(not s.unit.has_heads for s in sublayers)
    counts = len(sublayers) - ffns, ffns
    try:
        why = judge(
            model,
            build(model_type, config, 10, kind),
            other_inputs(inputs, 5, image_token(model.config)),
            counts,
        )
        if why:
            return f"{counts[0]}, {counts[1]}", "**wrong**", why
        why = prune(model, inputs)
    except Exception as error:
        return f"{counts[0]}, {counts[1]}", "**crashed**", f"{type(error).__name__}: {error}"
    return f"{counts[0]}, {counts[1]}", "refused by prune()" if why else "pruned", why


def limited(model_type: str, seconds: float) -> tuple[str, str, str]:
    """`outcome` in a process of its own, which may take so long, and `MEMORY`."""
    context = get_context("fork")
    mine, its = context.Pipe(duplex=False)

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        its.send(outcome(model_type))

    process = context.Process(target=work)
    process.start()
    result = (
        mine.recv() if mine.poll(seconds) else ("-", "too slow", f"it was not through in {seconds:.0f} s")
    )
    process.kill()
    process.join()
    return cast(tuple[str, str, str], result)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--draw", type=int, choices=tuple(DRAWS), default=max(DRAWS), help="Which of the draws."
    )
    parser.add_argument("--only", nargs="*", help="Try these types of it alone.")
    parser.add_argument("--seconds", type=float, default=300, help="How long a type may take.")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    tally: dict[str, int] = {}
    print("| model type | attentions, FFNs | result | |\n| --- | --- | --- | --- |")
    for model_type in args.only or DRAWS[args.draw]:
        counts, result, why = limited(model_type, args.seconds)
        tally[result] = tally.get(result, 0) + 1
        shown = " ".join(why.split()).replace("|", "\\|")
        print(f"| {model_type} | {counts} | {result} | {shown[:400]} |", flush=True)
    print("\n" + ", ".join(f"{count} {result}" for result, count in tally.items()))


if __name__ == "__main__":
    main()
