"""From an nn.Module to a ViTPlan, the neutral form that the engine walks.

reading             embedding, steps of branches, tail: the form into which families are read
families            the table of families, `read` and `why_not`
whole, parts        what the readers of all libraries share; anything unknown raises NoPlanError
checks, installed   whether a model is its library's own code
timm_model, _parts  what the readers of timm's families share
timm_<family>       the blocks of one family
huggingface         transformers' ViTs; _parts has their blocks, _positions where their tokens are
torchvision_vit, open_clip_vit, multihead   models whose attention is PyTorch's nn.MultiheadAttention
layers, folding     branches -> layers, with norms folded into packed weights
vit_plan            ViTPlan and make_plan
"""
