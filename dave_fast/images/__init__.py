"""Read photographs, prepare them for a model, and draw maps.

    finding      the image files behind paths and in folders
    reading      image files -> upright 8-bit RGB
    pixels       any of Pillow's modes -> 8-bit RGB: depth, polarity, transparency
    png, tiff    what these files say of their samples, and corrections of Pillow's reading
    geometry     resizing and cropping with Pillow alone
    preprocess   8-bit RGB -> a model's input: resize, crop, normalisation
    arrival      how images arrive at a part of a model that says how they are to be prepared
    given        photographs in the forms that people give them in Python
    drawing      maps -> overlays, plain maps
    figures      maps -> figures at print size, grids
    screen       showing and saving figures

Torch and timm are imported where they are first needed: finding and reading files needs neither.
"""

from dave_fast.images.finding import OURS, find_images, is_image, walk_images
from dave_fast.images.preprocess import ADD_INVERSE, Preprocessing, describe_preprocessing, from_config, preprocessing
from dave_fast.images.reading import as_rgb, decode_image, read_image, read_mask

__all__ = [
    "ADD_INVERSE",
    "OURS",
    "Preprocessing",
    "as_rgb",
    "decode_image",
    "describe_preprocessing",
    "find_images",
    "from_config",
    "is_image",
    "preprocessing",
    "read_image",
    "read_mask",
    "walk_images",
]
