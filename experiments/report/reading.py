"""Runs and results as curves: what was evaluated, of which method, and how numbers are written.

A run is a folder <runs>/<task>__<algorithm>__<seed>__<time>/; exported ones are <results>/<suite>/<task>/
<algorithm>/<settings>/<seed>.csv, settings being `default` or the flags that differ from the file's defaults
and matter for learning.
"""

import csv
import dataclasses
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

import numpy as np

from experiments.algorithms import ALGOS, ROOT, load, task_of

RESULTS = ROOT / "docs" / "results"
LEVELS = (0.5, 0.9)  # normalised scores whose steps are reported
RUNS = "runs"  # the name of the suite of runs that were not exported
NOT_SETTINGS = """env_id seed total_timesteps learning_starts eval_every eval_episodes log_every
    checkpoint_every runs_dir resume device cuda_graphs num_threads env_threads capture_video
    diagnose_every""".split()
KNOWN: dict[tuple, dict] = {}  # defaults by file, presets and task, as they are found


@dataclasses.dataclass
class Curve:
    """Evaluations of one run: steps [k], values {column: [k]}."""

    suite: str
    task: str
    method: str
    seed: int
    steps: np.ndarray
    values: dict[str, np.ndarray]

    def upto(self, end: int) -> "Curve":
        """The same without what came after step `end`; if it was not evaluated there, on a straight line."""
        kept = self.steps <= end
        steps = self.steps[kept] if end in self.steps or end > self.steps[-1] else [*self.steps[kept], end]
        values = {name: np.interp(steps, self.steps, x) for name, x in self.values.items()}
        return dataclasses.replace(self, steps=np.asarray(steps, float), values=values)

    def final(self, column: str = "return_mean") -> float:
        """Mean of the last ten evaluations, of the last half of them where there are fewer than twenty."""
        values = self.values[column]
        return float(values[-max(1, min(10, len(values) // 2)) :].mean())

    def area(self, column: str = "return_mean") -> float:
        """Mean over steps, straight lines between evaluations; the value itself if there is but one."""
        from scipy import integrate

        if len(self.steps) < 2:
            return float(self.values[column].mean())
        whole = integrate.trapezoid(self.values[column], self.steps)
        return float(whole / (self.steps[-1] - self.steps[0]))

    def reaches(self, level: float, column: str = "return_mean") -> float:
        """The first step evaluated at `level` or above; infinite if none."""
        found = self.steps[self.values[column] >= level]
        return float(found[0]) if len(found) else math.inf


def read_curve(path: Path, suite: str, task: str, method: str, seed: str) -> Curve:
    """One file of evaluations. Raises ValueError that names it if it is not one."""
    try:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        names = [name for name in rows[0] if name and name.endswith(("return_mean", "success_rate"))]
        values = {name: np.array([float(row[name]) for row in rows]) for name in ("step", *names)}
        steps = values.pop("step")
        if "return_mean" not in values or not (np.diff(steps) > 0).all():
            raise ValueError("columns step, increasing, and return_mean")
        if not all(np.isfinite(x).all() for x in (steps, *values.values())):
            raise ValueError("numbers that are finite")
        return Curve(suite, task, method, int(seed), steps, values)
    except (OSError, UnicodeDecodeError, csv.Error, ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(
            f"{path}: must be the evaluations of a run: {type(error).__name__}: {error}"
        ) from None


def name_of(algo: str, args: dict) -> str:
    """`default`, or the arguments that matter for learning and differ from the defaults of the file."""
    presets = tuple((name, args[name]) for name in ("preset", "schedule", "env_id") if name in args)
    if (algo, presets) not in KNOWN:
        kind = load(algo).Args
        plain = dataclasses.asdict(kind())
        KNOWN[algo, presets] = kind.defaults(plain | dict(presets)) if hasattr(kind, "defaults") else plain
    defaults = KNOWN[algo, presets]
    changed = [n for n, value in args.items() if n not in NOT_SETTINGS and value != defaults.get(n)]
    if "horizon" in args:
        changed = ["horizon", *(n for n in changed if n != "horizon")]
    text = "__".join(f"{name}-{args[name]}" for name in changed) or "default"
    return re.sub("[/:,]", "-", re.sub(r'[{}"\s]', "", text))  # JSON and paths as names of folders


def settings_of(folder: Path, algo: str) -> str | None:
    """The settings of a complete run, None if it is not complete. Raises ValueError for a foreign one."""
    if not (folder / "args.json").exists():  # of a library, or of ours that was killed in its first moments
        return None if algo in ALGOS else "default"
    if not (folder / "final.pt").exists():
        return None
    try:
        return name_of(algo, json.loads((folder / "args.json").read_text())["args"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"{type(error).__name__}: {error}"
        raise ValueError(f"{folder / 'args.json'}: must be that of one of our runs: {why}") from None


def folder_of(env_id: str) -> str:
    """The task's name as that of a folder."""
    return re.sub(r"[^\w.-]+", "-", task_of(env_id))


def parts_of(run: Path) -> tuple[str, str, str]:
    """Task, algorithm and seed in the name of a run's folder."""
    task, algo, seed, _ = run.name.rsplit("__", 3)
    return task.replace("experiments.suites-", "experiments.tasks-", 1), algo, seed


def method_of(algo: str, settings: str) -> str:
    """How tables call it: sac_mve, horizon 3."""
    named = [part.replace("-", " ", 1) for part in settings.split("__")]  # a value may have a sign
    return algo if settings == "default" else ", ".join([algo, *named])


def in_order(names: Iterable[str]) -> list[str]:
    """Sorted, numbers in names by their size: horizon 3 before horizon 10."""
    return sorted(names, key=lambda name: [int(x) if x.isdecimal() else x for x in re.split(r"(\d+)", name)])


def read_all(runs: Path | None, results: Path | None, suites: list[str] | None = None) -> list[Curve]:
    """All curves, of the given suites only if any are given. Raises ValueError for a damaged file."""
    found = []
    for path in sorted(results.glob("*/*/*/*/*.csv")) if results else []:
        suite, task, algo, settings = path.relative_to(results).parts[:4]
        if not suites or suite in suites:
            found.append(read_curve(path, suite, task, method_of(algo, settings), path.stem))
    wanted = runs and (not suites or RUNS in suites)
    for path in sorted(runs.glob("*__*__*__*/eval.csv")) if wanted else []:
        task, algo, seed = parts_of(path.parent)
        settings = settings_of(path.parent, algo)
        if settings is not None:
            found.append(read_curve(path, RUNS, task, method_of(algo, settings), seed))
    return found


def grouped(curves: list[Curve]) -> dict[tuple[str, str], dict[str, list[Curve]]]:
    """{(suite, task): {method: curves at equal steps}}; of two runs of one seed the longer counts, or the
    later of equal ones."""
    groups: dict = {}
    for curve in curves:
        seeds = groups.setdefault((curve.suite, curve.task), {}).setdefault(curve.method, {})
        if curve.seed not in seeds or curve.steps[-1] >= seeds[curve.seed].steps[-1]:
            seeds[curve.seed] = curve
    equal = {}
    for key, methods in groups.items():
        end = min(curve.steps[-1] for seeds in methods.values() for curve in seeds.values())
        equal[key] = {m: [c.upto(end) for _, c in sorted(methods[m].items())] for m in in_order(methods)}
    return equal


def at_common_steps(
    curves: list[Curve], column: str = "return_mean"
) -> tuple[list[float], list[list[float]]]:
    """Steps [k] that all have, and the values of every curve there, [k][curves]."""
    steps = sorted(set.intersection(*(set(curve.steps) for curve in curves)))
    if not steps:
        raise ValueError(
            f"{curves[0].method or 'a method'}: must have a step at which all seeds were evaluated"
        )
    return steps, [[float(c.values[column][c.steps == step][0]) for c in curves] for step in steps]


def read_folder(folder: Path) -> dict[str, list[Curve]]:
    """{method: curves} at or below <folder>, <algorithm>/<settings>/<seed>.csv. Raises ValueError."""
    methods: dict[str, list[Curve]] = {}
    for path in sorted(
        (p for p in folder.rglob("*.csv") if p.stem.isdecimal()), key=lambda p: (p.parent, int(p.stem))
    ):
        method = method_of(path.parent.parent.name, path.parent.name)
        methods.setdefault(method, []).append(read_curve(path, "", "", method, path.stem))
    return methods


def normalisers() -> dict[str, dict]:
    """{task: {"random": .., "reference": ..}}, returns that are 0 and 1 as scores."""
    with open(Path(__file__).resolve().with_name("normalisers.toml"), "rb") as file:
        return tomllib.load(file)


def number(value: float) -> str:
    """Four digits, without exponent as long as that is readable."""
    return f"{value:.0f}" if 1_000 <= abs(value) < 1e6 else f"{value:.4g}"


def spread(values: list[float]) -> str:
    """Mean ± standard deviation; one value has none."""
    if len(values) < 2:
        return number(values[0])
    deviation = float(np.std(values, ddof=1))
    digits = max(0, 1 - math.floor(math.log10(deviation))) if 0 < deviation < 10 else 0 if deviation else 1
    return f"{np.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def bounds(low: float, high: float) -> str:
    """[low, high]; nothing where there is no interval."""
    return "" if math.isnan(low) else f"[{number(low)}, {number(high)}]"


def steps_to(curves: list[Curve], level: float) -> str:
    """Median of the first steps at this return over the seeds that get there, and how many do."""
    found = [step for step in (curve.reaches(level) for curve in curves) if step < math.inf]
    return f"{np.median(found):.0f} ({len(found)} of {len(curves)})" if found else f"(0 of {len(curves)})"
