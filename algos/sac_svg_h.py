"""Soft actor-critic whose actor looks ahead (SAC-SVG(H)), Amos et al. 2021, arXiv 2008.12775.

The critics are sac.py's. The actor no longer climbs Q(s, π(s)) but the value of H steps that a learned model
takes with it: one deterministic recurrent network f, differentiated through states, memory and actions.

    x̂_0 = s,  â_t ~ π(·|x̂_t),  (x̂_{t+1}, h_{t+1}) = f(x̂_t, â_t, h_t),  h_0 = 0                  (3a)
    V = Σ_{t<H} γ^t (m_t r̂_t − α log π_t) + γ^H (m_H min_i Q_i(x̂_H, â_H) − α log π_H)            (3b)
    L_π = −mean V / (H + 1)                                                                      (3c)
    m_t = Π_{i<t} (1 − d̂_i),   r̂_t and d̂_t predicted from (x̂_t, â_t)                            (3d)

H = 0 is sac.py bit for bit (with --no-normalize): (3b, 3c) are then its L_π (3), which the actor also follows
until --expansion-starts. (1), (2) and (5) are its target, critic loss and slow critics, (4) its temperature
loss with a target entropy that may move over the T steps of a run:

    H̄(t) = (H̄_first − H̄_final) (1 − t/T)^β + H̄_final                                            (4a)

f learns on recorded sequences that no episode's end interrupts, from its own predictions but without gradient
through them; x is divided by the running deviation σ. Reward and termination learn on the critics' batches:

    L_f = mean_t ((x̂_{t+1} − x_{t+1}) / σ)²,  x̂_{t+1} = x̂_t + σ dec(GRU(enc(x̂_t, a_t), h_t))     (6)
    L_r = mean (r̂ − r)²,   L_d = binary cross-entropy of d                                       (7)

--value-loss c adds c times the error in what the slow critics think of the predicted states (Byravan et al.
2019 ask that of a latent), with gradient into f alone:

    L_V = mean_t ½ (V̄(x̂_{t+1}) − V̄(x_{t+1}))²,  V̄(x) = min_i Q̄_i(x, tanh μ(x))                  (6a)

--critic-expansion puts the model into the critics' targets instead or as well, as in the paper's ablation:
tdk regresses them at imagined pairs too (8), one-step replaces the target by r + γ (1 − d) V(s') (9).
--preset laptop, paper or released; where those two disagree, and what we chose: docs/sac_svg_h.md.

    python algos/sac_svg_h.py --horizon 2 --env-id HalfCheetah-v5 --total-timesteps 30_000
    python algos/sac_svg_h.py --preset released --env-id Hopper-v5 --total-timesteps 100_000
    python algos/sac_svg_h.py --resume runs/<run>   # goes on where it stopped, in the same bits
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


SIZES = {"batch_size": 512, "actor_lr": 1e-4, "critic_lr": 1e-4, "alpha_lr": 5e-4, "init_alpha": 0.1}
SIZES |= {"hidden": 512, "model_hidden": 512, "encoder_layers": 2, "gru_layers": 2, "decoder_layers": 2}
SIZES |= {"sequence_batch": 1024, "dynamics_updates": 4, "expansion_starts": 10_000}
SIZES |= {"log_std": "tanh", "init": "orthogonal"}
RELEASED = {"batch_size": 1024, "learning_starts": 1024, "alpha_lr": 1e-4, "hidden_layers": 4}
RELEASED |= {"decoder_layers": 0, "sequence_batch": 512, "mask": "released", "balance_terminations": True}
PRESETS = {"laptop": {}, "paper": SIZES, "released": SIZES | RELEASED}  # what differs from the defaults below
SCHEDULES = {  # task: H and (first entropy, final, β) of the paper's table 4 (prints H + 1), of the code
    "poplin/Ant-v0": (2, (1, -4, 0.0625), 2, (1, -3, 0.5)),
    "poplin/Hopper-v0": (2, (1, 1, 1), 2, (1, 0, 32)),
    "poplin/Swimmer-v0": (2, (-2, -16, 16), 2, (-2, -32, 0.125)),
    "poplin/Cheetah-v0": (3, (0, -4, 1), 2, (-1, -4, 1)),
    "poplin/Walker2d-v0": (4, (1, 1, 1), 2, (-2, -16, 0.015625)),
    "pets/Cheetah-v0": (4, (-2, -4, 0.0625), 2, (0, 0, 1)),
    "mbpo/Hopper-v0": (2, (0, -1, 0.5), 2, (0, -2, 0.03125)),
    "mbpo/Walker2d-v0": (2, (-2, -3, 64), 2, (-2, -8, 0.0625)),
    "mbpo/Ant-v0": (2, (2, -4, 1), 2, (0, -2, 4)),
    "mbpo/HalfCheetah-v0": (2, (-2, -2, 1), 2, (-2, -3, 1)),
    "mbpo/Humanoid-v0": (2, (-1, -1, 1), 2, (-2, -2, 1)),
}


@dataclass
class ActorExpansion:
    """Policy improvement through a learned model (paper: Amos et al. 2021, released: its code)."""

    preset: Literal["laptop", "paper", "released"] = "laptop"  # defaults: for two cores, printed, released
    schedule: str = "auto"  # task whose published H, H̄, log σ are defaults; auto: the task's, laptop: none
    horizon: Natural = 2  # model steps H of the actor's value (paper: best are 2 to 4; its code counts H + 1)
    actor_expansion: bool = True  # look ahead in the actor's loss; off, the critics must (Figure 4)
    critic_expansion: Literal["none", "tdk", "one-step"] = "none"  # (8) or (9) in the critics' (Figure 4)
    expansion_starts: Natural = 2_000  # steps before the actor looks ahead; f learns (ours; released: 10 000)
    mask: Literal["exclusive", "released"] = "exclusive"  # m_t of (3d), or that times 1 − d̂_0 once more
    balance_terminations: bool = False  # L_d weighs a batch's ends like the rest, inflating d̂ (released: on)
    final_entropy: Real = None  # H̄ of the last step, --target-entropy of the first; None: constant
    entropy_decay: Rate = 1.0  # exponent β of the entropy's schedule (4a) (published: by task)
    normalize: bool = True  # networks see observations in deviations of all observations so far (released)
    hidden_layers: Annotated[int, (1, 64)] = 2  # hidden layers of actor and critics (paper: 2; released: 4)
    log_std: Literal["clamp", "tanh"] = "clamp"  # bounds of log σ: [−20, 2] as in sac.py, [−5, 2] (paper)
    init: Literal["torch", "orthogonal"] = "torch"  # orthogonal: actor, critics, encoder, decoder (released)
    model_hidden: Width = 200  # units in each layer of dynamics, reward and termination (ours; paper: 512)
    encoder_layers: Natural = 1  # hidden layers before the GRU (ours; paper: 2)
    gru_layers: Annotated[int, (1, 64)] = 1  # GRU layers (ours; paper: 2)
    decoder_layers: Natural = 0  # hidden layers after the GRU (released: 0; paper: 2)
    model_lr: Rate = 1e-3  # Adam step size of dynamics, reward and termination (paper)
    sequence_batch: Count = 256  # sequences of H + 1 steps for an update of f (paper: 1 024; released: 512)
    dynamics_updates: Count = 1  # updates of f per step (ours; paper: 4)
    value_loss: Rate = 0.0  # weight c of (6a) in the loss of f (Byravan et al. 2019, of a latent; ours: off)


@dataclass
class Args(Run, SAC, ActorExpansion):
    """Everything that can be set."""

    def __post_init__(self) -> None:
        check(self)
        allowed = f"auto, none or one of {', '.join(SCHEDULES)}"
        require(self.schedule in ("auto", "none", *SCHEDULES), "schedule", self.schedule, allowed)
        if self.horizon > 0:
            used = self.actor_expansion or self.critic_expansion != "none"
            require(used, "horizon", self.horizon, "0 where neither actor nor critic looks ahead")
            waits = self.actor_expansion or self.critic_expansion == "one-step"
            before = self.expansion_starts < self.total_timesteps or not waits
            total = f"below --total-timesteps {self.total_timesteps} (paper and released set 10 000)"
            require(before, "expansion_starts", self.expansion_starts, total)
        used = self.horizon > 0 or self.critic_expansion == "none"
        require(used, "critic_expansion", self.critic_expansion, "none with --horizon 0")
        used = self.horizon > 0 or self.value_loss == 0
        require(used, "value_loss", self.value_loss, "0 with --horizon 0, where there is no model")
        used = self.entropy_decay == 1 or self.final_entropy is not None
        require(used, "entropy_decay", self.entropy_decay, "1 without --final-entropy")

    @classmethod
    def defaults(cls, given: dict) -> dict:
        """The plain defaults, then those of the preset that is given, then the task's schedule."""
        values, task = dataclasses.asdict(cls()) | PRESETS[given["preset"]], given["schedule"]
        if task == "auto":
            task = "none" if given["preset"] == "laptop" else given["env_id"].rpartition(":")[2]
        if task in SCHEDULES:
            names = ("horizon", "target_entropy", "final_entropy", "entropy_decay")
            horizon, entropies = SCHEDULES[task][2 * (given["preset"] == "released") :][:2]
            values |= zip(names, (horizon, *map(float, entropies)), strict=True)
            values["log_std"] = "tanh"  # as released
        return values


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


class DeepActor(Actor):
    """Actor of any depth on normalised observations; log σ clamped, or with `bounded` in [−5, 2] by tanh."""

    def __init__(self, normalizer: Normalizer, sizes: list[int], bounded: bool):
        nn.Module.__init__(self)
        self.normalizer, self.bounded = normalizer, bounded
        self.layers = nn.ModuleList(nn.Linear(*size) for size in pairwise(sizes))

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """obs [B, n] -> mean and log σ before the squash, each [B, m]."""
        x = self.normalizer(obs)
        for layer in self.layers[:-1]:
            x = layer(x).relu_()
        mean, log_std = self.layers[-1](x).chunk(2, 1)
        return mean, 3.5 * (log_std.tanh() + 1) - 5 if self.bounded else log_std.clamp(-20, 2)


class DeepCritic(Critic):
    """Two numbers per (s, a): the twin critics' values, or the reward and the logit of the termination."""

    def __init__(self, normalizer: Normalizer, sizes: list[int]):
        nn.Module.__init__(self)
        self.normalizer = normalizer
        self.layers = nn.ModuleList(StackedLinear(2, *size) for size in pairwise(sizes))

    def forward(self, obs: Tensor, action: Tensor, frozen: bool = False) -> Tensor:
        return super().forward(self.normalizer(obs), action, frozen)


class GRULayer(nn.GRUCell):
    """nn.GRUCell; without a memory, which is one of zeros, half of its products need not be computed."""

    def forward(self, x: Tensor, memory: Tensor | None) -> Tensor:
        """x [B, w], memory [B, w] -> next memory [B, w]."""
        width = self.hidden_size
        gates, candidate = F.linear(x, self.weight_ih, self.bias_ih).split((2 * width, width), 1)
        if memory is None:
            gates, recalled = gates + self.bias_hh[: 2 * width], self.bias_hh[2 * width :]
        else:
            recalled = F.linear(memory, self.weight_hh, self.bias_hh)
            gates, recalled = gates + recalled[:, : 2 * width], recalled[:, 2 * width :]
        reset, keep = gates.sigmoid().chunk(2, 1)
        candidate = torch.addcmul(candidate, reset, recalled).tanh()
        return candidate - keep * candidate if memory is None else torch.lerp(candidate, memory, keep)


class Dynamics(nn.Module):
    """x̂' = x̂ + σ · decoder(GRU(encoder(x̂, a))): one deterministic network, states in the task's units."""

    def __init__(self, normalizer: Normalizer, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.normalizer, width = normalizer, args.model_hidden
        self.encoder = mlp([obs_dim + action_dim, *[width] * args.encoder_layers, width])
        self.memory = nn.ModuleList(GRULayer(width, width) for _ in range(args.gru_layers))
        self.decoder = mlp([width, *[width] * args.decoder_layers, obs_dim])

    def step(
        self, obs: Tensor, action: Tensor, memory: list[Tensor] | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """obs [B, n], action [B, m] and the memory so far (None at the start) -> next obs [B, n], memory."""
        x, kept = self.encoder(torch.cat([self.normalizer(obs), action], 1)), []
        for layer, before in zip(self.memory, memory or [None] * len(self.memory), strict=True):
            x = layer(x, before)
            kept.append(x)
        return obs + self.normalizer.std * self.decoder(x), kept


def mlp(sizes: list[int]) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    layers = [part for size in pairwise(sizes) for part in (nn.Linear(*size), nn.ReLU(inplace=True))]
    return nn.Sequential(*layers[:-1])


@torch.no_grad()
def orthogonal(*modules: nn.Module) -> None:
    """Orthogonal matrices of gain 1 and zero biases, layer by layer and member by member."""
    for module in modules:
        for layer in module.modules():
            if isinstance(layer, nn.Linear | StackedLinear):
                for matrix in layer.weight if isinstance(layer, StackedLinear) else [layer.weight]:
                    nn.init.orthogonal_(matrix)
                layer.bias.zero_()


@contextlib.contextmanager
def constant(module: nn.Module):
    """What is computed inside has no gradient with respect to the module's weights, only through it."""
    try:
        module.requires_grad_(False)
        yield
    finally:
        module.requires_grad_(True)


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


def scheduled_entropy(first: float, final: float, decay: float, progress: float) -> float:
    """(4a): the target entropy after `progress` = t/T in [0, 1] of the run, nats."""
    return (first - final) * (1 - progress) ** decay + final


def survival(done: list[Tensor], released: bool) -> list[Tensor]:
    """(3d): m_0 .. m_H from the probabilities d̂_0 .. d̂_{H−1} [B]; the released code has 1 − d̂_0 once more."""
    alive = [1 - done[0] if released else torch.ones_like(done[0])]
    for probability in done:
        alive.append(alive[-1] * (1 - probability))
    return alive


def expanded_value(
    reward: list[Tensor], alive: list[Tensor], log_prob: list[Tensor], q: Tensor, alpha: Tensor, gamma: float
) -> Tensor:
    """(3b), summed backwards: H rewards, H + 1 survivals and log π, min_i Q_i at the end, all [B] -> [B]."""
    assert len(reward) == len(alive) - 1 == len(log_prob) - 1 and q.shape == alive[-1].shape
    value = alive[-1] * q - alpha * log_prob[-1]
    for r, m, entropy in zip(reward[::-1], alive[-2::-1], log_prob[-2::-1], strict=True):
        value = m * r - alpha * entropy + gamma * value
    return value


def tdk_targets(
    reward: list[Tensor], alive: list[Tensor], log_prob: list[Tensor], q: Tensor, alpha: Tensor, gamma: float
) -> tuple[Tensor, Tensor]:
    """(8): y_k = a_k (ρ_k − γ α a_{k+1} log π_k + γ y_{k+1}), y_K = a_K Q̄, and weights w_k = Π_{i≤k} a_i.

    reward ρ_0 .. ρ_{K−1}, the first observed; alive a_0 .. a_K; log_prob of the next actions; q: all [B].
    Returns targets and weights of the K pairs, [K, B] each.
    """
    assert len(reward) == len(log_prob) == len(alive) - 1 and q.shape == reward[0].shape
    y, targets = alive[-1] * q, []
    for r, a, after, entropy in zip(reward[::-1], alive[-2::-1], alive[:0:-1], log_prob[::-1], strict=True):
        y = a * (r - gamma * alpha * after * entropy + gamma * y)
        targets.append(y)
    return torch.stack(targets[::-1]), torch.stack(alive[:-1]).cumprod(0)


def weighted_twin_loss(q: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """(8): weighted squared error, mean over pairs, sum over critics: q [2, K, B], the others [K, B]."""
    assert q.shape[1:] == target.shape == weight.shape
    return (weight * (q - target).square()).mean((1, 2)).sum()


def termination_loss(logit: Tensor, terminated: Tensor, balanced: bool) -> Tensor:
    """(7): binary cross-entropy, [B] -> scalar; balanced: n > 0 terminations weigh (B − n) / n each."""
    assert logit.shape == terminated.shape
    ended = terminated.sum()
    weight = torch.where(ended > 0, (len(terminated) - ended) / ended.clamp_min(1), 1) if balanced else None
    return F.binary_cross_entropy_with_logits(logit, terminated, pos_weight=weight)


def sequence_errors(model: Dynamics, obs: Tensor, action: Tensor, kept: list[Tensor] | None = None) -> Tensor:
    """(6) per step: squared error, in deviations, of x̂_1 .. x̂_H against obs [H + 1, S, n] -> [H, S].

    Each prediction starts from the one before as a number; the gradient through time is the memory's alone.
    `kept` gets the predictions, [S, n] each.
    """
    predicted, memory, errors = obs[0], None, []
    for actions, target in zip(action[:-1], obs[1:], strict=True):
        predicted, memory = model.step(predicted.detach(), actions, memory)
        errors.append(((predicted - target) / model.normalizer.std).square().mean(1))
        if kept is not None:
            kept.append(predicted)
    return torch.stack(errors)


def value_errors(predicted: Tensor, real: Tensor) -> Tensor:
    """(6a) per state: ½ (V̄(x̂) − V̄(x))², of one shape."""
    assert predicted.shape == real.shape
    return 0.5 * (predicted - real).square()


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


class ObservingReplay(ReplayBuffer):
    """A replay that shows its agent every observation stepped from, whether the ring keeps it or not."""

    def __init__(self, agent, *sizes):
        super().__init__(*sizes)
        self.agent = agent

    def add(self, obs, *rest) -> None:
        self.agent.see(torch.as_tensor(obs, dtype=torch.float64, device=self.agent.device))
        super().add(obs, *rest)


def windows(buffer: ReplayBuffer, first: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Places [length, B] from `first` [B] on, and whether each holds a step of the episode of `first`."""
    k = torch.arange(length, device=first.device)[:, None]
    places, age = (first + k) % buffer.size, (first - buffer.added) % buffer.size  # age 0 is the oldest
    return places, (age + k < buffer.size) & (buffer.episode[places] == buffer.episode[first])


def sequences(buffer: ReplayBuffer, length: int, wanted: int) -> tuple[Tensor, Tensor]:
    """Places [length, wanted] of random windows in which no step ends an episode, and weights [wanted].

    Uniform over all such windows, by rejection among four times as many; should too few be left, the rest
    weighs 0 in the loss. Whether the newest transition was cut off by a time limit is known one step later.
    """
    places, inside = windows(buffer, buffer.sample(4 * wanted), length + 1)
    newest = (places[-1] == buffer.added % buffer.size) & (buffer.rows[places[-2], -1] == 0)
    whole = inside[-1] | (inside[-2] & newest)
    order = (~whole).to(torch.uint8).argsort(stable=True)[:wanted]
    return places[:-1, order], whole[order].float()


class Rollout(NamedTuple):
    """H imagined steps for B states; each list holds one tensor per step, the first three also the end's."""

    obs: list[Tensor]  # H + 1 of [B, n]
    action: list[Tensor]  # H + 1 of [B, m]
    log_prob: list[Tensor]  # H + 1 of [B]
    reward: list[Tensor]  # H of [B]
    done: list[Tensor]  # H of [B], 0 or 1, or the probability of 1


class Agent:
    """Soft actor-critic whose actor climbs the value of H steps through a learned model."""

    captured = ("policy", "see", "learn", "fit_dynamics")  # tensors in, tensors out: CUDA graphs

    def __init__(self, args: Args, obs_dim: int, action_dim: int, device: torch.device):
        self.args, self.sizes, self.device, fast = args, (obs_dim, action_dim), device, device.type == "cuda"
        self.target_entropy = -float(action_dim) if args.target_entropy is None else args.target_entropy
        normalizer, hidden = Normalizer(obs_dim, args.normalize), [args.hidden] * args.hidden_layers
        actor_sizes, critic_sizes = [obs_dim, *hidden, 2 * action_dim], [obs_dim + action_dim, *hidden, 1]
        self.actor = DeepActor(normalizer, actor_sizes, args.log_std == "tanh").to(device)
        self.critic = DeepCritic(normalizer, critic_sizes).to(device)
        self.critic_target = DeepCritic(normalizer, critic_sizes).to(device).requires_grad_(False)
        if args.init == "orthogonal":
            orthogonal(self.actor, self.critic)
        self.critic_target.load_state_dict(self.critic.state_dict())
        self.log_alpha = torch.tensor(math.log(args.init_alpha), device=device, requires_grad=True)
        groups = [
            {"params": list(self.actor.parameters()), "lr": args.actor_lr},
            {"params": list(self.critic.parameters()), "lr": args.critic_lr},
            {"params": [self.log_alpha], "lr": args.alpha_lr},
        ]  # Adam works elementwise: one for all is faster
        if args.horizon > 0:
            self.model = Dynamics(normalizer, obs_dim, action_dim, args).to(device)
            if args.init == "orthogonal":
                orthogonal(self.model.encoder, self.model.decoder)
            parameters = self.model.parameters()
            self.model_optimizer = optim.Adam(parameters, lr=args.model_lr, fused=True, capturable=fast)
            widths = [obs_dim + action_dim, args.model_hidden, args.model_hidden, 1]
            self.outcome = DeepCritic(normalizer, widths).to(device)
            groups.append({"params": list(self.outcome.parameters()), "lr": args.model_lr})
        self.optimizer = optim.Adam(groups, fused=True, capturable=fast)

    def make_buffer(self, capacity: int, env: gym.Env) -> ReplayBuffer:
        """The replay that `train` fills with steps of env; the normaliser sees each first."""
        sizes = (capacity, env.observation_space.shape[0], env.action_space.shape[0], self.device)
        return ObservingReplay(self, *sizes) if self.args.normalize else ReplayBuffer(*sizes)

    def see(self, obs: Tensor) -> None:
        """One more observation [n], float64, for the normaliser: a dozen small operations a step."""
        self.actor.normalizer.update(obs)

    def act(self, obs: np.ndarray, deterministic: bool = False) -> np.ndarray:
        """obs [n] -> action [m] in [−1, 1]; deterministic is tanh of the Gaussian's mean."""
        obs = torch.as_tensor(np.float32(obs), device=self.device)
        return self.policy(obs[None], deterministic)[0].cpu().numpy()

    @torch.no_grad()
    def policy(self, obs: Tensor, deterministic: bool) -> Tensor:
        mean, log_std = self.actor(obs)
        u = mean if deterministic else mean + log_std.exp() * torch.randn_like(mean)
        return u.tanh()

    def unroll(self, obs: Tensor) -> Rollout:
        """(3a): H steps of policy and model from obs [B, n]; differentiable, the model's weights constant."""
        action, log_prob = self.actor.sample(obs)
        rollout, memory = Rollout([obs], [action], [log_prob], [], []), None
        with constant(self.model):
            for _ in range(self.args.horizon):
                reward, logit = self.outcome(obs, action, frozen=True)
                rollout.reward.append(reward)
                rollout.done.append(logit.sigmoid())
                obs, memory = self.model.step(obs, action, memory)
                action, log_prob = self.actor.sample(obs)
                for values, value in zip(rollout[:3], (obs, action, log_prob), strict=True):
                    values.append(value)
        return rollout

    def look_ahead(self, rollout: Rollout, critic: DeepCritic, alpha: Tensor) -> Tensor:
        """(3b, 3d): the value V [B] of the rollout's first observations."""
        q = critic(rollout.obs[-1], rollout.action[-1], frozen=True).amin(0)
        alive = survival(rollout.done, self.args.mask == "released")
        return expanded_value(rollout.reward, alive, rollout.log_prob, q, alpha, self.args.gamma)

    def update(self, buffer: ReplayBuffer, step: int) -> dict[str, Tensor]:
        """One gradient step of the agent after those of the dynamics. Metrics stay tensors."""
        args, entropy = self.args, self.target_entropy
        metrics = self.update_dynamics(buffer) if args.horizon > 0 else {}
        if args.final_entropy is not None:
            progress = step / args.total_timesteps
            entropy = scheduled_entropy(entropy, args.final_entropy, args.entropy_decay, progress)  # (4a)
        entropy = torch.full((), entropy, device=self.device)
        looks = args.horizon > 0 and step > args.expansion_starts
        learned = self.learn(buffer[buffer.sample(args.batch_size)], entropy, looks)
        return metrics | learned | {"losses/target_entropy": entropy}

    def critic_loss(self, batch: Batch, alpha: Tensor, looks: bool) -> tuple[Tensor, Tensor]:
        """Scalar, and the values q [2, B] at replayed pairs that it draws to their targets."""
        gamma, expansion = self.args.gamma, self.args.critic_expansion
        if self.args.horizon > 0 and expansion == "tdk":
            return self.tdk_loss(batch, alpha)  # (8)
        with torch.no_grad():
            if looks and expansion == "one-step":
                next_value = self.look_ahead(self.unroll(batch.next_obs), self.critic_target, alpha)
                target = batch.reward + gamma * (1 - batch.terminated) * next_value  # (9)
            else:
                next_action, next_log_prob = self.actor.sample(batch.next_obs)
                next_q = self.critic_target(batch.next_obs, next_action).amin(0)
                real = (batch.reward, batch.terminated)
                target = soft_target(*real, next_q, next_log_prob, alpha, gamma)  # (1)
        q = self.critic(batch.obs, batch.action)
        return twin_loss(q, target), q  # (2)

    def tdk_loss(self, batch: Batch, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """(8): the critics' loss at replayed and imagined pairs, and their values at the former [2, B]."""
        with torch.no_grad():
            rollout = self.unroll(batch.next_obs)
            next_q = self.critic_target(rollout.obs[-1], rollout.action[-1]).amin(0)
            done = rollout.done
            if self.args.mask == "released":  # every factor one step late
                done = [*done[1:], self.outcome(rollout.obs[-1], rollout.action[-1])[1].sigmoid()]
            alive = [torch.ones_like(next_q), 1 - batch.terminated, *(1 - d for d in done)]
            rewards = [batch.reward, *rollout.reward]
            target, weight = tdk_targets(rewards, alive, rollout.log_prob, next_q, alpha, self.args.gamma)
        obs = torch.cat([batch.obs, *rollout.obs[:-1]])
        q = self.critic(obs, torch.cat([batch.action, *rollout.action[:-1]])).view(2, *target.shape)
        return weighted_twin_loss(q, target, weight), q[:, 0]

    def learn(self, batch: Batch, target_entropy: Tensor, looks: bool) -> dict[str, Tensor]:
        """One gradient step of everything but the dynamics; looks: --expansion-starts is over."""
        args, metrics, alpha = self.args, {}, self.log_alpha.detach().exp()
        critic_loss, q = self.critic_loss(batch, alpha, looks)
        if looks and args.actor_expansion:
            rollout = self.unroll(batch.obs)  # (3a)
            value, log_prob = self.look_ahead(rollout, self.critic, alpha), rollout.log_prob[0]  # (3b, 3d)
            actor_loss = -value.mean() / (args.horizon + 1)  # (3c)
            metrics["expansion/value"] = value.detach().mean()
            metrics["expansion/alive"] = (1 - torch.stack(rollout.done).detach()).prod(0).mean()
        else:
            action, log_prob = self.actor.sample(batch.obs)
            actor_loss = soft_actor_loss(self.critic(batch.obs, action, frozen=True), log_prob, alpha)  # (3)
        alpha_loss = temperature_loss(self.log_alpha, log_prob, target_entropy)  # (4)
        loss = critic_loss + actor_loss + alpha_loss
        if args.horizon > 0:
            reward, logit = self.outcome(batch.obs, batch.action)
            reward_loss = F.mse_loss(reward, batch.reward)  # (7)
            ended_loss = termination_loss(logit, batch.terminated, args.balance_terminations)  # (7)
            loss = loss + reward_loss + ended_loss
            metrics["model/reward_error"] = reward_loss.detach().sqrt()
            metrics["model/termination_loss"] = ended_loss.detach()

        self.optimizer.zero_grad()
        loss.backward()  # no parameter is in two of its terms
        self.optimizer.step()
        polyak(self.critic_target, self.critic, args.tau)  # (5)
        return metrics | {
            "losses/qf_loss": critic_loss.detach(),
            "losses/qf_values": q.detach().mean(),
            "losses/actor_loss": actor_loss.detach(),
            "losses/alpha_loss": alpha_loss.detach(),
            "losses/alpha": alpha,
            "losses/entropy": -log_prob.detach().mean(),
        }

    def update_dynamics(self, buffer: ReplayBuffer) -> dict[str, Tensor]:
        """The gradient steps of the dynamics for this environment step."""
        args = self.args
        for _ in range(args.dynamics_updates):
            places, weight = sequences(buffer, args.horizon + 1, args.sequence_batch)
            window, stack = buffer[places.flatten()], (*places.shape, -1)
            metrics = self.fit_dynamics(window.obs.view(stack), window.action.view(stack), weight)
        return metrics

    def slow_value(self, obs: Tensor) -> Tensor:
        """V̄ [B] of obs [B, n], by the slow critics at the policy's deterministic action; draws nothing."""
        with constant(self.actor):
            return self.critic_target(obs, self.actor(obs)[0].tanh(), frozen=True).amin(0)

    def fit_dynamics(self, obs: Tensor, action: Tensor, weight: Tensor) -> dict[str, Tensor]:
        """One gradient step on sequences: obs [H + 1, S, n], action [H + 1, S, m], weight [S]."""
        kept, coefficient = [], self.args.value_loss
        errors = sequence_errors(self.model, obs, action, kept)
        errors = (errors * weight).sum(1) / weight.sum().clamp_min(1)
        loss = errors.mean()  # (6)
        metrics = {f"model/error_{k + 1}": error.detach().sqrt() for k, error in enumerate(errors)}
        if coefficient > 0:
            apart = value_errors(*map(self.slow_value, (torch.cat(kept), obs[1:].flatten(0, 1))))
            apart = (apart.view(len(kept), -1) * weight).sum(1).mean() / weight.sum().clamp_min(1)
            loss = loss + coefficient * apart  # (6a)
            metrics["model/value_error"] = (2 * apart.detach()).sqrt()
        self.model_optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.model_optimizer.step()
        return metrics | {"model/gradient_norm": norm}

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
