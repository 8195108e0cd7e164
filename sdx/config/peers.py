"""stub"""


def answer(name: str, got: str) -> tuple[str, str | None] | None:
    return None
