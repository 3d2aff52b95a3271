"""Tables and plots of what the other benchmarks measured.

    python benchmarks/figures.py --quality quality.jsonl --speedup speedup.jsonl --pruning_time pruning_time.jsonl \\
        --perplexity perplexity.jsonl --folder docs/figures

Prints Markdown and writes SVG, for as many of the files as are given: means and standard deviations over seeds, the best in
bold, and, where they differ by half a point or more from those asked, the FLOPs removed in fact in brackets.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from tasks import read_lines


TITLES = {
    "sst2": "minilm-sst2, accuracy, full dev set",
    "sts": "all-MiniLM-L6-v2, STS-B test, Spearman of cosine",
    "stsb": "minilm-stsb, STS-B test, Spearman",
    "squad": "minilm-squad, 1,000 questions of SQuAD 1.1, F1",
}
LABELS = {
    "surgeon": "ours",
    "kprune": "K-prune",
    "kwon": "Kwon et al.",
    "kcm": "KCM",
    "flap": "FLAP",
    "taylor": "Taylor",
    "wanda_sp": "Wanda-sp",
    "magnitude": "magnitude",
    "random": "random",
    "torch-pruning": "Torch-Pruning",
}
COLOURS = dict(zip(LABELS.values(), matplotlib.color_sequences["tab10"], strict=True))
UNIFORM = ", uniform"
"""What the label of a method ends with where it left all layers alike."""
USEFUL = 6.0
"""Times the dense model's perplexity, beyond which a plot shows nothing."""


def read(path: Path) -> pd.DataFrame:
    """All lines, methods by their labels and in their order.

    Raises:
        ValueError: If a method was run with several options, the mean over which would say nothing.
    """
    frame = pd.DataFrame(read_lines(path))
    labels = frame["method"].map(LABELS)
    if "uniform" in frame:
        labels = labels.mask(frame["uniform"].eq(True), labels + UNIFORM)
    every = [*LABELS.values(), *(label + UNIFORM for label in LABELS.values())]
    frame["method"] = pd.Categorical(labels, every, ordered=True)
    if "options" in frame:
        frame["options"] = frame["options"].map(str)
        for (method, *_), group in frame.groupby(
            [name for name in ("method", "task") if name in frame], observed=True
        ):
            if group["options"].nunique() > 1:
                raise ValueError(
                    f"{path} has lines of {method} with the options {sorted(set(group['options']))}; keep one file for each"
                )
    return frame


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def with_spread(values: pd.Series) -> str:
    digits = 2 if values.mean() < 1000 else 0
    return f"{values.mean():.{digits}f}" + (f" ± {values.std():.{digits}f}" if len(values) > 1 else "")


def against_sparsity(frame: pd.DataFrame, row: str, value: str, highest: bool = True) -> str:
    """A table with a row for the dense model and for each entry of the column `row`, and a column for each sparsity."""
    means = frame.groupby([row, "sparsity"], observed=True)[value].mean().unstack()
    best = means.max() if highest else means.min()
    rows = [["dense", *[f"{frame['dense'].mean():.2f}"] * len(best)]]
    for label, figures in means.iterrows():
        rows.append([str(label)])
        for sparsity, figure in figures.items():
            some = frame[(frame[row] == label) & (frame["sparsity"] == sparsity)]
            text = with_spread(some[value]) if len(some) else "-"
            text = f"**{text}**" if figure == best[sparsity] else text
            achieved = some["achieved"].mean()
            rows[-1].append(text + (f" ({achieved:.1%})" if abs(achieved - sparsity) >= 0.005 else ""))
    return table(["removed", *(f"{100 * sparsity:.4g} %" for sparsity in best.index)], rows)


def curves(axes: Axes, frame: pd.DataFrame, value: str, title: str) -> None:
    """Mean and standard deviation of each method against the FLOPs removed in fact, and the dense model."""
    for label, points in frame.groupby("method", observed=True):
        at = points.groupby("sparsity")
        axes.errorbar(
            100 * at["achieved"].mean(),
            at[value].mean(),
            at[value].std().fillna(0),
            label=label,
            color=COLOURS[label.removesuffix(UNIFORM)],
            linestyle=":" if label.endswith(UNIFORM) else "-",
            linewidth=2.5 if label == LABELS["surgeon"] else 1.2,
            zorder=3 if label == LABELS["surgeon"] else 2,
            marker=".",
        )
    axes.axhline(frame["dense"].mean(), label="dense", color="black", linestyle="--", linewidth=1)
    axes.set_xlabel("FLOPs removed, %")
    axes.set_title(title, fontsize=9)


def quality(frame: pd.DataFrame, folder: Path) -> None:
    whole = frame[frame["variant"] == ""]
    tasks = [task for task in TITLES if task in set(whole["task"])]
    figure, panels = pyplot.subplots(
        1, len(tasks), figsize=(4 * len(tasks), 4), squeeze=False, layout="constrained"
    )
    for task, axes in zip(tasks, panels[0], strict=True):
        some = whole[whole["task"] == task]
        print(f"### {TITLES[task]}\n\n{against_sparsity(some, 'method', 'metric')}")
        curves(axes, some, "metric", TITLES[task])
        dense = some["dense"].mean()
        axes.axhline(dense - 3, color="grey", linestyle=":", linewidth=1)
        axes.set_xlim(38, 92)
        axes.set_ylim(bottom=max(dense - 30, axes.get_ylim()[0]))  # what is of no use any more is left out
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8)
    save(figure, folder / "quality.svg")

    lost = whole.assign(lost=whole["dense"] - whole["metric"]).groupby(
        ["task", "sparsity", "method"], observed=True
    )["lost"]
    points = lost.mean().unstack()
    if {LABELS["surgeon"], LABELS["kprune"]} <= set(points):
        ours, theirs = points[LABELS["surgeon"]], points[LABELS["kprune"]]
        rows = [
            [
                task,
                f"{100 * sparsity:.4g} %",
                *(f"{x:.2f}" for x in (theirs[task, sparsity], ours[task, sparsity], ratio)),
            ]
            for (task, sparsity), ratio in (ours / theirs).dropna().items()
        ]
        print("### Points lost\n\n" + table(["task", "removed", "K-prune", "ours", "ours / K-prune"], rows))

    for (method, task), parts in frame[frame["variant"] != ""].groupby(["method", "task"], observed=True):
        at = frame[
            (frame["method"] == method) & (frame["task"] == task) & frame["sparsity"].isin(parts["sparsity"])
        ]
        rows = pd.Categorical(at["variant"].replace("", "whole"), ["whole", *dict.fromkeys(parts["variant"])])
        print(
            f"### Ablation of {method}: {TITLES[task]}\n\n{against_sparsity(at.assign(variant=rows), 'variant', 'metric')}"
        )


def speedup(frame: pd.DataFrame, folder: Path) -> None:
    frame["factor"] = frame["speed_ups"].map(pd.Series).map(pd.Series.mean)
    for (batch, own), group in frame.groupby(["batch", "of_mean_length"]):
        tasks = [task for task in TITLES if task in set(group["task"])]
        rows = []
        for label, of in group.groupby("method", observed=True):
            at = of.set_index("task")
            cells = [
                f"{at['factor'][t]:.2f}x ({at['sparsity'][t]:.0%})" if t in at.index else "-" for t in tasks
            ]
            mean = "-" if "-" in cells else f"{at['factor'].product() ** (1 / len(tasks)):.2f}x"
            rows.append([label, *cells, mean])
        lengths = group.groupby("task")["length"].first()
        tokens = ", ".join(f"{task} {lengths[task]}" for task in tasks) if own else "128"
        within, threads = group["within"].iloc[0], group["threads"].iloc[0]
        print(f"### Speed-up within {within:g} points: batch {batch}, tokens: {tokens}, threads: {threads}\n")
        print(table(["method", *tasks, "geometric mean"], rows))


def pruning_time(frame: pd.DataFrame, folder: Path) -> None:
    frame["time"] = frame["seconds"].map(lambda phases: phases["total"]) + 60 * frame["minutes"]
    tasks = [task for task in TITLES if task in set(frame["task"])]
    figure, panels = pyplot.subplots(
        1, len(tasks), figsize=(5 * len(tasks), 4), squeeze=False, layout="constrained"
    )
    for task, axes in zip(tasks, panels[0], strict=True):
        some = frame[frame["task"] == task]
        title = f"{TITLES[task]}, {some['sparsity'].iloc[0]:.0%} removed"
        rows = [["dense", "", f"{some['dense'].mean():.2f}"]]
        for (label, minutes), of in some.groupby(["method", "minutes"], observed=True):
            after = f", then {60 * minutes:.0f} s of fine-tuning" if minutes else ""
            rows.append([label + after, f"{of['time'].mean():.0f}", with_spread(of["metric"])])
        for label, of in some.groupby("method", observed=True):
            means = of.groupby("minutes")[["time", "metric"]].mean()
            axes.plot(
                means["time"], means["metric"], label=label, color=COLOURS[label], marker="o", linestyle=":"
            )
        axes.axhline(some["dense"].mean(), label="dense", color="black", linestyle="--", linewidth=1)
        axes.set(xscale="log", xlabel="seconds of pruning and fine-tuning")
        axes.set_title(title, fontsize=9)
        print(f"### {title}\n\n{table(['method', 'seconds', 'metric'], rows)}")
    panels[0][0].legend(fontsize=8)
    save(figure, folder / "pruning_time.svg")


def perplexity(frame: pd.DataFrame, folder: Path) -> None:
    models = frame.groupby("model")
    figure, panels = pyplot.subplots(
        1, len(models), figsize=(6 * len(models), 4.5), squeeze=False, layout="constrained"
    )
    for axes, (model, some) in zip(panels[0], models, strict=True):
        print(f"### {model}, perplexity\n\n{against_sparsity(some, 'method', 'perplexity', highest=False)}")
        if "untuned" in some:
            cuts = some.dropna(subset="untuned")
            print(
                f"The same cuts, not tuned:\n\n{against_sparsity(cuts, 'method', 'untuned', highest=False)}"
            )
        if "cpu_seconds" in some:
            cache = some["cache_bytes_per_token_of_dense"].iloc[0]
            there = some[some["device"].str.startswith("cpu")]  # seconds of machines do not compare
            print(
                f"CPU seconds of pruning on a CPU, and bytes of cache per token (dense {cache:,}):\n\n{costs(there)}"
            )
        curves(axes, some, "perplexity", f"{model}, perplexity of WikiText-2 {some['split'].iloc[0]}")
        dense = some["dense"].mean()
        axes.set(yscale="log", ylim=(0.93 * dense, USEFUL * dense))  # what is of no use any more is left out
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 2.5, 3, 4, 5, 7)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    save(figure, folder / "perplexity.svg")


def costs(frame: pd.DataFrame) -> str:
    """CPU seconds that each method takes, and the bytes that the cache of what it leaves grows by with each token."""
    means = frame.groupby(["method", "sparsity"], observed=True)[
        ["cpu_seconds", "cache_bytes_per_token"]
    ].mean()
    cells = means.apply(lambda pair: f"{pair.iloc[0]:,.0f} s, {pair.iloc[1]:,.0f}", axis=1).unstack(
        fill_value="-"
    )
    head = ["removed", *(f"{100 * sparsity:.4g} %" for sparsity in cells)]
    return table(head, ([str(label), *row] for label, row in zip(cells.index, cells.to_numpy(), strict=True)))


def save(figure: Any, path: Path) -> None:
    """Write a figure; the same one gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    made = {"quality": quality, "speedup": speedup, "pruning_time": pruning_time, "perplexity": perplexity}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in made:
        parser.add_argument(f"--{name}", type=Path, help=f"What {name}.py wrote.")
    parser.add_argument("--folder", type=Path, default=Path("docs/figures"), help="For the plots.")
    args = parser.parse_args()
    matplotlib.use("svg")
    pyplot.rcParams.update(
        {"svg.fonttype": "none", "svg.hashsalt": "hf_kprune", "axes.grid": True, "grid.alpha": 0.3}
    )
    for name, make in made.items():
        if path := getattr(args, name):
            make(read(path), args.folder)


if __name__ == "__main__":
    main()
