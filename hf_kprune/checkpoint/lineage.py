"""What a model was before it came here: the cuts that were made in it, the oldest first, from the dense model
on.

They are kept as `history` in the plan of the config, and follow from the report that lies beside a model
whose config has no plan (a uniform one). An entry is what `PruningReport.cut` gives; an empty one is a cut of
which no record is left.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import cached_file

from ..modeling_kprune import inner_models, plan_of
from ..report import JSON_NAME, PruningReport
from ..sizes import model_size


def earlier_cuts(model: PreTrainedModel, report: PruningReport | None = None) -> list[dict[str, Any]]:
    """The cuts that were made in `model` before.

    Args:
        model: Any.
        report: Of the run that made it what it is, if that was just now.
    """
    plans = [plan for inner in inner_models(model) if (plan := plan_of(inner.config)) is not None]
    history = next((plan["history"] for plan in plans if plan.get("history")), None)
    if history is not None:
        return list(history)
    parameters = model_size(model).parameters
    for one in (report, None if report is not None else report_beside(model)):
        if one is not None and one.cut_something and one.after.parameters == parameters:
            return [*one.lineage, one.cut()]
    return [{}] if plans else []


def report_beside(model: PreTrainedModel) -> PruningReport | None:
    """The report in the folder, or the part of the Hub's cache, that a model was loaded from; None if there
    is none.
    """
    if not model.config.name_or_path:
        return None
    options: dict[str, Any] = {"local_files_only": True, "_raise_exceptions_for_missing_entries": False}
    path = cached_file(
        model.config.name_or_path, JSON_NAME, _raise_exceptions_for_connection_errors=False, **options
    )
    try:
        return None if path is None else PruningReport.from_json(Path(path).read_text(encoding="utf-8"))
    except (ValueError, TypeError, KeyError):  # a file of that name that is no report of ours
        return None


def write_cuts(model: PreTrainedModel, cuts: list[dict[str, object]]) -> None:
    """Keep `cuts` in every plan in the configs of `model`."""
    for inner in inner_models(model):
        plan = plan_of(inner.config)
        if plan is not None:
            inner.config.kprune = {**plan, "history": cuts}
