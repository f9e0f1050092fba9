"""Triton kernels, one file an op; installed as dave_fast.kernels, imported only where Triton is chosen."""
