"""The frozen route: autograd through the model's own forward pass with operators held constant, and its proof.

mode    the TorchFunctionMode that freezes operators while the model runs
rules   the frozen form of each function of PyTorch
ranks   whether a tensor is a value, an activation or an operator
proof   the affine replay, which shows that the frozen model is affine and refuses it otherwise
replay  a float64 copy of a model that runs with recorded operators
blocks  the blocks at whose input evidence is told, what enters them, and the sum of it
layout  where in the image each token lies, measured
trace   what each module did during a pass, to name the one at which the proof fails
"""
