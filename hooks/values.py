"""What the values of options may be. Each raises ValueError with what is allowed."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable


def switch(text: str) -> bool:
    """Whether it is on."""
    meaning = {"1": True, "true": True, "on": True, "0": False, "false": False, "off": False}
    if text.lower() not in meaning:
        raise ValueError("must be 1, true, on, 0, false or off")
    return meaning[text.lower()]


def whole(text: str, least: int, most: int) -> int:
    """A whole number within bounds, both allowed."""
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if not least <= number <= most:
        raise ValueError(f"must be a whole number from {least} to {most}")
    return number


def file(text: str) -> str:
    """The name of a file."""
    if text.startswith(("[", "{")):
        raise ValueError("must be the name of a file")
    return text


def picture(text: str) -> str:
    """The name of a file that a timeline can be written to."""
    ending = os.path.splitext(text)[1]
    if ending not in (".html", ".png", ".json"):
        raise ValueError("must be the name of a file that ends in .html, .png or .json")
    if ending != ".json" and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("needs matplotlib (pip install 'weightlift[plot]'), or the ending .json")
    return file(text)


def one_of(*choices: str) -> Callable[[str], str]:
    """Takes one of these words, in any case."""

    def parse(text: str) -> str:
        if text.lower() not in choices:
            raise ValueError(f"must be {', '.join(choices[:-1])} or {choices[-1]}")
        return text.lower()

    return parse
