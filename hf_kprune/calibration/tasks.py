"""What the head on top of a model is for, and what follows from that: one table, `TASKS`.

A further head of Transformers is one more entry.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import ArgumentError
from ..structure.configs import text_config
from ..structure.coverage import family_of, parts_above
from ..structure.facts import PROBLEMS, check_problem_type, classes_in, max_positions, vocabulary
from ..structure.sublayers import Sublayer
from . import losses
from .knowledge import CLASS, NORMAL, TOKEN, YES_OR_NO, YES_OR_NO_OF_TOKENS, Draw, Knowledge


@dataclass(frozen=True)
class Task:
    """What a head is for.

    Args:
        name: What the report calls it.
        tables: Names of the auto-model tables of Transformers that list the classes with such a head.
        loss: Temperature, outputs of student and teacher, valid tokens (B, T) -> (B,). See losses.py.
        draws: How each output that the loss reads is drawn, see knowledge.py.
        per_token: Whether the loss is a mean over tokens of divergences of their `logits`.
        figures: Names of the figures that `evaluate()` gives beside the loss, see metrics.py.
        variant: The `config.problem_type`, or the `pooling`, that the entry is for; `""` if it is for all.
        modules: Names of modules of which the model must have one; any model will do if there are none.
        targets: Whether an encoder-decoder must be told what its decoder reads, or else both read the same.
        choices: Whether a row holds several sequences, so that example inputs are (B, choices, T).
    """

    name: str
    tables: tuple[str, ...] = ()
    loss: Callable[[float, Any, Any, Tensor], Tensor] | None = None
    draws: Mapping[str, Draw] = field(default_factory=dict)
    per_token: bool = False
    figures: tuple[str, ...] = ()
    variant: str = ""
    modules: frozenset[str] = frozenset()
    targets: bool = True
    choices: bool = False


def _sequences(name: str, problem: str, loss: Any, draw: Draw, *figures: str) -> Task:
    """The entry for heads on whole sequences that answer one kind of problem."""
    tables = tuple(f"MODEL_FOR_{kind}_CLASSIFICATION" for kind in ("SEQUENCE", "IMAGE", "VIDEO", "AUDIO"))
    return Task(name, tables, loss, {"logits": draw}, figures=figures, variant=problem, targets=False)


def _choice(name: str, table: str, choices: bool = False) -> Task:
    return Task(name, (table,), losses.of_classes, {"logits": CLASS}, figures=("accuracy",), choices=choices)


def _tokens(name: str, table: str, *figures: str, targets: bool = True) -> Task:
    return Task(name, (table,), losses.of_tokens, {"logits": CLASS}, True, figures, targets=targets)


EMBEDDINGS = dict.fromkeys(("last_hidden_state", "pooler_output", "text_embeds", "image_embeds"), NORMAL)

ONE_TOWER = Task(
    "embedding of one tower",
    (),
    losses.of_towers,
    EMBEDDINGS,
    modules=frozenset({"text_projection", "visual_projection"}),
)
"""CLIP's tower of text or of images with its projection, which no table lists."""

OTHER = Task("other")
"""A head that is none of these: the caller has a loss for it, or hidden states are compared."""

EMBEDDING_TABLES = ("MODEL_FOR_TEXT_ENCODING", "MODEL")

CLASS_FIGURES = ("accuracy", "f1", "matthews")

TASKS = (
    _sequences("regression", "regression", losses.of_numbers, NORMAL, "pearson", "spearman"),
    _sequences(
        "multi-label classification",
        "multi_label_classification",
        losses.of_labels,
        YES_OR_NO,
        "accuracy",
        "f1",
    ),
    _sequences("classification", "single_label_classification", losses.of_classes, CLASS, *CLASS_FIGURES),
    Task(
        "extractive question answering",
        ("MODEL_FOR_QUESTION_ANSWERING",),
        losses.of_spans,
        {"start_logits": TOKEN, "end_logits": TOKEN},
        figures=("exact_match", "f1"),
        targets=False,
    ),
    _tokens("token classification", "MODEL_FOR_TOKEN_CLASSIFICATION", *CLASS_FIGURES, targets=False),
    _tokens("masked language model", "MODEL_FOR_MASKED_LM"),
    _tokens("causal language model", "MODEL_FOR_CAUSAL_LM", "perplexity"),
    _tokens("sequence-to-sequence language model", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM"),
    _tokens("speech-to-text model", "MODEL_FOR_SPEECH_SEQ_2_SEQ"),
    _tokens("speech recognition by CTC", "MODEL_FOR_CTC"),
    _tokens("audio frame classification", "MODEL_FOR_AUDIO_FRAME_CLASSIFICATION", targets=False),
    _choice("multiple choice", "MODEL_FOR_MULTIPLE_CHOICE", choices=True),
    _choice("next sentence prediction", "MODEL_FOR_NEXT_SENTENCE_PREDICTION"),
    _tokens("language model on images and text", "MODEL_FOR_IMAGE_TEXT_TO_TEXT"),
    Task(
        "pretraining heads",
        ("MODEL_FOR_PRETRAINING",),
        losses.of_pretraining,
        {
            "prediction_logits": CLASS,
            "seq_relationship_logits": CLASS,
            "logits": YES_OR_NO_OF_TOKENS,
        },
        modules=frozenset({"seq_relationship", "discriminator_predictions"}),
    ),
    Task(
        "embeddings of text and image",
        ("MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION",),
        losses.of_towers,
        EMBEDDINGS,
    ),
    *(
        Task(
            f"embedding ({pooling})",
            EMBEDDING_TABLES,
            partial(losses.of_embeddings, pooling=pooling),
            EMBEDDINGS,
            variant=pooling,
        )
        for pooling in ("mean", "cls", "pooler", "none")
    ),
)
"""A class that several tables list has the task of the first."""


def task_of(model: PreTrainedModel, problem: str | None = None, pooling: str = "mean") -> Task:
    """The task of `model`, by the table that lists its class, or one that this derives from; `OTHER` if none.

    Args:
        model: Any.
        problem: What a sequence head answers. None: what `problem_type` or `num_labels` of its config say.
        pooling: How a base model without a head makes an embedding, see `losses.of_embeddings`.
    """
    problem = problem or _stated_problem(model.config)
    modules = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    variants = [task for task in TASKS if task.variant in ("", problem, pooling)]
    fitting = [task for task in variants if not task.modules or task.modules & modules]
    for cls in type(model).__mro__:
        for task in fitting:
            if any(cls.__name__ in classes_in(table) for table in task.tables):
                return task
    return ONE_TOWER if ONE_TOWER.modules & modules else OTHER


def _stated_problem(config: object) -> str:
    """What a sequence head answers by its config alone."""
    problem = getattr(config, "problem_type", None)
    if problem in PROBLEMS:
        return str(problem)
    return "regression" if getattr(config, "num_labels", None) == 1 else "single_label_classification"


def problem_type(config: Any, label: Any = None) -> str:
    """What a sequence head answers: one of `PROBLEMS` (structure/facts.py).

    Args:
        config: It has `num_labels` and, if it says what these are, `problem_type`.
        label: The label of one row of the data, which tells it too: a class, or a list of yes or no, or of
            numbers. None: there is none.

    Raises:
        ArgumentError: If the config contradicts itself, so that there would be nothing to preserve.
    """
    check_problem_type(config)
    problem, count = _stated_problem(config), config.num_labels
    if config.problem_type is not None or count == 1:
        return problem
    values = np.ravel(label).tolist() if hasattr(label, "__len__") and not isinstance(label, str) else []
    names = bool(values) and all(isinstance(value, str) for value in values)
    if len(values) == count or names:
        likely = "multi_label_classification" if names or set(values) <= {0, 1} else "regression"
        warnings.warn(
            f"config.problem_type is missing, and the data have labels such as {str(values[:6]):.80}: the "
            f"{count} labels are compared as {likely}; set model.config.problem_type to say it",
            stacklevel=2,
        )
        return likely
    if label is None and count > 2:
        warnings.warn(
            f"config.problem_type is missing: the {count} labels are compared as classes of which one is "
            "right; if several may be, set model.config.problem_type = 'multi_label_classification', or "
            "'regression' if they are numbers",
            stacklevel=2,
        )
    return problem


def knowledge_loss(
    model: PreTrainedModel,
    temperature: float,
    pooling: str,
    label: object = None,
    sublayers: Sequence[Sublayer] = (),
) -> Knowledge:
    """The knowledge loss for the head of `model`, or, if none is known, for what its layers give to it.

    Args:
        model: A model of one of the `AutoModelFor...` tables of transformers, or a subclass of one.
        temperature: Temperature of the softmax, gamma in the paper.
        pooling: How a base model without a head makes an embedding, see `losses.of_embeddings`.
        label: The label of one row of the data, if there is one, see `problem_type`.
        sublayers: Those that are pruned.

    Raises:
        ArgumentError: If the model has no pooler to go by, or its config contradicts itself.
    """
    if pooling == "pooler" and getattr(model.base_model, "pooler", None) is None:
        raise ArgumentError(
            f"pooling is 'pooler', which {type(model).__name__} lacks here; expected mean, cls or none"
        )
    task = task_of(model, pooling=pooling)
    if task.variant in PROBLEMS:
        task = task_of(model, problem_type(model.config, label), pooling)
    if task.loss is None or (task.tables == EMBEDDING_TABLES and parts_above(model)):
        return knowledge_of_hidden_states(model, temperature, sublayers)
    return Knowledge(task.name, partial(task.loss, temperature), temperature, task.draws, task.per_token)


def knowledge_of_hidden_states(
    model: PreTrainedModel, temperature: float, sublayers: Sequence[Sublayer]
) -> Knowledge:
    """The distance of hidden states above the stacks that no other one reads, with a warning."""
    stacks = {s.stack_name for s in sublayers} - {s.reads for s in sublayers if s.reads != s.stack_name}
    names = list(dict.fromkeys(s.stack_name for s in sublayers if s.stack_name in stacks))
    kind, above = type(model).__name__, ", ".join(names)
    headless = model.base_model is model and "For" not in kind and not parts_above(model)
    warnings.warn(
        (
            f"{kind} has no head, so what is preserved are the hidden states above {above}; to preserve what "
            "is made of them"
            if headless
            else f"no knowledge loss is known for the head of {kind}, so what is preserved are the hidden "
            f"states above {above}, whatever the head makes of them; to preserve what it answers"
        )
        + ", pass compute_loss=(student_outputs, teacher_outputs, valid_tokens) -> tensor of one loss per "
        "sequence",
        stacklevel=2,
    )
    kinds = dict.fromkeys(names, NORMAL)
    return Knowledge("hidden states", losses.of_hidden_states, temperature, kinds, of_hidden_states=True)


def needs_targets(model: PreTrainedModel) -> bool:
    """Whether `model` has a decoder that must be told what to read: `labels` or `decoder_input_ids`."""
    if not getattr(model.config, "is_encoder_decoder", False):
        return False
    task = task_of(model)
    # a base model may give its decoder the encoder's tokens, shifted
    shifts = "MODEL" in task.tables and any(stack.shifts for stack in family_of(model) or ())
    return task.targets and not shifts and "decoder_input_ids" in inspect.signature(model.forward).parameters


def text_inputs(model: PreTrainedModel, batch_size: int, length: int) -> dict[str, Tensor]:
    """Random token ids, (batch_size, length), and as many for a decoder that must be told what to read.

    The last one is the end-of-sequence token, if there is one; there are no other special ones and no
    padding. Of a model for multiple choice each row has one choice.

    Raises:
        ArgumentError: If the model does not run on token ids alone, or not on so many.
    """
    accepted, name = inspect.signature(model.forward).parameters, type(model).__name__
    other = accepted.keys() & {"pixel_values", "input_values", "input_features"}
    if "input_ids" not in accepted or other:
        raise ArgumentError(
            f"the inputs of {name} cannot be made up, it takes {', '.join(sorted(other) or accepted)}; pass "
            "inputs, such as a batch of the calibration data"
        )
    config = text_config(model.config).to_dict()
    ids_of = {key: ids for key, ids in config.items() if key.endswith("_token_id") and ids is not None}
    special = {key: ids if isinstance(ids, list) else [ids] for key, ids in ids_of.items()}
    readers = {"": model, **({"decoder_": model.get_decoder()} if needs_targets(model) else {})}
    generator, inputs = torch.Generator().manual_seed(0), {}
    for prefix, reader in readers.items():
        limit = max_positions(reader) if isinstance(reader, PreTrainedModel) else None
        if batch_size < 1 or not 1 <= length <= (limit or length):
            raise ArgumentError(
                f"asked for inputs of {batch_size} x {length} tokens, expected at least 1 x 1"
                + (f", and {name} takes at most {limit} tokens" if limit else "")
            )
        words = set(range(vocabulary(model, reader) or 0))
        plain = torch.tensor(sorted(words.difference(*special.values())))
        ids = plain[torch.randint(len(plain), (batch_size, length), generator=generator)]
        for end in words.intersection(special.get("eos_token_id", [])[:1]):
            ids[:, -1] = end
        inputs[f"{prefix}input_ids"] = ids
        if f"{prefix}attention_mask" in accepted:
            inputs[f"{prefix}attention_mask"] = torch.ones_like(ids)
    choices = task_of(model).choices
    return {key: (value.unsqueeze(1) if choices else value).to(model.device) for key, value in inputs.items()}
