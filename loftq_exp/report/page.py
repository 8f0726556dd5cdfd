"""The page of a summary: one HTML file with the tables, the charts, and every run's folder, settings and command."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import replace
from html import escape
from importlib.resources import files
from pathlib import Path
from urllib.parse import quote

from loftq_exp.report.collect import METRICS, Found
from loftq_exp.report.command import command_of
from loftq_exp.report.figures import Section, sections
from loftq_exp.report.grid import LABELS, Grid, grids, runs_grid, setting_of
from loftq_exp.report.history import history
from loftq_exp.report.jobs import Job, Search, failures, searches
from loftq_exp.report.settings import SEEDS, flatten
from loftq_exp.report.summary import Row, Summary, narrowed, summarise
from loftq_exp.report.values import scores_of
from loftq_exp.whole import whole_file

_MOST_NAMES = 8


def write_page(summary: Summary, path: Path, jobs: Sequence[Job] = ()) -> None:
    """Write the page of a summary, with what the `jobs` of its sweeps searched for and why some failed. It is one file, which opens without a network, and without scripts shows all of it.

    Runs are linked relative to the page's folder. Each model and task has its own tables and charts.
    """
    with whole_file(path) as beside:
        beside.write_text(_page(summary, path.absolute().parent, jobs), encoding="utf-8")


def _page(summary: Summary, folder: Path, jobs: Sequence[Job]) -> str:
    style, script = ((files("loftq_exp.report") / name).read_text("utf-8") for name in ("page.css", "page.js"))
    # Only this script runs, whatever the name of a run holds, and nothing is fetched.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    runs = sum(len(row.runs) for row in summary.rows)
    counted = f"{len(summary.rows)} rows of {runs} runs. " if runs > len(summary.rows) else f"{runs} runs. "
    differ = f"They differ in {', '.join(summary.differing[:_MOST_NAMES])}" if summary.differing else ""
    differ += f" and {len(summary.differing) - _MOST_NAMES} more settings" * (len(summary.differing) > _MOST_NAMES)
    body, first = list[str](), 0
    for name, rows in _groups(summary):
        body += _group(name, rows, first, summary, folder)
        first += len(rows)
    body += _searches(searches(jobs), folder) + _failures(failures(jobs), folder)
    return "\n".join([
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">',
        f"<title>LoftQ: {escape(counted.rstrip('. '))}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>",
        f"<h1>LoftQ experiments</h1>\n<p>{escape(counted + differ)}.</p>",
        *body,
        f"</main>\n<script>{script}</script>\n</body>\n</html>\n",
    ])  # fmt: skip


def _groups(summary: Summary) -> list[tuple[str, list[Row]]]:
    """Return the rows of each model and task under its name. Their own names say no more than what differs in the group."""
    groups: dict[str, list[Row]] = {}
    for row in summary.rows:
        groups.setdefault(", ".join(str(setting_of(row, name)) for name in LABELS), []).append(row)
    own = {of: summarise([run for row in rows for run in row.runs]).rows for of, rows in groups.items()}
    return [
        (of, [replace(row, name=short.name) for row, short in zip(rows, own[of], strict=True)])
        for of, rows in groups.items()
    ]


def _group(name: str, rows: Sequence[Row], first: int, summary: Summary, folder: Path) -> list[str]:
    part = narrowed(summary, rows)
    anchors = {row.name: f"row-{first + index}" for index, row in enumerate(rows)}
    (grid,) = grids(part)
    runs = [run for row in rows for run in row.runs]
    links = [(_href(run, folder), _place(run)) for run in runs]
    drawn = sections(rows, part.differing, lambda row: f"#{anchors[row.name]}", name)
    return [
        f"<section>\n<h2>{escape(name)}</h2>",
        _table(grid, [(f"#{anchors[row.name]}", row.name) for row in rows], f"table-{first}"),
        *map(_charts, drawn),
        *(_details(single.title, _table(single, links, f"runs-{first}")) for single in runs_grid(part)),
        "<h3>Folders, settings and commands</h3>",
        *(_row(row, anchors[row.name], folder) for row in rows),
        "</section>",
    ]


def _searches(found: Sequence[Search], folder: Path) -> list[str]:
    """Return a section with the history of each search, each trial leading to its sweep's folder."""
    parts = []
    for search in found:
        drawn = history(search, lambda job: _link_to(job.path.parent, folder))
        chart = f"<figure><figcaption>{escape(drawn.caption)}</figcaption>\n{drawn.svg}\n</figure>"
        parts.append(f'<section>\n<h2>{escape(drawn.title)}</h2>\n<div class="charts">\n{chart}\n</div>\n</section>')
    return parts


def _failures(jobs: Sequence[Job], folder: Path) -> list[str]:
    """Return a section that names the jobs that failed, with their overrides and reason."""
    lines = [
        f'<li><a href="{escape(_link_to(job.path.parent, folder))}">{escape(job.path.absolute().parent.name)}</a> '
        f"{escape(job.failure)}\n<pre>{escape(' '.join(job.overrides))}</pre></li>"
        for job in jobs
    ]
    listed = "\n".join(lines)
    return [f'<section>\n<h2>Failed jobs</h2>\n<ul class="runs">\n{listed}\n</ul>\n</section>'] if lines else []


def _table(grid: Grid, links: Sequence[tuple[str, str]], name: str) -> str:
    """Return a table. Each row's first cell leads to its link, which has the given title."""
    texts = [
        not all(re.match(r"[-+\[]*[\d.]|-$", row[index]) for row in grid.rows) for index in range(len(grid.headings))
    ]
    heads = "".join(
        f'<th scope="col" class="{"text" if text else "number"}">{escape(heading)}</th>'
        for heading, text in zip(grid.headings, texts, strict=True)
    )
    lines = []
    for (first, *others), (href, title) in zip(grid.rows, links, strict=True):
        cells = "".join(
            f'<td class="{"text" if text else "number"}">{escape(cell)}</td>'
            for cell, text in zip(others, texts[1:], strict=True)
        )
        link = f'<a href="{escape(href)}" title="{escape(title)}">{escape(first)}</a>'
        lines.append(f'<tr><th scope="row">{link}</th>{cells}</tr>')
    notes = "".join(f'<p class="note">{escape(note)}</p>\n' for note in grid.notes)
    return (
        f'<label class="filter" hidden>Filter rows <input type="search" data-table="{name}"> <output></output></label>\n'
        f'<div class="scroll" role="region" aria-label="{escape(grid.title)}" tabindex="0">\n<table id="{name}">\n'
        f"<thead><tr>{heads}</tr></thead>\n<tbody>\n" + "\n".join(lines) + f"\n</tbody>\n</table>\n</div>\n{notes}"
    )


def _charts(section: Section) -> str:
    figures = "\n".join(
        f"<figure><figcaption><strong>{escape(drawn.title)}</strong>"
        + (f"<p>{escape(drawn.caption)}</p>" if drawn.caption else "")
        + f"</figcaption>\n{drawn.svg}\n</figure>"
        for drawn in section.charts
    )
    return _details(section.title, f'<div class="charts">\n{figures}\n</div>', section.open)


def _details(title: str, content: str, opened: bool = True) -> str:
    return f"<details{' open' * opened}><summary><h3>{escape(title)}</h3></summary>\n{content}</details>"


def _row(row: Row, anchor: str, folder: Path) -> str:
    runs = "\n".join(_run(run, folder) for run in row.runs)
    return f'<article id="{anchor}">\n<h4>{escape(row.name)}</h4>\n<ul class="runs">\n{runs}\n</ul>\n</article>'


def _run(run: Found, folder: Path) -> str:
    config = run.metrics["config"]
    values = flatten(config)
    seeds = [f"{name}={values[name]}" for name in SEEDS[:1] if name in values]
    scores = [f"{name} {value:.6g}" for name, value in scores_of(run.metrics).items()]
    about = ", ".join([*seeds, *scores, *[run.state] * (run.state != "done")])
    commands = command_of(config)
    if run.path.name == METRICS and run.state == "done":
        again = f"loftq-exp rerun {shlex.quote(str(run.path.absolute().parent))}"
        commands = f"# repeat the run and compare it with its record:\n{again}\n# the same from its settings alone:\n{commands}"
    return (
        f'<li><a href="{escape(_href(run, folder))}">{escape(_place(run))}</a> {escape(about)}\n'
        f'<details><summary>Command and settings</summary>\n<pre class="command">{escape(commands)}</pre>\n'
        f"<pre>{escape(json.dumps(config, indent=1, default=str))}</pre></details></li>"
    )


def _place(run: Found) -> str:
    return run.path.absolute().parent.name


def _href(run: Found, folder: Path) -> str:
    return _link_to(run.path.parent, folder)


def _link_to(place: Path, folder: Path) -> str:
    """Return a folder relative to the page's, so that both may be moved together."""
    try:
        return quote(Path(os.path.relpath(place.absolute(), folder)).as_posix()) + "/"
    except ValueError:  # another drive of Windows
        return place.absolute().as_uri() + "/"
