"""Which predictive knowledge a model has, by the head on top of it: `knowledge_loss(model)` chooses.

A loss compares the outputs of student and teacher and gives one number per sequence, so nothing depends on how the
sequences are batched. Padding never counts. Sequence heads give one divergence; token heads the mean over their tokens.

The Fisher information needs gradients where student and teacher are the same, and there the loss has none. It has one
against a draw from what the teacher predicts, and over many draws the products of these gradients are its curvature, up to
a factor that is the same for all sublayers: the mean over the n tokens of a row gives 1/n of it, so that a row counts by its
gradients, not by its length.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from ..errors import ArgumentError, UnsupportedModelError
from ..methods.knowledge import bernoulli_kl_divergence, kl_divergence, mean_over_tokens, squared_error
from ..structure.facts import check_problem_type


KnowledgeLoss = Callable[[Any, Any, Tensor], Tensor]
"""(student outputs, teacher outputs, valid tokens (B, T)) -> one loss per sequence, (B,)."""


class Draws:
    """Random numbers that belong to rows and their tokens, whatever batch they are in.

    Args:
        seed: Of all draws.
        rows: Number of each row among all rows. A row may be several sequences (choices).
        valid: Tokens of the sequences that are not padding, (B, T).
    """

    def __init__(self, seed: int, rows: Sequence[int], valid: Tensor):
        self.generators = [np.random.default_rng([seed, row]) for row in rows]
        self.valid = valid

    def uniform(self, *shape: int) -> Tensor:
        """Numbers in [0, 1) for each sequence, (B, ...)."""
        return self._made(shape, lambda generator, size: generator.random(size))

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers for each sequence, (B, ...)."""
        return self._made(shape, lambda generator, size: generator.standard_normal(size))

    def _made(
        self, shape: tuple[int, ...], draw: Callable[[np.random.Generator, tuple[int, ...]], Any]
    ) -> Tensor:
        of = [generator for generator in self.generators for _ in range(shape[0] // len(self.generators))]
        return torch.tensor(
            np.stack([draw(g, shape[1:]) for g in of]), dtype=torch.float32, device=self.valid.device
        )

    def uniform_of_tokens(self) -> Tensor:
        """Numbers in [0, 1) for each token that is not padding, (B, T)."""
        made = torch.zeros(self.valid.shape)
        share = len(made) // len(self.generators)
        for i, valid in enumerate(self.valid.cpu()):
            made[i, valid] = torch.from_numpy(self.generators[i // share].random(int(valid.sum()))).float()
        return made.to(self.valid.device)


FAR = 1e4
"""Logit of what was drawn, the others' being 0: a certainty at every temperature in use."""

NUDGE = 1e-2
"""Standard deviation of the normal draws: small, for losses that normalise what they compare."""


def drawn_class(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """Logits (..., K) of one class, drawn from softmax(logits / T) by numbers (...) in [0, 1)."""
    below = (logits / temperature).softmax(-1).cumsum(-1) <= uniform.unsqueeze(-1)
    drawn = below.sum(-1, keepdim=True).clamp(max=logits.shape[-1] - 1)
    return torch.zeros_like(logits).scatter_(-1, drawn, FAR)


@dataclass(frozen=True)
class Knowledge:
    """A knowledge loss, and how to draw from what a teacher predicts.

    Args:
        name: For the report.
        loss: The loss.
        temperature: Of the softmax.
        kinds: For each output that the loss reads, how it is drawn: `"class"` out of the last dimension, of each token if
            there are three, `"token"` one out of all tokens, `"yes or no"` each number by itself, `"token: yes or no"` one for
            each token, or `"normal"`, about the teacher's, the same for all tokens. None: all outputs, normal.
        per_token: Whether the loss is a mean over tokens of divergences of their `logits`, so that it may be taken in parts.
    """

    name: str
    loss: KnowledgeLoss
    temperature: float
    kinds: Mapping[str, str] | None
    per_token: bool = False

    def __call__(self, student: Any, teacher: Any, valid: Tensor) -> Tensor:
        return self.loss(student, teacher, valid)

    def noise(self, outputs: Any, draws: Draws) -> dict[str, Tensor]:
        """The random numbers that `draw` takes for these outputs."""
        made = {}
        for key, kind in self.kinds_in(outputs).items():
            shape = outputs[key].shape
            if kind == "normal":
                made[key] = draws.normal(shape[0], *shape[1:][-1:]).view(
                    shape[0], *[1] * (len(shape) - 2), *shape[1:][-1:]
                )
            elif kind == "token: yes or no" or (kind == "class" and len(shape) == 3):
                made[key] = draws.uniform_of_tokens()
            else:
                made[key] = draws.uniform(*(shape if kind == "yes or no" else shape[:1]))
        return made

    def draw(self, outputs: Any, noise: Mapping[str, Tensor], valid: Tensor) -> Any:
        """Outputs drawn from what a model with these outputs predicts."""
        drawn = copy.copy(outputs)
        for key, kind in self.kinds_in(outputs).items():
            value = outputs[key].detach()
            if kind == "normal":
                drawn[key] = value + NUDGE * noise[key]
            elif kind.endswith("yes or no"):
                drawn[key] = FAR * (
                    2 * (noise[key] < torch.sigmoid(value / self.temperature)).to(value.dtype) - 1
                )
            else:
                if kind == "token":
                    value = value.masked_fill(~valid, torch.finfo(value.dtype).min / 2)
                drawn[key] = drawn_class(value, noise[key], self.temperature)
        return drawn

    def kinds_in(self, outputs: Any) -> dict[str, str]:
        """How each of these outputs is drawn."""
        if self.kinds is None:
            return {
                k: "normal" for k, v in outputs.items() if isinstance(v, Tensor) and v.is_floating_point()
            }
        return {key: kind for key, kind in self.kinds.items() if outputs.get(key) is not None}


def problem_type(config: Any, label: Any = None) -> str:
    """What a sequence head answers: one of `PROBLEMS` (structure/facts.py).

    Args:
        config: With `num_labels` and, if it says what these are, `problem_type`.
        label: Of one row of the data, which tells it too: a class, or a list of yes or no, or of numbers. None: there is none.

    Raises:
        ArgumentError: If the config contradicts itself, so that there would be nothing to preserve.
    """
    check_problem_type(config)
    problem, count = config.problem_type, config.num_labels
    if problem is not None:
        return str(problem)
    if count == 1:
        return "regression"
    values = np.ravel(label).tolist() if hasattr(label, "__len__") and not isinstance(label, str) else []
    names = bool(values) and all(isinstance(value, str) for value in values)
    if len(values) == count or names:
        likely = "multi_label_classification" if names or set(values) <= {0, 1} else "regression"
        warnings.warn(
            f"config.problem_type is missing, and the data have labels such as {str(values[:6]):.80}: the {count} labels are "
            f"compared as {likely}; set model.config.problem_type to say it",
            stacklevel=2,
        )
        return likely
    if label is None and count > 2:
        warnings.warn(
            f"config.problem_type is missing: the {count} labels are compared as classes of which one is right; if several "
            "may be, set model.config.problem_type = 'multi_label_classification', or 'regression' if they are numbers",
            stacklevel=2,
        )
    return "single_label_classification"


def knowledge_loss(model: PreTrainedModel, temperature: float, pooling: str, label: Any = None) -> Knowledge:
    """The knowledge loss for the head of `model`.

    Args:
        model: A model of one of the `AutoModelFor...` tables of transformers, or a subclass of one.
        temperature: Of the softmax, gamma in the paper.
        pooling: How a base model without a head makes an embedding, see `embedding_loss`.
        label: Of one row of the data, if there is one, see `problem_type`.

    Raises:
        UnsupportedModelError: If the model has a head that none of the losses is for.
    """

    def divergence(student: Any, teacher: Any, valid: Tensor) -> Tensor:
        return kl_divergence(student.logits, teacher.logits, temperature)

    def multi_label(student: Any, teacher: Any, valid: Tensor) -> Tensor:
        return bernoulli_kl_divergence(student.logits, teacher.logits, temperature)

    def regression(student: Any, teacher: Any, valid: Tensor) -> Tensor:
        return squared_error(student.logits, teacher.logits)

    def per_token(student: Any, teacher: Any, valid: Tensor) -> Tensor:
        return mean_over_tokens(kl_divergence(student.logits, teacher.logits, temperature), valid)

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
            pair = kl_divergence(
                student.seq_relationship_logits, teacher.seq_relationship_logits, temperature
            )
            return mean_over_tokens(words, valid) + pair
        s, t = (
            outputs.logits.unsqueeze(-1) for outputs in (student, teacher)
        )  # ELECTRA: replaced or not, per token
        return mean_over_tokens(bernoulli_kl_divergence(s, t, temperature), valid)

    if pooling == "pooler" and getattr(model.base_model, "pooler", None) is None:
        raise ArgumentError(
            f"pooling is 'pooler', which {type(model).__name__} lacks here; expected mean, cls or none"
        )

    def embedding(student: Any, teacher: Any, valid: Tensor) -> Tensor:
        if "last_hidden_state" not in student and "text_embeds" in student:
            return towers(student, teacher, valid)
        return embedding_loss(student, teacher, valid, pooling)

    def towers(student: Any, teacher: Any, valid: Tensor) -> Tensor:
        pairs = [(student[key], teacher[key]) for key in ("text_embeds", "image_embeds") if key in student]
        distances = [(F.normalize(s, dim=-1) - F.normalize(t, dim=-1)).square().sum(-1) for s, t in pairs]
        return torch.stack(distances).sum(0)

    def made(name: str, loss: KnowledgeLoss, kinds: Mapping[str, str], per_token: bool = False) -> Knowledge:
        return Knowledge(name, loss, temperature, kinds, per_token)

    def sequence() -> Knowledge:
        problem = problem_type(model.config, label)
        if problem == "regression":
            return made("regression", regression, {"logits": "normal"})
        if problem == "multi_label_classification":
            return made("multi-label classification", multi_label, {"logits": "yes or no"})
        return choice("classification")

    def choice(name: str) -> Knowledge:
        return made(name, divergence, {"logits": "class"})

    def tokens(name: str) -> Knowledge:
        return made(name, per_token, {"logits": "class"}, per_token=True)

    def embeddings(name: str, loss: KnowledgeLoss = embedding) -> Knowledge:
        outputs = ("last_hidden_state", "pooler_output", "text_embeds", "image_embeds")
        return made(name, loss, dict.fromkeys(outputs, "normal"))

    words_and_pair = {
        "prediction_logits": "class",
        "seq_relationship_logits": "class",
        "logits": "token: yes or no",
    }
    spans = {"start_logits": "token", "end_logits": "token"}

    modules = [name.rsplit(".", 1)[-1] for name, _ in model.named_modules()]
    knows_pretraining = "seq_relationship" in modules or "discriminator_predictions" in modules
    heads: dict[str, Callable[[], Knowledge | None]] = {
        "MODEL_FOR_SEQUENCE_CLASSIFICATION": sequence,
        "MODEL_FOR_QUESTION_ANSWERING": lambda: made("extractive question answering", span, spans),
        "MODEL_FOR_TOKEN_CLASSIFICATION": lambda: tokens("token classification"),
        "MODEL_FOR_MASKED_LM": lambda: tokens("masked language model"),
        "MODEL_FOR_CAUSAL_LM": lambda: tokens("causal language model"),
        "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM": lambda: tokens("sequence-to-sequence language model"),
        "MODEL_FOR_SPEECH_SEQ_2_SEQ": lambda: tokens("speech-to-text model"),
        "MODEL_FOR_CTC": lambda: tokens("speech recognition by CTC"),
        "MODEL_FOR_AUDIO_FRAME_CLASSIFICATION": lambda: tokens("audio frame classification"),
        "MODEL_FOR_IMAGE_CLASSIFICATION": sequence,
        "MODEL_FOR_VIDEO_CLASSIFICATION": sequence,
        "MODEL_FOR_AUDIO_CLASSIFICATION": sequence,
        "MODEL_FOR_MULTIPLE_CHOICE": lambda: choice("multiple choice"),
        "MODEL_FOR_NEXT_SENTENCE_PREDICTION": lambda: choice("next sentence prediction"),
        "MODEL_FOR_IMAGE_TEXT_TO_TEXT": lambda: tokens("language model on images and text"),
        "MODEL_FOR_PRETRAINING": lambda: (
            made("pretraining heads", pretraining, words_and_pair) if knows_pretraining else None
        ),
        "MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION": lambda: embeddings(
            "embeddings of text and image", towers
        ),
        "MODEL_FOR_TEXT_ENCODING": lambda: embeddings(f"embedding ({pooling})"),
        "MODEL": lambda: embeddings(f"embedding ({pooling})"),
    }
    for cls in type(model).__mro__:
        for table, choose in heads.items():
            listed = getattr(modeling_auto, f"{table}_MAPPING_NAMES").values()
            if any(cls.__name__ in ((name,) if isinstance(name, str) else name) for name in listed):
                found = choose()
                if found is not None:
                    return found
    if {"text_projection", "visual_projection"} & set(modules):
        return embeddings("embedding of one tower", towers)
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
        return F.normalize(
            outputs.last_hidden_state[:, 0] if pooling == "cls" else outputs.pooler_output, dim=-1
        )

    return (embed(student) - embed(teacher)).square().sum(-1)


BY_PRODUCTS = {
    "encoder_last_hidden_state",
    "extract_features",
    "image_hidden_states",
    "last_hidden_state",
    "logits_per_image",
    "logits_per_text",
    "past_key_values",
    "pooler_output",
    "rope_deltas",
    "text_model_output",
    "vision_model_output",
}
"""Outputs of Transformers' classes that others follow from, or that follow from others: no answers of their own."""


def tensors_in(value: Any) -> list[Tensor]:
    """The floating tensors in an output: itself, or those of a tuple, such as the hidden states of all layers."""
    if isinstance(value, (tuple, list)):
        return [tensor for part in value for tensor in tensors_in(part)]
    return [value] if isinstance(value, Tensor) and value.is_floating_point() else []


def leaves_of(value: Any, generator: torch.Generator) -> Any:
    """The same output with noise, so that it is not the teacher's, as leaves of a graph."""
    if isinstance(value, (tuple, list)):
        return (
            type(value)(leaves_of(part, generator) for part in value)
            if type(value) in (tuple, list)
            else value
        )
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    noise = torch.randn(value.shape, generator=generator).to(value.device, value.dtype)
    return (value.detach() + noise).requires_grad_()


def check_loss(
    loss: Knowledge, outputs: Any, valid: Tensor, draws: Draws, samples: int
) -> tuple[list[str], list[str]]:
    """Try a knowledge loss on outputs of the teacher, and on the same with noise as the student's.

    Args:
        loss: The loss.
        outputs: Of the model for a few rows, in float32.
        valid: Their tokens that count, (B, T).
        draws: Of these rows.
        samples: Number of rows.

    Returns:
        Names of the outputs that the loss reads, and of those that it does not.

    Raises:
        ArgumentError: If it gives no finite, differentiable number for each row, or, chosen by the head, always the same.
    """
    name = "compute_loss" if loss.kinds is None else f"the knowledge loss ({loss.name})"
    expected = "a floating tensor of one differentiable number for each row"
    generator = torch.Generator().manual_seed(0)
    drawn = loss.draw(outputs, loss.noise(outputs, draws), valid)
    student = copy.copy(outputs)
    for key, value in outputs.items():
        student[key] = leaves_of(value, generator)
    with torch.enable_grad():
        losses = loss(student, drawn, valid)
    if not isinstance(losses, Tensor):
        raise ArgumentError(f"{name} returned a {type(losses).__name__}, expected {expected}, ({samples},)")
    if losses.shape != (samples,):
        raise ArgumentError(
            f"the knowledge loss gave {tuple(losses.shape)} for {samples} samples, expected one number each: {expected}"
        )
    if not losses.is_floating_point():
        raise ArgumentError(f"{name} returned numbers of {losses.dtype}, expected {expected}")
    if not losses.requires_grad:
        raise ArgumentError(
            f"{name} returned numbers without a graph, expected {expected}; leave out torch.no_grad(), detach(), item() and "
            "NumPy on the way from the student's outputs"
        )
    if not bool(torch.isfinite(losses).all()):
        raise ArgumentError(f"{name} returned {losses.tolist()}, expected finite numbers")
    by_key = {
        key: [leaf for leaf in tensors_in(value) if leaf.requires_grad] for key, value in student.items()
    }
    leaves = [leaf for group in by_key.values() for leaf in group]
    with torch.enable_grad():
        total = losses.sum()
    gradients = dict(zip(map(id, leaves), torch.autograd.grad(total, leaves, allow_unused=True), strict=True))
    read = [key for key, group in by_key.items() if any(gradients[id(leaf)] is not None for leaf in group)]
    slopes = [gradient for gradient in gradients.values() if gradient is not None]
    if not all(bool(torch.isfinite(slope).all()) for slope in slopes):
        raise ArgumentError(
            f"the gradient of {name} to {', '.join(read)} is NaN or infinite, expected finite numbers"
        )
    if loss.kinds is not None and bool(valid.any()) and not any(bool(slope.any()) for slope in slopes):
        raise ArgumentError(
            f"{name} does not depend on the outputs ({', '.join(read) or ', '.join(outputs)}), so nothing would be preserved; "
            "a softmax over a single label is such a case: pass compute_loss, or set model.config.num_labels and problem_type"
        )
    return read, [key for key in outputs if key not in read]
