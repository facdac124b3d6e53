"""A plan's methods put into a model: single modules replaced by adapted ones, their tensors beside the weights."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

from torch import Tensor, fx, nn

from surgery.compiler import p6_rewrite, p7_lower
from surgery.compiler.algebra.instance import instance
from surgery.compiler.diagnostics import fail
from surgery.compiler.graph import TRAINING, called_modules, put
from surgery.compiler.plan import Plan, Site
from surgery.runtime.correct import corrected, corrected_sites
from surgery.runtime.owners import (
    Lowered,
    changed_output,
    computed_parameter,
    lower_output,
    lower_parameter,
)
from surgery.runtime.quantize import QuantizedLinear

SHARED = "surgery_shared"  # the module on the root that holds tensors of several sites
# What others read of a module beside its weight and bias.
SIZES = (
    "in_features", "out_features", "nf", "nx", "num_embeddings", "embedding_dim", "padding_idx", "in_channels",
    "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "normalized_shape", "eps",
    "variance_epsilon",
)  # fmt: skip


class Adapted(nn.Module):
    """One adapted module: its own weight and bias, the method's tensors beside them, and the lowered computation.

    The computation is a graph without state, so that copying, saving and compiling see plain parameters only. `shared`
    says where tensors of several sites are. A method's tensor may have any name, so the module's own are private.
    """

    def __init__(
        self,
        original: nn.Module,
        lowered: fx.GraphModule,
        names: tuple[str, ...],
        shared: dict[str, tuple[nn.Module, str]],
    ) -> None:
        super().__init__()
        self.weight = original.weight
        self.__sizes = f"weight={tuple(original.get_parameter('weight').shape)}"
        self.bias = getattr(original, "bias", None)
        if isinstance(original, QuantizedLinear):
            self.weight_scale = original.weight_scale
        for name in SIZES:
            if hasattr(original, name) and name not in names:
                setattr(self, name, getattr(original, name))
        for name, buffer in original.named_buffers(recurse=False):
            self.register_buffer(name, buffer, persistent=name not in original._non_persistent_buffers_set)
        self.train(original.training)
        self.__names, self.__shared = names, shared
        object.__setattr__(self, "_Adapted__lowered", lowered)  # no submodule: it has nothing to save or to train

    def forward(self, x: Tensor) -> Tensor:
        """The adapted output `[..., out]` for x `[..., in]`."""
        values = [self.__value(name) for name in self.__names]
        result: Tensor = self.__lowered(x, self.training, *values)  # type: ignore[operator]
        return result

    def __value(self, name: str) -> Any:
        if name in self.__shared:
            holder, attribute = self.__shared[name]
            return attrgetter(attribute)(holder)
        return attrgetter(name)(self)

    def place(self, name: str) -> tuple[nn.Module, str]:
        """Where the tensor of a name is: the module and its name there."""
        return self.__shared.get(name, (self, name))

    def extra_repr(self) -> str:
        """Sizes and tensor names, for `print(model)`."""
        return f"{self.__sizes}, {', '.join(name for name in self.__names if name not in ('weight', 'bias'))}"


def attach(plan: Plan, model: nn.Module, values: dict[str, Tensor]) -> nn.Module:
    """Put a plan's tensors and computations into a model in place; every replacement is built first, so all or none."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is not None:
                owners.setdefault(id(child), []).append((parent, name))
    holder = nn.Module()
    known: dict[tuple[object, ...], Lowered] = {}  # sites that compute alike share one graph: it has no state
    replacements, own = [], own_weights(plan)
    changes: list[Callable[[], None]] = []
    for site in plan.sites:
        if site.module_class in ("Experts", "Parameter", "Module"):
            changes.append(_changed(plan, site, model, values, holder))
            continue
        first: Adapted | None = None
        for module in _modules_of(model, site):
            key: tuple[object, ...] = (type(module), repr(module), site.formula, site.strategy, site.dtype, site.bias)
            key += tuple(values[tensor.key].dtype for tensor in site.tensors)
            if key not in known:
                known[key] = _lowered(plan, site, module, values)
            replacement = _adapted(site, module, known[key], values, holder, first)
            if site in own:  # the module's own from here on: the model's weight may be used elsewhere
                weight = _own_weight(plan, site, module.get_parameter("weight"), values)
                replacement.weight = first.weight if first else nn.Parameter(weight, requires_grad=False)
            replacements.append((module, replacement))
            first = first or replacement
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    named = dict(model.named_parameters(remove_duplicate=False))
    for whole in plan.trained:
        named[whole.name].requires_grad_(True)
    for original, replacement in replacements:
        for parent, name in owners[id(original)]:
            setattr(parent, name, replacement)
    for change in changes:
        change()
    if holder._parameters or holder._buffers:
        model.add_module(SHARED, holder)
    return model


def own_weights(plan: Plan) -> list[Site]:
    """The sites whose W becomes another than the model's, for this use of it alone: corrected, or untied and moved."""
    moved = [site for site in plan.sites if site.untied and instance(plan, site.formula).moves_base]
    return [*corrected_sites(plan), *moved]


def _own_weight(plan: Plan, site: Site, stored: Tensor, values: dict[str, Tensor]) -> Tensor:
    if instance(plan, site.formula).corrections:
        return corrected(plan, site, stored, values)
    return stored.detach().clone()


def _modules_of(model: nn.Module, site: Site) -> list[nn.Module]:
    """The modules that use a site's weight, its own first: more than one where a rule says `tie`."""
    module = model.get_submodule(site.path)
    if site.untied:
        return [module]
    weight = module.get_parameter("weight")
    return [
        module,
        *(other for other in model.modules() if other is not module and other._parameters.get("weight") is weight),
    ]


def _adapted(
    site: Site, module: nn.Module, lowered: Lowered, values: dict[str, Tensor], holder: nn.Module, first: Adapted | None
) -> Adapted:
    """The replacement of a module; one that is tied to the `first` reads the tensors there."""
    shared: dict[str, tuple[nn.Module, str]] = {}
    adapted = Adapted(module, *lowered, shared)
    if first is None:
        shared |= {name: place for name, place in _placed(site, adapted, values, holder).items() if place[0] is holder}
    else:
        shared |= {tensor.name: first.place(tensor.name) for tensor in site.tensors}
    return adapted


def _placed(
    site: Site, home: nn.Module, values: dict[str, Tensor], holder: nn.Module
) -> dict[str, tuple[nn.Module, str]]:
    """Register a site's tensors below `home`, or on the root those of several sites; where each of them is, by name."""
    places: dict[str, tuple[nn.Module, str]] = {}
    for tensor in site.tensors:
        value = values[tensor.key]
        owner, name = home, tensor.name
        if tensor.key.startswith("shared."):
            owner, name = holder, tensor.key.replace(".", "_")
        if owner is home or not hasattr(owner, name):
            put(owner, name, nn.Parameter(value) if tensor.role == "train" else value)
        places[tensor.name] = (owner, name)
    return places


def _changed(
    plan: Plan, site: Site, model: nn.Module, values: dict[str, Tensor], holder: nn.Module
) -> Callable[[], None]:
    """What adapts a parameter of another class, or an output, when it is called."""
    if site.module_class == "Module":
        module, output = model.get_submodule(site.path), lower_output(plan, site, values)
        return lambda: changed_output(module, site.shape[0], output, _placed(site, module, values, holder))
    path, _, name = site.parameter.rpartition(".")
    owner, lowered = model.get_submodule(path), lower_parameter(plan, site, values)
    own = None
    if site in own_weights(plan):
        own = nn.Parameter(_own_weight(plan, site, owner.get_parameter(name), values), requires_grad=False)

    def change() -> None:
        if own is not None:
            owner.register_parameter(name, own)
        home = owner
        if site.path == site.parameter:
            home = nn.Module()
            owner.add_module(f"{name}_adapter", home)
        computed_parameter(owner, name, lowered, _placed(site, home, values, holder))

    return change


def _lowered(plan: Plan, site: Site, module: nn.Module, values: dict[str, Tensor]) -> Lowered:
    """The site's computation as a graph whose inputs are x, training, and then the tensors of the names given."""
    span = plan.span(site.place)
    try:
        traced = fx.symbolic_trace(module)
    except Exception as error:  # a forward may raise anything on proxies
        message = f"`{site.path}` cannot be replaced: the forward of {type(module).__name__} has no graph of its own"
        raise fail("SURG060", message, span, help="use surgery.compile, which captures the whole model") from error
    first, *more = [node for node in traced.graph.nodes if node.op == "placeholder"]
    if more:
        message = f"`{site.path}` cannot be replaced: the forward of {type(module).__name__} takes more than x"
        raise fail("SURG060", message, span, help="use surgery.compile, which captures the whole model")
    with traced.graph.inserting_after(first):
        traced.graph.placeholder(TRAINING)
    local = {tensor.name: values[tensor.key] for tensor in site.tensors}
    alone = site.model_copy(
        update={
            "path": "site", "parameter": "weight",
            "tensors": tuple(tensor.model_copy(update={"key": tensor.name}) for tensor in site.tensors),
        }
    )  # fmt: skip
    single = plan.model_copy(update={"sites": (alone,)})
    lowered = p7_lower.lower_module(p6_rewrite.rewrite_module(traced, single, local))
    graph = lowered.graph
    reads = [node for node in graph.nodes if node.op == "get_attr"]
    names = tuple(dict.fromkeys(str(node.target) for node in reads))
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    inputs = {}
    for name in reversed(names):
        with graph.inserting_after(last):
            inputs[name] = graph.placeholder(f"{name.replace('.', '_')}_")
        inputs[name].target = inputs[name].name  # fx names the nodes of B and of b alike: arguments are called as nodes
    for node in reads:
        node.replace_all_uses_with(inputs[str(node.target)])
        graph.erase_node(node)
    return fx.GraphModule({**called_modules(lowered)}, graph, "Lowered"), names
