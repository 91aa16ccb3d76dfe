"""Local models instead of a global one: the controllers of guided policy search, on the inverted pendulum.

    python -m experiments.studies.gps_local_models --csv local.csv --figure local.png

Linear-Gaussian dynamics, others at each of T steps, are fitted to N rollouts; a linear-Gaussian controller
is improved on them within a KL ball around the last one, and gathers the next N: the trajectory optimiser
of Levine and Abbeel 2014 (Learning Neural Network Policies with Guided Policy Search under Unknown
Dynamics). y = [x; u], cost ℓ = ½ y'L_yy y + y'ℓ_y, controller p = N(K_t x + k_t, C_t), p̂ the last one. With
5 rollouts, and 4 states and an action to regress on, a fit needs a prior.

    min_p E_p Σ ℓ   subject to   Σ_t E_p KL(p(·|x_t) ‖ p̂(·|x_t)) ≤ ε T                               (1)
    at a multiplier η: min_p E_p Σ (ℓ/η − log p̂(u|x)) − entropy of p                                  (2)
      Q_yy = L_yy/η + G'Ĉ⁻¹G + F'V'F,  Q_y = ℓ_y/η − G'Ĉ⁻¹k̂ + F'(v' + V'f),  G = [−K̂, I]
      K = −Q_uu⁻¹ Q_ux,  k = −Q_uu⁻¹ Q_u,  C = Q_uu⁻¹                                                 (3)
    means and covariances of y_t under p and the fit; the dual's slope in η is KL − ε T               (4)
    x' = F_t y + f_t + N(0, W_t): condition the joint Gaussian of (x, u, x') at t, whose covariance is
      (N S + m Φ + N m/(N+m) (mean − μ₀)(mean − μ₀)') / (N + n₀),  m = n₀ = 1                         (5)
    μ₀, Φ: moments of a mixture of Gaussians of all (x, u, x') in the last 20 rollouts, its clusters
      weighted by how much they answer for the N points at t; with one cluster a global Gaussian       (6)
    one linear policy for all t: min Σ (A x + b − K_t x − k_t)' C_t⁻¹ (·),  Σ_θ = (mean C_t⁻¹)⁻¹      (7)
    ε grows by clip(Δ_pred / (2 max(1e-4, Δ_pred − Δ_act)), 0.1, 5), within 0.5 and 3 of its base      (8)

Three priors, two T, two N. After each iteration: the steps that the controller balances without noise (the
task's return, at most T), mean of five episodes. Training ignores terminations, as local models need all T
states: the cost has the penalty. At the end the controllers of all t become one policy, by (7) and as their
mean, which may balance for 1 000 steps. Two minutes. Extra `bench` for the figure.
"""

import argparse
import itertools
import math
import sys
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import numpy as np
from numpy import ndarray as Array
from tqdm import tqdm

from experiments.report.commands import Parser, check_output, mistake
from experiments.report.pictures import COLOURS, clean, legend_below, pyplot, save
from experiments.report.tables import write_table

PRIORS = {"none": "no prior", "global": "one Gaussian", "mixture": "mixture of Gaussians"}
FIELDS = "prior,length,rollouts,seed,iteration,step,balanced,cost,eta,step_size,regressed,averaged".split(",")
WEIGHTS = [10.0, 0.01, 0.1, 0.01]  # of θ², ẋ², θ̇², u² in 2ℓ; that of x² is an argument
START_COV, STEP_SIZE = 0.09, 1.0  # first C, actions in [−1, 1]; base of ε, nats per step
KEPT, EPISODES, LONG = 20, 5, 1_000  # rollouts for (6); episodes of an evaluation; their longest
REGULAR = 1e-6  # added to variances before they are inverted (authors' code)


class Controller(NamedTuple):
    """u ~ N(K_t x + k_t, C_t)."""

    gain: Array  # K [T, m, n]
    offset: Array  # k [T, m]
    cov: Array  # C [T, m, m]


class Dynamics(NamedTuple):
    """x' ~ N(F_t y + f_t, W_t), and the Gaussian of x_0."""

    matrix: Array  # F [T, n, n + m]
    offset: Array  # f [T, n]
    noise: Array  # W [T, n, n]
    mean: Array  # [n]
    cov: Array  # [n, n]


class Cost(NamedTuple):
    """½ y'L_yy y + y'ℓ_y at every step. L_yy is positive semi-definite, and so Q_uu is positive."""

    hessian: Array  # [n + m, n + m]
    gradient: Array  # [n + m]


class Mixture(NamedTuple):
    """Gaussians and the logs of their weights."""

    log_weight: Array  # [K]
    mean: Array  # [K, D]
    cov: Array  # [K, D, D]


def transposed(x: Array) -> Array:
    return np.swapaxes(x, -1, -2)


def backward(dynamics: Dynamics, cost: Cost, last: Controller, eta: float) -> Controller:
    """The minimiser of (2), by (3)."""
    length, m, n = last.gain.shape
    deviation = np.concatenate([-last.gain, np.broadcast_to(np.eye(m), (length, m, m))], 2)  # G
    weighted = transposed(deviation) @ np.linalg.inv(last.cov)
    hessian = cost.hessian / eta + weighted @ deviation
    gradient = cost.gradient / eta - (weighted @ last.offset[..., None])[..., 0]
    found, value, slope = Controller(*map(np.empty_like, last)), np.zeros((n, n)), np.zeros(n)  # V, v
    for t in reversed(range(length)):
        matrix = dynamics.matrix[t]
        q_yy = hessian[t] + matrix.T @ value @ matrix
        q_y = gradient[t] + matrix.T @ (slope + value @ dynamics.offset[t])
        q_yy = (q_yy + q_yy.T) / 2
        found.cov[t] = np.linalg.inv(q_yy[n:, n:])
        found.gain[t] = -found.cov[t] @ q_yy[n:, :n]
        found.offset[t] = -found.cov[t] @ q_y[n:]
        closed = np.vstack([np.eye(n), found.gain[t]])  # [I; K]: in this form V stays positive
        value, slope = closed.T @ q_yy @ closed, closed.T @ q_y
    return found


def forward(dynamics: Dynamics, controller: Controller) -> tuple[Array, Array]:
    """(4): means [T, n + m] and covariances [T, n + m, n + m] of y_t."""
    length, m, n = controller.gain.shape
    means, covs = np.empty((length, n + m)), np.empty((length, n + m, n + m))
    mean, cov = dynamics.mean, dynamics.cov
    for t in range(length):
        closed = np.vstack([np.eye(n), controller.gain[t]])
        means[t], covs[t] = closed @ mean, closed @ cov @ closed.T
        means[t, n:] += controller.offset[t]
        covs[t, n:, n:] += controller.cov[t]
        mean = dynamics.matrix[t] @ means[t] + dynamics.offset[t]
        cov = dynamics.matrix[t] @ covs[t] @ dynamics.matrix[t].T + dynamics.noise[t]
        cov = (cov + cov.T) / 2
    return means, covs


def divergence(controller: Controller, last: Controller, means: Array, covs: Array) -> Array:
    """E_p KL(p ‖ p̂) in nats [T], over the x_t of p."""
    m, n = controller.gain.shape[1:]
    gain = controller.gain - last.gain
    offset = (gain @ means[:, :n, None])[..., 0] + controller.offset - last.offset
    second = offset[:, :, None] * offset[:, None] + gain @ covs[:, :n, :n] @ transposed(gain)
    trace = np.trace(np.linalg.inv(last.cov) @ (second + controller.cov), axis1=1, axis2=2)
    return (trace - m + np.linalg.slogdet(last.cov)[1] - np.linalg.slogdet(controller.cov)[1]) / 2


def expected_cost(cost: Cost, means: Array, covs: Array) -> float:
    """E Σ ℓ over the y_t of (4)."""
    second = covs + means[:, :, None] * means[:, None]
    return float((second * cost.hessian).sum() / 2 + (means @ cost.gradient).sum())


def improve(
    dynamics: Dynamics, cost: Cost, last: Controller, limit: float, eta: float, min_eta: float, tolerance=0.1
) -> tuple[Controller, float]:
    """(1): the controller at KL = `limit`, to a relative tolerance, and its η, sought from `eta`.

    η is not sought below `min_eta`: there the KL stays smaller. Where the fit explodes, so that no η keeps
    within the limit, it is the last controller.
    """
    low, high, best = min_eta, 1e16, (last, eta)
    for _ in range(50):
        with np.errstate(all="ignore"):
            found = backward(dynamics, cost, last, eta)
            excess = divergence(found, last, *forward(dynamics, found)).sum() - limit  # slope of the dual
        # not a number, of a fit that explodes, is below nothing: η grows
        best = (found, eta) if excess < tolerance * limit else best
        low, high = (low, eta) if excess < 0 else (eta, high)
        if abs(excess) < tolerance * limit or high < (1 + tolerance) * low:
            break
        middle = math.sqrt(low * high)
        eta = max(middle, 0.1 * high) if excess < 0 else min(middle, 10 * low)
    return best


def step_factor(predicted: float, actual: float) -> float:
    """(8): from the fall in cost that the last fit promised and the one that the new fit finds."""
    if not np.isfinite(predicted - actual):
        return 0.1  # a fit exploded
    return float(np.clip(predicted / (2 * max(1e-4, predicted - actual)), 0.1, 5))


def log_densities(mixture: Mixture, points: Array) -> Array:
    """log (weight · density) of each cluster: points [B, D] -> [B, K]."""
    root = np.linalg.cholesky(mixture.cov)
    scaled = (points - mixture.mean[:, None]) @ transposed(np.linalg.inv(root))
    log_det = np.log(np.diagonal(root, axis1=1, axis2=2)).sum(1)
    normal = log_det + points.shape[1] * math.log(2 * math.pi) / 2
    return mixture.log_weight - (scaled**2).sum(2).T / 2 - normal


def normalised(logs: Array) -> tuple[Array, Array]:
    """logs [B, K] -> shares [B, K], which sum to 1, and logs of the sums [B]."""
    top = logs.max(1)
    total = top + np.log(np.exp(logs - top[:, None]).sum(1))
    return np.exp(logs - total[:, None]), total


def clusters(points: Array, shares: Array) -> Mixture:
    """The M step: points [B, D], shares [B, K]."""
    count = shares.sum(0) + 1e-8
    mean = shares.T @ points / count[:, None]
    gap = points - mean[:, None]
    cov = transposed(gap * shares.T[..., None]) @ gap / count[:, None, None]
    return Mixture(np.log(count / count.sum()), mean, cov + REGULAR * np.eye(points.shape[1]))


def fit_mixture(points: Array, count: int, rng: np.random.Generator, start: Mixture | None = None) -> Mixture:
    """EM from `start`, if it has as many clusters, or from a random partition: points [B, D]."""
    if start is None or len(start.mean) != count:
        start = clusters(points, np.eye(count)[rng.integers(0, count, len(points))])
    mixture, before = start, -math.inf
    for _ in range(100):
        shares, total = normalised(log_densities(mixture, points))
        mixture, rise, before = clusters(points, shares), total.sum() - before, total.sum()
        if rise < 1e-5 * abs(before):
            break
    return mixture


def moments(mixture: Mixture, points: Array) -> tuple[Array, Array]:
    """(6): for N points at each step [N, T, D], μ_0 [T, D] and Φ [T, D, D]."""
    count, length, width = points.shape
    shares, _ = normalised(log_densities(mixture, points.reshape(-1, width)))
    shares = shares.reshape(count, length, -1).mean(0)
    mean = shares @ mixture.mean
    gap = mixture.mean - mean[:, None]
    return mean, np.tensordot(shares, mixture.cov, 1) + transposed(gap * shares[..., None]) @ gap


def fit_dynamics(points: Array, n: int, prior: tuple | None = None, regular: float = REGULAR) -> Dynamics:
    """(5): points (x, u, x') [N, T, n + m + n]; prior (μ_0, Φ) as from `moments`."""
    count, d = len(points), points.shape[2] - n
    mean = points.mean(0)
    gap = np.swapaxes(points - mean, 0, 1)
    cov = transposed(gap) @ gap / count
    if prior is not None:
        away = mean - prior[0]
        away = count / (count + 1) * away[:, :, None] * away[:, None]
        cov = (count * cov + prior[1] + away) / (count + 1)
    inputs = cov[:, :d, :d] + regular * np.eye(d)
    matrix = transposed(np.linalg.solve(inputs, cov[:, :d, d:]))
    offset = mean[:, d:] - (matrix @ mean[:, :d, None])[..., 0]  # of the data alone, as in the authors' code
    noise = cov[:, d:, d:] - matrix @ inputs @ transposed(matrix)
    start = points[:, 0, :n]
    start_cov = np.diag(np.maximum(start.var(0), REGULAR))
    return Dynamics(matrix, offset, (noise + transposed(noise)) / 2, start.mean(0), start_cov)


def regress(obs: Array, target: Array, precision: Array) -> tuple[Array, Array, Array]:
    """(7): obs [B, n], target [B, m], precision [B, m, m] -> A [m, n], b [m], Σ_θ [m, m].

    Precisions are cut at 100 times their median: steps almost without noise would decide alone.
    """
    size = np.trace(precision, axis1=1, axis2=2)
    precision = precision * np.minimum(1, 100 * np.median(size) / size)[:, None, None]
    inputs, m = np.append(obs, np.ones((len(obs), 1)), 1), target.shape[1]
    square = np.einsum("bkl,bi,bj->kilj", precision, inputs, inputs).reshape(m * inputs.shape[1], -1)
    right = np.einsum("bkl,bl,bi->ki", precision, target, inputs).ravel()
    found = (np.linalg.pinv(square, hermitian=True) @ right).reshape(m, -1)
    return found[:, :-1], found[:, -1], np.linalg.inv(precision.mean(0))


def rollouts(env: gym.Env, controller: Controller, count: int, rng) -> tuple[Array, Array]:
    """States [N, T + 1, n] and actions [N, T, m] as they act, cut to [−1, 1]: a fit to what was asked for
    would believe in forces without limit. Goes on where the task says that it has ended."""
    length, m, n = controller.gain.shape
    states, actions = np.empty((count, length + 1, n)), np.empty((count, length, m))
    root, scale = np.linalg.cholesky(controller.cov), env.action_space.high
    for x, u in zip(states, actions, strict=True):
        x[0], _ = env.reset()
        for t in range(length):
            wanted = controller.gain[t] @ x[t] + controller.offset[t] + root[t] @ rng.standard_normal(m)
            u[t] = wanted.clip(-1, 1)
            x[t + 1] = env.step(scale * u[t])[0]
    return states, actions


def balanced(env: gym.Env, gain: Array, offset: Array, seed: int) -> float:
    """Mean return of EPISODES episodes of at most T steps without noise: gain [T, m, n], offset [T, m]."""
    total, scale = 0.0, env.action_space.high
    for episode in range(EPISODES):
        obs, _ = env.reset(seed=seed if episode == 0 else None)
        for K, k in zip(gain, offset, strict=True):
            obs, reward, terminated, _, _ = env.step(scale * (K @ obs + k).clip(-1, 1))
            total += reward
            if terminated:
                break
    return total / EPISODES


def learn(prior: str, length: int, count: int, seed: int, args) -> list[dict]:
    """One run's rows, the first before any step."""
    env, judge = (gym.make("InvertedPendulum-v5").unwrapped for _ in range(2))
    noise, rng = np.random.default_rng(seed), np.random.default_rng([seed, 1])  # of actions, of mixtures
    env.reset(seed=seed)
    cost = Cost(np.diag([args.position_weight, *WEIGHTS]), np.zeros(5))
    cov = np.full((length, 1, 1), START_COV)
    controller = Controller(np.zeros((length, 1, 4)), np.zeros((length, 1)), cov)
    memory, mixture, before, eta, multiplier = [], None, None, max(1.0, args.min_eta), 1.0
    row = dict.fromkeys(FIELDS, "") | {"prior": prior, "length": length, "rollouts": count, "seed": seed}
    row |= {"iteration": 0, "step": 0}
    rows = [row | {"balanced": balanced(judge, *controller[:2], seed + 100)}]
    for iteration in range(1, args.iterations + 1):
        states, actions = rollouts(env, controller, count, noise)
        points = np.concatenate([states[:, :-1], actions, states[:, 1:]], 2)
        memory = [*memory, *points][-KEPT:]
        if prior != "none":
            data = np.concatenate(memory)
            wanted = 1 if prior == "global" else min(20, max(2, len(data) // 40))
            mixture = fit_mixture(data, wanted, rng, mixture)
        dynamics = fit_dynamics(points, 4, mixture and moments(mixture, points))
        if before is not None:
            pairs = before, (before[0], controller), (dynamics, controller)
            with np.errstate(all="ignore"):  # of a fit that explodes
                old, promised, real = (expected_cost(cost, *forward(*pair)) for pair in pairs)
                factor = step_factor(old - promised, old - real)
            multiplier = min(3.0, max(0.5, multiplier * factor))
        before, limit = (dynamics, controller), STEP_SIZE * multiplier * length
        controller, eta = improve(dynamics, cost, controller, limit, eta, args.min_eta)
        paid = (points[..., :5] ** 2 @ cost.hessian.diagonal()).sum() / 2 / count
        row = row | {"iteration": iteration, "step": iteration * count * length, "cost": paid}
        row |= {"eta": eta, "step_size": STEP_SIZE * multiplier}
        rows.append(row | {"balanced": balanced(judge, *controller[:2], seed + 100)})
    target = np.einsum("tmn,itn->itm", controller.gain, states[:, :-1]) + controller.offset
    precision = np.tile(np.linalg.inv(controller.cov), (count, 1, 1))
    policies = {"regressed": regress(points[..., :4].reshape(-1, 4), target.reshape(-1, 1), precision)[:2]}
    policies["averaged"] = controller.gain.mean(0), controller.offset.mean(0)
    for name, (gain, offset) in policies.items():
        always = np.broadcast_to(gain, (LONG, 1, 4)), np.broadcast_to(offset, (LONG, 1))
        rows[-1][name] = balanced(judge, *always, seed + 100)
    return rows


def grouped(table: list[dict]) -> dict[tuple, list[list[dict]]]:
    """(T, N, prior) -> the rows of each seed."""
    found: dict[tuple, dict[int, list[dict]]] = {}
    for row in table:
        key = row["length"], row["rollouts"], row["prior"]
        found.setdefault(key, {}).setdefault(row["seed"], []).append(row)
    return {key: list(runs.values()) for key, runs in found.items()}


def first_success(rows: list[dict]) -> str:
    """Steps until an evaluation balances all T; in brackets if a later one does not."""
    full = [row["balanced"] == row["length"] for row in rows]
    step = rows[full.index(True)]["step"] if any(full) else "never"
    return f"({step})" if any(full) and not all(full[full.index(True) :]) else str(step)


def report(table: list[dict]) -> str:
    """Steps until all T are balanced, and at the end what controllers and policies balance, seed by seed."""
    lines = ["| T | N | prior | T balanced from step | at the end | by (7) | by the mean |", "|---" * 7 + "|"]
    for (length, count, prior), runs in grouped(table).items():
        last = [[f"{rows[-1][name]:.0f}" for rows in runs] for name in ("balanced", "regressed", "averaged")]
        cells = [str(length), str(count), PRIORS[prior], *map(", ".join, [map(first_success, runs), *last])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(table: list[dict], out: Path) -> None:
    """Steps balanced over environment steps: each seed, and the mean."""
    plt = pyplot()
    groups = grouped(table)
    lengths, counts = (sorted({key[i] for key in groups}) for i in (0, 1))
    shape, size = (len(lengths), len(counts)), (1 + 3.7 * len(counts), 0.8 + 2.4 * len(lengths))
    figure, panels = plt.subplots(*shape, figsize=size, squeeze=False, layout="constrained")
    for (length, count, prior), runs in groups.items():
        axes, colour = panels[lengths.index(length), counts.index(count)], COLOURS[list(PRIORS).index(prior)]
        found = np.array([[row["balanced"] for row in rows] for rows in runs])
        steps = np.array([row["step"] for row in runs[0]]) / 1_000
        axes.plot(steps, found.T, color=colour, lw=0.8, alpha=0.45)
        axes.plot(steps, found.mean(0), color=colour, lw=2.2, label=PRIORS[prior])
        axes.set(title=f"T = {length}, {count} rollouts per iteration", ylim=(0, 1.05 * length))
        clean(axes)
    for axes in panels[-1]:
        axes.set_xlabel("environment steps, thousands")
    for axes in panels[:, 0]:
        axes.set_ylabel("steps balanced")
    legend_below(figure, 3)
    save(figure, out)


def number(kind: type, low: float, high: float):
    """Converter to a number of this kind and range."""

    def convert(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            noun = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text}: must be {noun} from {low:g} to {high:g}")
        return value

    return convert


def numbers(low: float, high: float):
    """Converter to a list of whole numbers in this range."""
    return lambda text: sorted({number(int, low, high)(part) for part in text.split(",")})


def main() -> int:
    parser = Parser(__doc__)
    shown, weight = "(default: %(default)s)", number(float, 0, 1e6)
    parser.add_argument("--lengths", type=numbers(1, 1e4), default="50,100", help=f"T {shown}")
    parser.add_argument("--rollouts", type=numbers(2, 1e4), default="5,20", help=f"N {shown}")
    parser.add_argument("--seeds", type=numbers(0, 2**31), default="1,2,3,4,5", help=shown)
    parser.add_argument("--iterations", type=number(int, 1, 1e6), default=14, help=shown)
    parser.add_argument("--position-weight", type=weight, default=1.0, help=f"of x² in 2ℓ {shown}")
    about = f"η is sought from here on (ours; authors' code: 1e-8) {shown}"
    parser.add_argument("--min-eta", type=number(float, 1e-8, 1e8), default=0.01, help=about)
    parser.add_argument("--csv", type=Path, required=True, help="file for the table")
    parser.add_argument("--figure", type=Path, help="picture")
    args = parser.parse_args()
    try:
        check_output(args.csv, "--csv")
        check_output(args.figure, "--figure")
    except ValueError as error:
        return mistake(error)
    table: list[dict] = []
    cells = itertools.product(args.lengths, args.rollouts, PRIORS, args.seeds)
    for length, count, prior, seed in tqdm(list(cells), mininterval=1):
        table += learn(prior, length, count, seed, args)
    short = lambda x: float(f"{x:.6g}") if isinstance(x, float) else x
    write_table(args.csv, FIELDS, ({n: short(x) for n, x in row.items()} for row in table))
    print(report(table))
    if args.figure:
        plot(table, args.figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
