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

import argparse
import contextlib
import ctypes
import dataclasses
import io
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
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

ALGO = Path(__file__).stem
CHECKPOINT_FORMAT = 1
SIGNALS = []  # SIGINT or SIGTERM, once received
Count = Annotated[int, (1, math.inf)]  # the pair is the allowed range, checked by check_ranges
Natural = Annotated[int, (0, 2**31 - 1)]
Width = Annotated[int, (1, 65_536)]
Fraction = Annotated[float, (0, 1)]
Rate = Annotated[float, (0, math.inf)]


class BadInput(ValueError):
    """The user's mistake: one line on stderr, exit code 2."""


class RunFailed(RuntimeError):
    """A run that cannot go on: one line on stderr, exit code 1, its last good checkpoint kept."""


def require(ok: bool, name: str, value: object, allowed: str) -> None:
    """Raise BadInput that names the argument, its value and what is allowed."""
    if not ok:
        raise BadInput(f"--{name.replace('_', '-')} {value}: must be {allowed}")


def check_ranges(args: object) -> None:
    """Raise BadInput for the first field outside the range in its annotation, or not finite."""
    for field in dataclasses.fields(args):
        value, limits = getattr(args, field.name), [x for x in get_args(field.type) if isinstance(x, tuple)]
        for low, high in limits or [(-math.inf, math.inf)] * isinstance(value, float):
            allowed = f"at least {low}" if high == math.inf else f"in [{low}, {high}]"
            allowed = "finite" if low == -math.inf else allowed
            require(low <= value <= high and math.isfinite(value), field.name, value, allowed)


@dataclass
class Run:
    """The task, the loop around the agent and what it leaves on disk; the same in every file."""

    env_id: str = "InvertedPendulum-v5"
    """Gymnasium id; package.module:Name-v0 imports the module that registers it."""
    seed: Natural = 1
    """Seeds weights, noise, replay sampling and the task; evaluation uses seed + 100."""
    total_timesteps: Count = 10_000
    """Environment steps, warm-up included."""
    learning_starts: Count = 1_000
    """Uniformly random actions before the first update (SAC's authors: 1 000 to 10 000)."""
    batch_size: Count = 256
    """Transitions per update (Haarnoja et al. 2018)."""
    buffer_size: Count = 1_000_000
    """Replay capacity in transitions (Haarnoja et al. 2018); at most total_timesteps are allocated."""
    eval_every: Count = 1_000
    """Steps between evaluations (ours, for short tasks; 5 000 is the custom for runs of a million)."""
    eval_episodes: Count = 10
    """Episodes per evaluation, deterministic policy (protocol of Fujimoto et al. 2018)."""
    log_every: Count = 100
    """Steps between TensorBoard points; only then are metrics read and checked to be finite (ours)."""
    checkpoint_every: Count = 5_000
    """Steps after which the next episode's end writes a checkpoint (ours)."""
    runs_dir: str = "runs"
    """Parent of the run folders."""
    resume: str = ""
    """Run folder to continue with its own arguments; only --total-timesteps may be raised."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where there is one."""
    num_threads: Annotated[int, (1, 1024)] = 2
    """CPU threads of PyTorch (2: measured, docs/sac.md); the exact bits of a run depend on it."""
    capture_video: bool = False
    """Record the first episode of each evaluation (needs moviepy; without a display MUJOCO_GL=osmesa)."""

    def __post_init__(self) -> None:
        check_ranges(self)
        warm_up = f"at most --learning-starts {self.learning_starts} (the first batch comes from the warm-up)"
        require(self.batch_size <= self.learning_starts, "batch_size", self.batch_size, warm_up)
        total = f"below --total-timesteps {self.total_timesteps} (nothing would be learned)"
        require(self.learning_starts < self.total_timesteps, "learning_starts", self.learning_starts, total)
        require(self.batch_size <= self.buffer_size, "buffer_size", self.buffer_size, "at least --batch-size")
        usable = self.device != "cuda" or torch.cuda.is_available()
        require(usable, "device", self.device, "auto or cpu here: torch finds no CUDA device")

    @classmethod
    def defaults(cls, argv: list[str] | None) -> dict[str, object]:
        """Every argument where the command line says nothing; argv matters to files that have presets."""
        return dataclasses.asdict(cls())


@dataclass
class SAC:
    """Soft actor-critic."""

    gamma: Fraction = 0.99
    """Discount factor γ (Haarnoja et al. 2018)."""
    tau: Fraction = 0.005
    """Polyak step τ of the target critics (Haarnoja et al. 2018)."""
    actor_lr: Rate = 3e-4
    """Adam step size of the actor (Haarnoja et al. 2018)."""
    critic_lr: Rate = 3e-4
    """Adam step size of the critics (Haarnoja et al. 2018)."""
    alpha_lr: Rate = 3e-4
    """Adam step size of log α (Haarnoja et al. 2018)."""
    init_alpha: Annotated[float, (1e-8, 1e8)] = 1.0
    """First temperature α (authors' code)."""
    target_entropy: float | None = None
    """H̄ in nats of the [−1, 1] action; None is −dim(A) (Haarnoja et al. 2018)."""
    hidden: Width = 256
    """Units in each hidden layer of actor and critics (Haarnoja et al. 2018: two layers)."""


class Setting(NamedTuple):
    """What the released code sets for a task; growth is (e_0, e_1, k_0, k_1) of (8)."""

    updates_per_step: int
    growth: tuple[int, int, int, int]
    target_entropy: float
    epoch_length: int = 1_000
    model_interval: int = 250
    retain_epochs: int = 1
    learning_starts: int = 5_000


SETTINGS = {  # by the task's id without version
    "InvertedPendulum": Setting(10, (1, 15, 1, 1), -0.05, 250, learning_starts=500),
    "InvertedDoublePendulum": Setting(20, (1, 15, 1, 1), -0.5, 250, learning_starts=500),
    "Hopper": Setting(20, (20, 150, 1, 15), -1.0),
    "Walker2d": Setting(20, (20, 150, 1, 1), -3.0),
    "HalfCheetah": Setting(40, (20, 150, 1, 1), -3.0),
    "Ant": Setting(20, (20, 100, 1, 25), -4.0),
    "Humanoid": Setting(20, (20, 300, 1, 25), -2.0, 1_000, 1_000, 5),
}


@dataclass
class BranchedRollouts:
    """The ensemble and what it imagines."""

    preset: Literal["laptop", "released"] = "laptop"
    """released: networks, rollouts and updates of the released code; any flag overrides it."""
    updates_per_step: Count = 10
    """Gradient steps per environment step (released: by task, 10 to 40; laptop: at most 10)."""
    real_ratio: Fraction = 0.05
    """Share of real transitions in a batch (released)."""
    model_interval: Count = 250
    """Steps from one refit of the ensemble, and one lot of rollouts, to the next (released)."""
    rollout_batch: Count = 10_000
    """Rollouts started each time (ours; released: 100 000)."""
    epoch_length: Count = 1_000
    """Steps of an epoch of (8) (released: by task, 250 or 1 000)."""
    growth_starts: Natural = 20
    """e_0 of (8), in epochs (released: by task)."""
    growth_ends: Natural = 150
    """e_1 of (8), in epochs (released: by task)."""
    rollout_length: Count = 1
    """k_0 of (8) (released)."""
    rollout_length_max: Count = 1
    """k_1 of (8) (released: by task, 1 to 25)."""
    retain_epochs: Count = 1
    """Epochs of rollouts that the imagined replay holds (released: 1; Humanoid 5)."""
    termination_rule: Literal["auto", "learned"] = "auto"
    """auto: the task's rule where we have it (released), else a classifier."""
    members: Annotated[int, (1, 1024)] = 7
    """Networks in the ensemble (released)."""
    elites: Annotated[int, (1, 1024)] = 5
    """Members that imagine, those with the smallest held-out error (released)."""
    model_layers: Annotated[int, (1, 64)] = 3
    """Hidden layers of each (ours; released: 4)."""
    model_hidden: Width = 128
    """Units in each hidden layer of the model (ours; released: 200)."""
    model_lr: Rate = 1e-3
    """Adam step size of the model (released)."""
    refit_steps: Count = 500
    """Gradient steps after which a refit begins no new epoch (ours; released: no limit, here 10 million)."""


@dataclass
class Args(Run, SAC, BranchedRollouts):
    def __post_init__(self) -> None:
        Run.__post_init__(self)
        require(self.elites <= self.members, "elites", self.elites, f"at most --members {self.members}")
        ordered = self.rollout_length <= self.rollout_length_max
        allowed = f"at least --rollout-length {self.rollout_length}"
        require(ordered, "rollout_length_max", self.rollout_length_max, allowed)
        later = self.growth_starts < self.growth_ends
        require(later, "growth_ends", self.growth_ends, f"above --growth-starts {self.growth_starts}")
        enough = "at least 5 (a fifth is held out from the model)"
        require(self.learning_starts >= 5, "learning_starts", self.learning_starts, enough)

    @classmethod
    def defaults(cls, argv: list[str] | None) -> dict[str, object]:
        """The dataclass's defaults, then the task's of the released code, then the preset's sizes."""
        peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        peek.add_argument("--preset", nargs="?", default=cls.preset)
        peek.add_argument("--env-id", "--env_id", nargs="?", default=cls.env_id)
        given, _ = peek.parse_known_args(argv)
        values = dataclasses.asdict(cls())
        name = re.sub(r"-v\d+$", "", re.split("[/:]", str(given.env_id))[-1])
        if name in SETTINGS:
            found = SETTINGS[name]._asdict()
            growth = ("growth_starts", "growth_ends", "rollout_length", "rollout_length_max")
            values |= dict(zip(growth, found.pop("growth"), strict=True)) | found
        if given.preset == "released":
            sizes = {"model_layers": 4, "model_hidden": 200, "refit_steps": 10_000_000}
            return values | sizes | {"rollout_batch": 100_000}
        for name, most in (("updates_per_step", 10), ("learning_starts", 1_000)):
            values[name] = min(most, values[name])
        return values


class StackedLinear(nn.Module):
    """Linear layers of one shape as one batched product: [members, B, inputs] -> [members, B, outputs].

    Each member starts like nn.Linear: U(±1/√inputs).
    """

    def __init__(self, members: int, inputs: int, outputs: int):
        super().__init__()
        bound = 1 / math.sqrt(inputs)
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
    """Ring of transitions, preallocated in float32, with the number of the episode each belongs to.

    Raises BadInput if it and its copy in a checkpoint would take more than 90 % of the available memory.
    """

    def __init__(self, capacity: int, obs_dim: int, action_dim: int, device: torch.device):
        self.widths = (obs_dim, action_dim, 1, obs_dim, 1)
        row_bytes = 2 * (4 * sum(self.widths) + 4)
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
        """obs [B, n], action [B, m] -> sampled next obs [B, n] and reward [B]; without noise the means.

        Each row goes through one random member: a random permutation deals the rows out evenly, which costs
        1/E of evaluating all members; unlike independent draws it is exactly balanced.
        """
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

    The paper's seven tasks as Gymnasium's version 5 and as mbpo/..-v0 of experiments.suites. Other
    bounds are unknown; what never terminates never does here.
    """
    task = env.unwrapped
    name, width = type(task).__name__.removesuffix("Env"), env.observation_space.shape[0]
    widths = {"InvertedPendulum": {4}, "InvertedDoublePendulum": {9}, "Hopper": {11}, "Walker2d": {17}}
    widths |= {"HalfCheetah": {17}, "Ant": {27, 105}, "Humanoid": {45, 348}}
    bounds = {"Hopper": ((0.7, math.inf), (-0.2, 0.2)), "Walker2d": ((0.8, 2.0), (-1.0, 1.0))}
    bounds |= {"Ant": ((0.2, 1.0), None), "Humanoid": ((1.0, 2.0), None)}
    found = tuple(getattr(task, f"_healthy_{part}_range", None) for part in ("z", "angle"))
    known = type(task).__module__.endswith("_v5") and width in widths.get(name, ())
    if not known or found != bounds.get(name, (None, None)):
        return None
    if not getattr(task, "_terminate_when_unhealthy", True):
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
        elif name == "Humanoid":
            alive = (height >= 1) & (height <= 2)
        else:  # HalfCheetah
            return torch.zeros_like(height)
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

    def __init__(self, args: Args, obs_dim: int, action_dim: int, device: torch.device):
        self.args, self.device = args, device
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
        ]
        self.optimizer = optim.Adam(groups, fused=True)  # Adam works elementwise: one for all is faster
        sizes = (obs_dim, action_dim, args.model_layers, args.model_hidden)
        self.model = GaussianEnsemble(args.members, *sizes).to(device)
        self.elites = GaussianEnsemble(args.elites, *sizes).to(device).requires_grad_(False)
        self.model_optimizer = optim.Adam(self.model.parameters(), lr=args.model_lr, fused=True)
        self.termination = Termination(obs_dim, action_dim).to(device)
        self.termination_optimizer = optim.Adam(self.termination.parameters(), lr=args.model_lr, fused=True)
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

    @torch.no_grad()
    def act(self, obs: np.ndarray, deterministic: bool = False) -> np.ndarray:
        """obs [n] -> action [m] in [−1, 1]; deterministic is tanh of the Gaussian's mean."""
        mean, log_std = self.actor(torch.as_tensor(obs, device=self.device)[None])
        u = mean if deterministic else mean + log_std.exp() * torch.randn_like(mean)
        return u.tanh()[0].cpu().numpy()

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
        if real < args.batch_size:
            names = ("smallest_error", "largest_error", "epochs", "rollout_length", "imagined", "ended")
            metrics |= {f"model/{n}": x for n, x in zip(names, self.refit_report.clone(), strict=True)}
        return metrics

    def learn(self, batch: Batch) -> dict[str, Tensor]:
        """One gradient step of sac.py on a batch."""
        alpha, gamma, tau = self.log_alpha.detach().exp(), self.args.gamma, self.args.tau
        with torch.no_grad():
            next_action, next_log_prob = self.actor.sample(batch.next_obs)
            next_q = self.critic_target(batch.next_obs, next_action).amin(0)
            target = soft_target(batch.reward, batch.terminated, next_q, next_log_prob, alpha, gamma)  # (1)
        q = self.critic(batch.obs, batch.action)
        critic_loss = twin_loss(q, target)  # (2)

        action, log_prob = self.actor.sample(batch.obs)
        actor_loss = soft_actor_loss(self.critic(batch.obs, action, frozen=True), log_prob, alpha)  # (3)
        alpha_loss = temperature_loss(self.log_alpha, log_prob, self.target_entropy)  # (4)

        self.optimizer.zero_grad()
        (critic_loss + actor_loss + alpha_loss).backward()  # no parameter is in two of them
        self.optimizer.step()
        polyak(self.critic_target, self.critic, tau)  # (5)
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
        held, train = buffer[order[:count]], buffer[order[count:]]
        self.model.fit_normalizer(train.obs)
        target = torch.cat([train.next_obs - train.obs, train.reward[:, None]], 1)
        rows = torch.randint(len(target), (members, len(target)), device=self.device)  # the bootstraps
        weights = [p for layer in self.model.layers for p in layer.parameters()]
        kept, best, stale, epoch = [p.detach().clone() for p in weights], [math.inf] * members, 0, 0
        steps = -(-len(target) // args.batch_size)  # of an epoch
        while stale <= 5 and epoch * steps < args.refit_steps:
            for at in rows.split(args.batch_size, 1):
                loss = ensemble_loss(self.model, train.obs[at], train.action[at], target[at])
                self.model_optimizer.zero_grad()
                loss.backward()
                self.model_optimizer.step()
                if self.rule is None:
                    self.fit_classifier(train, at[0])
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

    def fit_classifier(self, train: Batch, at: Tensor) -> None:
        """One gradient step of the learned termination on rows `at` [B]."""
        logit = self.predict_termination(train.obs[at], train.action[at], train.next_obs[at])
        loss = F.binary_cross_entropy_with_logits(logit, train.terminated[at])
        self.termination_optimizer.zero_grad()
        loss.backward()
        self.termination_optimizer.step()

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


def available_memory(device: torch.device) -> float:
    """Bytes that can still be allocated."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with contextlib.suppress(OSError, TypeError):  # Linux
        return 1024 * int(re.search(r"MemAvailable: +(\d+)", Path("/proc/meminfo").read_text())[1])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def make_env(env_id: str, video_dir: Path | None = None) -> gym.Env:
    """The task with flat observations and actions in [−1, 1]; with video_dir its first episode is recorded.

    Raises BadInput for an unknown id, for spaces that this family cannot serve, and where rendering fails.
    """
    try:
        render = {} if video_dir is None else {"render_mode": "rgb_array"}
        env = gym.make(env_id, disable_env_checker=True, **render)
        if video_dir is not None:
            env.reset()
            env.render()
            env = gym.wrappers.RecordVideo(env, str(video_dir), lambda i: i == 0, disable_logger=True)
    except Exception as error:  # tasks and renderers fail in many ways
        why = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        require(video_dir is None, "capture_video", True, f"off where rendering fails: {why}")
        require(False, "env_id", env_id, f"a task that can be made: {why}")
    space, box = env.observation_space, env.action_space
    require(isinstance(space, gym.spaces.Box), "env_id", env_id, f"with Box observations, not {space}")
    continuous = isinstance(box, gym.spaces.Box) and np.issubdtype(box.dtype, np.floating)
    bounded = continuous and box.is_bounded() and (box.low < box.high).all()
    require(bounded, "env_id", env_id, f"with a bounded, continuous Box of actions, not {box}")
    flat = gym.spaces.Box(box.low.ravel(), box.high.ravel(), dtype=box.dtype)
    clip = lambda action: np.clip(action, flat.low, flat.high).reshape(box.shape)  # noqa: E731  rounding overshoots
    env = gym.wrappers.TransformAction(gym.wrappers.FlattenObservation(env), clip, flat)
    return gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))


def finite(step: int, name: str, value) -> np.ndarray:
    """The task's number or array as float32. Raises BadInput if it is not finite."""
    with np.errstate(over="ignore"):
        result = np.asarray(value, np.float32)
    if not np.isfinite(result).all():
        raise BadInput(f"step {step}: the task's {name} must be finite in float32, got {value}")
    return result


def take_step(env: gym.Env, action: np.ndarray, step: int) -> tuple[np.ndarray, float, bool, bool]:
    """env.step as float32 and float. Raises RunFailed or BadInput if agent or task is not finite."""
    if not np.isfinite(action).all():
        raise RunFailed(f"step {step}: the agent's action is not finite: {action}")
    obs, reward, terminated, truncated, _ = env.step(action)
    finite(step, "reward", reward)
    return finite(step, "observation", obs), float(reward), bool(terminated), bool(truncated)


def evaluate(agent: "Agent", args: "Args", step: int, video_dir: Path | None) -> dict[str, float]:
    """Undiscounted return of the deterministic policy, on a task of its own and always from the same seed."""
    env, returns, lengths = make_env(args.env_id, video_dir), [], []
    for episode in range(args.eval_episodes):
        if SIGNALS:
            raise SystemExit(128 + SIGNALS[0])
        obs, done = env.reset(seed=None if episode else args.seed + 100)[0], False
        obs, episode_return, length = finite(step, "observation", obs), 0.0, 0
        while not done:
            obs, reward, terminated, truncated = take_step(env, agent.act(obs, deterministic=True), step)
            episode_return, length, done = episode_return + reward, length + 1, terminated or truncated
        returns.append(episode_return)
        lengths.append(length)
    env.close()
    stats = {"return_mean": np.mean(returns), "return_std": np.std(returns), "length_mean": np.mean(lengths)}
    return {"step": step} | {k: float(v) for k, v in stats.items()} | {"episodes": args.eval_episodes}


def write_atomically(path: Path, write, keep: Path | None = None) -> None:
    """write(file), fsync, rename: path holds old bytes or new, `keep` then the old. Raises RunFailed."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as the latter
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise RunFailed(f"cannot write {path}: {error}") from error


def write_evaluations(run_dir: Path, rows: list[dict]) -> None:
    lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows), ""]
    write_atomically(run_dir / "eval.csv", lambda file: file.write("\n".join(lines).encode()))


def write_args(run_dir: Path, args: "Args") -> None:
    """args.json: every argument, the versions that the bits depend on, the commit of this file."""
    record = {"algo": ALGO, "args": dataclasses.asdict(args), "python": platform.python_version()}
    for name in ("torch", "numpy", "gymnasium", "mujoco"):
        with contextlib.suppress(PackageNotFoundError):
            record[name] = version(name)
    git = [
        "git",
        "-C",
        str(Path(__file__).resolve().parent),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
    ]
    try:
        record["git_commit"] = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        record["git_commit"] = None
    write_atomically(run_dir / "args.json", lambda file: file.write(json.dumps(record, indent=2).encode()))


def save_checkpoint(path: Path, state: dict) -> None:
    """Write atomically, keep the one before. Raises RunFailed if a tensor of the agent is not finite."""
    for keys, leaf in torch.utils._pytree.tree_flatten_with_path(state["agent"])[0]:
        if isinstance(leaf, Tensor) and not leaf.isfinite().all():
            name = ".".join(str(getattr(key, "key", key)) for key in keys)
            raise RunFailed(f"step {state['step']}: {name} is not finite")
    write_atomically(path, lambda file: torch.save(state, file), path.with_suffix(".previous.pt"))


def load_checkpoint(run_dir: Path) -> dict:
    """The newest checkpoint of a run. Raises BadInput if there is none, or it is damaged or foreign."""
    path = run_dir / "checkpoint.pt"
    if not path.exists():  # killed between the two renames of save_checkpoint
        path = path.with_suffix(".previous.pt")
    require(path.exists(), "resume", run_dir, "a run folder with a checkpoint.pt")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        found = (state["algo"], state["format"])
    except Exception as error:  # damaged files raise many types
        hint = f"without damage: {path.name} is unreadable (delete it to fall back on checkpoint.previous.pt)"
        raise BadInput(f"--resume {run_dir}: must be a run {hint}") from error
    ours = f"a run of {ALGO}, format {CHECKPOINT_FORMAT}"
    require(
        found == (ALGO, CHECKPOINT_FORMAT), "resume", run_dir, f"{ours}, not {found[0]}, format {found[1]}"
    )
    return state


@contextlib.contextmanager
def staged(run_dir: Path):
    """Yield a hidden folder that becomes run_dir if the block succeeds and vanishes without trace if not."""
    hidden, parents = run_dir.with_name("." + run_dir.name), [p for p in run_dir.parents if not p.exists()]
    try:
        try:
            hidden.mkdir(parents=True)
        except OSError as error:
            require(False, "runs_dir", run_dir.parent, f"a folder that can be written: {error.strerror}")
        yield hidden
        hidden.rename(run_dir)
    except BaseException:
        shutil.rmtree(hidden, ignore_errors=True)
        with contextlib.suppress(OSError):
            for parent in parents:
                parent.rmdir()
        raise


def train(args: "Args") -> Path:
    """Start or resume a run and return its folder.

    Raises BadInput for the user's mistakes (a new run then leaves nothing on disk) and RunFailed.
    """
    torch.set_num_threads(args.num_threads)
    torch.set_flush_denormal(True)
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    env = make_env(args.env_id)
    env.reset(seed=args.seed)
    task_rng = env.unwrapped.np_random.bit_generator
    dims = env.observation_space.shape[0], env.action_space.shape[0]
    agent = Agent(args, *dims, device)
    buffer = agent.make_buffer(min(args.buffer_size, args.total_timesteps), env)
    step, episode, rows, seconds_before, started = 0, 0, [], 0.0, time.perf_counter()

    def seconds() -> float:
        return round(seconds_before + time.perf_counter() - started, 2)

    def evaluate_into(folder: Path) -> None:
        row = evaluate(agent, args, step, folder / "videos" / f"step-{step}" if args.capture_video else None)
        rows.append(row | {"seconds": seconds()})
        write_evaluations(folder, rows)
        tqdm.write(f"step {step:>8}  evaluation return {row['return_mean']:9.2f} ± {row['return_std']:.2f}")

    def save(path: Path) -> None:
        """At an episode's end the task's state is its generator alone, so resuming is exact."""
        state = {"format": CHECKPOINT_FORMAT, "algo": ALGO, "args": dataclasses.asdict(args) | {"resume": ""}}
        state |= {"step": step, "episode": episode, "rows": rows, "seconds": seconds()}
        state |= {"torch_rng": torch.get_rng_state(), "task_rng": json.dumps(task_rng.state)}
        state |= {"cuda_rng": torch.cuda.get_rng_state() if device.type == "cuda" else None}
        save_checkpoint(path, state | {"agent": agent.state_dict(), "buffer": buffer.state_dict()})

    if args.resume:
        run_dir = Path(args.resume)
        saved = load_checkpoint(run_dir)
        for name, value in saved["args"].items():
            given, longer = getattr(args, name), name == "total_timesteps" and args.total_timesteps > value
            allowed = f"{value} as in {run_dir}: a resumed run may only get more --total-timesteps"
            require(given == value or name == "resume" or longer, name, given, allowed)
        planned = json.loads((run_dir / "args.json").read_text())["args"]["total_timesteps"]
        if (run_dir / "final.pt").exists() and planned == args.total_timesteps:
            print(f"{run_dir} is complete: {args.total_timesteps} steps")
            return run_dir
        written_on = "cpu" if saved["cuda_rng"] is None else "cuda"
        require(written_on == device.type, "device", device.type, f"{written_on} as in {run_dir}")
        try:
            agent.load_state_dict(saved["agent"])
            buffer.load_state_dict(saved["buffer"])
        except (KeyError, RuntimeError, ValueError) as error:
            raise BadInput(f"--resume {run_dir}: must fit the task as it is now: {error}") from error
        step, episode, rows, seconds_before = (saved[k] for k in ("step", "episode", "rows", "seconds"))
        torch.set_rng_state(saved["torch_rng"])
        if device.type == "cuda":
            torch.cuda.set_rng_state(saved["cuda_rng"])
        task_rng.state = json.loads(saved["task_rng"])
        (run_dir / "final.pt").unlink(missing_ok=True)
        write_args(run_dir, args)
        write_evaluations(run_dir, rows)
        print(f"resuming {run_dir} at step {step}")
        del saved
    else:
        name = f"{args.env_id}__{ALGO}__{args.seed}__{datetime.now():%Y%m%d-%H%M%S-%f}"
        run_dir = Path(args.runs_dir) / re.sub(r"[^\w.-]+", "-", name)
        with staged(run_dir) as folder:  # from its first moment on the folder can be resumed
            evaluate_into(folder)
            write_args(folder, args)
            save(folder / "checkpoint.pt")

    writer = SummaryWriter(run_dir, purge_step=step + 1 if step else 0)
    bar = tqdm(total=args.total_timesteps, initial=step, mininterval=0.5 if sys.stderr.isatty() else 30)

    def log(scalars: dict[str, object]) -> None:
        for name, value in scalars.items():
            if not math.isfinite(value := float(value)):
                raise RunFailed(f"step {step}: {name} is {value}; {run_dir} keeps its last good checkpoint")
            writer.add_scalar(name, value, step)

    def log_evaluation() -> None:
        log({f"eval/episodic_{name}": rows[-1][f"{name}_mean"] for name in ("return", "length")})

    last_save, last_log, last_time, episode_return, episode_start = step, step, time.perf_counter(), 0.0, step
    try:
        if step == 0:
            log_evaluation()
        obs = finite(step, "observation", env.reset()[0])
        while step < args.total_timesteps:
            if SIGNALS:
                raise SystemExit(128 + SIGNALS[0])
            step += 1
            warm_up = step <= args.learning_starts
            action = 2 * torch.rand(dims[1]).numpy() - 1 if warm_up else agent.act(obs)
            next_obs, reward, terminated, truncated = take_step(env, action, step)
            buffer.add(obs, action, reward, next_obs, terminated, episode)
            obs, episode_return = next_obs, episode_return + reward
            metrics = {} if warm_up else agent.update(buffer, step)
            bar.update()

            if step % args.log_every == 0:
                speed = (step - last_log) / (time.perf_counter() - last_time)
                log(metrics | {"charts/SPS": speed, "time/seconds": seconds()})
                last_log, last_time = step, time.perf_counter()
            if step % args.eval_every == 0 or step == args.total_timesteps:
                before = time.perf_counter()
                evaluate_into(run_dir)
                log_evaluation()
                log({"time/evaluation": time.perf_counter() - before})
                last_time += time.perf_counter() - before  # charts/SPS is the speed of training alone
            if terminated or truncated:
                length = step - episode_start
                log({"charts/episodic_return": episode_return, "charts/episodic_length": length})
                bar.set_postfix_str(f"return={episode_return:.1f}", refresh=False)
                episode, episode_return, episode_start = episode + 1, 0.0, step
                if step - last_save >= args.checkpoint_every and step < args.total_timesteps:
                    writer.flush()
                    save(run_dir / "checkpoint.pt")
                    last_save = step
                obs = finite(step, "observation", env.reset()[0])
        writer.flush()
        save(run_dir / "final.pt")
    except SystemExit:
        again = f"python {sys.argv[0]} --resume {run_dir}"
        bar.close()
        print(f"stopped at step {step}; to continue: {again}", file=sys.stderr)
        raise
    finally:
        bar.close()
        writer.close()
        env.close()
    print(f"done: {run_dir}, last evaluation {rows[-1]['return_mean']:.2f} ± {rows[-1]['return_std']:.2f}")
    return run_dir


def parse(argv: list[str] | None = None) -> "Args":
    """Args from the command line, grouped in --help by the classes Args inherits. Raises BadInput.

    With --resume the defaults are the run's own arguments, so that only what was typed can differ.
    """
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--resume", nargs="?")
    resume, defaults = peek.parse_known_args(argv)[0].resume, Args.defaults(argv)
    if resume:
        try:
            defaults |= json.loads((Path(resume) / "args.json").read_text())["args"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BadInput(f"--resume {resume}: must be a run folder with a readable args.json") from error
    values = [g(**{f.name: defaults[f.name] for f in dataclasses.fields(g)}) for g in Args.__bases__]
    groups = [(g.__name__, tyro.conf.OmitArgPrefixes[g]) for g in Args.__bases__]
    flags, box = dataclasses.make_dataclass("Flags", groups), io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            parsed = tyro.cli(flags, args=argv, description=__doc__, default=flags(*values))
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        lines = [line.strip(" │|╭╮╰╯─+") for line in box.getvalue().splitlines()[1:]]  # tyro's frame
        text = " ".join(line for line in lines if line.strip("-"))
        text = re.split(" Argument helptext| For full helptext", text)[0]
        raise BadInput(re.sub(r"^Error parsing \w+: ", "", text)) from None
    return Args(**{name: value for group in vars(parsed).values() for name, value in vars(group).items()})


def stop_after_this_step(number: int, _: object) -> None:
    """Note the signal for the loop: raised anywhere, an exception can break a lock. A second one kills."""
    os.write(2, b"stopping; once more to kill\n")
    SIGNALS.append(number)
    signal.signal(number, signal.SIG_DFL)


def main(learn) -> None:
    sys.path.append(os.getcwd())  # --env-id package.module:Name-v0 finds modules where you stand
    if platform.libc_ver()[0] == "glibc":  # keep freed memory: mapping it anew costs a tenth of an update
        ctypes.CDLL(None).mallopt(-1, 1 << 28)  # M_TRIM_THRESHOLD
        ctypes.CDLL(None).mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD, as large as glibc allows
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop_after_this_step)
    try:
        learn(parse())
    except (BadInput, RunFailed, OSError) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2 if isinstance(error, BadInput) else 1)


if __name__ == "__main__":
    main(train)
