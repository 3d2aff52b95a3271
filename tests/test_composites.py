"""Models of several towers: what runs on the calibration rows is pruned, the rest is left alone and said to be."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checks import calibration
from data import calibration_rows, collator_for, pack
from models import IMAGE_TOKEN, SEEING, TOKENS, seeing, slow_unless_in
from transformers import AutoConfig, PreTrainedModel
from zoo import COUNTED, DECODER, ENCODER, IMAGE, PACKED, ZOO, counted_batch, counted_rows, inputs_for, make

from hf_kprune import (
    ArgumentError,
    BudgetError,
    BudgetWarning,
    CalibrationError,
    KPruneArguments,
    KPrunePruner,
    PruningReport,
    UnsupportedArchitectureError,
)
from hf_kprune.structure.reach import towers_left_alone
from hf_kprune.structure.sublayers import LEFT_ALONE, find_sublayers


def rows(images: bool, count: int = 30) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(4, 60, (9,), generator=generator).tolist() for _ in range(count)]
    if not images:
        return [{"input_ids": ids} for ids in texts]
    pixels = torch.randn(count, 3, 8, 8, generator=generator)
    return [
        {"input_ids": [5, *[IMAGE_TOKEN] * 4, *ids], "pixel_values": image}
        for ids, image in zip(texts, pixels, strict=True)
    ]


def pruner(model: PreTrainedModel, data: list[Any], **options: Any) -> KPrunePruner:
    settings = {
        "sparsity": 0.4,
        "disable_tqdm": True,
        "use_cpu": True,
        "min_heads": 1,
        "min_neurons": 2,
        "method": "magnitude",
        **options,
    }
    return KPrunePruner(model, KPruneArguments(**settings), data)


@pytest.mark.parametrize("model_type", slow_unless_in(("llava",), SEEING))
def test_with_texts_alone_the_tower_of_images_is_left_alone(model_type: str, tmp_path: Path) -> None:
    model = seeing(model_type)
    before = copy.deepcopy(model.state_dict())
    texts = pruner(model, rows(images=False))
    with pytest.warns(
        BudgetWarning, match="model.vision_tower is left alone, as it does not run on the calibration rows"
    ):
        report = texts.prune()
    assert report.left_alone == {"model.vision_tower": "it does not run on the calibration rows"}
    assert "Left alone: model.vision_tower, as it does not run on the calibration rows." in str(report)
    assert PruningReport.from_json(report.to_json()) == report
    assert report.sparsity >= 0.4
    assert all("language_model" in s.name for s in report.sublayers)
    assert LEFT_ALONE not in vars(model)
    assert any("vision_tower" in s.name for s in find_sublayers(model))
    for name, tensor in model.state_dict().items():
        assert "vision" not in name or torch.equal(tensor, before[name])

    texts.save_model(str(tmp_path / "pruned"))
    loaded = type(model).from_pretrained(tmp_path / "pruned").eval()
    inputs = {key: torch.as_tensor(value)[None] for key, value in rows(images=True, count=1)[0].items()}
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("model_type", slow_unless_in(("gemma3",), SEEING))
def test_with_images_both_towers_are_pruned(model_type: str) -> None:
    method = "surgeon" if model_type == "gemma3" else "magnitude"
    report = pruner(seeing(model_type), rows(images=True), method=method).prune()
    assert report.left_alone == {}
    assert {s.name.split(".")[1] for s in report.sublayers} == {"vision_tower", "language_model"}


@pytest.mark.slow
def test_a_tower_of_no_listed_type_that_texts_do_not_run_is_left_alone(tmp_path: Path) -> None:
    """The detector is not asked about what does not run; the language model beside it is pruned, saved and loaded."""
    model = seeing("llava", vision_config={**IMAGE, "model_type": "mlcd_vision_model"})
    texts = pruner(model, rows(images=False))
    with pytest.warns(
        BudgetWarning, match="model.vision_tower is left alone, as it does not run on the inputs"
    ):
        report = texts.prune()
    assert {s.name.split(".")[1] for s in report.sublayers} == {"language_model"}
    texts.save_model(str(tmp_path / "pruned"))
    loaded = type(model).from_pretrained(tmp_path / "pruned").eval()
    ids = torch.tensor([rows(images=False)[0]["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


def test_a_tower_that_the_model_looks_into_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its config does not say so by an attribute that is known."""
    monkeypatch.setattr("hf_kprune.structure.sublayers.FEATURES", ())
    with pytest.warns(
        BudgetWarning,
        match="model.vision_tower is left alone, as the model does not give the same where its layers are run one by one",
    ):
        report = pruner(seeing("llava", vision_feature_layer=-2), rows(images=True)).prune()
    assert {s.name.split(".")[1] for s in report.sublayers} == {"language_model"}


def test_a_tower_whose_keys_another_one_reads_in_a_cache_is_left_alone() -> None:
    text = {**DECODER, "model_type": "gemma", "head_dim": 4, "num_key_value_heads": 1}
    image = {**IMAGE, "model_type": "siglip_vision_model", "vision_use_head": False}
    language = {
        "model_type": "paligemma",
        "image_token_index": 55,
        "vocab_size": 60,
        "projection_dim": 16,
        "hidden_size": 16,
        "text_config": text,
        "vision_config": {**image, "projection_dim": 16},
    }
    config = AutoConfig.for_model("pi0", vlm_config=language, dit_config=text)
    model = transformers.PI0ForConditionalGeneration(config).eval()
    patches = (image["image_size"] // image["patch_size"]) ** 2
    ids = torch.randint(4, 50, (3, patches + 3))
    ids[:, :patches] = 55
    inputs = {
        "state": torch.randn(3, 32),
        "noise": torch.randn(3, 50, 32),
        "timestep": torch.rand(3),
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(3, 1, 3, image["image_size"], image["image_size"]),
        "pixel_attention_mask": torch.ones(3, 1).bool(),
    }
    reasons = towers_left_alone(model, inputs, "group")
    assert reasons["model.vlm.language_model."] == (
        "another part of the model reads its keys and values, in one cache with its own"
    )
    assert "model.vlm.vision_tower." not in reasons


@pytest.mark.parametrize("call", ["prune", "plan", "sweep"])
def test_a_failure_leaves_no_note_on_the_model(call: str) -> None:
    model = seeing("llava")
    unable = pruner(model, rows(images=False), min_neurons=12, min_heads=4)
    with pytest.raises(BudgetError, match="can reach 0 to 0"):
        getattr(unable, call)()
    assert LEFT_ALONE not in vars(model)


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        (
            lambda: make("clip"),
            rows(images=False),
            "CLIPModel does not run on .* of which it got input_ids .* it also takes pixel_values",
        ),
        (
            lambda: seeing("llava"),
            [{**row, "input_ids": [5, 6]} for row in rows(images=True)],
            "does not run on the first .* of which it got pixel_values .*the ValueError shown above",
        ),
        (
            lambda: seeing("llava"),
            [{"pixel_values": torch.zeros(3, 8, 8)}],
            r"has the columns \['pixel_values'\]",
        ),
    ],
)
def test_rows_that_a_model_does_not_run_on_are_refused_before_any_work(
    model: Any, data: list[Any], message: str
) -> None:
    with pytest.raises(CalibrationError, match=message):
        pruner(model(), data).prune()


def test_a_dual_encoder_needs_both() -> None:
    vision, text = AutoConfig.for_model("vit", **IMAGE), AutoConfig.for_model("bert", **ENCODER)
    config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(vision, text)
    model = transformers.VisionTextDualEncoderModel(config).eval()
    with pytest.raises(CalibrationError, match="does not run on .* it also takes pixel_values"):
        pruner(model, rows(images=False)).prune()


CAPTIONS = [
    {"pixel_values": row["pixel_values"], "labels": row["input_ids"][5:]} for row in rows(images=True)
]


@pytest.mark.parametrize("method", slow_unless_in(("magnitude",), ("magnitude", "surgeon", "kprune")))
def test_a_decoder_that_reads_another_model_is_pruned_with_it(method: str, tmp_path: Path) -> None:
    """However rows are batched; what is saved generates the same."""
    results = []
    for size in (1, 6):
        model = make("vision-encoder-decoder")
        captions = pruner(
            model, CAPTIONS, method=method, num_tokens=150, per_device_batch_size=size, sparsity=0.3
        )
        report = captions.prune()
        assert report.left_alone == {}
        assert {s.kind for s in report.sublayers} == {"attention", "cross_attention", "ffn"}
        results.append([entry.kept for entry in report.sublayers])
    assert results[0] == results[1]
    captions.save_model(str(tmp_path / "pruned"))
    again = type(model).from_pretrained(tmp_path / "pruned").eval()
    images = torch.stack([row["pixel_values"] for row in CAPTIONS[:3]])
    tokens = [each.generate(images, max_new_tokens=5, do_sample=False) for each in (model, again)]
    assert torch.equal(*tokens)


def test_towers_with_one_config_are_left_alone() -> None:
    """BLIP's encoder and decoder of questions and answers have one; the model has no loss that is known."""
    config = copy.deepcopy(make("blip").config)
    model = transformers.BlipForQuestionAnswering(config).eval()
    data = [{**row, "input_ids": row["input_ids"][5:], "decoder_input_ids": [2, 5, 6]} for row in rows(True)]
    with (
        pytest.warns(BudgetWarning, match="text_decoder is left alone, as it has one config with another"),
        pytest.warns(UserWarning, match="preserved are the hidden states above vision_model.encoder.layers,"),
    ):
        report = pruner(model, data, sparsity=0.15).prune()
    assert {s.name.split(".")[0] for s in report.sublayers} == {"vision_model"}
    assert (report.knowledge, report.compared) == ("hidden states", ["vision_model.encoder.layers"])


def test_an_encoder_under_a_head_of_its_own_is_pruned_by_what_it_gives(tmp_path: Path) -> None:
    """Depth from several layers of a DINOv2: its head has no loss that is known, and the neck below it no units."""
    backbone = {**IMAGE, "mlp_ratio": 1, "model_type": "dinov2", "out_indices": [2, 3]}
    backbone |= {"num_hidden_layers": 3, "reshape_hidden_states": False}
    sizes = {"neck_hidden_sizes": [8] * 2, "reassemble_factors": [1] * 2, "fusion_hidden_size": 8}
    config = AutoConfig.for_model("dpt", backbone_config=backbone, patch_size=4, **sizes)
    model = transformers.DPTForDepthEstimation(config).eval()
    data = [{"pixel_values": row["pixel_values"]} for row in rows(images=True)]
    depth = pruner(model, data, method="surgeon", num_tokens=100)
    with (
        pytest.warns(BudgetWarning, match="neck is left alone, as it joins hidden states of several layers"),
        pytest.warns(UserWarning, match="preserved are the hidden states above backbone.encoder.layer,"),
    ):
        report = depth.prune()
    assert (report.knowledge, list(report.left_alone)) == ("hidden states", ["neck"])
    assert {s.name.split(".")[0] for s in report.sublayers} == {"backbone"}
    depth.save_model(str(tmp_path / "pruned"))
    again = type(model).from_pretrained(tmp_path / "pruned").eval()
    pixels = torch.stack([row["pixel_values"] for row in data[:3]])
    with torch.no_grad():
        torch.testing.assert_close(again(pixels).predicted_depth, model(pixels).predicted_depth)


@pytest.mark.parametrize(
    ("model", "data", "towers", "stays"),
    [
        (lambda: seeing("llava"), rows(images=True), ["vision"], "language_model"),
        *(
            pytest.param(lambda: make("vision-encoder-decoder"), CAPTIONS, *one, marks=pytest.mark.slow)
            for one in ((["encoder"], "decoder"), (["text"], "encoder"))
        ),
        *(
            pytest.param(lambda name=name: seeing(name), data, towers, stays, marks=pytest.mark.slow)
            for name in SEEING
            for data in (rows(images=False), rows(images=True))
            for towers, stays in ((["text"], "vision_tower"), (["language"], "vision_tower"))
        ),
    ],
)
def test_the_parts_that_are_asked_for_are_pruned_and_the_others_stay(
    model: Any, data: list[Any], towers: list[str], stays: str
) -> None:
    student = model()
    before = copy.deepcopy(student.state_dict())
    with pytest.warns(BudgetWarning, match=f"{stays} is left alone, as towers asks for {towers[0]} alone"):
        report = pruner(student, data, towers=towers, method="surgeon", num_tokens=100).prune()
    assert report.sparsity >= 0.4
    assert report.sublayers
    assert [path.rpartition(".")[2] for path in report.left_alone] == [stays]
    assert not any(stays in entry.name.split(".") for entry in report.sublayers)
    for name, tensor in student.state_dict().items():
        assert stays not in name.split(".") or torch.equal(tensor, before[name])


@pytest.mark.slow
@pytest.mark.parametrize("side", ["encoder", "decoder"])
@pytest.mark.parametrize("name", ["bart", "t5", "whisper"])
def test_the_encoder_or_the_decoder_alone_is_pruned(name: str, side: str, tmp_path: Path) -> None:
    model, other = make(name), "decoder" if side == "encoder" else "encoder"
    before, inputs = copy.deepcopy(model.state_dict()), inputs_for(make(name), ZOO[name][2], batch=30)
    labels = inputs["decoder_input_ids"]
    first = {
        key: value
        for key, value in inputs.items()
        if not key.startswith("decoder") and torch.is_tensor(value)
    }
    data = [{"labels": labels[i], **{key: value[i] for key, value in first.items()}} for i in range(30)]
    one = pruner(model, data, towers=[side], method="surgeon", num_tokens=100)
    with pytest.warns(BudgetWarning, match=f"{other}.[a-z]* is left alone, as towers asks for {side} alone"):
        report = one.prune()
    assert report.sparsity >= 0.4
    assert {entry.name.split(".")[0] for entry in report.sublayers} == {side}
    for key, tensor in model.state_dict().items():
        assert other not in key.split(".") or torch.equal(tensor, before[key])
    one.save_model(str(tmp_path))
    again = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs)[0], model(**inputs)[0])


@pytest.mark.parametrize(
    ("model", "towers", "message"),
    [
        (
            lambda: seeing("llava"),
            ["audio"],
            "towers names 'audio', expected parts of LlavaForConditionalGeneration that can be pruned: vision or "
            "vision_tower .model.vision_tower., language or text or language_model .model.language_model.",
        ),
        (
            lambda: make("qwen3_vl"),
            ["audio"],
            "vision or visual .model.visual., language or text or language_model .model.language_model.; "
            "model.visual.deepstack_merger_list stays, as each of it",
        ),
        (lambda: make("bert"), ["language"], "not made of several models, so leave towers at None"),
    ],
)
def test_a_part_that_is_not_there_is_an_error(model: Any, towers: list[str], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        pruner(model(), rows(images=False), towers=towers).prune()


@pytest.mark.parametrize("model_type", slow_unless_in(("mistral3",), COUNTED))
def test_texts_alone_are_enough_for_language(model_type: str) -> None:
    model = make(model_type)
    before = copy.deepcopy(model.state_dict())
    with pytest.warns(BudgetWarning, match="is left alone, as"):
        report = pruner(model, rows(images=False), towers=["language"], num_tokens=100).prune()
    assert {entry.name.split(".")[1] for entry in report.sublayers} <= {"language_model", "text_model"}
    layers = ("model.language_model.layers.", "model.text_model.layers.")
    for name, tensor in model.state_dict().items():
        assert name.startswith(layers) or torch.equal(tensor, before[name])


@pytest.mark.slow
@pytest.mark.parametrize("model_type", COUNTED)
def test_rows_with_any_number_of_images_are_batched_as_by_themselves(model_type: str) -> None:
    results, data = [], calibration_rows(make(model_type), "counted")
    for size in (1, 6):
        args = KPruneArguments(sparsity=0.4, num_tokens=150, per_device_batch_size=size, use_cpu=True)
        report = KPrunePruner(make(model_type), args, data, collator_for(model_type)).prune()
        assert {entry.name.split(".")[1] for entry in report.sublayers} in (
            {"vision_model", "text_model"},
            {"vision_tower", "language_model"},
        )
        results.append([entry.kept for entry in report.sublayers])
    assert results[0] == results[1]


@pytest.mark.slow
def test_rows_whose_images_are_cut_into_several_tiles_are_batched_as_by_themselves() -> None:
    """Rows of one length, so that those of three tiles and of five would come into one batch."""

    def tiling() -> Any:
        torch.manual_seed(0)
        config = AutoConfig.for_model(
            "llava_next",
            text_config={**DECODER, "model_type": "llama", "vocab_size": 80},
            vision_config={**IMAGE, "model_type": "clip_vision_model"},
            image_grid_pinpoints=[[8, 16], [16, 16]],
            **TOKENS,
        )
        return transformers.LlavaNextForConditionalGeneration(config).eval()

    def collate(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        pixels = [row["pixel_values"] for row in batch]
        columns = {key: torch.tensor([row[key] for row in batch]) for key in ("input_ids", "image_sizes")}
        return {**columns, "pixel_values": torch.nn.utils.rnn.pad_sequence(pixels, batch_first=True)}

    results, data, model = [], list[dict[str, Any]](), tiling()
    for number in range(20):
        size, tiles = [((8, 16), 3), ((16, 16), 5)][number % 2]
        pixels = torch.randn(tiles, 3, 8, 8)
        with torch.no_grad():
            features = model.model.get_image_features(pixels[None], torch.tensor([size]), return_dict=True)
        image = [IMAGE_TOKEN] * len(features.pooler_output[0])
        words = torch.randint(4, 60, (40 - len(image),)).tolist()
        data.append({"input_ids": [*image, *words], "pixel_values": pixels, "image_sizes": list(size)})
    for per_batch in (1, 6):
        args = KPruneArguments(sparsity=0.4, num_tokens=400, per_device_batch_size=per_batch, use_cpu=True)
        report = KPrunePruner(tiling(), args, data, collate).prune()
        assert report.left_alone == {}
        results.append([entry.kept for entry in report.sublayers])
    assert results[0] == results[1]


def packed_rows(model_type: str, count: int = 20, images: bool = True) -> list[dict[str, Any]]:
    """Texts around an image each, of several sizes, or the texts alone."""
    data = calibration_rows(make(model_type), "packed", count)
    words = [[token for token in row["input_ids"] if token < 60] for row in data]
    return data if images else [{"input_ids": each} for each in words]


@pytest.mark.parametrize(
    ("model_type", "images"),
    slow_unless_in([("qwen3_vl", True)], [*((name, True) for name in PACKED), ("qwen2_vl", False)]),
)
def test_towers_of_packed_images_are_pruned_where_there_are_images(
    model_type: str, images: bool, tmp_path: Path
) -> None:
    results, data = [], packed_rows(model_type, images=images)
    for size in (1, 6):
        model = make(model_type)
        before = copy.deepcopy(model.state_dict())
        args = KPruneArguments(
            sparsity=0.3, num_tokens=100, per_device_batch_size=size, disable_tqdm=True, use_cpu=True
        )
        why = "model.visual is left alone, as it does not run on the calibration rows"
        with nullcontext() if images else pytest.warns(BudgetWarning, match=why):
            report = KPrunePruner(model, args, data, pack).prune()
        towers = {".".join(entry.name.split(".")[:2]) for entry in report.sublayers}
        if images:
            assert towers == {"model.visual", "model.language_model"}
        else:
            assert towers == {"model.language_model"}
            assert report.left_alone == {"model.visual": "it does not run on the calibration rows"}
            for name, tensor in model.state_dict().items():
                assert ".visual." not in name or torch.equal(tensor, before[name])
        assert report.sparsity >= 0.3
        results.append((model, [entry.kept for entry in report.sublayers]))
    (model, kept), (other, kept_too) = results
    assert kept == kept_too
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    inputs = pack(packed_rows(model_type, 4))
    with torch.no_grad():
        logits = [each(**inputs).logits for each in (model, again, other)]
    torch.testing.assert_close(logits[0], logits[1])
    torch.testing.assert_close(logits[0], logits[2], rtol=1e-3, atol=1e-3)
    tokens = [each.generate(**inputs, max_new_tokens=5, do_sample=False) for each in (model, again)]
    assert torch.equal(*tokens)


@pytest.mark.slow
@pytest.mark.parametrize("towers", [["vision"], ["language"]])
@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "qwen3_vl"])
def test_one_tower_of_packed_images_or_of_language_is_pruned_and_the_other_stays(
    model_type: str, towers: list[str]
) -> None:
    model, stays = make(model_type), {"vision": "language_model", "language": "visual"}[towers[0]]
    before = copy.deepcopy(model.state_dict())
    args = KPruneArguments(sparsity=0.3, num_tokens=300, towers=towers, disable_tqdm=True, use_cpu=True)
    with pytest.warns(BudgetWarning, match=f"{stays} is left alone, as towers asks for {towers[0]} alone"):
        report = KPrunePruner(model, args, packed_rows(model_type), pack).prune()
    assert report.sublayers
    assert not any(stays in entry.name.split(".") for entry in report.sublayers)
    for name, tensor in model.state_dict().items():
        assert stays not in name.split(".") or torch.equal(tensor, before[name])


@pytest.mark.slow
def test_a_tower_that_runs_on_some_rows_alone_is_an_error_unless_it_is_to_stay() -> None:
    """Which rows have an image is seen by the data collator alone."""
    data = packed_rows("qwen2_vl", 12)
    options: dict[str, Any] = {"sparsity": 0.3, "num_tokens": 150, "disable_tqdm": True, "use_cpu": True}

    def some(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        words = [[token for token in row["input_ids"] if token < 60] for row in batch]
        return pack([{"input_ids": words[0]}] if [len(each) for each in words] == [7] else batch)

    with pytest.raises(CalibrationError, match=r"model.visual.blocks does not run on some calibration rows"):
        KPrunePruner(make("qwen2_vl"), KPruneArguments(**options), data, some).prune()
    with pytest.warns(BudgetWarning, match="visual is left alone, as towers asks for language alone"):
        KPrunePruner(make("qwen2_vl"), KPruneArguments(**options, towers=["language"]), data, some).prune()


def tower_rows(padding: int, count: int = 24) -> list[dict[str, Any]]:
    """Images of 2 x 2 patches, beside which so many columns of patches are padding, of anything."""
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(count, 3, 8, 8, generator=generator)
    images = torch.cat([real, torch.full((count, 3, 8, 4 * padding), 7.0)], 3)
    mask = (torch.arange(2 + padding) < 2).expand(2, -1)
    return [{"pixel_values": image, "patch_attention_mask": mask} for image in images]


@pytest.mark.parametrize("method", slow_unless_in(("kprune",), ("kprune", "surgeon")))
def test_places_that_a_tower_of_images_masks_weigh_nothing(method: str) -> None:
    results = []
    for padding in (0, 1):
        tower = copy.deepcopy(make("idefics3").model.vision_model)
        report = pruner(tower, tower_rows(padding), method=method, num_tokens=10_000).prune()
        results.append((report, tower.state_dict()))
    (one, weights), (other, weights_too) = results
    assert [entry.kept for entry in one.sublayers] == [entry.kept for entry in other.sublayers]
    assert one.before.flops == other.before.flops
    for name, tensor in weights.items():
        torch.testing.assert_close(weights_too[name], tensor, rtol=1e-3, atol=1e-4)


def test_the_mask_that_a_tower_of_images_reads_says_what_is_padding() -> None:
    """Of Idefics 3 that of each image, which the model makes of the pixels that are padding."""
    model, data = make("idefics3"), counted_rows("idefics3", 0, 2)
    inputs = counted_batch(data, "idefics3")
    inputs["pixel_attention_mask"][0, 0, :, 4:] = 0
    (batch,) = calibration(model, data[:1], lambda _: {k: v[:1] for k, v in inputs.items()}).batches
    assert batch.valid["model.vision_model.encoder.layers"].tolist() == [[True, False] * 2]


def in_one_row(model_type: str, data: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """The texts and images of several rows as those of one."""
    kind = ZOO[model_type][2]
    parts = [pack([row]) if kind == "packed" else counted_batch([row], model_type) for row in data]
    beside = {"input_ids", "attention_mask", "mm_token_type_ids"}
    beside |= {"pixel_values", "pixel_attention_mask"} if model_type == "idefics3" else set()
    return {key: torch.cat([each[key] for each in parts], int(key in beside)) for key in parts[0]}


@pytest.mark.parametrize("model_type", ["idefics3", "mistral3", "qwen3_vl", "qwen2_5_vl"])
def test_flops_between_patches_are_those_within_an_image_or_a_window(model_type: str) -> None:
    """Images in one row cost what they cost in a row each."""
    torch.manual_seed(0)
    packs = ZOO[model_type][2] == "packed"
    data = packed_rows(model_type, 4) if packs else counted_rows(model_type, 0, 4)
    model, shares = make(model_type), list[float]()
    if model_type == "qwen2_5_vl":
        model.model.visual.window_size = 8  # of two patches a side
    each = calibration(model, data, partial(in_one_row, model_type), per_device_batch_size=1)
    joined = calibration(model, data[:1], lambda _: in_one_row(model_type, data))
    towers = [s for s in joined.sublayers if s.unit.has_heads and "language" not in s.name]
    for sublayer in [s for s in towers if "text_model" not in s.name]:
        patches, _ = joined.totals[sublayer.stack_name]
        assert each.totals[sublayer.stack_name][0] == patches
        keys = [some.flops_lengths[sublayer.name] for some in (each, joined)]
        assert keys[0] == pytest.approx(keys[1])
        shares.append(keys[1] / patches)
    assert 0 < max(shares) < 0.6
    if model_type == "qwen2_5_vl":  # windows below, whole images above
        assert shares[0] < shares[1]


@pytest.mark.slow
@pytest.mark.parametrize("tower", ["vision", "audio", "language"])
@pytest.mark.parametrize("model_type", ["qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"])
def test_one_of_three_towers_is_pruned_and_the_others_stay(
    model_type: str, tower: str, tmp_path: Path
) -> None:
    model, path = make(model_type), {"vision": "visual", "audio": "audio_tower"}.get(tower, "language_model")
    before, data = copy.deepcopy(model.state_dict()), calibration_rows(model, "packed")
    args = KPruneArguments(
        sparsity=0.3, num_tokens=400, towers=[tower], min_heads=1, disable_tqdm=True, use_cpu=True
    )
    with pytest.warns(BudgetWarning, match=f"is left alone, as towers asks for {tower} alone"):
        report = KPrunePruner(model, args, data, collator_for(model_type)).prune()
    assert {entry.name.split(".")[1] for entry in report.sublayers} == {path}
    for name, tensor in model.state_dict().items():
        assert name.startswith(f"model.{path}.") or torch.equal(tensor, before[name])
    model.save_pretrained(tmp_path)
    again, inputs = type(model).from_pretrained(tmp_path).eval(), inputs_for(model, "packed")
    tokens = [each.generate(**inputs, max_new_tokens=3, do_sample=False) for each in (model, again)]
    assert torch.equal(*tokens)


@pytest.mark.slow
@pytest.mark.parametrize(
    "model_type",
    ["qwen2_5_vl", "qwen3_vl", "qwen3_5", "exaone4_5", "kimi_k25", "paddleocr_vl", "video_llama_3"],
)
def test_ffns_of_towers_of_packed_images_are_pruned_to_one_width_of_a_stock_config(
    model_type: str, tmp_path: Path
) -> None:
    model, data = make(model_type), calibration_rows(make(model_type), "packed")
    options: dict[str, Any] = {"towers": ["vision"], "uniform": True, "disable_tqdm": True, "use_cpu": True}
    args = KPruneArguments(sparsity=0.1, num_tokens=300, prune_heads=False, **options)
    with pytest.warns(BudgetWarning, match="is left alone, as towers asks for vision alone"):
        report = KPrunePruner(model, args, data, collator_for(model_type)).prune()
    assert len({len(entry.kept) for entry in report.sublayers if entry.kind == "ffn"}) == 1
    model.save_pretrained(tmp_path)
    assert "kprune" not in (tmp_path / "config.json").read_text()
    again, inputs = type(model).from_pretrained(tmp_path).eval(), inputs_for(model, "packed")
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits)


def test_heads_of_towers_of_packed_images_are_no_size_of_a_stock_config() -> None:
    args = KPruneArguments(sparsity=0.3, uniform=True, towers=["vision"], disable_tqdm=True, use_cpu=True)
    data = packed_rows("qwen3_vl", 12)
    with pytest.raises(UnsupportedArchitectureError, match="cannot say fewer heads of the same size"):
        KPrunePruner(make("qwen3_vl"), args, data, pack).prune()
