"""Tiny random models of every family that hf_kprune describes, and inputs for them. Key: `model_type`, or `type:variant`."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel


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
ENCODER: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "intermediate_size": 12,
    "num_hidden_layers": 3,
    "max_position_embeddings": 40,
    "pad_token_id": 1,
}

ZOO: dict[str, tuple[str, dict[str, Any], str]] = {
    # name: (class, config, kind of inputs)
    # decoders
    "llama": ("LlamaForCausalLM", DECODER, "text"),
    # encoders, encoder-decoders, vision, speech
    "bert": ("BertForSequenceClassification", ENCODER, "text"),
}


def make(name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A tiny random model whose every parameter, biases and norms too, is away from its initial value."""
    class_name, config, _ = ZOO[name]
    torch.manual_seed(seed)
    model_class = getattr(transformers, class_name)
    model = model_class(AutoConfig.for_model(name.split(":")[0], **config)).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
        for table in (m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding) and m.padding_idx is not None):
            table[model.config.get_text_config().pad_token_id or 0] = 0
    return model


def inputs_for(model: PreTrainedModel, kind: str, seed: int = 5, batch: int = 4) -> dict[str, Tensor]:
    """Inputs of `batch` samples, of different lengths where there is padding.

    Kinds: text, unpadded (text without padding), seq2seq, image, audio_values, audio_features, clip.
    """
    torch.manual_seed(seed)

    def text(length: int, padded: bool = True, prefix: str = "") -> dict[str, Tensor]:
        ids = torch.randint(4, 60, (batch, length))
        mask = torch.ones_like(ids)
        for row in range(batch if padded else 0):
            mask[row, length - row % 3 :] = 0
        return {f"{prefix}input_ids": ids.masked_fill(mask == 0, 1), f"{prefix}attention_mask": mask}

    config: Any = model.config
    if kind in ("text", "unpadded"):
        return text(9, kind == "text")
    if kind == "seq2seq":
        return {**text(9), **text(6, prefix="decoder_")}
    if kind == "image":
        return {"pixel_values": torch.randn(batch, config.num_channels, config.image_size, config.image_size)}
    if kind == "clip":
        vision = config.vision_config
        return {**text(9), "pixel_values": torch.randn(batch, vision.num_channels, vision.image_size, vision.image_size)}
    if kind == "audio_values":
        return {"input_values": torch.randn(batch, 800)}
    if kind == "audio_features":
        frames = 2 * config.max_source_positions
        ids = text(6, padded=False, prefix="decoder_")
        return {"input_features": torch.randn(batch, config.num_mel_bins, frames), **ids}
    raise ValueError(f"kind of inputs {kind!r}")


@torch.no_grad()
def outputs_of(model: PreTrainedModel, kind: str) -> Tensor:
    """All float outputs of a model on one batch, flattened, with padded positions left out."""
    inputs = inputs_for(model, kind)
    masks = [value.bool() for key, value in inputs.items() if key.endswith("attention_mask")]
    torch.manual_seed(0)  # of models that draw random numbers also in evaluation
    outputs = model.eval()(**inputs)
    parts = []
    for value in outputs.to_tuple():
        if isinstance(value, Tensor) and value.is_floating_point():
            mask = next((m for m in masks if m.shape == value.shape[:2]), None)
            parts.append((value if mask is None else value[mask]).flatten())
    return torch.cat(parts)
