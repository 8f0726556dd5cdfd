"""Shared by the commands: one-line errors for options, exit codes, and quiet libraries."""

from __future__ import annotations

import argparse
import logging
import os
import select
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, Protocol, TextIO

from loftq_exp import ranks
from loftq_exp.config.schema import check_encoding
from loftq_exp.errors import UserError
from loftq_exp.masking import mask_output


class OneLineParser(argparse.ArgumentParser):
    """A parser that reports an error in one line, as the rest of the project does."""

    def error(self, message: str) -> NoReturn:
        """Raise the message as a UserError instead of printing the usage."""
        raise UserError(f"{message}; see {self.prog} --help")


class Terminated(KeyboardInterrupt):
    """SIGTERM, as schedulers send it. It ends the work as Ctrl-C does, so that no partial file is left."""


def exit_code(work: Callable[[], int], interrupted: str | Callable[[], str], closed: str | None = None) -> int:
    """Run a command's `work` and return its exit code.

    A UserError prints one line on standard error and gives 1. An interruption prints the message `interrupted`, or what it
    returns, and gives 130, or 143 for SIGTERM. A page such as --help, after which argparse and Hydra exit, gives 0. If the reader of standard output
    is gone, as after `| head -1`, the command ends with 1 and the message `closed`, if there is one.
    """
    mask_output()
    try:
        code = _code_of(work, interrupted)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        # What is still buffered goes nowhere. Otherwise the interpreter would complain when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.stderr.write(f"error: {closed}\n" if closed else "")
        return 1


def _code_of(work: Callable[[], int], interrupted: str | Callable[[], str]) -> int:
    try:
        with _terminable():
            _check_folder()
            return work()
    except UserError as error:
        ranks.let_main_fail_first()
        sys.stderr.write(f"error: {error}\n")
        return 1
    except KeyboardInterrupt as stop:
        if ranks.is_main():
            message = interrupted if isinstance(interrupted, str) else interrupted()
            sys.stderr.write(f"error: interrupted: {message}\n")
        return 143 if isinstance(stop, Terminated) else 130
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception:
        ranks.let_main_fail_first()
        raise


@contextmanager
def _terminable() -> Iterator[None]:
    """Raise Terminated in the block on SIGTERM, in this process and its main thread, unless a launcher handles it."""
    here = os.getpid()

    def terminate(*_: object) -> None:
        if os.getpid() != here:  # a child that was forked since
            os._exit(143)
        raise Terminated

    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _check_folder() -> None:
    """Raise UserError if the current folder is gone, or its name cannot be written in this locale."""
    try:
        check_encoding("the current folder", str(Path.cwd()))
    except FileNotFoundError:
        raise UserError("the current folder: was deleted or unmounted; change to one that exists") from None


def _reader_is_gone() -> bool:
    """Return whether standard output is a pipe that nobody reads any more. An OSError of a socket is something else."""
    try:
        watch = select.poll()
        watch.register(sys.stdout.fileno(), 0)
        return any(event & select.POLLERR for _, event in watch.poll(0))
    except (AttributeError, OSError, ValueError):  # no poll on this system, or no file behind standard output
        return False


class _Lines(logging.StreamHandler[TextIO]):
    """Writes log lines. Ends the command if nobody reads them; logging itself would print a traceback for each."""

    def handleError(self, record: logging.LogRecord) -> None:  # logging's name
        if isinstance(sys.exc_info()[1], BrokenPipeError):
            raise  # called from an except block
        super().handleError(record)


def log_to(stream: TextIO) -> None:
    """Print the log as plain lines."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[_Lines(stream)])


def quiet_libraries() -> None:
    """Silence the libraries' output on the terminal. Call it before torch and transformers are imported."""
    for name in ("hydra", "hydra_plugins", "httpx", "httpx2", "datasets", "absl", "matplotlib"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of each missing optional package
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft|accelerate")
    warnings.filterwarnings(
        "ignore", message=r"\s*'hydra/launcher/"
    )  # a file of conf/ beside the launcher's own schema is meant
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # DDP warns that it found no unused parameter
    # oneDNN keeps a compiled primitive for each shape of a batch, 1024 by default: more than a run repeats, for a process of many jobs.
    for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):  # oneDNN's own, and that of torch above it
        os.environ.setdefault(cache, "128")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # we report an unreachable Hub in one line


def only_rank_0_speaks() -> None:
    """Silence logs and warnings of ranks above 0. Their errors are still printed if rank 0 has none."""
    if not ranks.is_main():
        logging.disable(logging.CRITICAL)
        warnings.simplefilter("ignore")


class Sized(Protocol):
    """An object with a size on disk."""

    @property
    def bytes(self) -> int: ...


def count(things: Sequence[Any], noun: str) -> str:
    """Return the number of `things` with `noun`, in the plural unless it is 1."""
    return f"{len(things)} {noun}{'' if len(things) == 1 else 's'}"


def megabytes(things: Iterable[Sized]) -> str:
    """Return the total size of `things`, in MB of 1e6 bytes."""
    return f"{sum(thing.bytes for thing in things) / 1e6:.1f} MB"


def say(text: str) -> None:
    """Print a line without markup or wrapping."""
    from rich.console import Console

    Console().print(text, highlight=False, markup=False, soft_wrap=True)
