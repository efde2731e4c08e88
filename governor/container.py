"""What a node knows of one container: where its memcg is, and who it says it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Container:
    """One container of a node.

    Texts come from the pod's author and from the runtime: escape them before they are shown; "" is unknown.
    """

    cgroup: str  # its directory
    container_id: str
    pod_uid: str
    qos: str  # guaranteed, burstable or besteffort
    namespace: str = ""
    pod: str = ""
    name: str = ""
    chosen_policy: str = ""  # GOVERNOR_POLICY of its environment: a wish, no more
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)
    has_own_mounts: bool = True  # whoever is in its memcg among the machine's is its runtime, not yet the container
