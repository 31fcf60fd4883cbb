"""Checks that options share: names, types, ranges. Every message names the field, the value and the limit."""

import math
from collections.abc import Callable
from dataclasses import fields
from functools import wraps
from numbers import Integral, Real
from typing import TypeVar

from nanoinfer.errors import InvalidRequest, unknown_option

T = TypeVar("T")


def named_options(cls: type[T]) -> type[T]:
    """Make a dataclass answer an unknown keyword with a TypeError that holds the nearest known one."""
    init: Callable[..., None] = cls.__init__
    known = {field.name for field in fields(cls)}  # type: ignore[arg-type]

    @wraps(init)
    def checked(self: T, *args: object, **options: object) -> None:
        for name in options.keys() - known:
            raise unknown_option(cls.__name__, name, known)
        init(self, *args, **options)

    cls.__init__ = checked  # type: ignore[assignment, method-assign]
    return cls


def check_number(field: str, value: object, low: float, high: float, *, open_low: bool = False) -> None:
    """Require a finite real number in [low, high], or (low, high] where open_low."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InvalidRequest(f"{field} must be a number, got {value!r} ({type(value).__name__})")
    number = float(value)
    if not math.isfinite(number) or not low <= number <= high or (open_low and number == low):
        raise InvalidRequest(f"{field} must lie in {'(' if open_low else '['}{low:g}, {high:g}], got {value!r}")


def check_integer(field: str, value: object, low: int, high: int) -> None:
    """Require an integer in [low, high]; numpy's are welcome, booleans are not."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise InvalidRequest(f"{field} must be an integer, got {value!r} ({type(value).__name__})")
    if not low <= int(value) <= high:
        raise InvalidRequest(f"{field} must lie in [{low}, {high}], got {value!r}")


def check_flag(field: str, value: object) -> None:
    """Require True or False."""
    if not isinstance(value, bool):
        raise InvalidRequest(f"{field} must be True or False, got {value!r} ({type(value).__name__})")


def check_choice(field: str, value: object, choices: tuple[object, ...]) -> None:
    """Require one of the choices."""
    if not any(value is choice or (type(value) is type(choice) and value == choice) for choice in choices):
        raise InvalidRequest(f"{field} must be one of {', '.join(map(repr, choices))}, got {value!r}")
