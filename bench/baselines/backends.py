"""fastsal's compiled backends."""

from torch import Tensor

from fastsal.tensor import ops


def compiled(jacobian: Tensor) -> tuple[list[str], dict[str, str]]:
    """The compiled backends that can take this Jacobian; and why the others cannot, by their names in the tables."""
    reasons = {name: module.why_not(jacobian) for name, module in ops.KERNELS.items()}
    return (
        [name for name, reason in reasons.items() if not reason],
        {f"fastsal {name}": reason for name, reason in reasons.items() if reason},
    )
