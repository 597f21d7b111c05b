"""What the trainers are given of a row: which tokens count, and where an answer begins and ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import FACTS, JUDGEMENTS, PREFERENCES

from appliance.data.tokenizer import load_tokenizer
from appliance.errors import InvalidInput
from appliance.train.dpo import DPO
from appliance.train.examples import Examples
from appliance.train.interruption import Interruption
from appliance.train.kto import KTO, mismatched
from appliance.train.micro_batches import MicroBatchLimit
from appliance.train.rows import IGNORED
from appliance.train.sft import SFT
from appliance.train.trainer import TrainerInputs, build_trainer

SYSTEM = {"role": "system", "content": "Be brief."}
TWO_TURNS = [SYSTEM, *FACTS[0]["messages"], *FACTS[1]["messages"]]


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return load_tokenizer(tiny_model)


def test_sft_counts_the_assistants_turns_with_their_end(tokenizer: Any) -> None:
    (row,) = SFT.examples(tokenizer, {"messages": TWO_TURNS})
    whole = tokenizer.apply_chat_template(TWO_TURNS, return_dict=True)["input_ids"]
    assert row["input_ids"] == whole[: len(whole) - len(tokenizer("\n")["input_ids"])]
    counted = [token for token in row["labels"] if token != IGNORED]
    assert tokenizer.decode(counted) == "It is red.<|im_end|>It is green.<|im_end|>"
    assert all(label in (token, IGNORED) for token, label in zip(row["input_ids"], row["labels"], strict=True))
    assert SFT.length(row) == len(row["input_ids"])


def test_sft_refuses_a_row_without_an_answer(tokenizer: Any) -> None:
    with pytest.raises(InvalidInput) as error:
        SFT.examples(tokenizer, {"messages": TWO_TURNS[:2]})
    assert error.value.code == "nothing_to_train"


def test_dpo_answers_begin_after_the_header_and_end_with_the_turn(tokenizer: Any) -> None:
    (row,) = DPO.examples(tokenizer, {**PREFERENCES[0], "prompt": [*TWO_TURNS, *PREFERENCES[0]["prompt"]]})
    assert tokenizer.decode(row["prompt_ids"]).endswith("the door?<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(row["chosen_ids"]) == "It is red.<|im_end|>"
    assert tokenizer.decode(row["rejected_ids"]) == "I could not say, there are so many colours.<|im_end|>"
    assert DPO.length(row) == len(row["prompt_ids"]) + len(row["rejected_ids"])


def test_dpo_refuses_an_answer_of_several_turns(tokenizer: Any) -> None:
    turns = [*PREFERENCES[0]["chosen"], {"role": "user", "content": "Really?"}, *PREFERENCES[0]["rejected"]]
    with pytest.raises(InvalidInput) as error:
        DPO.examples(tokenizer, {**PREFERENCES[0], "chosen": turns})
    assert error.value.code == "answer_not_one_turn"


def test_kto_keeps_the_answer_and_what_was_thought_of_it(tokenizer: Any) -> None:
    good, bad = (example for row in JUDGEMENTS[:2] for example in KTO.examples(tokenizer, row))
    assert tokenizer.decode(good["prompt_ids"]).endswith("the door?<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(good["completion_ids"]) == "It is red.<|im_end|>"
    assert (good["label"], bad["label"]) == (True, False)
    assert KTO.length(good) == len(good["prompt_ids"]) + len(good["completion_ids"])


def test_kto_pairs_each_prompt_with_an_answer_to_another_of_like_length(tokenizer: Any) -> None:
    examples = [example for row in JUDGEMENTS for example in KTO.examples(tokenizer, row)]
    answered = {tuple(one["completion_ids"]): one["prompt_ids"] for one in examples if one["label"]}
    pairs = mismatched(Examples.of(examples, KTO))
    paired = [*pairs.table]
    assert [one["prompt_ids"] for one in paired] == [one["prompt_ids"] for one in examples]
    for one, length in zip(paired, pairs.lengths, strict=True):
        other = one["KL_completion_ids"]
        assert answered.get(tuple(other)) != one["prompt_ids"]
        assert length == len(one["prompt_ids"]) + max(len(other), len(one["completion_ids"]))
    near = [
        one for one in paired if one["label"] and abs(len(one["KL_completion_ids"]) - len(one["completion_ids"])) < 4
    ]
    assert len(near) >= 5, "all but the longest, which is paired with the shortest or the next longer"
    alike = [examples[0], {**examples[1], "prompt_ids": examples[0]["prompt_ids"]}]
    same = [*mismatched(Examples.of(alike, KTO)).table]
    assert [one["KL_completion_ids"] for one in same] == [one["completion_ids"] for one in same]


def test_building_a_trainer_does_not_round_the_adapter() -> None:
    model = torch.nn.Linear(8, 8)
    model.bias.requires_grad_(False)
    before = model.weight.detach().clone()

    class Rounding:
        """Does to the adapter what TRL does on being built."""

        def __init__(self, model: torch.nn.Linear, train_dataset: Any, **_: Any) -> None:
            model.weight.data = model.weight.data.to(torch.bfloat16)
            self.rows = len(train_dataset)

    rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}, {"input_ids": [1], "labels": [1]}]
    given = TrainerInputs(model, None, Examples.of(rows, SFT), Examples.of([], SFT), MicroBatchLimit(), Interruption())
    trainer = build_trainer(Rounding, None, None, given)
    assert torch.equal(model.weight, before)
    assert (trainer.rows, trainer.row_lengths) == (2, [1, 3]), "by length"
