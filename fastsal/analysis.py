"""analyze: every quantity of docs/design.md, "Quantities", for a model, whose Jacobian is streamed and never held."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastsal import methods, validation
from fastsal.methods.base import Question
from fastsal.model.calling import Model
from fastsal.model.function import nonempty
from fastsal.model.linearization import Linearization, linearize
from fastsal.progress import Report, reporting
from fastsal.tensor.geometry import Geometry, margin_geometry, of_pair


def analyze(
    model: Model,
    x: Tensor,
    *,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    layer: nn.Module | str | None = None,
    classes: Tensor | None = None,
    target: Tensor | None = None,
    norm: float | str = 2,
    method: str | methods.Method = "auto",
    chunk_size: int | None = None,
    backend: str = "auto",
    keep_saliency: bool = False,
    differentiable: bool = False,
    progress: bool | Report | None = None,
) -> Geometry:
    """Linearised robustness, saliency alignment and the bound that ties them, for every example of a batch of a model.

    The linearised robustness ρ̃ asks for the class whose linearised decision boundary is nearest. The methods differ in which
    classes they look at, among n of them, and so in backward and forward-mode passes:

    - `"auto"`, the default: `"exact"` where that takes at most 100 passes an example, or p = 1; else `"certified"`.
    - `"exact"`: n backward passes, or F + 3 where the logits leave a linear layer of F inputs and that is fewer, for ρ̃ and
      the distances of all classes. For few classes, or a narrow last layer; when every distance matters.
    - `"certified"`: some 20 to 90 passes of both kinds at 1000 classes, for ρ̃, except with a probability of 1e-6 for each
      example. For many classes, norm 2 or inf.
    - `"candidates"`: 11 backward passes, of the predicted class and the 10 highest other logits, for an upper bound of ρ̃,
      often ρ̃ itself, but not known where. For a first look, and inside loops (DeepFool's choice).

    `fastsal.Exact`, `fastsal.Certified` and `fastsal.Candidates` are the same methods with options. `Geometry.vjps` and
    `Geometry.jvps` count the passes that were taken.

    The Jacobian [B, n, D] is never held: beside the model's own activations, memory is needed for `chunk_size` rows an
    example, and for up to `Exact.memory_limit` bytes where the last layer's inputs are used. The call works under
    `torch.no_grad()`, `torch.inference_mode()` and autocast. It leaves the model's flags, gradients, buffers and hooks as they
    were, and the random number generators too. The reductions are deterministic; the model's own arithmetic may differ in the
    last bits with the batch and the chunk size.

    `Geometry` lists the equations, which are those of Etmann, Lunz, Maass and Schönlieb, ICML 2019 (arXiv 1905.04172).

    Args:
        model: An `nn.Module` in evaluation mode, or any callable, that maps x [B, *S] to logits [B, n], each example on its
            own. It must return logits or log-softmax, not probabilities, or an object that has them as `.logits`, such as
            Hugging Face's classifiers return. One score Ψ of shape [B] or [B, 1] means the two logits (−Ψ/2, Ψ/2), so that
            class 1 is Ψ > 0 and ρ̃ = |Ψ| / ‖∇Ψ‖. What torch.compile made is run as it was before.
        x: [B, *S], float32, float64, float16 or bfloat16. Distances are in units of x as passed: to measure them in pixels,
            make the normalisation a part of the model. Alignments, offsets, homogeneities and the bound depend on where the
            origin of x is (a mean-centred input or not); ρ̃ does not.
        args: What the model takes after x. Tensors with B entries in front, in lists, tuples and dicts too, belong to the
            examples, such as their masks, and go with them; everything else is passed as it is.
        kwargs: The same by name.
        layer: A module of the model, or its name. Distances, alignments and saliency maps are then those in the space of its
            output at x, in the place of x, which may be of any dtype. The module has to run once, and to return one tensor
            [B, *S] that leads to the logits.
        classes: Which classes may be the nearest, bool [n] or [B, n]; None for all. The others cost no rows.
        target: int64 [B]: the class whose nearest boundary is asked for, in the place of the predicted one, whose part it
            takes in every quantity but `prediction`. ρ̃ is then min over j of (Ψ^y − Ψʲ) / ‖g_y − g_j‖_q for the target y, the
            signed margin: negative where another class has a higher logit; then "certified" takes the rows of such classes.
        norm: The p of the perturbation: 2, 1, `math.inf` or "inf". Gradients are measured in the dual q-norm.
        method: The name of a method, or a `fastsal.Exact`, `fastsal.Certified` or `fastsal.Candidates` with options.
            `Geometry.method` says which "auto" took.
        chunk_size: How many class gradients to take at once; None chooses by model and device. Where memory runs out, the chunk
            is halved.
        backend: "auto", "reference", "cpu", "cuda" or "triton"; `fastsal.info()` tells which can run.
        keep_saliency: Return the saliency maps g and g† too, shaped like x and in x's dtype.
        differentiable: Let the scalars, and the saliency maps where they are kept, carry gradients to any order: into the
            model's parameters, and into x where that requires a gradient. It costs two more rows, with a graph. Indices,
            `distances` and `lower_bound` carry none. Every operation of the model needs a second derivative.
        progress: Whether to show a bar (with tqdm); None (default) does in a terminal or notebook once more than a few seconds
            turn out to be ahead. Or a function, which is called with the share that is done.

    Returns:
        A `Geometry`, in float64 for float64 x and in float32 for all others.

    Raises:
        TypeError: x is no tensor of floating dtype, or the model returns no such tensor.
        ValueError: The model returns no logits [B, n], or logits that do not depend on x; it mixes the examples of a batch, or
            has layers in training mode that would; the layer runs several times or does not lead to the logits; an example has
            no class that may be the nearest; or an option is wrong. The message says what was found and what is wanted.
        RuntimeError: A backend that was named cannot run, or the model itself failed.
        NotImplementedError: `differentiable`, and torch has no second derivative of some operation; the message names it.

    Warns:
        UserWarning: Every row of the logits looks like probabilities, or torch cannot take several rows of this model at once.

    Examples:
        >>> import torch, fastsal
        >>> linear = torch.nn.Linear(2, 3, bias=False)
        >>> _ = linear.weight.data.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0]]))
        >>> result = fastsal.analyze(linear, torch.tensor([[3.0, 4.0]]))
        >>> result.prediction.item(), result.runner_up.item(), round(result.linearized_robustness.item(), 4)
        (2, 0, 2.2361)
    """
    p = validation.norm(norm)
    chosen = methods.resolve(method, p)
    validation.chunk_size(chunk_size)
    # Of a batch of none, one example of zeros tells the number of classes, and is dropped at the end.
    point, args, kwargs = nonempty((x, args, kwargs))
    with linearize(model, point, args=args, kwargs=kwargs, layer=layer, differentiable=differentiable) as graph:
        asked = _asked(graph, len(x), target, classes)
        with reporting(progress, "analyze") as report:
            selection = chosen.select(graph, Question(p, chunk_size, backend, *asked, report=report))
        validation.warn_probabilities(selection.logits)
        logits, pair, flat_x = selection.logits, selection.pair, graph.x.detach()
        if differentiable:
            logits, flat_x = graph.graph_logits, graph.x
            pair = torch.cat([graph.rows(row.unsqueeze(0), create_graph=True) for row in selection.winners.t()], 1)
        scores, (prediction, runner_up) = logits.gather(1, selection.winners), selection.winners.unbind(1)
        if target is None:
            result = margin_geometry(scores, pair, flat_x, norm=p, backend=backend)
        else:
            result, prediction = of_pair(scores, pair, flat_x, p), selection.logits.argmax(1)
        found = {"prediction": prediction, "runner_up": runner_up} | selection.provenance
        if keep_saliency:
            rows = {"saliency": pair[:, 0], "binarized_saliency": pair[:, 0] - pair[:, 1]}
            found |= {name: row.reshape(graph.leaf.shape) for name, row in rows.items()}
        result = replace(result, **found)
    return result if len(x) else result[:0]


def _asked(
    graph: Linearization, B: int, target: Tensor | None, classes: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """What a caller says of the target and the classes, checked, for the examples of the recorded pass: [B] and [B, n]."""
    if target is not None:
        validation.labels("target", target, (B, graph.n))
        target = nonempty(target).to(graph.leaf.device, torch.int64)
    allowed = validation.allowed(classes, (B, graph.n), graph.leaf.device)
    return target, None if B == 0 else allowed
