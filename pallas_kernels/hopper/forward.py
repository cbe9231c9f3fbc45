"""The forward pass with no decay or one decay per head, additive or delta: two kernels.

`chunk_inverses` (delta only; every chunk on its own): A = (I + L)^-1 with
    L_ij = beta_i k_i.k_j exp(G_i - G_j), j < i, pairs of one document.
`scan` (one block of threads per sequence, value head and slice of V; chunks in order): with S the state before the
chunk, e_i = exp(G_i) where token i belongs to the document that enters the chunk, else 0, and f_j = exp(G_C - G_j)
where token j belongs to the document that leaves it, else 0,
    V' = A beta (V - e K S)     (additive: V' = V)
    o  = scale (e Q S + P V'),  P_ij = q_i.k_j exp(G_i - G_j), j <= i, pairs of one document
    S <- exp(G_C) [one document] S + (f K)^T V'.
W = A beta e K and U = A beta V, the usual intermediates of the delta rule, never exist.

Two or one warpgroups hold S^T, 64 values by K, in registers; one computes P and the vectors e, f a chunk ahead; one
issues the copies.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.call import Call
from pallas_kernels.hopper import blocks
from pallas_kernels.hopper.blocks import C, F32

AHEAD = 2  # chunks whose P and vectors may wait for the state warpgroups
SMEM_BYTES = 227 * 1024


class Registers(NamedTuple):
    """Registers a thread of each warpgroup: 65,536 in all, in steps of 8."""

    state: int
    prepare: int
    copy: int


REGISTERS = {1: Registers(232, 232, 40), 2: Registers(192, 104, 24)}  # by warpgroups that hold state


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What the kernels read; T is padded to whole chunks, numbers per token are head-major float32.

    q, k: [B, T, H, K] bf16.  v: [B, T, HV, V] bf16.  log_decay, beta: None or [B, HV, T].
    segment: None or [B, T] float32 (document numbers below 2^24).  state: None or S_0^T [B, HV, V, K] float32.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    log_decay: jax.Array | None
    beta: jax.Array | None
    segment: jax.Array | None
    state: jax.Array | None
    scale: float
    l2norm: bool
    interpret: bool

    @property
    def vectors(self) -> list[jax.Array]:
        return [x for x in (self.log_decay, self.beta, self.segment) if x is not None]


def prepare(call: Call) -> Inputs:
    """Pads T to whole chunks (tokens with k = v = beta = 0 and no decay change nothing) and lays vectors out."""
    length = blocks.round_up(call.q.shape[1])
    head_major = lambda x: None if x is None else blocks.head_major(x, length)  # noqa: E731
    segment, state = call.segment_ids, call.initial_state
    return Inputs(
        q=blocks.pad_time(call.q, length),
        k=blocks.pad_time(call.k, length),
        v=blocks.pad_time(call.v, length),
        log_decay=head_major(call.log_decay),
        beta=head_major(call.beta),
        segment=None if segment is None else blocks.pad_time(segment, length, "edge").astype(F32),
        state=None if state is None else jnp.swapaxes(state, 2, 3),
        scale=call.scale,
        l2norm=call.qk_l2norm,
        interpret=call.interpret,
    )


class Vectors:
    """The rows of a shared-memory buffer [slots, rows, C] that hold a chunk's inputs per token."""

    def __init__(self, inputs: Inputs):
        names = ("log_decay", "beta", "segment")
        self.names = [name for name in names if getattr(inputs, name) is not None]

    def copy(self, refs: list, buffer: Any, barrier: Any, b: Any, head: Any, rows: Any) -> None:
        for row, (name, ref) in enumerate(zip(self.names, refs)):
            source = ref.at[b, rows] if name == "segment" else ref.at[b, head, rows]
            plgpu.copy_gmem_to_smem(source, buffer.at[row], barrier)

    def get(self, name: str, buffer: Any) -> Any:
        return buffer.at[self.names.index(name)] if name in self.names else None


def chunk_inverses(inputs: Inputs) -> jax.Array:
    """A [B, HV, T, C] in bf16: row i of each chunk's inverse at token i."""
    batch, length, heads, key_dim = inputs.k.shape
    value_heads = inputs.v.shape[2]
    group = value_heads // heads
    vectors = Vectors(inputs)
    interpret = inputs.interpret

    def body(*refs: Any, k_s: Any, in_s: Any, sum_s: Any, x_s: Any, y_s: Any, a_s: Any, ready: Any) -> None:
        k_ref, *vector_refs, a_ref = refs
        b, head, n = (lax.axis_index(name) for name in ("b", "h", "n"))
        rows = pl.ds(n * C, C)
        plgpu.copy_gmem_to_smem(k_ref.at[b, rows, blocks.div(head, group)], k_s, ready)
        vectors.copy(vector_refs, in_s, ready, b, head, rows)
        plgpu.barrier_wait(ready)

        sums = segment = None
        if inputs.log_decay is not None:
            steps = blocks.col_vector(vectors.get("log_decay", in_s)) * blocks.LOG2E
            sum_row = blocks.cumulative(steps)
            sum_s.at[0][...] = sum_row
            sums = sum_row, blocks.col_vector(sum_s.at[0])
        if inputs.segment is not None:
            ids = vectors.get("segment", in_s)
            segment = blocks.row_vector(ids), blocks.col_vector(ids)
        row_scale = blocks.row_vector(vectors.get("beta", in_s))
        lower = blocks.matmul((k_s, k_s.T), interpret=interpret)
        if inputs.l2norm:
            norm = blocks.inverse_norm(blocks.tile(k_s))
            sum_s.at[1][...] = norm
            row_scale *= norm
            lower *= blocks.by_col(blocks.col_vector(sum_s.at[1]))
        keep = blocks.causal(strict=True, segment=segment)
        lower *= blocks.by_row(row_scale) * blocks.pair_decay(keep, sums)
        inverse = blocks.unit_lower_inverse(lower, x_s, y_s, interpret=interpret)
        a_s[...] = inverse.astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(a_s, a_ref.at[b, head, rows])
        plgpu.wait_smem_to_gmem(0)

    return blocks.kernel(
        body,
        name="chunk_inverses",
        interpret=interpret,
        out_type=jax.ShapeDtypeStruct((batch, value_heads, length, C), jnp.bfloat16),
        grid=(batch, value_heads, length // C),
        grid_names=("b", "h", "n"),
        scratch_types=dict(
            k_s=blocks.smem((C, key_dim), jnp.bfloat16),
            in_s=plgpu.SMEM((len(vectors.names), C), F32),
            sum_s=plgpu.SMEM((2, C), F32),
            x_s=blocks.smem((C, C), jnp.float16),
            y_s=blocks.smem((C, C), jnp.float16),
            a_s=blocks.smem((C, C), jnp.bfloat16),
            ready=plgpu.Barrier(num_arrivals=1 + len(vectors.names)),
        ),
    )(inputs.k, *inputs.vectors)


def scan(
    inputs: Inputs, inverses: jax.Array | None, *, value_tile: int, final_state: bool, chunk_states: bool
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """o [B, T, HV, V] bf16, final S^T [B, HV, V, K] float32, and S^T before each chunk [B, HV, T/C, V, K] bf16."""
    batch, length, heads, key_dim = inputs.k.shape
    value_heads, value_dim = inputs.v.shape[2:]
    group = value_heads // heads
    chunks = length // C
    tiles = value_tile // C  # warpgroups that hold state
    registers = REGISTERS[tiles]
    delta = inverses is not None
    vectors = Vectors(inputs)
    interpret = inputs.interpret
    bf16 = jnp.bfloat16

    stage = 2 * (2 * C * key_dim + tiles * C * C + delta * C * C)
    fixed = 2 * (AHEAD * C * C + tiles * C * C + chunk_states * tiles * C * key_dim) + 16 * 1024
    stages = max(2, min(4, chunks, (SMEM_BYTES - fixed) // stage))

    out_type = [jax.ShapeDtypeStruct((batch, length, value_heads, value_dim), bf16)]
    if final_state:
        out_type.append(jax.ShapeDtypeStruct((batch, value_heads, value_dim, key_dim), F32))
    if chunk_states:
        out_type.append(jax.ShapeDtypeStruct((batch, value_heads, chunks, value_dim, key_dim), bf16))
    copies = 2 + tiles + delta + len(vectors.names)
    scratch = dict(
        q_s=blocks.smem((stages, C, key_dim), bf16),
        k_s=blocks.smem((stages, C, key_dim), bf16),
        v_s=blocks.smem((stages, tiles, C, C), bf16),
        a_s=blocks.smem((stages, C, C), bf16) if delta else None,
        in_s=plgpu.SMEM((stages, max(1, len(vectors.names)), C), F32),
        gate_s=plgpu.SMEM((AHEAD, 6, C), F32),
        p_s=blocks.smem((AHEAD, C, C), bf16),
        o_s=blocks.smem((tiles, C, C), bf16),
        h_s=blocks.smem((tiles, C, key_dim), bf16) if chunk_states else None,
        filled=plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
        free=plgpu.Barrier(num_arrivals=tiles + 1, num_barriers=stages),
        p_ready=plgpu.Barrier(num_barriers=AHEAD),
        p_free=plgpu.Barrier(num_arrivals=tiles, num_barriers=AHEAD),
        done=plgpu.Barrier(num_arrivals=tiles + 2),
    )
    scratch = {name: value for name, value in scratch.items() if value is not None}

    def body(*refs: Any, **s: Any) -> None:
        refs = list(refs)
        q_ref, k_ref, v_ref = (refs.pop(0) for _ in range(3))
        vector_refs = [refs.pop(0) for _ in vectors.names]
        a_ref = refs.pop(0) if delta else None
        initial_ref = refs.pop(0) if inputs.state is not None else None
        o_ref = refs.pop(0)
        final_ref = refs.pop(0) if final_state else None
        h_ref = refs.pop(0) if chunk_states else None
        b, head, value_block = (lax.axis_index(name) for name in ("b", "h", "v"))
        wg = lax.axis_index("wg")
        key_head = blocks.div(head, group)

        def fill(n: Any, slot: Any) -> None:
            rows, barrier = pl.ds(n * C, C), s["filled"].at[slot]
            plgpu.copy_gmem_to_smem(k_ref.at[b, rows, key_head], s["k_s"].at[slot], barrier)
            plgpu.copy_gmem_to_smem(q_ref.at[b, rows, key_head], s["q_s"].at[slot], barrier)
            for i in range(tiles):
                columns = pl.ds(value_block * value_tile + i * C, C)
                plgpu.copy_gmem_to_smem(v_ref.at[b, rows, head, columns], s["v_s"].at[slot, i], barrier)
            if delta:
                plgpu.copy_gmem_to_smem(a_ref.at[b, head, rows], s["a_s"].at[slot], barrier)
            vectors.copy(vector_refs, s["in_s"].at[slot], barrier, b, head, rows)

        def hold_state() -> None:
            first = value_block * value_tile + wg * C
            columns = pl.ds(first, C)
            if initial_ref is None:
                state = blocks.zeros((C, key_dim))
            else:
                state = plgpu.load(initial_ref.at[b, head, columns], layout=blocks.WGMMA, optimized=False)

            def step(n: Any, state: jax.Array) -> jax.Array:
                slot, ahead = blocks.rem(n, stages), blocks.rem(n, AHEAD)
                k_s, q_s, gate_s = s["k_s"].at[slot], s["q_s"].at[slot], s["gate_s"].at[ahead]
                state_lo = state.astype(bf16)
                if chunk_states:
                    plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # the previous chunk's state has left h_s
                    s["h_s"].at[wg][...] = state_lo
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(s["h_s"].at[wg], h_ref.at[b, head, n, columns])
                plgpu.barrier_wait(s["filled"].at[slot])
                if delta:
                    seen, o = blocks.matmul((state_lo, k_s.T), (state_lo, q_s.T), interpret=interpret)
                    plgpu.barrier_wait(s["p_ready"].at[ahead])
                    beta = blocks.col_vector(vectors.get("beta", s["in_s"].at[slot]))
                    value = (blocks.tile(s["v_s"].at[slot, wg].T) - seen * blocks.by_col(blocks.col_vector(gate_s.at[0]))) * blocks.by_col(beta)
                    value = blocks.matmul((value.astype(bf16), s["a_s"].at[slot].T), interpret=interpret)
                else:
                    o = blocks.matmul((state_lo, q_s.T), interpret=interpret)
                    plgpu.barrier_wait(s["p_ready"].at[ahead])
                    value = blocks.tile(s["v_s"].at[slot, wg].T)
                kept = (value * blocks.by_col(blocks.col_vector(gate_s.at[2]))).astype(bf16)
                o, state = blocks.matmul(
                    (value.astype(bf16), s["p_s"].at[ahead].T, o * blocks.by_col(blocks.col_vector(gate_s.at[1]))),
                    (kept, k_s, state * gate_s[3, 0]),
                    interpret=interpret,
                )
                plgpu.wait_smem_to_gmem(1 if chunk_states else 0, wait_read_only=True)
                s["o_s"].at[wg].T[...] = o.astype(bf16)
                plgpu.commit_smem()  # before the arrivals: TMA may then overwrite what was read here
                plgpu.barrier_arrive(s["p_free"].at[ahead])
                plgpu.barrier_arrive(s["free"].at[slot])
                plgpu.copy_smem_to_gmem(s["o_s"].at[wg], o_ref.at[b, pl.ds(n * C, C), head, columns])
                return state

            state = lax.fori_loop(0, chunks, step, state)
            if final_state:
                final_ref.at[b, head, columns][...] = state
            plgpu.wait_smem_to_gmem(0)

        def prepare_chunk() -> None:
            def step(n: Any, incoming: jax.Array) -> jax.Array:
                slot, ahead = blocks.rem(n, stages), blocks.rem(n, AHEAD)
                k_s, q_s, in_s, gate_s = (
                    s["k_s"].at[slot],
                    s["q_s"].at[slot],
                    s["in_s"].at[slot],
                    s["gate_s"].at[ahead],
                )
                plgpu.barrier_wait(s["filled"].at[slot])

                @pl.when(n >= AHEAD)
                def _() -> None:
                    plgpu.barrier_wait(s["p_free"].at[ahead])

                sums = segment = None
                outgoing = incoming
                one = plgpu.layout_cast(jnp.full((C,), 1.0, F32), blocks.ROWS)
                enter = leave = one
                carried = 1.0
                if inputs.log_decay is not None:
                    steps = blocks.col_vector(vectors.get("log_decay", in_s)) * blocks.LOG2E
                    sum_row = blocks.cumulative(steps)
                    gate_s.at[4][...] = sum_row
                    sums = sum_row, blocks.col_vector(gate_s.at[4])
                    last = gate_s[4, C - 1]
                    enter, leave, carried = jnp.exp2(sum_row), jnp.exp2(last - sum_row), jnp.exp2(last)
                if inputs.segment is not None:
                    ids = vectors.get("segment", in_s)
                    segment = blocks.row_vector(ids), blocks.col_vector(ids)
                    outgoing = ids[C - 1]
                    enter = jnp.where(segment[0] == incoming, enter, 0.0)
                    leave = jnp.where(segment[0] == outgoing, leave, 0.0)
                    carried = jnp.where(incoming == outgoing, carried, 0.0)
                k_norm = blocks.inverse_norm(blocks.tile(k_s)) if inputs.l2norm else one
                q_norm = blocks.inverse_norm(blocks.tile(q_s)) if inputs.l2norm else one
                q_norm *= inputs.scale
                gate_s.at[0][...] = enter * k_norm
                gate_s.at[1][...] = enter * q_norm
                gate_s.at[2][...] = leave * k_norm
                gate_s.at[3][...] = one * carried
                scores = blocks.matmul((q_s, k_s.T), interpret=interpret) * blocks.by_row(q_norm)
                if inputs.l2norm:
                    gate_s.at[5][...] = k_norm
                    scores *= blocks.by_col(blocks.col_vector(gate_s.at[5]))
                scores *= blocks.pair_decay(blocks.causal(strict=False, segment=segment), sums)
                s["p_s"].at[ahead][...] = scores.astype(bf16)
                plgpu.commit_smem()
                plgpu.barrier_arrive(s["p_ready"].at[ahead])
                plgpu.barrier_arrive(s["free"].at[slot])
                return outgoing

            lax.fori_loop(0, chunks, step, jnp.float32(0.0))  # document 0 enters the first chunk
            for n in range(max(chunks - AHEAD, 0), chunks):
                plgpu.barrier_wait(s["p_free"].at[n % AHEAD])

        def issue_copies() -> None:
            for n in range(min(stages, chunks)):
                fill(n, n)

            @pl.loop(stages, chunks)
            def _(n: Any) -> None:
                slot = blocks.rem(n, stages)
                plgpu.barrier_wait(s["free"].at[slot])
                fill(n, slot)

            for n in range(max(chunks - stages, 0), chunks):
                plgpu.barrier_wait(s["free"].at[n % stages])

        @pl.when(wg < tiles)
        def _() -> None:
            plgpu.set_max_registers(registers.state, action="increase")
            hold_state()

        @pl.when(wg == tiles)
        def _() -> None:
            plgpu.set_max_registers(registers.prepare, action="decrease" if tiles == 2 else "increase")
            prepare_chunk()

        @pl.when(wg == tiles + 1)
        def _() -> None:
            plgpu.set_max_registers(registers.copy, action="decrease")
            issue_copies()

        blocks.finish_together(s["done"])

    out = blocks.kernel(
        body,
        name="delta_scan" if delta else "additive_scan",
        interpret=interpret,
        out_type=out_type,
        grid=(batch, value_heads, value_dim // value_tile),
        grid_names=("b", "h", "v"),
        num_threads=tiles + 2,
        thread_name="wg",
        scratch_types=scratch,
    )(inputs.q, inputs.k, inputs.v, *inputs.vectors, *[x for x in (inverses, inputs.state) if x is not None])
    out = list(out)
    o = out.pop(0)
    return o, out.pop(0) if final_state else None, out.pop(0) if chunk_states else None
