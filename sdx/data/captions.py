"""The captions of an example, and which of them it is trained with."""

from collections.abc import Sequence

from sdx.data.draws import randint, uniform


def choose_caption(
    captions: Sequence[str], *, dropout: float, seed: int, epoch: int, index: int
) -> str:
    """One of `captions`, each equally likely, or with probability `dropout` the empty one.

    A function of its arguments alone: another epoch or index draws anew, another host or attempt
    draws the same.
    """
    drawn = draw_caption(len(captions), dropout=dropout, seed=seed, epoch=epoch, index=index)
    return "" if drawn is None else captions[drawn]


def draw_caption(
    num_captions: int, *, dropout: float, seed: int, epoch: int, index: int
) -> int | None:
    """Which of an example's captions it is trained with; None is the empty one."""
    if uniform("caption dropout", seed=seed, epoch=epoch, index=index) < dropout:
        return None
    if num_captions == 1:
        return 0
    return randint("caption", num_captions, seed=seed, epoch=epoch, index=index)


def caption_texts(value: object, column: str) -> tuple[str, ...]:
    """The captions in a cell: a text, or a list of texts; blank ones do not count.

    ValueError says what is no text.
    """
    texts = value if isinstance(value, list) else [value]
    captions = []
    for text in texts:
        if text is not None and not isinstance(text, str):
            raise ValueError(
                f"{column} is a {type(text).__name__}, must be a text or a list of texts"
            )
        if text and any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError(f"{column} holds half a surrogate pair, which is no text")
        if text and text.strip():
            captions.append(text.strip())
    return tuple(captions)
