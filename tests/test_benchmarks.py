"""The benchmarks of language models count and draw what they say."""

from __future__ import annotations

import math
import subprocess
import sys
from importlib.util import find_spec

import pandas as pd
import pytest
import torch
from checks import close
from data import ROOT, text, word_tokenizer
from models import cut_randomly, tiny
from zoo import make

from hf_kprune.structure.sublayers import find_sublayers


sys.path.insert(0, str(ROOT / "benchmarks"))
import captions
from continuations import draw_prompts, repetition
from mixture import train
from mutants import MUTANTS
from perplexity import draw_blocks, first_tokens, perplexity
from zero_shot import Question, accuracy, log_likelihoods, of_paragraphs


OF_EXTRAS = {"int8": "nncf", "peers": "torch_pruning"}
"""Benchmarks that compare with a package which is in no extra."""

WORDS = [f"w{4 + 7 * number % 50} " for number in range(2000)]


@pytest.mark.slow
def test_every_benchmark_finds_what_it_imports() -> None:
    """In a process of its own, as some of them register methods."""
    names = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py"))
    names = [name for name in names if name not in OF_EXTRAS or find_spec(OF_EXTRAS[name])]
    assert len(names) > len(OF_EXTRAS)
    program = f"import {', '.join(names)}"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT / "benchmarks", check=True)


def test_perplexity_is_of_every_token_but_the_first_of_whole_windows() -> None:
    model = tiny("roberta", "CAUSAL_LM", vocab_size=60)
    ids = first_tokens(WORDS, word_tokenizer(), 24)
    losses = []
    for start in (0, 10):  # the last 4 make no window
        logits = model(ids[None, start : start + 10]).logits[0]
        losses += [-logits[place].log_softmax(-1)[ids[start + place + 1]].item() for place in range(10)]
    assert perplexity(model, ids, 10) == pytest.approx(math.exp(sum(losses) / 20))


def test_a_mixture_learns_what_it_is_trained_on() -> None:
    model, ids = make("mixtral"), torch.arange(4, 12).repeat(20)
    before = perplexity(model, ids, 16)
    train(model, ids, steps=15, window=16, batch=1)
    assert perplexity(model, ids, 16) < before / 2


@pytest.mark.slow
def test_pictures_are_drawn_by_the_seed_as_their_captions_say_and_are_learnt() -> None:
    pictures, texts = captions.draw_pictures(200, seed=1)
    again, others = (captions.draw_pictures(200, seed=seed) for seed in (1, 2))
    assert torch.equal(pictures, again[0])
    assert torch.equal(texts, again[1])
    assert not torch.equal(texts, others[1])
    for picture, ids in zip(pictures, texts.tolist(), strict=True):
        words = [captions.WORDS[word] for word in ids]
        half = picture[:, :, :16] if "left" in words else picture[:, :16]
        colour = torch.tensor(captions.COLOURS[words[2]]).bool()  # of the shape that is named first
        bright = (half > 0.75).flatten(1).sum(1)
        assert bright[colour].min() > 2 * bright[~colour].max()
    torch.manual_seed(0)
    model = captions.make_model().eval()
    before = captions.figures_of(model, pictures, texts)["perplexity"]
    captions.train(model, steps=15, batch=16, seed=100)
    assert captions.figures_of(model, pictures, texts)["perplexity"] < before / 2


@pytest.mark.parametrize("count", [7, 1000, 5000])
def test_the_first_tokens_are_those_of_the_joined_texts(count: int) -> None:
    joined = word_tokenizer()("".join(WORDS))["input_ids"]
    assert first_tokens(WORDS, word_tokenizer(), count).tolist() == joined[:count]


def test_blocks_are_drawn_by_the_seed_from_places_that_do_not_overlap() -> None:
    numbered, tokenizer = "".join(f"w{4 + number} " for number in range(50)), word_tokenizer()
    blocks = draw_blocks([numbered * 40], tokenizer, 20, 12, seed=3)
    assert blocks == draw_blocks([numbered * 40], tokenizer, 20, 12, seed=3)
    assert blocks != draw_blocks([numbered * 40], tokenizer, 20, 12, seed=4)
    for block in blocks:
        assert len(block["input_ids"]) == 12
        assert text(block) in numbered * 2
    with pytest.raises(ValueError, match="larger than population"):
        draw_blocks([numbered * 40], tokenizer, 2000, 12, seed=3)


def test_repetition_is_the_share_of_n_grams_that_occurred_before() -> None:
    assert repetition([5, 6, 7, 8, 9, 10]) == 0
    assert repetition([5] * 6) == pytest.approx(2 / 3)  # 5555 three times
    assert repetition([5, 6, 5, 6, 5, 6, 5], length=2) == pytest.approx(4 / 6)
    assert repetition([5, 6, 7]) == 0


def test_prompts_begin_long_paragraphs_without_unknown_words() -> None:
    texts = [" = w5 = \n", "w6 " * 30, "w7 <unk> " * 30, "w8 " * 30, "w9 " * 7]
    prompts = draw_prompts(texts, word_tokenizer(), 2, 4, seed=0)
    assert sorted(prompts) == [[6] * 4, [8] * 4]


@pytest.mark.parametrize("kept", [(4, 12), (0, 5)])
def test_the_likelihood_of_an_option_is_that_of_its_tokens_after_the_prompt(kept: tuple[int, ...]) -> None:
    model = make("llama")
    model = cut_randomly(model, (*kept, *(s.num_units for s in find_sublayers(model)[2:])))
    prompt, options = [5, 6, 7], [[8, 9], [10], [11, 12, 13]]
    values = log_likelihoods(model, prompt, options)
    for value, option in zip(values, options, strict=True):
        chances = model(torch.tensor([prompt + option])).logits[0, 2:-1].log_softmax(-1)
        close(value, chances.gather(1, torch.tensor(option).unsqueeze(1)).sum().detach())


def test_the_likeliest_option_is_compared_with_the_right_one() -> None:
    model, words = make("llama"), word_tokenizer()
    logits = model(torch.tensor([[5, 6, 7]])).logits[0, -1, 10:]
    options = [f" w{10 + int(logits.argmin())}", f" w{10 + int(logits.argmax())}"]
    questions = [Question("w5 w6 w7", options, right) for right in (1, 1, 0, 1)]
    assert accuracy(model, words, questions) == 0.75


def test_options_are_answers_to_questions_about_one_paragraph_and_no_parts_of_each_other() -> None:
    answers = ["Rome", "Rome in May", "Paris", "Oslo", "Bern"]
    rows = pd.DataFrame(
        {
            "context": ["first"] * 5 + ["second"] * 2,
            "question": [f"q{place} " for place in range(7)],
            "answers": [{"text": [text]} for text in [*answers, "Bonn", "Wien"]],
        }
    )
    (question,) = of_paragraphs(rows, 9, seed=1)  # the second paragraph has two answers
    assert question.prompt[:15] == "first\nQuestion:"
    asked = int(question.prompt.split("q")[-1][0])
    assert question.options[question.right] == f" {answers[asked]}"
    assert len({*question.options}) == 4
    assert not {" Rome", " Rome in May"} <= {*question.options}


def test_every_mutant_changes_one_place_of_the_package() -> None:
    sources = [path.read_text() for path in (ROOT / "hf_kprune").rglob("*.py")]
    for text_before, text_after, _ in MUTANTS:
        assert sum(source.count(text_before) for source in sources) == 1, text_before
        assert text_after != text_before
