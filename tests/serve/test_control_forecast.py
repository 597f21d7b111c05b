"""A recipe's forecast through the control API, as `appliance train --dry-run` asks for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from chat_templates import CHATML, make_tokenizer
from controlling import Control
from safetensors.numpy import save_file

from appliance import api
from appliance.errors import Conflict, InvalidInput, NotFound
from appliance.sources import find_sources
from appliance.supervisor.engines import Room, advice_on_two

RECIPE = """
name = "r"
base = "tiny"
[[stages]]
method = "sft"
dataset = "one"
epochs = 2
[[stages]]
method = "{second}"
name = "again"
dataset = "one"
"""
SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture
def base(control: Control) -> None:
    """A base model without weights."""
    folder = control.home.models / "tiny"
    make_tokenizer(CHATML).save_pretrained(folder)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 320, **SHAPE}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({}, folder / "model.safetensors")


async def import_rows(control: Control, tmp_path: Path) -> None:
    file = tmp_path / "one.jsonl"
    file.write_text("\n".join(json.dumps({"instruction": f"Say {n}", "output": f"I say {n}"}) for n in range(20)))
    await control.client.import_dataset(find_sources([str(file)]), "one")


@pytest.mark.slow
@pytest.mark.usefixtures("base")
async def test_each_stage_is_forecast_and_nothing_is_queued(control: Control, tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        await control.client.forecast(RECIPE.format(second="sft"))
    await import_rows(control, tmp_path)
    found = await control.client.forecast(RECIPE.format(second="sft"))
    first, again = found.stages
    assert found.serving is not None
    assert found.serving.fits
    assert (first["stage"], first["steps"], first["fits"], first["advice"]) == ("sft", 6, True, "")
    assert again["steps"] == 9
    assert first["memory"]["total"] == sum(size for part, size in first["memory"].items() if part != "total")
    assert await control.client.runs() == []
    assert list(control.home.incoming.iterdir()) == []


@pytest.mark.slow
@pytest.mark.usefixtures("base")
async def test_what_our_own_engines_hold_counts_as_free_where_they_stop_for_a_training(
    control: Control, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await import_rows(control, tmp_path)
    monkeypatch.setattr(control.supervisor.engines, "held", lambda: 1 << 40)
    told = []
    for control.supervisor.exclusive in (False, True):
        found = await control.client.forecast(RECIPE.format(second="sft"))
        told.append(found.stages[0]["available"] >= 1 << 40)
    assert told == [False, True]


@pytest.mark.slow
@pytest.mark.usefixtures("base")
async def test_a_run_whose_release_could_not_be_served_is_refused_before_its_first_step(
    control: Control, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await import_rows(control, tmp_path)
    monkeypatch.setattr(control.supervisor.engines.kind, "room", lambda model, beside=False: Room(3 << 30, 2 << 30))
    recipe = RECIPE.format(second="sft")
    with pytest.raises(Conflict, match=r"takes 3\.0 GiB to be verified and served, of which this box has 2\.0 — take"):
        await control.client.train(recipe)
    found = await control.client.forecast(recipe)
    no = "this box cannot hold two engines for it: each takes 3.0 GiB"
    assert found.serving == api.Serving(needed=3 << 30, available=2 << 30, fits=False, two=no)
    assert (await control.client.train('end = "adapter"\n' + recipe)).state == "queued"
    assert (await control.client.forecast('end = "adapter"\n' + recipe)).serving is None


@pytest.mark.slow
@pytest.mark.usefixtures("base")
async def test_a_release_that_will_be_served_in_fp8_is_said_to_be_before_its_first_step(
    control: Control, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await import_rows(control, tmp_path)
    recipe, told = RECIPE.format(second="sft"), []
    for precision in ("FP8", "16-bit"):
        room = Room(2 << 30, 3 << 30, precision)
        monkeypatch.setattr(control.supervisor.engines.kind, "room", lambda model, beside=False, room=room: room)
        found = await control.client.forecast(recipe)
        expected = api.Serving(
            needed=2 << 30, available=3 << 30, fits=True, precision=precision, two=advice_on_two(room)
        )
        assert found.serving == expected
        run = await control.client.train(recipe)
        told.append([event["message"] for event in await control.client.events(run.id)])
    assert told == [
        [
            "the release does not fit in 16 bits: it takes 2.0 GiB to be verified and served in FP8, "
            "of which this box has 3.0"
        ],
        [],
    ]


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.usefixtures("base")
async def test_a_stage_that_could_not_train_is_refused(control: Control, tmp_path: Path) -> None:
    await import_rows(control, tmp_path)
    with pytest.raises(InvalidInput, match="dpo trains on preference rows"):
        await control.client.forecast(RECIPE.format(second="dpo"))
    assert list(control.home.incoming.iterdir()) == []


@pytest.mark.slow
@pytest.mark.usefixtures("base")
async def test_a_run_is_refused_at_once_for_what_a_dry_run_refuses(
    control: Control, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await import_rows(control, tmp_path)
    short = RECIPE.format(second="sft").replace("epochs = 2", "max_length = 16")
    with pytest.raises(InvalidInput, match="20 rows of one are longer than max_length = 16 tokens in stage sft"):
        await control.client.train(short)
    with pytest.raises(InvalidInput, match="dpo trains on preference rows, and dataset one holds messages rows"):
        await control.client.train(RECIPE.format(second="dpo"))
    report = Path(control.home.datasets / (await control.client.datasets())[0].id / "report.json")
    report.write_text(json.dumps(json.loads(report.read_text()) | {"tokens": None}))
    with pytest.raises(InvalidInput, match=r"stage sft, dataset one: \d+ rows are longer than max_length = 16 tokens"):
        await control.client.train(short)
    assert await control.client.runs() == []
    assert list(control.home.runs.iterdir()) == []
    assert (await control.client.train(RECIPE.format(second="sft"))).state == "queued"
