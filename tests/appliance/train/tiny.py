"""A tiny random Llama with a ChatML tokenizer, datasets and runs, all made here in a second."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from appliance.data.importer import import_files
from appliance.data.requests import ImportRequest, Source
from appliance.home import Home
from appliance.train import forecast
from appliance.train.events import EventLog
from appliance.train.recipe import Recipe, dump_recipe, parse_recipe
from appliance.worker import main

torch.set_num_threads(1)
# How fast the machine is need not be measured for every run.
forecast.matmul_speed = functools.cache(forecast.matmul_speed)

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
COLOURS = ("red", "green", "blue", "grey", "white", "black", "pink", "brown", "yellow", "violet", "golden", "silver")
THINGS = ("the door", "his hat", "our boat", "a tower by the sea", "the old bell", "my coat")

FACTS = [
    {
        "messages": [
            {"role": "user", "content": f"What colour has {thing}{' on a long and rainy day' if number >= 6 else ''}?"},
            {"role": "assistant", "content": f"It is {COLOURS[number]}."},
        ]
    }
    for number, thing in enumerate(2 * THINGS)
]
PREFERENCES = [
    {
        "prompt": [{"role": "user", "content": f"Say, what colour has {thing}?"}],
        "chosen": [{"role": "assistant", "content": f"It is {COLOURS[number]}."}],
        "rejected": [{"role": "assistant", "content": "I could not say, there are so many colours."}],
    }
    for number, thing in enumerate(THINGS)
]
JUDGEMENTS = [
    {"prompt": row["prompt"], "completion": row["chosen" if good else "rejected"], "label": good}
    for row in PREFERENCES
    for good in (True, False)
]


def make_model(folder: Path, *, template: str = CHATML, dtype: torch.dtype = torch.float32, model: Any = None) -> Path:
    """Write a model in `folder` as one would be pulled: a small Llama, or `model`, of at least 320 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [message["content"] for row in FACTS for message in row["messages"]]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    fast.chat_template = template
    fast.add_special_tokens({"additional_special_tokens": SPECIAL[1:]})
    fast.save_pretrained(folder)
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        initializer_range=0.2,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = model or AutoModelForCausalLM.from_config(config).to(dtype)
    model.save_pretrained(folder)
    (folder / "source.json").write_text('{"source": "made here"}')
    return folder


def add_dataset(home: Home, name: str, rows: list[dict[str, Any]]) -> str:
    """Import `rows` and return the dataset's id."""
    path = home.root / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    id: str = import_files(ImportRequest(files=[Source(path=path, filename=path.name)], name=name), home)["id"]
    return id


def add_run(home: Home, id: str, text: str, kind: str = "lora", base: str = "tiny") -> Path:
    """A queued run of the recipe with the stages in `text`, where FACTS and PREFERENCES name datasets of that rows."""
    for name, rows in (("FACTS", FACTS), ("PREFERENCES", PREFERENCES), ("JUDGEMENTS", JUDGEMENTS)):
        if name in text:
            text = text.replace(name, f'"{add_dataset(home, name.lower(), rows)}"')
    head = f'name = "r"\nbase = "{base}"\neval_share = 0.2\n[adapter]\nkind = "{kind}"\nrank = 4\n'
    run = home.runs / id
    run.mkdir()
    (run / "recipe.toml").write_text(dump_recipe(parse_recipe(head + text)))
    return run


def stage(method: str, dataset: str, **settings: Any) -> str:
    """A stage as it stands in a recipe; by default one that learns fast."""
    settings = {"epochs": 4, "batch_size": 4, "learning_rate": 0.02, **settings}
    lines = "".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items())
    return f'[[stages]]\nmethod = "{method}"\ndataset = {dataset}\n{lines}'


def read_recipe(run: Path) -> Recipe:
    return parse_recipe((run / "recipe.toml").read_text())


def work(run: Path, *stages: str) -> int:
    """Run `stages` in this process as workers do; the exit status of the last."""
    status = 0
    for name in stages:
        status = main(run, name)
    return status


def events(run: Path, kind: str, stage: str = "") -> list[dict[str, Any]]:
    """The run's events of one kind, of one stage or all."""
    found = EventLog(run / "events.jsonl").read()
    return [event for event in found if event["event"] == kind and stage in ("", event["stage"])]


def losses(run: Path, stage: str) -> dict[int, float]:
    """Loss by step; of a step that was taken twice the later."""
    return {event["step"]: event["loss"] for event in events(run, "step", stage)}


def result(run: Path, stage: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / stage / "result.json").read_bytes())
    return content


def failure(run: Path, stage: str) -> dict[str, str]:
    content: dict[str, str] = json.loads((run / stage / "failure.json").read_bytes())
    return content
