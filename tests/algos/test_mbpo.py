"""MBPO: rollouts and their book-keeping, the ensemble's loss and refit, elites, terminations, batches."""

import math

import gymnasium as gym
import numpy as np
import pytest
import torch

from tests.algos.test_math import filled_buffer, recorded
from tests.conftest import evaluations, load, long, run, scalars, tiny

mbpo, sac = load("mbpo"), load("sac")
TASKS = ["InvertedPendulum-v5", "InvertedDoublePendulum-v5", "Hopper-v5", "Walker2d-v5", "HalfCheetah-v5"]
TASKS += ["Ant-v5", "Humanoid-v5", *(f"experiments.tasks:mbpo/{n}-v0" for n in ("Ant", "Hopper", "Humanoid"))]
TASKS += [f"experiments.tasks:poplin/{n}-v0" for n in ("Hopper", "Walker2d", "Ant")]


def make_agent(obs_dim: int = 1, action_dim: int = 1, **changes):
    args = mbpo.parse(tiny("mbpo"))
    for name, value in changes.items():
        setattr(args, name, value)
    return mbpo.Agent(args, obs_dim, action_dim, torch.device("cpu"))


# ---------------------------------------------------------------- rollouts


@pytest.mark.parametrize(("epoch", "k"), [(0, 1), (20, 1), (29, 1), (30, 2), (85, 8), (150, 15), (400, 15)])
def test_schedule_of_hopper(epoch, k):
    assert mbpo.rollout_steps(epoch, 20, 150, 1, 15) == k


def test_settings_of_the_tasks():
    hopper = mbpo.parse(["--env-id", "Hopper-v5", "--preset", "released"])
    assert (hopper.updates_per_step, hopper.target_entropy, hopper.rollout_batch) == (20, -1.0, 100_000)
    assert (hopper.growth_starts, hopper.growth_ends, hopper.rollout_length_max) == (20, 150, 15)
    assert (hopper.model_layers, hopper.model_hidden, hopper.learning_starts) == (4, 200, 5_000)
    pendulum = mbpo.parse([])
    assert (pendulum.epoch_length, pendulum.target_entropy, pendulum.learning_starts) == (250, -0.05, 500)
    human = mbpo.parse(["--env-id", "experiments.tasks:mbpo/Humanoid-v0", "--preset", "released"])
    assert (human.model_interval, human.retain_epochs, human.rollout_length_max) == (1_000, 5, 25)
    assert mbpo.parse(["--env-id", "HalfCheetah-v5"]).updates_per_step == 10  # laptop
    assert mbpo.parse(["--env-id", "HalfCheetah-v5", "--preset", "released"]).updates_per_step == 40
    assert mbpo.parse(["--env-id", "Hopper-v5", "--updates-per-step", "3"]).updates_per_step == 3
    other = mbpo.parse(["--env-id", "Pusher-v5"])
    assert other.target_entropy is None and other.learning_starts == 1_000


@pytest.mark.parametrize(
    ("settings", "capacity"),
    [
        ({"rollout_batch": 100_000}, 400_000),
        ({"rollout_batch": 100_000, "rollout_length": 15, "rollout_length_max": 15}, 6_000_000),
        (
            {"rollout_batch": 100_000, "rollout_length": 25, "rollout_length_max": 25, "retain_epochs": 5}
            | {"model_interval": 1_000},
            12_500_000,
        ),
    ],
)
def test_capacity_of_the_imagined_replay(settings, capacity, monkeypatch):
    agent = make_agent(epoch_length=1_000, **{"model_interval": 250} | settings)
    assert agent.room(0)[1] == capacity
    seen = []
    monkeypatch.setattr(agent.imagined, "resize", lambda wanted: seen.append(wanted) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        agent.branch(filled_buffer(mbpo), 0)
    assert seen == [capacity]


def test_memory_is_asked_for_at_the_start(monkeypatch):
    """The largest imagined replay of the whole run, long before its rollouts grow to that; exit 2 from it."""
    flags = "--epoch-length 10 --model-interval 10 --rollout-batch 100 --rollout-length-max 11".split()
    flags += "--growth-starts 1 --growth-ends 11 --learning-starts 60 --total-timesteps 120".split()
    args = mbpo.parse([*tiny("mbpo"), *flags])  # 60 steps learn: the last epoch is 5, and k then
    env, agent = mbpo.make_env("Pendulum-v1"), mbpo.Agent(args, 3, 1, torch.device("cpu"))
    assert [agent.room(epoch) for epoch in (0, 2, 5)] == [(1, 100), (2, 200), (5, 500)]
    bytes_of_500 = 8 * 500 * (3 + 1 + 1 + 3 + 1) / 0.9
    monkeypatch.setattr(mbpo, "available_memory", lambda device: 1e9)
    agent.make_buffer(10, env)
    monkeypatch.setattr(mbpo, "available_memory", lambda device: 1.001 * bytes_of_500)
    agent.make_buffer(10, env)
    monkeypatch.setattr(mbpo, "available_memory", lambda device: 0.99 * bytes_of_500)
    with pytest.raises(mbpo.BadInput, match="--rollout-batch 100: must be such that the 500 transitions"):
        agent.make_buffer(10, env)
    agent.args.real_ratio = 1.0  # imagines nothing
    agent.make_buffer(10, env)


@pytest.mark.parametrize(("ended", "expected"), [(0.0, 4 * 50), (1.0, 50)])
def test_rollouts_are_counted(ended, expected):
    """Without ends k R transitions, with nothing but ends R."""
    agent = make_agent(rollout_batch=50, rollout_length=4, rollout_length_max=4)
    agent.rule = lambda obs: torch.full((len(obs),), ended)
    agent.branch(filled_buffer(mbpo), 0)
    assert agent.imagined.added == expected
    assert agent.refit_report[3:].tolist() == [4, expected, ended]
    assert (agent.imagined.rows[:expected, -1] == ended).all()


def test_rollouts_follow_the_policy_and_the_elites():
    """From replayed states, s of the next step is s' of this one for rows that live on; a reward per row."""
    agent, buffer = make_agent(rollout_batch=40, rollout_length=3, rollout_length_max=3), filled_buffer(mbpo)
    agent.rule = lambda obs: (obs[:, 0] > 0.5).float()
    agent.elites.step = lambda obs, action: (0.5 * obs + action, obs[:, 0] - action[:, 0])
    agent.branch(buffer, 0)
    batch = mbpo.Batch(
        *(
            x[..., 0] if x.shape[1] == 1 else x
            for x in agent.imagined.rows[: agent.imagined.added].split(1, 1)
        )
    )
    assert set(batch.obs[:40].tolist()) <= set(buffer.rows[:, 0].tolist())
    assert torch.allclose(batch.next_obs, 0.5 * batch.obs + batch.action)
    assert torch.allclose(batch.reward, batch.obs - batch.action)
    assert torch.equal(batch.terminated, (batch.next_obs > 0.5).float())
    alive = batch.next_obs[:40][batch.terminated[:40] == 0]
    assert torch.equal(batch.obs[40 : 40 + len(alive)], alive)
    assert batch.action.abs().max() <= 1 and batch.action.std() > 0.1


def test_imagined_ring():
    ring = mbpo.ImaginedReplay((1, 1, 1, 1, 1), torch.device("cpu"))

    def batch(first: int, count: int):
        column = torch.arange(first, first + count).float()
        return mbpo.Batch(column[:, None], column[:, None], column, column[:, None], column)

    ring.resize(10)
    ring.extend(batch(0, 6)), ring.extend(batch(6, 7))
    assert ring.in_order()[:, 0].tolist() == list(range(3, 13)) and ring.size == 10
    other = mbpo.ImaginedReplay((1, 1, 1, 1, 1), torch.device("cpu"))
    other.load_state_dict(ring.state_dict())
    assert torch.equal(other.rows, ring.rows) and other.added == ring.added
    ring.resize(4)
    assert ring.in_order()[:, 0].tolist() == [9, 10, 11, 12]
    ring.resize(8), ring.extend(batch(13, 2))
    assert ring.in_order()[:, 0].tolist() == [9, 10, 11, 12, 13, 14] and ring.size == 6
    drawn = ring.draw(500)
    assert set(drawn.reward.tolist()) == {9, 10, 11, 12, 13, 14} and drawn.obs.shape == (500, 1)


# ---------------------------------------------------------------- the ensemble


def test_bounds_of_the_variance():
    model = mbpo.GaussianEnsemble(1, 1, 1, 1, 4)
    last = model.layers[-1]
    for raw, expected in ((0.0, -0.474004), (1e3, 0.5000275), (-1e3, -10.0)):
        last.weight.data.zero_(), last.bias.data.fill_(raw)
        _, log_var = model(torch.zeros(1, 1, 1), torch.zeros(1, 1, 1))
        assert log_var.unique().item() == pytest.approx(expected, abs=1e-5)


def test_penalty_of_weights():
    """Ones of [7, m, n] with w contribute w ½ 7 m n."""
    model = mbpo.GaussianEnsemble(7, 2, 1, 4, 5)
    for layer in model.layers:
        layer.weight.data.fill_(1.0)
    sizes = [layer.weight[0].numel() for layer in model.layers]
    expected = sum(w * 0.5 * 7 * n for w, n in zip([2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4], sizes, strict=True))
    assert mbpo.penalty(model).item() == pytest.approx(expected)
    short = mbpo.GaussianEnsemble(1, 2, 1, 1, 5)
    for layer in short.layers:
        layer.weight.data.fill_(1.0)
    sizes = [layer.weight[0].numel() for layer in short.layers]
    assert mbpo.penalty(short).item() == pytest.approx(0.5 * (2.5e-5 * sizes[0] + 1e-4 * sizes[1]))


@pytest.mark.parametrize(("error", "expected"), [(0.0, 0.0), (1.0, 1.0)])
def test_loss_by_hand(error, expected, monkeypatch):
    """log σ² = 0: no residual 0, a residual of 1 everywhere 1 for each member; bounds and penalty beside."""
    model = mbpo.GaussianEnsemble(3, 2, 1, 1, 4)
    zero = torch.zeros(3, 5, 3)
    model.forward = lambda obs, action: (zero, zero)
    rest = 0.01 * (model.max_log_var - model.min_log_var).sum() + mbpo.penalty(model)
    loss = mbpo.ensemble_loss(model, torch.zeros(3, 5, 2), torch.zeros(3, 5, 1), zero + error) - rest
    assert loss.item() == pytest.approx(3 * expected, abs=1e-4)


def test_best_variance_is_the_squared_error():
    """min over lv of e² exp(−lv) + lv is at log e²."""
    lv = torch.linspace(-4, 4, 80_001, dtype=torch.float64).view(1, -1, 1)
    error = torch.full_like(lv, 0.7)
    loss = mbpo.gaussian_nll(torch.zeros_like(lv), lv, error)[0]
    assert lv[0, loss.argmin(), 0].item() == pytest.approx(math.log(0.49), abs=1e-3)
    assert loss.min().item() == pytest.approx(1 + math.log(0.49), abs=1e-6)


def test_members_learn_from_bootstraps_of_their_own(monkeypatch):
    """Rows with replacement, 63 % of them distinct, another multiset for each; held-out ones in none."""
    agent, seen = make_agent(members=3, elites=2, batch_size=50, refit_steps=64), []
    original = mbpo.ensemble_loss
    monkeypatch.setattr(mbpo, "ensemble_loss", lambda *a: (seen.append(a[1][..., 0]), original(*a))[1])
    buffer = filled_buffer(mbpo, rows=2_000)
    agent.rule = lambda obs: obs[:, 0]
    agent.refit(buffer)
    first, second = torch.cat(seen[: len(seen) // 2], 1), torch.cat(seen[len(seen) // 2 :], 1)
    assert first.shape == (3, 1_600)
    for e in range(3):
        assert len(first[e].unique()) / 1_600 == pytest.approx(0.632, abs=0.04)
        assert torch.equal(first[e].sort()[0], second[e].sort()[0]) and not torch.equal(first[e], second[e])
    assert not torch.equal(first[0].sort()[0], first[1].sort()[0])
    used = set(first.unique().tolist()) | set(second.unique().tolist())
    assert len(set(buffer.rows[:, 0].tolist()) - used) >= 400


def test_gradient_of_a_member_is_its_own():
    model = mbpo.GaussianEnsemble(3, 1, 1, 1, 4)
    mean, log_var = model(torch.randn(3, 6, 1), torch.randn(3, 6, 1))
    mbpo.gaussian_nll(mean, log_var, torch.randn(3, 6, 2))[1].sum().backward()
    for layer in model.layers:
        assert [bool(layer.weight.grad[e].abs().sum() > 0) for e in range(3)] == [False, True, False]
    assert model.max_log_var.grad.abs().sum() > 0


def test_a_row_that_a_member_never_draws_never_moves_it(monkeypatch):
    """With the shared bounds frozen, the target of a row in one bootstrap alone changes that member alone."""

    def refitted(shift: float):
        torch.manual_seed(3)
        agent = make_agent(members=2, elites=1, batch_size=20, refit_steps=1)
        agent.rule = lambda obs: obs[:, 0]
        agent.model.max_log_var.requires_grad_(False), agent.model.min_log_var.requires_grad_(False)
        agent.held_out_errors = lambda held: torch.tensor([1.0, 1.0])
        seen, draw = [], torch.randint

        def bootstraps(high, size, **kwargs):
            rows = draw(high, size, **kwargs)
            rows[0][rows[0] == 7] = 8
            rows[1, 0] = 7
            return (seen.append(rows), rows)[1]

        monkeypatch.setattr(mbpo.torch, "randint", bootstraps)
        buffer = filled_buffer(mbpo)
        order = torch.randperm(buffer.size)
        monkeypatch.setattr(mbpo.torch, "randperm", lambda n, device=None: order)
        buffer.rows[order[buffer.size // 5 + 7], 2] += shift  # its reward
        agent.refit(buffer)
        monkeypatch.undo()
        assert len(seen) == 1 and 7 not in seen[0][0] and 7 in seen[0][1]
        return [layer.weight.detach() for layer in agent.model.layers]

    for before, after in zip(refitted(0.0), refitted(5.0), strict=True):
        assert torch.equal(before[0], after[0]) and not torch.equal(before[1], after[1])


def scripted(agent, errors: list[list[float]], monkeypatch):
    """A refit in which every epoch adds 1 to a bias of each member and the held-out errors are given."""
    left, bias = list(errors), agent.model.layers[0].bias
    bias.data.zero_()
    monkeypatch.setattr(mbpo, "ensemble_loss", lambda *a: -agent.model.layers[0].bias.sum())
    agent.model_optimizer = torch.optim.SGD([bias], lr=1.0)
    agent.held_out_errors = lambda held: torch.tensor(left.pop(0) if len(left) > 1 else left[0])
    agent.rule = lambda obs: obs[:, 0]
    return left


def test_refit_stops_after_six_epochs_without_one_percent(monkeypatch):
    agent = make_agent(members=1, elites=1, batch_size=1_000, refit_steps=100)
    scripted(agent, [[x] for x in (1, 0.995, 0.992, 0.9905, 0.9902, 0.99015, 0.99012, 5, 5)], monkeypatch)
    agent.refit(filled_buffer(mbpo))
    assert agent.refit_report[2] == 7  # epochs
    assert agent.model.layers[0].bias.unique().item() == 1  # the first one's weights


@pytest.mark.parametrize(("limit", "epochs"), [(1, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_refit_begins_no_epoch_after_its_steps(limit, epochs, monkeypatch):
    agent = make_agent(members=1, elites=1, batch_size=50, refit_steps=limit)  # 4 steps an epoch
    scripted(agent, [[1 / k] for k in range(1, 20)], monkeypatch)
    agent.refit(filled_buffer(mbpo))
    assert agent.refit_report[2] == epochs


def test_each_member_keeps_its_own_best(monkeypatch):
    agent = make_agent(members=2, elites=2, batch_size=1_000, refit_steps=3)
    scripted(agent, [[3.0, 3.0], [2.0, 4.0], [5.0, 1.0], [2.0, 1.0]], monkeypatch)
    agent.refit(filled_buffer(mbpo))
    assert agent.model.layers[0].bias[:, 0, 0].tolist() == [2, 3]


def test_elites_are_the_best_and_alone_imagine(monkeypatch):
    """Errors 5, 1, 4, 2, 3, 7, 6: members 1, 3, 4, 2, 0; the others' weights are NaN and never used."""
    agent = make_agent(members=7, elites=5, batch_size=1_000, refit_steps=1)
    scripted(agent, [[5.0, 1, 4, 2, 3, 7, 6]] * 3, monkeypatch)
    for layer in agent.model.layers:
        layer.weight.data[5:] = math.nan
    chosen, original = [], agent.choose_elites
    agent.choose_elites = lambda places: (chosen.append(places.tolist()), original(places))[1]
    agent.refit(filled_buffer(mbpo))
    assert chosen == [[1, 3, 4, 2, 0]]
    next_obs, reward = agent.elites.step(torch.randn(200, 1), torch.randn(200, 1))
    assert next_obs.isfinite().all() and reward.isfinite().all()
    for layer, source in zip(agent.elites.layers, agent.model.layers, strict=True):
        assert torch.equal(layer.weight, source.weight[[1, 3, 4, 2, 0]])
    assert torch.equal(agent.elites.mean, agent.model.mean)


def test_held_out_errors_by_hand():
    agent, buffer = make_agent(members=2, elites=1), filled_buffer(mbpo)
    batch = buffer[torch.arange(30)]
    found = agent.held_out_errors(batch)
    for e in range(2):
        mean = agent.model(batch.obs.expand(2, -1, -1), batch.action.expand(2, -1, -1))[0][e]
        expected = (
            (mean[:, :1] + batch.obs - batch.next_obs).square().sum()
            + (mean[:, 1] - batch.reward).square().sum()
        ) / 60
        assert found[e].item() == pytest.approx(expected.item(), rel=1e-5)


def test_scaler_of_a_constant_column():
    model = mbpo.GaussianEnsemble(1, 2, 1, 1, 4)
    model.fit_normalizer(torch.cat([torch.full((100_000, 1), 0.45), torch.randn(100_000, 1)], 1))
    assert model.std[0] == 1 and model.std[1].item() == pytest.approx(1, abs=0.01)


def test_refit_learns_a_linear_world():
    """s' = 0.9 s + 0.5 a: the mean is found to a hundredth of its spread."""
    agent = make_agent(members=3, elites=2, batch_size=64, refit_steps=780, model_hidden=32)
    buffer = filled_buffer(mbpo, rows=1_000)
    agent.rule = lambda obs: torch.zeros(len(obs))
    agent.refit(buffer)
    batch = buffer[torch.arange(200)]
    next_obs, _ = agent.elites.step(batch.obs, batch.action, noise=False)
    assert (next_obs - batch.next_obs).square().mean().sqrt() < 0.1
    assert agent.refit_report[0] <= agent.refit_report[1]


# ---------------------------------------------------------------- batches and schedule


@pytest.mark.parametrize(("ratio", "real"), [(0.05, 12), (0.0, 0), (0.5, 128), (1.0, 256)])
def test_split_of_a_batch(ratio, real, monkeypatch):
    agent = make_agent(
        real_ratio=ratio, batch_size=256, updates_per_step=2, members=2, elites=1, refit_steps=1
    )
    agent.args.rollout_batch, agent.rule = 60, lambda obs: torch.zeros(len(obs))
    seen = []
    agent.learn = lambda batch: seen.append(batch) or {}
    buffer, called = filled_buffer(mbpo), []
    monkeypatch.setattr(agent, "refit", lambda b: called.append(b))
    agent.update(buffer, 61)
    known = set(buffer.rows[:, 0].tolist())
    assert len(seen) == 2 and all(len(b.obs) == 256 for b in seen)
    imagined = set(agent.imagined.rows[: agent.imagined.size, 3].tolist()) if agent.imagined.added else set()
    assert all(x in set(buffer.rows[:, 3].tolist()) for x in seen[0].next_obs[:real, 0].tolist())
    assert all(x in imagined for x in seen[0].next_obs[real:, 0].tolist())
    assert known and bool(called) == (real < 256)


def test_all_real_is_sac(tmp_path):
    """--real-ratio 1 with one update per step ends in sac.py's critics, to the bit."""
    agent = make_agent(real_ratio=1.0, updates_per_step=1)
    parent = sac.Agent(
        sac.parse(tiny("sac", "--target-entropy", agent.target_entropy)), 1, 1, torch.device("cpu")
    )
    for name in ("actor", "critic", "critic_target"):
        getattr(parent, name).load_state_dict(getattr(agent, name).state_dict())
    for step in (61, 62, 63):
        for one, module in ((agent, mbpo), (parent, sac)):
            torch.manual_seed(step)
            one.update(filled_buffer(module), step)
    for a, b in zip(agent.critic.parameters(), parent.critic.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(agent.log_alpha, parent.log_alpha) and agent.imagined.added == 0


def test_refits_come_at_their_interval(monkeypatch):
    agent, calls = make_agent(model_interval=25, epoch_length=50, updates_per_step=1), []
    monkeypatch.setattr(agent, "refit", lambda buffer: calls.append("refit"))
    branch = agent.branch
    monkeypatch.setattr(agent, "branch", lambda buffer, epoch: (calls.append(epoch), branch(buffer, epoch)))
    agent.rule = lambda obs: torch.zeros(len(obs))
    agent.args.rollout_batch, buffer = 20, filled_buffer(mbpo)
    for step in range(61, 61 + 101):
        agent.update(buffer, step)
    assert calls == ["refit", 0, "refit", 0, "refit", 1, "refit", 1, "refit", 2]


def test_sac_target():
    """r = 1, γ = 0.99, min Q̄ = 10, α = 0.2, log π = −1: 11.098, and 1 where it ended."""
    one = torch.ones(1, dtype=torch.float64)
    for done, expected in ((0.0, 11.098), (1.0, 1.0)):
        found = mbpo.soft_target(one, done * one, 10 * one, -one, 0.2 * one, 0.99)
        assert found.item() == pytest.approx(expected)


def test_gradients_of_the_agent_stay_out_of_the_model(monkeypatch):
    agent, losses = (
        make_agent(updates_per_step=1, members=2, elites=1),
        recorded(monkeypatch, mbpo, "twin_loss"),
    )
    agent.rule = lambda obs: torch.zeros(len(obs))
    agent.args.rollout_batch = 30
    agent.update(filled_buffer(mbpo), 61)
    assert not losses[0][1].requires_grad
    assert all(p.grad is None for p in agent.elites.parameters())
    assert not any(x.requires_grad for x in agent.imagined.draw(5))


# ---------------------------------------------------------------- terminations


@pytest.mark.parametrize("env_id", TASKS)
def test_rules_are_the_tasks_own(env_id):
    """1 500 random steps; the double pendulum's tip lags its angles, so one borderline step may differ."""
    env = mbpo.make_env(env_id)
    rule, seen, ended, rng = mbpo.known_termination(env), [], [], np.random.default_rng(0)
    obs, _ = env.reset(seed=1)
    for _ in range(1_500):
        obs, _, terminated, truncated, _ = env.step(
            rng.uniform(-1, 1, env.action_space.shape).astype(np.float32)
        )
        seen.append(np.float32(obs))
        ended.append(float(terminated))
        if terminated or truncated:
            env.reset()
    found = rule(torch.from_numpy(np.stack(seen)))
    wrong = int((found != torch.tensor(ended)).sum())
    assert wrong <= (1 if "Double" in env_id else 0)
    assert (sum(ended) > 3) == (env_id != "HalfCheetah-v5" and "poplin" not in env_id)


def test_rules_by_hand():
    rule = mbpo.known_termination(gym.make("Hopper-v5"))
    obs = torch.zeros(5, 11)
    obs[:, 0] = 1.25
    obs[1, 0], obs[2, 1], obs[3, 7], obs[4, 3] = 0.7, -0.2, -100.0, math.nan
    assert rule(obs).tolist() == [0, 1, 1, 1, 1]
    assert mbpo.known_termination(gym.make("Pusher-v5")) is None
    assert mbpo.known_termination(gym.make("Hopper-v5", healthy_z_range=(0.5, 2.0))) is None
    moved = gym.make("Hopper-v5", exclude_current_positions_from_observation=False)
    assert mbpo.known_termination(moved) is None  # other columns
    assert mbpo.known_termination(gym.make("Hopper-v5", healthy_state_range=(-5.0, 5.0))) is None


def test_no_rule_behind_a_wrapper_that_may_break_it():
    """Scaled observations and ends of the wrapper's own are unknown; actions, rewards and limits are not."""

    class EndsByItself(gym.Wrapper):
        def step(self, action):
            obs, reward, terminated, truncated, info = self.env.step(action)
            return obs, reward, terminated or bool(obs[1] > 1), truncated, info

    wrapped = gym.wrappers
    known = [wrapped.RescaleAction(gym.make("Hopper-v5"), -1, 1), gym.make("Hopper-v5", max_episode_steps=5)]
    known += [wrapped.TransformReward(gym.make("Hopper-v5"), float)]
    unknown = [wrapped.NormalizeObservation(gym.make("Hopper-v5")), EndsByItself(gym.make("HalfCheetah-v5"))]
    assert all(mbpo.known_termination(env) for env in known)
    assert not any(mbpo.known_termination(env) for env in unknown)


def test_unknown_terminations_are_learned(tmp_path):
    torch.manual_seed(0)
    agent, buffer = (
        make_agent(members=2, elites=1, refit_steps=800, model_lr=3e-3),
        mbpo.ReplayBuffer(400, 1, 1, torch.device("cpu")),
    )
    obs, action = 2 * torch.rand(400) - 1, 2 * torch.rand(400) - 1
    after = obs + action
    buffer.rows[:] = torch.stack([obs, action, 0 * obs, after, (after.abs() > 1).float()], 1)
    buffer.added = 400
    agent.refit(buffer)
    logit = agent.predict_termination(obs[:, None], action[:, None], after[:, None])
    assert ((logit > 0).float() == (after.abs() > 1).float()).float().mean() > 0.9
    folder = run("mbpo", tmp_path)  # a task without a rule
    assert "termination" in torch.load(folder / "final.pt", weights_only=True)["agent"]


# ---------------------------------------------------------------- runs


def test_what_is_logged(tmp_path):
    found = scalars(run("mbpo", tmp_path))
    for name in ("smallest_error", "largest_error", "epochs", "rollout_length", "imagined", "ended"):
        assert len(found[f"model/{name}"]) == 12, name


@long
def test_learns_the_linear_quadratic_task(tmp_path):
    """From −155 to above −6 in 1 500 steps, half of what sac.py is given."""
    flags = "--env-id tests.tasks:LQR-v0 --total-timesteps 1500 --eval-every 1500 --batch-size 64 --hidden 64"
    flags += (
        " --learning-starts 300 --num-threads 1 --device cpu --actor-lr 1e-3 --critic-lr 1e-3 --alpha-lr 1e-3"
    )
    flags += " --updates-per-step 4 --members 3 --elites 2 --model-hidden 32 --rollout-batch 1000"
    flags += f" --model-interval 100 --runs-dir {tmp_path}"
    returns = [float(row[1]) for row in evaluations(mbpo.train(mbpo.parse(flags.split())))[1:]]
    assert returns[0] < -20 and returns[-1] > -6


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--members", "3", "--elites", "4"], "--elites 4: must be at most --members 3"),
        (["--rollout-length", "4", "--rollout-length-max", "2"], "--rollout-length-max 2: must be at least"),
        (["--growth-starts", "20", "--growth-ends", "20"], "--growth-ends 20: must be above"),
        (["--learning-starts", "4", "--batch-size", "4"], "--learning-starts 4: must be at least 5"),
        (["--real-ratio", "1.5"], "--real-ratio 1.5: must be in [0, 1]"),
    ],
)
def test_contradictions_are_refused(flags, text):
    with pytest.raises(mbpo.BadInput) as error:
        mbpo.parse([*tiny("mbpo"), *flags])
    assert text in str(error.value)
