from __future__ import annotations

from pathlib import Path

import pytest

from appliance.train.checkpoints import is_whole, newest_whole, seal


def checkpoint(stage: Path, step: int) -> Path:
    folder = stage / f"checkpoint-{step}"
    (folder / "part").mkdir(parents=True)
    (folder / "weights").write_bytes(b"x" * step)
    (folder / "part" / "state").write_bytes(b"y")
    seal(folder)
    return folder


def test_a_sealed_checkpoint_is_whole(tmp_path: Path) -> None:
    assert is_whole(checkpoint(tmp_path, 5))


@pytest.mark.parametrize("fault", ["cut", "lost", "extra", "unsealed", "torn manifest"])
def test_a_broken_one_is_not(tmp_path: Path, fault: str) -> None:
    folder = checkpoint(tmp_path, 5)
    match fault:
        case "cut":
            (folder / "weights").write_bytes(b"xxx")
        case "lost":
            (folder / "part" / "state").unlink()
        case "extra":
            (folder / "more").write_bytes(b"")
        case "unsealed":
            (folder / "manifest.json").unlink()
        case "torn manifest":
            (folder / "manifest.json").write_text('{"files": {"wei')
    assert not is_whole(folder)


def test_the_newest_whole_one_is_taken_and_broken_ones_are_deleted(tmp_path: Path) -> None:
    for step in (5, 10, 100):
        checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-100" / "weights").unlink()
    assert newest_whole(tmp_path) == tmp_path / "checkpoint-10"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-5"]
    assert newest_whole(tmp_path / "none") is None
