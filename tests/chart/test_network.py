"""NetworkPolicies allow exactly the intended connections."""

from types import SimpleNamespace
from typing import Any

Objects = list[dict[str, Any]]

STORE = {"to": [{"ipBlock": {"cidr": "10.1.0.0/16"}}], "ports": [{"port": 443}]}
DNS = {53, "UDP"}, {53, "TCP"}


def labels_of(chart: SimpleNamespace, objects: Objects, component: str) -> dict[str, str]:
    """Return the labels of the pods of a component."""
    found = [pod["metadata"]["labels"] for _, pod in chart.pod_templates(objects)]
    return next(x for x in found if x["app.kubernetes.io/component"] == component)


def policies(objects: Objects, labels: dict[str, str], direction: str) -> Objects:
    """Return the specs of policies that select the pod and apply to the direction."""
    every = [o["spec"] for o in objects if o["kind"] == "NetworkPolicy"]
    return [
        spec
        for spec in every
        if spec["podSelector"]["matchLabels"].items() <= labels.items()
        and direction in spec["policyTypes"]
    ]


def is_allowed(
    objects: Objects, pod: dict[str, str], peer: dict[str, str] | str, port: str
) -> bool:
    """Whether ingress to `pod` on `port` is allowed.

    Args:
        peer: labels of a pod of the release, or the name of another namespace.
    """

    def matches(source: dict[str, Any]) -> bool:
        if isinstance(peer, str):
            (expression,) = source.get("namespaceSelector", {}).get("matchExpressions", [{}])
            return peer in expression.get("values", [])
        selector = source.get("podSelector", {}).get("matchLabels")
        return selector is not None and selector.items() <= peer.items()

    selecting = policies(objects, pod, "Ingress")
    return not selecting or any(
        any(matches(source) for source in rule["from"])
        and ("ports" not in rule or {"port": port} in rule["ports"])
        for spec in selecting
        for rule in spec.get("ingress", [])
    )


def test_workers_accept_connections_from_workers_only(chart: SimpleNamespace) -> None:
    objects = chart.render(files=("full",))
    job = labels_of(chart, objects, "job")
    assert is_allowed(objects, job, job, "rendezvous")
    assert is_allowed(objects, job, job, "any other port, which gloo and NCCL choose")
    for component in ("inference", "test"):
        assert not is_allowed(objects, job, labels_of(chart, objects, component), "rendezvous")
    assert not is_allowed(objects, job, "ingress-nginx", "rendezvous")


def test_inference_accepts_the_release_and_listed_namespaces(
    chart: SimpleNamespace,
) -> None:
    objects = chart.render(files=("full",))
    server = labels_of(chart, objects, "inference")
    for component in ("job", "test"):
        assert is_allowed(objects, server, labels_of(chart, objects, component), "http")
    for namespace, may in (("ingress-nginx", True), ("monitoring", True), ("default", False)):
        assert is_allowed(objects, server, namespace, "http") is may
    assert not is_allowed(objects, server, {"app": "another pod here"}, "http")
    assert not is_allowed(objects, server, labels_of(chart, objects, "job"), "another")


def test_internal_ports_of_the_embedded_store_are_always_closed(
    chart: SimpleNamespace,
) -> None:
    objects = chart.render({"networkPolicy.enabled": False}, files=("trial",))
    store = labels_of(chart, objects, "s3")
    for component in ("job", "inference", "test"):
        peer = labels_of(chart, objects, component)
        assert is_allowed(objects, store, peer, "s3")
        assert not is_allowed(objects, store, peer, "master")
    assert not is_allowed(objects, store, "default", "s3")


def test_egress_is_open_without_rules(chart: SimpleNamespace) -> None:
    objects = chart.render(files=("full",))
    assert not policies(objects, labels_of(chart, objects, "job"), "Egress")
    without = {"networkPolicy.enabled": False, "networkPolicy.egress": [STORE]}
    objects = chart.render(without, files=("full",))
    assert not policies(objects, labels_of(chart, objects, "job"), "Egress")


def test_egress_rules_keep_dns_and_the_release_reachable(chart: SimpleNamespace) -> None:
    objects = chart.render({"networkPolicy.egress": [STORE]}, files=("trial",))
    for component in ("job", "inference", "test", "s3"):
        labels = labels_of(chart, objects, component)
        (spec,) = policies(objects, labels, "Egress")
        names, each_other, store = spec["egress"]
        assert "to" not in names, "DNS resolvers also run on nodes"
        assert [{port["port"], port["protocol"]} for port in names["ports"]] == list(DNS)
        (peer,) = each_other["to"]
        assert peer["podSelector"]["matchLabels"].items() <= labels.items()
        assert store == STORE
