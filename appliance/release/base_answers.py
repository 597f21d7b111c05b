"""Which probes the base itself answers to the limit: a model that was only nudged goes on where its base does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from appliance.errors import is_out_of_memory
from appliance.supervisor.engines import Probe
from appliance.train.events import EventLog
from appliance.train.model import load_model, release_memory, stop_token_ids


def ask_base(base: Path, tokenizer: Any, probes: list[Probe], events: EventLog) -> list[Probe]:
    """The probes, each with whether the model in `base` ends its own greedy answer within the probe's room.

    Where the memory is not enough it is asked in NF4, and where not even for that, all its answers count as ended, and
    `events` says so.
    """
    stops = stop_token_ids(tokenizer, base)
    for quantised in (False, True):
        try:
            answers = _answers(load_model(base, quantised=quantised), probes, stops)
            break
        except Exception as error:  # torch, its allocators and the drivers each raise their own
            if not is_out_of_memory(error):
                raise
        finally:
            release_memory()
    else:
        events.append("warning", "verify", message="out of memory for the base's answers: they count as ended")
        return probes
    return [
        replace(probe, base_ends=not set(stops).isdisjoint(answer[: probe.max_tokens]))
        for probe, answer in zip(probes, answers, strict=True)
    ]


@torch.inference_mode()
def _answers(model: Any, probes: list[Probe], stops: list[int]) -> list[list[int]]:
    """Token ids of the greedy answers as far as the context goes, all in one batch padded on the left."""
    prompts, longest = [probe.token_ids for probe in probes], max(probe.max_tokens for probe in probes)
    width = max(len(prompt) for prompt in prompts)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or width + longest
    ids = torch.tensor([[stops[0]] * (width - len(prompt)) + prompt for prompt in prompts])
    attended = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    found = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=attended.to(model.device),
        max_new_tokens=max(1, min(longest, context - width)),
        do_sample=False,
        eos_token_id=stops,
        pad_token_id=stops[0],
    )
    answers: list[list[int]] = found[:, width:].tolist()
    return answers
