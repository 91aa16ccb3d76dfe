"""Copies the evaluations of complete runs to where reports, claims and the explorer find them.

    python -m experiments.bench.export quick                       # that suite's runs -> docs/results/quick/
    python -m experiments.bench.export mine --results results      # a name that is no suite: all of runs/

They lie at <results>/<name>/<task>/<algorithm>/<settings>/<seed>.csv; those of a suite that includes others
lie under the name of the suite that they are included from.
"""

import re
import shutil
import sys
from pathlib import Path

from experiments.bench.jobs import find_run, place_of, suite_jobs, suite_names
from experiments.report.commands import Parser, mistake
from experiments.report.reading import RESULTS, parts_of, settings_of

ANYWHERE = "num_threads env_threads device cuda_graphs capture_video".split()  # matter to no result


def of_suite(suite: str, runs: Path, results: Path) -> int:
    """Copy the eval.csv of every complete run of the suite, on any number of threads; returns how many."""
    count = 0
    for job in suite_jobs(suite, str(runs), 1, [], fresh=True)[1]:
        wanted = {name: value for name, value in job.wanted.items() if name not in ANYWHERE}
        folder = find_run(runs, job.algo, wanted, any_version=True)
        if folder is not None:
            copy(folder, results / job.suite / place_of(job) / f"{job.wanted['seed']}.csv")
            count += 1
    return count


def of_all(runs: Path, target: Path) -> int:
    """Copy the eval.csv of every complete run below `runs`; returns how many. Raises ValueError if two belong
    in one place."""
    placed: dict[Path, Path] = {}
    for folder in sorted(path.parent for path in runs.glob("*__*__*__*/eval.csv")):
        task, algo, seed = parts_of(folder)
        settings = settings_of(folder, algo)
        if settings is None:
            continue
        place = target / task / algo / settings / f"{seed}.csv"
        if place in placed:
            raise ValueError(f"{folder} and {placed[place]}: must not both be {place}; export them apart")
        placed[place] = folder
    for place, folder in placed.items():
        copy(folder, place)
    return len(placed)


def copy(folder: Path, place: Path) -> None:
    """A run's evaluations."""
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / "eval.csv", place)


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("name", help="of a suite, or of the folder for all runs")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of runs (default: runs)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="(default: docs/results)")
    args = parser.parse_args()
    try:
        if not re.fullmatch(r"\w[\w.-]*", args.name):
            raise ValueError(f"{args.name}: must be a name of letters, digits, _, . and -")
        if args.name in suite_names():
            count = of_suite(args.name, args.runs, args.results)
        else:
            count = of_all(args.runs, args.results / args.name)
    except (ValueError, OSError) as error:
        return mistake(error)
    print(f"{count} runs exported to {args.results}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
