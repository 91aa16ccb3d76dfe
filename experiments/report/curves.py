"""Learning curves and a table from evaluation files.

    python -m experiments.report.curves plot docs/results/foundation/Hopper-v5 --out docs/figures/hopper.png
    python -m experiments.report.curves plot docs/results/maac/InvertedPendulum-v5 \\
        docs/results/svg-paths/InvertedPendulum-v5/svg/horizon-1 --level 950    # and when each seed got there
    python -m experiments.report.curves scalars runs --tags model/nll --csv nll.csv --figure nll.png

Folders are of exported runs, <algorithm>/<settings>/<seed>.csv at or below them. The line is the mean over
seeds, the band reaches from the lowest to the highest, fewer than three seeds are dots; nothing is smoothed,
no seed left out. `scalars` collects what TensorBoard shows of complete runs in one table: env_id, algo,
settings, seed, step and the tags. Extra `bench`.
"""

import statistics
import sys
from pathlib import Path

from experiments.report.commands import Parser, at_least, check_output, mistake
from experiments.report.pictures import clean, draw, legend_below, looks_of, pyplot, save, seeds_of
from experiments.report.reading import (
    Curve,
    at_common_steps,
    in_order,
    method_of,
    parts_of,
    read_folder,
    settings_of,
)
from experiments.report.tables import write_table

Methods = dict[str, list[Curve]]


def read(folders: list[Path]) -> Methods:
    """All curves in them. Raises ValueError where there is none, or one seed of a method twice."""
    methods: Methods = {}
    for folder in folders:
        found = read_folder(folder)
        if not found:
            raise ValueError(f"{folder}: must hold <algorithm>/<settings>/<seed>.csv")
        for method in in_order(found):
            curves = found[method]
            seeds = {curve.seed for curve in methods.get(method, [])}
            for curve in curves:  # of two folders, or of two tasks in one
                if curve.seed in seeds:
                    raise ValueError(f"{folder}: {method}, seed {curve.seed}: must be of one run alone")
                seeds.add(curve.seed)
            methods.setdefault(method, []).extend(curves)
    return methods


def table_of(methods: Methods, title: str, last: str, cell, summary) -> str:
    """Markdown: a line per method, cell(curve) for each seed, summary(curves) at the end."""
    seeds = sorted({curve.seed for curves in methods.values() for curve in curves})
    lines = [" | ".join([f"| {title}", *(f"seed {seed}" for seed in seeds), f"{last} |"])]
    lines.append("|---" * (len(seeds) + 2) + "|")
    for method, curves in methods.items():
        found = {curve.seed: cell(curve) for curve in curves}
        cells = [found.get(seed, "") for seed in seeds]
        lines.append(" | ".join([f"| {method}", *cells, f"{summary(curves)} |"]))
    return "\n".join(lines)


def table(methods: Methods) -> str:
    """Final evaluation of every seed, and their mean."""
    last = lambda curve: curve.values["return_mean"][-1]
    mean = lambda curves: f"{statistics.mean(map(last, curves)):.1f}"
    return table_of(methods, "method", "mean", lambda curve: f"{last(curve):.1f}", mean)


def steps_table(methods: Methods, level: float) -> str:
    """The step of every seed's first evaluation that reaches the level; – where none does."""
    first = lambda curve: f"{step:.0f}" if (step := curve.reaches(level)) < float("inf") else "–"
    there = lambda curves: f"{sum(first(curve) != '–' for curve in curves)} of {len(curves)}"
    return table_of(methods, f"steps to {level:g}", "seeds there", first, there)


def plot(methods: Methods, title: str, out: Path) -> None:
    """Mean over seeds, and from three seeds on the band from the lowest to the highest, below that each."""
    columns = 2 if len(methods) > 4 and max(map(len, methods)) < 40 else 1
    height = 3.4 + 0.17 * -(-len(methods) // columns)  # and a line for each row of the legend
    figure, axes = pyplot().subplots(figsize=(6.4, height), layout="constrained")
    looks = looks_of(methods)
    for method, curves in methods.items():
        label = f"{method} ({seeds_of([len(curves)])})"
        draw(axes, *at_common_steps(curves), looks[method], label)
    axes.set(title=title, xlabel="environment steps", ylabel="return (deterministic policy)")
    clean(axes)
    legend_below(figure, columns)
    save(figure, out)


def scalars(runs: Path, tags: list[str], every: int) -> list[dict]:
    """The tags of every complete run below `runs` that has them all, at multiples of `every` steps."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = []
    for folder in sorted(path.parent for path in runs.glob("*__*__*__*/args.json")):
        env_id, algo, seed = parts_of(folder)
        settings = settings_of(folder, algo)
        if settings is None:
            continue
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
        events.Reload()
        if not set(tags) <= set(events.Tags()["scalars"]):
            continue
        found = [{event.step: event.value for event in events.Scalars(tag)} for tag in tags]
        for step in sorted(set.intersection(*map(set, found))):
            if step % every == 0:
                run = {"env_id": env_id, "algo": algo, "settings": settings, "seed": seed, "step": step}
                values = [values[step] for values in found]
                rows.append(run | dict(zip(tags, values, strict=True)))
    return rows


def plot_scalars(rows: list[dict], tags: list[str], out: Path) -> None:
    """A line of panels per task, a panel per tag: mean over seeds and their band, as for returns."""
    tasks = list(dict.fromkeys(row["env_id"] for row in rows))
    methods = list(dict.fromkeys((row["algo"], row["settings"]) for row in rows))
    names = {method: method_of(*method) for method in methods}
    looks = looks_of(names.values())
    size = {"figsize": (4 * len(tags), 3 * len(tasks) + 0.2 * len(methods)), "squeeze": False}
    figure, grid = pyplot().subplots(len(tasks), len(tags), layout="constrained", **size)
    for line, task in zip(grid, tasks, strict=True):
        for axes, tag in zip(line, tags, strict=True):
            mine = [row for row in rows if row["env_id"] == task]
            for method, name in names.items():
                runs: dict[str, dict[int, float]] = {}
                for row in mine:
                    if (row["algo"], row["settings"]) == method:
                        runs.setdefault(row["seed"], {})[row["step"]] = row[tag]
                if not runs:
                    continue
                steps = sorted(set.intersection(*map(set, runs.values())))
                values = [[run[step] for run in runs.values()] for step in steps]
                draw(axes, steps, values, looks[name], f"{name} ({seeds_of([len(runs)])})")
            axes.set(title=f"{task}: {tag}", xlabel="environment steps")
            if min(row[tag] for row in mine) > 0:
                axes.set_yscale("log")
            clean(axes)
    legend_below(figure, 1)
    save(figure, out)


def main() -> int:
    parser = Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    lines = commands.add_parser("plot")
    lines.add_argument("folders", type=Path, nargs="+", metavar="folder")
    lines.add_argument("--level", type=float, help="a second table: steps until a seed's first such return")
    lines.add_argument("--title", help="of the picture (default: the folder's name)")
    lines.add_argument("--out", type=Path, help="picture to write; without it only the table is printed")
    collect = commands.add_parser("scalars")
    collect.add_argument("runs", type=Path)
    collect.add_argument("--tags", type=lambda text: text.split(","), required=True, help="a,b,..")
    collect.add_argument("--every", type=at_least(1), default=500, help="steps between rows (default: 500)")
    collect.add_argument("--csv", type=Path, required=True, help="table to write")
    collect.add_argument("--figure", type=Path, help="picture to write")
    args = parser.parse_args()
    if args.command == "scalars":
        check_output(args.csv, "--csv")
        check_output(args.figure, "--figure")
        rows = scalars(args.runs, args.tags, args.every)
        if not rows:
            where = f"{args.runs}, --every {args.every}"
            return mistake(f"{where}: must have complete runs with {', '.join(args.tags)}")
        write_table(args.csv, rows[0], rows)
        if args.figure:
            plot_scalars(rows, args.tags, args.figure)
        print(f"{len(rows)} rows in {args.csv}")
        return 0
    methods = read(args.folders)
    print(table(methods))
    if args.level is not None:
        print("\n" + steps_table(methods, args.level))
    if args.out:
        plot(methods, args.title or args.folders[0].name, args.out)
    return 0


def guarded() -> int:
    """main, its mistakes as one line and exit code 2."""
    try:
        return main()
    except (ValueError, OSError, ImportError) as error:
        return mistake(error)


if __name__ == "__main__":
    sys.exit(guarded())
