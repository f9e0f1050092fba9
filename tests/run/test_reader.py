"""Tests of what the rows of a run say of themselves."""

import pytest

from dave_fast.errors import ImageError, InputError
from dave_fast.run.reader import open_maps
from tests.run.made import make_run, scenes


def test_maps_say_what_they_are_in_two_lines(tmp_path):
    paths = scenes(tmp_path / "photos", 2)
    rows = [{"id": path.name, "uri": str(path)} for path in paths]
    run = make_run(tmp_path / "run", [*rows, {"id": "bad", "uri": "bad.png", "error": "cannot read bad.png"}], depth=6)
    said = repr(open_maps(run))
    assert said.startswith("Maps of 3 records, 1 of them with errors, by demo, at block 6\n") and said.count("\n") == 1
    assert repr(open_maps(run).filter(status="ok")).startswith("Maps of 2 records, by demo, at block 6\n")


def test_overlay_of_a_record_has_its_photographs_size(tmp_path):
    (path,) = scenes(tmp_path / "photos", 1)
    rows = [{"id": "one", "uri": str(path)}, {"id": "bad", "uri": "bad.png", "error": "cannot read bad.png"}]
    maps = open_maps(make_run(tmp_path / "run", rows))
    assert maps.overlay("one").size == maps.overlay(0, colormap="viridis").size == (48, 32)
    with pytest.raises(InputError, match="the record bad has no map: cannot read"):
        maps.overlay("bad")
    path.unlink()
    with pytest.raises(ImageError, match="cannot read"):
        maps.overlay("one")
    with pytest.raises(KeyError):
        maps.overlay("none")
    with pytest.raises(IndexError):
        maps.overlay(9)
    for wrong in (["one"], 0.7, None):
        with pytest.raises(TypeError):
            maps.overlay(wrong)
