from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from importing import Import
from test_data_importer import ALPACA, json_values, pass_through

from appliance.data.columns import ColumnMap
from appliance.errors import InvalidInput

ASKED = [{"question": row["instruction"], "answer": row["output"], "input": 7} for row in ALPACA]


def test_renamed_rows_are_the_rows(imported: Import) -> None:
    renamed = [{"question": row["instruction"], "input": "", "answer": row["output"]} for row in ALPACA]
    report = imported(renamed, columns="instruction=question, output = answer")
    assert report["id"] == imported(ALPACA)["id"]
    assert report["format"] == {"alpaca": 3}


def test_names_may_be_exchanged_and_a_mapped_column_wins() -> None:
    exchange = ColumnMap("prompt=completion,completion=prompt")
    assert exchange.rename({"prompt": 1, "completion": 2}) == {"prompt": 2, "completion": 1}
    renamed = ColumnMap("input=context").rename({"input": 1, "context": 2, "id": 3})
    assert renamed == {"input": 2, "id": 3, "input as it was": 1}


def test_a_row_without_the_column_keeps_its_own_names() -> None:
    columns = ColumnMap("output=answer")
    assert columns.rename({"output": 1}) == {"output": 1}
    assert columns.rename([1]) == [1]
    with pytest.raises(InvalidInput):
        columns.check("a.csv")
    columns.rename({"answer": 1})
    columns.check("a.csv")


def test_a_column_that_no_row_has_is_refused_with_those_there_are(imported: Import) -> None:
    with pytest.raises(
        InvalidInput, match=r"no row of rows\.jsonl has anwser; there are question, answer, input"
    ) as caught:
        imported(ASKED, columns="instruction=question,output=anwser")
    assert caught.value.code == "no_such_column"


def test_a_file_without_rows_is_refused_for_that(imported: Import) -> None:
    with pytest.raises(InvalidInput, match="holds no rows"):
        imported("", columns="output=answer")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "'' maps no column"),
        ("output", "'output' maps no column"),
        ("output=", "'output=' maps no column"),
        ("output=a,", "'' maps no column"),
        ("outptu=a", "no format has 'outptu'.*instruction"),
        ("output=a,output=b", "'output=b' maps a name a second time"),
        ("output=a,input=a", "'input=a' maps a name a second time"),
    ],
)
def test_a_map_that_is_none(imported: Import, text: str, says: str) -> None:
    with pytest.raises(InvalidInput, match=says) as caught:
        imported(ASKED, columns=text)
    assert caught.value.code == "bad_map"


@pass_through
@given(
    text=st.text(max_size=20) | st.from_regex(r"(input|output)=[a-c=]{1,2}(,system=[a-c])?", fullmatch=True),
    row=json_values,
)
def test_any_map_reads_any_row_or_is_refused(imported: Import, text: str, row: object) -> None:
    try:
        report = imported([row, *ALPACA], columns=text)
    except InvalidInput as error:
        assert error.next  # noqa: PT017  # most maps are refused
        return
    assert report["rows_in"] == 4 == report["kept"] + report["dropped"] + report["duplicates"]
