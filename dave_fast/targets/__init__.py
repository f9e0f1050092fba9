"""Questions to a model, beyond "why this class?". Each is one score of the output, hence one cotangent of it.

    Class("tiger")             a class by index or name
    Sum(3, 5)                  several targets together
    Contrast(3, 5)             why this and not that: a difference of two targets
    Similarity(embedding)      likeness of the output to an embedding
    Text("a cat")              likeness to a text prompt, for CLIP and SigLIP
    SimilarTo(image)           likeness to another image, for DINO and other embeddings
    Patch(row, column)         a token of the output, for dense prediction

Sum and Contrast take any targets, these and captum's forms (`dave_fast.targets.forms`) alike:
`Contrast(Text("a cat"), Text("a dog"))`, `Contrast([3, 4], [5, 6])` for two images. `explain(images, targets=[...])`
asks several of one image and walks the model forward once for all of them.

    questions    the targets above, each bound to a model and resolved to a cotangent
    forms        captum's forms of a target (an int, a list, a tensor, a callable)
    text         the grammar of `--target`
    cotangents   what the walks take: a cotangent of the output
    probes       embeddings and linear probes from files
"""

from dave_fast.targets.forms import Question, Target
from dave_fast.targets.probes import load_probe
from dave_fast.targets.questions import Class, Contrast, Patch, Similarity, SimilarTo, Sum, Text, tokens_of

__all__ = [
    "Class",
    "Contrast",
    "Patch",
    "Question",
    "SimilarTo",
    "Similarity",
    "Sum",
    "Target",
    "Text",
    "load_probe",
    "tokens_of",
]
