"""Run by test_checkpoint.py: stop `save_model` at every one of its file operations, in a forked child each, by SIGKILL or
by an exception, and look at what is left.

    python tests/kill_while_saving.py FOLDER        prints, as JSON, how often each state was found
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).parent))

from test_checkpoint import files, pruned, report, tokenizer

from hf_kprune import KPruneArguments, KPrunePruner


NOT_REACHED, FAILED, BROKEN = 3, 4, 5


def in_a_child(action: Callable[[], int | None]) -> int:
    """Exit status of a fork that runs `action` and returns what it returns; negative for a signal."""
    child = os.fork()
    if child == 0:
        try:
            os._exit(action() or 0)
        except OSError as error:
            if "no space left" in str(error):
                os._exit(FAILED)
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
        writes = event == "open" and isinstance(arguments[1], str) or event in ("os.rename", "os.mkdir", "shutil.copyfile")
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


def main() -> None:
    folder = Path(sys.argv[1]).resolve()
    out = folder / "work" / "out"
    arguments = KPruneArguments(output_dir=str(out), overwrite_output_dir=True, disable_tqdm=True)
    pruner = KPrunePruner(pruned(), arguments, processing_class=tokenizer())
    pruner.report = report()
    assert in_a_child(lambda: pruner.save_model(str(folder / "reference"))) == 0
    whole, old = files(folder / "reference"), {"config.json": b"old", "other.txt": b"old too"}
    found: dict[str, Counter[str]] = {}
    for mode, start in (("kill", "absent"), ("kill", "present"), ("error", "present")):
        outcomes = found[f"{mode}, {start}"] = Counter()
        before = old if start == "present" else {}
        for moment in range(1, 1000):
            shutil.rmtree(folder / "work", ignore_errors=True)
            (folder / "work").mkdir()
            for name, content in before.items():
                out.mkdir(exist_ok=True)
                (out / name).write_bytes(content)

            def save(moment: int = moment, mode: str = mode) -> int:
                operations = stop_at(moment, mode, folder)
                pruner.save_model()
                return NOT_REACHED if operations() < moment else 0

            code, now = in_a_child(save), files(out)
            assert code in (0, FAILED, NOT_REACHED, -signal.SIGKILL), (mode, start, moment, code)
            assert now in (before, whole, {}), (mode, start, moment, sorted(now))
            outcomes["after" if now == whole else "before" if now == before else "absent"] += 1
            left = [name for name in os.listdir(folder / "work") if name != "out"]
            assert all(name.startswith(".out.") and name.endswith(".tmp") for name in left)
            if mode == "error":  # 0: whoever was told of the error could do without
                assert now == (before if code == FAILED else whole), (start, moment, code)
                assert not left, (start, moment, left)
            if code == NOT_REACHED:
                break
    print(json.dumps(found))


if __name__ == "__main__":
    main()
