"""A finished run is loaded, watched, filmed, shared and exported, as docs/use_your_agent.md says."""

import argparse
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import imageio.v3 as iio
import numpy as np
import pytest
import torch

from experiments.agents import clip, keep, watch
from tests.conftest import EPISODIC, ROOT, evaluations, flat, learner, load, run, sizes, tiny, tool
from tests.docs.test_docs import blocks
from tests.every_file.test_family import mujoco_renders

PAGE = ROOT / "docs" / "use_your_agent.md"


def look(folder: Path, **options) -> list[dict]:
    """watch.py in this process: as many episodes as in each of the run's evaluations, by their returns."""
    defaults = {"episodes": 2, "seed": None, "stochastic": False, "file": None, "video": None}
    defaults |= {"no_render": "video" not in options}
    return watch.watch(argparse.Namespace(run=folder, **defaults | options))


def start(cwd: Path, *words: object) -> subprocess.CompletedProcess:
    """watch.py as a user starts it, from any folder."""
    return tool("agents.watch", *words, cwd=cwd, env=os.environ | {"PYTHONPATH": str(ROOT)})


def last_row(folder: Path) -> dict[str, float]:
    names, *_, values = evaluations(folder)
    return dict(zip(names, map(float, values), strict=True))


def strip(folder: Path) -> Path:
    """Leaves the networks and the arguments in the run's folder, in one checkpoint."""
    state = torch.load(folder / "final.pt", weights_only=True)
    state["agent"] = {name: part for name, part in state["agent"].items() if "optimizer" not in name}
    shutil.rmtree(folder)
    folder.mkdir()
    torch.save(state | {"buffer": {}}, folder / "checkpoint.pt")
    return folder


def examples(agent, rows: int) -> tuple[torch.Tensor, ...]:
    """Random observations [rows, n], and goals [rows, g] where the agent has some."""
    task = getattr(agent, "task", None)
    widths = (task.obs_dim, task.goal_dim) if task else agent.sizes[:1]
    return tuple(torch.randn(rows, width) for width in widths)


class Page:
    """Executes blocks of the page in one namespace, wherever one stands."""

    def __init__(self, run_dir: Path):
        self.run_dir, self.names = run_dir, {"torch": torch, "np": np}

    def execute(self, text: str) -> None:
        text = text.replace('"runs/<run>"', repr(str(self.run_dir)))
        exec(compile(text.replace('"algos"', repr(str(ROOT / "algos"))), PAGE.name, "exec"), self.names)

    def policy(self, name: str):
        """The page's class Policy, or GoalPolicy."""
        for text in (*blocks(PAGE, "python"), *blocks(PAGE, "python goals")):
            if "(torch.nn.Module):" in text or "(Policy):" in text:
                self.execute(text.split("\n\n\nbatch")[0])
        return self.names[name]


@pytest.fixture(scope="module")
def pendulum(tmp_path_factory) -> Path:
    """A run of a MuJoCo task, which is drawn by OpenGL."""
    return run("sac_mve", tmp_path_factory.mktemp("pendulum"), "--env-id", "InvertedPendulum-v5")


@pytest.fixture(autouse=True)
def path_of_imports(monkeypatch):
    """The page and watch.py add to it."""
    monkeypatch.setattr(sys, "path", [*sys.path])


def test_the_loaded_agent_is_the_trained_one(algo, finished, tmp_path, monkeypatch):
    """Its tensors are those saved, watching repeats the last evaluation; replay and task are not needed."""
    folder = finished(algo, tmp_path)
    saved, row = torch.load(folder / "final.pt", weights_only=True)["agent"], last_row(folder)
    played = look(folder)
    for name, key in {"return_mean": "return", "length_mean": "length", "success_rate": "success"}.items():
        assert name not in row or np.mean([episode[key] for episode in played]) == row[name], name
    assert np.std([episode["return"] for episode in played]) == row["return_std"]
    assert ("success_rate" in row) == (algo in EPISODIC)
    strip(folder)
    assert look(folder) == played
    monkeypatch.setattr(gym, "make", None)
    agent, args = load(algo).load(folder)
    assert (args.env_id, args.resume) == (sizes(algo)["env-id"], "")
    found, saved = dict(flat(agent.state_dict())), dict(flat(saved))
    compared = [name for name in saved if "optimizer" not in name]
    assert len(compared) > 10 and all(torch.equal(found[name], saved[name]) for name in compared)


def test_acts_as_the_trained_agent_on_any_numbers(loop, tmp_path, monkeypatch):
    """Lists, float64 and float32; the agent that was trained and the loaded one; with noise and without."""
    module, made = load(loop), []

    class Noted(module.Agent):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(module, "Agent", Noted)
    folder = run(loop, tmp_path)
    agent, _ = module.load(folder)
    trained, loaded = made
    assert loaded is agent
    seen = [x.numpy() if loop in EPISODIC else x.numpy()[0] for x in examples(agent, 3)]
    for deterministic in (True, False):
        found = []
        kinds = (np.float32, np.float64, np.ndarray.tolist)
        for who, kind in ((trained, np.float32), *((agent, kind) for kind in kinds)):
            torch.manual_seed(1)
            getattr(who, "begin_episode", int)()  # a planner forgets its last plan
            act = who.act_for if loop in EPISODIC else who.act
            found.append(act(*map(kind, seen), deterministic))
        assert all(np.array_equal(found[0], other) for other in found)
        assert 0 < np.abs(found[0]).max() <= 1


def test_every_policy_is_exported(algo, finished, tmp_path):
    """By the page's module: the same bits for any number of rows, and in the task's units what `act` says."""
    if algo == "pets":
        pytest.skip("has no policy")
    if algo == "dreamer":
        pytest.skip("its policy remembers, which has a test in test_dreamer.py")
    agent, _ = load(algo).load(finished(algo, tmp_path))
    size = agent.task.action_dim if algo in EPISODIC else agent.sizes[1]
    policy = Page(tmp_path).policy("GoalPolicy" if algo in EPISODIC else "Policy")
    policy = policy(agent, np.full(size, -1.0), np.full(size, 3.0)).eval()
    seen = examples(agent, 2)
    rows = tuple({0: torch.export.Dim("batch")} for _ in seen)
    exported = torch.export.export(policy, seen, dynamic_shapes=rows)
    torch.export.save(exported, tmp_path / "policy.pt2")
    loaded = torch.export.load(tmp_path / "policy.pt2").module()
    for count in (1, 2, 7):
        seen = examples(agent, count)
        wanted = policy(*seen)
        assert wanted.shape == (count, size) and torch.equal(loaded(*seen), wanted)
        if algo in EPISODIC:
            acted = agent.act_for(*seen, True)
        else:
            who = load(algo).PolicyControl(agent) if algo == "poplin" else agent  # which searches
            acted = np.stack([who.act(row, True) for row in seen[0]])
        np.testing.assert_allclose(wanted.detach(), 2 * acted + 1, atol=1e-5)


def test_exploration_and_other_starts_on_request(step_loop, finished, tmp_path):
    folder = finished(step_loop, tmp_path)
    noisy, steady = look(folder, stochastic=True), look(folder)
    assert noisy == look(folder, stochastic=True)
    assert (noisy != steady) == (step_loop not in ("pilco", "pets", "poplin"))  # mean; searches
    assert look(folder, seed=7) != steady == look(folder, seed=101)
    assert look(folder, episodes=3)[:2] == steady


def test_goals_to_the_bit(tmp_path):
    """Returns that are sums of distances, and fewer episodes in the last batch than in the others."""
    (name,) = EPISODIC
    flags = ["--env-id", "TorqueBallDense-v0", "--num-envs", 3, "--eval-episodes", 5]
    folder = run(name, tmp_path, *flags)
    steady = look(folder, episodes=5)
    assert np.mean([episode["return"] for episode in steady]) == last_row(folder)["return_mean"]
    noisy = look(folder, episodes=5, stochastic=True)
    assert noisy == look(folder, episodes=5, stochastic=True) != steady != look(folder, episodes=5, seed=7)


def test_agents_that_remember_are_told_of_episodes(finished, tmp_path):
    module, folder, told = load("sac"), finished("sac", tmp_path), []
    agent, args = module.load(folder)
    agent.begin_episode = lambda: told.append(True)
    env = module.make_env(args.env_id)
    assert len(list(watch.play(module, agent, env, 101, 3, True))) == len(told) == 3


# --- as a command ---


@pytest.mark.parametrize("name", ["sac_mve", *EPISODIC])
def test_from_a_folder_with_an_odd_name(name, finished, tmp_path):
    here = tmp_path / "Läufe von früher"
    here.mkdir()
    folder = finished(name, here)
    done = start(here, folder.name, "--no-render", "--episodes", 2)
    assert (done.returncode, done.stderr) == (0, "")
    first, second, mean = done.stdout.splitlines()
    assert first.startswith("episode 0  return ") and second.startswith("episode 1  return ")
    row = last_row(folder)
    assert f"mean of 2  return {round(row['return_mean'], 2)}  length {row['length_mean']}" in mean


def test_a_copied_file_with_its_own_task(tmp_path, capsys, monkeypatch):
    """--file finds it, and the task's module beside it. Its policy draws numbers in evaluation too."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "beside.py").write_text(
        "import gymnasium as gym\nfrom tests.tasks import Cliff\n"
        "gym.register('Beside-v0', entry_point=Cliff, max_episode_steps=20)\n"
    )
    file, source = tmp_path / "mine" / "my_copied_sac.py", (ROOT / "algos" / "sac.py").read_text()
    mean, noisy = "u = mean if deterministic", "u = mean + torch.randn_like(mean) if deterministic"
    assert source.count(mean) == 1
    file.write_text(source.replace(mean, noisy))
    with monkeypatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path, str(file.parent)])
        module = load(file.stem, file)
        words = tiny("sac", "--env-id", "beside:Beside-v0", "--runs-dir", tmp_path)
        folder = module.train(module.parse(words))
    sys.modules.pop("beside")
    gym.registry.pop("Beside-v0")
    played = look(folder, file=file)
    assert np.mean([episode["return"] for episode in played]) == last_row(folder)["return_mean"]
    assert played != look(folder, file=file, seed=7)
    assert "was made by my_copied_sac.py, --file must say where" in fails(capsys, folder)


def fails(capsys, folder: Path, *words: object) -> str:
    """The one line that watch.py ends in, exit code 2."""
    before, hook = sorted(folder.parent.rglob("*")), sys.unraisablehook
    capsys.readouterr()
    try:
        code = watch.main([str(folder), *map(str, words or ["--no-render"])])
    finally:
        sys.unraisablehook = hook
    out, error = capsys.readouterr()
    assert (code, out) == (2, "") and error.startswith("error: ") and error.count("\n") == 1, error
    assert sorted(folder.parent.rglob("*")) == before
    return error.removeprefix("error: ").rstrip()


def test_mistakes(finished, tmp_path, capsys, monkeypatch):
    folder = finished("sac_mve", tmp_path)
    video = ("--video", tmp_path / "videos")
    assert "must be a run's folder" in fails(capsys, tmp_path / "nowhere")
    assert "must be a run's folder" in fails(capsys, ROOT / "docs" / "figures")
    assert "BadInput('--resume" in fails(capsys, folder, "--no-render", "--file", ROOT / "algos" / "sac.py")
    assert "was made by sac_mve.py" in fails(capsys, folder, "--no-render", "--file", "nowhere.py")
    assert "cannot be loaded by" in fails(capsys, folder, "--no-render", "--file", watch.__file__)
    assert "--episodes must be at least 1" in fails(capsys, folder, "--no-render", "--episodes", 0)
    assert "--seed at least 0" in fails(capsys, folder, "--no-render", "--seed", -1)
    if importlib.util.find_spec("moviepy"):
        assert "unexpected keyword argument 'render_mode'" in fails(capsys, folder, *video)
    monkeypatch.setitem(sys.modules, "moviepy", None)
    assert "cannot be drawn (or --no-render): ModuleNotFoundError" in fails(capsys, folder, *video)
    monkeypatch.setattr("glfw.init", lambda: False)
    assert "no display for a window: --video FOLDER needs none" in fails(capsys, folder, "--seed", 1)


HARM = {
    "keys": lambda state: state.pop("sizes"),
    "weights": lambda state: state["agent"].update(actor=state["agent"]["critic"]),
    "format": lambda state: state.update(format=1),
    "origin": lambda state: state.update(algo="../experiments/agents/watch.py"),
    "bytes": lambda state: None,
}


@pytest.mark.parametrize("harm", HARM)
def test_damaged_runs(harm, finished, tmp_path, capsys):
    path = strip(finished("sac_mve", tmp_path)) / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    HARM[harm](state)
    torch.save(state, path)
    if harm == "bytes":
        path.write_bytes(path.read_bytes()[:-1_000])
    assert str(path.parent) in fails(capsys, path.parent)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is always a renderer")
def test_no_renderer(pendulum, tmp_path, monkeypatch):
    """A renderer that does not start complains in many lines, and again when it is freed: one is shown."""
    pytest.importorskip("moviepy")
    monkeypatch.setenv("MUJOCO_GL", "egl")
    monkeypatch.setenv("PYOPENGL_PLATFORM", "glx")
    done = start(tmp_path, pendulum, "--video", "videos")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "InvertedPendulum-v5: cannot be drawn" in done.stderr and not (tmp_path / "videos").exists()


@pytest.mark.parametrize("name", ["sac_mve", *EPISODIC])
def test_every_episode_is_filmed(name, tmp_path, finished, pendulum):
    """And played as it is without a camera; a second time over the first."""
    pytest.importorskip("moviepy")
    if name not in EPISODIC and not mujoco_renders():
        pytest.skip("no OpenGL here: set MUJOCO_GL=osmesa or egl")
    folder = finished(name, tmp_path) if name in EPISODIC else pendulum
    for _ in range(2):
        assert look(folder, video=tmp_path / "videos") == look(folder)
        films = sorted((tmp_path / "videos").iterdir())
        assert [film.name for film in films] == [f"{folder.name}__seed-101-episode-{k}.mp4" for k in range(2)]
        assert all(film.stat().st_size > 1_000 for film in films)


# --- the page ---


def test_the_page(pendulum, tmp_path, monkeypatch):
    """Its Python, in its order; what it exports, in a process that has torch alone."""
    monkeypatch.chdir(tmp_path)
    page = Page(pendulum)
    for text in blocks(PAGE, "python"):
        page.execute(text)
    episode = look(pendulum, episodes=1)[0]
    assert page.names["total"] == pytest.approx(episode["return"])
    assert look(tmp_path / "shared") == look(pendulum)
    assert (tmp_path / "shared" / "checkpoint.pt").stat().st_size < (pendulum / "final.pt").stat().st_size / 2
    obs = torch.randn(3, 4)
    torch.save({"obs": obs, "action": page.names["policy"](obs).detach()}, "wanted.pt")
    probe = """if True:
        import sys, torch
        model, wanted = torch.export.load("policy.pt2").module(), torch.load("wanted.pt")
        assert torch.equal(model(wanted["obs"]), wanted["action"])
        assert "gymnasium" not in sys.modules
    """
    subprocess.run([sys.executable, "-I", "-c", probe], cwd=tmp_path, check=True)
    if all(map(importlib.util.find_spec, ("onnx", "onnxscript", "onnxruntime"))):
        (text,) = blocks(PAGE, "python onnx")
        page.execute(text)


def test_the_page_for_goals(finished, tmp_path):
    (name,) = EPISODIC
    folder, module = finished(name, tmp_path), load(name)
    agent, args = module.load(folder)
    env = gym.make(args.env_id)
    page = Page(folder)
    page.policy("Policy")
    page.names |= {"agent": agent, "seen": env.reset(seed=1)[0], "low": [-1.0, -1.0], "high": [1.0, 1.0]}
    for text in blocks(PAGE, "python goals"):
        page.execute(text)
    action = page.names["action"]
    assert action.shape == env.action_space.shape
    exported = page.names["exported"].module()
    seen = (torch.as_tensor(np.float32(page.names[name])) for name in ("obs", "goal"))
    np.testing.assert_allclose(exported(*seen).detach()[0], action, atol=1e-6)


def test_the_pages_commands(finished, tmp_path):
    """Every way to watch that is documented, without pictures."""
    folder = finished("sac", tmp_path)
    texts = [text for path in (PAGE, ROOT / "README.md") for text in blocks(path, "bash")] + [watch.__doc__]
    lines = [line for text in texts for line in text.splitlines() if "agents.watch runs/<run>" in line]
    assert len(lines) >= 9
    for line in lines:
        words = shlex.split(line.split("agents.watch runs/<run>")[1], comments=True)
        words = " ".join(words).replace("--video videos", "").replace("--no-render", "").split()
        words = [str(ROOT / "algos" / "sac.py") if w == "path/to/my_method.py" else w for w in words]
        assert watch.main([str(folder), "--no-render", *words]) == 0


def test_a_kept_agent_plays_as_its_run_and_is_small(loop, finished, tmp_path, capsys):
    """Without replay, optimisers and slow copies; it cannot be trained on, and says so."""
    folder = finished(loop, tmp_path)
    out = tmp_path / "agents" / "one"
    keep.keep(folder, out)
    assert {path.name for path in out.iterdir()} == {"final.pt", "args.json", "eval.csv"}
    state, whole = (torch.load(path / "final.pt", weights_only=True) for path in (out, folder))
    left = {name for name in whole["agent"] if "optimizer" in name or name.endswith("_target")}
    assert left and state["agent"].keys() == whole["agent"].keys() - left and state["args"] == whole["args"]
    assert "buffer" in whole and "buffer" not in state
    if loop not in EPISODIC:
        assert look(out) == look(folder)
    before = sorted(path.read_bytes() for path in out.iterdir())
    module = load(loop)
    with pytest.raises(module.BadInput, match=f"--resume {out}: must fit the task as it is now: 'buffer'"):
        learner(loop)(module.parse(["--resume", str(out), "--total-timesteps", "400"]))
    assert sorted(path.read_bytes() for path in out.iterdir()) == before


def test_an_unfinished_run_is_kept_as_one(tmp_path):
    """Its agent is the last checkpoint's; evaluations that came later are not its own."""
    folder = run("sac", tmp_path / "runs", "--checkpoint-every", 150)
    (folder / "final.pt").unlink()
    steps = [row["step"] for row in torch.load(folder / "checkpoint.pt", weights_only=True)["rows"]]
    keep.keep(folder, tmp_path / "kept")
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {"checkpoint.pt", "args.json", "eval.csv"}
    assert [int(row[0]) for row in evaluations(tmp_path / "kept")[1:]] == steps
    assert len(evaluations(folder)) > len(steps) + 1
    look(tmp_path / "kept")


def test_mistakes_of_keeping(finished, tmp_path, capsys, monkeypatch):
    folder = finished("sac_mve", tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "file").write_text("")
    rows = [(tmp_path / "no", tmp_path / "new", "must be a run's folder with a readable final.pt")]
    rows += [(folder, tmp_path / "there", "must be a folder that does not exist yet")]
    rows += [(folder, tmp_path / "file" / "new", "must be a folder that can be written")]
    for run_folder, out, expected in rows:
        monkeypatch.setattr(sys, "argv", ["keep.py", str(run_folder), str(out)])
        assert keep.main() == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and expected in said and said.count("\n") == 1
    assert not (tmp_path / "new").exists() and list((tmp_path / "there").iterdir()) == []


@pytest.mark.parametrize("folder", sorted((ROOT / "agents").iterdir()), ids=lambda folder: folder.name)
def test_the_agents_of_this_repository_play(folder, capsys, monkeypatch):
    """Each is loaded by its file as it is now and earns what no random policy does."""
    monkeypatch.setattr(watch, "play", lambda *args: (row for row in [first_steps(*args)]))
    assert watch.main([str(folder), "--no-render", "--episodes", "1"]) == 0
    assert sum(path.stat().st_size for path in folder.iterdir()) < 1.5e6


def first_steps(module, agent, env, seed: int, *_) -> dict:
    """The return of 250 steps, above 300 on each of their tasks: a hopper that stands earns 250."""
    obs, total = module.begin_episode(env, agent, seed), 0.0
    for _ in range(250):
        obs, reward, *_ = env.step(agent.act(obs, True))
        total += reward
    assert total > 300
    return {"return": total, "length": 250}


# ---------------------------------------------------------------- clip.py


def test_a_clip_is_a_moving_picture(pendulum, tmp_path, capsys):
    """Every second step of the evaluation's first episode, at the task's speed; a kept agent will do."""
    if not mujoco_renders():
        pytest.skip("no OpenGL here: set MUJOCO_GL=osmesa or egl")
    keep.keep(pendulum, tmp_path / "kept")
    out = tmp_path / "new" / "a.gif"
    words = [str(tmp_path / "kept"), str(out), *"--first 2 --last 5 --width 64".split()]
    assert clip.main(words) == 0
    first, *_ = frames = iio.imread(out)
    assert first.shape == (36, 64, 3) and len(frames) == 2 and np.ptp(first) > 50
    assert iio.immeta(out)["duration"] == 80  # milliseconds: 25 steps a second
    for words, text in (
        ([tmp_path / "none", out], "none: must be a run's folder"),
        ([pendulum, tmp_path / "a.mp4"], "must end in .gif"),
        ([pendulum, out, "--last", "61"], "--last 61: must be at least 62"),
        ([pendulum, out, "--first", "5000", "--last", "9000"], "--first 5000: must leave two pictures"),
        ([pendulum, out, "--camera", "none"], "--camera none: must be left out: InvertedPendulum-v5 has"),
    ):
        before = out.read_bytes()
        assert clip.main([str(word) for word in words]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and text in error and error.count("\n") == 1
        assert out.read_bytes() == before and not (tmp_path / "a.mp4").exists()
