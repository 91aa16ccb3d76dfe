"""horizon_study.py: areas, paired differences, intervals and verdicts by hand; runs that it plans."""

import json

import pytest

from experiments.studies import horizon_study as study
from tests.conftest import long, needs, tool


def write_runs(folder, values: dict) -> None:
    """Exported evaluations: {(algo, settings): {seed: returns at steps 0, 10, 20}}."""
    for (algo, settings), runs in values.items():
        for seed, returns in runs.items():
            path = folder / algo / settings / f"{seed}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = [f"{10 * i},{value}" for i, value in enumerate(returns)]
            path.write_text("\n".join(["step,return_mean", *lines]))


def test_areas_and_paired_differences(tmp_path):
    write_runs(tmp_path, {
        ("sac", "default"): {1: (0, 10, 20), 2: (0, 20, 40)},
        ("sac_ove", "horizon-5"): {1: (0, 30, 50), 2: (0, 30, 70)},
        ("sac_mve", "horizon-5"): {1: (0, 20, 40), 2: (0, 30, 50)},
        ("sac_mve", "horizon-5__members-2"): {1: (0, 99, 99)},
        ("sac_ove", "horizon-0__actor_horizon-3"): {1: (0, 60, 80), 2: (0, 70, 80)},
        ("sac_ove", "horizon-0__actor_horizon-3__actor_batch-256"): {1: (0, 98, 98)},
        ("sac_ove", "horizon-0__num_particles-2__actor_horizon-3"): {1: (0, 96, 96)},
        ("sac_ove", "horizon-5__actor_horizon-3"): {1: (0, 97, 97)},
    })  # fmt: skip
    curves, areas = study.read_areas(tmp_path)  # (0 + 30) / 4 + (30 + 50) / 4 = 27.5
    assert areas["sac_ove", 5] == {1: 27.5, 2: 32.5} and areas["sac_mve", 5] == {1: 20, 2: 27.5}
    assert areas["sac_ove", 0] == areas["sac_mve", 0] == {1: 10, 2: 20}
    assert not any(method == "sac_retrace" for method, _ in curves)
    assert study.paired(areas, [(1, ("sac_ove", 5)), (-1, ("sac_ove", 0))]) == [17.5, 12.5]
    assert study.paired(areas, [(1, ("sac_ove", 30)), (-1, ("sac_ove", 0))]) == []
    assert study.paired(areas, [(1, ("actor", 3)), (-1, ("actor", 0))]) == [40, 35]
    assert study.read_areas(tmp_path, "num_particles 2")[1]["actor", 3] == {1: 72}
    wider = study.read_areas(tmp_path, "members 2")[1]
    assert wider["sac_mve", 5] == {1: 74.25}


def test_settings_beside_the_horizon(tmp_path):
    write_runs(tmp_path, {
        ("sac", "gamma-0.95"): {1: (0, 2, 2)},
        ("sac_ove", "horizon-5__gamma-0.95"): {1: (0, 4, 4)},
        ("sac_ove", "horizon-5"): {1: (0, 8, 8)},
    })  # fmt: skip
    assert study.read_areas(tmp_path)[1] == {("sac_ove", 5): {1: 6}}
    areas = study.read_areas(tmp_path, "gamma 0.95")[1]
    assert areas == {("sac_ove", 0): {1: 1.5}, ("sac_ove", 5): {1: 3}}
    with pytest.raises(ValueError, match=r"gamma 0\.95"):
        study.read_areas(tmp_path, "gamma 0.9")


@pytest.mark.parametrize("rows", [(), (1,)])
def test_runs_without_evaluations(rows, tmp_path):
    write_runs(tmp_path, {("sac_ove", "horizon-1"): {1: rows}})
    with pytest.raises(
        ValueError, match=r"must have an evaluation after step 0|must be the evaluations of a run"
    ):
        study.read_areas(tmp_path)


@pytest.mark.parametrize(
    ("mean", "half", "expected"),
    [(3, 2, "above zero"), (-3, 2, "below zero"), (1, 3, "no difference beyond ε"), (1, 5, "undecided")],
)
def test_verdicts(mean, half, expected):
    assert study.verdict(mean, half, 4.0) == expected


@needs("scipy")
def test_interval_and_report(tmp_path):
    """Student's t with two degrees of freedom: 2 ± 4.3027 / √3; a verdict only where zero is outside."""
    assert study.interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 4.302653 / 3**0.5), rel=1e-5)
    near = {seed: (0, 100 + seed, 100 + seed) for seed in (1, 2, 3)}
    write_runs(tmp_path, {
        ("sac", "default"): {seed: (0, seed, seed) for seed in (1, 2, 3)},
        ("sac_ove", "horizon-1"): near,
        ("sac_mve", "horizon-1"): {1: (0, 90, 90), 2: (0, 110, 110), 3: (0, 100, 100)},
    })  # fmt: skip
    text = study.report(study.read_areas(tmp_path)[1])
    assert "| R1: a perfect model helps | OVE(1) − OVE(0) | 75 ± 0 | above zero |" in text
    assert "| OVE(1) − MVE(1) | 2 ± " in text and "| undecided |" in text and "ε = 4" in text


@needs("matplotlib")
def test_horizon_figure(tmp_path):
    write_runs(tmp_path / "Task", {("sac_ove", "horizon-1"): {1: (0, 1, 2), 2: (0, 2, 3)}})
    study.plot(study.read_areas(tmp_path / "Task")[0], "Task", tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5000


@needs("scipy")
def test_horizon_folders_side_by_side(tmp_path):
    """Each method is compared with the H = 0 of its own folder; one method in two folders is refused."""
    write_runs(tmp_path / "a" / "Task", {
        ("sac_mve", "horizon-0"): {1: (0, 1, 1), 2: (0, 3, 3)},
        ("sac_mve", "horizon-1"): {1: (0, 5, 5), 2: (0, 6, 6)},
    })  # fmt: skip
    write_runs(tmp_path / "b" / "Task", {
        ("sac", "default"): {1: (0, 10, 10), 2: (0, 20, 20)},
        ("sac_ove", "horizon-0__actor_horizon-1"): {1: (0, 30, 30), 2: (0, 40, 40)},
    })  # fmt: skip
    folders = [tmp_path / name / "Task" for name in "ab"]
    done = tool("studies.horizon_study", "plot", *folders)
    assert done.returncode == 0, done.stderr
    assert "| sac_mve | 2 ± 10 | 4 ± 5 |" in done.stdout and "| actor | 11 ± 48 | 26 ± 48 |" in done.stdout
    assert "| R5: short H helps the actor | ACTOR(1) − ACTOR(0) | 15 ± 0 | above zero |" in done.stdout
    done = tool("studies.horizon_study", "plot", folders[0], folders[0])
    assert done.returncode == 2 and "must have other methods than the folders before: sac_mve" in done.stderr


def test_flags_go_to_the_files_that_have_them(tmp_path):
    """A model's to sac_mve.py alone: the actor's runs are sac_ove.py's, H = 0 is sac.py's."""
    extra = ["--total-timesteps", "6000", "--model-lr", "1e-4"]
    jobs = study.jobs_of(["sac_mve", "actor"], [0, 3], "Pendulum-v1", ["1"], str(tmp_path), extra)
    flags = {job.algo: " ".join(job.command) for job in jobs}
    assert "--model-lr" in flags["sac_mve"] and "--actor-horizon 3" in flags["sac_ove"]
    assert not any("--model-lr" in flags[algo] for algo in ("sac", "sac_ove"))
    assert all(job.steps == 6000 for job in jobs) and len(jobs) == 3


@long
def test_horizon_study_plans_runs_and_skips(tmp_path):
    """H = 0 once per seed, through sac.py; a second call finds everything finished."""
    flags = ["run", "--runs-dir", tmp_path, "--seeds", "1", "--horizons", "0,1", "--methods", "sac_ove,actor"]
    flags += ["--env-id", "InvertedPendulum-v5", "--workers", 2, "--", "--total-timesteps", 150]
    flags += ["--learning-starts", 60, "--batch-size", 32, "--hidden", 16, "--eval-episodes", 1]
    flags += ["--num-particles", 2]  # means nothing to sac.py
    first, second = tool("studies.horizon_study", *flags), tool("studies.horizon_study", *flags)
    assert first.returncode == second.returncode == 0, first.stderr
    assert "3 runs, 3 complete, 0 failed" in first.stdout and "3 runs, 3 finished" in second.stdout
    records = [json.loads(path.read_text()) for path in tmp_path.glob("*/args.json")]
    found = {(r["algo"], *(r["args"].get(name) for name in ("horizon", "actor_horizon"))) for r in records}
    assert found == {("sac", None, None), ("sac_ove", 1, 0), ("sac_ove", 0, 1)}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["run", "--methods", "sac"], "--methods sac: must be of sac_mve, sac_ove, sac_retrace, actor"),
        (["run", "--horizons", "1,-2"], "--horizons -2: must be natural numbers"),
        (["run", "--seeds", ","], "--seeds: must not be empty"),
        (["run", "--workers", 0], "--workers 0: must be at least 1"),
        (["plot", "no/such/folder"], "no/such/folder: must hold <algorithm>/horizon-<H>/<seed>.csv"),
    ],
)
def test_horizon_study_mistakes(flags, expected):
    done = tool("studies.horizon_study", *flags)
    assert done.returncode == 2 and expected in done.stderr and len(done.stderr.splitlines()) == 1
