"""The plan: every site, what is done to it, what is known about it, and how the step runs. JSON in and out."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from surgery.compiler.algebra.measured import Estimator, Pooling
from surgery.compiler.span import Source, Span

HALF = ("bfloat16", "float16")  # the dtypes of two bytes, as a plan names them


class Record(BaseModel):
    """Base of everything in the plan: immutable, unknown fields refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def way_text(strategy: str, operation: str) -> str:
    """How a site is run, for people: `branch`, or `branch with low_rank_linear`."""
    return f"{strategy} with {operation}" if operation else strategy


class Place(Record):
    """Where in the spec a thing comes from: file, line and column (from 1), and offsets into that file's text."""

    file: str
    line: int
    column: int
    start: int
    end: int


class TensorPlan(Record):
    """A tensor of one site. `key` is its full name in `adapters.safetensors`; sites that share it have the same key."""

    name: str
    key: str
    role: Literal["train", "frozen", "state"]
    shape: tuple[int, ...]
    dtype: str  # "float32", ...
    start: str  # the start as it is spelt: "kaiming_uniform", "normal(0.02)"
    numbers: int  # how many entries
    lr: float | None = None
    weight_decay: float | None = None


class Facts(Record):
    """What the compiler proves about a site's equation."""

    identity_at_start: bool
    rank_bound: int | None  # None: full
    merges: bool
    exports_as_lora: bool
    keeps_zeros: bool
    moves_base: bool
    needs_dense_weight: bool
    needs_calibration: bool = False
    merge_reason: str = ""  # why it does not merge


class Candidate(Record):
    """One way to run a site, with its cost at the planned tokens (forward and backward, beyond the frozen site)."""

    strategy: str
    operation: str = ""  # of surgery's own, that it runs with; empty: plain torch
    flops: int
    bytes: int
    kept: int = 0  # bytes that the forward keeps for the backward, parameters not counted
    legal: bool
    reason: str


# What W is: a module's weight, a stack of experts, a raw parameter, a norm's vector (W is its diagonal matrix), or the
# weight of a module that has none (only its output is adapted).
ModuleClass = Literal["Linear", "Conv1D", "Embedding", "Conv2d", "Experts", "Parameter", "Norm", "Module"]


class Site(Record):
    """One adapted weight."""

    path: str  # the module (or parameter) path: encoder.layer.0.attention.self.query
    parameter: str  # the parameter that holds W: encoder.layer.0.attention.self.query.weight
    module_class: ModuleClass
    kind: str  # the path below its block: attention.self.query
    layer: int | None  # number of its block among the rule's blocks
    shape: tuple[int, int]  # [out, in], the logical matrix
    dtype: str  # of W
    transposed: bool  # stored as [in, out] (Conv1D, Embedding)
    experts: int | None = None  # a stack of that many matrices: stored and logical ones have them as a leading axis
    kernel: tuple[int, int] = (1, 1)  # of a Conv2d, whose weight is stored as [out, channels, *kernel]
    bias: bool
    untied: bool = False  # takes a weight of its own out of a tied pair
    rule: int  # index of the adapt rule in the spec
    formula: str  # key into Plan.formulas
    method: str  # "lora(rank = 8, alpha = 16)"
    rank: int | None
    tensors: tuple[TensorPlan, ...]
    earlier: dict[str, str] = Field(default_factory=dict)  # tensors of earlier blocks that it reads: name here to key
    earlier_inputs: dict[str, str] = Field(default_factory=dict)  # x of earlier blocks: name here to the site's path
    trainable: int  # numbers trained at this site (a shared tensor counts at its first site)
    frozen: int  # numbers of the method that are not trained
    strategy: str = ""  # branch, fold or recompute; set by p4_choose
    operation: str = ""  # as of the candidate
    reason: str = ""
    update: Literal["none", "literal", "telescope"] = "none"
    quantized: bool = False  # W is kept in few bits: it is what these stand for
    facts: Facts
    candidates: tuple[Candidate, ...] = ()
    place: Place


class Formula(Record):
    """One equation with its sizes filled in; many sites share one. `algebra.instance` gives the algebra."""

    method: str  # name of the method, or the text of a composition
    arguments: dict[str, int | float | str | bool]
    outputs: int
    inputs: int
    coordinates: dict[str, int] = Field(default_factory=dict)  # those of layer, slot, site, heads ... that it reads
    telescope: bool = False  # the event that moves W is read as its closed form
    from_start: bool = False  # it writes W as the sum of all steps, from what W was at the start
    equation: str  # for people: "delta = (16 / 8) * B @ A"


class WholeParameter(Record):
    """A parameter of the model that is trained as it is (`train classifier`)."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    numbers: int
    lr: float | None = None
    weight_decay: float | None = None
    place: Place


class OptimizerPlan(Record):
    """`adamw(...)`, `sgd(...)`, or one that knows factors, around one of these or with its numbers.

    `base` trains what the optimizer leaves to it; lr, betas and the like are the base's, `options` the optimizer's own.
    """

    name: str = "adamw"  # of `surgery.optimizers.OPTIMIZERS`
    base: Literal["adamw", "sgd"] = "adamw"
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum: float = 0.0
    nesterov: bool = False
    options: dict[str, bool | int | float | tuple[int, ...]] = Field(default_factory=dict)


class FactorsPlan(Record):
    """Tensors that the equations read only as `scale * left @ right` or `scale * left @ core @ right`, `[out, in]`."""

    site: str  # the first site that reads them
    tensors: tuple[str, ...]  # their keys, from left to right
    turned: tuple[bool, ...]  # whether they stand transposed there
    scale: float


class SchedulePlan(Record):
    """`constant`, `linear(warmup = 0.1)`, `cosine(...)`: a warmup below 1 is a share of the steps, else steps."""

    name: Literal["constant", "linear", "cosine"] = "constant"
    warmup: float = 0.0
    minimum: float = 0.0  # share of lr at the end


class RecomputePlan(Record):
    """Which of the model's repeated blocks the backward runs again, instead of keeping what it needs of them."""

    name: Literal["none", "blocks", "budget"] = "none"
    share: float = 1.0  # how much of what the blocks keep may be kept: 0 for `blocks`
    place: Place | None = None  # of the setting in the spec


class ReportPlan(Record):
    """Where a run is followed beside its own folder: `tensorboard`, `wandb(project = "...")` or `trackio(...)`."""

    name: Literal["tensorboard", "wandb", "trackio"]
    project: str | None = None
    place: Place | None = None  # of the setting in the spec


class StepPlan(Record):
    """A `step` block with its defaults filled in.

    `frozen` and `rates` go by the keys of tensors and the names of whole parameters.
    """

    number: int = 0  # of the block in the spec
    optimizer: OptimizerPlan = OptimizerPlan()
    schedule: SchedulePlan = SchedulePlan()
    batch: int = 8  # sequences per optimizer step
    micro_batch: int | None = None  # None: the whole batch at once
    steps: int | None = None
    epochs: float | None = None
    clip: float | None = None  # largest gradient norm
    precision: Literal["model", "bfloat16", "float16"] = "model"  # forward under autocast
    adapter_dtype: Literal["float32", "float64", "bfloat16", "float16"] | None = None  # None: float32, or W's if wider
    seed: int = 0
    compile: Literal["auto", "on", "off", "reduce_overhead"] = "auto"
    recompute: RecomputePlan = RecomputePlan()
    loss: Literal["auto", "causal_lm", "cross_entropy", "mse", "output"] = "auto"
    evaluate: int | None = None  # every so many steps
    save: int | None = None
    keep: int | None = None  # how many saves to keep
    log: int = 10
    best: str | None = None  # the score whose best state is kept
    stop: int | None = None  # after so many evaluations in a row without a better one
    report: ReportPlan | None = None
    frozen: tuple[str, ...] = ()  # what other blocks train, and this one does not move
    rates: dict[str, tuple[float | None, float | None]] = Field(default_factory=dict)  # own lr, weight decay: `train`


Quantized = Literal["nf4", "int8"]  # how a weight is kept in few bits


class ModelPlan(Record):
    """The `model` line resolved; `task` decides the loss and the example inputs."""

    source: Literal["hub", "config", "python", "given"]
    name: str
    task: str | None = None
    labels: int | None = None
    dtype: str | None = None
    revision: str | None = None
    tokenizer: str | None = None  # a folder or a hub id, where it is not the model's own
    attention: str | None = None
    quantize: Quantized | None = None
    settings: dict[str, Any] = Field(default_factory=dict)
    architecture: str = ""  # class name of the model
    parameters: int = 0  # numbers in the model
    fingerprint: str = ""  # hash of parameter names and shapes


class DataPlan(Record):
    """The `data` block: rows with a text, with a prompt and a completion, or with messages."""

    path: str  # a file, a folder or a dataset of the hub
    subset: str | None = None  # of a dataset
    split: str | None = None
    text: str | None = None  # template: "{instruction} {input}"
    label: str | None = None  # column
    prompt: str | None = None  # template
    completion: str | None = None  # template
    messages: str | None = None  # column
    template: str = "tokenizer"  # how messages are rendered: the tokenizer's own way, or a named one
    loss: Literal["assistant", "completion", "all"] = "all"  # which tokens of a causal model's row are labels
    max_length: int = 512
    too_long: Literal["truncate", "drop", "error"] = "truncate"
    empty: Literal["drop", "error"] = "drop"  # rows without text, label or a token to learn
    pack: bool = False  # several documents in a row
    holdout: float = 0.0
    eval: str | None = None  # as `path`
    eval_split: str | None = None  # another split of the same dataset
    calibrate: int = 128  # rows of the training data for starts that read it
    place: Place | None = None  # of the block in the spec


class ExamplePart(Record):
    """Tokens in a row of an example, decoded; `learned`: whether they are labels."""

    text: str
    learned: bool


class ExampleRow(Record):
    """A row as the model sees it."""

    row: int  # its number in the file, from 1
    tokens: int
    learned: int  # how many of them are labels that something is before
    label: str | None = None  # of a classification
    parts: tuple[ExamplePart, ...]


class SamplePlan(Record):
    """What the first rows of the data say about a step; `tokens` and the like are means."""

    rows: int  # read
    whole: bool  # these are all there are
    used: int  # without those that are left out
    empty: int  # left out: nothing in them, or nothing that is learnt
    too_long: int  # left out: longer than max_length
    cut: int  # cut to max_length
    longest: int  # tokens, before any is cut
    median: int
    tokens: float  # of a document
    learned: float  # of these, how many are labels
    documents: float  # in a row of a batch: more than one where they are packed
    tokens_per_step: float
    learned_per_step: float
    padding: float  # the share of a batch that is neither
    steps_per_epoch: int | None  # where these are all rows
    example: ExampleRow


class EventPlan(Record):
    """An event of a rule's method, as the step runs it."""

    formula: str
    text: str  # as it stands in the spec, on one line
    phase: Literal["at start", "before forward", "after backward", "after step"]
    update: Literal["literal", "telescope", "assign", "mask", "once"]  # mask: what it leaves out is saved as zeros
    place: Place


class ActivePlan(Record):
    """`count` of the `sites` of a rule learn at a time, others after `every` steps; a draw says which."""

    rule: int  # index of the adapt rule in the spec
    count: int
    sites: int
    every: int
    place: Place  # of the setting in the spec


class MeasuredPlan(Record):
    """A number of the data for each block: `max(round(d_out - d_in), 0) + 1`, d the dimension of its hidden states."""

    call: str  # as it is spelt: hidden_dimension_gain()
    pooling: Pooling
    estimator: Estimator
    rows: int = 0  # different rows of the data; 0: not measured, as in a draft, where each number is 1
    blocks: dict[str, tuple[float, float]]  # d_in and d_out by the block's path
    place: Place  # of the method that takes it


class MemoryPlan(Record):
    """Bytes at the peak of a training step on a GPU, each of several: `peak` is the sum of the parts."""

    processes: int = 1

    compiled: bool  # whether they are those of the step as torch compiles it
    rows: int  # of one forward
    length: int
    weights: int  # the model, or its rows that are here, and the method's frozen tensors
    gathered: int = 0  # weights of other processes that are here for a while
    trained: int
    gradients: int  # of what is trained
    optimizer: int  # its state
    kept: int  # what the repeated blocks hold for the backward
    outputs: int  # what is held around them: embeddings, logits, the loss, the batch
    backward: int  # gradients of activations, and what the backward runs again
    peak: int
    blocks: dict[str, int]  # `kept` by the block's path


class QuantizedPlan(Record):
    """The frozen weights that are kept in few bits, and what they take: codes with their scales."""

    kind: Quantized
    weights: tuple[str, ...]  # names of the parameters, tied ones under each of them
    numbers: int
    bytes: int
    dense_bytes: int  # as the model has them
    place: Place  # of the setting in the spec


class Totals(Record):
    """Sums over the plan."""

    sites: int
    trainable: int
    frozen: int  # numbers of methods that are not trained
    model: int  # numbers in the model itself
    share: float  # trainable / model


class LaterPlan(Record):
    """A `step` block behind the first one, and the factors that its optimizer needs to know of."""

    step: StepPlan
    factors: tuple[FactorsPlan, ...] = ()


class Plan(Record):
    """What `surgery plan` prints and everything after it reads."""

    version: int = 1
    spec: str  # the text of the spec
    file: str  # name of the spec's file
    library: dict[str, str] = Field(default_factory=dict)  # texts by file name of the methods that it does not define
    model: ModelPlan
    sites: tuple[Site, ...]
    formulas: dict[str, Formula]
    trained: tuple[WholeParameter, ...] = ()
    step: StepPlan = StepPlan()  # the first block, or the only one
    later: tuple[LaterPlan, ...] = ()  # the blocks that run behind it
    data: DataPlan | None = None
    events: tuple[EventPlan, ...] = ()
    active: tuple[ActivePlan, ...] = ()  # rules of which some sites learn at a time
    measured: tuple[MeasuredPlan, ...] = ()  # numbers of the data that rules give to their methods
    factors: tuple[FactorsPlan, ...] = ()  # what the first block's optimizer needs to know of them
    recomputed: tuple[str, ...] = ()  # paths of the blocks whose forward the backward runs again
    tokens: int  # planned tokens per micro-batch
    quantized: QuantizedPlan | None = None
    totals: Totals
    memory: MemoryPlan | None = None  # where it was asked for
    sample: SamplePlan | None = None  # where `surgery plan` could read the data

    @property
    def step_blocks(self) -> tuple[StepPlan, ...]:
        """All `step` blocks, in the order in which they run."""
        return (self.step, *(block.step for block in self.later))

    @property
    def blocks(self) -> tuple[Plan, ...]:
        """A plan for each `step` block: its step is the block's, and what does not move in it is frozen."""
        factors = (self.factors, *(block.factors for block in self.later))
        return tuple(map(self._during, self.step_blocks, factors))

    def _during(self, step: StepPlan, factors: tuple[FactorsPlan, ...]) -> Plan:
        rests = set(step.frozen)

        def rates(key: str) -> dict[str, Any]:
            said = zip(("lr", "weight_decay"), step.rates.get(key, ()), strict=False)
            return {name: value for name, value in said if value is not None}

        def tensor(one: TensorPlan) -> TensorPlan:
            return one.model_copy(update=rates(one.key) | ({"role": "frozen"} if one.key in rests else {}))

        sites = (site.model_copy(update={"tensors": tuple(map(tensor, site.tensors))}) for site in self.sites)
        trained = (whole.model_copy(update=rates(whole.name)) for whole in self.trained if whole.name not in rests)
        update = {"step": step, "later": (), "factors": factors, "sites": tuple(sites), "trained": tuple(trained)}
        return self.model_copy(update=update)

    @property
    def rounds(self) -> bool:
        """Whether bfloat16 tensors are trained: an update smaller than half a unit is then rounded stochastically."""
        own = [tensor.dtype for site in self.sites for tensor in site.tensors if tensor.role == "train"]
        return "bfloat16" in [*own, *(parameter.dtype for parameter in self.trained)]

    def span(self, place: Place) -> Span:
        """A place as a span of the text that the plan keeps: the spec's, or that of a method's file."""
        return Span(Source(place.file, self.library.get(place.file, self.spec)), place.start, place.end)
