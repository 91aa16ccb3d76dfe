"""Run all combinations of algorithms, tasks and seeds in parallel; resume unfinished ones, skip finished.

    ./benchmark.sh --algos sac,sac_mve --env-ids InvertedPendulum-v5,Hopper-v5 --seeds 1,2,3 -- --horizon 3
    ./benchmark.sh --suite svg-table-2 --dry-run
    ./benchmark.sh --suite quick --ray auto

What follows -- goes to every algorithm that has the flag (--horizon means nothing to sac.py). Works from any
folder: paths are relative to where you stand, and tasks of your own are found there. --dry-run prints the
exact commands and stops. A suite is a file of such lines, one of experiments/suites/ or your own;
it ends with a report, and what docs/results/<suite>/ has already is not run again, but with --fresh or with
flags after --. Each run writes its output to <runs-dir>/logs/. A run belongs to a command when all its
arguments agree, so the same line can be given again after a crash, or with more seeds. docs/gpu.md says how
several share a GPU; --ray hands the same runs to a Ray cluster (docs/cluster.md). With --time-limit it has
stopped by then, and the same line goes on from the last checkpoints. Exit code: 0 when every run is complete,
1 when some failed (named, with their logs), 2 for a mistake, 3 when the time was up first.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import json
import math
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

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
SET_HERE = {  # flags of the algorithms that the launcher sets, and how it is told what to
    "--env-id": "given before the --, as --env-ids",
    "--seed": "given before the --, as --seeds",
    "--runs-dir": "given before the --",
    "--num-threads": "given before the --",
    "--resume": "left out: unfinished runs are resumed without it",
}
SKIPPED = ("finished", "published")
PATIENCE = 15.0  # seconds that a run has to stop in before it is killed


@dataclasses.dataclass
class Job:
    """One run: its command, where its output goes; all that another back end needs to know."""

    name: str
    algo: str
    wanted: dict  # every argument
    command: list[str]  # of a new run, or of one to resume
    log: Path
    state: str  # "new", "resumed", "finished" or "published"
    steps: int
    suite: str = ""
    cwd: Path = dataclasses.field(default_factory=Path.cwd)  # where the user stands
    result: Path | None = None  # its exported evaluations, if they are published
    outcome: str = ""
    seconds: float = 0.0


@functools.cache
def load(algo: str):
    """algos/<algo>.py as a module, loaded once, by whomever."""
    path = ROOT / "algos" / f"{algo}.py"
    if getattr(sys.modules.get(algo), "__file__", None) == str(path):
        return sys.modules[algo]
    spec = importlib.util.spec_from_file_location(algo, path)
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


def option_of(word: str) -> str:
    """--env_id=value -> --env-id: the algorithms take both spellings."""
    return word.split("=")[0].replace("_", "-")


def has_flag(module, flag: str) -> bool:
    """Whether the file's Args know --flag, --flag=value or --no-flag."""
    name = option_of(flag).removeprefix("--").replace("-", "_")
    fields = {field.name for field in dataclasses.fields(module.Args)}
    return name in fields or name.removeprefix("no_") in fields


def suite_names() -> list[str]:
    return sorted(path.stem for path in (ROOT / "experiments" / "suites").glob("*.toml"))


def read_suite(name: str, above: tuple[str, ...] = ()) -> tuple[str, list[dict]]:
    """What the suite says of itself, and its blocks of algos, env_ids, seeds, flags, each with its `suite`.

    `name` is that of a file in experiments/suites/ or a path; `include` names other suites, whose blocks come
    first and stay theirs. Raises ValueError for what is not a suite.
    """
    path = Path(name) if name.endswith(".toml") else ROOT / "experiments" / "suites" / f"{name}.toml"
    try:
        suite = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError:
        known = ", ".join(suite_names())
        raise ValueError(f"--suite {name}: must be a .toml file or one of {known}") from None
    except ValueError as error:  # of the encoding, too
        raise ValueError(f"--suite {name}: must be valid TOML: {error}") from None
    blocks, lists = suite.get("runs", []), ("algos", "env_ids", "seeds")
    if not (isinstance(blocks, list) and all(isinstance(block, dict) for block in blocks)):
        raise ValueError(f"--suite {name}: runs: must be blocks [[runs]]")
    top = {"about", "cost", "include", "runs"}
    for keys, allowed in ((suite, top), *((block, {*lists, "flags"}) for block in blocks)):
        if unknown := set(keys) - allowed:
            raise ValueError(f"--suite {name}: {unknown.pop()}: must be one of {', '.join(sorted(allowed))}")
    for block in blocks:
        for key in lists:
            if not (isinstance(block.get(key), list) and block[key]):
                raise ValueError(f"--suite {name}: {key}: must be a list, not empty, in every block of runs")
        if not isinstance(block.get("flags", ""), str):
            raise ValueError(f"--suite {name}: flags: must be a string, as on the command line")
    included = []
    for other in suite.get("include", []):
        if other in (*above, name):
            raise ValueError(f"--suite {name}: include: must not lead back to {other}")
        included += read_suite(other, (*above, name))[1]
    if not (blocks or included):
        raise ValueError(f"--suite {name}: must have at least one block [[runs]]")
    about = f"{suite.get('about', name)}\nexpected cost: {suite.get('cost', 'unknown')}"
    return about, [*included, *({**block, "suite": path.stem} for block in blocks)]


def find_run(runs_dir: Path, algo: str, wanted: dict, any_version: bool = False) -> Path | None:
    """The newest run folder with exactly these arguments, complete or with a checkpoint to go on from.

    A run of a version of the file that had other arguments cannot be resumed: it is named once and left
    alone, but with any_version, for those who only read it.
    """
    names = {field.name for field in dataclasses.fields(load(algo).Args)}
    free = {"runs_dir", "resume", "device" if wanted.get("device") == "auto" else ""}  # auto: any will do
    for folder in sorted(
        runs_dir.glob(f"*__{algo}__*"), key=lambda path: path.name.split("__")[-1], reverse=True
    ):
        try:
            record = json.loads((folder / "args.json").read_text())
        except (OSError, ValueError):
            continue
        saved = record.get("args", {})
        common = [name for name in wanted if name in saved and name not in free]
        if record.get("algo") != algo or any(saved[name] != wanted[name] for name in common):
            continue
        if any_version and wanted.keys() <= saved.keys():
            return folder
        if other := names ^ saved.keys():
            why = f"is of another version of {algo}.py, which differs in {', '.join(sorted(other))}"
            note(f"{folder} {why}: neither resumed nor counted")
        elif any((folder / f"{name}.pt").exists() for name in ("final", "checkpoint", "checkpoint.previous")):
            return folder
    return None


@functools.cache
def note(text: str) -> None:
    """Say it on stderr, once."""
    print(text, file=sys.stderr)


def place_of(job: Job) -> str:
    """<task>/<algorithm>/<settings>, where the job's evaluations are exported to."""
    from curves import name_of

    task = re.sub(r"[^\w.-]+", "-", job.wanted["env_id"])
    return f"{task}/{job.algo}/{name_of(job.algo, job.wanted)}"


def published(job: Job) -> Path | None:
    """The exported evaluations of the whole run in docs/results/<suite>/, as often as this job's, if there.

    Raises ValueError if they are damaged.
    """
    if not job.suite:
        return None
    path = ROOT / "docs" / "results" / job.suite / place_of(job) / f"{job.wanted['seed']}.csv"
    if not path.exists():
        return None
    from report import read_curve

    steps = read_curve(path, job.suite, "", "", path.stem).steps
    every = job.wanted["eval_every"]
    first = steps[1] if len(steps) > 1 else 0  # later than `every` where whole episodes are played
    return path if steps[-1] >= job.steps and abs(first - every) < 0.4 * every else None


def whole(text: str) -> int:
    """A whole number as the algorithms read it: 1_000 and 1e3 are one. Raises ValueError."""
    with contextlib.suppress(ValueError):
        return int(text)
    with contextlib.suppress(ValueError):
        if float(text).is_integer():
            return int(float(text))
    raise ValueError(f"{text}: must be a whole number")


@functools.cache
def parsed(algo: str, flags: tuple[str, ...]):
    """The file's Args for these flags, all but the seed: parsing takes its time."""
    return load(algo).parse(list(flags))


def plan(
    algos: list[str],
    env_ids: list[str],
    seeds: list[str],
    runs_dir: str,
    threads: int,
    extra: list[str],
    suite: str = "",
    fresh: bool = False,
) -> list[Job]:
    """The jobs in order, seeds outermost so that comparisons grow evenly; with `fresh` none counts as
    published. Raises ValueError on bad input."""
    groups = split_flags(extra)
    modules = {}
    for algo in algos:
        if not (ROOT / "algos" / f"{algo}.py").is_file():
            known = ", ".join(sorted(path.stem for path in (ROOT / "algos").glob("*.py")))
            raise ValueError(f"--algos {algo}: must be of {known}")
        modules[algo] = load(algo)
    for flag, *_ in groups:
        if option_of(flag) in SET_HERE:
            raise ValueError(f"{flag}: must be left out of the flags: the launcher sets it for every run")
        if not any(has_flag(module, flag) for module in modules.values()):
            if option_of(flag) in own_options():
                raise ValueError(f"{flag}: must be given before the --: it is an option of the launcher")
            raise ValueError(f"{flag}: must be a flag of at least one of {', '.join(algos)}")
    try:
        seeds = list(dict.fromkeys(str(whole(seed)) for seed in seeds))
    except ValueError as error:
        raise ValueError(f"--seeds {error}") from None
    jobs, folder = [], Path("algos") if Path.cwd() == ROOT else ROOT / "algos"
    for seed in seeds:
        for env_id in env_ids:
            for algo, module in modules.items():
                own = [word for group in groups if has_flag(module, group[0]) for word in group]
                flags = ["--env-id", env_id, "--seed", seed, "--runs-dir", runs_dir]
                flags += ["--num-threads", str(threads), *own]
                plain = parsed(algo, tuple(word for k, word in enumerate(flags) if k not in (2, 3)))
                try:
                    args = dataclasses.replace(plain, seed=int(seed))
                except ValueError as error:
                    raise ValueError(str(error).replace("--seed ", "--seeds ")) from None
                settings = re.sub(r"[^\w.]+", "-", " ".join(own)).strip("-")
                if len(settings) > 60:  # file names have their limits
                    settings = f"{settings[:52]}-{zlib.crc32(settings.encode()):08x}"
                task = re.sub(r"[^\w.-]+", "-", env_id)
                name = "__".join([task, algo, seed, *([settings] if settings else [])])
                command = [sys.executable, str(folder / f"{algo}.py"), *flags]
                wanted = dataclasses.asdict(args)
                log = Path(runs_dir) / "logs" / f"{name}.log"
                job = Job(name, algo, wanted, command, log, "new", args.total_timesteps, suite)
                continue_or_skip(job)
                if job.state == "new" and not fresh and (path := published(job)):
                    job.state, job.result = "published", path
                jobs.append(job)
    return jobs


def continue_or_skip(job: Job) -> Path | None:
    """Look for the job's run, which may have begun since: set its state and command; returns its folder."""
    folder = find_run(Path(job.wanted["runs_dir"]), job.algo, job.wanted)
    if folder is not None:
        job.state = "finished" if (folder / "final.pt").exists() else "resumed"
        job.command = [*job.command[:2], "--resume", str(folder)]
    return folder


def steps_done(log: Path) -> int:
    """The step on the progress bar that a run last wrote to its log."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 2000))
            found = re.findall(rb" (\d+)/\d+ \[", file.read(2000))
    except OSError:
        return 0
    return int(found[-1]) if found else 0


def take_lock(path: Path):
    """The lock of a run, a context manager that lets go of it; None while somebody else holds it.

    With fcntl it is a file that the run inherits: it is held for as long as the run lives, even if its
    launcher dies. Without, the launcher holds it.
    """
    if fcntl is None:
        from filelock import FileLock, Timeout  # which torch brings

        try:
            return FileLock(path).acquire(timeout=0)
        except Timeout:
            return None
    with contextlib.ExitStack() as stack:
        lock = stack.enter_context(open(path, "w"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        stack.pop_all()
        return lock


def end(process: subprocess.Popen) -> None:
    """Ask a run to stop, and kill one that does not: it goes on from its last checkpoint either way."""
    process.terminate()
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()


def run_alone(job: Job, stop=lambda: False, **options) -> int:
    """Carry out one job, after whoever works at it elsewhere, from its last checkpoint; its exit code.

    Waits are short, so that stop() and Ray, which interrupts between two of them, end the job soon.
    """
    while (lock := take_lock(job.log.with_suffix(".lock"))) is None:
        if stop():
            return -signal.SIGTERM
        time.sleep(0.1)
    with lock, open(job.log, "ab") as log:
        continue_or_skip(job)
        if job.state == "finished":
            return 0
        log.write(os.fsencode(f"$ {shlex.join(job.command)}\n"))
        log.flush()
        options |= {"stdout": log, "stderr": log, "cwd": job.cwd}
        options |= {"pass_fds": [lock.fileno()]} if fcntl else {}
        process = subprocess.Popen(job.command, **options)
        try:
            while process.poll() is None and not stop():
                time.sleep(0.1)
        finally:
            end(process)
        return process.wait()


class Progress:
    """A bar over all steps and, on a terminal, one for each run under way, with steps/s and time left."""

    def __init__(self, jobs: list[Job]):
        self.jobs, self.bars = jobs, {}
        self.whole = tqdm(total=sum(job.steps for job in jobs), unit="step", unit_scale=True)

    def show(self, running: set[str]) -> None:
        done = 0
        for job in self.jobs:
            if job.outcome or job.name not in running:
                done += job.steps if job.outcome else 0
                if bar := self.bars.pop(job.name, None):
                    bar.close()
                continue
            step = steps_done(job.log)
            done += step
            if job.name not in self.bars and sys.stderr.isatty():
                free = min(set(range(1, 2 + len(self.bars))) - {-b.pos for b in self.bars.values()})
                self.bars[job.name] = tqdm(
                    total=job.steps,
                    initial=step,
                    desc=job.name[-40:],
                    position=free,
                    leave=False,
                    unit="step",
                )
            if bar := self.bars.get(job.name):
                bar.n = step
                bar.refresh()
        ended = [job for job in self.jobs if job.outcome]
        failed = sum(job.outcome != "done" for job in ended)
        self.whole.n = done
        self.whole.set_postfix_str(f"{len(ended)}/{len(self.jobs)} runs, {failed} failed", refresh=False)
        self.whole.refresh()

    def close(self) -> None:
        for bar in (*self.bars.values(), self.whole):
            bar.close()


def settle(job: Job, code: int, seconds: float) -> None:
    """Note how a job ended, and say so."""
    job.outcome, job.seconds = "done" if code == 0 else f"exit code {code}", seconds
    if code:
        tqdm.write(f"FAILED  {job.name} ({job.outcome}, {seconds:.0f} s): {job.log}")
    else:
        tqdm.write(f"done    {job.name} ({seconds:.0f} s)")


class TimeIsUp(Exception):
    """The launcher's --time-limit has come."""


def execute(jobs: list[Job], workers: int, until: float = math.inf) -> None:
    """Run the jobs on this machine, `workers` at a time; each gets its outcome.

    Raises TimeIsUp at `until` (of time.monotonic), when all have been stopped.
    """
    running, stopping = set(), False

    def one(job: Job) -> None:
        begun = time.monotonic()
        running.add(job.name)
        try:
            code = run_alone(job, lambda: stopping)
        except OSError as error:  # a full disk, say
            tqdm.write(f"{job.name}: {error}")
            code = -1
        running.discard(job.name)
        if not stopping:
            settle(job, code, time.monotonic() - begun)

    progress = Progress(jobs)
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(one, job) for job in jobs]
        try:
            while not all(future.done() for future in futures):
                progress.show(set(running))
                if time.monotonic() > until:
                    raise TimeIsUp
                time.sleep(0.5)
        except (KeyboardInterrupt, SystemExit, TimeIsUp):
            stopping = True
            for future in futures:
                future.cancel()
            raise
        finally:
            progress.close()
    for future in futures:  # an exception in the launcher itself must not pass for success
        future.result()


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


def mps_answers() -> bool:
    """Whether NVIDIA's Multi-Process Service runs here: without it processes take turns on a GPU."""
    asked = {"input": "get_server_list\n", "capture_output": True, "text": True, "timeout": 10}
    try:
        answer = subprocess.run(["nvidia-cuda-mps-control"], **asked)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return answer.returncode == 0 and "Cannot find" not in answer.stdout + answer.stderr


def hint_at_mps(jobs: list[Job], workers: int) -> None:
    """One line for those who are about to let several runs take turns on a GPU."""
    import torch

    together = min(workers, sum(job.wanted["device"] != "cpu" for job in jobs))
    if together > 1 and torch.cuda.is_available() and not mps_answers():
        share = "NVIDIA's MPS lets them share it: nvidia-cuda-mps-control -d (docs/gpu.md)"
        print(f"hint: {together} runs will take turns on the GPU; {share}", file=sys.stderr)


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


def suite_jobs(name: str, runs_dir: str, threads: int, extra: list[str], fresh: bool = False):
    """What the suite says of itself, and its jobs, seed by seed. Raises ValueError."""
    about, blocks = read_suite(name)
    jobs = []
    for seed in dict.fromkeys(str(seed) for block in blocks for seed in block["seeds"]):
        for block in blocks:
            parts = (block["algos"], block["env_ids"], [seed] * (seed in map(str, block["seeds"])))
            flags = [*shlex.split(block.get("flags", "")), *extra]
            jobs += plan(*parts, runs_dir, threads, flags, block["suite"], fresh or bool(extra))
    return about, jobs


def report_on(jobs: list[Job], suite: str, runs_dir: str) -> None:
    """Write and print the report on a suite's complete runs, if the extra bench is there."""
    from report import method_of, read_curve, write_report

    if missing := [n for n in ("scipy", "matplotlib") if importlib.util.find_spec(n) is None]:
        print(f"no report: {missing[0]} is not installed (pip install -e '.[bench]')")
        return
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


class Parser(argparse.ArgumentParser):
    """One whose mistakes are a line in the words of the algorithms."""

    def error(self, message: str):
        name, _, what = message.removeprefix("argument ").partition(": ")
        what = what.replace("expected one argument", "must be followed by a value")
        self.exit(mistake(f"{name} {what}" if ": must be" in what else f"{name}: {what}"))


def mistake(text: object) -> int:
    """Say it in one line; returns the exit code."""
    print("error:", " ".join(str(text).splitlines()), file=sys.stderr)
    return 2


def at_least(low: int, read=whole):
    """A reader of such numbers for argparse, which puts the option's name before what is wrong."""

    def number(text: str):
        try:
            value = read(text)
        except ValueError:
            value = math.nan
        if not low <= value < math.inf:
            kind = "whole number" if read is whole else "number"
            raise argparse.ArgumentTypeError(f"{text}: must be a {kind}, at least {low}")
        return value

    return number


def command_line() -> Parser:
    """The launcher's options, all that stands before the --."""
    parser = Parser(
        prog="benchmark.sh",
        usage="%(prog)s [options] [-- flags for the algorithms]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    split = lambda text: list(dict.fromkeys(part for part in text.split(",") if part))
    add, count, amount = parser.add_argument, at_least(1), at_least(0, float)
    add("--algos", type=split, help="files of algos/ (default: sac,sac_mve)")
    add("--env-ids", type=split, help="Gymnasium ids (default: InvertedPendulum-v5)")
    add("--seeds", type=split, help="(default: 1,2,3)")
    add("--suite", help="instead of these three: a file of experiments/suites/, or a path")
    add("--fresh", action="store_true", help="run what docs/results/<suite>/ has, too")
    add("--workers", type=count, default=os.cpu_count(), help="runs at a time (default: all cores)")
    add("--num-threads", type=count, default=1, help="CPU threads of each run (default: 1)")
    add("--threads", type=count, dest="num_threads", help=argparse.SUPPRESS)  # a second spelling
    add("--runs-dir", default="runs", help="parent of the run folders (default: runs)")
    limit = f"seconds to stop in, at least {PATIENCE + 1:.0f} (default: none)"
    add("--time-limit", type=at_least(int(PATIENCE) + 1, float), default=math.inf, help=limit)
    add("--dry-run", action="store_true", help="print the commands and stop")
    add("--ray", metavar="ADDRESS", help="auto or the address of a Ray cluster: run there")
    add("--memory", type=amount, default=1.0, help="GB of each run, for --ray (default: 1)")
    add("--gpus", type=amount, default=0.0, help="GPUs of each run, as 0.25, for --ray")
    add("--retries", type=at_least(0), default=5, help="of a run whose node dies, for --ray")
    return parser


@functools.cache
def own_options() -> set[str]:
    names = vars(command_line().parse_args([]))
    return {"--help", "--threads", *(f"--{name.replace('_', '-')}" for name in names)}


def read_line(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The launcher's options and the algorithms' flags. Raises ValueError for what is on the wrong side."""
    dashes = words.index("--") if "--" in words else len(words)
    args, unknown = command_line().parse_known_args(words[:dashes])
    if unknown:
        other = "given after --, as all flags of the algorithms, or be one that --help lists"
        raise ValueError(f"{unknown[0]}: must be {SET_HERE.get(option_of(unknown[0]), other)}")
    extra = words[dashes + 1 :]
    for flag, *_ in split_flags(extra):
        if option_of(flag) in SET_HERE:
            raise ValueError(f"{flag}: must be {SET_HERE[option_of(flag)]}")
    return args, extra


def main() -> int:
    for stream in (sys.stdout, sys.stderr):  # what a console cannot show is a question mark there
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    began = time.monotonic()
    defaults = {"algos": ["sac", "sac_mve"], "env_ids": ["InvertedPendulum-v5"], "seeds": ["1", "2", "3"]}
    try:
        args, extra = read_line(sys.argv[1:])
        block = {name: getattr(args, name) for name in defaults}
        if [] in block.values():
            raise ValueError("--algos, --env-ids, --seeds: must not be empty")
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
            from cluster import connect, execute_on_ray

            connect(args.ray)
            needs = {"num_cpus": args.num_threads, "memory": int(args.memory * 1e9), "num_gpus": args.gpus}
            run_all = functools.partial(execute_on_ray, needs=needs, retries=args.retries)
        until = began + args.time_limit - PATIENCE  # which a run that must be killed takes
        code = carry_out(jobs, runs_dir, args.workers, args.dry_run, run_all, until)
        if args.suite and not args.dry_run and code < 2:
            report_on(jobs, Path(args.suite).stem, runs_dir)
    except ValueError as error:
        return mistake(error)
    return code


if __name__ == "__main__":
    sys.exit(main())
