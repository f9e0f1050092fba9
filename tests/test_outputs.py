"""Tests that every front end says the same of an output: its decision, its names and its probabilities."""

from __future__ import annotations

import csv
import functools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.models.vision_transformer import VisionTransformer
from torchvision.transforms import Normalize
from typer.testing import CliRunner

from dave_fast.cli.app import app
from dave_fast.cli.config import Config, save_config
from dave_fast.client.protocol import explained
from dave_fast.errors import InputError
from dave_fast.explain.image_files import ImageSource, Request, explain_files
from dave_fast.explain.pipeline import Pipeline, pipeline
from dave_fast.explain.subject import Subject
from dave_fast.images import describe_preprocessing
from dave_fast.models.adapter import Adapter
from dave_fast.models.meaning import probabilities
from dave_fast.run.export import export
from dave_fast.run.identity import make_identity, save_identity
from dave_fast.run.mapper import Mapper, MapSettings, packed_map
from dave_fast.run.reader import open_maps
from dave_fast.run.records import Record
from dave_fast.run.shards import new_shard, schema
from dave_fast.serve import formats
from dave_fast.serve.models import ServedModel, load_models
from dave_fast.serve.service import Service
from dave_fast.targets import Class
from tests.serve.tiny_server import DirectClient
from tests.tiny import named_vit, random_head_vit
from tests.variants import randomise

SIZE = describe_preprocessing((32, 32), (0.5,) * 3, (0.5,) * 3)
SETTINGS = {"precision": "fp32", "noise_alpha": 0.1}
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
NAMES = ("ant", "bee", "wasp", "newt")


def timm_vit(classes):
    model = random_head_vit(num_classes=classes)
    model.pretrained_cfg = dict(SIZE)
    return model


def with_head(head):
    """Return a model with four named classes and another head."""
    model = named_vit(NAMES)
    model.head = head.eval()
    return model


def linear(classes):
    layer = nn.Linear(24, classes)
    nn.init.normal_(layer.weight)
    return layer


def torchvision_vit(classes):
    torch.manual_seed(0)
    sizes = {"image_size": 32, "patch_size": 8, "num_layers": 1, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 16}
    model = VisionTransformer(**sizes, num_classes=classes).eval()
    randomise(model)
    return model


def hugging_vit(classes, problem=None):
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=classes, problem_type=problem)
    model = ViTForImageClassification(config).eval()
    nn.init.normal_(model.classifier.weight, 0, 0.5)
    return model


class Own(nn.Module):
    """A module with a configuration of its own around another one."""

    def __init__(self, problem):
        super().__init__()
        self.body, self.config, self.image_size = timm_vit(5), SimpleNamespace(problem_type=problem), 32

    def forward(self, images):
        return 2 * self.body(images)


def said(link):
    """Return a model whose owner says what its scores are."""
    model = timm_vit(5)
    model.link = link
    return model


def adapted(link, classes=5):
    return Adapter(timm_vit(classes), kind="classifier", pretrained_cfg=SIZE, link=link)


CASES = {
    "timm": (lambda: timm_vit(5), "softmax", None),
    "timm, two classes": (lambda: timm_vit(2), "softmax", None),
    "timm, one logit": (lambda: timm_vit(1), "sigmoid", None),
    "timm with names": (lambda: named_vit(NAMES), "softmax", NAMES),
    "timm, three classes for four names": (lambda: with_head(linear(3)), "softmax", None),
    "timm, one logit for four names": (lambda: with_head(nn.Sequential(nn.Dropout(), linear(1))), "sigmoid", None),
    "timm, said to be a sigmoid": (lambda: said("sigmoid"), "sigmoid", None),
    "timm, said to be a regression": (lambda: said(None), None, None),
    "torchvision": (lambda: torchvision_vit(5), "softmax", None),
    "torchvision, one logit": (lambda: torchvision_vit(1), "sigmoid", None),
    "transformers": (lambda: hugging_vit(5), "softmax", None),
    "transformers, several labels": (lambda: hugging_vit(5, "multi_label_classification"), "sigmoid", None),
    "transformers, one logit": (lambda: hugging_vit(1), "sigmoid", None),
    "transformers, one label": (lambda: hugging_vit(1, "multi_label_classification"), "sigmoid", None),
    "transformers, regression": (lambda: hugging_vit(1, "regression"), None, None),
    "transformers, regression of three": (lambda: hugging_vit(3, "regression"), None, None),
    "an adapter of several labels": (lambda: adapted("sigmoid"), "sigmoid", None),
    "an adapter of one logit": (lambda: adapted("softmax", 1), "sigmoid", None),
    "an adapter of a regression": (lambda: adapted(None), None, None),
    "own configuration of several labels": (lambda: Own("multi_label_classification"), "sigmoid", None),
    "own configuration of one label": (lambda: Own("single_label_classification"), "softmax", None),
    "behind a normalisation": (
        lambda: nn.Sequential(Normalize((0.4,) * 3, (0.3,) * 3), timm_vit(1)).eval(),
        "sigmoid",
        None,
    ),
}

PROBABILITIES = {
    "softmax": lambda scores: scores.exp() / scores.exp().sum(),
    "sigmoid": lambda scores: 1 / (1 + (-scores).exp()),
    None: lambda scores: torch.full_like(scores, math.nan),
}


@functools.cache
def subject_of(case):
    # only timm's models have a plan; without one there is a warning unless this route is named
    route = "auto" if case.startswith("timm") else "frozen"
    return Subject.load(CASES[case][0](), route=route, **SETTINGS)


@functools.cache
def truth(case):
    """Return the scores of PICTURE by the model itself, their probabilities by the case's link, and the class names."""
    _, link, names = CASES[case]
    subject = subject_of(case)
    with torch.no_grad():
        scores = subject.explainer.model(subject.prepare.transform(PICTURE)[None])[0].double()
    return scores, PROBABILITIES[link](scores), names or tuple(f"class {i}" for i in range(len(scores)))


def close(found, wanted):
    return found == pytest.approx(float(wanted), abs=1e-4, nan_ok=True)


every_case = pytest.mark.parametrize("case", CASES)


@every_case
def test_explain(case):
    scores, wanted, names = truth(case)
    subject = subject_of(case)
    image = subject.prepare.transform(PICTURE)[None]
    best = int(scores.argmax())
    found = subject.explainer.explain(image, n_samples=1)
    assert found.target.tolist() == [best] and close(found.probability[0].item(), wanted[best])
    several = subject.explainer.explain(image, n_samples=1, top_k=len(scores))
    order = scores.argsort(descending=True)
    assert torch.equal(several.target[0], order)
    torch.testing.assert_close(several.probability[0].double(), wanted[order], rtol=0, atol=1e-4, equal_nan=True)
    last = subject.explainer.explain(image, len(scores) - 1, 1)
    assert close(last.probability[0].item(), wanted[-1])
    assert subject.labels.count == len(scores)
    assert [subject.labels.name(i) for i in range(len(scores))] == list(names)


@pytest.mark.filterwarnings("ignore:the model names no preprocessing")
@every_case
def test_pipeline(case):
    scores, wanted, names = truth(case)
    answers = Pipeline(subject_of(case))(PICTURE, top_k=min(2, len(scores)), n_samples=1)
    for answer, index in zip(answers, scores.argsort(descending=True).tolist(), strict=False):
        assert answer["target"] == index and answer["label"] == names[index] and close(answer["score"], wanted[index])


# drawing the figure takes most of the time
FIGURES = ("timm, one logit", "transformers, regression of three")


@pytest.mark.filterwarnings("ignore:the model names no preprocessing")
@pytest.mark.parametrize(
    "case", [case if case in FIGURES else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_image_files(case, tmp_path):
    scores, wanted, names = truth(case)
    source = ImageSource("picture", "picture.png", lambda: PICTURE)
    request = Request(tmp_path, top_k=len(scores), n_samples=1, figure=True)
    (done,) = explain_files(subject_of(case), [source], request)
    for result, index in zip(done.results, scores.argsort(descending=True).tolist(), strict=True):
        assert (result.target, result.class_name) == (index, names[index]) and close(result.probability, wanted[index])
    with np.load(done.results[0].arrays) as arrays:
        assert arrays["top_targets"][0] == scores.argmax()
        assert arrays["top_class_names"][0] == names[scores.argmax()]
        assert close(arrays["top_probabilities"][0], wanted.max() if wanted.isfinite().all() else math.nan)


@every_case
def test_run(case):
    scores, wanted, _ = truth(case)
    mapper = object.__new__(Mapper)
    mapper.depth = "pixels"
    mapper.settings = MapSettings("demo", n_samples=1)
    subject = subject_of(case)
    mapper.explainer, mapper.prepare, mapper.labels = subject
    mapper.target = None
    (row,) = mapper.explain([Record("a", "a.png")], [subject.prepare.transform(PICTURE)], None)
    assert row["target"] == row["prediction"] == scores.argmax()
    if wanted.isnan().all():
        assert row["probability"] is None
    else:
        assert close(row["probability"], wanted[scores.argmax()])
    assert mapper.configuration["link"] == CASES[case][1] and mapper.configuration["classes"] == len(scores)


@pytest.fixture(scope="module")
def service():
    """A service of all models at once."""
    models = {}
    for case in CASES:
        subject = subject_of(case)
        models[case] = ServedModel(case, (subject.explainer,), subject.prepare, subject.labels)
    made = Service(models)
    made.start()
    yield made
    made.stop()


@every_case
def test_server(case, service):
    scores, wanted, names = truth(case)
    model = service.models[case]
    client = DirectClient(service)
    job = client.ask(model.prepare.transform(PICTURE), case, n_samples=2, top_k=min(2, len(scores)))
    told = json.loads(formats.encode(formats.JSON, model, job.ask, client.end(job), "overlay", "uint8"))
    order = scores.argsort(descending=True).tolist()
    assert [one["target"] for one in told["top"]] == order[:5]
    for one in (*told["top"], *told["maps"]):
        assert one["class_name"] == names[one["target"]]
        if wanted.isnan().all():
            assert one["probability"] is None
        else:
            assert close(one["probability"], wanted[one["target"]])


# The front ends refuse what has no classes


@pytest.mark.parametrize("removed", ["head", "num_classes"])
def test_features_are_refused_as_classes(removed):
    model = named_vit(NAMES)
    if removed == "head":
        model.head = nn.Identity()
    else:
        model.reset_classifier(0)
    with pytest.raises(InputError, match="gives embeddings and has no classes"):
        pipeline(model, **SETTINGS)


def test_an_output_of_places_is_refused_as_classes():
    from transformers import DPTConfig, DPTForDepthEstimation

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    sizes |= {"image_size": 32, "patch_size": 16, "backbone_out_indices": [0, 1, 1, 1], "is_hybrid": False}
    sizes |= {"neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 8}
    model = DPTForDepthEstimation(DPTConfig(**sizes)).eval()
    with pytest.raises(InputError, match="has no classes"):
        pipeline(model, route="frozen", **SETTINGS)


# Forms of a run without probabilities


@pytest.mark.parametrize("link", ["softmax", "sigmoid", None])
def test_forms_of_a_run(link, tmp_path):
    output = np.array([0.5, -1.0, 2.0], "<f4")
    wanted = PROBABILITIES[link](torch.from_numpy(output).double())
    configuration = {"raw": False, "outputs": True, "classes": 3, "link": link, "preprocessing": {}}
    identity = make_identity(configuration, "", {})
    save_identity(tmp_path, identity)
    row = {"id": "a", "uri": "a.png", "target": 2, "prediction": 2, "status": "ok", "seed": 0, "n_samples": 1}
    row |= packed_map(np.ones((4, 4), np.float32), "float16") | {"output": output.tobytes()}
    row["probability"] = None if link is None else float(wanted[2])
    with new_shard(tmp_path / "maps-000-00000.parquet", schema(identity)) as writer:
        writer.add([row])
    maps = open_maps(tmp_path)
    (read,) = maps
    (item,) = torch.utils.data.DataLoader(maps.torch())
    assert close(item["probability"].item(), wanted[2] if link else math.nan)
    assert read.probability is None if link is None else close(read.probability, wanted[2])
    export(maps, "npy", tmp_path / "npy")
    (told,) = csv.DictReader((tmp_path / "npy" / "index.csv").read_text().splitlines())
    assert told["probability"] == "" if link is None else close(float(told["probability"]), wanted[2])
    h5py = pytest.importorskip("h5py", reason="an extra: dave-fast[export]")
    export(maps, "virelay", tmp_path / "maps.h5")
    with h5py.File(tmp_path / "maps.h5") as book:
        # scores without probabilities are told as they are
        np.testing.assert_allclose(book["prediction"][0], output if link is None else wanted, rtol=1e-6)


@pytest.mark.parametrize("probability", [0.25, None])
def test_the_client_has_no_number_for_a_missing_probability(probability):
    one = {"target": 1, "class_name": "bee", "probability": probability, "error": None, "error_bound": None}
    shape = {"dtype": "uint8", "shape": [1, 1], "data": "AA=="}
    found = explained({"maps": [one | {"map": shape}], "top": [one], "samples": 1, "n_samples": 1})
    wanted = math.nan if probability is None else probability
    assert close(found.probabilities[0], wanted) and close(found.top[0][2], wanted)


# A head that is replaced after the names were read


def test_a_pipeline_notices_a_new_head():
    model = named_vit(NAMES)
    pipe = pipeline(model, **SETTINGS)
    assert pipe(PICTURE, target="wasp", n_samples=1)[0]["label"] == "wasp"
    model.head = linear(3)
    assert pipe(PICTURE, n_samples=1)[0]["label"].startswith("class ")
    with pytest.raises(InputError, match="have no names; give an index"):
        pipe(PICTURE, target="wasp", n_samples=1)
    with pytest.raises(InputError, match="out of range"):
        pipe(PICTURE, target=3, n_samples=1)


def test_a_name_that_was_looked_up_for_another_head_is_refused():
    model = named_vit(NAMES)
    explainer = Subject.load(model, **SETTINGS).explainer
    bound = explainer.bind(Class("bee"))
    image = torch.zeros(1, 3, 32, 32)
    assert bound == Class(1) and explainer.explain(image, bound, 1).target.tolist() == [1]
    model.head = linear(3)
    with pytest.raises(InputError, match="looked up among 4 classes"):
        explainer.explain(image, bound, 1)


# Words of the command line and the server


def tiny():
    return named_vit(NAMES)


@pytest.mark.parametrize(
    ("word", "link"), [("softmax", "softmax"), ("sigmoid", "sigmoid"), ("none", None), (None, "softmax")]
)
def test_a_link_that_is_named_is_that_of_a_served_model(word, link):
    (model,) = load_models([f"mine={__name__}:tiny"], [None], link=word, **SETTINGS).values()
    scores = torch.tensor([[1.0, 2.0, 0.0, -1.0]])
    found = probabilities(model.explainers[0].model, scores)[0].double()
    torch.testing.assert_close(found, PROBABILITIES[link](scores[0].double()), rtol=0, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("given", ["option", "configuration"])
def test_the_command_line_says_the_link(given, tmp_path):
    PICTURE.save(tmp_path / "picture.png")
    save_config(Config(f"{__name__}:tiny", link="sigmoid"), tmp_path / "own.toml")
    said = {
        "option": ("--model", f"{__name__}:tiny", "--link", "sigmoid"),
        "configuration": ("--config", tmp_path / "own.toml"),
    }
    out = tmp_path / "maps"
    words = ("explain", tmp_path / "picture.png", *said[given], "--out", out, "--n-samples", 1, "--noise-alpha", 0.1)
    result = CliRunner().invoke(app, [*map(str, words), "--precision", "fp32"])
    assert result.exit_code == 0, result.output
    scores, _, _ = truth("timm with names")
    (path,) = out.glob("picture.*.npz")
    with np.load(path) as arrays:
        assert close(arrays["probabilities"][0], scores.max().sigmoid())


def test_an_unknown_link_is_refused():
    with pytest.raises(InputError, match="link is 'logit'; expected one of softmax, sigmoid, none"):
        load_models(["demo"], [None], link="logit")
