"""SVG: noise that explains a step, windows and weights in closed form, whole episodes, what is constant."""

import math

import numpy as np
import pytest
import torch

from tests.algos.test_math import played_buffer, recorded
from tests.conftest import differing, evaluations, load, long, run, scalars, tiny
from tests.tasks import RHO, A, B

svg = load("svg")
D = torch.float64
GAMMA = 0.9


def column(*values: float) -> torch.Tensor:
    """[len, 1, 1]: one state or action per step of one window."""
    return torch.tensor(values, dtype=D)[:, None, None]


class Toy:
    """π = N(k s, σ²) without a squash, f̂ = a s + b u + c with σ_f = 0.1, r = −(s² + 0.1 u²)."""

    def __init__(self, gain=-0.5, std=0.3, a=0.8, b=0.4, c=0.0, model_std=0.1):
        self.gain = torch.tensor(gain, dtype=D, requires_grad=True)
        self.log_std = torch.tensor([math.log(std)], dtype=D, requires_grad=True)
        self.a, self.b, self.c = a, b, c
        self.model_log_std = torch.tensor([math.log(model_std)], dtype=D)

    def act(self, obs, noise):
        return svg.reproduce(self.gain * obs, self.log_std, noise), torch.zeros_like(obs[:, 0])

    def step(self, obs, action, noise):
        return svg.reproduce(self.a * obs + self.b * action + self.c, self.model_log_std, noise)

    @staticmethod
    def reward(obs, action):
        return -(obs.square() + 0.1 * action.square()).squeeze(1)

    def noises(self, obs, action, next_obs):
        """(1) for a record [k, B, 1]."""
        eta = svg.infer(action, self.gain * obs, self.log_std)
        return eta, svg.infer(next_obs, self.a * obs + self.b * action + self.c, self.model_log_std)

    def value(self, obs, action, next_obs, value=lambda s: 0 * s[:, 0], ended=0.0, first=None, gamma=GAMMA):
        record = torch.full(obs.shape[:2], ended, dtype=D), torch.ones(obs.shape[:2], dtype=torch.bool)
        parts, noise = (self.act, self.step, self.reward, value), self.noises(obs, action, next_obs)
        return svg.window_value(*parts, obs[0] if first is None else first, *noise, *record, gamma)

    def slopes(self, value):
        """d mean value by the gain and by log σ."""
        found = torch.autograd.grad(value.mean(), [self.gain, self.log_std])
        return [slope.item() for slope in found]


RECORD = column(1.0, 0.9), column(-0.2, -0.6), column(0.9, 0.4)


def test_inferred_noise_repeats_the_step_and_carries_gradients():
    """η = 1, ξ = 1.8; ds̃'/dk = 0.4, /d log σ = 0.12, /ds = 0.6."""
    toy, s = Toy(), torch.ones(1, 1, dtype=D, requires_grad=True)
    eta, xi = toy.noises(*(x[:1] for x in RECORD))
    assert eta.item() == pytest.approx(1, abs=1e-12) and xi.item() == pytest.approx(1.8, abs=1e-12)
    assert not eta.requires_grad and not xi.requires_grad
    action, _ = toy.act(s, eta[0])
    following = toy.step(s, action, xi[0])
    assert action.item() == pytest.approx(-0.2, abs=1e-12)
    assert following.item() == pytest.approx(0.9, abs=1e-12)
    slopes = torch.autograd.grad(following, [toy.gain, toy.log_std, s])
    assert [slope.item() for slope in slopes] == pytest.approx([0.4, 0.12, 0.6], abs=1e-12)


def recursion(toy, reaction=True, discounts_both=True):
    """(3a), (3b) of the paper by hand: V_s and V by the gain and log σ, from the end backwards."""
    v_s, v_k, v_l = 0.0, 0.0, 0.0
    std, k = toy.log_std.exp().item(), toy.gain.item()
    for s, u in ((0.9, -0.6), (1.0, -0.2)):
        eta, pi_s = (u - k * s) / std, k if reaction else 0.0
        r_s, r_a = -2 * s, -0.2 * u
        through, kept = r_a + GAMMA * v_s * toy.b, GAMMA if discounts_both else 1.0
        v_k, v_l = through * s + kept * v_k, through * std * eta + kept * v_l
        v_s = r_s + r_a * pi_s + GAMMA * v_s * (toy.a + toy.b * pi_s)
    return v_s, v_k, v_l


def test_recursion_is_what_autodiff_finds():
    """V = −1.7654, by k −0.5324, by log σ −0.20508, by s −3.0244; slips of the recursion give others."""
    toy, first = Toy(), torch.ones(1, 1, dtype=D, requires_grad=True)
    value = toy.value(*RECORD, first=first)
    assert value.item() == pytest.approx(-1.7654, abs=1e-10)
    slopes = torch.autograd.grad(value, [first, toy.gain, toy.log_std])
    assert [x.item() for x in slopes] == pytest.approx([-3.0244, -0.5324, -0.20508], abs=1e-10)
    assert recursion(toy) == pytest.approx([-3.0244, -0.5324, -0.20508], abs=1e-10)
    assert recursion(toy, discounts_both=False)[1] == pytest.approx(-0.5216, abs=1e-10)
    assert recursion(toy, reaction=False)[:2] == pytest.approx([-3.2960, -0.5108], abs=1e-10)


@pytest.mark.parametrize(
    ("k", "value", "by_gain", "by_std"), [(1, -2.462, -1.256, -0.3768), (2, -2.0246, -1.31, -0.220632)]
)
def test_windows_closed_by_a_critic(k, value, by_gain, by_std):
    toy = Toy()
    found = toy.value(*(x[:k] for x in RECORD), value=lambda s: -2 * s.square().squeeze(1))
    assert found.item() == pytest.approx(value, abs=1e-10)
    assert toy.slopes(found) == pytest.approx([by_gain, by_std], abs=1e-10)


def log_density(u, mean, std):
    u = torch.as_tensor(u, dtype=D).reshape(-1, 1)
    log_std = torch.tensor([math.log(std)], dtype=D)
    return svg.gaussian_log_prob(u, torch.as_tensor(mean, dtype=D).expand_as(u), log_std)


def weight(log_pi, log_mu, clip=5.0):
    """Of windows of one step [B]."""
    return svg.importance_weight(log_pi[None], log_mu[None], torch.ones(1, len(log_pi)) > 0, clip)


def test_weights_of_a_window_multiply():
    """Old gain −0.4, σ 0.3: 0.757465 after one step, 0.920556 after two; what is no step of it counts not."""
    s, u, _ = RECORD
    logs = [log_density(u, (k * s).reshape(-1, 1), 0.3)[:, None] for k in (-0.5, -0.4)]
    both, one = torch.tensor([[True], [True]]), torch.tensor([[True], [False]])
    assert svg.importance_weight(*logs, one, 5.0).item() == pytest.approx(0.757465, abs=1e-6)
    assert svg.importance_weight(*logs, both, 5.0).item() == pytest.approx(0.920556, abs=1e-6)
    assert svg.importance_weight(*logs, both, 0.5).item() == 0.5
    assert svg.importance_weight(*logs, both, 0.0).item() == 1.0


STEPS = 5


def moments(toy, true=(0.8, 0.4), c=0.0):
    """Closed form of the toy's expected return from s = 1, by the recursion of mean and variance."""
    a, b = true
    mean, var = torch.ones((), dtype=D), torch.zeros((), dtype=D)
    total, spread = 0.0, (2 * toy.log_std[0]).exp()
    for t in range(STEPS):
        square = mean**2 + var
        total = total - GAMMA**t * (square + 0.1 * (toy.gain**2 * square + spread))
        closed = a + b * toy.gain
        mean, var = closed * mean + c, closed**2 * var + b**2 * spread + 0.01
    return total


def episodes(count, seed=0):
    """Real records [5, count, 1] of π on the true system s' = 0.8 s + 0.4 u + 0.1 ξ from s = 1."""
    generator, toy = torch.Generator().manual_seed(seed), Toy()
    noise = torch.randn(2, STEPS, count, 1, dtype=D, generator=generator)
    obs, action, s = [], [], torch.ones(count, 1, dtype=D)
    with torch.no_grad():
        for t in range(STEPS):
            obs.append(s)
            action.append(toy.act(s, noise[0, t])[0])
            s = toy.step(s, action[-1], noise[1, t])
    return torch.stack(obs), torch.stack(action), torch.stack([*obs[1:], s])


def imagined(toy, count, seed=0):
    """Mean return of the planner: fresh noise through the toy's own model."""
    noise = torch.randn(2, STEPS, count, 1, dtype=D, generator=torch.Generator().manual_seed(seed))
    record = torch.zeros(STEPS, count, dtype=D), torch.ones(STEPS, count, dtype=torch.bool)
    first, parts = torch.ones(count, 1, dtype=D), (toy.act, toy.step, toy.reward, lambda s: 0 * s[:, 0])
    return svg.window_value(*parts, first, *noise, *record, GAMMA)


def test_gradient_of_real_paths_is_unbiased():
    """J = −1.650142, dJ/dk = −0.813419, dJ/d log σ = −0.194610; 100 000 episodes are within 4 deviations."""
    toy = Toy()
    exact = moments(toy)
    assert exact.item() == pytest.approx(-1.650142, abs=1e-6)
    assert toy.slopes(exact) == pytest.approx([-0.813419, -0.194610], abs=1e-6)
    found = toy.slopes(toy.value(*episodes(100_000)))
    assert found[0] == pytest.approx(-0.813419, abs=4 * 0.0014)
    assert found[1] == pytest.approx(-0.194610, abs=4 * 0.0008)


def test_an_additive_model_error_costs_nothing():
    """c = 0.3: ξ absorbs it (−1.2, −3.8 on the record), gradients stay; the planner's is −2.829299."""
    right, biased = Toy(), Toy(c=0.3)
    assert biased.noises(*RECORD)[1].flatten().tolist() == pytest.approx([-1.2, -3.8], abs=1e-12)
    for record in (RECORD, episodes(1_000)):
        slopes = [toy.slopes(toy.value(*record)) for toy in (right, biased)]
        assert slopes[0] == pytest.approx(slopes[1], abs=1e-12)
    planner = biased.slopes(moments(biased, c=0.3))
    assert planner[0] == pytest.approx(-2.829299, abs=1e-6)
    assert biased.slopes(imagined(biased, 100_000))[0] == pytest.approx(planner[0], abs=0.02)


def test_an_error_of_the_jacobian_costs_boundedly():
    """f̂ = 0.9 s + 0.3 u: −0.647630 on real paths, −1.201955 for the planner; the truth is −0.813419."""
    wrong = Toy(a=0.9, b=0.3)
    assert wrong.slopes(wrong.value(*episodes(100_000)))[0] == pytest.approx(-0.647630, abs=0.006)
    planner = wrong.slopes(moments(wrong, true=(0.9, 0.3)))[0]
    assert planner == pytest.approx(-1.201955, abs=1e-6)
    assert wrong.slopes(imagined(wrong, 100_000))[0] == pytest.approx(planner, abs=0.02)


GRID = torch.linspace(-9, 9, 36_001, dtype=D)
CELL = (GRID[1] - GRID[0]).item()


def test_weights_of_two_gaussians():
    """Old N(0, 0.3²), new N(0.3, 0.3²): w(0.2) = 1.18136, E w² = e, E min(w, 5) = 0.953646."""
    old, new = log_density(GRID, 0.0, 0.3), log_density(GRID, 0.3, 0.3)
    at = weight(log_density(0.2, 0.3, 0.3), log_density(0.2, 0.0, 0.3))
    assert at.item() == pytest.approx(1.18136, abs=1e-5)
    free, cut = weight(new, old, 1e30), weight(new, old, 5.0)
    assert (old.exp() * free.square()).sum().item() * CELL == pytest.approx(math.e, rel=1e-6)
    assert (old.exp() * cut).sum().item() * CELL == pytest.approx(0.953646, abs=1e-5)


@pytest.mark.parametrize(("clip", "slopes"), [(1e30, (-1.0, -0.6)), (0.0, (-0.4, -0.666667))])
def test_weighted_old_actions_give_the_gradient_of_the_new_policy(clip, slopes):
    """Old N(0.2, 0.4²), new N(0.5, 0.3²), r = −u²: −2μ and −2σ; without weights −0.4 and −0.66667."""
    mean, std = torch.tensor([0.5, 0.3], dtype=D, requires_grad=True).unbind()
    log_std = std.log().reshape(1)
    u, old = GRID[:, None], log_density(GRID, 0.2, 0.4)
    noise = svg.infer(u, mean.expand_as(u), log_std)
    w = weight(svg.gaussian_log_prob(u, mean.expand_as(u), log_std), old, clip).detach()
    again = svg.reproduce(mean.expand_as(u), log_std, noise)
    assert torch.allclose(again, u)
    loss = (old.exp() * w * -again.square().squeeze(1)).sum() * CELL
    found = torch.autograd.grad(loss, [mean, std])
    assert [x.item() for x in found] == pytest.approx(slopes, abs=1e-5)


def test_ratios_are_the_same_before_and_behind_the_squash():
    """u = 0.7, new N(0.3, 0.5²), old N(−0.1, 0.8²): 1.915548; against uniform actions 1.825577."""
    u = torch.tensor([[0.7]], dtype=D)
    new, old = log_density(0.7, 0.3, 0.5), log_density(0.7, -0.1, 0.8)
    assert weight(new, old).item() == pytest.approx(1.915548, abs=1e-6)
    slope = svg.squash_slope(u)
    assert slope.item() == pytest.approx(math.log(1 - math.tanh(0.7) ** 2), abs=1e-12)
    assert weight(new - slope, old - slope).item() == pytest.approx(1.915548, abs=1e-6)
    stored = svg.uniform_taken(np.tanh(np.float32([0.7])))
    assert stored[0].item() == pytest.approx(0.7, abs=1e-6)
    assert weight(new, stored[1:].double()).item() == pytest.approx(1.825577, abs=1e-5)


def test_divergence_of_two_gaussians():
    one = torch.tensor([[0.5]], dtype=D), torch.tensor([math.log(0.3)], dtype=D)
    other = torch.tensor([[0.2]], dtype=D), torch.tensor([math.log(0.4)], dtype=D)
    assert svg.gaussian_kl(*one, *other).item() == pytest.approx(0.350182, abs=1e-6)
    assert svg.gaussian_kl(*one, *one).item() == pytest.approx(0, abs=1e-12)


def test_noise_is_scaled_by_the_deviation_not_by_its_logarithm():
    """log σ_f = −2, residual 0.27: ξ = 1.995045 and 0.27 again, where meta-mb has −3.990090."""
    log_std, mean = torch.tensor([-2.0], dtype=D), torch.zeros(1, 1, dtype=D)
    noise = svg.infer(torch.full((1, 1), 0.27, dtype=D), mean, log_std)
    assert noise.item() == pytest.approx(1.995045, abs=1e-6)
    assert svg.reproduce(mean, log_std, noise).item() == pytest.approx(0.27, abs=1e-12)
    assert (noise * log_std).item() == pytest.approx(-3.990090, abs=1e-5)


def noise_free(gain):
    """The LQR system with V = −p s²; returns the SVG(1) gradient at s = 1 and p."""
    p = (1 + RHO * gain**2) / (1 - GAMMA * (A + B * gain) ** 2)
    toy = Toy(gain=gain, a=A, b=B)
    action, after = torch.tensor([[[gain]]], dtype=D), torch.tensor([[[A + B * gain]]], dtype=D)
    value = toy.value(column(1.0), action, after, value=lambda s: -p * s.square().squeeze(1))
    return toy.slopes(value)[0], p


def test_the_critic_is_the_rest_of_the_path():
    """−1.065045 at s = 1; discounted over the closed loop −1.905268 = −dp/dk; 0 at the LQR gain."""
    slope, p = noise_free(-0.4)
    assert p == pytest.approx(1.817531, abs=1e-6) and slope == pytest.approx(-1.065045, abs=1e-6)
    total = slope / (1 - GAMMA * (A + B * -0.4) ** 2)  # Σ γ^t s_t²
    assert total == pytest.approx(-1.905268, abs=1e-6)
    assert total == pytest.approx(-(noise_free(-0.4 + 1e-6)[1] - noise_free(-0.4 - 1e-6)[1]) / 2e-6, abs=1e-5)
    assert noise_free(-1.324624)[0] == pytest.approx(0, abs=1e-5)


def test_noise_enters_only_through_where_the_value_is_asked():
    """At (1, −0.2), p = 2: SVG(0) with the exact Q and SVG(1) at ξ = 0 give −0.9968, at s' = 0.9 −1.256."""
    value, toy = lambda s: -2 * s.square().squeeze(1), Toy()
    s, u, _ = (x[:1] for x in RECORD)
    eta = svg.infer(u, toy.gain * s, toy.log_std)[0]
    again, _ = toy.act(s[0], eta)
    q = toy.reward(s[0], again) + GAMMA * value(toy.a * s[0] + toy.b * again)
    assert toy.slopes(q)[0] == pytest.approx(-0.9968, abs=1e-10)
    assert toy.slopes(toy.value(s, u, column(0.72), value=value))[0] == pytest.approx(-0.9968, abs=1e-10)
    assert toy.slopes(toy.value(s, u, column(0.9), value=value))[0] == pytest.approx(-1.256, abs=1e-10)


def test_a_termination_leaves_the_reward_alone():
    toy = Toy()
    found = toy.value(*(x[:1] for x in RECORD), value=lambda s: -2 * s.square().squeeze(1), ended=1.0)
    assert toy.slopes(found)[0] == pytest.approx(0.04, abs=1e-12)


@pytest.mark.parametrize(("ended", "rest"), [(0.0, 0.81 * -2 * 0.16), (1.0, 0.0)])
def test_a_window_stands_still_behind_its_episode(ended, rest):
    """Two of four steps are of the episode: the value of s_2 counts at γ², or none after a termination."""
    toy, inside = Toy(), [True, True, False, False]
    record = [torch.cat([x, column(3.0, -2.0)]) for x in RECORD]
    ends = torch.tensor([[0.0], [ended], [1.0], [0.0]], dtype=D)
    parts = toy.act, toy.step, toy.reward, lambda s: -2 * s.square().squeeze(1)
    value = svg.window_value(
        *parts, record[0][0], *toy.noises(*record), ends, torch.tensor(inside)[:, None], GAMMA
    )
    assert value.item() == pytest.approx(-1.7654 + rest, abs=1e-10)
    expected = {0.0: -1.31, 1.0: -0.5324}[ended]
    assert toy.slopes(value)[0] == pytest.approx(expected, abs=1e-10)


# ---------------------------------------------------------------- the agent


def make_agent(*flags: object, obs_dim=1, action_dim=1):
    return svg.Agent(svg.parse(tiny("svg", *flags)), obs_dim, action_dim, torch.device("cpu"))


def still(agent):
    """Its optimisers move nothing: gradients are left to be looked at."""
    for optimizer in (agent.optimizer, agent.actor_optimizer):
        optimizer.step = lambda: None
    return agent


def window(agent, buffer, places=range(100, 116), length=1):
    at, linked = svg.windows(buffer, torch.tensor(places), length)
    return buffer[at.flatten()], buffer.taken[at.flatten()], linked


def gradients(module):
    return torch.cat([p.grad.flatten() for p in module.parameters()])


def test_right_after_acting_weights_are_1_and_the_divergence_0(monkeypatch):
    agent = still(make_agent("--kl", 1, "--no-normalize"))
    buffer = played_buffer(svg, agent)
    metrics = agent.learn(*window(agent, buffer))
    assert metrics["weights/mean"].item() == pytest.approx(1, abs=1e-5)
    assert metrics["weights/effective"].item() == pytest.approx(1, abs=1e-5)
    assert metrics["weights/log_ratio"].item() == pytest.approx(0, abs=1e-5)
    assert metrics["losses/kl"].item() == pytest.approx(0, abs=1e-7)
    agent.actor.mean[-1].bias.data.add_(0.4)  # the policy moves on
    agent.actor.raw_std.data.add_(0.5)
    obs = window(agent, buffer)[0].obs
    with torch.no_grad():
        pair = [torch.distributions.Normal(m, s.exp()) for m, s in (agent.slow_actor(obs), agent.actor(obs))]
    metrics = agent.learn(*window(agent, buffer))
    expected = torch.distributions.kl_divergence(*pair).sum(1).mean()
    assert metrics["losses/kl"].item() == pytest.approx(expected.item(), rel=1e-5) and expected > 0.1
    assert metrics["weights/effective"] < 0.95


@pytest.mark.parametrize("horizon", [1, 3])
def test_recorded_steps_are_repeated_exactly(horizon, monkeypatch):
    """Each state in which the policy is asked is a recorded one, and the value is asked at the last s'."""
    agent = make_agent("--horizon", horizon, "--learning-starts", 60)
    buffer, seen = played_buffer(svg, agent), []
    first = next(i for i in range(60, 190) if len(set(buffer.episode[i : i + 4].tolist())) == 1)
    batch, taken, linked = window(agent, buffer, [first], horizon)
    repeat = agent.repeat
    monkeypatch.setattr(agent, "repeat", lambda s, n: (seen.append(s), repeat(s, n))[1])
    agent.critic.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    agent.climb(batch, taken, linked, torch.ones(1))
    expected = torch.cat([batch.obs, batch.next_obs[-1:]])
    assert len(seen) == horizon + 1 and torch.allclose(torch.cat(seen), expected, atol=1e-5)


def test_policy_gradient_of_one_step_by_hand():
    """(3) with k = 1 through explicit derivatives: w [r_a + γ (1 − d) V_s' f_a] ∂ã/∂θ."""
    agent = still(make_agent("--gradient-norm", 1e9, obs_dim=3, action_dim=2))
    torch.manual_seed(2)
    obs, u = torch.randn(16, 3), torch.randn(16, 2)
    ended, w = (torch.rand(16) < 0.4).float(), torch.rand(16)
    batch = svg.Batch(obs, u.tanh(), torch.randn(16), obs + 0.1 * torch.randn(16, 3), ended)
    agent.climb(batch, torch.cat([u, torch.zeros(16, 1)], 1), torch.ones(1, 16) > 0, w)
    found = gradients(agent.actor)

    action, after = u.tanh().requires_grad_(), batch.next_obs.clone().requires_grad_()
    (r_a,) = torch.autograd.grad(agent.reward(obs, action).sum(), action)
    (v_s,) = torch.autograd.grad(agent.critic(after).sum(), after)
    (through,) = torch.autograd.grad((agent.model(obs, action)[0] * v_s).sum(), action)
    assert torch.equal(agent.model.normalizer.std, torch.ones(3))
    slope = w[:, None] * (r_a + 0.99 * (1 - ended[:, None]) * through)
    mean, log_std = agent.actor(obs)
    again = (mean + log_std.exp() * ((u - mean) / log_std.exp()).detach()).tanh()
    loss = -(slope * again).sum(1).mean()
    expected = torch.autograd.grad(loss, list(agent.actor.parameters()))
    assert torch.allclose(found, torch.cat([g.flatten() for g in expected]), atol=1e-6)
    assert found.abs().max() > 1e-3 and agent.actor.raw_std.grad.abs().min() > 1e-5


def test_without_a_model_the_policy_climbs_q():
    """(3) with k = 0: w Q_a ∂ã/∂θ."""
    agent = still(make_agent("--horizon", 0, "--gradient-norm", 1e9))
    batch, taken, linked = window(agent, played_buffer(svg, agent))
    w = torch.rand(len(batch.obs))
    agent.climb(batch, taken, linked, w)
    found, action = gradients(agent.actor), taken[:, :1].tanh().requires_grad_()
    (q_a,) = torch.autograd.grad(agent.critic(batch.obs, action).sum(), action)
    mean, log_std = agent.actor(batch.obs)
    again = (mean + log_std.exp() * ((taken[:, :1] - mean) / log_std.exp()).detach()).tanh()
    loss = -(w * (q_a * again).sum(1)).mean()
    expected = torch.autograd.grad(loss, list(agent.actor.parameters()))
    assert torch.allclose(found, torch.cat([g.flatten() for g in expected]), atol=1e-6)
    assert not hasattr(agent, "model")


@pytest.mark.parametrize("horizon", [0, 1, 2])
def test_the_policy_loss_reaches_nothing_else(horizon):
    agent = still(make_agent("--horizon", horizon, "--kl", 1, "--soft"))
    agent.climb(*window(agent, played_buffer(svg, agent), length=max(horizon, 1)), torch.ones(16))
    others = [agent.critic, agent.critic_target, agent.slow_actor]
    others += [agent.model, agent.reward] if horizon else []
    assert all(p.grad is None for module in others for p in module.parameters())
    assert all(p.grad is not None for p in agent.actor.parameters())
    assert all(p.requires_grad for p in agent.critic.parameters())


@pytest.mark.parametrize("imagine", [False, True])
def test_a_constant_of_the_model_costs_nothing_on_real_paths(imagine):
    """Another σ_f, another bias of f̂: the policy's gradient is the same to rounding; imagined, it is not."""
    found = []
    for change in (0.0, 0.5):
        torch.manual_seed(0)
        agent = still(make_agent("--horizon", 2, *(["--imagine"] if imagine else [])))
        buffer = played_buffer(svg, agent)
        agent.model.mean[-1].bias.data.add_(change)
        agent.model.log_std.data.sub_(change)
        torch.manual_seed(1)
        agent.climb(*window(agent, buffer, length=2), torch.ones(16))
        found.append(gradients(agent.actor))
    assert torch.allclose(*found, atol=1e-5) != imagine


def test_imagined_steps_have_noise_of_their_own_and_no_weights(monkeypatch):
    agent, calls = still(make_agent("--imagine")), recorded(monkeypatch, svg, "window_value")
    batch, taken, linked = window(agent, played_buffer(svg, agent))
    losses = []
    for weight in (0.0, 7.0):
        torch.manual_seed(3)
        losses.append(agent.climb(batch, taken, linked, torch.full((16,), weight))["losses/actor_loss"])
    eta, xi = calls[0][5:7]
    torch.manual_seed(3)
    assert torch.equal(eta[0], torch.randn(16, 1)) and torch.equal(xi[0], torch.randn(16, 1))
    assert losses[0] == losses[1] != 0


def test_critic_learns_from_weighted_rows_of_one_step(monkeypatch):
    """(5a) with k = 2: the weight is that of the first step alone, the target has no gradient."""
    agent = make_agent("--horizon", 2, "--learning-starts", 60)
    buffer, calls = played_buffer(svg, agent), recorded(monkeypatch, svg, "weighted_value_loss")
    agent.actor.mean[-1].bias.data.add_(0.3)
    batch, taken, linked = window(agent, buffer, length=2)
    first = batch.obs[:16]
    before, after = agent.critic(first), agent.critic_target(batch.next_obs[:16])
    with torch.no_grad():
        log_pi = svg.gaussian_log_prob(taken[:16, :1], *agent.actor(first))
    agent.learn(batch, taken, linked)
    ((value, target, found),) = calls
    assert not target.requires_grad and torch.equal(value, before)
    assert torch.allclose(target, batch.reward[:16] + 0.99 * (1 - batch.terminated[:16]) * after)
    assert torch.allclose(found, (log_pi - taken[:16, 1]).exp().clamp_max(5), rtol=1e-4)
    assert found.std() > 0.05 and linked[1].any()
    assert svg.weighted_value_loss(*(torch.tensor([x, 3.0]) for x in (2.0, 5.0, 0.5))) == 0.5 * (4.5 + 0) / 2


def test_model_predicts_the_change_in_deviations():
    agent = still(make_agent(obs_dim=2, action_dim=1))
    agent.actor.normalizer.std.copy_(torch.tensor([2.0, 0.5]))
    obs, action, noise = torch.randn(4, 2), torch.rand(4, 1), torch.randn(4, 2)
    mean, log_std = agent.model(obs, action)
    after = agent.model.step(obs, action, noise)
    expected = obs + torch.tensor([2.0, 0.5]) * (mean + log_std.exp() * noise)
    assert torch.allclose(after, expected, atol=1e-6)
    assert torch.allclose(svg.infer(agent.model.change(obs, after), mean, log_std), noise, atol=1e-5)


def test_a_soft_reward_pays_for_entropy(monkeypatch):
    """(8): r − α log π in the target of V and along the window, α α learned number; α falls above H̄."""
    agent, calls = make_agent("--soft", "--init-alpha", 0.5), recorded(monkeypatch, svg, "td_target")
    buffer = played_buffer(svg, agent)
    batch, taken, linked = window(agent, buffer)
    u = taken[:, :1]
    with torch.no_grad():
        mean, log_std = agent.actor(batch.obs)
        gauss = torch.distributions.Normal(mean, log_std.exp())
        log_pi = (gauss.log_prob(u) - (1 - u.tanh() ** 2).log()).sum(1)
        action, bonus = agent.repeat(batch.obs, svg.infer(u, mean, log_std))
    assert torch.allclose(action, u.tanh(), atol=1e-6)
    assert torch.allclose(bonus, -0.5 * log_pi, atol=1e-5)
    agent.learn(batch, taken, linked)
    assert torch.allclose(calls[0][0], batch.reward - 0.5 * log_pi, atol=1e-4)
    assert agent.log_alpha.item() != math.log(0.5)
    plain = make_agent()
    assert plain.repeat(batch.obs, u)[1].abs().max() == 0 and not hasattr(plain, "log_alpha")


@pytest.mark.parametrize("name", ["init-alpha", "alpha-lr", "target-entropy"])
def test_what_belongs_to_the_soft_form_is_refused_without_it(name):
    with pytest.raises(svg.BadInput, match=f"--{name} 0.01: must be .*, its default, without --soft"):
        svg.parse(tiny("svg", f"--{name}", 0.01))
    svg.parse(tiny("svg", f"--{name}", 0.01, "--soft"))


def test_whole_episodes_have_no_horizon():
    with pytest.raises(svg.BadInput, match="--horizon 3: must be 1, its default, with --whole-episodes"):
        svg.parse(tiny("svg", "--whole-episodes", "--horizon", 3))


def test_the_policy_takes_one_step_for_each_whole_episode(monkeypatch):
    """Of the episode that has just ended, in order, with w = 1; none for what the warm-up acted in."""
    agent = make_agent("--whole-episodes", "--learning-starts", 16)
    buffer = agent.make_buffer(30, svg.make_env("tests.tasks:Cliff-v0"))
    climbed, original = [], agent.climb
    monkeypatch.setattr(agent, "climb", lambda *args: (climbed.append(args), original(*args))[1])
    ends = [0, 10, 20, 27, 34]  # beginnings of episodes: warm-up until 16
    for i in range(40):
        obs = np.float32([i])
        action = agent.act(obs)
        buffer.add(obs, action, 0.0, obs + 1, False, sum(i >= b for b in ends) - 1)
        if i >= 16:
            before = torch.cat([p.detach().flatten() for p in agent.actor.parameters()])
            agent.update(buffer, i + 1)
            after = torch.cat([p.detach().flatten() for p in agent.actor.parameters()])
            assert torch.equal(before, after) != (i in (27, 34))
    assert [c[0].obs[:, 0].tolist() for c in climbed] == [list(range(20, 27)), list(range(27, 34))]
    assert all(c[2].all() and c[2].shape == (7, 1) and c[3].tolist() == [1.0] for c in climbed)


def test_an_episode_that_the_replay_cannot_hold_is_told(monkeypatch):
    told = []
    monkeypatch.setattr(svg, "warn", told.append)
    for flags in (["--whole-episodes"], []):
        agent = make_agent("--learning-starts", 16, *flags)
        buffer = agent.make_buffer(30, svg.make_env("tests.tasks:Cliff-v0"))
        for i in range(61):
            buffer.add([0.0], agent.act(np.zeros(1)), 0.0, [0.0], False, i // 30)
    assert told == ["no policy step: an episode of 30 steps is not shorter than the replay"] * 2


def test_a_restored_replay_knows_where_its_episode_began():
    agent = make_agent("--whole-episodes", "--learning-starts", 16)
    env = svg.make_env("tests.tasks:Cliff-v0")
    buffers = [agent.make_buffer(30, env) for _ in range(2)]
    for i in range(45):
        buffers[0].add([float(i)], agent.act(np.zeros(1)), 0.0, [i + 1.0], False, i // 8)
    buffers[1].load_state_dict(buffers[0].state_dict())
    assert torch.equal(buffers[1].taken, buffers[0].taken) and buffers[0].taken[:, 1].std() > 0
    assert (buffers[1].current, buffers[1].began) == (buffers[0].current, buffers[0].began) == (5, 40)
    for buffer in buffers:
        buffer.add([0.0], [0.0], 0.0, [0.0], False, 6)
        assert buffer.finished == (40, 5)


def test_whole_episodes_are_resumed_in_the_same_bits(tmp_path):
    """200 steps, then 300, equal 300 at once: each episode is climbed once, also over the seam."""
    flags = ("--whole-episodes", "--total-timesteps")
    short, planned = run("svg", tmp_path / "a", *flags, 200), run("svg", tmp_path / "b", *flags, 300)
    svg.train(svg.parse(["--resume", str(short), "--total-timesteps", "300"]))
    assert differing(short / "final.pt", planned / "final.pt") == []
    found = {event.value for event in scalars(planned)["losses/actor_loss"]}
    assert len(found) > 5


def test_what_was_taken_is_stored_as_it_was_taken():
    """u before the squash, and its density under the policy that acted, even if that has changed since."""
    agent = make_agent("--learning-starts", 16, "--batch-size", 16)
    buffer, expected = agent.make_buffer(60, svg.make_env("tests.tasks:Cliff-v0")), []
    for i in range(40):
        obs = np.float32([np.sin(i)])
        with torch.no_grad():
            mean, log_std = agent.actor(torch.from_numpy(obs)[None])
        action = agent.act(obs)
        buffer.add(obs, action, 0.0, obs, False, 0)
        if i >= 16:
            u = buffer.taken[i, 0]
            expected.append(torch.distributions.Normal(mean[0], log_std.exp()).log_prob(u).item())
            assert u.tanh().item() == pytest.approx(action.item(), abs=1e-6)
            agent.update(buffer, i + 1)
        else:
            slope = math.log(1 - float(action[0]) ** 2)
            assert buffer.taken[i, 1].item() == pytest.approx(slope - math.log(2), abs=1e-4)
    assert buffer.taken[16:40, 1].tolist() == pytest.approx(expected, abs=1e-5)


def test_saturated_actions_keep_their_weight_of_1():
    """tanh u is exactly 1 in float32: u is stored, not found again."""
    agent = make_agent("--no-normalize", "--learning-starts", 16)
    agent.actor.mean[-1].bias.data.fill_(14.0)
    buffer = played_buffer(svg, agent)
    assert (buffer.rows[60:, 1] == 1).all()
    metrics = still(agent).learn(*window(agent, buffer))
    assert metrics["weights/mean"].item() == pytest.approx(1, abs=1e-4)


def test_deviation_has_a_floor_that_does_not_hold_it():
    agent = make_agent()
    assert agent.actor(torch.zeros(1, 1))[1].exp().item() == pytest.approx(0.5)
    agent.actor.raw_std.data.fill_(-30.0)
    log_std = agent.actor(torch.zeros(1, 1))[1]
    assert log_std.exp().item() == pytest.approx(0.05)
    agent.actor.raw_std.data.fill_(-4.0)
    agent.actor(torch.zeros(1, 1))[1].sum().backward()
    assert agent.actor.raw_std.grad.item() > 0.1


@pytest.mark.parametrize("whole", [True, False])
def test_gradient_is_clipped_and_what_overflows_along_an_episode_is_zero(whole):
    """Along whole episodes it is counted; elsewhere the loss stays what it is, which ends the run."""
    agent = make_agent("--gradient-norm", 1e-3, *(["--whole-episodes"] if whole else []))
    batch, taken, linked = window(agent, played_buffer(svg, agent))
    metrics = still(agent).climb(batch, taken, linked, torch.ones(16))
    assert gradients(agent.actor).norm().item() == pytest.approx(1e-3, rel=1e-3)
    assert metrics.get("policy/overflow", 0) == 0 and metrics["losses/actor_loss"] != 0
    metrics = agent.climb(batch, taken, linked, torch.full((16,), math.inf))
    if whole:
        assert gradients(agent.actor).abs().max() == 0 and metrics["policy/overflow"] == 1
        assert all(value.isfinite() for value in metrics.values())
    else:
        assert not metrics["losses/actor_loss"].isfinite()


def test_divergence_holds_the_policy_back():
    """A large β: the policy stays where its slow copy is; without it, it goes."""
    shifts = []
    for beta in (0, 1000):
        torch.manual_seed(0)
        agent = make_agent("--kl", beta, "--actor-lr", 1e-2, "--tau", 0.0)
        buffer = played_buffer(svg, agent)
        old = agent.actor(buffer.rows[:, :1])[0].detach()
        for _ in range(20):
            agent.update(buffer, 61)
        shifts.append((agent.actor(buffer.rows[:, :1])[0] - old).abs().mean().item())
    assert shifts[1] < 0.3 * shifts[0]


def test_slow_copies_follow():
    agent = make_agent("--kl", 0.1, "--tau", 0.5)
    buffer = played_buffer(svg, agent)
    for name, slow in (("critic", "critic_target"), ("actor", "slow_actor")):
        old = [p.clone() for p in getattr(agent, slow).parameters()]
        agent.update(buffer, 61)
        for a, b, c in zip(
            old, getattr(agent, name).parameters(), getattr(agent, slow).parameters(), strict=True
        ):
            assert torch.allclose(c, 0.5 * (a + b), atol=1e-6) and not torch.equal(b, c)


def test_what_is_logged(tmp_path):
    found = scalars(run("svg", tmp_path, "--kl", 0.1, "--soft"))
    tags = "losses/qf_loss losses/qf_values losses/actor_loss losses/kl losses/alpha model/loss".split()
    tags += "model/reward_error weights/mean weights/effective weights/clipped weights/log_ratio".split()
    for tag in [*tags, "policy/std", "policy/magnitude", "policy/gradient_norm"]:
        assert len(found[tag]) == 12, tag
    effective = [event.value for event in found["weights/effective"]]
    assert min(effective) > 0 and max(effective) <= 1.0001


@long
def test_learns_the_linear_quadratic_task(tmp_path):
    flags = "--env-id tests.tasks:LQR-v0 --total-timesteps 3000 --eval-every 3000 --batch-size 64 --hidden 64"
    flags += " --learning-starts 500 --num-threads 1 --device cpu --actor-lr 1e-3 --model-hidden 64"
    args = svg.parse([*flags.split(), "--runs-dir", str(tmp_path)])
    returns = [float(row[1]) for row in evaluations(svg.train(args))[1:]]
    assert returns[0] < -20 and returns[-1] > -6
