"""Reading optimised HLO: launches and their traffic, on a hand-written module whose answers are known."""

from __future__ import annotations

from bench import hlo

MODULE = """HloModule example, is_scheduled=true

%sliced (param_0.1: f32[100,8], param_1.2: s32[]) -> f32[1,8] {
  %param_1.2 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %param_0.1 = f32[100,8]{1,0} parameter(0)
  ROOT %ds = f32[1,8]{1,0} dynamic-slice(%param_0.1, %param_1.2, %zero), dynamic_slice_sizes={1,8}
}

%updated (param_0: bf16[64,4], param_1: bf16[1,4], param_2: s32[]) -> bf16[64,4] {
  %param_0 = bf16[64,4]{1,0} parameter(0)
  %param_1 = bf16[1,4]{1,0} parameter(1)
  %param_2 = s32[] parameter(2)
  %zero.1 = s32[] constant(0)
  ROOT %dus = bf16[64,4]{1,0} dynamic-update-slice(%param_0, %param_1, %param_2, %zero.1)
}

%cheap (p: f32[8]) -> f32[8] {
  ROOT %p = f32[8]{0} parameter(0)
}

%dear (p.1: f32[8]) -> f32[8] {
  %p.1 = f32[8]{0} parameter(0)
  ROOT %sort = f32[8]{0} sort(%p.1), dimensions={0}, to_apply=%less
}

%body (state: (s32[], f32[100,8], bf16[64,4])) -> (s32[], f32[100,8], bf16[64,4]) {
  %state = (s32[], f32[100,8]{1,0}, bf16[64,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %table = f32[100,8]{1,0} get-tuple-element(%state), index=1
  %cache = bf16[64,4]{1,0} get-tuple-element(%state), index=2
  %row = f32[1,8]{1,0} fusion(%table, %i), kind=kLoop, calls=%sliced
  %copy.1 = bf16[64,4]{1,0} copy(%cache)
  %new = bf16[1,4]{1,0} custom-call(%row), custom_call_target="kernel"
  %next = bf16[64,4]{1,0} fusion(%copy.1, %new, %i), kind=kLoop, calls=%updated
  %flag = pred[] constant(true)
  %flat = f32[8]{0} bitcast(%row)
  %choice = f32[8]{0} conditional(%flag, %flat, %flat), true_computation=%dear, false_computation=%cheap
  ROOT %out = (s32[], f32[100,8]{1,0}, bf16[64,4]{1,0}) tuple(%i, %table, %next)
}

%condition (state.1: (s32[], f32[100,8], bf16[64,4])) -> pred[] {
  %state.1 = (s32[], f32[100,8]{1,0}, bf16[64,4]{1,0}) parameter(0)
  ROOT %yes = pred[] constant(true)
}

ENTRY %main (start: (s32[], f32[100,8], bf16[64,4])) -> (s32[], f32[100,8], bf16[64,4]) {
  %start = (s32[], f32[100,8]{1,0}, bf16[64,4]{1,0}) parameter(0)
  ROOT %loop = (s32[], f32[100,8]{1,0}, bf16[64,4]{1,0}) while(%start), condition=%condition, body=%body
}
"""


def test_a_loop_body_is_found_and_its_launches_are_told_apart() -> None:
    module, entry = hlo.parse(MODULE)
    assert entry == "main"
    assert hlo.while_bodies(module, entry) == [("body", "condition")]
    kernels = {k.name: k for k in hlo.kernels(module, "body")}
    # The conditional's cheaper branch launches nothing; bitcasts and tuples never do.
    assert set(kernels) == {"row", "copy.1", "new", "next"}


def test_a_slice_is_charged_the_slice_and_an_update_in_place_the_update() -> None:
    module, _ = hlo.parse(MODULE)
    kernels = {k.name: k for k in hlo.kernels(module, "body")}
    assert (kernels["row"].read, kernels["row"].written) == (32 + 4, 32)
    assert (kernels["next"].read, kernels["next"].written) == (8 + 4, 8)
    assert kernels["copy.1"].bytes == 2 * 64 * 4 * 2
    assert kernels["new"].bytes == 32 + 8


def test_an_asynchronous_pair_counts_once_and_a_loop_by_its_body() -> None:
    text = MODULE.replace(
        "%copy.1 = bf16[64,4]{1,0} copy(%cache)",
        "%start.1 = ((bf16[64,4]{1,0}), bf16[64,4]{1,0}) copy-start(%cache)\n"
        "  %copy.1 = bf16[64,4]{1,0} copy-done(%start.1)",
    )
    module, entry = hlo.parse(text)
    assert [k.name for k in hlo.kernels(module, entry)] == ["row", "start.1", "new", "next"]


def test_sizes_of_types() -> None:
    assert hlo.size("f32[2,3]{1,0}") == 24
    assert hlo.size("(bf16[4]{0}, s4[3]{0}, pred[])") == 8 + 2 + 1
    assert hlo.size("token[]") == 0
