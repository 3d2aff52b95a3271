"""What goes wrong beside the plain case: odd labels, padded targets, heads on many layers, mixed units, composites."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from accelerate import Accelerator
from data import Padding
from models import slow_unless_in
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel
from zoo import AUDIO, DECODER, ENCODER, IMAGE, ZOO, inputs_for, make

from hf_kprune import BudgetError, KPruneArguments, KPrunePruner, UnsupportedModelError
from hf_kprune.calibration.batch import Batch, tokens_of
from hf_kprune.calibration.batches import Calibration
from hf_kprune.calibration.collate import collate as make_batch
from hf_kprune.calibration.collate import shifted_right
from hf_kprune.calibration.draw import draw_rows
from hf_kprune.calibration.tasks import knowledge_loss
from hf_kprune.structure.hooks import State
from hf_kprune.structure.runs import run_sublayer
from hf_kprune.structure.sublayers import find_sublayers
from hf_kprune.structure.surgery import cut, write_plan


def text_rows(count: int = 40, **more: Any) -> list[dict[str, Any]]:
    """Rows of 5 to 9 tokens; `more` are columns, functions of the row's number and length."""
    generator = torch.Generator().manual_seed(0)
    data = []
    for i in range(count):
        length = int(torch.randint(5, 10, (1,), generator=generator))
        ids = torch.randint(4, 60, (length,), generator=generator).tolist()
        data.append({"input_ids": ids, **{key: function(i, length) for key, function in more.items()}})
    return data


def options(**more: Any) -> KPruneArguments:
    settings = {
        "sparsity": 0.4,
        "per_device_batch_size": 8,
        "disable_tqdm": True,
        "use_cpu": True,
        "num_tokens": 300,
    }
    return KPruneArguments(**{**settings, **more})


def prune(model: PreTrainedModel, rows: list[Any], **more: Any) -> Any:
    pruner = KPrunePruner(model, options(**more), rows, processing_class=Padding())
    pruner.callback_handler.callbacks.clear()
    return pruner.prune()


def batches(model: PreTrainedModel, rows: list[Any], collator: Any = None) -> list[Batch]:
    drawn = draw_rows(model, rows, Padding(), options(), collator is not None)
    return Calibration(
        Accelerator(cpu=True),
        drawn,
        lambda part: make_batch(part, collator, Padding(), model),
        model,
        options(),
    ).batches


def bert(name: str, **config: Any) -> PreTrainedModel:
    return getattr(transformers, name)(AutoConfig.for_model("bert", **ENCODER, **config)).eval()


def llama(heads: int, kv_heads: int, hidden: int, **config: Any) -> PreTrainedModel:
    sizes = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "hidden_size": hidden}
    return transformers.LlamaForCausalLM(
        AutoConfig.for_model("llama", **{**DECODER, **sizes, **config})
    ).eval()


def test_labels_that_a_collator_makes_count_for_causal_language_models_alone() -> None:
    def collator(rows: list[Any]) -> dict[str, Tensor]:
        made = Padding().pad([{"input_ids": row["input_ids"]} for row in rows])
        return {**made, "labels": torch.full_like(made["input_ids"], -100)}

    rows = text_rows(labels=lambda i, length: [0] * length)
    for name in ("BertForTokenClassification", "BertForMaskedLM"):
        batch = batches(bert(name), rows, collator)[0]
        assert torch.equal(batch.counted, next(iter(batch.valid.values())))
    assert not batches(llama(4, 2, 16), rows, collator)[0].counted.any()


def test_labels_of_several_yes_or_no_questions_are_no_tokens() -> None:
    def collator(rows: list[Any]) -> dict[str, Tensor]:
        return {
            **Padding().pad([{"input_ids": r["input_ids"]} for r in rows]),
            "labels": torch.zeros(len(rows), 3),
        }

    model = bert("BertForSequenceClassification", num_labels=3, problem_type="multi_label_classification")
    for batch in batches(model, text_rows(labels=lambda i, length: [0.0, 1.0, 0.0]), collator):
        assert torch.equal(batch.counted, next(iter(batch.valid.values())))


@pytest.mark.parametrize("key", ["labels", "decoder_input_ids"])
@pytest.mark.parametrize("collated", [False, True])
def test_padding_of_the_decoder_never_counts(key: str, collated: bool) -> None:
    model = make("bart")
    column: dict[str, Any] = {key: lambda i, length: list(range(5, 8 + i % 4))}
    rows = text_rows(**column)

    def collator(batch: list[Any]) -> dict[str, Tensor]:
        targets = [torch.tensor(row["labels"]) for row in batch]
        labels = torch.nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=-100)
        calibration = Padding().pad([{"input_ids": row["input_ids"]} for row in batch])
        return {**calibration, "labels": labels, "decoder_input_ids": shifted_right(model, labels)}

    if collated and key != "labels":
        pytest.skip("this collator is for labels")
    calibration = batches(model, rows, collator if collated else None)
    assert sum(int(b.valid["decoder.layers"].sum()) for b in calibration) == sum(
        len(row[key]) for row in rows
    )
    assert sum(int(b.counted.sum()) for b in calibration) == sum(len(row[key]) for row in rows)


def test_the_decoder_reads_targets_as_the_model_itself_shifts_them() -> None:
    labels = torch.tensor([[5, 6, 7, 3, 50]])
    for name in ("mbart", "t5", "bart"):
        assert torch.equal(
            shifted_right(make(name), labels), make(name).prepare_decoder_input_ids_from_labels(labels)
        )


def test_a_head_that_reads_lower_layers_is_refused() -> None:
    config = AutoConfig.for_model("hubert", **AUDIO, use_weighted_layer_sum=True)
    model = transformers.HubertForSequenceClassification(config).eval()
    with pytest.raises(UnsupportedModelError, match="its head may read lower layers too"):
        prune(model, [{"input_values": torch.randn(800)} for _ in range(20)])


def test_query_heads_of_every_group_can_be_pruned_again_and_not_by_groups() -> None:
    model = llama(8, 2, 16)
    prune(model, text_rows(), head_unit="query", method="flap")
    assert [s.unit.strided for s in find_sublayers(model) if s.kind == "attention"] == [True] * 3
    prune(model, text_rows(), head_unit="query", method="flap", sparsity=0.2)
    with pytest.raises(UnsupportedModelError, match="head_unit is 'group'.* pruned by 'query'"):
        prune(model, text_rows(), head_unit="group")
    model = llama(9, 3, 36)  # as many columns either way
    sublayers = find_sublayers(model, "group")
    cut(sublayers[0], torch.tensor([True, True, False]))
    write_plan(sublayers)
    with pytest.raises(UnsupportedModelError, match="head_unit is 'query'.* pruned by 'group'"):
        find_sublayers(model, "query")


@pytest.mark.parametrize("name", slow_unless_in(("whisper",), ("wav2vec2", "whisper", "vit")))
def test_half_precision_models_of_images_and_audio(name: str) -> None:
    model = make(name, dtype=torch.bfloat16)
    inputs = inputs_for(model, ZOO[name][2], batch=12)
    prune(
        model,
        [{key: value[i] for key, value in inputs.items()} for i in range(12)],
        num_tokens=200,
        ridge=1e-3,
    )
    assert model.dtype == torch.bfloat16


def test_padded_patches_never_count() -> None:
    model = make("siglip2")
    inputs = inputs_for(model, "patches")
    rows = [{key: value[i] for key, value in inputs.items()} for i in range(4)]
    calibration = batches(
        model, rows, lambda rs: {key: torch.stack([row[key] for row in rs]) for key in rs[0]}
    )
    assert (
        sum(b.valid["vision_model.encoder.layers"].sum() for b in calibration)
        == inputs["pixel_attention_mask"].sum()
    )


def test_a_uniform_budget_out_of_reach_is_refused_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The config takes 1, 2, 3, 4 or 6 of 6 heads, so at least 5 means 6."""
    monkeypatch.setattr("hf_kprune.pruning.check_walk", lambda *_, **__: pytest.fail("ran"))
    model = llama(6, 6, 48, head_dim=8)
    with pytest.raises(BudgetError):
        prune(model, text_rows(), uniform=True, min_heads=5, prune_ffn=False, sparsity=0.1)


def test_the_other_tower_is_not_run_for_every_sublayer() -> None:
    model = make("clip")
    sublayers, inputs, state = find_sublayers(model), inputs_for(model, "clip"), State()
    ran: list[int] = []
    model.vision_model.encoder.layers[0].mlp.fc2.register_forward_hook(lambda *_: ran.append(1))
    for position in range(len(sublayers)):
        state = run_sublayer(model, inputs, sublayers, position, state).above
    assert len(ran) <= 2


def test_counting_tokens_runs_no_layers() -> None:
    model, ran = make("wav2vec2"), []
    model.wav2vec2.encoder.layers[0].register_forward_hook(lambda *_: ran.append(1))
    count = tokens_of(model, None, None)
    assert count({"input_values": torch.randn(800)}) > count({"input_values": torch.randn(400)}) > 0
    assert not ran


def test_a_language_model_that_sees_images_is_one() -> None:
    text, vision = {**DECODER, "model_type": "llama"}, {**IMAGE, "model_type": "clip_vision_model"}
    model = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(text_config=text, vision_config=vision)
    )
    assert knowledge_loss(model, 2.0, "mean").per_token
    assert {s.stack_name.split(".")[1] for s in find_sublayers(model)} == {"vision_tower", "language_model"}


def test_options_that_a_family_does_not_describe_are_refused() -> None:
    config = {**ZOO["bloom"][1], "apply_residual_connection_post_layernorm": True}
    with pytest.raises(
        UnsupportedModelError, match="apply_residual_connection_post_layernorm=True cannot be pruned"
    ):
        find_sublayers(transformers.BloomForCausalLM(AutoConfig.for_model("bloom", **config)))
    config = {**ZOO["wav2vec2-bert"][1], "position_embeddings_type": "rotary"}
    with pytest.raises(UnsupportedModelError, match="with position_embeddings_type=rotary cannot be pruned"):
        find_sublayers(transformers.Wav2Vec2BertModel(AutoConfig.for_model("wav2vec2-bert", **config)))


def test_nothing_pruned_is_reported_as_the_model_that_is() -> None:
    report = prune(make("t5"), text_rows(labels=lambda i, length: [5, 6, 7]), sparsity=0)
    assert report.before == report.after
