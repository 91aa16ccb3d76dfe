"""steps.py: real loops with a stopwatch, on the CPU; for a GPU what it would run."""

import re
import sys

import pytest
import torch

from experiments.speed import steps
from tests.conftest import ALGOS, load, long


@pytest.fixture
def measure(monkeypatch):
    """experiments/speed/steps.py, and main(*flags) of it in this process."""

    def main(*flags: object) -> int:
        monkeypatch.setattr(sys, "argv", ["steps.py", *map(str, flags)])
        return steps.main()

    steps.run = main
    return steps


@long
def test_speed_of_real_loops(measure, capsys):
    """Both files at one thread, and the share of the products; --horizon goes to the file that has it."""
    flags = "--env-id tests.tasks:Cliff-v0 --threads 1 --rounds 1 --steps 40 --warm-up 60 --peers".split()
    rest = ["--hidden", 16, "--batch-size", 16, "--horizon", 1, "--model-hidden", 8, "--model-warm-up", 2]
    assert measure.run("--algo", "sac", "sac_mve", *flags, "--", *rest) == 0
    out = capsys.readouterr().out
    for name in ("sac", "sac_mve"):
        (speed,) = re.findall(rf"^ +1 +{name} +[\d.]+ +([\d.]+)$", out, re.M)
        assert float(speed) > 1
    assert out.count("one update on 1 threads: ") == 2 and out.count("ms in matrix products (") == 2
    assert "sac --hidden 16 --batch-size 16 on" in out and "--horizon 1" in out


@pytest.mark.parametrize(
    ("flags", "code", "expected"),
    [
        (["--device", "cuda"], 2, "--device cuda: must be cpu here: torch finds no CUDA device"),
        (["--processes", 2], 2, "--processes 2: must be with --device cuda"),
        (["--rounds", 0], 2, "--rounds 0: must be a whole number, at least 1"),
        (["--seconds", "nan"], 2, "--seconds nan: must be a number, at least 0"),
        (["--threads", 1000], 2, "--threads 1000: must be at most"),
        (
            ["--", "--gamma", 0.9, "--no-such-flag", 3],
            2,
            "--no-such-flag: must be a flag of at least one of sac",
        ),
        (["--", "--no-such-flag"], 2, "--no-such-flag: must be a flag of at least one of sac"),
        (["--env-id", "Nope-v0", "--rounds", 1, "--threads", 1], 1, "--env-id Nope-v0: must be a task"),
    ],
)
def test_speed_mistakes(flags, code, expected, measure, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    try:
        found = measure.run("--peers", *flags)
    except SystemExit as stop:
        found = stop.code
    assert found == code
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and expected in error


@long
def test_speed_of_processes_at_once(measure):
    """Two loops over one span of time; if one ends, that is an error in its words."""
    task = measure.Task("tests.tasks:Cliff-v0", "cpu", 1, 60, steps=40, seconds=0.2, patience=60)
    flags = ["--hidden", "16", "--batch-size", "16"]
    speeds = task.ours("sac", flags, processes=2)
    assert len(speeds) == 2 and min(speeds) > 1
    with pytest.raises(RuntimeError, match="must be in"):
        task.ours("sac", [*flags, "--gamma", "2"])
    silent = [[sys.executable, "-c", "import time; time.sleep(60)"]]
    with pytest.raises(RuntimeError, match="no new point within 1 s"):
        measure.side_by_side(silent, 1, 0.0, patience=1, threads=1)


def test_speed_on_a_gpu(measure, monkeypatch, capsys):
    """What is run of every file is accepted by it; eager, captured and several at once make the table."""
    commands: dict[str, list] = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    assert set(measure.ROWS) == set(ALGOS) - {"pilco", "pets", "poplin", "me_trpo"}

    def answered(found: list[list], *_, **__) -> list[float]:
        words = [str(word) for word in found[0]]
        algo, flags = words[words.index("--algo") + 1], words[words.index("--") + 1 :]
        commands.setdefault(algo, []).append(flags)
        if algo == "td3":
            raise RuntimeError("error: it broke")
        return [40.0] if "--no-cuda-graphs" in flags else [300.0, 320.0][: len(found)]

    monkeypatch.setattr(measure, "side_by_side", answered)
    assert measure.run("--device", "cuda", "--algo", "all", "--peers", "--processes", 2) == 1
    out, error = capsys.readouterr()
    assert error.splitlines() == [
        f"error: td3, {what}: it broke" for what in ("eager", "captured", "together")
    ]
    assert re.search(r"^sac +HalfCheetah-v5 +40.0 +300.0 +7.5 +7.0$", out, re.M)
    assert re.search(
        r"^sac_svg_h +Hopper-v5 +40.0 +300.0 +7.5 +5.0   --preset released --horizon 2", out, re.M
    )
    assert out.count("2 captured at once: 300.0 to 320.0 each, 620.0 together") == len(measure.ROWS) - 1
    for algo in measure.ROWS:
        eager, captured, together = (load(algo).parse(flags) for flags in commands[algo])
        assert not eager.cuda_graphs and captured.cuda_graphs and together.cuda_graphs
        assert eager.device == "cuda" and eager.total_timesteps > 100_000


def test_one_that_hangs_is_not_covered_by_the_others(measure):
    """Two commands: one tells points without end, the other only its first. Patience is each one's own."""
    talks = "import time\nfor k in range(10**6): print('@', k, time.time(), flush=True); time.sleep(0.05)"
    hangs = "import time\nprint('@', 0, time.time(), flush=True); time.sleep(60)"
    commands = [[sys.executable, "-c", code] for code in (talks, hangs)]
    with pytest.raises(RuntimeError, match="no new point within 3 s"):
        measure.side_by_side(commands, steps=10**6, seconds=0, patience=3, threads=1)
