"""The benchmarks of language models count and draw what they say."""

from __future__ import annotations

import math
import sys

import pytest
from data import ROOT, text, word_tokenizer
from models import tiny


sys.path.insert(0, str(ROOT / "benchmarks"))
from continuations import draw_prompts, repetition
from perplexity import draw_blocks, first_tokens, perplexity


WORDS = [f"w{4 + 7 * number % 50} " for number in range(2000)]


def test_perplexity_is_of_every_token_but_the_first_of_whole_windows() -> None:
    model = tiny("roberta", "CAUSAL_LM", vocab_size=60)
    ids = first_tokens(WORDS, word_tokenizer(), 24)
    losses = []
    for start in (0, 10):  # the last 4 make no window
        logits = model(ids[None, start : start + 10]).logits[0]
        losses += [-logits[place].log_softmax(-1)[ids[start + place + 1]].item() for place in range(10)]
    assert perplexity(model, ids, 10) == pytest.approx(math.exp(sum(losses) / 20))


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
