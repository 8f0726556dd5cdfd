"""Secrets in the environment, in an address and in a server's answer do not reach a terminal, an error or a record."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import pytest
from hub import Hub

from loftq_exp import compose
from loftq_exp.errors import UserError
from loftq_exp.masking import mask_output, masked

TOKEN = "hf_" + "aB3" * 11 + "x"
FOREIGN = "9f8e7d6c5b4a3210wandb"


def everything(*folders: Path) -> bytes:
    """The bytes of every file below the folders, and the names."""
    found = [path for folder in folders for path in folder.rglob("*")]
    return b"\0".join(path.read_bytes() for path in found if path.is_file()) + repr(found).encode()


@pytest.mark.parametrize(("text", "shown"), [
    (f"Authorization: Bearer {TOKEN}", "Authorization: Bearer ***"),
    ("{'authorization': 'Basic dXNlcjpwYXNz'}", "{'authorization': 'Basic ***'}"),
    (f"https://user:{TOKEN}@host/x", "https://***@host/x"),
    ("see https://me:pass@host:8080/a?b and https://plain.org/@x", "see https://***@host:8080/a?b and https://plain.org/@x"),
    (f"token={TOKEN};", "token=***;"),
    ("an ordinary text of a bearer token, hf_model_small, basic settings", None),
])  # fmt: skip
def test_what_has_the_form_of_a_secret(text: str, shown: str | None) -> None:
    assert masked(text) == (shown or text)


@pytest.mark.parametrize(
    "name", ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "PIP_PASSWORD", "stored"]
)
def test_what_the_environment_holds(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if name == "stored":
        monkeypatch.setenv("HF_HOME", str(tmp_path))
        (tmp_path / "token").write_text(f"{FOREIGN}\n")
    else:
        monkeypatch.setenv(name, FOREIGN)
    assert masked(f"a {FOREIGN} b") == "a *** b"
    assert str(UserError(f"the server said {FOREIGN}")) == "the server said ***"


def test_everything_that_is_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WANDB_API_KEY", FOREIGN)
    mask_output()
    sys.stdout.write(f"out {FOREIGN}\n")
    logging.StreamHandler(sys.stderr).emit(logging.LogRecord("x", 40, "", 0, "log %s", (FOREIGN,), None))
    sys.excepthook(ValueError, ValueError(f"trace {FOREIGN}"), None)
    out, err = capsys.readouterr()
    assert out == "out ***\n"
    assert FOREIGN not in err
    assert err.count("***") == 2


@pytest.fixture
def secretive(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return TOKEN


def test_a_data_sets_server_that_echoes_the_header(
    cli: Any, fake_hub: Hub, secretive: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", fake_hub.endpoint)
    fake_hub.refused = {"": 401}
    outcome = cli(*cli.tiny[:3], "task=gsm8k", "task.dataset=someone/rows")
    assert outcome.code == 1
    assert f"Bearer {secretive}" in {request.token for request in fake_hub.requests}
    assert "you sent Bearer ***" in outcome.err
    assert outcome.err.startswith("error: task.dataset=someone/rows")
    assert outcome.err.count("\n") == 1
    assert secretive not in outcome.out + outcome.err


def test_a_models_server_that_echoes_the_header(cli: Any, fake_hub: Hub, secretive: str) -> None:
    fake_hub.refused = {"": 403}
    outcome = cli(*cli.tiny, "model.path=someone/model")
    assert outcome.code == 1
    assert [request.token for request in fake_hub.requests if request.token] != []
    assert secretive not in outcome.out + outcome.err


@pytest.mark.parametrize("setting", [
    "model.path=https://me:{}@host/model", "task.dataset={}", "task.train_file=https://{}@host/rows.jsonl", "output_dir=runs-{}",
    "hub.repo_id=me/{}", "+wandb.key={}",
])  # fmt: skip
@pytest.mark.parametrize("more", [(), ("-m",)])
def test_a_setting_that_holds_a_secret_is_refused(
    cli: Any, secretive: str, setting: str, more: tuple[str, ...]
) -> None:
    outcome = cli(*cli.tiny, setting.format(secretive), *more)
    assert outcome.code == 1
    assert outcome.err.startswith(f"error: {setting.lstrip('+').partition('=')[0]}=")
    assert "holds a token or password" in outcome.err
    assert secretive not in outcome.out + outcome.err
    assert not Path("outputs").exists()
    if not setting.startswith("+"):
        with pytest.raises(UserError, match="holds a token or password"):
            compose([setting.format(secretive)])


def test_a_whole_run_and_a_multirun_with_a_job_that_fails(
    cli: Any, secretive: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", FOREIGN)
    shown = [cli(*cli.tiny)]
    from loftq_exp.tasks import arithmetic

    def leaks(*_: Any) -> None:
        raise RuntimeError(f"a bug of a library: Bearer {secretive} and {FOREIGN}")

    monkeypatch.setattr(arithmetic.Arithmetic, "rows", leaks)
    shown.append(cli(*cli.tiny, "-m", "seed=5"))
    assert "a bug of a library: Bearer *** and ***" in shown[1].out
    for secret in (secretive, FOREIGN):
        assert secret.encode() not in everything(Path("outputs"))
        assert not any(secret in outcome.out + outcome.err for outcome in shown)
    assert b"a bug of a library" in everything(Path("outputs"))
