"""The suites' tasks against the formulas printed for them, recomputed from states and observations."""

import gymnasium as gym
import numpy as np
import pytest

from tests.conftest import load, run

SIZES = {
    "poplin/Ant-v0": 27, "poplin/Cheetah-v0": 17, "poplin/Hopper-v0": 11, "poplin/Swimmer-v0": 9,
    "poplin/Walker2d-v0": 17, "pets/Cheetah-v0": 19, "mbpo/Ant-v0": 27, "mbpo/HalfCheetah-v0": 17,
    "mbpo/Hopper-v0": 11, "mbpo/Humanoid-v0": 45, "mbpo/Walker2d-v0": 17, "mve/HalfCheetah-v0": 18,
    "mve/Swimmer-v0": 10, "mve/Walker2d-v0": 18, "pets/CartPole-v0": 4, "masked/HalfCheetah-v0": 8,
    "masked/Hopper-v0": 5, "masked/InvertedPendulum-v0": 2,
}  # fmt: skip


def make(name: str) -> gym.Env:
    return gym.make(f"experiments.tasks:{name}", disable_env_checker=True)


def steps(name: str, number: int):
    """Random steps: state and obs before, action, state and obs after, reward, terminated, truncated."""
    env, rng = make(name), np.random.default_rng(0)
    data, (obs, _) = env.unwrapped.data, env.reset(seed=1)
    for _ in range(number):
        before = data.qpos.copy(), data.qvel.copy()
        action = rng.uniform(env.action_space.low, env.action_space.high)
        next_obs, reward, terminated, truncated, _ = env.step(action)
        after = data.qpos.copy(), data.qvel.copy(), data.cfrc_ext.copy()
        yield before, obs, action, after, next_obs, reward, terminated, truncated
        obs = env.reset()[0] if terminated or truncated else next_obs


def test_all_are_here():
    make("poplin/Hopper-v0")
    ours = ("poplin/", "pets/", "mbpo/", "mve/", "masked/")
    assert {n for n in gym.registry if n.startswith(ours)} == set(SIZES)


@pytest.mark.parametrize("name", SIZES)
def test_sizes_and_episode_length(name):
    env = make(name)
    obs, _ = env.reset(seed=0)
    assert obs.shape == env.observation_space.shape == (SIZES[name],) and obs.dtype == np.float64
    again = make(name)
    assert np.array_equal(again.reset(seed=0)[0], obs)
    assert env.spec.max_episode_steps == (200 if name == "pets/CartPole-v0" else 1000)


HEIGHTS = {"Ant": (13, 0.57), "Hopper": (5, 1.3), "Walker2d": (8, 1.3), "Cheetah": (8, None)}


@pytest.mark.parametrize("name", HEIGHTS)
def test_poplin_rewards_follow_from_the_observation_before(name):
    """Also where the body has fallen; nothing ever terminates."""
    (velocity, height), skip, fallen = HEIGHTS[name], 2 if name == "Ant" else 1, 0
    for number, step in enumerate(steps(f"poplin/{name}-v0", 1001)):
        _, obs, action, after, next_obs, reward, terminated, truncated = step
        expected = obs[velocity] - 0.1 * (action**2).sum()
        if height is not None:
            expected += 1 - 3 * (obs[0] - height) ** 2
            fallen += obs[0] < 0.7 * height
        assert reward == pytest.approx(expected, abs=1e-6)
        assert np.array_equal(next_obs, np.concatenate([after[0][skip:], after[1]]))
        assert not terminated and truncated == (number == 999)
    assert fallen > 100 or name in ("Ant", "Cheetah")


def test_poplin_velocities_are_not_clipped():
    fastest = max(np.abs(step[4][5:]).max() for step in steps("poplin/Hopper-v0", 2000))
    assert fastest > 10


def test_poplin_swimmer_rewards_the_tip_velocity_of_the_step_before():
    last = 0.0
    for before, obs, action, after, next_obs, reward, terminated, truncated in steps(
        "poplin/Swimmer-v0", 1100
    ):
        assert obs[8] == last and reward == pytest.approx(last - 1e-4 * (action**2).sum(), abs=1e-6)
        tips = [q[0] + 1.5 * np.cos(q[2]) for q in (before[0], after[0])]
        assert next_obs[8] == pytest.approx((tips[1] - tips[0]) / 0.04, abs=1e-9) and not terminated
        last = 0.0 if truncated else next_obs[8]


def test_pets_cart_pole():
    """exp(−d²/0.36) − 0.01 u² of the state after, d from the tip to its place; never ends."""
    for _, _, action, after, next_obs, reward, terminated, _ in steps("pets/CartPole-v0", 250):
        (x, angle), velocities = after[:2]
        tip = np.array([x - 0.6 * np.sin(angle), -0.6 * np.cos(angle)])
        expected = np.exp(-((tip - [0, 0.6]) ** 2).sum() / 0.36) - 0.01 * (action**2).sum()
        assert reward == pytest.approx(expected, abs=1e-9) and not terminated
        assert np.array_equal(next_obs, [x, angle, *velocities])


def test_pets_cheetah():
    first = True
    for step in steps("pets/Cheetah-v0", 1100):
        before, obs, action, after, next_obs, reward, terminated, truncated = step
        velocity = (after[0][0] - before[0][0]) / 0.05
        assert (obs[0] == 0) == first and next_obs[0] == pytest.approx(velocity, abs=1e-9) and not terminated
        assert reward == pytest.approx(velocity - 0.1 * (action**2).sum(), abs=1e-6)
        assert next_obs[2] ** 2 + next_obs[3] ** 2 == pytest.approx(1)
        assert np.array_equal(next_obs[4:], np.concatenate([after[0][3:], after[1]]))
        assert not first or np.abs(before[0][3:]).max() < 0.01  # the small reset noise
        first = truncated


def test_pets_cheetah_starts_at_normal_deviations():
    """N(0, 0.001²) on positions and velocities: a uniform ± 0.001 has deviation 0.00058 and no tails."""
    env = make("pets/Cheetah-v0")
    task, starts = env.unwrapped, []
    for seed in range(400):
        env.reset(seed=seed)
        starts.append(np.concatenate([task.data.qpos - task.init_qpos, task.data.qvel - task.init_qvel]))
    noise = np.array(starts)
    assert np.allclose(noise.std(0), 1e-3, rtol=0.15) and np.abs(noise.mean(0)).max() < 2e-4
    outside = (np.abs(noise) > 1e-3).mean(0)
    assert np.allclose(outside, 0.3173, atol=0.1) and np.abs(np.corrcoef(noise.T) - np.eye(18)).max() < 0.25
    obs, info = env.reset(seed=3)
    assert info["x_position"] == task.data.qpos[0] != 0 and obs[1] == task.data.qpos[1]


def test_mve_walker_is_paid_on_the_last_step_too():
    """Δx/dt + 1 − 0.001 ‖u‖² on every step, also on the one that ends the episode."""
    ends = 0
    for before, obs, action, after, _, reward, terminated, _ in steps("mve/Walker2d-v0", 500):
        expected = (after[0][0] - before[0][0]) / 0.008 + 1 - 1e-3 * (action**2).sum()
        assert reward == pytest.approx(expected, abs=1e-6)
        assert np.array_equal(obs, np.concatenate([before[0], before[1].clip(-10, 10)]))
        ends += terminated
    assert ends > 5


COSTS = {"Hopper": 1e-3, "Walker2d": 1e-3, "HalfCheetah": 0.1}


@pytest.mark.parametrize("name", COSTS)
def test_mbpo_planar_rewards_and_ends(name):
    """Δx/dt + bonus − cost, the bonus on the last step too; ends by the printed rule."""
    ends, dt = 0, {"HalfCheetah": 0.05}.get(name, 0.008)
    for before, _, action, after, obs, reward, terminated, _ in steps(f"mbpo/{name}-v0", 1500):
        q, v = after[:2]
        expected = (q[0] - before[0][0]) / dt - COSTS[name] * (action**2).sum() + (name != "HalfCheetah")
        assert reward == pytest.approx(expected, abs=1e-6)
        clipped = v if name == "HalfCheetah" else v.clip(-10, 10)
        assert np.array_equal(obs, np.concatenate([q[1:], clipped]))
        rest = np.concatenate([q, v])[2:]
        healthy = {
            "Hopper": q[1] > 0.7 and abs(q[2]) < 0.2 and (np.abs(rest) < 100).all(),
            "Walker2d": 0.8 < q[1] < 2.0 and abs(q[2]) < 1,
            "HalfCheetah": True,
        }[name]
        assert terminated == (not healthy)
        ends += terminated
    assert (ends > 0) == (name != "HalfCheetah")


@pytest.mark.parametrize(("name", "bonus"), [("Ant", 1.0), ("Humanoid", 5.0)])
def test_mbpo_three_dimensional_tasks(name, bonus):
    """Truncated observations; the bonus is paid whether or not the step terminates."""
    plain, env, rng, ends = gym.make(f"{name}-v5"), make(f"mbpo/{name}-v0"), np.random.default_rng(0), 0
    for seed in range(3):
        plain.reset(seed=seed), env.reset(seed=seed)
        for _ in range(150):
            action = rng.uniform(env.action_space.low, env.action_space.high).astype(np.float32)
            theirs, ours = plain.step(action), env.step(action)
            q, v = env.unwrapped.data.qpos, env.unwrapped.data.qvel
            assert np.array_equal(ours[0], np.concatenate([q[2:], v])) and ours[2] == theirs[2]
            assert ours[1] == pytest.approx(theirs[1] + bonus * ours[2], abs=1e-9)
            ends += ours[2]
            if ours[2]:
                break
    assert ends > 0 or name == "Ant"


@pytest.mark.parametrize("name", ["HalfCheetah", "Hopper", "InvertedPendulum"])
def test_masked_tasks_hide_velocities_and_change_nothing_else(name):
    """The same rewards and ends as the plain task's in the same states; only positions are seen."""
    plain, env, rng = gym.make(f"{name}-v5"), make(f"masked/{name}-v0"), np.random.default_rng(0)
    hidden = {"HalfCheetah": 1, "Hopper": 1, "InvertedPendulum": 0}[name]  # the root's x
    for seed in range(3):
        starts = plain.reset(seed=seed)[0], env.reset(seed=seed)[0]
        for _ in range(100):
            assert np.array_equal(starts[1], starts[0][: SIZES[f"masked/{name}-v0"]])
            assert np.array_equal(starts[1], env.unwrapped.data.qpos[hidden:])
            action = rng.uniform(env.action_space.low, env.action_space.high).astype(np.float32)
            theirs, ours = plain.step(action), env.step(action)
            assert ours[1:4] == theirs[1:4]
            starts = theirs[0], ours[0]
            if ours[2]:
                break
        assert env.unwrapped.data.qvel.any() and (ours[2] or name == "HalfCheetah")


def test_walker_has_the_old_feet():
    envs = {name: make(f"{name}/Walker2d-v0") for name in ("mbpo", "poplin", "mve")}
    envs["new"] = gym.make("Walker2d-v5")
    feet = {}
    for name, env in envs.items():
        model = env.unwrapped.model
        feet[name] = [model.geom(f"foot{side}_geom").friction[0] for side in ("", "_left")]
    old = [0.9, 1.9]
    assert feet == {"mbpo": old, "poplin": old, "mve": old, "new": [1.9, 1.9]}


@pytest.mark.parametrize("name", [name for name in SIZES if name != "poplin/Swimmer-v0"])
def test_oracle_serves_the_suites(name):
    """Also as exact models: the start-up check of sac_ove.py passes. (Swimmer's tip velocity is a memory.)"""
    ove = load("sac_ove")
    ove.Simulator(f"experiments.tasks:{name}", ove.make_env(f"experiments.tasks:{name}"), 1)


def test_runs_by_id(tmp_path):
    folder = run("sac", tmp_path, "--env-id", "experiments.tasks:poplin/Hopper-v0", "--total-timesteps", 120)
    assert folder.name.startswith("experiments.tasks-poplin-Hopper-v0__sac__1__")


def test_tasks_by_their_old_name():
    """Runs that were begun as experiments.suites:.. make the same task."""
    old, new = (gym.make(f"experiments.{name}:poplin/Hopper-v0") for name in ("suites", "tasks"))
    a, b = (env.reset(seed=1)[0] for env in (old, new))
    assert (a == b).all() and old.spec.entry_point is new.spec.entry_point
