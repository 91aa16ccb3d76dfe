"""Same name, same code: the blocks that files of algos/ share, compared and copied.

    python tests/family.py                             # list every block whose text differs between files
    python tests/family.py --sync sac.py:ReplayBuffer  # copy this block to every file that has that name
    python tests/family.py --sync sac.py:Agent.act     # the same for a method
    python tests/family.py --sync sac.py               # every block of sac.py, and all below its header
    python tests/family.py --sync sac.py:below         # only what stands below its header

A block is a top-level function, class or constant, or a method of Agent. Free to differ: Args, Agent as a
whole, and the methods in OWN, which are the algorithm itself. Those in OF_A_BASE differ between bases. What
stands below the header line, but for the call of main, is one text; how long that and what is read may be,
and `train`, is counted too.
"""

import argparse
import ast
import sys
from pathlib import Path

ALGOS = Path(__file__).resolve().parent.parent / "algos"
HEADER = "# --- the same in every file from here on: checks, task, run folder, graphs, command line ---"
CALL = '\n\nif __name__ == "__main__" and "__file__" in globals():  # a notebook\'s cell calls train itself\n'
LONGEST = {  # lines to read above the header
    "sac": 375, "mage": 583, "mbpo": 797, "steve": 595, "td3": 402, "ddpg": 422, "ddpg_mve": 693,
    "sac_mve": 650, "sac_ove": 922, "sac_retrace": 488, "sac_svg_h": 838, "sac_vaml": 740,
    "ddpg_mve_min": 940, "pilco": 740, "pets": 750, "poplin": 865, "me_trpo": 870, "svg": 680,
    "maac": 865, "dreamer": 755,
}  # fmt: skip
BELOW, LOOP = 381, 45  # lines of what nobody needs to read, and of `train`
METHODS = "__init__ make_buffer update learn critic_loss".split()  # the algorithm itself
OWN = {"Args", "Agent", *(f"Agent.{name}" for name in METHODS)}
OF_A_BASE = {"Agent.act", "Agent.policy", "Agent.begin_episode"}  # the same in files that begin alike: sac..


def blocks(source: str) -> dict[str, tuple[int, int]]:
    """Name -> (first, last) line, counted from 0, last excluded; decorators included."""
    found = {}

    def add(name: str, node: ast.stmt) -> None:
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        found[name] = (first - 1, node.end_lineno)

    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            add(node.name, node)
            if node.name == "Agent":
                for method in node.body:
                    if isinstance(method, ast.FunctionDef):
                        add(f"Agent.{method.name}", method)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            add(node.targets[0].id, node)
    return found


def halves(source: str) -> tuple[str, str, str]:
    """What is read, what is the same everywhere, and the call of main."""
    above, _, rest = source.partition(f"\n{HEADER}\n")
    below, _, call = rest.partition(CALL)
    return above, below, call


def lengths(path: Path) -> list[str]:
    """One line for each part of the file that is longer than it may be."""
    above, below, _ = halves(path.read_text())
    found = [("lines above the header", above.count("\n") + 1, LONGEST.get(path.stem, 850))]
    found.append(("lines below the header", below.count("\n") + 1, BELOW))
    found += [(name, b - a, LOOP) for name, (a, b) in blocks(above).items() if name.startswith("train")]
    return [f"{path.name}: {name}: {count}, at most {most}" for name, count, most in found if count > most]


def texts(path: Path) -> dict[str, str]:
    """Name -> source of every block that must be the same everywhere."""
    source, below, _ = halves(path.read_text())
    lines = source.splitlines()
    base = path.stem.split("_")[0]
    named = {
        f"{name} of {base}" if name in OF_A_BASE else name: place for name, place in blocks(source).items()
    }
    found = {name: "\n".join(lines[a:b]) for name, (a, b) in named.items() if name not in OWN}
    return found | {"below": below}


def differences(paths: list[Path]) -> list[str]:
    """One line for every name that has more than one text."""
    variants: dict[str, dict[str, list[str]]] = {}
    for path in paths:
        for name, text in texts(path).items():
            variants.setdefault(name, {}).setdefault(text, []).append(path.name)
    return [
        f"{name}: " + " | ".join(",".join(files) for files in by_text.values())
        for name, by_text in sorted(variants.items())
        if len(by_text) > 1
    ]


def text_below(path: Path) -> str:
    return halves(path.read_text())[1]


def sync(source: Path, name: str, paths: list[Path]) -> list[str]:
    """Copy block `name` of `source` to the other files that have it; returns the files changed."""
    text, changed = texts(source)[name].split("\n"), []
    for path in paths:
        old = path.read_text()
        if name == "below":
            above, _, call = halves(old)
            new = f"{above}\n{HEADER}\n{text_below(source)}{CALL}{call}"
            if new != old:
                path.write_text(new)
                changed.append(path.name)
        elif path != source and name in texts(path):
            first, last = blocks(old)[name.split(" of ")[0]]
            lines = old.split("\n")
            lines[first:last] = text
            if (new := "\n".join(lines)) != old:
                path.write_text(new)
                changed.append(path.name)
    return changed


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sync", metavar="FILE[:BLOCK]", help="copy this block, or all of the file's, to its siblings"
    )
    args, paths = parser.parse_args(), sorted(ALGOS.glob("*.py"))
    if args.sync:
        file, _, block = args.sync.partition(":")
        if not (ALGOS / file).is_file():
            parser.error(f"--sync {args.sync}: no {file} in {ALGOS}")
        if block and block not in texts(ALGOS / file):
            parser.error(f"--sync {args.sync}: {file} has no shared block {block}")
        for name in [block] if block else texts(ALGOS / file):
            for changed in sync(ALGOS / file, name, paths):
                print(f"{name} -> {changed}")
    found = differences(paths) + [line for path in paths for line in lengths(path)]
    print("\n".join(found) if found else f"same name, same code in {len(paths)} files, none too long")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
