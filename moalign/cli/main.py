"""The ``moalign`` command: its verbs, and how it ends.

Exit codes: 0 done; 1 the work failed; 2 the request was wrong; 130 interrupted, 143 terminated. Every error is one
message on stderr; ``--debug``, anywhere on the command line, adds the traceback and the libraries' own messages.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from moalign.cli import (
    bench,
    check,
    compare,
    export,
    generate,
    init,
    ls,
    model,
    output,
    preview,
    reward,
    score,
    show,
    train,
)
from moalign.cli import eval as evaluation
from moalign.core import processes
from moalign.core.errors import MoalignError, RequestError, did_you_mean, unknown
from moalign.core.text import PROSE

DEBUG = "--debug"

_OF_A_FILE = {errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR}
"""Errors of the system that tell of a file that was named, or of what lies there, not of the work."""

_QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Read by the libraries when they are imported; what the user has set stays."""


class Verbs(TyperGroup):
    """The group of verbs; an unknown one is answered with those there are and the nearest."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return (name, command, remaining arguments); RequestError for an unknown verb."""
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            raise unknown("command", args[0], list(self.commands))
        started = processes.launched()[1]
        if started > 1 and args and args[0] in self.commands and args[0] != "train":
            raise RequestError(
                f"moalign {args[0]}: a launcher has started it as {started} processes, but only moalign train shares "
                f"its work; start it alone: moalign {' '.join(args)}"
            )
        return super().resolve_command(ctx, args)


app = typer.Typer(
    name="moalign",
    cls=Verbs,
    help="Multi-objective alignment of language models, compared under equal conditions.\n\n"
    "First steps: moalign train ric --prefs 0.3,0.7, then moalign compare.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(requested: bool) -> None:
    if requested:
        import moalign

        typer.echo(f"moalign {moalign.__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Annotated[
        bool,
        typer.Option(DEBUG, help="Anywhere on the command line: tracebacks, and the libraries' own messages."),
    ] = False,
) -> None:
    """Options of every verb; ``--debug`` is taken out of the arguments by :func:`main`."""


app.command("train")(train.train)
app.command("eval")(evaluation.evaluate)
app.command("compare")(compare.compare)
app.command("generate")(generate.generate)
app.command("export")(export.export)
app.command("score")(score.score)
app.command("init")(init.init)
app.command("ls")(ls.ls)
app.command("show")(show.show)
app.command("check")(check.check)
app.command("preview")(preview.preview)
app.command("bench")(bench.bench)
app.add_typer(reward.app)
app.add_typer(model.app)


def how_it_stopped(stop: BaseException) -> tuple[str, int]:
    """Return in a word how a command was interrupted, and its exit code."""
    return ("terminated", 143) if isinstance(stop, Terminated) else ("interrupted", 130)


class Terminated(KeyboardInterrupt):
    """SIGTERM, as batch systems and supervisors send it: an interruption like Ctrl-C, to whatever handles one."""


@contextlib.contextmanager
def _termination_raised() -> Iterator[None]:
    """Raise :class:`Terminated` on SIGTERM, unless whoever uses this process handles or ignores it already."""
    is_ours = threading.current_thread() is threading.main_thread()
    if not is_ours or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def stop(*_: object) -> None:
        raise Terminated

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command, by default that of ``sys.argv``, and return its exit code."""
    args, debug = _without_debug(sys.argv[1:] if arguments is None else arguments)
    output.debug = debug
    for name, value in () if debug else _QUIET.items():
        os.environ.setdefault(name, value)
    if not debug and not sys.warnoptions:
        warnings.simplefilter("ignore")
    _open_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that lacks a character shows ? instead of failing
            stream.reconfigure(errors="replace")
    try:
        with _termination_raised(), output.by_one_process():
            command: Any = typer.main.get_command(app)
            # Not command.main(): it turns an interruption and a closed pipe into exits before we can say anything.
            with command.make_context("moalign", args) as context:
                command.invoke(context)
            sys.stdout.flush()
    except typer.Exit as stop:
        return stop.exit_code
    except typer.TyperException as error:
        message, more = _usage(error)
        output.errors([message])
        if more:
            output.note(more, PROSE)
        return error.exit_code
    except MoalignError as error:
        _traceback(debug)
        output.errors(error.problems if isinstance(error, RequestError) else [str(error)])
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort) as stop:
        _traceback(debug)
        how, code = how_it_stopped(stop)
        output.note(f"{how}; finished work is kept: the same command resumes from there")
        return code
    except BrokenPipeError:
        output.discard(sys.stdout)  # whoever read it has gone, as in: moalign ls runs | head -1
        return 1
    except OSError as error:
        if error.errno not in _OF_A_FILE or error.filename is None:
            return _unexpected(error, debug)
        _traceback(debug)
        output.errors(
            [f"{os.fsdecode(error.filename)}: {error.strerror}; name another file or folder, or mend that one"]
        )
        return 2
    except BaseException as error:  # a method's sys.exit(0) too: the work has not ended well
        return _unexpected(error, debug)
    return 0


def _open_streams() -> None:
    """Where the process was started without a standard stream (``>&-``), open one that leads nowhere.

    Else the next file that is opened gets its descriptor, and with it whatever a library prints.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            stream = open(os.devnull, "r" if name == "stdin" else "w", encoding="utf-8")  # noqa: SIM115
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)


def _unexpected(error: BaseException, debug: bool) -> int:
    """Name an error that nobody expected; returns the exit code."""
    _traceback(debug)
    text = f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
    output.errors([text if debug else f"{text}; the same command with --debug shows where"])
    return 1


def _without_debug(arguments: Sequence[str]) -> tuple[list[str], bool]:
    """Return the arguments without ``--debug``, and whether it was there (after ``--`` everything is text)."""
    args = list(arguments)
    end = args.index("--") if "--" in args else len(args)
    options = [argument for argument in args[:end] if argument != DEBUG]
    return options + args[end:], len(options) < end


def _usage(error: typer.TyperException) -> tuple[str, str]:
    """Put a usage error in our words: what was found, the nearest option, where help is; and the help itself."""
    context: Any = getattr(error, "ctx", None)
    text = error.format_message().strip()
    if context is None:
        return text, ""
    option = getattr(error, "option_name", None)
    if option is not None and hasattr(error, "possibilities"):
        known = [name for param in context.command.params for name in param.opts if name.startswith("--")]
        text = f"unknown option {option}{did_you_mean(option, [*known, DEBUG, '--help'])}"
    elif not text.startswith("Usage:"):
        text = text[:1].lower() + text[1:].rstrip(".")
    else:
        return f"a command is missing; allowed: {', '.join(context.command.commands)}", f"\n{text}"
    return f"{text} (see {context.command_path} --help)", ""


def _traceback(debug: bool) -> None:
    if debug:
        import traceback

        output.note(traceback.format_exc().rstrip("\n"), PROSE)
