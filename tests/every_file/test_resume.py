"""Exact resume: a run that was killed, at any moment, ends in the same bits as one that was not."""

import contextlib
import os
import random
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.conftest import (
    EPISODIC,
    ROOT,
    command,
    differing,
    evaluations,
    family_of,
    learner,
    load,
    long,
    run,
    scalars,
    shell,
    tiny,
)  # fmt: skip

KILLS = int(os.environ.get("FARSIGHT_KILLS", "1"))  # runs per file; the bar was measured with 20


def flags_of(algo: str) -> list[str]:
    """A run of some seconds with a checkpoint every few episodes."""
    return [*tiny(algo), "--total-timesteps", "900", "--checkpoint-every", "40", "--eval-every", "150"]


def assert_same_end(first: Path, second: Path) -> None:
    assert differing(first / "final.pt", second / "final.pt") == []
    assert evaluations(first) == evaluations(second)
    a, b = scalars(first), scalars(second)
    timed = {tag for tag in a if tag.startswith("time/")} | {"charts/SPS"}
    assert a.keys() == b.keys()
    for tag in a.keys() - timed:  # after the purge nothing is missing and nothing is there twice
        assert [(e.step, e.value) for e in a[tag]] == [(e.step, e.value) for e in b[tag]], tag


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """One run per file, as a process."""
    done = {}

    def get(loop: str) -> Path:
        if loop not in done:
            parent = tmp_path_factory.mktemp(loop)
            assert shell(loop, *flags_of(loop), "--runs-dir", parent).returncode == 0
            (done[loop],) = parent.iterdir()
        return done[loop]

    return get


def kill_somewhere(process: subprocess.Popen, parent: Path, moments: random.Random) -> bool:
    """SIGKILL after a random number of checkpoints and a random wait; False if the run ended before that."""
    stamps = [path.stat().st_mtime_ns for path in parent.glob("[!.]*/checkpoint.pt")]
    patience, seen, last = moments.randrange(1, 10), 0, stamps[0] if stamps else None
    while seen < patience:
        with contextlib.suppress(FileNotFoundError):  # between the two renames of a checkpoint
            for path in parent.glob("[!.]*/checkpoint.pt"):
                stamp = path.stat().st_mtime_ns
                seen, last = seen + (stamp != last), stamp
        if process.poll() is not None:
            return False
        time.sleep(0.001)
    time.sleep(moments.uniform(0, 0.15))
    process.kill()
    return process.wait() == -signal.SIGKILL


def test_sigkill_at_random_moments_ends_in_the_same_bits(loop, uninterrupted, tmp_path):
    """Each run is killed twice, anywhere between its first checkpoint and its last steps, and resumed."""
    seed = random.randrange(10**6)
    print(f"{loop}: moments drawn from seed {seed}")
    moments = random.Random(seed)
    for number in range(KILLS):
        parent, deaths = tmp_path / str(number), 0
        parent.mkdir()
        while True:
            folders = list(parent.glob("[!.]*"))
            again = ["--resume", folders[0]] if folders else [*flags_of(loop), "--runs-dir", parent]
            process = subprocess.Popen(command(loop, *again), cwd=ROOT, stdout=-3, stderr=-3)
            if deaths < 2 and kill_somewhere(process, parent, moments):
                deaths += 1
            else:
                assert process.wait(300) == 0
                break
        assert deaths > 0
        (folder,) = parent.glob("[!.]*")
        assert_same_end(uninterrupted(loop), folder)
        print(f"{loop}, run {number}: killed {deaths} times, the same bits")


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moment", ["fsync", "first rename", "second rename"])
def test_death_in_the_middle_of_a_checkpoint(loop, moment, uninterrupted, tmp_path, monkeypatch):
    """Whatever was on disk when the process died between two system calls of a checkpoint can be resumed."""
    module, calls = load(loop), {"fsync": 0, "replace": 0, "armed": False}
    real = {"fsync": os.fsync, "replace": os.replace}

    def fsync(descriptor):
        if calls["armed"] and moment == "fsync":
            raise Killed
        real["fsync"](descriptor)

    def replace(source, target):
        if calls["armed"]:
            calls["replace"] += 1
            if moment == ("first rename", "second rename")[calls["replace"] - 1]:
                raise Killed
        real["replace"](source, target)

    save = module.RunFolder.save

    def armed_save(folder, name):
        calls["armed"] = folder.step > 200
        save(folder, name)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        patch.setattr(os, "replace", replace)
        patch.setattr(module.RunFolder, "save", armed_save)
        with pytest.raises(Killed):
            learner(loop)(module.parse([*flags_of(loop), "--runs-dir", str(tmp_path)]))
    (folder,) = tmp_path.iterdir()
    assert (folder / "checkpoint.pt").exists() != (moment == "second rename")
    learner(loop)(module.parse(["--resume", str(folder)]))
    assert_same_end(uninterrupted(loop), folder)


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=long), signal.SIGTERM])
def test_signal_stops_cleanly(number, loop, uninterrupted, tmp_path):
    """No traceback, exit code 128 + n, a line that says how to go on; and going on ends in the same bits."""
    process = subprocess.Popen(
        command(loop, *flags_of(loop), "--runs-dir", tmp_path),
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not (found := list(tmp_path.glob("[!.]*/checkpoint.previous.pt"))):
        time.sleep(0.01)
        assert process.poll() is None
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    folder = found[0].parent
    assert process.returncode == 128 + number
    assert "Traceback" not in error
    assert f"--resume {folder}" in error.splitlines()[-1]
    assert not (folder / "final.pt").exists()
    assert shell(loop, "--resume", folder).returncode == 0
    assert_same_end(uninterrupted(loop), folder)


def test_longer_run_equals_one_planned_so(algo, finished, tmp_path):
    """200 steps, then --total-timesteps 300: the same bits as 300 at once; args.json tells the new length."""
    short, planned = run(algo, tmp_path / "a", "--total-timesteps", 200), finished(algo, tmp_path / "b")
    module = load(algo)
    longer = learner(algo)(module.parse(["--resume", str(short), "--total-timesteps", "300"]))
    assert longer == short
    assert_same_end(planned, longer)
    assert '"total_timesteps": 300' in (longer / "args.json").read_text()


def test_extension_is_remembered_without_a_later_checkpoint(loop, tmp_path, capsys):
    """A run's new length is in its checkpoint from the start: resumed once more it is complete."""
    module = load(loop)
    folder = str(run(loop, tmp_path, "--total-timesteps", 200, "--checkpoint-every", 1000))
    for flags in (["--total-timesteps", "300"], []):
        learner(loop)(module.parse(["--resume", folder, *flags]))
    assert "is complete: 300 steps" in capsys.readouterr().out


def test_extension_past_an_odd_last_step(step_loop, tmp_path):
    """310 steps, off the evaluation's grid, on an episode's end: the extra row is no part of a longer run."""
    lqr = ["--env-id", "tests.tasks:LastStep-v0", "--checkpoint-every", 5]
    short = run(step_loop, tmp_path / "a", *lqr, "--total-timesteps", 310)
    planned = run(step_loop, tmp_path / "b", *lqr, "--total-timesteps", 400)
    module = load(step_loop)
    assert_same_end(
        planned, learner(step_loop)(module.parse(["--resume", str(short), "--total-timesteps", "400"]))
    )


def test_stopped_before_the_first_checkpoint(loop, tmp_path, monkeypatch):
    """A signal during an update ends the run after that step; going on from step 0 logs nothing twice."""
    module = load(loop)

    def stop(*args):
        module.SIGNALS.append(signal.SIGTERM)
        return {}

    with monkeypatch.context() as patch:
        patch.setattr(module, "SIGNALS", [])
        patch.setattr(module.Agent, "update", stop)
        with pytest.raises(SystemExit, match="143"):
            learner(loop)(module.parse(tiny(loop, "--runs-dir", tmp_path / "a", "--checkpoint-every", 300)))
    (folder,) = (tmp_path / "a").iterdir()
    learner(loop)(module.parse(["--resume", str(folder)]))
    assert_same_end(run(loop, tmp_path / "b", "--checkpoint-every", 300), folder)


def test_stopped_during_the_first_evaluation(loop, tmp_path, monkeypatch):
    """Nothing has been learned yet: nothing is left on disk."""
    module = load(loop)
    monkeypatch.setattr(module, "SIGNALS", [signal.SIGINT])
    with pytest.raises(SystemExit, match="130"):
        learner(loop)(module.parse(tiny(loop, "--runs-dir", tmp_path / "runs")))
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_resume_is_exact_on_a_gpu(algo, tmp_path):
    """The same extension as above with everything on the device."""
    flags = [
        "--device",
        "cuda",
        *(["--tdk"] if hasattr(load(algo).Args, "tdk") else []),
        *(["--num-particles", 2] if hasattr(load(algo).Args, "num_particles") else []),
        *(["--reduction", "last"] if algo == "steve" else []),
    ]
    short, planned = (
        run(algo, tmp_path / "a", *flags),
        run(algo, tmp_path / "b", *flags, "--total-timesteps", 500),
    )
    module = load(algo)
    assert_same_end(
        planned, learner(algo)(module.parse(["--resume", str(short), "--total-timesteps", "500"]))
    )


def test_full_ring_is_resumed_in_order(loop, tmp_path):
    """The replay has wrapped around several times when the run is extended."""
    ring = ["--buffer-size", 200 if loop in EPISODIC else 75]
    short = run(loop, tmp_path / "a", *ring)
    planned = run(loop, tmp_path / "b", *ring, "--total-timesteps", 450)
    module = load(loop)
    assert_same_end(
        planned, learner(loop)(module.parse(["--resume", str(short), "--total-timesteps", "450"]))
    )


def test_resuming_a_complete_run_changes_nothing(loop, finished, tmp_path, capsys):
    folder, module = finished(loop, tmp_path), load(loop)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert learner(loop)(module.parse(["--resume", str(folder)])) == folder
    assert "is complete: 300 steps" in capsys.readouterr().out
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


NETWORKS = {"actor", "critic", "critic_target"}
SOFT, SLOW = NETWORKS | {"log_alpha", "optimizer"}, NETWORKS | {"actor_target", "optimizer"}
DELAYED = NETWORKS | {"actor_target", "actor_optimizer", "critic_optimizer", "actor_loss"}
MODEL = {"model", "model_optimizer"}
HELD = {"sac": SOFT, "sac_ove": SOFT, "sac_retrace": SOFT, "sac_mve": SOFT | MODEL | {"termination"}}
HELD |= {"sac_svg_h": SOFT | MODEL | {"outcome"}, "ddpg": SLOW, "ddpg_mve": SLOW | MODEL, "td3": DELAYED}
HELD |= {"sac_vaml": SOFT | MODEL | {"outcome", "outcome_optimizer", "fit_report"}}
HELD |= {"mage": DELAYED | MODEL | {"termination"}}
HELD |= {
    "mbpo": SOFT | MODEL | {"elites", "termination", "termination_optimizer", "imagined", "refit_report"}
}
HELD["maac"] = HELD["mbpo"]
HELD |= {"svg": NETWORKS | {"slow_actor", "model", "reward", "optimizer", "actor_optimizer", "taken"}}
HELD |= {"pilco": {"actor", "processes", "episode", "planned", "report"}}  # optimisers begin anew each trial
PLANNER = MODEL | {"termination", "termination_optimizer", "intended", "outlook", "fitted"}
HELD |= {"pets": PLANNER | {"episode", "learned"}}
HELD |= {"poplin": HELD["pets"] | {"actor", "actor_optimizer", "executed", "distilled"}}
HELD |= {"me_trpo": MODEL | {"actor", "explorer", "change", "baseline", "starts", "learned", "loops"}}
HELD["me_trpo"] |= {"termination", "termination_optimizer", "report"}
HELD |= {"dreamer": NETWORKS | {"model", "optimizer", "belief", "return_spread", "report"}}
HELD |= {"steve": NETWORKS | {"optimizer", "model_optimizer", "transition", "termination", "rewards"}}


def test_checkpoint_holds_everything(stepwise, finished, tmp_path):
    """Targets, temperature, optimisers with their moments, replay, normaliser, generators: named."""
    state = torch.load(finished(stepwise, tmp_path) / "checkpoint.pt", weights_only=True)
    agent = state["agent"]
    assert set(agent) == HELD[stepwise]
    meta = {"format", "algo", "args", "step", "episode", "rows", "seconds", "history"}
    assert set(state) == meta | {"agent", "sizes", "buffer", "torch_rng", "cuda_rng", "task_rng"}
    if "critic" in agent:
        online, target = (agent[name]["layers.0.weight"] for name in ("critic", "critic_target"))
        assert not torch.equal(online, target)
    for name in (name for name in agent if name.endswith("optimizer")):
        moments = agent[name]["state"].values()
        least = 1 if (stepwise, name) == ("poplin", "actor_optimizer") else 3  # its weights are one vector
        assert len(moments) >= least and all(m["exp_avg_sq"].abs().sum() > 0 for m in moments), name
    groups = sum(len(group["params"]) for group in agent.get("optimizer", {}).get("param_groups", []))
    if stepwise in family_of("sac"):
        trained = ["actor", "critic", *(["outcome"] if stepwise == "sac_svg_h" else [])]  # beside log α
        assert groups == len([n for part in trained for n in agent[part] if "normalizer" not in n]) + 1
    replay, step = state["buffer"], state["step"]
    assert len(replay["rows"]) == len(replay["episode"]) == step == replay["added"]
    for part, name in (("model", "std"), ("model", "input_std"), ("elites", "std")):
        assert name not in agent.get(part, {}) or (agent[part][name] != 1).all()
    if stepwise == "sac_svg_h":
        assert agent["actor"]["normalizer.seen"].item() == step
    if stepwise == "pilco":
        assert agent["processes"]["count"] == 20 and 60 < agent["planned"] <= step and agent["report"].all()
    if stepwise in ("pets", "poplin"):
        assert 60 < agent["learned"] <= step and agent["intended"].any() and agent["fitted"].all()
    if stepwise == "me_trpo":
        assert all(agent[name].all() for name in ("change", "baseline", "starts", "loops"))
    if stepwise in ("mbpo", "maac"):
        assert len(agent["imagined"]["rows"]) > 50 and agent["refit_report"].abs().min() > 0


@pytest.mark.parametrize(
    ("every", "total", "pace", "steps"),
    [
        (None, 20_000, 1, [5_000, 10_000, 15_000]),
        (None, 1_000_000, 1, list(range(20_000, 1_000_000, 20_000))),  # each holds the whole replay
        (None, 1_000_000, 0.02, list(range(3_000, 1_000_000, 3_000))),  # a thousand steps take 50 s
        (300_000, 1_000_000, 0.02, [300_000, 600_000, 900_000]),
        (999, 3_000, 1, [1_000, 2_000]),
    ],
)
def test_checkpoints_are_few(every, total, pace, steps, monkeypatch):
    """Episodes of a thousand steps, `pace` of them a millisecond: by default a checkpoint every 5 000 or a
    fiftieth of the run, whichever is more, but one after two minutes in any case."""
    module, found = load("sac"), []
    monkeypatch.setattr(module.time, "perf_counter", lambda: run.step / pace / 1000)
    args = SimpleNamespace(checkpoint_every=every, total_timesteps=total)
    ignored = SimpleNamespace(set_postfix_str=lambda *_, **__: None)
    run = SimpleNamespace(args=args, bar=ignored, log=lambda scalars: None, episode=0, saved=0, step=0)
    run.saved_at = 0

    def save(name):
        found.append(run.step)
        run.saved, run.saved_at = run.step, module.time.perf_counter()

    run.save = save
    for run.step in range(1_000, total + 1, 1_000):
        module.RunFolder.end_episode(run, {"r": 0.0, "l": 1_000})
    assert found == steps
