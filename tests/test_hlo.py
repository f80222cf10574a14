"""What a compiled program sends and reads, counted from its text: forms of the text, cut down from real programs, whose bytes
are worked out by hand; and a real program on eight simulated devices.
"""

import re
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost import sharding
from jaxpost.compiled import hlo, roofline
from jaxpost.models import attention

MESH = {"data": 2, "fsdp": 4, "tensor": 1}


def program(body: str, before: str = "") -> hlo.Program:
    """A program of some computations and an entry with these lines."""
    entry = "ENTRY %main (p: f32[4]) -> f32[4] {\n" + textwrap.indent(textwrap.dedent(body).strip(), "  ") + "\n}\n"
    entry = re.sub(r'^ +(["}])', r"\1", entry, flags=re.M)  # the lines of a kernel's settings begin at the margin
    return hlo.parse(textwrap.dedent(before) + entry)


def sent(found: hlo.Program) -> dict[tuple[str, str], float]:
    """(kind, axes) -> bytes that a device sends in all."""
    total = {}
    for c in hlo.collectives(found, MESH):
        total[c.kind, c.axes] = total.get((c.kind, c.axes), 0) + c.sent * c.times
    return total


# ------------------------------------------------------------------------------------------------------------- Groups


@pytest.mark.parametrize(
    ("text", "rows", "axes"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", [[0, 1, 2, 3], [4, 5, 6, 7]], "fsdp"),
        ("replica_groups=[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]], "fsdp"),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]], "data"),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", [[0, 1, 2, 3], [4, 5, 6, 7]], "fsdp"),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0','axis_1'}", [list(range(8))], "data,fsdp"),
        (
            "replica_groups=mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_1'}",
            [[0, 4], [1, 5], [2, 6], [3, 7]],
            "data",
        ),
        ("replica_groups={}", [list(range(8))], "data,fsdp"),
        ("source_target_pairs={{0,4},{4,0}}", [[0, 4], [4, 0]], "data"),
    ],
)
def test_groups_are_read_in_every_form(text, rows, axes):
    found = hlo.groups(f", channel_id=1, {text}, use_global_device_ids=true", 8)
    assert found.tolist() == rows
    assert hlo.axes_of(found, MESH) == axes


# -------------------------------------------------------------------------------------------------------------- Loops

LOOP = """
%body (p: (u32[], f32[4])) -> (u32[], f32[4]) {{
  %p = (u32[], f32[4]) parameter(0)
  %i = u32[] get-tuple-element(%p), index=0
  %x = f32[4]{{0}} get-tuple-element(%p), index=1
  %one = u32[] constant({step})
  %add.1 = u32[] add(%i, %one)
  %add.2 = u32[] add(%add.1, %one)
  %all-reduce.1 = f32[4]{{0}} all-reduce(%x), channel_id=1, replica_groups={{{{0,1,2,3}},{{4,5,6,7}}}}, to_apply=%sum
  ROOT %t = (u32[], f32[4]) tuple(%add.2, %all-reduce.1)
}}

%cond (p: (u32[], f32[4])) -> pred[] {{
  %limit = u32[] {limit}
  %p = (u32[], f32[4]) parameter(0)
  %i = u32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}}

"""
TURN = """
    %p = f32[4]{{0}} parameter(0)
    %start = u32[] constant({start})
    %init = (u32[], f32[4]) tuple(%start, %p)
    %while.1 = (u32[], f32[4]) while(%init), condition=%cond, body=%body{rest}
    ROOT %out = f32[4]{{0}} get-tuple-element(%while.1), index=1
"""


@pytest.mark.parametrize(
    ("start", "step", "limit", "rest", "turns"),
    [
        (0, 1, "constant(8)", "", 4),  # unrolled: a turn adds one twice
        (2, 1, "constant(8)", "", 3),
        (0, 2, "constant(9)", "", 3),  # 0, 4, 8
        (0, 1, "parameter(1)", "", 1),  # only the data knows
        (0, 1, "parameter(1)", ', metadata={op_name="jit(step)/at_most_17_times/while"}', 17),
        (0, 1, "parameter(1)", ', metadata={op_name="at_most_1_times/while/body/at_most_9_times/while"}', 9),
        (0, 1, "parameter(1)", ', metadata={op_name="jit(step)/at_most_17_times/while/body/while"}', 1),  # another's scope
        (0, 1, "parameter(1)", ', backend_config={"known_trip_count":{"n":"5"}}', 5),
    ],
)
def test_a_loop_counts_as_often_as_it_turns(start, step, limit, rest, turns):
    found = program(TURN.format(start=start, rest=rest), LOOP.format(step=step, limit=limit))
    assert sent(found) == {("all-reduce", "fsdp"): turns * 2 * 16 * 3 / 4}


def test_a_comparison_inside_a_fusion_is_found():
    before = LOOP.format(step=1, limit="constant(8)").replace(
        "ROOT %lt = pred[] compare(%i, %limit), direction=LT",
        "ROOT %f = pred[] fusion(%i, %limit), kind=kLoop, calls=%fused",
    )
    fused = """
    %fused (a: u32[], b: u32[]) -> pred[] {
      %a = u32[] parameter(0)
      %b = u32[] parameter(1)
      ROOT %lt = pred[] compare(%a, %b), direction=LT
    }

    """
    found = program(TURN.format(start=0, rest=""), textwrap.dedent(fused) + before)
    assert {v.times for v in hlo.walk(found) if v.instruction.op == "all-reduce"} == {8}


# -------------------------------------------------------------------------------------------------------- Collectives

SWAP = "source_target_pairs={{0,4},{4,0}}"
FSDP = "replica_groups={{0,1,2,3},{4,5,6,7}}, use_global_device_ids=true"


def test_each_kind_sends_a_rings_share():
    found = program(f"""
    %p = f32[4]{{0}} parameter(0)
    %a = f32[16]{{0}} all-gather(%p), channel_id=1, {FSDP}, dimensions={{0}}
    %b = f32[1]{{0}} reduce-scatter(%p), channel_id=2, {FSDP}, dimensions={{0}}, to_apply=%sum
    %c = f32[4]{{0}} all-reduce(%p), channel_id=3, {FSDP}, to_apply=%sum
    %d = f32[4]{{0}} all-to-all(%p), channel_id=4, {FSDP}, dimensions={{0}}
    %e = f32[4]{{0}} all-reduce(%p), channel_id=5, replica_groups=[8,1]<=[8], to_apply=%sum
    ROOT %f = f32[4]{{0}} collective-permute(%p), channel_id=6, {SWAP}
    """)
    assert sent(found) == {
        ("all-gather", "fsdp"): 64 * 3 / 4,
        ("reduce-scatter", "fsdp"): 16 * 3 / 4,
        ("all-reduce", "fsdp"): 2 * 16 * 3 / 4,
        ("all-to-all", "fsdp"): 16 * 3 / 4,
        ("collective-permute", "data"): 16,
    }


def test_what_stands_behind_a_kernel_is_read():
    # A kernel's settings are JSON, with line breaks in them.
    found = program(f"""
    %p = f32[4]{{0}} parameter(0)
    %k = f32[4]{{0}} custom-call(%p), custom_call_target="tpu_custom_call", frontend_attributes={{kernel_metadata={{
    "metadata":"block: 512"
    }}}}, metadata={{op_name="jit(step)/splash"}}
    ROOT %a = f32[4]{{0}} all-reduce(%k), channel_id=3, {FSDP}, to_apply=%sum
    """)
    assert sent(found) == {("all-reduce", "fsdp"): 2 * 16 * 3 / 4}


def test_a_start_and_its_done_are_one():
    found = program(f"""
    %p = f32[4]{{0}} parameter(0)
    %a = (f32[4]{{0}}, f32[16]{{0}}) all-gather-start(%p), channel_id=1, {FSDP}, dimensions={{0}}
    %b = f32[16]{{0}} all-gather-done(%a)
    %c = (f32[4]{{0}}, f32[4]{{0}}, u32[], u32[]) collective-permute-start(%p), channel_id=2, {SWAP}
    ROOT %d = f32[4]{{0}} collective-permute-done(%c)
    """)
    assert sent(found) == {("all-gather", "fsdp"): 48, ("collective-permute", "data"): 16}


def test_the_pieces_of_a_hidden_collective_are_one():
    # As a TPU has it: the gather in a fusion that starts it, in one that multiplies meanwhile, and in one that ends it.
    piece = """
    %{name} (p.0: bf16[4]) -> bf16[16] {{
      %p.0 = bf16[4]{{0}} parameter(0)
      ROOT %g = bf16[16]{{0:T(256)S(1)}} all-gather(%p.0), channel_id=7, replica_groups=[2,4]<=[8], dimensions={{0}}
    }}

    """
    before = "".join(textwrap.dedent(piece).format(name=n) for n in ("start", "async_collective_fusion.1", "done"))
    found = program(
        """
        %p = bf16[4]{0} parameter(0)
        %a = bf16[16]{0} fusion(%p), kind=kCustom, calls=%start
        %b = bf16[16]{0} fusion(%p), kind=kOutput, calls=%async_collective_fusion.1
        ROOT %c = bf16[16]{0} fusion(%p), kind=kCustom, calls=%done
        """,
        before,
    )
    assert sent(found) == {("all-gather", "fsdp"): 32 * 3 / 4}


def test_a_fused_reduce_scatter_is_one():
    before = f"""
    %all-reduce-scatter.1.clone (input: f32[16]) -> f32[4] {{
      %input = f32[16]{{0}} parameter(0)
      %sum.1 = f32[16]{{0}} all-reduce(%input), channel_id=1, {FSDP}, to_apply=%add
      %zero = s32[] constant(0)
      ROOT %s = f32[4]{{0}} dynamic-slice(%sum.1, %zero), dynamic_slice_sizes={{4}}
    }}

    """
    body = """
    %p = f32[16]{0} parameter(0)
    ROOT %a = f32[4]{0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1.clone
    """
    assert sent(program(body, before)) == {("reduce-scatter", "fsdp"): 64 * 3 / 4}


def test_a_gather_of_padded_parts_is_told_from_a_sum():
    found = program(f"""
    %p = bf16[4]{{0}} parameter(0)
    %nothing = bf16[] constant(0)
    %zeros = bf16[16]{{0}} broadcast(%nothing), dimensions={{}}
    %here = s32[] constant(4)
    %padded = bf16[16]{{0}} dynamic-update-slice(%zeros, %p, %here)
    %a = bf16[16]{{0}} all-reduce(%padded), channel_id=1, {FSDP}, to_apply=%add
    ROOT %b = bf16[16]{{0}} all-reduce(%a), channel_id=2, {FSDP}, to_apply=%add
    """)
    assert sent(found) == {("all-gather as all-reduce", "fsdp"): 2 * 32 * 3 / 4, ("all-reduce", "fsdp"): 2 * 32 * 3 / 4}


def test_a_ring_of_permutes_and_the_network_between_slices_are_called_by_their_names():
    pairs = "source_target_pairs={{0,1},{1,2},{2,3},{3,0},{4,5},{5,6},{6,7},{7,4}}"
    before = f"""
    %wide.windowed_dot_general_body_rs.1.clone (p.0: f32[4]) -> f32[4] {{
      %p.0 = f32[4]{{0}} parameter(0)
      ROOT %c = f32[4]{{0}} collective-permute(%p.0), channel_id=1, {pairs}
    }}

    """
    body = """
    %p = f32[4]{0} parameter(0)
    %token = token[] after-all()
    %s = (f32[4], u32[], token[]) send(%p, %token), channel_id=3, attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
    ROOT %a = f32[4]{0} call(%p), to_apply=%wide.windowed_dot_general_body_rs.1.clone
    """
    found = program(body, before)
    assert sent(found) == {("reduce-scatter by permutes", "fsdp"): 16, ("all-reduce between slices", "slices"): 16}
    assert [c.group for c in hlo.collectives(found, MESH) if "permutes" in c.kind] == [(0, 1, 2, 3)]


# -------------------------------------------------------------------------------------------------------------- Memory


def test_memory_is_operands_and_results_and_of_slices_the_slices():
    before = """
    %reads (a.0: f32[8,4], i.0: s32[]) -> f32[4] {
      %a.0 = f32[8,4]{1,0} parameter(0)
      %i.0 = s32[] parameter(1)
      %zero.0 = s32[] constant(0)
      %d = f32[1,4]{1,0} dynamic-slice(%a.0, %i.0, %zero.0), dynamic_slice_sizes={1,4}
      ROOT %r = f32[4]{0} bitcast(%d)
    }

    %writes (a.1: f32[8,4], x.1: f32[1,4], i.1: s32[]) -> f32[8,4] {
      %a.1 = f32[8,4]{1,0} parameter(0)
      %x.1 = f32[1,4]{1,0} parameter(1)
      %i.1 = s32[] parameter(2)
      %zero.1 = s32[] constant(0)
      ROOT %u = f32[8,4]{1,0} dynamic-update-slice(%a.1, %x.1, %i.1, %zero.1)
    }

    """
    found = program(
        """
        %a = f32[8,4]{1,0} parameter(0)
        %i = s32[] constant(1)
        %near = f32[4]{0:T(128)S(1)} parameter(1)
        %row = f32[4]{0} fusion(%a, %i), kind=kLoop, calls=%reads
        %sum = f32[4]{0} add(%row, %near)
        %one = f32[1,4]{1,0} bitcast(%sum)
        ROOT %out = f32[8,4]{1,0} fusion(%a, %one, %i), kind=kLoop, calls=%writes
        """,
        before,
    )
    # A row of 16 bytes: read, with the number of 4, and written; read and written (its other term is on the chip); read, with
    # the number, and written into its place.
    assert hlo.traffic(found) == (16 + 4 + 16) + (16 + 16) + (16 + 4 + 16)


def test_what_is_written_in_places_or_moved_to_the_chip_counts_what_moves():
    scatter = """
    %scatters (c.0: f32[8,4], p.0: s32[2,1], x.0: f32[2,4]) -> f32[8,4] {
      %c.0 = f32[8,4]{1,0} parameter(0)
      %p.0 = s32[2,1]{1,0} parameter(1)
      %x.0 = f32[2,4]{1,0} parameter(2)
      ROOT %s = f32[8,4]{1,0} scatter(%c.0, %p.0, %x.0), update_window_dims={1}
    }

    """
    found = program(
        """
        %c = f32[8,4]{1,0} parameter(0)
        %p = s32[2,1]{1,0} parameter(1)
        %x = f32[2,4]{1,0} parameter(2)
        %here = f32[8,4]{1,0:S(1)} parameter(3)
        %s.1 = f32[8,4]{1,0} fusion(%c, %p, %x), kind=kCustom, calls=%scatters
        %s.2 = f32[8,4]{1,0} scatter(%s.1, %p, %x), update_window_dims={1}
        %g = f32[2,4]{1,0} gather(%s.2, %p), offset_dims={1}
        %part = ((f32[8,4]{1,0}), f32[2,4]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%s.2), slice={[0:2], [0:4]}
        %part.1 = f32[2,4]{1,0:S(1)} slice-done(%part)
        %out = (f32[8,4]{1,0}, f32[8,4]{1,0:S(1)}, u32[]{:S(2)}) copy-start(%here)
        ROOT %out.1 = f32[8,4]{1,0} copy-done(%out)
        """,
        textwrap.dedent(scatter),
    )
    written = 2 * 4 * 4  # two rows
    # The fusion and the scatter read and write rows, the gather too; then half as much onto the chip, and all of it back.
    assert hlo.traffic(found) == (8 + 2 * written) + 2 * written + 2 * written + written + 8 * 4 * 4


# ------------------------------------------------------------------------------------------------- A program on devices


def test_a_real_program_sends_what_its_shapes_say():
    mesh, layers, width, rows = sharding.make_mesh(2, 4, 1), 5, 16, 16
    tree = {"mlp": {"up": {"kernel": jax.ShapeDtypeStruct((layers, width, width), jnp.float32)}}}
    tree = sharding.placed(tree, sharding.stored(mesh, tree))
    batch = sharding.batch_shapes({"x": jax.ShapeDtypeStruct((rows, width), jnp.float32)}, mesh)["x"]

    def loss(tree, x):
        def layer(x, w):
            return jnp.tanh(x @ sharding.gather({"mlp": {"up": {"kernel": w}}})["mlp"]["up"]["kernel"]), None

        return jnp.sum(jax.lax.scan(layer, x, tree["mlp"]["up"]["kernel"])[0])

    with sharding.use(mesh):
        found = jax.jit(loss).lower(tree, batch).compile().as_text()
        assert sent(hlo.parse(found)) == {
            ("all-gather", "fsdp"): layers * width * width * 4 * 3 / 4,
            ("all-reduce", "data,fsdp"): 2 * 4 * 7 / 8,
        }
        # Of the whole batch, forward: L products of [B,D] x [D,D].
        assert roofline.flops(jax.jit(loss).trace(tree, batch).jaxpr) == layers * 2 * rows * width * width


# --------------------------------------------------------------------------------------------------------------- FLOPs


def traced(fn, *shapes):
    return roofline.flops(jax.jit(fn).trace(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)).jaxpr)


PRODUCT = 2 * 3 * 5 * 5


def chain(x, w):
    return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=7)[0]


def test_products_count_through_loops_gradients_and_recomputation():
    assert traced(chain, (3, 5), (5, 5)) == 7 * PRODUCT
    gradient = jax.grad(lambda w, x: jnp.sum(chain(x, w)))
    assert traced(gradient, (5, 5), (3, 5)) == 3 * 7 * PRODUCT
    again = jax.value_and_grad(lambda w, x: jnp.sum(jax.checkpoint(lambda x: jnp.tanh(jnp.tanh(x @ w) @ w))(x)))
    # Three for each of two, less the gradient of x, and once more what the backward pass needs of the forward one.
    assert traced(again, (5, 5), (3, 5)) == (6 - 1 + 2) * PRODUCT


def test_what_is_never_used_costs_nothing():
    assert traced(lambda x, w: (chain(x, w), x @ w)[1], (3, 5), (5, 5)) == PRODUCT


def test_a_loop_may_say_how_often_it_turns_at_most():
    def loop(x, w, times):
        return jax.lax.fori_loop(0, times.astype(jnp.int32), lambda _, x: jnp.tanh(x @ w), x)

    def scoped(x, w, times):
        with jax.named_scope("at_most_6_times"):
            return loop(x, w, times)

    def bounded(x, w, times):
        return jax.lax.while_loop(lambda c: (c[0] < 9) & (c[0] < times), lambda c: (c[0] + 1, c[1] @ w), (0, x))[1]

    assert traced(loop, (3, 5), (5, 5), ()) == PRODUCT
    assert traced(scoped, (3, 5), (5, 5), ()) == 6 * PRODUCT
    assert traced(bounded, (3, 5), (5, 5), ()) == 9 * PRODUCT


def test_ragged_products_meet_one_group_a_row():
    def experts(x, w, sizes):
        return jax.lax.ragged_dot(x, w, sizes.astype(jnp.int32))

    forward = 2 * 12 * 5 * 6
    assert traced(experts, (12, 5), (4, 5, 6), (4,)) == forward
    gradient = jax.grad(lambda w, x, sizes: jnp.sum(experts(x, w, sizes) ** 2), argnums=(0, 1))
    assert traced(gradient, (4, 5, 6), (12, 5), (4,)) == 3 * forward


def test_a_convolution_counts_its_window_and_a_choice_the_larger():
    convolved = 2 * 5 * 4 * 3 * 2  # five channels at four places, of three channels over two places
    assert traced(lambda x, k: jax.lax.conv(x, k, (1,), "VALID"), (1, 3, 5), (5, 3, 2)) == convolved
    choice = lambda x, w: jax.lax.cond(x[0, 0] > 0, lambda: chain(x, w), lambda: x @ w)  # noqa: E731
    assert traced(choice, (3, 5), (5, 5)) == 7 * PRODUCT


def test_a_shards_work_counts_for_all_of_them():
    mesh = sharding.make_mesh(2, 4, 1)
    with sharding.use(mesh):
        fn = jax.jit(lambda x, w: sharding.by_rows(lambda x, w: x @ w, (x,), [w], ("DF",)))
        shapes = [jax.ShapeDtypeStruct(s, np.float32) for s in ((16, 5), (5, 5))]
        assert roofline.flops(fn.trace(*shapes).jaxpr) == 2 * 16 * 5 * 5


@pytest.mark.parametrize(("window", "blocks"), [(None, 1 + 2 + 3 + 4), (128, 1 + 2 + 2 + 2), (200, 1 + 2 + 3 + 3)])
def test_a_kernel_counts_the_blocks_that_its_mask_leaves(window, blocks):
    rows, heads, length, width, block = 2, 4, 2048, 128, 512
    shapes = [(rows, length, heads, width), (rows, heads, length, width), (rows, heads, length, width)]
    arguments = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in shapes] + [jax.ShapeDtypeStruct((rows, length), jnp.int32)]
    window = window and window * block // 128  # whole blocks, or a little more
    product = 2 * rows * heads * block * block * width

    def attend(q, k, v, segments):
        return jnp.sum(attention.splash(q, k, v, segments, window=window).astype(jnp.float32))

    assert roofline.flops(jax.jit(attend).trace(*arguments).jaxpr) == 2 * blocks * product
    # Backward: scores again in each of two kernels, then three products and two; and each output times its cotangent.
    gradient = jax.jit(jax.grad(attend, argnums=(0, 1, 2)))
    least = 2 * rows * heads * length * width
    assert roofline.flops(gradient.trace(*arguments).jaxpr) == (2 + 4 + 3) * blocks * product + least
