"""TensorBoard's own server over the runs of a sweep, as a browser shows it."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, Tab, browser

TEXT = """(() => {
  const text = node => node.nodeType === 3 ? node.data
    : ["STYLE", "SCRIPT"].includes(node.nodeName) ? ""
    : [...(node.shadowRoot ? node.shadowRoot.childNodes : []), ...node.childNodes].map(text).join(" ");
  return text(document.body).replace(/\\s+/g, " ");
})()"""
"""All text of the page, also in shadow roots."""


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Start TensorBoard on a port of its choice; yield its address."""
    command = [sys.executable, "-m", "tensorboard.main", f"--logdir={folder}", "--port=0", "--host=127.0.0.1"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr
        found = next(match for line in server.stderr if (match := re.search(r"http://[\w.:]+", line)))
        yield found[0]
    finally:
        server.kill()
        server.wait()


def shown(tab: Tab, *wanted: str, seconds: float = 60) -> str:
    """The text of the page once it has all of `wanted`."""
    end = time.monotonic() + seconds
    while not all(each in (text := str(tab.run(TEXT))) for each in wanted):
        assert time.monotonic() < end, text[:3000]
        time.sleep(0.5)
    return text


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_the_dashboards_show_a_sweep(cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loftq_exp.report.sweep.write_page", lambda *_: None)
    assert cli(*cli.tiny, "-m", "train.learning_rate=1e-4,1e-3", "train.max_steps=2").code == 0
    runs = sorted(path.name for path in Path("outputs/runs").iterdir())
    with served(Path("outputs/runs").resolve()) as address, browser(tmp_path / "profile") as tab:
        tab.open(f"{address}/#timeseries")
        text = shown(tab, "init_error_by_layer", "init_error_mean", "score 2 cards", "train 4 cards")
        assert "q_proj" not in text  # no chart of one weight
        tab.open(f"{address}/?hparams#hparams")
        shown(tab, "train.learning_rate", "quant.rank", "score/nll", *runs)
        tab.open(f"{address}/?histograms#histograms")
        shown(tab, "init_error")
        tab.open(f"{address}/?text#text")
        shown(tab, "samples", "config")
        assert all(url.startswith((address, "data:", "blob:")) for url in tab.requests)
