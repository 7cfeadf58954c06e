"""Loading models and tokenizers of the transformers library: quietly, completely, or with one sentence of refusal."""

import importlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any

from torch import nn

from ddcl_lightning.backbones._model_files import first_line, from_cache_or_hub, local_folder, require, text_instead

_REMEDY = (
    "Download it where there is a network (hf download {0} --local-dir FOLDER) and pass that folder as model, or check "
    "the name."
)


def load_encoder(model: str, revision: str | None) -> Any:
    """The bare model, in single precision."""
    transformers = require("transformers", "text")
    folder = local_folder(model)

    def load(local_files_only: bool) -> tuple[Any, dict[str, Any]]:
        with _quiet(local_files_only):
            loaded: tuple[Any, dict[str, Any]] = transformers.AutoModel.from_pretrained(
                folder or model,
                revision=revision,
                local_files_only=local_files_only,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # otherwise it refuses in a report of several lines; checked below
            )
        return loaded

    if folder is not None:
        try:
            encoder, info = load(True)
        except Exception as error:  # of any library that reads weights
            texts = filter(None, map(text_instead, filter(Path.is_file, folder.glob("*.safetensors"))))
            raise OSError(
                f"model {model!r} is a folder whose model cannot be loaded: {next(texts, first_line(error))}. It "
                "needs config.json and model.safetensors as save_pretrained writes them."
            ) from None
    else:
        encoder, info = from_cache_or_hub(load, model, _REMEDY.format(model))
    if info["mismatched_keys"]:
        name, loaded, shape = min(info["mismatched_keys"])
        raise ValueError(
            f"the weights of model {model!r} do not have the sizes of its config.json: {name} is {tuple(loaded)}, not "
            f"{tuple(shape)}; check that weights and config.json belong together."
        )
    # Poolers are not used here, and many checkpoints come without one.
    missing = sorted(name for name in info["missing_keys"] if not name.startswith("pooler."))
    if missing:
        raise ValueError(
            f"the weights of model {model!r} lack {len(missing)} of its parameters ({', '.join(missing[:3])}, ...), "
            "which would stay random; check that weights and config.json belong together."
        )
    if encoder.config.is_encoder_decoder:
        encoder = encoder.get_encoder()
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = nn.Identity()
    encoder.config.use_cache = False
    return encoder.float().eval()


def load_tokenizer(model: str, revision: str | None) -> Any:
    """A tokenizer that pads at the end, or None where the model has none."""
    transformers = require("transformers", "text")
    folder = local_folder(model)

    def load(local_files_only: bool) -> Any:
        with _quiet(local_files_only):
            return transformers.AutoTokenizer.from_pretrained(
                folder or model, revision=revision, local_files_only=local_files_only
            )

    try:
        tokenizer = load(True) if folder is not None else from_cache_or_hub(load, model, "")
    except (OSError, ValueError):
        return None
    # Where the files are missing, transformers 5 makes a tokenizer of special tokens alone: every word unknown.
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        return None
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token  # the mask tells it from the text
    return tokenizer


def longest_input(encoder: nn.Module, tokenizer: Any) -> int:
    """Number of tokens that the model has positions for."""
    config: Any = encoder.config
    limit = getattr(config, "max_position_embeddings", None)
    limit = limit if isinstance(limit, int) and limit > 0 else 2**31  # relative positions
    for module in encoder.modules():
        padding = getattr(getattr(module, "position_embeddings", None), "padding_idx", None)
        if isinstance(padding, int):  # RoBERTa counts positions from there
            limit -= padding + 1
            break
    return min(limit, tokenizer.model_max_length) if tokenizer is not None else limit


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hash of all that decides the ids of a text, other than the length to cut it at."""
    if tokenizer is None:
        return "none"
    if tokenizer.is_fast:
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        content = {name: value for name, value in content.items() if name not in ("padding", "truncation")}
    else:
        content = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    description = json.dumps([content, special], sort_keys=True, default=str)
    return blake2b(description.encode(), digest_size=16).hexdigest()


@contextmanager
def _quiet(local_files_only: bool) -> Iterator[None]:
    """Load without reports, which are checked instead, and without progress bars, unless there is a download."""
    logging: Any = importlib.import_module("transformers.utils.logging")
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if local_files_only:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
