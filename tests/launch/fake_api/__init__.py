"""A Kubernetes API over HTTP that behaves like the real one where a launcher leans on it.

resourceVersions, lists in pages, selectors, watches that time out, bookmark and answer 410, both
kinds of 409, 403, 400 and 422 from the published schemas, dry runs, merge patches, logs that follow
and replay; and faults on demand. Pods do what a test says: there is no scheduler and no kubelet.

`objects` is what it holds, `requests` how it answers, `actors` what controllers and kubelets would
do to its objects, `server` the wire.
"""

from fake_api.objects import Refusal
from fake_api.server import FakeApi

__all__ = ["FakeApi", "Refusal"]
