"""Collectives are read from HLO as the compilers write it: lines below are of libtpu 0.0.42 and of
XLA for GPUs, their attributes cut to what matters."""

import pytest

from sdx.planning.collectives import Collective, collectives

pytestmark = pytest.mark.fast

HEAD = "HloModule jit_step, is_scheduled=true\n\n"


def entry(*lines: str) -> str:
    return "\n".join(["ENTRY %main.1 (p.1: bf16[8,128]) -> bf16[8,128] {", *lines, "}", ""])


def test_plain_ones_by_kind() -> None:
    hlo = HEAD + entry(
        "  %p.1 = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)",
        "  %g.1 = bf16[64,128]{1,0:T(8,128)(2,1)S(1)} all-gather(%p.1), channel_id=1",
        "  %g.2 = bf16[64,128]{1,0} all-gather(%p.1), channel_id=2, dimensions={0}",
        "  %s.1 = f32[] all-reduce(%x), channel_id=3, to_apply=%add",
        "  %m.1 = (f32[320]{0}, bf16[3,3,8,8]{3,2,1,0}, /*index=2*/f32[]) all-reduce(%a, %b, %c), "
        "channel_id=3, to_apply=%add",
        "  %t.1 = bf16[4,16,80]{2,1,0} all-to-all(%p.1), channel_id=5, dimensions={1}",
        "  ROOT %c.1 = bf16[8,128]{1,0} collective-permute(%p.1), channel_id=6",
    )  # fmt: skip
    assert collectives(hlo) == {
        "all_reduce": Collective(2, 4 + 320 * 4 + 9 * 64 * 2 + 4),
        "all_gather": Collective(2, 2 * 64 * 128 * 2),
        "all_to_all": Collective(1, 4 * 16 * 80 * 2),
        "collective_permute": Collective(1, 8 * 128 * 2),
    }


def test_asynchronous_ones_count_once_with_their_results_bytes() -> None:
    hlo = HEAD + entry(
        "  %g = (bf16[8,128]{1,0}, bf16[64,128]{1,0}) all-gather-start(%p.1), channel_id=1",
        "  %gd = bf16[64,128]{1,0} all-gather-done(%g)",
        "  %r = f32[16]{0} all-reduce-start(%x), channel_id=2, to_apply=%add",
        "  %rd = f32[16]{0} all-reduce-done(%r)",
        "  %c = (bf16[8]{0}, bf16[8]{0}, u32[], u32[]) collective-permute-start(%y), channel_id=3",
        "  ROOT %cd = bf16[8]{0} collective-permute-done(%c)",
    )
    assert collectives(hlo) == {
        "all_reduce": Collective(1, 64),
        "all_gather": Collective(1, 64 * 128 * 2),
        "collective_permute": Collective(1, 16),
    }


def test_one_collective_split_over_fusions_counts_once() -> None:
    parts = "".join(
        f"%part.{n} (q: bf16[8,128]) -> bf16[64,128] {{\n"
        f"  ROOT %g.{n} = bf16[64,128]{{1,0}} all-gather(%q), channel_id=10, "
        f'frontend_attributes={{chain_id="0"}}\n}}\n'
        for n in range(3)
    )
    fusions = (
        f"  %f.{n} = bf16[64,128]{{1,0}} fusion(%p.1), kind=kCustom, calls=%part.{n}"
        for n in range(3)
    )
    hlo = HEAD + parts + entry(*fusions)
    assert collectives(hlo) == {"all_gather": Collective(1, 64 * 128 * 2)}


def test_a_scattered_reduction_is_told_from_a_whole_one() -> None:
    fused = (
        "%all-reduce-scatter.2 (i: f32[64,128]) -> f32[8,128] {\n"
        "  %i = f32[64,128]{1,0} parameter(0)\n"
        "  %all-reduce.9 = f32[64,128]{1,0} all-reduce(%i), channel_id=4, to_apply=%add\n"
        "  ROOT %d = f32[8,128]{1,0} dynamic-slice(%all-reduce.9, %k)\n"
        "}\n"
    )
    on_gpu = entry(
        "  %x = f32[64,128]{1,0} parameter(0)",
        "  ROOT %r = f32[8,128]{1,0} reduce-scatter(%x), channel_id=4, dimensions={0}",
    )
    on_tpu = fused + entry(
        "  ROOT %f = f32[8,128]{1,0} fusion(%p.1), kind=kCustom, calls=%all-reduce-scatter.2"
    )
    for hlo in (on_gpu, on_tpu):
        assert collectives(HEAD + hlo) == {"reduce_scatter": Collective(1, 64 * 128 * 4)}


def test_loops_multiply() -> None:
    loops = "".join(
        f"%body.{n} (b: s32[]) -> s32[] {{\n{line}\n}}\n"
        f"%cond.{n} (c: s32[]) -> pred[] {{\n"
        f"  %k.{n} = s32[]{{:T(128)}} constant({rounds})\n"
        f"  ROOT %lt.{n} = pred[] compare(%i, %k.{n}), direction=LT\n}}\n"
        for n, rounds, line in (
            (1, 5, "  ROOT %g = f32[16]{0} all-gather(%b), channel_id=1"),
            (2, 3, "  ROOT %w = s32[] while(%b), condition=%cond.1, body=%body.1, metadata={}"),
        )
    )
    hlo = HEAD + loops + entry("  ROOT %w = s32[] while(%t), condition=%cond.2, body=%body.2")
    assert collectives(hlo) == {"all_gather": Collective(15, 15 * 64)}


def test_between_slices() -> None:
    hlo = HEAD + entry(
        "  %s = (bf16[128,8]{1,0:T(8,128)(2,1)}, u32[], token[]) send(%x, %a), channel_id=2, "
        'frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}',
        "  %sd = token[] send-done(%s), channel_id=2",
        "  %r = (bf16[128,8]{1,0}, u32[], token[]) recv(%a), channel_id=1",
        "  ROOT %rd = (bf16[128,8]{1,0}, token[]) recv-done(%r), channel_id=1",
    )
    assert collectives(hlo) == {"send": Collective(1, 2048), "recv": Collective(1, 2048)}
