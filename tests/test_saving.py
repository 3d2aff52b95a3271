"""Where checkpoints may be written, what is refused before any work, and that nothing is lost whatever happens."""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import stat
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from shutil import disk_usage
from types import SimpleNamespace
from typing import Any

import datasets
import kill_while_saving
import pytest
import torch
from checks import assert_same, files, report
from data import ROOT, collate, rows, tokenizer
from forks import printed_by
from models import pruned_layer, shallow, slow_unless_in
from transformers import AutoModelForSequenceClassification, GenerationConfig, PreTrainedModel
from zoo import make

from hf_kprune import ArgumentError, CheckpointError, KPruneArguments, KPruneCallback, KPrunePruner
from hf_kprune.checkpoint.saving import save_atomically
from hf_kprune.cli.terminal import main
from hf_kprune.files import exchange, workplace
from hf_kprune.files.contents import workplaces
from hf_kprune.files.exchange import aside
from hf_kprune.publication import write_beside
from hf_kprune.sizes import expected_bytes


def make_pruner(model: PreTrainedModel | None = None, **options: Any) -> KPrunePruner:
    pruner = KPrunePruner(
        model or pruned_layer(), KPruneArguments(disable_tqdm=True, use_cpu=True, **options)
    )
    pruner.processing_class = tokenizer()
    pruner.report = report()
    return pruner


def old_checkpoint(folder: Path) -> None:
    """A dense model in many files."""
    shallow(seed=1).save_pretrained(folder, max_shard_size="4KB")
    (folder / "README.md").write_text("---\nlicense: mit\n---\nA card.")


@contextmanager
def unchanged(folder: Path) -> Iterator[None]:
    """Check that nothing below `folder` changes."""
    before = {
        path: (path.lstat().st_mode, path.is_file() and path.read_bytes()) for path in folder.rglob("*")
    }
    yield
    assert before == {
        path: (path.lstat().st_mode, path.is_file() and path.read_bytes()) for path in folder.rglob("*")
    }


# ---------------------------------------------------------------------------------------------------------------------
# Nothing that is not ours is deleted or replaced
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Somebody's home, with the current directory in it."""
    home = tmp_path / "home"
    work = home / "projects" / "work"
    for folder in (work, home / "projects" / "data"):
        folder.mkdir(parents=True)
        (folder / "thesis.txt").write_text("precious")
    (tmp_path / "link to home").symlink_to(home)
    (tmp_path / "link to nothing").symlink_to(tmp_path / "volume")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "fifo")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(work)
    return tmp_path


REFUSED = {
    "": "expected the name of a directory",
    "  ": "expected the name of a directory",
    ".": "the current directory, and there is something in it",
    "./": "the current directory, and there is something in it",
    "../work": "the current directory, and there is something in it",
    "x/..": "the current directory, and there is something in it",
    "..": "a parent of the current directory",
    "../..": "the home directory",
    "{tmp}/home/": "the home directory",
    "{tmp}/link to home": "the home directory",
    "{tmp}": "a parent of the home directory",
    "/": "the root of the file system",
    "~": "in which only a shell expands ~",
    "~/pruned": "in which only a shell expands ~",
    "{tmp}/link to nothing": "is a symbolic link to .*volume', which does not exist",
    "{tmp}/link to nothing/pruned": "is a symbolic link to .*volume', which does not exist",
    "{tmp}/loop": "cannot write to",
    "{tmp}/fifo": "is no directory, expected a directory",
    "thesis.txt": "is a file, expected a directory",
    "thesis.txt/pruned": "thesis.txt' is no directory",
    "a\0b": "expected a string",
    "n" * 300: "its name is too long",
    "{tmp}/" + "/".join(["n" * 200] * 25): "its name is too long",
}


@pytest.mark.parametrize("path", REFUSED)
def test_places_where_no_checkpoint_belongs_are_refused(places: Path, path: str) -> None:
    with unchanged(places), pytest.raises(ArgumentError, match=REFUSED[path]):
        KPruneArguments(output_dir=path.format(tmp=places), overwrite_output_dir=True).check_output_dir()


@pytest.mark.parametrize("path", [b"out", 3, ["out"], True])
def test_what_is_no_path_is_refused(path: Any) -> None:
    with pytest.raises(ArgumentError, match="output_dir is .*, expected a (string|path as text)"):
        KPruneArguments(output_dir=path)
    with pytest.raises(ArgumentError, match="output_dir is .*, expected a (string|path as text)"):
        KPruneArguments(output_dir="out").check_output_dir(path)


def test_a_directory_with_nothing_in_it_is_written_wherever_it_is(
    places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (places / "empty").mkdir()
    monkeypatch.chdir(places / "empty")
    inode = os.stat(".").st_ino
    make_pruner().save_model(".")
    assert os.stat(places / "empty").st_ino == inode  # a shell that is there still is
    assert_same(AutoModelForSequenceClassification.from_pretrained("."), pruned_layer())
    make_pruner().save_model("x/../inside/")
    assert_same(
        AutoModelForSequenceClassification.from_pretrained(places / "empty" / "inside"), pruned_layer()
    )


@pytest.mark.parametrize("command", ["prune", "convert", "sweep"])
@pytest.mark.parametrize("path", ["", ".", ".."])
def test_the_command_line_does_not_replace_the_current_directory(
    places: Path, capsys: pytest.CaptureFixture[str], command: str, path: str
) -> None:
    shallow().save_pretrained(places / "dense")
    options = [
        "--model_name_or_path",
        str(places / "dense"),
        "--dataset_file",
        "thesis.txt",
        "--overwrite_output_dir",
    ]
    arguments = [str(places / "dense"), path] if command == "convert" else [*options, "--output_dir", path]
    capsys.readouterr()  # the bars of the save above
    with unchanged(places):
        assert main([command, *arguments]) == 2
    named = "output_dir" if command == "convert" else "--output_dir"
    assert capsys.readouterr().err.startswith(f"hf-kprune: error: {named} ")


def test_every_way_to_name_a_directory_refuses_the_empty_string(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pruner = make_pruner(output_dir=str(tmp_path / "out"))
    for save in (
        lambda: pruner.save_model(""),
        lambda: pruner.sweep([0.5], output_dir=""),
        lambda: pruner.create_model_card(output_dir=""),
    ):
        with pytest.raises(ArgumentError, match="output_dir is '', expected the name of a directory"):
            save()
    assert os.listdir(tmp_path) == []


FOREIGN = {
    ".git/config": b"[core]",
    "data/rows.csv": b"1,2",
    "notes.txt": b"mine",
    "1_Pooling/notes.txt": b"mine too",
    "lost+found/found": b"something",
    "checkpoint-500/model.safetensors": b"of a Trainer",
}


@pytest.mark.parametrize("kind", ["checkpoint", "no checkpoint"])
def test_foreign_files_stay_and_the_old_checkpoint_goes(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    make_pruner().save_model(str(tmp_path / "reference"))
    if kind == "checkpoint":
        old_checkpoint(out)
        (out / "modules.json").write_text(json.dumps([{"idx": 1, "path": "1_Pooling", "type": "...Pooling"}]))
    for name, content in FOREIGN.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(content)
    if kind == "checkpoint":
        (out / "1_Pooling" / "config.json").write_text("{}")
        (out / "kprune_report.html").write_text("a report in whatever format is the checkpoint's")
    (out / "link").symlink_to(tmp_path / "reference")
    with pytest.raises(ArgumentError, match="is not empty; name another or set overwrite_output_dir=True"):
        make_pruner().save_model(str(out))
    make_pruner(overwrite_output_dir=True).save_model(str(out))
    assert files(out) == {**FOREIGN, **files(tmp_path / "reference")}
    assert (out / "link").is_symlink()
    make_pruner(overwrite_output_dir=True).save_model(str(out))
    assert files(out) == {**FOREIGN, **files(tmp_path / "reference")}


CLASHES = {
    "a README that is no model card": ({"README.md": "# My project"}, True, "README.md"),
    "a config of something else": (
        {"config.json": '{"port": 80}', "src/main.c": "int"},
        False,
        "config.json",
    ),
    "a config that is no JSON": (
        {"config.json": "{", "model.safetensors": "x"},
        False,
        "config.json, model.safetensors",
    ),
    "a word list": ({"vocab.txt": "one\ntwo"}, False, "vocab.txt"),
    "weights alone": ({"model-00001-of-00002.safetensors": "x"}, False, "model-00001-of-00002.safetensors"),
    "an adapter": (
        {"adapter_config.json": "{}", "adapter_model.safetensors": "x"},
        False,
        "adapter_config.json",
    ),
    "a directory of that name": ({"tokenizer.json/1": "x"}, True, "tokenizer.json"),
}


@pytest.mark.parametrize("case", slow_unless_in(list(CLASHES)[::3], CLASHES))
def test_what_only_looks_like_a_checkpoint_is_not_replaced(tmp_path: Path, case: str) -> None:
    contents, beside_a_checkpoint, named = CLASHES[case]
    out = tmp_path / "out"
    if beside_a_checkpoint:
        shallow(seed=1).save_pretrained(out)
    for name, content in contents.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(content)
    pruner = make_pruner(overwrite_output_dir=True, output_dir=str(out))
    for attempt in (
        pruner.prune,
        pruner.save_model,
        lambda: save_atomically(pruner.model, str(out), "5GB", partial(write_beside, pruner)),
    ):
        with unchanged(tmp_path), pytest.raises(ArgumentError, match=f"holds {named}.* no checkpoint wrote"):
            attempt()


def test_a_file_that_nobody_foresaw_is_not_replaced_either(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "pooling.txt").write_text("mine")
    add = lambda folder: Path(folder, "pooling.txt").write_text("new")  # noqa: E731
    with (
        unchanged(tmp_path),
        pytest.raises(ArgumentError, match=r"holds pooling\.txt, which the checkpoint would replace"),
    ):
        save_atomically(pruned_layer(), str(out), "5GB", add)  # type: ignore[arg-type]


def test_what_both_checkpoints_carry_is_replaced_by_itself(tmp_path: Path) -> None:
    def add(folder: str) -> None:
        for name, content in {"code.py": "x = 1", "2_Dense/weights.txt": "0.5", "pooling.txt": text}.items():
            Path(folder, name).parent.mkdir(exist_ok=True)
            Path(folder, name).write_text(content)

    text = "mean"
    for _ in range(3):
        save_atomically(pruned_layer(), str(tmp_path / "out"), "5GB", add)
    assert (tmp_path / "out" / "code.py").read_text() == "x = 1"
    text = "cls"
    with (
        unchanged(tmp_path),
        pytest.raises(ArgumentError, match=r"holds pooling\.txt, which the checkpoint would replace"),
    ):
        save_atomically(pruned_layer(), str(tmp_path / "out"), "5GB", add)


@pytest.mark.parametrize("what", ["model", "tokenizer", "data"])
def test_what_is_read_is_not_replaced(tmp_path: Path, what: str) -> None:
    out = tmp_path / "all" / what
    shallow().save_pretrained(out)
    tokenizer().save_pretrained(out)
    data = [{"input_ids": [1, 2, 3]}] * 30
    if what == "data":
        datasets.Dataset.from_list(data).save_to_disk(out)
    pruner = make_pruner(
        AutoModelForSequenceClassification.from_pretrained(out) if what == "model" else None,
        overwrite_output_dir=True,
    )
    if what == "tokenizer":
        pruner.processing_class = type(tokenizer()).from_pretrained(out)
    pruner.calibration_dataset = datasets.load_from_disk(out) if what == "data" else data
    (tmp_path / "link").symlink_to(out)
    for path in (out, tmp_path / "link", out.parent):
        pruner.args.output_dir = str(path)
        for attempt in (pruner.prune, pruner.save_model):
            with unchanged(tmp_path), pytest.raises(ArgumentError, match="which is read in this run"):
                attempt()


# ---------------------------------------------------------------------------------------------------------------------
# Kills
# ---------------------------------------------------------------------------------------------------------------------


def kill(folder: Path, *arguments: str, timeout: int = 500) -> Any:
    """What kill_while_saving.py, in a process of its own, counted."""
    text = printed_by(kill_while_saving.main, [str(folder), *arguments], out=folder, timeout=timeout)
    return json.loads(text.splitlines()[-1])


@pytest.mark.parametrize(
    "runs",
    [
        ["kill, a checkpoint and more, 4"],
        pytest.param(
            [
                "kill, a checkpoint and more",
                "kill, a checkpoint",
                "error, a checkpoint and more",
                "kill, absent",
                "error, a checkpoint",
            ],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["every fourth", "every"],
)
def test_a_kill_or_an_error_at_any_moment_leaves_the_old_checkpoint_or_the_new(
    tmp_path: Path, runs: list[str]
) -> None:
    counted = kill(tmp_path, *runs)
    assert counted.keys() == set(runs)
    for run, outcomes in counted.items():
        assert outcomes["before"] >= (1 if run.endswith("4") else 5)
        assert outcomes["after"] >= 1
        if run.startswith("kill, a checkpoint and more"):
            assert outcomes["between"] == outcomes["completed"] > (2 if run.endswith("4") else 10)
        else:
            assert outcomes.keys() == {"before", "after"}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_thirty_kills_lose_nothing(tmp_path: Path) -> None:
    counted = kill(tmp_path, "30", "0", timeout=1700)
    assert counted["kills"] == 30
    assert min(counted["pruning"], counted["saving"]) > 7
    assert counted["old"] + counted["new"] + counted["completed"] == 30
    assert counted["old"] > 7


def test_a_process_that_lives_keeps_its_folder_and_a_dead_one_does_not(tmp_path: Path) -> None:
    out = tmp_path / "out"
    beside, _ = workplaces(out)
    stranger = tmp_path / ".out.mine.tmp"
    stranger.mkdir()
    with aside(out) as new:
        (new / "half").write_text("written")
        with (
            unchanged(tmp_path),
            pytest.raises(CheckpointError, match="is being written by another process; wait"),
        ):
            make_pruner().save_model(str(out))
        beside.rename(tmp_path / "copy")
        (tmp_path / "copy").rename(beside)
    assert not beside.exists()
    (beside / "new").mkdir(parents=True)  # nobody has locked it
    (beside / "new" / "half").write_text("written")
    make_pruner().save_model(str(out))
    assert {path.name for path in tmp_path.iterdir()} == {"out", stranger.name}


def test_a_plan_of_moves_that_leads_elsewhere_is_not_followed(tmp_path: Path) -> None:
    """Loading may complete a save, so a folder from somewhere must not make it move anything of this machine."""
    (tmp_path / "secret").write_text("key")
    out = tmp_path / "models" / "out"
    old_checkpoint(out)
    _, inside = workplaces(out)
    for name in ("../../secret", str(tmp_path / "secret"), 3):
        (inside / "new").mkdir(parents=True, exist_ok=True)
        (inside / workplace.READY).write_text(json.dumps({"old": [name], "new": []}))
        with pytest.raises(CheckpointError, match="is not what this program wrote"):
            AutoModelForSequenceClassification.from_pretrained(out)
    assert (tmp_path / "secret").read_text() == "key"


# ---------------------------------------------------------------------------------------------------------------------
# Directories that cannot be renamed; modes and owners
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "mode"),
    slow_unless_in(
        [("nothing", 0o700), ("a checkpoint", 0o1777), ("a checkpoint and more", 0o2775)],
        itertools.product(("nothing", "a checkpoint", "a checkpoint and more"), (0o2775, 0o700, 0o1777)),
    ),
)
def test_mode_and_owner_of_a_directory_stay(tmp_path: Path, mode: int, content: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    if content != "nothing":
        old_checkpoint(out)
    if content == "a checkpoint and more":
        (out / "notes.txt").write_text("mine")
    if os.geteuid() == 0:
        os.chown(out, 1234, 4321)
    out.chmod(mode)
    before = out.stat()
    make_pruner(overwrite_output_dir=True).save_model(str(out))
    after = out.stat()
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)
    if mode & stat.S_ISGID:
        assert {path.stat().st_gid for path in out.iterdir()} == {
            before.st_gid
        } or content == "a checkpoint and more"


def test_a_new_directory_has_the_mode_that_the_umask_leaves(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        make_pruner().save_model(str(tmp_path / "a" / "out"))
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a" / "out").stat().st_mode) == 0o750


@pytest.mark.parametrize(
    ("start", "code"),
    slow_unless_in(
        [("a checkpoint", "EXDEV"), ("absent", "EBUSY"), ("a checkpoint", None)],
        itertools.product(("absent", "a checkpoint"), ("EXDEV", "EBUSY", "EPERM", "EINVAL", None)),
    ),
)
def test_where_folders_cannot_be_exchanged_files_are_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str | None, start: str
) -> None:
    out = tmp_path / "out"
    if start != "absent":
        old_checkpoint(out)
    rename = os.rename

    def refuse(source: Any, place: Any) -> None:
        if code is not None and Path(place) == out:
            raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))
        rename(source, place)

    monkeypatch.setattr(os, "rename", refuse)
    monkeypatch.setattr(exchange, "rename_exchange", None)
    make_pruner(overwrite_output_dir=True).save_model(str(out))
    assert_same(AutoModelForSequenceClassification.from_pretrained(out), pruned_layer())
    assert len(list(out.glob("*.safetensors"))) == 1
    assert os.listdir(tmp_path) == ["out"]


def test_a_symbolic_link_to_a_directory_stays_one(tmp_path: Path) -> None:
    old_checkpoint(tmp_path / "runs" / "7")
    (tmp_path / "latest").symlink_to(Path("runs", "7"))
    make_pruner(overwrite_output_dir=True).save_model(str(tmp_path / "latest"))
    assert (tmp_path / "latest").is_symlink()
    assert_same(AutoModelForSequenceClassification.from_pretrained(tmp_path / "runs" / "7"), pruned_layer())
    assert os.listdir(tmp_path / "runs") == ["7"]


@contextmanager
def mounted(folder: Path, *options: str) -> Iterator[None]:
    """A file system in memory, or skip the test where that is not allowed."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(["mount", *options, str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"mounting is not allowed here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="mounts are made as on Linux")
@pytest.mark.parametrize("kind", slow_unless_in(("bind",), ("tmpfs", "bind")))
def test_a_mount_point_is_written_into(tmp_path: Path, kind: str) -> None:
    out, source = tmp_path / "model", tmp_path / "source"
    source.mkdir()
    with mounted(out, *(["--bind", str(source)] if kind == "bind" else ["-t", "tmpfs", "none"])):
        (out / "lost+found").mkdir()
        make_pruner().save_model(str(out))
        assert_same(AutoModelForSequenceClassification.from_pretrained(out), pruned_layer())
        make_pruner(overwrite_output_dir=True).save_model(str(out))
        assert_same(AutoModelForSequenceClassification.from_pretrained(out), pruned_layer())
        assert not list(out.glob(".*"))
    assert sorted(os.listdir(tmp_path)) == ["model", "source"]


def as_somebody(action: Callable[[], object]) -> int:
    """Exit status of a fork that is another user: 0, or 1 after an `ArgumentError`."""
    child = os.fork()
    if child == 0:
        status = 2
        try:
            os.setgroups([])
            os.setgid(1234)
            os.setuid(1234)
            action()
            status = 0
        except ArgumentError as error:
            status = 1 if "Permission denied; name another directory" in str(error) else 2
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="only root may become another user")
@pytest.mark.parametrize(
    ("parent", "owner", "mode"),
    slow_unless_in(
        [(0o555, 1234, 0o2750)], [(0o555, 1234, 0o2750), (0o1777, 999, 0o2775), (0o2775, 999, 0o2775)]
    ),
)
def test_directories_that_are_shared_with_others(parent: int, owner: int, mode: int) -> None:
    with tempfile.TemporaryDirectory() as name:  # others may not enter the folders of pytest
        folder, out = Path(name), Path(name, "out")
        out.mkdir()
        os.chown(folder, 0, 1234)
        os.chown(out, owner, 1234)
        out.chmod(mode)
        folder.chmod(parent)
        for _ in range(2):
            assert as_somebody(lambda: make_pruner(overwrite_output_dir=True).save_model(str(out))) == 0
            assert (out.stat().st_mode & 0o7777, out.stat().st_uid, out.stat().st_gid) == (mode, owner, 1234)
            assert (out / "config.json").exists()
            assert os.listdir(folder) == ["out"]
            assert not list(out.glob(".*"))
        folder.chmod(0o755)
        for closed in ("new", "new/out"):
            assert as_somebody(make_pruner(output_dir=str(folder / closed)).prune) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="mounts are made as on Linux")
def test_a_read_only_file_system_is_noticed_before_pruning(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "ro", "none"):
        pruner = make_pruner(output_dir=str(tmp_path / "disk" / "out"))
        with pytest.raises(
            ArgumentError, match="cannot write to .*/disk/out': its file system is read-only; name another"
        ):
            pruner.prune()


# ---------------------------------------------------------------------------------------------------------------------
# What is known before the work, and what is left when saving fails after it
# ---------------------------------------------------------------------------------------------------------------------


BUDGETS: dict[str, float] = {
    "sparsity": 0.5,
    "target_bytes": 40_000,
    "target_params": 10_000,
    "target_flops": 1e5,
}


@pytest.mark.parametrize("budget", BUDGETS)
def test_room_is_made_sure_of_before_pruning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: str
) -> None:
    free = 1_000
    monkeypatch.setattr(
        "shutil.disk_usage", lambda _: SimpleNamespace(total=10**9, used=10**9 - free, free=free)
    )
    pruner = make_pruner(shallow(), output_dir=str(tmp_path / "out"), **{budget: BUDGETS[budget]})
    for attempt in (pruner.prune, pruner.save_model):
        with (
            unchanged(tmp_path),
            pytest.raises(ArgumentError, match=r"takes about [\d,]+ bytes, 1,000 are free there; make"),
        ):
            attempt()
    free = 10**8
    pruner.save_model()


def test_what_a_model_will_take_is_foreseen(tmp_path: Path) -> None:
    for options in ({"sparsity": 0.5}, {"target_params": 8_000}, {"target_bytes": 32_000}):
        model = shallow()
        args = KPruneArguments(disable_tqdm=True, use_cpu=True, num_tokens=200, method="magnitude", **options)
        foreseen = expected_bytes(model, args)
        pruner = KPrunePruner(model, args, rows(), data_collator=collate)
        pruner.prune()
        pruner.save_model(str(tmp_path / next(iter(options))))
        written = sum(parameter.nbytes for parameter in pruner.model.parameters())
        assert foreseen == pytest.approx(written, rel=0.1), options


@pytest.mark.parametrize("size", ["", "5", "5 gigabytes", "GB", "-5GB", "0GB", "nanGB", "infGB"])
def test_a_shard_size_that_cannot_be_is_refused_at_once(size: str) -> None:
    with pytest.raises(
        ArgumentError, match="max_shard_size is .*, expected a number over 0 with TB, GB, MB or KB"
    ):
        KPruneArguments(max_shard_size=size)


@pytest.mark.parametrize(
    ("options", "environment", "message"),
    [
        ({}, {}, "there is no token: run hf auth login, set HF_TOKEN, or pass hub_token"),
        (
            {"hub_model_id": "a/b/c"},
            {"HF_TOKEN": "hf_x"},
            "hub_model_id is 'a/b/c', expected a name for a repository",
        ),
        ({"hub_model_id": ""}, {"HF_TOKEN": "hf_x"}, "hub_model_id is '', expected a name for a repository"),
        (
            {"output_dir": "my model!"},
            {"HF_TOKEN": "hf_x"},
            "the name of output_dir is 'my model!', expected a name",
        ),
        ({"hub_token": "hf_x"}, {"offline": "1"}, "HF_HUB_OFFLINE is set: unset it, or save without pushing"),
    ],
)
def test_a_push_that_cannot_succeed_is_refused_before_pruning(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, str],
    environment: dict[str, str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", "offline" in environment)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    pruner = make_pruner(**{"output_dir": "out", "push_to_hub": True, **options})
    for attempt in (pruner.prune, pruner.push_to_hub):
        with pytest.raises(ArgumentError, match=re.escape(message)):
            attempt()
    assert os.listdir(tmp_path) == []


def test_a_place_that_is_taken_is_noticed_after_pruning_and_another_will_do(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    args = KPruneArguments(disable_tqdm=True, use_cpu=True, num_tokens=200)
    pruner = KPrunePruner(shallow(), args, rows(), data_collator=collate)
    pruner.prune()
    state = {name: value.clone() for name, value in pruner.model.state_dict().items()}
    advice = r"; the pruned model is unharmed in memory, and save_model\('elsewhere'\) is all that is needed"
    with unchanged(tmp_path), pytest.raises(ArgumentError, match="is not empty; name another or .*" + advice):
        pruner.save_model(str(tmp_path / "taken"))
    assert all(torch.equal(value, state[name]) for name, value in pruner.model.state_dict().items())
    pruner.save_model(str(tmp_path / "elsewhere"))
    assert_same(AutoModelForSequenceClassification.from_pretrained(tmp_path / "elsewhere"), pruner.model)


@pytest.mark.slow
def test_a_generation_config_that_is_not_saved_is_refused_before_the_work(tmp_path: Path) -> None:
    pruner = KPrunePruner(make("llama"), KPruneArguments(output_dir=str(tmp_path / "out")))
    config = pruner.model.generation_config
    config.do_sample, config.temperature, config.top_p, config.max_new_tokens = False, 0.6, 0.5, -5
    config.early_stopping, config.num_beams = True, 2
    message = "model.generation_config has max_new_tokens=-5, temperature=0.6, top_p=0.5, which"
    with pytest.raises(ArgumentError, match=message):
        pruner.prune(rows())
    pruner.report = report()
    with pytest.raises(CheckpointError, match=f"{message}.*the pruned model is unharmed in memory$"):
        pruner.save_model()
    config.do_sample, config.max_new_tokens = True, None
    pruner.save_model()
    assert GenerationConfig.from_pretrained(tmp_path / "out").temperature == 0.6


def test_the_readme_run_twice_does_not_prune_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = (
        block
        for block in (ROOT / "README.md").read_text().split("```python\n")[1:]
        if "pruner.prune()" in block
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pruned").mkdir()
    (tmp_path / "pruned" / "config.json").write_text("{}")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.setattr("hf_kprune.run.Run.open", None)
    with pytest.raises(ArgumentError, match="output_dir 'pruned' is not empty"):
        exec(code.split("```")[0], {})


@pytest.mark.skipif(sys.platform != "linux", reason="mounts are made as on Linux")
@pytest.mark.parametrize("start", ["absent", "a checkpoint"])
def test_a_disk_that_fills_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: str
) -> None:
    """As the check before is an estimate, and others write too."""
    disk = tmp_path / "disk"
    monkeypatch.setattr("hf_kprune.files.destination.probe", lambda _: None)
    with mounted(disk, "-t", "tmpfs", "-o", "size=1m", "none"):
        if start == "a checkpoint":
            old_checkpoint(disk / "out")
        (disk / "other").write_bytes(bytes(disk_usage(disk).free - 30_000))
        pruner = make_pruner(pruned_layer(), output_dir=str(disk / "out"), overwrite_output_dir=True)
        with (
            unchanged(disk),
            pytest.raises(CheckpointError, match=r"cannot write to .*\([\d,]+ are free|bytes.*elsewhere"),
        ):
            pruner.save_model()
        pruner.save_model(str(tmp_path / "elsewhere"))
        assert_same(AutoModelForSequenceClassification.from_pretrained(tmp_path / "elsewhere"), pruner.model)


def test_a_plot_that_cannot_be_written_is_refused_before_the_sweep(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shallow().save_pretrained(tmp_path / "dense")
    (tmp_path / "rows.txt").write_text("w1")
    options = [
        "--model_name_or_path",
        tmp_path / "dense",
        "--dataset_file",
        tmp_path / "rows.txt",
        "--output_dir",
        tmp_path / "out",
    ]
    for plot in (
        "",
        tmp_path,
        tmp_path / "nowhere" / "a.svg",
        tmp_path / "rows.txt" / "a.svg",
        tmp_path / "a.docx",
    ):
        with unchanged(tmp_path):
            assert main([str(option) for option in ("sweep", *options, "--plot", plot)]) == 2
        assert (
            f"plot is {str(plot)!r}, expected a file that can be written, such as sweep.svg: "
            in capsys.readouterr().err
        )


@pytest.mark.parametrize("full", slow_unless_in(("the disk",), ("the place", "the disk", "everything")))
def test_the_command_line_saves_elsewhere_what_it_cannot_save_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], full: str
) -> None:
    shallow().save_pretrained(tmp_path / "dense")
    tokenizer().save_pretrained(tmp_path / "dense")
    (tmp_path / "rows.txt").write_text("\n".join(f"w{i % 50} w{i % 7} w3" for i in range(60)))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    write = PreTrainedModel.save_pretrained
    refused = {"the place": [".out."], "the disk": [".out.", ".out-"], "everything": [""]}[full]

    def fill(self: PreTrainedModel, folder: Any, **options: Any) -> None:
        if any(Path(folder).parent.name.startswith(name) for name in refused) and (
            full == "everything" or Path(folder).parents[1] == tmp_path
        ):
            raise OSError(28, "No space left on device")
        write(self, folder, **options)

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", fill)
    options = [
        "--model_name_or_path",
        tmp_path / "dense",
        "--dataset_file",
        tmp_path / "rows.txt",
        "--num_tokens",
        100,
    ]
    assert (
        main(
            [
                str(o)
                for o in ("prune", *options, "--output_dir", tmp_path / "out", "--disable_tqdm", "--verbose")
            ]
        )
        == 2
    )
    message = capsys.readouterr().err.splitlines()[-1]
    assert "cannot write to" in message
    assert "No space left on device" in message
    assert "save_model" not in message
    assert not (tmp_path / "out").exists()
    folders = [
        path for path in [*tmp_path.iterdir(), *(tmp_path / "tmp").iterdir()] if path.name.startswith("out-")
    ]
    if full == "everything":
        assert folders == []
        return
    (folder,) = folders
    assert folder.parent == (tmp_path if full == "the place" else tmp_path / "tmp")
    assert f"the pruned model was saved to {str(folder)!r} instead" in message
    AutoModelForSequenceClassification.from_pretrained(folder)


class Failing(KPruneCallback):
    def __init__(self, event: str, error: type[BaseException]):
        def fail(*args: Any, **kwargs: Any) -> None:
            raise error("the logger is gone")

        setattr(self, event, fail)


@pytest.mark.parametrize(
    "error", slow_unless_in((KeyboardInterrupt,), (RuntimeError, ArgumentError, KeyboardInterrupt))
)
def test_an_error_of_a_callback_after_the_change_says_so(tmp_path: Path, error: type[BaseException]) -> None:
    args = KPruneArguments(disable_tqdm=True, use_cpu=True, num_tokens=200)
    pruner = KPrunePruner(
        shallow(), args, rows(), data_collator=collate, callbacks=[Failing("on_prune_end", error)]
    )
    with pytest.raises(error, match="the logger is gone") as raised:
        pruner.prune()
    assert raised.value.__notes__ == [
        "The model is pruned all the same: on_prune_end came after. save_model() works."
    ]
    assert pruner.report is not None
    pruner.add_callback(Failing("on_save", error))
    with pytest.raises(error, match="the logger is gone") as raised:
        pruner.save_model(str(tmp_path / "out"))
    assert raised.value.__notes__ == [
        f"The checkpoint in {tmp_path / 'out'} is whole; on_save came after it was written."
    ]
    assert_same(AutoModelForSequenceClassification.from_pretrained(tmp_path / "out"), pruner.model)


def test_the_command_line_saves_what_a_callback_complains_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("the logger is gone")

    shallow().save_pretrained(tmp_path / "dense")
    tokenizer().save_pretrained(tmp_path / "dense")
    (tmp_path / "rows.txt").write_text("\n".join(f"w{i % 50} w{i % 7} w3" for i in range(60)))
    monkeypatch.setattr("hf_kprune.callbacks.PrinterCallback.on_prune_end", fail)
    options = [
        "--model_name_or_path",
        tmp_path / "dense",
        "--dataset_file",
        tmp_path / "rows.txt",
        "--num_tokens",
        100,
    ]
    with pytest.raises(RuntimeError, match="the logger is gone"):
        main(
            [
                str(o)
                for o in ("prune", *options, "--output_dir", tmp_path / "out", "--disable_tqdm", "--verbose")
            ]
        )
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").config.kprune


@pytest.mark.parametrize("content", ["# My project", "---\nlicense: mit\n---\n# A card of another model"])
def test_a_model_card_replaces_none_that_is_not_ours(tmp_path: Path, content: str) -> None:
    pruner = make_pruner()
    with pytest.raises(ArgumentError, match="is no directory; save the model there first"):
        pruner.create_model_card(output_dir=str(tmp_path / "nowhere"))
    (tmp_path / "README.md").write_text(content)
    with (
        unchanged(tmp_path),
        pytest.raises(ArgumentError, match=r"README\.md' is not a model card of hf_kprune; move it"),
    ):
        pruner.create_model_card(output_dir=str(tmp_path))
    pruner.args.overwrite_output_dir = True
    if content.startswith("---"):
        pruner.create_model_card(output_dir=str(tmp_path))
        pruner.args.overwrite_output_dir = False
        pruner.create_model_card(output_dir=str(tmp_path))  # that one is ours
    else:
        with unchanged(tmp_path), pytest.raises(ArgumentError, match="is not a model card of hf_kprune"):
            pruner.create_model_card(output_dir=str(tmp_path))
