"""How a model is walked: micro-batches of perturbed images forward and back, gathered to maps.

build, walks       a ViTPlan -> the forward walk and the frozen VJP walk
calibration        static scales of e4m3 operands
route              the pair of walks that explains a model: by a plan, or by the frozen route
eager, graphs      one micro-batch step by step, or replayed as a CUDA graph
micro_batches      all rows of a call, in micro-batches that fit; buckets has their sizes
aggregation        contributions -> raw attribution and maps
memory             what all of this needs, as a formula; free_memory has what there is
checks, end_of_call   what is refused: arguments at once, numbers that are not finite at the end
"""
