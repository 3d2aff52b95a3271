"""What is refused of a model, named, before anything runs; what is taken off it; and that the caller's settings stay his."""

from __future__ import annotations

import copy
import functools
import itertools
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from data import collate, rows
from models import shallow, slow_unless_in
from torch import nn
from torch.nn.utils import parametrizations, prune
from transformers import AutoModelForImageTextToText, PreTrainedModel, ShieldGemma2Config
from transformers.utils import logging

from hf_kprune import ArgumentError, CalibrationError, KPruneArguments, KPrunePruner, UnsupportedModelError
from hf_kprune.calibration import checks as calibration_checks
from hf_kprune.structure import readiness, walk
from hf_kprune.structure.checks import unread
from hf_kprune.structure.surroundings import INHERITED, PRODUCTS, exact_products, product_precisions


DATA = rows(20)


def pruner(model: Any, compute_loss: Any = None, **options: Any) -> KPrunePruner:
    args = KPruneArguments(**{"sparsity": 0.6, "disable_tqdm": True, "use_cpu": True, **options})
    return KPrunePruner(model, args, DATA, collate, compute_loss=compute_loss)


@functools.cache
def pruned(method: str = "surgeon") -> dict[str, torch.Tensor]:
    """The weights of a plain model after pruning."""
    model = shallow()
    pruner(model, method=method).prune()
    weights: dict[str, torch.Tensor] = model.state_dict()
    return weights


def check_same(model: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    assert model.state_dict().keys() == expected.keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]), name


# ---------------------------------------------------------------------------------------------------------------------
# Projections that are no plain linear layers
# ---------------------------------------------------------------------------------------------------------------------


class Scaled(nn.Linear):
    """Not what its weight and bias say."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return 1.3 * super().forward(hidden)


class Clipped(nn.Linear):
    """As its weight and bias say, as long as what it reads is small."""

    limit = 5.0

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden.clamp(-self.limit, self.limit))


class Alias(nn.Linear):
    """A linear layer by another name."""


class Adapted(nn.Linear):
    """With a low-rank part of its own, as adapters have."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs)
        self.low, self.high = nn.Parameter(torch.randn(2, inputs)), nn.Parameter(torch.randn(outputs, 2))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden) + hidden @ self.low.T @ self.high.T


def replace(path: str, kind: type[nn.Linear]) -> Callable[[PreTrainedModel], None]:
    def change(model: PreTrainedModel) -> None:
        old: Any = model.bert.encoder.layer[1].get_submodule(path)
        new = kind(old.in_features, old.out_features)
        new.weight, new.bias = old.weight, old.bias
        model.bert.encoder.layer[1].set_submodule(path, new)

    return change


def on_query(change: Callable[[Any], Any]) -> Callable[[PreTrainedModel], None]:
    return lambda model: change(model.bert.encoder.layer[1].attention.self.query) and None


class Packed(torch.Tensor):
    """As quantisers keep weights: a tensor that stands for another."""


def packed(module: Any) -> None:
    module.weight = nn.Parameter(module.weight.detach().as_subclass(Packed))


def observed(module: Any) -> None:
    module.__class__ = type("Linear", (nn.Linear,), {"__module__": "torch.ao.nn.qat.modules.linear"})


QUERY = r"bert\.encoder\.layer\.1\.attention\.self\.query"

NO_PROJECTIONS: dict[str, tuple[Callable[[PreTrainedModel], Any], str]] = {
    "scaled input": (
        replace("intermediate.dense", Scaled),
        r"layer\.1\.intermediate\.dense, a .*Scaled, does not compute x W'",
    ),
    "scaled output": (
        replace("output.dense", Scaled),
        r"layer\.1\.output\.dense, a .*Scaled, does not compute x W'",
    ),
    "adapted": (
        replace("attention.self.value", Adapted),
        r"self\.value, a .*Adapted, does not compute x W' \+ b",
    ),
    "weight norm": (
        on_query(parametrizations.weight_norm),
        f"the weight of {QUERY} is computed from other tensors",
    ),
    "spectral norm": (
        on_query(nn.utils.spectral_norm),
        f"the weight of {QUERY} is computed from other tensors",
    ),
    "masked": (
        on_query(lambda m: prune.l1_unstructured(m, "weight", 0.5)),
        f"the weight of {QUERY} is computed from other",
    ),
    "packed": (on_query(packed), f"{QUERY}.weight is a .*Packed, expected a plain tensor: quantise or shard"),
    "observed": (
        on_query(observed),
        f"{QUERY} is a torch.ao.nn.qat.* quantised or to be; prune the model before",
    ),
    "forward": (
        on_query(lambda m: setattr(m, "forward", lambda x: x)),
        f"the forward of {QUERY} was replaced by",
    ),
    "another dtype": (
        on_query(lambda m: m.double()),
        f"{QUERY} is torch.float64 in a model of torch.float32",
    ),
    "half": (on_query(lambda m: m.bfloat16()), f"{QUERY} is torch.bfloat16 in a model of torch.float32"),
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.spectral_norm` is deprecated")
@pytest.mark.parametrize("case", NO_PROJECTIONS)
def test_a_projection_that_is_more_than_weight_and_bias_is_refused_at_once(case: str) -> None:
    spoil, message = NO_PROJECTIONS[case]
    model = shallow()
    spoil(model)
    with pytest.raises(UnsupportedModelError, match=message):
        pruner(model)


def clipped(model: PreTrainedModel) -> None:
    replace("output.dense", Clipped)(model)
    model.bert.encoder.layer[1].intermediate.dense.bias.data += 100


ON_REAL_INPUTS: dict[str, tuple[Callable[[PreTrainedModel], Any], str]] = {
    "large inputs": (clipped, r"layer\.1\.output\.dense, a .*Clipped, does not compute x W' \+ b"),
    "hook": (
        on_query(lambda m: m.register_forward_hook(lambda *a: 2 * a[2])),
        f"{QUERY}, .* with hooks, does not compute",
    ),
}


@pytest.mark.parametrize("case", ON_REAL_INPUTS)
def test_what_only_real_inputs_show_not_to_be_linear_is_refused_before_anything_is_cut(case: str) -> None:
    spoil, message = ON_REAL_INPUTS[case]
    model = shallow()
    spoil(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UnsupportedModelError, match=message):
        pruner(model).prune()
    check_same(model, before)


def test_a_linear_layer_by_another_name_and_one_that_is_watched_are_pruned_alike() -> None:
    model, calls = shallow(), []
    replace("intermediate.dense", Alias)(model)
    model.bert.encoder.layer[1].output.dense.register_forward_hook(lambda *_: calls.append(1))
    pruner(model).prune()
    assert calls
    check_same(model, pruned())


# ---------------------------------------------------------------------------------------------------------------------
# Wrappers
# ---------------------------------------------------------------------------------------------------------------------


def prepared(model: PreTrainedModel) -> Any:
    AcceleratorState._reset_state()
    try:
        return Accelerator(mixed_precision="bf16", cpu=True).prepare(model)
    finally:
        AcceleratorState._reset_state()


WRAPPED: dict[str, Callable[[PreTrainedModel], Any]] = {
    "accelerate, bf16": prepared,
    "DataParallel": nn.DataParallel,
    "torch.compile": lambda model: torch.compile(model, backend="eager"),
    "both": lambda model: torch.compile(prepared(model), backend="eager"),
}


@pytest.mark.parametrize("case", slow_unless_in(("DataParallel", "both"), WRAPPED))
def test_wrappers_are_taken_off_and_change_nothing(case: str) -> None:
    model = shallow()
    pruner(WRAPPED[case](model)).prune()
    assert "forward" not in vars(model)
    check_same(model, pruned())
    assert prepared(model) is model  # and it can be prepared again
    assert model(**collate(rows(2))).logits.dtype == torch.float32
    assert "forward" in vars(model)


def test_a_model_that_was_prepared_after_the_pruner_was_made_is_unwrapped_too() -> None:
    model = shallow()
    ours = pruner(model)
    prepared(model)
    ours.prune()
    check_same(model, pruned())


def compiled_in_place(model: PreTrainedModel) -> None:
    model.compile(backend="eager")


def compiled_layer(model: PreTrainedModel) -> None:
    model.bert.encoder.layer[1].compile(backend="eager")


def compiled_forward(model: PreTrainedModel) -> None:
    layer: Any = model.bert.encoder.layer[1]
    layer.forward = torch.compile(layer.forward, backend="eager")


def optimised_layer(model: PreTrainedModel) -> None:
    model.bert.encoder.layer[1] = torch.compile(model.bert.encoder.layer[1], backend="eager")


def autocast(model: PreTrainedModel) -> None:
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)


def dispatched(model: PreTrainedModel) -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    add_hook_to_module(model.bert.encoder.layer[1], AlignDevicesHook("cpu"))


REPLACED: dict[str, tuple[Callable[[PreTrainedModel], Any], str]] = {
    "compiled in place": (
        compiled_in_place,
        "BertForSequenceClassification is compiled.* prune the model before",
    ),
    "compiled layer": (compiled_layer, r"bert\.encoder\.layer\.1 is compiled"),
    "optimised layer": (optimised_layer, r"bert\.encoder\.layer\.1 is compiled"),
    "compiled forward": (compiled_forward, r"the forward of bert\.encoder\.layer\.1 was replaced by"),
    "autocast": (
        autocast,
        r"the forward of BertForSequenceClassification was replaced by 'BertForSequenceClass",
    ),
    "moved about": (dispatched, r"bert\.encoder\.layer\.1 carries a hook of accelerate.* without device_map"),
}


@pytest.mark.parametrize("case", REPLACED)
@pytest.mark.parametrize("late", [False, True], ids=["when the pruner is made", "when it prunes"])
def test_what_cannot_be_unwrapped_is_refused_at_once(case: str, late: bool) -> None:
    spoil, message = REPLACED[case]
    model = shallow()
    ours = pruner(model) if late else None
    spoil(model)
    with pytest.raises(UnsupportedModelError, match=message):
        pruner(model) if ours is None else ours.prune()


# ---------------------------------------------------------------------------------------------------------------------
# Numbers that are not finite, losses without a graph
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name", ["classifier.weight", "bert.pooler.dense.bias", "bert.encoder.layer.1.output.dense.weight"]
)
def test_weights_that_are_not_finite_are_named_at_once(name: str, value: float) -> None:
    model = shallow()
    model.get_parameter(name).data.view(-1)[3] = value
    with pytest.raises(UnsupportedModelError, match=f"{name} holds NaN or Inf"):
        pruner(model)


def undefined(student: Any, teacher: Any, valid: torch.Tensor) -> torch.Tensor:
    losses: torch.Tensor = student.logits.sum(-1) * float("nan")
    return losses


def steep(student: Any, teacher: Any, valid: torch.Tensor) -> torch.Tensor:
    """Finite, with a gradient that is not."""
    losses: torch.Tensor = (student.logits * 0).sum(-1).sqrt()
    return losses


def detached(student: Any, teacher: Any, valid: torch.Tensor) -> torch.Tensor:
    losses: torch.Tensor = (student.logits - teacher.logits).detach().square().sum(-1)
    return losses


LOSSES: dict[str, tuple[Any, type[Exception], str]] = {
    "NaN": (undefined, ArgumentError, r"compute_loss returned \[nan.* expected finite numbers"),
    "steep": (steep, ArgumentError, "the gradient of compute_loss to logits is NaN or infinite"),
    "detached": (detached, ArgumentError, "compute_loss returned numbers without a graph"),
    "a number": (lambda *_: 1.0, ArgumentError, "compute_loss returned a float"),
}


@pytest.mark.parametrize("method", ["surgeon", "kprune"])
@pytest.mark.parametrize("case", LOSSES)
def test_a_loss_that_cannot_be_used_is_said_to_be_the_reason(case: str, method: str) -> None:
    loss, error, message = LOSSES[case]
    with pytest.raises(error, match=message):
        pruner(shallow(), loss, method=method).prune()


# ---------------------------------------------------------------------------------------------------------------------
# A model that its config does not make
# ---------------------------------------------------------------------------------------------------------------------


def head_of_three(model: PreTrainedModel) -> None:
    model.classifier = nn.Linear(16, 3)


def head_without_bias(model: PreTrainedModel) -> None:
    model.classifier = nn.Linear(16, 2, bias=False)


def deeper_head(model: PreTrainedModel) -> None:
    model.classifier = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 2))


def more_words(model: PreTrainedModel) -> None:
    model.bert.embeddings.word_embeddings = nn.Embedding(70, 16)


def without_pooler(model: PreTrainedModel) -> None:
    model.bert.pooler = None


def normed_head(model: PreTrainedModel) -> None:
    parametrizations.weight_norm(model.classifier)


def fewer_layers(model: PreTrainedModel) -> None:
    del model.bert.encoder.layer[1]


def registered(model: PreTrainedModel) -> None:
    model.register_buffer("centre", torch.zeros(2))


OTHERS: dict[str, tuple[Callable[[PreTrainedModel], Any], str]] = {
    "head": (
        head_of_three,
        r"classifier\.\w+ is \(3,.* the config of BertFor.* makes it \(2,.*config\.num_labels",
    ),
    "bias": (head_without_bias, "lacks classifier.bias, which the config"),
    "deeper": (deeper_head, r"holds classifier\.0\.bias, which the config of .* does not make"),
    "words": (more_words, r"word_embeddings\.weight is \(70, 16\).* config\.vocab_size"),
    "pooler": (without_pooler, "lacks bert.pooler.dense.bias"),
    "normed": (normed_head, "holds classifier.parametrizations.weight.original0"),
    "layers": (fewer_layers, "lacks bert.encoder.layer.1"),
    "buffer": (registered, "holds centre, which"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_could_not_be_loaded_after_saving_is_refused_before_anything_runs(case: str) -> None:
    spoil, message = OTHERS[case]
    model = shallow()
    spoil(model)
    with pytest.raises(UnsupportedModelError, match=message):
        pruner(model)


def test_weights_that_the_config_ties_and_the_model_does_not_are_refused() -> None:
    model = shallow(head="MASKED_LM")
    model.cls.predictions.decoder.weight = nn.Parameter(
        torch.randn_like(model.cls.predictions.decoder.weight)
    )
    with pytest.raises(UnsupportedModelError, match="differ, but the config of BertForMaskedLM ties them"):
        pruner(model)


def test_embeddings_resized_as_they_should_be_and_heads_that_the_config_knows_are_pruned() -> None:
    model = shallow()
    model.resize_token_embeddings(70, mean_resizing=False)
    head_of_three(model)
    model.config.num_labels, model.config.problem_type = 3, "single_label_classification"
    assert pruner(model).prune().sparsity > 0


# ---------------------------------------------------------------------------------------------------------------------
# The caller's settings
# ---------------------------------------------------------------------------------------------------------------------


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
        assert torch.get_default_dtype() == dtype
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


SURROUNDINGS: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "device": lambda: torch.device("meta"),
    "deterministic": deterministic,
}


@pytest.mark.parametrize(
    ("case", "method"),
    slow_unless_in(
        [
            ("no_grad", "kprune"),
            ("inference_mode", "surgeon"),
        ],
        itertools.product(SURROUNDINGS, ("surgeon", "kprune")),
    ),
)
def test_what_is_set_around_prune_changes_nothing(case: str, method: str) -> None:
    model = shallow()
    with SURROUNDINGS[case]():
        pruner(model, method=method).prune()
    check_same(model, pruned(method=method))


def test_checks_multiply_exactly_and_the_work_as_the_caller_has_set(monkeypatch: pytest.MonkeyPatch) -> None:
    precisions: dict[str, set[str]] = {}

    def noted(module: Any, name: str) -> None:
        function = getattr(module, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            precisions.setdefault(name, set()).update(product_precisions())
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    noted(readiness, "check_described")
    noted(calibration_checks, "check_order")
    noted(walk, "run_above")
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        pruner(shallow()).prune()
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(precision)
    assert precisions.pop("run_above") >= {"tf32", "bf16"}
    assert precisions == dict.fromkeys(("check_described", "check_order"), {"ieee"})


def test_exact_products_leave_what_is_inherited_as_it_is() -> None:
    places: tuple[Any, ...] = (*PRODUCTS, torch.backends)
    before = [place.fp32_precision for place in places]
    try:
        for place in PRODUCTS:
            place.fp32_precision = INHERITED
        PRODUCTS[0].fp32_precision = "ieee"
        places[-1].fp32_precision = "tf32"
        with exact_products():
            assert {*product_precisions()} == {"ieee"}
        assert product_precisions() == ["ieee", *["tf32"] * (len(PRODUCTS) - 1)]
        places[-1].fp32_precision = "ieee"
        assert {*product_precisions()} == {"ieee"}
    finally:
        for place, precision in zip(places, before, strict=True):
            place.fp32_precision = precision


def test_weights_made_in_inference_mode_are_pruned_like_others() -> None:
    with torch.inference_mode():
        model = shallow()
    assert model.classifier.weight.is_inference()
    pruner(model).prune()
    check_same(model, pruned())


def settings(model: PreTrainedModel) -> dict[str, Any]:
    """What is the caller's and could be changed."""
    return {
        "python": random.getstate(),
        "numpy": str(np.random.get_state()),
        "torch": torch.get_rng_state().tolist(),
        "config": model.config.to_dict(),
        "modes": {name: module.training for name, module in model.named_modules()},
        "gradients": {name: p.requires_grad for name, p in model.named_parameters()},
        "checkpointing": [getattr(module, "gradient_checkpointing", None) for module in model.modules()],
        "attributes": sorted(vars(model)),
        "verbosity": logging.get_verbosity(),
        "dtype": torch.get_default_dtype(),
        "determinism": torch.are_deterministic_algorithms_enabled(),
        "grad": torch.is_grad_enabled(),
    }


class Failing:
    """An evaluation dataset whose rows cannot be read."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Any:
        raise RuntimeError("the disk is gone")


@pytest.mark.parametrize("call", ["evaluate", "predict", "plan", "prune", "sweep"])
@pytest.mark.parametrize("fails", [False, True])
def test_what_is_the_caller_s_is_as_it_was_after_every_call(call: str, fails: bool) -> None:
    random.seed(7)
    np.random.seed(7)
    torch.manual_seed(7)
    model = shallow(use_cache=True).train()
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = True
    model.bert.encoder.layer[1].eval()
    model.bert.embeddings.requires_grad_(False)
    ours = pruner(model)
    data: Any = Failing() if fails else [{**row, "labels": 1} for row in rows(6)]
    ours.eval_dataset = data
    if fails:
        ours.calibration_dataset = data
    calls: dict[str, Callable[[], object]] = {
        "evaluate": ours.evaluate,
        "predict": lambda: ours.predict(data),
        "plan": ours.plan,
        "prune": ours.prune,
        "sweep": lambda: ours.sweep([0.3]),
    }
    logging.set_verbosity_warning()
    before = settings(model)
    if fails:
        with pytest.raises((RuntimeError, CalibrationError), match="the disk is gone|could not be read"):
            calls[call]()
    else:
        calls[call]()
    after = settings(model)
    if call == "prune" and not fails:
        for of in (before, after):
            of["config"].pop("kprune", None)
            for kind in ("modes", "gradients"):  # of what is left
                of[kind] = {name: value for name, value in of[kind].items() if name in after[kind]}
    for name, value in before.items():
        assert after[name] == value, name


def test_a_model_that_transformers_does_not_read_again_under_the_names_that_it_writes_is_refused(
    tmp_path: Path,
) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 4}
    words = {"vocab_size": 60, "num_key_value_heads": 2, "head_dim": 4, "pad_token_id": 1}
    image = {"image_size": 8, "patch_size": 4, "model_type": "siglip_vision_model"}
    text, image = {**sizes, **words, "model_type": "gemma3_text"}, {**sizes, **image}
    config = ShieldGemma2Config(text_config=text, vision_config=image)
    model = AutoModelForImageTextToText.from_config(config)
    model.save_pretrained(tmp_path)
    _, names = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert len(unread(model)) == len(names["unexpected_keys"])
    refused = pytest.raises(UnsupportedModelError, match="a name that it does not read there")
    with refused if names["unexpected_keys"] else nullcontext():
        KPrunePruner(model, KPruneArguments(sparsity=0.5, use_cpu=True), [{"input_ids": [5, 6, 7]}])
