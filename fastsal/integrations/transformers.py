"""The next token of a language model of transformers: what `fastsal.analyze` takes, and its nearest foils.

A contrastive explanation asks why a model says this token and not another one, the foil (Yin and Neubig, EMNLP 2022, arXiv
2202.10419). The foil need not be named: it is the token at the nearest linearised boundary, among all of the vocabulary.

Classifiers of transformers need nothing from here. `fastsal.analyze(model, pixel_values)` takes those of images, and with
`layer=model.get_input_embeddings(), kwargs={"attention_mask": ...}` those of text, with token ids for x.
"""

import html
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastsal import methods, plot
from fastsal.analysis import analyze

__all__ = ["Foil", "Foils", "NextToken", "foils", "next_token"]


class NextToken(nn.Module):
    """The logits of the token after a position, as a function of one of a model's arguments; `next_token` makes it."""

    def __init__(self, model: Any, of: str) -> None:
        super().__init__()
        self.model, self.of = model, of
        self.takes = set(inspect.signature(model.forward).parameters)

    def forward(self, value: Tensor, position: int | Tensor = -1, **inputs: Any) -> Tensor:
        """The logits [B, n], for the argument's value [B, ...]."""
        inputs[self.of] = (value,) if self.of == "encoder_outputs" else value
        if "use_cache" in self.takes:
            inputs["use_cache"] = False

        def at(values: Tensor) -> Tensor:
            # Not a slice of them, whose gaps make torch read the head's weights anew for each row and direction.
            return values[torch.arange(len(values), device=values.device), position]

        # A head for a large vocabulary, at every position, would be most of the work.
        head, handle = self.model.get_output_embeddings(), None
        if head is not None:
            handle = head.register_forward_pre_hook(lambda module, hidden: at(hidden[0]).unsqueeze(1))
        try:
            logits: Tensor = self.model(**inputs).logits
        finally:
            if handle is not None:
                handle.remove()
        return at(logits) if handle is None else logits[:, 0]


def next_token(
    model: Any,
    input_ids: Tensor | None = None,
    *,
    of: str | None = None,
    position: int | Tensor = -1,
    **inputs: Any,
) -> dict[str, Any]:
    """What `fastsal.analyze` takes to analyse the next token: `analyze(**next_token(model, input_ids), method="certified")`.

    Args:
        model: A model of transformers with logits of the vocabulary at every position, in evaluation mode: causal
            (`AutoModelForCausalLM`), masked, or encoder-decoder (`AutoModelForSeq2SeqLM`, Whisper).
        input_ids: int64 [B, L].
        of: The name of the argument in whose space distances are measured. None for "inputs_embeds", or of an encoder-decoder
            model "decoder_inputs_embeds"; these are looked up from the ids where they are not given. "encoder_outputs" stands
            for the encoder's last hidden state, and any other argument, such as "input_features", may be named.
        position: Where the logits are looked at: one for all, or int64 [B]. The last by default, as it should be with padding
            on the left.
        inputs: What else the model takes: `attention_mask`, `inputs_embeds`, `decoder_input_ids`, `input_features` ...

    Returns:
        `model`, `x` and `kwargs` for `fastsal.analyze`. Of an encoder-decoder model the encoder has run already, where x is
        behind it.

    Raises:
        ValueError: The argument that `of` names is not there, and no ids that it could be looked up from.

    >>> import torch, fastsal, transformers
    >>> from fastsal.integrations.transformers import next_token
    >>> _ = torch.manual_seed(0)
    >>> config = transformers.GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=2)
    >>> model = transformers.GPT2LMHeadModel(config).eval()
    >>> found = fastsal.analyze(**next_token(model, torch.tensor([[5, 200, 17]])), method="certified")
    >>> found.certified.tolist(), found.runner_up.shape
    ([True], torch.Size([1]))
    """
    if input_ids is not None:
        inputs["input_ids"] = input_ids
    both = bool(getattr(model.config, "is_encoder_decoder", False))
    of = of or ("decoder_inputs_embeds" if both else "inputs_embeds")
    with torch.no_grad():
        if of == "encoder_outputs" or (both and of.startswith("decoder_")):
            _encode(model, inputs)
        ids = of.replace("inputs_embeds", "input_ids")
        if of not in inputs and of != ids and ids in inputs:
            owner = model.get_decoder() if both and of.startswith("decoder_") else model
            inputs[of] = owner.get_input_embeddings()(inputs.pop(ids))
    if of not in inputs:
        raise ValueError(
            f"of: got {of!r}, which is not among the inputs {sorted(inputs)}" + (f", nor is {ids!r}" * (ids != of))
        )
    value = inputs.pop(of)
    if of == "encoder_outputs":
        value = value[0]
    return {"model": NextToken(model, of), "x": value.detach(), "kwargs": inputs | {"position": position}}


def _encode(model: Any, inputs: dict[str, Any]) -> None:
    """Runs the encoder of an encoder-decoder model, and puts its output in the place of what it takes."""
    encoder = model.get_encoder()
    takes = inspect.signature(encoder.forward).parameters
    given = {name: value for name, value in inputs.items() if name in takes}
    if "encoder_outputs" not in inputs:
        inputs["encoder_outputs"] = (encoder(**given)[0],)
    for name in given:
        if name != "attention_mask":  # the decoder looks at the encoder's positions through it
            inputs.pop(name, None)


@dataclass(frozen=True)
class Foil:
    """A token that the model does not say, and how near it is to saying it.

    Attributes:
        token: Its text.
        id: Its number in the vocabulary.
        distance: ρ̃, the distance of the linearised boundary to it, in the space of all input embeddings together.
        rank: Its place among the logits; the token that the model says has rank 1.
        certified: Whether no other token, of those that are allowed and not in the table before it, is nearer.
        saliency: ‖g†‖₂ of every input token, [L]: how much its embedding matters to the choice between the two.
        contribution: ⟨x, g†⟩ of every input token, [L]: how much it speaks for the model's token, below 0 for the foil.
    """

    token: str
    id: int
    distance: float
    rank: int
    certified: bool
    saliency: Tensor
    contribution: Tensor


@dataclass(frozen=True)
class Foils:
    """The nearest foils of a model's next token. It prints as a table, and shows as coloured text in a notebook.

    Attributes:
        inputs: The input tokens, L of them.
        token: The token that the model says.
        id: Its number in the vocabulary.
        foils: The foils, the nearest first.
    """

    inputs: tuple[str, ...]
    token: str
    id: int
    foils: tuple[Foil, ...]

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"{''.join(self.inputs)!r} is followed by {self.token!r}; the nearest other tokens:"
        yield f"{'foil':>16}{'distance':>12}{'rank':>8}  most salient inputs"
        for foil in self.foils:
            salient = foil.saliency.argsort(descending=True)[:3].tolist()
            near = ", ".join(repr(self.inputs[slot]) for slot in salient)
            yield f"{foil.token!r:>16}{foil.distance:12.4g}{foil.rank:8}  {near}"

    def _repr_html_(self) -> str:
        parts = [f"<p>followed by <b>{html.escape(self.token)}</b>, and not by</p>"]
        for foil in self.foils:
            text = plot.tokens_html(self.inputs, foil.contribution)
            parts.append(f"<p><b>{html.escape(foil.token)}</b> at {foil.distance:.4g}, rank {foil.rank}: {text}</p>")
        return "".join(parts)


def foils(
    model: Any,
    tokenizer: Any,
    text: str,
    *,
    k: int = 1,
    norm: float | str = 2,
    method: str | methods.Method = "certified",
    allowed: Tensor | None = None,
) -> Foils:
    """The tokens that a model is nearest to saying after a text, in the place of the one that it says.

    Nearest is in the space of all input embeddings together, of the encoder's where there is one, and means the smallest
    linearised distance, ρ̃, of `fastsal.analyze`: over the whole vocabulary, for which a loop takes a backward pass for each
    token. The second most likely token often is another one.

    Args:
        model: A causal or encoder-decoder language model of transformers, in evaluation mode.
        tokenizer: Its tokenizer.
        text: The text. An encoder-decoder model begins its answer to it.
        k: How many foils, at least 1; each takes an analysis of its own.
        norm: As in `fastsal.analyze`.
        method: As in `fastsal.analyze`.
        allowed: Which tokens may be foils, bool [n]; None (default) for all.

    Returns:
        A `Foils`: `print` shows a table, a notebook coloured text, and `fastsal.plot.tokens` draws it.

    Raises:
        ValueError: `k` is no integer from 1 on, or what `fastsal.analyze` raises.
    """
    if not isinstance(k, int) or k < 1:
        raise ValueError(f"k: got {k!r}, wants an integer >= 1")
    encoded = tokenizer(text, return_tensors="pt")
    inputs = {name: encoded[name].to(model.device) for name in ("input_ids", "attention_mask") if name in encoded}
    ids = inputs["input_ids"]
    if model.config.is_encoder_decoder:
        start = torch.full_like(ids[:, :1], model.config.decoder_start_token_id)
        inputs |= {"decoder_input_ids": start}
    question = next_token(model, of="inputs_embeds", **inputs)
    with torch.no_grad():
        logits = question["model"](question["x"], **question["kwargs"])[0]
    classes = torch.ones_like(logits, dtype=torch.bool) if allowed is None else allowed.to(logits.device).clone()
    found = []
    for _ in range(k):
        one = analyze(**question, classes=classes, norm=norm, method=method, keep_saliency=True)
        foil = int(one.runner_up)
        row = one.binarized_saliency
        assert row is not None
        found.append(
            Foil(
                token=tokenizer.decode([foil]),
                id=foil,
                distance=float(one.linearized_robustness),
                rank=1 + int((logits > logits[foil]).sum()),
                certified=bool(one.certified),
                saliency=row[0].float().norm(dim=1).cpu(),
                contribution=(row * question["x"])[0].float().sum(1).cpu(),
            )
        )
        classes[foil] = False
    prediction = int(one.prediction)
    words = tuple(tokenizer.decode([token]) for token in ids[0].tolist())
    return Foils(words, tokenizer.decode([prediction]), prediction, tuple(found))
