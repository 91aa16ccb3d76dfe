"""DDPG-MVE-min: closed forms of its targets and losses, hindsight, the schedule of a cycle, tasks, runs."""

import dataclasses
import itertools
import math
import threading
import typing

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

import tests.every_file.test_graphs
from tests.conftest import differing, evaluations, flat, load, long, run, scalars, shell, tiny
from tests.every_file.test_bad_input import fails

m = load("ddpg_mve_min")
NAME, BALL = "ddpg_mve_min", m.GoalTask(4, 2, 2, 50, [0, 1], 0.05, False, [])
FETCH = ["FetchReach-v4", "FetchPush-v4", "FetchPickAndPlace-v4", "FetchSlide-v4"]
TASKS = ["TorqueBall-v0", "TorqueBallDense-v0", *FETCH]


def rows(*values: float) -> torch.Tensor:
    """One member, one transition: [1, len, 1]."""
    return torch.tensor(values, dtype=torch.float64)[None, :, None]


def targets(reward: float, rewards: list[float], values: list[float], gamma: float) -> torch.Tensor:
    reward = torch.tensor([reward], dtype=torch.float64)
    return m.horizon_targets(reward, rows(*rewards), rows(*values), gamma)


def make_agent(task=BALL, **changes):
    args = m.parse(tiny(NAME))
    for name, value in changes.items():
        setattr(args, name, value)
    return m.Agent(args, task, torch.device("cpu"))


def filled(agent, episodes: int = 8):
    """A replay of random walks."""
    replay, task = agent.make_buffer(5_000), agent.task
    obs = 0.1 * torch.randn(episodes, task.length + 1, task.obs_dim).cumsum(1)
    action = 2 * torch.rand(episodes, task.length, task.action_dim) - 1
    replay.add(obs, action, torch.randn(episodes, task.goal_dim))
    return replay


graphs = tests.every_file.test_graphs.graphs  # a fixture: the stand-in for CUDA graphs


def equal(a, b) -> bool:
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def everything(replay) -> torch.Tensor:
    return torch.arange(replay.size)


# ---------------------------------------------------------------- targets


def test_targets_of_three_horizons_by_hand():
    found = targets(-1, [-1, 0], [-4, -2, -8], 0.5)
    assert found.flatten().tolist() == [-3, -2, -2.5]
    unclipped = {"min": -3, "mean": -2.5, "last": -2.5, "min-all": -3}
    assert {agg: m.aggregate(found, agg).item() for agg in unclipped} == unclipped
    clipped = m.reachable(found, 0.5, False)
    assert clipped.flatten().tolist() == [-2, -2, -2]
    assert all(m.aggregate(clipped, agg).item() == -2 for agg in unclipped)


def test_reachable_range():
    values = torch.tensor([-80.0, -50.0, -3.0, 0.0, 7.0])
    assert m.reachable(values, 0.98, False).tolist() == pytest.approx([-50, -50, -3, 0, 0])
    assert m.reachable(values, 1.0, False).tolist() == [-80, -50, -3, 0, 0]
    assert m.reachable(values, 0.98, True).tolist() == [-80, -50, -3, 0, 0]  # a ball at rest 1.6 away


def test_order_of_the_aggregations():
    """min-all ≤ min ≤ mean ≤ max; none of the minima exceeds T_0, which all members share."""
    found = torch.randn(5, 6, 200)
    found[:, 0] = found[0, 0]
    got = {agg: m.aggregate(found, agg) for agg in typing.get_args(m.Args.__dataclass_fields__["agg"].type)}
    slack = 1e-6  # a mean of equal numbers can round
    assert (got["min-all"] <= got["min"] + slack).all() and (got["min"] <= got["mean"] + slack).all()
    assert (got["mean"] <= found.mean(0).amax(0) + slack).all() and (got["min"] <= found[0, 0] + slack).all()
    assert torch.equal(got["last"], found.mean(0)[-1])
    assert (got["min-all"] < got["min"]).any() and (got["min"] < got["mean"]).any()
    alone = found[:, :1]
    assert all(torch.allclose(m.aggregate(alone, agg), found[0, 0]) for agg in got)


def test_members_are_averaged_before_the_minimum():
    found = torch.tensor([[[-1.0], [-5.0]], [[-1.0], [3.5]]])  # means −1 and −0.75
    assert m.aggregate(found, "min").item() == -1
    assert m.aggregate(found, "min-all").item() == -5


def lqr(horizon: int, bias: float = 0.0, gamma: float = 0.9) -> list[float]:
    """T_h of the test point (1, 0.3) with exact model, and an exact critic plus bias."""
    from tests.algos.test_math import GAMMA, K, P
    from tests.tasks import RHO, A, B, Q

    assert gamma == GAMMA
    x, rewards, values = A + B * 0.3, [], []
    for h in range(horizon + 1):
        if h > 0:
            rewards.append(-(Q * x**2 + RHO * (K * x) ** 2))
            x = (A - B * K) * x
        values.append(-P * x**2 + bias)
    return rewards, values, -(Q + RHO * 0.3**2)


def test_exact_model_and_critic_agree_over_horizons():
    rewards, values, reward = lqr(8)
    # imagined reward j belongs to the step into x_j here, to the step out of it in the textbook: the same sum
    found = targets(reward, rewards, values, 0.9)
    assert found.flatten().tolist() == pytest.approx([-2.8124454383] * 9, abs=1e-9)
    assert {round(m.aggregate(found, agg).item(), 9) for agg in ("min", "mean", "last")} == {-2.812445438}


@pytest.mark.parametrize("bias", [0.7, -0.7])
def test_bias_of_the_critic_over_horizons(bias):
    """T_h = true + γ^{h+1} b: over-estimation is cut to that of h = H, under-estimation is kept whole."""
    rewards, values, reward = lqr(4, bias)
    found = targets(reward, rewards, values, 0.9)
    expected = [-2.8124454383 + 0.9 ** (h + 1) * bias for h in range(5)]
    assert found.flatten().tolist() == pytest.approx(expected, abs=1e-9)
    assert m.aggregate(found, "min").item() == pytest.approx(expected[4 if bias > 0 else 0], abs=1e-9)


@pytest.mark.parametrize(("reward", "value"), [(-1.0, -50.0), (0.0, 0.0)])
def test_fixed_points(reward, value):
    found = targets(reward, [reward] * 5, [value] * 6, 0.98)
    assert found.flatten().tolist() == pytest.approx([value] * 6, abs=1e-9)


def by_hand(agent, batch, e: int, b: int, horizon: int) -> list[float]:
    """T_eh of transition b and member e, step by step."""
    x, goal, gamma, total = batch.next_obs[b], batch.goal[b], agent.args.gamma, batch.reward[b].item()
    found, action = [], None
    for h in range(horizon + 1):
        if h > 0:
            change = agent.model.change
            scaled = (x - agent.model.input.mean) / agent.model.input.std
            y = torch.cat([scaled, action])
            for i, layer in enumerate(agent.model.layers):
                y = y @ layer.weight[e] + layer.bias[e, 0]
                y = y.relu() if i < len(agent.model.layers) - 1 else y
            x = x + change.mean + change.std * y
            total += gamma**h * (-1.0 if math.dist(x[:2].tolist(), goal.tolist()) > 0.05 else 0.0)
        seen = agent.view(x[None], goal[None])
        action = agent.actor_target(seen)[0]
        values = agent.critic_target(seen, action[None])[:, 0]
        found.append(max(-1 / (1 - gamma), min(0, total + gamma ** (h + 1) * values.min().item())))
    return found


@pytest.mark.parametrize("member", ["all", "random"])
@torch.no_grad()
def test_expanded_values_against_a_plain_loop(member):
    """Slow networks, the relabelled goal and one member along a whole trajectory; 17 rows, 3 members."""
    agent = make_agent(horizon=3, members=3, member=member, gamma=0.9)
    replay = filled(agent)
    agent.observe(replay)
    agent.model.observe(replay.obs)
    for module in (agent.actor_target, agent.critic_target, agent.model):
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))  # now unlike the online ones
    for layer in agent.critic_target.layers[-1:]:
        layer.bias.sub_(3.0)  # off the ends of the range
    batch = replay.sample(17, everything(replay))
    found = agent.expand_values(batch, 3)
    assert found.shape == ((3 if member == "all" else 1), 4, 17)
    share = -(-17 // 3)
    for b in range(17):
        for e in range(3) if member == "all" else [b // share]:
            row = found[e if member == "all" else 0, :, b]
            assert row.tolist() == pytest.approx(by_hand(agent, batch, e, b, 3), abs=1e-4)
    assert found.std(1).mean() > 0.01
    zero = agent.expand_values(batch, 0)
    assert torch.allclose(zero[0, 0], found[0, 0], atol=1e-5) and zero.shape == (1, 1, 17)


def test_each_transition_gets_one_member_by_equal_shares():
    agent = make_agent(horizon=1, members=4, member="random")
    for parameter in agent.model.parameters():
        parameter.data.zero_()
    agent.model.layers[-1].bias.data += torch.arange(4.0)[:, None, None]  # member e moves by e
    seen, assess = [], agent.assess
    agent.assess = lambda obs, goal: (seen.append(obs), assess(obs, goal))[1]
    replay = filled(agent)
    batch = replay.sample(32, everything(replay))
    agent.expand_values(batch, 1)
    moved = (seen[1] - seen[0])[..., 0].flatten()
    assert sorted(moved.round().tolist()) == sorted([0.0, 1.0, 2.0, 3.0] * 8)


# ---------------------------------------------------------------- models


def tiny_model(members: int = 2, task=BALL, dtype=torch.float64):
    return m.DynamicsEnsemble(members, task, 2, 8).to(dtype)


def test_multi_step_loss_of_one_step_is_the_usual_loss():
    model, obs, action = tiny_model(), torch.randn(2, 7, 2, 4).double(), torch.randn(2, 7, 1, 2).double()
    model.change.std.fill_(0.5)
    loss = m.multi_step_loss(model.errors(obs, action))
    error = (model(obs[:, :, 0], action[:, :, 0]) - obs[:, :, 1]) / 0.5
    assert loss.item() == pytest.approx(sum(error[e].square().mean().item() for e in range(2)))


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_perfect_model_has_no_loss(steps):
    model, drift = tiny_model(), torch.tensor([0.1, -0.2, 0.3, 0.0]).double()
    model.layers[-1].weight.data.zero_(), model.layers[-1].bias.data.zero_()
    model.change.mean.copy_(drift)
    obs = torch.randn(1, 6, 1, 4).double() + drift * torch.arange(steps + 1).double()[:, None]
    action = torch.randn(1, 6, steps, 2).double()
    assert m.multi_step_loss(model.errors(obs, action)).item() == pytest.approx(0, abs=1e-24)
    model.change.mean.add_(0.1)  # every step now adds 0.1: errors 0.1 k
    expected = 2 * sum((0.1 * k) ** 2 for k in range(1, steps + 1)) / steps
    assert m.multi_step_loss(model.errors(obs, action)).item() == pytest.approx(expected)


def test_gradient_goes_through_the_models_own_predictions():
    """Against finite differences: a detached prediction, or recorded states as input, would fail."""
    model = tiny_model(1)
    obs, action = torch.randn(1, 3, 5, 4).double(), torch.randn(1, 3, 4, 2).double()
    weight = model.layers[0].weight

    def loss():
        return m.multi_step_loss(model.errors(obs, action))

    (gradient,) = torch.autograd.grad(loss(), weight)
    for i, j in ((0, 0), (3, 5), (5, 2)):
        values = []
        for shift in (1e-6, -1e-6):
            weight.data[0, i, j] += shift
            values.append(loss().item())
            weight.data[0, i, j] -= shift
        assert gradient[0, i, j].item() == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5, abs=1e-9)


def test_drift_of_a_scalar_model():
    """x' = (a + ε) x for a true a: error after k steps ((a + ε)^k − a^k) x_0."""

    class Scalar(m.DynamicsEnsemble):
        def forward(self, obs, action):
            return 1.01 * obs

    model = Scalar(1, BALL._replace(obs_dim=1, goal_dim=1, columns=[0]), 1, 4)
    obs = 2.0 * 0.98 ** torch.arange(6.0)[None, None, :, None]
    errors = model.errors(obs, torch.zeros(1, 1, 5, 2)).flatten().tolist()
    assert errors == pytest.approx([2 * (1.01**k - 0.98**k) for k in range(1, 6)], abs=1e-5)


def test_angles_are_compared_on_the_circle():
    task = BALL._replace(angles=[2])
    model = tiny_model(1, task)
    model.layers[-1].weight.data.zero_(), model.layers[-1].bias.data.zero_()
    obs = torch.tensor([[0.0, 0.0, 3.1, 0.0], [0.0, 0.0, -3.1, 0.0]]).double()[None, None]
    errors = model.errors(obs, torch.zeros(1, 1, 1, 2).double())
    assert errors[0, 0, 0, 2].item() == pytest.approx(6.2 - 2 * math.pi, abs=1e-6)
    model.observe(obs[0])
    assert model.change.mean[2].item() == pytest.approx(2 * math.pi - 6.2, abs=1e-6)
    assert model(obs[:, :, 0], torch.zeros(1, 1, 2).double())[0, 0, 2].item() == pytest.approx(-3.1)
    plain = tiny_model(1)
    plain.observe(obs[0])
    assert plain.change.mean[2].item() == pytest.approx(-6.2)


def test_moments_of_parts_are_those_of_the_whole():
    x = torch.randn(1000, 3) * torch.tensor([1.0, 5.0, 0.0]) + torch.tensor([0.0, 100.0, 7.0])
    moments = m.Moments(3, relative=1e-3)
    for part in x.split([1, 399, 600]):
        moments.update(part)
    assert torch.allclose(moments.mean, x.mean(0), atol=1e-4)
    assert torch.allclose(moments.std[:2], x.std(0, correction=0)[:2], rtol=1e-4)
    assert moments.std[2].item() == pytest.approx(1e-3 * moments.std[1].item(), rel=1e-4)
    floored = m.Moments(3, floor=0.01)
    floored.update(x)
    assert floored.std[2].item() == pytest.approx(0.01)


# ---------------------------------------------------------------- hindsight and windows


def numbered_replay(agent, episodes: int = 30):
    """Observation (episode, t, 0, 0) + goals (−1, −1): what was drawn can be read off."""
    replay, steps = agent.make_buffer(5_000), agent.task.length
    for k in range(episodes):
        obs = torch.stack([torch.full((steps + 1,), float(k)), torch.arange(steps + 1.0)], 1)
        obs = torch.cat([obs, torch.zeros(steps + 1, 2)], 1)[None]
        replay.add(obs, obs[:, :-1, :2].clone(), torch.full((1, 2), -1.0))
    return replay


def test_hindsight_goals_come_from_later_in_the_same_episode():
    replay = numbered_replay(make_agent(hindsight=4))
    batch = replay.sample(100_000, everything(replay))
    relabelled = batch.goal[:, 0] >= 0
    assert relabelled.float().mean().item() == pytest.approx(0.8, abs=0.01)
    obs, goal = batch.obs[relabelled], batch.goal[relabelled]
    assert torch.equal(obs[:, 0], goal[:, 0])
    ahead = goal[:, 1] - obs[:, 1]
    assert ahead.min() == 1 and goal[:, 1].max() == 50
    share = (ahead[obs[:, 1] == 40] - 1).long().bincount(minlength=10) / (obs[:, 1] == 40).sum()
    assert share.tolist() == pytest.approx([0.1] * 10, abs=0.03)
    assert torch.equal(batch.next_obs[:, 1], batch.obs[:, 1] + 1) and torch.equal(
        batch.action, batch.obs[:, :2]
    )
    task = gym.make("TorqueBall-v0").unwrapped
    theirs = task.compute_reward(batch.next_obs[:, :2].numpy(), batch.goal.numpy(), {})
    assert np.array_equal(batch.reward.numpy(), theirs.astype(np.float32))
    assert batch.reward[relabelled].eq(0).float().mean() > 0.02  # some are reached at once


def test_without_hindsight_goals_stay():
    replay = numbered_replay(make_agent(hindsight=0))
    assert (replay.sample(1_000, everything(replay)).goal == -1).all()


def test_windows_stay_inside_episodes_and_training_ones():
    replay = numbered_replay(make_agent())
    obs, action = replay.windows((3, 5_000), 5, replay.training())
    assert obs.shape == (3, 5_000, 6, 4) and action.shape == (3, 5_000, 5, 2)
    assert (obs[..., 0] == obs[..., :1, 0]).all() and (obs[..., 1:, 1] - obs[..., :-1, 1] == 1).all()
    assert torch.equal(action, obs[..., :-1, :2])
    assert set(obs[..., 0].unique().tolist()) == set(range(30)) - {1, 11, 21}
    assert obs[..., 0, 1].unique().tolist() == list(range(46))
    assert not torch.equal(obs[0], obs[1])


def test_ring_of_episodes():
    replay = numbered_replay(make_agent(), 105)
    assert replay.size == replay.capacity == 100
    assert replay.number[:6].tolist() == [100, 101, 102, 103, 104, 5]
    assert replay.obs[replay.newest(3), 0, 0].tolist() == [102, 103, 104]
    other = numbered_replay(make_agent(), 1)
    other.load_state_dict(replay.state_dict())
    assert all(
        torch.equal(getattr(other, k), getattr(replay, k)) for k in ("obs", "action", "goal", "number")
    )


# ---------------------------------------------------------------- tasks


@pytest.mark.parametrize("env_id", TASKS)
def test_rewards_of_observations_are_those_of_the_task(env_id):
    """1 000 random steps: ag is the slice, and the reward of the true next observation the task's own."""
    if env_id in FETCH:
        pytest.importorskip("gymnasium_robotics")
    task, env = m.study(env_id, 3), m.make_goal_env(env_id)
    near = 0
    for step in range(1_000):
        if step % task.length == 0:
            obs, _ = env.reset(seed=step)
        obs, reward, *_ = env.step(env.action_space.sample())
        seen, goal = (torch.as_tensor(obs[name]) for name in ("observation", "desired_goal"))
        assert torch.equal(seen[task.columns], torch.as_tensor(obs["achieved_goal"]))
        assert task.reward(seen, goal).item() == pytest.approx(float(reward), abs=1e-6)
        near += reward > -0.05
        goals = obs["achieved_goal"] + np.random.default_rng(step).uniform(-0.1, 0.1, (20, task.goal_dim))
        theirs = env.unwrapped.compute_reward(np.tile(obs["achieved_goal"], (20, 1)), goals, {})
        ours = task.reward(seen.expand(20, -1), torch.as_tensor(goals)).numpy()
        assert np.allclose(ours, theirs, atol=1e-6)
        near += (theirs == 0).sum()
    assert near > 100 or task.dense  # both rewards were seen
    if env_id in FETCH:
        expected = [0, 1, 2] if "Reach" in env_id else [3, 4, 5]
        assert task.columns == expected and task.length == 50
        assert (task.obs_dim, task.goal_dim, task.action_dim) == (10 if "Reach" in env_id else 25, 3, 4)
        assert task.angles == ([] if "Reach" in env_id else [11, 12, 13])
    env.close()


def test_ball_by_hand():
    env = m.TorqueBall()
    env.reset(seed=1)
    env.position, env.velocity, env.goal = np.array([0.95, 0.0]), np.array([1.0, 0.0]), np.array([0.9, 0.0])
    obs, reward, terminated, truncated, info = env.step(np.array([0.5, -1.0]))
    # v = 0.95 + 0.05 = 1, x = 0.95 + 0.1 = 1.05 -> 0.95 with v = −1; v_y = −0.1, y = −0.01
    assert obs["observation"].tolist() == pytest.approx([0.95, -0.01, -1.0, -0.1])
    assert reward == -1 and not (terminated or truncated) and not info["is_success"]
    env.goal = obs["achieved_goal"] + [0.02, -0.09]
    obs, reward, *_, info = env.step(np.array([1.0, -1.0]))
    assert obs["observation"].tolist() == pytest.approx([0.865, -0.0295, -0.85, -0.195])
    assert reward == -1
    env.goal = obs["achieved_goal"] + [-0.09, -0.03]
    assert env.step(np.array([0.0, 0.0]))[1] == 0
    check_env(gym.make("TorqueBall-v0").unwrapped, skip_render_check=True)


@pytest.mark.parametrize("env_id", ["TorqueBall-v0", "FetchPush-v4", "FetchPickAndPlace-v4"])
def test_episodes_depend_on_their_numbers_alone(env_id):
    """So that a run resumes exactly: nothing is left in the tasks between episodes."""
    if env_id in FETCH:
        pytest.importorskip("gymnasium_robotics")
    task, rng = m.study(env_id, 0), np.random.default_rng(0)
    used, fresh = (m.make_goal_envs(env_id, 2) for _ in range(2))
    m.play(used, task, 0, 1, lambda obs, _: rng.uniform(-1, 1, (2, task.action_dim)).astype(np.float32))
    chase = lambda obs, goal: np.tanh(5 * (goal[:, :1] - obs[:, :1])).repeat(task.action_dim, 1)
    one, two = (m.play(envs, task, 2, 1, chase) for envs in (used, fresh))
    assert torch.equal(one.obs, two.obs) and torch.equal(one.goal, two.goal)
    other = m.play(used, task, 4, 1, chase)
    assert not torch.equal(one.goal, other.goal) and not torch.equal(one.obs[0], one.obs[1])


def test_vector_tasks_are_not_reset_by_themselves():
    envs = m.make_goal_envs("TorqueBall-v0", 3)
    assert envs.metadata["autoreset_mode"] is gym.vector.AutoresetMode.DISABLED
    played = m.play(envs, BALL, 0, 1, lambda obs, goal: np.ones((3, 2), np.float32))
    assert played.obs.shape == (3, 51, 4) and (played.obs[:, -1, 2:].abs() > 0).all()  # the last is no reset


@pytest.mark.parametrize("env_id", ["TorqueBall-v0", "FetchPush-v4"])
def test_threads_of_the_tasks_change_nothing(env_id):
    if env_id in FETCH:
        pytest.importorskip("gymnasium_robotics")
    task, played = m.study(env_id, 0), []
    for threads in (1, 2, 5):
        envs, rng = m.make_goal_envs(env_id, 4, threads), np.random.default_rng(0)
        policy = lambda *_, rng=rng: rng.uniform(-1, 1, (4, task.action_dim)).astype(np.float32)
        assert envs.metadata["autoreset_mode"] is gym.vector.AutoresetMode.DISABLED
        assert isinstance(envs, m.ThreadedVectorEnv) == (threads > 1)
        m.play(envs, task, 0, 1, policy)
        played.append(m.play(envs, task, 4, 1, policy))
        envs.close()
    for other in played[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(played[0], other, strict=True))


def test_threads_step_several_tasks_at_once(monkeypatch):
    """Two that wait for each other: side by side they meet, one after the other they never do."""
    meet = threading.Barrier(2)
    step = m.TorqueBall.step

    def wait_and_step(self, action):
        meet.wait(timeout=20)
        return step(self, action)

    monkeypatch.setattr(m.TorqueBall, "step", wait_and_step)
    envs = m.make_goal_envs("TorqueBall-v0", 2, threads=2)
    envs.reset(seed=[1, 2])
    obs, reward, terminated, truncated, _ = envs.step(np.zeros((2, 2), np.float32))
    assert obs["observation"].shape == (2, 4) and reward.shape == terminated.shape == truncated.shape == (2,)


def test_the_policy_plays_on_one_thread_of_pytorch():
    envs, seen = m.make_goal_envs("TorqueBall-v0", 2), []
    policy = lambda *_: (seen.append(torch.get_num_threads()), np.zeros((2, 2), np.float32))[1]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        m.play(envs, BALL, 0, 1, policy)
        assert set(seen) == {1} and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 3])
def test_what_fails_in_a_task_is_raised(threads, monkeypatch):
    def fail(self, action):
        raise OSError("no simulator")

    monkeypatch.setattr(m.TorqueBall, "step", fail)
    envs = m.make_goal_envs("TorqueBall-v0", 3, threads)
    with pytest.raises(m.BadInput, match="no simulator"):
        m.play(envs, BALL, 0, 1, lambda *_: np.zeros((3, 2), np.float32))


# ---------------------------------------------------------------- the cycle


def test_cadence_of_a_cycle(monkeypatch):
    """Slow copies move once; models do not move while critics learn from them; 40 + 40 updates."""
    agent = make_agent(horizon=2, updates_per_cycle=7, model_updates=5, model_warm_up=3, model_ready=1e9)
    replay, moves, seen, fits = filled(agent), [], [], []
    polyak, expand, fit = m.polyak, agent.expand_values, agent.fit_models
    monkeypatch.setattr(m, "polyak", lambda *a: (moves.append(a), polyak(*a)))
    weights = lambda module: torch.cat([p.detach().flatten() for p in module.parameters()])

    def watch(batch, horizon):
        seen.append((weights(agent.model), weights(agent.critic_target), weights(agent.critic), horizon))
        return expand(batch, horizon)

    agent.expand_values, agent.fit_models = watch, lambda *a: (fits.append(1), fit(*a))[1]
    agent.update(replay, agent.args.learning_starts)
    assert len(moves) == 2 and len(seen) == 7 and len(fits) == 8
    assert [(a is agent.critic_target, b is agent.critic) for a, b, _ in moves] == [
        (True, True),
        (False, False),
    ]
    assert moves[0][2] == agent.args.tau
    assert all(torch.equal(a, seen[0][0]) and torch.equal(b, seen[0][1]) for a, b, *_ in seen)
    assert all(not torch.equal(a[2], b[2]) for a, b in itertools.pairwise(seen))
    assert {h for *_, h in seen} == {2}
    agent.update(replay, agent.args.learning_starts)
    assert len(moves) == 4 and len(fits) == 13  # the models' warm-up is over


@pytest.mark.parametrize(("steps", "length"), [(0, 3), (1, 1), (4, 4)])
def test_each_member_learns_from_windows_of_its_own(steps, length):
    """L steps, by default as many as the horizon, of training episodes alone."""
    agent = make_agent(horizon=3, members=2, model_batch=500, model_steps=steps)
    replay, seen = numbered_replay(agent), []
    windows = replay.windows
    replay.windows = lambda *a: seen.append(windows(*a)) or seen[-1]
    agent.update(replay, agent.args.learning_starts)
    obs, action = seen[0]
    assert obs.shape == (2, 500, length + 1, 4) and action.shape == (2, 500, length, 2)
    assert not torch.equal(obs[0], obs[1]) and not {1.0, 11.0, 21.0} & set(obs[..., 0].unique().tolist())


@pytest.mark.parametrize("columns", [[0, 1], [3, 1]])
@pytest.mark.parametrize("flags", [{"horizon": 0}, {"horizon": 3}, {"horizon": 3, "member": "random"}])
def test_replayed_cycles_are_the_eager_ones(flags, columns, graphs):
    """Weights, moments, metrics, actions and generator to the bit, before and after expansion begins."""
    task = BALL._replace(columns=columns)
    agents = [make_agent(task, updates_per_cycle=3, model_warm_up=2, **flags) for _ in range(2)]
    agents[1].load_state_dict(agents[0].state_dict())
    found = graphs(m, agents[1])
    for cycle in range(6):
        outcomes = []
        for agent in agents:
            torch.manual_seed(cycle)
            agent.args.model_ready = 0.0 if cycle < 3 else 1e9
            metrics = agent.update(filled(agent), 100)
            obs, goal = np.random.default_rng(cycle).normal(size=(2, 5, 4)).astype(np.float32)
            actions = [agent.act_for(obs, goal[:, :2], calm).copy() for calm in (True, False)]
            outcomes.append([dict(flat(agent.state_dict())), metrics, torch.get_rng_state(), actions])
        (states, metrics, *rest), (other_states, other_metrics, *others) = outcomes
        assert states.keys() == other_states.keys() and metrics.keys() == other_metrics.keys()
        for a, b in ((states, other_states), (metrics, other_metrics)):
            assert [key for key in a if not equal(a[key], b[key])] == []
        assert torch.equal(rest[0], others[0]) and np.array_equal(rest[1], others[1])
    assert len(found) == (3 if flags["horizon"] == 0 else 5)  # two policies, learning at 0 and at H, models


def test_expansion_waits_for_the_warm_up_and_for_the_model():
    agent = make_agent(horizon=2, model_ready=0.0)
    replay, used = filled(agent), []
    expand = agent.expand_values
    agent.expand_values = lambda batch, horizon: (used.append(horizon), expand(batch, horizon))[1]
    assert "model/loss" not in agent.update(replay, agent.args.learning_starts - 1)
    assert agent.update(replay, agent.args.learning_starts)["model/is_ready"] == 0 and set(used) == {0}
    agent.args.model_ready = 1e9
    assert agent.update(replay, agent.args.learning_starts)["model/is_ready"] == 1 and used[-1] == 2
    agent.args.model_ready = 0.0
    agent.update(replay, agent.args.learning_starts)
    assert used[-1] == 2  # once ready it stays so


def test_sinking_targets_are_announced_once(capsys):
    agent = make_agent(horizon=2, model_ready=1e9, updates_per_cycle=2)
    replay = filled(agent)
    agent.update(replay, agent.args.learning_starts)
    assert "below the model-free" not in capsys.readouterr().out
    original = agent.expand_values
    agent.expand_values = lambda *a: original(*a) - torch.tensor([0.0, 9.0, 0.0])[:, None]
    agent.update(replay, 70), agent.update(replay, 80)
    assert capsys.readouterr().out.count("step 70: targets lie 9") == 1


def test_gradients_stay_with_their_own_networks(monkeypatch):
    """Critics learn from their loss alone, the actor from its own; targets are constants."""
    agent, reached = make_agent(horizon=2, model_ready=1e9), {}
    parts = {"critic": agent.critic, "actor": agent.actor, "model": agent.model}
    parts |= {"critic_target": agent.critic_target, "actor_target": agent.actor_target}

    def watch(name):
        original = getattr(m, name)

        def watched(*inputs):
            loss = original(*inputs)
            for part, module in parts.items():
                weights = [w for w in module.parameters() if w.requires_grad]
                found = (
                    torch.autograd.grad(loss, weights, allow_unused=True, retain_graph=True)
                    if weights
                    else []
                )
                reached[name, part] = [g is not None for g in found]
            return loss

        monkeypatch.setattr(m, name, watched)

    watch("value_loss"), watch("deterministic_actor_loss")
    agent.update(filled(agent), agent.args.learning_starts)
    assert all(reached["value_loss", "critic"]) and all(reached["deterministic_actor_loss", "actor"])
    others = [x for key, x in reached.items()
              if key not in (("value_loss", "critic"), ("deterministic_actor_loss", "actor"))]  # fmt: skip
    assert not any(any(x) for x in others)


def test_squared_actions_are_penalised():
    """With λ huge the actor shrinks its actions; with 0 it need not."""
    sizes = []
    for weight in (0.0, 1e4):
        torch.manual_seed(0)
        agent = make_agent(horizon=0, action_l2=weight, updates_per_cycle=60, actor_lr=1e-2)
        replay = filled(agent)
        agent.update(replay, 100)
        batch = replay.sample(500, everything(replay))
        sizes.append(agent.actor(agent.view(batch.obs, batch.goal)).square().mean().item())
    assert sizes[1] < 0.01 < sizes[0]


def test_noise_of_actions():
    agent = make_agent(exploration_noise=0.1, random_actions=0.3)
    obs, goal = np.zeros((20_000, 4), np.float32), np.zeros((20_000, 2), np.float32)
    calm, noisy = agent.act_for(obs, goal, deterministic=True), agent.act_for(obs, goal)
    assert (calm == calm[0]).all() and np.abs(noisy).max() <= 1
    at_random = (np.abs(noisy - calm) > 0.45).any(1)  # 4.5 deviations
    share = 1 - (0.45 - max(abs(calm[0]).max() - 0.55, 0)) ** 2
    assert at_random.mean() == pytest.approx(0.3 * share, abs=0.05)
    assert (noisy - calm)[~at_random].std() == pytest.approx(0.1, rel=0.25)
    agent.args.random_actions, agent.args.exploration_noise = 0.0, 0.0
    assert np.array_equal(agent.act_for(obs, goal), calm)


def test_networks_see_normalised_and_clipped_pairs():
    agent = make_agent()
    agent.obs_moments.mean.fill_(1.0), agent.obs_moments.std.fill_(2.0)
    seen = agent.view(torch.tensor([[3.0, 1e6, -1e6, 1.0]]), torch.tensor([[0.5, -9.0]]))
    assert seen.tolist() == [[1, 5, -5, 0, 0.5, -5]]


def test_initial_weights():
    actor = m.DeterministicActor(1, [100, 200, 3], layer_norm=False)
    m.glorot(actor)
    assert actor.layers[0].weight.abs().max().item() == pytest.approx(math.sqrt(6 / 300), rel=1e-2)
    assert all((layer.bias == 0).all() for layer in actor.layers)


# ---------------------------------------------------------------- runs


def test_horizon_0_has_no_model_and_every_aggregation_is_the_same(tmp_path):
    folders = [run(NAME, tmp_path / agg, "--horizon", 0, "--agg", agg) for agg in ("min", "mean", "min-all")]
    assert not any(
        "model" in name for name in torch.load(folders[0] / "final.pt", weights_only=True)["agent"]
    )
    assert differing(folders[0] / "final.pt", folders[1] / "final.pt", "/args/agg") == []
    assert differing(folders[0] / "final.pt", folders[2] / "final.pt", "/args/agg") == []
    assert not any(tag.startswith("model/") for tag in scalars(folders[0]))


def test_what_a_run_leaves(tmp_path):
    folder = run(NAME, tmp_path)
    rows = evaluations(folder)
    assert rows[0] == ["step", "return_mean", "return_std", "length_mean", "success_rate", "episodes"]
    assert [int(row[0]) for row in rows[1:]] == [0, 100, 200, 300]
    assert all(0 <= float(row[4]) <= 1 and float(row[3]) == 50 for row in rows[1:])
    found = scalars(folder)
    gap = [e.value for e in found["expansion/pessimism_gap"]]
    assert max(gap) < 1e-6 and min(gap) < 0
    for tag in ("eval/success_rate", "charts/success_rate", "model/error_3", "model/reward_accuracy_1"):
        assert found[tag], tag
    assert all(0 <= e.value <= 1 for e in found["model/reward_accuracy_2"])
    assert {"charts/SPS", "time/collection", "time/updates", "losses/qf_loss", "model/change_error"} <= set(
        found
    )


def test_evaluation_does_not_touch_training(tmp_path):
    often = run(NAME, tmp_path / "often", "--eval-every", 100)
    never = run(NAME, tmp_path / "never", "--eval-every", 10_000, "--eval-episodes", 5)
    ignored = ("/rows", "/args/eval")
    assert differing(often / "final.pt", never / "final.pt", *ignored) == []


def test_evaluation_does_not_explore():
    """Whatever the generator: the returns of a task that pays for every step are the same."""
    agent, rows = make_agent(BALL._replace(dense=True), eval_episodes=3), []
    envs = m.make_goal_envs("TorqueBallDense-v0", 2)
    for seed in (0, 1):
        torch.manual_seed(seed)
        rows.append(m.evaluate_goals(envs, agent, agent.args, 7))
    assert rows[0] == rows[1] and rows[0]["return_std"] > 0
    assert (rows[0]["step"], rows[0]["episodes"], rows[0]["length_mean"]) == (7, 3, 50)


@pytest.mark.parametrize("flags", [(), ("--horizon", 0), ("--member", "random")])
def test_a_resumed_run_ends_in_the_same_bits(flags, tmp_path):
    """From its checkpoint in the middle, as after a kill."""
    whole = run(NAME, tmp_path / "whole", *flags)
    middle = torch.load(whole / "checkpoint.previous.pt", weights_only=True)
    assert 0 < middle["step"] < 300
    cut = tmp_path / "cut"
    import shutil

    shutil.copytree(whole, cut)
    (cut / "final.pt").unlink()
    (cut / "checkpoint.previous.pt").replace(cut / "checkpoint.pt")
    resumed = m.train_episodic(m.parse(["--resume", str(cut)]))
    assert differing(whole / "final.pt", resumed / "final.pt") == []
    assert evaluations(whole) == evaluations(resumed)


NUMBERS = [("--gamma", 0.5), ("--tau", 0.5), ("--actor-lr", 1e-2), ("--critic-lr", 1e-2), ("--hidden", 12)]
NUMBERS += [("--batch-size", 12), ("--seed", 5), ("--learning-starts", 150), ("--buffer-size", 200)]
NUMBERS += [("--num-envs", 1), ("--critics", 1), ("--action-l2", 0.1), ("--updates-per-cycle", 3)]
NUMBERS += [("--hindsight", 1), ("--exploration-noise", 0.5), ("--random-actions", 0.9), ("--horizon", 2)]
NUMBERS += [("--agg", "mean"), ("--agg", "last"), ("--agg", "min-all"), ("--member", "random")]
NUMBERS += [("--members", 2), ("--model-steps", 1), ("--model-layers", 1), ("--model-hidden", 12)]
NUMBERS += [("--model-lr", 1e-2), ("--model-batch", 12), ("--model-updates", 2), ("--model-warm-up", 9)]
NUMBERS += [("--model-ready", 0), ("--model-updates", 0)]
LOOP = "env_id env_kwargs total_timesteps eval_every eval_episodes checkpoint_every runs_dir resume device"
LOOP += " num_threads env_threads preset cuda_graphs"


@long
def test_every_option_changes_what_is_learned(tmp_path):
    named = {flag[2:].replace("-", "_") for flag, _ in NUMBERS}
    every = {field.name for field in dataclasses.fields(m.Args)}
    assert every - named == {*LOOP.split(), "capture_video"}
    base = torch.load(run(NAME, tmp_path / "base") / "final.pt", weights_only=True)["agent"]
    for flag in NUMBERS:
        other = torch.load(run(NAME, tmp_path / "other", *flag) / "final.pt", weights_only=True)["agent"]
        pairs = zip(base["actor"].values(), other["actor"].values(), strict=True)
        assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in pairs), flag


def test_presets():
    """The printed sizes; a flag overrides them; a resumed run keeps its own."""
    fetch = m.parse(["--preset", "fetch", "--model-batch", "7"])
    assert (fetch.num_envs, fetch.hidden, fetch.batch_size, fetch.model_layers) == (16, 256, 1024, 4)
    assert fetch.env_threads == 2 and m.parse([]).env_threads == 1
    assert fetch.model_batch == 7 and m.parse([]).num_envs == 2
    assert all(hasattr(m.Args, name) for values in m.SIZES_OF_PRESETS.values() for name in values)


def test_video(tmp_path):
    pytest.importorskip("moviepy")
    folder = run(NAME, tmp_path, "--capture-video", "--eval-every", 200)
    videos = sorted(path.parent.name for path in (folder / "videos").glob("*/*.mp4"))
    assert videos == ["step-0", "step-200", "step-300"]


@long
def test_it_learns(tmp_path):
    """The default run, cut to 8 000 steps: from hardly ever to most of 50 goals (seed 1: 0.02 and 0.7)."""
    flags = ["--total-timesteps", 8_000, "--eval-every", 8_000, "--eval-episodes", 50, "--num-threads", 1]
    folder = m.train_episodic(m.parse([str(x) for x in (*flags, "--runs-dir", tmp_path)]))
    rates = [float(row[4]) for row in evaluations(folder)[1:]]
    assert rates[0] < 0.2 and rates[-1] > 0.4


# ---------------------------------------------------------------- bad input

BAD = [
    (("--env-id", "NoSuchTask-v0"), ("--env-id NoSuchTask-v0", "can be made")),
    (("--env-id", "InvertedPendulum-v5"), ("--env-id InvertedPendulum-v5", "a goal task")),
    (("--env-id", "tests.tasks:Elsewhere-v0"), ("achieved_goal is a part",)),
    (("--env-id", "tests.tasks:OtherReward-v0"), ("rewarded by the distance",)),
    (("--env-id", "tests.tasks:GoalEnds-v0"), ("never terminates",)),
    (("--env-id", "tests.tasks:GoalDiscrete-v0"), ("bounded, continuous Box",)),
    (("--env-id", "tests.tasks:GoalNan-v0"), ("reward must be finite",)),
    (("--horizon", -1), ("--horizon -1", "must be in [0")),
    (("--env-threads", 0), ("--env-threads 0", "must be in [1, 1024]")),
    (("--batch-size", 61), ("--batch-size 61", "--learning-starts 60")),
    (("--buffer-size", 150), ("--buffer-size 150", "at least 200")),
    (("--model-steps", 51), ("--model-steps 51", "at most 50")),
    (("--agg", "median"), ("min", "mean", "last")),
    (("--agg", "min-all", "--member", "random"), ("--agg min-all", "--member random")),
    (("--runs-dir", "/proc/nowhere"), ("--runs-dir", "can be written")),
    (("--total-timesteps", 60), ("--learning-starts 60", "below --total-timesteps")),
]


@pytest.mark.parametrize(("flags", "words"), BAD)
def test_bad_input_is_one_line_and_leaves_nothing(flags, words, tmp_path, capsys, monkeypatch):
    flags = (*flags, "--runs-dir", tmp_path / "runs") if "--runs-dir" not in flags else flags
    lines = fails(NAME, tiny(NAME, *flags), capsys, monkeypatch).splitlines()
    lines = [line for line in lines if "Warning" not in line and "warn" not in line]
    assert len(lines) == 1 and all(word in lines[0] for word in words), lines
    assert not (tmp_path / "runs").exists()


def test_fetch_without_its_package(tmp_path):
    """One line that says what to install."""
    (tmp_path / "gymnasium_robotics.py").write_text("raise ImportError('not here')")
    import os

    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = shell(
        NAME, *tiny(NAME, "--env-id", "FetchReach-v4", "--runs-dir", tmp_path / "r"), env=environment
    )
    assert result.returncode == 2 and "pip install gymnasium-robotics" in result.stderr


def test_non_finite_agent_keeps_its_last_checkpoint(tmp_path):
    """A step size that explodes: exit by RunFailed, the step and the tensor named."""
    args = m.parse(tiny(NAME, "--runs-dir", tmp_path, "--critic-lr", 1e38, "--actor-lr", 1e38))
    with pytest.raises(m.RunFailed, match=r"step \d+"):
        m.train_episodic(args)
    (folder,) = tmp_path.iterdir()
    saved = m.load_checkpoint(folder)
    assert all(torch.isfinite(x).all() for x in saved["agent"]["critic"].values())
