"""Tests of the comparison of workers before a run begins."""

from types import SimpleNamespace

import pytest

from dave_fast.errors import InputError
from dave_fast.run.local import _Parent
from dave_fast.run.messages import Hello


def hello(device, weights="w", **configuration):
    return Hello({"precision": "fp32", "backend": "torch"} | configuration, weights, [], device, 8)


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (hello("cuda:0", precision="bf16"), r"\(precision fp32 and bf16\)"),
        (hello("cuda:0", backend="triton"), r"\(backend torch and triton\)"),
        (hello("cuda:0", weights="v"), r"\(weights w and v\)"),
        (hello("cuda:0", more=1), r"\(more nothing and 1\)"),
    ],
)
def test_workers_of_different_maps_are_refused_with_the_difference(other, named):
    workers = [SimpleNamespace(hello=each) for each in (hello("cpu"), other)]
    with pytest.raises(InputError, match=rf"cpu and cuda:0 would make different maps {named}"):
        _Parent._begin(SimpleNamespace(workers=workers))
