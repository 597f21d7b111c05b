"""Bad recipes, made from the declarations and from a good one: each is refused in one clear line."""

from __future__ import annotations

import random
import tomllib
from collections.abc import Iterator
from datetime import date
from typing import Any

import pytest
import tomli_w
from annotated_types import Ge, Gt, Le, Lt

from appliance.errors import InvalidInput
from appliance.train.recipe import Adapter, DpoStage, KtoStage, Recipe, SftStage, parse_recipe

GOOD = """
name = "good"
base = "tiny"
[adapter]
kind = "lora"
[[stages]]
method = "sft"
dataset = "facts"
[[stages]]
method = "dpo"
dataset = "pairs"
[[stages]]
method = "kto"
dataset = "judged"
"""
PLACES: dict[str, tuple[Any, tuple[str | int, ...]]] = {
    "": (Recipe, ()),
    "adapter.": (Adapter, ("adapter",)),
    "stages[0].": (SftStage, ("stages", 0)),
    "stages[1].": (DpoStage, ("stages", 1)),
    "stages[2].": (KtoStage, ("stages", 2)),
}
OF_ANOTHER_TYPE: dict[type, list[Any]] = {
    int: ["many", 1.5, [1], {"a": 1}],
    float: ["fast", [0.1], {"a": 1}],
    bool: ["perhaps", 7, [True]],
    str: [3, 0.5, True, ["a"]],
    date: ["tomorrow", 0.5, [1], {"a": 1}],
    tuple: ["q_proj", 3, [1.5, 2.5], {"a": 1}],
}


def beyond(field: Any) -> list[float]:
    """A number outside of each limit of a field."""
    numbers: list[float] = []
    for limit in field.metadata:
        match limit:
            case Gt(gt=low):
                numbers.append(low)
            case Ge(ge=low):
                numbers.append(low - 1)
            case Lt(lt=high):
                numbers.append(high)
            case Le(le=high):
                numbers.append(high + 1)
    return numbers


def with_value(path: tuple[str | int, ...], key: str, value: Any) -> str:
    values: Any = tomllib.loads(GOOD)
    table = values
    for part in path:
        table = table[part]
    table[key] = value
    return tomli_w.dumps(values)


def bad_values() -> Iterator[tuple[str, str]]:
    """(recipe, the key that is at fault) for each key, of a wrong type, out of its limits, and mistyped."""
    for prefix, (model, path) in PLACES.items():
        for key, field in model.model_fields.items():
            if key in ("adapter", "stages", "given", "rechecks", "start", "method"):
                continue
            key = field.alias or key
            kind = field.annotation if field.annotation in OF_ANOTHER_TYPE else type(field.default)
            for value in [*OF_ANOTHER_TYPE[kind], *beyond(field)]:
                yield with_value(path, key, value), prefix + key
            yield with_value(path, key[:-1] + "q" + key[-1], 1), prefix + key[:-1] + "q" + key[-1]


def broken_text() -> Iterator[tuple[str, str]]:
    """(recipe, what the line says) for the good one cut off, or with a character changed, where that is not TOML."""
    dice = random.Random(4)
    while True:
        at = dice.randrange(1, len(GOOD))
        text = GOOD[:at] + dice.choice(['"', "[", "=", "\0", "]]", "\n="]) + GOOD[at + dice.randrange(2) :]
        try:
            tomllib.loads(text)
        except tomllib.TOMLDecodeError:
            yield text, "is not TOML"


def test_the_good_one_is_good() -> None:
    assert len(parse_recipe(GOOD).stages) == 3


CASES = random.Random(3).sample(sorted(bad_values()), 120) + [
    found for found, _ in zip(broken_text(), range(30), strict=False)
]


@pytest.mark.parametrize(("text", "fault"), CASES)
def test_a_bad_recipe_is_refused_in_one_clear_line(text: str, fault: str) -> None:
    with pytest.raises(InvalidInput) as raised:
        parse_recipe(text)
    line = str(raised.value)
    assert fault in line
    assert "\n" not in line
    assert len(line) < 300
    assert raised.value.next
    assert not any(word in line.lower() for word in ("pydantic", "validationerror", "traceback", "input_value"))
