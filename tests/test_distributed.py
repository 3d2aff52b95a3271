"""One process == many: the same plan, the same weights to rounding, and no process is left waiting for another."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_prune import run_as
from forks import fork, free_port, join
from models import slow_unless_in


SCRIPT = Path(__file__).with_name("distributed_prune.py")
BERT = ("bert",)


@dataclass
class Ended:
    """What processes have left: the exit codes, and what all of them printed."""

    codes: list[int]
    printed: str
    errors: str


def run(processes: int, out: Path, *arguments: str, timeout: float = 240) -> Ended:
    """Run the script in processes that no launcher watches over: each has to notice by itself that another is gone."""
    out.mkdir()
    counted, port = [*arguments, "--world_size", str(processes)], free_port()
    codes = join(
        [fork(run_as, rank, port, str(out), counted, out=out, name=str(rank)) for rank in range(processes)],
        timeout,
    )
    text = [
        "".join((out / f"{name}.{rank}").read_text() for rank in range(processes))
        for name in ("stdout", "stderr")
    ]
    return Ended(codes, *text)


def launch(launcher: list[str], processes: int, out: Path, *arguments: str, timeout: float = 500) -> Ended:
    """Run the script by a launcher, as users do."""
    out.mkdir()
    count = str(processes)
    command = [sys.executable, "-m", *launcher, str(SCRIPT), str(out), *arguments, "--world_size", count]
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "MASTER_PORT": str(free_port()),
    }
    env["PYTHONPATH"] = os.pathsep.join([str(SCRIPT.parents[1]), env.get("PYTHONPATH", "")])
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=env, start_new_session=True, **pipes) as process:
        try:
            printed, errors = process.communicate(timeout=timeout)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)  # the launcher and all that it has started
            raise
    return Ended([process.returncode], printed, errors)


ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"]  # --cpu starts one process
TORCHRUN = ["torch.distributed.run"]


def result(ended: Ended, out: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    assert not any(ended.codes), ended.errors[-3000:]
    return json.loads((out / "plan.json").read_text()), torch.load(out / "weights.pt")


def check_same(one: Any, many: Any, atol: float = 1e-5) -> None:
    assert one[0] == many[0]
    assert one[1].keys() == many[1].keys()
    for name, value in one[1].items():
        torch.testing.assert_close(many[1][name], value, rtol=1e-4, atol=atol)


def check_failed(ended: Ended, out: Path, message: str) -> None:
    assert any(ended.codes)
    assert re.search(message, ended.errors), ended.errors[-3000:]
    assert not (out / "model").exists()


@pytest.mark.several_splits
@pytest.mark.parametrize(
    ("processes", "launched"), slow_unless_in([(2, False)], [(2, False), (3, False), (2, True)])
)
def test_one_process_equals_two_and_three_with_uneven_shards(
    tmp_path: Path, processes: int, launched: bool
) -> None:
    """31 rows: 16 + 15 and 11 + 10 + 10. Only the main process prints, so its lines come once."""
    ended = run(1, tmp_path / "1")
    one = result(ended, tmp_path / "1")
    assert ended.printed.count(": kept ") == len(one[0]["kept"]) == 4
    out = tmp_path / "many"
    launcher = [*ACCELERATE, "--num_processes", str(processes)]
    ended = launch(launcher, processes, out) if launched else run(processes, out)
    check_same(one, result(ended, out))
    assert ended.printed.count(": kept ") == 4
    assert (out / "model" / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [("--method", "surgeon"), ("--method", "kprune"), ("--target_params", "9000")]
)
def test_processes_prune_experts_together(tmp_path: Path, options: tuple[str, str]) -> None:
    arguments = ("mixtral", *options, "--ridge", "0.1")
    one = result(run(1, tmp_path / "1", *arguments), tmp_path / "1")
    check_same(one, result(run(2, tmp_path / "2", *arguments), tmp_path / "2"))


def test_a_process_without_rows_takes_part(tmp_path: Path) -> None:
    arguments = (*BERT, "--rows", "2", "--ridge", "0.1")
    one = result(run(1, tmp_path / "1", *arguments), tmp_path / "1")
    check_same(one, result(run(3, tmp_path / "3", *arguments), tmp_path / "3"))


@pytest.mark.slow
@pytest.mark.several_splits
@pytest.mark.parametrize("method", ["kprune", "surgeon"])
def test_processes_that_were_interrupted_go_on_together(tmp_path: Path, method: str) -> None:
    arguments = (*BERT, "--method", method)
    at_once = result(run(2, tmp_path / "2", *arguments), tmp_path / "2")
    resume = (*arguments, "--resume", str(tmp_path / "states"))
    ended = run(2, tmp_path / "until 2", *resume, "--stop_after", "2")
    assert 7 in ended.codes, ended.errors[-3000:]
    assert ended.printed.count(": kept ") <= 2
    refused = run(1, tmp_path / "1", *resume)
    check_failed(refused, tmp_path / "1", "number of processes is 1 and was 2 then")
    ended = run(2, tmp_path / "on", *resume)
    plan, weights = result(ended, tmp_path / "on")
    assert ended.printed.count(": kept ") == 2
    assert plan == at_once[0]
    assert all(torch.equal(weights[name], value) for name, value in at_once[1].items())


FAILURES = {
    "a failure at the start": (["--fail", "1"], "RuntimeError: the disk of this process is gone"),
    "a failure in the middle": (
        ["--fail", "1", "--fail_late"],
        "RuntimeError: the disk of this process is gone",
    ),
    "different weights": (
        ["--seeds"],
        "ArgumentError: processes 0 and 1 hold different models .* such as classifier",
    ),
    "different options": (
        ["--sparsities"],
        "ArgumentError: sparsity is 0.6 on process 0 and 0.5 on process 1",
    ),
    "rows shared out beforehand": (["--split"], "the processes drew different calibration rows"),
    "raises before the first collective": (
        ["--raise_before"],
        "RuntimeError: this process raises before all others wait",
    ),
    "dies in the middle": (["--die"], "process 0 waited for another one that has ended"),
}


@pytest.mark.parametrize(
    "failure",
    slow_unless_in(("a failure in the middle", "different options", "dies in the middle"), FAILURES),
)
def test_what_goes_wrong_on_one_process_ends_all(tmp_path: Path, failure: str) -> None:
    arguments, message = FAILURES[failure]
    ended = run(2, tmp_path / "2", *BERT, *arguments)
    assert all(ended.codes), "a process ended as if nothing had happened"
    check_failed(ended, tmp_path / "2", message)
    if failure == "dies in the middle":
        assert ended.codes[1] == 7


@pytest.mark.slow
def test_a_launcher_ends_all_too(tmp_path: Path) -> None:
    ended = launch([*TORCHRUN, "--nproc_per_node", "2"], 2, tmp_path / "2", *BERT, "--die")
    check_failed(ended, tmp_path / "2", "exitcode *: 7|waited for another one that has ended")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_one_process_equals_many_on_a_real_model(tmp_path: Path, pack: Path) -> None:
    """K-prune: of a thousand neurons, ours finds many as good as others, and rounding chooses among them."""
    arguments = ("pack", "--method", "kprune")
    one = result(run(1, tmp_path / "1", *arguments, timeout=900), tmp_path / "1")
    many = result(run(2, tmp_path / "2", *arguments, timeout=900), tmp_path / "2")
    check_same(one, many, atol=1e-4)
