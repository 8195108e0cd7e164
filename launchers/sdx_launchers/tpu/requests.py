"""What is asked of the Cloud TPU API, as its JSON: names, labels, one queued resource.

Nothing is sent here, and Google's library is not needed. Field names and their meaning:
cloud.google.com/tpu/docs/reference/rest/v2/projects.locations.queuedResources.
"""

import getpass
import hashlib
import json
import re
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sdx.config.errors import Problem
from sdx.config.launching import Provisioning, TpuSettings
from sdx_launchers.jobs import LaunchError

OWNER, SWEEP, LEASE, HOLDER, KEEP, SHAPE = (
    "sdx-owner", "sdx-sweep", "sdx-lease", "sdx-holder", "sdx-keep", "sdx-shape"
)  # fmt: skip
"""Labels: whose it is and for which sweep; seconds since 1970 until which the launcher `HOLDER`
vouches for it; whether it stays after its sweep; what it was ordered as."""

_LABEL = re.compile(r"[a-z0-9_-]{0,63}")  # of a value; keys begin with a letter
_NOT_LABEL = re.compile(r"[^a-z0-9_-]")
_CLOUD_SCOPE = "https://www.googleapis.com/auth/cloud-platform"
_METADATA = "http://metadata.google.internal/computeMetadata/v1/instance"
API = "https://tpu.googleapis.com/v2"

_PATTERNS = {
    "project": (r"([a-z0-9.-]+:)?[a-z][a-z0-9-]{4,28}[a-z0-9]", "the id of a project"),
    "zone": (r"[a-z]+-[a-z]+\d+-[a-z]", "a zone, as us-central2-b"),
    "accelerator_type": (r"v\d+[a-z]*(pod)?-\d+", "Google's name of a slice, as v4-32"),
    "runtime_version": (r"[a-z0-9][a-z0-9.-]*", "the name of an image, as tpu-ubuntu2204-base"),
    "reservation": (
        r"(projects/[a-z0-9.:-]+/locations/[a-z0-9-]+/reservations/)?[a-z0-9][a-z0-9-]{0,62}",
        "the name of a reservation",
    ),
    "network": (r"(projects/[a-z0-9.:-]+/global/networks/)?[a-z][a-z0-9-]{0,62}", "a VPC network"),
    "subnetwork": (
        r"(projects/[a-z0-9.:-]+/regions/[a-z0-9-]+/subnetworks/)?[a-z][a-z0-9-]{0,62}",
        "a subnetwork",
    ),
    "service_account": (r"[a-z0-9.-]+@[a-z0-9.-]+", "the address of a service account"),
    "owner": (r"[a-z0-9][a-z0-9_-]{0,62}", "a label of Google Cloud: a-z 0-9 _ -, at most 63"),
    "api_endpoint": (r"([\w.-]+|\[[0-9a-fA-F:]+\]):\d{1,5}", "HOST:PORT"),
}


@dataclass(frozen=True)
class Place:
    """Where TPUs are asked for; `endpoint` is an emulator's, None for Google's own API."""

    project: str
    zone: str
    endpoint: str | None = None

    @property
    def parent(self) -> str:
        return f"projects/{self.project}/locations/{self.zone}"

    def queued(self, name: str) -> str:
        return f"{self.parent}/queuedResources/{name}"

    def node(self, name: str) -> str:
        return f"{self.parent}/nodes/{name}"


@dataclass(frozen=True)
class Spec:
    """What a job needs: slices of one kind, and how they are had."""

    accelerator_type: str
    runtime_version: str
    num_slices: int
    provisioning: Provisioning
    reservation: str | None
    network: str | None
    subnetwork: str | None
    external_ips: bool
    service_account: str | None
    self_delete_min: float | None

    @property
    def shape(self) -> str:
        """The same for two of which one can stand for the other, as a label."""
        said = json.dumps(_node(self) | _tier(Place("", ""), self) | {"n": self.num_slices})
        return hashlib.sha256(said.encode()).hexdigest()[:16]

    def node_ids(self, name: str) -> list[str]:
        """Slices of the queued resource `name`, in the order of their numbers."""
        if self.num_slices == 1:
            return [name]
        return [f"{name}-{number}" for number in range(self.num_slices)]


def spec_of(settings: TpuSettings, num_slices: int) -> Spec:
    """What `settings`, found to be sound, ask for, that many slices together."""
    assert settings.accelerator_type is not None and settings.runtime_version is not None
    return Spec(
        accelerator_type=settings.accelerator_type,
        runtime_version=settings.runtime_version,
        num_slices=num_slices,
        provisioning=settings.provisioning,
        reservation=settings.reservation,
        network=settings.network,
        subnetwork=settings.subnetwork,
        external_ips=settings.external_ips,
        service_account=settings.service_account,
        self_delete_min=settings.self_delete_min,
    )


def setting_problems(settings: TpuSettings) -> Iterator[Problem]:
    """Settings that are missing, or are no names of Google Cloud: they go into a script."""
    for name, fix in {
        "zone": "one that has these TPUs and your quota",
        "accelerator_type": "use run_on=tpu_v4_32 and the like, or give one, as v4-32",
        "runtime_version": "as tpu-ubuntu2204-base; see cloud.google.com/tpu/docs/runtimes",
    }.items():
        if getattr(settings, name) is None:
            yield Problem(f"hydra.launcher.{name}", "null", "missing", fix)
    for name, (pattern, what) in _PATTERNS.items():
        value = getattr(settings, name)
        if value is not None and not re.fullmatch(pattern, value):
            yield Problem(f"hydra.launcher.{name}", repr(value), f"must be {what}")
    if settings.provisioning is not Provisioning.reserved and settings.reservation is not None:
        fix = "add hydra.launcher.provisioning=reserved"
        path = "hydra.launcher.reservation"
        yield Problem(path, settings.reservation, "is of reserved TPUs", fix)


def owner_of(settings: TpuSettings) -> str:
    """The owner's label: as given, else the user's name."""
    return settings.owner or as_label(getpass.getuser())


def as_label(text: str) -> str:
    """`text` with what a label cannot hold replaced."""
    return _NOT_LABEL.sub("-", text.lower())[:63]


def new_name(owner: str) -> str:
    """A name that nobody else uses; it begins with whose it is."""
    return f"{_stem(owner)}-{secrets.token_hex(4)}"


def example_name(owner: str) -> str:
    """What stands for a new name where nothing is made."""
    return f"{_stem(owner)}-xxxxxxxx"


def labels(
    owner: str, sweep: str, holder: str, until: float, *, shape: str, keep: bool
) -> dict[str, str]:
    """All labels of a TPU; `until` in seconds since 1970."""
    made = {
        OWNER: owner,
        SWEEP: as_label(sweep),
        HOLDER: holder,
        LEASE: str(int(until)),
        SHAPE: shape,
        KEEP: "yes" if keep else "no",
    }
    assert all(_LABEL.fullmatch(value) for value in made.values())
    return made


def lease_end(labelled: Mapping[str, str]) -> float:
    """Until when the labels say that somebody uses it; 0 without such a label."""
    text = labelled.get(LEASE, "")
    return float(text) if text.isdecimal() else 0.0


def creation(
    place: Place, name: str, spec: Spec, labelled: Mapping[str, str], lasts_s: float
) -> dict[str, Any]:
    """The request CreateQueuedResource. After `lasts_s` in the queue the service gives it up."""
    node: dict[str, Any] = {"parent": place.parent, "node": _node(spec) | {"labels": {**labelled}}}
    if (script := self_delete_script(place, name, spec.self_delete_min)) is not None:
        node["node"]["metadata"] = {"startup-script": script}
    if spec.num_slices == 1:
        node["nodeId"] = name
    else:
        node["multisliceParams"] = {"nodeCount": spec.num_slices, "nodeIdPrefix": name}
    return {
        "parent": place.parent,
        "queuedResourceId": name,
        "queuedResource": {
            "tpu": {"nodeSpec": [node]},
            **_tier(place, spec),
            "queueingPolicy": {"validUntilDuration": f"{max(1, int(lasts_s))}s"},
        },
    }


def deletion(place: Place, name: str) -> dict[str, Any]:
    """The request DeleteQueuedResource, its nodes included."""
    return {"name": place.queued(name), "force": True}


def delete_by_hand(place: Place, name: str) -> str:
    """What a person types to the same end."""
    return (
        f"gcloud compute tpus queued-resources delete {name} --force --quiet "
        f"--project={place.project} --zone={place.zone}"
    )


def self_delete_script(place: Place, name: str, minutes: float | None) -> str | None:
    """What every worker runs at its start: after `minutes`, reboots included, it deletes the queued
    resource with the rights of its service account, and shuts down where those do not reach.
    """
    if minutes is None:
        return None
    url = f"{API}/{place.queued(name)}?force=true"
    return f"""#!/bin/sh
# sdx: deletes this TPU {minutes:g} minutes after its first start, whatever became of the launcher.
at=/var/lib/sdx-delete-at
[ -s $at ] || echo $(( $(date +%s) + {int(minutes * 60)} )) > $at
(
  while [ "$(date +%s)" -lt "$(cat $at)" ]; do sleep 30; done
  for try in 1 2 3 4 5; do
    curl -s -H 'Metadata-Flavor: Google' '{_METADATA}/service-accounts/default/token' |
      sed 's/.*"access_token" *: *"\\([^"]*\\)".*/Authorization: Bearer \\1/' |
      curl -s -f -X DELETE -H @- '{url}' && break
    sleep 60
  done
  sleep 600
  shutdown -h now
) > /dev/null 2>&1 &
"""


def _stem(owner: str) -> str:
    return f"sdx-{owner.replace('_', '-')[:40].strip('-') or 'tpu'}"


def _node(spec: Spec) -> dict[str, Any]:
    network = {"network": spec.network, "subnetwork": spec.subnetwork}
    node: dict[str, Any] = {
        "acceleratorType": spec.accelerator_type,
        "runtimeVersion": spec.runtime_version,
        "networkConfig": {key: value for key, value in network.items() if value is not None}
        | {"enableExternalIps": spec.external_ips},
    }
    if spec.service_account is not None:
        node["serviceAccount"] = {"email": spec.service_account, "scope": [_CLOUD_SCOPE]}
    if spec.provisioning is Provisioning.reserved:
        node["schedulingConfig"] = {"reserved": True}
    return node


def _tier(place: Place, spec: Spec) -> dict[str, Any]:
    if spec.provisioning is Provisioning.spot:
        return {"spot": {}}
    if spec.provisioning is Provisioning.on_demand:
        return {}
    if spec.reservation is None:
        return {"guaranteed": {}}
    name = spec.reservation
    full = name if "/" in name else f"{place.parent}/reservations/{name}"
    return {"guaranteed": {}, "reservationName": full}


def place_of(settings: TpuSettings) -> Place:
    """Where `settings` ask for TPUs; LaunchError where nothing says in which project."""
    assert settings.zone is not None
    project = settings.project or _default_project(settings)
    return Place(project, settings.zone, settings.api_endpoint)


def _default_project(settings: TpuSettings) -> str:
    """That of the credentials; an emulator has no need of one."""
    fix = (
        "give hydra.launcher.project=PROJECT, or log in with gcloud auth application-default login"
    )
    try:
        import google.auth
        from google.auth.exceptions import DefaultCredentialsError
    except ImportError as error:
        raise LaunchError(f"hydra.launcher.project=null: {missing_library(error)}") from error
    try:
        project = google.auth.default()[1]
    except DefaultCredentialsError as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise LaunchError(f"hydra.launcher.project=null: {reason}; {fix}.") from None
    if project is None:
        raise LaunchError(f"hydra.launcher.project=null: your credentials name none; {fix}.")
    return project


def missing_library(error: ImportError) -> str:
    """What to say where Google's library cannot be imported."""
    return f"needs google-cloud-tpu ({error}); pip install 'sdx[cloud-tpu]'."
