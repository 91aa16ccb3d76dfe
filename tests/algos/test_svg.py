"""SAC-SVG(H): closed forms of the actor's value, the recurrent dynamics, sequences, schedules and presets."""

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from tests.algos.test_math import column, make_agent, played_buffer, recorded
from tests.conftest import load, tiny

svg = load("sac_svg_h")
LOOK = ("--horizon", 2, "--expansion-starts", 60)


def columns(*values: float) -> list[torch.Tensor]:
    """One tensor [1] per value, float64."""
    return [column(value) for value in values]


# ---------------------------------------------------------------- the actor's value


class LinearActor(nn.Module):
    """π(x) = k x without noise, log π = −1."""

    def __init__(self, k: float):
        super().__init__()
        self.k = nn.Parameter(torch.tensor(k, dtype=torch.float64))

    def sample(self, obs):
        return self.k * obs, -torch.ones(len(obs), dtype=obs.dtype)


class LinearModel(nn.Module):
    """x' = 0.9 x + 0.5 u."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.9, 0.5], dtype=torch.float64))

    def step(self, obs, action, memory=None):
        return self.weight[0] * obs + self.weight[1] * action, []


def linear_agent(horizon: int, detach: bool = False):
    """r̂ = x + 0.2 u, Q₁ = Q₂ = 2 x + 0.5 u, no terminations, π = −0.4 x, α = 0.1, γ = 0.9."""
    agent = make_agent("sac_svg_h", "--horizon", horizon, "--gamma", 0.9)
    agent.actor, agent.model = LinearActor(-0.4), LinearModel()
    if detach:
        step = agent.model.step
        agent.model.step = lambda obs, action, memory: step(obs.detach(), action, memory)

    def outcome(obs, action, frozen=False):
        reward = (obs + 0.2 * action)[:, 0]
        return reward, torch.full_like(reward, -1e9)

    agent.outcome = outcome
    critic = lambda obs, action, frozen=False: (2 * obs + 0.5 * action)[:, 0].expand(2, -1)
    return agent, critic


@pytest.mark.parametrize("horizon", [1, 2, 3, 5])
def test_value_of_a_linear_world(horizon):
    """V = Σ (γρ)^t (c + e k) x₀ + (γρ)^H (q + p k) x₀ − α Σ γ^t log π, ρ = a + b k."""
    agent, critic = linear_agent(horizon)
    obs = torch.tensor([[1.0], [-2.0]], dtype=torch.float64)
    value = agent.look_ahead(agent.unroll(obs), critic, torch.tensor(0.1))
    rho = 0.9 * (0.9 - 0.5 * 0.4)
    slope = sum(rho**t * (1 - 0.08) for t in range(horizon)) + rho**horizon * (2 - 0.2)
    entropy = 0.1 * sum(0.9**t for t in range(horizon + 1))
    assert value.tolist() == pytest.approx([slope + entropy, -2 * slope + entropy], abs=1e-6)
    if horizon == 2:
        assert value[0].item() == pytest.approx(2.48502, abs=1e-5)
        assert -value[0].item() / 3 == pytest.approx(-0.82834, abs=1e-5)


@pytest.mark.parametrize(("detach", "expected"), [(False, 1.95905), (True, 1.30295)])
def test_gradient_flows_through_states_and_actions(detach, expected):
    """dV/dk of the linear world; with detached inputs of the model it would be 1.30295."""
    agent, critic = linear_agent(2, detach)
    obs = torch.ones(1, 1, dtype=torch.float64)
    agent.look_ahead(agent.unroll(obs), critic, torch.tensor(0.1)).backward()
    assert agent.actor.k.grad.item() == pytest.approx(expected, abs=1e-5)
    assert agent.model.weight.grad is None


def test_twins_enter_by_their_minimum():
    agent, _ = linear_agent(2)
    obs = torch.ones(1, 1, dtype=torch.float64)
    values = {}
    for shift in (0, 1, -1):
        q = torch.tensor([[3.0], [3.0 + shift]], dtype=torch.float64)
        rollout = agent.unroll(obs)
        values[shift] = agent.look_ahead(rollout, lambda *_, q=q, **__: q, torch.tensor(0.1)).item()
    assert values[1] == values[0] and values[0] - values[-1] == pytest.approx(0.81)


@pytest.mark.parametrize(
    ("done", "exclusive", "released"),
    [
        ((0.5, 0.2), (1, 0.5, 0.4), (0.5, 0.25, 0.2)),
        ((0.0, 1.0), (1, 1, 0), (1, 1, 0)),
        ((1.0, 0.3), (1, 0, 0), (0, 0, 0)),
    ],
)
def test_survival(done, exclusive, released):
    for flag, expected in ((False, exclusive), (True, released)):
        found = [m.item() for m in svg.survival(columns(*done), flag)]
        assert found == pytest.approx(expected)


def test_entropy_counts_once_per_action_whatever_survives():
    """r̂ = Q = 0, log π = −1, α = 0.1, γ = 0.99, H = 2: 0.29701, also where every step ends the episode."""
    for done in ((0.0, 0.0), (1.0, 1.0)):
        alive = svg.survival(columns(*done), False)
        value = svg.expanded_value(columns(0, 0), alive, columns(-1, -1, -1), column(0), 0.1, 0.99)
        assert value.item() == pytest.approx(0.29701)


def test_value_of_horizon_0_is_the_soft_actor_loss():
    q, log_prob = torch.randn(2, 8), torch.randn(8)
    value = svg.expanded_value([], [torch.ones(8)], [log_prob], q.amin(0), 0.3, 0.99)
    assert torch.equal(-value.mean(), svg.soft_actor_loss(q, log_prob, 0.3))


def test_terminating_step_pays_and_nothing_after():
    """The loss of the agent itself with a certain end in the first step is the first reward's."""
    agent, critic = linear_agent(2)
    obs = torch.ones(1, 1, dtype=torch.float64)
    outcome = agent.outcome
    agent.outcome = lambda *args, **options: (outcome(*args, **options)[0], torch.full((1,), 1e9))
    value = agent.look_ahead(agent.unroll(obs), critic, torch.tensor(0.1))
    assert value.item() == pytest.approx(0.92 + 0.1 * 2.71, abs=1e-6)
    agent.args.mask = "released"
    value = agent.look_ahead(agent.unroll(obs), critic, torch.tensor(0.1))
    assert value.item() == pytest.approx(0.1 * 2.71, abs=1e-6)


def test_actor_moves_only_itself_and_only_through_the_model():
    """V's gradient reaches the actor alone; its step depends on the dynamics only after the warm-up."""
    steps = {}
    for step in (60, 61):
        for scale in (1.0, 1.5):
            torch.manual_seed(5)
            agent = make_agent("sac_svg_h", *LOOK)
            buffer = played_buffer(svg, agent)
            nn.init.normal_(agent.model.decoder[0].weight, std=scale)
            agent.look_ahead(agent.unroll(buffer[torch.arange(9)].obs), agent.critic, 0.1).mean().backward()
            others = (agent.critic, agent.critic_target, agent.model, agent.outcome)
            assert all(p.grad is None for part in others for p in part.parameters())
            assert all(p.requires_grad for p in agent.model.parameters())
            agent.update_dynamics = lambda buffer: {}
            torch.manual_seed(6)
            agent.update(buffer, step)
            steps[step, scale] = torch.cat([p.detach().flatten() for p in agent.actor.parameters()])
    assert torch.equal(steps[60, 1.0], steps[60, 1.5])
    assert not torch.allclose(steps[61, 1.0], steps[61, 1.5])


def test_actions_reach_the_value_through_the_dynamics_only_if_it_listens():
    """Without reward, end and entropy, and with Q(x) alone, the first action matters iff ∂f/∂u ≠ 0."""
    for slope in (0.5, 0.0):
        agent, _ = linear_agent(1)
        agent.outcome = lambda obs, action, frozen=False: (0 * obs[:, 0], 0 * obs[:, 0] - 1e9)
        agent.model.weight.data[1] = slope
        critic = lambda obs, action, frozen=False: obs[:, 0].expand(2, -1)
        agent.look_ahead(agent.unroll(torch.ones(1, 1, dtype=torch.float64)), critic, 0.0).sum().backward()
        assert (agent.actor.k.grad.item() != 0) == (slope != 0)


def test_actor_looks_ahead_with_the_online_critics_after_its_warm_up(monkeypatch):
    """update(): which critics, which log π for the temperature, and when."""
    agent = make_agent("sac_svg_h", "--horizon", 2, "--expansion-starts", 70)
    buffer, seen = played_buffer(svg, agent), []
    original = agent.look_ahead
    agent.look_ahead = lambda rollout, critic, alpha: (seen.append(critic), original(rollout, critic, alpha))[
        1
    ]
    plain = recorded(monkeypatch, svg, "soft_actor_loss")
    temperature = recorded(monkeypatch, svg, "temperature_loss")
    agent.update(buffer, 70)
    assert len(plain) == 1 and not seen
    rollouts, unroll = [], agent.unroll
    agent.unroll = lambda obs: (rollouts.append(unroll(obs)), rollouts[-1])[1]
    metrics = agent.update(buffer, 71)
    assert metrics["losses/actor_loss"] == -metrics["expansion/value"] / 3  # (3c)
    assert len(plain) == 1 and len(seen) == 1 and seen[0] is agent.critic
    assert temperature[-1][1] is rollouts[0].log_prob[0]  # real observations, never imagined ones


# ---------------------------------------------------------------- dynamics


def test_gru_layer_is_pytorchs():
    layer, x, memory = svg.GRULayer(6, 6), torch.randn(5, 6), torch.randn(5, 6)
    reference = nn.GRUCell(6, 6)
    reference.load_state_dict(layer.state_dict())
    assert torch.allclose(layer(x, memory), reference(x, memory), atol=1e-6)
    assert torch.allclose(layer(x, None), reference(x, torch.zeros(5, 6)), atol=1e-6)
    a, b = (cell(x, start).square().sum() for cell, start in ((layer, None), (reference, torch.zeros(5, 6))))
    found, expected = torch.autograd.grad(a, layer.weight_ih), torch.autograd.grad(b, reference.weight_ih)
    assert torch.allclose(found[0], expected[0], atol=1e-6)


def dynamics(*flags, obs_dim=3):
    agent = make_agent("sac_svg_h", "--horizon", 2, "--gru-layers", 2, *flags, obs_dim=obs_dim)
    return agent.model


def test_residual():
    """Zero decoder: the state stands still; its bias δ alone follows x_t = x_0 + t δ, in units of σ."""
    model, start = dynamics(), torch.randn(4, 3)
    model.normalizer.std.copy_(torch.tensor([2.0, 0.5, 1.0]))
    for p in model.decoder.parameters():
        p.data.zero_()
    action = torch.rand(4, 4, 1)
    real = torch.randn(4, 4, 3)
    errors = svg.sequence_errors(model, real, action)
    expected = ((real[1:] - real[0]) / model.normalizer.std).square().mean(2)
    assert torch.allclose(errors, expected)
    delta = torch.tensor([0.3, -0.1, 0.2])
    model.decoder[-1].bias.data = delta
    line = start + torch.arange(4)[:, None, None] * delta * model.normalizer.std
    assert svg.sequence_errors(model, line, action).abs().max() < 1e-10


def test_memory_starts_empty_and_rows_do_not_mix():
    model, obs, action = dynamics(), torch.randn(1, 3).repeat(3, 1), torch.rand(3, 1)
    action[1:] = action[0]
    obs[2] = 7.0
    first, memory = model.step(obs, action)
    second, _ = model.step(first, action, memory)
    assert torch.equal(second[0], second[1]) and not torch.equal(second[0], second[2])
    assert not torch.equal(second, model.step(first, action)[0])  # the memory matters
    assert torch.equal(model.step(obs, action)[0], first)  # and is not kept between calls


def test_training_stops_gradients_at_states_but_not_at_memories():
    model, obs, action = dynamics(), torch.randn(3, 4, 3), torch.rand(3, 4, 1)
    predictions, original = [], model.step
    model.step = lambda *args: (predictions.append(original(*args)), predictions[-1])[1]
    errors = svg.sequence_errors(model, obs, action)
    (first, memory), _ = predictions
    loss = errors[1].sum()
    assert not torch.autograd.grad(loss, first, retain_graph=True)[0].any()
    assert torch.autograd.grad(loss, memory[0], retain_graph=True)[0].abs().sum() > 0
    # the second prediction does start from the first as a number
    again, _ = original(first.detach(), action[1], memory)
    assert torch.equal(again, predictions[1][0])


def test_gradient_of_the_dynamics_is_clipped(monkeypatch):
    agent = make_agent("sac_svg_h", "--horizon", 2)
    for p in agent.model.decoder.parameters():
        p.data.mul_(1e3)
    norms = []
    agent.model_optimizer.step = lambda: norms.append(
        torch.cat([p.grad.flatten() for p in agent.model.parameters()]).norm().item()
    )
    metrics = agent.update_dynamics(played_buffer(svg, agent))
    assert metrics["model/gradient_norm"] > 1 and norms[0] == pytest.approx(1, abs=1e-3)


def test_dynamics_learn_a_linear_world():
    """x' = 0.9 x + 0.5 u of tests.tasks: both steps are predicted to 0.02 deviations."""
    agent = make_agent("sac_svg_h", "--horizon", 2, "--sequence-batch", 64, "--model-hidden", 64)
    buffer = played_buffer(svg, agent, rows=1000)
    before = agent.update_dynamics(buffer)["model/error_2"]
    for _ in range(600):
        metrics = agent.update_dynamics(buffer)
    assert metrics["model/error_1"] < 0.02 and metrics["model/error_2"] < 0.02 < 0.2 < before


# ---------------------------------------------------------------- value-aware dynamics


def test_value_error_by_hand():
    """V = 2 x, x̂ 0.3 beside x: 0.18 and the gradient 1.2; none where they agree."""
    for apart, loss, slope in ((0.3, 0.18, 1.2), (0.0, 0.0, 0.0)):
        predicted = column(1 + apart).requires_grad_()
        error = svg.value_errors(2 * predicted, 2 * column(1.0))
        error.sum().backward()
        assert error.item() == pytest.approx(loss) and predicted.grad.item() == pytest.approx(slope)


def test_slow_value_is_the_smaller_slow_critics_at_the_best_action():
    """No draw, no gradient but through the states."""
    agent, obs = make_agent("sac_svg_h", "--value-loss", 1), torch.randn(9, 1, requires_grad=True)
    for p in agent.critic_target.parameters():
        p.data.add_(0.1 * torch.randn(p.shape))
    before = torch.get_rng_state()
    value = agent.slow_value(obs)
    assert torch.equal(before, torch.get_rng_state())
    action = agent.policy(obs, True)
    assert torch.allclose(value, torch.minimum(*agent.critic_target(obs, action)))
    value.sum().backward()
    parts = (agent.actor, agent.critic, agent.critic_target)
    assert obs.grad.abs().min() > 0 and all(p.grad is None for part in parts for p in part.parameters())
    assert all(p.requires_grad for p in agent.actor.parameters())


def test_value_loss_is_added_to_that_of_the_states(monkeypatch):
    """Two steps of three sequences, the last of weight 0, V = 2 x: gradients add up as c says, in f alone."""
    obs, action, weight = torch.randn(3, 3, 1), torch.rand(3, 3, 1), torch.tensor([1.0, 1.0, 0.0])
    obs[:, 2] = 50
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda parameters, most: torch.zeros(()))
    found, parts = [], []
    for c in (0, 1, 3):
        torch.manual_seed(2)
        agent = make_agent("sac_svg_h", "--horizon", 2, "--value-loss", c)
        agent.slow_value, agent.model_optimizer.step = lambda obs: 2 * obs[:, 0], lambda: None
        parts.append(agent.fit_dynamics(obs, action, weight))
        found.append(torch.cat([p.grad.flatten() for p in agent.model.parameters()]))
        assert all(p.grad is None for part in (agent.actor, agent.critic) for p in part.parameters())
    kept = []
    svg.sequence_errors(agent.model, obs, action, kept)
    apart = 2 * (torch.stack(kept) - obs[1:])[:, :2, 0]
    agent.model.zero_grad()
    (0.5 * apart.square()).mean().backward()
    alone = torch.cat([p.grad.flatten() for p in agent.model.parameters()])
    for c, gradient in zip((1, 3), found[1:], strict=True):
        assert torch.allclose(gradient - found[0], c * alone, atol=1e-5)
    assert alone.abs().max() > 0.1 and "model/value_error" not in parts[0]
    assert parts[1]["model/value_error"].item() == pytest.approx(apart.square().mean().sqrt().item())
    assert all(torch.equal(parts[0][f"model/error_{k}"], parts[1][f"model/error_{k}"]) for k in (1, 2))


# ---------------------------------------------------------------- sequences


def ring(ends: list[int], rows: int, capacity: int = 100, terminated: bool = True):
    """A replay of `rows` transitions, obs = number; the places in `ends` end their episode."""
    buffer, episode = svg.ReplayBuffer(capacity, 1, 1, torch.device("cpu")), 0
    for i in range(rows):
        buffer.add([i], [0.0], 0.0, [i + 1], terminated and i in ends, episode)
        episode += i in ends
    return buffer


def starts(buffer, length: int, draws: int = 4000) -> torch.Tensor:
    torch.manual_seed(0)
    places, weight = svg.sequences(buffer, length, draws // 4)
    places = places[:, weight > 0]
    obs = buffer.rows[places, 0]
    assert (obs[1:] == obs[:-1] + 1).all()
    return obs[0].long()


def test_sequences_never_contain_an_end():
    """20 transitions, one end at 5, K = 3: starts 0, 1, 2, 6 .. 17, all as often (χ² test)."""
    found = starts(ring([5], 20), 3, 40_000)
    counts = torch.bincount(found, minlength=20)
    valid = [0, 1, 2, *range(6, 18)]
    assert counts.nonzero().flatten().tolist() == valid
    expected = len(found) / len(valid)
    assert ((counts[valid] - expected) ** 2 / expected).sum() < 36.1  # p = 0.001


def test_sequences_do_not_end_with_the_newest_termination():
    assert starts(ring([19], 20), 3).max() == 16
    assert starts(ring([5], 21, terminated=False), 3).unique().tolist() == [0, 1, 2, *range(6, 19)]


def test_sequences_do_not_cross_the_seam_of_the_ring():
    found = starts(ring([], 130, capacity=50), 4)
    assert found.min() == 80 and found.max() == 126


def test_too_few_sequences_weigh_nothing():
    """Episodes shorter than the window: no gradient, no error, and the metrics stay finite."""
    places, weight = svg.sequences(ring(list(range(0, 40, 2)), 40), 3, 8)
    assert places.shape == (3, 8) and not weight.any()
    agent = make_agent("sac_svg_h", "--horizon", 2)
    before = [p.clone() for p in agent.model.parameters()]
    metrics = agent.update_dynamics(ring(list(range(0, 40, 2)), 40))
    assert all(value.isfinite() for value in metrics.values())
    assert all(torch.equal(a, b) for a, b in zip(before, agent.model.parameters(), strict=True))


# ---------------------------------------------------------------- reward, termination, temperature, head


@pytest.mark.parametrize(
    ("ended", "balanced", "expected"),
    [
        ((1, 0, 0, 0), True, 1.5 * math.log(2)),
        ((0, 0, 0, 0), True, math.log(2)),
        ((1, 1, 1, 1), True, 0.0),
        ((1, 0, 0, 0), False, math.log(2)),
    ],
)
def test_termination_loss(ended, balanced, expected):
    loss = svg.termination_loss(torch.zeros(4), torch.tensor(ended, dtype=torch.float32), balanced)
    assert loss.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("balanced", "optimum"), [(True, 0.5), (False, 0.01)])
def test_balanced_terminations_inflate_a_rare_probability(balanced, optimum):
    ended = torch.zeros(1000)
    ended[:10] = 1
    logit = torch.tensor(math.log(optimum / (1 - optimum)), requires_grad=True)
    svg.termination_loss(logit.expand(1000), ended, balanced).backward()
    assert abs(logit.grad.item()) < 1e-6


@pytest.mark.parametrize(
    ("schedule", "progress", "expected"),
    [
        ((1, -4, 0.0625), 0.5, 0.78802),
        ((-2, -3, 64), 0.01, -2.47440),
        ((1, -4, 0.0625), 0.0, 1.0),
        ((1, -4, 0.0625), 1.0, -4.0),
        ((1, -4, 0.0), 0.7, 1.0),
    ],
)
def test_entropy_schedule(schedule, progress, expected):
    assert svg.scheduled_entropy(*schedule, progress) == pytest.approx(expected, abs=1e-5)


def test_entropy_schedule_reaches_the_temperature(monkeypatch):
    flags = ("--target-entropy", 1, "--final-entropy", -4, "--entropy-decay", 2)
    agent = make_agent("sac_svg_h", *flags, *LOOK)
    calls = recorded(monkeypatch, svg, "temperature_loss")
    metrics = agent.update(played_buffer(svg, agent), 150)
    assert calls[0][2].item() == pytest.approx(-4 + 5 * 0.25) == metrics["losses/target_entropy"].item()


def test_bounded_head():
    """s = 0 gives σ = 0.22313 and log π = 0.58106 per dimension at the mean; s → ±∞ gives log σ → 2, −5."""
    normalizer = svg.Normalizer(2)
    actor = svg.DeepActor(normalizer, [2, 8, 8, 8, 4], bounded=True)
    for p in actor.layers[-1].parameters():
        p.data.zero_()
    _, log_std = actor(torch.randn(3, 2))
    assert torch.allclose(log_std.exp(), torch.tensor(0.22313), atol=1e-5)
    log_prob = svg.squashed_log_prob(torch.zeros(3, 2), log_std, torch.zeros(3, 2))
    assert torch.allclose(log_prob, torch.tensor(2 * 0.58106), atol=1e-4)
    for sign, bound in ((1, 2.0), (-1, -5.0)):
        actor.layers[-1].bias.data[2:] = 100.0 * sign
        assert actor(torch.randn(3, 2))[1].tolist() == [[bound] * 2] * 3


def test_log_prob_is_finite_far_out():
    u = torch.tensor([[50.0], [-50.0]], requires_grad=True)
    log_prob = svg.squashed_log_prob(torch.zeros(2, 1), torch.full((2, 1), -1.5), u)
    log_prob.sum().backward()
    assert log_prob.isfinite().all() and u.grad.isfinite().all()


def test_orthogonal_weights():
    """Released initialisation: orthogonal matrices, biases 0; GRU, reward and termination stay PyTorch's."""
    agent = make_agent("sac_svg_h", "--init", "orthogonal", "--horizon", 2, obs_dim=5)
    square = agent.critic.layers[1].weight
    for matrix in (*square, agent.actor.layers[1].weight, agent.model.encoder[2].weight):
        assert torch.allclose(matrix @ matrix.T, torch.eye(len(matrix)), atol=1e-5)
    assert not agent.critic.layers[1].bias.any() and not agent.model.decoder[0].bias.any()
    assert agent.outcome.layers[1].bias.any() and agent.model.memory[0].bias_ih.any()
    assert torch.equal(square, agent.critic_target.layers[1].weight)


# ---------------------------------------------------------------- normaliser


def test_normalizer_is_numpys():
    """Mean and deviation (ddof 1) of all observations, also those the ring has dropped; both bounds."""
    rng = np.random.default_rng(0)
    data = (rng.normal(size=(500, 4)) * [1, 300, 0, 3] + [0, 5, 7, 100]).astype(np.float32)
    normalizer = svg.Normalizer(4)
    agent = SimpleNamespace(see=normalizer.update, device=torch.device("cpu"))
    buffer = svg.ObservingReplay(agent, 50, 4, 1, agent.device)
    for row in data:
        buffer.add(row, [0.0], 0.0, row + 1, False, 0)
    mean, std = data.mean(0, dtype=np.float64), data.std(0, ddof=1, dtype=np.float64)
    assert np.allclose(normalizer.mean, mean, rtol=1e-6)
    assert np.allclose(normalizer.std, std.clip(0.1, 10), rtol=1e-6)
    z = normalizer(torch.from_numpy(data[-1:]))[0]
    assert z[2] == 0 and z[1].item() == pytest.approx((data[-1, 1] - mean[1]) / 10, rel=1e-4)


def test_every_network_sees_normalised_observations():
    """Shifting and scaling observations and statistics together changes nothing but the model's units."""
    agent = make_agent("sac_svg_h", *LOOK, obs_dim=2)
    obs, action = torch.randn(6, 2), torch.rand(6, 1)
    outputs = lambda obs: [*agent.actor(obs), agent.critic(obs, action), agent.outcome(obs, action)]
    before, step = outputs(obs), agent.model.step(obs, action)[0] - obs
    normalizer = agent.actor.normalizer
    normalizer.mean.copy_(torch.tensor([3.0, -1.0]))
    normalizer.std.copy_(torch.tensor([2.0, 0.5]))
    moved = obs * normalizer.std + normalizer.mean
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(before, outputs(moved), strict=True))
    assert torch.allclose(agent.model.step(moved, action)[0] - moved, step * normalizer.std, atol=1e-5)
    assert agent.critic_target.normalizer is agent.model.normalizer is normalizer


# ---------------------------------------------------------------- the critics' ablations


@pytest.mark.parametrize(
    ("alive", "targets", "weights"),
    [((1, 1, 1), (11.152, 11.18), (1, 1)), ((1, 1, 0.5), (7.021, 6.59), (1, 1)), ((1, 0, 1), (1, 0), (1, 0))],
)
def test_tdk_targets(alive, targets, weights):
    """K = 2, γ = 0.9, α = 0.1, r₋₁ = 1, r̂₀ = 2, log π = (−1, −2), Q̄ = 10."""
    found, weight = svg.tdk_targets(columns(1, 2), columns(*alive), columns(-1, -2), column(10), 0.1, 0.9)
    assert found[:, 0].tolist() == pytest.approx(targets) and weight[:, 0].tolist() == pytest.approx(weights)


def test_tdk_targets_of_one_step_are_sacs():
    for done in (0.0, 1.0):
        alive = columns(1, 1 - done)
        found, _ = svg.tdk_targets(columns(1), alive, columns(-2), column(10), 0.1, 0.99)
        assert found.item() == pytest.approx(1 if done else 11.098)


@pytest.mark.parametrize(("mask", "first"), [("exclusive", 0), ("released", 1)])
def test_tdk_aligns_terminations(mask, first, monkeypatch):
    """a_j belongs to the step that leads to x̂_{j−1}: d̂_{j−2}; the released code takes the next one."""
    agent = make_agent("sac_svg_h", *LOOK, "--critic-expansion", "tdk", "--mask", mask)
    buffer = played_buffer(svg, agent)
    for p in agent.critic_target.parameters():
        p.data.add_(0.1)
    calls, losses = (recorded(monkeypatch, svg, name) for name in ("tdk_targets", "weighted_twin_loss"))
    batch, rollouts, unroll = buffer[buffer.sample(16)], [], agent.unroll
    agent.unroll = lambda obs: (rollouts.append(unroll(obs)), rollouts[-1])[1]
    agent.tdk_loss(batch, torch.tensor(0.1))
    alive, rollout = calls[0][1], rollouts[0]
    assert len(alive) == 4 and (alive[0] == 1).all() and torch.equal(alive[1], 1 - batch.terminated)
    assert torch.equal(alive[2], 1 - rollout.done[first])
    slow = agent.critic_target(rollout.obs[-1], rollout.action[-1])
    assert torch.equal(calls[0][3], torch.minimum(*slow))
    q, target, weight = losses[0]
    pairs = [(batch.obs, batch.action), *zip(rollout.obs[:2], rollout.action[:2], strict=True)]
    for k, pair in enumerate(pairs):
        assert torch.allclose(q[:, k], agent.critic(*pair), atol=1e-6)
    expected = torch.stack([torch.ones(16), alive[1], alive[1] * alive[2]])
    assert torch.equal(weight, expected) and not target.requires_grad and q.requires_grad
    assert calls[0][0][0] is batch.reward and len(calls[0][2]) == 3


def test_weighted_twin_loss():
    """w = (1, ½), errors (1, 2) and (3, 0): Σ_i mean_k w_k e² = (1 + 2) / 2 + 9 / 2 = 6."""
    q, target = torch.tensor([[[2.0], [4.0]], [[4.0], [2.0]]]), torch.tensor([[1.0], [2.0]])
    assert svg.weighted_twin_loss(q, target, torch.tensor([[1.0], [0.5]])) == 6


def test_one_step_target_counts_the_first_entropy_once(monkeypatch):
    """y = r + γ (1 − d) V(s'), V by the slow critics; the released code has α log π₀ a second time."""
    agent = make_agent("sac_svg_h", *LOOK, "--critic-expansion", "one-step")
    buffer = played_buffer(svg, agent)
    values, original = [], agent.look_ahead

    def look_ahead(rollout, critic, alpha):
        values.append((critic, original(rollout, critic, alpha)))
        return values[-1][1]

    agent.look_ahead = look_ahead
    at = torch.arange(100, 116)
    buffer.sample = lambda n: at.repeat(-(-n // 16))[:n]
    calls = recorded(monkeypatch, svg, "twin_loss")
    agent.update(buffer, 61)
    batch, (critic, value) = buffer[at], values[0]
    assert critic is agent.critic_target
    assert torch.allclose(calls[0][1], batch.reward + 0.99 * (1 - batch.terminated) * value)


def weights(agent) -> bytes:
    """Actor and critics, to compare."""
    parts = [*agent.actor.parameters(), *agent.critic.parameters()]
    return torch.cat([p.detach().flatten() for p in parts]).numpy().tobytes()


def test_ablations_differ():
    """The paper's four combinations are four algorithms; each trains the dynamics."""
    ends = set()
    for actor in ("--actor-expansion", "--no-actor-expansion"):
        for critic in ("none", "tdk", "one-step"):
            if (actor, critic) == ("--no-actor-expansion", "none"):
                continue
            torch.manual_seed(1)
            agent = make_agent("sac_svg_h", *LOOK, actor, "--critic-expansion", critic)
            buffer = played_buffer(svg, agent)
            model = agent.model.decoder[0].weight.clone()
            for step in (61, 62, 63):
                agent.update(buffer, step)
            assert not torch.equal(model, agent.model.decoder[0].weight)
            ends.add(weights(agent))
    assert len(ends) == 5
    torch.manual_seed(1)
    agent = make_agent("sac_svg_h", *LOOK)
    buffer = played_buffer(svg, agent)
    for step in (61, 62, 63):
        agent.update(buffer, step)
    assert weights(agent) in ends  # equal flags give equal weights


# ---------------------------------------------------------------- updates, presets, schedules


def test_number_of_updates():
    """Per step: one of everything, and --dynamics-updates of the dynamics."""
    agent = make_agent("sac_svg_h", *LOOK, "--dynamics-updates", 3)
    buffer, counts = played_buffer(svg, agent), {"model": 0, "rest": 0}
    for name, optimizer in (("model", agent.model_optimizer), ("rest", agent.optimizer)):
        step = optimizer.step

        def counted(*args, step=step, name=name):
            counts[name] += 1
            return step(*args)

        optimizer.step = counted
    target = [p.clone() for p in agent.critic_target.parameters()]
    agent.update(buffer, 61)
    assert counts == {"model": 3, "rest": 1}
    for old, new, online in zip(
        target, agent.critic_target.parameters(), agent.critic.parameters(), strict=True
    ):
        assert torch.allclose(new, old + 0.005 * (online - old), atol=1e-7)


def test_reward_and_termination_learn_from_the_batch(monkeypatch):
    """(7) as update() applies it: the recorded reward and end, weighed as the flag says."""
    agent = make_agent("sac_svg_h", *LOOK, "--balance-terminations")
    buffer, at = played_buffer(svg, agent), torch.arange(16)
    buffer.sample = lambda n: at.repeat(-(-n // 16))[:n]
    batch, calls = buffer[at], recorded(monkeypatch, svg, "termination_loss")
    reward, logit = (x.detach().clone() for x in agent.outcome(batch.obs, batch.action))
    metrics = agent.update(buffer, 61)
    assert torch.equal(calls[0][0], logit) and torch.equal(calls[0][1], batch.terminated) and calls[0][2]
    error = (reward - batch.reward).square().mean().sqrt()
    assert metrics["model/reward_error"].item() == pytest.approx(error.item())


def test_reward_and_termination_are_learned():
    """On tests.tasks' cliff: r̂ is right to a tenth of the rewards' deviation, ends stand out."""
    agent = make_agent("sac_svg_h", "--horizon", 1, "--model-hidden", 64, "--model-lr", 1e-2)
    buffer = played_buffer(svg, agent, rows=1000)
    for step in range(61, 461):
        agent.update(buffer, step)
    batch = buffer[torch.arange(1000)]
    with torch.no_grad():
        reward, logit = agent.outcome(batch.obs, batch.action)
    assert (reward - batch.reward).std() < 0.1 * batch.reward.std()
    ended = batch.terminated > 0
    assert logit[ended].mean() > 0 > logit[~ended].mean()


def test_updates_of_a_run(monkeypatch, tmp_path):
    """300 steps, 60 random: 240 updates, twice that of the dynamics, 40 of the actor without model."""
    counts = {"update": 0, "update_dynamics": 0, "fit_dynamics": 0}
    for name in counts:
        original = getattr(svg.Agent, name)

        def counted(self, *args, original=original, name=name):
            counts[name] += 1
            return original(self, *args)

        monkeypatch.setattr(svg.Agent, name, counted)
    errors, plain = (recorded(monkeypatch, svg, name) for name in ("sequence_errors", "soft_actor_loss"))
    flags = ("--expansion-starts", 100, "--dynamics-updates", 2, "--runs-dir", tmp_path)
    svg.train(svg.parse([*tiny("sac_svg_h"), *map(str, flags)]))
    assert counts == {"update": 240, "update_dynamics": 240, "fit_dynamics": 480}
    assert len(errors) == 480 and len(plain) == 40


def test_presets_fill_in_what_is_not_typed():
    common = {"actor_lr": 1e-4, "critic_lr": 1e-4, "model_lr": 1e-3, "init_alpha": 0.1, "dynamics_updates": 4}
    common |= {"hidden": 512, "model_hidden": 512, "encoder_layers": 2, "gru_layers": 2, "tau": 0.005}
    common |= {"expansion_starts": 10_000, "log_std": "tanh", "init": "orthogonal", "normalize": True}
    paper = {"batch_size": 512, "sequence_batch": 1024, "hidden_layers": 2, "decoder_layers": 2}
    paper |= {"alpha_lr": 5e-4, "mask": "exclusive", "balance_terminations": False, "learning_starts": 1000}
    released = {"batch_size": 1024, "sequence_batch": 512, "hidden_layers": 4, "decoder_layers": 0}
    released |= {"alpha_lr": 1e-4, "mask": "released", "balance_terminations": True, "learning_starts": 1024}
    for preset, own in (("paper", paper), ("released", released)):
        args = svg.parse(["--preset", preset, "--total-timesteps", "50000"])
        assert {name: getattr(args, name) for name in common | own} == common | own
    typed = svg.parse(["--preset=paper", "--total-timesteps", "50000", "--hidden", "64", "--gru-layers", "1"])
    assert (typed.hidden, typed.gru_layers, typed.model_hidden) == (64, 1, 512)
    laptop = svg.parse([])
    assert laptop == svg.Args() and laptop.horizon == 2
    sac = {field.name: field.default for field in dataclasses.fields(load("sac").Args)}
    assert all(getattr(laptop, name) == value for name, value in sac.items())


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--preset paper --env-id experiments.tasks:poplin/Walker2d-v0", (4, 1, 1, 1)),
        ("--preset released --env-id experiments.tasks:poplin/Swimmer-v0", (2, -2, -32, 0.125)),
        ("--preset paper --env_id experiments.tasks:poplin/Ant-v0 --horizon 5", (5, 1, -4, 0.0625)),
        ("--schedule mbpo/Hopper-v0 --env-id Hopper-v5", (2, 0, -1, 0.5)),
        ("--preset released --schedule mbpo/HalfCheetah-v0 --env-id HalfCheetah-v5", (2, -2, -3, 1)),
        ("--schedule pets/Cheetah-v0", (4, -2, -4, 0.0625)),
        ("--preset released --schedule none --env-id experiments.tasks:mbpo/Ant-v0", (2, None, None, 1)),
        ("--env-id experiments.tasks:mbpo/Ant-v0", (2, None, None, 1)),
        ("--preset paper --env-id Hopper-v5", (2, None, None, 1)),
    ],
)
def test_schedules_by_task(flags, expected):
    args = svg.parse([*flags.split(), "--total-timesteps", "50000"])
    assert (args.horizon, args.target_entropy, args.final_entropy, args.entropy_decay) == expected
    scheduled = args.final_entropy is not None or args.preset != "laptop"
    assert args.log_std == ("tanh" if scheduled else "clamp")


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--schedule", "Hopper"), "--schedule Hopper"),
        (("--no-actor-expansion",), "--horizon 2"),
        (("--expansion-starts", 300), "--expansion-starts 300"),
        (("--expansion-starts", 300, "--critic-expansion", "tdk"), "--expansion-starts 300"),
        (
            ("--horizon", 0, "--critic-expansion", "tdk"),
            "--critic-expansion tdk: must be none with --horizon 0",
        ),
        (("--entropy-decay", 2), "--entropy-decay 2.0"),
        (("--preset", "best"), "preset"),
        (("--gru-layers", 0), "--gru-layers 0"),
        (("--horizon", 0, "--value-loss", 0.5), "--value-loss 0.5"),
    ],
)
def test_contradictions_are_refused(flags, named):
    with pytest.raises(svg.BadInput, match=named):
        svg.parse([*tiny("sac_svg_h"), *map(str, flags)])


def test_resolved_values_are_written(tmp_path):
    import json

    flags = ["--preset", "paper", "--schedule", "poplin/Swimmer-v0", "--runs-dir", str(tmp_path)]
    run_dir = svg.train(svg.parse([*flags, *tiny("sac_svg_h")]))
    args = json.loads((run_dir / "args.json").read_text())["args"]
    assert (args["final_entropy"], args["gru_layers"], args["actor_lr"]) == (-16, 2, 1e-4)
    assert args["hidden"] == 16  # typed
    assert svg.parse(["--resume", str(run_dir)]) == svg.Args(**args | {"resume": str(run_dir)})
