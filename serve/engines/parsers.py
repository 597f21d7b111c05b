"""By which of vLLM's parsers a thought in a model's answer, or a call of a tool, is told from what it says."""

from __future__ import annotations

import json
import re
from pathlib import Path

from appliance.data.tokenizer import thinking_switches

_BY_TYPE = (
    ("gpt_oss", "<|channel|>", "openai_gptoss"),
    ("gemma4", "<|channel>", "gemma4"),
    ("glm4_moe", "<think>", "glm45"),
    ("nemotron_h", "<think>", "nemotron_v3"),
)
"""How the type of the model begins, the mark of a thought in its template, and the parser."""
_SWITCHED, _SWITCHED_OTHERWISE, _ALWAYS = "qwen3", "deepseek_v3", "deepseek_r1"
"""For models of any other type that think between `<think>` and `</think>`: those that can be told not to (by
`enable_thinking`, by `thinking`), and those whose prompt begins the thought."""
_BEGINS_A_THOUGHT = re.compile(r"add_generation_prompt[^%]*%\}[^%]*<think>")


def reasoning_parser(model: Path, template: str) -> str:
    """The name of the parser for the model in `model` with this chat template; empty: its answers have no thoughts.

    A model that may think, or not, without being told is left alone: all that it says would be taken for a thought.
    """
    try:
        config = json.loads((model / "config.json").read_bytes())
    except (OSError, ValueError):
        return ""
    for begins, mark, parser in _BY_TYPE:
        if str(config.get("model_type", "")).startswith(begins) and mark in template:
            return parser
    if "</think>" not in template:
        return ""
    if switches := thinking_switches(template):
        return _SWITCHED if "enable_thinking" in switches else _SWITCHED_OTHERWISE
    return _ALWAYS if _BEGINS_A_THOUGHT.search(template) else ""


_CALLS = (
    ("<|tool_call_start|>", "lfm2"),
    ("<|tool_call>call:", "gemma4"),
    ("<start_function_call>", "functiongemma"),
    ("<arg_key>", "glm45"),
    ("<seed:tool_call>", "seed_oss"),
    ("<minimax:tool_call>", "minimax_m2"),
    ("<|tool_calls_section_begin|>", "kimi_k2"),
    ("<｜tool▁sep｜>", "deepseek_v3"),
    ("<function_calls>", "olmo3"),
    ("<function=", "qwen3_coder"),
    ("<tool_call>", "hermes"),
    ("[TOOL_CALLS]", "mistral"),
    ("<|tool_call|>", "granite"),
    ("functools[", "phi4_mini_json"),
    ("<|channel|>commentary", "openai"),
    ("<|python_start|>", "llama4_pythonic"),
    ("Environment: ipython", "llama3_json"),
)
"""What stands in the template of a family whose calls a parser knows, the more particular marks first."""


def tool_parser(template: str) -> str:
    """The name of the parser for the calls of a model with this chat template; empty: it knows no tools, or none does.

    The mark alone tells: models of one type come with templates of several families.
    """
    if not re.search(r"\btools\b", template):
        return ""
    return next((parser for mark, parser in _CALLS if mark in template), "")
