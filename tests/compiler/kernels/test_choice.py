"""The model of the products' times against what was measured, and what it chooses."""

from __future__ import annotations

import pytest

from surgery.compiler.kernels.low_rank import choice

ROWS, RANK, PROCESSORS = 8192, 16, 132
WIDE, SMALL = choice.STEP

# microseconds on one H200, 8192 rows of bfloat16, by width of the input and of the output: torch's product, that into
# a sum, `u @ left.T`; Triton's product with and without a narrow one in the tiling WIDE, without one in SMALL
MEASURED = {
    (2048, 2048): (93.5, 98.8, 16.5, 100.2, 95.2, 102.5),
    (2048, 512): (28.2, 31.3, 8.9, 36.1, 34.2, 34.8),
    (2048, 8192): (385.9, 418.8, 45.8, 403.2, 405.8, 428.1),
    (8192, 2048): (382.7, 383.0, 15.9, 346.4, 374.7, 428.0),
    (4096, 4096): (385.0, 392.0, 27.1, 373.2, 395.3, 436.2),
}


@pytest.mark.parametrize(("width", "out"), MEASURED)
def test_the_model_is_near_what_was_measured(width: int, out: int) -> None:
    product, into_sum, narrow, with_rank, alone, small = MEASURED[width, out]
    written, read = ROWS * out * 2 / choice.WRITTEN, ROWS * out * 2 / choice.READ
    predictions = {
        product: choice.time_of_torch(ROWS, width, out),
        into_sum: choice.time_of_torch(ROWS, width, out) + read,
        narrow: choice.time_of_torch(ROWS, RANK, out) + written,
        with_rank: choice.time_of_triton(WIDE, ROWS, [out], [width, RANK], PROCESSORS),
        alone: choice.time_of_triton(WIDE, ROWS, [out], [width], PROCESSORS),
        small: choice.time_of_triton(SMALL, ROWS, [out], [width], PROCESSORS),
    }
    for measured, predicted in predictions.items():
        assert predicted == pytest.approx(measured, rel=0.13)


@pytest.mark.parametrize("outs", [(2048, 512, 512), (2048,), (8192, 8192), (4096, 1024, 1024)])
@pytest.mark.parametrize("rows", [8192, 32768])
def test_large_outputs_take_the_narrow_product_along(rows: int, outs: tuple[int, ...]) -> None:
    assert choice.fastest_for_outputs(rows, 2048, outs, (RANK,) * len(outs), PROCESSORS) in choice.STEP


def test_the_input_gradient_of_several_sites_is_one_sum() -> None:
    assert choice.fastest_for_input_gradient(ROWS, 2048, (2048, 512, 512), 3 * RANK, PROCESSORS) == WIDE


@pytest.mark.parametrize(("rows", "width"), [(8192, 384), (64, 4096), (1, 8192), (512, 1024)])
def test_what_is_short_is_left_to_torch(rows: int, width: int) -> None:
    assert choice.fastest_for_outputs(rows, width, (width,), (RANK,), PROCESSORS) is None
    assert choice.fastest_for_input_gradient(rows, width, (width,), RANK, PROCESSORS) is None


def test_without_a_narrow_product_one_site_is_left_to_torch() -> None:
    assert choice.fastest_for_input_gradient(ROWS, 4096, (4096,), 0, PROCESSORS) is None
