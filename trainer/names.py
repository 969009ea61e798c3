"""Finding a recipe or a task by its short name or by ``module:attribute``, and the nearest name to a wrong one."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Mapping
from typing import Any

from triptych.errors import TriptychError


def nearest(name: str, known: Iterable[str]) -> str:
    """ "A question with the closest known name, or a list of all known names."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known) or 'none'}"


def import_named(name: str, registry: Mapping[str, str], kind: str) -> Any:
    """The object that ``name`` stands for: a key of ``registry`` or ``module:attribute``.

    Raises TriptychError for an unknown name, a missing module and a missing attribute; an import that fails inside an
    existing module keeps its own traceback, because that is a bug and not a misspelled name.
    """
    target = registry.get(name, name)
    if ":" not in target:
        raise TriptychError(f"no {kind} is called {name!r}: {nearest(name, registry)} (or give module:attribute)")
    module_name, attribute = target.split(":", 1)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise TriptychError(
                f"{kind} {name!r}: no module {error.name!r}: run from the repository root or check the spelling"
            ) from error
        raise
    found = getattr(module, attribute, None)
    if not callable(found):
        names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise TriptychError(f"{kind} {name!r}: module {module_name} has no {attribute!r}: {nearest(attribute, names)}")
    return found
