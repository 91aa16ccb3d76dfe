"""Deep deterministic policy gradient (DDPG), Lillicrap et al. 2016, arXiv 1509.02971.

One critic Q, one deterministic actor π, and slow copies Q̄, π̄ of both.

    y   = r + γ (1 − d) Q̄(s', π̄(s'))                                                        (1)
    L_Q = mean (Q(s, a) − y)²                                                               (2)
    L_π = −mean Q(s, π(s))                                                                  (3)   Q constant
    Q̄   ← Q̄ + τ (Q − Q̄),   π̄ ← π̄ + τ (π − π̄)                                               (4)

Both gradients are those of the state before the update, then applied together. The actor that gathers data is
noisy, in its actions or, adaptively, in its weights (Plappert et al. 2018, arXiv 1706.01905):

    a = clip(π(s) + σ ε, −1, 1)      or      a = π̃(s),  π̃ = π with weights + ξ ε              (5)
    every 50 updates ξ ← 1.01 ξ if their mean of √mean (π̃(s) − π(s))² is below σ, else ξ / 1.01  (6)

Defaults are those of the TD3 authors' present code ("our DDPG"); the paper's are named at each argument.

    python algos/ddpg.py                          # InvertedPendulum-v5, 10 000 steps: a minute on a laptop
    python algos/ddpg.py --env-id HalfCheetah-v5 --total-timesteps 1_000_000 --learning-starts 25_000
    python algos/ddpg.py --resume runs/<run>      # goes on where it stopped, in the same bits
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
class Args(Run, DDPG):
    """Everything that can be set; Run.__post_init__ checks all of it."""


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


class Agent:
    """Deterministic actor and critic, and their slow copies."""

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

    def make_buffer(self, capacity: int, env: gym.Env) -> ReplayBuffer:
        """The replay that `train` fills with steps of env."""
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

    def update(self, buffer: ReplayBuffer, step: int) -> dict[str, Tensor]:
        """The gradient steps of one environment step. Metrics stay tensors: reading one would stall a GPU."""
        args, gamma, metrics = self.args, self.args.gamma, {}
        for k in range(args.updates_per_step):
            batch = buffer[buffer.sample(args.batch_size)]
            with torch.no_grad():
                next_q = self.critic_target(batch.next_obs, self.actor_target(batch.next_obs)).amin(0)
                target = td_target(batch.reward, batch.terminated, next_q, gamma)  # (1)
            q = self.critic(batch.obs, batch.action)
            critic_loss = value_loss(q, target)  # (2)
            action = self.actor(batch.obs)
            actor_loss = deterministic_actor_loss(self.critic(batch.obs, action, frozen=True)[0])  # (3)

            self.optimizer.zero_grad()
            (critic_loss + actor_loss).backward()  # no parameter is in both
            self.optimizer.step()
            polyak(self.critic_target, self.critic, args.tau)  # (4)
            polyak(self.actor_target, self.actor, args.tau)  # (4)
            if args.exploration == "parameter":
                number = (step - args.learning_starts - 1) * args.updates_per_step + k + 1
                metrics = self.explore(batch.obs, number)
        return metrics | {
            "losses/qf_loss": critic_loss.detach(),
            "losses/qf_values": q.detach().mean(),
            "losses/actor_loss": actor_loss.detach(),
        }

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
