"""Models as graphs for ONNX Runtime and OpenVINO, by the exporters of Transformers."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from transformers import PreTrainedModel

from ..errors import ArgumentError, CheckpointError
from ..structure.facts import example_inputs
from ..structure.sublayers import find_sublayers
from ..structure.surroundings import exact_products


TOLERANCE = 1e-3
"""How far an output may be from the model's, relative to the largest one."""


EXACT: dict[str, Any] = {"device": "cpu", "config": {"INFERENCE_PRECISION_HINT": "f32"}}
"""How OpenVINO is to run what is compared: by default it computes in bfloat16 where the CPU has that."""


def write_onnx(model: PreTrainedModel, folder: Path) -> None:
    """Write a model as ONNX: one graph, or, of a language model, one for the prompt and one for each further
    token.
    """
    need("onnx", "onnx", "onnxscript", "onnxruntime")
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    write(model, folder, OnnxExporter(), OnnxConfig(dynamic=True))


def write_openvino(model: PreTrainedModel, folder: Path) -> None:
    """Write a model for OpenVINO, in graphs as for ONNX."""
    need("openvino", "openvino")
    from transformers.exporters.exporter_openvino import OpenVINOConfig, OpenVINOExporter

    write(model, folder, OpenVINOExporter(), OpenVINOConfig(dynamic=True), EXACT)


def need(format: str, *packages: str) -> None:
    """Raise `ArgumentError` if a format takes packages that are not there, or another Transformers."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise ArgumentError(f"format {format!r} takes more packages: pip install {' '.join(missing)}")
    try:
        from transformers.exporters.base import ExportedModel  # noqa: F401
    except ImportError as error:
        raise ArgumentError(
            f"format {format!r} takes the exporters of transformers 5.23: pip install -U transformers"
        ) from error


def write(
    model: PreTrainedModel, folder: Path, exporter: Any, config: Any, running: Mapping[str, Any] | None = None
) -> None:
    """Trace a model with inputs of any batch and length, write it, read it back and compare.

    Args:
        model: The model.
        folder: Where to.
        exporter: Of Transformers.
        config: Its options.
        running: Options of the runtime for what is compared.
    """
    from transformers.exporters.base import ExportedModel

    check_caches(model)
    inputs = {name: value for name, value in example_inputs(model).items() if name != "use_cache"}
    larger = {name: enlarged(value) for name, value in inputs.items()}
    generates = model.can_generate() and not model.config.is_encoder_decoder
    export = exporter.export_for_generation if generates else exporter.export
    with torch.no_grad():
        try:
            export(model, inputs, config=config).save_pretrained(folder)
            first = next(iter(ExportedModel.from_pretrained(folder, **(running or {})).runners.values()))
            if "position_ids" in first.metadata.kwargs:  # which generation passes
                places = torch.arange(larger["input_ids"].shape[1], device=model.device)
                larger["position_ids"] = places.expand_as(larger["input_ids"])
            outputs = first(**larger)
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
            raise CheckpointError(
                f"{type(exporter).__name__} of transformers cannot write {type(model).__name__} as it is, or "
                f"what it writes does not run ({shorten(str(error), 200)}). Take another format, or "
                "uniform=True"
            ) from error
        with exact_products():
            expected = model(**larger)
        compare(outputs, expected)


def check_caches(model: PreTrainedModel) -> None:
    """Raise `ArgumentError` if a language model has an attention without heads, for which a graph would have
    a cache without entries, which runtimes do not take."""
    emptied = [s.name for s in find_sublayers(model) if s.unit.has_heads and not s.num_units]
    if model.can_generate() and emptied:
        raise ArgumentError(
            f"{', '.join(emptied)} lost all heads, and a graph cannot hold a cache for none: prune with "
            "min_heads=1, or export as gguf"
        )


def enlarged(value: torch.Tensor) -> torch.Tensor:
    """An input of a larger batch and, where it is of tokens, of more of them."""
    value = torch.cat([value, value[:2]])
    return (
        torch.cat([value, value[:, :3]], dim=1)
        if value.dim() == 2 and not value.is_floating_point()
        else value
    )


def compare(outputs: Any, expected: Any) -> None:
    """Raise `CheckpointError` unless the first output is that of the model, up to rounding. Of an output that
    has the last token only, that is compared.
    """
    name = next(name for name, value in expected.items() if isinstance(value, torch.Tensor))
    got, wanted = torch.as_tensor(outputs[name]).cpu(), expected[name].cpu()
    if got.shape != wanted.shape and got.shape[1] == 1:
        wanted = wanted[:, -1:]
    error = (got - wanted).abs().max().item() if got.shape == wanted.shape else float("inf")
    if not error <= TOLERANCE * max(wanted.abs().max().item(), 1e-6):
        raise CheckpointError(f"what was exported gives other {name}: they are up to {error:.2g} apart")
