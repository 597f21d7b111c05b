"""Models whose layers come to the device one by one say what they say as a whole, and are judged alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import result, work
from tiny_families import make_family

from appliance.errors import InvalidInput, NoSpace
from appliance.home import Home, hashes
from appliance.release import streaming
from appliance.release.gates import Gate
from appliance.release.oracle import Oracle
from appliance.release.streaming import how_many_stay, is_streamed, load_to_score, make_writable, stream
from appliance.release.weights import pairs
from appliance.train.model import load_adapter, load_model

IDS = torch.arange(5, 29)[None]
NOTHING_STAYS = 0


@pytest.fixture
def no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "free_room", lambda: NOTHING_STAYS)


def says(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return logits


@pytest.mark.parametrize(
    ("sizes", "room", "staying"),
    [
        ([4, 4, 4], 12, 3),
        ([4, 4, 4], 11, 1),
        ([4, 4, 4], 8, 1),
        ([4, 4, 4], 7, 0),
        ([4, 1, 9], 13, 1),
        ([4, 4], -1, 0),
        ([], 5, 0),
    ],
)
def test_layers_stay_where_the_largest_of_the_others_has_room_beside_them(
    sizes: list[int], room: int, staying: int
) -> None:
    assert how_many_stay(sizes, room) == staying


def test_what_fits_is_loaded_as_a_whole(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = load_model(home.models / "tiny")
    needed = sum(parameter.nbytes for parameter in whole.parameters())
    for room, streams in ((None, False), (needed, False), (needed - 1, True)):
        monkeypatch.setattr(streaming, "free_room", lambda room=room: room)
        assert is_streamed(load_to_score(home.models / "tiny")) is streams


@pytest.mark.parametrize("family", ["qwen3_moe", "gemma3", "gpt_oss", "falcon_h1", "gemma4_text"])
def test_a_family_says_the_same(family: str, tmp_path: Path, no_room: None) -> None:
    folder = make_family(tmp_path / family, family)
    model = load_to_score(folder)
    assert is_streamed(model)
    assert torch.equal(says(model), says(load_model(folder)))


def test_one_layer_at_a_time_is_away_from_home(home: Home, no_room: None, monkeypatch: pytest.MonkeyPatch) -> None:
    away: set[int] = set()
    most: list[int] = []
    bring, leave = streaming._Visit._bring, streaming._Visit._leave

    def counted(visit: Any, *arguments: Any) -> None:
        bring(visit, *arguments)
        away.add(id(visit))
        most.append(len(away))

    def uncounted(visit: Any, *arguments: Any) -> None:
        leave(visit, *arguments)
        away.discard(id(visit))

    monkeypatch.setattr(streaming._Visit, "_bring", counted)
    monkeypatch.setattr(streaming._Visit, "_leave", uncounted)
    model = load_to_score(home.models / "tiny")
    layers = model.model.layers
    before = [parameter.data_ptr() for parameter in model.parameters()]
    inside: list[int] = []
    layers[1].self_attn.register_forward_hook(lambda module, *_: inside.append(module.q_proj.weight.data_ptr()))
    says(model)
    assert most == [1] * len(layers)
    assert [parameter.data_ptr() for parameter in model.parameters()] == before
    assert inside == [inside[0]]
    assert inside[0] not in before, "the layer's own pass has it elsewhere"


def test_a_pass_that_fails_leaves_the_layer_at_home(home: Home, no_room: None) -> None:
    model = load_to_score(home.models / "tiny")
    expected = says(model)
    before = [parameter.data_ptr() for parameter in model.parameters()]

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError

    hook = model.model.layers[1].mlp.register_forward_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        says(model)
    hook.remove()
    assert [parameter.data_ptr() for parameter in model.parameters()] == before
    assert torch.equal(says(model), expected)


def test_an_adapter_goes_with_its_layer(home: Home, no_room: None) -> None:
    adapter = home.runs / "lora" / "sft" / "adapter"
    model = load_adapter(load_to_score(home.models / "tiny"), adapter, trainable=False).eval()
    assert is_streamed(model)
    whole = load_adapter(load_model(home.models / "tiny"), adapter, trainable=False).eval()
    assert torch.equal(says(model), says(whole))
    with model.disable_adapter(), whole.disable_adapter():
        assert torch.equal(says(model), says(whole))


def test_weights_are_changed_beside_the_files(home: Home, no_room: None, tmp_path: Path) -> None:
    base = home.models / "tiny"
    files, expected = hashes(base), says(load_model(base))
    model = load_to_score(base)
    (tmp_path / "verify").mkdir()
    make_writable(model, tmp_path / "verify")
    assert torch.equal(says(model), expected)
    assert list((tmp_path / "verify").iterdir()) == []
    with torch.no_grad():
        model.get_parameter("model.layers.0.mlp.up_proj.weight").zero_()
    assert not torch.equal(says(model), expected)
    assert hashes(base) == files


def test_what_a_pass_needs_is_on_the_device_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_family(tmp_path / "llama", "llama", num_hidden_layers=3)
    device: set[int] = set()

    def bring(tensors: Iterable[torch.Tensor], _: torch.device) -> None:
        for tensor in tensors:
            tensor.data = tensor.data.clone()
            device.add(tensor.data_ptr())

    def there(*modules: torch.nn.Module) -> set[bool]:
        tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
        return {tensor.data_ptr() in device for tensor in tensors}

    monkeypatch.setattr(streaming, "_bring", bring)
    model = load_model(base, mapped=True)
    layers = model.model.layers
    layers[1].register_buffer("within", torch.ones(3))
    whole, layer = (streaming._bytes_of(module) for module in (model, layers[1]))
    stream(model, whole + 4096, torch.device("cpu"))
    assert there(model) == {True}, "as there is room"
    device.clear()
    model = load_model(base, mapped=True)
    layers = model.model.layers
    layers[1].register_buffer("within", torch.ones(3))
    stream(model, whole + 4096 - layer // 2, torch.device("cpu"))
    assert there(*layers[1:]) == {False}
    assert there(layers[0], model.model.embed_tokens, model.model.norm, model.lm_head, model.model.rotary_emb) == {True}
    inside: list[set[bool]] = []
    layers[1].self_attn.register_forward_pre_hook(lambda *_: inside.append(there(layers[1])))
    says(model)
    assert inside == [{True}]
    assert there(*layers[1:]) == {False}


@pytest.mark.parametrize(("family", "dtype"), [("qwen3_moe", torch.float32), ("llama", torch.float16)])
def test_what_cannot_be_mapped_needs_memory(
    family: str, dtype: torch.dtype, tmp_path: Path, no_room: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_family(tmp_path / family, family)
    path = folder / "model.safetensors"
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
    path.unlink()
    save_file(tensors, path, metadata={"format": "pt"})
    assert is_streamed(load_to_score(folder))
    monkeypatch.setattr(streaming.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    with pytest.raises(InvalidInput, match=r"takes 0.0 GiB of this machine's memory, of which 0.0 are free"):
        load_to_score(folder)
    dense = make_family(tmp_path / "dense", "llama")
    assert is_streamed(load_to_score(dense)), "which is mapped"


def test_a_disk_without_room_for_them_is_said(home: Home, no_room: None, tmp_path: Path, monkeypatch: Any) -> None:
    def full(*_: Any) -> None:
        raise NoSpace("disk_full", "no room", "make some")

    monkeypatch.setattr(streaming, "require_space", full)
    with pytest.raises(NoSpace):
        make_writable(load_to_score(home.models / "tiny"), tmp_path)
    make_writable(load_model(home.models / "tiny"), tmp_path)


@pytest.mark.parametrize("id", ["qlora", "dpo"])
def test_a_release_is_judged_alike(home: Home, id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = home.runs / id
    gates, streamed_models = [], []
    monkeypatch.setattr(streaming, "stream", lambda *given: streamed_models.append(given) or stream(*given))
    for room in (None, NOTHING_STAYS):
        monkeypatch.setattr(streaming, "free_room", lambda room=room: room)
        for step in ("merge", "verify"):
            (run / step / "result.json").unlink(missing_ok=True)
            assert work(run, step) == 0
        gates.append(result(run, "verify")["gates"])
    assert len(streamed_models) >= 3, "of the candidates, of the release and of its rival"
    whole, streamed = gates
    assert all(gate["passed"] for gate in streamed.values()), streamed
    assert {name: gate["passed"] for name, gate in whole.items()} == {name: True for name in streamed}
    for gate, figure in (("fidelity", "merged_loss"), ("fidelity", "adapter_loss")):
        assert streamed[gate]["figures"][figure] == pytest.approx(whole[gate]["figures"][figure], abs=1e-5)
    assert not [path for path in (run / "verify").iterdir() if path.is_dir()]


def test_a_wrong_merge_is_refused_all_the_same(home: Home, no_room: None, monkeypatch: pytest.MonkeyPatch) -> None:
    run = home.runs / "lora"
    path = run / "merge" / "model" / "model.safetensors"
    base = load_file(home.models / "tiny" / "model.safetensors")
    spoilt = {name: base[name] + 0.8 * (tensor - base[name]) for name, tensor in load_file(path).items()}
    path.unlink()
    save_file(spoilt, path, metadata={"format": "pt"})

    def believe_the_files(base: Path, model: Path, oracle: Oracle, see: Callable[[str, torch.Tensor], None]) -> Gate:
        for name, before, _ in pairs(base, model):
            if name in oracle.changed:
                see(name, oracle.merged(name, oracle.start(name, before)))
        return Gate(True)

    monkeypatch.setattr("appliance.release.verify.judge_weights", believe_the_files)
    assert work(run, "verify") == 0
    gates = result(run, "verify")["gates"]
    assert gates["structure"]["passed"]
    assert not gates["fidelity"]["passed"]
