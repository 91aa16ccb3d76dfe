"""Tasks as users have them: what works works, what is wrong is named in one line."""

import json
import os
import signal
import subprocess
import sys
import time

import gymnasium as gym
import numpy as np
import pytest
import torch

from tests.conftest import (
    EPISODIC,
    LONG,
    ROOT,
    command,
    differing,
    evaluations,
    learner,
    load,
    run,
    shell,
    tiny,
)
from tests.every_file.test_bad_input import fails

OLD = "has it the old Gym API"
REFUSED = {  # task: what the line says
    "TwoRewards": "the task's reward must be of size 1, not of shape (2,)",
    "TooWide": "the task's observation must be of size 2, not of shape (3,)",
    "WiderLater": "the task's observation must be of size 2, not of shape (3,)",
    "OldReset": OLD,
    "OldResetHalf": OLD,
    "OldStep": OLD,
    "OldStepEndless": OLD,
    "NoInfo": OLD,
    "HugeActions": "HugeActions-v0: must be with a bounded, continuous Box of actions in float32's range",
    "HugeDoubles": "in float32's range",
    "HalfInfinite": "bounded, continuous Box of actions",
    "OnlyOne": "OnlyOne-v0: must be a task that can be made with --env-kwargs {}: RuntimeError('worker 0",
    "NeedsOptions": "the task failed after 0 steps: TypeError",
    "NeedsKwargs": "made with --env-kwargs {}: TypeError",
    "NoneAtEnd": "the task's observation must be",
    "SwappedFlag": "terminated and truncated must be flags, got -",
    "Words": "the task's observation must be",
    "Dictionary": "'velocity': Box(-1.0, 1.0, (2,), float32)) (flatten it)",
}
WORKING = """RewardArray WholeNumbers Doubles Scalars SameBuffer LegacyRandom LegacyFresh Fresh Mersenne
    IgnoresSeed Spike Flags Lists OwnStatistics CloseRaises""".split()
WARNED = {
    "IgnoresSeed": "the task ignores its seed: resume will not be exact",
    "Fresh": "renews its generator",
}
WARNED |= {"LegacyFresh": "renews its generator", "CloseRaises": "the task's close() failed"}
GOALS_REFUSED = {
    "GoalTooWide": "the task's desired_goal must be of size 1, not of shape (2,)",
    "GoalOldReset": OLD,
    "GoalOffset": "made with --env-kwargs {}",
}
GOALS = {"WholeGoals": "", "GoalArrays": "", "GoalCloseRaises": "the task's close() failed"}


def of(name: str) -> list[str]:
    return ["--env-id", f"tests.odd_tasks:{name}-v0"]


@pytest.mark.parametrize("task", REFUSED)
def test_what_is_wrong_with_a_task_is_named(task, step_loop, tmp_path, capsys, monkeypatch):
    """One line, exit code 2, nothing on disk."""
    monkeypatch.setattr("tests.odd_tasks.OnlyOne.is_open", False, raising=False)
    flags = tiny(step_loop, *of(task), "--runs-dir", tmp_path / "runs")
    error = fails(step_loop, flags, capsys, monkeypatch)
    assert error.startswith("error: ") and REFUSED[task] in error and len(error.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("task", WORKING)
def test_habits_of_tasks_that_do_no_harm(task, step_loop, tmp_path, capsys):
    folder = run(step_loop, tmp_path, *of(task), "--total-timesteps", 160)
    said = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(said) == (task in WARNED) and all(WARNED[task] in line for line in said)
    rows = torch.load(folder / "final.pt", weights_only=True)["buffer"]["rows"]
    assert len(rows) == 160 and rows.isfinite().all()
    if task == "WholeNumbers":  # what it observes, not what it declares
        assert (rows[:, 0] % 1 != 0).float().mean() > 0.9 and (rows[:, 1] % 1 != 0).any()
    if task == "SameBuffer":  # s' of a row is s of the next, and s is another than s'
        assert not torch.equal(rows[:, :2], rows[:, 3:5]) and rows[:, 2].abs().max() > 0


@pytest.mark.parametrize("task", ["LegacyRandom", "LegacyFresh", "Fresh", "Mersenne"])
def test_resume_is_exact_whatever_the_generator(task, step_loop, tmp_path):
    """NumPy's old generator with its spare normal number; one that is made anew gets a seed each time."""
    short = run(step_loop, tmp_path / "a", *of(task), "--total-timesteps", 200)
    planned = run(step_loop, tmp_path / "b", *of(task))
    module = load(step_loop)
    longer = learner(step_loop)(module.parse(["--resume", str(short), "--total-timesteps", "300"]))
    assert differing(planned / "final.pt", longer / "final.pt") == []
    assert evaluations(planned) == evaluations(longer)


def test_old_generators_spare_number_is_in_the_checkpoint(step_loop, tmp_path):
    """randn makes two numbers and keeps one: with an odd number of resets a resumed run must know it."""
    folder = run(step_loop, tmp_path, *of("LegacyRandom"))
    states = [torch.load(folder / f"{n}.pt", weights_only=True)["task_rng"] for n in ("checkpoint", "final")]
    states += [torch.load(folder / "checkpoint.previous.pt", weights_only=True)["task_rng"]]
    kept = [json.loads(state) for state in states]
    assert {state["bit_generator"] for state in kept} == {"MT19937"} and any(s["has_gauss"] for s in kept)


def test_crash_in_the_middle(step_loop, tmp_path, capsys, monkeypatch):
    """Exit code 1; the line has step, error and how to go on, and going on fails no sooner."""
    flags = tiny(step_loop, *of("Crash"), "--runs-dir", tmp_path)
    error = fails(step_loop, flags, capsys, monkeypatch, code=1)
    (folder,) = tmp_path.iterdir()
    assert "error: step 130: the task failed after 129 steps: RuntimeError('unstable: QACC" in error
    assert f"its last checkpoint is kept, to continue: python {step_loop}.py --resume {folder}" in error
    assert OLD not in error
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] == 80
    again = fails(step_loop, ["--resume", folder], capsys, monkeypatch, code=1)  # 80 steps and 129 new ones
    assert "error: step 210: " in again


def test_endless_evaluation(step_loop, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(load(step_loop).Boundary, "longest", 500)
    flags = tiny(step_loop, *of("Endless"), "--runs-dir", tmp_path / "runs")
    error = fails(step_loop, flags, capsys, monkeypatch)
    assert error == "error: an evaluation's episode exceeds 500 steps: set max_episode_steps\n"
    assert not (tmp_path / "runs").exists()
    limited = ["--env-kwargs", '{"max_episode_steps": 30}', "--runs-dir", tmp_path / "runs"]
    assert evaluations(run(step_loop, tmp_path, *of("Endless"), *limited))[1][3] == "30.0"


def test_limit_of_episodes_is_evaluations_alone(step_loop, tmp_path, monkeypatch):
    """Training may go on for longer than an evaluation's episode could."""
    module, evaluate = load(step_loop), lambda *_: ROW
    ROW = {"step": 0, "return_mean": 1.0, "return_std": 0.0, "length_mean": 5.0, "episodes": 2}
    monkeypatch.setattr(module.Boundary, "longest", 100)
    monkeypatch.setattr(module, "evaluate", evaluate)
    folder = run(step_loop, tmp_path, *of("Endless"))
    assert len(torch.load(folder / "final.pt", weights_only=True)["buffer"]["rows"]) == 300


def stopped(process: subprocess.Popen, number: int) -> tuple[float, str]:
    """Seconds until a process ends after the signal, and its stderr."""
    begun = time.monotonic()
    process.send_signal(number)
    _, error = process.communicate(timeout=30)
    return time.monotonic() - begun, error


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_an_endless_evaluation(number, tmp_path):
    """The first evaluation would take 100 000 steps."""
    flags = [*tiny("sac_mve", *of("Endless")), "--runs-dir", str(tmp_path / "runs")]
    script = "import sys; sys.path.append('.'); from tests.conftest import load; m = load('sac_mve'); "
    script += "evaluate, m.Boundary.longest = m.evaluate, 10**9; "
    script += (
        "m.evaluate = lambda *given: (print('begins', flush=True), evaluate(*given))[1]; m.main(m.train)"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    process = subprocess.Popen([sys.executable, "-c", script, *flags], **pipes)
    assert process.stdout.readline() == "begins\n"
    seconds, error = stopped(process, number)
    assert process.returncode == 128 + number and seconds < 20 and "Traceback" not in error
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(not LONG, reason="takes long: FARSIGHT_LONG=1")
def test_signal_ends_the_launcher_of_an_endless_evaluation(tmp_path):
    flags = ["--algos", "sac", "--env-ids", "tests.odd_tasks:Endless-v0", "--seeds", "1"]
    flags += ["--runs-dir", str(tmp_path), "--", "--total-timesteps", "300", "--learning-starts", "256"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    process = subprocess.Popen(["./benchmark.sh", *flags], start_new_session=True, **pipes)
    logs = tmp_path / "logs"
    while not (list(logs.glob("*.log")) if logs.exists() else []):
        assert process.poll() is None
        time.sleep(0.1)
    time.sleep(4)
    assert process.poll() is None, process.communicate()
    seconds, error = stopped(process, signal.SIGTERM)
    assert seconds < 8 and "Traceback" not in error


@pytest.mark.parametrize("task", GOALS_REFUSED)
def test_what_is_wrong_with_a_goal_task_is_named(task, tmp_path, capsys, monkeypatch):
    (name,) = EPISODIC
    flags = tiny(name, *of(task), "--runs-dir", tmp_path / "runs")
    error = fails(name, flags, capsys, monkeypatch)
    assert GOALS_REFUSED[task] in error and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("task", GOALS)
def test_habits_of_goal_tasks_that_do_no_harm(task, tmp_path, capsys):
    (name,) = EPISODIC
    folder = run(name, tmp_path, *of(task))
    assert GOALS[task] in capsys.readouterr().err
    replay = torch.load(folder / "final.pt", weights_only=True)["buffer"]
    if task == "WholeGoals":
        assert (replay["goal"] % 1 != 0).all() and (replay["obs"][:, 1:, 1] % 1 != 0).any()


def test_goal_task_that_crashes(tmp_path, capsys, monkeypatch):
    (name,) = EPISODIC
    flags = tiny(name, *of("GoalCrash"), "--runs-dir", tmp_path)
    error = fails(name, flags, capsys, monkeypatch, code=1)
    assert "step 300: the task failed after 159 steps: RuntimeError('unstable')" in error


def test_arguments_of_the_task(loop, tmp_path, capsys, monkeypatch):
    """--env-kwargs reaches every instance, is recorded, and a resumed run must agree on it."""
    task, given = ("GoalOffset", {"offset": 5}) if loop in EPISODIC else ("NeedsKwargs", {"force": 3})
    folder = run(loop, tmp_path, *of(task), "--env-kwargs", json.dumps(given))
    record = json.loads((folder / "args.json").read_text())
    assert json.loads(record["args"]["env_kwargs"]) == given
    buffer = torch.load(folder / "final.pt", weights_only=True)["buffer"]
    if loop in EPISODIC:
        assert buffer["goal"].min() > 3
    else:
        rows = buffer["rows"]  # x, t, a, r, x', t', d
        assert (rows[:, 4] - rows[:, 0]).allclose(0.3 * rows[:, 2], atol=1e-5)
    other = json.dumps({name: value + 1 for name, value in given.items()})
    error = fails(loop, ["--resume", folder, "--env-kwargs", other], capsys, monkeypatch)
    assert f"--env-kwargs {other}: must be {json.dumps(given)} as in {folder}" in error
    for wrong in ("{scenario: 1}", "3", '{"no_such": 1}'):
        flags = tiny(loop, *of(task), "--env-kwargs", wrong, "--runs-dir", tmp_path / "new")
        assert "--env-kwargs" in fails(loop, flags, capsys, monkeypatch)
    assert not (tmp_path / "new").exists()


def test_arguments_of_the_task_reach_the_oracle(tmp_path):
    """The simulator's copies are made with them: another frame skip is another model."""
    ove, given = load("sac_ove"), '{"frame_skip": 5}'
    env = ove.make_env("Hopper-v5", given)
    env.reset(seed=0)
    ove.Simulator("Hopper-v5", env, 1, given)
    args = ove.parse(tiny("sac_ove", "--env-id", "Hopper-v5", "--env-kwargs", given))
    buffer = ove.Agent(args, 11, 3, torch.device("cpu")).make_buffer(10, env)
    assert buffer.simulator.copy.unwrapped.frame_skip == 5
    folder = run("sac_ove", tmp_path, "--env-id", "Hopper-v5", "--env-kwargs", given, "--horizon", 1)
    assert (folder / "final.pt").exists()


def test_boundary_counts_in_full_precision(step_loop):
    """An episode's return is the sum of the task's own rewards, not of their float32."""
    env = load(step_loop).make_env("tests.odd_tasks:Point-v0")
    env.reset(seed=3)
    x, total = env.unwrapped.x, 0.0
    for _ in range(20):
        *_, truncated, info = env.step(np.float32([0.5]))
        x += 0.1 * 0.5
        total -= x**2
    assert truncated and info["episode"] == {"r": pytest.approx(total, rel=1e-12), "l": 20}


def test_a_run_on_another_machine_is_a_folder_that_is_found(step_loop, tmp_path):
    """A task registered beside a file that lies elsewhere: `--env-id mine:Task-v0` from its folder."""
    (tmp_path / "mine.py").write_text(
        "import gymnasium\nfrom tests.odd_tasks import Point\n"
        "gymnasium.register('Mine-v0', Point, max_episode_steps=20)\n"
    )
    flags = tiny(step_loop, "--env-id", "mine:Mine-v0", "--total-timesteps", 80, "--runs-dir", "runs")
    done = shell(step_loop, *flags, cwd=tmp_path, env={**os.environ, "PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr
    assert command(step_loop)[1].startswith(str(ROOT))
    assert gym.registry.get("Mine-v0") is None
