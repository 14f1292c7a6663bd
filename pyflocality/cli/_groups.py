"""Groups of options: dataclasses whose fields are parameters of a command.

A command takes a group as one keyword argument; `expanded` gives typer a parameter for each of its
options, which are the fields that are annotated with one. Other fields are as they stand.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable
from enum import Enum
from typing import Annotated, Any, ClassVar

# Headings of the options in the help.
IMAGES, MODEL, SAMPLING, OUTPUT = "Training images", "Model", "Sampling", "Results"

# Options of groups in the order in which the help tells them, whoever declares or inherits them.
_ORDER = (
    *("out", "nearest", "trajectory", "individual", "force", "as_json", "progress"),
    *(
        "denoiser",
        "methods",
        "against",
        "calibration",
        "threshold",
        "softness",
        "window",
        "boundary",
        "temperature",
    ),
    *("aggregation", "loader_batch", "subset", "moments", "global_share", "split_over"),
    *("backend", "memory_budget", "ignore_memory", "flip"),
    *("n", "steps", "schedule", "spacing", "sampler", "seed"),
    *("els_images", "els_samples"),
    *("source", "resolution", "channels", "split", "layout", "label", "device"),
)


class OneOf:
    """The words that an option takes, in its annotation behind typer's own.

    Args:
        words: All of them.
    """

    def __init__(self, *words: str) -> None:
        self.words = words


class Group:
    """A group of options, which stand under one heading unless they name another.

    Attributes:
        heading: The heading.
    """

    heading: ClassVar[str]


def expanded(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose groups are parameters of their own, with choices as plain text."""
    groups: dict[str, tuple[type[Group], list[str]]] = {}
    parameters = []
    hints = typing.get_type_hints(command, include_extras=True)
    for name, parameter in inspect.signature(command).parameters.items():
        kind = hints[name]
        if isinstance(kind, type) and issubclass(kind, Group):
            options = _options_of(kind)
            groups[name] = kind, [option.name for option in options]
            parameters += options
        else:
            parameters.append(parameter.replace(annotation=_read_by_typer(kind)))

    @functools.wraps(command)
    def run(**words: object) -> None:
        given = {
            name: word.value if isinstance(word, Enum) else word for name, word in words.items()
        }
        made = {
            name: kind(**{option: given.pop(option) for option in options})
            for name, (kind, options) in groups.items()
        }
        command(**given, **made)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # as typer asks
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _options_of(group: type[Group]) -> list[inspect.Parameter]:
    """Parameters for the options of a group."""
    hints = typing.get_type_hints(group, include_extras=True)
    made: Any = group
    fields = {field.name: field for field in dataclasses.fields(made)}
    names = [name for name in fields if typing.get_origin(hints[name]) is Annotated]
    options = []
    for name in sorted(names, key=_ORDER.index):
        told: Any = typing.get_args(hints[name])[1]
        if getattr(told, "rich_help_panel", None) is None:
            told.rich_help_panel = group.heading
        default = fields[name].default
        options.append(
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if default is dataclasses.MISSING else default,
                annotation=_read_by_typer(hints[name]),
            )
        )
    return options


def _read_by_typer(hint: Any) -> Any:  # noqa: ANN401
    """The annotation of an option, for which typer has to know a type of the words it takes."""
    kind, *told = typing.get_args(hint)
    words = next((one.words for one in told if isinstance(one, OneOf)), None)
    if words is None:
        return hint
    make: Any = Enum
    choice = make("Choice", {word: word for word in words}, type=str)
    is_optional = type(None) in typing.get_args(kind)
    return Annotated[choice | None if is_optional else choice, told[0]]
