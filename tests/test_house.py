"""The house of experiments: rooms import from those below them, and every command of the pages is its own."""

import ast
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import figures
from tests.conftest import LONG, ROOT

HOUSE = ROOT / "experiments"
ROOMS = "algorithms tasks suites report bench studies speed agents figures".split()  # from the ground up
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")]
FILES = sorted(HOUSE.rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Modules of experiments/ that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("experiments"):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if is_module(name) else node.module for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("experiments")}
    return found


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or path.is_dir()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(HOUSE)))
def test_imports_lead_down(path):
    """Into the file's own room or one below; nothing reaches a neighbour through sys.path."""
    room = path.relative_to(HOUSE).with_suffix("").parts[0]
    for name in imported(path):
        assert ROOMS.index(name.split(".")[1]) <= ROOMS.index(room), f"{path} imports {name}"
    if path.name not in ("watch.py", "pilco_predictions.py"):  # which find tasks of the user's own
        assert not re.search(r"sys\.path\s*(\+?=|\.(insert|append|extend))", path.read_text())


def test_no_two_files_import_each_other_in_a_circle():
    name_of = lambda path: ".".join(path.relative_to(ROOT).with_suffix("").parts)
    left = {name_of(path): imported(path) for path in FILES}
    while ready := [name for name, needs in left.items() if not needs & left.keys()]:
        for name in ready:
            del left[name]
    assert not left


def commands() -> list[tuple[str, str]]:
    """(page, command) of every tool on the pages and in the tools' own first lines."""
    found = []
    for path in [*PAGES, *FILES]:
        text = re.sub(r"\\+\n", " ", path.read_text())
        for line in re.findall(r"python -m experiments\.[^\n`&)]+", text):
            found.append((path.name, re.split(r"\s#|, which|: made|  +", line)[0].rstrip(".,:;\"'")))
    return sorted(set(found))


HELP: dict[tuple[str, ...], str] = {}


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")  # of tests beside this one
@pytest.mark.parametrize(("page", "line"), commands())
def test_every_command_is_one_of_the_house(page, line, monkeypatch, capsys):
    """The module is there and knows every flag before a --, which is for the algorithms."""
    module, *words = shlex.split(line.replace("..", "x"))[2:]
    words = words[: words.index("--")] if "--" in words else words
    key = (module, *words[:1]) if words and words[0] in ("plot", "run", "scalars") else (module,)
    if key not in HELP:
        monkeypatch.setattr(sys, "argv", [*key, "--help"])
        with pytest.raises(SystemExit) as end:
            runpy.run_module(module, run_name="__main__")
        assert end.value.code == 0
        HELP[key] = capsys.readouterr().out
    for flag in (word for word in words if word.startswith("--")):
        assert re.search(rf"{re.escape(flag.split('=')[0])}\b", HELP[key]), f"{page}: {line}"


def test_a_folder_of_the_users_own_has_the_same_name(tmp_path):
    """experiments/mine.py where they stand is found beside ours, whichever comes first on the path."""
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "mine.py").write_text("x = 3")
    for paths in ([tmp_path, ROOT], [ROOT, tmp_path]):
        script = f"import sys; sys.path[:0] = {[str(path) for path in paths]!r}; "
        script += "import experiments.tasks, experiments.mine; print(experiments.mine.x)"
        done = subprocess.run([sys.executable, "-c", script], cwd="/", capture_output=True, text=True)
        assert done.stdout == "3\n", done.stderr


# ---------------------------------------------------------------- figures


def test_every_figure_can_be_drawn_again_and_is_on_a_page():
    drawn = {*figures.PICTURES, *figures.BY_HAND}
    assert {path.name for path in figures.FIGURES.iterdir()} == drawn
    pages = "".join(path.read_text() for path in PAGES)
    assert {name for name in drawn if f"figures/{name}" not in pages} == set()


@pytest.mark.parametrize("name", sorted(figures.PICTURES) if LONG else ["areas_InvertedPendulum-v5.png"])
def test_figures_are_drawn(name, tmp_path, capsys):
    assert figures.main([name, "--out", str(tmp_path)]) == 0
    assert (tmp_path / name).stat().st_size > 5_000
    assert figures.main(["none.png", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: none.png: must be one of ")
