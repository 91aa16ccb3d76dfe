"""Dreamer on state vectors, Hafner et al. 2019, arXiv 1912.01603 (V1), 2010.02193 (V2), 2301.04104 (V3).

A recurrent model with a random state (RSSM) learns to reconstruct what is observed; actor and critic live in
its imagination alone. Both look ahead: the actor climbs λ-returns through the model, the critic regresses on
them. What was seen before is in the state, so that velocities, say, may be hidden.

    h_t = GRU(h_{t−1}, φ(z_{t−1}, a_{t−1})),   h = z = a = 0 before an episode or a window begins     (1a)
    p = N(μ(h_t), σ(h_t)²),   q = N(μ(h_t, e(o_t)), σ(..)²),   z ~ q,   f_t = (h_t, z_t)              (1b)
    L_m = mean ½ ‖o − dec(f)‖² + ½ (r − r̂(f))² + cross-entropy(d, d̂(f)) + L_KL                       (2)
    L_KL = β_p mean max(KL(sg q ‖ p), n) + β_q mean max(KL(q ‖ sg p), n),   sg: constant               (3)
    a_k ~ π(sg f_k),   f_{k+1} ~ p(·|f_k, a_k),   k < H, from every f_t of the batch                   (4)
    R_k = r̂_{k+1} + γ ĉ_{k+1} ((1 − λ) v̄_{k+1} + λ R_{k+1}),   R_H = v̄_H,   ĉ = 1 − d̂              (5)
    L_π = −mean w_k (R_k / S + η H[π(f_k)]),   w_k = (1 − d) Π_{1≤j≤k} γ ĉ_j, a constant               (6)
    L_v = mean w_k ½ (v(f_k) − sg R_k)²,   v̄ ← v̄ + τ (v − v̄)                                        (7)

Reward and termination belong to the state *reached*: r_{t−1} and d are read from f_t, r̂_{k+1} from f_{k+1}.
o is standardised and then symlog'ed; S ≥ 1 is the spread P95 − P5 of the returns R, averaged. In (4) the
policy takes f_k as a constant, as V1's and V2's code does: how later actions would react is no part of the
gradient; --no-cut is the whole one. --actor-gradient reinforce is V3's, which uses no gradient of the model:
−mean w_k (sg((R_k − v̄_k) / S) log π(a_k|f_k) + η H). All losses take the weights before the update.

The papers' Dreamer sees pixels; V2 and V3 have settings for state vectors, with categorical z where ours is
Gaussian as in V1. What is whose, and what each of V3's tricks does on states: docs/dreamer.md.

    python algos/dreamer.py                         # InvertedPendulum-v5, 10 000 steps
    python algos/dreamer.py --env-id experiments.tasks:masked/InvertedPendulum-v0   # no velocities
    python algos/dreamer.py --resume runs/<run>     # goes on where it stopped and ends in the same bits
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


LARGE = {"batch_size": 800, "sequence_length": 50, "learn_every": 5, "hidden": 400, "hidden_layers": 3}
LARGE |= {"deter": 200, "stoch": 32, "horizon": 15}  # the sizes of V1's and V2's code
DREAMER_PRESETS = {"laptop": {}, "large": LARGE}  # what differs from the defaults below
METRICS = """model/loss model/obs_error model/reward_error model/termination_loss model/kl model/gradient_norm
    losses/qf_loss losses/qf_values losses/actor_loss losses/entropy expansion/return expansion/return_spread
    expansion/alive""".split()


@dataclass
class Dreamer:
    """World model, imagination, actor and critic (V1, V2, V3: the authors' code for each paper)."""

    preset: Literal["laptop", "large"] = "laptop"  # large: the sizes of V1 and V2; any flag overrides them
    sequence_length: Annotated[int, (2, math.inf)] = 32  # L, steps of a window (ours; V2: 50, V3: 64)
    learn_every: Count = 2  # environment steps per update (ours; V2: 5)
    pretrain: Count = 100  # updates right after the warm-up (V1, V2)
    hidden: Width = 64  # units in each hidden layer (ours; V1, V2: 400)
    hidden_layers: Annotated[int, (1, 64)] = 2  # of encoder, decoder, actor, critic (ours; V1, V2: 2 to 4)
    deter: Width = 64  # width of h (ours; V1, V2: 200)
    stoch: Width = 8  # width of z (ours; V1: 30)
    latent_std: Literal["sigmoid", "softplus"] = "sigmoid"  # σ of p, q: 2 sigmoid(x/2) or softplus(x), + 0.1
    normalize: bool = True  # observations in deviations of all observations so far (ours)
    symlog: bool = True  # and then sign(x) log(1 + |x|) of them (V3)
    free_nats: Rate = 1.0  # n of (3), below which the KL is left alone (V2, V3; V1: 3)
    kl_floor: Literal["state", "mean"] = "state"  # n bounds each state's KL (V3), or their mean (V1, V2)
    prior_weight: Rate = 0.5  # β_p of (3) (V3 of 2023, now 1; V2: 0.8, V1: 1)
    posterior_weight: Rate = 0.1  # β_q of (3) (V3; V2: 0.2, V1: 1)
    model_lr: Rate = 6e-4  # Adam step size of the model (V1)
    horizon: Natural = 10  # H, imagined steps (ours; V1 to V3: 15)
    gamma: Fraction = 0.99  # discount factor γ (V1, V2)
    return_lambda: Fraction = 0.95  # λ of (5) (V1 to V3)
    actor_gradient: Literal["pathwise", "reinforce"] = "pathwise"  # of R, through the model, or V3's
    cut: bool = True  # the policy takes f_k as a constant in (4) (V1, V2)
    normalize_returns: bool = True  # divide R by its spread S in (6) (V3)
    entropy_weight: Rate = 3e-4  # η of (6), nats of the [−1, 1] action (V3)
    first_std: Annotated[float, (1e-3, 100)] = 1.0  # σ of the policy, before the tanh (ours; V1: 5)
    min_std: Rate = 0.05  # added to softplus(x + offset): its least (ours; V1: 1e-4)
    actor_lr: Rate = 3e-4  # Adam step size of the actor (ours; V1, V2: 8e-5)
    critic_lr: Rate = 1e-3  # Adam step size of the critic (ours; V1, V2: 8e-5)
    critic_loss: Literal["squared", "two-hot"] = "squared"  # (7), or V3's cross-entropy over 255 values
    tau: Fraction = 0.05  # Polyak step τ of the slow critic (ours; V3: 0.02)
    gradient_norm: Rate = 100.0  # bound of the gradients of model, actor and critic, each (V1, V2)


@dataclass
class Args(Run, Dreamer):
    """Everything that can be set."""

    def __post_init__(self) -> None:
        check(self)
        require(self.horizon > 0, "horizon", self.horizon, "at least 1: Dreamer has no model-free parent")
        fits = self.batch_size % self.sequence_length == 0
        allowed = f"a multiple of --sequence-length {self.sequence_length}: transitions of whole windows"
        require(fits, "batch_size", self.batch_size, allowed)
        pathwise = self.actor_gradient == "pathwise"
        require(self.cut or pathwise, "actor_gradient", self.actor_gradient, "pathwise with --no-cut")

    @classmethod
    def defaults(cls, given: dict) -> dict:
        """The plain defaults, then those of the preset that is given."""
        return dataclasses.asdict(cls()) | DREAMER_PRESETS[given["preset"]]


def symlog(x: Tensor) -> Tensor:
    """sign(x) log(1 + |x|): the identity near 0, a logarithm far from it (V3)."""
    return x.sign() * x.abs().log1p()


def symexp(x: Tensor) -> Tensor:
    """The inverse of symlog."""
    return x.sign() * x.abs().expm1()


def normed_mlp(sizes: list[int]) -> nn.Sequential:
    """Linear, LayerNorm and SiLU for each hidden width, and a linear layer at the end (V3)."""
    parts = []
    for size in pairwise(sizes[:-1]):
        parts += [nn.Linear(*size, bias=False), nn.LayerNorm(size[1]), nn.SiLU()]
    return nn.Sequential(*parts, nn.Linear(*sizes[-2:]))


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


class Gaussians(NamedTuple):
    """Independent normal distributions: mean and deviation of one shape."""

    mean: Tensor
    std: Tensor


class WorldModel(nn.Module):
    """RSSM, decoder, reward and termination, on states f = (h, z) [.., D + Z]."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        width, deep = args.hidden, [args.hidden] * args.hidden_layers
        self.widths, self.latent_std, self.symlog = (args.deter, args.stoch), args.latent_std, args.symlog
        self.normalizer = Normalizer(obs_dim, args.normalize)
        self.encoder = normed_mlp([obs_dim, *deep, width])
        self.of_latent = nn.Linear(args.stoch, width, bias=False)  # φ takes z and a apart: the products with
        self.of_action = nn.Linear(action_dim, width)  # all actions, as with all observations, are one
        self.push = nn.Sequential(nn.LayerNorm(width), nn.SiLU())
        self.memory = GRULayer(width, args.deter)
        self.guess = normed_mlp([args.deter, width, 2 * args.stoch])
        self.of_memory = nn.Linear(args.deter, width, bias=False)
        self.correction = nn.Sequential(nn.LayerNorm(width), nn.SiLU(), nn.Linear(width, 2 * args.stoch))
        feature = args.deter + args.stoch
        self.decoder = normed_mlp([feature, *deep, obs_dim])
        self.reward = normed_mlp([feature, width, 1])
        self.termination = normed_mlp([feature, width, 1])

    def see(self, obs: Tensor) -> Tensor:
        """Observations as the model takes and predicts them: standardised, then symlog'ed."""
        obs = self.normalizer(obs)
        return symlog(obs) if self.symlog else obs

    def embed(self, obs: Tensor) -> Tensor:
        """Observations [.., n] -> what (1b) adds to the memory's product [.., W]."""
        return self.encoder(self.see(obs))

    def recall(self, h: Tensor, z: Tensor, pushed: Tensor) -> Tensor:
        """h, z [B, ..] and of_action of the action [B, W] -> next h."""
        return self.memory(self.push(torch.addmm(pushed, z, self.of_latent.weight.t())), h)  # (1a)

    def gaussians(self, x: Tensor) -> Gaussians:
        mean, std = x.chunk(2, -1)
        return Gaussians(mean, latent_deviation(std, self.latent_std))

    def prior(self, h: Tensor) -> Gaussians:
        """p of (1b), for h of any leading shape."""
        return self.gaussians(self.guess(h))  # (1b)

    def posterior(self, h: Tensor, embedded: Tensor) -> Gaussians:
        """q of (1b): h [B, D], embedded [B, W]."""
        return self.gaussians(self.correction(torch.addmm(embedded, h, self.of_memory.weight.t())))

    def observe(self, obs: Tensor, action: Tensor, first: Tensor) -> tuple[Tensor, Gaussians]:
        """(1) along recorded windows: obs [L, B, n], the actions before them [L, B, m], first [L, B] ->
        features [L, B, D + Z] and posteriors [L, B, Z].
        """
        keep = (1 - first)[..., None]
        noise = torch.randn(*first.shape, self.widths[1], device=obs.device)
        pushed, embedded = self.of_action(action * keep), self.embed(obs)
        h, z = (torch.zeros(first.shape[1], width, device=obs.device) for width in self.widths)
        memories, latents, means, stds = [], [], [], []
        for step in zip(*(x.unbind(0) for x in (keep, noise, pushed, embedded)), strict=True):
            kept, eps, push, seen = step
            h = self.recall(h * kept, z * kept, push)
            mean, std = self.posterior(h, seen)
            z = torch.addcmul(mean, std, eps)
            for values, value in zip((memories, latents, means, stds), (h, z, mean, std), strict=True):
                values.append(value)
        features = torch.cat([torch.stack(memories), torch.stack(latents)], 2)
        return features, Gaussians(torch.stack(means), torch.stack(stds))

    def step(self, feature: Tensor, action: Tensor, noise: Tensor) -> Tensor:
        """One step of (4): f [B, D + Z], action [B, m], noise [B, Z] -> next f."""
        h, z = feature.split(self.widths, 1)
        h = self.recall(h, z, self.of_action(action))
        mean, std = self.prior(h)
        return torch.cat([h, torch.addcmul(mean, std, noise)], 1)

    def outcome(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        """f [.., D + Z] -> reward of the step that led there, and logit of the termination there [..]."""
        return self.reward(feature).squeeze(-1), self.termination(feature).squeeze(-1)


class LatentActor(nn.Module):
    """Gaussian squashed by tanh into [−1, 1]; its mean is within ±5 before that (V1)."""

    def __init__(self, feature: int, action_dim: int, args: Args):
        super().__init__()
        self.first_std, self.min_std = args.first_std, args.min_std
        self.layers = normed_mlp([feature, *[args.hidden] * args.hidden_layers, 2 * action_dim])

    def forward(self, feature: Tensor) -> Gaussians:
        """f [B, D + Z] -> mean and deviation before the squash, each [B, m]."""
        mean, std = self.layers(feature).chunk(2, -1)
        return Gaussians(5 * (mean / 5).tanh(), policy_deviation(std, self.first_std, self.min_std))


class LatentCritic(nn.Module):
    """v(f), or with `two_hot` the logits of a distribution over 255 values whose mean it is (V3)."""

    def __init__(self, feature: int, args: Args):
        super().__init__()
        self.two_hot = args.critic_loss == "two-hot"
        self.register_buffer("values", symexp(torch.linspace(-20, 20, 255)), persistent=False)
        self.layers = normed_mlp([feature, *[args.hidden] * args.hidden_layers, 255 if self.two_hot else 1])
        nn.init.zeros_(self.layers[-1].weight)  # v = 0 at the start: values reach 5e8 (V3)
        nn.init.zeros_(self.layers[-1].bias)

    def value(self, out: Tensor) -> Tensor:
        """What `layers` gives [.., 1 or 255] -> v [..]."""
        return expectation(out.softmax(-1), self.values) if self.two_hot else out.squeeze(-1)

    def forward(self, feature: Tensor) -> Tensor:
        return self.value(self.layers(feature))

    def error(self, out: Tensor, target: Tensor) -> Tensor:
        """What `layers` gives [.., 1 or 255] against constants [..] -> [..], (7)."""
        if self.two_hot:
            return -(two_hot(target, self.values) * out.log_softmax(-1)).sum(-1)
        assert out.shape[:-1] == target.shape
        return 0.5 * (out.squeeze(-1) - target).square()


def latent_deviation(x: Tensor, kind: str) -> Tensor:
    """σ of a latent: within (0.1, 2.1) (V2), or softplus (V1)."""
    return 0.1 + (2 * torch.sigmoid(x / 2) if kind == "sigmoid" else F.softplus(x))


def policy_deviation(x: Tensor, init: float, least: float) -> Tensor:
    """softplus, shifted so that 0 gives `init`, and `least` on top of it (V1)."""
    return F.softplus(x + math.log(math.expm1(init))) + least


def latent_kl(q: Gaussians, p: Gaussians) -> Tensor:
    """KL(q ‖ p), summed over the latents: [.., Z] each -> [..]."""
    assert q.mean.shape == p.mean.shape == q.std.shape
    scaled = ((q.std.square() + (q.mean - p.mean).square()) / p.std.square()).sub(1)
    return (0.5 * scaled + p.std.log() - q.std.log()).sum(-1)


def balanced_kl(
    q: Gaussians, p: Gaussians, prior_weight: float, posterior_weight: float, free: float, floor: str
) -> Tensor:
    """(3): scalar. No gradient where a KL, or their mean, is not above `free`."""
    constant_q, constant_p = (Gaussians(*(x.detach() for x in part)) for part in (q, p))
    by_prior = prior_weight * floored(latent_kl(constant_q, p), free, floor)
    return by_prior + posterior_weight * floored(latent_kl(q, constant_p), free, floor)


def floored(kl: Tensor, free: float, floor: str) -> Tensor:
    """mean max(KL, free) (V3) or max(mean KL, free) (V1, V2), constant at the floor: [..] -> scalar."""
    kl = kl.mean() if floor == "mean" else kl
    return torch.where(kl > free, kl, free).mean()


def lambda_returns(reward: Tensor, alive: Tensor, value: Tensor, gamma: float, lam: float) -> Tensor:
    """(5): r̂, ĉ and v̄ of the states 1 .. H, [H, B] each -> R_0 .. R_{H−1} [H, B]."""
    assert reward.shape == alive.shape == value.shape
    after, found = value[-1], []
    for r, c, v in zip(*(x.unbind(0)[::-1] for x in (reward, alive, value)), strict=True):
        after = r + gamma * c * torch.lerp(v, after, lam)
        found.append(after)
    return torch.stack(found[::-1])


def dream_weights(start: Tensor, alive: Tensor, gamma: float) -> Tensor:
    """w_0 .. w_{H−1} of (6) [H, B], constants: start is 1 − d [B], alive ĉ_1 .. ĉ_H [H, B]."""
    assert start.shape == alive.shape[1:]
    return torch.cat([start[None], gamma * alive.detach()[:-1]]).cumprod(0)


def two_hot(x: Tensor, values: Tensor) -> Tensor:
    """Weights [.., K] of the two neighbours among ascending values [K] whose mean is x [..] (V3)."""
    above = torch.searchsorted(values, x.contiguous()).clamp(1, len(values) - 1)
    low, high = values[above - 1], values[above]
    share = ((x - low) / (high - low)).clamp(0, 1)
    at = torch.arange(len(values), device=x.device)
    return torch.where(at == above[..., None], share[..., None], 0) + torch.where(
        at == above[..., None] - 1, 1 - share[..., None], 0
    )


def expectation(weight: Tensor, values: Tensor) -> Tensor:
    """Mean of values [K], symmetric about 0, under weights [.., K]: exactly 0 for symmetric ones (V3)."""
    half = len(values) // 2
    return ((weight[..., -half:] - weight[..., :half].flip(-1)) * values[-half:]).sum(-1)


def spread(x: Tensor) -> Tensor:
    """P95 − P5 of all elements, interpolated: scalar (V3)."""
    ordered, ends = x.flatten().sort().values, []
    for share in (0.05, 0.95):
        place = share * (len(ordered) - 1)
        at = int(place)
        ends.append(torch.lerp(ordered[at], ordered[min(at + 1, len(ordered) - 1)], place - at))
    return ends[1] - ends[0]


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


def log_prob_of(policy: Gaussians, noise: Tensor, u: Tensor | None = None) -> Tensor:
    """log π of tanh(u), u = μ + σ·noise unless it is given, [H, N, m] each -> [H, N]."""
    u = torch.addcmul(*policy, noise) if u is None else u
    flat = (x.flatten(0, 1) for x in (noise, policy.std.log(), u))
    return squashed_log_prob(*flat).view(noise.shape[:2])


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


def windows(buffer: ReplayBuffer, first: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Places [length, B] from `first` [B] on, and whether each holds a step of the episode of `first`."""
    k = torch.arange(length, device=first.device)[:, None]
    places, age = (first + k) % buffer.size, (first - buffer.added) % buffer.size  # age 0 is the oldest
    return places, (age + k < buffer.size) & (buffer.episode[places] == buffer.episode[first])


class Sequences(NamedTuple):
    """B windows of L observations, each with what led to it, but the first of an episode or window."""

    obs: Tensor  # [L, B, n]
    action: Tensor  # [L, B, m] before obs
    reward: Tensor  # [L, B] of that action
    terminated: Tensor  # [L, B] whether obs ended its episode
    first: Tensor  # [L, B] whether obs began its episode or window


class SequenceReplay(ReplayBuffer):
    """A replay that shows its agent every observation stepped from, and hands out windows of observations."""

    def __init__(self, agent, *sizes):
        super().__init__(*sizes)
        self.agent = agent

    def add(self, obs, *rest) -> None:
        if self.agent.args.normalize:
            self.agent.look(torch.as_tensor(obs, dtype=torch.float64, device=self.agent.device))
        super().add(obs, *rest)

    def sequences(self, length: int, wanted: int) -> Sequences:
        """Windows that may reach over episodes' ends, from places drawn with replacement.

        A transition is one observation, its last, and the first of its episode or of the window one more.
        """
        age = torch.randint(self.size - length + 2, (wanted,), device=self.rows.device)
        places, _ = windows(self, (self.added + age) % self.size, length - 1)
        episode = self.episode[places]
        begins = torch.cat([torch.ones_like(episode[:1]), episode[1:] != episode[:-1]])
        slot = torch.arange(length, device=age.device)
        end = (slot[:-1, None] + begins.cumsum(0)).t().contiguous()  # slots of the transitions' last obs
        row = torch.searchsorted(end, slot.expand(wanted, -1).contiguous()).t()
        first = (end.t().gather(0, row) > slot[:, None]).float()
        batch = self[places.gather(0, row).flatten()]
        stacked = Batch(*(x.view(length, wanted, *x.shape[1:]) for x in batch))
        obs = torch.where(first[..., None] > 0, stacked.obs, stacked.next_obs)
        return Sequences(obs, stacked.action, stacked.reward, stacked.terminated * (1 - first), first)


class Dream(NamedTuple):
    """H imagined steps from N states."""

    feature: Tensor  # [H + 1, N, D + Z]
    noise: Tensor  # [H, N, m] of the actions
    policy: Gaussians  # [H, N, m] before the squash
    alive: Tensor  # [H, N] ĉ_1 .. ĉ_H
    returns: Tensor  # [H, N] R_0 .. R_{H−1}


class Agent:
    """Dreamer: world model, actor and critic on its states, and what the agent believes while it acts."""

    captured = ("policy", "look", "learn")  # tensors in, tensors out: on a GPU each becomes a CUDA graph
    acting = ("belief",)

    def __init__(self, args: Args, obs_dim: int, action_dim: int, device: torch.device):
        self.args, self.sizes, self.device = args, (obs_dim, action_dim), device
        feature = args.deter + args.stoch
        self.model = WorldModel(obs_dim, action_dim, args).to(device)
        self.actor = LatentActor(feature, action_dim, args).to(device)
        self.critic = LatentCritic(feature, args).to(device)
        self.critic_target = LatentCritic(feature, args).to(device).requires_grad_(False)
        self.critic_target.load_state_dict(self.critic.state_dict())
        groups = [
            {"params": list(self.model.parameters()), "lr": args.model_lr},
            {"params": list(self.actor.parameters()), "lr": args.actor_lr},
            {"params": list(self.critic.parameters()), "lr": args.critic_lr},
        ]  # Adam works elementwise: one for all is faster
        self.optimizer = optim.Adam(groups, fused=True, capturable=device.type == "cuda")
        self.belief = torch.zeros(1, feature + action_dim, device=device)  # h, z and the last action
        self.return_spread = torch.zeros((), device=device)  # of returns, averaged
        self.report = torch.zeros(len(METRICS), device=device)  # of the last update

    def make_buffer(self, capacity: int, env: gym.Env) -> ReplayBuffer:
        """The replay that `train` fills with steps of env; the normaliser sees each first."""
        sizes = (capacity, env.observation_space.shape[0], env.action_space.shape[0], self.device)
        return SequenceReplay(self, *sizes)

    def look(self, obs: Tensor) -> None:
        """One more observation [n], float64, for the normaliser: a dozen small operations a step."""
        self.model.normalizer.update(obs)

    def begin_episode(self) -> None:
        self.belief.zero_()

    def act(self, obs: np.ndarray, deterministic: bool = False) -> np.ndarray:
        """obs [n] -> action [m] in [−1, 1]; deterministic takes means of latents and policy."""
        obs = torch.as_tensor(np.float32(obs), device=self.device)
        action, belief = self.policy(obs[None], self.belief, deterministic)
        self.belief.copy_(belief)
        return action[0].cpu().numpy()

    @torch.no_grad()
    def policy(self, obs: Tensor, belief: Tensor, deterministic: bool) -> tuple[Tensor, Tensor]:
        """obs [B, n] and belief (h, z, a) [B, D + Z + m] of the step before -> action [B, m] and belief."""
        h, z, action = belief.split((*self.model.widths, self.sizes[1]), 1)
        h = self.model.recall(h, z, self.model.of_action(action))
        mean, std = self.model.posterior(h, self.model.embed(obs))
        z = mean if deterministic else mean + std * torch.randn_like(mean)
        mean, std = self.actor(torch.cat([h, z], 1))
        action = (mean if deterministic else mean + std * torch.randn_like(mean)).tanh()
        return action, torch.cat([h, z, action], 1)

    def dream(self, feature: Tensor) -> Dream:
        """H steps of policy and model from f [N, D + Z]; differentiable, but not in the model's weights."""
        args, features, policies = self.args, [feature], []
        many = (args.horizon, len(feature))
        noise, chance = (torch.randn(*many, n, device=feature.device) for n in (self.sizes[1], args.stoch))
        with constant(self.model):
            for eps, luck in zip(noise.unbind(0), chance.unbind(0), strict=True):
                mean, std = self.actor(feature.detach() if args.cut else feature)
                feature = self.model.step(feature, torch.addcmul(mean, std, eps).tanh(), luck)
                features.append(feature)
                policies.append((mean, std))
            feature = torch.stack(features)
            reward, logit = self.model.outcome(feature[1:])
        alive, value = torch.sigmoid(-logit), self.critic_target(feature[1:])
        returns = lambda_returns(reward, alive, value, args.gamma, args.return_lambda)  # (5)
        policy = Gaussians(*(torch.stack(parts) for parts in zip(*policies, strict=True)))
        return Dream(feature, noise, policy, alive, returns)

    def update(self, buffer: SequenceReplay, step: int) -> dict[str, Tensor]:
        """The first step makes --pretrain updates, later ones one in --learn-every; metrics of the last."""
        args = self.args
        count = args.pretrain if step == args.learning_starts + 1 else int(step % args.learn_every == 0)
        for _ in range(count):
            windows_of = buffer.sequences(args.sequence_length, args.batch_size // args.sequence_length)
            self.report.copy_(self.learn(windows_of))
        return dict(zip(METRICS, self.report, strict=True))

    def world_loss(self, batch: Sequences) -> tuple[Tensor, Tensor, list[Tensor]]:
        """(2): scalar, the features [L, B, D + Z] and the first figures of METRICS after it."""
        args, model = self.args, self.model
        feature, q = model.observe(batch.obs, batch.action, batch.first)
        p, arrived = model.prior(feature[..., : args.deter]), 1 - batch.first
        reward, logit = model.outcome(feature)
        error = (model.decoder(feature) - model.see(batch.obs)).square()
        reward_error = ((reward - batch.reward).square() * arrived).sum() / arrived.sum().clamp_min(1)
        ended = F.binary_cross_entropy_with_logits(logit, batch.terminated)
        weights = (args.prior_weight, args.posterior_weight)
        kl = balanced_kl(q, p, *weights, args.free_nats, args.kl_floor)  # (3)
        loss = 0.5 * error.sum(-1).mean() + 0.5 * reward_error + ended + kl  # (2)
        return loss, feature, [error.mean().sqrt(), reward_error.sqrt(), ended, latent_kl(q, p).mean()]

    def actor_loss(self, dream: Dream, weight: Tensor) -> tuple[Tensor, Tensor]:
        """(6), a scalar, and log π of the imagined actions [H, N]."""
        args, policy = self.args, dream.policy
        scale = self.return_spread.clamp_min(1) if args.normalize_returns else 1
        if args.actor_gradient == "pathwise":
            log_prob, gain = log_prob_of(policy, dream.noise), dream.returns / scale
        else:
            seen, drawn = dream.feature[:-1], torch.addcmul(*policy, dream.noise)
            policy = self.actor(seen)
            log_prob, score = log_prob_of(policy, dream.noise), (drawn - policy.mean) / policy.std
            gain = (dream.returns - self.critic_target(seen)) / scale * log_prob_of(policy, score, drawn)
        return -(weight * (gain - args.entropy_weight * log_prob)).mean(), log_prob

    def learn(self, batch: Sequences) -> Tensor:
        """One gradient step of model, actor and critic; figures in the order of METRICS."""
        args = self.args
        model_loss, feature, figures = self.world_loss(batch)

        with torch.set_grad_enabled(args.actor_gradient == "pathwise"):
            dream = self.dream(feature.detach().flatten(0, 1))  # (4)
        weight = dream_weights(1 - batch.terminated.flatten(), dream.alive, args.gamma)  # of (6, 7)
        seen, target = dream.feature[:-1].detach(), dream.returns.detach()
        self.return_spread.lerp_(spread(target), 0.01)
        actor_loss, log_prob = self.actor_loss(dream, weight)  # (6)
        out = self.critic.layers(seen)
        critic_loss = (weight * self.critic.error(out, target)).mean()  # (7)

        self.optimizer.zero_grad()
        (model_loss + actor_loss + critic_loss).backward()  # no parameter is in two of them
        parts = (self.model, self.actor, self.critic)
        norms = [nn.utils.clip_grad_norm_(part.parameters(), args.gradient_norm) for part in parts]
        self.optimizer.step()
        polyak(self.critic_target, self.critic, args.tau)  # (7)
        figures = [model_loss, *figures, norms[0], critic_loss, self.critic.value(out).mean(), actor_loss]
        figures += [-log_prob.mean(), target[0].mean(), self.return_spread, dream.alive.prod(0).mean()]
        return torch.stack(figures).detach()

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
