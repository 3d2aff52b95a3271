"""Models with code of their own: it travels with the checkpoint and loads it, or the model is refused before it is pruned."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checks import files
from data import collate, rows
from models import CONFIGS, pruned, tiny
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    MllamaForCausalLM,
    PreTrainedModel,
)
from transformers.models.mllama.configuration_mllama import MllamaTextConfig

from hf_kprune import ArgumentError, CheckpointError, KPruneArguments, KPrunePruner
from hf_kprune.checkpoint.remote_code import dense_auto_map


TESTS = Path(__file__).parent
POOLING = """
def mean(hidden, mask):
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1)
"""
MODEL = """
from torch import nn
from transformers import BertModel, BertPreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput
{imports}
from .pooling import mean


class {name}(BertPreTrainedModel):
    {config}

    def __init__(self, config):
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.scale = nn.Parameter(nn.init.constant_(__import__("torch").empty(1), 3.0))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        hidden = self.bert(input_ids, attention_mask=attention_mask, **kwargs)[0]
        return SequenceClassifierOutput(logits=self.classifier(self.scale * mean(hidden, attention_mask)))
"""
CONFIG = """
from transformers import BertConfig


class OwnConfig(BertConfig):
    model_type = "own_bert"
"""
KINDS = {
    "a known model_type": ("modeling_pool", "PoolBertForSequenceClassification", False),
    "the name of a stock class": ("modeling_same", "BertForSequenceClassification", False),
    "its own model_type": ("modeling_own", "OwnForSequenceClassification", True),
}
WAYS = ("with", "without")
"""What a fresh process has of hf_kprune."""
AUTO = "AutoModelForSequenceClassification"
OPTIONS: dict[str, Any] = {"sparsity": 0.5, "num_tokens": 200, "disable_tqdm": True, "method": "magnitude"}


def write_repository(folder: Path, module: str, name: str, own_config: bool) -> Path:
    """A repository as one would publish it: weights, a config that names the code, and the code."""
    folder.mkdir()
    imports = "from .configuration_own import OwnConfig" if own_config else ""
    config_class = "config_class = OwnConfig" if own_config else ""
    (folder / "pooling.py").write_text(POOLING)
    (folder / f"{module}.py").write_text(MODEL.format(imports=imports, name=name, config=config_class))
    (folder / "configuration_own.py").write_text(CONFIG)
    auto_map = {
        AUTO: f"{module}.{name}",
        **({"AutoConfig": "configuration_own.OwnConfig"} if own_config else {}),
    }
    config = {
        **BertConfig(**{**CONFIGS["bert"], "num_hidden_layers": 2}).to_dict(),
        "auto_map": auto_map,
        "architectures": [name],
    }
    config["model_type"] = "own_bert" if own_config else "bert"
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(
        AutoConfig.from_pretrained(folder, trust_remote_code=True), trust_remote_code=True
    )
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


def distance(student: Any, teacher: Any, valid: torch.Tensor) -> torch.Tensor:
    losses: torch.Tensor = (student.logits - teacher.logits).square().sum(-1)
    return losses


@pytest.fixture(scope="module")
def saved(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[dict[str, Any]]:
    """Each kind pruned and saved, what it gives here, and what two fresh processes, with and without hf_kprune, make of it."""
    patch = pytest.MonkeyPatch()
    folder = tmp_path_factory.mktemp("code")
    patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder / "modules"))
    patch.setattr(sys, "path", [str(folder / "modules"), *sys.path])
    batch, expected = collate(rows(5)), {}
    for kind, (module, name, own_config) in KINDS.items():
        source = write_repository(folder / f"{kind}, dense", module, name, own_config)
        model = AutoModelForSequenceClassification.from_pretrained(source, trust_remote_code=True)
        assert type(model).__name__ == name
        options = {**OPTIONS, "output_dir": str(folder / kind)}
        pruner = KPrunePruner(
            model, KPruneArguments(**options), rows(), data_collator=collate, compute_loss=distance
        )
        pruner.prune()
        pruner.save_model()
        with torch.no_grad():
            expected[kind] = (name, model.eval()(**batch)[-1])
    torch.save(dict.fromkeys(KINDS, AUTO), folder / "tasks.pt")
    torch.save(batch, folder / "batch.pt")
    environment = {
        **os.environ,
        "HF_HOME": str(folder / "home"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    environment["PYTHONPATH"] = str(TESTS.parent)
    results = {}
    wanted = {item.callspec.params.get("way") for item in request.session.items if hasattr(item, "callspec")}
    for way in (way for way in WAYS if way in wanted):
        command = [sys.executable, str(TESTS / "remote_code_elsewhere.py"), str(folder), way]
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stderr[-4000:]
        results[way] = torch.load(folder / f"{way}.pt")
    yield {"folder": folder, "expected": expected, "results": results}
    for module in [module for module in sys.modules if module.startswith("transformers_modules")]:
        patch.delitem(sys.modules, module)
    patch.undo()


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_code_travels_and_loads_the_checkpoint(saved: dict[str, Any], kind: str, way: str) -> None:
    name, logits = saved["expected"][kind]
    for again in ("trusted", "again"):
        facts = saved["results"][way][kind][again]
        assert not isinstance(facts, str), facts
        assert facts[0] == name
        torch.testing.assert_close(facts[1], logits, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_without_trust_it_is_refused_and_not_computed_otherwise(
    saved: dict[str, Any], kind: str, way: str
) -> None:
    facts = saved["results"][way][kind]["untrusted"]
    assert isinstance(facts, str), facts
    assert "trust_remote_code" in facts


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_checkpoint_is_loaded_here_by_its_code(saved: dict[str, Any], kind: str) -> None:
    name, logits = saved["expected"][kind]
    loaded = AutoModelForSequenceClassification.from_pretrained(
        saved["folder"] / kind, trust_remote_code=True
    )
    assert type(loaded).__name__ == name
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(**collate(rows(5)))[-1], logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_metadata_of_the_repository_are_kept(saved: dict[str, Any], kind: str) -> None:
    module, name, own_config = KINDS[kind]
    config = json.loads((saved["folder"] / kind / "config.json").read_text())
    assert config["auto_map"][AUTO] == f"kprune_{module}.{name}"
    assert config["auto_map"].get("AutoConfig") == ("configuration_own.OwnConfig" if own_config else None)
    assert config["model_type"] == ("own_bert" if own_config else "bert")
    names = {"modeling_kprune.py", f"kprune_{module}.py", f"{module}.py", "pooling.py"}
    assert names | ({"configuration_own.py"} if own_config else set()) <= files(saved["folder"] / kind).keys()
    assert (
        dense_auto_map(AutoConfig.from_pretrained(saved["folder"] / kind, trust_remote_code=True))[AUTO]
        == f"{module}.{name}"
    )


@pytest.mark.slow
def test_a_class_that_no_auto_class_has(tmp_path: Path) -> None:
    settings = {**CONFIGS["bert"], "num_key_value_heads": 4, "cross_attention_layers": [], "rope_theta": 1e4}
    config = MllamaTextConfig(**{k: v for k, v in settings.items() if "dropout" not in k})
    torch.manual_seed(0)
    model = MllamaForCausalLM(config)
    options = {**OPTIONS, "output_dir": str(tmp_path / "out")}
    pruner = KPrunePruner(model, KPruneArguments(**options), rows(), data_collator=collate)
    pruner.prune()
    pruner.save_model()
    auto_map = json.loads((tmp_path / "out" / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModelForCausalLM"] == "modeling_kprune.MllamaForCausalLM"
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert type(loaded).__name__ == "MllamaForCausalLM"
    torch.testing.assert_close(loaded.state_dict(), model.state_dict())


def test_a_class_of_a_script_is_saved_for_that_class_with_a_word_before_it_is_pruned(tmp_path: Path) -> None:
    class MyBert(transformers.BertForSequenceClassification):
        pass

    pruner = KPrunePruner(
        MyBert(BertConfig(**CONFIGS["bert"])),
        KPruneArguments(**{**OPTIONS, "output_dir": str(tmp_path / "out")}),
        rows(),
        data_collator=collate,
    )
    with pytest.warns(
        UserWarning, match="MyBert.register_for_auto_class..AutoModelForSequenceClassification.. first"
    ):
        pruner.prune()
    with pytest.warns(UserWarning, match="MyBert is a class of .*test_remote_code, not of transformers"):
        pruner.save_model()
    batch = collate(rows()[:4])
    reloaded = MyBert.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(reloaded(**batch).logits, pruner.model.eval()(**batch).logits)


@pytest.mark.parametrize("lost", ["modeling_kprune.py", "the entry", "another class"])
def test_a_way_in_that_is_broken_is_found_before_the_checkpoint_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    def spoil(_: Any, directory: str) -> None:
        config = json.loads(Path(directory, "config.json").read_text())
        if lost == "modeling_kprune.py":
            Path(directory, lost).unlink()
        elif lost == "the entry":
            del config["auto_map"][AUTO]
        else:
            config["auto_map"][AUTO] = "modeling_kprune.BertForTokenClassification"
        Path(directory, "config.json").write_text(json.dumps(config))

    monkeypatch.setattr("hf_kprune.publication.write_beside", spoil)
    with pytest.raises(CheckpointError, match="does not load as BertForSequenceClassification"):
        KPrunePruner(pruned(), KPruneArguments(output_dir=str(tmp_path / "out"))).save_model()
    assert os.listdir(tmp_path) == []


def test_entries_of_others_stay(tmp_path: Path) -> None:
    model: PreTrainedModel = pruned()
    model.config.auto_map = {
        "AutoTokenizer": ["tokenization_own.OwnTokenizer", None],
        "AutoProcessor": "processing_own.Own",
    }
    model.save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map["AutoTokenizer"] == ["tokenization_own.OwnTokenizer", None]
    assert auto_map["AutoProcessor"] == "processing_own.Own"
    assert auto_map["AutoModel"] == "modeling_kprune.BertModel"
    assert AutoModel.from_pretrained(tmp_path).config.auto_map == model.config.auto_map
    assert not hasattr(tiny().config, "auto_map")


def test_code_is_not_run_by_a_name_alone(saved: dict[str, Any]) -> None:
    """Nor is the stock class of that model_type taken in its place."""
    for kind in ("a known model_type", "the name of a stock class"):
        with pytest.raises(ArgumentError, match="brings model code of its own.* trust_remote_code=True"):
            KPrunePruner(str(saved["folder"] / f"{kind}, dense"))
