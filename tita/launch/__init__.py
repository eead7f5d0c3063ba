"""Submitting jobs and watching them, on a cluster or on this machine.

`kubeconfig` and `cluster` reach the API. `template` and `submit` create the Job of a run,
`preflight` and `doctor` check it first. `watch` reads objects and logs, `run_state`, `reasons`
and `outcome` interpret them, `follow` drives a `display`. `local` runs a job without a cluster.

Nothing is imported here: each command loads only the modules that it needs.
"""
