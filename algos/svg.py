"""Stochastic value gradients (SVG), Heess et al. 2015, arXiv 1510.09142: SVG(k) for k = 0, 1, .. and ∞.

Policy and model are functions of noise. The noise that explains a recorded step is inferred, so that both
repeat the step exactly and yet carry gradients: the model gives Jacobians along real paths, never a state.

    η = (u − μ(s)) / σ,  ξ = (s' − s − μ_f(s, a)) / σ_f                 constants, no gradient      (1)
    ũ = μ(s̃) + σ η,  ã = tanh ũ,  s̃' = s̃ + μ_f(s̃, ã) + σ_f ξ            of the same values as u, a, s'  (2)
    J = w [Σ_{t<k} γ^t r̂(s̃_t, ã_t) + γ^k (1 − d) V(s̃_k)],  s̃_0 = s_0      SVG(k), climbed by θ        (3)
    w = min(c, Π_{t<k} π(u_t|s_t) / π_t(u_t|s_t)),  π_t the policy that acted                       (4)
    L_V = mean ½ w (V(s) − r − γ (1 − d) V̄(s'))²,  w of one step                                   (5a)
    L_Q = mean ½ (Q(s, a) − r − γ (1 − d) Q̄(s', a'))²,  a' ~ π(·|s')      with --horizon 0           (5b)
    L_f = −mean log N(s' − s; μ_f, σ_f),  L_r = mean (r̂(s, a) − r)²                                (6)
    L_π = −mean J + β KL(π_slow ‖ π)                                      β: --kl                    (7)

--horizon k: at 0 J = w Q(s, ã), without a model. Windows end where their episode does, with V if that was
a time limit. --whole-episodes is SVG(∞): one step of θ for each episode, J over all of it and w = 1. With
--soft r is r − α log π, and α is learned as in sac.py (8). --imagine draws η and ξ anew, with w = 1 in (3):
the same model without the paths, for comparison. --is-clip 0 leaves w out; then old rows dominate.

The paper's policy is Gaussian, ours is squashed by tanh, with u stored. Its code was not published; where
three ports disagree or err, and what we chose: docs/svg.md.

    python algos/svg.py                                  # k = 1 on InvertedPendulum-v5, 10 000 steps
    python algos/svg.py --whole-episodes --actor-lr 3e-3
    python algos/svg.py --env-id HalfCheetah-v5 --total-timesteps 30_000 --soft --init-alpha 0.1 --kl 1
    python algos/svg.py --resume runs/<run>              # goes on where it stopped, in the same bits
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
class SVG:
    """Stochastic value gradients (paper: Heess et al. 2015; raylab, meta-mb: ports that were read)."""

    horizon: Natural = 1  # recorded steps k that are differentiated through; 0 climbs Q (paper: 0, 1, all)
    whole_episodes: bool = False  # SVG(∞): a policy step per episode, through all of it
    imagine: bool = False  # fresh noise for the inferred: imagined steps, not recorded ones
    is_clip: Rate = 5.0  # c, the most an importance weight may be (raylab, meta-mb); 0: no weights
    kl: Rate = 0.1  # β of (7), against a slow policy (ours; meta-mb: 1e-3 to 1e-2; raylab: adaptive); 0: none
    soft: bool = False  # reward r − α log π with a learned temperature α (raylab's SoftSVG)
    init_alpha: Annotated[float, (1e-8, 1e8)] = 1.0  # first temperature α, with --soft
    alpha_lr: Rate = 3e-4  # Adam step size of log α, with --soft
    target_entropy: Real = None  # H̄ in nats of the [−1, 1] action, with --soft; None is −dim(A)
    gamma: Fraction = 0.99  # discount factor γ (raylab, meta-mb)
    tau: Fraction = 0.02  # Polyak step τ of V̄ or Q̄ and the slow policy (ours; raylab: 0.005)
    actor_lr: Rate = 3e-4  # Adam step size of the policy (raylab: 1e-3, 3e-4 for SVG(∞))
    critic_lr: Rate = 1e-3  # Adam step size of V or Q (raylab)
    model_lr: Rate = 1e-3  # Adam step size of model and reward (raylab)
    gradient_norm: Rate = 10.0  # largest norm of the policy's gradient (raylab)
    init_std: Annotated[float, (0.06, 10)] = 0.5  # first σ, before the squash; its floor is 0.05 (ours)
    hidden: Width = 128  # units in each of two tanh layers of policy and V or Q (ours; raylab: 100; 400, 200)
    model_hidden: Width = 128  # units in each of two SiLU layers of model and reward (ours; meta-mb: 500)
    normalize: bool = True  # networks see observations in deviations of all observations so far (ours)


@dataclass
class Args(Run, SVG):
    """Everything that can be set."""

    def __post_init__(self) -> None:
        check(self)
        allowed = "1, its default, with --whole-episodes, which have no other end"
        require(self.horizon == 1 or not self.whole_episodes, "horizon", self.horizon, allowed)
        for name, default in {"init_alpha": 1.0, "alpha_lr": 3e-4, "target_entropy": None}.items():
            value = getattr(self, name)
            require(self.soft or value == default, name, value, f"{default}, its default, without --soft")


class Normalizer(nn.Module):
    """(obs − mean) / deviation of all observations given to `update`, deviations within [0.1, 10].

    Where it is not `used` it hands on obs itself: products of a copy in another layout can have other bits.
    """

    def __init__(self, obs_dim: int, used: bool = True):
        super().__init__()
        self.used = used
        self.register_buffer("seen", torch.zeros((), dtype=torch.float64))
        self.register_buffer("exact_mean", torch.zeros(obs_dim, dtype=torch.float64))
        self.register_buffer("squares", torch.zeros(obs_dim, dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(obs_dim))
        self.register_buffer("std", torch.ones(obs_dim))

    def forward(self, obs: Tensor) -> Tensor:
        return (obs - self.mean) / self.std if self.used else obs

    def update(self, obs: Tensor) -> None:
        """Welford's recursion with one observation [n], float64."""
        self.seen += 1
        delta = obs - self.exact_mean
        self.exact_mean += delta / self.seen
        self.squares += delta * (obs - self.exact_mean)
        self.mean.copy_(self.exact_mean)
        self.std.copy_((self.squares / (self.seen - 1).clamp_min(1)).sqrt().clamp(0.1, 10))


def layers(sizes: list[int], between: type[nn.Module]) -> nn.Sequential:
    """Linear layers with an activation between them."""
    parts = [part for size in pairwise(sizes) for part in (nn.Linear(*size), between())]
    return nn.Sequential(*parts[:-1])


class GaussianPolicy(nn.Module):
    """π(u|s) = N(μ(s), σ²) of the action before its squash; σ = 0.05 + e^ρ is one for all states."""

    def __init__(self, normalizer: Normalizer, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.normalizer = normalizer
        self.mean = layers([obs_dim, args.hidden, args.hidden, action_dim], nn.Tanh)
        self.raw_std = nn.Parameter(torch.full((action_dim,), math.log(args.init_std - 0.05)))

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """obs [B, n] -> μ [B, m] and log σ [m]; a smooth floor, where clamping would keep σ for good."""
        return self.mean(self.normalizer(obs)), (0.05 + self.raw_std.exp()).log()

    def sample(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """obs [B, n] -> u [B, m], and log N(u; μ, σ) [B]."""
        mean, log_std = self(obs)
        u = reproduce(mean, log_std, torch.randn_like(mean))
        return u, gaussian_log_prob(u, mean, log_std)


class GaussianModel(nn.Module):
    """s' = s + S (μ_f(s, a) + σ_f ξ), S the deviations of observations; σ_f [n] is learned, one for all."""

    def __init__(self, normalizer: Normalizer, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.normalizer, width = normalizer, args.model_hidden
        self.mean = layers([obs_dim + action_dim, width, width, obs_dim], nn.SiLU)
        self.log_std = nn.Parameter(torch.zeros(obs_dim))

    def forward(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """obs [B, n], action [B, m] -> μ_f [B, n] and log σ_f [n], in deviations of observations."""
        return self.mean(torch.cat([self.normalizer(obs), action], 1)), self.log_std

    def change(self, obs: Tensor, next_obs: Tensor) -> Tensor:
        """What μ_f predicts: s' − s in deviations, [B, n]."""
        return (next_obs - obs) / self.normalizer.std

    def step(self, obs: Tensor, action: Tensor, noise: Tensor) -> Tensor:
        """(2): the next observation [B, n] that noise ξ [B, n] leads to."""
        return obs + self.normalizer.std * reproduce(*self(obs, action), noise)


class ValueNet(nn.Module):
    """One number per row [B]: V(s), Q(s, a) or r̂(s, a)."""

    def __init__(self, normalizer: Normalizer, sizes: list[int], between: type[nn.Module]):
        super().__init__()
        self.normalizer, self.layers = normalizer, layers([*sizes, 1], between)

    def forward(self, obs: Tensor, *action: Tensor) -> Tensor:
        return self.layers(torch.cat([self.normalizer(obs), *action], 1)).squeeze(1)


@contextlib.contextmanager
def constant(module: nn.Module):
    """What is computed inside has no gradient with respect to the module's weights, only through it."""
    try:
        module.requires_grad_(False)
        yield
    finally:
        module.requires_grad_(True)


@torch.no_grad()
def infer(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """(1): the noise that explains x, a constant. Mean and deviation keep their gradients in (2)."""
    assert x.shape == mean.shape
    return (x - mean) * (-log_std).exp()


def reproduce(mean: Tensor, log_std: Tensor, noise: Tensor) -> Tensor:
    """(2): mean + deviation · noise."""
    assert mean.shape == noise.shape
    return mean + log_std.exp() * noise


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


def squash_slope(u: Tensor) -> Tensor:
    """log |d tanh(u) / du|, summed over the action's dimensions: [B, m] -> [B]."""
    return (2 * (math.log(2) - u - F.softplus(-2 * u))).sum(1)


def importance_weight(log_pi: Tensor, log_mu: Tensor, linked: Tensor, clip: float) -> Tensor:
    """(4): product of the ratios of a window's steps, [k, B] each -> [B]; clip 0: 1 everywhere."""
    assert log_pi.shape == log_mu.shape == linked.shape
    if clip == 0:
        return torch.ones_like(log_pi[0])
    return torch.where(linked, log_pi - log_mu, 0).sum(0).exp().clamp_max(clip)


def window_value(
    act,
    step,
    reward,
    value,
    first: Tensor,
    eta: Tensor,
    xi: Tensor,
    ended: Tensor,
    linked: Tensor,
    gamma: float,
) -> Tensor:
    """(3) without w: reward to the end of each window, and the value of where it ends, [B].

    act(obs, η) -> action and a bonus [B], step(obs, action, ξ) -> next obs, reward(obs, action), value(obs)
    -> [B]; first [B, n], η and ξ of k steps, ended and linked [k, B]: the step terminates, is of the window.
    Behind its last step a window stands still.
    """
    assert len(eta) == len(xi) == len(ended) and ended.shape == linked.shape
    obs, total, discount = first, 0.0, torch.ones_like(first[:, 0])
    for t in range(len(eta)):
        action, bonus = act(obs, eta[t])
        total = total + discount * linked[t] * (reward(obs, action) + bonus)
        obs = torch.where(linked[t][:, None], step(obs, action, xi[t]), obs)
        discount = torch.where(linked[t], gamma * discount, discount)
    return total + discount * (1 - (ended * linked).sum(0)) * value(obs)


def weighted_value_loss(value: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """(5a): mean ½ w (V − y)², [B] each -> scalar."""
    assert value.shape == target.shape == weight.shape
    return 0.5 * (weight * (value - target).square()).mean()


def td_target(reward: Tensor, done: Tensor, next_q: Tensor, gamma: float) -> Tensor:
    """r + γ (1 − d) q', all [B]."""
    assert reward.shape == done.shape == next_q.shape
    return reward + gamma * (1 - done) * next_q


def soft_target(
    reward: Tensor, done: Tensor, next_q: Tensor, next_log_prob: Tensor, alpha: Tensor, gamma: float
) -> Tensor:
    """r + γ (1 − d) (q' − α log π'), all [B]: equations 2 and 3 of arXiv 1812.05905."""
    assert reward.shape == done.shape == next_q.shape == next_log_prob.shape
    return reward + gamma * (1 - done) * (next_q - alpha * next_log_prob)


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


class PathReplay(ReplayBuffer):
    """A replay that keeps each step's u and its log-density when it was taken, and finds whole episodes."""

    def __init__(self, capacity: int, obs_dim: int, action_dim: int, device: torch.device, agent: "Agent"):
        super().__init__(capacity, obs_dim, action_dim, device)
        self.agent, self.taken = agent, torch.zeros(capacity, action_dim + 1, device=device)
        self.current, self.began, self.finished = 0, 0, None

    def add(self, obs, action, reward: float, next_obs, terminated: bool, episode: int) -> None:
        """Behind the warm-up u and log π(u|s) are what the agent's last `act` noted."""
        at, warm_up = self.added % self.capacity, self.agent.args.learning_starts
        self.taken[at] = uniform_taken(action) if self.added < warm_up else self.agent.taken
        if self.agent.args.normalize:
            self.agent.see(torch.as_tensor(obs, dtype=torch.float64, device=self.rows.device))
        if episode != self.current:  # the one before is whole; the policy must have acted in all of it
            length = self.added - self.began
            usable = self.began >= warm_up and 0 < length < self.capacity
            if self.agent.args.whole_episodes and length >= self.capacity:
                warn(f"no policy step: an episode of {length} steps is not shorter than the replay")
            self.finished = (self.began, length) if usable else None
            self.current, self.began = episode, self.added
        super().add(obs, action, reward, next_obs, terminated, episode)

    def state_dict(self) -> dict:
        return super().state_dict() | {"taken": self.taken[: self.size].to("cpu", copy=True)}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.taken[: self.size] = state["taken"]
        newest = state["episode"].roll(-self.added).flip(0)  # first
        self.current = int(newest[0]) if self.size else 0
        self.began = self.added - int((newest == self.current).cumprod(0).sum())


def uniform_taken(action: np.ndarray) -> Tensor:
    """u = atanh a [m] of a uniform action in [−1, 1]^m, and its log-density 2^−m |da/du|: [m + 1]."""
    u = torch.as_tensor(action, dtype=torch.float32).clamp(-1 + 1e-6, 1 - 1e-6).atanh()
    return torch.cat([u, squash_slope(u[None]) - len(u) * math.log(2)])


def windows(buffer: ReplayBuffer, first: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Places [length, B] from `first` [B] on, and whether each holds a step of the episode of `first`."""
    k = torch.arange(length, device=first.device)[:, None]
    places, age = (first + k) % buffer.size, (first - buffer.added) % buffer.size  # age 0 is the oldest
    return places, (age + k < buffer.size) & (buffer.episode[places] == buffer.episode[first])


class Agent:
    """Policy, V or Q with its slow copy, model and reward; with --kl a slow policy, with --soft α."""

    captured = ("policy", "draw", "see", "learn")  # tensors in, tensors out: CUDA graphs on a GPU
    acting = ("taken",)  # what `act` notes for the replay

    def __init__(self, args: Args, obs_dim: int, action_dim: int, device: torch.device):
        self.args, self.sizes, self.device, fast = args, (obs_dim, action_dim), device, device.type == "cuda"
        self.target_entropy = -float(action_dim) if args.target_entropy is None else args.target_entropy
        normalizer, sizes = Normalizer(obs_dim, args.normalize), (obs_dim, action_dim)
        self.actor = GaussianPolicy(normalizer, *sizes, args).to(device)
        inputs = obs_dim if args.horizon > 0 else obs_dim + action_dim
        self.critic, self.critic_target = (
            ValueNet(normalizer, [inputs, args.hidden, args.hidden], nn.Tanh).to(device) for _ in range(2)
        )
        self.critic_target.requires_grad_(False).load_state_dict(self.critic.state_dict())
        self.taken = torch.zeros(action_dim + 1, device=device)
        climbs = [{"params": list(self.actor.parameters()), "lr": args.actor_lr}]
        fits = [{"params": list(self.critic.parameters()), "lr": args.critic_lr}]
        if args.horizon > 0:
            self.model = GaussianModel(normalizer, *sizes, args).to(device)
            widths = [obs_dim + action_dim, args.model_hidden, args.model_hidden]
            self.reward = ValueNet(normalizer, widths, nn.SiLU).to(device)
            learned = [*self.model.parameters(), *self.reward.parameters()]
            fits.append({"params": learned, "lr": args.model_lr})
        if args.kl > 0:
            self.slow_actor = GaussianPolicy(normalizer, *sizes, args).to(device).requires_grad_(False)
            self.slow_actor.load_state_dict(self.actor.state_dict())
        if args.soft:
            self.log_alpha = torch.tensor(math.log(args.init_alpha), device=device, requires_grad=True)
            climbs.append({"params": [self.log_alpha], "lr": args.alpha_lr})
        if args.whole_episodes:
            self.report = torch.zeros(4 if args.kl > 0 else 3, device=device)  # of the last policy step
        self.optimizer = optim.Adam(fits, fused=True, capturable=fast)
        self.actor_optimizer = optim.Adam(climbs, fused=True, capturable=fast)

    def make_buffer(self, capacity: int, env: gym.Env) -> PathReplay:
        """The replay that `train` fills with steps of env."""
        sizes = (capacity, env.observation_space.shape[0], env.action_space.shape[0], self.device)
        return PathReplay(*sizes, self)

    def see(self, obs: Tensor) -> None:
        """One more observation [n], float64, for the normaliser: a dozen small operations a step."""
        self.actor.normalizer.update(obs)

    def act(self, obs: np.ndarray, deterministic: bool = False) -> np.ndarray:
        """obs [n] -> action [m] in [−1, 1]; deterministic is tanh of the Gaussian's mean."""
        obs = torch.as_tensor(np.float32(obs), device=self.device)[None]
        if deterministic:
            return self.policy(obs, True)[0].cpu().numpy()
        action, taken = self.draw(obs)
        self.taken.copy_(taken[0])  # at once: recomputed later, every weight would be 1
        return action[0].cpu().numpy()

    @torch.no_grad()
    def policy(self, obs: Tensor, deterministic: bool) -> Tensor:
        u = self.actor(obs)[0] if deterministic else self.actor.sample(obs)[0]
        return u.tanh()

    @torch.no_grad()
    def draw(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """obs [B, n] -> action [B, m], and u with log π(u|s) [B, m + 1]."""
        u, log_pi = self.actor.sample(obs)
        return u.tanh(), torch.cat([u, log_pi[:, None]], 1)

    def temperature(self) -> Tensor:
        """α as a constant, 0 without --soft."""
        return self.log_alpha.detach().exp() if self.args.soft else torch.zeros((), device=self.device)

    def repeat(self, obs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """(2): the action [B, m] that noise η [B, m] leads to, and −α log π of it [B]."""
        mean, log_std = self.actor(obs)
        u = reproduce(mean, log_std, noise)
        log_prob = gaussian_log_prob(u, mean, log_std) - squash_slope(u)
        return u.tanh(), -self.temperature() * log_prob  # (8)

    def update(self, buffer: PathReplay, step: int) -> dict[str, Tensor]:
        """One gradient step of everything; of the policy, with --whole-episodes, only after an episode."""
        length = max(self.args.horizon, 1)
        places, linked = windows(buffer, buffer.sample(self.args.batch_size), length)
        metrics = self.learn(buffer[places.flatten()], buffer.taken[places.flatten()], linked)
        if not self.args.whole_episodes:
            return metrics
        if buffer.finished is not None:
            began, length = buffer.finished
            places = (began + torch.arange(length, device=self.device)) % buffer.capacity
            linked = torch.ones(length, 1, dtype=torch.bool, device=self.device)
            weight = torch.ones(1, device=self.device)
            found = self.climb(buffer[places], buffer.taken[places], linked, weight)
            self.report.copy_(torch.stack(list(found.values())))
            buffer.finished = None
        names = ["losses/actor_loss", "policy/gradient_norm", "policy/overflow", "losses/kl"]
        return metrics | dict(zip(names, self.report.unbind(), strict=False))

    def critic_loss(self, batch: Batch, bonus: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Scalar, and the values [B] that it draws to their targets."""
        gamma = self.args.gamma
        if self.args.horizon > 0:
            value = self.critic(batch.obs)
            next_value = self.critic_target(batch.next_obs)
            target = td_target(batch.reward + bonus, batch.terminated, next_value, gamma)
            return weighted_value_loss(value, target, weight), value  # (5a)
        with torch.no_grad():
            u, log_pi = self.actor.sample(batch.next_obs)
            next_q, log_prob = self.critic_target(batch.next_obs, u.tanh()), log_pi - squash_slope(u)
            outcome = (batch.reward, batch.terminated)
            target = soft_target(*outcome, next_q, log_prob, self.temperature(), gamma)
        value = self.critic(batch.obs, batch.action)
        return weighted_value_loss(value, target, torch.ones_like(value)), value  # (5b)

    def learn(self, batch: Batch, taken: Tensor, linked: Tensor) -> dict[str, Tensor]:
        """Model and reward, then V or Q, then the policy: k steps of B episodes in k B rows, linked [k, B].

        linked: the step is still of the episode of the window's first; taken [k B, m + 1]: u and log-density.
        """
        args, shape = self.args, linked.shape
        first = Batch(*(x[: shape[1]] for x in batch))
        with torch.no_grad():
            u, log_mu = taken[:, :-1], taken[:, -1].view(shape)
            mean, log_std = self.actor(batch.obs)
            log_pi = gaussian_log_prob(u, mean, log_std)
            bonus = -self.temperature() * (log_pi - squash_slope(u))[: shape[1]]  # (8)
            log_pi = log_pi.view(shape)
            weight = importance_weight(log_pi, log_mu, linked, args.is_clip)  # (4)
            single = importance_weight(log_pi[:1], log_mu[:1], linked[:1], args.is_clip)
        fit_loss, value = self.critic_loss(first, bonus, single)
        metrics = {"losses/qf_loss": fit_loss.detach(), "losses/qf_values": value.detach().mean()}
        if args.horizon > 0:
            change = self.model.change(first.obs, first.next_obs)
            model_loss = -gaussian_log_prob(change, *self.model(first.obs, first.action)).mean()  # (6)
            reward_loss = F.mse_loss(self.reward(first.obs, first.action), first.reward)  # (6)
            fit_loss = fit_loss + model_loss + reward_loss  # of which no two share a parameter
            metrics |= {"model/loss": model_loss.detach(), "model/reward_error": reward_loss.detach().sqrt()}
        self.optimizer.zero_grad()
        fit_loss.backward()
        self.optimizer.step()
        polyak(self.critic_target, self.critic, args.tau)
        if not args.whole_episodes:
            metrics |= self.climb(batch, taken, linked, weight)
        if args.soft:
            metrics["losses/alpha"] = self.log_alpha.detach().exp()
        return metrics | {
            "weights/mean": weight.mean(),
            "weights/effective": weight.sum().square() / weight.square().sum().clamp_min(1e-30) / len(weight),
            "weights/clipped": (weight == args.is_clip).float().mean(),
            "weights/log_ratio": (log_pi - log_mu)[0].mean(),
            "policy/std": log_std.exp().mean(),
            "policy/magnitude": mean.tanh().abs().mean(),
        }

    def climb(self, batch: Batch, taken: Tensor, linked: Tensor, weight: Tensor) -> dict[str, Tensor]:
        """(7): one step of the policy on windows as in `learn`, weight [B]; everything else is constant."""
        args, shape = self.args, linked.shape
        obs, ended = batch.obs.view(*shape, -1), batch.terminated.view(shape)
        with torch.no_grad():
            eta = infer(taken[:, :-1], *self.actor(batch.obs))  # (1)
            xi = torch.zeros_like(batch.obs)
            if args.horizon > 0:
                change = self.model.change(batch.obs, batch.next_obs)
                xi = infer(change, *self.model(batch.obs, batch.action))  # (1)
            if args.imagine:
                eta, xi, weight = torch.randn_like(eta), torch.randn_like(xi), torch.ones_like(weight)
            eta, xi = eta.view(*shape, -1), xi.view(*shape, -1)
        learned = [self.critic, self.model, self.reward] if args.horizon > 0 else [self.critic]
        with constant(nn.ModuleList(learned)):
            if args.horizon > 0:
                parts, record = (self.repeat, self.model.step, self.reward, self.critic), (ended, linked)
                value = window_value(*parts, obs[0], eta, xi, *record, args.gamma)  # (2, 3)
            else:
                action, bonus = self.repeat(obs[0], eta[0])
                value = self.critic(obs[0], action) + bonus
            loss = actor_loss = -(weight * value).mean()
        if args.kl > 0:
            divergence = gaussian_kl(*self.slow_actor(batch.obs), *self.actor(batch.obs)).mean()
            loss = loss + args.kl * divergence  # (7)
        if args.soft:
            u, log_pi = self.actor.sample(batch.obs)
            log_prob = log_pi - squash_slope(u)
            loss = loss + temperature_loss(self.log_alpha, log_prob, self.target_entropy)  # (8)
        self.actor_optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.actor.parameters(), args.gradient_norm)
        report = {"losses/actor_loss": actor_loss.detach(), "policy/gradient_norm": norm}
        if args.whole_episodes:  # products of hundreds of Jacobians can overflow: the gradient is 0 then
            for parameter in self.actor.parameters():
                parameter.grad.nan_to_num_(0, 0, 0)
            whole = actor_loss.detach().isfinite() & norm.isfinite()
            report = {name: torch.where(whole, value, 0.0) for name, value in report.items()}
            report["policy/overflow"] = 1.0 - whole.float()
        self.actor_optimizer.step()
        if args.kl > 0:
            polyak(self.slow_actor, self.actor, args.tau)
            report["losses/kl"] = divergence.detach()
        return report

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
