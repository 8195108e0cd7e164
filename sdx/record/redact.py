"""Blots secrets out of text before it is written or shown."""

import re

MASK = "REDACTED"  # a plain word in YAML too: `***` would be an alias there

# Each pattern keeps its named group `keep` and loses the rest. They must leave ordinary words alone
# (`num_tokens`, a prompt about a standard bearer): redacted text is also what a run is resumed
# from.
_SECRETS = (
    re.compile(r"\bhf_[A-Za-z0-9]{20,}"),  # Hugging Face
    re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"),  # AWS key id
    re.compile(r"\bgh[opsur]_[A-Za-z0-9]{36,}"),  # GitHub
    re.compile(r"(?P<keep>\b[Bb]earer\s+)(?=[^\s\"']*\d)[A-Za-z0-9._~+/=-]{16,}"),
    re.compile(
        r"(?P<keep>\b[A-Za-z][A-Za-z0-9+.-]*://)[^\s/@\"'<>]+(?=@)"
    ),  # https://user:password@host
)


def redact(text: str) -> str:
    """`text` with `MASK` for access tokens, key ids, bearer tokens and the user part of URLs."""
    for secret in _SECRETS:
        text = secret.sub(lambda match: (match.groupdict().get("keep") or "") + MASK, text)
    return text


def said_by(error: BaseException) -> str:
    """The first line of an error, without what follows `?` in an address: signatures do."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return redact(re.sub(r"\?\S*", "", lines[0])) if lines else type(error).__name__
