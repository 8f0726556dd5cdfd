"""The documents: the paths that they name exist, and their generated parts are up to date."""

from __future__ import annotations

import json
import re
from pathlib import Path

import demo_results
import pytest
import regions
import result_tables

from loftq_exp import compose

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = "loftq_exp|tests|benchmarks|scripts|conf|docs|examples"


def paths_in(page: Path) -> set[str]:
    """The paths of this repository that a page names: in backticks or commands, and as links. Placeholders are none."""
    text = page.read_text()
    named = re.findall(rf"(?<![\w./-])((?:{FOLDERS})/[\w./-]*\w/?)(?![\w*-]*[*{{])", text)
    links = re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", text)
    found = {path for path in named if not re.search(r"\b[A-Z]{2,}\b", path)}
    return found | {str((page.parent / link).relative_to(ROOT)) for link in links}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_in_a_document_exists(page: Path) -> None:
    assert sorted(path for path in paths_in(page) if not (ROOT / path).exists()) == []


def table_of_packages() -> dict[str, set[str]]:
    """Each package of the table in docs/architecture.md with what it may import."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    section = text.split("## The packages\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| .* \| (.*) \|$", section, re.MULTILINE)
    return {name: set(re.findall(r"`(\w+)`", allowed)) for name, allowed in rows}


def test_the_table_names_exactly_the_packages_that_exist() -> None:
    packages = {path.parent.name for path in (ROOT / "loftq_exp").glob("*/__init__.py")}
    assert set(table_of_packages()) == packages


def test_a_package_imports_no_more_than_the_table_says() -> None:
    draw_architecture = pytest.importorskip("draw_architecture", reason="grimp is not there", exc_type=ImportError)
    house, table = draw_architecture.house(), table_of_packages()
    free = {"errors", "foreign", "masking", "progress", "provenance", "device", "costs"}
    more = {
        name: sorted(house.imported_by(name) - allowed - free) for name, allowed in table.items() if name != "commands"
    }
    assert {name: rooms for name, rooms in more.items() if rooms} == {}


@pytest.mark.parametrize("script", ["draw_architecture", "api_page", "result_tables", "model_table"])
def test_what_a_script_writes_is_up_to_date(script: str) -> None:
    documents = pytest.importorskip(script, reason="grimp is not there", exc_type=ImportError).documents()
    stale = [path.relative_to(ROOT).as_posix() for path, text in documents.items() if path.read_text() != text]
    assert not stale, "run make docs"


def test_the_numbers_of_the_page_on_performance_are_those_that_were_measured() -> None:
    """`make bench` writes the page, and nobody runs it to find a number that was changed by hand."""
    measured = json.loads((ROOT / "docs" / "performance.json").read_text())
    page = (ROOT / "docs" / "performance.md").read_text()
    rows = [" | ".join(part["found"]) for name, part in measured.items() if " rank " in name]
    assert len(rows) == 15
    assert [row for row in rows if f"| {row} |\n" not in page] == []


def test_every_region_of_a_script_is_known_to_it() -> None:
    """A region in a page that the script does not read would never be written."""
    known = {
        path: names
        for path, names in ((page, regions.names_in(page.read_text(), result_tables.NAME)) for page in PAGES)
        if names
    }
    assert set(known) <= set(result_tables.PAGES)
    drawn = {"architecture", "calibration-cost-curves"}
    used = {name for names in known.values() for name in names} | drawn
    made = {path.stem for path in result_tables.RESULTS.glob("*.json")}
    assert used == made | {*result_tables.FROM_A_CARD, *result_tables.MADE_HERE}


def test_a_table_is_written_from_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(result_tables, "RESULTS", tmp_path)
    columns = [{"name": "run", "key": "run"}, {"name": "score", "key": "score", "format": "{:.1f} ± {:.2f}"}]
    rows: list[dict[str, object]] = [
        {"run": "a", "score": [1, 0.5]},
        {"run": "b", "score": {"value": 2, "shown": "**2**"}},
    ]
    (tmp_path / "one.json").write_text(json.dumps({"columns": columns, "rows": rows}))
    more = [{"from": "one", "where": {"run": "a"}, "run": "a again"}, {"run": "c"}]
    (tmp_path / "two.json").write_text(json.dumps({"columns": columns, "rows": more}))
    assert result_tables.table("one").splitlines()[2:] == ["| a | 1.0 ± 0.50 |", "| b | **2** |"]
    assert result_tables.table("two").splitlines()[2:] == ["| a again | 1.0 ± 0.50 |", "| c |  |"]
    (tmp_path / "two.json").write_text(
        json.dumps({"columns": columns, "rows": [{"from": "one", "where": {"run": "z"}}]})
    )
    with pytest.raises(ValueError, match="two: 0 rows of one are"):
        result_tables.table("two")


def demo_run(folder: Path, name: str, *overrides: str) -> None:
    """Write the metrics of a run of a demo into `folder`."""
    config = compose([f"experiment=demo-{name}", *overrides]).to_dict()
    metrics: dict[str, object] = dict.fromkeys(("published", "backbone_bytes", "adapter_bytes"), 0)
    metrics |= {"label": name, "config": config, "table": [], "losses": [[1, 2.0]], "provenance": {}}
    metrics |= {"scores": {"nll": 0.5, "accuracy": 0.71875}, "init": {"bits_per_weight": 2.25, "mean_error": 0.4}}
    metrics["seconds"] = {"quantize": 1.0, "finetune": 2.0, "evaluate": 3.0}
    folder.mkdir()
    (folder / "metrics.json").write_text(json.dumps(metrics, default=str))


def test_the_demos_table_is_made_of_their_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("qlora", "calibrated", "lora", "loftq"):
        demo_run(tmp_path / name, name, f"output_dir={tmp_path}")
    demo_run(tmp_path / "other", "lora", "train.learning_rate=1")  # not a demo's settings
    monkeypatch.setattr("sys.argv", ["demo_results.py", str(tmp_path)])
    monkeypatch.setattr(demo_results, "TABLE", tmp_path / "demo.json")
    monkeypatch.setattr(demo_results, "PICTURE", tmp_path / "losses.png")
    demo_results.main()
    monkeypatch.setattr(result_tables, "RESULTS", tmp_path)
    assert result_tables.table("demo").splitlines()[2::3] == [
        "| LoRA 16-bit | 2.25 | 0.4000 | 0.5000 | 71.9% | 1 s | 2 s | 3 s |",
        "| calibrated LoftQ, 2 bits, 5 steps | 2.25 | 0.4000 | 0.5000 | 71.9% | 1 s | 2 s | 3 s |",
    ]
    assert (tmp_path / "losses.png").stat().st_size > 1000
    (tmp_path / "loftq" / "metrics.json").unlink()
    with pytest.raises(
        SystemExit, match=r"^demo-loftq: 0 scored runs in .* have its settings, there must be 1: run make demo"
    ):
        demo_results.main()


def test_a_region_is_filled_once_and_only_once() -> None:
    text = "a\n<!-- x: by s.py -->\nold\n<!-- end of x -->\nb\n"
    filled = regions.filled(text, "x", "new\n")
    assert filled == "a\n<!-- x: by s.py -->\n\nnew\n\n<!-- end of x -->\nb\n"
    assert regions.filled(filled, "x", "new\n") == filled
    with pytest.raises(ValueError, match="x: 2 regions of this name"):
        regions.filled(text * 2, "x", "new")
