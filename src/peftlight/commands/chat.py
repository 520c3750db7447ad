"""`peftlight chat`: talk with a base and its adapters."""

from peftlight.opening import Opening
from peftlight.writing.settings import Settings


def chat(
    adapters: list[str], settings: Settings, opening: Opening, side_by_side: bool = False, system: str = ""
) -> None:
    """Talk with a base and its adapters: lines are questions, those that begin with / are commands (/help lists them).

    The tokenizer's chat template renders the turns. Without one they are lines `User: ...` and `Assistant: ...`.

    Args:
        adapters: folders of adapters, or NAME=FOLDER; the word base stands for the model without any.
        side_by_side: whether base and adapter answer each question side by side.
        system: text for the model that stands before all turns.
        settings: how text is written.
        opening: the base, and what is allowed.
    """
    from peftlight.writing.answering import opened_with_base
    from peftlight.writing.talk import Talk

    opened, names = opened_with_base(adapters, opening)
    talk = Talk(opened, names[0], settings, system)
    if side_by_side:
        talk.both()
    talk.run()
