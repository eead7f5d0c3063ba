"""Submitting jobs and watching them, on a cluster or on this machine.

`local` runs a job here. For a cluster: `cluster` speaks to its API, `overlay` makes a Job of the
chart's template, `preflight` looks before it leaps, `feed` and `tail` keep watches and logs alive,
`explain` says what it all means, `views` shows it.

Nothing is imported here: the CLI must start quickly, and takes each module when it needs it.
"""
