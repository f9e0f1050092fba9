"""The measurement on photographs, whole and at small scale: a tiny model, drawn photographs, both forms of boxes."""

import argparse
import json
import sys

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

from dave_fast.errors import InputError
from dave_fast.evaluate import rows
from dave_fast.evaluate.twin import NotTakenError
from scripts import quality_photographs as script
from scripts import quality_section as page
from tests.evaluate.test_items import XML
from tests.tiny import random_head_vit

NAMES = ("ladybug", "tiger", "ostrich", "monarch", "raccoon")
FOLDERS = ("n02165456", "n02129604", "ostrich", "monarch")
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}


@pytest.fixture
def given(tmp_path):
    """A folder of a timm model, twelve raccoons with boxes, and four photographs of each of four other classes."""
    model = random_head_vit(num_classes=5)
    (tmp_path / "model").mkdir()
    save_file(model.state_dict(), tmp_path / "model" / "model.safetensors", {"format": "pt"})
    config = {"input_size": [3, 32, 32], "crop_pct": 1.0, "label_names": NAMES, "num_classes": 5}
    config |= {"first_conv": "patch_embed.proj", "classifier": "head"}
    whole = {"architecture": "vit_tiny_patch16_224", "num_classes": 5, "model_args": TINY, "pretrained_cfg": config}
    (tmp_path / "model" / "config.json").write_text(json.dumps(whole))
    generator = np.random.default_rng(0)
    (tmp_path / "xml").mkdir()
    listed = []
    for folder in ("boxes/raccoon", *(f"classes/{name}" for name in FOLDERS)):
        (tmp_path / folder).mkdir(parents=True)
        for number in range(8 if folder.startswith("boxes") else 4):
            name = f"{folder.rpartition('/')[2]}-{number}"
            pixels = generator.integers(0, 250, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / folder / f"{name}.png")
            if folder.startswith("boxes"):
                listed.append({"file": f"raccoon/{name}.png", "boxes": [[8, 4, 24, 20]]})
                (tmp_path / "xml" / f"{name}.xml").write_text(XML.format(name="raccoon"))
    (tmp_path / "boxes.json").write_text(json.dumps(listed))
    return tmp_path


def run(monkeypatch, given, step, *more, boxes="boxes.json"):
    folders = {"model": given / "model", "boxes": given / boxes, "photographs": given / "boxes"}
    folders |= {"classes": given / "classes", "out": given / "out"}
    options = [part for name, path in folders.items() for part in (f"--{name}", str(path))]
    monkeypatch.setattr(sys, "argv", ["quality_photographs.py", step, *more, *options])
    script.main()


@pytest.fixture
def small(monkeypatch, given):
    """The script's settings at small scale, with the frozen gradient in the place of AttnLRP."""
    for name, value in {
        "ALPHAS": (0.1, 0.4),
        "GAMMAS": ((0.25, 0.05),),
        "STANDARD": 4,
        "OWN_STEPS": 2,
    }.items():
        monkeypatch.setattr(script, name, value)
    monkeypatch.setattr(script, "CHOICES", {"photographs": (2, 1, "EnergyPG", 4), "mosaics": (1, 2, "GridPG 2x2", 2)})
    parts = {
        "photographs": script.Part("photographs", 3, dict.fromkeys(("class token", "patch average"), (32,))),
        "mosaics-2x2": script.Part("mosaics", 2, {"class token": (2,)}, grid=2),
        "behaviour": script.Part("behaviour", 1, {"class token": (2,)}, full=False),
        "randomised": script.Part("randomised", 1, {"class token": (2,)}, full=False),
    }
    monkeypatch.setattr(script, "PARTS", parts)
    monkeypatch.setattr(script, "SETTINGS", given / "settings.json")
    monkeypatch.setattr(page, "RESULTS", given / "results.json")
    monkeypatch.setattr(page, "PAGE", given / "quality.md")
    (given / "quality.md").write_text(f"# Quality\n\nOf digits.\n\n{page.HEADING}\n\nan earlier one\n")
    monkeypatch.setattr(
        rows,
        "attnlrp_with",
        lambda model, gammas, seed: rows.single(model, "frozen gradient", SETUP, seed, row="AttnLRP"),
    )


SETUP = script.MethodSettings(2, {"noise_alpha": 0.0})


def scores_of(given, part, head, *, chosen_on=False):
    return script.scores_of(argparse.Namespace(out=given / "out", chosen_on=chosen_on, limit=None), part, head)


@pytest.mark.slow
def test_it_is_chosen_on_one_half_measured_on_the_other_resumed_and_written(monkeypatch, given, small, capsys):
    run(monkeypatch, given, "choose")
    chosen = json.loads((given / "settings.json").read_text())
    assert chosen["class token"]["mosaics"]["noise_alpha"] in script.ALPHAS
    assert set(chosen["passes"]) == set(script.PATHS)
    run(monkeypatch, given, "measure")
    path = scores_of(given, "photographs", "patch average")
    lines = script.whole_lines(path)
    # of each folder's files the second, fourth, …
    assert {one["item"] for one in lines} == {"raccoon-1.png", "raccoon-3.png", "raccoon-5.png"}
    assert set(lines[0]["scores"]) == {"DAVE, S = 32", "DAVE, S = 32, paper's"}
    # what is there is kept, and a line cut off is measured again, the same
    path.write_text(path.read_text()[:-9])
    capsys.readouterr()
    run(monkeypatch, given, "measure", "photographs", boxes="xml")
    assert capsys.readouterr().out.count("\n") == 1
    assert script.whole_lines(path)[-1] == lines[-1]
    run(monkeypatch, given, "write")
    text = (given / "quality.md").read_text()
    assert text.startswith("# Quality\n\nOf digits.\n")
    assert text.count(page.HEADING) == 1 and "an earlier one" not in text
    # neither the probes and scores of another model nor the scores of other choices are gone on with
    for name, field in (("made_with.json", "weights"), ("chosen.json", "class token")):
        path = given / "out" / name
        content = json.loads(path.read_text())
        path.write_text(json.dumps(content | {field: "another"}))
        with pytest.raises(InputError, match=f"holds another run; {field}"):
            run(monkeypatch, given, "measure", "photographs")
        path.write_text(json.dumps(content))
    for row in ("DAVE, S = 32, paper's", "Libra FullGrad+", "AttnLRP", "integrated gradients, in DAVE's time"):
        assert f"| {row} |" in text
    intervals = json.loads((given / "results.json").read_text())["intervals"]
    assert 0 <= intervals["patch average"]["DAVE, log p, best α, S = 4"]["EnergyPG"]["mean"] <= 1
    # to a probe's logits the mean of the others is no contrast; that of a mosaic's other classes is
    assert not any("contrast" in row for row in intervals["patch average"])
    assert "DAVE, against the mosaic's others, S = 2" in intervals["class token"]


def test_a_method_that_cannot_run_is_named_and_the_others_are_measured(monkeypatch, given, small, capsys):
    def refuse(model, gammas, seed):
        raise NotTakenError("no lxt")

    monkeypatch.setattr(rows, "attnlrp_with", refuse)
    best = {"noise_alpha": 0.1, "gammas": [0.25, 0.05]}
    head = {"default noise_alpha": 0.5, "photographs": best, "mosaics": best}
    only = script.Part("mosaics", 1, {"class token": (2,)}, full=False, grid=2)
    monkeypatch.setattr(script, "PARTS", {"mosaics-2x2": only})
    content = dict.fromkeys(script.HEADS, head) | {"passes": dict.fromkeys(script.PATHS, 2)}
    (given / "settings.json").write_text(json.dumps(content))
    run(monkeypatch, given, "measure", "mosaics-2x2")
    assert "AttnLRP is not run: no lxt" in capsys.readouterr().out
    families = {one["family"] for one in script.whole_lines(scores_of(given, "mosaics-2x2", "class token"))}
    assert "Libra FullGrad+" in families and "AttnLRP" not in families
    # a trial on the other half, whose mosaic has the same name, is neither taken for these scores nor put among them
    path, trial = (scores_of(given, "mosaics-2x2", "class token", chosen_on=each) for each in (False, True))
    before = path.read_bytes()
    run(monkeypatch, given, "measure", "mosaics-2x2", "--chosen-on")
    assert path.read_bytes() == before
    first, other = (script.whole_lines(each)[0] for each in (path, trial))
    assert first["item"] == other["item"] and first["scores"] != other["scores"]


def test_a_folder_of_an_unknown_class_is_refused(monkeypatch, given):
    (given / "classes" / "n04285008").mkdir()
    Image.new("RGB", (32, 32)).save(given / "classes" / "n04285008" / "car.png")
    with pytest.raises(SystemExit, match="no class of the folder n04285008"):
        run(monkeypatch, given, "measure", "facts")


def test_folders_without_photographs_are_refused(monkeypatch, given):
    (given / "classes" / "tiger").mkdir()
    with pytest.raises(SystemExit, match=r"no photographs in .*tiger"):
        run(monkeypatch, given, "measure", "facts")
    for path in (given / "boxes" / "raccoon").iterdir():
        path.unlink()
    with pytest.raises(SystemExit, match=r"no photographs in .*boxes"):
        run(monkeypatch, given, "measure", "facts")


def test_rows_are_compared_on_the_items_that_both_scored():
    scored = {"a": {"rise-deletion curve": {"1": 0.2, "2": 0.4}}, "b": {"rise-deletion curve": {"2": 0.5, "3": 0.9}}}
    found = page.paired({"head": scored}, "head", "rise-deletion curve", "a", "b")
    # less is better in deletion
    assert (found.mean, found.n) == (pytest.approx(0.1), 1)
    assert page.paired({"head": scored}, "head", "rise-deletion curve", "a", "c") is None
