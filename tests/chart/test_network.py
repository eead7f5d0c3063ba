"""Who reaches whom, by NetworkPolicy: a pod that one selects is closed, but for what any allows."""

from types import SimpleNamespace
from typing import Any

Objects = list[dict[str, Any]]

STORE = {"to": [{"ipBlock": {"cidr": "10.1.0.0/16"}}], "ports": [{"port": 443}]}
DNS = {53, "UDP"}, {53, "TCP"}


def labels_of(chart: SimpleNamespace, objects: Objects, component: str) -> dict[str, str]:
    """The labels of the pods of one component."""
    found = [pod["metadata"]["labels"] for _, pod in chart.pod_templates(objects)]
    return next(x for x in found if x["app.kubernetes.io/component"] == component)


def policies(objects: Objects, labels: dict[str, str], direction: str) -> Objects:
    """Those that select the pod and speak of the direction."""
    every = [o["spec"] for o in objects if o["kind"] == "NetworkPolicy"]
    return [
        spec
        for spec in every
        if spec["podSelector"]["matchLabels"].items() <= labels.items()
        and direction in spec["policyTypes"]
    ]


def let_in(objects: Objects, pod: dict[str, str], peer: dict[str, str] | str, port: str) -> bool:
    """Whether a pod of the release (its labels) or of a namespace (its name) reaches a port."""

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


def test_jobs_are_reached_by_jobs_only(chart: SimpleNamespace) -> None:
    objects = chart.render(files=("full",))
    job = labels_of(chart, objects, "job")
    assert let_in(objects, job, job, "rendezvous")
    assert let_in(objects, job, job, "any other: gloo and NCCL choose theirs")
    for component in ("inference", "test"):
        assert not let_in(objects, job, labels_of(chart, objects, component), "rendezvous")
    assert not let_in(objects, job, "ingress-nginx", "rendezvous")


def test_inference_is_reached_by_the_release_and_the_namespaces_named(
    chart: SimpleNamespace,
) -> None:
    objects = chart.render(files=("full",))
    server = labels_of(chart, objects, "inference")
    for component in ("job", "test"):
        assert let_in(objects, server, labels_of(chart, objects, component), "http")
    for namespace, may in (("ingress-nginx", True), ("monitoring", True), ("default", False)):
        assert let_in(objects, server, namespace, "http") is may
    assert not let_in(objects, server, {"app": "another pod here"}, "http")
    assert not let_in(objects, server, labels_of(chart, objects, "job"), "another")


def test_the_embedded_stores_inner_ports_are_closed_without_being_asked(
    chart: SimpleNamespace,
) -> None:
    objects = chart.render({"networkPolicy.enabled": False}, files=("trial",))
    store = labels_of(chart, objects, "s3")
    for component in ("job", "inference", "test"):
        peer = labels_of(chart, objects, component)
        assert let_in(objects, store, peer, "s3")
        assert not let_in(objects, store, peer, "master")
    assert not let_in(objects, store, "default", "s3")


def test_egress_is_open_until_rules_are_given(chart: SimpleNamespace) -> None:
    objects = chart.render(files=("full",))
    assert not policies(objects, labels_of(chart, objects, "job"), "Egress")
    without = {"networkPolicy.enabled": False, "networkPolicy.egress": [STORE]}
    objects = chart.render(without, files=("full",))
    assert not policies(objects, labels_of(chart, objects, "job"), "Egress")


def test_egress_rules_leave_names_and_the_release_itself_in_reach(chart: SimpleNamespace) -> None:
    objects = chart.render({"networkPolicy.egress": [STORE]}, files=("trial",))
    for component in ("job", "inference", "test", "s3"):
        labels = labels_of(chart, objects, component)
        (spec,) = policies(objects, labels, "Egress")
        names, each_other, store = spec["egress"]
        assert "to" not in names, "resolvers run on nodes, too"
        assert [{port["port"], port["protocol"]} for port in names["ports"]] == list(DNS)
        (peer,) = each_other["to"]
        assert peer["podSelector"]["matchLabels"].items() <= labels.items()
        assert store == STORE
