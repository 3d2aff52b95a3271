"""`hf-kprune` as a process: quick help, closed streams, broken pipes, Ctrl-C, a directory that is gone, other encodings."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from data import ROOT
from models import tiny

from hf_kprune import __version__
from hf_kprune.cli.terminal import NO_READER, main
from hf_kprune.text import printable


COMMAND = [sys.executable, str(ROOT / "hf_kprune_command.py")]
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], **{"env": ENV, "capture_output": True, "text": True, **options}, timeout=300
    )


def own(errors: str) -> str:
    """The lines of standard error without those that torchao prints when it is imported, where it is installed."""
    lines = errors.splitlines(keepends=True)
    return "".join(line for line in lines if not ("torchao" in line or "torch/utils/_pytree.py" in line))


def loads_nothing(*arguments: str) -> str:
    """What is printed, once it is sure that no library was imported for it."""
    code = (
        "import sys, hf_kprune_command\n"
        "try: hf_kprune_command.main()\n"
        "finally: assert not {'torch', 'transformers', 'numpy', 'datasets'} & sys.modules.keys()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=ENV, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("command", [(), ("prune",), ("plan",), ("sweep",), ("inspect",), ("convert",)])
def test_help_is_given_without_importing_any_library(command: tuple[str, ...]) -> None:
    assert loads_nothing(*command, "--help").startswith("usage: hf-kprune")


def test_the_version_is_given_without_importing_any_library() -> None:
    assert loads_nothing("--version") == f"hf-kprune {__version__}\n"


@pytest.mark.slow
def test_the_program_has_the_package_whole_when_a_command_runs(tmp_path: Path) -> None:
    """Code that a command imports, such as a metric, finds all of hf_kprune, and `from_pretrained` is wrapped."""
    code = (
        "import sys, hf_kprune_command, hf_kprune.cli.terminal as t\n"
        "def parse(words):\n"
        "    return 'inspect', ['nothing']\n"
        "t.parse = parse\n"
        "import hf_kprune\n"
        "assert hf_kprune_command.main() == 2\n"
        "assert hf_kprune.KPrunePruner and hf_kprune.describe\n"
        "from transformers import PreTrainedModel\n"
        "assert PreTrainedModel.post_init.is_kprune"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=ENV, cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_reader_that_goes_away_ends_it_without_a_traceback(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    shell = f"{' '.join(COMMAND)} inspect {tmp_path} | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", shell], env=ENV, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == str(NO_READER)
    assert own(done.stderr) == ""


@pytest.mark.slow
def test_closed_streams_are_no_crash(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    for closing in (">&-", ">&- 2>&- <&-"):
        shell = f"{' '.join(COMMAND)} inspect {tmp_path} {closing}"
        done = subprocess.run(["bash", "-c", shell], env=ENV, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, closing
        assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_an_output_that_is_full_is_an_error_in_a_line(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    with open("/dev/full", "w") as full:
        done = run("inspect", str(tmp_path), capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 2
    message = own(done.stderr)
    assert message.startswith("hf-kprune: error: cannot write to the standard output: ")
    assert message.count("\n") == 1


def test_a_directory_that_is_gone_is_an_error_in_a_line(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    shell = f"mkdir {gone}; cd {gone}; rmdir {gone}; {' '.join(COMMAND)}"
    for arguments, code, message in (
        ("inspect model", 2, "hf-kprune: error: the current directory is gone; change to one that exists\n"),
        ("--version", 0, ""),
    ):
        done = subprocess.run(
            ["bash", "-c", f"{shell} {arguments}"], env=ENV, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == code
        assert done.stderr.endswith(message)
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("settings", [{"LC_ALL": "C", "PYTHONUTF8": "0"}, {"PYTHONIOENCODING": "ascii"}])
def test_a_terminal_without_unicode_shows_names_with_escapes(settings: dict[str, str]) -> None:
    needed = ("--model_name_or_path", "m", "--dataset_file", "f", "--output_dir", "o")
    done = run("prune", *needed, "--für-模型", "x", env={**ENV, **settings})
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("hf-kprune: error: no such options: --f")


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.02, 0.5, 1.0, 1.5])
def test_ctrl_c_while_it_starts_is_one_line(seconds: float) -> None:
    code = "import sys, hf_kprune_command; print('ready', flush=True); sys.exit(hf_kprune_command.main())"
    command, pipe = [sys.executable, "-c", code, "inspect", "/nothing"], subprocess.PIPE
    process = subprocess.Popen(command, env=ENV, stdout=pipe, stderr=pipe, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=300)
    if process.returncode != 2:  # it was not at its end before
        assert (process.returncode, stderr) == (130, "hf-kprune: interrupted\n")


@pytest.mark.parametrize(
    "text", ["\x1b[2J", "\x1b]0;title\x07", "\r", "\x9b31m", "\u202etxt", "\u200b", "\x7f", "\ud800"]
)
def test_no_character_that_steers_a_terminal_is_printed(
    text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert printable(text).isprintable()
    assert main(["inspect", f"/nothing/{text}"]) == 2
    out, err = capsys.readouterr()
    assert (out + err).replace("\n", "").isprintable()


@pytest.mark.parametrize("text", ["für", "模型", "a b", "é", "👍"])
def test_words_of_every_script_are_printed_as_they_are(text: str) -> None:
    assert printable(text) == text
