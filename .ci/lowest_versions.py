"""Print every direct dependency of pyproject.toml, extras included, at the lowest version that it claims."""

import sys
from itertools import chain
from pathlib import Path

from pip._vendor.packaging.requirements import Requirement
from pip._vendor.packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    from pip._vendor import tomli as tomllib


def lowest_versions(pyproject: Path) -> list[str]:
    """Constraints ``name==floor``, each once; of several floors of one package the highest counts.

    Raises:
        ValueError: If a dependency has no lower bound.
    """
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    floors: dict[str, Version] = {}
    for text in [*project["dependencies"], *chain.from_iterable(project["optional-dependencies"].values())]:
        requirement = Requirement(text)
        if requirement.name == project["name"]:
            continue
        bounds = [Version(bound.version) for bound in requirement.specifier if bound.operator == ">="]
        if not bounds:
            raise ValueError(f"a dependency needs a lower bound that is tested; got {text!r}. Write NAME>=VERSION.")
        floors[requirement.name] = max(*bounds, floors.get(requirement.name, bounds[0]))
    return [f"{name}=={version}" for name, version in sorted(floors.items())]


if __name__ == "__main__":
    print("\n".join(lowest_versions(Path(__file__).parents[1] / "pyproject.toml")))
