"""httpx without its own command line, which it would import with all that draws one: more than all the rest of it."""

from __future__ import annotations

import sys

sys.modules.setdefault("httpx._main", None)  # type: ignore[arg-type]  # so that its import fails, which httpx allows for

import httpx  # noqa: E402

__all__ = ["httpx"]
