"""What people use with a model, they use with a pruned one. docs/works_with.md lists it, with the tests that are elsewhere."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from checks import close
from data import PLAIN, ROOT, collate, rows, word_tokenizer
from models import cut_randomly, pruned, shallow
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, Seq2SeqTrainer, Seq2SeqTrainingArguments
from transformers.integrations.executorch import convert_and_export_with_cache, export_with_dynamic_cache
from works_with import COMMAND, ROWS, page
from zoo import inputs_for, make

import hf_kprune
from hf_kprune import KPruneArguments, KPrunePruner
from hf_kprune.structure.sublayers import find_sublayers


QUIET: dict[str, Any] = {"method": "magnitude", "tune": False, "use_cpu": True, "disable_tqdm": True}


def test_the_page_is_what_the_script_prints_and_each_test_is_there() -> None:
    assert (ROOT / "docs" / "works_with.md").read_text() == page(), f"write it anew: {COMMAND}"
    assert len(ROWS) >= 30
    for row in ROWS:
        file, _, name = row.test.partition("::")
        tree = ast.parse((ROOT / "tests" / file).read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, row


@pytest.mark.slow
def test_torch_export_of_any_batch_and_length() -> None:
    model = pruned().eval()
    dynamic = {
        name: {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO} for name in ("input_ids", "attention_mask")
    }
    exported = torch.export.export(model, (), dict(collate(rows(3))), dynamic_shapes=dynamic)
    batch = dict(collate(rows(7, seed=1, longest=17)))
    close(exported.module()(**batch).logits, model(**batch).logits)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the exporter
@torch.no_grad()
def test_the_recipes_of_executorch_export_language_models() -> None:
    """With a dynamic cache any; with a static one, which is as large as the config says, those that keep all groups."""
    ids = torch.randint(5, 50, (2, 5))
    mask = torch.ones_like(ids)
    model = cut_randomly(make("llama"), (1, 9, 0, 5, 2, 0)).eval()
    cache = transformers.DynamicCache(config=model.config)
    exported = export_with_dynamic_cache(model, ids, mask).module()
    again = exported(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)
    close(again.logits, model(ids).logits)

    args = KPruneArguments(sparsity=0.4, head_unit="query", **QUIET)
    pruner = KPrunePruner(make("llama"), args, rows(), collate)
    pruner.prune()
    model = pruner.model.eval()
    model.generation_config.update(
        use_cache=True,
        cache_implementation="static",
        cache_config={"batch_size": 1, "max_cache_len": 16, "device": "cpu"},
    )
    one, place = ids[:1, :1], torch.tensor([0])
    static = convert_and_export_with_cache(model, one, place).module()
    close(static(input_ids=one, cache_position=place), model(one).logits)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the exporters and of the runtime
def test_onnx_runtime_quantises_what_was_exported(tmp_path: Path) -> None:
    quantization = pytest.importorskip("onnxruntime.quantization")
    onnxruntime = pytest.importorskip("onnxruntime")
    model = pruned().eval()
    hf_kprune.export(model, str(tmp_path / "exported"), "onnx")
    quantization.quantize_dynamic(tmp_path / "exported" / "model.onnx", tmp_path / "int8.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "int8.onnx")
    batch = collate(rows(5))
    inputs = {
        each.name: batch.get(each.name, torch.zeros_like(batch["input_ids"])) for each in session.get_inputs()
    }
    (logits,) = session.run(["logits"], {name: value.numpy() for name, value in inputs.items()})
    expected = model(**batch).logits.detach().numpy()
    assert np.abs(logits - expected).max() < 0.5 * np.abs(expected).max()


@pytest.mark.slow
def test_tensorboard_shows_what_was_pruned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    args = KPruneArguments(sparsity=0.4, report_to=["tensorboard"], output_dir=str(tmp_path / "out"), **QUIET)
    report = KPrunePruner(shallow(), args, rows(), collate).prune()
    (file,) = (tmp_path / "logs").rglob("events.*")
    events = accumulator.EventAccumulator(str(file)).Reload()
    names = {name.rpartition("/")[2]: name for name in events.Tags()["scalars"]}
    assert events.Scalars(names["sparsity"])[-1].value == pytest.approx(report.sparsity)
    assert events.Scalars(names["parameters"])[-1].value == report.after.parameters


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the libraries about each other
def test_trl_trains_a_pruned_language_model_on_chats(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    import datasets

    tokenizer = word_tokenizer()
    tokenizer.chat_template = PLAIN
    for each in (cut_randomly(make("llama"), (1, 9, 0, 5, 2, 0)), tokenizer):
        each.save_pretrained(tmp_path / "pruned")
    chats = [
        [{"role": "user", "content": f"w{4 + i} w9"}, {"role": "assistant", "content": "w20 w21"}]
        for i in range(8)
    ]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path / "trained"),
        max_steps=2,
        learning_rate=1e-2,
        use_cpu=True,
        bf16=False,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    data = datasets.Dataset.from_dict({"messages": chats})
    trainer = trl.SFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    ids = torch.randint(5, 50, (2, 6))
    close(loaded(ids).logits, trainer.model(ids).logits)
    name = "model.layers.0.mlp.down_proj.weight"
    assert not torch.equal(before[name], loaded.state_dict()[name])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of generation in a trainer
def test_seq2seq_trainer_trains_and_generates(tmp_path: Path) -> None:
    dense = make("t5")
    cut_randomly(dense, (1,) * len(find_sublayers(dense))).save_pretrained(tmp_path / "pruned")
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "pruned")
    ids = inputs_for(model, "seq2seq")["input_ids"]
    data = [{"input_ids": row.tolist(), "labels": row[:4].tolist()} for row in ids]
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(tmp_path / "out"),
        max_steps=1,
        predict_with_generate=True,
        generation_max_length=6,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        save_strategy="no",
    )
    trainer = Seq2SeqTrainer(model=model, args=arguments, train_dataset=data, eval_dataset=data)
    trainer.train()
    predicted = trainer.predict(data).predictions
    expected = trainer.model.eval().generate(ids[: len(data)], max_length=6)
    assert predicted[:, : expected.shape[1]].tolist() == expected.tolist()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the harness
def test_lm_eval_asks_a_pruned_language_model(tmp_path: Path) -> None:
    requests = pytest.importorskip("lm_eval.api.instance")
    models = pytest.importorskip("lm_eval.models.huggingface")
    model = cut_randomly(make("llama"), (1, 9, 0, 5, 2, 0)).eval()
    harness = models.HFLM(pretrained=model, tokenizer=word_tokenizer(), device="cpu")
    request = requests.Instance("loglikelihood", {}, ("w5 w6", " w7"), 0)
    ((likelihood, _),) = harness.loglikelihood([request])
    scores = model(torch.tensor([[5, 6]])).logits[0, -1].log_softmax(-1)
    assert likelihood == pytest.approx(scores[7].item(), rel=1e-4)
