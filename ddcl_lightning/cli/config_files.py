"""Config files, looked at before they are parsed: what is wrong with one is one sentence that names the line."""

from pathlib import Path

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

_MERGE = "<<"


def check_config(path: str | Path) -> None:
    """Refuse a file that is no config, or that says one thing twice.

    Raises:
        ValueError: If it cannot be read, is not YAML in UTF-8, holds no settings by name, or holds a key twice.
    """
    place = f"--config {path}"
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{place} must be in UTF-8; byte {error.start} is not. Save the file as UTF-8.") from None
    except OSError as error:
        raise ValueError(f"{place} must be a file that you may read ({error.strerror}). Correct the path.") from None
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if not isinstance(root, MappingNode):
            raise ValueError(
                f"{place} must hold settings by name, such as 'model:'; got {text.strip()[:40] or 'nothing'!r}. "
                "`ddcl recipes copy` gives one to start from."
            )
        _check_node(root, place, ())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f" in line {mark.line + 1}" if mark else ""
        hint = " Indent by spaces, not tabs." if "'\\t'" in str(error) else " Correct that line."
        raise ValueError(f"{place} must be YAML; {error.problem or error.context}{line}.{hint}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{place} must be YAML; {' '.join(str(error).split())}. Correct it.") from None
    except RecursionError:
        raise ValueError(f"{place} must not be nested so deeply. Write it flat.") from None


def _check_node(node: Node, place: str, above: tuple[int, ...]) -> None:
    if id(node) in above:
        raise ValueError(f"{place} must not contain itself (line {node.start_mark.line + 1}). Take the alias out.")
    above = (*above, id(node))
    children: list[Node] = []
    if isinstance(node, SequenceNode):
        children = node.value
    elif isinstance(node, MappingNode):
        first: dict[str, int] = {}
        for key, value in node.value:
            children.append(value)
            if not isinstance(key, ScalarNode) or key.value == _MERGE:
                continue
            line = key.start_mark.line + 1
            if key.value in first:
                raise ValueError(
                    f"{place} must give every key once; {key.value!r} is in lines {first[key.value]} and {line}. "
                    "Remove one of them."
                )
            first[key.value] = line
    for child in children:
        _check_node(child, place, above)
