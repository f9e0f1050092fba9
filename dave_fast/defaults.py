"""Defaults, in a module without imports: the command line's help must not wait for torch."""

# The model of every command that is given none; its weights are downloaded once.
DEFAULT_MODEL = "deit3_base_patch16_224.fb_in1k"
# Perturbed samples of an image, and whether its map is shrunk (see `dave_fast.explain.explainer.DAVE`).
DEFAULT_SAMPLES, DEFAULT_SHRINK = 50, True
# The most samples of one call: an error falls with the root of their number, and all draws are held at once.
MOST_SAMPLES = 2**20
