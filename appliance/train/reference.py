"""The reference of recipes as a page, from the declarations alone."""

from __future__ import annotations

import json
from datetime import date

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from appliance.train.recipe import Adapter, DpoStage, Given, KtoStage, Recipe, SftStage, Stage

HEAD = """# Recipes

A recipe is a TOML file that says everything about a run. A key that is left out has its default; the run's own
`recipe.toml` has every default written out. Generated from `appliance/train/recipe.py` by `make docs`.
"""


def recipe_reference() -> str:
    """Every table and key of a recipe with its default, its limits and the reason, as Markdown."""
    common = set(Stage.model_fields)
    sections = [
        _section("The recipe", Recipe, set(Recipe.model_fields) - {"adapter", "stages", "given", "rechecks"}),
        _section("`[adapter]`", Adapter, set(Adapter.model_fields)),
        _section("`[[stages]]`", Stage, common),
    ]
    for stage in (SftStage, DpoStage, KtoStage):
        own = {name for name, field in stage.model_fields.items() if _differs(Stage.model_fields.get(name), field)}
        method = stage.model_fields["method"].annotation.__args__[0]  # type: ignore[union-attr]  # a Literal of one word
        sections.append(_section(f'`method = "{method}"`', stage, own - {"method"}))
    sections.append(_section("`[given]`", Given, set(Given.model_fields)))
    return "\n".join([HEAD, *sections])


def _differs(inherited: FieldInfo | None, field: FieldInfo) -> bool:
    return inherited is None or (inherited.default, inherited.description) != (field.default, field.description)


def _section(title: str, model: type[BaseModel], names: set[str]) -> str:
    """A heading, what the table is for, and a row for each of `names` in the order of their declaration."""
    lines = [f"## {title}", "", _one_line(model.__doc__), ""]
    if names:
        lines += ["| key | default | meaning |", "|---|---|---|"]
    lines += [
        f"| `{field.alias or name}` | {_default(field)} | {_one_line(field.description)}{_limits(field)} |"
        for name, field in model.model_fields.items()
        if name in names
    ]
    return "\n".join(lines).rstrip() + "\n"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if field.default_factory == date.today:
        return "today"
    default = field.default
    text = str(default).lower() if isinstance(default, bool) else json.dumps(default)
    return f"`{text}`"


def _limits(field: FieldInfo) -> str:
    """The words or the range that a key takes, as far as its declaration has them."""
    words = getattr(field.annotation, "__args__", ())
    if words and all(isinstance(word, str) for word in words):
        return f" ({', '.join(words)})"
    bounds = {
        sign: getattr(limit, key)
        for limit in field.metadata
        for sign, key in ((">", "gt"), ("≥", "ge"), ("<", "lt"), ("≤", "le"))
        if getattr(limit, key, None) is not None
    }
    return f" ({', '.join(f'{sign} {bound}' for sign, bound in bounds.items())})" if bounds else ""


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())


if __name__ == "__main__":
    print(recipe_reference(), end="")
