"""An adapter that was trained elsewhere: what lies beside its weights, and whether it is meant for a base. No torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from appliance.errors import InvalidInput
from appliance.models import published_as, template_and_end, tensor_names

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""What PEFT calls the files of an adapter."""
_PICKLED = ("adapter_model.bin", "adapter_model.pt")
_COPIES = ("-unsloth-bnb-4bit", "-bnb-4bit")
"""What repositories that hold another's weights in 4 bits are called after theirs."""


class About(BaseModel):
    """What an adapter says of itself, in its own directory."""

    config: dict[str, Any]
    """Its settings as PEFT has them."""
    chat_template: str = ""
    """The one that was saved with it; empty: none."""
    eos_token: str = ""


def read_about(adapter: Path) -> About:
    """What the directory `adapter` says of the adapter in it. Raises InvalidInput where it holds none that is read."""
    config = _json(adapter / CONFIG)
    if not config:
        raise _bad(f"{adapter} holds no {CONFIG} that can be read", "name the directory that PEFT saved")
    if not (adapter / WEIGHTS).is_file():
        if pickled := next((name for name in _PICKLED if (adapter / name).is_file()), ""):
            raise _bad(
                f"{adapter} holds a pickled adapter ({pickled}), which is not read: it can run code",
                f"load and save it with PEFT, which writes {WEIGHTS}",
            )
        raise _bad(f"{adapter} holds no {WEIGHTS}", "name the directory that PEFT saved")
    if any(".default." in name for name in tensor_names(adapter / WEIGHTS)):
        raise _bad(
            f"the tensors of {adapter / WEIGHTS} are named as in memory (lora_A.default), not as PEFT saves them",
            "save it with PEFT's save_pretrained, or take `.default` out of the names",
        )
    template, eos = template_and_end(adapter)
    return About(config=config, chat_template=template, eos_token=eos)


def require_meant_for(base: Path, about: About, *, same_base: bool, base_template: bool) -> None:
    """Raise InvalidInput where the adapter says that it is for other weights or another template than `base` has.

    A person may have said that the weights are the `same_base`'s, or that the `base_template` is to be served.
    """
    named = str(about.config.get("base_model_name_or_path") or "")
    if named and not same_base and _tail(named) not in {base.name.lower(), _tail(published_as(base))} - {""}:
        raise InvalidInput(
            "another_base",
            f"the adapter says that it was trained on {named}, and not on {base.name}",
            "name its own base (--base), or say that these are the same weights (--same-base)",
        )
    template, eos = template_and_end(base)
    other = about.chat_template and about.chat_template.strip() != template.strip()
    if (other or (about.eos_token and eos and about.eos_token != eos)) and not base_template:
        what = "chat template" if other else f"end token, {about.eos_token},"
        raise InvalidInput(
            "another_template",
            f"the adapter was saved with a {what} of its own, and its release would be served with that of {base.name}",
            "pull its base with its own tokenizer files (`appliance pull --from`), or say that the base's is meant "
            "(--base-template)",
        )


def _tail(name: str) -> str:
    """The last part of a path or of a repository's name, as it is compared."""
    tail = name.rstrip("/").rpartition("/")[2].lower()
    return next((tail.removesuffix(copy) for copy in _COPIES if tail.endswith(copy)), tail)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _bad(message: str, next: str) -> InvalidInput:
    return InvalidInput("bad_adapter", message, next)
