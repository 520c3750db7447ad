"""An error of one process ends all, with its text; a process that is lost is named."""

from peftlight.watching.early import tell_early
from peftlight.watching.watch import OtherProcessFailed, Watch, keep_watch

__all__ = ["OtherProcessFailed", "Watch", "keep_watch", "tell_early"]
