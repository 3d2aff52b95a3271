"""On a GPU: the same decisions and weights as on the CPU, and layers that wait in memory. Run with  pytest -m gpu."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import assert_same_state, kept
from data import Padding, calibration_rows, collate, rows
from transformers import PreTrainedModel
from zoo import DISTINCT, ZOO, make, outputs_of

from hf_kprune import CalibrationError, KPruneArguments, KPrunePruner, PruningReport
from hf_kprune.structure.offload import device_map
from hf_kprune.structure.sublayers import find_sublayers


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and -m gpu"),
    pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules"),
]

OPTIONS: dict[str, Any] = {"sparsity": 0.3, "num_tokens": 150, "disable_tqdm": True, "seed": 1}


def prune(
    model: PreTrainedModel, data: Any, collator: Any = None, **options: Any
) -> tuple[PreTrainedModel, PruningReport]:
    pruner = KPrunePruner(
        model, KPruneArguments(**OPTIONS | options), data, collator, processing_class=Padding()
    )
    pruner.callback_handler.callbacks.clear()
    report = pruner.prune()
    return pruner.model, report


@pytest.mark.parametrize(
    ("name", "method"), [*((name, "surgeon") for name in ZOO), *((name, "kprune") for name in DISTINCT)]
)
def test_pruned_on_a_gpu_is_pruned_on_the_cpu(name: str, method: str) -> None:
    if name == "yolos":
        pytest.skip("has a loss of its own")
    model, kind = make(name), ZOO[name][2]
    data = calibration_rows(model, kind, 40)
    expected, of_cpu = prune(copy.deepcopy(model), data, use_cpu=True, method=method)
    pruned, report = prune(model, data, method=method)
    assert {p.device.type for p in pruned.parameters()} == {"cuda"}
    assert "cuda" in report.device
    assert kept(report) == kept(of_cpu)
    outputs, wanted = outputs_of(pruned.cpu(), kind), outputs_of(expected, kind)
    scale = float(wanted.abs().max().clamp(min=1))
    torch.testing.assert_close(outputs, wanted, rtol=2e-3, atol=2e-3 * scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "mixtral"])
def test_layers_in_memory_are_pruned_as_on_the_gpu(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, data = make(name).to(dtype), rows(40, longest=9)
    model.save_pretrained(tmp_path / "dense")
    kind, dense = type(model), tmp_path / "dense"
    whole, expected = prune(kind.from_pretrained(dense, dtype=dtype), data, collate)
    stacks = {id(s.layers): s.layers for s in find_sublayers(model)}.values()
    spread = kind.from_pretrained(dense, device_map=device_map(model, stacks, "cpu", 0), dtype=dtype)
    assert {tensor.device.type for tensor in spread.parameters()} == {"cuda", "meta"}
    pruner = KPrunePruner(spread, KPruneArguments(**OPTIONS), data, collate)
    pruner.callback_handler.callbacks.clear()
    assert kept(pruner.prune()) == kept(expected)
    pruner.save_model(str(tmp_path / "pruned"))
    again = kind.from_pretrained(tmp_path / "pruned", dtype=dtype)
    assert_same_state(again.state_dict(), {key: value.cpu() for key, value in whole.state_dict().items()})


def test_states_of_a_gpu_wait_in_files(monkeypatch: pytest.MonkeyPatch) -> None:
    data = rows(40, longest=9)
    one, _ = prune(make("bert"), data, collate)
    monkeypatch.setattr("hf_kprune.structure.shelf.room_on", lambda _: 0)
    monkeypatch.setattr("hf_kprune.structure.walk.room_on", lambda _: 0)
    other, _ = prune(make("bert"), data, collate)
    assert_same_state(other.state_dict(), one.state_dict())


def test_a_gpu_plans_sweeps_evaluates_resumes_and_saves(tmp_path: Path) -> None:
    data = [{**row, "labels": i % 2} for i, row in enumerate(rows(60, longest=9))]
    args = KPruneArguments(**OPTIONS, report_to=["none"], output_dir=str(tmp_path / "run"))
    pruner = KPrunePruner(make("bert"), args, data, collate, data)
    plan = pruner.plan()
    assert plan.expected_seconds
    results = pruner.sweep([0.3, 0.5])
    assert len(results.points) == 3
    before = pruner.evaluate()
    report = pruner.prune(resume_from_checkpoint=True)
    assert report.sparsity >= 0.3
    assert report.peak_memory > 0
    assert torch.cuda.get_device_name() in report.to_json()
    after = pruner.evaluate()
    assert before.keys() == after.keys()
    pruner.save_model(str(tmp_path / "pruned"))
    again = type(pruner.model).from_pretrained(tmp_path / "pruned").cuda().eval()
    inputs = {key: value.cuda() for key, value in collate(rows(4)).items()}
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, pruner.model.eval()(**inputs).logits)


def test_a_time_on_a_gpu_is_a_budget() -> None:
    data = rows(60, longest=9)
    args = KPruneArguments(target_speedup=1.05, num_tokens=150, disable_tqdm=True)
    pruner = KPrunePruner(make("bert"), args, data, collate)
    pruner.callback_handler.callbacks.clear()
    try:
        report = pruner.prune()
    except ValueError as error:  # launches take all the time of so small a model
        assert "speed" in str(error)  # noqa: PT017
    else:
        assert report.sparsity > 0


def test_what_does_not_fit_on_the_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (1000, 80 * 2**30))
    with pytest.raises(CalibrationError, match="are free on cuda"):
        prune(make("bert"), rows(40, longest=9), collate)
