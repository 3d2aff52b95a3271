"""Saved == loaded: with hf_kprune, without it, after a kill; and what is not as it was saved is refused with the reason."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import os
import pickle
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import without_hf_kprune
from checks import (
    EMBEDDING,
    KEY,
    NORM,
    assert_same,
    assert_same_state,
    close,
    edit_weights,
    files,
    logits,
    plans,
    report,
)
from data import collate, rows, tokenizer
from forks import printed_by
from models import (
    EVERY_HEAD,
    EVERY_TYPE,
    KEPT,
    MODEL_TYPES,
    ONE_HEAD,
    classes,
    cut_all,
    cut_randomly,
    pruned,
    pruned_layer,
    slow_unless_in,
    tiny,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    pipeline,
)
from zoo import KEPT_IN_FLOAT32, make

from hf_kprune import (
    CheckpointError,
    KPruneArguments,
    KPrunePruner,
    PruningReport,
    UnsupportedModelError,
    modeling_kprune,
)
from hf_kprune.checkpoint.exporters import EXPORTERS, loads_back
from hf_kprune.checkpoint.patches import install
from hf_kprune.checkpoint.saving import save_atomically
from hf_kprune.modeling_kprune import HOW_TO_LOAD, NOTICE, Layers
from hf_kprune.structure.sublayers import find_sublayers


AUTO = {
    "": "AutoModel",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "MASKED_LM": "AutoModelForMaskedLM",
    "MULTIPLE_CHOICE": "AutoModelForMultipleChoice",
    "NEXT_SENTENCE_PREDICTION": "AutoModelForNextSentencePrediction",
    "PRETRAINING": "AutoModelForPreTraining",
    "QUESTION_ANSWERING": "AutoModelForQuestionAnswering",
    "SEQUENCE_CLASSIFICATION": "AutoModelForSequenceClassification",
    "TOKEN_CLASSIFICATION": "AutoModelForTokenClassification",
}
PIPELINES = {
    "": "feature-extraction",
    "MASKED_LM": "fill-mask",
    "SEQUENCE_CLASSIFICATION": "text-classification",
    "TOKEN_CLASSIFICATION": "token-classification",
}
TEXT = "w20 w21 <mask> w7"
ELSEWHERE = [("bert", "SEQUENCE_CLASSIFICATION")]
"""Loaded where hf_kprune is not by default; test_zoo.py does so with all families."""


# ---------------------------------------------------------------------------------------------------------------------
# With hf_kprune
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model_type", "head"), EVERY_HEAD)
def test_loads_with_the_stock_class(tmp_path: Path, model_type: str, head: str) -> None:
    model = pruned(model_type, head)
    model.save_pretrained(tmp_path)
    auto = getattr(transformers, AUTO[head]).from_pretrained(tmp_path)
    direct = type(model).from_pretrained(tmp_path)
    assert type(auto) is type(direct) is type(model)
    assert type(model) is classes(model_type)[head]
    assert_same(auto, model, head)
    assert_same(direct, model, head)


@pytest.mark.parametrize(
    ("model_type", "head"), slow_unless_in([ONE_HEAD[0], ONE_HEAD[1], ONE_HEAD[3]], ONE_HEAD)
)
def test_a_loaded_model_does_all_that_a_dense_one_does(tmp_path: Path, model_type: str, head: str) -> None:
    model = pruned(model_type, head)
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    loaded = getattr(transformers, AUTO[head]).from_pretrained(tmp_path)

    assert_same(copy.deepcopy(loaded), model, head)
    assert_same(
        pickle.loads(pickle.dumps(loaded)), model, head
    )  # before transformers hooks any model that records outputs
    outputs = loaded(**collate(rows(3)), output_hidden_states=True)
    assert len(outputs.hidden_states) == 4
    if model_type != "mpnet":  # which has eager attention only
        loaded.set_attn_implementation("sdpa")
        close(logits(loaded, head), logits(model, head))
    loaded.set_attn_implementation("eager")
    outputs = loaded(**collate(rows(3)), output_attentions=True)
    assert [attentions.shape[1] for attentions in outputs.attentions] == [2, 0, 3]
    assert_same(loaded, model, head)

    fresh = getattr(transformers, AUTO[head]).from_config(loaded.config)
    assert {k: v.shape for k, v in fresh.state_dict().items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }
    assert logits(fresh, head).isfinite().all()
    if head in PIPELINES:
        answers = pipeline(PIPELINES[head], model=str(tmp_path))
        assert type(answers.model) is type(model)
        assert_same(answers.model, model, head)
        assert answers(TEXT)


@pytest.mark.parametrize("head", ["SEQUENCE_CLASSIFICATION", "MASKED_LM"])
@pytest.mark.parametrize("model_type", slow_unless_in(("bert", "mpnet"), MODEL_TYPES))
def test_a_new_head_on_a_pruned_model(tmp_path: Path, model_type: str, head: str) -> None:
    model = pruned(model_type, head)
    model.save_pretrained(tmp_path)
    other, info = AutoModelForTokenClassification.from_pretrained(
        tmp_path, num_labels=7, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert_same_state(layers(other).state_dict(), layers(model).state_dict())
    new = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    assert "classifier.weight" in new
    assert not any("layer" in key for key in new)
    assert other(**collate(rows(3))).logits.shape[-1] == 7


def layers(model: PreTrainedModel) -> Layers:
    return find_sublayers(model)[0].layers


def test_another_number_of_labels_needs_the_same_flag_as_for_a_dense_model(tmp_path: Path) -> None:
    """`ignore_mismatched_sizes` is for heads: they may be new, pruned layers may not."""
    model = pruned()
    model.save_pretrained(tmp_path)
    load = AutoModelForSequenceClassification.from_pretrained
    with pytest.raises(CheckpointError, match="weight files do not belong together"):
        load(tmp_path, num_labels=5)
    other = load(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    assert other.config.num_labels == 5
    assert_same_state(layers(other).state_dict(), layers(model).state_dict())


def test_the_config_makes_a_round_trip(tmp_path: Path) -> None:
    model = pruned("mpnet", "MASKED_LM")
    model.save_pretrained(tmp_path / "1")
    config = AutoConfig.from_pretrained(tmp_path / "1")
    assert config.kprune == model.config.kprune
    assert not hasattr(config, "transformers_weights")
    config.save_pretrained(tmp_path / "2")
    assert json.loads((tmp_path / "1" / "config.json").read_text())["transformers_weights"] == NOTICE
    one, two = files(tmp_path / "1"), files(tmp_path / "2")
    assert two.keys() == one.keys() - {"model.safetensors"}
    assert two["modeling_kprune.py"] == one["modeling_kprune.py"]
    whole = json.loads(one["config.json"])
    assert whole.pop("kprune_weights").keys() == {
        "model.safetensors"
    }  # which the second folder does not have
    assert json.loads(two["config.json"]) == whole
    del config.kprune_weights
    assert AutoConfig.from_pretrained(tmp_path / "2").to_dict() == {
        **config.to_dict(),
        "_name_or_path": str(tmp_path / "2"),
    }


def fake_hub_cache(cache: Path, model: PreTrainedModel) -> None:
    """What a download of the tag v2 of someone/pruned, of which main is broken, leaves behind."""
    repository = cache / "models--someone--pruned"
    for branch, commit in (("main", "0" * 40), ("v2", "2" * 40)):
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / branch).write_text(commit)
        model.save_pretrained(repository / "snapshots" / commit)
    weights = repository / "snapshots" / ("0" * 40) / "model.safetensors"
    save_file(dict(tiny().state_dict()), weights, metadata={"format": "pt"})


def test_names_on_the_hub_revisions_and_subfolders(tmp_path: Path) -> None:
    model = pruned()
    fake_hub_cache(tmp_path / "cache", model)
    model.save_pretrained(tmp_path / "repository" / "inner")
    for load in (AutoModelForSequenceClassification.from_pretrained, type(model).from_pretrained):
        assert_same(load("someone/pruned", revision="v2", cache_dir=tmp_path / "cache"), model)
        assert_same(load(tmp_path / "repository", subfolder="inner"), model)
        with pytest.raises(CheckpointError, match="someone/pruned: .* do not belong together"):
            load("someone/pruned", cache_dir=tmp_path / "cache")
    config = AutoConfig.from_pretrained(tmp_path / "repository" / "inner")
    assert_same(type(model).from_pretrained(tmp_path / "repository" / "inner", config=config), model)
    assert_same(type(model).from_pretrained(None, config=config, state_dict=model.state_dict()), model)


# ---------------------------------------------------------------------------------------------------------------------
# What is in the files
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model_type", "head"), ONE_HEAD)
def test_the_file_holds_the_surviving_parameters_only(tmp_path: Path, model_type: str, head: str) -> None:
    model = pruned(model_type, head)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert sum(v.numel() for v in saved.values()) == sum(p.numel() for p in model.parameters())
    assert all(tensor.numel() for tensor in (*saved.values(), *model.parameters()))
    inside = {k: v for k, v in saved.items() if ".layer." in k}
    assert {k.split(".layer.")[1]: v.shape for k, v in inside.items()} == {
        k: v.shape for k, v in layers(model).state_dict().items()
    }
    dense = tiny(model_type, head).state_dict()
    for sublayer, units in zip(find_sublayers(model), KEPT, strict=True):
        (name,) = [k for k in dense if k.endswith(f"layer.{sublayer.index}.{sublayer.block.output}.weight")]
        if units:
            assert list(saved[name].shape) == [16, units * sublayer.unit_width]
        else:
            assert name not in saved
        assert list(dense[name].shape) == [16, sublayer.plan["of"] * sublayer.unit_width]


def test_tokenizer_generation_config_report_and_card_travel_along(tmp_path: Path) -> None:
    model = pruned("roberta", "CAUSAL_LM")
    model.generation_config.max_new_tokens = 7
    pruner = KPrunePruner(
        model, KPruneArguments(output_dir=str(tmp_path / "out")), processing_class=tokenizer()
    )
    pruner.report = report()
    pruner.save_model()
    assert sorted(os.listdir(tmp_path / "out")) == [
        "README.md",
        "config.json",
        "generation_config.json",
        "kprune_report.json",
        "kprune_report.md",
        "model.safetensors",
        "modeling_kprune.py",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert os.listdir(tmp_path) == ["out"]
    loaded = type(model).from_pretrained(tmp_path / "out")
    assert loaded.generation_config.max_new_tokens == 7
    assert_same(loaded, model, "CAUSAL_LM")
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")(TEXT, return_tensors="pt")["input_ids"]
    assert torch.equal(loaded.generate(ids, do_sample=False), model.generate(ids, do_sample=False))
    assert PruningReport.from_json((tmp_path / "out" / "kprune_report.json").read_text()) == report()
    assert HOW_TO_LOAD[1:] in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("model_type", "dtype"),
    slow_unless_in(
        [("bert", torch.float16), ("mpnet", torch.bfloat16), ("bert", torch.float64)],
        itertools.product(("bert", "mpnet"), (torch.float16, torch.bfloat16, torch.float64)),
    ),
)
def test_other_dtypes_keep_every_bit(tmp_path: Path, model_type: str, dtype: torch.dtype) -> None:
    model = cut_randomly(tiny(model_type).to(dtype))
    KPrunePruner(model).save_model(str(tmp_path / "out"))
    assert {v.dtype for v in load_file(tmp_path / "out" / "model.safetensors").values()} == {dtype}
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert loaded.dtype == dtype
    assert_same_state(loaded.state_dict(), model.state_dict())
    wide = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", dtype=torch.float64)
    assert_same_state(wide.state_dict(), {k: v.double() for k, v in model.state_dict().items()})


def test_a_half_precision_model_is_pruned_saved_and_loaded_in_its_dtype(tmp_path: Path) -> None:
    arguments = KPruneArguments(
        num_tokens=200, sparsity=0.6, disable_tqdm=True, output_dir=str(tmp_path / "out")
    )
    model = tiny().to(torch.bfloat16)
    pruner = KPrunePruner(model, arguments, rows(), data_collator=collate)
    pruner.prune()
    pruner.save_model()
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16
    assert_same_state(loaded.state_dict(), model.state_dict())
    assert sum(p.numel() for p in loaded.parameters()) < sum(p.numel() for p in tiny().parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", KEPT_IN_FLOAT32)
def test_parts_that_a_class_keeps_in_float32_are_saved_as_they_are(tmp_path: Path, name: str) -> None:
    """In models of 16 bits as users load them."""
    dense, there = make(name), set()
    for dtype in (torch.float16, torch.bfloat16):
        config = copy.deepcopy(dense.config)
        model = type(dense).from_pretrained(None, config=config, state_dict=dense.state_dict(), dtype=dtype)
        there |= {tensor.dtype for tensor in model.state_dict().values() if tensor.is_floating_point()}
        student = cut_all(model, plans(find_sublayers(model))["even"])
        KPrunePruner(student).save_model(str(tmp_path / f"{dtype}"))
        loaded = type(dense).from_pretrained(tmp_path / f"{dtype}")
        assert_same_state(loaded.state_dict(), student.state_dict())
    assert there == {torch.float16, torch.bfloat16, torch.float32}


@pytest.mark.slow
def test_a_mixture_with_parts_in_float32_is_pruned_and_saved(tmp_path: Path) -> None:
    make("glm4_moe").save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.bfloat16)
    args = KPruneArguments(num_tokens=150, num_measure_tokens=80, disable_tqdm=True, use_cpu=True)
    pruner = KPrunePruner(model, args, rows(longest=9), collate)
    pruner.prune()
    pruner.save_model(str(tmp_path / "out"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_same_state(loaded.state_dict(), model.state_dict())
    assert {value.dtype for value in loaded.state_dict().values()} == {torch.bfloat16, torch.float32}
    KPrunePruner(model.bfloat16()).save_model(str(tmp_path / "all of 16 bits"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "all of 16 bits")
    assert_same_state(loaded.bfloat16().state_dict(), model.state_dict())


def test_a_tensor_loads_back_in_another_dtype_only_with_all_that_it_holds() -> None:
    saved = torch.tensor([1.0, 1 + 2**-7]).bfloat16()
    assert loads_back(saved, saved.float(), torch.bfloat16)
    assert not loads_back(saved, saved.float() + 2**-20, torch.bfloat16)
    assert not loads_back(saved, saved + 2**-7, torch.bfloat16)
    exact = torch.tensor([1.0, 1 + 2**-20])
    assert loads_back(exact, exact.bfloat16(), torch.bfloat16)
    assert not loads_back(exact, exact.half(), torch.bfloat16)
    assert not loads_back(torch.tensor([1, 2]), torch.tensor([1.0, 2.0]), torch.float32)


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "mpnet"])
def test_sharded(tmp_path: Path, model_type: str) -> None:
    model = pruned(model_type, "MASKED_LM")
    arguments = KPruneArguments(output_dir=str(tmp_path / "out"), max_shard_size="2KB")
    KPrunePruner(model, arguments).save_model()
    shards = list((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 3
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert_same(transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "out"), model, "MASKED_LM")
    shards[0].unlink()
    with pytest.raises(OSError, match=shards[0].name):
        transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "out")


class InMemory(TorchDispatchMode):
    """The shapes of all tensors that come into being in memory."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor) and value.device.type != "meta":
                self.shapes.add(tuple(value.shape))
        return result


def test_loading_never_holds_the_dense_layers_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # in this thread, where the tensors are seen
    dense = {(17, 16), (16, 17)}  # no other matrix has 17 rows or columns
    model = tiny(intermediate_size=17)
    model.save_pretrained(tmp_path / "dense")
    cut_randomly(model).save_pretrained(tmp_path / "pruned")
    with InMemory() as memory:
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "dense")
    assert memory.shapes & dense
    with InMemory() as memory:
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "pruned")
    assert {(12, 16), (16, 12)} <= memory.shapes
    assert not memory.shapes & dense


# ---------------------------------------------------------------------------------------------------------------------
# Working on
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", EVERY_TYPE)
def test_pruning_a_pruned_checkpoint_again(tmp_path: Path, model_type: str) -> None:
    once = pruned(model_type)
    once.save_pretrained(tmp_path / "once")
    twice = cut_randomly(
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "once"), (1, 5, 0, 3, 2, 0), seed=2
    )
    twice.save_pretrained(tmp_path / "twice")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "twice")
    assert_same(loaded, twice)
    blocks = loaded.config.kprune["stacks"][0]["blocks"]
    assert [(b["of"], b["kept"]) for b in blocks] == [(4, [1, 0, 2]), (12, [5, 3, 0])]
    # as the same cuts made without saving in between
    assert_same(cut_randomly(pruned(model_type), (1, 5, 0, 3, 2, 0), seed=2), twice)


@pytest.mark.parametrize("model_type", slow_unless_in(("bert",), ("bert", "distilbert", "mpnet")))
def test_trainer_trains_saves_and_resumes(tmp_path: Path, model_type: str) -> None:
    pruned(model_type).save_pretrained(tmp_path / "pruned")
    data = [{**row, "labels": i % 2} for i, row in enumerate(rows(8))]

    def collate_labels(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        return {**collate(batch), "labels": torch.tensor([row["labels"] for row in batch])}

    def trainer(out: str, steps: int) -> Trainer:
        transformers.set_seed(0)
        arguments = TrainingArguments(
            output_dir=str(tmp_path / out),
            per_device_train_batch_size=4,
            max_steps=steps,
            save_steps=1,
            learning_rate=1e-2,
            use_cpu=True,
            disable_tqdm=True,
            report_to=[],
            dataloader_pin_memory=False,
            lr_scheduler_type="constant",
        )
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "pruned")
        return Trainer(model=model, args=arguments, train_dataset=data, data_collator=collate_labels)

    straight = trainer("straight", 2)
    straight.train()
    first, second = (tmp_path / "straight" / f"checkpoint-{step}" for step in (1, 2))
    start = AutoModelForSequenceClassification.from_pretrained(tmp_path / "pruned")
    assert not torch.equal(logits(start), logits(straight.model))
    assert_same(AutoModelForSequenceClassification.from_pretrained(second), straight.model)
    assert (second / "modeling_kprune.py").read_bytes() == Path(modeling_kprune.__file__).read_bytes()

    resumed = trainer("resumed", 2)
    resumed.train(resume_from_checkpoint=str(first))
    assert resumed.state.global_step == 2
    for name, value in resumed.model.state_dict().items():
        torch.testing.assert_close(value, straight.model.state_dict()[name])


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's own
@pytest.mark.parametrize("model_type", slow_unless_in(("bert",), ("bert", "distilbert", "mpnet")))
def test_lora_on_a_pruned_model(tmp_path: Path, model_type: str) -> None:
    peft = pytest.importorskip("peft")
    pruned(model_type).save_pretrained(tmp_path / "pruned")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "pruned")
    targets = {"bert": ["query", "value"], "distilbert": ["q_lin", "v_lin"], "mpnet": ["attn.q", "attn.v"]}[
        model_type
    ]
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=targets))
    batch = {**collate(rows(4)), "labels": torch.tensor([0, 1, 0, 1])}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        model(**batch).loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path / "adapter")
    trained = logits(model)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "pruned")
    close(logits(peft.PeftModel.from_pretrained(again, tmp_path / "adapter")), trained)

    merged = model.merge_and_unload()
    close(logits(merged), trained)
    KPrunePruner(merged).save_model(str(tmp_path / "merged"))
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert_same(loaded, merged)
    assert not torch.allclose(logits(loaded), logits(pruned(model_type)))


# ---------------------------------------------------------------------------------------------------------------------
# Plans and weights that disagree
# ---------------------------------------------------------------------------------------------------------------------

Broken = tuple[Callable[[Any], None], str]


def block(config: dict[str, Any], number: int = 0) -> dict[str, Any]:
    entry: dict[str, Any] = config["kprune"]["stacks"][0]["blocks"][number]
    return entry


def set_kept(value: Any, number: int = 0, layer: int = 0) -> Callable[[dict[str, Any]], None]:
    def edit(config: dict[str, Any]) -> None:
        block(config, number)["kept"][layer] = value

    return edit


def huge(config: dict[str, Any]) -> None:
    block(config, 1)["of"] = 10**12
    block(config, 1)["kept"] = [10**12] * 3


BROKEN_CONFIGS: dict[str, Broken] = {
    "one head more": (set_kept(3), "changed after it was saved"),
    "one head less": (set_kept(1), "changed after it was saved"),
    "a head in an emptied sublayer": (set_kept(1, 0, 1), "changed after it was saved"),
    "a negative size": (
        set_kept(-1),
        "keeps -1 attention units in layer 0, expected a whole number from 0 to 4",
    ),
    "a fraction": (set_kept(2.0), "keeps 2.0 attention units"),
    "a boolean": (set_kept(True), "keeps True attention units"),
    "a string": (set_kept("2"), "keeps '2' attention units"),
    "nothing": (set_kept(None), "keeps None attention units"),
    "an absurd size": (
        set_kept(10**12, 1),
        "keeps 1000000000000 ffn units in layer 0, expected a whole number from 0 to 12",
    ),
    "absurd sizes throughout": (
        huge,
        "prunes 1000000000000 ffn units of size 1 of .* which is 12 in the model",
    ),
    "too few layers in the plan": (
        lambda c: block(c)["kept"].pop(),
        "lists 2 layers for attention, the model has 3",
    ),
    "fewer layers in the config": (
        lambda c: c.update(num_hidden_layers=2),
        "lists 3 layers for attention, the model has 2",
    ),
    "more layers in the config": (
        lambda c: c.update(num_hidden_layers=4),
        "lists 3 layers for attention, the model has 4",
    ),
    "other heads in the config": (
        lambda c: c.update(num_attention_heads=2),
        "num_attention_heads, which is 2 in the model",
    ),
    "another width in the config": (
        lambda c: c.update(intermediate_size=13),
        "intermediate.dense.out_features, which is 13",
    ),
    "another width of a head": (
        lambda c: block(c)["rows"].update({"attention.self.key": [8, 0]}),
        "units of size 8 of",
    ),
    "a path that is not there": (
        lambda c: block(c)["rows"].update({"attention.self.nokey": [4, 0]}),
        "changed after it",
    ),
    "another stand-in": (lambda c: block(c).update(returns=["y"]), "changed after it was saved"),
    "a later format": (lambda c: c["kprune"].update(format=2), "format is 2, expected 1; upgrade hf_kprune"),
    "no format": (lambda c: c["kprune"].pop("format"), "cannot be followed: KeyError: 'format'"),
    "no stacks": (lambda c: c["kprune"].pop("stacks"), "cannot be followed: KeyError: 'stacks'"),
    "no stack": (lambda c: c["kprune"].update(stacks=[]), "changed after it was saved"),
    "no checksum": (lambda c: c["kprune"].pop("sha256"), "cannot be followed: KeyError: 'sha256'"),
    "no list of kept units": (lambda c: block(c).pop("kept"), "cannot be followed: KeyError: 'kept'"),
    "no widths": (lambda c: block(c).pop("rows"), "cannot be followed: KeyError: 'rows'"),
    "not a plan": (lambda c: c.update(kprune="yes"), "its kprune plan is missing or no plan"),
    "an empty plan": (lambda c: c.update(kprune={}), "its kprune plan is missing or no plan"),
    "other layers": (
        lambda c: c["kprune"]["stacks"][0].update(layers="encoder.layers"),
        "changed after it was saved",
    ),
    "no plan": (lambda c: c.pop("kprune"), "its kprune plan is missing or no plan"),
}


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


EMPTIED = "bert.encoder.layer.2.output.dense.weight"
MISFIT = "do not belong together"
BROKEN_WEIGHTS: dict[str, Broken] = {
    "a truncated file": (truncate, "(?i)SafetensorError.*incomplete"),
    "an empty file": (lambda file: file.write_bytes(b""), "(?i)SafetensorError.*header"),
    "a tensor removed": (edit_weights(lambda t: t.pop(KEY)), f"{MISFIT}.* 1 tensors are missing"),
    "a tensor of another size": (edit_weights(lambda t: t.update({KEY: t[KEY][:4].clone()})), MISFIT),
    "an emptied tensor filled": (
        edit_weights(lambda t: t.update({EMPTIED: torch.ones(16, 12)})),
        f"{EMPTIED} is in model.safetensors, but was not saved in it",
    ),
    "the dense weights": (edit_weights(lambda t: t.update(tiny().state_dict())), MISFIT),
    "an embedding removed": (
        edit_weights(lambda t: t.pop(EMBEDDING)),
        "1 tensors that were saved in model.safetensors",
    ),
    "a norm removed": (
        edit_weights(lambda t: t.pop(NORM)),
        "1 tensors that were saved in model.safetensors are missing",
    ),
    "the head removed": (
        edit_weights(lambda t: t.pop("classifier.weight")),
        "1 tensors that were saved in model.safetensors",
    ),
    "a tensor renamed": (
        edit_weights(lambda t: t.update({"bert.norm": t.pop(NORM)})),
        f"missing from it, such as {NORM}",
    ),
    "integers": (
        edit_weights(lambda t: t.update({NORM: t[NORM].long()})),
        "is I64 of .16. in .* where F32 of .16. was saved",
    ),
    "weights of another plan": (
        edit_weights(lambda t: t.update(cut_randomly(tiny(), (2, 5, 1, 12, 2, 0)).state_dict())),
        MISFIT,
    ),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "pruned"
    pruned().save_pretrained(folder)
    return folder


def broken_copy(checkpoint: Path, name: str, folder: Path) -> Path:
    folder.mkdir(parents=True)
    for file, content in files(checkpoint).items():
        (folder / file).write_bytes(content)
    if name in BROKEN_WEIGHTS:
        BROKEN_WEIGHTS[name][0](folder / "model.safetensors")
    else:
        config = json.loads((folder / "config.json").read_text())
        BROKEN_CONFIGS[name][0](config)
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "ignore",
    [
        pytest.param(False, id="", marks=pytest.mark.slow),
        pytest.param(True, id="ignore_mismatched_sizes"),
    ],
)
@pytest.mark.parametrize("name", [*BROKEN_CONFIGS, *BROKEN_WEIGHTS])
def test_a_checkpoint_that_contradicts_itself_is_refused(
    tmp_path: Path, checkpoint: Path, name: str, ignore: bool
) -> None:
    folder = broken_copy(checkpoint, name, tmp_path / "broken")
    for load in (AutoModelForSequenceClassification.from_pretrained, transformers.BertModel.from_pretrained):
        with pytest.raises(Exception) as caught:  # noqa: B017, PT011  # its type and text are looked at below
            load(folder, ignore_mismatched_sizes=ignore)
        assert type(caught.value) is CheckpointError or name in ("a truncated file", "an empty file")
        message = f"{type(caught.value).__name__}: {caught.value}"
        assert re.search((BROKEN_CONFIGS | BROKEN_WEIGHTS)[name][1], message), message


@pytest.mark.parametrize("key", [KEY, EMBEDDING, NORM, "classifier.weight"])
def test_a_checkpoint_of_before_its_weights_were_recorded(tmp_path: Path, key: str) -> None:
    """It loads, with the tensors without elements that were saved then, and what its own class lacks is refused too."""
    model = pruned()
    model.save_pretrained(tmp_path)
    edit_weights(lambda tensors: tensors.update({EMPTIED: torch.zeros(16, 0)}))(
        tmp_path / "model.safetensors"
    )
    config = json.loads((tmp_path / "config.json").read_text())
    del config["kprune_weights"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert_same(loaded, model)
    assert not info["unexpected_keys"]
    edit_weights(lambda tensors: tensors.pop(key))(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"1 tensors are missing.*, such as {key}"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path, ignore_mismatched_sizes=True)


def test_the_record_is_of_the_weights_that_are_there(tmp_path: Path) -> None:
    """Whoever writes weights again, as another dtype, in shards, beside others, writes another record, or none."""

    def check(folder: Path, *names: str) -> None:
        record = json.loads((folder / "config.json").read_text()).get("kprune_weights", {})
        assert sorted(record) == sorted(names)
        for name, entry in record.items():
            assert entry["sha256"] == hashlib.sha256((folder / name).read_bytes()).hexdigest()
            shapes = {key: list(value.shape) for key, value in load_file(folder / name).items()}
            assert {key: size for key, (_, *size) in entry["tensors"].items()} == shapes

    model = pruned()
    model.save_pretrained(tmp_path)
    check(tmp_path, "model.safetensors")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert not hasattr(loaded.config, "kprune_weights")
    loaded.half().save_pretrained(tmp_path, variant="fp16")
    check(tmp_path, "model.safetensors", "model.fp16.safetensors")
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path, variant="fp16").dtype == torch.float16
    (tmp_path / "model.fp16.safetensors").unlink()
    loaded.float().save_pretrained(tmp_path)
    check(tmp_path, "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    loaded.save_pretrained(tmp_path, max_shard_size="2KB")
    check(tmp_path, *[path.name for path in tmp_path.glob("model-*.safetensors")])
    assert_same(AutoModelForSequenceClassification.from_pretrained(tmp_path), loaded)
    loaded.config.save_pretrained(tmp_path)
    check(tmp_path)


FOREIGN = [True, "yes", 0.5, [1, 2], {}, {"enabled": True, "ratio": 0.5}, {"format": "short"}]


@pytest.mark.parametrize("field", FOREIGN, ids=str)
def test_a_field_of_that_name_in_somebody_elses_config(tmp_path: Path, field: Any) -> None:
    """At the top and in a config inside: the model loads and is saved as ever, and is not pruned over its field."""
    model = tiny()
    model.config.kprune, model.config.inner = field, {"kprune": field}
    model.save_pretrained(tmp_path / "1")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "1")
    assert_same(loaded, model)
    assert loaded.config.kprune == field
    loaded.save_pretrained(tmp_path / "2")
    assert sorted(os.listdir(tmp_path / "2")) == ["config.json", "model.safetensors"]
    assert json.loads((tmp_path / "2" / "config.json").read_text())["kprune"] == field
    with pytest.raises(UnsupportedModelError, match="has kprune=.* give that field another name"):
        KPrunePruner(loaded)


def test_absurd_sizes_are_refused_without_the_meta_device_too() -> None:
    config = copy.deepcopy(pruned().config)
    huge({"kprune": config.kprune})
    with pytest.raises(CheckpointError, match="1000000000000"):
        AutoModelForSequenceClassification.from_config(config)


def test_heads_that_are_selected_by_number_cannot_be_exchanged(tmp_path: Path) -> None:
    """The shared position bias of MPNet is cut to the kept heads, which no size tells."""
    pruned("mpnet").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (heads, *_) = block(config)["select"]["position_bias"][1]
    heads[:] = sorted({0, 1, 2, 3} - set(heads))
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="changed after it was saved"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Without hf_kprune
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def elsewhere(
    tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, request: pytest.FixtureRequest
) -> dict[str, Any]:
    """What a process without hf_kprune makes of pruned checkpoints."""
    folder = tmp_path_factory.mktemp("elsewhere")
    tasks: dict[str, Any] = {"load": [], "broken": {}, "cache": str(folder / "cache")}
    items = [item for item in request.session.items if item.name.startswith("test_without_hf_kprune")]
    wanted = {value for item in items if hasattr(item, "callspec") for value in item.callspec.params.values()}
    for model_type, head in (one for one in ONE_HEAD if one[0] in wanted):
        model = pruned(model_type, head)
        directory = folder / f"{model_type} pruned"
        model.save_pretrained(directory)
        tokenizer().save_pretrained(directory)
        tasks["load"].append(
            {
                "name": model_type,
                "directory": str(directory),
                "auto": AUTO[head],
                "class": type(model).__name__,
                "batch": collate(rows(5)),
                "implementations": ["eager"] if model_type == "mpnet" else ["sdpa", "eager"],
                "pipeline": PIPELINES.get(head),
                "text": TEXT,
            }
        )
    for name in (name for name in [*BROKEN_CONFIGS, *BROKEN_WEIGHTS] if name in wanted):
        tasks["broken"][name] = str(broken_copy(checkpoint, name, folder / "broken" / name))
    fake_hub_cache(folder / "cache", pruned())
    torch.save(tasks, folder / "tasks.pt")
    printed_by(without_hf_kprune.main, folder, out=folder, timeout=240)
    results: dict[str, Any] = torch.load(folder / "results.pt", weights_only=False)
    assert results["import"].startswith("ModuleNotFoundError")
    return {**results, "folder": folder}


@pytest.mark.parametrize(("model_type", "head"), slow_unless_in(ELSEWHERE, ONE_HEAD))
def test_without_hf_kprune_the_checkpoint_brings_its_code(
    elsewhere: dict[str, Any], model_type: str, head: str
) -> None:
    facts, model = elsewhere[model_type], pruned(model_type, head)
    assert_same_state(facts["state"], model.state_dict())
    assert (facts["class"], facts["is stock"]) == (type(model).__name__, True)
    with torch.no_grad():
        expected = model(**collate(rows(5)))[0]
    outputs = facts["outputs"]
    for name in outputs.keys() - {"a base model", "a new head", "a new model"}:
        close(outputs[name], expected)
    close(outputs["a base model"], model.base_model(**collate(rows(5)))[0])
    assert outputs["a new head"].isfinite().all()
    assert outputs["a new model"].isfinite().all()
    assert outputs["a new model"].shape == expected.shape
    assert facts["hidden states"] == 4
    assert facts["heads"] == [2, 0, 3]
    if head in PIPELINES:
        here = pipeline(PIPELINES[head], model=str(elsewhere["folder"] / f"{model_type} pruned"))(TEXT)
        assert_close_json(facts["pipeline"], here)
    # what was saved there loads here
    loaded = getattr(transformers, AUTO[head]).from_pretrained(facts["saved"])
    assert type(loaded) is type(model)
    assert_same(loaded, model, head)


def assert_close_json(one: Any, other: Any) -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        one, other = list(one.values()), list(other.values())
    if isinstance(one, list):
        for a, b in zip(one, other, strict=True):
            assert_close_json(a, b)
    else:
        assert one == (pytest.approx(other, abs=1e-5) if isinstance(other, float) else other)


@pytest.mark.parametrize(
    "model_type", slow_unless_in([name for name, _ in ELSEWHERE], [name for name, _ in ONE_HEAD])
)
def test_without_hf_kprune_and_trust_the_error_says_how_to_load(
    elsewhere: dict[str, Any], model_type: str
) -> None:
    refused = elsewhere[model_type]["refused"]
    assert (
        len(refused) == 5
    )  # two classes, each with ignore_mismatched_sizes too, and the checkpoint saved there
    for message in refused:
        assert HOW_TO_LOAD in message


@pytest.mark.parametrize(
    "name",
    slow_unless_in(
        [*list(BROKEN_CONFIGS)[::6], *list(BROKEN_WEIGHTS)[::4]], [*BROKEN_CONFIGS, *BROKEN_WEIGHTS]
    ),
)
def test_without_hf_kprune_a_contradiction_is_refused(elsewhere: dict[str, Any], name: str) -> None:
    for message in elsewhere[name]:
        assert message.startswith("CheckpointError") or name in ("a truncated file", "an empty file")
        assert re.search((BROKEN_CONFIGS | BROKEN_WEIGHTS)[name][1], message), message


def test_without_hf_kprune_a_name_on_the_hub_loads_and_is_saved_whole(elsewhere: dict[str, Any]) -> None:
    assert_same_state(elsewhere["hub"], pruned().state_dict())
    assert HOW_TO_LOAD in elsewhere["hub refused"]
    saved = elsewhere["folder"] / "from the hub"
    assert (saved / "modeling_kprune.py").exists()
    assert "--" not in json.loads((saved / "config.json").read_text())["auto_map"]["AutoModel"]
    assert_same(AutoModelForSequenceClassification.from_pretrained(saved), pruned())


def test_without_hf_kprune_a_push_holds_all_that_loading_needs(elsewhere: dict[str, Any]) -> None:
    pushed = elsewhere["pushed"]
    assert pushed.keys() == {"README.md", "config.json", "model.safetensors", "modeling_kprune.py"}
    assert json.loads(pushed["config.json"])["transformers_weights"] == NOTICE


@pytest.mark.parametrize("model_type", ["bert", "mpnet"])
def test_with_hf_kprune_its_own_code_is_run_and_never_that_of_the_folder(
    tmp_path: Path, model_type: str
) -> None:
    model = pruned(model_type)
    model.save_pretrained(tmp_path / "1")
    (tmp_path / "1" / "modeling_kprune.py").write_text("raise SystemExit('not to be run')")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "1", trust_remote_code=True)
    assert type(loaded) is type(model)
    assert_same(loaded, model)
    fresh = AutoModelForSequenceClassification.from_config(loaded.config, trust_remote_code=True)
    assert type(fresh) is type(model)
    loaded.save_pretrained(tmp_path / "2")
    assert files(tmp_path / "2")["config.json"] == files(tmp_path / "1")["config.json"]
    assert (tmp_path / "2" / "modeling_kprune.py").read_bytes() == Path(modeling_kprune.__file__).read_bytes()


def test_the_class_of_the_file_and_hf_kprune_together(tmp_path: Path) -> None:
    """A process that imports hf_kprune after it has loaded a checkpoint by the file in it."""
    model = pruned("mpnet")
    model.save_pretrained(tmp_path / "1")
    loaded = modeling_kprune.MPNetForSequenceClassification.from_pretrained(tmp_path / "1")
    assert type(loaded) is not type(model)
    KPrunePruner(loaded).save_model(str(tmp_path / "2"))
    assert_same(AutoModelForSequenceClassification.from_pretrained(tmp_path / "2"), model)
    again = cut_randomly(loaded, (1, 5, 0, 3, 2, 0))
    again.save_pretrained(tmp_path / "3")
    assert_same(AutoModelForSequenceClassification.from_pretrained(tmp_path / "3"), again)


def test_the_file_that_travels_is_short_and_needs_torch_and_transformers_only() -> None:
    text = Path(modeling_kprune.__file__).read_text()
    imported = set(re.findall(r"^\s*(?:from|import) (\w+)", text, re.MULTILINE))
    assert imported - set(sys.stdlib_module_names) == {"safetensors", "torch", "transformers"}
    assert len(text.splitlines()) < 880


# ---------------------------------------------------------------------------------------------------------------------
# Dense models
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", EVERY_TYPE)
def test_dense_models_are_left_alone(tmp_path: Path, model_type: str) -> None:
    model = tiny(model_type)
    install()
    model.save_pretrained(tmp_path / "dense")
    assert sorted(os.listdir(tmp_path / "dense")) == ["config.json", "model.safetensors"]
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert not {"kprune", "auto_map", "transformers_weights"} & config.keys()
    assert_same(AutoModelForSequenceClassification.from_pretrained(tmp_path / "dense"), model)
    head, info = AutoModelForTokenClassification.from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert isinstance(head, classes(model_type)["TOKEN_CLASSIFICATION"])
    saved = load_file(tmp_path / "dense" / "model.safetensors").keys()
    assert set(info["missing_keys"]) == head.state_dict().keys() - saved
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes") as caught:
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "dense", vocab_size=61)
    assert not isinstance(caught.value, CheckpointError)
    with pytest.raises(OSError, match="nowhere"):
        AutoModel.from_pretrained(tmp_path / "nowhere")


def test_a_plan_that_keeps_everything_is_no_plan(tmp_path: Path) -> None:
    model = cut_randomly(tiny(), (4, 12, 4, 12, 4, 12))
    model.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]


def test_installing_twice_is_harmless() -> None:
    names = [(PreTrainedModel, "post_init"), (PreTrainedModel, "from_pretrained")]
    names += [(PreTrainedModel, "save_pretrained"), (PreTrainedModel, "_upload_modified_files")]
    names += [(PreTrainedConfig, "from_dict"), (PreTrainedConfig, "to_json_file")]
    before = [vars(owner)[name] for owner, name in names]
    install()
    assert [vars(owner)[name] for owner, name in names] == before


# ---------------------------------------------------------------------------------------------------------------------
# Atomic saving
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["save_pretrained", "add", "verify"])
def test_an_exception_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    model, out = pruned_layer(), tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("old")
    if stage == "save_pretrained":
        monkeypatch.setattr(PreTrainedModel, "save_pretrained", fail)
    elif stage == "verify":
        monkeypatch.setitem(EXPORTERS, "native", EXPORTERS["native"]._replace(verify=fail))
    with pytest.raises(KeyboardInterrupt):
        save_atomically(model, str(out), "50GB", fail if stage == "add" else lambda _: None)
    assert files(tmp_path) == {"out/mine": b"old"}


@pytest.mark.parametrize("damage", ["a value", "a name", "a dtype", "the plan"])
def test_what_was_written_wrongly_is_caught_before_it_counts(tmp_path: Path, damage: str) -> None:
    model = pruned_layer()

    def spoil(folder: str) -> None:
        file = Path(folder) / "model.safetensors"
        tensors = load_file(file)
        if damage == "a value":
            tensors[KEY][0, 0] += 1e-3
        elif damage == "a name":
            tensors["bert.encoder.layer.0.attention.self.quarry.weight"] = tensors.pop(KEY)
        elif damage == "a dtype":
            tensors = {k: v.half() for k, v in tensors.items()}
        save_file(tensors, file, metadata={"format": "pt"})
        if damage == "the plan":
            config = json.loads((Path(folder) / "config.json").read_text())
            set_kept(3)(config)
            (Path(folder) / "config.json").write_text(json.dumps(config))

    with pytest.raises(CheckpointError):
        save_atomically(model, str(tmp_path / "out"), "50GB", spoil)
    assert os.listdir(tmp_path) == []
    save_atomically(model, str(tmp_path / "out"), "50GB", lambda _: None)
    assert_same(AutoModelForSequenceClassification.from_pretrained(tmp_path / "out"), model)


def test_folders_in_a_checkpoint_and_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def add(folder: str) -> None:
        Path(folder, "templates").mkdir()
        Path(folder, "templates", "chat.txt").write_text("hello")

    save_atomically(pruned_layer(), "a/b/out", "50GB", add)
    assert (tmp_path / "a" / "b" / "out" / "templates" / "chat.txt").read_text() == "hello"
    with safe_open(tmp_path / "a" / "b" / "out" / "model.safetensors", "pt") as file:
        assert KEY in file.keys()  # noqa: SIM118


def test_a_config_of_emptied_layers_makes_a_model_whose_weights_are_scaled_by_their_inputs() -> None:
    """SigLIP divides by the number of inputs of each projection, where none is left by zero."""
    model = make("siglip_vision_model")
    student = cut_all(model, [torch.zeros(s.num_units).bool() for s in find_sublayers(model)])
    again = type(model)(student.config)
    shapes = [{name: value.shape for name, value in each.state_dict().items()} for each in (student, again)]
    assert shapes[0] == shapes[1]
