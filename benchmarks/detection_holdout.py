"""Detection on model types that were never looked at while it was written: proved, refused, or wrongly accepted.

    python benchmarks/detection_holdout.py            the table of benchmarks/results/detection_holdout.md

The list was fixed before the first line of `hf_kprune/detect.py`: tiny configs, and how many attentions and FFNs a person
counts in each model. An acceptance is judged by what detection does not share: other data, other masks, these counts.
"""

from __future__ import annotations

import copy
import inspect
import tempfile
import warnings
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import logging

from hf_kprune import UnsupportedArchitectureError
from hf_kprune.structure.coverage import IDLE
from hf_kprune.structure.describe import describe
from hf_kprune.structure.families import FAMILIES, REFUSED
from hf_kprune.structure.hooks import featured
from hf_kprune.structure.sublayers import find_sublayers
from hf_kprune.structure.surgery import cut, write_plan


TEXT: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 12,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
GROUPED: dict[str, Any] = {**TEXT, "num_key_value_heads": 2}
IMAGE: dict[str, Any] = {
    "hidden_size": 16,
    "num_attention_heads": 4,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 3,
}
BART: dict[str, Any] = {
    "vocab_size": 60,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 12,
    "decoder_ffn_dim": 12,
}
T5GEMMA: dict[str, Any] = {
    **GROUPED,
    "head_dim": 4,
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 4,
}

Counts = tuple[int, int] | None
HOLDOUT: dict[str, tuple[str, dict[str, Any], str, Counts]] = {
    # model type: (class, config, kind of inputs, attentions and FFNs, or None where nothing may be accepted)
    # decoders
    "gpt_neox_japanese": (
        "GPTNeoXJapaneseForCausalLM",
        {**{k: v for k, v in TEXT.items() if k != "intermediate_size"}, "intermediate_multiple_size": 2},
        "text",
        (2, 2),
    ),
    "ctrl": (
        "CTRLLMHeadModel",
        {"vocab_size": 60, "n_positions": 64, "n_embd": 16, "dff": 12, "n_layer": 2, "n_head": 4},
        "text",
        (2, 2),
    ),
    "openai-gpt": (
        "OpenAIGPTLMHeadModel",
        {"vocab_size": 60, "n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 4},
        "text",
        (2, 2),
    ),
    "hunyuan_v1_dense": ("HunYuanDenseV1ForCausalLM", {**GROUPED, "head_dim": 4}, "text", (2, 2)),
    "ernie4_5": ("Ernie4_5ForCausalLM", {**GROUPED, "head_dim": 4, "use_bias": True}, "text", (2, 2)),
    "modernbert-decoder": (
        "ModernBertDecoderForCausalLM",
        {**TEXT, "cls_token_id": 2, "sep_token_id": 3, "local_attention": 4},
        "text",
        (2, 2),
    ),
    "nanochat": ("NanoChatForCausalLM", GROUPED, "text", (2, 2)),
    "diffllama": ("DiffLlamaForCausalLM", {**GROUPED, "head_dim": 4}, "text", (2, 2)),
    "gpt_oss": (
        "GptOssForCausalLM",
        {**GROUPED, "head_dim": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4},
        "text",
        None,  # experts
    ),
    "minicpm3": (
        "MiniCPM3ForCausalLM",
        {
            **TEXT,
            "num_key_value_heads": 4,
            "kv_lora_rank": 6,
            "q_lora_rank": 6,
            "qk_nope_head_dim": 4,
            "qk_rope_head_dim": 2,
            "v_head_dim": 4,
        },
        "text",
        (2, 2),
    ),
    "mamba": (
        "MambaForCausalLM",
        {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
        "text",
        None,
    ),
    # encoders
    "layoutlmv3": (
        "LayoutLMv3Model",
        {
            **TEXT,
            "max_2d_position_embeddings": 64,
            "coordinate_size": 3,
            "shape_size": 2,
            "input_size": 8,
            "patch_size": 4,
            "rel_pos_bins": 8,
            "rel_2d_pos_bins": 8,
        },
        "page",
        (2, 2),
    ),
    "lilt": (
        "LiltModel",
        {**TEXT, "hidden_size": 24, "max_2d_position_embeddings": 64, "channel_shrink_ratio": 2},
        "boxes",
        (4, 4),
    ),
    "bros": ("BrosModel", {**TEXT, "hidden_size": 64}, "corners", (2, 2)),
    "nystromformer": (
        "NystromformerModel",
        {**TEXT, "num_landmarks": 3, "segment_means_seq_len": 9, "conv_kernel_size": 3},
        "nine",
        (2, 2),
    ),
    "luke": ("LukeModel", {**TEXT, "entity_vocab_size": 20, "entity_emb_size": 8}, "entities", (2, 2)),
    "canine": (
        "CanineModel",
        {**TEXT, "local_transformer_stride": 16, "num_hash_buckets": 64},
        "characters",
        (4, 4),
    ),
    "perceiver": (
        "PerceiverModel",
        {
            "num_latents": 6,
            "d_latents": 16,
            "d_model": 16,
            "num_blocks": 1,
            "num_self_attends_per_block": 2,
            "num_self_attention_heads": 4,
            "num_cross_attention_heads": 4,
        },
        "features",
        (3, 3),
    ),
    # encoder-decoders
    "prophetnet": (
        "ProphetNetForConditionalGeneration",
        {
            "vocab_size": 60,
            "hidden_size": 16,
            "encoder_ffn_dim": 12,
            "num_encoder_layers": 2,
            "num_encoder_attention_heads": 4,
            "decoder_ffn_dim": 12,
            "num_decoder_layers": 2,
            "num_decoder_attention_heads": 4,
            "max_position_embeddings": 64,
        },
        "seq2seq",
        (6, 4),
    ),
    "led": (
        "LEDForConditionalGeneration",
        {
            **BART,
            "max_encoder_position_embeddings": 64,
            "max_decoder_position_embeddings": 64,
            "attention_window": 4,
            "pad_token_id": 1,
        },
        "seq2seq",
        (6, 4),
    ),
    "time_series_transformer": (
        "TimeSeriesTransformerModel",
        {
            **{k: v for k, v in BART.items() if k != "vocab_size"},
            "prediction_length": 4,
            "context_length": 6,
            "lags_sequence": [1, 2],
            "num_time_features": 2,
            "input_size": 1,
        },
        "series",
        (6, 4),
    ),
    "t5gemma": (
        "T5GemmaForConditionalGeneration",
        {"encoder": T5GEMMA, "decoder": T5GEMMA, "vocab_size": 60},
        "seq2seq",
        (6, 4),
    ),
    "pop2piano": (
        "Pop2PianoForConditionalGeneration",
        {
            "vocab_size": 60,
            "composer_vocab_size": 4,
            "d_model": 16,
            "d_kv": 4,
            "d_ff": 12,
            "num_layers": 2,
            "num_heads": 4,
            "relative_attention_num_buckets": 8,
        },
        "piano",
        (6, 4),
    ),
    "moonshine": (
        "MoonshineForConditionalGeneration",
        {
            "vocab_size": 60,
            "hidden_size": 32,
            "intermediate_size": 12,
            "encoder_num_hidden_layers": 2,
            "decoder_num_hidden_layers": 2,
            "encoder_num_attention_heads": 4,
            "decoder_num_attention_heads": 4,
            "max_position_embeddings": 64,
        },
        "speech",
        (6, 4),
    ),
    # images
    "aimv2": (
        "Aimv2Model",
        {"text_config": {**TEXT, "eos_token_id": 3}, "vision_config": IMAGE, "projection_dim": 8},
        "clip",
        (4, 4),
    ),
    "owlvit": (
        "OwlViTModel",
        {"text_config": TEXT, "vision_config": IMAGE, "projection_dim": 8},
        "clip",
        (4, 4),
    ),
    "vitdet": (
        "VitDetModel",
        {
            **{k: v for k, v in IMAGE.items() if k != "intermediate_size"},
            "mlp_ratio": 1,
            "pretrain_image_size": 8,
            "use_relative_position_embeddings": True,
        },
        "image",
        (2, 2),
    ),
    "timesformer": ("TimesformerModel", {**IMAGE, "num_frames": 2}, "video", (4, 2)),
    "segformer": (
        "SegformerModel",
        {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 16, 16], "num_attention_heads": [2, 2, 4, 4]},
        "picture",
        (4, 4),
    ),
    "convnext": ("ConvNextModel", {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}, "picture", None),
    # sound
    "wav2vec2-bert": (
        "Wav2Vec2BertModel",
        {
            **{k: TEXT[k] for k in TEXT if k != "max_position_embeddings"},
            "feature_projection_input_dim": 8,
            "conv_depthwise_kernel_size": 3,
            "apply_spec_augment": False,
            "layerdrop": 0.0,
        },
        "filterbanks",
        (2, 4),
    ),
    "wav2vec2-conformer": (
        "Wav2Vec2ConformerModel",
        {
            **{k: TEXT[k] for k in TEXT if k != "max_position_embeddings"},
            "conv_dim": (8, 8),
            "conv_stride": (5, 4),
            "conv_kernel": (10, 4),
            "num_conv_pos_embeddings": 4,
            "num_conv_pos_embedding_groups": 2,
            "conv_depthwise_kernel_size": 3,
            "apply_spec_augment": False,
            "layerdrop": 0.0,
        },
        "waves",
        (2, 4),
    ),
}


# ---------------------------------------------------------------------------------------------------------------------
# The models and their inputs
# ---------------------------------------------------------------------------------------------------------------------


def make(model_type: str, seed: int) -> PreTrainedModel:
    """A tiny random model, with biases and norms away from their initial values too."""
    class_name, config, _, _ = HOLDOUT[model_type]
    torch.manual_seed(seed)
    model = getattr(transformers, class_name)(AutoConfig.for_model(model_type, **config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def inputs_for(model: PreTrainedModel, kind: str, seed: int, batch: int, longer: int) -> dict[str, Any]:
    """Random inputs; texts are `longer` by so many tokens, and the second sample is padded."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator)

    def text(length: int, prefix: str = "") -> dict[str, Tensor]:
        ids = torch.randint(4, 60, (batch, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[1, -2:] = 0
        return {f"{prefix}input_ids": ids, f"{prefix}attention_mask": mask}

    inputs: dict[str, Any]
    length = 9 + longer
    if kind in ("text", "characters"):
        inputs = text(length if kind == "text" else 32 + 16 * longer)
    elif kind == "nine":
        inputs = {"input_ids": text(9)["input_ids"]}
    elif kind in ("page", "boxes"):
        corners = torch.randint(0, 30, (batch, length, 2), generator=generator)
        inputs = {**text(length), "bbox": torch.cat([corners, corners + 10], -1)}
        inputs |= {"pixel_values": noise(3, 8, 8)} if kind == "page" else {}
    elif kind == "corners":
        inputs = {**text(length), "bbox": torch.rand(batch, length, 8, generator=generator)}
    elif kind == "entities":
        places = torch.tensor([[0, 1, -1], [3, -1, -1]]).expand(batch, 2, 3)
        inputs = {**text(length), "entity_ids": torch.ones(batch, 2).long(), "entity_position_ids": places}
    elif kind == "features":
        inputs = {"inputs": noise(length, 16)}
    elif kind == "seq2seq":
        inputs = {**text(length), **text(6 + longer, "decoder_")}
    elif kind == "series":
        config = model.config
        past = config.context_length + max(config.lags_sequence)
        inputs = {
            "past_values": noise(past),
            "past_time_features": noise(past, 2),
            "past_observed_mask": torch.ones(batch, past),
            "future_values": noise(config.prediction_length),
            "future_time_features": noise(config.prediction_length, 2),
        }
    elif kind == "piano":
        inputs = {"input_features": noise(length, 16), **text(6 + longer, "decoder_")}
    elif kind == "speech":
        inputs = {"input_values": noise(3000 + 400 * longer), **text(6 + longer, "decoder_")}
    elif kind == "waves":
        inputs = {"input_values": noise(400 + 100 * longer)}
    elif kind == "filterbanks":
        inputs = {"input_features": noise(length, 8)}
    elif kind == "clip":
        inputs = {**text(length), "pixel_values": noise(3, 8, 8)}
    elif kind == "image":
        inputs = {"pixel_values": noise(3, 8, 8)}
    elif kind == "video":
        inputs = {"pixel_values": noise(2, 3, 8, 8)}
    else:
        inputs = {"pixel_values": noise(3, 64, 64)}
    takes = inspect.signature(model.forward).parameters
    return {
        **{k: v for k, v in inputs.items() if k in takes},
        **({"use_cache": False} if "use_cache" in takes else {}),
    }


# ---------------------------------------------------------------------------------------------------------------------
# The judge
# ---------------------------------------------------------------------------------------------------------------------


def outputs_of(model: PreTrainedModel, inputs: dict[str, Any]) -> list[Tensor]:
    """Every float tensor that the model returns."""

    def tensors(value: Any) -> list[Tensor]:
        if isinstance(value, Tensor):
            return [value] if value.is_floating_point() else []
        parts = (
            value.values() if hasattr(value, "values") else value if isinstance(value, (list, tuple)) else ()
        )
        return [tensor for part in parts for tensor in tensors(part)]

    torch.manual_seed(7)
    with torch.no_grad():
        return tensors(model(**inputs))


def judge(accepted: PreTrainedModel, model: PreTrainedModel, inputs: dict[str, Any], counts: Counts) -> str:
    """What is wrong with an acceptance, `""` if nothing: counts by hand, then cut and masked with other weights and data."""
    for path, module in accepted.named_modules():
        if "kprune_family" in vars(module):
            model.get_submodule(path).__dict__["kprune_family"] = vars(module)["kprune_family"]
    model.__dict__[IDLE] = vars(accepted).get(IDLE, {})
    sublayers = find_sublayers(model)
    ffns = sum(not s.unit.has_heads for s in sublayers)
    if counts is None:
        return "has nothing that may be pruned"
    if (len(sublayers) - ffns, ffns) != counts:
        return f"{len(sublayers) - ffns} attentions and {ffns} FFNs, there are {counts[0]} and {counts[1]}"
    dense = outputs_of(model, inputs)
    for draw in range(8):
        generator = torch.Generator().manual_seed(draw)
        kept = [
            (torch.rand(s.num_units // s.experts, generator=generator) < (0.3, 0.7)[draw % 2]).repeat(
                s.experts
            )
            for s in sublayers  # experts of a layer have one width
        ]
        hooks = ExitStack()
        for s, keep in zip(sublayers, kept, strict=True):
            d = s.unit.head_dim
            if s.unit.strided:
                columns = keep.view(1, -1, 1).expand(s.unit.heads, -1, d).flatten().float()
            else:
                columns = keep.repeat_interleave(s.unit.width).float()
            if s.is_mixture:  # nothing in a forward pass reads the features of all its experts
                columns = torch.zeros(s.shape[1])
                columns[s.columns[keep].flatten()] = 1
                hooks.enter_context(featured(s, partial(torch.mul, columns)))
                continue
            hook = s.output.register_forward_pre_hook(lambda _, args, c=columns: (args[0] * c, *args[1:]))
            hooks.callback(hook.remove)
        with hooks:
            masked = outputs_of(model, inputs)
        student = copy.deepcopy(model)
        left = find_sublayers(student)
        for s, keep in zip(left, kept, strict=True):
            cut(s, keep)
        write_plan(left)
        with tempfile.TemporaryDirectory() as directory:
            student.save_pretrained(directory)
            loaded = type(model).from_pretrained(directory).eval()
        for what, outputs in (("cut", outputs_of(student, inputs)), ("loaded", outputs_of(loaded, inputs))):
            if [t.shape for t in outputs] != [t.shape for t in masked]:
                return f"{what} returns other shapes than masked"
            for one, other in zip(outputs, masked, strict=True):
                error = float(
                    (one - other).nan_to_num(0).abs().max() / other.nan_to_num(0).abs().max().clamp(min=1e-9)
                )
                if error > 1e-3 or not torch.equal(one.isnan(), other.isnan()):
                    return f"draw {draw}: {what} is {error:.0e} off masked"
        same = (
            one.shape == other.shape and torch.allclose(one, other)
            for one, other in zip(masked, dense, strict=True)
        )
        if all(same) and not all(map(all, kept)):
            return f"draw {draw}: the masks did nothing"
    return ""


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    FAMILIES.clear()  # some types have been listed since, and others refused: here, none is known
    REFUSED.clear()
    tally: dict[str, int] = {}
    print("| model type | attentions, FFNs | result | |\n| --- | --- | --- | --- |")
    for model_type, (_, _, kind, counts) in HOLDOUT.items():
        built = True
        try:
            model = make(model_type, seed=0)
            inputs = inputs_for(model, kind, seed=1, batch=3, longer=0)
            outputs_of(model, inputs)
        except Exception as error:
            built, result, why = False, "not built", f"{type(error).__name__}: {error}"
        if built:
            try:
                describe(model, inputs)
                result, why = "proved", ""
            except UnsupportedArchitectureError as error:
                result, why = "refused", str(error).split("; ", 1)[1].split(". Describe one")[0]
            except Exception as error:
                result, why = "**crashed**", f"{type(error).__name__}: {error}"
        if result == "proved":
            other = make(model_type, seed=10)
            try:
                why = judge(model, other, inputs_for(other, kind, seed=11, batch=5, longer=2), counts)
            except Exception as error:
                why = f"{type(error).__name__}: {error}"
            result = "**wrong**" if why else result
            kept = [
                b.kind
                for m in model.modules()
                for s in vars(m).get("kprune_family", ())
                for b in s.blocks
                if b.obstacle
            ]
            why += "heads together" if kept else ""
        tally[result] = tally.get(result, 0) + 1
        expected = "-" if counts is None else f"{counts[0]}, {counts[1]}"
        print(f"| {model_type} | {expected} | {result} | {' '.join(why.split())} |", flush=True)
    print("\n" + ", ".join(f"{count} {result}" for result, count in tally.items()))


if __name__ == "__main__":
    main()
