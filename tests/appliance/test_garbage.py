"""What `gc` takes and what it never touches."""

from __future__ import annotations

import json
import os
import sqlite3
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from appliance.errors import Conflict
from appliance.garbage import LEFTOVER_SECONDS, UNCOMPILED_SECONDS, find_garbage, forget_garbage, remove_garbage
from appliance.home import Home
from appliance.release.manifest import Manifest
from appliance.store.canaries import Canaries
from appliance.store.database import open_database
from appliance.store.datasets import Datasets
from appliance.store.releases import Releases
from appliance.store.runs import Runs
from appliance.train.recipe import Recipe, dump_recipe


class Box:
    def __init__(self, root: Path) -> None:
        self.home = Home(root)
        self.home.create()
        db: sqlite3.Connection = open_database(self.home.database)
        self.releases, self.runs, self.datasets, self.canaries = Releases(db), Runs(db), Datasets(db), Canaries(db)

    def release(self, *ids: str, dataset: str = "") -> None:
        for id in ids:
            (self.home.releases / id).mkdir()
            manifest: dict[str, Any] = {each.name: {} for each in fields(Manifest)}
            manifest |= {"release": id, "state": "verified", "reason": "", "created": 1.0, "base": "tiny"}
            manifest |= {"recipe_sha256": "", "datasets": {"sft": dataset} if dataset else {}}
            (self.home.releases / id / "manifest.json").write_text(json.dumps(manifest))
            self.releases.add(id, "tiny", "verified", "", {}, promote=False)

    def dataset(self, id: str, name: str = "") -> None:
        (self.home.datasets / id).mkdir()
        if name:
            self.datasets.record({"name": name, "id": id, "kind": "messages", "kept": 1})

    def collect(self, keep: int = 0, serving: frozenset[str] = frozenset()) -> tuple[set[str], set[str], set[str]]:
        garbage = find_garbage(self.home, self.releases, self.runs, self.datasets, serving, keep)
        forget_garbage(garbage, self.releases)
        remove_garbage(self.home, garbage)
        return set(garbage.releases), set(garbage.datasets), set(garbage.leftovers)

    def left(self) -> set[str]:
        found = {path.name for path in self.home.releases.iterdir()}
        assert {release.id for release in self.releases.all()} == found
        return found


@pytest.fixture
def box(tmp_path: Path) -> Box:
    return Box(tmp_path)


def age(*paths: Path) -> None:
    for path in paths:
        long_ago = time.time() - LEFTOVER_SECONDS - 60
        os.utime(path, (long_ago, long_ago))


def test_live_its_predecessor_and_the_newest_stay(box: Box) -> None:
    box.release("a", "b", "c", "d", "e")
    for id in ("a", "b", "c"):
        box.releases.promote(id)
    assert box.collect(keep=1)[0] == {"a", "d"}
    assert box.left() == {"b", "c", "e"}
    assert box.releases.live() == "c"
    assert box.releases.rollback().id == "b"


def test_the_canary_stays_until_it_has_ended(box: Box) -> None:
    box.release("a", "b", "c", "d")
    for id in ("a", "b", "c"):
        box.releases.promote(id)
    box.canaries.start("d", "c", 0.1)
    box.release("e")
    assert box.collect()[0] == {"a", "e"}
    box.canaries.end("rolled back", "", ())
    assert box.collect()[0] == {"d"}


def test_what_an_engine_serves_stays(box: Box) -> None:
    box.release("a", "b", "c")
    for id in ("a", "b", "c"):
        box.releases.promote(id)
    assert box.collect(serving=frozenset({"a"}))[0] == set()
    assert box.left() == {"a", "b", "c"}


def test_a_release_whose_gates_are_to_be_repeated_stays_until_that_has_ended(box: Box) -> None:
    box.release("a", "b")
    recipe = Recipe(name="a-gates", base="tiny", rechecks="a")
    box.runs.add("a-gates-1", recipe)
    (box.home.runs / "a-gates-1").mkdir()
    (box.home.runs / "a-gates-1" / "recipe.toml").write_text(dump_recipe(recipe))
    assert box.collect()[0] == {"b"}
    box.runs.finish("a-gates-1", "finished")
    assert box.collect()[0] == {"a"}


def test_a_rollback_never_stays_where_it_is(box: Box) -> None:
    """b between two times of a is gone: the way back goes from c to a, and there it ends."""
    box.release("a", "b", "c")
    for id in ("a", "b", "a", "c"):
        box.releases.promote(id)
    assert box.collect()[0] == {"b"}
    assert box.releases.rollback().id == "a"
    with pytest.raises(Conflict):
        box.releases.rollback()


def test_a_directory_without_a_record_goes_when_it_is_old_and_no_run_has_to_do_with_it(box: Box) -> None:
    recipe = Recipe(name="r", base="tiny")
    box.runs.add("r-1", recipe)
    for id in ("r-1", "lost", "arriving"):
        (box.home.releases / id).mkdir()
    age(box.home.releases / "r-1", box.home.releases / "lost")
    assert box.collect()[0] == {"lost"}
    box.runs.finish("r-1", "finished")
    assert box.collect()[0] == {"r-1"}


def test_datasets_stay_while_a_name_a_run_or_a_release_refers_to_them(box: Box) -> None:
    box.dataset("named", "facts")
    for id in ("by-run", "by-given", "by-release", "new", "old"):
        box.dataset(id)
    for number, part in enumerate(('[[stages]]\ndataset = "by-run"', '[given]\ndataset = "by-given"')):
        (box.home.runs / f"r-{number}").mkdir()
        (box.home.runs / f"r-{number}" / "recipe.toml").write_text(f'unknown = "key of a later version"\n{part}\n')
    box.release("kept", dataset="by-release")
    box.releases.promote("kept")
    age(*(path for path in box.home.datasets.iterdir() if path.name != "new"))
    assert box.collect()[1] == {"old"}
    assert {path.name for path in box.home.datasets.iterdir()} == {"named", "by-run", "by-given", "by-release", "new"}


def test_a_release_with_a_damaged_manifest_needs_the_datasets_of_its_recipe(box: Box) -> None:
    box.release("r-1", "r-2")
    box.runs.add("r-1", Recipe(name="r", base="tiny"))
    box.runs.finish("r-1", "finished")
    box.dataset("trained-on")
    box.dataset("old")
    (box.home.runs / "r-1").mkdir()
    (box.home.runs / "r-1" / "recipe.toml").write_text('[[stages]]\ndataset = "trained-on"\n')
    (box.home.releases / "r-1" / "manifest.json").write_text('{"files": ')
    age(*box.home.datasets.iterdir())
    assert box.collect(keep=2)[1] == {"old"}
    assert box.collect(keep=1)[0] == {"r-1"}


def test_old_leftovers_of_kills_go(box: Box) -> None:
    old = [box.home.models / ".m.building", box.home.runs / ".r.building", box.home.incoming / "tmpabc"]
    written_to = box.home.models / ".pulling"
    new = [box.home.datasets / ".d.building", box.home.incoming / "tmpnew", written_to]
    for folder in (*old, *new):
        (folder / "inner").mkdir(parents=True)
        (folder / "inner" / "file").write_bytes(bytes(1000))
    age(*(path for folder in old for path in (folder, *folder.rglob("*"))), written_to, written_to / "inner")
    garbage = find_garbage(box.home, box.releases, box.runs, box.datasets, frozenset(), keep=0)
    assert garbage.bytes == 3000
    assert box.collect()[2] == {"models/.m.building", "runs/.r.building", "incoming/tmpabc"}
    assert all(folder.exists() for folder in new)
    assert not any(folder.exists() for folder in old)


AOT = "vllm/torch_compile_cache/torch_aot_compile"
"""Where vLLM has what it compiles ahead of time."""


def test_code_goes_that_was_compiled_long_ago(box: Box) -> None:
    names = tuple(f"{kind}/1a" for kind in ("vllm/torch_compile_cache", AOT, "triton", "inductor"))
    old = [box.home.compiled / name for name in names]
    new = [path.with_name("new") for path in old]
    beside = box.home.compiled / "vllm" / "modelinfos"
    for folder in (*old, *new, beside):
        (folder / "inner").mkdir(parents=True)
        (folder / "inner" / "code.so").write_bytes(bytes(1000))
    for path in (*box.home.compiled.rglob("*"), box.home.compiled):
        long_ago = time.time() - UNCOMPILED_SECONDS - 60
        os.utime(path, (long_ago, long_ago))
    for folder in new:
        lately = time.time() - 2 * 24 * 3600
        os.utime(folder / "inner" / "code.so", (lately, lately))
    assert box.collect()[2] == {f"compiled/{name}" for name in names}
    assert not any(folder.exists() for folder in old)
    assert all(folder.exists() for folder in (*new, beside))


def test_files_with_another_name_free_nothing(box: Box) -> None:
    box.release("a", "b")
    (box.home.models / "m").mkdir()
    (box.home.models / "m" / "model.safetensors").write_bytes(bytes(5000))
    (box.home.releases / "a" / "model.safetensors").hardlink_to(box.home.models / "m" / "model.safetensors")
    garbage = find_garbage(box.home, box.releases, box.runs, box.datasets, frozenset(), keep=1)
    assert garbage.releases == ("a",)
    assert garbage.bytes < 1000


def test_stopped_halfway_it_goes_on_the_next_time(box: Box) -> None:
    box.release("a", "b")
    forget_garbage(find_garbage(box.home, box.releases, box.runs, box.datasets, frozenset(), keep=1), box.releases)
    assert (box.home.releases / "a").is_dir()
    age(box.home.releases / "a")
    assert box.collect(keep=1)[0] == {"a"}
    assert box.left() == {"b"}
