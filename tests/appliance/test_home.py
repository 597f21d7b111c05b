"""Directories come into being whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from appliance.errors import InvalidInput, NoSpace
from appliance.home import Home, building, copy_file, disk_error, find_socket, is_name, require_space, write_atomic
from appliance.settings import load_settings
from appliance.train.recipe import Recipe


def test_building_appears_whole(tmp_path: Path) -> None:
    with building(tmp_path / "x") as directory:
        (directory / "a").write_text("1")
        assert not (tmp_path / "x").exists()
    assert (tmp_path / "x" / "a").read_text() == "1"
    assert os.listdir(tmp_path) == ["x"]


def test_building_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with building(tmp_path / "x") as directory:
            (directory / "a").write_text("1")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert os.listdir(tmp_path) == []


def test_building_clears_what_a_kill_left(tmp_path: Path) -> None:
    left = tmp_path / ".x.building"
    left.mkdir()
    (left / "stale").write_text("1")
    with building(tmp_path / "x") as directory:
        (directory / "a").write_text("1")
    assert os.listdir(tmp_path / "x") == ["a"]


def test_write_atomic_keeps_the_old_file_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f"
    write_atomic(path, b"old")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["f"]


def test_a_copy_is_another_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"whole")
    copy_file(tmp_path / "a", tmp_path / "b")
    (tmp_path / "a").write_bytes(b"spoilt")
    assert (tmp_path / "b").read_bytes() == b"whole"


def test_blocks_are_shared_where_the_file_system_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"whole")
    asked = []

    def clone(target: object, request: int, source: int) -> None:
        asked.append((request, os.readlink(f"/proc/self/fd/{source}")))

    monkeypatch.setattr(fcntl, "ioctl", clone)
    copy_file(tmp_path / "a", tmp_path / "b")
    assert asked == [(0x40049409, str(tmp_path / "a"))]
    assert (tmp_path / "b").read_bytes() == b"", "nothing was copied as well"


def test_space_is_asked_for_in_words(tmp_path: Path) -> None:
    require_space(tmp_path, 1, "a test")
    with pytest.raises(NoSpace, match=r"a test needs 1000\.0 TB"):
        require_space(tmp_path / "not" / "yet", 10**15, "a test")


def test_disk_errors_in_words(tmp_path: Path) -> None:
    assert isinstance(disk_error(OSError(errno.ENOSPC, ""), tmp_path), NoSpace)
    assert isinstance(disk_error(OSError(errno.EACCES, "Permission denied"), tmp_path), InvalidInput)


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.EROFS, "is read only"),
        (errno.ENOENT, "is not there"),
        (errno.EMFILE, "too many files"),
        (errno.EIO, "reports an error"),
        (errno.ENOTEMPTY, "Directory not empty"),
    ],
)
def test_a_disk_error_says_what_it_is_and_of_which_file(tmp_path: Path, number: int, said: str) -> None:
    error = disk_error(OSError(number, os.strerror(number), str(tmp_path / "file")), tmp_path)
    assert said in error.message
    assert number == errno.EMFILE or str(tmp_path / "file") in error.message
    assert "owner" not in str(error)


@pytest.mark.parametrize("text", ["evil\n", "", ".hidden", "a/b", "x" * 65, "a b"])
def test_what_is_no_name(text: str) -> None:
    assert not is_name(text)
    assert is_name("llama-3.2_1B")
    with pytest.raises(ValueError, match="pattern"):
        Recipe(name=text, base="tiny")


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The socket of a service that is installed here."""
    monkeypatch.setattr("appliance.home._SERVICE_SOCKET", tmp_path / "run" / "control.sock")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "control.sock").touch()
    return tmp_path / "run" / "control.sock"


def test_a_home_of_ones_own_never_hides_the_service(service: Path, tmp_path: Path) -> None:
    own = tmp_path / "data" / "appliance"
    own.mkdir(parents=True)
    assert find_socket(load_settings({})) == service
    other = tmp_path / "other"
    assert find_socket(load_settings({"APPLIANCE_HOME": str(other)})) == other / "control.sock"
    assert find_socket(load_settings({"APPLIANCE_SOCKET": "/x.sock"})) == Path("/x.sock")
    service.unlink()
    assert find_socket(load_settings({})) == own / "control.sock"


def test_a_service_that_may_not_be_looked_at_is_still_the_service(
    service: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(path: Path) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", denied)
    assert find_socket(load_settings({})) == service


def test_a_socket_path_that_no_socket_can_have(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="APPLIANCE_SOCKET"):
        Home(tmp_path / ("d" * 120)).create()


def test_a_home_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidInput, match="is a file"):
        Home(tmp_path / "file" / "home").create()
