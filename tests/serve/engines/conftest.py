"""A tiny random model for quick tests, and a real engine process in front of the real small one."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from engine_process import KEY, Served, listening, serving

from appliance.settings import Settings, load_settings
from appliance.traffic import Traffic
from serve.gateway.admission import Route
from serve.gateway.edge import Gateway
from serve.gateway.ledger import Ledger

if TYPE_CHECKING:
    from serve.engines.generation import Generator

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 2 layers whose tokens are single bytes, with a context of 512 tokens."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    directory = tmp_path_factory.mktemp("tiny")
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    names = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={name: id for id, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML
    ).save_pretrained(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(names),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=2,
        bos_token_id=1,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def generator(tiny: Path) -> Iterator[Generator]:
    """The embedded engine on the tiny model, once its thread has begun to count batches."""
    from serve.engines.generation import Generator

    generator = Generator(tiny, kv_cache_gib=0.01, gpu_memory_share=0.5, max_model_len=512)
    while not hasattr(generator._manager, "current_batch"):
        assert generator.alive
        time.sleep(0.01)
    yield generator
    generator.close()


@pytest.fixture(scope="session")
def settings() -> Settings:
    """By APPLIANCE_ENGINE, the embedded engine where it says nothing; a short context so that overflow is cheap."""
    engine = os.environ.get("APPLIANCE_ENGINE", "transformers")
    return load_settings({}, engine=engine, max_model_len=512, kv_cache_gib=0.25, adapter_rank=16)


@pytest.fixture(scope="session")
def served(settings: Settings, smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The engine, serving the real small model as `r1`."""
    with serving(settings, smollm2, tmp_path_factory.mktemp("engine")) as served:
        yield served


@pytest.fixture
def mortal(settings: Settings, smollm2: Path, tmp_path: Path) -> Iterator[Served]:
    """An engine of the test's own, to be killed."""
    with serving(settings, smollm2, tmp_path) as served:
        yield served


@pytest.fixture
async def endpoint(served: Served, tmp_path: Path) -> AsyncIterator[str]:
    """URL of a gateway in front of the engine; its key is KEY."""
    gateway = Gateway({KEY: "k1"}.get, Ledger(Traffic(tmp_path / "traffic.db")), served.kind)
    gateway.route(Route(served.address, served.name))
    async with listening(gateway) as url:
        yield url
