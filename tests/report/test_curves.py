"""curves.py: figures and tables of exported runs, scalars of TensorBoard as a table."""

import shutil

from experiments.bench import export
from tests.conftest import long, rows_of, run, scalars, tool


def test_settings_with_a_slash_are_one_folder(tmp_path):
    """A schedule is named after a task: its slash must not become a folder of its own."""
    run("sac_svg_h", tmp_path / "runs", "--schedule", "poplin/Swimmer-v0", "--init-alpha", 0.1)
    assert export.of_all(tmp_path / "runs", tmp_path / "out") == 1
    (place,) = (tmp_path / "out").rglob("*.csv")
    assert len(place.relative_to(tmp_path / "out").parts) == 4 and "poplin-Swimmer-v0" in place.parent.name
    folder = next((tmp_path / "out").iterdir())
    assert "sac_svg_h" in tool("report.curves", "plot", folder).stdout


def test_curves_of_several_folders_and_steps_to_a_level(tmp_path):
    """Task folders and single settings go together; the first step at the level, – where there is none."""
    for place, finals in (("a/T-v0/sac/default", (1, 5, 9)), ("b/T-v0/td3/tau-1", (1, 2, 3))):
        (tmp_path / place).mkdir(parents=True)
        lines = [f"{100 * k},{value},0" for k, value in enumerate(finals)]
        (tmp_path / place / "3.csv").write_text("\n".join(["step,return_mean,return_std", *lines, ""]))
    folders = (tmp_path / "a" / "T-v0", tmp_path / "b" / "T-v0" / "td3" / "tau-1")
    done = tool("report.curves", "plot", *folders, "--level", 5, "--out", tmp_path / "x.png")
    assert done.returncode == 0 and (tmp_path / "x.png").stat().st_size > 10_000
    lines = done.stdout.splitlines()
    assert lines[0] == "| method | seed 3 | mean |" and lines[2:4] == [
        "| sac | 9.0 | 9.0 |",
        "| td3, tau 1 | 3.0 | 3.0 |",
    ]
    assert lines[5:] == ["| steps to 5 | seed 3 | seeds there |", "|---|---|---|", "| sac | 100 | 1 of 1 |",
                         "| td3, tau 1 | – | 0 of 1 |"]  # fmt: skip
    done = tool("report.curves", "plot", folders[0], tmp_path / "a")
    assert done.returncode == 2 and done.stderr.endswith("sac, seed 3: must be of one run alone\n")
    (tmp_path / "a" / "U-v0").mkdir()
    shutil.copytree(folders[0] / "sac", tmp_path / "a" / "U-v0" / "sac")  # of another task, in one folder
    done = tool("report.curves", "plot", tmp_path / "a")
    assert done.returncode == 2 and done.stderr.endswith("sac, seed 3: must be of one run alone\n")
    done = tool("report.curves", "plot", folders[0], tmp_path / "none")
    assert (done.returncode, done.stderr) == (
        2,
        f"error: {tmp_path / 'none'}: must hold <algorithm>/<settings>/<seed>.csv\n",
    )


@long
def test_scalars_of_runs_are_a_table(tmp_path):
    """Values are TensorBoard's; runs that are not complete, or have no such tag, are left out."""
    first = run("sac_vaml", tmp_path / "runs")
    run("sac_vaml", tmp_path / "runs", "--seed", 2, "--model-loss", "mle")
    (run("sac_vaml", tmp_path / "runs", "--seed", 3) / "final.pt").unlink()
    run("sac", tmp_path / "runs")
    flags = ["scalars", tmp_path / "runs", "--csv", tmp_path / "a" / "x.csv", "--every", 1]
    tags = ["--tags", "model/nll,model/std", "--figure", tmp_path / "x.png"]
    done = tool("report.curves", *flags, *tags)
    assert done.returncode == 0, done.stderr
    rows, seen = rows_of(tmp_path / "a" / "x.csv"), scalars(first)
    assert {r["seed"] for r in rows} == {"1", "2"} and any("model_loss-mle" in r["settings"] for r in rows)
    mine = [(int(r["step"]), float(r["model/nll"])) for r in rows if r["seed"] == "1"]
    assert mine == [(event.step, event.value) for event in seen["model/nll"]]
    assert (tmp_path / "x.png").stat().st_size > 5_000
    (tmp_path / "file").write_text("")
    done = tool("report.curves", *flags, "--tags", "model/nll", "--csv", tmp_path / "file" / "x.csv")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "file" in done.stderr
    (tmp_path / "foreign" / "T__sac__1__x").mkdir(parents=True)
    for name, text in (("args.json", "{}"), ("final.pt", ""), ("eval.csv", "step,return_mean\n0,1\n")):
        (tmp_path / "foreign" / "T__sac__1__x" / name).write_text(text)
    for words in (["bench.export", "foreign"], ["report.summary", "--out", tmp_path / "out"]):
        done = tool(*words, "--runs", tmp_path / "foreign")
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
        assert "args.json: must be that of one of our runs" in done.stderr
    done = tool("report.curves", *flags, "--tags", "model/none")
    assert done.returncode == 2 and done.stderr.endswith("must have complete runs with model/none\n")
