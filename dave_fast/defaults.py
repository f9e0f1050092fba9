"""Defaults, in a module without imports: the command line's help must not wait for torch."""

# Perturbed samples of an image, and whether its map is shrunk (see `dave_fast.explain.explainer.DAVE`).
DEFAULT_SAMPLES, DEFAULT_SHRINK = 50, True
