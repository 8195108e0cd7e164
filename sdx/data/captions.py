"""Which caption an example is trained with."""

from collections.abc import Sequence

from sdx.data.draws import randint, uniform


def choose_caption(
    captions: Sequence[str], *, dropout: float, seed: int, epoch: int, index: int
) -> str:
    """One of `captions`, each equally likely, or with probability `dropout` the empty one.

    A function of its arguments alone: another epoch or index draws anew, another host or attempt
    draws the same.
    """
    if uniform("caption dropout", seed=seed, epoch=epoch, index=index) < dropout:
        return ""
    if len(captions) == 1:
        return captions[0]
    return captions[randint("caption", len(captions), seed=seed, epoch=epoch, index=index)]
