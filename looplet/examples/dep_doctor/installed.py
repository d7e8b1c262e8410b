"""Hints from the packages that the running interpreter has installed; they say nothing about the project itself."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata


@dataclass(frozen=True, slots=True)
class Installed:
    """What the metadata of one installed distribution says."""

    version: str
    licence: str | None
    inactive: bool
    """it carries the classifier `Development Status :: 7 - Inactive`"""


def installed(name: str) -> Installed | None:
    """Return the metadata of an installed distribution, None when there is none."""
    try:
        found = metadata.distribution(name).metadata
    except (metadata.PackageNotFoundError, ValueError):
        return None
    if "Version" not in found:
        return None
    classifiers = found.get_all("Classifier") or []
    return Installed(
        version=found["Version"],
        licence=_licence(found, classifiers),
        inactive="Development Status :: 7 - Inactive" in classifiers,
    )


def _licence(found: metadata.PackageMetadata, classifiers: list[str]) -> str | None:
    if "License-Expression" in found:
        return found["License-Expression"]
    stated = found["License"].strip() if "License" in found else ""
    if stated and stated.upper() != "UNKNOWN":
        return stated
    return next((entry for entry in classifiers if entry.startswith("License :: ")), None)


def imports_of_installed() -> dict[str, list[str]]:
    """Return import name → distributions, for everything installed."""
    return {name: list(distributions) for name, distributions in metadata.packages_distributions().items()}
