"""Real models of the evaluation pack: pruned, saved, loaded again, they still do what they were trained for. Slow tier.

Calibrates on train splits and evaluates on validation splits, with thresholds relative to the dense model in the same run.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd
import pytest
from checks import assert_same_state
from data import ROOT
from transformers import AutoTokenizer

from hf_kprune import KPruneArguments, KPrunePruner


sys.path.insert(0, str(ROOT / "benchmarks"))
from tasks import TASKS, calibration_texts


pytestmark = pytest.mark.slow


@pytest.mark.parametrize("task", ["sst2", "sts", "stsb"])
def test_half_the_flops_keep_the_quality_and_tuning_earns_its_place(
    pack: Path, tmp_path: Path, task: str
) -> None:
    name, model_class, train, _, metric = TASKS[task]
    path = pack / "models" / name
    tokenizer = AutoTokenizer.from_pretrained(path)
    rows = pd.read_parquet(pack / "data" / f"{train.split('/')[0]}/validation.parquet").head(400)
    texts = calibration_texts(task, pd.read_parquet(pack / "data" / f"{train}.parquet"))
    dense = metric(model_class.from_pretrained(path), tokenizer, rows)

    figures = {}
    for tune in (True, False):
        args = KPruneArguments(
            sparsity=0.5, num_tokens=4000, num_measure_tokens=1500, tune=tune, disable_tqdm=True
        )
        pruner = KPrunePruner(model_class.from_pretrained(path), args, texts, processing_class=tokenizer)
        report = pruner.prune()
        assert report.after.flops <= 0.5 * report.before.flops * (1 + 1e-9)
        pruner.save_model(str(tmp_path / str(tune)))
        again = model_class.from_pretrained(tmp_path / str(tune))
        figures[tune] = metric(again, tokenizer, rows)
        assert_same_state(again.state_dict(), pruner.model.state_dict())
    assert figures[True] > dense - 6
    assert figures[True] > figures[False]
