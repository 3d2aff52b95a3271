"""Sixty model types drawn by lot, as users would bring them: pruned, refused, or worse.

    python benchmarks/detection_draw.py --draw 2   the table of the last draw in benchmarks/results/detection_draw.md

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
import tempfile
import warnings
from collections.abc import Collection, Iterator
from typing import Any

import torch
import transformers
from detection_holdout import judge, outputs_of
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.utils import logging

from hf_kprune import KPruneArguments, KPruneError, KPrunePruner, UnsupportedArchitectureError
from hf_kprune.structure.configs import text_config
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

LARGEST = 30_000_000
"""Parameters of a model that is tried."""

TABLES = ("MODEL_FOR_CAUSAL_LM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM", "MODEL")


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
        elif name in values or isinstance(value, bool):
            continue
        elif isinstance(value, int) or (
            isinstance(value, (list, tuple)) and value and all(isinstance(v, int) for v in value)
        ):
            size = next(((to, least) for like, to, least in LIKE if re.search(like, name)), None)
            if size is not None:
                small = [min(v, size[0]) for v in (value if isinstance(value, (list, tuple)) else [value])]
                values[name] = small[0] if isinstance(value, int) else small
    return values


def configs_of(model_type: str) -> Iterator[dict[str, Any]]:
    """What a config of a type may be made of, one rule after the other; the last one leaves all but depths."""
    config = AutoConfig.for_model(model_type)
    yield tiny(config)
    yield tiny_like(config)
    yield {k: v for k, v in tiny_like(config).items() if not isinstance(v, (list, tuple))}
    depths = ("num_hidden_layers", "encoder_layers", "decoder_layers", "num_layers", "depth")

    def shallow(each: Any) -> dict[str, Any]:
        values: dict[str, Any] = {name: 2 for name in depths if isinstance(vars(each).get(name), int)}
        for name, value in each.to_dict().items():
            inner = vars(each).get(name)
            if isinstance(value, dict) and hasattr(inner, "to_dict"):
                values[name] = {**value, **shallow(inner)}
        return values

    yield shallow(config)


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
    ]
    if not classes:
        raise LookupError("Transformers has no model of this type alone")
    return min(classes, key=lambda found: (not found.__name__.endswith("Model"), len(found.__name__)))


def build(model_type: str, config: dict[str, Any], seed: int) -> PreTrainedModel:
    """A random model of a config, with biases and norms away from their initial values too."""
    kind, small = class_of(model_type), AutoConfig.for_model(model_type, **copy.deepcopy(config))
    with torch.device("meta"):
        size = sum(p.numel() for p in kind(copy.deepcopy(small)).parameters())
    if size > LARGEST:
        raise ValueError(f"{size:,} parameters are too many to try")
    torch.manual_seed(seed)
    model: PreTrainedModel = kind(small).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter += 0.2 * torch.randn_like(parameter)
    return model


def usual_inputs(config: Any) -> Iterator[dict[str, Tensor]]:
    """Random inputs of three samples, by the names that arguments of models usually have."""
    text, image = text_config(config), getattr(config, "vision_config", config)
    generator = torch.Generator().manual_seed(0)

    def size(of: Any, names: str, default: int) -> int:
        values = [vars(of).get(name, getattr(of, name, None)) for name in names.split()]
        flat = [v[0] if isinstance(v, (list, tuple)) and v else v for v in values]
        return next((v for v in flat if isinstance(v, int) and v > 0), default)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    width = size(config, "hidden_size d_model embed_dim hidden_dim width dim", 16)
    channels, patch = size(image, "num_channels in_channels in_chans", 3), size(image, "patch_size", 4)
    ids = torch.randint(4, size(text, "vocab_size", 60), (3, 11), generator=generator)
    texts = {"input_ids": ids, "attention_mask": torch.ones(3, 11).long()}
    tokens = {name: noise(3, 9, width) for name in ("hidden_states", "inputs_embeds", "embeddings", "x")}
    yield {**tokens, "encoder_hidden_states": noise(3, 5, width), "context": noise(3, 5, width)}
    for side in dict.fromkeys((size(image, "image_size input_size crop_size img_size", 16), 16, 32, 64, 224)):
        picture = noise(3, channels, side, side)
        yield {"pixel_values": picture, "images": picture, "image": picture}
        yield {**texts, "pixel_values": picture}
        yield {"pixel_values": picture, "bool_masked_pos": torch.zeros(3, (side // patch) ** 2).bool()}
        frames = noise(3, 4, channels, side, side)
        yield {"pixel_values_videos": frames, "pixel_values": frames}
    for folded in (1, 2):
        grid = torch.tensor([[1, 4, 4]] * 3)
        packed = noise(48, channels * folded * patch**2)
        for main in ("pixel_values", "hidden_states"):
            grids = {"grid_thw": grid, "image_grid_thw": grid, "grid_hws": grid[:, 1:]}
            yield {main: packed, **grids, "target_sizes": grid[:, 1:]}
    yield {
        "pixel_values": noise(3, 9, channels * patch**2),
        "pixel_position_ids": PLACES.expand(3, 9, 2).clone(),
    }
    bins = size(config, "num_mel_bins feature_size input_size input_dim num_mels", 80)
    for frames in (64, 200, 400, 3000):
        mask = torch.ones(3, frames).long()
        for features in (noise(3, bins, frames), noise(3, frames, bins)):
            yield {"input_features": features, "attention_mask": mask, "input_features_mask": mask.bool()}
            yield {
                "input_features": features,
                "spectrogram": features,
                **{f"decoder_{k}": v for k, v in texts.items()},
            }
    for sound in (noise(3, 6400), noise(3, 1, 6400)):
        yield {"input_values": sound, "decoder_input_ids": ids}
    past = noise(3, size(config, "context_length", 32), size(config, "num_input_channels", 1))
    yield {"past_values": past, "past_observed_mask": torch.ones_like(past)}
    yield {**texts, "decoder_input_ids": ids, "bbox": torch.tensor([1, 2, 9, 12]).expand(3, 11, 4).clone()}


def inputs_of(model: PreTrainedModel) -> dict[str, Any]:
    """Inputs of three samples that a model runs on.

    Raises:
        UnsupportedArchitectureError: If it runs on none that were tried.
    """
    try:
        return example_inputs(model)
    except UnsupportedArchitectureError:
        parameters = inspect.signature(model.forward).parameters
        needed = {
            p.name for p in parameters.values() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
        }
        for usual in usual_inputs(model.config):
            inputs: dict[str, Any] = {name: value for name, value in usual.items() if name in parameters}
            for name in ("use_cache",) if "use_cache" in parameters else ():
                inputs[name] = False
            if not inputs or not needed <= inputs.keys():
                continue
            try:
                outputs_of(model, inputs)
            except Exception:  # it wants others
                continue
            return inputs
        raise


def built(model_type: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A config by which a model of a type is built and runs, and inputs for it.

    Raises:
        Exception: What the first rule failed with, if none does.
    """
    if model_type in DRAWN:
        config = merged(tiny(AutoConfig.for_model(model_type)), AMENDED.get(model_type, {}))
        model = build(model_type, config, seed=0)
        return config, INPUTS.get(model_type) or example_inputs(model)
    first: Exception | None = None
    for config in configs_of(model_type):
        try:
            model = build(model_type, config, seed=0)
            inputs = inputs_of(model)
            outputs_of(model, inputs)
            return config, inputs
        except Exception as error:
            first = (
                first if first is not None and not isinstance(error, UnsupportedArchitectureError) else error
            )
    assert first is not None
    raise first


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
        config, inputs = built(model_type)
        model = build(model_type, config, seed=0)
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
        why = judge(model, build(model_type, config, seed=10), other_inputs(inputs, 5), counts)
        if why:
            return f"{counts[0]}, {counts[1]}", "**wrong**", why
        why = prune(model, inputs)
    except Exception as error:
        return f"{counts[0]}, {counts[1]}", "**crashed**", f"{type(error).__name__}: {error}"
    return f"{counts[0]}, {counts[1]}", "refused by prune()" if why else "pruned", why


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--draw", type=int, choices=(1, 2), default=2, help="Which of the draws.")
    parser.add_argument("--only", nargs="*", help="Try these types of it alone.")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    tally: dict[str, int] = {}
    print("| model type | attentions, FFNs | result | |\n| --- | --- | --- | --- |")
    for model_type in args.only or {1: DRAWN, 2: DRAWN_2}[args.draw]:
        counts, result, why = outcome(model_type)
        tally[result] = tally.get(result, 0) + 1
        shown = " ".join(why.split()).replace("|", "\\|")
        print(f"| {model_type} | {counts} | {result} | {shown[:400]} |", flush=True)
    print("\n" + ", ".join(f"{count} {result}" for result, count in tally.items()))


if __name__ == "__main__":
    main()
