"""Lower bounds from a schedule written by hand."""

import pytest

from modjax.kernels.schedule import Blocks, bound

# A loop of 10 trips, 8 of them whole: 2 bundles at its start, then a stage with 3 bundles, a region
# that begins a row (5), and a region of products (20); 6 bundles follow them, and 4 the loop.
# After a branch, four bundles still run.
PARTS = [
    "{ %s1 = smov 0 } /* Start region 9 */",
    *["{ nop }"] * 1,
    "{ sbr.rel (%p1) target = $region3 }",
    *["{ nop }"] * 4,
    *["{ nop }"] * 3,
    "{ sbr.rel (%p2) target = $region1 }",
    *["{ nop }"] * 4,
    *["{ vst }"] * 5,
    "{ nop } /* Start/End empty region 1 */",
    "{ sbr.rel (%p3) target = $region2 }",
    *["{ nop }"] * 4,
    *["{ vmatmul.bf16.gmra.mxu0 %v1 }"] * 2,
    *["{ nop }"] * 18,
    "{ nop } /* Start/End empty region 2 */",
    "{ nop } /* Start/End empty region 3 */",
    "{ %p4 = scmp.ge.s32.totalorder %s46, 10 /* loop exit test */ }",
    "{ sbr.rel (!%p4) target = $region9 }",
    *["{ nop }"] * 4,
    *["{ nop }"] * 4,
]
SCHEDULE = "\n".join(f" {at:#x}   : > {part}" for at, part in enumerate(PARTS))


def test_regions_count_by_how_often_they_run():
    loop = 2 + 5 + 1 + 1 + 5  # around the stage: its branch, the exit test and the branch back
    stage = 3 + 5 + 1 + 5 + 1  # with two branches, and two bundles where regions end
    products = max(20, 2 * 16)  # 16 rows of a register take a matrix unit 16 cycles
    blocks = Blocks(share=0.625, width=4)
    expected = 4 + 10 * loop + 8 * (stage + 5 / 4 + 0.625 * products)
    assert bound(SCHEDULE, "v5e", blocks) == pytest.approx(expected)
    # Two rows a cycle: the bundles take longer.
    expected = 4 + 10 * loop + 8 * (stage + 5 / 4 + 0.625 * 20)
    assert bound(SCHEDULE, "v6e", blocks) == pytest.approx(expected)


def test_what_cannot_be_counted_has_no_bound():
    assert bound(SCHEDULE, "v5e") is None  # without a mask, how often the products run
    endless = SCHEDULE.replace("10 /* loop exit test */", "%s47 /* loop exit test */")
    assert bound(endless, "v5e", Blocks(1.0, 1)) is None
