"""Train the embedded model on newly drawn scenes, report its held-out accuracy and save its weights.

    export OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1
    python scripts/train_demo.py --out stage1.safetensors

The card (dave_fast/models/demo/CARD.md) lists the later stages. Without the first line NumPy and PyTorch start a thread
for each core in every process, and the threads compete.

Two measures make a small ViT learn this quickly. Clutter and input noise fade in from zero: with full clutter from the
start it learns almost nothing in the first epochs. And a second head, removed afterwards, classifies for each patch the
digit that it shows. There is one process for each core, with its share of every batch.
"""

import argparse
import math
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import repeat
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from timm.layers import set_fused_attn
from torch import distributed as dist
from torch import multiprocessing
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from dave_fast.models.demo.clutter import draw_clutter, to_uint8
from dave_fast.models.demo.model import CLASS_NAMES, IMAGE_SIZE, build_model
from dave_fast.models.demo.scenes import draw_scenes, write_digits

PATCH_SIZE = 16
PATCHES = IMAGE_SIZE // PATCH_SIZE
BACKGROUND = len(CLASS_NAMES)
# share of a patch that a digit must cover for the patch to have its class
PATCH_SHARE = 0.06
# weight of background in the patches' loss, small because most patches are background
BACKGROUND_WEIGHT = 0.1
BACKGROUNDS = 6_000
TWO_DIGIT_SHARE = 0.25
NOISE_SHARE = 0.5
NOISE_MAX = 0.3
HELD_OUT_SEED = 1_000_003


class SceneBatches(Dataset):
    """The batches of one process.

    A batch is images uint8 (batch, H, W, 3), label distributions float32 (batch, 10), and the class of each patch,
    int64 (batch, patches), 10 for background. Digits are newly written for every batch; backgrounds, which take most of
    the time, come from a pool, and are rotated and mirrored.

    Args:
        pool: backgrounds, uint8 (n, H, W, 3).
        steps: number of batches.
        fade: share of the steps in which clutter fades in.
        batch: images in a batch.
        seed: of the run and of the process.
    """

    def __init__(self, pool: np.ndarray, steps: int, fade: float, batch: int, seed: tuple[int, int]) -> None:
        self.pool, self.steps, self.fade, self.batch, self.seed = pool, steps, fade, batch, seed

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, b: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rng = np.random.default_rng((*self.seed, b))
        images = np.empty((self.batch, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
        targets = np.zeros((self.batch, len(CLASS_NAMES)), np.float32)
        patches = np.full((self.batch, PATCHES, PATCHES), BACKGROUND, np.int64)
        clutter = np.float32(fade_in(b, self.fade * self.steps) / 255)
        for i in range(self.batch):
            background = np.rot90(self.pool[rng.integers(len(self.pool))], rng.integers(4))
            background = background[:, :: rng.choice([-1, 1])]
            scene = np.ascontiguousarray(background.transpose(2, 0, 1)) * clutter
            written = write_digits(rng, scene, 1 + int(rng.uniform() < TWO_DIGIT_SHARE), "train")
            for label, mask in written:
                # with two digits each has half of the probability
                targets[i, label] = 1 / len(written)
                covered = mask.reshape(PATCHES, PATCH_SIZE, PATCHES, PATCH_SIZE).mean(axis=(1, 3))
                patches[i][covered > PATCH_SHARE] = label
            images[i] = to_uint8(scene)
        return torch.from_numpy(images), torch.from_numpy(targets), torch.from_numpy(patches).flatten(1)


class TwoHeads(torch.nn.Module):
    """The model with a head that classifies each patch, for training."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model
        self.patch_head = torch.nn.Linear(model.embed_dim, BACKGROUND + 1)

    def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits (B, 10) and patch logits (B, patches, 11) of inputs (B, 3, H, W)."""
        tokens = self.model.forward_features(inputs)
        return self.model.forward_head(tokens), self.patch_head(tokens[:, 1:])


def fade_in(step: int, fading: float) -> float:
    """Return the strength of clutter and noise at a step: from 0 to 1 over the first `fading` steps, then 1."""
    return min(1.0, step / fading) if fading else 1.0


def draw_backgrounds(seed: int, start: int, n: int) -> np.ndarray:
    """Draw backgrounds start .. start + n of the pool, uint8 (n, H, W, 3)."""
    rngs = [np.random.default_rng((seed, i)) for i in range(start, start + n)]
    return np.stack([to_uint8(draw_clutter(rng, IMAGE_SIZE)) for rng in rngs])


def normalise(images: torch.Tensor) -> torch.Tensor:
    """Convert pixels uint8 (B, H, W, 3) to inputs float32 (B, 3, H, W) in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def add_noise(inputs: torch.Tensor, strength: float) -> torch.Tensor:
    """Add noise to a share of the inputs as DAVE does: (1−t)·x + √(1−(1−t)²)·ε, t up to NOISE_MAX·strength."""
    n = int(NOISE_SHARE * len(inputs))
    kept = 1 - NOISE_MAX * strength * torch.rand(n, 1, 1, 1)
    noisy = kept * inputs[:n] + (1 - kept**2).sqrt() * torch.randn_like(inputs[:n])
    return torch.cat([noisy, inputs[n:]])


def learning_rate(step: int, steps: int, warmup: int) -> float:
    """Return the share of the peak rate at a step: a linear warm-up, then a cosine to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def predict(model: torch.nn.Module, images: np.ndarray) -> np.ndarray:
    """Return logits float32 (n, 10) of pixels uint8 (n, H, W, 3), in full precision."""
    model.eval()
    with torch.no_grad():
        logits = [model(normalise(chunk)) for chunk in torch.from_numpy(images).split(128)]
    model.train()
    return torch.cat(logits).numpy()


def save_half(model: torch.nn.Module, path: Path) -> None:
    """Write the weights in half precision."""
    save_file({name: value.half().contiguous() for name, value in model.state_dict().items()}, path)


def draw_pool(seed: int, processes: int, per_task: int = 100) -> np.ndarray:
    """Draw the pool of backgrounds, uint8 (BACKGROUNDS, H, W, 3)."""
    with ProcessPoolExecutor(processes) as workers:
        starts = range(0, BACKGROUNDS, per_task)
        return np.concatenate(list(workers.map(draw_backgrounds, repeat(seed), starts, repeat(per_task))))


def make_optimiser(
    model: torch.nn.Module, args: argparse.Namespace, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Return AdamW with weight decay of matrices only, and its schedule."""
    decayed = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": decayed, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=args.lr, fused=True)
    warmup = steps // args.epochs // 2
    rate = partial(learning_rate, steps=steps, warmup=warmup)
    return optimiser, torch.optim.lr_scheduler.LambdaLR(optimiser, rate)


def train(rank: int, pool: np.ndarray, args: argparse.Namespace) -> None:
    """Train as one of args.processes; rank 0 prints a line and saves the weights after each epoch."""
    dist.init_process_group("gloo", f"file://{args.rendezvous}", rank=rank, world_size=args.processes)
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    heads = TwoHeads(build_model())
    if args.init:
        heads.model.load_state_dict(load_file(args.init))
    shared = DistributedDataParallel(heads)
    # equal initial weights in all processes, and different noise
    torch.manual_seed(args.seed + 1 + rank)
    per_epoch = args.scenes // args.batch
    steps = args.epochs * per_epoch
    batches = SceneBatches(pool, steps, args.fade, args.batch // args.processes, (args.seed, rank))
    optimiser, schedule = make_optimiser(heads, args, steps)
    weight = torch.ones(BACKGROUND + 1)
    weight[BACKGROUND] = BACKGROUND_WEIGHT
    check = draw_scenes(500, HELD_OUT_SEED + 1, split="test")
    began, total = time.perf_counter(), 0.0
    for step, (images, targets, patches) in enumerate(DataLoader(batches, batch_size=None, num_workers=1)):
        inputs = add_noise(normalise(images), fade_in(step, args.fade * steps))
        with torch.autocast("cpu", torch.bfloat16):
            logits, patch_logits = shared(inputs)
        loss = F.cross_entropy(logits.float(), targets)
        patch_loss = F.cross_entropy(patch_logits.float().flatten(0, 1), patches.flatten(), weight)
        optimiser.zero_grad()
        (loss + patch_loss).backward()
        torch.nn.utils.clip_grad_norm_(heads.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        total += loss.item()
        if rank == 0 and (step + 1) % per_epoch == 0:
            right = np.mean(predict(heads.model, check.images).argmax(1) == check.labels)
            line = f"epoch {(step + 1) // per_epoch:2d}  loss {total / per_epoch:.3f}  held-out {right:.3f}"
            print(f"{line}  {time.perf_counter() - began:.0f} s", flush=True)
            save_half(heads.model, args.out)
            total = 0.0
    dist.destroy_process_group()


def wilson_interval(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Return Wilson's interval of a share of n trials at z standard deviations; 1.96 gives 95 %."""
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return centre - half, centre + half


def report(model: torch.nn.Module, n: int) -> None:
    """Print the accuracy on held-out scenes with one digit and with two, and the confusions."""
    scenes = draw_scenes(n, HELD_OUT_SEED, split="test")
    predicted = predict(model, scenes.images).argmax(1)
    share = float(np.mean(predicted == scenes.labels))
    low, high = wilson_interval(share, n)
    print(f"one digit: {share:.4f} of {n} held-out scenes right, 95 % interval {low:.4f} to {high:.4f}")
    confusion = np.zeros((len(CLASS_NAMES),) * 2, np.int64)
    np.add.at(confusion, (scenes.labels, predicted), 1)
    print(f"rows: label, columns: prediction\n{confusion}")
    pairs = draw_scenes(n, HELD_OUT_SEED, n_digits=2, split="test")
    top = np.sort(predict(model, pairs.images).argsort(1)[:, -2:])
    both = np.mean(np.all(top == np.sort(np.stack([pairs.labels, pairs.other_labels], 1)), axis=1))
    print(f"two digits: both are the top two classes in {both:.4f} of {n} held-out scenes")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="safetensors file, rewritten after each epoch")
    parser.add_argument("--epochs", type=int, default=8, help="0: only report on the weights in --out")
    parser.add_argument("--scenes", type=int, default=16_000, help="scenes an epoch")
    parser.add_argument("--init", type=Path, help="weights to go on from")
    parser.add_argument("--fade", type=float, default=0.3, help="share of the steps in which clutter fades in")
    parser.add_argument("--batch", type=int, default=64, help="scenes a step, all processes together")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--held-out", type=int, default=4_000, help="scenes in the final report")
    args = parser.parse_args()
    # at 65 tokens on a CPU the backward of fused attention takes longer than the rest of the step
    set_fused_attn(False)
    if args.epochs:
        with TemporaryDirectory() as folder:
            args.rendezvous = Path(folder) / "rendezvous"
            pool = draw_pool(args.seed, args.processes)
            # forked, so that the processes share one pool
            multiprocessing.start_processes(train, (pool, args), nprocs=args.processes, start_method="fork")
    model = build_model()
    # report on the half-precision weights, which the package contains
    model.load_state_dict(load_file(args.out))
    report(model, args.held_out)


if __name__ == "__main__":
    main()
