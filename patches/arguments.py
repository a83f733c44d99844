"""weightlift's options on an engine's command line and among its keyword arguments.

Whatever the way, a value ends in its environment variable: engines spawn the processes that load.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any

from weightlift.compat.context import Option, context_of
from weightlift.compat.patch import Wrapper


def add_options(parser: argparse.ArgumentParser, engine: str) -> None:
    """Add the flags that the engine itself does not have; its own definitions win.

    Nothing is in the namespace of what is not given: vLLM-Omni takes what is there for given.
    """
    group = parser.add_argument_group("weightlift", "Loading weights at the speed of the hardware")
    for option in context_of(engine).options:
        for position, flag in enumerate(option.flags.get(engine, ())):
            if flag not in parser._option_string_actions:
                group.add_argument(
                    flag,
                    dest=_destination(option),
                    default=argparse.SUPPRESS,
                    **_switch(option, engine, position) if option.is_switch else _value(option),
                )


def _switch(option: Option, engine: str, position: int) -> dict[str, Any]:
    if position == 0:
        return {"action": "store_true", "help": option.help}
    return {"action": "store_false", "help": f"The opposite of {option.flags[engine][0]}."}


def _value(option: Option) -> dict[str, Any]:
    return {"type": _argument(option), "metavar": option.metavar, "help": option.help}


def _destination(option: Option) -> str:
    """Where the parser keeps it: a name that no field of the engine has."""
    return f"weightlift_{option.name}"


def _argument(option: Option) -> Callable[[str], str]:
    """The text as given, once it is found to make sense."""

    def check(text: str) -> str:
        try:
            option.parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
        return text

    return check


def parsed(namespace: argparse.Namespace, engine: str) -> dict[str, Any]:
    """Take weightlift's values out of a parser's namespace; by option name, switches as bool."""
    values = vars(namespace)
    return {
        option.name: values.pop(_destination(option))
        for option in context_of(engine).options
        if _destination(option) in values
    }


def taken_out(kwargs: MutableMapping[str, Any], engine: str) -> dict[str, Any]:
    """Take weightlift's keywords out; their values by option name. None says nothing.

    Raises:
        ValueError: A switch is asked to be on and off.
    """
    given: dict[str, Any] = {}
    for option in context_of(engine).options:
        keywords = [flag[2:].replace("-", "_") for flag in option.flags.get(engine, ())]
        values = [kwargs.pop(keyword, None) for keyword in keywords]
        if option.is_switch and keywords:
            on, off = values
            values = [None if on is None else bool(on), False if off else None]
        values = [value for value in values if value is not None]
        if len(set(values)) > 1:
            raise ValueError(f"{' and '.join(keywords)} contradict each other")
        if values:
            given[option.name] = values[0]
    return given


def keep(given: Mapping[str, Any], engine: str) -> None:
    """Hand settings to every process that loads, by environment; they inherit it.

    Args:
        given: Values by option name, switches as bool.
        engine: Whose processes these are.

    Raises:
        ValueError: A value makes no sense; nothing was kept.
    """
    texts = {}
    for option in context_of(engine).options:
        if option.name in given:
            value = given[option.name]
            text = str(int(value)) if option.is_switch else str(value)
            try:
                option.parse(text)
            except ValueError as error:
                raise ValueError(f"{option.name}={value!r} {error}") from error
            texts[option.env] = text
    os.environ.update(texts)


@contextmanager
def put_back(engine: str) -> Iterator[None]:
    """Within this, settings may be kept; they hold for what is started in it alone."""
    variables = [option.env for option in context_of(engine).options]
    before = {name: os.environ[name] for name in variables if name in os.environ}
    try:
        yield
    finally:
        for name in variables:
            os.environ.pop(name, None)
        os.environ.update(before)


def adding(engine: str) -> Wrapper:
    """A wrapper for what fills a parser that it takes or returns: the engine's own options come first."""

    def wrapper(
        wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        result = wrapped(*args, **kwargs)
        places = (result, *args, *kwargs.values())
        parsers = (item for item in places if isinstance(item, argparse.ArgumentParser))
        add_options(next(parsers, places[1]), engine)
        return result

    return wrapper


def keeping(engine: str) -> Wrapper:
    """A wrapper for what takes a parser's namespace: what was given is kept, the engine has the rest."""

    def wrapper(
        wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        keep(parsed(args[0] if args else kwargs["args"], engine), engine)
        return wrapped(*args, **kwargs)

    return wrapper


def taking_keywords(engine: str) -> Wrapper:
    """A wrapper for what starts an engine: weightlift's keywords hold for it alone, it has the others.

    The environment, by which its processes get them, is put back.
    """

    def wrapper(
        wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        with put_back(engine):
            keep(taken_out(kwargs, engine), engine)
            return wrapped(*args, **kwargs)

    return wrapper
