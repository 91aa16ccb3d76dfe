"""Small models of small worlds, fitted and judged exactly: the equations of `iter_vaml.py`, by its numbers.

Pairs (s, a) are rows s·A + a: probabilities, of a world or of a model, are [S·A, S], rewards, weights and
action values [S·A], state values [S], policies [S, A]. A loss takes the model last and returns its value and
its slope in the model. Nothing is sampled. Extra `bench`.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from scipy.optimize import minimize
from scipy.spatial import ConvexHull

INF = float("inf")
Loss = Callable[[np.ndarray], tuple[float, np.ndarray]]  # P̂ -> its value, and the slope in P̂


@dataclass
class World:
    """Pairs (s, a) are rows s·A + a: probabilities [S·A, S], rewards [S·A], discount, weights ν [S·A]."""

    probs: np.ndarray
    reward: np.ndarray
    gamma: float
    weights: np.ndarray

    def table(self, x: np.ndarray) -> np.ndarray:
        """[S·A] -> [S, A]"""
        return x.reshape(self.probs.shape[1], -1)


class Softmax:
    """P̂(s'|s, a) ∝ exp(φ(s, a) Θ ψ(s')): pairs φ [S·A, p], successors ψ [S, q]."""

    bounds = None

    def __init__(self, pairs: np.ndarray, successors: np.ndarray):
        self.pairs, self.successors = pairs, successors
        self.first = np.zeros(pairs.shape[1] * successors.shape[1])

    def model(self, theta: np.ndarray) -> np.ndarray:
        logits = self.pairs @ theta.reshape(self.pairs.shape[1], -1) @ self.successors.T
        odds = np.exp(logits - logits.max(1, keepdims=True))
        return odds / odds.sum(1, keepdims=True)

    def pull(self, model: np.ndarray, slope: np.ndarray) -> np.ndarray:
        """A loss's slope in P̂ [S·A, S] -> its slope in Θ."""
        slope = model * (slope - (model * slope).sum(1, keepdims=True))
        return (self.pairs.T @ slope @ self.successors).ravel()


class Mixture:
    """P̂ = (1 − w) base + w other, 0 ≤ w ≤ 1."""

    bounds, first = [(0, 1)], np.array([0.5])

    def __init__(self, base: np.ndarray, other: np.ndarray):
        self.base, self.other = base, other

    def model(self, theta: np.ndarray) -> np.ndarray:
        return self.base + theta[0] * (self.other - self.base)

    def pull(self, model: np.ndarray, slope: np.ndarray) -> np.ndarray:
        return np.array([(slope * (self.other - self.base)).sum()])


def likelihood_loss(truth: np.ndarray, weights: np.ndarray, model: np.ndarray) -> tuple[float, np.ndarray]:
    """−Σ ν P* log P̂ (1), (5): truth, model [S·A, S], weights [S·A] -> loss, slope [S·A, S]."""
    assert truth.shape == model.shape and weights.shape == truth.shape[:1]
    joint, safe = weights[:, None] * truth, np.maximum(model, 1e-300)
    return -float((joint * np.log(safe)).sum()), -joint / safe


def value_loss(truth: np.ndarray, weights: np.ndarray, values: np.ndarray, n: float, model: np.ndarray):
    """(2), (3), (4): values [S] or Φ [S, d]; n draws, or infinitely many -> loss, slope [S·A, S]."""
    values = values.reshape(truth.shape[1], -1)
    assert truth.shape == model.shape and weights.shape == truth.shape[:1]
    mean, weights = model @ values, weights[:, None]
    error = truth @ values - mean
    loss, slope = (weights * error**2).sum(), -2 * (weights * error) @ values.T
    if n < INF:
        loss += (weights * (model @ values**2 - mean**2)).sum() / n
        slope = slope + weights * ((values**2).sum(1) - 2 * mean @ values.T) / n
    return float(loss), slope


def fit(family, loss: Loss, theta: np.ndarray, iterations: int = 300) -> np.ndarray:
    """L-BFGS from theta; (3), (4) and (6) are not convex, so where it starts matters."""

    def objective(theta):
        model = family.model(theta)
        value, slope = loss(model)
        return value, family.pull(model, slope)

    rules = {"maxiter": iterations, "ftol": 1e-15, "gtol": 1e-10}
    return minimize(objective, theta, jac=True, method="L-BFGS-B", bounds=family.bounds, options=rules).x


# ---------------------------------------------------------------- planning


def q_of(world: World, policy: np.ndarray) -> np.ndarray:
    """Q^π [S·A] of a policy [S, A]."""
    chain = (policy[..., None] * world.probs.reshape(*policy.shape, -1)).sum(1)
    reward = (policy * world.table(world.reward)).sum(1)
    value = np.linalg.solve(np.eye(len(chain)) - world.gamma * chain, reward)
    return world.reward + world.gamma * world.probs @ value


def greedy(world: World, q: np.ndarray) -> np.ndarray:
    table = world.table(q)
    return np.eye(table.shape[1])[table.argmax(1)]


def optimal_q(world: World) -> np.ndarray:
    """Q* by policy iteration."""
    q, new = np.full_like(world.reward, INF), q_of(world, greedy(world, world.reward))
    while not np.allclose(q, new, rtol=0, atol=1e-11):
        q, new = new, q_of(world, greedy(world, new))
    return new


def refitted(family, truth: np.ndarray, weights: np.ndarray, theta: np.ndarray, n: float, again=False):
    """V -> P̂ fitted to it by (3) or (4), going on from the last fit, or `again` from theta."""
    last = theta

    def model_of(value: np.ndarray) -> np.ndarray:
        nonlocal last
        last = fit(family, partial(value_loss, truth, weights, value, n), theta if again else last, 60)
        return family.model(last)

    return model_of


def iterate(world: World, model_of, steps: int, regress=lambda q: q):
    """K = steps iterations of value iteration with the models of model_of(V).

    Returns Q_K [S·A], and (P* − P̂) V_k and residuals of the regression, each [K, S·A].
    """
    q, (errors, residuals) = np.zeros_like(world.reward), np.zeros((2, steps, len(world.reward)))
    for k in range(steps):
        value = world.table(q).max(1)
        model = model_of(value)
        wanted = world.reward + world.gamma * model @ value
        q = regress(wanted)
        errors[k], residuals[k] = (world.probs - model) @ value, wanted - q
    return q, errors, residuals


def concentrability(world: World, rho: np.ndarray) -> tuple[float, list[float]]:
    """C̄ and c(1), c(2), .. of (7), until c stands still or what is left weighs 1e-12; for few states.

    Of the attainable distributions of states the corners suffice: c(m) is the maximum of a convex function.
    """
    count = world.probs.shape[1]
    probs, least = world.probs.reshape(count, -1, count), world.table(world.weights).min(1)
    policies = np.array(list(itertools.product(range(probs.shape[1]), repeat=count)))
    moves = probs[np.arange(count), policies]  # [A^S, S, S]
    points, c, total, rest = rho[None] @ world.probs, [], 0.0, 1.0
    for m in itertools.count(1):
        c.append(float(np.sqrt((points**2 / least).sum(1).max())))
        share = (1 - world.gamma) ** 2 * m * world.gamma ** (m - 1)
        total, rest = total + share * c[-1], rest - share
        if rest < 1e-12 or (m > 9 and np.ptp(c[-9:]) < 1e-9 * c[-1]):
            break
        points = np.unique((points[:, None, None] @ moves).reshape(-1, count).round(10), axis=0)
        if len(points) > 2 * count:
            points = points[ConvexHull(points[:, :-1], qhull_options="QJ").vertices]
    return total + rest * c[-1], c


def bounds(world: World, spreading: float, errors: np.ndarray, residuals: np.ndarray) -> tuple[float, float]:
    """Right sides of (7) and (7') with R_max = 1, for C̄ and what `iterate` returned; K may be 0."""
    gamma, scale = world.gamma, 2 * world.gamma / (1 - world.gamma) ** 2
    norms, suprema = (
        [size(x) for x in (residuals, errors)]
        for size in (lambda x: np.sqrt(x**2 @ world.weights), lambda x: np.abs(x).max(1))
    )
    inner, sup = (np.max(x + gamma * y, initial=0.0) for x, y in (norms, suprema))
    rest = 2 * gamma ** len(errors)
    return scale * (spreading * inner + rest), scale * (sup + rest)


# ---------------------------------------------------------------- policy gradients


@dataclass
class Policy:
    """π [S, A], its derivative [k, S·A] by k parameters, and the distribution μ [S] of the first state."""

    probs: np.ndarray
    slope: np.ndarray
    start: np.ndarray


def softmax_policy(theta: np.ndarray, start: np.ndarray) -> Policy:
    """π ∝ exp θ, θ [S, A]; where π is 0 or 1 it has no derivative: the state is frozen."""
    odds = np.exp(theta - theta.max(1, keepdims=True))
    probs = odds / odds.sum(1, keepdims=True)
    flat = probs.ravel()
    same = np.kron(np.eye(len(theta)), np.ones((theta.shape[1],) * 2))
    return Policy(probs, np.diag(flat) - same * np.outer(flat, flat), start)


def spread(policy: Policy) -> np.ndarray:
    """[S, S·A]: π(a|s) at the pair (s, a) of row s."""
    return np.kron(np.eye(len(policy.probs)), np.ones(policy.probs.shape[1])) * policy.probs.ravel()


def policy_gradient(world: World, policy: Policy, model: np.ndarray, visits: np.ndarray | None = None):
    """∇̂J [k] of (6), with d = visits [S], else that of the model; then d, Q̂ [S·A], V̂ [S], (I − γ P̂_π)⁻¹."""
    resolvent = np.linalg.inv(np.eye(len(policy.start)) - world.gamma * spread(policy) @ model)
    value = resolvent @ spread(policy) @ world.reward
    q = world.reward + world.gamma * model @ value
    visits = policy.start @ resolvent if visits is None else visits
    return policy.slope @ (visits.repeat(policy.probs.shape[1]) * q), visits, q, value, resolvent


def gradient_loss(wanted: np.ndarray, world: World, policy: Policy, real, model: np.ndarray):
    """‖∇J − ∇̂J‖² / ‖∇J‖² (6), wanted [k]; real: d of the world [S], or None -> loss, slope [S·A, S]."""
    found, visits, q, value, resolvent = policy_gradient(world, policy, model, real)
    gap, size, actions = found - wanted, wanted @ wanted, policy.probs.shape[1]
    back = 2 * gap @ policy.slope / size  # of what d(s) Q̂(s, a) is summed to
    by_q = back * visits.repeat(actions)
    by_value = resolvent.T @ model.T @ by_q * world.gamma
    slope = world.gamma * np.outer(by_q + by_value @ spread(policy), value)
    if real is None:
        by_visits = resolvent @ world.table(back * q).sum(1)
        slope += world.gamma * np.outer(visits @ spread(policy), by_visits)
    return float(gap @ gap / size), slope


def gamps_weights(world: World, policy: Policy) -> np.ndarray:
    """W [S·A] of (5), not normalised."""
    flat = policy.probs.ravel()
    norms = np.sqrt((policy.slope**2).sum(0))
    score = np.divide(norms, flat, out=np.zeros_like(flat), where=flat > 0)
    chain = np.eye(len(flat)) - world.gamma * (world.probs @ spread(policy)).T
    return np.linalg.solve(chain, score * np.linalg.solve(chain, policy.start @ spread(policy)))


# ---------------------------------------------------------------- worlds and features


def garnet(rng: np.random.Generator, states: int = 20, actions: int = 3, successors: int = 4) -> World:
    """Garnet world: each pair has a few random successors with Dirichlet(1) chances, r(s) = u³."""
    probs, pairs = np.zeros((states * actions, states)), states * actions
    for row in probs:
        row[rng.choice(states, successors, replace=False)] = rng.dirichlet(np.ones(successors))
    reward = (rng.random(states) ** 3).repeat(actions)
    return World(probs, reward, 0.9, np.full(pairs, 1 / pairs))


def areas(rng: np.random.Generator) -> tuple[World, Policy]:
    """Start in one half, where π is frozen; with chance 0.1 a step leads to the other half, for good."""
    first, second = garnet(rng, 10), garnet(rng, 10)
    probs = np.block([[0.9 * first.probs, 0.1 * second.probs], [0 * first.probs, second.probs]])
    reward, theta = np.append(first.reward, second.reward), rng.standard_normal((20, 3))
    theta[:10] = np.where(theta[:10] == theta[:10].max(1, keepdims=True), 0, -np.inf)
    start = np.eye(2).repeat(10, 1)[0] / 10
    return World(probs, reward, 0.9, np.full(60, 1 / 60)), softmax_policy(theta, start)


def grid(rng: np.random.Generator) -> tuple[World, np.ndarray]:
    """5 x 4 cells, four moves; each cell's own wind takes over with a chance of up to one half. r(s) = u³.

    Returns the world and the cells' places [20, 2] in [−1, 1]².
    """
    cells = np.array(list(itertools.product(range(5), range(4))))
    steps = np.array([(1, 0), (-1, 0), (0, 1), (0, -1)])
    after = np.clip(cells[:, None] + steps, 0, [4, 3]) @ [4, 1]  # [S, A]
    chance, wind = 0.5 * rng.random((20, 1, 1)), rng.dirichlet(np.ones(4), 20)[:, None]
    blown = (1 - chance) * np.eye(4) + chance * wind  # [S, A, direction]
    probs = (blown[..., None] * np.eye(20)[after][:, None]).sum(2).reshape(80, 20)
    return World(probs, (rng.random(20) ** 3).repeat(4), 0.9, np.full(80, 1 / 80)), cells / [2, 1.5] - 1


def structured(places: np.ndarray):
    """(name, φ [80, p], ψ [20, q]) of features of cell x action; "gaussian" are bells over the next cell."""
    x, y = places.T
    free, bell = np.eye(20), np.stack([x, y, x**2, y**2], 1)
    for degree in range(4):
        powers = [x**i * y**j for i in range(4) for j in range(degree + 1 - i)]
        pairs = np.kron(np.stack(powers, 1), np.eye(4))
        yield from [("polynomials", pairs, free), ("gaussian", pairs, bell)][: 1 + (degree > 0)]
    for across, up in ((2, 2), (5, 2), (5, 4)):
        tile = ((x + 1) / 2.001 * across).astype(int) * up + ((y + 1) / 2.001 * up).astype(int)
        yield "tiles", np.kron(np.eye(across * up)[tile], np.eye(4)), free


def three_states() -> World:
    """The world of the panel `bound`: its Q*, C̄ and bounds are in the tests."""
    probs = [
        [0.8, 0.1, 0.1],
        [0.2, 0.3, 0.5],
        [0.1, 0.6, 0.3],
        [0.1, 0.6, 0.3],
        [0.2, 0.6, 0.2],
        [0.4, 0.2, 0.4],
    ]
    return World(np.array(probs), np.array([0.3, 0.1, 0.7, 1, 0.9, 0.3]), 0.9, np.full(6, 1 / 6))


def stay_or_move() -> Mixture:
    """Models of three_states: uniform, or with chance w action 0 stays and action 1 moves on."""
    return Mixture(np.full((6, 3), 1 / 3), np.eye(3)[[0, 1, 1, 2, 2, 0]])


def random_features(rng: np.random.Generator, pairs: int, p: int) -> np.ndarray:
    """[pairs, p]: a constant and p − 1 Gaussian columns, nested in p; one-hot if p is the number of pairs."""
    drawn = rng.standard_normal((pairs, pairs - 1))
    return np.eye(pairs) if p == pairs else np.column_stack([np.ones(pairs), drawn[:, : p - 1]])
