"""A release as one file: what comes out is what went in, or nothing does."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from appliance.archive import MANIFEST, TAR_END, tar_header, tar_padding, unpack
from appliance.errors import InvalidInput
from appliance.home import hashes

FILES = {"model.safetensors": bytes(range(256)) * 20, "adapter/adapter_config.json": b"{}", "empty.txt": b""}


def pack(files: dict[str, bytes], path: Path, folder: str = "r-1") -> Path:
    """An archive as `export` writes it."""
    listed = {name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()}
    members = {**files, MANIFEST: json.dumps({"release": "r-1", "files": listed}).encode()}
    with open(path, "wb") as file:
        for name, content in members.items():
            prefix = f"{folder}/" if folder else ""
            file.write(tar_header(prefix + name, len(content)) + content + tar_padding(len(content)))
        file.write(TAR_END)
    return path


def test_what_was_packed_comes_out(tmp_path: Path) -> None:
    unpack(pack(FILES, tmp_path / "r.tar"), tmp_path / "out")
    assert hashes(tmp_path / "out").keys() == {*FILES, MANIFEST}
    for name, content in FILES.items():
        assert (tmp_path / "out" / name).read_bytes() == content


def test_other_programs_read_it(tmp_path: Path) -> None:
    with tarfile.open(pack(FILES, tmp_path / "r.tar")) as tar:
        assert tar.getnames() == [f"r-1/{name}" for name in (*FILES, MANIFEST)]
        long = "n" * 90 + "/" + "m" * 90
        assert tarfile.TarInfo.frombuf(tar_header("a", 3)[:512], "utf-8", "strict").size == 3
        assert len(tar_header(long, 0)) % 512 == 0


@pytest.mark.parametrize(
    ("fault", "files"),
    [
        ("model.safetensors differs", {**FILES, "model.safetensors": FILES["model.safetensors"][:-1] + b"!"}),
        ("empty.txt is missing", {name: content for name, content in FILES.items() if name != "empty.txt"}),
        ("other.py is not in the manifest", {**FILES, "other.py": b"import os"}),
        ("no file of a release", {**FILES, "../escape": b"x"}),
    ],
)
def test_other_content_than_the_manifest_says_is_refused(tmp_path: Path, fault: str, files: dict[str, bytes]) -> None:
    with pytest.raises(InvalidInput, match=fault) as caught:
        unpack(pack(files, tmp_path / "r.tar"), tmp_path / "out")
    assert caught.value.code == "bad_archive"
    assert not (tmp_path / "escape").exists()


def test_cut_short_anywhere_it_is_refused(tmp_path: Path) -> None:
    whole = pack(FILES, tmp_path / "r.tar").read_bytes()
    needed = len(whole) - len(TAR_END) - 511
    for number, length in enumerate(range(0, needed, 193)):
        (tmp_path / "cut.tar").write_bytes(whole[:length])
        with pytest.raises(InvalidInput):
            unpack(tmp_path / "cut.tar", tmp_path / f"out{number}")


def link(tar: tarfile.TarFile) -> None:
    member = tarfile.TarInfo("r-1/model.safetensors")
    member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
    tar.addfile(member)


def twice(tar: tarfile.TarFile) -> None:
    for _ in range(2):
        member = tarfile.TarInfo("r-1/a")
        member.size = 1
        tar.addfile(member, io.BytesIO(b"x"))


def directory(tar: tarfile.TarFile) -> None:
    member = tarfile.TarInfo("r-1/adapter")
    member.type = tarfile.DIRTYPE
    tar.addfile(member)


def absolute(tar: tarfile.TarFile) -> None:
    tar.addfile(tarfile.TarInfo("/r-1/a"))


@pytest.mark.parametrize("plant", [link, twice, directory, absolute])
def test_what_no_export_writes_is_refused(tmp_path: Path, plant: Callable[[tarfile.TarFile], None]) -> None:
    with tarfile.open(tmp_path / "r.tar", "w") as tar:
        plant(tar)
    with pytest.raises(InvalidInput):
        unpack(tmp_path / "r.tar", tmp_path / "out")


def test_another_file_is_no_archive(tmp_path: Path) -> None:
    (tmp_path / "r.tar").write_bytes(b"PK\x03\x04" + bytes(2000))
    with pytest.raises(InvalidInput):
        unpack(tmp_path / "r.tar", tmp_path / "out")
