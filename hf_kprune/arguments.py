"""The options of a pruning run, usable from Python and from the command line.

As data they take no library, so that `hf-kprune --help` is quick: PyTorch and Transformers are imported by
what needs them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any

from .combinations import check_combinations, without_effect
from .errors import ArgumentError
from .options import (
    CHOICES,
    Bound,
    Unasked,
    at_least,
    check_values,
    expect,
    option,
    over,
)
from .validation import check_fields, known_keywords


if TYPE_CHECKING:
    from transformers import TrainingArguments


METHOD_ALIASES = {"obs": "surgeon"}
"""Names that methods had in earlier releases."""

METHOD_NAMES = (
    "surgeon",
    "kprune",
    "kwon",
    "kcm",
    "magnitude",
    "random",
    "taylor",
    "flap",
    "wanda_sp",
)
"""The keys of `methods.METHODS`, which takes PyTorch."""

LATENCY_BATCH = 32


@known_keywords
@dataclass
class KPruneArguments:
    """Options of `KPrunePruner`, in groups. Names shared with `TrainingArguments` mean the same.

    > How small

    `sparsity` is the fraction of prunable FLOPs to **remove**. Attention and FFN sublayers are prunable,
    embeddings and heads for tasks are not. `target_flops`, `target_params`, `target_bytes`, `target_latency`
    or `target_speedup` say what may be left instead. There is one budget, `sparsity=0.5` if none is given.
    `latency_batch_size` and `latency_length` say what is timed, `flops_length` says for which length of
    sequence FLOPs count.

    `prune_heads`, `prune_ffn`, `prune_experts`, `towers`, `head_unit`, `expert_unit`, `uniform`, `min_heads`,
    `min_neurons`, `round_to` say what may go.

    > With what data

    `text_columns`, `num_tokens`, `num_measure_tokens`, `max_seq_length`, `packing`, `per_device_batch_size`,
    `remove_unused_columns`, `seed`.

    > How units are chosen

    `method`, `method_kwargs`, `measure_dtype`, `temperature`, `pooling`. `lambda_pred`, `lambda_rep` and `mu`
    are old names of what is in `method_kwargs`.

    > How weights are tuned

    `tune`, `tune_bias`, `tune_inputs`, `ridge`, `statistics_dtype`.

    > Where to, and what is shown

    `output_dir`, `overwrite_output_dir`, `max_shard_size`, `disable_tqdm`, `verbose`, `report_to`,
    `run_name`, `html_report`, `card_metadata`, `per_device_eval_batch_size`, `push_to_hub`, `hub_model_id`,
    `hub_token`, `hub_private_repo`, `hub_revision`, `use_cpu`.

    Raises:
        ArgumentError: If a value cannot be.

    Example:

        >>> from hf_kprune import KPruneArguments
        >>> KPruneArguments(sparsity=0.75, num_tokens=20_000).budget
        ('sparsity', 0.75)
        >>> KPruneArguments(target_params=5e6).budget
        ('target_params', 5000000.0)
    """

    output_dir: str | None = option(
        None, "Write the pruned checkpoint here. A checkpoint that is there takes overwrite_output_dir."
    )
    overwrite_output_dir: bool = option(
        False, "Replace the checkpoint that output_dir holds. Other files in it stay."
    )
    sparsity: float | None = option(
        Unasked(0.5),
        "Remove this fraction of the prunable FLOPs, in [0, 1): 0.75 leaves a quarter of them. Attention "
        "heads and neurons of FFNs and experts are prunable. Embeddings and the head of the model are not.",
    )
    target_flops: Annotated[float | None, over(0)] = option(
        None, "Keep at most this many FLOPs of a sequence of flops_length tokens, in place of a sparsity."
    )
    target_params: Annotated[float | None, over(0)] = option(
        None, "Keep at most this many parameters in the model, embeddings included, in place of a sparsity."
    )
    target_bytes: Annotated[float | None, over(0)] = option(
        None, "Keep at most this many bytes of weights, in the dtype that they have, in place of a sparsity."
    )
    target_latency: Annotated[float | None, over(0)] = option(
        None,
        "Let a forward pass take at most this many seconds, measured on this device, in place of a "
        "sparsity. Methods that decide all at once can do it: 'surgeon', 'kwon', 'magnitude', 'taylor'.",
    )
    target_speedup: Annotated[float | None, over(0)] = option(
        None,
        "Make a forward pass this many times as fast as now, measured on this device, in place of a "
        "sparsity. Methods that decide all at once can do it: 'surgeon', 'kwon', 'magnitude', 'taylor'.",
    )
    latency_batch_size: Annotated[int, at_least(1)] = option(
        LATENCY_BATCH,
        "Measure the time of a batch of this many sequences; of images and audio, of a calibration batch.",
    )
    latency_length: int | None = option(
        None,
        "Measure the time of sequences of this many tokens. By default they are as long as the calibration "
        "rows are on average.",
    )
    flops_length: Annotated[int | None, at_least(1)] = option(
        None,
        "Count the FLOPs of a sequence of this many tokens, as many as the model will serve. An "
        "encoder-decoder has one on both sides. By default it is as long as the calibration rows on average.",
    )
    method: str = option(
        "surgeon",
        "Choose units by this method. 'surgeon' is ours, an optimal brain surgeon in the Fisher metric. "
        "'kprune' is that of the paper (Park et al., ICLR 2024). The others are there for comparison.",
        choices=[*METHOD_NAMES, *METHOD_ALIASES],
    )
    method_kwargs: dict[str, Any] | str | None = option(
        None,
        "Pass these options to the method, which other methods do not take. They are a dict, or JSON on the "
        "command line: '{\"mu\": 64}' with method kprune. docs/cli.md lists them.",
    )
    prune_heads: bool = option(True, "Prune attention heads.")
    prune_ffn: bool = option(True, "Prune FFN neurons.")
    prune_experts: bool = option(
        True, "Prune the experts of a mixture of experts: their neurons, or, by expert_unit, whole ones."
    )
    towers: list[str] | None = option(
        None,
        "Prune these parts of a model that is made of several, and leave the others as they are: language, "
        "vision, audio, or a part by its name in the model, such as encoder or vision_tower. By default all "
        "that run on the calibration rows are pruned. Texts alone are enough for language.",
    )
    head_unit: str = option(
        "group",
        "Prune grouped queries in this unit. A group is a key-value head with its query heads. A query is "
        "one query head of every group, and leaves keys, values and their cache as they are.",
        choices=CHOICES["head_unit"],
    )
    expert_unit: str = option(
        "neuron",
        "Prune mixtures of experts in this unit. A neuron is one of an expert, and all experts of a layer "
        "keep as many. An expert goes with its row of the router, which saves parameters but no FLOPs, as "
        "tokens are sent to as many others: give target_params or target_bytes.",
        choices=CHOICES["expert_unit"],
    )
    uniform: bool = option(
        False,
        "Leave equally many heads and neurons in all layers of a stack. The result is a plain checkpoint "
        "that any program loads. The config of the architecture must be able to say it.",
    )
    min_heads: Annotated[int, at_least(0)] = option(
        0, "Keep at least this many heads in every attention sublayer. With 0 it may lose all."
    )
    min_neurons: Annotated[int, at_least(0)] = option(
        0,
        "Keep at least this many neurons in every FFN sublayer and every expert. With 0 it may lose all.",
    )
    round_to: Annotated[int, at_least(1)] = option(
        1,
        "Keep a multiple of this number of neurons in every FFN and every expert, or all of them. 8 or 64 "
        "suit some hardware.",
    )

    text_columns: list[str] | None = option(
        None,
        "Read the texts from these columns. Name one column, or two for pairs or for sources and targets. "
        "For multiple choice, name the question and each choice. By default columns of known names are "
        "read, such as text, sentence, or sentence1 and sentence2.",
    )
    num_tokens: Annotated[int, at_least(1)] = option(
        100_000, "Tune weights on this many calibration tokens. Padding does not count."
    )
    num_measure_tokens: int | None = option(
        None,
        "Measure units on this many of the calibration tokens, as this costs more than tuning. By default "
        "'surgeon' takes 10,000 and other methods take all of them.",
    )
    max_seq_length: Annotated[int | None, at_least(1)] = option(
        None, "Truncate texts to this many tokens. By default they have as many as the model can take."
    )
    packing: bool = option(
        False,
        "Join all texts and cut them into calibration rows of max_seq_length tokens. By default these are as "
        "many as the model can take, and at most 1024.",
    )
    per_device_batch_size: Annotated[int, at_least(1)] = option(
        32, "Run this many calibration sequences at a time on each device. The result stays the same."
    )
    remove_unused_columns: bool = option(
        True,
        "Drop the columns of the calibration data that the model does not take. Otherwise they are an error.",
    )
    seed: Annotated[int, Bound("from 0 to 2**32 - 1", lambda seed: 0 <= seed < 2**32)] = option(
        42, "Draw calibration rows with this seed."
    )

    measure_dtype: str = option(
        "float32",
        "Measure knowledge in this precision. bfloat16 (autocast) is about twice as fast and rounds scores.",
        choices=CHOICES["measure_dtype"],
    )
    temperature: Annotated[float, over(0)] = option(
        2.0, "Divide logits by this temperature (gamma of the paper) in the predictive knowledge."
    )
    pooling: str | None = option(
        None,
        "Compare this embedding in the predictive knowledge of a base model without a task head. By default "
        "it is the one that the modules of a sentence-transformers folder make, or else the mean.",
        choices=CHOICES["pooling"],
    )

    tune: bool = option(True, "Tune the output weights of the units that stay (KPWT).")
    tune_bias: bool | None = option(
        None,
        "Fit the output bias too when weights are tuned. By default 'surgeon' does so and 'kprune' does not.",
    )
    ridge: Annotated[float | None, at_least(0)] = option(
        None,
        "Pull tuned weights towards the present ones this strongly, relative to the mean squares of the "
        "features. By default 'surgeon' chooses it for each sublayer by cross-validation, and it is 0 for "
        "'kprune'.",
    )
    tune_inputs: bool | None = option(
        None,
        "Correct query, key, value and first FFN projections for the drift of their inputs. By default "
        "'surgeon' does so and 'kprune' does not.",
    )
    statistics_dtype: str | None = option(
        None,
        "Compute the products that tuning sums in this precision. Sums and solves are in float64 in any "
        "case. By default it is float32 for 'surgeon' and float64 for 'kprune'.",
    )

    max_shard_size: str = option("50GB", "Split the saved weights into files of at most this size.")
    per_device_eval_batch_size: Annotated[int, at_least(1)] = option(
        32, "Evaluate and predict this many sequences at a time on each device."
    )
    disable_tqdm: bool = option(
        False, "Show no progress bar, and no lines in place of it where there is no terminal."
    )
    verbose: bool = option(
        False, "Print a line for every sublayer, the whole report, and the warnings of libraries."
    )
    report_to: list[str] = option(
        ["none"],
        "Send figures to these trackers, as in TrainingArguments: tensorboard, wandb, ... or none.",
    )
    run_name: str | None = option(None, "Give the run this name in report_to.")
    html_report: bool = option(
        False,
        "Write a page beside the checkpoint, kprune_report.html, that shows what was done. Its pictures take "
        "matplotlib.",
    )
    use_cpu: bool = option(False, "Prune on the CPU even if there is an accelerator.")
    card_metadata: dict[str, Any] | str | None = option(
        None,
        "Write these fields into the head of the model card, such as license, language, tags or datasets. "
        "They are a dict, or JSON on the command line. By default they are those of the dense model's card.",
    )

    push_to_hub: bool = option(False, "Push the checkpoint to the Hub when it is saved.")
    hub_model_id: str | None = option(
        None, "Push to this repository. By default it has the name of output_dir."
    )
    hub_token: str | None = option(
        None, "Log in to the Hub with this token. By default it is that of `hf auth login`."
    )
    hub_private_repo: bool | None = option(
        None, "Make the repository private. By default it is as the account has it."
    )
    hub_revision: str | None = option(None, "Push to this branch of the repository.")

    lambda_pred: float | None = option(None, "Pass this option of kprune in method_kwargs.")
    lambda_rep: float | None = option(None, "Pass this option of kprune in method_kwargs.")
    mu: float | None = option(None, "Pass this option of kprune in method_kwargs.")

    def __post_init__(self) -> None:
        self.check()
        for name, why in self.unused_options().items():
            warnings.warn(f"{name} is {getattr(self, name)!r}, but {why}", stacklevel=4)

    def check(self) -> None:
        """Refuse values that cannot be, also those that were assigned later. A pruner calls this when it
        starts.

        Raises:
            ArgumentError: If a value cannot be, by itself or with others.
        """
        from .files.destination import as_text

        check_fields(self)
        if self.output_dir is not None:
            as_text(self.output_dir)
        self._check_budget()
        check_values(self)
        self.method = METHOD_ALIASES.get(self.method, self.method)
        check_combinations(self)

    def _check_budget(self) -> None:
        """There is one budget, and the default gives way to a target."""
        targets = [name for name in TARGETS if getattr(self, name) is not None]
        if self.sparsity is None or isinstance(self.sparsity, Unasked):
            self.sparsity = None if targets else Unasked(0.5)
        budgets = targets if self.sparsity is None else ["sparsity", *targets]
        if len(budgets) > 1:
            values = ", ".join(f"{name}={getattr(self, name)}" for name in budgets)
            raise ArgumentError(
                f"{' and '.join(budgets)} are given, expected one of them ({values}); leave the other at None"
            )
        sparse = self.sparsity is None or 0 <= self.sparsity < 1
        expect(self, "sparsity", sparse, "the fraction of prunable FLOPs to remove, in [0, 1)")

    def unused_options(self) -> dict[str, str]:
        """Options that differ from their defaults and that the others leave without effect, and why."""
        return without_effect(self)

    @property
    def budget(self) -> tuple[str, float]:
        """The option that tells the budget, a target if there is one, and its value."""
        targets = ((name, value) for name in TARGETS if (value := getattr(self, name)) is not None)
        return next(targets, ("sparsity", float(self.sparsity or 0)))

    @property
    def units(self) -> tuple[str, str]:
        """What a unit is of grouped queries and of mixtures of experts, as `find_sublayers` takes it."""
        return self.head_unit, self.expert_unit

    def check_output_dir(
        self, output_dir: object = None, read_from: Iterable[object] = (), size: float = 0
    ) -> str:
        """The directory to save to, as text. Raises `ArgumentError` if there is none, or if it cannot or must
        not be written.

        Args:
            output_dir: Instead of the one of these options.
            read_from: Files and directories that must not be replaced, as the model and the data are read
                from them.
            size: Bytes that the checkpoint will take; 0 if that is not known.
        """
        from .files.destination import check_destination

        path = self.output_dir if output_dir is None else output_dir
        if path is None:
            raise ArgumentError("no output_dir: pass it to KPruneArguments or to save_model()")
        return check_destination(path, self.overwrite_output_dir, read_from, size)

    def training_arguments(self, output_dir: str) -> TrainingArguments:
        """The same options for the `Trainer` that evaluates and predicts, and for the integrations of
        `report_to`.
        """
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


TARGETS = tuple(each.name for each in fields(KPruneArguments) if each.name.startswith("target_"))
"""The options that say in place of a sparsity what may be left."""
