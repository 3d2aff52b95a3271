"""Quality, size and time of a classifier of sentences: dense, pruned by half, in int8, and both.

    python benchmarks/int8.py examples/sst2-tiny --calibration examples/data/sst2_calibration.parquet \
        --validation examples/data/sst2_validation.parquet --output benchmarks/results/int8.jsonl

It takes `pip install nncf onnx onnxscript onnxruntime openvino torchao`. Each line has the accuracy on all validation rows, the
bytes of the file, and the median of the CPU milliseconds of a batch of 8 rows of 32 tokens, all models in turns.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import onnxruntime
import openvino
import pandas as pd
import torch
import torchao
import torchao.quantization as ao
import transformers
from onnxruntime.quantization import quantize_dynamic
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import hf_kprune
from hf_kprune import KPruneArguments, KPrunePruner


Run = Callable[[dict[str, torch.Tensor]], np.ndarray[Any, Any]]
"""From a batch to logits."""


def of_torch(model: Any) -> tuple[Run, int]:
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)

    @torch.no_grad()
    def run(batch: dict[str, torch.Tensor]) -> np.ndarray[Any, Any]:
        return np.asarray(model(**batch).logits.float())

    return run, buffer.tell()


def of_onnx(path: Path) -> tuple[Run, int]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options)
    names = [each.name for each in session.get_inputs()]

    def run(batch: dict[str, torch.Tensor]) -> np.ndarray[Any, Any]:
        return np.asarray(session.run(["logits"], {name: batch[name].numpy() for name in names})[0])

    return run, sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))


def of_openvino(model: Any, path: Path) -> tuple[Run, int]:
    openvino.save_model(model, path, compress_to_fp16=False)
    # where it may, OpenVINO computes in bfloat16; all forms are to compute in float32, but for int8
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino.Core().compile_model(path, "CPU", settings)
    names = [each.any_name for each in compiled.inputs]

    def run(batch: dict[str, torch.Tensor]) -> np.ndarray[Any, Any]:
        return np.asarray(compiled({name: batch[name].numpy() for name in names})["logits"])

    return run, sum(file.stat().st_size for file in path.parent.glob(f"{path.stem}.*"))


def forms(folder: str, scratch: Path, batches: list[dict[str, torch.Tensor]]) -> dict[str, tuple[Run, int]]:
    """A model in each form, by the name of the form; batches of calibration rows are for one that takes them."""

    def load() -> Any:
        return AutoModelForSequenceClassification.from_pretrained(folder).eval()

    quantised = load()
    ao.quantize_(quantised, ao.Int8DynamicActivationInt8WeightConfig())
    hf_kprune.export(load(), str(scratch / "onnx"), "onnx")
    (scratch / "int8").mkdir()
    quantize_dynamic(scratch / "onnx" / "model.onnx", scratch / "int8" / "model.onnx")
    hf_kprune.export(load(), str(scratch / "openvino"), "openvino")
    (written,) = (scratch / "openvino").glob("*.xml")
    graph = openvino.Core().read_model(written)
    names = [each.any_name for each in graph.inputs]
    data = nncf.Dataset([{name: batch[name].numpy() for name in names} for batch in batches])
    small = nncf.quantize(graph, data, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(batches))
    return {
        "OpenVINO": of_openvino(graph, scratch / "float32.xml"),
        "OpenVINO int8": of_openvino(small, scratch / "int8.xml"),
        "PyTorch": of_torch(load()),
        "torchao int8": of_torch(quantised),
        "ONNX Runtime": of_onnx(scratch / "onnx" / "model.onnx"),
        "ONNX Runtime int8": of_onnx(scratch / "int8" / "model.onnx"),
    }


def accuracy(run: Run, tokenizer: Any, rows: pd.DataFrame) -> float:
    right = 0
    for start in range(0, len(rows), 32):
        part = rows[start : start + 32]
        batch = dict(tokenizer(list(part["sentence"]), padding=True, truncation=True, return_tensors="pt"))
        right += int((run(batch).argmax(-1) == part["label"].to_numpy()).sum())
    return right / len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--validation", required=True)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--num_tokens", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--output", required=True)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    rows = pd.read_parquet(options.validation)
    rows = rows.sort_values("sentence", key=lambda column: column.str.len())
    with tempfile.TemporaryDirectory() as scratch:
        args = KPruneArguments(sparsity=options.sparsity, num_tokens=options.num_tokens, use_cpu=True)
        texts = pd.read_parquet(options.calibration)["sentence"].tolist()
        pruner = KPrunePruner(options.model, args, texts, processing_class=tokenizer)
        pruner.prune()
        pruner.save_model(f"{scratch}/pruned")
        models = {}
        batches = [
            dict(tokenizer(texts[i : i + 8], padding=True, return_tensors="pt")) for i in range(0, 800, 8)
        ]
        for name, folder in (("dense", options.model), ("pruned", f"{scratch}/pruned")):
            Path(scratch, name + "-forms").mkdir()
            for form, pair in forms(folder, Path(scratch, name + "-forms"), batches).items():
                models[name, form] = pair
        ids = torch.randint(1000, len(tokenizer), (8, 32), generator=torch.Generator().manual_seed(0))
        batch = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "token_type_ids": torch.zeros_like(ids),
        }
        times: dict[tuple[str, str], list[float]] = {key: [] for key in models}
        for number in range(options.rounds + 3):
            for key, (run, _) in models.items():
                begin = time.process_time()
                run(batch)
                if number >= 3:
                    times[key].append(1000 * (time.process_time() - begin))
        with open(options.output, "a") as file:
            for (name, form), (run, size) in models.items():
                line = {
                    "model": Path(options.model).name,
                    "which": name,
                    "form": form,
                    "sparsity": options.sparsity if name == "pruned" else 0.0,
                    "num_tokens": options.num_tokens,
                    "accuracy": accuracy(run, tokenizer, rows),
                    "bytes": size,
                    "cpu_ms": statistics.median(times[name, form]),
                    "rounds": options.rounds,
                    "threads": torch.get_num_threads(),
                    "versions": {
                        m.__name__: m.__version__
                        for m in (torch, torchao, onnxruntime, openvino, nncf, transformers)
                    },
                }
                print(line)
                file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
