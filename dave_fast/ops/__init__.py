"""The ops of the method: each a reference in PyTorch, and faster forms of the same function.

The public pixel ops (perturb, pull_back, pull_back_mean, robust_mean, smooth) check their inputs; the ops inside the
walks do not. `_registry` is the table of all forms.
"""
