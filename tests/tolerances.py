"""The one table of tolerances. They only tighten.

EXACT: relative error (Euclidean norms) of two float64 results that are equal in exact arithmetic.
LOW_PRECISION_RATIO: how much larger than plain PyTorch's, in the same precision and against the same truth in higher
    precision, the error of a kernel may be.
OF_THE_TRUTH: by precision, the largest relative error (Euclidean norms) of an effective gradient against float64's.
PIXELS: by the dtype that is computed or stored in, the largest error of a pixel op over the largest value. float32 is
    dominated by the rounding of source positions, which grows with the images' size: for images below 64 pixels.
DECODING_MEMORY: how far the memory that decoding takes at its peak may be from what is told from a file's header.
PEARSON: by precision, the least correlation of a final map with float32's, on trained weights.
"""

import torch

EXACT = 1e-12
LOW_PRECISION_RATIO = 2.0
OF_THE_TRUTH = {"fp64": 1e-9, "fp32": 1e-4, "bf16": 0.1}
PIXELS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-3}
DECODING_MEMORY = 0.2
PEARSON = {"bf16": 0.999, "int8": 0.999, "fp8": 0.999}
