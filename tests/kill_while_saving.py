"""Run by test_saving.py: stop `save_model` at every one of its file operations, in a forked child each, by SIGKILL or by an
exception, look at what is left, and at what the next load and the next save make of it.

    python tests/kill_while_saving.py FOLDER "kill, absent" ...    prints, as JSON, how often each state was found
    python tests/kill_while_saving.py FOLDER 100 0    kills that many prunings and savings at moments drawn from a seed
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).parent))

import torch
from checks import files, report
from data import collate, rows, tokenizer
from models import pruned_layer, tiny
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification

from hf_kprune import ArgumentError, CheckpointError, KPruneArguments, KPrunePruner
from hf_kprune.files.contents import workplaces
from hf_kprune.files.exchange import aside


NOT_REACHED, FAILED, BROKEN = 3, 4, 5


def in_a_child(action: Callable[[], int | None]) -> int:
    """Exit status of a fork that runs `action` and returns what it returns; negative for a signal."""
    child = os.fork()
    if child == 0:
        try:
            os._exit(action() or 0)
        except (ArgumentError, CheckpointError) as error:
            cause: BaseException | None = error
            while (
                cause is not None
            ):  # what went wrong may be told in words of the file that was to be written
                if "no space left" in str(cause):
                    os._exit(FAILED)
                cause = cause.__cause__
            traceback.print_exc()
        except BaseException:
            traceback.print_exc()
        os._exit(BROKEN)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def stop_at(moment: int, mode: str, folder: Path) -> Callable[[], int]:
    """From now on, count the file operations in `folder`; at number `moment`, kill this process or raise once.

    Returns a function that tells how many there were.
    """
    counted = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal counted
        opens = event == "open" and isinstance(arguments[1], str) and not arguments[1].startswith("r")
        writes = opens or event in ("os.rename", "os.mkdir", "shutil.copyfile")
        cleans = event in ("os.remove", "os.rmdir")
        if not (writes or cleans and mode == "kill") or not str(arguments[0]).startswith(str(folder)):
            return
        counted += 1
        if counted == moment:
            if mode == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError("no space left")

    sys.addaudithook(hook)
    return lambda: counted


STARTS: dict[str, dict[str, bytes]] = {  # and what lies beside the old checkpoint
    "absent": {},
    "a checkpoint": {},
    "a checkpoint and more": {"notes.txt": b"precious", "data/rows.csv": b"precious too"},
}


def begin(out: Path, content: dict[str, bytes]) -> None:
    """Make `out` hold this, and nothing else be near it."""
    shutil.rmtree(out.parent, ignore_errors=True)
    out.parent.mkdir()
    for name, data in content.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(data)


def at_every_operation(
    folder: Path, pruner: KPrunePruner, old: dict[str, bytes], runs: list[str]
) -> dict[str, Counter[str]]:
    """How often each state was found, for each of `runs`: `kill` or `error`, one of `STARTS`, and at every how many-th
    operation, with commas between them.
    """
    out = folder / "work" / "out"
    assert in_a_child(lambda: pruner.save_model(str(folder / "reference"))) == 0
    new = files(folder / "reference")
    counts: dict[str, Counter[str]] = {}
    for run in runs:
        mode, start, *step = run.split(", ")
        outcomes = counts[run] = Counter()
        more = STARTS[start]
        before = {} if start == "absent" else {**old, **more}
        after = {**new, **more}
        for moment in range(1, 1000, *map(int, step)):
            begin(out, before)

            def save(moment: int = moment, mode: str = mode) -> int:
                operations = stop_at(moment, mode, folder)
                pruner.save_model()
                return NOT_REACHED if operations() < moment else 0

            code, now = in_a_child(save), content(out)
            assert code in (0, FAILED, NOT_REACHED, -signal.SIGKILL), (mode, start, moment, code)
            left = [name for name in os.listdir(out.parent) if name != "out"]
            assert len(left) <= 1, left
            assert all(name.startswith(".out.") and name.endswith(".tmp") for name in left)
            if mode == "error":  # 0: whoever was told of the error could do without
                assert now == (before if code == FAILED else after), (start, moment, code, sorted(now))
                assert not left, (start, moment, left)
            elif now not in (before, after):
                assert start == "a checkpoint and more", (start, moment, sorted(now))
                assert "config.json" not in now, (
                    moment,
                    sorted(now),
                )  # so that nobody takes it for a checkpoint
                assert {name: now.get(name) for name in more} == more, (moment, sorted(now))
                assert AutoConfig.from_pretrained(out).model_type == "bert"
                assert content(out) == after, (moment, sorted(content(out)))
                outcomes["completed"] += 1
            outcomes["after" if now == after else "before" if now == before else "between"] += 1
            if mode == "kill":
                with suppress(InterruptedError), aside(out):
                    raise InterruptedError  # of the next save this is all that concerns the last one
                assert files(out) in (before, after), (start, moment, sorted(files(out)))
                assert os.listdir(out.parent) == ["out"] or not files(out), (
                    start,
                    moment,
                    os.listdir(out.parent),
                )
            if code == NOT_REACHED:
                break
    return counts


def content(out: Path) -> dict[str, bytes]:
    """Files of a directory, without our own workplace."""
    return {name: data for name, data in files(out).items() if not name.split("/")[0].endswith(".tmp")}


def at_random(folder: Path, pruner: KPrunePruner, count: int, seed: int) -> Counter[str]:
    """Kill a process that prunes and saves so many times, in turn at any moment and while it saves."""
    out = folder / "work" / "out"
    draw, outcomes = random.Random(seed), Counter[str](old=0, new=0, completed=0)
    args = KPruneArguments(
        output_dir=str(out), overwrite_output_dir=True, disable_tqdm=True, use_cpu=True, method="magnitude"
    )

    def run() -> None:
        student = KPrunePruner(tiny(), args, rows(), data_collator=collate)
        student.prune()
        student.save_model()

    begin(out, {})
    since = time.perf_counter()
    pruner.save_model()
    saving, before = time.perf_counter() - since, files(out)
    begin(out, {})
    since = time.perf_counter()
    assert in_a_child(run) == 0
    span = time.perf_counter() - since
    new = AutoModelForSequenceClassification.from_pretrained(out).state_dict()
    old = pruner.model.state_dict()
    while outcomes["kills"] < count:
        start = list(STARTS)[outcomes["kills"] % len(STARTS)]
        begin(out, {} if start == "absent" else {**before, **STARTS[start]})
        when = "saving" if outcomes["saving"] < outcomes["pruning"] else "pruning"
        child = os.fork()
        if child == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            run()
            os._exit(0)
        while when == "saving" and not workplaces(out)[0].exists():
            time.sleep(0.0005)
        time.sleep(draw.random() * (1.2 * saving if when == "saving" else span))
        os.kill(child, signal.SIGKILL)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != -signal.SIGKILL:
            continue  # it was done before
        outcomes.update(("kills", when))
        between = out.exists() and "config.json" not in content(out)
        assert not between or start == "a checkpoint and more", (start, sorted(content(out)))
        if out.exists():
            left = AutoModelForSequenceClassification.from_pretrained(out).state_dict()
            assert same(left, new) or start != "absent" and same(left, old), (start, when)
            outcomes["completed" if between else "new" if same(left, new) else "old"] += 1
        else:
            assert start == "absent"
            outcomes["old"] += 1
        pruner.save_model()
        assert same(AutoModelForSequenceClassification.from_pretrained(out).state_dict(), old)
        assert os.listdir(out.parent) == ["out"], os.listdir(out.parent)
        assert not [name for name in os.listdir(out) if name.endswith(".tmp")]
        kept = {name: data for name, data in files(out).items() if name in STARTS["a checkpoint and more"]}
        assert kept == STARTS[start], (start, sorted(files(out)))
    return outcomes


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def main(words: list[str]) -> None:
    torch.set_num_threads(1)
    folder = Path(words[0]).resolve()
    arguments = KPruneArguments(
        output_dir=str(folder / "work" / "out"), overwrite_output_dir=True, disable_tqdm=True
    )
    pruner = KPrunePruner(pruned_layer(), arguments, processing_class=tokenizer())
    pruner.report = report()
    if words[1].isdecimal():
        print(json.dumps(at_random(folder, pruner, *map(int, words[1:]))))
        return
    tiny(seed=1).save_pretrained(folder / "old", max_shard_size="4KB")
    print(json.dumps(at_every_operation(folder, pruner, files(folder / "old"), words[1:])))


if __name__ == "__main__":
    main(sys.argv[1:])
