"""Test cases of values, and functions that look up rendered objects."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

Object = dict[str, Any]
Objects = list[Object]


class Case(NamedTuple):
    """`holds` is true of the rendered objects if the value is set, and false otherwise.

    `given` are other values that the case needs. Cases with the same `given` are rendered together,
    except cases marked `alone`, which affect the objects that other cases inspect.
    """

    value: Any
    holds: Callable[[Objects], Any]
    given: Mapping[str, Any] = {}
    alone: bool = False


def one(objects: Objects, kind: str, name: str) -> Object:
    return next(o for o in objects if o["kind"] == kind and o["metadata"]["name"] == name)


def job(objects: Objects, name: str = "train-dpo") -> Object:
    return one(objects, "CronJob", f"tita-{name}")


def jobspec(objects: Objects, name: str = "train-dpo") -> Object:
    spec: Object = job(objects, name)["spec"]["jobTemplate"]["spec"]
    return spec


def worker(objects: Objects, name: str = "train-dpo") -> Object:
    spec: Object = jobspec(objects, name)["template"]["spec"]
    return spec


def server(objects: Objects) -> Object:
    spec: Object = one(objects, "Deployment", "tita-inference")["spec"]["template"]["spec"]
    return spec


def env(pod: Object) -> Object:
    entries = pod["containers"][0]["env"]
    return {e["name"]: e.get("value", e.get("valueFrom")) for e in entries}


def key_of(pod: Object, name: str) -> tuple[str, str]:
    reference = env(pod)[name]["secretKeyRef"]
    return reference["name"], reference["key"]


def volume(pod: Object, name: str) -> Object:
    return next(v for v in pod["volumes"] if v["name"] == name)


def kinds(objects: Objects) -> set[str]:
    return {o["kind"] for o in objects}


def deployment(objects: Objects) -> Object:
    return one(objects, "Deployment", "tita-inference")


def claim_size(objects: Objects, name: str) -> Any:
    spec = one(objects, "PersistentVolumeClaim", name)["spec"]
    return spec["resources"]["requests"]["storage"]


SERVING = {"inference.enabled": True}
