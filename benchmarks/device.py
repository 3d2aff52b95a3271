"""How long pruning takes on a GPU, and how much of its memory: shapes of known models with random weights in bfloat16.

    python benchmarks/device.py --shapes opt-1.3b opt-2.7b llama-8b qwen3-8b --output device.jsonl

    python benchmarks/device.py --estimate    what a run is estimated to take, told without a GPU and without running it

Each line is a process of its own. `peak` is the most memory that PyTorch had allocated on the GPU, the model's own weights
among it; `rate` is the matrix products of the run, as counted on the same shape with one and with two layers, over its
seconds, and `share` is that over the rate of a product of two large matrices in float32 on the same GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any


os.environ.setdefault("HF_HUB_OFFLINE", "1")

LLAMA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128_256,
}
QWEN3 = {
    **LLAMA,
    "model_type": "qwen3",
    "intermediate_size": 12_288,
    "num_hidden_layers": 36,
    "head_dim": 128,
    "vocab_size": 151_936,
}


def opt(width: int, layers: int, heads: int) -> dict[str, Any]:
    about = {"hidden_size": width, "ffn_dim": 4 * width, "word_embed_proj_dim": width, "vocab_size": 50_272}
    return {"model_type": "opt", "num_hidden_layers": layers, "num_attention_heads": heads, **about}


SHAPES: dict[str, dict[str, Any]] = {
    "opt-1.3b": opt(2048, 24, 32),
    "opt-2.7b": opt(2560, 32, 32),
    "llama-8b": LLAMA,
    "qwen3-8b": QWEN3,
    "tiny": {
        **LLAMA,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 3,
        "vocab_size": 1000,
    }
    | {"num_attention_heads": 4, "num_key_value_heads": 2},
}


def build(shape: str, layers: int | None, device: str) -> Any:
    """A model of random weights in bfloat16."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    about = {**SHAPES[shape], "dtype": "bfloat16"}
    if layers is not None:
        about["num_hidden_layers"] = layers
    config = AutoConfig.for_model(about.pop("model_type"), **about)
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Prune one shape in this process."""
    import torch
    import transformers
    from accelerate import dispatch_model
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import flop_registry

    from hf_kprune import KPruneArguments, KPrunePruner
    from hf_kprune.structure.offload import device_map
    from hf_kprune.structure.sublayers import find_sublayers

    transformers.utils.logging.set_verbosity_error()
    torch.set_float32_matmul_precision("high" if options.tf32 else "highest")
    cuda = torch.cuda.is_available()
    model = build(options.shapes[0], options.layers, "cuda" if cuda else "cpu")
    if options.offload:
        model.cpu()
        stacks = {id(s.layers): s.layers for s in find_sublayers(model)}.values()
        dispatch_model(model, device_map(model, stacks, "cpu", 0), main_device=0)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (options.tokens // 512, 512), generator=generator)
    rows = [{"input_ids": row} for row in ids.tolist()]
    args = KPruneArguments(
        sparsity=options.sparsity,
        num_tokens=options.tokens,
        per_device_batch_size=options.batch,
        disable_tqdm=True,
    )
    pruner = KPrunePruner(model, args, rows)
    pruner.callback_handler.callbacks.clear()
    line: dict[str, Any] = {"weights": sum(p.nbytes for p in model.parameters())}

    class Products(TorchDispatchMode):
        """Counts the operations of matrix products. PyTorch's own counter takes no gradients within hooks."""

        flops = 0

        def __torch_dispatch__(self, function: Any, _: Any, inputs: Any = (), options: Any = None) -> Any:
            result = function(*inputs, **(options or {}))
            if (count := flop_registry.get(function._overloadpacket)) is not None:
                self.flops += count(*inputs, **(options or {}), out_val=result)
            return result

    if options.count:
        with Products() as products:  # type: ignore[no-untyped-call]
            pruner.prune()
        return {**line, "flops": products.flops}
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    report = pruner.prune()
    line |= {"seconds": round(time.perf_counter() - begin, 1), "removed": report.sparsity}
    line |= {"phases": {name: round(value, 1) for name, value in report.seconds.items()}}
    if cuda:
        line |= {"peak": torch.cuda.max_memory_allocated(), "device": torch.cuda.get_device_name()}
        line |= {"float32_rate": rate_of_products()}
    return {**line, "versions": report.versions, "trials": report.trials}


def estimate(shape: str, options: argparse.Namespace) -> dict[str, Any]:
    """What a run of the default method on a CPU is estimated to take beyond the model, in bytes by phase."""
    from accelerate import Accelerator

    from hf_kprune import KPruneArguments
    from hf_kprune.calibration.batches import Calibration
    from hf_kprune.calibration.collate import collate
    from hf_kprune.calibration.rows import Rows
    from hf_kprune.calibration.tasks import knowledge_loss
    from hf_kprune.memory import memory_of
    from hf_kprune.methods import METHODS
    from hf_kprune.structure.sublayers import find_sublayers

    model = build(shape, options.layers, "meta")
    method, length = METHODS["surgeon"], 512
    args = KPruneArguments(
        sparsity=options.sparsity, num_tokens=options.tokens, per_device_batch_size=options.batch
    )
    rows = [{"input_ids": [1] * length} for _ in range(options.tokens // length)]
    measured = Rows(rows, (method.measure_tokens or options.tokens) // length, options.tokens, {})
    make_batch = partial(collate, collator=None, processing_class=None, model=model)
    calibration = Calibration(Accelerator(cpu=True), measured, make_batch, model, args)
    sublayers = find_sublayers(model)
    loss = knowledge_loss(model, args.temperature, "mean", None, sublayers)
    memory = memory_of(model, sublayers, calibration, method(args), loss, tunes=True)
    weights = sum(p.nbytes for p in model.parameters())
    return {"shape": shape, "weights": weights, "beyond": memory.total, "phases": memory.phases}


def rate_of_products() -> float:
    """Operations a second of products of float32 matrices of 8,192 rows and columns."""
    import torch

    size, times = 8192, 10
    a, b = (torch.randn(size, size, device="cuda") for _ in range(2))
    for _ in range(3):
        a @ b
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(times):
        a @ b
    torch.cuda.synchronize()
    return 2 * size**3 * times / (time.perf_counter() - begin)


def child(shape: str, options: argparse.Namespace, *words: str) -> dict[str, Any]:
    """The line of a process of its own."""
    about = [
        "--tokens",
        str(options.tokens),
        "--batch",
        str(options.batch),
        "--sparsity",
        str(options.sparsity),
    ]
    about += [f"--{name}" for name in ("tf32", "offload") if getattr(options, name)]
    done = subprocess.run(
        [sys.executable, __file__, "--child", "--shapes", shape, *about, *words],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    line: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return line


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shapes", nargs="+", choices=SHAPES, default=["opt-1.3b", "opt-2.7b", "llama-8b", "qwen3-8b"]
    )
    parser.add_argument("--tokens", type=int, default=102_400)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--sparsity", type=float, default=0.2)
    parser.add_argument("--layers", type=int, default=None, help="In place of those of the shape.")
    parser.add_argument("--offload", action="store_true", help="Let the layers wait in the machine's memory.")
    parser.add_argument("--tf32", action="store_true", help="Let products of float32 be of TF32.")
    parser.add_argument(
        "--rate", action="store_true", help="Count the products of the shape, which takes longer."
    )
    parser.add_argument("--estimate", action="store_true", help="Estimate its memory, and run nothing.")
    parser.add_argument("--output", type=Path, help="File that the JSON lines are appended to.")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--count", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options)))
        return
    for shape in options.shapes:
        if options.estimate:
            print(json.dumps(estimate(shape, options)), flush=True)
            continue
        layers = SHAPES[shape]["num_hidden_layers"] if options.layers is None else options.layers
        about = {
            "shape": shape,
            "layers": layers,
            "tokens": options.tokens,
            "tf32": options.tf32,
            "offload": options.offload,
        }
        line = {**about, **child(shape, options, "--layers", str(layers))}
        if options.rate:
            one, two = (child(shape, options, "--count", "--layers", str(n))["flops"] for n in (1, 2))
            line["flops"] = one + (layers - 1) * (two - one)
            line["rate"] = line["flops"] / line["seconds"]
            line["share"] = line["rate"] / line["float32_rate"] if "float32_rate" in line else None
        print(json.dumps(line), flush=True)
        if options.output:
            with options.output.open("a") as file:
                file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
