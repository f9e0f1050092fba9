"""The reader of a whole timm transformer: patch embedding, positions and tail; each family adds its blocks.

Models are read as they are in evaluation mode: dropout and stochastic depth are then the identity.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from timm.layers import DropPath, PatchDropout, PatchDropoutWithIndices, PatchEmbed, resample_abs_pos_embed
from torch import Tensor, nn

from dave_fast.isolation import isolated
from dave_fast.plan.installed import replaced
from dave_fast.plan.reading import Family, Linear, NoPlanError, Reading, Step
from dave_fast.plan.timm_parts import LAYER_NORMS, read_norm

# modules that are the identity in evaluation mode, and the table of an adapter's, which cannot be called
INERT = (nn.Identity, nn.Dropout, DropPath, PatchDropout, PatchDropoutWithIndices, nn.ModuleDict)
