"""The peer: a plain TRL script, as its documentation writes one, on the same model, rows, adapter and batch.

plain_trl.py MODEL ROWS.jsonl LENGTH STEPS; the last line is {"tokens_per_second", "peak"} (no padding; bytes).
"""

from __future__ import annotations

import json
import statistics
import sys
import time

import psutil
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
from trl import SFTConfig, SFTTrainer

model_path, rows_path, length, steps = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
on_gpu = torch.cuda.is_available()


class Rate(TrainerCallback):
    """Tokens a second and memory of each step."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.peak = 0

    def on_step_begin(self, args, state, control, **_):  # type: ignore[no-untyped-def]
        self.begun, self.before = time.monotonic(), state.num_input_tokens_seen

    def on_step_end(self, args, state, control, **_):  # type: ignore[no-untyped-def]
        if on_gpu:
            torch.cuda.synchronize()
        self.rates.append((state.num_input_tokens_seen - self.before) / (time.monotonic() - self.begun))
        self.peak = torch.cuda.max_memory_allocated() if on_gpu else max(self.peak, psutil.Process().memory_info().rss)


quantisation = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16 if on_gpu else torch.float32,
)
model = AutoModelForCausalLM.from_pretrained(
    model_path,
    dtype=torch.bfloat16 if on_gpu else torch.float32,
    quantization_config=quantisation,
    device_map={"": 0} if on_gpu else None,
)
with open(rows_path) as lines:
    rows = [{"messages": json.loads(line)["messages"]} for line in lines]
rate = Rate()
trainer = SFTTrainer(
    model=model,
    processing_class=AutoTokenizer.from_pretrained(model_path),
    train_dataset=Dataset.from_list(rows),
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    args=SFTConfig(
        output_dir="/tmp/plain-trl",
        per_device_train_batch_size=1,
        max_steps=steps,
        max_length=length,
        learning_rate=1e-4,
        bf16=on_gpu,
        use_cpu=not on_gpu,
        include_num_input_tokens_seen="non_padding",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    ),
    callbacks=[rate],
)
trainer.train()
print(json.dumps({"tokens_per_second": round(statistics.median(rate.rates[3:]), 1), "peak": rate.peak}))
