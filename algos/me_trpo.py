"""Model-ensemble trust-region policy optimisation (ME-TRPO), Kurutach et al. 2018, arXiv 1802.10592.

K networks learn s' − s. TRPO trains the policy on whole episodes that they imagine, at each step another one:
what one of them has wrong the others do not repeat. They also say when to stop. No critic and no gradient
through the model: the policy gradient takes the likelihood ratio's way.

    L_f = Σ_k mean Σ_d (s'_d − f_k(s, a)_d)² / std_d²,   f_k = s + mean + std ∘ net_k(s, a)           (1)
    imagined:  a ~ N(μ(s), diag e^{2ℓ}),  k ~ U{1..K} anew for each row and step,
               s' = f_k(s, clip a),  r = r(s, clip a, s'),  0 after an end                            (2)
    Â_t = Σ_{u≥t} (γλ)^{u−t} (r_u + γ b(s_{u+1}) − b(s_u)),  b = 0 after T steps or an end; then
          (Â − mean) / (std + 1e-8).  With γ = λ = 1 it is the return that is left, minus b(s_t)      (3)
    b   = φᵀw,  φ = (s, s², τ, τ², τ³, 1), τ = t/100;  w by ridge regression on the batch before      (4)
    L   = −mean (π_θ/π_old)(a|s) Â,  D = mean KL(π_old ‖ π_θ),  g = ∇L,  Hv = ∇(∇D·v) + 1e-5 v        (5)
    x ≈ H⁻¹g by conjugate gradients;  θ_j = θ − 0.8^j √(2δ / (xᵀHx + 1e-8)) x: the first j < 15
        with L(θ_j) < L(θ) and D(θ_j) ≤ δ, else θ stays                                               (6)
    θ replaces the best if mean_k 1[J_k(θ) < J_k(best)] ≤ 0.3,  J_k the mean action's return in f_k   (7)

Every --collect-steps real steps the networks are fitted anew, then the policy is trained until (7) has failed
for --policy-patience updates; the best is kept. Real actions are clip(μ + u ξ), u ~ U(0, 1).

The paper stops at the first failure of (7), its code is patient; that code's (1) has no std, so that large
units rule (--loss-units raw), and both know the reward of tasks that never end. Here reward and end may also
be learned, and an imagined episode ends where the task would.

    python algos/me_trpo.py                    # Pendulum-v1: swings up after 1 000 to 2 000 steps
    python algos/me_trpo.py --members 1        # one network alone
    python algos/me_trpo.py --resume runs/<run>   # goes on where it stopped, in the same bits
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
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, get_args

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn, optim
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

Count = Annotated[int, (1, math.inf)]  # the pair is the allowed range
Natural = Annotated[int, (0, 2**31 - 1)]
Width = Annotated[int, (1, 65_536)]
Fraction = Annotated[float, (0, 1)]
Rate = Annotated[float, (0, math.inf)]


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


AUTHORS = {  # what --preset released sets
    "collect_steps": 3_000, "model_hidden": 1_024, "model_batch": 1_000, "held_out": 1 / 3, "patience": 25,
    "loss_units": "raw", "error_every": 5, "imagined_steps": 50_000, "max_kl": 0.01, "fisher_rows": 50_000,
    "iterations": 400, "fresh_every": 5, "check_starts": 500, "starts": 5_000, "action_noise": 3.0,
    "parameter_noise": 3.0, "total_timesteps": 300_000, "eval_every": 3_000, "checkpoint_every": 3_000,
}  # fmt: skip


@dataclass
class METRPO:
    """The outer loop and the policy; released is the authors' code."""

    preset: Literal["laptop", "released"] = "laptop"  # released: the authors' sizes; any flag overrides them
    collect_steps: Count = 1_000  # real steps from one fit, and policy, to the next (ours; released: 3 000)
    horizon: Natural = 200  # T, steps of an imagined episode, at most the task's limit (released: 100 or 200)
    gamma: Fraction = 1.0  # discount γ of (3) (released)
    gae_lambda: Fraction = 1.0  # λ of (3) (released)
    hidden: Width = 32  # units in each of the policy's two hidden layers (released)
    imagined_steps: Count = 10_000  # of the episodes of one TRPO update (ours; released: 50 000)
    iterations: Count = 100  # TRPO updates of an outer loop at most (ours; released: 400)
    max_kl: Rate = 0.02  # δ of (6) (ours; released: 0.01)
    cg_steps: Count = 10  # conjugate gradients of (6) (released)
    damping: Rate = 1e-5  # of H in (5) (released)
    fisher_rows: Count = 2_000  # drawn from the batch for H (ours; released: all 50 000)
    check_every: Count = 5  # updates from one test (7) to the next; the last is tested, too (released)
    check_starts: Width = 50  # reset states, fixed for the run, that J_k averages (ours; released: 500)
    worse_share: Fraction = 0.3  # of the models may say that θ got worse in (7) (released)
    policy_patience: Count = 25  # updates without success of (7) that end the outer loop (released)
    starts: Width = 500  # reset states that imagined episodes begin from (ours; released: new ones each time)
    action_noise: Rate = 1.0  # real actions are μ + this · u ξ, u ~ U(0, 1) (ours; released: 3)
    parameter_noise: Rate = 0.0  # each episode's weights: + this · |last outer change| ξ (ours; released: 3)


@dataclass
class ModelEnsemble:
    """The networks that imagine."""

    members: Annotated[int, (1, 1024)] = 5  # K, networks in the ensemble (released)
    draw_member: Literal["step", "episode"] = "step"  # how often k of (2) is drawn anew (released: step)
    model_layers: Annotated[int, (1, 64)] = 2  # hidden layers of each (released)
    model_hidden: Width = 128  # units in each of them (ours; released: 1 024, swimmer 512)
    model_lr: Rate = 1e-3  # Adam step size of the ensemble, moments forgotten at each fit (released)
    model_batch: Count = 100  # transitions per member and gradient step (ours; released: 1 000)
    loss_units: Literal["std", "raw"] = "std"  # raw: (1) without std (released)
    held_out: Annotated[float, (0.001, 0.999)] = 0.2  # first share of each collection (ours; released: 1/3)
    fit_epochs: Count = 2_000  # passes of a fit at most (released)
    error_every: Count = 1  # passes from one look at the held-out errors to the next (ours; released: 5)
    patience: Count = 10  # passes without a smaller error of any member that end a fit (ours; released: 25)
    fresh_every: Count = 1  # fits from one with new weights to the next (ours; released: 5)
    rewards: Literal["auto", "learned"] = "auto"  # auto: the task's formula where it is known
    termination_rule: Literal["auto", "learned"] = "auto"  # auto: the task's where known, else a classifier


@dataclass
class Args(TrialRun, METRPO, ModelEnsemble):
    """Everything that can be set."""

    def __post_init__(self) -> None:
        check(self)
        require(self.horizon >= 1, "horizon", self.horizon, "at least 1")
        most = f"at most --total-timesteps {self.total_timesteps}: or nothing is learned"
        require(self.collect_steps <= self.total_timesteps, "collect_steps", self.collect_steps, most)
        enough = f"at least --collect-steps {self.collect_steps}"
        require(self.buffer_size >= self.collect_steps, "buffer_size", self.buffer_size, enough)
        held = held_out_count(self.collect_steps, self.held_out)
        both = f"such that of --collect-steps {self.collect_steps} some train and some are held out"
        require(0 < held < self.collect_steps, "held_out", self.held_out, both)

    @classmethod
    def defaults(cls, given: dict) -> dict:
        """The dataclass's defaults, those of this file's task, then the preset's sizes."""
        task = {"env_id": "Pendulum-v1", "eval_every": 1_000, "eval_episodes": 20, "checkpoint_every": 1_000}
        return dataclasses.asdict(cls()) | task | (AUTHORS if given["preset"] == "released" else {})


def task_name(env_id: str) -> str:
    """The id without its module and its version."""
    return re.sub(r"-v\d+$", "", env_id.split(":")[-1])


def held_out_count(rows: int, share: float) -> int:
    """How many of a collection's rows, its first, are held out from the models' training."""
    return math.ceil(rows * share - 1e-9)


class StackedLinear(nn.Module):
    """Linear layers of one shape as one batched product: [members, B, inputs] -> [members, B, outputs]."""

    def __init__(self, members: int, inputs: int, outputs: int):
        super().__init__()
        bound = 1 / math.sqrt(inputs)  # as nn.Linear starts
        self.weight = nn.Parameter(torch.empty(members, inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(members, 1, outputs).uniform_(-bound, bound))

    def forward(self, x: Tensor, frozen: bool = False) -> Tensor:
        """With `frozen` the weights, of as many members as x has, are constants: only x gets a gradient."""
        weight, bias = self.weight, self.bias
        if frozen:
            weight, bias = weight.detach()[: len(x)], bias.detach()[: len(x)]
        if weight.shape[2] == 1:  # one column: product and sum beat a matrix product
            return (x * weight.transpose(1, 2)).sum(2, keepdim=True) + bias
        return torch.baddbmm(bias, x, weight)


class DeterministicEnsemble(nn.Module):
    """K networks of (s' − s, r) given (s, a), trained and asked together.

    Observations are normalised (std ≥ 0.1 as released) and clipped to ±5 deviations, so that a diverging
    episode grows at most linearly; outputs have the mean and deviation of the training rows.
    """

    def __init__(self, members: int, obs_dim: int, action_dim: int, layers: int, hidden: int):
        super().__init__()
        sizes = [obs_dim + action_dim, *[hidden] * layers, obs_dim + 1]
        self.layers = nn.ModuleList(StackedLinear(members, *size) for size in pairwise(sizes))
        self.register_buffer("mean", torch.zeros(obs_dim))
        self.register_buffer("std", torch.ones(obs_dim))
        self.register_buffer("delta_mean", torch.zeros(obs_dim + 1))
        self.register_buffer("delta_std", torch.ones(obs_dim + 1))
        self.members = members

    @torch.no_grad()
    def reset(self) -> None:
        """New weights, as StackedLinear starts."""
        for layer in self.layers:
            bound = 1 / math.sqrt(layer.weight.shape[1])
            layer.weight.uniform_(-bound, bound)
            layer.bias.uniform_(-bound, bound)

    def fit_normalizer(self, obs: Tensor, delta: Tensor) -> None:
        """Of obs [N, n] and (s' − s, r) [N, n + 1]; a constant output keeps deviation 1."""
        self.mean.copy_(obs.mean(0))
        self.std.copy_(obs.std(0, correction=0).clamp_min(0.1))
        self.delta_mean.copy_(delta.mean(0))
        std = delta.std(0, correction=0)
        self.delta_std.copy_(torch.where(std > 1e-6, std, 1.0))

    def normalize(self, obs: Tensor) -> Tensor:
        return ((obs - self.mean) / self.std).clamp(-5, 5)

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        """obs [K, B, n], action [K, B, m] -> (s' − s, r) by each member, [K, B, n + 1]."""
        x = torch.cat([self.normalize(obs), action], 2)
        for layer in self.layers[:-1]:
            x = layer(x).relu_()
        return self.delta_mean + self.delta_std * self.layers[-1](x)

    def deal(self, rows: int, times: int) -> tuple[Tensor, Tensor]:
        """Random orders that deal rows out to the members evenly, and each row's place in them.

        [times, K ceil(rows / K)] and [times, rows].
        """
        places = -(-rows // self.members) * self.members
        order = torch.rand(times, places, device=self.mean.device).argsort(1)
        return order % rows, order.argsort(1)[:, :rows]

    def step(self, obs: Tensor, action: Tensor, order: Tensor, back: Tensor) -> Tensor:
        """obs [B, n], action [B, m], one deal -> (s' − s, r) [B, n + 1], each row by one member."""
        stack = (self.members, len(order) // self.members, -1)
        return self(obs[order].view(stack), action[order].view(stack)).flatten(0, 1)[back]


def ensemble_error(output: Tensor, target: Tensor, scale: Tensor) -> Tensor:
    """(1) of each member: output and target [K, B, k], scale [k] -> [K]; scale 1 has the task's units."""
    assert output.shape == target.shape and scale.shape == output.shape[2:]
    return ((output - target) / scale).square().sum(2).mean(1)  # (1)


class VectorActor(nn.Module):
    """N(μ(s), diag e^{2ℓ}): a tanh network for μ and a free ℓ, all its weights in one vector θ.

    Observations are divided by the task's bounds where it has some, by 1 elsewhere.
    """

    def __init__(self, obs_dim: int, action_dim: int, hidden: int):
        super().__init__()
        self.sizes = [(obs_dim, hidden), (hidden, hidden), (hidden, action_dim)]
        parts = []
        for inputs, outputs in self.sizes:  # Xavier
            bound = math.sqrt(6 / (inputs + outputs))
            parts += [torch.empty(inputs * outputs).uniform_(-bound, bound), torch.zeros(outputs)]
        self.theta = nn.Parameter(torch.cat([*parts, torch.zeros(action_dim)]))
        self.register_buffer("scale", torch.ones(obs_dim))

    def forward(self, obs: Tensor, theta: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """obs [B, n] -> μ [B, m] and ℓ [m], by its own weights or by those given."""
        theta = self.theta if theta is None else theta
        x, at = obs / self.scale, 0
        for i, (inputs, outputs) in enumerate(self.sizes):
            weight, bias = theta[at : at + (inputs + 1) * outputs].split([inputs * outputs, outputs])
            x = torch.addmm(bias, x.tanh() if i else x, weight.view(inputs, outputs))
            at += (inputs + 1) * outputs
        return x, theta[at:]


def gaussian_log_prob(action: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """log N(action; mean, diag e^{2 log_std}): [B, m], [B, m], [m] -> [B]."""
    assert action.shape == mean.shape and log_std.shape == mean.shape[1:]
    scaled = (action - mean) * (-log_std).exp()
    return -(0.5 * scaled.square() + log_std + 0.5 * math.log(2 * math.pi)).sum(1)


def gaussian_kl(mean: Tensor, log_std: Tensor, other_mean: Tensor, other_log_std: Tensor) -> Tensor:
    """KL(N(mean, ..) ‖ N(other_mean, ..)): means [B, m], log-deviations [m] -> [B]."""
    assert mean.shape == other_mean.shape and log_std.shape == other_log_std.shape == mean.shape[1:]
    ratio = ((2 * log_std).exp() + (mean - other_mean).square()) * (-2 * other_log_std).exp()
    return (other_log_std - log_std + 0.5 * ratio - 0.5).sum(1)


def surrogate_loss(log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor) -> Tensor:
    """−mean (π/π_old) Â over rows [B] -> scalar."""
    assert log_prob.shape == old_log_prob.shape == advantage.shape
    return -((log_prob - old_log_prob).exp() * advantage).mean()


def advantages(reward: Tensor, baseline: Tensor, alive: Tensor, gamma: float, lam: float) -> Tensor:
    """(3) before it is normalised: [T, P] each -> [T, P]; where not alive all is 0."""
    assert reward.shape == baseline.shape == alive.shape
    reward, baseline, found = reward * alive, baseline * alive, []
    later = after = torch.zeros_like(reward[0])  # Â and b of the step after
    for r, b in zip(reward.flip(0), baseline.flip(0), strict=True):
        later, after = r + gamma * after - b + gamma * lam * later, b
        found.append(later)
    return torch.stack(found[::-1])  # (3)


def standardized(x: Tensor) -> Tensor:
    """[B] -> [B] of mean 0 and population deviation 1."""
    return (x - x.mean()) / (x.std(correction=0) + 1e-8)


def time_features(obs: Tensor) -> Tensor:
    """φ of (4): obs [T, P, n] of steps 0 .. T − 1 -> [T, P, 2n + 4], in float64."""
    s = obs.double().clamp(-10, 10)
    t = (torch.arange(len(s), dtype=s.dtype, device=s.device) / 100)[:, None, None].expand(*s.shape[:2], 1)
    return torch.cat([s, s.square(), t, t**2, t**3, torch.ones_like(t)], 2)


def ridge(features: Tensor, target: Tensor, weight: float = 1e-5) -> Tensor:
    """argmin_w ‖features w − target‖² + weight ‖w‖²: [N, k], [N] -> [k]."""
    assert target.shape == features.shape[:1]
    eye = torch.eye(features.shape[1], dtype=features.dtype, device=features.device)
    return torch.linalg.solve(features.T @ features + weight * eye, features.T @ target)  # (4)


def conjugate_gradients(product: Callable, b: Tensor, steps: int, tolerance: float = 1e-10) -> Tensor:
    """x with product(x) ≈ b [k], for a positive definite product; 0 where ‖b‖² < tolerance."""
    x, residual, direction, size = torch.zeros_like(b), b, b, b @ b
    for _ in range(steps):
        if size < tolerance:
            break
        image = product(direction)
        length = size / (direction @ image)
        x, residual = x + length * direction, residual - length * image
        before, size = size, residual @ residual
        direction = residual + size / before * direction
    return x


def trust_region_step(
    theta: Tensor,
    loss: Callable[[Tensor], Tensor],
    kl: Callable[[Tensor], Tensor],
    max_kl: float,
    steps: int = 10,
    damping: float = 1e-5,
    curvature: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """(5) and (6): θ [k] -> its successor, or θ itself, bit for bit, where no step is good enough.

    `loss` and `kl`, the distance from the policy at θ, are functions of a vector; H is the Hessian of
    `curvature`, the KL on fewer rows, or of `kl`. Where rounding makes xᵀHx negative all is NaN: θ stays.
    """
    theta = theta.detach().clone().requires_grad_()
    before = loss(theta)
    g = torch.autograd.grad(before, theta)[0]
    slope = torch.autograd.grad((curvature or kl)(theta), theta, create_graph=True)[0]

    def product(v: Tensor) -> Tensor:
        return torch.autograd.grad(slope @ v, theta, retain_graph=True)[0] + damping * v  # (5)

    x = conjugate_gradients(product, g, steps)
    step = (2 * max_kl / (x @ product(x) + 1e-8)).sqrt() * x
    with torch.no_grad():
        for j in range(15):
            candidate = theta - 0.8**j * step
            if loss(candidate) < before and kl(candidate) <= max_kl:  # (6)
                return candidate
    return theta.detach()


def accepted(returns: Tensor, best: Tensor, worse_share: float) -> bool:
    """(7): does the share of models in which the policy got worse, J [K] against J of the best, allow it?"""
    assert returns.shape == best.shape
    return (returns < best).float().mean().item() <= worse_share + 1e-6  # (7)


def known_termination(env: gym.Env):
    """The task's rule on observations: next obs [B, n] -> done [B], 0 or 1; None for tasks without one here.

    The paper's seven tasks as Gymnasium's version 5 and as mbpo/..-v0 of experiments.tasks. Unknown are other
    bounds and what wrappers make of observations and ends, unless one says that `ends_are_the_tasks`.
    """
    task, layer = env.unwrapped, env
    kinds = [gym.Wrapper, gym.ActionWrapper, gym.RewardWrapper, Boundary, gym.wrappers.RecordVideo]
    kinds += [gym.wrappers.OrderEnforcing, gym.wrappers.PassiveEnvChecker, gym.wrappers.TimeLimit]
    kept = [kind.step for kind in kinds]
    while layer is not task and (type(layer).step in kept or hasattr(type(layer), "ends_are_the_tasks")):
        layer = layer.env
    name, width = type(task).__name__.removesuffix("Env"), env.observation_space.shape[0]
    widths = {"InvertedPendulum": {4}, "InvertedDoublePendulum": {9}, "Hopper": {11}, "Walker2d": {17}}
    widths |= {"HalfCheetah": {17}, "Ant": {27, 105}, "Humanoid": {45, 348}}
    bounds = {"Hopper": ((0.7, math.inf), (-0.2, 0.2), (-100, 100)), "Ant": ((0.2, 1.0), None, None)}
    bounds |= {"Walker2d": ((0.8, 2.0), (-1.0, 1.0), None), "Humanoid": ((1.0, 2.0), None, None)}
    found = tuple(getattr(task, f"_healthy_{part}_range", None) for part in ("z", "angle", "state"))
    known = layer is task and type(task).__module__.endswith("_v5") and width in widths.get(name, ())
    if not known or found != bounds.get(name, (None, None, None)):
        return None
    if name == "HalfCheetah" or not getattr(task, "_terminate_when_unhealthy", True):
        return lambda obs: torch.zeros_like(obs[:, 0])

    def rule(obs: Tensor) -> Tensor:
        height = obs[:, 0]
        if name == "InvertedPendulum":
            alive = obs[:, 1].abs() <= 0.2
        elif name == "InvertedDoublePendulum":  # the tip's height, from sines 1:3 and cosines 3:5
            angles = torch.atan2(obs[:, 1:3], obs[:, 3:5])
            alive = 0.6 * (obs[:, 3] + angles.sum(1).cos()) > 1
        elif name == "Hopper":
            alive = (obs[:, 1:].abs() < 100).all(1) & (height > 0.7) & (obs[:, 1].abs() < 0.2)
        elif name == "Walker2d":
            alive = (height > 0.8) & (height < 2) & (obs[:, 1].abs() < 1)
        elif name == "Ant":
            alive = (height >= 0.2) & (height <= 1)
        else:  # Humanoid
            alive = (height >= 1) & (height <= 2)
        return (~(alive & obs.isfinite().all(1))).to(obs.dtype)

    return rule


def reward_function(env: gym.Env, device: torch.device):
    """The task's reward as a function of (obs [B, n], action [B, m], next obs [B, n]) -> [B], or None.

    Actions are in [−1, 1]. InvertedPendulum-v5, Pendulum, and pets/.. and poplin/.. of experiments.tasks; of
    these only InvertedPendulum ends before its time limit, by `known_termination`.
    """
    task, name = env.unwrapped, task_name(env.spec.id if env.spec else "")
    low, high = (torch.as_tensor(x, device=device) for x in (task.action_space.low, task.action_space.high))
    cost = lambda action: (low + (action + 1) * (high - low) / 2).square().sum(1)  # of the task's own units
    if name == "InvertedPendulum" and (rule := known_termination(env)):
        return lambda obs, action, next_obs: 1 - rule(next_obs)
    if name == "Pendulum":
        angle = lambda obs: torch.atan2(obs[:, 1], obs[:, 0])
        return lambda s, a, _: -(angle(s).square() + 0.1 * s[:, 2].square() + 0.001 * cost(a))
    if name == "pets/CartPole":  # the squared distance of the pole's tip, at 0.6 m, from upright over 0

        def swing_up(obs: Tensor, action: Tensor, next_obs: Tensor) -> Tensor:
            x, angle = next_obs[:, 0], next_obs[:, 1]
            distance = (x - 0.6 * angle.sin()).square() + (0.6 * angle.cos() + 0.6).square()
            return (-distance / 0.36).exp() - 0.01 * cost(action)

        return swing_up
    if name == "pets/Cheetah":
        forward, control = task._forward_reward_weight, task._ctrl_cost_weight
        return lambda obs, action, next_obs: forward * next_obs[:, 0] - control * cost(action)
    if name == "poplin/Swimmer":
        return lambda obs, action, next_obs: obs[:, 8] - 1e-4 * cost(action)
    if name.startswith("poplin/"):
        skip, height = (env.get_wrapper_attr(part) for part in ("skip", "height"))
        velocity = task.model.nq - skip

        def before(obs: Tensor, action: Tensor, next_obs: Tensor) -> Tensor:
            posture = 0.0 if height is None else 1 - 3 * (obs[:, 0] - height).square()
            return obs[:, velocity] - 0.1 * cost(action) + posture

        return before
    return None


def endless(next_obs: Tensor) -> Tensor:
    """The rule of tasks that never end: next obs [B, n] -> zeros [B]."""
    return torch.zeros_like(next_obs[:, 0])


def end_rule(env: gym.Env, device: torch.device):
    """`known_termination`, and `endless` for the others whose `reward_function` is known; else None."""
    return known_termination(env) or (endless if reward_function(env, device) else None)


class Termination(nn.Module):
    """Logit of the termination of (s, a, s'), observations normalised: [B, n], [B, m], [B, n] -> [B]."""

    def __init__(self, obs_dim: int, action_dim: int, hidden: int = 64):
        super().__init__()
        sizes = [(2 * obs_dim + action_dim, hidden), (hidden, hidden), (hidden, 1)]
        self.layers = nn.ModuleList(nn.Linear(*size) for size in sizes)

    def forward(self, obs: Tensor, action: Tensor, next_obs: Tensor) -> Tensor:
        x = torch.cat([obs, action, next_obs], 1)
        return self.layers[2](self.layers[1](self.layers[0](x).relu_()).relu_()).squeeze(1)


class Paths(NamedTuple):
    """P imagined episodes of T steps."""

    obs: Tensor  # [T, P, n]
    action: Tensor  # [T, P, m], as drawn: not clipped
    reward: Tensor  # [T, P]
    alive: Tensor  # [T, P] 1 until, and at, the step that ends the episode


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


def outputs_of(batch: Batch) -> Tensor:
    """What the ensemble learns of B transitions: (s' − s, r) [B, n + 1]."""
    return torch.cat([batch.next_obs - batch.obs, batch.reward[:, None]], 1)


FIGURES = """losses/surrogate losses/kl losses/moved losses/iterations losses/kept_iteration
    losses/imagined_return model/imagined_steps model/ends model/train_error model/held_out_error
    model/passes""".split()


class Agent:
    """Ensemble, policy, and what the last outer loop was: between two of them nothing changes."""

    captured = ("policy", "learn", "imagine_paths", "returns_by_model")  # TRPO reads its losses
    acting = ("explorer",)

    def __init__(self, args: Args, obs_dim: int, action_dim: int, device: torch.device):
        self.args, self.sizes, self.device = args, (obs_dim, action_dim), device
        self.actor = VectorActor(obs_dim, action_dim, args.hidden).to(device)
        sizes = (args.members, obs_dim, action_dim, args.model_layers, args.model_hidden)
        self.model = DeterministicEnsemble(*sizes).to(device)
        self.termination = Termination(obs_dim, action_dim).to(device)
        adam = {"lr": args.model_lr, "fused": True, "capturable": device.type == "cuda"}
        self.model_optimizer = optim.Adam(self.model.parameters(), **adam)
        self.termination_optimizer = optim.Adam(self.termination.parameters(), **adam)
        self.explorer = self.actor.theta.detach().clone()  # the weights that act in this episode
        self.change = torch.zeros_like(self.explorer)  # of θ in the last outer loop
        self.baseline = torch.zeros(2 * obs_dim + 4, dtype=torch.float64, device=device)  # w of (4)
        self.starts = torch.zeros(args.check_starts + args.starts, obs_dim, device=device)
        self.learned = torch.tensor(0)  # steps taken at the last outer loop
        self.loops = torch.tensor(0)
        self.report = torch.zeros(len(FIGURES), device=device)
        self.reward, self.rule, self.steps = None, None, args.horizon  # make_buffer sees the task

    def make_buffer(self, capacity: int, env: gym.Env) -> ReplayBuffer:
        """The replay that `train` fills with steps of env; takes formulas, bounds, limit and resets of it."""
        args, space = self.args, env.env.observation_space  # behind the boundary, which hides bounds
        self.reward = reward_function(env, self.device) if args.rewards == "auto" else None
        self.rule = end_rule(env, self.device) if args.termination_rule == "auto" else None
        reward = "learned" if self.reward is None else "the task's formula"
        end = "learned" if self.rule is None else "never" if self.rule is endless else "the task's rule"
        tqdm.write(f"reward: {reward}; termination: {end}")
        if self.rule is not None:
            del self.termination, self.termination_optimizer
        self.steps = min(args.horizon, (env.spec and env.spec.max_episode_steps) or args.horizon)
        bound = np.maximum(np.abs(space.low, dtype=float), np.abs(space.high, dtype=float)).ravel()
        self.actor.scale.copy_(torch.from_numpy(np.where((bound > 0) & (bound < 1_000), bound, 1.0)))
        env.reset(seed=args.seed)
        self.starts.copy_(torch.from_numpy(np.stack([env.reset()[0] for _ in self.starts])))
        return ReplayBuffer(capacity, env.observation_space.shape[0], env.action_space.shape[0], self.device)

    @torch.no_grad()
    def begin_episode(self) -> None:
        """Other weights to explore with, where --parameter-noise says so."""
        self.explorer.copy_(self.actor.theta)
        if self.args.parameter_noise:
            spread = self.args.parameter_noise * self.change.abs()
            self.explorer.add_(spread * torch.randn_like(spread))

    def act(self, obs: np.ndarray, deterministic: bool = False) -> np.ndarray:
        """obs [n] -> action [m] in [−1, 1]; deterministic is the Gaussian's mean, clipped."""
        obs = torch.as_tensor(np.float32(obs), device=self.device)
        return self.policy(obs[None], deterministic)[0].cpu().numpy()

    @torch.no_grad()
    def policy(self, obs: Tensor, deterministic: bool) -> Tensor:
        if deterministic:
            return self.actor(obs)[0].clamp(-1, 1)
        mean, _ = self.actor(obs, self.explorer)
        size = self.args.action_noise * torch.rand_like(mean[:, :1])
        return (mean + size * torch.randn_like(mean)).clamp(-1, 1)

    def update(self, buffer: ReplayBuffer, step: int) -> dict[str, Tensor]:
        """An outer loop where enough has been collected; the figures of the last one."""
        if buffer.added - self.learned >= self.args.collect_steps:
            before, ends = self.actor.theta.detach().clone(), bool(buffer.rows[:, -1].any())
            fitted = self.fit_members(buffer, ends)
            self.report.copy_(torch.cat([self.improve(ends), fitted]))
            self.change.copy_(self.actor.theta.detach() - before)
            self.learned.fill_(buffer.added)
            self.loops += 1
            self.begin_episode()  # with the new weights, also within an episode
        return dict(zip(FIGURES, self.report.clone(), strict=True)) if self.loops else {}

    def fit_members(self, buffer: ReplayBuffer, ends: bool) -> Tensor:
        """Train all members; each keeps the weights of its smallest held-out error. The last 3 of FIGURES."""
        args, model, members = self.args, self.model, self.args.members
        number = torch.arange(buffer.added - buffer.size, buffer.added, device=self.device)  # since step 0
        held = number % args.collect_steps < held_out_count(args.collect_steps, args.held_out)
        train, unseen = number[~held] % buffer.capacity, buffer[number[held] % buffer.capacity]
        model.fit_normalizer(buffer[train].obs, outputs_of(buffer[train]))
        if self.loops % args.fresh_every == 0:
            model.reset()
        for optimizer in (part for part in vars(self).values() if isinstance(part, optim.Optimizer)):
            for moments in optimizer.state.values():  # forgotten in place: a captured graph knows them
                torch._foreach_zero_(list(moments.values()))
        weights = [p for layer in model.layers for p in layer.parameters()]
        kept, best = [p.detach().clone() for p in weights], torch.full((members,), math.inf).to(self.device)
        size, stale = min(args.model_batch, len(train)), 0
        for passes in range(1, args.fit_epochs + 1):
            order = torch.rand(members, len(train), device=self.device).argsort(1)
            losses = []
            for at in order[:, : len(train) // size * size].split(size, 1):  # each member has its own
                batch = buffer[train[at].flatten()]
                losses.append(self.learn(batch).clone())
                if self.rule is None and ends:
                    self.fit_classifier(Batch(*(x[:size] for x in batch)))
            if passes % args.error_every == 0 or passes == args.fit_epochs:
                errors = self.member_errors(unseen)
                better = errors < best
                best = torch.where(better, errors, best)
                kept = [
                    torch.where(better[:, None, None], p.detach(), k)
                    for p, k in zip(weights, kept, strict=True)
                ]
                stale = 0 if better.any() else stale + args.error_every
                if stale >= args.patience:
                    break
        with torch.no_grad():
            torch._foreach_copy_(weights, kept)
        return torch.stack([torch.stack(losses).mean(), best.mean(), best.new_tensor(float(passes))])

    def learn(self, batch: Batch) -> Tensor:
        """One gradient step of all members, B of the K B rows for each -> their mean loss (1), scalar."""
        stack = (self.args.members, len(batch.obs) // self.args.members, -1)
        output = self.model(batch.obs.view(stack), batch.action.view(stack))
        loss = self.errors_of(output, outputs_of(batch).view(stack))
        self.model_optimizer.zero_grad()
        loss.sum().backward()
        self.model_optimizer.step()
        return loss.detach().mean()

    def errors_of(self, output: Tensor, target: Tensor) -> Tensor:
        """(1) of each member: [K, B, n + 1] each -> [K]; the reward counts where its formula is unknown."""
        parts, std = self.sizes[0] + (self.reward is None), self.model.delta_std
        scale = torch.ones_like(std) if self.args.loss_units == "raw" else std
        return ensemble_error(output[..., :parts], target[..., :parts], scale[:parts])

    @torch.no_grad()
    def member_errors(self, held: Batch) -> Tensor:
        """(1) of each member on B held-out transitions: [K]."""
        rows = (held.obs, held.action, outputs_of(held))
        obs, action, target = (x.expand(self.args.members, -1, -1) for x in rows)
        return self.errors_of(self.model(obs, action), target)

    def predict_termination(self, obs: Tensor, action: Tensor, next_obs: Tensor) -> Tensor:
        """Logit [B] that the step from obs [B, n] to next_obs [B, n] ended the episode."""
        return self.termination(self.model.normalize(obs), action, self.model.normalize(next_obs))

    def fit_classifier(self, batch: Batch) -> None:
        """One gradient step of the learned termination."""
        logit = self.predict_termination(batch.obs, batch.action, batch.next_obs)
        loss = F.binary_cross_entropy_with_logits(logit, batch.terminated)
        self.termination_optimizer.zero_grad()
        loss.backward()
        self.termination_optimizer.step()

    def outcomes(self, obs: Tensor, action: Tensor, output: Tensor, ends: bool) -> tuple[Tensor, Tensor]:
        """Of R episodes, obs [T, R, n], action [T, R, m], output [T, R, n + 1]: r, and alive, [T, R] each."""
        shape, (obs, action, output) = obs.shape[:2], (x.flatten(0, 1) for x in (obs, action, output))
        next_obs = obs + output[:, :-1]
        reward = output[:, -1] if self.reward is None else self.reward(obs, action, next_obs)
        if self.rule is not None:
            end = self.rule(next_obs) > 0
        elif ends:
            end = self.predict_termination(obs, action, next_obs) > 0
        else:  # no recorded step was the last
            end = torch.zeros_like(reward, dtype=torch.bool)
        end = end.view(shape).int()
        return reward.view(shape), (end.cumsum(0) == end).to(reward.dtype)

    @torch.no_grad()
    def imagine_paths(self, obs: Tensor, ends: bool) -> Paths:
        """(2): episodes of the stochastic policy from obs [P, n]."""
        noise, steps = torch.randn(self.steps, len(obs), self.sizes[1], device=self.device), []
        deals = self.model.deal(len(obs), self.steps if self.args.draw_member == "step" else 1)
        for xi, order, back in zip(noise, *(deal.expand(self.steps, -1) for deal in deals), strict=True):
            mean, log_std = self.actor(obs)
            drawn = mean + log_std.exp() * xi
            output = self.model.step(obs, drawn.clamp(-1, 1), order, back)  # (2)
            steps.append((obs, drawn, output))
            obs = obs + output[:, :-1]
        obs, drawn, output = (torch.stack(part) for part in zip(*steps, strict=True))
        return Paths(obs, drawn, *self.outcomes(obs, drawn.clamp(-1, 1), output, ends))

    @torch.no_grad()
    def returns_by_model(self, starts: Tensor, ends: bool) -> Tensor:
        """J of (7): mean return of the mean action from starts [S, n] in each model alone, [K]."""
        members, steps = self.args.members, []
        obs, stack = starts.repeat(members, 1), (members, len(starts), -1)
        for _ in range(self.steps):
            action = self.actor(obs)[0].clamp(-1, 1)
            output = self.model(obs.view(stack), action.view(stack)).flatten(0, 1)
            steps.append((obs, action, output))
            obs = obs + output[:, :-1]
        reward, alive = self.outcomes(*(torch.stack(part) for part in zip(*steps, strict=True)), ends)
        return (reward * alive).sum(0).view(members, -1).mean(1)

    def improve(self, ends: bool) -> Tensor:
        """Train the policy on imagined episodes until (7) has failed for long. FIGURES but the last 3."""
        args, theta = self.args, self.actor.theta
        checks, others = self.starts.split([args.check_starts, args.starts])
        with torch.no_grad():
            theta[-self.sizes[1] :] = 0  # ℓ: exploration begins anew
        best, kept = self.returns_by_model(checks, ends).clone(), theta.detach().clone()
        success, figures = 0, []
        for iteration in range(1, args.iterations + 1):
            rows = torch.randint(args.starts, (-(-args.imagined_steps // self.steps),), device=self.device)
            figures.append(self.improve_once(self.imagine_paths(others[rows], ends)))
            if iteration % args.check_every == 0 or iteration == args.iterations:
                returns = self.returns_by_model(checks, ends)
                if accepted(returns, best, args.worse_share):
                    best, kept, success = returns.clone(), theta.detach().clone(), iteration
                if iteration - success >= args.policy_patience:
                    break
        with torch.no_grad():
            theta.copy_(kept)
        figures = torch.stack(figures)
        numbers = figures.new_tensor([len(figures), success])
        return torch.cat([figures[:, :3].mean(0), numbers, best.mean()[None], figures[:, 3:].sum(0)])

    def improve_once(self, paths: Paths) -> Tensor:
        """One TRPO update on imagined episodes -> L and D after it, did θ move, steps and ends [5]."""
        args, actor, alive = self.args, self.actor, paths.alive > 0
        features = time_features(paths.obs)
        b = (features @ self.baseline).to(paths.reward.dtype)  # fitted to the batch before: no bias
        advantage = advantages(paths.reward, b, paths.alive, args.gamma, args.gae_lambda)
        advantage = standardized(advantage[alive])
        left = advantages(paths.reward, torch.zeros_like(b), paths.alive, args.gamma, 1.0)
        self.baseline.copy_(ridge(features[alive], left[alive].double()))

        obs, action = paths.obs[alive], paths.action[alive]
        with torch.no_grad():
            old = tuple(x.clone() for x in actor(obs))
            old_log_prob = gaussian_log_prob(action, *old)

        def loss(theta: Tensor) -> Tensor:
            return surrogate_loss(gaussian_log_prob(action, *actor(obs, theta)), old_log_prob, advantage)

        def kl(theta: Tensor, rows: slice | Tensor = slice(None)) -> Tensor:
            return gaussian_kl(old[0][rows], old[1], *actor(obs[rows], theta)).mean()

        few = torch.randperm(len(obs), device=self.device)[: args.fisher_rows]
        options = (args.max_kl, args.cg_steps, args.damping, lambda theta: kl(theta, few))
        before = actor.theta.detach().clone()
        with torch.enable_grad():
            theta = trust_region_step(before, loss, kl, *options)
        with torch.no_grad():
            actor.theta.copy_(theta)
            moved = (theta != before).any().float()
            ended = paths.alive[-1].numel() - paths.alive[-1].sum()
            return torch.stack([loss(theta), kl(theta), moved, paths.alive.sum(), ended])

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
