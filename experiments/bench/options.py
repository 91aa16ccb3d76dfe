"""The launcher's command line."""

import argparse
import functools
import math
import os

from experiments.algorithms import option_of, split_flags
from experiments.report.commands import Parser, at_least

SET_HERE = {  # flags of the algorithms that the launcher sets, and how it is told what to
    "--env-id": "given before the --, as --env-ids",
    "--seed": "given before the --, as --seeds",
    "--runs-dir": "given before the --",
    "--num-threads": "given before the --",
    "--resume": "left out: unfinished runs are resumed without it",
}
PATIENCE = 15.0  # seconds that a run has to stop in before it is killed


def command_line(about: str | None = None) -> Parser:
    """The launcher's options, all that stands before the --."""
    usage = "%(prog)s [options] [-- flags for the algorithms]"
    parser = Parser(about, prog="benchmark.sh", usage=usage, allow_abbrev=False)
    split = lambda text: list(dict.fromkeys(part for part in map(str.strip, text.split(",")) if part))
    add, count, amount = parser.add_argument, at_least(1), at_least(0, float)
    add("--algos", type=split, help="files of algos/ (default: sac,sac_mve)")
    add("--env-ids", type=split, help="Gymnasium ids (default: InvertedPendulum-v5)")
    add("--seeds", type=split, help="(default: 1,2,3)")
    add("--suite", help="instead of these three: a file of experiments/bench/suites/, or a path")
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
    """The launcher's, as they are spelt."""
    names = vars(command_line().parse_args([]))
    return {"--help", "--threads", *(f"--{name.replace('_', '-')}" for name in names)}


def read_line(words: list[str], about: str | None = None) -> tuple[argparse.Namespace, list[str]]:
    """The launcher's options and the algorithms' flags. Raises ValueError for what is on the wrong side."""
    dashes = words.index("--") if "--" in words else len(words)
    args, unknown = command_line(about).parse_known_args(words[:dashes])
    if unknown:
        other = "given after --, as all flags of the algorithms, or be one that --help lists"
        raise ValueError(f"{unknown[0]}: must be {SET_HERE.get(option_of(unknown[0]), other)}")
    extra = words[dashes + 1 :]
    for flag, *_ in split_flags(extra):
        if option_of(flag) in SET_HERE:
            raise ValueError(f"{flag}: must be {SET_HERE[option_of(flag)]}")
    return args, extra
