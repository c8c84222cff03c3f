"""Named components: register them in-process or from an installed package, and find them by name.

A component is a callable. Its keyword parameters, with their defaults, are its configuration: nothing is written
down a second time.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import entry_points
from typing import Any, TypeVar

Component = TypeVar("Component", bound=Callable[..., Any])
Title = Callable[[Mapping[str, Any]], str]


WIRED = ("self", "in_features", "core", "device", "seed")
"""Parameters of builders that are passed by the wiring, not by the configuration."""


class UnknownNameError(ValueError):
    """A name that nothing is registered under; the message names the nearest that is."""


class UnavailableError(ValueError):
    """A component that cannot run here; the message is one line that says what is missing and how to get it."""


MOST_NAMED = 20
"""Names that a message lists at most."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns what helps whoever mistyped `name`: the nearest name that exists, or what there is if none is near."""
    names = sorted(known)
    folded = {other.lower(): other for other in reversed(names)}
    near = difflib.get_close_matches(name.lower(), folded, n=1, cutoff=0.5)
    if near:
        return f"did you mean '{folded[near[0]]}'?"
    return f"known: {', '.join(names[:MOST_NAMED]) or '(none)'}{', ...' if len(names) > MOST_NAMED else '.'}"


class Registry:
    """A table of named components of one kind.

    Args:
        kind: what the components are, for messages ("backbone").
        entry_point_group: group that installed packages use to add theirs, loaded at first need.
    """

    def __init__(self, kind: str, entry_point_group: str) -> None:
        self.kind = kind
        self.entry_point_group = entry_point_group
        self._components: dict[str, Callable[..., Any]] = {}
        self._titles: dict[str, Title] = {}

    def register(self, name: str, title: Title | None = None) -> Callable[[Component], Component]:
        """Decorator that registers a component.

        Args:
            name: what it is chosen by.
            title: what it is called in logs, from its options; None: its name.

        Raises:
            ValueError: if the name is taken by another component.
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
        """All names, sorted: those registered in this process and those that installed packages offer."""
        return tuple(sorted({*self._components, *(e.name for e in self._entry_points())}))

    def get(self, name: str) -> Callable[..., Any]:
        """Returns the component called `name`.

        Raises:
            UnknownNameError: with the nearest known name.
        """
        if name not in self._components:
            for entry_point in self._entry_points():
                if entry_point.name == name:
                    self._components[name] = entry_point.load()
        if name not in self._components:
            raise UnknownNameError(f"unknown {self.kind} '{name}': {did_you_mean(name, self.names())}")
        return self._components[name]

    def title(self, name: str, options: Mapping[str, Any]) -> str:
        """What the component called `name` is called in logs under these options."""
        return self._titles[name](options) if name in self._titles else name

    def _entry_points(self) -> Iterable[Any]:
        return entry_points(group=self.entry_point_group)


def options_of(builder: Callable[..., Any]) -> dict[str, Any]:
    """The parameters of a registered builder that a configuration sets, with their defaults."""
    parameters = inspect.signature(signature_owner(builder)).parameters.values()
    named = (p for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD))
    return {p.name: p.default for p in named if p.name not in WIRED}


def signature_owner(builder: Callable[..., Any]) -> Callable[..., Any]:
    """What carries the signature; a class with a metaclass of its own hides it."""
    return builder.__init__ if inspect.isclass(builder) else builder


backbones = Registry("backbone", "cyborg_torchrl.backbones")
memories = Registry("memory", "cyborg_torchrl.memories")
environments = Registry("environment", "cyborg_torchrl.environments")


def register_backbone(name: str) -> Callable[[Component], Component]:
    """Registers a builder of cores, `builder(in_features: int, **options) -> Core`, as a backbone.

    The options with their defaults become the typed configuration group `backbone=<name>`. An option called
    `max_horizon` that is left at None is filled with the environment's horizon.
    """
    return backbones.register(name)


def register_memory(name: str) -> Callable[[Component], Component]:
    """Registers an augmentation, `builder(core: Core, **options) -> Core`, as a choice of `memory=<name>`.

    It gets the core of the backbone and returns the core that is used in its place.
    """
    return memories.register(name)


def register_environment(name: str, title: Title | None = None) -> Callable[[Component], Component]:
    """Registers a builder of TorchRL environments, `builder(num_envs: int, device, seed, **options) -> EnvBase`.

    An environment whose options make it another task gives a `title`: from its options to what logs and summaries
    call it.
    """
    return environments.register(name, title)
