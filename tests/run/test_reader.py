"""Tests of what the rows of a run say of themselves."""

from dave_fast.run.reader import open_maps
from tests.run.made import make_run, scenes


def test_maps_say_what_they_are_in_two_lines(tmp_path):
    paths = scenes(tmp_path / "photos", 2)
    rows = [{"id": path.name, "uri": str(path)} for path in paths]
    run = make_run(tmp_path / "run", [*rows, {"id": "bad", "uri": "bad.png", "error": "cannot read bad.png"}], depth=6)
    said = repr(open_maps(run))
    assert said.startswith("Maps of 3 records, 1 of them with errors, by demo, at block 6\n") and said.count("\n") == 1
    assert repr(open_maps(run).filter(status="ok")).startswith("Maps of 2 records, by demo, at block 6\n")
