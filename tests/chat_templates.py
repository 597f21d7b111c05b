"""Chat templates of every kind that matters, and a tokenizer small enough to build on the spot."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
OTHERS = [
    *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "[INST]", "[/INST]", "</s>"),
    *("<start_of_turn>", "<end_of_turn>", "<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>"),
]
"""Special tokens of the other templates."""
MERGES = [("h", "e"), ("Ċ", "Ċ"), ("s", "s")]
"""A few joined tokens, among them two newlines: what runs together in text runs together in tokens."""

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helper<|im_end|>\n{% endif %}" + CHATML
)
TRIMMING = CHATML.replace("{{ message['content'] }}", "{{ message['content'] | trim }}")
CLOSED_AT_THE_END = CHATML + "{% if not add_generation_prompt %}<|endoftext|>{% endif %}"
THINKING = CHATML.replace(
    "{{ message['content'] }}",
    "{% if loop.last and message['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ message['content'] }}",
)
LLAMA = (
    "{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %} {{ message['content'] }}</s>"
    "{% else %}[INST] {{ message['content'] }} [/INST]{% endif %}{% endfor %}"
)
GEMMA = (
    "{% for message in messages %}"
    "<start_of_turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    "{{ message['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
HARMONY = (
    "<|start|>system<|message|>Reasoning: low\n# Valid channels: analysis, final.<|end|>"
    "{% for message in messages %}<|start|>{{ message['role'] }}"
    "{% if message['role'] == 'assistant' %}<|channel|>final{% endif %}<|message|>{{ message['content'] }}"
    "{% if loop.last and message['role'] == 'assistant' %}<|return|>{% else %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
"""The name of a channel stands between the prompt and the answer, and the last answer ends otherwise."""
CALLING = "{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML.replace(
    "{{ message['content'] }}",
    "{{ message['content'] }}"
    "{% for call in message.tool_calls or [] %}<|endoftext|>{{ call.function | tojson }}{% endfor %}",
)
ABLE = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message.reasoning_content %}<think>\n{{ message.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ message['content'] }}"
    "{% for call in message.tool_calls or [] %}\n<tool_call>{{ call.id }} {{ call.function.name }}"
    "{% for name, value in call.function.arguments | items %} {{ name }}={{ value }}{% endfor %}</tool_call>"
    "{% endfor %}"
    "{% if message.tool_call_id %} ({{ message.tool_call_id }}){% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""It knows tools, calls with their ids, and thoughts."""
MISTRAL_V3 = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set turns = messages[1:] %}"
    "{% else %}{% set turns = messages %}{% endif %}"
    "{% for message in turns %}{% if message.role == 'user' %}"
    "{% if tools and loop.last or tools and loop.index0 == 0 %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]"
    "{% endif %}[INST] {% if system is defined and loop.first %}{{ system }}\n\n{% endif %}{{ message.content }}[/INST]"
    "{% elif message.tool_calls is defined %}[TOOL_CALLS] ["
    "{% for call in message.tool_calls %}"
    "{% if call.id | length != 9 %}{{ raise_exception('ids have 9 letters') }}{% endif %}"
    "{{ call.function | tojson }}{% endfor %}]</s>"
    "{% elif message.role == 'assistant' %} {{ message.content | trim }}</s>"
    "{% else %}[TOOL_RESULTS] {{ message.content }} {{ message.tool_call_id }}[/TOOL_RESULTS]{% endif %}{% endfor %}"
)
GRANITE = (
    "{% if tools %}<|start_of_role|>tools<|end_of_role|>{{ tools | tojson }}<|end_of_text|>\n{% endif %}"
    "{% for message in messages %}<|start_of_role|>{{ message.role }}<|end_of_role|>{{ message.content }}"
    "{% if message.tool_calls %}<|tool_call|>{{ message.tool_calls | map(attribute='function') | list | tojson }}"
    "{% endif %}"
    "<|end_of_text|>\n{% endfor %}{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}"
)
OLMO = (
    "<|endoftext|>{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}"
    "{% if message.role == 'assistant' %}<|endoftext|>{% endif %}"
    "{% if not loop.last or message.role != 'assistant' %}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
PHI4 = (
    "{% for message in messages %}<|im_start|>{{ message.role }}<|im_sep|>{{ message.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}"
)
DATED = "{% if strftime_now is defined %}It is {{ strftime_now('%d %b %Y') }}.\n{% endif %}" + CHATML
RAISING = "{{ raise_exception('only the user may speak') }}"
WITHOUT_END = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}" + (
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
SHOUTING = CHATML.replace("{{ message['content'] }}", "{{ message['content'] | upper }}")
COUNTING = "{{ messages | length }}" + CHATML
"""What it renders of the same turns differs with what follows."""
UNANSWERED = CHATML.replace("<|im_start|>assistant", "<|im_start|>answer")
"""What it renders for a prompt is no beginning of anything else."""


def make_tokenizer(template: str, normalizer: Any = None) -> Any:
    """A byte-level tokenizer of some 270 tokens with the chat template."""
    symbols = [*SPECIAL, *OTHERS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in MERGES)]
    vocabulary = {symbol: number for number, symbol in enumerate(symbols)}
    backend = Tokenizer(models.BPE(vocabulary, MERGES))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        additional_special_tokens=["<|endoftext|>", *OTHERS],
        chat_template=template,
    )


PUBLISHED = Path(str(find_spec("trl").origin)).parent / "chat_templates"  # type: ignore[union-attr]
READ_PICTURES = {"idefics3", "llava_next", "smolvlm", "diffusion_gemma"}
"""Of models that are not trained here."""
OF_OUR_OWN = {
    "granite": GRANITE,
    "mistral": MISTRAL_V3,
    "olmo2": OLMO,
    "phi4": PHI4,
    "smollm2": DEFAULT_SYSTEM,
}
"""Written after those of models that TRL has no template of."""
_SPECIAL = re.compile(
    r"<\|[^|<>\s']+\|>|<｜[^｜<>]+｜>|</?s>|\[/?[A-Z_]{4,}\]|<(?:start|end)_of_turn>|<\|?(?:turn|channel)\|?>"
    r"|<\|?tool_(?:call|response)\|>|<\|tool_(?:call|response)>"
)


def templates() -> dict[str, str]:
    """Chat templates by name: the publishers', and ours for models that TRL has none of."""
    published = {
        path.stem: path.read_text()
        for path in sorted(PUBLISHED.glob("*.jinja"))
        if not path.stem.endswith("_training") and path.stem not in READ_PICTURES
    }
    return published | OF_OUR_OWN


def tokenizer_of(template: str) -> Any:
    """A small tokenizer to which the template's marks are special tokens."""
    tokenizer = make_tokenizer(template)
    tokenizer.add_special_tokens({"additional_special_tokens": sorted({*_SPECIAL.findall(template), "<|endoftext|>"})})
    return tokenizer
