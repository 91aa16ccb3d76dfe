"""The documentation site and the results explorer: data in closed form, a build with warnings as errors, and
the page in a real Chromium. What needs Sphinx or the browser takes `pip install -e '.[docs]'`."""

import functools
import http.server
import importlib.util
import json
import math
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from experiments.report.explorer import CLAIMS, RESULTS, claims, explored, horizon_study, page, script
from tests.conftest import ROOT, long, tool

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def missing(module: str) -> bool:
    return importlib.util.find_spec(module) is None


def put(root: Path, folder: str, **seeds: list[tuple]) -> None:
    """<root>/<folder>/<seed>.csv with rows (step, return) or (step, return, success)."""
    (root / folder).mkdir(parents=True, exist_ok=True)
    for seed, rows in seeds.items():
        head = "step,return_mean" + ",success_rate" * (len(rows[0]) > 2)
        text = "\n".join([head, *(",".join(map(str, row)) for row in rows)])
        (root / folder / f"{seed[1:]}.csv").write_text(text + "\n")


@pytest.fixture
def small(tmp_path):
    """Three seeds of sac with slopes 1, 2, 3, to step 200; two of sac_mve at 5 and 7 until then."""
    lines = {f"s{k}": [(0, 0), (100, k), (200, 2 * k)] for k in (1, 2, 3)}
    put(tmp_path, "tiny/Task-v0/sac/default", **lines)
    flat = {f"s{k}": [(step, k * (step <= 200)) for step in (0, 100, 200, 300, 400)] for k in (5, 7)}
    put(tmp_path, "tiny/Task-v0/sac_mve/horizon-3", **flat)
    return tmp_path


# ---------------------------------------------------------------- data of the explorer


def test_means_intervals_finals_and_areas_by_hand(small):
    found = explored(small, None)["methods"]["tiny/Task-v0/sac/default"]
    assert found["name"] == "sac"
    shown = found["measures"]["return_mean"]
    assert shown["steps"] == [0, 100, 200] and shown["seeds"] == [1, 2, 3]
    assert shown["runs"] == [[0, 1, 2], [0, 2, 4], [0, 3, 6]] and "run_steps" not in shown
    half = (
        4.302652729911275 * 2 / math.sqrt(3)
    )  # Student's t, two degrees of freedom; deviation 2 at step 200
    assert shown["mean"] == [0, 2, 4]
    assert shown["low"][2] == pytest.approx(4 - half, rel=1e-4)
    assert shown["high"][2] == pytest.approx(4 + half, rel=1e-4)
    assert shown["final"]["values"] == [2, 4, 6] and shown["final"]["text"] == "4.0 ± 2.0"
    assert shown["final"]["mean"] == 4 and shown["final"]["bounds"] == f"[{4 - half:.4g}, {4 + half:.4g}]"
    assert shown["area"]["values"] == [1, 2, 3] and shown["end"] == 200


def test_two_seeds_have_no_mean_and_are_compared_at_equal_steps(small):
    found = explored(small, None)["methods"]["tiny/Task-v0/sac_mve/horizon-3"]
    assert found["name"] == "sac_mve, horizon 3"
    shown = found["measures"]["return_mean"]
    assert not {"mean", "low", "high"} & (set(shown) | set(shown["final"]) | set(shown["area"]))
    assert shown["steps"] == [0, 100, 200, 300, 400]  # drawn whole
    assert shown["end"] == 200 and shown["final"]["values"] == [5, 7]


def test_steps_to_round_levels_by_hand(small):
    data = explored(small, None)
    levels = data["tasks"]["Task-v0"]["levels"]["return_mean"]
    assert levels == ["1", "2", "3", "4", "5", "6", "7"]
    reach = data["methods"]["tiny/Task-v0/sac/default"]["measures"]["return_mean"]["reach"]
    assert reach[levels.index("3")] == {"text": "150 (2 of 3)", "values": [None, 200, 100]}
    assert reach[levels.index("7")] == {"text": "(0 of 3)", "values": [None, None, None]}


def test_published_returns_come_first_among_the_levels(small):
    (small / "tiny/Task-v0").rename(small / "tiny/InvertedPendulum-v5")
    levels = explored(small, None)["tasks"]["InvertedPendulum-v5"]["levels"]["return_mean"]
    assert levels[:2] == ["502.7, 50% of the published return", "900.5, 90% of the published return"]


def test_success_is_a_measure_of_its_own(small):
    put(small, "tiny/Goal-v0/ddpg/default", s1=[(0, -50, 0.0), (100, -20, 0.5)])
    data = explored(small, None)
    measures = data["methods"]["tiny/Goal-v0/ddpg/default"]["measures"]
    assert measures["return_mean"]["runs"] == [[-50, -20]] and measures["success_rate"]["runs"] == [[0, 0.5]]
    assert list(data["tasks"]["Task-v0"]["levels"]) == ["return_mean"]


def test_seeds_with_steps_of_their_own_are_drawn_whole(small):
    put(small, "tiny/Task-v0/td3/default", s1=[(0, 0), (100, 1), (150, 2)], s2=[(0, 0), (100, 3)])
    shown = explored(small, None)["methods"]["tiny/Task-v0/td3/default"]["measures"]["return_mean"]
    assert shown["steps"] == [0, 100] and shown["run_steps"] == [[0, 100, 150], [0, 100]]


def test_horizon_0_is_the_parent(small):
    (study,) = explored(small, None)["tasks"]["Task-v0"]["horizons"].values()
    rows = study["studies"]["sac_mve"]["rows"]
    assert [(row["horizon"], row["values"]) for row in rows] == [(0, [1, 2, 3]), (3, [5, 7])]


def test_model_steps_of_the_horizon_are_the_default(tmp_path):
    for settings, value in {"horizon-0": 1, "horizon-5": 4, "horizon-2__model_steps-5": 3}.items():
        put(tmp_path, f"tiny/Ball-v0/ddpg_mve_min/{settings}", s1=[(0, value), (10, value)])
    studies = explored(tmp_path, None)["tasks"]["Ball-v0"]["horizons"]["tiny"]["studies"]
    rows = studies["ddpg_mve_min, model_steps 5"]["rows"]
    assert [(row["horizon"], row["values"]) for row in rows] == [(0, [1]), (2, [3]), (5, [4])]


@pytest.mark.parametrize(
    ("third", "answer", "verdict"),
    [
        ([10, 11, 12, 13, 14], "H = 5: better than every other H measured.", "worse than H = 0"),
        ([30, 31, 32, 33, 33], "H = 5: 95 % intervals do not tell it from H = 3.", "better than H = 0"),
        ([19, 20, 21, 22, 23], "H = 5: better than every other H measured.", "undecided"),
        ([29, 31], "H = 5: too few seeds to be sure (2; 5 decide); 95 % intervals do not tell it from H = 3.",
         "too few seeds"),
    ],
)  # fmt: skip
def test_which_horizon_and_how_sure(third, answer, verdict):
    study = horizon_study({0: [20, 21, 22, 23, 24], 3: third, 5: [30, 31, 32, 33, 34]})
    assert study["answer"] == f"Highest mean area at {answer}" and study["best"] == 5
    assert study["rows"][1]["verdict"] == verdict and "verdict" not in study["rows"][0]
    assert study["rows"][2]["difference"].startswith("10 [")


CLAIM = """
papers.p = "A paper"
[[claims]]
id = "A1"
paper = "p"
source = "a figure"
statement = "It is better."
[[claims.cases]]
about = "three minus none"
metric = "final"
terms = [[1, "tiny/Task-v0/sac_mve/horizon-3"], [-1, "tiny/Task-v0/sac/default"]]
[[claims.cases]]
about = "nobody ran it"
terms = [[1, "tiny/Task-v0/td3/default"]]
"""


def test_claims_carry_their_numbers(small):
    (small / "claims.toml").write_text(CLAIM)
    data = explored(small, small / "claims.toml")
    assert data["papers"] == {"p": "A paper"}
    (claim,) = data["claims"]
    first, second = claim["cases"]
    assert claim["verdict"] == "not measured" and first["verdict"] == "too few seeds"
    assert first["asked"] == "final return" and (first["estimate"], first["seeds"]) == (2, 2)
    assert [(t["weight"], t["values"], t["seeds"]) for t in first["terms"]] == [
        (1, [5, 7], [5, 7]),
        (-1, [2, 4, 6], [1, 2, 3]),
    ]
    assert all(term["method"] in data["methods"] for term in first["terms"])
    assert second["terms"][0]["values"] == [] and "estimate" not in second


@pytest.fixture(scope="module")
def committed():
    return explored(RESULTS, CLAIMS)


def test_every_committed_run_and_claim_is_there(committed):
    files = {path.relative_to(RESULTS) for path in RESULTS.glob("*/*/*/*/*.csv")}
    found = {
        Path(key, f"{seed}.csv")
        for key, method in committed["methods"].items()
        for seed in method["measures"]["return_mean"]["seeds"]
    }
    assert found == files
    listed = [key for task in committed["tasks"].values() for keys in task["suites"].values() for key in keys]
    assert sorted(listed) == sorted(committed["methods"])
    text = claims.page(*claims.read_claims(CLAIMS), RESULTS)
    verdicts = re.findall(r"^\| ([^ |]+) \|.*\| \*\*(.*?)\*\* \|", text, re.M)
    assert {claim["id"]: claim["verdict"] for claim in committed["claims"]} == dict(verdicts)


def test_page_is_small_and_needs_no_network(committed):
    text = page(committed)
    assert len(text.encode()) < 3e6
    assert not re.search(r"(?:src|href)=|@import|url\(", text.split("<script>")[0])
    assert text.count("</script>") == 3  # none from within the data


def test_data_is_one_json_whatever_the_names(committed):
    strange = json.loads(json.dumps(committed)) | {"papers": {"p": "</script><b>"}}
    text = script(strange)
    assert "</" not in text
    assert json.loads(text.removeprefix("window.FARSIGHT = ").removesuffix(";\n")) == strange


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--results", "{}/none"], "none: must hold <suite>/<task>/<algorithm>/<settings>/<seed>.csv"),
        (["--claims", "{}/none.toml"], "none.toml: must be valid TOML"),
    ],
)
def test_mistakes_are_one_line(flags, expected, tmp_path):
    flags = [flag.format(tmp_path) for flag in flags]
    done = tool("report.explorer", *flags, "--out", tmp_path / "out" / "page.html")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and expected in done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / "out").exists()


# ---------------------------------------------------------------- the site

needs_sphinx = pytest.mark.skipif(missing("furo"), reason="no Sphinx: pip install -e '.[docs]'")


def scripts(text: str) -> str:
    """typeset's nodes with _( ) and ^( ) for subscript and superscript."""
    from docs.conf import typeset

    def flat(nodes) -> str:
        signs = {"subscript": "_", "superscript": "^"}
        return "".join(f"{signs[n.tagname]}({flat(n)})" if n.tagname in signs else n.astext() for n in nodes)

    return flat(typeset(text))


@needs_sphinx
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("y_t = r̂_t + γ (1 − d̂_t) y_{t+1}", "y_(t) = r̂_(t) + γ (1 − d̂_(t)) y_(t+1)"),
        ("min_i Q̄_i(ŝ_H, â_H)", "min_(i) Q̄_(i)(ŝ_(H), â_(H))"),
        ("γ^(H+1) A_H + γ^{t−1} + 0.8^j + 10^14", "γ^(H+1) A_(H) + γ^(t−1) + 0.8^(j) + 10^(14)"),
        ("σ_j² K_a⁻¹ s'_d ‖V‖_{1,ρ} Q^{π_K}", "σ_(j)² K_(a)⁻¹ s'_(d) ‖V‖_(1,ρ) Q^(π_(K))"),
        ("|I + SW|^−½ of −∇_a Q", "|I + SW|^(−½) of −∇_(a) Q"),
        ("sac_mve, log_every, total_timesteps, 10_000", "sac_mve, log_every, total_timesteps, 10_000"),
    ],
)
def test_equations_are_typeset(text, expected):
    assert scripts(text) == expected


@needs_sphinx
def test_links_out_of_the_pages_lead_to_the_repository(monkeypatch):
    from docs.conf import linked

    monkeypatch.setenv("GITHUB_REPOSITORY", "some/farsight")
    monkeypatch.setenv("GITHUB_SERVER_URL", "https://example.org")
    monkeypatch.setenv("GITHUB_SHA", "abc")
    base = "https://example.org/some/farsight"
    turned = lambda text, folder="docs": linked(text, ROOT / folder)
    assert turned("[`a`](../algos/sac.py)") == f'<a href="{base}/blob/abc/algos/sac.py">`a`</a>'
    assert turned("[r](results)") == f'<a href="{base}/tree/abc/docs/results">r</a>'
    assert turned("[f](figures/dyna.png) ![f](figures/dyna.png)") == (
        '<a href="figures/dyna.png">f</a> ![f](figures/dyna.png)'
    )
    assert (
        turned("[c](../CONTRIBUTING.md) [s](sac.md#arguments)")
        == "[c](contributing.md) [s](sac.md#arguments)"
    )
    assert turned("[s](docs/sac.md#measured) ![f](docs/figures/dyna.png)", ".") == (
        "[s](sac.md#measured) ![f](figures/dyna.png)"
    )
    kept = "[b](#below) [x](https://arxiv.org)\n```\n[r](results)\n```\n"
    assert turned(kept) == kept


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The whole site, every warning an error."""
    out = tmp_path_factory.mktemp("site")
    flags = ["-q", "-W", "--keep-going", "-d", out / "doctrees", "docs", out / "html"]
    done = subprocess.run([sys.executable, "-m", "sphinx", *flags], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return out / "html"


@pytest.fixture(scope="module")
def served(site):
    """Its address on a server of this machine."""
    handler = functools.partial(Quiet, directory=site)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@long
@needs_sphinx
def test_site_has_every_page_without_a_warning(site, committed):
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert pages <= {path.stem for path in site.glob("*.html")}
    front = (site / "index.html").read_text()
    for name in pages - {"index"}:  # from the front page, by the navigation
        assert re.search(rf'class="reference internal" href="{name}\.html"', front), name
    for question in ("Which method?", "How far to look ahead?", "Make it yours", "Reproduce"):
        assert f'<span class="caption-text">{question}</span>' in front
    assert "soft actor-critic, twin critics" in front  # the README's table
    assert "An algorithm in six steps" in (site / "contributing.html").read_text()
    equations = (site / "sac_mve.html").read_text()
    assert "y<sub>t+1</sub>" in equations and "γ<sup>H+1</sup>" in equations
    names = ("explorer-data.js", "explorer.js", "explorer.css", "uplot/uPlot.iife.min.js", "uplot/LICENSE")
    assert sum((site / "_static" / name).stat().st_size for name in names) < 3e6
    figures = {claim["figure"] for claim in committed["claims"] if "figure" in claim}
    assert figures and all((site / "figures" / name).exists() for name in figures)


# ---------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="no Playwright: pip install -e '.[docs]'")
    if CHROMIUM is None:
        pytest.skip("no browser: install chromium (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def address(committed, tmp_path_factory):
    path = tmp_path_factory.mktemp("alone") / "explorer.html"
    path.write_text(page(committed))
    return path.as_uri()


@pytest.fixture
def view(browser, address):
    """Opens the page at a selection; no error in the console, nothing asked of other machines."""
    opened, wrong, near = [], [], ("file:", "http://127.0.0.1:")

    def open_page(selection: str = "", url: str = address, width: int = 1280, **options):
        made = browser.new_page(viewport={"width": width, "height": 900}, **options)
        made.on("pageerror", lambda error: wrong.append(str(error)))
        made.on("request", lambda asked: None if asked.url.startswith(near) else wrong.append(asked.url))
        made.set_default_timeout(10_000)
        made.goto(url + selection)
        opened.append(made)
        return made

    yield open_page
    for made in opened:
        made.close()
    assert wrong == []


PENDULUM = "foundation/InvertedPendulum-v5"
CHOSEN = f"#view=curves&task=InvertedPendulum-v5&methods={PENDULUM}/sac/default,{PENDULUM}/sac_mve/horizon-3"
FIND = """colour => {  // the rightmost pixel of this colour
  const canvas = document.querySelector("#explorer canvas"), box = canvas.getBoundingClientRect();
  const {data} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  const wanted = [1, 3, 5].map(i => parseInt(colour.slice(i, i + 2), 16));
  for (let x = canvas.width - 1; x >= 0; x--) for (let y = 0; y < canvas.height; y++) {
    const at = 4 * (y * canvas.width + x);
    if (wanted.every((part, i) => Math.abs(data[at + i] - part) < 3) && data[at + 3] > 250)
      return [box.left + x * box.width / canvas.width, box.top + y * box.height / canvas.height];
  }
  return null;
}"""


def checked(made) -> list[str]:
    return made.eval_on_selector_all(".suite input:checked", "boxes => boxes.map(box => box.id)")


@long
def test_first_curve_is_there_within_a_second(view, committed):
    made = view()
    times = []
    for _ in range(3):
        made.reload()
        made.wait_for_selector("#explorer[data-drawn]")
        assert made.evaluate(FIND, committed["colours"][0])
        times.append(float(made.get_attribute("#explorer", "data-drawn")))
    assert min(times) < 1000, times  # the fastest: other programs may run


@long
def test_selection_changes_curves_and_tables(view, committed):
    made = view(CHOSEN)
    for number, key in enumerate((f"{PENDULUM}/sac/default", f"{PENDULUM}/sac_mve/horizon-3")):
        shown = committed["methods"][key]["measures"]["return_mean"]
        cells = made.locator("table").nth(0).locator("tbody tr").nth(number).locator("td").all_inner_texts()
        assert cells[0] == committed["methods"][key]["name"] and cells[2] == "5"
        assert cells[3:6] == [shown["final"]["text"], shown["final"]["bounds"], shown["area"]["text"]]
    second = committed["colours"][1]
    assert made.evaluate(FIND, second)
    made.locator(f"[id='{PENDULUM}/sac_mve/horizon-3']").uncheck()
    assert made.evaluate(FIND, second) is None
    assert made.locator("table").nth(0).locator("tbody tr").count() == 1
    made.get_by_label("Level").select_option(label="1000")
    reach = committed["methods"][f"{PENDULUM}/sac/default"]["measures"]["return_mean"]["reach"]
    levels = committed["tasks"]["InvertedPendulum-v5"]["levels"]["return_mean"]
    assert reach[levels.index("1000")]["text"] in made.locator("table").nth(1).inner_text()
    made.get_by_label("Task").select_option("TorqueBall-v0")
    assert checked(made) and all(key.split("/")[1] == "TorqueBall-v0" for key in checked(made))
    made.get_by_label("Measure").select_option(label="share of goals reached")
    assert made.locator("h2").nth(0).inner_text() == "Final share of goals reached"
    made.get_by_role("button", name="none").first.click()
    assert checked(made) == [] and made.get_by_text("Nothing is chosen").is_visible()


@long
def test_a_link_keeps_the_selection(view, committed):
    made = view(CHOSEN)
    made.locator(f"[id='{PENDULUM}/sac/default']").uncheck()
    assert made.evaluate(FIND, committed["colours"][1])  # the other one keeps its colour
    assert made.evaluate(FIND, committed["colours"][0]) is None
    made.locator("summary", has_text="Suite td3").click()
    made.locator("[id='td3/InvertedPendulum-v5/td3/default']").check()
    made.get_by_label("all single seeds").check()
    made.get_by_label("Level").select_option(label="700")
    link = made.get_by_role("link", name="Link to this selection").get_attribute("href")
    assert link == made.url
    again = view(url=link)
    look = (
        "() => [...document.querySelectorAll('#explorer :is(td, label) .swatch')].map(mark => mark.outerHTML)"
    )
    assert checked(again) == checked(made) and len(checked(again)) == 2
    assert again.evaluate(look) == made.evaluate(look)  # colours too
    assert again.get_by_label("all single seeds").is_checked()
    assert again.get_by_label("Level").locator("option:checked").inner_text() == "700"
    again.evaluate("location.hash = '#view=horizon&task=TorqueBall-v0'")
    assert again.get_by_label("Task").input_value() == "TorqueBall-v0"


@long
def test_pointing_at_a_curve_names_mean_interval_and_seeds(view, committed):
    made = view(CHOSEN)
    key = f"{PENDULUM}/sac_mve/horizon-3"
    shown = committed["methods"][key]["measures"]["return_mean"]
    x, y = made.evaluate(FIND, committed["colours"][1])
    made.mouse.move(x - 4, y)
    text = made.locator(".readout").inner_text()
    assert text.startswith("sac_mve, horizon 3, environment steps 10\u202f000: mean 987.5 [952.79, 1022.2]")
    assert shown["mean"][-1] == 987.5
    for seed, run in zip(shown["seeds"], shown["runs"], strict=True):
        assert f"seed {seed}: {run[-1]}" in text


@long
def test_claims_show_their_verdict_and_numbers(view, committed):
    made = view("#claim=R0")
    (claim,) = (claim for claim in committed["claims"] if claim["id"] == "R0")
    opened = made.locator("#claim-R0")
    assert opened.get_attribute("open") is not None and made.locator("details[open]").count() == 1
    assert opened.locator("summary .verdict").inner_text() == claim["verdict"] == "holds"
    for number, case in enumerate(claim["cases"]):
        block = opened.locator(".case").nth(number)
        assert case["text"] in block.inner_text()
        for row, term in enumerate(case["terms"]):
            cells = block.locator("tbody tr").nth(row).locator("td").all_inner_texts()
            assert cells[-1] == ", ".join(map(str, term["values"])) and len(term["values"]) == 5
    made.get_by_label("Verdict").select_option("does not hold")
    wrong = [claim["id"] for claim in committed["claims"] if claim["verdict"] == "does not hold"]
    assert made.locator("details summary strong").all_inner_texts() == wrong
    made.go_back() if made.url.count("verdict") == 0 else made.get_by_label("Verdict").select_option("")
    made.locator("#claim-R0").get_by_role("link", name="behind it").first.click()
    assert checked(made) == [term["method"] for term in reversed(claim["cases"][0]["terms"])]


@long
@pytest.mark.parametrize(
    "selection", [CHOSEN, "#view=horizon&task=InvertedPendulum-v5", "#claim=R0", "#claim=I1"]
)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_narrow_screens_need_no_sideways_scrolling(view, selection, scheme):
    made = view(selection, width=360, color_scheme=scheme)
    assert made.evaluate("document.documentElement.scrollWidth") <= 360
    outside = """() => [...document.querySelectorAll('#explorer :is(select, button, input, td, canvas, svg)')]
        .filter(part => part.getClientRects().length && part.getBoundingClientRect().right > 361).length"""
    assert made.evaluate(outside) == 0
    ink, paper = made.evaluate(
        "() => { const look = getComputedStyle(document.body); return [look.color, look.backgroundColor]"
        ".map(colour => colour.match(/\\d+/g).slice(0, 3).reduce((sum, part) => sum + Number(part), 0) / 3) }"
    )
    assert (ink > 180 and paper < 60) if scheme == "dark" else (ink < 80 and paper > 240)


@long
def test_everything_is_reached_by_keyboard(view, committed):
    made = view(CHOSEN)
    seen, ringed = [], True
    for _ in range(14):
        made.keyboard.press("Tab")
        name, outline = made.evaluate(
            "() => { const at = document.activeElement, style = getComputedStyle(at);"
            "return [at.id || at.className || at.textContent, style.outlineStyle + style.outlineWidth]; }"
        )
        seen.append(name)
        ringed &= outline == "solid3px"
        if name == "plot":
            for key in ("End", "ArrowDown"):
                made.keyboard.press(key)
            assert (
                made.locator(".readout")
                .inner_text()
                .startswith("sac_mve, horizon 3, environment steps 10\u202f000")
            )
            made.keyboard.press("ArrowLeft")
            steps = committed["methods"][f"{PENDULUM}/sac/default"]["measures"]["return_mean"]["steps"]
            assert f"steps {steps[-2]}: mean" in made.locator(".readout").inner_text()
    assert ringed and {"seeds", "plot"} <= set(seen)
    made.locator(f"[id='{PENDULUM}/sac_mve/horizon-1']").focus()
    made.keyboard.press("Space")
    assert f"{PENDULUM}/sac_mve/horizon-1" in checked(made)
    assert (
        made.evaluate("document.activeElement.id") == f"{PENDULUM}/sac_mve/horizon-1"
    )  # drawn anew, not lost
    made.get_by_label("Task").focus()
    made.keyboard.press("ArrowUp")
    assert made.evaluate("document.activeElement.tagName") == "SELECT"
    assert made.get_by_label("Task").input_value() == "Hopper-v5"


@long
@needs_sphinx
def test_from_the_front_page_to_which_horizon_and_how_sure(served, view):
    made = view(url=f"{served}/index.html")
    made.get_by_role("link", name="How far to look ahead?").first.click()
    made.get_by_label("Task").select_option("InvertedPendulum-v5")
    answer = made.locator(".answer").first
    assert re.match(r"Highest mean area at H = \d+: ", answer.inner_text())
    assert made.locator("table").first.locator("tbody tr").count() > 1
    made.set_viewport_size({"width": 360, "height": 800})
    assert made.evaluate("document.documentElement.scrollWidth") <= 360


@long
@needs_sphinx
def test_search_finds_pages(served, view):
    made = view(url=f"{served}/index.html")
    made.get_by_placeholder("Search").fill("trust-region")
    made.keyboard.press("Enter")
    found = made.locator("ul.search li", has_text="ME-TRPO")
    assert found.locator("a").first.get_attribute("href") == "me_trpo.html"
    assert "rust-region" in found.locator("p").first.inner_text()
