"""Models on the Hub, or a mirror of it that HF_ENDPOINT names: what a repository holds, and its files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from appliance.errors import InvalidInput, NotFound, Unreachable
from appliance.models import MODEL_FILES

TIMEOUT = 10.0
"""Seconds after which the Hub counts as out of reach."""
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Published:
    """The files of a repository that make up a model, at one commit."""

    repo: str
    commit: str
    licence: str
    files: dict[str, Any]
    """What the Hub says of each by its name: size, and SHA-256 or git's hash."""

    @property
    def bytes(self) -> int:
        return sum(file.size or 0 for file in self.files.values())


def look_up(repo: str, gguf: str = "") -> Published:
    """What `repo` holds now, its model files or one `gguf`.

    Raises NotFound, InvalidInput for what is no model to use, and Unreachable.
    """
    from huggingface_hub import HfApi

    with _said_plainly(repo):
        about = HfApi().model_info(repo, timeout=TIMEOUT, files_metadata=True)
    files = {file.rfilename: file for file in about.siblings or ()}
    patterns = (gguf,) if gguf else MODEL_FILES
    wanted = {
        name: file
        for name, file in files.items()
        if "/" not in name and any(fnmatchcase(name, pattern) for pattern in patterns)
    }
    others = sorted(name for name in files if name.endswith(".gguf"))
    if gguf and not wanted:
        raise NotFound("no_such_file", f"{repo} has no {gguf}", f"choose from {', '.join(others) or 'other models'}")
    if not gguf and not any(name.endswith(".safetensors") for name in wanted):
        pickled = any(name.endswith((".bin", ".pt", ".pth")) for name in files)
        why = " (pickle files are not read: they can run code)" if pickled else ""
        next = f"name one of its GGUF files, such as {repo}/{others[0]}" if others else "choose another model"
        raise InvalidInput("incomplete_model", f"{repo} has no weights in safetensors{why}", next)
    licence = (about.card_data.license if about.card_data else None) or ""
    return Published(repo, about.sha or "main", str(licence), wanted)


def fetch(published: Published, names: Iterable[str], directory: Path) -> None:
    """Download files into `directory`: those that are there whole are left, one that is there in part goes on.

    Each is compared with the hash that the Hub has of it. Raises Unreachable, and InvalidInput for another content.
    """
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    for name in names:
        about, final, part = published.files[name], directory / name, directory / f"{name}.part"
        if final.exists() and _is_whole(final, about):
            continue
        final.unlink(missing_ok=True)
        part.touch()
        begun = part.stat().st_size
        if about.size and about.size > constants.MAX_HTTP_DOWNLOAD_SIZE:
            raise InvalidInput(
                "file_too_large",
                f"{name} of {published.repo} is larger than 50 GB, which the Hub does not send as one file",
                "fetch it with the Hub's own client (hf download), then pull with --from",
            )
        if about.size is None or begun < about.size:
            url = hf_hub_url(published.repo, name, revision=published.commit)
            with _said_plainly(published.repo), open(part, "r+b") as file:
                file.seek(begun)
                http_get(
                    url,
                    file,
                    resume_size=begun,
                    headers=build_hf_headers(),
                    expected_size=about.size,
                    displayed_filename=name,
                )
        if not _is_whole(part, about):
            part.unlink()
            raise InvalidInput(
                "wrong_hash", f"{name} did not come as {published.repo} has it", "pull again: that file is fetched anew"
            )
        part.rename(final)


def _is_whole(path: Path, about: Any) -> bool:
    """Whether the file has the content that the Hub's hash is of: SHA-256, of small files git's."""
    size = path.stat().st_size
    if about.size is not None and size != about.size:
        return False
    digest = hashlib.sha256() if about.lfs else hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    published: str = about.lfs.sha256 if about.lfs else about.blob_id
    return digest.hexdigest() == published


@contextmanager
def _said_plainly(repo: str) -> Iterator[None]:
    """The Hub's errors as ours."""
    from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError: its HTTP client varies by version
        GatedRepoError,
        HFValidationError,
        HTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    try:
        yield
    except GatedRepoError:
        raise InvalidInput(
            "gated_model", f"{repo} asks for its terms to be accepted", "accept them on the Hub, then set HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise NotFound("no_such_model", f"the Hub has no model {repo}", "check the name, or set HF_TOKEN") from None
    except HFValidationError:
        advice = "write it as ORG/REPO; a folder, tar or GGUF is taken by --from"
        raise InvalidInput("bad_name", f"{repo!r} is no name of a model on the Hub", advice) from None
    except OfflineModeIsEnabled:
        raise _unreachable("it does not ask the Hub (HF_HUB_OFFLINE is set)") from None
    except HTTPError as error:
        raise _unreachable(f"the connection to the Hub failed ({type(error).__name__})") from None
    except OSError as error:
        if error.errno is not None:
            raise
        raise _unreachable("the connection to the Hub failed") from None


def _unreachable(what: str) -> Unreachable:
    return Unreachable(
        "hub_unreachable", what, "pull again with a network: it goes on where it was; or use --from (folder, tar, GGUF)"
    )
