"""What a run trains: whole parameters by `train` rules, and which `step` block moves what of it all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from surgery.compiler import nodes
from surgery.compiler.diagnostics import Diagnostics, Note, nearest
from surgery.compiler.pattern import ancestry
from surgery.compiler.plan import Site, StepPlan, WholeParameter
from surgery.compiler.program import Moving, Program, TrainRule
from surgery.compiler.select import Selection, listed, matched, select_parameters, within
from surgery.compiler.settings import place
from surgery.compiler.skeleton import Skeleton


@dataclass(frozen=True)
class Trained:
    """What a run trains; what no block moves is frozen at its site, and no whole parameter."""

    sites: tuple[Site, ...]
    whole: tuple[WholeParameter, ...]
    steps: tuple[StepPlan, ...]


def trained(
    program: Program, skeleton: Skeleton, claimed: Mapping[int, Selection], sites: Sequence[Site],
    diagnostics: Diagnostics,
) -> Trained:  # fmt: skip
    """The parameters that the program trains as they are, and what moves in each of its `step` blocks.

    `claimed` are the adapted parameters by their identities. SURG023 where a parameter is both, SURG020 where a line
    names nothing that moves, a block moves nothing, or no block what a rule trains; SURG004 where a block moves a
    shared tensor at some of its sites.
    """
    whole = _Whole(program, skeleton, claimed, diagnostics)
    by_rule = [(rule.node.pattern.span, set(whole.add(rule))) for rule in program.trained]
    if diagnostics.errors or not any(said.trained or said.frozen for said in program.moving):
        # sites that could not be made would be missing from what blocks name
        return Trained(tuple(sites), tuple(whole.found.values()), program.steps)
    before = len(diagnostics.errors)
    reader = _Blocks(sites, whole, dict(whole.names), skeleton, diagnostics)
    moved = [reader.moved(said) for said in program.moving]
    everything = dict.fromkeys([*reader.own.values(), *(entry.name for entry in whole.found.values())])
    run = [key for key in everything if any(key in keys for keys, _ in moved)]
    for number, rule in enumerate(program.rules):
        tensors = (tensor for site in sites if site.rule == number for tensor in site.tensors)
        by_rule.append((rule.node.pattern.span, {tensor.key for tensor in tensors if tensor.role == "train"}))
    for span, keys in by_rule if len(diagnostics.errors) == before else ():
        if keys and not keys & set(run):
            help_text = "leave it out of a `freeze`, or leave the rule out"
            if any(said.trained for said in program.moving):
                help_text = "a block with `train` moves what it names alone: name it there too, or leave the rule out"
            diagnostics.error("SURG020", "no `step` block moves what this rule trains", span, help=help_text)
    steps = [
        step.model_copy(update={"frozen": tuple(key for key in run if key not in keys), "rates": rates})
        for step, (keys, rates) in zip(program.steps, moved, strict=True)
    ]
    entries = (entry for entry in whole.found.values() if entry.name in run)
    return Trained(tuple(_frozen(sites, set(run))), tuple(entries), tuple(steps))


@dataclass
class _Whole:
    """The parameters of the model that are trained as they are, by identity: a tied one is there once."""

    program: Program
    skeleton: Skeleton
    claimed: Mapping[int, Selection]
    diagnostics: Diagnostics
    found: dict[int, WholeParameter] = field(default_factory=dict)

    @cached_property
    def frozen(self) -> set[int]:
        """Identities of what the program freezes: a tied parameter is frozen under all its names."""
        return {
            id(self.skeleton.parameters[name])
            for item in self.program.frozen
            for name in select_parameters(item.pattern, self.skeleton, self.diagnostics)
        }

    @property
    def names(self) -> dict[str, str]:
        """Every name of each of them, with the one that it is planned under."""
        return {name: entry.name for key, entry in self.found.items() for name in self.skeleton.owners[key]}

    def add(self, rule: TrainRule) -> list[str]:
        """Enter the parameters that a rule names; gives the names that they are planned under."""
        names, frozen = [], self.frozen
        for name in select_parameters(rule.node.pattern, self.skeleton, self.diagnostics):
            parameter = self.skeleton.parameters[name]
            if id(parameter) in self.claimed:
                other = Note("the rule that adapts it", self.claimed[id(parameter)].rule.node.pattern.span)
                message = f"`{name}` is adapted and trained whole"
                self.diagnostics.error("SURG023", message, rule.node.pattern.span, notes=[other])
            elif id(parameter) not in frozen:
                entry = WholeParameter(
                    name=name, shape=tuple(parameter.shape), dtype=str(parameter.dtype).removeprefix("torch."),
                    numbers=parameter.numel(), lr=rule.lr, weight_decay=rule.weight_decay, place=place(rule.node.span),
                )  # fmt: skip
                names.append(self.found.setdefault(id(parameter), entry).name)
        return names


Moved = tuple[set[str], dict[str, tuple[float | None, float | None]]]  # keys and names, and the rates of their own


@dataclass
class _Blocks:
    """Reads `train` and `freeze` of `step` blocks, over the model's paths and those of the sites' tensors in them."""

    sites: Sequence[Site]
    whole: _Whole
    planned: dict[str, str]  # whole parameters that all blocks may move: every name, with the planned one
    skeleton: Skeleton
    diagnostics: Diagnostics

    @cached_property
    def own(self) -> dict[str, str]:
        """The trained tensors of sites: `PATH.A`, with the tensor's key."""
        return {
            f"{site.path}.{tensor.name}": tensor.key
            for site in self.sites
            for tensor in site.tensors
            if tensor.role == "train"
        }

    @cached_property
    def aliases(self) -> dict[str, str]:
        """Every path that a line may name, with the real one."""
        names = {site.path: [tensor.name for tensor in site.tensors] for site in self.sites}
        known = self.skeleton.aliases
        return known | {f"{at}.{name}": f"{real}.{name}" for at, real in known.items() for name in names.get(real, ())}

    def moved(self, said: Moving) -> Moved:
        """What a block moves: all that is planned, or what its `train` lines name, without what it freezes."""
        before = len(self.diagnostics.errors)
        moves = {} if said.trained else self.own | {name: name for name in self.planned.values()}
        rates: dict[str, tuple[float | None, float | None]] = {}
        for rule in said.trained:
            named = self._trained(rule)
            moves |= named
            if rule.lr is not None or rule.weight_decay is not None:
                rates = dict.fromkeys(named.values(), (rule.lr, rule.weight_decay)) | rates
        for item in said.frozen:
            paths = matched(item.pattern, self.aliases, self.diagnostics)
            named = self._named(paths, [*self.own, *self.whole.names])
            if paths and not named.keys() & moves.keys():
                self._nothing(item.pattern, moves)
            moves = {path: key for path, key in moves.items() if path not in named}
        keys = set(moves.values())
        if len(self.diagnostics.errors) == before:
            self._check(said, moves, keys)
        return keys, {key: own for key, own in rates.items() if key in keys}

    def _trained(self, rule: TrainRule) -> dict[str, str]:
        """What a `train` line names: of what is planned, or else parameters of the model as they are."""
        paths = matched(rule.node.pattern, self.aliases, self.diagnostics)
        if not paths:
            return {}
        if named := self._named(paths, [*self.own, *self.planned]):
            self._check_alike(rule.node.pattern, paths)
            return named
        if not any(path in self.skeleton.modules or path in self.skeleton.parameters for path in paths):
            self._nothing(rule.node.pattern, [*self.own, *self.planned])  # tensors of methods, frozen ones or states
            return {}
        before = len(self.diagnostics.errors)
        names = self.whole.add(replace(rule, lr=None, weight_decay=None))  # these rates are the block's
        if not names and len(self.diagnostics.errors) == before:
            notes = [Note("the whole run freezes", item.span) for item in self.whole.program.frozen]
            message = f"all that `{rule.node.pattern.text}` names is frozen in the whole run"
            self.diagnostics.error("SURG020", message, rule.node.pattern.span, notes=notes)
        return {name: name for name in names}

    def _named(self, paths: Sequence[str], among: Iterable[str]) -> dict[str, str]:
        """Of the paths among those or below, the tensors of sites by path, and whole parameters by planned name."""
        found, planned = within(paths, dict.fromkeys(among)), self.whole.names
        whole = {planned[path]: planned[path] for path in found if path not in self.own}
        return {path: self.own[path] for path in found if path in self.own} | whole

    def _check_alike(self, pattern: nodes.Pattern, paths: Sequence[str]) -> None:
        """What a line names beside what the rules train would rest, though it is named."""
        known = set(paths)
        moving = {above for path in (*self.own, *self.planned) for above in ancestry(path)}
        holding = {above for path in self.skeleton.parameters for above in ancestry(path)} - moving
        resting = [path for path in paths if path in holding and known.isdisjoint(ancestry(path)[1:])]
        if resting:
            message = f"`{pattern.text}` names both what the rules train and what they do not"
            notes = [Note(f"they train nothing of {listed(resting)}")]
            help_text = "to train these as they are, write another line"
            self.diagnostics.error("SURG020", message, pattern.span, notes=notes, help=help_text)

    def _nothing(self, pattern: nodes.Pattern, moving: Iterable[str]) -> None:
        known = list(moving)
        sites = [site.path for site in self.sites if any(path.startswith(f"{site.path}.") for path in known)]
        message = f"nothing that `{pattern.text}` names is trained here"
        notes = [Note(f"these are: {listed(known)}")] if known else []
        near = nearest(pattern.text, [*known, *sites])
        help_text = f"did you mean `{near}`?" if near else None
        self.diagnostics.error("SURG020", message, pattern.span, notes=notes, help=help_text)

    def _check(self, said: Moving, moves: Mapping[str, str], keys: set[str]) -> None:
        lines: list[nodes.Train | nodes.Freeze] = [*(rule.node for rule in said.trained), *said.frozen]
        block = None if said.node is None else said.node.span
        if not moves:
            where, help_text = lines[-1].span if lines else block, "let it train something, or leave it out"
            self.diagnostics.error("SURG020", "this block moves nothing", where, help=help_text)
        for path, key in self.own.items():
            if key in keys and path not in moves:
                message = f"`{key}` is one tensor of several weights, and this block moves it at some of them"
                self.diagnostics.error("SURG004", message, lines[-1].span, help="name it at all of them, or at none")
                return


def _frozen(sites: Sequence[Site], moved: set[str]) -> Iterable[Site]:
    """Sites whose tensors are frozen unless some block moves them."""
    seen: set[str] = set()
    for site in sites:
        rests = [tensor for tensor in site.tensors if tensor.role == "train" and tensor.key not in moved]
        numbers = sum(tensor.numbers for tensor in rests if tensor.key not in seen)
        seen |= {tensor.key for tensor in rests}
        tensors = tuple(one.model_copy(update={"role": "frozen"}) if one in rests else one for one in site.tensors)
        counts = {"trainable": site.trainable - numbers, "frozen": site.frozen + numbers}
        yield site.model_copy(update={"tensors": tensors, **counts})
