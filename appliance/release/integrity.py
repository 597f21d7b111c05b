"""Whether the files of a release are still those that its manifest lists. No torch here."""

from __future__ import annotations

import errno
import fnmatch
import hashlib
import json
import os
import stat
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from appliance.release.manifest import MANIFEST

_CHUNK = 1 << 20
_BEING_WRITTEN = ".*.tmp"
"""What `write_atomic` makes beside the file that it replaces."""
_CLOCK_SECONDS = 0.05
"""A file that is written to twice within a tick of the kernel's clock (a hundredth of a second) may keep its times."""
_OUT_OF_MEANS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR, errno.EAGAIN})
"""Errors that say nothing about the file."""


class Stamp(NamedTuple):
    """What differs after a file was written to. Times in ns; `changed` is the kernel's own, which nobody sets back."""

    bytes: int
    modified: int
    changed: int
    inode: int


NO_FILE = Stamp(-1, 0, 0, 0)
"""The stamp of what is no file that can be read: a socket, a link that leads nowhere."""


class Seen(NamedTuple):
    """A file as it was read: its stamp before, and the SHA-256 of its content."""

    stamp: Stamp
    sha256: str


@dataclass
class Reading:
    """How far the reading of files is, for who looks on from another thread, and a way to end it.

    `from_disk`: copies of the files in memory are passed over, as far as nothing else uses them.
    """

    from_disk: bool = False
    bytes: int = 0
    read: int = 0
    ended: threading.Event = field(default_factory=threading.Event)


class Ended(Exception):
    """The reading was ended before it could say anything."""


@dataclass(frozen=True)
class Examination:
    """What was found: the `damage` in a few words, or none and every file as it was `seen`, the manifest included."""

    damage: str = ""
    seen: dict[str, Seen] = field(default_factory=dict)


def stamps(folder: Path) -> dict[str, Stamp]:
    """The stamp of every file below `folder` but those just being written, by path from there. Raises OSError."""
    return dict(_stamps(str(folder), ""))


def unchanged(folder: Path, seen: Mapping[str, Seen]) -> bool:
    """Whether `folder` holds the files that were seen, and nothing has been written to since. Reads none of them.

    Raises OSError where this process could not look.
    """
    try:
        return bool(seen) and {name: one.stamp for name, one in seen.items()} == stamps(folder)
    except OSError as error:
        if error.errno in _OUT_OF_MEANS:
            raise
        return False


def examine(folder: Path, manifest_sha256: str, seen: Mapping[str, Seen], reading: Reading) -> Examination:
    """Compare a release's directory with its manifest, which has to have that hash, or any where it is empty.

    What is unchanged since it was `seen` is not read again. Raises Ended, and OSError where this process could not
    look, which says nothing about the release.
    """
    try:
        found = stamps(folder)
        now = {MANIFEST: _look(folder, MANIFEST, found, seen, Reading(reading.from_disk, ended=reading.ended))}
        if manifest_sha256 and now[MANIFEST].sha256 != manifest_sha256:
            return Examination(f"{MANIFEST} is not the one that was recorded")
        listed = _listed(folder)
        if stray := min(found.keys() ^ {*listed, MANIFEST}, default=""):
            what = "is not in its manifest" if stray in found else "is missing"
            return Examination(f"{_shown(stray)} {what}")
        reading.bytes = sum(max(0, found[name].bytes) for name in listed if not _known(name, found, seen))
        for name in sorted(listed, key=lambda name: found[name].bytes):
            now[name] = _look(folder, name, found, seen, reading)
            if now[name].sha256 != listed[name]:
                return Examination(f"{_shown(name)} is not what its manifest says")
    except _Unreadable as error:
        return Examination(str(error))
    except OSError as error:
        if error.errno in _OUT_OF_MEANS:
            raise
        return Examination(f"its directory cannot be read ({error.strerror})")
    return Examination(seen=now)


def dump_seen(seen: Mapping[str, Seen]) -> str:
    """What was seen as JSON."""
    return json.dumps({name: [*one.stamp, one.sha256] for name, one in seen.items()})


def load_seen(text: str) -> dict[str, Seen]:
    """What `dump_seen` has written."""
    return {name: Seen(Stamp(*stamp), sha256) for name, (*stamp, sha256) in json.loads(text).items()}


class _Unreadable(Exception):
    """A file that is there in name only, in a few words."""


def _stamps(folder: str, prefix: str) -> Iterator[tuple[str, Stamp]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _stamps(entry.path, f"{prefix}{entry.name}/")
            elif not fnmatch.fnmatchcase(entry.name, _BEING_WRITTEN):
                yield prefix + entry.name, _stamp(entry)


def _stamp(entry: os.DirEntry[str]) -> Stamp:
    try:
        about = entry.stat()
    except OSError:
        return NO_FILE
    if not stat.S_ISREG(about.st_mode):
        return NO_FILE
    return Stamp(about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino)


def _known(name: str, found: Mapping[str, Stamp], seen: Mapping[str, Seen]) -> bool:
    return name in seen and seen[name].stamp == found[name]


def _look(folder: Path, name: str, found: Mapping[str, Stamp], seen: Mapping[str, Seen], reading: Reading) -> Seen:
    """A file as it was seen before, or as it is read now. Raises _Unreadable."""
    if name not in found:
        raise _Unreadable(f"{_shown(name)} is missing")
    if _known(name, found, seen):
        return seen[name]
    if found[name] == NO_FILE:
        raise _Unreadable(f"{_shown(name)} is no file")
    written = found[name].changed / 1e9
    time.sleep(min(max(written + _CLOCK_SECONDS - time.time(), 0), _CLOCK_SECONDS))
    try:
        return Seen(found[name], _sha256(folder / name, reading))
    except OSError as error:
        if error.errno in _OUT_OF_MEANS:
            raise
        raise _Unreadable(f"{_shown(name)} cannot be read ({error.strerror})") from None


def _sha256(path: Path, reading: Reading) -> str:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_CHUNK))
    with open(path, "rb", buffering=0) as file:
        if reading.from_disk:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while count := file.readinto(buffer):
            if reading.ended.is_set():
                raise Ended
            digest.update(buffer[:count])
            reading.read += count
    return digest.hexdigest()


def _listed(folder: Path) -> dict[str, str]:
    """The hashes in the manifest. Raises _Unreadable."""
    try:
        listed: dict[str, str] = dict(json.loads((folder / MANIFEST).read_bytes())["files"])
    except (OSError, ValueError, KeyError, TypeError):
        raise _Unreadable(f"{MANIFEST} cannot be read") from None
    return listed


def _shown(name: str) -> str:
    return name if name.isprintable() else repr(name)
