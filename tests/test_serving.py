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
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from data import PLAIN, ROOT, word_tokenizer
from forks import free_port
from models import cut_randomly, pruned
from transformers import AutoConfig, AutoModelForCausalLM, pipeline
from zoo import ZOO, make


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


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
@torch.no_grad()
def test_vllm_gives_the_same_greedy_tokens(tmp_path: Path, model_type: str) -> None:
    """In a process of its own, which vLLM changes a lot of."""
    if find_spec("vllm") is None:
        pytest.skip("vllm is not installed")
    sizes = {
        "head_dim": 32,
        "hidden_size": 64,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    }  # of its kernels
    config = AutoConfig.for_model(model_type, **{**ZOO[model_type][1], **sizes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter += 0.2 * torch.randn_like(parameter)
    kept = (1, 9, 2, 5, 4, 1)
    model = cut_randomly(model, kept)
    model.save_pretrained(tmp_path / "pruned")
    prompt, count = [7, 11, 13, 17], 12
    wanted = model.generate(
        torch.tensor([prompt]), max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    script = f"""
import json
from hf_kprune.runtimes.vllm import register
register()
from vllm import LLM, SamplingParams
server = LLM("pruned", enforce_eager=True, dtype="float32", skip_tokenizer_init=True, max_model_len=32)
sampling = SamplingParams(temperature=0, max_tokens={count}, ignore_eos=True, detokenize=False)
answers = server.generate([dict(prompt_token_ids={prompt})], sampling)
print("tokens", json.dumps(list(answers[0].outputs[0].token_ids)))
"""
    settings = {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
    }
    run = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
    )
    lines = [line for line in run.stdout.splitlines() if line.startswith("tokens ")]
    assert lines, run.stderr[-3000:]
    assert json.loads(lines[-1].removeprefix("tokens ")) == wanted[0, len(prompt) :].tolist()
