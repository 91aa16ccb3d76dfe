"""DDPG with model-based value expansion (DDPG-MVE), Feinberg et al. 2018, arXiv 1803.00101.

ddpg.py's critic target looks one real step ahead. Here a learned model f and the slow actor imagine H further
steps from s', and the slow critic is trusted only where the imagined trajectory ends:

    ŝ_0 = s',  â_t = π̄(ŝ_t),  ŝ_{t+1} = ŝ_t + f(ŝ_t, â_t),  r̂_t = r(ŝ_t, â_t, ŝ_{t+1})
    y_H = Q̄(ŝ_H, â_H)                                                                        (1a)
    y_t = r̂_t + γ (1 − d̂_t) y_{t+1},   t = H−1 .. 0                                          (1b)
    y   = r + γ (1 − d) y_0                                                                  (1c)

(1c) is ddpg.py's target and (1b) the same function, so that H = 0 is ddpg.py bit for bit. Because the slow
critic is now asked about imagined states, the critic learns there too (the TD-k trick; --no-tdk without):

    L_Q = (mean (Q(s, a) − y)² + Σ_{t<H} mean over the living of (Q(ŝ_t, â_t) − y_t)²) / H    (2)

(3), (4), (5) and (6) are ddpg.py's. The reward is the task's own formula where observations determine it,
else learned with the model, as is the change of the state, both in deviations of the replay:

    L_f = mean ((f(s, a) − (s' − s)) / σ)²                                                   (7)

    python algos/ddpg_mve.py --horizon 3
    python algos/ddpg_mve.py --preset paper --env-id experiments.suites:mve/HalfCheetah-v0
    python algos/ddpg_mve.py --resume runs/<run>     # goes on where it stopped, in the same bits
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
class DDPG:
    """Deep deterministic policy gradient."""

    gamma: Fraction = 0.99
    """Discount factor γ (Lillicrap et al. 2016)."""
    tau: Fraction = 0.005
    """Polyak step τ of the slow copies (TD3 authors' code; Lillicrap et al. 2016: 0.001)."""
    actor_lr: Rate = 3e-4
    """Adam step size of the actor (TD3 authors' code; Lillicrap et al. 2016: 1e-4)."""
    critic_lr: Rate = 3e-4
    """Adam step size of the critic (TD3 authors' code; Lillicrap et al. 2016: 1e-3)."""
    hidden: Width = 256
    """Units in each of two hidden layers (TD3 authors' code; Lillicrap et al. 2016: 400 and 300)."""
    updates_per_step: Count = 1
    """Gradient steps per environment step (TD3 authors' code: 1; Feinberg et al. 2018: 4)."""
    layer_norm: bool = False
    """Normalise each hidden layer before its ReLU (Plappert et al. 2018, for noise on weights)."""
    exploration: Literal["gaussian", "parameter"] = "gaussian"
    """Noise on actions (TD3 authors' code), or adaptive noise on weights (Plappert et al. 2018)."""
    exploration_noise: Rate = 0.1
    """σ, in halves of the action's range (TD3 authors' code: 0.1; Feinberg et al. 2018: 0.4 by weights)."""


@dataclass
class ModelExpansion:
    """Value expansion with a learned model."""

    preset: Literal["laptop", "paper"] = "laptop"
    """paper: networks, exploration, step sizes and updates of Feinberg et al. 2018; any flag overrides it."""
    horizon: Natural = 3
    """Imagined steps H of the critic's target; 0 is ddpg.py (Feinberg et al. 2018: 10, Walker2d 3)."""
    tdk: bool = True
    """TD-k trick: regress the critic at imagined pairs too (Feinberg et al. 2018)."""
    rewards: Literal["auto", "learned"] = "auto"
    """auto: the task's formula where its observations determine it (Feinberg et al. 2018), else learned."""
    terminations: bool = False
    """Learn terminations and end imagined trajectories there (Feinberg et al. 2018: they never end)."""
    model_layers: Annotated[int, (1, 64)] = 8
    """Hidden layers of the model (Feinberg et al. 2018)."""
    model_hidden: Width = 128
    """Units in each hidden layer of the model (Feinberg et al. 2018)."""
    model_lr: Rate = 1e-3
    """Adam step size of the model (Feinberg et al. 2018)."""
    model_batch: Count = 512
    """Transitions per model update (Feinberg et al. 2018)."""
    model_updates: Natural = 1
    """Model updates per environment step (ours; Feinberg et al. 2018: 4)."""
    model_warm_up: Natural = 500
    """Model updates before the first critic update (ours; Feinberg et al. 2018: 20 000, by earlier start)."""
    normalize_every: Count = 1_000
    """Steps between refreshes of the model's means and deviations (ours; Feinberg et al. 2018: 100)."""
    diagnose_every: Count = 500
    """Steps between measurements of the model on held-out episodes; a multiple of log_every (ours)."""


SETTINGS_OF_PAPER = {
    "horizon": 10, "hidden": 64, "layer_norm": True, "exploration": "parameter", "exploration_noise": 0.4,
    "actor_lr": 1e-3, "critic_lr": 1e-3, "tau": 0.01, "batch_size": 64, "updates_per_step": 4,
    "model_updates": 4, "normalize_every": 100,
}  # fmt: skip


@dataclass
class Args(Run, DDPG, ModelExpansion):
    def __post_init__(self) -> None:
        Run.__post_init__(self)
        logged = self.diagnose_every % self.log_every == 0
        require(logged, "diagnose_every", self.diagnose_every, f"a multiple of --log-every {self.log_every}")

    @classmethod
    def defaults(cls, argv: list[str] | None) -> dict[str, object]:
        """The dataclass's defaults, then the preset's that argv names."""
        peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        peek.add_argument("--preset", nargs="?", default=cls.preset)
        paper = peek.parse_known_args(argv)[0].preset == "paper"
        return dataclasses.asdict(cls()) | (SETTINGS_OF_PAPER if paper else {})


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


def value_loss(q: Tensor, target: Tensor) -> Tensor:
    """Squared error, mean over the batch, sum over the critics: q [members, B], target [B] -> scalar."""
    assert q.shape[1:] == target.shape
    return (q - target).square().mean(1).sum()


def deterministic_actor_loss(q: Tensor) -> Tensor:
    """−mean Q(s, π(s)): [B] -> scalar."""
    return -q.mean()


def glorot(module: nn.Module) -> None:
    """Weights U(±√(6 / (inputs + outputs))), biases 0 (Plappert et al. 2018)."""
    for layer in module.layers:
        bound = math.sqrt(6 / sum(layer.weight.shape[1:]))
        nn.init.uniform_(layer.weight, -bound, bound)
        nn.init.zeros_(layer.bias)


class DeltaModel(StackedMLP):
    """s' − s and r from (s, a): one network, inputs and outputs in deviations of the replay."""

    def __init__(self, obs_dim: int, action_dim: int, layers: int, hidden: int):
        sizes = [obs_dim + action_dim, *[hidden] * layers, obs_dim + 1]
        super().__init__(1, sizes, layer_norm=False)
        glorot(self)
        for name, width in (("input", obs_dim), ("output", obs_dim + 1)):
            self.register_buffer(f"{name}_mean", torch.zeros(width))
            self.register_buffer(f"{name}_std", torch.ones(width))

    def targets(self, batch: Batch) -> Tensor:
        """What is to be predicted, in the task's units: [B, n + 1]."""
        return torch.cat([batch.next_obs - batch.obs, batch.reward[:, None]], 1)

    def fit_normalizer(self, batch: Batch) -> None:
        """Means and deviations of the batch; a constant dimension keeps deviation 1."""
        for name, values in (("input", batch.obs), ("output", self.targets(batch))):
            std = values.std(0, correction=0)
            getattr(self, f"{name}_mean").copy_(values.mean(0))
            getattr(self, f"{name}_std").copy_(torch.where(std > 1e-6, std, 1.0))

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        """obs [B, n], action [B, m] -> predictions in the task's units [B, n + 1]."""
        x = torch.cat([(obs - self.input_mean) / self.input_std, action], 1)
        return self.output_mean + self.output_std * super().forward(x)[0]


def known_reward(env: gym.Env, device: torch.device):
    """The task's reward as a function of (s' − s [B, n], action [B, m], s' [B, n]) -> [B]; None if unknown.

    HalfCheetah-v5, Swimmer-v5 and Walker2d-v5 with the root's position in their observations.
    """
    task = env.unwrapped
    name = type(task).__name__
    if name not in ("HalfCheetahEnv", "SwimmerEnv", "Walker2dEnv") or not type(task).__module__.endswith(
        "_v5"
    ):
        return None
    if task._exclude_current_positions_from_observation:
        return None
    low, high = (torch.as_tensor(x, device=device) for x in (task.action_space.low, task.action_space.high))

    def reward(delta: Tensor, action: Tensor, next_obs: Tensor) -> Tensor:
        control = (low + (action + 1) * (high - low) / 2).square().sum(1)
        found = task._forward_reward_weight * delta[:, 0] / task.dt - task._ctrl_cost_weight * control
        if name == "Walker2dEnv":
            z, angle = next_obs[:, 1], next_obs[:, 2]
            (z_low, z_high), (a_low, a_high) = task._healthy_z_range, task._healthy_angle_range
            healthy = (z_low < z) & (z < z_high) & (a_low < angle) & (angle < a_high)
            found = found + task._healthy_reward * healthy
        return found

    return reward


class Termination(nn.Module):
    """Logit of the termination of (s, a, s'), observations normalised: [B, n], [B, m], [B, n] -> [B]."""

    def __init__(self, obs_dim: int, action_dim: int, hidden: int = 64):
        super().__init__()
        sizes = [(2 * obs_dim + action_dim, hidden), (hidden, hidden), (hidden, 1)]
        self.layers = nn.ModuleList(nn.Linear(*size) for size in sizes)

    def forward(self, obs: Tensor, action: Tensor, next_obs: Tensor) -> Tensor:
        x = torch.cat([obs, action, next_obs], 1)
        return self.layers[2](self.layers[1](self.layers[0](x).relu_()).relu_()).squeeze(1)


def held_out_windows(buffer: ReplayBuffer, length: int) -> Tensor:
    """First places of up to 256 random windows of `length` transitions inside one held-out episode: [W]."""
    oldest = buffer.added % buffer.size if buffer.added > buffer.capacity else 0
    age = torch.arange(max(buffer.size - length + 1, 0), device=buffer.rows.device)
    first, last = (oldest + age) % buffer.size, (oldest + age + length - 1) % buffer.size
    whole = buffer.episode[first] == buffer.episode[last]
    found = first[whole & held_out(buffer.episode[first])]
    return found[torch.randperm(len(found), device=found.device)[:256]]


def held_out(episode: Tensor) -> Tensor:
    """Every tenth episode, from the second on, never trains the model: episode numbers [B] -> bool [B]."""
    return episode % 10 == 1


class Imagined(NamedTuple):
    """H imagined steps for B states; each list holds one tensor per step, the first two also the end's."""

    obs: list[Tensor]  # H + 1 of [B, n]
    action: list[Tensor]  # H + 1 of [B, m]
    reward: list[Tensor]  # H of [B]
    done: list[Tensor]  # H of [B], 0 or 1


def expanded(imagined: Imagined, horizon: int, next_q: Tensor, gamma: float) -> Tensor:
    """(1a, 1b) with H = horizon: y_H = next_q [B], then backwards -> y_0 .. y_H [H + 1, B]."""
    values = [next_q]
    for t in reversed(range(horizon)):
        values.append(td_target(imagined.reward[t], imagined.done[t], values[-1], gamma))
    return torch.stack(values[::-1])


def tdk_loss(critic_loss: Tensor, q: Tensor, target: Tensor, alive: Tensor) -> Tensor:
    """(The real pair's loss + Σ_t mean over living rows of (Q_i − y_t)²) / H, arXiv 1803.00101, eq. 4.

    q [critics, H, B] at imagined pairs, target and alive [H, B] -> scalar, summed over critics.
    """
    assert q.shape[1:] == target.shape == alive.shape
    imagined = ((q - target).square() * alive).sum(2) / alive.sum(1).clamp_min(1)
    return (critic_loss + imagined.sum()) / max(len(target), 1)


class Agent:
    """DDPG whose critic learns from targets expanded by a learned model."""

    def __init__(self, args: Args, obs_dim: int, action_dim: int, device: torch.device):
        self.args, self.device = args, device
        sizes = [obs_dim + action_dim, args.hidden, args.hidden, 1]
        self.actor = DeterministicActor(1, [obs_dim, *sizes[1:-1], action_dim], args.layer_norm).to(device)
        self.critic = QFunctions(1, sizes, args.layer_norm).to(device)
        self.actor_target = copy.deepcopy(self.actor).requires_grad_(False)
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)
        groups = [
            {"params": list(self.actor.parameters()), "lr": args.actor_lr},
            {"params": list(self.critic.parameters()), "lr": args.critic_lr},
        ]
        self.optimizer = optim.Adam(groups, fused=True)  # Adam works elementwise: one for both is faster
        if args.exploration == "parameter":
            self.noisy_actor = copy.deepcopy(self.actor).requires_grad_(False)
            depth = len(self.actor.layers)
            self.noise_scale = torch.tensor(args.exploration_noise / 2 / depth, device=device)  # ξ
            self.noise_distance = torch.zeros((), device=device)  # sum since ξ last moved
        self.reward = None  # make_buffer sees the task and may find its formula
        if args.horizon == 0:  # no model, no random number drawn for it: the very same run as ddpg.py
            return
        sizes = (args.model_layers, args.model_hidden)
        self.model = DeltaModel(obs_dim, action_dim, *sizes).to(device)
        parameters = list(self.model.parameters())
        if args.terminations:
            self.termination = Termination(obs_dim, action_dim).to(device)
            parameters += self.termination.parameters()
        self.model_optimizer = optim.Adam(parameters, lr=args.model_lr, fused=True)

    def make_buffer(self, capacity: int, env: gym.Env) -> ReplayBuffer:
        """The replay that `train` fills with steps of env; also looks for the formula of its reward."""
        self.reward = known_reward(env, self.device) if self.args.rewards == "auto" else None
        return ReplayBuffer(capacity, env.observation_space.shape[0], env.action_space.shape[0], self.device)

    @torch.no_grad()
    def act(self, obs: np.ndarray, deterministic: bool = False) -> np.ndarray:
        """obs [n] -> action [m] in [−1, 1], with the noise of (5) or without."""
        obs, args = torch.as_tensor(obs, device=self.device)[None], self.args
        if not deterministic and args.exploration == "parameter":
            action = self.noisy_actor(obs)  # (5)
        else:
            action = self.actor(obs)
            if not deterministic:
                action = (action + args.exploration_noise * torch.randn_like(action)).clamp(-1, 1)  # (5)
        return action[0].cpu().numpy()

    def foresee(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """One step of the model: obs [B, n], action [B, m] -> next obs [B, n], reward [B]."""
        prediction = self.model(obs, action)
        delta = prediction[:, :-1]
        next_obs = obs + delta
        return next_obs, prediction[:, -1] if self.reward is None else self.reward(delta, action, next_obs)

    def predict_end(self, obs: Tensor, action: Tensor, next_obs: Tensor) -> Tensor:
        """Logit [B] that the step from obs [B, n] to next_obs [B, n] ended the episode."""
        mean, std = self.model.input_mean, self.model.input_std
        return self.termination((obs - mean) / std, action, (next_obs - mean) / std)

    def follow(self, obs: Tensor) -> Imagined:
        """H steps of the slow actor and the model from obs [B, n]."""
        imagined = Imagined([obs], [self.actor_target(obs)], [], [])
        for _ in range(self.args.horizon):
            action = imagined.action[-1]
            next_obs, reward = self.foresee(obs, action)
            done = torch.zeros_like(reward)
            if self.args.terminations:  # certain (p > ½) or none
                done = (self.predict_end(obs, action, next_obs) > 0).to(obs.dtype)
            obs = next_obs
            for values, value in zip(imagined, (obs, self.actor_target(obs), reward, done), strict=True):
                values.append(value)
        return imagined

    def update(self, buffer: ReplayBuffer, step: int) -> dict[str, Tensor]:
        """The gradient steps of one environment step, the model's first. Metrics stay tensors."""
        args, gamma, horizon = self.args, self.args.gamma, self.args.horizon
        metrics = self.update_deltas(buffer, step) if horizon > 0 else {}
        for k in range(args.updates_per_step):
            batch = buffer[buffer.sample(args.batch_size)]
            with torch.no_grad():
                imagined = self.follow(batch.next_obs)
                next_q = self.critic_target(imagined.obs[-1], imagined.action[-1]).amin(0)
                values = expanded(imagined, horizon, next_q, gamma)  # (1a, 1b)
                target = td_target(batch.reward, batch.terminated, values[0], gamma)  # (1c)
            q = self.critic(batch.obs, batch.action)
            critic_loss = value_loss(q, target)
            if args.tdk and horizon > 0:
                alive = torch.stack([1 - batch.terminated, *(1 - d for d in imagined.done[:-1])]).cumprod(0)
                pairs = torch.cat(imagined.obs[:-1]), torch.cat(imagined.action[:-1])
                q_imagined = self.critic(*pairs).view(-1, *alive.shape)
                critic_loss = tdk_loss(critic_loss, q_imagined, values[:-1], alive)  # (2)
            action = self.actor(batch.obs)
            actor_loss = deterministic_actor_loss(self.critic(batch.obs, action, frozen=True)[0])  # (3)

            self.optimizer.zero_grad()
            (critic_loss + actor_loss).backward()  # no parameter is in both
            self.optimizer.step()
            polyak(self.critic_target, self.critic, args.tau)  # (4)
            polyak(self.actor_target, self.actor, args.tau)  # (4)
            if args.exploration == "parameter":
                number = (step - args.learning_starts - 1) * args.updates_per_step + k + 1
                metrics |= self.explore(batch.obs, number)
        if horizon > 0 and step % args.diagnose_every == 0:
            metrics |= self.diagnose_model(buffer, batch, imagined)
        return metrics | {
            "losses/qf_loss": critic_loss.detach(),
            "losses/qf_values": q.detach().mean(),
            "losses/actor_loss": actor_loss.detach(),
        }

    def update_deltas(self, buffer: ReplayBuffer, step: int) -> dict[str, Tensor]:
        """The model's gradient steps of this environment step; its normaliser changes only before them."""
        args, first, metrics = self.args, step == self.args.learning_starts + 1, {}
        if first or step % args.normalize_every == 0:
            train = (~held_out(buffer.episode[: buffer.size])).nonzero().squeeze(1)
            if len(train):
                self.model.fit_normalizer(buffer[train])
        for _ in range(args.model_updates + first * args.model_warm_up):
            metrics = self.fit_deltas(buffer)
        return metrics

    def fit_deltas(self, buffer: ReplayBuffer) -> dict[str, Tensor]:
        """One gradient step of the model (7) and the classifier; held-out rows weigh 0."""
        at = buffer.sample(self.args.model_batch)
        batch, train = buffer[at], (~held_out(buffer.episode[at])).float()
        error = (self.model(batch.obs, batch.action) - self.model.targets(batch)) / self.model.output_std
        loss = (error.square().mean(1) * train).sum() / train.sum().clamp_min(1)  # (7)
        metrics = {"model/loss": loss.detach()}
        if self.args.terminations:
            logit = self.predict_end(batch.obs, batch.action, batch.next_obs)
            entropy = F.binary_cross_entropy_with_logits(logit, batch.terminated, reduction="none")
            ended_loss = (entropy * train).sum() / train.sum().clamp_min(1)
            metrics["model/termination_loss"] = ended_loss.detach()
            loss = loss + ended_loss
        self.model_optimizer.zero_grad()
        loss.backward()
        self.model_optimizer.step()
        return metrics

    @torch.no_grad()
    def diagnose_model(self, buffer: ReplayBuffer, batch: Batch, imagined: Imagined) -> dict:
        """Targets of every horizon 0 .. H from one rollout, and the model's errors on held-out episodes."""
        args = self.args
        q = self.critic_target(torch.cat(imagined.obs), torch.cat(imagined.action)).amin(0)
        targets = []
        for h, next_q in enumerate(q.view(args.horizon + 1, -1)):
            values = expanded(imagined, h, next_q, args.gamma)
            targets.append(td_target(batch.reward, batch.terminated, values[0], args.gamma))
        metrics = {f"expansion/target_mean_{h}": target.mean() for h, target in enumerate(targets)}
        metrics["expansion/spread_over_horizons"] = torch.stack(targets).std(0, correction=0).mean()
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):  # training is not touched
            starts = held_out_windows(buffer, args.horizon)
            obs, std = buffer[starts].obs, self.model.input_std
            for k in range(args.horizon if len(starts) else 0):
                real = buffer[(starts + k) % buffer.size]
                obs, reward = self.foresee(obs, real.action)
                metrics[f"model/error_{k + 1}"] = ((obs - real.next_obs) / std).square().mean().sqrt()
                if k == 0:
                    metrics["model/reward_error"] = (reward - real.reward).square().mean().sqrt()
        return metrics

    @torch.no_grad()
    def explore(self, obs: Tensor, number: int) -> dict[str, Tensor]:
        """(5, 6) after gradient step `number`: new noise on the weights, its deviation ξ adapted."""
        for (name, noisy), weight in zip(
            self.noisy_actor.named_parameters(), self.actor.parameters(), strict=True
        ):
            noise = 0 if name.startswith("norms") else self.noise_scale * torch.randn_like(weight)
            noisy.copy_(weight + noise)
        distance = (self.noisy_actor(obs) - self.actor(obs)).square().mean().sqrt()
        self.noise_distance += distance
        if number % 50 == 0:  # (6)
            near = self.noise_distance / 50 < self.args.exploration_noise
            self.noise_scale.copy_(torch.where(near, self.noise_scale * 1.01, self.noise_scale / 1.01))
            self.noise_distance.zero_()
        return {"exploration/noise": self.noise_scale.clone(), "exploration/distance": distance}

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
