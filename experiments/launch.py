"""Run all combinations of algorithms, tasks and seeds in parallel; resume unfinished ones, skip finished.

    ./benchmark.sh --algos sac,sac_mve --env-ids InvertedPendulum-v5,Hopper-v5 --seeds 1,2,3 -- --horizon 3
    ./benchmark.sh --suite svg-table-2 --dry-run

What follows -- goes to every algorithm that has the flag (--horizon means nothing to sac.py). --dry-run
prints the exact commands and stops. A suite is a file of such lines, one of experiments/suites/ or your own.
Each run writes its output to <runs-dir>/logs/. A run belongs to a command when all its arguments agree, so
the same line can be given again after a crash, or with more seeds. Exit code: 0 when every run is complete,
1 when some failed (named, with their logs), 2 for a mistake.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
OWN_FLAGS = ("--env-id", "--seed", "--runs-dir", "--num-threads", "--resume")


@dataclasses.dataclass
class Job:
    """One run: a shell command and where its output goes; all that another back end needs to know."""

    name: str
    command: list[str]
    log: Path
    state: str  # "new", "resumed" or "finished"
    steps: int


def load(algo: str):
    """algos/<algo>.py as a module."""
    spec = importlib.util.spec_from_file_location(algo, ROOT / "algos" / f"{algo}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[algo] = module
    spec.loader.exec_module(module)
    return module


def split_flags(extra: list[str]) -> list[list[str]]:
    """["--a", "1", "--b"] -> [["--a", "1"], ["--b"]]. Raises ValueError where a value comes first."""
    groups: list[list[str]] = []
    for word in extra:
        if word.startswith("--"):
            groups.append([word])
        elif groups:
            groups[-1].append(word)
        else:
            raise ValueError(f"{word}: must be a flag, after --")
    return groups


def has_flag(module, flag: str) -> bool:
    """Whether the file's Args know --flag, --flag=value or --no-flag."""
    name = flag.split("=")[0].removeprefix("--").replace("-", "_")
    fields = {field.name for field in dataclasses.fields(module.Args)}
    return name in fields or name.removeprefix("no_") in fields


def read_suite(name: str) -> tuple[str, list[dict]]:
    """What the suite says of itself, and its blocks of algos, env_ids, seeds and flags.

    `name` is that of a file in experiments/suites/ or a path. Raises ValueError for what is not a suite.
    """
    path = Path(name) if name.endswith(".toml") else ROOT / "experiments" / "suites" / f"{name}.toml"
    try:
        suite = tomllib.loads(path.read_text())
    except OSError:
        known = ", ".join(sorted(path.stem for path in (ROOT / "experiments" / "suites").glob("*.toml")))
        raise ValueError(f"--suite {name}: must be a .toml file or one of {known}") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"--suite {name}: must be valid TOML: {error}") from None
    blocks, lists = suite.get("runs", []), ("algos", "env_ids", "seeds")
    if not (isinstance(blocks, list) and all(isinstance(block, dict) for block in blocks)):
        raise ValueError(f"--suite {name}: runs: must be blocks [[runs]]")
    for keys, allowed in ((suite, {"about", "cost", "runs"}), *((b, {*lists, "flags"}) for b in blocks)):
        if unknown := set(keys) - allowed:
            raise ValueError(f"--suite {name}: {unknown.pop()}: must be one of {', '.join(sorted(allowed))}")
    for block in blocks:
        for key in lists:
            if not (isinstance(block.get(key), list) and block[key]):
                raise ValueError(f"--suite {name}: {key}: must be a list, not empty, in every block of runs")
        if not isinstance(block.get("flags", ""), str):
            raise ValueError(f"--suite {name}: flags: must be a string, as on the command line")
    if not blocks:
        raise ValueError(f"--suite {name}: must have at least one block [[runs]]")
    return f"{suite.get('about', name)}\nexpected cost: {suite.get('cost', 'unknown')}", blocks


def find_run(runs_dir: Path, algo: str, wanted: dict) -> Path | None:
    """The newest run folder with exactly these arguments."""
    for folder in sorted(
        runs_dir.glob(f"[!.]*__{algo}__*"), key=lambda path: path.name.split("__")[-1], reverse=True
    ):
        try:
            record = json.loads((folder / "args.json").read_text())
        except (OSError, ValueError):
            continue
        saved = record["args"]
        same = all(
            saved.get(name) == value for name, value in wanted.items() if name not in ("runs_dir", "resume")
        )
        if record["algo"] == algo and same:
            return folder
    return None


def plan(
    algos: list[str], env_ids: list[str], seeds: list[str], runs_dir: str, threads: int, extra: list[str]
):
    """The jobs in order, seeds outermost so that comparisons grow evenly. Raises ValueError on bad input."""
    groups = split_flags(extra)
    modules = {}
    for algo in algos:
        if not (ROOT / "algos" / f"{algo}.py").is_file():
            known = ", ".join(sorted(path.stem for path in (ROOT / "algos").glob("*.py")))
            raise ValueError(f"--algos {algo}: must be of {known}")
        modules[algo] = load(algo)
    for flag, *_ in groups:
        if flag.split("=")[0] in OWN_FLAGS:
            raise ValueError(f"{flag}: must be given before the --")
        if not any(has_flag(module, flag) for module in modules.values()):
            raise ValueError(f"{flag}: must be a flag of at least one of {', '.join(algos)}")
    jobs = []
    for seed in seeds:
        for env_id in env_ids:
            for algo, module in modules.items():
                own = [word for group in groups if has_flag(module, group[0]) for word in group]
                flags = ["--env-id", env_id, "--seed", seed, "--runs-dir", runs_dir]
                flags += ["--num-threads", str(threads), *own]
                args = module.parse(flags)
                settings = re.sub(r"[^\w.]+", "-", " ".join(own)).strip("-")
                if len(settings) > 60:  # file names have their limits
                    settings = f"{settings[:52]}-{zlib.crc32(settings.encode()):08x}"
                task = re.sub(r"[^\w.-]+", "-", env_id)
                name = "__".join([task, algo, seed, *([settings] if settings else [])])
                folder = find_run(Path(runs_dir), algo, dataclasses.asdict(args))
                state = "new" if folder is None else "resumed"
                if folder is not None:
                    flags = ["--resume", str(folder)]
                    state = "finished" if (folder / "final.pt").exists() else state
                command = [sys.executable, f"algos/{algo}.py", *flags]
                jobs.append(
                    Job(name, command, Path(runs_dir) / "logs" / f"{name}.log", state, args.total_timesteps)
                )
    return jobs


def steps_done(log: Path) -> int:
    """The step on the progress bar that a run last wrote to its log."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 2000))
            found = re.findall(rb" (\d+)/\d+ \[", file.read())
    except OSError:
        return 0
    return int(found[-1]) if found else 0


def execute(jobs: list[Job], workers: int) -> list[Job]:
    """Run the jobs, `workers` at a time, with progress over all their steps; returns those that failed."""
    running: dict[str, subprocess.Popen] = {}
    failed: list[Job] = []
    stopping = False

    def one(job: Job) -> Job:
        if not stopping:
            with open(job.log, "ab") as log:
                log.write(f"$ {shlex.join(job.command)}\n".encode())
                log.flush()
                started = time.monotonic()
                running[job.name] = subprocess.Popen(job.command, stdout=log, stderr=log, cwd=ROOT)
            code = running[job.name].wait()
            del running[job.name]
            took = f"{time.monotonic() - started:.0f} s"
            if code:
                failed.append(job)
                tqdm.write(f"FAILED  {job.name} (exit code {code}, {took}): {job.log}")
            else:
                tqdm.write(f"done    {job.name} ({took})")
        return job

    bar = tqdm(total=sum(job.steps for job in jobs), unit="step", unit_scale=True)
    with ThreadPoolExecutor(workers) as pool:
        futures = {pool.submit(one, job): job for job in jobs}
        try:
            while pending := [future for future in futures if not future.done()]:
                ended = sum(job.steps for future, job in futures.items() if future.done())
                current = sum(steps_done(futures[f].log) for f in pending if futures[f].name in running)
                bar.n = ended + current
                bar.set_postfix_str(
                    f"{len(jobs) - len(pending)}/{len(jobs)} runs, {len(failed)} failed", refresh=False
                )
                bar.refresh()
                time.sleep(0.5)
        except (KeyboardInterrupt, SystemExit):
            stopping = True
            for future in futures:
                future.cancel()
            for process in list(running.values()):
                process.terminate()
            raise
        finally:
            bar.close()
    for future in futures:  # an exception in the launcher itself must not pass for success
        future.result()
    return failed


def carry_out(jobs: list[Job], runs_dir: str, workers: int, dry_run: bool) -> int:
    """Print the commands and, unless dry_run, run what is not finished; returns the exit code."""
    for job in jobs:
        print(f"{job.state:<9} {shlex.join(job.command)}")
    todo = [job for job in jobs if job.state != "finished"]
    if dry_run or not todo:
        print(f"{len(jobs)} runs, {len(jobs) - len(todo)} finished")
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        (Path(runs_dir) / "logs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"error: --runs-dir {runs_dir}: must be writable: {error.strerror}", file=sys.stderr)
        return 2
    try:
        failed = execute(todo, workers)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last checkpoints", file=sys.stderr)
        return 130
    for job in failed:
        print(f"failed: {job.name}: {job.log}", file=sys.stderr)
    print(f"{len(jobs)} runs, {len(jobs) - len(failed)} complete, {len(failed)} failed")
    return 1 if failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="benchmark.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    split = lambda text: list(dict.fromkeys(part for part in text.split(",") if part))  # noqa: E731
    defaults = {"algos": ["sac", "sac_mve"], "env_ids": ["InvertedPendulum-v5"], "seeds": ["1", "2", "3"]}
    parser.add_argument("--algos", type=split, help="files of algos/ (default: sac,sac_mve)")
    parser.add_argument("--env-ids", type=split, help="Gymnasium ids (default: InvertedPendulum-v5)")
    parser.add_argument("--seeds", type=split, help="(default: 1,2,3)")
    parser.add_argument("--suite", help="instead of these three: a file of experiments/suites/, or a path")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="runs at a time (default: all cores)"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each run (default: 1)")
    parser.add_argument("--runs-dir", default="runs", help="parent of the run folders (default: runs)")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and stop")
    parser.add_argument("extra", nargs="*", metavar="-- FLAGS", help="for the algorithms")
    args = parser.parse_args()
    try:
        block = {name: getattr(args, name) for name in defaults}
        if [] in block.values():
            raise ValueError("--algos, --env-ids, --seeds: must not be empty")
        blocks = [{n: value or defaults[n] for n, value in block.items()}]
        if args.suite:
            if any(block.values()):
                raise ValueError(f"--suite {args.suite}: must be alone, without --algos, --env-ids, --seeds")
            about, blocks = read_suite(args.suite)
            print(about)
        if args.workers < 1:
            raise ValueError(f"--workers {args.workers}: must be at least 1")
        runs_dir = str(Path(args.runs_dir).resolve())
        jobs, rounds = [], list(dict.fromkeys(str(seed) for block in blocks for seed in block["seeds"]))
        for seed in rounds:
            for block in blocks:
                parts = (block["algos"], block["env_ids"], [seed] * (seed in map(str, block["seeds"])))
                extra = [*shlex.split(block.get("flags", "")), *args.extra]
                jobs += plan(*parts, runs_dir, args.threads, extra)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return carry_out(jobs, runs_dir, args.workers, args.dry_run)


if __name__ == "__main__":
    sys.exit(main())
