"""Options of a class of the user's own, found and turned into values as `peftlight fit` does it."""

from collections.abc import Collection, Mapping
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from peftlight.class_paths import is_ours
from peftlight.errors import UserError, nearest

_KEY = "options"


def made_options(kind: type, options: Mapping[str, Any], where: str, skip: Collection[str] = ()) -> dict[str, Any]:
    """The values of the options, those included that the class hands to its parent as `**kwargs`.

    Args:
        kind: the class.
        options: as plain data; classes in it, named by class_path, are imported and made.
        where: as an error message begins.
        skip: what of the class's options is given otherwise.

    Raises:
        UserError: the class does not have one of them, or one is of the wrong kind.
    """
    parser = ArgumentParser(exit_on_error=False)
    known = _added(parser, kind, skip)
    for name in options:
        if name not in known:
            raise UserError(f"{where}: {kind.__name__} has no option {name!r}.{nearest(name, known)}")
    try:
        parsed = parser.parse_object({_KEY: dict(options)}, defaults=False)
        made: Namespace = parser.instantiate_classes(parsed).get(_KEY) or Namespace()
    except Exception as error:  # of what kind it is depends on the option's type
        raise UserError(f"{where}: {kind.__name__} does not take its options: {error}") from error
    return {name: made[name] for name in options}


def names_class(value: Any) -> bool:
    """Whether plain data has a class in it, which would be imported and made."""
    if isinstance(value, Mapping):
        return "class_path" in value or any(map(names_class, value.values()))
    return isinstance(value, list) and any(map(names_class, value))


def own_names(kind: type) -> list[str]:
    """Options that the class has beyond those of the class of ours that it comes from."""
    ours = next((parent for parent in kind.__mro__ if is_ours(parent)), object)
    return sorted({*_added(ArgumentParser(), kind)} - {*_added(ArgumentParser(), ours)})


def _added(parser: ArgumentParser, kind: type, skip: Collection[str] = ()) -> list[str]:
    """The class's options, which the parser has from now on."""
    there = parser.add_class_arguments(kind, _KEY, skip=set(skip), instantiate=False, fail_untyped=False)
    return [name.removeprefix(f"{_KEY}.") for name in there]
