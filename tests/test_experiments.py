"""The studies measure what they say: errors known in closed form, areas, intervals, one-line mistakes."""

import csv
import importlib.util
import json
import re
import subprocess
import sys
import types

import numpy as np
import pytest
import torch

from tests.conftest import ROOT, load, long, run, scalars
from tests.tasks import RHO, A, B, Q
from tests.test_math import GAMMA, K, exact_critic, make_agent

sys.path.insert(0, str(ROOT / "experiments"))
errors, study = (
    load(f"{name}", ROOT / "experiments" / f"{name}.py") for name in ("target_error", "horizon_study")
)
mve, ove = load("sac_mve"), load("sac_ove")


def needs(name: str):
    """Skip a test where an extra is not installed."""
    return pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"needs {name}")


def experiment(name: str, *flags: object) -> subprocess.CompletedProcess:
    words = [sys.executable, ROOT / "experiments" / f"{name}.py", *map(str, flags)]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)


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
    assert found == pytest.approx({"bias": 4, "bias_se": 2, "variance": 20 / 3 - 0.5, "mse": 21 - 0.5})


@pytest.mark.parametrize(
    ("algo", "horizon"), [("sac_mve", 2), ("sac_mve", 0), ("sac_svg_h", 2), ("sac_ove", 2)]
)
def test_target_error_of_a_run(algo, horizon, tmp_path):
    """Every checkpoint, every h; a learned model is compared only where there is one."""
    folder = run(algo, tmp_path / "runs", "--env-id", "InvertedPendulum-v5", "--horizon", horizon)
    out = tmp_path / "new" / "errors.csv"
    flags = ["--horizon", 3, "--starts", 20, "--returns", 2, "--threads", 1, "--csv", out]
    drawn = importlib.util.find_spec("matplotlib") is not None
    done = experiment("target_error", folder, *flags, *(["--figure", tmp_path / "e.png"] if drawn else []))
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


def test_target_error_mistakes(finished, tmp_path):
    sac = finished("sac", tmp_path)
    for flags, expected in (
        ([tmp_path / "nothing"], "must be a run folder with a readable args.json"),
        ([sac], "must be a run of sac_mve, sac_svg_h, sac_ove, not sac"),
        ([sac, "--horizon", -1], "--horizon -1: must be at least 0"),
        ([sac, "--returns", 1], "--returns 1: must be at least 2"),
    ):
        done = experiment("target_error", *flags)
        assert done.returncode == 2 and expected in done.stderr and len(done.stderr.splitlines()) == 1


def test_target_error_writes_where_it_can_or_not_at_all(finished, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    done = experiment(
        "target_error", finished("sac_mve", tmp_path), "--csv", tmp_path / "file" / "errors.csv"
    )
    assert done.returncode == 2 and "must be a file that can be written" in done.stderr
    assert len(done.stderr.splitlines()) == 1


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
        ("sac_ove", "horizon-5__actor_horizon-3"): {1: (0, 97, 97)},
    })  # fmt: skip
    curves, areas = study.read_areas(tmp_path)
    assert areas["sac_ove", 5] == {"1": 40, "2": 50} and areas["sac_mve", 5] == {"1": 30, "2": 40}
    assert areas["sac_ove", 0] == areas["sac_mve", 0] == {"1": 15, "2": 30}
    assert not any(method == "sac_retrace" for method, _ in curves)
    assert study.paired(areas, [(1, ("sac_ove", 5)), (-1, ("sac_ove", 0))]) == [25, 20]
    assert study.paired(areas, [(1, ("sac_ove", 30)), (-1, ("sac_ove", 0))]) == []
    assert study.paired(areas, [(1, ("actor", 3)), (-1, ("actor", 0))]) == [55, 45]
    wider = study.read_areas(tmp_path, "members 2")[1]
    assert wider["sac_mve", 5] == {"1": 99}


def test_settings_beside_the_horizon(tmp_path):
    write_runs(tmp_path, {
        ("sac", "gamma-0.95"): {1: (0, 2, 2)},
        ("sac_ove", "horizon-5__gamma-0.95"): {1: (0, 4, 4)},
        ("sac_ove", "horizon-5"): {1: (0, 8, 8)},
    })  # fmt: skip
    assert study.read_areas(tmp_path)[1] == {("sac_ove", 5): {"1": 8}}
    areas = study.read_areas(tmp_path, "gamma 0.95")[1]
    assert areas == {("sac_ove", 0): {"1": 2}, ("sac_ove", 5): {"1": 4}}
    with pytest.raises(ValueError, match=r"gamma 0\.95"):
        study.read_areas(tmp_path, "gamma 0.9")


@pytest.mark.parametrize("rows", [(), (1,)])
def test_runs_without_evaluations(rows, tmp_path):
    write_runs(tmp_path, {("sac_ove", "horizon-1"): {1: rows}})
    with pytest.raises(ValueError, match="must have an evaluation after step 0"):
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
    assert "| R1: a perfect model helps | OVE(1) − OVE(0) | 100 ± 0 | above zero |" in text
    assert "| OVE(1) − MVE(1) | 2 ± " in text and "| undecided |" in text and "ε = 5" in text


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
    done = experiment("horizon_study", "plot", *folders)
    assert done.returncode == 0, done.stderr
    assert "| sac_mve | 2 ± " in done.stdout and "| actor | 15 ± " in done.stdout
    assert "| R5: short H helps the actor | ACTOR(1) − ACTOR(0) | 20 ± 0 | above zero |" in done.stdout
    done = experiment("horizon_study", "plot", folders[0], folders[0])
    assert done.returncode == 2 and "must have other methods than the folders before: sac_mve" in done.stderr


@long
def test_horizon_study_plans_runs_and_skips(tmp_path):
    """H = 0 once per seed, through sac.py; a second call finds everything finished."""
    flags = ["run", "--runs-dir", tmp_path, "--seeds", "1", "--horizons", "0,1", "--methods", "sac_ove,actor"]
    flags += ["--env-id", "InvertedPendulum-v5", "--workers", 2, "--", "--total-timesteps", 150]
    flags += ["--learning-starts", 60, "--batch-size", 32, "--hidden", 16, "--eval-episodes", 1]
    flags += ["--num-particles", 2]  # means nothing to sac.py
    first, second = experiment("horizon_study", *flags), experiment("horizon_study", *flags)
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
    done = experiment("horizon_study", *flags)
    assert done.returncode == 2 and expected in done.stderr and len(done.stderr.splitlines()) == 1


@long
def test_launch_speed_prints_three_figures():
    done = experiment("launch_speed", "--steps", 260, "--rounds", 1, "--jobs", 1, "--runs", 20)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert re.fullmatch(r"1 runs: one worker [\d.]+ s, two [\d.]+ s, throughput [\d.]+", lines[0])
    assert "the launcher's processor" in lines[1] and re.fullmatch(r"report of 20 runs: [\d.]+ s", lines[2])
    done = experiment("launch_speed", "--steps", 256)
    assert done.returncode == 2 and done.stderr == "error: --steps 256: must be at least 257\n"


@long
def test_mbpo_speed_prints_updates_and_floor():
    flags = ["--threads", 1, "--rounds", 1, "--repeats", 1]
    done = experiment("mbpo_speed", *flags, "--", "--rollout-batch", 50, "--hidden", 16, "--model-hidden", 8)
    assert done.returncode == 0, done.stderr
    sac, mbpo, ratio, fit, floor, share = map(float, done.stdout.splitlines()[1].split()[1:])
    assert min(sac, mbpo, fit, floor) > 0
    assert ratio == pytest.approx(mbpo / sac, rel=0.05) and share == pytest.approx(floor / fit, abs=0.05)
    for bad, text in (
        (["--rounds", 0], "--rounds 0: must be at least 1"),
        (["--env-id", "No-v0"], "No-v0: must be"),
    ):
        done = experiment("mbpo_speed", *flags, *bad)
        assert done.returncode == 2 and text in done.stderr and len(done.stderr.splitlines()) == 1


@long
def test_vaml_speed_prints_ratios():
    done = experiment("vaml_speed", "--threads", 1, "--samples", 1, 2, "--rounds", 1, "--repeats", 1)
    assert done.returncode == 0, done.stderr
    for line, samples in zip(done.stdout.splitlines()[1:], (1, 2), strict=True):
        _, n, mle, *rest = map(float, line.split())
        assert n == samples and all(x > 0 for x in rest)
        for cost, ratio in zip(rest[::2], rest[1::2], strict=True):
            assert ratio == pytest.approx(cost / mle, rel=0.05, abs=0.02)
    done = experiment("vaml_speed", "--samples", 0)
    assert done.returncode == 2 and done.stderr == "error: --samples 0: must be at least 1\n"


@long
def test_oracle_speed_prints_a_ratio():
    flags = ["--env-ids", "Hopper-v5,Ant-v5", "--threads", 1, "--rounds", 2, "--batch", 8, "--slopes", 4]
    done = experiment("oracle_speed", *flags)
    assert done.returncode == 0, done.stderr
    name, threads, *times = done.stdout.splitlines()[1].split()
    assert (name, threads) == ("Hopper-v5", "1") and len(times) == 4 and all(float(x) > 0 for x in times)
    assert done.stdout.splitlines()[2].split()[-1] == "nan"  # its torso turns freely
    for flags, expected in (
        (["--batch", 0], "--batch 0: must be at least 1"),
        (["--slopes", 9, "--batch", 8], "--slopes 9: must be in [1, 8], the batch"),
        (["--env-ids", "Pendulum-v1"], "must be a task that holds MuJoCo's model"),
        (["--env-ids", "HumanoidStandup-v5"], "must be tasks with batched formulas"),
    ):
        done = experiment("oracle_speed", *flags)
        assert done.returncode == 2 and expected in done.stderr and len(done.stderr.splitlines()) == 1


# ---------------------------------------------------------------- model_error.py


model_error = load("model_error", ROOT / "experiments" / "model_error.py")
SMALL = ["--horizon", 2, "--episodes", "2,4", "--seeds", "1,2", "--updates", 5, "--threads", 1]
SMALL += ["--recurrent-hidden", 8, "--ensemble-hidden", 8]


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
    folder, tables = run("sac", tmp_path, "--env-id", "Pendulum-v1", "--total-timesteps", 1800), []
    drawn = importlib.util.find_spec("matplotlib") is not None
    for number, goes in enumerate((["2,4"], ["2", "2,4"])):
        out = tmp_path / str(number) / "errors.csv"
        for sizes in goes:
            flags = ["--episodes", sizes, "--csv", out, *(["--figure", tmp_path / "e.png"] if drawn else [])]
            done = experiment("model_error", folder, *SMALL, *flags)
            assert done.returncode == 0, done.stderr
        tables.append(out.read_text())
    assert tables[0] == tables[1]
    rows = list(csv.DictReader(tables[0].splitlines()))
    keys = {(row["model"], row["episodes"], row["seed"], row["split"], row["k"]) for row in rows}
    assert len(keys) == len(rows) == 2 * 2 * 2 * 3 * 2
    assert "ensemble below recurrent on holdout" in done.stdout
    assert not drawn or (tmp_path / "e.png").stat().st_size > 5000
    done = experiment("model_error", folder, *SMALL, "--updates", 6, "--csv", out)
    assert done.returncode == 2 and "must be of this run and these settings" in done.stderr


@long
def test_model_error_mistakes(tmp_path):
    folder = run("sac", tmp_path, "--env-id", "Pendulum-v1", "--total-timesteps", 1800)
    (tmp_path / "other.csv").write_text("a,b")
    for flags, expected in (
        ([tmp_path, "--csv", tmp_path / "e.csv"], "must be a finished run with a readable final.pt"),
        ([folder, "--csv", tmp_path / "e.csv", "--episodes", "2,99"], "--episodes 2,99: must be from 2 to 7"),
        ([folder, "--csv", tmp_path / "other.csv"], "must be a table of this script"),
        ([folder, "--csv", tmp_path / "e.csv", "--updates", 0], "--updates 0: must be at least 1"),
    ):
        done = experiment("model_error", *flags)
        assert done.returncode == 2 and expected in done.stderr, done.stderr
        assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "e.csv").exists()


def test_settings_with_a_slash_are_one_folder(tmp_path):
    """A schedule is named after a task: its slash must not become a folder of its own."""
    run("sac_svg_h", tmp_path / "runs", "--schedule", "poplin/Swimmer-v0", "--init-alpha", 0.1)
    command = [sys.executable, ROOT / "experiments" / "curves.py"]
    subprocess.run([*command, "export", tmp_path / "runs", tmp_path / "out"], check=True, cwd=ROOT)
    (place,) = (tmp_path / "out").rglob("*.csv")
    assert len(place.relative_to(tmp_path / "out").parts) == 4 and "poplin-Swimmer-v0" in place.parent.name
    folder = next((tmp_path / "out").iterdir())
    done = subprocess.run([*command, "plot", folder], check=True, cwd=ROOT, capture_output=True, text=True)
    assert "sac_svg_h" in done.stdout


def test_curves_of_several_folders_and_steps_to_a_level(tmp_path):
    """Task folders and single settings go together; the first step at the level, – where there is none."""
    for place, finals in (("a/T-v0/sac/default", (1, 5, 9)), ("b/T-v0/td3/tau-1", (1, 2, 3))):
        (tmp_path / place).mkdir(parents=True)
        lines = [f"{100 * k},{value},0" for k, value in enumerate(finals)]
        (tmp_path / place / "3.csv").write_text("\n".join(["step,return_mean,return_std", *lines, ""]))
    folders = (tmp_path / "a" / "T-v0", tmp_path / "b" / "T-v0" / "td3" / "tau-1")
    done = experiment("curves", "plot", *folders, "--level", 5, "--out", tmp_path / "x.png")
    assert done.returncode == 0 and (tmp_path / "x.png").stat().st_size > 10_000
    lines = done.stdout.splitlines()
    assert lines[0] == "| method | seed 3 | mean |" and lines[2:4] == [
        "| sac | 9.0 | 9.0 |",
        "| td3, tau 1 | 3.0 | 3.0 |",
    ]
    assert lines[5:] == ["| steps to 5 | seed 3 | seeds there |", "|---|---|---|", "| sac | 100 | 1 of 1 |",
                         "| td3, tau 1 | – | 0 of 1 |"]  # fmt: skip
    done = experiment("curves", "plot", folders[0], tmp_path / "a")
    assert done.returncode == 2 and done.stderr.endswith("sac, seed 3: must not be in two folders\n")
    done = experiment("curves", "plot", folders[0], tmp_path / "none")
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
    done = experiment("curves", *flags, *tags)
    assert done.returncode == 0, done.stderr
    rows, seen = rows_of(tmp_path / "a" / "x.csv"), scalars(first)
    assert {r["seed"] for r in rows} == {"1", "2"} and any("model_loss-mle" in r["settings"] for r in rows)
    mine = [(int(r["step"]), float(r["model/nll"])) for r in rows if r["seed"] == "1"]
    assert mine == [(event.step, event.value) for event in seen["model/nll"]]
    assert (tmp_path / "x.png").stat().st_size > 5_000
    (tmp_path / "file").write_text("")
    done = experiment("curves", *flags, "--tags", "model/nll", "--csv", tmp_path / "file" / "x.csv")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "file" in done.stderr
    (tmp_path / "foreign" / "T__sac__1__x").mkdir(parents=True)
    for name, text in (("args.json", "{}"), ("final.pt", ""), ("eval.csv", "step,return_mean\n0,1\n")):
        (tmp_path / "foreign" / "T__sac__1__x" / name).write_text(text)
    for name, rest in (("curves", ["export", tmp_path / "foreign", tmp_path / "out"]),
                       ("report", ["--runs", tmp_path / "foreign", "--out", tmp_path / "out"])):  # fmt: skip
        done = experiment(name, *rest)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
        assert "args.json: must be that of one of our runs" in done.stderr
    done = experiment("curves", *flags, "--tags", "model/none")
    assert done.returncode == 2 and done.stderr.endswith("must have complete runs with model/none\n")


def rows_of(path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


COMPOUNDING = (
    "--tasks TorqueBall-v0 --transitions 1000 --updates 60 --members 2 --hidden 16 --horizon 6".split()
)
COMPOUNDING += "--seeds 1 --threads 1".split()


def test_compounding_error_resumes(tmp_path):
    """One row for each L and k; a table cut in the middle is completed to the same numbers."""
    done = experiment("compounding_error", *COMPOUNDING, "--csv", tmp_path / "a.csv")
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "a.csv")
    assert [(r["loss_steps"], int(r["k"])) for r in rows] == [(n, k) for n in "15" for k in range(1, 7)]
    assert all(float(r["error"]) > 0 and float(r["unexplained"]) > 0 for r in rows)
    assert "| TorqueBall-v0 | 5 |" in done.stdout
    lines = (tmp_path / "a.csv").read_text().splitlines(keepends=True)
    (tmp_path / "b.csv").write_text("".join(lines[:7]))
    assert experiment("compounding_error", *COMPOUNDING, "--csv", tmp_path / "b.csv").returncode == 0
    assert rows_of(tmp_path / "b.csv") == rows


def test_errors_of_a_drifting_model_compound():
    """A model that adds 0.1 to every dimension and step is off by 0.1 k, whatever the deviations: σ = 1."""
    module = load("compounding_error", ROOT / "experiments" / "compounding_error.py")
    minimum = load("ddpg_mve_min")
    model = minimum.DynamicsEnsemble(2, minimum.GoalTask(2, 1, 1, 9, [0], 0.0, False, []), 1, 4)
    model.layers[-1].weight.data.zero_(), model.layers[-1].bias.data.zero_()
    model.change.mean.fill_(0.1)
    obs = torch.zeros(1, 5, 4, 2) + torch.arange(4.0)[:, None]
    found = module.errors(model, obs, torch.zeros(1, 5, 3, 1))
    assert [e for e, _, _ in found] == pytest.approx([0.9, 1.8, 2.7], rel=1e-5)  # the truth moves by 1
    assert [u for _, _, u in found] == pytest.approx([0.9] * 3, rel=1e-5)
    obs = torch.cat([obs, obs[:, :2] + 100 * (torch.arange(4.0)[:, None] > 0)], 1)  # two of seven far off
    (error, median, _), *_ = module.errors(model, obs, torch.zeros(1, 7, 3, 1))
    assert median == pytest.approx(0.9, rel=1e-5)
    assert error == pytest.approx(((5 * 0.9**2 + 2 * 100.9**2) / 7) ** 0.5, rel=1e-5)


ARTIFICIAL = "--widths 8 --seeds 1,2 --transitions 300 --epochs 3 --threads 1".split()


@long
def test_artificial_worlds_resume(tmp_path):
    """Cells of two worlds, three losses and the truth; the first cell kept, the second comes out the same."""
    done = experiment("vaml_artificial", *ARTIFICIAL, "--csv", tmp_path / "a.csv")
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "a.csv")
    assert len(rows) == 2 * 2 * 5 and {r["c"] for r in rows} == {"1", "0.001", "0", "truth", "mean"}
    lines = (tmp_path / "a.csv").read_text().splitlines(keepends=True)
    (tmp_path / "b.csv").write_text("".join(lines[:11]))
    assert experiment("vaml_artificial", *ARTIFICIAL, "--csv", tmp_path / "b.csv").returncode == 0
    kept = rows_of(tmp_path / "b.csv")
    assert kept[:10] == rows[:10] and len(kept) == 20
    truth = [r for r in rows if r["c"] in ("truth", "mean")]
    for realizable in ("yes", "no"):  # the world is the same
        mine = [(r["c"], r["seed"]) for r in truth if r["realizable"] == realizable]
        assert mine == [("truth", "1"), ("truth", "2"), ("mean", "1"), ("mean", "2")]


def test_the_truth_looks_twice_as_bad_with_one_sample():
    """Property 6 in a random world: error of the world itself 2 v at n = 1, of its mean v."""
    module, vaml = load("vaml_artificial", ROOT / "experiments" / "vaml_artificial.py"), load("sac_vaml")
    torch.manual_seed(0)
    world = vaml.DeltaGaussian(1, 4, 2, 2, 16, low=-3.0, high=-1.0).requires_grad_(False)
    values = module.Values(vaml, 1).requires_grad_(False)
    module.xavier(world)
    data = module.live(world, 20_000)
    (truth,), (mean,) = (module.tested(vaml, world, values, data, still) for still in (False, True))
    assert truth["value_error_1"] / mean["value_error"] == pytest.approx(2, rel=0.05)
    assert truth["value_error"] / mean["value_error"] == pytest.approx(1 + 1 / 32, rel=0.05)
    assert mean["std"] == 0 and truth["std"] > 0.1


def test_stacked_fits_stop_member_by_member():
    """A member that has stopped leaves the stack with its best weights; the others go on as if it stayed."""
    module, vaml = load("vaml_artificial", ROOT / "experiments" / "vaml_artificial.py"), load("sac_vaml")
    torch.manual_seed(0)
    model = vaml.DeltaGaussian(2, 4, 2, 1, 8)
    values, data = module.Values(vaml, 1).requires_grad_(False), [torch.randn(1, 50, n) for n in (4, 2, 4)]
    scores = iter(
        [[3.0, 3.0], *([4.0, 3.0 - 0.1 * k] for k in range(1, 6)), *([2 - 0.1 * k] for k in range(20))]
    )
    original, seen = module.losses, []

    def losses(*args):
        loss = original(*args)
        if torch.is_grad_enabled():
            return loss
        seen.append([p.detach().clone() for p in args[1].parameters()])
        return torch.tensor(next(scores))

    module.losses = losses
    args = type("Args", (), {"epochs": 12, "samples": 2})
    owner, shares = torch.zeros(2, dtype=torch.long), torch.tensor([1.0, 0.0])
    stopped = module.fit(vaml, model, values, data, owner, shares, args, "test")
    module.losses = original
    assert stopped == [6, 12]  # patience 5 after the first epoch; the other improves to the end
    assert [len(s[0]) for s in seen] == [2] * 6 + [1] * 6 and model.members == 2
    for parameter, first, last in zip(model.parameters(), seen[0], seen[-1], strict=True):
        assert torch.equal(parameter[0], first[0]) and torch.equal(parameter[1], last[0])


def test_losses_of_a_stack_are_those_of_its_members():
    """(9) member by member, c = 1, 0.5, 0, at n = 1 000 (noise differs); what weighs 0 is not evaluated."""
    module, vaml = load("vaml_artificial", ROOT / "experiments" / "vaml_artificial.py"), load("sac_vaml")
    torch.manual_seed(0)
    model, values = vaml.DeltaGaussian(3, 4, 2, 1, 8), module.Values(vaml, 3)
    batch = [torch.randn(3, 20, n) for n in (4, 2, 4)]
    value, shares = values(batch[2]), torch.tensor([1.0, 0.5, 0.0])
    judges = module.chosen(values, torch.tensor([1, 2]))
    with torch.no_grad():
        found = module.losses(vaml, model, judges, [*batch, value], shares, 4_000)
        mean, log_std = model(*batch[:2])
        likely = vaml.likelihood_loss(batch[2] - batch[0], mean, log_std, model.varying)
        drawn = values(model.draw(*batch[:2], 4_000))
        aware = vaml.value_aware_loss(value, drawn)
        assert torch.allclose(found, shares * likely + (1 - shares) * aware, rtol=5e-2)
        assert torch.allclose(found[0], likely[0])
        broken = types.SimpleNamespace(likelihood_loss=None, value_aware_loss=vaml.value_aware_loss)
        zero = torch.zeros(3)
        assert torch.allclose(
            module.losses(broken, model, values, [*batch, value], zero, 4_000), aware, rtol=5e-2
        )
        broken = types.SimpleNamespace(likelihood_loss=vaml.likelihood_loss, value_aware_loss=None)
        assert torch.equal(module.losses(broken, model, None, [*batch, value], torch.ones(3), 4_000), likely)


FROZEN = (
    "--env-id Pendulum-v1 --seeds 1 --steps 400 --every 200 --learning-starts 100 --batch-size 16".split()
)
FROZEN += "--hidden 16 --fit-steps 5 --samples 2 --threads 1".split()


@long
def test_frozen_snapshots_resume(tmp_path):
    """SAC in stages, three fits at each; the run is that of one stage, to the bit; fits resume."""
    flags = [*FROZEN, "--runs-dir", tmp_path / "runs"]
    done = experiment("vaml_frozen", *flags, "--csv", tmp_path / "a.csv")
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "a.csv")
    assert [(r["step"], r["c"]) for r in rows] == [
        (s, c) for s in ("200", "400") for c in ("1", "0.001", "0")
    ]
    lines = (tmp_path / "a.csv").read_text().splitlines(keepends=True)
    (tmp_path / "b.csv").write_text("".join(lines[:3]))
    again = experiment("vaml_frozen", *flags, "--csv", tmp_path / "b.csv")
    assert again.returncode == 0 and rows_of(tmp_path / "b.csv") == rows
    known = {name: int(value) if value.isdigit() else value for name, value in rows[0].items()}
    args = types.SimpleNamespace(**known, seeds=[1], threads=1, runs_dir=tmp_path / "none", csv=None)
    assert load("vaml_frozen", ROOT / "experiments" / "vaml_frozen.py").measure(args, rows, None) == rows
    assert not args.runs_dir.exists()  # a seed that has all its rows is not run again
    other = experiment("vaml_frozen", *flags, "--hidden", 8, "--csv", tmp_path / "c.csv")
    assert other.returncode == 2 and "must not hold snapshots of other settings" in other.stderr
    sac = load("sac")
    (folder,) = [path for path in (tmp_path / "runs").iterdir() if path.name != "snapshots"]
    plain = "--env-id Pendulum-v1 --total-timesteps 400 --learning-starts 100 --batch-size 16 --hidden 16"
    plain += f" --num-threads 1 --eval-every 200 --device cpu --runs-dir {tmp_path / 'plain'}"
    whole = sac.train(sac.parse(plain.split()))
    a, b = (torch.load(path / "final.pt", weights_only=True)["agent"]["actor"] for path in (folder, whole))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("name", "flags", "text"),
    [
        ("compounding_error", ["--horizon", 0], "--horizon 0: must be at least 1"),
        ("compounding_error", ["--tasks", "NoSuchTask-v0"], "--tasks NoSuchTask-v0: must be a task"),
        ("compounding_error", ["--loss-steps", "60"], "must be at most 50 on TorqueBall-v0"),
        ("vaml_artificial", ["--transitions", 4], "--transitions 4: must be at least 5"),
        ("vaml_artificial", ["--widths", ""], "--widths: must be numbers of at least 1"),
        ("vaml_frozen", ["--every", 300, "--steps", 200], "--every 300: must be at most --steps 200"),
        ("vaml_frozen", ["--env-id", "NoSuchTask-v0"], "--env-id NoSuchTask-v0: must be"),
    ],
)
def test_mistakes_of_the_new_experiments(name, flags, text, tmp_path):
    base = {"compounding_error": COMPOUNDING, "vaml_artificial": ARTIFICIAL, "vaml_frozen": FROZEN}[name]
    runs = ["--runs-dir", tmp_path / "runs"] if name == "vaml_frozen" else []
    done = experiment(name, *base, *runs, "--csv", tmp_path / "a.csv", *flags)
    assert done.returncode == 2 and text in done.stderr.splitlines()[-1], done.stderr


@pytest.mark.parametrize("name", ["compounding_error", "vaml_artificial", "vaml_frozen"])
def test_foreign_tables_are_left_alone(name, tmp_path):
    base = {"compounding_error": COMPOUNDING, "vaml_artificial": ARTIFICIAL, "vaml_frozen": FROZEN}[name]
    runs = ["--runs-dir", tmp_path / "runs"] if name == "vaml_frozen" else []
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    done = experiment(name, *base, *runs, "--csv", tmp_path / "other.csv")
    assert done.returncode == 2 and "must be a table of this script, or not exist" in done.stderr
    assert (tmp_path / "other.csv").read_text() == "a,b\n1,2\n"
