"""Texts, pairs of texts and chats become token ids. Of a long text no more is tokenised than is kept."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from ..arguments import KPruneArguments
from ..errors import ArgumentError, CalibrationError
from .nested import Row
from .sources import text_columns


CHARACTERS = 32
"""Characters to a token after which a text is cut at first. Twice as many are tried if that changes it."""

EMPTY_ROWS = 10_000
"""Rows without tokens, one after the other, after which a stream is given up: it may be endless."""

SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
}
SPEAKERS |= {"system": "system", "tool": "tool", "observation": "tool", "function_call": "assistant"}
"""Who speaks in a chat as ShareGPT writes it, and the role that templates know."""


def settled(encode: Callable[[int | None], Row], size: int, longest: int | None) -> Row:
    """What `encode` makes of a text, from no more of it than decides that.

    A longer and longer part is encoded until twice as much of it gives the same tokens, as many as are kept.

    Args:
        encode: Makes at most `longest` tokens of so many characters of the text; None: of all.
        size: Characters of the text.
        longest: Tokens to which the text is truncated; None if it is not.
    """
    part = CHARACTERS * (longest or 0)
    if longest is None or size <= part:
        return encode(None)
    shorter = encode(part)
    while part < size:
        part *= 2
        longer = encode(part if part < size else None)
        if longer == shorter and len(longer["input_ids"]) >= longest:
            break
        shorter = longer
    return shorter


class Texts:
    """Makes token ids of texts by the tokenizer of a model.

    Args:
        processing_class: A tokenizer, or a processor that has one, or None.
        args: Options: `max_seq_length`, `packing`, `text_columns`.
        limit: Tokens that the model can take at most, or None.
        targets: Whether a pair is a source and a target, which becomes `labels`.
    """

    def __init__(self, processing_class: Any, args: KPruneArguments, limit: int | None, targets: bool):
        self.processing_class, self.args, self.limit, self.targets = processing_class, args, limit, targets
        self.longest = min((n for n in (args.max_seq_length, limit) if n is not None), default=None)

    def tokenizer(self, what: str) -> Any:
        """The tokenizer, also that of a processor for texts and more.

        Raises:
            ArgumentError: If there is none, though the dataset holds `what`.
        """
        if self.processing_class is None:
            raise ArgumentError(
                f"the calibration dataset holds {what}: pass processing_class, the model's tokenizer"
            )
        return getattr(self.processing_class, "tokenizer", self.processing_class)

    def part(self, text: Any, size: int | None) -> Any:
        """So many characters of a text, or words of a list of them, from the side that is kept; None: all."""
        if size is None or len(text) <= size:
            return text
        left = getattr(self.tokenizer("texts"), "truncation_side", "right") == "left"
        return text[-size:] if left else text[:size]

    def encode(self, *texts: Any, **options: object) -> Row:
        """Token ids of a text, or of a pair of texts."""
        tokenizer, longest = self.tokenizer("texts"), self.longest
        limits = {"truncation": longest is not None, "max_length": longest, **options}
        sizes = [len(text) for text in texts]
        return settled(
            lambda n: dict(tokenizer(*(self.part(t, n) for t in texts), **limits)), max(sizes), longest
        )

    def tokens(self, text: object) -> Row:
        """Token ids of a text or a pair of texts; the second becomes `labels` if the decoder needs them."""
        self.tokenizer("texts")
        pair = tuple(text) if isinstance(text, (tuple, list)) else (text,)
        if len(pair) not in (1, 2) or not all(isinstance(part, str) for part in pair):
            raise CalibrationError(
                f"a calibration text is {text!r:.80}, expected a string or a pair of strings"
            )
        if self.targets and len(pair) == 2:
            return {**self.encode(pair[0]), "labels": self.target(pair[1])}
        return self.encode(*pair)

    def target(self, text: str) -> list[int]:
        """Token ids of what the decoder is to give."""
        tokenizer, longest = self.tokenizer("texts"), self.longest
        limits = {"truncation": longest is not None, "max_length": longest}
        encoded = settled(
            lambda n: dict(tokenizer(text_target=self.part(text, n), **limits)), len(text), longest
        )
        return list(encoded["input_ids"])

    def words(self, words: Sequence[object]) -> Row:
        """Token ids of a text that comes as a list of words."""
        if not all(isinstance(word, str) for word in words):
            raise CalibrationError(
                f"a calibration text is {words!r:.80}, expected a string or a list of words"
            )
        return self.encode(list(words), is_split_into_words=True)

    def choices(self, texts: Sequence[object]) -> Row:
        """Token ids of the choices of a question, each with the question before it."""
        if len(texts) < 3 or not all(isinstance(text, str) for text in texts):
            raise CalibrationError(
                f"a calibration row has the texts {texts!r:.80}, expected a question and each of its choices"
            )
        rows = [self.encode(texts[0], answer) for answer in texts[1:]]
        return {key: [row[key] for row in rows] for key in rows[0]}

    def chat(self, messages: Any) -> Row:
        """Token ids of a chat; if the template tells, `labels` are -100 where the assistant is silent."""
        tokenizer = self.tokenizer("chats")
        name = type(tokenizer).__name__
        if getattr(tokenizer, "chat_template", None) is None:
            raise ArgumentError(
                f"the calibration dataset holds chats, {name} has no chat_template: set it, or pass texts"
            )
        turns = [self.turn(message) for message in messages]
        if not turns:
            return {"input_ids": [], "attention_mask": []}
        marks = re.compile(r"\{%-?\s*generation\s*-?%\}")
        try:
            text = tokenizer.apply_chat_template(turns, tokenize=False)
            encoded = self.encode(text, add_special_tokens=False)
            if tokenizer.is_fast and marks.search(tokenizer.get_chat_template()):
                encoded["labels"] = self.spoken(turns, encoded["input_ids"], len(text))
            return encoded
        except TemplateError as error:
            roles = ", ".join(str(turn["role"]) for turn in turns)
            raise CalibrationError(
                f"the chat_template of {name} takes no chat of the roles {roles:.200}; leave such chats out, "
                "or pass texts"
            ) from error

    def spoken(self, turns: list[dict[str, object]], ids: list[int], size: int) -> list[int]:
        """The tokens `ids` of a chat of `size` characters, -100 where the assistant does not speak."""
        options: dict[str, Any] = {
            "return_dict": True,
            "return_assistant_tokens_mask": True,
            "max_length": self.longest,
        }
        encoded: Mapping[str, Any] = {"input_ids": []}
        # all of it only if that makes a difference
        for part in (2 * CHARACTERS * (self.longest or size), None):
            if encoded["input_ids"] != ids:
                cut = [{**turn, "content": self.part(turn["content"], part)} for turn in turns]
                encoded = self.tokenizer("chats").apply_chat_template(
                    cut, truncation=self.longest is not None, **options
                )
        return [token if ours else -100 for token, ours in zip(ids, encoded["assistant_masks"], strict=True)]

    def turn(self, message: object) -> Row:
        """A message of a chat with the keys `role` and `content`, a string."""
        turn = dict(message) if isinstance(message, Mapping) else {}
        if "from" in turn and "value" in turn:
            turn = {"role": SPEAKERS.get(turn["from"], turn["from"]), "content": turn["value"]}
        content = turn.get("content")
        parts: list[Any] = content if isinstance(content, list) else [None]
        if all(isinstance(part, Mapping) and part.get("type") == "text" for part in parts):
            turn["content"] = content = "".join(str(part["text"]) for part in parts)
        if content is None and turn.get("tool_calls"):
            turn["content"] = content = ""
        if "role" not in turn or not isinstance(content, str):
            raise CalibrationError(
                f"a message of a calibration chat is {message!r:.80}, expected a role and a content of text; "
                "leave such chats out"
            )
        return turn

    def pack(self, rows: Iterable[object], sized: bool) -> Iterator[Row]:
        """Blocks of one length, cut from all texts one after the other. What is left over is dropped."""
        tokenizer = self.tokenizer("texts")
        block = min(n for n in (self.args.max_seq_length or 1024, self.limit) if n is not None)
        ends = getattr(tokenizer, "truncation_side", "right") == "right"
        most, limits = None, dict[str, Any]()
        if ends and not sized:  # more tokens of one text of a stream are never drawn
            most = self.args.num_tokens + block + tokenizer.num_special_tokens_to_add()
            limits = {"truncation": True, "max_length": most}
        stream: list[int] = []
        last, blocks, empty = None, 0, 0
        for row in rows:
            text = self.text_to_pack(row)

            def encode(size: int | None, text: str = text) -> Row:
                # not verbose, or it warns of long documents
                return dict(tokenizer(self.part(text, size), verbose=False, **limits))

            ids = settled(encode, len(text), most)["input_ids"] if text.strip() else []
            empty = 0 if ids else empty + 1
            if not sized:
                check_not_endless(empty)
            if not ids:
                continue
            if last is not None and tokenizer.eos_token_id not in (None, last):
                stream.append(tokenizer.eos_token_id)
            stream += ids
            last = stream[-1]
            for start in range(0, len(stream) - block + 1, block):
                yield {"input_ids": stream[start : start + block]}
                blocks += 1
            stream = stream[len(stream) // block * block :]
        if stream and not blocks:
            raise CalibrationError(
                f"packed, the calibration texts hold {len(stream)} tokens, fewer than a block of {block}; "
                "give more texts or lower max_seq_length"
            )

    def text_to_pack(self, row: object) -> str:
        """The text of a row. Raises `CalibrationError` if it is no string, and has no one column of texts."""
        text = row
        if isinstance(row, Mapping):
            names = text_columns(row.keys(), self.args.text_columns, targets=False)
            text = row[names[0]] if len(names) == 1 else None
        if not isinstance(text, str):
            has = f"the columns {sorted(row)}" if isinstance(row, Mapping) else f"{row!r:.80}"
            raise CalibrationError(
                "packing takes strings or one column of them (text_columns), the calibration dataset "
                f"has {has}"
            )
        return text


def check_not_endless(empty: int) -> None:
    """Raise `CalibrationError` if so many rows of a stream in a row had no tokens that it may be endless."""
    if empty >= EMPTY_ROWS:
        raise CalibrationError(
            f"{EMPTY_ROWS:,} rows of the calibration stream, one after the other, hold no tokens, where "
            "reading ends lest it never does; leave empty rows out of it"
        )
