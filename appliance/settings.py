"""Every setting of the daemon and its clients, declared once: default, type, help, environment variable."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from appliance.errors import InvalidInput


def _default_home() -> Path:
    data = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return Path(data) / "appliance"


def _setting(default: Any, help: str, choices: tuple[str, ...] = ()) -> Any:
    metadata = {"help": help, "choices": choices}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Settings:
    """Read from `APPLIANCE_<NAME>`; a command's option of the same name wins."""

    home: Path = _setting(_default_home, "where models, datasets, runs, releases and the database live")
    socket: str = _setting("", "path of the control socket; empty: control.sock in the home")
    host: str = _setting("127.0.0.1", "address of the chat endpoint; another than loopback needs an API key first")
    port: int = _setting(8080, "port of the chat endpoint")
    engine: str = _setting(
        "auto",
        "what serves releases; auto takes vLLM where it is installed",
        ("auto", "vllm", "transformers"),
    )
    lease: str = _setting(
        "auto",
        "share: train and serve at once; exclusive: one holds the accelerator at a time; "
        "auto: exclusive where there is a GPU",
        ("auto", "share", "exclusive"),
    )
    sleep: str = _setting(
        "auto",
        "what vLLM does while a worker has the GPU under the exclusive lease; auto: it sleeps, weights and cache given "
        "back, and wakes without starting anew; off: it is stopped",
        ("auto", "off"),
    )
    canary_requests: int = _setting(
        100, "requests to a canary after which it goes live where nothing speaks against it"
    )
    adapter_rank: int = _setting(
        0,
        "largest rank of an adapter that vLLM serves unmerged, for `promote --adapter`; on a live release with an "
        "adapter of its own the ranks of both count together; 0: none, which saves memory",
    )
    drain_seconds: float = _setting(
        60.0,
        "how long answers that have begun may go on when their engine is to stop or to change its weights, in seconds; "
        "new requests wait meanwhile, a minute longer at most",
    )
    traffic_days: int = _setting(30, "how long requests to the endpoint stay on record, in days; feedback stays")
    traffic_gib: float = _setting(1.0, "disk that this record takes at most, in GiB; the oldest requests go first")
    kv_cache_gib: float = _setting(1.0, "memory of the engine's KV cache on a machine without a GPU, in GiB")
    gpu: str = _setting(
        "",
        "the GPU to work on: its number in the order of the PCI bus, or its UUID; empty: that with the most memory",
    )
    gpu_memory_share: float = _setting(
        0.92,
        "largest share of the GPU's memory that vLLM may take, which takes no more than is free when it starts; "
        "lower it where training goes on beside it (APPLIANCE_LEASE=share)",
    )
    max_model_len: int = _setting(0, "longest context that is served, in tokens; 0: the model's own, at most 8192")


def load_settings(environ: Mapping[str, str] | None = None, **overrides: Any) -> Settings:
    """Settings from the environment, with `overrides` that are not None on top.

    Raises InvalidInput naming the variable that does not parse.
    """
    environ = os.environ if environ is None else environ
    values: dict[str, Any] = {}
    for declared in fields(Settings):
        variable = f"APPLIANCE_{declared.name.upper()}"
        raw = overrides.get(declared.name)
        if raw is None:
            raw = environ.get(variable)
        if raw is None or raw == "":
            continue
        try:
            values[declared.name] = _parse(raw, declared.type)
        except ValueError:
            raise InvalidInput(
                "bad_setting",
                f"{variable}={raw!r} is not of type {declared.type}",
                f"set {variable} to a {declared.type}",
            ) from None
        choices = declared.metadata["choices"]
        if choices and values[declared.name] not in choices:
            raise InvalidInput("bad_setting", f"{variable}={raw!r} is not known", f"choose one of {', '.join(choices)}")
    return Settings(**values)


def _parse(raw: Any, kind: Any) -> Any:
    if kind == "Path":
        return Path(raw).expanduser().absolute()
    if kind == "int":
        return int(raw)
    if kind == "float":
        return float(raw)
    return str(raw)
