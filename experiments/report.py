"""What the runs say: tables with intervals, curves, horizons, scores across tasks.

    python experiments/report.py                          # runs/ and docs/results/ -> report/
    python experiments/report.py --suites quick --out report
    python experiments/report.py --export quick           # complete runs of that suite -> docs/results/quick
    python experiments/report.py --random Hopper-v5       # the random policy's return, for normalisers.toml

Reads complete runs below --runs and exported ones, <results>/<suite>/<task>/<algorithm>/<settings>/
<seed>.csv. Methods of a suite and task are compared at equal steps, the last that all of them have. Per run:
its final return, the mean of its last ten evaluations (of the last half of them where there are fewer than
twenty); the area under its curve, the mean over the steps; the steps to a normalised score of 0.5 and 0.9.
Intervals of means are Student's t. Across tasks: interquartile mean, probability of improvement on sac (or
the first method) and performance profile of normalised final returns, intervals by the stratified bootstrap;
tasks without a line in experiments/normalisers.toml are left out. Writes report.md and pictures. Extra
`bench`.
"""

import argparse
import csv
import dataclasses
import importlib.util
import itertools
import math
import re
import shutil
import sys
from pathlib import Path

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "experiments"))
LEVELS = (0.5, 0.9)  # normalised scores whose steps are reported
RUNS = "runs"  # the name of the suite of runs that were not exported


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


def method_of(algo: str, settings: str) -> str:
    """How tables call it: sac_mve, horizon 3."""
    return algo if settings == "default" else f"{algo}, {settings.replace('__', ', ').replace('-', ' ')}"


def read_all(runs: Path | None, results: Path | None, suites: list[str] | None = None) -> list[Curve]:
    """All curves, of the given suites only if any are given. Raises ValueError for a damaged file."""
    from curves import settings_of

    found = []
    for path in sorted(results.glob("*/*/*/*/*.csv")) if results else []:
        suite, task, algo, settings = path.relative_to(results).parts[:4]
        if not suites or suite in suites:
            found.append(read_curve(path, suite, task, method_of(algo, settings), path.stem))
    wanted = runs and (not suites or RUNS in suites)
    for path in sorted(runs.glob("*__*__*__*/eval.csv")) if wanted else []:
        task, algo, seed, _ = path.parent.name.rsplit("__", 3)
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
        equal[key] = {m: [c.upto(end) for _, c in sorted(s.items())] for m, s in sorted(methods.items())}
    return equal


def normalisers() -> dict[str, dict]:
    with open(ROOT / "experiments" / "normalisers.toml", "rb") as file:
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
    return "" if math.isnan(low) else f"[{number(low)}, {number(high)}]"


def steps_to(curves: list[Curve], level: float) -> str:
    """Median of the first steps at this return over the seeds that get there, and how many do."""
    found = [step for step in (curve.reaches(level) for curve in curves) if step < math.inf]
    return f"{np.median(found):.0f} ({len(found)} of {len(curves)})" if found else f"(0 of {len(curves)})"


def task_table(task: str, methods: dict[str, list[Curve]]) -> str:
    """Markdown: one line per method."""
    from stats import mean_interval

    scale = normalisers().get(task)
    heads = ["method", "seeds", "final return", "95 % interval", "area"]
    goals = any("success_rate" in curve.values for curves in methods.values() for curve in curves)
    heads += ["final success"] if goals else []
    heads += [f"steps to {level:.0%}" for level in LEVELS] if scale else []
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for method, curves in methods.items():
        finals, areas = [c.final() for c in curves], [c.area() for c in curves]
        cells = [method, str(len(curves)), spread(finals), bounds(*mean_interval(finals)[1:]), spread(areas)]
        if goals:
            cells.append(
                spread([c.final("success_rate") for c in curves if "success_rate" in c.values] or [math.nan])
            )
        for level in LEVELS if scale else ():
            at = scale["random"] + level * (scale["reference"] - scale["random"])
            cells.append(steps_to(curves, at))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def scores(groups: dict, suite: str) -> tuple[list[str], dict[str, list[np.ndarray]]]:
    """Tasks of a suite that have a normaliser, and the normalised final returns of every method that has runs
    on all of them: {method: [seeds] per task}."""
    scales = normalisers()
    tasks = sorted(task for name, task in groups if name == suite and task in scales)
    if not tasks:
        return [], {}
    common = sorted(set.intersection(*(set(groups[suite, task]) for task in tasks)))
    found = {}
    for method in common:
        found[method] = []
        for task in tasks:
            scale = scales[task]
            finals = np.array([curve.final() for curve in groups[suite, task][method]])
            found[method].append((finals - scale["random"]) / (scale["reference"] - scale["random"]))
    return tasks, found


def score_table(found: dict[str, list[np.ndarray]]) -> str:
    """Markdown: interquartile mean, and probability of improvement on sac or the first method."""
    from stats import bootstrapped, improvement, interquartile_mean

    base = "sac" if "sac" in found else next(iter(found))
    heads = f"| method | interquartile mean | 95 % interval | better than {base} | 95 % interval |"
    lines = [heads, "|---" * 5 + "|"]
    for method, tasks in found.items():
        middle, *ends = bootstrapped(interquartile_mean, tasks)
        cells = [method, f"{middle:.3f}", bounds(*ends)]
        if method != base:
            chance, *ends = improvement(tasks, found[base])
            cells += [f"{chance:.0%}", bounds(*ends)]
        lines.append("| " + " | ".join(cells + [""] * (5 - len(cells))) + " |")
    return "\n".join(lines)


def clean(axes) -> None:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def styles():
    """Colours that all eyes can tell apart, then the same dashed, dotted, and again."""
    from curves import COLOURS

    return itertools.cycle([(colour, line) for line in ("-", "--", ":") for colour in COLOURS])


def panels_of(methods: dict[str, list[Curve]]) -> list[dict[str, list[Curve]]]:
    """Up to six methods in one panel, else one for each algorithm; horizons in the order of their numbers."""
    order = sorted(
        methods, key=lambda name: [int(x) if x.isdecimal() else x for x in re.split(r"(\d+)", name)]
    )
    if len(methods) <= 6:
        return [{name: methods[name] for name in order}]
    found: dict[str, dict[str, list[Curve]]] = {}
    for name in order:
        found.setdefault(name.split(",")[0], {})[name] = methods[name]
    return list(found.values())


def plot_curves(task: str, methods: dict[str, list[Curve]], out: Path) -> None:
    """Mean over seeds with its 95 % interval (Student's t) at the steps that all runs of a method have; the
    axis shows the returns there are, not how far intervals of few seeds reach. Panels of one method each lie
    side by side, with its name as title, others one above the other, with legends."""
    import matplotlib.pyplot as plt
    from stats import mean_interval

    panels = panels_of(methods)
    small = len(panels) > 1 and all(len(shown) == 1 for shown in panels)
    columns, height = (3, 1.8) if small else (1, 3)
    rows = -(-len(panels) // columns)
    size = {"figsize": (8.2, 0.6 + height * rows), "sharex": True, "sharey": True, "squeeze": False}
    figure, grid = plt.subplots(rows, columns, layout="constrained", **size)
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    for axes, shown in zip(grid.flat, panels, strict=False):
        for (method, curves), (colour, line) in zip(shown.items(), styles(), strict=False):
            steps = sorted(set.intersection(*(set(curve.steps) for curve in curves)))
            values = [[c.values["return_mean"][c.steps == step][0] for c in curves] for step in steps]
            mean, low, high = np.array([mean_interval(v) for v in values]).T
            label = f"{method} ({len(curves)} seed{'s' * (len(curves) > 1)})"
            axes.plot(steps, mean, line, color=colour, label=label)
            axes.fill_between(steps, low, high, color=colour, alpha=0.12, lw=0)
        clean(axes)
        if small:
            axes.set_title(label, fontsize=8)
        else:
            axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    seen = np.concatenate([c.values["return_mean"] for found in methods.values() for c in found])
    margin = 0.05 * (np.ptp(seen) or 1.0)
    grid[0, 0].set(ylim=(seen.min() - margin, seen.max() + margin))
    figure.suptitle(f"{task}: mean and 95 % interval")
    figure.supxlabel("environment steps", fontsize="medium")
    figure.supylabel("return", fontsize="medium")
    figure.savefig(out, dpi=130)
    plt.close(figure)


def horizons(methods: dict[str, list[Curve]]) -> dict[str, dict[int, list[float]]]:
    """{algorithm and its other settings: {H: areas}} of methods with at least two horizons."""
    found: dict[str, dict[int, list[float]]] = {}
    for method, curves in methods.items():
        if match := re.fullmatch(r"(\w+), horizon (\d+)(.*)", method):
            name = match[1] + match[3]
            found.setdefault(name, {})[int(match[2])] = [curve.area() for curve in curves]
    return {name: areas for name, areas in found.items() if len(areas) > 1}


def plot_horizons(task: str, found: dict[str, dict[int, list[float]]], out: Path) -> None:
    """Area against H with its 95 % interval (Student's t)."""
    import matplotlib.pyplot as plt
    from stats import mean_interval

    figure, axes = plt.subplots(figsize=(5.2, 3.4), layout="constrained")
    for (name, areas), (colour, line) in zip(found.items(), styles(), strict=False):
        steps = sorted(areas)
        mean, low, high = np.array([mean_interval(areas[h]) for h in steps]).T
        seeds = sorted({len(areas[h]) for h in steps})
        label = f"{name} ({'–'.join(str(n) for n in {seeds[0], seeds[-1]})} seeds)"
        axes.plot(steps, mean, line, marker="o", ms=4, color=colour, label=label)
        axes.fill_between(steps, low, high, color=colour, alpha=0.15, lw=0)
    axes.set(title=f"{task}: mean and 95 % interval", xlabel="horizon H", ylabel="area under the curve")
    clean(axes)
    axes.legend(frameon=False, fontsize=7)
    figure.savefig(out, dpi=130)
    plt.close(figure)


def plot_profile(tasks: list[str], found: dict[str, list[np.ndarray]], out: Path) -> None:
    """Share of runs above each normalised score; from five seeds on with its 95 % interval by the stratified
    bootstrap."""
    import matplotlib.pyplot as plt
    from stats import FEWEST, LEVEL, RESAMPLES, profile

    lows, tops = zip(*((t.min(), t.max()) for group in found.values() for t in group), strict=True)
    levels = np.linspace(min(0.0, *lows), max(1.0, *tops), 101)
    figure, axes = plt.subplots(figsize=(8.2, 3.6), layout="constrained")
    generator = np.random.default_rng(0)
    for (method, group), (colour, line) in zip(found.items(), styles(), strict=False):
        label = f"{method} ({sum(map(len, group))} runs)"
        axes.plot(levels, profile(group, levels), line, color=colour, label=label)
        if min(map(len, group)) < FEWEST:
            continue
        drawn = [profile([generator.choice(t, len(t)) for t in group], levels) for _ in range(RESAMPLES // 4)]
        low, high = np.quantile(drawn, [0.5 - LEVEL / 2, 0.5 + LEVEL / 2], axis=0)
        axes.fill_between(levels, low, high, color=colour, alpha=0.15, lw=0)
    title = f"{len(tasks)} task{'s' * (len(tasks) > 1)}: share of runs above a score, 95 % interval"
    axes.set(title=title, xlabel="normalised final return", ylabel="share of runs", ylim=(0, 1.02))
    clean(axes)
    axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(out, dpi=130)
    plt.close(figure)


def write_report(
    curves: list[Curve], out: Path, pictures: bool = True, missing: list[str] | None = None
) -> str:
    """report.md and its pictures in `out`; returns the page. Raises OSError where it cannot write.

    missing: names of runs that were asked for and are not complete; None if nobody knows what was asked for.
    """
    if pictures:
        import matplotlib

        matplotlib.use("Agg")
    out.mkdir(parents=True, exist_ok=True)
    groups = grouped(curves)
    page = [
        "# Report",
        "",
        "Final return: mean of a run's last evaluations; ± is the standard deviation over seeds.",
        "",
    ]
    if missing is not None:
        page += [f"{len(curves)} of {len(curves) + len(missing)} runs are complete.", ""]
        page += ["Not complete, and not in the tables:", "", *(f"- {name}" for name in missing), ""] * bool(
            missing
        )
    counted = sum(len(found) for methods in groups.values() for found in methods.values())
    if counted < len(curves):
        page += [f"Left out, for another run of the same settings and seed: {len(curves) - counted}.", ""]
    for suite in dict.fromkeys(suite for suite, _ in groups):
        page += [f"## {suite}", ""]
        for task in (task for name, task in groups if name == suite):
            methods = groups[suite, task]
            end = max(curve.steps[-1] for found in methods.values() for curve in found)
            page += [f"### {task}, {end:.0f} steps", ""]
            longer = {c.method for c in curves if (c.suite, c.task) == (suite, task) and c.steps[-1] > end}
            if longer:
                page += [
                    f"Runs of {'; '.join(sorted(longer))} went on; here all end where the shortest does.",
                    "",
                ]
            page += [task_table(task, methods), ""]
            stem = re.sub(r"[^\w.-]+", "-", f"{suite}_{task}")
            if pictures:
                plot_curves(task, methods, out / f"{stem}.png")
                page += [f"![learning curves]({stem}.png)", ""]
                if found := horizons(methods):
                    plot_horizons(task, found, out / f"{stem}_horizons.png")
                    page += [f"![horizons]({stem}_horizons.png)", ""]
        tasks, found = scores(groups, suite)
        if found:
            page += [f"### Across tasks: {', '.join(tasks)}", "", score_table(found), ""]
            if pictures:
                plot_profile(tasks, found, out / f"{suite}_profile.png")
                page += [f"![performance profile]({suite}_profile.png)", ""]
    if not groups:
        page += ["No complete run was found.", ""]
    text = "\n".join(page)
    (out / "report.md").write_text(text)
    return text


def export_suite(suite: str, runs: Path, results: Path) -> int:
    """Copy the eval.csv of every complete run of the suite, on any number of threads, to <results>/<suite>/,
    or to that of the suite it is included from; returns how many. Raises ValueError if there is none."""
    from launch import find_run, place_of, suite_jobs

    count = 0
    for job in suite_jobs(suite, str(runs), 1, [], fresh=True)[1]:
        anywhere = "num_threads env_threads device cuda_graphs capture_video".split()
        wanted = {name: value for name, value in job.wanted.items() if name not in anywhere}
        folder = find_run(runs, job.algo, wanted, any_version=True)
        if folder is not None and (folder / "final.pt").exists():
            path = results / job.suite / place_of(job) / f"{job.wanted['seed']}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / "eval.csv", path)
            count += 1
    return count


def random_return(env_id: str, episodes: int = 100) -> tuple[float, float]:
    """Mean return of uniform actions over episodes from seed 0, and its standard error."""
    from launch import load

    env, returns = load("sac").make_env(env_id), []
    generator = np.random.default_rng(0)
    for episode in range(episodes):
        env.reset(seed=None if episode else 0)
        total, done = 0.0, False
        while not done:
            action = generator.uniform(-1, 1, env.action_space.shape).astype(np.float32)
            _, reward, terminated, truncated, _ = env.step(action)
            total, done = total + reward, terminated or truncated
        returns.append(total)
    return float(np.mean(returns)), float(np.std(returns, ddof=1) / math.sqrt(episodes))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    split = lambda text: [part for part in text.split(",") if part]
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of runs (default: runs)")
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "results", help="of exported ones")
    parser.add_argument("--suites", type=split, help=f"these alone, {RUNS} being those of --runs")
    parser.add_argument("--out", type=Path, default=Path("report"), help="(default: report)")
    parser.add_argument(
        "--export",
        metavar="SUITE",
        help="copy the suite's complete runs (of a name that is no suite: all) to <results>/SUITE",
    )
    parser.add_argument(
        "--random", type=split, metavar="ENV_IDS", help="returns of a random policy, and stop"
    )
    args = parser.parse_args()
    try:
        if args.random:
            for env_id in args.random:
                try:
                    mean, error = random_return(env_id)
                except ValueError as mistake:  # BadInput is one
                    raise ValueError(str(mistake).replace("--env-id", "--random")) from None
                print(f"{env_id}: {mean:.1f} ± {error:.1f} (standard error)")
            return 0
        if args.export:
            from curves import export
            from launch import suite_names

            if not re.fullmatch(r"[\w.-]+", args.export):
                raise ValueError(f"--export {args.export}: must be a name of letters, digits, . and -")
            count = (
                export_suite(args.export, args.runs, args.results)
                if args.export in suite_names()
                else export(args.runs, args.results / args.export)
            )
            print(f"{count} runs exported to {args.results / args.export}")
            return 0
        if missing := [n for n in ("scipy", "matplotlib") if importlib.util.find_spec(n) is None]:
            raise ValueError(f"{missing[0]}: must be installed: pip install -e '.[bench]'")
        print(write_report(read_all(args.runs, args.results, args.suites), args.out))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
