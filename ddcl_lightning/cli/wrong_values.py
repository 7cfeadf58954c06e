"""A parser's account of a value of the wrong type, in one sentence: the key, what it must be, what it got."""

import re

_KEY = re.compile(r'^(\s*(?:- )?)Parser key "([^"]+)"')
_CLASS = re.compile(r"Problem with given class_path '([\w.]+)'")
_EXPECTED = re.compile(r"^\s*(?:- )?Expected an? ((?!path but|dot import).+?)(?:\. Got value: (.*))?$")
_SUBCLASS = re.compile(r"^\s*(?:- )?Not a valid subclass of (\w+)(?:\. Got value: (.*))?$")
_GIVEN = re.compile(r"^\s*Given value: (.*)$")
_LITERAL = re.compile(r"typing\.Literal\[(.*)\]$")
_WORDS = {
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "NoneType": "null",
    "list": "a list",
    "tuple": "a list",
    "dict": "a mapping",
}


def wrong_value(message: str) -> str | None:
    """The sentence, or None where the message is of another kind.

    Args:
        message: Of jsonargparse, nested by indentation: keys, classes, and the types that were tried.
    """
    keys, owner, body = _innermost(message.splitlines())
    if not keys:
        return None
    expected: dict[str, None] = {}
    given = None
    for line in body:
        for pattern in (_EXPECTED, _SUBCLASS):
            match = pattern.match(line)
            if match:
                expected[_in_words(match[1]) if pattern is _EXPECTED else f"the name of a {match[1]}"] = None
                given = given or match[2]
        match = _GIVEN.match(line)
        if match:
            given = match[1]  # of the outermost union: it comes last
    if not expected or given is None:
        return None
    of = f" (an argument of {owner})" if owner else ""
    choices = list(dict.fromkeys(expected))
    choices.sort(key=lambda words: words == "null")
    shown = given if len(given) <= 200 else given[:200] + "..."
    return f"{'.init_args.'.join(keys)} must be {' or '.join(choices)}; got {shown or 'nothing'}{of}."


def _innermost(lines: list[str]) -> tuple[list[str], str | None, list[str]]:
    """Keys from the outermost to the innermost, the class that has the last one, and what is said of it."""
    keys: list[str] = []
    body: list[str] = []
    owner, depth = None, -1
    for line in lines:
        match = _KEY.match(line)
        indent = len(line) - len(line.lstrip())
        if match and indent > depth:
            problem = _CLASS.search("\n".join(body)) if keys else None
            owner = problem[1] if problem else owner
            keys.append(match[2])
            depth, body = indent, [line[match.end() :].lstrip(": ")]
        elif keys and line.strip() and indent <= depth:
            break  # the next alternative
        elif keys:
            body.append(line)
    return keys, owner, body


def _in_words(kind: str) -> str:
    literal = _LITERAL.match(kind)
    if literal:
        return f"one of {literal[1]}"
    name = kind.removeprefix("<class '").removesuffix("'>").rpartition(".")[2]
    return _WORDS.get(name, f"a {name}")
