"""target_error.py measures what it says: errors and gradients that are known in closed form."""

import csv
import importlib.util
import json

import numpy as np
import pytest
import torch

from experiments.report.reading import name_of
from experiments.studies import target_error as errors
from tests.algos.test_math import GAMMA, K, exact_critic, make_agent
from tests.conftest import load, long, needs, run, tool
from tests.tasks import RHO, A, B, Q

mve, ove = load("sac_mve"), load("sac_ove")


class LinearAgent:
    """Policy a = −K s (in the task's units, with noise of deviation `std`), exact critics plus a bias."""

    def __init__(self, bias: float, std: float = 1e-6):
        self.log_alpha, self.bias, self.std = torch.tensor(-30.0), bias, std
        self.critic_target = lambda obs, action: torch.stack(
            [exact_critic(obs, 2 * action + 1, self.bias)] * 2
        )
        self.critic = torch.nn.Linear(2, 2)
        forward = self.critic.forward
        self.critic.forward = lambda obs, action: forward(torch.cat([obs, action], 1)).T

    def actor(self, obs):
        return ((-K * obs - 1) / 2).atanh(), torch.full_like(obs, self.std).log()


def lqr_starts(number: int):
    """States in reach of the policy, and a simulator of the linear-quadratic task."""
    env = ove.make_env("tests.tasks:LQR-v0")
    simulator, task, rows = ove.Simulator("tests.tasks:LQR-v0", env, 1), env.unwrapped, []
    obs = torch.linspace(-0.9, 0.9, number)[:, None]
    action = -K * obs
    next_obs = A * obs + B * action
    for value in next_obs:
        task.state = value.item()
        rows.append(simulator.row(task))
    reward = -(Q * obs**2 + RHO * action**2)[:, 0]
    tensors = (obs, (action - 1) / 2, reward, next_obs, torch.zeros(number))
    starts = errors.Starts(*tensors, np.array(rows), torch.arange(number))
    return simulator, starts


class Shifted(errors.SimulatorWithGradient):
    """A model that is wrong by 0.3 in every reward."""

    def step(self, action):
        obs, reward, done = super().step(action)
        return obs, reward + 0.3, done


def table(bias: float, learned, horizon: int = 4, number: int = 64, std: float = 1e-6, repeats: int = 2):
    torch.manual_seed(0)
    simulator, starts = lqr_starts(number)
    model = None if learned is None else learned(simulator)
    with torch.no_grad():
        rows = errors.compare(ove, LinearAgent(bias, std), model, simulator, starts, horizon, repeats, GAMMA)
    return {(row["error_of"], row["h"]): row for row in rows}


def test_perfect_model_has_no_error():
    rows = table(0.0, errors.SimulatorWithGradient)
    for h in range(5):
        row = rows["model - simulator", h]
        assert row["bias"] == row["variance"] == row["mse"] == row["state_error"] == 0
        assert row["cosine"] == pytest.approx(1)


class Formulas:
    """The linear system in PyTorch; with sign −1 actions push the other way."""

    sign = 1

    def __init__(self, simulator):
        pass

    def start(self, obs, rows, ended):
        self.obs = obs

    def step(self, action):
        before, units = self.obs, 2 * action + 1
        self.obs = A * before + self.sign * B * units
        reward = -(Q * before**2 + RHO * units**2)[:, 0]
        return self.obs, reward, torch.zeros(len(action))


class Mirrored(Formulas):
    sign = -1


def first_step(number: int = 64):
    """States of lqr_starts, the policy's action there, and (gradients by it of Q, of r + γ Q mirrored)."""
    obs = lqr_starts(number)[1].next_obs
    action = ((-K * obs - 1) / 2).requires_grad_()
    exact = exact_critic(obs, 2 * action + 1, 0.0)
    model = Mirrored(None)
    model.start(obs, None, None)
    after, reward, _ = model.step(action)
    mirrored = reward + GAMMA * exact_critic(after, -K * after, 0.0)
    return [torch.autograd.grad(value.sum(), action)[0] for value in (exact, mirrored)]


def test_action_gradients_of_a_perfect_model():
    """With an exact critic it is ∂Q/∂a for every h, by backpropagation and by differences alike."""
    rows, (exact, _) = table(0.0, Formulas), first_step()
    for h in range(5):
        model, simulator = rows["model - simulator", h], rows["simulator - returns", h]
        assert model["action_cosine"] == pytest.approx(1, abs=1e-3)
        assert model["action_norm"] == pytest.approx(simulator["action_norm"], rel=0.02)
        assert simulator["action_norm"] == pytest.approx(exact.square().mean().sqrt().item(), rel=0.02)


def test_action_gradient_of_a_wrong_model():
    """Actions that push the other way: from h = 1 on the gradient is another one, known in closed form."""
    rows, (exact, mirrored) = table(0.0, Mirrored), first_step()
    assert rows["model - simulator", 0]["action_cosine"] == pytest.approx(1)
    cosine = torch.cosine_similarity(exact[:, 0], mirrored[:, 0], dim=0).item()
    found = rows["model - simulator", 1]
    assert cosine < 0.9 and found["action_cosine"] == pytest.approx(cosine, abs=0.01)
    assert found["action_norm"] == pytest.approx(mirrored.square().mean().sqrt().item(), rel=0.01)


def test_bias_of_the_critic_is_discounted_once_per_step():
    """Critic + 2: the simulator's h-step target errs by 2 γ^(h+1) against the returns."""
    rows = table(2.0, None)
    assert set(rows) == {("simulator - returns", h) for h in range(5)}
    left = 2 * GAMMA ** (1 + np.ceil(np.log(0.01) / np.log(GAMMA)))  # the critic's share in the returns
    for h in range(5):
        row = rows["simulator - returns", h]
        assert row["bias"] == pytest.approx(2 * GAMMA ** (h + 1) - left, abs=1e-3)
        assert row["mse"] == pytest.approx(row["bias"] ** 2, abs=1e-3)


def test_error_of_the_model_adds_up():
    """Rewards wrong by 0.3: bias 0.3 Σ_{t<h} γ^(t+1), states right."""
    rows = table(0.0, Shifted)
    for h in range(5):
        row = rows["model - simulator", h]
        assert row["bias"] == pytest.approx(0.3 * sum(GAMMA ** (t + 1) for t in range(h)), abs=1e-4)
        assert row["state_error"] == 0


@long
def test_noise_of_the_returns_is_taken_out():
    """A noisy policy: the variance found does not depend on how many returns the reference is made of."""
    few, many = (table(0.0, None, 0, 400, 0.1, repeats)["simulator - returns", 0] for repeats in (2, 12))
    simulator, starts = lqr_starts(400)
    torch.manual_seed(1)
    with torch.no_grad():
        agent = LinearAgent(0.0, 0.1)
        noise = errors.soft_returns(ove, agent, simulator, starts, 4, GAMMA).var(0).mean().item()
    assert noise > 0.001
    left_in = noise * (1 / 2 - 1 / 12)  # by how much they would differ if it were not taken out
    for name in ("variance", "mse"):
        assert abs(few[name] - many[name]) < left_in / 2


def test_statistics_by_hand():
    """Errors 1, 3 in one episode, 5, 7 in another: mean 4; episode sums ∓4 -> se = √(32 · 2 / 1) / 4 = 2."""
    found = errors.statistics(torch.tensor([1.0, 3.0, 5.0, 7.0]), torch.tensor([2, 2, 5, 5]), 0.5)
    assert found == pytest.approx(
        {"bias": 4, "bias_se": 2, "variance": 20 / 3 - 0.5, "mse": 20.5, "rms": 20.5**0.5}
    )


@pytest.mark.parametrize(
    ("algo", "horizon"), [("sac_mve", 2), ("sac_mve", 0), ("sac_svg_h", 2), ("sac_ove", 2)]
)
def test_target_error_of_a_run(algo, horizon, tmp_path):
    """Every checkpoint, every h; a learned model is compared only where there is one."""
    folder = run(algo, tmp_path / "runs", "--env-id", "InvertedPendulum-v5", "--horizon", horizon)
    out = tmp_path / "new" / "errors.csv"
    flags = ["--horizon", 3, "--starts", 20, "--returns", 2, "--threads", 1, "--csv", out]
    drawn = importlib.util.find_spec("matplotlib") is not None
    done = tool("studies.target_error", folder, *flags, *(["--figure", tmp_path / "e.png"] if drawn else []))
    assert done.returncode == 0, done.stderr
    with open(out) as file:
        rows = list(csv.DictReader(file))
    steps = {torch.load(path, weights_only=True)["step"] for path in folder.glob("*.pt")}
    kinds = 3 if algo != "sac_ove" and horizon else 1
    assert len(rows) == len(steps) * 4 * kinds and {int(row["step"]) for row in rows} == steps
    assert all(np.isfinite(float(row[name])) for row in rows for name in ("bias", "variance", "mse"))
    slopes = [row for row in rows if row["error_of"] != "model - returns"]
    assert all(float(row["action_norm"]) > 0 for row in slopes)
    assert all(-1.001 <= float(row["action_cosine"]) <= 1.001 for row in slopes if "model" in row["error_of"])
    assert not drawn or (tmp_path / "e.png").stat().st_size > 5000


def test_recurrent_model_is_unrolled_as_by_its_own_agent():
    """The rollout that is measured is the actor's: same states, rewards, probabilities of an end, memory."""
    svg, (_, starts) = load("sac_svg_h"), lqr_starts(12)
    agent = make_agent("sac_svg_h", "--horizon", 3)
    with torch.no_grad():
        torch.manual_seed(3)
        expected = agent.unroll(starts.next_obs)
        torch.manual_seed(3)
        noise = [torch.randn_like(starts.action) for _ in range(4)]
        found = errors.roll_out(svg, agent, errors.LearnedRecurrence(agent), starts, torch.stack(noise))
    for name, values in expected._asdict().items():
        for a, b in zip(values, getattr(found, name), strict=True):
            assert torch.allclose(a, b, atol=1e-6), name


@needs("matplotlib")
def test_a_picture_of_a_task_without_plain_differences(tmp_path):
    """Where bodies turn freely the simulator has no gradient: five panels on a grid of six."""
    names = ("bias", "bias_se", "variance", "mse", "rms", "state_error", "cosine", "action_norm")
    rows = [{"step": 5, "h": h, "error_of": "model - simulator"} | dict.fromkeys(names, 0.5) for h in (0, 1)]
    errors.plot(rows, "Ant-v5", tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 5000


def test_runs_of_another_version_are_one_line(finished, tmp_path):
    mve = finished("sac_mve", tmp_path)
    record = json.loads((mve / "args.json").read_text())
    (mve / "args.json").write_text(json.dumps(record | {"args": record["args"] | {"gone": 1}}))
    done = tool("studies.target_error", mve)
    assert done.returncode == 2 and "must be a run of this version of sac_mve.py" in done.stderr
    wider = record["args"] | {"hidden": 2 * record["args"]["hidden"]}
    (mve / "args.json").write_text(json.dumps(record | {"args": wider}))
    done = tool("studies.target_error", mve, "--csv", tmp_path / "new" / "e.csv")
    assert done.returncode == 2 and "must be a run of this version of sac_mve.py" in done.stderr
    assert not (tmp_path / "new").exists() and done.stderr.count("\n") == 1


def test_target_error_mistakes(finished, tmp_path):
    sac, mve = finished("sac", tmp_path), finished("sac_mve", tmp_path)
    for flags, expected in (
        ([tmp_path / "nothing"], "must be a run folder with a readable args.json"),
        ([sac], "must be a run of sac_mve, sac_svg_h, sac_ove, not sac"),
        ([sac, "--horizon", -1], "--horizon -1: must be a whole number, at least 0"),
        ([sac, "--returns", 1], "--returns 1: must be a whole number, at least 2"),
        ([mve, sac], "must be a run of sac_mve, sac_svg_h, sac_ove, not sac"),
        ([mve, mve, "--figure", tmp_path / "e.png"], "e.png: must be of one run, not of 2"),
    ):
        done = tool("studies.target_error", *flags)
        assert done.returncode == 2 and expected in done.stderr and len(done.stderr.splitlines()) == 1


def test_target_error_of_several_runs(finished, tmp_path):
    """One table, whose rows say whose they are: task, file, settings and seed."""
    first = finished("sac_mve", tmp_path)
    second = run("sac_ove", tmp_path / "runs", "--env-id", "InvertedPendulum-v5", "--horizon", 2, "--seed", 7)
    flags = ["--horizon", 1, "--starts", 20, "--returns", 2, "--threads", 1, "--csv", tmp_path / "errors.csv"]
    done = tool("studies.target_error", first, second, *flags)
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "errors.csv") as file:
        rows = list(csv.DictReader(file))
    args = json.loads((first / "args.json").read_text())["args"]
    found = list(dict.fromkeys(tuple(row[name] for name in errors.RUN) for row in rows))
    mine, other = (name_of(algo, json.loads((path / "args.json").read_text())["args"])
                   for algo, path in (("sac_mve", first), ("sac_ove", second)))  # fmt: skip
    assert found == [(args["env_id"], "sac_mve", mine, str(args["seed"])),
                     ("InvertedPendulum-v5", "sac_ove", other, "7")]  # fmt: skip
    assert other.startswith("horizon-2")
    again = tool("studies.target_error", first, first)
    assert again.returncode == 2 and "must not be there twice" in again.stderr
    for row in rows:
        assert float(row["rms"]) == pytest.approx(max(float(row["mse"]), 0) ** 0.5)


def test_target_error_writes_where_it_can_or_not_at_all(finished, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    done = tool(
        "studies.target_error", finished("sac_mve", tmp_path), "--csv", tmp_path / "file" / "errors.csv"
    )
    assert done.returncode == 2 and "must be a file that can be written" in done.stderr
    assert len(done.stderr.splitlines()) == 1
