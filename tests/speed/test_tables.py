"""The benchmarks print what they promise."""

import re

import pytest

from tests.conftest import long, tool


@long
def test_launch_speed_prints_three_figures():
    done = tool("speed.launcher", "--steps", 260, "--rounds", 1, "--jobs", 1, "--runs", 20)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert re.fullmatch(r"1 runs: one worker [\d.]+ s, two [\d.]+ s, throughput [\d.]+", lines[0])
    assert "the launcher's processor" in lines[1] and re.fullmatch(r"report of 20 runs: [\d.]+ s", lines[2])
    done = tool("speed.launcher", "--steps", 256)
    assert done.returncode == 2 and done.stderr == "error: --steps 256: must be at least 257\n"


@long
def test_mbpo_speed_prints_updates_and_floor():
    flags = ["--threads", 1, "--rounds", 1, "--repeats", 1]
    done = tool("speed.mbpo_update", *flags, "--", "--rollout-batch", 50, "--hidden", 16, "--model-hidden", 8)
    assert done.returncode == 0, done.stderr
    sac, mbpo, ratio, fit, floor, share = map(float, done.stdout.splitlines()[1].split()[1:])
    assert min(sac, mbpo, fit, floor) > 0
    assert ratio == pytest.approx(mbpo / sac, rel=0.05) and share == pytest.approx(floor / fit, abs=0.05)
    for bad, text in (
        (["--rounds", 0], "--rounds 0: must be at least 1"),
        (["--env-id", "No-v0"], "No-v0: must be"),
    ):
        done = tool("speed.mbpo_update", *flags, *bad)
        assert done.returncode == 2 and text in done.stderr and len(done.stderr.splitlines()) == 1


@long
def test_vaml_speed_prints_ratios():
    done = tool("speed.vaml_losses", "--threads", 1, "--samples", 1, 2, "--rounds", 1, "--repeats", 1)
    assert done.returncode == 0, done.stderr
    for line, samples in zip(done.stdout.splitlines()[1:], (1, 2), strict=True):
        _, n, mle, *rest = map(float, line.split())
        assert n == samples and all(x > 0 for x in rest)
        for cost, ratio in zip(rest[::2], rest[1::2], strict=True):
            assert ratio == pytest.approx(cost / mle, rel=0.05, abs=0.02)
    done = tool("speed.vaml_losses", "--samples", 0)
    assert done.returncode == 2 and done.stderr == "error: --samples 0: must be at least 1\n"


@long
def test_oracle_speed_prints_a_ratio():
    flags = ["--env-ids", "Hopper-v5,Ant-v5", "--threads", 1, "--rounds", 2, "--batch", 8, "--slopes", 4]
    done = tool("speed.oracle_query", *flags)
    assert done.returncode == 0, done.stderr
    name, threads, *times = done.stdout.splitlines()[1].split()
    assert (name, threads) == ("Hopper-v5", "1") and len(times) == 4 and all(float(x) > 0 for x in times)
    assert done.stdout.splitlines()[2].split()[-1] == "nan"  # its torso turns freely
    for flags, expected in (
        (["--batch", 0], "--batch 0: must be at least 1"),
        (["--slopes", 9, "--batch", 8], "--slopes 9: must be in [1, 8], the batch"),
        (["--env-ids", "Pendulum-v1"], "must be a task that holds MuJoCo's model"),
        (["--env-ids", "HumanoidStandup-v5"], "must be tasks with batched formulas"),
    ):
        done = tool("speed.oracle_query", *flags)
        assert done.returncode == 2 and expected in done.stderr and len(done.stderr.splitlines()) == 1
