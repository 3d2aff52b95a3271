"""The options of a pruning run, usable from Python and from the command line.

As data they take no library, so that `hf-kprune --help` is quick: PyTorch and Transformers are imported by what needs them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

from .errors import ArgumentError
from .validation import check_fields, known_keywords, show, suggestion


if TYPE_CHECKING:
    from transformers import TrainingArguments


METHOD_NAMES = ("obs", "kprune", "kwon", "kcm", "magnitude", "random", "taylor", "flap", "wanda_sp")
"""The keys of `methods.METHODS`, which takes PyTorch."""


def _option(default: Any, help: str, **kwargs: Any) -> Any:
    metadata = {"help": help, **kwargs}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


TIMES = ("target_latency", "target_speedup")
LATENCY_BATCH = 32
TARGETS = ("target_flops", "target_params", "target_bytes", *TIMES)


class Unasked(float):
    """The default of an option, which gives way to what excludes it.

    `dataclasses.replace` passes defaults on as if they had been asked for; this one can be told from what was.
    """


@known_keywords
@dataclass
class KPruneArguments:
    """Options of `KPrunePruner`. Names shared with `TrainingArguments` mean the same.

    > What is removed

    `sparsity` is the fraction of prunable FLOPs to **remove** (attention and FFN sublayers; not embeddings or heads);
    `target_flops`, `target_params`, `target_bytes`, `target_latency` or `target_speedup` (with `latency_batch_size` and
    `latency_length`) tells what may be left instead. There is one budget, `sparsity=0.5` if none is given.
    `flops_length` is the length of sequence for which FLOPs count.
    `method`, `prune_heads`, `prune_ffn`, `head_unit`, `uniform`, `min_heads`, `min_neurons`, `round_to`.

    > Calibration

    `text_columns`, `num_tokens`, `num_measure_tokens`, `max_seq_length`, `packing`, `per_device_batch_size`,
    `remove_unused_columns`, `seed`.

    > Knowledge measurement

    `measure_dtype`, `temperature`, `lambda_pred`, `lambda_rep`, `mu`, `pooling`.

    > Weight tuning

    `tune`, `tune_bias`, `tune_inputs`, `ridge`, `statistics_dtype`.

    > Output, logging, hub

    `output_dir`, `overwrite_output_dir`, `max_shard_size`, `disable_tqdm`, `verbose`, `report_to`, `run_name`,
    `per_device_eval_batch_size`, `push_to_hub`, `hub_model_id`, `hub_token`, `hub_private_repo`, `hub_revision`, `use_cpu`.

    Raises:
        ArgumentError: If a value cannot be.
    """

    output_dir: str | None = _option(
        None, "Where the pruned checkpoint is written. New, empty, or an old checkpoint."
    )
    overwrite_output_dir: bool = _option(
        False, "Replace the checkpoint that output_dir holds; other files in it stay."
    )
    sparsity: float | None = _option(
        Unasked(0.5),
        "Fraction of the prunable FLOPs to REMOVE, in [0, 1): 0.75 leaves a quarter. Prunable are attention heads and FFN "
        "neurons; embeddings, experts and the head of the model are not. The default gives way to a target.",
    )
    target_flops: float | None = _option(
        None,
        "Instead of sparsity: FLOPs that the prunable sublayers may keep for a sequence of flops_length tokens.",
    )
    target_params: float | None = _option(
        None, "Instead of sparsity: parameters that the model may keep, embeddings included."
    )
    target_bytes: float | None = _option(
        None, "Instead of sparsity: bytes that its weights may take, in the dtype they have."
    )
    target_latency: float | None = _option(
        None,
        "Instead of sparsity: seconds that a forward pass of the model may take on this device, measured. Methods that decide "
        "all at once: 'obs', 'kwon', 'magnitude', 'taylor'.",
    )
    target_speedup: float | None = _option(
        None,
        "Instead of sparsity: how many times as fast as now a forward pass is to be on this device, measured.",
    )
    latency_batch_size: int = _option(
        LATENCY_BATCH,
        "Sequences of the batch that target_latency and target_speedup are about; of images and audio it is a batch of the "
        "calibration data.",
    )
    latency_length: int | None = _option(
        None, "Tokens of its sequences. None: the mean of the calibration rows."
    )
    flops_length: int | None = _option(
        None,
        "Tokens of a sequence for which FLOPs are counted and a budget of them holds: those of the texts that the model will "
        "serve. Of an encoder-decoder, on both sides. None: the mean of the calibration rows.",
    )
    method: str = _option(
        "obs",
        "Pruning method: 'obs' is ours (optimal brain surgeon in the Fisher metric), 'kprune' that of the paper (Park et al., "
        "ICLR 2024), the others are for comparison.",
        choices=list(METHOD_NAMES),
    )
    prune_heads: bool = _option(True, "Whether attention heads may be pruned.")
    prune_ffn: bool = _option(True, "Whether FFN neurons may be pruned.")
    head_unit: str = _option(
        "group",
        "With grouped queries, what is pruned as one: a key-value head with its query heads (group), or one query head of "
        "every group (query), which leaves keys, values and their cache whole.",
        choices=["group", "query"],
    )
    uniform: bool = _option(
        False,
        "All layers of a stack end with equally many heads and neurons, so that the result is a plain checkpoint that any "
        "program loads. For architectures whose config can say it.",
    )
    min_heads: int = _option(0, "Heads that every attention sublayer keeps at least; 0 may empty a sublayer.")
    min_neurons: int = _option(0, "Neurons that every FFN sublayer keeps at least; 0 may empty a sublayer.")
    round_to: int = _option(
        1, "FFN widths are multiples of this (or the full width): 8 or 64 suit some hardware."
    )

    text_columns: list[str] | None = _option(
        None,
        "Columns of the data that hold the texts: one, two of pairs (or of sources and targets), or, for multiple choice, the "
        "question and each choice. Unset: a known name, such as text, sentence, sentence1 and sentence2.",
    )
    num_tokens: int = _option(100_000, "Calibration tokens used for tuning weights, padding not counted.")
    num_measure_tokens: int | None = _option(
        None,
        "Of these, tokens used for measuring, the costlier part. None: 10,000 for 'obs', all of them for others.",
    )
    max_seq_length: int | None = _option(
        None, "Tokens after which texts are truncated when tokenised here. None: what the model can take."
    )
    packing: bool = _option(
        False,
        "Join all texts and cut them into calibration rows of max_seq_length tokens (None: the model's, at most 1024).",
    )
    per_device_batch_size: int = _option(
        32, "Calibration sequences per batch and device. Does not change the result."
    )
    remove_unused_columns: bool = _option(
        True,
        "Drop the columns of the calibration dataset that the model does not take; if False they are an error.",
    )
    seed: int = _option(42, "Seed of the draw of calibration rows.")

    measure_dtype: str = _option(
        "float32",
        "Precision of the passes that measure knowledge: bfloat16 (autocast) is about twice as fast and rounds scores.",
        choices=["float32", "bfloat16"],
    )
    temperature: float = _option(2.0, "Softmax temperature of the predictive knowledge (gamma in the paper).")
    lambda_pred: float = _option(1.0, "Weight of the predictive knowledge.")
    lambda_rep: float = _option(2.5e-4, "Weight of the representational knowledge. Must be over 0.")
    mu: float | None = _option(
        None, "Weight of head scores against neuron scores. None: the head size, as in the paper."
    )
    pooling: str | None = _option(
        None,
        "Embedding of a base model without a task head, which the predictive knowledge compares. None: what the modules of a "
        "sentence-transformers folder make of it, else mean.",
        choices=["mean", "cls", "pooler", "none"],
    )

    tune: bool = _option(
        True,
        "Whether the output weights of what is kept are tuned (KPWT).",
    )
    tune_bias: bool | None = _option(
        None,
        "Whether tuning fits the output bias too. None: as the method does; the paper keeps it. For 'obs' and 'kprune'.",
    )
    ridge: float | None = _option(
        None,
        "Pull of tuned weights towards the present ones, relative to the features' mean square. None: as the method does, "
        "0.01 for 'obs', none in the paper. For these two.",
    )
    tune_inputs: bool | None = _option(
        None,
        "Whether input projections are corrected for how what they read differs from what the dense model's read. None: as "
        "the method does; the paper does not. For 'obs' and 'kprune'.",
    )
    statistics_dtype: str | None = _option(
        None,
        "Precision of the products summed for tuning, float64 or float32; sums and solves are float64. None: float32 for "
        "'obs', whose ridge is far above its rounding, float64 for 'kprune'.",
    )

    max_shard_size: str = _option("50GB", "Largest weight file of the saved checkpoint.")
    per_device_eval_batch_size: int = _option(
        32, "Sequences per batch and device in evaluation and prediction."
    )
    disable_tqdm: bool = _option(
        False, "Switch the progress bar off, and the lines that take its place without a terminal."
    )
    verbose: bool = _option(
        False, "Print a line for every sublayer, the whole report, and what libraries warn of."
    )
    report_to: list[str] = _option(
        ["none"], "Where metrics go, as in TrainingArguments: tensorboard, wandb, ... or none."
    )
    run_name: str | None = _option(None, "Name of the run in report_to.")
    use_cpu: bool = _option(False, "Prune on the CPU even if there is an accelerator.")

    push_to_hub: bool = _option(False, "Push the checkpoint to the Hub as well when it is saved.")
    hub_model_id: str | None = _option(None, "Repository on the Hub. None: the name of output_dir.")
    hub_token: str | None = _option(None, "Token for the Hub. None: the one that `hf auth login` stored.")
    hub_private_repo: bool | None = _option(
        None, "Whether the repository is made private. None: as the account has it."
    )
    hub_revision: str | None = _option(None, "Branch of the repository to push to.")

    def __post_init__(self) -> None:
        self.check()
        for name, why in self.unused_options().items():
            warnings.warn(f"{name} is {getattr(self, name)!r}, but {why}", stacklevel=4)

    def check(self) -> None:
        """Raise `ArgumentError` if a value cannot be, also one that was assigned later: a pruner calls this when it starts."""
        from huggingface_hub import split_torch_state_dict_into_shards

        from .files.destination import as_text
        from .methods import METHODS

        check_fields(self)

        def check(name: str, holds: bool, expected: str) -> None:
            if not holds:
                raise ArgumentError(f"{name} is {show(getattr(self, name))}, expected {expected}")

        if self.output_dir is not None:
            as_text(self.output_dir)
        targets = [name for name in TARGETS if getattr(self, name) is not None]
        if self.sparsity is None or isinstance(self.sparsity, Unasked):
            self.sparsity = None if targets else Unasked(0.5)
        budgets = targets if self.sparsity is None else ["sparsity", *targets]
        if len(budgets) > 1:
            values = ", ".join(f"{name}={getattr(self, name)}" for name in budgets)
            raise ArgumentError(
                f"{' and '.join(budgets)} are given, expected one of them ({values}); leave the other at None"
            )
        for name in targets:
            check(name, getattr(self, name) > 0, "over 0")
        sparse = self.sparsity is None or 0 <= self.sparsity < 1
        check("sparsity", sparse, "the fraction of prunable FLOPs to remove, in [0, 1)")
        check(
            "method", self.method in METHODS, f"one of {', '.join(METHODS)}{suggestion(self.method, METHODS)}"
        )
        check("head_unit", self.head_unit in ("group", "query"), "group or query")
        for name in ("min_heads", "min_neurons"):
            check(name, getattr(self, name) >= 0, "at least 0")
        for name in (
            "round_to",
            "num_tokens",
            "latency_batch_size",
            "per_device_batch_size",
            "per_device_eval_batch_size",
        ):
            check(name, getattr(self, name) >= 1, "at least 1")
        check("seed", 0 <= self.seed < 2**32, "from 0 to 2**32 - 1")
        measured = self.num_measure_tokens
        check(
            "num_measure_tokens", measured is None or 1 <= measured <= self.num_tokens, "from 1 to num_tokens"
        )
        check("flops_length", self.flops_length is None or self.flops_length >= 1, "at least 1")
        check("max_seq_length", self.max_seq_length is None or self.max_seq_length >= 1, "at least 1")
        named = self.text_columns is None or bool(self.text_columns and all(self.text_columns))
        check("text_columns", named, 'a list of names of columns, such as ["premise", "hypothesis"]')
        check("temperature", self.temperature > 0, "over 0")
        check("lambda_pred", self.lambda_pred >= 0, "at least 0")
        check(
            "lambda_rep",
            self.lambda_rep > 0,
            "over 0: the first sublayer, below which nothing differs, has no other score",
        )
        check("mu", self.mu is None or self.mu > 0, "over 0, or None for the head size")
        check("pooling", self.pooling in (None, "mean", "cls", "pooler", "none"), "mean, cls, pooler or none")
        check("measure_dtype", self.measure_dtype in ("float32", "bfloat16"), "float32 or bfloat16")
        check("ridge", self.ridge is None or self.ridge >= 0, "at least 0")
        check("statistics_dtype", self.statistics_dtype in (None, "float64", "float32"), "float64 or float32")
        if self.budget[0] in TIMES:
            able = [name for name, made in METHODS.items() if made(self).in_time]
            check("method", self.method in able, f"with {targets[0]}, one of {', '.join(able)}")
            check("uniform", not self.uniform, f"False with {targets[0]}")
        try:  # the parser of save_pretrained itself
            split_torch_state_dict_into_shards({}, max_shard_size=self.max_shard_size)
            some = float(self.max_shard_size.strip()[:-2]) > 0
        except (OverflowError, ValueError):
            some = False
        check("max_shard_size", some, "a number over 0 with TB, GB, MB or KB, such as 5GB")
        none = self.budget == ("sparsity", 0)
        check(
            "prune_heads",
            self.prune_heads or self.prune_ffn or none,
            "True, or prune_ffn=True, or sparsity=0",
        )
        for name in ("tune_bias", "tune_inputs"):
            check(
                name,
                self.tune or not getattr(self, name),
                "False or None with tune=False, which tunes nothing",
            )

    def unused_options(self) -> dict[str, str]:
        """Options that differ from their defaults and that the others leave without effect, and why."""
        from .methods import METHODS

        method, methods = METHODS[self.method](self), {name: make(self) for name, make in METHODS.items()}
        reasons: dict[str, str] = {}
        for name in sorted({option for each in methods.values() for option in each.options} - method.options):
            users = ", ".join(repr(key) for key, each in methods.items() if name in each.options)
            reasons[name] = f"method {self.method!r} does not use it; {users} does"
        if not self.prune_heads:
            reasons["min_heads"] = "prune_heads is False, so every head stays"
        if not self.prune_ffn:
            reasons |= dict.fromkeys(("min_neurons", "round_to"), "prune_ffn is False, so every neuron stays")
        if not (self.tune and method.tunes):
            reasons["statistics_dtype"] = "nothing is tuned" + ("" if self.tune else ", as tune is False")
            if self.method == "kprune":
                reasons["ridge"] = "nothing is tuned, as tune is False"
        if not method.needs:
            reasons["measure_dtype"] = f"method {self.method!r} measures no knowledge"
        defaults = {option.name: option.default for option in fields(self)}
        return {name: why for name, why in reasons.items() if getattr(self, name) != defaults[name]}

    @property
    def budget(self) -> tuple[str, float]:
        """The option that tells the budget, a target if there is one, and its value."""
        targets = ((name, value) for name in TARGETS if (value := getattr(self, name)) is not None)
        return next(targets, ("sparsity", float(self.sparsity or 0)))

    def check_output_dir(self, output_dir: Any = None, read_from: Iterable[Any] = (), size: float = 0) -> str:
        """The directory to save to, as text. Raises `ArgumentError` if there is none, or if it cannot or must not be written.

        Args:
            output_dir: Instead of the one of these options.
            read_from: Files and directories that must not be replaced, as the model and the data are read from them.
            size: Bytes that the checkpoint will take; 0 if that is not known.
        """
        from .files.destination import check_destination

        path = self.output_dir if output_dir is None else output_dir
        if path is None:
            raise ArgumentError("no output_dir: pass it to KPruneArguments or to save_model()")
        return check_destination(path, self.overwrite_output_dir, read_from, size)

    def training_arguments(self, output_dir: str) -> TrainingArguments:
        """The same options for the `Trainer` that evaluates and predicts, and for the integrations of `report_to`."""
        import torch
        from transformers import TrainingArguments

        return TrainingArguments(
            output_dir=output_dir,
            per_device_eval_batch_size=self.per_device_eval_batch_size,
            remove_unused_columns=self.remove_unused_columns,
            seed=self.seed,
            disable_tqdm=self.disable_tqdm,
            report_to=self.report_to,
            run_name=self.run_name,
            use_cpu=self.use_cpu,
            dataloader_pin_memory=not self.use_cpu and torch.accelerator.is_available(),  # else torch warns
        )

    def to_dict(self) -> dict[str, Any]:
        """All options, without the hub token."""
        return {key: value for key, value in asdict(self).items() if key != "hub_token"}
