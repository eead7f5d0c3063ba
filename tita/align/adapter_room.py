"""Which requests may start: their LoRA adapters must fit into memory beside those in use."""

from collections.abc import Collection, Hashable, Iterable, Mapping

from tita.align.forms import BASE
from tita.align.prefill import PendingPrefill
from tita.align.prompts import PreparedRequest
from tita.errors import TitaError
from tita.vlm.adapters import AdapterPool
from tita.vlm.loading import Models


class AdapterRoom:
    """The bound on the adapters of a batch: all of them are in memory in every decode step."""

    def __init__(self, models: Models, *, per_request: int | None = None) -> None:
        """Args:
        models: among which the adapters are.
        per_request: maximum number of adapters of one model per request, if the engine has one.
        """
        self._per_request = per_request
        self._pools: dict[str, AdapterPool] = {
            role: vlm.adapters
            for role, vlm in models.by_role().items()
            if vlm.adapters is not None and vlm.adapter is not None
        }
        """By role of an adapter."""

    def without_extras(self, sources: Collection[str], prepared: PreparedRequest) -> list[str]:
        """The sources that a request runs.

        Adapters that steer nothing, whose log-probabilities are only reported (`explain`), are left
        out if they do not fit.

        Args:
            sources: that it would run.
            prepared: the request.
        """
        roles = self._roles(sources)
        too_many = self._per_request is not None and len(roles) > self._per_request
        if prepared.request.score or (self._fit(roles) and not too_many):
            return [*sources]
        pairs = [(each.source, each.against) for each in prepared.terms]
        needed = {BASE.name} | {each.name for pair in pairs for each in pair if each is not None}
        return [each for each in sources if each in needed or not self._roles([each])]

    def check(self, sources: Iterable[str], *, what: str = "the request") -> None:
        """Check that a request can be answered when it is alone.

        Args:
            sources: that it uses.
            what: for the message.

        Raises:
            TitaError: there are more adapters of one model than may be in memory, or than the
                engine permits.
        """
        roles = self._roles(sources)
        if self._per_request is not None and len(roles) > self._per_request:
            raise TitaError(
                f"{what} uses {len(roles)} adapters, and the engine has {self._per_request} per "
                "request",
                remedy="give a weight to one of them, merge the others, or choose --engine "
                "transformers",
            )
        if not self._fit(roles):
            raise TitaError(
                f"{what} uses {len(roles)} adapters, more than may be in memory",
                remedy="give fewer weights, or raise --max-adapters",
            )

    def startable(
        self, pending: Mapping[Hashable, PendingPrefill], running: Iterable[PreparedRequest]
    ) -> Mapping[Hashable, PendingPrefill]:
        """The pending requests whose adapters fit beside those of the others.

        A request that waits for a place gets the next one: later ones do not overtake it, even if
        their adapters are in memory.

        Args:
            pending: in order of arrival.
            running: the requests that run, or are parked.
        """
        if not self._pools:
            return pending
        begun = {
            key
            for key, each in pending.items()
            if any(prefill.cache for prefill in each.prefills.values())
        }
        used = set[str]()
        for prepared in (*running, *(pending[key].sequence.prepared for key in begun)):
            used |= self._roles(prepared.inputs)
        found, waits = dict[Hashable, PendingPrefill](), False
        for key, each in pending.items():
            roles = self._roles(each.sequence.prepared.inputs)
            if key in begun or not roles or (not waits and self._fit(used | roles)):
                found[key] = each
            else:
                waits = True
        return found

    def _roles(self, sources: Iterable[str]) -> set[str]:
        """The roles of the adapters among these sources."""
        return {source.partition("/")[0] for source in sources} & self._pools.keys()

    def _fit(self, roles: set[str]) -> bool:
        pools = [self._pools[role] for role in roles]
        return all(pools.count(pool) <= pool.capacity for pool in pools)
