"""The documentation tells the truth: commands run, tables are the code's, links lead somewhere."""

import re
import shlex
from pathlib import Path

import pytest

from docs.arguments import arguments
from experiments.bench import launch
from tests.conftest import ALGOS, PARENTS, ROOT, learner, load, run, scalars, tool
from tests.conftest import sizes as tiny_sizes

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S)


def commands(start: str) -> list[tuple[str, str]]:
    """(page, command) for every line of a bash block, split at &&, that starts so."""
    lines = [(page.name, part.strip()) for page in PAGES for block in blocks(page, "bash")
             for line in block.splitlines() for part in line.split("&&")]  # fmt: skip
    return sorted({(page, line) for page, line in lines if line.startswith(start)})


def shrink(words: list[str], sizes: dict) -> list[str]:
    """The flags of a documented command, followed by tiny ones; the task stays."""
    sizes = sizes | {"total-timesteps": 100, "eval-every": 50, "eval-episodes": 1}
    return [*words, *(w for n, v in sizes.items() if n != "env-id" for w in (f"--{n}", str(v)))]


# A line that stands on several pages is run once.
@pytest.mark.parametrize(("line", "page"), {line: page for page, line in commands("python algos/")}.items())
def test_documented_runs_run(page, line, finished, tmp_path):
    words = shlex.split(line, comments=True)
    name = Path(words[1]).stem
    if name == "my_method":
        return  # built and run by test_make_it_yours
    module, sizes = load(name), tiny_sizes(name)
    if "--help" in words:
        with pytest.raises(SystemExit) as stop:
            module.parse(words[2:])
        assert stop.value.code == 0
    elif "--resume" in words:
        folder = finished(name, tmp_path)
        (folder / "final.pt").unlink()
        assert learner(name)(module.parse(["--resume", str(folder)])) == folder
    else:
        module.parse(words[2:])  # as it stands, too
        flags = [*shrink(words[2:], sizes), "--runs-dir", str(tmp_path)]
        assert (learner(name)(module.parse(flags)) / "final.pt").exists()


@pytest.mark.parametrize(("page", "line"), commands("./benchmark.sh"))
def test_documented_benchmarks_expand(page, line, monkeypatch, capsys):
    """--dry-run stands first: at the end, behind a comment or a --, it would be lost, and the suite run."""
    words = shlex.split(line.replace(",my_method", ""), comments=True)
    assert not set("$|<>;&") & set("".join(words))  # which a shell alone could read
    monkeypatch.setattr("sys.argv", [words[0], "--dry-run", *words[1:]])
    assert launch.main() == 0
    assert re.search(r"^[1-9]\d* runs, \d+ finished$", capsys.readouterr().out, re.M)


def test_make_it_yours(tmp_path):
    """The page's change, applied to a copy, runs, differs from its parent at H = 2 and is SAC at H = 0."""
    page = ROOT / "docs" / "make_it_yours.md"
    (old,), (new,) = blocks(page, "python replace"), blocks(page, "python with")
    source = (ROOT / "algos" / "sac_mve.py").read_text()
    assert source.count(old) == 1
    (tmp_path / "my_method.py").write_text(source.replace(old, new))
    load("my_method", tmp_path / "my_method.py")
    ends = {}
    for horizon in (0, 2):
        for name in ("sac_mve", "my_method"):
            flags = [*shrink(["--horizon", str(horizon)], tiny_sizes("sac_mve")), "--env-id", "Pendulum-v1"]
            run_dir = load(name).train(load(name).parse([*flags, "--runs-dir", str(tmp_path / name)]))
            assert f"__{name}__" in run_dir.name
            ends[horizon, name] = (run_dir / "eval.csv").read_text().splitlines()[-1].split(",")[1]
    assert ends[0, "sac_mve"] == ends[0, "my_method"]
    assert ends[2, "sac_mve"] != ends[2, "my_method"]
    run("sac_mve", tmp_path / "runs", "--horizon", 1)
    tool("bench.export", "mine", "--runs", tmp_path / "runs", "--results", tmp_path / "results")
    out = tool("report.curves", "plot", tmp_path / "results" / "mine" / "tests.tasks-Cliff-v0").stdout
    assert "| sac_mve, horizon 1" in out


def test_argument_tables_are_the_codes(algo):
    """Whatever Args says is on the page; a file's parents' groups may be linked instead."""
    page = (ROOT / "docs" / f"{algo}.md").read_text()
    parts = re.split(r"\n\n(?=\*\*)", arguments(algo))
    parent = PARENTS.get(algo, "sac")  # whose page holds what belongs to the loop
    inherited = re.split(r"\n\n(?=\*\*)", arguments("sac")) if algo != "sac" else []
    inherited += re.split(r"\n\n(?=\*\*)", arguments(parent))[:2] if algo in PARENTS else []
    for part in parts:
        assert part in page or part in inherited, part.splitlines()[0]


def test_every_metric_is_explained(algo, finished, tmp_path):
    """Each TensorBoard tag of a run is in the page of its file, of its parent or of sac.py."""
    text = "".join((ROOT / "docs" / f"{n}.md").read_text() for n in {algo, PARENTS.get(algo, algo), "sac"})
    for tag in scalars(finished(algo, tmp_path)):
        general = re.sub(r"(error|accuracy)_\d+", r"\1_k", tag)
        general = re.sub(r"(target_mean|weight|deviation)_\d+", r"\1_h", general)
        assert f"`{general}`" in text, tag


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_every_file_has_a_page_and_the_index_links_it():
    index = (ROOT / "docs" / "index.md").read_text()
    for name in ALGOS:
        assert f"({name}.md)" in index and f"docs/{name}.md" in (ROOT / "README.md").read_text()


def test_ci_runs_the_readmes_test_command():
    script = (ROOT / ".ci" / "run").read_text().replace("pip install -q", "pip install")
    (line,) = [
        line
        for block in blocks(ROOT / "README.md", "bash")
        for line in block.splitlines()
        if "pytest" in line
    ]
    assert line in script.splitlines()


def test_no_placeholder_is_left():
    for page in PAGES:
        assert not re.search(r"@[A-Z_]+@", page.read_text()), page.name
