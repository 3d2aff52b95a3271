"""generate() of a cut model == generate() of the masked dense one, token for token, in every way of generating."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import transformers
from checks import by_column, masked, plans
from models import cut_all, slow_unless_in
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from zoo import DISTINCT, ZOO, inputs_for, make

from hf_kprune.sizes import cache_bytes_per_token
from hf_kprune.structure.reach import parts_left_alone
from hf_kprune.structure.sublayers import find_sublayers


Record = Callable[[str, object], None]
DECODERS = [
    n
    for n, (c, _, kind) in ZOO.items()
    if kind in ("text", "unpadded") and ("CausalLM" in c or "LMHead" in c)
]
SEQ2SEQ = [n for n, (c, _, kind) in ZOO.items() if kind == "seq2seq" and "ForConditionalGeneration" in c]
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "without cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "static cache, prompt in chunks": {"cache_implementation": "static", "prefill_chunk_size": 4},
    "sampling": {"do_sample": True, "top_k": 20},
    "beams": {"num_beams": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
}
GENERATING = ["opt", "gpt2", "bloom", "falcon", "llama", "gemma2", "t5", "bart"]
"""By default: caches and positions of each kind."""
CUTS = ("odd", "without 0", "without 1")
OWN_CACHE = ("bamba", "minimax", "openai-gpt", "recurrent_gemma")
"""Their caches are none of Transformers' general ones, or they have none; the dense Bamba computes otherwise with a cache than without."""
ONE_BY_ONE = ("jamba",)
"""Transformers' Mamba goes on with one token at a time, from a cache."""


def columns(model: PreTrainedModel, plan: str) -> tuple[list[Tensor], list[Tensor]]:
    """Keep-masks of units, and of the columns of the output projections."""
    sublayers = find_sublayers(model)
    masks = plans(sublayers)[plan]
    return masks, by_column(sublayers, masks)


def prompt(model: PreTrainedModel, kind: str) -> dict[str, Tensor]:
    """Left-padded prompts of different lengths."""
    inputs = inputs_for(model, "text" if kind == "unpadded" else kind)
    if kind == "seq2seq":
        return {key: value for key, value in inputs.items() if not key.startswith("decoder")}
    inputs = {key: value.flip(1) for key, value in inputs.items()}
    return inputs if kind == "text" else {"input_ids": inputs["input_ids"][:, -6:]}


def generate(model: PreTrainedModel, kind: str, **options: Any) -> Tensor:
    torch.manual_seed(3)
    settings = {"max_new_tokens": 7, "min_new_tokens": 7, "do_sample": False, "pad_token_id": 1, **options}
    inputs = prompt(model, kind)
    if "prompt_lookup_num_tokens" in options:  # one sequence at a time
        inputs = {key: value[:1] for key, value in inputs.items()}
    tokens: Tensor = model.generate(**inputs, **settings)
    return tokens


def check(name: str, ways: Sequence[str]) -> None:
    """Each cut, in one of the ways."""
    model, kind = make(name), ZOO[name][2]
    for plan, way in zip(CUTS, itertools.cycle(ways), strict=False):
        masks, wide = columns(model, plan)
        student = cut_all(model, masks)
        with masked(find_sublayers(model), wide):
            expected = generate(model, kind, **WAYS[way])
        assert torch.equal(generate(student, kind, **WAYS[way]), expected), f"{plan}, {way}"


@pytest.mark.parametrize("name", slow_unless_in(GENERATING, [*DECODERS, *SEQ2SEQ]))
def test_generates_the_same_tokens(name: str, record_property: Record) -> None:
    record_property("family", (name, "generate"))
    check(name, ("beams", "greedy"))


@pytest.mark.parametrize("way", [way for way in WAYS if way not in ("greedy", "beams")])
@pytest.mark.parametrize(
    "name",
    slow_unless_in(("llama", "t5"), ("opt", "gpt2", "llama", "gpt_neox", "gemma2", "mistral", "t5", "bart")),
)
def test_generates_the_same_tokens_in_every_way(name: str, way: str) -> None:
    if way == "prompt lookup" and name in SEQ2SEQ:
        pytest.skip("a continuation of the prompt's own words")
    check(name, (way,))


@pytest.mark.parametrize("name", slow_unless_in(("llama",), ("llama", "mistral", "gemma2", "opt", "gpt2")))
@pytest.mark.parametrize("plan", CUTS)
def test_assisted_by_the_pruned_model_the_dense_one_says_the_same(name: str, plan: str) -> None:
    model, kind = make(name), ZOO[name][2]
    student = cut_all(model, columns(model, plan)[0])
    inputs = {key: value[:1] for key, value in prompt(model, kind).items()}
    settings: dict[str, Any] = {"max_new_tokens": 7, "do_sample": False, "pad_token_id": 1}
    expected = model.generate(**inputs, **settings)
    assert torch.equal(model.generate(**inputs, assistant_model=student, **settings), expected)
    expected = student.generate(**inputs, **settings)
    assert torch.equal(student.generate(**inputs, assistant_model=model, **settings), expected)


@pytest.mark.parametrize("name", slow_unless_in(DISTINCT, [n for n in DECODERS if n not in OWN_CACHE]))
@torch.no_grad()
def test_a_cache_goes_on_across_calls(name: str) -> None:
    """The model in several calls with one cache == in one call, though attentions at the bottom, or all, are gone."""
    model = make(name)
    ids = inputs_for(model, "unpadded")["input_ids"]
    for plan in (*CUTS, "nothing"):
        student = cut_all(model, columns(model, plan)[0])
        at_once = student(ids, use_cache=True)
        assert isinstance(at_once.past_key_values, transformers.Cache)
        cache = DynamicCache(config=student.config)
        first = student(ids[:, :4], past_key_values=cache, use_cache=True)
        assert cache.get_seq_length() == 4, plan
        parts = ids[:, 4:].split(1 if name in ONE_BY_ONE else ids.shape[1], 1)
        later = [student(part, past_key_values=first.past_key_values, use_cache=True) for part in parts]
        assert cache.get_seq_length() == ids.shape[1], plan
        logits = torch.cat([each.logits for each in (first, *later)], 1)
        torch.testing.assert_close(logits, at_once.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name", slow_unless_in(DISTINCT, [n for n in DECODERS if ":" not in n and n not in OWN_CACHE])
)
@torch.no_grad()
def test_the_cache_is_as_large_as_told(name: str) -> None:
    model = make(name)
    if parts_left_alone(model):
        pytest.skip("what attentions that stay as they are cache is not counted")
    ids = inputs_for(model, "unpadded")["input_ids"]
    if any(getattr(slot, "is_sliding", False) for slot in DynamicCache(config=model.config).layers):
        pytest.skip("a sliding window does not grow")
    for plan in ("even", "without 0"):
        student = cut_all(model, columns(model, plan)[0])
        cache = student(ids, use_cache=True).past_key_values
        assert isinstance(cache, DynamicCache)
        slots = [
            slot for slot in cache.layers if getattr(slot, "keys", None) is not None
        ]  # others are of no attention
        size = sum(t.numel() * t.element_size() for slot in slots for t in (slot.keys, slot.values))
        per_token = cache_bytes_per_token(student, find_sublayers(student))
        assert per_token * ids.numel() == size


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler's own code
@pytest.mark.parametrize(("name", "backend"), [("llama", "inductor"), ("opt", "aot_eager")])
def test_compiled_generates_the_same_tokens(name: str, backend: str) -> None:
    model, kind = make(name), ZOO[name][2]
    student = cut_all(model, columns(model, "without 0")[0])
    expected = generate(student, kind)
    student.forward = torch.compile(student.forward, backend=backend)
    assert torch.equal(generate(student, kind, cache_implementation="static"), expected)
