"""pilco_predictions.py: the table of trials, predictions beside real episodes, mistakes in one line."""

import importlib.util

import numpy as np
import pytest

from experiments.studies import pilco_predictions
from tests.conftest import long, rows_of, scalars, tool


@long
def test_predictions_beside_real_episodes(finished, tmp_path):
    """The table of trials is that of the replay; a figure where there is matplotlib; mistakes in one line."""
    folder = finished("pilco", tmp_path)
    flags = ["--trials", str(tmp_path / "trials.csv"), "--episodes", "3"]
    if importlib.util.find_spec("matplotlib"):
        flags += ["--figure", str(tmp_path / "figure.png")]
    for _ in range(2):  # a run's rows replace those that it has
        done = tool("studies.pilco_predictions", folder, *flags)
        assert done.returncode == 0, done.stderr
    shares, cost = done.stdout.splitlines()
    rows = rows_of(tmp_path / "trials.csv")
    returns = [event.value for event in scalars(folder)["charts/episodic_return"]]
    assert [float(row["return"]) for row in rows][: len(returns)] == pytest.approx(returns, abs=1e-3)
    assert sum(int(row["steps"]) for row in rows) == 300 and all(0 <= float(row["cost"]) <= 3 for row in rows)
    assert {row["success"] for row in rows} == {str(len(rows))}  # its rewards are never positive
    assert "3 episodes of 3 steps: s0 " in shares and cost.startswith("cost: predicted ")
    assert (tmp_path / "figure.png").exists() == ("--figure" in flags)
    (tmp_path / "other.csv").write_text("a,b\n")
    wrong = [(["--episodes", "0"], "--episodes 0: must be"), (["--names", "a,b"], "must be 1 names")]
    for words, text in (*wrong, (["--trials", tmp_path / "other.csv"], "must be a table of this script")):
        done = tool("studies.pilco_predictions", folder, *words)
        assert done.returncode == 2 and text in done.stderr and len(done.stderr.splitlines()) == 1


def test_share_within_two_deviations():
    real = np.array([[[0.0], [1.9]], [[2.1], [np.nan]]])
    assert pilco_predictions.within(real, np.zeros((2, 1)), np.ones((2, 1))) == pytest.approx([2 / 3])
