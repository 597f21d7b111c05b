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
        "private": {},
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
    with pytest.raises(InvalidInput, match="choose one of sharegpt, preference, openai, turns, alpaca, completion"):
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
rows = json_values | st.fixed_dictionaries(
    {},
    optional={
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
    deadline=None,
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
