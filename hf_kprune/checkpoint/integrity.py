"""What a load does not look at: whether the weight files of a checkpoint are, byte by byte, those that were
saved.

The record that it is compared with is `kprune_weights` in config.json, see `modeling_kprune.record_weights`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedConfig
from transformers.utils import cached_file

from ..errors import CheckpointError
from ..modeling_kprune import RECORD, check_record, sha256_of


def verify_weights(name: str) -> list[str]:
    """What was compared and found of the weight files of a checkpoint, one sentence each.

    Args:
        name: A directory or a name on the Hub.

    Raises:
        CheckpointError: If a file is not the one that was saved, or if there is no record and a file holds
            NaN, Inf or integers.
    """
    record: dict[str, Any] = PreTrainedConfig.get_config_dict(name)[0].get(RECORD) or {}
    if not record:
        files = sorted(Path(name).glob("*.safetensors")) if Path(name).is_dir() else []
        remarks = [remark for file in files for remark in strange(file)]
        if remarks:
            raise CheckpointError(f"{name} is damaged: {'; '.join(remarks)}")
        return [
            "there is no record of the weights in config.json: they were saved without hf_kprune, by one of "
            f"before there was a record, or written otherwise; {len(files)} files hold no NaN, no Inf and no "
            "integers"
        ]
    damages, lines = [], list[str]()
    for file, entry in record.items():
        path = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
        if path is None:
            damages.append(f"{file} is missing")
            continue
        if sha256_of(path) != entry["sha256"]:
            damages += [f"{file} is not the file that was saved (sha256)", *strange(path)]
            continue
        lines.append(f"{file}: sha256 and {len(entry['tensors'])} tensors are as they were saved")
        lines += [f"note: {remark}, as when it was saved" for remark in strange(path)]
    if damages:
        raise CheckpointError(f"{name} is damaged: {'; '.join(damages)}; get it again")
    check_record(name, record)
    return lines


def strange(file: str | Path) -> list[str]:
    """Tensors of a safetensors file that are integers, or hold NaN or Inf, one at a time in memory."""
    faults = []
    with safe_open(file, "pt") as weights:
        for key in weights.keys():  # noqa: SIM118
            tensor: Any = weights.get_tensor(key)
            if not tensor.is_floating_point():
                faults.append(f"{key} in {Path(file).name} is {str(tensor.dtype).removeprefix('torch.')}")
            elif not bool(torch.isfinite(tensor).all()):
                faults.append(f"{key} in {Path(file).name} holds NaN or Inf")
    return faults
