"""The look-up table: how long a model would take with fewer units."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import statistics
import tempfile
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch
import transformers
from huggingface_hub import cached_assets_path
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import ArgumentError
from ..methods.search import TOLERANCE
from ..structure.sublayers import find_sublayers
from ..structure.surgery import with_table_per_layer
from ..structure.surroundings import product_precisions
from ..version import __version__
from .timing import compare, cut_to, time_model


AT_ONCE = 4
"""Cut models that are held at once while measuring."""

FAINT = 0.05
"""Of the largest time of a curve, what is taken for noise: errors of smaller ones count as if they were of
that one."""


@dataclass(frozen=True)
class Curve:
    """Seconds of a sublayer with n units (Kwon et al. 2022): 0 for n = 0, else c + a max(0, n - theta)."""

    c: float
    a: float
    theta: int

    def __call__(self, units: Tensor) -> Tensor:
        return (units > 0) * (self.c + self.a * (units.double() - self.theta).clamp(min=0))

    @classmethod
    def fit(cls, units: Tensor, seconds: Tensor) -> Curve:
        """The curve with c, a >= 0 of least squares of relative errors, as what is left of a sublayer is at
        the lower end; of equally good ones that of least theta, or, if a = 0, of the largest.

        Kwon et al. take the mean of the first theta times as c and fit a alone; here both are fitted
        together.

        Args:
            units: How many units there were, (P,), or in each of several alike sublayers, (P, m). Not 0.
            seconds: Time of a sublayer then, the mean of the m, (P,).
        """
        units, seconds = units.double().view(len(units), -1), seconds.double()
        weight = seconds.clamp(min=FAINT * max(float(seconds.max()), 1e-12)) ** -2
        weight = weight / weight.sum()
        theta = torch.arange(int(units.max()) + 1, dtype=torch.float64)
        over = (units - theta.view(-1, 1, 1)).clamp(min=0).mean(-1)  # (theta, P)
        mean, middle = (weight * over).sum(1, keepdim=True), (weight * seconds).sum()
        spread = (weight * (over - mean).square()).sum(1)
        both = (weight * (over - mean) * (seconds - middle)).sum(1) / spread.where(spread > 0, 1)
        through = (weight * over * seconds).sum(1) / (weight * over.square()).sum(1).clamp(
            min=1e-300
        )  # c = 0
        a = torch.stack([both, through, torch.zeros_like(both)]).clamp(min=0)
        c = torch.stack(
            [middle - both * mean[:, 0], torch.zeros_like(both), middle.expand(len(theta))]
        ).clamp(min=0)
        errors = (weight * (c.unsqueeze(2) + a.unsqueeze(2) * over - seconds).square()).sum(2)
        near = errors <= errors.min() + TOLERANCE**2 * (weight * seconds.square()).sum()
        best = len(theta) - 1 if near[2, 0] else int(near.any(0).nonzero()[0])
        which = int(errors[:, best].argmin())
        return cls(float(c[which, best]), float(a[which, best]), best)


@dataclass(frozen=True)
class LatencyTable:
    """What each sublayer of a model takes with fewer units, on one device and with inputs of one shape.

    Args:
        dense: Seconds of the model as it is (T5: with its positions looked up in every layer, as in all that
            is cut of it).
        emptied: Seconds of the model when every sublayer is empty.
        units: Units of each sublayer, bottom to top.
        kinds: Kind of each sublayer: those of one kind differ at most in how many units they have.
        points: For each kind: numbers n > 0, and the mean seconds of its sublayers when none of them has more
            units than n.
    """

    dense: float
    emptied: float
    units: list[int]
    kinds: list[str]
    points: dict[str, list[tuple[int, float]]]

    @classmethod
    def measure(
        cls,
        model: PreTrainedModel,
        inputs: Mapping[str, object],
        head_unit: str = "group",
        rounds: int | None = None,
    ) -> LatencyTable:
        """Time the whole model, in turns with copies of it in which all sublayers of one kind are cut to n
        units.

        What such a copy takes beyond the one in which they are empty is what they take, in their place: with
        the memory traffic of everything else, and with what a GPU overlaps. So it holds for any architecture.
        For one stack, some 20 models of half the size of `model` and more run `rounds` + 2 times, twice as
        often if they are quick.

        Args:
            model: Is not changed. Beside it up to four copies of the weights of one kind of sublayer are
                held.
            inputs: As for `compare`.
            head_unit: As for `find_sublayers`.
            rounds: Timed passes of each copy. None: as many as the model does in a second, from 3 to 50.
        """
        model = with_table_per_layer(model)
        rounds = rounds or max(3, min(50, int(1 / time_model(model, inputs, 1))))
        sublayers = find_sublayers(model, head_unit)
        units, kinds = (
            [s.num_units for s in sublayers],
            [f"{s.stack_name}.*.{s.block.output}" for s in sublayers],
        )
        hollow, live = (
            cut_to(model, [0] * len(units), head_unit),
            Counter(k for k, u in zip(kinds, units, strict=True) if u),
        )
        largest = dict(sorted(zip(kinds, sublayers, strict=True), key=lambda pair: pair[1].num_units))
        numbers = {
            kind: [s.parts * n for n in counts_to_measure(s.num_units // s.parts)]
            for kind, s in largest.items()
            if s.num_units
        }
        tasks = [(kind, n) for kind, counts in numbers.items() for n in (0, *counts[:-1])]
        ends, shares = [], {(kind, counts[-1]): 1.0 for kind, counts in numbers.items()}
        for start in range(0, len(tasks), AT_ONCE):
            some = tasks[start : start + AT_ONCE]
            plans = [
                [min(u, n) if k == kind else u for k, u in zip(kinds, units, strict=True)] for kind, n in some
            ]
            full, least, *seconds = compare(
                [model, hollow, *(cut_to(model, p, head_unit) for p in plans)], inputs, rounds
            )
            ends.append((full, least / full))
            shares |= {task: taken / full for task, taken in zip(some, seconds, strict=True)}
        dense, emptied = (statistics.median(values) for values in zip(*ends, strict=True))
        points = {
            kind: [(n, dense * (shares[kind, n] - shares[kind, 0]) / live[kind]) for n in counts]
            for kind, counts in numbers.items()
        }
        return cls(dense, dense * emptied, units, kinds, points)

    @classmethod
    def cached(
        cls,
        model: PreTrainedModel,
        inputs: Mapping[str, object],
        folder: str | os.PathLike[str] | None = None,
        head_unit: str = "group",
    ) -> LatencyTable:
        """`measure`, once for each machine, model shape and input shape.

        Where files cannot be kept, a warning says so, and the table is measured all the same.

        Args:
            model: As for `measure`.
            inputs: As for `measure`.
            folder: Where tables are kept; delete one to have it measured again. None: where the Hugging Face
                libraries keep such files (`huggingface_hub.cached_assets_path`, inside `HF_HOME`), which the
                user may have moved already.
            head_unit: As for `measure`.
        """
        try:
            folder = cached_assets_path("hf_kprune", "latency") if folder is None else folder
        except (OSError, ValueError) as error:
            _warn_of_no_cache(error)
            return cls.measure(model, inputs, head_unit)
        path = Path(folder, f"{_digest(model, inputs, head_unit)}.json")
        if path.exists():
            return cls.load(path)
        table = cls.measure(model, inputs, head_unit)
        try:
            table.save(path)
        except OSError as error:
            _warn_of_no_cache(error)
        return table

    @cached_property
    def curves(self) -> list[Curve]:
        """Of each sublayer, bottom to top: fitted to the points, then scaled to take together what emptying
        all saves."""
        fits = {}
        for kind, points in self.points.items():
            alike = [u for u, k in zip(self.units, self.kinds, strict=True) if u and k == kind]
            numbers = torch.tensor([[min(u, n) for u in alike] for n, _ in points])
            fits[kind] = Curve.fit(
                numbers, torch.tensor([seconds for _, seconds in points], dtype=torch.float64)
            )
        curves = [fits.get(kind, Curve(0.0, 0.0, 0)) for kind in self.kinds]
        scale = max(self.dense - self.emptied, 0.0) / (seconds_of(curves, self.units) or 1.0)
        return [Curve(scale * curve.c, scale * curve.a, curve.theta) for curve in curves]

    @property
    def rest(self) -> float:
        """Seconds of what is no sublayer."""
        return self.dense - seconds_of(self.curves, self.units)

    def predict(self, counts: Sequence[int]) -> float:
        """Seconds of the model when its sublayers have `counts` units, bottom to top."""
        return self.rest + seconds_of(self.curves, counts)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write as JSON, all or nothing."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as aside:
            written = Path(aside, path.name)
            written.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
            written.replace(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LatencyTable:
        """Read what `save` wrote.

        Raises:
            ArgumentError: If it is something else.
        """
        try:
            entries = json.loads(Path(path).read_text(encoding="utf-8"))
            points = {
                kind: [(int(n), float(s)) for n, s in entries["points"][kind]] for kind in entries["points"]
            }
            return cls(
                float(entries["dense"]),
                float(entries["emptied"]),
                list(entries["units"]),
                list(entries["kinds"]),
                points,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ArgumentError(
                f"{path} holds no latency table ({error}); delete it to have one measured"
            ) from error


def seconds_of(curves: Sequence[Curve], counts: Sequence[int]) -> float:
    """What sublayers with so many units take together."""
    return sum(float(curve(torch.tensor(n))) for curve, n in zip(curves, counts, strict=True))


def counts_to_measure(units: int) -> list[int]:
    """From 1 to all: each of a few; of more about six, closest at the lower end, where the knee is, and even
    as layers are."""
    if units <= 8:
        return list(range(1, units + 1))
    step = 8 if units >= 128 else 1
    parts = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4)
    return sorted({units, *(step * max(1, round(part * units / step)) for part in parts)})


def _warn_of_no_cache(error: Exception) -> None:
    warnings.warn(
        "the measured times of the model are not kept, so the next run measures them again: their place "
        f"cannot be written ({error}); let HF_ASSETS_CACHE name another directory",
        stacklevel=3,
    )


def _digest(model: PreTrainedModel, inputs: Mapping[str, object], head_unit: str) -> str:
    """Of all that the time of `model` depends on: shapes rather than values, and where it runs."""
    device = model.device
    facts = {
        "class": type(model).__name__,
        "config": {
            k: v
            for k, v in model.config.to_dict().items()
            if k not in ("_name_or_path", "id2label", "label2id")
        },
        "attention": model.config._attn_implementation,
        "parameters": {name: [tuple(p.shape), p.dtype] for name, p in model.named_parameters()},
        "inputs": {k: [tuple(v.shape), v.dtype] if isinstance(v, Tensor) else v for k, v in inputs.items()},
        "by": head_unit,
        "device": [
            device.type,
            torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor(),
        ],
        "machine": [platform.node(), torch.get_num_threads(), *product_precisions()],
        "versions": [__version__, torch.__version__, transformers.__version__],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]
