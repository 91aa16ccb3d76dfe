"""MAAC: the actor's value through members, noise and ends in closed form; H = 0 is mbpo.py."""

import math

import pytest
import torch
from torch import nn

from tests.algos.test_math import column, filled_buffer, make_agent, recorded
from tests.algos.test_svg import LinearActor, columns
from tests.conftest import differing, evaluations, load, run

maac, mbpo = load("maac"), load("mbpo")
MEMBERS = ((0.9, 0.5), (0.7, 0.3))  # s' = a s + b u of each
ONE = torch.ones(1, 1, dtype=torch.float64)


# ---------------------------------------------------------------- linear members in closed form


def linear_agent(horizon: int, choose, entropy: str = "first", ended: float = 0.0):
    """r̂ = s + 0.2 u, Q = 2 s + 0.5 u, π = −0.4 s, γ = 0.9; `choose` gives step t's member of each row [B].

    d̂ = `ended` after the first step, 0 later.
    """
    agent, taken = make_agent("maac", "--horizon", horizon, "--gamma", 0.9, "--entropy", entropy), []
    weights = torch.tensor(MEMBERS, dtype=torch.float64)

    def imagined_step(obs, action):
        a, b = weights[choose(len(taken), len(obs))].T[..., None]
        reward = (obs + 0.2 * action)[:, 0]
        taken.append(obs)
        return a * obs + b * action, reward, torch.full_like(reward, ended if len(taken) == 1 else 0.0)

    agent.actor, agent.imagined_step = LinearActor(-0.4), imagined_step
    agent.critic = lambda obs, action, frozen: (2 * obs + 0.5 * action)[:, 0].expand(2, -1)
    return agent


def value_and_slope(agent, rows: int = 1) -> tuple[float, float]:
    """Mean V of rows that start at 1, without entropy, and its derivative in k."""
    value = agent.imagined_value(ONE.expand(rows, 1), column(0.0))[0].mean()
    value.backward()
    return value.item(), agent.actor.k.grad.item()


def test_a_new_member_at_every_step_is_the_mean_member():
    """All 8 sequences of two members over H = 3; a member kept for the whole rollout is another objective."""
    agent = linear_agent(3, lambda t, rows: (torch.arange(rows) >> t) & 1)
    value, slope = value_and_slope(agent, 8)
    k, rho = torch.tensor(-0.4, dtype=torch.float64, requires_grad=True), lambda k: 0.9 * (0.8 + 0.4 * k)
    closed = sum(rho(k) ** t * (1 + 0.2 * k) for t in range(3)) + rho(k) ** 3 * (2 + 0.5 * k)
    closed.backward()
    assert value == pytest.approx(2.099139, abs=1e-6) == closed.item()
    assert slope == pytest.approx(1.834822, abs=1e-6) == k.grad.item()
    kept = linear_agent(3, lambda t, rows: torch.arange(rows) & 1)
    assert value_and_slope(kept, 8) == pytest.approx((2.110892, 1.882768), abs=1e-6)


@pytest.mark.parametrize(
    ("member", "horizon", "expected"),
    [(0, 2, (2.21402, 1.95905)), (0, 3, (2.314833, 2.430511)), (1, 3, (1.906951, 1.335026))],
)
def test_value_of_one_member(member, horizon, expected):
    agent = linear_agent(horizon, lambda t, rows: torch.full((rows,), member))
    assert value_and_slope(agent) == pytest.approx(expected, abs=1e-5)


def test_a_concave_value_pays_for_disagreement():
    """r = 0, Q = −s², H = 1, ρ of 0.7 and 0.58: γ times half of −V'' and the members' variance 0.0036."""
    found = []
    for factors in ((0.7, 0.58), (0.64, 0.64)):  # the members, and their mean twice
        agent = linear_agent(1, None)
        rho = column(*factors)[:, None]
        agent.imagined_step = lambda obs, action, rho=rho: (rho * obs, 0 * obs[:, 0], 0 * obs[:, 0])
        agent.critic = lambda obs, action, frozen: -obs[:, 0].square().expand(2, -1)
        found.append(agent.imagined_value(ONE.expand(2, 1), column(0.0))[0].mean().item())
    assert found == pytest.approx([-0.37188, -0.36864]) == [0.9 * -0.4132, 0.9 * -0.4096]
    assert found[1] - found[0] == pytest.approx(0.00324) == 0.9 * 0.0036


@pytest.mark.parametrize(
    ("rho", "four", "ten"), [(0.9, 0.4305, 0.1216), (1.2, 1.3605, 2.1589), (1.5, 3.3215, 20.1066)]
)
def test_gradients_through_long_rollouts_vanish_or_explode(rho, four, ten):
    """∂V/∂s_0 = (γρ)^H where only Q = s_H counts."""
    for horizon, expected in ((4, four), (10, ten)):
        agent = linear_agent(horizon, None)
        agent.imagined_step = lambda obs, action: (rho * obs, 0 * obs[:, 0], 0 * obs[:, 0])
        agent.critic = lambda obs, action, frozen: obs[:, 0].expand(2, -1)
        obs = ONE.clone().requires_grad_()
        agent.imagined_value(obs, column(0.0))[0].backward()
        assert obs.grad.item() == pytest.approx(expected, abs=1e-4)


def test_terminal_value_is_the_smaller_mean_over_actions():
    """Q₁ = (1, 5, 3), Q₂ = (4, 2, 6) at three sampled actions: min (3, 4), not the mean of (1, 2, 3)."""
    agent = make_agent("maac", "--horizon", 1, "--terminal-actions", 3, "--gamma", 0.5)
    agent.imagined_step = lambda obs, action: (obs + 1, 0 * obs[:, 0], 0 * obs[:, 0])
    seen = []

    def critic(obs, action, frozen):
        seen.append((obs, action))
        return torch.tensor([[1.0, 1, 5, 5, 3, 3], [4, 4, 2, 2, 6, 6]])

    agent.critic = critic
    value = agent.imagined_value(torch.tensor([[0.0], [7.0]]), torch.tensor(0.0))[0]
    assert value.tolist() == [1.5, 1.5] and seen[0][0].flatten().tolist() == [1, 8, 1, 8, 1, 8]
    assert len(seen[0][1].unique()) == 6


# ---------------------------------------------------------------- ends, entropy, noise


def test_masks_of_the_released_code_let_the_dead_revive():
    """d = (1, 0, 0, 0), r ≡ 1, Q = 10, γ = 0.9: 9.1, with the exclusive product 1."""
    for released, expected in ((True, 9.1), (False, 1.0)):
        alive = [column(1.0), *maac.survivals(columns(1, 0, 0, 0), released)]
        no = columns(0, 0, 0, 0, 0)
        value = maac.expanded_value(columns(1, 1, 1, 1), alive, no, column(10), 0.0, 0.9)
        assert value.item() == pytest.approx(expected)
    assert [m.item() for m in maac.survivals(columns(0.5, 0.2), False)] == pytest.approx([0.5, 0.4])
    assert [m.item() for m in maac.survivals(columns(0.5, 0.2), True)] == pytest.approx([0.5, 0.8])


@pytest.mark.parametrize(("mask", "expected"), [("exclusive", 0.92), ("released", 0.92 + 0.714420)])
def test_an_end_pays_its_reward_and_nothing_after(mask, expected):
    """H = 2 with a certain end in the first step: r̂_0; released, γ² Q = 0.81 · 0.49 · 1.8 as well."""
    agent = linear_agent(2, lambda t, rows: torch.zeros(rows, dtype=torch.long), ended=1.0)
    agent.args.mask = mask
    value, _, alive = agent.imagined_value(ONE, column(0.0))
    assert value.item() == pytest.approx(expected) and alive.item() == (mask == "released")


@pytest.mark.parametrize(("entropy", "expected"), [("first", 0.1), ("all", 0.1 * 2.71)])
def test_entropy_counts_at_the_first_action_or_at_all(entropy, expected):
    """log π = −1, α = 0.1, γ = 0.9, H = 2, beside the value 2.21402 without entropy."""
    agent = linear_agent(2, lambda t, rows: torch.zeros(rows, dtype=torch.long), entropy)
    value = agent.imagined_value(ONE, column(0.1))[0]
    assert value.item() == pytest.approx(2.21402 + expected, abs=1e-5)


def test_the_first_entropy_is_all_where_nothing_is_earned():
    """r = Q = 0: V = −α log π(â_0|s_0), whatever H."""
    for horizon in (1, 3, 6):
        agent = linear_agent(horizon, None)
        agent.imagined_step = lambda obs, action: (0.5 * obs, 0 * obs[:, 0], 0 * obs[:, 0])
        agent.critic = lambda obs, action, frozen: 0 * obs[:, 0].expand(2, -1)
        value, log_prob, _ = agent.imagined_value(ONE, column(0.3))
        assert value.item() == pytest.approx(0.3) and log_prob.item() == -1


@pytest.mark.parametrize(
    ("log_var", "sigma", "square"),
    [(-4.0, 0.135335, 0.018316), (-2.0, 0.367879, 0.135335), (0.5, 1.284025, 1.648721)],
)
def test_scale_of_the_noise(log_var, sigma, square, monkeypatch):
    """ε = 1: state and reward move by σ, in the released code by σ², without noise not at all."""
    agent = make_agent("maac")
    zero = torch.zeros(2, 2, 2)  # two rows for each of two members: state and reward
    agent.elites.forward = lambda obs, action: (zero, zero + log_var)
    monkeypatch.setattr(torch, "randn_like", torch.ones_like)
    for kind, expected in (("deviation", sigma), ("variance", square), ("none", 0.0)):
        agent.args.model_noise = kind
        next_obs, reward, _ = agent.imagined_step(torch.zeros(4, 1), torch.zeros(4, 1))
        assert next_obs[:, 0].tolist() == pytest.approx([expected] * 4, abs=1e-6) == reward.tolist()


def test_the_critics_of_steve_see_horizon_0_alone():
    """Why the released target is (1): one of variance 0 gets the weight 1 / (0 + 1e-8)."""
    rows = [[10.0, 10, 10, 10], [9.8, 10.2, 9.8, 10.2], [9.5, 10.9, 9.5, 10.9]]
    targets = torch.tensor(rows, dtype=torch.float64)[..., None]
    weights = load("steve").horizon_weights(targets, "stev", 0.5)[:, 0]
    assert weights.tolist() == pytest.approx([0.99999973, 2.5e-7, 2.0e-8], abs=1e-8)
    assert weights[1].item() == pytest.approx(2.5e-7, rel=0.01)
    found = (weights * targets.mean((1, 2))).sum().item()
    assert found - 10 == pytest.approx(4e-9, rel=0.1)
    weights = load("steve").horizon_weights(targets[1:], "stev", 0.5)[:, 0]
    assert weights.tolist() == pytest.approx([0.924528, 0.075472], abs=1e-6)
    assert (weights * targets[1:].mean((1, 2))).sum().item() == pytest.approx(10.015094, abs=1e-6)


# ---------------------------------------------------------------- the ensemble


def with_members(agent, members=MEMBERS):
    """The agent's elites as linear ones without noise; returns what each call got, [E, B / E, n]."""
    calls, weights = [], torch.tensor(members, dtype=torch.float64)[..., None, None]

    def forward(obs, action):
        calls.append(obs)
        delta = (weights[:, 0] - 1) * obs + weights[:, 1] * action
        mean = torch.cat([delta, obs + 0.2 * action], 2)
        return mean, torch.full_like(mean, -math.inf)

    agent.elites.forward, agent.rule = forward, lambda obs: torch.zeros_like(obs[:, 0])
    return calls


def test_each_row_sees_one_member_a_step_and_another_the_next():
    """B / E rows for each of E members, a row in one place alone; steps and calls differ in who sees whom."""
    agent = make_agent("maac", "--horizon", 2, "--elites", 4, "--members", 4)
    agent.actor = LinearActor(0.0)
    calls = with_members(agent, ((1.0, 0.0),) * 4)  # states stand still: they are the rows' names
    agent.critic = lambda obs, action, frozen: obs[:, 0].expand(2, -1)
    rows = torch.arange(20.0, dtype=torch.float64)[:, None]
    for _ in range(2):
        agent.imagined_value(rows, column(0.0))
    assert len(calls) == 4
    for call in calls:
        assert call.shape == (4, 5, 1) and call.flatten().sort()[0].tolist() == list(range(20))
    seats = [tuple(call.reshape(4, 5).sort(1)[0].flatten().tolist()) for call in calls]
    assert len(set(seats)) == 4


def test_value_of_the_ensemble_is_the_mean_members():
    """The closed form of 8 sequences by the ensemble's own draw; 2.1109 if members stayed."""
    agent = make_agent("maac", "--horizon", 3, "--gamma", 0.9)
    agent.actor = LinearActor(-0.4)
    with_members(agent)
    agent.critic = lambda obs, action, frozen: (2 * obs + 0.5 * action)[:, 0].expand(2, -1)
    assert value_and_slope(agent, 100_000) == pytest.approx((2.099139, 1.834822), abs=4e-3)


def exact_agent(*flags):
    """Real networks in float64, three observations, ends by the classifier."""
    agent = make_agent("maac", "--hidden", 8, *flags, obs_dim=3, action_dim=2)
    for part in (agent.actor, agent.critic, agent.model, agent.elites, agent.termination):
        part.double()
    agent.elites.std.fill_(2.0), agent.model.std.fill_(3.0)
    return agent


def test_identical_members_without_noise_are_one_model():
    """However rows are dealt out: the same value and gradient as one member, to 1e-6."""
    found = []
    for members in (4, 1):
        agent = exact_agent("--horizon", 3, "--model-noise", "none", "--elites", members)
        for seed, part in enumerate((agent.actor, agent.critic, agent.termination, agent.elites)):
            torch.manual_seed(seed)
            for p in part.parameters():
                one = torch.randn(p[:1].shape if part is agent.elites and p.ndim == 3 else p.shape)
                p.data = (0.3 * one).double().expand_as(p).clone()
        noise = torch.randn(4, 12, 2, dtype=torch.float64)
        kept, original = iter(noise), maac.squashed_log_prob

        def sample(obs, actor=agent.actor, kept=kept, original=original):
            mean, log_std = actor(obs)
            drawn = next(kept)
            u = mean + log_std.exp() * drawn
            return u.tanh(), original(drawn, log_std, u)

        object.__setattr__(agent.actor, "sample", sample)
        value = agent.imagined_value(torch.linspace(-1, 1, 36).double().view(12, 3), column(0.2))[0]
        value.mean().backward()
        found.append((value, torch.cat([p.grad.flatten() for p in agent.actor.parameters()])))
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, atol=1e-6) and a.abs().max() > 1e-3


@pytest.mark.parametrize(
    "flags", [(), ("--entropy", "all", "--mask", "released", "--model-noise", "variance")]
)
def test_gradient_is_the_slope_of_the_value(flags):
    """Members, their noise and the policy's held fixed by the seed: finite differences agree to 1e-6."""
    agent = exact_agent("--horizon", 3, "--terminal-actions", 2, *flags)
    obs = torch.randn(12, 3, dtype=torch.float64)

    def value():
        torch.manual_seed(7)
        return agent.imagined_value(obs, column(0.2))[0].mean()

    value().backward()
    for p in agent.actor.parameters():
        at = p.grad.abs().argmax()
        flat, slope, (low, high) = p.data.view(-1), p.grad.view(-1)[at].item(), (0, 0)
        flat[at] += 1e-6
        high = value().item()
        flat[at] -= 2e-6
        low = value().item()
        flat[at] += 1e-6
        assert (high - low) / 2e-6 == pytest.approx(slope, abs=1e-6) and slope != 0


def test_the_actor_moves_itself_alone_and_through_everything():
    """No other weight has a gradient or loses its right to one; states, rewards and ends reach the actor."""
    agent = exact_agent("--horizon", 2)
    obs = torch.randn(8, 3, dtype=torch.float64)
    agent.imagined_value(obs, column(0.1))[0].mean().backward()
    parts = (agent.critic, agent.critic_target, agent.model, agent.elites, agent.termination)
    assert all(p.grad is None for part in parts for p in part.parameters())
    assert all(p.requires_grad for part in (agent.termination, agent.model) for p in part.parameters())
    action = torch.randn(8, 2, dtype=torch.float64, requires_grad=True)
    for output in agent.imagined_step(obs, action):
        assert torch.autograd.grad(output.sum(), action, retain_graph=True)[0].abs().min() > 0


def test_the_known_rule_ends_imagined_steps():
    agent = exact_agent("--horizon", 1)
    agent.rule = lambda obs: (obs[:, 0] > 0).double()
    next_obs, _, ended = agent.imagined_step(*(torch.randn(50, n, dtype=torch.float64) for n in (3, 2)))
    assert torch.equal(ended, (next_obs[:, 0] > 0).double()) and 0 < ended.sum() < 50


# ---------------------------------------------------------------- updates


def twin(*flags):
    """Agents of mbpo.py and maac.py with the same weights, and a replay."""
    torch.manual_seed(3)
    agents = [make_agent(name, *flags) for name in ("mbpo", "maac")]
    agents[1].load_state_dict(agents[0].state_dict())
    for agent in agents:
        agent.rule = lambda obs: torch.zeros_like(obs[:, 0])
    return agents


@pytest.mark.parametrize("ratio", [0.05, 1.0])
def test_horizon_0_updates_are_mbpos(ratio):
    """Ten updates of networks of the size of use: weights and generator the same to the bit."""
    flags = ("--hidden", 256, "--learning-starts", 256, "--batch-size", 256, "--real-ratio", ratio)
    agents, ends = twin(*flags, "--updates-per-step", 10), []
    for agent, module in zip(agents, (mbpo, maac), strict=True):
        agent.args.horizon = 0
        torch.manual_seed(5)
        metrics = agent.update(filled_buffer(module, 300), 257)
        ends.append((agent.state_dict(), metrics, torch.get_rng_state()))
    (a, metrics, generator), (b, more, other) = ends
    for part in ("actor", "critic", "critic_target"):
        assert all(torch.equal(x, b[part][name]) for name, x in a[part].items())
    assert all(torch.equal(x, more[name]) for name, x in metrics.items()) and torch.equal(generator, other)
    assert more["losses/actor_gradient_norm"] > 0 and more["expansion/alive"] == 1


def test_horizon_0_is_mbpo_bit_for_bit(tmp_path):
    """The same evaluations, weights, optimisers, replays and generators; not so at H = 1."""
    short = ("--total-timesteps", 160, "--eval-every", 80)
    parent = run("mbpo", tmp_path / "parent", *short)
    same, other = (run("maac", tmp_path / str(h), *short, "--horizon", h) for h in (0, 1))
    assert evaluations(parent) == evaluations(same)
    only = [f"/args/{name}" for name in maac.PathwiseActor.__dataclass_fields__]
    assert differing(parent / "final.pt", same / "final.pt", "/algo", *only) == []
    found = differing(parent / "final.pt", other / "final.pt")
    assert any("/agent/critic/" in name for name in found) and any("/agent/actor/" in name for name in found)


@pytest.mark.parametrize(("starts", "draws"), [("mixed", 1), ("real", 2)])
def test_the_actor_starts_where_the_flag_says(starts, draws, monkeypatch):
    """mixed: the critics' batch itself; real: replayed states drawn anew."""
    agent, buffer = make_agent("maac", "--actor-starts", starts), filled_buffer(maac)
    agent.rule = lambda obs: torch.zeros_like(obs[:, 0])
    seen, sizes, sample = [], [], buffer.sample
    agent.learn = lambda batch, obs: seen.append((batch.obs, obs)) or {}
    agent.update(buffer, 61)
    monkeypatch.setattr(buffer, "sample", lambda n: (sizes.append(n), sample(n))[1])
    agent.update(buffer, 62)
    assert len(sizes) == draws and sizes[-1] == (16 if starts == "real" else int(0.05 * 16))
    known = set(buffer.rows[:, 0].tolist())
    for batch, obs in seen:
        assert (obs is batch) == (starts == "mixed") and obs.shape == (16, 1)
        assert starts == "mixed" or set(obs.flatten().tolist()) <= known


def test_all_real_data_still_fit_the_ensemble(monkeypatch):
    """--real-ratio 1: the actor looks ahead through a fitted ensemble, critics learn from real steps."""
    for horizon, refits in ((1, 2), (0, 0)):
        agent, calls = make_agent("maac", "--real-ratio", 1, "--horizon", horizon), []
        agent.rule = lambda obs: torch.zeros_like(obs[:, 0])
        monkeypatch.setattr(agent, "refit", lambda buffer, calls=calls: calls.append(buffer.size))
        for step in range(61, 61 + 26):
            agent.update(filled_buffer(maac), step)
        assert len(calls) == refits and agent.imagined.added == 0


@pytest.mark.parametrize(
    ("flags", "clip"),
    [
        ((), math.inf),
        (("--horizon", 5), 10),
        (("--horizon", 9, "--actor-clip", 3), 3),
        (("--actor-clip", 2), 2),
    ],
)
def test_gradient_of_long_rollouts_is_clipped(flags, clip, monkeypatch):
    """From H = 5 on at the norm 10, or as told; the actor's alone, and the norm before is what is logged."""
    agent = make_agent("maac", *flags)
    assert agent.clip == clip
    agent.args.horizon, agent.clip = 0, 1e-3
    calls = recorded(monkeypatch, nn.utils, "clip_grad_norm_")
    batch = filled_buffer(maac)[torch.arange(16)]
    norms = []
    agent.optimizer.step = lambda: norms.extend(
        torch.cat([p.grad.flatten() for p in part.parameters()]).norm().item()
        for part in (agent.actor, agent.critic)
    )
    metrics = agent.learn(batch, batch.obs)
    assert len(calls) == 1 and norms[0] == pytest.approx(1e-3, rel=0.01) and norms[1] > 0.1
    assert metrics["losses/actor_gradient_norm"] > 0.01


def test_the_losses_are_the_values_and_the_first_entropys(monkeypatch):
    """L_π = −mean V over the starts, with the critics that learn; α hears of the first actions."""
    agent, buffer = make_agent("maac", "--horizon", 2), filled_buffer(maac)
    temperature, values, original = recorded(monkeypatch, maac, "temperature_loss"), [], agent.imagined_value
    agent.imagined_value = lambda *args: (values.append((args[0], *original(*args))), values[-1][1:])[1]
    batch, starts = buffer[torch.arange(16)], buffer[torch.arange(16, 32)].obs
    target = [p.clone() for p in agent.critic_target.parameters()]
    metrics = agent.learn(batch, starts)
    obs, value, log_prob, alive = values[0]
    assert obs is starts and metrics["losses/actor_loss"] == -value.mean()
    assert temperature[0][1] is log_prob and metrics["expansion/alive"] == alive.mean()
    assert 0 < metrics["expansion/alive"] < 1 and len(value) == 16
    moved = zip(target, agent.critic_target.parameters(), agent.critic.parameters(), strict=True)
    assert all(torch.allclose(new, old + 0.005 * (online - old), atol=1e-7) for old, new, online in moved)


def test_presets():
    laptop = maac.parse([])
    assert (laptop.horizon, laptop.updates_per_step, laptop.members, laptop.elites) == (3, 10, 7, 5)
    same = {name: value for name, value in vars(mbpo.parse([])).items()}
    assert {name: vars(laptop)[name] for name in same} == same
    released = maac.parse(["--preset", "released", "--env-id", "Hopper-v5"])
    assert (released.horizon, released.members, released.elites, released.model_hidden) == (4, 8, 8, 200)
    assert (released.updates_per_step, released.terminal_actions, released.target_entropy) == (8, 5, None)
    assert (released.mask, released.model_noise, released.rollout_length_max) == ("released", "variance", 1)
    assert maac.parse(["--preset", "released", "--env-id", "Walker2d-v5"]).horizon == 2
    assert maac.parse(["--preset", "released", "--env-id", "Walker2d-v5", "--horizon", "7"]).horizon == 7


def test_contradictions_are_refused():
    with pytest.raises(maac.BadInput, match="--terminal-actions 5: must be 1 with --horizon 0"):
        maac.parse(["--horizon", "0", "--terminal-actions", "5"])
    with pytest.raises(maac.BadInput, match="--actor-clip 0"):
        maac.parse(["--actor-clip", "0"])
