"""What a base model's tokenizer makes of a dataset: how many tokens, and how many of them are trained."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

from kitoken import Kitoken

from appliance.data.dataset import Row, answered
from appliance.data.render import Conversation, render_conversation, render_text
from appliance.data.template_input import special_tokens
from appliance.data.thoughts import THOUGHT
from appliance.data.tokenizer import TemplateSettings, load_tokenizer
from appliance.errors import InvalidInput

_BATCH_BYTES = 1 << 19
_BATCHES_AHEAD = 2
_PERCENTILES = (0, 5, 25, 50, 75, 95, 99, 100)
_TRIAL = "import sys, kitoken; kitoken.Kitoken.from_file(sys.argv[1]).encode_all(sys.argv[2:], True)"
_SAMPLE = "One, two 2\n\n  \u00e9 \u4f60\u597d \U0001f389 <|"
REFUSED_LISTED = 1000
"""So many rows that cannot be trained on are named in a report."""
_TRIED = 64
_TRIED_EVERY = 256
"""So many conversations at first, and then one in so many, are counted both ways."""


class _Conversation(NamedTuple):
    row: int
    messages: list[dict[str, Any]]
    """Where an assistant's message has the weight 0, it is not trained."""
    tools: Any


@dataclass
class _Counts:
    lengths: Counter[int] = field(default_factory=Counter)
    """Rows by their tokens; of a row with two answers, those of the longer conversation."""
    tokens: int = 0
    trained: int = 0
    starts: Counter[int] = field(default_factory=Counter)
    """Conversations by how many beginning-of-sequence tokens they begin with."""
    refused: Counter[str] = field(default_factory=Counter)
    """Rows that cannot be rendered, by the code of the error."""
    first_refused: dict[str, tuple[int, str]] = field(default_factory=dict)
    """The first of them: its number and what is wrong with it."""
    refused_rows: list[tuple[int, str, str]] = field(default_factory=list)
    """The first REFUSED_LISTED of them: number, code, and what is wrong."""
    last_refused: int | None = None
    spelled: int = 0
    """Conversations in which a text spells a special token."""
    first_spelled: int | None = None


class TokenCount:
    """Counts the tokens of rows as they come, in a thread of its own.

    A conversation is rendered by its chat template and cut where an answer begins and after the token that ends it, and
    the pieces are tokenised by a library that is several times as fast as Transformers'. Both may differ from what
    training does, which is `render_conversation`: on some conversations that is tried, and from the first difference
    on it counts by itself, as it does where an answer is not found in the rendered text, or more than once.
    """

    def __init__(self, base: Path) -> None:
        """`base` is the directory of a base model. Raises InvalidInput where its tokenizer cannot be used."""
        self.base = base.name
        self._tokenizer = load_tokenizer(base)
        self._thinking = load_tokenizer(base, TemplateSettings(thinking=True))
        self._bos = self._tokenizer.bos_token
        self._special = special_tokens(self._tokenizer)
        self._ending = re.compile(rf"\s*(?:{self._special.pattern})")
        self._header = self._answer_header()
        self._shared = self._answers_share_an_example()
        self._fast = _fast_tokenizer(base)
        self._conversations = 0
        self._exact = True
        self._counts = _Counts()
        self._rows: list[Row] = []
        self._bytes = 0
        self._number = 0
        self._pool = ThreadPoolExecutor(1)
        self._ahead: deque[Future[None]] = deque()

    def add(self, row: Row, canonical: bytes) -> None:
        """Count `row`, whose canonical JSON is `canonical`."""
        self._rows.append(row)
        self._bytes += len(canonical)
        if self._bytes > _BATCH_BYTES:
            self._submit()

    def refusal(self, row: Row) -> InvalidInput | None:
        """Why `row` cannot be trained on; None where it can. As training does it, which is slower than counting."""
        try:
            for messages in conversations(row):
                self._examples(messages, row.get("tools"))
        except InvalidInput as error:
            return error
        return None

    def close(self) -> None:
        """Stop counting, whatever is left."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def figures(self, max_length: int | None) -> dict[str, Any]:
        """The counts as the report's `tokens`, with what a limit of `max_length` tokens cuts off. Comes last."""
        self._submit()
        while self._ahead:
            self._ahead.popleft().result()
        self.close()
        counts, lengths = self._counts, sorted(self._counts.lengths.items())
        figures: dict[str, Any] = {
            "base": self.base,
            "exact": self._exact,
            "total": counts.tokens,
            "trained": counts.trained,
            "trained_share": round(counts.trained / counts.tokens, 4) if counts.tokens else 0.0,
            "end_of_turn_trained": bool(counts.trained) and not counts.refused["no_end_of_turn"],
            "bos": {str(number): count for number, count in sorted(counts.starts.items())},
            "percentiles": _percentiles(lengths),
            "lengths": lengths,
            "refused": dict(counts.refused),
            "first_refused": {code: list(first) for code, first in counts.first_refused.items()},
            "refused_rows": [list(one) for one in counts.refused_rows],
            "spelled_special": counts.spelled,
            "first_spelled": counts.first_spelled,
        }
        if max_length is not None:
            over = [(length - max_length, count) for length, count in lengths if length > max_length]
            figures["max_length"] = max_length
            figures["truncated_rows"] = sum(count for _, count in over)
            figures["truncated_tokens"] = sum(extra * count for extra, count in over)
        return figures

    def _submit(self) -> None:
        if not self._rows:
            return
        while len(self._ahead) >= _BATCHES_AHEAD:
            self._ahead.popleft().result()
        batch = [
            _Conversation(number, messages, row.get("tools"))
            for number, row in enumerate(self._rows, self._number)
            for messages in conversations(row)
        ]
        self._number += len(self._rows)
        self._rows, self._bytes = [], 0
        cuts = [
            None if text is None else self._cut(text, conversation)
            for text, conversation in zip(self._render(batch), batch, strict=True)
        ]
        self._ahead.append(self._pool.submit(self._count, batch, cuts))

    def _answer_header(self) -> str:
        """The end of what the chat template begins an answer with; empty: nothing."""
        asked = [{"role": "user", "content": "?"}]
        try:
            before, after = (
                self._tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=header)
                for header in (False, True)
            )
        except Exception:  # a template raises what it likes; the rows will say
            return ""
        alike = takewhile(lambda pair: pair[0] == pair[1], zip(before, after, strict=False))
        return str(after[sum(1 for _ in alike) :])

    def _answers_share_an_example(self) -> bool:
        turns = [{"role": role, "content": "?"} for role in ("user", "assistant") * 2]
        try:
            return len(render_conversation(self._tokenizer, turns)) == 1
        except InvalidInput:  # the rows will say
            return False

    def _render(self, batch: list[_Conversation]) -> list[str | None]:
        """Each conversation as its chat template renders it; None where that refuses it."""
        try:
            if not any(conversation.tools for conversation in batch):
                messages = [conversation.messages for conversation in batch]
                return list(self._tokenizer.apply_chat_template(messages, tokenize=False))
        except Exception:  # a template raises what it likes: find out for which of them
            pass
        return [self._render_one(conversation) for conversation in batch]

    def _render_one(self, conversation: _Conversation) -> str | None:
        try:
            return render_text(self._tokenizer, conversation.messages, conversation.tools)
        except InvalidInput:  # render_conversation will say why
            return None

    def _cut(self, text: str, conversation: _Conversation) -> list[str] | None:
        """The text in pieces, of which every second is trained; None where an answer is not found in it just once."""
        if self._bos:
            self._counts.starts[_repeated(text, self._bos)] += 1
        if self._special.search("\0".join([message["content"] for message in conversation.messages])):
            self._counts.spelled += 1
            if self._counts.first_spelled is None:
                self._counts.first_spelled = conversation.row
            return None
        if conversation.tools or not (self._shared or _answers_once(conversation)):
            return None
        pieces, done, place = [], 0, 0
        for message in conversation.messages:
            if message.get("tool_calls") or message.get("reasoning_content"):
                return None
            content = message["content"].strip()
            if message["role"] != "assistant":
                if (found := text.find(content, place)) < 0:
                    return None
                place = found + len(content)
                continue
            if "<think>" in content:
                return None
            header = text.find(self._header, place)
            begin = header + len(self._header)
            ends = self._ends(text, content, begin) if content and self._header and header >= 0 else []
            if len(ends) != 1:
                return None
            place = ends[0]
            if message.get("weight") != 0:
                pieces += [text[done:begin], text[begin:place]]
                done = place
        return pieces

    def _ends(self, text: str, answer: str, begin: int) -> list[int]:
        """Where the special token after `answer` ends, for each place from `begin` to the next header that it may have.

        They are several where the words of the template or of who speaks next read like the answer.
        """
        next_header = text.find(self._header, begin)
        until = next_header if next_header >= 0 else len(text)
        ends: list[int] = []
        found = text.find(answer, begin, until)
        while found >= 0 and len(ends) < 2:
            if ending := self._ending.match(text, found + len(answer)):
                ends.append(ending.end())
            found = text.find(answer, found + 1, until)
        return ends

    def _count(self, batch: list[_Conversation], cuts: list[list[str] | None]) -> None:
        pieces = [piece for cut in cuts if cut for piece in cut]
        sizes = iter([len(ids) for ids in self._fast.encode_all(pieces, True)] if self._fast else [])
        lengths: dict[int, int] = {}
        for conversation, cut in zip(batch, cuts, strict=True):
            found = [next(sizes, 0) for _ in cut or ()]
            counted = sum(found), sum(found), sum(found[1::2])
            self._conversations += 1
            tried = self._conversations <= _TRIED or self._conversations % _TRIED_EVERY == 0
            if not cut or not self._fast or tried:
                exact = self._render_exactly(conversation)
                if exact is None:
                    continue
                if cut and self._fast and exact != counted:
                    self._exact = self._conversations <= _TRIED
                    self._fast = None
                counted = exact
            lengths[conversation.row] = max(counted[0], lengths.get(conversation.row, 0))
            self._counts.tokens += counted[1]
            self._counts.trained += counted[2]
        self._counts.lengths.update(lengths.values())

    def _render_exactly(self, conversation: _Conversation) -> tuple[int, int, int] | None:
        """Tokens of the longest example, of all, and trained ones; None where it cannot be rendered, which is noted."""
        try:
            examples = self._examples(conversation.messages, conversation.tools)
        except InvalidInput as error:
            self._note_refusal(conversation.row, error)
            return None
        lengths = [len(example.input_ids) for example in examples]
        return max(lengths, default=0), sum(lengths), sum(sum(example.trained) for example in examples)

    def _examples(self, messages: list[dict[str, Any]], tools: Any) -> Conversation:
        """As training makes them, but that this decides for each row whether the model thinks, and a recipe for all."""
        return render_conversation(self._thinking if has_thoughts(messages) else self._tokenizer, messages, tools)

    def _note_refusal(self, row: int, error: InvalidInput) -> None:
        """Once for a row, which may have two conversations."""
        counts = self._counts
        if row == counts.last_refused:
            return
        counts.last_refused = row
        counts.refused[error.code] += 1
        counts.first_refused.setdefault(error.code, (row, error.message))
        if len(counts.refused_rows) < REFUSED_LISTED:
            counts.refused_rows.append((row, error.code, error.message))


@lru_cache
def _fast_tokenizer(base: Path) -> Any:
    """A tokenizer for counting alone; None where it does not know the model's.

    It is tried in a process of its own, which a tokenizer that it does not expect can make it abort.
    """
    file = str(base / "tokenizer.json")
    trial = subprocess.run([sys.executable, "-c", _TRIAL, file, _SAMPLE], capture_output=True, check=False)
    return None if trial.returncode else Kitoken.from_file(file)


def conversations(row: Row) -> Iterator[list[dict[str, Any]]]:
    """The conversations that a row is trained as, in which all but the answers has the weight 0."""
    if "messages" in row:
        yield row["messages"]
        return
    for part in ("chosen", "rejected", "completion"):
        if part in row:
            yield answered(row, part)


def has_thoughts(messages: list[dict[str, Any]]) -> bool:
    """Whether an answer among the messages has a thought before it."""
    return any(
        message.get("reasoning_content") or THOUGHT.match(message.get("content") or "")
        for message in messages
        if message["role"] == "assistant"
    )


def _answers_once(conversation: _Conversation) -> bool:
    return len([message for message in conversation.messages if message["role"] == "assistant"]) <= 1


def _repeated(text: str, start: str) -> int:
    """How many times `text` begins with `start`."""
    count = 0
    while text.startswith(start, count * len(start)):
        count += 1
    return count


def _percentiles(lengths: list[tuple[int, int]]) -> dict[str, int]:
    """Of sorted (length, rows): the least length that so many percent of the rows do not exceed."""
    rows = sum(count for _, count in lengths)
    found, passed = {}, 0
    wanted = list(_PERCENTILES)
    for length, count in lengths:
        passed += count
        while wanted and passed * 100 >= wanted[0] * rows:
            found[str(wanted.pop(0))] = length
    return found
