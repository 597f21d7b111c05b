"""docs/dashboard.svg is what the dashboard looks like. UPDATE_PICTURES=1 draws it anew."""

from __future__ import annotations

import html
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from dashboard_driver import WIDE, dashboard
from fake_daemon import FakeDaemon

PICTURE = Path(__file__).parents[2] / "docs" / "dashboard.svg"
MOMENT = 1_790_000_000.0


def visible_lines(svg: str) -> list[str]:
    """The text of the picture, row by row, without its random ids and coordinates."""
    rows: dict[float, list[tuple[float, str]]] = {}
    for attributes, text in re.findall(r"<text ([^>]*)>([^<]*)</text>", svg):
        x, y = (float(re.search(rf'\b{axis}="([\d.]+)"', attributes)[1]) for axis in "xy")  # type: ignore[index]
        rows.setdefault(y, []).append((x, html.unescape(text).replace("\xa0", " ")))
    return ["".join(text for _, text in sorted(row)).rstrip() for _, row in sorted(rows.items())]


@pytest.fixture
def utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


async def test_the_picture_in_the_docs_is_how_it_looks(
    socket: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, utc: None
) -> None:
    monkeypatch.setattr("tui.screens.runs.time.time", lambda: MOMENT)
    monkeypatch.delenv("TEXTUAL_THEME", raising=False)
    daemon = FakeDaemon(socket, now=MOMENT)
    daemon.gpus = [{"name": "L4", "memory_total": 24 << 30, "memory_used": 17 << 30, "utilisation": 97}]
    await daemon.start()
    async with dashboard(daemon, WIDE) as driver:
        for expected in ("── train", "dpo step 22/40 loss", "held-out loss", "2/5  55%", "● connected"):
            await driver.until_seen(expected)
        await driver.pilot.pause()
        svg = driver.app.export_screenshot(title="appliance")
    await daemon.stop()
    svg = re.sub(r"terminal-\d+", "terminal-appliance", svg)
    drawn = tmp_path / "dashboard.svg"
    drawn.write_text(svg, encoding="utf-8")
    if os.environ.get("UPDATE_PICTURES"):
        PICTURE.write_text(svg, encoding="utf-8")
    assert visible_lines(PICTURE.read_text(encoding="utf-8")) == visible_lines(svg), (
        "the dashboard looks otherwise now; look at it, then run with UPDATE_PICTURES=1"
    )
    assert any("facts-3" in line for line in visible_lines(svg))
