"""The ops of the method: each a reference in PyTorch, and faster forms of the same function.

perturb, pull_back, pull_back_mean    images -> tokens, and cotangents of tokens -> contributions; public, checked
spread_mean                           evidence of patches -> maps of pixels; public, checked
robust_mean, shrink, smooth           contributions -> raw, its variance -> maps; public, checked
linear, activation, attention         the products of the walks, gates and softmax, and their frozen VJPs
norm, rotary, tokens                  norms, rotary position embedding, the residual stream of prefix tokens and patches
fp8, precision                        e4m3 operands; devices, precisions and dtypes
patches, _warp                        the token layout; the affine warp of the perturbations
choices                               measured choices between kernels, on disk
_registry, _ext, _library             the table of all forms; the C++ and CUDA extensions; the ops under torch.compile
"""
