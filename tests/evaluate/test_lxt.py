"""LXT's CP-LRP of torchvision's ViT is an implementation of the same freezing by other people: an independent check.

With gradient ⊙ input, its rules (softmax and norm scales stopped, act(u)/u for GELU) are the frozen operators of DAVE,
arXiv 2602.06613, Eq. 3-5. LXT patches classes of torchvision and PyTorch globally, hence the process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from tests.evaluate import needs
from tests.tolerances import EXACT
from tests.toys import frozen_vjp, relative
from tests.variants import TORCHVISION

ROOT = Path(__file__).resolve().parents[2]

CP_LRP = """
import sys, torch
from torchvision.models import vision_transformer
from lxt.efficient import monkey_patch
from lxt.efficient.models.vit_torch import cp_LRP
from lxt.efficient.rules import identity_rule_implicit_fn
from tests.variants import TORCHVISION

variant = TORCHVISION
model = variant.build(torch.float64)
images = variant.images(dtype=torch.float64).requires_grad_()
(full,) = torch.autograd.grad(model(images)[:, 1].sum(), images)
smallest = []
for module in model.modules():
    if isinstance(module, torch.nn.GELU):
        module.register_forward_pre_hook(lambda m, args: smallest.append(args[0].detach().abs().min().item()))
# LXT takes act(u)/(u + 1e-10): without the addend, two float64 results that are equal in exact arithmetic
identity_rule_implicit_fn.forward.__defaults__ = (0.0,)
monkey_patch(vision_transformer, patch_map=cp_LRP)
(relevance,) = torch.autograd.grad(model(images)[:, 1].sum(), images)
torch.save({"relevance": relevance * images.detach(), "full": full, "smallest": min(smallest)}, sys.argv[1])
"""


@needs.lxt
def test_cp_lrp_of_torchvisions_vit(tmp_path: Path) -> None:
    path = tmp_path / "relevance.pt"
    settings = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    subprocess.run([sys.executable, "-W", "ignore", "-c", CP_LRP, path], check=True, cwd=ROOT, env=settings)
    theirs = torch.load(path)
    variant = TORCHVISION
    images = variant.images(dtype=torch.float64)
    _, ours = frozen_vjp(variant.build(torch.float64), images, lambda output: output[:, 1])
    assert relative(theirs["full"], ours) > 0.05
    # at u = 0 the gate is a limit for us and 0/0 for LXT
    assert theirs["smallest"] > 0
    assert relative(ours * images, theirs["relevance"]) < EXACT
