"""What a pruning run did: data, and what is said of them. reports/ renders it."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .charts import losses_of_trials, reconstruction_errors, units_kept
from .entries import Size, SublayerReport
from .errors import ArgumentError
from .history import Recovery, in_words
from .reports import FORMATS, Chart, Document, Table, fragment, to_html, to_markdown
from .structure.units import KINDS, WHOLE_EXPERTS
from .text import printable, public_name


LITTLE = 0.1
"""Share of the units of a kind under which what is left of them is remarked on."""

NAME = "kprune_report"
JSON_NAME, MARKDOWN_NAME, HTML_NAME = f"{NAME}.json", f"{NAME}.md", f"{NAME}.html"
"""The files that a report is saved in: its data, what is said of them in Markdown and, where that is asked
for, as a page.
"""


@dataclass
class PruningReport:
    """A pruning run. `print(report)` gives the Markdown, `report.to_json()` everything.

    Args:
        model: Name or path, and class, of the model.
        method: `KPruneArguments.method`.
        knowledge: Name of the predictive knowledge, by the model's head.
        compared: Names of the model's outputs that it compares.
        ignored: Names of those that it does not.
        asked: The budget, by the name of its option.
        achieved: What came out of it.
        sparsity: Fraction that was removed.
        before: Size before.
        after: Size after.
        sequence_length: Tokens per sequence that FLOPs are counted for: `flops_length`, or the mean of the
            calibration rows (and of the stacks, where they differ).
        sublayers: Bottom to top.
        calibration: Fingerprint of the calibration rows: dataset, rows, tokens, seed, sha256 of the token
            ids.
        arguments: All options.
        versions: Of Python and the packages.
        trials: Knowledge loss on rows held out, for each exponent by which the budget was split
            (`search.split`), such as `"0.5"`, or for each number of heads if all layers end alike, such as
            `"3 heads"`.
        seconds: Wall-clock time by phase: prepare, measure, search, tune, total.
        peak_memory: Bytes of the process (CPU) or device (GPU) at the highest.
        estimate: Of a plan, what it is estimated from and what pruning does otherwise; empty after pruning.
        expected_seconds: Of a plan, about how many seconds pruning takes, by phase as in `seconds`; empty
            after pruning.
        removed_at: Fraction of the prunable FLOPs that is removed for texts of 128 and of 512 tokens; empty
            without texts.
        device: Where it ran, and in how many processes.
        left_alone: Towers of the model that were not pruned, by their paths, and why.
        lineage: The cuts that were made in the model before, the oldest first, as `cut` gives them.
        metrics: Figures of `evaluate()` on the pruner's `eval_dataset`, of the model `"before"` and
            `"after"`, and `"recovered"`, whichever were measured.
        recovery: What the model has learnt afterwards, if `recover()` was called. It is no part of the rest.

    Example:

        >>> from hf_kprune import PruningReport
        >>> report = PruningReport("bert", "surgeon", "classification", asked={"sparsity": 0.5}, sparsity=0.5)
        >>> PruningReport.from_json(report.to_json()) == report
        True
    """

    model: str
    method: str
    knowledge: str
    asked: dict[str, float]
    achieved: float = 0.0
    sparsity: float = 0.0
    before: Size = field(default_factory=Size)
    after: Size = field(default_factory=Size)
    sequence_length: float = 0.0
    sublayers: list[SublayerReport] = field(default_factory=list)
    calibration: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    trials: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory: int = 0
    device: str = ""
    compared: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    removed_at: dict[str, float] = field(default_factory=dict)
    estimate: str = ""
    left_alone: dict[str, str] = field(default_factory=dict)
    expected_seconds: dict[str, float] = field(default_factory=dict)
    lineage: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    recovery: Recovery | None = None

    @property
    def cut_something(self) -> bool:
        """Whether any sublayer lost a unit."""
        return any(len(entry.kept) < entry.units for entry in self.sublayers)

    @property
    def stage(self) -> str:
        """What `metrics` calls the model as it is now."""
        return "after" if self.recovery is None else "recovered"

    def cut(self) -> dict[str, Any]:
        """What the reports of later runs say of this one."""
        name, space, kind = self.model.rpartition(" (")
        cut = {
            "model": public_name(name) + space + kind,
            "method": self.method,
            "asked": self.asked,
            "sparsity": self.sparsity,
            "parameters": [self.before.parameters, self.after.parameters],
        }
        return cut if self.recovery is None else {**cut, "recovery": round(self.recovery.seconds, 1)}

    def shares(self) -> tuple[float, float]:
        """Share of all parameters, and of all FLOPs, of the dense model that is prunable; 0 where it was not
        counted.
        """
        size = self.before
        return size.prunable_parameters / max(
            size.parameters, 1
        ), size.flops / size.all_flops if size.all_flops else 0.0

    def remarks(self) -> list[str]:
        """Which sublayers are emptied, and of which kind of unit less than `LITTLE` is left."""
        remarks, are = [], "would be" if self.estimate else "are"
        for kind, (units, places) in KINDS.items():
            sublayers = [s for s in self.sublayers if s.kind == kind and s.units]
            empty = [s.name for s in sublayers if not s.kept]
            share = sum(len(s.kept) for s in sublayers) / max(sum(s.units for s in sublayers), 1)
            if empty:
                names = ", ".join(map(printable, empty[:3])) + (", ..." if len(empty) > 3 else "")
                remarks.append(
                    f"{len(empty)} of {len(sublayers)} {places} {are} left without {units} ({names})"
                )
            if sublayers and share < LITTLE:
                remarks.append(f"{share:.1%} of the {units} {are} left, less than {LITTLE:.0%}")
        return remarks

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> PruningReport:
        """The report in `text`. Raises `ArgumentError` if that holds none."""
        try:
            data = json.loads(text)
            data["sublayers"] = [SublayerReport(**s) for s in data["sublayers"]]
            data["before"], data["after"] = Size(**data["before"]), Size(**data["after"])
            if data.get("recovery") is not None:
                data["recovery"] = Recovery(**data["recovery"])
            report = cls(**data)
            report.to_markdown()  # which fails where a field is of another kind
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ArgumentError(
                f"{JSON_NAME} is damaged or of another version of hf_kprune; take the one that was saved "
                "with the model, or delete it"
            ) from error
        return report

    def to_markdown(self) -> str:
        return to_markdown(self.document())

    def document(self) -> Document:
        """All that is said of a run: a title, notes, the sizes, every sublayer, and how it came about."""
        head: Document = [[self.title()], self.notes(), self.sizes()]
        return [*head, *self.charts(), self.table(), [self.circumstances()]]

    def charts(self) -> list[Chart]:
        """What is left of each layer, how far each sublayer is from the dense model, and what trials gave."""
        left, errors = units_kept(self.sublayers), reconstruction_errors(self.sublayers)
        return [*left, *errors, *losses_of_trials(self.trials)]

    def sizes(self) -> Table:
        """Each size before and after, and the share that is left; then the figures that were measured."""
        before, after = self.before, self.after
        rows = [
            ("parameters", before.parameters, after.parameters, ",.0f"),
            (
                "without embeddings",
                before.parameters_without_embeddings,
                after.parameters_without_embeddings,
                ",.0f",
            ),
            ("megabytes", before.bytes / 1e6, after.bytes / 1e6, ".1f"),
            (
                "without embeddings",
                before.bytes_without_embeddings / 1e6,
                after.bytes_without_embeddings / 1e6,
                ".1f",
            ),
            (
                f"prunable GFLOPs at {self.sequence_length:.1f} tokens",
                before.flops / 1e9,
                after.flops / 1e9,
                ".4g",
            ),
        ]
        if before.all_flops:
            rows.append(("all GFLOPs", before.all_flops / 1e9, after.all_flops / 1e9, ".4g"))
        if before.cache_bytes_per_token:
            caches = before.cache_bytes_per_token, after.cache_bytes_per_token
            rows.append(("KV-cache bytes per token", *caches, ",.0f"))
        cells = [
            (name, f"{old:{form}}", f"{new:{form}}", f"{new / old:.1%}" if old else "-")
            for name, old, new, form in rows
        ]
        dense, pruned = (self.metrics.get(when, {}) for when in ("before", "after"))
        for name in dense | pruned:
            old, new = (f"{those[name]:.4f}" if name in those else "-" for those in (dense, pruned))
            cells.append((name, old, new, ""))
        recovered = self.metrics.get("recovered", {}).items()
        cells += [(f"{name}, recovered", "", f"{value:.4f}", "") for name, value in recovered]
        return Table(("", "before", "after", "left"), cells, "lrrr")

    def table(self) -> Table:
        """What is left of each sublayer, and its errors after the cut and after tuning."""
        rows = []
        for s in self.sublayers:
            errors = ["-" if error is None else f"{error:.4f}" for error in (s.error_before, s.error_after)]
            rows.append((s.name, f"{len(s.kept)}", f"{s.units}", *errors, f"{s.seconds:.1f}"))
        return Table(("sublayer", "kept", "of", "error cut", "error tuned", "s"), rows, "lrrrrr")

    def circumstances(self) -> str:
        """What errors are relative to, what was measured by what, on which data, and where."""
        outputs = f", of the outputs {', '.join(self.compared)}" if self.compared else ""
        outputs += f", without {', '.join(self.ignored)}" if self.ignored else ""
        data = self.calibration
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return (
            "Errors are distances of what leaves a sublayer from what leaves the teacher's, relative to its "
            "length token by token, as the root of their mean square over about 1,000 tokens. Knowledge: "
            f"{self.knowledge}{outputs}. Calibration: {data.get('rows', 0):,} rows, "
            f"{data.get('tokens', 0):,} tokens of {data.get('dataset')}, seed {data.get('seed')}. "
            f"{self.device}, peak memory {self.peak_memory / 2**30:.2f} GiB. {versions}."
        )

    def title(self) -> str:
        """What was pruned by which method, what is gone and what was asked, in one line."""
        asked = ", ".join(
            f"{value:.2%} asked"
            if name == "sparsity"
            else f"{name} {value:,.6g} asked, {self.achieved:,.6g} achieved"
            for name, value in self.asked.items()
        )
        verb = "K-pruned" if self.method == "kprune" else f"pruned by {self.method}"
        subject, removed = f"{self.model} {verb}", "removed"
        if self.method == "kprune":
            subject = f"K-pruned {self.model}"
        if self.estimate:
            subject, removed = f"Plan: {self.model} would be {verb}", "would be removed"
        share, seconds = f"{self.sparsity:.2%} of the prunable FLOPs", self.seconds.get("total", 0)
        return f"{subject}: {self.weights_removed()}{share} {removed} ({asked}), {seconds:.0f} s"

    def weights_removed(self) -> str:
        """Which share of the parameters is removed, as the beginning of a sentence: where whole experts are
        units, as these save nothing else."""
        if not any(s.kind == WHOLE_EXPERTS for s in self.sublayers):
            return ""
        return f"{1 - self.after.parameters / max(self.before.parameters, 1):.2%} of the parameters and "

    def summary(self) -> str:
        """The report in ten lines at most, for a terminal."""
        before, after = self.before, self.after
        sizes = (
            ("parameters", before.parameters, after.parameters, ",.0f"),
            ("megabytes", before.bytes / 1e6, after.bytes / 1e6, ",.1f"),
            (
                f"prunable GFLOPs at {self.sequence_length:.0f} tokens",
                before.flops / 1e9,
                after.flops / 1e9,
                ".4g",
            ),
        )
        lines = [
            f"{name}: {old:{form}} -> {new:{form}}" + (f" ({new / old:.1%})" if old else "")
            for name, old, new, form in sizes
        ]
        lines.append(f"kept: {'; '.join(self.counts())}")
        errors = sorted((s.error_after, s.name) for s in self.sublayers if s.error_after is not None)
        if errors:
            middle, (largest, name) = errors[len(errors) // 2][0], errors[-1]
            lines.append(f"error after tuning: {middle:.3f} in the median, {largest:.3f} at most ({name})")
        rows, tokens = (self.calibration.get(key, 0) for key in ("rows", "tokens"))
        lines.append(f"calibration: {rows:,} rows, {tokens:,} tokens; knowledge: {self.knowledge}")
        phases = (f"{phase} {spent:.0f} s" for phase, spent in self.seconds.items() if phase != "total")
        lines.append(f"time: {', '.join(phases)}; peak memory {self.peak_memory / 2**30:.2f} GiB")
        lines += [] if self.recovery is None else [str(self.recovery)]
        lines += self.remarks()[:2]
        return "\n".join(map(printable, [self.title(), *(f"  {line}" for line in lines)])) + "\n"

    def counts(self) -> list[str]:
        """How many units of each kind are left in how many sublayers."""
        counts = []
        for kind, (units, places) in KINDS.items():
            sublayers = [s for s in self.sublayers if s.kind == kind]
            if sublayers:
                left, total = sum(len(s.kept) for s in sublayers), sum(s.units for s in sublayers)
                empty = sum(not s.kept for s in sublayers)
                counts.append(f"{left:,} of {total:,} {units} in {len(sublayers)} {places}, {empty} emptied")
        return counts

    def notes(self) -> list[str]:
        """Sentences on what the budget is a share of, for which lengths it holds, and what is worth a
        warning.
        """
        parameters, flops = self.shares()
        lines = [self.estimate] if self.estimate else []
        if self.lineage:
            lines.append(in_words([*self.lineage, self.cut()]))
        if parameters and flops:
            lines.append(f"Prunable are {parameters:.1%} of all parameters and {flops:.1%} of all FLOPs.")
        if self.removed_at:
            shares = ", ".join(f"{share:.2%} at {length} tokens" for length, share in self.removed_at.items())
            verb = "would be" if self.estimate else "are"
            lines.append(f"Of the prunable FLOPs {verb} removed: {shares}.")
        lines += [] if self.recovery is None else [str(self.recovery)]
        lines += [f"Left alone: {path}, as {reason}." for path, reason in self.left_alone.items()]
        return lines + [f"Note: {remark}." for remark in self.remarks()]

    def __str__(self) -> str:
        return self.to_markdown()

    def to_html(self) -> str:
        """A page that shows the run with pictures, which take matplotlib. It needs no network."""
        return to_html(self.document())

    def _repr_html_(self) -> str:
        return fragment(self.document())

    def save(self, directory: str | Path, endings: Collection[str] = (".md",)) -> None:
        """Write the data, and what is said of them, into `directory`.

        Args:
            directory: It is there already.
            endings: Those of the formats of `reports.FORMATS` that are written beside the data.
        """
        Path(directory, JSON_NAME).write_text(self.to_json(), encoding="utf-8")
        for ending in endings:
            Path(directory, NAME + ending).write_text(FORMATS[ending](self.document()), encoding="utf-8")
