"""Read photographs, prepare them for a model, and draw maps.

    reading      image files -> 8-bit RGB; the files behind paths and folders
    preprocess   8-bit RGB -> a model's input: resize, crop, normalisation
    drawing      maps -> overlays, plain maps, figures

Torch and timm are imported where they are first needed: finding and reading files needs neither.
"""

from dave_fast.images.preprocess import ADD_INVERSE, Preprocessing, describe_preprocessing, from_config, preprocessing
from dave_fast.images.reading import OURS, decode_image, find_images, is_image, read_image, walk_images

__all__ = [
    "ADD_INVERSE",
    "OURS",
    "Preprocessing",
    "decode_image",
    "describe_preprocessing",
    "find_images",
    "from_config",
    "is_image",
    "preprocessing",
    "read_image",
    "walk_images",
]
