"""bias_contributions: what the biases of each layer of a network add to its logits."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from fastsal.model.calling import call

# Affine in their input, in evaluation mode: what they return for an input of zeros is their bias.
AFFINE = (nn.Linear, nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm)


def bias_contributions(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What the biases of each layer add to every logit: ⟨b, ∂Ψʲ/∂b⟩, with the weights and the branch of every ReLU held fixed.

    A network of convolutions, linear layers, ReLU, leaky ReLU, pooling and BatchNorm in evaluation mode is affine around x, and
    its offset is what all its biases add: by Euler's theorem on homogeneous functions Ψʲ(x) − ⟨x, ∇Ψʲ(x)⟩ is the sum over the
    layers.
    For the predicted class that is `Geometry.offset`, and the difference to the runner-up's is `Geometry.binarized_offset`,
    found without the gradient of the input. Of a BatchNorm the running mean μ counts as well as the shift: its bias is
    shift − scale · μ / √(variance + ε). For other layers (GELU, LayerNorm, attention, softmax) the derivatives are what they
    are, and their sum is not the offset.

    One forward-mode pass (JVP) a layer is taken, without the Jacobian. The results are deterministic and carry no gradients.

    Args:
        model: An `nn.Module` in evaluation mode, from x [B, *S] to logits [B, n], each example on its own.
        x: [B, *S], float32 or float64, the dtype of the model.

    Returns:
        [B, n] in the dtype of the logits for each `Linear`, convolution or BatchNorm that has a bias, by the module's name.

    Raises:
        ValueError: A BatchNorm is in training mode, where its bias depends on the batch.

    Examples:
        >>> import torch, fastsal
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)).double()
        >>> x = torch.rand(5, 4, dtype=torch.float64)
        >>> result, layers = fastsal.analyze(model, x), fastsal.bias_contributions(model, x)
        >>> list(layers)
        ['0', '2']
        >>> sums = sum(layers.values()).gather(1, result.prediction.unsqueeze(1)).squeeze(1)
        >>> torch.allclose(sums, result.offset)
        True
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            raise ValueError(f"model: {name or 'BatchNorm'} is in training mode, wants evaluation mode: model.eval()")
    contributions = {}
    for name, layer in model.named_modules():
        if isinstance(layer, AFFINE) and (layer.bias is not None or getattr(layer, "running_mean", None) is not None):
            with torch.no_grad(), forward_ad.dual_level(), _growing_bias(layer):
                derivative = forward_ad.unpack_dual(call(model, x)).tangent
            if derivative is not None:  # else the layer leads to no logit
                contributions[name] = derivative.detach().clone()
    return contributions


@contextmanager
def _growing_bias(layer: nn.Module) -> Iterator[None]:
    """The layer's outputs carry its own bias as a tangent: what they would gain, if that grew in proportion."""

    def grow(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        plain, tangent = forward_ad.unpack_dual(output)
        bias = module.forward(torch.zeros_like(forward_ad.unpack_dual(inputs[0]).primal))
        # A layer that is used twice already has a tangent the second time.
        grown: Tensor = forward_ad.make_dual(plain, bias if tangent is None else bias + tangent)
        return grown

    with ExitStack() as stack:
        stack.callback(layer.register_forward_hook(grow).remove)
        yield
