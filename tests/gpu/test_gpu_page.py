"""The page about GPUs says what the code says."""

from __future__ import annotations

from pathlib import Path

import pytest
from gpu_page import (
    BASES,
    CARDS,
    GIB,
    as_on_a_gpu,
    folder_of,
    measured,
    said_of,
    said_of_serving,
    served_on,
    simulated,
    trained_on,
)

from appliance.train import simulation
from appliance.train.recipe import Adapter

PAGE = (Path(__file__).parents[2] / "docs" / "GPU.md").read_text()
SMALL, *_ = BASES
pytestmark = pytest.mark.slow


def test_few_layers_tell_of_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The passes on the page come from a few layers of each model: they are those of the whole model."""
    with as_on_a_gpu():
        folder, adapter = folder_of(SMALL, tmp_path), Adapter()
        model = simulation.meta_model(folder, adapter, every_n_layers=2)
        whole, told = simulation.simulate(model, 2, 512, 512), simulated(folder, adapter, 2, 2, 512, 512)
    for figure in ("activations", "logits", "forward", "backward", "head"):
        assert getattr(told, figure) == pytest.approx(getattr(whole, figure), rel=0.02), figure


def test_a_row_of_the_page_is_what_the_forecast_says_now(tmp_path: Path) -> None:
    with as_on_a_gpu():
        found = [trained_on(24, folder_of(base, tmp_path), longest) for base in (SMALL,) for longest in (400, 4096)]
    cells = [said_of(one) for one in found]
    (row,) = (line for line in PAGE.splitlines() if line.startswith("| 24 GB |") and "GiB" in line)
    assert row.split(" | ")[1:3] == cells


def test_a_display_leaves_less(tmp_path: Path) -> None:
    with as_on_a_gpu():
        folder = folder_of(SMALL, tmp_path)
        free, shared = (trained_on(12, folder, 400, display=display) for display in (False, True))
    assert free.available - shared.available == GIB


@pytest.mark.parametrize("beside", [False, True], ids=["one engine", "two engines"])
def test_what_is_served_grows_with_the_card_and_is_on_the_page(tmp_path: Path, beside: bool) -> None:
    one, two = (line for line in PAGE.splitlines() if line.startswith("| 24 GB |") and "tokens of cache" in line)
    for base in BASES:
        folder = folder_of(base, tmp_path)
        rooms, tokens = zip(*(served_on(card, folder, beside=beside) for card in CARDS), strict=True)
        fits = [room.suffices for room in rooms]
        assert fits == sorted(fits)
        assert list(tokens) == sorted(tokens)
        cell = (two if beside else one).strip("| ").split(" | ")[1 + BASES.index(base)]
        assert cell == said_of_serving(rooms[CARDS.index(24)], tokens[CARDS.index(24)])
    known = (rooms[CARDS.index(24)].precision, rooms[CARDS.index(80)].precision)
    assert known == ("FP8", "16-bit"), "of the largest"


def test_two_engines_have_less_than_half_of_the_card_each(tmp_path: Path) -> None:
    alone, beside = (served_on(24, folder_of(SMALL, tmp_path), beside=two)[0] for two in (False, True))
    assert alone.needed == beside.needed
    assert beside.available == pytest.approx(0.45 * 24e9)


def test_the_measured_figures_are_those_of_the_record() -> None:
    assert measured() in PAGE
