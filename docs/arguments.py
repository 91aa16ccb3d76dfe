"""The argument tables of the pages, from the Args of the files.

    python docs/arguments.py sac_mve           # print them
    python docs/arguments.py --write sac_mve   # put them into docs/sac_mve.md in the place of those it has
    python docs/arguments.py --write           # the same for every file

tests/docs/test_docs.py compares pages and files.
"""

import ast
import re
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
ALGOS = DOCS.parent / "algos"


def arguments(algo: str) -> str:
    """One Markdown table per class that Args inherits: flag, default, meaning with source.

    The meaning is the comment behind the field. Raises ValueError for a field without one.
    """
    source = (ALGOS / f"{algo}.py").read_text()
    lines, tree = source.splitlines(), ast.parse(source)
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    parts = []
    for base in classes["Args"].bases:
        node = classes[base.id]
        head = "| flag | default | meaning and source |\n|---|---|---|"
        parts.append(f"**{base.id}.** {ast.get_docstring(node)}\n\n{head}")
        for field in node.body:
            if isinstance(field, ast.AnnAssign):
                behind = lines[field.end_lineno - 1].encode()[field.end_col_offset :].decode()
                if not behind.startswith("  # "):
                    raise ValueError(f"{algo}.py: {field.target.id}: must have its meaning behind it: # ...")
                flag, default = field.target.id.replace("_", "-"), ast.literal_eval(field.value)
                shown = f"{default:_}" if type(default) is int else default
                meaning = behind[4:].replace("|", r"\|")  # no end of a cell
                parts[-1] += f"\n| `--{flag}` | `{shown!s}` | {meaning} |"
    return "\n\n".join(parts).replace("`` |", "(empty) |")


def write(algo: str) -> list[str]:
    """Replace the page's tables by those of the file; returns the classes that the page has no table of."""
    page, missing = DOCS / f"{algo}.md", []
    text = page.read_text()
    for part in re.split(r"\n\n(?=\*\*)", arguments(algo)):
        head = part.partition(" ")[0]
        table = re.compile(rf"^{re.escape(head)} .*\n\n(\|.*\n?)+", re.M)
        if not table.search(text):
            missing.append(head.strip("*."))
        text = table.sub(lambda _, part=part: part + "\n", text)
    page.write_text(text)
    return missing


def main() -> None:
    known = sorted(path.stem for path in ALGOS.glob("*.py"))
    algos = [word for word in sys.argv[1:] if word != "--write"] or known
    if unknown := [algo for algo in algos if algo not in known]:
        print(f"error: {unknown[0]}: must be one of {', '.join(known)}, or --write", file=sys.stderr)
        sys.exit(2)
    for algo in algos:
        if "--write" not in sys.argv:
            print(arguments(algo))
        elif missing := write(algo):
            print(f"docs/{algo}.md has no table of {', '.join(missing)}: those of its parent's page count")


if __name__ == "__main__":
    main()
