"""Tiny random models of every family that hf_kprune describes, and inputs for them. Key: `model_type`, or `type:variant`."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedModel


DECODER: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
SMALL: dict[str, Any] = {"vocab_size": 60, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}
MHA: dict[str, Any] = {k: v for k, v in DECODER.items() if k != "num_key_value_heads"}
HEAD_DIM: dict[str, Any] = {**DECODER, "head_dim": 4}
SLIDING: dict[str, Any] = {
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
GPT: dict[str, Any] = {**SMALL, "n_embd": 16, "n_layer": 3, "n_head": 4, "n_positions": 64, "n_inner": 12}
FALCON: dict[str, Any] = {
    **SMALL,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "ffn_hidden_size": 12,
}
GEMMA4: dict[str, Any] = {
    **DECODER,
    "head_dim": 4,
    "global_head_dim": 8,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "vocab_size_per_layer_input": 60,
    "hidden_size_per_layer_input": 4,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
}
MOE: dict[str, Any] = {**DECODER, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
SHARED_MOE: dict[str, Any] = {
    **MOE,
    "head_dim": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
GRANITE_MOE: dict[str, Any] = {
    **DECODER,
    "residual_multiplier": 0.3,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
ENCODER: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "intermediate_size": 12,
    "num_hidden_layers": 3,
    "max_position_embeddings": 40,
    "pad_token_id": 1,
}
DISTILBERT = {
    "vocab_size": 60,
    "dim": 16,
    "n_heads": 4,
    "hidden_dim": 12,
    "n_layers": 3,
    "max_position_embeddings": 40,
    "pad_token_id": 1,
}

SEQ2SEQ: dict[str, Any] = {
    "vocab_size": 60,
    "d_model": 16,
    "encoder_layers": 3,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 12,
    "decoder_ffn_dim": 12,
    "max_position_embeddings": 40,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
T5: dict[str, Any] = {
    "vocab_size": 60,
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 12,
    "num_layers": 3,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "pad_token_id": 1,
    "eos_token_id": 3,
    "decoder_start_token_id": 2,
}
IMAGE: dict[str, Any] = {
    "hidden_size": 16,
    "num_attention_heads": 4,
    "intermediate_size": 12,
    "num_hidden_layers": 3,
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 3,
}
AUDIO: dict[str, Any] = {
    **{
        key: ENCODER[key]
        for key in (
            "vocab_size",
            "hidden_size",
            "num_attention_heads",
            "intermediate_size",
            "num_hidden_layers",
            "pad_token_id",
        )
    },
    "conv_dim": (8, 8),
    "conv_stride": (5, 4),
    "conv_kernel": (10, 4),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}
TEXT_TOWER = {**ENCODER, "bos_token_id": 2, "eos_token_id": 3}

MIXED: dict[str, Any] = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
MAMBA: dict[str, Any] = {
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
}
DELTA: dict[str, Any] = {
    **MIXED,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 4,
}
CONFORMER: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 12,
    "feature_projection_input_dim": 8,
    "conv_depthwise_kernel_size": 3,
    "classifier_proj_size": 8,
}
LATENT: dict[str, Any] = {
    **DECODER,
    "num_key_value_heads": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 2,
    "v_head_dim": 5,
}
LATENT_MOE: dict[str, Any] = {
    **LATENT,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
ROTATING: dict[str, Any] = {
    **HEAD_DIM,
    "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 0], "rope_theta": 10_000.0},
}
SWIN: dict[str, Any] = {
    "embed_dim": 8,
    "depths": [2, 1],
    "num_heads": [2, 4],
    "window_size": 2,
    "image_size": 16,
    "patch_size": 2,
    "num_channels": 3,
    "mlp_ratio": 1.0,
}
LASR: dict[str, Any] = {
    **{
        k: CONFORMER[k]
        for k in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    },
    "num_key_value_heads": 4,
    "num_mel_bins": 8,
    "subsampling_conv_channels": 4,
    "conv_kernel_size": 3,
}
PARAKEET: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 12,
    "num_mel_bins": 8,
    "subsampling_conv_channels": 4,
}
RESNET: dict[str, Any] = {
    "model_type": "resnet",
    "num_channels": 3,
    "embedding_size": 8,
    "hidden_sizes": [8] * 4,
    "depths": [1] * 4,
    "layer_type": "basic",
    "out_features": ["stage4"],
}
LEVELS: dict[str, Any] = {**RESNET, "out_features": ["stage2", "stage3", "stage4"]}
DETECTION: dict[str, Any] = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 12,
    "decoder_ffn_dim": 12,
    "num_queries": 5,
}
DETR: dict[str, Any] = {**DETECTION, "backbone_config": RESNET, "backbone": None, "use_timm_backbone": False}
RT_DETR: dict[str, Any] = {
    **DETECTION,
    "backbone_config": {**LEVELS, "model_type": "rt_detr_resnet"},
    "encoder_hidden_dim": 16,
    "encoder_in_channels": [8] * 3,
    "decoder_in_channels": [16] * 3,
    "decoder_n_points": 2,
    "num_denoising": 0,
}
STAGES: dict[str, Any] = {
    "num_encoder_blocks": 2,
    "depths": [1, 2],
    "hidden_sizes": [8, 16],
    "num_attention_heads": [2, 4],
    "sr_ratios": [2, 1],
    "patch_sizes": [3, 3],
    "strides": [2, 2],
    "mlp_ratios": [1, 1],
    "decoder_hidden_size": 8,
    "image_size": 16,
}
PYRAMID: dict[str, Any] = {
    **SWIN,
    "model_type": "swin",
    "depths": [1] * 4,
    "num_heads": [2] * 4,
    "mlp_ratio": 0.25,
}
SAM: dict[str, Any] = {
    "vision_config": {
        **IMAGE,
        "image_size": 16,
        "output_channels": 8,
        "window_size": 2,
        "global_attn_indexes": [1],
        "mlp_dim": 12,
        "num_pos_feats": 4,
    },
    "prompt_encoder_config": {
        "hidden_size": 8,
        "image_size": 16,
        "patch_size": 4,
        "mask_input_channels": 4,
    },
    "mask_decoder_config": {
        "hidden_size": 8,
        "mlp_dim": 12,
        "num_attention_heads": 2,
        "iou_head_hidden_dim": 8,
    },
}
READING: dict[str, Any] = {"is_decoder": True, "add_cross_attention": True}
BEGIN: dict[str, Any] = {"decoder_start_token_id": 2, "pad_token_id": 1, "eos_token_id": 3}
QFORMER: dict[str, Any] = {**ENCODER, "num_hidden_layers": 2, "encoder_hidden_size": 16}
BLIP_TEXT: dict[str, Any] = {**TEXT_TOWER, "encoder_hidden_size": 16, "sep_token_id": 3, "is_decoder": True}
READER: dict[str, Any] = {**MHA, "ffn_dim": 12, "word_embed_proj_dim": 16, "model_type": "opt"}
ZOO: dict[str, tuple[str, dict[str, Any], str]] = {
    # name: (class, config, kind of inputs)
    # decoders
    "apertus": ("ApertusForCausalLM", DECODER, "text"),
    "arcee": ("ArceeForCausalLM", {**DECODER, "attention_bias": True, "mlp_bias": True}, "text"),
    "biogpt": ("BioGptForCausalLM", MHA, "text"),
    "bloom": ("BloomForCausalLM", {**SMALL, "hidden_size": 16, "n_layer": 3, "n_head": 4}, "text"),
    "cohere": ("CohereForCausalLM", DECODER, "text"),
    "cohere2": ("Cohere2ForCausalLM", {**DECODER, **SLIDING}, "text"),
    "cohere:qk-norm": ("CohereForCausalLM", {**DECODER, "use_qk_norm": True}, "text"),
    "ctrl": ("CTRLLMHeadModel", {**GPT, "dff": 12}, "text"),
    "cwm": ("CwmForCausalLM", {**HEAD_DIM, **SLIDING}, "text"),
    "dots1": ("Dots1ForCausalLM", SHARED_MOE, "text"),
    "ernie4_5": ("Ernie4_5ForCausalLM", {**HEAD_DIM, "use_bias": True}, "text"),
    "ernie4_5_moe": (
        "Ernie4_5_MoeForCausalLM",
        {**MOE, "moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1},
        "text",
    ),
    "exaone4": ("Exaone4ForCausalLM", {**HEAD_DIM, **SLIDING}, "text"),
    "exaone_moe": (
        "ExaoneMoeForCausalLM",
        {**MOE, **SLIDING, "head_dim": 4, "num_shared_experts": 1, "n_group": 1, "topk_group": 1},
        "text",
    ),
    "falcon": ("FalconForCausalLM", FALCON, "text"),
    "falcon:alibi": (
        "FalconForCausalLM",
        {**FALCON, "alibi": True, "multi_query": False, "bias": True},
        "text",
    ),
    "falcon:new": (
        "FalconForCausalLM",
        {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
        "text",
    ),
    "falcon:sequential": (
        "FalconForCausalLM",
        {**FALCON, "multi_query": False, "parallel_attn": False},
        "text",
    ),
    "flex_olmo": ("FlexOlmoForCausalLM", {**DECODER, "num_experts": 4, "num_experts_per_tok": 2}, "text"),
    "gemma": ("GemmaForCausalLM", HEAD_DIM, "text"),
    "gemma2": ("Gemma2ForCausalLM", {**HEAD_DIM, **SLIDING}, "text"),
    "gemma3_text": ("Gemma3ForCausalLM", {**HEAD_DIM, **SLIDING}, "text"),
    "gemma4": (
        "Gemma4ForConditionalGeneration",
        {
            "text_config": GEMMA4,
            "vision_config": {
                **{k: v for k, v in HEAD_DIM.items() if k != "vocab_size"},
                "num_key_value_heads": 4,
                "patch_size": 2,
                "pooling_kernel_size": 2,
                "position_embedding_size": 8,
                "use_clipped_linears": True,
            },
            "audio_config": None,
            "image_token_id": 3,
        },
        "places",
    ),
    "gemma4_text": ("Gemma4ForCausalLM", GEMMA4, "text"),
    "gemma3n_text": (
        "Gemma3nForCausalLM",
        {
            **HEAD_DIM,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "sliding_window": 4,
            "num_kv_shared_layers": 2,
            "activation_sparsity_pattern": [0.9, 0.0, 0.0, 0.0],
            "vocab_size_per_layer_input": 60,
            "hidden_size_per_layer_input": 4,
            "altup_num_inputs": 3,
            "laurel_rank": 4,
        },
        "text",
    ),
    "gemma3n_text:unshared": (
        "Gemma3nForCausalLM",
        {
            **HEAD_DIM,
            **SLIDING,
            "num_kv_shared_layers": 0,
            "vocab_size_per_layer_input": 60,
            "hidden_size_per_layer_input": 4,
            "altup_num_inputs": 2,
            "laurel_rank": 4,
        },
        "text",
    ),
    "gemma4_text:shared": (
        "Gemma4ForCausalLM",
        {
            **GEMMA4,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "use_double_wide_mlp": True,
            "attention_k_eq_v": False,
        },
        "text",
    ),
    "gemma4_text:experts": (
        "Gemma4ForCausalLM",
        {
            **GEMMA4,
            "attention_k_eq_v": False,
            "hidden_size_per_layer_input": 0,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 8,
        },
        "text",
    ),
    "glm": ("GlmForCausalLM", {**HEAD_DIM, "attention_bias": True}, "text"),
    "glm4": ("Glm4ForCausalLM", HEAD_DIM, "text"),
    "glm4_moe": ("Glm4MoeForCausalLM", {**SHARED_MOE, "use_qk_norm": True}, "text"),
    "gpt2": ("GPT2LMHeadModel", GPT, "text"),
    "gpt_bigcode": ("GPTBigCodeForCausalLM", GPT, "text"),
    "gpt_bigcode:multi-head": ("GPTBigCodeForCausalLM", {**GPT, "multi_query": False}, "text"),
    "gpt_neo": (
        "GPTNeoForCausalLM",
        {
            **SMALL,
            "hidden_size": 16,
            "num_layers": 3,
            "num_heads": 4,
            "intermediate_size": 12,
            "max_position_embeddings": 64,
            "window_size": 4,
            "attention_types": [[["global", "local", "global"], 1]],
        },
        "text",
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", MHA, "text"),
    "gpt_neox:sequential": ("GPTNeoXForCausalLM", {**MHA, "use_parallel_residual": False}, "text"),
    "gpt_oss": (
        "GptOssForCausalLM",
        {**HEAD_DIM, **SLIDING, "num_local_experts": 4, "num_experts_per_tok": 2},
        "text",
    ),
    "gptj": ("GPTJForCausalLM", {**GPT, "rotary_dim": 2}, "text"),
    "granite": (
        "GraniteForCausalLM",
        {**DECODER, "residual_multiplier": 0.3, "attention_multiplier": 0.5},
        "text",
    ),
    "granite_swa": ("GraniteSWAForCausalLM", {**DECODER, **SLIDING, "residual_multiplier": 0.3}, "text"),
    "granitemoe": ("GraniteMoeForCausalLM", GRANITE_MOE, "text"),
    "granitemoe_swa": ("GraniteMoeSWAForCausalLM", {**GRANITE_MOE, **SLIDING}, "text"),
    "granitemoeshared": (
        "GraniteMoeSharedForCausalLM",
        {**GRANITE_MOE, "shared_intermediate_size": 8},
        "text",
    ),
    "helium": ("HeliumForCausalLM", HEAD_DIM, "text"),
    "hunyuan_v1_dense": ("HunYuanDenseV1ForCausalLM", HEAD_DIM, "text"),
    "internlm3": ("LlamaForCausalLM", {**HEAD_DIM, "qkv_bias": True, "bias": True}, "text"),
    "iquestcoder": ("LlamaForCausalLM", HEAD_DIM, "text"),
    "jais2": ("Jais2ForCausalLM", HEAD_DIM, "text"),
    "llama": ("LlamaForCausalLM", DECODER, "text"),
    "llama:bias": ("LlamaForCausalLM", {**DECODER, "attention_bias": True, "mlp_bias": True}, "text"),
    "llama:multi-query": ("LlamaForCausalLM", {**DECODER, "num_key_value_heads": 1}, "text"),
    "minimax_m2": (
        "MiniMaxM2ForCausalLM",
        {**HEAD_DIM, "num_local_experts": 4, "num_experts_per_tok": 2},
        "text",
    ),
    "ministral": ("MinistralForCausalLM", {**HEAD_DIM, **SLIDING}, "text"),
    "ministral3": ("Ministral3ForCausalLM", HEAD_DIM, "text"),
    "mistral": ("MistralForCausalLM", {**DECODER, "sliding_window": 4}, "text"),
    "mixtral": ("MixtralForCausalLM", {**DECODER, "num_local_experts": 4}, "text"),
    "modernbert-decoder": (
        "ModernBertDecoderForCausalLM",
        {**MHA, "cls_token_id": 2, "sep_token_id": 3, "local_attention": 4},
        "text",
    ),
    "mpt": (
        "MptForCausalLM",
        {**SMALL, "d_model": 16, "n_heads": 4, "n_layers": 3, "max_seq_len": 64},
        "text",
    ),
    "nanochat": ("NanoChatForCausalLM", DECODER, "text"),
    "nemotron": ("NemotronForCausalLM", {**DECODER, "attention_bias": True}, "text"),
    "olmo": ("OlmoForCausalLM", {**DECODER, "clip_qkv": 2.0}, "text"),
    "olmo2": ("Olmo2ForCausalLM", DECODER, "text"),
    "olmo3": ("Olmo3ForCausalLM", {**DECODER, **SLIDING}, "text"),
    "olmoe": ("OlmoeForCausalLM", {**DECODER, "num_experts": 4, "num_experts_per_tok": 2}, "text"),
    "opt": ("OPTForCausalLM", {**MHA, "ffn_dim": 12, "word_embed_proj_dim": 16}, "text"),
    "opt:post-norm": (
        "OPTForCausalLM",
        {**MHA, "ffn_dim": 12, "word_embed_proj_dim": 8, "do_layer_norm_before": False},
        "text",
    ),
    "bamba": ("BambaForCausalLM", {**DECODER, **MAMBA, "attn_layer_indices": [1]}, "text"),
    "falcon_h1": (
        "FalconH1ForCausalLM",
        {
            **HEAD_DIM,
            **MAMBA,
            "mamba_d_ssm": 32,
            "attention_out_multiplier": 0.7,
            "mlp_multipliers": [0.8, 1.3],
        },
        "text",
    ),
    "granitemoehybrid": (
        "GraniteMoeHybridForCausalLM",
        {
            **GRANITE_MOE,
            **MAMBA,
            "layer_types": ["mamba", "attention", "mamba"],
            "shared_intermediate_size": 12,
            "position_embedding_type": "rope",
        },
        "text",
    ),
    "jamba": (
        "JambaForCausalLM",
        {
            **DECODER,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "mamba_d_state": 4,
            "mamba_dt_rank": 2,
            "use_mamba_kernels": False,
        },
        "text",
    ),
    "lfm2": (
        "Lfm2ForCausalLM",
        {**DECODER, "layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False},
        "text",
    ),
    "lfm2_moe": (
        "Lfm2MoeForCausalLM",
        {**MOE, "layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
        "text",
    ),
    "minimax": (
        "MiniMaxForCausalLM",
        {
            **HEAD_DIM,
            "layer_types": ["full_attention", "linear_attention", "full_attention"],
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
        "text",
    ),
    "nemotron_h": (
        "NemotronHForCausalLM",
        {
            **HEAD_DIM,
            "num_hidden_layers": 4,
            "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
            "mamba_num_heads": 4,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "n_groups": 1,
            "chunk_size": 8,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 8,
            "moe_shared_expert_intermediate_size": 8,
            "n_group": 1,
            "topk_group": 1,
        },
        "text",
    ),
    "nemotron_h:latent": (
        "NemotronHForCausalLM",
        {
            **HEAD_DIM,
            "num_hidden_layers": 3,
            "layers_block_type": ["full_attention", "moe", "mlp"],
            "mamba_num_heads": 4,
            "mamba_head_dim": 8,
            "n_groups": 1,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 8,
            "moe_latent_size": 12,
            "moe_shared_expert_intermediate_size": 8,
            "n_group": 1,
            "topk_group": 1,
        },
        "text",
    ),
    "olmo_hybrid": ("OlmoHybridForCausalLM", {**DECODER, **DELTA}, "text"),
    "qwen3_5_text": ("Qwen3_5ForCausalLM", {**HEAD_DIM, **DELTA}, "text"),
    "qwen3_5_moe_text": (
        "Qwen3_5MoeForCausalLM",
        {**MOE, **DELTA, "head_dim": 4, "shared_expert_intermediate_size": 8},
        "text",
    ),
    "qwen2_vl_text": ("Qwen2VLTextModel", ROTATING, "text"),
    "qwen2_5_vl_text": ("Qwen2_5_VLTextModel", ROTATING, "text"),
    "qwen3_vl_text": ("Qwen3VLTextModel", ROTATING, "text"),
    "qwen3_vl_moe_text": ("Qwen3VLMoeTextModel", {**ROTATING, **MOE, "head_dim": 4}, "text"),
    "glm4v_moe_text": (
        "Glm4vMoeTextModel",
        {
            **SHARED_MOE,
            "rope_parameters": {**ROTATING["rope_parameters"], "partial_rotary_factor": 1.0},
        },
        "text",
    ),
    "glm4v_text": ("Glm4vTextModel", ROTATING, "text"),
    "qwen3_next": (
        "Qwen3NextForCausalLM",
        {**MOE, **DELTA, "head_dim": 4, "shared_expert_intermediate_size": 8, "mlp_only_layers": [0]},
        "text",
    ),
    "recurrent_gemma": (
        "RecurrentGemmaForCausalLM",
        {**HEAD_DIM, "lru_width": 16, "attention_window_size": 8, "block_types": ["recurrent", "attention"]},
        "text",
    ),
    "persimmon": ("PersimmonForCausalLM", MHA, "text"),
    "parakeet_encoder": ("ParakeetEncoder", PARAKEET, "frames"),
    "axk1": ("AXK1ForCausalLM", LATENT_MOE, "text"),
    "deepseek_v2": ("DeepseekV2ForCausalLM", {**LATENT_MOE, "q_lora_rank": None}, "text"),
    "deepseek_v3": ("DeepseekV3ForCausalLM", LATENT_MOE, "text"),
    "deepseek_v32": (
        "DeepseekV32ForCausalLM",
        {**LATENT_MOE, "index_n_heads": 2, "index_head_dim": 4, "index_topk": 4},
        "text",
    ),
    "glm4_moe_lite": ("Glm4MoeLiteForCausalLM", LATENT_MOE, "text"),
    "kimi_linear": (
        "KimiLinearForCausalLM",
        {
            **{name: value for name, value in LATENT_MOE.items() if name != "q_lora_rank"},
            "layer_types": ["full_attention", "linear_attention", "full_attention"],
            "num_local_experts": 4,
            "linear_head_dim": 4,
            "linear_num_heads": 2,
        },
        "text",
    ),
    "llama4_text": (
        "Llama4ForCausalLM",
        {
            **HEAD_DIM,
            "intermediate_size_mlp": 12,
            "num_local_experts": 3,
            "moe_layers": [1],
            "attention_chunk_size": 4,
            "no_rope_layers": [1, 0, 1],
        },
        "text",
    ),
    "longcat_flash": (
        "LongcatFlashForCausalLM",
        {
            **{name: value for name, value in LATENT.items() if name != "num_hidden_layers"},
            "head_dim": 2,
            "num_layers": 2,
            "ffn_hidden_size": 12,
            "expert_ffn_hidden_size": 8,
            "n_routed_experts": 4,
            "zero_expert_num": 2,
            "moe_topk": 2,
        },
        "text",
    ),
    "minicpm3": ("MiniCPM3ForCausalLM", LATENT, "text"),
    "mistral4": ("Mistral4Model", LATENT_MOE, "text"),
    "youtu": ("YoutuForCausalLM", LATENT, "text"),
    "phi": ("PhiForCausalLM", {**DECODER, "qk_layernorm": True}, "text"),
    "phi3": ("Phi3ForCausalLM", DECODER, "text"),
    "phimoe": ("PhimoeForCausalLM", {**DECODER, "num_local_experts": 4}, "text"),
    "qwen2": ("Qwen2ForCausalLM", DECODER, "text"),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        {**MOE, "shared_expert_intermediate_size": 8, "mlp_only_layers": [1]},
        "text",
    ),
    "qwen3": ("Qwen3ForCausalLM", HEAD_DIM, "text"),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {**MOE, "head_dim": 4, "mlp_only_layers": [1]}, "text"),
    "seed_oss": ("SeedOssForCausalLM", HEAD_DIM, "text"),
    "smollm3": ("SmolLM3ForCausalLM", DECODER, "text"),
    "stablelm": (
        "StableLmForCausalLM",
        {**DECODER, "partial_rotary_factor": 0.5, "use_qkv_bias": True},
        "text",
    ),
    "stablelm:parallel": ("StableLmForCausalLM", {**DECODER, "use_parallel_residual": True}, "text"),
    "stablelm:qk-norm": ("StableLmForCausalLM", {**DECODER, "qk_layernorm": True}, "text"),
    "starcoder2": ("Starcoder2ForCausalLM", DECODER, "text"),
    "vaultgemma": ("VaultGemmaForCausalLM", {**HEAD_DIM, **SLIDING}, "text"),
    "xglm": (
        "XGLMForCausalLM",
        {
            **SMALL,
            "d_model": 16,
            "num_layers": 3,
            "attention_heads": 4,
            "ffn_dim": 12,
            "max_position_embeddings": 64,
        },
        "text",
    ),
    # encoders, encoder-decoders, vision, speech
    "bert": ("BertForSequenceClassification", ENCODER, "text"),
    "bert-generation": ("BertGenerationEncoder", ENCODER, "text"),
    "camembert": ("CamembertForMaskedLM", ENCODER, "text"),
    "data2vec-text": ("Data2VecTextForTokenClassification", ENCODER, "text"),
    "electra": ("ElectraForSequenceClassification", {**ENCODER, "embedding_size": 8}, "text"),
    "ernie": ("ErnieForSequenceClassification", ENCODER, "text"),
    "layoutlm": ("LayoutLMForTokenClassification", ENCODER, "text"),
    "markuplm": (
        "MarkupLMForTokenClassification",
        {
            **ENCODER,
            "max_depth": 2,
            "max_xpath_tag_unit_embeddings": 220,
            "max_xpath_subs_unit_embeddings": 20,
            "tag_pad_id": 216,
            "subs_pad_id": 18,
            "xpath_unit_hidden_size": 4,
        },
        "text",
    ),
    "roberta": ("RobertaForSequenceClassification", ENCODER, "text"),
    "roc_bert": (
        "RoCBertForSequenceClassification",
        {
            **ENCODER,
            "shape_vocab_size": 60,
            "pronunciation_vocab_size": 60,
            "pronunciation_embed_dim": 8,
            "shape_embed_dim": 8,
            "enable_shape": False,
            "enable_pronunciation": False,
        },
        "text",
    ),
    "splinter": ("SplinterModel", {**ENCODER, "question_token_id": 5}, "text"),
    "xlm-roberta": ("XLMRobertaForMaskedLM", ENCODER, "text"),
    "esm": ("EsmForTokenClassification", {**ENCODER, "mask_token_id": 4}, "text"),
    "esm:rotary": (
        "EsmForMaskedLM",
        {**ENCODER, "mask_token_id": 4, "position_embedding_type": "rotary", "token_dropout": True},
        "text",
    ),
    "megatron-bert": ("MegatronBertForSequenceClassification", ENCODER, "text"),
    "rembert": (
        "RemBertForSequenceClassification",
        {
            **ENCODER,
            "input_embedding_size": 8,
            "output_embedding_size": 8,
            "bos_token_id": 2,
            "eos_token_id": 3,
        },
        "text",
    ),
    "roberta-prelayernorm": ("RobertaPreLayerNormForSequenceClassification", ENCODER, "text"),
    "roformer": ("RoFormerForSequenceClassification", ENCODER, "text"),
    "tapas": ("TapasModel", ENCODER, "text"),
    "visual_bert": ("VisualBertModel", ENCODER, "text"),
    "xlm-roberta-xl": ("XLMRobertaXLForSequenceClassification", ENCODER, "text"),
    "xmod": ("XmodForSequenceClassification", {**ENCODER, "default_language": "en_XX"}, "text"),
    "xmod:pre_norm": (
        "XmodForSequenceClassification",
        {
            **ENCODER,
            "default_language": "en_XX",
            "pre_norm": True,
            "adapter_reuse_layer_norm": True,
            "ln_before_adapter": True,
        },
        "text",
    ),
    "yoso": ("YosoForSequenceClassification", {**ENCODER, "use_expectation": True}, "text"),
    "deberta": (
        "DebertaForSequenceClassification",
        {**ENCODER, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 8},
        "text",
    ),
    "deberta:absolute": ("DebertaForTokenClassification", ENCODER, "text"),
    "deberta-v2": (
        "DebertaV2ForSequenceClassification",
        {
            **ENCODER,
            "relative_attention": True,
            "pos_att_type": ["c2p", "p2c"],
            "max_relative_positions": 8,
            "conv_kernel_size": 3,
            "conv_act": "gelu",
        },
        "text",
    ),
    "deberta-v2:v3": (
        "DebertaV2ForTokenClassification",
        {
            **ENCODER,
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_buckets": 6,
            "max_relative_positions": 12,
            "share_att_key": True,
            "norm_rel_ebd": "layer_norm",
            "position_biased_input": False,
            "type_vocab_size": 0,
            "attention_head_size": 4,
        },
        "text",
    ),
    "distilbert": (
        "DistilBertForSequenceClassification",
        DISTILBERT,
        "text",
    ),
    "longformer": (
        "LongformerForSequenceClassification",
        {
            **ENCODER,
            "attention_window": 4,
            "max_position_embeddings": 60,
            "bos_token_id": 2,
            "eos_token_id": 3,
            "sep_token_id": 3,
        },
        "text",
    ),
    "modernbert": (
        "ModernBertForSequenceClassification",
        {
            **ENCODER,
            "bos_token_id": 2,
            "eos_token_id": 3,
            "cls_token_id": 2,
            "sep_token_id": 3,
            "attention_bias": True,
            "mlp_bias": True,
            "norm_bias": True,
            "local_attention": 4,
        },
        "text",
    ),
    "mpnet": ("MPNetForSequenceClassification", ENCODER, "text"),
    "jina_embeddings_v3": ("JinaEmbeddingsV3ForSequenceClassification", ENCODER, "text"),
    "nomic_bert": ("NomicBertForSequenceClassification", ENCODER, "text"),
    "eurobert": (
        "EuroBertForTokenClassification",
        {**ENCODER, "num_key_value_heads": 2, "bos_token_id": 2, "eos_token_id": 3, "mask_token_id": 4},
        "text",
    ),
    # encoder-decoders
    "bart": ("BartForConditionalGeneration", SEQ2SEQ, "seq2seq"),
    "blenderbot": ("BlenderbotForConditionalGeneration", SEQ2SEQ, "seq2seq"),
    "blenderbot-small": ("BlenderbotSmallForConditionalGeneration", SEQ2SEQ, "seq2seq"),
    "m2m_100": ("M2M100ForConditionalGeneration", SEQ2SEQ, "seq2seq"),
    "marian": ("MarianMTModel", SEQ2SEQ, "seq2seq"),
    "mbart": ("MBartForConditionalGeneration", SEQ2SEQ, "seq2seq"),
    "mvp": ("MvpForConditionalGeneration", SEQ2SEQ, "seq2seq"),
    "mvp:prompt": (
        "MvpForConditionalGeneration",
        {**SEQ2SEQ, "use_prompt": True, "prompt_length": 3, "prompt_mid_dim": 8},
        "seq2seq",
    ),
    "pegasus": ("PegasusForConditionalGeneration", SEQ2SEQ, "seq2seq"),
    "plbart": ("PLBartForConditionalGeneration", SEQ2SEQ, "seq2seq"),
    "speech_to_text": (
        "Speech2TextForConditionalGeneration",
        {
            **SEQ2SEQ,
            "max_source_positions": 40,
            "max_target_positions": 40,
            "input_feat_per_channel": 8,
            "conv_channels": 8,
            "num_conv_layers": 2,
        },
        "speech_features",
    ),
    "wav2vec2-bert": ("Wav2Vec2BertForSequenceClassification", CONFORMER, "frames"),
    "wav2vec2-bert:relative": (
        "Wav2Vec2BertForSequenceClassification",
        {**CONFORMER, "position_embeddings_type": "relative"},
        "frames",
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        {
            **SEQ2SEQ,
            "num_mel_bins": 8,
            "max_source_positions": 10,
            "max_target_positions": 40,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
        "audio_features",
    ),
    "longt5": ("LongT5ForConditionalGeneration", {**T5, "local_radius": 2}, "seq2seq"),
    "mt5": ("MT5ForConditionalGeneration", T5, "seq2seq"),
    "switch_transformers": (
        "SwitchTransformersForConditionalGeneration",
        {
            **T5,
            "num_experts": 2,
            "num_sparse_encoder_layers": 1,
            "num_sparse_decoder_layers": 1,
            "expert_capacity": 64,
        },
        "seq2seq",
    ),
    "t5": ("T5ForConditionalGeneration", T5, "seq2seq"),
    "t5:gated": (
        "T5ForConditionalGeneration",
        {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        "seq2seq",
    ),
    "t5:encoder": ("T5EncoderModel", T5, "text"),
    "umt5": ("UMT5ForConditionalGeneration", T5, "seq2seq"),
    # images
    "beit": (
        "BeitForImageClassification",
        {**IMAGE, "use_relative_position_bias": True, "layer_scale_init_value": 0.5},
        "image",
    ),
    "beit:shared": (
        "BeitModel",
        {**IMAGE, "use_shared_relative_position_bias": True, "use_mean_pooling": False},
        "image",
    ),
    "data2vec-vision": (
        "Data2VecVisionForImageClassification",
        {**IMAGE, "use_relative_position_bias": True, "use_shared_relative_position_bias": True},
        "image",
    ),
    "deit": ("DeiTForImageClassification", IMAGE, "image"),
    "dinov2": ("Dinov2ForImageClassification", {**IMAGE, "mlp_ratio": 1, "layerscale_value": 0.5}, "image"),
    "dinov2:swiglu": ("Dinov2Model", {**IMAGE, "mlp_ratio": 1, "use_swiglu_ffn": True}, "image"),
    "dinov2_with_registers": (
        "Dinov2WithRegistersForImageClassification",
        {**IMAGE, "mlp_ratio": 1},
        "image",
    ),
    "dinov3_vit": ("DINOv3ViTModel", {**IMAGE, "num_register_tokens": 2}, "image"),
    "dinov3_vit:gated": (
        "DINOv3ViTModel",
        {**IMAGE, "num_register_tokens": 2, "use_gated_mlp": True},
        "image",
    ),
    "dpt": ("DPTModel", {**IMAGE, "backbone_out_indices": [0, 1, 2]}, "image"),
    "ijepa": ("IJepaForImageClassification", IMAGE, "image"),
    "videomae": ("VideoMAEForVideoClassification", {**IMAGE, "num_frames": 4, "tubelet_size": 2}, "video"),
    "vit": ("ViTForImageClassification", IMAGE, "image"),
    "vit_msn": ("ViTMSNForImageClassification", IMAGE, "image"),
    "vivit": ("VivitForVideoClassification", {**IMAGE, "num_frames": 4, "tubelet_size": [2, 4, 4]}, "video"),
    "yolos": ("YolosForObjectDetection", {**IMAGE, "image_size": [8, 8], "num_detection_tokens": 3}, "image"),
    # images and text
    "altclip": (
        "AltCLIPModel",
        {"text_config": TEXT_TOWER, "vision_config": IMAGE, "projection_dim": 8},
        "clip",
    ),
    "chinese_clip": (
        "ChineseCLIPModel",
        {"text_config": ENCODER, "vision_config": IMAGE, "projection_dim": 8},
        "clip",
    ),
    "clip": ("CLIPModel", {"text_config": TEXT_TOWER, "vision_config": IMAGE, "projection_dim": 8}, "clip"),
    "clip_text_model": ("CLIPTextModelWithProjection", TEXT_TOWER, "text"),
    "clip_vision_model": ("CLIPVisionModelWithProjection", IMAGE, "image"),
    "metaclip_2": (
        "MetaClip2Model",
        {"text_config": TEXT_TOWER, "vision_config": IMAGE, "projection_dim": 8},
        "clip",
    ),
    "siglip": ("SiglipModel", {"text_config": TEXT_TOWER, "vision_config": IMAGE}, "clip"),
    "siglip2": (
        "Siglip2Model",
        {"text_config": TEXT_TOWER, "vision_config": {**IMAGE, "num_patches": 16}},
        "patches",
    ),
    "siglip_vision_model": ("SiglipVisionModel", IMAGE, "image"),
    "vision-text-dual-encoder": (
        "VisionTextDualEncoderModel",
        {
            "text_config": {**ENCODER, "model_type": "bert"},
            "vision_config": {**IMAGE, "model_type": "vit"},
            "projection_dim": 8,
        },
        "clip",
    ),
    "blip": ("BlipForConditionalGeneration", {"text_config": BLIP_TEXT, "vision_config": IMAGE}, "clip"),
    "blip-2": (
        "Blip2ForConditionalGeneration",
        {
            "text_config": READER,
            "vision_config": IMAGE,
            "qformer_config": QFORMER,
            "num_query_tokens": 3,
            "image_token_index": 59,
        },
        "queries",
    ),
    "instructblip": (
        "InstructBlipForConditionalGeneration",
        {
            "text_config": READER,
            "vision_config": IMAGE,
            "qformer_config": QFORMER,
            "num_query_tokens": 3,
            "image_token_index": 59,
        },
        "queries",
    ),
    # an encoder and a decoder of other models
    "encoder-decoder": (
        "EncoderDecoderModel",
        {
            "encoder": {**ENCODER, "model_type": "roberta"},
            "decoder": {**TEXT_TOWER, **READING, "model_type": "bert"},
            **BEGIN,
        },
        "seq2seq",
    ),
    "speech-encoder-decoder": (
        "SpeechEncoderDecoderModel",
        {
            "encoder": {**AUDIO, "model_type": "wav2vec2"},
            "decoder": {**TEXT_TOWER, **READING, "model_type": "bert"},
            **BEGIN,
        },
        "transcript",
    ),
    "vision-encoder-decoder": (
        "VisionEncoderDecoderModel",
        {
            "encoder": {**IMAGE, "num_hidden_layers": 2, "model_type": "vit"},
            "decoder": {**GPT, **READING, "n_layer": 2, "model_type": "gpt2"},
            **BEGIN,
        },
        "caption",
    ),
    "vision-encoder-decoder:trocr": (
        "VisionEncoderDecoderModel",
        {
            "encoder": {**IMAGE, "model_type": "deit"},
            "decoder": {**SEQ2SEQ, "cross_attention_hidden_size": 16, "model_type": "trocr"},
            **BEGIN,
        },
        "caption",
    ),
    # sound
    "audio-spectrogram-transformer": (
        "ASTForAudioClassification",
        {**{k: v for k, v in IMAGE.items() if k in ENCODER}, "max_length": 32, "num_mel_bins": 16},
        "spectrogram",
    ),
    "data2vec-audio": (
        "Data2VecAudioForCTC",
        {**AUDIO, "conv_pos_kernel_size": 3, "num_conv_pos_embeddings": 2},
        "audio_values",
    ),
    "hubert": ("HubertForCTC", AUDIO, "audio_values"),
    "unispeech": ("UniSpeechForCTC", {**AUDIO, "num_ctc_classes": 60}, "audio_values"),
    "unispeech-sat": ("UniSpeechSatForCTC", {**AUDIO, "num_ctc_classes": 60}, "audio_values"),
    "wav2vec2": ("Wav2Vec2ForCTC", AUDIO, "audio_values"),
    "wav2vec2:stable": (
        "Wav2Vec2ForSequenceClassification",
        {**AUDIO, "do_stable_layer_norm": True, "feat_extract_norm": "layer", "adapter_attn_dim": 4},
        "audio_values",
    ),
    "wavlm": ("WavLMForCTC", AUDIO, "audio_values"),
    "wavlm:stable": (
        "WavLMForSequenceClassification",
        {**AUDIO, "do_stable_layer_norm": True, "feat_extract_norm": "layer"},
        "audio_values",
    ),
    # more decoders
    "afmoe": (
        "AfmoeForCausalLM",
        {**SHARED_MOE, **SLIDING, "num_dense_layers": 1, "num_shared_experts": 1},
        "text",
    ),
    "aria_text": (
        "AriaTextForCausalLM",
        {**HEAD_DIM, "moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
        "text",
    ),
    "bitnet": ("BitNetForCausalLM", DECODER, "text"),
    "codegen": ("CodeGenForCausalLM", {**GPT, "n_embd": 32, "rotary_dim": 4}, "text"),
    "cohere2_moe": (
        "Cohere2MoeForCausalLM",
        {**MOE, **SLIDING, "head_dim": 4, "num_shared_experts": 1, "first_k_dense_replace": 1},
        "text",
    ),
    "csm_depth_decoder_model": ("CsmDepthDecoderModel", HEAD_DIM, "text"),
    "diffllama": ("DiffLlamaForCausalLM", HEAD_DIM, "text"),
    "doge": ("DogeForCausalLM", {**HEAD_DIM, "sliding_window": 4}, "text"),
    "emu3_text_model": ("Emu3TextModel", DECODER, "text"),
    "flint": ("FlintForCausalLM", {**SHARED_MOE, "shared_expert_intermediate_size": 8}, "text"),
    "gpt_neox_japanese": (
        "GPTNeoXJapaneseForCausalLM",
        {
            **SMALL,
            "hidden_size": 16,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "intermediate_multiple_size": 1,
            "max_position_embeddings": 64,
        },
        "text",
    ),
    "granite4_vision_text": ("Granite4VisionTextModel", {**DECODER, "residual_multiplier": 0.3}, "text"),
    "hunyuan_v1_moe": (
        "HunYuanMoEV1ForCausalLM",
        {**HEAD_DIM, "num_experts": 4, "moe_topk": 2},
        "text",
    ),
    "hy_v3": ("HYV3ForCausalLM", {**SHARED_MOE, "num_shared_experts": 1}, "text"),
    "laguna": (
        "LagunaForCausalLM",
        {**SHARED_MOE, **SLIDING, "shared_expert_intermediate_size": 8},
        "text",
    ),
    "lfm3": ("Lfm3ForCausalLM", {**HEAD_DIM, "block_auto_adjust_ff_dim": False}, "text"),
    "mellum": (
        "MellumForCausalLM",
        {**MOE, **SLIDING, "head_dim": 4, "num_local_experts": 4},
        "text",
    ),
    "minimax_m3_vl_text": (
        "MiniMaxM3VLForCausalLM",
        {
            **HEAD_DIM,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "dense_intermediate_size": 12,
            "shared_intermediate_size": 8,
        },
        "text",
    ),
    "molmo2_text": ("Molmo2TextModel", HEAD_DIM, "text"),
    "muse_glimmer_text": ("MuseGlimmerTextModel", {**HEAD_DIM, **SLIDING}, "text"),
    "openai-gpt": (
        "OpenAIGPTLMHeadModel",
        {"vocab_size": 60, "n_embd": 16, "n_layer": 3, "n_head": 4, "n_positions": 64, "pad_token_id": 1},
        "text",
    ),
    "openai_privacy_filter": (
        "OpenAIPrivacyFilterForTokenClassification",
        {**HEAD_DIM, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4},
        "text",
    ),
    "solar_open": ("SolarOpenForCausalLM", SHARED_MOE, "text"),
    "glm_image_text": ("GlmImageTextModel", ROTATING, "text"),
    "glm_ocr_text": ("GlmOcrTextModel", ROTATING, "text"),
    "hunyuan_vl_text": ("HunYuanVLTextModel", ROTATING, "text"),
    "paddleocr_vl_text": ("PaddleOCRTextModel", ROTATING, "text"),
    "qwen2_5_omni_text": ("Qwen2_5OmniThinkerTextModel", ROTATING, "text"),
    "qwen3_omni_moe_text": ("Qwen3OmniMoeThinkerTextModel", {**ROTATING, **MOE, "head_dim": 4}, "text"),
    # more encoders
    "albert": ("AlbertForSequenceClassification", {**ENCODER, "embedding_size": 8}, "text"),
    "albert:groups": (
        "AlbertForMaskedLM",
        {
            **ENCODER,
            "embedding_size": 8,
            "num_hidden_layers": 4,
            "num_hidden_groups": 2,
            "inner_group_num": 2,
        },
        "text",
    ),
    "align_text_model": ("AlignTextModel", ENCODER, "text"),
    "big_bird": ("BigBirdForSequenceClassification", {**ENCODER, "attention_type": "original_full"}, "text"),
    "bigbird_pegasus": (
        "BigBirdPegasusForConditionalGeneration",
        {**SEQ2SEQ, "attention_type": "original_full"},
        "seq2seq",
    ),
    "clap_text_model": ("ClapTextModel", ENCODER, "text"),
    "clipseg": (
        "CLIPSegModel",
        {"text_config": TEXT_TOWER, "vision_config": IMAGE, "projection_dim": 8},
        "clip",
    ),
    "convbert": (
        "ConvBertForSequenceClassification",
        {**ENCODER, "embedding_size": 16, "conv_kernel_size": 3},
        "text",
    ),
    "dpr": ("DPRQuestionEncoder", ENCODER, "text"),
    "fnet": ("FNetForSequenceClassification", {**ENCODER, "tpu_short_seq_length": 9}, "ids"),
    "gte": ("GteModel", ENCODER, "text"),
    "mobilebert": (
        "MobileBertForSequenceClassification",
        {
            **ENCODER,
            "embedding_size": 8,
            "true_hidden_size": 8,
            "intra_bottleneck_size": 8,
            "num_feedforward_networks": 4,
        },
        "text",
    ),
    "owlv2": (
        "Owlv2Model",
        {"text_config": TEXT_TOWER, "vision_config": IMAGE, "projection_dim": 8},
        "clip",
    ),
    "owlvit": (
        "OwlViTModel",
        {"text_config": TEXT_TOWER, "vision_config": IMAGE, "projection_dim": 8},
        "clip",
    ),
    "tipsv2_text_model": ("Tipsv2TextModel", TEXT_TOWER, "text"),
    "ultrabert": ("UltrabertModel", ENCODER, "text"),
    "led": (
        "LEDForConditionalGeneration",
        {
            **SEQ2SEQ,
            "max_encoder_position_embeddings": 64,
            "max_decoder_position_embeddings": 64,
            "attention_window": 4,
        },
        "seq2seq",
    ),
    "pop2piano": ("Pop2PianoForConditionalGeneration", {**T5, "composer_vocab_size": 4}, "pairs"),
    "aimv2": (
        "Aimv2Model",
        {"text_config": TEXT_TOWER, "vision_config": IMAGE, "projection_dim": 8},
        "clip",
    ),
    "flava_text_model": ("FlavaTextModel", ENCODER, "text"),
    "xclip_text_model": ("XCLIPTextModel", TEXT_TOWER, "text"),
    # more models of images and sound
    "flava_image_model": ("FlavaImageModel", IMAGE, "image"),
    "git_vision_model": ("GitVisionModel", IMAGE, "image"),
    "donut-swin": ("DonutSwinModel", SWIN, "image"),
    "swin": ("SwinForImageClassification", SWIN, "image"),
    "swin2sr": (
        "Swin2SRForImageSuperResolution",
        {**SWIN, "num_heads": [2, 2], "patch_size": 1, "image_size": 8},
        "image",
    ),
    "swinv2": ("Swinv2ForImageClassification", SWIN, "image"),
    "pixio": ("PixioModel", IMAGE, "image"),
    "conditional_detr": ("ConditionalDetrForObjectDetection", DETR, "picture"),
    "d_fine": ("DFineForObjectDetection", RT_DETR, "picture"),
    "dab-detr": ("DabDetrForObjectDetection", {**DETR, "hidden_size": 16}, "picture"),
    "deformable_detr": (
        "DeformableDetrForObjectDetection",
        {**DETR, "d_model": 32, "backbone_config": LEVELS, "num_feature_levels": 3},
        "picture",
    ),
    "detr": ("DetrForObjectDetection", DETR, "picture"),
    "glpn": ("GLPNForDepthEstimation", STAGES, "image"),
    "mask2former": (
        "Mask2FormerForUniversalSegmentation",
        {
            "backbone_config": {**PYRAMID, "out_features": [f"stage{i}" for i in range(1, 5)]},
            "feature_size": 32,
            "mask_feature_size": 32,
            "hidden_dim": 16,
            "encoder_feedforward_dim": 12,
            "encoder_layers": 1,
            "decoder_layers": 2,
            "num_attention_heads": 4,
            "dim_feedforward": 12,
            "num_queries": 5,
            "feature_strides": [2, 4, 8, 16],
        },
        "picture",
    ),
    "maskformer": (
        "MaskFormerForInstanceSegmentation",
        {
            "backbone_config": PYRAMID,
            "decoder_config": {**DETECTION, "num_queries": 20, "model_type": "detr"},
            "fpn_feature_size": 32,
            "mask_feature_size": 8,
        },
        "picture",
    ),
    "pvt_v2": ("PvtV2ForImageClassification", STAGES, "image"),
    "rt_detr": ("RTDetrForObjectDetection", RT_DETR, "picture"),
    "rt_detr_v2": ("RTDetrV2ForObjectDetection", RT_DETR, "picture"),
    "sam": ("SamModel", SAM, "picture"),
    "segformer": ("SegformerForSemanticSegmentation", STAGES, "image"),
    "table-transformer": ("TableTransformerForObjectDetection", DETR, "picture"),
    "radio": ("RadioModel", IMAGE, "image"),
    "sapiens2": ("Sapiens2Model", IMAGE, "image"),
    "timesformer": ("TimesformerForVideoClassification", {**IMAGE, "num_frames": 2}, "video"),
    "tipsv2_vision_model": ("Tipsv2VisionModel", {**IMAGE, "mlp_ratio": 1}, "image"),
    "glmasr_encoder": (
        "GlmAsrEncoder",
        {
            **{
                k: DECODER[k]
                for k in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
            },
            "num_mel_bins": 8,
        },
        "mel",
    ),
    "lasr_ctc": ("LasrForCTC", {"encoder_config": LASR, "vocab_size": 60, "pad_token_id": 1}, "frames"),
    "parakeet_ctc": (
        "ParakeetForCTC",
        {"encoder_config": PARAKEET, "vocab_size": 60, "pad_token_id": 1},
        "frames",
    ),
    "qwen2_audio_encoder": (
        "Qwen2AudioEncoder",
        {**SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 12},
        "mel",
    ),
    "voxtral_encoder": (
        "VoxtralEncoder",
        {
            **{k: DECODER[k] for k in ("hidden_size", "num_hidden_layers", "num_attention_heads")},
            "intermediate_size": 12,
            "num_mel_bins": 8,
            "max_source_positions": 12,
        },
        "mel",
    ),
    "voxtral_realtime_encoder": (
        "VoxtralRealtimeEncoder",
        {
            **{k: v for k, v in HEAD_DIM.items() if k != "num_key_value_heads"},
            "num_mel_bins": 8,
            "sliding_window": 4,
        },
        "mel",
    ),
    "unlimited_ocr_text": ("UnlimitedOcrTextModel", {**SHARED_MOE, "num_key_value_heads": 4}, "text"),
    "lasr_encoder": ("LasrEncoder", LASR, "frames"),
    "wav2vec2-conformer": (
        "Wav2Vec2ConformerForSequenceClassification",
        {**AUDIO, "conv_depthwise_kernel_size": 3},
        "audio_values",
    ),
}

PATCHES: dict[str, Any] = {
    **{"depth": 2, "embed_dim": 16, "hidden_size": 16, "out_hidden_size": 16, "num_heads": 2, "mlp_ratio": 1},
    **{"intermediate_size": 12, "patch_size": 4, "in_channels": 3, "spatial_merge_size": 2},
    **{"temporal_patch_size": 2, "fullatt_block_indexes": [1], "window_size": 16},
    **{"deepstack_visual_indexes": [0], "num_position_embeddings": 16},
}
"""A tower that reads the patches of all images as one sequence."""
MARKS = {"image_token_id": 70, "video_token_id": 71, "vision_start_token_id": 72, "vision_end_token_id": 73}
PACKED: dict[str, tuple[str, dict[str, Any]]] = {
    "glm4v": ("Glm4vForConditionalGeneration", {}),
    "glm4v_moe": (
        "Glm4vMoeForConditionalGeneration",
        {**SHARED_MOE, "partial_rotary_factor": 1.0},
    ),
    "glm_ocr": ("GlmOcrForConditionalGeneration", {}),
    "qwen2_vl": ("Qwen2VLForConditionalGeneration", {}),
    "qwen2_5_vl": ("Qwen2_5_VLForConditionalGeneration", {}),
    "qwen3_vl": ("Qwen3VLForConditionalGeneration", {}),
    "qwen3_vl_moe": ("Qwen3VLMoeForConditionalGeneration", MOE),
    "qwen3_5": ("Qwen3_5ForConditionalGeneration", DELTA),
    "qwen3_5_moe": (
        "Qwen3_5MoeForConditionalGeneration",
        {**MOE, **DELTA, "shared_expert_intermediate_size": 8},
    ),
}
ZOO |= {
    name: (
        class_name,
        {
            "text_config": {**ROTATING, **text, "head_dim": 4, "vocab_size": 80},
            "vision_config": PATCHES,
            **MARKS,
        },
        "packed",
    )
    for name, (class_name, text) in PACKED.items()
}

LISTENING: dict[str, Any] = {
    **{"num_mel_bins": 8, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 12},
    **{"d_model": 16, "max_source_positions": 12, "output_dim": 16},
}
HEARD = {
    "audio_token_id": 74,
    "audio_token_index": 74,
    "audio_start_token_id": 75,
    "audio_end_token_id": 76,
} | {
    "image_token_index": MARKS["image_token_id"],
    "video_token_index": MARKS["video_token_id"],
}
PACKED_OTHERWISE: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "exaone4_5": (
        "Exaone4_5_ForConditionalGeneration",
        {"text_config": {**HEAD_DIM, "model_type": "exaone4"}},
        {"num_key_value_heads": 1},
    ),
    "kimi_k25": (
        "Kimi_K25ForConditionalGeneration",
        {"text_config": LATENT_MOE, "projection_hidden_size": 16},
        {"pos_emb_height": 4, "pos_emb_width": 4},
    ),
    "lfm3_vl": (
        "Lfm3VlForConditionalGeneration",
        {"text_config": {**HEAD_DIM, "block_auto_adjust_ff_dim": False}, "projector_hidden_size": 8},
        {"num_key_value_heads": 2, "layer_types": ["full_attention", "conv"]},
    ),
    "paddleocr_vl": ("PaddleOCRVLForConditionalGeneration", {"text_config": ROTATING}, {"image_size": 16}),
    "qwen2_5_omni_thinker": (
        "Qwen2_5OmniThinkerForConditionalGeneration",
        {"text_config": ROTATING, "audio_config": {**LISTENING, "n_window": 4}, **HEARD},
        {},
    ),
    "qwen3_omni_moe_thinker": (
        "Qwen3OmniMoeThinkerForConditionalGeneration",
        {
            "text_config": {**ROTATING, **MOE, "head_dim": 4},
            "audio_config": {**LISTENING, "n_window": 50, "n_window_infer": 100, "downsample_hidden_size": 4},
            **HEARD,
        },
        {"deepstack_visual_indexes": [0], "num_position_embeddings": 16},
    ),
    "video_llama_3": ("VideoLlama3ForConditionalGeneration", {"text_config": DECODER}, {}),
}
"""Those whose models take other inputs than those above."""
ZOO |= {
    name: (
        class_name,
        {
            **config,
            "text_config": {**config["text_config"], "vocab_size": 80},
            "vision_config": {
                **{key: PATCHES[key] for key in ("hidden_size", "intermediate_size", "patch_size")},
                **{key: PATCHES[key] for key in ("in_channels", "spatial_merge_size", "temporal_patch_size")},
                **{key: PATCHES[key] for key in ("fullatt_block_indexes", "window_size", "out_hidden_size")},
                **{"depth": 2, "num_heads": 2, "num_hidden_layers": 2, "num_attention_heads": 2},
                **vision,
            },
            **MARKS,
        },
        "packed",
    )
    for name, (class_name, config, vision) in PACKED_OTHERWISE.items()
}


def as_taken(model_type: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Packed inputs as a model takes them: patches of one frame, no kinds of tokens, sizes by which it merges."""
    if model_type not in PACKED_OTHERWISE:
        return inputs
    batch = {
        key: value
        for key, value in inputs.items()
        if key != "mm_token_type_ids" or model_type == "paddleocr_vl"
    }
    if "omni" in model_type:  # a sound before each text
        ids, marks = batch["input_ids"], HEARD["audio_token_id"]
        if not (ids == marks).any():
            sound = [75, *[marks] * (4 if model_type.startswith("qwen2_5") else 2), 76]
            ids = torch.cat([torch.tensor(sound).expand(len(ids), -1), ids], 1)
        words = ((ids > 3) * ids).sum(1).view(-1, 1, 1)
        batch |= {"input_ids": ids, "attention_mask": (ids != 1).long()}
        batch["input_features"] = torch.sin(words + torch.arange(128.0).view(8, 16))
        batch["feature_attention_mask"] = torch.ones(len(ids), 16).long()
    if model_type in ("kimi_k25", "paddleocr_vl", "video_llama_3"):
        batch["pixel_values"] = batch["pixel_values"].flatten(1)[:, :48]
    if model_type in ("kimi_k25", "paddleocr_vl"):
        batch["pixel_values"] = batch["pixel_values"].unflatten(1, (3, 4, 4))
    if model_type == "video_llama_3":
        batch["image_merge_sizes"] = torch.full((len(batch["image_grid_thw"]),), 2)
    return batch


COUNTED: dict[str, tuple[str, dict[str, Any]]] = {
    "aya_vision": (
        "AyaVisionForConditionalGeneration",
        {"vision_config": {**IMAGE, "model_type": "siglip_vision_model"}},
    ),
    "cohere2_vision": (
        "Cohere2VisionForConditionalGeneration",
        {
            "vision_config": {**IMAGE, "model_type": "siglip_vision_model"},
            "alignment_intermediate_size": 8,
        },
    ),
    "lfm2_vl": (
        "Lfm2VlForConditionalGeneration",
        {
            "vision_config": {**IMAGE, "model_type": "siglip2_vision_model", "num_patches": 4},
            "projector_hidden_size": 8,
        },
    ),
    "idefics3": ("Idefics3ForConditionalGeneration", {"vision_config": IMAGE, "scale_factor": 2}),
    "internvl": (
        "InternVLForConditionalGeneration",
        {"vision_config": {**IMAGE, "image_size": [8, 8], "patch_size": [4, 4]}, "image_seq_length": 1},
    ),
    "internvl:qk-norm": (
        "InternVLForConditionalGeneration",
        {
            "vision_config": {**IMAGE, "image_size": [8, 8], "patch_size": [4, 4], "use_qk_norm": True},
            "image_seq_length": 1,
        },
    ),
    "mistral3": (
        "Mistral3ForConditionalGeneration",
        {"vision_config": {**IMAGE, "head_dim": 4, "model_type": "pixtral"}, "spatial_merge_size": 1},
    ),
    **{
        name: (
            "LlavaForConditionalGeneration",
            {
                "vision_config": {**IMAGE, "model_type": "clip_vision_model"},
                "image_seq_length": 4,
                "vision_feature_layer": layer,
            },
        )
        for name, layer in (("llava", -2), ("llava:several", [-1, 1]))
    },
    "ovis2": (
        "Ovis2ForConditionalGeneration",
        {
            "vision_config": {**IMAGE, "vocab_size": 20},
            "hidden_size": 16,
            "vocab_size": 80,
            "visual_indicator_token_ids": [74, 75, 76, 77, 78],
        },
    ),
    "smolvlm": ("SmolVLMForConditionalGeneration", {"vision_config": IMAGE, "scale_factor": 2}),
}
"""Models whose rows have any number of images."""
SEEN = {"image_token_index": MARKS["image_token_id"], "image_token_id": MARKS["image_token_id"]}
ZOO |= {
    name: (
        class_name,
        {"text_config": {**DECODER, "model_type": "llama", "vocab_size": 80}, **config, **SEEN},
        "counted",
    )
    for name, (class_name, config) in COUNTED.items()
}


for unknown in [name for name in ZOO if name.split(":")[0] not in CONFIG_MAPPING]:
    del ZOO[unknown]  # a type that came with a later version of transformers than the one at hand

DISTINCT = [
    "bert",
    "distilbert",
    "mpnet",
    "deberta-v2",
    "modernbert",
    "longformer",
    "opt",
    "gpt2",
    "gptj",
    "gpt_neox",
    "bloom",
    "falcon",
    "falcon:new",
    "phi3",
    "llama",
    "gemma2",
    "olmo2",
    "granite",
    "mixtral",
    "t5",
    "bart",
    "whisper",
    "vit",
    "dinov2",
    "clip",
    "vision-encoder-decoder",
    "wav2vec2",
]
"""Families of which no two are built alike: proved by default; those built like one of them are slow tests."""


KEPT_IN_FLOAT32 = [
    "deepseek_v32",
    "ernie4_5_moe",
    "flint",
    "gpt_oss",
    "hy_v3",
    "longcat_flash",
    "nemotron_h",
    "t5",
]
"""Types of which no two keep the same parts in float32 in models of 16 bits, or have them in the same place."""


def make(name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A tiny random model whose every parameter, biases and norms too, is away from its initial value."""
    class_name, config, _ = ZOO[name]
    torch.default_generator.manual_seed(seed)
    model_class = getattr(transformers, class_name)
    settings = copy.deepcopy(config)  # some versions take their parts apart
    model = model_class(AutoConfig.for_model(name.split(":")[0], **settings)).to(dtype).eval()
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):  # fixed positions are not saved
            parameter += 0.2 * torch.randn_like(parameter)
        for module in model.modules():
            if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx] = 0
    return model


def inputs_for(model: PreTrainedModel, kind: str, seed: int = 5, batch: int = 4) -> dict[str, Tensor]:
    """Inputs of `batch` samples, of different lengths where there is padding.

    Kinds: text, unpadded (text without padding), ids (that without a mask), seq2seq,
    pairs (that of a model which generates from something else), image, picture (of a model that takes any size), mel, audio_values, audio_features, frames, clip,
    packed (text around an image each, whose patches are one sequence), counted (text after any number of images).
    """
    torch.default_generator.manual_seed(seed)

    def text(length: int, padded: bool = True, prefix: str = "") -> dict[str, Tensor]:
        ids = torch.randint(4, 60, (batch, length))
        mask = torch.ones_like(ids)
        for row in range(batch if padded else 0):
            mask[row, length - row % 3 :] = 0
        return {f"{prefix}input_ids": ids.masked_fill(mask == 0, 1), f"{prefix}attention_mask": mask}

    config: Any = model.config
    if kind == "caption":
        return {"pixel_values": torch.randn(batch, 3, 8, 8), **text(6, prefix="decoder_")}
    if kind == "transcript":
        return {"input_values": torch.randn(batch, 800), **text(6, prefix="decoder_")}
    if kind == "queries":
        inputs, images = text(9), torch.full((batch, 3), config.image_token_index)
        inputs["input_ids"] = torch.cat([images, inputs["input_ids"] % 59], 1)
        inputs["attention_mask"] = torch.cat([torch.ones_like(images), inputs["attention_mask"]], 1)
        asked = {f"qformer_{key}": value for key, value in text(5).items()}
        asked = asked if config.model_type == "instructblip" else {}
        return {"pixel_values": torch.randn(batch, 3, 8, 8), **inputs, **asked}
    if kind in ("text", "unpadded"):
        return text(9, kind == "text")
    if kind == "ids":
        return {"input_ids": text(9, padded=False)["input_ids"]}
    if kind == "mel":
        return {"input_features": torch.randn(batch, config.num_mel_bins, 24)}
    if kind in ("seq2seq", "pairs"):
        return {**text(9), **text(6, prefix="decoder_")}
    if kind == "image":
        size = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
        return {"pixel_values": torch.randn(batch, config.num_channels, size, size)}
    if kind == "picture":
        size = getattr(getattr(config, "vision_config", None), "image_size", 64)
        return {"pixel_values": torch.randn(batch, 3, size, size)}
    if kind == "video":
        size = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
        return {"pixel_values": torch.randn(batch, config.num_frames, config.num_channels, size, size)}
    if kind == "spectrogram":
        return {"input_values": torch.randn(batch, config.max_length, config.num_mel_bins)}
    if kind == "speech_features":
        return {
            "input_features": torch.randn(batch, 24, config.input_feat_per_channel),
            **text(6, prefix="decoder_"),
        }
    if kind == "patches":
        patches = torch.randn(
            batch, 6, config.vision_config.num_channels * config.vision_config.patch_size**2
        )
        shapes = torch.tensor([[2, 2 + row % 2] for row in range(batch)])
        mask = (torch.arange(6) < shapes.prod(1, keepdim=True)).long()
        return {**text(9), "pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": shapes}
    if kind == "places":  # of 16 patches, of which four make a token, or eight and padding
        rows = torch.arange(batch).unsqueeze(1)
        places = torch.cartesian_prod(torch.arange(4), torch.arange(4)).flip(1).expand(batch, -1, -1)
        padding = (torch.arange(16) >= 8) & (rows % 2 == 1)
        inputs, size = text(9), config.vision_config.patch_size
        images = torch.where((torch.arange(4) >= 2) & (rows % 2 == 1), 1, config.image_token_id)
        return {
            "input_ids": torch.cat([images, inputs["input_ids"]], 1),
            "attention_mask": torch.cat([(images != 1).long(), inputs["attention_mask"]], 1),
            "pixel_values": torch.randn(batch, 16, 3 * size**2),
            "image_position_ids": places.masked_fill(padding.unsqueeze(2), -1),
        }
    if kind == "clip":
        vision = config.vision_config
        return {
            **text(9),
            "pixel_values": torch.randn(batch, vision.num_channels, vision.image_size, vision.image_size),
        }
    if kind == "packed":
        return as_taken(config.model_type, packed_inputs(seed, batch))
    if kind == "counted":
        return counted_batch(counted_rows(config.model_type, seed, batch), config.model_type)
    if kind == "frames":
        config = getattr(config, "encoder_config", config)
        size = getattr(config, "num_mel_bins", None) or config.feature_projection_input_dim
        return {"input_features": torch.randn(batch, 24, size)}
    if kind == "audio_values":
        return {"input_values": torch.randn(batch, 800)}
    if kind == "audio_features":
        frames = 2 * config.max_source_positions
        ids = text(6, padded=False, prefix="decoder_")
        return {"input_features": torch.randn(batch, config.num_mel_bins, frames), **ids}
    raise ValueError(f"kind of inputs {kind!r}")


def counted_rows(model_type: str, seed: int, count: int) -> list[dict[str, Any]]:
    """Texts after one image or two."""
    rows = []
    for number in range(seed, seed + count):
        images = 1 + number % 2
        marks = (
            [MARKS["image_token_id"]] * images * (4 if model_type in ("llava", "mistral3", "ovis2") else 1)
        )
        words = torch.randint(4, 60, (9 - number % 3,)).tolist()
        rows.append({"input_ids": [*marks, *words], "pixel_values": torch.randn(images, 3, 8, 8)})
    return rows


def counted_batch(rows: list[dict[str, Any]], model_type: str) -> dict[str, Tensor]:
    """As the processors of these models do: images of all rows one after the other, or by row, with empty ones."""
    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([row["input_ids"] + [1] * (longest - len(row["input_ids"])) for row in rows])
    pixels = torch.nn.utils.rnn.pad_sequence([row["pixel_values"] for row in rows], batch_first=True)
    batch = {"input_ids": ids, "attention_mask": (ids != 1).long(), "pixel_values": pixels}
    if model_type in ("idefics3", "smolvlm"):
        return {**batch, "pixel_attention_mask": pixels.any(2).long()}
    batch["pixel_values"] = torch.cat([row["pixel_values"] for row in rows])
    count = len(batch["pixel_values"])
    if model_type == "lfm2_vl":  # patches, two of six places are padding
        patches = (
            batch["pixel_values"]
            .unfold(2, 4, 4)
            .unfold(3, 4, 4)
            .permute(0, 2, 3, 4, 5, 1)
            .reshape(count, 4, 48)
        )
        mask = (torch.arange(6) < 4).long().expand(count, -1)
        shapes = torch.full((count, 2), 2)
        padded = torch.nn.functional.pad(patches, (0, 0, 0, 2))
        return {**batch, "pixel_values": padded, "pixel_attention_mask": mask, "spatial_shapes": shapes}
    sizes = {"image_sizes": torch.tensor([[8, 8]] * count)}
    return {**batch, **(sizes if model_type == "mistral3" else {})}


def packed_inputs(seed: int, batch: int) -> dict[str, Tensor]:
    """Texts around an image each, of several sizes. Patches come first, so that no order of inputs is taken for granted."""
    numbers = range(seed, seed + batch)
    grids = torch.tensor([[1, 2 + 2 * (number % 2), 4 - 2 * (number % 3 // 2)] for number in numbers])
    patches = grids.prod(1)
    texts = []
    for number, size in zip(numbers, patches, strict=True):
        words = torch.randint(4, 60, (9 - number % 3,)).tolist()
        texts.append([*words[:3], 72, *[MARKS["image_token_id"]] * (int(size) // 4), 73, *words[3:]])
    longest = max(map(len, texts))
    ids = torch.tensor([text + [1] * (longest - len(text)) for text in texts])
    return {
        "pixel_values": torch.randn(int(patches.sum()), 96),
        "image_grid_thw": grids,
        "input_ids": ids,
        "attention_mask": (ids != 1).long(),
        "mm_token_type_ids": (ids == MARKS["image_token_id"]).long(),
    }


@torch.no_grad()
def outputs_of(model: PreTrainedModel, kind: str) -> Tensor:
    """All float outputs of a model on one batch, flattened, with padded positions left out."""
    inputs = inputs_for(model, kind)
    masks = [value.bool() for key, value in inputs.items() if key.endswith("attention_mask")]
    torch.default_generator.manual_seed(0)  # of models that draw random numbers also in evaluation
    outputs = model.eval()(**inputs)
    parts = []
    for value in outputs.to_tuple():
        if isinstance(value, Tensor) and value.is_floating_point():
            mask = next((m for m in masks if m.shape == value.shape[:2]), None)
            parts.append((value if mask is None else value[mask]).flatten())
    return torch.cat(parts)
