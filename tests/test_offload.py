"""Models that accelerate has spread over memory and disk: pruned, saved and used as those in memory."""

from __future__ import annotations

import copy
import gc
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module
from checks import assert_same_state, kept
from data import collate, rows
from models import slow_unless_in
from safetensors.torch import save_file
from transformers import PreTrainedModel
from zoo import DISTINCT, ZOO, make, outputs_of

from hf_kprune import ArgumentError, KPruneArguments, KPrunePruner, PruningReport, UnsupportedModelError
from hf_kprune.structure.offload import Folder, device_map
from hf_kprune.structure.sublayers import find_sublayers
from hf_kprune.structure.workbench import (
    APART,
    LARGEST,
    MMAP_THRESHOLD,
    TRIM_THRESHOLD,
    large_tensors_apart,
    leave_workbench,
    on_workbench,
    words_of,
)


pytestmark = pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")

OPTIONS: dict[str, Any] = {
    "sparsity": 0.4,
    "num_tokens": 150,
    "num_measure_tokens": 80,
    "disable_tqdm": True,
    "use_cpu": True,
}


def spread(folder: Path, model: PreTrainedModel, everything: bool = False, **options: Any) -> PreTrainedModel:
    """A saved model with its layers on disk, all but the lowest, or with everything there."""
    stacks = {id(s.layers): s.layers for s in find_sublayers(model)}.values()
    places = device_map(model, stacks, "disk", "disk" if everything else "cpu")
    for sublayer in find_sublayers(model):
        name = next(name for name, module in model.named_modules() if module is sublayer.layers)
        places[f"{name}.0"] = "disk" if everything else "cpu"
    return type(model).from_pretrained(
        folder / "dense", device_map=places, offload_folder=folder / "offload", **options
    )


def prune(model: PreTrainedModel, **options: Any) -> tuple[KPrunePruner, PruningReport]:
    pruner = KPrunePruner(model, KPruneArguments(**{**OPTIONS, **options}), rows(40, longest=9), collate)
    return pruner, pruner.prune()


CASES = [
    ("llama", "surgeon", torch.bfloat16, False),
    ("bert", "kprune", torch.float32, True),
    ("gpt2", "magnitude", torch.float16, True),
    ("mixtral", "surgeon", torch.float32, False),
    ("gpt_oss", "kprune", torch.bfloat16, True),
    ("gemma2", "surgeon", torch.bfloat16, True),
]


@pytest.mark.parametrize(("name", "method", "dtype", "everything"), slow_unless_in(CASES[:1], CASES))
def test_pruned_on_disk_is_pruned_in_memory(
    name: str, method: str, dtype: torch.dtype, everything: bool, tmp_path: Path
) -> None:
    model = make(name).to(dtype)
    model.save_pretrained(tmp_path / "dense")
    on_disk = spread(tmp_path, model, everything, dtype=dtype)
    assert any(tensor.device.type == "meta" for tensor in on_disk.parameters())
    in_memory, expected = prune(type(model).from_pretrained(tmp_path / "dense", dtype=dtype), method=method)
    pruner, report = prune(on_disk, method=method)
    assert kept(report) == kept(expected)
    assert report.trials == expected.trials
    inputs = {"input_ids": torch.randint(4, 60, (2, 9), generator=torch.Generator().manual_seed(0))}
    with torch.no_grad():
        outputs = [each.model.eval()(**inputs).logits for each in (pruner, in_memory)]
    assert torch.equal(*outputs)
    for each, folder in ((pruner, "spread"), (in_memory, "whole")):
        each.save_model(str(tmp_path / folder))
    kind = type(model)
    one, other = (kind.from_pretrained(tmp_path / folder, dtype=dtype) for folder in ("spread", "whole"))
    assert_same_state(one.state_dict(), other.state_dict())


@pytest.mark.slow
def test_a_layer_that_the_checkpoint_lacks_is_refused_by_name(tmp_path: Path) -> None:
    model, absent = make("llama"), "model.layers.1.mlp.down_proj.weight"
    model.save_pretrained(tmp_path / "dense")
    weights = {name: tensor for name, tensor in model.state_dict().items() if name != absent}
    save_file(weights, tmp_path / "dense" / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ArgumentError, match=f"no weights for 1 tensors of layers.*{absent}.*leave offload out"
    ):
        KPrunePruner(str(tmp_path / "dense"), KPruneArguments(**OPTIONS), offload="disk")
    with pytest.raises(
        UnsupportedModelError, match=f"{absent} is neither in memory nor .* without a device_map"
    ):
        prune(spread(tmp_path, model))


@pytest.mark.parametrize("name", slow_unless_in(["llama"], dict.fromkeys(["llama", *DISTINCT])))
def test_a_model_of_16_bits_computes_in_float32_while_its_words_stay_as_they_are(name: str) -> None:
    model, kind = make(name, dtype=torch.bfloat16), ZOO[name][2]
    student = on_workbench(model, find_sublayers(model), torch.device("cpu"))
    assert all(table.weight.dtype == torch.bfloat16 for table in words_of(student)[0])
    assert torch.equal(outputs_of(student, kind), outputs_of(copy.deepcopy(model).float(), kind))
    leave_workbench(student)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in student.modules())


@pytest.mark.slow
def test_a_model_that_is_left_on_disk_is_planned_evaluated_pruned_twice_and_saved(tmp_path: Path) -> None:
    make("bert").save_pretrained(tmp_path / "dense")
    data = [{**row, "labels": i % 2} for i, row in enumerate(rows(40, longest=9))]
    args = KPruneArguments(**OPTIONS, report_to=["none"])
    on_disk, in_memory = (
        KPrunePruner(tmp_path / "dense", args, data, collate, data, offload=place) for place in ("disk", None)
    )
    assert {tensor.device.type for tensor in on_disk.model.parameters()} == {"cpu", "meta"}
    assert kept(on_disk.plan()) == kept(in_memory.plan())
    for _ in range(2):
        assert kept(on_disk.prune()) == kept(in_memory.prune())
        one, other = (
            {name: value for name, value in each.evaluate().items() if name in ("eval_loss", "eval_accuracy")}
            for each in (on_disk, in_memory)
        )
        assert one == other
    assert {tensor.device.type for tensor in on_disk.model.parameters()} == {"cpu", "meta"}
    for each, folder in ((on_disk, "spread"), (in_memory, "whole")):
        each.save_model(str(tmp_path / folder))
    one, other = (type(in_memory.model).from_pretrained(tmp_path / folder) for folder in ("spread", "whole"))
    assert_same_state(one.state_dict(), other.state_dict())
    again = KPrunePruner(tmp_path / "spread", args, data, collate, offload="disk")
    assert again.prune().sparsity == pytest.approx(0.4, abs=0.1)


@pytest.mark.parametrize(
    ("options", "offload", "message"),
    [
        (
            {"target_speedup": 1.5},
            "disk",
            "target_speedup is about the time of a model that lies on one device",
        ),
        ({}, "gpu", "offload is 'gpu', expected 'cpu' or 'disk' or None"),
    ],
)
def test_what_cannot_be_offloaded_is_said(
    options: dict[str, Any], offload: Any, message: str, tmp_path: Path
) -> None:
    make("bert").save_pretrained(tmp_path / "dense")
    args = KPruneArguments(**{"disable_tqdm": True, "use_cpu": True, "num_tokens": 150, **options})
    with pytest.raises(ArgumentError, match=message):
        KPrunePruner(tmp_path / "dense", args, rows(40), collate, offload=offload).prune()


def test_a_model_in_memory_is_not_offloaded() -> None:
    with pytest.raises(ArgumentError, match="offload is 'disk', which is about a model that is loaded here"):
        KPrunePruner(make("bert"), KPruneArguments(use_cpu=True), rows(40), offload="disk")


@pytest.mark.parametrize("case", ["offloaded by hand", "another hook"])
def test_hooks_that_are_not_of_a_device_map_are_refused(case: str) -> None:
    model = make("bert")
    if case == "offloaded by hand":
        cpu_offload(model)
    else:
        add_hook_to_module(model.bert.encoder.layer[0], ModelHook())
        model.hf_device_map = {"": "cpu"}
    with pytest.raises(
        UnsupportedModelError, match="carries a hook of accelerate that is not of a device_map"
    ):
        KPrunePruner(model, KPruneArguments(use_cpu=True), rows(40))


@pytest.mark.parametrize("method", slow_unless_in(["surgeon"], ["surgeon", "kprune"]))
def test_states_in_files_are_states_in_memory_and_leave_nothing_behind(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_memory, _ = prune(make("bert"), method=method)
    monkeypatch.setattr("hf_kprune.structure.shelf.MEMORY", 0)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    paths = list[Path]()

    def note(folder: Folder) -> Path:
        paths.append(place(folder))
        return paths[-1]

    place = Folder.place
    monkeypatch.setattr(Folder, "place", note)
    in_files, _ = prune(make("bert"), method=method)
    assert_same_state(in_files.model.state_dict(), in_memory.model.state_dict())
    del in_files
    gc.collect()
    assert paths
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="a process cannot be killed so there")
def test_the_files_of_a_killed_process_are_removed_by_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("hf_kprune.files.scratch.FRESH", 0.0)
    not_ours = tmp_path / "hf_kprune-of-somebody"
    not_ours.mkdir()
    alive = Folder()
    alive.write({"x": torch.ones(3)})
    child = os.fork()
    if child == 0:
        lost = Folder()
        lost.write({"y": torch.ones(3)})
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert len(list(tmp_path.glob("hf_kprune-*/*/*.safetensors"))) == 2
    child = os.fork()
    if (
        child == 0
    ):  # what ends in a proper way takes away its files, and none of the process that it is a fork of
        other = Folder()
        other.write({"z": torch.ones(3)})
        del other
        os._exit(len(list(tmp_path.iterdir())))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
    assert len(list(tmp_path.glob("hf_kprune-*/*/*.safetensors"))) == 1
    del alive
    gc.collect()
    assert list(tmp_path.iterdir()) == [not_ours]


@pytest.mark.parametrize(
    "chosen", ["", "MALLOC_MMAP_THRESHOLD_=65536", "GLIBC_TUNABLES=glibc.malloc.mmap_threshold=65536"]
)
def test_large_tensors_are_given_back_at_once_unless_the_user_has_chosen(
    chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, int]] = []
    library = SimpleNamespace(mallopt=lambda *what: calls.append(what))
    monkeypatch.setattr("hf_kprune.structure.workbench.sys.platform", "linux")
    monkeypatch.setattr("hf_kprune.structure.workbench.ctypes.CDLL", lambda _: library)
    for name in ("MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    if chosen:
        monkeypatch.setenv(*chosen.split("=", 1))
    with large_tensors_apart():
        assert calls == ([] if chosen else [(MMAP_THRESHOLD, APART)])
    assert calls[1:] == ([] if chosen else [(MMAP_THRESHOLD, LARGEST), (TRIM_THRESHOLD, 2 * LARGEST)])
