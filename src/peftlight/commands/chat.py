"""`peftlight chat`: talk with a base and its adapters."""

from peftlight.opening import Opening


def chat(
    adapters: list[str],
    opening: Opening,
    side_by_side: bool = False,
    system: str = "",
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
) -> None:
    """Talk with a base and its adapters: lines are questions, those that begin with / are commands (/help lists them).

    The tokenizer's chat template renders the turns. Without one they are lines `User: ...` and `Assistant: ...`.

    Args:
        adapters: folders of adapters, or NAME=FOLDER; the word base stands for the model without any.
        side_by_side: whether base and adapter answer each question side by side.
        system: text for the model that stands before all turns.
        max_new_tokens: most tokens of an answer.
        temperature: 0: always the likeliest token; above, tokens are drawn.
        top_p: tokens are drawn from the likeliest that together have this probability.
        top_k: tokens are drawn from this many likeliest; 0: from all.
        repetition_penalty: above 1, tokens that were there before become less likely.
        seed: of what is drawn.
        opening: the base, and what is allowed.
    """
    from peftlight.writing.answering import opened_with_base
    from peftlight.writing.choosing import Settings
    from peftlight.writing.talk import Talk

    settings = Settings(max_new_tokens, temperature, top_p, top_k, repetition_penalty, seed)
    opened, names = opened_with_base(adapters, opening)
    talk = Talk(opened, names[0], settings, system)
    if side_by_side:
        talk.both()
    talk.run()
