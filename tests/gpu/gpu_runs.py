"""Runs, a forecast, an engine and the checks of a GPU, on the processor; imported by gpu_process.py.

The layers are those of a GPU: bitsandbytes' 4 bits, bf16 under autocast, packed rows. What a processor has not is stood
in for.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from peft.tuners.lora import LoraLayer
from tiny import add_run, make_model, read_recipe, stage, work
from torch.nn.functional import scaled_dot_product_attention
from transformers import MistralConfig, MistralForCausalLM, PreTrainedModel

from appliance import gpu, probe_gpu
from appliance.home import Home
from appliance.train import forecast, order
from appliance.train.stage import forecast_of
from appliance.train.trainer import MicroBatchTrainer
from serve.engines.generation import Generator

CARD = gpu.Card(0, "GPU-1", "a card", 24 << 30, 0, 0)
PEAK = 12345678
"""Bytes that the card says it has held at most."""
WINDOW = 16
"""Tokens that the model's attention reaches back: fewer than a row has."""
RUNS = {
    "qlora": ("qlora", stage("sft", "FACTS", epochs=20) + stage("dpo", "PREFERENCES", epochs=2, learning_rate=1e-3)),
    "kto": ("qlora", stage("kto", "JUDGEMENTS", max_steps=2)),
    "lora": ("lora", stage("sft", "FACTS", epochs=20)),
}
"""The adapter's kind, and the stages; `kto` is not merged."""


class Seen:
    """What is seen of training steps and of the kernel for packed rows, by run and stage."""

    def __init__(self) -> None:
        self.now = ""
        self.steps: dict[str, dict[str, list[str]]] = defaultdict(dict)
        self.packed: dict[str, list[int]] = defaultdict(list)

    def step(self, trainer: MicroBatchTrainer, model: Any, *arguments: Any, **named: Any) -> Any:
        """A training step, and what it is made of."""
        layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
        # Transformers wraps their forward pass.
        wholes = {type(whole).__name__ for whole in (model, model.get_base_model())}
        products: set[str] = set()
        hooks = [
            layer.register_forward_hook(lambda _, given, out: products.update(map(str, (given[0].dtype, out.dtype))))
            for layer in layers
        ]
        loss = _step(trainer, model, *arguments, **named)
        for hook in hooks:
            hook.remove()
        self.steps[self.now] = {
            "layers": sorted({type(layer.get_base_layer()).__name__ for layer in layers}),
            "adapter": sorted({str(weight.dtype) for weight in model.parameters() if weight.requires_grad}),
            "gradients": sorted({str(weight.grad.dtype) for weight in model.parameters() if weight.grad is not None}),
            "products": sorted(products),
            "fused": sorted({type(layer).__name__ for layer in model.modules() if "forward" in vars(layer)} - wholes),
            "pinned": [str(trainer.args.dataloader_pin_memory)],
        }
        return loss

    def kernel(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bounds: torch.Tensor,
        key_bounds: torch.Tensor,
        *_: Any,
        scale: float | None,
        window_size: tuple[int, int],
        enable_gqa: bool,
    ) -> torch.Tensor:
        """What PyTorch's attention for packed rows computes, a row at a time."""
        self.packed[self.now].append(len(bounds) - 1)
        left, _ = window_size
        rows = []
        for start, end in zip(bounds.tolist(), bounds.tolist()[1:], strict=False):
            q, k, v = (heads[start:end].transpose(0, 1)[None] for heads in (query, key, value))
            back = torch.arange(end - start)[:, None] - torch.arange(end - start)
            within = (back >= 0) & ((back <= left) | (left < 0))
            out = scaled_dot_product_attention(q, k, v, within, scale=scale, enable_gqa=enable_gqa)
            rows.append(out[0].transpose(0, 1))
        return torch.cat(rows)


_step = MicroBatchTrainer.training_step
_from_pretrained = PreTrainedModel.from_pretrained.__func__  # type: ignore[attr-defined]


def _loaded(kind: Any, *arguments: Any, device_map: Any = None, **named: Any) -> Any:
    """A model whose first device is the processor."""
    assert device_map in (None, {"": 0})
    return _from_pretrained(kind, *arguments, device_map=device_map and {"": "cpu"}, **named)


def stand_ins(seen: Seen) -> ExitStack:
    """In the place of the card, its driver and its kernels."""
    stack = ExitStack()
    for target, name, value in (
        (gpu, "chosen", lambda: CARD),
        (torch.cuda, "mem_get_info", lambda: (CARD.memory_total, CARD.memory_total)),
        (torch.cuda, "max_memory_allocated", lambda: PEAK),
        (torch.cuda, "get_device_capability", lambda: (8, 0)),
        (torch.cuda, "get_device_name", lambda: CARD.name),
        (torch.Tensor, "cuda", lambda tensor: tensor),
        (PreTrainedModel, "from_pretrained", classmethod(_loaded)),
        (MicroBatchTrainer, "training_step", lambda *given, **named: seen.step(*given, **named)),
    ):
        stack.enter_context(patch.object(target, name, value))
    stack.enter_context(patch("appliance.train.packing.varlen_attn", seen.kernel))
    stack.enter_context(patch("transformers.training_args.is_torch_bf16_gpu_available", lambda: True))
    # On some processors 4-bit layers repack themselves at evaluation, as they do on no GPU.
    stack.enter_context(patch("bitsandbytes.nn.modules.has_avx512bf16", lambda: False))
    return stack


def run_all(directory: Path) -> dict[str, Any]:
    """Train, merge and judge RUNS in a home in `directory`; what was seen."""
    home, seen = Home(directory / "home"), Seen()
    home.create()
    shape = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": WINDOW}
    ends = {"tie_word_embeddings": True, "initializer_range": 0.2, "eos_token_id": 0, "pad_token_id": 0}
    torch.manual_seed(5)
    model = MistralForCausalLM(MistralConfig(**shape, **heads, **ends)).to(torch.bfloat16)
    base = make_model(home.models / "tiny", model=model)
    statuses = {}
    with stand_ins(seen):
        for id, (kind, text) in RUNS.items():
            run = add_run(home, id, text, kind)
            stages = read_recipe(run).pipeline()
            for name in stages[:1] if id == "kto" else stages[:-1]:
                seen.now = f"{id}/{name}"
                statuses[seen.now] = work(run, name)
        (home.runs / "lora" / "verify" / "result.json").unlink()
        with patch("appliance.release.streaming.free_room", lambda: 0):
            statuses["lora/verify, its layers streamed"] = work(home.runs / "lora", "verify")
        checks = [check.name for check in _checks() if not check.passed]
        return {
            "statuses": statuses,
            "steps": seen.steps,
            "packed": seen.packed,
            "constants": _constants(),
            "advice": _advice(home),
            "failed_checks": checks,
            "answer": asyncio.run(_answer(base)),
        }


def _constants() -> dict[str, Any]:
    names = ("SLACK", "SLACK_TWICE", "LOGITS_SLACK", "CHECKPOINTED", "SMALLER_PASSES", "LARGER_PASSES")
    tokens = {"MICRO_BATCH_TOKENS": order.MICRO_BATCH_TOKENS}
    return {name: getattr(forecast, name) for name in names} | tokens


def _advice(home: Home) -> dict[str, Any]:
    recipe = read_recipe(home.runs / "lora")
    with patch.object(torch.cuda, "mem_get_info", lambda: (300_000, CARD.memory_total)):
        return forecast_of(home, recipe, "sft").event()


def _checks() -> list[probe_gpu.Check]:
    """Of the card, of which none fails."""
    probe_gpu.require_gpu(torch)
    driver = SimpleNamespace(nvmlSystemGetDriverVersion=lambda: "580.65.06")
    return list(probe_gpu.checks(driver, torch, lambda: None))


async def _answer(model: Path) -> int:
    """Tokens of an answer of the embedded engine."""
    engine = Generator(model, kv_cache_gib=0, gpu_memory_share=1e-3, max_model_len=256)
    try:
        prompt = engine.render([{"role": "user", "content": "What colour has the door?"}])
        pieces = engine.generate(prompt, engine.sampling({"temperature": 0}), 8, (), 1, True)
        return sum([piece.tokens async for piece in pieces])
    finally:
        engine.close()
