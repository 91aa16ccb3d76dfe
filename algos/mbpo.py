"""Model-based policy optimisation (MBPO), Janner et al. 2019, "When to Trust Your Model", arXiv 1906.08253.

sac.py, many updates per step, on transitions that a Gaussian ensemble imagines: short rollouts of the present
policy, branched from replayed states, each step by a random one of the best members.

Every --model-interval steps the ensemble is refitted to all that is stored, each member on a bootstrap,

    L_f = Σ_e mean (Δ − μ_e)² / σ_e² + log σ_e² + ½ Σ_l w_l ‖W_l‖² + bounds,  Δ = (s' − s, r)   (6)

until no held-out error has fallen by 1 % for six epochs. Each member keeps its best weights; the five with
the smallest errors are the elites. Then k steps are rolled out from --rollout-batch replayed states:

    a ~ π(s),  s', r ~ an elite drawn for each row,  d = known rule or classifier                 (7)
    k = k_0 + (k_1 − k_0) clip((e − e_0) / (e_1 − e_0), 0, 1), rounded down, in epoch e           (8)

At every step --updates-per-step updates (1), (2), (3), (4), (5) of sac.py follow, each on a batch of which
--real-ratio is real and the rest imagined. --real-ratio 1 is SAC with as many updates.

    python algos/mbpo.py                                    # InvertedPendulum-v5
    python algos/mbpo.py --env-id Hopper-v5 --total-timesteps 125_000 --preset released
    python algos/mbpo.py --resume runs/<run>                # goes on where it stopped, in the same bits
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
Real = Annotated[float | None, (-1e6, 1e6)]


@dataclass
class Run:
    """The task, the loop around the agent and what it leaves on disk; the same in every file."""

    env_id: str = "InvertedPendulum-v5"  # Gymnasium id; package.module:Name-v0 imports what registers it
    env_kwargs: str = "{}"  # JSON of the arguments of the task's constructor, as '{"frame_skip": 2}'
    seed: Natural = 1  # of weights, noise, replay sampling and the task; evaluation uses seed + 100
    total_timesteps: Count = 10_000  # environment steps, warm-up included
    learning_starts: Count = 1_000  # random actions before the first update (SAC's authors: 1 000 to 10 000)
    batch_size: Count = 256  # transitions per update (Haarnoja et al. 2018)
    buffer_size: Count = 1_000_000  # replay capacity (Haarnoja et al. 2018); never more than total_timesteps
    eval_every: Count = 1_000  # steps between evaluations (ours; 5 000 is the custom for a million steps)
    eval_episodes: Count = 10  # per evaluation, deterministic policy (protocol of Fujimoto et al. 2018)
    log_every: Count = 100  # steps between TensorBoard points; only then are metrics read and checked (ours)
    checkpoint_every: Annotated[int | None, (1, math.inf)] = None  # steps; None: 5 000 or 1/50, or 2 minutes
    runs_dir: str = "runs"  # parent of the run folders
    resume: str = ""  # run folder to go on with, by its own arguments; only --total-timesteps may be raised
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes a GPU where there is one
    cuda_graphs: bool = True  # on a GPU replay the agent's methods as captured graphs: the same bits, faster
    num_threads: Annotated[int, (1, 1024)] = 2  # CPU threads of PyTorch; a run's exact bits depend on it
    capture_video: bool = False  # film the first episode of each evaluation (needs moviepy)


@dataclass
class SAC:
    """Soft actor-critic; the defaults are those of Haarnoja et al. 2018."""

    gamma: Fraction = 0.99  # discount factor γ
    tau: Fraction = 0.005  # Polyak step τ of the target critics
    actor_lr: Rate = 3e-4  # Adam step size of the actor
    critic_lr: Rate = 3e-4  # Adam step size of the critics
    alpha_lr: Rate = 3e-4  # Adam step size of log α
    init_alpha: Annotated[float, (1e-8, 1e8)] = 1.0  # first temperature α (authors' code)
    target_entropy: Real = None  # H̄ in nats of the [−1, 1] action; None is −dim(A)
    hidden: Width = 256  # units in each of the two hidden layers of actor and critics


class Setting(NamedTuple):
    """What the released code sets for a task."""

    updates_per_step: int
    growth_starts: int  # e_0, e_1, k_0 and k_1 of (8)
    growth_ends: int
    rollout_length: int
    rollout_length_max: int
    target_entropy: float
    epoch_length: int = 1_000
    model_interval: int = 250
    retain_epochs: int = 1
    learning_starts: int = 5_000


SETTINGS = {  # by the task's id without version
    "InvertedPendulum": Setting(10, 1, 15, 1, 1, -0.05, 250, learning_starts=500),
    "InvertedDoublePendulum": Setting(20, 1, 15, 1, 1, -0.5, 250, learning_starts=500),
    "Hopper": Setting(20, 20, 150, 1, 15, -1.0),
    "Walker2d": Setting(20, 20, 150, 1, 1, -3.0),
    "HalfCheetah": Setting(40, 20, 150, 1, 1, -3.0),
    "Ant": Setting(20, 20, 100, 1, 25, -4.0),
    "Humanoid": Setting(20, 20, 300, 1, 25, -2.0, 1_000, 1_000, 5),
}


@dataclass
class BranchedRollouts:
    """The ensemble and what it imagines; released is the authors' code."""

    preset: Literal["laptop", "released"] = "laptop"  # released: the authors' sizes; any flag overrides them
    updates_per_step: Count = 10  # gradient steps per step (released: 10 to 40, by task; laptop: at most 10)
    real_ratio: Fraction = 0.05  # share of real transitions in a batch (released)
    model_interval: Count = 250  # steps from one refit, and one lot of rollouts, to the next (released)
    rollout_batch: Count = 10_000  # rollouts started each time (ours; released: 100 000)
    epoch_length: Count = 1_000  # steps of an epoch of (8) (released: by task, 250 or 1 000)
    growth_starts: Natural = 20  # e_0 of (8), in epochs (released: by task)
    growth_ends: Natural = 150  # e_1 of (8), in epochs (released: by task)
    rollout_length: Count = 1  # k_0 of (8) (released)
    rollout_length_max: Count = 1  # k_1 of (8) (released: by task, 1 to 25)
    retain_epochs: Count = 1  # epochs of rollouts that the imagined replay holds (released: 1; Humanoid 5)
    termination_rule: Literal["auto", "learned"] = "auto"  # auto: the task's where known, else a classifier
    members: Annotated[int, (1, 1024)] = 7  # networks in the ensemble (released)
    elites: Annotated[int, (1, 1024)] = 5  # members that imagine, those of smallest held-out error (released)
    model_layers: Annotated[int, (1, 64)] = 3  # hidden layers of each (ours; released: 4)
    model_hidden: Width = 128  # units in each hidden layer of the model (ours; released: 200)
    model_lr: Rate = 1e-3  # Adam step size of the model (released)
    refit_steps: Count = 500  # no epoch of a refit begins after so many gradient steps (ours; released: 1e7)


@dataclass
class Args(Run, SAC, BranchedRollouts):
    """Everything that can be set."""

    def __post_init__(self) -> None:
        check(self)
        require(self.elites <= self.members, "elites", self.elites, f"at most --members {self.members}")
        ordered, allowed = self.rollout_length <= self.rollout_length_max, "at least --rollout-length"
        require(ordered, "rollout_length_max", self.rollout_length_max, f"{allowed} {self.rollout_length}")
        later = self.growth_starts < self.growth_ends
        require(later, "growth_ends", self.growth_ends, f"above --growth-starts {self.growth_starts}")
        enough = "at least 5 (a fifth is held out from the model)"
        require(self.learning_starts >= 5, "learning_starts", self.learning_starts, enough)

    @classmethod
    def defaults(cls, given: dict) -> dict:
        """The dataclass's defaults, then the task's of the released code, then the preset's sizes."""
        task = re.sub(r"-v\d+$", "", re.split("[/:]", given["env_id"])[-1])
        values = dataclasses.asdict(cls()) | (SETTINGS[task]._asdict() if task in SETTINGS else {})
        if given["preset"] == "released":
            sizes = {"model_layers": 4, "model_hidden": 200, "refit_steps": 10_000_000}
            return values | sizes | {"rollout_batch": 100_000}
        most = {"updates_per_step": 10, "learning_starts": 1_000}
        return values | {name: min(limit, values[name]) for name, limit in most.items()}


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


class Critic(nn.Module):
    """Twin action values: obs [B, n], action [B, m] -> [2, B]."""

    def __init__(self, obs_dim: int, action_dim: int, hidden: int):
        super().__init__()
        sizes = [(obs_dim + action_dim, hidden), (hidden, hidden), (hidden, 1)]
        self.layers = nn.ModuleList(StackedLinear(2, *size) for size in sizes)

    def forward(self, obs: Tensor, action: Tensor, frozen: bool = False) -> Tensor:
        x = torch.cat([obs, action], 1).expand(2, -1, -1)
        for layer in self.layers[:-1]:
            x = layer(x, frozen).relu_()
        return self.layers[-1](x, frozen).squeeze(2)


class Actor(nn.Module):
    """Gaussian squashed by tanh into [−1, 1]; log σ is clamped to [−20, 2] as in the authors' code."""

    def __init__(self, obs_dim: int, action_dim: int, hidden: int):
        super().__init__()
        sizes = [(obs_dim, hidden), (hidden, hidden), (hidden, 2 * action_dim)]
        self.layers = nn.ModuleList(nn.Linear(*size) for size in sizes)

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """obs [B, n] -> mean and log σ before the squash, each [B, m]."""
        x = self.layers[1](self.layers[0](obs).relu_()).relu_()
        mean, log_std = self.layers[2](x).chunk(2, 1)
        return mean, log_std.clamp(-20, 2)

    def sample(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """obs [B, n] -> reparameterised action [B, m] and its log π [B]."""
        mean, log_std = self(obs)
        noise = torch.randn_like(mean)
        u = mean + log_std.exp() * noise
        return u.tanh(), squashed_log_prob(noise, log_std, u)


def squashed_log_prob(noise: Tensor, log_std: Tensor, u: Tensor) -> Tensor:
    """log π of tanh(u) for u = μ + σ·noise, summed over the action's dimensions: [B, m] each -> [B].

    log(1 − tanh² u) = 2 (log 2 − u − softplus(−2u)) stays exact where tanh saturates.
    """
    gaussian = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
    return (gaussian - 2 * (math.log(2) - u - F.softplus(-2 * u))).sum(1)


def soft_target(
    reward: Tensor, done: Tensor, next_q: Tensor, next_log_prob: Tensor, alpha: Tensor, gamma: float
) -> Tensor:
    """r + γ (1 − d) (q' − α log π'), all [B]: equations 2 and 3 of arXiv 1812.05905."""
    assert reward.shape == done.shape == next_q.shape == next_log_prob.shape
    return reward + gamma * (1 - done) * (next_q - alpha * next_log_prob)


def twin_loss(q: Tensor, target: Tensor) -> Tensor:
    """Squared error, mean over the batch, sum over the critics: q [2, B], target [B] -> scalar."""
    assert q.shape[1:] == target.shape
    return (q - target).square().mean(1).sum()


def soft_actor_loss(q: Tensor, log_prob: Tensor, alpha: Tensor) -> Tensor:
    """mean (α log π − min_i Q_i): q [2, B], log_prob [B] -> scalar."""
    assert q.shape[1:] == log_prob.shape
    return (alpha * log_prob - q.amin(0)).mean()


def temperature_loss(log_alpha: Tensor, log_prob: Tensor, target_entropy: float) -> Tensor:
    """−log α · mean (log π + H̄): α falls while the entropy −log π is above H̄. log_prob [B] -> scalar."""
    return -log_alpha * (log_prob.detach() + target_entropy).mean()


@torch.no_grad()
def polyak(target: nn.Module, source: nn.Module, tau: float) -> None:
    """target ← target + τ (source − target), all parameters in one call."""
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), tau)


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


class GaussianEnsemble(nn.Module):
    """Diagonal Gaussians over (s' − s, r) given (s, a), one network per member, trained and sampled together.

    Inputs are normalised and clipped to ±5 deviations, so that a diverging rollout grows at most linearly;
    outputs are in the task's units. Log-variances are softly bounded, the bounds learned (arXiv 1805.12114).
    """

    def __init__(self, members: int, obs_dim: int, action_dim: int, layers: int, hidden: int):
        super().__init__()
        sizes = [obs_dim + action_dim, *[hidden] * layers, 2 * (obs_dim + 1)]
        self.layers = nn.ModuleList(StackedLinear(members, *size) for size in pairwise(sizes))
        self.max_log_var = nn.Parameter(torch.full((obs_dim + 1,), 0.5))
        self.min_log_var = nn.Parameter(torch.full((obs_dim + 1,), -10.0))
        self.register_buffer("mean", torch.zeros(obs_dim))
        self.register_buffer("std", torch.ones(obs_dim))
        self.members = members

    def fit_normalizer(self, obs: Tensor) -> None:
        """Mean and deviation of obs [N, n]; a constant dimension keeps deviation 1."""
        self.mean.copy_(obs.mean(0))
        std = obs.std(0, correction=0)
        self.std.copy_(torch.where(std > 1e-6, std, 1.0))

    def normalize(self, obs: Tensor) -> Tensor:
        return ((obs - self.mean) / self.std).clamp(-5, 5)

    def forward(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """obs [E, B, n], action [E, B, m] -> mean and log-variance of (s' − s, r), each [E, B, n + 1]."""
        x = torch.cat([self.normalize(obs), action], 2)
        for layer in self.layers[:-1]:
            x = layer(x).relu_()
        mean, log_var = self.layers[-1](x).chunk(2, 2)
        log_var = self.max_log_var - F.softplus(self.max_log_var - log_var)
        return mean, self.min_log_var + F.softplus(log_var - self.min_log_var)

    def step(self, obs: Tensor, action: Tensor, noise: bool = True) -> tuple[Tensor, Tensor]:
        """obs [B, n], action [B, m] -> sampled next obs [B, n] and reward [B]; without noise the means."""
        # a random permutation deals the rows out to the members evenly: 1/E of the cost of asking all of them
        places = -(-len(obs) // self.members) * self.members
        order = torch.randperm(places, device=obs.device)
        rows, back = order % len(obs), order.argsort()[: len(obs)]
        stack = (self.members, places // self.members, -1)
        outputs = self(obs[rows].view(stack), action[rows].view(stack))
        mean, log_var = (x.flatten(0, 1)[back] for x in outputs)
        delta = mean + (0.5 * log_var).exp() * torch.randn_like(mean) if noise else mean
        return obs + delta[:, :-1], delta[:, -1]


class Termination(nn.Module):
    """Logit of the termination of (s, a, s'), observations normalised: [B, n], [B, m], [B, n] -> [B]."""

    def __init__(self, obs_dim: int, action_dim: int, hidden: int = 64):
        super().__init__()
        sizes = [(2 * obs_dim + action_dim, hidden), (hidden, hidden), (hidden, 1)]
        self.layers = nn.ModuleList(nn.Linear(*size) for size in sizes)

    def forward(self, obs: Tensor, action: Tensor, next_obs: Tensor) -> Tensor:
        x = torch.cat([obs, action, next_obs], 1)
        return self.layers[2](self.layers[1](self.layers[0](x).relu_()).relu_()).squeeze(1)


def gaussian_nll(mean: Tensor, log_var: Tensor, target: Tensor) -> Tensor:
    """Σ_j (target − mean)² / σ² + log σ², log σ² = log_var: [E, B, k] each -> [E, B] (no ½, as released)."""
    assert mean.shape == log_var.shape == target.shape
    return ((target - mean).square() * (-log_var).exp() + log_var).sum(2)


class ImaginedReplay(nn.Module):
    """Ring of imagined transitions whose capacity may change; part of the agent, and so of its checkpoint."""

    def __init__(self, widths: tuple[int, ...], device: torch.device):
        super().__init__()
        self.widths, self.rows, self.added = widths, torch.zeros(0, sum(widths), device=device), 0

    @property
    def size(self) -> int:
        return min(self.added, len(self.rows))

    def in_order(self) -> Tensor:
        """All rows held, oldest first."""
        first = self.added % len(self.rows) if self.added > len(self.rows) else 0
        return torch.cat([self.rows[first : self.size], self.rows[:first]])

    def resize(self, capacity: int) -> None:
        """Another capacity; the newest transitions stay."""
        if capacity == len(self.rows):
            return
        kept = self.in_order()[-capacity:] if self.added else self.rows
        self.rows = torch.zeros(capacity, sum(self.widths), device=self.rows.device)
        self.rows[: len(kept)], self.added = kept, len(kept)

    def extend(self, batch: Batch) -> None:
        """Add B transitions, at most as many as the ring holds."""
        rows = torch.cat([x if x.ndim == 2 else x[:, None] for x in batch], 1)
        at = torch.arange(self.added, self.added + len(rows), device=rows.device) % len(self.rows)
        self.rows[at], self.added = rows, self.added + len(rows)

    def draw(self, count: int) -> Batch:
        """Transitions [count], uniform with replacement."""
        at = torch.randint(self.size, (count,), device=self.rows.device)
        obs, action, reward, next_obs, terminated = self.rows.index_select(0, at).split(self.widths, 1)
        return Batch(obs, action, reward.squeeze(1), next_obs, terminated.squeeze(1))

    def state_dict(self) -> dict:
        sizes = torch.tensor([len(self.rows), self.added])
        return {"sizes": sizes, "rows": self.rows[: self.size].to("cpu", copy=True)}

    def load_state_dict(self, state: dict) -> None:
        capacity, self.added = state["sizes"].tolist()
        self.rows = torch.zeros(capacity, sum(self.widths), device=self.rows.device)
        self.rows[: self.size] = state["rows"]


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


def rollout_steps(epoch: int, starts: int, ends: int, first: int, last: int) -> int:
    """(8): steps k of the rollouts in an epoch."""
    return int(first + min(max((epoch - starts) / (ends - starts), 0), 1) * (last - first))  # (8)


def penalty(model: GaussianEnsemble) -> Tensor:
    """½ Σ_l w_l ‖W_l‖² of (6), over all members: w 2.5e-5, 5e-5, then 7.5e-5, for the last layer 1e-4."""
    hidden = len(model.layers) - 1
    weights = [*[2.5e-5, 5e-5, *[7.5e-5] * hidden][:hidden], 1e-4]
    return sum(0.5 * w * layer.weight.square().sum() for w, layer in zip(weights, model.layers, strict=True))


def ensemble_loss(model: GaussianEnsemble, obs: Tensor, action: Tensor, target: Tensor) -> Tensor:
    """(6): obs [E, B, n], action [E, B, m], target [E, B, n + 1] -> scalar, a mean over the n + 1."""
    mean, log_var = model(obs, action)
    nll = gaussian_nll(mean, log_var, target).mean(1).sum() / target.shape[2]
    return nll + 0.01 * (model.max_log_var - model.min_log_var).sum() + penalty(model)  # (6)


class Agent:
    """SAC that learns from what an ensemble imagines."""

    captured = ("policy", "learn", "fit_minibatch")  # as CUDA graphs; in `branch` rows end: shapes change

    def __init__(self, args: Args, obs_dim: int, action_dim: int, device: torch.device):
        self.args, self.sizes, self.device = args, (obs_dim, action_dim), device
        self.target_entropy = -float(action_dim) if args.target_entropy is None else args.target_entropy
        self.actor = Actor(obs_dim, action_dim, args.hidden).to(device)
        self.critic = Critic(obs_dim, action_dim, args.hidden).to(device)
        self.critic_target = Critic(obs_dim, action_dim, args.hidden).to(device).requires_grad_(False)
        self.critic_target.load_state_dict(self.critic.state_dict())
        self.log_alpha = torch.tensor(math.log(args.init_alpha), device=device, requires_grad=True)
        groups = [
            {"params": list(self.actor.parameters()), "lr": args.actor_lr},
            {"params": list(self.critic.parameters()), "lr": args.critic_lr},
            {"params": [self.log_alpha], "lr": args.alpha_lr},
        ]  # Adam works elementwise: one for all is faster
        fast = device.type == "cuda"
        self.optimizer = optim.Adam(groups, fused=True, capturable=fast)
        sizes = (obs_dim, action_dim, args.model_layers, args.model_hidden)
        self.model = GaussianEnsemble(args.members, *sizes).to(device)
        self.elites = GaussianEnsemble(args.elites, *sizes).to(device).requires_grad_(False)
        adam = {"lr": args.model_lr, "fused": True, "capturable": fast}
        self.model_optimizer = optim.Adam(self.model.parameters(), **adam)
        self.termination = Termination(obs_dim, action_dim).to(device)
        self.termination_optimizer = optim.Adam(self.termination.parameters(), **adam)
        self.imagined = ImaginedReplay((obs_dim, action_dim, 1, obs_dim, 1), device)
        self.refit_report = torch.zeros(6, device=device)  # of the last refit and its rollouts
        self.rule = None  # make_buffer sees the task and may find it

    def make_buffer(self, capacity: int, env: gym.Env) -> ReplayBuffer:
        """The replay that `train` fills with steps of env; also looks for the rule of its terminations."""
        self.rule = known_termination(env) if self.args.termination_rule == "auto" else None
        if self.rule is not None:
            del self.termination, self.termination_optimizer
        longest = max(0, self.args.total_timesteps - self.args.learning_starts - 1) // self.args.epoch_length
        needed = self.room(longest)[1] if self.args.real_ratio < 1 else 0
        most = int(0.9 * available_memory(self.device) / (8 * sum(self.imagined.widths)))  # and a checkpoint
        fits = f"such that the {needed} transitions it imagines at last are at most {most}"
        require(needed <= most, "rollout_batch", self.args.rollout_batch, f"{fits}, for the memory here")
        return ReplayBuffer(capacity, env.observation_space.shape[0], env.action_space.shape[0], self.device)

    def act(self, obs: np.ndarray, deterministic: bool = False) -> np.ndarray:
        """obs [n] -> action [m] in [−1, 1]; deterministic is tanh of the Gaussian's mean."""
        obs = torch.as_tensor(np.float32(obs), device=self.device)
        return self.policy(obs[None], deterministic)[0].cpu().numpy()

    @torch.no_grad()
    def policy(self, obs: Tensor, deterministic: bool) -> Tensor:
        mean, log_std = self.actor(obs)
        u = mean if deterministic else mean + log_std.exp() * torch.randn_like(mean)
        return u.tanh()

    def update(self, buffer: ReplayBuffer, step: int) -> dict[str, Tensor]:
        """The gradient steps of one environment step, refit and rollouts before them where they are due."""
        args, since = self.args, step - self.args.learning_starts - 1
        real = int(args.real_ratio * args.batch_size)
        if real < args.batch_size and since % args.model_interval == 0:
            self.refit(buffer)
            self.branch(buffer, since // args.epoch_length)
        for _ in range(args.updates_per_step):
            batch = buffer[buffer.sample(real)]
            if real < args.batch_size:
                mixed = zip(batch, self.imagined.draw(args.batch_size - real), strict=True)
                batch = Batch(*(torch.cat(both) for both in mixed))
            metrics = self.learn(batch)
        if real == args.batch_size:
            return metrics
        names = ("smallest_error", "largest_error", "epochs", "rollout_length", "imagined", "ended")
        return metrics | {f"model/{n}": x for n, x in zip(names, self.refit_report.clone(), strict=True)}

    def critic_loss(self, batch: Batch, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """Scalar, and the values q [2, B] that it draws to their targets."""
        gamma = self.args.gamma
        with torch.no_grad():
            next_action, next_log_prob = self.actor.sample(batch.next_obs)
            next_q = self.critic_target(batch.next_obs, next_action).amin(0)
            target = soft_target(batch.reward, batch.terminated, next_q, next_log_prob, alpha, gamma)  # (1)
        q = self.critic(batch.obs, batch.action)
        return twin_loss(q, target), q  # (2)

    def learn(self, batch: Batch) -> dict[str, Tensor]:
        alpha = self.log_alpha.detach().exp()
        critic_loss, q = self.critic_loss(batch, alpha)
        action, log_prob = self.actor.sample(batch.obs)
        actor_loss = soft_actor_loss(self.critic(batch.obs, action, frozen=True), log_prob, alpha)  # (3)
        alpha_loss = temperature_loss(self.log_alpha, log_prob, self.target_entropy)  # (4)

        self.optimizer.zero_grad()
        (critic_loss + actor_loss + alpha_loss).backward()  # no parameter is in two of them
        self.optimizer.step()
        polyak(self.critic_target, self.critic, self.args.tau)  # (5)
        return {
            "losses/qf_loss": critic_loss.detach(),
            "losses/qf_values": q.detach().mean(),
            "losses/actor_loss": actor_loss.detach(),
            "losses/alpha_loss": alpha_loss.detach(),
            "losses/alpha": alpha,
            "losses/entropy": -log_prob.detach().mean(),
        }

    def refit(self, buffer: ReplayBuffer) -> None:
        """Train all members from where they stand; each keeps its best weights; then elites are chosen."""
        args, members = self.args, self.args.members
        order = torch.randperm(buffer.size, device=self.device)
        count = min(buffer.size // 5, 5_000)
        held, train = buffer[order[:count]], order[count:]
        self.model.fit_normalizer(buffer[train].obs)
        rows = train[torch.randint(len(train), (members, len(train)), device=self.device)]  # the bootstraps
        weights = [p for layer in self.model.layers for p in layer.parameters()]
        kept, best, stale, epoch = [p.detach().clone() for p in weights], [math.inf] * members, 0, 0
        steps = -(-len(train) // args.batch_size)  # of an epoch
        while stale <= 5 and epoch * steps < args.refit_steps:
            *whole, last = rows.split(args.batch_size, 1)
            for at in whole:
                self.fit_minibatch(buffer[at.flatten()])
            Agent.fit_minibatch(self, buffer[last.flatten()])  # no graph: it has another size in each refit
            rows = rows.gather(1, torch.rand(rows.shape, device=self.device).argsort(1))
            errors = self.held_out_errors(held).tolist()
            better = [new < 0.99 * old for old, new in zip(best, errors, strict=True)]
            for e in range(members):
                if better[e]:
                    best[e] = errors[e]
                    for old, new in zip(kept, weights, strict=True):
                        old[e] = new.detach()[e]
            stale, epoch = 0 if any(better) else stale + 1, epoch + 1
        with torch.no_grad():
            for old, new in zip(kept, weights, strict=True):
                new.copy_(old)
        errors = self.held_out_errors(held)
        self.choose_elites(errors.argsort()[: args.elites])
        report = [errors.min(), errors.max(), torch.tensor(float(epoch), device=self.device)]
        self.refit_report[:3] = torch.stack(report)

    def fit_minibatch(self, batch: Batch) -> None:
        """One gradient step of all members, B of the E B rows for each, and of a classifier on B."""
        stack = (self.args.members, len(batch.reward) // self.args.members, -1)
        target = torch.cat([batch.next_obs - batch.obs, batch.reward[:, None]], 1)
        loss = ensemble_loss(self.model, *(x.view(stack) for x in (batch.obs, batch.action, target)))
        self.model_optimizer.zero_grad()
        loss.backward()
        self.model_optimizer.step()
        if self.rule is None:
            self.fit_classifier(Batch(*(x[: stack[1]] for x in batch)))

    def fit_classifier(self, batch: Batch) -> None:
        """One gradient step of the learned termination."""
        logit = self.predict_termination(batch.obs, batch.action, batch.next_obs)
        loss = F.binary_cross_entropy_with_logits(logit, batch.terminated)
        self.termination_optimizer.zero_grad()
        loss.backward()
        self.termination_optimizer.step()

    @torch.no_grad()
    def held_out_errors(self, held: Batch) -> Tensor:
        """Mean square error of each member's mean, in the task's units: [E]."""
        target = torch.cat([held.next_obs - held.obs, held.reward[:, None]], 1)
        inputs = (x.expand(self.args.members, -1, -1) for x in (held.obs, held.action))
        return (self.model(*inputs)[0] - target).square().mean((1, 2))

    @torch.no_grad()
    def choose_elites(self, places: Tensor) -> None:
        """Copy these members [E*] into the ensemble that imagines."""
        source = self.model.state_dict()
        chosen = {k: v[places] if k.startswith("layers") else v for k, v in source.items()}
        self.elites.load_state_dict(chosen)

    def predict_termination(self, obs: Tensor, action: Tensor, next_obs: Tensor) -> Tensor:
        """Logit [B] that the step from obs [B, n] to next_obs [B, n] ended the episode."""
        return self.termination(self.model.normalize(obs), action, self.model.normalize(next_obs))

    def room(self, epoch: int) -> tuple[int, int]:
        """Steps of an epoch's rollouts, and how many transitions the imagined replay then holds."""
        args = self.args
        growth = (args.growth_starts, args.growth_ends, args.rollout_length, args.rollout_length_max)
        steps = rollout_steps(epoch, *growth)
        lot = steps * args.rollout_batch
        return steps, args.retain_epochs * max(lot * args.epoch_length // args.model_interval, lot)

    @torch.no_grad()
    def branch(self, buffer: ReplayBuffer, epoch: int) -> None:
        """(7): rollouts of the present policy from replayed states, all of them into the imagined replay."""
        args = self.args
        steps, capacity = self.room(epoch)
        self.imagined.resize(capacity)
        obs, ends, before = buffer[buffer.sample(args.rollout_batch)].obs, 0.0, self.imagined.added
        for _ in range(steps):
            action = self.actor.sample(obs)[0]
            next_obs, reward = self.elites.step(obs, action)  # (7)
            if self.rule is None:
                done = (self.predict_termination(obs, action, next_obs) > 0).to(obs.dtype)
            else:
                done = self.rule(next_obs)
            self.imagined.extend(Batch(obs, action, reward, next_obs, done))
            ends, obs = ends + float(done.sum()), next_obs[done == 0]
            if not len(obs):
                break
        found = [steps, self.imagined.size, ends / (self.imagined.added - before)]
        self.refit_report[3:] = torch.tensor(found, device=self.device)

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
