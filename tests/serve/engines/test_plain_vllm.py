"""An exported release on vLLM as it comes: its own API server, and nothing of ours in it."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from controlling import Control
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from appliance.home import Home, sha256
from appliance.release.conclude import finalise
from appliance.release.gates import Gate
from appliance.settings import Settings
from appliance.train.recipe import Given, Recipe, dump_recipe, parse_recipe
from appliance.worker import main
from serve.engines.choose import choose_engine

pytestmark = pytest.mark.slow

ASK = [{"role": "user", "content": "Name three colours."}]
TOKENS = 16


def adapt(base: Path, folder: Path) -> None:
    """An adapter with random weights, with which the model says something else."""
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "o_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)


@pytest.fixture
async def exported(settings: Settings, smollm2: Path, tmp_path: Path) -> Path:
    """A release of the small model with other weights than its base's, as `export` writes it."""
    if choose_engine(settings).name != "vllm":
        pytest.skip("it is about vLLM")
    home = Home(tmp_path / "home")
    home.create()
    shutil.copytree(smollm2, home.models / "smollm2", copy_function=shutil.copy)
    run = home.runs / "random-1"
    adapt(smollm2, run / "adapter")
    given = Given(sha256=sha256(run / "adapter" / "adapter_model.safetensors"))
    (run / "recipe.toml").write_text(dump_recipe(Recipe(name="random", base="smollm2", given=given)))
    for stage in ("merge", "verify"):
        assert main(run, stage) == 0
    recipe = parse_recipe((run / "recipe.toml").read_text())
    finalise(home, run.name, recipe, {name: Gate(True) for name in ("parity", "stopping")})
    control = Control(home.root)
    control.supervisor.releases.add(run.name, "smollm2", "verified", "", {}, promote=False)
    await control.client.export(run.name, tmp_path / "out")
    await control.client.close()
    return tmp_path / "out"


@contextmanager
def vllm(model: Path, log: Path) -> Iterator[httpx.Client]:
    """A client of vLLM's own server of `model`."""
    socket = log.with_suffix(".sock")
    argv = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--uds", str(socket)]
    argv += ["--max-model-len", "512", "--dtype", "float32", "--gpu-memory-utilization", "0.3"]
    cpu = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_CI_ENV": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            argv, env={**os.environ, **cpu, "VLLM_NO_USAGE_STATS": "1"}, stdout=output, stderr=output, process_group=0
        )
    try:
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(socket)), base_url="http://vllm", timeout=60) as client:
            deadline = time.monotonic() + 600
            while not _healthy(client):
                assert process.poll() is None, log.read_text()[-4000:]
                assert time.monotonic() < deadline, log.read_text()[-4000:]
                time.sleep(0.5)
            yield client
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _healthy(client: httpx.Client) -> bool:
    try:
        return client.get("/health").status_code == 200
    except httpx.TransportError:
        return False


def greedy(folder: Path) -> str:
    """What Transformers answers."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt: Any = tokenizer.apply_chat_template(ASK, add_generation_prompt=True, return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    answer = model.generate(**prompt, max_new_tokens=TOKENS, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    return str(tokenizer.decode(answer, skip_special_tokens=True))


async def test_it_answers_as_transformers_does(exported: Path, smollm2: Path, tmp_path: Path) -> None:
    wanted = greedy(exported)
    assert wanted != greedy(smollm2)

    def ask() -> dict[str, Any]:
        with vllm(exported, tmp_path / "vllm.log") as client:
            body = {"model": str(exported), "messages": ASK, "max_tokens": TOKENS, "temperature": 0}
            answer: dict[str, Any] = client.post("/v1/chat/completions", json=body).json()
            return answer

    answer = await asyncio.to_thread(ask)
    assert answer["choices"][0]["message"]["content"] == wanted
