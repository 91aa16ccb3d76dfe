"""The tasks of five papers as Gymnasium ids: --env-id experiments.tasks:poplin/Hopper-v0 and so on.

poplin/ Ant-v0, Cheetah-v0, Hopper-v0, Swimmer-v0, Walker2d-v0 (arXiv 1906.08649, tasks of arXiv 1907.02057):
    no termination; the reward is a known function of the observation *before* the step and of the action.
pets/ Cheetah-v0 (arXiv 1805.12114):
    the observation has the last step's velocity, and the pitch as sine and cosine.
pets/ CartPole-v0 (arXiv 1805.12114, body and reward of the authors' code):
    a hanging pole is swung up by a cart and balanced, 200 steps of 0.04 s; no termination.
mbpo/ Ant-v0, HalfCheetah-v0, Hopper-v0, Humanoid-v0, Walker2d-v0 (arXiv 1906.08253):
    Gymnasium's tasks with truncated observations (Ant, Humanoid), Walker2d's old feet, and the alive bonus
    paid on the terminating step too.
mve/ HalfCheetah-v0, Swimmer-v0, Walker2d-v0 (arXiv 1803.00101):
    Gymnasium's tasks with the root's position in the observation, so that it determines the reward; Walker2d
    with its old feet, and the alive bonus paid on the terminating step too.
pilco/ CartPole-v0 (Deisenroth and Rasmussen, ICML 2011, dynamics of the authors' code):
    a hanging pole is swung up by a cart and balanced, 40 steps of 0.1 s; no termination, no MuJoCo.
masked/ HalfCheetah-v0, Hopper-v0, InvertedPendulum-v0 (as in arXiv 2110.05038, for agents that remember):
    Gymnasium's tasks with positions alone in the observation, no velocities.

All but the cart-poles rest on Gymnasium's bodies of version 5, with 1 000 steps an episode. Physics engines
have changed since the papers (MuJoCo 1.31 and 1.50): returns are comparable within the noise of their seeds,
not to the digit.
"""

import math
from pathlib import Path

import gymnasium as gym
import numpy as np
from gymnasium.envs.mujoco.inverted_pendulum_v5 import InvertedPendulumEnv
from gymnasium.spaces import Box

BONUS = 1.0  # for being there, whatever the posture: Ant, Hopper, Walker2d of poplin


class Poplin(gym.Wrapper):
    """r = v_x − 0.1 ‖u‖² (− 3 (z − height)² + 1), all of the state before the step; never terminates.

    Observations are positions without the root's x (and y) and unclipped velocities: [n], float64.
    """

    ends_are_the_tasks = True  # for it is made of tasks that never end

    def __init__(self, env: gym.Env, skip: int, height: float | None):
        super().__init__(env.unwrapped)
        self.skip, self.height = skip, height
        self.observation_space = Box(-np.inf, np.inf, (len(self.observe()),), np.float64)

    def observe(self) -> np.ndarray:
        data = self.unwrapped.data
        return np.concatenate([data.qpos[self.skip :], data.qvel])

    def reward(self, action: np.ndarray) -> float:
        data = self.unwrapped.data
        reward = data.qvel[0] - 0.1 * np.square(action, dtype=np.float64).sum()
        if self.height is not None:
            reward += BONUS - 3 * (data.qpos[self.skip] - self.height) ** 2
        return float(reward)

    def reset(self, **options):
        _, info = self.env.reset(**options)
        return self.observe(), info

    def step(self, action: np.ndarray):
        reward = self.reward(action)
        *_, info = self.env.step(action)
        return self.observe(), reward, False, False, info


class PoplinSwimmer(Poplin):
    """Rewarded by the velocity w of the head's tip in the step before, which is the last observation.

    The benchmark's body has its origin at that tip, Gymnasium's 1.5 m behind: w = (Δq_0 + 1.5 Δcos q_2) / dt.
    Two deviations from the authors: they read the tip where the last Runge-Kutta stage left it (in 20 000
    random steps w differs by 5e-5 in the median and 0.10 at most, on a root mean square of 0.42, and the sum
    over an episode by at most 2.4e-4), and their w after a reset is the last of the episode before, ours 0.
    """

    def __init__(self, env: gym.Env):
        self.tip_velocity = 0.0
        super().__init__(env, 2, None)

    def tip(self) -> float:
        data = self.unwrapped.data
        return float(data.qpos[0] + 1.5 * np.cos(data.qpos[2]))

    def observe(self) -> np.ndarray:
        return np.append(super().observe(), self.tip_velocity)

    def reset(self, **options):
        self.tip_velocity = 0.0
        return super().reset(**options)

    def step(self, action: np.ndarray):
        reward, before = (
            self.tip_velocity - 1e-4 * float(np.square(action, dtype=np.float64).sum()),
            self.tip(),
        )
        *_, info = self.env.step(action)
        self.tip_velocity = (self.tip() - before) / self.unwrapped.dt
        return self.observe(), reward, False, False, info


class PetsCheetah(gym.Wrapper):
    """Observations [19]: Δx/dt of the last step (0 after a reset), z, sin, cos of pitch, joints, velocities.

    r = Δx/dt − 0.1 ‖u‖², as HalfCheetah-v5. A reset adds N(0, 0.001²) to positions and velocities.
    """

    observation_space = Box(-np.inf, np.inf, (19,), np.float64)

    def observe(self, velocity: float) -> np.ndarray:
        q, v = self.unwrapped.data.qpos, self.unwrapped.data.qvel
        return np.concatenate([[velocity, q[1], np.sin(q[2]), np.cos(q[2])], q[3:], v])

    def reset(self, **options):
        _, info = self.env.reset(**options)
        task = self.unwrapped  # its own noise on positions is uniform
        noise = task._reset_noise_scale * task.np_random.standard_normal(task.model.nq)
        task.set_state(task.init_qpos + noise, task.data.qvel)
        return self.observe(0.0), info | {"x_position": task.data.qpos[0]}

    def step(self, action: np.ndarray):
        _, reward, terminated, truncated, info = self.env.step(action)
        return self.observe(info["x_velocity"]), reward, terminated, truncated, info


class PetsCartPole(InvertedPendulumEnv):
    """x, θ, ẋ, θ̇ [4], θ = 0 hangs; r = exp(−d²/0.6²) − 0.01 u² after the step, never terminates.

    d metres from the pole's tip to where it stands upright over x = 0; u within ±3, start N(0, 0.1² I).
    """

    def __init__(self, **options):
        super().__init__(xml_file=str(Path(__file__).resolve().with_name("pets_cartpole.xml")), **options)

    def reset_model(self) -> np.ndarray:
        noise = 0.1 * self.np_random.standard_normal(4)
        self.set_state(noise[:2], noise[2:])
        return self._get_obs()

    def step(self, action: np.ndarray):
        obs, *_, info = super().step(action)
        x, angle = obs[:2]
        distance = (x - 0.6 * np.sin(angle)) ** 2 + (0.6 * np.cos(angle) + 0.6) ** 2
        reward = np.exp(-distance / 0.36) - 0.01 * np.square(action, dtype=np.float64).sum()
        return obs, float(reward), False, False, info


class AliveBonusToTheEnd(gym.Wrapper):
    """Version 2 paid the alive bonus on the terminating step as well; version 5 does not."""

    alive_bonus_to_the_end = True  # ddpg_mve.py asks for it
    ends_are_the_tasks = True  # files that know rules of terminations ask for it

    def step(self, action: np.ndarray):
        obs, reward, terminated, truncated, info = self.env.step(action)
        if not self.unwrapped.is_healthy:
            reward += self.unwrapped._healthy_reward
        return obs, reward, terminated, truncated, info


class Masked(gym.ObservationWrapper):
    """The first `positions` numbers of the observation alone, float64; all else is the task's."""

    def __init__(self, env: gym.Env, positions: int):
        super().__init__(env)
        self.positions = positions
        self.observation_space = Box(-np.inf, np.inf, (positions,), np.float64)

    def observation(self, obs: np.ndarray) -> np.ndarray:
        return obs[: self.positions]


class PilcoCartPole(gym.Env):
    """x, v, θ̇, θ [4], θ = 0 hangs; r = exp(−8 d²) after the step, d metres from the tip to its place.

    Force of up to 10 N, held for 0.1 s (RK4 in ten steps); start N(0, 0.1² I). Cart and pole weigh 0.5 kg
    each, the pole is 0.5 m long, friction is 0.1 N/(m/s).
    """

    observation_space = Box(-np.inf, np.inf, (4,), np.float64)
    action_space = Box(-10.0, 10.0, (1,), np.float32)

    @staticmethod
    def slope(state: np.ndarray, force: float) -> np.ndarray:
        """d/dt of (x, v, θ̇, θ)."""
        length, m, M, b, g = 0.5, 0.5, 0.5, 0.1, 9.82
        _, v, w, angle = state.tolist()
        sin, cos = math.sin(angle), math.cos(angle)
        push = 2 * m * length * w**2 * sin + 3 * m * g * sin * cos + 4 * (force - b * v)
        turn = -3 * m * length * w**2 * sin * cos - 6 * (M + m) * g * sin - 6 * (force - b * v) * cos
        denominator = 4 * (M + m) - 3 * m * cos**2
        return np.array([v, push / denominator, turn / (length * denominator), w])

    def reward(self) -> float:
        x, _, _, angle = self.state.tolist()
        distance = math.hypot(x + 0.5 * math.sin(angle), 0.5 + 0.5 * math.cos(angle))
        return math.exp(-0.5 * (distance / 0.25) ** 2)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        self.state = 0.1 * self.np_random.standard_normal(4)
        return self.state.copy(), {}

    def step(self, action: np.ndarray):
        force, h = float(action[0]), 0.01
        for _ in range(10):
            k1 = self.slope(self.state, force)
            k2 = self.slope(self.state + h / 2 * k1, force)
            k3 = self.slope(self.state + h / 2 * k2, force)
            k4 = self.slope(self.state + h * k3, force)
            self.state = self.state + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return self.state.copy(), self.reward(), False, False, {}


def poplin(base: str, skip: int, height: float | None = None, **options) -> gym.Env:
    return Poplin(gym.make(base, **options), skip, height)


def poplin_swimmer(**options) -> gym.Env:
    return PoplinSwimmer(gym.make("Swimmer-v5", **options))


def pets_cheetah(**options) -> gym.Env:
    return PetsCheetah(gym.make("HalfCheetah-v5", reset_noise_scale=1e-3, **options).unwrapped)


def mbpo(base: str, **options) -> gym.Env:
    return AliveBonusToTheEnd(gym.make(base, **options).unwrapped)


def whole(base: str, **options) -> gym.Env:
    return gym.make(base, exclude_current_positions_from_observation=False, **options).unwrapped


def whole_walker(**options) -> gym.Env:
    return AliveBonusToTheEnd(whole("Walker2d-v5", **options))


def masked(base: str, positions: int, **options) -> gym.Env:
    return Masked(gym.make(base, **options).unwrapped, positions)


def truncated(*parts: str) -> dict[str, bool]:
    return {f"include_{part}_in_observation": False for part in parts}


UPRIGHT, OLD_FEET = {"terminate_when_unhealthy": False}, {"xml_file": "walker2d.xml"}
SUITES = {  # id: (entry point, its arguments)
    "poplin/Ant-v0": (poplin, {"base": "Ant-v5", "skip": 2, "height": 0.57} | UPRIGHT),
    "poplin/Cheetah-v0": (poplin, {"base": "HalfCheetah-v5", "skip": 1}),
    "poplin/Hopper-v0": (poplin, {"base": "Hopper-v5", "skip": 1, "height": 1.3} | UPRIGHT),
    "poplin/Swimmer-v0": (poplin_swimmer, {}),
    "poplin/Walker2d-v0": (poplin, {"base": "Walker2d-v5", "skip": 1, "height": 1.3} | UPRIGHT | OLD_FEET),
    "pets/Cheetah-v0": (pets_cheetah, {}),
    "mbpo/Ant-v0": (mbpo, {"base": "Ant-v5"} | truncated("cfrc_ext")),
    "mbpo/HalfCheetah-v0": (lambda **options: gym.make("HalfCheetah-v5", **options).unwrapped, {}),
    "mbpo/Hopper-v0": (mbpo, {"base": "Hopper-v5"}),
    "mbpo/Humanoid-v0": (
        mbpo,
        {"base": "Humanoid-v5"} | truncated("cinert", "cvel", "qfrc_actuator", "cfrc_ext"),
    ),
    "mve/HalfCheetah-v0": (whole, {"base": "HalfCheetah-v5"}),
    "mve/Swimmer-v0": (whole, {"base": "Swimmer-v5"}),
    "mve/Walker2d-v0": (whole_walker, OLD_FEET),
    "mbpo/Walker2d-v0": (mbpo, {"base": "Walker2d-v5"} | OLD_FEET),
    "masked/HalfCheetah-v0": (masked, {"base": "HalfCheetah-v5", "positions": 8}),
    "masked/Hopper-v0": (masked, {"base": "Hopper-v5", "positions": 5}),
    "masked/InvertedPendulum-v0": (masked, {"base": "InvertedPendulum-v5", "positions": 2}),
}
for name, (entry_point, arguments) in SUITES.items():
    gym.register(name, entry_point=entry_point, kwargs=arguments, max_episode_steps=1000)
gym.register("pets/CartPole-v0", entry_point=PetsCartPole, max_episode_steps=200)
gym.register("pilco/CartPole-v0", entry_point=PilcoCartPole, max_episode_steps=40)
