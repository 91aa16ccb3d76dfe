"""Soft actor-critic with value-aware models (SAC-VAML), Lovatto et al. 2020, "Decision-Aware Model Learning".

sac.py whose critics bootstrap from states that a one-step model draws anew for every update. The model can be
fitted to be likely, or to be right about the *value* of where a step leads, and about nothing else:

    ŝ   = s + μ(s, a) + σ(s, a) ε,  ε ~ N(0, I)                                    (1a)
    y   = r(s, a, ŝ) + γ (1 − d(s, a, ŝ)) (min_i Q̄_i(ŝ, â) − α log π(â|ŝ))         (1b)
    V(s) = min_i Q̄_i(s, a) − α log π(a|s),  a = π(s, ξ), one noise ξ per row        (6)
    L_MLE  = mean Σ_d ½ ((s'_d − s_d − μ_d) / σ_d)² + log σ_d + ½ log 2π            (7)
    L_VAML = mean (V(s') − 1/n Σ_j V(ŝ_j))²                                         (8a)
    L_f    = c L_MLE + (1 − c) L_VAML                                               (9)

(2), (3), (4), (5) are sac.py's. --model-loss mle: c = 1; vaml: c = 0; reg-vaml: c falls from 0.001 to 0.
For V = wᵀs, E L_VAML = (wᵀ(s' − s − μ))² + Σ w² σ² / n: with finite n it drives σ to 0. Not in the paper:

    vaml-unbiased:  mean (V(s') − V̄_1) (V(s') − V̄_2), V̄ over two halves of the n samples      (8b)
    vagram:         mean Σ_d (∂V/∂s'_d)² (s'_d − s_d − μ_d)², ŝ = s + μ (arXiv 2204.01464)       (8c)

The model is refitted every --model-interval steps, from where it stands, with early stopping. Rewards and
terminations are the task's formulas for InvertedPendulum-v5 and Pusher-v5 and learned for others.

    python algos/sac_vaml.py                             # InvertedPendulum-v5
    python algos/sac_vaml.py --model-loss mle --env-id Pusher-v5 --total-timesteps 50_000
    python algos/sac_vaml.py --resume runs/<run>         # goes on where it stopped, in the same bits
"""

import argparse
import contextlib
import copy
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


@dataclass
class ValueAwareModel:
    """One-step model, refitted again and again."""

    model_loss: Literal["mle", "vaml", "reg-vaml", "vaml-unbiased", "vagram"] = "reg-vaml"
    """(7), (8a), both (Lovatto et al. 2020), (8b) (ours) or (8c) (Voelcker et al. 2022)."""
    mle_coefficient: Fraction = 1e-3
    """First c of reg-vaml (Lovatto et al. 2020); reg-vaml alone."""
    mle_decay: Count = 10_000
    """Steps over which c of reg-vaml falls to 0 (Lovatto et al. 2020: the whole run); reg-vaml alone."""
    samples: Count = 1
    """Samples n of (8a) and (8b) per transition (ours; the paper does not say); not for mle, vagram."""
    critic_actions: Literal["replay", "policy"] = "replay"
    """Actions of (1a) and (2): the recorded ones (Lovatto et al. 2020), or new ones of the policy."""
    outcomes: Literal["auto", "learned"] = "auto"
    """r and d of (1b): auto takes the task's formula where we have it (Lovatto et al. 2020), else learned."""
    model_interval: Count = 25
    """Steps from one fit of the model to the next (ours)."""
    fit_steps: Count = 120
    """Gradient steps of a fit at most; the first, after the warm-up, is not limited (authors' library)."""
    fit_epochs: Count = 10
    """Passes over the replay in a fit at most; 100 in the first (authors' library)."""
    patience: Count = 5
    """Passes without a lower loss on held-out transitions after which a fit ends (ours)."""
    model_layers: Annotated[int, (1, 64)] = 2
    """Hidden layers of the model (Lovatto et al. 2020)."""
    model_hidden: Width = 128
    """Units in each hidden layer of the model (authors' library)."""
    model_lr: Rate = 3e-4
    """Adam step size of the model (authors' library)."""
    model_batch: Count = 256
    """Transitions per gradient step of the model (authors' library)."""
    weight_decay: Rate = 1e-4
    """L2 penalty in the model's Adam (authors' library)."""


@dataclass
class Args(Run, SAC, ValueAwareModel):
    def __post_init__(self) -> None:
        Run.__post_init__(self)
        even = self.model_loss != "vaml-unbiased" or self.samples % 2 == 0
        require(even, "samples", self.samples, "even with --model-loss vaml-unbiased")
        enough = "at least 5 (a fifth is held out from the model)"
        for name in ("learning_starts", "buffer_size"):
            require(getattr(self, name) >= 5, name, getattr(self, name), enough)


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


class DeltaGaussian(nn.Module):
    """Diagonal Gaussians over s' − s given (s, a), one network per member.

    SiLU, two linear heads, log σ softly held in [low, high]. Dimensions that never change are copied through.
    """

    def __init__(
        self, members: int, obs_dim: int, action_dim: int, layers: int, hidden: int, low=-20.0, high=2.0
    ):
        super().__init__()
        self.members, self.low, self.high = members, low, high
        sizes = [obs_dim + action_dim, *[hidden] * layers]
        self.layers = nn.ModuleList(StackedLinear(members, *size) for size in pairwise(sizes))
        self.mean, self.log_std = (StackedLinear(members, sizes[-1], obs_dim) for _ in range(2))
        for layer in self.layers:
            bound = math.sqrt(6 / sum(layer.weight.shape[1:]))
            nn.init.uniform_(layer.weight, -bound, bound)
            nn.init.zeros_(layer.bias)
        for head in (self.mean, self.log_std):
            for matrix in head.weight.data:
                nn.init.orthogonal_(matrix, 0.01)
            nn.init.zeros_(head.bias)
        self.register_buffer("varying", torch.ones(obs_dim))  # 0 where s' is always s

    def forward(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Mean μ and log σ of the change: obs [E or 1, B, n], action [E or 1, B, m] -> [E, B, n] each."""
        x = torch.cat([obs, action], 2).expand(self.members, -1, -1)
        for layer in self.layers:
            x = F.silu(layer(x))
        log_std = self.high - F.softplus(self.high - self.log_std(x))
        return self.mean(x) * self.varying, self.low + F.softplus(log_std - self.low)

    def draw(self, obs: Tensor, action: Tensor, samples: int) -> Tensor:
        """(1a): reparameterised next obs [samples, E, B, n]."""
        return self.scatter(obs, *self(obs, action), samples)

    def scatter(self, obs: Tensor, mean: Tensor, log_std: Tensor, samples: int) -> Tensor:
        """`draw` where μ and log σ are known already."""
        noise = torch.randn(samples, *mean.shape, device=mean.device)
        return obs + mean + self.varying * log_std.exp() * noise  # (1a)


class Outcome(nn.Module):
    """Reward and logit of the termination of (s, a, s'): [B, n], [B, m], [B, n] -> [B] each."""

    def __init__(self, obs_dim: int, action_dim: int, hidden: int = 128):
        super().__init__()
        sizes = [2 * obs_dim + action_dim, hidden, hidden, 1]
        self.layers = nn.ModuleList(StackedLinear(2, *size) for size in pairwise(sizes))

    def forward(self, obs: Tensor, action: Tensor, next_obs: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.cat([obs, action, next_obs], 1).expand(2, -1, -1)
        for layer in self.layers[:-1]:
            x = layer(x).relu_()
        reward, logit = self.layers[-1](x).squeeze(2)
        return reward, logit


def known_outcome(env: gym.Env, device: torch.device):
    """The task's formulas as a function of (obs [B, n], action [B, m], next obs) -> reward, done [B] each.

    InvertedPendulum-v5 and Pusher-v5 as registered; None for other tasks. Reward and termination belong to
    the state after the step, as in version 5; actions are in [−1, 1].
    """
    task = env.unwrapped
    name = getattr(task.spec, "id", None)
    if name not in ("InvertedPendulum-v5", "Pusher-v5"):
        return None
    low, high = (torch.as_tensor(x, device=device) for x in (task.action_space.low, task.action_space.high))

    def inverted_pendulum_outcome(obs: Tensor, action: Tensor, next_obs: Tensor) -> tuple[Tensor, Tensor]:
        alive = next_obs.isfinite().all(1) & (next_obs[:, 1].abs() <= 0.2)
        return alive.to(obs.dtype), (~alive).to(obs.dtype)

    def pusher_outcome(obs: Tensor, action: Tensor, next_obs: Tensor) -> tuple[Tensor, Tensor]:
        tip, thing, goal = next_obs[:, 14:].split(3, 1)
        control = (low + (action + 1) * (high - low) / 2).square().sum(1)
        near, far = (torch.linalg.vector_norm(thing - x, dim=1) for x in (tip, goal))
        weights = (task._reward_near_weight, task._reward_dist_weight, task._reward_control_weight)
        reward = -sum(w * x for w, x in zip(weights, (near, far, control), strict=True))
        return reward, torch.zeros_like(reward)

    return inverted_pendulum_outcome if name == "InvertedPendulum-v5" else pusher_outcome


def likelihood_loss(delta: Tensor, mean: Tensor, log_std: Tensor, varying: Tensor) -> Tensor:
    """(7): Gaussian negative log-likelihood, over varying dimensions, mean over B: [E, B, n] -> [E]."""
    assert mean.shape == log_std.shape and delta.shape[-2:] == mean.shape[-2:]
    nll = 0.5 * ((delta - mean) * (-log_std).exp()).square() + log_std + 0.5 * math.log(2 * math.pi)
    return (nll * varying).sum(2).mean(1)


def value_aware_loss(value: Tensor, imagined: Tensor) -> Tensor:
    """(8a): values at s' [E or 1, B], at n samples of ŝ [n, E, B] -> [E]."""
    assert value.shape[1:] == imagined.shape[2:]
    return (value - imagined.mean(0)).square().mean(1)


def unbiased_value_aware_loss(value: Tensor, imagined: Tensor) -> Tensor:
    """(8b): product of two independent residuals, whose mean has no variance term: shapes as in (8a)."""
    assert len(imagined) % 2 == 0 and value.shape[1:] == imagined.shape[2:]
    first, second = imagined.chunk(2)
    return ((value - first.mean(0)) * (value - second.mean(0))).mean(1)


def gradient_aware_loss(error: Tensor, gradient: Tensor) -> Tensor:
    """(8c): squared errors weighted by squared slopes of V at s': error [E, B, n], gradient [B, n] -> [E]."""
    assert error.shape[1:] == gradient.shape
    return (gradient * error).square().sum(2).mean(1)


@contextlib.contextmanager
def constant(module: nn.Module):
    """What is computed inside has no gradient with respect to the module's weights, only through it."""
    try:
        module.requires_grad_(False)
        yield
    finally:
        module.requires_grad_(True)


FIT_REPORT = ("value_error", "value_error_share", "nll", "std", "fit_steps")


class Agent:
    """SAC whose critics learn at states drawn from a one-step model."""

    def __init__(self, args: Args, obs_dim: int, action_dim: int, device: torch.device):
        self.args, self.action_dim, self.device = args, action_dim, device
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
        sizes = (args.model_layers, args.model_hidden)
        self.model = DeltaGaussian(1, obs_dim, action_dim, *sizes).to(device)
        self.model_optimizer = optim.Adam(
            self.model.parameters(), lr=args.model_lr, weight_decay=args.weight_decay, fused=True
        )
        self.outcome = Outcome(obs_dim, action_dim).to(device)
        self.outcome_optimizer = optim.Adam(self.outcome.parameters(), lr=args.critic_lr, fused=True)
        self.formula = None  # make_buffer sees the task and may find it
        self.fit_report = torch.zeros(len(FIT_REPORT), device=device)  # of the last fit

    def make_buffer(self, capacity: int, env: gym.Env) -> ReplayBuffer:
        """The replay that `train` fills with steps of env; also looks for the formulas of its outcomes."""
        self.formula = known_outcome(env, self.device) if self.args.outcomes == "auto" else None
        if self.formula is not None:
            del self.outcome, self.outcome_optimizer
        return ReplayBuffer(capacity, env.observation_space.shape[0], env.action_space.shape[0], self.device)

    @torch.no_grad()
    def act(self, obs: np.ndarray, deterministic: bool = False) -> np.ndarray:
        """obs [n] -> action [m] in [−1, 1]; deterministic is tanh of the Gaussian's mean."""
        mean, log_std = self.actor(torch.as_tensor(obs, device=self.device)[None])
        u = mean if deterministic else mean + log_std.exp() * torch.randn_like(mean)
        return u.tanh()[0].cpu().numpy()

    def predict_outcome(self, obs: Tensor, action: Tensor, next_obs: Tensor) -> tuple[Tensor, Tensor]:
        """Reward and whether it ended, 0 or 1, of the step from obs [B, n] to next_obs: [B] each."""
        if self.formula is not None:
            return self.formula(obs, action, next_obs)
        reward, logit = self.outcome(obs, action, next_obs)
        return reward, (logit > 0).to(obs.dtype)

    def update(self, buffer: ReplayBuffer, step: int) -> dict[str, Tensor]:
        """One gradient step, the model's many before it where they are due. Metrics stay tensors."""
        args = self.args
        if step == args.learning_starts + 1 or step % args.model_interval == 0:
            self.fit_model_again(buffer, step)
        batch = buffer[buffer.sample(args.batch_size)]
        metrics = self.fit_outcome(batch) if self.formula is None else {}
        alpha, gamma, tau = self.log_alpha.detach().exp(), args.gamma, args.tau
        with torch.no_grad():
            recorded = args.critic_actions == "replay"
            taken = batch.action if recorded else self.actor.sample(batch.obs)[0]
            imagined = self.imagine_next(batch.obs, taken)  # (1a)
            reward, done = self.predict_outcome(batch.obs, taken, imagined)
            next_action, next_log_prob = self.actor.sample(imagined)
            next_q = self.critic_target(imagined, next_action).amin(0)
            target = soft_target(reward, done, next_q, next_log_prob, alpha, gamma)  # (1b)
        q = self.critic(batch.obs, taken)
        critic_loss = twin_loss(q, target)  # (2)

        action, log_prob = self.actor.sample(batch.obs)
        actor_loss = soft_actor_loss(self.critic(batch.obs, action, frozen=True), log_prob, alpha)  # (3)
        alpha_loss = temperature_loss(self.log_alpha, log_prob, self.target_entropy)  # (4)

        self.optimizer.zero_grad()
        (critic_loss + actor_loss + alpha_loss).backward()  # no parameter is in two of them
        self.optimizer.step()
        polyak(self.critic_target, self.critic, tau)  # (5)
        metrics |= {f"model/{name}": x for name, x in zip(FIT_REPORT, self.fit_report.clone(), strict=True)}
        return metrics | {
            "losses/qf_loss": critic_loss.detach(),
            "losses/qf_values": q.detach().mean(),
            "losses/actor_loss": actor_loss.detach(),
            "losses/alpha_loss": alpha_loss.detach(),
            "losses/alpha": alpha,
            "losses/entropy": -log_prob.detach().mean(),
        }

    def imagine_next(self, obs: Tensor, action: Tensor) -> Tensor:
        """(1a), the mean alone for vagram, whose σ is not trained: [B, n]."""
        if self.args.model_loss == "vagram":
            return obs + self.model(obs[None], action[None])[0][0]
        return self.model.draw(obs[None], action[None], 1)[0, 0]

    def soft_value(self, obs: Tensor, noise: Tensor) -> Tensor:
        """(6) with the noise of the policy given: obs [.., B, n], noise [B, m] -> [.., B]."""
        noise = noise.expand(*obs.shape[:-1], -1).reshape(-1, noise.shape[1])
        flat = obs.reshape(-1, obs.shape[-1])
        mean, log_std = self.actor(flat)
        u = mean + log_std.exp() * noise
        q = self.critic_target(flat, u.tanh()).amin(0)
        value = q - self.log_alpha.detach().exp() * squashed_log_prob(noise, log_std, u)  # (6)
        return value.view(obs.shape[:-1])

    def model_loss(
        self, batch: Batch, share: float, samples: int, first_epoch: bool, fixed: Tensor | None = None
    ) -> Tensor:
        """(9) with c = share, or (8c); the gradient reaches ψ through V and the policy's action, and no other
        weight. fixed: the batch's rows of `once_per_fit`, without which ξ and V(s') of (8a) are new."""
        kind, obs, action = self.args.model_loss, batch.obs[None], batch.action[None]
        delta, loss = (batch.next_obs - batch.obs)[None], torch.zeros((), device=self.device)
        mean, log_std = self.model(obs, action)
        if kind == "vagram":
            loss = gradient_aware_loss(delta - mean, fixed)[0]  # (8c)
            return loss + (delta - mean).square().sum(2).mean() if first_epoch else loss
        if share > 0:
            loss = share * likelihood_loss(delta, mean, log_std, self.model.varying)[0]  # (7)
        if share < 1:
            aware = unbiased_value_aware_loss if kind == "vaml-unbiased" else value_aware_loss
            if fixed is None or fixed.shape[1] == 0:
                fixed = self.valued(batch.next_obs)
            noise, value = fixed[:, :-1], fixed[:, -1]
            with constant(self.actor):
                imagined = self.soft_value(self.model.scatter(obs, mean, log_std, samples), noise)
            loss = loss + (1 - share) * aware(value[None], imagined)[0]  # (8a, 8b, 9)
        return loss

    @torch.no_grad()
    def valued(self, obs: Tensor) -> Tensor:
        """New noise ξ of the policy and V(s) with it: [N, n] -> [N, m + 1]."""
        noise = torch.randn(len(obs), self.action_dim, device=self.device)
        parts = zip(obs.split(4096), noise.split(4096), strict=True)
        return torch.cat([noise, torch.cat([self.soft_value(*part) for part in parts])[:, None]], 1)

    def once_per_fit(self, obs: Tensor, share: float, most: float) -> Tensor:
        """What of the loss does not depend on the model, at all s' of the replay [N, n]: slopes [N, n] for
        vagram; ξ and V(s') [N, m + 1] for value-aware losses, unless `most` steps see fewer rows than N."""
        if self.args.model_loss == "vagram":
            return self.value_slopes(obs)
        worth_it = share < 1 and len(obs) <= most * self.args.model_batch
        return self.valued(obs) if worth_it else obs[:, :0]

    def value_slopes(self, obs: Tensor) -> Tensor:
        """∂V/∂s of the mean over critics at obs [N, n] -> [N, n], norms cut at their 0.95 quantile."""
        found, alpha = [], self.log_alpha.detach().exp()
        for part in obs.split(4096):
            with torch.enable_grad(), constant(self.actor):
                part = part.detach().requires_grad_()
                mean, log_std = self.actor(part)
                noise = torch.randn_like(mean)
                u = mean + log_std.exp() * noise
                value = self.critic_target(part, u.tanh()).mean(0) - alpha * squashed_log_prob(
                    noise, log_std, u
                )
                found += torch.autograd.grad(value.sum(), part)
        slope = torch.cat(found)
        norm = torch.linalg.vector_norm(slope, dim=1, keepdim=True)
        return slope * (norm.quantile(0.95) / norm).clamp_max(1).nan_to_num(1.0)

    def mle_share(self, step: int) -> float:
        """c of (9) at an environment step."""
        decayed = self.args.mle_coefficient * max(0.0, 1 - step / self.args.mle_decay)
        return {"mle": 1.0, "reg-vaml": decayed}.get(self.args.model_loss, 0.0)

    def fit_model_again(self, buffer: ReplayBuffer, step: int) -> None:
        """The fit that is due at an environment step; the first one is long."""
        first = not self.model_optimizer.state
        limits = (100, math.inf) if first else (self.args.fit_epochs, self.args.fit_steps)
        self.fit_until_worse(buffer, self.mle_share(step), *limits)

    def fit_until_worse(self, buffer: ReplayBuffer, share: float, epochs: int, most: float) -> None:
        """Gradient steps from where the model stands, until the loss of held-out transitions has not fallen
        for `patience` epochs, or for `epochs` of them, or `most` steps. The best weights are kept."""
        args, first = self.args, not self.model_optimizer.state
        order = torch.randperm(buffer.size, device=self.device)
        count = min(buffer.size // 5, 1_000)
        held, train = order[:count], order[count:]
        n, rows = len(self.model.varying), buffer.rows[: buffer.size]
        self.model.varying.copy_((rows[:, -1 - n : -1] != rows[:, :n]).any(0))
        fixed = self.once_per_fit(rows[:, -1 - n : -1], share, most)
        taken, best, bad, kept = 0, math.inf, 0, copy.deepcopy(self.model.state_dict())
        for epoch in range(epochs):
            for at in train[torch.randperm(len(train), device=self.device)].split(args.model_batch):
                loss = self.model_loss(buffer[at], share, args.samples, first and epoch == 0, fixed[at])
                self.model_optimizer.zero_grad()
                loss.backward()
                self.model_optimizer.step()
                taken += 1
                if taken == most:
                    break
            with torch.no_grad():
                score = float(self.model_loss(buffer[held], share, max(8, args.samples), False, fixed[held]))
            better = score < best
            if better:
                best, kept = score, copy.deepcopy(self.model.state_dict())
            bad = 0 if better else bad + 1
            if bad == args.patience or taken == most:
                break
        self.model.load_state_dict(kept)
        self.report_fit(buffer[held[:256]], taken)

    @torch.no_grad()
    def report_fit(self, batch: Batch, taken: int) -> None:
        """Errors of the fitted model on held-out transitions, whatever loss it was fitted with."""
        obs, action = batch.obs[None], batch.action[None]
        noise = torch.randn_like(batch.action)
        value = self.soft_value(batch.next_obs, noise)
        draws = self.imagine_next(batch.obs, batch.action)[None, None]
        if self.args.model_loss != "vagram":
            draws = self.model.draw(obs, action, 32)
        error = value_aware_loss(value[None], self.soft_value(draws, noise))[0]
        mean, log_std = self.model(obs, action)
        varying = self.model.varying
        nll = likelihood_loss((batch.next_obs - batch.obs)[None], mean, log_std, varying)[0]
        std = (log_std.exp() * varying).sum() / (varying.sum() * len(batch.obs)).clamp_min(1)
        share = error / value.var(correction=0).clamp_min(1e-8)
        steps = torch.tensor(float(taken), device=self.device)
        self.fit_report.copy_(torch.stack([error, share, nll, std, steps]))

    def fit_outcome(self, batch: Batch) -> dict[str, Tensor]:
        """One gradient step of the learned reward and termination on real transitions."""
        reward, logit = self.outcome(batch.obs, batch.action, batch.next_obs)
        reward_loss = (reward - batch.reward).square().mean()
        ended_loss = F.binary_cross_entropy_with_logits(logit, batch.terminated)
        self.outcome_optimizer.zero_grad()
        (reward_loss + ended_loss).backward()
        self.outcome_optimizer.step()
        return {"model/reward_loss": reward_loss.detach(), "model/termination_loss": ended_loss.detach()}

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
