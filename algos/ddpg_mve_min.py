"""DDPG with hindsight and the minimum over horizons of ensemble value expansion (DDPG-MVE-min), Botev 2018.

No paper, only a talk: "Investigating Model Based RL for Continuous Control". Goal-conditioned tasks of fixed
length; the model-free part is DDPG with hindsight replay (arXiv 1707.01495, 1802.09464) and twin critics.
E networks f_e learn the state's change. From s' each imagines H steps of the slow actor, and its targets of
all horizons are kept; the reward is known, since a part of the state, ag, is what should reach the goal g:

    x_0 = s',  u_h = π̄(x_h, g),  x_{h+1} = x_h + f_e(x_h, u_h),  R(x, g) = −[‖ag(x) − g‖ > 0.05]
    T_eh = r + Σ_{j=1..h} γ^j R(x_j, g) + γ^{h+1} min_i Q̄_i(x_h, g, u_h),  within [−1/(1−γ), 0]  (1)
    y = min_{h=0..H} mean_e T_eh                                                                (2)
    L_Q = Σ_i mean (Q_i(s, g, a) − y)²                                                          (3)
    L_π = −mean Q_1(s, g, π(s, g)) + λ mean π(s, g)²                                            (4)
    θ̄ ← θ̄ + τ (θ − θ̄), once per cycle of episodes and updates                                   (5)
    a = clip(π(s, g) + σ ε, ±1), or with probability p uniformly random                         (6)

A model that is nearly perfect for one step can drift over many, so its loss feeds it its own predictions
for L steps of recorded actions (σ_Δ: deviations of the change; x_0 = s_t; angles compared on the circle):

    L_e = 1/L Σ_{k=1..L} mean ((x_k − s_{t+k}) / σ_Δ)²                                          (7)

Hindsight: with probability k/(k+1) a replayed transition gets a goal that was reached later in its episode,
ag(s_{t'}), t' uniform in t+1 .. end, and R is computed anew (8). H = 0 is DDPG with hindsight.

    python algos/ddpg_mve_min.py                     # a ball under torque, in minutes
    python algos/ddpg_mve_min.py --preset fetch --env-id FetchPush-v4    # needs gymnasium-robotics
    python algos/ddpg_mve_min.py --resume runs/<run> # goes on where it stopped, in the same bits
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
from concurrent.futures import ThreadPoolExecutor
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
class EpisodicRun:
    """The task, the loop of cycles around the agent and what it leaves on disk; for episodic learners."""

    env_id: str = "TorqueBall-v0"
    """Gymnasium id of a goal task; package.module:Name-v0 imports the module that registers it."""
    seed: Natural = 1
    """Seeds weights, noise, replay sampling and the task; evaluation uses seed + 100."""
    total_timesteps: Count = 20_000
    """Environment steps, warm-up included; the cycle that reaches them is the last."""
    learning_starts: Count = 1_600
    """Steps of uniformly random actions, with model-free updates after each cycle (ours)."""
    batch_size: Count = 256
    """Transitions per update (ours; Plappert et al. 2018: 256 on each of 19 workers)."""
    buffer_size: Count = 1_000_000
    """Replay capacity in transitions (Plappert et al. 2018); at most total_timesteps are allocated."""
    num_envs: Count = 2
    """Episodes per cycle, run side by side (ours; Plappert et al. 2018: 38 by 19 workers)."""
    env_threads: Annotated[int, (1, 1024)] = 1
    """CPU threads that step them; pays where the task releases Python's lock, as MuJoCo does."""
    eval_every: Count = 2_000
    """Evaluate after the cycle that reaches a multiple of this (ours; Plappert et al. 2018: 95 000)."""
    eval_episodes: Count = 100
    """Episodes per evaluation, deterministic policy, the same goals each time (ours; Plappert: 190)."""
    checkpoint_every: Count = 20_000
    """Steps after which the next cycle's end writes a checkpoint (ours)."""
    runs_dir: str = "runs"
    """Parent of the run folders."""
    resume: str = ""
    """Run folder to continue with its own arguments; only --total-timesteps may be raised."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where there is one."""
    num_threads: Annotated[int, (1, 1024)] = 2
    """CPU threads of PyTorch; the exact bits of a run depend on it."""
    capture_video: bool = False
    """Record the first episode of each evaluation (needs moviepy; without a display MUJOCO_GL=osmesa)."""

    def __post_init__(self) -> None:
        check_ranges(self)
        warm_up = f"at most --learning-starts {self.learning_starts}"
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


SIZES_OF_PRESETS = {  # what differs from the defaults; fetch: Plappert et al. 2018 in one process
    "ball": {},
    "fetch": {
        "num_envs": 16,
        "env_threads": 2,
        "batch_size": 1_024,
        "learning_starts": 8_000,
        "total_timesteps": 500_000,
    }
    | {"hidden": 256, "eval_every": 20_000}
    | {"model_layers": 4, "model_hidden": 256, "model_batch": 256, "model_warm_up": 2_000},
}


@dataclass
class HindsightDDPG:
    """Deep deterministic policy gradient with hindsight replay."""

    gamma: Fraction = 0.98
    """Discount factor γ: 1 − 1 / episode length (Plappert et al. 2018)."""
    tau: Fraction = 0.05
    """Polyak step τ of the slow copies, once per cycle (Plappert et al. 2018)."""
    actor_lr: Rate = 1e-3
    """Adam step size of the actor (Plappert et al. 2018)."""
    critic_lr: Rate = 1e-3
    """Adam step size of the critics (Plappert et al. 2018)."""
    hidden: Width = 64
    """Units in each of three hidden layers (ours, for the ball; Plappert et al. 2018: 256)."""
    critics: Count = 2
    """Critics; targets take the smallest (the talk: double Q-learning; Plappert et al. 2018: 1)."""
    action_l2: Rate = 1.0
    """Weight λ of the squared action (Plappert et al. 2018)."""
    updates_per_cycle: Count = 40
    """Gradient steps after each cycle's episodes (Plappert et al. 2018)."""
    hindsight: Natural = 4
    """Relabelled goals k per original one, strategy "future" (Andrychowicz et al. 2017); 0 for none."""
    exploration_noise: Rate = 0.2
    """σ, in halves of the action's range (Plappert et al. 2018)."""
    random_actions: Fraction = 0.3
    """Probability p of a uniformly random action (Plappert et al. 2018)."""


@dataclass
class EnsembleExpansion:
    """Value expansion with an ensemble of learned models."""

    preset: Literal["ball", "fetch"] = "ball"
    """Sizes: of the tables here, for minutes, or for Fetch robots; any flag overrides them (ours)."""
    horizon: Natural = 5
    """Imagined steps H of the longest target; 0 is model-free (ours; Reach 3, Slide 8)."""
    agg: Literal["min", "mean", "last", "min-all"] = "min"
    """Over horizons, after the mean over members: minimum, mean or the longest; or the minimum over all."""
    member: Literal["all", "random"] = "all"
    """Each transition is imagined by every member, or by one (a part of the cost)."""
    members: Annotated[int, (1, 1024)] = 5
    """Networks E of the ensemble (ours; the talk: one was not sufficient)."""
    model_steps: Natural = 0
    """Steps L of the model's loss; 0 for as many as --horizon, 1 for the usual loss (the talk: several)."""
    model_layers: Annotated[int, (1, 64)] = 2
    """Hidden layers of each model (ours, for the ball)."""
    model_hidden: Width = 64
    """Units in each hidden layer of a model (ours, for the ball)."""
    model_lr: Rate = 1e-3
    """Adam step size of the models (ours)."""
    model_batch: Count = 128
    """Windows of L steps per update, drawn for each member (ours)."""
    model_updates: Natural = 40
    """Model updates per cycle (ours)."""
    model_warm_up: Natural = 500
    """Model updates when the warm-up ends (ours)."""
    model_ready: Rate = 0.3
    """Held-out one-step error, in deviations of the change, below which expansion begins (ours)."""


@dataclass
class Args(EpisodicRun, HindsightDDPG, EnsembleExpansion):
    def __post_init__(self) -> None:
        EpisodicRun.__post_init__(self)
        several = self.agg != "min-all" or self.member == "all"
        require(several, "agg", self.agg, "another with --member random, which imagines by one member each")

    @classmethod
    def defaults(cls, argv: list[str] | None) -> dict[str, object]:
        """The dataclass's defaults, then the preset's that argv names."""
        peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        peek.add_argument("--preset", nargs="?", default=cls.preset)
        return dataclasses.asdict(cls()) | SIZES_OF_PRESETS.get(peek.parse_known_args(argv)[0].preset, {})


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


class StackedLayerNorm(nn.Module):
    """Layer normalisation with a gain and a bias of its own for each member: [members, B, width]."""

    def __init__(self, members: int, width: int):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(members, 1, width))
        self.bias = nn.Parameter(torch.zeros(members, 1, width))

    def forward(self, x: Tensor, frozen: bool = False) -> Tensor:
        gain, bias = self.gain, self.bias
        if frozen:
            gain, bias = gain.detach()[: len(x)], bias.detach()[: len(x)]
        return F.layer_norm(x, x.shape[2:]) * gain + bias


class StackedMLP(nn.Module):
    """Members of one shape in parallel: [members or 1, B, inputs] -> [members, B, outputs]."""

    def __init__(self, members: int, sizes: list[int], layer_norm: bool):
        super().__init__()
        self.members = members
        self.layers = nn.ModuleList(StackedLinear(members, *size) for size in pairwise(sizes))
        widths = sizes[1:-1] if layer_norm else []
        self.norms = nn.ModuleList(StackedLayerNorm(members, width) for width in widths)

    def forward(self, x: Tensor, frozen: bool = False, members: int | None = None) -> Tensor:
        """With `frozen` the weights, of all or the first `members`, are constants: only x gets a gradient."""
        x = x.expand(members if frozen and members else self.members, -1, -1)
        for i, layer in enumerate(self.layers[:-1]):
            x = layer(x, frozen)
            x = self.norms[i](x, frozen).relu() if self.norms else x.relu_()
        return self.layers[-1](x, frozen)


class QFunctions(StackedMLP):
    """Action values: obs [B, n], action [B, m] -> [members, B]."""

    def forward(
        self, obs: Tensor, action: Tensor, frozen: bool = False, members: int | None = None
    ) -> Tensor:
        return super().forward(torch.cat([obs, action], 1), frozen, members).squeeze(2)


class DeterministicActor(StackedMLP):
    """obs [B, n] -> action [B, m] in [−1, 1], by tanh."""

    def forward(self, obs: Tensor) -> Tensor:
        return super().forward(obs)[0].tanh()


@torch.no_grad()
def polyak(target: nn.Module, source: nn.Module, tau: float) -> None:
    """target ← target + τ (source − target), all parameters in one call."""
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), tau)


class TorqueBall(gym.Env):
    """A ball on a plane: push it to the goal. The talk's own equations are unknown.

    Observation x, y, v_x, v_y; action two forces u in [−1, 1]. v ← 0.95 v + 0.1 u, (x, y) ← (x, y) + 0.1 v,
    elastic walls at ±1. Reward −1 unless within 0.05 of the goal; never terminates.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012  Gymnasium's protocol
    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)
    observation_space = gym.spaces.Dict(
        {
            "observation": gym.spaces.Box(-np.inf, np.inf, (4,), np.float64),
            "achieved_goal": gym.spaces.Box(-1, 1, (2,), np.float64),
            "desired_goal": gym.spaces.Box(-1, 1, (2,), np.float64),
        }
    )
    distance_threshold = 0.05

    def __init__(self, render_mode: str | None = None, reward_type: str = "sparse"):
        self.render_mode, self.reward_type = render_mode, reward_type

    def observe(self) -> dict[str, np.ndarray]:
        state = np.concatenate([self.position, self.velocity])
        return {"observation": state, "achieved_goal": state[:2], "desired_goal": self.goal.copy()}

    def compute_reward(self, achieved: np.ndarray, desired: np.ndarray, info: dict) -> np.ndarray:
        distance = np.linalg.norm(achieved - desired, axis=-1)
        return (
            -distance
            if self.reward_type == "dense"
            else np.where(distance > self.distance_threshold, -1.0, 0.0)
        )

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        self.position, self.goal = self.np_random.uniform(-0.9, 0.9, (2, 2))
        self.velocity = np.zeros(2)
        return self.observe(), {}

    def step(self, action: np.ndarray):
        self.velocity = 0.95 * self.velocity + 0.1 * np.asarray(action, np.float64)
        position = self.position + 0.1 * self.velocity
        self.velocity = np.where(np.abs(position) > 1, -self.velocity, self.velocity)
        self.position = np.where(np.abs(position) > 1, 2 * np.sign(position) - position, position)
        obs = self.observe()
        reward = float(self.compute_reward(obs["achieved_goal"], self.goal, {}))
        return obs, reward, False, False, {"is_success": reward > -self.distance_threshold}

    def render(self) -> np.ndarray:
        y, x = np.mgrid[1.1:-1.1:240j, -1.1:1.1:240j]
        image = np.where((np.abs(x) > 1) | (np.abs(y) > 1), 90, 245).astype(np.uint8)[..., None].repeat(3, 2)
        for (a, b), radius, colour in ((self.goal, 0.05, (213, 94, 0)), (self.position, 0.03, (0, 114, 178))):
            image[np.hypot(x - a, y - b) < radius] = colour
        return image


if "TorqueBall-v0" not in gym.registry:
    gym.register("TorqueBall-v0", TorqueBall, max_episode_steps=50)
    gym.register("TorqueBallDense-v0", TorqueBall, max_episode_steps=50, kwargs={"reward_type": "dense"})


class GoalTask(NamedTuple):
    """What the agent knows of a task: sizes, and how the reward follows from an observation and a goal."""

    obs_dim: int
    goal_dim: int
    action_dim: int
    length: int  # steps of every episode
    columns: list[int]  # ag is obs[columns]
    threshold: float  # distance from the goal that counts as reached
    dense: bool
    angles: list[int]  # columns that hold angles

    def achieved(self, obs: Tensor) -> Tensor:
        """ag: obs [..., n] -> [..., g]; neighbouring columns are a view, which keeps a GPU busy."""
        first, last = self.columns[0], self.columns[-1] + 1
        together = self.columns == list(range(first, last))
        return obs[..., first:last] if together else obs[..., self.columns]

    def reward(self, obs: Tensor, goal: Tensor) -> Tensor:
        """R: −1 or 0, or with `dense` −distance; obs [..., n], goal [..., g] -> [...]."""
        distance = torch.linalg.vector_norm(self.achieved(obs) - goal, dim=-1)
        return -distance if self.dense else -(distance > self.threshold).to(obs.dtype)


class GoalBatch(NamedTuple):
    """B transitions after relabelling. Nothing terminates."""

    obs: Tensor  # [B, n]
    action: Tensor  # [B, m] in [−1, 1]
    next_obs: Tensor  # [B, n]
    goal: Tensor  # [B, g]
    reward: Tensor  # [B] for that goal


class EpisodeReplay:
    """Ring of whole episodes of T steps, preallocated in float32.

    Raises BadInput if it and its copy in a checkpoint would take more than 90 % of the available memory, or
    if it is too small for two cycles.
    """

    def __init__(self, capacity: int, task: GoalTask, num_envs: int, hindsight: int, device: torch.device):
        self.task, self.hindsight = task, hindsight
        n, steps = task.obs_dim, task.length
        self.widths = [(steps + 1, n), (steps, task.action_dim), (task.goal_dim,)]
        row_bytes = 2 * (4 * sum(math.prod(width) for width in self.widths) + 8)
        most = int(0.9 * available_memory(device) / row_bytes) * steps
        require(capacity <= most, "buffer_size", capacity, f"at most {most} in the memory available here")
        least = 2 * num_envs * steps
        require(capacity >= least, "buffer_size", capacity, f"at least {least}, two cycles of episodes")
        self.capacity, self.added = capacity // steps, 0
        self.obs, self.action, self.goal = (
            torch.zeros(self.capacity, *width, device=device) for width in self.widths
        )
        self.number = torch.zeros(self.capacity, dtype=torch.int64, device=device)

    @property
    def size(self) -> int:
        """Episodes held."""
        return min(self.added, self.capacity)

    def add(self, obs: Tensor, action: Tensor, goal: Tensor) -> None:
        """K episodes: obs [K, T + 1, n], action [K, T, m], goal [K, g]."""
        at = torch.arange(self.added, self.added + len(obs), device=self.obs.device)
        slots, self.added = at % self.capacity, self.added + len(obs)
        self.obs[slots], self.action[slots], self.goal[slots], self.number[slots] = obs, action, goal, at

    def newest(self, count: int) -> Tensor:
        """Places of the last `count` episodes."""
        at = torch.arange(self.added - count, self.added, device=self.obs.device)
        return at % self.capacity

    def training(self) -> Tensor:
        """Places of the episodes from which models learn."""
        return (~held_out(self.number[: self.size])).nonzero().squeeze(1)

    def sample(self, batch_size: int, among: Tensor) -> GoalBatch:
        """Random transitions of the episodes `among` [N], with hindsight (8)."""
        device, steps = self.obs.device, self.task.length
        episode = among[torch.randint(len(among), (batch_size,), device=device)]
        t = torch.randint(steps, (batch_size,), device=device)
        later = t + 1 + (torch.rand(batch_size, device=device) * (steps - t)).long().clamp_max(steps - 1 - t)
        relabel = torch.rand(batch_size, device=device) < self.hindsight / (1 + self.hindsight)
        reached = self.task.achieved(self.obs[episode, later])
        goal = torch.where(relabel[:, None], reached, self.goal[episode])  # (8)
        next_obs = self.obs[episode, t + 1]
        reward = self.task.reward(next_obs, goal)
        return GoalBatch(self.obs[episode, t], self.action[episode, t], next_obs, goal, reward)

    def windows(self, shape: tuple[int, ...], length: int, among: Tensor) -> tuple[Tensor, Tensor]:
        """Random stretches of episodes `among`: obs [*shape, length + 1, n], action [*shape, length, m]."""
        device = self.obs.device
        episode = among[torch.randint(len(among), shape, device=device)][..., None]
        first = torch.randint(self.task.length - length + 1, shape, device=device)[..., None]
        t = first + torch.arange(length + 1, device=device)
        return self.obs[episode, t], self.action[episode, t[..., :-1]]

    def state_dict(self) -> dict:
        """The filled part, copied: saving a view would save the whole ring."""
        held = {"obs": self.obs, "action": self.action, "goal": self.goal, "number": self.number}
        return {"added": self.added} | {k: v[: self.size].to("cpu", copy=True) for k, v in held.items()}

    def load_state_dict(self, state: dict) -> None:
        self.added = state["added"]
        for name in ("obs", "action", "goal", "number"):
            getattr(self, name)[: self.size] = state[name]


class Moments(nn.Module):
    """Running mean and deviation of rows [N, d], exact over all that `update` was given.

    Deviations are at least `floor`, and at least `relative` times the largest of them.
    """

    def __init__(self, width: int, floor: float = 0.0, relative: float = 0.0):
        super().__init__()
        self.floor, self.relative = floor, relative
        self.register_buffer("seen", torch.zeros((), dtype=torch.float64))
        self.register_buffer("exact_mean", torch.zeros(width, dtype=torch.float64))
        self.register_buffer("squares", torch.zeros(width, dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))

    def update(self, rows: Tensor) -> None:
        """Merges the rows' moments (Chan et al. 1979)."""
        rows = rows.reshape(-1, rows.shape[-1]).double()
        total, delta = self.seen + len(rows), rows.mean(0) - self.exact_mean
        self.squares += rows.var(0, correction=0) * len(rows) + delta**2 * self.seen * len(rows) / total
        self.exact_mean += delta * len(rows) / total
        self.seen.copy_(total)
        std = (self.squares / total).sqrt()
        least = (self.relative * std.max()).clamp_min(self.floor)
        self.mean.copy_(self.exact_mean)
        self.std.copy_(torch.where(std.max() > 0, std.maximum(least), 1.0))


def glorot(module: nn.Module) -> None:
    """Weights U(±√(6 / (inputs + outputs))), biases 0 (Plappert et al. 2018)."""
    for layer in module.layers:
        bound = math.sqrt(6 / sum(layer.weight.shape[1:]))
        nn.init.uniform_(layer.weight, -bound, bound)
        nn.init.zeros_(layer.bias)


def value_loss(q: Tensor, target: Tensor) -> Tensor:
    """Squared error, mean over the batch, sum over the critics: q [members, B], target [B] -> scalar."""
    assert q.shape[1:] == target.shape
    return (q - target).square().mean(1).sum()


def deterministic_actor_loss(q: Tensor) -> Tensor:
    """−mean Q(s, π(s)): [B] -> scalar."""
    return -q.mean()


def held_out(episode: Tensor) -> Tensor:
    """Every tenth episode, from the second on, never trains the model: episode numbers [B] -> bool [B]."""
    return episode % 10 == 1


def on_circle(x: Tensor, angle: Tensor) -> Tensor:
    """Angles brought to [−π, π], the rest as it is: x [..., n], angle [n] 1 where x is one."""
    return x - 2 * math.pi * angle * (x / (2 * math.pi)).round()


class DynamicsEnsemble(StackedMLP):
    """E models of s' − s, inputs and outputs in deviations of the replay: [E or 1, B, n] -> [E, B, n]."""

    def __init__(self, members: int, task: GoalTask, layers: int, hidden: int):
        n = task.obs_dim
        super().__init__(members, [n + task.action_dim, *[hidden] * layers, n], layer_norm=False)
        self.input, self.change = Moments(n, relative=1e-3), Moments(n, relative=1e-3)
        self.register_buffer("angle", torch.zeros(n))
        self.angle[task.angles] = 1.0

    def observe(self, obs: Tensor) -> None:
        """New episodes [K, T + 1, n] for the normalisation."""
        self.input.update(obs[:, :-1])
        self.change.update(on_circle(obs[:, 1:] - obs[:, :-1], self.angle))

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        """One step: obs [E or 1, B, n], action [as many or 1, B, m] -> next obs [E, B, n]."""
        action = action.expand(len(obs), -1, -1)
        x = torch.cat([(obs - self.input.mean) / self.input.std, action], 2)
        return on_circle(obs + self.change.mean + self.change.std * super().forward(x), self.angle)

    def errors(self, obs: Tensor, action: Tensor) -> Tensor:
        """x_k − s_{t+k}, k = 1..L, in σ_Δ: obs [E or 1, B, L + 1, n], action [.., L, m] -> [E, B, L, n]."""
        x, found = obs[:, :, 0], []
        for k in range(action.shape[2]):
            x = self(x, action[:, :, k])
            found.append(on_circle(x - obs[:, :, k + 1], self.angle) / self.change.std)
        return torch.stack(found, 2)


def multi_step_loss(errors: Tensor) -> Tensor:
    """(7): mean square over windows, steps and dimensions, sum over members: [E, B, L, n] -> scalar."""
    return errors.square().mean((1, 2, 3)).sum()


def horizon_targets(reward: Tensor, rewards: Tensor, values: Tensor, gamma: float) -> Tensor:
    """(1): reward [B], imagined rewards [M, H, B], values of x_0 .. x_H [M, H + 1, B] -> T [M, H + 1, B]."""
    horizon = rewards.shape[1]
    assert rewards.shape[::2] == values.shape[::2] and values.shape[1:] == (horizon + 1, len(reward))
    found = [reward + gamma * values[:, 0]]
    total = reward.expand_as(found[0])
    for h in range(1, horizon + 1):
        total = total + gamma**h * rewards[:, h - 1]
        found.append(total + gamma ** (h + 1) * values[:, h])
    return torch.stack(found, 1)


def reachable(targets: Tensor, gamma: float, dense: bool) -> Tensor:
    """(1): no return of rewards −1 or 0 lies outside [−1 / (1 − γ), 0]; dense ones know no lower end."""
    bounded = gamma < 1 and not dense
    return targets.clamp(-1 / (1 - gamma) if bounded else -math.inf, 0)


def aggregate(targets: Tensor, agg: str) -> Tensor:
    """(2): targets of members and horizons [M, H + 1, B] -> [B]."""
    if agg == "min-all":
        return targets.amin((0, 1))
    means = targets.mean(0)
    return {"min": means.amin(0), "mean": means.mean(0), "last": means[-1]}[agg]


class Agent:
    """DDPG with hindsight whose critics learn from pessimistic expanded targets."""

    def __init__(self, args: Args, task: GoalTask, device: torch.device):
        self.args, self.task, self.device, self.warned = args, task, device, False
        seen, hidden = task.obs_dim + task.goal_dim, [args.hidden] * 3
        self.obs_moments = Moments(task.obs_dim, floor=0.01).to(device)
        self.goal_moments = Moments(task.goal_dim, floor=0.01).to(device)
        self.actor = DeterministicActor(1, [seen, *hidden, task.action_dim], layer_norm=False).to(device)
        sizes = [seen + task.action_dim, *hidden, 1]
        self.critic = QFunctions(args.critics, sizes, layer_norm=False).to(device)
        glorot(self.actor)
        glorot(self.critic)
        self.actor_target = copy.deepcopy(self.actor).requires_grad_(False)
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)
        groups = [
            {"params": list(self.actor.parameters()), "lr": args.actor_lr},
            {"params": list(self.critic.parameters()), "lr": args.critic_lr},
        ]
        self.optimizer = optim.Adam(groups, fused=True)  # Adam works elementwise: one for both is faster
        if args.horizon == 0:
            return
        sizes = (args.model_layers, args.model_hidden)
        self.model = DynamicsEnsemble(args.members, task, *sizes).to(device)
        self.model_optimizer = optim.Adam(self.model.parameters(), lr=args.model_lr, fused=True)
        self.model_is_ready = torch.tensor(False)

    def make_buffer(self, capacity: int) -> EpisodeReplay:
        return EpisodeReplay(capacity, self.task, self.args.num_envs, self.args.hindsight, self.device)

    def view(self, obs: Tensor, goal: Tensor) -> Tensor:
        """What the networks see: both normalised, within 5 deviations: [B, n], [B, g] -> [B, n + g]."""
        pairs = ((obs, self.obs_moments), (goal, self.goal_moments))
        return torch.cat([((x.clamp(-200, 200) - m.mean) / m.std).clamp(-5, 5) for x, m in pairs], 1)

    @torch.no_grad()
    def act_for(self, obs: np.ndarray, goal: np.ndarray, deterministic: bool = False) -> np.ndarray:
        """obs [N, n], goal [N, g] -> actions [N, m] in [−1, 1], with the noise of (6) or without."""
        obs, goal = (torch.as_tensor(x, device=self.device) for x in (obs, goal))
        action = self.actor(self.view(obs, goal))
        if not deterministic:
            noisy = (action + self.args.exploration_noise * torch.randn_like(action)).clamp(-1, 1)
            at_random = torch.rand(len(action), 1, device=self.device) < self.args.random_actions
            action = torch.where(at_random, 2 * torch.rand_like(action) - 1, noisy)  # (6)
        return action.cpu().numpy()

    def judge(self, obs: Tensor, goal: Tensor) -> tuple[Tensor, Tensor]:
        """π̄ and min_i Q̄_i: obs [M, R, n], goal [M or 1, R, g] -> action [M, R, m], value [M, R]."""
        seen = self.view(obs.flatten(0, 1), goal.expand(len(obs), -1, -1).flatten(0, 1))
        action = self.actor_target(seen)
        value = self.critic_target(seen, action).amin(0)
        return action.view(*obs.shape[:2], -1), value.view(obs.shape[:2])

    def expand_values(self, batch: GoalBatch, horizon: int) -> Tensor:
        """(1) for all horizons 0 .. H: [M, H + 1, B], M = E members, or 1 with one member per transition."""
        x, goal, size = batch.next_obs[None], batch.goal[None], len(batch.reward)
        shared = self.args.member == "random" and horizon > 0
        if shared:  # transitions are drawn independently: equal shares of them are as random as any
            rows = torch.arange(-(-size // self.args.members) * self.args.members, device=self.device) % size
            x, goal = (y[0, rows].view(self.args.members, -1, y.shape[2]) for y in (x, goal))
        action, value = self.judge(x, goal)
        rewards, values = [], [value]
        for _ in range(horizon):
            x = self.model(x, action)
            action, value = self.judge(x, goal)
            rewards.append(self.task.reward(x, goal))
            values.append(value)
        values = torch.stack([v.expand(len(x), -1) for v in values], 1)
        rewards = torch.stack(rewards, 1) if rewards else values[:, :0]
        if shared:
            values, rewards = (y.transpose(0, 1).flatten(1)[None, :, :size] for y in (values, rewards))
        gamma, dense = self.args.gamma, self.task.dense
        return reachable(horizon_targets(batch.reward, rewards, values, gamma), gamma, dense)

    def update(self, replay: EpisodeReplay, step: int) -> dict[str, Tensor]:
        """The gradient steps of one cycle, the models' first. Metrics stay tensors, means over the cycle."""
        args, metrics = self.args, []
        every = torch.arange(replay.size, device=self.device)
        self.observe(replay)
        models = self.update_models(replay, step) if args.horizon > 0 else {}
        horizon = args.horizon if args.horizon > 0 and self.model_is_ready else 0
        for _ in range(args.updates_per_cycle):
            batch = replay.sample(args.batch_size, every)
            seen = self.view(batch.obs, batch.goal)
            with torch.no_grad():
                targets = self.expand_values(batch, horizon)  # (1)
                target = aggregate(targets, args.agg)  # (2)
            q = self.critic(seen, batch.action)
            critic_loss = value_loss(q, target)  # (3)
            action = self.actor(seen)
            q_actor = self.critic(seen, action, frozen=True, members=1)[0]
            actor_loss = deterministic_actor_loss(q_actor)
            actor_loss = actor_loss + args.action_l2 * action.square().mean()  # (4)

            self.optimizer.zero_grad()
            (critic_loss + actor_loss).backward()  # no parameter is in both
            self.optimizer.step()
            metrics.append(
                {
                    "losses/qf_loss": critic_loss.detach(),
                    "losses/qf_values": q.detach().mean(),
                    "losses/actor_loss": actor_loss.detach(),
                    "expansion/target_mean": target.mean(),
                    "expansion/pessimism_gap": (target - targets[0, 0]).mean(),
                }
            )
        polyak(self.critic_target, self.critic, args.tau)  # (5)
        polyak(self.actor_target, self.actor, args.tau)  # (5)
        spread = {f"expansion/target_mean_{h}": t.mean() for h, t in enumerate(targets.transpose(0, 1))}
        spread["expansion/spread_over_members"] = targets.std(0, correction=0).mean()
        means = {k: torch.stack([m[k] for m in metrics]).mean() for k in metrics[0]}
        if not self.warned and (gap := means["expansion/pessimism_gap"]) < -5:
            self.warned = True
            text = (
                f"targets lie {-gap:.1f} below the model-free ones: a pessimistic model can sink all values"
            )
            tqdm.write(f"step {step}: {text}")
        return models | spread | means

    def observe(self, replay: EpisodeReplay) -> None:
        """Normalisation of observations and relabelled goals, from as many transitions as are new."""
        count = self.args.num_envs
        batch = replay.sample(count * self.task.length, replay.newest(count))
        self.obs_moments.update(batch.obs.clamp(-200, 200))
        self.goal_moments.update(batch.goal.clamp(-200, 200))

    def update_models(self, replay: EpisodeReplay, step: int) -> dict[str, Tensor]:
        """The models' gradient steps of one cycle; once the warm-up is over they begin, with many."""
        args, train = self.args, replay.training()
        new = replay.newest(args.num_envs)
        new = new[~held_out(replay.number[new])]
        if len(new):
            self.model.observe(replay.obs[new])
        if step < args.learning_starts:
            return {}
        warm_up, metrics = 0 if self.model_optimizer.state else args.model_warm_up, {}
        for _ in range(args.model_updates + warm_up):
            metrics = {"model/loss": self.fit_models(replay, train)}
        metrics |= self.diagnose_models(replay)
        ready = metrics["model/change_error"] < args.model_ready
        self.model_is_ready |= ready.to(self.model_is_ready.device)
        return metrics | {"model/is_ready": self.model_is_ready.clone()}

    def fit_models(self, replay: EpisodeReplay, train: Tensor) -> Tensor:
        """One gradient step (7), each member on windows of its own."""
        args, steps = self.args, self.args.model_steps or self.args.horizon
        obs, action = replay.windows((args.members, args.model_batch), steps, train)
        loss = multi_step_loss(self.model.errors(obs, action))  # (7)
        self.model_optimizer.zero_grad()
        loss.backward()
        self.model_optimizer.step()
        return loss.detach() / args.members

    @torch.no_grad()
    def diagnose_models(self, replay: EpisodeReplay) -> dict[str, Tensor]:
        """k-step errors on held-out episodes; how often the reward of a hindsight goal is foreseen."""
        place = held_out(replay.number[: replay.size]).nonzero().squeeze(1)
        place = place if len(place) else replay.training()  # the first cycle of few episodes holds none out
        length = max(self.args.horizon, self.args.model_steps)
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):  # training is not touched
            obs, action = replay.windows((1, 256), length, place)
        errors = self.model.errors(obs, action)
        metrics = {"model/change_error": errors[:, :, 0].abs().mean()}
        scale = self.model.change.std / self.model.input.std
        goal = self.task.achieved(obs[:, :, -1:])  # reached at the window's end
        predicted = on_circle(obs[:, :, 1:] + errors * self.model.change.std, self.model.angle)
        right = (self.task.reward(predicted, goal) - self.task.reward(obs[:, :, 1:], goal)).abs() < 0.5
        for k in range(length):
            metrics[f"model/error_{k + 1}"] = (errors[:, :, k] * scale).square().mean().sqrt()
            if not self.task.dense:
                metrics[f"model/reward_accuracy_{k + 1}"] = right[:, :, k].float().mean()
        return metrics

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


def finite(step: int, name: str, value) -> np.ndarray:
    """The task's number or array as float32. Raises BadInput if it is not finite."""
    with np.errstate(over="ignore"):
        result = np.asarray(value, np.float32)
    if not np.isfinite(result).all():
        raise BadInput(f"step {step}: the task's {name} must be finite in float32, got {value}")
    return result


def make_goal_env(env_id: str, video_dir: Path | None = None) -> gym.Env:
    """The task with actions in [−1, 1]; with video_dir its first episode is recorded.

    Raises BadInput for an unknown id, for spaces that this file cannot serve, and where rendering fails.
    """
    if env_id.startswith("Fetch"):
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # a notice on other tasks
                import gymnasium_robotics
        except ImportError:
            require(False, "env_id", env_id, "a task that is installed: pip install gymnasium-robotics")
        gym.register_envs(gymnasium_robotics)
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
    parts = space.spaces if isinstance(space, gym.spaces.Dict) else {}
    flat = all(
        isinstance(parts.get(name), gym.spaces.Box) and len(parts[name].shape) == 1
        for name in ("observation", "achieved_goal", "desired_goal")
    )
    require(flat, "env_id", env_id, f"a goal task (observation, achieved_goal, desired_goal), not {space}")
    continuous = isinstance(box, gym.spaces.Box) and np.issubdtype(box.dtype, np.floating)
    bounded = continuous and box.is_bounded() and (box.low < box.high).all() and len(box.shape) == 1
    require(bounded, "env_id", env_id, f"with a bounded, continuous, flat Box of actions, not {box}")
    limited = env.spec is not None and env.spec.max_episode_steps is not None
    require(limited, "env_id", env_id, "registered with max_episode_steps: episodes have one length")
    env = gym.wrappers.TransformAction(env, lambda action: np.clip(action, box.low, box.high), box)
    return gym.wrappers.RescaleAction(env, box.dtype.type(-1), box.dtype.type(1))


class ThreadedVectorEnv(gym.vector.SyncVectorEnv):
    """Copies stepped by threads; what they return does not depend on how many. No infos."""

    def __init__(self, makers: list, threads: int):
        super().__init__(makers, autoreset_mode=gym.vector.AutoresetMode.DISABLED)
        self.pool = ThreadPoolExecutor(threads)

    def step(self, actions: np.ndarray) -> tuple:
        obs, *rest, _ = zip(*self.pool.map(lambda env, a: env.step(a), self.envs, actions), strict=True)
        empty = gym.vector.utils.create_empty_array(self.single_observation_space, self.num_envs)
        stacked = gym.vector.utils.concatenate(self.single_observation_space, obs, empty)
        return stacked, *map(np.array, rest), {}

    def close_extras(self, **options) -> None:
        self.pool.shutdown()
        super().close_extras(**options)


def make_goal_envs(
    env_id: str, count: int, threads: int = 1, video_dir: Path | None = None
) -> gym.vector.VectorEnv:
    """Copies side by side, never reset by themselves; with video_dir the first records its first episode."""
    makers = [lambda i=i: make_goal_env(env_id, video_dir if i == 0 else None) for i in range(count)]
    if threads > 1 and video_dir is None:  # a renderer belongs to one thread
        return ThreadedVectorEnv(makers, threads)
    return gym.vector.SyncVectorEnv(makers, autoreset_mode=gym.vector.AutoresetMode.DISABLED)


def study(env_id: str, seed: int) -> GoalTask:
    """Looks for ag among the observations of three random episodes, and compares the reward.

    Raises BadInput if ag is not a part of the observation, or the reward neither −[distance > threshold]
    nor −distance.
    """
    env = make_goal_env(env_id)
    task, length, rng = env.unwrapped, env.spec.max_episode_steps, np.random.default_rng(seed)
    space, rows = env.observation_space, []
    for episode in range(3):
        obs, _ = env.reset(seed=seed + episode)
        for _ in range(length):
            rows.append(obs)
            obs, _, terminated, _, _ = env.step(rng.uniform(-1, 1, env.action_space.shape).astype(np.float32))
            require(not terminated, "env_id", env_id, "a task that never terminates")
    seen, reached = (np.array([row[name] for row in rows]) for name in ("observation", "achieved_goal"))
    same = (seen[:, :, None] == reached[:, None]).all(0)  # [n, g]
    require(same.any(0).all(), "env_id", env_id, "a task whose achieved_goal is a part of its observation")
    threshold, kind = getattr(task, "distance_threshold", None), getattr(task, "reward_type", None)
    known = isinstance(threshold, float) and kind in ("sparse", "dense")
    require(known, "env_id", env_id, "a task with distance_threshold, and reward_type sparse or dense")
    angles = [11, 12, 13] if getattr(task, "has_object", False) else []  # Fetch: the object's Euler angles
    sizes = (*space["observation"].shape, *space["desired_goal"].shape, *env.action_space.shape)
    found = GoalTask(*sizes, length, same.argmax(0).tolist(), threshold, kind == "dense", angles)
    goals = reached + rng.uniform(-2 * threshold, 2 * threshold, reached.shape)
    theirs = np.asarray(task.compute_reward(reached, goals, {}), np.float32)
    ours = found.reward(torch.as_tensor(seen), torch.as_tensor(goals)).numpy()
    require(np.allclose(ours, theirs, atol=1e-6), "env_id", env_id, "a task rewarded by the distance alone")
    env.close()
    return found


class Episodes(NamedTuple):
    """K episodes, side by side, of T steps."""

    obs: Tensor  # [K, T + 1, n]
    action: Tensor  # [K, T, m]
    goal: Tensor  # [K, g]
    episode_return: np.ndarray  # [K]
    success: np.ndarray  # [K] 1 where the goal is reached at the last step


@contextlib.contextmanager
def one_thread():
    """PyTorch's idle threads would spin for milliseconds on the cores that step the tasks."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@one_thread()
def play(envs: gym.vector.VectorEnv, task: GoalTask, first: int, seed: int, step: int, policy) -> Episodes:
    """One episode in each env, numbers `first` and on; the number alone determines start and goal.

    policy(obs [K, n], goal [K, g]) -> actions [K, m]. Raises RunFailed or BadInput if agent or task is not
    finite, BadInput if an episode ends early.
    """
    numbers = range(first, first + envs.num_envs)
    found, _ = envs.reset(seed=[int(np.random.SeedSequence((seed, k)).generate_state(1)[0]) for k in numbers])
    goal = finite(step, "goal", found["desired_goal"])
    obs, actions, total = [finite(step, "observation", found["observation"])], [], np.zeros(len(numbers))
    for t in range(task.length):
        if SIGNALS:
            raise SystemExit(128 + SIGNALS[0])
        actions.append(policy(obs[-1], goal))
        if not np.isfinite(actions[-1]).all():
            raise RunFailed(f"step {step}: the agent's action is not finite: {actions[-1]}")
        found, reward, terminated, truncated, _ = envs.step(actions[-1])
        obs.append(finite(step, "observation", found["observation"]))
        total += finite(step, "reward", reward)
        early = terminated.any() or (truncated.any() and t < task.length - 1)
        if early:
            raise BadInput(
                f"step {step}: the task's episodes must last {task.length} steps, one ended at {t + 1}"
            )
    distance = np.linalg.norm(obs[-1][:, task.columns] - goal, axis=1)
    stacked = (torch.as_tensor(np.stack(rows, 1)) for rows in (obs, actions))
    return Episodes(*stacked, torch.as_tensor(goal), total, (distance <= task.threshold).astype(float))


def evaluate_goals(agent: "Agent", args: "Args", envs, step: int, video_dir: Path | None) -> dict[str, float]:
    """Return and success at the last step, deterministic policy, always the same starts and goals."""
    played, task = [], agent.task
    if video_dir is not None:
        envs = make_goal_envs(args.env_id, envs.num_envs, video_dir=video_dir)
    for first in range(0, args.eval_episodes, envs.num_envs):
        policy = lambda obs, goal: agent.act_for(obs, goal, deterministic=True)  # noqa: E731
        played.append(play(envs, task, first, args.seed + 100, step, policy))
    if video_dir is not None:
        envs.close()
    returns, success = (
        np.concatenate([getattr(p, name) for p in played])[: args.eval_episodes]
        for name in ("episode_return", "success")
    )
    stats = {"return_mean": returns.mean(), "return_std": returns.std(), "length_mean": task.length}
    stats |= {"success_rate": success.mean()}
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


def train_episodic(args: "Args") -> Path:
    """Start or resume a run of cycles: episodes side by side, then updates. Returns its folder.

    Raises BadInput for the user's mistakes (a new run then leaves nothing on disk) and RunFailed.
    """
    torch.set_num_threads(args.num_threads)
    torch.set_flush_denormal(True)
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    task = study(args.env_id, args.seed)
    for name in ("horizon", "model_steps"):  # held-out windows and those of the loss fit into an episode
        require(getattr(args, name) <= task.length, name, getattr(args, name), f"at most {task.length} here")
    agent = Agent(args, task, device)
    per_cycle = args.num_envs * task.length
    needed = max(2, -(-args.total_timesteps // per_cycle)) * per_cycle
    replay = agent.make_buffer(min(args.buffer_size, needed))
    envs, eval_envs = (make_goal_envs(args.env_id, args.num_envs, args.env_threads) for _ in range(2))
    step, episode, rows, seconds_before, started = 0, 0, [], 0.0, time.perf_counter()

    def seconds() -> float:
        return round(seconds_before + time.perf_counter() - started, 2)

    def evaluate_into(folder: Path) -> None:
        video_dir = folder / "videos" / f"step-{step}" if args.capture_video else None
        row = evaluate_goals(agent, args, eval_envs, step, video_dir)
        rows.append(row | {"seconds": seconds()})
        write_evaluations(folder, rows)
        text = f"{row['return_mean']:9.2f} ± {row['return_std']:.2f}  success {row['success_rate']:.2f}"
        tqdm.write(f"step {step:>8}  evaluation return {text}")

    def save(path: Path) -> None:
        """Between cycles the tasks have no state: an episode's number determines its start and goal."""
        state = {"format": CHECKPOINT_FORMAT, "algo": ALGO, "args": dataclasses.asdict(args) | {"resume": ""}}
        state |= {"step": step, "episode": episode, "rows": rows, "seconds": seconds()}
        state |= {"torch_rng": torch.get_rng_state()}
        state |= {"cuda_rng": torch.cuda.get_rng_state() if device.type == "cuda" else None}
        save_checkpoint(path, state | {"agent": agent.state_dict(), "buffer": replay.state_dict()})

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
            replay.load_state_dict(saved["buffer"])
        except (KeyError, RuntimeError, ValueError) as error:
            raise BadInput(f"--resume {run_dir}: must fit the task as it is now: {error}") from error
        step, episode, rows, seconds_before = (saved[k] for k in ("step", "episode", "rows", "seconds"))
        torch.set_rng_state(saved["torch_rng"])
        if device.type == "cuda":
            torch.cuda.set_rng_state(saved["cuda_rng"])
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
        log({"eval/success_rate": rows[-1]["success_rate"]})

    last_save = step
    try:
        if step == 0:
            log_evaluation()
        while step < args.total_timesteps:
            before = time.perf_counter()
            warm_up = step < args.learning_starts
            policy = lambda *_: 2 * torch.rand(args.num_envs, task.action_dim).numpy() - 1  # noqa: E731
            played = play(envs, task, episode, args.seed, step, policy if warm_up else agent.act_for)
            replay.add(played.obs.to(device), played.action.to(device), played.goal.to(device))
            step, episode = step + per_cycle, episode + args.num_envs
            collected = time.perf_counter()
            metrics = {name: float(value) for name, value in agent.update(replay, step).items()}
            now = time.perf_counter()
            log(metrics | {"charts/SPS": per_cycle / (now - before), "time/seconds": seconds()})
            log({"time/collection": collected - before, "time/updates": now - collected})
            log(
                {
                    "charts/episodic_return": played.episode_return.mean(),
                    "charts/episodic_length": task.length,
                }
            )
            log({"charts/success_rate": played.success.mean()})
            bar.update(per_cycle)
            bar.set_postfix_str(f"success={played.success.mean():.2f}", refresh=False)

            done = step >= args.total_timesteps
            if step // args.eval_every > (step - per_cycle) // args.eval_every or done:
                before = time.perf_counter()
                evaluate_into(run_dir)
                log_evaluation()
                log({"time/evaluation": time.perf_counter() - before})
            if step - last_save >= args.checkpoint_every and not done:
                writer.flush()
                save(run_dir / "checkpoint.pt")
                last_save = step
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
        envs.close()
        eval_envs.close()
    last = "last evaluation {return_mean:.2f} ± {return_std:.2f}, success {success_rate:.2f}".format(
        **rows[-1]
    )
    print(f"done: {run_dir}, {last}")
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
    main(train_episodic)
