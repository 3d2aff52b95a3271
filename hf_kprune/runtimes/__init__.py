"""Models are written for other runtimes: ONNX Runtime, OpenVINO and llama.cpp."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedModel

from ..checkpoint.loading import load_model, load_tokenizer
from ..errors import ArgumentError, KPruneError
from ..files.destination import check_destination
from ..progress import quiet
from ..structure.facts import in_eval_mode
from .gguf import write_gguf
from .graphs import write_onnx, write_openvino


__all__ = ["FORMATS", "export"]

FORMATS: dict[str, Callable[[PreTrainedModel, Path], None]] = {
    "onnx": write_onnx,
    "openvino": write_openvino,
    "gguf": write_gguf,
}
"""What writes a model into a folder, and verifies what it wrote, by the name of the format."""


def export(model: PreTrainedModel | str, output_dir: str, format: str = "onnx") -> str:
    """Write a model, pruned or dense, for another runtime, and return where.

    What was written is read back and compared before it is there: ONNX Runtime and OpenVINO run it on inputs
    of another size than those that it was traced with; the sizes in a GGUF are those of its tensors.

    Args:
        model: A model, or the directory or the name on the Hub of one; with it, its tokenizer is written.
        output_dir: Directory to write to, which is empty or not there yet.
        format: `"onnx"`, `"openvino"` or `"gguf"`. docs/export.md says what each takes and gives.

    Raises:
        ArgumentError: If the format takes a package that is not there, if it cannot hold the model, or if
            `output_dir` cannot be written.
        CheckpointError: If what was written computes something else.

    Example:

        >>> import hf_kprune
        >>> hf_kprune.export("examples/sst2-tiny", "exported", format="safetensors")
        Traceback (most recent call last):
        hf_kprune.errors.ArgumentError: format is 'safetensors', expected one of onnx, openvino, gguf
    """
    if format not in FORMATS:
        raise ArgumentError(f"format is {format!r}, expected one of {', '.join(FORMATS)}")
    source = model if isinstance(model, str) else model.config.name_or_path
    target = Path(check_destination(output_dir, read_from=[source]))
    tokenizer = load_tokenizer(model) if isinstance(model, str) else None
    model = load_model(model) if isinstance(model, str) else model
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name[:32]}."))
    try:
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        with quiet(), in_eval_mode(model):
            FORMATS[format](model, folder)
        os.chmod(folder, 0o755)
        os.replace(folder, target)
    except OSError as error:
        if isinstance(error, KPruneError):
            raise
        raise ArgumentError(f"cannot write to {output_dir!r}: {error.strerror}; name another") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return str(target)
