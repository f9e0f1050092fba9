"""dave_fast.captum.DAVE in captum: the generic tests of its methods, its noise tunnel, its metrics.

captum's test suite runs its methods over models without attention, which DAVE refuses; what it asks of them is asked
here of a small transformer, with captum's own helpers.
"""

import unittest

import pytest
import torch
from captum.attr import Attribution, NoiseTunnel
from captum.attr import visualization as viz
from captum.metrics import infidelity, sensitivity_max
from captum.testing.helpers.basic import assertTensorAlmostEqual, assertTensorTuplesAlmostEqual
from torch import nn

import dave_fast
from dave_fast.captum import DAVE
from dave_fast.errors import InputError
from tests.tiny import random_vit

SIZE, SAMPLES = 16, 3
CHECK = unittest.TestCase()
pytestmark = pytest.mark.filterwarnings("ignore:the frozen route")


class Reshaped(nn.Module):
    """A model with outputs (B, 2, 3), whose targets are tuples."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x).view(-1, 2, 3)


class Scaled(Reshaped):
    """A model whose forward has an argument besides the images."""

    def forward(self, x, factor=1.0, classes=6):
        return factor * self.inner(x)[:, :classes]


@pytest.fixture(scope="module")
def model():
    return random_vit(img_size=SIZE, num_classes=6)


@pytest.fixture
def images():
    return torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def method(model):
    return DAVE(model, noise_alpha=0.3, precision="fp32")


def test_is_a_captum_attribution(model):
    found = method(model)
    assert isinstance(found, Attribution) and found.forward_func is model
    assert DAVE.get_name() == "D A V E"
    assert found.multiplies_by_inputs and not found.has_convergence_delta()
    with pytest.raises(NotImplementedError, match="attribute_future"):
        found.attribute_future(None)
    with pytest.raises(InputError, match=r"nn\.Module"):
        DAVE(lambda images: images)


def test_attributions_are_signed_and_mirror_the_inputs(model, images):
    inputs = images.double().requires_grad_()
    found = method(model).attribute(inputs, 2, n_samples=SAMPLES)
    assert found.shape == inputs.shape and found.dtype == torch.float64 and not found.requires_grad
    assert (found < 0).any() and inputs.grad is None
    expected = dave_fast.DAVE(model, noise_alpha=0.3, precision="fp32").explain(images, 2, SAMPLES).raw
    assert torch.equal(found.float(), expected)
    of_tuple = method(model).attribute((inputs,), 2, n_samples=SAMPLES)
    assert isinstance(of_tuple, tuple) and len(of_tuple) == 1
    assertTensorTuplesAlmostEqual(CHECK, of_tuple, (found,))
    with pytest.raises(InputError, match="2 inputs"):
        method(model).attribute((images, images), 2)


@pytest.mark.parametrize("tunnel", [False, True], ids=["alone", "noise tunnel"])
@pytest.mark.parametrize(
    "target",
    [[0, 1, 5], torch.tensor([4, 4, 2]), torch.tensor([1]), [(1, 0), (0, 2), (1, 1)]],
    ids=["list", "tensor", "one in a tensor", "tuples"],
)
def test_targets_of_a_batch_are_those_of_its_examples(model, images, target, tunnel):
    """captum's tests/attr/test_targets.py: one example with its target, and with a list of one, as in the batch."""
    found = method(Reshaped(model).eval() if isinstance(target[0], tuple) else model)
    # noise of a standard deviation that does not show, since captum draws it from the global generator
    settings = {"n_samples": SAMPLES} | ({"nt_samples": 2, "stdevs": 1e-9} if tunnel else {})
    attribute = (NoiseTunnel(found) if tunnel else found).attribute
    together = attribute(images, target=target, **settings)
    for i in range(3):
        of_one = target[i] if len(target) == 3 else target
        alone = attribute(images[i : i + 1], target=of_one, **settings)
        assertTensorAlmostEqual(CHECK, together[i : i + 1], alone, delta=1e-4, mode="max")
        if len(target) == 3:
            alone = attribute(images[i : i + 1], target=target[i : i + 1], **settings)
            assertTensorAlmostEqual(CHECK, together[i : i + 1], alone, delta=1e-4, mode="max")


def test_one_score_an_image_needs_no_target(model, images):
    class Score(Reshaped):
        def forward(self, x):
            return self.inner(x)[:, 1]

    found = method(Score(model).eval()).attribute(images, n_samples=SAMPLES)
    assertTensorAlmostEqual(CHECK, found, method(model).attribute(images, 1, n_samples=SAMPLES), delta=1e-4, mode="max")


def test_targets_that_do_not_fit_are_refused(model, images):
    for target in ([0, 1], (1, 0), 6):
        with pytest.raises(InputError):
            method(model).attribute(images, target)


def test_arguments_behind_the_images_are_passed_on(model, images):
    scaled = Scaled(model).eval()
    one = method(scaled).attribute(images, 1, n_samples=SAMPLES)
    three = method(scaled).attribute(images, 1, (3.0, 4), n_samples=SAMPLES)
    assertTensorAlmostEqual(CHECK, three, 3 * one, delta=1e-4, mode="max")
    tunnel = NoiseTunnel(method(scaled)).attribute(
        images, target=1, additional_forward_args=3.0, n_samples=SAMPLES, nt_samples=2, stdevs=1e-9
    )
    assertTensorAlmostEqual(CHECK, tunnel, 3 * one, delta=1e-3, mode="max")
    with pytest.raises(InputError, match="out of range"):
        method(scaled).attribute(images, 5, (3.0, 4))
    with pytest.raises(InputError, match="same for all"):
        method(scaled).attribute(images, 1, (torch.ones(3),))


@pytest.mark.parametrize("kind", ["smoothgrad", "smoothgrad_sq", "vargrad"])
def test_every_kind_of_noise_tunnel(model, images, kind):
    torch.manual_seed(0)
    found = NoiseTunnel(method(model)).attribute(
        images, nt_type=kind, target=[1, 2, 3], nt_samples=3, nt_samples_batch_size=2, stdevs=0.2, n_samples=SAMPLES
    )
    assert found.shape == images.shape and found.isfinite().all() and found.any()


def test_no_hook_stays_and_no_gradient_either(model, images):
    """captum's tests/attr/test_hook_removal.py, after a success and after an error."""
    before = {name: p.clone() for name, p in model.named_parameters()}
    method(model).attribute(images, 1, n_samples=1)
    with pytest.raises(InputError):
        method(model).attribute(images, 77)
    for module in model.modules():
        assert not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)
    assert all(p.grad is None and torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_captums_metrics_take_it(model, images):
    torch.manual_seed(0)
    found = method(model)
    attributions = found.attribute(images, 1, n_samples=SAMPLES)

    def perturb(inputs):
        noise = 0.01 * torch.randn_like(inputs)
        return noise / inputs, inputs - noise

    scores = infidelity(model, perturb, images, attributions, target=1, n_perturb_samples=4)
    assert scores.shape == (3,) and (scores >= 0).all() and scores.isfinite().all()
    settings = dict(n_perturb_samples=2, target=1, n_samples=SAMPLES)
    small = sensitivity_max(found.attribute, images, perturb_radius=1e-7, **settings)
    large = sensitivity_max(found.attribute, images, perturb_radius=0.1, **settings)
    # the seed is fixed: images that hardly differ have maps that hardly differ
    assert (small < 1e-3).all() and (large > small).all()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_captums_pictures_take_it(model, images):
    found = method(model).attribute(images[:1], 1, n_samples=SAMPLES)
    heat, photograph = (t[0].permute(1, 2, 0).numpy() for t in (found, images.clamp(0, 1)))
    figure, _ = viz.visualize_image_attr(heat, photograph, "blended_heat_map", "all", use_pyplot=False)
    assert figure.axes
