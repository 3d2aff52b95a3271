"""What a report is made of: what was done in one sublayer, and the size of a model."""

from __future__ import annotations

from dataclasses import dataclass, field

from .structure.units import KINDS
from .text import printable


@dataclass
class SublayerReport:
    """One sublayer.

    Args:
        name: Such as `encoder.layer.3.ffn`.
        kind: `"attention"` or `"cross_attention"` (units are heads), `"ffn"` or `"experts"` (neurons), or
            `"whole experts"`.
        units: Units before.
        kept: Indices of the kept units among those before.
        scores: Importance per cost of each unit before; None if it needed no decision.
        flops_left: Prunable FLOPs of the model if everything above stayed as it is.
        error_before: Distance from the teacher after the cut, relative to the teacher token by token: the
            root of the mean over about 1,000 tokens of the squared distance of what leaves the sublayer,
            residual stream included, from what leaves the teacher's, divided by the square of that. None if
            it was not measured because tuning is off or student and teacher are still the same.
        error_after: The same after tuning.
        damping: Damping of the solve, relative to the mean diagonal.
        undetermined: Features that the data do not tell apart from others (`Fit.undetermined`).
        score_damping: Damping of the features' second moments that units were scored by, beyond the ridge,
            relative to their mean; more than 1e-10 where rounding left them singular.
        seconds: Wall-clock time of the sublayer.

    Example:

        >>> from hf_kprune import SublayerReport
        >>> print(SublayerReport("encoder.layer.0.ffn", "ffn", units=4, kept=[0, 2]))
        encoder.layer.0.ffn: kept 2/4 neurons | 0 GFLOPs left | 0.0 s
    """

    name: str
    kind: str
    units: int
    kept: list[int] = field(default_factory=list)
    scores: list[float] | None = None
    flops_left: float = 0.0
    error_before: float | None = None
    error_after: float | None = None
    damping: float = 0.0
    undetermined: int = 0
    seconds: float = 0.0
    score_damping: float = 0.0

    def __str__(self) -> str:
        error = ""
        if self.error_before is not None and self.error_after is not None:
            error = f" | error {self.error_before:.4f} -> {self.error_after:.4f}"
        if self.undetermined:
            error += f" | {self.undetermined} features undetermined"
        if self.score_damping > 1e-9:
            error += f" | scored with a damping of {self.score_damping:.0e}"
        return (
            f"{printable(self.name)}: kept {len(self.kept)}/{self.units} {KINDS[self.kind][0]} | "
            f"{self.flops_left / 1e9:.4g} GFLOPs left{error} | {self.seconds:.1f} s"
        )


@dataclass
class Size:
    """Size of a model: parameters and bytes, also without embeddings, FLOPs of the prunable sublayers per
    sequence, and, of a model that generates, the bytes that its cache of keys and values grows by per token.

    `prunable_parameters` are those of heads and neurons, `all_flops` the FLOPs of the whole model, with
    untouched experts and the head over the vocabulary; 0 where they were not counted.
    """

    parameters: int = 0
    parameters_without_embeddings: int = 0
    bytes: int = 0
    bytes_without_embeddings: int = 0
    flops: float = 0.0
    cache_bytes_per_token: int = 0
    prunable_parameters: int = 0
    all_flops: float = 0.0
