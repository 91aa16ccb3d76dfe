"""STEVE: candidates, weights, targets in closed form, one member per datum, schedule, the tabular chain."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch

from tests.algos.test_math import GAMMA, K, P, filled_buffer, recorded
from tests.conftest import evaluations, load, long, run, scalars, tiny
from tests.tasks import RHO, A, B, Q

steve = load("steve")
D = torch.float64


def make_agent(obs_dim: int = 1, action_dim: int = 1, **changes):
    args = steve.parse(tiny("steve"))
    for name, value in changes.items():
        setattr(args, name, value)
    return steve.Agent(args, obs_dim, action_dim, torch.device("cpu"))


def full(value: float, *size: int) -> torch.Tensor:
    return torch.full(size, value, dtype=D)


# ---------------------------------------------------------------- weights


def spread(mean: float, var: float) -> list[float]:
    """Two samples with this mean and population variance."""
    return [mean - math.sqrt(var), mean + math.sqrt(var)]


def target(targets: torch.Tensor, reduction: str = "stev", td_lambda: float = 0.25) -> torch.Tensor:
    return (steve.horizon_weights(targets, reduction, td_lambda) * targets.mean(1)).sum(0)


def test_inverse_variance_by_hand():
    """Means 1, 2, 4 of variances 1, 0.5, 0.25: weights 1/7, 2/7, 4/7, target 3."""
    samples = torch.tensor([spread(1, 1), spread(2, 0.5), spread(4, 0.25)], dtype=D)[..., None]
    weights = steve.horizon_weights(samples, "stev", 0.25)
    assert weights[:, 0].tolist() == pytest.approx([1 / 7, 2 / 7, 4 / 7], abs=1e-7)
    assert target(samples).item() == pytest.approx(3, abs=1e-7)


def test_limits_of_the_weights():
    equal = torch.tensor([spread(1, 0.3), spread(2, 0.3), spread(6, 0.3)], dtype=D)[..., None]
    assert target(equal).item() == pytest.approx(3)
    doubtful = torch.tensor([spread(1, 1e12), spread(2, 1.0)], dtype=D)[..., None]
    assert steve.horizon_weights(doubtful, "stev", 0.25)[0].item() < 1e-11
    sure = torch.tensor([spread(1, 0), spread(2, 1.0)], dtype=D)[..., None]
    assert steve.horizon_weights(sure, "stev", 0.25)[0].item() == pytest.approx(1 - 1e-8, abs=1e-12)
    nothing = torch.ones(4, 6, 3, dtype=D)
    assert torch.allclose(steve.horizon_weights(nothing, "stev", 0.25), full(0.25, 4, 3))


@pytest.mark.parametrize("reduction", ["stev", "mean", "last", "td-lambda", "covariance"])
def test_weights_sum_to_one_and_targets_move_with_the_candidates(reduction):
    torch.manual_seed(0)
    samples = torch.randn(4, 64, 30, dtype=D) * 10
    weights = steve.horizon_weights(samples, reduction, 0.25)
    assert torch.allclose(weights.sum(0), torch.ones(30, dtype=D)) or reduction == "covariance"
    assert torch.allclose(target(samples + 5, reduction), target(samples, reduction) + 5)
    if reduction != "covariance":
        assert (weights >= 0).all()
        assert torch.allclose(target(3 * samples, reduction), 3 * target(samples, reduction))


def test_fixed_weights():
    samples = torch.randn(4, 5, 2, dtype=D)
    by = {r: steve.horizon_weights(samples, r, 0.25)[:, 0].tolist() for r in ("mean", "last", "td-lambda")}
    assert by["mean"] == [0.25] * 4 and by["last"] == [0, 0, 0, 1]
    assert by["td-lambda"] == pytest.approx([0.75, 0.1875, 0.046875, 0.015625])


def test_covariance_of_independent_horizons_is_inverse_variance():
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=3)), dtype=D).T  # uncorrelated rows
    samples = (signs * torch.tensor([1.0, 2.0, 4.0], dtype=D)[:, None])[..., None] * 100
    weights = steve.horizon_weights(samples, "covariance", 0.25)
    assert torch.allclose(weights, steve.horizon_weights(samples, "stev", 0.25), atol=1e-6)


def test_covariance_of_correlated_horizons_survives_float32():
    """Four horizons that share nearly all of a spread of 100: the same weights in both precisions."""
    torch.manual_seed(0)
    samples = 100 * torch.randn(1, 64, 20, dtype=D) + 0.1 * torch.randn(4, 64, 20, dtype=D)
    samples = samples.float()
    exact = steve.horizon_weights(samples.double(), "covariance", 0.25)
    assert torch.allclose(steve.horizon_weights(samples, "covariance", 0.25).double(), exact, rtol=1e-5)


def test_inverse_variance_is_best_for_independent_estimators():
    """Monte Carlo: the variance of the weighted mean is 1 / Σ σ⁻²."""
    torch.manual_seed(0)
    std = torch.tensor([0.5, 1.0, 2.0], dtype=D)
    draws = std[:, None] * torch.randn(3, 200_000, dtype=D)
    samples = torch.stack([draws - std[:, None], draws + std[:, None]], 1)  # each row knows its own spread
    assert target(samples).var().item() == pytest.approx(1 / (1 / std**2).sum().item(), rel=0.03)


# ---------------------------------------------------------------- candidates


def test_candidates_by_hand():
    """γ = 0.9, r = 1, ρ₁ = 2, D₁ = ½, Q̄ = 8 and 10: 8.2, 6.85, target 7.525."""
    alive = torch.stack([full(1, 1, 1), full(0.5, 1, 1)])
    q = torch.stack([full(8, 1, 1, 1), full(10, 1, 1, 1)])
    found = steve.candidates(full(1, 1), full(2, 1, 1, 1, 1), alive, q, 0.9)
    assert found.shape == (2, 1, 1, 1, 1)
    assert found.flatten().tolist() == pytest.approx([8.2, 6.85])
    assert target(found.flatten(1, 3)).item() == pytest.approx(7.525)


def test_an_ended_transition_keeps_its_reward_alone():
    """d = 1: every candidate is r, weights are equal."""
    alive, q = full(0, 4, 2, 5), torch.randn(4, 2, 3, 5, dtype=D)
    found = steve.candidates(full(1.5, 5), torch.randn(3, 2, 4, 5, dtype=D), alive, q, 0.9)
    assert found.shape == (4, 2, 4, 3, 5) and torch.equal(found, full(1.5, 4, 2, 4, 3, 5))
    assert torch.allclose(steve.horizon_weights(found.flatten(1, 3), "stev", 0.0), full(0.25, 4, 5))


def test_without_a_horizon_it_is_the_mean_over_critics():
    q = torch.randn(1, 1, 4, 6, dtype=D)
    reward, done = torch.randn(6, dtype=D), torch.tensor([0, 1, 0, 0, 1, 0], dtype=D)
    found = steve.candidates(reward, torch.zeros(0, 1, 1, 6, dtype=D), (1 - done)[None, None], q, 0.9)
    assert torch.allclose(target(found.flatten(1, 3)), reward + 0.9 * (1 - done) * q[0, 0].mean(0))


def test_every_member_meets_every_other():
    """M R L values for each horizon; permuting members changes neither mean nor variance."""
    torch.manual_seed(0)
    rewards, q = torch.randn(2, 3, 4, 5, dtype=D), torch.randn(3, 3, 2, 5, dtype=D)
    alive = torch.rand(3, 3, 5, dtype=D).cumprod(0)
    found = steve.candidates(full(1, 5), rewards, alive, q, 0.9)
    assert found.shape == (3, 3, 4, 2, 5)
    m, r, c = 2, 1, 0
    by_hand = 1 + 0.9 * alive[0, m] * rewards[0, m, r] + 0.81 * alive[1, m] * rewards[1, m, r]
    by_hand = by_hand + 0.9**3 * alive[2, m] * q[2, m, c]
    assert torch.allclose(found[2, m, r, c], by_hand)
    order = torch.tensor([2, 0, 1])
    other = steve.candidates(full(1, 5), rewards[:, order], alive[:, order], q[:, order], 0.9)
    assert torch.allclose(other.flatten(1, 3).var(1), found.flatten(1, 3).var(1))


def test_exact_models_agree_over_horizons():
    """The linear-quadratic task: every candidate of every horizon is −2.8124454383."""
    x, rewards, q = torch.tensor([A + B * 0.3], dtype=D), [], []
    for h in range(6):
        if h:
            rewards.append(-(Q * x**2 + RHO * (K * x) ** 2).expand(2, 3, 1))
            x = (A - B * K) * x
        q.append((-P * x**2).expand(2, 4, 1))
    reward = full(-(Q + RHO * 0.09), 1)
    found = steve.candidates(reward, torch.stack(rewards), full(1, 6, 2, 1), torch.stack(q), GAMMA)
    assert torch.allclose(found, full(-2.8124454383, 6, 2, 3, 4, 1), atol=1e-9)


def test_a_wrong_model_loses_its_say():
    """One transition model off by e: horizons above 0 become uncertain, the target goes to T_0."""
    torch.manual_seed(0)
    q = torch.randn(3, 4, 4, 7, dtype=D)
    q[0] = q[0, 0]
    distances, shares = [], []
    for error in (0.0, 10.0, 1e4):
        wrong = q.clone()
        wrong[1:, 2] += error
        found = steve.candidates(full(0, 7), torch.zeros(2, 4, 1, 7, dtype=D), full(1, 3, 4, 7), wrong, 0.9)
        flat = found.flatten(1, 3)
        shares.append(steve.horizon_weights(flat, "stev", 0.0)[0].min().item())
        distances.append((target(flat) - flat[0].mean(0)).abs().max().item())
    assert shares[0] < shares[1] < shares[2] and shares[2] > 0.999999
    assert distances[2] < 0.01 < distances[0]


# ---------------------------------------------------------------- first weights


def test_first_weights_of_ensembles():
    """The released call counts members into both fans: √(6 / (4 · (3 + 5))) = 0.433, one alone 0.866."""
    torch.manual_seed(0)
    for members, bound in ((4, 0.4330127), (1, 0.8660254)):
        network = steve.StackedMLP(members, [3, 5], layer_norm=False)
        weights = []
        for _ in range(200):
            steve.ensemble_xavier(network)
            weights.append(network.layers[0].weight.detach().abs().flatten())
        weights = torch.cat(weights)
        assert 0.99 * bound < weights.max() <= bound and not network.layers[0].bias.any()
        assert weights.mean().item() == pytest.approx(bound / 2, rel=0.05)


def test_every_network_starts_with_the_released_bound():
    """Half of Xavier's for four critics, models and rewards, Xavier's for the one actor."""
    torch.manual_seed(0)
    agent = make_agent(3, 2, members=4, reward_members=4, critics=4)
    for name in ("actor", "critic", "transition", "termination", "rewards"):
        for layer in getattr(agent, name).layers:
            members, inputs, outputs = layer.weight.shape
            bound = math.sqrt(6 / (inputs + outputs)) / (1 if name == "actor" else 2)
            assert 0.8 * bound < layer.weight.abs().max() <= bound and members in (1, 4)


# ---------------------------------------------------------------- imagination


@torch.no_grad()
def test_imagination_against_a_plain_loop():
    """Each model on its own trajectory; soft ends; every reward model at every step; slow critics."""
    agent = make_agent(2, 1, horizon=3, members=3, reward_members=2, critics=4)
    for module in (agent.transition, agent.termination, agent.rewards, agent.critic_target):
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    obs, ended = torch.randn(5, 2), torch.tensor([0.0, 1, 0, 0, 0])
    found = agent.imagine_all(obs, ended, 3)
    q = agent.judge_all(found)

    for m in range(3):
        s, alive = obs, 1 - ended
        a = plain(agent.actor, 0, s).tanh()
        for h in range(4):
            if h:
                after = s + plain(agent.transition, m, torch.cat([s, a], 1))
                parts = torch.cat([after, s, a], 1)
                for r in range(2):
                    paid = plain(agent.rewards, r, parts)[:, 0]
                    assert torch.allclose(found.rewards[h - 1, m, r], paid, atol=1e-5)
                alive = alive * (1 - plain(agent.termination, m, parts)[:, 0].sigmoid())
                s = after
                a = plain(agent.actor, 0, s).tanh()
            assert torch.allclose(found.obs[h, m], s, atol=1e-5)
            assert torch.allclose(found.action[h, m], a, atol=1e-5)
            assert torch.allclose(found.alive[h, m], alive, atol=1e-5)
            for l in range(4):  # noqa: E741
                value = plain(agent.critic_target, l, torch.cat([s, a], 1))[:, 0]
                assert torch.allclose(q[h, m, l], value, atol=1e-4)


def plain(network, member: int, x: torch.Tensor) -> torch.Tensor:
    """One member of a stack, layer by layer: [B, inputs] -> [B, outputs]."""
    for i, layer in enumerate(network.layers):
        x = x @ layer.weight[member] + layer.bias[member, 0]
        x = x.relu() if i < len(network.layers) - 1 else x
    return x


def in_turn(count: int, members: int, device) -> torch.Tensor:
    """Rows dealt in their order, instead of at random."""
    return torch.arange(count - count % members).view(members, -1)


def test_target_of_an_update_by_plain_loops(monkeypatch):
    """H = 2, every (m, r', l) and horizon one by one, with slow critics that differ, mixed terminations."""
    agent = make_agent(2, 1, horizon=2, members=2, reward_members=3, critics=2, batch_size=10, gamma=0.9)
    buffer, losses = filled_buffer(steve, obs_dim=2), recorded(monkeypatch, steve, "half_squared_error")
    buffer.sample = lambda count: torch.arange(5, 15)  # row 9 terminated
    monkeypatch.setattr(steve, "deal", in_turn)
    agent.fit_ensembles = lambda batch: {}
    with torch.no_grad():
        for module in (agent.transition, agent.termination, agent.rewards, agent.critic_target):
            for parameter in module.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    policy = copy.deepcopy(agent.actor)
    agent.update(buffer, 61)
    batch, found = buffer[torch.arange(5, 15)], losses[0][1]
    for row in range(10):
        by_horizon = [[], [], []]
        for m, r, c in itertools.product(range(2), range(3), range(2)):
            s, alive = batch.next_obs[row][None], 1 - batch.terminated[row].item()
            total = batch.reward[row].item()
            for h in range(3):
                a = plain(policy, 0, s).tanh()
                end = alive * plain(agent.critic_target, c, torch.cat([s, a], 1)).item()
                by_horizon[h].append(total + 0.9 ** (h + 1) * end)
                after = s + plain(agent.transition, m, torch.cat([s, a], 1))
                step = torch.cat([after, s, a], 1)
                total += 0.9 ** (h + 1) * alive * plain(agent.rewards, r, step).item()
                alive, s = alive * (1 - plain(agent.termination, m, step).sigmoid().item()), after
        weights = [1 / (np.var(values) + 1e-8) for values in by_horizon]
        expected = sum(w * np.mean(v) for w, v in zip(weights, by_horizon, strict=True)) / sum(weights)
        assert found.flatten()[row].item() == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert found.shape == (2, 5) and batch.terminated.sum() == 1


def test_losses_of_the_models_by_hand(monkeypatch):
    """(6) with three observations: sums over them, means over rows; the decay pulls biases too."""
    agent = make_agent(3, 2, members=2, reward_members=3, batch_size=12, weight_decay=0.5)
    buffer = filled_buffer(steve, obs_dim=3, action_dim=2)
    monkeypatch.setattr(steve, "deal", in_turn)
    batch, before = buffer[torch.arange(12)], {}
    x = torch.cat([batch.obs, batch.action], 1)
    for name in ("transition", "rewards", "termination"):
        before[name] = copy.deepcopy(getattr(agent, name))
    found = agent.fit_ensembles(batch)
    moved = paid = ended = 0.0
    for row in range(12):
        member, payer = row // 6, row // 4
        delta = plain(before["transition"], member, x[row][None])[0]
        step = torch.cat([batch.next_obs[row], x[row]])[None]
        logit = plain(before["termination"], member, step)[0, 0]
        moved = moved + 0.5 * (batch.next_obs[row] - batch.obs[row] - delta).square().sum() / 12
        paid = paid + 0.5 * (batch.reward[row] - plain(before["rewards"], payer, step)[0, 0]).square() / 12
        chance = logit.sigmoid()
        ended = ended - (chance if batch.terminated[row] else 1 - chance).log() / 12
    expected = {"transition": moved, "reward": paid, "termination": ended}
    for name, loss in expected.items():
        assert found[f"model/{name}_loss"].item() == pytest.approx(loss.item(), rel=1e-4)
    moved.backward()
    for old, new in zip(before["transition"].parameters(), agent.transition.parameters(), strict=True):
        first_moment = agent.model_optimizer.state[new]["exp_avg"]
        assert torch.allclose(first_moment, 0.1 * (old.grad + 0.5 * old.detach()), atol=1e-6)


def test_each_datum_trains_one_critic(monkeypatch):
    """Four critics share a batch of 16: each has its own quarter, and its gradient comes from that alone."""
    agent = make_agent(critics=4, batch_size=16, horizon=0)
    losses = recorded(monkeypatch, steve, "half_squared_error")
    agent.update(filled_buffer(steve), 61)
    q, y = losses[0]
    assert q.shape == y.shape == (4, 4) and not y.requires_grad
    q = agent.pair_values(torch.randn(4, 4, 1), torch.randn(4, 4, 1))
    (gradient,) = torch.autograd.grad(q[1].sum(), agent.critic.layers[0].weight)
    assert [bool(g.abs().sum() > 0) for g in gradient] == [False, True, False, False]


def test_dealing_is_even_and_random():
    first, second = (steve.deal(17, 4, torch.device("cpu")) for _ in range(2))
    assert first.shape == (4, 4) and len(first.unique()) == 16 and not torch.equal(first, second)


def test_each_datum_trains_one_model_of_a_kind(monkeypatch):
    agent, seen = make_agent(members=4, reward_members=2, batch_size=16), {}
    for name in ("transition", "rewards", "termination"):
        model = getattr(agent, name)
        forward = model.forward
        model.forward = lambda x, n=name, f=forward: (seen.setdefault(n, x), f(x))[1]
    agent.fit_ensembles(filled_buffer(steve)[torch.arange(16)])
    assert {n: tuple(x.shape) for n, x in seen.items()} == {
        "transition": (4, 4, 2), "rewards": (2, 8, 3), "termination": (4, 4, 3)
    }  # fmt: skip
    assert not torch.equal(seen["termination"][..., 1:], seen["transition"])  # dealt anew


def test_gradients_stay_with_their_own_networks():
    agent = make_agent(2, 1, critics=2, horizon=2)
    buffer = filled_buffer(steve, obs_dim=2)
    agent.update(buffer, 62)
    for module in (agent.transition, agent.termination, agent.rewards):
        assert all(p.grad is not None for p in module.parameters())
    assert all(p.grad is None for p in agent.critic_target.parameters())
    models = [p.detach().clone() for p in agent.transition.parameters()]
    agent.fit_ensembles = lambda batch: {}
    agent.update(buffer, 63)
    assert all(torch.equal(a, b) for a, b in zip(models, agent.transition.parameters(), strict=True))


def test_actor_climbs_the_mean_of_all_critics(monkeypatch):
    """And pays for large μ: with a huge weight they shrink."""
    sizes = []
    for weight in (0.0, 1e4):
        torch.manual_seed(0)
        agent = make_agent(mean_penalty=weight, actor_lr=1e-2, horizon=0)
        for step in range(61, 121):
            agent.update(filled_buffer(steve), step)
        sizes.append(agent.actor(torch.randn(50, 1)).abs().mean().item())
    assert sizes[1] < 0.05 < sizes[0]
    agent, calls = make_agent(critics=3, horizon=0), []
    forward = agent.critic.forward
    agent.critic.forward = lambda o, a, frozen=False: (calls.append(frozen), forward(o, a, frozen))[1]
    agent.update(filled_buffer(steve), 61)
    assert calls == [True]  # the only call through all critics; theirs go by pairs


def test_slow_critics_are_copied_at_their_interval(monkeypatch):
    agent, moved = make_agent(target_interval=3, updates_per_step=2), recorded(monkeypatch, steve, "polyak")
    counts = []
    for step in range(61, 67):
        agent.update(filled_buffer(steve), step)
        counts.append(len(moved))
    assert counts == [0, 1, 2, 2, 3, 4]
    assert all(a is agent.critic_target and b is agent.critic and tau == 1 for a, b, tau in moved)
    assert all(
        torch.equal(a, b)
        for a, b in zip(agent.critic_target.parameters(), agent.critic.parameters(), strict=True)
    )


def test_exploration_by_dimension():
    agent = make_agent(1, 20_000, explore_chance=0.05, hidden=4)
    obs = np.ones(1, np.float32)
    calm = agent.act(obs, deterministic=True)
    changed = agent.act(obs) != calm
    assert changed.mean() == pytest.approx(0.05, abs=0.01)
    before = np.arctanh(agent.act(obs)) - np.arctanh(calm)  # the noise is on what the tanh squashes
    noise = before[np.abs(before) > 1e-4]
    assert noise.std() == pytest.approx(1, abs=0.08) and abs(noise.mean()) < 0.1
    agent.args.explore_chance = 0.0
    assert np.array_equal(agent.act(obs), calm) and np.abs(calm).max() <= 1


def test_models_warm_up_once():
    agent, fits = make_agent(model_warm_up=7, updates_per_step=2), []
    agent.fit_ensembles = lambda batch: fits.append(1) or {}
    agent.update(filled_buffer(steve), 61)
    assert len(fits) == 9
    agent.update(filled_buffer(steve), 62)
    assert len(fits) == 11


@torch.no_grad()
def test_tdk_targets_are_what_remains():
    """At s_j the rest of the longest target, given that s_j is reached; weighted by the chance of that."""
    agent = make_agent(1, 1, horizon=2, members=1, reward_members=1, critics=1, tdk=True, gamma=0.5)
    one = torch.ones(1, 4, 1)
    chances, paid = torch.tensor([0.8, 0.4, 0.2]), torch.tensor([2.0, 4.0])
    imagined = steve.Imagination(
        torch.stack([0 * one, one, 2 * one]), torch.stack([one, one, one]),
        paid[:, None, None, None].expand(2, 1, 1, 4), chances[:, None, None].expand(3, 1, 4),
    )  # fmt: skip
    q_end = torch.full((3, 1, 1, 4), 8.0)
    agent.pair_values = lambda obs, action: torch.zeros(obs.shape[:2])
    # y(s_1) = 4 + ½ · ½ · 8 = 6, reached with 0.4;  y(s_0) = 2 + ½ · ½ · 6 = 3.5, reached with 0.8
    expected = 0.5 * (0.4 * 6**2 + 0.8 * 3.5**2)
    assert agent.tdk_losses(imagined, q_end).item() == pytest.approx(expected, rel=1e-5)


def test_models_are_averaged_before_the_square():
    """Models whose Q is 1 and 3 and whose targets are 4 and 0: means 2 and 2, no loss; squares each by each
    would be ½ (9 + 9) / 2. Means 2 and 5, reached with ¼ and ¾: ½ · ½ · 9."""
    q = torch.tensor([[1.0], [3.0]])
    assert steve.mean_over_models_loss(q, torch.tensor([[4.0], [0.0]]), torch.ones(2, 1)).item() == 0
    reached = torch.tensor([[0.25], [0.75]])
    assert steve.mean_over_models_loss(q, torch.tensor([[4.0], [6.0]]), reached).item() == 2.25


@torch.no_grad()
def test_tdk_of_ensembles_by_plain_loops(monkeypatch):
    """Two models, rewards and critics: means over r', l and, before the square, m; a critic for each row."""
    agent = make_agent(1, 1, horizon=2, members=2, reward_members=2, critics=2, tdk=True, gamma=0.5)
    torch.manual_seed(0)
    obs, action = torch.randn(3, 2, 4, 1), torch.randn(3, 2, 4, 1)
    alive, paid = torch.rand(3, 2, 4).cumprod(0), torch.randn(2, 2, 2, 4)
    q_end = torch.randn(3, 2, 2, 4)
    monkeypatch.setattr(steve, "deal", in_turn)
    critics = torch.tensor([1.0, -2.0])[:, None]
    agent.pair_values = lambda obs, action: critics * (obs + 3 * action).squeeze(2)
    total = 0.0
    for j in range(2):
        for b in range(4):
            found, targets = [], []
            for m in range(2):
                last = 0.5 * (alive[2, m, b] / alive[1, m, b]) * q_end[2, m, :, b].mean()
                target = paid[1, m, :, b].mean() + last  # of s_1
                if j == 0:
                    target = paid[0, m, :, b].mean() + 0.5 * (alive[1, m, b] / alive[0, m, b]) * target
                targets.append(target)
                found.append(critics[b // 2, 0] * (obs[j, m, b, 0] + 3 * action[j, m, b, 0]))
            error = sum(found) / 2 - sum(targets) / 2
            total += 0.5 * alive[j, :, b].mean() * error**2 / 4
    found = agent.tdk_losses(steve.Imagination(obs, action, paid, alive), q_end)
    assert found.item() == pytest.approx(total.item(), rel=1e-4)


def test_tdk_divides_by_all_pairs(monkeypatch):
    """The critics' loss is the mean over the H + 1 kinds of pairs."""
    agent = make_agent(horizon=2, reduction="last", tdk=True)
    losses = recorded(monkeypatch, steve, "half_squared_error")
    agent.fit_ensembles = lambda batch: {}
    agent.tdk_losses = lambda imagined, q_end: torch.tensor(30.0)
    found = agent.update(filled_buffer(steve), 61)["losses/qf_loss"].item()
    q, y = losses[0]
    assert found == pytest.approx((0.5 * (q - y).square().mean().item() + 30) / 3, rel=1e-5)


def test_what_is_logged(tmp_path):
    found = scalars(run("steve", tmp_path, "--horizon", 2))
    for tag in ("expansion/weight_0", "expansion/weight_2", "expansion/deviation_1", "model/reward_loss"):
        assert len(found[tag]) == 12
    sums = [sum(found[f"expansion/weight_{h}"][k].value for h in range(3)) for k in range(12)]
    assert sums == pytest.approx([1] * 12, abs=1e-5)
    plain = scalars(run("steve", tmp_path / "0", "--horizon", 0))
    assert not any(tag.startswith("model/") for tag in plain)


def test_presets():
    released = steve.parse(["--preset", "released", "--total-timesteps", "100000", "--model-hidden", "64"])
    assert (released.batch_size, released.updates_per_step, released.model_layers) == (512, 4, 7)
    assert released.model_hidden == 64 and steve.parse([]).updates_per_step == 1


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--tdk"], "--tdk True: must be off but for --reduction last"),
        (["--tdk", "--reduction", "last", "--horizon", "0"], "--tdk True: must be off"),
        (["--batch-size", "3", "--critics", "4"], "--batch-size 3: must be at least 4"),
        (["--explore-chance", "2"], "--explore-chance 2.0: must be in [0, 1]"),
    ],
)
def test_contradictions_are_refused(flags, text):
    with pytest.raises(steve.BadInput) as error:
        steve.parse([*tiny("steve"), *flags])
    assert text in str(error.value)


@long
def test_learns_the_linear_quadratic_task(tmp_path):
    flags = "--env-id tests.tasks:LQR-v0 --total-timesteps 2500 --eval-every 2500 --batch-size 64 --hidden 64"
    flags += (
        " --learning-starts 500 --num-threads 1 --device cpu --actor-lr 1e-3 --critic-lr 1e-3 --model-lr 1e-3"
    )
    flags += f" --horizon 1 --target-interval 50 --model-hidden 64 --model-layers 2 --runs-dir {tmp_path}"
    returns = [float(row[1]) for row in evaluations(steve.train(steve.parse(flags.split())))[1:]]
    assert returns[0] < -20 and returns[-1] > -10
