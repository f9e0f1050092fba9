"""Measure the peak memory of explanations, weights included, in a process of its own, for tests/engine/test_memory.py.

tests.engine.peak_memory '[[size, width, depth, precision, backend, images, samples, rows, targets, blocks], …]'

Prints [measured, formula] in bytes for each; measured is the growth of the process's resident memory.
"""

import ctypes
import gc
import json
import sys
import warnings
from pathlib import Path

import torch

import dave_fast
from benchmarks.memory import resident
from dave_fast.engine.memory import choose_storage, explanation_bytes
from dave_fast.ops import _ext
from tests.tiny import initial_vit


def measure(size, width, depth, precision, backend, n_images, n_samples, rows, n_targets=1, n_blocks=0):
    settings = {"img_size": size, "patch_size": 16, "embed_dim": width, "depth": depth, "num_heads": width // 32}
    model = initial_vit(**settings, num_classes=1000)
    images = torch.randn(n_images, 3, size, size)
    gc.collect()
    # pages that earlier cases freed within the heap go back to the system, or this one would reuse them uncounted
    ctypes.CDLL(None).malloc_trim(0)
    # the kernel's own way to start the high-water mark anew
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    explainer = dave_fast.DAVE(model, precision=precision, backend=backend, noise_alpha=0.5, internal_batch_size=rows)
    levels = ["pixels", *range(n_blocks)]
    explainer.explain(images, targets=range(n_targets), n_samples=n_samples, depth=levels)
    measured = resident("VmHWM") - before
    plan = explainer._cache.route(images).plan
    evidence = n_blocks * plan.tokens
    storage = choose_storage(n_samples, tuple(images.shape[1:]), images.dtype, plan.dtype, 1 << 40, evidence=evidence)
    formula = explanation_bytes(
        plan,
        n_images,
        n_samples,
        rows,
        storage=storage,
        together=n_images * n_targets,
        n_targets=n_targets,
        n_levels=len(levels),
        n_blocks=n_blocks,
        pytorch=backend == "torch",
    )
    return [measured, formula]


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    # bytes are multiplied by emulation where the CPU lacks the instructions, in the same memory
    _ext.multiplies_bytes = lambda: True
    # what libraries take once, by precision: 22 MB more in a first call of several targets at this size
    for precision in ("fp32", "bf16", "int8"):
        measure(224, 128, 2, precision, "auto", 1, 8, 4, 6, 2)
    print(json.dumps([measure(*case) for case in json.loads(sys.argv[1])]))
