"""Shared fixtures: the algorithm files as modules, and runs small enough to repeat."""

import csv
import ctypes.util
import dataclasses
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.summary.writer import event_file_writer

if "MUJOCO_GL" not in os.environ and "DISPLAY" not in os.environ and ctypes.util.find_library("OSMesa"):
    os.environ["MUJOCO_GL"] = "osmesa"  # so that the video tests run where there is no display

# Event files of one second and process are read in the order of their names, which end in a counter: without
# leading zeros the tenth comes before the ninth. Separate processes, as users run, differ in the second.
event_file_writer._global_uid = event_file_writer.AtomicCounter(100_000)

ROOT = Path(__file__).resolve().parent.parent
ALGOS = sorted(path.stem for path in (ROOT / "algos").glob("*.py"))
EPISODIC = [n for n in ALGOS if "def train_episodic" in (ROOT / "algos" / f"{n}.py").read_text()]
STEPWISE = [n for n in ALGOS if n not in EPISODIC]
TRIALS = [n for n in STEPWISE if "class TrialRun" in (ROOT / "algos" / f"{n}.py").read_text()]
# The loop is one text in all files (test_family): one of each kind is killed, starved and misled, with
# FARSIGHT_LONG=1, as in CI, two and what takes long is run as well, and with FARSIGHT_ALL=1 every file.
ALL, LONG = os.environ.get("FARSIGHT_ALL"), os.environ.get("FARSIGHT_LONG") or os.environ.get("FARSIGHT_ALL")
LOOPS = ALGOS if ALL else [*(EPISODIC if LONG else []), "sac_mve"]
long = pytest.mark.skipif(not LONG, reason="takes long: FARSIGHT_LONG=1")
by_hand = pytest.mark.skipif(not ALL, reason="takes very long: FARSIGHT_ALL=1")
PARENTS = {n: b for n in STEPWISE if (b := n.split("_")[0]) != n and b in ALGOS}  # which --horizon 0 is
TINY = {"env-id": "tests.tasks:Cliff-v0", "total-timesteps": 300, "learning-starts": 60, "batch-size": 16}
TINY |= {"hidden": 16, "eval-every": 100, "eval-episodes": 2, "log-every": 20, "checkpoint-every": 70}
TINY |= {"num-threads": 1, "device": "cpu"}
TINY_MODEL = {"model-hidden": 16, "model-layers": 2, "model-warm-up": 5, "normalize-every": 50}
TINY_MODEL |= {"model-batch": 16, "diagnose-every": 40, "expansion-starts": 60, "sequence-batch": 16}
TINY_MODEL |= {"actor-batch": 8, "fit-steps": 6, "fit-epochs": 2, "mle-decay": 300}
TINY_MODEL |= {"rollout-batch": 50, "model-interval": 25, "refit-steps": 12, "epoch-length": 50, "elites": 2}
TINY_MODEL |= {"rollout-length-max": 4, "growth-starts": 1, "growth-ends": 4}
TINY_MODEL |= {"target-interval": 50, "updates-per-step": 1, "model-updates": 1}
TINY_GOAL = {"env-id": "TorqueBall-v0", "num-envs": 2, "updates-per-cycle": 12, "members": 3, "horizon": 3}
TINY_GOAL |= {"model-updates": 3, "model-ready": 100}
TINY_PILCO = {"horizon": 3, "points": 20, "fit-evaluations": 4, "plan-evaluations": 4, "policy": "rbf"}
TINY_PILCO |= {"centres": 4, "cost-target": 0, "cost-weights": 1, "start-mean": 0, "start-std": 0.5}
TINY_PETS = {"horizon": 3, "candidates": 8, "elites": 2, "iterations": 2, "members": 4, "particles": 4}
TINY_PETS |= {"batch-size": 48}
TINY_POPLIN = TINY_PETS | {"policy-epochs": 2, "policy-batch": 8}
TINY_METRPO = {"horizon": 5, "collect-steps": 60, "imagined-steps": 50, "iterations": 6, "starts": 10}
TINY_METRPO |= {"check-starts": 3, "check-every": 2, "fisher-rows": 40, "members": 3, "fit-epochs": 8}
TINY_METRPO |= {"worse-share": 0.7, "max-kl": 0.3, "model-lr": 0.2}
TINY_DREAMER = {"sequence-length": 4, "learn-every": 10, "pretrain": 4, "deter": 12, "stoch": 4}
TINY_DREAMER |= {"horizon": 3, "free-nats": 0.3}
TINY_MAAC = {"horizon": 2}


def family_of(base: str) -> list[str]:
    """The base learner's file and those built on it."""
    return [name for name in STEPWISE if PARENTS.get(name, name) == base]


def load(name: str, path: Path | None = None):
    """algos/<name>.py (or another file) as a module, loaded once."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path or ROOT / "algos" / f"{name}.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def sizes(name: str) -> dict[str, object]:
    """Of TINY and TINY_MODEL the flags that the file has, TINY_GOAL for goal tasks, TINY_PILCO, TINY_PETS."""
    have = {field.name.replace("_", "-") for field in dataclasses.fields(load(name).Args)}
    wanted = TINY | TINY_MODEL | (TINY_GOAL if name in EPISODIC else {})
    wanted |= TINY_PILCO if name == "pilco" else TINY_PETS if name == "pets" else {}
    wanted |= TINY_METRPO if name == "me_trpo" else TINY_POPLIN if name == "poplin" else {}
    wanted |= TINY_DREAMER if name == "dreamer" else TINY_MAAC if name == "maac" else {}
    return {flag: value for flag, value in wanted.items() if flag in have}


def learner(name: str):
    """The file's train, or train_episodic."""
    module = load(name)
    return module.train_episodic if name in EPISODIC else module.train


def tiny(name: str, *flags: object) -> list[str]:
    """Command-line flags of a run of a second or two that does hundreds of real updates."""
    return [str(part) for item in sizes(name).items() for part in (f"--{item[0]}", item[1])] + [
        str(flag) for flag in flags
    ]


def run(name: str, folder: Path, *flags: object) -> Path:
    """Train in this process; returns the run folder."""
    return learner(name)(load(name).parse(tiny(name, "--runs-dir", folder, *flags)))


def command(name: str, *flags: object) -> list[str]:
    return [sys.executable, str(ROOT / "algos" / f"{name}.py"), *map(str, flags)]


def shell(name: str, *flags: object, **options) -> subprocess.CompletedProcess:
    """The file as a user starts it, from the repository's root."""
    options = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 300} | options
    return subprocess.run(command(name, *flags), **options)


def tool(name: str, *flags: object, **options) -> subprocess.CompletedProcess:
    """experiments/<name> as a user starts it, from the repository's root."""
    words = [sys.executable, "-m", f"experiments.{name}", *map(str, flags)]
    options = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 300} | options
    return subprocess.run(words, **options)


def needs(name: str):
    """Skip a test where an extra is not installed."""
    return pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"needs {name}")


def rows_of(path: Path) -> list[dict]:
    """The rows of a table."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def flat(value, prefix=""):
    """Every leaf of a nested state as (path, value)."""
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from flat(item, f"{prefix}/{key}")
    else:
        yield prefix, value


def differing(first: Path, second: Path, *ignore: str) -> list[str]:
    """Names of all leaves that differ between two checkpoints; times, folders, versions never count."""
    states = [dict(flat(torch.load(path, weights_only=True))) for path in (first, second)]
    names = {n for state in states for n in state}
    skip = ("/seconds", "/args/runs_dir", "/history", *ignore)
    found = []
    for name in sorted(name for name in names if not any(part in name for part in skip)):
        a, b = (state.get(name) for state in states)
        same = torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b
        if not same:
            found.append(name)
    return found


def evaluations(run_dir: Path) -> list[list[str]]:
    """Rows of eval.csv without the last column, wall time."""
    return [line.split(",")[:-1] for line in (run_dir / "eval.csv").read_text().splitlines()]


def scalars(run_dir: Path) -> dict[str, list]:
    """TensorBoard's view of a run: tag -> events, purged ones left out."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}


@pytest.fixture(autouse=True)
def quiet_state(monkeypatch):
    """Each test stands in the repository's root, with its own generator."""
    monkeypatch.chdir(ROOT)
    torch.manual_seed(0)
    torch.set_num_threads(1)


TRAINED = {}


@pytest.fixture
def finished(tmp_path_factory):
    """Copies a file's tiny run with the defaults into a folder; it is trained once per process of tests."""

    def copy(name: str, folder: Path) -> Path:
        if name not in TRAINED:
            TRAINED[name] = run(name, tmp_path_factory.mktemp("finished"))
        return Path(shutil.copytree(TRAINED[name], folder / TRAINED[name].name))

    return copy


@pytest.fixture(params=ALGOS)
def algo(request) -> str:
    return request.param


@pytest.fixture(params=LOOPS)
def loop(request) -> str:
    """A file that stands for all with its loop."""
    return request.param


@pytest.fixture(params=[name for name in LOOPS if name in STEPWISE])
def step_loop(request) -> str:
    """The same, of those with the loop over single steps."""
    return request.param


@pytest.fixture(params=STEPWISE)
def stepwise(request) -> str:
    """A file with the loop over single steps."""
    return request.param


@pytest.fixture(params=[name for name in family_of("sac") if name != "sac_vaml"])
def replayed(request) -> str:
    """A file built on SAC whose critics, at H = 0, bootstrap from replayed states."""
    return request.param


@pytest.fixture(params=family_of("sac"))
def soft(request) -> str:
    """A file built on SAC."""
    return request.param
