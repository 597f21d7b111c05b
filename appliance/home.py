"""Where everything lives on disk, and how a directory comes into being whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from appliance.errors import ApplianceError, Conflict, InvalidInput, NoSpace
from appliance.settings import Settings
from appliance.words import size

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
"""What a model, dataset or recipe may be called: it names a directory or is shown in one line. `is_name` asks it."""

_SOCKET_PATH_LIMIT = 107
_FICLONE = 0x40049409
"""The request of ioctl_ficlone(2), which Python's fcntl names from 3.13 on."""
_SERVICE_SOCKET = Path("/run/appliance/control.sock")


class Home:
    """The directory tree of one appliance."""

    def __init__(self, root: Path, socket: str = "") -> None:
        self.root = root
        self._socket = socket

    def __repr__(self) -> str:
        return f"Home({self.root})"

    @property
    def database(self) -> Path:
        return self.root / "appliance.db"

    @property
    def traffic(self) -> Path:
        """What the endpoint was asked, and what people say about its answers: another database, because that of the
        state must never wait for this one."""
        return self.root / "traffic.db"

    @property
    def lock(self) -> Path:
        return self.root / "daemon.lock"

    @property
    def models(self) -> Path:
        return self.root / "models"

    @property
    def datasets(self) -> Path:
        return self.root / "datasets"

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    @property
    def releases(self) -> Path:
        return self.root / "releases"

    @property
    def engines(self) -> Path:
        """Sockets and logs of engine processes; nothing here outlives its process."""
        return self.root / "engines"

    def engine_socket(self) -> Path:
        """A name for the socket of one engine process: a new one each time."""
        return self.engines / f"{secrets.token_hex(4)}.sock"

    @property
    def incoming(self) -> Path:
        """Uploads on their way to becoming datasets; emptied when the daemon starts."""
        return self.root / "incoming"

    @property
    def compiled(self) -> Path:
        """What workers and engines have compiled, which their next start finds again."""
        return self.root / "compiled"

    def control_socket(self) -> Path:
        """The control API's socket of the daemon that serves this home."""
        return Path(self._socket) if self._socket else self.root / "control.sock"

    def create(self) -> None:
        """Make the tree, private to its owner. Raises InvalidInput where it cannot be written."""
        for whose, path, remedy in (
            ("the control socket", self.control_socket(), "set APPLIANCE_SOCKET to a shorter path, or choose a"),
            ("an engine's socket", self.engine_socket(), "choose a"),
        ):
            if len(os.fsencode(path)) > _SOCKET_PATH_LIMIT:
                raise InvalidInput(
                    "socket_path_too_long",
                    f"the path of {whose}, {path}, is longer than a socket's may be",
                    f"{remedy} shorter APPLIANCE_HOME",
                )
        try:
            folders = (self.models, self.datasets, self.runs, self.releases, self.engines, self.incoming, self.compiled)
            for path in folders:
                path.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise disk_error(error, self.root) from error


def is_name(text: str) -> bool:
    """Whether a model, dataset or recipe may be called so."""
    return re.fullmatch(NAME_PATTERN, text) is not None


def find_socket(settings: Settings) -> Path:
    """The socket of the daemon that a person means: that of the settings, else the service's, else one's own.

    Who names a home means the daemon of that home. A directory of a person's own never hides the service.
    """
    if not settings.socket and settings.home == Settings().home and is_there(_SERVICE_SOCKET):
        return _SERVICE_SOCKET
    return Home(settings.home, settings.socket).control_socket()


def is_there(path: Path) -> bool:
    """Whether there is anything at `path`; what may not be looked at is there."""
    try:
        return path.exists()
    except PermissionError:
        return True


def disk_error(error: OSError, path: Path) -> ApplianceError:
    """The one-line error for an OSError met while working below `path`: what it says, of the file that it names."""
    where = error.filename if isinstance(error.filename, str) else path
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return NoSpace("no_space", f"the disk under {path} is full", "free some space, then try again")
        case errno.EROFS:
            return InvalidInput("read_only", f"the disk of {where} is read only", "mount it writable, then try again")
        case errno.EACCES | errno.EPERM:
            return InvalidInput("not_permitted", f"{where} may not be used: {error.strerror}", "check its owner")
        case errno.ENOTDIR:
            return InvalidInput("not_a_directory", f"a part of {where} is a file", "choose a path of directories")
        case errno.ENOENT:
            return Conflict("file_missing", f"{where} is not there, or is no more", "look at what there is, try again")
        case errno.EMFILE | errno.ENFILE:
            return ApplianceError(
                "too_many_files", "too many files and connections are open", "close some, or raise the limit of files"
            )
        case errno.EIO:
            return ApplianceError("disk_failed", f"the disk under {where} reports an error", "check it: see `dmesg`")
    return ApplianceError("system_error", f"{where}: {error.strerror or error}", "see the log")


def require_space(path: Path, needed: int, purpose: str) -> None:
    """Raise NoSpace unless `needed` bytes (and 64 MiB to spare) are free on the disk of `path`."""
    existing = path
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed + (64 << 20):
        raise NoSpace(
            "no_space",
            f"{purpose} needs {size(needed)} and {size(free)} are free on {existing}",
            "free some space, then try again",
        )


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hashes(root: Path) -> dict[str, str]:
    """SHA-256 of every file below `root` by its path from there."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): sha256(path) for path in files}


def copy_file(source: Path, target: Path) -> None:
    """Copy a file; where the file system can, the two share their blocks until one of them is written to."""
    with open(source, "rb") as original, open(target, "wb") as copy:
        try:
            fcntl.ioctl(copy, _FICLONE, original.fileno())
            return
        except OSError:
            pass
    shutil.copyfile(source, target)


def fsync_directory(path: Path) -> None:
    """Make the names in `path` durable."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` when the context ends: a reader sees the old file or the new one, whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


def write_atomic(path: Path, content: bytes) -> None:
    """Replace `path` with `content`."""
    with replacing(path) as file:
        file.write(content)


def json_bytes(value: Any) -> bytes:
    """`value` as indented JSON."""
    return json.dumps(value, indent=1, ensure_ascii=False).encode() + b"\n"


def write_json(path: Path, value: Any) -> None:
    """`write_atomic` of `value` as indented JSON."""
    write_atomic(path, json_bytes(value))


def fsync_tree(root: Path) -> None:
    """Make every file and name below `root` durable."""
    for directory, _, names in os.walk(root):
        for name in names:
            handle = os.open(Path(directory) / name, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        fsync_directory(Path(directory))


@contextlib.contextmanager
def building(final: Path) -> Iterator[Path]:
    """Yield a temporary directory beside `final`; on success it is made durable and becomes `final`.

    On an error, or a kill, `final` does not exist; leftovers are removed by the next attempt. `final` must not exist.
    """
    temporary = final.with_name(f".{final.name}.building")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True, mode=0o700)
        yield temporary
        fsync_tree(temporary)
        os.rename(temporary, final)
        fsync_directory(final.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
