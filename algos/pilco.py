"""PILCO: probabilistic inference for learning control, Deisenroth and Rasmussen, ICML 2011 (PAMI 2015).

Gaussian processes learn s' − s. A Gaussian belief N(m, S) of the state is led through policy and processes by
exact moment matching: the expected cost of H steps is one smooth function of the policy, and its gradient
needs neither samples nor a critic. Hundreds of steps suffice where the state has few dimensions; n points
cost O(n³) a fit and O(n²) an imagined step, which is why the other files exist.

Inputs x = (s, angles as sine and cosine; a), one process an output: β_a = K̂_a⁻¹ y_a, K̂_a = K_a + σ_a² I,
k_a = α_a² exp(−½ dᵀΛ_a⁻¹d), Λ_a = diag ℓ_a². For x ~ N(m, S), ν_i = x_i − m, outputs f:

    M_a  = Σ_i β_ai q_ai = E f_a,   q_ai = α_a² |SΛ_a⁻¹ + I|^−½ exp(−½ ν_iᵀ(S + Λ_a)⁻¹ν_i)             (1)
    V_a  = Σ_i β_ai q_ai (S + Λ_a)⁻¹ν_i,   cov(x, f_a) = S V_a                                         (2)
    C_ab = Σ_ij (β_a β_bᵀ − [a = b] K̂_a⁻¹)_ij Q_ij − M_a M_b + [a = b] α_a² = cov(f_a, f_b),           (3)
           Q_ij = |R|^−½ k_a(x_i, m) k_b(x_j, m) exp(½ zᵀR⁻¹S z),
           R = S(Λ_a⁻¹ + Λ_b⁻¹) + I,   z = Λ_a⁻¹ν_i + Λ_b⁻¹ν_j
    E sin u_i = e^{−S_ii/2} sin m_i, and covariances alike: squash, sine and cosine                    (4)
    m' = m + M,   S' = S + C + G + Gᵀ,   G = cov(s, x) V                                               (5)
    E c  = 1 − |I + SW|^−½ exp(−½ (m − z)ᵀW(I + SW)⁻¹(m − z)),   c = 1 − exp(−½ (s − z)ᵀW(s − z))      (6)
    J    = Σ_{t=1..H} γ^{t−1} E c(s_t), by L-BFGS from the last policy                                 (7)
    fit:   ½ yᵀβ + ½ log|K̂| + Σ_d (ln(ℓ_d/std x_d)/ln 100)³⁰ + (ln(α/σ)/ln 1000)³⁰, by L-BFGS          (8)

The policy, linear or a sum of radial basis functions, which is the mean of a process with α = 1, σ = 0.01, is
squashed by sin, or by the authors' (9 sin u + sin 3u)/8. Each trial: fit, plan, act with the mean.

The authors' code has 10 basis functions for the cart-pole and searches 150 lines a trial; here 20, and 63
evaluations in all. As in that code S is of the latent f, without σ², and J begins at s_1.

    python algos/pilco.py                    # InvertedPendulum-v5 in about 200 steps: a minute on a laptop
    python algos/pilco.py --env-id experiments.tasks:pilco/CartPole-v0     # swing-up in about ten trials
    python algos/pilco.py --resume runs/<run>   # goes on where it stopped and ends in the same bits
"""

import contextlib
import ctypes
import dataclasses
import io
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, get_args

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import Tensor, nn, optim
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

Count = Annotated[int, (1, math.inf)]  # the pair is the allowed range
Natural = Annotated[int, (0, 2**31 - 1)]
Width = Annotated[int, (1, 65_536)]
Fraction = Annotated[float, (0, 1)]


@dataclass
class TrialRun:
    """The task, the loop around the agent and what it leaves on disk, for learners by trials."""

    env_id: str = "InvertedPendulum-v5"  # Gymnasium id; package.module:Name-v0 imports what registers it
    env_kwargs: str = "{}"  # JSON of the arguments of the task's constructor, as '{"frame_skip": 2}'
    seed: Natural = 1  # of weights, noise, replay sampling and the task; evaluation uses seed + 100
    total_timesteps: Count = 2_000  # environment steps, warm-up included
    learning_starts: Count = 200  # random actions before the first update (ours)
    buffer_size: Count = 1_000_000  # replay capacity; never more than total_timesteps
    eval_every: Count = 200  # steps between evaluations (ours)
    eval_episodes: Count = 5  # per evaluation, deterministic policy (ours)
    log_every: Count = 10  # steps between TensorBoard points; only then are metrics read and checked (ours)
    checkpoint_every: Annotated[int | None, (1, math.inf)] = 200  # steps; None: 5 000 or 1/50, or 2 minutes
    runs_dir: str = "runs"  # parent of the run folders
    resume: str = ""  # run folder to go on with, by its own arguments; only --total-timesteps may be raised
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes a GPU where there is one
    cuda_graphs: bool = True  # on a GPU replay the agent's methods as captured graphs: the same bits, faster
    num_threads: Annotated[int, (1, 1024)] = 2  # CPU threads of PyTorch; a run's exact bits depend on it
    capture_video: bool = False  # film the first episode of each evaluation (needs moviepy)


class Known(NamedTuple):
    """What a planner must be told of a task, as the flags of the same names say it."""

    angles: str  # places in the observation
    start_mean: str  # m₀ of the observation
    start_std: str  # square roots of the diagonal S₀
    cost_target: str  # z of (6), of the observation with each angle replaced, at the end, by sine and cosine
    cost_weights: str  # W of (6), times width², of the same
    cost_width: float


TIP = "[[1, 0, 0, 0.5, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0], [0.5, 0, 0, 0.25, 0], [0, 0, 0, 0, 0.25]]"
KNOWN = {  # by the task's id without version
    "InvertedPendulum": Known("[]", "0", "0.01", "0", "[1, 100, 0, 0]", 1.0),
    "pilco/CartPole": Known("[3]", "0", "0.1", "[0, 0, 0, 0, -1]", TIP, 0.25),  # squared distance of the tip
}
SETUPS = {
    "pendulum": {"total_timesteps": 300, "learning_starts": 50, "eval_every": 25, "checkpoint_every": 50},
    # the authors' 15 trials are 640 steps
    "cart-pole": {"total_timesteps": 440, "learning_starts": 40, "eval_every": 40, "checkpoint_every": 40}
    | {"policy": "rbf", "squash": "gsat", "plan_evaluations": 63, "trial_steps": 1_000},
}


@dataclass
class PILCO:
    """Belief planning; what describes the task is known of two, for any other it is given."""

    preset: Literal["auto", "pendulum", "cart-pole"] = "auto"  # auto: the task's; any flag overrides it
    horizon: Natural = 30  # H of (7), model steps (ours; authors' cart-pole: 40)
    gamma: Fraction = 1.0  # discount γ of the cost in (7) (authors' code)
    policy: Literal["linear", "rbf"] = "linear"  # before the squash
    centres: Width = 20  # radial basis functions (ours; authors' cart-pole: 10)
    squash: Literal["sin", "gsat"] = "sin"  # gsat: (9 sin u + sin 3u)/8 (authors' code)
    points: Width = 220  # most transitions that the processes are given; above it drawn at random (ours)
    trial_steps: Count = 100  # a longer episode is planned anew after so many steps (ours)
    fit_evaluations: Count = 200  # of (8), for each output (ours; authors' code: 300 line searches)
    plan_evaluations: Count = 40  # of (7) and its gradient, for each trial (ours; authors: 150 line searches)
    angles: str = ""  # JSON list of places in the observation that become sine and cosine; "": the task's
    start_mean: str = ""  # m₀, JSON: a number or one for each observation; "": the task's
    start_std: str = ""  # deviations of the start, JSON as start_mean; "": the task's
    cost_target: str = ""  # z of (6), JSON: a number or one for each feature: angles are sine, cosine, last
    cost_weights: str = ""  # W of (6) · width², JSON: a number, as many as cost_target, or a matrix
    cost_width: Annotated[float | None, (1e-9, 1e9)] = None  # width of the cost's valley; None: task's or 1


def known(env_id: str) -> Known | None:
    """The known description of a task, found by its id without version, with or without its module."""
    return KNOWN.get(re.sub(r"-v\d+$", "", env_id.split(":")[-1]))


@dataclass
class Args(TrialRun, PILCO):
    """Everything that can be set."""

    def __post_init__(self) -> None:
        check(self)
        for name, least in (("horizon", 1), ("points", 2), ("buffer_size", 2)):
            require(getattr(self, name) >= least, name, getattr(self, name), f"at least {least}")
        flags = ("start_mean", "start_std", "cost_target", "cost_weights")
        told = known(self.env_id) or all(getattr(self, flag) for flag in flags)
        ask = "--" + ", --".join(flags).replace("_", "-") + ", and --angles where there are some"
        allowed = f"of a task with a known cost ({', '.join(KNOWN)}), or given {ask}"
        require(told, "env_id", self.env_id, allowed)
        for flag in ("angles", *flags):
            value = getattr(self, flag)
            try:
                numbers = np.asarray(json.loads(value or "0"), float)
                fit = np.isfinite(numbers).all() and numbers.ndim <= (2 if flag == "cost_weights" else 1)
            except (TypeError, ValueError):
                fit = False
            require(fit, flag, value, "JSON: a number or a list of them")

    @classmethod
    def defaults(cls, given: dict) -> dict:
        """The dataclass's defaults, then the preset's."""
        swing_up = given["env_id"].split(":")[-1].startswith("pilco/CartPole")
        name = {"auto": "cart-pole" if swing_up else "pendulum"}.get(given["preset"], given["preset"])
        return dataclasses.asdict(cls()) | SETUPS[name]


class Problem(NamedTuple):
    """F features: the observation's n numbers without the A angles, then sine and cosine of each."""

    angles: list[int]
    start_mean: Tensor  # [n]
    start_cov: Tensor  # [n, n]
    target: Tensor  # [F]
    weights: Tensor  # [F, F]


def problem_of(args: Args, obs_dim: int) -> Problem:
    """Start and cost from the flags, or from what is known of the task. BadInput if they do not fit it."""
    task = known(args.env_id)
    given = lambda flag: getattr(args, flag) or getattr(task, flag, "[]")
    angles = json.loads(given("angles"))
    fit = isinstance(angles, list) and all(type(i) is int and 0 <= i < obs_dim for i in angles)
    fit = fit and len(set(angles)) == len(angles)
    require(fit, "angles", given("angles"), f"a list of different places from 0 to {obs_dim - 1}")

    def vector(flag: str, size: int) -> Tensor:
        value = torch.tensor(json.loads(given(flag)), dtype=torch.float64)
        fit = value.dim() == 0 or value.shape == (size,)
        require(fit, flag, given(flag), f"a number or {size}")
        return value.expand(size).clone()

    mean, std, features = vector("start_mean", obs_dim), vector("start_std", obs_dim), obs_dim + len(angles)
    fit = (std > 0).all() and std.square().isfinite().all()
    require(bool(fit), "start_std", given("start_std"), "positive, with a finite square")
    weights = torch.tensor(json.loads(given("cost_weights")), dtype=torch.float64)
    if weights.dim() < 2:
        weights = vector("cost_weights", features).diag()
    fit = weights.shape == (features, features) and torch.equal(weights, weights.T)
    fit = fit and torch.linalg.eigvalsh(weights)[0] > -1e-9
    allowed = f"a number, {features} or a symmetric matrix of {features} x {features}, none negative"
    require(bool(fit), "cost_weights", given("cost_weights"), allowed)
    width = args.cost_width or getattr(task, "cost_width", 1.0)
    return Problem(angles, mean, std.square().diag(), vector("cost_target", features), weights / width**2)


Matched = tuple[Tensor, Tensor, Tensor]  # of outputs given inputs N(m, S): M [E], C [E, E], V [D, E] of (2)


class Posterior(NamedTuple):
    """E processes given n points: what (1) to (3) need, factorised once."""

    inputs: Tensor  # [n, D]
    log_length: Tensor  # [E, D] log ℓ
    log_signal: Tensor  # [E] log α
    beta: Tensor  # [E, n]
    weights: Tensor  # [E (E + 1) / 2, n, n] β_a β_bᵀ − [a = b] K̂_a⁻¹ of the pairs a ≤ b
    variance: Tensor  # [E] α², or what the diagonal of C gains instead


def kernel(inputs: Tensor, log_length: Tensor, log_signal: Tensor) -> Tensor:
    """α² exp(−½ Σ_d (x_d − x'_d)²/ℓ_d²): inputs [n, D], log ℓ [E, D], log α [E] -> [E, n, n]."""
    scaled = (inputs - inputs.mean(0).detach()) * (-log_length).exp()[:, None]
    squares = scaled.square().sum(2)
    distance = squares[:, :, None] + squares[:, None] - 2 * scaled @ scaled.mT
    return (2 * log_signal[:, None, None] - 0.5 * distance.clamp_min(0)).exp()


def noisy_kernel(inputs: Tensor, log_length: Tensor, log_signal: Tensor, log_noise: Tensor) -> Tensor:
    """K̂ = K + σ² I [E, n, n]; σ counts as at least 1e-3 α, so that it can be factorised."""
    noise = torch.maximum(2 * log_noise, 2 * log_signal + math.log(1e-6)).exp()
    eye = torch.eye(len(inputs), dtype=inputs.dtype, device=inputs.device)
    return kernel(inputs, log_length, log_signal) + noise[:, None, None] * eye


def condition(
    inputs: Tensor, targets: Tensor, log_length: Tensor, log_signal: Tensor, log_noise: Tensor, sure=False
) -> Posterior:
    """inputs [n, D], targets [n, E], log ℓ [E, D], log α and log σ [E]. With `sure` f is the mean itself, and
    the diagonal of C gains 1e-6, as in the authors' code for policies."""
    assert len(inputs) == len(targets) and log_length.shape == (targets.shape[1], inputs.shape[1])
    factor = torch.linalg.cholesky(noisy_kernel(inputs, log_length, log_signal, log_noise))
    beta = torch.cholesky_solve(targets.T[:, :, None], factor).squeeze(2)
    a, b = torch.triu_indices(len(beta), len(beta), device=beta.device)
    weights = beta[a, :, None] * beta[b, None]
    if sure:
        return Posterior(inputs, log_length, log_signal, beta, weights, torch.full_like(log_signal, 1e-6))
    weights[a == b] -= torch.cholesky_inverse(factor)
    return Posterior(inputs, log_length, log_signal, beta, weights, (2 * log_signal).exp())


class WeightedExponentials(torch.autograd.Function):
    """Σ_ij W_ij exp(left_i · right_j) for each pair: [P, n, D], [P, n, D], [P, n, n] -> [P].

    Nearly all of the time goes by here: one n x n array an imagined step is kept, and passed over seldom.
    """

    @staticmethod
    def forward(ctx, left: Tensor, right: Tensor, weights: Tensor) -> Tensor:
        kept = (left @ right.mT).exp_()
        ctx.constant = not ctx.needs_input_grad[2]  # weights of processes, not of the policy
        terms = kept.mul_(weights) if ctx.constant else kept * weights
        ctx.save_for_backward(left, right, weights, kept)
        return terms.sum((1, 2))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        left, right, weights, kept = ctx.saved_tensors
        terms, grad = kept if ctx.constant else kept * weights, grad[:, None, None]
        return grad * (terms @ right), grad * (terms.mT @ left), None if ctx.constant else grad * kept


def moment_matching(mean: Tensor, cov: Tensor, process: Posterior) -> Matched:
    """Exact moments of the processes' outputs for inputs N(mean [D], cov [D, D])."""
    inputs, log_length, log_signal, beta, weights, variance = process
    assert mean.shape == inputs.shape[1:] and cov.shape == (len(mean), len(mean))
    offset, precision = inputs - mean, (-2 * log_length).exp()  # ν [n, D], 1/ℓ² [E, D]
    spread = cov + (2 * log_length).exp().diag_embed()  # S + Λ [E, D, D]
    solved = torch.linalg.solve(spread, offset.T.expand(len(beta), -1, -1))  # [E, D, n]
    half_log = torch.linalg.slogdet(spread)[1] / 2 - log_length.sum(1)
    exponent = 2 * log_signal[:, None] - half_log[:, None] - 0.5 * (offset.T * solved).sum(1)
    weighted = beta * exponent.exp()
    M = weighted.sum(1)  # (1)
    V = (solved @ weighted[:, :, None]).squeeze(2).T  # (2)

    a, b = torch.triu_indices(len(beta), len(beta), device=beta.device)
    eye = torch.eye(len(mean), dtype=mean.dtype, device=mean.device)
    R = cov * (precision[a] + precision[b])[:, None] + eye
    inner = torch.linalg.solve(R, cov.expand_as(R))  # R⁻¹S [pairs, D, D]
    scaled = offset * precision[:, None]  # Λ⁻¹ν [E, n, D]
    log_k = 2 * log_signal[:, None] - 0.5 * (offset * scaled).sum(2)
    left, right = scaled[a] @ inner, scaled[b]
    row = log_k[a] + 0.5 * (left * scaled[a]).sum(2) - torch.linalg.slogdet(R)[1][:, None] / 2
    column = log_k[b] + 0.5 * (right @ inner * right).sum(2)
    left = torch.cat([left, torch.stack([row, torch.ones_like(row)], 2)], 2)
    right = torch.cat([right, torch.stack([torch.ones_like(column), column], 2)], 2)
    upper = WeightedExponentials.apply(left, right, weights) - M[a] * M[b]  # (3)
    C = torch.zeros_like(cov[:1, :1].expand(len(beta), len(beta))).index_put((a, b), upper)
    return M, C + C.triu(1).T + variance.diag(), V


def sine_moments(mean: Tensor, cov: Tensor, scale: Tensor) -> Matched:
    """Of e_i sin u_i for u ~ N(mean [k], cov [k, k]), scale e [k]."""
    assert mean.shape == scale.shape and cov.shape == (len(mean), len(mean))
    damped = scale * (-cov.diag() / 2).exp()
    M = damped * mean.sin()
    total = (cov.diag()[:, None] + cov.diag()) / 2
    less, more = (cov - total).exp() - (-total).exp(), (-cov - total).exp() - (-total).exp()
    C = less * (mean[:, None] - mean).cos() - more * (mean[:, None] + mean).cos()
    return M, 0.5 * scale[:, None] * scale * C, (damped * mean.cos()).diag()  # (4)


def gsat_moments(mean: Tensor, cov: Tensor) -> Matched:
    """Of (9 sin u + sin 3u)/8, which has slope 3/2 at 0 and is ±1 at ±π/2: sines of (u, 3u), added."""
    eye = torch.eye(len(mean), dtype=mean.dtype, device=mean.device)
    twice, both = torch.cat([eye, 3 * eye]), torch.cat([eye, eye])
    scale = torch.tensor([9 / 8, 1 / 8], dtype=mean.dtype, device=mean.device).repeat_interleave(len(mean))
    M, C, V = sine_moments(twice @ mean, twice @ cov @ twice.T, scale)
    return both.T @ M, both.T @ C @ both, twice.T @ V @ both


def angle_moments(mean: Tensor, cov: Tensor) -> Matched:
    """Of (sin θ_1, cos θ_1, sin θ_2, ...) of k angles θ ~ N(mean [k], cov [k, k]): cos θ = sin(θ + π/2)."""
    k = len(mean)
    twice = torch.eye(k, dtype=mean.dtype, device=mean.device).repeat_interleave(2, 0)  # [2k, k]
    shift = torch.tensor([0, math.pi / 2], dtype=mean.dtype, device=mean.device).repeat(k)
    M, C, V = sine_moments(twice @ mean + shift, twice @ cov @ twice.T, torch.ones_like(shift))
    return M, C, twice.T @ V


def saturating_cost(mean: Tensor, cov: Tensor, target: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance, scalars, of 1 − exp(−½ (x − z)ᵀW(x − z)) for x ~ N(mean [F], cov [F, F])."""
    assert mean.shape == target.shape and cov.shape == weights.shape
    eye, offset = torch.eye(len(mean), dtype=mean.dtype, device=mean.device), mean - target

    def valley(times: int) -> Tensor:  # E of the exponential to this power
        spread = eye + times * cov @ weights
        quadratic = offset @ weights @ torch.linalg.solve(spread, offset)
        return (-torch.linalg.slogdet(spread)[1] / 2 - times * quadratic / 2).exp()

    near = valley(1)
    return 1 - near, valley(2) - near.square()  # (6)


def negative_log_likelihood(
    inputs: Tensor, target: Tensor, log_length: Tensor, log_signal: Tensor, log_noise: Tensor
) -> Tensor:
    """−log p(y | inputs) of one process: inputs [n, D], target [n], log ℓ [D], scalars -> scalar."""
    assert target.shape == inputs.shape[:1] and log_length.shape == inputs.shape[1:]
    covariance = noisy_kernel(inputs, log_length[None], log_signal[None], log_noise[None])[0]
    factor = torch.linalg.cholesky(covariance)
    half = torch.linalg.solve_triangular(factor, target[:, None], upper=False)
    return half.square().sum() / 2 + factor.diag().log().sum() + len(target) / 2 * math.log(2 * math.pi)


def curb(log_length: Tensor, log_signal: Tensor, log_noise: Tensor, log_std: Tensor) -> Tensor:
    """Penalty on ℓ far from the inputs' std, by a factor of 100, and on α/σ beyond 1 000: ℓ [D]."""
    lengths = ((log_length - log_std) / math.log(100)).pow(30).sum()
    return lengths + ((log_signal - log_noise) / math.log(1000)).pow(30)


def descend_to_best(
    loss: Callable[[], Tensor], parameters: list[Tensor], evaluations: int
) -> tuple[float, int]:
    """L-BFGS; leaves the parameters where the loss was smallest. Returns it and the number of evaluations."""
    options = {"max_iter": evaluations, "max_eval": evaluations, "line_search_fn": "strong_wolfe"}
    optimizer, best, kept, count = optim.LBFGS(parameters, **options), math.inf, None, 0

    def closure() -> Tensor:
        nonlocal best, kept, count
        optimizer.zero_grad()
        value = loss()
        value.backward()
        count += 1
        if kept is None or value.item() < best:
            best, kept = value.item(), [p.detach().clone() for p in parameters]
        return value.detach()

    with contextlib.suppress(torch.linalg.LinAlgError):  # a step of the line search out of all bounds
        optimizer.step(closure)
    with torch.no_grad():
        torch._foreach_copy_(parameters, kept)
    optimizer.zero_grad()
    return best, count


def log_deviation(inputs: Tensor) -> Tensor:
    """[n, D] -> [D]; 0 for what never varies, which tells nothing."""
    std = inputs.std(0)
    return torch.where(std > 1e-9, std, 1).log()


class GaussianProcesses(nn.Module):
    """E processes over D inputs, their points (at most `points`, padded) and hyper-parameters, in float64."""

    def __init__(self, points: int, inputs: int, outputs: int):
        super().__init__()
        wide = lambda *shape: torch.zeros(*shape, dtype=torch.float64)
        self.register_buffer("inputs", wide(points, inputs))
        self.register_buffer("targets", wide(points, outputs))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("log_length", wide(outputs, inputs))
        self.register_buffer("log_signal", wide(outputs))
        self.register_buffer("log_noise", wide(outputs))

    def data(self) -> tuple[Tensor, Tensor]:
        return self.inputs[: self.count], self.targets[: self.count]

    def fit(self, inputs: Tensor, targets: Tensor, evaluations: int) -> None:
        """Take the points inputs [n, D], targets [n, E] and the hyper-parameters that minimise (8)."""
        self.count.fill_(len(inputs))
        self.inputs[: len(inputs)], self.targets[: len(inputs)] = inputs, targets
        log_std, deviation = log_deviation(inputs), targets.std(0)
        for a, target in enumerate(targets.T):
            log_signal = deviation[a].clamp_min(1e-6).log()
            start = torch.cat([log_std, log_signal[None], (log_signal - math.log(10))[None]])
            guess = start.clone().requires_grad_()

            def loss(guess=guess, target=target) -> Tensor:  # (8)
                parts = guess[:-2], guess[-2], guess[-1]
                return negative_log_likelihood(inputs, target, *parts) + curb(*parts, log_std)

            if deviation[a] > 1e-9:
                descend_to_best(loss, [guess], evaluations)
            best = guess.detach()
            self.log_length[a], self.log_signal[a], self.log_noise[a] = best[:-2], best[-2], best[-1]

    def posterior(self) -> Posterior:
        return condition(*self.data(), self.log_length, self.log_signal, self.log_noise)


class LinearPolicy(nn.Module):
    """u = Wx + b of features x, before the squash."""

    def __init__(self, features: int, actions: int):
        super().__init__()
        self.weight = nn.Parameter(0.1 * torch.randn(actions, features, dtype=torch.float64))
        self.bias = nn.Parameter(torch.zeros(actions, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        """Features [B, F] -> [B, m]."""
        return x @ self.weight.T + self.bias

    def moments(self) -> Callable[[Tensor, Tensor], Matched]:
        """The function of a belief N(m [F], S [F, F])."""
        W, b = self.weight, self.bias
        return lambda m, S: (W @ m + b, W @ S @ W.T, W.T)


class RBFPolicy(nn.Module):
    """u = mean of a process, α = 1, σ = 0.01, with free targets at free centres, before the squash."""

    def __init__(self, centres: Tensor, actions: int, log_length: Tensor):
        super().__init__()
        self.centres = nn.Parameter(centres)
        self.targets = nn.Parameter(0.1 * torch.randn(len(centres), actions, dtype=torch.float64))
        self.log_length = nn.Parameter(log_length.repeat(actions, 1))

    def posterior(self) -> Posterior:
        zero = torch.zeros_like(self.targets[0])
        return condition(self.centres, self.targets, self.log_length, zero, zero + math.log(0.01), sure=True)

    def forward(self, x: Tensor) -> Tensor:
        """Features [B, F] -> [B, m]."""
        process = self.posterior()
        scaled = (x[:, None] - process.inputs)[:, None] * (-process.log_length).exp()[:, None]  # [B, m, n, F]
        return ((-0.5 * scaled.square().sum(3)).exp() * process.beta).sum(2)

    def moments(self) -> Callable[[Tensor, Tensor], Matched]:
        """The function of a belief N(m [F], S [F, F]), factorised once."""
        process = self.posterior()
        return lambda m, S: moment_matching(m, S, process)


def features_of(obs: Tensor, angles: list[int]) -> Tensor:
    """obs [B, n] -> [B, F]: without the angles, then sine and cosine of each."""
    rest = [i for i in range(obs.shape[1]) if i not in angles]
    circle = torch.stack([obs[:, angles].sin(), obs[:, angles].cos()], 2).flatten(1)
    return torch.cat([obs[:, rest], circle], 1)


def feature_moments(mean: Tensor, cov: Tensor, angles: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """State N(mean [n], cov [n, n]) -> its features' mean [F], cov [F, F] and cov(state, features) [n, F]."""
    if not angles:
        return mean, cov, cov
    rest = [i for i in range(len(mean)) if i not in angles]
    M, C, V = angle_moments(mean[angles], cov[angles][:, angles])  # (4)
    cross = torch.cat([cov[:, rest], cov[:, angles] @ V], 1)
    return (
        torch.cat([mean[rest], M]),
        torch.cat([cross[rest], torch.cat([cross[rest, len(rest) :].T, C], 1)]),
        cross,
    )


def next_belief(
    mean: Tensor, cov: Tensor, features: Matched, policy: Callable, squash: Callable, dynamics: Callable
) -> tuple[Tensor, Tensor]:
    """One step of N(mean [n], cov [n, n]), of given features, through policy, squash and dynamics of s' − s.

    These turn N(m, S) into Matched. cov(s, ·) is carried along: nothing is divided by S, which is singular
    where two features are functions of one angle.
    """
    z, cov_z, cross = features
    u, cov_u, V_u = policy(z, cov_z)
    action, cov_a, V_a = squash(u, cov_u)
    gain = V_u @ V_a  # cov(z, a) = cov(z) gain
    upper = torch.cat([cov_z, cov_z @ gain], 1)
    joint = torch.cat([upper, torch.cat([upper[:, len(z) :].T, cov_a], 1)])
    M, C, V = dynamics(torch.cat([z, action]), joint)
    G = torch.cat([cross, cross @ gain], 1) @ V
    after = cov + C + G + G.T  # (5)
    return mean + M, (after + after.T) / 2


class Batch(NamedTuple):
    """B transitions. `terminated` is 1 only where the task ended the episode, never at a time limit."""

    obs: Tensor  # [B, n]
    action: Tensor  # [B, m] in [−1, 1]
    reward: Tensor  # [B]
    next_obs: Tensor  # [B, n] the true successor, never a reset
    terminated: Tensor  # [B]


class ReplayBuffer:
    """Ring of transitions in float32, with each one's episode; BadInput if memory is too small for it."""

    def __init__(self, capacity: int, obs_dim: int, action_dim: int, device: torch.device):
        self.widths = (obs_dim, action_dim, 1, obs_dim, 1)
        row_bytes = 2 * (4 * sum(self.widths) + 4)  # with its copy in a checkpoint
        most = int(0.9 * available_memory(device) / row_bytes)
        require(capacity <= most, "buffer_size", capacity, f"at most {most} in the memory available here")
        self.rows = torch.zeros(capacity, sum(self.widths), device=device)
        self.episode = torch.zeros(capacity, dtype=torch.int32, device=device)
        self.capacity, self.added = capacity, 0

    @property
    def size(self) -> int:
        return min(self.added, self.capacity)

    def add(self, obs, action, reward: float, next_obs, terminated: bool, episode: int) -> None:
        """Store one transition; the oldest goes when the ring is full."""
        at = self.added % self.capacity
        row = np.concatenate([obs, action, [reward], next_obs, [terminated]], dtype=np.float32)
        self.rows[at], self.episode[at] = torch.from_numpy(row), episode
        self.added += 1

    def __getitem__(self, at: Tensor) -> Batch:
        """The transitions in places `at` [B]."""
        obs, action, reward, next_obs, terminated = self.rows.index_select(0, at).split(self.widths, 1)
        return Batch(obs, action, reward.squeeze(1), next_obs, terminated.squeeze(1))

    def sample(self, batch_size: int) -> Tensor:
        """Places [batch_size], uniform with replacement."""
        return torch.randint(self.size, (batch_size,), device=self.rows.device)

    def state_dict(self) -> dict:
        """The filled part, copied: saving a view would save the whole ring."""
        rows, episode = (x[: self.size].to("cpu", copy=True) for x in (self.rows, self.episode))
        return {"added": self.added, "rows": rows, "episode": episode}

    def load_state_dict(self, state: dict) -> None:
        self.added = state["added"]
        self.rows[: self.size], self.episode[: self.size] = state["rows"], state["episode"]


REPORT = """losses/real_cost losses/predicted_cost losses/evaluations model/points
    losses/log_uncertainty model/noise model/length_scale""".split()


class Agent:
    """Processes, policy, and what the last plan was: between two plans nothing changes."""

    captured = ()  # the policy's mean is one small product, and learning reads its losses

    def __init__(self, args: Args, obs_dim: int, action_dim: int, device: torch.device):
        self.args, self.sizes, self.device = args, (obs_dim, action_dim), device
        self.problem = problem_of(args, obs_dim)
        angles, mean, cov, target, _ = self.problem
        if args.policy == "linear":
            actor = LinearPolicy(len(target), action_dim)
        else:  # centres where the task begins
            z, cov_z, _ = feature_moments(mean, cov, angles)
            root = torch.linalg.cholesky(cov_z + 1e-9 * torch.eye(len(z), dtype=z.dtype))
            centres = z + torch.randn(args.centres, len(z), dtype=z.dtype) @ root.T
            log_length = torch.zeros(1, len(z), dtype=z.dtype)
            log_length[:, len(mean) - len(angles) :] = math.log(0.7)
            actor = RBFPolicy(centres, action_dim, log_length)
        self.actor = actor.to(device)
        self.processes = GaussianProcesses(args.points, len(target) + action_dim, obs_dim).to(device)
        self.problem = Problem(angles, *(part.to(device) for part in self.problem[1:]))
        self.episode = torch.tensor(-1)  # under way at the last plan
        self.planned = torch.tensor(0)  # steps taken until then
        self.report = torch.zeros(len(REPORT), dtype=torch.float64, device=device)

    def make_buffer(self, capacity: int, env: gym.Env) -> ReplayBuffer:
        """The replay that `train` fills with steps of env; a descendant may store more of each."""
        return ReplayBuffer(capacity, env.observation_space.shape[0], env.action_space.shape[0], self.device)

    def act(self, obs: np.ndarray, deterministic: bool = False) -> np.ndarray:
        """obs [n] -> action [m] in [−1, 1]: the policy's mean, with `deterministic` and without."""
        obs = torch.as_tensor(np.float32(obs), device=self.device)
        return self.policy(obs[None], deterministic)[0].cpu().numpy()

    @torch.no_grad()
    def policy(self, obs: Tensor, deterministic: bool) -> Tensor:
        """obs [B, n] -> actions [B, m], in obs's precision."""
        u = self.actor(features_of(obs.double(), self.problem.angles))
        action = u.sin() if self.args.squash == "sin" else (9 * u.sin() + (3 * u).sin()) / 8
        return action.to(obs.dtype)

    def update(self, buffer: ReplayBuffer, step: int) -> dict[str, Tensor]:
        """Learn and plan where a trial has begun; the figures of the last plan."""
        newest = buffer.episode[(buffer.added - 1) % buffer.capacity].cpu()
        if newest != self.episode or buffer.added - self.planned >= self.args.trial_steps:
            before = newest.sub(1).clamp_min(0) if self.episode < 0 else self.episode
            real_cost = self.recorded_cost(buffer, before)
            self.episode.copy_(newest)
            self.planned.fill_(buffer.added)
            places = torch.arange(buffer.size, device=self.device)
            if buffer.size > self.args.points:
                places = torch.randperm(buffer.size)[: self.args.points].sort().values.to(self.device)
            self.report.copy_(torch.stack([real_cost, *self.learn(buffer[places])]))
        return dict(zip(REPORT, self.report.clone(), strict=True))

    def recorded_cost(self, buffer: ReplayBuffer, episode: Tensor) -> Tensor:
        """(7) of what was seen in the first H steps of an episode; steps after a terminal state cost 1."""
        oldest_first = (buffer.added - buffer.size + torch.arange(buffer.size)) % buffer.capacity
        places = oldest_first.to(self.device)
        places = places[buffer.episode[places] == episode.to(self.device)][: self.args.horizon]
        seen = buffer[places]
        z = features_of(seen.next_obs.double(), self.problem.angles) - self.problem.target
        lost = seen.terminated[-1:].sum()  # not where a time limit or a trial's end was the last
        cost = lost.to(z.dtype).repeat(self.args.horizon)
        cost[: len(z)] = 1 - (-0.5 * (z @ self.problem.weights * z).sum(1)).exp()
        return self.discounted(cost)

    def discounted(self, cost: Tensor) -> Tensor:
        """Σ γ^{t−1} c_t over cost [H] -> scalar."""
        return cost @ self.args.gamma ** torch.arange(len(cost), dtype=cost.dtype, device=cost.device)

    def beliefs(self, horizon: int, process: Posterior) -> tuple[Tensor, Tensor, Tensor]:
        """Means [H + 1, n] and covariances [H + 1, n, n] of s_0 .. s_H; mean and variance of costs [H, 2]."""
        angles, mean, cov, target, weights = self.problem
        policy = self.actor.moments()
        one = torch.ones(self.sizes[1], dtype=mean.dtype, device=mean.device)
        squash = gsat_moments if self.args.squash == "gsat" else lambda m, S: sine_moments(m, S, one)
        dynamics = lambda m, S: moment_matching(m, S, process)
        means, covs, costs, features = [mean], [cov], [], feature_moments(mean, cov, angles)
        for _ in range(horizon):
            mean, cov = next_belief(mean, cov, features, policy, squash, dynamics)
            features = feature_moments(mean, cov, angles)
            costs.append(torch.stack(saturating_cost(*features[:2], target, weights)))
            means, covs = [*means, mean], [*covs, cov]
        return torch.stack(means), torch.stack(covs), torch.stack(costs)

    def learn(self, batch: Batch) -> list[Tensor]:
        """Fit the processes to n transitions, then plan by L-BFGS on J; all of REPORT but the real cost."""
        args, z = self.args, features_of(batch.obs.double(), self.problem.angles)
        inputs = torch.cat([z, batch.action.double()], 1)
        self.processes.fit(inputs, batch.next_obs.double() - batch.obs.double(), args.fit_evaluations)
        process = self.processes.posterior()
        J = lambda: self.discounted(self.beliefs(args.horizon, process)[2][:, 0])  # (7)
        cost, evaluations = descend_to_best(J, list(self.actor.parameters()), args.plan_evaluations)
        with torch.no_grad():
            end = self.beliefs(args.horizon, process)[1][-1]
        p, std = self.processes, log_deviation(inputs)
        noise, length = (p.log_noise - p.log_signal).mean().exp(), (p.log_length - std).mean().exp()
        numbers = torch.tensor([cost, evaluations, len(inputs)], dtype=end.dtype, device=end.device)
        return [*numbers, end.trace().log(), noise, length]

    def state_dict(self) -> dict:
        """Every module, optimiser and tensor the agent holds, found by type so that none is forgotten."""
        parts = {k: v for k, v in vars(self).items() if isinstance(v, Tensor | nn.Module | optim.Optimizer)}
        return {k: v.detach() if isinstance(v, Tensor) else v.state_dict() for k, v in parts.items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        for name, value in state.items():
            part = getattr(self, name)
            part.copy_(value) if isinstance(part, Tensor) else part.load_state_dict(value)


def train(args: Args) -> Path:
    """Start a run, or go on with args.resume; returns its folder.

    Raises BadInput for a mistake, before anything is on disk, and RunFailed for a run that cannot go on.
    """
    device, env = prepare(args), make_env(args.env_id, args.env_kwargs)
    env.reset(seed=args.seed)
    obs_dim, action_dim = env.observation_space.shape[0], env.action_space.shape[0]
    agent = Agent(args, obs_dim, action_dim, device)
    buffer = agent.make_buffer(min(args.buffer_size, args.total_timesteps), env)
    with RunFolder(args, env, agent, buffer, evaluate) as run:
        obs = begin_episode(env, agent)
        for step in run.steps():
            warm_up = step <= args.learning_starts
            action = 2 * torch.rand(action_dim).numpy() - 1 if warm_up else agent.act(obs)
            next_obs, reward, terminated, truncated, info = env.step(action)
            buffer.add(obs, action, reward, next_obs, terminated, run.episode)
            metrics = {} if warm_up else agent.update(buffer, step)
            obs = next_obs

            if step % args.log_every == 0:
                run.log(metrics | run.speed())
            if step % args.eval_every == 0 or step == args.total_timesteps:
                run.evaluate()
            if terminated or truncated:
                run.end_episode(info["episode"])
                obs = begin_episode(env, agent)
    return run.path


def evaluate(agent: Agent, args: Args, step: int, video_dir: Path | None = None) -> dict[str, float]:
    """Undiscounted return of the deterministic policy, on a task of its own and always from the same seed."""
    env, episodes = make_env(args.env_id, args.env_kwargs, video_dir), []
    for episode in range(args.eval_episodes):
        obs, done = begin_episode(env, agent, None if episode else args.seed + 100), False
        while not done:
            obs, _, terminated, truncated, info = env.step(agent.act(obs, deterministic=True))
            done = terminated or truncated
        episodes.append(info["episode"])
    env.close()
    returns, lengths = ([float(episode[key]) for episode in episodes] for key in "rl")
    stats = {"return_mean": np.mean(returns), "return_std": np.std(returns), "length_mean": np.mean(lengths)}
    return {"step": step} | {k: float(v) for k, v in stats.items()} | {"episodes": args.eval_episodes}


# --- the same in every file from here on: checks, task, run folder, graphs, command line ---

BadInput = type("BadInput", (ValueError,), {})  # the user's mistake, or the task's: one line, exit code 2
RunFailed = type("RunFailed", (RuntimeError,), {})  # cannot go on; exit code 1, its last checkpoint is kept
FILE, FORMAT, SIGNALS, WARNED = Path(globals().get("__file__", "notebook")).resolve(), 3, [], set()
ALGO, pytree, whole = FILE.stem, torch.utils._pytree, lambda x: int(f"{float(x):.17g}")  # 1e6 is a count
warn = lambda text: text in WARNED or WARNED.add(text) or tqdm.write(f"warning: {text}", file=sys.stderr)


def require(ok: bool, name: str, value: object, allowed: str) -> None:  # or BadInput that says what is
    if not ok:
        raise BadInput(f"--{name.replace('_', '-')} {value}: must be {allowed}")


def check(args) -> None:  # types, ranges in their annotation, and one against another
    options = lambda x: json.dumps(x if isinstance(x, dict) else json.loads(x), sort_keys=True)
    kinds = {int: whole, float: float, str: os.fspath, bool: {True: True, False: False}.__getitem__}
    kinds |= {kind | None: lambda x, read=read: x if x is None else read(x) for kind, read in kinds.items()}
    for field in dataclasses.fields(args):
        name, value, kind = field.name, getattr(args, field.name), field.type
        kind, *ranges = get_args(kind) if hasattr(kind, "__metadata__") else [kind]  # of Annotated
        if words := [word for word in get_args(kind) if isinstance(word, str)]:  # of a Literal
            require(value in words, name, value, f"one of {', '.join(words)}")
        elif kind in kinds:  # others are their owner's
            try:
                setattr(args, name, value := (options if name == "env_kwargs" else kinds[kind])(value))
            except (KeyError, TypeError, ValueError):
                shown = "JSON" if name == "env_kwargs" else f"of type {getattr(kind, '__name__', kind)}"
                require(False, name, value, shown)
            for low, high in (x for x in ranges if isinstance(x, tuple) and value is not None):
                allowed = f"at least {low}" if high == math.inf else f"in [{low}, {high}]"
                require(low <= value <= high and value < math.inf, name, value, allowed)
    batch, warm_up, total = getattr(args, "batch_size", 1), args.learning_starts, args.total_timesteps
    require(batch <= warm_up, "batch_size", batch, f"at most --learning-starts {warm_up}")
    require(warm_up < total, "learning_starts", warm_up, f"below --total-timesteps {total}")
    require(batch <= args.buffer_size, "buffer_size", args.buffer_size, f"at least --batch-size {batch}")


def prepare(args) -> torch.device:  # and threads, seed and determinism as the arguments say
    cuda = args.device != "cpu" and torch.cuda.is_available()
    require(cuda or args.device != "cuda", "device", "cuda", "auto or cpu here: torch finds no CUDA device")
    WARNED.clear()
    torch.set_num_threads(args.num_threads)
    torch.set_flush_denormal(True)
    torch.manual_seed(args.seed)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(cuda)
    args.device = "cuda" if cuda else "cpu"  # auto, once decided, is what a resumed run must agree on
    return torch.device(args.device)


def available_memory(device: torch.device) -> float:  # in bytes
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if Path("/proc/meminfo").exists():  # Linux
        return 1024 * int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 2**62


def finite(name: str, value, error=BadInput, size: int | None = None) -> np.ndarray:  # float32, or the error
    if SIGNALS:  # here, several times in each step, a signal ends the run
        raise SystemExit(128 + SIGNALS[0])
    with np.errstate(over="ignore"), contextlib.suppress(TypeError, ValueError):
        if size in (None, (result := np.asarray(value, np.float32)).size) and np.isfinite(result).all():
            return result
    wide = size in (None, np.size(value))
    kind = "finite in float32" if wide else f"of size {size}, not of shape {np.shape(value)}"
    raise error(f"{name} must be {kind}, got {value}")


class Boundary(gym.Wrapper):  # what a task says is checked; what it does wrong is named, or warned of
    taken, length, total = 0, 0, 0.0  # steps in all; those of the episode, and its return
    longest, see = 100_000, staticmethod(lambda obs: obs)  # steps of an episode of evaluation

    @contextlib.contextmanager
    def named(self):
        try:
            yield
        except (BadInput, RunFailed):
            raise
        except Exception as error:  # tasks fail in many ways
            api = "; has it the old Gym API, not Gymnasium's?" * isinstance(error, TypeError | ValueError)
            fault = f"the task failed after {self.taken} steps: {error!r}{api}"
            raise (RunFailed if self.taken else BadInput)(fault) from error

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        generator, self.length, self.total = getattr(self.unwrapped, "np_random", None), 0, 0.0
        with self.named():
            obs, info = self.env.reset(seed=seed, options=options)
            if seed is None and generator is not getattr(self.unwrapped, "np_random", None):
                warn("the task renews its generator: without a seed at each reset resume will not be exact")
                return self.reset(seed=int(torch.randint(2**31, ())), options=options)
            return (info | {}, self.see(obs))[::-1]  # info first: of the old API it is none

    def step(self, action: np.ndarray) -> tuple:
        with self.named():
            obs, reward, terminated, truncated, info = self.env.step(action)
            finite("the task's reward", reward, size=1)
            obs, reward = self.see(obs), float(np.asarray(reward).item())
            if not (terminated in (0, 1) and truncated in (0, 1)):
                raise BadInput(f"terminated and truncated must be flags, got {terminated} and {truncated}")
            self.taken, self.length, self.total = self.taken + 1, self.length + 1, self.total + reward
            if self.length > self.longest:
                raise BadInput(f"an evaluation's episode exceeds {self.longest} steps: set max_episode_steps")
            end = {"episode": {"r": self.total, "l": self.length}} if terminated or truncated else {}
            return obs, reward, bool(terminated), bool(truncated), info | end

    def close(self) -> None:
        with contextlib.suppress(Exception):
            return super().close()
        warn("the task's close() failed")


def make_env(env_id: str, env_kwargs: str = "{}", video_dir: Path | None = None, raw=False) -> gym.Env:
    """The task, actions in [−1, 1], numbers flat and float32, or `raw`; with video_dir one can watch it."""
    try:
        options = json.loads(env_kwargs) | ({"render_mode": "rgb_array"} if video_dir else {})
        env = gym.make(env_id, disable_env_checker=True, **options)
        if video_dir:  # tried out before RecordVideo makes its folder
            env.reset()
            env.render()
            env = gym.wrappers.RecordVideo(env, str(video_dir), lambda i: i == 0, disable_logger=True)
    except Exception as error:  # tasks and renderers fail in many ways
        require(not video_dir, "capture_video", True, f"off where rendering fails: {error!r}")
        require(False, "env_id", env_id, f"a task that can be made with --env-kwargs {env_kwargs}: {error!r}")
    Box, box, space = gym.spaces.Box, env.action_space, env.observation_space
    real = isinstance(box, Box) and np.issubdtype(box.dtype, np.floating)
    fit = real and 0 < (width := np.subtract(box.high, box.low, dtype=float)).min() <= width.max() < 3.4e38
    require(fit, "env_id", env_id, f"with a bounded, continuous Box of actions in float32's range, not {box}")
    low, high = box.low.ravel(), box.high.ravel()  # which the rounding of RescaleAction overshoots
    fit = lambda a: np.clip(finite("the agent's action", a, RunFailed), low, high).reshape(box.shape)
    env = gym.wrappers.TransformAction(env, fit, Box(low, high, dtype=box.dtype))
    env = Boundary(gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1)))
    if not raw:
        require(isinstance(space, Box), "env_id", env_id, f"with Box observations, not {space} (flatten it)")
        env.observation_space = Box(-np.inf, np.inf, (math.prod(space.shape),), np.float32)
        see = lambda obs: finite("the task's observation", obs, size=math.prod(space.shape))
        env.see = lambda obs: see(obs).flatten()  # a copy: tasks may reuse their array
    return env


def begin_episode(env: gym.Env, agent, seed: int | None = None) -> np.ndarray:
    return (getattr(agent, "begin_episode", int)(), env.reset(seed=seed)[0])[1]  # told if it remembers


def captured(method):  # as CUDA graphs, one a signature; it reads no tensor, and overwrites what it returned
    graphs, tensors = {}, lambda tree: [x for x in pytree.tree_leaves(tree) if isinstance(x, Tensor)]
    alike = lambda x: x.new().set_(x.untyped_storage().clone(), x.storage_offset(), x.shape, x.stride())

    def call(*args):
        signature = tuple(x.shape if isinstance(x, Tensor) else x for x in pytree.tree_leaves(args))
        graph = graphs.setdefault(signature, {"ordinary": [1, 2, 3]})
        if graph["ordinary"] and graph["ordinary"].pop():  # calls, on a side stream as capture demands
            main, side = torch.cuda.current_stream(), torch.cuda.Stream()
            side.wait_stream(main)
            with torch.cuda.stream(side):
                result = method(*args)
            return (main.wait_stream(side), result)[1]
        if "graph" not in graph:
            graph |= {"graph": torch.cuda.CUDAGraph(), "inputs": pytree.tree_map_only(Tensor, alike, args)}
            with torch.cuda.graph(graph["graph"]):  # executes nothing, but resets the generator
                graph["result"] = method(*graph["inputs"])
            torch.cuda.synchronize()  # or, on a busy GPU, the first replay draws the numbers of offset 0
        torch._foreach_copy_(tensors(graph["inputs"]), tensors(args))
        graph["graph"].replay()
        return graph["result"]

    return call


class RunFolder(contextlib.AbstractContextManager):  # what a run leaves on disk
    def __init__(self, args, env: gym.Env, agent, buffer, evaluate):
        self.args, self.env, self.agent, self.buffer, self.evaluation = args, env, agent, buffer, evaluate
        self.step, self.episode, self.rows, self.saved, self.last_time = 0, 0, [], 0, 0.0
        self.writer, self.began, self.complete = None, time.perf_counter(), False
        for name in agent.captured if agent.device.type == "cuda" and args.cuda_graphs else ():
            setattr(agent, name, captured(getattr(agent, name)))
        name = f"{args.env_id}__{ALGO}__{args.seed}__{datetime.now():%Y%m%d-%H%M%S-%f}"
        self.path = Path(args.resume or Path(args.runs_dir, re.sub(r"[^\w.-]+", "-", name)))
        self.again = f"to continue: {shlex.join(['python', sys.argv[0], '--resume', str(self.path)])}"
        resets = (pytree.tree_leaves(env.reset(seed=args.seed)[0]) for _ in range(2))
        all(map(np.array_equal, *resets)) or warn("the task ignores its seed: resume will not be exact")
        git = "git describe --always --dirty --abbrev=40"
        git = subprocess.run(git, shell=True, cwd=FILE.parent, capture_output=True, text=True).stdout
        self.uses = {m.__name__: str(m.__version__) for m in (torch, np, gym, sys.modules.get("mujoco")) if m}
        self.uses |= {"python": sys.version.split()[0], "git_commit": git.strip() or None}
        self.history = [self.uses | {"since_step": 0}]
        if args.resume:
            self.restore()
        else:  # everything that can be wrong is asked before a file is touched
            self.evaluate()
            self.save("checkpoint.pt")
        env.longest, self.last_step, self.last_time = math.inf, self.step, time.perf_counter()

    def __exit__(self, kind, error, trace) -> None:
        with contextlib.suppress(AttributeError, OSError):  # there is none, or a full disk
            self.writer.close()
        self.env.close()
        if isinstance(error, SystemExit | KeyboardInterrupt):
            print(f"stopped at step {self.step}; {self.again}", file=sys.stderr)
        if isinstance(error, BadInput | RunFailed | OSError):
            kind = BadInput if isinstance(error, BadInput) else RunFailed
            raise kind(f"step {self.step}: {error}; its last checkpoint is kept, {self.again}") from error

    def steps(self, at_once: int = 1):  # the numbers of those that are left to take
        total, pace = self.args.total_timesteps, 0.5 if sys.stderr.isatty() else 30
        if self.complete:
            return print(f"{self.path} is complete: {total} steps")
        with tqdm(total=total, initial=self.step, mininterval=pace) as self.bar:
            while self.step < total:
                self.step += at_once
                yield self.step
                self.bar.update(at_once)
        self.save("final.pt")
        print(f"done: {self.path}")

    def speed(self) -> dict[str, float]:  # since the last call, evaluations left out
        steps, took = self.step - self.last_step, time.perf_counter() - self.last_time
        self.last_step, self.last_time = self.step, time.perf_counter()
        return {"charts/SPS": steps / took, "time/seconds": self.last_time - self.began}

    def log(self, scalars: dict[str, object]) -> None:
        for name, value in scalars.items():
            if not math.isfinite(value := float(value)):
                raise RunFailed(f"{name} is {value}")
            self.writer.add_scalar(name, value, self.step)

    def end_episode(self, episode: dict[str, float], count: int = 1) -> None:
        self.log({"charts/episodic_return": episode["r"], "charts/episodic_length": episode["l"]})
        self.bar.set_postfix_str(f"return={episode['r']:.1f}", refresh=False)
        self.episode += count  # only between episodes is the task's state no more than its generator's
        every, slow = self.args.checkpoint_every, time.perf_counter() > self.saved_at + 120  # seconds
        least = every or (not slow and max(5_000, self.args.total_timesteps / 50))
        if self.saved + least <= self.step < self.args.total_timesteps:
            self.save("checkpoint.pt")

    def evaluate(self) -> None:  # a row of eval.csv, points in TensorBoard, a line on the screen
        before, agent, videos = time.perf_counter(), self.agent, self.path / "videos" / f"step-{self.step}"
        kept = {name: getattr(agent, name).clone() for name in getattr(agent, "acting", ())}
        with torch.random.fork_rng([agent.device] if agent.device.type == "cuda" else []):
            torch.manual_seed(self.args.seed + 100)
            row = self.evaluation(agent, self.args, self.step, videos if self.args.capture_video else None)
        agent.load_state_dict(kept)
        self.rows.append(row | {"seconds": round(time.perf_counter() - self.began, 2)})
        self.write_rows()
        text = "step {step:>8}  evaluation return {return_mean:9.2f} ± {return_std:.2f}".format(**row)
        tqdm.write(text + "".join(f"  {name} {row[name]:.2f}" for name in list(row)[4:-1]))
        tags = {"return_mean": "episodic_return", "length_mean": "episodic_length"}
        self.log({f"eval/{tags.get(name, name)}": row[name] for name in ("return_mean", *list(row)[3:-1])})
        self.last_time += (took := time.perf_counter() - before)
        self.log({"time/evaluation": took})

    def write_rows(self) -> None:  # a run's folder begins with its first row: nothing is left of less
        lines = [",".join(self.rows[0]), *(",".join(map(str, row.values())) for row in self.rows), ""]
        self.write("eval.csv", lambda file: file.write("\n".join(lines).encode()))
        self.writer = self.writer or SummaryWriter(self.path, "", self.step + 1 if self.args.resume else None)

    def write(self, name: str, write) -> None:  # so that the file holds old bytes or new
        path, temporary = self.path / name, self.path / f"{name}.tmp"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            if path.suffix == ".pt" and path.exists():
                path.replace(path.with_suffix(".previous.pt"))
            temporary.replace(path)
        except (OSError, RuntimeError) as error:  # torch.save hides a full disk in the latter
            require(self.writer, "runs_dir", self.path.parent, f"a folder that can be written: {error}")
            temporary.unlink(missing_ok=True)
            raise RunFailed(f"cannot write {path}: {error}") from error

    def save(self, name: str) -> None:  # all that the rest of the run depends on
        agent, rng = self.agent.state_dict(), getattr(self.env.unwrapped, "np_random", None)
        for keys, leaf in pytree.tree_flatten_with_path(agent)[0]:
            if isinstance(leaf, Tensor) and not leaf.isfinite().all():
                raise RunFailed(f"{'.'.join(str(getattr(key, 'key', key)) for key in keys)} is not finite")
        old = isinstance(rng, np.random.RandomState)
        task = rng.get_state(legacy=False) if old else getattr(getattr(rng, "bit_generator", 0), "state", 0)
        state = {"args": dataclasses.asdict(self.args) | {"resume": ""}, "algo": ALGO, "format": FORMAT}
        state |= {"step": self.step, "episode": self.episode, "rows": self.rows, "history": self.history}
        state |= {"seconds": time.perf_counter() - self.began, "sizes": self.agent.sizes, "agent": agent}
        state |= {"cuda_rng": torch.cuda.get_rng_state() if self.agent.device.type == "cuda" else None}
        state |= {"torch_rng": torch.get_rng_state(), "task_rng": json.dumps(task, default=np.ndarray.tolist)}
        state |= {"buffer": self.buffer.state_dict()}
        self.writer.flush()
        self.write(name, lambda file: torch.save(state, file))
        record = {k: state[k] for k in ("algo", "args", "history")} | self.history[-1]  # for people and tools
        self.write("args.json", lambda file: file.write(json.dumps(record, indent=2).encode()))
        self.saved, self.saved_at = self.step, time.perf_counter()

    def restore(self) -> None:  # BadInput where the run would not be one and the same
        saved, args, final = load_checkpoint(self.path), self.args, self.path / "final.pt"
        began, longer = saved["args"], args.total_timesteps > saved["args"]["total_timesteps"]
        for name, value in (began | {"resume": args.resume}).items():
            same = getattr(args, name, value) == value or (longer and name == "total_timesteps")
            allowed = f"{value} as in {self.path}: a resumed run may only get more --total-timesteps"
            require(same, name, getattr(args, name, value), allowed)
        if other := ", ".join(sorted(began.keys() ^ vars(args).keys())):
            warn(f"since {self.path} began its file has gained (default taken) or lost: {other}")
        self.complete = final.exists() and not longer
        if self.complete:
            return
        try:
            self.agent.load_state_dict(saved["agent"])
            self.buffer.load_state_dict(saved["buffer"])
        except (KeyError, RuntimeError, ValueError) as error:
            raise BadInput(f"--resume {self.path}: must fit the task as it is now: {error}") from error
        self.step, self.episode, self.rows = self.saved, *_ = [saved[k] for k in ("step", "episode", "rows")]
        self.began, before, now = self.began - saved["seconds"], saved["history"][-1], self.uses
        if changed := [f"{k} {before.get(k)} -> {now[k]}" for k in now if now[k] != before.get(k)]:
            warn(f"since {self.path} began: {', '.join(changed)}; its last bits may be others")
        self.history = saved["history"] + [now | {"since_step": self.step}] * bool(changed)
        if task := json.loads(saved["task_rng"]):
            rng = self.env.unwrapped.np_random
            rng.set_state(task) if hasattr(rng, "set_state") else setattr(rng.bit_generator, "state", task)
        torch.set_rng_state(saved["torch_rng"])
        torch.cuda.set_rng_state(saved["cuda_rng"]) if args.device == "cuda" else None
        final.unlink(missing_ok=True)
        self.write_rows()
        self.save("checkpoint.pt")  # a run's length and versions are part of it


def load(run_dir: str | Path, device: str = "cpu"):
    """A run's agent, as last saved, and its arguments: agent.act(obs, deterministic=True) is in [−1, 1]."""
    args, saved = parse(["--resume", str(run_dir)]), load_checkpoint(Path(run_dir), "final.pt")
    agent = Agent(args, *saved["sizes"], torch.device(device))
    agent.load_state_dict({name: part for name, part in saved["agent"].items() if hasattr(agent, name)})
    return agent, dataclasses.replace(args, resume="")


def load_checkpoint(run_dir: Path, *better: str) -> dict:  # BadInput if damaged, foreign or none
    names = [*better, "checkpoint.pt", "checkpoint.previous.pt", "final.pt"]  # killed between two renames
    path = next((run_dir / name for name in names if (run_dir / name).exists()), run_dir / names[-1])
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)  # runs no code
        found, ours = f"{state['algo']}, format {state['format']}", f"{ALGO}, format {FORMAT}"
    except Exception:  # missing and damaged files raise many types
        require(False, "resume", run_dir, "a run folder with a checkpoint.pt; delete it if it is unreadable")
    require(found == ours, "resume", run_dir, f"a run of {ours}, not {found}")
    return state


def parse(argv: list[str] | None = None):
    """Args from the command line over a run's own, or what `Args.defaults` makes of it. Raises BadInput."""
    spec, rules = tyro.constructors.PrimitiveConstructorSpec, tyro.constructors.ConstructorRegistry()
    count = spec(1, "INT", lambda words: whole(words[0]), lambda x: isinstance(x, int), lambda x: [str(x)])
    rules.primitive_rule(lambda info: count if info.type is int else None)

    def read(defaults: dict) -> dict:
        groups = [g(**{f.name: defaults[f.name] for f in dataclasses.fields(g)}) for g in Args.__bases__]
        kinds = [(type(g).__name__, tyro.conf.OmitArgPrefixes[type(g)]) for g in groups]
        flags = dataclasses.make_dataclass("Flags", kinds)(*groups)
        try:
            with contextlib.redirect_stderr(io.StringIO()) as box:
                parsed = tyro.cli(type(flags), args=argv, description=__doc__, default=flags, registry=rules)
        except SystemExit as stop:
            text = " ".join(line.strip(" │|╭╮╰╯─+") for line in box.getvalue().splitlines()[1:])
            raise (BadInput(re.split(" Argument help| For full", text)[0]) if stop.code else stop) from None
        return {name: value for group in vars(parsed).values() for name, value in vars(group).items()}

    values = read(dataclasses.asdict(Args()))
    run, preset = values["resume"], getattr(Args, "defaults", dict)
    values = load_checkpoint(Path(run))["args"] if run else preset(values)
    return Args(**read(dataclasses.asdict(Args()) | values))


def main(learn) -> None:
    text = b"stopping; once more to kill\n"  # noted: raised anywhere, an exception can break a lock
    stop = lambda n, _: (os.write(2, text), SIGNALS.append(n), signal.signal(n, signal.SIG_DFL))
    sys.path += [os.getcwd(), str(FILE.parents[1])]  # --env-id package.module:Name-v0 finds modules there
    with contextlib.suppress(AttributeError, OSError, TypeError):
        sys.stdout.reconfigure(errors="replace")  # where a console has no ± it shows a question mark
        list(map(ctypes.CDLL(None).mallopt, (-1, -3), (1 << 28, 1 << 25)))  # keep freed memory: 10 %
    list(map(signal.signal, (signal.SIGINT, signal.SIGTERM), (stop, stop)))
    try:
        learn(parse())
    except (BadInput, RunFailed, OSError) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2 if isinstance(error, BadInput) else 1)


if __name__ == "__main__" and "__file__" in globals():  # a notebook's cell calls train itself
    main(train)
