"""Keys that no class has and that hold nothing: jsonargparse refuses all other unknown ones, and drops these."""

from collections.abc import Mapping, Sequence
from typing import Any

from peftlight.config_errors.given import Path, read_given
from peftlight.config_errors.places import CLASS_KEYS, Places
from peftlight.config_errors.problem import Problem, dotted
from peftlight.config_errors.sentences import unknown_key
from peftlight.errors import UserError


def refuse_dropped(arguments: Sequence[str], config: Mapping[str, Any]) -> None:
    """See that every key which `arguments`, a command and its options, give has come into the configuration.

    Args:
        arguments: what was parsed.
        config: what it was resolved to.

    Raises:
        UserError: a key has not, and the class that was chosen up to there does not have it.
    """
    given = read_given(arguments)
    for count, one in enumerate(given):
        if one.value is not None or _holds(config, one.path):
            continue
        places = Places(arguments[0], given[:count])  # a class that is chosen later has keys of its own
        if one.path[-1] not in (*CLASS_KEYS, *places.parameters(one.path[:-1])):
            raise UserError(unknown_key(Problem((dotted(one.path),), (), None, None, given, places)))


def _holds(config: Any, path: Path) -> bool:
    if not path:
        return True
    if isinstance(config, list):
        return any(_holds(one, path) for one in config)
    if not isinstance(config, Mapping):
        return False
    inside = path[0] in config and _holds(config[path[0]], path[1:])
    return inside or _holds(config.get("init_args"), path)
