"""Settings of Hugging Face's image processors as a preprocessing in timm's words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from PIL.Image import Resampling

from dave_fast.errors import ModelError
from dave_fast.images import describe_preprocessing


def preprocessing_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of an image processor under timm's keys.

    Raises:
        ModelError: it has a step that timm has no key for.
    """
    for step, value in (("do_rescale", False), ("do_resize", False), ("do_pad", True)):
        if values.get(step) is value:
            raise _unsupported(f"{step}={value}")
    if abs(values.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6:
        raise _unsupported(f"rescale_factor={values['rescale_factor']}")
    normalised = values.get("do_normalize", True)
    mean = values["image_mean"] if normalised else (0.0, 0.0, 0.0)
    std = values["image_std"] if normalised else (1.0, 1.0, 1.0)
    resize, crop = _resize(values["size"], values.get("crop_pct"))
    if crop is None and values.get("do_center_crop"):
        size = values["crop_size"]
        crop = (size, size) if isinstance(size, int) else (size["height"], size["width"])
    if crop is None:
        if isinstance(resize, int):
            raise _unsupported(f"images that keep their shape (size={values['size']} without a crop)")
        crop = resize
    interpolation = Resampling(values.get("resample", 3)).name.lower()
    return describe_preprocessing(crop, mean, std, resize=resize, interpolation=interpolation, crop_floor=True)


def _resize(size: Any, crop_pct: float | None) -> tuple[int | tuple[int, int], tuple[int, int] | None]:
    """Return the size to resize to (the shorter side, or both), and the crop that it implies, or None."""
    if isinstance(size, int):
        size = {"shortest_edge": size}
    if "height" in size:
        return (int(size["height"]), int(size["width"])), None
    if "shortest_edge" not in size or size.get("longest_edge"):
        raise _unsupported(f"size={dict(size)}")
    edge = int(size["shortest_edge"])
    if crop_pct is None:
        return edge, None
    # as ConvNeXt does: below 384 pixels a crop of a larger image, otherwise resized without keeping the aspect ratio
    return (int(edge / crop_pct), (edge, edge)) if edge < 384 else ((edge, edge), (edge, edge))


def _unsupported(what: str) -> ModelError:
    return ModelError(
        f"the model's image processor has {what}, which is not supported: prepare the images by it, and give them to "
        "DAVE.explain in Python."
    )
