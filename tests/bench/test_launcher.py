"""benchmark.sh: exact commands, parallel runs, resuming, skipping, and failures that are never swallowed."""

import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from experiments.bench import export, jobs, launch, options, work
from experiments.report.reading import read_all
from tests.conftest import ROOT, TINY, differing, long, run, sizes


def words(flags: dict) -> list[str]:
    """Flags for after the --, but for those that the launcher itself sets."""
    own = ("env-id", "num-threads")
    return [part for name, value in flags.items() if name not in own for part in (f"--{name}", str(value))]


EXTRA = words(TINY)
EXTRA_MODEL = words({name: value for name, value in sizes("sac_mve").items() if name not in TINY})


def start(*flags: object, root: Path = ROOT, cwd: Path | str = "/") -> subprocess.Popen:
    """./benchmark.sh with this interpreter."""
    environment = {**os.environ, "PYTHON": sys.executable}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(
        [root / "benchmark.sh", *map(str, flags)], env=environment, cwd=cwd, encoding="utf-8", **pipes
    )


def benchmark(*flags: object, **where) -> tuple[int, str, str]:
    process = start(*flags, **where)
    out, error = process.communicate(timeout=300)
    return process.returncode, out, error


def folders(parent) -> list:
    return sorted(path for path in parent.iterdir() if path.name != "logs")


def test_dry_run_prints_every_command_and_writes_nothing(tmp_path):
    lists = ["--algos", "sac,sac_mve", "--env-ids", "InvertedPendulum-v5,Hopper-v5", "--seeds", "1,2,3"]
    code, out, _ = benchmark(
        *lists, "--workers", 2, "--dry-run", "--runs-dir", tmp_path / "runs", "--", "--horizon", 3
    )
    assert code == 0
    commands = [shlex.split(line)[1:] for line in out.splitlines()[:-1]]
    assert len(commands) == 12 and out.splitlines()[-1] == "12 runs, 0 finished"
    for command in commands:
        assert command[0] == sys.executable
        assert command[1] in (str(ROOT / "algos" / "sac.py"), str(ROOT / "algos" / "sac_mve.py"))
        assert ("--horizon" in command) == command[1].endswith("mve.py")  # only to files that have it
    assert len({tuple(command) for command in commands}) == 12
    assert not (tmp_path / "runs").exists()


@long
def test_works_from_any_folder(tmp_path, monkeypatch):
    """A project whose path has umlauts and spaces, started elsewhere: tasks are found in both places and on
    PYTHONPATH, runs come where one stands, and a printed command does what it says."""
    root, here, more = tmp_path / "Füße & Köpfe", tmp_path / "wo ich stehe", tmp_path / "Päckchen"
    for name in ("algos", "experiments"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "benchmark.sh", root)
    for folder in (here, more):
        folder.mkdir()
    (here / "odd_tasks.py").write_text("import more_tasks")
    shutil.copy(ROOT / "tests" / "tasks.py", more / "more_tasks.py")
    monkeypatch.setenv("PYTHONPATH", str(more))
    flags = ["--algos", "sac", "--env-ids", "experiments.tasks:poplin/Hopper-v0,odd_tasks:Cliff-v0"]
    flags += ["--seeds", 1, "--runs-dir", "läufe"]
    extra = ["--", *EXTRA, "--eval-every", 300, "--env-kwargs", '{"max_episode_steps": 9}']
    code, out, _ = benchmark(*flags, "--dry-run", *extra, root=root, cwd=here)
    commands = [line.removeprefix("new ").strip() for line in out.splitlines()[:-1]]
    assert code == 0 and [shlex.split(command)[1] for command in commands] == [f"{root}/algos/sac.py"] * 2
    subprocess.run(commands[1], shell=True, cwd=here, check=True, capture_output=True)
    code, out, error = benchmark(*flags, *extra, root=root, cwd=here)
    assert code == 0, error
    assert [line.split()[0] for line in out.splitlines()[:2]] == ["new", "finished"]
    found = folders(here / "läufe")
    assert len(found) == 2 and all((folder / "final.pt").exists() for folder in found)
    assert (found[0] / "eval.csv").read_text().splitlines()[-1].split(",")[3] == "9.0"  # length_mean
    assert sorted(path.name for path in root.iterdir()) == ["algos", "benchmark.sh", "experiments"]


def test_a_console_without_umlauts(tmp_path, monkeypatch):
    """It shows question marks; nothing else happens."""
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    flags = ["--algos", "sac", "--seeds", 1, "--runs-dir", tmp_path / "läufe"]
    code, out, error = benchmark(*flags, "--dry-run")
    assert (code, error) == (0, "") and "l?ufe" in out
    code, _, error = benchmark(*flags, "--algos", "ö")
    assert code == 2 and error.startswith("error: --algos ?: must be of")


def test_env_kwargs_reach_the_runs_unharmed(tmp_path):
    """From a suite's flags, through a shell, in the names of files; and a run is found by them."""
    suite, kwargs = tmp_path / "mine.toml", '{"goal": "a/b", "speed": -1.5}'
    block = "[[runs]]\nalgos = ['sac']\nenv_ids = ['Pendulum-v1']\nseeds = [1]\n"
    suite.write_text(block + f'flags = """--env-kwargs \'{kwargs}\'"""\n')
    _, (job,) = jobs.suite_jobs(str(suite), str(tmp_path / "runs"), 1, [])
    assert job.wanted["env_kwargs"] == shlex.split(shlex.join(job.command))[-1] == kwargs
    assert job.log.name == "Pendulum-v1__sac__1__env-kwargs-goal-a-b-speed-1.5.log"
    assert jobs.place_of(job) == "Pendulum-v1/sac/env_kwargs-goal-a-b-speed--1.5"
    folder = tmp_path / "runs" / "Pendulum-v1__sac__1__20260101-000000-000000"
    folder.mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps({"algo": "sac", "args": job.wanted}))
    (folder / "checkpoint.pt").write_bytes(b"")
    for asked, state in ((kwargs, "resumed"), ('{"speed": -1.5}', "new")):
        flags = ["--env-kwargs", asked]
        (job,) = jobs.plan(["sac"], ["Pendulum-v1"], ["1"], str(tmp_path / "runs"), 1, flags)
        assert job.state == state


def test_runs_all_then_skips_all(tmp_path):
    """Two algorithms, two seeds, two workers; again: nothing to do; the results are those of single runs."""
    flags = ["--env-ids", "tests.tasks:Cliff-v0", "--seeds", "1,2,1", "--workers", 2]
    flags, extra = [*flags, "--runs-dir", tmp_path / "runs"], [*EXTRA, *EXTRA_MODEL]
    code, out, error = benchmark(*flags, "--", *extra)
    assert code == 0, error
    assert "4 runs, 4 complete, 0 failed" in out
    found = folders(tmp_path / "runs")
    assert len(found) == 4 and all((folder / "final.pt").exists() for folder in found)
    assert len(list((tmp_path / "runs" / "logs").glob("*.log"))) == 4
    alone = run("sac_mve", tmp_path / "alone", "--seed", 2)
    (same,) = [folder for folder in found if "__sac_mve__2__" in folder.name]
    assert differing(alone / "final.pt", same / "final.pt") == []

    code, out, _ = benchmark(*flags, "--", *extra)
    assert code == 0 and "4 runs, 4 finished" in out and out.count("finished  ") == 4
    assert folders(tmp_path / "runs") == found
    code, out, _ = benchmark(*flags, "--dry-run", "--", *extra, "--gamma", 0.9)
    assert code == 0 and out.count("new  ") == 4  # other arguments are another run


def test_stopped_benchmark_resumes_where_it_was(tmp_path):
    """SIGTERM in the middle stops the runs with their checkpoints; the same command finishes them exactly."""
    flags = [
        "--algos",
        "sac",
        "--env-ids",
        "tests.tasks:Cliff-v0",
        "--seeds",
        1,
        "--runs-dir",
        tmp_path / "runs",
    ]
    flags += ["--", *EXTRA, "--total-timesteps", 1500]
    process = start(*flags)
    while not list(tmp_path.glob("runs/*/checkpoint.previous.pt")):
        time.sleep(0.01)
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    (folder,) = folders(tmp_path / "runs")
    assert not (folder / "final.pt").exists()
    code, out, error = benchmark(*flags)
    assert code == 0, error
    assert out.startswith("resumed") and f"--resume {folder}" in out
    assert folders(tmp_path / "runs") == [folder]
    alone = run("sac", tmp_path / "alone", "--total-timesteps", 1500)
    assert differing(alone / "final.pt", folder / "final.pt") == []


def test_failed_run_among_good_ones_is_named(tmp_path):
    flags = ["--algos", "sac", "--env-ids", "tests.tasks:LateNan-v0,tests.tasks:Cliff-v0", "--seeds", 1]
    flags += ["--runs-dir", tmp_path / "runs", "--workers", 1, "--", *EXTRA, "--eval-every", 300]
    code, out, error = benchmark(*flags)
    assert code == 1
    assert "2 runs, 1 complete, 1 failed" in out
    (line,) = [line for line in error.splitlines() if line.startswith("failed: ")]
    assert "LateNan" in line and "must be finite in float32, got inf" in Path(line.split()[-1]).read_text()


@pytest.fixture
def launcher(monkeypatch, capsys):
    """main of the launcher in this process: its exit code, stdout and stderr."""

    def main(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["launch.py", *map(str, words)])
        try:
            code = launch.main()
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return main


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--algos", "sac,ppo"], "--algos ppo: must be of ddpg, "),
        (["--workers", 0], "--workers 0: must be a whole number, at least 1"),
        (["--seeds", "1,x"], "--seeds x: must be a whole number"),
        (["--seeds", ","], "must not be empty"),
        (["--", "--seed", 3], "--seed: must be given before the --, as --seeds"),
        (["--algos", "sac", "--", "--horizon", 3], "--horizon: must be a flag of at least one of sac"),
        (["--", "3"], "3: must be a flag"),
        (["--", "--gamma", 2], "--gamma 2.0: must be in [0, 1]"),
        (["--", "--batch-size", 2000], "--batch-size 2000: must be at most --learning-starts 1000"),
    ],
)
def test_mistake_is_one_line(flags, expected, tmp_path, launcher):
    code, out, error = launcher("--runs-dir", tmp_path / "runs", *flags)
    assert (code, out) == (2, "")
    assert len(error.strip().splitlines()) == 1 and error.startswith("error: ") and expected in error
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--horizon 3", "--horizon: must be given after --, as all flags of the algorithms"),
        ("--horizon=3 --seeds 1", "--horizon=3: must be given after --"),
        ("--env-id x", "--env-id: must be given before the --, as --env-ids"),
        ("--seed 1", "--seed: must be given before the --, as --seeds"),
        ("--resume x", "--resume: must be left out"),
        ("--work 1", "--work: must be given after --"),  # no abbreviations
        ("--seeds 1 sac", "sac: must be given after --"),
        ("-- --env-id x", "--env-id: must be given before the --, as --env-ids"),
        ("-- --env_id=x", "--env_id=x: must be given before the --, as --env-ids"),
        ("-- --runs-dir x", "--runs-dir: must be given before the --"),
        ("-- --num-threads 2", "--num-threads: must be given before the --"),
        ("-- --resume x", "--resume: must be left out"),
        *((f"-- --gamma 1 --{name} 1", f"--{name}: must be given before the --: it is an option of the")
          for name in ("algos", "env-ids", "seeds", "suite", "workers", "threads", "dry-run", "ray", "help")),
        *((f"--{name} {value}", f"--{name} {value}: must be a whole number, at least {low}")
          for name, low in (("workers", 1), ("num-threads", 1), ("threads", 1), ("retries", 0))
          for value in ("x", "-1", "1.5", "1e999")),
        ("--memory nan", "--memory nan: must be a number, at least 0"),
        ("--workers", "--workers: must be followed by a value"),
        ("--runs-dir --dry-run", "--runs-dir: must be followed by a value"),
        ("--dry-run=3", "--dry-run: ignored explicit argument '3'"),
        ("--num-threads 5000", "--num-threads 5000: must be in [1, 1024]"),
        ("--seeds 1,2.5", "--seeds 2.5: must be a whole number"),
        ("--seeds -1", "--seeds -1: must be in [0, "),
    ],
)  # fmt: skip
def test_what_is_given_wrongly_is_one_line(line, expected, launcher):
    """It says what to do instead: on the other side of the --, under another name, or not at all."""
    code, out, error = launcher(*line.split())
    assert (code, out) == (2, "") and error.startswith(f"error: {expected}") and error.count("\n") == 1


def test_paths_are_those_of_where_one_stands(launcher, tmp_path, monkeypatch):
    block = '[[runs]]\nalgos = ["sac"]\nenv_ids = ["Pendulum-v1"]\nseeds = [1]\n'
    (tmp_path / "süß.toml").write_text(f'about = "Füße"\n{block}', "utf-8")
    _, out, _ = launcher("--algos", "sac", "--seeds", 1, "--dry-run")
    runs = shlex.quote(str(ROOT / "runs"))
    assert f" algos/sac.py --env-id InvertedPendulum-v5 --seed 1 --runs-dir {runs} " in out
    monkeypatch.chdir(tmp_path)
    code, out, _ = launcher("--suite", "süß.toml", "--runs-dir", "läufe", "--dry-run")
    assert code == 0 and out.startswith("Füße\n")
    file, runs = (shlex.quote(str(path)) for path in (ROOT / "algos" / "sac.py", tmp_path / "läufe"))
    assert f" {file} --env-id" in out and f"--runs-dir {runs}" in out


def test_options_are_spelt_as_in_the_files(launcher):
    """Numbers as well: a seed that is written in two ways is one run."""
    for option in ("--num-threads", "--threads"):
        code, out, _ = launcher("--algos", "sac", "--seeds", "1_0,010,1e1,3", option, 3, "--dry-run")
        assert code == 0 and re.findall(r"--seed (\S+) .* --num-threads (\S+)", out) == [
            ("10", "3"),
            ("3", "3"),
        ]
    code, out, _ = launcher("--help")
    assert (
        code == 0
        and "--suite svg-table-2 --dry-run" in out
        and "--num-threads" in out
        and "--threads" not in out.replace("--num-threads", "")
    )


SUITES = sorted(path.stem for path in (ROOT / "experiments" / "bench" / "suites").glob("*.toml"))


@pytest.mark.parametrize("name", SUITES)
def test_every_suite_expands(name, tmp_path):
    """Each line parses as its file would; what it says of its cost counts the steps it really has."""
    about, planned = jobs.suite_jobs(name, str(tmp_path), 1, [], fresh=True)
    assert {job.state for job in planned} == {"new"} and len({tuple(job.command) for job in planned}) == len(
        planned
    )
    seeds = [job.wanted["seed"] for job in planned]
    assert seeds == sorted(seeds)  # comparisons grow evenly
    places = [(job.suite, jobs.place_of(job), job.wanted["seed"]) for job in planned]
    assert len(set(places)) == len(places)  # else one run's exported evaluations replace another's
    steps = sum(job.steps for job in planned)
    counted = f"{steps / 1e6:.0f} million steps" if steps >= 1e6 else f"{steps // 1000} thousand steps"
    assert f"expected cost: {counted}" in about


def test_published_runs_are_not_run_again(tmp_path):
    """What docs/results/<suite>/ has up to the last step is left alone, but with --fresh."""
    flags = ["--suite", "svg", "--runs-dir", tmp_path, "--dry-run"]
    _, out, _ = benchmark(*flags)
    _, fresh, _ = benchmark(*flags, "--fresh")
    states = [line.split()[0] for line in out.splitlines() if "svg_h" in line]
    assert states.count("published") >= 4 and len(states) == 16
    place = "docs/results/svg/experiments.tasks-poplin-Swimmer-v0/sac_svg_h"
    place += "/horizon-0__schedule-poplin-Swimmer-v0__init_alpha-0.1/3.csv"
    assert f"published {ROOT / place}" in out
    assert "published /" not in fresh and fresh.count("new  ") == 16
    _, other, _ = benchmark(*flags, "--", "--learning-starts", 3_000)
    assert "published /" not in other  # results are of the suite as it is


def test_a_suite_of_ones_own_is_nowhere_published(tmp_path):
    """Under the name of one of ours, too."""
    place = ROOT / "docs" / "results" / "svg" / "experiments.tasks-poplin-Swimmer-v0"
    assert place.is_dir()
    (tmp_path / "svg.toml").write_text((jobs.SUITES / "svg.toml").read_text())
    assert any(job.result for job in jobs.suite_jobs("svg", str(tmp_path), 1, [])[1])
    assert not any(job.result for job in jobs.suite_jobs(str(tmp_path / "svg.toml"), str(tmp_path), 1, [])[1])


def test_runs_that_a_report_would_take_for_one_are_refused(tmp_path):
    """A sweep of what is no setting in reports, or such a difference between two blocks."""
    suite = tmp_path / "mine.toml"
    block = '[[runs]]\nalgos = ["sac"]\nenv_ids = ["Pendulum-v1"]\nseeds = [1]\n'
    for text in (
        block + "learning_starts = [1000, 2000]\n",
        f'{block}flags = "--learning-starts 1_000"\n{block}flags = "--learning-starts 2_000"\n',
    ):
        suite.write_text(text)
        code, _, error = benchmark("--suite", suite, "--runs-dir", tmp_path / "runs", "--dry-run")
        assert code == 2 and "learning_starts 1000 and 2000: must be the same in runs that differ" in error
    suite.write_text(block + "gamma = [0.9, 0.99]\n")
    assert benchmark("--suite", suite, "--runs-dir", tmp_path / "runs", "--dry-run")[0] == 0


@pytest.mark.parametrize("record", ["[]", '{"algo": "sac", "args": []}', "3"])
def test_broken_records_are_no_runs(record, tmp_path):
    folder = tmp_path / "Pendulum-v1__sac__1__20260101-000000-000000"
    folder.mkdir()
    (folder / "args.json").write_text(record)
    (job,) = jobs.plan(["sac"], ["Pendulum-v1"], ["1"], str(tmp_path), 1, [])
    assert job.state == "new"


def test_spaces_after_commas(tmp_path):
    _, out, _ = benchmark("--env-ids", "Hopper-v5, Swimmer-v5", "--seeds", "1", "--algos", "sac", "--dry-run")
    assert "--env-id Swimmer-v5 " in out


def test_published_means_as_far_and_as_often(tmp_path, monkeypatch):
    """An export that ends earlier, or was evaluated at other steps, is not the run that is asked for."""
    flags = ["--total-timesteps", "4000", "--eval-every", "1000"]
    (job,) = jobs.plan(["sac"], ["Pendulum-v1"], ["1"], str(tmp_path / "runs"), 1, flags, "mine")
    monkeypatch.setattr(jobs, "RESULTS", tmp_path)
    path = tmp_path / "mine" / "Pendulum-v1" / "sac" / "default" / "1.csv"
    path.parent.mkdir(parents=True)
    cases = ((1000, 4000, path), (1000, 3000, None), (500, 4000, None), (1200, 4800, path))
    for every, last, expected in cases:
        rows = "".join(f"{step},0\n" for step in range(0, last + 1, every))
        path.write_text("step,return_mean\n" + rows)
        assert jobs.published(job) == expected


def test_array_of_the_slurm_recipe_has_every_run(tmp_path):
    """docs/cluster.md: as many array tasks as claims-cpu has lines."""
    _, planned = jobs.suite_jobs("claims-cpu", str(tmp_path), 1, [])
    assert f"#SBATCH --array=1-{len(planned)}\n" in (ROOT / "docs" / "cluster.md").read_text()


def test_foreign_args_json_is_not_a_run_of_ours(tmp_path):
    folder = tmp_path / "runs" / "Pendulum-v1__sac__1__20260101-000000-000000"
    folder.mkdir(parents=True)
    (folder / "args.json").write_text("{}")
    assert jobs.find_run(tmp_path / "runs", "sac", {}) is None


def test_what_cannot_be_resumed_is_not_resumed(finished, tmp_path):
    """A folder without a checkpoint is passed over; one of a version with other arguments is named, once."""
    runs = tmp_path / "runs"
    runs.mkdir()
    folder = finished("sac", runs)
    plan = lambda extra=EXTRA: jobs.plan(["sac"], [TINY["env-id"]], ["1"], str(runs), 1, extra)[0].state
    assert plan() == plan(EXTRA[:-2]) == "finished" and EXTRA[-2] == "--device"  # auto is where it ran
    (folder / "final.pt").unlink()
    assert plan() == "resumed"
    (folder / "checkpoint.pt").rename(folder / "checkpoint.previous.pt")  # killed between two renames
    assert plan() == "resumed"
    (folder / "checkpoint.previous.pt").unlink()
    assert plan() == "new"
    (folder / "checkpoint.pt").write_bytes(b"")
    assert plan() == "resumed"  # its file says what is wrong with it
    record = json.loads((folder / "args.json").read_text())
    del record["args"]["cuda_graphs"]  # as in checkpoints of format 1
    (folder / "args.json").write_text(json.dumps(record))
    flags = ["--algos", "sac", "--env-ids", TINY["env-id"], "--seeds", 1, "--runs-dir", runs, "--dry-run"]
    code, out, error = benchmark(*flags, "--", *EXTRA)
    assert code == 0 and out.startswith("new ") and len(error.splitlines()) == 1
    why = "is of another version of sac.py, which differs in cuda_graphs: neither resumed nor counted"
    assert error.strip() == f"{folder} {why}"
    (folder / "args.json").unlink()  # killed before its first checkpoint
    code, out, error = benchmark(*flags, "--", *EXTRA)
    assert code == 0 and out.startswith("new ") and not error
    assert (folder / "eval.csv").exists() and export.of_all(runs, tmp_path / "exported") == 0


def test_runs_of_a_task_by_its_old_name(tmp_path):
    """Found, resumed and exported as the task is called now."""
    old, new = (f"experiments.{name}:poplin/Hopper-v0" for name in ("suites", "tasks"))
    for env_id in (old, new):
        (job,) = jobs.plan(["sac"], [env_id], ["1"], str(tmp_path / "runs"), 1, [])
        assert job.name.startswith("experiments.tasks-poplin-Hopper-v0__sac__1") and job.state == "new"
    folder = tmp_path / "runs" / "experiments.suites-poplin-Hopper-v0__sac__1__20260101-000000-000000"
    folder.mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps({"algo": "sac", "args": job.wanted | {"env_id": old}}))
    (folder / "eval.csv").write_text("step,return_mean\n0,1\n9,2\n")
    (folder / "checkpoint.pt").write_bytes(b"")
    for env_id in (old, new):
        (job,) = jobs.plan(["sac"], [env_id], ["1"], str(tmp_path / "runs"), 1, [])
        assert job.state == "resumed" and job.command[-1] == str(folder)
    (folder / "final.pt").write_bytes(b"")
    assert export.of_all(tmp_path / "runs", tmp_path / "mine") == 1
    assert (tmp_path / "mine" / "experiments.tasks-poplin-Hopper-v0" / "sac" / "default" / "1.csv").exists()
    (curve,) = read_all(tmp_path / "runs", None)
    assert curve.task == "experiments.tasks-poplin-Hopper-v0"


def test_an_unfinished_run_hides_no_finished_one(tmp_path):
    """Of the same arguments on another number of threads, which matters to no result."""
    (job,) = jobs.plan(["sac"], ["Pendulum-v1"], ["1"], str(tmp_path), 1, [])
    for day, threads, names in (("01", 1, ("final.pt",)), ("02", 2, ())):
        folder = tmp_path / f"Pendulum-v1__sac__1__202601{day}-000000-000000"
        folder.mkdir()
        record = {"algo": "sac", "args": job.wanted | {"num_threads": threads}}
        (folder / "args.json").write_text(json.dumps(record))
        for name in names:
            (folder / name).write_bytes(b"")
    wanted = {name: value for name, value in job.wanted.items() if name not in export.ANYWHERE}
    assert "__20260101-" in jobs.find_run(tmp_path, "sac", wanted, any_version=True).name


def test_a_run_held_elsewhere_is_passed_over(tmp_path, monkeypatch):
    """One worker, two runs, the first of them held by another launcher: the second is done meanwhile."""
    (tmp_path / "logs").mkdir()
    planned = jobs.plan(["sac"], ["Pendulum-v1"], ["1", "2"], str(tmp_path), 1, [])
    done = []
    for job in planned:
        job.command = [sys.executable, "-c", "pass"]
    monkeypatch.setattr(work, "settle", lambda job, code, seconds: done.append((job.name, code)))
    lock = work.take_lock(work.lock_of(planned[0]))
    thread = threading.Thread(target=work.execute, args=(planned, 1))
    thread.start()
    for _ in range(300):
        if done:
            break
        time.sleep(0.1)
    meanwhile, waits = list(done), thread.is_alive()
    lock.close()  # before anything can fail: who waits for it must end
    thread.join(30)
    assert meanwhile == [(planned[1].name, 0)] and waits
    assert done == [(job.name, 0) for job in reversed(planned)] and not thread.is_alive()


def test_signs_do_not_share_a_log(tmp_path):
    flags = (["--target-entropy", value] for value in ("1", "-1"))
    names = [jobs.plan(["sac"], ["Pendulum-v1"], ["1"], str(tmp_path), 1, words)[0].name for words in flags]
    assert len(set(names)) == 2


def test_several_runs_on_a_gpu_without_mps_get_a_hint(tmp_path, monkeypatch, capsys):
    """One line where it is of use: a GPU, two or more runs at once that may use it, no daemon's answer."""

    def done(planned: list, *_, **__) -> None:
        for job in planned:
            work.settle(job, 0, 1.0)

    monkeypatch.setattr(launch, "execute", done)
    rest = [word for word in EXTRA if word not in ("--device", "cpu")]

    def said(
        workers: int, *flags: str, gpu: bool = True, mps: bool = False, seeds: str = "123", **more
    ) -> str:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        monkeypatch.setattr(launch, "mps_answers", lambda: mps)
        planned = jobs.plan(["sac"], ["Pendulum-v1"], list(seeds), str(tmp_path), 1, [*rest, *flags])
        assert (
            launch.carry_out(planned, str(tmp_path), workers, more.get("dry_run", False), more.get("run_all"))
            == 0
        )
        return capsys.readouterr().err

    assert re.fullmatch(r"hint: 2 runs will .*: nvidia-cuda-mps-control -d \(docs/gpu.md\)\n", said(2))
    assert said(5).startswith("hint: 3 runs ")
    assert said(1) == said(2, "--device", "cpu") == said(2, gpu=False) == said(2, mps=True) == ""
    assert said(2, seeds="1") == said(2, dry_run=True) == ""
    assert said(2, run_all=done) == ""


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("read word && test $word = get_server_list", True),
        ("cat >/dev/null; echo Cannot find MPS control daemon process; exit 1", False),
        ("cat >/dev/null; echo Cannot find MPS control daemon process", False),
        (None, False),
    ],
)
def test_mps_is_asked(script, expected, tmp_path, monkeypatch):
    if script:
        (tmp_path / "nvidia-cuda-mps-control").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "nvidia-cuda-mps-control").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert work.mps_answers() == expected


def test_suites_include_suites(tmp_path):
    """Blocks of both, each under the name of its own suite; a circle is refused."""
    block = '[[runs]]\nalgos = ["sac"]\nenv_ids = ["Pendulum-v1"]\nseeds = [1]\nflags = "--gamma {}"\n'
    inner, outer = tmp_path / "inner.toml", tmp_path / "outer.toml"
    inner.write_text(block.format(0.5))
    outer.write_text(f'include = ["{inner}"]\n' + block.format(0.6))
    _, out, _ = benchmark("--suite", outer, "--runs-dir", tmp_path / "runs", "--dry-run")
    assert re.findall(r"--gamma (\S+)", out) == ["0.5", "0.6"]
    assert [block["suite"] for block in jobs.read_suite(str(outer))[1]] == ["inner", "outer"]
    inner.write_text(f'include = ["{outer}"]\n')
    code, _, error = benchmark("--suite", outer, "--runs-dir", tmp_path / "runs", "--dry-run")
    assert code == 2 and "include: must not lead back to" in error


@long
def test_a_suite_ends_with_a_report(tmp_path):
    """Runs, table of outcomes, report of exactly these runs; the second time everything is there already."""
    suite = tmp_path / "mine.toml"
    flags = " ".join(EXTRA)
    suite.write_text(
        f'[[runs]]\nalgos = ["sac"]\nenv_ids = ["tests.tasks:Cliff-v0"]\nseeds = [1, 2]\nflags = "{flags}"\n'
    )
    run("sac", tmp_path / "runs", "--gamma", 0.5)  # of somebody else
    for _ in range(2):
        code, out, error = benchmark("--suite", suite, "--runs-dir", tmp_path / "runs")
        assert code == 0, error
        page = (tmp_path / "runs" / "report-mine" / "report.md").read_text()
        assert page in out and re.search(r"\| sac, [^|]+ \| 2 \|", page) and "gamma" not in page
        assert (tmp_path / "runs" / "report-mine" / "mine_tests.tasks-Cliff-v0.png").stat().st_size > 5_000
    assert out.count("finished  ") == 2


def test_time_limit_stops_in_time_and_the_same_line_goes_on(tmp_path, launcher, monkeypatch):
    """Of two runs one after the other the first is done, the second stopped by then: exit code 3."""
    codes, begun = [], time.monotonic()

    def play(job, stop, **options) -> int:  # instead of a run that learns
        sleeps = f"import time; time.sleep({0 if '__1__' in job.name else 600})"
        process = subprocess.Popen([sys.executable, "-c", sleeps])
        while process.poll() is None and not stop():
            time.sleep(0.05)
        work.end(process)
        codes.append(process.wait())
        return codes[-1]

    monkeypatch.setattr(work, "run_alone", play)
    for module in (launch, options):
        monkeypatch.setattr(module, "PATIENCE", 2.0)
    line = ["--algos", "sac", "--env-ids", "tests.tasks:Cliff-v0", "--seeds", "1,2", "--workers", 1]
    line += ["--runs-dir", tmp_path / "runs", "--time-limit"]
    code, out, error = launcher(*line, 5, "--", *EXTRA)
    assert code == 3 and codes == [0, -signal.SIGTERM] and time.monotonic() - begun < 5
    assert "2 runs, 1 complete, 0 failed, 1 left" in out
    assert error.endswith("the time is up; the same command goes on from the last checkpoints\n")
    code, _, error = launcher(*line, 2, "--", *EXTRA)
    assert (code, error) == (2, "error: --time-limit 2: must be a number, at least 3\n")


@long
def test_two_launchers_share_a_run(tmp_path):
    """Both are given the same run at once: one of them carries it out, the other waits and finds it done."""
    flags = ["--algos", "sac", "--env-ids", "tests.tasks:Cliff-v0", "--seeds", 1]
    flags += ["--runs-dir", tmp_path / "runs", "--", *EXTRA, "--total-timesteps", 1500]
    processes = [start(*flags) for _ in range(2)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    (folder,) = folders(tmp_path / "runs")
    assert (folder / "final.pt").exists()


def test_who_waits_for_another_launcher_can_be_stopped(tmp_path):
    """The lock of a run is held elsewhere: SIGTERM ends the one who waits, at once and without a run."""
    flags = ["--algos", "sac", "--env-ids", "tests.tasks:Cliff-v0", "--seeds", 1]
    flags += ["--runs-dir", tmp_path / "runs", "--", *EXTRA]
    (tmp_path / "runs" / "logs").mkdir(parents=True)
    (job,) = jobs.plan(["sac"], ["tests.tasks:Cliff-v0"], ["1"], str(tmp_path / "runs"), 1, EXTRA)
    with open(work.lock_of(job), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process, caught = start(*flags), 0
        while not caught >> signal.SIGTERM - 1 & 1:  # until it is about to run them
            assert process.poll() is None
            status = Path(f"/proc/{process.pid}/status").read_text()
            caught = int(re.search(r"SigCgt:\s*(\w+)", status).group(1), 16)
            time.sleep(0.1)
        time.sleep(1)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=10)
    assert process.returncode == 143 and folders(tmp_path / "runs") == []


def test_one_run_has_one_lock_however_it_is_written(tmp_path):
    """2_000 and 2e3 steps, a default that is spelt out, flags in another order: one run; another seed."""
    words = (["--total-timesteps", "2_000", "--gamma", "0.9"], ["--gamma", ".9", "--total-timesteps", "2e3"])
    words += ([*words[0], "--tau", "0.005"],)
    plans = [jobs.plan(["sac"], ["Pendulum-v1"], ["1", "2"], str(tmp_path), 1, flags) for flags in words]
    locks = [[work.lock_of(job) for job in plan] for plan in plans]
    assert locks[0] == locks[1] == locks[2] and locks[0][0] != locks[0][1]


def test_a_run_that_does_not_stop_is_killed(tmp_path, monkeypatch):
    """It ignores SIGTERM: the launcher waits for a while, not for ever."""
    monkeypatch.setattr(work, "PATIENCE", 0.5)
    (tmp_path / "logs").mkdir()
    (job,) = jobs.plan(["sac"], ["Pendulum-v1"], ["1"], str(tmp_path), 1, [])
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); "
    job.command = [sys.executable, "-c", deaf + "time.sleep(60)"]
    heard = lambda: job.log.exists() and job.log.read_text().endswith("\ndeaf\n")
    assert work.run_alone(job, heard) == -signal.SIGKILL


def test_without_fcntl(tmp_path, monkeypatch):
    """As on Windows: the launcher itself holds the lock, and asks for nothing that Popen has not there."""
    script = f"""
import subprocess, sys
sys.modules["fcntl"] = None
sys.path.insert(0, {str(ROOT)!r})
from experiments.bench import launch
class Popen(subprocess.Popen):
    def __init__(self, *words, **options):
        assert not {{"pass_fds", "preexec_fn"}} & options.keys()
        super().__init__(*words, **options)
subprocess.Popen = Popen
sys.exit(launch.main())"""
    flags = ["--algos", "sac", "--env-ids", "tests.tasks:Cliff-v0", "--seeds", 1]
    flags += ["--runs-dir", tmp_path / "runs", "--", *EXTRA]
    command = [sys.executable, "-c", script, *map(str, flags)]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "1 runs, 1 complete, 0 failed" in done.stdout, done.stderr

    monkeypatch.setattr(work, "fcntl", None)
    with work.take_lock(tmp_path / "a.lock"):
        assert work.take_lock(tmp_path / "a.lock") is None
    assert work.take_lock(tmp_path / "a.lock")


def test_logs_that_cannot_be_written_fail_their_runs_alone(tmp_path):
    """A folder where one log should be, another on a full device: both named, the third run complete."""
    runs_dir = tmp_path / "runs"
    seeds = ["1", "2", "3"]
    first, second, _ = jobs.plan(["sac"], ["tests.tasks:Cliff-v0"], seeds, str(runs_dir), 1, EXTRA)
    first.log.mkdir(parents=True)
    second.log.symlink_to("/dev/full")
    flags = ["--algos", "sac", "--env-ids", "tests.tasks:Cliff-v0", "--seeds", ",".join(seeds)]
    code, out, error = benchmark(*flags, "--runs-dir", runs_dir, "--", *EXTRA)
    assert code == 1 and "3 runs, 1 complete, 2 failed" in out and "Traceback" not in error
    assert f"{first.name}: [Errno 21] Is a directory" in out + error
    assert f"{second.name}: [Errno 28] No space left on device" in out + error


def test_runs_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    flags = ["--algos", "sac", "--env-ids", "tests.tasks:Cliff-v0", "--seeds", 1]
    code, _, error = benchmark(*flags, "--runs-dir", tmp_path / "file" / "runs", "--", *EXTRA)
    assert code == 2 and len(error.splitlines()) == 1
    assert error.startswith(f"error: --runs-dir {tmp_path}/file/runs: must be writable")


def test_suite_of_ones_own(tmp_path):
    """Blocks become the commands of their algorithms, tasks, seeds and flags; what follows -- joins them."""
    suite = tmp_path / "mine.toml"
    text = 'about = "mine"\n[[runs]]\nalgos = ["sac", "sac_mve"]\nenv_ids = ["Pendulum-v1"]\nseeds = [4]\n'
    suite.write_text(text + 'flags = "--horizon 2"\n')
    flags = ("--suite", suite, "--runs-dir", tmp_path / "runs", "--dry-run", "--", "--gamma", "0.5")
    _, out, _ = benchmark(*flags)
    lines = [
        line.split("/algos/")[1].replace("'", "") for line in out.splitlines() if line.startswith("new ")
    ]
    assert lines[0].startswith("sac.py --env-id Pendulum-v1 --seed 4") and "--horizon" not in lines[0]
    assert lines[1].startswith("sac_mve.py") and "--horizon 2 --gamma 0.5" in lines[1] and len(lines) == 2
    assert not (tmp_path / "runs").exists()


BLOCK = '[[runs]]\nalgos = ["sac"]\nenv_ids = ["Pendulum-v1"]\nseeds = [1]\n'


def test_a_block_sweeps_flags(tmp_path):
    """Once for every combination of their values; a file without the flag is run once."""
    suite = tmp_path / "mine.toml"
    block = '[[runs]]\nalgos = ["sac", "sac_mve"]\nenv_ids = ["Pendulum-v1"]\nseeds = [1, 2]\n'
    suite.write_text(block + 'flags = "--gamma 0.9"\nhorizon = [0, 3]\ntdk = [true, false]\n')
    _, planned = jobs.suite_jobs(str(suite), str(tmp_path / "runs"), 1, [])
    of = lambda job: (job.algo, job.wanted["seed"], job.wanted.get("horizon"), job.wanted.get("tdk"))
    found = [of(job) for job in planned]
    mve = [("sac_mve", seed, h, tdk) for seed in (1, 2) for h in (0, 3) for tdk in (True, False)]
    assert found == [("sac", 1, None, None), *mve[:4], ("sac", 2, None, None), *mve[4:]]
    assert {job.wanted["gamma"] for job in planned} == {0.9}
    suite.write_text(BLOCK + 'env_kwargs = ["{}", \'{"g": 9.8}\']\n')
    _, planned = jobs.suite_jobs(str(suite), str(tmp_path / "runs"), 1, [])
    assert [job.wanted["env_kwargs"] for job in planned] == ["{}", '{"g": 9.8}']


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[[runs]]\nalgos = [", "must be valid TOML"),
        ('about = "x"', "must have at least one block [[runs]]"),
        ('[[runs]]\nalgos = ["sac"]\nseeds = [1]', "env_ids: must be a list, not empty"),
        ('steps = 3\n[[runs]]\nalgos = ["sac"]', "steps: must be one of about, cost, include, runs"),
        ("runs = 3", "runs: must be blocks [[runs]]"),
        ('[[runs]]\nalgos = "sac"\nenv_ids = ["x"]\nseeds = [1]', "algos: must be a list, not empty"),
        (
            '[[runs]]\nalgos = ["sac"]\nenv_ids = ["x"]\nseeds = [1]\nflags = ["--a"]',
            "flags: must be a string",
        ),
        (BLOCK + "horizon = 3", "horizon: must be a list of a flag's values, not empty"),
        (BLOCK + "horizon = []", "horizon: must be a list of a flag's values, not empty"),
        (BLOCK + "tasks = [1]", "--tasks: must be a flag of at least one of sac"),
    ],
)
def test_bad_suites(text, expected, tmp_path):
    (tmp_path / "bad.toml").write_text(text)
    code, _, error = benchmark("--suite", tmp_path / "bad.toml", "--runs-dir", tmp_path / "runs")
    assert code == 2 and expected in error and len(error.splitlines()) == 1


def test_suite_mistakes(tmp_path):
    for flags, expected in (
        (["--suite", "nothing"], f"must be a .toml file or one of {SUITES[0]}"),
        (["--suite", SUITES[0], "--seeds", "1"], "must be alone"),
    ):
        code, _, error = benchmark(*flags, "--runs-dir", tmp_path / "runs")
        assert code == 2 and expected in error and not (tmp_path / "runs").exists()
