"""The verbs about releases: looking, going live and back, verifying, merging, export and import."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from appliance.cli import console
from appliance.cli.runs import follow_run
from appliance.cli.session import ask, each, json_option
from appliance.errors import ApplianceError, InvalidInput
from appliance.words import ago, canary_title, check_line, percent

if TYPE_CHECKING:
    from appliance import api

_path = click.Path(path_type=Path)
_PROGRESS_SECONDS = 3.0


class _Share(click.ParamType[float]):
    """A share above 0 and below 1, as 10% or 0.1."""

    name = "share"

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> float:
        text = str(value).strip()
        try:
            share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        except ValueError:
            share = 0.0
        if not 0 < share < 1:
            self.fail(f"{text!r} is no share between nobody and everybody; write 10% or 0.1", parameter, context)
        return share


@click.command()
@click.argument("release", required=False)
@json_option
def releases(release: str | None, as_json: bool) -> None:
    """List the releases, or show what is known of RELEASE now, and its manifest."""
    found = ask(lambda client: client.releases())
    if release:
        manifest = ask(lambda client: client.manifest(release))
        (now,) = (one for one in found if one.id == release)
        console.print_json({"now": now.model_dump(mode="json"), **manifest})
        return
    if as_json:
        console.print_json(found)
        return
    rows = [
        (
            one.id,
            _state(one),
            " ".join(f"{gate}:{'ok' if passed else 'FAILED'}" for gate, passed in one.gates.items()),
            ago(one.created),
            "; ".join(why for why in (one.damage, one.reason, one.note, _canary_words(one.canary)) if why),
        )
        for one in found
    ]
    console.print_table(("RELEASE", "STATE", "GATES", "MADE", "WHY"), rows)


def _state(release: api.Release) -> str:
    if release.damage:
        return "damaged"
    if release.live:
        return "live" if release.state == "verified" else f"live, {release.state}"
    return "canary" if release.canary and release.canary.outcome == "under way" else release.state


def _canary_words(canary: api.Canary | None) -> str:
    """What its canary has come to, or what it waits for."""
    return f"{canary_title(canary)}: {canary.reason}" if canary else ""


@click.command()
@click.argument("release")
@click.option("--accept", type=click.Choice(["quality"]), help="Accept that this gate alone did not pass.")
@click.option("--canary", type=_Share(), help="Let it answer this share of the conversations first, such as 10%.")
@click.option("--adapter", is_flag=True, help="Let the adapter of a run that is still merged or verified answer now.")
def promote(release: str, accept: str | None, canary: float | None, adapter: bool) -> None:
    """Make RELEASE live; with --canary it goes live, or back, by itself on what it shows.

    With --adapter RELEASE is a run whose training has ended: its adapter answers at once on the live release's engine,
    and its merged release takes over when it is verified.
    """
    if adapter:
        if accept or canary:
            raise click.UsageError("--adapter goes without --accept and --canary")
        now = ask(lambda client: client.promote_adapter(release))
        print(now.name)
        console.say(
            f"it answers on the engine of {now.live} until {now.run} is verified"
            if now.answers
            else f"it will answer when the engine of {now.live} is ready; see `appliance status`"
        )
        return
    promoted = ask(lambda client: client.promote(release, accept, canary))
    print(promoted.id)
    if promoted.check:
        console.say(f"{check_line(promoted.check)}; it answers when they are whole, see `appliance status`")
    elif canary:
        console.say(f"it is to answer {percent(canary)} of the conversations; see `appliance status`")


@click.command()
@click.argument("release")
@click.option("--gates", is_flag=True, help="Then queue a run that repeats its gates here, and print the run's id.")
@click.option("-f", "--follow", "following", is_flag=True, help="Print the run's events until it ends.")
@json_option
def verify(release: str, gates: bool, following: bool, as_json: bool) -> None:
    """Read all files of RELEASE from the disk, and see that they are those that its manifest lists.

    With --gates they are merged again and judged by the gates once more; that takes the base model, and where it is
    here, the dataset.
    """
    if (following and not gates) or (gates and as_json):
        raise click.UsageError("--follow goes with --gates, and --gates without --json")
    checks: list[api.Check] = []
    spoke = [time.monotonic()]

    def show(check: api.Check) -> None:
        checks.append(check)
        if check.state == "reading" and time.monotonic() - spoke[-1] > _PROGRESS_SECONDS:
            spoke.append(time.monotonic())
            console.say(check_line(check))

    each(lambda client: client.check(release), show)
    if as_json:
        console.print_json(checks[-1])
    if checks[-1].state != "whole":
        raise ApplianceError(
            "damaged_release",
            f"release {release} is damaged: {checks[-1].damage or 'something writes to its files'}",
            "restore its files, import it again, or train again",
        )
    said = f"{release} is whole: its files are those that its manifest lists"
    if gates:
        console.say(said)
        run = ask(lambda client: client.repeat_gates(release))
        print(run.id, flush=True)
        if following:
            follow_run(run.id)
    elif not as_json:
        print(said)


@click.command()
def rollback() -> None:
    """End the canary or the unmerged adapter; where there is none, make the release that was live before live again."""
    print(ask(lambda client: client.rollback()).id)


@click.command()
@click.option("--adapter", type=_path, required=True, help="Directory with adapter_config.json, as PEFT saves it.")
@click.option("--base", required=True, help="The base model that it was trained on.")
@click.option("--name", help="What the release is called; the directory's name where not given.")
@click.option("--dataset", default="", help="Dataset to judge the merged weights on.")
@click.option("--qlora", is_flag=True, help="It was trained over the base in NF4: try both forms of the base.")
@click.option("--same-base", is_flag=True, help="The base that it names has the weights of --base.")
@click.option("--base-template", is_flag=True, help="Serve it with the base's chat template, not its own.")
@click.option("-f", "--follow", "following", is_flag=True, help="Print the run's events until it ends.")
def merge(
    adapter: Path,
    base: str,
    name: str | None,
    dataset: str,
    qlora: bool,
    same_base: bool,
    base_template: bool,
    following: bool,
) -> None:
    """Merge an adapter that PEFT has trained elsewhere: queue a run that merges and verifies it, and print its id."""
    called = name or adapter.absolute().name
    run = ask(
        lambda client: client.merge(
            adapter, base, called, dataset, quantised=qlora, same_base=same_base, base_template=base_template
        )
    )
    print(run.id, flush=True)
    if following:
        follow_run(run.id)


@click.command()
@click.argument("release")
@click.argument("path", type=_path)
@click.option("--gguf", is_flag=True, help="Write one GGUF file in 16 bits, for llama.cpp, instead.")
@click.option(
    "--quantise", type=click.Choice(("Q8_0", "Q4_K_M")), help="Write one GGUF file with weights of 8 or 4 bits."
)
def export(release: str, path: Path, gguf: bool, quantise: str | None) -> None:
    """Write RELEASE to PATH: a folder of model files, or where PATH ends in .tar, an archive for `import-release`.

    Where it ends in .gguf, one file for llama.cpp.
    """
    if path.exists():
        raise InvalidInput("path_exists", f"{path} exists", "name a path where nothing is yet")
    if path.suffix == ".tar" and (gguf or quantise):
        raise InvalidInput("bad_path", f"{path} would be a tar and a GGUF file", "name a path that ends in .gguf")
    if path.suffix == ".gguf" and not quantise:
        gguf = True
    path.absolute().parent.mkdir(parents=True, exist_ok=True)
    if not gguf and not quantise:
        ask(lambda client: client.export(release, path))
    else:
        with tempfile.TemporaryDirectory(dir=path.absolute().parent, prefix=".export-") as scratch:
            folder = Path(scratch) / release
            ask(lambda client: client.export(release, folder))
            command = [sys.executable, "-m", "appliance.release.gguf_file", str(folder), str(path)]
            command += [quantise] if quantise else []
            if code := subprocess.run(command, check=False).returncode:
                sys.exit(code)
    print(path)


@click.command("import-release")
@click.argument("file", type=_path)
@click.option("--name", help="What it is called here; its own name where not given.")
def import_release(file: Path, name: str | None) -> None:
    """Take in a release from FILE, an archive that `export` has written on another box; every hash is checked.

    It says of itself that it was verified: it is listed as verified elsewhere, until `verify --gates` has done so here.
    """
    release = ask(lambda client: client.import_release(file, name))
    print(release.id)
    if release.state == "verified elsewhere":
        console.say(f"its gates have run on another box; `appliance verify {release.id} --gates` repeats them here")
    else:
        console.say(f"it was here already, {release.state}")


VERBS = (releases, promote, verify, rollback, merge, export, import_release)
