"""The chart of a search: the score of each trial, and the best so far."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from loftq_exp.report.charts import Point, scatter
from loftq_exp.report.jobs import Job, Search
from loftq_exp.report.scored import Drawn


def history(search: Search, href: Callable[[Job], str]) -> Drawn:
    """Return the chart of a search. Each trial leads to where `href` says, and is titled with its settings and score."""

    def points(values: list[float], title: str) -> list[Point]:
        return [
            Point(number, value, None, None, f"{title} {number}: {value:.6g}, {' '.join(job.overrides)}", href(job))
            for (number, job), value in zip(search.trials, values, strict=True)
        ]

    series: dict[str, Sequence[Point]] = {
        "trial": points([job.objective or 0.0 for _, job in search.trials], "trial"),
        "best so far": points(search.best_so_far, "best up to trial"),
    }
    settings = ", ".join(override.partition("=")[0] for override in search.best.overrides)
    title = f"Search for the best {search.objective} over {settings}"
    return Drawn(
        title,
        f"{search.summary[0].upper()}{search.summary[1:]}.",
        scatter(title, "trial", search.objective, series, joined=False),
    )
