"""What a model becomes: the neutral form that the engine walks.

reading           embedding, steps of branches, tail: the form that families are read into
families, timm_*  one reader a model family; what a reader does not know, it refuses by NoPlanError
layers, folding   branches -> layers, with norms folded into packed weights
vit_plan          ViTPlan and make_plan
"""
