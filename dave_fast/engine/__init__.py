"""How a model is walked: micro-batches of perturbed images forward and back, aggregated to raw attributions.

walks                     the engine of a ViTPlan: forward_walk and vjp_walk over bound_ops
tail_forms                the tail's products in C++, where those of the blocks are
build, calibration        an engine of a reading; static scales of e4m3 operands
route                     the pair of walks that explains a model: the engine's, or the frozen route's
eager, graphs             one micro-batch step by step, or replayed as a CUDA graph
micro_batches, buckets    the loop over all rows of a call, and the sizes of micro-batches
aggregation               contributions -> raw attributions
memory, free_memory       the memory that a call takes, as a formula, and the memory that a device has
checks, end_of_call       checks of arguments, and of results and weights when a call ends
"""
