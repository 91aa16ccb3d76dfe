"""What a run does and leaves behind: determinism, evaluation, logs, learning."""

import json
import math
import subprocess

import numpy as np
import pytest
import torch

from tests.conftest import (
    ROOT,
    by_hand,
    differing,
    evaluations,
    family_of,
    load,
    long,
    run,
    scalars,
    shell,
    tiny,
)
from tests.tasks import RHO, A, B, Q


def test_same_seed_same_bits_other_seed_other_bits(algo, finished, tmp_path):
    first, again = finished(algo, tmp_path / "a"), run(algo, tmp_path / "b")
    other = run(algo, tmp_path / "c", "--seed", 4)
    assert evaluations(first) == evaluations(again)
    assert differing(first / "final.pt", again / "final.pt") == []
    part = "/agent/model" if algo == "pets" else "/agent/actor"
    assert any(part in name for name in differing(first / "final.pt", other / "final.pt"))


def test_how_often_one_looks_changes_nothing(stepwise, finished, tmp_path):
    """Other evaluation, logging, diagnosis and checkpoint intervals end in the same bits."""
    looks = ["--eval-every", 37, "--eval-episodes", 5, "--log-every", 10, "--checkpoint-every", 300]
    looks += ["--diagnose-every", 10] if "diagnose_every" in load(stepwise).Args.__dataclass_fields__ else []
    first, other = finished(stepwise, tmp_path / "a"), run(stepwise, tmp_path / "b", *looks)
    settings = ("/args/", "/rows/")
    assert differing(first / "final.pt", other / "final.pt", *settings) == []


def test_evaluation_is_a_pure_function_of_the_policy(stepwise):
    """Twice the same numbers, training's generator and task untouched, no exploration noise."""
    module = load(stepwise)
    args = module.parse(tiny(stepwise))
    agent = module.Agent(args, 1, 1, torch.device("cpu"))
    obs, rows, actions, before = np.ones(1, np.float32), [], [], torch.get_rng_state()
    for _ in range(2):
        if stepwise == "pets":  # its search draws: RunFolder.evaluate gives it a generator, seeded anew
            torch.manual_seed(0)
            before = None
        rows.append(module.evaluate(agent, args, 0, None))
        actions.append(agent.act(obs, deterministic=True))
    assert rows[0] == rows[1] and actions[0] == actions[1]
    assert before is None or torch.equal(before, torch.get_rng_state())
    assert rows[0]["return_std"] > 0  # different starts
    # pilco acts with its policy's mean, and so does poplin before there is a model to search in.
    explores = stepwise not in ("pilco", "poplin")
    assert (len({agent.act(obs).item() for _ in range(200)}) > 1) == explores
    if stepwise in family_of("sac"):
        mean = agent.actor(torch.ones(1, 1))[0]
        assert torch.tanh(mean).item() == agent.act(obs, deterministic=True).item()


def test_evaluation_returns_by_hand(step_loop):
    """The undiscounted return of a known policy, which acts in the task's own units."""
    module = load(step_loop)
    args = module.parse(tiny(step_loop, "--env-id", "tests.tasks:LQR-v0", "--eval-episodes", 3, "--seed", 7))

    class Linear:
        def act(self, obs, deterministic):
            assert deterministic
            return np.clip((-0.4 * obs + 1) / 2 - 1, -1, 1).astype(np.float32)  # a = −0.4 s in [−1, 3]

    generator, returns = np.random.default_rng(107), []
    for _ in range(3):
        state, total = generator.uniform(-2, 2), 0.0
        for _ in range(20):
            action = min(max(-0.4 * np.float32(state), -1), 3)
            total -= Q * state**2 + RHO * action**2
            state = A * state + B * action
        returns.append(total)
    row = module.evaluate(Linear(), args, 5, None)
    assert row["return_mean"] == pytest.approx(np.mean(returns), rel=1e-5)
    assert row["return_std"] == pytest.approx(np.std(returns), rel=1e-4)
    assert (row["step"], row["length_mean"], row["episodes"]) == (5, 20, 3)


def test_run_folder_is_complete(step_loop, tmp_path):
    done = shell(step_loop, *tiny(step_loop, "--runs-dir", tmp_path, "--total-timesteps", 310))
    assert done.returncode == 0, done.stderr
    (folder,) = tmp_path.iterdir()
    env_id, name, seed, _ = folder.name.split("__")
    assert (env_id, name, seed) == ("tests.tasks-Cliff-v0", step_loop, "1")
    lines = (folder / "eval.csv").read_text().splitlines()
    assert lines[0] == "step,return_mean,return_std,length_mean,episodes,seconds"
    assert [line.split(",")[0] for line in lines[1:]] == ["0", "100", "200", "300", "310"]
    for step in (0, 100, 200, 300, 310):  # printed as it goes
        assert f"step {step:>8}  evaluation return" in done.stdout
    assert str(folder) in done.stdout

    record = json.loads((folder / "args.json").read_text())
    module = load(step_loop)
    assert record["algo"] == step_loop
    assert set(record["args"]) == set(module.Args.__dataclass_fields__)
    assert record["args"]["total_timesteps"] == 310 and record["torch"] == torch.__version__
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    assert (record["git_commit"] or "").removesuffix("-dirty") == git.stdout.strip()

    saved = [
        torch.load(folder / f"{n}.pt", weights_only=True)
        for n in ("checkpoint", "checkpoint.previous", "final")
    ]
    assert saved[1]["step"] < saved[0]["step"] < saved[2]["step"] == 310
    assert list(folder.glob("*.tmp")) == list(folder.glob("*.new*")) == []

    tags = scalars(folder)
    expected = {"charts/episodic_return", "charts/episodic_length", "charts/SPS", "eval/episodic_return"}
    names = {"pilco": ["predicted_cost", "real_cost"], "pets": ["model_loss"], "poplin": ["model_loss"]}.get(
        step_loop, ["qf_loss", "qf_values", "actor_loss"]
    )
    names = ["surrogate", "kl"] if step_loop == "me_trpo" else names
    names += ["alpha", "alpha_loss", "entropy"] if step_loop in family_of("sac") else []
    expected |= {f"losses/{name}" for name in names}
    if step_loop == "sac_mve":
        expected |= {f"model/error_{k}" for k in (1, 2, 3)} | {f"expansion/target_mean_{h}" for h in range(4)}
        expected |= {"model/loss", "model/reward_error", "model/termination_accuracy"}
        expected |= {"expansion/spread_over_horizons", "model/termination_loss"}
    assert expected <= set(tags)
    assert [e.step for e in tags["eval/episodic_return"]] == [0, 100, 200, 300, 310]
    logged, written = [e.value for e in tags["eval/episodic_return"]], evaluations(folder)[1:]
    assert logged == pytest.approx([float(row[1]) for row in written])
    assert [e.step for e in tags[f"losses/{names[0]}"]] == list(range(80, 301, 20))


def test_every_episode_is_logged_and_stored(step_loop, finished, tmp_path):
    """Lengths add up to the steps taken; the replay knows each transition's episode; none crosses a reset."""
    folder = finished(step_loop, tmp_path)
    tags, state = scalars(folder), torch.load(folder / "final.pt", weights_only=True)
    lengths = [int(event.value) for event in tags["charts/episodic_length"]]
    episode, rows = state["buffer"]["episode"], state["buffer"]["rows"]
    counts = torch.bincount(episode).tolist()
    assert counts[: len(lengths)] == lengths and sum(counts) == len(rows) == 300
    assert state["episode"] == len(lengths)
    same = episode[1:] == episode[:-1]
    assert torch.equal(rows[1:, 0][same], rows[:-1, 3][same])  # s of the next row is s' of this one
    returns = [event.value for event in tags["charts/episodic_return"]]
    sums = torch.zeros(int(episode.max()) + 1).index_add_(0, episode.long(), rows[:, 2])
    assert returns == pytest.approx(sums[: len(returns)].tolist(), rel=1e-4)


def test_observations_of_any_shape_are_flattened(step_loop, tmp_path):
    """uint8 images of shape (2, 3, 1) become 6 float32 numbers."""
    state = torch.load(
        run(step_loop, tmp_path, "--env-id", "tests.tasks:Image-v0") / "final.pt", weights_only=True
    )
    assert state["buffer"]["rows"].shape == (300, 6 + 1 + 1 + 6 + 1)
    assert (state["buffer"]["rows"][:, :6] == 7).all()


def test_actions_of_any_shape_stay_inside_their_box(step_loop, tmp_path):
    """(2, 2) actions with awkwardly rounded bounds; the task asserts what it gets."""
    folder = run(step_loop, tmp_path, "--env-id", "tests.tasks:MatrixAction-v0")
    assert torch.load(folder / "final.pt", weights_only=True)["buffer"]["rows"].shape == (
        300,
        1 + 4 + 1 + 1 + 1,
    )
    env = load(step_loop).make_env("tests.tasks:MatrixAction-v0")
    env.reset(seed=1)
    for corner in np.ndindex(3, 3, 3, 3):
        env.step(np.float32(corner) - 1)


def test_final_step_and_horizon_longer_than_episodes(tmp_path):
    """Episodes shorter than H leave no window to measure on: the run goes on without those metrics."""
    folder = run(
        "sac_mve", tmp_path, "--horizon", 25, "--env-id", "tests.tasks:LQR-v0", "--total-timesteps", 120
    )
    assert "model/error_1" not in scalars(folder) and "model/reward_error" in scalars(folder)


def lqr_optimum() -> float:
    """Expected return over 20 steps of the best unclipped linear feedback, s₀ uniform in [−2, 2]."""
    p = 0.0
    for _ in range(20):
        p = Q + A**2 * p - (A * B * p) ** 2 / (RHO + B**2 * p)
    return -p * 4 / 3


SMALL = "--batch-size 64 --hidden 64 --learning-starts 500 --num-threads 1 --device cpu".split()
SMALL += "--actor-lr 1e-3 --critic-lr 1e-3 --alpha-lr 1e-3".split()
SMALL_MODEL = "--model-hidden 64 --model-warm-up 200 --normalize-every 500".split()


@pytest.mark.parametrize("name", ["sac", "sac_mve"])
def test_learns_the_linear_quadratic_task(name, tmp_path):
    """From −155 to above −5 in 3 000 steps (seed 1: −2.5 and −2.4; the best linear feedback earns −1.7)."""
    module = load(name)
    flags = [*SMALL, *(SMALL_MODEL if name == "sac_mve" else []), "--runs-dir", str(tmp_path)]
    flags += "--env-id tests.tasks:LQR-v0 --total-timesteps 3000 --eval-every 3000".split()
    returns = [float(row[1]) for row in evaluations(module.train(module.parse(flags)))[1:]]
    assert returns[0] < -20
    assert lqr_optimum() == pytest.approx(-1.66, abs=0.01)
    assert returns[-1] > -5


@long
@pytest.mark.parametrize("name", [pytest.param("sac", marks=by_hand), "sac_mve"])
def test_learns_pendulum(name, tmp_path):
    """Swing-up: below −800 at first, above −400 after 4 000 steps (seed 1: −195 and −182; random −1 200)."""
    module = load(name)
    flags = [*SMALL, *(SMALL_MODEL if name == "sac_mve" else []), "--runs-dir", str(tmp_path)]
    flags += "--env-id Pendulum-v1 --total-timesteps 4000 --eval-every 4000 --batch-size 128".split()
    flags += "--horizon 1".split() if name == "sac_mve" else []
    returns = [float(row[1]) for row in evaluations(module.train(module.parse(flags)))[1:]]
    assert returns[0] < -800 and returns[-1] > -400


def test_memory_estimate_is_what_the_buffer_takes():
    """The bytes checked before a run are those of the tensors."""
    module = load("sac")
    buffer = module.ReplayBuffer(1000, 17, 6, torch.device("cpu"))
    assert buffer.rows.nbytes + buffer.episode.nbytes == 1000 * 4 * (2 * 17 + 6 + 3)
    assert 0 < module.available_memory(torch.device("cpu")) < math.inf
