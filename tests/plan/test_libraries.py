"""Plans of models of transformers, torchvision and open_clip against the frozen route, in float64."""

from dataclasses import replace

import pytest
import torch

from dave_fast.ops.patches import patchify
from tests.libraries import LIBRARIES, ONE_SIZE
from tests.tolerances import EXACT
from tests.toys import engine_of, frozen_vjp, relative


def images_of(variant, size):
    return replace(variant, size=size).images(3, torch.float64)


@pytest.mark.parametrize("resized", [False, True], ids=["own", "other"])
@pytest.mark.parametrize("name", LIBRARIES)
def test_float64_agrees_with_the_frozen_route(name, resized):
    if resized and name in ONE_SIZE:
        return
    variant = LIBRARIES[name]
    model, images = variant.build(torch.float64), images_of(variant, (32, 16) if resized else variant.size)
    engine = engine_of(model, images.shape[2:], dtype=torch.float64)
    output, saved = engine.forward(patchify(images, engine.plan.patch_size))
    cotangent = torch.randn(output.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    found = engine.vjp(saved, cotangent)
    expected_output, expected = frozen_vjp(model, images, lambda output: (output * cotangent).flatten(1).sum(1))
    assert relative(output, expected_output) < EXACT
    assert relative(found, patchify(expected, engine.plan.patch_size)) < EXACT
