"""Write `dave_fast/models/demo/digits.npz`: the handwritten digits that the demo scenes are drawn from.

The 1,797 glyphs of 8×8 pixels are those of scikit-learn, which is not needed to draw scenes.
"""

import argparse
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

DIGITS = Path(__file__).parents[1] / "dave_fast" / "models" / "demo" / "digits.npz"


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=DIGITS)
    out = parser.parse_args().out
    digits = load_digits()
    glyphs = digits.images.astype(np.uint8)
    # four bits for a pixel would clip the top level 16; deflate alone makes the file smaller than 60 KB
    np.savez_compressed(out, glyphs=glyphs, labels=digits.target.astype(np.uint8))
    print(f"{out}: {len(glyphs)} glyphs, {out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
