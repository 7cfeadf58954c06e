"""Finding every codebook inside of a module, with a name that says where it is."""

import difflib
from collections.abc import Mapping, Sequence

from torch import nn

from ddcl_lightning._utils.arguments import described
from ddcl_lightning.monitoring.sources.base import CodebookSource
from ddcl_lightning.monitoring.sources.codec_codebooks import DirectionCodebook, EuclideanCodebook
from ddcl_lightning.monitoring.sources.gumbel_quantizers import GumbelQuantizer
from ddcl_lightning.monitoring.sources.image_quantizers import ImageQuantizer
from ddcl_lightning.monitoring.sources.implicit_codebooks import ImplicitCodebook
from ddcl_lightning.monitoring.sources.library_codebooks import LibraryCodebook, LibrarySimVQ
from ddcl_lightning.monitoring.sources.linear_prototypes import LinearPrototypes
from ddcl_lightning.monitoring.sources.named_codebooks import EmbeddingCodebook, ReadCodebook, Reader
from ddcl_lightning.monitoring.sources.own_quantizers import OwnQuantizer
from ddcl_lightning.nn.bank import PrototypeBank
from ddcl_lightning.nn.discovery import find_banks

# Kinds that are recognised, the first that fits.
KINDS: tuple[type[CodebookSource], ...] = (
    LibraryCodebook,
    LibrarySimVQ,
    ImplicitCodebook,
    EuclideanCodebook,
    DirectionCodebook,
    GumbelQuantizer,
    ImageQuantizer,
    LinearPrototypes,
)
Named = Sequence[str] | Mapping[str, Reader | None]
Recordable = PrototypeBank | CodebookSource
INNER = ("_codebook", "codebook")  # names of a codebook inside of its quantizer, left out
LEVELS = {"layers": "level", "quantizers": "level", "rvqs": "group"}  # lists of levels and groups


def find_codebooks(
    module: nn.Module, named: Named = (), kinds: Sequence[type[CodebookSource]] = ()
) -> dict[str, Recordable]:
    """Every codebook inside of a module that is recognised or named, by where it is.

    Recognised are our banks and quantizers, those of vector-quantize-pytorch, those inside of transformers, and the
    prototypes of SwAV and DINO. Levels of a residual quantizer at ``path`` are ``path.level0``, ``path.level1`` and so
    on, or ``path`` alone where they share one codebook; groups of them are ``path.group0``.

    Args:
        module: Where to look.
        named: Names of modules inside which are codebooks too: an ``nn.Linear`` on features whose directions count,
            or an ``nn.Embedding`` inside of the module that quantizes. Others need a function that reads their calls:
            ``{name: function}``, see :class:`~ddcl_lightning.monitoring.sources.ReadCodebook`.
        kinds: Kinds of your own, which go before ours.

    Returns:
        Banks and sources by name, in order of registration; for :class:`~ddcl_lightning.record_codebooks`.

    Raises:
        ValueError: If a name is that of no module, or of one that is no codebook by itself, or a kind is none.
    """
    for kind in kinds:
        if not (isinstance(kind, type) and issubclass(kind, CodebookSource)):
            given = kind.__name__ if isinstance(kind, type) else described(kind)
            raise ValueError(
                f"kinds must hold subclasses of CodebookSource; got {given}. Write one (recognizes(module), "
                "read(call)), or name the module instead (named=['quantizer.embedding'])."
            )
    modules = dict(module.named_modules(remove_duplicate=False))
    paths: dict[str, Recordable] = dict(find_banks(module))
    banks = set(map(id, paths.values()))
    for path, child in module.named_modules():
        if id(child) not in banks:
            inner = next(filter(None, (kind.sources_in(child) for kind in (*kinds, *KINDS))), {})
            paths.update({_join(path, suffix): source for suffix, source in inner.items()})
    for path, child in module.named_modules():
        if OwnQuantizer.recognizes(child) and not any(_inside(other, path) for other in paths):
            paths[path] = OwnQuantizer(child)
    order = {path: number for number, path in enumerate(modules)}
    codebooks: dict[str, Recordable] = {}
    for path in sorted(paths, key=lambda path: order[path]):
        name = _name(modules, path)
        codebooks[path if name in codebooks else name] = paths[path]
    readers = dict(named) if isinstance(named, Mapping) else dict.fromkeys(named)
    return codebooks | {path: _named(modules, path, reader) for path, reader in readers.items()}


def _inside(path: str, owner: str) -> bool:
    """True if a path is that of an owner or below it."""
    return not owner or path == owner or path.startswith(f"{owner}.")


def _join(*names: str) -> str:
    return ".".join(name for name in names if name)


def _named(modules: Mapping[str, nn.Module], path: str, reader: Reader | None) -> CodebookSource:
    child = modules.get(path)
    if child is None:
        close = difflib.get_close_matches(path, modules, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"named must hold names of modules of {type(modules['']).__name__}; got {path!r}.{hint}")
    if reader is not None:
        return ReadCodebook(child, reader)
    if isinstance(child, nn.Linear):
        return LinearPrototypes(child)
    if isinstance(child, nn.Embedding):
        return EmbeddingCodebook(child, modules[path.rpartition(".")[0]] if path else None)
    raise ValueError(
        f"named must hold an nn.Linear or an nn.Embedding, or a function for other modules; got {path!r}, of type "
        f"{type(child).__name__}. Pass {{{path!r}: function}} with a function of (module, inputs, output) that returns "
        "tokens, codebook and codes."
    )


def _name(modules: Mapping[str, nn.Module], path: str) -> str:
    """Name of a codebook at a path, with levels and groups by number, and without its own inside of its quantizer."""
    words = path.split(".")
    if words[-1] in INNER and not isinstance(modules[path], PrototypeBank):
        words = words[:-1]
    name: list[str] = []
    for number, word in enumerate(words):
        owner = type(modules[".".join(words[: number - 1])]).__name__ if number > 0 else ""
        if word.isdecimal() and words[number - 1] in LEVELS and "Residual" in owner:
            name[-1:] = [] if _shared(modules[".".join(words[:number])]) else [LEVELS[words[number - 1]] + word]
        else:
            name.append(word)
    return ".".join(name)


def _shared(levels: nn.Module) -> bool:
    """True if the modules of a list of levels, at least two, hold one codebook together."""
    books = [getattr(level, "_codebook", level) for level in levels.children()]
    return len(books) > 1 and len(set(map(id, books))) == 1
