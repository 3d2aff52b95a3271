"""Break each numeric function in one place and see that a default test falls for it.

python benchmarks/mutants.py [WORD ...]

A mutant is one textual change to a copy of the package; with WORDs, only those run whose text has one of them.
Each is tried by the tests that guard it, in a process forked from one that has imported the libraries. The exit
code is 1 if a mutant survives, if its text is not found exactly once, or if its tests fail without it.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import accelerate  # noqa: F401  imported once, for all processes that are forked
import datasets  # noqa: F401
import evaluate  # noqa: F401
import pytest
import torch
import torchmetrics  # noqa: F401
from transformers import BertForSequenceClassification, Trainer  # noqa: F401


ROOT = Path(__file__).parents[1]
SECONDS = 600
"""A mutant whose tests take longer has fallen: it does not end."""

KNOWLEDGE = ("test_knowledge.py",)
SEARCH = ("test_search.py", "test_surgeon.py", "test_uniform.py::test_the_uniform_plan_is_the_best_one")
LEAST_SQUARES = ("test_reconstruction.py",)
SURGEON = ("test_surgeon.py",)
RIVALS = ("test_rivals.py",)
FAMILIES = ("test_families.py",)
CUT = ("test_checkpoint.py", "test_families.py", "-k", "cutting_twice or loads_with_the_stock_class")
QUERY_HEADS = ("test_zoo.py", "-k", "test_a_query_head")
SIZES = ("test_pruner.py", "-k", "size or parameters")
BUDGET = ("test_budget.py", "test_pruner.py", "-k", "budget")
CACHE = ("test_generation.py", "-k", "cache_is_as_large")
LATENCY = ("test_latency.py", "-k", "curve or fit or table")
SUMS = (
    "test_calibration.py",
    "test_surgeon.py",
    "-k",
    "measured or row_by_row or normal_equations or large_mean",
)
DISTANCE = ("test_calibration.py", "test_surgeon.py", "-k", "nearest_student or distance")
EXPERTS = ("test_experts.py",)
WHOLE_EXPERTS = ("test_whole_experts.py",)
COMPOSITES = ("test_composites.py",)
INPUTS = ("test_surgeon.py", "-k", "corrected")

MUTANTS: list[tuple[str, str, tuple[str, ...]]] = [
    # text, what it becomes, the tests that guard it
    ("return temperature**2 * (target.exp()", "return temperature * (target.exp()", KNOWLEDGE),
    ("values, 0).sum(1) / weight.sum(1).clamp(min=1)", "values, 0).sum(1) / weight.shape[1]", KNOWLEDGE),
    ("(square + (batch - 1) * product)", "(square + batch * product)", KNOWLEDGE),
    (
        "tokens * weight.to(energy.dtype).square().mean(0)",
        "tokens * weight.to(energy.dtype).square().sum(0)",
        KNOWLEDGE,
    ),
    ("return columns.view(-1, width).mean(1)", "return columns.view(-1, width).amax(1)", KNOWLEDGE),
    ("left -= float(spent[fits - 1]) if fits else 0.0", "left -= 0.0", SEARCH),
    ("queue = queue[price[queue] <= left]", "queue = queue[:0]", SEARCH),
    ("curve = (cost * values).cumsum(0) ** exponent", "curve = values.cumsum(0) ** exponent", SEARCH),
    (
        "(values[stop] - values[start]) / (stop - start)\n",
        "(values[stop] - values[start]) / (stop - start + 1)\n",
        SEARCH,
    ),
    ("scatter_add_(-1, place, minus_one).mul_(temperature)", "scatter_add_(-1, place, minus_one)", KNOWLEDGE),
    ("torch.stack(list(ranked)).sum(0) / cost", "torch.stack(list(ranked)).sum(0)", SEARCH),
    ("- 2 * (e.cross * w.T).sum()", "- (e.cross * w.T).sum()", LEAST_SQUARES),
    (
        "change.addr_(e.feature_sum, rest / e.tokens, alpha=-1)",
        "change.addr_(e.feature_sum, rest, alpha=-1)",
        LEAST_SQUARES,
    ),
    ("pull = ridge * squares.clamp(", "pull = ridge + 0 * squares.clamp(", LEAST_SQUARES),
    ("factor.addr_(centre, centre, alpha=-1)", "factor.addr_(centre, centre, alpha=1)", LEAST_SQUARES),
    ("both -= part", "both -= 0 * part", LEAST_SQUARES),
    (
        "torch.stack([b.total(), b.centre])",
        "torch.stack([b.rest_sum, b.centre])",
        SUMS,
    ),
    ("centre = feature_sum / total**0.5 if", "centre = feature_sum / total if", SURGEON),
    ("dim=1).square() / inverse.diagonal()", "dim=1).square() * inverse.diagonal()", SURGEON),
    ("place += len(strip)", "place += len(strip) - 1", SURGEON),
    ("solved[:, : len(inverse)], alpha=-1)", "solved[:, : len(inverse)], alpha=0)", SURGEON),
    ("solved[:, len(inverse) :]).sum() / 2", "solved[:, len(inverse) :]).sum()", SURGEON),
    ("torch.where(gone, diagonal - 2 * pull", "torch.where(gone, diagonal - pull", RIVALS),
    ("(head_worth[: len(head_price)] + neuron_worth[fitting])", "(neuron_worth[fitting])", RIVALS),
    ("s.energy / s.tokens - (s.feature_sum / s.tokens).square()", "s.energy / s.tokens", RIVALS),
    ("1 + torch.linalg.solve_ex(damped, rest)", "0 + torch.linalg.solve_ex(damped, rest)", RIVALS),
    ("columns = s.energy.sqrt() * s.weight", "columns = s.energy * s.weight", RIVALS),
    (".square() / sigma**2).exp()", ".square() / (2 * sigma**2)).exp()", RIVALS),
    ("starts = [count * sum(parts[:place])", "starts = [sum(parts[:place])", FAMILIES),
    ("return 4 * tokens * keys * self.width", "return 2 * tokens * keys * self.width", FAMILIES),
    ("view(1, -1, 1) * (count * d + extra)", "view(1, -1, 1) * (count * d)", QUERY_HEADS),
    ("heads = columns[:: unit.head_dim] // unit.head_dim", "heads = columns[: len(kept)]", CUT),
    ("(bias + exact @ shift).to(bias.dtype)", "(bias - exact @ shift).to(bias.dtype)", INPUTS),
    ("rest = [p for p in parameters if id(p) not in tables]", "rest = [p for p in parameters]", SIZES),
    ("total += numbers * s.itemsize", "total += 2 * numbers * s.itemsize", CACHE),
    ("max(self.limit - spent, sum(self.forced[position:]))", "self.limit", BUDGET),
    (
        "self.c + self.a * (units.double() - self.theta).clamp(min=0)",
        "self.c + self.a * (units.double() - self.theta)",
        LATENCY,
    ),
    ("max(float(seconds.max()), 1e-12)) ** -2", "max(float(seconds.max()), 1e-12)) ** -1", LATENCY),
    (
        'sums["energy"] += a.double().square().sum(0)',
        'sums["energy"] += a.double().abs().sum(0)',
        SUMS,
    ),
    ('add_gram(sums["metric"], g[valid]', 'add_gram(sums["metric"], g[valid].abs()', SUMS),
    ('["absolute"] += by_sample.abs().sum(0)', '["absolute"] += by_sample.sum(0)', SUMS),
    ("square[place] += g.square().sum(0)", "square[place] += g.sum(0).square()", SUMS),
    ("return float(sums[0] / sums[1])", "return float(sums[0])", DISTANCE),
    (
        "columns = neurons_of(experts, expert, hidden[tokens]) * share",
        "columns = neurons_of(experts, expert, hidden[tokens])",
        EXPERTS,
    ),
    ("rest = target - output_of(dense, features)", "rest = target", EXPERTS),
    ("total.where(total != 0, 1)", "total", EXPERTS),
    ("level = torch.stack(of_known).mean(0)", "level = torch.stack(ranked).mean(0)", EXPERTS),
    ("steps * (TOLERANCE * level.abs() + FAINT)", "0 * steps", EXPERTS),
    ("torch.outer(feature[:-1], bias)", "torch.outer(feature[:-1], 0 * bias)", EXPERTS),
    ("self.unit.routes / self.experts if", "1.0 if", EXPERTS),
    ("by_column.double().sum(1).square()", "by_column.double().square().sum(1)", WHOLE_EXPERTS),
    ("fisher_by_token / (2 * s.samples)", "fisher_by_token / s.samples", WHOLE_EXPERTS),
    ("        before = reference.teacher.sublayer.output", "        pass", EXPERTS),
    ("-(-self.routes // self.open_groups)", "1", WHOLE_EXPERTS),
    ("        pad_logits(layer.get_submodule", "        pass  # (layer.get_submodule", WHOLE_EXPERTS),
    ("LATENT: [self.plain + self.head_dim]", "LATENT: [self.positional + self.head_dim]", FAMILIES),
    ('"2q": 2 * self.width, "h"', '"2q": self.width, "h"', FAMILIES),
    ('"h": self.heads}.get(layout)', '"h": self.width}.get(layout)', FAMILIES),
    ("key = (unit, columns) if before is None", "key = unit if before is None", FAMILIES),
    ("all(tensor.shape[:1] == (count,) for tensor in inputs.values())", "count", COMPOSITES),
    ("if not failed and all_finite([factor])", "if not failed", LEAST_SQUARES),
    ("or not f.any():", "or False:", EXPERTS),
]


@contextmanager
def changed(text: str, becomes: str) -> Iterator[Path]:
    """A folder with a copy of the package in which `text` is another. Raises ValueError if it is not there once."""
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder, "hf_kprune")
        shutil.copytree(ROOT / "hf_kprune", package, ignore=shutil.ignore_patterns("__pycache__"))
        places = [path for path in package.rglob("*.py") if text in path.read_text(encoding="utf-8")]
        if text and sum(path.read_text(encoding="utf-8").count(text) for path in places) != 1:
            raise ValueError(f"found in {[path.name for path in places]}, expected once")
        if text:
            source = places[0].read_text(encoding="utf-8")
            places[0].write_text(source.replace(text, becomes), encoding="utf-8")
        yield Path(folder)


def tests_pass(folder: Path, guards: tuple[str, ...]) -> bool:
    """Run tests, in a process of their own, on the package in a folder. Raises RuntimeError if they cannot run."""
    process = os.fork()
    if not process:
        signal.alarm(SECONDS)
        sys.path.insert(0, str(folder))
        os.environ["PYTHONPATH"] = str(folder)
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, 1)
        os.dup2(nothing, 2)
        paths = [
            str(ROOT / "tests" / guard) if guard.startswith("test_") and ".py" in guard else guard
            for guard in guards
        ]
        code = pytest.main(
            [
                "-x",
                "-q",
                "-n",
                "0",
                "-p",
                "no:cacheprovider",
                "-W",
                "ignore::pytest.PytestAssertRewriteWarning",
                "--rootdir",
                str(ROOT),
                *paths,
            ]
        )
        os._exit(code if str(folder) in str(sys.modules["hf_kprune"].__file__) else 99)
    status = os.waitpid(process, 0)[1]
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM:
        return False
    code = os.waitstatus_to_exitcode(status)
    if code not in (0, 1):
        raise RuntimeError(f"pytest ended with {code}")
    return code == 0


def main(words: list[str]) -> int:
    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    wrong, unchanged = 0, {}
    mutants = [m for m in MUTANTS if not words or any(word in m[0] for word in words)]
    for text, becomes, guards in mutants:
        try:
            if guards not in unchanged:
                with changed("", "") as folder:
                    unchanged[guards] = tests_pass(folder, guards)
            with changed(text, becomes) as folder:
                survived = tests_pass(folder, guards)
            verdict = (
                "survived" if survived else "fallen" if unchanged[guards] else "its tests fail without it"
            )
        except (ValueError, RuntimeError) as error:
            verdict = str(error)
        wrong += verdict != "fallen"
        print(f"{verdict:10} {text.strip()}  ->  {becomes.strip()}", flush=True)
    print(f"{len(mutants) - wrong} of {len(mutants)} mutants fell")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
