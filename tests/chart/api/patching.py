"""Patching of objects, and immutable fields."""

import copy
from typing import Any

_MERGE_KEYS = ("name", "mountPath", "containerPort", "port", "topologyKey")


def immutable(object_: dict[str, Any]) -> Any:
    """Return the fields that the real API server does not allow to change."""
    spec = object_.get("spec", {})
    match object_["kind"]:
        case "Deployment":
            return spec["selector"]
        case "StatefulSet":
            changeable = ("replicas", "template", "updateStrategy", "minReadySeconds")
            return {k: v for k, v in spec.items() if k not in changeable}
        case "PersistentVolumeClaim":
            return {k: v for k, v in spec.items() if k != "resources"}
        case "Job":
            return spec["template"], spec["completions"]
        case "Pod":
            return spec
        case "Service":
            return spec.get("clusterIP")
        case "RoleBinding" | "ClusterRoleBinding":
            return object_["roleRef"]
    return None


def merge(old: Any, patch: Any, *, strategic: bool) -> Any:
    """Apply a merge patch: null deletes a key; a strategic patch merges lists by merge key."""
    if isinstance(old, dict) and isinstance(patch, dict):
        merged = dict(old)
        for key, value in patch.items():
            if key.startswith("$setElementOrder") or key == "$retainKeys":
                continue
            if value is None:
                merged.pop(key, None)
            else:
                merged[key] = merge(merged.get(key), value, strategic=strategic)
        return merged
    if strategic and isinstance(old, list) and isinstance(patch, list):
        key = next(
            (k for k in _MERGE_KEYS if all(k in e for e in patch if isinstance(e, dict))), ""
        )
        if key and all(isinstance(e, dict) for e in old + patch):
            by_key = {e.get(key): e for e in old}
            for element in patch:
                if element.get("$patch") == "delete":
                    by_key.pop(element[key], None)
                else:
                    at = element[key]
                    by_key[at] = merge(by_key.get(at, {}), element, strategic=True)
            return list(by_key.values())
    return copy.deepcopy(patch)
