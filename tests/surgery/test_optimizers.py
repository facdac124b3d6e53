"""Optimizers that round bfloat16 parameters stochastically, against torch's own and against what rounding is."""

from __future__ import annotations

import copy
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import surgery
from surgery.cli.plan_table import print_plan
from surgery.optimizers import rounding
from surgery.optimizers.adamw import RoundingAdamW
from surgery.optimizers.rounding import round_stochastically
from surgery.optimizers.sgd import RoundingSGD
from surgery.runtime.run_folder import load_state

DEVICES = ["cpu"]  # tests/gpu calls the same tests for a device
ADAMW: dict[str, Any] = {"betas": (0.8, 0.95), "eps": 1e-6}
SGD: dict[str, Any] = {"momentum": 0.5}
PAIRS: list[Any] = [
    (RoundingAdamW, torch.optim.AdamW, ADAMW),
    (RoundingSGD, torch.optim.SGD, SGD),
    (RoundingSGD, torch.optim.SGD, SGD | {"nesterov": True}),
    (RoundingSGD, torch.optim.SGD, {}),
]


def bits(value: Tensor) -> Tensor:
    return value.view(torch.int32 if value.dtype == torch.float32 else torch.int16)


# --- rounding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_the_mean_of_many_roundings_is_the_number(device: str) -> None:
    torch.manual_seed(0)
    numbers = torch.cat([torch.randn(40), torch.tensor([1 + 2**-16, 1 + 2**-9, -1 - 3 * 2**-12, 3e-39, -7e-41])])
    count = 40_000
    many = numbers.to(device).repeat(count, 1)
    rounded = round_stochastically(many).double().cpu()
    below = (bits(numbers) & -(1 << 16)).view(torch.float32).double()
    unit = ((bits(numbers) & -(1 << 16)) + (1 << 16)).view(torch.float32).double() - below
    assert ((rounded == below) | (rounded == below + unit)).all(), "one of the two neighbours"
    share = (numbers.double() - below) / unit
    # 45 means of `count` coins: five standard deviations are exceeded once in 40 thousand runs, and the seed is fixed
    bound = 5 * (share * (1 - share) / count).sqrt() * unit.abs() + 1e-12 * unit.abs()
    assert ((rounded.mean(0) - numbers.double()).abs() <= bound).all()


@pytest.mark.parametrize("device", DEVICES)
def test_what_bfloat16_holds_is_left_as_it_is(device: str) -> None:
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 1.0, -2.5, 2**-133])
    torch.testing.assert_close(round_stochastically(special.to(device)).cpu().float(), special, rtol=0, atol=0)
    # every NaN, also the one whose bits are all set, which a carry would make a number
    quiet = torch.tensor([0x7FFFFFFF, -1, 0x7FC00000, 0x7F800001], dtype=torch.int32).view(torch.float32)
    assert round_stochastically(quiet.to(device)).isnan().all()


# --- arithmetic -------------------------------------------------------------------------------------------------------


def parameters(dtype: torch.dtype, device: str = "cpu") -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    shapes = [(5, 3), (7,), (), (2, 3, 4, 5), (0, 2)]
    made = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    made[3] = made[3].to(memory_format=torch.channels_last)
    return [nn.Parameter(tensor) for tensor in made]


def set_gradients(of: list[nn.Parameter], step: int, lacking: tuple[int, ...] = ()) -> None:
    generator = torch.Generator().manual_seed(step)
    for number, parameter in enumerate(of):
        gradient = torch.randn(parameter.shape, generator=generator).to(parameter.device, parameter.dtype)
        parameter.grad = None if number in lacking else gradient


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("own", "torchs", "options"), PAIRS)
def test_wide_parameters_get_the_numbers_of_torch(
    own: Any, torchs: Any, options: dict[str, Any], dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounding, "SLICE", 50)  # cuts through the tensors
    ours, theirs = parameters(dtype, device), parameters(dtype, device)
    optimizers = [
        kind(
            [{"params": of[:2], "lr": 0.1, "weight_decay": 0.0}, {"params": of[2:], "weight_decay": 0.2}],
            lr=0.02,
            **options,
        )
        for kind, of in ((own, ours), (torchs, theirs))
    ]
    for step in range(12):
        lacking = (1, 3) if step in (0, 4, 5) else ()  # parameters without a gradient keep their own count of steps
        for of, optimizer in zip((ours, theirs), optimizers, strict=True):
            set_gradients(of, step, lacking)
            for group in optimizer.param_groups:
                group["lr"] *= 0.9
            optimizer.step()
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6 if dtype == torch.float32 else 1e-14, atol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("own", "torchs", "options"), PAIRS)
def test_representable_numbers_are_not_rounded(own: Any, torchs: Any, options: dict[str, Any], device: str) -> None:
    """Signs times powers of two: where the exact result is a bfloat16, it is what comes out."""
    one = nn.Parameter(torch.tensor([1.0, -0.5, 4.0], dtype=torch.bfloat16, device=device))
    other = nn.Parameter(one.detach().float())
    small = options | ({"eps": 0.0} if "eps" in options else {})
    ours, theirs = own([one], lr=0.25, weight_decay=0.0, **small), torchs([other], lr=0.25, weight_decay=0.0, **small)
    one.grad = torch.tensor([0.5, -0.5, 0.5], dtype=torch.bfloat16, device=device)
    other.grad = one.grad.float()
    ours.step()
    theirs.step()
    torch.testing.assert_close(one.float(), other, rtol=2**-8 if "eps" in options else 0, atol=0)


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("own", "torchs", "options", "lr"),
    [(RoundingAdamW, torch.optim.AdamW, {}, 1e-4), (RoundingSGD, torch.optim.SGD, {}, 1e-4)],
)
def test_small_steps_arrive_where_plain_bfloat16_stalls(
    own: Any, torchs: Any, options: dict[str, Any], lr: float, device: str
) -> None:
    torch.manual_seed(0)
    ended = []
    for kind in (own, torchs):
        parameter = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16, device=device))
        optimizer = kind([parameter], lr=lr, weight_decay=0.0, **options)
        for _ in range(500):
            parameter.grad = torch.ones_like(parameter)
            optimizer.step()
        ended.append(float(parameter.detach().float().mean()))
    # 500 steps of 1e-4 each; the noise of one parameter is some units of 2**-8, that of the mean of 4096 a 64th of it
    assert ended[0] == pytest.approx(0.95, abs=1e-3)
    assert ended[1] == 1.0, "each step is less than half a unit"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("kind", "options"), [(RoundingAdamW, ADAMW), (RoundingSGD, SGD)])
def test_a_resumed_run_is_the_same_to_the_bit(kind: Any, options: dict[str, Any], device: str) -> None:
    def steps(of: list[nn.Parameter], optimizer: Any, numbers: range) -> None:
        for step in numbers:
            set_gradients(of, step)
            optimizer.step()

    torch.manual_seed(1)
    of = parameters(torch.bfloat16, device)
    optimizer = kind(of, lr=1e-3, **options)
    steps(of, optimizer, range(5))
    state, values = copy.deepcopy(optimizer.state_dict()), [parameter.detach().clone() for parameter in of]
    random = torch.cuda.get_rng_state() if device == "cuda" else torch.get_rng_state()
    steps(of, optimizer, range(5, 9))

    for moments in state["state"].values():
        assert all(value.dtype == torch.float32 for value in moments.values() if isinstance(value, Tensor))
    again = [nn.Parameter(value) for value in values]
    resumed = kind(again, lr=1e-3, **options)
    resumed.load_state_dict(state)
    torch.cuda.set_rng_state(random) if device == "cuda" else torch.set_rng_state(random)
    steps(again, resumed, range(5, 9))
    assert all(torch.equal(bits(one), bits(other)) for one, other in zip(of, again, strict=True))
    for one, other in zip(
        optimizer.state_dict()["state"].values(), resumed.state_dict()["state"].values(), strict=True
    ):
        assert one["step"] == other["step"] == 9
        assert all(torch.equal(one[name], other[name]) for name in kind(again, **options).moments)


# --- in a training step -----------------------------------------------------------------------------------------------

ROWS, WIDTH = 16, 12


def data(dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {name: torch.randn(ROWS, WIDTH, generator=generator).to(dtype) for name in ("x", "labels")}


def step_of(settings: str, rules: str, dtype: torch.dtype = torch.float32, optimizer: str = "adamw(lr = 1e-5)") -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
    program = surgery.parse(f"""{rules}
        step {{ optimizer = {optimizer}  batch = {ROWS}  steps = 400  loss = mse  compile = off  {settings} }}
    """)
    return surgery.compile(program, model=_Named(model).to(dtype), example_inputs={"x": data(dtype)["x"]})


class _Named(nn.Module):
    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        """Rows `[rows, WIDTH]`."""
        y: Tensor = self.layers(x)
        return y


ADAPT = "adapt layers.0 { with lora(rank = 4) }"


@pytest.mark.parametrize(
    ("settings", "rules", "dtype", "rounds"),
    [
        ("", ADAPT, torch.float32, False),
        ("", ADAPT, torch.bfloat16, False),  # adapters are float32 there
        ("adapter_dtype = bfloat16", ADAPT, torch.float32, True),
        ("adapter_dtype = bfloat16", ADAPT, torch.bfloat16, True),
        ("", "train layers.2.bias", torch.bfloat16, True),
        ("", f"{ADAPT} train layers.2.bias", torch.bfloat16, True),
        ("", "train layers.2.bias", torch.float32, False),
    ],
)
@pytest.mark.parametrize("optimizer", ["adamw(lr = 1e-2)", "sgd(lr = 1.0, momentum = 0.9)"])
def test_a_step_rounds_exactly_where_it_trains_bfloat16(
    settings: str, rules: str, dtype: torch.dtype, rounds: bool, optimizer: str
) -> None:
    step = step_of(settings, rules, dtype, optimizer)
    assert step.plan.rounds == isinstance(step.optimizer, rounding.RoundingOptimizer) == rounds
    assert any(parameter.dtype == torch.bfloat16 for parameter in trained(step)) == rounds
    before = [parameter.detach().clone() for parameter in trained(step)]
    for _ in range(3):
        step(data(dtype))
    moments = [
        value for state in step.optimizer.state.values() for value in state.values() if isinstance(value, Tensor)
    ]
    assert moments and all(value.dtype == torch.float32 for value in moments)
    assert any(not torch.equal(one, other) for one, other in zip(before, trained(step), strict=True))


def trained(step: Any) -> list[Tensor]:
    return [parameter for group in step.optimizer.param_groups for parameter in group["params"]]


def test_bfloat16_adapters_keep_up_with_float32_where_nearest_rounding_stalls() -> None:
    """At a rate below half a unit of what is trained; the same losses as in float32, up to what rounding adds."""

    def loss_after(step: Any, optimizer: Any = None) -> float:
        step.optimizer = optimizer or step.optimizer
        for group in step.optimizer.param_groups:
            group.setdefault("base_lr", group["lr"])
        return [float(step(data(torch.float32)).loss) for _ in range(400)][-1]

    wide, narrow, plain = (step_of(s, ADAPT) for s in ("", "adapter_dtype = bfloat16", "adapter_dtype = bfloat16"))
    for step in (wide, narrow, plain):  # a start that bfloat16 has, and B away from 0, where small steps would count
        with torch.no_grad():
            for number, parameter in enumerate(trained(step)):
                generator = torch.Generator().manual_seed(number)
                parameter.copy_(torch.randn(parameter.shape, generator=generator).bfloat16())
    start = float(wide.evaluate_loss(data(torch.float32))[0]) / (ROWS * WIDTH)
    nearest = torch.optim.AdamW(trained(plain), lr=1e-5, weight_decay=0.0)
    gains = [start - loss_after(wide), start - loss_after(narrow), start - loss_after(plain, nearest)]
    assert gains[0] > 0
    assert gains[1] == pytest.approx(gains[0], rel=0.4)
    assert gains[2] < 0.3 * gains[0]


def test_a_run_with_bfloat16_adapters_resumes_to_the_bit(tmp_path: Path) -> None:
    step = step_of("adapter_dtype = bfloat16", f"{ADAPT} train layers.2")
    rows = data(torch.float32)
    for _ in range(4):
        step(rows)
    step.save(tmp_path / "run")
    resumed = surgery.load(tmp_path / "run", step.model, example_inputs={"x": rows["x"]})
    ahead = [step(rows).loss for _ in range(4)]
    resumed.load_state_dict(load_state(tmp_path / "run").state)  # torch's generator is one for both
    assert all(torch.equal(loss, resumed(rows).loss) for loss in ahead)
    for one, other in zip(trained(step), trained(resumed), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("settings", "rules", "dtype", "said"),
    [
        ("adapter_dtype = bfloat16", ADAPT, torch.float32, "adapters in bfloat16, rounded stochastically"),
        ("", "train layers.2", torch.bfloat16, "whole parameters in bfloat16, rounded stochastically"),
        ("", ADAPT, torch.bfloat16, None),
    ],
)
def test_the_plan_says_what_is_rounded(settings: str, rules: str, dtype: torch.dtype, said: str | None) -> None:
    console = Console(width=200, file=StringIO())
    print_plan(console, step_of(settings, rules, dtype).plan)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert said in text if said else "rounded" not in text
