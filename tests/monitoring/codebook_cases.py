"""Tiny codebooks of every kind that is recognised, with what a call of each returns by itself."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from ddcl_lightning import VectorQuantizer, find_codebooks, record_codebooks
from ddcl_lightning.heads import VQPooling

K, DIM = 16, 8
VECTORS = ("embed", "embed_sum", "codebook", "codevectors", "frozen_codebook", "prototypes")
LAYERS = ("codebook", "embedding", "prototypes", "codes")


@dataclass
class Case:
    """A model, how it is called, and the codes ``(*)`` or ``(*, H)`` that it returns, by the name of the codebook."""

    build: Callable[[], nn.Module]
    call: Callable[[nn.Module], dict[str, Tensor]]
    named: Any = ()
    num_codes: int = K
    vectors: bool = True  # whether there is a codebook

    def make(self) -> nn.Module:
        torch.manual_seed(0)
        return self.build()


def collapse(model: nn.Module) -> None:
    """Make all vectors of each codebook one; where there are none, all tokens."""
    for path, module in model.named_modules():
        name = path.rpartition(".")[2]
        tensors = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
        chosen = [tensors[vector] for vector in VECTORS if vector in tensors]
        if isinstance(module, (nn.Embedding, nn.Linear)) and (name in LAYERS or "heads" in path):
            chosen.append(module.weight)
        if name == "project_in" and isinstance(module, nn.Linear):
            chosen.append(module.weight.mT)
        with torch.no_grad():
            for tensor in chosen:
                if tensor.is_floating_point():
                    tensor.copy_(tensor[..., :1, :].expand_as(tensor))
            if nn.utils.parametrize.is_parametrized(module, "weight"):
                module.weight = module.weight[:1].expand_as(module.weight).clone()
        if hasattr(module, "embed_sum"):
            module._embed = None


def vq(name: str, codes: Callable[[Any], dict[str, Tensor]], vectors: bool = True, **options: Any) -> Case:
    def build() -> nn.Module:
        library = pytest.importorskip("vector_quantize_pytorch")
        return getattr(library, name)(dim=DIM, **options)

    return Case(build, lambda model: codes(model(tokens())[1]), vectors=vectors)


def tokens() -> Tensor:
    return torch.randn(4, 60, DIM)


def levels(codes: Tensor, prefix: str = "") -> dict[str, Tensor]:
    return {f"{prefix}level{level}": column for level, column in enumerate(codes.unbind(-1))}


def groups(codes: Tensor) -> dict[str, Tensor]:
    return {name: column for group, each in enumerate(codes) for name, column in levels(each, f"group{group}.").items()}


def single(codes: Tensor) -> dict[str, Tensor]:
    return {"": codes}


def audio_model(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        library = pytest.importorskip("transformers")
        model: nn.Module = getattr(library, f"{name}Model")(getattr(library, f"{name}Config")(**options)).eval()
        start_from_tokens(model)
        return model

    return build


def start_from_tokens(model: Any) -> None:
    """Put the vectors of each level on tokens of its own: they are zero, for weights from a file."""
    sources = find_codebooks(model)
    for name, source in sources.items():
        book, records = source.module, []
        with record_codebooks({name: source}, lambda name, record, records=records: records.append(record)):
            model.encode(audio())
        vectors = records[0].tokens[0, torch.randperm(records[0].tokens.shape[1])[:K]].contiguous()
        for key in ("embed", "embed_sum"):
            if key in book._buffers:
                book._buffers[key].copy_(vectors)
        book._embed = None  # Mimi keeps them


def audio() -> Tensor:
    return torch.randn(4, 1, 1600)


def encodec(model: Any) -> dict[str, Tensor]:
    codes = model.encode(audio()).audio_codes
    return {f"quantizer.level{level}": codes[0, :, level] for level in range(3)}


def dac(model: Any) -> dict[str, Tensor]:
    codes = model.encode(audio()).audio_codes
    return {f"quantizer.level{level}": codes[:, level] for level in range(3)}


def mimi(model: Any) -> dict[str, Tensor]:
    codes = model.encode(audio()).audio_codes
    names = (
        "semantic_residual_vector_quantizer.level0",
        *(f"acoustic_residual_vector_quantizer.level{i}" for i in (0, 1)),
    )
    return {f"quantizer.{name}": codes[:, level] for level, name in enumerate(names)}


def image_quantizer(module: str, name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        pytest.importorskip("transformers")
        models = pytest.importorskip(f"transformers.models.{module}.modeling_{module}")
        config = type("Config", (), {"num_embeddings": K, "codebook_size": K, "embed_dim": DIM, **options})()
        model: nn.Module = getattr(models, name)(config)  # as it stands in the model
        if isinstance(model.embedding, nn.Linear):  # compares inner products
            model.embedding.weight.data = normalize(model.embedding.weight.data, dim=-1)
        return model

    return build


def codec_quantizer(module: str, name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        pytest.importorskip("transformers")
        models = pytest.importorskip(f"transformers.models.{module}.modeling_{module}")
        sizes = {"codebook_size": K, "codebook_dim": DIM, "hidden_size": DIM, "num_quantizers": 2, "frame_rate": 50}
        model: nn.Module = getattr(models, name)(type("Config", (), sizes)())
        for buffer, values in model.named_buffers():
            if buffer.endswith("embed"):
                nn.init.normal_(values, std=0.5)
        return model

    return build


def encoded(model: Any) -> dict[str, Tensor]:
    """The codes ``(L, B, T)`` of all levels, or ``(B, T)`` of one."""
    codes = model.encode(tokens().mT)
    return levels(codes.movedim(0, -1)) if codes.dim() == 3 else single(codes)


def returned(shape: tuple[int, ...], place: int | None) -> Callable[[Any], dict[str, Tensor]]:
    def call(model: Any) -> dict[str, Tensor]:
        output = model(torch.randn(shape))
        return {"": output if place is None else output[place]}

    return call


def gumbel() -> nn.Module:
    pytest.importorskip("transformers")
    from transformers.models.wav2vec2.modeling_wav2vec2 import Wav2Vec2GumbelVectorQuantizer

    sizes = {"num_codevector_groups": 2, "num_codevectors_per_group": K, "codevector_dim": DIM, "conv_dim": (DIM,)}
    model: nn.Module = Wav2Vec2GumbelVectorQuantizer(type("Config", (), sizes)())
    nn.init.normal_(model.codevectors)
    return model


def drawn(model: Any) -> dict[str, Tensor]:
    """The codes of a training call, from the logits and the noise that it draws."""
    values = tokens()
    state = torch.get_rng_state()
    model(values)
    torch.set_rng_state(state)
    logits = model.weight_proj(values).view(-1, K).float()
    noise = nn.functional.gumbel_softmax(logits, tau=model.temperature, hard=True)
    return {"": noise.argmax(-1).view(-1, 2)}


def finite_scalars(module: str, name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        models = pytest.importorskip(f"transformers.models.{module}.modeling_{module}")
        quantizer: nn.Module = getattr(models, name)(
            type("Config", (), {"quantization_dim": DIM, "quantization_levels": [4, 4]})()
        )
        return quantizer

    return build


def directions() -> nn.Linear:
    layer = nn.Linear(DIM, K, bias=False)
    with torch.no_grad():
        layer.weight.copy_(normalize(layer.weight, dim=-1))
    return layer


class SwaVPrototypes(nn.Module):
    """The shape of lightly's."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList([directions() for _ in range(2)])

    def forward(self, values: Tensor) -> list[Tensor]:
        return [head(values) for head in self.heads]


class DINOProjectionHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Linear(DIM, DIM)
        self.last_layer = nn.utils.parametrizations.weight_norm(directions())

    def forward(self, values: Tensor) -> Tensor:
        return self.last_layer(normalize(self.layers(values), dim=-1))


class Student(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(DIM, DIM)
        self.prototypes = directions()

    def forward(self, values: Tensor) -> Tensor:
        return self.prototypes(normalize(self.encoder(values), dim=-1))


class VQGAN(nn.Module):
    """A quantizer of feature maps under a name that says nothing, with an Embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Embedding(K, DIM)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        values = images.movedim(1, -1)
        indices = torch.cdist(values.reshape(-1, DIM), self.codes.weight).argmin(-1)
        quantized = self.codes(indices).view(values.shape).movedim(-1, 1)
        self.codes(indices)  # a second look at the same codes
        return quantized, indices


def library_head() -> nn.Module:
    pytest.importorskip("vector_quantize_pytorch")
    from ddcl_lightning.integrations.vector_quantize import LibraryVQ

    return LibraryVQ("VectorQuantize", {"codebook_size": K}, embed_dim=DIM)


def spread_out() -> nn.Module:
    model = VectorQuantizer(DIM, K, code_dim=4)
    nn.init.normal_(model.codebook)
    return model


class Anything(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.prototypes = nn.Parameter(torch.randn(K, DIM))

    def forward(self, values: Tensor) -> Tensor:
        return torch.cdist(values, self.prototypes.expand(len(values), -1, -1)).argmin(-1)


CASES: dict[str, Case] = {
    "VectorQuantize": vq("VectorQuantize", single, codebook_size=K),
    "VectorQuantize of maps": Case(
        lambda: pytest.importorskip("vector_quantize_pytorch").VectorQuantize(
            dim=DIM, codebook_size=K, accept_image_fmap=True, codebook_dim=4, kmeans_init=True
        ),
        lambda model: single(model(torch.randn(2, DIM, 10, 12))[1]),
    ),
    "VectorQuantize, cosine": vq("VectorQuantize", single, codebook_size=K, use_cosine_sim=True),
    "VectorQuantize, heads": vq("VectorQuantize", single, codebook_size=K, heads=2, separate_codebook_per_head=True),
    "ResidualVQ": vq("ResidualVQ", levels, codebook_size=K, num_quantizers=3),
    "GroupedResidualVQ": vq("GroupedResidualVQ", groups, codebook_size=K, num_quantizers=2, groups=2),
    "SimVQ": vq("SimVQ", single, codebook_size=K),
    "FSQ": vq("FSQ", single, vectors=False, levels=[4, 4]),
    "FSQ, two codebooks": vq("FSQ", single, vectors=False, levels=[4, 4], num_codebooks=2),
    "LFQ": vq("LFQ", single, vectors=False, codebook_size=K),
    "ResidualFSQ": vq("ResidualFSQ", levels, vectors=False, levels=[4, 4], num_quantizers=2),
    "Encodec": Case(
        audio_model(
            "Encodec",
            **{"num_filters": 4, "hidden_size": DIM, "codebook_dim": DIM, "codebook_size": K, "num_lstm_layers": 1},
            **{"upsampling_ratios": [4, 2], "target_bandwidths": [2.4], "sampling_rate": 1600},
        ),
        encodec,
    ),
    "DAC": Case(
        audio_model(
            "Dac",
            **{"encoder_hidden_size": 4, "downsampling_ratios": [2, 4], "decoder_hidden_size": 16, "hidden_size": 16},
            **{"n_codebooks": 3, "codebook_size": K, "codebook_dim": 4},
        ),
        dac,
    ),
    "Mimi": Case(
        audio_model(
            "Mimi",
            **{"num_filters": 4, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8},
            **{"num_key_value_heads": 2, "intermediate_size": 16, "codebook_size": K, "codebook_dim": DIM},
            **{"vector_quantization_hidden_dimension": DIM, "num_quantizers": 3, "num_semantic_quantizers": 1},
            **{"upsampling_ratios": [4, 2], "sampling_rate": 1600, "frame_rate": 100, "upsample_groups": 16},
        ),
        mimi,
    ),
    "Chameleon": Case(image_quantizer("chameleon", "ChameleonVQVAEVectorQuantizer"), returned((2, DIM, 10, 12), 2)),
    "Janus": Case(image_quantizer("janus", "JanusVQVAEVectorQuantizer", num_patches=4), returned((2, DIM, 10, 8), 2)),
    "GLM-Image": Case(image_quantizer("glm_image", "GlmImageVQVAEVectorQuantizer"), returned((2, DIM, 10, 12), 2)),
    "Emu3": Case(image_quantizer("emu3", "Emu3VQVAEVectorQuantizer"), returned((2, 3, DIM, 5, 8), None)),
    "Apertus": Case(
        image_quantizer("apertus1p5", "Apertus1p5VisionTokenizerVectorQuantizer"), returned((2, DIM, 10, 12), None)
    ),
    "X-Codec": Case(codec_quantizer("xcodec", "XcodecResidualVectorQuantization"), encoded),
    "WavTokenizer": Case(codec_quantizer("wavtokenizer", "WavTokenizerVectorQuantization"), encoded),
    "Higgs": Case(
        codec_quantizer("higgs_audio_v2_tokenizer", "HiggsAudioV2TokenizerResidualVectorQuantization"), encoded
    ),
    "NeuCodec": Case(
        finite_scalars("neucodec", "NeuCodecQuantizer"),
        lambda model: {"quantizer": model(tokens())[1].squeeze(-1)},
        vectors=False,
    ),
    "X-Codec 2": Case(
        finite_scalars("xcodec2", "Xcodec2Quantizer"),
        lambda model: {"quantizer": model(tokens())[1].squeeze(-1)},
        vectors=False,
    ),
    "wav2vec 2.0": Case(gumbel, drawn),
    "SwAV": Case(
        SwaVPrototypes, lambda model: {f"heads.{i}": scores.argmax(-1) for i, scores in enumerate(model(tokens()))}
    ),
    "DINO": Case(DINOProjectionHead, lambda model: {"last_layer": model(tokens()).argmax(-1)}),
    "named Linear": Case(Student, lambda model: {"prototypes": model(tokens()).argmax(-1)}, named=["prototypes"]),
    "named Embedding": Case(VQGAN, lambda model: {"codes": model(torch.randn(2, DIM, 10, 12))[1]}, named=["codes"]),
    "function": Case(
        Anything,
        lambda model: {"": model(tokens())},
        named={"": lambda module, inputs, output: (inputs[0], module.prototypes, output)},
    ),
    "VectorQuantizer": Case(spread_out, lambda model: single(model(tokens()).indices)),
    "LibraryVQ": Case(library_head, lambda model: {"quantizer.layer": model(tokens()).codes.squeeze(-1)}),
    "VQPooling": Case(
        lambda: VQPooling(K, embed_dim=DIM), lambda model: {"quantizer": model(tokens()).codes.squeeze(-1)}
    ),
}
