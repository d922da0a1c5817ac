"""The written form `name(argument=value, ...)`, which recipes and evaluation tasks share."""

from __future__ import annotations

import ast
import difflib
import re
from collections.abc import Iterable
from typing import Any, TypeVar

from kvlib.policies.base import Method, RecipeError, parameters, registered

Named = TypeVar("Named")


def split(text: str, separator: str) -> list[str]:
    """Split outside parentheses and quotes."""
    pieces, depth, quote, start = [], 0, "", 0
    for i, char in enumerate(text):
        if quote:
            quote = "" if char == quote else quote
        elif char in "\"'":
            quote = char
        elif char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
        elif char == separator and depth == 0:
            pieces.append(text[start:i])
            start = i + 1
    return [*pieces, text[start:]]


def read_value(text: str) -> Any:
    """A Python literal, or else the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def read_call(term: str, whole: str) -> tuple[str, str]:
    """The name and the written arguments of a term of the text `whole`.  Raises RecipeError."""
    call = re.fullmatch(r"([\w.-]+)\s*(?:\((.*)\))?", term, re.DOTALL)
    if not call:
        raise RecipeError(repr(whole), None, term, f'cannot read {term!r}: write "name(argument=value)"')
    return call[1], call[2] or ""


def method_of(term: str) -> Method:
    """The method written as `name(argument=value)`, of any role but a tier's.  Raises RecipeError."""
    name, arguments = read_call(term, term)
    known = {key: method for key, method in registered().items() if method.role != "tier"}
    if name not in known:
        raise RecipeError(name, None, name, nearest(name, [*known, "full"], "method"))
    return build(known[name], arguments)


def build(cls: type[Named], arguments: str) -> Named:
    """Make a dataclass that has a `name` from its written arguments.  Raises RecipeError."""
    written: dict[str, str] = {}
    name, known = cls.name, list(parameters(cls))  # type: ignore[attr-defined]
    for argument in split(arguments, ","):
        if not argument.strip():
            continue
        key, equals, value = argument.partition("=")
        key, value = key.strip(), value.strip()
        if not equals or not value or not key.isidentifier():
            raise RecipeError(name, None, argument.strip(), f"cannot read {argument.strip()!r}: write argument=value")
        if key not in known:
            raise RecipeError(name, key, value, nearest(key, known, "argument"))
        if key in written:
            raise RecipeError(name, key, value, "given twice: leave one out")
        written[key] = value
    try:
        return cls(**{key: read_value(value) for key, value in written.items()})
    except RecipeError as error:
        if error.argument in written:  # show the value as it was written
            raise RecipeError(error.method, error.argument, written[error.argument], error.remedy) from None
        raise


def nearest(name: str, known: Iterable[str], what: str) -> str:
    """What to say of a name that does not exist."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, 1, 0.5)
    hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(names)}"
    return f"there is no {what} {name!r}: {hint}"
