"""Test `dave-fast evaluate`: its metrics, the files of its report, bad requests, and that the model is unchanged."""

import csv
import json
import math
import os
import re
from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from dave_fast.cli.app import app
from dave_fast.errors import InputError
from dave_fast.evaluate import DemoScenes, EvaluationSettings, evaluate
from dave_fast.evaluate.methods import MethodSettings
from dave_fast.evaluate.mosaics import resized
from dave_fast.evaluate.randomise import stages
from dave_fast.evaluate.report import About, table, write
from dave_fast.evaluate.settings import METRICS, VARIANTS, Results
from dave_fast.explain import explainer as explainer_module
from dave_fast.images import from_config
from dave_fast.models.demo.model import build_model, load_demo_model
from dave_fast.models.labels import Labels

SMALL = ("--images", 3, "--probes", 1, "--randomised", 1, "--mosaics", 1, "--seeds", 2, "--batch-size", 2)
METHOD = ("--n-samples", 2, "--precision", "fp32", "--methods", "input × gradient", "--grids", "2x2-rescaled")
HALF = {"mean": (0.5,) * 3, "std": (0.5,) * 3}


def run(*arguments, code=0):
    result = CliRunner().invoke(app, ["evaluate", *map(str, arguments)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    return out, run(*SMALL, *METHOD, "--protocols", "dave,quantus", "--out", out).output


def test_every_file_of_the_report_is_there_and_says_the_same(report):
    out, said = report
    found = json.loads((out / "results.json").read_text())
    rows = list(csv.DictReader((out / "scores.csv").read_text().splitlines()))
    for variant in VARIANTS:
        for method, scored in found["intervals"][variant].items():
            for metric, interval in scored.items():
                own = [
                    float(r["score"])
                    for r in rows
                    if (r["method"], r["variant"], r["metric"]) == (method, variant, metric) and r["score"] != "nan"
                ]
                assert interval["n"] == len(own), (method, metric)
                assert interval["mean"] == pytest.approx(sum(own) / len(own), rel=1e-4)
    mean = found["intervals"]["as it is"]["DAVE"]["EnergyPG"]["mean"]
    for text in (said, (out / "report.md").read_text(), (out / "report.html").read_text()):
        assert f"{mean:.3f} (" in text
    with Image.open(out / "examples.png") as picture:
        assert picture.width > 3 * 224


def test_all_metrics_that_the_scenes_permit_are_measured(report):
    found = json.loads((report[0] / "results.json").read_text())["intervals"]["as it is"]["DAVE"]
    skipped = {"GridPG 2x2", "GridPG 3x3", "GridPG 3x3-rescaled", "rise-deletion curve", "rise-insertion curve"}
    assert set(found) == set(METRICS) - skipped
    assert found["EnergyPG"]["n"] == 3
    assert found["stability"]["n"] == 1


def test_the_page_needs_nothing_from_outside(report):
    page = (report[0] / "report.html").read_text()
    assert not re.search(r"""(?:src|href)=["'](?!data:)""", page)
    assert "url(" not in page
    assert "<script" not in page
    assert "prefers-color-scheme: dark" in page


def test_folders_are_evaluated_by_what_is_known_of_them(tmp_path, monkeypatch):
    def load(model_or_spec):
        torch.manual_seed(0)
        model = build_model().eval()
        nn.init.normal_(model.head.weight, std=0.1)
        return model, "x"

    monkeypatch.setattr(explainer_module, "load_model", load)
    scenes = DemoScenes(2, 1).read(0, 2)
    for number, name in enumerate(("four", "nothing")):
        (tmp_path / "in" / name).mkdir(parents=True)
        pixels = (scenes.images[number].permute(1, 2, 0) * 127.5 + 127.5).round().byte().numpy()
        Image.fromarray(pixels).save(tmp_path / "in" / name / f"{name}.png")
    (tmp_path / "in" / "four" / "broken.png").write_bytes(b"")
    (tmp_path / "boxes.csv").write_text("image,xmin,ymin,xmax,ymax\nfour.png,10,20,100,90\n")
    settings = ("--n-samples", 1, "--noise-alpha", 0.1, "--methods", "", "--groups", "localisation,grids")
    said = run(tmp_path / "in", "--model", "x", "--boxes", tmp_path / "boxes.csv", "--out", tmp_path / "out", *settings)
    assert "1 files left out" in said.output
    assert "on 3 files of in" in (tmp_path / "out" / "report.md").read_text()
    assert "0 classes are named rightly" in said.output
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (found["facts"]["images"], found["facts"]["labelled"]) == (2, 1)
    assert found["intervals"]["as it is"]["DAVE"]["EnergyPG"]["n"] == 1
    assert list(found["skipped"].values()) == [f"cannot read {tmp_path}/in/four/broken.png: the file is empty."]


@pytest.mark.parametrize("name", [b"\xff.png", b"a\xff\xfeb", b"\xc3.png", b"\xed\xa0\x80", b"\xf8\\x88"], ids=repr)
@pytest.mark.parametrize("where", ["skipped", "examples", "source", "command", "absent"])
def test_names_that_are_no_utf8_are_in_the_report(tmp_path, where, name):
    name = os.fsdecode(name)
    given = {
        "skipped": {name: f"cannot read {name}: the file is empty."} if where == "skipped" else {},
        **{key: f"of {name}" if where == key else "" for key in ("source", "command")},
    }
    results = Results(facts={"images": 1, "labelled": 0}, absent={"IG": name} if where == "absent" else {})
    mask, prepare = torch.zeros(8, 8, dtype=torch.bool), from_config({"input_size": (3, 8, 8), **HALF})
    one = {"name": name if where == "examples" else "", "class": 0, "probability": 0.5, "mask": mask, "maps": {}}
    results.examples = [one | {"image": torch.zeros(3, 8, 8)}]
    about = {"model": "x", "settings": EvaluationSettings(), "setup": MethodSettings(1), "labels": Labels(1)}
    write(tmp_path, results, About(prepare=prepare, environment={}, **about, **given))
    assert sorted(os.listdir(tmp_path)) == ["examples.png", "report.html", "report.md", "results.json", "scores.csv"]
    texts = {file: (tmp_path / file).read_text(encoding="utf-8") for file in ("report.html", "report.md")}
    found = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert {key: found[key] for key in given} == given
    shown = name.encode(errors="backslashreplace").decode()
    assert shown in texts["report.html"] and (shown in texts["report.md"] or where == "examples")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--groups", "speed"), "localisation"),
        (("--grids", "4x4"), "2x2-rescaled"),
        (("--protocols", "best"), "rise-insertion"),
        (("--methods", "Grad-CAM"), "SmoothGrad"),
        (("--seeds", "11"), "1 to 10 seeds"),
        (("--boxes", "x.csv"), "name a folder"),
        (("nowhere",), "no file or folder"),
    ],
)
def test_bad_requests_are_refused_and_leave_nothing_behind(arguments, said, tmp_path):
    assert said in run(*arguments, "--out", tmp_path / "out", code=2).output
    assert not (tmp_path / "out").exists()


def test_settings_of_a_file_are_taken_unless_said_otherwise(tmp_path):
    (tmp_path / "model.toml").write_text('model = "demo"\nnoise_alpha = 0.25\nn_samples = 1\nshrink = false\n')
    quick = (
        "--images",
        1,
        "--methods",
        "",
        "--groups",
        "localisation",
        "--out",
        tmp_path / "out",
        "--precision",
        "fp32",
    )
    run("--config", tmp_path / "model.toml", *quick)
    setup = json.loads((tmp_path / "out" / "results.json").read_text())["setup"]
    assert (setup["n_samples"], setup["explainer"]["noise_alpha"], setup["explainer"]["shrink"]) == (1, 0.25, False)
    assert "post-processing, alike for every method" in (tmp_path / "out" / "report.md").read_text()
    run("--config", tmp_path / "model.toml", "--noise-alpha", 0.5, "--n-samples", 2, "--shrink", *quick)
    setup = json.loads((tmp_path / "out" / "results.json").read_text())["setup"]
    assert (setup["n_samples"], setup["explainer"]["noise_alpha"], setup["explainer"]["shrink"]) == (2, 0.5, True)
    report = (tmp_path / "out" / "report.md").read_text()
    assert "DAVE with S = 2, shrunk." in report and "DAVE's map is shrunk first, no other is" in report
    assert "alike for every method" not in report


def test_randomisation_goes_from_the_head_down_repeatably_and_keeps_scales():
    torch.manual_seed(0)
    one, two = build_model(), build_model()
    two.load_state_dict(one.state_dict())
    before = {name: p.clone() for name, p in one.named_parameters()}
    names = [name for name, _ in stages(one)]
    assert names == ["head", "norm", *(f"blocks.{i}" for i in reversed(range(5))), "patch_embed", "tokens"]
    for (_, randomise), (_, again) in zip(stages(one, 3), stages(two, 3), strict=True):
        randomise()
        again()
    for (name, p), q in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(p, q)
        if before[name].std() > 0:
            assert not torch.equal(p, before[name])
            assert p.std().item() == pytest.approx(before[name].std().item(), rel=0.35)
    assert torch.equal(one.norm.weight, before["norm.weight"])


def test_a_model_is_resized_as_a_copy_or_not_at_all():
    model = build_model()
    other = resized(model, (256, 256))
    assert other(torch.zeros(1, 3, 256, 256)).shape == (1, 10)
    assert model.patch_embed.img_size == (128, 128)
    assert resized(model, (128, 128)) is model
    assert resized(nn.Linear(2, 2), (4, 4)) is None


def test_the_model_is_only_read():
    torch.manual_seed(0)
    model = build_model().eval().requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settings = EvaluationSettings(
        images=1, probes=1, randomised=1, pairs=0, groups=("localisation", "randomisation"), methods=()
    )
    evaluate(model, DemoScenes(1, 0), settings, MethodSettings(1, {"precision": "fp32", "noise_alpha": 0.1}))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def small_evaluation(model, source, *groups):
    chosen = EvaluationSettings(
        images=2, probes=2, randomised=0, pairs=1, mosaics=1, grids=("2x2-rescaled",), seeds=1, batch_size=2,
        protocols=("dave",), curve_steps=2, methods=("input × gradient",), confident=0.0, groups=groups,
    )  # fmt: skip
    setup = MethodSettings(1, {"precision": "fp32", "noise_alpha": 0.3}, 2.0)
    return evaluate(model.requires_grad_(False), source, chosen, setup)


def test_a_model_without_probabilities_has_no_curves_and_mosaics():
    model = load_demo_model()
    model.link = None
    found = small_evaluation(model, DemoScenes(2, 0), "localisation", "curves", "classes", "grids")
    assert {"dave curve", "GridPG 2x2-rescaled"} <= set(found.absent)
    assert "no probabilities" in found.absent["dave curve"]
    scores = found.scores["DAVE"]["as it is"]
    assert not scores.keys() & {"dave curve", "GridPG 2x2-rescaled"}
    assert len(scores["EnergyPG"]) == 2 and all(math.isnan(one["probability"]) for one in found.examples)


def test_one_logit_is_evaluated_as_a_sigmoid():
    model = load_demo_model()
    model.head = nn.Linear(model.embed_dim, 1)

    class Unlabelled(DemoScenes):
        def read(self, start, stop):
            read = super().read(start, stop)
            return replace(read, labels=torch.full_like(read.labels, -1))

        def read_pairs(self, start, stop):
            return None

    source = Unlabelled(2, 0)
    found = small_evaluation(model, source, "curves", "classes")
    wanted = model(source.read(0, 2).images).sigmoid()[:, 0]
    _, rows = found.curves["dave"]
    torch.testing.assert_close(rows["DAVE"]["as it is"][:, 0].float(), wanted, rtol=0, atol=1e-5)
    assert "class similarity" not in found.scores["DAVE"]["as it is"]


def test_a_source_without_a_readable_image_is_refused(tmp_path):
    class Nothing(DemoScenes):
        def read(self, start, stop):
            self.skipped["a.png"] = "cannot read a.png: it is empty."

    with pytest.raises(InputError, match="it is empty"):
        evaluate(
            build_model().eval(),
            Nothing(1, 0),
            EvaluationSettings(images=1, methods=()),
            MethodSettings(1, {"noise_alpha": 0.1}),
        )


def test_bars_do_not_end_cells():
    assert table(("a",), [("|x|",)]).splitlines()[-1] == r"| \|x\| |"


def test_at_a_depth_the_report_names_the_block_and_has_a_row_of_the_pixels(tmp_path):
    quick = ("--images", 1, "--n-samples", 1, "--methods", "", "--groups", "localisation", "--precision", "fp32")
    run("--depth", "0.5", *quick, "--out", tmp_path / "out")
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["setup"]["depth"] == 3
    assert {"DAVE", "DAVE, pixels"} < set(found["intervals"]["smoothed"])
    report = (tmp_path / "out" / "report.md").read_text()
    assert "of the tokens that enter block 3; “DAVE, pixels” is its map of the pixels" in report
    assert "- depth: `3`" in report and "block 3 depth of DAVE's maps" in report


@pytest.mark.parametrize(("depth", "said"), [("pixels,1", "expected one depth here"), ("7", "the blocks 0 to 4")])
def test_several_depths_and_blocks_that_are_not_there_are_refused(depth, said, tmp_path):
    assert said in " ".join(run("--depth", depth, "--out", tmp_path / "out", code=2).output.split())
    assert not (tmp_path / "out").exists()
