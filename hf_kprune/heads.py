"""Which predictive knowledge a model has, by the head on top of it: `knowledge_loss(model)` chooses.

A loss compares the outputs of student and teacher and gives one number per sequence, so nothing depends on how the
sequences are batched. Padding never counts. Sequence heads give one divergence; token heads the mean over their tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from .errors import ArgumentError, UnsupportedModelError
from .knowledge import bernoulli_kl_divergence, kl_divergence, mean_over_tokens, squared_error


KnowledgeLoss = Callable[[Any, Any, Tensor], Tensor]
"""(student outputs, teacher outputs, valid tokens (B, T)) -> one loss per sequence, (B,)."""


@dataclass(frozen=True)
class PerToken:
    """Mean over the tokens of a sequence of the divergence of their logits. As a sum of tokens' it may be taken in parts."""

    temperature: float

    def __call__(self, student: Any, teacher: Any, valid: Tensor) -> Tensor:
        return mean_over_tokens(kl_divergence(student.logits, teacher.logits, self.temperature), valid)


def knowledge_loss(model: PreTrainedModel, temperature: float, pooling: str) -> tuple[str, KnowledgeLoss]:
    """The knowledge loss for the head of `model`, and its name for the report.

    Args:
        model: A model of one of the `AutoModelFor...` tables of transformers, or a subclass of one.
        temperature: Of the softmax, gamma in the paper.
        pooling: How a base model without a head makes an embedding, see `embedding_loss`.

    Raises:
        UnsupportedModelError: If the model has a head that none of the losses is for.
    """

    def divergence(student: Any, teacher: Any, valid: Tensor) -> Tensor:
        return kl_divergence(student.logits, teacher.logits, temperature)

    def multi_label(student: Any, teacher: Any, valid: Tensor) -> Tensor:
        return bernoulli_kl_divergence(student.logits, teacher.logits, temperature)

    def regression(student: Any, teacher: Any, valid: Tensor) -> Tensor:
        return squared_error(student.logits, teacher.logits)

    per_token = PerToken(temperature)

    def span(student: Any, teacher: Any, valid: Tensor) -> Tensor:
        def over_tokens(name: str) -> Tensor:
            # finite, and still so when divided by the temperature and shifted by the softmax
            lowest = min(temperature, 1) * torch.finfo(student[name].dtype).min / 2
            s, t = (outputs[name].masked_fill(~valid, lowest) for outputs in (student, teacher))
            return kl_divergence(s, t, temperature)

        return (over_tokens("start_logits") + over_tokens("end_logits")) / 2

    def pretraining(student: Any, teacher: Any, valid: Tensor) -> Tensor:
        if "seq_relationship_logits" in student:  # masked LM and next sentence, one head each
            words = kl_divergence(student.prediction_logits, teacher.prediction_logits, temperature)
            pair = kl_divergence(student.seq_relationship_logits, teacher.seq_relationship_logits, temperature)
            return mean_over_tokens(words, valid) + pair
        s, t = (outputs.logits.unsqueeze(-1) for outputs in (student, teacher))  # ELECTRA: replaced or not, per token
        return mean_over_tokens(bernoulli_kl_divergence(s, t, temperature), valid)

    if pooling == "pooler" and getattr(model.base_model, "pooler", None) is None:
        raise ArgumentError(f"pooling is 'pooler', which {type(model).__name__} lacks here; expected mean, cls or none")

    def embedding(student: Any, teacher: Any, valid: Tensor) -> Tensor:
        if "last_hidden_state" not in student and "text_embeds" in student:
            return towers(student, teacher, valid)
        return embedding_loss(student, teacher, valid, pooling)

    def towers(student: Any, teacher: Any, valid: Tensor) -> Tensor:
        pairs = [(student[key], teacher[key]) for key in ("text_embeds", "image_embeds") if key in student]
        distances = [(F.normalize(s, dim=-1) - F.normalize(t, dim=-1)).square().sum(-1) for s, t in pairs]
        return torch.stack(distances).sum(0)

    def sequence() -> tuple[str, KnowledgeLoss]:
        problem, labels = model.config.problem_type, model.config.num_labels
        if problem == "regression" or (problem is None and labels == 1):
            return "regression", regression
        if problem == "multi_label_classification":
            return "multi-label classification", multi_label
        return "classification", divergence

    modules = [name.rsplit(".", 1)[-1] for name, _ in model.named_modules()]
    knows_pretraining = "seq_relationship" in modules or "discriminator_predictions" in modules
    heads: dict[str, Callable[[], tuple[str, KnowledgeLoss] | None]] = {
        "MODEL_FOR_SEQUENCE_CLASSIFICATION": sequence,
        "MODEL_FOR_QUESTION_ANSWERING": lambda: ("extractive question answering", span),
        "MODEL_FOR_TOKEN_CLASSIFICATION": lambda: ("token classification", per_token),
        "MODEL_FOR_MASKED_LM": lambda: ("masked language model", per_token),
        "MODEL_FOR_CAUSAL_LM": lambda: ("causal language model", per_token),
        "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM": lambda: ("sequence-to-sequence language model", per_token),
        "MODEL_FOR_SPEECH_SEQ_2_SEQ": lambda: ("speech-to-text model", per_token),
        "MODEL_FOR_CTC": lambda: ("speech recognition by CTC", per_token),
        "MODEL_FOR_AUDIO_FRAME_CLASSIFICATION": lambda: ("audio frame classification", per_token),
        "MODEL_FOR_IMAGE_CLASSIFICATION": sequence,
        "MODEL_FOR_VIDEO_CLASSIFICATION": sequence,
        "MODEL_FOR_AUDIO_CLASSIFICATION": sequence,
        "MODEL_FOR_MULTIPLE_CHOICE": lambda: ("multiple choice", divergence),
        "MODEL_FOR_NEXT_SENTENCE_PREDICTION": lambda: ("next sentence prediction", divergence),
        "MODEL_FOR_IMAGE_TEXT_TO_TEXT": lambda: ("language model on images and text", per_token),
        "MODEL_FOR_PRETRAINING": lambda: ("pretraining heads", pretraining) if knows_pretraining else None,
        "MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION": lambda: ("embeddings of text and image", towers),
        "MODEL_FOR_TEXT_ENCODING": lambda: (f"embedding ({pooling})", embedding),
        "MODEL": lambda: (f"embedding ({pooling})", embedding),
    }
    for cls in type(model).__mro__:
        for table, choose in heads.items():
            listed = getattr(modeling_auto, f"{table}_MAPPING_NAMES").values()
            if any(cls.__name__ in ((name,) if isinstance(name, str) else name) for name in listed):
                found = choose()
                if found is not None:
                    return found
    if {"text_projection", "visual_projection"} & set(modules):
        return "embedding of one tower", towers
    raise UnsupportedModelError(
        f"no knowledge loss is known for the head of {type(model).__name__}; pass compute_loss=(student_outputs, "
        "teacher_outputs, valid_tokens) -> tensor of one loss per sequence"
    )


def embedding_loss(student: Any, teacher: Any, valid: Tensor, pooling: str) -> Tensor:
    """Squared distance between what a base model is used for, (B,).

    Args:
        student: Outputs with `last_hidden_state` (B, T, D) and, for `"pooler"`, `pooler_output` (B, D).
        teacher: The same.
        valid: Tokens that are not padding, (B, T).
        pooling: `"mean"` over tokens, `"cls"` the first token, `"pooler"` the model's own pooler, each normalised to
            length 1; `"none"` compares the hidden states themselves, as the mean over tokens.
    """
    if pooling == "none":
        return mean_over_tokens(squared_error(student.last_hidden_state, teacher.last_hidden_state), valid)

    def embed(outputs: Any) -> Tensor:
        if pooling == "mean":
            return F.normalize(mean_over_tokens(outputs.last_hidden_state, valid), dim=-1)
        return F.normalize(outputs.last_hidden_state[:, 0] if pooling == "cls" else outputs.pooler_output, dim=-1)

    return (embed(student) - embed(teacher)).square().sum(-1)
