"""What the launcher costs, what a second worker gains, and how long a report over many runs takes.

    python -m experiments.speed.launcher              # about four minutes on two idle cores
    python -m experiments.speed.launcher --steps 300 --rounds 1 --jobs 2 --runs 50

Throughput: the same runs of sac.py, one thread each, with one worker and with two, in alternating rounds; the
ratio of the medians. Overhead: wall time of the one-worker rounds beyond that of the runs themselves, and the
launcher's own processor time while they run, as shares of the runs' time; what it takes to start and to plan
is given in seconds. Report: tables and pictures of --runs synthetic runs of 200 evaluations, ten methods on
ten tasks. Extra `bench`.
"""

import contextlib
import io
import resource
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from experiments.bench.jobs import plan
from experiments.bench.work import execute
from experiments.report.commands import Parser, mistake
from experiments.report.reading import Curve


def round_of(folder: Path, workers: int, steps: int, count: int) -> dict[str, float]:
    """`count` runs from nothing: seconds of planning, of all, of the runs, of the launcher's processor."""
    flags = ["--total-timesteps", str(steps), "--learning-starts", "256", "--eval-every", str(steps)]
    begun = time.perf_counter()
    jobs = plan(["sac"], ["Pendulum-v1"], [str(seed) for seed in range(1, count + 1)], str(folder), 1, flags)
    planned = time.perf_counter()
    (folder / "logs").mkdir(parents=True)
    used = resource.getrusage(resource.RUSAGE_SELF)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        execute(jobs, workers)
    ended, after = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
    shutil.rmtree(folder)
    if failed := [job.name for job in jobs if job.outcome != "done"]:
        raise RuntimeError(f"{failed[0]} failed")
    own = after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime
    runs = sum(job.seconds for job in jobs)
    return {"plan": planned - begun, "all": ended - planned, "runs": runs, "own": own}


def report_seconds(count: int, folder: Path) -> float:
    """Time of a report over `count` runs."""
    from experiments.report.summary import write_report

    generator, steps = np.random.default_rng(0), np.arange(200) * 5_000.0
    curves = []
    for k in range(count):
        values = {"return_mean": generator.normal(0, 1, 200).cumsum()}
        curves.append(Curve("s", f"task{k % 10}", f"method{k // 10 % 10}", k // 100, steps, values))
    begun = time.perf_counter()
    write_report(curves, folder)
    return time.perf_counter() - begun


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("--steps", type=int, default=2_000, help="of each run (default: 2000)")
    parser.add_argument("--rounds", type=int, default=2, help="(default: 2)")
    parser.add_argument("--jobs", type=int, default=4, help="runs in a round (default: 4)")
    parser.add_argument("--runs", type=int, default=1_000, help="in the report (default: 1000)")
    args = parser.parse_args()
    for name, least in (("steps", 257), ("rounds", 1), ("jobs", 1), ("runs", 1)):
        if getattr(args, name) < least:
            return mistake(f"--{name} {getattr(args, name)}: must be at least {least}")
    with tempfile.TemporaryDirectory() as folder:
        found = {1: [], 2: []}
        for k in range(args.rounds):
            for workers, rounds in found.items():
                rounds.append(round_of(Path(folder) / f"{k}-{workers}", workers, args.steps, args.jobs))
        one, two = (statistics.median(r["all"] for r in rounds) for rounds in found.values())
        print(f"{args.jobs} runs: one worker {one:.1f} s, two {two:.1f} s, throughput {one / two:.2f}")
        gaps = statistics.median((r["all"] - r["runs"]) / r["runs"] for r in found[1])
        own = statistics.median(r["own"] / r["runs"] for r in found[1])
        print(f"beyond the runs: waiting {gaps:.2%}, the launcher's processor {own:.2%}", end="; ")
        print(f"planning {found[1][0]['plan']:.1f} s once")
        print(f"report of {args.runs} runs: {report_seconds(args.runs, Path(folder) / 'report'):.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
