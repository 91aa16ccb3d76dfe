"""Stochastic ensemble value expansion (STEVE), Buckman et al. 2018, arXiv 1807.01675.

ddpg.py whose critic target weighs all horizons 0 .. H by how sure each is. L critics, M models of transition
and termination and R of the reward give M R L candidates per horizon; their spread is the doubt. From s':

    s_0 = s', D_0 = d,  a_j = π(s_j),  s_{j+1} = s_j + f_m(s_j, a_j),  D_{j+1} = σ(g_m(s_{j+1}, s_j, a_j)),
    C_j = Π_{k≤j} (1 − D_k),  C_{−1} = 1,  ρ_0 = r,  ρ_j = ρ_{r'}(s_j, s_{j−1}, a_{j−1})               (1)
    T_h = Σ_{j=0..h} γ^j C_{j−1} ρ_j + γ^{h+1} C_h Q̄_l(s_h, a_h)   for all (m, r', l)                 (2)
    y   = Σ_h w_h mean T_h,   w_h ∝ 1 / (Var T_h + 1e-8)                                               (3)
    L_Q = mean ½ (Q_l(s, a) − y)²,   each transition with one critic l                                 (4)
    L_π = −mean Q_l(s, π(s)) + 0.001 mean μ(s)²,   over all l;  π = tanh μ                             (5)
    L_f = mean ½ ‖s' − s − f_m‖² + ½ (r − ρ_r')² + cross-entropy(d, g_m) + 1e-4 Σ ½ w²,  one member each  (6)
    Q̄   ← Q̄ + τ (Q − Q̄),   τ = 1, every 500 updates                                                 (7)
    a   = tanh(μ(s) + ε) in each dimension with probability 0.05, else π(s)                            (8)

There is no slow actor. H = 0 is DDPG with a mean over critics. --reduction has the paper's other ways from
T_h to y; --tdk regresses the critics at imagined pairs too, which with --reduction last is MVE.

    python algos/steve.py
    python algos/steve.py --env-id Hopper-v5 --total-timesteps 100_000 --preset released
    python algos/steve.py --resume runs/<run>      # goes on where it stopped, in the same bits
"""

import contextlib
import copy
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
class STEVE:
    """Stochastic ensemble value expansion; released is the authors' code."""

    preset: Literal["laptop", "released"] = "laptop"  # released: the authors' sizes; any flag overrides them
    gamma: Fraction = 0.99  # discount factor γ (released)
    tau: Fraction = 1.0  # Polyak step τ of the slow critics (released: a copy)
    target_interval: Count = 500  # updates between two such steps (released)
    actor_lr: Rate = 3e-4  # Adam step size of the actor (released)
    critic_lr: Rate = 3e-4  # Adam step size of the critics (released)
    hidden: Width = 128  # units in each of 3 hidden layers of all but the transition models (released)
    updates_per_step: Count = 1  # gradient steps of each kind per step (ours, for laptops; released: 4)
    explore_chance: Fraction = 0.05  # by dimension, of noise before the tanh (released, but never read there)
    mean_penalty: Rate = 1e-3  # weight of μ² in (5) (released)


Reduction = Literal["stev", "mean", "last", "td-lambda", "covariance"]  # of the horizons' targets to one


@dataclass
class EnsembleTargets:
    """Ensembles, and how their candidates become a target."""

    horizon: Natural = 3  # imagined steps H of the longest target (released); 0 is model-free
    reduction: Reduction = "stev"  # inverse variance (3); ablations: mean, last, λ-return, inverse covariance
    td_lambda: Fraction = 0.25  # λ of --reduction td-lambda (Buckman et al. 2018: 0.25 and 0.75)
    tdk: bool = False  # regress critics at imagined pairs too, with --reduction last (the paper's MVE)
    critics: Count = 4  # critics L (released)
    members: Annotated[int, (1, 1024)] = 4  # transition models M, each with its termination model (released)
    reward_members: Annotated[int, (1, 1024)] = 4  # reward models R (released)
    model_layers: Annotated[int, (1, 64)] = 4  # hidden layers of a transition model (ours; released: 7)
    model_hidden: Width = 128  # units in each of them (ours, for laptops; released: 512)
    model_lr: Rate = 3e-4  # Adam step size of all models (released)
    model_warm_up: Natural = 1_000  # model updates before the first critic update (ours; released: 10 000)
    weight_decay: Rate = 1e-4  # weight of ½ w² in (6), biases too (released)


@dataclass
class Args(Run, STEVE, EnsembleTargets):
    """Everything that can be set."""

    def __post_init__(self) -> None:
        check(self)
        most = max(self.critics, self.members, self.reward_members)
        each = f"at least {most}, one for each member"
        require(self.batch_size >= most, "batch_size", self.batch_size, each)
        usable = not self.tdk or (self.reduction == "last" and self.horizon > 0)
        require(usable, "tdk", self.tdk, "off but for --reduction last and a --horizon above 0")

    @classmethod
    def defaults(cls, given: dict) -> dict:
        """The dataclass's defaults, and the sizes of the preset."""
        released = {"updates_per_step": 4, "batch_size": 512, "model_layers": 7, "model_hidden": 512}
        released |= {"total_timesteps": 100_000, "learning_starts": 10_000, "model_warm_up": 10_000}
        return dataclasses.asdict(cls()) | (released if given["preset"] == "released" else {})


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


def ensemble_xavier(module: nn.Module) -> None:
    """Weights U(±√(6 / (members · (inputs + outputs)))), biases 0: the released call counts the members into
    both fans, so that four of them start with half of Xavier's bound, one alone with Xavier's."""
    for layer in module.layers:
        members, inputs, outputs = layer.weight.shape
        bound = math.sqrt(6 / (members * (inputs + outputs)))
        nn.init.uniform_(layer.weight, -bound, bound)
        nn.init.zeros_(layer.bias)


def deal(rows: int, members: int, device: torch.device) -> Tensor:
    """Each of `rows` to one of the members, at random and evenly: places [members, rows // members]."""
    return torch.randperm(rows, device=device)[: rows // members * members].view(members, -1)


def candidates(reward: Tensor, rewards: Tensor, alive: Tensor, q: Tensor, gamma: float) -> Tensor:
    """(2): reward [B], rewards ρ_1 .. ρ_H [H, M, R, B], C_0 .. C_H [H + 1, M, B], Q̄ [H + 1, M, L, B].

    Returns T [H + 1, M, R, L, B]; H may be 0, then R is 1.
    """
    horizon = len(q) - 1
    assert alive.shape == (*q.shape[:2], q.shape[3]) and rewards.shape[::3] == (horizon, q.shape[3])
    size = (q.shape[1], rewards.shape[2] if horizon else 1, q.shape[2], q.shape[3])
    total = reward.expand(size)
    found = [total + gamma * (alive[0][:, None, None] * q[0][:, None])]
    for h in range(1, horizon + 1):
        total = total + gamma**h * (alive[h - 1][:, None] * rewards[h - 1])[:, :, None]
        found.append(total + gamma ** (h + 1) * (alive[h][:, None, None] * q[h][:, None]))
    return torch.stack([t.expand(size) for t in found])


def horizon_weights(targets: Tensor, reduction: str, td_lambda: float) -> Tensor:
    """(3): targets [H + 1, S, B], S samples each -> weights [H + 1, B], which sum to 1."""
    count, _, batch = targets.shape
    if reduction == "stev":
        weights = 1 / (targets.var(1, correction=0) + 1e-8)  # (3)
        return weights / weights.sum(0)
    if reduction == "covariance":
        apart = targets.double()  # in float32 correlated horizons cannot be told apart
        apart = apart - apart.mean(1, keepdim=True)
        matrix = torch.einsum("isb,jsb->bij", apart, apart)
        matrix = matrix + 1e-3 * torch.eye(count, dtype=matrix.dtype, device=matrix.device)
        weights = torch.linalg.solve(matrix, torch.ones_like(matrix[:, :, :1]))[..., 0].T
        return (weights / weights.sum(0)).to(targets.dtype)
    shares = {
        "mean": [1 / count] * count,
        "last": [0.0] * (count - 1) + [1.0],
        "td-lambda": [(1 - td_lambda) * td_lambda**h for h in range(count - 1)] + [td_lambda ** (count - 1)],
    }[reduction]
    return torch.stack([targets.new_full((batch,), share) for share in shares])


def half_squared_error(q: Tensor, target: Tensor) -> Tensor:
    """(4): mean ½ (Q − y)² of equal shapes -> scalar."""
    assert q.shape == target.shape
    return 0.5 * (q - target).square().mean()


def mean_over_models_loss(q: Tensor, target: Tensor, alive: Tensor) -> Tensor:
    """(4) at imagined pairs: ½ (Q − y)² of the means over M models, as in the released code, weighted by the
    mean probability to get there: q, target, alive [M, ..] -> scalar."""
    assert q.shape == target.shape == alive.shape
    error = q.mean(0) - target.mean(0)
    return 0.5 * (alive.mean(0) * error.square()).mean()


class Imagination(NamedTuple):
    """H imagined steps of M models from B states."""

    obs: Tensor  # [H + 1, M, B, n]
    action: Tensor  # [H + 1, M, B, m]
    rewards: Tensor  # ρ_1 .. ρ_H [H, M, R, B]
    alive: Tensor  # C_0 .. C_H [H + 1, M, B]


class Agent:
    """Deterministic actor, ensembles of critics and of models, slow copies of the critics."""

    captured = ("policy", "learn", "fit_ensembles")  # tensors in, tensors out: on a GPU each is a CUDA graph

    def __init__(self, args: Args, obs_dim: int, action_dim: int, device: torch.device):
        self.args, self.sizes, self.device = args, (obs_dim, action_dim), device
        hidden, both = [args.hidden] * 3, obs_dim + action_dim
        self.actor = StackedMLP(1, [obs_dim, *hidden, action_dim], layer_norm=False).to(device)
        self.critic = QFunctions(args.critics, [both, *hidden, 1], layer_norm=False).to(device)
        ensemble_xavier(self.actor)
        ensemble_xavier(self.critic)
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)
        groups = [
            {"params": list(self.actor.parameters()), "lr": args.actor_lr},
            {"params": list(self.critic.parameters()), "lr": args.critic_lr},
        ]  # Adam works elementwise: one for both is faster
        fast = device.type == "cuda"
        self.optimizer = optim.Adam(groups, fused=True, capturable=fast)
        if args.reduction == "covariance":  # its linear solver waits for the GPU, which a graph cannot
            self.captured = ("policy", "fit_ensembles")
        if args.horizon == 0:
            return
        wide, parts = [args.model_hidden] * args.model_layers, 2 * obs_dim + action_dim
        self.transition = StackedMLP(args.members, [both, *wide, obs_dim], layer_norm=False).to(device)
        self.termination = StackedMLP(args.members, [parts, *hidden, 1], layer_norm=False).to(device)
        self.rewards = StackedMLP(args.reward_members, [parts, *hidden, 1], layer_norm=False).to(device)
        models = (self.transition, self.termination, self.rewards)
        for model in models:
            ensemble_xavier(model)
        adam = {"lr": args.model_lr, "weight_decay": args.weight_decay, "fused": True, "capturable": fast}
        self.model_optimizer = optim.Adam([p for model in models for p in model.parameters()], **adam)

    def make_buffer(self, capacity: int, env: gym.Env) -> ReplayBuffer:
        """The replay that `train` fills with steps of env."""
        return ReplayBuffer(capacity, env.observation_space.shape[0], env.action_space.shape[0], self.device)

    def act(self, obs: np.ndarray, deterministic: bool = False) -> np.ndarray:
        """obs [n] -> action [m] in [−1, 1], with the noise of (8) or without."""
        obs = torch.as_tensor(np.float32(obs), device=self.device)
        return self.policy(obs[None], deterministic)[0].cpu().numpy()

    @torch.no_grad()
    def policy(self, obs: Tensor, deterministic: bool) -> Tensor:
        mean = self.actor(obs)[0]
        if not deterministic:
            noisy = torch.rand_like(mean) < self.args.explore_chance
            mean = mean + noisy * torch.randn_like(mean)  # (8)
        return mean.tanh()

    def imagine_all(self, obs: Tensor, terminated: Tensor, horizon: int) -> Imagination:
        """(1): obs [B, n], terminated [B]; each model keeps to its own trajectory."""
        members = self.args.members if horizon else 1
        x = obs.expand(members, -1, -1)
        alive = [(1 - terminated).expand(members, -1)]
        states, actions, rewards = [x], [self.choose(x)], []
        for _ in range(horizon):
            next_x = x + self.transition(torch.cat([x, actions[-1]], 2))
            step = torch.cat([next_x, x, actions[-1]], 2)
            ended = self.termination(step).squeeze(2).sigmoid()
            paid = self.rewards(step.flatten(0, 1)[None]).view(-1, members, len(obs))  # every pair (r', m)
            x = next_x
            states.append(x)
            actions.append(self.choose(x))
            rewards.append(paid.transpose(0, 1))
            alive.append(alive[-1] * (1 - ended))
        none = torch.zeros(0, members, 1, len(obs), device=self.device)
        paid = torch.stack(rewards) if rewards else none
        return Imagination(torch.stack(states), torch.stack(actions), paid, torch.stack(alive))

    def choose(self, obs: Tensor) -> Tensor:
        """π at obs [M, B, n] -> [M, B, m]."""
        return self.actor(obs.flatten(0, 1)[None])[0].tanh().view(*obs.shape[:2], -1)

    def judge_all(self, imagined: Imagination) -> Tensor:
        """Q̄ of all critics at all imagined pairs: [H + 1, M, L, B]."""
        steps, members, batch = imagined.obs.shape[:3]
        q = self.critic_target(imagined.obs.flatten(0, 2), imagined.action.flatten(0, 2))
        return q.view(-1, steps, members, batch).permute(1, 2, 0, 3)

    def update(self, buffer: ReplayBuffer, step: int) -> dict[str, Tensor]:
        """The gradient steps of one environment step, the models' first. Metrics stay tensors."""
        args, metrics = self.args, {}
        before = step - args.learning_starts - 1  # steps with updates, so far
        for k in range(args.updates_per_step):
            updates = before * args.updates_per_step + k
            for _ in range(1 + args.model_warm_up * (updates == 0) if args.horizon > 0 else 0):
                metrics = self.fit_ensembles(buffer[buffer.sample(args.batch_size)])
            learned = self.learn(buffer[buffer.sample(args.batch_size)])
            if (updates + 1) % args.target_interval == 0:
                polyak(self.critic_target, self.critic, args.tau)  # (7)
        return metrics | learned

    def learn(self, batch: Batch) -> dict[str, Tensor]:
        """One gradient step of actor and critics."""
        args = self.args
        with torch.no_grad():
            imagined = self.imagine_all(batch.next_obs, batch.terminated, args.horizon)  # (1)
            q_end = self.judge_all(imagined)
            found = candidates(batch.reward, imagined.rewards, imagined.alive, q_end, args.gamma)  # (2)
            found = found.flatten(1, 3)
            weights = horizon_weights(found, args.reduction, args.td_lambda)  # (3)
            target = (weights * found.mean(1)).sum(0)  # (3)
        dealt = deal(args.batch_size, args.critics, self.device)
        q = self.pair_values(batch.obs[dealt], batch.action[dealt])
        critic_loss = half_squared_error(q, target[dealt])  # (4)
        if args.tdk:
            critic_loss = (critic_loss + self.tdk_losses(imagined, q_end)) / (args.horizon + 1)
        mean = self.actor(batch.obs)[0]
        actor_loss = -self.critic(batch.obs, mean.tanh(), frozen=True).mean()
        actor_loss = actor_loss + args.mean_penalty * mean.square().mean()  # (5)

        self.optimizer.zero_grad()
        (critic_loss + actor_loss).backward()  # no parameter is in both
        self.optimizer.step()
        by_horizon = {"weight": weights.mean(1), "target_mean": found.mean((1, 2))}
        by_horizon["deviation"] = found.std(1, correction=0).mean(1)
        metrics = {f"expansion/{name}_{h}": x for name, row in by_horizon.items() for h, x in enumerate(row)}
        return metrics | {
            "losses/qf_loss": critic_loss.detach(),
            "losses/qf_values": q.detach().mean(),
            "losses/actor_loss": actor_loss.detach(),
        }

    def pair_values(self, obs: Tensor, action: Tensor) -> Tensor:
        """Critic l at its own pairs: obs [L, B, n], action [L, B, m] -> [L, B]."""
        return StackedMLP.forward(self.critic, torch.cat([obs, action], 2)).squeeze(2)

    def tdk_losses(self, imagined: Imagination, q_end: Tensor) -> Tensor:
        """(4) at the imagined pairs s_0 .. s_{H−1}, each row with one critic, on what remains of the longest
        target from there, given that they are reached; sum over steps."""
        alive, paid = imagined.alive, imagined.rewards.mean(2)  # over r'
        rest, total = alive[-1] * q_end[-1].mean(1), 0.0  # over l: [M, B]
        dealt = deal(alive.shape[2], self.args.critics, self.device)
        pairs = (x[:-1, :, dealt].permute(2, 0, 1, 3, 4) for x in (imagined.obs, imagined.action))
        q = self.pair_values(*(x.flatten(1, 3) for x in pairs)).view(len(dealt), *paid.shape[:2], -1)
        for j in reversed(range(len(paid))):
            rest = alive[j] * paid[j] + self.args.gamma * rest
            target = rest / (alive[j] + 1e-8)  # of the pair (s_j, a_j), given that s_j is reached: [M, B]
            found = q[:, j].transpose(0, 1), target[:, dealt], alive[j][:, dealt]  # [M, L, B / L] each
            total = total + mean_over_models_loss(*found)
        return total

    def fit_ensembles(self, batch: Batch) -> dict[str, Tensor]:
        """One gradient step (6) of all models; each transition trains one member of each kind."""
        args = self.args
        before = torch.cat([batch.obs, batch.action], 1)
        after = torch.cat([batch.next_obs, before], 1)
        at = deal(args.batch_size, args.members, self.device)
        error = (batch.next_obs - batch.obs)[at] - self.transition(before[at])
        transition_loss = 0.5 * error.square().sum(2).mean()
        at = deal(args.batch_size, args.reward_members, self.device)
        reward_loss = half_squared_error(self.rewards(after[at]).squeeze(2), batch.reward[at])
        at = deal(args.batch_size, args.members, self.device)
        logit = self.termination(after[at]).squeeze(2)
        termination_loss = F.binary_cross_entropy_with_logits(logit, batch.terminated[at])
        self.model_optimizer.zero_grad()
        (transition_loss + reward_loss + termination_loss).backward()  # (6), its decay in Adam
        self.model_optimizer.step()
        losses = {"transition": transition_loss, "reward": reward_loss, "termination": termination_loss}
        return {f"model/{name}_loss": loss.detach() for name, loss in losses.items()}

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
