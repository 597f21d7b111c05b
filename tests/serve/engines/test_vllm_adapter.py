"""An adapter beside the weights that the real vLLM serves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import aiohttp
import pytest
import torch
from engine_process import Served
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from appliance.errors import InvalidInput
from appliance.release.difference import write_difference

MESSAGES = [{"role": "user", "content": "Name three colours."}]
TOKENS = 12

pytestmark = pytest.mark.slow


@pytest.fixture
def adapter(served: Served, tmp_path: Path) -> tuple[Path, list[int]]:
    """An adapter with which the served model says something else, and the token ids that it then says."""
    if not served.kind.adapter_rank:
        pytest.skip("this engine serves merged weights only")
    torch.manual_seed(0)
    base: Any = AutoModelForCausalLM.from_pretrained(served.model, dtype=torch.float32)
    model: Any = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "o_proj", "down_proj"]))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    tokenizer: Any = AutoTokenizer.from_pretrained(served.model)
    prompt = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    said = model.eval().generate(**prompt, max_new_tokens=TOKENS, do_sample=False)
    return tmp_path / "adapter", said[0, prompt["input_ids"].shape[1] :].tolist()


async def ask(served: Served, model: str) -> tuple[int, dict[str, Any]]:
    body = {"model": model, "messages": MESSAGES, "max_tokens": TOKENS, "temperature": 0}
    connector = aiohttp.UnixConnector(served.address.removeprefix("unix:"))
    async with (
        aiohttp.ClientSession(connector=connector) as session,
        session.post("http://engine/v1/chat/completions", json=body) as response,
    ):
        return response.status, await response.json()


async def test_it_answers_as_in_training_beside_the_weights_and_goes_with_them(
    served: Served, adapter: tuple[Path, list[int]], tmp_path: Path
) -> None:
    files, said = adapter
    tokenizer: Any = AutoTokenizer.from_pretrained(served.model)
    _, before = await ask(served, "r1")
    write_difference(files, None, tmp_path / "unmerged", served.kind.adapter_rank)
    await served.kind.load_adapter(served.address, tmp_path / "unmerged", "r2+adapter")
    await served.kind.load_adapter(served.address, tmp_path / "unmerged", "r2+adapter")
    status, answer = await ask(served, "r2+adapter")
    assert (status, answer["model"]) == (200, "r2+adapter"), answer
    assert answer["choices"][0]["message"]["content"] == tokenizer.decode(said, skip_special_tokens=True)
    _, beside = await ask(served, "r1")
    assert (beside["model"], beside["choices"]) == ("r1", before["choices"])
    assert answer["choices"] != before["choices"]

    await served.kind.reload(served.address, served.model, "r1")
    status, answer = await ask(served, "r2+adapter")
    assert status == 404, "it belonged to the weights before"
    _, after = await ask(served, "r1")
    assert after["choices"] == before["choices"]


async def test_one_that_it_cannot_take_is_refused(
    served: Served, adapter: tuple[Path, list[int]], tmp_path: Path
) -> None:
    with pytest.raises((InvalidInput, ConnectionError)):
        await served.kind.load_adapter(served.address, tmp_path / "nowhere", "r3+adapter")
    status, _ = await ask(served, "r1")
    assert status == 200
