"""Linearised robustness, saliency alignment and the bound that ties them, accelerated.

Three layers: `margin_geometry` and `pairwise_margins` work on logits and their Jacobian, `analyze` and `deepfool` on a model,
and `fastsal` on the command line.
"""

from fastsal import losses, plot
from fastsal.adaptive import fab
from fastsal.adversarial import Adversarial, boundary_normal, deepfool
from fastsal.analysis import analyze
from fastsal.biases import bias_contributions
from fastsal.evaluation.evaluate import evaluate, load
from fastsal.methods import Candidates, Certified, Exact
from fastsal.pages.report import report
from fastsal.tensor.geometry import Geometry, margin_geometry
from fastsal.tensor.ops import info
from fastsal.tensor.pairwise import PairwiseMargins, pairwise_margins
from fastsal.tensor.results import cat

__version__ = "0.1.0"
__all__ = [
    "Adversarial",
    "Candidates",
    "Certified",
    "Exact",
    "Geometry",
    "PairwiseMargins",
    "analyze",
    "bias_contributions",
    "boundary_normal",
    "cat",
    "deepfool",
    "evaluate",
    "fab",
    "info",
    "load",
    "losses",
    "margin_geometry",
    "pairwise_margins",
    "plot",
    "report",
]
