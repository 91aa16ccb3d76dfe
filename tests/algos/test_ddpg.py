"""DDPG, TD3 and DDPG-MVE: closed forms of targets and losses, cadence of updates, noise, known rewards."""

import copy
import json

import gymnasium as gym
import numpy as np
import pytest
import torch

from tests.algos.test_math import GAMMA, K, P, column, filled_buffer, make_agent, recorded
from tests.conftest import load
from tests.tasks import RHO, A, B, Q

ddpg, td3, mve = load("ddpg"), load("td3"), load("ddpg_mve")
C = A - B * K


# ---------------------------------------------------------------- targets


@pytest.mark.parametrize(("done", "expected"), [(0.0, 10.9), (1.0, 1.0)])
def test_td_target(done, expected):
    assert ddpg.td_target(column(1), column(done), column(10), 0.99).item() == pytest.approx(expected)


def test_actor_gradient_of_a_linear_critic():
    """Q = qᵀa, π(s) = W s: ∂L/∂W = −q mean(s)ᵀ."""
    obs, q, w = torch.randn(7, 3), torch.randn(2), torch.randn(2, 3, requires_grad=True)
    ddpg.deterministic_actor_loss((obs @ w.T) @ q).backward()
    assert torch.allclose(w.grad, -q[:, None] * obs.mean(0), atol=1e-6)


def imagined(horizon: int, start: float, critic=None, noise: float = 0.0, number: int = 1):
    """H exact steps of the linear-quadratic task from `start` under a = −K s, and Q̄ at the end."""
    obs = torch.full((number, 1), start, dtype=torch.float64)
    found = mve.Imagined([obs], [-K * obs], [], [])
    for _ in range(horizon):
        action = -K * obs
        found.reward.append(-(Q * obs**2 + RHO * action**2)[:, 0])
        obs = A * obs + B * action + noise * torch.randn_like(obs)
        found.done.append(torch.zeros(number, dtype=torch.float64))
        found.obs.append(obs)
        found.action.append(-K * obs)
    exact = -P * obs[:, 0] ** 2
    return found, exact if critic is None else critic(exact)


def target(horizon: int, critic=None) -> float:
    """The target of the real pair (1, 0.3)."""
    real, start = -(Q + RHO * 0.3**2), A + B * 0.3
    found, next_q = imagined(horizon, start, critic)
    values = mve.expanded(found, horizon, next_q, GAMMA)
    return mve.td_target(column(real), column(0), values[0], GAMMA).item()


@pytest.mark.parametrize("horizon", [0, 1, 2, 5, 30])
def test_exact_model_and_critic_are_exact_at_any_horizon(horizon):
    assert target(horizon) == pytest.approx(-2.8124454383, abs=1e-9)


@pytest.mark.parametrize(("horizon", "expected"), [(0, 1.8), (1, 1.62), (3, 1.3122), (10, 0.6276211922)])
def test_bias_of_the_critic_is_discounted_once_per_step(horizon, expected):
    assert target(horizon, lambda q: q + 2) + 2.8124454383 == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("horizon", "expected"), [(0, -1.009), (1, -2.017126), (2, -2.4617095660), (5, -2.7823641830)]
)
def test_a_critic_of_zeros_leaves_the_rewards(horizon, expected):
    assert target(horizon, lambda q: 0 * q) == pytest.approx(expected, abs=1e-9)


def test_noise_shifts_the_mean_target_by_its_share():
    """Noise of 0.2 on imagined steps, exact noise-free critic: −γ P σ² Σ_{t<H} γ^t of the imagined part."""
    torch.manual_seed(0)
    found, next_q = imagined(3, 0.5, noise=0.2, number=400_000)
    noisy = mve.expanded(found, 3, next_q, GAMMA)[0].mean()
    calm, next_q = imagined(3, 0.5)
    exact = mve.expanded(calm, 3, next_q, GAMMA)[0]
    expected = -GAMMA * P * 0.04 * sum(GAMMA**t for t in range(3))
    assert (noisy - exact).item() == pytest.approx(expected, abs=1e-3)


def hand(done: float):
    """γ = ½, r = 1, r̂ = (2, 4), y_2 = 8, Q = 0 everywhere."""
    zero = torch.zeros(1, 1, dtype=torch.float64)
    found = mve.Imagined([zero] * 3, [zero] * 3, [column(2), column(4)], [column(0), column(0)])
    values = mve.expanded(found, 2, column(8), 0.5)
    y = mve.td_target(column(1), column(done), values[0], 0.5)
    alive = torch.stack([column(1 - done), column(1 - done)])
    real = mve.value_loss(torch.zeros(1, 1, dtype=torch.float64), y)
    q = torch.zeros(1, 2, 1, dtype=torch.float64)
    return values, y, real, mve.tdk_loss(real, q, values[:-1], alive)


def test_tdk_by_hand():
    values, y, real, tdk = hand(0.0)
    assert values[:, 0].tolist() == [6, 8, 8] and y.item() == 4
    assert real.item() == 16 and tdk.item() == 58  # (16 + 36 + 64) / 2
    _, y, real, tdk = hand(1.0)
    assert y.item() == 1 and real.item() == 1 and tdk.item() == 0.5


def test_an_imagined_end_cuts_the_rest():
    zero = torch.zeros(1, 1, dtype=torch.float64)
    found = mve.Imagined([zero] * 3, [zero] * 3, [column(2), column(4)], [column(1), column(0)])
    assert mve.expanded(found, 2, column(8), 0.5)[:, 0].tolist() == [2, 8, 8]


# ---------------------------------------------------------------- what an update moves


THREE = ["ddpg", "td3", "ddpg_mve"]


def apart(agent) -> None:
    """Slow networks and model unlike the online ones, so that one cannot pass for the other."""
    with torch.no_grad():
        for part in (agent.actor_target, agent.critic_target, getattr(agent, "model", agent.critic_target)):
            for parameter in part.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))


@pytest.mark.parametrize("name", THREE)
def test_gradients_stay_with_their_own_networks(name, monkeypatch):
    """Critics learn from their loss alone, the actor from its own; nothing else from either."""
    module, agent, reached = (
        load(name),
        make_agent(name, "--policy-delay", 1) if name == "td3" else make_agent(name),
        {},
    )
    parts = {part: getattr(agent, part) for part in ("critic", "actor", "model") if hasattr(agent, part)}
    losses = {"value_loss": "critic", "deterministic_actor_loss": "actor"}
    losses |= {"tdk_loss": "critic"} if name == "ddpg_mve" else {}

    def watch(loss_name):
        original = getattr(module, loss_name)

        def watched(*inputs):
            loss = original(*inputs)
            for part, network in parts.items():
                weights = list(network.parameters())
                found = torch.autograd.grad(loss, weights, allow_unused=True, retain_graph=True)
                reached[loss_name, part] = [g is not None for g in found]
            return loss

        monkeypatch.setattr(module, loss_name, watched)

    for loss_name in losses:
        watch(loss_name)
    agent.update(filled_buffer(module), 62)
    for (loss_name, part), found in reached.items():
        assert all(found) if losses[loss_name] == part else not any(found), (loss_name, part)
    assert set(reached) == {(loss_name, part) for loss_name in losses for part in parts}


@pytest.mark.parametrize("name", THREE)
def test_target_inside_an_update(name, monkeypatch):
    """Against a slow loop over the batch: slow networks, ends, and for ddpg_mve H steps of the model."""
    flags = {"td3": ("--policy-noise", 0.0), "ddpg_mve": ("--horizon", 2)}.get(name, ())
    module, agent = load(name), make_agent(name, *flags)
    apart(agent)
    calls, buffer = recorded(monkeypatch, module, "value_loss"), filled_buffer(module)
    pairs = recorded(monkeypatch, module, "tdk_loss") if name == "ddpg_mve" else []
    if name == "ddpg_mve":
        agent.update_deltas = lambda buffer, step: {}
    before = {
        part: copy.deepcopy(getattr(agent, part)) for part in ("actor_target", "critic_target", "critic")
    }
    torch.manual_seed(3)
    agent.update(buffer, 62)
    torch.manual_seed(3)
    batch, (_, target) = buffer[buffer.sample(16)], calls[0]
    assert 0 < batch.terminated.sum() < 16
    with torch.no_grad():
        for i in range(16):
            obs, rewards, inner = batch.next_obs[i : i + 1], [], []
            for _ in range(2 if name == "ddpg_mve" else 0):
                action = before["actor_target"](obs)
                inner.append((obs, action))
                prediction = agent.model(obs, action)
                obs, reward = obs + prediction[:, :1], prediction[0, 1].item()
                rewards.append(reward)
            action = before["actor_target"](obs)
            value = before["critic_target"](obs, action)[:, 0].min().item()
            remaining = []
            for reward in reversed(rewards):
                value = reward + 0.99 * value
                remaining.insert(0, value)
            expected = batch.reward[i] + 0.99 * (1 - batch.terminated[i]) * value
            assert target[i].item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-5)
            if name == "ddpg_mve":
                _, q, y, alive = pairs[0]
                assert y[:, i].tolist() == pytest.approx(remaining, rel=1e-4, abs=1e-5)
                at = [before["critic"](s, a)[0, 0].item() for s, a in inner]
                assert q[0, :, i].tolist() == pytest.approx(at, rel=1e-4, abs=1e-5)
                assert alive[:, i].tolist() == [1 - batch.terminated[i].item()] * 2


@pytest.mark.parametrize("name", ["ddpg", "td3"])
def test_slow_copies_follow_by_tau(name):
    module, agent = load(name), make_agent(name, "--tau", 0.1)
    buffer, parts = filled_buffer(module), (("actor_target", "actor"), ("critic_target", "critic"))
    before = {slow: [p.clone() for p in getattr(agent, slow).parameters()] for slow, _ in parts}
    agent.update(buffer, 62)
    for slow, fast in parts:
        pairs = zip(
            before[slow], getattr(agent, slow).parameters(), getattr(agent, fast).parameters(), strict=True
        )
        for old, new, online in pairs:
            assert torch.allclose(new, old + 0.1 * (online - old), atol=1e-7)


def test_td3_moves_actor_and_slow_copies_every_second_update():
    agent = make_agent("td3")
    buffer, moved = filled_buffer(td3), {"actor": 0, "actor_target": 0, "critic_target": 0, "critic": 0}
    for step in range(61, 71):
        before = {name: [p.clone() for p in getattr(agent, name).parameters()] for name in moved}
        agent.update(buffer, step)
        for name, old in before.items():
            moved[name] += any(
                not torch.equal(a, b) for a, b in zip(old, getattr(agent, name).parameters(), strict=True)
            )
    assert moved == {"actor": 5, "actor_target": 5, "critic_target": 5, "critic": 10}


# ---------------------------------------------------------------- noise


def test_smoothing_is_clipped_and_bounded():
    action, noise = torch.linspace(-1, 1, 101)[:, None], 3 * torch.randn(101, 1)
    found = td3.smoothed(action, noise, 0.5)
    assert found.abs().max() <= 1 and (found - action).abs().max() <= 0.5 + 1e-6
    assert torch.equal(td3.smoothed(action, torch.zeros(101, 1), 0.5), action)


@pytest.mark.parametrize("name", ["ddpg", "td3"])
def test_gaussian_exploration(name):
    """Deviation σ around the actor's action, within [−1, 1]; none when deterministic."""
    agent, obs = make_agent(name, "--exploration-noise", 0.1), np.float32([0.0])
    mean = agent.act(obs, deterministic=True)
    draws = np.array([agent.act(obs) for _ in range(2000)])
    assert abs(mean) < 0.5 and np.array_equal(mean, agent.act(obs, deterministic=True))
    assert draws.std() == pytest.approx(0.1, rel=0.1) and draws.mean() == pytest.approx(mean.item(), abs=0.02)
    loud = make_agent(name, "--exploration-noise", 9)
    assert max(abs(loud.act(obs)).item() for _ in range(50)) == 1


def test_parameter_noise_spares_layer_norms_and_adapts():
    """ξ₀ = σ / 2 / layers; distance held at 0: ξ grows by 1.01 at each of ten adaptations."""
    flags = ("--exploration", "parameter", "--layer-norm", "--exploration-noise", 0.3)
    agent = make_agent("ddpg", *flags)
    assert agent.noise_scale.item() == pytest.approx(0.05)
    agent.explore(torch.zeros(4, 1))
    moved = {
        n: not torch.equal(a, b)
        for (n, a), b in zip(agent.noisy_actor.named_parameters(), agent.actor.parameters(), strict=True)
    }
    assert all(value != name.startswith("norms") for name, value in moved.items())
    assert agent.noise_distance > 0
    agent.noise_distance.zero_()
    agent.noisy_actor.forward = agent.actor.forward
    for number in range(1, 501):
        agent.explore(torch.zeros(4, 1))
        if number % 50 == 0:
            agent.adapt()
    assert agent.noise_scale.item() == pytest.approx(0.05 * 1.01**10, rel=1e-5)


@pytest.mark.parametrize("name", ["ddpg", "ddpg_mve"])
def test_parameter_noise_adapts_every_50_updates(name):
    """With three updates in each step: in the steps of updates 50, 100, ..., after new noise."""
    agent, calls = make_agent(name, "--exploration", "parameter", "--updates-per-step", 3), []
    agent.update_deltas = agent.diagnose_model = lambda *inputs: {}
    explore = agent.explore
    agent.explore = lambda obs: (calls.append("noise"), explore(obs))[1]
    agent.adapt = lambda: calls.append("adapt")
    buffer = filled_buffer(load(name))
    for step in range(61, 111):
        agent.update(buffer, step)
    assert [i for i, call in enumerate(calls) if call == "adapt"] == [50, 101, 152]
    assert calls.count("noise") == 150


def test_distance_of_the_noise_is_a_mean_over_50_updates():
    """ξ grows where the summed distance is just below 50 σ, shrinks just above, and the sum starts anew."""
    agent = make_agent("ddpg", "--exploration", "parameter", "--exploration-noise", 0.3)
    for total, factor in ((14.99, 1.01), (15.01, 1 / 1.01)):
        agent.noise_scale.fill_(0.05), agent.noise_distance.fill_(total)
        agent.adapt()
        assert agent.noise_scale.item() == pytest.approx(0.05 * factor) and agent.noise_distance == 0


def test_parameter_noise_reaches_its_distance():
    """On fixed weights the actions come to move by about σ."""
    agent = make_agent(
        "ddpg", "--exploration", "parameter", "--exploration-noise", 0.2, "--layer-norm", "--hidden", 64
    )
    obs = torch.randn(256, 1)
    for number in range(1, 10_001):
        metrics = agent.explore(obs)
        if number % 50 == 0:
            agent.adapt()
    found = torch.stack([agent.explore(obs)["exploration/distance"] for _ in range(200)]).mean()
    assert 0.1 < found < 0.3 and metrics["exploration/noise"] > 0


# ---------------------------------------------------------------- rewards and model of DDPG-MVE


FULL = {
    "HalfCheetah-v5": {},
    "Swimmer-v5": {},
    "Walker2d-v5": {},
    "HalfCheetah-v5 ": {"frame_skip": 2, "ctrl_cost_weight": 0.5},
}
WHOLE = {"exclude_current_positions_from_observation": False}


@pytest.mark.parametrize("name", [*FULL, "experiments.tasks:mve/Walker2d-v0"])
def test_known_rewards_are_the_tasks(name):
    """1 000 random steps: float32 formulas agree with env.step up to rounding of the position over dt."""
    env = gym.make(name.strip(), **(FULL[name] | WHOLE if name in FULL else {}))
    formula, rows = mve.known_reward(env, torch.device("cpu")), []
    env.action_space.seed(0)
    obs, _ = env.reset(seed=0)
    for _ in range(1000):
        action = env.action_space.sample()
        next_obs, reward, terminated, _, _ = env.step(action)
        rows.append((next_obs - obs, action, next_obs, reward))
        obs = env.reset()[0] if terminated else next_obs
    delta, action, next_obs, reward = (np.array(x) for x in zip(*rows, strict=True))
    found = formula(*(torch.tensor(x) for x in (delta, action.astype(np.float64), next_obs)))
    assert np.allclose(found.numpy(), reward, atol=1e-6)


def test_imagined_walkers_are_paid_for_being_there_as_their_task_pays():
    """A fallen state: the paper's Walker2d pays its bonus of 1 all the same, Gymnasium's does not."""
    fallen, still = torch.tensor([[0.0, 0.3, 1.5] + [0.0] * 15]), torch.zeros(1, 6)
    found = {}
    for name, options in {"experiments.tasks:mve/Walker2d-v0": {}, "Walker2d-v5": WHOLE}.items():
        found[name[-2:]] = mve.known_reward(gym.make(name, **options), torch.device("cpu"))(
            torch.zeros(1, 18), still, fallen
        )
    assert found["v0"].item() == 1 and found["v5"].item() == 0


def test_a_reward_behind_wrappers_is_learned():
    """Scaled rewards, observations or actions are none of the formula's; a time limit changes nothing."""
    cheetah, wrapped = lambda: gym.make("HalfCheetah-v5", **WHOLE), gym.wrappers
    assert mve.known_reward(wrapped.TimeLimit(cheetah(), 7), torch.device("cpu"))
    assert mve.known_reward(mve.make_env("HalfCheetah-v5", json.dumps(WHOLE)), torch.device("cpu"))
    for env in (
        wrapped.TransformReward(cheetah(), lambda reward: 10 * reward),
        wrapped.TransformObservation(cheetah(), lambda obs: 0.1 * obs, None),
        wrapped.RescaleAction(cheetah(), -2, 2),
    ):
        assert mve.known_reward(env, torch.device("cpu")) is None


@pytest.mark.parametrize("name", ["HalfCheetah-v5", "Pendulum-v1", "Hopper-v5"])
def test_other_rewards_are_learned(name):
    assert mve.known_reward(gym.make(name), torch.device("cpu")) is None


def test_model_learns_a_linear_world():
    """δ = −0.1 s + 0.5 a and r = −s²: errors far below a deviation; H steps are those of the learned map."""
    agent = make_agent(
        "ddpg_mve", "--horizon", 2, "--model-hidden", 32, "--model-layers", 2, "--model-batch", 64
    )
    buffer = filled_buffer(mve, rows=400)
    agent.model.fit_normalizer(buffer[torch.arange(400)])
    for _ in range(1500):
        at = buffer.sample(64)
        metrics = agent.fit_deltas(buffer[at], (~mve.held_out(buffer.episode[at])).float())
    assert metrics["model/loss"] < 1e-2
    batch = buffer[torch.arange(400)]
    with torch.no_grad():
        next_obs, reward = agent.foresee(batch.obs, batch.action)
    assert (next_obs - batch.next_obs).abs().mean() < 0.05 and (reward - batch.reward).abs().mean() < 0.3


def test_rollouts_follow_the_slow_actor_and_the_model():
    agent = make_agent("ddpg_mve", "--horizon", 3)
    for p in agent.actor_target.parameters():
        p.data.add_(0.3)
    obs = torch.randn(5, 1)
    with torch.no_grad():
        found = agent.follow(obs)
        for t in range(3):
            assert torch.equal(found.action[t], agent.actor_target(found.obs[t]))
            next_obs, reward = agent.foresee(found.obs[t], found.action[t])
            assert torch.equal(found.obs[t + 1], next_obs) and torch.equal(found.reward[t], reward)
    assert len(found.obs) == len(found.action) == 4 and not torch.stack(found.done).any()


@pytest.mark.parametrize("layer_norm", [False, True])
def test_first_critic_alone_is_the_first_of_two(layer_norm):
    """members=1: value and gradient with respect to the action as with both; none to the weights."""
    critic = td3.QFunctions(2, [5, 8, 8, 1], layer_norm=layer_norm)
    obs, action = torch.randn(6, 3), torch.randn(6, 2, requires_grad=True)
    both, one = critic(obs, action, frozen=True)[0], critic(obs, action, frozen=True, members=1)
    assert one.shape == (1, 6) and torch.allclose(one[0], both, atol=1e-6)
    wanted, found = (torch.autograd.grad(q.square().sum(), action)[0] for q in (both, one))
    assert torch.allclose(wanted, found, atol=1e-6) and wanted.abs().sum() > 0
    one = critic(obs, action, frozen=True, members=1)
    one.sum().backward()
    assert all(parameter.grad is None for parameter in critic.parameters())


def test_preset_of_the_paper():
    """Feinberg et al. 2018, section 4 and released code; what is typed counts more."""
    paper = mve.parse(["--preset", "paper", "--tau", "0.02", "--model-updates", "1"])
    assert (paper.horizon, paper.hidden, paper.layer_norm, paper.batch_size) == (10, 64, True, 64)
    assert (paper.exploration, paper.exploration_noise) == ("parameter", 0.4)
    assert (paper.actor_lr, paper.critic_lr, paper.tau) == (1e-3, 1e-3, 0.02)
    assert (paper.updates_per_step, paper.model_updates, paper.normalize_every) == (4, 1, 100)
    assert mve.parse([]).hidden == 256 and mve.parse(["--preset=paper"]).tau == 0.01
    swimmer, walker = (
        mve.parse(["--preset", "paper", "--env-id", f"experiments.tasks:mve/{name}-v0"])
        for name in ("Swimmer", "Walker2d")
    )
    assert (swimmer.actor_lr, swimmer.critic_lr, swimmer.tau, swimmer.horizon) == (1e-4, 1e-3, 0.01, 10)
    assert (walker.actor_lr, walker.critic_lr, walker.tau, walker.horizon) == (1e-4, 1e-4, 1e-3, 3)


def test_signal_survives_eight_layers():
    """Glorot's weights, biases 0: outputs of a new model vary by 0.01 and more (by 0.0002 with PyTorch's)."""
    torch.manual_seed(0)
    model = mve.DeltaModel(17, 6, 8, 128)
    found = model(torch.randn(1000, 17), 2 * torch.rand(1000, 6) - 1)
    assert found.std(0).mean() > 0.01 and all((layer.bias == 0).all() for layer in model.layers)
