"""Print the argument table of a file, from its Args: python docs/arguments.py sac_mve

The pages of docs/ hold this text; tests/test_docs.py compares them.
"""

import ast
import sys
from pathlib import Path

ALGOS = Path(__file__).resolve().parent.parent / "algos"


def arguments(algo: str) -> str:
    """One Markdown table per class that Args inherits: flag, default, meaning with source."""
    tree = ast.parse((ALGOS / f"{algo}.py").read_text())
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    parts = []
    for base in classes["Args"].bases:
        node = classes[base.id]
        head = "| flag | default | meaning and source |\n|---|---|---|"
        parts.append(f"**{base.id}.** {ast.get_docstring(node)}\n\n{head}")
        for field, docstring in zip(node.body, node.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign):
                flag, default = field.target.id.replace("_", "-"), ast.literal_eval(field.value)
                shown = f"{default:_}" if type(default) is int else default
                parts[-1] += f"\n| `--{flag}` | `{shown!s}` | {docstring.value.value} |"
    return "\n\n".join(parts).replace("`` |", "(empty) |")


if __name__ == "__main__":
    print(arguments(sys.argv[1]))
