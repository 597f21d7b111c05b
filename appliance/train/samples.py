"""How the model answers a few held-out prompts, so that a person watches it learn."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState

from appliance.data.dataset import Row, prompt_messages
from appliance.data.render import render_prompt
from appliance.errors import is_out_of_memory, reason
from appliance.train.events import EventLog

SAMPLE_TOKENS = 48


class Samples(TrainerCallback):
    """Says the answers to `rows` at each evaluation, or where there are none at the end, greedily and briefly."""

    def __init__(self, tokenizer: Any, stops: list[int], rows: list[Row], events: EventLog, stage: str) -> None:
        self.tokenizer = tokenizer
        self.stops = stops
        self.prompts = [(prompt_messages(row), row.get("tools")) for row in rows]
        self.events = events
        self.stage = stage
        self._said_at = -1

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, model: Any, **_: Any) -> None:
        self._say(model, state.global_step)

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, model: Any, **_: Any) -> None:
        if self._said_at < 0:
            self._say(model, state.global_step)

    def _say(self, model: Any, step: int) -> None:
        self._said_at = step
        try:
            answers = self._answers(model) if self.prompts else []
        except Exception as error:  # a look at the model never ends its training
            why = "out of memory" if is_out_of_memory(error) else reason(error)
            self.events.append("warning", self.stage, message=f"no sample answers this time: {why}")
            return
        for (messages, _), text in zip(self.prompts, answers, strict=True):
            self.events.append("sample", self.stage, step=step, prompt=messages[-1]["content"], text=text)

    @torch.inference_mode()
    def _answers(self, model: Any) -> list[str]:
        """What the model answers to each prompt; all in one batch, padded on the left."""
        prompts = [render_prompt(self.tokenizer, messages, tools) for messages, tools in self.prompts]
        width = max(len(prompt) for prompt in prompts)
        ids = torch.tensor([[self.stops[0]] * (width - len(prompt)) + prompt for prompt in prompts])
        attended = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        model.eval()
        # The loss of routers takes the prompt's mask for that of each token.
        routed = {"output_router_logits": False} if hasattr(model.config, "output_router_logits") else {}
        answers = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=attended.to(model.device),
            max_new_tokens=SAMPLE_TOKENS,
            do_sample=False,
            eos_token_id=self.stops,
            pad_token_id=self.stops[0],
            **routed,
        )
        return [self.tokenizer.decode(answer, skip_special_tokens=True) for answer in answers[:, width:]]
