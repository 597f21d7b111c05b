"""A release's files against its manifest: any change is found, and what has not changed is not read again."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from appliance.home import hashes, sha256
from appliance.release import integrity
from appliance.release.integrity import Ended, Reading, Seen, dump_seen, examine, load_seen, unchanged

FILES = {"model.safetensors": bytes(range(256)) * 40, "config.json": b"{}", "adapter/adapter_config.json": b"{}"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A release whose manifest is that of its files."""
    folder = tmp_path / "r-1"
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "manifest.json").write_text(json.dumps({"files": hashes(folder)}))
    return folder


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of files whose content was read."""
    names: list[str] = []
    original = integrity._sha256

    def note(path: Path, reading: Reading) -> str:
        names.append(path.name)
        return original(path, reading)

    monkeypatch.setattr(integrity, "_sha256", note)
    return names


def look(folder: Path, seen: dict[str, Seen]) -> integrity.Examination:
    return examine(folder, seen["manifest.json"].sha256, seen, Reading())


def whole(folder: Path) -> dict[str, Seen]:
    """The files of a release that is whole, as they were seen."""
    found = examine(folder, sha256(folder / "manifest.json"), {}, Reading())
    assert found.damage == ""
    assert unchanged(folder, found.seen)
    return found.seen


def test_what_is_whole_is_read_once(folder: Path, read: list[str]) -> None:
    seen = whole(folder)
    assert sorted(read) == ["adapter_config.json", "config.json", "manifest.json", "model.safetensors"]
    assert {name: one.sha256 for name, one in seen.items()} == hashes(folder)
    read.clear()
    assert unchanged(folder, seen)
    assert look(folder, seen) == integrity.Examination(seen=seen)
    assert read == []


def test_it_is_remembered_as_text(folder: Path) -> None:
    seen = whole(folder)
    assert load_seen(dump_seen(seen)) == seen
    assert unchanged(folder, load_seen(dump_seen(seen)))
    assert not unchanged(folder, {})


def flip(folder: Path) -> None:
    with open(folder / "model.safetensors", "r+b") as file:
        file.seek(5000)
        file.write(b"!")


def flip_and_set_the_times_back(folder: Path) -> None:
    before = os.stat(folder / "model.safetensors")
    flip(folder)
    os.utime(folder / "model.safetensors", ns=(before.st_atime_ns, before.st_mtime_ns))


def truncate(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 100)


def exchange(folder: Path) -> None:
    (folder / "other").write_bytes(b"another model")
    os.replace(folder / "other", folder / "model.safetensors")


def delete(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def add(folder: Path) -> None:
    (folder / "modeling.py").write_text("import os")


def add_in_the_adapter(folder: Path) -> None:
    (folder / "adapter" / "more.bin").write_bytes(b"\x80")


def link_a_directory(folder: Path) -> None:
    (folder / "more").symlink_to(folder / "adapter")


def name_with_a_line_break(folder: Path) -> None:
    (folder / "a\nb").write_text("")


def manifest_byte(folder: Path) -> None:
    text = (folder / "manifest.json").read_text()
    digest = json.loads(text)["files"]["config.json"]
    (folder / "manifest.json").write_text(text.replace(digest, digest[:-1] + ("0" if digest[-1] != "0" else "1")))


def manifest_and_weights(folder: Path) -> None:
    """Others that agree with each other."""
    flip(folder)
    files = {name: digest for name, digest in hashes(folder).items() if name != "manifest.json"}
    (folder / "manifest.json").write_text(json.dumps({"files": files}))


def no_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def pipe(folder: Path) -> None:
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")


def gone(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))


@pytest.mark.parametrize(
    ("fault", "damage"),
    [
        (flip, "model.safetensors is not what its manifest says"),
        (flip_and_set_the_times_back, "model.safetensors is not what its manifest says"),
        (truncate, "model.safetensors is not what its manifest says"),
        (exchange, "model.safetensors is not what its manifest says"),
        (delete, "model.safetensors is missing"),
        (add, "modeling.py is not in its manifest"),
        (add_in_the_adapter, "adapter/more.bin is not in its manifest"),
        (link_a_directory, "more is not in its manifest"),
        (name_with_a_line_break, r"'a\nb' is not in its manifest"),
        (manifest_byte, "manifest.json is not the one that was recorded"),
        (manifest_and_weights, "manifest.json is not the one that was recorded"),
        (no_manifest, "manifest.json is missing"),
        (pipe, "config.json is no file"),
        (gone, "its directory cannot be read (No such file or directory)"),
    ],
)
def test_every_change_is_found(folder: Path, fault: Callable[[Path], None], damage: str) -> None:
    seen = whole(folder)
    fault(folder)
    assert not unchanged(folder, seen)
    assert look(folder, seen) == integrity.Examination(damage)


def test_a_manifest_that_was_never_recorded_has_to_be_one(folder: Path) -> None:
    """As those of releases that were made before manifests were recorded."""
    assert examine(folder, "", {}, Reading()).seen["manifest.json"].sha256 == sha256(folder / "manifest.json")
    for content in ("[]", "{", '{"files": 7}'):
        (folder / "manifest.json").write_text(content)
        assert examine(folder, "", {}, Reading()).damage == "manifest.json cannot be read"


def test_a_file_that_was_touched_is_read_again_and_no_other(folder: Path, read: list[str]) -> None:
    seen = whole(folder)
    read.clear()
    os.utime(folder / "config.json")
    assert not unchanged(folder, seen)
    found = look(folder, seen)
    assert (found.damage, read) == ("", ["config.json"])
    assert unchanged(folder, found.seen)


def test_a_file_that_was_moved_out_and_linked_is_the_same(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "moved")
    (folder / "model.safetensors").symlink_to(folder.parent / "moved")
    seen = whole(folder)
    (folder.parent / "moved").write_bytes(b"another")
    assert not unchanged(folder, seen)


def test_written_to_while_it_is_read_it_is_read_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = integrity._sha256

    def disturb(path: Path, reading: Reading) -> str:
        digest = original(path, reading)
        if path.name == "model.safetensors":
            flip(folder)
        return digest

    monkeypatch.setattr(integrity, "_sha256", disturb)
    found = examine(folder, "", {}, Reading())
    assert found.damage == "", "it was whole when it was read"
    assert not unchanged(folder, found.seen)


def test_how_far_it_is_can_be_seen_and_ended(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reading = Reading(from_disk=True)
    assert examine(folder, "", {}, reading).damage == ""
    assert reading.read == reading.bytes == sum(map(len, FILES.values()))
    ended = threading.Event()
    ended.set()
    with pytest.raises(Ended):
        examine(folder, "", {}, Reading(ended=ended))


@pytest.mark.parametrize(
    ("number", "damage"),
    [(errno.EIO, "model.safetensors cannot be read (Input/output error)"), (errno.EMFILE, None), (errno.ENOMEM, None)],
)
def test_what_cannot_be_read_is_damaged_unless_it_is_our_own_lack(
    folder: Path, monkeypatch: pytest.MonkeyPatch, number: int, damage: str | None
) -> None:
    original = integrity._sha256

    def fail(path: Path, reading: Reading) -> str:
        if path.name == "model.safetensors":
            raise OSError(number, os.strerror(number))
        return original(path, reading)

    monkeypatch.setattr(integrity, "_sha256", fail)
    if damage is None:
        with pytest.raises(OSError, match=os.strerror(number)):
            examine(folder, "", {}, Reading())
    else:
        assert examine(folder, "", {}, Reading()).damage == damage


def test_without_descriptors_nobody_can_say(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = whole(folder)

    def lack(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(os, "scandir", lack)
    with pytest.raises(OSError, match="Too many"):
        unchanged(folder, seen)
    with pytest.raises(OSError, match="Too many"):
        look(folder, seen)


def test_a_file_that_is_just_being_written_is_no_damage(folder: Path) -> None:
    (folder / ".manifest.json.7.tmp").write_text("{")
    assert examine(folder, "", {}, Reading()).damage == ""
