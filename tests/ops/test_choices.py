"""Test the choices on disk: storing, finding, merging with other processes, and files that cannot be used."""

import json

import pytest

from dave_fast.ops.choices import Choice, Choices, folder

FAST = Choice("fast", {"fast": 1.0, "slow": 2.0, "huge": None})


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new" / "choices.json"


def test_a_choice_is_found_by_another_process(path):
    Choices(path).keep("product", 100, FAST)
    again = Choices(path)
    assert again.find("product", 100) == "fast" and again.all() == {"product": {100: FAST}}
    assert again.find("other product", 100) is None


@pytest.mark.parametrize(("rows", "found"), [(67, "fast"), (150, "fast"), (66, None), (151, None), (1, None)])
def test_rows_that_are_near_take_the_same_choice(path, rows, found):
    Choices(path).keep("product", 100, FAST)
    assert Choices(path).find("product", rows) == found


def test_the_nearest_rows_decide(path):
    kept = Choices(path)
    kept.keep("product", 100, FAST)
    kept.keep("product", 130, Choice("wide", {"wide": 1.0}))
    assert [kept.find("product", rows) for rows in (110, 120)] == ["fast", "wide"]


def test_two_processes_keep_each_others_choices(path):
    first, second = Choices(path), Choices(path)
    assert not first.all() and not second.all()
    first.keep("product", 100, FAST)
    second.keep("attention", 7, FAST)
    assert set(Choices(path).all()) == {"product", "attention"} == set(second.all())


@pytest.mark.parametrize("text", ["{", "[]", '{"product": {"x": {}}}', '{"product": {"1": {"colour": 2}}}'])
def test_a_broken_file_is_reported_and_measured_anew(path, text, caplog):
    path.parent.mkdir()
    path.write_text(text)
    kept = Choices(path)
    assert kept.find("product", 100) is None and "cannot be read" in caplog.text
    kept.keep("product", 100, FAST)
    assert json.loads(path.read_text())["product"]["100"]["name"] == "fast"


def test_a_folder_that_cannot_be_written_is_reported(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    kept = Choices(tmp_path / "file" / "choices.json")
    kept.keep("product", 100, FAST)
    assert kept.find("product", 100) == "fast" and "this process alone" in caplog.text


def test_names_of_gpus_make_file_names_and_the_folder_is_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("DAVE_FAST_CACHE_DIR", str(tmp_path))
    found = Choices.of("NVIDIA H100 80GB HBM3/x").path
    assert found.parent == tmp_path and found.name.startswith("choices-NVIDIA-H100-80GB-HBM3-x-torch-2")
    monkeypatch.delenv("DAVE_FAST_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert folder() == tmp_path / "xdg" / "dave-fast"
