"""A runtime's CRI socket, as far as ListPodSandbox goes: real gRPC, messages encoded by hand from CRI's api.proto."""

from __future__ import annotations

import os
import threading
from concurrent import futures

os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"  # or a fork of pytest gets threads of gRPC's, and may enter no mounts

import grpc

METHOD = "ListPodSandbox"


def varint(value):
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def number(field, value):
    return varint(field << 3) + varint(value)


def block(field, value):
    data = value.encode() if isinstance(value, str) else value
    return varint(field << 3 | 2) + varint(len(data)) + data


def texts(field, pairs):
    return b"".join(block(field, block(1, key) + block(2, value)) for key, value in pairs.items())


def sandbox(uid, labels=None, annotations=None, state=0, created_at=1):
    """A PodSandbox: id, metadata (name, uid, namespace, attempt), state, created_at, labels, annotations, handler."""
    metadata = block(1, "agent-0") + block(2, uid) + block(3, "team-a") + number(4, 2)
    head = block(1, "f" * 64) + block(2, metadata) + number(3, state) + number(4, created_at)
    return head + texts(5, labels or {}) + texts(6, annotations or {}) + block(7, "runc")


class Runtime(grpc.GenericRpcHandler):
    """Answers with the sandboxes whose UID stands in the request's filter."""

    def __init__(self, path, sandboxes=(), status=None):
        self.path, self.sandboxes, self.status = str(path), sandboxes, status
        self.requests = []
        self.hang = threading.Event()
        self.hang.set()
        self._server = grpc.server(futures.ThreadPoolExecutor(2), handlers=[self])
        self._server.add_insecure_port(f"unix:{path}")
        self._server.start()

    def service(self, details):
        if details.method != f"/runtime.v1.RuntimeService/{METHOD}":
            return None
        return grpc.unary_unary_rpc_method_handler(self._list)

    def _list(self, request, context):
        self.requests.append(request)
        self.hang.wait(60)
        if self.status:
            context.abort(self.status, "not here")
        # filter = 1, label_selector = 3 of it
        wanted = [one for uid, one in self.sandboxes if request == block(1, texts(3, {"io.kubernetes.pod.uid": uid}))]
        return b"".join(block(1, one) for one in wanted)

    def stop(self):
        self.hang.set()
        self._server.stop(None).wait()
