"""Model-based action-gradient estimator (MAGE), D'Oro and Jaśkowski 2020, "How to Learn a Useful Critic?".

A deterministic actor climbs ∇_a Q and nothing else of the critic. So td3.py's critics are trained here until
the *action gradient* of their error is small, which takes a model that can be differentiated: s' and r come
from a Gaussian ensemble at the actor's own action, one random member per state.

    a = π(s),  ŝ, r̂ ~ f(s, a) pathwise,  ã = clip(π̄(ŝ) + clip(σ̃ ε, −c, c), −1, 1)                (1a)
    y = r̂ + γ (1 − d̂) min_i Q̄_i(ŝ, ã),   g = ∇_a y                                              (1b)
    L_Q = ½ Σ_i mean w_g h(‖g − ∇_a Q_i(s, a)‖) + w h(y − Q_i(s, a)),   h Huber's loss            (2)
    L_π = −mean min_i Q_i(s, π(s)),  every second update                                          (3)  Q fixed
    Q̄   ← Q̄ + τ (Q − Q̄),  every update;   π̄ ← π̄ + τ (π − π̄),  every second                       (4)
    a   = clip(π(s) + σ ε, −1, 1)                                                                 (5)

∇_a of the error is g − ∇_a Q, and only its second part depends on the critics: g is computed once and held,
which gives the same gradient as differentiating through the model twice. --grad-weight 0 is Dyna-TD3: the
same learner, no idea. Actor and critics are smooth (SiLU). The model is sac_mve.py's:

    L_f = mean Σ_j (Δ_j − μ_j)² / σ_j² + log σ_j²,  Δ = (s' − s, r)                               (6)
    L_d = cross-entropy of the termination of (s, a, s')                                          (7)

    python algos/mage.py
    python algos/mage.py --env-id Pusher-v5 --total-timesteps 20_000
    python algos/mage.py --resume runs/<run>      # goes on where it stopped, in the same bits
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
class MAGE:
    """Model-based action-gradient estimator."""

    gamma: Fraction = 0.99
    """Discount factor γ (D'Oro and Jaśkowski 2020)."""
    tau: Fraction = 0.005
    """Polyak step τ of the slow copies (D'Oro and Jaśkowski 2020)."""
    actor_lr: Rate = 3e-4
    """Adam step size of the actor (ours; authors' code: RAdam, 1e-4)."""
    critic_lr: Rate = 3e-4
    """Adam step size of the critics (ours; authors' code: RAdam, 1e-4)."""
    hidden: Width = 128
    """Units in each of two hidden layers (ours, for laptops; authors' code: 384)."""
    grad_weight: Rate = 5.0
    """w_g, weight of the action gradient (authors' code); 0 is Dyna-TD3."""
    td_weight: Rate = 1.0
    """w, weight of the error itself (authors' code; the paper's λ is w / w_g = 0.2)."""
    updates_per_step: Count = 5
    """Gradient steps per environment step (ours, for laptops; authors' code: 10)."""
    gradient_clip: Rate = 5.0
    """Largest element of a gradient of actor or critics (authors' code)."""
    exploration_noise: Rate = 0.1
    """σ of the noise on actions while gathering data (authors' code)."""
    policy_noise: Rate = 0.2
    """σ̃ of the noise on the slow actor's action (Fujimoto et al. 2018)."""
    noise_clip: Rate = 0.5
    """c, the most that this noise may be (Fujimoto et al. 2018)."""
    policy_delay: Count = 2
    """Updates of the critics per update of the actor and its slow copy (Fujimoto et al. 2018)."""


@dataclass
class DifferentiableModel:
    """The ensemble that is differentiated."""

    members: Annotated[int, (1, 1024)] = 4
    """Networks in the ensemble (ours, for laptops; authors' code: 8)."""
    model_layers: Annotated[int, (1, 64)] = 2
    """Hidden layers of each (ours, for laptops; authors' code: 4)."""
    model_hidden: Width = 128
    """Units in each hidden layer of the model (ours, for laptops; authors' code: 512)."""
    model_lr: Rate = 1e-3
    """Adam step size of the model (ours; authors' code: RAdam, 1e-4)."""
    model_warm_up: Natural = 500
    """Model updates before the first critic update (ours)."""
    model_updates: Natural = 4
    """Model updates per step (ours; authors' code: 120 or more every 25 steps)."""
    normalize_every: Count = 1_000
    """Steps between refreshes of the mean and deviation that normalise observations (ours)."""


@dataclass
class Args(Run, MAGE, DifferentiableModel):
    def __post_init__(self) -> None:
        Run.__post_init__(self)
        learns = self.grad_weight > 0 or self.td_weight > 0
        require(learns, "td_weight", self.td_weight, "above 0 where --grad-weight is 0")


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


class SmoothMLP(nn.Module):
    """SiLU members of one shape in parallel: [members or 1, B, inputs] -> [members, B, outputs].

    Twice differentiable, as the gradient of a gradient needs. Xavier's weights, no biases, as released.
    """

    def __init__(self, members: int, sizes: list[int]):
        super().__init__()
        self.members = members
        self.layers = nn.ModuleList(StackedLinear(members, *size) for size in pairwise(sizes))
        for layer in self.layers:
            bound = math.sqrt(6 / sum(layer.weight.shape[1:]))
            nn.init.uniform_(layer.weight, -bound, bound)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, frozen: bool = False) -> Tensor:
        """With `frozen` the weights are constants: the gradient flows to x alone."""
        x = x.expand(self.members, -1, -1)
        for layer in self.layers[:-1]:
            x = F.silu(layer(x, frozen))
        return self.layers[-1](x, frozen)


class SmoothQFunctions(SmoothMLP):
    """Action values: obs [B, n], action [B, m], or one for each member [members, B, m] -> [members, B]."""

    def forward(self, obs: Tensor, action: Tensor, frozen: bool = False) -> Tensor:
        action = action.expand(self.members, -1, -1)
        return super().forward(torch.cat([obs.expand(self.members, -1, -1), action], 2), frozen).squeeze(2)


class SmoothActor(SmoothMLP):
    """obs [B, n] -> action [B, m] in [−1, 1], by tanh."""

    def forward(self, obs: Tensor, frozen: bool = False) -> Tensor:
        return super().forward(obs, frozen)[0].tanh()


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


def td_target(reward: Tensor, done: Tensor, next_q: Tensor, gamma: float) -> Tensor:
    """(1): r + γ (1 − d) q', all [B]."""
    assert reward.shape == done.shape == next_q.shape
    return reward + gamma * (1 - done) * next_q


def smoothed(action: Tensor, noise: Tensor, clip: float) -> Tensor:
    """(1a): action plus clipped noise, within [−1, 1]: [B, m] each."""
    assert action.shape == noise.shape
    return (action + noise.clamp(-clip, clip)).clamp(-1, 1)


def huber(x: Tensor) -> Tensor:
    """½ x² within ±1, |x| − ½ beyond; elementwise."""
    return F.smooth_l1_loss(x, torch.zeros_like(x), reduction="none")


def action_gradient_loss(error: Tensor) -> Tensor:
    """(2), first part: ½ Σ_i mean h(‖error‖), errors of the action gradients [2, B, m] -> scalar."""
    return 0.5 * huber((error.square().sum(2) + 1e-12).sqrt()).mean(1).sum()


def temporal_difference_loss(q: Tensor, target: Tensor) -> Tensor:
    """(2), second part: ½ Σ_i mean h(y − Q_i): q [2, B], target [B] -> scalar."""
    assert q.shape[1:] == target.shape
    return 0.5 * huber(target - q).mean(1).sum()


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


def held_out(episode: Tensor) -> Tensor:
    """Every tenth episode, from the second on, never trains the model: episode numbers [B] -> bool [B]."""
    return episode % 10 == 1


@contextlib.contextmanager
def constant(module: nn.Module):
    """What is computed inside has no gradient with respect to the module's weights, only through it."""
    try:
        module.requires_grad_(False)
        yield
    finally:
        module.requires_grad_(True)


class Agent:
    """Deterministic actor, twin critics and their slow copies, and a differentiable model."""

    def __init__(self, args: Args, obs_dim: int, action_dim: int, device: torch.device):
        self.args, self.device = args, device
        sizes = [obs_dim + action_dim, args.hidden, args.hidden, 1]
        self.actor = SmoothActor(1, [obs_dim, *sizes[1:-1], action_dim]).to(device)
        self.critic = SmoothQFunctions(2, sizes).to(device)
        self.actor_target = copy.deepcopy(self.actor).requires_grad_(False)
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)
        self.actor_optimizer = optim.Adam(self.actor.parameters(), lr=args.actor_lr, fused=True)
        self.critic_optimizer = optim.Adam(self.critic.parameters(), lr=args.critic_lr, fused=True)
        sizes = (args.members, obs_dim, action_dim, args.model_layers, args.model_hidden)
        self.model = GaussianEnsemble(*sizes).to(device)
        self.termination = Termination(obs_dim, action_dim).to(device)
        parameters = [*self.model.parameters(), *self.termination.parameters()]
        self.model_optimizer = optim.Adam(parameters, lr=args.model_lr, fused=True)
        self.actor_loss = torch.zeros((), device=device)  # the last one, for the log

    def make_buffer(self, capacity: int, env: gym.Env) -> ReplayBuffer:
        """The replay that `train` fills with steps of env."""
        return ReplayBuffer(capacity, env.observation_space.shape[0], env.action_space.shape[0], self.device)

    @torch.no_grad()
    def act(self, obs: np.ndarray, deterministic: bool = False) -> np.ndarray:
        """obs [n] -> action [m] in [−1, 1], with the noise of (5) or without."""
        obs = torch.as_tensor(obs, device=self.device)[None]
        action = self.actor(self.model.normalize(obs))
        if not deterministic:
            action = (action + self.args.exploration_noise * torch.randn_like(action)).clamp(-1, 1)  # (5)
        return action[0].cpu().numpy()

    def imagined_target(self, obs: Tensor, action: Tensor) -> Tensor:
        """(1a, 1b): y [B] of the actor's action [B, m] at obs [B, n], differentiable in the action."""
        args = self.args
        with constant(self.model):
            next_obs, reward = self.model.step(obs, action)
        with torch.no_grad():
            ended = (self.predict_termination(obs, action, next_obs) > 0).to(obs.dtype)
        seen = self.model.normalize(next_obs)
        noise = args.policy_noise * torch.randn_like(action)
        next_action = smoothed(self.actor_target(seen), noise.detach(), args.noise_clip)  # (1a)
        return td_target(reward, ended, self.critic_target(seen, next_action).amin(0), args.gamma)  # (1b)

    def critic_loss(self, obs: Tensor, action: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(2) for actions [B, m] at obs [B, n]; only the critics get a gradient."""
        args, seen = self.args, self.model.normalize(obs)
        action = action.detach().requires_grad_(args.grad_weight > 0)
        target = self.imagined_target(obs, action)
        loss, metrics = 0.0, {}
        actions = action.detach().expand(2, -1, -1).clone().requires_grad_(args.grad_weight > 0)
        q = self.critic(seen, actions)
        if args.grad_weight > 0:
            (wanted,) = torch.autograd.grad(target.sum(), action)  # (1b)
            (slope,) = torch.autograd.grad(q.sum(), actions, create_graph=True)
            error = wanted - slope
            loss = args.grad_weight * action_gradient_loss(error)  # (2)
            metrics["losses/action_gradient_error"] = error.detach().norm(dim=2).mean()
        if args.td_weight > 0:
            loss = loss + args.td_weight * temporal_difference_loss(q, target.detach())  # (2)
        return loss, metrics | {"losses/qf_loss": loss.detach(), "losses/qf_values": q.detach().mean()}

    def update(self, buffer: ReplayBuffer, step: int) -> dict[str, Tensor]:
        """The gradient steps of one environment step, the model's first. Metrics stay tensors."""
        args, metrics = self.args, self.update_model(buffer, step)
        for k in range(args.updates_per_step):
            obs = buffer[buffer.sample(args.batch_size)].obs
            seen = self.model.normalize(obs)
            action = self.actor(seen)
            critic_loss, found = self.critic_loss(obs, action)  # (2)
            self.critic_optimizer.zero_grad()
            critic_loss.backward()
            nn.utils.clip_grad_value_(self.critic.parameters(), args.gradient_clip)
            self.critic_optimizer.step()

            number = (step - args.learning_starts - 1) * args.updates_per_step + k + 1
            if number % args.policy_delay == 0:
                actor_loss = -self.critic(seen, action, frozen=True).amin(0).mean()  # (3)
                self.actor_optimizer.zero_grad()
                actor_loss.backward()
                nn.utils.clip_grad_value_(self.actor.parameters(), args.gradient_clip)
                self.actor_optimizer.step()
                self.actor_loss.copy_(actor_loss.detach())
                polyak(self.actor_target, self.actor, args.tau)  # (4)
            polyak(self.critic_target, self.critic, args.tau)  # (4)
        return metrics | found | {"losses/actor_loss": self.actor_loss.clone()}

    def update_model(self, buffer: ReplayBuffer, step: int) -> dict[str, Tensor]:
        """The model's gradient steps of this environment step; its normaliser changes only before them."""
        args, first = self.args, step == self.args.learning_starts + 1
        if first or step % args.normalize_every == 0:
            train = (~held_out(buffer.episode[: buffer.size])).nonzero().squeeze(1)
            if len(train):
                self.model.fit_normalizer(buffer[train].obs)
        updates = args.model_updates or min(4, -(-buffer.size // 32_768))
        for _ in range(updates + first * args.model_warm_up):
            metrics = self.fit_model(buffer)
        return metrics

    def fit_model(self, buffer: ReplayBuffer) -> dict[str, Tensor]:
        """One gradient step of model and classifier, a minibatch per member; held-out rows weigh 0."""
        at = buffer.sample(self.args.members * self.args.batch_size)
        batch, train = buffer[at], (~held_out(buffer.episode[at])).float()
        stack = (self.args.members, self.args.batch_size, -1)
        mean, log_var = self.model(batch.obs.reshape(stack), batch.action.reshape(stack))
        target = torch.cat([batch.next_obs - batch.obs, batch.reward[:, None]], 1).view(stack)
        nll = gaussian_nll(mean, log_var, target)
        bounds = (self.model.max_log_var - self.model.min_log_var).sum()
        model_loss = (nll * train.view_as(nll)).sum() / train.sum().clamp_min(1) + 0.01 * bounds  # (6)

        logit = self.predict_termination(batch.obs, batch.action, batch.next_obs)
        entropy = F.binary_cross_entropy_with_logits(logit, batch.terminated, reduction="none")
        termination_loss = (entropy * train).sum() / train.sum().clamp_min(1)  # (7)

        self.model_optimizer.zero_grad()
        (model_loss + termination_loss).backward()
        self.model_optimizer.step()
        return {"model/loss": model_loss.detach(), "model/termination_loss": termination_loss.detach()}

    def predict_termination(self, obs: Tensor, action: Tensor, next_obs: Tensor) -> Tensor:
        """Logit [B] that the step from obs [B, n] to next_obs [B, n] ended the episode."""
        return self.termination(self.model.normalize(obs), action, self.model.normalize(next_obs))

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
