"""Loading the tokenizer published with a model, the same in every process."""

from __future__ import annotations

import json
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

from appliance.errors import InvalidInput, reason

_GENERIC = ("PreTrainedTokenizerFast", "TokenizersBackend")


def load_tokenizer(folder: Path, clock: date | None = None) -> Any:
    """The tokenizer of the model in `folder`, whose chat template takes `clock` for today (None: what it is).

    Raises InvalidInput where it cannot be used.
    """
    try:
        tokenizer = _loader(folder).from_pretrained(folder, local_files_only=True)
    except Exception as error:  # several libraries read its files, and raise what they like
        raise InvalidInput(
            "no_tokenizer", f"{folder} holds no usable tokenizer: {reason(error)}", "pull the base model again"
        ) from error
    if clock:
        set_clock(tokenizer, clock)
    return tokenizer


def set_clock(tokenizer: Any, day: date) -> None:
    """Let the tokenizer's chat template be told `day` from now on where it asks for today's date."""
    # The name under which templates ask. Those that do not are left alone: not every tokenizer takes other arguments.
    if "strftime_now" in str(tokenizer.chat_template):
        tokenizer.apply_chat_template = partial(tokenizer.apply_chat_template, strftime_now=day.strftime)


def _loader(folder: Path) -> Any:
    """AutoTokenizer, or what it would come to: importing it imports torch, which an import of data does not need."""
    try:
        named = json.loads((folder / "tokenizer_config.json").read_bytes()).get("tokenizer_class")
    except (OSError, ValueError, AttributeError):
        named = None
    if named in _GENERIC and (folder / "tokenizer.json").exists():
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast
    from transformers import AutoTokenizer

    return AutoTokenizer
