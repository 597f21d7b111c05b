"""Loading the tokenizer published with a model, the same in every process."""

from __future__ import annotations

import json
from datetime import date
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import BaseModel, ConfigDict

from appliance.errors import InvalidInput, reason

_SWITCHES = ("enable_thinking", "thinking")
"""What templates call it: those of Qwen, Gemma, GLM and their like; those of Granite and DeepSeek."""
TOLD_BY_ALL = frozenset({"messages", "tools", "documents", "add_generation_prompt", "strftime_now", "raise_exception"})
"""What every template is told by who renders it, and no client tells it."""
_GENERIC = ("PreTrainedTokenizerFast", "TokenizersBackend")


class TemplateSettings(BaseModel):
    """What a chat template is told beside messages and tools: the same in training, in gates and by the engine."""

    model_config = ConfigDict(frozen=True)

    today: date | None = None
    """The day it takes for today; None: what it is."""
    thinking: bool | None = None
    """Whether it has the model think before it answers; None: as the template does by itself."""

    def told_to(self, template: str) -> dict[str, Any]:
        """The variables of `template` that have these values; only what it asks for."""
        told: dict[str, Any] = {}
        if self.today and "strftime_now" in template:
            told["strftime_now"] = self.today.strftime
        if self.thinking is not None:
            told |= dict.fromkeys(thinking_switches(template), self.thinking)
        return told


def load_tokenizer(folder: Path, settings: TemplateSettings | None = None) -> Any:
    """The tokenizer of the model in `folder`, whose chat template has these settings from now on.

    Raises InvalidInput where it cannot be used.
    """
    try:
        tokenizer = _loader(folder).from_pretrained(folder, local_files_only=True)
    except Exception as error:  # several libraries read its files, and raise what they like
        raise InvalidInput(
            "no_tokenizer", f"{folder} holds no usable tokenizer: {reason(error)}", "pull the base model again"
        ) from error
    if settings:
        set_template(tokenizer, settings)
    return tokenizer


def set_template(tokenizer: Any, settings: TemplateSettings) -> None:
    """Let the tokenizer's chat template be told these settings from now on, where a call says nothing else."""
    # A template that asks for none is left alone: not every tokenizer takes other arguments.
    if told := settings.told_to(str(tokenizer.chat_template)):
        tokenizer.apply_chat_template = partial(tokenizer.apply_chat_template, **told)


@lru_cache
def thinking_switches(template: str) -> tuple[str, ...]:
    """The variables by which a chat template is told whether the model is to think; none: it cannot be told.

    A name that it asks for may be one that it sets itself: what counts is whether the prompt is another.
    """
    asked = variables(template)
    return tuple(
        name
        for name in _SWITCHES
        if name in asked and _prompt(template, **{name: True}) != _prompt(template, **{name: False})
    )


def thinks_unasked(template: str) -> bool:
    """Whether a chat template that can be told has the model think where nothing tells it."""
    return _prompt(template) == _prompt(template, **dict.fromkeys(thinking_switches(template), True))


def _prompt(template: str, **told: bool) -> str | None:
    """A question as the template renders it; None where it does not."""
    environment = _environment()
    environment.globals |= {"raise_exception": _raise, "strftime_now": date.today().strftime}
    messages = [{"role": "user", "content": "?"}]
    try:
        return environment.from_string(template).render(messages=messages, add_generation_prompt=True, **told)
    except Exception:  # a template is its publisher's program and raises what it likes
        return None


def _raise(message: str) -> None:
    raise ValueError(message)


def _environment() -> ImmutableSandboxedEnvironment:
    """As Transformers has it, as far as a question without tools goes."""
    return ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )


@lru_cache
def variables(template: str) -> frozenset[str]:
    """What a chat template asks for beside the conversation, its tools and the tokenizer's own tokens."""
    environment = _environment()
    try:
        asked = jinja2.meta.find_undeclared_variables(environment.parse(template))
    except jinja2.TemplateSyntaxError:
        return frozenset()
    return frozenset(name for name in asked if name not in TOLD_BY_ALL and not name.endswith("_token"))


class _Generation(jinja2.ext.Extension):
    """The mark of what the model says, which Transformers adds to Jinja."""

    tags = {"generation"}  # noqa: RUF012  as Jinja declares it

    def parse(self, parser: jinja2.parser.Parser) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _loader(folder: Path) -> Any:
    """AutoTokenizer, or what it would come to: importing it imports torch, which an import of data does not need."""
    try:
        named = json.loads((folder / "tokenizer_config.json").read_bytes()).get("tokenizer_class")
    except (OSError, ValueError, AttributeError):
        named = None
    if named in _GENERIC and (folder / "tokenizer.json").exists():
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast
    from transformers import AutoTokenizer

    return AutoTokenizer
