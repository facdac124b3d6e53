"""A function of step.py as torch.compile runs it, for counting: what the backward finds is what the compiler keeps.

Nothing is compiled: the graphs of forward and backward are split as the compiler splits them, and run operation by
operation. Elementwise results that only elementwise operations and sums read get no storage, as fused kernels do it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch._functorch.aot_autograd import aot_function
from torch._functorch.partitioners import get_default_op_list, min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch.utils._pytree import tree_flatten, tree_unflatten

if TYPE_CHECKING:
    from surgery.compiler.storages import Storages


def fused(function: Callable[..., Any], storages: Storages) -> Callable[..., Any]:
    """`function`, traced once for each kind of arguments; it is called as before."""
    traced: dict[tuple[Any, ...], Callable[..., Any]] = {}

    def run(*given: Any) -> Any:
        leaves, structure = tree_flatten(given)
        places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        tensors = [leaves[place] for place in places]
        others = tuple(leaf for leaf in leaves if not isinstance(leaf, Tensor))
        kinds = ((tensor.shape, tensor.dtype, tensor.requires_grad) for tensor in tensors)
        key = (structure, others, torch.is_grad_enabled(), *kinds)
        if key not in traced:

            def flat(*values: Tensor) -> Any:
                filled = list(leaves)
                for place, value in zip(places, values, strict=True):
                    filled[place] = value
                return function(*tree_unflatten(filled, structure))

            traced[key] = _traced(flat, storages)
            storages.counts = False  # until the graph runs, which its tracing does not
        with torch._functorch.config.patch(ban_recompute_materialized_backward=False):  # as step.py has it
            return traced[key](*tensors)

    return run


def _traced(function: Callable[..., Any], storages: Storages) -> Callable[..., Any]:
    def compiler(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[[list[Any]], Any]:
        def run(values: list[Any]) -> Any:
            storages.counts = True
            return _Run(gm, storages).boxed_run(values)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    made: Callable[..., Any] = aot_function(
        function, compiler, compiler, partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )  # fmt: skip
    return made


class _Run(fx.Interpreter):
    """Runs a graph, freeing each value after its last use, and does not count what a fused kernel does not store."""

    def __init__(self, module: fx.GraphModule, storages: Storages) -> None:
        super().__init__(module)
        self.storages = storages
        kinds = get_default_op_list()

        def stored(node: fx.Node) -> bool:
            """Whether anything reads a node, or a view of it, that is no part of an elementwise kernel."""
            return any(
                stored(user) if kinds.is_view(user) else user.op == "output" or not kinds.is_fusible(user)
                for user in node.users
            )

        self.fused = {node for node in module.graph.nodes if kinds.is_fusible(node) and not stored(node)}

    def run_node(self, n: fx.Node) -> Any:
        """As always, but a fused node is not counted."""
        before, self.storages.counts = self.storages.counts, self.storages.counts and n not in self.fused
        try:
            return super().run_node(n)
        finally:
            self.storages.counts = before
