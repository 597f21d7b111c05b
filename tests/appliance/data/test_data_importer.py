from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from importing import Import

import appliance.data.importer as importer
from appliance.data.dataset import Dataset
from appliance.data.formats import FORMATS
from appliance.data.requests import ImportRequest, Source
from appliance.errors import InvalidInput, NoSpace
from appliance.home import Home

ALPACA = [{"instruction": f"question {n}", "input": "", "output": f"answer {n}"} for n in range(3)]
SHAREGPT = [
    {"conversations": [{"from": "human", "value": f"question {n}"}, {"from": "gpt", "value": f"answer {n}"}]}
    for n in range(3)
]
PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}


def test_rows_with_a_thought_are_counted(imported: Import) -> None:
    rows = [
        {"prompt": "Two and two?", "completion": "<think>I add.</think>Four."},
        {"messages": [{"role": "user", "content": "3?"}, {"role": "assistant", "content": "3.", "reasoning": "Easy."}]},
        {"prompt": "<think> is what?", "completion": "A mark.", "tools": None},
        {"prompt": 'What is "<think>"?', "completion": 'A mark: "<think>", or "reasoning_content": "x".'},
    ]
    assert imported(rows, "some.jsonl")["thoughts"] == 2


def test_the_report_accounts_for_every_row(imported: Import, home: Home) -> None:
    rows = [ALPACA[0], ALPACA[0], {"instruction": "q", "output": " "}, SHAREGPT[1], 7, {**ALPACA[2], "output": " x "}]
    report = imported(rows, "some.jsonl")
    assert report == {
        "id": report["id"],
        "name": "rows",
        "format": {"alpaca": 3, "sharegpt": 1},
        "evidence": {
            "alpaca": "line 1 has the keys instruction, input, output",
            "sharegpt": "line 4 has the keys conversations",
        },
        "kind": "messages",
        "rows_in": 6,
        "kept": 3,
        "dropped": 2,
        "duplicates": 1,
        "drop_codes": {"empty_answer": 1, "not_an_object": 1},
        "unread": {},
        "private": {},
        "thoughts": 0,
        "near_duplicates": 0,
        "near": [],
        "conflicts": 0,
        "conflicting": [],
        "questions_on_both_sides": 0,
        "drops": [
            {"line": 3, "code": "empty_answer", "reason": "the assistant says nothing"},
            {"line": 5, "code": "not_an_object", "reason": "it is a number, not an object"},
        ],
        "findings": [
            {
                "level": "note",
                "code": "trimmed_answers",
                "count": 1,
                "message": "1 rows had white space around an answer; it was taken off",
            }
        ],
    }
    dataset = Dataset.open(home, report["id"])
    assert dataset.report == report
    assert [row["source"] for row in dataset.rows] == [{"file": "some.jsonl", "line": line} for line in (1, 4, 6)]
    assert dataset.rows[2]["messages"][1] == {"role": "assistant", "content": "x"}


def test_what_was_not_read_is_told_by_what_it_usually_means(imported: Import, home: Home) -> None:
    rows = [
        {**ALPACA[0], "contexts": [{"name": "f"}], "id": 1, "mood": "glad"},
        {**ALPACA[1], "mood": "sad", "output": "None"},
        {**ALPACA[2], "mood": ""},
    ]
    report = imported(rows)
    assert report["unread"] == {"contexts": 1, "id": 1, "mood": 2}
    found = {(finding["level"], finding["code"]): finding["message"] for finding in report["findings"]}
    assert found["error", "unread_keys"].startswith(
        "not read: `contexts` (1 rows, first at line 1, usually a part of the prompt). Name the format"
    )
    assert found["warning", "unread_keys"].startswith("not read: `mood` (2 rows, first at line 1). Where they matter")
    assert found["note", "unread_keys"] == "not read: `id` (1 rows, first at line 1)"
    assert found["warning", "no_value"].startswith("1 rows have a text that programs write where there is nothing")
    with pytest.raises(InvalidInput, match="cannot be trained on: not read: `contexts`"):
        Dataset.open(home, report["id"]).require_sound("tiny")
    again = imported(rows, ignore=["contexts", "mood"])
    assert again["id"] == report["id"]
    assert again["unread"] == {"id": 1}
    Dataset.open(home, report["id"]).require_sound("tiny")


def test_a_label_that_judges_some_answers_only_is_named(imported: Import) -> None:
    rows = [{"prompt": f"Classify {n}", "completion": "good", "label": n} for n in range(3)]
    with pytest.raises(InvalidInput, match="neither true nor false at line 3") as caught:
        imported(rows)
    assert caught.value.next.endswith("--ignore label")
    assert imported(rows, ignore=["label"])["kind"] == "messages"


@pytest.mark.parametrize("filename", ["some.jsonl", "some.json"])
def test_a_key_that_stands_twice_is_named_where_one_of_the_two_would_be_lost(imported: Import, filename: str) -> None:
    twice = [
        '{"instruction": "q", "output": "first", "output": "second"}',
        '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "content": "b"}]}',
        json.dumps(ALPACA[0]),
    ]
    text = "\n".join(twice) if filename.endswith("l") else f"[{', '.join(twice)}]"
    report = imported(text.encode(), filename)
    assert report["drop_codes"] == {"repeated_key": 2}
    assert [drop["reason"].partition(" stands")[0] for drop in report["drops"]] == ["`output`", "`content`"]
    assert report["kept"] == 1


def test_turns_that_are_read_otherwise_than_one_may_think_are_told(imported: Import) -> None:
    ask, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    rows = [{"messages": [answer, ask, answer, ask]}, {"messages": [ask, {**ask, "content": "now"}, answer]}]
    found = {finding["code"]: finding for finding in imported(rows)["findings"]}
    assert found["unanswered"]["message"].startswith("1 rows end with a turn that nobody answers")
    assert (found["greeting"]["level"], found["greeting"]["count"]) == ("note", 1)
    assert found["consecutive"]["message"].endswith("kept as they are; the first at line 2")


LF = {"ask": "q", "reply": "a", "extra": ""}


def test_a_dataset_info_names_the_columns_of_its_file(home: Home, tmp_path: Path) -> None:
    files = {"mine.jsonl": LF, "other.jsonl": {"prompt": "q2", "completion": "b"}}
    for name, row in files.items():
        (tmp_path / name).write_text(json.dumps(row))
    about = {"file_name": "mine.jsonl", "columns": {"prompt": "ask", "response": "reply", "query": "extra"}}
    sources = [
        Source(path=tmp_path / name, filename=name, about=about if name == "mine.jsonl" else {}) for name in files
    ]
    report = importer.import_files(ImportRequest(files=sources, name="rows"), home)
    rows = Dataset.open(home, report["id"]).rows
    assert [[message["content"] for message in row["messages"]] for row in rows] == [["q", "a"], ["q2", "b"]]
    sources[0].about["tags"] = {"role_tag": "from", "user_tag": "human", "assistant_tag": "gpt"}
    importer.import_files(ImportRequest(files=sources, name="rows"), home)
    for tags, says in (
        ({"user_tag": "Q"}, "user_tag = 'Q'"),
        ({"role_tag": "who"}, "role_tag = 'who'"),
        ({"function_tag": "F"}, "function_tag = 'F'"),
        ({"observation_tag": "O"}, "observation_tag = 'O'"),
        ({"content_tag": "body"}, "content_tag = 'body'"),
    ):
        sources[0].about["tags"] = tags
        with pytest.raises(InvalidInput, match=f"dataset_info.json has a name in the messages of mine.jsonl .*{says}"):
            importer.import_files(ImportRequest(files=sources, name="rows"), home)


def test_files_of_another_split_are_left_out_beside_those_to_train_on(home: Home, tmp_path: Path) -> None:
    names = ["data/train-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl", "validation/data.jsonl", "more.jsonl"]
    sources = []
    for number, name in enumerate(names):
        (tmp_path / str(number)).write_text(json.dumps({"prompt": name, "completion": "a"}))
        sources.append(Source(path=tmp_path / str(number), filename=name))
    report = importer.import_files(ImportRequest(files=sources, name="rows"), home)
    assert (report["kept"], report["drop_codes"]) == (2, {"other_split": 2})
    assert {drop["file"] for drop in report["drops"]} == set(names[1:3])
    taken = importer.import_files(ImportRequest(files=sources, name="rows", ignore=["split"]), home)
    assert taken["kept"] == 4
    alone = importer.import_files(ImportRequest(files=sources[1:3], name="rows"), home)
    assert alone["kept"] == 2


def test_an_array_names_rows_by_index(imported: Import, home: Home) -> None:
    report = imported([{}, ALPACA[0]], "some.json")
    assert report["drops"][0]["index"] == 0
    assert Dataset.open(home, report["id"]).rows[0]["source"] == {"file": "some.json", "index": 1}


def test_the_source_is_remembered(imported: Import, home: Home) -> None:
    directory = home.datasets / imported(ALPACA, "some.json")["id"]
    content = json.dumps(ALPACA).encode()
    source = json.loads((directory / "source.json").read_bytes())
    digest = hashlib.sha256(content).hexdigest()
    assert source == {"files": [{"path": "some.json", "bytes": len(content), "sha256": digest}]}


def test_the_id_is_that_of_the_rows(imported: Import, home: Home) -> None:
    first = imported(ALPACA, "a.json")
    directory = home.datasets / first["id"]
    before = {name: (directory / name).read_bytes() for name in ("rows.jsonl", "rows.index")}
    assert imported(SHAREGPT, "b.jsonl")["id"] == first["id"]
    assert imported((directory / "rows.jsonl").read_bytes(), "exported.jsonl")["id"] == first["id"]
    assert imported([*ALPACA, ALPACA[0]], "c.jsonl")["id"] == first["id"]
    assert {name: (directory / name).read_bytes() for name in before} == before
    assert Dataset.open(home, first["id"]).report["duplicates"] == 1
    assert json.loads((directory / "source.json").read_bytes())["files"][0]["path"] == "c.jsonl"
    assert imported(ALPACA[::-1], "d.json")["id"] != first["id"]


def test_pairs_can_be_exported_and_imported(imported: Import, home: Home) -> None:
    first = imported([PAIR])
    assert first["kind"] == "preference"
    assert imported((home.datasets / first["id"] / "rows.jsonl").read_bytes(), "exported.jsonl")["id"] == first["id"]


@pytest.mark.parametrize(
    ("content", "filename", "code", "says"),
    [
        (b"", "a.jsonl", "no_rows", "a.jsonl holds no rows"),
        (b" \n", "a.json", "no_rows", "a.json holds no rows"),
        (b"[]", "a.json", "no_rows", "a.json holds no rows"),
        (
            b'{"a": 1}\n7\n',
            "a.jsonl",
            "no_rows_kept",
            "none of the 2 rows .* line 1: its keys are of no known format: a",
        ),
        (b'{"instruction": "q", "output": "a"}\n{"instru', "a.jsonl", "malformed_json", "line 2, column 2"),
        ([ALPACA[0], PAIR], "a.jsonl", "mixed_kinds", r"messages rows \(first at line 1\) and preference rows"),
    ],
)
def test_files_that_make_no_dataset(
    imported: Import, home: Home, content: Any, filename: str, code: str, says: str
) -> None:
    with pytest.raises(InvalidInput, match=says) as caught:
        imported(content, filename)
    assert caught.value.code == code
    assert caught.value.next
    assert list(home.datasets.iterdir()) == list(home.incoming.iterdir()) == []


def request(path: Path, filename: str = "rows.jsonl", **how: Any) -> ImportRequest:
    return ImportRequest(files=[Source(path=path, filename=filename)], **{"name": "rows", **how})


def test_a_missing_file_a_bad_name_and_a_bad_format(home: Home, tmp_path: Path, imported: Import) -> None:
    with pytest.raises(InvalidInput, match="is not a file"):
        importer.import_files(request(tmp_path / "none.json", "none.json"), home)
    with pytest.raises(InvalidInput, match="cannot be called 'a b'"):
        importer.import_files(request(tmp_path, "a.json", name="a b"), home)
    with pytest.raises(InvalidInput, match="choose one of sharegpt, preference, openai, turns, vertex"):
        imported(ALPACA, format="excel")


def test_keys_that_are_no_text_can_be_reported(imported: Import) -> None:
    report = imported(r'{"\ud800": 1}' + "\n" + json.dumps(ALPACA[0]) + "\n")
    assert report["drops"][0]["reason"] == "its keys are of no known format: ?"


def test_half_a_surrogate_pair_is_dropped(imported: Import) -> None:
    report = imported(r'{"instruction": "q", "output": "\ud800"}' + "\n" + json.dumps(ALPACA[0]) + "\n")
    assert report["drops"] == [
        {"line": 1, "code": "broken_text", "reason": "a text holds half of a surrogate pair, which is no character"}
    ]


@pytest.mark.parametrize("failing", ["_provenance", "canonical_json", "write_json"])
def test_an_import_that_breaks_off_leaves_nothing(
    imported: Import, home: Home, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    def broken(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(importer, failing, broken)
        with pytest.raises(NoSpace):
            imported(ALPACA)
    assert list(home.datasets.iterdir()) == list(home.incoming.iterdir()) == []
    assert imported(ALPACA)["kept"] == 3


def test_a_killed_import_leaves_no_dataset_and_does_not_stop_the_next(
    imported: Import, home: Home, tmp_path: Path
) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in ALPACA))
    script = (
        "import os, signal, sys; from pathlib import Path; from appliance.home import Home\n"
        "import appliance.data.importer as importer\n"
        "importer.write_json = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "from appliance.data.requests import ImportRequest\n"
        f"request = ImportRequest.model_validate_json({request(source).model_dump_json()!r})\n"
        f"importer.import_files(request, Home(Path({str(home.root)!r})))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    assert [entry.name[0] for entry in home.datasets.iterdir()] == ["."]
    report = imported(ALPACA)
    assert [entry.name for entry in home.datasets.iterdir()] == [report["id"]]


def run_as_process(source: Path, home: Home, result: Path, **how: Any) -> Any:
    asked = source.with_name("request.json")
    asked.write_text(request(source, **how).model_dump_json())
    command = [sys.executable, "-X", "importtime", "-m", "appliance.data.importer"]
    command += [str(home.root), str(asked), str(result)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "appliance" in loaded
    assert not loaded & {"torch", "transformers", "trl", "peft", "datasets"}
    return json.loads(result.read_bytes())


def test_as_a_process_it_leaves_the_report_or_the_problem(home: Home, tmp_path: Path) -> None:
    source, result = tmp_path / "upload", tmp_path / "result.json"
    source.write_text(json.dumps(ALPACA[0]) + "\n")
    assert run_as_process(source, home, result, format="alpaca")["report"]["kept"] == 1
    source.write_text("{")
    assert run_as_process(source, home, result) == {
        "problem": {
            "code": "malformed_json",
            "message": "rows.jsonl is malformed at line 1, column 2 (byte 1): "
            "Expecting property name enclosed in double quotes",
            "next": "mend it there, or keep what is whole with --salvage",
            "status": 400,
        }
    }


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
texts = st.text(min_size=1, max_size=5) | json_values
turns = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["system", "user", "assistant", "tool"]) | json_values,
        "from": st.sampled_from(["human", "gpt", "function_call", "observation"]) | json_values,
        "content": texts | st.lists(st.fixed_dictionaries({"text": texts}), max_size=2),
        "value": texts,
        "input": texts,
        "output": texts,
        "system": texts,
        "tool_calls": json_values,
        "weight": st.sampled_from([0, 1]) | json_values,
    },
)
parts = st.fixed_dictionaries(
    {}, optional={"text": texts, "thought": json_values, "functionCall": json_values, "functionResponse": json_values}
)
contents = st.lists(st.fixed_dictionaries({}, optional={"role": texts, "parts": st.lists(parts) | json_values}))
history = st.fixed_dictionaries({}, optional={"messages": json_values, "currentId": json_values})
chats = st.fixed_dictionaries(
    {}, optional={"history": history | json_values, "messages": st.lists(turns, max_size=2), "params": json_values}
)
rows = json_values | st.fixed_dictionaries(
    {},
    optional={
        "contents": contents | json_values,
        "systemInstruction": json_values,
        "chat": chats | json_values,
        "query": texts,
        "answers": json_values,
        "data": json_values,
        "instruction": texts,
        "input": texts,
        "output": texts,
        "system": texts,
        "history": st.lists(st.lists(texts, min_size=2, max_size=2), max_size=2) | json_values,
        "messages": st.lists(turns, max_size=4) | json_values,
        "conversations": st.lists(turns, max_size=4) | json_values,
        "conversation": st.lists(turns, max_size=3) | json_values,
        "prompt": texts | st.lists(turns, max_size=3),
        "chosen": texts | st.lists(turns, max_size=3),
        "rejected": texts | st.lists(turns, max_size=3),
        "completion": texts | st.lists(turns, max_size=3),
        "label": st.booleans() | json_values,
        "tools": json_values,
    },
)
JUDGED = [{"prompt": "q", "completion": answer, "label": answer == "a"} for answer in "ab"]
PAIRS = [{**PAIR, "chosen": answer} for answer in "cd"]
valid = st.sampled_from(ALPACA + SHAREGPT)
sound = st.lists(valid) | st.lists(st.sampled_from(JUDGED)) | st.lists(st.sampled_from(PAIRS))
pass_through = settings(
    max_examples=100,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pass_through
@given(
    content=st.lists(rows | valid, max_size=8) | sound,
    lines=st.booleans(),
    format=st.none() | st.sampled_from(FORMATS),
    redact=st.booleans(),
)
def test_whatever_the_rows_hold_the_counts_add_up(
    imported: Import, home: Home, content: list[Any], lines: bool, format: str | None, redact: bool
) -> None:
    try:
        report = imported(content, "rows.jsonl" if lines else "rows.json", format=format, redact=redact)
    except InvalidInput as error:
        assert error.code in ("no_rows", "no_rows_kept", "mixed_kinds")  # noqa: PT017  # only some are refused
        return
    assert report["rows_in"] == len(content) == report["kept"] + report["dropped"] + report["duplicates"]
    assert report["dropped"] == len(report["drops"])
    assert sum(report["format"].values()) == report["kept"] + report["duplicates"]
    exported = home.datasets / report["id"] / "rows.jsonl"
    again = imported(exported.read_bytes(), "exported.jsonl")
    assert (again["id"], again["kept"]) == (report["id"], report["kept"])


@pass_through
@given(content=st.binary(max_size=60) | st.text(max_size=60), lines=st.booleans())
def test_whatever_the_bytes_are_there_is_a_report_or_an_error_for_a_person(
    imported: Import, content: bytes | str, lines: bool
) -> None:
    try:
        imported(
            content.encode(errors="surrogatepass") if isinstance(content, str) else content,
            "a.jsonl" if lines else "a.json",
        )
    except InvalidInput as error:
        assert error.next  # noqa: PT017  # most bytes are refused


def test_a_dataset_info_names_judgements_and_system_prompts(home: Home, tmp_path: Path) -> None:
    row = {"ask": "q", "reply": "a", "good": False, "told": "Be brief."}
    (tmp_path / "mine.jsonl").write_text(json.dumps(row))
    columns = {"prompt": "ask", "response": "reply", "kto_tag": "good", "system": "told"}
    source = Source(path=tmp_path / "mine.jsonl", filename="mine.jsonl", about={"columns": columns})
    report = importer.import_files(ImportRequest(files=[source], name="rows"), home)
    (found,) = Dataset.open(home, report["id"]).rows
    assert found["label"] is False
    assert found["prompt"][0] == {"role": "system", "content": "Be brief."}


def test_findings_are_as_grave_as_they_are(imported: Import) -> None:
    ask, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    report = imported(
        [
            {"prompt": "Dear {{name}}", "completion": "a"},
            {"prompt": "<|im_start|>q", "completion": "a"},
            {"prompt": "q", "completion": "nan"},
            {"prompt": "<image>\nq", "completion": "['a', 'b']"},
            {"prompt": "\ufffd", "completion": "<thinking>a</thinking>b"},
            {"messages": [answer, ask, ask, answer, {"role": "system", "content": "s"}, ask, answer, ask]},
        ]
    )
    levels = {finding["code"]: finding["level"] for finding in report["findings"]}
    warnings = ("placeholder", "rendered", "no_value", "media_mark", "written_by_python", "broken_characters")
    for code in (*warnings, "thought_in_other_marks", "unanswered"):
        assert levels[code] == "warning", code
    for code in ("greeting", "consecutive", "later_system"):
        assert levels[code] == "note", code


def test_more_keys_than_a_finding_names_are_counted(imported: Import) -> None:
    report = imported([{"prompt": "q", "completion": "a", **{f"mood{number}": 1 for number in range(11)}}])
    (finding,) = [one for one in report["findings"] if one["code"] == "unread_keys"]
    assert finding["count"] == 11
    assert " and 3 more" in finding["message"]
