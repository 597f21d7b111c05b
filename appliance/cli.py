"""The `appliance` command: thin verbs over the client. Importing this module loads neither torch nor textual."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, TypeVar

import click

from appliance import __version__
from appliance.command import ask, each, follow_run, json_option, recipe_text, settings
from appliance.command import home as _home
from appliance.data_verbs import data
from appliance.errors import ApplianceError, Exit, InvalidInput
from appliance.release_verbs import RELEASE_VERBS

T = TypeVar("T")

_EXIT_CODES = "Exit codes: 0 done, 1 failed, 2 wrong use, 3 no daemon, 4 not allowed, 5 not found or conflict."


def main() -> None:
    """Run the command and leave with its exit code; an error is one line, never a traceback."""
    from appliance import console

    try:
        code = cli.main(prog_name="appliance", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except ApplianceError as error:
        console.complain(error)
        sys.exit(error.exit)
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "appliance"
        console.say(f"appliance: error: {error.format_message()} — see `{command} --help`")
        sys.exit(Exit.USAGE)
    except click.Abort:
        sys.exit(130)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(Exit.FAILED)


@click.group(invoke_without_command=True, epilog=_EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="appliance")
@click.pass_context
def cli(context: click.Context) -> None:
    """Fine-tune, verify and serve a language model on this box. Alone on a terminal it opens the dashboard."""
    if context.invoked_subcommand is None:
        if sys.stdin.isatty() and sys.stdout.isatty():
            context.invoke(tui)
        else:
            click.echo(context.get_help())
            context.exit(Exit.USAGE)


@cli.command()
@click.option("--host", help="Address of the chat endpoint (APPLIANCE_HOST).")
@click.option("--port", type=int, help="Port of the chat endpoint (APPLIANCE_PORT).")
def serve(host: str | None, port: int | None) -> None:
    """Run the daemon: queue, control socket and chat endpoint."""
    import logging

    from serve import daemon

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    daemon.run(settings(host=host, port=port))


@cli.command()
def tui() -> None:
    """Open the dashboard."""
    from tui import app

    sys.exit(app.run(_home().control_socket()))


@cli.command()
@click.argument("name")
@click.option("--from", "source", type=click.Path(path_type=Path), help="A folder, tar or GGUF of a model.")
@click.option("--serve-only", is_flag=True, help="Take a model that cannot be trained.")
def pull(name: str, source: Path | None, serve_only: bool) -> None:
    """Get the base model NAME: smollm2-135m, a Hub id, a GGUF on the Hub (ORG/REPO/FILE.gguf), or any name with --from.

    Run again after a break, it goes on where it was. HF_ENDPOINT names a mirror of the Hub, HF_TOKEN an account.
    """
    home = _home()
    home.create()
    arguments = [name, str(home.root), *(["--from", str(source)] if source else [])]
    arguments += ["--serve-only"] if serve_only else []
    sys.exit(subprocess.run([sys.executable, "-m", "appliance.pull", *arguments], check=False).returncode)


@cli.command()
@json_option
def models(as_json: bool) -> None:
    """List the base models on this box."""
    from appliance import console

    found = ask(lambda client: client.models())
    if as_json:
        console.print_json(found)
    else:
        rows = [(model.name, console.size(model.bytes), str(model.context), model.source) for model in found]
        console.print_table(("NAME", "SIZE", "CONTEXT", "SOURCE"), rows)


@cli.command()
@click.argument("recipe")
@click.option("-f", "--follow", is_flag=True, help="Print its events until it ends.")
@click.option("--dry-run", is_flag=True, help="Say what it would take, and queue nothing.")
@json_option
def train(recipe: str, follow: bool, dry_run: bool, as_json: bool) -> None:
    """Queue a run of RECIPE, a TOML file or the name of a shipped recipe, and print its id."""
    from appliance import console

    text = recipe_text(recipe)
    if dry_run:
        forecasts = ask(lambda client: client.forecast(text))
        console.print_json(forecasts) if as_json else console.print_forecasts(forecasts)
        return
    if as_json:
        raise InvalidInput("no_json", "a run's id is plain text", "use --json with --dry-run")
    run = ask(lambda client: client.train(text))
    print(run.id, flush=True)
    if follow:
        follow_run(run.id)


@cli.command()
@click.argument("run", required=False)
@json_option
def runs(run: str | None, as_json: bool) -> None:
    """List the runs, or show RUN."""
    from appliance import console

    found = [ask(lambda client: client.run(run))] if run else ask(lambda client: client.runs())
    if as_json:
        console.print_json(found[0] if run else found)
        return
    rows = [
        (
            one.id,
            one.state,
            one.stage,
            one.base,
            console.ago(one.created),
            " — ".join(filter(None, (one.reason, one.next))),
        )
        for one in found
    ]
    console.print_table(("RUN", "STATE", "STAGE", "BASE", "QUEUED", "WHY"), rows)


@cli.command()
@click.argument("run")
@click.option("-f", "--follow", is_flag=True, help="Go on until the run ends.")
@click.option("--events", is_flag=True, help="The run's events instead of its log.")
@click.option("-n", "--lines", type=click.IntRange(1), default=200, help="Lines of the log to show.")
@json_option
def logs(run: str, follow: bool, events: bool, lines: int, as_json: bool) -> None:
    """Print the log of RUN."""
    from appliance import console

    if as_json and not events:
        raise InvalidInput("no_json", "the log is plain text", "use `--events --json`")
    if events and follow:
        follow_run(run, as_json)
    elif events:
        for event in ask(lambda client: client.events(run)):
            console.print_json_line(event) if as_json else print(console.event_line(event))
    elif follow:
        each(lambda client: client.follow_log(run), lambda piece: print(piece, end="", flush=True))
    else:
        print(ask(lambda client: client.log(run, lines)))


@cli.command()
@click.argument("run")
@click.option("--keep", "how", flag_value="keep", help="End the training here and go on with what it has learnt.")
@click.option("--discard", "how", flag_value="discard", help="Take away its work; a resume starts from nothing.")
def stop(run: str, how: str | None) -> None:
    """Pause RUN at a checkpoint, from which `appliance resume` goes on; or end it with --keep or --discard."""
    print(ask(lambda client: client.stop(run, how or "pause")).state)


@cli.command()
@click.argument("run")
def resume(run: str) -> None:
    """Go on with a stopped or failed RUN from its last checkpoint."""
    print(ask(lambda client: client.resume(run)).state)


@cli.command()
@click.argument("prompt", required=False)
def chat(prompt: str | None) -> None:
    """Chat with the live release; with PROMPT, answer it and end. A PROMPT of - is read from stdin."""
    if prompt is not None:
        _answer([{"role": "user", "content": sys.stdin.read() if prompt == "-" else prompt}])
        return
    messages: list[dict[str, Any]] = []
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if line.strip():
            messages.append({"role": "user", "content": line})
            messages.append({"role": "assistant", "content": _answer(messages)})


@cli.group()
def keys() -> None:
    """API keys of the chat endpoint."""


@keys.command("create")
@click.argument("name")
@json_option
def keys_create(name: str, as_json: bool) -> None:
    """Make a key for NAME. It is shown once."""
    from appliance import console

    key = ask(lambda client: client.create_key(name))
    if as_json:
        console.print_json(key)
    else:
        console.say(f"key {key.id} for {key.name}; it is not shown again")
        print(key.key)


@keys.command("list")
@json_option
def keys_list(as_json: bool) -> None:
    """List the keys."""
    from appliance import console

    found = ask(lambda client: client.keys())
    if as_json:
        console.print_json(found)
    else:
        rows = [
            (
                key.id,
                key.name,
                f"{key.prefix}...",
                console.ago(key.created),
                "revoked" if key.revoked else "valid",
            )
            for key in found
        ]
        console.print_table(("KEY", "NAME", "BEGINS", "MADE", "STATE"), rows)


@keys.command("revoke")
@click.argument("key")
def keys_revoke(key: str) -> None:
    """Refuse KEY from now on."""
    print(ask(lambda client: client.revoke_key(key)).id)


@cli.command()
@json_option
def status(as_json: bool) -> None:
    """Show the box at a glance."""
    from appliance import console

    now = ask(lambda client: client.status())
    if as_json:
        console.print_json(now)
        return
    print(f"endpoint  {now.endpoint}")
    meanwhile = f"{now.routed} answers meanwhile" if now.routed else "nothing answers yet"
    print(f"live      {now.live or 'nothing'}{'' if now.live == now.routed else f' ({meanwhile})'}")
    if now.unmerged:
        print(f"unmerged  {now.unmerged.name} answers on that release's engine until {now.unmerged.run} is verified")
    for line in console.canary_lines(now.canary) if now.canary else ():
        print(f"canary    {line}")
    if now.setback:
        print(f"setback   {now.setback}")
    for check in now.checks:
        print(f"check     {console.check_line(check)}")
    for engine in now.engines:
        print(f"engine    {console.engine_line(engine, now.running)}")
    print(f"running   {now.running or 'nothing'}, {now.queued} queued, lease {now.lease}")


@cli.command()
@json_option
def doctor(as_json: bool) -> None:
    """Check what the appliance needs on this box, and say how to mend it."""
    from appliance import console
    from appliance.doctor import examine

    findings = examine(settings())
    if as_json:
        console.print_json([finding.__dict__ for finding in findings])
    else:
        for finding in findings:
            print(f"{finding.status:5}{finding.name:10}{finding.summary}{f' — {finding.fix}' if finding.fix else ''}")
    if any(finding.status == "fail" for finding in findings):
        sys.exit(Exit.FAILED)


def _answer(messages: list[dict[str, Any]]) -> str:
    """Print the live release's answer as it comes; the whole text."""
    pieces: list[str] = []

    def show(piece: str) -> None:
        pieces.append(piece)
        print(piece, end="", flush=True)

    each(lambda client: client.chat(messages), show)
    print()
    return "".join(pieces)


cli.add_command(data)
for verb in RELEASE_VERBS:
    cli.add_command(verb)

if __name__ == "__main__":
    main()
