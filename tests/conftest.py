"""Shared fixtures: real data if present, and a tokenizer and a model small enough to build in a test."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
import torch
from checkpoints import byte_level_bpe, checkpoint, pair_tokenizer  # noqa: F401  # fixtures
from hub import fake_hub  # noqa: F401  # a fixture
from hydra.core.global_hydra import GlobalHydra
from hypothesis import settings
from tokenizers import processors
from transformers import PreTrainedTokenizerFast
from zoo import llama, with_tokenizer

from loftq_exp.commands.run import SWEEP_FOLDER, main
from loftq_exp.tasks.arithmetic import generate

# A table in a pipe is as narrow as COLUMNS says, which a pytest-xdist worker inherits from its parent's readline.
for _size in ("COLUMNS", "LINES"):
    os.environ.pop(_size, None)

# A shell ignores Ctrl-C in what it starts in the background, and so would the commands that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples each time, so that a red run means a change; `make test-all` draws new ones (HYPOTHESIS_PROFILE).
settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("new", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """One thread for torch: on tensors this small, threads wait for each other, for minutes on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real task data beside the checkout; tests that need it are skipped where it is absent."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"real task data is not there ({folder})")
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 512 tokens that puts <s> before a text and, like many a decoder's, has no pad token."""
    texts = [f"{row['question']}\n{row['answer']}" for row in islice(generate("train", 0), 200)]
    tokenizer = byte_level_bpe(texts, 512, ("<s>", "</s>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A folder with a random two-layer Llama in float32 and `tiny_tokenizer`: 64 wide, 4 heads, 2 key-value heads."""
    model = partial(
        llama, vocab_size=len(tiny_tokenizer), num_key_value_heads=2, max_position_embeddings=512, dtype="float32",
        bos_token_id=tiny_tokenizer.bos_token_id, eos_token_id=tiny_tokenizer.eos_token_id,
    )  # fmt: skip
    return with_tokenizer(model, tiny_tokenizer, tmp_path_factory.mktemp("tiny-llama"))


@dataclass(frozen=True)
class Outcome:
    """What one call of the command gave back."""

    code: int
    out: str
    err: str


class Command:
    """The command, called in this process: torch and transformers are loaded once, and stages can be patched."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny_llama_dir: Path
    ) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys
        self.tiny = (
            "model=llama-2", f"model.path={tiny_llama_dir}", "quant.rank=4", "task=arithmetic", "device=cpu",
            "task.max_train_samples=8", "task.max_eval_samples=4", "task.max_target_length=8",
            "train.per_device_train_batch_size=4",
        )  # fmt: skip
        """Overrides that make a run of seconds: a tiny llama on a few problems."""

    def __call__(self, *arguments: str) -> Outcome:
        """Exit code and output of `python -m loftq_exp ARGUMENTS`."""
        return self.call(lambda: main(arguments))

    def call(self, program: Callable[[], int | None]) -> Outcome:
        """Exit code and output of a program that ends in a command."""
        for name in (SWEEP_FOLDER, "HYDRA_FULL_ERROR", "TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY", "OMP_WAIT_POLICY"):
            self._monkeypatch.setenv(name, os.environ.get(name, ""))  # the command sets them; this puts them back
        self._monkeypatch.setattr(sys, "argv", sys.argv)  # a script of examples/ reads its own
        self._monkeypatch.setattr(threading, "excepthook", threading.excepthook)
        GlobalHydra.instance().clear()
        root = logging.getLogger()
        handlers, level = root.handlers, root.level
        root.handlers = []  # so that the command's own logging takes hold as it does outside of pytest
        self._capsys.readouterr()
        code = 0
        try:
            code = program() or 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        finally:
            root.handlers = handlers
            root.setLevel(level)
        return Outcome(code, *self._capsys.readouterr())

    def refused(self, *arguments: str, code: int = 1) -> str:
        """The one line with which the command refuses, without its `error: `; checks that it is one, and the exit code."""
        outcome = self(*arguments)
        assert outcome.err.startswith("error: "), outcome
        assert outcome.err.count("\n") == 1, outcome.err
        assert outcome.err.endswith("\n")
        assert "Traceback" not in outcome.out
        assert outcome.code == code, outcome
        return outcome.err.removeprefix("error: ").rstrip("\n")


@pytest.fixture
def cli(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny_llama_dir: Path
) -> Command:
    """The command, to be called with its arguments from an empty current folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return Command(monkeypatch, capsys, tiny_llama_dir)
