"""Which of vLLM's parsers a model gets, and that it takes apart what that model's own template puts together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chat_templates import OF_OUR_OWN, PUBLISHED, tokenizer_of
from tokenizers import AddedToken

from appliance.data.render import render_conversation, render_prompt
from appliance.data.tokenizer import thinking_switches
from serve.engines.parsers import reasoning_parser, tool_parser

THINKING = {
    "qwen3": ("qwen3", "qwen3"),
    "qwen3_5_think": ("qwen3_5", "qwen3"),
    "qwen3_5_nothink": ("qwen3_5", "qwen3"),
    "qwen3_6": ("qwen3_5", "qwen3"),
    "glm4moe": ("glm4_moe", "glm45"),
    "gptoss": ("gpt_oss", "openai_gptoss"),
    "gemma4_v5": ("gemma4", "gemma4"),
    "nemotron_3_nano": ("nemotron_h", "nemotron_v3"),
    "deepseek_r1_distill": ("qwen2", "deepseek_r1"),
}
"""Templates, with the type of their models and the parser."""
MARKS = ["<think>", "</think>", "<|channel>", "<channel|>", "<|think|>", "<tool_call>", "</tool_call>"]
ASKED = [{"role": "user", "content": "What is 2 + 2?"}]
THOUGHT, TEXT = "I add them.", "Four."


def published(name: str) -> str:
    return (PUBLISHED / f"{name}.jinja").read_text()


def chosen(folder: Path, model_type: str, template: str) -> str:
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return reasoning_parser(folder, template)


@pytest.mark.parametrize("name", THINKING)
def test_a_model_that_thinks_gets_its_parser(tmp_path: Path, name: str) -> None:
    model_type, parser = THINKING[name]
    assert chosen(tmp_path, model_type, published(name)) == parser


@pytest.mark.parametrize(
    ("name", "model_type"),
    [
        ("qwen3_instruct_2507", "qwen3"),
        ("qwen2_5", "qwen2"),
        ("llama3_1", "llama"),
        ("gemma3", "gemma3"),
        ("lfm2_2_5", "lfm2"),
        ("lfm2_2_5_v2", "lfm2"),
        ("lfm2_2_5_vl", "lfm2_vl"),
        ("phi3", "phi3"),
    ],
)
def test_one_that_does_not_or_may_without_being_told_gets_none(tmp_path: Path, name: str, model_type: str) -> None:
    assert chosen(tmp_path, model_type, published(name)) == ""


def test_without_a_config_that_can_be_read_there_is_none(tmp_path: Path) -> None:
    assert reasoning_parser(tmp_path, published("qwen3")) == ""


@pytest.mark.slow
@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("name", [name for name in THINKING if name != "gptoss"])
def test_the_parser_takes_answers_apart_as_the_template_puts_them_together(name: str, thinking: bool) -> None:
    manager: Any = pytest.importorskip("vllm.reasoning").ReasoningParserManager
    template = published(name)
    switches = dict.fromkeys(thinking_switches(template), thinking)
    if not switches and not thinking:
        pytest.skip("it always thinks")
    tokenizer = tokenizer_of(template)
    tokenizer.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in MARKS])
    apply = tokenizer.apply_chat_template
    tokenizer.apply_chat_template = lambda *arguments, **named: apply(*arguments, **switches | named)
    answer = {"role": "assistant", "content": TEXT} | ({"reasoning_content": THOUGHT} if thinking else {})
    prompt = render_prompt(tokenizer, ASKED)
    (whole,) = render_conversation(tokenizer, [*ASKED, answer])
    ids = whole.input_ids[len(prompt) :]
    _, parser = THINKING[name]
    found = manager.get_reasoning_parser(parser)(tokenizer, chat_template_kwargs=switches)
    request = found.adjust_request(Request(switches))
    text = tokenizer.decode(ids[:-1], skip_special_tokens=request.skip_special_tokens)
    thought, said = found.extract_reasoning(text, request)
    assert ((thought or "").strip(), (said or "").strip()) == (THOUGHT if thinking else "", TEXT)


CALLING = {
    **dict.fromkeys(("gemma4", "gemma4_v5"), "gemma4"),
    "glm4moe": "glm45",
    "gptoss": "openai",
    **dict.fromkeys(("lfm2_v2", "lfm2_2_5", "lfm2_2_5_vl"), "lfm2"),
    **dict.fromkeys(("llama3_1", "llama3_2"), "llama3_json"),
    **dict.fromkeys(("nemotron_3_nano", "nemotron_3_super", "qwen3_5_think", "qwen3_6", "qwen3_8"), "qwen3_coder"),
    **dict.fromkeys(("qwen2_5", "qwen3", "qwen3_instruct_2507", "qwen3_vl"), "hermes"),
    "mistral": "mistral",
    "granite": "granite",
}
"""Templates that know tools, and the parser of their calls."""
CALL_MARKS = [
    "<|python_tag|>",
    "<|tool_call>",
    "<tool_call|>",
    '<|"|>',
    "<|tool_call_start|>",
    "<|tool_call_end|>",
    "[TOOL_CALLS]",
]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a town",
        "parameters": {"type": "object", "properties": {"town": {"type": "string"}, "days": {"type": "integer"}}},
    },
}
ARGUMENTS = {"town": "Bergen", "days": 3}


def template_named(name: str) -> str:
    return OF_OUR_OWN.get(name) or published(name)


@pytest.mark.parametrize("name", CALLING)
def test_a_template_that_knows_tools_gets_the_parser_of_its_calls(name: str) -> None:
    assert tool_parser(template_named(name)) == CALLING[name]


@pytest.mark.parametrize("name", ["llama3", "phi3", "gemma3", "qwen2_5_vl", "cohere", "olmo2", "smollm2"])
def test_one_that_knows_none_gets_no_parser(name: str) -> None:
    assert tool_parser(template_named(name)) == ""


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CALLING if name not in ("gptoss", "mistral", "granite")])
def test_the_parser_finds_the_calls_that_the_template_writes(name: str) -> None:
    manager: Any = pytest.importorskip("vllm.tool_parsers").ToolParserManager
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    tokenizer = tokenizer_of(template_named(name))
    tokenizer.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in (*MARKS, *CALL_MARKS)])
    call = {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}
    answer = {"role": "assistant", "content": "", "tool_calls": [call]}
    prompt = render_prompt(tokenizer, ASKED, [TOOL])
    whole = render_conversation(tokenizer, [*ASKED, answer], [TOOL])[-1]
    ids = whole.input_ids[len(prompt) :]
    request = ChatCompletionRequest(model="m", messages=ASKED, tools=[TOOL])
    parser = manager.get_tool_parser(CALLING[name])(tokenizer, request.tools)
    text = tokenizer.decode(ids[:-1], skip_special_tokens=parser.adjust_request(request).skip_special_tokens)
    found = parser.extract_tool_calls(text, request)
    assert [(one.function.name, json.loads(one.function.arguments)) for one in found.tool_calls] == [
        ("weather", ARGUMENTS)
    ]


class Request:
    """What a parser looks at of a request."""

    def __init__(self, switches: dict[str, bool]) -> None:
        self.chat_template_kwargs = switches
        self.include_reasoning = True
        self.tools = None
        self.tool_choice = "none"
        self.skip_special_tokens = True
