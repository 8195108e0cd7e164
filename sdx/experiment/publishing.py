"""Exports uploaded to the Hub, with patience for its bad minutes.

The token is huggingface_hub's own affair: taken from the environment or a login, never from a
configuration, and struck out of every message.
"""

import re
import time
from collections.abc import Callable, Iterator

from sdx.config.schema import HUB_ID
from sdx.record.redact import MASK, redact
from sdx.record.store import AnyPath, local_copy
from sdx.weights.export import ExportError

WAITS_S = (2.0, 8.0, 30.0, 60.0)  # between tries
_TRANSIENT = {408, 429, 500, 502, 503, 504}
_QUERY = re.compile(r"(?<=\w)\?[^\s'\"]+")  # of an address: uploads are signed there


class PublishError(RuntimeError):
    """The Hub did not take it."""


def check_can_publish(hub_id: str) -> None:
    """Raises ExportError for a name no repository has, or without a token to upload with."""
    from huggingface_hub import get_token  # 0.3 s

    if not re.fullmatch(HUB_ID, hub_id):
        raise ExportError(f"{hub_id}: not a repository of the Hub; give OWNER/NAME.")
    if get_token() is None:
        raise ExportError(
            f"{hub_id}: there is no token to upload with; log in with `hf auth login`, or set "
            "HF_TOKEN in the environment."
        )


def publish(folder: AnyPath, hub_id: str, *, title: str, say: Callable[[str], None]) -> str:
    """Uploads all files of `folder` as one commit called `title`; returns the commit's address.

    The repository is made if need be. What may pass (time-outs, 429, 5xx) is tried again, with a
    line to `say`. Raises PublishError with the reason.
    """
    from huggingface_hub import HfApi

    api = HfApi()

    def upload() -> str:
        api.create_repo(hub_id, exist_ok=True)
        with local_copy(folder) as files:
            commit = api.upload_folder(repo_id=hub_id, folder_path=files, commit_message=title)
        return commit.commit_url

    for wait in (*WAITS_S, None):
        try:
            return upload()
        except Exception as error:  # OSError, ValueError, RuntimeError and HTTP errors alike
            reason = _reason(error)
            if wait is None or not _may_pass(error):
                raise PublishError(
                    f"{hub_id}: not uploaded ({reason}); {folder} has the files."
                ) from None  # the chain may quote the request
            say(f"upload to {hub_id}: {reason}; again in {wait:g} s")
            time.sleep(wait)
    raise AssertionError("the last try returns or raises")


def _may_pass(error: BaseException) -> bool:
    """Whether another try may do: the service was busy, or could not be reached."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    for cause in _chain(error):
        response = getattr(cause, "response", None)
        if response is not None:
            return response.status_code in _TRANSIENT
        if isinstance(cause, OfflineModeIsEnabled):
            return False
        if type(cause).__module__.startswith("httpx") or isinstance(
            cause, (ConnectionError, TimeoutError)
        ):
            return True
    return False


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what caused it."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _reason(error: BaseException) -> str:
    """First lines of what went wrong, without secrets."""
    from huggingface_hub import get_token

    lines = [str(cause).strip().split("\n")[0] or type(cause).__name__ for cause in _chain(error)]
    text = _QUERY.sub("", redact(": ".join(dict.fromkeys(lines))))
    token = get_token()
    return text.replace(token, MASK) if token else text
