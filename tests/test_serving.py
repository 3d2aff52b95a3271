"""Pruned folders behind servers, asked over loopback as docs/serving.md says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from data import PLAIN, ROOT, word_tokenizer
from forks import free_port
from models import cut_randomly, pruned
from transformers import AutoModelForCausalLM, pipeline
from zoo import make


pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
PAGE = (ROOT / "docs/serving.md").read_text()


def ask(address: str, question: object = None) -> Any:
    """What a server answers to a question, or to none."""
    data = None if question is None else json.dumps(question).encode()
    request = urllib.request.Request(address, data, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=100) as answer:
        return json.loads(answer.read())


@contextmanager
def serving(command: list[str], folder: Path, ready: str) -> Iterator[None]:
    """A server that runs in a folder, until the context ends."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    with (
        open(folder / "log", "w") as log,
        subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log) as server,
    ):
        try:
            while True:
                assert server.poll() is None, (folder / "log").read_text()[-3000:]
                try:
                    ask(ready)
                    break
                except OSError:
                    time.sleep(0.2)
            yield
        finally:
            server.kill()


def test_transformers_serve_answers_as_the_pruned_model_does(tmp_path: Path) -> None:
    pytest.importorskip("openai")
    tokenizer = word_tokenizer()
    tokenizer.chat_template = PLAIN
    dense = make("llama")
    kept = (1, 9) + (2, 5) * (dense.config.num_hidden_layers - 1)
    for each in (cut_randomly(dense, kept), tokenizer):
        each.save_pretrained(tmp_path / "pruned")
    command = re.search(r'python (-c ".*?") serve', PAGE)
    assert command
    port = free_port()
    code = command[1].removeprefix('-c "').removesuffix('"')
    serve = [sys.executable, "-c", code, "serve", "pruned", "--device", "cpu", "--port", str(port)]
    chat = [{"role": "user", "content": "w5 w6 w7"}]
    with serving(serve, tmp_path, f"http://localhost:{port}/health"):
        question = {"model": "pruned", "messages": chat, "max_tokens": 6}
        answer = ask(f"http://localhost:{port}/v1/chat/completions", question)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").eval()
    ids = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    new = model.generate(**ids, max_new_tokens=6, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert answer["choices"][0]["message"]["content"] == tokenizer.decode(new, skip_special_tokens=True)


def test_fastapi_answers_as_the_pruned_pipeline_does(tmp_path: Path) -> None:
    pytest.importorskip("fastapi")
    for each in (pruned("bert"), word_tokenizer()):
        each.save_pretrained(tmp_path / "pruned")
    app = re.search(r"```python\n(from fastapi.*?)```", PAGE, re.DOTALL)
    assert app
    (tmp_path / "app.py").write_text(app[1])
    port, texts = free_port(), ["w5 w6", "w7 w8 w9"]
    command = [sys.executable, "-m", "uvicorn", "app:app", "--port", str(port)]
    with serving(command, tmp_path, f"http://localhost:{port}/openapi.json"):
        answers = ask(f"http://localhost:{port}/classify", texts)
    expected = pipeline("text-classification", model=str(tmp_path / "pruned"))(texts, batch_size=32)
    assert [each["label"] for each in answers] == [each["label"] for each in expected]
    scores = [torch.tensor([each["score"] for each in some]) for some in (answers, expected)]
    torch.testing.assert_close(*scores)
