"""How every command speaks: people get text, programs get one JSON document on stdout and nothing else.

Guarantees: an error is one line on stderr (and, with --json, one document on stdout) with the exit code of its class;
an interrupted command says how to continue.
Knows nothing of: the commands.
"""

import dataclasses
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bitdgdm.infra.errors import BitDGDMError
from bitdgdm.infra.log import configure

# Libraries and worker processes print what they like to file descriptor 1: results keep the real stdout for
# themselves and everything else goes to stderr.
_stdout = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
# a pipe has no width: there a row of a table stays one line, for grep and cut
out = Console(
    file=_stdout, highlight=False, markup=False, soft_wrap=True, width=None if _stdout.isatty() else 500
)
log = logging.getLogger("bitdgdm")
EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 2, 130
# Typer brings its own copy of click in newer versions: take the base class of usage errors from Typer itself.
_UsageError: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


def plain(value: Any) -> Any:
    """Return `value` as JSON types: dataclasses as mappings, tuples as lists, paths as text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(v) for v in value]
    if isinstance(value, str | int | float | bool) or value is None:
        return value
    return str(value)


def table(columns: Sequence[str], rows: Iterable[Sequence[str | Text]], title: str | None = None) -> Table:
    """Return a plain table for `out`; a name that is too long for the terminal goes on in the next line, whole."""
    made = Table(box=None, pad_edge=False, show_header=any(columns), title=title, title_justify="left")
    for column in columns:
        made.add_column(column, overflow="fold")
    for row in rows:
        made.add_row(*row)
    return made


def reply(document: Any, as_json: bool, human: Callable[[], None]) -> None:
    """Print `document` for a program, or call `human` for a person."""
    if as_json:
        _stdout.write(json.dumps(plain(document), indent=1, allow_nan=False) + "\n")
    else:
        human()


def _terminated(signum: int, frame: object) -> None:
    raise KeyboardInterrupt(signal.Signals(signum).name)


def run(app: typer.Typer) -> None:
    """Run the command line and exit with its code."""
    as_json = "--json" in sys.argv[1:]
    helping = {"--help", "-h", "--version", "--show-completion"} & set(sys.argv[1:]) or "_BITDGDM_COMPLETE" in os.environ
    if not helping and len(sys.argv) > 1:
        os.dup2(2, 1)
    configure()
    signal.signal(signal.SIGTERM, _terminated)
    try:
        code = typer.main.get_command(app)(standalone_mode=False)
        if code == EXIT_INTERRUPTED:  # Typer makes this code of a KeyboardInterrupt, and says nothing
            raise KeyboardInterrupt
    except BitDGDMError as e:
        code = _refuse(str(e), type(e).__name__, e.exit_code, as_json)
    except typer.Abort:
        code = _refuse("stopped", "Interrupted", EXIT_INTERRUPTED, as_json)
    except _UsageError as e:
        usage = f" ({e.ctx.command_path} --help shows the options)" if getattr(e, "ctx", None) else ""
        code = _refuse(e.format_message() + usage, "UsageError", EXIT_BAD_INPUT, as_json)
    except KeyboardInterrupt:
        code = _refuse(
            "stopped; committed work is safe, the same command continues it",
            "Interrupted",
            EXIT_INTERRUPTED,
            as_json,
        )
    except BrokenPipeError:  # the reader of our stdout went away, as `| head` does
        _reader_left()
        code = EXIT_FAILED
    except OSError as e:
        if e.filename is None:
            _fail(e, as_json)
            raise
        place = f"{e.filename} can't be used: {e.strerror}. Give a file or folder that you may read and write"
        code = _refuse(place, type(e).__name__, EXIT_BAD_INPUT, as_json)
    except Exception as e:  # our mistake: a person gets the traceback, a program still gets its document
        _fail(e, as_json)
        raise
    sys.exit(code or 0)


def _fail(error: Exception, as_json: bool) -> None:
    if as_json:
        _write_error(f"{type(error).__name__}: {error}", type(error).__name__, EXIT_FAILED)


def _refuse(message: str, kind: str, code: int, as_json: bool) -> int:
    if as_json:
        _write_error(message, kind, code)
    sys.stderr.write(f"bitdgdm: {message}\n")
    return code


def _write_error(message: str, kind: str, code: int) -> None:
    document = {"error": {"type": kind, "message": message, "exit_code": code}}
    try:
        _stdout.write(json.dumps(document, indent=1) + "\n")
    except BrokenPipeError:  # stderr and the exit code still say it
        _reader_left()


def _reader_left() -> None:
    """Let what is still to be flushed go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), _stdout.fileno())
