"""What the runs say: tables with intervals, curves, horizons, scores across tasks.

    python -m experiments.report.summary                        # runs/ and docs/results/ -> report/
    python -m experiments.report.summary --suites quick --out report
    python -m experiments.report.summary --random Hopper-v5     # a random policy's, for normalisers.toml

Reads complete runs below --runs and exported ones, <results>/<suite>/<task>/<algorithm>/<settings>/
<seed>.csv. Methods of a suite and task are compared at equal steps, the last that all of them have. Per run:
its final return, the mean of its last ten evaluations (of the last half of them where there are fewer than
twenty); the area under its curve, the mean over the steps; the steps to a normalised score of 0.5 and 0.9.
Intervals of means are Student's t. Across tasks: interquartile mean, probability of improvement on sac (or
the first method) and performance profile of normalised final returns, intervals by the stratified bootstrap;
tasks without a line in normalisers.toml are left out. Writes report.md and pictures. Extra `bench`.
"""

import math
import re
import sys
from pathlib import Path

import numpy as np

from experiments.algorithms import load
from experiments.report import reading
from experiments.report.commands import Parser, mistake, needs
from experiments.report.pictures import BAND_SEEDS, BESIDE, clean, draw, looks_of, pyplot, save, seeds_of
from experiments.report.reading import Curve, at_common_steps, bounds, grouped, in_order, spread, steps_to


def task_table(task: str, methods: dict[str, list[Curve]]) -> str:
    """Markdown: one line per method."""
    from experiments.report.stats import mean_interval

    scale = reading.normalisers().get(task)
    heads = ["method", "seeds", "final return", "95 % interval", "area"]
    goals = any("success_rate" in curve.values for curves in methods.values() for curve in curves)
    heads += ["final success"] if goals else []
    heads += [f"steps to {level:.0%}" for level in reading.LEVELS] if scale else []
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for method, curves in methods.items():
        finals, areas = [c.final() for c in curves], [c.area() for c in curves]
        cells = [method, str(len(curves)), spread(finals), bounds(*mean_interval(finals)[1:]), spread(areas)]
        if goals:
            cells.append(
                spread([c.final("success_rate") for c in curves if "success_rate" in c.values] or [math.nan])
            )
        for level in reading.LEVELS if scale else ():
            at = scale["random"] + level * (scale["reference"] - scale["random"])
            cells.append(steps_to(curves, at))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def scores(groups: dict, suite: str) -> tuple[list[str], dict[str, list[np.ndarray]]]:
    """Tasks of a suite that have a normaliser, and the normalised final returns of every method that has runs
    on all of them: {method: [seeds] per task}."""
    scales = reading.normalisers()
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
    from experiments.report.stats import bootstrapped, improvement, interquartile_mean

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


def panels_of(methods: dict[str, list[Curve]]) -> list[dict[str, list[Curve]]]:
    """Up to six methods in one panel, else one for each algorithm; horizons in the order of their numbers."""
    order = in_order(methods)
    if len(methods) <= 6:
        return [{name: methods[name] for name in order}]
    found: dict[str, dict[str, list[Curve]]] = {}
    for name in order:
        found.setdefault(name.split(",")[0], {})[name] = methods[name]
    return list(found.values())


def plot_curves(task: str, methods: dict[str, list[Curve]], looks: dict, out: Path) -> None:
    """Mean over seeds with its 95 % interval (Student's t), of fewer than three seeds every one, at the steps
    that all runs of a method have; looks {method: (colour, line)}. The axis shows the returns there are, not
    how far intervals of few seeds reach. Panels of one method each lie side by side, with its name as title,
    others one above the other, with legends."""
    from experiments.report.stats import mean_interval

    plt, panels = pyplot(), panels_of(methods)
    small = len(panels) > 1 and all(len(shown) == 1 for shown in panels)
    columns, height = (3, 1.8) if small else (1, 3)
    rows = -(-len(panels) // columns)
    size = {"figsize": (8.2, 0.6 + height * rows), "sharex": True, "sharey": True, "squeeze": False}
    figure, grid = plt.subplots(rows, columns, layout="constrained", **size)
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    for axes, shown in zip(grid.flat, panels, strict=False):
        for method, curves in shown.items():
            label = f"{method} ({seeds_of([len(curves)])})"
            draw(axes, *at_common_steps(curves), looks[method], label, mean_interval)
        clean(axes)
        if small:
            axes.set_title(label, fontsize=8)
        else:
            axes.legend(**BESIDE)
    seen = np.concatenate([c.values["return_mean"] for found in methods.values() for c in found])
    margin = 0.05 * (np.ptp(seen) or 1.0)
    grid[0, 0].set(ylim=(seen.min() - margin, seen.max() + margin))
    few = min(len(found) for found in methods.values()) < BAND_SEEDS
    dots = f", fewer than {BAND_SEEDS} seeds as dots" if few else ""
    figure.suptitle(f"{task}: mean and 95 % interval{dots}", fontsize="medium")
    figure.supxlabel("environment steps", fontsize="medium")
    figure.supylabel("return", fontsize="medium")
    save(figure, out)


def horizons(methods: dict[str, list[Curve]]) -> dict[str, dict[int, list[float]]]:
    """{algorithm and its other settings: {H: areas}} of methods with at least two horizons."""
    found: dict[str, dict[int, list[float]]] = {}
    for method, curves in methods.items():
        if match := re.fullmatch(r"(\w+), horizon (\d+)(.*)", method):
            name = match[1] + match[3]
            found.setdefault(name, {})[int(match[2])] = [curve.area() for curve in curves]
    return {name: areas for name, areas in found.items() if len(areas) > 1}


def plot_horizons(task: str, found: dict[str, dict[int, list[float]]], out: Path) -> None:
    """Area against H with its 95 % interval (Student's t), of fewer than three seeds every one."""
    from experiments.report.stats import mean_interval

    figure, axes = pyplot().subplots(figsize=(6.4, 3.4), layout="constrained")
    looks = looks_of(found)
    for name, areas in found.items():
        steps = sorted(areas)
        label = f"{name} ({seeds_of(len(areas[h]) for h in steps)})"
        draw(axes, steps, [areas[h] for h in steps], looks[name], label, mean_interval, marker="o", ms=4)
    title = f"{task}: mean and 95 % interval"
    axes.set(title=title, xlabel="horizon H", ylabel="area under the curve")
    clean(axes)
    axes.legend(**BESIDE)
    save(figure, out)


def plot_profile(tasks: list[str], found: dict[str, list[np.ndarray]], looks: dict, out: Path) -> None:
    """Share of runs above each normalised score; from five seeds on with its 95 % interval by the stratified
    bootstrap."""
    from experiments.report.stats import FEWEST, LEVEL, RESAMPLES, profile

    lows, tops = zip(*((t.min(), t.max()) for group in found.values() for t in group), strict=True)
    levels = np.linspace(min(0.0, *lows), max(1.0, *tops), 101)
    figure, axes = pyplot().subplots(figsize=(8.2, 3.6), layout="constrained")
    generator = np.random.default_rng(0)
    for method, group in found.items():
        (colour, line), label = looks[method], f"{method} ({sum(map(len, group))} runs)"
        axes.plot(levels, profile(group, levels), line, color=colour, label=label)
        if min(map(len, group)) < FEWEST:
            continue
        drawn = [profile([generator.choice(t, len(t)) for t in group], levels) for _ in range(RESAMPLES // 4)]
        low, high = np.quantile(drawn, [0.5 - LEVEL / 2, 0.5 + LEVEL / 2], axis=0)
        axes.fill_between(levels, low, high, color=colour, alpha=0.15, lw=0)
    title = f"{len(tasks)} task{'s' * (len(tasks) > 1)}: share of runs above a score, 95 % interval"
    axes.set(title=title, xlabel="normalised final return", ylabel="share of runs", ylim=(0, 1.02))
    clean(axes)
    axes.legend(**BESIDE)
    save(figure, out)


def write_report(
    curves: list[Curve], out: Path, pictures: bool = True, missing: list[str] | None = None
) -> str:
    """report.md and its pictures in `out`; returns the page. Raises OSError where it cannot write.

    missing: names of runs that were asked for and are not complete; None if nobody knows what was asked for.
    """
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
        looks = looks_of({method for (name, _), found in groups.items() if name == suite for method in found})
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
                plot_curves(task, methods, looks, out / f"{stem}.png")
                page += [f"![learning curves]({stem}.png)", ""]
                if found := horizons(methods):
                    plot_horizons(task, found, out / f"{stem}_horizons.png")
                    page += [f"![horizons]({stem}_horizons.png)", ""]
        tasks, found = scores(groups, suite)
        if found:
            page += [f"### Across tasks: {', '.join(tasks)}", "", score_table(found), ""]
            if pictures:
                stem = re.sub(r"[^\w.-]+", "-", suite)
                plot_profile(tasks, found, looks, out / f"{stem}_profile.png")
                page += [f"![performance profile]({stem}_profile.png)", ""]
    if not groups:
        page += ["No complete run was found.", ""]
    text = "\n".join(page)
    (out / "report.md").write_text(text, encoding="utf-8")
    return text


def random_return(env_id: str, episodes: int = 100) -> tuple[float, float]:
    """Mean return of uniform actions over episodes from seed 0, and its standard error."""
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
    parser = Parser(__doc__)
    split = lambda text: [part for part in text.split(",") if part]
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of runs (default: runs)")
    parser.add_argument("--results", type=Path, default=reading.RESULTS, help="of exported ones")
    parser.add_argument("--suites", type=split, help=f"these alone, {reading.RUNS} being those of --runs")
    parser.add_argument("--out", type=Path, default=Path("report"), help="(default: report)")
    parser.add_argument(
        "--random", type=split, metavar="ENV_IDS", help="returns of a random policy, and stop"
    )
    args = parser.parse_args()
    try:
        if args.random:
            for env_id in args.random:
                try:
                    mean, error = random_return(env_id)
                except ValueError as found:  # BadInput is one
                    raise ValueError(str(found).replace("--env-id", "--random")) from None
                print(f"{env_id}: {mean:.1f} ± {error:.1f} (standard error)")
            return 0
        needs("scipy", "matplotlib")
        print(write_report(reading.read_all(args.runs, args.results, args.suites), args.out))
    except (ValueError, OSError) as error:
        return mistake(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
