"""PETS: probabilistic ensembles with trajectory sampling, Chua et al. 2018, arXiv 1805.12114.

No policy and no critic: at every step the cross-entropy method (CEM) searches a sequence of H actions in an
ensemble of Gaussian networks, and the first of them is taken. What a model alone is worth.

Each member b of B predicts Δ = s' − s (and r where the task's formula is unknown) from features of s and from
a, normalised; after each trial it is fitted to a bootstrap of all transitions, going on from where it was:

    L   = Σ_b mean (Δ − μ_b)²/σ_b² + log σ_b² + ½ Σ_l w_l ‖W_bl‖² + 0.01 (Σ max − Σ min)                (1)
    s'  = s + μ_b(s, a) + σ_b(s, a) ξ,   ξ ~ N(0, I), for each of P particles of a candidate             (2)
          tsinf: b is the particle's own for the whole plan;  ts1: members are dealt out anew at every step
          ds: from N(mean_b μ_b, mean_b σ_b² + var_b μ_b);  mm: and then all particles of a candidate from
          N(their mean, their variance);  e: s + mean_b μ_b, one particle, no noise
    J   = mean_p Σ_{t<H} r(s_t, a_t, s_{t+1}) until the particle's task has ended                         (3)
    A_i = m + √v̄ ε_i,   ε ~ N(0, 1) within ±2,   v̄ = min(v, ((m + 1)/2)², ((1 − m)/2)²)                 (4)
    m  ← α m + (1 − α) mean(K best A_i),   v ← α v + (1 − α) var(K best A_i),   while max v > ε_v         (5)
    a   = m_0;   the next search begins at (m_1, .., m_{H−1}, 0), with v = 1/4                            (6)

Rewards and terminations are the task's own where they are known as functions of (s, a, s'); else the ensemble
predicts the reward and a classifier the end. The run says at its start which are in use.

The authors' code has tsinf (the paper's curves, as remembered, are of ts1) and smooths v since November 2018.
Ours: 20 epochs a fit where they have 5, and smaller sizes (--preset released has theirs); a particle's return
that is not finite counts as −1e6, where they say so of NaN only.

    python algos/pets.py                     # InvertedPendulum-v5
    python algos/pets.py --env-id experiments.tasks:pets/CartPole-v0       # swing-up in about five trials
    python algos/pets.py --resume runs/<run>   # goes on where it stopped and ends in the same bits
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


class Encoding(NamedTuple):
    """How an ensemble sees a task's observation: places in it."""

    angles: tuple[int, ...] = ()  # enter as sine and cosine
    absolute: tuple[int, ...] = ()  # do not enter, and are predicted themselves, not their change


ENCODINGS = {"pets/CartPole": Encoding(angles=(1,)), "pets/Cheetah": Encoding(absolute=(0,))}  # released


class Released(NamedTuple):
    """Sizes of the authors' code for a task."""

    total_timesteps: int
    trial_steps: int
    horizon: int
    candidates: int
    elites: int
    model_layers: int
    model_hidden: int
    model_decays: str


CHEETAH = Released(300_000, 1_000, 30, 500, 50, 4, 200, "[2.5e-5, 5e-5, 7.5e-5, 1e-4]")
RELEASED_SIZES = {  # by the task's id without version; any other gets the cheetah's, as in POPLIN's code
    "pets/CartPole": Released(10_000, 200, 25, 400, 40, 3, 500, "[1e-4, 2.5e-4, 5e-4]"),
    "pets/Cheetah": CHEETAH,
}


@dataclass
class PETS:
    """The ensemble and the search in it; released is the authors' code."""

    preset: Literal["laptop", "released"] = "laptop"  # released: the authors' sizes; any flag overrides them
    planner: Literal["cem", "random"] = "cem"  # random: the best of --candidates uniform sequences
    propagation: Literal["tsinf", "ts1", "ds", "mm", "e"] = "tsinf"  # of particles, (2) (released: tsinf)
    horizon: Natural = 20  # H of (3), model steps (ours; released: 25 or 30, by task)
    candidates: Count = 150  # action sequences of an iteration (ours; released: 400, 500); random: 5 times it
    elites: Annotated[int, (1, 1024)] = 15  # K of (5), a tenth of the candidates (released)
    iterations: Count = 3  # of (4) and (5) (ours; released: 5)
    particles: Count = 5  # P of (3), a multiple of --members for tsinf and ts1 (ours; released: 20)
    smoothing: Fraction = 0.1  # α of (5) (released)
    least_variance: Rate = 1e-3  # ε_v of (5) (released)
    rewards: Literal["auto", "learned"] = "auto"  # auto: the task's formula where it is known
    termination_rule: Literal["auto", "learned"] = "auto"  # auto: the task's where known, else a classifier
    members: Annotated[int, (1, 1024)] = 5  # networks B in the ensemble (released)
    model_layers: Annotated[int, (1, 64)] = 3  # hidden layers of each (released: 3 or 4, by task)
    model_hidden: Width = 128  # units in each hidden layer (ours; released: 200 or 500, by task)
    model_lr: Rate = 1e-3  # Adam step size of the model (released)
    model_decays: str = "[1e-4, 2.5e-4, 5e-4]"  # w of (1), JSON: first layers', then the last's (released)
    fit_epochs: Count = 20  # passes over the replay in a fit (ours; released: 5)
    batch_size: Count = 32  # transitions of each member in a gradient step (released)
    trial_steps: Count = 200  # an episode that lasts is learned from after so many steps (released: never)


def task_name(env_id: str) -> str:
    """The id without its module and its version."""
    return re.sub(r"-v\d+$", "", env_id.split(":")[-1])


@dataclass
class Args(TrialRun, PETS):
    """Everything that can be set."""

    def __post_init__(self) -> None:
        check(self)
        require(self.horizon >= 1, "horizon", self.horizon, "at least 1")
        most = f"at most --candidates {self.candidates}"
        fits = self.elites <= self.candidates or self.planner == "random"
        require(fits, "elites", self.elites, most)
        dealt = self.particles % self.members == 0 or self.propagation in ("ds", "mm", "e")
        require(dealt, "particles", self.particles, f"a multiple of --members {self.members}")
        try:
            decays = json.loads(self.model_decays)
            fit = len(decays) >= 2 and all(type(w) in (int, float) and 0 <= w < math.inf for w in decays)
        except (TypeError, ValueError):
            fit = False
        require(fit, "model_decays", self.model_decays, "a JSON list of two numbers or more, none negative")

    @classmethod
    def defaults(cls, given: dict) -> dict:
        """The dataclass's defaults, one episode an evaluation, then the preset's; five times the candidates
        where they are searched at random (released)."""
        values = dataclasses.asdict(cls()) | {"eval_episodes": 1}
        if given["preset"] == "released":
            sizes = RELEASED_SIZES.get(task_name(given["env_id"]), CHEETAH)._asdict()
            values |= sizes | {"learning_starts": sizes["trial_steps"], "eval_every": sizes["trial_steps"]}
            values |= {"iterations": 5, "particles": 20, "fit_epochs": 5}
        return values | {"candidates": values["candidates"] * (5 if given["planner"] == "random" else 1)}


def truncated_normal(*shape: int, device: torch.device | None = None) -> Tensor:
    """N(0, 1) given that it is within ±2, by inversion: its variance is 0.774."""
    bound = math.erf(math.sqrt(2))  # P(|x| < 2)
    return math.sqrt(2) * torch.erfinv(torch.empty(shape, device=device).uniform_(-bound, bound))


class PetsLinear(nn.Module):
    """Linear layers of one shape as one batched product: [members, B, inputs] -> [members, B, outputs]."""

    def __init__(self, members: int, inputs: int, outputs: int):
        super().__init__()
        deviation = 1 / (2 * math.sqrt(inputs))  # before truncation, as released
        self.weight = nn.Parameter(deviation * truncated_normal(members, inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(members, 1, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x, self.weight)


class PetsEnsemble(nn.Module):
    """Diagonal Gaussians over s' − s, and r if `outputs` is n + 1: one network a member, trained together.

    Inputs are features of s, and a, both normalised (in float64, so that a nearly constant one does not
    blow up); outputs are in the task's units. Log-variances are softly bounded, the bounds learned.
    """

    def __init__(
        self, members: int, sizes: tuple[int, int], layers: int, hidden: int, outputs: int, encoding: Encoding
    ):
        """Sizes n of obs and m of the action."""
        super().__init__()
        obs_dim, action_dim = sizes
        plain = [i for i in range(obs_dim) if i not in (*encoding.angles, *encoding.absolute)]
        self.members, self.obs_dim, self.features = members, obs_dim, len(plain) + 2 * len(encoding.angles)
        sizes = [self.features + action_dim, *[hidden] * layers, 2 * outputs]
        self.layers = nn.ModuleList(PetsLinear(members, *size) for size in pairwise(sizes))
        self.max_log_var = nn.Parameter(torch.full((outputs,), 0.5))
        self.min_log_var = nn.Parameter(torch.full((outputs,), -10.0))
        self.register_buffer("mean", torch.zeros(sizes[0], dtype=torch.float64))
        self.register_buffer("std", torch.ones(sizes[0], dtype=torch.float64))
        kept = torch.tensor([float(i not in encoding.absolute) for i in range(obs_dim)])
        self.register_buffer("kept", kept, persistent=False)  # [n] 1 where the change is predicted
        for name, places in (("plain", plain), ("angles", encoding.angles)):
            self.register_buffer(name, torch.tensor(places, dtype=torch.int64), persistent=False)

    def encode(self, obs: Tensor) -> Tensor:
        """obs [.., n] -> features [.., F]."""
        if len(self.plain) == self.obs_dim:
            return obs
        angles = obs.index_select(-1, self.angles)
        return torch.cat([obs.index_select(-1, self.plain), angles.sin(), angles.cos()], -1)

    def fit_scaler(self, obs: Tensor, action: Tensor) -> None:
        """Mean and deviation of what obs [N, n], action [N, m] become; a constant input keeps deviation 1."""
        x = torch.cat([self.encode(obs.double()), action.double()], 1)
        self.mean.copy_(x.mean(0))
        std = x.std(0, correction=0)
        self.std.copy_(torch.where(std < 1e-12, 1.0, std))

    def normalize(self, obs: Tensor) -> Tensor:
        """obs [.., n] -> normalised features [.., F], float32."""
        at = self.features
        return ((self.encode(obs) - self.mean[:at]) / self.std[:at]).float()

    def normalize_action(self, action: Tensor) -> Tensor:
        """action [.., m] -> the same, normalised, float32."""
        at = self.features
        return ((action - self.mean[at:]) / self.std[at:]).float()

    def inputs(self, obs: Tensor, action: Tensor) -> Tensor:
        """obs [.., n], action [.., m] -> what the networks get [.., F + m]."""
        return torch.cat([self.normalize(obs), self.normalize_action(action)], -1)

    def targets(self, obs: Tensor, next_obs: Tensor, reward: Tensor) -> Tensor:
        """obs, next_obs [N, n], reward [N] -> what the networks learn [N, outputs]."""
        change = next_obs - self.kept * obs
        wide = len(self.max_log_var) > self.obs_dim
        return torch.cat([change, reward[:, None]], 1) if wide else change

    def predict(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs [E, B, F + m] -> mean and log-variance, each [E, B, outputs]."""
        for layer in self.layers[:-1]:
            x = F.silu(layer(x), inplace=True)
        mean, log_var = self.layers[-1](x).chunk(2, 2)
        log_var = self.max_log_var - F.softplus(self.max_log_var - log_var)
        return mean, self.min_log_var + F.softplus(log_var - self.min_log_var)

    def forward(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """obs [E, B, n], action [E, B, m] -> mean and log-variance, each [E, B, outputs]."""
        return self.predict(self.inputs(obs, action))

    def advance(self, obs: Tensor, output: Tensor) -> Tensor:
        """obs [.., n], means or samples of outputs [.., outputs] -> next obs [.., n]."""
        return torch.addcmul(output[..., : self.obs_dim], self.kept, obs)


class Termination(nn.Module):
    """Logit of the termination of (s, a, s'), observations normalised: [B, n], [B, m], [B, n] -> [B]."""

    def __init__(self, obs_dim: int, action_dim: int, hidden: int = 64):
        super().__init__()
        sizes = [(2 * obs_dim + action_dim, hidden), (hidden, hidden), (hidden, 1)]
        self.layers = nn.ModuleList(nn.Linear(*size) for size in sizes)

    def forward(self, obs: Tensor, action: Tensor, next_obs: Tensor) -> Tensor:
        x = torch.cat([obs, action, next_obs], 1)
        return self.layers[2](self.layers[1](self.layers[0](x).relu_()).relu_()).squeeze(1)


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


KNOWN_REWARDS = """InvertedPendulum-v5 Pendulum-v1 pets/CartPole-v0 pets/Cheetah-v0 poplin/Ant-v0
    poplin/Cheetah-v0 poplin/Hopper-v0 poplin/Swimmer-v0 poplin/Walker2d-v0""".split()  # by `reward_function`


def endless(next_obs: Tensor) -> Tensor:
    """The rule of tasks that never end: next obs [B, n] -> zeros [B]."""
    return torch.zeros_like(next_obs[:, 0])


def end_rule(env: gym.Env, device: torch.device):
    """`known_termination`, and `endless` for the others whose `reward_function` is known; else None."""
    return known_termination(env) or (endless if reward_function(env, device) else None)


def gaussian_nll(mean: Tensor, log_var: Tensor, target: Tensor) -> Tensor:
    """Σ_j (target − mean)² / σ² + log σ², log σ² = log_var: [E, B, k] each -> [E, B] (no ½, as released)."""
    assert mean.shape == log_var.shape == target.shape
    return ((target - mean).square() * (-log_var).exp() + log_var).sum(2)


def layer_decays(given: list[float], layers: int) -> list[float]:
    """One of each layer: the last is the last's, the others in order, the last but one repeated."""
    return [*[*given[:-1], *[given[-2]] * layers][: layers - 1], given[-1]]


def pets_loss(model: PetsEnsemble, x: Tensor, target: Tensor, decays: list[float]) -> Tensor:
    """(1): inputs [E, B, F + m], targets [E, B, outputs] -> scalar, a mean over the outputs."""
    mean, log_var = model.predict(x)
    nll = gaussian_nll(mean, log_var, target).mean(1).sum() / target.shape[2]
    size = sum(0.5 * w * layer.weight.square().sum() for w, layer in zip(decays, model.layers, strict=True))
    return nll + size + 0.01 * (model.max_log_var - model.min_log_var).sum()  # (1)


def propagate(mean: Tensor, log_var: Tensor, propagation: str) -> Tensor:
    """(2): a draw by mean and log-variance of all members [E, R, k]: [E, R, k] for TS, else [1, R, k]."""
    assert mean.shape == log_var.shape
    if propagation in ("tsinf", "ts1"):
        return torch.addcmul(mean, (0.5 * log_var).exp(), torch.randn_like(mean))  # (2)
    together = mean.mean(0, keepdim=True)
    if propagation == "e":
        return together
    var = log_var.exp().mean(0, keepdim=True) + mean.var(0, correction=0, keepdim=True)
    return together + var.sqrt() * torch.randn_like(together)


def moment_matched(state: Tensor, candidates: int) -> Tensor:
    """Particles [1, N P, n] of N candidates, drawn anew from N(their mean, their population variance)."""
    particles = state.view(candidates, -1, state.shape[2])
    var, mean = torch.var_mean(particles, 1, correction=0, keepdim=True)
    return (mean + var.sqrt() * torch.randn_like(particles)).view(state.shape)


def dealt(x: Tensor, order: Tensor) -> Tensor:
    """Rows [E, N P/E, k] of the P particles of N candidates, of each candidate in its order [N, P]."""
    count, particles = order.shape
    rows = x.view(len(x), count, -1, x.shape[2]).transpose(0, 1).reshape(count, particles, -1)
    rows = rows.gather(1, order[:, :, None].expand_as(rows))
    return rows.view(count, len(x), -1, x.shape[2]).transpose(0, 1).reshape(x.shape)


def search_actions(mean: Tensor, var: Tensor, count: int) -> Tensor:
    """(4): mean and variance [H, m] -> action sequences [count, H, m], all within [−1, 1]."""
    assert mean.shape == var.shape
    nearest = torch.minimum((mean + 1) / 2, (1 - mean) / 2)
    bounded = torch.minimum(var, nearest.square())
    return mean + bounded.sqrt() * truncated_normal(count, *mean.shape, device=mean.device)  # (4)


def refine(
    mean: Tensor, var: Tensor, actions: Tensor, returns: Tensor, elites: int, smoothing: float
) -> tuple[Tensor, Tensor]:
    """(5) once: mean and variance [H, m], sequences [N, H, m], their returns [N] -> new mean and variance."""
    assert actions.shape[1:] == mean.shape == var.shape and returns.shape == actions.shape[:1]
    best = actions[returns.topk(elites, sorted=False).indices]
    new_var, new_mean = torch.var_mean(best, 0, correction=0)
    return torch.lerp(new_mean, mean, smoothing), torch.lerp(new_var, var, smoothing)  # (5)


def shifted(plan: Tensor) -> Tensor:
    """(6): the plan [H, m] a step later, the middle of the range appended."""
    return torch.cat([plan[1:], torch.zeros_like(plan[:1])])  # (6)


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


class Agent:
    """An ensemble, and the plan in force: what is left of it is where the next search begins."""

    captured = ("plan", "fit_step")
    acting = ("intended", "outlook")

    def __init__(self, args: Args, obs_dim: int, action_dim: int, device: torch.device):
        self.args, self.sizes, self.device = args, (obs_dim, action_dim), device
        known = args.rewards == "auto" and args.env_id.split(":")[-1] in KNOWN_REWARDS
        encoding, outputs = ENCODINGS.get(task_name(args.env_id), Encoding()), obs_dim + (not known)
        network = (args.model_layers, args.model_hidden, outputs)
        self.model = PetsEnsemble(args.members, self.sizes, *network, encoding).to(device)
        self.decays = layer_decays(json.loads(args.model_decays), args.model_layers + 1)
        adam = {"lr": args.model_lr, "fused": True, "capturable": device.type == "cuda"}
        self.model_optimizer = optim.Adam(self.model.parameters(), **adam)
        self.termination = Termination(self.model.features, action_dim).to(device)
        self.termination_optimizer = optim.Adam(self.termination.parameters(), **adam)
        self.intended = torch.zeros(args.horizon, action_dim, device=device)  # the means that are left, (6)
        self.outlook = torch.zeros(2, device=device)  # of the last plan: return and deviation
        self.fitted = torch.zeros(2, device=device)  # of the last fit: loss and error
        self.episode = torch.tensor(-1)  # under way at the last fit
        self.learned = torch.tensor(0)  # transitions added until then
        self.reward, self.rule, self.seen_task = None, None, False  # what is known, once it has seen the task

    def make_buffer(self, capacity: int, env: gym.Env) -> ReplayBuffer:
        """The replay that `train` fills with steps of env; says what of the task is known."""
        self.look_at(env)
        reward = "learned" if self.reward is None else "the task's formula"
        end = "learned" if self.rule is None else "never" if self.rule is endless else "the task's rule"
        tqdm.write(f"reward: {reward}; termination: {end}")
        return ReplayBuffer(capacity, env.observation_space.shape[0], env.action_space.shape[0], self.device)

    def look_at(self, env: gym.Env) -> None:
        """Take what is known of the task; a classifier that it needs no more goes."""
        self.reward = reward_function(env, self.device) if self.args.rewards == "auto" else None
        self.rule = end_rule(env, self.device) if self.args.termination_rule == "auto" else None
        if self.rule is not None and not self.seen_task:
            del self.termination, self.termination_optimizer
        self.seen_task = True

    def begin_episode(self) -> None:
        self.intended.zero_()

    def act(self, obs: np.ndarray, deterministic: bool = False) -> np.ndarray:
        """obs [n] -> action [m] in [−1, 1], searched, `deterministic` or not; before the first fit random."""
        if self.episode < 0:
            return 2 * torch.rand(self.sizes[1]).numpy() - 1
        if not self.seen_task:  # has been loaded
            with contextlib.closing(make_env(self.args.env_id, self.args.env_kwargs)) as env:
                self.look_at(env)
        plan, outlook = self.plan(torch.as_tensor(np.float32(obs), device=self.device), self.intended)
        self.outlook.copy_(outlook)
        self.intended.copy_(shifted(plan))
        return plan[0].cpu().numpy()

    @torch.no_grad()
    def plan(self, obs: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        """obs [n], where to begin [H, m] -> plan [H, m]; return imagined for the best and deviation left [2].

        Where the search has ended iterations go on without effect: a graph has one shape.
        """
        args = self.args
        if args.planner == "random":
            actions = 2 * torch.rand(args.candidates, *mean.shape, device=self.device) - 1
            best, at = self.imagined_returns(obs, actions).max(0, keepdim=True)
            return actions[at][0], torch.cat([best, torch.zeros_like(best)])
        var = torch.full_like(mean, 0.25)
        for _ in range(args.iterations):
            actions = search_actions(mean, var, args.candidates)
            returns = self.imagined_returns(obs, actions)
            going = var.amax() > args.least_variance
            found = refine(mean, var, actions, returns, args.elites, args.smoothing)
            mean, var = (torch.where(going, new, old) for new, old in zip(found, (mean, var), strict=True))
        return mean, torch.stack([returns.topk(args.elites).values.mean(), var.mean().sqrt()])

    def imagined_returns(self, obs: Tensor, actions: Tensor) -> Tensor:
        """(3): obs [n], action sequences [N, H, m] -> J [N], of particles that diverge −1e6."""
        states, rewards = self.imagined_states(obs, actions)  # [H + 1, G, N P/G, n], [H, G, N P/G]
        shape = rewards.shape
        taken = actions.transpose(0, 1).repeat_interleave(shape[2] // len(actions), 1)[:, None]
        rows = states[:-1], taken.expand(*shape, -1), states[1:]
        obs, taken, next_obs = (x.flatten(0, 2) for x in rows)
        if self.reward is not None:
            rewards = self.reward(obs, taken, next_obs).view(shape)
        if self.rule is not endless:
            done = self.ends(obs, taken, next_obs).view(shape)
            rewards = rewards.masked_fill(done.cumsum(0) > done, 0.0)  # has ended in an earlier step
        total = rewards.sum(0)
        total = torch.where(total.isfinite(), total, -1e6)
        return total.view(shape[1], len(actions), -1).mean((0, 2))  # (3)

    def imagined_states(self, obs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """(2): obs [n], action sequences [N, H, m] -> states [H + 1, G, N P/G, n], rewards [H, G, N P/G].

        Of tsinf and ts1 each member's particles stand in its own group, G = B; else G = 1. The rewards are
        those that the networks predict, where they do.
        """
        args, model, mode = self.args, self.model, self.args.propagation
        groups = args.members if mode in ("tsinf", "ts1") else 1
        each = 1 if mode == "e" else args.particles // groups  # rows of a candidate, side by side
        taken = model.normalize_action(actions).transpose(0, 1).repeat_interleave(each, 1)
        states, outputs, everyone = [obs.expand(groups, taken.shape[1], -1)], [], (args.members, -1, -1)
        for action in taken:
            x = torch.cat([model.normalize(states[-1]), action.expand(groups, -1, -1)], 2)
            if mode == "ts1":
                order = torch.rand(len(actions), args.particles, device=obs.device).argsort(1)
                x = dealt(x, order)
            output = propagate(*model.predict(x.expand(everyone)), mode)
            if mode == "ts1":
                output = dealt(output, order.argsort(1))  # back: a particle keeps its place
            state = model.advance(states[-1], output)
            states.append(moment_matched(state, len(actions)) if mode == "mm" else state)
            outputs.append(output[:, :, -1])
        return torch.stack(states), torch.stack(outputs)

    def ends(self, obs: Tensor, action: Tensor, next_obs: Tensor) -> Tensor:
        """Whether the step from obs [B, n] to next_obs [B, n] ends the episode [B]: by rule or classifier."""
        if self.rule is None:
            return self.predict_termination(obs, action, next_obs) > 0
        return self.rule(next_obs) > 0

    def predict_termination(self, obs: Tensor, action: Tensor, next_obs: Tensor) -> Tensor:
        """Logit [B] that the step from obs [B, n] to next_obs [B, n] ended the episode."""
        return self.termination(self.model.normalize(obs), action, self.model.normalize(next_obs))

    def update(self, buffer: ReplayBuffer, step: int) -> dict[str, Tensor]:
        """Fit where a trial has begun; the figures of the last fit and plan."""
        newest = buffer.episode[(buffer.added - 1) % buffer.capacity].cpu()
        if newest != self.episode or buffer.added - self.learned >= self.args.trial_steps:
            self.episode.copy_(newest)
            self.learned.fill_(buffer.added)
            self.fitted.copy_(self.fit_ensemble(buffer[torch.arange(buffer.size, device=self.device)]))
        names = ("losses/model_loss", "model/error", "plan/return", "plan/deviation")
        return dict(zip(names, torch.cat([self.fitted, self.outlook]), strict=True))

    def fit_ensemble(self, batch: Batch) -> Tensor:
        """Go on training with n transitions, each member on a new bootstrap; last loss and error [2]."""
        args, model, count = self.args, self.model, len(batch.reward)
        model.fit_scaler(batch.obs, batch.action)
        x, target = (
            model.inputs(batch.obs, batch.action),
            model.targets(batch.obs, batch.next_obs, batch.reward),
        )
        rows = torch.randint(count, (args.members, count), device=self.device)
        for _ in range(args.fit_epochs):
            rows = rows.gather(1, torch.rand(rows.shape, device=self.device).argsort(1))
            losses = []
            for at in rows.split(args.batch_size, 1):
                whole_batch = at.shape[1] == args.batch_size  # else no graph: it has another size in each fit
                fit_step = self.fit_step if whole_batch else lambda *data: type(self).fit_step(self, *data)
                losses.append(fit_step(x[at], target[at]).clone())
                if self.rule is None:
                    self.fit_classifier(Batch(*(part[at[0]] for part in batch)))
        with torch.no_grad():
            wrong = model.predict(x.expand(args.members, -1, -1))[0].mean(0) - target
            error = (wrong.square().mean(0) / target.var(0, correction=0).clamp_min(1e-12)).mean().sqrt()
        return torch.stack([torch.stack(losses).mean(), error])

    def fit_step(self, x: Tensor, target: Tensor) -> Tensor:
        """One gradient step on inputs [E, B, F + m] and targets [E, B, outputs]; the loss before it."""
        loss = pets_loss(self.model, x, target, self.decays)
        self.model_optimizer.zero_grad()
        loss.backward()
        self.model_optimizer.step()
        return loss.detach()

    def fit_classifier(self, batch: Batch) -> None:
        """One gradient step of the learned termination."""
        logit = self.predict_termination(batch.obs, batch.action, batch.next_obs)
        loss = F.binary_cross_entropy_with_logits(logit, batch.terminated)
        self.termination_optimizer.zero_grad()
        loss.backward()
        self.termination_optimizer.step()

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
