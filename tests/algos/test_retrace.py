"""Retrace: windows inside one episode, ratios of policies, and the corrected target in closed form."""

import math

import numpy as np
import pytest
import torch

from tests.algos.test_math import GAMMA, K, P, column, exact_critic, filled_buffer, recorded
from tests.conftest import load, run, tiny
from tests.tasks import RHO, A, B, Q

ret = load("sac_retrace")


def rows(*values: float) -> torch.Tensor:
    """One column per value, [len, 1]."""
    return torch.tensor(values, dtype=torch.float64)[:, None]


def make_agent(*flags: object):
    return ret.Agent(ret.parse(tiny("sac_retrace", *flags)), 1, 1, torch.device("cpu"))


def test_retrace_by_hand():
    """γ = ½, α = 0.1, log π = −1: G₁ = 3 + ½ · 8.1 = 7.05, G₀ = 1 + ½ (6 + ½ (7.05 − 4) + 0.1) = 4.8125."""
    y = ret.retrace(rows(1, 3), rows(0, 0), rows(6, 8), rows(-1, -1), rows(4), rows(0.5), column(0.1), 0.5)
    assert y.item() == pytest.approx(4.8125, abs=1e-12)


def test_without_trace_the_target_is_that_of_one_step():
    step = (rows(1, 3), rows(0, 0), rows(6, 8), rows(-1, -1))
    y = ret.retrace(*step, rows(4), rows(0), column(0.1), 0.5)
    assert torch.equal(y, ret.soft_target(*(x[0] for x in step), column(0.1), 0.5))


def test_trusted_steps_sum_the_rewards():
    """c = 1, Q̄ = v = 0: discounted sum of rewards; a terminated step pays and nothing after it counts."""
    zero = rows(0, 0, 0)
    y = ret.retrace(rows(1, 2, 4), zero, zero, zero, zero[1:], rows(1, 1), column(0.0), 0.5)
    assert y.item() == pytest.approx(1 + 1 + 1)
    y = ret.retrace(rows(1, 2, 4), rows(0, 1, 0), zero, zero, zero[1:], rows(1, 1), column(0.0), 0.5)
    assert y.item() == pytest.approx(1 + 1)


@pytest.mark.parametrize("added", [5, 20, 33])
def test_windows_stay_in_their_episode(added):
    """Against a search in the list of transitions, also where the ring has wrapped."""
    buffer = ret.ReplayBuffer(20, 1, 1, torch.device("cpu"))
    for i in range(added):
        buffer.add([float(i)], [0.0], 0.0, [i + 1.0], False, i // 4)
    first = torch.arange(buffer.size)
    places, linked = ret.windows(buffer, first, 4)
    assert linked[0].all() and torch.equal(places[0], first)
    for b, number in enumerate(buffer.rows[: buffer.size, 0].int().tolist()):
        for k in range(4):
            same = number + k < added and (number + k) // 4 == number // 4
            assert linked[k, b] == same
            assert not same or buffer.rows[places[k, b], 0] == number + k


def test_one_episode_longer_than_the_ring():
    """The newest step is not followed by the oldest one."""
    buffer = ret.ReplayBuffer(6, 1, 1, torch.device("cpu"))
    for i in range(8):
        buffer.add([float(i)], [0.0], 0.0, [i + 1.0], False, 0)
    places, linked = ret.windows(buffer, torch.arange(6), 3)
    newest = 1  # place of transition 7
    assert linked[:, newest].tolist() == [True, False, False]
    assert linked[:, 2].all() and buffer.rows[places[:, 2], 0].tolist() == [2.0, 3.0, 4.0]


@pytest.mark.parametrize("mean", [0.3, 6.0])
def test_log_prob_of_recorded_actions(mean):
    """The density that sampling reports, as far as float32 can undo tanh."""
    agent, obs = make_agent(), torch.randn(500, 1)
    agent.actor.layers[2].bias.data[:1] = mean
    action, log_prob = agent.actor.sample(obs)
    found, inside = agent.log_prob(obs, action), action.squeeze(1).abs() < 0.99
    assert torch.isfinite(found).all()
    assert torch.allclose(found[inside], log_prob[inside].detach(), atol=1e-3)
    assert (mean == 6.0) == ((~inside).float().mean() > 0.9)


def test_unchanged_policy_is_trusted_even_where_actions_saturate(monkeypatch):
    """Stored and replayed by the same weights: c = 1 at actions of exactly ±1 too."""
    agent = make_agent("--horizon", 2, "--learning-starts", 16)
    agent.actor.layers[2].bias.data[:1] = 12.0
    buffer, obs = ret.BehaviourReplay(60, 1, 1, torch.device("cpu"), agent), np.zeros(1, np.float32)
    for i in range(60):
        obs = np.float32([np.sin(i)])
        buffer.add(obs, agent.act(obs), 0.0, np.float32([np.sin(i + 1)]), False, 0)
    assert (buffer.rows[:, 1] == 1).any()
    buffer.sample = lambda batch_size: torch.arange(20, 50)
    calls = recorded(monkeypatch, ret, "retrace")
    agent.update(buffer, 61)
    assert torch.allclose(calls[0][5], torch.ones(2, 30), atol=1e-4)


def test_densities_are_those_of_the_policy_that_acted(tmp_path, monkeypatch):
    """Warm-up: uniform, −m log 2. After it: recomputed with the weights that chose the action."""
    acted, stored = [], []
    original_act, original_add = ret.Agent.act, ret.BehaviourReplay.add

    def act(self, obs, deterministic=False):
        action = original_act(self, obs, deterministic)
        if not deterministic:
            acted.append(self.log_prob(torch.as_tensor(obs)[None], torch.as_tensor(action)[None]).item())
        return action

    def add(self, *transition):
        original_add(self, *transition)
        stored.append(self.log_mu[(self.added - 1) % self.capacity].item())

    monkeypatch.setattr(ret.Agent, "act", act)
    monkeypatch.setattr(ret.BehaviourReplay, "add", add)
    run("sac_retrace", tmp_path)
    assert stored[:60] == [pytest.approx(-math.log(2))] * 60
    assert stored[60:] == acted and len(acted) == 240 and np.std(acted) > 0.01


def lqr_target(monkeypatch, horizon: int, critic, off_policy: float = 0.0, *flags: object) -> float:
    """What update() regresses on for the pair (1, 0.3), first of an episode recorded with a = −K s + off."""
    agent = make_agent("--horizon", horizon, "--gamma", GAMMA, "--init-alpha", 1e-8, *flags)
    agent.actor.double(), agent.critic.double(), agent.critic_target.double()
    real = agent.actor.sample
    policy = lambda obs: (-K * obs, torch.zeros(len(obs), dtype=torch.float64))
    agent.actor.sample = lambda obs: policy(obs) if not torch.is_grad_enabled() else real(obs)
    agent.critic_target.forward = lambda obs, action: torch.stack([critic(obs, action)] * 2)
    agent.log_prob = lambda obs, action: torch.zeros(len(obs), dtype=torch.float64)
    buffer = ret.BehaviourReplay(24, 1, 1, torch.device("cpu"), agent)
    buffer.rows = buffer.rows.double()
    state, action, table = 1.0, 0.3, []
    for _ in range(24):
        following = A * state + B * action
        table.append([state, action, -(Q * state**2 + RHO * action**2), following, 0.0])
        buffer.add([state], [action], 0.0, [following], False, 0)
        state, action = following, -K * following + off_policy
    buffer.rows[:] = torch.tensor(table, dtype=torch.float64)
    buffer.log_mu[:] = 0
    buffer.sample = lambda batch_size: torch.zeros(batch_size, dtype=torch.long)
    calls = recorded(monkeypatch, ret, "twin_loss")
    agent.update(buffer, 61)
    return calls[0][1][0].item()


@pytest.mark.parametrize("horizon", [0, 1, 2, 5, 20])
def test_on_policy_lqr_target_is_exact_for_every_horizon(monkeypatch, horizon):
    assert lqr_target(monkeypatch, horizon, exact_critic) == pytest.approx(-2.8124454383, abs=1e-9)


@pytest.mark.parametrize("horizon", [1, 2, 5])
def test_off_policy_lqr_target_is_exact_with_the_exact_critic(monkeypatch, horizon):
    """Recorded actions a = −K s + 0.5 are not the policy's: the correction takes their reward out again."""
    target = lqr_target(monkeypatch, horizon, exact_critic, 0.5)
    assert target == pytest.approx(-2.8124454383, abs=1e-9)


@pytest.mark.parametrize(
    ("horizon", "expected"), [(0, -1.009), (1, -2.017126), (2, -2.4617095660), (5, -2.7823641830)]
)
def test_zero_critic_leaves_the_recorded_rewards(monkeypatch, horizon, expected):
    target = lqr_target(monkeypatch, horizon, lambda obs, action: 0 * obs[:, 0])
    assert target == pytest.approx(expected, abs=1e-9)


def test_lambda_scales_the_trace(monkeypatch):
    """Q̄ = 0, H = 1: r₀ + γ λ r₁."""
    zero = lambda obs, action: 0 * obs[:, 0]
    targets = [lqr_target(monkeypatch, 1, zero, 0.0, "--trace-lambda", lam) for lam in (0.0, 0.5, 1.0)]
    assert targets == pytest.approx([-1.009, -1.009 - 0.504063, -2.017126], abs=1e-9)


def test_unlikely_actions_cut_the_window(monkeypatch):
    """c = min(1, π/μ): an action twice as likely now counts once, one half as likely counts half."""
    for shift, trace in ((math.log(2), 1.0), (-math.log(2), 0.5)):
        agent = make_agent("--horizon", 1)
        buffer = filled_like(agent)
        buffer.log_mu[: buffer.size] = agent.log_prob(buffer.rows[:, :1], buffer.rows[:, 1:2]) - shift
        buffer.sample = lambda batch_size, size=buffer.size: torch.arange(size)
        calls = recorded(monkeypatch, ret, "retrace")
        agent.update(buffer, 61)
        found = calls[-1][5]
        assert torch.allclose(found[found > 0], torch.full_like(found[found > 0], trace), atol=1e-4)
        assert (found == 0).any() and (found > 0).any()  # at the ends of episodes, and elsewhere


def filled_like(agent):
    """A BehaviourReplay with the transitions of test_math.filled_buffer."""
    plain = filled_buffer(ret)
    buffer = ret.BehaviourReplay(plain.capacity, 1, 1, torch.device("cpu"), agent)
    buffer.rows, buffer.episode, buffer.added = plain.rows, plain.episode, plain.added
    return buffer


def test_value_of_the_policy():
    """The exact critic at the policy's own action is −P s²: the closed forms above mean what they say."""
    obs = torch.tensor([[0.7], [-1.2]], dtype=torch.float64)
    assert torch.allclose(exact_critic(obs, -K * obs), -P * obs[:, 0] ** 2)
