"""Checks that options share: names, types, ranges. Every message names the field, the value and the limit."""

import math
from collections.abc import Callable
from dataclasses import fields
from functools import wraps
from numbers import Integral, Real
from typing import TypeVar

import numpy as np

from nanoinfer.errors import InvalidRequest, unknown_option

T = TypeVar("T")
NoOp = dict[str, tuple[object, ...]]  # an option's name, and the values that ask for nothing


def checked_names(owner: str, options: dict[str, object], known: set[str], no_op: NoOp) -> dict[str, object]:
    """The options that `known` has. One of `no_op` must have a value that asks for nothing, and is left out.

    numpy's scalars become Python's, whose sums and products cannot overflow. Raises InvalidRequest for another value,
    TypeError with the nearest name for one that is in neither.
    """
    options = {name: value.item() if isinstance(value, np.generic) else value for name, value in options.items()}
    for name, value in options.items():
        if name in no_op:
            check_choice(name, value, no_op[name])
        elif name not in known:
            raise unknown_option(owner, name, known | no_op.keys())
    return {name: value for name, value in options.items() if name in known}


def named_options(no_op: NoOp) -> Callable[[type[T]], type[T]]:
    """Make a dataclass check its keywords' names by `checked_names`."""

    def decorate(cls: type[T]) -> type[T]:
        init: Callable[..., None] = cls.__init__
        known = {field.name for field in fields(cls)}  # type: ignore[arg-type]

        @wraps(init)
        def checked(self: T, **options: object) -> None:
            init(self, **checked_names(cls.__name__, options, known, no_op))

        cls.__init__ = checked  # type: ignore[assignment, method-assign]
        return cls

    return decorate


def shown(value: object) -> str:
    """A value for a message, which a long one must not fill: lists of ids hold a vocabulary, texts a book."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def check_number(field: str, value: object, low: float, high: float, *, open_low: bool = False) -> None:
    """Require a finite real number in [low, high], or (low, high] where open_low."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InvalidRequest(f"{field} must be a number, got {shown(value)} ({type(value).__name__})")
    try:
        with np.errstate(over="ignore"):
            number = float(np.float32(float(value)))  # as the kernels will see it: 1e-50 is 0 there
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or not low <= number <= high or (open_low and number == low):
        raise InvalidRequest(f"{field} must lie in {'(' if open_low else '['}{low:g}, {high:g}], got {shown(value)}")


def check_integer(field: str, value: object, low: int, high: int) -> None:
    """Require an integer in [low, high]; numpy's are welcome, booleans are not."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise InvalidRequest(f"{field} must be an integer, got {shown(value)} ({type(value).__name__})")
    if not low <= int(value) <= high:
        raise InvalidRequest(f"{field} must lie in [{low}, {high}], got {shown(value)}")


def check_flag(field: str, value: object) -> None:
    """Require True or False."""
    if not isinstance(value, bool):
        raise InvalidRequest(f"{field} must be True or False, got {shown(value)} ({type(value).__name__})")


def check_text(field: str, value: object) -> None:
    """Require a string that says something, or None."""
    if value is not None and (not isinstance(value, str) or not value):
        raise InvalidRequest(f"{field} must be a string or None, got {shown(value)} ({type(value).__name__})")


def check_choice(field: str, value: object, choices: tuple[object, ...]) -> None:
    """Require one of the choices."""
    if not any(value is choice or (type(value) is type(choice) and value == choice) for choice in choices):
        raise InvalidRequest(f"{field} must be one of {', '.join(map(repr, choices))}, got {shown(value)}")
