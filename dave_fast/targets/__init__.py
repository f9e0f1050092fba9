"""Targets beyond the class: sums and differences, text prompts, other images, tokens of the output.

Each is one score of the output, hence one cotangent of it:

    Class("tiger")             a class by index or name
    Sum(3, 5)                  several targets together
    Contrast(3, 5)             why this and not that: a difference of two targets
    Similarity(embedding)      cosine similarity of the output and an embedding
    Text("a cat")              similarity to a text prompt, for CLIP and SigLIP
    SimilarTo(image)           similarity to another image, for DINO and other embeddings
    Patch(row, column)         a token of the output, for dense prediction
    Segment(3, at=(y, x))      a class at a point of the image, or over a mask, for segmentation
    Box(3, box)                a class of a detection, for detectors

Sum and Contrast take any targets, also in captum's forms (`dave_fast.targets.forms`):
`Contrast(Text("a cat"), Text("a dog"))`, `Contrast([3, 4], [5, 6])` for two images. `explain(images, targets=[...])`
explains several targets of each image with one forward walk.

    questions    the targets above that ask about the whole image
    dense_questions    those that ask about a place in it
    forms        captum's forms of a target (an int, a list, a tensor, a callable)
    text         the grammar of `--target`
    cotangents   the gradient of a score with respect to the output, which the backward walks start from
    grids        how tokens lie in a dense output
    places       where the warp of a sample has moved a place
    outputs      models whose output is tokens or detections
    probes       embeddings and linear probes from files
"""

from dave_fast.targets.dense_questions import Box, Patch, Segment
from dave_fast.targets.forms import Question, Target
from dave_fast.targets.outputs import detections_of, tokens_of
from dave_fast.targets.probes import load_probe
from dave_fast.targets.questions import Class, Contrast, Similarity, SimilarTo, Sum, Text

__all__ = [
    "Box",
    "Class",
    "Contrast",
    "Patch",
    "Question",
    "Segment",
    "SimilarTo",
    "Similarity",
    "Sum",
    "Target",
    "Text",
    "detections_of",
    "load_probe",
    "tokens_of",
]
