"""What the commands share: options that are refused in one line, and a terminal that is left to their own lines."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn, Protocol

from loftq_exp import ranks
from loftq_exp.errors import UserError


class OneLineParser(argparse.ArgumentParser):
    """A parser that refuses in one line, as the rest of the project does."""

    def error(self, message: str) -> NoReturn:
        """Raises the message as a UserError instead of printing the usage."""
        raise UserError(f"{message}; see {self.prog} --help")


def exit_code(work: Callable[[], int], interrupted: str) -> int:
    """The exit code of a command's work.

    A refusal is one line on standard error and 1; an interruption the line given and 130. A page such as --help, after which
    argparse and Hydra leave the process, is 0.
    """
    try:
        return work()
    except UserError as error:
        ranks.let_main_fail_first()
        sys.stderr.write(f"error: {error}\n")
        return 1
    except KeyboardInterrupt:
        if ranks.is_main():
            sys.stderr.write(f"error: interrupted: {interrupted}\n")
        return 130
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception:
        ranks.let_main_fail_first()
        raise


def quiet_libraries() -> None:
    """Leaves the terminal to our own lines. To be called before torch and transformers are imported."""
    for name in ("hydra", "httpx", "httpx2", "datasets", "absl"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of each optional package that is not there
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft|accelerate")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # DDP warns that it found no unused parameter
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # an unreachable hub is one line of ours, not one a retry


def only_rank_0_speaks() -> None:
    """Silences logs and warnings of the other ranks of a launch. Their errors are printed where rank 0 has none."""
    if not ranks.is_main():
        logging.disable(logging.CRITICAL)
        warnings.simplefilter("ignore")


class Sized(Protocol):
    """Something that takes bytes on a disk."""

    @property
    def bytes(self) -> int: ...


def count(things: Sequence[Any], noun: str) -> str:
    """The number of things with their name, in the plural where it is not one."""
    return f"{len(things)} {noun}{'' if len(things) == 1 else 's'}"


def megabytes(things: Iterable[Sized]) -> str:
    """What things take, in MB of 1e6 bytes."""
    return f"{sum(thing.bytes for thing in things) / 1e6:.1f} MB"


def say(text: str) -> None:
    """Prints a line as it is."""
    from rich.console import Console

    Console().print(text, highlight=False, markup=False, soft_wrap=True)
