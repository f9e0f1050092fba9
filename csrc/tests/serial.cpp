// The CUDA kernels on the host, so that tests and sanitizers check the indices of a GPU run.
#include "perturb.cu"
#include "pull_back.cu"
#include "robust_mean.cu"
#include "shrink.cu"
#include "smooth.cu"
