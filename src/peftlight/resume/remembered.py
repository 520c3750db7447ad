"""What an earlier resume allowed to change: it holds until a checkpoint is written that was trained so."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from peftlight.resume.changes import Change, allows, differences
from peftlight.resume.past import CONFIG, Past, read_run


def remembered(past: Past) -> list[str]:
    """The names that were allowed when the run last went on from where `past` is, or from later."""
    resumes = read_run(past.folder).get("resumed", []) if past.folder else []
    names = [name for one in resumes if past.step <= one["step"] for name in one.get("allowed", [])]
    return list(dict.fromkeys(names))


def covered(changes: Sequence[Change], names: Sequence[str], past: Past, here: Mapping[str, Any]) -> list[Change]:
    """Those of the changes that were allowed before; one to yet another value than then is not."""
    if not names or past.folder is None:
        return []
    former = yaml.safe_load((past.folder / CONFIG).read_text(encoding="utf-8"))
    other = {change.key for change in differences(former, here)}
    return [change for change in changes if allows(names, change) and change.key not in other]
