"""Tasks with the habits, good and bad, of users' own: --env-id tests.odd_tasks:<Name>-v0 from the root."""

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box

from tests.tasks import Shuttle

HUGE = np.finfo(np.float32).max


class Point(gym.Env):
    """x ← x + 0.1 a, reward −x²; observes x and the share of twenty steps that is over."""

    observation_space = Box(-np.inf, np.inf, (2,), np.float32)
    action_space = Box(-1, 1, (1,), np.float32)
    taken = 0  # steps of this instance

    def look(self):
        return np.array([self.x, self.t / 20], np.float32)

    def start(self, generator):
        self.x, self.t = float(generator.uniform(-1, 1)), 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.start(self.np_random)
        return self.look(), {}

    def pay(self, action):
        self.taken += 1
        self.x, self.t = self.x + 0.1 * float(np.ravel(action)[0]), self.t + 1
        return -(self.x**2)

    def step(self, action):
        reward = self.pay(action)
        return self.look(), reward, False, False, {}


class RewardArray(Point):
    """The reward as an array of one number."""

    def pay(self, action):
        return np.array([super().pay(action)])


class TwoRewards(Point):
    def pay(self, action):
        return np.array([super().pay(action), -0.1], np.float32)


class Endless(Point):
    """Never ends, and is registered without a limit."""

    def pay(self, action):
        if self.taken > 200_000:
            raise RuntimeError("somebody should have ended this")
        return super().pay(action)


class WholeNumbers(Point):
    """Declares whole numbers, observes fractions."""

    observation_space = Box(-10, 10, (2,), np.int32)


class TooWide(Point):
    """Declares two numbers, observes three."""

    def look(self):
        return np.append(super().look(), np.float32(1))


class WiderLater(Point):
    """The first observation has the declared size, those after steps one number more."""

    def step(self, action):
        obs, *rest = super().step(action)
        return np.append(obs, np.float32(1)), *rest


class OldReset(Point):
    """The old API: reset() knows no seed and returns the observation alone."""

    def reset(self):
        self.x, self.t = 0.5, 0
        return self.look()


class OldResetHalf(Point):
    """reset(seed, options), but the observation alone, whose two numbers could be taken for (obs, info)."""

    def reset(self, *, seed=None, options=None):
        return super().reset(seed=seed)[0]


class OldStep(Point):
    """step returns four values."""

    def step(self, action):
        return self.look(), self.pay(action), False, {}


class OldStepEndless(OldStep):
    """The same without a limit, whose wrapper would notice."""


class NoInfo(Point):
    def reset(self, *, seed=None, options=None):
        return super().reset(seed=seed)[0], None


class HugeActions(Point):
    """Bounded by the largest float32, as by somebody who did not want bounds."""

    action_space = Box(-HUGE, HUGE, (1,), np.float32)


class HugeDoubles(Point):
    action_space = Box(-1e300, 1e300, (1,), np.float64)


class HalfInfinite(Point):
    action_space = Box(np.float32([0, -1]), np.float32([np.inf, 1]))


class Doubles(Point):
    """Actions in float64."""

    action_space = Box(-1, 1, (1,), np.float64)


class Scalars(Point):
    """Observation and action without a dimension."""

    observation_space = Box(-np.inf, np.inf, (), np.float64)
    action_space = Box(-1, 1, (), np.float32)

    def look(self):
        return np.float64(self.x)


class SameBuffer(Point):
    """Writes all observations into one array, and zeros into the action."""

    def __init__(self):
        self.array = np.zeros(2, np.float32)

    def look(self):
        self.array[:] = super().look()
        return self.array

    def step(self, action):
        answer = super().step(action)
        action *= 0
        return answer


class OnlyOne(Point):
    """Can be opened once, as a robot."""

    is_open = False

    def __init__(self):
        if OnlyOne.is_open:
            raise RuntimeError("worker 0 is still in use")
        OnlyOne.is_open = True

    def close(self):
        OnlyOne.is_open = False


class Crash(Point):
    """The simulator raises in the 130th step of an instance."""

    def pay(self, action):
        if self.taken == 129:
            raise RuntimeError("unstable: QACC at DOF 0")
        return super().pay(action)


class NeedsOptions(Point):
    def reset(self, *, seed=None, options=None):
        self.goal = options["goal"]
        return super().reset(seed=seed)


class NeedsKwargs(Point):
    def __init__(self, force, places=()):
        self.force, self.places = force, places

    def pay(self, action):
        return super().pay(self.force * np.asarray(action))


class LegacyRandom(Point):
    """Draws from NumPy's old generator, which keeps every second normal number for later."""

    def reset(self, *, seed=None, options=None):
        if seed is not None or self._np_random is None:
            self._np_random = np.random.RandomState(seed)
        self.x, self.t = 0.3 * float(self._np_random.randn()), 0
        return self.look(), {}


class LegacyFresh(Point):
    """An old generator, made anew at every reset."""

    def reset(self, *, seed=None, options=None):
        self._np_random = np.random.RandomState(seed)
        self.start(self._np_random)
        return self.look(), {}


class Fresh(Point):
    """A new generator at every reset."""

    def reset(self, *, seed=None, options=None):
        self.np_random, _ = gym.utils.seeding.np_random(seed)
        self.start(self.np_random)
        return self.look(), {}


class Mersenne(Point):
    """A generator of another kind than Gymnasium's, whose state is an array."""

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.np_random = np.random.Generator(np.random.MT19937(seed))
        self.start(self.np_random)
        return self.look(), {}


class IgnoresSeed(Point):
    def reset(self, *, seed=None, options=None):
        self.start(np.random.default_rng())
        return self.look(), {}


class Spike(Point):
    """A velocity that reads 1e8 once in a while."""

    def look(self):
        return np.array([self.x, 1e8 if self.np_random.random() < 0.02 else 0], np.float32)


class NoneAtEnd(Point):
    """Ends after ten steps with None for an observation."""

    def step(self, action):
        obs, reward, *_ = super().step(action)
        return (None if self.t == 10 else obs), reward, self.t == 10, False, {}


class Flags(Point):
    """One flag is an array, the other a number."""

    def step(self, action):
        obs, reward, *_ = super().step(action)
        return obs, np.float16(reward), np.array([self.t == 7]), 0, {}


class SwappedFlag(Point):
    """Reward and terminated have changed places."""

    def step(self, action):
        obs, reward, *_ = super().step(action)
        return obs, False, reward, False, {}


class Lists(Point):
    """Observations are lists, rewards whole numbers."""

    def look(self):
        return [self.x, self.t]

    def step(self, action):
        obs, *_ = super().step(action)
        return obs, 1, False, False, {}


class Words(Point):
    """Observes a dictionary, declares a box."""

    def look(self):
        return {"x": self.x}


class Dictionary(Point):
    observation_space = gym.spaces.Dict({"position": Box(-1, 1, (3,)), "velocity": Box(-1, 1, (2,))})


class OwnStatistics(Point):
    """Its info has an entry named episode."""

    def step(self, action):
        return *super().step(action)[:4], {"episode": "third"}


class CloseRaises(Point):
    def close(self):
        raise RuntimeError("no connection")


class WholeGoals(Shuttle):
    """A goal task that declares whole numbers and observes fractions."""

    observation_space = gym.spaces.Dict(
        {name: Box(-9, 9, space.shape, np.int64) for name, space in Shuttle.observation_space.items()}
    )


class GoalTooWide(Shuttle):
    def observe(self):
        return super().observe() | {"desired_goal": np.zeros(2)}


class GoalCrash(Shuttle):
    """Raises in its 160th step: the first look at the task, of 150, is over by then."""

    taken = 0

    def step(self, action):
        self.taken += 1
        if self.taken == 160:
            raise RuntimeError("unstable")
        return super().step(action)


class GoalArrays(Shuttle):
    """Reward and flags are arrays of one element."""

    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        return obs, np.array([reward]), np.array([terminated]), int(truncated), info


class GoalOldReset(Shuttle):
    def reset(self):
        return super().reset()[0]


class GoalCloseRaises(Shuttle):
    def close(self):
        raise RuntimeError("no connection")


class GoalOffset(Shuttle):
    """Needs an argument: how far goals are moved."""

    def __init__(self, offset):
        self.offset = offset

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.goal += self.offset
        return self.observe(), {}


UNLIMITED = (Endless, OldStepEndless)
for task in [t for t in list(globals().values()) if isinstance(t, type) and issubclass(t, Point | Shuttle)]:
    steps = 50 if issubclass(task, Shuttle) else None if task in UNLIMITED else 20
    if task is not Shuttle:
        gym.register(f"{task.__name__}-v0", entry_point=task, max_episode_steps=steps)
