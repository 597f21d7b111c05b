"""LLaMA-Factory's dataset_info.json: what the columns of the files beside it are called."""

from __future__ import annotations

from typing import Any

from appliance.data.messages import ROLES, SPEAKER
from appliance.errors import InvalidInput

_COLUMNS = {
    "prompt": "instruction",
    "query": "input",
    "response": "output",
    "messages": "conversations",
    **{
        key: key
        for key in ("history", "system", "tools", "chosen", "rejected", "kto_tag", "images", "videos", "audios")
    },
}
"""What its columns are called here."""
_SPOKEN_BY = {
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
    "function_tag": "assistant",
    "system_tag": "system",
}


def columns_of(entry: dict[str, Any], name: str) -> str:
    """The column map, as `--map` is written, that the entry of the file `name` says; empty: none.

    Raises InvalidInput where it names speakers by words that are not read.
    """
    tags, columns = entry.get("tags"), entry.get("columns")
    if isinstance(tags, dict):
        _require_read(name, tags)
    pairs = ((_COLUMNS.get(key), column) for key, column in columns.items()) if isinstance(columns, dict) else ()
    return ",".join(f"{ours}={column}" for ours, column in pairs if ours and isinstance(column, str) and column != ours)


def _require_read(name: str, tags: dict[str, Any]) -> None:
    wrong = [f"role_tag = {tags['role_tag']!r}"] if tags.get("role_tag", "from") not in SPEAKER else []
    if tags.get("content_tag", "value") not in ("content", "value", "text"):
        wrong.append(f"content_tag = {tags['content_tag']!r}")
    for tag, role in _SPOKEN_BY.items():
        if tag in tags and ROLES.get(str(tags[tag]).lower()) != role:
            wrong.append(f"{tag} = {tags[tag]!r}")
    if wrong:
        raise InvalidInput(
            "unread_tags",
            f"dataset_info.json has a name in the messages of {name} that is not read: {wrong[0]}",
            "write the messages with `role` (user, assistant, system or tool) and `content`",
        )
