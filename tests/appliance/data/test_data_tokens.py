from __future__ import annotations

from pathlib import Path
from typing import Any

import chat_templates
import pytest
from chat_templates import (
    CALLING,
    CHATML,
    DEFAULT_SYSTEM,
    RAISING,
    SHOUTING,
    WITHOUT_END,
    make_tokenizer,
)
from hypothesis import given
from hypothesis import strategies as st
from importing import Import
from test_data_importer import pass_through
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

import appliance.data.tokens as tokens_module
from appliance.data.dataset import canonical_json
from appliance.data.dropped import Dropped
from appliance.data.formats import to_canonical
from appliance.data.render import render_conversation
from appliance.data.tokenizer import load_tokenizer
from appliance.data.tokens import TokenCount, conversations
from appliance.errors import InvalidInput

ASKED = {"role": "user", "content": "hello"}
ANSWERED = {"role": "assistant", "content": "he is here"}


def base(folder: Path, template: str = CHATML, normalizer: Any = None) -> Path:
    made = folder / "base"
    make_tokenizer(template, normalizer).save_pretrained(made)
    return made


def count(folder: Path, rows: list[dict[str, Any]], max_length: int | None = None) -> dict[str, Any]:
    counting = TokenCount(folder)
    for row in rows:
        counting.add(row, canonical_json(row))
    return counting.figures(max_length)


def expected(folder: Path, rows: list[dict[str, Any]]) -> tuple[list[int], int, int]:
    """Lengths of the rows, tokens, trained tokens, as training counts them."""
    tokenizer = load_tokenizer(folder)
    lengths, total, trained = [], 0, 0
    for row in rows:
        rendered = [
            example
            for messages in conversations(row)
            for example in render_conversation(tokenizer, messages, row.get("tools"))
        ]
        lengths.append(max(len(one.input_ids) for one in rendered))
        total += sum(len(one.input_ids) for one in rendered)
        trained += sum(sum(one.trained) for one in rendered)
    return sorted(lengths), total, trained


def found(figures: dict[str, Any]) -> tuple[list[int], int, int]:
    lengths = [length for length, rows in figures["lengths"] for _ in range(rows)]
    return lengths, figures["total"], figures["trained"]


ROWS: list[dict[str, Any]] = [
    {"messages": [ASKED, ANSWERED]},
    {"messages": [{"role": "system", "content": "be brief"}, ASKED, {**ANSWERED, "weight": 0}, ASKED, ANSWERED]},
    {"messages": [{**ASKED, "content": "assistant\n"}, {**ANSWERED, "content": "assistant"}]},
    {"messages": [{**ASKED, "content": "a\n\n  \u4f60\u597d \U0001f389"}, {**ANSWERED, "content": "s"}]},
    {"messages": [ASKED, {**ANSWERED, "content": "he <|im_end|> he"}]},
    {"prompt": [ASKED, ANSWERED, ASKED], "chosen": [ANSWERED], "rejected": [{**ANSWERED, "content": "no"}]},
    {"prompt": [ASKED], "completion": [ANSWERED], "label": False},
    {"messages": [ASKED, {**ANSWERED, "content": "final"}, {**ASKED, "content": "final"}, ANSWERED]},
    {"messages": [{**ASKED, "content": "a"}, {**ANSWERED, "content": "a", "weight": 0}, ASKED, ANSWERED]},
]


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize(
    "template",
    ["CHATML", "DEFAULT_SYSTEM", "TRIMMING", "THINKING", "CLOSED_AT_THE_END", "LLAMA", "GEMMA", "MISTRAL", "HARMONY"],
)
def test_the_counts_are_those_of_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str, fast: bool
) -> None:
    if not fast:
        monkeypatch.setattr(tokens_module, "_fast_tokenizer", lambda _: None)
    monkeypatch.setattr(tokens_module, "_TRIED", 0)
    folder = base(tmp_path, getattr(chat_templates, template))
    figures = count(folder, ROWS)
    assert figures["exact"]
    assert found(figures) == expected(folder, ROWS)
    assert figures["end_of_turn_trained"]


@pytest.mark.slow
def test_the_counts_of_the_real_model_are_those_of_training(smollm2: Path) -> None:
    rows = [*ROWS, *({"messages": [{**ASKED, "content": f"{n} {chr(n)}"}, ANSWERED]} for n in range(32, 4000, 7))]
    figures = count(smollm2, rows)
    assert figures["exact"]
    assert found(figures) == expected(smollm2, rows)


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)


@pass_through
@given(said=st.lists(texts, min_size=2, max_size=6))
def test_whatever_is_said_the_counts_are_those_of_training(tmp_path: Path, said: list[str]) -> None:
    folder = tmp_path / "base"
    if not folder.exists():
        base(tmp_path, DEFAULT_SYSTEM)
    names = ("user", "assistant")
    value = {"messages": [{"role": names[index % 2], "content": text} for index, text in enumerate(said)]}
    try:
        row = to_canonical(value).row
    except Dropped:
        return
    figures = count(folder, [row])
    if figures["refused"]:
        with pytest.raises(InvalidInput):
            expected(folder, [row])
    else:
        assert found(figures) == expected(folder, [row])


def test_where_the_fast_count_differs_training_s_own_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong:
        def encode_all(self, pieces: list[str], specials: bool) -> list[list[int]]:
            return [[0, 0, 0] for _ in pieces]

    monkeypatch.setattr(tokens_module, "_fast_tokenizer", lambda _: Wrong())
    folder = base(tmp_path)
    figures = count(folder, ROWS)
    assert (figures["exact"], found(figures)) == (True, expected(folder, ROWS))
    monkeypatch.setattr(tokens_module, "_TRIED", 0)
    monkeypatch.setattr(tokens_module, "_TRIED_EVERY", 3)
    figures = count(folder, ROWS)
    assert not figures["exact"]
    # Two conversations of two pieces were counted before the difference showed.
    assert figures["total"] == 2 * 6 + expected(folder, ROWS[2:])[1]


def test_of_a_judged_row_only_the_answers_are_trained() -> None:
    pair, judged = ROWS[5:7]
    unsaid = {**ANSWERED, "weight": 0}
    assert list(conversations(pair)) == [
        [ASKED, unsaid, ASKED, ANSWERED],
        [ASKED, unsaid, ASKED, {**ANSWERED, "content": "no"}],
    ]
    assert list(conversations(judged)) == [[ASKED, ANSWERED]]


def test_what_a_limit_cuts_off(tmp_path: Path) -> None:
    folder = base(tmp_path)
    lengths, _, _ = expected(folder, ROWS)
    figures = count(folder, ROWS, max_length=lengths[3])
    assert figures["truncated_rows"] == sum(length > lengths[3] for length in lengths) > 0
    assert figures["truncated_tokens"] == sum(max(0, length - lengths[3]) for length in lengths)
    assert figures["percentiles"]["0"] == lengths[0]
    assert figures["percentiles"]["50"] == lengths[(len(lengths) - 1) // 2]
    assert figures["percentiles"]["100"] == lengths[-1]


def finding(report: dict[str, Any], code: str) -> dict[str, Any]:
    return next((one for one in report["findings"] if one["code"] == code), {})


@pytest.mark.parametrize(
    ("template", "code"),
    [(WITHOUT_END, "no_end_of_turn"), (SHOUTING, "text_not_rendered"), (RAISING, "template_refused")],
)
def test_a_base_that_cannot_be_trained_is_an_error(imported: Import, tmp_path: Path, template: str, code: str) -> None:
    report = imported(ROWS[:2], base=base(tmp_path, template))
    assert report["tokens"]["refused"] == {code: 2}
    assert finding(report, code)["level"] == "error"
    assert finding(report, code)["base"] == "base"
    assert not report["tokens"]["end_of_turn_trained"]
    assert finding(report, "nothing_trained")["level"] == "error"


def test_rows_that_cannot_be_trained_on_are_all_named_and_left_out_where_asked_for(
    imported: Import, tmp_path: Path
) -> None:
    folder = base(tmp_path)
    thoughtful = {"messages": [ASKED, {**ANSWERED, "content": "bad", "reasoning_content": "hm"}]}
    called = {**thoughtful, "messages": [ASKED, {**ANSWERED, "content": "worse"}], "tools": [{"name": "f"}]}
    rows = [ROWS[0], thoughtful, ROWS[1], called]
    report = imported(rows, base=folder)
    assert [(row["line"], row["code"]) for row in report["untrainable"]] == [
        (2, "reasoning_not_rendered"),
        (4, "tools_not_rendered"),
    ]
    assert finding(report, "reasoning_not_rendered")["level"] == "error"
    assert "--drop-untrainable" in finding(report, "reasoning_not_rendered")["message"]
    left = imported(rows, base=folder, drop_untrainable=True)
    assert (left["kept"], left["drop_codes"]) == (2, {"reasoning_not_rendered": 1, "tools_not_rendered": 1})
    assert left["drops"][0]["line"] == 2
    assert left["untrainable"] == []
    assert [one for one in left["findings"] if one["level"] == "error"] == []
    assert left["id"] == imported([ROWS[0], ROWS[1]])["id"]
    with pytest.raises(InvalidInput, match="nothing says which base model"):
        imported(rows, drop_untrainable=True)


def test_warnings_about_tokens(imported: Import, tmp_path: Path) -> None:
    folder = base(tmp_path, "{{ bos_token }}" + CHATML)
    report = imported([ROWS[0], ROWS[4]], base=folder, max_length=20)
    assert report["tokens"]["bos"] == {"2": 2}
    assert finding(report, "repeated_bos")["count"] == 2
    assert finding(report, "special_token_in_text")["count"] == 1
    assert "row 1" in finding(report, "special_token_in_text")["message"]
    assert finding(report, "too_long")["count"] == 2
    long = {"messages": [{**ASKED, "content": "hello " * 400}, {**ANSWERED, "content": "s"}]}
    assert finding(imported([long], base=folder), "little_trained")["level"] == "warning"


def test_without_a_base_there_are_no_token_figures(imported: Import) -> None:
    assert "tokens" not in imported(ROWS[:1])


def test_rows_with_tools_are_counted(tmp_path: Path) -> None:
    folder = base(tmp_path, CALLING)
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    rows = [
        {
            "messages": [ASKED, {"role": "assistant", "content": "", "tool_calls": [call]}],
            "tools": [{"name": "f"}],
        },
        ROWS[0],
    ]
    assert found(count(folder, rows)) == expected(folder, rows)


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="no usable tokenizer"):
        TokenCount(tmp_path)


@pytest.mark.parametrize("model", [models.BPE(), models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")])
def test_a_tokenizer_that_cannot_be_counted_fast_is_counted_slowly(tmp_path: Path, model: Any) -> None:
    folder = tmp_path / "base"
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(model),
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHATML,
    ).save_pretrained(folder)
    assert tokens_module._fast_tokenizer(folder) is None
    assert count(folder, ROWS[:1])["refused"] == {"text_not_rendered": 1}
