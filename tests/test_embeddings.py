"""sentence-transformers folders: what `encode` gives is what is pruned for, and what lies beside the transformer stays."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import files
from data import save_with_words, texts
from models import shallow, slow_unless_in
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, BertModel, PreTrainedModel

from hf_kprune import ArgumentError, KPruneArguments, KPrunePruner, UnsupportedModelError
from hf_kprune.calibration.embeddings import folder_of, read_folder
from hf_kprune.calibration.knowledge import Draws
from hf_kprune.calibration.sentence_modules import pool
from hf_kprune.cli.terminal import main


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of its own imports
    from sentence_transformers import CrossEncoder, SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import (
        CNN,
        Dense,
        Dropout,
        LayerNorm,
        Normalize,
        Pooling,
        Transformer,
        WordWeights,
    )

CHAIN = {
    "cls, normalised": lambda: [Pooling(16, "cls"), Normalize()],
    "mean": lambda: [Pooling(16, "mean")],
    "max": lambda: [Pooling(16, "max")],
    "mean_sqrt_len_tokens": lambda: [Pooling(16, "mean_sqrt_len_tokens")],
    "weightedmean": lambda: [Pooling(16, "weightedmean")],
    "lasttoken": lambda: [Pooling(16, "lasttoken")],
    "cls and mean and max": lambda: [Pooling(16, ("cls", "mean", "max"))],
    "mean, dense 16 to 5, normalised": lambda: [Pooling(16), Dense(16, 5), Normalize()],
    "mean, dense 16 to 16": lambda: [
        Pooling(16),
        Dense(16, 16, activation_function=torch.nn.GELU(), use_residual=True),
    ],
    "dense 16 to 6, mean": lambda: [Dense(16, 6, module_input_name="token_embeddings"), Pooling(6)],
    "normalised, mean": lambda: [Normalize(module_input_name="token_embeddings"), Pooling(16)],
    "mean, dropout, layer norm": lambda: [Pooling(16), Dropout(0.5), LayerNorm(16)],
}
PROMPTS: dict[str, Any] = {"prompts": {"query": "w7 w8 w9 "}, "default_prompt_name": "query"}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="sentence_transformers")
        yield


@pytest.fixture(scope="module")
def transformer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_with_words(shallow("bert", ""), tmp_path_factory.mktemp("transformer"))


def build(
    transformer: str, path: Path, modules: Sequence[Any], max_seq_length: int = 9, **options: Any
) -> str:
    """A folder that the library saves, with weights of its modules away from zero."""
    torch.manual_seed(3)
    for module in modules:
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, 0.1, 0.5)
    first = Transformer(transformer, max_seq_length=max_seq_length)
    SentenceTransformer(modules=[first, *modules], device="cpu", **options).save_pretrained(str(path))
    return str(path)


def encode(folder: Any) -> Tensor:
    """What a folder gives, or an object of the library."""
    model = (
        folder if isinstance(folder, SentenceTransformer) else SentenceTransformer(str(folder), device="cpu")
    )
    return torch.from_numpy(model.encode(texts(12, 5), show_progress_bar=False))


def prune(model: Any, out: Path | None = None, method: str = "magnitude", **options: Any) -> KPrunePruner:
    """By the quickest method where what it decides does not matter."""
    pruner = KPrunePruner(
        model, KPruneArguments(sparsity=0.5, method=method, disable_tqdm=True), texts(30, 0), **options
    )
    pruner.prune()
    if out is not None:
        pruner.save_model(str(out))
    return pruner


def in_place(folder: str, model: PreTrainedModel) -> Tensor:
    """What the folder's own modules give on top of another transformer."""
    dense = SentenceTransformer(folder, device="cpu")
    dense[0].model = model.eval()
    return torch.from_numpy(dense.encode(texts(12, 5), show_progress_bar=False))


WRITTEN = {"config.json", "model.safetensors", "README.md", "tokenizer.json", "tokenizer_config.json"}


@pytest.mark.parametrize(
    ("summary", "prompted"),
    slow_unless_in(
        [*((summary, False) for summary in list(CHAIN)[::3]), ("cls and mean and max", True)],
        [*((summary, False) for summary in CHAIN), ("cls and mean and max", True), ("lasttoken", True)],
    ),
)
def test_the_knowledge_is_what_encode_gives(
    transformer: str, tmp_path: Path, summary: str, prompted: bool
) -> None:
    """To rounding, on batches with padding, whichever the poolings and what follows them, with and without the prompt."""
    modules = CHAIN[summary]()
    if prompted:
        next(module for module in modules if isinstance(module, Pooling)).include_prompt = False
    folder = build(
        transformer, tmp_path / "dense", modules, max_seq_length=12, **(PROMPTS if prompted else {})
    )
    read = read_folder(folder)
    assert read is not None
    assert not read.unknown
    words = (
        read.summary.removeprefix("sentence embedding (").removesuffix(")").replace(" without the prompt", "")
    )
    assert words == summary
    tokenizer, model = (
        read.reader(AutoTokenizer.from_pretrained(folder)),
        AutoModel.from_pretrained(folder).eval(),
    )
    batch = tokenizer(
        texts(12, 5), padding=True, truncation=True, max_length=read.max_length, return_tensors="pt"
    )
    with torch.no_grad():
        outputs = model(**batch)
        embeddings = read.embed(outputs, batch["attention_mask"].bool())
    expected = encode(folder)
    torch.testing.assert_close(embeddings, expected, rtol=1e-4, atol=1e-5)
    loss = read.knowledge(2.0)
    assert loss is not None
    other = BertModel(model.config).eval()
    with torch.no_grad():
        distance = loss(other(**batch), outputs, batch["attention_mask"].bool())
    torch.testing.assert_close(
        distance, (in_place(folder, other) - expected).square().sum(1), rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("mode", ["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"])
@pytest.mark.parametrize("prompt", [0, 2])
def test_pooling_is_that_of_the_library_on_whichever_side_the_padding_is(mode: Any, prompt: int) -> None:
    tokens, valid = torch.randn(3, 6, 4), torch.ones(3, 6, dtype=torch.bool)
    valid[1, :2], valid[2, :3] = False, False
    for mask in (valid, valid.flip(1)):
        features = {"token_embeddings": tokens, "attention_mask": mask.long(), "prompt_length": prompt}
        expected = Pooling(4, mode, include_prompt=False)(features)["sentence_embedding"]
        torch.testing.assert_close(pool(tokens, mask, [mode], prompt), expected)


@pytest.mark.parametrize("summary", ["mean", "cls, normalised", "mean, dense 16 to 5, normalised"])
def test_gradients_against_draws_have_the_distance_for_a_curvature(
    transformer: str, tmp_path: Path, summary: str
) -> None:
    """Exactly so: what is drawn is the embedding itself, whatever modules make it."""
    read = read_folder(build(transformer, tmp_path / "dense", CHAIN[summary]()))
    assert read is not None
    loss = read.knowledge(2.0)
    assert loss is not None
    valid, point = (
        torch.ones(1, 3, dtype=torch.bool),
        torch.randn(48, generator=torch.Generator().manual_seed(0)),
    )

    def outputs(flat: Tensor) -> dict[str, Tensor]:
        return {"last_hidden_state": flat.view(1, 3, 16)}

    curvature = torch.autograd.functional.hessian(
        lambda x: loss(outputs(x), outputs(point), valid).sum(), point
    )
    count = 2000
    variable, valid = point.expand(count, -1).clone().requires_grad_(), valid.expand(count, -1)
    many = {"last_hidden_state": variable.view(count, 3, 16)}
    drawn = loss.draw(many, loss.noise(many, Draws(0, range(count), valid)), valid)
    (gradients,) = torch.autograd.grad(loss(many, drawn, valid).sum(), variable)
    information = gradients.T @ gradients
    assert float(torch.cosine_similarity(information.flatten(), curvature.flatten(), 0)) > 0.98


@pytest.mark.parametrize(
    "summary",
    ["cls, normalised", *(pytest.param(s, marks=pytest.mark.slow) for s in CHAIN if s != "cls, normalised")],
)
def test_a_pruned_folder_encodes_as_its_parts_do(transformer: str, tmp_path: Path, summary: str) -> None:
    """By its path; everything beside the transformer is the same bytes, and it can be pruned again."""
    folder = build(transformer, tmp_path / "dense", CHAIN[summary](), similarity_fn_name="dot", **PROMPTS)
    (tmp_path / "dense" / "notes").mkdir()
    (tmp_path / "dense" / "notes" / "data.txt").write_text("what it was trained on")
    (tmp_path / "dense" / "onnx").mkdir()
    (tmp_path / "dense" / "onnx" / "model.onnx").write_bytes(b"the dense model")
    pruner = prune(folder, tmp_path / "pruned")
    assert pruner.report is not None
    assert pruner.report.knowledge == f"sentence embedding ({summary})"
    assert isinstance(pruner.model, BertModel)
    expected = in_place(folder, pruner.model)
    torch.testing.assert_close(encode(tmp_path / "pruned"), expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(expected, encode(folder), atol=1e-3)
    before, after = files(folder), files(tmp_path / "pruned")
    assert "onnx/model.onnx" not in after
    carried = before.keys() - WRITTEN - {"onnx/model.onnx"}
    assert {"modules.json", "notes/data.txt", "config_sentence_transformers.json"} <= carried
    assert any(name.endswith("_Pooling/config.json") for name in carried)
    assert {name: after.get(name) for name in carried} == {name: before[name] for name in carried}
    again = prune(str(tmp_path / "pruned"), tmp_path / "again")
    torch.testing.assert_close(
        encode(tmp_path / "again"), in_place(folder, again.model), rtol=1e-5, atol=1e-6
    )


def test_an_older_result_is_replaced_by_a_newer_one(transformer: str, tmp_path: Path) -> None:
    """With all that was carried, as is told from modules.json."""
    folder = build(transformer, tmp_path / "dense", CHAIN["mean, dense 16 to 5, normalised"]())
    prune(folder, tmp_path / "pruned")
    pruner = prune(folder)
    pruner.args.overwrite_output_dir = True
    pruner.save_model(str(tmp_path / "pruned"))
    before, after = files(folder), files(tmp_path / "pruned")
    assert {name: after.get(name) for name in before.keys() - WRITTEN} == {
        n: before[n] for n in before.keys() - WRITTEN
    }
    torch.testing.assert_close(
        encode(tmp_path / "pruned"), in_place(folder, pruner.model), rtol=1e-5, atol=1e-6
    )


def test_the_card_keeps_what_the_folder_says(transformer: str, tmp_path: Path) -> None:
    folder = build(transformer, tmp_path / "dense", CHAIN["mean"]())
    (tmp_path / "dense" / "README.md").write_text(
        "---\nlicense: mit\ntags:\n- mine\n---\n\n# About it\n\nAll of it.\n"
    )
    prune(folder, tmp_path / "pruned")
    card = (tmp_path / "pruned" / "README.md").read_text()
    for part in (
        "license: mit",
        "- mine",
        "- sentence-transformers",
        "- hf_kprune",
        "library_name: sentence-transformers",
    ):
        assert part in card.split("---")[1]
    assert "SentenceTransformer(path)" in card
    assert card.rstrip().endswith("# About it\n\nAll of it.")


def test_a_bare_model_of_such_a_folder_is_recognised(transformer: str, tmp_path: Path) -> None:
    """The same plan and the same folder as by its path."""
    folder = build(transformer, tmp_path / "dense", CHAIN["cls, normalised"]())
    by_path = prune(folder, method="surgeon")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    bare = prune(
        BertModel.from_pretrained(folder), tmp_path / "pruned", method="surgeon", processing_class=tokenizer
    )
    assert bare.report is not None
    assert by_path.report is not None
    assert bare.report.knowledge == "sentence embedding (cls, normalised)"
    assert [s.kept for s in bare.report.sublayers] == [s.kept for s in by_path.report.sublayers]
    torch.testing.assert_close(
        encode(tmp_path / "pruned"), in_place(folder, bare.model), rtol=1e-5, atol=1e-6
    )


def test_another_head_on_such_a_folder_is_no_embedding(transformer: str, tmp_path: Path) -> None:
    folder = build(transformer, tmp_path / "dense", CHAIN["mean"]())
    model = shallow("bert")
    model.config.name_or_path = folder
    with pytest.warns(UserWarning, match="has a head that the sentence-transformers folder"):
        assert folder_of(model) is None


def test_a_config_that_names_another_class_is_loaded_as_the_library_does(
    transformer: str, tmp_path: Path
) -> None:
    """Many folders on the Hub name a masked language model, whose head is not in their weights."""
    folder = build(transformer, tmp_path / "dense", CHAIN["mean"]())
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    (tmp_path / "dense" / "config.json").write_text(
        json.dumps({**config, "architectures": ["BertForMaskedLM"]})
    )
    assert type(KPrunePruner(folder).model) is BertModel


def test_a_transformer_in_a_folder_of_its_own(transformer: str, tmp_path: Path) -> None:
    """As the oldest versions saved it: the pruned one is at the top, and so is what lay beside it."""
    folder = build(transformer, tmp_path / "flat", CHAIN["mean, dense 16 to 5, normalised"]())
    old = tmp_path / "old"
    shutil.copytree(folder, old / "0_Transformer")
    for name in ("1_Pooling", "2_Dense", "3_Normalize", "config_sentence_transformers.json"):
        (old / "0_Transformer" / name).rename(old / name)
    modules = json.loads((old / "0_Transformer" / "modules.json").read_text())
    (old / "0_Transformer" / "modules.json").unlink()
    modules[0] |= {"path": "0_Transformer", "type": "sentence_transformers.models.Transformer"}
    (old / "modules.json").write_text(json.dumps(modules))
    (old / "config.json").write_text('{"__version__": "0.2.0"}')
    torch.testing.assert_close(encode(old), encode(folder))
    pruner = prune(str(old), tmp_path / "pruned")
    torch.testing.assert_close(
        encode(tmp_path / "pruned"), in_place(folder, pruner.model), rtol=1e-5, atol=1e-6
    )
    assert folder_of(BertModel.from_pretrained(old / "0_Transformer")) is not None
    assert isinstance(BertModel.from_pretrained(tmp_path / "pruned"), BertModel)


def test_older_configurations_are_read(transformer: str, tmp_path: Path) -> None:
    """Pooling flags, limits in sentence_bert_config.json, no folder for Normalize, .bin weights."""
    folder = build(
        transformer, tmp_path / "dense", [Pooling(16), Dense(16, 5), Normalize()], max_seq_length=30
    )
    path = Path(folder)
    flags = {"word_embedding_dimension": 16, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}
    (path / "1_Pooling" / "config.json").write_text(json.dumps(flags))
    weights = {"linear.weight": torch.randn(5, 32), "linear.bias": torch.randn(5)}
    torch.save(weights, path / "2_Dense" / "pytorch_model.bin")
    (path / "2_Dense" / "model.safetensors").unlink()
    dense = json.loads((path / "2_Dense" / "config.json").read_text())
    (path / "2_Dense" / "config.json").write_text(json.dumps({**dense, "in_features": 32}))
    shutil.rmtree(path / "3_Normalize")
    (path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 6, "do_lower_case": True}))
    read = read_folder(folder)
    assert read is not None
    assert (read.max_length, read.lower_case) == (6, True)
    pruner = prune(folder, tmp_path / "pruned")
    torch.testing.assert_close(
        encode(tmp_path / "pruned"), in_place(folder, pruner.model), rtol=1e-5, atol=1e-6
    )
    assert (
        files(tmp_path / "pruned")["2_Dense/pytorch_model.bin"] == files(folder)["2_Dense/pytorch_model.bin"]
    )


@pytest.mark.parametrize("where", slow_unless_in(("folder",), ("tokenizer", "folder")))
def test_calibration_texts_are_read_as_encode_reads_them(
    transformer: str, tmp_path: Path, where: str
) -> None:
    """Truncated where it truncates, after the default prompt; in Python and on the command line."""
    folder = build(
        transformer,
        tmp_path / "dense",
        CHAIN["mean"](),
        max_seq_length=6 if where == "tokenizer" else 40,
        **PROMPTS,
    )
    if where == "folder":
        (tmp_path / "dense" / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 6}))
    tokenizer = AutoTokenizer.from_pretrained(transformer)
    ids = [tokenizer("w7 w8 w9 " + text, truncation=True, max_length=6)["input_ids"] for text in texts(30, 0)]
    report = prune(folder).report
    assert report is not None
    assert report.calibration["tokens"] == sum(map(len, ids))
    args = KPruneArguments(sparsity=0.5, method="magnitude", disable_tqdm=True)
    plain = KPrunePruner(transformer, args, [{"input_ids": row} for row in ids])
    assert report.calibration["sha256"] == plain.prune().calibration["sha256"]

    (tmp_path / "texts.txt").write_text("\n".join(texts(30, 0)) + "\n")
    files_and_sizes = [
        "--dataset_file",
        tmp_path / "texts.txt",
        "--method",
        "magnitude",
        "--output_dir",
        tmp_path / "out",
    ]
    assert main(["prune", "--model_name_or_path", folder, "--disable_tqdm", *map(str, files_and_sizes)]) == 0
    written = json.loads((tmp_path / "out" / "kprune_report.json").read_text())
    assert written["knowledge"] == "sentence embedding (mean)"
    assert written["calibration"]["sha256"] == report.calibration["sha256"]
    assert encode(tmp_path / "out").shape == (12, 16)


def test_lower_case_is_applied_before_the_tokenizer(transformer: str, tmp_path: Path) -> None:
    cased = AutoTokenizer.from_pretrained(transformer, do_lower_case=False)
    cased.save_pretrained(tmp_path / "cased")
    BertModel.from_pretrained(transformer).save_pretrained(tmp_path / "cased")
    folder = build(str(tmp_path / "cased"), tmp_path / "dense", CHAIN["mean"]())
    (tmp_path / "dense" / "sentence_bert_config.json").write_text(json.dumps({"do_lower_case": True}))
    read = read_folder(folder)
    assert read is not None
    tokenizer = AutoTokenizer.from_pretrained(folder)
    unknown = tokenizer("W1 W2")["input_ids"]
    library = SentenceTransformer(folder, device="cpu").tokenizer("W1 W2")["input_ids"]
    assert read.reader(tokenizer)("W1 W2")["input_ids"] == library != unknown
    assert tokenizer("W1 W2")["input_ids"] == unknown  # what is saved is as it was


def test_an_explicit_pooling_is_obeyed_and_said(transformer: str, tmp_path: Path) -> None:
    folder = build(transformer, tmp_path / "dense", CHAIN["cls, normalised"]())
    args = KPruneArguments(sparsity=0.5, method="magnitude", pooling="mean", disable_tqdm=True)
    with pytest.warns(UserWarning, match="not what encode gives"):
        pruner = KPrunePruner(folder, args, texts(30, 0))
    assert pruner.prune().knowledge == "embedding (mean)"


def test_a_cross_encoder_keeps_its_files(transformer: str, tmp_path: Path) -> None:
    CrossEncoder(transformer, num_labels=1, device="cpu", max_length=15).save_pretrained(
        str(tmp_path / "dense")
    )
    dense = str(tmp_path / "dense")
    rows = list(zip(texts(30, 0), texts(30, 1), strict=True))
    pruner = KPrunePruner(dense, KPruneArguments(sparsity=0.5, disable_tqdm=True), rows)
    assert pruner.prune().knowledge == "regression"
    pruner.save_model(str(tmp_path / "pruned"))
    pairs = list(zip(texts(9, 5), texts(9, 6), strict=True))
    library = CrossEncoder(dense, device="cpu")
    library[0].model = pruner.model.eval()
    scores = CrossEncoder(str(tmp_path / "pruned"), device="cpu").predict(pairs, show_progress_bar=False)
    torch.testing.assert_close(
        torch.tensor(scores), torch.tensor(library.predict(pairs, show_progress_bar=False))
    )
    assert files(tmp_path / "pruned")["modules.json"] == files(dense)["modules.json"]
    assert "CrossEncoder(path)" in (tmp_path / "pruned" / "README.md").read_text()


def constant(student: Any, teacher: Any, valid: Tensor) -> Tensor:
    losses: Tensor = (student.last_hidden_state[:, 0] - teacher.last_hidden_state[:, 0]).square().sum(-1)
    return losses


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        (lambda: [CNN(16, 16, [1, 3]), Pooling(48)], "module sentence_transformers.*CNN is not known here"),
        pytest.param(
            lambda: [WordWeights(["w1"] * 60, {}), Pooling(16)],
            "WordWeights is not known here",
            marks=pytest.mark.slow,
        ),
        (lambda: [Normalize(module_input_name="token_embeddings")], "no Pooling module"),
    ],
)
def test_modules_that_are_not_known_are_refused_and_kept_with_a_loss(
    transformer: str, tmp_path: Path, modules: Any, message: str
) -> None:
    """Before any work; with a loss of the caller's they are carried like the rest."""
    folder = build(transformer, tmp_path / "dense", modules())
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        KPrunePruner(folder)
    assert "pass compute_loss" in str(caught.value)
    prune(folder, tmp_path / "pruned", compute_loss=constant)
    before, after = files(folder), files(tmp_path / "pruned")
    assert all(after[name] == before[name] for name in before.keys() - WRITTEN)


@pytest.mark.parametrize(
    ("entry", "error", "message"),
    [
        ({"type": "sentence_transformers.models.Router"}, UnsupportedModelError, "expected a Transformer"),
        ({"type": "custom.Transformer"}, UnsupportedModelError, "first module of .* is custom.Transformer"),
        ({"path": "../elsewhere"}, ArgumentError, "'../elsewhere', expected one in"),
        ({"path": "/tmp"}, ArgumentError, "'/tmp', expected one in"),
        (None, ArgumentError, "is no list of modules"),
        ("broken", ArgumentError, "cannot be read as JSON"),
        ("adapters", UnsupportedModelError, "merge_and_unload"),
    ],
)
def test_folders_that_cannot_be_pruned_are_refused(
    transformer: str, tmp_path: Path, entry: Any, error: type[Exception], message: str
) -> None:
    folder = build(transformer, tmp_path / "dense", CHAIN["mean"]())
    path = tmp_path / "dense" / "modules.json"
    modules = json.loads(path.read_text())
    if entry == "broken":
        path.write_text("[{")
    elif entry == "adapters":
        (tmp_path / "dense" / "adapter_config.json").write_text("{}")
    else:
        path.write_text(json.dumps({} if entry is None else [modules[0] | entry, *modules[1:]]))
    with pytest.raises(error, match=message):
        KPrunePruner(folder)


def test_objects_of_the_library_are_pruned_in_place_as_their_folders_are(
    transformer: str, tmp_path: Path
) -> None:
    """The same knowledge, weights, files and card as those of the folder; the object itself is pruned."""
    folder = build(transformer, tmp_path / "dense", CHAIN["mean, dense 16 to 5, normalised"](), **PROMPTS)
    Path(folder, "README.md").write_text("---\nlicense: mit\n---\n# Ours\n\nA card.\n")
    library = SentenceTransformer(folder, device="cpu")
    dense = encode(library)
    pruner = prune(library, tmp_path / "object")
    weights = pruner.model.state_dict()
    assert id(pruner.model) == id(library[0].model)
    expected = prune(folder, tmp_path / "folder")
    assert pruner.report is not None
    assert expected.report is not None
    assert pruner.report.knowledge == expected.report.knowledge
    for name, tensor in expected.model.state_dict().items():
        assert torch.equal(weights[name], tensor), name
    embeddings = encode(library)
    assert not torch.allclose(embeddings, dense)
    torch.testing.assert_close(encode(tmp_path / "object"), embeddings)
    ours, theirs = files(tmp_path / "object"), files(tmp_path / "folder")
    assert ours.keys() == theirs.keys()
    assert ours["2_Dense/model.safetensors"] == theirs["2_Dense/model.safetensors"]
    card = (tmp_path / "object" / "README.md").read_text()
    assert "license: mit" in card
    assert "A card." in card
    assert "SentenceTransformer(path)" in card


def test_a_cross_encoder_is_pruned_in_place(transformer: str, tmp_path: Path) -> None:
    CrossEncoder(transformer, num_labels=1, device="cpu", max_length=15).save_pretrained(str(tmp_path / "a"))
    library = CrossEncoder(str(tmp_path / "a"), device="cpu")
    rows = list(zip(texts(30, 0), texts(30, 1), strict=True))
    pruner = KPrunePruner(library, KPruneArguments(sparsity=0.5, method="magnitude", disable_tqdm=True), rows)
    assert pruner.prune().knowledge == "regression"
    pruner.save_model(str(tmp_path / "b"))
    scores = CrossEncoder(str(tmp_path / "b"), device="cpu").predict(rows, show_progress_bar=False)
    torch.testing.assert_close(
        torch.tensor(scores), torch.tensor(library.predict(rows, show_progress_bar=False))
    )


def test_a_module_of_the_library_is_refused_with_the_way_out(transformer: str, tmp_path: Path) -> None:
    folder = build(transformer, tmp_path / "dense", CHAIN["mean"]())
    with pytest.raises(ArgumentError, match="of sentence-transformers, expected a SentenceTransformer"):
        KPrunePruner(SentenceTransformer(folder, device="cpu")[0])


@pytest.mark.slow
def test_sts_b_by_the_evaluator_of_the_library(pack: Path, tmp_path: Path) -> None:
    """Half of the FLOPs of all-MiniLM are removed, of the object; the library itself judges it and what is saved."""
    from datasets import load_dataset
    from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator

    first = Transformer(str(pack / "models" / "all-MiniLM-L6-v2"), max_seq_length=128)
    library = SentenceTransformer(modules=[first, Pooling(384, "mean"), Normalize()], device="cpu")
    train, test = (
        load_dataset("parquet", data_files=str(pack / "data" / "stsb" / f"{name}.parquet"))["train"]
        for name in ("train", "test")
    )
    test = test.select(range(400))
    sides = list(test["sentence1"]), list(test["sentence2"]), [label / 5 for label in test["label"]]
    judge = EmbeddingSimilarityEvaluator(*sides)
    args = KPruneArguments(sparsity=0.5, num_tokens=4_000, disable_tqdm=True)
    dense = judge(library)["spearman_cosine"]
    pruner = KPrunePruner(library, args, list(train["sentence1"]))
    pruner.prune()
    pruner.save_model(str(tmp_path / "pruned"))
    pruned = judge(library)["spearman_cosine"]
    assert pruned > dense - 0.03
    saved = judge(SentenceTransformer(str(tmp_path / "pruned"), device="cpu"))["spearman_cosine"]
    assert saved == pytest.approx(pruned, abs=1e-4)


def test_a_name_on_the_hub_is_a_folder_in_the_cache(
    transformer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = build(transformer, tmp_path / "dense", CHAIN["mean, dense 16 to 5, normalised"]())
    revision = "0123456789" * 4
    repository = tmp_path / "cache" / "models--me--embedder"
    shutil.copytree(folder, repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    pruner = prune("me/embedder", tmp_path / "pruned")
    torch.testing.assert_close(
        encode(tmp_path / "pruned"), in_place(folder, pruner.model), rtol=1e-5, atol=1e-6
    )
    assert "base_model: me/embedder" in (tmp_path / "pruned" / "README.md").read_text()


ELSEWHERE = """
import sys, warnings
warnings.simplefilter("ignore")
from sentence_transformers import SentenceTransformer
import torch
model = SentenceTransformer(sys.argv[1], device="cpu", trust_remote_code=True)
torch.save(torch.from_numpy(model.encode(["w1 w2", "w3"])), sys.argv[2])
assert "hf_kprune" not in sys.modules
"""


@pytest.mark.slow
def test_a_pruned_folder_loads_where_hf_kprune_is_not_imported(transformer: str, tmp_path: Path) -> None:
    folder = build(transformer, tmp_path / "dense", CHAIN["cls, normalised"]())
    prune(folder, tmp_path / "pruned")
    subprocess.run([sys.executable, "-c", ELSEWHERE, tmp_path / "pruned", tmp_path / "it.pt"], check=True)
    expected = SentenceTransformer(str(tmp_path / "pruned"), device="cpu").encode(["w1 w2", "w3"])
    torch.testing.assert_close(torch.load(tmp_path / "it.pt"), torch.from_numpy(expected))


@pytest.mark.slow
def test_all_minilm_as_a_folder_of_the_library(pack: Path, tmp_path: Path) -> None:
    """Pooled by cls and normalised, which is not how it was trained: what `encode` gives is what decides."""
    from datasets import load_dataset

    first = Transformer(str(pack / "models" / "all-MiniLM-L6-v2"), max_seq_length=128)
    for mode, method in (("mean", "kprune"), ("cls", "surgeon")):
        folder = str(tmp_path / mode)
        SentenceTransformer(modules=[first, Pooling(384, mode), Normalize()], device="cpu").save_pretrained(
            folder
        )
        data = load_dataset("parquet", data_files=str(pack / "data" / "stsb" / "train.parquet"))["train"]
        args = KPruneArguments(sparsity=0.4, num_tokens=2_000, method=method, disable_tqdm=True)
        pruner = KPrunePruner(folder, args, list(data["sentence1"][:400]))
        pruner.prune()
        pruner.save_model(str(tmp_path / f"{mode}-pruned"))
        sentences = list(data["sentence2"][:64])
        dense = SentenceTransformer(folder, device="cpu").encode(sentences)
        pruned = SentenceTransformer(str(tmp_path / f"{mode}-pruned"), device="cpu").encode(sentences)
        library = SentenceTransformer(folder, device="cpu")
        library[0].model = pruner.model.eval()
        torch.testing.assert_close(
            torch.tensor(pruned), torch.tensor(library.encode(sentences)), rtol=1e-4, atol=1e-5
        )
        assert float((dense * pruned).sum(1).mean()) > 0.9
