"""The probes: prompts that a release's engine is asked before it may be released (gates 3 and 4)."""

from __future__ import annotations

from typing import Any

from appliance.data.dataset import Dataset, Row, prompt_group, prompt_messages
from appliance.data.render import render_conversation, render_prompt
from appliance.home import Home
from appliance.release.held_out import conversation, judged_on
from appliance.supervisor.engines import Probe
from appliance.train.recipe import Recipe

PROBES_FROM_DATA = 8
PROBE_SLACK = 64
"""Tokens that a probe's answer may have beyond twice the length of the answer that was trained on."""
GENERIC_TOKENS = 256
GENERIC_PROMPTS = ("Say hello.", "What is the capital of France?")


def make_probes(home: Home, recipe: Recipe, tokenizer: Any) -> list[Probe]:
    """Prompts of the run's training data, spread over it, then generic ones, as the trainer's tokenizer renders them.

    Each is another prompt. Rows with tools are left out: a probe asks for text.
    """
    probes = []
    if judged := judged_on(recipe):
        dataset = Dataset.open(home, judged[0])
        train, _ = dataset.split(recipe.eval_share)
        rows = ((index, dataset.rows[index]) for index in train)
        plain = list({prompt_group(row): index for index, row in rows if not row.get("tools")}.values())
        step = max(1, len(plain) // PROBES_FROM_DATA)
        probes = [_probe(tokenizer, dataset.rows[index]) for index in plain[::step][:PROBES_FROM_DATA]]
    for prompt in GENERIC_PROMPTS:
        messages = [{"role": "user", "content": prompt}]
        probes.append(Probe(messages, render_prompt(tokenizer, messages), GENERIC_TOKENS))
    return probes


def _probe(tokenizer: Any, row: Row) -> Probe:
    """The prompt of a row, its answer allowed twice the length of the row's own."""
    prompt = prompt_messages(row)
    ids = render_prompt(tokenizer, prompt)
    whole = render_conversation(tokenizer, conversation(row)["messages"])
    return Probe(prompt, ids, 2 * (len(whole.input_ids) - len(ids)) + PROBE_SLACK)
