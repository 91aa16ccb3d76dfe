"""POPLIN's closed forms: perturbed policies, four searches, distillation; and when the agent does what."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn

from tests.conftest import by_hand, load, scalars
from tests.every_file.test_bad_input import fails
from tests.every_file.test_graphs import graphs  # noqa: F401

poplin = load("poplin")
CPU = torch.device("cpu")
TRUNCATED = 0.7737413  # variance of N(0, 1) within ±2
SEARCHES = ("actions", "replan", "weights", "weights-uniform")
TWO = ("--candidates", 2, "--elites", 1)
CART_POLE = "experiments.tasks:pets/CartPole-v0"


def agent_of(*flags: object, task: str = "tests.tasks:LQR-v0", sizes: tuple[int, int] = (1, 1)):
    flags = ("--env-id", task, "--model-hidden", 8, "--model-layers", 2, *flags)
    return poplin.Agent(poplin.parse([str(flag) for flag in flags]), *sizes, CPU)


class Linear(nn.Module):
    """a = (w + ω) s: a policy with one weight."""

    def __init__(self, w: float):
        super().__init__()
        self.weights = nn.Parameter(torch.tensor([w]))

    def perturbed(self, x, offset):
        return x * (self.weights + offset)

    def forward(self, x):
        return self.perturbed(x, torch.zeros(1, 1))


def exact(agent, w: float, reward):
    """The agent with a linear policy in the known world s' = s + a, which never ends."""
    agent.actor, agent.rule, agent.predicted = Linear(w), poplin.endless, lambda s, a: a
    agent.reward = lambda s, a, new: reward(s, a, new).squeeze(1)
    if agent.args.search.startswith("weights"):
        agent.intended = agent.intended[:, :1].clone()
        agent.executed = agent.executed[:2].clone()
    return agent


# --- perturbed policies (tests 1, 4, 10) ---

SIZES = {"Cheetah": (17, 6, 774), "pets/Cheetah": (18, 6, 806), "Ant": (27, 8, 1160), "Swimmer": (9, 2, 386)}
SIZES |= {"Reacher3D": (17, 7, 807), "InvertedPendulum": (4, 1, 193)}


@pytest.mark.parametrize("name", SIZES)
def test_number_of_weights(name):
    features, actions, weights = SIZES[name]
    assert len(poplin.Policy(features, actions, 32).weights) == weights


def test_a_search_of_weights_has_them_at_every_step_or_once():
    pendulum = {"task": "InvertedPendulum-v5", "sizes": (4, 1)}
    shapes = [agent_of("--search", s, "--horizon", 30, **pendulum).intended.shape for s in SEARCHES]
    assert shapes == [(30, 1), (30, 1), (30, 193), (1, 193)]
    assert shapes[2].numel() == 5790
    cheetah = {"task": "experiments.tasks:pets/Cheetah-v0", "sizes": (19, 6)}
    assert agent_of("--horizon", 30, **cheetah).intended.numel() == 24_180
    assert len(agent_of(task=CART_POLE, sizes=(4, 1)).actor.weights) == 225  # sine and cosine of the angle


def test_each_row_has_its_own_weights():
    """Against two layers written out, row by row; one offset for all is that offset in every row."""
    policy, x = poplin.Policy(3, 2, 5), torch.randn(4, 3)
    policy.observe(torch.randn(50, 3) * 2 + 1)
    offset = torch.randn(4, len(policy.weights))
    found = policy.perturbed(x, offset)
    for row, a, w in zip(x, found, policy.weights + offset, strict=True):
        W1, b1, W2, b2 = w[:15].view(3, 5), w[15:20], w[20:30].view(5, 2), w[30:]
        z = (row - policy.mean) / policy.std
        torch.testing.assert_close(a, (z @ W1 + b1).tanh() @ W2 + b2)
    one = policy.perturbed(x, offset[:1])
    assert torch.equal(one, policy.perturbed(x, offset[:1].repeat(4, 1)))
    assert torch.equal(policy(x), policy.perturbed(x, torch.zeros_like(offset)))
    with pytest.raises(AssertionError):
        policy.perturbed(x, offset[:3])


def test_first_weights():
    """Columns of norm 1, of the last layer 0.01, no biases."""
    policy = poplin.Policy(6, 3, 32)
    W1, b1, W2, b2 = policy.weights.detach().split([192, 32, 96, 3])
    torch.testing.assert_close(W1.view(6, 32).norm(dim=0), torch.ones(32))
    torch.testing.assert_close(W2.view(32, 3).norm(dim=0), torch.full((3,), 0.01))
    assert not b1.any() and not b2.any()


def spread(policy, variance: float) -> torch.Tensor:
    """Actions at z = 1 of 16 000 networks that are nothing but noise."""
    policy.weights.data.zero_()
    noise = math.sqrt(variance) * poplin.truncated_normal(16_000, len(policy.weights))
    return torch.cat([policy.perturbed(torch.ones(len(part), 17), part) for part in noise.split(2_000)])


@pytest.mark.parametrize(("variance", "deviation"), [(0.1, 1.0969900), (0.03, 0.4532140), (0.01, 0.1875859)])
def test_spread_of_actions_by_noise_on_weights(variance, deviation):
    """Hidden units see N(0, v̄ (|z|² + 1)), the action has variance v̄ (32 E tanh² + 1); v̄ = 0.774 v_0."""
    v = TRUNCATED * variance
    at, weight = np.polynomial.hermite_e.hermegauss(80)
    tanh2 = (weight / weight.sum() * np.tanh(math.sqrt(v * 18) * at) ** 2).sum()
    assert math.sqrt(v * (32 * tanh2 + 1)) == pytest.approx(deviation, abs=1e-6)
    if variance == 0.1:
        assert (v * 18, tanh2) == pytest.approx((1.3927, 0.4547761), abs=1e-4)
    found = spread(poplin.Policy(17, 1, 32), variance)
    assert found.std().item() == pytest.approx(deviation, rel=0.025)
    if variance == 0.1:
        assert (found.abs() > 1).float().mean().item() == pytest.approx(0.363, abs=0.016)


def test_whitening():
    """Sums begin at 0, 0.01 and 0.01; a variance below 0.01 counts as 0.01."""
    policy = poplin.Policy(2, 1, 4)
    assert policy.mean.tolist() == [0, 0] and policy.std.tolist() == [1, 1]
    policy.observe(torch.tensor([[1.0, 2.0], [3.0, 2.0]]))
    assert (policy.mean[0].item(), policy.std[0].item()) == pytest.approx((1.9900498, 1.0098527), abs=1e-6)
    policy.observe(torch.tensor([[1.0, 2.0]] * 3))
    assert (policy.mean[1].item(), policy.std[1].item()) == pytest.approx((1.9960080, 0.1000050), abs=1e-6)


def test_policy_sees_what_the_model_sees():
    """Sine and cosine of the angle: a full turn changes nothing."""
    agent = agent_of(task=CART_POLE, sizes=(4, 1))
    agent.actor.weights.data.normal_()
    obs = torch.tensor([[0.1, 0.5, -0.2, 0.3], [0.1, 0.5 + 2 * math.pi, -0.2, 0.3]])
    actions = agent.policy(obs, True)
    torch.testing.assert_close(actions[0], actions[1], atol=1e-5, rtol=0)
    assert agent.policy(obs + 100, True).abs().max() <= 1


# --- the searches (tests 1 to 3, 5, 11) ---


def test_one_perturbation_is_the_same_at_every_step(monkeypatch):
    """Drawn once, or anew at each step: if that is always the same, the same bits."""
    noise, searches, found = torch.randn(7, 97), ("weights", "weights-uniform"), []
    agents = [agent_of("--search", search, "--candidates", 7, "--elites", 2) for search in searches]
    state = agents[0].state_dict()
    agents[1].load_state_dict({part: state[part] for part in ("actor", "model", "termination")})
    monkeypatch.setattr(poplin, "truncated_normal", lambda *shape, device: noise)
    for agent in agents:
        mean = torch.linspace(-1, 1, 97).expand(agent.intended.shape)
        returns, drawn = agent.followed(torch.tensor([0.5]), mean, 0 * mean + 0.5, [None] * 20)
        assert len(drawn) == len(agent.intended) and torch.equal(drawn[0], mean[0] + 0.5 * noise)
        found.append(returns)
    assert torch.equal(*found) and found[0].std() > 0


def test_gradient_of_one_perturbation_is_the_sum_of_those_of_each_step(monkeypatch):
    grads, flags = [], ("--horizon", 3, "--candidates", 1, "--elites", 1)
    for search in ("weights", "weights-uniform"):
        agent = exact(agent_of("--search", search, *flags), -0.2, lambda s, a, new: new.square())
        mean = agent.intended.clone().requires_grad_()
        (J,), _ = agent.followed(torch.ones(1), mean, torch.zeros_like(mean), [None] * 3)
        assert J.item() == pytest.approx(1.311744, abs=1e-6)
        grads.append(torch.autograd.grad(J, mean)[0].flatten().tolist())
    assert grads[0] == pytest.approx([3.2794, 1.6794, 0.6554], abs=1e-4)
    assert grads[1] == pytest.approx([5.61408], abs=1e-5) and sum(grads[0]) == pytest.approx(grads[1][0])


@pytest.mark.parametrize(("search", "variance"), [("actions", 1.9343533), ("replan", 0.2579135)])
def test_noise_adds_up_in_an_open_loop_and_is_controlled_in_a_closed_one(search, variance):
    """s' = s + a, π = −s/2, v_0 = 1/4, ten steps; all in hundredths, so that nothing is clipped."""
    flags = ("--search", search, "--horizon", 10, "--candidates", 100_000)
    agent, ends = exact(agent_of(*flags), -0.5, lambda s, a, new: new), []
    agent.predicted, obs = lambda s, a: ends.append(s + a) or a, torch.tensor([0.01])
    base = agent.open_loop(obs)
    assert len(ends) == (10 if search == "actions" else 0)
    agent.followed(obs, agent.intended, torch.full_like(agent.intended, 0.005), base)
    end = 100 * ends[-1]
    assert end.mean().item() == pytest.approx(0.0009766, abs=5 * math.sqrt(variance / 100_000))
    assert end.var(correction=0).item() == pytest.approx(variance, rel=0.02)


def test_open_loop_is_what_the_policy_would_do_without_noise():
    agent = exact(agent_of("--search", "actions", "--horizon", 4), -0.5, lambda s, a, new: new)
    assert torch.cat(agent.open_loop(torch.ones(1))).flatten().tolist() == [-0.5, -0.25, -0.125, -0.0625]


def test_share_of_actions_at_their_bound():
    """Base 0.8, deviation 0.5: (Φ(2) − Φ(0.4)) / (Φ(2) − Φ(−2))."""
    agent = agent_of("--search", "actions")
    action = agent.control(None, 0.5 * poplin.truncated_normal(100_000, 1), torch.tensor([[0.8]]))
    assert action.max() == 1 and (action == 1).float().mean().item() == pytest.approx(0.3371694, abs=0.007)


@pytest.mark.parametrize(
    ("search", "variance", "cost", "bound"),
    [
        ("weights-uniform", 0.25, 0.0916080, 1e-6),
        ("weights", 0.25, 0.091636, 1e-4),
        ("weights-uniform", 0.1, 0.1623, 0.012),
        ("weights", 0.1, 0.1535, 0.018),
        ("weights-uniform", 0.03, 0.657, 0.05),
        ("weights", 0.03, 0.697, 0.05),
    ],
)
def test_search_in_an_exact_world(search, variance, cost, bound):
    """s' = s + a, cost s'² + a²/10, five steps from 1: the optimum is 0.0916080, by a constant gain.

    With little variance five iterations do not get there. Means of 16 searches; bounds: four deviations.
    """
    flags = ("--search", search, "--variance", variance, "--horizon", 5)
    flags += ("--candidates", 500, "--elites", 50, "--iterations", 5)
    agent = exact(agent_of(*flags), 0.0, lambda s, a, new: -(new.square() + 0.1 * a.square()))
    costs = []
    for _ in range(16):
        action, mean, outlook = agent.decide(torch.ones(1), agent.intended)
        costs.append(-agent.followed(torch.ones(1), mean, 0 * mean, [None] * 5)[0][0].item())
        torch.testing.assert_close(action, mean[0])
    assert np.mean(costs) == pytest.approx(cost, abs=bound) and min(costs) > 0.09160797
    if (search, variance) == ("weights-uniform", 0.25):
        assert mean.item() == pytest.approx(-0.9160798, abs=1e-3)
        assert outlook[0].item() == pytest.approx(-cost, abs=1e-4) and 0 < outlook[1] < 0.1


def test_elites_move_mean_and_variance():
    """(5) by hand; the old ones count one tenth."""
    elites = torch.tensor([[[1.0, 2.0]], [[3.0, 6.0]]])  # K = 2, T = 1, D = 2
    mean, var = poplin.refitted(torch.tensor([[10.0, 0.0]]), torch.tensor([[1.0, 2.0]]), elites, 0.1)
    torch.testing.assert_close(mean, torch.tensor([[0.9 * 2 + 1, 0.9 * 4]]))
    torch.testing.assert_close(var, torch.tensor([[0.9 * 1 + 0.1, 0.9 * 4 + 0.2]]))


def test_only_a_search_of_actions_ends_early():
    """Variance 0.25 is not above 1: nothing moves; of weights it is searched all the same."""
    for search in SEARCHES:
        agent = agent_of("--search", search, "--least-variance", 1, "--variance", 0.25, "--horizon", 3)
        _, mean, _ = agent.decide(torch.ones(1), agent.intended)
        assert mean.any() == search.startswith("weights"), search


def test_plans_by_the_mean_of_the_ensemble():
    """The forward pass written out for means alone agrees with the model's."""
    agent, obs, action = agent_of(), torch.randn(6, 1), torch.randn(6, 1)
    agent.model.fit_scaler(torch.randn(30, 1), torch.randn(30, 1))
    mean = agent.model(obs.expand(5, -1, -1), action.expand(5, -1, -1))[0].mean(0)
    assert mean.shape == (6, 2) and mean.std() > 0.01
    torch.testing.assert_close(agent.predicted(obs, action), mean)


def test_return_of_known_and_of_learned_rewards():
    agent = agent_of()
    states, actions = torch.arange(8.0).view(4, 2, 1), torch.zeros(3, 2, 1)
    outputs = torch.tensor([[0.0, 1], [0, 2], [0, 4]])[:, None].expand(3, 2, 2)
    agent.rule = poplin.endless
    assert agent.imagined_return(states, actions, outputs).tolist() == [7, 7]  # the last output of each
    agent.reward = lambda s, a, new: (new - s).squeeze(1) + 10 * s.squeeze(1)
    assert agent.imagined_return(states, actions, outputs).tolist() == [66, 96]


def test_nothing_is_paid_after_the_end():
    """+1 a step until s > 2.5, that step included; what diverges counts as −1e6, but not after the end."""
    agent = exact(agent_of(), 0.0, lambda s, a, new: torch.ones_like(s) + 0 * new)
    states = torch.tensor([[1.0, 1], [2, 2], [3, 2], [4, 2]])[:, :, None]
    rest = (torch.zeros(3, 2, 1), torch.zeros(3, 2, 1))
    assert agent.imagined_return(states, *rest).tolist() == [3, 3]
    agent.rule = lambda s: (s > 2.5).float().squeeze(1)
    assert agent.imagined_return(states, *rest).tolist() == [2, 3]
    states[3] = math.nan
    assert agent.imagined_return(states, *rest).tolist() == [2, -1e6]
    agent.rule = poplin.endless
    assert agent.imagined_return(states, *rest).tolist() == [-1e6, -1e6]


# --- acting (tests 6, 12) ---


@pytest.mark.parametrize("search", SEARCHES)
def test_next_search_begins_with_what_is_left(search):
    agent = agent_of("--search", search, "--horizon", 3)
    agent.episode.fill_(0)
    rows = torch.arange(1.0, 4)[: len(agent.intended), None].expand(agent.intended.shape)
    agent.decide = lambda obs, mean: (torch.tensor([0.5]), rows, torch.tensor([7.0, 8.0]))
    assert agent.act([0.0]).tolist() == [0.5] == agent.act([0.0]).tolist()
    assert agent.intended[:, 0].tolist() == ([1] if search == "weights-uniform" else [2, 3, 0])
    assert agent.executed[:-1].unique().tolist() == [2] and agent.executed[-1] == 2
    assert agent.outlook.tolist() == [7, 8]
    agent.begin_episode()
    assert not agent.intended.any() and agent.executed.any()


@pytest.mark.parametrize("search", SEARCHES)
def test_without_noise_it_is_policy_control(search):
    """One candidate, no variance: the action of a state, and whole trials, are the policy's, to the bit."""
    flags = ("--search", search, "--variance", 0, "--candidates", 1, "--elites", 1)
    agent = agent_of(*flags, "--eval-episodes", 2, "--horizon", 3)
    agent.actor.weights.data.normal_()
    agent.actor.observe(torch.randn(100, 1))
    for planned in (-1, 0):  # before and after a first fit
        agent.episode.fill_(planned)
        for s in (-1.5, 0.3):
            alone = agent.policy(torch.tensor([[s]]), True)[0].numpy()
            assert np.array_equal(agent.act([s]), alone) and np.array_equal(agent.act([s], True), alone)
    planned, alone = (poplin.evaluate(who, agent.args, 0) for who in (agent, poplin.PolicyControl(agent)))
    assert planned == alone and planned["return_std"] > 0


def test_with_noise_it_is_not():
    agent = agent_of()
    agent.episode.fill_(0)
    assert (
        len({agent.act([0.3]).item() for _ in range(5)} | {agent.policy(torch.tensor([[0.3]]), 1).item()})
        == 6
    )


@pytest.mark.parametrize("search", SEARCHES)
def test_decisions_as_graphs_are_the_decisions(search, graphs):  # noqa: F811
    """Actions, warm starts and figures, replayed blindly from the fourth on: the same bits as eagerly."""
    flags = ("--search", search, "--horizon", 3, "--candidates", 9, "--elites", 3)
    agents = [agent_of(*flags) for _ in range(2)]
    agents[1].load_state_dict(agents[0].state_dict())
    for agent in agents:
        agent.rule, agent.seen_task = poplin.endless, True
        agent.episode.fill_(0)
    found = graphs(poplin, agents[1])
    for k in range(7):
        actions = []
        for agent in agents:
            torch.manual_seed(k)
            agent.actor.weights.data.mul_(1.1)
            actions.append(agent.act([math.sin(k)]))
        assert np.array_equal(*actions) and actions[0] != 0
        for name in ("intended", "executed", "outlook"):
            assert torch.equal(getattr(agents[0], name), getattr(agents[1], name))
    assert len(found) == 1


# --- distillation (tests 7 to 9, 13) ---


def executed_pairs(obs: list[float], action: list[float]):
    column = lambda values: torch.tensor(values)[:, None]
    flat = torch.zeros(len(obs))
    return poplin.Batch(column(obs), column(action), flat, column(obs), flat)


def test_average_is_added():
    """Whatever W is, the plans' sum with it is 1: W is 1 after one trial and stays there."""
    agent, found = exact(agent_of("--distil", "average"), 0.0, None), []
    for _ in range(3):
        agent.executed = torch.tensor([8 * (1 - agent.actor.weights.item()), 8.0])  # eight steps
        agent.distil(executed_pairs([1.0] * 8, [1.0] * 8))
        found.append(agent.actor.weights.item())
    assert found == [1, 1, 1]


def test_cloning_is_not_averaging():
    """π = w s, s = (1, 2), ω = (0.3, −0.1): least squares moves w by −0.02, the mean of ω is 0.1."""
    policy, s, offset = Linear(0.5), torch.tensor([[1.0], [2.0]]), torch.tensor([[0.3], [-0.1]])
    target = policy.perturbed(s, offset).detach()
    policy.weights.data -= 0.02
    loss = poplin.cloning_loss(policy(s), target)
    assert torch.autograd.grad(loss, policy.weights)[0].item() == pytest.approx(0, abs=1e-6)
    agent = exact(agent_of("--distil", "average"), 0.5, None)
    agent.executed = torch.tensor([offset.sum().item(), 2.0])
    agent.distil(executed_pairs([1.0, 2.0], target.flatten().tolist()))
    assert agent.actor.weights.item() == pytest.approx(0.6)


def test_cloning_loss_is_a_mean_over_rows_and_dimensions():
    assert poplin.cloning_loss(torch.zeros(1, 2), torch.tensor([[1.0, -1.0]])) == 1
    assert poplin.cloning_loss(
        torch.zeros(3, 2), torch.tensor([[1.0, -1.0], [0, 0], [0, 0]])
    ) == pytest.approx(1 / 3)
    with pytest.raises(AssertionError):
        poplin.cloning_loss(torch.zeros(2, 1), torch.zeros(2))


def test_losses_of_the_game_at_equal_distributions():
    zero = torch.zeros(5)
    assert poplin.discriminator_loss(zero, zero).item() == pytest.approx(1.3856012, abs=1e-6)
    assert poplin.generator_loss(zero).item() == pytest.approx(0.6931472, abs=1e-6)


def test_losses_of_the_game_by_hand():
    """D = 0.8 of what was executed and 0.4 of what was not."""
    logit = lambda p: torch.tensor([math.log(p / (1 - p))])
    entropy = -sum(p * math.log(p) + (1 - p) * math.log(1 - p) for p in (0.8, 0.4)) / 2
    expected = -math.log(0.8) - math.log(0.6) - 1e-3 * entropy
    assert poplin.discriminator_loss(logit(0.8), logit(0.4)).item() == pytest.approx(expected, abs=1e-6)
    assert poplin.generator_loss(logit(0.4)).item() == pytest.approx(-math.log(0.4), abs=1e-6)


def test_held_out_pairs_are_never_trained_on(monkeypatch):
    """A fifth of ten and of a hundred; the others all are, in batches of one size, in every epoch."""
    agent = agent_of("--policy-batch", 16, "--policy-epochs", 3)
    for count, held in ((10, 2), (100, 20), (3, 1)):
        seen = []
        monkeypatch.setattr(agent, "learn", lambda obs, action, seen=seen: seen.append(obs.flatten()))
        agent.distil(executed_pairs([float(k) for k in range(count)], [0.5] * count))
        assert {len(batch) for batch in seen} == {16}
        each = len(seen) // 3
        for epoch in range(3):
            values = torch.cat(seen[epoch * each : (epoch + 1) * each])
            assert len(values.unique()) == count - held
        assert len(torch.cat(seen).unique()) == count - held


def test_one_pair_teaches_nothing(monkeypatch):
    agent = agent_of()
    monkeypatch.setattr(agent, "learn", None)
    assert agent.distil(executed_pairs([1.0], [0.0])).isfinite()


def test_cloning_keeps_the_best_epoch_and_ends_five_after_it(monkeypatch):
    """Each epoch moves the policy's constant action by 0.1 from 0; those executed were 0.3."""
    agent, epochs = agent_of("--policy-epochs", 50, "--policy-batch", 64), []

    def learn(obs, action):
        epochs.append(len(obs))
        agent.actor.weights.data[-1] += 0.1

    agent.actor.weights.data.zero_()
    monkeypatch.setattr(agent, "learn", learn)
    error = agent.distil(executed_pairs([0.1] * 20, [0.3] * 20))
    assert agent.actor.weights[-1].item() == pytest.approx(0.3, abs=1e-6) and len(epochs) == 3 + 5
    assert error.item() == pytest.approx(0, abs=1e-6)


def test_cloning_learns_the_executed_actions():
    agent = agent_of("--policy-epochs", 300, "--policy-batch", 32, "--actor-lr", 0.01)
    s = torch.linspace(-1, 1, 100)
    pairs = executed_pairs(s.tolist(), (0.8 * (2 * s).sin()).tolist())
    agent.actor.observe(pairs.obs)
    assert agent.distil(pairs) < 0.01
    assert poplin.cloning_loss(agent.policy(pairs.obs, True), pairs.action) < 0.01


def test_the_game_draws_the_policy_to_the_executed_actions():
    """All executed are 0.9; without noise the policy has to say so. The discriminator's step is its own."""
    flags = ("--distil", "gan", "--variance", 1e-4, "--policy-epochs", 60, "--policy-batch", 50)
    agent = agent_of(*flags, "--actor-lr", 0.01)
    obs, action = torch.randn(50, 1), torch.full((50, 1), 0.9)
    before = {name: p.clone() for name, p in agent.discriminator.named_parameters()}
    agent.learn(obs, action)
    assert all(not torch.equal(before[name], p) for name, p in agent.discriminator.named_parameters())
    agent.distil(executed_pairs(obs.flatten().tolist(), [0.9] * 50))
    assert agent.policy(obs, True).mean().item() == pytest.approx(0.9, abs=0.25)


def test_the_discriminator_leaves_the_policy_alone_and_sees_its_noise(monkeypatch):
    """Its own loss gives the policy no gradient; fakes are of weights W + √v_0 ε."""
    agent, fakes = agent_of("--distil", "gan", "--variance", 0.25), []
    noise = torch.randn(4, len(agent.actor.weights))
    monkeypatch.setattr(poplin, "truncated_normal", lambda *shape, device: noise)
    kept = poplin.discriminator_loss
    monkeypatch.setattr(poplin, "discriminator_loss", lambda real, fake: kept(real, fake))
    call = agent.discriminator.forward
    monkeypatch.setattr(agent.discriminator, "forward", lambda z, a: fakes.append(a) or call(z, a))
    obs = torch.randn(4, 1)
    expected = agent.actor.perturbed(obs, 0.5 * noise).detach()
    agent.learn(obs, torch.zeros(4, 1))
    executed, fake, again = fakes
    assert not executed.any() and torch.equal(fake, expected) and torch.equal(again, expected)
    assert not fake.requires_grad and again.requires_grad


# --- trials ---


def played(agent, episodes: list[int]):
    """A replay whose k-th row goes from k/10 to (k + 1)/10 in the given episode."""
    buffer = poplin.ReplayBuffer(10, 1, 1, CPU)
    for k, episode in enumerate(episodes):
        buffer.add([k / 10], [0.5], 0.0, [(k + 1) / 10], False, episode)
    return buffer


def test_learns_when_a_trial_has_begun_from_what_it_executed_since(monkeypatch):
    """The first fit distils nothing: those actions were random. A ring keeps what it can."""
    agent = agent_of("--trial-steps", 4, "--fit-epochs", 1, "--batch-size", 2, "--learning-starts", 3)
    fits, pairs = [], []
    monkeypatch.setattr(agent, "fit_ensemble", lambda batch: fits.append(len(batch.obs)) or torch.ones(2))
    monkeypatch.setattr(
        agent,
        "distil",
        lambda trial: pairs.append([round(10 * s) for s in trial.obs[:, 0].tolist()]) or torch.ones(()),
    )
    episodes = [0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2, 2, 3]
    for count in range(3, len(episodes) + 1):
        agent.intended.fill_(1)
        agent.executed.fill_(1)
        before = len(fits)
        agent.update(played(agent, episodes[:count]), count)
        assert agent.intended.any() == agent.executed.any() == (len(fits) == before)
    assert fits == [3, 4, 7, 10, 10]  # at once, episodes 1 and 2, four steps later, episode 3; ten are kept
    assert pairs == [[3], [4, 5, 6], [7, 8, 9, 10], [11, 12]]
    assert agent.actor.count.item() == pytest.approx(13.01)  # each row is whitened by once


def test_figures_are_those_of_the_last_trial():
    """The return is of the policy alone, once there is something to plan with, too."""
    flags = ("--fit-epochs", 1, "--batch-size", 2, "--learning-starts", 3, "--policy-episodes", 2)
    agent = agent_of(*flags, "--horizon", 2, *TWO)
    buffer = played(agent, [0, 0, 0])
    names = {"losses/model_loss", "model/error", "losses/policy_loss", "eval/policy_return"}
    assert set(agent.update(buffer, 3)) == names | {"plan/return", "plan/deviation"}
    alone = dataclasses.replace(agent.args, eval_episodes=2)
    agent.actor.weights.data.normal_().mul_(0.1)  # far from the actions' bounds
    for episode, learned in ((0, 3), (1, 5), (1, 5)):
        buffer.add([0.3], [0.5], 0.0, [0.4], False, episode)
        found = agent.update(buffer, 4)["eval/policy_return"].item()
        assert agent.learned == learned
        if episode:
            expected = poplin.evaluate(poplin.PolicyControl(agent), alone, 3)["return_mean"]
            assert found == pytest.approx(expected, rel=1e-6)


def test_both_controls_are_reported(finished, tmp_path):
    tags = scalars(finished("poplin", tmp_path))
    assert {"eval/policy_return", "eval/episodic_return", "charts/episodic_return"} <= set(tags)
    assert len({event.value for event in tags["eval/policy_return"]}) > 3


# --- presets and mistakes ---


def test_noise_follows_what_is_searched_and_how_it_is_distilled():
    variance = lambda *flags: poplin.parse(list(flags)).variance
    assert variance() == 0.03 and variance("--search", "actions") == variance("--search", "replan") == 0.25
    assert variance("--distil", "average") == variance("--distil", "gan") == 0.1
    assert variance("--search", "weights-uniform") == 0.1
    assert variance("--search", "actions", "--variance", "0.5") == 0.5


def test_released_sizes():
    args = poplin.parse(["--preset", "released", "--elites", "40"])
    assert (args.candidates, args.elites, args.iterations, args.horizon) == (500, 40, 5, 30)
    assert (args.model_layers, args.model_hidden, args.total_timesteps) == (4, 200, 50_000)
    assert (args.policy_epochs, args.policy_episodes, args.fit_epochs) == (100, 5, 5)
    assert poplin.parse(["--preset", "released", "--distil", "gan"]).policy_epochs == 40
    assert set(poplin.RELEASED_POPLIN) <= {field.name for field in dataclasses.fields(poplin.Args)}


WRONG = {
    "--horizon 0": "--horizon 0: must be at least 1",
    "--elites 101": "--elites 101: must be at most --candidates 100",
    "--search actions --distil average": "--distil average: must be bc with --search actions: the others",
    "--search replan --distil gan": "--distil gan: must be bc with --search replan",
    "--model-decays [1]": "--model-decays [1]: must be a JSON list of two numbers or more",
    "--model-decays {": "--model-decays {: must be a JSON list",
    "--variance -1": "--variance -1.0: must be in",
    "--search both": "--search",
}


@pytest.mark.parametrize("flags", WRONG)
def test_mistakes_in_one_line(flags, tmp_path, capsys, monkeypatch):
    error = fails("poplin", [*flags.split(), "--runs-dir", tmp_path / "runs"], capsys, monkeypatch)
    assert WRONG[flags] in error and len(error.splitlines()) == 1 and not (tmp_path / "runs").exists()


@by_hand
def test_swings_up_within_ten_trials(tmp_path):
    """Seed 1 of docs/poplin.md."""
    flags = ["--env-id", CART_POLE, "--num-threads", "1", "--total-timesteps", "2200", "--eval-every", "2200"]
    folder = poplin.train(poplin.parse([*flags, "--runs-dir", str(tmp_path)]))
    assert max(event.value for event in scalars(folder)["charts/episodic_return"]) > 170
