"""What people do to such files: other notations, Python, notebooks, copies, odd consoles."""

import builtins
import dataclasses
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import EPISODIC, ROOT, command, differing, evaluations, learner, load, run, shell, tiny
from tests.every_file.test_bad_input import fails

REFUSED = {
    "total_timesteps": [300.5, "many", None, [1]],
    "batch_size": [16.5, {}],
    "hidden": ["wide", 0.5],
    "gamma": ["high", None, 1.5],
    "device": ["gpu", 0],
    "capture_video": ["yes", None, 2],
    "env_id": [None, 7],
    "runs_dir": [3],
    "env_kwargs": ["{frame_skip: 2}", 5, None],
}


def small(name: str) -> dict[str, object]:
    """The tiny run's arguments as Python values."""
    args = load(name).parse(tiny(name))
    return {field.name: getattr(args, field.name) for field in dataclasses.fields(args)}


def test_counts_may_be_written_as_floats_are(loop):
    args = load(loop).parse(tiny(loop, "--total-timesteps", "1e3", "--eval-every", "2.5e2", "--seed", "1_0"))
    assert (args.total_timesteps, args.eval_every, args.seed) == (1000, 250, 10)
    assert all(type(value) is int for value in (args.total_timesteps, args.eval_every, args.seed))


@pytest.mark.parametrize("value", ["1.5", "1e-1", "1e", "inf", "nan", "many", "0x10"])
def test_counts_that_are_none(value, loop, tmp_path, capsys, monkeypatch):
    flags = tiny(loop, "--total-timesteps", value, "--runs-dir", tmp_path / "runs")
    assert "--total-timesteps" in fails(loop, flags, capsys, monkeypatch)


def test_arguments_from_python_are_those_of_the_command_line(loop, tmp_path):
    """Floats that are whole, NumPy's numbers, paths and dictionaries; each is its own type afterwards."""
    module, given = load(loop), small(loop)
    other = {"total_timesteps": 3e2, "batch_size": np.int64(16), "hidden": 16.0, "seed": np.uint8(3)}
    other |= {
        "gamma": np.float32(0.5),
        "tau": 1,
        "runs_dir": tmp_path / "runs",
        "env_kwargs": {"b": 1, "a": 2},
    }
    given |= {name: value for name, value in other.items() if name in given}
    args = module.Args(**given)
    assert args == module.Args(**{**given, "total_timesteps": 300, "env_kwargs": '{"a":2,"b":1}'})
    kinds = {
        "total_timesteps": int,
        "batch_size": int,
        "hidden": int,
        "seed": int,
        "gamma": float,
        "tau": float,
    }
    assert all(type(getattr(args, name)) is kind for name, kind in kinds.items() if name in given)
    assert args.runs_dir == str(tmp_path / "runs") and args.env_kwargs == '{"a": 2, "b": 1}'


@pytest.mark.parametrize(("name", "value"), [(name, v) for name, values in REFUSED.items() for v in values])
def test_arguments_from_python_that_are_wrong(name, value, loop):
    flag = f"--{name.replace('_', '-')}"
    if name not in small(loop):
        pytest.skip(f"has no {flag}")
    with pytest.raises(load(loop).BadInput, match=f"^{flag} .*: must be"):
        load(loop).Args(**small(loop) | {name: value})


def test_two_runs_in_one_process(loop, tmp_path):
    """As in a notebook; a third, resumed, warns as the first did."""
    module, given = load(loop), small(loop) | {"runs_dir": tmp_path}
    first, second = (learner(loop)(module.Args(**given)) for _ in range(2))
    assert first != second and differing(first / "final.pt", second / "final.pt") == []
    assert evaluations(first) == evaluations(second)


def test_pasted_into_a_notebook(loop, tmp_path, monkeypatch, capsys):
    """A cell has no file, and another program's command line; it defines, and trains when it is asked to."""
    monkeypatch.setattr("sys.argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    cell = {"__name__": "__main__"}
    main = sys.modules["__main__"]
    source = (ROOT / "algos" / f"{loop}.py").read_text()
    monkeypatch.setitem(sys.modules, "__main__", type(sys)("__main__"))
    vars(sys.modules["__main__"]).update(cell)
    exec(compile(source, "<cell>", "exec"), vars(sys.modules["__main__"]))
    cell = vars(sys.modules["__main__"])
    assert "step" not in capsys.readouterr().out
    args = cell["Args"](**small(loop) | {"runs_dir": tmp_path, "total_timesteps": 200})
    train = cell["train_episodic" if loop in EPISODIC else "train"]
    folder = train(args)
    longer = dataclasses.replace(args, resume=folder, total_timesteps=300)
    assert train(longer) == folder and (folder / "final.pt").exists()
    assert cell["load"](folder)[1].total_timesteps == 300
    monkeypatch.setitem(sys.modules, "__main__", main)


def test_run_on_a_console_without_our_signs(loop, tmp_path):
    """± and π become question marks; nothing dies."""
    narrow = {**os.environ, "PYTHONUTF8": "0"}
    done = shell(loop, "--help", env=narrow | {"PYTHONIOENCODING": "cp1252"}, encoding="cp1252")
    assert done.returncode == 0 and "--total-timesteps" in done.stdout, done.stderr
    flags = tiny(loop, "--total-timesteps", 200, "--runs-dir", tmp_path)
    done = shell(loop, *flags, env=narrow | {"PYTHONIOENCODING": "ascii"}, encoding="ascii")
    assert done.returncode == 0 and "evaluation return" in done.stdout, done.stderr
    assert "?" in done.stdout and "Traceback" not in done.stderr


HIDE = """
import ctypes, importlib, os, pathlib, runpy, sys
for name in "gymnasium mujoco torch torch.utils.tensorboard tqdm tyro subprocess".split():
    importlib.import_module(name)  # libraries may use what their system has
for name in "fcntl resource termios pwd grp posix".split():
    sys.modules[name] = None
for name in "sysconf fork geteuid getuid sched_getaffinity uname nice mkfifo".split():
    delattr(os, name) if hasattr(os, name) else None
real, dll = pathlib.Path.exists, ctypes.CDLL
pathlib.Path.exists = lambda path, **more: not str(path).startswith("/proc") and real(path, **more)
def windows(name, *rest):
    if name is None:
        raise TypeError("bad argument type for built-in operation")
    return dll(name, *rest)
ctypes.CDLL = windows
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_needs_nothing_that_only_linux_has(loop, tmp_path):
    """Neither /proc nor sysconf nor glibc, no module of Unix alone; run, and resumed."""
    script, file = [sys.executable, "-c", HIDE], command(loop)[1]
    options = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 300}
    flags = map(str, tiny(loop, "--total-timesteps", 200, "--runs-dir", tmp_path))
    done = subprocess.run([*script, file, *flags], **options)
    assert done.returncode == 0, done.stderr
    (folder,) = tmp_path.iterdir()
    done = subprocess.run([*script, file, "--resume", folder, "--total-timesteps", "300"], **options)
    assert done.returncode == 0 and (folder / "final.pt").exists(), done.stderr


def test_printed_resume_command_can_be_pasted(loop, tmp_path):
    """A runs folder with a space, an umlaut and a quote; the command of a stopped run, in a shell."""
    parent = tmp_path / "meine Läufe's"
    flags = tiny(
        loop, "--env-id", "tests.odd_tasks:" + ("GoalCrash" if loop in EPISODIC else "Crash") + "-v0"
    )
    done = shell(loop, *flags, "--runs-dir", parent)
    (folder,) = parent.iterdir()
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    again = line.partition("to continue: ")[2]
    assert shlex.split(again) == ["python", command(loop)[1], "--resume", str(folder)]
    python = f'python() {{ {shlex.quote(sys.executable)} "$@"; }}; '
    done = subprocess.run(python + again, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 or "the task failed after" in done.stderr


def copied(name: str, folder: Path, old: str = "", new: str = "") -> Path:
    """The file as somebody's own in another folder, with one change."""
    text = (ROOT / "algos" / f"{name}.py").read_text()
    assert old in text
    (folder / "mine.py").write_text(text.replace(old, new, 1) if old else text)
    return folder / "mine.py"


def test_copied_file_that_gained_or_lost_an_argument(loop, tmp_path):
    """Resuming says so in one line, takes the default of what is new, and ends as if it had been there."""
    line = "    capture_video: bool = False  # film the first episode of each evaluation (needs moviepy)\n"
    more = line + "    leniency: Count = 7  # something that this file has gained\n"
    options = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 300}
    flags = [str(x) for x in tiny(loop, "--total-timesteps", 200, "--runs-dir", tmp_path / "runs")]
    for old, new in ((line, more), (more, line)):
        file = copied(loop, tmp_path, *((line, more) if old == more else ()))
        shutil.rmtree(tmp_path / "runs", ignore_errors=True)
        assert subprocess.run([sys.executable, file, *flags], **options).returncode == 0
        file = copied(loop, tmp_path, *((line, more) if new == more else ()))
        (folder,) = (tmp_path / "runs").iterdir()
        again = [sys.executable, file, "--resume", folder, "--total-timesteps", "300"]
        done = subprocess.run(again, **options)
        (said,) = [text for text in done.stderr.splitlines() if text.startswith("warning: ")]
        assert done.returncode == 0 and "leniency" in said and "gained (default taken) or lost" in said
        kept = json.loads((folder / "args.json").read_text())["args"]
        assert kept.get("leniency") == (7 if new == more else None) and kept["total_timesteps"] == 300


def test_other_versions_are_told_and_kept(loop, tmp_path, capsys, monkeypatch):
    """One line; args.json has the versions of the beginning and those from the resume on."""
    folder, module = run(loop, tmp_path, "--total-timesteps", 200), load(loop)
    before = json.loads((folder / "args.json").read_text())
    assert len(before["history"]) == 1 and before["torch"] == str(torch.__version__)
    numpy, step = np.__version__, torch.load(folder / "checkpoint.pt", weights_only=True)["step"]
    monkeypatch.setattr(np, "__version__", "9.9")
    capsys.readouterr()
    learner(loop)(module.parse(["--resume", str(folder), "--total-timesteps", "300"]))
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert f"numpy {numpy} -> 9.9; its last bits may be others" in said
    after = json.loads((folder / "args.json").read_text())
    assert after["numpy"] == "9.9" and [old["numpy"] for old in after["history"]] == [numpy, "9.9"]
    assert [old["since_step"] for old in after["history"]] == [0, step]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_is_called_full(loop, tmp_path, capsys, monkeypatch):
    """The second checkpoint finds no room: the line says so, the first one stays, nothing half is left."""
    module, real, count = load(loop), builtins.open, []

    def opened(path, mode="r", *more, **named):
        count.append(path) if str(path).endswith("checkpoint.pt.tmp") else None
        full = len(count) > 1 and str(path).endswith("checkpoint.pt.tmp")
        if full:
            Path(path).touch()
        return real("/dev/full" if full else path, mode, *more, **named)

    monkeypatch.setattr(module, "open", opened, raising=False)
    flags = tiny(loop, "--runs-dir", tmp_path, "--total-timesteps", 300)
    error = fails(loop, flags, capsys, monkeypatch, code=1)
    (folder,) = tmp_path.iterdir()
    assert "cannot write" in error and "No space left on device" in error
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] == 0
    assert list(folder.glob("*.tmp")) == []


def test_copied_file_with_arguments_of_other_kinds(loop, tmp_path):
    """A tuple, and numbers that may be missing, without a range: a run is resumed with them."""
    line = "    capture_video: bool = False  # film the first episode of each evaluation (needs moviepy)\n"
    more = (
        "    sizes: tuple[int, ...] = (3, 4)  # a tuple\n    least: float | None = None  # a number or none\n"
    )
    copied(loop, tmp_path, line, line + more + "    most: int | None = 5  # the same\n")
    module = load(f"mine_{loop}", tmp_path / "mine.py")
    own = ["--sizes", "7", "8", "9", "--least", "0.5", "--most", "None", "--total-timesteps", "200"]
    args = module.parse([*tiny(loop, "--runs-dir", tmp_path / "runs"), *own])
    assert (args.sizes, args.least, args.most) == ((7, 8, 9), 0.5, None)
    train = getattr(module, "train_episodic" if loop in EPISODIC else "train")
    folder = str(train(args))
    again = module.parse(["--resume", folder, "--total-timesteps", "300"])
    assert (again.sizes, again.least, again.most) == ((7, 8, 9), 0.5, None)
    assert str(train(again)) == folder
    plain = module.Args(**{**small(loop), "most": 2.0})
    assert (plain.sizes, plain.least, plain.most, type(plain.most)) == ((3, 4), None, 2, int)
    with pytest.raises(module.BadInput, match="--least many: must be of type float"):
        module.Args(**small(loop), least="many")
