"""The method's random numbers: perturbations are functions of (seed, image key, sample) alone.

draws    Sampling, Draws, draw: affine matrices, noise levels and keys of the noise
philox   Philox4x32-10, uniform words and normal deviates, bit for bit those of the C++ and CUDA kernels
"""

from dave_fast.sampling.draws import ROWS, SCHEDULES, Draws, Sampling, draw, identity, join
from dave_fast.sampling.philox import normal

__all__ = ["ROWS", "SCHEDULES", "Draws", "Sampling", "draw", "identity", "join", "normal"]
