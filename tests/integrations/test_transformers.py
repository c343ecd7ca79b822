"""Language models, and classifiers of text, images and sound, of transformers: equal to a loop of one gradient a class."""

import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastsal
from fastsal import Certified, Exact, analyze
from fastsal.integrations import transformers as drop_in
from fastsal.model.linearization import linearize
from fastsal.model.products import ModelPasses

V, CLASSES = 300, 200
IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
TOKENS = torch.randint(5, V, (3, 6), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]])  # of texts of several lengths


@pytest.fixture(scope="module")
def library(torchvision):
    return pytest.importorskip("transformers")


def causal(name, **sizes):
    def make(tf):
        model = getattr(tf, f"{name}ForCausalLM")(getattr(tf, f"{name}Config")(vocab_size=V, **sizes, **IDS))
        return drop_in.next_token(model.eval(), TOKENS, attention_mask=MASK)

    return make


def gpt2(tf):
    config = tf.GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=2, **IDS)
    return drop_in.next_token(tf.GPT2LMHeadModel(config).eval(), TOKENS, attention_mask=MASK)


def masked(tf):
    """The gap is elsewhere in every example."""
    model = tf.BertForMaskedLM(tf.BertConfig(vocab_size=V, **SIZES)).eval()
    return drop_in.next_token(model, TOKENS, attention_mask=MASK, position=torch.tensor([3, 2, 5]))


def t5(of):
    def make(tf):
        config = tf.T5Config(
            vocab_size=V, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2, decoder_start_token_id=0, **IDS
        )
        model = tf.T5ForConditionalGeneration(config).eval()
        return drop_in.next_token(model, TOKENS, of=of, attention_mask=MASK, decoder_input_ids=TOKENS[:, :3])

    return make


LAYERS = {
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "decoder_start_token_id": 0,
}


def bart(tf):
    model = tf.BartForConditionalGeneration(tf.BartConfig(vocab_size=V, d_model=32, **LAYERS, **IDS)).eval()
    inputs = {"attention_mask": MASK, "decoder_input_ids": TOKENS[:, :3]}
    return drop_in.next_token(model, TOKENS, of="encoder_outputs", **inputs)


def whisper(tf):
    sizes = {"num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 12}
    model = tf.WhisperForConditionalGeneration(
        tf.WhisperConfig(vocab_size=V, d_model=32, **LAYERS, **sizes, **IDS)
    ).eval()
    mel = torch.randn(3, 8, 40, generator=torch.Generator().manual_seed(1))
    return drop_in.next_token(model, of="input_features", input_features=mel, decoder_input_ids=TOKENS[:, :3])


def text(tf):
    model = tf.DistilBertForSequenceClassification(
        tf.DistilBertConfig(vocab_size=V, dim=32, n_layers=2, n_heads=2, hidden_dim=48, num_labels=CLASSES)
    )
    kwargs = {"attention_mask": MASK}
    return {"model": model.eval(), "x": TOKENS, "layer": model.get_input_embeddings(), "kwargs": kwargs}


def images(tf):
    model = tf.ViTForImageClassification(tf.ViTConfig(image_size=16, patch_size=8, num_labels=CLASSES, **SIZES))
    return {"model": model.eval(), "x": torch.randn(3, 3, 16, 16)}


def convolutions(tf):
    config = tf.ConvNextConfig(hidden_sizes=[8, 12, 16, 20], depths=[1, 1, 1, 1], num_labels=CLASSES)
    return {"model": tf.ConvNextForImageClassification(config).eval(), "x": torch.randn(3, 3, 64, 64)}


def sound(tf):
    kernels = {"conv_dim": (8, 8), "conv_stride": (5, 4), "conv_kernel": (10, 8), "num_feat_extract_layers": 2}
    places = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    config = tf.Wav2Vec2Config(vocab_size=32, num_labels=CLASSES, **SIZES, **kernels, **places)
    mask = (torch.arange(400) < torch.tensor([[400], [300], [250]])).long()
    model = tf.Wav2Vec2ForSequenceClassification(config).eval()
    return {"model": model, "x": torch.randn(3, 400), "kwargs": {"attention_mask": mask}}


MODELS = {
    "gpt2": gpt2,
    "llama": causal("Llama", **SIZES),
    "gpt-neox": causal("GPTNeoX", **SIZES),
    "bert": masked,
    "t5 decoder": t5(None),
    "t5 encoder": t5("inputs_embeds"),
    "bart": bart,
    "whisper": whisper,
    "distilbert": text,
    "vit": images,
    "convnext": convolutions,
    "wav2vec2": sound,
}


def at(value, example, count):
    """What belongs to an example of what a model takes."""
    if isinstance(value, tuple):
        return tuple(at(one, example, count) for one in value)
    own = isinstance(value, torch.Tensor) and value.dim() > 0 and len(value) == count
    return value[example : example + 1] if own else value


def ratios(model, x, kwargs, classes, layer):
    """The ratios of some classes of one example, a backward pass for each."""
    leaf = x.clone()
    if layer is None:
        logits = model(leaf.requires_grad_(), **kwargs)
    else:
        leaf = layer(x).detach().requires_grad_()
        handle = layer.register_forward_hook(lambda *_: leaf)
        logits = model(x, **kwargs)
        handle.remove()
    logits = getattr(logits, "logits", logits)[0]
    prediction = int(logits.argmax())
    rows = [torch.autograd.grad(logits[j], leaf, retain_graph=True)[0].flatten() for j in (prediction, *classes)]
    gap = torch.linalg.vector_norm(rows[0] - torch.stack(rows[1:]), dim=1)
    ratio = (logits[prediction] - logits[classes]).detach() / gap
    return ratio.masked_fill(torch.tensor(classes) == prediction, math.inf)


def loop(model, x, kwargs, classes, layer=None):
    """The ratios of the kept classes, [B, k]: each example alone."""
    each = ((x[i : i + 1], {name: at(value, i, len(x)) for name, value in kwargs.items()}) for i in range(len(x)))
    return torch.stack([ratios(model, one, own, classes, layer) for one, own in each])


def doubled(value):
    if isinstance(value, tuple):
        return tuple(doubled(one) for one in value)
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


@pytest.mark.parametrize("name", MODELS)
def test_equal_to_a_loop_over_classes(library, name):
    """200 kept classes, texts of several lengths with padding on the left, in float64."""
    torch.manual_seed(0)
    asked = MODELS[name](library)
    asked |= {"model": asked["model"].double().requires_grad_(False), "x": doubled(asked["x"])}
    asked["kwargs"] = {key: doubled(value) for key, value in asked.get("kwargs", {}).items()}
    total = V if name not in ("distilbert", "vit", "convnext", "wav2vec2") else CLASSES
    classes = torch.zeros(total, dtype=torch.bool)
    kept = torch.randperm(total)[:CLASSES].sort().values
    classes[kept] = True
    want = loop(asked["model"], asked["x"], asked["kwargs"], kept.tolist(), asked.get("layer"))
    for method in (Certified(), Exact(), Exact(memory_limit=0)):
        found = analyze(**asked, classes=classes, method=method)
        assert found.certified.all()
        torch.testing.assert_close(found.linearized_robustness, want.amin(1), rtol=1e-8, atol=0.0)
        assert torch.equal(found.runner_up, kept[want.argmin(1)])


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5 decoder", "whisper"])
def test_the_logits_are_the_model_s(library, name):
    torch.manual_seed(0)
    asked = MODELS[name](library)
    inside = asked["model"]
    with torch.no_grad():
        found = inside(asked["x"], **asked["kwargs"])
        if name in ("gpt2", "llama"):
            want = inside.model(TOKENS, attention_mask=MASK).logits[:, -1]
        elif name == "whisper":
            want = inside.model(asked["x"], decoder_input_ids=TOKENS[:, :3]).logits[:, -1]
        else:
            want = inside.model(TOKENS, attention_mask=MASK, decoder_input_ids=TOKENS[:, :3]).logits[:, -1]
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)
    assert not inside.model.get_output_embeddings()._forward_pre_hooks


@pytest.mark.parametrize("position", [1, -2, torch.tensor([1, 3, 5])])
def test_positions(library, position):
    torch.manual_seed(0)
    model = library.GPT2LMHeadModel(library.GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=2, **IDS)).eval()
    asked = drop_in.next_token(model, TOKENS, position=position)
    with torch.no_grad():
        want = model(TOKENS).logits[torch.arange(3), position]
        torch.testing.assert_close(asked["model"](asked["x"], **asked["kwargs"]), want, rtol=1e-5, atol=1e-5)


class Weights(TorchDispatchMode):
    """The most entries that an operand with the shape of the head's weights has, for all examples and rows together."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for one in args:
            if isinstance(one, torch.Tensor) and set(one.shape[-2:]) == {V, 32}:
                self.entries = max(self.entries, one.numel())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("examples", [1, 3])
@pytest.mark.parametrize("many", [True, False])
def test_products_read_the_head_once(library, many, examples, frozen):
    """Not once for each example and each of four rows or directions."""
    model = library.GPT2LMHeadModel(library.GPT2Config(vocab_size=V, n_embd=32, n_layer=1, n_head=2, **IDS)).eval()
    position = torch.tensor([1, 3, 5])[:examples] if many else -1
    asked = drop_in.next_token(model.requires_grad_(not frozen), TOKENS[:examples], position=position)
    every = np.arange(examples)
    with Weights() as seen, linearize(**asked) as graph:
        passes = ModelPasses(graph, every, None)
        passes.vjp(every, torch.randn(examples, 4, V))
        passes.jvp(every, torch.randn(examples, 4, passes.dimension))
    assert seen.entries == V * 32


def test_what_is_missing_is_named(library):
    model = library.GPT2LMHeadModel(library.GPT2Config(vocab_size=V, n_embd=32, n_layer=1, n_head=2, **IDS)).eval()
    with pytest.raises(
        ValueError, match=r"of: got 'inputs_embeds', which is not among the inputs \['attention_mask'\], nor is"
    ):
        drop_in.next_token(model, attention_mask=MASK)
    with pytest.raises(ValueError, match="k: got 0, wants an integer >= 1"):
        drop_in.foils(model, Tokenizer(), "ab", k=0)


class Batch(dict):
    """What a tokenizer returns."""


class Tokenizer:
    """A letter is a token."""

    def __call__(self, text, return_tensors):
        ids = torch.tensor([[ord(letter) for letter in text]])
        return Batch(input_ids=ids, attention_mask=torch.ones_like(ids))

    def decode(self, ids):
        return "".join(map(chr, ids))


class TestFoils:
    def model(self, library):
        torch.manual_seed(0)
        return library.GPT2LMHeadModel(library.GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=2, **IDS)).eval()

    def test_table(self, library):
        model = self.model(library)
        found = drop_in.foils(model, Tokenizer(), "no words", k=3)
        asked = drop_in.next_token(model, Tokenizer()("no words", "pt")["input_ids"])
        every = analyze(**asked, method=Exact(memory_limit=0), keep_saliency=True)
        assert found.id == every.prediction.item()
        nearest = every.distances[0].argsort()[:3].tolist()
        assert [foil.id for foil in found.foils] == nearest
        torch.testing.assert_close(
            torch.tensor([foil.distance for foil in found.foils]), every.distances[0][nearest], rtol=1e-4, atol=0.0
        )
        row = every.binarized_saliency[0]
        torch.testing.assert_close(found.foils[0].saliency, row.norm(dim=1), rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(found.foils[0].contribution, (row * asked["x"][0]).sum(1), rtol=1e-4, atol=1e-7)
        with torch.no_grad():
            order = model(Tokenizer()("no words", "pt")["input_ids"]).logits[0, -1].argsort(descending=True).tolist()
        assert [foil.rank for foil in found.foils] == [1 + order.index(which) for which in nearest]
        assert all(foil.certified for foil in found.foils)
        assert str(found).count("\n") == 4
        assert "'no words' is followed by" in str(found)
        assert found._repr_html_().count("<p>") == 4
        ax = fastsal.plot.tokens(found.inputs, found.foils[0].contribution)
        assert [text.get_text() for text in ax.texts] == list("no words")

    def test_allowed(self, library):
        allowed = torch.zeros(V, dtype=torch.bool)
        allowed[[7, 9]] = True
        found = drop_in.foils(self.model(library), Tokenizer(), "ab", k=2, allowed=allowed, norm=math.inf)
        assert {foil.id for foil in found.foils} == {7, 9}
        assert allowed.sum() == 2

    def test_encoder_decoder(self, library):
        torch.manual_seed(0)
        config = library.T5Config(
            vocab_size=V, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2, decoder_start_token_id=0, **IDS
        )
        found = drop_in.foils(library.T5ForConditionalGeneration(config).eval(), Tokenizer(), "abc", method="exact")
        assert found.inputs == ("a", "b", "c")
        assert found.foils[0].saliency.shape == (3,)
