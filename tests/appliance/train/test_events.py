"""events.jsonl survives kills and readers."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from appliance.train.events import EventLog


def test_seq_rises_by_one_also_over_reopening(tmp_path: Path) -> None:
    for _ in range(3):
        EventLog(tmp_path / "events.jsonl").append("warning", "sft", message="x")
    assert [event["seq"] for event in EventLog(tmp_path / "events.jsonl").read()] == [1, 2, 3]


@pytest.mark.parametrize("cut", [1, 10, 30])
def test_a_torn_line_is_cut_off(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    log.append("warning", "sft", message="first")
    log.append("warning", "sft", message="second")
    path.write_bytes(path.read_bytes()[:-cut])
    assert [event["message"] for event in log.read()] == ["first"]
    assert log.append("warning", "sft", message="third") == 2
    assert [event["message"] for event in log.read()] == ["first", "third"]


def test_a_file_that_is_one_torn_line_starts_anew(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"seq": 1, "ev')
    assert EventLog(path).append("warning", "sft", message="x") == 1
    assert len(EventLog(path).read()) == 1


def test_lines_longer_than_a_block(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    for _ in range(3):
        log.append("sample", "sft", prompt="p" * 20_000, text="é" * 20_000)
    assert [event["seq"] for event in log.read()] == [1, 2, 3]


def test_reading_after_a_seq_and_from_a_position(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    assert log.read_from(0) == ([], 0)
    log.append("warning", "sft", message="a")
    first, position = log.read_from(0)
    log.append("warning", "sft", message="b")
    second, _ = log.read_from(position)
    assert [event["message"] for event in first + second] == ["a", "b"]
    assert [event["message"] for event in log.read(after=1)] == ["b"]


def test_writers_take_turns(tmp_path: Path) -> None:
    def write() -> None:
        for _ in range(50):
            EventLog(tmp_path / "events.jsonl").append("warning", "sft", message="x")

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [event["seq"] for event in EventLog(tmp_path / "events.jsonl").read()] == list(range(1, 201))


def test_an_unknown_kind_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown event kind"):
        EventLog(tmp_path / "events.jsonl").append("setp", "sft")


def test_the_newest_of_a_kind_is_read_from_the_end(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    assert log.newest("step") is None
    log.append("step", "sft", step=1)
    for number in range(3000):
        log.append("warning", "sft", message=f"warning {number}")
    assert log.newest("step") is None, "too long ago to be looked for"
    log.append("step", "sft", step=2)
    log.append("warning", "sft", message="x")
    with open(log.path, "ab") as file:
        file.write(b'{"seq": 9, "event": "step"')
    newest = log.newest("step")
    assert newest is not None
    assert newest["step"] == 2
