"""fastsal: linearised robustness, saliency alignment and the bound that ties them, at the hardware's limit."""

from fastsal.geometry import Geometry, margin_geometry
from fastsal.ops import info
from fastsal.pairwise import PairwiseMargins, pairwise_margins

__version__ = "0.1.0"
__all__ = ["Geometry", "PairwiseMargins", "info", "margin_geometry", "pairwise_margins"]
