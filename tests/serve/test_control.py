"""The control API in one process, with a run on disk that nothing works on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from controlling import Control

from appliance.errors import Conflict, InvalidInput, NotFound
from appliance.sources import find_sources
from appliance.train.events import EventLog
from appliance.train.recipe import Recipe, SftStage


async def test_events_are_replayed_from_the_last_seen(control: Control) -> None:
    run = control.run("finished")
    log = EventLog(control.home.runs / run / "events.jsonl")
    for number in range(5):
        log.append("warning", "sft", message=f"é {number}")
    assert [event["seq"] for event in await control.client.events(run, after=3)] == [4, 5]
    assert [event["seq"] async for event in control.client.follow(run, after=2)] == [3, 4, 5]


async def test_the_log_is_followed_to_its_end_without_breaking_a_character(control: Control) -> None:
    run = control.run("finished")
    text = "x" * 65_535 + "é\nlast line"
    (control.home.runs / run / "log.txt").write_text(text)
    assert "".join([piece async for piece in control.client.follow_log(run)]) == text
    assert await control.client.log(run, lines=1) == "last line"


async def test_stopping_what_has_ended_changes_nothing(control: Control) -> None:
    run = control.run("finished")
    assert (await control.client.stop(run)).state == "finished"
    with pytest.raises(Conflict, match="has finished"):
        await control.client.resume(run)


async def test_the_work_of_a_run_that_failed_can_be_discarded_and_of_one_that_finished_not(control: Control) -> None:
    run = control.run("failed")
    checkpoint = control.home.runs / run / "merge" / "model"
    checkpoint.mkdir(parents=True)
    assert (await control.client.stop(run, "discard")).state == "stopping"
    await control.supervisor.tick()
    assert control.supervisor.runs.get(run).state == "stopped"
    assert not checkpoint.parent.exists()
    finished = control.run("finished")
    with pytest.raises(Conflict, match="has finished"):
        await control.client.stop(finished, "discard")


async def test_a_running_one_is_discarded_when_it_has_stopped(control: Control) -> None:
    run = control.run("queued")
    assert (await control.client.stop(run, "discard")).state == "stopping"
    assert (await control.client.stop(run)).state == "stopping"
    assert control.supervisor.runs.wish(run) == "discard", "to stop it once more takes nothing back"


async def test_only_what_trains_can_be_ended_early(control: Control) -> None:
    for state in ("queued", "failed", "finished"):
        with pytest.raises(Conflict, match="does not train now"):
            await control.client.stop(control.run(state), "keep")
    merging = control.run("queued")
    control.supervisor.runs.mark_running(merging)
    with pytest.raises(Conflict, match="does not train now"):
        await control.client.stop(merging, "keep")
    recipe = Recipe(name="t", base="tiny", stages=(SftStage(method="sft", name="sft", dataset="d"),))
    control.supervisor.runs.add("t-1", recipe)
    control.supervisor.runs.mark_running("t-1")
    (control.home.runs / "t-1" / "sft").mkdir(parents=True)
    assert (await control.client.stop("t-1", "keep")).state == "running"
    assert control.supervisor.runs.wish("t-1") == "keep"


async def test_resuming_a_failed_run_queues_it_without_its_failure(control: Control) -> None:
    run = control.run("failed")
    failure = control.home.runs / run / "merge" / "failure.json"
    failure.parent.mkdir()
    failure.write_text("{}")
    assert (await control.client.resume(run)).state == "queued"
    assert not failure.exists()


async def test_problems_have_a_code_a_message_and_what_to_do(control: Control) -> None:
    with pytest.raises(NotFound) as raised:
        await control.client.run("nope")
    assert (raised.value.code, raised.value.next) == ("no_such_run", "see `appliance runs`")
    with pytest.raises(InvalidInput, match="did you mean `base`"):
        await control.client.train('name = "x"\nbsae = "y"')
    with pytest.raises(InvalidInput, match="offset"):
        await control.client.rows("nope", offset=-1)


async def test_an_import_takes_a_format_a_column_map_and_any_filename(control: Control, tmp_path: Path) -> None:
    (tmp_path / "--rows.csv").write_text("instruction,question,output\nx,q,a\n")
    sources = find_sources([str(tmp_path / "--rows.csv")])
    await control.client.import_dataset(sources, "mapped", format="alpaca", columns="instruction=question")
    assert (await control.client.rows("mapped")).rows[0]["messages"][0]["content"] == "q"
    with pytest.raises(InvalidInput, match="no format has '-x'"):
        await control.client.import_dataset(sources, "mapped", columns="-x=y")
    with pytest.raises(InvalidInput, match="there is no format '--help'"):
        await control.client.import_dataset(sources, "mapped", format="--help")


async def test_an_import_is_listed_under_its_name_and_paged(control: Control, tmp_path: Path) -> None:
    rows = [{"instruction": f"q{number}", "output": f"a{number}"} for number in range(12)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    report = await control.client.import_dataset(find_sources([str(tmp_path / "rows.json")]), "mine")
    assert (report["kept"], report["name"]) == (12, "mine")
    page = await control.client.rows("mine", offset=10, limit=5)
    assert (page.total, [row["messages"][0]["content"] for row in page.rows]) == (12, ["q10", "q11"])
    assert (await control.client.rows("mine", offset=99)).rows == ()
    assert list(control.home.incoming.iterdir()) == []


async def test_the_last_words_of_engines_can_be_read(control: Control) -> None:
    with pytest.raises(NotFound, match="no engine has run"):
        await control.client.engine_log("r-1")
    control.supervisor.engines.log("r-1").write_text("loading\nCUDA error\n")
    assert await control.client.engine_log("r-1", lines=1) == "CUDA error"
