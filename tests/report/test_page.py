"""The page of a report: in its text, and in a real browser."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, Tab, browser
from recorded import metrics, write

import loftq_exp
from loftq_exp.report.collect import collect
from loftq_exp.report.grid import grids
from loftq_exp.report.page import write_page
from loftq_exp.report.summary import Summary, summarise

NASTY = "</td><script>alert(1)</script>&\"'$x_1$"
MODULES = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
LAYERS = 4
ROWS = (("loftq", 2, 2, 8), ("loftq", 2, 4, 8), ("loftq", 2, 4, 16), ("qlora", 0, 4, 8))
"""Method, steps, bits and rank."""


def record(
    root: Path, *, seed: int, method: str = "loftq", steps: int = 2, bits: int = 4, rank: int = 8, **settings: Any
) -> Path:
    """A run's folder with metrics, settings and an initialisation, as the pipeline leaves them. The numbers are drawn."""
    draw = random.Random(f"{seed} {method} {bits} {rank}")
    errors = [(0.1 if bits == 4 else 0.5) * (1 - rank / 100) * 0.8**step for step in range(steps + 1)]
    accuracy = 0.5 + bits / 20 + steps / 50 + draw.random() / 50
    made = metrics(
        {"accuracy": accuracy, "nll": 2 - accuracy},
        method=method,
        iter=steps,
        bits=bits,
        rank=rank,
        seed=seed,
        **settings,
    )
    made["init"] |= {"linear_values": 1_000_000, "mean_error": errors[-1]}
    made["losses"] = [[step, 3 * math.exp(-step / 40) + 0.5 + draw.random() / 9] for step in range(1, 400)]
    made["seconds"] = {"quantize": 1 + draw.random(), "finetune": 60 + draw.random()}
    made["peak_memory"] = {"quantize": {"resident_bytes": 10**9}, "finetune": {"resident_bytes": 2 * 10**9}}
    made["backbone_bytes"], made["adapter_bytes"] = 100_000 * bits, 10_000 * rank
    name = f"{method}-{bits}-{rank}-{seed}-{len(settings)}"
    weights = [{"name": f"model.layers.{layer}.{module}", "errors": [error * (1 + layer / 10) for error in errors], "kept_step": steps}
               for layer in range(LAYERS) for module in MODULES]  # fmt: skip
    init = root / "inits" / name
    write(init / "init_report.json", {"key": name, "weights": weights})
    write(root / "runs" / name / "metrics.json", made)
    write(
        root / "runs" / name / "config.json", {**made["config"], "initialisation": {"key": name, "folder": str(init)}}
    )
    return root / "runs" / name


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four settings with two seeds each, in a folder whose name must be quoted."""
    root = tmp_path_factory.mktemp("sweep") / "a # folder"
    for method, steps, bits, rank in ROWS:
        for seed in (0, 1):
            record(root, seed=seed, method=method, steps=steps, bits=bits, rank=rank)
    return root


def paged(root: Path) -> tuple[Summary, Path]:
    summary, page = summarise(collect([root])), root / "report.html"
    write_page(summary, page)
    return summary, page


@pytest.fixture(scope="module")
def report(sweep: Path) -> tuple[Summary, Path]:
    return paged(sweep)


class Read(HTMLParser):
    """What a page has without running it: tags with their attributes, the cells of each table, and all text by its tag."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.tables: list[list[list[str]]] = []
        self.texts: dict[str, list[str]] = {}
        self._within: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        self._within.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        while self._within.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        self.texts.setdefault(self._within[-1] if self._within else "", []).append(data)
        if {"td", "th"} & set(self._within):
            self.tables[-1][-1][-1] += data

    def all_of(self, tag: str, attribute: str) -> list[str]:
        return [attributes[attribute] for name, attributes in self.tags if name == tag and attribute in attributes]


CHARTS = ["accuracy against bits", "accuracy against rank", "accuracy against backbone bytes", "accuracy against memory", "NLL against bits",
          "NLL against rank", "NLL against backbone bytes", "NLL against memory", "Training loss", "Weight error by step"]  # fmt: skip
COSTS = ["Initialisation time", "Training time", "Peak resident memory"]


def test_the_page_has_the_table_and_all_charts(report: tuple[Summary, Path]) -> None:
    summary, page = report
    read = Read(page)
    (grid,) = grids(summary)
    assert read.tables[0] == [list(grid.headings), *grid.rows]
    assert len(read.tables[1]) == 1 + 2 * len(ROWS)
    assert read.texts["strong"] == CHARTS + [row.name for row in summary.rows] + COSTS
    labels = read.all_of("svg", "aria-label")
    assert len(labels) == len(set(labels)) == len(read.texts["strong"])
    assert all(title.casefold() in label.casefold() for title, label in zip(CHARTS, labels, strict=False))


def test_what_a_link_leads_to_is_there(report: tuple[Summary, Path]) -> None:
    summary, page = report
    read = Read(page)
    links = read.all_of("a", "href")
    anchors = {f"#{name}" for name in read.all_of("article", "id")}
    assert {link for link in links if link.startswith("#")} == anchors
    assert len(anchors) == len(summary.rows) == len(ROWS)
    folders = {
        (page.parent / re.sub("%(..)", lambda code: chr(int(code[1], 16)), link)).resolve()
        for link in links
        if link[0] != "#"
    }
    assert folders == {run.path.parent.resolve() for row in summary.rows for run in row.runs}


def test_a_point_is_named_with_its_number(report: tuple[Summary, Path]) -> None:
    summary, page = report
    row = summary.rows[0]
    score, time = row.scores["accuracy"], row.measures["init_seconds"]
    named = Read(page).all_of("a", "aria-label")
    assert (
        named.count(
            f"{row.name}: accuracy {score.mean:.1%} ± {score.std:.1%} (n 2)".replace("%", "").replace(" (n", " % (n")
        )
        == 4
    )
    assert f"{row.name}: Initialisation time {time.mean:.4g} ± {time.std:.4g} seconds (n 2)" in named


def test_nothing_is_outside_the_file(report: tuple[Summary, Path]) -> None:
    text = report[1].read_text(encoding="utf-8")
    read = Read(report[1])
    assert not re.search(r"https?:|//[\w.]+\.\w", re.sub(r"<pre.*?</pre>", "", text, flags=re.DOTALL))
    assert set(re.findall(r"url\(.", text)) == {"url(#"}
    assert "@import" not in text
    sources = [
        attributes[name]
        for _, attributes in read.tags
        for name in ("src", "srcset", "data", "xlink:href")
        if name in attributes
    ]
    assert sources == []
    assert all(href.startswith(("#", "data:")) for tag in ("use", "image", "link") for href in read.all_of(tag, "href"))
    (policy,) = (found["content"] for tag, found in read.tags if found.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none';")


def test_the_page_is_small_and_the_same_each_time(report: tuple[Summary, Path], tmp_path: Path) -> None:
    summary, page = report
    again = page.with_name("again.html")
    write_page(summary, again)
    assert again.read_bytes() == page.read_bytes()
    assert page.stat().st_size < 1_000_000
    assert not list(page.parent.glob(".*"))


def test_everything_is_escaped(tmp_path: Path) -> None:
    for rate in (NASTY, "0.1"):
        record(tmp_path, seed=0, train__learning_rate=rate, model__name=NASTY).rename(
            tmp_path / "runs" / f"{len(rate)} <i>&"
        )
    page = paged(tmp_path)[1]
    read = Read(page)
    assert len(read.all_of("script", "src")) == 0
    assert [tag for tag, _ in read.tags].count("script") == 1
    assert [tag for tag, _ in read.tags].count("i") == 0
    assert any(NASTY in cell for line in read.tables[0] for cell in line)
    assert any(NASTY in label for label in read.all_of("svg", "aria-label"))
    assert f"learning_rate={NASTY}" in "".join(read.texts["text"]).replace("\n", "")


def test_a_chart_without_data_is_left_out(tmp_path: Path) -> None:
    """One run that was not scored, trained or found an initialisation; one that has not even begun; no run at all."""
    path = record(tmp_path, seed=0)
    made = json.loads((path / "metrics.json").read_text())
    (path / "config.json").unlink()
    write(path / "metrics.json", made | {"scores": {}, "losses": [], "peak_memory": {}, "seconds": {"quantize": 2.0}})
    assert Read(paged(tmp_path)[1]).texts["strong"] == ["Initialisation time"]
    (path / "metrics.json").unlink()
    write(path / "config.json", made["config"] | {"initialisation": {"key": "?", "folder": "nowhere"}})
    summary, page = paged(tmp_path)
    assert "strong" not in Read(page).texts
    assert len(Read(page).tables) == len(summary.rows) == 1
    (path / "config.json").unlink()
    assert "0 runs" in paged(tmp_path)[1].read_text()


def test_the_errors_are_those_of_the_initialisation_that_the_run_names(tmp_path: Path) -> None:
    path = record(tmp_path, seed=0)
    assert "Weight error by step" in Read(paged(tmp_path)[1]).texts["strong"]
    (init,) = (tmp_path / "inits").glob("*/init_report.json")
    write(init, json.loads(init.read_text()) | {"key": "another"})
    assert "Weight error by step" not in Read(paged(tmp_path)[1]).texts["strong"]
    assert path.is_dir()


def test_one_logged_loss_is_a_visible_point(tmp_path: Path) -> None:
    path = record(tmp_path, seed=0) / "metrics.json"
    write(path, json.loads(path.read_text()) | {"losses": [[6, 1.5]]})
    svg = re.search(r'<svg[^>]*aria-label="Training loss.*?</svg>', paged(tmp_path)[1].read_text(), re.DOTALL)
    assert svg is not None
    assert re.search(r'<a href="#row-0".*?<use ', svg[0], re.DOTALL)


def test_models_and_tasks_have_their_own_tables_and_charts(tmp_path: Path) -> None:
    for kind in ("gsm8k", "arithmetic"):
        for bits in (2, 4):
            record(tmp_path / kind, seed=0, bits=bits, task__kind=kind)
    read = Read(paged(tmp_path)[1])
    assert sorted(read.texts["h2"]) == ["tiny, arithmetic", "tiny, gsm8k"]
    assert [len(table) for table in read.tables] == [3, 3]
    assert read.texts["strong"].count("accuracy against bits") == 2
    assert set(read.texts["h4"]) == {"LoftQ NF2 iter 2 r8", "LoftQ NF4 iter 2 r8"}


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed: apt-get install chromium")
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


DRAWN = """[...document.querySelectorAll("svg")].map(svg =>
  [svg.getBoundingClientRect().width, Math.max(...[...svg.querySelectorAll("path, image, use")].map(each => each.getBoundingClientRect().height))])"""
COLUMN = "[...document.querySelector('table').tBodies[0].rows].filter(row => !row.hidden).map(row => row.cells[{}].textContent)"


def test_in_a_browser_charts_are_drawn_and_nothing_is_requested_or_refused(
    report: tuple[Summary, Path], tab: Tab
) -> None:
    summary, page = report
    for scripts in (True, False):
        tab.open(page, scripts=scripts)
        assert tab.complaints == []
        assert [url for url in tab.requests if not url.startswith("data:")] == [page.as_uri()]
        drawn = tab.run(DRAWN)
        assert len(drawn) == len(CHARTS) + len(summary.rows) + len(COSTS)
        assert all(width > 250 and height > 100 for width, height in drawn)
        assert tab.run("document.querySelectorAll('input').length") == 2
        assert tab.run("document.querySelector('.filter').checkVisibility()") is scripts
        assert tab.run("document.querySelectorAll('th button, .copy').length > 0") is scripts
        assert tab.run(COLUMN.format(0)) == [line[0] for line in grids(summary)[0].rows]


def test_in_a_browser_tables_sort_and_filter(report: tuple[Summary, Path], tab: Tab) -> None:
    summary, page = report
    grid = grids(summary)[0]
    index = grid.headings.index("accuracy")
    cells = sorted((line[index] for line in grid.rows), key=lambda cell: float(cell.partition("%")[0]))
    tab.open(page)
    press = f"document.querySelectorAll('table')[0].tHead.rows[0].cells[{index}].querySelector('button').click()"
    tab.run(press)
    assert tab.run(COLUMN.format(index)) == cells
    tab.run(press)
    assert [cell.partition("%")[0] for cell in tab.run(COLUMN.format(index))] == [
        cell.partition("%")[0] for cell in reversed(cells)
    ]
    assert tab.run("document.querySelector('th[aria-sort]').textContent") == "accuracy"
    tab.run(
        "{const field = document.querySelector('input'); field.value = 'QLORA nf4'; field.dispatchEvent(new Event('input'))}"
    )
    assert tab.run(COLUMN.format(0)) == ["QLoRA NF4"]
    assert tab.run("document.querySelector('output').textContent") == "1 of 4 rows"
    assert tab.complaints == []


def test_in_a_browser_it_fits_a_phone_and_follows_the_colour_scheme(report: tuple[Summary, Path], tab: Tab) -> None:
    luminance = "(colour => colour.match(/[\\d.]+/g).slice(0, 3).reduce((sum, part) => sum + +part, 0) / 765)(getComputedStyle(document.{})['{}'])"
    for dark in (False, True):
        tab.open(report[1], width=390, dark=dark)
        assert tab.run("document.documentElement.scrollWidth") == 390
        back = tab.run(luminance.format("body", "backgroundColor"))
        assert back < 0.2 if dark else back > 0.9
        for place, name in (
            ("body", "color"),
            ("querySelector('svg text')", "fill"),
            ("querySelector('svg a use')", "fill"),
        ):
            assert abs(tab.run(luminance.format(place, name)) - back) > 0.3
        smallest = tab.run("Math.min(...[...document.querySelectorAll('svg text')].map(text => parseFloat(getComputedStyle(text).fontSize) * Math.hypot(text.getScreenCTM().a, text.getScreenCTM().b)))")  # fmt: skip
        assert smallest > 9


def test_in_a_browser_a_point_leads_to_its_runs_with_their_command(report: tuple[Summary, Path], tab: Tab) -> None:
    tab.open(report[1])
    name = tab.run(
        "(link => {location.hash = link.getAttribute('href'); return link.getAttribute('aria-label')})(document.querySelector('svg a'))"
    )
    target = tab.run("document.querySelector(':target').textContent")
    assert name.partition(":")[0] in target
    assert "loftq-exp rerun" in target
    assert "quant.rank=" in target


def test_in_a_browser_no_name_runs(tmp_path: Path, tab: Tab) -> None:
    record(tmp_path, seed=0, train__learning_rate=NASTY)
    record(tmp_path, seed=0, train__learning_rate="javascript:alert(1)", model__name="<img src=x onerror=alert(1)>")
    tab.open(paged(tmp_path)[1])
    assert tab.complaints == []
    assert tab.run("document.querySelectorAll('script').length") == 1
    assert tab.run("document.querySelectorAll('img').length") == 0


def test_the_page_of_a_real_run(tmp_path: Path, tiny_llama_dir: Path) -> None:
    """Its numbers are those of the run, and its chart of errors ends at the error in the table."""
    config = loftq_exp.compose([
        "model=llama-2", f"model.path={tiny_llama_dir}", "quant.rank=4", "quant.iter=2", f"output_dir={tmp_path}", "device=cpu",
        "task.max_train_samples=8", "task.max_eval_samples=4", "task.max_source_length=48", "task.max_target_length=16",
        "train.per_device_train_batch_size=4", "train.logging_steps=1",
    ])  # fmt: skip
    result = loftq_exp.run(config)
    summary, page = paged(tmp_path)
    read = Read(page)
    (name,) = (row.name for row in summary.rows)
    assert read.texts["strong"] == ["Training loss", "Weight error by step", name, *COSTS]
    assert f"{result.metrics['init']['mean_error']:.4f}" in read.tables[0][1]
    (mean,) = re.findall(r"kept factors: mean ([\d.]+),", "".join(read.texts["p"]))
    assert float(mean) == pytest.approx(result.metrics["init"]["mean_error"], abs=1e-4)
