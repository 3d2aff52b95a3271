"""Labels of evaluation data as the loss of a model takes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from ..calibration.tasks import task_of
from ..errors import ArgumentError


def label_ids(labels: Sequence[object], model: PreTrainedModel) -> list[Any]:
    """Labels as the loss of `model` takes them. Raises `ArgumentError` for those that it has no class for."""
    config = model.config
    if task_of(model).choices:
        return list(labels)
    if config.problem_type in ("regression", "multi_label_classification") or config.num_labels == 1:
        return [torch.tensor(label, dtype=torch.float32).tolist() for label in labels]
    ids = [config.label2id.get(label) if isinstance(label, str) else label for label in labels]
    wrong = {str(label) for label, i in zip(labels, ids, strict=True) if i not in range(config.num_labels)}
    if wrong:
        known = ", ".join(map(str, config.label2id))
        raise ArgumentError(
            f"the evaluation data have the labels {sorted(wrong)[:5]}, the model {known}, or their numbers"
        )
    return ids
