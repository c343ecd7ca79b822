"""The methods: ways to find the class at the smallest linearised distance, the registry of their names, and the default.

To add one, write a `Method` and enter it here.
"""

from dataclasses import dataclass
from typing import ClassVar

from fastsal.methods.base import Method, Question, Selection
from fastsal.methods.certified import Certified
from fastsal.methods.features import pays
from fastsal.methods.rows import Candidates, Exact
from fastsal.model.linearization import Linearization

__all__ = ["FEW", "METHODS", "Auto", "Candidates", "Certified", "Exact", "Method", "resolve"]

FEW = 100  # passes


@dataclass(frozen=True)
class Auto(Method):
    """Exact where that takes at most 100 passes an example (n, or F + 3 through the last layer) or p = 1, else certified.

    So it depends on the number of classes n, on the width F of the last layer where that is linear, and on the norm, and not
    on the batch.
    """

    name: ClassVar = "auto"

    def select(self, graph: Linearization, question: Question) -> Selection:
        """Lets one of the two look; the selection says which."""
        exact, certified = Exact(), Certified()
        few = question.norm not in certified.norms or graph.n <= FEW
        return (exact if few or pays(graph, FEW, exact.memory_limit) else certified).select(graph, question)


METHODS: dict[str, Method] = {method.name: method for method in (Auto(), Exact(), Certified(), Candidates())}


def resolve(method: str | Method, norm: float) -> Method:
    """The method that a user means, by its name or as it stands.

    Raises:
        ValueError: There is no method of that name, or it cannot serve the norm.
    """
    chosen = METHODS.get(method) if isinstance(method, str) else method
    if not isinstance(chosen, Method):
        raise ValueError(
            f"method: got {method!r}, wants one of {list(METHODS)}, fastsal.Exact(), .Candidates(k) or .Certified()"
        )
    if norm not in chosen.norms:
        able = " or ".join(f"{p:g}" for p in sorted(chosen.norms))
        raise ValueError(f"norm: got {norm:g} with method={chosen.name!r}, wants {able}; use method='auto'")
    return chosen
