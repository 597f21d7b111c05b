"""The peer: a plain TRL script, as its documentation writes one, on the same model, rows, adapter, precision and batch.

Everything that is not said on the command line is TRL's default. It trains one pass over ROWS.jsonl; the last line is
{"tokens", "seconds", "peak"}: tokens without padding, seconds of the steps, bytes (resident, or of the GPU).
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
from trl import SFTConfig, SFTTrainer

ON_GPU = torch.cuda.is_available()
DTYPE = torch.bfloat16 if ON_GPU else torch.float32


class Clock(TrainerCallback):
    """Seconds inside the steps, and their tokens, from where they count."""

    seconds = 0.0
    uncounted = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.begun = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if ON_GPU:
            torch.cuda.synchronize()
        self.seconds += time.monotonic() - self.begun
        if state.global_step == given.after:
            self.seconds, self.uncounted = 0.0, state.num_input_tokens_seen


parser = argparse.ArgumentParser()
parser.add_argument("model", type=Path)
parser.add_argument("rows", type=Path)
parser.add_argument("--adapter", choices=("lora", "qlora"), default="lora")
parser.add_argument("--batch-size", type=int, default=8)
parser.add_argument("--max-length", type=int, default=1024)
parser.add_argument("--learning-rate", type=float, default=2e-4)
parser.add_argument("--sampling", default="random", help="group_by_length: batches of rows of like length")
parser.add_argument("--seed", type=int, default=17)
parser.add_argument("--after", type=int, default=0, help="steps before those that count")
parser.add_argument("--save", type=Path, help="where the adapter goes")
given = parser.parse_args()

quantisation = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=DTYPE,
)
model = AutoModelForCausalLM.from_pretrained(
    given.model,
    dtype=DTYPE,
    quantization_config=quantisation if given.adapter == "qlora" else None,
    device_map={"": 0} if ON_GPU else None,
)
conversations = [json.loads(line)["messages"] for line in given.rows.read_text().splitlines()]
clock = Clock()
trainer = SFTTrainer(
    model=model,
    processing_class=AutoTokenizer.from_pretrained(given.model),
    train_dataset=Dataset.from_list([{"prompt": turns[:-1], "completion": turns[-1:]} for turns in conversations]),
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    args=SFTConfig(
        output_dir="/tmp/plain-trl",
        per_device_train_batch_size=given.batch_size,
        num_train_epochs=1,
        max_length=given.max_length,
        learning_rate=given.learning_rate,
        lr_scheduler_type="constant",
        seed=given.seed,
        train_sampling_strategy=given.sampling,
        bf16=ON_GPU,
        use_cpu=not ON_GPU,
        include_num_input_tokens_seen="non_padding",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    ),
    callbacks=[clock],
)
trainer.train()
if given.save:
    trainer.model.save_pretrained(given.save)
peak = torch.cuda.max_memory_allocated() if ON_GPU else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
tokens = trainer.state.num_input_tokens_seen - clock.uncounted
print(json.dumps({"tokens": tokens, "seconds": clock.seconds, "peak": peak}))
