"""Commands that messages recommend, with the options that select the user's cluster.

A user copies a recommended command. Without `-n`, `--context` and `--release` it would act on
another run of the same name.
"""

import shlex
from dataclasses import dataclass

_TAKES_RELEASE = ("launch", "doctor", "promote")


@dataclass(frozen=True, kw_only=True)
class CommandScope:
    """The options that this command was given; None where the default applies."""

    context: str | None = None
    namespace: str | None = None
    release: str | None = None

    def tita(self, command: str, *arguments: str) -> str:
        """`tita COMMAND ARGUMENTS` for the same cluster, quoted for a shell."""
        options = self._options()
        if self.release and command in _TAKES_RELEASE and "--release" not in arguments:
            options += ["--release", self.release]
        return shlex.join(["tita", *command.split(), *arguments, *options])

    def kubectl(self, *arguments: str) -> str:
        """`kubectl ARGUMENTS` for the same cluster, quoted for a shell."""
        return shlex.join(["kubectl", *self._options(), *arguments])

    def fill(self, text: str) -> str:
        """`text` with `{kubectl}` and `{doctor}` replaced by these commands."""
        return text.replace("{kubectl}", self.kubectl()).replace("{doctor}", self.tita("doctor"))

    def _options(self) -> list[str]:
        options = []
        if self.namespace:
            options += ["-n", self.namespace]
        if self.context:
            options += ["--context", self.context]
        return options
