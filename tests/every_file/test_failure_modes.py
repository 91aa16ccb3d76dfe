"""Ways a training script lies, and the test that would catch each here.

The numbers are those of a list of 35 failures found in public projects. Where the test lives in another file
the table names it, and `test_the_table_is_complete` keeps it honest; what cannot happen here has its reason.
"""

import ast
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

from tests.conftest import ROOT, load, long, run, tiny

ELSEWHERE = {
    1: "test_failure_modes.test_01_time_limit_is_not_a_termination",
    2: "test_failure_modes.test_02_termination_on_the_last_allowed_step",
    3: "test_failure_modes.test_03_reset_observation_is_never_a_successor",
    4: "no vector environments: one plain environment, reset by hand, has no autoreset",
    5: "test_failure_modes.test_05_actions_reach_the_whole_range_of_every_box",
    6: "no target-policy smoothing in these files",
    7: "test_failure_modes.test_05_actions_reach_the_whole_range_of_every_box",
    8: "test_failure_modes.test_08_entropy_does_not_depend_on_the_units_of_the_action",
    9: "test_failure_modes.test_09_target_entropy_is_minus_the_action_dimension",
    10: "test_math.test_temperature_falls_while_entropy_is_above_its_target",
    11: "test_math.test_squashed_log_prob_is_exact_where_tanh_saturates",
    12: "test_math.test_squashed_density_integrates_to_one",
    13: "test_math.test_shapes_of_b_and_b1_never_broadcast",
    14: "test_failure_modes.test_14_observations_in_one_array_are_copied",
    15: "test_bad_input.test_replay_larger_than_memory",
    16: "test_math.test_full_buffer_overwrites_its_oldest_rows",
    17: "test_runs.test_same_seed_same_bits_other_seed_other_bits",
    18: "test_runs.test_how_often_one_looks_changes_nothing",
    19: "test_runs.test_evaluation_is_a_pure_function_of_the_policy",
    20: "test_runs.test_evaluation_returns_by_hand",
    21: "the files report no peak: eval.csv has every evaluation, the closing line the last one",
    22: "test_resume.test_checkpoint_holds_everything",
    23: "test_resume.test_checkpoint_holds_everything",
    24: "test_resume.test_checkpoint_holds_everything",
    25: "test_resume.test_checkpoint_holds_everything",
    26: "test_resume.test_sigkill_at_random_moments_ends_in_the_same_bits",
    27: "test_bad_input.test_checkpoint_cannot_run_code",
    28: "test_family.test_file_runs_alone_in_an_empty_folder",
    29: "test_launcher.test_failed_run_among_good_ones_is_named",
    30: "test_launcher.test_dry_run_prints_every_command_and_writes_nothing",
    31: "test_family.test_every_argument_is_one_line_with_its_meaning_and_real_type",
    32: "no delayed updates in these files",
    33: "test_runs.test_every_episode_is_logged_and_stored",
    34: "test_failure_modes.test_34_threads_are_those_asked_for",
    35: "test_graphs.test_replayed_updates_are_the_eager_ones",
    "assert that is always true": "test_failure_modes.test_no_assertion_is_a_tuple_or_an_inversion",
    "entropy subtracted twice": "test_math.test_entropy_counts_once_per_imagined_action",
    "entropy after a predicted termination": "test_math.test_entropy_at_an_imagined_termination",
    "loss scale depending on H": "test_math.test_loss_does_not_scale_with_the_horizon",
    "assigns the loop variable and does nothing": "test_family.test_every_number_changes_what_is_learned",
    "bootstrap redrawn": "no bootstrap indices: every member draws fresh minibatches, as documented",
    "default command needs an account": "test_family.test_file_runs_alone_in_an_empty_folder",
    "holdout leaks into training": "test_math.test_held_out_episodes_never_train_the_model",
    "normaliser moves inside an update": "test_failure_modes.test_normaliser_is_constant_inside_an_update",
}


def replay(name: str, tmp_path: Path, env_id: str) -> dict[str, torch.Tensor]:
    """The columns of a tiny run's replay on a task with one observation and one action."""
    folder = run(name, tmp_path, "--env-id", env_id)
    buffer = torch.load(folder / "final.pt", weights_only=True)["buffer"]
    names = ("obs", "action", "reward", "next_obs", "terminated")
    return dict(zip(names, buffer["rows"].T, strict=True)) | {"episode": buffer["episode"]}


def test_the_table_is_complete():
    assert {key for key in ELSEWHERE if isinstance(key, int)} == set(range(1, 36)) and len(
        ELSEWHERE
    ) == 35 + 9
    for place in ELSEWHERE.values():
        module, _, test = place.partition(".test_")
        if module.startswith("test_"):
            (path,) = (ROOT / "tests").rglob(f"{module}.py")
            names = {n.name for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef)}
            assert f"test_{test}" in names, place


def test_01_time_limit_is_not_a_termination(step_loop, tmp_path):
    """Twenty-step episodes that only the time limit ends: not one stored termination."""
    data = replay(step_loop, tmp_path, "tests.tasks:LQR-v0")
    assert torch.bincount(data["episode"]).tolist() == [20] * 15
    assert data["terminated"].sum() == 0


def test_02_termination_on_the_last_allowed_step(step_loop, tmp_path):
    """terminated and truncated together: a termination."""
    data = replay(step_loop, tmp_path, "tests.tasks:LastStep-v0")
    assert data["terminated"].view(60, 5).tolist() == [[0, 0, 0, 0, 1]] * 60


def test_03_reset_observation_is_never_a_successor(step_loop, tmp_path):
    """Every reset shows 1000: it is the first s of each episode and never an s'."""
    data = replay(step_loop, tmp_path, "tests.tasks:NoisyReset-v0")
    assert (data["obs"] == 1000).sum() == 15
    assert data["next_obs"].abs().max() < 100


def test_14_observations_in_one_array_are_copied(step_loop, tmp_path):
    """A task overwrites its observation in place: s and s' of every transition still follow the system."""
    data = replay(step_loop, tmp_path, "tests.tasks:SameArray-v0")
    moved = 0.9 * data["obs"] + 0.5 * (1 + 2 * data["action"])  # [−1, 1] is [−1, 3] for the task
    assert torch.allclose(data["next_obs"], moved, atol=1e-5)


@pytest.mark.parametrize("env_id", ["InvertedPendulum-v5", "Pusher-v5", "Pendulum-v1", "tests.tasks:LQR-v0"])
def test_05_actions_reach_the_whole_range_of_every_box(env_id, step_loop):
    """−1, 0 and 1 become low, middle and high, component by component, on boxes of ±3, ±2 and [−1, 3]."""
    env = load(step_loop).make_env(env_id)
    seen = []
    space = env.unwrapped.action_space
    env.unwrapped.step = lambda action: (
        seen.append(action),
        (env.observation_space.sample(), 0.0, False, False, {}),
    )[1]
    env.reset(seed=1)
    for value in (-1, 0, 1):
        env.step(np.full(space.shape, value, np.float32))
    for action, expected in zip(seen, (space.low, (space.low + space.high) / 2, space.high), strict=True):
        assert np.allclose(action, expected, atol=1e-6)


def test_08_entropy_does_not_depend_on_the_units_of_the_action(soft, tmp_path):
    """The same task with its action in other units: the same weights, replay and temperature, to the bit."""

    class Stretched(gym.Wrapper):
        def __init__(self, env):
            super().__init__(env)
            self.action_space = gym.spaces.Box(-4.0, 12.0, (1,), np.float32)

        def step(self, action):
            return self.env.step(action / 4)

    entry = lambda **options: Stretched(gym.make("LQR-v0", **options))
    gym.register("Stretched-v0", entry_point=entry, max_episode_steps=20)
    names = "tests.tasks:LQR-v0", "Stretched-v0"
    runs = [run(soft, tmp_path / e, "--env-id", e, "--total-timesteps", 160) for e in names]
    gym.registry.pop("Stretched-v0")
    states = [torch.load(folder / "final.pt", weights_only=True) for folder in runs]
    assert torch.equal(states[0]["agent"]["log_alpha"], states[1]["agent"]["log_alpha"])
    assert torch.equal(states[0]["buffer"]["rows"], states[1]["buffer"]["rows"])


def test_09_target_entropy_is_minus_the_action_dimension(soft):
    module = load(soft)
    agent = module.Agent(module.parse(tiny(soft)), 5, 3, torch.device("cpu"))
    assert agent.target_entropy == -3.0
    agent = module.Agent(module.parse(tiny(soft, "--target-entropy", -1.5)), 5, 3, torch.device("cpu"))
    assert agent.target_entropy == -1.5


@long
def test_34_threads_are_those_asked_for(loop, tmp_path):
    run(loop, tmp_path, "--num-threads", 2, "--total-timesteps", 100)
    assert torch.get_num_threads() == 2
    run(loop, tmp_path, "--num-threads", 1, "--total-timesteps", 100)
    assert torch.get_num_threads() == 1


def test_no_assertion_is_a_tuple_or_an_inversion(algo):
    """`assert (x, "text")` and `assert ~flag` can never fail."""
    for node in ast.walk(ast.parse((ROOT / "algos" / f"{algo}.py").read_text())):
        if isinstance(node, ast.Assert):
            assert not isinstance(node.test, ast.Tuple)
            assert not (isinstance(node.test, ast.UnaryOp) and isinstance(node.test.op, ast.Invert))


def test_normaliser_is_constant_inside_an_update(monkeypatch):
    """From the model's last gradient step to the end of the update its mean and deviation do not change."""
    module = load("sac_mve")
    agent = module.Agent(module.parse(tiny("sac_mve")), 1, 1, torch.device("cpu"))
    buffer = module.ReplayBuffer(100, 1, 1, torch.device("cpu"))
    for i in range(100):
        buffer.add([i / 10], [0.0], 0.0, [i / 10 + 0.1], False, i // 10)
    seen = []
    original = agent.model.normalize
    agent.model.normalize = lambda obs: (
        seen.append((agent.model.mean.item(), agent.model.std.item())),
        original(obs),
    )[1]
    agent.update(buffer, 61)
    assert len(seen) > 10 and len(set(seen)) == 1
    agent.update(buffer, 100)  # a multiple of --normalize-every 50: refreshed, once
    assert len(set(seen)) == 1  # from the same data
    for i in range(100):
        buffer.add([i + 50.0], [0.0], 0.0, [i + 51.0], False, 20 + i // 10)
    agent.update(buffer, 149)
    assert len(set(seen)) == 1
    agent.update(buffer, 150)
    assert len(set(seen)) == 2
