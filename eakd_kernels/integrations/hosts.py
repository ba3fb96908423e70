"""What adapters share: importing a host, holding it to the signatures known here, and the settings for its losses."""

import importlib
import inspect
from collections.abc import Mapping
from importlib import metadata
from types import MappingProxyType, ModuleType

from torch import Tensor, nn

from ..options import check_keywords, keyword_names

# The versions that the adapters were written and tested for.
WRITTEN_FOR = {"transformers": "5.23", "trl": "1.16", "nvidia-modelopt": "0.47", "torchdistill": "1.1"}


def load(module: str, distribution: str) -> ModuleType:
    """A module of a host; an ImportError says what to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{module} cannot be imported ({error}); this adapter was written for {distribution} "
            f'{WRITTEN_FOR[distribution]}: pip install "{distribution}=={WRITTEN_FOR[distribution]}.*"'
        ) from error


def expect(owner, name: str, ours, distribution: str) -> None:
    """Raise unless `owner` has a function `name` that takes what `ours` takes: names, kinds and defaults."""
    theirs = getattr(owner, name, None)
    if callable(theirs) and _parameters(theirs) == _parameters(ours):
        return
    found = name + _shown(theirs) if callable(theirs) else f"no function {name}"
    raise changed(distribution, owner.__name__, found, name + _shown(ours))


def changed(distribution: str, owner: str, found: str, needed: str) -> RuntimeError:
    """The error for a host that is not as this package knows it."""
    return RuntimeError(
        f"{owner} of {distribution} {_version(distribution)} has {found}, where this adapter, written for "
        f"{distribution} {WRITTEN_FOR[distribution]}, needs {needed}: install that version, or call eakd_kernels' "
        "functions in a subclass of your own"
    )


def loss_module(
    kind: type[nn.Module],
    caller: str,
    given: dict,
    decided: tuple[str, ...] = (),
    places: Mapping[str, str] = MappingProxyType({}),
    **defaults,
) -> nn.Module:
    """kind(**given), with settings for language models where there are none given.

    Those are entropy_temperature=1 and weights in [0, 1], and then `defaults`. caller: what the user called or set, for
    errors. decided: options that the host decides; places: of some of them, and of settings that the host alone has,
    where they are set.
    """
    for name in dict.fromkeys((*decided, *places)):
        if name in given:
            what = f"set {places[name]}" if name in places else "leave it out"
            raise TypeError(f"{caller}: {name} is for the host to decide, got {name}={given[name]!r}; {what}")
    check_keywords(given, [name for name in keyword_names(kind) if name not in decided], caller)
    plain = isinstance(given.get("weighting"), str) and given["weighting"] == "none"  # the bound would divide it too
    settings = {"entropy_temperature": 1.0, "weight_norm": "none" if plain else "bound"}
    return kind(**{**settings, **defaults, **given})


def items(count: int | Tensor | None) -> int | Tensor | None:
    """A host's number of tokens, to divide by: 1 where it counted none, whose loss is 0 and not 0/0."""
    return None if count is None else count + (count == 0)


def _parameters(function) -> list[tuple]:
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


def _shown(function) -> str:
    parameters = inspect.signature(function).parameters.values()
    return str(inspect.Signature([p.replace(annotation=p.empty) for p in parameters]))


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "(of an unknown version)"
