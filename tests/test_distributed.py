"""One process == many: the same plan, the same weights to rounding, and no process is left waiting for another."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch


SCRIPT = Path(__file__).with_name("distributed_prune.py")


def launch(
    processes: int, out: Path, *arguments: str, accelerate: bool = False, timeout: float = 500
) -> subprocess.CompletedProcess[str]:
    out.mkdir()
    count = str(processes)
    launcher = (
        [
            "accelerate.commands.launch",
            "--multi_gpu",
            "--num_processes",
            count,
            "--num_machines",
            "1",
        ]  # --cpu starts one
        if accelerate
        else ["torch.distributed.run", "--nproc_per_node", count]
    )
    command = [
        sys.executable,
        *(["-m", *launcher] if processes > 1 else []),
        str(SCRIPT),
        str(out),
        *arguments,
    ]
    port = str(29500 + os.getpid() % 1000)
    command += ["--world_size", count]  # which the script asserts
    env = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "MASTER_PORT": port}
    env["PYTHONPATH"] = os.pathsep.join([str(SCRIPT.parents[1]), env.get("PYTHONPATH", "")])
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=env, start_new_session=True, **pipes) as process:
        try:
            printed, error = process.communicate(timeout=timeout)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)  # the launcher and all that it has started
            raise
    return subprocess.CompletedProcess(command, process.returncode, printed, error)


def result(done: subprocess.CompletedProcess[str], out: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((out / "plan.json").read_text()), torch.load(out / "weights.pt")


def check_same(one: Any, many: Any, atol: float = 1e-5) -> None:
    assert one[0] == many[0]
    assert one[1].keys() == many[1].keys()
    for name, value in one[1].items():
        torch.testing.assert_close(many[1][name], value, rtol=1e-4, atol=atol)


def test_one_process_equals_two_and_three_with_uneven_shards(tmp_path: Path) -> None:
    """31 rows: 16 + 15 and 11 + 10 + 10. Only the main process prints, so its lines come once."""
    done = launch(1, tmp_path / "1")
    one = result(done, tmp_path / "1")
    lines = [line for line in done.stdout.splitlines() if ": kept " in line]
    assert len(lines) == len(one[0]["kept"])
    for processes, accelerate in ((2, True), (3, False)):
        out = tmp_path / str(processes)
        done = launch(processes, out, accelerate=accelerate)
        check_same(one, result(done, out))
        assert len([line for line in done.stdout.splitlines() if ": kept " in line]) == len(lines)
        assert (out / "model" / "model.safetensors").exists()


def test_a_process_without_rows_takes_part(tmp_path: Path) -> None:
    arguments = ("bert", "--rows", "2", "--ridge", "0.1")
    one = result(launch(1, tmp_path / "1", *arguments), tmp_path / "1")
    check_same(one, result(launch(3, tmp_path / "3", *arguments), tmp_path / "3"))


@pytest.mark.parametrize("late", [[], ["--fail_late"]], ids=["at the start", "in the middle"])
def test_a_failure_on_one_process_ends_all_with_its_message(tmp_path: Path, late: list[str]) -> None:
    done = launch(2, tmp_path / "2", "bert", "--fail", "1", *late)
    assert done.returncode != 0
    assert "RuntimeError: the disk of this process is gone" in done.stderr
    assert not (tmp_path / "2" / "model").exists()


def test_processes_with_different_weights_or_options_are_refused(tmp_path: Path) -> None:
    for arguments, message in (
        (["--seeds"], "processes 0 and 1 hold different models .* such as classifier"),
        (["--sparsities"], "sparsity is 0.6 on process 0 and 0.5 on process 1"),
    ):
        out = tmp_path / arguments[0]
        done = launch(2, out, "bert", *arguments)
        assert done.returncode != 0
        assert re.search(f"ArgumentError: {message}", done.stderr), done.stderr[-3000:]
        assert not (out / "model").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--raise_before"], "RuntimeError: this process raises before all others wait"),
        (["--die"], "exitcode *: 7|waited for another one that has ended"),
    ],
    ids=["raises before the first collective", "dies in the middle"],
)
def test_a_process_that_is_gone_ends_the_others(tmp_path: Path, arguments: list[str], message: str) -> None:
    done = launch(2, tmp_path / "2", "bert", *arguments)
    assert done.returncode != 0
    assert re.search(message, done.stderr), done.stderr[-3000:]
    assert not (tmp_path / "2" / "model").exists()


def test_a_process_without_a_launcher_says_that_the_other_one_is_gone(tmp_path: Path) -> None:
    """Nothing watches over them: the connection alone tells."""
    port, out = str(29500 + os.getpid() % 1000), tmp_path / "2"
    out.mkdir()
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "MASTER_PORT": port,
        "MASTER_ADDR": "localhost",
    }
    env |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "PYTHONPATH": str(SCRIPT.parents[1])}
    command = [sys.executable, str(SCRIPT), str(out), "bert", "--die", "--world_size", "2"]
    processes = [
        subprocess.Popen(
            command, env=env | {"RANK": rank, "LOCAL_RANK": rank}, stderr=subprocess.PIPE, text=True
        )
        for rank in ("0", "1")
    ]
    try:
        _, error = processes[0].communicate(timeout=240)
        processes[1].communicate(timeout=240)
    finally:
        for process in processes:
            process.kill()
    assert processes[1].returncode == 7
    assert "process 0 waited for another one that has ended" in error


def test_rows_shared_out_beforehand_are_refused(tmp_path: Path) -> None:
    done = launch(2, tmp_path / "2", "bert", "--split")
    assert done.returncode != 0
    assert "the processes drew different calibration rows" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("processes", [2, 3])
def test_one_process_equals_many_on_a_real_model(tmp_path: Path, pack: Path, processes: int) -> None:
    """K-prune: of a thousand neurons, ours finds many as good as others, and rounding chooses among them."""
    arguments = ("pack", "--method", "kprune")
    one = result(launch(1, tmp_path / "1", *arguments), tmp_path / "1")
    check_same(one, result(launch(processes, tmp_path / "many", *arguments), tmp_path / "many"), atol=1e-4)
