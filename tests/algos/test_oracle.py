"""The simulator as a model: exact to the bit, for every task, and no hand on the task that is trained on."""

import gymnasium as gym
import mujoco
import numpy as np
import pytest
import torch

from tests.algos.test_math import GAMMA, K, exact_critic, recorded
from tests.conftest import differing, load, long, run, tiny
from tests.every_file.test_bad_input import fails
from tests.tasks import RHO, A, B, Q

ove = load("sac_ove")
NAMES = "InvertedPendulum InvertedDoublePendulum Reacher Pusher Swimmer HalfCheetah Hopper Walker2d".split()
NAMES += ["Ant", "Humanoid"]
VARIANTS = {  # constructor arguments that the formulas must respect
    "InvertedPendulum": [{"frame_skip": 1}],
    "InvertedDoublePendulum": [{"frame_skip": 3, "healthy_reward": 3.0}],
    "Reacher": [{"reward_dist_weight": 2.0, "reward_control_weight": 0.3}],
    "Pusher": [{"reward_near_weight": 0.9, "reward_dist_weight": 2.0, "reward_control_weight": 0.7}],
    "Swimmer": [
        {"exclude_current_positions_from_observation": False, "frame_skip": 2, "forward_reward_weight": 3.0},
        {"ctrl_cost_weight": 0.5},
    ],
    "HalfCheetah": [
        {"exclude_current_positions_from_observation": False, "frame_skip": 3},
        {"ctrl_cost_weight": 2.0},
    ],
    "Hopper": [
        {"healthy_z_range": (0.9, 1.24), "healthy_angle_range": (-0.05, 0.1), "frame_skip": 7},
        {"terminate_when_unhealthy": False, "healthy_reward": 4.0},
        {"healthy_state_range": (-1.0, 1.0), "exclude_current_positions_from_observation": False},
    ],
    "Walker2d": [
        {"healthy_z_range": (1.1, 1.3), "exclude_current_positions_from_observation": False},
        {"healthy_angle_range": (-0.1, 0.1), "forward_reward_weight": 2.0, "frame_skip": 1},
    ],
    "Ant": [
        {"include_cfrc_ext_in_observation": False, "exclude_current_positions_from_observation": False},
        {"healthy_z_range": (0.5, 0.8), "contact_force_range": (-0.1, 0.2), "contact_cost_weight": 0.1},
        {"main_body": 2, "frame_skip": 2, "terminate_when_unhealthy": False},
    ],
    "Humanoid": [
        {"include_cinert_in_observation": False, "include_qfrc_actuator_in_observation": False},
        {"include_cvel_in_observation": False, "include_cfrc_ext_in_observation": False, "frame_skip": 2},
        {"exclude_current_positions_from_observation": False, "healthy_z_range": (1.3, 1.5)},
        {"contact_cost_weight": 0.1, "contact_cost_range": (0, 2)},
    ],
}  # fmt: skip
CASES = [(name, {}) for name in NAMES] + [(name, kwargs) for name in NAMES for kwargs in VARIANTS[name]]


@pytest.fixture
def task_id(request):
    """The id of a Gymnasium task with other constructor arguments."""
    registered = []

    def get(name: str, kwargs: dict) -> str:
        if not kwargs:
            return f"{name}-v5"
        registered.append(f"Other{name}-v5")
        entry = gym.spec(f"{name}-v5").entry_point
        gym.register(registered[-1], entry_point=entry, kwargs=kwargs, max_episode_steps=1000)
        return registered[-1]

    yield get
    for name in registered:
        gym.registry.pop(name)


def recording(env_id: str, steps: int, threads: int = 2, seed: int = 0):
    """A simulator and what `steps` random steps of a task gave: rows before, actions, then the four after."""
    env, rng = ove.make_env(env_id, raw=True), np.random.default_rng(seed)  # raw: not rounded to float32
    simulator, log = ove.Simulator(env_id, env, threads), []
    env.reset(seed=seed)
    for _ in range(steps):
        row, action = simulator.row(simulator.live), rng.uniform(-1, 1, env.action_space.shape)
        obs, reward, terminated, truncated, _ = env.step(action.astype(np.float32))
        log.append((row, action.astype(np.float32), simulator.row(simulator.live), obs, reward, terminated))
        if terminated or truncated:
            env.reset()
    return simulator, *(np.array(column) for column in zip(*log, strict=True))


def assert_exact(simulator, rows, actions, after, obs, reward, terminated):
    """Observations, rewards and ends to the bit; so the state, but for the warm start that rollout keeps."""
    ours = simulator.step(rows, actions)
    physics = slice(0, simulator.full) if simulator.task and not simulator.task.fields else slice(None)
    assert np.array_equal(ours[0][:, physics], after[:, physics])
    for real, found in zip((obs, reward, terminated), ours[1:], strict=True):
        assert np.array_equal(found, real)


@pytest.mark.parametrize(("name", "kwargs"), CASES)
def test_logged_actions_reproduce_the_task_bit_for_bit(name, kwargs, task_id):
    """10 000 random steps of each task, whole episodes of them; 1 500 with other constructor arguments."""
    recorded_steps = recording(task_id(name, kwargs), 1_500 if kwargs else 10_000)
    assert (
        recorded_steps[0].task
        is ove.TASKS[next(key for key in ove.TASKS if key in type_module(recorded_steps[0]))]
    )
    assert_exact(*recorded_steps)
    endless = (
        name in ("Reacher", "Pusher", "Swimmer", "HalfCheetah")
        or kwargs.get("terminate_when_unhealthy") is False
    )
    assert endless != recorded_steps[-1].any()


def type_module(simulator) -> str:
    return type(simulator.live).__module__


@pytest.mark.parametrize("name", NAMES)
def test_whole_episode_in_closed_loop(name, monkeypatch):
    """Only the first state is given: a whole episode of actions (at most 1 000) ends in the same bits.

    In Python's loop over rows, which hands the warm start on; mujoco.rollout does not return it.
    """
    key = next(key for key in ove.TASKS if key in gym.spec(f"{name}-v5").entry_point)
    fields = ove.TASKS[key].fields or ("xpos",)
    monkeypatch.setitem(ove.TASKS, key, ove.TASKS[key]._replace(fields=fields))
    simulator, rows, actions, *real = recording(f"{name}-v5", 1_000)
    limit = gym.spec(f"{name}-v5").max_episode_steps
    last = min([limit - 1, *np.flatnonzero(real[-1])])
    row = rows[:1]
    for t in range(last + 1):
        row, *seen = simulator.step(row, actions[t : t + 1])
        for found, expected in zip((row, *seen), real, strict=True):
            assert np.array_equal(found[0], expected[t]), t


@pytest.mark.parametrize("name", NAMES)
def test_private_copy_reproduces_the_task_bit_for_bit(name, monkeypatch):
    """The path for tasks without formulas, on tasks that have them."""
    for key in list(ove.TASKS):
        monkeypatch.delitem(ove.TASKS, key)
    simulator, *steps = recording(f"{name}-v5", 300)
    assert simulator.task is None
    assert_exact(simulator, *steps)


@pytest.mark.parametrize("name", ["HalfCheetah", "Ant", "InvertedDoublePendulum"])
def test_threads_and_order_change_nothing(name):
    """One row at a time in one thread, a shuffled batch in three: the same bits."""
    one, rows, actions, *_ = recording(f"{name}-v5", 61, threads=1)
    three = ove.Simulator(f"{name}-v5", ove.make_env(f"{name}-v5"), 3)
    order = np.random.default_rng(1).permutation(len(rows))
    alone = [one.step(rows[i : i + 1], actions[i : i + 1]) for i in order]
    for column, batch in zip(zip(*alone, strict=True), three.step(rows[order], actions[order]), strict=True):
        assert np.array_equal(np.concatenate(column), batch)


@pytest.mark.parametrize("name", ["InvertedPendulum", "HalfCheetah", "Hopper", "Walker2d", "Swimmer"])
def test_warm_start_and_float64_matter(name):
    """Without the warm start one step errs by less than 1e-12, from float32 states by up to 1e-3."""
    simulator, rows, actions, after, *_ = recording(f"{name}-v5", 300)
    cold, coarse = rows.copy(), rows.astype(np.float32).astype(np.float64)
    cold[:, simulator.full :] = 0
    physics = slice(1, simulator.full)
    error = [np.abs(simulator.step(x, actions)[0] - after)[:, physics].max() for x in (rows, cold, coarse)]
    assert error[0] == 0 and error[1] < 1e-12 and 1e-9 < error[2] < 1e-3


def test_later_imagined_steps_stay_with_the_task():
    """Closed loop from one stored state: ten steps of HalfCheetah without warm starts differ by < 1e-9."""
    simulator, rows, actions, after, *_ = recording("HalfCheetah-v5", 60)
    at, actual = np.arange(0, 50), after[:, 1 : simulator.full]
    state = rows[at]
    for t in range(10):
        state = simulator.step(state, actions[at + t])[0]
        assert np.abs(state[:, 1 : simulator.full] - actual[at + t]).max() < 1e-9


def test_task_in_training_is_only_read():
    env = ove.make_env("Hopper-v5")
    env.reset(seed=4)
    task, kind = env.unwrapped, mujoco.mjtState.mjSTATE_INTEGRATION

    def everything():
        state = np.empty(mujoco.mj_stateSize(task.model, kind))
        mujoco.mj_getState(task.model, task.data, state, kind)
        return [state, task.data.xpos.copy(), task.data.qacc.copy(), task.data.cfrc_ext.copy()]

    for _ in range(5):
        env.step(env.action_space.sample())
    before, generator = everything(), str(task.np_random.bit_generator.state)
    simulator = ove.Simulator("Hopper-v5", env, 2)
    row = simulator.row(task)
    simulator.step(np.repeat(row[None], 8, 0), np.ones((8, 3), np.float32))
    assert all(np.array_equal(a, b) for a, b in zip(before, everything(), strict=True))
    assert generator == str(task.np_random.bit_generator.state)


class Halved(gym.Wrapper):
    def step(self, action):
        obs, reward, *rest = self.env.step(action / 2)
        return obs, 10 * reward, *rest


def test_wrapped_task_is_stepped_as_a_whole():
    """A wrapper that changes actions and rewards: no formula knows of it, the private copy does."""
    gym.register(
        "Halved-v5", lambda **kwargs: Halved(gym.make("Hopper-v5", **kwargs)), max_episode_steps=1000
    )
    simulator, *steps = recording("Halved-v5", 200)
    gym.registry.pop("Halved-v5")
    assert simulator.task is None
    assert_exact(simulator, *steps)


def test_wrapper_of_a_well_known_class_is_not_taken_for_ours():
    entry = lambda: gym.wrappers.TransformAction(gym.make("HalfCheetah-v5").unwrapped, lambda a: a / 2, None)
    gym.register("HalfForce-v5", entry, max_episode_steps=1000)
    simulator, *steps = recording("HalfForce-v5", 100)
    gym.registry.pop("HalfForce-v5")
    assert simulator.task is None
    assert_exact(simulator, *steps)


MISTAKES = {
    "Pendulum-v1": "--env-id Pendulum-v1: must be a task that holds MuJoCo's model and data (--horizon 0",
    "tests.tasks:Counter-v0": "must be a task whose reward follows from simulator state and action",
    "tests.tasks:Goal-v0": "must be a task whose reward follows from simulator state and action",
    "tests.tasks:Noisy-v0": "must be a task whose observation follows from simulator state and action",
}


@pytest.mark.parametrize("env_id", MISTAKES)
def test_task_that_cannot_be_simulated_is_refused(env_id, tmp_path, capsys, monkeypatch):
    flags = tiny("sac_ove", "--env-id", env_id, "--runs-dir", tmp_path / "runs")
    assert MISTAKES[env_id] in fails("sac_ove", flags, capsys, monkeypatch)
    assert not (tmp_path / "runs").exists()
    assert (run("sac_ove", tmp_path, "--env-id", env_id, "--horizon", 0) / "final.pt").exists()


def test_unlogged_comparison(tmp_path, capsys, monkeypatch):
    flags = tiny("sac_ove", "--diagnose-every", 30, "--runs-dir", tmp_path / "runs")
    error = fails("sac_ove", flags, capsys, monkeypatch)
    assert "--diagnose-every 30: must be a multiple of --log-every 20" in error


def test_states_larger_than_memory(monkeypatch):
    """The states are counted beside the transitions."""
    env = ove.make_env("HalfCheetah-v5")
    simulator, row_bytes = ove.Simulator("HalfCheetah-v5", env, 1), 2 * 4 * (2 * 17 + 6 + 2 + 1)
    room = 1000.5 * (row_bytes + 2 * 8 * simulator.width) / 0.9
    monkeypatch.setattr(ove, "available_memory", lambda device: room)
    buffer = ove.SimulatorReplay(1000, 17, 6, torch.device("cpu"), simulator)
    stored = buffer.rows.nbytes + buffer.episode.nbytes + buffer.states.nbytes
    assert 2 * stored == 1000 * (row_bytes + 2 * 8 * simulator.width)
    with pytest.raises(ove.BadInput, match="--buffer-size 1001: must be at most 1000 in the memory"):
        ove.SimulatorReplay(1001, 17, 6, torch.device("cpu"), simulator)


@pytest.mark.parametrize("env_id", ["InvertedPendulum-v5", "tests.tasks:Cliff-v0"])
def test_replay_keeps_the_state_after_each_step_and_before_the_reset(env_id, tmp_path):
    """The positions in the stored states are those in next_obs, at every transition and every end."""
    state = torch.load(run("sac_ove", tmp_path, "--env-id", env_id) / "final.pt", weights_only=True)["buffer"]
    rows, states = state["rows"], state["states"]
    n, m = (4, 1) if env_id.startswith("Inv") else (1, 1)
    assert states.dtype == torch.float64 and rows[:, -1].sum() > 10
    assert torch.equal(states[:, 1 : 1 + n].float(), rows[:, n + m + 1 : -1])


# ---------------------------------------------------------------- the agent's targets


def lqr_buffer(agent, terminated: bool = False):
    """Replay of the pair (1, 0.3) of the linear-quadratic system, 16 times, with the simulator's state."""
    env = ove.make_env(agent.args.env_id)
    buffer = agent.make_buffer(16, env)
    buffer.rows = buffer.rows.double()
    env.unwrapped.state = A + B * 0.3
    for _ in range(16):
        buffer.add([1.0], [0.3], -(Q + RHO * 0.3**2), [A + B * 0.3], terminated, 0)
    buffer.rows[:] = torch.tensor([1.0, 0.3, -(Q + RHO * 0.3**2), A + B * 0.3, terminated])
    buffer.rows[:, 2:4] = torch.tensor([-(Q + RHO * 0.3**2), A + B * 0.3], dtype=torch.float64)
    return buffer


def lqr_target(monkeypatch, horizon: int, critic, *flags: object, terminated: bool = False, env_id="LQR-v0"):
    """What update() regresses on for that pair, with policy a = −K s in the task's units and α → 0."""
    options = [
        "--horizon",
        horizon,
        "--gamma",
        GAMMA,
        "--init-alpha",
        1e-8,
        "--env-id",
        f"tests.tasks:{env_id}",
    ]
    agent = ove.Agent(ove.parse(tiny("sac_ove", *options, *flags)), 1, 1, torch.device("cpu"))
    agent.actor.double(), agent.critic.double(), agent.critic_target.double()
    real = agent.actor.sample
    policy = lambda obs: ((-K * obs - 1) / 2, torch.zeros(len(obs), dtype=torch.float64))
    agent.actor.sample = lambda obs: policy(obs) if not torch.is_grad_enabled() else real(obs)
    agent.critic_target.forward = lambda obs, action: torch.stack([critic(obs, 2 * action + 1)] * 2)
    calls = recorded(monkeypatch, ove, "twin_loss")
    agent.update(lqr_buffer(agent, terminated), 61)
    return calls[0][1][0].item()


@pytest.mark.parametrize("horizon", [0, 1, 2, 5, 30])
@pytest.mark.parametrize("flags", [(), ("--num-particles", 3)])
def test_lqr_target_is_exact_for_every_horizon(monkeypatch, horizon, flags):
    assert lqr_target(monkeypatch, horizon, exact_critic, *flags) == pytest.approx(-2.8124454383, abs=1e-7)


@pytest.mark.parametrize(
    ("horizon", "expected"), [(0, -1.009), (1, -2.017126), (2, -2.4617095660), (5, -2.7823641830)]
)
def test_lqr_zero_critic_leaves_the_rewards(monkeypatch, horizon, expected):
    target = lqr_target(monkeypatch, horizon, lambda obs, action: 0 * obs[:, 0])
    assert target == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("horizon", [1, 4])
def test_ends_real_and_simulated(monkeypatch, horizon):
    """A terminated pair is worth its reward; a first imagined step that ends pays r̂₀ and nothing after it."""
    assert lqr_target(monkeypatch, horizon, exact_critic, terminated=True) == pytest.approx(-1.009, abs=1e-7)
    target = lqr_target(monkeypatch, horizon, exact_critic, env_id="Ends-v0")
    assert target == pytest.approx(-2.017126, abs=1e-7)


def test_ended_rows_stand_still(monkeypatch):
    """Rows that ended are not simulated on: their observation stays, their reward is 0, their end 1."""
    agent = ove.Agent(
        ove.parse(tiny("sac_ove", "--env-id", "tests.tasks:Ends-v0", "--horizon", 3)),
        1,
        1,
        torch.device("cpu"),
    )
    buffer = agent.make_buffer(4, ove.make_env("tests.tasks:Ends-v0"))
    for _ in range(4):
        buffer.add([1.0], [0.0], 0.0, [0.0], False, 0)
    sizes, step = [], buffer.simulator.step
    monkeypatch.setattr(
        buffer.simulator, "step", lambda rows, action: (sizes.append(len(rows)), step(rows, action))[1]
    )
    ended = torch.tensor([0.0, 1.0, 0.0, 0.0])
    rollout = agent.simulate(torch.zeros(4, 1), ended, buffer, torch.arange(4))
    assert sizes == [3]  # all of them end in their first step
    assert torch.equal(torch.stack(rollout.done), torch.ones(3, 4))
    assert (rollout.reward[0] == 0).tolist() == [False, True, False, False]
    assert not torch.stack(rollout.reward[1:]).any()
    assert torch.equal(rollout.obs[1], rollout.obs[3])


def test_each_row_starts_from_its_own_transition():
    """The first simulated observation is one step from the state stored in that place of the replay."""
    agent = ove.Agent(
        ove.parse(tiny("sac_ove", "--env-id", "Hopper-v5", "--horizon", 2)), 11, 3, torch.device("cpu")
    )
    env = ove.make_env("Hopper-v5")
    buffer, obs = agent.make_buffer(40, env), env.reset(seed=0)[0]
    for _ in range(40):
        action = agent.act(obs.astype(np.float32))
        next_obs, reward, terminated, _, _ = env.step(action)
        buffer.add(obs, action, reward, next_obs, terminated, 0)
        obs = env.reset()[0] if terminated else next_obs
    at = torch.tensor([3, 17, 3, 30])
    rollout = agent.simulate(buffer[at].next_obs, torch.zeros(4), buffer, at)
    for i, place in enumerate(at):
        row, action = buffer.states[place].numpy(), rollout.action[0][i].numpy()
        assert np.allclose(row[2 : simulator_positions(buffer)], buffer[at].next_obs[i, :5].numpy())
        _, expected, reward, _ = buffer.simulator.step(row[None], action[None])
        assert torch.equal(rollout.obs[1][i], torch.tensor(expected[0], dtype=torch.float32))
        assert rollout.reward[0][i] == torch.tensor(reward[0], dtype=torch.float32)


def simulator_positions(buffer) -> int:
    """Where the positions end in a row that begins with the time."""
    return 1 + buffer.simulator.model.nq


# ---------------------------------------------------------------- the actor's gradient through the simulator


def returns(simulator, row: np.ndarray, actions: np.ndarray, weight: np.ndarray) -> float:
    """Σ 0.9^t r_t plus weight · last observation of open-loop actions [H, 1, m] from one row."""
    total, rows = 0.0, row
    for t, action in enumerate(actions):
        rows, obs, reward, _ = simulator.step(rows, action)
        total += 0.9**t * reward[0]
    return float(total + obs[0] @ weight)


def chained(simulator, row: np.ndarray, actions: torch.Tensor, weight: np.ndarray) -> torch.Tensor:
    """The same by one Jacobian after the other."""
    x, rows, total = simulator.model.nq + simulator.model.nv, row, 0.0
    state = torch.from_numpy(row[:, 1 : 1 + x])
    for t, action in enumerate(actions):
        rows, _, values, jacobian = simulator.differentiate(rows, action.detach().numpy())
        values = ove.Simulated.apply(state, action, torch.from_numpy(values), torch.from_numpy(jacobian))
        state, obs, reward = values.split([x, values.shape[1] - x - 1, 1], 1)
        total = total + 0.9**t * reward[0, 0]
    return total + obs[0] @ torch.from_numpy(weight)


@pytest.mark.parametrize(
    "name", ["InvertedPendulum", "InvertedDoublePendulum", "Swimmer", "HalfCheetah", "Hopper"]
)
def test_gradient_of_a_return_is_that_of_whole_rollouts(name):
    """Five steps away from contacts: the chain of Jacobians against central differences of whole rollouts."""
    env, rng = ove.make_env(f"{name}-v5"), np.random.default_rng(0)
    env.reset(seed=0)
    for _ in range(3):
        env.step(rng.uniform(-0.3, 0.3, env.action_space.shape).astype(np.float32))
    simulator = ove.Simulator(f"{name}-v5", env, 1)
    row = simulator.row(simulator.live)[None].copy()
    if name in ("Hopper", "HalfCheetah"):
        row[0, 2] += 1  # a metre above the ground
    actions = torch.tensor(rng.uniform(-0.5, 0.5, (5, 1, *env.action_space.shape)), requires_grad=True)
    weight = np.linspace(0.5, 1, env.observation_space.shape[0])
    value = chained(simulator, row, actions, weight)
    assert value.item() == pytest.approx(returns(simulator, row, actions.detach().numpy(), weight), abs=1e-9)
    (gradient,) = torch.autograd.grad(value, actions)
    numeric = np.zeros(actions.shape)
    for place in np.ndindex(*actions.shape):
        moved = [actions.detach().numpy().copy() for _ in range(2)]
        moved[0][place] += 1e-5
        moved[1][place] -= 1e-5
        numeric[place] = -np.diff([returns(simulator, row, m, weight) for m in moved])[0] / 2e-5
    assert np.abs(numeric).max() > 1e-3
    assert np.abs(gradient.numpy() - numeric).max() < 1e-4 * np.abs(numeric).max()


def test_jacobian_of_a_linear_system():
    """s' = 0.9 s + 0.5 (2a + 1), r = −(s² + 0.1 (2a + 1)²): known derivatives, inwards at a = 1 too."""
    env = ove.make_env("tests.tasks:LQR-v0")
    env.reset(seed=0)
    simulator, rows = ove.Simulator("tests.tasks:LQR-v0", env, 1), []
    for state in (1.5, -0.7, 0.2):
        env.unwrapped.state = state
        rows.append(simulator.row(env.unwrapped))
    action = np.float32([[0.3], [1.0], [-1.0]])
    after, done, values, jacobian = simulator.differentiate(np.array(rows), action)
    state, units = np.array([1.5, -0.7, 0.2]), 2 * action[:, 0].astype(float) + 1
    assert values[:, 0] == pytest.approx(0.9 * state + 0.5 * units) and not done.any()
    assert np.array_equal(values[:, 0], values[:, 2]) and np.array_equal(values[:, 0], after[:, 1])
    assert values[:, 3] == pytest.approx(-(state**2 + 0.1 * units**2))
    for place in (0, 2):
        assert jacobian[:, place, 0] == pytest.approx(0.9, abs=1e-5)
        assert jacobian[:, place, 2] == pytest.approx(1.0, abs=1e-3)
    assert jacobian[:, 3, 0] == pytest.approx(-2 * state, abs=1e-5)
    assert jacobian[:, 3, 2] == pytest.approx(-0.4 * units, abs=2e-3)
    assert not jacobian[:, [0, 2, 3], 1].any()  # a velocity means nothing to this system


@pytest.mark.parametrize("name", ["Hopper-v5", "tests.tasks:Push-v0", "tests.tasks:PushRounded-v0"])
def test_slopes_of_three_steps_are_right(name):
    """With batched formulas, by a private copy, and by a copy whose observations are rounded to float32."""
    env = ove.make_env(name)
    env.reset(seed=0)
    simulator = ove.Simulator(name, env, 1)
    assert simulator.chain_error().max() < 0.01 and simulator.chain_error().shape == (
        env.observation_space.shape[0] + 1,
    )


def test_jacobian_of_rounded_observations():
    """v' = (v + h (2a − x stiffness 0) / 4) / (1 + h / 4), MuJoCo's implicit damping; x' = x + h v'."""
    env, h = ove.make_env("tests.tasks:PushRounded-v0"), 0.05
    env.reset(seed=0)
    simulator = ove.Simulator("tests.tasks:PushRounded-v0", env, 1)
    row = simulator.row(simulator.live)[None]
    jacobian = simulator.differentiate(row, np.float32([[0.3]]))[3][0]
    kept, pushed = 1 / (1 + h / 4), h * 2 / 4 / (1 + h / 4)
    speed, place = [0, kept, pushed], [1, h * kept, h * pushed]
    assert jacobian == pytest.approx(np.array([place, speed, place, speed, speed]), abs=2e-3)


@pytest.mark.parametrize(("copy", "move"), [(False, 1e-6), (True, 1e-6), (True, 1e-3)])
def test_a_bonus_that_stops_is_no_slope(copy, move, monkeypatch):
    """A hopper 1e-7 above the height at which it is unhealthy: its bonus of 1 is divided by no difference."""
    if copy:
        monkeypatch.delitem(ove.TASKS, "hopper_v5")
    env = ove.make_env("Hopper-v5")
    env.reset(seed=0)
    simulator = ove.Simulator("Hopper-v5", env, 1)
    simulator.move = move
    row, idle = simulator.row(simulator.live)[None].copy(), np.zeros((1, 3), np.float32)
    low, high = 0.6, 1.2  # unhealthy after a step from the first, healthy from the second
    for _ in range(60):
        row[0, 2] = (low + high) / 2
        low, high = (low, row[0, 2]) if simulator.step(row, idle)[2][0] > 0.5 else (row[0, 2], high)
    row[0, 2] = high + 1e-7
    assert simulator.step(row, idle)[2][0] > 0.5
    for height in (row[0, 2], low - 1e-7):  # of whichever bound: one of them is crossed by 1e-6 upwards
        row[0, 2] = height
        assert np.abs(simulator.differentiate(row, idle)[3][0, -1]).max() < 900


def lqr_gradients(horizon: int) -> list[torch.Tensor]:
    """Actor gradients of (3a) on the linear-quadratic task: through the simulator, and by its formulas."""
    flags = ["--env-id", "tests.tasks:LQR-v0", "--horizon", 0, "--actor-horizon", horizon, "--gamma", GAMMA]
    flags += ["--actor-batch", 8]
    agent = ove.Agent(ove.parse(tiny("sac_ove", *flags)), 1, 1, torch.device("cpu"))
    agent.critic.forward = lambda obs, action, frozen=False: torch.stack([-(obs**2).sum(1)] * 2)
    env = ove.make_env("tests.tasks:LQR-v0")
    buffer, rng = agent.make_buffer(8, env), np.random.default_rng(0)
    env.reset(seed=0)
    for state in rng.uniform(-1, 1, 8):
        env.unwrapped.state = state
        buffer.add([0.0], [0.0], 0.0, [state], False, 0)
    at, alpha = torch.arange(8), torch.tensor(0.2)
    torch.manual_seed(3)
    ahead = agent.differentiable_rollout(buffer[at], buffer, at)
    ours = torch.autograd.grad(
        agent.expanded_actor_loss(ahead, torch.ones(8), alpha), list(agent.actor.parameters())
    )
    torch.manual_seed(3)
    obs, value, discount = buffer[at].next_obs, 0.0, 1.0
    for t in range(horizon + 1):
        action, log_prob = agent.actor.sample(obs)
        value = value - discount * alpha * log_prob
        if t == horizon:
            value = value + discount * agent.critic.forward(obs, action)[0]
            break
        units = 2 * action[:, 0] + 1
        value = value - discount * (Q * obs[:, 0] ** 2 + RHO * units**2)
        obs, discount = A * obs + B * units[:, None], discount * GAMMA
    theirs = torch.autograd.grad(-value.mean() / (horizon + 1), list(agent.actor.parameters()))
    return [torch.cat([g.flatten() for g in gradients]) for gradients in (ours, theirs)]


@pytest.mark.parametrize("horizon", [1, 2, 5])
def test_actor_climbs_the_return_of_the_linear_system(horizon):
    ours, theirs = lqr_gradients(horizon)
    assert theirs.abs().max() > 1e-2 and torch.allclose(
        ours, theirs, rtol=1e-3, atol=1e-5 * theirs.abs().max()
    )


def test_nothing_is_gained_after_an_end():
    """Rows that have ended before the rollout count for nothing; those that end in it keep their reward."""
    flags = ["--env-id", "tests.tasks:Ends-v0", "--horizon", 0, "--actor-horizon", 3, "--gamma", 0.5]
    flags += ["--actor-batch", 8]
    agent = ove.Agent(ove.parse(tiny("sac_ove", *flags)), 1, 1, torch.device("cpu"))
    env = ove.make_env("tests.tasks:Ends-v0")
    buffer = agent.make_buffer(4, env)
    env.reset(seed=0)
    for terminated in (True, False, True, False):
        env.unwrapped.state = 0.4
        buffer.add([0.0], [0.0], 0.0, [0.4], terminated, 0)
    at, alpha = torch.arange(4), torch.tensor(0.0)
    ahead = agent.differentiable_rollout(buffer[at], buffer, at)
    assert torch.stack(ahead.done).T.tolist() == [[1, 1, 1]] * 4
    assert (torch.stack(ahead.reward) != 0).T.tolist() == [[False] * 3, [True, False, False]] * 2
    loss = agent.expanded_actor_loss(ahead, 1 - buffer[at].terminated, alpha)
    assert loss.item() == pytest.approx(-ahead.reward[0][[1, 3]].mean().item() / 4)
    assert agent.expanded_actor_loss(ahead, torch.zeros(4), alpha).item() == 0


@long
def test_actor_looks_ahead_alone_and_beside_the_critics(tmp_path):
    """Each of its numbers matters, and a resumed run ends in the same bits."""
    flags = ["--actor-horizon", 2, "--actor-batch", 8]
    folders = {"both": run("sac_ove", tmp_path / "both", *flags)}
    folders["alone"] = run("sac_ove", tmp_path / "alone", *flags, "--horizon", 0)
    folders["batch"] = run("sac_ove", tmp_path / "batch", *flags, "--actor-batch", 9)
    folders["further"] = run("sac_ove", tmp_path / "further", *flags, "--actor-horizon", 3)
    weights = [torch.load(f / "final.pt", weights_only=True)["agent"]["actor"] for f in folders.values()]
    first = [next(iter(w.values())) for w in weights]
    assert all(not torch.equal(a, b) for i, a in enumerate(first) for b in first[:i])
    short = run("sac_ove", tmp_path / "short", *flags, "--total-timesteps", 200)
    longer = ove.train(ove.parse(["--resume", str(short), "--total-timesteps", "300"]))
    assert differing(longer / "final.pt", folders["both"] / "final.pt") == []


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--env-id", "Ant-v5"], "--actor-horizon 2: must be 0 for bodies that turn freely"),
        (
            ["--env-id", "tests.tasks:PushLater-v0"],
            "--actor-horizon 2: must be 0: a step depends on more than",
        ),
        (["--env-id", "tests.tasks:PushDisplaced-v0"], "(slopes of three are off by 50%)"),
        (["--actor-batch", 17], "--actor-batch 17: must be at most --batch-size 16"),
    ],
)
def test_what_the_actor_cannot_do_is_named(flags, text, tmp_path, capsys, monkeypatch):
    flags = tiny("sac_ove", "--actor-horizon", 2, "--actor-batch", 8, *flags, "--runs-dir", tmp_path / "runs")
    assert text in fails("sac_ove", flags, capsys, monkeypatch) and not (tmp_path / "runs").exists()
