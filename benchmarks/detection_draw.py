"""Sixty model types drawn by lot, as users would bring them: pruned, refused, or worse.

    python benchmarks/detection_draw.py            the table of benchmarks/results/detection_draw.md

The types were drawn by `drawn` from all that Transformers has and that no family, no test and no earlier list named, after the
last family was added and before any of them was tried. Configs are made by a rule: sizes that a config class has by default
are replaced by small ones, in configs inside it, too. `AMENDED` and `INPUTS` have what else a model needed to be built and to run,
which was found out without hf_kprune.
"""

from __future__ import annotations

import importlib
import random
import tempfile
import warnings
from collections.abc import Collection
from typing import Any

import torch
import transformers
from detection_holdout import judge, outputs_of
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.utils import logging

from hf_kprune import KPruneArguments, KPruneError, KPrunePruner, UnsupportedArchitectureError
from hf_kprune.structure.detect import describe
from hf_kprune.structure.facts import example_inputs
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

TABLES = ("MODEL_FOR_CAUSAL_LM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM", "MODEL")


def drawn(known: Collection[str]) -> list[str]:
    """Sixty of the model types that are not `known`."""
    return sorted(random.Random(SEED).sample(sorted(set(CONFIG_MAPPING.keys()) - set(known)), 60))


def tiny(config: Any) -> dict[str, Any]:
    """Small values for the sizes that a config has."""
    values: dict[str, Any] = {}
    for name, value in config.to_dict().items():
        inner = vars(config).get(name)
        if isinstance(value, dict) and hasattr(inner, "to_dict"):
            values[name] = {**tiny(inner), "model_type": value.get("model_type")}
        elif name in SMALL and not isinstance(value, (list, tuple, dict)):
            values[name] = SMALL[name]
    kinds = list(dict.fromkeys(config.to_dict().get("layer_types") or ()))
    return values | ({"layer_types": [kinds[i % len(kinds)] for i in range(2)]} if kinds else {})


def merged(config: dict[str, Any], amendments: dict[str, Any]) -> dict[str, Any]:
    """A config with amendments, also in the configs inside it."""
    inner = {
        name: merged(config[name], value)
        for name, value in amendments.items()
        if isinstance(value, dict) and isinstance(config.get(name), dict)
    }
    return {**config, **amendments, **inner}


def class_of(model_type: str) -> Any:
    """The model class of a type: that of an Auto table, or the one in its module with such a config."""
    for table in TABLES:
        name = getattr(modeling_auto, f"{table}_MAPPING_NAMES").get(model_type)
        if name is not None:
            return getattr(transformers, name if isinstance(name, str) else name[0])
    config_class = CONFIG_MAPPING[model_type]
    module = importlib.import_module(config_class.__module__.replace("configuration_", "modeling_"))
    classes = [
        found
        for found in vars(module).values()
        if isinstance(found, type)
        and issubclass(found, PreTrainedModel)
        and getattr(found, "config_class", None) is config_class
        and not found.__name__.endswith("PreTrainedModel")
        and hasattr(transformers, found.__name__)
    ]
    if not classes:
        raise LookupError("Transformers exports no model of this type alone")
    return min(classes, key=lambda found: (not found.__name__.endswith("Model"), len(found.__name__)))


def make(model_type: str, seed: int) -> PreTrainedModel:
    """A tiny random model, with biases and norms away from their initial values too."""
    config = merged(tiny(AutoConfig.for_model(model_type)), AMENDED.get(model_type, {}))
    torch.manual_seed(seed)
    model: PreTrainedModel = class_of(model_type)(AutoConfig.for_model(model_type, **config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def other_inputs(inputs: dict[str, Any], samples: int) -> dict[str, Any]:
    """Inputs of the same kind, of so many samples and with other values."""
    generator = torch.Generator().manual_seed(samples)

    def other(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        shape = (samples, *value.shape[1:])
        if value.is_floating_point():
            return torch.randn(shape, generator=generator)
        if "position" in name:
            return value[:1].expand(shape).clone()
        if name.endswith("mask"):
            return torch.ones(shape, dtype=value.dtype)
        return torch.randint(4, 60, shape, generator=generator)

    return {name: other(name, value) for name, value in inputs.items()}


def prune(model: PreTrainedModel, inputs: dict[str, Any]) -> str:
    """What happens when a model is pruned by half: `""`, or why it was refused."""
    batch = other_inputs(inputs, 48)
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
    rows = [{name: value[i] for name, value in tensors.items()} for i in range(48)]
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
        model = make(model_type, seed=0)
        inputs = INPUTS.get(model_type) or example_inputs(model)
        outputs_of(model, inputs)
    except Exception as error:
        return "-", "not tried", f"{type(error).__name__}: {error}"
    try:
        describe(model, inputs)
        sublayers = find_sublayers(model)
    except UnsupportedArchitectureError as error:
        return "-", "refused", str(error).split(". Describe one")[0]
    except Exception as error:
        return "-", "**crashed**", f"{type(error).__name__}: {error}"
    ffns = sum(not s.unit.has_heads for s in sublayers)
    counts = len(sublayers) - ffns, ffns
    try:
        why = judge(model, make(model_type, seed=10), other_inputs(inputs, 5), counts)
        if why:
            return f"{counts[0]}, {counts[1]}", "**wrong**", why
        why = prune(model, inputs)
    except Exception as error:
        return f"{counts[0]}, {counts[1]}", "**crashed**", f"{type(error).__name__}: {error}"
    return f"{counts[0]}, {counts[1]}", "refused by prune()" if why else "pruned", why


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    tally: dict[str, int] = {}
    print("| model type | attentions, FFNs | result | |\n| --- | --- | --- | --- |")
    for model_type in DRAWN:
        counts, result, why = outcome(model_type)
        tally[result] = tally.get(result, 0) + 1
        shown = " ".join(why.split()).replace("|", "\\|")
        print(f"| {model_type} | {counts} | {result} | {shown[:400]} |", flush=True)
    print("\n" + ", ".join(f"{count} {result}" for result, count in tally.items()))


if __name__ == "__main__":
    main()
