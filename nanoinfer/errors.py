"""What the engine raises: a bad request, a bad model, a dead engine."""

import difflib
from collections.abc import Iterable


class InvalidRequest(ValueError):
    """A request or an option that cannot be served; the message names field, value and limit."""


class ModelLoadError(RuntimeError):
    """A model folder or checkpoint that cannot be loaded; the message names what was found and expected."""


class EngineDead(RuntimeError):
    """The engine is closed, its device lost or its books cut off half-way: it serves nothing more; build a new one."""


def unknown_option(owner: str, name: str, known: Iterable[str]) -> TypeError:
    """The error for an option that does not exist, with the nearest one that does."""
    near = difflib.get_close_matches(name, list(known), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return TypeError(f"{owner} has no option {name!r}{hint}")
