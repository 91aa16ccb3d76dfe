"""Dreamer: λ-returns, the cut, free nats, recurrent model, windows over episodes' ends, what is believed."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from tests.agents.test_watch import PAGE, Page
from tests.algos.test_math import played_buffer
from tests.conftest import load, long, run, scalars, tiny
from tests.docs.test_docs import blocks

dreamer = load("dreamer")
Gaussians = dreamer.Gaussians


def tensor(*values: float, grad: bool = False) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


def column(*values: float) -> torch.Tensor:
    """[H, 1], float64."""
    return tensor(*values)[:, None]


def agent_of(*flags: object, sizes: tuple[int, int] = (1, 1)):
    return dreamer.Agent(dreamer.parse(tiny("dreamer", *flags)), *sizes, torch.device("cpu"))


@pytest.fixture
def noiseless(monkeypatch):
    """What is drawn is the mean."""
    monkeypatch.setattr(torch, "randn", lambda *shape, **options: torch.zeros(*shape, **options))
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)


# ---------------------------------------------------------------- λ-returns


@pytest.mark.parametrize(
    ("lam", "alive", "expected"),
    [
        (0, (1, 1, 1), (10, 20, 30)),
        (0.5, (1, 1, 1), (16.525, 24.5, 30)),
        (0.95, (1, 1, 1), (25.86025, 28.55, 30)),
        (1, (1, 1, 1), (27.1, 29, 30)),
        (0.95, (1, 0, 1), (3.16, 2, 30)),
    ],
)
def test_lambda_returns(lam, alive, expected):
    """r = (1, 2, 3), v = (10, 20, 30), γ = 0.9; a termination cuts what comes after it."""
    found = dreamer.lambda_returns(column(1, 2, 3), column(*alive), column(10, 20, 30), 0.9, lam)
    assert found[:, 0].tolist() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("value", "expected"), [(0, 10.109958), (50, 55.054979), (100, 100)])
def test_lambda_return_of_constants(value, expected):
    """r = 1, γ = 0.99, λ = 0.95, H = 15; v = r / (1 − γ) is the fixed point."""
    ones = torch.ones(15, 1, dtype=torch.float64)
    first = dreamer.lambda_returns(ones, ones, value * ones, 0.99, 0.95)[0].item()
    decay = 0.99 * 0.95
    power = decay**15
    formula = (1 + 0.99 * 0.05 * value) * (1 - power) / (1 - decay) + power * value
    assert first == pytest.approx(expected, abs=1e-6) and first == pytest.approx(formula, abs=1e-9)


def test_lambda_returns_are_a_mixture_of_horizons():
    """Weights (1 − λ) λ^{n−1}, the last λ^{H−1}, on values of n steps: MVE = (10, 19, 27.1) -> 25.86025."""
    reward, value, lam = (1, 2, 3), (10, 20, 30), 0.95
    mve = [sum(0.9**t * reward[t] for t in range(n)) + 0.9**n * value[n - 1] for n in (1, 2, 3)]
    assert mve == pytest.approx([10, 19, 27.1])
    weights = [(1 - lam), (1 - lam) * lam, lam**2]
    found = dreamer.lambda_returns(column(*reward), column(1, 1, 1), column(*value), 0.9, lam)
    assert sum(weights) == pytest.approx(1)
    assert found[0].item() == pytest.approx(sum(w * v for w, v in zip(weights, mve, strict=True)))
    long_weights = [(1 - lam) * lam**n for n in range(14)] + [lam**14]
    assert long_weights[-1] == pytest.approx(0.487675, abs=1e-6)
    mean = sum(n * w for n, w in enumerate(long_weights, 1))
    assert mean == pytest.approx(10.734, abs=1e-3) and mean == pytest.approx((1 - lam**15) / (1 - lam))


@pytest.mark.parametrize("lam", [0, 0.3, 1])
def test_one_imagined_step_is_a_one_step_target(lam):
    """H = 1: R_0 = r̂ + γ ĉ v, whatever λ."""
    found = dreamer.lambda_returns(column(2), column(0.5), column(10), 0.9, lam)
    assert found.item() == pytest.approx(2 + 0.9 * 0.5 * 10)


def test_weights_of_a_dream():
    """w_0 = 1 − d, then products of γ ĉ, the last ĉ unused and all of them constants."""
    alive = torch.tensor([[1.0, 0.5], [0.5, 1.0], [0.2, 0.2]], requires_grad=True)
    found = dreamer.dream_weights(torch.tensor([1.0, 0.0]), alive, 0.9)
    assert found[:, 0].tolist() == pytest.approx([1, 0.9, 0.405]) and found[:, 1].tolist() == [0, 0, 0]
    assert not found.requires_grad


# ---------------------------------------------------------------- the actor's gradient in a linear world


class LinearWorld(nn.Module):
    """f = (s, r): ŝ' = 0.9 s + 0.5 a, and the reward s + 0.2 a of the step is read from the next f."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(tensor(0.9, 0.5))

    def step(self, feature, action, noise):
        s = feature[:, :1]
        return torch.cat([self.weight[0] * s + self.weight[1] * action, s + 0.2 * action], 1)

    def outcome(self, feature):
        return feature[..., 1], torch.full_like(feature[..., 1], -1e9)


class LinearPolicy(nn.Module):
    """a = k s, without noise; where the state is a constant the policy's gradient ends there."""

    def __init__(self):
        super().__init__()
        self.k = nn.Parameter(tensor(-0.4))

    def forward(self, feature):
        s = feature[:, :1]
        return Gaussians((self.k * s).atanh(), torch.zeros_like(s))


def linear_dream(horizon: int, *flags: object, cut_at_end: bool = True):
    """The agent, and its dream from s = 1; v of the last state is Q(s, a) = 2 s + 0.5 a of the policy's a."""
    agent = agent_of("--horizon", horizon, "--gamma", 0.9, "--return-lambda", 1, *flags)
    agent.model, agent.actor = LinearWorld(), LinearPolicy()

    def value(feature):
        s = feature[..., 0]
        return 2 * s + 0.5 * agent.actor.k * (s.detach() if cut_at_end else s)

    agent.critic_target = value
    return agent, agent.dream(tensor(1, 0)[None])


@pytest.mark.parametrize(
    ("flags", "cut_at_end", "expected"),
    [((), True, 2.27045), ((), False, 2.14085), (("--no-cut",), False, 1.95905)],
)
def test_the_cut_leaves_out_how_later_actions_react(flags, cut_at_end, expected):
    """Value 2.21402 of H = 2 steps in any case; dR/dk in full is that of sac_svg_h."""
    agent, dream = linear_dream(2, *flags, cut_at_end=cut_at_end)
    assert dream.returns[0].item() == pytest.approx(2.21402, abs=1e-6)
    dream.returns[0].sum().backward()
    assert agent.actor.k.grad.item() == pytest.approx(expected, abs=1e-5)
    assert agent.model.weight.grad is None and agent.model.weight.requires_grad


@pytest.mark.parametrize("horizon", [1, 2, 3, 5])
def test_value_of_a_linear_world(horizon):
    """R_0 = Σ (γρ)^t (1 + 0.2 k) + (γρ)^H (2 + 0.5 k), ρ = 0.9 + 0.5 k: sac_svg_h's without entropy."""
    _, dream = linear_dream(horizon)
    rho = 0.9 * (0.9 - 0.5 * 0.4)
    slope = sum(rho**t * (1 - 0.08) for t in range(horizon)) + rho**horizon * (2 - 0.2)
    assert dream.returns[0].item() == pytest.approx(slope, abs=1e-6)


class Bandit(nn.Module):
    """One step whose reward is the action."""

    def step(self, feature, action, noise):
        return action

    def outcome(self, feature):
        return feature[..., 0], torch.full_like(feature[..., 0], -1e9)


class Constant(nn.Module):
    """a ~ tanh N(0.3, 0.8²), whatever the state."""

    def __init__(self):
        super().__init__()
        self.mean, self.std = (nn.Parameter(torch.tensor(x)) for x in (0.3, 0.8))

    def forward(self, feature):
        ones = torch.ones_like(feature[..., :1])
        return Gaussians(self.mean * ones, self.std * ones)


def test_both_actor_gradients_estimate_the_same():
    """A bandit with r = a, and entropy: pathwise and REINFORCE agree in mean and deviation."""
    found = {}
    for kind in ("pathwise", "reinforce"):
        flags = ("--actor-gradient", kind, "--horizon", 1, "--entropy-weight", 0.3)
        agent = agent_of(*flags, "--no-normalize-returns")
        agent.model, agent.actor = Bandit(), Constant()
        agent.critic_target = lambda feature: 0.2 + 0 * feature[..., 0]
        torch.manual_seed(0)
        with torch.set_grad_enabled(kind == "pathwise"):
            dream = agent.dream(torch.zeros(400_000, 1))
        loss, _ = agent.actor_loss(dream, torch.ones(1, 400_000))
        loss.backward()
        found[kind] = [agent.actor.mean.grad.item(), agent.actor.std.grad.item()]
    assert found["pathwise"] == pytest.approx(found["reinforce"], abs=0.006)
    assert abs(found["pathwise"][0]) > 0.3 and abs(found["pathwise"][1]) > 0.05


@pytest.mark.parametrize("kind", ["pathwise", "reinforce"])
def test_entropy_is_paid_for(kind):
    """Without rewards a narrow policy widens, and one at the action's edge comes back."""
    agent = agent_of("--actor-gradient", kind, "--horizon", 1, "--entropy-weight", 1)
    agent.model, agent.actor = Bandit(), Constant()
    agent.model.outcome = lambda feature: (0 * feature[..., 0], torch.full_like(feature[..., 0], -1e9))
    agent.critic_target = lambda feature: 0 * feature[..., 0]
    with torch.no_grad():
        agent.actor.mean.fill_(2), agent.actor.std.fill_(0.2)
    with torch.set_grad_enabled(kind == "pathwise"):
        dream = agent.dream(torch.zeros(2_000, 1))
    agent.actor_loss(dream, torch.ones(1, 2_000))[0].backward()
    assert agent.actor.std.grad < -1 and agent.actor.mean.grad > 1


def filled(*flags: object, rows: int = 120):
    torch.manual_seed(0)
    agent = agent_of("--deter", 6, "--stoch", 3, *flags)
    return agent, played_buffer(dreamer, agent, rows)


def constant_outcomes(agent) -> None:
    """r̂, d̂ and v are numbers."""
    for network in (agent.model.reward, agent.model.termination, agent.critic_target.layers):
        nn.init.zeros_(network[-1].weight)


def actor_gradient(agent, buffer, seed: int = 1) -> torch.Tensor:
    torch.manual_seed(seed)
    agent.learn(buffer.sequences(4, 4))
    return torch.cat([p.grad.flatten() for p in agent.actor.parameters()])


def test_without_a_signal_the_actor_follows_its_entropy_alone():
    """r̂, ĉ and v constant: no gradient at η = 0, and twice as much at twice the η."""
    found = []
    for weight in (0, 1, 2):
        agent, buffer = filled("--entropy-weight", weight)
        constant_outcomes(agent)
        found.append(actor_gradient(agent, buffer))
    assert not found[0].any() and found[1].abs().max() > 1e-3
    assert torch.allclose(2 * found[1], found[2], rtol=1e-4, atol=1e-7)


def test_terminal_states_are_no_starts():
    """d = 1 everywhere: nothing of the imagination counts."""
    agent, buffer = filled()
    batch = buffer.sequences(4, 4)
    agent.learn(batch._replace(terminated=torch.ones(4, 4)))
    assert not any(p.grad.any() for part in (agent.actor, agent.critic) for p in part.parameters())


def test_an_action_that_the_model_ignores_has_no_gradient():
    agent, buffer = filled("--entropy-weight", 0)
    assert actor_gradient(agent, buffer).abs().max() > 1e-6
    agent, buffer = filled("--entropy-weight", 0)
    nn.init.zeros_(agent.model.of_action.weight)
    assert not actor_gradient(agent, buffer).any()


@pytest.mark.parametrize("flags", [(), ("--actor-gradient", "reinforce"), ("--no-cut",)])
def test_actor_and_critic_leave_the_model_alone(flags, monkeypatch):
    """Without the model's own loss no weight of it gets a gradient or moves; those of both others do."""
    agent, buffer = filled(*flags)
    whole = agent.world_loss

    def no_loss(batch):
        loss, feature, figures = whole(batch)
        return 0 * loss.detach(), feature, figures

    monkeypatch.setattr(agent, "world_loss", no_loss)
    before = {name: p.clone() for name, p in agent.model.named_parameters()}
    agent.learn(buffer.sequences(4, 4))
    assert all(torch.equal(before[name], p) and p.grad is None for name, p in agent.model.named_parameters())
    for part in (agent.actor, agent.critic):
        assert any(p.grad.any() for p in part.parameters())
    assert all(p.grad is None for p in agent.critic_target.parameters())
    assert all(p.requires_grad for p in agent.model.parameters())


def test_returns_are_divided_by_their_spread():
    """Twice the spread, half the gradient; below 1 it counts as 1."""
    found = {}
    for start in (0.0, 50.0, 100.0):
        agent, buffer = filled("--entropy-weight", 0)
        agent.return_spread.fill_(start)
        found[start] = actor_gradient(agent, buffer)
    ratio = (found[50.0].norm() / found[100.0].norm()).item()
    assert ratio == pytest.approx(2, rel=0.02) and found[0.0].norm() > 40 * found[50.0].norm()
    agent, buffer = filled("--entropy-weight", 0, "--no-normalize-returns")
    agent.return_spread.fill_(50)
    assert torch.allclose(actor_gradient(agent, buffer), found[0.0], rtol=1e-4)


# ---------------------------------------------------------------- distributions


def pair(q=(1.0, 0.5), p=(0.0, 1.0)):
    """q and p of one latent, whose means and deviations have gradients."""
    return Gaussians(*(tensor(x, grad=True) for x in q)), Gaussians(*(tensor(x, grad=True) for x in p))


@pytest.mark.parametrize(("mean", "std", "expected"), [(1, 0.5, 0.818147), (0.5, 0.8, 0.168144)])
def test_kl_of_two_normals(mean, std, expected):
    q, p = pair((mean, std))
    assert dreamer.latent_kl(q, p).item() == pytest.approx(expected, abs=1e-6)
    reference = torch.distributions.kl_divergence(*(torch.distributions.Normal(*x) for x in (q, p)))
    assert dreamer.latent_kl(q, p).item() == pytest.approx(reference.item())


def test_kl_is_summed_over_latents():
    q, p = (
        Gaussians(torch.ones(2, 30), torch.full((2, 30), 0.5)),
        Gaussians(torch.zeros(2, 30), torch.ones(2, 30)),
    )
    assert dreamer.latent_kl(q, p).tolist() == pytest.approx([24.5444] * 2, abs=1e-3)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ((1, 1), (1, -1.5, -1, -0.25)),  # V1's gradient
        ((0.8, 0.2), (0.2, -0.3, -0.8, -0.2)),  # V2
        ((0.5, 0.1), (0.1, -0.15, -0.5, -0.125)),  # V3
    ],
)
def test_kl_balance(weights, expected):
    """Gradients with respect to μ_q, σ_q, μ_p, σ_p."""
    q, p = pair()
    dreamer.balanced_kl(q, p, *weights, 0.0, "state").backward()
    assert [x.grad.item() for x in (*q, *p)] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("kl", "floor", "value", "gradient"),
    [
        ((1, 5), "mean", 3, (0, 0)),  # a tie
        ((1, 7), "mean", 4, (0.5, 0.5)),
        ((1, 5), "state", 4, (0, 0.5)),
        ((1, 7), "state", 5, (0, 0.5)),
    ],
)
def test_free_nats(kl, floor, value, gradient):
    """3 nats of the mean (V1) or of each state (V3)."""
    kl = tensor(*kl, grad=True)
    loss = dreamer.floored(kl, 3.0, floor)
    loss.backward()
    assert loss.item() == value and kl.grad.tolist() == list(gradient)


@pytest.mark.parametrize("floor", ["mean", "state"])
def test_equal_distributions_cost_the_free_nats_and_have_no_gradient(floor):
    q, p = pair((0.3, 0.7), (0.3, 0.7))
    loss = dreamer.balanced_kl(q, p, 0.5, 0.1, 1.0, floor)
    loss.backward()
    assert loss.item() == pytest.approx(0.6) and not any(x.grad.any() for x in (*q, *p))


def test_deviations():
    assert dreamer.latent_deviation(tensor(0), "softplus").item() == pytest.approx(0.793147, abs=1e-6)
    assert dreamer.latent_deviation(tensor(0), "sigmoid").item() == pytest.approx(1.1)
    low, high = dreamer.latent_deviation(tensor(-50, 50), "sigmoid").tolist()
    assert (low, high) == pytest.approx((0.1, 2.1))


@pytest.mark.parametrize(
    ("x", "init", "least", "std", "share"),
    [
        (0, 5, 1e-4, 5.0001, 0.596584),  # V1
        (4.993 - math.log(math.expm1(5)), 5, 1e-4, 4.999862, 0.596566),  # V1 with its offset rounded
        (0, 0.95, 0.05, 1.0, 0.008129),
    ],
)
def test_first_policies_deviation_and_share_of_full_actions(x, init, least, std, share):
    """P(|a| > 0.99) of a = tanh u: V1's first policy is bang-bang."""
    found = dreamer.policy_deviation(tensor(x), init, least).item()
    assert found == pytest.approx(std, abs=1e-6)
    assert math.erfc(math.atanh(0.99) / found / math.sqrt(2)) == pytest.approx(share, abs=1e-6)


def test_policy_mean_is_bounded():
    agent = agent_of()
    nn.init.constant_(agent.actor.layers[-1].bias, 1e4)
    mean, std = agent.actor(torch.zeros(3, 16))
    assert (mean == 5).all() and (std > 0.05).all()


def test_symlog():
    found = dreamer.symlog(tensor(1, 10, 1000, -100, 0))
    assert found.tolist() == pytest.approx([0.693147, 2.397895, 6.908755, -4.615121, 0], abs=1e-6)
    assert dreamer.symexp(tensor(2)).item() == pytest.approx(6.389056, abs=1e-6)
    assert dreamer.symexp(found).tolist() == pytest.approx([1, 10, 1000, -100, 0])


VALUES = dreamer.symexp(torch.linspace(-20, 20, 255, dtype=torch.float64))


@pytest.mark.parametrize(
    ("x", "bins", "weights"),
    [(1.7, (1.572510, 2.011271), (0.709431, 0.290569)), (100, (95.248090, 111.663945), (0.710529, 0.289471))],
)
def test_two_hot(x, bins, weights):
    found = dreamer.two_hot(tensor(x), VALUES)
    (at,) = found.nonzero(as_tuple=True)[1:]
    assert VALUES[at].tolist() == pytest.approx(bins, abs=1e-6)
    assert found[0, at].tolist() == pytest.approx(weights, abs=1e-6)
    assert dreamer.expectation(found, VALUES).item() == pytest.approx(x)


def test_two_hot_at_values_and_beyond():
    found = dreamer.two_hot(torch.cat([VALUES, tensor(1e12, -1e12)]), VALUES)
    assert torch.equal(found[:-2].argmax(1), torch.arange(255)) and (found.sum(1) == 1).all()
    assert found[-2, -1] == 1 == found[-1, 0]


def test_two_hot_keeps_means_and_symlog_does_not():
    """Targets 0 and 100 half and half: 50, and 9.049876 from the squared error of symlog's."""
    weights = dreamer.two_hot(tensor(0, 100), VALUES).mean(0)
    assert dreamer.expectation(weights, VALUES).item() == pytest.approx(50)
    regressed = dreamer.symexp(dreamer.symlog(tensor(0, 100)).mean())
    assert regressed.item() == pytest.approx(9.049876, abs=1e-6)


def test_a_critic_of_values_begins_at_zero_and_learns_a_mean():
    """Exactly 0 although values reach 5e8; cross-entropy is least at the two-hot weights."""
    args = dreamer.parse(tiny("dreamer", "--critic-loss", "two-hot"))
    critic, feature = dreamer.LatentCritic(3, args), torch.randn(5, 3)
    assert critic(feature).tolist() == [0] * 5
    target = torch.tensor([0.0, 100.0])
    best = dreamer.two_hot(target, critic.values).mean(0).clamp_min(1e-9).log().expand(2, -1)
    least = critic.error(best, target).mean()
    assert critic.value(best).tolist() == pytest.approx([50, 50], abs=0.2)
    for _ in range(20):
        assert critic.error(best + 0.3 * torch.randn(255), target).mean() > least
    squared = dreamer.LatentCritic(3, dreamer.parse(tiny("dreamer")))
    assert squared.error(torch.tensor([[3.0]]), torch.tensor([1.0])).item() == 2


def test_spread_of_returns():
    """0 .. 10 uniform: 9.5 − 0.5, in any order and shape; of two numbers nine tenths of their distance."""
    x = torch.linspace(0, 10, 1001)
    assert dreamer.spread(x).item() == pytest.approx(9, abs=1e-5)
    assert dreamer.spread(x[torch.randperm(1001)].view(7, 143)).item() == pytest.approx(9, abs=1e-5)
    assert dreamer.spread(torch.tensor([3.0, 4.0])).item() == pytest.approx(0.9)
    uneven = torch.randn(1, 40).square()
    quantiles = torch.quantile(uneven, torch.tensor([0.05, 0.95]))
    assert dreamer.spread(uneven).item() == pytest.approx((quantiles[1] - quantiles[0]).item(), rel=1e-4)


# ---------------------------------------------------------------- the recurrent model


def recorded(agent, length: int = 6, batch: int = 3):
    torch.manual_seed(3)
    n, m = agent.sizes
    first = torch.zeros(length, batch)
    first[0] = 1
    return torch.randn(length, batch, n), torch.rand(length, batch, m) * 2 - 1, first


def test_an_episode_in_mid_window_begins_as_a_window_does(noiseless):
    """h, z and a are forgotten: what comes after is that of a window starting there, to the last digits."""
    agent = agent_of(sizes=(3, 2))
    obs, action, first = recorded(agent)
    first[2, 1] = 1
    features, q = agent.model.observe(obs, action, first)
    later, alone = agent.model.observe(obs[2:, 1:2], action[2:, 1:2], recorded(agent)[2][:4, :1])
    assert torch.allclose(features[2:, 1:2], later, atol=1e-6)
    assert torch.allclose(q.mean[2:, 1:2], alone.mean, atol=1e-6)
    other, _ = agent.model.observe(obs[2:, :1], action[2:, :1], first[:4, :1])
    assert not torch.allclose(features[2:, :1], other, atol=1e-3)  # elsewhere the past counts
    action[2, 1] += 1  # of the episode before
    assert torch.equal(agent.model.observe(obs, action, first)[0], features)


def test_rows_of_a_batch_are_independent(noiseless):
    """Permuted rows permute features, posteriors and dreams, of which there are as many as posteriors."""
    agent = agent_of(sizes=(3, 2))
    obs, action, first = recorded(agent)
    first[3, 0] = 1
    order = torch.tensor([2, 0, 1])
    features, q = agent.model.observe(obs, action, first)
    other, permuted = agent.model.observe(obs[:, order], action[:, order], first[:, order])
    assert torch.allclose(features[:, order], other, atol=1e-6)
    assert torch.allclose(q.std[:, order], permuted.std, atol=1e-6)
    dream, again = agent.dream(features.flatten(0, 1)), agent.dream(other.flatten(0, 1))
    assert dream.feature.shape == (4, 18, 16) and dream.returns.shape == dream.alive.shape == (3, 18)
    assert torch.allclose(dream.returns.view(3, 6, 3)[:, :, order], again.returns.view(3, 6, 3), atol=1e-5)


def test_latents_are_drawn_in_training_and_in_imagination():
    agent = agent_of(sizes=(3, 2))
    features, q = agent.model.observe(*recorded(agent))
    z = features[..., 12:]
    assert ((z - q.mean).abs() > 1e-3).float().mean() > 0.9
    dreams = [agent.dream(torch.zeros(2, 16)).feature[1] for _ in range(2)]
    assert not torch.allclose(*dreams, atol=1e-3)
    prior = agent.model.prior(dreams[0][:, :12])
    assert not torch.allclose(dreams[0][:, 12:], prior.mean, atol=1e-3)


def test_the_filter_is_the_unroll_of_training(noiseless):
    """Acting step by step gives the states and posteriors' means that `observe` gives the whole sequence."""
    agent = agent_of(sizes=(3, 2))
    obs, _, first = recorded(agent, batch=1)
    agent.begin_episode()
    beliefs, before = [], []
    for seen in obs[:, 0]:
        before.append(agent.belief[:, 16:].clone())
        agent.act(seen.numpy(), deterministic=True)
        beliefs.append(agent.belief.clone())
    features, q = agent.model.observe(obs, torch.stack(before), first)
    states = torch.stack(beliefs)[..., :16]
    assert torch.allclose(states, features, atol=1e-6)
    assert torch.allclose(states[..., 12:], q.mean, atol=1e-6)
    assert agent.act(seen.numpy(), True).tolist() == agent.belief[0, 16:].tolist()


def test_the_past_matters_and_ends_with_its_episode():
    agent, actions = agent_of(), []
    for past in ((), (3.0,), (-3.0,), ()):
        agent.begin_episode()
        for x in (*past, 1.0):
            action = agent.act(np.array([x]), deterministic=True).item()
        actions.append(action)
    assert actions[0] == actions[3] and len(set(actions)) == 3
    agent.begin_episode()
    assert not agent.belief.any()


def test_what_is_believed_goes_on_in_mid_episode(tmp_path):
    """Saved after seven steps of an episode, loaded into another agent: the same actions, noise and all."""
    agent, other = agent_of(), agent_of("--seed", 2)
    agent.begin_episode()
    observations = torch.randn(14, 1).numpy()
    for obs in observations[:7]:
        agent.act(obs)
    torch.save(agent.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    forgetful = agent_of()
    forgetful.load_state_dict(agent.state_dict())
    forgetful.begin_episode()
    found = []
    for who in (agent, other, forgetful):
        torch.manual_seed(5)
        found.append([who.act(obs).item() for obs in observations[7:]])
    assert found[0] == found[1] != found[2]


def test_evaluation_in_mid_episode_is_forgotten(tmp_path):
    """A run ends in the same belief however often it was evaluated, in an episode that is not over."""
    flags = ("--env-id", "tests.tasks:LQR-v0", "--total-timesteps", 97)
    often, seldom = (run("dreamer", tmp_path / str(n), *flags, "--eval-every", n) for n in (7, 97))
    a, b = (torch.load(folder / "final.pt", weights_only=True)["agent"] for folder in (often, seldom))
    assert a["belief"].any() and torch.equal(a["belief"], b["belief"])


def test_heads_read_the_state_that_was_reached():
    """The reward of an action, and the end, are asked of the features of the observation after it."""
    agent, _ = filled()
    batch, asked = dreamer.Sequences(*(torch.zeros(4, 2, *n) for n in ((1,), (1,), (), (), ()))), []
    batch.reward[2, 0], batch.terminated[2, 0], batch.first[0] = 5, 1, 1
    features, told = torch.zeros(4, 2, 9), batch.reward.clone()
    agent.model.observe = lambda *_: (features, Gaussians(torch.zeros(4, 2, 3), torch.ones(4, 2, 3)))

    def outcome(feature):
        asked.append(feature)
        return told, 200 * batch.terminated - 100

    agent.model.outcome = outcome
    _, _, (_, reward_error, ended, _) = agent.world_loss(batch)
    assert asked[0] is features and reward_error == 0 and ended < 1e-9
    batch.first[2, 0] = 1  # what led to an episode's first observation is not known
    batch.reward[2, 0] = -9
    assert agent.world_loss(batch)[2][1] == 0


# ---------------------------------------------------------------- windows of the replay


def numbered(agent, capacity: int, lengths: tuple[int, ...]):
    """Episodes whose observations are 100 e + t, actions and rewards the same / 1000; odd ones terminate."""
    buffer = dreamer.SequenceReplay(agent, capacity, 1, 1, torch.device("cpu"))
    for episode, length in enumerate(lengths):
        for t in range(length):
            at = 100.0 * episode + t
            ended = t == length - 1 and episode % 2 == 1
            buffer.add([at], [at / 1000], at / 1000, [at + 1], ended, episode)
    return buffer


@pytest.mark.parametrize("capacity", [60, 23])
def test_windows_cross_episodes_and_keep_their_ends(capacity):
    """Every slot follows from the one before; each end is there, and what led to a beginning is not."""
    lengths = (7, 1, 3, 12, 2, 9)
    buffer, newest = numbered(agent_of(), capacity, lengths), 0.0
    batch = buffer.sequences(8, 400)
    assert batch.obs.shape == (8, 400, 1) and batch.reward.shape == (8, 400)
    for window in zip(*(x.view(8, 400).t().tolist() for x in batch), strict=True):
        before, over = None, False
        for obs, action, reward, terminated, first in zip(*window, strict=True):
            episode, place = divmod(obs, 100)
            if before is None:
                assert first
            elif over:  # the next episode's first observation
                assert first and (episode, place) == (before // 100 + 1, 0)
            else:
                assert not first and obs == before + 1
                assert (action, reward) == pytest.approx([before / 1000] * 2)
            over = not first and place == lengths[int(episode)]
            assert terminated == (over and episode % 2 == 1)
            before, newest = obs, max(newest, obs)
    kept = min(sum(lengths), capacity)
    assert len(set(batch.obs[0, :, 0].tolist())) == kept - 8 + 2 and newest == 509


def test_windows_are_drawn_evenly():
    buffer = numbered(agent_of(), 40, (40,))
    counts = torch.bincount(buffer.sequences(11, 60_000).obs[0, :, 0].long(), minlength=31)
    assert counts.min() > 0.9 * 60_000 / 31 and len(counts) == 31


def test_observations_are_standardised_by_all_seen():
    """Also by those that the ring no longer holds; off, the buffer tells nobody."""
    agent = agent_of()
    numbered(agent, 10, (40,))
    normalizer = agent.model.normalizer
    assert normalizer.seen == 40 and normalizer.mean.item() == pytest.approx(19.5)
    seen = agent.model.see(torch.tensor([[19.5], [19.5 + 20 * normalizer.std.item()]]))
    assert seen[:, 0].tolist() == pytest.approx([0, math.log(21)], abs=1e-5)
    agent = agent_of("--no-normalize", "--no-symlog")
    numbered(agent, 10, (40,))
    assert agent.model.normalizer.seen == 0
    assert agent.model.see(torch.tensor([[7.0]])).item() == 7


def test_updates_come_when_they_should(monkeypatch):
    """--pretrain of them right after the warm-up of 60 steps, then one in --learn-every steps."""
    agent, buffer = filled("--learn-every", 3, "--pretrain", 7)
    calls = []
    learn = agent.learn
    monkeypatch.setattr(agent, "learn", lambda batch: (calls.append(batch), learn(batch))[1])
    counts = []
    for step in range(61, 68):
        metrics = agent.update(buffer, step)
        counts.append(len(calls))
        assert list(metrics) == dreamer.METRICS
    assert counts == [7, 7, 8, 8, 8, 9, 9] and calls[0].obs.shape == (4, 4, 1)


# ---------------------------------------------------------------- arguments, export, learning


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (("--horizon", 0), "--horizon 0: must be at least 1"),
        (("--batch-size", 18), "--batch-size 18: must be a multiple of --sequence-length 4"),
        (("--sequence-length", 1), "--sequence-length 1: must be at least 2"),
        (("--no-cut", "--actor-gradient", "reinforce"), "--actor-gradient reinforce: must be pathwise with"),
    ],
)
def test_contradictions_are_refused(flags, error):
    with pytest.raises(dreamer.BadInput, match=f"^{error}"):
        dreamer.parse(tiny("dreamer", *flags))


def test_presets():
    laptop, large = dreamer.parse([]), dreamer.parse(["--preset", "large", "--horizon", "12"])
    assert (laptop.batch_size, laptop.sequence_length, laptop.learn_every) == (256, 32, 2)
    assert (large.batch_size, large.sequence_length, large.hidden, large.deter) == (800, 50, 400, 200)
    assert (large.stoch, large.horizon, large.learn_every) == (32, 12, 5) and large.tau == laptop.tau


def test_a_policy_that_remembers_is_exported(finished, tmp_path):
    """By the page's module: observation and belief in, action in the task's units and belief out."""
    agent, _ = dreamer.load(finished("dreamer", tmp_path))
    page = Page(tmp_path)
    page.policy("Policy")
    (text,) = blocks(PAGE, "python remembers")
    page.execute(text.split("\n\n\nbatch")[0])
    policy = page.names["RememberingPolicy"](agent, np.full(1, -1.0), np.full(1, 3.0)).eval()
    rows = {0: torch.export.Dim("batch")}
    width = agent.belief.shape[1]
    exported = torch.export.export(
        policy, (torch.zeros(2, 1), torch.zeros(2, width)), dynamic_shapes=(rows, rows)
    )
    torch.export.save(exported, tmp_path / "policy.pt2")
    loaded, belief = torch.export.load(tmp_path / "policy.pt2").module(), torch.zeros(3, width)
    agent.begin_episode()
    for obs in torch.randn(4, 3, 1):
        action, after = loaded(obs, belief)
        wanted = policy(obs, belief)
        assert torch.equal(action, wanted[0]) and torch.equal(after, wanted[1])
        acted = 2 * agent.act(obs[0].numpy(), True) + 1
        np.testing.assert_allclose(action[0].detach(), acted, atol=1e-5)
        belief = after


@long
def test_learns_the_linear_quadratic_task(tmp_path):
    """1 500 steps of s' = 0.9 s + 0.5 a: what is lost is much less than without control."""
    flags = (
        "--env-id tests.tasks:LQR-v0 --total-timesteps 1500 --eval-every 1500 --eval-episodes 20 --hidden 32"
    )
    flags += (
        " --batch-size 60 --sequence-length 10 --learn-every 2 --deter 32 --model-lr 1e-3 --actor-lr 1e-3"
    )
    folder = run("dreamer", tmp_path, *flags.split())
    first, last = (float(line.split(",")[1]) for line in (folder / "eval.csv").read_text().split()[1:])
    assert last > 0.5 * first
    assert scalars(folder)["model/obs_error"][-1].value < 0.3
