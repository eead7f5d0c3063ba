"""Commands that messages recommend, with the options that select the user's cluster and store.

A user copies a recommended command. Without `-n`, `--context`, `--release` and `--store` it would
act on another run of the same name.
"""

import re
import shlex
from dataclasses import dataclass, replace

from tita.storage.locate import store_command

_TAKES_RELEASE = ("launch", "doctor", "promote")
_OF_THE_STORE = ("runs", "reports", "data")
"""Groups of commands that act on a store only."""


@dataclass(frozen=True, kw_only=True)
class CommandScope:
    """The options that this command was given; None where the default applies."""

    context: str | None = None
    namespace: str | None = None
    release: str | None = None
    store: str | None = None
    """The store that the message is about."""

    def on_store(self, uri: str) -> "CommandScope":
        """The same for a message about a run whose store is `uri`; empty if it is not known."""
        return replace(self, store=uri or None)

    def tita(self, command: str, *arguments: str) -> str:
        """`tita COMMAND ARGUMENTS` for the same cluster or store, quoted for a shell."""
        group = command.split()[0]
        if group in _OF_THE_STORE and self.store:
            return store_command(command, *arguments, store=self.store)
        options = [] if group in _OF_THE_STORE else self._options()
        if self.release and group in _TAKES_RELEASE and "--release" not in arguments:
            options += ["--release", self.release]
        if self.store and group == "promote":
            options += ["--store", self.store]
        return shlex.join(["tita", *command.split(), *arguments, *options])

    def kubectl(self, *arguments: str) -> str:
        """`kubectl ARGUMENTS` for the same cluster, quoted for a shell."""
        return shlex.join(["kubectl", *self._options(), *arguments])

    def helm(self, *arguments: str) -> str:
        """`helm ARGUMENTS` for the same cluster, quoted for a shell."""
        return shlex.join(["helm", *self._options("--kube-context"), *arguments])

    def fill(self, text: str) -> str:
        """`text` with `{kubectl}`, `{helm}`, and `{tita doctor}` or the like as these commands."""
        text = text.replace("{kubectl}", self.kubectl()).replace("{helm}", self.helm())
        return re.sub(r"\{tita ([^{}]+)\}", lambda found: self.tita(found[1]), text)

    def _options(self, context: str = "--context") -> list[str]:
        options = []
        if self.namespace:
            options += ["-n", self.namespace]
        if self.context:
            options += [context, self.context]
        return options
