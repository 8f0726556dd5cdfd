"""conf/ is found from a checkout, an editable install and an installed wheel, whatever the current folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from loftq_exp.commands import run as command

CHECKOUT = Path(__file__).parents[1]


def layout(root: Path, *files: str) -> Path:
    """Empty `files` below `root`; the place that the package's commands/run.py would have there."""
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()
    return root / "loftq_exp" / "commands" / "run.py"


def test_a_checkout_uses_its_own_conf() -> None:
    assert command.conf_dir() == CHECKOUT / "conf"


def test_the_checkouts_conf_beats_a_stale_copy_in_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = layout(tmp_path, "pyproject.toml", "conf/config.yaml", "loftq_exp/conf/config.yaml")
    monkeypatch.setattr(command, "__file__", str(place))
    assert command.conf_dir() == tmp_path / "conf"


def test_an_installed_package_uses_the_copy_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = layout(tmp_path, "loftq_exp/conf/config.yaml", "conf/config.yaml")  # another package's conf/ beside it
    monkeypatch.setattr(command, "__file__", str(place))
    assert command.conf_dir() == tmp_path / "loftq_exp" / "conf"


def test_a_link_to_the_checkout_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout(tmp_path / "checkout", "pyproject.toml", "conf/config.yaml", "loftq_exp/commands/run.py")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "loftq_exp").symlink_to(tmp_path / "checkout" / "loftq_exp")
    monkeypatch.setattr(command, "__file__", str(tmp_path / "site" / "loftq_exp" / "commands" / "run.py"))
    assert command.conf_dir() == tmp_path / "checkout" / "conf"


def test_an_editable_install_uses_the_checkouts_conf(tmp_path: Path) -> None:
    """Such an install is a .pth file that leads to the checkout, and hatchling leaves a stale copy of conf/ beside it."""
    site = tmp_path / "site"
    layout(site, "loftq_exp/conf/config.yaml")
    (site / "_loftq_exp.pth").write_text(f"{CHECKOUT}\n")
    packages = str(Path(pytest.__file__).parents[1])
    # -S: without the .pth files of this environment, which may hold an editable install of its own.
    show = f"import site, sys; site.addsitedir({str(site)!r}); sys.path.append({packages!r}); "
    show += "from loftq_exp.commands.run import conf_dir; print(conf_dir())"
    called = [sys.executable, "-I", "-S", "-c", show]
    shown = subprocess.run(called, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == str(CHECKOUT / "conf")


@pytest.mark.parametrize("conf", ["conf", "loftq_exp/conf", ""])
def test_the_current_folder_does_not_matter(
    cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, conf: str
) -> None:
    """Not even one with a conf/ of its own."""
    here = tmp_path / "elsewhere"
    layout(here, f"{conf}/config.yaml", "hydra/config.yaml")
    monkeypatch.chdir(here)
    assert "path: mistralai/Mistral-7B-v0.1" in cli("--cfg", "job", "model=mistral").out


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the checkout."""
    pytest.importorskip("hatchling", reason="the wheel is built without fetching its build backend")
    copy, out = tmp_path_factory.mktemp("copy") / "loftq", tmp_path_factory.mktemp("wheel")
    unwanted = shutil.ignore_patterns(
        ".venv", ".git", "outputs", "dist", "build", "*.egg-info", "__pycache__", ".*_cache"
    )
    shutil.copytree(CHECKOUT, copy, ignore=unwanted)
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        f"--wheel-dir={out}",
        ".",
    ]
    subprocess.run(build, cwd=copy, check=True)
    (built,) = out.glob("loftq_exp-*.whl")
    return built


@pytest.mark.slow
def test_the_wheel_holds_the_package_conf_and_licence(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in (CHECKOUT / "conf").rglob("*.yaml"):
        assert f"loftq_exp/conf/{path.relative_to(CHECKOUT / 'conf')}" in names
    for path in (CHECKOUT / "loftq_exp").rglob("*.py"):
        assert str(path.relative_to(CHECKOUT)) in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any(name.startswith(("tests/", "conf/", "outputs/")) for name in names)


@pytest.mark.slow
def test_an_installed_wheel_brings_its_own_conf(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", f"--target={site}", str(wheel)]
    subprocess.run(install, check=True)
    mistral = site / "loftq_exp" / "conf" / "model" / "mistral.yaml"
    mistral.write_text(mistral.read_text().replace("mistralai/", "from-the-wheel/"))

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, *arguments], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(site)},
                              capture_output=True, text=True, check=False)  # fmt: skip

    shown = run("-m", "loftq_exp", "--cfg", "job", "model=mistral")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "path: from-the-wheel/Mistral-7B-v0.1" in shown.stdout
    place = run("-c", "from loftq_exp.commands.run import conf_dir; print(conf_dir())").stdout.strip()
    assert place == str(site / "loftq_exp" / "conf")
    script = run(str(site / "bin" / "loftq-exp"), "run", "--help")
    assert (script.returncode, script.stderr) == (0, "")
    assert "model: bart, bart-large, " in script.stdout
    typo = run("-m", "loftq_exp", "model=mistrall")
    assert (typo.returncode, typo.stderr) == (
        1, "error: model=mistrall: there is no such choice; did you mean 'mistral'?\n",
    )  # fmt: skip
