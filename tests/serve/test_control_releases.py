"""The control API about releases, over its own client: going live, leaving this box and coming to another."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from controlling import Control

from appliance import api
from appliance.errors import ApplianceError, Conflict, InvalidInput, NotFound
from appliance.home import hashes, sha256, write_json
from appliance.release import integrity
from appliance.release.foreign import ForeignRequest
from appliance.store.releases import Releases
from appliance.train.recipe import Recipe, SftStage, parse_recipe

FILES = {"model.safetensors": bytes(range(256)) * 4000, "adapter/adapter_config.json": b"{}", "config.json": b"{}"}


class Box(Control):
    """A control API with releases in its home."""

    def release(self, id: str, *failed: str) -> Path:
        """A release whose gates have passed but for `failed`."""
        folder = self.home.releases / id
        for name, content in FILES.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        gates = {
            name: {"passed": name not in failed, "figures": {}, "reason": f"{name} said so"}
            for name in ("structure", "fidelity", "parity", "stopping", "quality")
        }
        state, reason = (
            ("refused", f"{failed[0]}: {failed[0]} said so") if failed else ("verified", "all 5 gates passed")
        )
        parts = ("datasets", "dataset_rows", "merge", "stages", "base_files", "recipe", "versions")
        manifest: dict[str, Any] = {part: {} for part in parts}
        manifest |= {"release": id, "state": state, "reason": reason, "created": 1.0, "base": "tiny", "gates": gates}
        manifest |= {"files": hashes(folder), "recipe_sha256": "", "accepted": {}}
        manifest["recipe"] = {"name": "r", "base": "tiny", "clock": "2026-01-01"}
        write_json(folder / "manifest.json", manifest)
        passed = {name: name not in failed for name in gates}
        digest = sha256(folder / "manifest.json")
        self.supervisor.releases.add(id, "tiny", manifest["state"], reason, passed, False, digest)
        return folder


@pytest.fixture
async def box(tmp_path: Path) -> AsyncIterator[Box]:
    box = Box(tmp_path / "box")
    yield box
    await box.client.close()


@pytest.fixture
async def other(tmp_path: Path) -> AsyncIterator[Box]:
    box = Box(tmp_path / "other")
    yield box
    await box.client.close()


@pytest.fixture(autouse=True)
def foreign(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Where releases lay that a process was to look at before they were taken in; here it finds all of them good."""
    looked_at: list[Path] = []

    async def look(module: str, home: object, asked: ForeignRequest, *_: object) -> dict[str, Any]:
        assert module == "appliance.release.foreign"
        assert (asked.folder / "manifest.json").exists()
        looked_at.append(asked.folder)
        return {}

    monkeypatch.setattr("serve.control.arrivals.run_module", look)
    return looked_at


async def test_a_refused_release_is_inspected_and_not_served(box: Box, tmp_path: Path) -> None:
    box.release("r-1", "fidelity")
    assert (await box.client.manifest("r-1"))["reason"] == "fidelity: fidelity said so"
    for attempt in (
        box.client.promote("r-1"),
        box.client.promote("r-1", accept="quality"),
        box.client.export("r-1", tmp_path / "out"),
    ):
        with pytest.raises(Conflict, match="fidelity"):
            await attempt
    assert box.supervisor.releases.live() is None
    assert not (tmp_path / "out").exists()


async def test_a_damaged_manifest_stands_in_the_way_of_its_release_alone(box: Box, tmp_path: Path) -> None:
    box.release("r-1")
    (box.release("r-2") / "manifest.json").write_bytes(b'{"files": ')
    assert [release.id for release in await box.client.releases()] == ["r-2", "r-1"]
    assert (await box.client.status()).live is None
    assert (await box.client.gc(keep=2)).releases == ()
    for attempt in (box.client.manifest("r-2"), box.client.export("r-2", tmp_path / "out")):
        with pytest.raises(ApplianceError, match="manifest of release r-2 cannot be read"):
            await attempt
    assert not (tmp_path / "out").exists()
    await box.client.export("r-1", tmp_path / "out")


def spoil(folder: Path) -> None:
    (folder / "config.json").write_bytes(b"[]")


async def test_one_that_is_damaged_is_refused_by_the_call_that_promotes_it(box: Box, tmp_path: Path) -> None:
    spoil(box.release("r-1"))
    for _ in range(2):
        with pytest.raises(Conflict, match=r"r-1 is damaged: config\.json is not what its manifest says") as caught:
            await box.client.promote("r-1")
    assert "verify r-1" in caught.value.next
    for attempt in (box.client.promote("r-1", canary=0.1), box.client.export("r-1", tmp_path / "out")):
        with pytest.raises(Conflict, match="damaged"):
            await attempt
    assert box.supervisor.releases.live() is None
    (listed,) = await box.client.releases()
    assert (listed.state, listed.damage) == ("verified", "config.json is not what its manifest says")


async def test_what_takes_long_to_read_is_promoted_and_said_to_be_read(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.control.releases.CHECK_SECONDS", 0.05)
    go = threading.Event()
    original = integrity._sha256

    def slow(path: Path, reading: integrity.Reading) -> str:
        go.wait(10)
        return original(path, reading)

    monkeypatch.setattr(integrity, "_sha256", slow)
    box.release("r-1")
    promoted = await box.client.promote("r-1")
    assert (promoted.live, promoted.check and promoted.check.state) == (True, "reading")
    assert [check.release for check in (await box.client.status()).checks] == ["r-1"]
    assert [release.check for release in await box.client.releases()] == [promoted.check]
    go.set()
    assert (await box.supervisor.checks.settle("r-1", 10)).state == "whole"
    assert (await box.client.promote("r-1")).check is None


async def test_verify_reads_everything_and_tells_the_outcome(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = box.release("r-1")
    monkeypatch.setattr("appliance.client._CHECK_SECONDS", 0.01)
    *_, last = [check async for check in box.client.check("r-1")]
    assert last == api.Check(release="r-1", state="whole")
    read: list[str] = []
    original = integrity._sha256
    monkeypatch.setattr(
        integrity, "_sha256", lambda path, reading: (read.append(path.name), original(path, reading))[1]
    )
    *_, last = [check async for check in box.client.check("r-1")]
    assert "model.safetensors" in read, "though nothing has changed"
    assert last.state == "whole"
    spoil(folder)
    *_, last = [check async for check in box.client.check("r-1")]
    assert (last.state, last.damage) == ("damaged", "config.json is not what its manifest says")
    with pytest.raises(NotFound):
        [check async for check in box.client.check("r-2")]


async def test_a_rollback_passes_over_what_it_finds_damaged(box: Box) -> None:
    folders = {id: box.release(id) for id in ("r-1", "r-2", "r-3")}
    for id in folders:
        await box.client.promote(id)
    spoil(folders["r-2"])
    assert (await box.client.rollback()).id == "r-1"
    assert (await box.client.status()).live == "r-1"


async def test_gc_counts_and_keeps_what_is_whole(box: Box) -> None:
    for id in ("r-1", "r-2", "r-3"):
        box.release(id)
    box.supervisor.releases.found_damaged("r-3", "bits")
    assert (await box.client.gc(keep=1)).releases == ("r-1", "r-3")


async def test_quality_alone_can_be_accepted_by_name(box: Box) -> None:
    box.release("r-1", "quality")
    with pytest.raises(Conflict, match="quality"):
        await box.client.promote("r-1")
    with pytest.raises(InvalidInput):
        await box.client.promote("r-1", accept="fidelity")
    promoted = await box.client.promote("r-1", accept="quality")
    assert (promoted.state, promoted.live, promoted.gates["quality"]) == ("verified", True, False)
    manifest = await box.client.manifest("r-1")
    assert manifest["accepted"].keys() == {"quality"}
    assert (await box.client.promote("r-1", accept="quality")).live
    *_, last = [check async for check in box.client.check("r-1")]
    assert last.state == "whole", "with the manifest as it is now"


@pytest.mark.parametrize("moment", ["appliance.release.manifest.write_json", "appliance.home.os.replace", "accept"])
async def test_killed_while_it_is_accepted_it_is_accepted_the_next_time(
    box: Box, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    box.release("r-1", "quality")
    with monkeypatch.context() as patch:

        def die(*_: object) -> None:
            raise asyncio.CancelledError

        patch.setattr(*((Releases, "accept") if moment == "accept" else (moment,)), die)
        with pytest.raises((asyncio.CancelledError, ApplianceError)):
            await box.client.promote("r-1", accept="quality")
    assert box.supervisor.releases.live() is None
    assert (await box.client.promote("r-1", accept="quality")).live
    *_, last = [check async for check in box.client.check("r-1")]
    assert last.state == "whole"


async def test_a_refused_release_does_not_accept_itself(box: Box) -> None:
    folder = box.release("r-1", "fidelity")
    manifest = json.loads((folder / "manifest.json").read_bytes())
    write_json(folder / "manifest.json", manifest | {"state": "verified"})
    with pytest.raises(Conflict, match="not the one that was recorded"):
        await box.client.promote("r-1", accept="quality")
    assert box.supervisor.releases.get("r-1").state == "refused"


@pytest.mark.parametrize("accepted", [False, True])
async def test_what_this_box_refused_by_itself_is_not_acceptable(box: Box, accepted: bool) -> None:
    """Though its manifest says that it was verified, or accepted."""
    folder = box.release("r-1", *(["quality"] if accepted else []))
    if accepted:
        await box.client.promote("r-1", accept="quality")
    box.release("r-2")
    await box.client.promote("r-2")
    before = hashes(folder)
    box.supervisor.releases.refuse("r-1", "only 0 of 10 reference answers were repeated here")
    with pytest.raises(Conflict, match="refused: only 0 of 10") as caught:
        await box.client.promote("r-1", accept="quality")
    assert caught.value.code == "not_acceptable"
    assert box.supervisor.releases.get("r-1").state == "refused"
    assert box.supervisor.releases.live() == "r-2"
    assert hashes(folder) == before


async def test_accepting_what_has_passed_changes_nothing(box: Box) -> None:
    folder = box.release("r-1")
    before = hashes(folder)
    assert (await box.client.promote("r-1", accept="quality")).live
    assert hashes(folder) == before


@pytest.mark.parametrize("suffix", ["", ".tar"])
async def test_an_export_holds_every_file(box: Box, tmp_path: Path, suffix: str) -> None:
    folder = box.release("r-1")
    await box.client.export("r-1", tmp_path / f"out{suffix}")
    if suffix:
        subprocess.run(["tar", "-xf", tmp_path / "out.tar", "-C", tmp_path], check=True)
        assert hashes(tmp_path / "r-1") == hashes(folder)
    else:
        assert hashes(tmp_path / "out") == hashes(folder)


@pytest.mark.parametrize("with_its_hash", [False, True])
@pytest.mark.parametrize("suffix", ["", ".tar"])
async def test_a_file_that_has_changed_is_not_exported(
    box: Box, tmp_path: Path, suffix: str, with_its_hash: bool
) -> None:
    folder = box.release("r-1")
    (folder / "config.json").write_bytes(b"[]")
    if with_its_hash:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        manifest["files"]["config.json"] = sha256(folder / "config.json")
        write_json(folder / "manifest.json", manifest)
    what = "manifest.json is not the one that was recorded" if with_its_hash else "config.json is not what its manifest"
    target = tmp_path / "there" / f"out{suffix}"
    target.parent.mkdir()
    with pytest.raises(ApplianceError, match=f"release r-1 is damaged: {re.escape(what)}"):
        await box.client.export("r-1", target)
    assert list(target.parent.iterdir()) == []


async def test_only_a_releases_own_files_are_handed_out(box: Box) -> None:
    folder = box.release("r-1")
    (folder / "notes.txt").write_text("not listed")
    for name in ("notes.txt", "../r-1/config.json", "%2e%2e/r-1/config.json", "nothing"):
        answer = await box.client._http.get(f"/v1/releases/r-1/files/{name}")
        assert answer.status_code == 404, name


async def test_another_box_takes_it_in_and_again_and_can_promote_it(box: Box, other: Box, tmp_path: Path) -> None:
    folder = box.release("r-1")
    await box.client.export("r-1", tmp_path / "r.tar")
    for _ in range(2):
        release = await other.client.import_release(tmp_path / "r.tar")
        assert (release.id, release.state, release.live) == ("r-1", "verified elsewhere", False)
    assert hashes(other.home.releases / "r-1") == hashes(folder)
    assert json.loads((folder / "manifest.json").read_bytes())["state"] == "verified", "the manifest stays as it is"
    assert other.supervisor.checks.whole("r-1"), "its files have been read"
    assert (await other.client.promote("r-1")).live
    assert list(other.home.incoming.iterdir()) == []
    assert other.supervisor.runs.new_id(Recipe(name="r", base="tiny")) == "r-2", "its id is taken"


async def test_an_id_that_is_taken_needs_another_name(box: Box, other: Box, tmp_path: Path) -> None:
    box.release("r-1")
    await box.client.export("r-1", tmp_path / "r.tar")
    (other.home.runs / "r-1").mkdir()
    with pytest.raises(Conflict, match="another release or run r-1"):
        await other.client.import_release(tmp_path / "r.tar")
    assert (await other.client.import_release(tmp_path / "r.tar", "theirs")).id == "theirs"
    with pytest.raises(InvalidInput, match="no name"):
        await other.client.import_release(tmp_path / "r.tar", "../x")
    other.release("mine")
    with pytest.raises(Conflict):
        await other.client.import_release(tmp_path / "r.tar", "mine")


async def test_a_tampered_or_cut_archive_leaves_nothing(box: Box, other: Box, tmp_path: Path) -> None:
    box.release("r-1")
    await box.client.export("r-1", tmp_path / "r.tar")
    whole = (tmp_path / "r.tar").read_bytes()
    weights = whole.index(FILES["model.safetensors"])
    tampered = whole[: weights + 7] + b"!" + whole[weights + 8 :]
    for content in (tampered, whole[: len(whole) // 2], whole[:100], b"", b"x" * 5000):
        (tmp_path / "bad.tar").write_bytes(content)
        with pytest.raises(InvalidInput) as caught:
            await other.client.import_release(tmp_path / "bad.tar")
        assert caught.value.code == "bad_archive"
    assert await other.client.releases() == []
    assert list(other.home.releases.iterdir()) == list(other.home.incoming.iterdir()) == []
    with pytest.raises(InvalidInput, match="No such file"):
        await other.client.import_release(tmp_path / "none.tar")


async def test_what_would_run_code_or_cannot_be_loaded_leaves_nothing(
    box: Box, other: Box, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    box.release("r-1")
    await box.client.export("r-1", tmp_path / "r.tar")

    async def refuse(*_: object) -> dict[str, Any]:
        raise InvalidInput("bad_archive", "the release cannot be imported: it runs code", "")

    monkeypatch.setattr("serve.control.arrivals.run_module", refuse)
    with pytest.raises(InvalidInput, match="it runs code"):
        await other.client.import_release(tmp_path / "r.tar")
    assert await other.client.releases() == []
    assert list(other.home.releases.iterdir()) == list(other.home.incoming.iterdir()) == []


GATES = {
    name: {"passed": True, "figures": {}, "reason": f"{name} said so"}
    for name in ("structure", "fidelity", "parity", "stopping", "quality")
}
FAILED = {"passed": False, "figures": {}, "reason": "apart"}
RECIPE = {"name": "r", "base": "tiny"}
ASKED = {"messages": [{"role": "user", "content": "hi"}], "text": "hello"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"gates": None}, "'gates'"),
        ({"gates": {"structure": "passed"}}, "'gates.structure'"),
        ({"gates": {"structure": GATES["structure"]}}, "'gates' has to hold structure, fidelity"),
        ({"gates": GATES | {"taste": GATES["quality"]}}, "'gates' has to hold structure, fidelity"),
        ({"gates": GATES | {"parity": {"passed": "yes"}}}, r"'gates\.parity\.passed'"),
        ({"gates": GATES | {"fidelity": FAILED}}, "'state' is verified, and its gates say refused"),
        ({"state": "refused"}, "'state' is refused, and its gates say verified"),
        ({"accepted": {"quality": 1.0}}, "'accepted' is not the gate that failed"),
        ({"accepted": {"parity": 1.0}, "gates": GATES | {"parity": FAILED}}, r"'accepted\.parity"),
        ({"reason": "all 7 gates passed"}, "'reason' is not what its gates say"),
        ({"base": 7}, "'base'"),
        ({"base": "other"}, "'base' is not that of its recipe"),
        ({"recipe": ...}, "lacks 'recipe'"),
        ({"recipe": []}, "'recipe'"),
        ({"recipe": RECIPE | {"clock": "tomorrow"}}, r"'recipe\.clock'"),
        ({"recipe": RECIPE | {"given": {"sha256": 7}}}, r"'recipe\.given\.sha256'"),
        ({"recipe": RECIPE | {"given": {"sha256": "0", "dataset": "../x"}}}, r"'recipe\.given\.dataset"),
        ({"created": 1e300, "recipe": RECIPE}, "'created' or 'recipe.clock' is no day"),
        ({"datasets": ["x"]}, "'datasets'"),
        ({"datasets": {"sft": []}}, r"'datasets\.sft'"),
        ({"files": []}, ""),
        ({"reference": {"engine": "transformers", "answers": [7]}}, r"'reference\.answers\.0'"),
        (
            {"reference": {"engine": "vllm", "answers": [ASKED | {"messages": []}]}},
            r"answers\.0\.messages'",
        ),
        ({"reference": {"engine": "transformers", "answers": []}}, "it has no reference answers to be repeated"),
        ({"reference": {"engine": "transformers"}}, "it has no reference answers to be repeated"),
        ({"surprise": 1}, "'surprise' is no field"),
        ({"state": "verified elsewhere"}, "'state'"),
        ({"release": "../x"}, "no name"),
    ],
)
async def test_a_manifest_that_is_none_leaves_nothing(
    box: Box, other: Box, tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    with pytest.raises(InvalidInput, match=says):
        await other.client.import_release(changed_archive(box, tmp_path, change))
    assert await other.client.releases() == []
    assert list(other.home.releases.iterdir()) == list(other.home.incoming.iterdir()) == []


@pytest.mark.parametrize(
    "change",
    [
        {"reference": {}},
        {"reference": {"engine": "vllm", "answers": []}},
        {"reference": {"engine": "transformers", "answers": [ASKED]}},
        {
            "accepted": {"quality": 1.0},
            "gates": GATES | {"quality": FAILED},
            "reason": "accepted by the operator in spite of quality: apart",
        },
    ],
)
async def test_a_manifest_that_says_what_ours_could_is_taken(
    box: Box, other: Box, tmp_path: Path, change: dict[str, Any]
) -> None:
    assert (await other.client.import_release(changed_archive(box, tmp_path, change))).state == "verified elsewhere"


def changed_archive(box: Box, folder: Path, change: dict[str, Any]) -> Path:
    """The archive of a release whose manifest says something else."""
    release = box.release("r-1")
    manifest = json.loads((release / "manifest.json").read_bytes()) | change
    write_json(release / "manifest.json", {key: value for key, value in manifest.items() if value is not ...})
    subprocess.run(["tar", "-cf", folder / "r.tar", "-C", box.home.releases, "r-1"], check=True)
    with tarfile.open(folder / "r.tar") as old, tarfile.open(folder / "clean.tar", "w") as new:
        for member in old:
            if member.isfile():
                new.addfile(member, old.extractfile(member))
    return folder / "clean.tar"


@pytest.mark.parametrize("own", [False, True])
async def test_imported_again_a_damaged_release_is_whole_again(box: Box, other: Box, tmp_path: Path, own: bool) -> None:
    """One that was made elsewhere, or one of our own that we have exported."""
    folder = box.release("r-1")
    await box.client.export("r-1", tmp_path / "r.tar")
    place = box if own else other
    if own:
        (box.home.runs / "r-1").mkdir()
    else:
        await other.client.import_release(tmp_path / "r.tar")
    state = place.supervisor.releases.get("r-1").state
    whole = hashes(folder)
    spoil(place.home.releases / "r-1")
    with pytest.raises(Conflict, match="damaged"):
        await place.client.promote("r-1")
    release = await place.client.import_release(tmp_path / "r.tar")
    assert (release.damage, release.state) == ("", state)
    assert hashes(place.home.releases / "r-1") == whole
    assert [path.name for path in place.home.releases.iterdir()] == ["r-1"]
    assert (await place.client.promote("r-1")).live


async def test_another_release_of_that_name_does_not_mend_a_damaged_one(box: Box, other: Box, tmp_path: Path) -> None:
    folder = box.release("r-1")
    await box.client.export("r-1", tmp_path / "r.tar")
    await other.client.import_release(tmp_path / "r.tar")
    write_json(folder / "manifest.json", json.loads((folder / "manifest.json").read_bytes()) | {"created": 2.0})
    box.db.execute("UPDATE releases SET manifest_sha256 = ''")
    await box.client.export("r-1", tmp_path / "other.tar")
    spoil(other.home.releases / "r-1")
    with pytest.raises(Conflict, match="another release"):
        await other.client.import_release(tmp_path / "other.tar")


async def test_a_full_disk_is_said_and_leaves_nothing(
    box: Box, other: Box, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    box.release("r-1")
    await box.client.export("r-1", tmp_path / "r.tar")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(ApplianceError, match=r"1\.0 kB are free") as caught:
        await other.client.import_release(tmp_path / "r.tar")
    assert caught.value.code == "no_space"
    monkeypatch.undo()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("appliance.archive._extract", full)
    with pytest.raises(ApplianceError, match="is full"):
        await other.client.import_release(tmp_path / "r.tar")
    assert list(other.home.releases.iterdir()) == list(other.home.incoming.iterdir()) == []


async def test_killed_between_the_files_and_the_record_it_is_taken_up(box: Box, other: Box, tmp_path: Path) -> None:
    folder = box.release("r-1")
    await box.client.export("r-1", tmp_path / "r.tar")
    shutil.copytree(folder, other.home.releases / "r-1")
    assert (await other.client.import_release(tmp_path / "r.tar")).id == "r-1"
    assert [release.id for release in await other.client.releases()] == ["r-1"]


UNPACK = """
import sys
from pathlib import Path
import appliance.archive as archive
from appliance.home import Home
from serve.control.arrivals import _place
archive._CHUNK = 512
real = archive._extract
def slow(tar, member, target):
    print(member.name, flush=True)
    import time; time.sleep(float(sys.argv[3]))
    return real(tar, member, target)
archive._extract = slow
archive.unpack(Path(sys.argv[2]), Path(sys.argv[2]).parent / "release")
_place(Path(sys.argv[2]).parent / "release", Home(Path(sys.argv[1])).releases / "r-1")
"""


@pytest.mark.parametrize("seconds", [0.0, 0.1, 0.2])
async def test_killed_while_unpacking_there_is_no_half_release(
    box: Box, other: Box, tmp_path: Path, seconds: float
) -> None:
    box.release("r-1")
    await box.client.export("r-1", tmp_path / "r.tar")
    (other.home.incoming / "x").mkdir()
    archive = shutil.copy(tmp_path / "r.tar", other.home.incoming / "x" / "release.tar")
    command = [sys.executable, "-c", UNPACK, str(other.home.root), str(archive), "0.15"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(seconds)
        os.kill(process.pid, signal.SIGKILL)
    assert [path for path in other.home.releases.iterdir() if path.name[0] != "."] == []
    assert (await other.client.import_release(tmp_path / "r.tar")).id == "r-1"
    assert hashes(other.home.releases / "r-1") == hashes(box.home.releases / "r-1")


async def test_gates_are_repeated_by_a_run_of_the_base_and_the_adapter_that_are_here(box: Box) -> None:
    folder = box.release("r-1")
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"factors")
    made_by = Recipe(name="r", base="tiny", stages=(SftStage(method="sft", name="sft", dataset="d1"),), eval_share=0.3)
    manifest = json.loads((folder / "manifest.json").read_bytes())
    manifest |= {"recipe": made_by.model_dump(mode="json", exclude_none=True), "datasets": {"sft": "d1"}}
    write_json(folder / "manifest.json", manifest)
    with pytest.raises(NotFound, match="no base model tiny"):
        await box.client.repeat_gates("r-1")
    box.model()
    write_json(folder / "manifest.json", manifest | {"base_files": hashes(box.home.models / "tiny")})
    run = await box.client.repeat_gates("r-1")
    assert (run.id, run.stages, run.state) == ("r-1-gates-1", ("merge", "verify", "probe"), "queued")
    recipe = parse_recipe((box.home.runs / run.id / "recipe.toml").read_text())
    assert recipe.given
    assert (recipe.rechecks, recipe.eval_share, recipe.promote, recipe.given.dataset) == ("r-1", 0.3, False, "")
    assert (box.home.runs / run.id / "adapter" / "adapter_model.safetensors").read_bytes() == b"factors"
    (warning,) = await box.client.events(run.id)
    assert "no dataset of r-1 is on this box" in warning["message"]
    (box.home.datasets / "d1").mkdir()
    second = await box.client.repeat_gates("r-1")
    given = parse_recipe((box.home.runs / second.id / "recipe.toml").read_text()).given
    assert given
    assert given.dataset == "d1"
    assert await box.client.events(second.id) == []
    with pytest.raises(NotFound):
        await box.client.repeat_gates("r-2")


async def test_a_recipe_cannot_name_a_release_to_judge(box: Box) -> None:
    box.model()
    with pytest.raises(InvalidInput, match="verify RELEASE --gates"):
        await box.client.train('name = "r"\nbase = "tiny"\nrechecks = "r-1"\n')


async def test_a_recipe_cannot_name_a_given_adapter(box: Box) -> None:
    box.model()
    with pytest.raises(InvalidInput, match="given adapter"):
        await box.client.train('name = "r"\nbase = "tiny"\n[given]\nsha256 = "0"\n')


async def test_gc_says_what_it_would_do_and_does_it(box: Box) -> None:
    for id in ("r-1", "r-2", "r-3"):
        box.release(id)
    await box.client.promote("r-1")
    planned = await box.client.gc(keep=1, dry_run=True)
    assert planned.releases == ("r-2",)
    assert planned.bytes > len(FILES["model.safetensors"])
    assert (box.home.releases / "r-2").exists()
    assert await box.client.gc(keep=1) == planned
    assert not (box.home.releases / "r-2").exists()
    assert {release.id for release in await box.client.releases()} == {"r-1", "r-3"}


async def test_a_canary_is_ended_by_hand_either_way(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    for id in ("a", "b"):
        box.release(id)
    with pytest.raises(Conflict, match="no release is live"):
        await box.client.promote("b", canary=0.1)
    await box.client.promote("a")
    monkeypatch.setattr("appliance.hardware.free_memory", lambda: 0)
    with pytest.raises(Conflict, match="no room"):
        await box.client.promote("b", canary=0.1)
    monkeypatch.setattr("appliance.hardware.free_memory", lambda: 1 << 50)
    started = await box.client.promote("b", canary=0.1)
    assert started.canary is not None
    assert (started.live, started.canary.share, started.canary.live) == (False, 0.1, "a")
    present = (await box.client.status()).canary
    assert present is not None
    assert (present.release, present.outcome) == ("b", "under way")
    assert present.limits
    listed = {release.id: release for release in await box.client.releases()}
    assert listed["b"].canary == present
    assert listed["a"].canary is None

    assert (await box.client.rollback()).id == "a"
    assert (await box.client.status()).canary is None
    assert (await box.client.status()).live == "a"
    ended = next(release.canary for release in await box.client.releases() if release.id == "b")
    assert ended is not None
    assert (ended.outcome, ended.reason) == ("rolled back", "by hand")
    with pytest.raises(Conflict, match="no release was live before"):
        await box.client.rollback()

    await box.client.promote("b", canary=0.1)
    assert (await box.client.promote("b")).live
    assert (await box.client.status()).live == "b"


@pytest.mark.parametrize("share", [-0.1, 1.0, 7.0])
async def test_a_canary_needs_a_share_of_the_conversations(box: Box, share: float) -> None:
    box.release("a")
    with pytest.raises(InvalidInput, match="canary"):
        await box.client.promote("a", canary=share)


async def test_a_refused_release_is_no_canary(box: Box) -> None:
    box.release("a")
    box.release("b", "quality")
    await box.client.promote("a")
    with pytest.raises(Conflict, match="refused"):
        await box.client.promote("b", canary=0.1)
    assert box.supervisor.trial.status() is None
