"""The type of the `imported` fixture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Import = Callable[..., dict[str, Any]]
