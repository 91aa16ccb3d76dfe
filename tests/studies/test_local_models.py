"""KL-constrained control on local models: a scalar system in closed form, fits, mixtures, the script."""

import csv
import subprocess
import sys
import types

import gymnasium as gym
import numpy as np
import pytest

from experiments.studies import gps_local_models as local
from tests.conftest import ROOT

UNIT = local.Cost(np.eye(2), np.zeros(2))
SETTINGS = types.SimpleNamespace(iterations=3, position_weight=1.0, min_eta=0.01)


def scalar(scale: float = 1.0):
    """x' = x + u + N(0, 0.04), x_0 ~ N(1, 0.01), T = 3, and u ~ N(0, 1); in units of 1 / scale."""
    dynamics = local.Dynamics(
        np.ones((3, 1, 2)), np.zeros((3, 1)), np.full((3, 1, 1), 0.04 * scale**2), np.ones(1) * scale,
        np.full((1, 1), 0.01 * scale**2),
    )  # fmt: skip
    return dynamics, local.Controller(np.zeros((3, 1, 1)), np.zeros((3, 1)), np.full((3, 1, 1), scale**2))


def at(eta: float, cost=UNIT):
    """Controller, KL per step and cost at η."""
    dynamics, last = scalar()
    found = local.backward(dynamics, cost, last, eta)
    marginals = local.forward(dynamics, found)
    return found, local.divergence(found, last, *marginals), local.expected_cost(cost, *marginals)


def near(values, expected, tolerance=5e-7):
    values = np.concatenate([np.ravel(part) for part in values]) if isinstance(values, list) else values
    assert np.ravel(values).tolist() == pytest.approx(np.ravel(expected).tolist(), abs=tolerance)


def test_one_backward_pass_of_the_scalar_system():
    found, kl, cost = at(1.0)
    near(found.gain, [-0.454545, -0.333333, 0])
    near(found.cov, [0.272727, 0.333333, 0.5])
    near(kl, [0.390344, 0.250041, 0.096574])
    near([kl.sum(), cost], [0.736958, 1.825987])
    dynamics, last = scalar()
    marginals = local.forward(dynamics, last)
    near(local.expected_cost(UNIT, *marginals), [4.575])
    near(local.divergence(last, last, *marginals), [0, 0, 0])


def test_limits_in_eta():
    """η → 0 is LQR without noise, η → ∞ the last controller; between them KL falls and cost rises."""
    found, _, cost = at(1e-9)
    near(found.gain, [-0.6, -0.5, 0], 1e-6)
    assert found.cov.max() < 1e-8
    near(cost, [0.858], 1e-6)
    near(at(1e9)[2], [4.575], 1e-6)
    near([at(0.1)[1].sum(), at(0.1)[2], at(10)[1].sum(), at(10)[2]], [3.142447, 0.999326, 0.041581, 3.639636])
    path = [at(eta) for eta in np.geomspace(1e-3, 1e3, 20)]
    assert all(np.diff([kl.sum() for _, kl, _ in path]) < 0) and all(np.diff([c for *_, c in path]) > 0)


def lagrangian(dynamics, cost, last, eta, parameters, shapes):
    """Cost + η KL as a function of K, k and the logs or roots of C, in one vector."""
    gain, offset, root = (
        part.reshape(shape)
        for part, shape in zip(
            np.split(parameters, np.cumsum([np.prod(s) for s in shapes])[:-1]), shapes, strict=True
        )
    )
    cov = np.exp(root) if root.shape[1] == 1 else root @ np.swapaxes(root, 1, 2)
    controller = local.Controller(gain, offset, cov)
    marginals = local.forward(dynamics, controller)
    kl = local.divergence(controller, last, *marginals).sum()
    return local.expected_cost(cost, *marginals) + eta * kl


def gradient(dynamics, cost, last, eta, found):
    root = np.log(found.cov) if found.cov.shape[1] == 1 else np.linalg.cholesky(found.cov)
    shapes = [part.shape for part in found]
    point = np.concatenate([part.ravel() for part in (found.gain, found.offset, root)])
    steps = 1e-5 * np.eye(len(point))
    value = lambda x: lagrangian(dynamics, cost, last, eta, x, shapes)
    return np.array([(value(point + step) - value(point - step)) / 2e-5 for step in steps])


def test_multiplier_at_the_limit_and_its_controller_is_stationary():
    dynamics, last = scalar()
    found, eta = local.improve(dynamics, UNIT, last, 1.0, 1.0, 1e-8, tolerance=1e-12)
    near(eta, [0.695781])
    near(found.gain, [-0.489965, -0.370950, 0])
    near(found.cov, [0.209268, 0.258100, 0.410301])
    near(local.expected_cost(UNIT, *local.forward(dynamics, found)), [1.606649])
    assert np.abs(gradient(dynamics, UNIT, last, eta, found)).max() < 1e-9


def test_every_part_of_a_larger_controller_is_stationary():
    """Two states, two actions, a target, a last controller with gains, offsets and correlated noise."""
    rng = np.random.default_rng(0)
    half, noise = rng.normal(size=(4, 4)), 0.3 * rng.normal(size=(3, 2, 2))
    positive = lambda x: x @ np.swapaxes(x, -1, -2) + 0.1 * np.eye(x.shape[-1])
    cost = local.Cost(positive(half), rng.normal(size=4))
    matrix, offset, mean = (rng.normal(size=shape) for shape in ((3, 2, 4), (3, 2), 2))
    dynamics = local.Dynamics(matrix, offset, positive(noise), mean, positive(noise)[0])
    last = local.Controller(rng.normal(size=(3, 2, 2)), rng.normal(size=(3, 2)), positive(noise))
    found = local.backward(dynamics, cost, last, 0.7)
    assert np.abs(found.offset).min() > 0.01
    assert np.abs(gradient(dynamics, cost, last, 0.7, found)).max() < 1e-7
    moved = found._replace(offset=found.offset + 0.01)
    assert np.abs(gradient(dynamics, cost, last, 0.7, moved)).max() > 1e-2


def test_slope_of_the_dual():
    """−0.263042 = KL − ε T at η = 1, and the derivative of the dual by finite differences."""
    dual = lambda eta: at(eta)[2] + eta * (at(eta)[1].sum() - 1)
    near([at(1.0)[1].sum() - 1, (dual(1 + 1e-5) - dual(1 - 1e-5)) / 2e-5], [-0.263042, -0.263042])


def test_a_target_moves_the_offset_alone():
    found, *_ = at(1.0, local.Cost(np.eye(2), np.array([-2.0, 0])))
    near(found.gain, [-0.454545, -0.333333, 0])
    near(found.offset, [0.909091, 0.666667, 0])


def test_default_tolerance_of_the_limit():
    dynamics, last = scalar()
    for limit in (0.1, 1.0, 5.0):
        for start in (1e-6, 1.0, 1e6):
            found, _ = local.improve(dynamics, UNIT, last, limit, start, 1e-8)
            kl = local.divergence(found, last, *local.forward(dynamics, found)).sum()
            assert kl == pytest.approx(limit, rel=0.1)


def test_eta_stays_above_its_floor(monkeypatch):
    """KL is 3.14 at η = 0.1: a limit of 5 is not used up, and the search ends when its bracket is narrow."""
    dynamics, last = scalar()
    passes, backward = [], local.backward
    monkeypatch.setattr(local, "backward", lambda *a: passes.append(1) or backward(*a))
    found, eta = local.improve(dynamics, UNIT, last, 5.0, 1.0, 0.1)
    assert 0.1 <= eta < 0.111 and len(passes) < 20
    assert 2.9 < local.divergence(found, last, *local.forward(dynamics, found)).sum() < 3.15


def test_an_exploding_fit_leaves_the_last_controller():
    """x' = 1e10 x, whatever the action: 1e1000 after 100 steps."""
    ones = np.ones((100, 1, 1))
    dynamics = local.Dynamics(ones * [1e10, 0], np.zeros((100, 1)), ones, np.ones(1), np.eye(1))
    last = local.Controller(0 * ones, np.zeros((100, 1)), ones)
    found, eta = local.improve(dynamics, UNIT, last, 100.0, 0.5, 1e-8)
    assert found is last and eta == 0.5


def test_step_rule():
    near([local.step_factor(2, actual) for actual in (1, 1.5, 2, 0, -1)], [1, 2, 5, 0.5, 1 / 3])
    assert local.step_factor(-1, 1) == 0.1 and local.step_factor(np.inf, 0) == 0.1
    assert local.step_factor(1, -np.inf) == local.step_factor(np.nan, 1) == 0.1


POINTS = np.array([[[x, u, 0.9 * x + 0.5 * u + 0.1]] for x, u in ((0, 1), (1, -1), (2, 0))])
NORMAL = np.array([[1.0, 0.0, 1.0]]), np.eye(3)[None]


@pytest.mark.parametrize(
    ("points", "prior", "matrix", "offset", "noise"),
    [
        (POINTS, None, [0.9, 0.5], 0.1, 0),
        (POINTS, NORMAL, [0.5, 0.2], 0.5, 0.3875),
        (POINTS[:2], NORMAL, [0.1, 0.066667], 0.5, 0.374444),
    ],
)
def test_fit_of_three_points(points, prior, matrix, offset, noise):
    found = local.fit_dynamics(points, 1, prior, regular=0.0)
    near(found.matrix, matrix)
    near([found.offset, found.noise], [offset, noise])


def test_two_points_do_not_determine_a_fit():
    """Rank 1: without a prior the regularised fit is the shortest of many, and claims no noise."""
    with pytest.raises(np.linalg.LinAlgError):
        local.fit_dynamics(POINTS[:2], 1, regular=0.0)
    found = local.fit_dynamics(POINTS[:2], 1)
    near(found.matrix, [-0.02, 0.04], 1e-5)
    assert found.noise.item() < 1e-5


def test_prior_mean_pulls():
    """A prior elsewhere adds the outer product of the distance, N / (N + 1) of it, over N + 1."""
    found = local.fit_dynamics(POINTS, 1, (np.array([[1.0, 0, 4]]), np.eye(3)[None]), regular=0.0)
    near(found.noise, [0.3875 + 0.75 * 9 / 4])
    found = local.fit_dynamics(POINTS, 1, (np.array([[4.0, 0, 1]]), np.eye(3)[None]), regular=0.0)
    near(found.matrix, np.linalg.solve([[3 + 0.75 * 9, -1], [-1, 3]], [1.3, 0.1]))


def test_starts_have_their_own_moments():
    points = np.random.default_rng(0).normal(2, 0.5, (2_000, 2, 3))
    found = local.fit_dynamics(points, 1)
    near([found.mean, found.cov], [points[:, 0, 0].mean(), points[:, 0, 0].var()])
    still = local.fit_dynamics(np.zeros((3, 1, 3)), 1)
    assert still.cov.item() == 1e-6


def test_one_cluster_is_the_global_gaussian():
    points, rng = np.random.default_rng(0).normal(size=(4, 50, 3)) * [1, 2, 3], np.random.default_rng(1)
    mixture = local.fit_mixture(points.reshape(-1, 3), 1, rng)
    mean, cov = local.moments(mixture, points)
    flat = points.reshape(-1, 3)
    assert mean.shape == (50, 3) and cov.shape == (50, 3, 3)
    assert np.allclose(mean, flat.mean(0)) and np.allclose(cov, np.cov(flat.T, bias=True), atol=2e-6)


def clouds():
    """Three clouds of 200 points in the plane."""
    rng = np.random.default_rng(0)
    centres = np.array([[0.0, 0], [6, 0], [0, 6]])
    return np.concatenate([centre + rng.normal(size=(200, 2)) for centre in centres]), centres


def test_expectation_maximisation_climbs(monkeypatch):
    points, _ = clouds()
    totals, shares, original = [], [], local.normalised

    def recorded(logs):
        found = original(logs)
        shares.append(found[0])
        totals.append(found[1].sum())
        return found

    monkeypatch.setattr(local, "normalised", recorded)
    local.fit_mixture(points, 5, np.random.default_rng(1))
    assert len(totals) > 5 and all(np.diff(totals) >= -1e-9 * abs(totals[0]))
    assert all(np.allclose(share.sum(1), 1) for share in shares)


def test_mixture_finds_the_clouds_and_goes_on_from_them():
    points, centres = clouds()
    found = local.fit_mixture(points, 3, np.random.default_rng(3))
    order = np.argsort(found.mean @ [1, 10])
    assert np.allclose(found.mean[order], centres, atol=0.3)
    assert np.allclose(np.exp(found.log_weight), 1 / 3, atol=0.02)
    again = local.fit_mixture(points, 3, np.random.default_rng(4), found)
    assert np.allclose(again.mean, found.mean, atol=0.01)  # in the same order: not from a new partition


def test_log_densities_are_those_of_gaussians():
    mixture = local.Mixture(
        np.log([0.3, 0.7]), np.array([[0.0, 0], [1, 1]]), np.array([np.eye(2), [[2, 1], [1, 2]]])
    )
    found = np.exp(local.log_densities(mixture, np.array([[0.5, -0.5]])))
    away, inverse = np.array([-0.5, -1.5]), np.array([[2, -1], [-1, 2]]) / 3
    second = 0.7 / (2 * np.pi * np.sqrt(3)) * np.exp(-away @ inverse @ away / 2)
    near(found, [0.3 / (2 * np.pi) * np.exp(-0.25), second])


def test_moments_weigh_clusters_by_their_shares():
    """Points halfway between two clusters see both and their distance, points of one that one alone."""
    mixture = local.Mixture(np.log([0.5, 0.5]), np.array([[-1.0], [1]]), np.full((2, 1, 1), 0.25))
    mean, cov = local.moments(mixture, np.array([[[0.0], [1e2]], [[0.0], [2e2]]]))
    near(mean, [0, 1])
    near(cov, [1.25, 0.25])
    mean, cov = local.moments(mixture, np.array([[[-1e2]], [[1e2]]]))  # shares are means over the N points
    near([mean, cov], [0, 1.25])


def test_forward_moments_are_those_of_samples_and_kl_is_the_mean_log_ratio():
    dynamics, last = scalar()
    controller, *_ = at(0.5, local.Cost(np.eye(2), np.array([-2.0, 0])))
    means, covs = local.forward(dynamics, controller)
    rng, count = np.random.default_rng(0), 100_000
    x, ratio, kl = rng.normal(1, 0.1, count), 0.0, local.divergence(controller, last, means, covs)
    for t in range(3):
        (gain, offset, var), noise = (part[t].item() for part in controller), rng.normal(size=count)
        u = gain * x + offset + np.sqrt(var) * noise
        y, cov = np.stack([x, u]), covs[t]
        assert (np.abs(y.mean(1) - means[t]) < 3 * np.sqrt(np.diag(cov) / count)).all()
        errors = np.sqrt((np.outer(np.diag(cov), np.diag(cov)) + cov**2) / count)
        assert (np.abs(np.cov(y) - cov) < 3 * errors).all()
        ratio = -0.5 * noise**2 - 0.5 * np.log(var) + 0.5 * u**2  # log p / p̂, p̂ = N(0, 1)
        assert abs(ratio.mean() - kl[t]) < 3 * ratio.std() / np.sqrt(count)
        x = x + u + rng.normal(0, 0.2, count)


class Scalar:
    """The scalar system as a task: forces in units of 2, says at once that it has ended."""

    action_space = gym.spaces.Box(np.float32(-2), np.float32(2), (1,))

    def __init__(self, scale=0.05, noise=0.2):
        self.scale, self.noise, self.rng, self.heard = scale, noise, np.random.default_rng(0), []

    def reset(self, seed=None):
        self.x = self.scale * self.rng.normal(1, 0.1, 1)
        return self.x, {}

    def step(self, action):
        self.heard.append(action.item())
        self.x = self.x + action / 2 + self.scale * self.noise * self.rng.normal(size=1)
        return self.x, 1.0, True, False, {}


def test_exact_system_predicts_its_cost():
    """Mean sampled cost is the expected one; promised and found fall are equal: the largest factor."""
    dynamics, last = scalar(0.05)
    found, _ = local.improve(dynamics, UNIT, last, 3.0, 1.0, 1e-8)
    old, new = (local.expected_cost(UNIT, *local.forward(dynamics, c)) for c in (last, found))
    for controller, expected in ((last, old), (found, new)):
        states, actions = local.rollouts(Scalar(), controller, 4_000, np.random.default_rng(1))
        paid = ((states[:, :-1] ** 2).sum((1, 2)) + (actions**2).sum((1, 2))) / 2
        assert abs(paid.mean() - expected) < 3 * paid.std() / np.sqrt(len(paid))
    assert old - new > 1e-3 and local.step_factor(old - new, old - new) == 5


def test_fit_to_rollouts_is_the_system():
    _, last = scalar(0.05)
    states, actions = local.rollouts(Scalar(noise=0.0), last, 5, np.random.default_rng(1))
    points = np.concatenate([states[:, :-1], actions, states[:, 1:]], 2)
    found = local.fit_dynamics(points, 1, regular=1e-12)
    assert np.allclose(found.matrix, 1, atol=1e-6) and np.allclose(found.offset, 0, atol=1e-6)
    assert np.abs(found.noise).max() < 1e-8


def test_rollouts_store_the_actions_that_acted_and_go_on_after_the_end():
    task, length = Scalar(), 4
    controller = local.Controller(
        np.zeros((length, 1, 1)), np.full((length, 1), 9.0), np.full((length, 1, 1), 1e-9)
    )
    states, actions = local.rollouts(task, controller, 3, np.random.default_rng(0))
    assert states.shape == (3, 5, 1) and (actions == 1).all() and task.heard == [2.0] * 12
    assert local.balanced(task, *controller[:2], 0) == 1.0 and task.heard[12:] == [2.0] * 5  # that stops


def test_action_noise_has_the_covariance_of_the_controller():
    controller = local.Controller(
        np.full((2, 1, 1), -0.5), np.full((2, 1), 0.1), np.array([[[0.01]], [[0.0004]]])
    )
    states, actions = local.rollouts(Scalar(), controller, 4_000, np.random.default_rng(0))
    noise = actions[..., 0] - 0.1 + 0.5 * states[:, :-1, 0]
    assert noise.std(0) == pytest.approx([0.1, 0.02], rel=0.05)


def test_supervised_precisions():
    """Precisions 1 and 4: Σ_θ = 0.4, and targets 0 and 1 at one x give 0.8."""
    gain, offset, cov = local.regress(
        np.full((2, 1), 2.0), np.array([[0.0], [1]]), np.array([[[1.0]], [[4]]])
    )
    near([gain.item() * 2 + offset.item(), cov.item()], [0.8, 0.4])


def test_regression_is_weighted_least_squares():
    rng = np.random.default_rng(0)
    obs, target, root = (rng.normal(size=shape) for shape in ((30, 2), (30, 2), (30, 2, 2)))
    precision = root @ np.swapaxes(root, 1, 2) + np.eye(2)
    gain, offset, _ = local.regress(obs, target, precision)
    inputs = np.append(obs, np.ones((30, 1)), 1)
    half = np.swapaxes(np.linalg.cholesky(precision), 1, 2)  # |half (Θ z − u)|² is the weighted error
    rows = np.concatenate([np.kron(h, z) for h, z in zip(half, inputs, strict=True)])
    expected = np.linalg.lstsq(rows, np.concatenate([h @ u for h, u in zip(half, target, strict=True)]))[0]
    near(np.append(gain, offset[:, None], 1), expected.tolist(), 1e-8)


def test_precisions_are_cut_at_a_hundred_medians():
    precision = np.array([1.0, 1, 1e6])[:, None, None]
    *_, cov = local.regress(np.zeros((3, 1)), np.zeros((3, 1)), precision)
    near(cov, [3 / 102])


def test_first_success():
    rows = lambda *found: [{"balanced": x, "length": 50, "step": 250 * i} for i, x in enumerate(found)]
    assert local.first_success(rows(20.0, 50.0, 50.0)) == "250"
    assert local.first_success(rows(20.0, 50.0, 49.8, 50.0)) == "(250)"
    assert local.first_success(rows(20.0, 49.0)) == "never"


def test_controllers_learn_to_balance():
    args = types.SimpleNamespace(**vars(SETTINGS) | {"iterations": 8})
    rows = local.learn("mixture", 50, 5, 1, args)
    assert rows[0]["balanced"] < 30 and rows[-1]["balanced"] == 50 and rows[-1]["step"] == 2_000
    assert rows[-1]["cost"] < 0.1 * rows[1]["cost"]
    assert all(0.5 <= row["step_size"] <= 3 for row in rows[1:])


def test_priors_begin_with_the_same_rollouts_and_evaluation_changes_nothing(monkeypatch):
    first = {prior: local.learn(prior, 20, 5, 3, SETTINGS) for prior in local.PRIORS}
    assert len({rows[1]["cost"] for rows in first.values()}) == 1
    assert len({rows[2]["cost"] for rows in first.values()}) == 3
    monkeypatch.setattr(local, "EPISODES", 1)
    again = local.learn("mixture", 20, 5, 3, SETTINGS)
    assert [row["cost"] for row in again] == [row["cost"] for row in first["mixture"]]


def recorded(monkeypatch, name: str) -> list[tuple]:
    """(arguments, result) of every later call of a function of the script."""
    calls, original = [], getattr(local, name)

    def wrapper(*args):
        calls.append((args, original(*args)))
        return calls[-1][1]

    monkeypatch.setattr(local, name, wrapper)
    return calls


def test_what_a_run_hands_from_iteration_to_iteration(monkeypatch):
    """Limits are ε T by rule (8), the search begins where the last ended, the mixture sees 20 rollouts."""
    improved, mixed = recorded(monkeypatch, "improve"), recorded(monkeypatch, "fit_mixture")
    args = types.SimpleNamespace(**vars(SETTINGS) | {"iterations": 6, "min_eta": 1e-8})
    rows = local.learn("mixture", 20, 5, 3, args)[1:]
    judge = lambda fit, controller: local.expected_cost(improved[0][0][1], *local.forward(fit, controller))
    size, factors = 1.0, []
    for i, ((fit, _, last, limit, eta, _), (_, found)) in enumerate(improved):
        if i > 0:
            (old_fit, _, old_last, *_), (controller, old_eta) = improved[i - 1]
            assert last is controller and eta == old_eta
            old = judge(old_fit, old_last)
            factors.append(local.step_factor(old - judge(old_fit, last), old - judge(fit, last)))
            size = min(3, max(0.5, size * factors[-1]))
        assert limit == pytest.approx(20 * size) and rows[i]["step_size"] == pytest.approx(size)
        assert rows[i]["eta"] == found
    assert len(set(factors)) > 2 and any(0.5 < row["step_size"] < 3 and row["step_size"] != 1 for row in rows)
    assert [len(call[0][0]) for call in mixed] == [100, 200, 300, 400, 400, 400]
    assert [call[0][1] for call in mixed] == [2, 5, 7, 10, 10, 10]  # a cluster for 40 points


def test_one_policy_is_made_of_the_last_controller(monkeypatch):
    """Each of N T states with the mean action and the precision of its own t."""
    improved, made = recorded(monkeypatch, "improve"), recorded(monkeypatch, "regress")
    sampled = recorded(monkeypatch, "rollouts")
    local.learn("global", 20, 5, 3, SETTINGS)
    (obs, target, precision), controller = made[0][0], improved[-1][1][0]
    states = sampled[-1][1][0]
    for i, t in ((0, 0), (3, 7), (4, 19)):
        assert np.array_equal(obs[20 * i + t], states[i, t])
        near(target[20 * i + t], controller.gain[t] @ states[i, t] + controller.offset[t], 1e-9)
        near(precision[20 * i + t] @ controller.cov[t], [1], 1e-9)


def test_priors_share_the_noise_of_actions(monkeypatch):
    seen, original = [], local.rollouts
    state = lambda rng: rng.bit_generator.state["state"]["state"]
    monkeypatch.setattr(local, "rollouts", lambda *a: seen.append(state(a[3])) or original(*a))
    for prior in local.PRIORS:
        local.learn(prior, 20, 5, 3, SETTINGS)
    assert seen[:3] == seen[3:6] == seen[6:] and len(set(seen[:3])) == 3


def script(*flags: object) -> subprocess.CompletedProcess:
    words = [sys.executable, "-m", "experiments.studies.gps_local_models", *map(str, flags)]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_script_writes_table_and_figure(tmp_path):
    small = ["--lengths", "10,15", "--rollouts", "3", "--seeds", "1,2", "--iterations", 2]
    done = script(*small, "--csv", tmp_path / "new" / "a.csv", "--figure", tmp_path / "new" / "a.png")
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "new" / "a.csv") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == local.FIELDS and len(rows) == 2 * 3 * 2 * 3
    assert {row["step"] for row in rows if row["length"] == "15"} == {"0", "45", "90"}
    last = [row for row in rows if row["iteration"] == "2"]
    assert all(float(row["averaged"]) > 5 for row in last) and not rows[1]["averaged"]
    assert "| 15 | 3 | one Gaussian |" in done.stdout and (tmp_path / "new" / "a.png").stat().st_size > 10_000
    again = script(*small, "--csv", tmp_path / "b.csv")
    assert (tmp_path / "b.csv").read_text() == (
        tmp_path / "new" / "a.csv"
    ).read_text() and not again.returncode


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--iterations", "0"], "--iterations 0: must be a whole number from 1 to 1e+06"),
        (["--iterations", "1.5"], "--iterations 1.5: must be a whole number from 1 to 1e+06"),
        (["--rollouts", "5,1"], "--rollouts 1: must be a whole number from 2 to 10000"),
        (["--lengths", "x"], "--lengths x: must be a whole number from 1 to 10000"),
        (["--seeds", ""], "--seeds : must be a whole number from 0 to 2.14748e+09"),
        (["--min-eta", "nan"], "--min-eta nan: must be a number from 1e-08 to 1e+08"),
        (["--position-weight", "-1"], "--position-weight -1: must be a number from 0 to 1e+06"),
        (["--figure", "a.xyz"], "--figure a.xyz: must end in .png, .pdf or .svg"),
        (["--csv", "/dev/null/a.csv"], "--csv /dev/null/a.csv: must be a file that can be written"),
        (["--T", "50"], "unrecognized arguments: --T 50"),
    ],
)
def test_mistakes_are_one_line(flags, text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gps_local_models.py", "--csv", str(tmp_path / "a" / "a.csv"), *flags])
    try:
        code = local.main()
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2 and error.startswith(f"error: {text}") and error.count("\n") == 1
    assert not list(tmp_path.iterdir())
