"""Test operands that do not fit, by `tests/ops/fuzz.py`: an error in words, or the same defined result again."""

from __future__ import annotations

import os
from collections import Counter

import pytest

from dave_fast.ops import _ext
from tests.ops import fuzz

pytestmark = [
    pytest.mark.skipif(_ext.unavailable() is not None, reason=str(_ext.unavailable())),
    pytest.mark.usefixtures("serial_cuda_kernels"),
    pytest.mark.filterwarnings("ignore:Casting complex values:UserWarning"),
]


def test_operands_that_do_not_fit_are_refused_or_have_a_defined_result():
    ended = Counter(map(fuzz.run, range(500)))
    # neither is what all cases do: there are operands that fit, and checks
    assert min(ended["refused"], ended["defined"]) > 150


@pytest.mark.slow
def test_many_more_of_them():
    first = int(os.environ.get("DAVE_FAST_FUZZ_FIRST", "1000"))
    ended = Counter(map(fuzz.run, range(first, first + int(os.environ.get("DAVE_FAST_FUZZ", "20000")))))
    assert ended.total() == ended["refused"] + ended["defined"]
