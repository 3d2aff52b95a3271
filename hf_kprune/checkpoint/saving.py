"""Saving that leaves either nothing or a whole checkpoint, which was loaded again and compared before it
counts.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from transformers import PreTrainedModel

from ..errors import CheckpointError
from ..files.contents import not_written
from ..files.exchange import aside, put
from ..progress import quiet
from .exporters import EXPORTERS, form_of


def save_atomically(
    model: PreTrainedModel,
    output_dir: str,
    max_shard_size: str,
    add: Callable[[str], None],
    overwrite: bool = True,
) -> None:
    """Write `model` near `output_dir`, reload it, compare every tensor, and only then put it in place.

    A kill at any moment leaves `output_dir` absent (or as it was), or whole, or such that the next save or
    load completes it; what is left behind then is one folder whose name begins with `.` and ends with `.tmp`,
    which the next save to the same place removes. files/exchange.py has the whole of it.

    Args:
        model: A pruned or plain model.
        output_dir: Made if need be. Files in it that are no checkpoint's stay.
        max_shard_size: As in `save_pretrained`.
        add: Called with the folder to write everything else into it (tokenizer, report, model card).
        overwrite: Whether a checkpoint that is there is replaced.

    Raises:
        ArgumentError: If something is there that must not be replaced.
        CheckpointError: If it cannot be written, or does not load back to the same tensors; nothing is left
            behind then.
    """
    target, exporter = Path(output_dir).resolve(), EXPORTERS[form_of(model)]
    try:
        with quiet(), aside(target) as new:
            exporter.write(model, str(new), max_shard_size)
            add(str(new))
            exporter.verify(model, str(new))
            put(new, target, overwrite)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            not_written(target, error, sum(p.nbytes for p in model.parameters()))
        ) from error
