"""The methods: ways to find the class at the smallest linearised distance, and the registry of their names.

To add one, write a `Method` and enter it here.
"""

from fastsal.methods.base import Method
from fastsal.methods.certified import Certified
from fastsal.methods.rows import Candidates, Exact

__all__ = ["METHODS", "Candidates", "Certified", "Exact", "Method", "resolve"]

METHODS: dict[str, Method] = {method.name: method for method in (Exact(), Candidates(), Certified())}


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
        raise ValueError(f"norm: got {norm:g} with method={chosen.name!r}, wants {able}; use method='exact'")
    return chosen
