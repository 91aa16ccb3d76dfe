"""tables.py: a table grows by being written whole; foreign ones and places that cannot be are left alone."""

from pathlib import Path

import pytest

from experiments.report.tables import read_table, write_table


def test_a_table_grows(tmp_path):
    path = tmp_path / "new" / "a.csv"
    assert read_table(path, ["a", "b"]) == []
    write_table(path, ["a", "b"], [{"a": 1, "b": 2.5}])
    rows = read_table(path, ["a", "b"])
    assert rows == [{"a": "1", "b": "2.5"}]
    write_table(path, ["a", "b"], [*rows, {"a": 3, "b": "x"}])
    assert path.read_text() == "a,b\n1,2.5\n3,x\n"
    assert [file.name for file in path.parent.iterdir()] == ["a.csv"]


def test_what_is_not_ours_is_left_alone(tmp_path):
    (tmp_path / "a.csv").write_text("b,a\n")
    with pytest.raises(ValueError, match=r"--trials .*a.csv: must be a table of this script, or not exist"):
        read_table(tmp_path / "a.csv", ["a", "b"], "--trials")
    with pytest.raises(ValueError):
        write_table(tmp_path / "a.csv", ["a"], [{"a": 1, "z": 2}])
    assert (tmp_path / "a.csv").read_text() == "b,a\n"


@pytest.mark.skipif(not Path("/dev/null").exists(), reason="needs /dev/null")
def test_a_device_is_written_to(tmp_path):
    """And not replaced by a file."""
    (tmp_path / "a.csv").symlink_to("/dev/null")
    write_table(tmp_path / "a.csv", ["a"], [{"a": 1}])
    assert (tmp_path / "a.csv").is_symlink() and Path("/dev/null").is_char_device()
