"""`hf-kprune inspect --verify` finds what a load does not look at."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checks import EMBEDDING, KEY, NORM, edit_weights, logits
from models import pruned_layer
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from hf_kprune import CheckpointError
from hf_kprune.checkpoint.integrity import verify_weights
from hf_kprune.cli.terminal import main


OTHER = KEY.replace("query", "key")


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-7] ^= 1
    file.write_bytes(content)


def exchange(tensors: dict[str, Tensor]) -> None:
    tensors[KEY], tensors[OTHER] = tensors[OTHER], tensors[KEY]


def spoil(value: float) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors[NORM].__setitem__(3, value)


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "one flipped bit": (flip, "model.safetensors is not the file that was saved"),
    "two tensors exchanged": (edit_weights(exchange), "model.safetensors is not the file that was saved"),
    "NaN": (edit_weights(spoil(float("nan"))), f"{NORM} in model.safetensors holds NaN or Inf"),
    "Inf": (edit_weights(spoil(float("inf"))), f"{NORM} in model.safetensors holds NaN or Inf"),
    "integers": (
        edit_weights(lambda t: t.update({NORM: t[NORM].long()})),
        f"{NORM} in model.safetensors is int64",
    ),
    "a tensor less": (
        edit_weights(lambda t: t.pop(EMBEDDING)),
        "model.safetensors is not the file that was saved",
    ),
    "no file": (Path.unlink, "model.safetensors is missing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str) -> None:
    pruned_layer().save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path), "--verify"]) == 0
    tensors = len(load_file(tmp_path / "model.safetensors"))
    assert (
        f"model.safetensors: sha256 and {tensors} tensors are as they were saved" in capsys.readouterr().out
    )
    DAMAGES[damage][0](tmp_path / "model.safetensors")
    assert main(["inspect", str(tmp_path), "--verify"]) == 2
    error = capsys.readouterr().err
    assert "is damaged: " in error
    assert DAMAGES[damage][1] in error
    assert main(["inspect", str(tmp_path)]) == 0


@pytest.mark.parametrize("damage", ["NaN", "Inf", "integers"])
def test_without_a_record_values_are_looked_at_all_the_same(tmp_path: Path, damage: str) -> None:
    pruned_layer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["kprune_weights"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "no record of the weights in config.json" in verify_weights(str(tmp_path))[0]
    DAMAGES[damage][0](tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=DAMAGES[damage][1]):
        verify_weights(str(tmp_path))


def test_what_was_saved_with_inf_is_no_damage(tmp_path: Path) -> None:
    model = pruned_layer()
    with torch.no_grad():
        model.get_parameter(NORM)[3] = float("inf")
    model.save_pretrained(tmp_path, max_shard_size="2KB")
    lines = verify_weights(str(tmp_path))
    assert len([line for line in lines if "are as they were saved" in line]) == len(
        list(tmp_path.glob("*.safetensors"))
    )
    assert any(line.startswith(f"note: {NORM}") for line in lines)
    assert not logits(AutoModelForSequenceClassification.from_pretrained(tmp_path)).isfinite().all()
