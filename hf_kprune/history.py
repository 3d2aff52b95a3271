"""What was done to a model, step by step: the cuts that were made in it, and what it has learnt since."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Recovery:
    """What a pruned model has learnt from the dense one, as `KPrunePruner.recover` gives it.

    Args:
        minutes: How long it was to take at most.
        rows: Calibration rows that it has learnt from.
        held_out: Calibration rows that it was judged by.
        distance_before: The knowledge loss of the pruned model on those that are held out.
        distance_after: That of the model that was kept. It is never larger.
        steps: Steps of the optimiser.
        seconds: Wall-clock time, judging included.
        looks: The step and the distance, each time that the model was judged; None if it was not finite.
        arguments: Options of `TrainingArguments`, as text.

    Example:

        >>> from hf_kprune import Recovery
        >>> print(Recovery(2.0, rows=900, held_out=100, distance_before=0.2, distance_after=0.1, seconds=120))
        Recovered afterwards: distance 0.2 -> 0.1 on 100 rows held out, from 900 rows, 0 steps, 120 s.
    """

    minutes: float
    rows: int
    held_out: int
    distance_before: float
    distance_after: float
    steps: int = 0
    seconds: float = 0.0
    looks: list[list[float | None]] = field(default_factory=list)
    arguments: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return (
            f"Recovered afterwards: distance {self.distance_before:.4g} -> {self.distance_after:.4g} on "
            f"{self.held_out:,} rows held out, from {self.rows:,} rows, {self.steps:,} steps, "
            f"{self.seconds:.0f} s."
        )


def in_words(cuts: list[dict[str, Any]]) -> str:
    """The dense model, every cut in it, the oldest first, and what they come to."""
    known = [cut for cut in cuts if cut]
    steps = [
        f"{cut['sparsity']:.2%} of the prunable FLOPs removed by {cut['method']} "
        f"({cut['parameters'][0]:,} to {cut['parameters'][1]:,} parameters)"
        + (f", and {cut['recovery']:.0f} s of recovery" if cut.get("recovery") else "")
        if cut
        else "a cut of which no record is left"
        for cut in cuts
    ]
    if not known:
        return "It was pruned before, by a run of which no record is left."
    text = f"The dense model is {cuts[0]['model']}: " if cuts[0] else ""
    text += f"{len(cuts)} cuts: " if len(cuts) > 1 else ""
    text += "; then ".join(steps)
    left = 1.0
    for cut in known:
        left *= 1 - cut["sparsity"]
    first, last = known[0]["parameters"][0], known[-1]["parameters"][1]
    if cuts[0] and len(cuts) > 1:
        total = f"{1 - left:.2%} of the prunable FLOPs and {1 - last / max(first, 1):.2%} of the parameters"
        text += f". In total {total} are removed"
    return f"{text}."
