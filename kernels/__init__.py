"""Triton kernels, one file an op; installed as dave_fast.kernels. Loaded only where Triton is chosen."""
