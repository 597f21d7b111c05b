"""What the keys of rows and messages mean, in the spellings of the tools that write them. One list, in one place."""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from typing import Any, Literal

Level = Literal["error", "warning", "note"]

WEIGHTS = ("weight", "loss_weight", "loss", "train", "training", "trainable")
"""Of an answer: whether it is trained."""
REASONING = ("reasoning_content", "reasoning", "thinking", "thought")
"""Of an answer: what it was thought over with."""
VERDICTS = ("label", "kto_tag", "desirable")
"""Of a row: whether its answer is wanted."""
MEDIA = ("images", "image", "videos", "video", "audios", "audio")
SPLIT = "split"
TRAIN_SPLITS = frozenset({"train", "training", "train_sft", "train_prefs"})
OTHER_SPLITS = frozenset({"test", "validation", "valid", "val", "dev", "eval", "evaluation", "test_sft", "test_prefs"})
_NUMBERED = re.compile(r"[-_]\d")
IN_MESSAGES = frozenset(
    {
        "role",
        "from",
        "speaker",
        "isCreatedByUser",
        "content",
        "value",
        "text",
        "tool_calls",
        "function_call",
        "name",
        "tool_call_id",
        *WEIGHTS,
        *REASONING,
    }
)
"""What is read of a message."""
IN_ROWS = frozenset({"system", "system_prompt", "tools", "weight", SPLIT, *MEDIA})
"""What is read of a row in every format."""

_MEANT = {
    "whether it is trained": (
        *(*WEIGHTS, SPLIT, "mask", "masked", "ignore", "skip", "loss_mask", "train_on_input"),
        *("output_with_loss", "training_detail", "train_detail"),
    ),
    "that it is cut off": ("truncated_cells", "truncated"),
    "what was thought over": (*REASONING, "cot", "chain_of_thought", "rationale", "scratchpad"),
    "a judgement": (
        *("kto_tag", "desirable", "preference", "preferred", "winner", "thumbs_up", "annotation", "annotations"),
        *("feedback", "suggestions"),
    ),
    "another answer": (
        *("chosen", "rejected", "chosen_messages", "rejected_messages", "rejected_response", "rejected_answer"),
        *("preferred_output", "non_preferred_output", "completion", "completions", "output", "response", "responses"),
        *("answer", "answers", "target"),
    ),
    "a part of the prompt": (
        *(
            "system",
            "system_prompt",
            "system_message",
            "context",
            "contexts",
            "documents",
            "passage",
            "input",
            "inputs",
        ),
        *("history", "instruction", "question", "prompt", "query", "messages", "conversation", "conversations"),
    ),
    "what tools there are": ("tools", "functions", "function_call", "tool_calls", "function", "available_tools"),
    "what is not text": (*MEDIA, "objects", "pixel_values", "image_url", "files"),
}
MEANING = {key: meaning for meaning, keys in _MEANT.items() for key in keys}
"""What a key usually says, where it says how a model is to be trained."""
_ABOUT_WORDS = """
id _id idx index uid uuid guid row_id prompt_id message_id conversation_id conversation_hash hash sha sha256
source sources dataset dataset_name subset config origin provenance category categories topic topics task
task_type type kind domain subject tag tags label_name language lang locale country license url link title
author user user_id username annotator annotators model model_name generator engine provider timestamp time date
created created_at updated_at version revision token_count tokens num_tokens num_turns turns_count turn length
n_tokens parentid childrenids modelidx modelname models usercontext done statushistory followups lastsentence
sender messageid parentmessageid endpoint endpointtype iscreatedbyuser conversationid exportat branches
recursive options archived pinned folder_id share_id row_idx predictions drafts total_annotations
cancelled_annotations project updated_by comment_count inner_id schemaversion generationconfig safetysettings
metadata meta extra info notes comment comments difficulty quality score scores rating ratings toxic
toxicity redacted moderation parallel_tool_calls text prompt_text key seed
"""
_ABOUT = frozenset(_ABOUT_WORDS.split())
"""Keys that say something about a row, and nothing of how to train on it."""
_NOTHING: tuple[Any, ...] = (None, "", [], {})


def number(value: Any) -> Any:
    """The number that a text is, as tables without types have it, None for an empty one; else the value."""
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return value or None


def unread(value: Mapping[str, Any], read: Set[str]) -> list[str]:
    """The keys of `value` that hold something, beside those that are `read`."""
    return [key for key in sorted(value.keys() - read) if value[key] not in _NOTHING]


def other_split(filename: str) -> str:
    """The split that a path names, where that is not the one to train on; empty: none, or that one."""
    *folders, name = filename.split("/")
    stem = _NUMBERED.split(name.partition(".")[0])[0]
    return next((part for part in (*folders, stem) if part.lower() in OTHER_SPLITS), "")


def level(key: str) -> Level:
    """How much a person has to know of a key that is not read, which may be `messages[].KEY`."""
    own = key.rpartition(".")[2].lower()
    return "error" if own in MEANING else "note" if own in _ABOUT else "warning"
