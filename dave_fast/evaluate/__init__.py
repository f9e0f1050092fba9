"""Are the maps right? DAVE and its alternatives on the same images in one run, scored, compared and reported.

    sources      images with what is known of them: labels, boxes, masks
    methods      DAVE, its single frozen gradient, captum's baselines, two controls: all behind one signature
    scoring      the run: batch by batch, every method on the same images, every metric that the source permits
    statistics   intervals over images and seeds, paired differences, verdicts
    report       HTML, Markdown, JSON, CSV

Definitions of the metrics, ties and undefined cases: `dave_fast.evaluate.metrics`.
"""

from dave_fast.evaluate.evaluation import evaluate
from dave_fast.evaluate.settings import METRICS, EvaluationSettings, Results
from dave_fast.evaluate.sources import DemoScenes, Examples, ExampleSource, ImageFiles

__all__ = [
    "METRICS",
    "DemoScenes",
    "EvaluationSettings",
    "ExampleSource",
    "Examples",
    "ImageFiles",
    "Results",
    "evaluate",
]
