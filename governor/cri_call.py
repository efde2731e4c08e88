"""Asks runtimes' CRI sockets for the sandboxes of some pods and prints them as JSON: a short-lived child of `cri.py`.

Only here is gRPC imported: the resident process has no use for it between two pods. Of CRI's api.proto (v1) this
knows what ListPodSandbox needs; the numbers of its fields are part of Kubernetes' API. Each pod is asked for alone,
so that nobody's annotations make another's answer too large.

Output: {"sandboxes": {UID: {"labels": {}, "annotations": {}}}, "failed": TEXT}
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson

CALL_TIMEOUT_S = 5
KEPT_CHARACTERS = 16 << 10  # of a pod's labels, and of its annotations; the API server takes 256 KiB of these
OURS = "governor.dev/"  # kept before all others
UID_LABEL = "io.kubernetes.pod.uid"  # the kubelet's (its newPodLabels)
_ANSWER_MAX_BYTES = 4 << 20
_METHOD = "/runtime.v1.RuntimeService/ListPodSandbox"
_READY = 0
# field: (number, type, repeated); a type is a message's name, or one of protobuf's own.
_MESSAGES: dict[str, dict[str, tuple[int, str, bool]]] = {
    "Text": {"key": (1, "string", False), "value": (2, "string", False)},  # how the wire has map<string, string>
    "PodSandboxFilter": {"label_selector": (3, "Text", True)},
    "ListPodSandboxRequest": {"filter": (1, "PodSandboxFilter", False)},
    "PodSandboxMetadata": {"uid": (2, "string", False)},
    "PodSandbox": {
        "metadata": (2, "PodSandboxMetadata", False),
        "state": (3, "int32", False),
        "created_at": (4, "int64", False),
        "labels": (5, "Text", True),
        "annotations": (6, "Text", True),
    },
    "ListPodSandboxResponse": {"items": (1, "PodSandbox", True)},
}


def message_classes() -> Mapping[str, Any]:
    """protobuf's classes of _MESSAGES, by name."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    field = descriptor_pb2.FieldDescriptorProto
    scalars = {"string": field.TYPE_STRING, "int32": field.TYPE_INT32, "int64": field.TYPE_INT64}
    file = descriptor_pb2.FileDescriptorProto(name="governor/cri.proto", package="runtime.v1", syntax="proto3")
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for field_name, (number, kind, repeated) in fields.items():
            added = message.field.add(name=field_name, number=number)
            added.label = field.LABEL_REPEATED if repeated else field.LABEL_OPTIONAL
            added.type = scalars.get(kind, field.TYPE_MESSAGE)
            if kind in _MESSAGES:
                added.type_name = f".runtime.v1.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"runtime.v1.{name}")) for name in _MESSAGES
    }


def ask(socket: str, uids: list[str]) -> dict[str, Any]:
    """The sandboxes of these pods that one runtime has; raises grpc.RpcError."""
    import grpc

    classes = message_classes()
    options = [
        ("grpc.default_authority", "localhost"),  # the path, percent-encoded, is none (grpc/grpc#38142)
        ("grpc.max_receive_message_length", _ANSWER_MAX_BYTES),
        ("grpc.enable_http_proxy", 0),
    ]
    found = {}
    with grpc.insecure_channel(f"unix:{socket}", options=options) as channel:
        call = channel.unary_unary(
            _METHOD,
            request_serializer=classes["ListPodSandboxRequest"].SerializeToString,
            response_deserializer=classes["ListPodSandboxResponse"].FromString,
        )
        for uid in uids:
            request = classes["ListPodSandboxRequest"]()
            request.filter.label_selector.add(key=UID_LABEL, value=uid)
            try:
                items = call(request, timeout=CALL_TIMEOUT_S).items
            except grpc.RpcError as error:
                if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:  # an answer that is too large: only this pod's
                    continue
                raise
            sandboxes = [one for one in items if one.metadata.uid == uid]
            if sandboxes:  # a pod whose pause container ended has an old one beside the new one
                latest = max(sandboxes, key=lambda one: (one.state == _READY, one.created_at))
                found[uid] = {"labels": kept(latest.labels), "annotations": kept(latest.annotations)}
    return found


def kept(pairs: Any) -> dict[str, str]:
    """As many of the texts as KEPT_CHARACTERS hold: governor's own first, then the shortest."""
    texts, left = {}, KEPT_CHARACTERS
    for pair in sorted(pairs, key=lambda one: (not one.key.startswith(OURS), len(one.key) + len(one.value))):
        left -= len(pair.key) + len(pair.value)
        if left < 0:
            break
        texts[pair.key] = pair.value
    return texts


def main(arguments: list[str]) -> None:
    """`cri_call --socket PATH [--socket PATH ...] -- UID ...`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket", action="append", default=[])
    parser.add_argument("uids", nargs="*")
    wanted = parser.parse_args(arguments)
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # rather than the process that started it
    sandboxes: dict[str, Any] = {}
    failed = []
    try:
        import grpc
    except ImportError as error:
        failed.append(f"{error}: pip install '.[node]' in a checkout of governor")
    else:
        for socket in wanted.socket:
            try:
                sandboxes |= ask(socket, wanted.uids)
            except grpc.RpcError as error:
                failed.append(f"{socket}: {error.code().name}: {error.details()}")
    sys.stdout.buffer.write(orjson.dumps({"sandboxes": sandboxes, "failed": "; ".join(failed)}))


if __name__ == "__main__":
    main(sys.argv[1:])
