"""Tests of explanations of photographs: the same numbers as for tensors, words, pictures, files."""

import io
import pickle
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import dave_fast
from dave_fast.errors import ImageError, InputError, InputWarning, ModelError
from dave_fast.explain.pictures import MOST_SHOWN
from dave_fast.images import screen
from dave_fast.targets import Class, Contrast, Patch, Similarity, Sum, tokens_of
from tests.tiny import named_vit, random_vit

NAMES = ["cat", "dog", "house cat", "tiger, Panthera tigris", "lion"]
SETTINGS = {"precision": "fp32", "noise_alpha": 0.5}
generator = np.random.default_rng(0)
WIDE, TALL = (generator.integers(0, 256, (*size, 3), np.uint8) for size in ((60, 100), (90, 70)))


@pytest.fixture(scope="module")
def explainer():
    return dave_fast.DAVE(named_vit(NAMES), **SETTINGS)


def explain(explainer, images, *arguments, **settings):
    return explainer.explain(images, *arguments, **({"n_samples": 3} | settings))


def same(one, other):
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("maps", "raw", "signed", "target"))


# Photographs in.


def test_photographs_are_explained_as_their_prepared_tensors(explainer):
    tensors = torch.stack([explainer.prepare(Image.fromarray(each))[0] for each in (WIDE, TALL)])
    assert same(explain(explainer, [WIDE, TALL]), explain(explainer, tensors))
    assert same(explain(explainer, WIDE), explain(explainer, tensors[:1]))


def test_unreadable_photograph_of_several_is_named(explainer):
    with pytest.raises(ImageError, match="image 1: cannot read"):
        explain(explainer, [WIDE, b"none"])


def test_model_of_other_channels_refuses_photographs_and_takes_tensors():
    model = random_vit(in_chans=4)
    model.pretrained_cfg = {"input_size": (4, 32, 32)}
    explainer = dave_fast.DAVE(model, **SETTINGS)
    with pytest.raises(InputError, match="4 channels"):
        explain(explainer, WIDE)
    found = explain(explainer, torch.randn(1, 4, 32, 32))
    with pytest.raises(InputError, match="no picture of the input: the model takes 4 channels"):
        found.overlay()


def test_preprocessing_that_its_owner_changed_is_the_new_one():
    model = named_vit(NAMES)
    explainer = dave_fast.DAVE(model, **SETTINGS)
    explain(explainer, WIDE)
    model.pretrained_cfg["mean"] = (0.0, 0.0, 0.0)
    assert same(explain(explainer, WIDE), explain(dave_fast.DAVE(model, **SETTINGS), WIDE))
    model.set_input_size((48, 48))
    assert explain(explainer, WIDE).maps.shape == (1, 48, 48)


@pytest.mark.parametrize(
    "wrong",
    [{"mean": "x"}, {"mean": (0.5, 0.5)}, {"std": (0, 0, 0)}, {"interpolation": "magic"}, {"input_size": (3,)}],
    ids=str,
)
def test_preprocessing_that_cannot_be_read_is_refused_for_photographs_alone(wrong):
    model = named_vit(NAMES)
    model.pretrained_cfg |= wrong
    explainer = dave_fast.DAVE(model, **SETTINGS)
    for _ in range(2):
        with pytest.raises(ModelError, match=r"pretrained_cfg, cannot be read|of pixels is .*; expected 3 numbers"):
            explain(explainer, WIDE)
    found = explain(explainer, torch.randn(1, 3, 32, 32))
    with pytest.raises(InputError, match="there is no picture of the input"):
        found.overlay()


def test_one_number_of_a_mean_is_that_of_all_channels():
    models = [named_vit(NAMES) for _ in range(2)]
    for model, count in zip(models, (1, 3), strict=True):
        model.pretrained_cfg |= {"mean": (0.5,) * count, "std": (0.25,) * count}
    one, other = (dave_fast.DAVE(model, **SETTINGS) for model in models)
    assert same(explain(one, WIDE), explain(other, WIDE))
    inputs = one.prepare(Image.fromarray(WIDE))[0]
    assert (explain(one, inputs).views[0].crop == explain(one, WIDE).views[0].crop).all()


@pytest.mark.parametrize(
    ("images", "told"),
    [
        (torch.randint(0, 256, (1, 3, 32, 32)).float(), True),
        (torch.linspace(0, 1, 3 * 32 * 32).view(1, 3, 32, 32), True),
        (torch.randn(4, 3, 32, 32), False),
        (torch.zeros(1, 3, 32, 32), False),
        (torch.full((1, 3, 32, 32), 0.5), False),
        (torch.linspace(0, 0.7, 3 * 32 * 32).view(1, 3, 32, 32), False),
        (torch.linspace(-2, 2.6, 3 * 32 * 32).view(1, 3, 32, 32), False),
    ],
    ids=["0..255", "0..1", "noise", "zeros", "grey", "0..0.7", "normalised"],
)
def test_images_that_are_not_normalised_are_told(explainer, images, told):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        explain(explainer, images, n_samples=1)
    assert [each.category for each in found] == [InputWarning] * told
    assert not told or ("expects" in str(found[0].message) and found[0].filename == __file__)


def test_model_that_takes_pixels_from_0_to_1_says_nothing_of_them():
    model = named_vit(NAMES)
    model.pretrained_cfg |= {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    explain(dave_fast.DAVE(model, **SETTINGS), torch.linspace(0, 1, 3 * 32 * 32).view(1, 3, 32, 32), n_samples=1)


def test_module_whose_configuration_is_odd_takes_tensors():
    model = named_vit(NAMES)
    model.pretrained_cfg = {"input_size": "all", "mean": None}
    found = explain(dave_fast.DAVE(model, **SETTINGS), torch.randn(1, 3, 32, 32), n_samples=1)
    with pytest.raises(InputError, match="no picture of the input"):
        found.show()


# Targets as text.


def test_targets_as_text_are_classes_by_name(explainer):
    found = explain(explainer, WIDE, targets=["tiger", "tiger-lion", "dog+lion"])
    wanted = explain(explainer, WIDE, targets=[3, Contrast(3, 4), Sum(1, 4)])
    assert same(found, wanted)
    assert [name for _, name, _ in found.answers()[0]] == ["tiger", "tiger − lion", "dog + lion"]
    assert same(explain(explainer, WIDE, "tiger"), explain(explainer, WIDE, 3))


def test_unknown_class_as_text_is_refused(explainer):
    with pytest.raises(InputError, match="no class has it"):
        explain(explainer, WIDE, "zebra")


# Words.


def test_repr_has_four_lines_with_names_and_settings(explainer, tmp_path):
    Image.fromarray(WIDE).save(tmp_path / "photo.png")
    lines = repr(explain(explainer, str(tmp_path / "photo.png"), "lion", seed=7)).splitlines()
    assert len(lines) == 4 and max(map(len, lines)) < 160
    assert "1 image" in lines[0] and "(1, 32, 32)" in lines[0]
    assert "photo.png: lion" in lines[1] and "%" in lines[1]
    assert "3 samples, seed 7, noise_alpha = 0.5, shrunk" in lines[2] and ".save(" in lines[3]


@pytest.mark.parametrize("settings", [{}, {"top_k": 5}, {"targets": [0, 1]}, {"depth": ["pixels", 1]}])
def test_repr_of_a_batch_is_as_short(explainer, settings):
    assert len(repr(explain(explainer, [WIDE] * 5, **settings)).splitlines()) == 4


def test_explainer_says_what_it_is(explainer):
    assert "fp32" in repr(explainer) and "noise_alpha = 0.5" in repr(explainer)


def test_answers_name_each_kind_of_target(explainer):
    targets = [None, 1, Class("lio"), Contrast([0, 1], 2), lambda output: output[:, 0], Sum(Class("cat"), Class("3"))]
    found = explain(explainer, [WIDE, TALL], targets=targets)
    predicted = found.output.argmax(1).tolist()
    assert [[name for _, name, _ in of] for of in found.answers()] == [
        [NAMES[k].split(",")[0], "dog", "lion", "target − house cat", "score", "cat + tiger"] for k in predicted
    ]
    assert [k for k, _, _ in found.answers()[0]] == [predicted[0], 1, 4, -1, -1, -1]


def test_top_classes_are_those_of_the_output(explainer):
    found = explain(explainer, [WIDE, TALL])
    likely = found.output.softmax(1).sort(1, descending=True)
    for b, of in enumerate(found.top(3)):
        assert [k for k, _, _ in of] == likely.indices[b, :3].tolist()
        np.testing.assert_allclose([p for _, _, p in of], likely.values[b, :3], rtol=1e-6)
    assert len(found.top(99)[0]) == len(NAMES)


def test_embedding_has_no_classes():
    explainer = dave_fast.DAVE(random_vit(num_classes=0), **SETTINGS)
    found = explain(explainer, torch.randn(1, 3, 32, 32), Similarity(torch.randn(24), words="“a cat”"))
    assert found.top() == [[]] and found.answers()[0][0][:2] == (-1, "“a cat”") and "“a cat”" in repr(found)


# Parts.


@pytest.mark.parametrize("settings", [{}, {"top_k": 2}, {"depth": ["pixels", 1]}, {"top_k": 2, "depth": [1, "pixels"]}])
def test_parts_of_a_batch_are_their_own_explanations(explainer, settings):
    found, alone = explain(explainer, [WIDE, TALL], **settings), explain(explainer, TALL, **settings)
    assert len(found) == 2 and len(list(found)) == 2
    for one in (found[1], found[-1], found[1:], list(found)[1]):
        assert one.target.equal(alone.target) and one.views[0].crop.tobytes() == alone.views[0].crop.tobytes()
        torch.testing.assert_close(one.maps, alone.maps)
        torch.testing.assert_close(one.probability, alone.probability)
    if "depth" in settings:
        torch.testing.assert_close(found[1].depths.patches, alone.depths.patches)
    with pytest.raises(InputError, match="number of an image"):
        found[2]


def test_one_target_at_one_depth_is_its_own_explanation(explainer):
    found = explain(explainer, [WIDE, TALL], targets=[0, Contrast(3, 4)], depth=["pixels", 1])
    alone = explain(explainer, [WIDE, TALL], Contrast(3, 4), depth=1)
    one = found.only(1, 1)
    assert same(one, alone) and one.depth == 1 and one.contrasts == alone.contrasts == (True,)
    assert one.answers()[0][0][:2] == alone.answers()[0][0][:2] == (-1, "tiger − lion")
    assert torch.equal(one.depths.score, alone.depths.score)


@pytest.mark.parametrize("make", [lambda found: found, lambda found: found.only(1, 1)], ids=["several", "one"])
def test_target_or_depth_that_is_not_there_is_refused(explainer, make):
    found = make(explain(explainer, WIDE, targets=[0, Contrast(3, 4)], depth=["pixels", 1]))
    for place in ({"target": 2}, {"target": -3}, {"target": "a"}, {"level": 2}):
        with pytest.raises(InputError, match=f"the number of the {'depth' if 'level' in place else 'target'} is"):
            found.only(**place)
        with pytest.raises(InputError, match="the number of the"):
            found.overlay(**place)


def test_targets_and_depths_count_from_the_end_too(explainer):
    found = explain(explainer, WIDE, targets=[0, Contrast(3, 4)], depth=["pixels", 1])
    one = found.only(-1, -1)
    assert same(one, found.only(1, 1)) and repr(one) == repr(found.only(1, 1)) and one.contrasts == (True,)


@pytest.mark.parametrize("image", [2, -1, "a"])
def test_picture_of_an_image_that_is_not_there_is_refused(explainer, image):
    with pytest.raises(InputError, match="the number of the image is"):
        explain(explainer, [WIDE, TALL]).overlay(image)


def test_batch_backwards(explainer):
    found = explain(explainer, [WIDE, TALL])
    back = found[::-1]
    assert torch.equal(back.maps, found.maps.flip(0)) and back.answers() == found.answers()[::-1]
    assert back.views == found.views[::-1]


def test_no_images_have_words_and_no_picture(explainer, tmp_path):
    none = explain(explainer, [WIDE, TALL], top_k=2)[2:]
    assert len(none) == 0 and none.answers() == none.top() == [] and repr(none).startswith("DAVE of 0 images")
    with pytest.raises(InputError, match="0 images"):
        none.save(tmp_path / "none.png")


def test_one_of_a_batch_does_not_keep_the_others(explainer):
    found = explain(explainer, [WIDE] * 8)
    assert found[3].raw.untyped_storage().nbytes() * 8 == found.raw.untyped_storage().nbytes()


def test_explanations_can_be_compared_and_are_equal_to_themselves(explainer):
    found, other = explain(explainer, WIDE), explain(explainer, WIDE)
    assert found in [other, found] and found != other and len({found, other}) == 2


# Pictures.


@pytest.mark.parametrize("photograph", [WIDE, TALL], ids=["wide", "tall"])
def test_overlay_has_the_size_asked_for(explainer, photograph):
    found = explain(explainer, photograph)
    sizes = {"original": photograph.shape[1::-1], "model": (32, 32), "enlarged": (448, 448)}
    for name, size in sizes.items():
        assert found.overlay(size=name).size == found.picture(size=name).size == size
    with pytest.raises(InputError, match="expected one of original, model, enlarged"):
        found.overlay(size="full")


def test_map_lies_on_the_part_of_the_photograph_that_the_model_saw(explainer):
    photograph = np.zeros((64, 128, 3), np.uint8)
    found = explain(explainer, photograph)
    heat = torch.zeros(1, 32, 32)
    heat[0, 8, 24] = 1
    # the crop is the middle, 64 pixels wide
    drawn = np.asarray(dave_fast.Explanation(**(vars(found) | {"maps": heat})).picture(), int).sum(2)
    at = np.argwhere(drawn > drawn.max() / 2).mean(0)
    np.testing.assert_allclose(at, [2 * 8.5 - 0.5, 32 + 2 * 24.5 - 0.5], atol=0.6)


def test_overlay_of_a_tensor_shows_the_tensor(explainer):
    crop = np.asarray(Image.fromarray(WIDE).resize((32, 32)))
    inputs = explainer.prepare(Image.fromarray(crop))[0]
    found = explain(explainer, inputs)
    assert (found.views[0].crop == crop).all() and found.overlay().size == (32, 32)


def test_pictures_of_contrasts_have_two_colours_and_others_one(explainer):
    found = explain(explainer, WIDE, targets=[3, Contrast(3, 4)])
    blue = [np.asarray(found.picture(target=k, size="model"), int) @ [-1, 0, 1] for k in (0, 1)]
    assert found.contrasts == (False, True) and blue[1].max() > 150
    assert (np.asarray(found.picture(target=1, signed=False)) != np.asarray(found.picture(target=1))).any()
    assert (np.asarray(found.picture(target=0, signed=True)) != np.asarray(found.picture(target=0))).any()
    assert found.heat(target=1).min() < 0 <= found.heat(target=0).min()
    np.testing.assert_allclose(np.abs(found.heat(target=1)).max(), 1)


def test_signed_map_has_the_signs_of_the_evidence(explainer):
    found = explain(explainer, WIDE)
    mirrored = dave_fast.Explanation(**(vars(found) | {"signed": -found.signed}))
    torch.testing.assert_close(found.signed_maps, -mirrored.signed_maps)


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        ({}, (100, 60)),
        ({"top_k": 2}, None),
        ({"depth": ["pixels", 1]}, None),
    ],
)
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_saved_picture_is_the_overlay_of_one_map_and_the_figure_of_several(explainer, tmp_path, settings, size, suffix):
    path = explain(explainer, WIDE, **settings).save(tmp_path / f"new/map{suffix}")
    with Image.open(path) as picture:
        assert picture.size == size if size else picture.width > 300


@pytest.mark.parametrize(("suffix", "signature"), [(".pdf", b"%PDF"), (".svg", b"<?xml"), (".npz", b"PK")])
def test_other_files(explainer, tmp_path, suffix, signature):
    assert explain(explainer, WIDE).save(tmp_path / f"a{suffix}").read_bytes().startswith(signature)


def test_picture_too_large_for_its_format_is_refused(explainer, tmp_path):
    with pytest.raises(InputError, match=r"cannot write .*map\.webp: .* 16383 pixels"):
        explain(explainer, np.zeros((32, 16384, 3), np.uint8)).save(tmp_path / "map.webp")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["map", "map.txt", "map.npy"])
def test_file_of_no_picture_is_refused(explainer, tmp_path, name):
    with pytest.raises(InputError, match=r"expected \.png"):
        explain(explainer, WIDE).save(tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrong", [{"opacity": 3}, {"quantile": np.nan}, {"colormap": 3}, {"signed": "no"}], ids=str)
def test_wrong_value_of_a_style_is_refused(explainer, wrong):
    with pytest.raises(InputError, match=r"opacity is 3|quantile is nan|no colour map 3|signed is 'no'"):
        explain(explainer, WIDE).overlay(**wrong)


def test_number_of_a_style_may_be_text(explainer):
    found = explain(explainer, WIDE)
    one, other = (found.overlay(opacity=kind("0.5"), quantile=kind("0.9")) for kind in (str, float))
    assert one == other != found.overlay()


def test_notebook_shows_a_picture(explainer):
    for found in (explain(explainer, WIDE), explain(explainer, [WIDE, TALL], top_k=2)):
        with Image.open(io.BytesIO(found._repr_png_())) as picture:
            assert picture.format == "PNG" and picture.width > 600
        assert "data:image/png;base64," in found._repr_html_() and "noise_alpha = 0.5" in found._repr_html_()


def test_notebook_shows_words_where_there_is_no_picture(explainer):
    model = random_vit(in_chans=4)
    of_four_channels = explain(dave_fast.DAVE(model, **SETTINGS), torch.randn(1, 4, 32, 32))
    for found in (explain(explainer, np.stack([WIDE] * (MOST_SHOWN + 1)), n_samples=1), of_four_channels):
        assert found._repr_png_() is None
        assert "<img" not in found._repr_html_() and "samples, seed 0" in found._repr_html_()


def test_many_images_are_too_many_for_a_picture(explainer):
    found = explain(explainer, np.stack([WIDE] * (MOST_SHOWN + 1)), n_samples=1)
    with pytest.raises(InputError, match=rf"{MOST_SHOWN + 1} images; a picture has 1 to {MOST_SHOWN}"):
        found.show()


def test_show_without_a_screen_says_what_to_do(explainer, monkeypatch):
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(screen.sys, "platform", "linux")
    with pytest.raises(InputError, match=r"\.save\("):
        explain(explainer, WIDE).show()


def test_show_gives_the_figure_to_the_systems_program(explainer, monkeypatch):
    given = []
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(screen.ImageShow, "show", lambda image, title: given.append(image.size) or True)
    explain(explainer, WIDE).show(colormap="viridis")
    assert len(given) == 1 and given[0][0] > 600


def test_plot_draws_into_the_axes_given(explainer):
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    assert explain(explainer, WIDE, "lion").plot(axes) is axes
    assert axes.images and "lion" in axes.get_title() and "%" in axes.get_title()


def test_file_that_is_gone_is_told_and_its_crop_still_drawn(explainer, tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(WIDE).save(path)
    found = explain(explainer, path)
    path.unlink()
    with pytest.raises(ImageError, match="no such file"):
        found.overlay()
    assert found.overlay(size="model").size == (32, 32) and found.figure().axes


# Arrays.


def test_dictionary_has_the_arrays_of_the_file(explainer, tmp_path):
    found = explain(explainer, WIDE, top_k=2)
    with np.load(found.save_npz(tmp_path / "a.npz"), allow_pickle=False) as kept:
        made = found.to_dict()
        assert set(kept) == set(made)
        for name in kept:
            np.testing.assert_array_equal(kept[name], made[name])
    assert made["maps"].shape == (2, 32, 32) and made["raw"].shape == (2, 3, 32, 32)
    assert list(made["class_names"]) == [name for _, name, _ in found.answers()[0]]
    assert (made["input"] == found.views[0].crop).all() and made["noise_alpha"] == 0.5


def test_dictionary_of_several_depths_has_a_dimension_for_them(explainer):
    made = explain(explainer, WIDE, top_k=2, depth=["pixels", 1]).to_dict()
    assert made["maps"].shape == (2, 2, 32, 32) and made["raw"].shape == (2, 2, 3, 32, 32)
    assert made["depth"] == "pixels,1"


def test_dictionary_of_several_images_says_to_choose_one(explainer):
    with pytest.raises(InputError, match=r"found\[0\]"):
        explain(explainer, [WIDE, TALL]).to_dict()


def test_explanation_can_be_pickled(explainer, tmp_path):
    found = explain(explainer, WIDE, top_k=2)
    again = pickle.loads(pickle.dumps(found))
    assert same(found, again) and (np.asarray(again.overlay()) == np.asarray(found.overlay())).all()
    assert repr(again) == repr(found)


def test_tokens_are_named_by_their_place():
    explainer = dave_fast.DAVE(tokens_of(named_vit(NAMES)), **SETTINGS)
    found = explain(explainer, WIDE, Patch(1, 2))
    assert found.answers()[0][0][1] == "patch 1, 2" and found.overlay().size == (100, 60)


def test_progress_is_shown_and_told(explainer, capsys):
    told = []
    explain(
        explainer, WIDE, n_samples=9, internal_batch_size=3, progress=lambda done, total: told.append((done, total))
    )
    assert told[-1] == (9, 9)
    explain(explainer, WIDE, progress=True)
    captured = capsys.readouterr()
    assert "3 of 3" in captured.err and captured.err.endswith(" \r") and not captured.out
    explain(explainer, WIDE, progress=False)
    assert not capsys.readouterr().err


def test_own_module_is_explained_from_a_photograph():
    explainer = dave_fast.DAVE(nn.Sequential(random_vit()), **SETTINGS)
    with pytest.warns(
        InputWarning, match="names no preprocessing: that of ImageNet at 32×32 is used. If that is another"
    ):
        assert explain(explainer, WIDE).maps.shape[0] == 1
