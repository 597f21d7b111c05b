"""The control API about adapters that were trained elsewhere."""

from __future__ import annotations

import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from controlling import Control

from appliance.errors import InvalidInput, NotFound
from appliance.home import hashes
from appliance.release.given import GivenRequest
from appliance.train.recipe import parse_recipe


@pytest.fixture
async def box(tmp_path: Path) -> AsyncIterator[Control]:
    box = Control(tmp_path / "box")
    yield box
    await box.client.close()


@pytest.fixture(autouse=True)
def fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that looks at adapters, and finds that all of them fit but those that call themselves Misfit."""

    async def look(module: str, home: object, asked: GivenRequest, *_: object) -> dict[str, Any]:
        assert module == "appliance.release.given"
        assert (asked.base, (asked.adapter / "adapter_model.safetensors").is_file()) == ("tiny", True)
        if "Misfit" in (asked.adapter / "adapter_config.json").read_text():
            raise InvalidInput("not_mergeable", "the base model has no module layer", "merge into another")
        return {}

    monkeypatch.setattr("serve.control.arrivals.run_module", look)


def adapter(folder: Path) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{\n "peft_type": "LORA",\n "r": 4\n}')
    header = b'{"layer.lora_A.weight": {"dtype": "U8", "shape": [13000], "data_offsets": [0, 13000]}}'
    weights = len(header).to_bytes(8, "little") + header + b"line\nanother\x00" * 1000
    (folder / "adapter_model.safetensors").write_bytes(weights)
    return folder


async def test_an_adapter_from_elsewhere_becomes_a_run_that_merges(box: Control, tmp_path: Path) -> None:
    box.model()
    source = adapter(tmp_path / "mine")
    run = await box.client.merge(source, "tiny", "mine", quantised=True)
    assert (run.id, run.stages, run.state) == ("mine-1", ("merge", "verify", "probe"), "queued")
    folder = box.home.runs / run.id
    assert (folder / "adapter" / "adapter_model.safetensors").read_bytes() == (
        source / "adapter_model.safetensors"
    ).read_bytes()
    assert json.loads((folder / "adapter" / "adapter_config.json").read_bytes()) == {"peft_type": "LORA", "r": 4}
    recipe = parse_recipe((folder / "recipe.toml").read_text())
    assert recipe.given is not None
    assert (recipe.quantised, recipe.changes_weights, recipe.datasets) == (True, True, {})
    assert not (folder / "events.jsonl").exists()
    assert recipe.given.sha256 == hashes(folder)["adapter/adapter_model.safetensors"]
    assert list(box.home.incoming.iterdir()) == []


async def test_an_adapter_on_nf4_of_a_base_with_experts_in_mxfp4_is_refused(box: Control, tmp_path: Path) -> None:
    box.model()
    (box.home.models / "tiny" / "config.json").write_text('{"quantization_config": {"quant_method": "mxfp4"}}')
    with pytest.raises(InvalidInput, match="tiny are in MXFP4"):
        await box.client.merge(adapter(tmp_path / "mine"), "tiny", "mine", quantised=True)
    with pytest.raises(InvalidInput, match="tiny are in MXFP4"):
        await box.client.train('name = "r"\nbase = "tiny"\n[[stages]]\nmethod = "sft"\ndataset = "d"\n')
    assert list(box.home.runs.iterdir()) == []


async def test_an_adapter_that_is_none_or_has_no_base_is_refused(box: Control, tmp_path: Path) -> None:
    source = adapter(tmp_path / "mine")
    with pytest.raises(NotFound, match="no base model tiny"):
        await box.client.merge(source, "tiny", "mine")
    box.model()
    with pytest.raises(NotFound, match="no dataset"):
        await box.client.merge(source, "tiny", "mine", dataset="none")
    with pytest.raises(InvalidInput, match="no name"):
        await box.client.merge(source, "tiny", "../mine")
    (source / "adapter_config.json").write_text('{"base_model_name_or_path": "org/Other-1B"}')
    with pytest.raises(InvalidInput, match=r"trained on org/Other-1B, and not on tiny .*--same-base"):
        await box.client.merge(source, "tiny", "mine")
    assert list(box.home.runs.iterdir()) == []
    assert (await box.client.merge(source, "tiny", "mine", same_base=True)).id == "mine-1"
    shutil.rmtree(box.home.runs / "mine-1")
    (source / "adapter_config.json").unlink()
    with pytest.raises(InvalidInput, match=r"holds no adapter_config.json"):
        await box.client.merge(source, "tiny", "mine")
    assert list(box.home.runs.iterdir()) == []


async def test_one_that_does_not_fit_the_base_is_refused_before_a_run_is_queued(box: Control, tmp_path: Path) -> None:
    box.model()
    source = adapter(tmp_path / "mine")
    (source / "adapter_config.json").write_text('{"base_model_name_or_path": "org/Misfit-1B"}')
    with pytest.raises(InvalidInput, match="no module layer"):
        await box.client.merge(source, "tiny", "mine", same_base=True)
    assert (await box.client.runs()) == list(box.home.runs.iterdir()) == list(box.home.incoming.iterdir()) == []
