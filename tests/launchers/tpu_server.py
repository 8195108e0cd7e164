"""A stand-in for the Cloud TPU API: queued resources that come with time, or do not.

google-cloud-tpu's own messages over gRPC without TLS, as `hydra.launcher.api_endpoint` is spoken
to. A test holds the server in its own process, or starts it as one:

    python -m tests.launchers.tpu_server [--addresses 127.0.0.1,127.0.0.2] [--step_s 0.1]

It checks what Google's checks: names, labels, tiers, what UpdateNode takes, when a queued resource
may be deleted.
"""

import argparse
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.cloud import tpu_v2
from google.longrunning import operations_pb2
from google.protobuf import any_pb2, empty_pb2
from google.rpc import status_pb2

QUEUE = ("CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
_NAME = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")
_LABEL_KEY, _LABEL_VALUE = re.compile(r"[a-z][a-z0-9_-]{0,62}"), re.compile(r"[a-z0-9_-]{0,63}")
_UPDATABLE = {"description", "tags", "labels", "metadata", "network_config.enable_external_ips"}
_PAGE = 2


class Refused(Exception):
    """Ends a call with a gRPC status."""

    def __init__(self, code: grpc.StatusCode, message: str):
        super().__init__(message)
        self.code, self.message = code, message


@dataclass
class Order:
    """A queued resource, and what is to become of it."""

    message: Any
    begun: float
    queue: tuple[str, ...]
    failure: status_pb2.Status | None
    deleted: float | None = None
    forced: str | None = None
    """A state it was put into, whatever the time."""


@dataclass
class TpuServer:
    """`addresses` are the workers of each slice; a state lasts `step_s`, an operation too.

    `queue` is what requests go through from now on: one that ends before ACTIVE stays there.
    """

    addresses: Sequence[str] = ("127.0.0.1", "127.0.0.2", "127.0.0.3", "127.0.0.4")
    step_s: float = 0.05
    queue: tuple[str, ...] = QUEUE
    external: bool = False
    calls: list[tuple[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._orders: dict[str, Order] = {}
        self._nodes: dict[str, Any] = {}
        self._operations: dict[str, tuple[float, Any]] = {}
        self._faults: list[tuple[str, grpc.StatusCode, str]] = []
        self._failures: list[status_pb2.Status] = []
        self._lock = threading.RLock()

    # What a test does to it.

    def refuse(self, method: str, code: grpc.StatusCode, message: str, times: int = 1) -> None:
        """Ends the next calls of `method` so."""
        with self._lock:
            self._faults += [(method, code, message)] * times

    def fail(self, code: int, message: str, times: int = 1) -> None:
        """The next queued resources end as FAILED, with that code of google.rpc."""
        with self._lock:
            self._failures += [status_pb2.Status(code=code, message=message)] * times

    def preempt(self, name: str, node_state: str = "PREEMPTED") -> None:
        """Takes the slices of the queued resource `name` away."""
        with self._lock:
            self._orders[name].forced = "SUSPENDED"
            for node in self._nodes.values():
                if node.queued_resource.endswith(f"/{name}"):
                    node.state = tpu_v2.Node.State[node_state]

    def go_on(self) -> None:
        """All that waits goes through the whole queue after all."""
        with self._lock:
            self.queue = QUEUE
            for order in self._orders.values():
                order.queue = QUEUE

    def names(self, state: str | None = None) -> list[str]:
        """Queued resources that are there, or in that state."""
        with self._lock:
            self._advance()
            return [
                name
                for name, order in self._orders.items()
                if state is None or order.message.state.state.name == state
            ]

    def labels(self, node: str) -> dict[str, str]:
        with self._lock:
            return dict(self._nodes[node].labels)

    def count(self, method: str) -> int:
        """How often `method` was called."""
        return sum(name == method for name, _ in self.calls)

    # The API.

    def CreateQueuedResource(self, request: Any) -> Any:
        name, asked = request.queued_resource_id, request.queued_resource
        _check(_NAME.fullmatch(name), f"queued_resource_id {name!r}")
        if name in self._orders:
            raise Refused(grpc.StatusCode.ALREADY_EXISTS, f"{name} already exists")
        _check(len(asked.tpu.node_spec) == 1, "one node_spec")
        spec = asked.tpu.node_spec[0]
        _check(spec.parent == request.parent, "node_spec.parent")
        _check(spec.node.accelerator_type and spec.node.runtime_version, "node")
        _check(bool(spec.node_id) != (spec.multislice_params.node_count > 1), "node_id")
        for key, value in spec.node.labels.items():
            _check(_LABEL_KEY.fullmatch(key) and _LABEL_VALUE.fullmatch(value), f"label {key}")
        message = tpu_v2.QueuedResource()
        tpu_v2.QueuedResource.copy_from(message, asked)
        message.name = f"{request.parent}/queuedResources/{name}"
        failure = self._failures.pop(0) if self._failures else None
        self._orders[name] = Order(message, time.monotonic(), self.queue, failure)
        self._advance()
        return self._operation(request.parent, message)

    def GetQueuedResource(self, request: Any) -> Any:
        return self._order(request.name).message

    def ListQueuedResources(self, request: Any) -> Any:
        found = [order.message for order in self._orders.values()]
        page, token = _page(found, request)
        return tpu_v2.ListQueuedResourcesResponse(queued_resources=page, next_page_token=token)

    def DeleteQueuedResource(self, request: Any) -> Any:
        order = self._order(request.name)
        state = order.message.state.state.name
        if state == "DELETING":
            raise Refused(grpc.StatusCode.FAILED_PRECONDITION, f"{request.name} is being deleted")
        if not request.force and state not in ("ACCEPTED", "FAILED", "SUSPENDED"):
            raise Refused(grpc.StatusCode.FAILED_PRECONDITION, f"{request.name} is {state}")
        order.deleted = time.monotonic()
        self._advance()
        return self._operation(_parent(request.name), None)

    def GetNode(self, request: Any) -> Any:
        return self._node(request.name)

    def ListNodes(self, request: Any) -> Any:
        page, token = _page(list(self._nodes.values()), request)
        return tpu_v2.ListNodesResponse(nodes=page, next_page_token=token)

    def UpdateNode(self, request: Any) -> Any:
        node = self._node(request.node.name)
        paths = set(request.update_mask.paths)
        _check(paths and paths <= _UPDATABLE, f"update_mask {paths}")
        if "labels" in paths:
            node.labels = dict(request.node.labels)
        return self._operation(_parent(request.node.name), node)

    def DeleteNode(self, request: Any) -> Any:
        node = self._node(request.name)
        del self._nodes[_last(node.name)]
        return self._operation(_parent(request.name), None)

    def GetOperation(self, request: Any) -> Any:
        if request.name not in self._operations:
            raise Refused(grpc.StatusCode.NOT_FOUND, f"{request.name} not found")
        ends, result = self._operations[request.name]
        operation = operations_pb2.Operation(name=request.name, done=time.monotonic() > ends)
        if operation.done:
            operation.response.CopyFrom(_packed(result))
        return operation

    # How it goes on.

    def _advance(self) -> None:
        now = time.monotonic()
        for name, order in [*self._orders.items()]:
            if order.deleted is not None and now - order.deleted > self.step_s:
                del self._orders[name]
                self._nodes = {
                    key: node
                    for key, node in self._nodes.items()
                    if _last(node.queued_resource) != name
                }
                continue
            self._set_state(order, self._state(order, now))

    def _state(self, order: Order, now: float) -> str:
        if order.deleted is not None:
            return "DELETING"
        if order.forced is not None:
            return order.forced
        step = int((now - order.begun) / self.step_s)
        if order.failure is not None and step >= 2:
            return "FAILED"
        return order.queue[min(step, len(order.queue) - 1)]

    def _set_state(self, order: Order, state: str) -> None:
        said = tpu_v2.QueuedResourceState(state=tpu_v2.QueuedResourceState.State[state])
        if state == "FAILED":
            said.failed_data = tpu_v2.QueuedResourceState.FailedData(error=order.failure)
        order.message.state = said
        if state == "ACTIVE":
            self._make_nodes(order)

    def _make_nodes(self, order: Order) -> None:
        spec = order.message.tpu.node_spec[0]
        count = spec.multislice_params.node_count or 1
        ids = [spec.node_id]
        if count > 1:
            prefix = spec.multislice_params.node_id_prefix or _last(order.message.name)
            ids = [f"{prefix}-{number}" for number in range(count)]
        for name in ids:
            if name in self._nodes:
                continue
            node = tpu_v2.Node()
            tpu_v2.Node.copy_from(node, spec.node)
            node.name, node.state = f"{spec.parent}/nodes/{name}", tpu_v2.Node.State.READY
            node.queued_resource, node.multislice_node = order.message.name, count > 1
            node.network_endpoints = [self._endpoint(address) for address in self.addresses]
            self._nodes[name] = node

    def _endpoint(self, address: str) -> tpu_v2.NetworkEndpoint:
        if not self.external:
            return tpu_v2.NetworkEndpoint(ip_address=address)
        access = tpu_v2.AccessConfig(external_ip=address)
        return tpu_v2.NetworkEndpoint(ip_address="10.0.0.1", access_config=access)

    def _operation(self, parent: str, result: Any) -> Any:
        name = f"{parent}/operations/operation-{len(self._operations)}"
        self._operations[name] = (time.monotonic() + self.step_s, result)
        return operations_pb2.Operation(name=name, done=False)

    def _order(self, name: str) -> Order:
        if _last(name) not in self._orders:
            raise Refused(grpc.StatusCode.NOT_FOUND, f"{name} not found")
        return self._orders[_last(name)]

    def _node(self, name: str) -> Any:
        if _last(name) not in self._nodes:
            raise Refused(grpc.StatusCode.NOT_FOUND, f"{name} not found")
        return self._nodes[_last(name)]

    def answer(self, method: str, request: Any) -> Any:
        """One call."""
        with self._lock:
            self.calls.append((method, request))
            for fault in self._faults:
                if fault[0] == method:
                    self._faults.remove(fault)
                    raise Refused(*fault[1:])
            self._advance()
            return getattr(self, method)(request)


_METHODS = (
    "CreateQueuedResource", "GetQueuedResource", "ListQueuedResources", "DeleteQueuedResource",
    "GetNode", "ListNodes", "UpdateNode", "DeleteNode",
)  # fmt: skip


@contextmanager
def serving(server: TpuServer, port: int = 0) -> Iterator[str]:
    """HOST:PORT where it answers."""
    tpu = {name: _handler(server, name, getattr(tpu_v2, f"{name}Request")) for name in _METHODS}
    waiting = {
        "GetOperation": grpc.unary_unary_rpc_method_handler(
            _call(server, "GetOperation"),
            operations_pb2.GetOperationRequest.FromString,
            operations_pb2.Operation.SerializeToString,
        )
    }
    running = grpc.server(futures.ThreadPoolExecutor(8))
    running.add_generic_rpc_handlers(
        [
            grpc.method_handlers_generic_handler("google.cloud.tpu.v2.Tpu", tpu),
            grpc.method_handlers_generic_handler("google.longrunning.Operations", waiting),
        ]
    )
    bound = running.add_insecure_port(f"127.0.0.1:{port}")
    running.start()
    try:
        yield f"127.0.0.1:{bound}"
    finally:
        running.stop(None).wait()


def _handler(server: TpuServer, name: str, kind: Any) -> Any:
    return grpc.unary_unary_rpc_method_handler(_call(server, name), kind.deserialize, _serialized)


def _call(server: TpuServer, name: str) -> Callable[[Any, grpc.ServicerContext], Any]:
    def call(request: Any, context: grpc.ServicerContext) -> Any:
        try:
            return server.answer(name, request)
        except Refused as error:
            context.abort(error.code, error.message)

    return call


def _serialized(message: Any) -> bytes:
    if isinstance(message, operations_pb2.Operation):
        return message.SerializeToString()
    return type(message).serialize(message)


def _packed(result: Any) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(empty_pb2.Empty() if result is None else type(result).pb(result))
    return packed


def _page(found: list[Any], request: Any) -> tuple[list[Any], str]:
    begin = int(request.page_token or 0)
    mine = [message for message in found if message.name.startswith(f"{request.parent}/")]
    end = begin + _PAGE
    return mine[begin:end], str(end) if end < len(mine) else ""


def _check(holds: object, what: str) -> None:
    if not holds:
        raise Refused(grpc.StatusCode.INVALID_ARGUMENT, f"invalid: {what}")


def _parent(name: str) -> str:
    return "/".join(name.split("/")[:4])


def _last(name: str) -> str:
    return name.rpartition("/")[2]


def main() -> None:
    """Prints where it answers, and does until it is ended."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--addresses", default=",".join(TpuServer.addresses))
    parser.add_argument("--step_s", type=float, default=TpuServer.step_s)
    parser.add_argument("--port", type=int, default=0)
    given = parser.parse_args()
    server = TpuServer(addresses=given.addresses.split(","), step_s=given.step_s)
    with serving(server, given.port) as endpoint:
        print(endpoint, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
