"""A release as one file: an uncompressed tar of one folder that holds what the manifest lists, and the manifest."""

from __future__ import annotations

import hashlib
import json
import tarfile
from pathlib import Path, PurePosixPath

from appliance.errors import InvalidInput

MANIFEST = "manifest.json"
CARD = "README.md"
TAR_END = bytes(2 * tarfile.BLOCKSIZE)
_CHUNK = 1 << 20
_NOT_A_TREE = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError)


def tar_header(name: str, size: int) -> bytes:
    """What a tar says before the content of a file."""
    member = tarfile.TarInfo(name)
    member.size = size
    return member.tobuf(tarfile.PAX_FORMAT)


def tar_padding(size: int) -> bytes:
    """What follows the content of a file of that size."""
    return bytes(-size % tarfile.BLOCKSIZE)


def unpack(archive: Path, folder: Path) -> None:
    """Write the release in the tar `archive` into `folder`.

    Raises InvalidInput for a file that is no such archive, is cut short, or holds other content than its manifest says.
    """
    found: dict[str, str] = {}
    try:
        with tarfile.open(archive, "r:") as tar:
            for member in tar:
                name = _inner_name(member)
                found[name] = _extract(tar, member, folder / name)
        listed: dict[str, str] = dict(json.loads((folder / MANIFEST).read_bytes())["files"])
    except (tarfile.TarError, *_NOT_A_TREE, ValueError, KeyError, TypeError) as error:
        raise _damaged(f"it is no whole archive of a release ({error})") from None
    del found[MANIFEST]
    for name in sorted(found.keys() | listed.keys()):
        if found.get(name) != listed.get(name):
            state = "is missing" if name not in found else "is not in the manifest" if name not in listed else "differs"
            raise _damaged(f"{name} {state}")


def _inner_name(member: tarfile.TarInfo) -> str:
    """The member's path below the archive's one folder."""
    parts = PurePosixPath(member.name).parts
    if not member.isfile() or len(parts) < 2 or ".." in parts or parts[0] == "/":
        raise _damaged(f"it holds {member.name!r}, which is no file of a release")
    return "/".join(parts[1:])


def _extract(tar: tarfile.TarFile, member: tarfile.TarInfo, target: Path) -> str:
    """Write a member's content to `target`; its SHA-256."""
    target.parent.mkdir(parents=True, exist_ok=True)
    source = tar.extractfile(member)
    assert source is not None
    digest, size = hashlib.sha256(), 0
    with source, open(target, "xb") as file:
        while chunk := source.read(_CHUNK):
            file.write(chunk)
            digest.update(chunk)
            size += len(chunk)
    if size != member.size:
        raise _damaged(f"it ends within {member.name}")
    return digest.hexdigest()


def _damaged(what: str) -> InvalidInput:
    return InvalidInput("bad_archive", f"the release cannot be imported: {what}", "export it again, and copy it again")
