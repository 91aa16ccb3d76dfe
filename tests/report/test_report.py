"""The report and the claims: statistics against SciPy and known values, tables by hand, verdicts."""

import math
import shutil

import numpy as np
import pytest
from scipy import stats as scipy_stats

from experiments.bench import export, jobs
from experiments.report import claims, pictures, reading, seeds, stats, summary
from tests.conftest import ROOT, TINY, long, run, tool

rng = np.random.default_rng(0)


# ---------------------------------------------------------------- statistics


def test_contrast_of_two_groups_is_welchs():
    a, b = rng.normal(3, 1, 6), rng.normal(1, 4, 9)
    found = stats.contrast([(1, a), (-1, b)])
    interval = scipy_stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    assert found == pytest.approx((a.mean() - b.mean(), interval.low, interval.high))


def test_interval_of_a_mean_is_students():
    x = rng.normal(0, 1, 7)
    low, high = scipy_stats.t.interval(0.95, 6, x.mean(), scipy_stats.sem(x))
    assert stats.mean_interval(x) == pytest.approx((x.mean(), low, high))
    assert stats.mean_interval([2.0, 2.0]) == (2, 2, 2)
    mean, low, high = stats.mean_interval([5.0])
    assert mean == 5 and math.isnan(low) and math.isnan(high)


def covered(interval, truth: float, count: int) -> float:
    """Share of simulated intervals that contain the truth."""
    generator = np.random.default_rng(1)
    hits = [low <= truth <= high for _, low, high in (interval(generator) for _ in range(count))]
    return float(np.mean(hits))


def test_coverage_of_intervals_on_normal_data():
    """95 % ± 2: five seeds; two groups of unlike spread; a contrast of four; a bootstrap across tasks."""
    one = covered(lambda g: stats.mean_interval(g.normal(2, 3, 5)), 2, 4_000)
    two = covered(lambda g: stats.contrast([(1, g.normal(5, 1, 5)), (-1, g.normal(3, 4, 8))]), 2, 4_000)

    def four(g):
        groups = [g.normal(k, k, 6) for k in (1, 2, 3, 4)]
        return stats.contrast(list(zip((1, -1, -1, 1), groups, strict=True)))

    assert all(abs(found - 0.95) < 0.02 for found in (one, two, covered(four, 0, 4_000)))

    def tasks(seeds):
        middle = stats.interquartile_mean
        return lambda g: stats.bootstrapped(middle, [g.normal(1, 1, seeds) for _ in range(3)])

    assert abs(covered(tasks(30), 1, 600) - 0.95) < 0.02
    assert 0.87 < covered(tasks(stats.FEWEST), 1, 600) < 0.94  # the 0.90 of its docstring


def test_interquartile_mean_drops_a_quarter_on_each_side():
    assert stats.interquartile_mean(np.array([-100.0, 1, 2, 900])) == 1.5
    assert stats.interquartile_mean(np.arange(4.0), np.arange(4.0, 8.0)) == pytest.approx(3.5)
    middle, low, high = stats.bootstrapped(stats.interquartile_mean, [np.ones(5), np.ones(6)])
    assert (middle, low, high) == (1, 1, 1)
    assert math.isnan(stats.bootstrapped(stats.interquartile_mean, [np.ones(5), np.ones(4)])[1])


def test_bootstrap_stays_within_tasks():
    """Tasks at 0 and at 10: were they mixed, the mean would vary."""
    groups = [np.zeros(5), np.full(5, 10.0)]
    assert stats.bootstrapped(stats.interquartile_mean, groups) == (5, 5, 5)


def test_probability_of_improvement_is_mann_whitneys():
    x, y = [rng.normal(1, 1, 8), rng.normal(0, 1, 5)], [rng.normal(0, 1, 6), rng.normal(0, 1, 7)]
    expected = [
        scipy_stats.mannwhitneyu(a, b).statistic / (len(a) * len(b)) for a, b in zip(x, y, strict=True)
    ]
    chance, low, high = stats.improvement(x, y)
    assert chance == pytest.approx(np.mean(expected)) and low < chance < high
    assert stats.improvement([np.ones(5)], [np.ones(6)]) == (0.5, 0.5, 0.5)
    assert stats.improvement([np.full(5, 2.0)], [np.ones(6)]) == (1, 1, 1)
    assert stats.improvement([np.full(4, 2.0)], [np.ones(6)])[0] == 1
    assert math.isnan(stats.improvement([np.full(4, 2.0)], [np.ones(6)])[1])


def test_performance_profile_weighs_tasks_equally():
    found = stats.profile([np.array([0.0, 1.0]), np.array([0.5, 0.5, 0.5, 0.5])], [0.25, 0.75])
    assert found.tolist() == [0.75, 0.25]


def test_wilson_interval_of_a_share():
    """Published: 0 of 10 has [0, 0.2775], 5 of 5 has [0.5655, 1]."""
    assert stats.share_interval(0, 10) == pytest.approx((0, 0, 0.2775), abs=1e-4)
    assert stats.share_interval(5, 5) == pytest.approx((1, 0.5655, 1), abs=1e-4)


# ---------------------------------------------------------------- report


def exported(folder, method: str, seed: int, values: list[float], every: int = 100, task: str = "Hopper-v5"):
    """A file of evaluations at <folder>/suite/<task>/<algorithm>/<settings>/<seed>.csv."""
    path = folder / "suite" / task / method / f"{seed}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ["step,return_mean", *(f"{k * every},{value}" for k, value in enumerate(values))]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_figures_of_a_curve_by_hand():
    curve = reading.Curve("s", "t", "m", 1, np.array([0, 10, 30]), {"return_mean": np.array([0.0, 10, 10])})
    assert curve.final() == 10 and curve.area() == pytest.approx((50 + 200) / 30)
    assert curve.reaches(5) == 10 and curve.reaches(11) == math.inf
    steps, values = np.arange(30) * 10, np.arange(30.0)
    assert reading.Curve("s", "t", "m", 1, steps, {"return_mean": values}).final() == 24.5  # the last ten
    short = reading.Curve("s", "t", "m", 1, steps[:7], {"return_mean": values[:7]})
    assert short.final() == 5  # of seven the last three


def test_runs_of_unlike_length_are_compared_at_equal_steps(tmp_path):
    exported(tmp_path, "sac/default", 1, [0, 0, 0, 0, 100, 100])
    exported(tmp_path, "sac/default", 2, [0, 0, 0, 0])
    exported(tmp_path, "sac_mve/horizon-3", 1, [0, 10, 20, 30, 40])
    groups = reading.grouped(reading.read_all(None, tmp_path))
    (methods,) = groups.values()
    assert {m: [c.steps[-1] for c in curves] for m, curves in methods.items()} == {
        "sac": [300, 300], "sac_mve, horizon 3": [300]
    }  # fmt: skip
    text = summary.write_report(reading.read_all(None, tmp_path), tmp_path / "out")
    assert "### Hopper-v5, 300 steps" in text and "Runs of sac; sac_mve, horizon 3 went on;" in text
    assert "| sac | 2 | 0.0 ± 0.0 | [0, 0] | 0.0 ± 0.0 | (0 of 2) | (0 of 2) |" in text
    assert "| sac_mve, horizon 3 | 1 | 25 |  | 15 |" in text  # one seed has no interval
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "report.md", "suite_Hopper-v5.png", "suite_profile.png"
    }  # fmt: skip


def test_scores_across_tasks(tmp_path):
    """Normalised by what git has: the reference is 1, random 0; sac is what others are compared with."""
    for task, scale in reading.normalisers().items():
        for seed in range(1, 6):
            exported(tmp_path, "sac/default", seed, [scale["random"]] * 2, task=task)
            exported(tmp_path, "td3/default", seed, [scale["reference"]] * 2, task=task)
    exported(tmp_path, "mage/default", 1, [5.0, 5.0])  # on one task alone: in no score
    exported(tmp_path, "td3/default", 1, [5.0, 5.0], task="Unknown-v0")
    groups = reading.grouped(reading.read_all(None, tmp_path))
    tasks, found = summary.scores(groups, "suite")
    assert tasks == sorted(reading.normalisers()) and list(found) == ["sac", "td3"]
    table = summary.score_table(found).splitlines()
    assert table[2].startswith("| sac | 0.000 | [0, 0] |") and table[3].startswith(
        "| td3 | 1.000 | [1, 1] | 100%"
    )


def test_unlike_grids_end_at_the_same_step(tmp_path):
    """Two runs on one straight line, evaluated every 4 000 and every 5 000 steps: their areas are equal."""
    exported(tmp_path, "sac/default", 1, [0, 4, 8, 12, 16, 20], every=4_000)
    exported(tmp_path, "td3/default", 1, [0, 5, 10, 15], every=5_000)
    (methods,) = reading.grouped(reading.read_all(None, tmp_path)).values()
    (a,), (b,) = methods["sac"], methods["td3"]
    assert a.steps[-1] == b.steps[-1] == 15_000 and a.values["return_mean"][-1] == 15
    assert a.area() == pytest.approx(b.area())


def test_the_longer_of_two_runs_counts_and_the_page_says_so(tmp_path):
    """A short trial after a long run of the same settings and seed does not cut everything short."""
    long = reading.Curve("s", "t", "sac", 1, np.arange(5), {"return_mean": np.arange(5.0)})
    short = reading.Curve("s", "t", "sac", 1, np.arange(2), {"return_mean": np.zeros(2)})
    again = reading.Curve("s", "t", "sac", 1, np.arange(5), {"return_mean": np.ones(5)})
    for curves, kept in (([long, short], long), ([short, long], long), ([long, again], again)):
        ((counted,),) = reading.grouped(curves)["s", "t"].values()
        assert (counted.values["return_mean"] == kept.values["return_mean"]).all()
        text = summary.write_report(curves, tmp_path, pictures=False)
        assert "Left out, for another run of the same settings and seed: 1." in text


def test_page_names_what_is_missing(tmp_path):
    curve = reading.Curve("s", "t", "sac", 1, np.arange(5), {"return_mean": np.arange(5.0)})
    text = summary.write_report([curve], tmp_path, pictures=False, missing=["t__sac__2"])
    assert "1 of 2 runs are complete." in text and "- t__sac__2" in text
    assert "1 of 1 runs are complete." in summary.write_report([curve], tmp_path, pictures=False, missing=[])
    assert "complete" not in summary.write_report([curve], tmp_path, pictures=False)


@long
def test_export_of_a_suite_takes_its_runs_alone(tmp_path):
    """Of two complete runs the one that the suite asks for, whatever its threads, under its name."""
    mine = run("sac", tmp_path / "runs", "--gamma", 0.5, "--num-threads", 2)
    run("sac", tmp_path / "runs", "--gamma", 0.6)
    flags = " ".join(f"--{k} {v}" for k, v in TINY.items() if k not in ("env-id", "num-threads"))
    suite = tmp_path / "mine.toml"
    suite.write_text(
        '[[runs]]\nalgos = ["sac"]\nenv_ids = ["tests.tasks:Cliff-v0"]\nseeds = [1]\n'
        f'flags = "{flags} --gamma 0.5"\n'
    )
    assert export.of_suite(str(suite), tmp_path / "runs", tmp_path / "results") == 1
    (path,) = (tmp_path / "results").glob("*/*/*/*/*.csv")
    assert path.read_bytes() == (mine / "eval.csv").read_bytes()
    assert path.relative_to(tmp_path / "results").parts[:3] == ("mine", "tests.tasks-Cliff-v0", "sac")
    done = tool("bench.export", "quick", "--runs", tmp_path / "runs", "--results", tmp_path / "r")
    assert done.stdout.startswith("0 runs exported") and not (tmp_path / "r").exists()


def test_horizons_are_found(tmp_path):
    for horizon in (0, 3, 10):
        for seed in (1, 2):
            exported(tmp_path, f"sac_mve/horizon-{horizon}__gamma-0.9", seed, [horizon + seed] * 3)
    exported(tmp_path, "sac_ove/horizon-1", 1, [1, 1])
    (methods,) = reading.grouped(reading.read_all(None, tmp_path)).values()
    assert summary.horizons(methods) == {"sac_mve, gamma 0.9": {0: [1, 2], 3: [4, 5], 10: [11, 12]}}
    summary.write_report(reading.read_all(None, tmp_path), tmp_path / "out")
    assert (tmp_path / "out" / "suite_Hopper-v5_horizons.png").stat().st_size > 5_000


def test_no_method_is_left_out_of_the_curves(tmp_path, monkeypatch):
    """Twenty-one methods: a panel for each algorithm, a line for each method, horizons by number."""
    from matplotlib.axes import Axes

    for k in (0, 1, 3, 5, 10, 20, 30):
        for algo in ("sac_mve", "sac_ove", "sac_retrace"):
            exported(tmp_path, f"{algo}/horizon-{k}", 1, [0, k])
    (methods,) = reading.grouped(reading.read_all(None, tmp_path)).values()
    panels = summary.panels_of(methods)
    assert [list(panel)[-2:] for panel in panels] == [
        [f"{algo}, horizon 20", f"{algo}, horizon 30"] for algo in ("sac_mve", "sac_ove", "sac_retrace")
    ]
    lines, plot = [], Axes.plot
    monkeypatch.setattr(
        Axes, "plot", lambda self, *a, **k: (lines.append(k["label"]), plot(self, *a, **k))[1]
    )
    summary.plot_curves("task", methods, pictures.looks_of(methods), tmp_path / "a.png")
    assert len(lines) == 21 and len(set(lines)) == 21


def test_success_has_a_column(tmp_path):
    path = exported(tmp_path, "ddpg_mve_min/horizon-5", 1, [0, 0], task="TorqueBall-v0")
    path.write_text("step,return_mean,success_rate\n0,-50,0\n100,-20,0.5\n200,-10,1\n")
    text = summary.write_report(reading.read_all(None, tmp_path), tmp_path / "out", pictures=False)
    assert "| final success |" in text and "| ddpg_mve_min, horizon 5 | 1 | -10 |  | -25 | 1 |" in text


def test_report_of_real_runs(tmp_path):
    """Complete runs are read as they are; exported by name they give the same numbers."""
    folder = run("sac_mve", tmp_path / "runs", "--horizon", 2)
    broken = run("sac", tmp_path / "runs")
    (broken / "final.pt").unlink()  # not complete: left out
    flags = ["--runs", tmp_path / "runs", "--results", tmp_path / "results"]
    done = tool("report.summary", *flags, "--out", tmp_path / "a")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| sac_mve, horizon 2") == 1 and "| sac |" not in done.stdout
    done = tool("bench.export", "mine", *flags)
    assert done.stdout.startswith("1 runs exported")
    (path,) = (tmp_path / "results" / "mine").glob("*/*/*/*.csv")
    assert path.read_bytes() == (folder / "eval.csv").read_bytes()
    done = tool("report.summary", *flags, "--suites", "mine", "--out", tmp_path / "b")
    assert "## mine" in done.stdout and "## runs" not in done.stdout


def test_report_of_nothing(tmp_path):
    done = tool(
        "report.summary", "--runs", tmp_path / "no", "--results", tmp_path / "no", "--out", tmp_path / "out"
    )
    assert done.returncode == 0 and "No complete run was found." in done.stdout


@pytest.mark.parametrize(
    "content",
    ["", "step,return_mean\n", "a,b\n1,2\n", "step,return_mean\n0,x\n", "step,return_mean\n0,1\n0,2\n",
     "step,return_mean\n0,nan\n", "step,return_mean\n0\n"],
)  # fmt: skip
def test_damaged_file_is_named(content, tmp_path):
    path = exported(tmp_path, "sac/default", 1, [0])
    path.write_text(content)
    done = tool("report.summary", "--runs", tmp_path / "no", "--results", tmp_path, "--out", tmp_path / "out")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"error: {path}: must be the evaluations of a run")
    assert not (tmp_path / "out").exists()


def test_other_mistakes_are_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for flags, text in (
        (["--out", tmp_path / "file" / "out"], "file"),
        (["--random", "NoSuchTask-v0"], "--random NoSuchTask-v0: must be a task"),
    ):
        done = tool("report.summary", "--runs", tmp_path / "no", "--results", tmp_path / "no", *flags)
        assert done.returncode == 2 and text in done.stderr and len(done.stderr.splitlines()) == 1
    done = tool("bench.export", "../x", "--runs", tmp_path / "no")
    assert (done.returncode, done.stderr) == (
        2,
        "error: ../x: must be a name of letters, digits, _, . and -\n",
    )


def test_random_returns_are_what_git_has():
    """Within four standard errors; the InvertedPendulum's episodes are short enough to play here."""
    mean, error = summary.random_return("InvertedPendulum-v5", 100)
    assert abs(mean - reading.normalisers()["InvertedPendulum-v5"]["random"]) < 4 * error


# ---------------------------------------------------------------- claims


@pytest.mark.parametrize(
    ("low", "high", "expect", "verdict"),
    [
        (1, 2, "above", "holds"), (-2, -1, "above", "does not hold"), (-1, 1, "above", "undecided"),
        (1, 2, "below", "does not hold"), (-2, -1, "below", "holds"), (0, 1, "above", "undecided"),
        (-1, 2, "equal", "holds"), (2, 4, "equal", "undecided"), (4, 5, "equal", "does not hold"),
        (-9, 9, "equal", "undecided"), (-9, -4, "equal", "does not hold"),
        (math.nan, 1, "above", "undecided"),
    ],
)  # fmt: skip
def test_verdicts(low, high, expect, verdict):
    assert claims.judge(low, high, expect, margin=3 if expect == "equal" else 0) == verdict


def test_verdict_needs_five_seeds_and_an_interval_off_zero(tmp_path):
    for seed in range(1, 6):
        exported(tmp_path, "a/default", seed, [0, 10 + seed])
        exported(tmp_path, "b/default", seed, [0, seed])
    case = {"terms": [[1, "suite/Hopper-v5/a/default"], [-1, "suite/Hopper-v5/b/default"]], "metric": "final"}
    found = claims.decide(tmp_path, case)
    assert (found.verdict, found.seeds, found.estimate) == (
        "holds",
        5,
        10,
    ) and 0 < found.low < 10 < found.high
    assert claims.decide(tmp_path, case | {"expect": "below"}).verdict == "does not hold"
    assert claims.decide(tmp_path, case | {"expect": "equal", "margin": 30}).verdict == "holds"
    (tmp_path / "suite/Hopper-v5/b/default/5.csv").unlink()
    assert claims.decide(tmp_path, case).verdict == "too few seeds"
    shutil.rmtree(tmp_path / "suite/Hopper-v5/b")
    assert claims.decide(tmp_path, case).verdict == "not measured"


def test_steps_to_a_level_and_a_number_to_be_above(tmp_path):
    """Who never gets there counts as `never`; whole runs count, however long the others are."""
    for seed in range(1, 6):
        exported(tmp_path, "slow/default", seed, [0, 0, 0, 0, 0, 0, 5 if seed > 1 else 0])
        exported(tmp_path, "fast/default", seed, [0, 5])
    terms = [[1, "suite/Hopper-v5/slow/default"], [-3, "suite/Hopper-v5/fast/default"]]
    case = {"metric": "steps of return", "level": 5, "never": 800, "terms": terms}
    found = claims.decide(tmp_path, case)
    assert found.estimate == pytest.approx((4 * 600 + 800) / 5 - 300) and found.verdict == "holds"
    assert claims.decide(tmp_path, case | {"than": 600}).verdict == "does not hold"
    assert claims.decide(tmp_path, case | {"than": 600, "expect": "below"}).verdict == "holds"


def test_share_of_seeds(tmp_path):
    for seed in range(1, 9):
        exported(tmp_path, "a/default", seed, [0, 0, 1000 if seed < 8 else 0, 0])
    case = {"terms": [[1, "suite/Hopper-v5/a/default"]], "metric": "reaches", "level": 1000, "share": 0.5}
    found = claims.decide(tmp_path, case | {"before": 300})
    assert found.estimate == 7 / 8 and found.low > 0.5 and found.verdict == "holds"
    assert claims.decide(tmp_path, case | {"before": 200}).verdict == "does not hold"


def test_rows_of_a_table(tmp_path):
    (tmp_path / "t.csv").write_text(
        "m,seed,x\n" + "".join(f"{m},{s},{s * m}\n" for m in (1, 3) for s in range(1, 6))
    )
    case = {"metric": "table", "value": "x", "replicate": "seed"}
    case["terms"] = [[1, "t.csv", {"m": "3"}], [-1, "t.csv", {"m": "1"}]]
    assert claims.decide(tmp_path, case).estimate == 6
    with pytest.raises(ValueError, match=r"t\.csv, line 7: must have numbers in y"):
        claims.decide(tmp_path, case | {"value": "y"})


def test_share_of_a_tables_replicates(tmp_path):
    """99 of 100 worlds have a 1 in all their rows; Wilson's interval of it begins at 0.9455. Halves of two
    worlds are not one."""
    rows = "".join(f"{world},{int(world < 99 or row == 0)}\n" for world in range(100) for row in range(2))
    (tmp_path / "t.csv").write_text("world,holds\n" + rows)
    case = {"metric": "table", "value": "holds", "replicate": "world", "terms": [[1, "t.csv", {}]]}
    (tmp_path / "u.csv").write_text("world,holds\n" + rows.replace("98,1\n98,1\n", "98,1\n98,0\n"))
    assert claims.decide(tmp_path, case | {"terms": [[1, "u.csv", {}]], "share": 0.5}).estimate == 0.98
    found = claims.decide(tmp_path, case | {"share": 0.94})
    assert (found.estimate, found.seeds, found.verdict) == (0.99, 100, "holds")
    assert found.low == pytest.approx(0.9455, abs=1e-4)
    assert claims.decide(tmp_path, case | {"share": 0.95}).verdict == "undecided"


def test_a_claim_holds_if_all_its_cases_do():
    findings = {v: claims.Finding("", v, 5) for v in (claims.HOLDS, claims.FAILS, claims.OPEN, claims.NONE)}
    assert claims.overall([findings["holds"]] * 2) == "holds"
    assert claims.overall([findings["holds"], findings["does not hold"]]) == "does not hold"
    assert claims.overall([findings["holds"], findings["undecided"]]) == "undecided"
    assert claims.overall([findings["holds"], findings["not measured"]]) == "not measured"
    assert claims.overall([]) == "not measured"


def test_the_summary_counts_what_papers_say_and_what_was_looked_at():
    """Of four claims one is ours; of the papers' three two are judged. Too few seeds are no interval,
    and one that two claims rest on is one."""
    every = [{}, {"looked": "split"}, {"ours": True, "looked": "added"}, {}]
    verdicts = [claims.HOLDS, claims.OPEN, claims.FAILS, claims.FEW]
    said = "4 claims: 1 hold, 1 do not, 1 undecided, 1 with too few seeds, 0 not measured. "
    said += "The papers make 3 of them; 2 of these are judged, on five seeds or more."
    assert claims.summary(every, verdicts) == said
    cases = lambda name: {"cases": [{"terms": [[1, f"{name}/{k}"]]} for k in range(20)]}
    every = [claim | cases(name) for claim, name in zip(every, "aabc", strict=True)]  # two rest on the same
    findings = [[claims.Finding("", verdict, 5)] * 20 for verdict in verdicts]
    text = claims.caution(every, findings)
    assert "on 40 intervals, of which about 2 are" in text and "2 claims were added" in text
    assert claims.source_of({"source": "talk"}) == "talk"
    assert claims.source_of({"source": "talk", "looked": "split"}) == f"talk; {claims.LOOKED['split']}"


def test_claims_page_is_what_the_data_say():
    done = tool("report.claims", "--check")
    assert done.returncode == 0, done.stdout + done.stderr


def test_summary_goes_into_the_readme(tmp_path):
    (tmp_path / "README.md").write_text("a\n<!-- claims -->\nold\n<!-- end -->\nb\n")
    flags = ["--out", tmp_path / "claims.md", "--readme", tmp_path / "README.md", "--results", tmp_path]
    done = tool("report.claims", *flags)
    line = done.stdout.strip()
    assert (
        done.returncode == 0
        and line.endswith(" of these are judged, on five seeds or more.")
        and line in (tmp_path / "claims.md").read_text()
    )
    assert (tmp_path / "README.md").read_text() == f"a\n<!-- claims -->\n{line}\n<!-- end -->\nb\n"
    assert tool("report.claims", *flags, "--check").returncode == 0
    (tmp_path / "README.md").write_text("a\n")
    assert tool("report.claims", *flags, "--check").returncode == 2


def test_every_claim_names_a_suite_that_makes_its_data(tmp_path):
    """Every term that a suite of ours is to deliver is the place of one of its exported runs."""
    places: dict[str, set[str]] = {}
    for claim in claims.read_claims(ROOT / "docs" / "claims.toml")[1]:
        assert not claim.get("suite") or claim["suite"] in jobs.suite_names(), claim["id"]
        for case in claim.get("cases", []):
            for term in case["terms"]:
                suite = term[1].split("/")[0]
                if len(term) == 3:  # a table: what there is has such rows
                    path = ROOT / "docs" / "results" / term[1]
                    rows = claims.column_of(
                        path.parent, [0, path.name, term[2]], case["value"], case["replicate"]
                    )
                    assert rows or not path.exists(), (claim["id"], term)
                    continue
                if suite not in places:
                    planned = jobs.suite_jobs(suite, str(tmp_path), 1, [], fresh=True)[1]
                    places[suite] = {jobs.place_of(job) for job in planned}
                assert term[1].removeprefix(f"{suite}/") in places[suite], (claim["id"], term[1])


CASE = "[papers]\nx = 1\n[[claims]]\nid = 'A'\npaper = 'x'\nsource = ''\nstatement = ''\n[[claims.cases]]\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "[papers]\nx = 1\n[[claims]]\nid = 'A'\npaper = 'y'\nsource = ''\nstatement = ''\n",
            "paper y: must be one of x",
        ),
        ("[papers]\nx = 1\n[[claims]]\nid = 'A'\n", "must be given"),
        ("[papers]\nx = 1\n[[claims]]\nid = 'A'\nverdict = 'holds'\n", "verdict: must be one of"),
        (
            "[papers]\nx = 1\n[[claims]]\nid = 'A'\npaper = 'x'\nsource = ''\nstatement = ''\n"
            "[[claims.cases]]\nmetric = 'steps of success'\nlevel = 1\nterms = [[1, 'a/b/c/d']]\n",
            "never: must be given with metric = steps",
        ),
        ("[[claims", "must be valid TOML"),
        ("[papers]\nx = 1\n", "must have [papers] and [[claims]]"),
        (CASE + "metric = 'finale'\nterms = [[1, 'a/b/c/d']]\n", "metric finale: must be one of area, "),
        (
            CASE + "metric = 'table'\nvalue = 'x'\nreplicate = 's'\nterms = [[1, 'a.csv']]\n",
            "each of 3 parts",
        ),
        (CASE + "terms = [[1, 'a/b/c/d']]\nshare = 0.5\nexpect = 'equal'\nmargin = 1\n", "not of a share"),
        (CASE + "terms = [[1, 'a/b/c/d']]\nexpect = 'more'\n", "expect more: must be above, below or equal"),
        (
            "[papers]\nx = 1\n[[claims]]\nid = 'A'\npaper = 'x'\nsource = ''\nstatement = ''\n"
            "looked = 'twice'\n",
            "claim A: looked twice: must be one of added, cases, split",
        ),
    ],
)
def test_mistakes_in_claims(text, expected, tmp_path):
    (tmp_path / "claims.toml").write_text(text)
    readme = ["--readme", ROOT / "README.md"]
    done = tool(
        "report.claims", "--claims", tmp_path / "claims.toml", "--out", tmp_path / "claims.md", *readme
    )
    assert done.returncode == 2 and expected in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "claims.md").exists()


# ---------------------------------------------------------------- how many seeds


def test_seeds_that_a_case_needs(tmp_path):
    """Two groups of deviation 1 and difference d: Welch's interval of n seeds each excludes zero when
    d > t(2n − 2) √(2 / n), which is 1.46 at n = 5, 1.03 at 9, 0.85 at 12."""
    assert seeds.at([(1.0, [1, 2, 3]), (-1.0, [0, 1, 2])], 5) == pytest.approx((-0.4585, 2.4585), abs=1e-4)
    for name, shift in (("a", 0.0), ("near", 1.1), ("far", 5.0), ("twelve", 0.86), ("close", 0.1)):
        for seed, value in ((1, -1.0), (2, 0.0), (3, 1.0)):
            exported(tmp_path, f"sac/{name}", seed, [value + shift] * 3)
    case = lambda name: {"terms": [[1, f"suite/Hopper-v5/sac/{name}"], [-1, "suite/Hopper-v5/sac/a"]]}
    found = [seeds.needed(tmp_path, case(name)) for name in ("near", "far", "twelve", "close", "none")]
    assert found == [8, 5, 12, None, 5]
    share = {"terms": case("far")["terms"][:1], "share": 0.5, "metric": "reaches"}
    share |= {"level": 0.0, "before": 900}
    assert seeds.needed(tmp_path, share) == 5  # all get there: 5 of 5 is above one half, [0.57, 1]
    equal = case("far") | {"expect": "equal", "margin": 20.0}
    assert seeds.needed(tmp_path, equal) == 5


def test_the_open_claims_are_listed(capsys):
    assert seeds.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 20 and not any(line.startswith("| R0 ") for line in lines)
    assert any(line.startswith("| C4 | `ove-paper` |") and line.endswith("| 0 | 5? |") for line in lines)
    assert seeds.main(["--claims", "none.toml"]) == 2
