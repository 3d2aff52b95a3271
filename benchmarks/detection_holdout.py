"""Detection on model types that were never looked at while it was written: proved, refused, or wrongly accepted.

    python benchmarks/detection_holdout.py            the table of docs/detection.md

The list was fixed before the first line of `hf_kprune/detect.py`: tiny configs, and how many attentions and FFNs a person
counts in each model. An acceptance is judged by what detection does not share: other data, other masks, these counts.
"""

from __future__ import annotations

from typing import Any


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
    "lilt": ("LiltModel", {**TEXT, "max_2d_position_embeddings": 64, "channel_shrink_ratio": 2}, "boxes", (4, 4)),
    "bros": ("BrosModel", TEXT, "corners", (2, 2)),
    "nystromformer": (
        "NystromformerModel",
        {**TEXT, "num_landmarks": 3, "segment_means_seq_len": 9, "conv_kernel_size": 3},
        "text",
        (2, 2),
    ),
    "luke": ("LukeModel", {**TEXT, "entity_vocab_size": 20, "entity_emb_size": 8}, "entities", (2, 2)),
    "canine": ("CanineModel", {**TEXT, "local_transformer_stride": 16, "num_hash_buckets": 64}, "characters", (4, 4)),
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
    "owlvit": ("OwlViTModel", {"text_config": TEXT, "vision_config": IMAGE, "projection_dim": 8}, "clip", (4, 4)),
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
