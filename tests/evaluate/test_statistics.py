"""Test intervals, paired differences and verdicts."""

import math

import numpy as np
import pytest

from dave_fast.evaluate.statistics import over_images, over_seeds, paired, verdict


def test_intervals_leave_nan_out_and_hold_the_mean():
    scores = [*np.linspace(0, 1, 101), math.nan]
    found = over_images(scores)
    assert found.n == 101
    assert found.mean == pytest.approx(0.5)
    assert found.low < 0.5 < found.high
    assert found.high - found.low == pytest.approx(2 * 1.96 * 0.2915 / 101**0.5, rel=0.1)
    assert over_images([math.nan]).n == 0


def test_bootstrap_intervals_hold_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(3)
    held = [over_images(rng.exponential(1, 60)) for _ in range(200)]
    assert 0.88 <= np.mean([i.low <= 1 <= i.high for i in held]) <= 0.99


def test_paired_differences_use_the_images_that_both_scored():
    found = paired([1.0, 2.0, math.nan, 4.0], [0.5, math.nan, 1.0, 3.5])
    assert (found.mean, found.low, found.high, found.n) == (0.5, 0.5, 0.5, 2)
    with pytest.raises(ValueError, match="same images"):
        paired([1.0], [1.0, 2.0])


def test_intervals_over_seeds_are_students():
    stats = pytest.importorskip("scipy.stats")
    means = [0.41, 0.43, 0.425, 0.44]
    low, high = stats.t.interval(0.95, 3, np.mean(means), stats.sem(means))
    found = over_seeds(means)
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-3)


RNG = np.random.default_rng(0)
HARD = RNG.normal(0, 1, 100)


@pytest.mark.parametrize(
    ("scores", "higher", "words"),
    [
        pytest.param({"DAVE": HARD + 5, "a": HARD, "b": HARD - 1}, True, "intervals apart", id="apart"),
        pytest.param({"DAVE": HARD + 0.1, "a": HARD, "b": HARD - 5}, True, "ahead image by image", id="touching"),
        pytest.param({"DAVE": HARD, "a": HARD + 0.1, "b": HARD - 5}, True, "behind a", id="behind one"),
        pytest.param({"DAVE": HARD, "a": RNG.permutation(HARD)}, True, "not told apart from a", id="even"),
        pytest.param({"DAVE": HARD - 5, "a": HARD}, False, "intervals apart", id="less is better"),
        pytest.param({"DAVE": HARD, "a": HARD - 0.1}, False, "behind a", id="less is better, behind"),
    ],
)
def test_verdicts_in_words(scores, higher, words):
    found = verdict(scores, higher)
    assert found.words.endswith(words)
    assert found.rival == "a"


def test_a_handful_of_images_decides_nothing():
    assert verdict({"DAVE": [2.0, 3.0], "a": [1.0, 1.0]}, True).words == "too few images to tell (2)"


def test_there_is_no_verdict_without_a_rival_or_a_score():
    assert verdict({"DAVE": [1.0]}, True) is None
    assert verdict({"DAVE": [math.nan], "a": [math.nan]}, True) is None
