"""How much memory pruning takes beyond the interpreter, the libraries and the model, and how cost grows with depth
and tokens: a Llama shape with random weights in bfloat16.

    python benchmarks/memory.py --layers 12 24 --offload none disk
    python benchmarks/memory.py --layers 6 12 24 48 --tokens 10240 --width 256 --vocabulary 1000 --offload none
    python benchmarks/memory.py --layers 6 --tokens 10240 20480 51200 102400 --width 256 --vocabulary 1000 --offload none

Each line is a process of its own. `growth` is the peak of its resident memory above what it held when the libraries
were imported and a tiny model had been pruned; `ratio` is growth, less the model itself where that is in memory, over
the bytes of the weights. Where depths or tokens differ, the last line tells the exponents of growth of CPU seconds and
of memory beyond the weights: slopes of the least squares line through logarithms.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal


os.environ.setdefault("HF_HUB_OFFLINE", "1")


def shape(layers: int, width: int, vocabulary: int, neurons: int | None = None) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=neurons or 11 * width // 4,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 256,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )


def write(folder: Path, config: Any) -> int:
    """Write a checkpoint of random weights, a file for each layer; its bytes."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in LlamaForCausalLM(config).named_parameters()}
    torch.manual_seed(0)
    parts: dict[str, list[str]] = {}
    for name in shapes:
        parts.setdefault(name.split(".")[2] if ".layers." in name else "around", []).append(name)
    total, index = 0, dict[str, str]()
    for part, names in parts.items():
        tensors = {}
        for name in names:
            size = shapes[name]
            value = torch.ones(size) if len(size) == 1 else torch.randn(size) * size[-1] ** -0.5
            tensors[name] = value.bfloat16()
        total += sum(tensor.nbytes for tensor in tensors.values())
        file = f"model-{part}.safetensors"
        save_file(tensors, folder / file, {"format": "pt"})
        index |= dict.fromkeys(names, file)
    about = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(about))
    return total


def resident(peak: bool = False) -> int:
    """Bytes of memory of this process, now or at most so far."""
    name = "VmHWM" if peak else "VmRSS"
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def measure(
    folder: str, offload: Literal["none", "cpu", "disk"], tokens: int, sparsity: float
) -> dict[str, Any]:
    """Prune the checkpoint in a folder in this process."""
    import torch
    import transformers
    from transformers import LlamaForCausalLM

    from hf_kprune import KPruneArguments, KPrunePruner

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    generator = torch.Generator().manual_seed(0)

    def rows(vocabulary: int, count: int, length: int) -> list[dict[str, list[int]]]:
        ids = torch.randint(0, vocabulary, (count, length), generator=generator)
        return [{"input_ids": row} for row in ids.tolist()]

    options: dict[str, Any] = {"disable_tqdm": True, "use_cpu": True, "sparsity": sparsity}
    tiny = LlamaForCausalLM(shape(2, 256, 100))
    KPrunePruner(
        tiny, KPruneArguments(num_tokens=1600, num_measure_tokens=400, **options), rows(100, 100, 16)
    ).prune()
    base = resident()
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is that of now
    config = transformers.AutoConfig.from_pretrained(folder)
    data = rows(config.vocab_size, tokens // 256, 256)
    args = KPruneArguments(
        num_tokens=tokens, num_measure_tokens=tokens // 2, per_device_batch_size=4, **options
    )
    begin, cpu = time.perf_counter(), time.process_time()
    if offload == "none":
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16")
        pruner = KPrunePruner(model, args, data)
    else:
        pruner = KPrunePruner(folder, args, data, offload=offload)
    loaded = resident() - base
    report = pruner.prune()
    seconds = {"wall": round(time.perf_counter() - begin), "cpu": round(time.process_time() - cpu)}
    return {"loaded": loaded, "growth": resident(peak=True) - base, **seconds, "removed": report.sparsity}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, nargs="+", default=[12, 24])
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--neurons", type=int, default=None, help="of an FFN; 11/4 of the width by default")
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8_192])
    parser.add_argument("--sparsity", type=float, default=0.2)
    parser.add_argument("--offload", nargs="+", choices=["none", "cpu", "disk"], default=["none", "disk"])
    parser.add_argument("--folder", default=None, help="where shapes are written, and left")
    parser.add_argument("--child", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.child, options.offload[0], options.tokens[0], options.sparsity)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        for offload in options.offload:
            lines = []
            for layers in options.layers:
                folder = Path(options.folder or temporary, f"llama-{layers}-{options.width}")
                size = write(folder, shape(layers, options.width, options.vocabulary, options.neurons))
                for tokens in options.tokens:
                    words = ["--child", str(folder), "--offload", offload, "--tokens", str(tokens)]
                    done = subprocess.run(
                        [sys.executable, __file__, *words, "--sparsity", str(options.sparsity)],
                        stdout=subprocess.PIPE,
                        text=True,
                        check=True,
                    )
                    line = json.loads(done.stdout.splitlines()[-1])
                    beyond = line["growth"] - (size if offload == "none" else 0)
                    about = {"layers": layers, "width": options.width, "tokens": tokens, "offload": offload}
                    lines.append({**about, "weights": size, **line, "beyond": beyond})
                    print(json.dumps({**lines[-1], "ratio": round(beyond / size, 3)}), flush=True)
            for axis in ("layers", "tokens"):
                if len({line[axis] for line in lines}) > 1:
                    slopes = {name: exponent(lines, axis, name) for name in ("cpu", "beyond")}
                    print(json.dumps({"offload": offload, "exponents over": axis, **slopes}), flush=True)


def exponent(lines: list[dict[str, Any]], axis: str, name: str) -> float:
    """The p of  figure ~ axis^p."""
    x, y = ([math.log(line[key]) for line in lines] for key in (axis, name))
    return round(statistics.linear_regression(x, y).slope, 3)


if __name__ == "__main__":
    main()
