"""`appliance data`: importing datasets, looking at them, comparing and removing them."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from appliance.cli import console
from appliance.cli.runs import recipe_text
from appliance.cli.session import ask, each, json_option
from appliance.errors import ApplianceError
from appliance.words import ago, one_line, trained_count, trained_words, visible

if TYPE_CHECKING:
    from appliance import api

_SHOWN = 20
_COLOURS, _PLAIN = {"good": "\x1b[32m", "muted": "\x1b[90m"}, "\x1b[0m"

_base_options = (
    click.option("--recipe", help="Take base model and token limit of this recipe."),
    click.option("--base", help="Base model whose tokenizer to use; not needed if there is one only."),
)


def _with_base(command: Any) -> Any:
    for option in reversed(_base_options):
        command = option(command)
    return command


@click.group()
def data() -> None:
    """Import datasets and look at them."""


@data.command("import")
@click.argument("files", nargs=-1, required=True)
@click.option("--name", help="What the dataset is called; the first file's name where not given.")
@click.option("--format", "row_format", help="Take every row for this format instead of detecting it.")
@click.option("--map", "columns", help="Rename the rows' columns: instruction=question,output=answer.")
@click.option("--type", "extension", help="What the files are where their names do not tell: csv, jsonl.gz, ...")
@click.option("--encoding", help="The encoding of texts that are not UTF-8, such as cp1252 or gb18030.")
@click.option("--ignore", multiple=True, metavar="KEY", help="Take KEY of rows and messages for not there; repeatable.")
@click.option("--drop-untrainable", is_flag=True, help="Leave out the rows that the base model cannot be trained on.")
@click.option("--salvage", is_flag=True, help="Keep the whole records of a damaged file, and say what was lost.")
@click.option("--redact", is_flag=True, help="Put placeholders in the place of secrets and e-mail addresses.")
@_with_base
@json_option
def data_import(
    files: tuple[str, ...],
    name: str | None,
    row_format: str | None,
    columns: str | None,
    extension: str | None,
    encoding: str | None,
    ignore: tuple[str, ...],
    drop_untrainable: bool,
    salvage: bool,
    redact: bool,
    recipe: str | None,
    base: str | None,
    as_json: bool,
) -> None:
    """Import FILES (files, folders, quoted patterns, - for standard input) and report every row kept and dropped."""
    from appliance.sources import find_sources

    sources = find_sources(files, extension)
    chosen, max_length = _base(recipe, base)
    name = name or Path(files[0] if Path(files[0]).is_dir() else sources[0].name).name.split(".")[0]
    report = ask(
        lambda client: client.import_dataset(
            sources,
            name,
            format=row_format,
            columns=columns,
            base=chosen,
            max_length=max_length,
            encoding=encoding,
            ignore=ignore,
            drop_untrainable=drop_untrainable,
            salvage=salvage,
            redact=redact,
        )
    )
    if as_json:
        console.print_json(report)
        return
    console.say(
        f"{report['rows_in']} rows in: {report['kept']} kept, {report['dropped']} dropped, "
        f"{report['duplicates']} duplicates"
    )
    for line in _report_lines(report):
        console.say(line)
    print(report["id"])


@data.command("list")
@json_option
def data_list(as_json: bool) -> None:
    """List the datasets."""
    found = ask(lambda client: client.datasets())
    if as_json:
        console.print_json(found)
    else:
        rows = [(one.name, one.id, one.kind, str(one.rows), ago(one.created)) for one in found]
        console.print_table(("NAME", "ID", "KIND", "ROWS", "IMPORTED"), rows)


@data.command("show")
@click.argument("dataset")
@click.option("--row", "offset", type=click.IntRange(0), help="Show from this row on, without the report.")
@click.option("--rows", "limit", type=click.IntRange(1, 100), help="How many rows to show.")
@_with_base
@json_option
def data_show(
    dataset: str, offset: int | None, limit: int | None, recipe: str | None, base: str | None, as_json: bool
) -> None:
    """Show the report of DATASET, and rows as they are trained on: ⟦trained⟧, and the rest of what the model reads."""
    chosen, max_length = _base(recipe, base)
    report = ask(lambda client: client.dataset(dataset))
    first, count = offset or 0, limit or (1 if offset is not None else 3)
    page = ask(lambda client: client.rows(dataset, first, count))
    try:
        rendered = ask(lambda client: client.rendered(dataset, chosen, first, count))
    except ApplianceError as error:
        if error.code != "no_base":
            raise
        rendered = None
    if as_json:
        console.print_json({"report": report, "rows": page, "rendered": rendered})
        return
    if offset is None:
        for key in ("name", "id", "kind", "rows_in", "kept", "dropped", "duplicates"):
            console.show(f"{key:11}{report[key]}")
        for line in _report_lines(report):
            console.show(line)
    for number, row in enumerate(page.rows):
        console.show(f"\nrow {first + number} ({_place(row['source'])} of {row['source']['file']})")
        if rendered is None:
            _print_messages(row)
        else:
            for conversation in rendered[number]:
                _print_conversation(conversation, max_length)
    if rendered is None:
        console.say("rows are shown untokenised: name a base model with --base to see what is trained")


@data.command("diff")
@click.argument("dataset")
@click.argument("other")
@json_option
def data_diff(dataset: str, other: str, as_json: bool) -> None:
    """Say which rows DATASET and OTHER share, and which only one of them has."""
    found = ask(lambda client: client.diff_datasets(dataset, other))
    if as_json:
        console.print_json(found)
        return
    print(f"{found.shared} rows in both")
    for name, count, examples, mark in zip((dataset, other), found.only, found.examples, "-+", strict=True):
        print(f"{count} rows only in {name}")
        for row in examples:
            said = row.get("messages") or row["prompt"]
            print(f"{mark} {one_line(' / '.join(message['content'] for message in said), 150)}")


@data.command("export")
@click.argument("dataset")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="File to write; standard output if not given.")
def data_export(dataset: str, output: Path | None) -> None:
    """Write DATASET's rows as JSON Lines, which import to the same dataset."""
    from appliance.home import replacing

    if output is None:
        each(lambda client: client.export_dataset(dataset), sys.stdout.buffer.write)
        return
    with replacing(output) as file:
        each(lambda client: client.export_dataset(dataset), file.write)


@data.command("rm")
@click.argument("dataset")
def data_rm(dataset: str) -> None:
    """Remove DATASET's name, and with its last name the rows; refused while a run or a release refers to it."""
    gone = ask(lambda client: client.remove_dataset(dataset))
    console.say(f"removed {gone.name} ({gone.rows} rows)")


def _base(recipe: str | None, base: str | None) -> tuple[str | None, int | None]:
    """Base model and token limit that a recipe or an option names."""
    if recipe is None:
        return base, None
    from appliance.train.recipe import parse_recipe

    parsed = parse_recipe(recipe_text(recipe))
    return base or parsed.base, min((stage.max_length for stage in parsed.stages), default=None)


def _report_lines(report: dict[str, Any]) -> list[str]:
    """What a report says beside its counts."""
    lines = [f"  {name}: {count} rows; {report['evidence'][name]}" for name, count in report["format"].items()]
    lines += [f"  {_place(drop)}: {drop['code']}: {drop['reason']}" for drop in report["drops"][:_SHOWN]]
    if report["dropped"] > _SHOWN:
        lines.append(f"  ... and {report['dropped'] - _SHOWN} more: `appliance data show {report['name']} --json`")
    untrainable = report.get("untrainable", [])
    lines += [f"  {_place(row)}: cannot be trained on: {row['code']}: {row['reason']}" for row in untrainable[:_SHOWN]]
    if len(untrainable) > _SHOWN:
        lines.append(f"  ... and more: `appliance data show {report['name']} --json`")
    tokens = report.get("tokens")
    if tokens and (points := tokens["percentiles"]):
        lines += [
            f"  tokens ({tokens['base']}): {tokens['total']}, {tokens['trained_share']:.0%} of them trained, "
            f"{'with' if tokens['end_of_turn_trained'] else 'WITHOUT'} the end of each turn",
            f"  a row: median {points['50']}, 95 % up to {points['95']}, longest {points['100']}",
            *_histogram(tokens["lengths"]),
        ]
    lines += [f"  {finding['level']}: {finding['message']}" for finding in report["findings"]]
    return lines


def _histogram(lengths: list[list[int]]) -> list[str]:
    """Rows by their tokens, in bins of powers of two."""
    bins: dict[int, int] = {}
    for length, count in lengths:
        bins[length.bit_length()] = bins.get(length.bit_length(), 0) + count
    most = max(bins.values())
    return [
        f"    {1 << bits >> 1:>7} to {(1 << bits) - 1:<7} {'█' * max(1, round(30 * rows / most))} {rows}"
        for bits, rows in sorted(bins.items())
    ]


def _place(where: dict[str, Any]) -> str:
    place = f"line {where['line']}" if "line" in where else f"row {where['index']}"
    return place


def _print_messages(row: dict[str, Any]) -> None:
    for part in ("messages", "prompt", "chosen", "rejected", "completion"):
        for message in row.get(part, ()):
            print(f"  {part + '  ' if part != 'messages' else ''}{message['role']}: {visible(message['content'])}")
    if "label" in row:
        print(f"  label  {'wanted' if row['label'] else 'unwanted'}")


def _print_conversation(conversation: api.Conversation, max_length: int | None) -> None:
    if conversation.problem:
        console.show(f"  cannot be trained on: {conversation.problem}")
        return
    coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    pieces = [
        f"{_COLOURS[said.tone]}{said.text}{_PLAIN}" if coloured and said.tone in _COLOURS else said.text
        for said in trained_words(conversation)
    ]
    print("".join(pieces).removesuffix("\n"))
    over = conversation.tokens - (max_length or conversation.tokens)
    long = f", {over} more than max_length" if over > 0 else ""
    print(f"({trained_count(conversation)}{long})")


VERBS = (data,)
