"""Learning curves and a table from evaluation files.

    python experiments/curves.py export runs docs/results/foundation     # eval.csv of every complete run
    python experiments/curves.py plot docs/results/foundation/Hopper-v5 --out docs/figures/hopper.png
    python experiments/curves.py plot docs/results/maac/InvertedPendulum-v5 \\
        docs/results/svg-paths/InvertedPendulum-v5/svg/horizon-1 --level 950    # and when each seed got there
    python experiments/curves.py scalars runs --tags model/nll --csv nll.csv --figure nll.png

Exported files lie at <folder>/<task>/<algorithm>/<settings>/<seed>.csv, settings being `default` or the
flags that differ from the file's defaults and matter for learning. The line is the mean over seeds, the band
reaches from the lowest to the highest; nothing is smoothed, no seed left out. `scalars` collects what
TensorBoard shows of complete runs in one table: env_id, algo, settings, seed, step and the tags. Figures: the
extra `bench`.
"""

import argparse
import csv
import dataclasses
import itertools
import json
import re
import shutil
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "experiments"))
COLOURS = [
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
]  # Okabe and Ito: safe for all eyes
NOT_SETTINGS = """env_id seed total_timesteps learning_starts eval_every eval_episodes log_every
    checkpoint_every runs_dir resume device cuda_graphs num_threads env_threads capture_video
    diagnose_every""".split()
KNOWN: dict[tuple, dict] = {}  # defaults by file, presets and task, as they are found


def name_of(algo: str, args: dict) -> str:
    """`default`, or the arguments that matter for learning and differ from the defaults of the file."""
    from launch import load

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
        return None if (ROOT / "algos" / f"{algo}.py").exists() else "default"
    if not (folder / "final.pt").exists():
        return None
    try:
        return name_of(algo, json.loads((folder / "args.json").read_text())["args"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"{type(error).__name__}: {error}"
        raise ValueError(f"{folder / 'args.json'}: must be that of one of our runs: {why}") from None


def export(runs: Path, target: Path) -> int:
    """Copy the eval.csv of every complete run below `runs`; returns how many."""
    placed: dict[Path, Path] = {}
    for path in sorted(runs.glob("*__*__*__*/eval.csv")):
        folder = path.parent
        env_id, algo, seed, _ = folder.name.rsplit("__", 3)
        settings = settings_of(folder, algo)
        if settings is None:
            continue
        place = target / env_id / algo / settings / f"{seed}.csv"
        if place in placed:
            raise SystemExit(
                f"error: {folder} and {placed[place]}: must not both be {place}; export them apart"
            )
        placed[place] = folder
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place)
    return len(placed)


def read(folder: Path) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """{method: {seed: [(step, return), ..]}} at or below <folder>, method being algorithm and settings."""
    methods: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for path in sorted(path for path in folder.rglob("*.csv") if path.stem.isdecimal()):
        settings = path.parent.name.replace("__", ", ").replace("-", " ")
        method = path.parent.parent.name + ("" if settings == "default" else f", {settings}")
        with open(path) as file:
            rows = [(int(row["step"]), float(row["return_mean"])) for row in csv.DictReader(file)]
        methods.setdefault(method, {})[path.stem] = rows
    return methods


def read_all(folders: list[Path]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """`read` of several. Raises ValueError where two have the same seed of a method."""
    methods: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for folder in folders:
        for method, runs in read(folder).items():
            if twice := runs.keys() & methods.get(method, {}).keys():
                raise ValueError(f"{folder}: {method}, seed {min(twice)}: must not be in two folders")
            methods.setdefault(method, {}).update(runs)
    return methods


def steps_table(methods: dict, level: float) -> str:
    """The step of every seed's first evaluation that reaches the level, as Markdown; – where none does."""
    seeds = sorted({seed for runs in methods.values() for seed in runs}, key=int)
    lines = [f"| steps to {level:g} | " + " | ".join(f"seed {seed}" for seed in seeds) + " | seeds there |"]
    lines.append("|---" * (len(seeds) + 2) + "|")
    for method, runs in methods.items():
        first = {seed: next((n for n, r in rows if r >= level), None) for seed, rows in runs.items()}
        cells = [
            "" if seed not in runs else "–" if first[seed] is None else str(first[seed]) for seed in seeds
        ]
        there = sum(step is not None for step in first.values())
        lines.append(f"| {method} | " + " | ".join(cells) + f" | {there} of {len(runs)} |")
    return "\n".join(lines)


def table(methods: dict) -> str:
    """Final evaluation of every seed, and their mean, as Markdown."""
    seeds = sorted({seed for runs in methods.values() for seed in runs}, key=int)
    lines = ["| method | " + " | ".join(f"seed {seed}" for seed in seeds) + " | mean |"]
    lines.append("|---" * (len(seeds) + 2) + "|")
    for method, runs in methods.items():
        finals = [runs[seed][-1][1] if seed in runs else None for seed in seeds]
        mean = statistics.mean(value for value in finals if value is not None)
        cells = ["" if value is None else f"{value:.1f}" for value in [*finals, mean]]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(methods: dict, title: str, out: Path) -> None:
    """Mean over seeds and the band from the lowest to the highest."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = 2 if len(methods) > 4 and max(map(len, methods)) < 40 else 1
    height = 3.4 + 0.17 * -(-len(methods) // columns)  # and a line for each row of the legend
    figure, axes = plt.subplots(figsize=(6.4, height), constrained_layout=True)
    looks = itertools.product(("-", "--", ":"), COLOURS)
    for (method, runs), (dashes, colour) in zip(methods.items(), itertools.cycle(looks), strict=False):
        steps = sorted(set.intersection(*({step for step, _ in rows} for rows in runs.values())))
        values = [[dict(rows)[step] for rows in runs.values()] for step in steps]
        axes.plot(
            steps,
            [statistics.mean(v) for v in values],
            dashes,
            color=colour,
            label=f"{method} ({len(runs)} seed{'s' * (len(runs) > 1)})",
        )
        axes.fill_between(
            steps, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.15, lw=0
        )
    axes.set(title=title, xlabel="environment steps", ylabel="return (deterministic policy)")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=columns)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=130)


def scalars(runs: Path, tags: list[str], every: int) -> list[dict]:
    """The tags of every complete run below `runs` that has them all, at multiples of `every` steps."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = []
    for folder in sorted(path.parent for path in runs.glob("*__*__*__*/args.json")):
        env_id, algo, seed, _ = folder.name.rsplit("__", 3)
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
    """A line of panels per task, a panel per tag: mean over seeds, band from the lowest to the highest."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks = list(dict.fromkeys(row["env_id"] for row in rows))
    size = {"figsize": (4 * len(tags), 3 * len(tasks)), "squeeze": False, "layout": "constrained"}
    figure, grid = plt.subplots(len(tasks), len(tags), **size)
    for line, task in zip(grid, tasks, strict=True):
        mine = [row for row in rows if row["env_id"] == task]
        methods = list(dict.fromkeys((row["algo"], row["settings"]) for row in mine))
        for axes, tag in zip(line, tags, strict=True):
            for (algo, settings), colour in zip(methods, itertools.cycle(COLOURS), strict=False):
                runs: dict[str, dict[int, float]] = {}
                for row in mine:
                    if (row["algo"], row["settings"]) == (algo, settings):
                        runs.setdefault(row["seed"], {})[row["step"]] = row[tag]
                steps = sorted(set.intersection(*map(set, runs.values())))
                values = [[run[step] for run in runs.values()] for step in steps]
                label = f"{algo}, {settings.replace('__', ', ').replace('-', ' ')} ({len(runs)} seeds)"
                axes.plot(steps, [statistics.mean(v) for v in values], color=colour, label=label)
                ends = [min(v) for v in values], [max(v) for v in values]
                axes.fill_between(steps, *ends, color=colour, alpha=0.15, lw=0)
            axes.set(title=f"{task}: {tag}", xlabel="environment steps")
            if min(row[tag] for row in mine) > 0:
                axes.set_yscale("log")
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
        line[0].legend(frameon=False, fontsize=6)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=130)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    copy = commands.add_parser("export")
    copy.add_argument("runs", type=Path)
    copy.add_argument("target", type=Path)
    draw = commands.add_parser("plot")
    draw.add_argument("folders", type=Path, nargs="+", metavar="folder")
    draw.add_argument("--level", type=float, help="a second table: steps until a seed's first such return")
    draw.add_argument("--title", help="of the picture (default: the folder's name)")
    draw.add_argument("--out", type=Path, help="picture to write; without it only the table is printed")
    collect = commands.add_parser("scalars")
    collect.add_argument("runs", type=Path)
    collect.add_argument("--tags", type=lambda text: text.split(","), required=True, help="a,b,..")
    collect.add_argument("--every", type=int, default=500, help="steps between rows (default: 500)")
    collect.add_argument("--csv", type=Path, required=True, help="table to write")
    collect.add_argument("--figure", type=Path, help="picture to write")
    args = parser.parse_args()
    if args.command == "scalars":
        rows = scalars(args.runs, args.tags, args.every) if args.every > 0 else []
        if not rows:
            where = f"{args.runs}, --every {args.every}"
            print(f"error: {where}: must have complete runs with {', '.join(args.tags)}", file=sys.stderr)
            return 2
        args.csv.parent.mkdir(parents=True, exist_ok=True)
        with open(args.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        if args.figure:
            plot_scalars(rows, args.tags, args.figure)
        print(f"{len(rows)} rows in {args.csv}")
        return 0
    if args.command == "export":
        print(f"{export(args.runs, args.target)} runs exported to {args.target}")
        return 0
    for folder in args.folders:
        if not read(folder):
            raise ValueError(f"{folder}: must hold <algorithm>/<settings>/<seed>.csv")
    methods = read_all(args.folders)
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
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(guarded())
