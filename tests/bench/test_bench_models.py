"""A dozen families of those that `make bench-models` tries, through the same."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1] / "appliance" / "train"))
import models
from tiny_families import FAMILIES

DOZEN = (
    *("gemma4", "qwen3_5", "mistral3", "qwen2_5_vl", "mixtral", "glm4_moe", "deepseek_v3", "granitemoe"),
    *("phimoe", "falcon", "falcon_h1", "nemotron_h", "mamba2"),
)
EXPERTS = ("mixtral", "glm4_moe", "deepseek_v3", "granitemoe", "phimoe", "nemotron_h")


@pytest.mark.thorough
@pytest.mark.parametrize("family", DOZEN)
def test_a_family_is_trained(tmp_path: Path, family: str) -> None:
    found = models.try_family(family, tmp_path)
    assert (found["outcome"], found.get("why")) == ("trained", None)
    assert found.get("experts", "trained") == "trained"
    assert ("experts" in found) == (family in EXPERTS)


def test_a_model_that_cannot_be_asked_without_an_image_is_refused(tmp_path: Path) -> None:
    found = models.try_family("blip-2", tmp_path)
    assert found["outcome"] == "refused"
    assert found["why"] == "a Blip2ForConditionalGeneration cannot be asked with texts alone: it needs pixel_values"


def test_the_listed_families_are_families() -> None:
    assert set(models.LISTED.split()) <= {*FAMILIES}


def test_the_page_says_of_each_family_what_came_of_it() -> None:
    outcomes: dict[str, dict[str, Any]] = {
        "a": {"outcome": "trained", "template": "t", "without": ["forecast"], "experts": "refused", "vllm": "served"},
        "b": {"outcome": "failed", "template": "t", "stage": "dpo", "why": "x | y"},
        "c": {"outcome": "not made", "template": "t", "why": "no config"},
        "d": {"outcome": "refused", "template": "t", "why": "no"},
    }
    page = models.updated("", outcomes)
    assert "| a | t | trained, without forecast | refused | served |" in page
    assert "| b | t | failed in dpo: x / y |  |  |" in page
    assert "1 of 3 are trained, 1 refused before training, 1 fail.\nOf 1 no tiny model could be made: c." in page
    again = models.updated(page, {family: {"outcome": "trained", "template": "u"} for family in ("b", "c")})
    assert "| a | t | trained, without forecast | refused | served |" in again
    assert "| b | u | trained |  |  |" in again
    assert "3 of 4 are trained, 1 refused before training, 0 fail.\nOf 0 no tiny model could be made: none." in again
