from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from appliance.train.checkpoints import fault_of, newest_usable, origin, saving
from appliance.train.recipe import parse_recipe

ORIGIN = {"recipe": "a", "dataset": "b"}


def checkpoint(stage: Path, step: int, origin: dict[str, str] = ORIGIN) -> Path:
    stage.mkdir(exist_ok=True)
    with saving(stage, step, origin) as folder:
        made = folder / f"checkpoint-{step}"
        (made / "part").mkdir(parents=True)
        (made / "weights").write_bytes(b"x" * step)
        (made / "part" / "state").write_bytes(b"y")
    return stage / f"checkpoint-{step}"


def names(stage: Path) -> list[str]:
    return sorted(path.name for path in stage.iterdir())


def test_a_saved_checkpoint_can_be_used_and_the_last_two_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 100):
        assert fault_of(checkpoint(tmp_path, step), ORIGIN) == ""
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-100"]
    assert newest_usable(tmp_path, ORIGIN) == (tmp_path / "checkpoint-100", [])


@pytest.mark.parametrize("fault", ["cut", "changed", "lost", "extra", "no manifest", "torn manifest"])
def test_a_damaged_one_cannot_be_used(tmp_path: Path, fault: str) -> None:
    folder = checkpoint(tmp_path, 5)
    match fault:
        case "cut":
            (folder / "weights").write_bytes(b"xxx")
        case "changed":
            (folder / "weights").write_bytes(b"xxxxz")
        case "lost":
            (folder / "part" / "state").unlink()
        case "extra":
            (folder / "more").write_bytes(b"")
        case "no manifest":
            (folder / "manifest.json").unlink()
        case "torn manifest":
            (folder / "manifest.json").write_text('{"files": {"wei')
    assert fault_of(folder, ORIGIN) in ("is not whole", "is damaged")


def test_the_newest_that_can_be_used_is_taken_and_later_ones_are_deleted(tmp_path: Path) -> None:
    checkpoint(tmp_path, 10)
    (checkpoint(tmp_path, 20) / "weights").unlink()
    assert newest_usable(tmp_path, ORIGIN) == (tmp_path / "checkpoint-10", ["checkpoint-20 is damaged"])
    assert names(tmp_path) == ["checkpoint-10"]
    assert newest_usable(tmp_path / "none", ORIGIN) == (None, [])


def test_one_of_another_origin_is_not_used(tmp_path: Path) -> None:
    checkpoint(tmp_path, 10, {"recipe": "z", "dataset": "b"})
    assert newest_usable(tmp_path, ORIGIN) == (None, ["checkpoint-10 was trained with another recipe"])
    assert names(tmp_path) == []


def test_an_error_while_saving_leaves_the_earlier_ones(tmp_path: Path) -> None:
    checkpoint(tmp_path, 10)
    with contextlib.suppress(OSError), saving(tmp_path, 20, ORIGIN) as folder:
        (folder / "checkpoint-20").mkdir()
        raise OSError("full")
    assert names(tmp_path) == ["checkpoint-10"]


def test_killed_at_any_moment_of_saving_it_is_absent_or_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stops before each call that changes the disk, in turn, as a kill would: nothing is tidied up."""
    for stop in itertools.count():
        stage = tmp_path / str(stop)
        checkpoint(stage, 10)
        remaining = iter(range(stop))
        with monkeypatch.context() as patch:
            for call in ("fsync", "replace", "rename"):
                patch.setattr(os, call, _dying(getattr(os, call), remaining))
            patch.setattr("shutil.rmtree", lambda *_, **__: None)
            killed = _dies(lambda stage=stage: checkpoint(stage, 20))
        found, _ = newest_usable(stage, ORIGIN)
        assert found is not None
        if not killed:
            assert found.name == "checkpoint-20"
            break
        assert found.name == ("checkpoint-20" if (stage / "checkpoint-20").exists() else "checkpoint-10")
    assert stop > 5


class Killed(BaseException):
    pass


def _dying(call: Callable[..., Any], remaining: Iterator[int]) -> Callable[..., Any]:
    """`call`, which dies once there is nothing remaining."""

    def maybe(*arguments: Any) -> Any:
        if next(remaining, None) is None:
            raise Killed
        return call(*arguments)

    return maybe


def _dies(work: Callable[[], object]) -> bool:
    try:
        work()
    except Killed:
        return True
    return False


def test_the_origin_is_that_of_the_stages_that_it_goes_on_with() -> None:
    text = """name = "a"
base = "tiny"
[[stages]]
method = "sft"
dataset = "d"
[[stages]]
name = "more"
method = "sft"
dataset = "e"
from = "base"
"""
    more = origin(parse_recipe(text), "more")
    assert origin(parse_recipe(text.replace("[[stages]]", "[[stages]]\nepochs = 2", 1)), "more") == more
    assert origin(parse_recipe(text.replace('from = "base"', 'from = "sft"')), "more") != more
    going_on = text.replace('from = "base"', 'from = "sft"')
    started = [
        origin(parse_recipe(f'start = {{release = "r", sha256 = "{hash}"}}\n{going_on}'), "more") for hash in "xy"
    ]
    assert started[0] != started[1]


def test_the_origin_is_all_that_the_weights_follow_from() -> None:
    stages = '[[stages]]\nmethod = "sft"\ndataset = "d"\n[[stages]]\nmethod = "dpo"\ndataset = "e"\n'
    text = f'name = "a"\nbase = "tiny"\n{stages}'
    sft, dpo = (origin(parse_recipe(text), name) for name in ("sft", "dpo"))
    assert (sft["dataset"], dpo["dataset"]) == ("d", "e")
    for same in (text.replace('"a"', '"b"'), "promote = true\n" + text):
        assert origin(parse_recipe(same), "sft") == sft
    later = parse_recipe(text + "beta = 0.2")
    assert origin(later, "sft") == sft, "a later stage changes nothing"
    assert origin(later, "dpo") != dpo
    for other in ("seed = 3\n" + text, text.replace("[[stages]]", "[[stages]]\nepochs = 2", 1)):
        assert origin(parse_recipe(other), "sft")["recipe"] != sft["recipe"]
        assert origin(parse_recipe(other), "dpo")["recipe"] != dpo["recipe"]
