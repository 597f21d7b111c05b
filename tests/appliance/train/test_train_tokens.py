"""Rows are tokenised once for a base and a method, and read from there by whatever comes after."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from tiny import FACTS, JUDGEMENTS, PREFERENCES, add_dataset, add_run, failure, read_recipe, stage, work

from appliance.data.dataset import Dataset
from appliance.data.tokenizer import TemplateSettings, load_tokenizer
from appliance.errors import InvalidInput
from appliance.home import Home
from appliance.train import examples as tokens
from appliance.train.examples import Examples, chosen, tokenised
from appliance.train.stage import METHODS, forecast_of

PLAIN = TemplateSettings()

ROWS = {"sft": FACTS, "dpo": PREFERENCES, "kto": JUDGEMENTS}


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The first rows of the batches that are tokenised."""
    seen: list[int] = []
    make = tokens._Tokeniser.__call__

    def counted(self: Any, start: int) -> Any:
        seen.append(start)
        return make(self, start)

    monkeypatch.setattr(tokens._Tokeniser, "__call__", counted)
    return seen


def opened(home: Home, rows: list[dict[str, Any]] = FACTS, name: str = "facts") -> Dataset:
    return Dataset.open(home, add_dataset(home, name, rows))


def files(dataset: Dataset) -> list[Path]:
    return sorted((dataset.directory / "tokens").iterdir())


@pytest.mark.parametrize("method", ROWS)
def test_what_is_kept_is_what_the_method_makes_of_each_row(home: Home, method: str) -> None:
    dataset = opened(home, ROWS[method])
    table = tokenised(home, dataset, home.models / "tiny", PLAIN, method)
    order = [2, 0, 1]
    found, left_out = chosen(table, dataset, order, read_recipe(add_run(home, "r", stage(method, "FACTS"))).stages[0])
    made = METHODS[method]
    tokenizer = load_tokenizer(home.models / "tiny")
    expected = [example for row in order for example in made.examples(tokenizer, dataset.rows[row])]
    assert [*found.table] == expected
    assert found.lengths == [made.length(one) for one in expected]
    assert found.trained == [made.trained(one) for one in expected]
    assert left_out == 0


def test_forecast_training_and_resume_share_one_file(home: Home, count: list[int]) -> None:
    run = add_run(home, "r", stage("sft", "FACTS", max_steps=2))
    forecast_of(home, read_recipe(run), "sft")
    assert count == [0]
    assert work(run, "sft") == 0
    assert work(add_run(home, "again", stage("sft", "FACTS", max_steps=1, epochs=7)), "sft") == 0
    assert count == [0], "nothing that a recipe may say of the steps changes a row"


def other_rows(home: Home, base: Path) -> dict[str, Any]:
    return {"dataset": opened(home, FACTS[1:], "fewer")}


def other_template(home: Home, base: Path) -> dict[str, Any]:
    path = base / "chat_template.jinja"
    path.write_text(path.read_text().replace("message['content']", "message['content'] | upper"))
    return {}


def other_tokenizer(home: Home, base: Path) -> dict[str, Any]:
    path = base / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"padding": None, "truncation": None}) + " ")
    return {}


def other_code(home: Home, base: Path) -> dict[str, Any]:
    tokens._CODE = (*tokens._CODE, "data/dataset.py")
    return {}


@pytest.mark.parametrize("change", [other_rows, other_template, other_tokenizer, other_code])
def test_what_examples_follow_from_makes_a_file_of_its_own(
    home: Home, tmp_path: Path, count: list[int], monkeypatch: pytest.MonkeyPatch, change: Callable[..., dict[str, Any]]
) -> None:
    monkeypatch.setattr(tokens, "_CODE", tokens._CODE)
    base = Path(shutil.copytree(home.models / "tiny", tmp_path / "base"))
    given = {"dataset": opened(home), "base": base, "template": PLAIN, "method": "sft"}
    tokenised(home, **given)
    tokenised(home, **given)
    assert len(count) == 1
    tokenised(home, **given | change(home, base))
    assert len(count) == 2


def test_each_method_has_a_file_of_its_own(home: Home) -> None:
    dataset, base = opened(home), home.models / "tiny"
    assert len({tokens._key(dataset, base, PLAIN, method) for method in METHODS}) == len(METHODS)


def test_the_day_counts_where_the_template_asks_for_it(home: Home, tmp_path: Path, count: list[int]) -> None:
    dataset, days = opened(home), (date(2026, 1, 1), date(2026, 1, 2))
    for day in days:
        tokenised(home, dataset, home.models / "tiny", TemplateSettings(today=day), "sft")
    assert len(count) == 1
    base = Path(shutil.copytree(home.models / "tiny", tmp_path / "base"))
    path = base / "chat_template.jinja"
    path.write_text("{{ strftime_now('%d') }}" + path.read_text())
    for day in days:
        tokenised(home, dataset, base, TemplateSettings(today=day), "sft")
    assert len(count) == 3


def test_many_rows_are_tokenised_by_several_processes_in_their_order(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = opened(home)
    alone = tokenised(home, dataset, home.models / "tiny", PLAIN, "sft")
    shutil.rmtree(dataset.directory / "tokens")
    monkeypatch.setattr(tokens, "_batches", _in_small_batches)
    assert tokenised(home, dataset, home.models / "tiny", PLAIN, "sft").equals(alone.combine_chunks()) or (
        tokenised(home, dataset, home.models / "tiny", PLAIN, "sft").to_pylist() == alone.to_pylist()
    )


def _in_small_batches(work: Any, starts: Any) -> Any:
    """Each row a batch; the processes know of no other size, so that only the first row of each is kept."""
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    with ProcessPoolExecutor(2, get_context("spawn"), tokens._prepare, (work,)) as pool:
        for batch, row in zip(pool.map(tokens._tokenise, range(len(FACTS))), range(len(FACTS)), strict=True):
            yield batch.filter(pyarrow.compute.equal(batch["row"], row))


def test_a_row_that_cannot_be_trained_on_is_named_when_it_is_chosen(home: Home) -> None:
    dataset = opened(home)
    table = tokenised(home, dataset, home.models / "tiny", PLAIN, "sft")
    refusal = json.dumps({"code": "no", "message": "it is bad", "next": "mend it"})
    columns = table.to_pylist()
    columns[3] |= {"refused": refusal, "input_ids": None, "labels": None, "length": None, "trained": None}
    spoilt = pyarrow.Table.from_pylist(columns, schema=table.schema)
    settings = read_recipe(add_run(home, "r", stage("sft", "FACTS"))).stages[0]
    assert len(chosen(spoilt, dataset, [0, 1, 2], settings)[0]) == 3
    with pytest.raises(InvalidInput, match=r"line 4 of facts\.jsonl: it is bad"):
        chosen(spoilt, dataset, [0, 3], settings)


def test_a_row_that_the_template_refuses_fails_the_stage_by_its_line(home: Home) -> None:
    (home.models / "tiny").unlink()
    from tiny import CHATML, make_model

    refusing = "{% if 'his hat' in messages[0]['content'] %}{{ raise_exception('no hats') }}{% endif %}" + CHATML
    make_model(home.models / "tiny", template=refusing)
    run = add_run(home, "r", stage("sft", "FACTS"))
    assert work(run, "sft") != 0
    assert failure(run, "sft")["reason"].startswith("line 8 of facts.jsonl: the chat template refuses")


def test_a_file_that_was_not_finished_is_not_there(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = opened(home)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space"):
            tokenised(home, dataset, home.models / "tiny", PLAIN, "sft")
    assert files(dataset) == []
    tokenised(home, dataset, home.models / "tiny", PLAIN, "sft")
    assert len(files(dataset)) == 1


def test_the_last_used_files_are_kept(home: Home, tmp_path: Path) -> None:
    dataset = opened(home)
    bases = []
    for number in range(tokens.KEPT + 2):
        base = Path(shutil.copytree(home.models / "tiny", tmp_path / str(number)))
        (base / "chat_template.jinja").write_text(
            "{# " + str(number) + " #}" + (base / "chat_template.jinja").read_text()
        )
        bases.append(base)
        tokenised(home, dataset, base, PLAIN, "sft")
        for age, file in enumerate(sorted(files(dataset), key=lambda file: -file.stat().st_mtime)):
            os.utime(file, (1e9 - age, 1e9 - age + number))
        tokenised(home, dataset, bases[0], PLAIN, "sft")
    assert len(files(dataset)) == tokens.KEPT


def test_examples_are_sorted_by_length_with_what_is_known_of_them() -> None:
    rows = [{"input_ids": list(range(size)), "labels": [-100] + [1] * (size - 1)} for size in (5, 2, 9)]
    found = Examples.of(rows, METHODS["sft"]).by_length()
    assert [len(row["input_ids"]) for row in found.table] == found.lengths == [2, 5, 9]
    assert found.trained == [1, 4, 8]
