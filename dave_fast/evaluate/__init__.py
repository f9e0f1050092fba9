"""Evaluation: DAVE and other attribution methods on the same images, scored, compared and reported.

    sources      images with their labels, boxes and masks, as far as they are known
    methods      DAVE, its single frozen gradient, captum's baselines and two controls behind one signature
    comparison   methods with the call of DAVE.explain, and several of them side by side
    full_gradient Libra FullGrad+, on the frozen operators
    scoring      every method on every batch of images, scored by every metric that the source permits
    rows         one method under several settings, from shared samples
    deep         rows at the tokens that enter blocks, of DAVE and of other methods
    items        photographs and mosaics one by one, under every row
    probes       linear heads worth explaining, and whether they follow what is where
    statistics   intervals over images and seeds, paired differences, verdicts
    report       HTML, Markdown, JSON, CSV
    tuning       the choice of noise_alpha and of the number of samples

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
