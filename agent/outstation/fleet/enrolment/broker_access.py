"""Access rules of the broker: clients and roles of Mosquitto's dynamic-security plugin, and changes of them.

Everything is denied that no role allows. The plugin has no pattern for user names, so each device has a role of its
own, which names its topics. A withdrawn client stays in the document, disabled and without a role; the account of an
invitation is removed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Any, Literal

import msgspec

from outstation.fleet.collector.subscriptions import logged_filters
from outstation.integrations.homeassistant.config import DEFAULT_PREFIX
from outstation.integrations.homeassistant.discovery import Place
from outstation.protocol.wire import invitation, trust
from outstation.protocol.wire.topics import ALL_DEVICES, DEVICE_ALERTS, DEVICE_GROUP, KINDS, ROOT

# Client that may change the rules while the broker runs.
ADMIN = "broker-admin"
# Client that answers invited devices.
REGISTRAR = "_registrar"
CONTROL_TOPIC = "$CONTROL/dynamic-security/v1"
_ACCESS_TYPES = ("publishClientSend", "publishClientReceive", "subscribe", "unsubscribe")

# Trust document and desired state of the fleet, desired state of its groups.
_READ_BY_ALL = (f"{ALL_DEVICES}/{trust.KIND}", f"{ALL_DEVICES}/desired", f"{DEVICE_GROUP}/desired/+")

Document = dict[str, Any]
Access = Literal["device", "collector", "bridge", "homeassistant", "viewer", "joining", "none", "removed"]


class AccessChange(msgspec.Struct, frozen=True):
    """Wanted access of a client; `none` withdraws all, `removed` also its name. `tasks`: of a device, any without."""

    client: str
    access: Access
    tasks: tuple[str, ...] = ()


def build_document(fleet: str, group: str) -> Document:
    """Build the plugin's file for a fleet without devices."""
    base, tree = f"{ROOT}/{fleet}", fleet_tree(fleet)
    everyone = [f"{base}/{topic}" for topic in _READ_BY_ALL]
    orders = [*everyone, f"{base}/+/cmd", f"{base}/+/desired"]
    # A device's log is not retained; the collector deletes what a device retains there, by an empty message.
    logged = logged_filters(fleet)
    return {
        "defaultACLAccess": dict.fromkeys(_ACCESS_TYPES, False),
        "clients": [
            _client("collector", ["collector"]),
            _client("operator", ["operator"]),
            _client("commander", ["operator"]),
            _client(ADMIN, [ADMIN]),
            _client(REGISTRAR, [REGISTRAR]),
        ],
        "groups": [],
        "roles": [
            _role("device", receive=everyone),
            _role("collector", send=[f"{base}/+/ack", *logged], receive=[tree], share=[f"$share/{group}/{tree}"]),
            _role("operator", send=orders, receive=[tree]),
            _viewer_role(fleet),
            _admin_role(),
            _role(
                REGISTRAR,
                send=[invitation.build_topic(fleet, "+", "answer")],
                receive=[invitation.build_topic(fleet, "+", "request")],
            ),
            *_homeassistant_roles(fleet),
        ],
    }


def build_viewers_document(fleet: str) -> Document:
    """Build the plugin's file for the viewers' broker, without viewers."""
    return {
        "defaultACLAccess": dict.fromkeys(_ACCESS_TYPES, False),
        "clients": [_client(ADMIN, [ADMIN])],
        "groups": [],
        "roles": [_viewer_role(fleet), _admin_role()],
    }


def fleet_tree(fleet: str) -> str:
    return f"{ROOT}/{fleet}/#"


def is_in_force(change: AccessChange, client: dict[str, Any] | None) -> bool:
    """Return True if a client, as the document or the plugin lists it, has the wanted access."""
    if client is None or change.access == "removed":
        return client is None and change.access == "removed"
    names = {role["rolename"] for role in client.get("roles", ())}
    return names == set(_role_names(change)) and bool(client.get("disabled")) == (change.access == "none")


def find_client(document: Document, name: str) -> dict[str, Any] | None:
    return next((client for client in document["clients"] if client["username"] == name), None)


def edit_document(document: Document, fleet: str, changes: Iterable[AccessChange]) -> bool:
    """Make the changes in the document. Return False if all were in it."""
    missing = [change for change in changes if not is_in_force(change, find_client(document, change.client))]
    for change in missing:
        own = _own_role_name(AccessChange(change.client, "device"))
        document["roles"] = [role for role in document["roles"] if role["rolename"].partition("/")[0] != own]
        document["clients"] = [client for client in document["clients"] if client["username"] != change.client]
        if change.access == "removed":
            continue
        if change.access in _OWN_ROLES:
            document["roles"].append(_OWN_ROLES[change.access](fleet, change))
        client = _client(change.client, _role_names(change))
        document["clients"].append(client | ({"disabled": True} if change.access == "none" else {}))
    return bool(missing)


def build_creation(change: AccessChange, fleet: str) -> list[dict[str, Any]]:
    """Return the plugin's commands for a client that it does not have; they fail for any other.

    The plugin writes its whole file after each command, which takes most of a second for 5,000 devices.
    """
    roles = [{"rolename": name} for name in _role_names(change)]
    client = {"command": "createClient", "username": change.client, "roles": roles}
    if change.access == "removed":
        return build_commands(change, fleet)
    if change.access in _OWN_ROLES:
        return [{"command": "createRole", **_OWN_ROLES[change.access](fleet, change)}, client]
    return [client]


def build_commands(change: AccessChange, fleet: str) -> list[dict[str, Any]]:
    """Return the plugin's commands for a change, whatever the client had before; some fail if nothing is to be done."""
    client, own = change.client, _own_role_name(change)
    roles = [{"rolename": name} for name in _role_names(change)]
    if change.access == "removed":
        return [{"command": "deleteClient", "username": client}, {"command": "deleteRole", "rolename": own}]
    commands: list[dict[str, Any]] = [
        {"command": "createClient", "username": client, "roles": roles},
        {"command": "modifyClient", "username": client, "roles": roles},
        {"command": "disableClient" if change.access == "none" else "enableClient", "username": client},
    ]
    if change.access in _OWN_ROLES:
        role = _OWN_ROLES[change.access](fleet, change)
        return [{"command": "createRole", **role}, {"command": "modifyRole", **role}, *commands]
    # Last: Mosquitto 2.0 leaves a deleted role in its client's list, and crashes when it reads that list.
    return [*commands, {"command": "deleteRole", "rolename": own}]


def _device_role(fleet: str, change: AccessChange) -> dict[str, Any]:
    base = f"{ROOT}/{fleet}/{change.client}"
    send: list[str] = []
    for kind in KINDS.values():
        if kind.to_device:
            continue
        # A broker has no limit of the topics that a client retains: each task that it may name is one.
        tasks = [*change.tasks, *([DEVICE_ALERTS] if kind.name == "alerts" else [])] if change.tasks else ["+"]
        send += [f"{base}/{kind.name}/{task}" for task in tasks] if kind.per_task else [f"{base}/{kind.name}"]
    receive = [f"{base}/{kind.name}" for kind in KINDS.values() if kind.to_device]
    return _role(_own_role_name(change), send=send, receive=receive)


def _joining_role(fleet: str, change: AccessChange) -> dict[str, Any]:
    """Return the role of an invitation's account: it asks for its enrolment and hears the answer, and nothing else."""
    request, answer = (invitation.build_topic(fleet, change.client, kind) for kind in ("request", "answer"))
    return _role(_own_role_name(change), send=[request], receive=[answer])


# Roles of one client, which name its topics.
_OWN_ROLES: dict[str, Callable[[str, AccessChange], dict[str, Any]]] = {
    "device": _device_role,
    "joining": _joining_role,
}


def _viewer_role(fleet: str) -> dict[str, Any]:
    """Return the role of a viewer: what devices send and what the collector answers, without commands to devices.

    Programs that subscribe to everything may, and receive no more.
    """
    role = _role("viewer", receive=[fleet_tree(fleet)])
    orders = [f"{ROOT}/{fleet}/+/{topic}" for topic in ("cmd", "desired", "desired/+")]
    role["acls"] += [
        {"acltype": kind, "topic": topic, "priority": 1, "allow": False}
        for kind in ("publishClientReceive", "subscribePattern")
        for topic in orders
    ]
    for action in ("subscribeLiteral", "unsubscribeLiteral"):
        role["acls"].append({"acltype": action, "topic": "#", "allow": True})
    return role


def _admin_role() -> dict[str, Any]:
    control = [f"{CONTROL_TOPIC}/#"]
    return _role(ADMIN, send=control, receive=control)


def _homeassistant_roles(fleet: str) -> list[dict[str, Any]]:
    """Return the role of the bridge, which publishes for Home Assistant, and that of Home Assistant itself."""
    place = Place(fleet, "+", DEFAULT_PREFIX)
    birth, published = [place.birth_topic], [*place.retained_filters, place.status_topic, place.event_topic("+")]
    return [
        _role("bridge", send=published, receive=[*place.retained_filters, *birth, *place.press_filters]),
        # It subscribes to all that may announce something, and receives what this bridge announces.
        _role(
            # Only Home Assistant presses the buttons: what they publish becomes a verdict.
            "homeassistant",
            send=[*birth, *place.press_filters],
            receive=[*published, *birth],
            share=[f"{DEFAULT_PREFIX}/#", place.all_topics],
        ),
    ]


def _role_names(change: AccessChange) -> list[str]:
    if change.access == "device":
        return ["device", _own_role_name(change)]
    if change.access == "joining":
        return [_own_role_name(change)]
    return [] if change.access == "none" else [change.access]


def _own_role_name(change: AccessChange) -> str:
    """Return a name that changes with the tasks, so that a device whose role names others is found."""
    name = f"device-{change.client}"
    return f"{name}/{hashlib.sha256(' '.join(change.tasks).encode()).hexdigest()[:16]}" if change.tasks else name


def _client(name: str, roles: list[str]) -> dict[str, Any]:
    return {"username": name, "roles": [{"rolename": role} for role in roles]}


def _role(
    name: str, *, send: Iterable[str] = (), receive: Iterable[str] = (), share: Iterable[str] = ()
) -> dict[str, Any]:
    """Return a role that may subscribe to what it may receive, and to the shared subscriptions `share`."""
    subscriptions = [*receive, *share]
    topics = {
        "publishClientSend": send,
        "publishClientReceive": receive,
        "subscribePattern": subscriptions,
        "unsubscribePattern": subscriptions,
    }
    acls = [{"acltype": kind, "topic": topic, "allow": True} for kind, filters in topics.items() for topic in filters]
    return {"rolename": name, "acls": acls}
