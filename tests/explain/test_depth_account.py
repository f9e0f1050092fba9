"""What each depth accounts for, told: the sentence, the table, the figure."""

import numpy as np
import pytest
import torch

from dave_fast.errors import InputError
from dave_fast.explain.depth_account import Depths, sentence

ORANGE, BLUE = (232, 113, 60), (59, 127, 196)


def depths(*shape, blocks=2):
    """Return depths whose score is 4, of which pixels carry 1, patches 1.5 and prefix tokens −0.5 of each block."""
    full = torch.full
    return Depths(full(shape, 4.0), full(shape, 1.0), full((*shape, blocks), 1.5), full((*shape, blocks), -0.5))


def share(picture, colour):
    return (np.abs(np.asarray(picture).astype(int) - colour).max(-1) <= 2).mean()


def test_sentence_of_a_block():
    words = sentence(depths(), 1, "logit")
    assert words == "block 1 of 2: its tokens account for 1 of the logit 4, biases behind it for 3; pixels for 1"


def test_table_of_one_image_has_a_line_for_the_pixels_and_each_block():
    lines = str(depths(1)).splitlines()
    assert lines[0] == "score 4"
    assert lines[1].split() == ["patches", "prefix", "tokens", "biases", "behind", "tokens'", "share"]
    assert [line.split() for line in lines[2:5]] == [
        ["pixels", "1", "3", "25", "%"],
        ["block", "0", "1.5", "-0.5", "3", "25", "%"],
        ["block", "1", "1.5", "-0.5", "3", "25", "%"],
    ]
    assert len(lines) == 6 and "position embedding" in lines[5]


def test_table_of_several_images_and_targets_names_them():
    heads = [line for line in depths(2, 2).summary().splitlines() if "score" in line]
    assert heads == [f"image {image}, target {target}: score 4" for image in (0, 1) for target in (0, 1)]


def test_share_of_a_score_of_zero_is_a_dash():
    none = Depths(torch.zeros(1), torch.ones(1), torch.ones(1, 1), torch.ones(1, 1))
    assert none.summary().splitlines()[2].endswith("–")


def test_figure_has_bars_in_the_colours_of_patches_and_prefix_tokens_and_a_row_for_each_image():
    one, several = depths(1).show(), depths(3).show()
    assert one.mode == "RGB" and several.width == one.width and several.height > 2 * one.height
    assert share(one, ORANGE) > 2 * share(one, BLUE) > 0.02
    silent = depths(1).map(torch.zeros_like).show()
    assert share(silent, ORANGE) < 0.01


def test_figure_of_more_rows_than_fit_is_refused():
    with pytest.raises(InputError, match=r"there are 33 images and targets; .* at most 32 rows"):
        depths(33).show()
