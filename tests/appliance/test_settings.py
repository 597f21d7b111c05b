"""Settings: declared once, read from the environment, overridden by options."""

from __future__ import annotations

from pathlib import Path

import pytest

from appliance.errors import InvalidInput
from appliance.settings import load_settings


def test_option_over_environment_over_default() -> None:
    environ = {"APPLIANCE_PORT": "9000", "APPLIANCE_HOME": "/somewhere"}
    assert load_settings({}).port == 8080
    assert load_settings(environ).port == 9000
    assert load_settings(environ, port=9001).port == 9001
    assert load_settings(environ, port=None).home == Path("/somewhere")


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("APPLIANCE_PORT", "many", "is not of type int"),
        ("APPLIANCE_ENGINE", "llama", "choose one of auto, vllm, transformers"),
        ("APPLIANCE_KV_CACHE_GIB", "x", "is not of type float"),
    ],
)
def test_a_wrong_value_names_its_variable(variable: str, value: str, says: str) -> None:
    with pytest.raises(InvalidInput) as raised:
        load_settings({variable: value})
    assert variable in str(raised.value)
    assert says in str(raised.value)
