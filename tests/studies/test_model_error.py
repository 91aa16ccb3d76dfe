"""model_error.py: windows and splits of a replay, errors by hand, two models of a linear world."""

import csv
import importlib.util

import pytest
import torch

from experiments.studies import model_error
from tests.conftest import load, long, run, tool
from tests.tasks import A, B

SMALL = ["--horizon", 2, "--episodes", "2,4", "--seeds", "1,2", "--updates", 5, "--threads", 1]
SMALL += ["--recurrent-hidden", 8, "--ensemble-hidden", 8]
# Its replay is what is used: it hardly learns.
NINE_EPISODES = ["--env-id", "Pendulum-v1", "--total-timesteps", 1800, "--learning-starts", 1700]


def test_windows_stay_inside_episodes():
    """Rows are (obs, action, next obs): obs counts, the successor of the last step is its own."""

    def episode(first: float, length: int) -> torch.Tensor:
        obs = first + torch.arange(length)
        return torch.stack([obs, -obs, obs + 0.5], 1)

    found = model_error.windows([episode(0.0, 4), episode(10.0, 1), episode(20.0, 2)], [1, 1], 2)
    assert found.obs[:, :, 0].T.tolist() == [[0, 1, 1.5], [1, 2, 2.5], [2, 3, 3.5], [20, 21, 21.5]]
    assert found.action[:, :, 0].T.tolist() == [[0, -1], [-1, -2], [-2, -3], [-20, -21]]
    with pytest.raises(ValueError, match="--horizon 9"):
        model_error.windows([episode(0.0, 4)], [1, 1], 9)


def test_splits_share_no_episode():
    episodes = [torch.tensor([i]) for i in range(11)]
    test, pool = model_error.split(episodes)
    assert [e.item() for e in test] == [2, 7] and [e.item() for e in pool] == [0, 1, 3, 4, 5, 6, 8, 9, 10]


def test_errors_by_hand():
    """Predictions that stand still on x = 0, 1, 2: squared errors 1, 4 over the squared deviation 2."""
    data = model_error.Windows(torch.tensor([0.0, 1.0, 2.0])[:, None, None], torch.zeros(2, 1, 1))
    still = lambda obs, action: obs.expand(len(action), *obs.shape)
    assert model_error.errors(still, data, torch.tensor([2.0])) == [0.25, 1.0]


def test_both_models_learn_a_linear_world():
    """s' = 0.9 s + 0.5 a: after 300 updates both predict two steps to a few hundredths of a deviation."""
    from tqdm import tqdm

    torch.manual_seed(0)
    action = torch.rand(300, 1) * 2 - 1
    obs = [torch.zeros(1)]
    for a in action:
        obs.append(A * obs[-1] + B * a)
    obs = torch.stack(obs)
    data = model_error.windows([torch.cat([obs[:-1], action, obs[1:]], 1)], [1, 1], 2)
    for fit, name in ((model_error.fit_recurrent, "sac_svg_h"), (model_error.fit_ensemble, "sac_mve")):
        predict = fit(load(name), data, [1, 1], 32, 300, tqdm(disable=True))
        assert max(model_error.errors(predict, data, obs.std(0))) < 0.01, name


@long
def test_model_error_of_a_run_resumes(tmp_path):
    """Two sizes at once, and one after the other, give the same table; each split has every k."""
    folder, tables = run("sac", tmp_path, *NINE_EPISODES), []
    drawn = importlib.util.find_spec("matplotlib") is not None
    for number, goes in enumerate((["2,4"], ["2", "2,4"])):
        out = tmp_path / str(number) / "errors.csv"
        for sizes in goes:
            flags = ["--episodes", sizes, "--csv", out, *(["--figure", tmp_path / "e.png"] if drawn else [])]
            done = tool("studies.model_error", folder, *SMALL, *flags)
            assert done.returncode == 0, done.stderr
        tables.append(out.read_text())
    assert tables[0] == tables[1]
    rows = list(csv.DictReader(tables[0].splitlines()))
    keys = {(row["model"], row["episodes"], row["seed"], row["split"], row["k"]) for row in rows}
    assert len(keys) == len(rows) == 2 * 2 * 2 * 3 * 2
    assert "ensemble below recurrent on holdout" in done.stdout
    assert not drawn or (tmp_path / "e.png").stat().st_size > 5000
    done = tool("studies.model_error", folder, *SMALL, "--updates", 6, "--csv", out)
    assert done.returncode == 2 and "must be of this run and these settings" in done.stderr


@long
def test_model_error_mistakes(tmp_path):
    folder = run("sac", tmp_path, *NINE_EPISODES)
    (tmp_path / "other.csv").write_text("a,b")
    for flags, expected in (
        ([tmp_path, "--csv", tmp_path / "e.csv"], "must be a finished run with a readable final.pt"),
        ([folder, "--csv", tmp_path / "e.csv", "--episodes", "2,99"], "--episodes 2,99: must be from 2 to 7"),
        ([folder, "--csv", tmp_path / "other.csv"], "must be a table of this script"),
        (
            [folder, "--csv", tmp_path / "e.csv", "--updates", 0],
            "--updates 0: must be a whole number, at least 1",
        ),
    ):
        done = tool("studies.model_error", *flags)
        assert done.returncode == 2 and expected in done.stderr, done.stderr
        assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "e.csv").exists()


@pytest.mark.parametrize("name", ["sac", "svg", "dreamer", "pets", "sac_svg_h"])
def test_the_replay_of_every_kind_of_file_is_read(name, finished, tmp_path):
    """Whatever its critic takes, if it has one: rows of observation, action and what came after."""
    folder = finished(name, tmp_path)
    episodes, (n, m) = model_error.read_replay(folder)
    state = torch.load(folder / "final.pt", weights_only=True)
    rows = torch.cat(episodes)
    assert [n, m] == list(state["sizes"]) and rows.shape == (len(state["buffer"]["rows"]), 2 * n + m)
    assert torch.equal(rows[:, n + m :], state["buffer"]["rows"][:, n + m + 1 : -1])
