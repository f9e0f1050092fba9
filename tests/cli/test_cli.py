"""Tests of the command line: files, output, and refusals that leave no trace."""

import io
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

import dave_fast
from dave_fast.cli import app as cli_app
from dave_fast.cli import terminal
from dave_fast.cli.app import app
from dave_fast.errors import UnknownModelError
from dave_fast.evaluate import comparison
from dave_fast.explain import explainer, image_files
from dave_fast.images import preprocessing, read_image
from tests.tiny import named_vit


def tiny():
    return named_vit(["cat", "dog", "house cat", *(f"thing {i}" for i in range(3, 10))])


@pytest.fixture
def models(monkeypatch):
    """The models that can be loaded, by name, in place of the hub's; "never" is none of them."""
    known = {"tiny": tiny}

    def load_model(spec):
        if isinstance(spec, nn.Module):
            return spec, "a module"
        if spec.name not in known:
            raise AssertionError(f"the model {spec.name} was loaded")
        return known[spec.name](), spec.name

    monkeypatch.setattr(explainer, "load_model", load_model)
    return known


def write(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (50, 40, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def photo(tmp_path):
    return write(tmp_path / "in/photo.png")


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def explain(*arguments, model="tiny", code=0):
    settings = ("--n-samples", 3, "--precision", "fp32", "--backend", "torch")
    return run("explain", *arguments, "--model", model, *settings, code=code)


def size(path):
    with Image.open(path) as picture:
        return picture.size


def load(path):
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


def only(folder):
    """Return the arrays of the one .npz in a folder."""
    (path,) = folder.rglob("*.npz")
    return load(path)


def tree(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


# Files and output


def test_one_image(models, photo, tmp_path):
    out = tmp_path / "maps"
    result = explain(photo, "--out", out)
    arrays = only(out)
    slug = arrays["class_names"][0].replace(" ", "-")
    stem = f"photo.{arrays['targets'][0]}-{slug}"
    assert tree(out) == [f"{stem}.map.png", f"{stem}.npz", f"{stem}.overlay.png"]
    assert size(out / f"{stem}.overlay.png") == size(out / f"{stem}.map.png") == (40, 50)
    assert f"1 image explained in {out}" in result.stdout
    assert "note: noise_alpha is 0.1 for tiny" in result.stderr


def test_arrays(models, photo, tmp_path):
    explain(photo, "--out", tmp_path / "maps", "--target", "dog", "--seed", 7)
    arrays = only(tmp_path / "maps")
    assert arrays["maps"].shape == (1, 32, 32) and arrays["maps"].dtype == np.float32
    assert arrays["maps"].min() >= 0 and arrays["maps"].max() == 1
    assert arrays["raw"].shape == (1, 3, 32, 32) and (arrays["raw"] < 0).any()
    assert arrays["input"].shape == (32, 32, 3) and arrays["input"].dtype == np.uint8
    assert arrays["targets"] == [1] and arrays["class_names"] == ["dog"] and arrays["errors"] == [np.inf]
    assert arrays["samples"] == arrays["n_samples"] == 3 and arrays["seed"] == 7
    assert arrays["model"] == "tiny" and arrays["precision"] == "fp32"
    assert str(arrays["image"]) == str(photo) and arrays["dave_fast_version"]
    assert len(arrays["top_class_names"]) == 5 and (np.diff(arrays["top_probabilities"]) <= 0).all()
    same = arrays["top_probabilities"][arrays["top_targets"] == 1]
    np.testing.assert_allclose(same, arrays["probabilities"][: len(same)], rtol=1e-6)


@pytest.mark.parametrize(("name", "wanted"), [("original", (40, 50)), ("model", (32, 32)), ("enlarged", (448, 448))])
def test_pictures_have_the_size_asked_for(models, photo, tmp_path, name, wanted):
    explain(photo, "--out", tmp_path / "maps", "--size", name)
    assert len(tree(tmp_path / "maps")) == 3
    for ending in (".overlay.png", ".map.png"):
        (picture,) = (tmp_path / "maps").glob(f"photo.*{ending}")
        assert size(picture) == wanted


@pytest.mark.parametrize(
    "options", [("--colormap", "viridis"), ("--opacity", 0.3), ("--quantile", 0.6), ("--signed",)], ids=str
)
def test_pictures_have_the_style_asked_for(models, photo, tmp_path, options):
    pictures = []
    for number, some in enumerate(((), options)):
        explain(photo, "--out", tmp_path / f"{number}", "--target", "dog", *some)
        pictures.append((tmp_path / f"{number}/photo.1-dog.overlay.png").read_bytes())
    assert pictures[0] != pictures[1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--size", "big"), "expected one of original, model, enlarged"),
        (("--colormap", "infermo"), "did you mean inferno"),
        (("--opacity", 7), "opacity is 7"),
    ],
)
def test_wrong_style_is_refused_before_the_model_is_loaded(models, photo, tmp_path, options, said):
    result = explain(photo, "--out", tmp_path / "maps", *options, model="never", code=2)
    assert said in result.stderr and not (tmp_path / "maps").exists()


@pytest.mark.parametrize(("seed", "saved"), [(-3, -3), (2**64 + 5, 5), (2**64 - 1, 2**64 - 1)])
def test_any_seed_is_saved(models, photo, tmp_path, seed, saved):
    explain(photo, "--out", tmp_path / "maps", "--seed", seed)
    assert only(tmp_path / "maps")["seed"] == saved


def test_a_photograph_is_decoded_once(models, photo, tmp_path, monkeypatch):
    decoded = []
    monkeypatch.setattr(image_files, "read_image", lambda path: decoded.append(path) or read_image(path))
    explain(photo, "--out", tmp_path / "maps", "--top-k", 2)
    assert decoded == [photo]


def test_names_are_not_markup(models, tmp_path):
    write(tmp_path / "in/[red] ä b.v2.png")
    result = explain(tmp_path / "in", "--out", tmp_path / "maps", "--target", "dog")
    assert "maps/[red] ä b.v2.1-dog.npz" in {f"maps/{name}" for name in tree(tmp_path / "maps")}
    assert "[red] ä b.v2.1-dog.overlay.png" in result.stdout


def test_equal_seeds_give_equal_files(models, photo, tmp_path):
    for out in ("a", "b"):
        explain(photo, "--out", tmp_path / out)
    for name in tree(tmp_path / "a"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_most_probable_classes(models, photo, tmp_path):
    out = tmp_path / "maps"
    result = explain(photo, "--out", out, "--top-k", 3)
    names = tree(out)
    assert len(names) == 10 and "photo.top3.figure.png" in names
    arrays = [load(out / name) for name in names if name.endswith(".npz")]
    expected = arrays[0]["top_targets"][:3].tolist()
    assert sorted(int(a["targets"][0]) for a in arrays) == sorted(expected)
    assert "picture:" in result.stdout
    for each in arrays:
        assert str(each["class_names"][0]) in result.stdout


def test_sums_and_differences_of_classes(models, photo, tmp_path):
    out = tmp_path / "maps"
    result = explain(photo, "--out", out, "--target", "dog-thing 3", "--target", "dog", "--target", "dog + house cat")
    stems = ["photo.1-dog", "photo.1-dog_and_2-house-cat", "photo.1-dog_not_3-thing-3"]
    assert [name for name in tree(out) if name.endswith(".npz")] == [f"{stem}.npz" for stem in stems]
    dog, both, contrast = (load(out / f"{stem}.npz") for stem in stems)
    assert dog["targets"] == [1] and contrast["targets"] == both["targets"] == [-1]
    assert contrast["class_names"] == ["dog − thing 3"] and np.isnan(contrast["probabilities"])
    assert "dog − thing 3" in result.stdout and "–" in result.stdout
    assert "photo.1-dog_not_3-thing-3,1-dog,1-dog_and_2-house-cat.figure.png" in tree(out)
    explain(photo, "--out", tmp_path / "alone", "--target", "1-3")
    np.testing.assert_array_equal(only(tmp_path / "alone")["raw"], contrast["raw"])


def test_a_second_question_leaves_the_files_of_the_first(models, photo, tmp_path):
    for question in (("--target", "dog"), ("--target", "cat"), ("--target", "dog", "--depth", "1")):
        explain(photo, "--out", tmp_path / "maps", *question)
    stems = [name.removesuffix(".npz") for name in tree(tmp_path / "maps") if name.endswith(".npz")]
    assert stems == ["photo.0-cat", "photo.1-dog.block1", "photo.1-dog"]


def test_tokens_and_other_images_as_targets(models, photo, tmp_path):
    def features():
        model = tiny()
        model.reset_classifier(0)
        return model

    models["features"] = features
    np.save(tmp_path / "probe.npy", np.ones((2, 24), np.float32))
    targets = ("--target", "patch:1,2", "--target", f"patch:1,2@{tmp_path / 'probe.npy'}#1")
    explain(photo, "--out", tmp_path / "maps", *targets)
    assert len([name for name in tree(tmp_path / "maps") if name.endswith(".npz")]) == 2
    other = write(tmp_path / "in/other.png")
    explain(photo, "--out", tmp_path / "like", "--target", f"image:{other}", model="features")
    arrays = only(tmp_path / "like")
    assert arrays["class_names"] == [f"like {other}"] and len(arrays["top_targets"]) == 0


@pytest.mark.parametrize(
    ("target", "message"),
    [("text:a cat", "takes no text prompts"), ("patch:4,2", "4 rows and 4 columns"), ("image:none.png", "none.png")],
)
def test_questions_that_the_model_cannot_answer(models, untouched, photo, target, message):
    refused(explain(photo, "--out", untouched, "--target", target, code=2), message)


def test_folder_keeps_its_shape(models, tmp_path):
    for name in ("in/a.png", "in/b/a.png", "in/b/c.jpg", "in/b/c.png"):
        write(tmp_path / name)
    explain(tmp_path / "in", "--out", tmp_path / "maps", "--target", "dog")
    stems = {name.removesuffix(".npz") for name in tree(tmp_path / "maps") if name.endswith(".npz")}
    assert stems == {"a.1-dog", "b/a.1-dog", "b/c.1-dog", "b/c.png.1-dog"}


def test_results_inside_the_folder_are_not_explained(models, tmp_path):
    write(tmp_path / "a.png")
    for _ in range(2):
        result = explain(tmp_path, "--out", tmp_path / "maps")
        assert "1 image explained" in result.stdout


@pytest.mark.filterwarnings("default:the model names no preprocessing")
def test_notes_are_plain_lines_told_once(models, photo, tmp_path):
    models["bare"] = lambda: setattr(model := tiny(), "pretrained_cfg", None) or model
    write(tmp_path / "in/b.png")
    result = explain(tmp_path / "in", "--out", tmp_path / "maps", model="bare")
    assert result.stderr.count("note: the model names no preprocessing") == 1
    assert "class " in result.stdout


def test_random_weights_need_no_network_and_are_told(photo, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    quick = ("--n-samples", 1, "--precision", "fp32", "--out", tmp_path / "maps")
    result = run("explain", photo, "--model", "vit_tiny_patch16_224", "--random-weights", *quick)
    assert "model: vit_tiny_patch16_224, random weights\n" in result.stderr
    assert result.stderr.count("note: the weights are random") == 1 and "mean nothing" in result.stderr
    (arrays,) = (load(tmp_path / "maps" / name) for name in tree(tmp_path / "maps") if name.endswith(".npz"))
    assert arrays["model"] == "vit_tiny_patch16_224, random weights"


# Bad input


def refused(result, message):
    """Check that the command printed one red line and no traceback, beside the model and the level chosen for it."""
    told = ("note: noise_alpha is", "model: ")
    lines = [line for line in result.stderr.splitlines() if line and not line.startswith(told)]
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    assert message in lines[0]


@pytest.fixture
def untouched(tmp_path):
    """A path for --out, which must not exist after the test; nor may temporary files."""
    out = tmp_path / "maps"
    yield out
    assert not out.exists()
    assert not list(tmp_path.rglob("*.part"))


def test_no_image_given(untouched):
    refused(explain("--out", untouched, model="never", code=2), "no image was given")


def test_missing_file(models, untouched, tmp_path):
    refused(explain(tmp_path / "none.jpg", "--out", untouched, model="never", code=2), "no file or folder")


def test_empty_folder(models, untouched, tmp_path):
    (tmp_path / "in").mkdir()
    refused(explain(tmp_path / "in", "--out", untouched, model="never", code=2), "no image to explain")


@pytest.mark.parametrize("content", [b"", b"hello", "half"], ids=["empty", "text", "truncated"])
def test_unreadable_image(models, untouched, photo, content):
    photo.write_bytes(photo.read_bytes()[:2000] if content == "half" else content)
    refused(explain(photo, "--out", untouched, model="never", code=2), f"cannot read {photo}")


def test_non_finite_pixels(models, untouched, tmp_path):
    Image.fromarray(np.full((32, 32), np.nan, np.float32)).save(tmp_path / "a.tif")
    refused(explain(tmp_path / "a.tif", "--out", untouched, model="never", code=2), "not finite")


@pytest.mark.parametrize("bad", ["file", "/proc/maps"])
def test_output_folder_that_cannot_be_written(models, photo, tmp_path, bad):
    if bad == "/proc/maps" and not os.path.isdir("/proc/self"):
        pytest.skip("needs a folder that even root cannot write to")
    (tmp_path / "file").write_bytes(b"kept")
    refused(explain(photo, "--out", tmp_path / bad, model="never", code=2), "cannot write to")
    assert (tmp_path / "file").read_bytes() == b"kept"


@pytest.mark.parametrize(
    ("target", "message"), [("10", "out of range"), ("walrus", "no class"), ("thing", "fits 7 classes")]
)
def test_target_that_the_model_lacks(models, untouched, photo, target, message):
    refused(explain(photo, "--out", untouched, "--target", target, code=2), message)


@pytest.mark.parametrize(
    ("model", "target", "message"),
    [
        ("vit_tiny_patch16_224", "tabby-tigerr", "did you mean tiger (292)"),
        ("vit_tiny_patch16_224", "1000", "out of range"),
        ("deit3_base_patch16_224.fb_in1k", "goldfsh", "did you mean goldfish (1)"),
        ("demo", "fuor", "did you mean four (4)"),
        ("torchvision:vit_b_16", "goldfsh", "did you mean goldfish (1)"),
    ],
)
def test_a_class_that_the_architecture_lacks_is_refused_before_the_model_is_loaded(
    models, untouched, photo, model, target, message
):
    refused(explain(photo, "--out", untouched, "--target", target, model=model, code=2), message)


def test_more_classes_than_there_are(models, untouched, photo):
    refused(explain(photo, "--out", untouched, "--top-k", 11, code=2), "the model has 10 classes")


def test_target_and_top_k(models, untouched, photo):
    result = explain(photo, "--out", untouched, "--target", 1, "--top-k", 2, model="never", code=2)
    refused(result, "give one of them")


def test_patches_and_classes(models, untouched, photo):
    result = explain(photo, "--out", untouched, "--target", "patch:1,2", "--target", "dog", model="never", code=2)
    refused(result, "one run for each kind")


@pytest.mark.parametrize("option", ["--n-samples", "--top-k", "--internal-batch-size"])
def test_numbers_below_one(models, untouched, photo, option):
    result = run("explain", photo, "--out", untouched, "--model", "never", option, 0, code=2)
    assert option in result.stderr


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("--precision", "fp3"), ("--backend", "no"), ("--schedule", "no"), ("--route", "no"), ("--device", "abacus")),
        *(("--noise-alpha", "1.5"), ("--link", "no")),
    ],
)
def test_settings_that_do_not_exist_are_refused_before_the_model_is_loaded(models, untouched, photo, option, value):
    result = run("explain", photo, "--out", untouched, "--model", "never", option, value, code=2)
    refused(result, value)


def test_unknown_model(untouched, photo):
    refused(explain(photo, "--out", untouched, model="vit_bse_patch16_224", code=2), "vit_base_patch16_224")


def test_hub_out_of_reach(untouched, photo, monkeypatch):
    import timm

    def fail(*_, **__):
        raise OSError("We couldn't connect to\nthe hub")

    monkeypatch.setattr(timm, "create_model", fail)
    result = explain(photo, "--out", untouched, model="vit_tiny_patch16_224", code=2)
    assert result.stderr.splitlines()[-1].startswith("error: ") and "couldn't connect" in result.stderr


def test_model_without_attention(models, untouched, photo):
    convolutions = nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.Flatten(), nn.LazyLinear(10))
    convolutions(torch.zeros(1, 3, 224, 224))
    models["convolutions"] = convolutions.eval
    result = explain(photo, "--out", untouched, model="convolutions", code=2)
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert "attention" in result.stderr


def test_model_without_a_plan(models, untouched, photo):
    convolutions = nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.Flatten(), nn.LazyLinear(10))
    convolutions(torch.zeros(1, 3, 224, 224))
    models["convolutions"] = convolutions.eval
    result = explain(photo, "--out", untouched, "--route", "engine", model="convolutions", code=2)
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert "none of timm's classes VisionTransformer" in result.stderr


def test_exception_in_the_model_keeps_its_traceback(models, untouched, photo):
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tiny()

        def forward(self, images):
            raise ZeroDivisionError("in the user's model")

    models["broken"] = lambda: Broken().eval()
    with pytest.raises(Exception, match="in the user's model"):
        explain(photo, "--out", untouched, model="broken")


def test_non_finite_weights(models, untouched, photo):
    def poisoned():
        model = tiny()
        nn.init.constant_(model.head.weight, float("nan"))
        return model

    models["poisoned"] = poisoned
    result = explain(photo, "--out", untouched, model="poisoned", code=2)
    assert "NaN or infinity" in result.stderr and "0 images explained" in result.stdout


def test_one_bad_file_in_a_folder(models, tmp_path):
    for name in ("in/a.png", "in/b.png", "in/c.png"):
        write(tmp_path / name)
    bad = tmp_path / "in/b.png"
    bad.write_bytes(bad.read_bytes()[:2000])
    result = explain(tmp_path / "in", "--out", tmp_path / "maps", "--target", "dog", code=1)
    refused(result, f"cannot read {bad}")
    assert "2 images explained" in result.stdout and "1 could not be explained" in result.stdout
    assert [name for name in tree(tmp_path / "maps") if name.endswith(".npz")] == ["a.1-dog.npz", "c.1-dog.npz"]


def test_disk_that_fills_up(models, photo, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dave_fast.files.os.replace", full)
    refused(explain(photo, "--out", tmp_path / "maps", code=2), "no space left on device")
    assert tree(tmp_path / "maps") == []


def test_debug_shows_the_traceback(photo, untouched):
    with pytest.raises(UnknownModelError):
        explain(photo, "--out", untouched, "--debug", model="no_such_model")


# The program as a process


def program(*arguments, cwd):
    command = [sys.executable, "-m", "dave_fast", *map(str, arguments)]
    root = os.path.dirname(os.path.dirname(os.path.abspath(dave_fast.__file__)))
    environment = os.environ | {"PYTHONPATH": root, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def test_demo(tmp_path):
    done = program("explain", "--demo", "--n-samples", 4, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    names = tree(tmp_path / "maps")
    assert {name.split(".", 2)[-1] for name in names} == {"figure.png", "overlay.png", "map.png", "npz"}
    assert "demo.top2.figure.png" in names
    picture = tmp_path / done.stdout.strip().splitlines()[-1].removeprefix("picture: ")
    assert size(picture)[0] > 1000


@pytest.mark.parametrize("more", ["photo", "--random-weights"])
def test_demo_takes_no_images_and_no_other_weights(photo, more):
    more = photo if more == "photo" else more
    refused(run("explain", more, "--demo", code=2), "--demo brings its own image")


def test_refusal_is_one_line(tmp_path):
    done = program("explain", "none.jpg", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: there is no file or folder none.jpg.\n"


def test_help_and_version_do_not_wait_for_torch(tmp_path):
    code = "import sys; from dave_fast.cli import app; print({'torch', 'timm', 'matplotlib'} & set(sys.modules))"
    root = os.path.dirname(os.path.dirname(os.path.abspath(dave_fast.__file__)))
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "set()", done.stderr
    assert program("--version", cwd=tmp_path).stdout.startswith("dave-fast ")


def test_settings_of_a_file_are_taken_unless_said_otherwise(photo, models, tmp_path):
    (tmp_path / "tuned.toml").write_text('model = "tiny"\nnoise_alpha = 0.25\nn_samples = 2\nshrink = false\n')
    quick = ("--precision", "fp32", "--backend", "torch", "--out", tmp_path / "out")
    others = ("--n-samples", 3, "--noise-alpha", 0.5, "--shrink")
    for options, expected in (((), (2, 0.25, False)), (others, (3, 0.5, True))):
        run("explain", photo, "--config", tmp_path / "tuned.toml", *quick, *options)
        arrays = only(tmp_path / "out")
        assert (arrays["n_samples"], arrays["noise_alpha"], arrays["shrink"]) == expected


@pytest.mark.parametrize(("options", "expected"), [((), True), (("--shrink",), True), (("--no-shrink",), False)])
def test_maps_are_shrunk_unless_told_otherwise(photo, models, tmp_path, options, expected):
    explain(photo, "--out", tmp_path / "maps", *options)
    assert only(tmp_path / "maps")["shrink"] == expected


# Depth


def test_pixels_are_the_default_depth_and_nothing_is_said_of_it(models, photo, tmp_path):
    result = explain(photo, "--out", tmp_path / "maps")
    assert only(tmp_path / "maps")["depth"] == "pixels"
    assert "depth" not in result.stdout and "account" not in result.stdout


@pytest.mark.parametrize("depth", ["1", "0.5", "auto"])
def test_one_other_depth_has_files_as_pixels_have_and_says_what_it_accounts_for(models, photo, tmp_path, depth):
    result = explain(photo, "--target", "dog", "--depth", depth, "--out", tmp_path / "maps")
    stem = "photo.1-dog.block1"
    assert tree(tmp_path / "maps") == [f"{stem}.map.png", f"{stem}.npz", f"{stem}.overlay.png"]
    assert "block 1 of 2: its tokens account for" in result.stdout and "of the logit" in result.stdout
    arrays = only(tmp_path / "maps")
    assert arrays["depth"] == "1"
    own = dave_fast.DAVE(tiny(), precision="fp32", backend="torch")
    image, _ = preprocessing(own.model)(read_image(photo))
    expected = own.explain(image, 1, 3, depth=1)
    np.testing.assert_array_equal(arrays["maps"], expected.maps.numpy())
    np.testing.assert_array_equal(arrays["raw"], expected.raw.numpy())


def test_several_depths_have_a_set_of_files_each_and_one_figure(models, photo, tmp_path):
    result = explain(photo, "--target", "dog", "--depth", "pixels, 0, 0.5, auto", "--out", tmp_path / "maps")
    stems = ["photo.1-dog.block0", "photo.1-dog.block1", "photo.1-dog"]
    files = [f"{stem}{end}" for stem in stems for end in (".map.png", ".npz", ".overlay.png")]
    assert tree(tmp_path / "maps") == sorted([*files, "photo.1-dog.pixels,block0,block1.figure.png"])
    assert [load(tmp_path / f"maps/{stem}.npz")["depth"] for stem in stems] == ["0", "1", "pixels"]
    assert result.stdout.count("tokens account for") == 2


def test_several_depths_and_targets_have_a_set_for_each_pair(models, photo, tmp_path):
    explain(photo, "--target", "dog", "--target", "cat-dog", "--depth", "pixels,1", "--out", tmp_path / "maps")
    stems = [name.removesuffix(".npz") for name in tree(tmp_path / "maps") if name.endswith(".npz")]
    assert stems == [f"photo.{target}{depth}" for target in ("0-cat_not_1-dog", "1-dog") for depth in (".block1", "")]


@pytest.mark.parametrize(
    ("depth", "words"),
    [
        ("deep", "depth 'deep' is unknown; expected 'pixels'"),
        ("1.5", "depth '1.5' is unknown"),
        ("", "depth '' is unknown"),
    ],
)
def test_words_that_are_no_depth_are_refused_before_the_model_is_loaded(models, photo, tmp_path, depth, words):
    result = explain(photo, "--depth", depth, "--out", tmp_path / "maps", model="never", code=2)
    assert words in " ".join(result.stderr.split()) and not (tmp_path / "maps").exists()


def test_a_block_that_the_model_lacks_is_refused(models, photo, tmp_path):
    result = explain(photo, "--depth", "2", "--out", tmp_path / "maps", code=2)
    assert "depth is block 2 and the model has the blocks 0 to 1" in " ".join(result.stderr.split())


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1", "cp1252"])
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize("name", ["\udcff.png", "a\udce4/…\udc80", "日本.png", "\ud800", "a.png"])
def test_names_that_a_terminal_has_no_bytes_for_are_printed(monkeypatch, encoding, stream, name):
    written = io.BytesIO()
    monkeypatch.setattr(sys, stream, io.TextIOWrapper(written, encoding, errors="strict"))
    monkeypatch.setattr(cli_app, "app", lambda: terminal.console(stderr=stream == "stderr").print(f"image: {name}"))
    cli_app.main()
    getattr(sys, stream).flush()
    assert written.getvalue() == f"image: {name}\n".encode(encoding, "backslashreplace")


@pytest.mark.parametrize("other", [io.StringIO(), None])
def test_streams_of_other_kinds_are_left_alone(monkeypatch, other):
    monkeypatch.setattr(sys, "stdout", other)
    terminal.print_any_name()
    assert sys.stdout is other


# Other methods


def test_several_methods_have_a_set_of_files_each_and_a_figure(models, photo, tmp_path):
    methods = ("--method", "dave", "--method", "Input-x-Gradient")
    result = explain(photo, "--out", tmp_path / "maps", "--target", "dog", *methods)
    ends = (".map.png", ".npz", ".overlay.png")
    assert tree(tmp_path / "maps") == sorted(
        [
            "photo.1-dog.dave,input-gradient.figure.png",
            *(f"photo.1-dog{method}{end}" for method in ("", ".input-gradient") for end in ends),
        ]
    )
    assert "method" in result.stdout and "input × gradient" in result.stdout
    named = [str(load(tmp_path / f"maps/photo.1-dog{method}.npz")["method"]) for method in ("", ".input-gradient")]
    assert named == ["DAVE", "input × gradient"]


def test_another_method_alone(models, photo, tmp_path):
    explain(photo, "--out", tmp_path / "maps", "--target", "dog", "--method", "frozen gradient")
    assert "photo.1-dog.frozen-gradient.overlay.png" in tree(tmp_path / "maps")


@pytest.mark.parametrize(
    ("options", "said"),
    [(("--method", "smothgrad"), "did you mean smoothgrad"), (("--method", "attnlrp"), "needs the package lxt")],
)
def test_method_that_is_not_there_is_refused_before_the_model_is_loaded(
    models, photo, tmp_path, monkeypatch, options, said
):
    monkeypatch.setattr(comparison, "find_spec", lambda name: None)
    assert said in explain(photo, "--out", tmp_path / "maps", *options, model="never", code=2).stderr


def test_difference_by_a_method_of_classes_is_refused(models, photo, tmp_path):
    options = ("--target", "dog-cat", "--method", "frozen-gradient")
    result = explain(photo, "--out", tmp_path / "maps", *options, code=2)
    assert "explains classes" in result.stderr and not (tmp_path / "maps").exists()
