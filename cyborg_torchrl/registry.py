"""Named components, registered in this process or by an installed package, and looked up by name.

A component is a callable. Its keyword parameters and their defaults are its configuration, so options are declared
once.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from importlib.metadata import entry_points
from typing import Any, TypeVar

Component = TypeVar("Component", bound=Callable[..., Any])
Title = Callable[[Mapping[str, Any]], str]


WIRED = ("self", "in_features", "core", "device", "seed")
"""Parameters that the package passes to builders itself. They are not configuration options."""


class UnknownNameError(ValueError):
    """An unknown component name. The message suggests the nearest known name."""


class UnavailableError(ValueError):
    """A component that cannot run here. The message is one line: the missing part and how to get it."""


MAX_NAMED = 20
"""Maximum length of a list of all known names in a message."""
NUM_EXAMPLES = 5
"""Names in a message if there are more."""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that a mistyped `name` probably means; None if none is near.

    A name is near if most letters agree, or if it contains the mistyped one. Case does not matter.
    """
    folded = {other.lower(): other for other in sorted(known, reverse=True)}
    near = difflib.get_close_matches(name.lower(), folded, n=1, cutoff=0.65)
    if not near and len(name) > 2:
        near = sorted((other for other in folded if name.lower() in other), key=len)
    return folded[near[0]] if near else None


def did_you_mean(name: str, known: Iterable[str], listing: str = "") -> str:
    """Return a hint for a mistyped `name`: the nearest known name, or known names if none is near.

    Args:
        name: the mistyped name.
        known: all names.
        listing: a command that lists all names, for a message that cannot.
    """
    names = list(known)
    near = nearest(name, names)
    return listed(names, listing) if near is None else f"did you mean '{near}'?"


def listed(known: Iterable[str], listing: str = "") -> str:
    """Return known names for a message: all of them, or some and the command that lists all."""
    names = sorted(known)
    if len(names) <= MAX_NAMED:
        return f"known: {', '.join(names) or '(none)'}."
    command = f"; all: {listing}" if listing else ""
    return f"known: {', '.join(names[:NUM_EXAMPLES])} and {len(names) - NUM_EXAMPLES} more{command}"


def check_known(kind: str, name: str, known: Collection[str]) -> None:
    """Raise ValueError if a name is unknown. The message suggests the nearest known name.

    Args:
        kind: noun for the named thing, such as "backend".
        name: the name.
        known: all names.
    """
    if name not in known:
        raise ValueError(f"unknown {kind} '{name}': {did_you_mean(name, known)}")


class Registry:
    """A table of named components of one kind.

    Args:
        kind: noun for a component in messages, such as "backbone".
        entry_point_group: entry point group of installed packages. An entry point is loaded at its first use.
    """

    def __init__(self, kind: str, entry_point_group: str) -> None:
        self.kind = kind
        self.entry_point_group = entry_point_group
        self._components: dict[str, Callable[..., Any]] = {}
        self._titles: dict[str, Title] = {}

    def register(self, name: str, title: Title | None = None) -> Callable[[Component], Component]:
        """Return a decorator that registers a component.

        Args:
            name: name in the configuration.
            title: function from the options to the title in logs. None: the name is the title.

        Raises:
            ValueError: if another component has this name.
        """

        def add(component: Component) -> Component:
            taken = self._components.get(name)
            if taken is not None and taken is not component:
                raise ValueError(f"{self.kind} '{name}' is registered already, by {taken!r}; choose another name.")
            self._components[name] = component
            if title is not None:
                self._titles[name] = title
            return component

        return add

    def names(self) -> tuple[str, ...]:
        """Return all names, sorted: those of this process and those of installed packages."""
        return tuple(sorted({*self._components, *(e.name for e in self._entry_points())}))

    def get(self, name: str) -> Callable[..., Any]:
        """Return the component called `name`.

        Raises:
            UnknownNameError: if there is none. The message suggests the nearest known name.
        """
        if name not in self._components:
            for entry_point in self._entry_points():
                if entry_point.name == name:
                    self._components[name] = entry_point.load()
        if name not in self._components:
            raise UnknownNameError(f"unknown {self.kind} '{name}': {did_you_mean(name, self.names())}")
        return self._components[name]

    def title(self, name: str, options: Mapping[str, Any]) -> str:
        """Return the title of the component `name` in logs, given its options."""
        return self._titles[name](options) if name in self._titles else name

    def _entry_points(self) -> Iterable[Any]:
        return entry_points(group=self.entry_point_group)


def options_of(builder: Callable[..., Any]) -> dict[str, Any]:
    """Return the configuration options of a registered builder, with their defaults."""
    options: dict[str, Any] = {}
    for owner in _signature_owners(builder):
        for p in inspect.signature(owner).parameters.values():
            if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD) and p.name not in WIRED:
                options.setdefault(p.name, p.default)
    return options


def option_types(builder: Callable[..., Any]) -> dict[str, Any]:
    """Return the type hints of a registered builder's parameters."""
    hints: dict[str, Any] = {}
    for owner in _signature_owners(builder):
        hints = typing.get_type_hints(owner.func if isinstance(owner, functools.partial) else owner) | hints
    return hints


def _signature_owners(builder: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """Yield the callables with the parameters. For a class this is `__init__`, since a metaclass may hide it.

    An `__init__` that ends in `**shared` passes these options to the next class, which then yields its own.
    """
    if not inspect.isclass(builder):
        yield builder
        return
    for owner in builder.__mro__:
        if "__init__" in vars(owner):
            yield owner.__init__
            if "shared" not in inspect.signature(owner.__init__).parameters:
                return


def with_options_of(shared: Callable[..., Any], *, without: Iterable[str] = ()) -> Callable[[Component], Component]:
    """Return a decorator for a builder that passes its `**options` to another callable.

    The builder's signature then lists the options of both, so they all become part of the configuration.

    Args:
        shared: the callable that gets the options.
        without: options of `shared` that are not options of the builder.
    """

    def add(builder: Component) -> Component:
        own = [p for p in inspect.signature(builder).parameters.values() if p.kind is not p.VAR_KEYWORD]
        taken = {*WIRED, *without, *(p.name for p in own)}
        others = [p for p in inspect.signature(shared).parameters.values() if p.kind is p.KEYWORD_ONLY]
        added = [p for p in others if p.name not in taken]
        builder.__signature__ = inspect.Signature([*own, *added])
        builder.__annotations__ |= {p.name: p.annotation for p in added}
        return builder

    return add


backbones = Registry("backbone", "cyborg_torchrl.backbones")
memories = Registry("memory", "cyborg_torchrl.memories")
environments = Registry("environment", "cyborg_torchrl.environments")


def register_backbone(name: str) -> Callable[[Component], Component]:
    """Register a builder of cores, `builder(in_features: int, **options) -> Core`, as a backbone.

    The options and their defaults become the typed configuration group `backbone=<name>`. If an option is called
    `max_horizon` and its value is None, it is set to the environment's horizon.
    """
    return backbones.register(name)


def register_memory(name: str) -> Callable[[Component], Component]:
    """Register an augmentation, `builder(core: Core, **options) -> Core`, as a choice of `memory=<name>`.

    The builder gets the core of the backbone. The agent uses the core that it returns.
    """
    return memories.register(name)


def register_environment(name: str, title: Title | None = None) -> Callable[[Component], Component]:
    """Register a builder of TorchRL environments, `builder(num_envs: int, device, seed, **options) -> EnvBase`.

    Pass a `title` if options turn the environment into another task. It maps options to the name in logs and
    summaries.
    """
    return environments.register(name, title)
