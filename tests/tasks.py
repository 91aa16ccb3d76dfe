"""Tiny tasks with known answers, and misbehaving ones: --env-id tests.tasks:<Name>-v0 from the root."""

import gymnasium as gym
import mujoco
import numpy as np

A, B, Q, RHO = 0.9, 0.5, 1.0, 0.1  # the linear-quadratic system of the closed-form tests


SLIDER = "<mujoco><worldbody><body><joint type='slide'/><geom size='1'/></body></worldbody></mujoco>"


class LQR(gym.Env):
    """s' = 0.9 s + 0.5 a, r = −(s² + 0.1 a²), s₀ uniform in [−2, 2], a in [−1, 3] (off-centre on purpose).

    The state is kept in MuJoCo's data, where an oracle can copy and restore it; the physics are these lines.
    """

    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float64)
    action_space = gym.spaces.Box(-1.0, 3.0, (1,), np.float32)
    bound = np.inf  # |s| beyond it terminates

    def __init__(self):
        self.model = mujoco.MjModel.from_xml_string(SLIDER)
        self.data = mujoco.MjData(self.model)

    @property
    def state(self):
        return self.data.qpos.copy()

    @state.setter
    def state(self, value):
        self.data.qpos[:] = value

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = self.np_random.uniform(-2, 2, (1,))
        return self.state.copy(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        reward = -float((Q * self.state**2 + RHO * action**2).sum())
        self.state = A * self.state + B * action
        return self.state.copy(), reward, bool(abs(self.state[0]) > self.bound), False, {}


class Cliff(LQR):
    """LQR that terminates where |s| > 1.5: most random episodes are short."""

    bound = 1.5


class Image(LQR):
    """Observations of shape (2, 3, 1) and type uint8."""

    observation_space = gym.spaces.Box(0, 255, (2, 3, 1), np.uint8)

    def reset(self, **options):
        super().reset(**options)
        return self.observation_space.low + 7, {}

    def step(self, action):
        _, reward, terminated, truncated, info = super().step(action)
        return self.observation_space.low + 7, reward, terminated, truncated, info


class NoisyReset(LQR):
    """The observation after a reset is 1000: it must never be stored as a successor."""

    def reset(self, **options):
        super().reset(**options)
        return np.array([1000.0]), {}


class SameArray(LQR):
    """Every observation is the same float32 array, overwritten at each step."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    array = np.zeros(1, np.float32)

    def reset(self, **options):
        self.array[:] = super().reset(**options)[0]
        return self.array, {}

    def step(self, action):
        obs, *rest = super().step(action)
        self.array[:] = obs
        return self.array, *rest


class LastStep(LQR):
    """Terminates on the very step at which the time limit of 5 strikes."""

    def reset(self, **options):
        self.data.time = 0
        return super().reset(**options)

    def step(self, action):
        self.data.time += 1
        obs, reward, _, truncated, info = super().step(action)
        return obs, reward, self.data.time == 5, truncated, info


class Ends(LQR):
    """Every step terminates."""

    bound = -1.0


class Counter(LQR):
    """The reward counts the steps of this instance: no state of the simulator tells it."""

    count = 0

    def step(self, action):
        self.count += 1
        obs, _, *rest = super().step(action)
        return obs, float(self.count), *rest


class Goal(LQR):
    """The reward knows a goal, drawn at each reset, that the simulator's state does not."""

    def reset(self, **options):
        result = super().reset(**options)
        self.goal = self.np_random.uniform(-2, 2)
        return result

    def step(self, action):
        obs, _, *rest = super().step(action)
        return obs, -abs(float(self.state[0]) - self.goal), *rest


class Noisy(LQR):
    """Observations carry noise of the task's own generator."""

    def step(self, action):
        obs, *rest = super().step(action)
        return obs + 0.1 * self.np_random.standard_normal(1), *rest


class NanReward(LQR):
    """The reward is NaN from the start."""

    def step(self, action):
        obs, _, *rest = super().step(action)
        return obs, float("nan"), *rest


class LateNan(LQR):
    """Rewards turn infinite after 120 steps of one instance."""

    def step(self, action):
        self.data.time += 1
        obs, reward, *rest = super().step(action)
        return obs, reward if self.data.time < 120 else float("inf"), *rest


class NanObservation(LQR):
    def step(self, action):
        obs, *rest = super().step(action)
        return obs * np.nan, *rest


class WideNan(LQR):
    """Forty observations, one of them NaN."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (40,), np.float64)

    def reset(self, **options):
        super().reset(**options)
        return np.linspace(0, 1, 40), {}

    def step(self, action):
        _, *rest = super().step(action)
        return np.where(np.arange(40) == 7, np.nan, 0.123456789), *rest


class Huge(LQR):
    """Finite rewards so large that float32 squares overflow: the losses diverge."""

    def step(self, action):
        obs, _, *rest = super().step(action)
        return obs, 3e38, *rest


class DictObservation(LQR):
    observation_space = gym.spaces.Dict({"state": LQR.observation_space})


class DiscreteAction(LQR):
    action_space = gym.spaces.Discrete(3)


class IntegerAction(LQR):
    action_space = gym.spaces.Box(-2, 2, (1,), np.int64)


class UnboundedAction(LQR):
    action_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)


class PointAction(LQR):
    action_space = gym.spaces.Box(1, 1, (1,), np.float32)


class MatrixAction(LQR):
    """Actions of shape (2, 2) with bounds of awkward rounding; their mean drives the system."""

    action_space = gym.spaces.Box(
        np.float32([[-0.1, 0.3], [-1.7, 1.9]]), np.float32([[0.7, 0.9], [1.1, 2.3]])
    )

    def step(self, action):
        assert self.action_space.contains(action), action
        self.state = A * self.state + B * action.mean(dtype=np.float64)
        return self.state.copy(), -float(self.state[0] ** 2), False, False, {}


class Shuttle(gym.Env):
    """A goal task: x ← x + 0.1 a, reward −1 unless within 0.05 of the goal."""

    observation_space = gym.spaces.Dict(
        {
            "observation": gym.spaces.Box(-np.inf, np.inf, (2,), np.float64),
            "achieved_goal": gym.spaces.Box(-np.inf, np.inf, (1,), np.float64),
            "desired_goal": gym.spaces.Box(-np.inf, np.inf, (1,), np.float64),
        }
    )
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    distance_threshold, reward_type = 0.05, "sparse"

    def observe(self):
        return {
            "observation": np.array([0.0, self.x]),
            "achieved_goal": np.array([self.x]),
            "desired_goal": np.array([self.goal]),
        }

    def compute_reward(self, achieved, desired, info):
        return -(np.linalg.norm(achieved - desired, axis=-1) > self.distance_threshold).astype(np.float64)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.goal, self.time = 0.0, self.np_random.uniform(-1, 1), 0
        return self.observe(), {}

    def step(self, action):
        self.x, self.time = self.x + 0.1 * float(np.mean(action)), self.time + 1
        obs = self.observe()
        return (
            obs,
            float(self.compute_reward(obs["achieved_goal"], obs["desired_goal"], {})),
            False,
            False,
            {},
        )


class Elsewhere(Shuttle):
    """What is achieved cannot be observed."""

    def observe(self):
        return super().observe() | {"achieved_goal": np.array([self.x + 1])}


class OtherReward(Shuttle):
    def compute_reward(self, achieved, desired, info):
        return 2 * super().compute_reward(achieved, desired, info)


class GoalEnds(Shuttle):
    def step(self, action):
        obs, reward, _, truncated, info = super().step(action)
        return obs, reward, self.time == 3, truncated, info


class GoalDiscrete(Shuttle):
    action_space = gym.spaces.Discrete(3)


class GoalNan(Shuttle):
    """A reward that is no number, from step 30 of an episode on."""

    def step(self, action):
        obs, reward, *rest = super().step(action)
        return obs, float("nan") if self.time > 30 else reward, *rest


class Push(gym.Env):
    """A body of 4 kg on rails is pushed with up to 2 N: s = (x, v), r = v after 0.05 s, damping 1 N s/m."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)
    motor = "<motor joint='rail' gear='2'/>"

    def __init__(self):
        body = "<body name='car'><joint name='rail' type='slide' axis='1 0 0' damping='1'/>"
        world = f"<worldbody>{body}<geom size='0.1' mass='4'/></body></worldbody>"
        text = f"<mujoco><option timestep='0.05'/>{world}<actuator>{self.motor}</actuator></mujoco>"
        self.model = mujoco.MjModel.from_xml_string(text)
        self.data = mujoco.MjData(self.model)

    def observe(self):
        return np.concatenate([self.data.qpos, self.data.qvel])

    def reward(self, before):
        return float(self.data.qvel[0])

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        mujoco.mj_resetData(self.model, self.data)
        self.data.qpos[:] = self.np_random.uniform(-1, 1, 1)
        mujoco.mj_forward(self.model, self.data)
        return self.observe(), {}

    def step(self, action):
        before, self.data.ctrl[:] = self.data.body("car").xpos[0], action
        mujoco.mj_step(self.model, self.data)
        return self.observe(), self.reward(before), False, False, {}


class PushRounded(Push):
    """Observations in float32."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)

    def observe(self):
        return np.float32(super().observe())


class PushLater(Push):
    """The action is the rate of the force: an activation of MuJoCo's is state, too."""

    motor = "<general joint='rail' dyntype='integrator' gainprm='5'/>"


class PushDisplaced(Push):
    """r = Δx / 0.05 by the body's place in the world, which MuJoCo keeps from before its last step."""

    def reward(self, before):
        return float(self.data.body("car").xpos[0] - before) / 0.05


for task in (
    Push, PushRounded, PushLater, PushDisplaced,
    LQR, Cliff, Ends, Counter, Goal, Noisy, Image, NoisyReset, SameArray, NanReward, LateNan, NanObservation,
    WideNan,
    Huge, DictObservation, DiscreteAction, IntegerAction, UnboundedAction, PointAction, MatrixAction,
):  # fmt: skip
    gym.register(f"{task.__name__}-v0", entry_point=task, max_episode_steps=20)
gym.register("LastStep-v0", entry_point=LastStep, max_episode_steps=5)
for task in (Shuttle, Elsewhere, OtherReward, GoalEnds, GoalDiscrete, GoalNan):
    gym.register(f"{task.__name__}-v0", entry_point=task, max_episode_steps=50)
