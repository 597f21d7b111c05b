"""The command itself: its verbs, its exit codes, and how errors are told."""

from __future__ import annotations

import os
import sys

import click

from appliance import __version__
from appliance.cli import box, chat, console, datasets, keys, models, releases, runs
from appliance.errors import ApplianceError, Exit

_EXIT_CODES = "Exit codes: 0 done, 1 failed, 2 wrong use, 3 no daemon, 4 not allowed, 5 not found or conflict."


def main() -> None:
    """Run the command and leave with its exit code; an error is one line, never a traceback."""
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
    except (click.Abort, KeyboardInterrupt):
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
            context.invoke(box.tui)
        else:
            click.echo(context.get_help())
            context.exit(Exit.USAGE)


for noun in (box, models, datasets, runs, releases, chat, keys):
    for verb in noun.VERBS:
        cli.add_command(verb)
