"""Soft actor-critic with oracle value expansion (SAC-OVE): the true simulator as the model, Palenicek et al.
2023, arXiv 2303.03955.

If the model were perfect, how far should one look ahead? sac_mve.py with its learned model replaced by
MuJoCo itself, so that the target has no model error at all and only the horizon is left to choose:

    â_t ~ π(·|ŝ_t),  (ŝ_{t+1}, r̂_t, d̂_t) = simulator(ŝ_t, â_t),  ŝ_0 = s'
    y_H = min_i Q̄_i(ŝ_H, â_H)                                                                   (1a)
    y_t = r̂_t + γ (1 − d̂_t) (y_{t+1} − α log π(â_{t+1}|ŝ_{t+1})),   t = H−1 .. 0                (1b)
    y   = r + γ (1 − d) (y_0 − α log π(â_0|ŝ_0))                                                (1c)

(2), (3), (4), (5) are sac.py's, (8) is the optional TD-k loss of sac_mve.py. --actor-horizon K lets the
actor look ahead too, beside the critics or alone (--horizon 0): (3) becomes the objective of sac_svg_h.py
with a perfect model, whose derivatives are differences of simulated steps:

    L_π = −mean (y_0 − α log π(â_0|ŝ_0)) / (K + 1),   y_K = min_i Q_i(ŝ_K, â_K),  y_t as in (1b)   (3a)
    ∂(ŝ_{t+1}, r̂_t) / ∂(ŝ_t, â_t)_k = (simulator((ŝ_t, â_t) + ε e_k) − simulator(ŝ_t, â_t)) / ε     (3b)

H = K = 0, with one particle, is sac.py bit for bit and needs no simulator. The replay also keeps the
simulator's state after each step: float64, with the solver's warm start, because float32 would already be a
model error of 1e-7 to 3e-4. Ten Gymnasium tasks are served by batched formulas, any other task on MuJoCo by a
private copy that is restored and stepped: docs/sac_ove.md.

    python algos/sac_ove.py --horizon 3
    python algos/sac_ove.py --horizon 5 --env-id Hopper-v5 --total-timesteps 50_000 --learning-starts 5_000
    python algos/sac_ove.py --resume runs/<run>      # goes on where it stopped, in the same bits
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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, get_args

# Idle threads of torch that spin on would take their cores from MuJoCo's; read when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import gymnasium as gym
import mujoco
import mujoco.rollout
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


@dataclass
class OracleExpansion:
    """Value expansion with the true simulator; the paper is Palenicek et al. 2023."""

    horizon: Natural = 3  # imagined steps H of the critic target; 0 is sac.py (the paper studies 0 to 30)
    num_particles: Count = 1  # imagined trajectories averaged per target (the paper's ablation)
    tdk: bool = False  # TD-k trick: regress the critics at imagined pairs too (Feinberg et al. 2018)
    actor_horizon: Natural = 0  # simulated steps K of the actor's objective, with their gradient; 0: sac.py's
    actor_batch: Count = 32  # states from which the actor looks ahead; a step costs x + m + 1 of each (ours)
    diagnose_every: Count = 500  # steps between comparisons of all horizons; a multiple of log_every (ours)


@dataclass
class Args(Run, SAC, OracleExpansion):
    """Everything that can be set."""

    def __post_init__(self) -> None:
        check(self)
        logged = self.horizon == 0 or self.diagnose_every % self.log_every == 0
        require(logged, "diagnose_every", self.diagnose_every, f"a multiple of --log-every {self.log_every}")
        fits = self.actor_horizon == 0 or self.actor_batch <= self.batch_size
        require(fits, "actor_batch", self.actor_batch, f"at most --batch-size {self.batch_size}")


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


class Step(NamedTuple):
    """One step of B copies of a task, as its formulas read it: float64 but for the action."""

    before: np.ndarray  # [B, nq] positions before the step
    lagged: np.ndarray  # [B, 0 or 2] the centre whose velocity is rewarded, as it was seen before the step
    qpos: np.ndarray  # [B, nq]
    qvel: np.ndarray  # [B, nv]
    action: np.ndarray  # [B, m] in the task's units
    field: dict[str, np.ndarray]  # MjData's arrays after the step [B, ...]; `centre` is the next `lagged`


class Task(NamedTuple):
    """Formulas of a Gymnasium task of version 5: (task, Step) -> obs [B, n], reward [B], terminated [B].

    They read the constructor's arguments from the task's instance. `fields` names arrays of MjData that no
    formula gets from the state alone: MuJoCo computes them before the last substep moves the bodies.
    """

    formulas: Callable
    fields: tuple[str, ...] = ()
    centre: Callable = lambda task, data: np.empty(0)


def norm(vectors: np.ndarray) -> np.ndarray:
    """Lengths [B] of [B, 3], in np.linalg.norm's arithmetic for one vector at a time."""
    return np.sqrt((vectors[:, None, :] @ vectors[:, :, None]).ravel())


def cost(weight: float, action: np.ndarray) -> np.ndarray:
    return weight * np.square(action).sum(1)


def within(low: float, value: np.ndarray, high: float) -> np.ndarray:
    return (low < value) & (value < high)


def joined(task, step: Step, skip: int, *more: np.ndarray) -> np.ndarray:
    """Positions, without the first `skip` if the task leaves them out, and whatever follows them: [B, n]."""
    start = skip * task._exclude_current_positions_from_observation
    return np.concatenate([step.qpos[:, start:], *(x.reshape(len(x), -1) for x in more)], 1)


def never(step: Step) -> np.ndarray:
    return np.zeros(len(step.qpos), bool)


def inverted_pendulum(task, step):
    obs = np.concatenate([step.qpos, step.qvel], 1)
    terminated = ~np.isfinite(obs).all(1) | (np.abs(obs[:, 1]) > 0.2)
    return obs, (~terminated).astype(float), terminated


def inverted_double_pendulum(task, step):
    x, y = step.field["site_xpos"][:, 0, 0], step.field["site_xpos"][:, 0, 2]
    angles, force = step.qpos[:, 1:], step.field["qfrc_constraint"][:, :1]
    parts = [step.qpos[:, :1], np.sin(angles), np.cos(angles), step.qvel.clip(-10, 10), force.clip(-10, 10)]
    terminated = y <= 1
    square = lambda value: np.float_power(value, 2)
    distance = 0.01 * square(x) + square(y - 2)
    velocity = 1e-3 * square(step.qvel[:, 1]) + 5e-3 * square(step.qvel[:, 2])
    return np.concatenate(parts, 1), task._healthy_reward * ~terminated - distance - velocity, terminated


def reacher(task, step):
    body = {name: step.field["xpos"][:, task.model.body(name).id] for name in ("fingertip", "target")}
    gap, angles = body["fingertip"] - body["target"], step.qpos[:, :2]
    obs = [np.cos(angles), np.sin(angles), step.qpos[:, 2:], step.qvel[:, :2], gap[:, :2]]
    reward = -norm(gap) * task._reward_dist_weight - cost(task._reward_control_weight, step.action)
    return np.concatenate(obs, 1), reward, never(step)


def pusher(task, step):
    names = ("tips_arm", "object", "goal")
    tip, thing, goal = (step.field["xpos"][:, task.model.body(name).id] for name in names)
    near, far = norm(thing - tip) * task._reward_near_weight, norm(thing - goal) * task._reward_dist_weight
    reward = -far - cost(task._reward_control_weight, step.action) - near
    return np.concatenate([step.qpos[:, :7], step.qvel[:, :7], tip, thing, goal], 1), reward, never(step)


def swimmer(task, step):
    velocity = (step.qpos[:, 0] - step.before[:, 0]) / task.dt
    reward = task._forward_reward_weight * velocity - cost(task._ctrl_cost_weight, step.action)
    return joined(task, step, 2, step.qvel), reward, never(step)


def half_cheetah(task, step):
    velocity = (step.qpos[:, 0] - step.before[:, 0]) / task.dt
    reward = task._forward_reward_weight * velocity - cost(task._ctrl_cost_weight, step.action)
    return joined(task, step, 1, step.qvel), reward, never(step)


def hopper(task, step):
    healthy = within(task._healthy_z_range[0], step.qpos[:, 1], task._healthy_z_range[1])
    healthy &= within(task._healthy_angle_range[0], step.qpos[:, 2], task._healthy_angle_range[1])
    if hasattr(task, "_healthy_state_range"):  # Hopper's; Walker2d has none
        state = np.concatenate([step.qpos, step.qvel], 1)[:, 2:]
        healthy &= within(task._healthy_state_range[0], state, task._healthy_state_range[1]).all(1)
    velocity = (step.qpos[:, 0] - step.before[:, 0]) / task.dt
    reward = task._forward_reward_weight * velocity + healthy * task._healthy_reward
    reward = reward - cost(task._ctrl_cost_weight, step.action)
    return joined(task, step, 1, step.qvel.clip(-10, 10)), reward, ~healthy & task._terminate_when_unhealthy


def ant(task, step):
    (low, high), force = task._healthy_z_range, step.field["cfrc_ext"].clip(*task._contact_force_range)
    finite = np.isfinite(step.qpos).all(1) & np.isfinite(step.qvel).all(1)
    healthy = finite & (low <= step.qpos[:, 2]) & (step.qpos[:, 2] <= high)
    velocity = (step.field["centre"][:, 0] - step.lagged[:, 0]) / task.dt
    reward = velocity * task._forward_reward_weight + healthy * task._healthy_reward
    contact = task._contact_cost_weight * np.square(force).reshape(len(force), -1).sum(1)
    reward = reward - (cost(task._ctrl_cost_weight, step.action) + contact)
    seen = [force[:, 1:]] if task._include_cfrc_ext_in_observation else []
    return joined(task, step, 2, step.qvel, *seen), reward, ~healthy & task._terminate_when_unhealthy


def humanoid(task, step):
    healthy = within(task._healthy_z_range[0], step.qpos[:, 2], task._healthy_z_range[1])
    velocity = (step.field["centre"][:, 0] - step.lagged[:, 0]) / task.dt
    reward = task._forward_reward_weight * velocity + healthy * task._healthy_reward
    force = step.field["cfrc_ext"]
    contact = task._contact_cost_weight * np.square(force).reshape(len(force), -1).sum(1)
    contact = contact.clip(*task._contact_cost_range)
    reward = reward - (cost(task._ctrl_cost_weight, step.action.astype(float)) + contact)
    parts = {"cinert": 1, "cvel": 1, "qfrc_actuator": 6, "cfrc_ext": 1}  # the first of each is left out
    seen = [step.field[k][:, n:] for k, n in parts.items() if getattr(task, f"_include_{k}_in_observation")]
    return joined(task, step, 2, step.qvel, *seen), reward, ~healthy & task._terminate_when_unhealthy


def mass_centre(task, data) -> np.ndarray:
    mass = task.model.body_mass
    return (np.einsum("b,bj->j", mass, data.xipos) / mass.sum())[:2]


def body_centre(task, data) -> np.ndarray:
    return data.body(task._main_body).xpos[:2].copy()


TASKS = {  # the module of gymnasium.envs.mujoco that defines the task
    "inverted_pendulum_v5": Task(inverted_pendulum),
    "inverted_double_pendulum_v5": Task(inverted_double_pendulum, ("site_xpos", "qfrc_constraint")),
    "reacher_v5": Task(reacher, ("xpos",)),
    "pusher_v5": Task(pusher, ("xpos",)),
    "swimmer_v5": Task(swimmer),
    "half_cheetah_v5": Task(half_cheetah),
    "hopper_v5": Task(hopper),
    "walker2d_v5": Task(hopper),
    "ant_v5": Task(ant, ("cfrc_ext",), body_centre),
    "humanoid_v5": Task(humanoid, ("cinert", "cvel", "qfrc_actuator", "cfrc_ext"), mass_centre),
}


LAGGED = ("xpos", "xipos", "site_xpos", "subtree_com")  # MuJoCo's places of things, one substep old


class Simulator:
    """The task's own physics and formulas on B states at once: an exact model of it.

    A row holds one state in float64: MuJoCo's full physics state, the solver's warm start, and what the
    task's next reward reads of this step. Tasks in TASKS whose formulas need the state alone are rolled out
    by mujoco.rollout's threads; those that read more, by a loop over rows in Python threads; any other by a
    private copy, restored and stepped row by row. BadInput for a task without MuJoCo or with other state.
    """

    def __init__(self, env_id: str, env: gym.Env, threads: int, kwargs: str = "{}"):
        self.live, self.copy = env.unwrapped, make_env(env_id, kwargs, raw=True)
        self.copy.reset(seed=0)
        task = self.copy.unwrapped
        held = isinstance(getattr(task, "model", None), mujoco.MjModel)
        held = held and isinstance(getattr(task, "data", None), mujoco.MjData)
        require(held, "env_id", env_id, "a task that holds MuJoCo's model and data (--horizon 0 needs none)")
        self.model, plain, layer = task.model, True, self.copy.env.env.env  # below the three of make_env
        while layer is not task:  # any other wrapper could change actions and rewards
            plain = plain and type(layer) in (gym.wrappers.OrderEnforcing, gym.wrappers.TimeLimit)
            layer = layer.env
        package, _, module = type(task).__module__.rpartition(".")
        self.task = TASKS.get(module) if plain and package == "gymnasium.envs.mujoco" else None
        kind = mujoco.mjtState.mjSTATE_FULLPHYSICS if self.task else mujoco.mjtState.mjSTATE_INTEGRATION
        self.kind, self.full = kind, mujoco.mj_stateSize(self.model, kind)
        self.width, self.threads = len(self.row(self.live)), threads
        self.datas = [mujoco.MjData(self.model) for _ in range(threads)]
        self.pool = mujoco.rollout.Rollout(nthread=threads if threads > 1 else 0)
        self.workers = ThreadPoolExecutor(threads)
        self.verify(env_id, kwargs)

    def row(self, task: gym.Env) -> np.ndarray:
        """The state that a task, unwrapped, is in: float64 [width]."""
        return self.read(task.data)

    def read(self, data: mujoco.MjData) -> np.ndarray:
        state = np.empty(self.full)
        mujoco.mj_getState(self.model, data, state, self.kind)
        if self.task:
            return np.concatenate([state, data.qacc_warmstart, self.task.centre(self.live, data)])
        return np.concatenate([state, *(getattr(data, name).ravel() for name in LAGGED)])

    def step(self, rows: np.ndarray, action: np.ndarray) -> tuple[np.ndarray, ...]:
        """rows [B, width], action [B, m] in [−1, 1] -> rows, obs [B, n], reward and terminated [B] after."""
        if self.task is None:
            results = [self.step_copy(*pair) for pair in zip(rows, action, strict=True)]
            return tuple(np.stack(column) for column in zip(*results, strict=True))
        units = self.in_units(action)
        after, field = (self.step_each if self.task.fields else self.roll_out)(rows, units)
        (qpos, qvel), before = self.split(after), self.split(rows)[0]
        step = Step(before, rows[:, self.full + qvel.shape[1] :], qpos, qvel, units, field)
        return after, *self.task.formulas(self.copy.unwrapped, step)

    def in_units(self, action: np.ndarray) -> np.ndarray:
        """Actions [.., m] in [−1, 1] as make_env gives them to the task, but in their own precision."""
        bounds = self.copy.env.env.action_space
        return np.clip(self.copy.env.func(action), bounds.low, bounds.high)

    def split(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions [B, nq] and velocities [B, nv]; time comes first."""
        nq, nv = self.model.nq, self.model.nv
        return rows[:, 1 : 1 + nq], rows[:, 1 + nq : 1 + nq + nv]

    def roll_out(self, rows: np.ndarray, units: np.ndarray) -> tuple[np.ndarray, dict]:
        """All rows in MuJoCo's threads.

        The first imagined step is exact. No warm start comes back, so later ones begin from zero, which moves
        them by less than 1e-12 each.
        """
        skip = self.copy.unwrapped.frame_skip
        control = np.repeat(units[:, None].astype(np.float64), skip, 1)
        state, warm = (np.ascontiguousarray(x) for x in (rows[:, : self.full], rows[:, self.full :]))
        path, _ = self.pool.rollout(
            self.model, self.datas, state, control, nstep=skip, initial_warmstart=warm
        )
        return np.concatenate([path[:, -1], np.zeros_like(warm)], 1), {}

    def step_each(self, rows: np.ndarray, units: np.ndarray) -> tuple[np.ndarray, dict]:
        """A loop over rows in every Python thread, which gathers the arrays that the formulas read."""
        after, nv, skip = np.empty_like(rows), self.model.nv, self.copy.unwrapped.frame_skip
        shapes = {name: getattr(self.datas[0], name).shape for name in self.task.fields}
        field = {name: np.empty((len(rows), *shape)) for name, shape in shapes.items()}

        def work(data: mujoco.MjData, places: np.ndarray) -> None:
            arrays = [(field[name], getattr(data, name)) for name in self.task.fields]
            for i in places:
                mujoco.mj_setState(self.model, data, rows[i, : self.full], self.kind)
                data.qacc_warmstart, data.ctrl = rows[i, self.full : self.full + nv], units[i]
                mujoco.mj_step(self.model, data, skip)
                if "cfrc_ext" in field:
                    mujoco.mj_rnePostConstraint(self.model, data)
                mujoco.mj_getState(self.model, data, after[i, : self.full], self.kind)
                after[i, self.full : self.full + nv] = data.qacc_warmstart
                after[i, self.full + nv :] = self.task.centre(self.live, data)
                for array, value in arrays:
                    array[i] = value

        list(self.workers.map(work, self.datas, np.array_split(np.arange(len(rows)), self.threads)))
        return after, field | {"centre": after[:, self.full + nv :]}

    def step_copy(self, row: np.ndarray, action: np.ndarray) -> tuple:
        """One row in the private copy; what its step reads of the one before is put back after mj_forward."""
        data, at = self.copy.unwrapped.data, self.full
        mujoco.mj_setState(self.model, data, row[: self.full], self.kind)
        mujoco.mj_forward(self.model, data)
        mujoco.mj_setState(self.model, data, row[: self.full], self.kind)
        for array in (getattr(data, name) for name in LAGGED):
            array[...] = row[at : at + array.size].reshape(array.shape)
            at += array.size
        task = self.copy.env.env.env  # without the checks of its Boundary, which counts steps
        units = self.in_units(action).reshape(task.action_space.shape).astype(task.action_space.dtype)
        obs, reward, terminated, _, _ = task.step(units)
        return self.read(data), np.ravel(obs).astype(float), float(reward), bool(terminated)

    def differentiate(self, rows: np.ndarray, action: np.ndarray) -> tuple:
        """(3b): one step of rows [B, width] with action [B, m] in [−1, 1], and its derivatives.

        Returns rows after, terminated [B], values [B, v] (positions and velocities, then obs, then reward)
        and their Jacobian [B, v, x + m] with respect to positions, velocities and action, by one-sided
        differences. Actions are moved inwards, for the task clips them; a bonus that stops is no slope.
        """
        (size, m), x = action.shape, self.model.nq + self.model.nv
        k, j = np.arange(x), np.arange(m)
        moves = np.full((size, x + m), self.move)
        moves[:, x:] = np.where(action > 0, -1, 1) * (1e-6 if self.task else 1e-4)  # copies act in float32
        many = np.repeat(rows[:, None], x + m + 1, 1)
        actions = np.repeat(action[:, None].astype(np.float64), x + m + 1, 1)
        many[:, 1 + k, 1 + k] += moves[:, :x]  # place 0 is the step itself; a row begins with the time
        actions[:, 1 + x + j, j] += moves[:, x:]
        after, obs, reward, done = self.step(many.reshape(-1, rows.shape[1]), actions.reshape(-1, m))
        values = np.concatenate([after[:, 1 : 1 + x], obs, reward[:, None]], 1).reshape(size, x + m + 1, -1)
        change = values[:, 1:] - values[:, :1]
        jacobian = (change / moves[..., None]).transpose(0, 2, 1)  # (3b)
        jacobian[:, -1][np.abs(jacobian[:, -1]) > 10 / np.sqrt(np.abs(moves))] = 0
        first = lambda array: array.reshape(size, x + m + 1, *array.shape[1:])[:, 0]
        return first(after), first(done), values[:, 0], jacobian

    def verify(self, env_id: str, kwargs: str) -> None:
        """Sixty random steps of another copy, in three episodes, must come out the same. Raises BadInput."""
        other, rng, log = make_env(env_id, kwargs, raw=True), np.random.default_rng(0), []
        other.reset(seed=1)
        for i in range(60):
            row, action = self.row(other.unwrapped), rng.uniform(-1, 1, other.action_space.shape)
            obs, reward, terminated, truncated, _ = other.step(action.astype(np.float32))
            log.append((row, action.astype(np.float32), np.ravel(obs), reward, terminated))
            if terminated or truncated or i % 20 == 19:
                other.reset()
        other.close()
        rows, actions, *real = (np.array(column[::-1]) for column in zip(*log, strict=True))
        names = ("observation", "reward", "termination")
        for name, theirs, ours in zip(names, real, self.step(rows, actions)[1:], strict=True):
            same = np.allclose(ours, theirs, rtol=1e-5, atol=1e-5, equal_nan=True)
            require(same, "env_id", env_id, f"a task whose {name} follows from simulator state and action")
        self.tried = rows, 0.5 * actions
        self.move = 1e-6 if real[0].dtype == np.float64 else 1e-4  # of states, in `differentiate`

    def chain_error(self) -> np.ndarray:
        """(3b) over three steps from where `verify` has been, against central differences of all at once.

        Of each number of the last observation, and of the sum of rewards: the error's median over rows, as a
        share of the slope's, [n + 1]. Not small where more of a state counts than positions and velocities.
        """
        (rows, action), x = self.tried, self.model.nq + self.model.nv

        def end(first: np.ndarray) -> np.ndarray:
            after, total = rows, 0.0
            for actions in (first, action, action):
                after, obs, reward, _ = self.step(after, actions)
                total = total + reward
            return np.concatenate([obs, total[:, None]], 1)

        after, paid, slope = rows, 0.0, np.zeros((len(rows), x, action.shape[1]))
        for t in range(3):
            after, _, _, jacobian = self.differentiate(after, action)
            slope = jacobian[:, :, :x] @ slope[:, :x] + jacobian[:, :, x:] * (t == 0)
            paid = paid + slope[:, -1]
        ours = np.concatenate([slope[:, x:-1], paid[:, None]], 1)
        moves = 1e-3 * np.eye(action.shape[1])
        theirs = np.stack([(end(action + move) - end(action - move)) / 2e-3 for move in moves], 2)
        error, size = (np.median(np.abs(array).max(2), 0) for array in (ours - theirs, theirs))
        return error / (size + 1e-3 * size.max() + 1e-9)


class Simulated(torch.autograd.Function):
    """Values [B, v] that the simulator computed from state [B, x] and action [B, m], with its Jacobian."""

    @staticmethod
    def forward(context, state: Tensor, action: Tensor, values: Tensor, jacobian: Tensor) -> Tensor:
        context.save_for_backward(jacobian)
        context.widths = (state.shape[1], action.shape[1])
        assert jacobian.shape == (*values.shape, sum(context.widths))
        return values.clone()

    @staticmethod
    def backward(context, gradient: Tensor) -> tuple:
        (jacobian,) = context.saved_tensors
        by_state, by_action = torch.einsum("bv,bvk->bk", gradient, jacobian).split(context.widths, 1)
        return by_state, by_action, None, None


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


class Rollout(NamedTuple):
    """H imagined steps for B states; each list holds one tensor per step, the first three also the end's."""

    obs: list[Tensor]  # H + 1 of [B, n]
    action: list[Tensor]  # H + 1 of [B, m]
    log_prob: list[Tensor]  # H + 1 of [B]
    reward: list[Tensor]  # H of [B]
    done: list[Tensor]  # H of [B], 0 or 1, or the probability of 1


def expand(rollout: Rollout, horizon: int, next_q: Tensor, alpha: Tensor, gamma: float) -> Tensor:
    """(1a, 1b) with H = horizon: y_H = next_q [B], then backwards -> y_0 .. y_H [H + 1, B]."""
    values = [next_q]
    for t in reversed(range(horizon)):
        reward, done, log_prob = rollout.reward[t], rollout.done[t], rollout.log_prob[t + 1]
        values.append(soft_target(reward, done, values[-1], log_prob, alpha, gamma))
    return torch.stack(values[::-1])


def tdk_loss(critic_loss: Tensor, q: Tensor, target: Tensor, alive: Tensor) -> Tensor:
    """(The real pair's loss + Σ_t mean over living rows of (Q_i − y_t)²) / H, arXiv 1803.00101, eq. 4.

    q [critics, H, B] at imagined pairs, target and alive [H, B] -> scalar, summed over critics.
    """
    assert q.shape[1:] == target.shape == alive.shape
    imagined = ((q - target).square() * alive).sum(2) / alive.sum(1).clamp_min(1)
    return (critic_loss + imagined.sum()) / max(len(target), 1)


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


class SimulatorReplay(ReplayBuffer):
    """A replay that keeps, in float64, the simulator's state after each transition and before any reset."""

    def __init__(
        self, capacity: int, obs_dim: int, action_dim: int, device: torch.device, simulator: Simulator
    ):
        super().__init__(capacity, obs_dim, action_dim, device)
        row_bytes = 2 * (4 * sum(self.widths) + 4 + 8 * simulator.width)
        most = int(0.9 * available_memory(torch.device("cpu")) / row_bytes)
        require(capacity <= most, "buffer_size", capacity, f"at most {most} in the memory available here")
        self.simulator = simulator
        self.states = torch.zeros(capacity, simulator.width, dtype=torch.float64)

    def add(self, *transition) -> None:
        self.states[self.added % self.capacity] = torch.from_numpy(self.simulator.row(self.simulator.live))
        super().add(*transition)

    def state_dict(self) -> dict:
        return super().state_dict() | {"states": self.states[: self.size].clone()}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.states[: self.size] = state["states"]


class Agent:
    """Soft actor-critic whose critics learn from targets expanded by the true simulator."""

    captured = ("policy", "learn", "sample")  # tensors in, tensors out: on a GPU each becomes a CUDA graph

    def __init__(self, args: Args, obs_dim: int, action_dim: int, device: torch.device):
        self.args, self.sizes, self.device = args, (obs_dim, action_dim), device
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
        ]  # Adam works elementwise: one for all is faster
        self.optimizer = optim.Adam(groups, fused=True, capturable=device.type == "cuda")
        if args.actor_horizon > 0:  # MuJoCo stands in the middle of the gradient: no part of a graph
            self.captured = ("policy", "sample")

    def make_buffer(self, capacity: int, env: gym.Env) -> ReplayBuffer:
        """The replay that `train` fills with steps of env, with the simulator's states where it is asked."""
        sizes = (capacity, env.observation_space.shape[0], env.action_space.shape[0], self.device)
        if self.args.horizon == self.args.actor_horizon == 0:
            return ReplayBuffer(*sizes)
        simulator = Simulator(self.args.env_id, env, self.args.num_threads, self.args.env_kwargs)
        if ahead := self.args.actor_horizon:
            plain = simulator.model.nq == simulator.model.nv
            require(plain, "actor_horizon", ahead, "0 for bodies that turn freely (nq > nv)")
            wrong, why = simulator.chain_error().max(), "a step depends on more than positions and velocities"
            require(wrong < 0.1, "actor_horizon", ahead, f"0: {why} (slopes of three are off by {wrong:.0%})")
        return SimulatorReplay(*sizes, simulator)

    def act(self, obs: np.ndarray, deterministic: bool = False) -> np.ndarray:
        """obs [n] -> action [m] in [−1, 1]; deterministic is tanh of the Gaussian's mean."""
        obs = torch.as_tensor(np.float32(obs), device=self.device)
        return self.policy(obs[None], deterministic)[0].cpu().numpy()

    @torch.no_grad()
    def policy(self, obs: Tensor, deterministic: bool) -> Tensor:
        mean, log_std = self.actor(obs)
        u = mean if deterministic else mean + log_std.exp() * torch.randn_like(mean)
        return u.tanh()

    @torch.no_grad()
    def sample(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """One step of the policy in imagination: obs [B, n] -> action [B, m] and its log π [B]."""
        return self.actor.sample(obs)

    def simulate(self, obs: Tensor, ended: Tensor, buffer: ReplayBuffer, at: Tensor) -> Rollout:
        """H steps of policy and simulator from obs [B, n], seen after the transitions in places `at` [B].

        Rows that have ended stay where they are: nothing after the end counts. MuJoCo steps on the host.
        """
        action, log_prob = (x.clone() for x in self.sample(obs))  # which its next call overwrites
        rollout = Rollout([obs], [action], [log_prob], [], [])
        if self.args.horizon == 0:
            return rollout
        rows, reward = buffer.states[at.cpu()].numpy(), np.zeros(len(at))
        seen, done = obs.cpu().numpy().copy(), ended.cpu().numpy() > 0
        for _ in range(self.args.horizon):
            living = np.flatnonzero(~done)
            reward[:] = 0
            if len(living):
                results = buffer.simulator.step(rows[living], action.float().cpu().numpy()[living])
                for array, result in zip((rows, seen, reward, done), results, strict=True):
                    array[living] = result
            rollout.reward.append(torch.tensor(reward, dtype=obs.dtype, device=self.device))
            rollout.done.append(torch.tensor(done, dtype=obs.dtype, device=self.device))
            obs = torch.tensor(seen, device=self.device)
            action, log_prob = (x.clone() for x in self.sample(obs))
            for values, value in zip(rollout[:3], (obs, action, log_prob), strict=True):
                values.append(value)
        return rollout

    def differentiable_rollout(self, batch: Batch, buffer: ReplayBuffer, at: Tensor) -> Rollout:
        """K steps with gradient of policy and simulator from where the transitions in places `at` [B] led."""
        simulator, x = buffer.simulator, buffer.simulator.model.nq + buffer.simulator.model.nv
        rows, done = buffer.states[at.cpu()].numpy(), batch.terminated.cpu().numpy() > 0
        state, obs = torch.from_numpy(rows[:, 1 : 1 + x]).to(self.device), batch.next_obs
        rollout = Rollout([obs], *([value] for value in self.actor.sample(obs)), [], [])
        for _ in range(self.args.actor_horizon):
            action, living = rollout.action[-1].double(), np.flatnonzero(~done)
            values = np.zeros((len(at), x + obs.shape[1] + 1))
            jacobian = np.zeros((*values.shape, x + action.shape[1]))
            if len(living):
                results = simulator.differentiate(rows[living], action.detach().cpu().numpy()[living])
                for array, result in zip((rows, done, values, jacobian), results, strict=True):
                    array[living] = result
            values = Simulated.apply(
                state, action, *(torch.from_numpy(v).to(self.device) for v in (values, jacobian))
            )
            state, obs, reward = values.split([x, obs.shape[1], 1], 1)
            obs = obs.float()
            new = (obs, *self.actor.sample(obs), reward.squeeze(1).float(), torch.tensor(done).to(obs))
            for found, value in zip(rollout, new, strict=True):
                found.append(value)
        return rollout

    def update(self, buffer: ReplayBuffer, step: int) -> dict[str, Tensor]:
        """One gradient step after rollouts on the host. Metrics stay tensors, for a GPU's sake."""
        at = buffer.sample(self.args.batch_size)
        places = at.repeat(self.args.num_particles)
        starts = buffer[places]
        rollout = self.simulate(starts.next_obs, starts.terminated, buffer, places)
        compares = self.args.horizon > 0 and step % self.args.diagnose_every == 0
        metrics = self.compare_horizons(starts, rollout) if compares else {}
        if self.args.actor_horizon == 0:
            return metrics | self.learn(buffer[at], rollout)
        places = at[: self.args.actor_batch]
        ahead = self.differentiable_rollout(buffer[places], buffer, places)
        return metrics | self.learn(buffer[at], rollout, ahead)

    def critic_loss(self, batch: Batch, rollout: Rollout, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """Scalar, and the values q [2, B] that it draws to their targets."""
        horizon, particles, gamma = self.args.horizon, self.args.num_particles, self.args.gamma
        reward, ended = batch.reward.repeat(particles), batch.terminated.repeat(particles)
        with torch.no_grad():
            next_q = self.critic_target(rollout.obs[-1], rollout.action[-1]).amin(0)
            values = expand(rollout, horizon, next_q, alpha, gamma)  # (1a, 1b)
            target = soft_target(reward, ended, values[0], rollout.log_prob[0], alpha, gamma)  # (1c)
            target = target.view(particles, -1).mean(0)
        q = self.critic(batch.obs, batch.action)
        critic_loss = twin_loss(q, target)  # (2)
        if self.args.tdk and horizon > 0:
            alive = torch.stack([1 - ended, *(1 - done for done in rollout.done[:-1])]).cumprod(0)
            imagined = self.critic(torch.cat(rollout.obs[:-1]), torch.cat(rollout.action[:-1]))
            critic_loss = tdk_loss(critic_loss, imagined.view(2, *alive.shape), values[:-1], alive)  # (8)
        return critic_loss, q

    def expanded_actor_loss(self, ahead: Rollout, alive: Tensor, alpha: Tensor) -> Tensor:
        """(3a) over the rows that are alive [B], 0 or 1, where the rollout begins -> scalar."""
        horizon = self.args.actor_horizon
        next_q = self.critic(ahead.obs[-1], ahead.action[-1], frozen=True).amin(0)
        value = expand(ahead, horizon, next_q, alpha, self.args.gamma)[0] - alpha * ahead.log_prob[0]
        assert value.shape == alive.shape
        return -(alive * value).sum() / alive.sum().clamp_min(1) / (horizon + 1)

    def learn(self, batch: Batch, rollout: Rollout, ahead: Rollout | None = None) -> dict[str, Tensor]:
        alpha = self.log_alpha.detach().exp()
        critic_loss, q = self.critic_loss(batch, rollout, alpha)
        if ahead is None:
            action, log_prob = self.actor.sample(batch.obs)
            actor_loss = soft_actor_loss(self.critic(batch.obs, action, frozen=True), log_prob, alpha)  # (3)
        else:
            log_prob = ahead.log_prob[0]
            alive = 1 - batch.terminated[: len(log_prob)]
            actor_loss = self.expanded_actor_loss(ahead, alive, alpha)  # (3a)
        alpha_loss = temperature_loss(self.log_alpha, log_prob, self.target_entropy)  # (4)

        self.optimizer.zero_grad()
        (critic_loss + actor_loss + alpha_loss).backward()  # no parameter is in two of them
        self.optimizer.step()
        polyak(self.critic_target, self.critic, self.args.tau)  # (5)
        return {
            "losses/qf_loss": critic_loss.detach(),
            "losses/qf_values": q.detach().mean(),
            "losses/actor_loss": actor_loss.detach(),
            "losses/alpha_loss": alpha_loss.detach(),
            "losses/alpha": alpha,
            "losses/entropy": -log_prob.detach().mean(),
        }

    @torch.no_grad()
    def compare_horizons(self, starts: Batch, rollout: Rollout) -> dict[str, Tensor]:
        """Targets of every horizon 0 .. H from one rollout that begins where `starts` end."""
        args, alpha, targets = self.args, self.log_alpha.exp(), []
        q = self.critic_target(torch.cat(rollout.obs), torch.cat(rollout.action)).amin(0)
        for h, next_q in enumerate(q.view(args.horizon + 1, -1)):
            values = expand(rollout, h, next_q, alpha, args.gamma)
            following = (values[0], rollout.log_prob[0], alpha, args.gamma)
            targets.append(soft_target(starts.reward, starts.terminated, *following))
        metrics = {f"expansion/target_mean_{h}": target.mean() for h, target in enumerate(targets)}
        metrics["expansion/spread_over_horizons"] = torch.stack(targets).std(0, correction=0).mean()
        metrics["expansion/alive"] = (1 - torch.stack([starts.terminated, *rollout.done])).prod(0).mean()
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
