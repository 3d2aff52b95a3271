"""Options, fixtures and settings of the tests: no hub, one thread."""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings


settings.register_profile("repeatable", deadline=None, database=None, derandomize=True)
settings.load_profile("repeatable")
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}  # read when transformers and torch are imported
gc.disable()  # while millions of objects of the libraries come into being
pytest.register_assert_rewrite("checks")  # before it is imported


def pytest_configure(config: pytest.Config) -> None:
    if "gpu" not in config.option.markexpr.replace("not gpu", ""):  # tests of the CPU do not see one
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # tiny models are cut deeply in most tests; here, as naming the category in pyproject.toml would import the package early
    if hasattr(config, "workerinput") or not config.getoption(
        "numprocesses", None
    ):  # the main one runs no tests
        config.addinivalue_line("filterwarnings", "ignore::hf_kprune.BudgetWarning")


def pytest_collection_finish() -> None:
    gc.freeze()  # so that they are not looked through again and again
    gc.set_threshold(50_000, 20, 50)
    gc.enable()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--table", action="store_true", help="Write docs/supported_models.md from the results of test_zoo.py."
    )


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """The table of families x what was proved of them, from the results of this run."""
    if not config.getoption("--table"):
        return
    from data import ROOT
    from table import supported_models

    cells: dict[str, dict[str, str]] = {}
    refused: dict[str, str] = {}
    for outcome, mark in (("passed", "yes"), ("skipped", "-"), ("failed", "**no**")):
        for report in terminalreporter.getreports(outcome):
            for key, value in report.user_properties:
                if key == "family":
                    cells.setdefault(value[0], {})[value[1]] = mark
                elif key == "refused":
                    refused[value[0]] = value[1]
    page = supported_models(cells, refused)
    (ROOT / "docs" / "supported_models.md").write_text(page, encoding="utf-8")
    terminalreporter.write_line(page)


@pytest.fixture(scope="session", autouse=True)
def nothing_drawn_on_meta() -> Iterator[None]:
    """Random numbers are not drawn for tensors without values, which takes PyTorch a good part of loading a tiny model."""
    import torch

    library = torch.library.Library("aten", "IMPL", "Meta")
    with warnings.catch_warnings(action="ignore"):  # of the kernels that are replaced
        for name in ("uniform_", "normal_"):
            library.impl(name, lambda tensor, *_, **__: tensor, allow_override=True)
    yield
    library._destroy()


@pytest.fixture(autouse=True)
def no_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Save models without the picture beside their card, which takes longer to draw than a tiny model to save; where a
    test is marked `pictures`, there is one, as there is for users who have matplotlib.
    """
    if request.node.get_closest_marker("pictures") is None:
        monkeypatch.setattr("hf_kprune.checkpoint.card.can_draw", lambda: False)


@pytest.fixture(autouse=True)
def one_split(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the default method try one split of the budget, as trying several takes most of its time on a tiny model; where
    a test is marked `several_splits`, it tries several, as it does for users.
    """
    from hf_kprune.methods.surgeon import Surgeon

    if request.node.get_closest_marker("several_splits") is None:
        monkeypatch.setattr(Surgeon, "exponents", (1.0,))


@pytest.fixture(autouse=True)
def few_rounds(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a pass of a tiny model be timed three times and not twenty, as no test by default is about how long it takes."""
    if request.node.get_closest_marker("slow") is None:
        monkeypatch.setattr("hf_kprune.latency.timing.PATIENCE", 0.0)


@pytest.fixture(scope="session")
def pack() -> Path:
    from data import PACK

    if not PACK.is_dir():
        pytest.skip(f"no evaluation pack at {PACK}; set HF_KPRUNE_PACK")
    return PACK
