"""MAGE: closed forms of its losses, the held target gradient against the full one, cadence, gradients."""

import pytest
import torch

from tests.algos.test_math import filled_buffer, recorded
from tests.conftest import evaluations, load, long, run, scalars, tiny

mage, td3 = load("mage"), load("td3")
D = torch.float64


def make_agent(obs_dim: int = 1, action_dim: int = 1, **changes):
    args = mage.parse(tiny("mage"))
    for name, value in changes.items():
        setattr(args, name, value)
    return mage.Agent(args, obs_dim, action_dim, torch.device("cpu"))


def test_huber():
    x = torch.tensor([0.0, 0.4, -0.4, 1.0, 2.6, -2.6], dtype=D)
    assert mage.huber(x).tolist() == pytest.approx([0, 0.08, 0.08, 0.5, 2.1, 2.1])


def toy(a: torch.Tensor, detached: bool = False) -> torch.Tensor:
    """∇_a δ of s' = s + b a, r = −a², Q̄ = c s', Q = q a with b = 0.5, c = 2, γ = 0.9, q = 0.7."""
    a = a.clone().requires_grad_()
    s = 0.3 + 0.5 * (a.detach() if detached else a)
    target = mage.td_target(-(a**2), torch.zeros_like(a), 2 * s, 0.9)
    (wanted,) = torch.autograd.grad(target.sum(), a)
    return wanted - 0.7


def test_action_gradient_of_the_linear_toy():
    """−2a + γbc − q: 0 .4 below zero at 0.3, 2.6 above at −1.2; Huber's mean 1.09; no model, no γbc."""
    a = torch.tensor([0.3, -1.2], dtype=D)
    error = toy(a)
    assert error.tolist() == pytest.approx([-0.4, 2.6])
    both = error[None, :, None].expand(2, -1, -1)
    assert mage.action_gradient_loss(both).item() == pytest.approx(1.09, abs=1e-6)  # ½ of two critics
    assert toy(a, detached=True).tolist() == pytest.approx((-2 * a - 0.7).tolist())


def test_huber_is_of_the_norm_and_zero_has_a_gradient():
    error = torch.tensor([[[3.0, 4.0]], [[0.3, 0.4]]], dtype=D)
    assert mage.action_gradient_loss(error).item() == pytest.approx(0.5 * (4.5 + 0.125), abs=1e-6)
    zero = torch.zeros(2, 1, 2, dtype=D, requires_grad=True)
    mage.action_gradient_loss(zero).backward()
    assert torch.equal(zero.grad, torch.zeros_like(zero))


def test_temporal_difference_loss():
    q, y = torch.tensor([[1.0, 4.0], [0.0, 0.0]], dtype=D), torch.tensor([1.5, 1.0], dtype=D)
    expected = 0.5 * ((0.125 + 2.5) / 2 + (1.0 + 0.5) / 2)
    assert mage.temporal_difference_loss(q, y).item() == pytest.approx(expected)


def smooth_agent(**changes):
    agent = make_agent(3, 2, **changes)
    for module in (agent.critic_target, agent.actor_target):
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    agent.termination.layers[2].bias.data.fill_(-100.0)
    return agent


def test_held_target_gradient_equals_the_full_double_backward():
    """The same gradient for every weight of the critics as differentiating δ through the model twice."""
    agent, obs = smooth_agent(), torch.randn(32, 3)
    action = agent.actor(agent.model.normalize(obs))
    torch.manual_seed(3)
    loss, _ = agent.critic_loss(obs, action)
    cheap = torch.autograd.grad(loss, list(agent.critic.parameters()))
    torch.manual_seed(3)
    a = action.detach().requires_grad_()
    target, seen, total = agent.imagined_target(obs, a), agent.model.normalize(obs), 0.0
    for k in range(2):
        delta = target - agent.critic(seen, a)[k]
        (slope,) = torch.autograd.grad(delta.sum(), a, create_graph=True)
        norm = (slope.square().sum(1) + 1e-12).sqrt()
        total = total + 0.5 * 5 * mage.huber(norm).mean()
        total = total + 0.5 * mage.huber(target.detach() - agent.critic(seen, a)[k]).mean()
    assert loss.item() == pytest.approx(total.item(), rel=1e-5)
    full = torch.autograd.grad(total, list(agent.critic.parameters()))
    for one, two in zip(cheap, full, strict=True):
        assert torch.allclose(one, two, rtol=1e-4, atol=1e-7)


def test_target_gradient_by_finite_differences():
    """Through model, reward, slow critics and slow actor."""
    agent, obs = smooth_agent(), torch.randn(8, 3)
    for part in (agent.model, agent.critic_target, agent.actor_target, agent.termination):
        part.double()
    agent.model.mean, agent.model.std = agent.model.mean.double(), agent.model.std.double()
    obs, action = obs.double(), torch.rand(8, 2, dtype=D, requires_grad=True)

    def target(a):
        torch.manual_seed(5)
        return agent.imagined_target(obs, a)

    (slope,) = torch.autograd.grad(target(action).sum(), action)
    for d in range(2):
        step = 1e-6 * torch.eye(2, dtype=D)[d]
        numeric = (target(action + step) - target(action - step)) / 2e-6
        assert torch.allclose(slope[:, d], numeric, rtol=1e-4, atol=1e-7)
    assert slope.abs().min() > 0


def test_an_ended_step_has_the_gradient_of_its_reward_alone():
    agent, obs = smooth_agent(), torch.randn(8, 3)
    agent.termination.layers[2].bias.data.fill_(100.0)
    action = torch.rand(8, 2, requires_grad=True)
    torch.manual_seed(5)
    target = agent.imagined_target(obs, action)
    torch.manual_seed(5)
    _, reward = agent.model.step(obs, action)
    assert torch.allclose(target, reward)
    expected = torch.autograd.grad(reward.sum(), action)[0]
    assert torch.allclose(torch.autograd.grad(target.sum(), action)[0], expected)


def test_only_critics_learn_from_the_critic_loss():
    agent, obs = smooth_agent(), torch.randn(16, 3)
    action = agent.actor(agent.model.normalize(obs))
    loss, _ = agent.critic_loss(obs, action)
    loss.backward()
    assert all(p.grad is not None for p in list(agent.critic.parameters())[:-1])
    for part in (agent.actor, agent.model, agent.termination, agent.actor_target, agent.critic_target):
        assert all(p.grad is None for p in part.parameters())
    assert all(p.requires_grad for p in agent.model.parameters())


def test_actor_climbs_the_smaller_critic(monkeypatch):
    """One critic lies 100 above the other: loss and gradient are those of the lower one alone."""
    agent, buffer = make_agent(updates_per_step=1, policy_delay=1, gradient_clip=1e9), filled_buffer(mage)
    agent.update_model = lambda *a: {}
    for optimizer in (agent.critic_optimizer, agent.actor_optimizer):
        monkeypatch.setattr(optimizer, "step", lambda: None)
    with torch.no_grad():
        agent.critic.layers[-1].bias[0] += 100
    torch.manual_seed(1)
    agent.update(buffer, 61)
    found = [p.grad.clone() for p in agent.actor.parameters()]
    torch.manual_seed(1)
    seen = agent.model.normalize(buffer[buffer.sample(16)].obs)
    loss = -agent.critic(seen, agent.actor(seen))[1].mean()
    assert agent.actor_loss.item() == pytest.approx(loss.item(), rel=1e-5)
    expected = torch.autograd.grad(loss, list(agent.actor.parameters()))
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(found, expected, strict=True))


def test_critic_constant_is_free_without_the_error_term():
    """w = 0: adding a function of s to the critics changes nothing; with w it does."""
    for weight, same in ((0.0, True), (1.0, False)):
        agent, obs = smooth_agent(td_weight=weight), torch.randn(16, 3)
        action = agent.actor(agent.model.normalize(obs))
        torch.manual_seed(2)
        first = agent.critic_loss(obs, action)[0].item()
        agent.critic.layers[-1].bias.data.add_(7.0)
        torch.manual_seed(2)
        assert (agent.critic_loss(obs, action)[0].item() == pytest.approx(first, rel=1e-6)) == same


def test_without_gradient_weight_it_is_dyna(monkeypatch):
    """The loss is Huber's of the error; no gradient of the target is taken."""
    agent, obs = smooth_agent(grad_weight=0.0), torch.randn(16, 3)
    action = agent.actor(agent.model.normalize(obs))
    torch.manual_seed(2)
    loss, metrics = agent.critic_loss(obs, action)
    torch.manual_seed(2)
    target = agent.imagined_target(obs, action.detach())
    assert not target.requires_grad and "losses/action_gradient_error" not in metrics
    expected = mage.temporal_difference_loss(
        agent.critic(agent.model.normalize(obs), action.detach()), target
    )
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_weights_scale_the_loss():
    losses = []
    for scale in (1, 2):
        torch.manual_seed(0)
        agent, obs = smooth_agent(grad_weight=5.0 * scale, td_weight=1.0 * scale), torch.randn(16, 3)
        losses.append(agent.critic_loss(obs, agent.actor(agent.model.normalize(obs)))[0].item())
    assert losses[1] == pytest.approx(2 * losses[0], rel=1e-5)


def test_critics_and_actor_learn_from_their_own_loss_alone(monkeypatch):
    """No gradient is left over: of (2) in the actor, of (3) in the critics, of the update before."""
    agent, buffer = make_agent(policy_delay=1, updates_per_step=1, gradient_clip=1e9), filled_buffer(mage)
    agent.update_model = lambda *a: {}
    for step in (61, 62):
        for optimizer in (agent.critic_optimizer, agent.actor_optimizer):
            monkeypatch.setattr(optimizer, "step", lambda: None)  # the weights stay, so do the gradients
        torch.manual_seed(step)
        agent.update(buffer, step)
        found = [p.grad.clone() for p in [*agent.critic.parameters(), *agent.actor.parameters()]]
        torch.manual_seed(step)
        obs = buffer[buffer.sample(agent.args.batch_size)].obs
        seen = agent.model.normalize(obs)
        loss, _ = agent.critic_loss(obs, agent.actor(seen))
        expected = torch.autograd.grad(loss, list(agent.critic.parameters()))
        climb = -agent.critic(seen, agent.actor(seen)).amin(0).mean()
        expected += torch.autograd.grad(climb, list(agent.actor.parameters()))
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, expected, strict=True))


def test_without_gradient_weight_critics_learn_as_in_td3():
    """The gradient of Huber TD3 on what the model imagines, to the last bit."""
    agent, obs = smooth_agent(grad_weight=0.0), torch.randn(16, 3)
    action = agent.actor(agent.model.normalize(obs)).detach()
    torch.manual_seed(2)
    found = torch.autograd.grad(agent.critic_loss(obs, action)[0], list(agent.critic.parameters()))
    torch.manual_seed(2)
    with torch.no_grad():
        next_obs, reward = agent.model.step(obs, action)
        ended = (agent.predict_termination(obs, action, next_obs) > 0).float()
        seen = agent.model.normalize(next_obs)
        noise = (0.2 * torch.randn_like(action)).clamp(-0.5, 0.5)
        next_action = (agent.actor_target(seen) + noise).clamp(-1, 1)
        target = reward + 0.99 * (1 - ended) * agent.critic_target(seen, next_action).amin(0)
    q = agent.critic(agent.model.normalize(obs), action.expand(2, -1, -1))
    loss = 0.5 * torch.nn.functional.huber_loss(q, target.expand(2, -1), reduction="none").mean(1).sum()
    expected = torch.autograd.grad(loss, list(agent.critic.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_model_warms_up_once():
    for model_updates, later in ((3, 3), (0, 1)):  # 0: one for each 32 768 stored transitions
        agent, fits = make_agent(model_updates=model_updates, model_warm_up=7), []
        agent.fit_model = lambda batch, weight, fits=fits: fits.append(1) or {}
        agent.update_model(filled_buffer(mage), agent.args.learning_starts + 1)
        assert len(fits) == later + 7
        agent.update_model(filled_buffer(mage), agent.args.learning_starts + 2)
        assert len(fits) == 2 * later + 7


def test_cadence(monkeypatch):
    """After four updates the slow critics moved four times, actor and slow actor twice."""
    agent, moved = make_agent(updates_per_step=4), recorded(monkeypatch, mage, "polyak")
    agent.update(filled_buffer(mage), 61)
    names = ["critic" if source is agent.critic else "actor" for _, source, _ in moved]
    assert names.count("critic") == 4 and names.count("actor") == 2
    assert names == ["critic", "actor", "critic", "critic", "actor", "critic"]


def test_gradients_are_clipped_by_element():
    agent = make_agent(gradient_clip=1e-8, updates_per_step=1, policy_delay=1)
    agent.update(filled_buffer(mage), 61)
    for part in (agent.actor, agent.critic):
        sizes = torch.cat([p.grad.abs().flatten() for p in part.parameters() if p.grad is not None])
        assert sizes.max() <= 1.001e-8 and (sizes > 0.999e-8).float().mean() > 0.3  # not the norm


def test_networks_are_smooth_and_see_normalised_observations():
    agent = make_agent(2, 1)
    agent.model.mean.fill_(5.0), agent.model.std.fill_(2.0)
    obs = torch.tensor([[7.0, 3.0]])
    expected = agent.actor(torch.tensor([[1.0, -1.0]]))
    assert torch.allclose(torch.from_numpy(agent.act(obs[0].numpy(), deterministic=True)), expected[0])
    action = torch.zeros(2, 1, 1, requires_grad=True)
    (slope,) = torch.autograd.grad(agent.critic(obs, action).sum(), action, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), action)
    assert curvature.abs().min() > 0  # a ReLU has none


def test_stacked_critics_are_two_networks():
    """Gradients in an action of its own for each: none crosses."""
    critic = mage.SmoothQFunctions(2, [3, 8, 1])
    actions = torch.randn(2, 5, 1, requires_grad=True)
    q = critic(torch.randn(5, 2), actions)
    (slope,) = torch.autograd.grad(q[0].sum(), actions)
    assert slope[0].abs().sum() > 0 and slope[1].abs().sum() == 0


def test_what_is_logged(tmp_path):
    found = scalars(run("mage", tmp_path))
    for tag in ("losses/action_gradient_error", "losses/actor_loss", "model/loss", "model/termination_loss"):
        assert len(found[tag]) == 12


@long
def test_learns_the_linear_quadratic_task(tmp_path):
    flags = "--env-id tests.tasks:LQR-v0 --total-timesteps 1500 --eval-every 1500 --batch-size 64 --hidden 64"
    flags += " --learning-starts 500 --num-threads 1 --device cpu --actor-lr 1e-3 --critic-lr 1e-3"
    flags += f" --updates-per-step 2 --model-updates 1 --members 2 --model-hidden 64 --runs-dir {tmp_path}"
    returns = [float(row[1]) for row in evaluations(mage.train(mage.parse(flags.split())))[1:]]
    assert returns[0] < -20 and returns[-1] > -6


def test_nothing_to_learn_is_refused():
    with pytest.raises(mage.BadInput, match=r"--td-weight 0\.0: must be above 0"):
        mage.parse([*tiny("mage"), "--grad-weight", "0", "--td-weight", "0"])
