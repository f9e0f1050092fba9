"""The one table of tolerances. They only tighten.

EXACT: relative error (Euclidean norms) of two float64 results that are equal in exact arithmetic.
LOW_PRECISION_RATIO: how much larger than plain PyTorch's, in the same precision and against the same truth in higher
    precision, the error of a kernel may be.
"""

EXACT = 1e-12
LOW_PRECISION_RATIO = 2.0
