"""Run all combinations of algorithms, tasks and seeds in parallel; resume unfinished ones, skip finished.

    ./benchmark.sh --algos sac,sac_mve --env-ids InvertedPendulum-v5,Hopper-v5 --seeds 1,2,3 -- --horizon 3
    ./benchmark.sh --suite svg-table-2 --dry-run
    ./benchmark.sh --suite quick --ray auto

What follows -- goes to every algorithm that has the flag (--horizon means nothing to sac.py). Works from any
folder: paths are relative to where you stand, and tasks of your own are found there. --dry-run prints the
exact commands and stops. Each run writes its output to <runs-dir>/logs/. A run belongs to a command when all
its arguments agree, so the same line can be given again after a crash, or with more seeds.

A suite is a file of such lines, one of experiments/bench/suites/ or your own, whose blocks may sweep a flag,
as horizon = [0, 1, 3]. It ends with a report; what docs/results/<suite>/ has already is not run again, but
with --fresh or with flags after --. docs/gpu.md says how several runs share a GPU; --ray hands them to a Ray
cluster (docs/cluster.md). With --time-limit it has stopped by then, and the same line goes on from the last
checkpoints. Exit code: 0 when every run is complete, 1 when some failed (named, with their logs), 2 for a
mistake, 3 when the time was up first.
"""

import functools
import importlib.util
import math
import shlex
import signal
import sys
import time
from pathlib import Path

from experiments.bench.jobs import Job, find_run, place_of, plan, suite_jobs
from experiments.bench.options import PATIENCE, read_line
from experiments.bench.work import TimeIsUp, execute, mps_answers
from experiments.report.commands import mistake
from experiments.report.reading import method_of, read_curve

SKIPPED = ("finished", "published")


def carry_out(
    jobs: list[Job], runs_dir: str, workers: int, dry_run: bool, run_all=None, until: float = math.inf
) -> int:
    """Print the commands and, unless dry_run, run what is not finished; returns the exit code.

    run_all(jobs, until=) is another back end than this machine's `workers` processes.
    """
    for job in jobs:
        print(f"{job.state:<9} {shlex.join(job.command) if job.result is None else job.result}")
    todo = [job for job in jobs if job.state not in SKIPPED]
    if dry_run or not todo:
        print(f"{len(jobs)} runs, {len(jobs) - len(todo)} finished")
        return 0
    if not run_all:
        hint_at_mps(todo, workers)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        (Path(runs_dir) / "logs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return mistake(f"--runs-dir {runs_dir}: must be writable: {error.strerror}")
    try:
        run_all(todo, until=until) if run_all else execute(todo, workers, until)
    except TimeIsUp:
        print("the time is up; the same command goes on from the last checkpoints", file=sys.stderr)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last checkpoints", file=sys.stderr)
        return 130
    print(table(jobs))
    failed = [job for job in todo if job.outcome not in ("", "done")]
    left = [job for job in todo if not job.outcome]
    for job in failed:
        print(f"failed: {job.name}: {job.log}", file=sys.stderr)
    complete, more = len(jobs) - len(failed) - len(left), f", {len(left)} left" if left else ""
    print(f"{len(jobs)} runs, {complete} complete, {len(failed)} failed{more}")
    return 1 if failed else 3 if left else 0


def hint_at_mps(jobs: list[Job], workers: int) -> None:
    """One line for those who are about to let several runs take turns on a GPU."""
    import torch

    together = min(workers, sum(job.wanted["device"] != "cpu" for job in jobs))
    if together > 1 and torch.cuda.is_available() and not mps_answers():
        share = "NVIDIA's MPS lets them share it: nvidia-cuda-mps-control -d (docs/gpu.md)"
        print(f"hint: {together} runs will take turns on the GPU; {share}", file=sys.stderr)


def table(jobs: list[Job]) -> str:
    """How every run ended: state, steps/s, time, name, and the log of those that failed."""
    lines = [f"{'state':<14} {'steps/s':>8} {'seconds':>8}  run"]
    for job in jobs:
        state = job.outcome or job.state
        speed = f"{job.steps / job.seconds:.0f}" if job.outcome == "done" and job.state == "new" else ""
        spent = f"{job.seconds:.0f}" if job.seconds else ""
        where = "" if state in ("done", *SKIPPED) else f": {job.log}"
        lines.append(f"{state:<14} {speed:>8} {spent:>8}  {job.name}{where}")
    return "\n".join(lines)


def report_on(jobs: list[Job], suite: str, runs_dir: str) -> None:
    """Write and print the report on a suite's complete runs, if the extra bench is there."""
    if missing := [n for n in ("scipy", "matplotlib") if importlib.util.find_spec(n) is None]:
        print(f"no report: {missing[0]} is not installed (pip install -e '.[bench]')")
        return
    from experiments.report.summary import write_report

    curves, missing = [], []
    for job in jobs:
        folder = find_run(Path(runs_dir), job.algo, job.wanted)
        complete = folder is not None and (folder / "final.pt").exists()
        path = folder / "eval.csv" if complete else job.result
        if path is None:
            missing.append(job.name)
        else:
            task, algo, settings = place_of(job).split("/")
            method = method_of(algo, settings)
            curves.append(read_curve(path, job.suite or suite, task, method, job.wanted["seed"]))
    out = Path(runs_dir) / f"report-{suite}"
    print(write_report(curves, out, missing=missing))
    print(f"report: {out / 'report.md'}")


def main() -> int:
    for stream in (sys.stdout, sys.stderr):  # what a console cannot show is a question mark there
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    began = time.monotonic()
    defaults = {"algos": ["sac", "sac_mve"], "env_ids": ["InvertedPendulum-v5"], "seeds": ["1", "2", "3"]}
    try:
        args, extra = read_line(sys.argv[1:], __doc__)
        block = {name: getattr(args, name) for name in defaults}
        if [] in block.values():
            raise ValueError("--algos, --env-ids, --seeds: must not be empty")
        for name in ("suite", "ray", "runs_dir"):
            if getattr(args, name) == "":
                raise ValueError(f"--{name.replace('_', '-')}: must not be empty")
        if args.ray and importlib.util.find_spec("ray") is None:
            raise ValueError(f"--ray {args.ray}: must be left out without Ray: pip install -e '.[cluster]'")
        runs_dir = str(Path(args.runs_dir).resolve())
        if args.suite:
            if any(block.values()):
                raise ValueError(f"--suite {args.suite}: must be alone, without --algos, --env-ids, --seeds")
            about, jobs = suite_jobs(args.suite, runs_dir, args.num_threads, extra, args.fresh)
            print(about)
        else:
            parts = [value or defaults[name] for name, value in block.items()]
            jobs = plan(*parts, runs_dir, args.num_threads, extra)
    except (ValueError, OSError) as error:
        return mistake(error)
    run_all = None
    try:
        if args.ray and not args.dry_run:
            from experiments.bench.cluster import connect, execute_on_ray

            connect(args.ray)
            needs = {"num_cpus": args.num_threads, "memory": int(args.memory * 1e9), "num_gpus": args.gpus}
            run_all = functools.partial(execute_on_ray, needs=needs, retries=args.retries)
        until = began + args.time_limit - PATIENCE * (2 if args.ray else 1)  # of runs that must be killed
        code = carry_out(jobs, runs_dir, args.workers, args.dry_run, run_all, until)
        if args.suite and not args.dry_run and code < 2:
            report_on(jobs, Path(args.suite).stem, runs_dir)
    except (ValueError, OSError) as error:
        return mistake(error)
    return code


if __name__ == "__main__":
    sys.exit(main())
