"""What keys mean in the spellings of the tools that write them, and texts that are hardly meant."""

from __future__ import annotations

from typing import Any

import pytest

from appliance.data.dropped import Dropped
from appliance.data.fields import level
from appliance.data.formats import to_canonical

ASKED: dict[str, Any] = {"role": "user", "content": "q"}
ANSWERED: dict[str, Any] = {"role": "assistant", "content": "a"}
DIALOGUE: dict[str, Any] = {"messages": [ASKED, ANSWERED]}


@pytest.mark.parametrize(
    ("value", "odd"),
    [
        ("['Paris', 'paris']", "written_by_python"),
        ("{'text': array(['Paris'], dtype=object)}", "written_by_python"),
        ("array(['Paris'])", "written_by_python"),
        (" #N/A ", "no_value"),
        ("<image>\nA cat.", "media_mark"),
        ("Itâ€™s late.", "broken_characters"),
        ("It\ufffds late.", "broken_characters"),
        ("Yes.</s>", "rendered"),
    ],
)
def test_answers_that_are_hardly_meant_are_told(value: str, odd: str) -> None:
    assert to_canonical({"prompt": "q", "completion": value}).odd == (odd,)


@pytest.mark.parametrize("value", ['["Paris"]', '{"a": 1}', "[1, 2]", "Use x['a'] there.", "{x: 1}"])
def test_what_is_meant_as_it_is_says_nothing(value: str) -> None:
    assert to_canonical({"prompt": "q", "completion": value}).odd == ()


@pytest.mark.parametrize(
    ("keys", "of"),
    [
        ("context mask masked cot chain_of_thought rationale tools functions rejected images", "error"),
        ("Context MASK messages[].loss_mask conversation[].documents output_with_loss truncated_cells", "error"),
        ("id source LANG created_at metadata", "note"),
        ("mood messages[].prefix", "warning"),
    ],
)
def test_what_a_key_usually_means_is_known(keys: str, of: str) -> None:
    assert {key: level(key) for key in keys.split()} == dict.fromkeys(keys.split(), of)


@pytest.mark.parametrize("key", ["images", "image", "videos", "video", "audios", "audio"])
def test_what_is_more_than_text_is_dropped(key: str) -> None:
    with pytest.raises(Dropped, match=f"`{key}` holds more than text"):
        to_canonical({**DIALOGUE, key: ["a"]})


@pytest.mark.parametrize("key", ["weight", "loss_weight", "loss", "train", "training", "trainable"])
def test_every_name_of_a_weight_is_read(key: str) -> None:
    found = to_canonical({"messages": [ASKED, {**ANSWERED, key: 0}, ASKED, ANSWERED]})
    assert found.row["messages"][1] == {**ANSWERED, "weight": 0}
    both = {**ANSWERED, "weight": 0, key: 1} if key != "weight" else {**ANSWERED, "weight": 0, "train": True}
    assert to_canonical({"messages": [ASKED, both, ASKED, ANSWERED]}).row["messages"][1]["weight"] == 0


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking", "thought"])
def test_every_name_of_a_thought_is_read(key: str) -> None:
    found = to_canonical({"messages": [ASKED, {**ANSWERED, key: "Hm."}]})
    assert found.row["messages"][1] == {**ANSWERED, "reasoning_content": "Hm."}


@pytest.mark.parametrize(
    "split", ["test", "validation", "valid", "val", "dev", "eval", "evaluation", "test_sft", "test_prefs", "TEST"]
)
def test_every_other_split_is_dropped(split: str) -> None:
    with pytest.raises(Dropped) as caught:
        to_canonical({**DIALOGUE, "split": split})
    assert caught.value.code == "other_split"


@pytest.mark.parametrize("split", ["train", "training", "train_sft", "train_prefs", "Train"])
def test_every_name_of_the_split_to_train_on_is_known(split: str) -> None:
    assert to_canonical({**DIALOGUE, "split": split}).unread == ()


@pytest.mark.parametrize("nothing", ["nan", "None", "null", "NULL", "<NA>", "N/A", "undefined", "#REF!", "[deleted]"])
def test_what_programs_write_for_nothing_is_known(nothing: str) -> None:
    assert to_canonical({"prompt": "q", "completion": nothing}).odd == ("no_value",)


@pytest.mark.parametrize("mark", ["<|im_start|>", "<|start_header_id|>", "[/INST]", "<start_of_turn>", "<|user|>"])
def test_marks_of_chat_templates_are_known(mark: str) -> None:
    assert to_canonical({"prompt": f"{mark}q", "completion": "a"}).odd == ("rendered",)
