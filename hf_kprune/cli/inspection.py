"""What `hf-kprune inspect` prints of a model: its sizes, layer by layer, and whether it can be pruned."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import cached_file

from ..calibration.embeddings import read_folder
from ..checkpoint.integrity import verify_weights
from ..checkpoint.lineage import earlier_cuts
from ..checkpoint.loading import check_place, model_class, reading
from ..errors import ArgumentError, UnsupportedArchitectureError
from ..history import in_words
from ..modeling_kprune import HOW_TO_LOAD, has, is_pruned
from ..report import HTML_NAME, JSON_NAME, PruningReport
from ..reports import HINT, Table, can_draw, to_markdown
from ..sizes import model_size
from ..structure.describe import describe
from ..structure.families import FAMILIES, REFUSED
from ..structure.sublayers import Sublayer, find_sublayers
from ..text import printable
from .inputs import trying
from .output import say


def inspect(name: str, verify: bool = False, batch: str | None = None) -> None:
    """Print what a model is, from its config alone.

    Args:
        name: A directory or a name on the Hub.
        verify: Whether the weight files are read too, and compared with what was saved.
        batch: A safetensors file with inputs by name, several samples each, on which a type that is not
            listed is detected and proved.
    """
    check_place(name)
    inputs = None if batch is None else read_batch(batch)
    with trying(f"load the model {name!r}"), reading(name):
        folder = read_folder(name)
        name = name if folder is None else folder.transformer
        config = AutoConfig.from_pretrained(name)
        with torch.device("meta"):  # shapes, no memory
            model = ((folder and folder.transformer_class(config)) or model_class(config))(config)
        model.to(config.dtype or torch.float32)
        report = saved_report(name)
    pruned, size, dtype = is_pruned(config), model_size(model), str(model.dtype).removeprefix("torch.")
    kind = printable(config.model_type)
    say(f"{printable(name)}: {type(model).__name__} ({kind}), {'pruned' if pruned else 'dense'}")
    say(f"parameters: {size.parameters:,} ({size.bytes / 1e6:,.1f} MB in {dtype})")
    say(
        f"without embeddings: {size.parameters_without_embeddings:,} "
        f"({size.bytes_without_embeddings / 1e6:,.1f} MB)"
    )
    try:
        sublayers, source = structure(model, inputs)
        say(f"family: {kind}, can be pruned; its structure is {source}\n")
        say(to_markdown([layers_of(sublayers)]))
        say("\n\n".join(projections_of(sublayers)))
    except UnsupportedArchitectureError as error:
        say(f"cannot be pruned{' again' if pruned else ''}: {error}")
    cuts = earlier_cuts(model)
    if cuts and (report is None or len(cuts) > 1):
        say(f"\n{in_words(cuts)}")
    if pruned:
        say(f"\n{HOW_TO_LOAD}")
    if report is not None:
        say(f"\n{report.to_markdown().splitlines()[0]}")
    if verify:
        with trying(f"read the weights of {name!r}"):
            say("\n" + "\n".join(verify_weights(name)))


def saved_report(name: str) -> PruningReport | None:
    """The report that lies beside a model, a directory or a name on the Hub; None if there is none."""
    path = cached_file(name, JSON_NAME, _raise_exceptions_for_missing_entries=False)
    return None if path is None else PruningReport.from_json(Path(path).read_text(encoding="utf-8"))


def write_page(name: str, file: str | None = None) -> None:
    """Write the report of a pruned model as a page.

    Args:
        name: A directory or a name on the Hub.
        file: Where to write it. None: beside the report, in the directory.

    Raises:
        ArgumentError: If there is no report, or if the page cannot be written.
    """
    with reading(name):
        report = saved_report(name)
    if report is None:
        raise ArgumentError(
            f"there is no {JSON_NAME} in {name!r}, expected a model that hf_kprune has pruned and saved"
        )
    if file is None and not os.path.isdir(name):
        raise ArgumentError(
            f"{name!r} is on the Hub; name a file to write: hf-kprune report {name} report.html"
        )
    place = Path(name, HTML_NAME) if file is None else Path(file)
    with trying(f"write the page {str(place)!r}"):
        place.write_text(report.to_html(), encoding="utf-8")
    say(f"The report is in {place}.")
    if not can_draw():
        say(f"It has no pictures: {HINT}")


def read_batch(file: str) -> dict[str, torch.Tensor]:
    """The tensors in a safetensors file, by name.

    Raises:
        ArgumentError: If there is no such file, or none that holds tensors.
    """
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise ArgumentError(
            f"--batch is {file!r}, expected a safetensors file of the model's inputs by name; write one by "
            f"safetensors.torch.save_file(dict(batch), {Path(file).name!r}): {error}"
        ) from error


def structure(
    model: PreTrainedModel, inputs: Mapping[str, torch.Tensor] | None
) -> tuple[list[Sublayer], str]:
    """The sublayers of a model without weights, and how they are known; of a type that is not listed by a run
    on these inputs.

    Raises `UnsupportedArchitectureError` if they are not.
    """
    config = model.config
    try:
        return find_sublayers(model), "listed, and proved by the tests"
    except UnsupportedArchitectureError:
        if config.model_type in {*FAMILIES, *REFUSED} or is_pruned(config):
            raise
    needed, free = 4 * sum(p.numel() for p in model.parameters()), psutil.virtual_memory().available
    if needed > free:
        raise UnsupportedArchitectureError(
            f"no family describes model_type {config.model_type!r}; to find out what its layers do it has to "
            f"run, which takes {needed / 1e9:,.1f} GB of memory, of which {free / 1e9:,.1f} are free. "
            "Describe one of them in ten lines with hf_kprune.register_family: docs/add_a_family.md"
        )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dense = type(model)(config).float()
        # so that no bias is zero, no norm one, and nothing scaled to next to nothing
        for parameter in dense.parameters():
            parameter.data += (0.1 if parameter.dim() == 1 else 0.02) * torch.randn_like(parameter)
    describe(dense, inputs)
    return find_sublayers(dense), "detected, and proved: cutting equals masking, sublayer by sublayer"


def layers_of(sublayers: Sequence[Sublayer]) -> Table:
    """What is left of each layer, and of how much."""
    names = {s.kind: s.unit.plural for s in sublayers} | {"cross_attention": "cross-attention heads"}
    kinds = list(dict.fromkeys(s.kind for s in sublayers))
    counts: dict[str, dict[str, tuple[str, str]]] = {}
    for s in sublayers:
        left = s.plan["kept"][s.index], s.plan["of"]
        counts.setdefault(f"{s.stack_name}.{s.index}", {})[s.kind] = str(left[0]), str(left[1])
    rows = [
        (layer, *(cell for kind in kinds for cell in units.get(kind, ("-", "-"))))
        for layer, units in counts.items()
    ]
    columns = "layer", *(title for kind in kinds for title in (names[kind], "of"))
    return Table(columns, rows, "l" + "rr" * len(kinds))


def projections_of(sublayers: Sequence[Sublayer]) -> list[str]:
    """The projections that the units of each stack are in."""
    lines = []
    for s in {(s.stack_name, s.block.output): s for s in sublayers}.values():
        inputs = ", ".join(path for path in s.block.inputs if has(s.layer, path))
        lines.append(f"{s.stack_name}, {s.kind}: {inputs} -> {s.block.output}")
    return lines
