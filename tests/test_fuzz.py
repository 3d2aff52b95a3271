"""Random and hostile input, by hypothesis: options, calibration rows, plans in a checkpoint, configs of models.

Whatever comes in, there are three ways out and no fourth: an error of hf_kprune's own, with the model as it was to the
bit; the exception that the caller's own code raised; or a right result. 1,400 cases, in the slow tier.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checks import by_column, masked
from data import collate as pad_right
from data import rows as plain_rows
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import tiny
from transformers import AutoConfig, PreTrainedModel

from hf_kprune import CheckpointError, KPruneArguments, KPruneError, KPrunePruner, PruningReport
from hf_kprune.arguments import TARGETS
from hf_kprune.methods import METHODS
from hf_kprune.modeling_kprune import digest
from hf_kprune.structure.sublayers import find_sublayers


pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # a warning is no way out


def cases(count: int) -> Callable[..., Any]:
    """So many random cases, the same in every run, without a limit of time for one."""
    checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much]
    return settings(
        max_examples=count, derandomize=True, deadline=None, database=None, suppress_health_check=checks
    )


class CallersError(Exception):
    """What the caller's own code raises."""


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths that a case invents lie in a folder of its own."""
    monkeypatch.chdir(tmp_path)


ENCODER = tiny("bert", num_hidden_layers=1, num_labels=3, problem_type="single_label_classification")
DECODER_CONFIG = {
    "vocab_size": 60,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 40,
}


def random_model(model_type: str, **config: Any) -> PreTrainedModel:
    """A causal language model with every parameter away from its initial value."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


DECODER = random_model("llama", **DECODER_CONFIG)
MODELS = {"encoder": ENCODER, "decoder": DECODER}
ROWS = plain_rows(24)


def bits(model: PreTrainedModel) -> dict[str, Any]:
    """All that a failed run must leave as it was."""
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = {name: module.training for name, module in model.named_modules()}
    grads = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    return {"tensors": tensors, "config": model.config.to_dict(), "training": flags, "requires_grad": grads}


def assert_untouched(model: PreTrainedModel, before: dict[str, Any]) -> None:
    after = bits(model)
    assert after["tensors"].keys() == before["tensors"].keys()
    for name, tensor in before["tensors"].items():
        assert torch.equal(after["tensors"][name].nan_to_num(7.0), tensor.nan_to_num(7.0)), name
    for what in ("config", "training", "requires_grad"):
        assert after[what] == before[what], what


def assert_own_error(error: Exception) -> None:
    """It says something, and not in the words of a library."""
    text = str(error)
    assert len(text) > 20, text
    for foreign in (
        "TypeError",
        "KeyError",
        "IndexError",
        "AttributeError",
        "RuntimeError",
        "object has no attribute",
    ):
        assert foreign not in text, text


def assert_right(
    model: PreTrainedModel, dense: PreTrainedModel, report: PruningReport, args: KPruneArguments
) -> None:
    """The budget holds; the config makes a model of these sizes; and where nothing was tuned, cut is masked."""
    asked = report.asked
    if "sparsity" in asked:
        assert report.after.flops <= (1 - asked["sparsity"]) * report.before.flops * (1 + 1e-6)
    limits = {"target_flops": "flops", "target_params": "parameters", "target_bytes": "bytes"}
    for name, size in limits.items():
        if name in asked:
            assert getattr(report.after, size) <= asked[name] * (1 + 1e-6)
    config = type(model.config).from_dict(json.loads(json.dumps(model.config.to_dict(), default=str)))
    with torch.device("meta"):
        again = type(model)(config)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    assert {name: parameter.shape for name, parameter in again.named_parameters()} == shapes
    assert model.config.model_type == dense.config.model_type
    batch = pad_right(ROWS[:4])
    with torch.no_grad():
        result = model.eval()(**batch).logits
        assert torch.isfinite(result).all()
        if not args.tune:
            sublayers = find_sublayers(dense, args.head_unit)
            masks = [torch.zeros(s.num_units, dtype=torch.bool) for s in sublayers]
            for mask, entry in zip(masks, report.sublayers, strict=True):
                mask[entry.kept] = True
            with masked(sublayers, by_column(sublayers, masks)):
                expected = dense(**batch).logits
            real = batch["attention_mask"].bool() if expected.dim() == 3 else ...
            torch.testing.assert_close(result[real], expected[real], rtol=1e-3, atol=1e-3)


def run(model: PreTrainedModel, make: Callable[[PreTrainedModel], KPrunePruner]) -> None:
    """One case: the right result, or an error and an untouched model."""
    dense, before = copy.deepcopy(model), bits(model)
    try:
        pruner = make(model)
        report = pruner.prune()
    except (KPruneError, CallersError) as error:
        if isinstance(error, KPruneError):
            assert_own_error(error)
        assert_untouched(model, before)
        return
    assert_right(model, dense, report, pruner.args)


# ---------------------------------------------------------------------------------------------------------------------
# Options
# ---------------------------------------------------------------------------------------------------------------------

JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([10**9, -(10**9), 2**63]),
    st.floats(),
    st.text(max_size=4),
    st.lists(st.integers(0, 3), max_size=2),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=1),
    st.sampled_from([torch.float32, torch.tensor(0.5), torch.tensor([1, 2]), b"0.5", 0.5j, int, object()]),
)
USUAL: dict[str, st.SearchStrategy[Any]] = {
    "sparsity": st.floats(0, 0.99),
    "target_flops": st.floats(1, 1e6),
    "target_params": st.floats(1, 1e4),
    "target_bytes": st.floats(1, 1e5),
    "method": st.sampled_from(list(METHODS)),
    "prune_heads": st.booleans(),
    "prune_ffn": st.booleans(),
    "prune_experts": st.booleans(),
    "head_unit": st.sampled_from(["group", "query"]),
    "expert_unit": st.sampled_from(["neuron", "expert"]),
    "uniform": st.booleans(),
    "min_heads": st.integers(0, 5),
    "min_neurons": st.integers(0, 13),
    "round_to": st.integers(1, 13),
    "num_tokens": st.integers(1, 200),
    "num_measure_tokens": st.integers(1, 100),
    "max_seq_length": st.integers(1, 40),
    "packing": st.booleans(),
    "per_device_batch_size": st.integers(1, 30),
    "remove_unused_columns": st.booleans(),
    "seed": st.integers(0, 2**32),
    "measure_dtype": st.sampled_from(["float32", "bfloat16"]),
    "temperature": st.floats(0.1, 10),
    "method_kwargs": st.fixed_dictionaries(
        {},
        optional={
            "lambda_pred": st.floats(0, 10),
            "lambda_rep": st.floats(1e-6, 10),
            "mu": st.floats(0.1, 100),
        },
    ),
    "pooling": st.sampled_from(["mean", "cls", "pooler", "none"]),
    "tune": st.booleans(),
    "tune_bias": st.booleans(),
    "ridge": st.floats(0, 10),
    "tune_inputs": st.booleans(),
    "statistics_dtype": st.sampled_from(["float64", "float32"]),
    "max_shard_size": st.sampled_from(["5MB", "50GB"]),
    "output_dir": st.text(alphabet="ab./~ ", max_size=6),
    "overwrite_output_dir": st.booleans(),
}


@st.composite
def options(draw: st.DrawFn) -> dict[str, Any]:
    """A few options, most of them such as people write, some of them junk."""
    names = draw(st.lists(st.sampled_from(list(USUAL)), max_size=6, unique=True))
    return {name: draw(st.one_of(USUAL[name], USUAL[name], USUAL[name], JUNK)) for name in names}


@cases(450)
@given(which=st.sampled_from(list(MODELS)), chosen=options())
def test_options(which: str, chosen: dict[str, Any]) -> None:
    """Any options give an error that names what is wrong, or a right result."""
    chosen = {"num_tokens": 200, **chosen}

    def make(model: PreTrainedModel) -> KPrunePruner:
        args = KPruneArguments(**chosen, disable_tqdm=True, use_cpu=True)
        return KPrunePruner(model, args, ROWS, pad_right)

    run(copy.deepcopy(MODELS[which]), make)


# ---------------------------------------------------------------------------------------------------------------------
# Calibration rows
# ---------------------------------------------------------------------------------------------------------------------

IDS = st.lists(st.integers(2, 59), min_size=1, max_size=12)
ODD_IDS = st.one_of(
    st.lists(st.integers(-2, 70), max_size=50),
    st.lists(st.floats(), max_size=3),
    st.lists(st.text(max_size=2), max_size=3),
    st.lists(IDS, max_size=2),
    st.none(),
    st.text(max_size=5),
    st.integers(),
    st.booleans(),
    IDS.map(torch.tensor),
    IDS.map(lambda ids: torch.tensor([ids])),
    IDS.map(lambda ids: torch.tensor(ids).float()),
    st.lists(st.none(), min_size=1, max_size=3),
)
COLUMNS = [
    "input_ids",
    "attention_mask",
    "token_type_ids",
    "labels",
    "label",
    "text",
    "position_ids",
    "idx",
    "inputs_embeds",
]


@st.composite
def usual_row(draw: st.DrawFn) -> dict[str, Any]:
    ids = draw(IDS)
    row: dict[str, Any] = {"input_ids": ids}
    if draw(st.booleans()):
        row["attention_mask"] = [1] * len(ids)
    if draw(st.booleans()):
        row["label"] = draw(st.integers(0, 2))
    return row


ODD_ROW = st.one_of(
    st.dictionaries(st.sampled_from(COLUMNS), st.one_of(IDS, ODD_IDS), max_size=4),
    ODD_IDS,
    st.tuples(st.text(max_size=3), st.text(max_size=3)),
)


def raising_stream() -> Any:
    """A generator whose own code fails after some rows."""
    yield from ROWS[:3]
    raise CallersError("the disk of the caller is gone")


DATASETS = st.one_of(
    st.lists(usual_row(), min_size=0, max_size=24),
    st.tuples(st.lists(usual_row(), min_size=4, max_size=16), st.lists(ODD_ROW, min_size=1, max_size=3)).map(
        lambda parts: parts[0] + parts[1]
    ),
    st.lists(ODD_ROW, max_size=6),
    st.dictionaries(st.sampled_from(COLUMNS), st.lists(st.one_of(IDS, ODD_IDS), max_size=4), max_size=3),
    st.sampled_from(
        [None, 7, "text", b"text", object(), torch.zeros(3), torch.ones(4, 5).long(), {}, (), set()]
    ),
    st.just("raises"),
    st.lists(usual_row(), max_size=12).map(iter),
)


@cases(450)
@given(
    which=st.sampled_from(list(MODELS)),
    dataset=DATASETS,
    collated=st.booleans(),
    method=st.sampled_from(["surgeon", "kprune", "magnitude"]),
    tokens=st.integers(1, 120),
)
def test_rows(which: str, dataset: Any, collated: bool, method: str, tokens: int) -> None:
    """Any calibration data give an error that names what is wrong, the caller's own exception, or a right result."""
    data = raising_stream() if isinstance(dataset, str) and dataset == "raises" else dataset
    args = KPruneArguments(
        method=method, num_tokens=tokens, ridge=0.1 if method == "surgeon" else None, disable_tqdm=True
    )

    def make(model: PreTrainedModel) -> KPrunePruner:
        return KPrunePruner(model, args, data, pad_right if collated else None)

    model = copy.deepcopy(MODELS[which])
    try:
        run(model, make)
    except (KeyError, TypeError, ValueError, RuntimeError, IndexError) as error:
        # the collator of the caller, who may raise what it likes over odd rows
        frames = []
        trace = error.__traceback__
        while trace is not None:
            frames.append(trace.tb_frame.f_code.co_name)
            trace = trace.tb_next
        if not collated or "collate" not in frames or "padded" not in frames:
            raise


# ---------------------------------------------------------------------------------------------------------------------
# Plans in the config of a checkpoint
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A pruned checkpoint, and what it gives for some rows."""
    folder = tmp_path_factory.mktemp("plans") / "pruned"
    args = KPruneArguments(sparsity=0.5, num_tokens=100, ridge=0.1, disable_tqdm=True)
    pruner = KPrunePruner(copy.deepcopy(ENCODER), args, ROWS, pad_right)
    pruner.prune()
    pruner.save_model(str(folder))
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return folder, loaded(**pad_right(ROWS[:4])).logits


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values in nested lists and dictionaries."""
    entries = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    return [path, *(place for key, entry in entries for place in places(entry, (*path, key)))]


@cases(350)
@given(data=st.data())
def test_plans(checkpoint: tuple[Path, torch.Tensor], data: st.DataObject) -> None:
    """An edited plan, also with a checksum made anew, is refused or is the plan that was."""
    folder, expected = checkpoint
    config = json.loads((folder / "config.json").read_text())
    for _ in range(data.draw(st.integers(1, 3))):
        plan = config.get("kprune")
        path = data.draw(st.sampled_from(places(plan)))
        replacement = data.draw(st.one_of(JUNK.filter(jsonable), st.integers(0, 12), st.just("remove")))
        holder: Any = config
        for key in ("kprune", *path[:-1]) if path else ():
            holder = holder[key]
        key = path[-1] if path else "kprune"
        if replacement == "remove":
            del holder[key]
        else:
            holder[key] = replacement
        if not isinstance(config.get("kprune"), dict):
            break
    if (
        isinstance(config.get("kprune"), dict)
        and data.draw(st.booleans())
        and jsonable(config["kprune"].get("stacks"))
    ):
        config["kprune"]["sha256"] = digest(config["kprune"].get("stacks"))
    sizes = AutoConfig.for_model("bert").to_dict() | config
    sizes.pop("transformers_weights", None)
    try:
        loaded = transformers.BertForSequenceClassification.from_pretrained(
            folder, config=transformers.BertConfig.from_dict(sizes)
        )
    except CheckpointError as error:
        assert_own_error_of_loading(error)
        return
    except RuntimeError:  # without a plan it is not ours, and transformers refuses the weights
        if isinstance(config.get("kprune"), dict):
            raise
        return
    batch = pad_right(ROWS[:4])
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(**batch).logits, expected)


def assert_own_error_of_loading(error: CheckpointError) -> None:
    assert len(str(error)) > 20, error


def jsonable(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


# ---------------------------------------------------------------------------------------------------------------------
# Configs of models
# ---------------------------------------------------------------------------------------------------------------------

SIZES: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "llama": {
        "hidden_size": st.sampled_from([8, 16, 24]),
        "intermediate_size": st.integers(1, 20),
        "num_hidden_layers": st.integers(0, 3),
        "num_attention_heads": st.integers(1, 6),
        "num_key_value_heads": st.integers(1, 6),
        "head_dim": st.sampled_from([2, 4, 6, 8]),
        "tie_word_embeddings": st.booleans(),
        "attention_bias": st.booleans(),
        "mlp_bias": st.booleans(),
        "hidden_act": st.sampled_from(["silu", "gelu", "relu"]),
        "rms_norm_eps": st.sampled_from([1e-6, 1e-2]),
    },
    "gpt2": {
        "n_embd": st.sampled_from([8, 16, 24]),
        "n_inner": st.integers(1, 20),
        "n_layer": st.integers(0, 3),
        "n_head": st.integers(1, 6),
        "scale_attn_weights": st.booleans(),
        "reorder_and_upcast_attn": st.booleans(),
        "scale_attn_by_inverse_layer_idx": st.booleans(),
    },
    "opt": {
        "hidden_size": st.sampled_from([8, 16, 24]),
        "ffn_dim": st.integers(1, 20),
        "num_hidden_layers": st.integers(0, 3),
        "num_attention_heads": st.integers(1, 6),
        "word_embed_proj_dim": st.sampled_from([8, 16]),
        "do_layer_norm_before": st.booleans(),
        "enable_bias": st.booleans(),
        "layer_norm_elementwise_affine": st.booleans(),
    },
}
STARTS: dict[str, dict[str, Any]] = {
    "llama": DECODER_CONFIG,
    "gpt2": {"n_embd": 16, "n_inner": 12, "n_layer": 1, "n_head": 4},
    "opt": {
        "hidden_size": 16,
        "ffn_dim": 12,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 16,
    },
}
FIXED = {
    "vocab_size": 60,
    "max_position_embeddings": 40,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}


@st.composite
def configs(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    model_type = draw(st.sampled_from(list(SIZES)))
    names = draw(st.lists(st.sampled_from(list(SIZES[model_type])), unique=True, min_size=1))
    chosen = {name: draw(SIZES[model_type][name]) for name in names}
    return model_type, {**FIXED, **STARTS[model_type], **chosen}


@cases(150)
@given(described=configs(), sparsity=st.floats(0.05, 0.95), by=st.sampled_from(["group", "query"]))
def test_configs(described: tuple[str, dict[str, Any]], sparsity: float, by: str) -> None:
    """A model of any sizes, heads that do not divide and layers that are not there among them."""
    model_type, values = described
    try:
        model = random_model(model_type, **values)
        model(**pad_right(ROWS[:2]))
    except Exception:  # transformers itself does not make or run such a model
        return
    args = KPruneArguments(
        sparsity=sparsity, head_unit=by, num_tokens=150, tune=sparsity > 0.5, ridge=0.1, disable_tqdm=True
    )
    run(model, lambda dense: KPrunePruner(dense, args, ROWS, pad_right))


def test_targets_are_all_tried() -> None:
    """A budget that is added to the options must be added to the fuzz too; times need a quiet machine."""
    assert {"target_latency", "target_speedup"} == set(TARGETS) - USUAL.keys()
