"""Same name, same code: the blocks that files of algos/ share, compared and copied.

    python tests/family.py                             # list every block whose text differs between files
    python tests/family.py --sync sac.py:ReplayBuffer  # copy this block to every file that has that name
    python tests/family.py --sync sac.py:Agent.act     # the same for a method
    python tests/family.py --sync sac.py               # every block of sac.py

A block is a top-level function, class or constant, or a method of Agent. Free to differ: Args, Agent as a
whole, and the methods in OWN, which are the algorithm itself. Those in OF_A_BASE differ between bases.
"""

import argparse
import ast
import sys
from pathlib import Path

ALGOS = Path(__file__).resolve().parent.parent / "algos"
OWN = {"Args", "Agent", "Agent.__init__", "Agent.make_buffer", "Agent.update"}
OF_A_BASE = {"Agent.act"}  # the same in all files whose names begin alike: sac.., ddpg.., td3..


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


def texts(path: Path) -> dict[str, str]:
    """Name -> source of every block that must be the same everywhere."""
    source = path.read_text()
    lines = source.splitlines()
    base = path.stem.split("_")[0]
    named = {
        f"{name} of {base}" if name in OF_A_BASE else name: place for name, place in blocks(source).items()
    }
    return {name: "\n".join(lines[a:b]) for name, (a, b) in named.items() if name not in OWN}


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


def sync(source: Path, name: str, paths: list[Path]) -> list[str]:
    """Copy block `name` of `source` to the other files that have it; returns the files changed."""
    text, changed = texts(source)[name].split("\n"), []
    for path in paths:
        old = path.read_text()
        if path != source and name in texts(path):
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
    found = differences(paths)
    print("\n".join(found) if found else f"same name, same code in {len(paths)} files")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
