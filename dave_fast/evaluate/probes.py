"""Linear probes on the tokens of a trained ViT, whose decisions follow what is where, and a check that they do.

A method cannot show a class in its cell of a mosaic if the model's logit does not depend on that cell. So a probe is
fitted to photographs, their flips and crops, and mosaics, whose target is an equal share for each of their classes; and
`blanking` measures how much a logit depends on each cell. Probes read the class token or the mean of the patch tokens.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dave_fast.errors import InputError
from dave_fast.evaluate import metrics

POOLS = {"class token": "token", "patch average": "avg"}
# of the squared weights on standardised features, in the mean cross entropy
DECAY = 1e-2
CROPS, SMALLEST_CROP = 4, 0.4
LBFGS_STEPS = 200


@dataclass(frozen=True)
class Views:
    """Images of one size with their targets.

    Attributes:
        images: (n, 3, H, W).
        targets: (n, K), the share of each class.
    """

    images: Tensor
    targets: Tensor


def views_of(images: Tensor, labels: Tensor, classes: int, mosaics: int, seed: int) -> list[Views]:
    """Return photographs, their flips and random square crops, and 2×2 mosaics of different classes.

    Args:
        images: (n, 3, H, W).
        labels: (n,) int64.
        classes: K.
        mosaics: how many, each of four random photographs.
        seed: of crops and mosaics.
    """
    generator = torch.Generator().manual_seed(seed)
    crops = [torch.stack([_crop(image, generator) for image in images]) for _ in range(CROPS)]
    seen = [images, images.flip(-1), *crops]
    plain = Views(torch.cat(seen), functional.one_hot(labels, classes).float().repeat(len(seen), 1))
    chosen = draw_mosaics(labels, 2, mosaics, seed)
    shares = functional.one_hot(labels[chosen], classes).float().mean(1)
    return [plain, Views(metrics.build_mosaics(images[chosen]), shares)]


def _crop(image: Tensor, generator: torch.Generator) -> Tensor:
    """Return a random square part of an image, enlarged to its size."""
    height, width = image.shape[1:]
    share = SMALLEST_CROP + (1 - SMALLEST_CROP) * torch.rand(1, generator=generator).item()
    side = round(share * min(height, width))
    top, left = (int(torch.randint(size - side + 1, (1,), generator=generator)) for size in (height, width))
    part = image[None, :, top : top + side, left : left + side]
    return functional.interpolate(part, (height, width), mode="bicubic", antialias=True)[0]


def draw_mosaics(labels: Tensor, grid: int, count: int, seed: int) -> Tensor:
    """Draw the photographs of mosaics, (count, grid²) indices, all different in a mosaic.

    Classes are drawn in turns and the least used photographs of each first, so that every class and photograph occurs
    about equally often. A mosaic has as many classes as can be; where they are fewer than its cells, some occur twice.

    Args:
        labels: (n,) int64, n ≥ grid².
        grid: cells along each side.
        count: number of mosaics.
        seed: of the draw.

    Raises:
        InputError: there are too few photographs.
    """
    if len(labels) < grid**2:
        raise InputError(
            f"there are {len(labels)} photographs; a mosaic of {grid}×{grid} takes {grid**2} different ones"
        )
    generator = torch.Generator().manual_seed(seed)
    used = torch.zeros(len(labels))
    seen = {int(one): 0 for one in labels.unique()}
    chosen = []
    for _ in range(count):
        cells: list[int] = []
        there = dict.fromkeys(seen, 0)
        while len(cells) < grid**2:
            rank = used + torch.rand(len(labels), generator=generator)
            rank[cells] = torch.inf
            left = [one for one in seen if rank[labels == one].isfinite().any()]
            draw = dict(zip(left, torch.rand(len(left), generator=generator).tolist(), strict=True))
            turn = min(left, key=lambda one: (there[one], seen[one], draw[one]))
            cells.append(int(torch.where(labels == turn, rank, torch.inf).argmin()))
            used[cells[-1]] += 1
            there[turn] += 1
            seen[turn] += 1
        order = torch.randperm(grid**2, generator=generator)
        chosen.append(torch.tensor(cells)[order])
    return torch.stack(chosen)


def asked_cells(labels: Tensor) -> Tensor:
    """Return the cells of a mosaic (cells,) whose class occurs in no other cell: those that GridPG can ask for."""
    return ((labels[:, None] == labels).sum(1) == 1).nonzero()[:, 0]


@torch.no_grad()
def features(model: Any, images: Tensor, batch_size: int = 16) -> dict[str, Tensor]:
    """Return what each kind of probe reads, (n, D) by its name, after the final norm.

    Args:
        model: a timm VisionTransformer for images of this size.
        images: (n, 3, H, W).
        batch_size: images at a time.
    """
    tokens = [model.forward_features(some) for some in images.split(batch_size)]
    return {name: torch.cat([model.pool(some, pool) for some in tokens]).float() for name, pool in POOLS.items()}


def fit(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Fit a logistic regression by L-BFGS, and return weight (K, D) and bias (K,).

    Args:
        inputs: (n, D).
        targets: (n, K), the share of each class.
    """
    mean, spread = inputs.double().mean(0), inputs.double().std(0).clamp(min=1e-6)
    scaled, wanted = (inputs.double() - mean) / spread, targets.double()
    weight = torch.zeros(targets.shape[1], inputs.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(targets.shape[1], dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=LBFGS_STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        found = functional.cross_entropy(scaled @ weight.T + bias, wanted) + DECAY * weight.square().sum()
        found.backward()
        return found

    with torch.enable_grad():
        solver.step(loss)
    raw = weight.detach() / spread
    return raw.float(), (bias.detach() - raw @ mean).float()


def with_head(model: Any, weight: Tensor, bias: Tensor, pool: str, names: tuple[str, ...]) -> nn.Module:
    """Return a copy of a timm VisionTransformer with another linear head.

    Args:
        model: of any head.
        weight: (K, D).
        bias: (K,).
        pool: name in `POOLS`.
        names: K, of the classes.
    """
    made = copy.deepcopy(model)
    made.head = nn.Linear(weight.shape[1], weight.shape[0]).to(weight)
    made.head.load_state_dict({"weight": weight, "bias": bias})
    made.num_classes, made.global_pool = len(names), POOLS[pool]
    made.pretrained_cfg = {**made.pretrained_cfg, "num_classes": len(names), "label_names": list(names)}
    result: nn.Module = made.eval().requires_grad_(False)
    return result


def contrasted(model: Any) -> nn.Module:
    """Return a copy of a model whose logits are those of the model minus the mean of the other classes' logits."""
    made = copy.deepcopy(model)
    classes = made.head.out_features
    with torch.no_grad():
        # a head may have no bias
        for values in made.head.parameters():
            values.copy_((values * classes - values.sum(0)) / (classes - 1))
    result: nn.Module = made
    return result


@torch.no_grad()
def blanking(model: nn.Module, mosaics: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Blank each cell of mosaics in turn, and return how much the logit of each asked cell's class falls.

    Args:
        model: for images of the mosaics' size.
        mosaics: (m, 3, H, W), of square cells.
        labels: (m, g²) int64.

    Returns:
        Three of (number of asked cells of all mosaics,): the fall when the cell itself becomes 0, the mean of a
        normalised image, and the mean and the largest fall when another one does.
    """
    grid = round(labels.shape[1] ** 0.5)
    own, other, most = [], [], []
    for mosaic, there in zip(mosaics, labels, strict=True):
        height, width = (side // grid for side in mosaic.shape[1:])
        blanked = mosaic.repeat(grid**2, 1, 1, 1)
        for cell in range(grid**2):
            top, left = cell // grid * height, cell % grid * width
            blanked[cell, :, top : top + height, left : left + width] = 0
        asked = asked_cells(there)
        classes = there[asked]
        falls = model(mosaic[None])[0, classes] - model(blanked)[:, classes]
        here = asked, torch.arange(len(asked))
        own.append(falls[here])
        other.append((falls.sum(0) - own[-1]) / (grid**2 - 1))
        most.append(falls.index_put(here, torch.tensor(-torch.inf)).amax(0))
    return torch.cat(own), torch.cat(other), torch.cat(most)
