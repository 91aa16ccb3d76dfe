"""The documentation site: Sphinx with MyST and Furo, from the pages of docs/ as they are. Extra `docs`.

    sphinx-build -W docs site      # then open site/index.html

The front page is README.md with the questions above it, the contributing page is CONTRIBUTING.md. Links to
files that are no pages lead to the repository; equations, written in plain characters, get their indices and
exponents raised and lowered; explorer.py adds its data.
"""

import os
import re
import shutil
import sys
from pathlib import Path

from docutils import nodes

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path.insert(0, str(ROOT))  # a configuration is no module of a package

from experiments.report import explorer  # noqa: E402

project, author, html_title = "Farsight", "the authors of Farsight", "Farsight"
extensions = ["myst_parser"]
root_doc = "index"
exclude_patterns = ["results", "_static"]
myst_heading_anchors = 4
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = html_copy_source = html_show_copyright = smartquotes = False
html_theme_options = {
    mode: {"sidebar-item-spacing-vertical": "0.15rem", "sidebar-caption-space-above": "0.9rem"}
    for mode in ("light_css_variables", "dark_css_variables")
}
pygments_dark_style = "github-dark"

WHOLE = {"index": ROOT / "README.md", "contributing": ROOT / "CONTRIBUTING.md"}  # pages from outside docs/
QUESTIONS = """\
<div class="questions">

<a href="#method">Which method?</a> The table below: each is one file.

<a href="explorer.html#view=horizon">How far to look ahead?</a> Your task, every horizon, and how sure.

[Make it yours](make_it_yours.md) Copy a file, change ten lines.

[Reproduce](claims.md) Every claim, and what the data say.

</div>

"""
LOOK_AHEAD = "explorer when_to_trust_your_model gradients_through_models iter_vaml local_models".split()
NAVIGATION = {
    "How far to look ahead?": LOOK_AHEAD,
    "Make it yours": ["make_it_yours", "your_task", "use_your_agent", "contributing"],
    "Reproduce": ["claims", "campaign", "cluster", "gpu"],
}


def methods() -> list[str]:
    """Pages of the algorithms in the order of the README's table, then those that are not in it."""
    listed = re.findall(r"^\| \[`algos/.*?\]\(docs/(\w+)\.md\)", (ROOT / "README.md").read_text(), re.M)
    every = [path.stem for path in sorted((ROOT / "algos").glob("*.py"))]
    return [name for name in dict.fromkeys([*listed, *every]) if (DOCS / f"{name}.md").exists()]


def trees() -> str:
    """The navigation: one hidden tree of pages for each question, under their titles without file names."""
    title = lambda page: (
        (DOCS / f"{page}.md").read_text().split("\n", 1)[0].removeprefix("# ").partition(": `")[0]
    )
    tree = '```{{toctree}}\n:hidden:\n:caption: "{}"\n\n{}\n```\n'
    groups = {"Which method?": methods()} | NAVIGATION
    lines = {
        question: "\n".join(f"{title(page)} <{page}>" for page in pages) for question, pages in groups.items()
    }
    return "\n".join(tree.format(question, pages) for question, pages in lines.items())


def address(target: Path) -> str:
    """Of a file or folder that is no page: where the project is hosted, or in this checkout."""
    path = target.relative_to(ROOT).as_posix()
    if repository := os.environ.get("GITHUB_REPOSITORY"):
        server, commit = os.environ["GITHUB_SERVER_URL"], os.environ["GITHUB_SHA"]
        return f"{server}/{repository}/{'tree' if target.is_dir() else 'blob'}/{commit}/{path}"
    return target.as_uri()


def linked(text: str, folder: Path) -> str:
    """Markdown with its relative links, seen from `folder`, turned into ones that the site has."""
    pages = {path: name for name, path in WHOLE.items()}

    def turn(match: re.Match) -> str:
        mark, words, target = match.groups()
        path, _, anchor = target.partition("#")
        file = (folder / path).resolve()
        if not path or "://" in target or not file.is_relative_to(ROOT):
            return match[0]
        anchor = anchor and f"#{anchor}"
        if file in pages:
            return f"[{words}]({pages[file]}.md{anchor})"
        if mark or (file.parent == DOCS and file.suffix == ".md"):
            return f"{mark}[{words}]({file.relative_to(DOCS).as_posix()}{anchor})"
        picture = file.parent == DOCS / "figures"
        return f'<a href="{file.relative_to(DOCS).as_posix() if picture else address(file)}">{words}</a>'

    parts = re.split(r"(^```.*?^```$)", text, flags=re.M | re.S)
    link = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
    return "".join(part if i % 2 else link.sub(turn, part) for i, part in enumerate(parts))


def front(text: str, index: str) -> str:
    """The front page: the README, the questions after its first words, the pages of index.md at its end."""
    head, rest = re.split(r"^(?=\| file \|)", text, maxsplit=1, flags=re.M)
    pages = re.sub(r"^# .*", "## All pages", index, count=1)
    return f'{head}{QUESTIONS}<a id="method"></a>\n\n{rest}\n\n{pages}\n{trees()}'


def read_source(app, name: str, content: list[str]) -> None:
    text, folder = content[0], DOCS
    if name in WHOLE:
        text, folder = WHOLE[name].read_text(), ROOT
        app.env.note_dependency(str(WHOLE[name]), docname=name)
    text = linked(text, folder)
    content[0] = front(text, linked(content[0], DOCS)) if name == "index" else text


# ------------------------------------------------------------------ equations

MARKS = "\u0300-\u036f"  # accents that follow their letter
SMALL = "⁰¹²³⁴⁵⁶⁷⁸⁹⁻ᵀ½₀₁₂₃₄₅₆₇₈₉'"  # behind a letter, and no part of its index
NAMES = r"min|max|mean|std|Var|var|net|\d+(?:\.\d+)?(?=\^)"
BASE = rf"(?:(?<![^\W{SMALL}])(?:{NAMES}|[^\W\d_])[{MARKS}]*|[∇α-ωΑ-Ω][{MARKS}]*|[)\]‖|*])[{SMALL}]*"
INSIDE = rf"\{{(?:[^{{}}]|\{{[^{{}}]*\}})*\}}|\([^()]*\)|−?½|−?(?:(?![{SMALL}])[\w{MARKS}∞])+"
SCRIPT, SCRIPTS = re.compile(rf"([_^])({INSIDE})"), re.compile(rf"({BASE})((?:[_^](?:{INSIDE}))+)")


def typeset(text: str) -> list[nodes.Node]:
    """Plain characters with _i, _{t+1}, ^(t+1) as text with subscripts and superscripts. A name such as
    sac_mve, whose base is more than a letter, stays as it is."""
    found, end = [], 0
    for match in SCRIPTS.finditer(text):
        found.append(nodes.Text(text[end : match.start(2)]))
        for kind, inner in SCRIPT.findall(match[2]):
            inner = inner[1:-1] if inner[0] in "{(" else inner
            found.append((nodes.subscript if kind == "_" else nodes.superscript)("", "", *typeset(inner)))
        end = match.end()
    return [*found, nodes.Text(text[end:])] if end < len(text) or not found else found


def set_equations(app, tree: nodes.document) -> None:
    """All text but code, links and headings; the section Equations is marked for its typeface."""
    for section in tree.findall(nodes.section):
        if section[0].astext() == "Equations":
            section["classes"].append("equations")
    apart = (nodes.literal, nodes.literal_block, nodes.reference, nodes.title, nodes.raw, nodes.comment)
    for text in list(tree.findall(nodes.Text)):
        parents, node = [], text.parent
        while node is not None:
            parents.append(node)
            node = node.parent
        if re.search(r"[_^]", text) and not any(isinstance(node, apart) for node in parents):
            text.parent.replace(text, typeset(text.astext()))


# ------------------------------------------------------------------ explorer and figures


def link_claims(app, tree: nodes.document) -> None:
    """On the page of claims each one's name leads to its numbers in the explorer."""
    for row in tree.findall(nodes.row) if app.env.docname == "claims" else ():
        if not isinstance(row.parent, nodes.thead):
            text = next(iter(row[0].findall(nodes.Text)))
            link = nodes.reference(text, text, refuri=f"explorer.html#view=claims&claim={text}")
            text.parent.replace(text, link)


def add_explorer(app, page: str, template: str, context: dict, tree) -> None:
    if page == "explorer":
        for name in ("uplot/uPlot.min.css", "explorer.css"):
            app.add_css_file(name)
        for name in ("uplot/uPlot.iife.min.js", "explorer-data.js", "explorer.js"):
            app.add_js_file(name, loading_method="defer")


def write_data(app) -> None:
    static = Path(app.outdir) / "_static"
    static.mkdir(parents=True, exist_ok=True)
    found = explorer.explored(explorer.RESULTS, explorer.CLAIMS)
    (static / "explorer-data.js").write_text(explorer.script(found))
    shutil.copytree(DOCS / "figures", Path(app.outdir) / "figures", dirs_exist_ok=True)


def setup(app) -> None:
    app.connect("source-read", read_source)
    app.connect("doctree-read", set_equations)
    app.connect("doctree-read", link_claims)
    app.connect("builder-inited", write_data)
    app.connect("html-page-context", add_explorer)
