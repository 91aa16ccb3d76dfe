"""What the command lines of all tools share."""

import os
import sys

import pytest

from experiments.report.commands import Parser, at_least, check_output, needs, numbers


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--many", "a"], "--many a: must be a whole number, at least 1"),
        (["--many", "0"], "--many 0: must be a whole number, at least 1"),
        (["--many"], "--many: must be followed by a value"),
        (["--part", "nan"], "--part nan: must be a number, at least 0.5"),
        (["--part", "inf"], "--part inf: must be a number, at least 0.5"),
        (["--list", "1,b"], "--list 1,b: must be whole numbers with commas between"),
        (["--what"], "unrecognized arguments: --what"),
    ],
)
def test_a_mistake_is_one_line(words, said, capsys):
    parser = Parser("about")
    parser.add_argument("--many", type=at_least(1))
    parser.add_argument("--part", type=at_least(0.5, float))
    parser.add_argument("--list", type=numbers)
    with pytest.raises(SystemExit) as end:
        parser.parse_args(words)
    assert end.value.code == 2 and capsys.readouterr().err == f"error: {said}\n"


def test_numbers_are_read_as_the_algorithms_read_them():
    assert numbers("3,1e1,1_000,3") == [3, 10, 1000] and numbers("") == [] and at_least(1)("1e3") == 1000


def test_outputs_are_looked_at_and_not_touched(tmp_path):
    """A folder, a place below a file, a picture of no known kind; what is left out or new is well."""
    (tmp_path / "file").write_text("x")
    check_output(None, "--csv")
    for path in (tmp_path / "new" / "er" / "a.csv", tmp_path / "file"):
        check_output(path, "--csv")
    bad = [(tmp_path, "not a folder"), (tmp_path / "file" / "b" / "a.csv", "file is in the way")]
    for path, text in bad:
        with pytest.raises(ValueError, match=f"--csv {path}: must be a file that can be written.*{text}"):
            check_output(path, "--csv")
    with pytest.raises(ValueError, match=r"--figure a\.xyz: must end in \.png, \.pdf or \.svg"):
        check_output(tmp_path.__class__("a.xyz"), "--figure")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="to root all is open")
def test_a_folder_that_is_closed(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="must be a file that can be written"):
        check_output(tmp_path / "a.csv", "--csv")


def test_without_a_library(monkeypatch, tmp_path):
    needs("json")
    with pytest.raises(ValueError, match=r"no_such_library: must be installed: pip install -e '\.\[bench\]'"):
        needs("json", "no_such_library")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="must be left out without matplotlib"):
        check_output(tmp_path / "a.png", "--figure")
