"""Whether a release from elsewhere can be served: `python -m appliance.release.foreign HOME_ROOT REQUEST RESULT`.

What hashes cannot say of an archive: that nothing in it can run code, and that its configuration, tokenizer and chat
template do what such files do. A process of its own, because all of that is read by code that was made for files
which one trusts.
"""

from __future__ import annotations

import fnmatch
import math
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import psutil
from pydantic import BaseModel

from appliance.errors import ApplianceError, InvalidInput, reason
from appliance.home import write_json
from appliance.models import MODEL_FILES, check_model, check_weights

FILES = (
    *MODEL_FILES,
    "*.md",
    "*.txt",
    "manifest.json",
    "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
    "adapter/README.md",
)
"""What a release consists of. PEFT's files beside the weights, instead of in `adapter/`, would change the model."""
MEMORY = 2 << 30
"""Bytes that reading configuration, tokenizer and template may take."""
SECONDS = 60
LONGEST_PROMPT = 4096
"""Tokens that a template may make of one short question."""
_QUESTION = "Say hello."


class ForeignRequest(BaseModel):
    """The directory of the release, and what it is called."""

    folder: Path
    name: str


def check_foreign(folder: Path) -> None:
    """Raise InvalidInput unless the release in `folder` can be served, as far as that can be seen without an engine."""
    try:
        for path in sorted(path for path in folder.rglob("*") if not path.is_dir()):
            if not _belongs(path.relative_to(folder).as_posix()):
                raise _unfit(f"{path.name!r} is no file of a release")
            if path.suffix == ".safetensors":
                check_weights(path)
        check_model(folder)
        _load(folder)
    except InvalidInput:
        raise
    except Exception as error:
        raise _unfit(reason(error)) from error


def _belongs(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for pattern in FILES)


def _load(folder: Path) -> None:
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    from appliance.data.render import render_prompt
    from appliance.data.tokenizer import load_tokenizer

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES | MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise _unfit(f"it is a {config.model_type}, which is no language model")
    tokenizer = load_tokenizer(folder)
    ids = render_prompt(tokenizer, [{"role": "user", "content": _QUESTION}])
    if len(ids) > LONGEST_PROMPT or _letters(_QUESTION) not in _letters(tokenizer.decode(ids)):
        raise _unfit(f"its chat template makes {len(ids)} tokens of a short question, or leaves it out")


def _letters(text: str) -> str:
    """What no tokenizer changes of a text."""
    return "".join(filter(str.isalpha, text.lower()))


def _bound() -> None:
    """Let this process end what takes too much time or memory: by an exception, else by its own death."""

    def end(*_: object) -> None:
        raise TimeoutError(f"reading it takes longer than {SECONDS} s")

    import transformers  # noqa: F401 - what it takes itself does not count

    limit = psutil.Process().memory_info().vms + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    used = psutil.Process().cpu_times()
    seconds = math.ceil(used.user + used.system) + 5 * SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    signal.signal(signal.SIGALRM, end)
    # Again and again: code that is just imported may take the first for a fault of its own.
    signal.setitimer(signal.ITIMER_REAL, SECONDS, 1)


def _unfit(what: str) -> InvalidInput:
    return InvalidInput("bad_archive", what, "")


def main(home_root: Path, request: Path, result: Path) -> None:
    """Leave {} in `result`, or {"problem"}."""
    asked = ForeignRequest.model_validate_json(request.read_bytes())
    outcome: dict[str, Any] = {}
    _bound()
    try:
        check_foreign(asked.folder)
    except ApplianceError as error:
        what = error.message.replace(str(asked.folder), asked.name)
        next = "take it from the box that made it, by `appliance export`"
        outcome["problem"] = InvalidInput("bad_archive", f"the release cannot be imported: {what}", next).problem()
    signal.setitimer(signal.ITIMER_REAL, 0)
    write_json(result, outcome)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
