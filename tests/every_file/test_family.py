"""The rules that make algos/ one family: same name same code, files alone and complete, no dead options."""

import ast
import dataclasses
import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
import typing

import pytest
import torch

from tests import family
from tests.conftest import (
    ALGOS,
    EPISODIC,
    LOOPS,
    PARENTS,
    ROOT,
    STEPWISE,
    TRIALS,
    by_hand,
    differing,
    evaluations,
    load,
    long,
    run,
    scalars,
    sizes,
    tiny,
)
from tests.sabotage import SABOTAGES

PATHS = [ROOT / "algos" / f"{name}.py" for name in ALGOS]
STYLE_FLAGS = """env_id seed total_timesteps learning_starts batch_size buffer_size gamma tau eval_every
    eval_episodes checkpoint_every runs_dir resume device cuda_graphs num_threads capture_video"""


def test_same_name_same_code():
    assert family.differences(PATHS) == []


def test_what_is_read_and_what_is_not_are_short_enough():
    assert [line for path in PATHS for line in family.lengths(path)] == []


def test_family_tool_knows_what_stands_below_the_header(tmp_path):
    copies = [tmp_path / name for name in ("sac.py", "td3.py")]
    for copy in copies:
        shutil.copy(ROOT / "algos" / copy.name, copy)
    original = copies[1].read_text()
    copies[1].write_text(original.replace("os.fsync(file.fileno())", "pass"))
    assert [line.split(":")[0] for line in family.differences(copies)] == ["below"]
    assert family.sync(copies[0], "below", copies) == [copies[1].name]
    assert copies[1].read_text() == original
    copies[1].write_text(
        original.replace(family.HEADER, f"x = 1\n{family.HEADER}".replace("x", "\n" * 60 + "x"))
    )
    assert "td3.py: lines above the header" in family.lengths(copies[1])[0]


def test_family_tool_finds_and_mends_a_difference(tmp_path):
    paths = [ROOT / "algos" / name for name in ("sac.py", "sac_mve.py")]
    copies = [tmp_path / path.name for path in paths]
    for path, copy in zip(paths, copies, strict=True):
        shutil.copy(path, copy)
    original = copies[1].read_text()
    copies[1].write_text(
        original.replace("(gaussian - 2 *", "(gaussian + 2 *").replace("log_std.clamp(", "log_std.clip(")
    )
    names = [line.split(":")[0] for line in family.differences(copies)]
    assert names == ["Actor", "squashed_log_prob"]
    assert family.sync(copies[0], "Actor", copies) == [copies[1].name]
    assert family.sync(copies[0], "squashed_log_prob", copies) == [copies[1].name]
    assert copies[1].read_text() == original


def test_every_sabotage_has_something_to_break():
    """python tests/sabotage.py takes long and is not part of CI; that its texts still exist is."""
    texts = [path.read_text() for path in PATHS]
    gone = [name for name, old, *_ in SABOTAGES if not any(old in text for text in texts)]
    assert SABOTAGES and gone == []
    assert all(len([*(ROOT / "tests").glob(f"*/test_{tests}.py")]) == 1 for *_, tests in SABOTAGES)


def test_shared_arguments_agree():
    """A flag is one thing: of one type everywhere; what belongs to the loop has one default as well.

    Learners by trials have defaults of their own, in TrialRun, which is one text in all of them.
    """
    loop, seen = {field.name for field in dataclasses.fields(load("sac").Run)}, {}
    for name in ALGOS:
        for field in dataclasses.fields(load(name).Args):
            own = field.name == "preset"  # each file has presets of its own
            assert own or seen.setdefault(field.name, field.type) == field.type, field.name
            if name in STEPWISE and name not in TRIALS and field.name in loop | {"gamma"}:
                assert field.default == seen.setdefault((field.name,), field.default), field.name


WITHOUT = {"pilco": {"batch_size", "tau"}}  # it learns from all transitions at once and has no slow copies
WITHOUT |= {n: {"gamma", "tau"} for n in ("pets", "poplin")}  # sums of H rewards; no slow copies
WITHOUT |= {"me_trpo": {"batch_size", "tau"}}  # no critic; the model's batch is --model-batch


def test_every_file_has_the_flags_of_the_style_page(algo):
    names = {field.name for field in dataclasses.fields(load(algo).Args)}
    assert set(STYLE_FLAGS.split()) - WITHOUT.get(algo, set()) <= names
    assert not WITHOUT.get(algo, set()) & names


def test_every_argument_is_one_line_with_its_meaning_and_real_type(algo):
    """The default is an instance of the annotated type (no int = 5e3); the comment behind it is the help."""
    module, source = load(algo), (ROOT / "algos" / f"{algo}.py").read_text()
    lines = source.splitlines()
    for field in dataclasses.fields(module.Args):
        annotation = typing.get_args(field.type)[0] if hasattr(field.type, "__metadata__") else field.type
        if typing.get_origin(annotation) is typing.Literal:
            assert field.default in typing.get_args(annotation)
        else:
            assert isinstance(field.default, annotation), field.name
            assert annotation in (str, bool) or hasattr(field.type, "__metadata__"), f"{field.name}: no range"
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and node.name in {base.__name__ for base in module.Args.__bases__}:
            for field in (n for n in node.body if isinstance(n, ast.AnnAssign)):
                text = lines[field.lineno - 1].partition("  # ")[2]
                assert field.lineno == field.end_lineno and len(text) > 9, f"{node.name}.{field.target.id}"


def test_no_file_imports_a_sibling(algo):
    own = {*ALGOS, "algos", "tests", "experiments"}
    for node in ast.walk(ast.parse((ROOT / "algos" / f"{algo}.py").read_text())):
        modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not {module.split(".")[0] for module in modules} & own


LEARNED = {"pilco": {"actor", "processes"}, "pets": {"model"}, "poplin": {"actor", "model"}}  # no critic
LEARNED |= {"me_trpo": {"actor", "model"}}
# Logged at every point once learning has begun, else losses/qf_loss.
LOSS = {"pilco": "losses/predicted_cost", "pets": "losses/model_loss", "poplin": "losses/model_loss"}
LOSS |= {"me_trpo": "losses/surrogate"}


@pytest.mark.parametrize("name", [n if n in LOOPS else pytest.param(n, marks=long) for n in ALGOS])
def test_file_runs_alone_in_an_empty_folder(name, tmp_path):
    """Copied by itself, 200 steps with real updates on a real task."""
    shutil.copy(ROOT / "algos" / f"{name}.py", tmp_path)
    task = "TorqueBall-v0" if name in EPISODIC else "InvertedPendulum-v5"
    flags = tiny(name, "--env-id", task, "--total-timesteps", 200)
    environment = {**os.environ, "PYTHONPATH": ""}
    subprocess.run(
        [sys.executable, f"{name}.py", *flags], cwd=tmp_path, env=environment, check=True, timeout=300
    )
    (folder,) = (tmp_path / "runs").iterdir()
    first, last = (
        torch.load(folder / name, weights_only=True) for name in ("checkpoint.previous.pt", "final.pt")
    )
    assert last["step"] == 200
    networks = [n for n, part in last["agent"].items() if isinstance(part, dict) and "state" not in part]
    assert LEARNED.get(name, {"actor", "critic", "critic_target"}) <= set(networks)
    for part in networks:
        a, b = (list(state["agent"][part].values()) for state in (first, last))
        assert all(not torch.equal(x, y) for x, y in zip(a, b, strict=True) if x.numel() > 8), part


def test_commands_of_the_docstring_are_accepted(algo):
    """As they stand, with nothing made smaller; a run to resume is looked for."""
    lines = re.findall(rf"^    python algos/{algo}\.py.*", load(algo).__doc__, re.M)
    commands = [shlex.split(line, comments=True)[2:] for line in lines]
    assert len(commands) >= 3 and commands[-1] == ["--resume", "runs/<run>"]
    for command in commands[:-1]:
        load(algo).parse(command)


def test_equations_are_tagged(algo):
    """Each numbered equation of the docstring has a line of code that says it implements it."""
    source = (ROOT / "algos" / f"{algo}.py").read_text()
    docstring = ast.get_docstring(ast.parse(source))
    numbers = set(re.findall(r"\((\d[a-z]?)\)", docstring))
    code = source.replace(docstring, "")
    tags = set(re.findall(r"\d[a-z]?", " ".join(re.findall(r"# (\([\d a-z,()]+\))", code))))
    assert numbers == tags and "1" in {n[0] for n in numbers}


PLAIN = {"sac_svg_h": ["--no-normalize"]}  # what else makes a child its parent at H = 0
CHILDREN = [name for name in sorted(PARENTS) if "horizon" in load(name).Args.__dataclass_fields__]


@pytest.mark.parametrize("child", CHILDREN)
def test_horizon_0_is_the_parent_bit_for_bit(child, tmp_path):
    """--horizon 0 and its parent: the same evaluations, weights, optimisers, replay and generators."""
    parent = run(PARENTS[child], tmp_path / "parent")
    same = run(child, tmp_path / "same", "--horizon", 0, *PLAIN.get(child, []))
    assert evaluations(parent) == evaluations(same)
    only_mine = [f"/args/{f.name}" for f in dataclasses.fields(load(child).Args.__bases__[-1])]
    assert differing(parent / "final.pt", same / "final.pt", "/algo", "/normalizer.", *only_mine) == []
    other = run(child, tmp_path / "other", "--horizon", 1, *PLAIN.get(child, []))  # the comparison can fail
    found = differing(parent / "final.pt", other / "final.pt")
    assert any("/agent/critic/" in name for name in found) and any("/agent/actor/" in name for name in found)


def test_every_file_that_looks_ahead_is_compared():
    assert [name for name in sorted(PARENTS) if name != "sac_vaml"] == CHILDREN  # which has no horizon


NEEDS = {"--no-actor-expansion": ("--critic-expansion", "tdk")}  # something must look ahead
NEEDS |= {("poplin", "--least-variance"): ("--search", "actions")}
NEEDS |= {("svg", f"--{name}"): ("--soft",) for name in ("alpha-lr", "init-alpha", "target-entropy")}
NEEDS |= {"vaml-unbiased": ("--samples", "2"), ("steve", "--tdk"): ("--reduction", "last")}


def choices(name: str) -> list[tuple[str, ...]]:
    """Every boolean switched, every choice but what all tiny runs take; cuda only where there is a GPU."""
    found, usual = [], sizes(name)
    for field in dataclasses.fields(load(name).Args):
        flag = field.name.replace("_", "-")
        if field.type is bool:
            flag = f"--no-{flag}" if field.default else f"--{flag}"
            found.append((flag, *NEEDS.get((name, flag), NEEDS.get(flag, ()))))
        elif typing.get_origin(field.type) is typing.Literal:
            values = typing.get_args(field.type)
            others = [value for value in values if value != usual.get(flag, field.default)]
            found += [(f"--{flag}", value, *NEEDS.get(value, ())) for value in others]
    if name not in LOOPS:  # what the loop does with these is one text
        of_the_loop = ("--device", "--capture-video", "--no-cuda-graphs")
        found = [flags for flags in found if flags[0] not in of_the_loop]
    return [flags for flags in found if "cuda" not in flags or torch.cuda.is_available()]


@functools.cache
def mujoco_renders() -> bool:
    """Asked in a process of its own: without OpenGL MuJoCo's second attempt in one process aborts it."""
    probe = 'import mujoco; mujoco.Renderer(mujoco.MjModel.from_xml_string("<mujoco/>"), 8, 8).close()'
    return subprocess.run([sys.executable, "-c", probe], capture_output=True).returncode == 0


def test_choices_are_found():
    assert {("--device", "auto"), ("--capture-video",), ("--tdk",)} <= set(choices("sac_mve"))


@pytest.mark.parametrize(("name", "flags"), [(name, flags) for name in ALGOS for flags in choices(name)])
def test_every_boolean_and_choice_reaches_an_update(name, flags, tmp_path):
    if flags[0] == "--capture-video":
        pytest.importorskip("moviepy")
        if not mujoco_renders():
            pytest.skip("no OpenGL here: set MUJOCO_GL=osmesa or egl")
        flags += () if name in EPISODIC else ("--env-id", "InvertedPendulum-v5")
    steps = 200 if name in EPISODIC else 140  # a goal task's cycle is 100 steps
    folder = run(name, tmp_path, *flags, "--total-timesteps", steps, "--eval-episodes", 1)
    loss = LOSS.get(name, "losses/qf_loss")
    assert len(scalars(folder)[loss]) == (2 if name in EPISODIC else 4)
    if flags[0] == "--capture-video":
        videos = sorted(path.parent.name for path in (folder / "videos").glob("*/*.mp4"))
        assert videos == ["step-0", "step-100", f"step-{steps}"]


NUMBERS = [
    ("--num-particles", 2),
    ("--members", 2),
    ("--model-layers", 1),
    ("--model-updates", 2),
    ("--horizon", 4),
]
NUMBERS += [
    ("--trace-lambda", 0.5),
    ("--model-lr", 1e-2),
    ("--model-warm-up", 9),
    ("--normalize-every", 20),
    ("--model-hidden", 12),
]
NUMBERS += [("--expansion-starts", 80), ("--final-entropy", 1.0), ("--hidden-layers", 3), ("--gru-layers", 2)]
NUMBERS += [("--encoder-layers", 0), ("--decoder-layers", 1), ("--sequence-batch", 12)]
NUMBERS += [("--dynamics-updates", 2), ("--final-entropy", 1.0, "--entropy-decay", 3.0)]
NUMBERS += [("--schedule", "poplin/Swimmer-v0"), ("--exploration-noise", 0.3), ("--policy-noise", 0.9)]
NUMBERS += [("--noise-clip", 0.01), ("--policy-delay", 3), ("--updates-per-step", 2), ("--layer-norm",)]
NUMBERS += [
    ("--exploration", "parameter"),
    ("--terminations",),
    ("--tdk",),
    ("--no-tdk",),
    ("--model-batch", 12),
]
NUMBERS += [("--model-loss", loss) for loss in ("mle", "vaml", "vagram")]
NUMBERS += [("--mle-coefficient", 0.5), ("--mle-decay", 20), ("--samples", 4), ("--critic-actions", "policy")]
NUMBERS += [("--model-interval", 10), ("--fit-steps", 2), ("--fit-epochs", 1), ("--patience", 1)]
NUMBERS += [("--weight-decay", 0.5), ("--model-loss", "vaml-unbiased", "--samples", 2)]
NUMBERS += [("--grad-weight", 0), ("--td-weight", 0.2), ("--gradient-clip", 1e-4), ("--real-ratio", 0.5)]
NUMBERS += [("--real-ratio", 1), ("--rollout-batch", 40), ("--epoch-length", 20), ("--growth-starts", 3)]
NUMBERS += [("--growth-ends", 9), ("--rollout-length-max", 20)]
NUMBERS += [("--rollout-length", 2, "--rollout-length-max", 2), ("--retain-epochs", 3), ("--elites", 1)]
NUMBERS += [("--refit-steps", 1), ("--target-interval", 7), ("--explore-chance", 0.9), ("--mean-penalty", 1)]
NUMBERS += [("--reduction", kind) for kind in ("mean", "last", "td-lambda", "covariance")]
NUMBERS += [("--reduction", "td-lambda", "--td-lambda", 0.9), ("--reduction", "last", "--tdk")]
NUMBERS += [("--critics", 2), ("--reward-members", 2)]
NUMBERS += [("--actor-horizon", 2, "--actor-batch", 9)]
NUMBERS += [("--alpha-lr", 1e-2), ("--init-alpha", 0.1), ("--target-entropy", 1.0)]
NUMBERS += [("--policy", "rbf", "--centres", 5), ("--squash", "gsat"), ("--points", 10), ("--trial-steps", 5)]
NUMBERS += [("--fit-evaluations", 2), ("--plan-evaluations", 2), ("--angles", "[0]"), ("--start-mean", 1)]
NUMBERS += [("--start-std", 1), ("--cost-target", 1), ("--cost-weights", 3), ("--cost-width", 2)]
NUMBERS += [("--candidates", 5), ("--iterations", 1), ("--particles", 8), ("--smoothing", 0.5)]
NUMBERS += [("--least-variance", 0.3), ("--model-decays", "[1, 1]")]
NUMBERS += [("--variance", 0.2), ("--policy-epochs", 1), ("--policy-batch", 5)]
NUMBERS += [("--collect-steps", 40), ("--gae-lambda", 0.5), ("--imagined-steps", 40), ("--max-kl", 0.1)]
NUMBERS += [("--cg-steps", 1), ("--damping", 1), ("--fisher-rows", 9), ("--check-every", 4), ("--starts", 5)]
NUMBERS += [("--check-starts", 2), ("--worse-share", 0), ("--policy-patience", 2), ("--held-out", 0.5)]
NUMBERS += [("--action-noise", 3), ("--parameter-noise", 3), ("--loss-units", "raw"), ("--error-every", 4)]
NUMBERS += [("--draw-member", "episode"), ("--fresh-every", 5)]
NUMBERS += [("--value-loss", 1.0), ("--entropy", "all"), ("--mask", "released"), ("--model-noise", "none")]
NUMBERS += [("--model-noise", "variance"), ("--terminal-actions", 3), ("--actor-starts", "real")]
NUMBERS += [("--actor-clip", 1e-3)]
NUMBERS += [("--is-clip", 0), ("--kl", 1.0), ("--gradient-norm", 1e-3), ("--init-std", 0.2)]
NUMBERS += [("--sequence-length", 8), ("--learn-every", 4), ("--pretrain", 1), ("--deter", 10)]
NUMBERS += [("--stoch", 3), ("--first-std", 0.3)]
NUMBERS += [("--latent-std", "softplus"), ("--free-nats", 3), ("--kl-floor", "mean"), ("--prior-weight", 2)]
NUMBERS += [("--posterior-weight", 2), ("--return-lambda", 0.5), ("--actor-gradient", "reinforce")]
NUMBERS += [("--entropy-weight", 0.1), ("--min-std", 0.5), ("--critic-loss", "two-hot"), ("--no-cut",)]
NUMBERS += [("--no-symlog",)]
SHARED = [("--gamma", 0.5), ("--tau", 0.5), ("--actor-lr", 1e-2), ("--critic-lr", 1e-2)]
SHARED += [("--hidden", 12), ("--batch-size", 12), ("--seed", 5)]
SHARED += [("--learning-starts", 50), ("--buffer-size", 70)]


@pytest.mark.parametrize("name", [n if n in LOOPS else pytest.param(n, marks=by_hand) for n in STEPWISE])
def test_every_number_changes_what_is_learned(name, tmp_path):
    """No option that does nothing: each setting gives other weights than the defaults."""
    fields = {field.name.replace("_", "-"): field.type for field in dataclasses.fields(load(name).Args)}
    flags = [flag for flag in SHARED if flag[0][2:] in fields]
    for flag in NUMBERS:
        kind = fields.get(re.sub("^--(no-)?", "", flag[0]))
        if kind is not None and (kind is bool) == (len(flag) == 1):
            flags.append(flag + NEEDS.get((name, flag[0]), ()))
    same = ("--tdk",) if getattr(load(name).Args, "tdk", False) else ("--no-tdk",)  # is the default
    flags = [flag for flag in flags if flag != same]
    later = {"mbpo": 200, "maac": 200}  # longer rollouts
    later |= {"steve": 125, "me_trpo": 125}  # slow critics, a second outer loop
    steps = later.get(name, 90)
    short = ("--total-timesteps", steps, "--eval-every", steps, "--eval-episodes", 1, "--log-every", steps)
    short += ("--diagnose-every", steps) if "diagnose-every" in fields else ()
    base = torch.load(run(name, tmp_path / "base", *short) / "final.pt", weights_only=True)["agent"]
    for flag in flags:
        folder = run(name, tmp_path / "other", *short, *flag)
        other = torch.load(folder / "final.pt", weights_only=True)["agent"]
        part = "actor" if "actor" in base else "model"
        pairs = zip(base[part].values(), other[part].values(), strict=True)
        assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in pairs), flag


NOT_LEARNED = {  # what a run leaves behind, where, and how fast it is; presets are other numbers
    *"env-id env-kwargs total-timesteps eval-every eval-episodes log-every checkpoint-every".split(),
    *"runs-dir resume device cuda-graphs num-threads capture-video diagnose-every preset".split(),
}
BY_PAIRS = {"entropy-decay", "actor-batch", "centres", "td-lambda"}  # of NUMBERS, beside what needs them
BY_PAIRS |= {"policy-episodes"}  # of poplin.py: how often the policy alone is judged
TASK_OF = {  # where there are formulas that --rewards, --outcomes and --termination-rule are to leave
    "ddpg_mve": "experiments.tasks:mve/HalfCheetah-v0",
    "sac_vaml": "InvertedPendulum-v5",
    **dict.fromkeys(("maac", "mbpo", "me_trpo", "pets", "poplin"), "InvertedPendulum-v5"),
}
SWITCH_NEEDS = {  # a plan in which something ends; returns whose spread exceeds 1
    ("poplin", "termination-rule"): ("--horizon", 20),
    ("dreamer", "normalize-returns"): ("--env-id", "Pendulum-v1", "--learn-every", 1, "--model-lr", 0.03),
}


def switches(name: str) -> list[tuple[str, tuple[str, ...]]]:
    """(field, flags) of every boolean and choice that NUMBERS do not try, away from its default."""
    tried = {re.sub("^--(no-)?", "", flag[0]) for flag in NUMBERS + SHARED}
    kinds = {field.name.replace("_", "-"): field for field in dataclasses.fields(load(name).Args)}
    found = []
    for flags in choices(name):
        field = flags[0].removeprefix("--")
        field = field if field in kinds else field.removeprefix("no-")
        default = kinds[field].default
        if field not in tried | NOT_LEARNED and (default is True or default is False or flags[1] != default):
            found.append((field, flags))
    return found


@pytest.mark.parametrize("name", STEPWISE)
def test_every_setting_is_tried(name):
    tried = {re.sub("^--(no-)?", "", flag[0]) for flag in NUMBERS + SHARED}
    every = {field.name.replace("_", "-") for field in dataclasses.fields(load(name).Args)}
    assert every <= tried | NOT_LEARNED | BY_PAIRS | {field for field, _ in switches(name)}


@long
@pytest.mark.parametrize("name", [name for name in STEPWISE if switches(name)])
def test_every_switch_changes_what_is_learned(name, tmp_path):
    """No choice that does nothing: each gives other weights than the default."""
    short = ["--total-timesteps", 125, "--eval-every", 125, "--eval-episodes", 1, "--log-every", 125]
    short += ["--env-id", TASK_OF[name]] if name in TASK_OF else []
    short += ["--diagnose-every", 125] if hasattr(load(name).Args, "diagnose_every") else []
    weights = lambda folder: torch.load(folder / "final.pt", weights_only=True)["agent"]
    bases: dict[tuple, dict] = {}
    for field, flags in switches(name):
        more = SWITCH_NEEDS.get((name, field), ())
        if more not in bases:
            bases[more] = weights(run(name, tmp_path / "base", *short, *more))
        base, other = bases[more], weights(run(name, tmp_path / "other", *short, *more, *flags))
        part = "actor" if "actor" in base else "model"
        pairs = zip(base[part].values(), other[part].values(), strict=True)
        assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in pairs), flags
