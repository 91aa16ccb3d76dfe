"""steve_toy.py: the chain of Buckman et al. 2018 by hand, and what its figure says."""

import numpy as np
import pytest

from experiments.studies import steve_toy as toy
from tests.algos.test_steve import spread
from tests.conftest import rows_of, tool


def test_walk_pays_what_the_chain_pays():
    rng = np.random.default_rng(0)
    rewards, states = toy.walk(np.array([0, 98, 100]), 3, 0.0, rng)
    assert rewards[:, 0].tolist() == [-1, -2, -3, -4] and states[:, 0].tolist() == [1, 2, 3, 4]
    assert rewards[:, 1].tolist() == [-1, -2, 98, 98] and states[:, 1].tolist() == [99, 100, 101, 101]
    assert rewards[:, 2].tolist() == [100, 100, 100, 100]
    _, noisy = toy.walk(np.full(20_000, 50), 1, 0.1, rng)
    assert (noisy[0] == 51).all() and (noisy[1] != 52).mean() == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize("method", ["q", "q-ensemble", "mve-exact", "steve-exact"])
def test_true_values_stay(method):
    """V(s) = s is a fixed point of every exact target."""
    rng = np.random.default_rng(0)
    table = np.tile(np.append(np.arange(101.0), 0.0), (2, 8, 1))
    state = rng.integers(0, 101, (2, 8))
    assert np.allclose(toy.target(method, table, state, 5, rng), state)


def test_weighted_mean_of_the_toy():
    samples = np.array([spread(1, 1), spread(2, 0.5), spread(4, 0.25)])[..., None]
    assert toy.weighted(samples).item() == pytest.approx(3, abs=1e-6)


def test_toy_says_what_the_paper_says(tmp_path):
    """Claim S3 at 3 trials: exact models are fast, a noisy one ruins MVE and still helps STEVE."""
    flags = ["--trials", 3, "--every", 500, "--csv", tmp_path / "a.csv"]
    done = tool("studies.steve_toy", *flags)
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "a.csv")
    last = {m: np.mean([float(r["error"]) for r in rows if r["method"] == m and r["step"] == "10000"])
            for m in toy.METHODS}  # fmt: skip
    assert last["mve-exact"] < 1 and last["steve-exact"] < 1 and last["steve-noisy"] < 1
    assert last["mve-noisy"] > 1_000 > last["q"] > 1
    bad = tool("studies.steve_toy", *flags, "--horizon", 0)
    assert bad.returncode == 2 and bad.stderr == "error: --horizon 0: must be a whole number, at least 1\n"
