"""Queued resources of the Cloud TPU API as a launcher needs them: make, look, label, delete.

Through google-cloud-tpu (tpu_v2). Errors come as LaunchError, NoCapacity where waiting may help.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from sdx_launchers.jobs import LaunchError
from sdx_launchers.tpu.requests import Place, deletion, missing_library

_CALL_S, _KEEP_TRYING_S = 60.0, 300.0  # one request; with those that follow while the API is away
_DELETE_WITHIN_S = 1800.0
_LOST = {
    "PREEMPTED",
    "TERMINATED",
    "STOPPED",
    "STOPPING",
    "DELETING",
    "HIDING",
    "HIDDEN",
    "UNKNOWN",
}
_GONE = {"SUSPENDING", "SUSPENDED", "FAILED", "DELETING"}
_WAITING_HELPS = {8, 10, 13, 14}  # RESOURCE_EXHAUSTED ABORTED INTERNAL UNAVAILABLE of google.rpc
Result = TypeVar("Result")


class NoCapacity(LaunchError):
    """There are none at the moment."""


@dataclass(frozen=True)
class Endpoint:
    """A worker of a slice; `external` is None where it has no address outside of its network."""

    internal: str
    external: str | None


@dataclass(frozen=True)
class Node:
    """One slice."""

    name: str
    state: str
    labels: Mapping[str, str]
    endpoints: tuple[Endpoint, ...]
    queued: str
    """Name of its queued resource."""

    @property
    def is_lost(self) -> bool:
        return self.state in _LOST


@dataclass(frozen=True)
class Queued:
    """A queued resource; `labels` are those its nodes were ordered with, which stay as they were.

    `error` is why it failed, `code` that of google.rpc.
    """

    name: str
    state: str
    labels: Mapping[str, str]
    error: str
    code: int

    @property
    def is_gone(self) -> bool:
        """Whether it has no nodes any more, nor ever will."""
        return self.state in _GONE


class Tpus:
    """The API at one place; `client` is a tpu_v2.TpuClient where it is not to be made here."""

    def __init__(self, place: Place, poll_s: float, client: Any = None):
        self.place = place
        self._poll_s = poll_s
        self._client = client or _client(place)

    def create(self, request: Mapping[str, Any]) -> Any:
        """Asks for a queued resource; what `check_created` takes."""
        from google.api_core.exceptions import AlreadyExists
        from google.cloud import tpu_v2

        message = tpu_v2.CreateQueuedResourceRequest.from_json(json.dumps(request))
        try:
            return self._call(self._client.create_queued_resource, message, AlreadyExists)
        except AlreadyExists:  # the answer to an earlier try was lost; the name is ours alone
            return None

    def check_created(self, operation: Any) -> None:
        """Raises what became of a request that was refused after it was taken."""
        if operation is None:
            return
        from google.api_core.exceptions import GoogleAPICallError

        if self._guarded(lambda: operation.done(retry=self._retry())):
            error = self._guarded(lambda: operation.exception(timeout=_CALL_S))
            if isinstance(error, GoogleAPICallError):
                raise _explained(self.place, error)

    def queued(self, name: str) -> Queued | None:
        """The queued resource of that name; None where there is none."""
        from google.api_core.exceptions import NotFound
        from google.cloud import tpu_v2

        message = tpu_v2.GetQueuedResourceRequest(name=self.place.queued(name))
        try:
            return _as_queued(self._call(self._client.get_queued_resource, message, NotFound))
        except NotFound:
            return None

    def all_queued(self) -> list[Queued]:
        """Every queued resource of the project in the zone, whoever's it is."""
        from google.cloud import tpu_v2

        message = tpu_v2.ListQueuedResourcesRequest(parent=self.place.parent)
        return self._guarded(
            lambda: [_as_queued(found) for found in self._list("list_queued_resources", message)]
        )

    def nodes(self) -> list[Node]:
        """Every slice of the project in the zone."""
        from google.cloud import tpu_v2

        message = tpu_v2.ListNodesRequest(parent=self.place.parent)
        return self._guarded(lambda: [_as_node(node) for node in self._list("list_nodes", message)])

    def node(self, name: str) -> Node | None:
        """The slice of that name; None where there is none."""
        from google.api_core.exceptions import NotFound
        from google.cloud import tpu_v2

        message = tpu_v2.GetNodeRequest(name=self.place.node(name))
        try:
            return _as_node(self._call(self._client.get_node, message, NotFound))
        except NotFound:
            return None

    def relabel(self, name: str, labels: Mapping[str, str]) -> None:
        """Replaces all labels of a slice. UpdateNode does that for nodes of queued resources too;
        the queued resource goes on showing those it was ordered with."""
        from google.api_core.exceptions import NotFound
        from google.cloud import tpu_v2
        from google.protobuf import field_mask_pb2

        message = tpu_v2.UpdateNodeRequest(
            node=tpu_v2.Node(name=self.place.node(name), labels=dict(labels)),
            update_mask=field_mask_pb2.FieldMask(paths=["labels"]),
        )
        try:
            operation = self._call(self._client.update_node, message, NotFound)
            self._guarded(lambda: operation.result(polling=self._polling()))
        except NotFound:
            raise LaunchError(f"{name}: is gone.") from None

    def delete(self, name: str, node_ids: Sequence[str] = ()) -> None:
        """Deletes a queued resource and its slices; returns when they are gone."""
        deadline = time.monotonic() + _DELETE_WITHIN_S
        while self._is_there(name, node_ids):
            if time.monotonic() > deadline:
                raise LaunchError(
                    f"{name}: could not be deleted within {_DELETE_WITHIN_S / 60:.0f} minutes and "
                    "may cost money."
                )
            time.sleep(self._poll_s)

    def _is_there(self, name: str, node_ids: Sequence[str]) -> bool:
        """Whether anything is left, of which the deletion was asked for once more."""
        from google.api_core.exceptions import Aborted, FailedPrecondition, NotFound
        from google.cloud import tpu_v2

        request = deletion(self.place, name)
        message = tpu_v2.DeleteQueuedResourceRequest.from_json(json.dumps(request))
        try:
            expected = (NotFound, FailedPrecondition, Aborted)
            self._call(self._client.delete_queued_resource, message, *expected)
        except NotFound:
            return any([self._delete_node(node) for node in node_ids])
        except (FailedPrecondition, Aborted):  # it is being made, or deleted
            pass
        return self.queued(name) is not None or any(map(self.node, node_ids))

    def _delete_node(self, name: str) -> bool:
        """Whether the slice is there, whose deletion is asked for: one whose queued resource went
        without it."""
        from google.api_core.exceptions import FailedPrecondition, NotFound
        from google.cloud import tpu_v2

        try:
            message = tpu_v2.DeleteNodeRequest(name=self.place.node(name))
            self._call(self._client.delete_node, message, NotFound, FailedPrecondition)
        except NotFound:
            return False
        except FailedPrecondition:
            pass
        return True

    def _list(self, method: str, message: Any) -> Any:
        call = getattr(self._client, method)
        return call(request=message, retry=self._retry(), timeout=_CALL_S)

    def _call(
        self, method: Callable[..., Result], message: Any, *expected: type[Exception]
    ) -> Result:
        """Asked again while the API is away; its refusals explained, but those that are
        `expected`."""
        options = {"retry": self._retry(), "timeout": _CALL_S}
        return self._guarded(lambda: method(request=message, **options), *expected)

    def _guarded(self, act: Callable[[], Result], *expected: type[Exception]) -> Result:
        from google.api_core.exceptions import GoogleAPIError

        try:
            return act()
        except expected:
            raise
        except (GoogleAPIError, OSError) as error:
            raise _explained(self.place, error) from error

    def _polling(self) -> Any:
        """How a pending operation is looked at."""
        from google.api_core.future.polling import DEFAULT_POLLING

        pause = min(1.0, self._poll_s)
        polling = DEFAULT_POLLING.with_delay(initial=pause, maximum=self._poll_s)
        return polling.with_timeout(_KEEP_TRYING_S)

    def _retry(self) -> Any:
        from google.api_core.retry import Retry

        pause = min(1.0, self._poll_s)
        return Retry(predicate=_may_pass, initial=pause, maximum=10 * pause, timeout=_KEEP_TRYING_S)


def _client(place: Place) -> Any:
    """The library's client, which speaks plainly to an emulator: with `api_endpoint` it would
    insist on TLS and credentials."""
    try:
        from google.cloud import tpu_v2
        from google.cloud.tpu_v2.services.tpu.transports import TpuGrpcTransport
    except ImportError as error:
        raise LaunchError(f"hydra/launcher=sdx_tpu: {missing_library(error)}") from error
    if place.endpoint is None:
        from google.auth.exceptions import GoogleAuthError

        try:
            return tpu_v2.TpuClient()
        except GoogleAuthError as error:
            raise _explained(place, error) from error
    import grpc

    return tpu_v2.TpuClient(
        transport=TpuGrpcTransport(channel=grpc.insecure_channel(place.endpoint))
    )


def _may_pass(error: BaseException) -> bool:
    """Whether the same request may succeed in a moment."""
    from google.api_core import exceptions

    if isinstance(error, exceptions.ResourceExhausted):
        return "per minute" in str(error)  # too many requests; other quotas stay as they are
    return isinstance(error, exceptions.ServiceUnavailable | exceptions.DeadlineExceeded)


def refusal(place: Place, code: int, message: str) -> LaunchError:
    """Why a queued resource failed, and what to do."""
    where = f"TPUs in {place.zone} of {place.project}"
    if code == 8 and "quota" in message.lower():
        fix = "ask for more at console.cloud.google.com/iam-admin/quotas, or use another zone"
        return LaunchError(f"{where}: {message.rstrip('.')}; {fix}.")
    if code in _WAITING_HELPS:
        return NoCapacity(f"{where}: {message or 'no reason given'}")
    return LaunchError(f"{where}: {message or 'failed without a reason'}")


def _explained(place: Place, error: Exception) -> LaunchError:
    from google.api_core import exceptions

    text = getattr(error, "message", None) or str(error)
    kind = type(error).__name__
    if isinstance(error, exceptions.ResourceExhausted):
        return refusal(place, 8, text)
    fixes: dict[type, str] = {
        exceptions.PermissionDenied: "you need roles/tpu.admin, and tpu.googleapis.com enabled",
        exceptions.Unauthenticated: "gcloud auth application-default login",
        exceptions.InvalidArgument: "see hydra.launcher.accelerator_type, runtime_version, network",
        exceptions.RetryError: "the API does not answer; try later",
    }
    fix = next((f"; {fix}" for cause, fix in fixes.items() if isinstance(error, cause)), "")
    where = f"TPUs in {place.zone} of {place.project}"
    return LaunchError(f"{where}: {kind}: {' '.join(text.split()).rstrip('.')}{fix}.")


def _as_queued(found: Any) -> Queued:
    specs = list(found.tpu.node_spec)
    error = found.state.failed_data.error
    return Queued(
        name=_last(found.name),
        state=found.state.state.name,
        labels=dict(specs[0].node.labels) if specs else {},
        error=error.message,
        code=error.code,
    )


def _as_node(node: Any) -> Node:
    endpoints = tuple(
        Endpoint(end.ip_address, end.access_config.external_ip or None)
        for end in node.network_endpoints
    )
    return Node(
        name=_last(node.name),
        state=node.state.name,
        labels=dict(node.labels),
        endpoints=endpoints,
        queued=_last(node.queued_resource),
    )


def _last(name: str) -> str:
    return name.rpartition("/")[2]
