"""Image encoders of the timm library."""

import difflib
import sys
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from ddcl_lightning._utils.arguments import typed
from ddcl_lightning._utils.batch import Batch, inputs, refuse_mask
from ddcl_lightning.backbones._model_files import first_line, hub_unavailable, require, text_instead
from ddcl_lightning.backbones.base import Tokens
from ddcl_lightning.backbones.feature_cache import CacheDtype, content_key
from ddcl_lightning.backbones.pretrained import PretrainedBackbone, Samples, Unfreeze

ImageTokens = Literal["all", "cls", "mean"]


class TimmBackbone(PretrainedBackbone):
    """Features of any image model of timm, before its pooling and classifier.

    Reads images ``x`` ``(B, C, H, W)`` with 1 or 3 channels, in [0, 1] or as bytes. What the model expects comes
    from its own configuration: the whole image is resized (not cropped) to the model's size with antialiasing, grey is
    repeated over three channels, and channels are normalized by the model's mean and deviation.

    Args:
        model: Any name that ``timm.list_models()`` has, with or without the tag of its weights.
        checkpoint: File with weights of that model (``.safetensors``, ``.pth``), with or without a classifier.
        pretrained: Take the weights from the local cache or the hub if there is no ``checkpoint``; otherwise they
            are random.
        tokens: ``"all"`` returns the class token first, where the model has one, then the patches or the cells of the
            feature map row by row, without registers; ``"cls"`` the class token and ``"mean"`` the mean over patches
            or cells, T = 1.
        image_size: Height and width to resize to, in pixels; None takes the model's own.
        unfreeze: 0 keeps the encoder frozen, n trains its last n blocks as timm counts them, ``"all"`` everything.
        gradient_checkpointing: Compute activations twice to keep fewer of them; needs ``unfreeze``.
        cache_dir: Folder where tokens of a frozen encoder are kept, see :class:`PretrainedBackbone`.
        cache_dtype: Of the tokens there.
        cache_gb: Most that the cache may take on disk, in GiB; None allows half of what is free.

    Attributes:
        embed_dim: Dimension of the tokens.

    Raises:
        ImportError: Without timm (``pip install 'ddcl-lightning[vision]'``).
        OSError: If the weights are neither in a file nor on the hub.
        ValueError: If an argument is out of its range, or does not fit the model, or pixels are not in [0, 1] (which
            is checked on the CPU only).
    """

    mean: Tensor
    std: Tensor

    @typed
    def __init__(
        self,
        model: str,
        checkpoint: str | None = None,
        pretrained: bool = True,
        tokens: ImageTokens = "all",
        image_size: int | None = None,
        unfreeze: Unfreeze = 0,
        gradient_checkpointing: bool = False,
        cache_dir: str | None = None,
        cache_dtype: CacheDtype = "float16",
        cache_gb: float | None = None,
    ) -> None:
        super().__init__(unfreeze, gradient_checkpointing, cache_dir, cache_dtype, cache_gb)
        if tokens not in get_args(ImageTokens):
            raise ValueError(f"tokens must be one of {get_args(ImageTokens)}; got {tokens!r}. Choose one of them.")
        if image_size is not None and image_size < 1:
            raise ValueError(
                f"image_size must be at least 1 pixel, or None for the model's own; got {image_size}. Pass 1 or more."
            )
        timm = require("timm", "vision")
        self.model, self.tokens = model, tokens
        encoder = _load(timm, model, checkpoint, pretrained, image_size).eval()
        self.encoder = encoder
        self._data = timm.data.resolve_model_data_config(encoder)
        self.size = self._data["input_size"][1:] if image_size is None else (image_size, image_size)
        self._bilinear = self._data["interpolation"] == "bilinear"
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(self._data[name]).view(1, 3, 1, 1), persistent=False)
        patch = getattr(getattr(encoder, "patch_embed", None), "patch_size", None)
        if patch is not None and any(side % step for side, step in zip(self.size, patch, strict=True)):
            raise ValueError(
                f"image_size must be a multiple of {model!r}'s patches of {patch[0]}; got {image_size}. Round it to "
                "one."
            )
        self._prefix = int(getattr(encoder, "num_prefix_tokens", 0) or 0)
        self._has_class_token = self._prefix > 0 and getattr(encoder, "cls_token", None) is not None
        if tokens == "cls" and not self._has_class_token:
            raise ValueError(f"tokens='cls' needs a model with a class token, which {model!r} has not; use 'mean'.")
        self.embed_dim = int(encoder.num_features)
        blocks = None if unfreeze in (0, "all") else _blocks(timm, encoder)
        self._set_trainable(blocks, lambda: self._features(torch.zeros(1, 3, *self.size)))
        if gradient_checkpointing:
            try:
                encoder.set_grad_checkpointing(True)
            except (AssertionError, AttributeError) as error:
                raise ValueError(
                    f"gradient_checkpointing does not work with {model!r} ({first_line(error)}); leave it out."
                ) from None
        self.train(self.training)

    def samples(self, batch: Batch) -> Samples:
        """The images of a batch ``(B, C, H, W)``, checked."""
        refuse_mask(batch, type(self).__name__)
        x = inputs(batch)
        if x.dim() != 4 or x.shape[1] not in (1, 3):
            raise ValueError(
                f"batch x must hold images (B, C, H, W) with C = 1 or 3; got shape {tuple(x.shape)}. Put the channels "
                "second, and drop an alpha channel."
            )
        if x.dtype != torch.uint8 and not x.is_floating_point():
            raise TypeError(
                f"batch x must hold floating-point numbers or bytes; got {x.dtype}. Convert it with x.float()."
            )
        # Looking at the values on an accelerator would wait for it in every step.
        if x.is_floating_point() and x.device.type == "cpu" and not (x.min() >= 0 and x.max() <= 1):
            raise ValueError(
                "batch x must be in [0, 1], as the backbone normalizes it itself; got values from "
                f"{float(x.min()):.3g} to {float(x.max()):.3g}. Leave out the data's normalization, or divide by 255."
            )
        return x

    def keys(self, samples: Samples) -> list[bytes]:
        """Hashes of shape, dtype and pixels."""
        kinds = [str((tuple(image.shape), image.dtype)).encode() for image in samples]
        pixels = samples.cpu() if isinstance(samples, Tensor) else [image.cpu() for image in samples]
        return [
            content_key(kind, image.contiguous().flatten().view(torch.uint8).numpy().tobytes())
            for kind, image in zip(kinds, pixels, strict=True)
        ]

    def encode(self, samples: Samples) -> Tokens:
        """Tokens of images."""
        images = samples if isinstance(samples, Tensor) else torch.stack(list(samples))
        features = self._features(self.preprocess(images))
        if self.tokens == "cls":
            return Tokens(features[:, :1])
        patches = features[:, self._prefix :]
        if self.tokens == "mean":
            return Tokens(patches.mean(1, keepdim=True))
        return Tokens(torch.cat([features[:, :1], patches], 1) if self._has_class_token else patches)

    def preprocess(self, images: Tensor) -> Tensor:
        """Images ``(B, C, H, W)`` as the model expects them, ``(B, 3, *size)`` on its device."""
        like = self._like()
        scale = 255 if images.dtype == torch.uint8 else 1
        images = images.to(like.device, like.dtype) / scale
        if images.shape[-2:] != self.size:
            mode = "bilinear" if self._bilinear else "bicubic"
            images = interpolate(images, self.size, mode=mode, antialias=True, align_corners=False).clamp(0, 1)
        return (images.expand(-1, 3, -1, -1) - self.mean.to(images)) / self.std.to(images)

    def token_grid(self, batch: Batch) -> tuple[int, int, int] | None:
        """The grid of a model that says how it cuts images into patches, behind the class token where there is one."""
        patch = getattr(getattr(self.encoder, "patch_embed", None), "patch_size", None)
        grid = getattr(getattr(self.encoder, "patch_embed", None), "grid_size", None)
        stages = not hasattr(self.encoder, "blocks")  # which join patches on the way
        if self.tokens != "all" or patch is None or grid is None or stages:
            return None
        return int(self._has_class_token), int(grid[0]), int(grid[1])

    def recipe(self) -> dict[str, Any]:
        """Architecture, preprocessing and kind of tokens."""
        names = ("interpolation", "mean", "std")
        return {
            "model": self.model.partition(".")[0],
            "size": list(self.size),
            "tokens": self.tokens,
            **{name: self._data[name] for name in names},
        }

    def extra_repr(self) -> str:
        """The arguments that decide the tokens."""
        return f"{self.model!r}, tokens={self.tokens!r}, size={tuple(self.size)}, unfreeze={self.unfreeze!r}"

    def _features(self, images: Tensor) -> Tensor:
        """``forward_features`` as ``(B, T, embed_dim)``, whatever layout the model has."""
        features = self.encoder.forward_features(images)  # type: ignore[operator]
        if isinstance(features, Tensor) and features.dim() == 4:
            channels_last = str(getattr(self.encoder, "output_fmt", "")).endswith("NHWC")
            features = features.flatten(1, 2) if channels_last else features.flatten(2).transpose(1, 2)
        if not isinstance(features, Tensor) or features.dim() != 3 or features.shape[-1] != self.embed_dim:
            shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(
                f"model {self.model!r} must turn an image into tokens of dimension {self.embed_dim}; its features are "
                f"{shape}. Use another model."
            )
        return features


def _load(timm: Any, model: str, checkpoint: str | None, pretrained: bool, image_size: int | None) -> Any:
    """The model without its classifier, with the weights that were asked for."""
    architecture, _, tag = model.partition(".")
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        hint = f", such as {', '.join(near)}" if near else ""
        raise ValueError(f"model must be one of timm.list_models(){hint}; got {model!r}. Choose one of them.")
    if tag and not timm.is_model_pretrained(model):
        known = timm.list_pretrained(f"{architecture}.*")
        raise ValueError(
            f"model must name weights that timm knows, one of {known}, or {architecture!r}; got {model!r}. Choose one "
            "of them."
        )
    options: dict[str, Any] = {"num_classes": 0}
    if image_size is not None and timm.get_pretrained_cfg(model).fixed_input_size:
        options["img_size"] = image_size
    if checkpoint is not None:
        encoder = timm.create_model(model, pretrained=False, **options)
        _load_checkpoint(timm, encoder, model, checkpoint)
        return encoder
    if not pretrained:
        return timm.create_model(model, pretrained=False, **options)
    if not timm.is_model_pretrained(model):
        raise ValueError(
            f"timm has no weights for model {model!r}; give a checkpoint, or set pretrained=False for random weights."
        )
    cached = _cached_weights(timm, model)
    if cached is not None:
        return timm.create_model(model, pretrained=True, pretrained_cfg_overlay={"file": cached}, **options)
    why = hub_unavailable()
    if why is None:
        try:
            return timm.create_model(model, pretrained=True, **options)
        except (OSError, RuntimeError) as error:
            why = f"the hub does not offer them ({first_line(error)})"
    hub = timm.get_pretrained_cfg(model).hf_hub_id or model
    raise OSError(
        f"the weights of model {model!r} are not in the local cache, and {why}. Download them where there is a network "
        f"(hf download {hub} model.safetensors --local-dir FOLDER) and pass that file as checkpoint, or set "
        "pretrained=False for random weights."
    )


def _cached_weights(timm: Any, model: str) -> str | None:
    """File in the hub's local cache: with it timm needs no network, and does not retry for a minute without one."""
    from huggingface_hub import try_to_load_from_cache

    config = timm.get_pretrained_cfg(model)
    for name in ("model.safetensors", "pytorch_model.bin"):
        path = try_to_load_from_cache(config.hf_hub_id, name) if config.hf_hub_id else None
        if isinstance(path, str) and not config.custom_load:
            return path
    return None


def _load_checkpoint(timm: Any, encoder: nn.Module, model: str, checkpoint: str) -> None:
    """Load weights that must hold every parameter, and nothing else but a classifier."""
    path = Path(checkpoint).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint must be a file with weights of {model!r}; {str(path)!r} is none.")
    try:
        state = timm.models.load_state_dict(str(path), weights_only=True)
    except Exception as error:  # of whichever library reads the file
        # torch's own sentence goes on to advise what would run a stranger's code.
        why = text_instead(path) or f"{type(error).__name__}: {first_line(error).partition('. ')[0]}"
        raise ValueError(
            f"checkpoint {str(path)!r} holds no weights that can be read ({why}). It must be a .safetensors file, or "
            "what torch.save(model.state_dict(), file) writes."
        ) from None
    adapt = getattr(sys.modules[type(encoder).__module__], "checkpoint_filter_fn", None)
    try:
        if adapt is not None:  # timm's own, for weights of another origin or image size
            state = adapt(state, encoder)
        result = encoder.load_state_dict(state, strict=False)
    except (RuntimeError, KeyError) as error:
        raise ValueError(
            f"checkpoint {str(path)!r} does not fit model {model!r}: {' '.join(str(error).split())[:300].rstrip('.')}. "
            "Name the model that it was saved from."
        ) from None
    heads = encoder.pretrained_cfg.get("classifier") or ()  # type: ignore[union-attr, operator]
    heads = (heads,) if isinstance(heads, str) else heads
    extra = [name for name in result.unexpected_keys if not name.startswith(tuple(f"{head}." for head in heads))]
    if result.missing_keys or extra:
        faults = [
            f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            for what, names in (("are missing", result.missing_keys), ("are unknown", extra))
            if names
        ]
        raise ValueError(
            f"checkpoint {str(path)!r} does not fit model {model!r}: of its weights {' and '.join(faults)}. "
            f"{_remedy(encoder, model, state)}"
        )


def _remedy(encoder: nn.Module, model: str, state: dict[str, Any]) -> str:
    """Remedy for a checkpoint with other names."""
    shapes = [tuple(value.shape) for value in encoder.state_dict().values()]
    if [tuple(getattr(value, "shape", ())) for value in state.values()][: len(shapes)] != shapes:
        return "Name the model that it was saved from."
    # Not done here: shapes alone cannot tell whether two layers of one shape have changed places.
    return (
        "All its shapes come in the order of that model, so another library has probably named them: rename them by "
        f"dict(zip(timm.create_model({model!r}).state_dict(), torch.load(checkpoint).values())), save that and compare "
        "its classes of a few images with those of the origin."
    )


def _blocks(timm: Any, encoder: nn.Module) -> list[list[nn.Parameter]] | None:
    """Parameters by block as timm numbers them, without the stem; a final norm belongs to the last one."""
    if not hasattr(encoder, "group_matcher"):
        return None
    groups = timm.models.group_parameters(encoder, encoder.group_matcher(coarse=False), return_values=True)  # type: ignore[operator]
    return [groups[number] for number in sorted(groups)][1:]
