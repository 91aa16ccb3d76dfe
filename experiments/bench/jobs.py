"""From suites and command lines to jobs: which runs there are to be, and which there are."""

import dataclasses
import functools
import itertools
import json
import re
import shlex
import sys
import zlib
from pathlib import Path

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

from experiments.algorithms import ALGOS, ROOT, has_flag, load, option_of, parsed, split_flags, task_of, whole
from experiments.bench.options import SET_HERE, own_options
from experiments.report.reading import RESULTS, folder_of, name_of, read_curve

SUITES = Path(__file__).resolve().parent / "suites"
TOP, LISTS = {"about", "cost", "include", "runs"}, ("algos", "env_ids", "seeds")


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


def suite_names() -> list[str]:
    """Of the files in bench/suites/."""
    return sorted(path.stem for path in SUITES.glob("*.toml"))


def read_suite(name: str, above: tuple[str, ...] = ()) -> tuple[str, list[dict]]:
    """What the suite says of itself, and its blocks of algos, env_ids, seeds, flags, each with its `suite`,
    and whether that is the user's `own`.

    `name` is that of a file in bench/suites/ or a path; `include` names other suites, whose blocks come first
    and stay theirs; a block that sweeps flags becomes one for each of their values. Raises ValueError for
    what is not a suite.
    """
    path = Path(name) if name.endswith(".toml") else SUITES / f"{name}.toml"
    try:
        suite = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError:
        known = ", ".join(suite_names())
        raise ValueError(f"--suite {name}: must be a .toml file or one of {known}") from None
    except ValueError as error:  # of the encoding, too
        raise ValueError(f"--suite {name}: must be valid TOML: {error}") from None
    blocks = suite.get("runs", [])
    if not (isinstance(blocks, list) and all(isinstance(block, dict) for block in blocks)):
        raise ValueError(f"--suite {name}: runs: must be blocks [[runs]]")
    if unknown := set(suite) - TOP:
        raise ValueError(f"--suite {name}: {unknown.pop()}: must be one of {', '.join(sorted(TOP))}")
    for block in blocks:
        for key in {*LISTS, *block} - {"flags"}:
            if not (isinstance(block.get(key), list) and block[key]):
                kind = "" if key in LISTS else " of a flag's values"
                rule = f"must be a list{kind}, not empty, in a block of runs"
                raise ValueError(f"--suite {name}: {key}: {rule}")
        if not isinstance(block.get("flags", ""), str):
            raise ValueError(f"--suite {name}: flags: must be a string, as on the command line")
        for key in ("algos", "env_ids"):
            if odd := [value for value in block[key] if not isinstance(value, str)]:
                raise ValueError(f"--suite {name}: {key}: {odd[0]}: must be a string")
    included, others = [], suite.get("include", [])
    if not (isinstance(others, list) and all(isinstance(other, str) for other in others)):
        raise ValueError(f"--suite {name}: include: must be a list of names")
    for other in others:
        if other in (*above, name):
            raise ValueError(f"--suite {name}: include: must not lead back to {other}")
        included += read_suite(other, (*above, name))[1]
    if not (blocks or included):
        raise ValueError(f"--suite {name}: must have at least one block [[runs]]")
    about = f"{suite.get('about', name)}\nexpected cost: {suite.get('cost', 'unknown')}"
    origin = {"suite": path.stem, "own": path.resolve().parent != SUITES}
    return about, [*included, *(part | origin for block in blocks for part in swept(block))]


def swept(block: dict) -> list[dict]:
    """The block once for every combination of the values that it gives flags, as horizon = [0, 1, 3]."""
    names = [name for name in block if name not in (*LISTS, "flags")]
    plain, found = {name: block[name] for name in LISTS}, []
    for values in itertools.product(*(block[name] for name in names)):
        words = [block["flags"]] if block.get("flags") else []
        words += [written(name.replace("_", "-"), value) for name, value in zip(names, values, strict=True)]
        found.append(plain | {"flags": " ".join(words)})
    return found


def written(flag: str, value: object) -> str:
    """A flag with its value, as on the command line; true and false are --flag and --no-flag."""
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    return f"--{flag} {shlex.quote(str(value))}"


def suite_jobs(name: str, runs_dir: str, threads: int, extra: list[str], fresh: bool = False):
    """What the suite says of itself, and its jobs, seed by seed. Raises ValueError."""
    about, blocks = read_suite(name)
    jobs: dict[tuple, Job] = {}
    seen: dict[tuple, Job] = {}
    for seed in dict.fromkeys(str(seed) for block in blocks for seed in block["seeds"]):
        for block in blocks:
            parts = (block["algos"], block["env_ids"], [seed] * (seed in map(str, block["seeds"])))
            flags = [*shlex.split(block.get("flags", "")), *extra]
            anew = fresh or bool(extra) or block["own"]  # docs/results/ has the suites as they are
            for job in plan(*parts, runs_dir, threads, flags, block["suite"], anew):
                same = job.suite, job.algo, json.dumps(job.wanted, sort_keys=True)
                jobs.setdefault(same, job)  # a sweep repeats who lacks the flag
                other = seen.setdefault((job.suite, place_of(job), seed), job).wanted
                if differ := [flag for flag, value in job.wanted.items() if value != other[flag]]:
                    flag, rule = differ[0], "must be the same in runs that differ in nothing else: a report"
                    values = f"{other[flag]} and {job.wanted[flag]}"
                    raise ValueError(f"--suite {name}: {flag} {values}: {rule} would take them for one")
    return about, list(jobs.values())


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
        if algo not in ALGOS:
            raise ValueError(f"--algos {algo}: must be of {', '.join(ALGOS)}")
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
                words = " ".join(own)
                settings = re.sub(r"[^\w.]+", "-", words).strip("-")
                if len(settings) > 60 or any(re.match(r"-[\d.]", word) for word in own):  # a sign is lost
                    settings = f"{settings[:52]}-{zlib.crc32(words.encode()):08x}"
                name = "__".join([folder_of(env_id), algo, seed, *([settings] if settings else [])])
                command = [sys.executable, str(folder / f"{algo}.py"), *flags]
                wanted = dataclasses.asdict(args)
                log = Path(runs_dir) / "logs" / f"{name}.log"
                job = Job(name, algo, wanted, command, log, "new", args.total_timesteps, suite)
                continue_or_skip(job)
                if job.state == "new" and not fresh and (path := published(job)):
                    job.state, job.result = "published", path
                jobs.append(job)
    return jobs


def find_run(runs_dir: Path, algo: str, wanted: dict, any_version: bool = False) -> Path | None:
    """The newest run folder with exactly these arguments, complete or with a checkpoint to go on from.

    A run of a version of the file that had other arguments cannot be resumed: it is named once and left
    alone. With any_version, for those who only read it, it is the newest that is complete.
    """
    names = {field.name for field in dataclasses.fields(load(algo).Args)}
    wanted = {**wanted, "env_id": task_of(str(wanted.get("env_id")))}
    free = {"runs_dir", "resume", "device" if wanted.get("device") == "auto" else ""}  # auto: any will do
    for folder in sorted(
        runs_dir.glob(f"*__{algo}__*"), key=lambda path: path.name.split("__")[-1], reverse=True
    ):
        try:
            record = json.loads((folder / "args.json").read_text())
        except (OSError, ValueError):
            continue
        saved = record.get("args") if isinstance(record, dict) else None
        if not isinstance(saved, dict):
            continue
        saved |= {"env_id": task_of(str(saved.get("env_id")))}
        common = [name for name in wanted if name in saved and name not in free]
        if record.get("algo") != algo or any(saved[name] != wanted[name] for name in common):
            continue
        if any_version and wanted.keys() <= saved.keys():
            if (folder / "final.pt").exists():
                return folder
            continue
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
    return f"{folder_of(job.wanted['env_id'])}/{job.algo}/{name_of(job.algo, job.wanted)}"


def published(job: Job) -> Path | None:
    """The exported evaluations of the whole run in docs/results/<suite>/, as often as this job's, if there.

    Raises ValueError if they are damaged.
    """
    if not job.suite:
        return None
    path = RESULTS / job.suite / place_of(job) / f"{job.wanted['seed']}.csv"
    if not path.exists():
        return None
    steps = read_curve(path, job.suite, "", "", path.stem).steps
    every = job.wanted["eval_every"]
    first = steps[1] if len(steps) > 1 else 0  # later than `every` where whole episodes are played
    return path if steps[-1] >= job.steps and abs(first - every) < 0.4 * every else None


def continue_or_skip(job: Job) -> Path | None:
    """Look for the job's run, which may have begun since: set its state and command; returns its folder."""
    folder = find_run(Path(job.wanted["runs_dir"]), job.algo, job.wanted)
    if folder is not None:
        job.state = "finished" if (folder / "final.pt").exists() else "resumed"
        job.command = [*job.command[:2], "--resume", str(folder)]
    return folder
