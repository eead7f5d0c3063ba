"""How many nodes, and how many GPUs on each: arithmetic on what the user asked for."""

from dataclasses import dataclass

from tita.errors import TitaError
from tita.terminal import counted


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The gang of one run; `gpus_per_node` is 0 for a job that needs none."""

    nodes: int
    gpus_per_node: int

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def procs_per_node(self) -> int:
        """Worker processes of one node: one a GPU, and one where there is none."""
        return max(1, self.gpus_per_node)


def shape_of(template: Shape, *, gpus: int | None = None, nodes: int | None = None) -> Shape:
    """The template's shape with the user's wishes laid over it.

    Args:
        template: nodes and GPUs per node as the job has them by itself.
        gpus: GPUs in total. Without `nodes` as few nodes as hold them, each with at most the
            template's GPUs per node.
        nodes: nodes; without `gpus` each has the template's GPUs.

    Raises:
        TitaError: GPUs that do not divide; the two nearest numbers that do are named.
    """
    per_node = template.gpus_per_node
    if gpus is None:
        return Shape(nodes=nodes or template.nodes, gpus_per_node=per_node)
    if gpus == 0:
        return Shape(nodes=nodes or template.nodes, gpus_per_node=0)
    if per_node == 0:
        raise TitaError("this job uses no GPUs", where=f"--gpus {gpus}", remedy="leave it out")
    if nodes is not None:
        return Shape(nodes=nodes, gpus_per_node=_divide(gpus, nodes, what=counted(nodes, "node")))
    if gpus <= per_node:
        return Shape(nodes=1, gpus_per_node=gpus)
    nodes = _divide(gpus, per_node, what=f"nodes of {counted(per_node, 'GPU')}")
    return Shape(nodes=nodes, gpus_per_node=per_node)


def _divide(gpus: int, by: int, *, what: str) -> int:
    if gpus % by:
        below, above = gpus // by * by, -(-gpus // by) * by
        nearest = f"{below} or {above}" if below else f"{above}"
        raise TitaError(
            f"does not divide over {what}", where=f"--gpus {gpus}", remedy=f"ask for {nearest}"
        )
    return gpus // by
