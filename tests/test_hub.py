"""What goes to the Hub, seen by a fake one on this machine, and the model card."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from checks import assert_same, files, report
from data import collate, rows, tokenizer
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError
from models import pruned_layer, shallow
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_kprune import ArgumentError, KPruneArguments, KPrunePruner
from hf_kprune.checkpoint.card import model_card
from hf_kprune.modeling_kprune import HOW_TO_LOAD, NOTICE


MODEL_FILES = {"README.md", "config.json", "model.safetensors", "modeling_kprune.py"}
ALL_FILES = MODEL_FILES | {
    "kprune_report.json",
    "kprune_report.md",
    "tokenizer.json",
    "tokenizer_config.json",
}


class FakeHub:
    """A Hub of this machine: takes what `huggingface_hub` sends it over HTTP, and keeps it."""

    def __init__(self) -> None:
        self.commits: list[dict[str, Any]] = []
        self.repositories: list[dict[str, Any]] = []
        self.branches: list[str] = []
        self.closed = False
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def reply(self, status: int, content: Any, **headers: str) -> None:
                body = json.dumps(content).encode()
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def do_HEAD(self) -> None:  # noqa: N802  # nothing is there to be read
                self.reply(404, {}, X_Error_Code="EntryNotFound")

            do_GET = do_HEAD  # noqa: N815

            def do_POST(self) -> None:  # noqa: N802
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if hub.closed:
                    self.reply(403, {"error": "the Hub is closed today"})
                else:
                    self.reply(200, hub.answer(self.path, self.headers.get("Authorization"), body))

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, path: str, authorization: str | None, body: bytes) -> dict[str, Any]:
        address = path.partition("?")[0]
        lines = [json.loads(line) for line in body.splitlines()] if body else []
        if address == "/api/repos/create":
            (asked,) = lines
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.repositories.append(
                {"name": name, "visibility": asked.get("visibility"), "authorization": authorization}
            )
            return {"url": f"{self.url}/{name}", "name": name}
        if "/preupload/" in address:
            return {
                "files": [
                    {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for f in lines[0]["files"]
                ]
            }
        if "/branch/" in address:
            self.branches.append(address.removeprefix("/api/models/"))
        if "/commit/" in address:
            repository, revision = address.removeprefix("/api/models/").split("/commit/")
            added = [line["value"] for line in lines if line["key"] == "file"]
            self.commits.append(
                {
                    "repository": repository,
                    "revision": revision,
                    "authorization": authorization,
                    "message": lines[0]["value"]["summary"],
                    "files": {file["path"]: base64.b64decode(file["content"]) for file in added},
                }
            )
            url = f"{self.url}/{repository}"
            return {
                "success": True,
                "commitUrl": f"{url}/commit/{'0' * 40}",
                "commitOid": "0" * 40,
                "pullRequestUrl": f"{url}/discussions/1",
            }
        return {"errors": [], "warnings": []}

    def download(self, folder: Path) -> Path:
        """What someone gets who asks for the one commit."""
        (commit,) = self.commits
        folder.mkdir()
        for name, content in commit["files"].items():
            (folder / name).write_bytes(content)
        return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    fake = FakeHub()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", fake.url)
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
        fake.url + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr("transformers.utils.hub._hf_api", HfApi(endpoint=fake.url))
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    yield fake
    fake.server.shutdown()
    fake.server.server_close()


def make_pruner(output_dir: Path, **options: Any) -> KPrunePruner:
    arguments = KPruneArguments(output_dir=str(output_dir), disable_tqdm=True, **options)
    pruner = KPrunePruner(pruned_layer(), arguments, processing_class=tokenizer())
    pruner.report = report()
    return pruner


def test_push_to_hub_saves_and_pushes_the_whole_checkpoint(tmp_path: Path, hub: FakeHub) -> None:
    pruner = make_pruner(tmp_path / "small")
    pruner.push_to_hub(commit_message="smaller")
    (commit,) = hub.commits
    assert (commit["repository"], commit["message"]) == ("me/small", "smaller")
    assert commit["files"].keys() == ALL_FILES
    assert commit["files"] == files(tmp_path / "small")
    downloaded = hub.download(tmp_path / "downloaded")
    assert_same(AutoModelForSequenceClassification.from_pretrained(downloaded), pruner.model)
    assert AutoTokenizer.from_pretrained(downloaded)("w7")["input_ids"] == tokenizer()("w7")["input_ids"]
    pruner.push_to_hub()  # saved already: pushed again, not refused
    assert hub.commits[1]["files"] == commit["files"]


def test_save_model_pushes_once_if_asked(tmp_path: Path, hub: FakeHub) -> None:
    make_pruner(tmp_path / "quiet").save_model()
    assert not hub.commits
    options = {
        "hub_model_id": "team/small",
        "hub_token": "hf_secret",
        "hub_private_repo": True,
        "hub_revision": "pruned",
    }
    make_pruner(tmp_path / "out", push_to_hub=True, **options).save_model()
    (repository,), (branch,), (commit,) = hub.repositories, hub.branches, hub.commits
    assert repository == {"name": "team/small", "visibility": "private", "authorization": "Bearer hf_secret"}
    assert branch == "team/small/branch/pruned"
    assert (commit["repository"], commit["revision"]) == ("team/small", "pruned")
    assert commit["authorization"] == "Bearer hf_secret"
    assert commit["files"] == files(tmp_path / "out")
    assert not any(b"hf_secret" in content for content in commit["files"].values())


def test_push_to_hub_takes_another_token_and_options_of_upload_folder(tmp_path: Path, hub: FakeHub) -> None:
    pruner = make_pruner(tmp_path / "out", hub_token="hf_one", push_to_hub=True)
    pruner.push_to_hub(token="hf_two", path_in_repo="inner")
    (commit,) = hub.commits
    assert commit["authorization"] == "Bearer hf_two"
    assert commit["files"].keys() == {f"inner/{name}" for name in ALL_FILES}
    assert pruner.args.push_to_hub


def test_push_to_hub_after_pruning_again_pushes_the_model_as_it_is_now(tmp_path: Path, hub: FakeHub) -> None:
    options: dict[str, Any] = {
        "overwrite_output_dir": True,
        "num_tokens": 200,
        "sparsity": 0.6,
        "disable_tqdm": True,
    }
    pruner = KPrunePruner(
        shallow(), KPruneArguments(output_dir=str(tmp_path / "out"), **options), rows(), data_collator=collate
    )
    pruner.save_model()
    pruner.prune()
    pruner.push_to_hub()
    assert_same(
        AutoModelForSequenceClassification.from_pretrained(hub.download(tmp_path / "downloaded")),
        pruner.model,
    )


def test_a_failed_push_leaves_the_checkpoint(tmp_path: Path, hub: FakeHub) -> None:
    pruner = make_pruner(tmp_path / "out", push_to_hub=True)
    hub.closed = True
    with pytest.raises(HfHubHTTPError, match="closed today"):
        pruner.save_model()
    assert files(tmp_path / "out").keys() == ALL_FILES
    hub.closed = False
    pruner.push_to_hub()
    assert hub.commits[0]["files"] == files(tmp_path / "out")


@pytest.mark.parametrize("way", ["push_to_hub", "save_pretrained"])
def test_the_model_itself_pushes_all_that_loading_needs(tmp_path: Path, hub: FakeHub, way: str) -> None:
    model = pruned_layer()
    if way == "push_to_hub":
        model.push_to_hub("me/small")
    else:
        model.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="me/small")
    (commit,) = hub.commits
    assert commit["repository"] == "me/small"
    assert commit["files"].keys() == MODEL_FILES
    assert json.loads(commit["files"]["config.json"])["transformers_weights"] == NOTICE
    assert_same(
        AutoModelForSequenceClassification.from_pretrained(hub.download(tmp_path / "downloaded")), model
    )


def test_the_config_alone_is_pushed_with_its_notice(hub: FakeHub) -> None:
    pruned_layer().config.push_to_hub("me/small")
    (commit,) = hub.commits
    assert commit["files"].keys() == {"README.md", "config.json", "modeling_kprune.py"}
    assert json.loads(commit["files"]["config.json"])["transformers_weights"] == NOTICE


def test_a_dense_model_pushes_what_it_always_did(hub: FakeHub) -> None:
    shallow().push_to_hub("me/dense")
    (commit,) = hub.commits
    assert commit["files"].keys() == MODEL_FILES - {"modeling_kprune.py"}
    assert "transformers_weights" not in json.loads(commit["files"]["config.json"])


def test_model_card(tmp_path: Path) -> None:
    model = pruned_layer()
    card = ModelCard(
        model_card(
            model,
            report(),
            language="en",
            license="mit",
            tags=["mine"],
            model_name="Small",
            finetuned_from="team/large",
            tasks="text-classification",
            dataset=["sst2"],
        )
    )
    expected = {
        "language": "en",
        "license": "mit",
        "library_name": "transformers",
        "tags": ["hf_kprune", "pruned", "mine"],
        "base_model": "team/large",
        "base_model_relation": "finetune",
        "pipeline_tag": "text-classification",
        "datasets": ["sst2"],
    }
    assert card.data.to_dict() == expected
    assert "# Small" in card.text
    assert HOW_TO_LOAD[1:] in card.text
    assert report().to_markdown() in card.text
    # the code it shows loads the model
    model.save_pretrained(tmp_path)
    code = card.text.split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {"path": str(tmp_path)}
    exec(code, names)
    assert_same(names["model"], model)


def test_model_card_of_a_model_from_a_folder_and_of_a_dense_one(tmp_path: Path) -> None:
    pruned_layer().save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert (
        "base_model" not in ModelCard(model_card(loaded, None)).data.to_dict()
    )  # a path of this machine is nobody's model
    dense = model_card(shallow(), None)
    assert HOW_TO_LOAD[1:] not in dense
    assert "How it was pruned" not in dense


def test_create_model_card(tmp_path: Path) -> None:
    pruner = make_pruner(tmp_path)
    pruner.create_model_card(license="mit")
    assert ModelCard.load(tmp_path / "README.md").data.license == "mit"
    pruner.args.output_dir = None
    with pytest.raises(ArgumentError, match="no output_dir"):
        pruner.create_model_card()
