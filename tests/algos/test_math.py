"""Closed forms: what each loss and target must be, to all digits, and where gradients may go."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from tests.conftest import load, long, tiny
from tests.tasks import RHO, A, B, Q

sac, mve = load("sac"), load("sac_mve")
K, GAMMA = 0.4, 0.9  # policy a = −K s and discount of the linear-quadratic closed forms
P = (Q + RHO * K**2) / (1 - GAMMA * (A - B * K) ** 2)  # its value is −P s²


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def make_agent(name: str, *flags: object, obs_dim: int = 1, action_dim: int = 1):
    module = load(name)
    args = module.parse(tiny(name, *flags))
    return module.Agent(args, obs_dim, action_dim, torch.device("cpu"))


def filled_buffer(
    module, rows: int = 200, obs_dim: int = 1, action_dim: int = 1, seed: int = 0, episode_length: int = 7
):
    """Random linear transitions; every 10th step terminates."""
    rng = np.random.default_rng(seed)
    buffer = module.ReplayBuffer(rows, obs_dim, action_dim, torch.device("cpu"))
    for i in range(rows):
        obs, action = rng.normal(size=obs_dim), rng.uniform(-1, 1, action_dim)
        buffer.add(
            obs,
            action,
            float(-(obs**2).sum()),
            0.9 * obs + 0.5 * action.mean(),
            i % 10 == 9,
            i // episode_length,
        )
    return buffer


def played_buffer(module, agent, rows: int = 200):
    """The agent's own kind of replay, filled by its policy on a task whose states end at |s| > 1.5."""
    env = module.make_env("tests.tasks:Cliff-v0")
    buffer, episode = agent.make_buffer(rows, env), 0
    obs, _ = env.reset(seed=0)
    for _ in range(rows):
        action = agent.act(obs)
        next_obs, reward, terminated, truncated, _ = env.step(action)
        buffer.add(obs, action, reward, next_obs, terminated, episode)
        episode += terminated or truncated
        obs = env.reset()[0] if terminated or truncated else next_obs
    return buffer


def recorded(monkeypatch, module, name: str) -> list[tuple]:
    """The arguments of every later call of module.<name>, which still does its work."""
    calls, original = [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args: (calls.append(args), original(*args))[1])
    return calls


# ---------------------------------------------------------------- soft actor-critic


@pytest.mark.parametrize(("done", "expected"), [(0.0, 11.098), (1.0, 1.0)])
def test_soft_target_of_one_step(done, expected):
    """r = 1, γ = 0.99, Q̄ = (10, 12), α = 0.2, log π = −1; the minimum is taken by the caller."""
    next_q = torch.tensor([[10.0], [12.0]], dtype=torch.float64).amin(0)
    target = sac.soft_target(column(1.0), column(done), next_q, column(-1.0), column(0.2), 0.99)
    assert target.item() == pytest.approx(expected, abs=1e-12)


def test_squashed_log_prob_at_the_centre():
    zero = torch.zeros(1, 1, dtype=torch.float64)
    assert sac.squashed_log_prob(zero, zero, zero).item() == pytest.approx(-0.918939, abs=1e-6)


def test_squashed_log_prob_is_exact_where_tanh_saturates():
    """u = 10: log(1 − tanh² u) = −18.613706; through 1 − a² + 1e-6 it would stick at −13.8."""
    zero, u = torch.zeros(1, 1), torch.full((1, 1), 10.0)
    log_prob = sac.squashed_log_prob(zero, zero, u)
    assert log_prob.item() == pytest.approx(-0.918939 + 18.613706, abs=1e-5)
    assert sac.squashed_log_prob(zero, zero, torch.full((1, 1), -10.0)).item() == pytest.approx(
        log_prob.item(), abs=1e-5
    )


def test_squashed_density_integrates_to_one():
    """∫ π(a) da over [−1, 1] for μ = 0.3, σ = 0.7, and the sum over two independent dimensions."""
    a = torch.linspace(-1, 1, 200_001, dtype=torch.float64)[1:-1, None]
    u, log_std = a.atanh(), torch.full_like(a, math.log(0.7))
    density = sac.squashed_log_prob((u - 0.3) / 0.7, log_std, u).exp()
    assert density.sum().item() * 1e-5 == pytest.approx(1.0, abs=1e-4)
    pair = [x[:5].repeat(1, 2) for x in ((u - 0.3) / 0.7, log_std, u)]
    assert torch.allclose(sac.squashed_log_prob(*pair), 2 * density[:5].log())


def test_actor_samples_agree_with_their_log_prob():
    """E[−log π] over samples equals the entropy integrated numerically."""
    actor = sac.Actor(1, 1, 8).double()
    obs = torch.ones(200_000, 1, dtype=torch.float64)
    action, log_prob = actor.sample(obs)
    mean, log_std = (x[0, 0] for x in actor(obs[:1]))
    a = torch.linspace(-1, 1, 200_001, dtype=torch.float64)[1:-1, None]
    u = a.atanh()
    density = sac.squashed_log_prob((u - mean) / log_std.exp(), log_std.expand_as(u), u)
    entropy = -(density.exp() * density).sum().item() * 1e-5
    assert action.abs().max() < 1
    assert -log_prob.mean().item() == pytest.approx(entropy, abs=0.01)


def test_temperature_falls_while_entropy_is_above_its_target():
    log_alpha = torch.tensor(0.5, requires_grad=True)
    loss = sac.temperature_loss(log_alpha, torch.full((4,), -3.0), target_entropy=-1.0)
    loss.backward()
    assert loss.item() == pytest.approx(4 * 0.5)
    assert log_alpha.grad.item() == pytest.approx(4.0)


def test_temperature_rises_while_entropy_is_below_its_target():
    log_alpha = torch.tensor(0.0, requires_grad=True)
    sac.temperature_loss(log_alpha, torch.full((4,), 3.0), target_entropy=-1.0).backward()
    assert log_alpha.grad.item() == pytest.approx(-2.0)


def test_polyak_moves_by_tau():
    target, source = nn.Linear(2, 2), nn.Linear(2, 2)
    for parameter, value in ((target, 0.0), (source, 1.0)):
        for tensor in parameter.parameters():
            nn.init.constant_(tensor, value)
    sac.polyak(target, source, 0.005)
    assert torch.allclose(target.weight, torch.tensor(0.005))
    for _ in range(99):
        sac.polyak(target, source, 0.005)
    assert torch.allclose(target.bias, torch.tensor(1 - 0.995**100))
    assert torch.equal(source.weight, torch.ones(2, 2))


def test_twin_loss_sums_over_critics_and_averages_over_the_batch():
    q = torch.tensor([[1.0, 2.0], [3.0, 5.0]])
    assert sac.twin_loss(q, torch.tensor([1.0, 1.0])).item() == (0 + 1) / 2 + (4 + 16) / 2


def test_actor_loss_takes_the_smaller_critic_row_by_row():
    q = torch.tensor([[1.0, 5.0], [3.0, 2.0]])
    loss = sac.soft_actor_loss(q, torch.tensor([-1.0, -2.0]), torch.tensor(0.5))
    assert loss.item() == pytest.approx((-0.5 - 1 + -1.0 - 2) / 2)


def test_shapes_of_b_and_b1_never_broadcast():
    for call in (
        lambda: sac.twin_loss(torch.zeros(2, 4), torch.zeros(4, 1)),
        lambda: sac.soft_actor_loss(torch.zeros(2, 4), torch.zeros(4, 1), torch.tensor(1.0)),
        lambda: sac.soft_target(*(torch.zeros(4),) * 3, torch.zeros(4, 1), torch.tensor(1.0), 0.9),
        lambda: mve.gaussian_nll(torch.zeros(2, 4, 3), torch.zeros(2, 4, 3), torch.zeros(2, 4, 1)),
        lambda: mve.tdk_loss(torch.tensor(0.0), torch.zeros(2, 3, 4), torch.zeros(3, 4), torch.zeros(3, 1)),
    ):
        with pytest.raises(AssertionError):
            call()


def test_stacked_critics_are_two_independent_networks():
    critic = sac.Critic(3, 2, 8)
    obs, action = torch.randn(5, 3), torch.randn(5, 2)
    for i in range(2):
        x = torch.cat([obs, action], 1)
        for layer in critic.layers[:-1]:
            x = torch.relu(x @ layer.weight[i] + layer.bias[i])
        assert torch.allclose(
            critic(obs, action)[i], (x @ critic.layers[-1].weight[i] + critic.layers[-1].bias[i])[:, 0]
        )
    assert not torch.equal(critic.layers[0].weight[0], critic.layers[0].weight[1])


def test_frozen_critic_passes_its_gradient_to_the_action_only():
    critic = sac.Critic(3, 2, 8)
    action = torch.randn(5, 2, requires_grad=True)
    critic(torch.randn(5, 3), action, frozen=True).sum().backward()
    assert action.grad.abs().sum() > 0
    assert all(p.grad is None for p in critic.parameters())


def test_update_uses_the_smaller_target_critic_the_mask_and_the_entropy(replayed, monkeypatch):
    """The target inside update() against a slow loop over the batch, with everything random but fixed."""
    module = load(replayed)
    flags = ("--init-alpha", 0.3, *(("--horizon", 0) if hasattr(module.Args, "horizon") else ()))
    agent, buffer = make_agent(replayed, *flags), filled_buffer(module)
    calls = recorded(monkeypatch, module, "twin_loss")
    samples = []
    original = agent.actor.sample
    agent.actor.sample = lambda obs: samples.append((obs, *original(obs))) or samples[-1][1:]
    for parameter in agent.critic_target.parameters():
        parameter.data.mul_(1.5)  # unlike the online critics
    torch.manual_seed(3)
    agent_target = [p.clone() for p in agent.critic_target.parameters()]
    agent.update(buffer, 61)
    torch.manual_seed(3)
    batch = buffer[buffer.sample(16)]
    for target, parameter in zip(agent_target, agent.critic_target.parameters(), strict=True):
        parameter.data.copy_(target)
    (_, target), (obs, action, log_prob) = calls[0], samples[0]
    assert torch.equal(obs, batch.next_obs)
    assert 0 < batch.terminated.sum() < 16
    q1, q2 = agent.critic_target(batch.next_obs, action)
    for i in range(16):
        replayed = min(q1[i].item(), q2[i].item()) - 0.3 * log_prob[i].item()
        expected = batch.reward[i].item() + (0.0 if batch.terminated[i] else 0.99 * replayed)
        assert target[i].item() == pytest.approx(expected, abs=1e-5)


def test_target_carries_no_gradient(soft, monkeypatch):
    calls = recorded(monkeypatch, load(soft), "twin_loss")
    agent = make_agent(soft)
    agent.update(played_buffer(load(soft), agent), 61)
    q, target = calls[0]
    assert q.requires_grad and not target.requires_grad
    assert all(p.grad is None for p in agent.critic_target.parameters())


def test_each_loss_reaches_its_own_parameters_only(soft, monkeypatch):
    """One backward pass over a sum is sound only if no parameter sits in two of its terms."""
    module = load(soft)
    losses = {"critic": [], "actor": [], "alpha": []}
    actor = "expanded_value" if hasattr(module, "expanded_value") else "soft_actor_loss"
    for name, function in (("critic", "twin_loss"), ("actor", actor), ("alpha", "temperature_loss")):
        original = getattr(module, function)

        def keep(*args, original=original, name=name):
            losses[name].append(original(*args))
            return losses[name][-1]

        monkeypatch.setattr(module, function, keep)
    agent = make_agent(soft)
    agent.optimizer.step = lambda: None
    monkeypatch.setattr(torch.Tensor, "backward", lambda self: None)
    agent.update(played_buffer(module, agent), 61)
    groups = {
        "actor": agent.actor.parameters(),
        "critic": agent.critic.parameters(),
        "alpha": [agent.log_alpha],
    }
    groups = {name: list(parameters) for name, parameters in groups.items()}
    for loss, (value,) in losses.items():
        for group, parameters in groups.items():
            reached = torch.autograd.grad(value.sum(), parameters, retain_graph=True, allow_unused=True)
            assert all((g is not None) == (group == loss) for g in reached), (loss, group)


def test_one_update_equals_three_separate_ones(replayed):
    """One Adam and one backward pass against plain PyTorch: three optimisers, three gradients."""
    module = load(replayed)
    flags = ("--horizon", 0) if hasattr(module.Args, "horizon") else ()
    fused, plain = make_agent(replayed, *flags), make_agent(replayed, *flags)
    plain.load_state_dict(fused.state_dict())
    buffer = filled_buffer(module)
    torch.manual_seed(1)
    fused.update(buffer, 61)
    torch.manual_seed(1)
    batch, alpha = buffer[buffer.sample(16)], plain.log_alpha.exp().detach()
    with torch.no_grad():
        next_action, next_log_prob = plain.actor.sample(batch.next_obs)
        next_q = torch.minimum(*plain.critic_target(batch.next_obs, next_action))
        y = batch.reward + 0.99 * (1 - batch.terminated) * (next_q - alpha * next_log_prob)
    q = plain.critic(batch.obs, batch.action)
    critic_loss = nn.functional.mse_loss(q[0], y) + nn.functional.mse_loss(q[1], y)
    action, log_prob = plain.actor.sample(batch.obs)
    actor_loss = (alpha * log_prob - torch.minimum(*plain.critic(batch.obs, action))).mean()
    alpha_loss = -(plain.log_alpha * (log_prob.detach() - 1)).mean()
    parts = ((list(plain.actor.parameters()), actor_loss), (list(plain.critic.parameters()), critic_loss))
    parts += (([plain.log_alpha], alpha_loss),)
    gradients = [torch.autograd.grad(loss, parameters, retain_graph=True) for parameters, loss in parts]
    for (parameters, _), grads in zip(parts, gradients, strict=True):
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad
        torch.optim.Adam(parameters, lr=3e-4).step()
    assert fused.log_alpha.item() == pytest.approx(plain.log_alpha.item(), abs=1e-7)
    for part in ("actor", "critic"):
        for a, b in zip(getattr(fused, part).parameters(), getattr(plain, part).parameters(), strict=True):
            assert torch.allclose(a, b, atol=1e-6)


@long
def test_bandit_finds_the_closest_squashed_gaussian():
    """γ = 0, r = −(a − 0.3)², α = 0.1 fixed: the optimum in KL is μ = 0.3207, σ = 0.2515 before tanh."""
    flags = [
        "--gamma",
        0,
        "--init-alpha",
        0.1,
        "--alpha-lr",
        0,
        "--batch-size",
        256,
        "--learning-starts",
        256,
    ]
    agent = make_agent("sac", *flags, "--hidden", 64, "--actor-lr", 1e-3, "--critic-lr", 1e-3)
    buffer = sac.ReplayBuffer(4000, 1, 1, torch.device("cpu"))
    rng = np.random.default_rng(0)
    for action in rng.uniform(-1, 1, 4000):
        buffer.add([1.0], [action], -((action - 0.3) ** 2), [1.0], False, 0)
    for step in range(3000):
        if step == 2000:
            for group in agent.optimizer.param_groups:
                group["lr"] *= 0.1
        agent.update(buffer, step)
    mean, log_std = (x.item() for x in agent.actor(torch.ones(1, 1)))
    assert mean == pytest.approx(0.3207, abs=0.04)
    assert math.exp(log_std) == pytest.approx(0.2515, abs=0.03)


# ---------------------------------------------------------------- replay


def test_full_buffer_overwrites_its_oldest_rows():
    buffer = sac.ReplayBuffer(5, 2, 1, torch.device("cpu"))
    for i in range(8):
        buffer.add([i, -i], [i / 10], i, [i + 1, 0], i % 2 == 0, i // 3)
    assert buffer.size == 5
    assert buffer.rows[:, 0].tolist() == [5, 6, 7, 3, 4]
    assert buffer.episode.tolist() == [1, 2, 2, 1, 1]
    batch = buffer[torch.tensor([2])]
    assert [x.squeeze().tolist() for x in batch] == [[7, -7], pytest.approx(0.7), 7.0, [8, 0], 0.0]
    assert all(x.dtype == torch.float32 for x in batch)
    assert [tuple(x.shape) for x in batch] == [(1, 2), (1, 1), (1,), (1, 2), (1,)]


def test_sampling_is_uniform_with_replacement():
    buffer = sac.ReplayBuffer(10, 1, 1, torch.device("cpu"))
    for i in range(8):
        buffer.add([i], [0], 0, [0], False, 0)
    counts = torch.bincount(buffer.sample(80_000), minlength=10)
    assert counts[8:].sum() == 0  # rows never written are never drawn
    assert (counts[:8] - 10_000).abs().max() < 500  # 5 standard deviations


# ---------------------------------------------------------------- value expansion


def lqr_agent(monkeypatch, horizon: int, critic, *flags: object, terminate=lambda obs: torch.zeros(len(obs))):
    """sac_mve's agent with exact model, deterministic policy a = −K s and a negligible α."""
    agent = make_agent("sac_mve", "--horizon", horizon, "--gamma", GAMMA, "--init-alpha", 1e-8, *flags)
    agent.actor.double(), agent.critic.double(), agent.critic_target.double()
    real_sample = agent.actor.sample
    policy = lambda obs: (-K * obs, torch.zeros(len(obs), dtype=torch.float64))
    agent.actor.sample = lambda obs: policy(obs) if not torch.is_grad_enabled() else real_sample(obs)
    agent.critic_target.forward = lambda obs, action: torch.stack(
        [critic(obs, action), critic(obs, action) + 5]
    )
    agent.update_model = lambda buffer, step: {}
    if horizon:
        agent.model.step = lambda obs, action: (A * obs + B * action, -(Q * obs**2 + RHO * action**2)[:, 0])
        agent.predict_termination = lambda obs, action, next_obs: terminate(next_obs)
    return agent


def lqr_target(
    monkeypatch, horizon: int, critic, *flags: object, terminated: float = 0.0, **options
) -> float:
    """The target that update() computes for the replayed pair (1, 0.3)."""
    agent = lqr_agent(monkeypatch, horizon, critic, *flags, **options)
    calls = recorded(monkeypatch, mve, "twin_loss")
    buffer = mve.ReplayBuffer(16, 1, 1, torch.device("cpu"))
    buffer.rows = buffer.rows.double()
    for _ in range(16):
        buffer.add([1.0], [0.3], 0.0, [0.0], False, 0)
    exact = [1.0, 0.3, -(Q + RHO * 0.3**2), A + B * 0.3, terminated]
    buffer.rows[:] = torch.tensor(exact, dtype=torch.float64)
    agent.update(buffer, 61)
    return calls[0][1][0].item()


def exact_critic(obs, action, bias: float = 0.0):
    return (-(Q * obs**2 + RHO * action**2) - GAMMA * P * (A * obs + B * action) ** 2)[:, 0] + bias


@pytest.mark.parametrize("horizon", [0, 1, 2, 5, 30])
def test_lqr_target_is_exact_for_every_horizon(monkeypatch, horizon):
    assert lqr_target(monkeypatch, horizon, exact_critic) == pytest.approx(-2.8124454383, abs=1e-9)


@pytest.mark.parametrize(("horizon", "error"), [(0, 1.8), (1, 1.62), (3, 1.3122), (10, 0.6276211922)])
def test_lqr_critic_bias_is_discounted_once_per_step(monkeypatch, horizon, error):
    target = lqr_target(monkeypatch, horizon, lambda obs, action: exact_critic(obs, action, 2.0))
    assert target + 2.8124454383 == pytest.approx(error, abs=1e-9)


@pytest.mark.parametrize(
    ("horizon", "expected"), [(0, -1.009), (1, -2.017126), (2, -2.4617095660), (5, -2.7823641830)]
)
def test_lqr_zero_critic_leaves_the_rewards(monkeypatch, horizon, expected):
    target = lqr_target(monkeypatch, horizon, lambda obs, action: 0 * obs[:, 0])
    assert target == pytest.approx(expected, abs=1e-9)


def test_particles_are_averaged(monkeypatch):
    target = lqr_target(monkeypatch, 2, exact_critic, "--num-particles", 3)
    assert target == pytest.approx(-2.8124454383, abs=1e-9)


@pytest.mark.parametrize("horizon", [0, 1, 4])
def test_terminated_transition_is_worth_its_reward(monkeypatch, horizon):
    assert lqr_target(monkeypatch, horizon, exact_critic, terminated=1.0) == pytest.approx(-1.009, abs=1e-12)


@pytest.mark.parametrize("horizon", [1, 2, 4])
def test_imagined_termination_pays_its_reward_and_nothing_after(monkeypatch, horizon):
    """Termination at the first imagined step: T = r + γ r̂₀ for every H (α = 0)."""
    ends = lambda obs: torch.ones(len(obs))
    target = lqr_target(monkeypatch, horizon, exact_critic, terminate=ends)
    assert target == pytest.approx(-2.017126, abs=1e-9)


def test_entropy_counts_once_per_imagined_action():
    """Rewards 0, Q̄ = 0, log π = −1, α = 0.2, γ = 0.9: T_H = 0.2 γ (1 − γ^{H+1}) / (1 − γ); H = 2: 0.4878."""
    alpha, zero, log_prob = column(0.2), column(0.0), column(-1.0)
    for horizon in (0, 1, 2, 7):
        steps = mve.Rollout([], [], [log_prob] * (horizon + 1), [zero] * horizon, [zero] * horizon)
        values = mve.expand(steps, horizon, zero, alpha, 0.9)
        target = mve.soft_target(zero, zero, values[0], log_prob, alpha, 0.9).item()
        assert target == pytest.approx(0.2 * 0.9 * (1 - 0.9 ** (horizon + 1)) / 0.1, abs=1e-12)
        if horizon == 2:
            assert target == pytest.approx(0.4878, abs=1e-12)


def test_each_entropy_is_that_of_its_own_step():
    """Rewards 0, Q̄ = 0: T_H = −α Σ_t γ^{t+1} log π_t with a log π of its own at every step."""
    alpha, zero, log_probs = column(0.2), column(0.0), [column(-1.0), column(-10.0), column(-100.0)]
    values = mve.expand(mve.Rollout([], [], log_probs, [zero] * 2, [zero] * 2), 2, zero, alpha, 0.9)
    target = mve.soft_target(zero, zero, values[0], log_probs[0], alpha, 0.9)
    assert target.item() == pytest.approx(0.2 * (0.9 * 1 + 0.81 * 10 + 0.729 * 100), abs=1e-12)


def test_entropy_at_an_imagined_termination():
    """d̂₀ = 1: T = r − γ α log π₀ + γ r̂₀, whatever comes later."""
    one, zero, alpha = column(1.0), column(0.0), column(0.2)
    log_probs = [column(-1.5), column(-7.0), column(-9.0)]
    rollout = mve.Rollout([], [], log_probs, [column(2.0), column(4.0)], [one, zero])
    values = mve.expand(rollout, 2, column(100.0), alpha, 0.9)
    target = mve.soft_target(column(3.0), zero, values[0], log_probs[0], alpha, 0.9)
    assert target.item() == pytest.approx(3 + 0.9 * 0.2 * 1.5 + 0.9 * 2, abs=1e-12)


def test_tdk_arithmetic():
    """γ = 0.5, r = 1, r̂ = (2, 4), y₂ = 8: y₁ = 8, y₀ = 6, y = 4; for Q = 0 the loss is (16+36+64)/2 = 58."""
    zero = column(0.0)
    rollout = mve.Rollout([], [], [zero] * 3, [column(2.0), column(4.0)], [zero, zero])
    values = mve.expand(rollout, 2, column(8.0), zero, 0.5)
    assert values[:, 0].tolist() == [6.0, 8.0, 8.0]
    target = mve.soft_target(column(1.0), zero, values[0], zero, zero, 0.5)
    assert target.item() == 4.0
    q, alive = torch.zeros(2, 1, dtype=torch.float64), torch.ones(2, 1, dtype=torch.float64)
    real = mve.twin_loss(q, target)
    loss = mve.tdk_loss(real, torch.zeros(2, 2, 1, dtype=torch.float64), values[:-1], alive)
    assert real.item() == 2 * 16  # two critics, each 16 without the trick
    assert loss.item() == 2 * 58
    dead = mve.tdk_loss(mve.twin_loss(q, column(1.0)), torch.zeros(2, 2, 1), values[:-1], 0 * alive)
    assert dead.item() == 2 * 0.5


@pytest.mark.parametrize("horizon", [0, 1, 5])
def test_loss_does_not_scale_with_the_horizon(monkeypatch, horizon):
    """Without TD-k the critic's loss is the squared error, whatever H."""
    calls = recorded(monkeypatch, mve, "twin_loss")
    buffer = filled_buffer(mve)
    buffer.rows = buffer.rows.double()
    loss = lqr_agent(monkeypatch, horizon, exact_critic).update(buffer, 61)["losses/qf_loss"]
    q, target = calls[0]
    assert loss.item() == pytest.approx(((q - target) ** 2).mean(1).sum().item())


def test_tdk_weighs_imagined_pairs_by_survival(monkeypatch):
    """alive = (1 − d, (1 − d)(1 − d̂₀), …): a pair counts while the trajectory lives."""
    calls = recorded(monkeypatch, mve, "tdk_loss")
    ends_below_one = lambda obs: (obs[:, 0] < 0.6).double() - 0.5
    lqr_target(monkeypatch, 4, exact_critic, "--tdk", terminate=ends_below_one)
    _, q, target, alive = calls[0]
    assert alive[:, 0].tolist() == [1, 1, 0, 0]
    assert q.shape == (2, 4, 16)
    assert q.requires_grad and not target.requires_grad
    state = 1.05  # y₁ = r̂₁ alone, since the second imagined step terminates
    last = -(Q + RHO * K**2) * (0.7 * state) ** 2
    assert target[1, 0].item() == pytest.approx(last, abs=1e-9)
    assert target[0, 0].item() == pytest.approx(-(Q + RHO * K**2) * state**2 + GAMMA * last, abs=1e-9)
    lqr_target(monkeypatch, 4, exact_critic, "--tdk", terminated=1.0)
    assert calls[1][3].sum() == 0


def test_particles_divide_the_variance_of_the_target(monkeypatch):
    """Var of the mean of P targets is Var / P on a stochastic model: 4 particles, ratio 4 within 15 %."""
    variances = {}
    for particles in (1, 4):
        flags = (
            "--batch-size",
            4000,
            "--learning-starts",
            4000,
            "--total-timesteps",
            4001,
            "--eval-every",
            4001,
        )
        agent = make_agent(
            "sac_mve", "--horizon", 1, "--num-particles", particles, *flags, "--init-alpha", 1e-8
        )
        agent.update_model = lambda buffer, step: {}
        agent.predict_termination = lambda obs, action, next_obs: -torch.ones(len(obs))
        agent.model.step = lambda obs, action: (obs, torch.randn(len(obs)))
        leaf = agent.actor.layers[0].bias[0]
        agent.actor.sample = lambda obs, leaf=leaf: (0 * obs + leaf, torch.zeros(len(obs)))
        calls = []
        original = mve.twin_loss
        monkeypatch.setattr(
            mve, "twin_loss", lambda q, y, calls=calls, f=original: (calls.append(y), f(q, y))[1]
        )
        buffer = mve.ReplayBuffer(1, 1, 1, torch.device("cpu"))
        buffer.add([1.0], [0.0], 0.0, [1.0], False, 0)
        agent.update(buffer, 61)
        monkeypatch.setattr(mve, "twin_loss", original)
        variances[particles] = calls[0].var().item()
    assert variances[1] / variances[4] == pytest.approx(4, rel=0.15)


# ---------------------------------------------------------------- the model


def fit(agent, buffer) -> dict[str, torch.Tensor]:
    """One gradient step of the model on what update_model would draw for it."""
    at = buffer.sample(agent.args.members * agent.args.batch_size)
    return agent.fit_model(buffer[at], (~mve.held_out(buffer.episode[at])).float())


def test_gaussian_nll_by_hand():
    """μ = 1, target 3, σ² = 4 in two dimensions: 2 (4/4 + log 4)."""
    nll = mve.gaussian_nll(
        torch.ones(1, 1, 2), torch.full((1, 1, 2), math.log(4)), torch.full((1, 1, 2), 3.0)
    )
    assert nll.shape == (1, 1)
    assert nll.item() == pytest.approx(2 * (1 + math.log(4)))


def test_identical_members_have_one_loss():
    model = mve.GaussianEnsemble(5, 3, 2, 2, 8)
    for layer in model.layers:
        for parameter in (layer.weight, layer.bias):
            parameter.data[:] = parameter.data[:1]
    obs, action = torch.randn(1, 6, 3).expand(5, -1, -1), torch.randn(1, 6, 2).expand(5, -1, -1)
    nll = mve.gaussian_nll(*model(obs, action), torch.randn(1, 6, 4).expand(5, -1, -1))
    assert torch.allclose(nll, nll[:1].expand(5, -1), atol=1e-5)


def test_log_variance_stays_between_its_bounds():
    model = mve.GaussianEnsemble(2, 1, 1, 1, 8)
    for scale in (1e4, -1e4):
        nn.init.constant_(model.layers[-1].bias, scale)
        log_var = model(torch.zeros(2, 4, 1), torch.zeros(2, 4, 1))[1]
        assert (log_var <= 0.5 + 1e-3).all() and (log_var >= -10 - 1e-3).all()


def test_bound_penalty_draws_the_bounds_together():
    """Alone, the 0.01 term shrinks max and grows min."""
    agent = make_agent("sac_mve")
    agent.model_optimizer = torch.optim.SGD(
        [*agent.model.parameters(), *agent.termination.parameters()], lr=1.0
    )
    before = agent.model.max_log_var.clone(), agent.model.min_log_var.clone()
    original = mve.gaussian_nll
    mve.gaussian_nll = lambda mean, log_var, target: (mean * 0).sum(2)
    try:
        fit(agent, filled_buffer(mve))
    finally:
        mve.gaussian_nll = original
    assert torch.allclose(agent.model.max_log_var, before[0] - 0.01)
    assert torch.allclose(agent.model.min_log_var, before[1] + 0.01)


def test_model_learns_differences_and_rewards(monkeypatch):
    calls = recorded(monkeypatch, mve, "gaussian_nll")
    agent, buffer = make_agent("sac_mve"), filled_buffer(mve)
    torch.manual_seed(5)
    fit(agent, buffer)
    torch.manual_seed(5)
    batch = buffer[buffer.sample(5 * 16)]
    target = calls[0][2].flatten(0, 1)
    assert torch.equal(target[:, :1], batch.next_obs - batch.obs)
    assert torch.equal(target[:, 1], batch.reward)


def test_model_step_adds_the_difference_to_the_state():
    model = mve.GaussianEnsemble(3, 2, 1, 1, 8)
    nn.init.zeros_(model.layers[-1].weight)
    nn.init.zeros_(model.layers[-1].bias)
    model.layers[-1].bias.data[:, :, :3] = torch.tensor([0.5, -0.25, 7.0])
    obs = torch.randn(10, 2)
    next_obs, reward = model.step(obs, torch.randn(10, 1), noise=False)
    assert torch.allclose(next_obs, obs + torch.tensor([0.5, -0.25]))
    assert torch.allclose(reward, torch.full((10,), 7.0))


def test_model_step_noise_has_the_predicted_deviation():
    model = mve.GaussianEnsemble(5, 1, 1, 1, 8)
    for layer in model.layers[-1:]:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    obs = torch.zeros(50_000, 1)
    log_var = model(obs[:5].view(5, 1, 1), obs[:5].view(5, 1, 1))[1][0, 0]
    next_obs, reward = model.step(obs, obs)
    assert next_obs.std().item() == pytest.approx(math.exp(log_var[0].item() / 2), rel=0.02)
    assert reward.std().item() == pytest.approx(math.exp(log_var[1].item() / 2), rel=0.02)


def test_rows_are_dealt_to_members_evenly_and_come_back_in_order():
    """Member i adds i: 23 rows over 5 members give each 4 or 5 rows, at random; no row is swapped or lost."""
    model = mve.GaussianEnsemble(5, 1, 1, 1, 8)
    nn.init.zeros_(model.layers[-1].weight)
    nn.init.zeros_(model.layers[-1].bias)
    model.layers[-1].bias.data[:, 0, 0] = torch.arange(5.0)
    obs = torch.arange(23.0)[:, None] * 10
    seen = torch.stack([(model.step(obs, obs * 0, noise=False)[0] - obs)[:, 0].round() for _ in range(200)])
    assert set(seen.flatten().tolist()) == {0, 1, 2, 3, 4}
    for row in seen:
        assert torch.bincount(row.long(), minlength=5).min() >= 3 and torch.bincount(row.long()).max() <= 5
    assert all(len(set(seen[:, i].tolist())) == 5 for i in range(23))


def test_each_row_gets_the_prediction_for_itself():
    """With a prediction that depends on state and action, 23 rows through 5 members: none is swapped."""
    model = mve.GaussianEnsemble(5, 1, 1, 1, 8)
    model.forward = lambda obs, action: (
        torch.cat([100 * obs, 7 * action], 2),
        torch.zeros(5, obs.shape[1], 2),
    )
    obs, action = torch.randn(23, 1), torch.randn(23, 1)
    next_obs, reward = model.step(obs, action, noise=False)
    assert torch.allclose(next_obs, 101 * obs)
    assert torch.allclose(reward, 7 * action[:, 0])


def test_normaliser_and_its_clip():
    model = mve.GaussianEnsemble(2, 2, 1, 1, 8)
    model.fit_normalizer(torch.tensor([[0.0, 3.0], [4.0, 3.0]]))
    assert model.mean.tolist() == [2.0, 3.0]
    assert model.std.tolist() == [2.0, 1.0]  # a constant dimension is left alone
    assert model.normalize(torch.tensor([[4.0, 3.5], [1e6, -1e6]])).tolist() == [[1.0, 0.5], [5.0, -5.0]]


def test_ensemble_learns_a_linear_system():
    """After 400 minibatches the mean prediction is within a tenth of the differences' own spread."""
    agent = make_agent(
        "sac_mve", "--model-hidden", 32, "--model-lr", 3e-3, "--batch-size", 60, "--members", 3
    )
    rng = np.random.default_rng(1)
    buffer = mve.ReplayBuffer(2000, 1, 1, torch.device("cpu"))
    for i in range(2000):
        obs, action = rng.uniform(-2, 2, 1), rng.uniform(-1, 1, 1)
        next_obs = A * obs + B * action
        buffer.add(obs, action, float(-(obs**2)[0]), next_obs, bool(abs(next_obs[0]) > 1.2), i // 20)
    agent.model.fit_normalizer(buffer[torch.arange(2000)].obs)
    for _ in range(400):
        fit(agent, buffer)
    held = buffer[mve.held_out_windows(buffer, 1)]
    next_obs, reward = agent.model.step(held.obs, held.action, noise=False)
    assert (next_obs - held.next_obs).square().mean().sqrt() < 0.1 * (held.next_obs - held.obs).std()
    assert (reward - held.reward).square().mean().sqrt() < 0.1 * held.reward.std()
    ended = agent.predict_termination(held.obs, held.action, held.next_obs) > 0
    assert (ended == (held.terminated > 0)).float().mean() > 0.95


def test_held_out_episodes_never_train_the_model():
    """Changing every number in them changes nothing in what is learned."""
    states = []
    for garbage in (False, True):
        torch.manual_seed(0)
        agent, buffer = make_agent("sac_mve"), filled_buffer(mve)
        held = mve.held_out(buffer.episode)
        assert 0 < held.sum() < 40
        if garbage:
            buffer.rows[held] = 123.0 * torch.randn(int(held.sum()), buffer.rows.shape[1]).abs().clamp(0, 1)
        torch.manual_seed(1)
        agent.update_model(buffer, 61)
        states.append(
            [p.detach().clone() for p in [*agent.model.parameters(), agent.model.mean, agent.model.std]]
        )
        states[-1] += [p.detach().clone() for p in agent.termination.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def test_model_survives_a_replay_of_held_out_episodes_only():
    """A small ring can hold nothing else for a while: no gradient, no NaN."""
    agent, buffer = make_agent("sac_mve"), filled_buffer(mve)
    buffer.episode.fill_(11)
    agent.update_model(buffer, 61)
    assert all(p.isfinite().all() for p in agent.model.state_dict().values())
    assert all(p.isfinite().all() for p in agent.termination.parameters())


def test_windows_stay_inside_held_out_episodes_also_around_the_ring():
    buffer = mve.ReplayBuffer(50, 1, 1, torch.device("cpu"))
    for i in range(137):
        buffer.add([i], [0], 0, [i + 1], False, i // 12)
        if i in (30, 49, 50, 136):
            for length in (1, 3, 12):
                first = mve.held_out_windows(buffer, length)
                for k in range(length):
                    places = (first + k) % buffer.size
                    assert torch.equal(buffer.rows[places, 0], buffer.rows[first, 0] + k)  # truly consecutive
                    assert mve.held_out(buffer.episode[places]).all()
                if i == 30:  # steps 12 to 23 are the second episode
                    assert sorted(buffer.rows[first, 0].tolist()) == list(range(12, 25 - length))


def test_diagnosis_matches_the_update_and_leaves_training_alone(monkeypatch):
    """The target of horizon H among the diagnosed ones is the one trained on; the generator does not move."""
    calls = recorded(monkeypatch, mve, "twin_loss")
    after = []
    for step in (61, 80):  # 80 is a multiple of --diagnose-every 40
        torch.manual_seed(0)
        agent, buffer = make_agent("sac_mve", "--horizon", 2), filled_buffer(mve)
        agent.update_model = lambda buffer, step: {}
        metrics = agent.update(buffer, step)
        after.append((torch.get_rng_state(), agent.critic.layers[0].weight.detach().clone()))
    assert all(torch.equal(a, b) for a, b in zip(*after, strict=True))
    assert metrics["expansion/target_mean_2"].item() == pytest.approx(calls[1][1].mean().item(), abs=1e-6)
    expected = {f"expansion/target_mean_{h}" for h in range(3)} | {"model/error_1", "model/error_2"}
    expected |= {"expansion/spread_over_horizons", "model/reward_error", "model/termination_accuracy"}
    assert expected <= set(metrics)
