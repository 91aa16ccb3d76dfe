"""Keep a trained agent without its replay, optimisers and slow copies: small enough for a repository.

    python -m experiments.agents.keep runs/<run> agents/HalfCheetah-v5   # final.pt, args.json, eval.csv
    python -m experiments.agents.watch agents/HalfCheetah-v5             # plays it like any run

`load` of the file that made it reads such a folder, too; it cannot be resumed, since what it would go on from
is left out. Of an unfinished run it is the last checkpoint's agent, in checkpoint.pt, with the evaluations up
to there. The folder must be new. Exit code 2 for a mistake, which leaves nothing on disk.
"""

import shutil
import sys
from pathlib import Path

import torch

from experiments.report.commands import Parser, mistake
from experiments.report.tables import write_table

NAMES = ("final.pt", "checkpoint.pt", "checkpoint.previous.pt")
LEFT_OUT = ("buffer", "torch_rng", "cuda_rng", "task_rng")  # what only a run that goes on needs


def small(state: dict) -> dict:
    """A checkpoint without replay, generators, optimisers and slow copies; the rest stays as it is."""
    parts = state["agent"].items()
    agent = {name: part for name, part in parts if not (name.endswith("_target") or is_optimizer(part))}
    return {name: part for name, part in state.items() if name not in LEFT_OUT} | {"agent": agent}


def is_optimizer(part: object) -> bool:
    """Whether a part of an agent's state is that of an optimiser."""
    return isinstance(part, dict) and {"state", "param_groups"} <= part.keys()


def keep(run: Path, out: Path) -> int:
    """Write the folder; returns its bytes. Raises ValueError where it cannot be."""
    path = next((run / name for name in NAMES if (run / name).exists()), run / NAMES[0])
    try:
        state = small(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # missing and damaged files raise many types
        raise ValueError(f"{run}: must be a run's folder with a readable {path.name}: {error!r}") from None
    if not (run / "args.json").is_file():
        raise ValueError(f"{run}: must be a run's folder with its args.json")
    if out.exists():
        raise ValueError(f"{out}: must be a folder that does not exist yet")
    try:
        out.mkdir(parents=True)
        torch.save(state, out / ("final.pt" if path.name == "final.pt" else "checkpoint.pt"))
        shutil.copyfile(run / "args.json", out / "args.json")
        write_table(out / "eval.csv", state["rows"][0], state["rows"])  # none later than the agent
    except (OSError, RuntimeError) as error:  # the latter of a full disk, from torch.save
        shutil.rmtree(out, ignore_errors=True)
        raise ValueError(f"{out}: must be a folder that can be written: {error}") from None
    return sum(file.stat().st_size for file in out.iterdir())


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("out", type=Path, help="the new folder")
    args = parser.parse_args()
    try:
        size = keep(args.run, args.out)
    except ValueError as error:
        return mistake(error)
    print(f"{args.out}: {size / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
