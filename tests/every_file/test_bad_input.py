"""A user's mistake ends in one clear line on stderr, exit code 2, and nothing on disk."""

import dataclasses
import json
import os
import shutil

import pytest
import torch

from tests.conftest import EPISODIC, LOOPS, learner, load, shell, tiny

MISTAKES = {
    "unknown environment": (["--env-id", "NoSuchTask-v0"], "--env-id NoSuchTask-v0: must be"),
    "unknown version": (["--env-id", "Hopper-v99"], "--env-id Hopper-v99: must be"),
    "unknown module": (["--env-id", "no.such.module:Task-v0"], "--env-id no.such.module:Task-v0: must be"),
    "malformed id": (["--env-id", "what is this"], "--env-id what is this: must be"),
    "discrete actions": (
        ["--env-id", "tests.tasks:DiscreteAction-v0"],
        "Box of actions in float32's range, not Discrete(3)",
    ),
    "integer actions": (["--env-id", "tests.tasks:IntegerAction-v0"], "bounded, continuous Box of actions"),
    "unbounded actions": (["--env-id", "tests.tasks:UnboundedAction-v0"], "bounded"),
    "action without width": (
        ["--env-id", "tests.tasks:PointAction-v0"],
        "bounded, continuous Box of actions",
    ),
    "dictionary observations": (
        ["--env-id", "tests.tasks:DictObservation-v0"],
        "Box observations, not Dict('state'",
    ),
    "reward NaN": (
        ["--env-id", "tests.tasks:NanReward-v0"],
        "the task's reward must be finite in float32, got nan",
    ),
    "observation NaN": (
        ["--env-id", "tests.tasks:NanObservation-v0"],
        "the task's observation must be finite",
    ),
    "batch beyond warm-up": (["--batch-size", 61], "--batch-size 61: must be at most --learning-starts 60"),
    "warm-up is the whole run": (["--learning-starts", 300], "--learning-starts 300: must be below"),
    "buffer below batch": (["--buffer-size", 15], "--buffer-size 15: must be at least --batch-size"),
    "no steps": (["--total-timesteps", 0], "--total-timesteps 0: must be at least 1"),
    "no evaluation": (["--eval-every", 0], "--eval-every 0: must be at least 1"),
    "negative episodes": (["--eval-episodes", -1], "--eval-episodes -1: must be at least 1"),
    "no checkpoint": (["--checkpoint-every", 0], "--checkpoint-every 0: must be at least 1"),
    "no threads": (["--num-threads", 0], "--num-threads 0: must be in [1, 1024]"),
    "negative seed": (["--seed", -1], "--seed -1: must be in [0, 2147483647]"),
    "too many threads": (["--num-threads", 2**32], "--num-threads 4294967296: must be in [1, 1024]"),
    "layer too wide": (["--hidden", 10**9], "--hidden 1000000000: must be in [1, 65536]"),
    "seed too large": (["--seed", 2**31], "--seed 2147483648: must be in"),
    "gamma above 1": (["--gamma", 1.5], "--gamma 1.5: must be in [0, 1]"),
    "gamma NaN": (["--gamma", "nan"], "--gamma nan: must be in [0, 1]"),
    "tau negative": (["--tau", -0.1], "--tau -0.1: must be in [0, 1]"),
    "learning rate negative": (["--critic-lr", -1e-3], "--critic-lr -0.001: must be at least 0"),
    "learning rate infinite": (["--actor-lr", "inf"], "--actor-lr inf: must be at least 0"),
    "temperature zero": (["--init-alpha", 0], "--init-alpha 0.0: must be in"),
    "target entropy infinite": (
        ["--target-entropy", "inf"],
        "--target-entropy inf: must be in [-1000000.0, 1000000.0]",
    ),
    "no hidden units": (["--hidden", 0], "--hidden 0: must be in [1, 65536]"),
    "not an integer": (["--batch-size", "many"], "--batch-size"),
    "fraction for an integer": (["--batch-size", 2.5], "--batch-size"),
    "unknown choice": (["--device", "tpu"], "--device"),
    "unknown flag": (["--horizn", 3], "--horizn"),
    "no GPU": (["--device", "cuda"], "--device cuda: must be auto or cpu here"),
    "resume nothing": (["--resume", "no/such/run"], "--resume no/such/run: must be a run folder"),
}
MVE_MISTAKES = {
    "negative horizon": (["--horizon", -1], "--horizon -1: must be in [0"),
    "no particles": (["--num-particles", 0], "--num-particles 0: must be at least 1"),
    "no members": (["--members", 0], "--members 0: must be in [1, 1024]"),
    "no model layers": (["--model-layers", 0], "--model-layers 0: must be in [1, 64]"),
    "unlogged diagnosis": (
        ["--diagnose-every", 30],
        "--diagnose-every 30: must be a multiple of --log-every 20",
    ),
}


def applies(name: str, mistake: str) -> bool:
    """The file has the flag; tasks for single steps mean nothing to goal-conditioned files."""
    flag, value = MISTAKES[mistake][0][:2]
    have = {field.name for field in dataclasses.fields(load(name).Args)} | {"horizn"}
    if mistake == "buffer below batch" and "batch_size" not in have:
        return False
    return flag[2:].replace("-", "_") in have and not (name in EPISODIC and str(value).startswith("tests."))


CASES = [(algo, name) for algo in LOOPS for name in MISTAKES if applies(algo, name)]
CASES += [("sac_mve", name) for name in MVE_MISTAKES]


def fails(name: str, flags: list, capsys, monkeypatch, code: int = 2) -> str:
    """Run main() as the command line does; returns what is on stderr, one line of it an error."""
    module = load(name)
    monkeypatch.setattr("sys.argv", [f"{name}.py", *map(str, flags)])
    monkeypatch.setattr("signal.signal", lambda *args: None)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        module.main(learner(name))
    captured = capsys.readouterr()
    assert stop.value.code == code, captured.err
    lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, captured.err
    assert "Traceback" not in captured.err
    return captured.err


@pytest.mark.parametrize(("name", "mistake"), CASES)
def test_one_line_exit_2_and_nothing_on_disk(name, mistake, tmp_path, capsys, monkeypatch):
    if mistake == "no GPU" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    flags, expected = (MISTAKES | MVE_MISTAKES)[mistake]
    folder = tmp_path / "new" / "runs"
    error = fails(name, [*tiny(name, "--runs-dir", folder), *flags], capsys, monkeypatch)
    assert expected in error
    assert len(error.strip().splitlines()) == 1, error
    assert not (tmp_path / "new").exists()


def test_as_a_process(tmp_path):
    """The same through a real process: nothing but the line on stderr."""
    done = shell("sac_mve", "--horizon", -3, "--runs-dir", tmp_path / "runs")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --horizon -3: must be in [0, 2147483647]\n"
    assert list(tmp_path.iterdir()) == []


def test_folder_that_cannot_be_written(loop, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    error = fails(loop, tiny(loop, "--runs-dir", tmp_path / "file" / "runs"), capsys, monkeypatch)
    assert "--runs-dir" in error and "must be a folder that can be written" in error
    if os.geteuid():  # root may write anywhere
        (tmp_path / "locked").mkdir(mode=0o500)
        fails(loop, tiny(loop, "--runs-dir", tmp_path / "locked"), capsys, monkeypatch)


def test_replay_larger_than_memory(loop, tmp_path, capsys, monkeypatch):
    huge = ["--buffer-size", 10**13, "--total-timesteps", 10**13, "--runs-dir", tmp_path / "runs"]
    error = fails(loop, tiny(loop, *huge), capsys, monkeypatch)
    assert "--buffer-size 10000000000000: must be at most" in error and "in the memory available" in error
    assert not (tmp_path / "runs").exists()


def test_video_without_a_working_renderer(step_loop, tmp_path, capsys, monkeypatch):
    """The tiny tasks cannot draw: the mistake is named before anything is written."""
    error = fails(
        step_loop, tiny(step_loop, "--capture-video", "--runs-dir", tmp_path / "runs"), capsys, monkeypatch
    )
    assert "--capture-video True: must be off where rendering fails" in error
    assert not (tmp_path / "runs").exists()


def test_checkpoints_that_are_not_one(loop, finished, tmp_path, capsys, monkeypatch):
    """Truncated, random bytes, another file's, an older format, other flags: named, and nothing touched."""
    good = finished(loop, tmp_path)

    def spoiled(spoil, expected: str) -> None:
        bad = tmp_path / "bad"
        shutil.copytree(good, bad)
        (bad / "final.pt").unlink()
        spoil(bad)
        before = {path: path.read_bytes() for path in bad.rglob("*") if path.is_file()}
        error = fails(loop, ["--resume", bad], capsys, monkeypatch)
        assert error.startswith(f"error: --resume {bad}: must be") and expected in error
        assert before == {path: path.read_bytes() for path in bad.rglob("*") if path.is_file()}
        shutil.rmtree(bad)

    def rewrite(**changes):
        def spoil(bad):
            torch.save(torch.load(bad / "checkpoint.pt", weights_only=True) | changes, bad / "checkpoint.pt")

        return spoil

    def truncate(bad):
        (bad / "checkpoint.pt").write_bytes((bad / "checkpoint.pt").read_bytes()[:1000])

    spoiled(truncate, "unreadable")
    spoiled(lambda bad: (bad / "checkpoint.pt").write_bytes(os.urandom(5000)), "unreadable")
    spoiled(lambda bad: (bad / "checkpoint.pt").write_bytes(b""), "unreadable")
    spoiled(lambda bad: torch.save([1, 2], bad / "checkpoint.pt"), "unreadable")
    spoiled(rewrite(algo="td7"), f"a run of {loop}, format 3, not td7, format 3")
    spoiled(rewrite(format=2), f"a run of {loop}, format 3, not {loop}, format 2")
    spoiled(lambda bad: [path.unlink() for path in bad.glob("checkpoint*.pt")], "with a checkpoint.pt")


def test_checkpoint_is_the_only_truth(loop, finished, tmp_path):
    """Without args.json and eval.csv a run goes on all the same, and writes them anew."""
    folder, module = finished(loop, tmp_path), load(loop)
    before = (folder / "eval.csv").read_text()
    for name in ("final.pt", "args.json", "eval.csv"):
        (folder / name).unlink()
    learner(loop)(module.parse(["--resume", str(folder)]))
    assert json.loads((folder / "args.json").read_text())["algo"] == loop
    without_time = lambda text: [line.split(",")[:-1] for line in text.splitlines()]
    assert without_time((folder / "eval.csv").read_text()) == without_time(before)


def test_long_messages_stay_on_one_line(step_loop, tmp_path, capsys, monkeypatch):
    """A NaN among 40 observations: NumPy would print the array on several lines."""
    flags = tiny(step_loop, "--env-id", "tests.tasks:WideNan-v0", "--runs-dir", tmp_path / "runs")
    error = fails(step_loop, flags, capsys, monkeypatch)
    assert len(error.strip().splitlines()) == 1 and "the task's observation must be finite" in error


def test_resuming_on_a_task_that_changed(step_loop, finished, tmp_path, capsys, monkeypatch):
    """Another number of observations under the same id: named, and the finished run keeps its files."""
    import gymnasium as gym

    from tests.tasks import Image

    folder = finished(step_loop, tmp_path)
    entry = gym.registry["Cliff-v0"].entry_point
    monkeypatch.setattr(gym.registry["Cliff-v0"], "entry_point", Image)
    error = fails(step_loop, ["--resume", folder, "--total-timesteps", 400], capsys, monkeypatch)
    monkeypatch.setattr(gym.registry["Cliff-v0"], "entry_point", entry)
    assert "must fit the task as it is now" in error and (folder / "final.pt").exists()


class Evil:
    def __reduce__(self):
        return os.mkdir, ("owned",)


def test_checkpoint_cannot_run_code(loop, finished, tmp_path, capsys, monkeypatch):
    """A pickle that would create a folder on loading is refused."""
    folder = finished(loop, tmp_path)
    monkeypatch.chdir(tmp_path)
    torch.save({"algo": loop, "format": 3, "agent": Evil()}, folder / "checkpoint.pt")
    (folder / "final.pt").unlink()
    assert "unreadable" in fails(loop, ["--resume", folder], capsys, monkeypatch)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(("flag", "value"), [("--seed", 2), ("--gamma", 0.5), ("--total-timesteps", 200)])
def test_resuming_with_other_arguments_is_refused(loop, flag, value, finished, tmp_path, capsys, monkeypatch):
    if flag == "--gamma" and "gamma" not in load(loop).Args.__dataclass_fields__:
        flag, value = "--horizon", 9
    folder = finished(loop, tmp_path)
    error = fails(loop, ["--resume", folder, flag, value], capsys, monkeypatch)
    assert (
        error.startswith(f"error: {flag} {value}: must be") and "may only get more --total-timesteps" in error
    )
    assert (folder / "final.pt").exists()


def test_resuming_from_python_with_the_default_device(loop, finished, tmp_path):
    """auto is decided when a run begins: a resumed run must agree on what it came to, not on the word."""
    folder, module = finished(loop, tmp_path), load(loop)
    args = module.parse(["--resume", str(folder), "--total-timesteps", "400", "--device", "auto"])
    if not torch.cuda.is_available():  # where there is one, auto is another device than this run's
        assert learner(loop)(args) == folder and args.device == "cpu"
        assert torch.load(folder / "final.pt", weights_only=True)["step"] == 400


def test_reward_that_turns_infinite_names_the_step(step_loop, tmp_path, capsys, monkeypatch):
    """Evaluation passes; training meets the infinite reward at step 120 and keeps its checkpoint."""
    flags = tiny(step_loop, "--env-id", "tests.tasks:LateNan-v0", "--eval-every", 300, "--runs-dir", tmp_path)
    error = fails(step_loop, flags, capsys, monkeypatch)
    assert "step 120: the task's reward must be finite in float32, got inf" in error
    (folder,) = tmp_path.iterdir()
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] == 80
    assert json.loads((folder / "args.json").read_text())["algo"] == step_loop


def test_run_that_diverges_names_step_and_tensor(step_loop, tmp_path):
    """Rewards of 3e38 overflow the squared error: exit code 1, the last finite checkpoint stays."""
    if step_loop == "pilco":
        pytest.skip("knows the cost, learns from no reward")
    flags = tiny(step_loop, "--env-id", "tests.tasks:Huge-v0", "--runs-dir", tmp_path)
    done = shell(step_loop, *flags)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: step ") and "its last checkpoint is kept" in line
    assert " is " in line or "must be finite" in line
    assert any(name in line for name in ("losses/", "model/", "the agent's action", "weight", "bias")), line
    (folder,) = tmp_path.iterdir()
    agent = torch.load(folder / "checkpoint.pt", weights_only=True)["agent"]
    for tensor in agent["actor" if "actor" in agent else "model"].values():
        assert tensor.isfinite().all()
