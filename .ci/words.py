"""Names that say nothing and words of our own dialect, each with what to write instead.

    python .ci/words.py [FILES...]

Looks at the identifiers of every Python file that git knows, at its comments, docstrings and strings, and at the
Markdown pages for the words. Prints one line for each and exits with 1 if there is any.
"""

import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
THE_NOUN = "the noun for what it holds"
# Identifiers, whole.
NAMES = {
    **dict.fromkeys(("found", "part", "parts", "seen", "one", "wanted", "here", "things", "mine", "theirs"), THE_NOUN),
    **dict.fromkeys(("pull", "reach", "paid", "priced", "hungry", "asking", "starved", "lying"), THE_NOUN),
    "rival": "baseline",
    "rivals": "baselines",
    "rarity": "idf",
    "budget": "max_parameters",
    "relocate": "relocation_threshold",
    "balance": "load_exponent",
    "opening": "gate value",
    "look_up": "decode",
}
# Identifiers and file names, any of their words.
WORDS_OF_NAMES = {
    **dict.fromkeys(("rival", "rivals"), "baseline"),
    **dict.fromkeys(("thing", "things", "stuff"), THE_NOUN),
    **dict.fromkeys(("hungry", "starved"), THE_NOUN),
    "budget": "max_parameters",
    "rarity": "idf",
}
# Words of comments, docstrings, messages and pages.
WORDS = {
    r"rivals?": "baseline",
    r"rarity": "inverse document frequency (idf)",
    r"rare mean": "idf-weighted mean",
    r"share of the way": "step size, EMA rate",
    r"warning spoke|spoke": "fired",
    r"codes? left behind": "dead code",
    r"mending|mended": "fixing, fixed",
    r"placed prototypes": "adapters",
    r"starved|hungry": "what it is: without tokens, below the mean load",
}
_WORDS = {re.compile(rf"\b(?:{pattern})\b", re.IGNORECASE): better for pattern, better in WORDS.items()}


# They quote old names.
_QUOTING = ("CHANGELOG.md", ".ci/words.py", "ddcl_lightning/_utils/old_names.py")


def files() -> list[Path]:
    """Code and pages, which are checked."""
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py", "*.md", "*.yaml"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    return [ROOT / name for name in names if name not in _QUOTING]


def complaints(path: Path) -> Iterator[str]:
    """One line for each banned word of a file."""
    for word in _words(path.stem):
        if word in WORDS_OF_NAMES:
            yield f"{path}:1: file name with {word!r}; use {WORDS_OF_NAMES[word]}"
    if path.suffix != ".py":
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            yield from _in_text(path, number, line)
        return
    with path.open("rb") as file:
        before, owner = "", ""
        for token in tokenize.tokenize(file.readline):
            others = before == "." and owner != "self"  # an attribute of another object, pathlib's parts say
            if token.type == tokenize.NAME and token.string in NAMES and not others:
                yield f"{path}:{token.start[0]}: name {token.string!r}; use {NAMES[token.string]}"
            elif token.type == tokenize.NAME and not others:
                for word in _words(token.string):
                    if word in WORDS_OF_NAMES:
                        yield f"{path}:{token.start[0]}: name {token.string!r}; use {WORDS_OF_NAMES[word]}"
            elif token.type in (tokenize.COMMENT, tokenize.STRING):
                for offset, line in enumerate(token.string.splitlines()):
                    yield from _in_text(path, token.start[0] + offset, line)
            if token.string != ".":
                owner = token.string
            before = token.string


def _words(name: str) -> list[str]:
    """Words of an identifier, ``seen_tokens`` or ``SeenTokens``, in lower case."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().split("_")


def _in_text(path: Path, number: int, line: str) -> Iterator[str]:
    for pattern, better in _WORDS.items():
        for match in pattern.finditer(line):
            yield f"{path}:{number}: {match.group()!r}; write {better}"


def main() -> int:
    """Check the given files, or all."""
    chosen = [Path(name) for name in sys.argv[1:]] or files()
    lines = [line for path in chosen for line in complaints(path)]
    print("\n".join(line.removeprefix(f"{ROOT}/") for line in lines))
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
