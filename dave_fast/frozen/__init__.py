"""The frozen route: autograd through the model's own forward, with operators held constant, and its proof.

mode    the TorchFunctionMode that freezes operators while the model runs
rules   the frozen form of each function of PyTorch
ranks   which tensors depend on the input's values, and how
proof   the affine replay: the frozen model is affine, or it is refused
trace   the recording that the proof replays
"""
