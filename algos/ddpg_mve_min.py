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

import contextlib
import copy
import ctypes
import dataclasses
import functools
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
from concurrent.futures import ThreadPoolExecutor
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
class EpisodicRun:
    """The task, the loop of cycles around the agent and what it leaves on disk; for episodic learners."""

    env_id: str = "TorqueBall-v0"  # id of a goal task; package.module:Name-v0 imports what registers it
    env_kwargs: str = "{}"  # JSON of the arguments of the task's constructor, as '{"frame_skip": 2}'
    seed: Natural = 1  # of weights, noise, replay sampling and the task; evaluation uses seed + 100
    total_timesteps: Count = 20_000  # environment steps, warm-up included; rounded up to whole cycles
    learning_starts: Count = 1_600  # steps of random actions, with model-free updates after each cycle (ours)
    batch_size: Count = 256  # transitions per update (ours; Plappert et al. 2018: 256 on each of 19 workers)
    buffer_size: Count = 1_000_000  # replay capacity (Plappert et al. 2018); never more than total_timesteps
    num_envs: Count = 2  # episodes per cycle, side by side (ours; Plappert et al. 2018: 38 by 19 workers)
    env_threads: Annotated[int, (1, 1024)] = 1  # CPU threads that step them; MuJoCo lets go of Python's lock
    eval_every: Count = 2_000  # evaluate after the cycle that reaches a multiple (ours; Plappert: 95 000)
    eval_episodes: Count = 100  # per evaluation, deterministic policy, the same goals (ours; Plappert: 190)
    checkpoint_every: Annotated[int | None, (1, math.inf)] = 20_000  # steps; None: 5 000, 1/50 or 2 minutes
    runs_dir: str = "runs"  # parent of the run folders
    resume: str = ""  # run folder to go on with, by its own arguments; only --total-timesteps may be raised
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes a GPU where there is one
    cuda_graphs: bool = True  # on a GPU replay the agent's methods as captured graphs: the same bits, faster
    num_threads: Annotated[int, (1, 1024)] = 2  # CPU threads of PyTorch; a run's exact bits depend on it
    capture_video: bool = False  # film the first episode of each evaluation (needs moviepy)


@dataclass
class HindsightDDPG:
    """Deep deterministic policy gradient with hindsight replay; unless said, as Plappert et al. 2018."""

    gamma: Fraction = 0.98  # discount factor γ: 1 − 1 / episode length
    tau: Fraction = 0.05  # Polyak step τ of the slow copies, once per cycle
    actor_lr: Rate = 1e-3  # Adam step size of the actor
    critic_lr: Rate = 1e-3  # Adam step size of the critics
    hidden: Width = 64  # units in each of three hidden layers (ours, for the ball; Plappert: 256)
    critics: Count = 2  # targets take the smallest (the talk: double Q-learning; Plappert: 1)
    action_l2: Rate = 1.0  # weight λ of the squared action
    updates_per_cycle: Count = 40  # gradient steps after each cycle's episodes
    hindsight: Natural = 4  # relabelled goals k per original one, drawn from the episode's future; 0: none
    exploration_noise: Rate = 0.2  # σ, in halves of the action's range
    random_actions: Fraction = 0.3  # probability p of a uniformly random action


@dataclass
class EnsembleExpansion:
    """Value expansion with an ensemble of learned models; sizes are ours, for the ball."""

    preset: Literal["ball", "fetch"] = "ball"  # sizes for minutes, or for Fetch robots; flags override (ours)
    horizon: Natural = 5  # imagined steps H of the longest target; 0 is model-free (ours; Reach 3, Slide 8)
    agg: Literal["min", "mean", "last", "min-all"] = "min"  # over horizons, of members' means; min-all: both
    member: Literal["all", "random"] = "all"  # each transition is imagined by all, or by one (cheaper)
    members: Annotated[int, (1, 1024)] = 5  # networks E of the ensemble (ours; the talk: one is not enough)
    model_steps: Natural = 0  # L of the model's loss; 0: as many as horizon, 1: the usual (the talk: several)
    model_layers: Annotated[int, (1, 64)] = 2  # hidden layers of each model
    model_hidden: Width = 64  # units in each hidden layer of a model
    model_lr: Rate = 1e-3  # Adam step size of the models
    model_batch: Count = 128  # windows of L steps per update, drawn for each member
    model_updates: Natural = 40  # model updates per cycle
    model_warm_up: Natural = 500  # model updates when the warm-up ends
    model_ready: Rate = 0.3  # held-out one-step error, in deviations of the change, below which H begins


FETCH = dict(num_envs=16, env_threads=2, batch_size=1_024, learning_starts=8_000, total_timesteps=500_000)
FETCH |= dict(eval_every=20_000, hidden=256, model_layers=4, model_hidden=256)
FETCH |= dict(model_batch=256, model_warm_up=2_000)  # Plappert et al. 2018 in one process
SIZES_OF_PRESETS = {"ball": {}, "fetch": FETCH}  # what differs from the defaults


@dataclass
class Args(EpisodicRun, HindsightDDPG, EnsembleExpansion):
    """Everything that can be set."""

    def __post_init__(self) -> None:
        check(self)
        several = self.agg != "min-all" or self.member == "all"
        require(several, "agg", self.agg, "another with --member random, which imagines by one member each")

    @classmethod
    def defaults(cls, given: dict) -> dict:
        """Every argument where the command line says nothing: the defaults, then the preset's."""
        return dataclasses.asdict(cls()) | SIZES_OF_PRESETS[given["preset"]]


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

    def forward(self, x: Tensor, frozen: bool = False, members: int = 0) -> Tensor:
        """With `frozen` the weights, of the first `members` or all, are constants: only x gets a gradient."""
        x = x.expand(members if frozen and members else self.members, -1, -1)
        for i, layer in enumerate(self.layers[:-1]):
            x = layer(x, frozen)
            x = self.norms[i](x, frozen).relu() if self.norms else x.relu_()
        return self.layers[-1](x, frozen)


class QFunctions(StackedMLP):
    """Action values: obs [B, n], action [B, m] -> [members, B]."""

    def forward(self, obs: Tensor, action: Tensor, frozen: bool = False, members: int = 0) -> Tensor:
        return super().forward(torch.cat([obs, action], 1), frozen, members).squeeze(2)


class DeterministicActor(StackedMLP):
    """obs [B, n] -> action [B, m] in [−1, 1], by tanh."""

    def forward(self, obs: Tensor) -> Tensor:
        return super().forward(obs)[0].tanh()


class TorqueBall(gym.Env):
    """A ball on a plane: push it to the goal. The talk's own equations are unknown.

    Observation x, y, v_x, v_y; action two forces u in [−1, 1]. v ← 0.95 v + 0.1 u, (x, y) ← (x, y) + 0.1 v,
    elastic walls at ±1. Reward −1 unless within 0.05 of the goal; never terminates.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012  Gymnasium's protocol
    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)
    state, goals = gym.spaces.Box(-np.inf, np.inf, (4,), np.float64), gym.spaces.Box(-1, 1, (2,), np.float64)
    observation_space = gym.spaces.Dict({"observation": state, "achieved_goal": goals, "desired_goal": goals})
    distance_threshold = 0.05

    def __init__(self, render_mode: str | None = None, reward_type: str = "sparse"):
        self.render_mode, self.reward_type = render_mode, reward_type

    def observe(self) -> dict[str, np.ndarray]:
        state = np.concatenate([self.position, self.velocity])
        return {"observation": state, "achieved_goal": state[:2], "desired_goal": self.goal.copy()}

    def compute_reward(self, achieved: np.ndarray, desired: np.ndarray, info: dict) -> np.ndarray:
        distance = np.linalg.norm(achieved - desired, axis=-1)
        sparse = np.where(distance > self.distance_threshold, -1.0, 0.0)
        return -distance if self.reward_type == "dense" else sparse

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
        """ag: obs [..., n] -> [..., g]; no list of columns, which a captured graph could not read."""
        first, last = self.columns[0], self.columns[-1] + 1
        together = self.columns == list(range(first, last))
        return obs[..., first:last] if together else torch.stack([obs[..., i] for i in self.columns], -1)

    def reward(self, obs: Tensor, goal: Tensor) -> Tensor:
        """R: −1 or 0, or with `dense` −distance; obs [..., n], goal [..., g] -> [...]."""
        distance = torch.linalg.vector_norm(self.achieved(obs) - goal, dim=-1)
        return -distance if self.dense else -(distance > self.threshold).to(obs.dtype)


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


def value_loss(q: Tensor, target: Tensor) -> Tensor:
    """Squared error, mean over the batch, sum over the critics: q [members, B], target [B] -> scalar."""
    assert q.shape[1:] == target.shape
    return (q - target).square().mean(1).sum()


def deterministic_actor_loss(q: Tensor) -> Tensor:
    """−mean Q(s, π(s)): [B] -> scalar."""
    return -q.mean()


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


@torch.no_grad()
def polyak(target: nn.Module, source: nn.Module, tau: float) -> None:
    """target ← target + τ (source − target), all parameters in one call."""
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), tau)


def held_out(episode: Tensor) -> Tensor:
    """Every tenth episode, from the second on, never trains the model: episode numbers [B] -> bool [B]."""
    return episode % 10 == 1


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


class Agent:
    """DDPG with hindsight whose critics learn from pessimistic expanded targets."""

    captured = ("policy_for", "learn", "fit_models")  # tensors in, tensors out: CUDA graphs on a GPU

    def __init__(self, args: Args, task: GoalTask, device: torch.device):
        task = GoalTask(*task)  # also from the list that a checkpoint has
        self.args, self.task, self.device, self.warned, self.sizes = args, task, device, False, [list(task)]
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
        adam = {"fused": True, "capturable": device.type == "cuda"}  # elementwise: one for both is faster
        self.optimizer = optim.Adam(groups, **adam)
        if args.horizon == 0:
            return
        sizes = (args.model_layers, args.model_hidden)
        self.model = DynamicsEnsemble(args.members, task, *sizes).to(device)
        self.model_optimizer = optim.Adam(self.model.parameters(), lr=args.model_lr, **adam)
        self.model_is_ready = torch.tensor(False)  # on the CPU, where it is asked

    def make_buffer(self, capacity: int) -> EpisodeReplay:
        return EpisodeReplay(capacity, self.task, self.args.num_envs, self.args.hindsight, self.device)

    def view(self, obs: Tensor, goal: Tensor) -> Tensor:
        """What the networks see: both normalised, within 5 deviations: [B, n], [B, g] -> [B, n + g]."""
        pairs = ((obs, self.obs_moments), (goal, self.goal_moments))
        return torch.cat([((x.clamp(-200, 200) - m.mean) / m.std).clamp(-5, 5) for x, m in pairs], 1)

    def act_for(self, obs: np.ndarray, goal: np.ndarray, deterministic: bool = False) -> np.ndarray:
        """obs [N, n], goal [N, g] -> actions [N, m] in [−1, 1], with the noise of (6) or without."""
        obs, goal = (torch.as_tensor(np.float32(x), device=self.device) for x in (obs, goal))
        return self.policy_for(obs, goal, deterministic).cpu().numpy()

    @torch.no_grad()
    def policy_for(self, obs: Tensor, goal: Tensor, deterministic: bool) -> Tensor:
        action = self.actor(self.view(obs, goal))
        if deterministic:
            return action
        noisy = (action + self.args.exploration_noise * torch.randn_like(action)).clamp(-1, 1)
        at_random = torch.rand(len(action), 1, device=self.device) < self.args.random_actions
        return torch.where(at_random, 2 * torch.rand_like(action) - 1, noisy)  # (6)

    def assess(self, obs: Tensor, goal: Tensor) -> tuple[Tensor, Tensor]:
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
        action, value = self.assess(x, goal)
        rewards, values = [], [value]
        for _ in range(horizon):
            x = self.model(x, action)
            action, value = self.assess(x, goal)
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
        args, rows = self.args, []
        every = torch.arange(replay.size, device=self.device)
        self.observe(replay)
        models = self.update_models(replay, step) if args.horizon > 0 else {}
        horizon = args.horizon if args.horizon > 0 and self.model_is_ready else 0
        for _ in range(args.updates_per_cycle):
            batch = replay.sample(args.batch_size, every)  # no part of a graph: there are ever more episodes
            metrics, targets = self.learn(batch, horizon)
            rows.append(torch.stack(list(metrics.values())))  # copied: the next call overwrites them
        polyak(self.critic_target, self.critic, args.tau)  # (5)
        polyak(self.actor_target, self.actor, args.tau)  # (5)
        means = dict(zip(metrics, torch.stack(rows, 1).mean(1), strict=True))
        spread = {f"expansion/target_mean_{h}": t.mean() for h, t in enumerate(targets.transpose(0, 1))}
        spread["expansion/spread_over_members"] = targets.std(0, correction=0).mean()
        if not self.warned and (gap := means["expansion/pessimism_gap"]) < -5:
            self.warned = True
            sunk = f"targets lie {-gap:.1f} below the model-free ones"
            tqdm.write(f"step {step}: {sunk}: a pessimistic model can sink all values")
        return models | spread | means

    def learn(self, batch: GoalBatch, horizon: int) -> tuple[dict[str, Tensor], Tensor]:
        """One gradient step of actor and critics: metrics, and the targets of (1)."""
        args, seen = self.args, self.view(batch.obs, batch.goal)
        with torch.no_grad():
            targets = self.expand_values(batch, horizon)  # (1)
            target = aggregate(targets, args.agg)  # (2)
        q = self.critic(seen, batch.action)
        critic_loss = value_loss(q, target)  # (3)
        action = self.actor(seen)
        actor_loss = deterministic_actor_loss(self.critic(seen, action, frozen=True, members=1)[0])
        actor_loss = actor_loss + args.action_l2 * action.square().mean()  # (4)

        self.optimizer.zero_grad()
        (critic_loss + actor_loss).backward()  # no parameter is in both
        self.optimizer.step()
        return {
            "losses/qf_loss": critic_loss.detach(),
            "losses/qf_values": q.detach().mean(),
            "losses/actor_loss": actor_loss.detach(),
            "expansion/target_mean": target.mean(),
            "expansion/pessimism_gap": (target - targets[0, 0]).mean(),
        }, targets

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
        warm_up, loss = 0 if self.model_optimizer.state else args.model_warm_up, {}
        shape, steps = (args.members, args.model_batch), args.model_steps or args.horizon
        for _ in range(args.model_updates + warm_up):
            loss = {"model/loss": self.fit_models(*replay.windows(shape, steps, train))}
        metrics = self.diagnose_models(replay)
        ready = metrics["model/change_error"] < args.model_ready
        self.model_is_ready |= ready.to(self.model_is_ready.device)
        return loss | metrics | {"model/is_ready": self.model_is_ready.clone()}

    def fit_models(self, obs: Tensor, action: Tensor) -> Tensor:
        """One gradient step (7), each member on its own windows: obs [E, B, L + 1, n], action [.., L, m]."""
        loss = multi_step_loss(self.model.errors(obs, action))  # (7)
        self.model_optimizer.zero_grad()
        loss.backward()
        self.model_optimizer.step()
        return loss.detach() / self.args.members

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


def make_goal_env(env_id: str, env_kwargs: str = "{}", video_dir: Path | None = None) -> gym.Env:
    """A goal task of episodes of one length, actions in [−1, 1]; with video_dir its first one is filmed.

    Raises BadInput for a task that this file cannot serve.
    """
    if env_id.startswith("Fetch"):
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # a notice on other tasks
                import gymnasium_robotics
        except ImportError:
            require(False, "env_id", env_id, "a task that is installed: pip install gymnasium-robotics")
        gym.register_envs(gymnasium_robotics)
    env = make_env(env_id, env_kwargs, video_dir, raw=True)
    parts, names = env.observation_space, ("observation", "achieved_goal", "desired_goal")
    parts = parts.spaces if isinstance(parts, gym.spaces.Dict) else {}
    flat = all(isinstance(parts.get(k), gym.spaces.Box) and len(parts[k].shape) == 1 for k in names)
    require(flat, "env_id", env_id, f"a goal task ({', '.join(names)}), not {env.observation_space}")
    limited = env.spec is not None and env.spec.max_episode_steps is not None
    require(limited, "env_id", env_id, "registered with max_episode_steps: episodes have one length")
    sizes = {k: parts[k].shape[0] for k in names}
    env.see = lambda obs: {k: finite(f"the task's {k}", obs[k], size=sizes[k]) for k in names}
    box = lambda size: gym.spaces.Box(-np.inf, np.inf, (size,), np.float32)
    env.observation_space = gym.spaces.Dict({k: box(sizes[k]) for k in names})
    return env


class GoalVectorEnv(gym.vector.SyncVectorEnv):
    """Copies side by side, never reset by themselves."""

    np_random = np.random.default_rng(0)  # for checkpoints; unused: an episode's number determines its start

    def __init__(self, makers: list):
        super().__init__(makers, autoreset_mode=gym.vector.AutoresetMode.DISABLED)


class ThreadedVectorEnv(GoalVectorEnv):
    """Copies stepped by threads; what they return does not depend on how many. No infos."""

    def __init__(self, makers: list, threads: int):
        super().__init__(makers)
        self.pool = ThreadPoolExecutor(threads)

    def step(self, actions: np.ndarray) -> tuple:
        obs, *rest, _ = zip(*self.pool.map(lambda env, a: env.step(a), self.envs, actions), strict=True)
        empty = gym.vector.utils.create_empty_array(self.single_observation_space, self.num_envs)
        stacked = gym.vector.utils.concatenate(self.single_observation_space, obs, empty)
        return stacked, *map(np.array, rest), {}

    def close_extras(self, **options) -> None:
        self.pool.shutdown()
        super().close_extras(**options)


def make_goal_envs(env_id: str, count: int, threads=1, env_kwargs="{}", video_dir=None) -> GoalVectorEnv:
    """Copies side by side; with video_dir the first one's first episode is filmed."""
    films = [video_dir, *[None] * (count - 1)]
    makers = [lambda film=film: make_goal_env(env_id, env_kwargs, film) for film in films]
    threaded = threads > 1 and video_dir is None  # a renderer belongs to one thread
    return ThreadedVectorEnv(makers, threads) if threaded else GoalVectorEnv(makers)


def study(env_id: str, seed: int, env_kwargs: str = "{}") -> GoalTask:
    """Looks for ag among the observations of three random episodes, and compares the reward.

    Raises BadInput if ag is not a part of the observation, or the reward neither −[distance > threshold]
    nor −distance.
    """
    env = make_goal_env(env_id, env_kwargs)
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
def play(envs: GoalVectorEnv, task: GoalTask, first: int, seed: int, policy) -> Episodes:
    """One episode in each env, numbers `first` and on; the number alone determines start and goal.

    policy(obs [K, n], goal [K, g]) -> actions [K, m]. Raises BadInput if the task is not finite or an episode
    ends early, RunFailed if the actions are not finite.
    """
    numbers = range(first, first + envs.num_envs)
    found, _ = envs.reset(seed=[int(np.random.SeedSequence((seed, k)).generate_state(1)[0]) for k in numbers])
    goal, total = finite("the task's goal", found["desired_goal"]), np.zeros(len(numbers))
    obs, actions = [finite("the task's observation", found["observation"])], []
    for t in range(1, task.length + 1):
        actions.append(policy(obs[-1], goal))
        found, reward, terminated, truncated, _ = envs.step(actions[-1])
        obs.append(finite("the task's observation", found["observation"]))
        total += finite("the task's reward", reward)
        if terminated.any() or (truncated.any() and t < task.length):
            raise BadInput(f"the task's episodes must last {task.length} steps, one ended at {t}")
    distance = np.linalg.norm(obs[-1][:, task.columns] - goal, axis=1)
    stacked = (torch.as_tensor(np.stack(rows, 1)) for rows in (obs, actions))
    return Episodes(*stacked, torch.as_tensor(goal), total, (distance <= task.threshold).astype(float))


def train_episodic(args: Args) -> Path:
    """Start a run of cycles, episodes side by side and then updates, or go on with args.resume; its folder.

    Raises BadInput for a mistake, before anything is on disk, and RunFailed for a run that cannot go on.
    """
    device, task = prepare(args), study(args.env_id, args.seed, args.env_kwargs)
    for name in ("horizon", "model_steps"):  # held-out windows and those of the loss fit into an episode
        require(getattr(args, name) <= task.length, name, getattr(args, name), f"at most {task.length} here")
    agent, per_cycle = Agent(args, task, device), args.num_envs * task.length
    cycles = max(2, -(-args.total_timesteps // per_cycle))
    replay = agent.make_buffer(min(args.buffer_size, cycles * per_cycle))
    given = (args.env_id, args.num_envs, args.env_threads, args.env_kwargs)
    envs, eval_envs = (make_goal_envs(*given) for _ in range(2))
    evaluation = functools.partial(evaluate_goals, eval_envs)
    at_random = lambda *_: 2 * torch.rand(args.num_envs, task.action_dim).numpy() - 1
    with contextlib.closing(eval_envs), RunFolder(args, envs, agent, replay, evaluation) as run:
        for step in run.steps(per_cycle):
            before, cycle_began = step - per_cycle, time.perf_counter()
            policy = at_random if before < args.learning_starts else agent.act_for
            played = play(envs, task, run.episode, args.seed, policy)
            replay.add(*(x.to(device) for x in (played.obs, played.action, played.goal)))
            collected = time.perf_counter()
            metrics = {name: float(value) for name, value in agent.update(replay, step).items()}
            updated = time.perf_counter()
            run.log(metrics | run.speed() | {"charts/success_rate": played.success.mean()})
            run.log({"time/collection": collected - cycle_began, "time/updates": updated - collected})

            if step // args.eval_every > before // args.eval_every or step >= args.total_timesteps:
                run.evaluate()
            run.end_episode({"r": played.episode_return.mean(), "l": task.length}, count=args.num_envs)
    return run.path


def evaluate_goals(
    envs: GoalVectorEnv, agent: Agent, args: Args, step: int, video_dir: Path | None = None
) -> dict[str, float]:
    """Return and success at the last step, deterministic policy, always the same starts and goals."""
    if video_dir is not None:
        envs = make_goal_envs(args.env_id, envs.num_envs, 1, args.env_kwargs, video_dir)
    policy, played = functools.partial(agent.act_for, deterministic=True), []
    for first in range(0, args.eval_episodes, envs.num_envs):
        played.append(play(envs, agent.task, first, args.seed + 100, policy))
    if video_dir is not None:
        envs.close()
    names = ("episode_return", "success")
    returns, success = (np.concatenate([getattr(p, k) for p in played])[: args.eval_episodes] for k in names)
    stats = {"return_mean": returns.mean(), "return_std": returns.std(), "length_mean": agent.task.length}
    stats |= {"success_rate": success.mean()}
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
    main(train_episodic)
