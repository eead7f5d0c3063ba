"""A fake Kubernetes API over HTTP, with the behaviour that a launcher depends on.

resourceVersions, paged lists, selectors, watches with timeouts, bookmarks and 410, both kinds of
409, 403, 400 and 422 from the published schemas, dry runs, merge patches, logs that follow and
replay, and faults on demand. Tests drive the pods: there is no scheduler and no kubelet.

`objects` stores objects, `requests` answers requests, `actors` acts as controllers and kubelets,
`server` is the HTTP server.
"""

from fake_api.objects import Refusal
from fake_api.server import FakeApi

__all__ = ["FakeApi", "Refusal"]
