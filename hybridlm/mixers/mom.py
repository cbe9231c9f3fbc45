"""Mixture of Memories (Du et al. 2025, arXiv 2502.13685) over a linear mixer: tokens choose among states.

p = softmax(W_r x),  w_m = p_m / sum of p over the top_k chosen memories,  o_t = sum_m w_m o_t^m [+ shared_t]
Each memory is the mixer on its own tokens alone, as if the others were not there: its short convolutions
run over them, and a token that goes elsewhere leaves its state as it is. It has its own projections of keys,
values and gates; those of q, of the output and its gate, the convolutions and all vectors are one for all.
The shared memory, of every token, has its own ones, too. The norm and gate of the output act on the sum.

A memory is a row of its own, its tokens moved to the front: documents stay apart, the op runs on memories
times batch rows, and no capacity bounds a memory. For its convolutions it keeps its last inputs x.
"""

import dataclasses
from typing import Annotated, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from hybridlm import over
from hybridlm.context import Context
from hybridlm.convert.fields import Fields
from hybridlm.convert.public import Format, grouped, grouped_fields, linears
from hybridlm.convert.rules import Rule, linear, norm, same, short_convs
from hybridlm.errors import ConfigError
from hybridlm.fields import Limits, NonNegative, Positive
from hybridlm.layers import Linear, RecurrentCache
from hybridlm.linear_mixer import Inputs
from hybridlm.mixers import Cost, Site, TokenMixer
from hybridlm.routed_rows import Packed, pack
from hybridlm.rows import Rows


@dataclasses.dataclass(frozen=True)
class Config(over.Config):
    """Mixture of Memories.

    memories: to choose from.  top_k: that each token goes to.  shared: whether there is one of every token.
    single_kv: keys and values of all memories are of one projection each.
    single_gates: with it, their gates, too: memories differ by the tokens that they get alone (FLA).
    balance_loss: weight of the load-balancing loss, of each microbatch (train.microbatches) by itself.
    """

    memories: Annotated[int, Limits(1, 256)] = 4
    top_k: Positive = 2
    shared: bool = True
    single_kv: bool = False
    single_gates: bool = False
    balance_loss: NonNegative = 0.01

    def check(self, d_model: int) -> None:
        if self.top_k > self.memories:
            raise ConfigError("top_k", self.top_k, f"must be at most memories = {self.memories}")
        if self.single_gates and not self.single_kv:
            raise ConfigError("single_gates", True, "goes with single_kv alone")

    def joined(self, known: Any) -> Any:
        joined = super().joined(known)
        if getattr(joined.part, "rope_theta", 0):
            raise ConfigError("of", self.of, "rotates by position, which a memory's tokens have none of")
        return joined

    def cost(self, d_model: int, context: int) -> Cost:
        one, matrix = self.part.cost(d_model, context), self.matrix(d_model)
        kept = matrix + max(self.part.conv_size - 1, 0) * d_model
        rows = self.memories + self.shared  # the op goes through all, also where a memory has no token
        return Cost(self.memories * kept + self.shared * one.state, 0, rows * one.flops)


OF = "gated_delta_net"  # what a memory of FLA's is


def _fla_read(fields: Fields, d_model: int, eps: float) -> dict[str, Any]:
    fields.only("mom_backend", "gated_deltanet")
    single = fields.get("single_kv_proj", False)  # there one of the memories' gates, too
    fields.only("use_short_conv", True)
    fields.ignore("capacity", "use_layer_wise_balance")  # which FLA 0.6 reads nowhere
    top_k = fields.get("topk", 2)
    gate = "swish" if fields.get("use_output_gate", True) else "none"
    memory = grouped(fields, heads=4, head_dim=256, expand_v=1.0) | {"output_gate": gate, "norm_eps": eps}
    return {
        "of": (OF, memory),
        "memories": fields.get("num_memories", 4),
        "top_k": top_k,
        "shared": fields.get("shared_mem", True),
        "single_kv": single,
        "single_gates": single,
        # FLA's loss is not divided by the choices a token
        "balance_loss": float(f"{fields.get('aux_loss_scale', 0.01) * top_k:.12g}"),
    }


def _fla_write(config: "Config", d_model: int) -> dict[str, Any]:
    memory = config.part
    if memory.kind != OF:
        raise ConfigError("of", memory.kind, f"FLA's mom is made over {OF} alone")
    if memory.num_v_heads != memory.num_heads:
        raise ConfigError(
            "num_v_heads", memory.num_v_heads, f"is num_heads = {memory.num_heads} in FLA's mom"
        )
    for name, value, said in (
        (
            "single_kv",
            config.single_kv and not config.single_gates,
            "FLA's mom shares the projections of gates, too, where it shares these",
        ),
        ("neg_eigval", memory.neg_eigval, "FLA's mom has beta in (0, 1) alone"),
        ("output_gate", memory.output_gate in ("sigmoid", "linear"), "FLA's mom has swish or none"),
    ):
        if value:
            raise ConfigError(name, value, said)
    sizes = grouped_fields(memory)
    del sizes["num_v_heads"], sizes["allow_neg_eigval"]
    return sizes | {
        "use_output_gate": memory.output_gate == "swish",
        "num_memories": config.memories,
        "topk": config.top_k,
        "shared_mem": config.shared,
        "single_kv_proj": config.single_kv,
        "aux_loss_scale": config.balance_loss / config.top_k,
        "mom_backend": "gated_deltanet",
    }


def _fla_rules(config: "Config", d_model: int) -> list[Rule]:
    memory = config.part
    common = [*linears("qo" + "g" * (memory.output_gate != "none")), norm("o_norm", "o_norm")]
    common += [
        *short_convs("qkv", "qkv", memory.conv_size),
        *(same(one, one) for one in ("A_log", "dt_bias")),
    ]
    first = "inner." if config.shared else "memories.0."
    found = [linear("router", "gate"), *(rule.under(first, "") for rule in common)]
    for one in "kvba":
        if config.single_kv:
            found.append(linear(f"{first}{one}_proj", f"shared_{one}"))
            continue
        found += [linear(f"inner.{one}_proj", f"shared_{one}")] * config.shared
        found += [linear(f"memories.{m}.{one}_proj", f"{one}_proj.{m}") for m in range(config.memories)]
    return found


class Cache(NamedTuple):
    """states: [B, M, HV, K, V] float32.  inputs: the last x of each memory [B, M, taps - 1, D].
    shared: the mixer's own cache, or ()."""

    states: jax.Array
    inputs: jax.Array
    shared: Any


SHARED = ("q_proj", "g_proj", "g_a_proj", "g_b_proj", "o_proj")  # of the projections


class Mixer(TokenMixer):
    """inner: the shared memory. What memories have in common is one module in all of them."""

    config_class = Config
    public: ClassVar = {"fla": Format(_fla_read, _fla_write, _fla_rules, "attn.", "mom", "Mom")}

    def __init__(self, config: Config, site: Site, *, rngs: nnx.Rngs):
        self.config = config
        make = lambda: over.make(config.part, site, rngs)
        self.router = Linear(site.d_model, config.memories, rngs=rngs, axes=("embed", None), cast=False)
        if config.shared:
            self.inner = make()
        self.memories = nnx.List(make() for _ in range(config.memories))
        for memory in self.memories:
            parts = {
                n: part for n, part in vars(memory).items() if isinstance(part, nnx.Module | nnx.Variable)
            }
            common = SHARED + ("k_proj", "v_proj") * config.single_kv
            shared = [n for n, p in parts.items() if n in common or type(p) is not Linear]
            over.share(memory, self._first, list(parts) if config.single_gates else shared)

    @property
    def _first(self) -> Any:
        return self.inner if self.config.shared else self.memories[0]

    def __call__(
        self, x_BTD: jax.Array, context: Context, cache: Cache | None = None
    ) -> tuple[jax.Array, Cache | None]:
        config, rows = self.config, context.rows
        choice = over.choose(self.router, x_BTD, context, config.top_k, config.balance_loss)
        weight = choice.weight / choice.weight.sum(-1, keepdims=True)
        weight_BTM = over.Choice(choice.chosen, weight).spread(config.memories)
        before = self.init_cache(len(x_BTD), 0, x_BTD.dtype) if cache is None else cache
        packed = pack(jnp.moveaxis(weight_BTM > 0, 2, 1), rows, before.inputs.shape[2])
        x_BMTD = jnp.concatenate([before.inputs, packed.gather(x_BTD)], axis=2)
        many = []
        for m, memory in enumerate(self.memories):
            one = dataclasses.replace(context, rows=jax.tree.map(lambda x, m=m: x[:, m], packed.rows))
            many.append(memory.prepare(x_BMTD[:, m], one, None)[0])
        o, states = self._recur(many, packed, None if cache is None else cache.states)
        total = jnp.einsum("btm,bmthv->bthv", weight_BTM, packed.scatter(o))
        shared: Any = ()
        if config.shared:
            own = None if cache is None else cache.shared
            inputs, history = self.inner.prepare(x_BTD, context, None if own is None else own.history)
            o, state = self.inner.recur(inputs, rows, None if own is None else own.state)
            total += over.read(inputs, o)
            shared = RecurrentCache(state, history)
        y_BTD = self._first.finish(
            x_BTD, many[0]._replace(skip=None, gate=None), total.astype(many[0].v.dtype)
        )
        return y_BTD, None if cache is None else Cache(states, packed.last(x_BMTD), shared)

    def _recur(self, many: list[Inputs], packed: Packed, states: Any) -> tuple[jax.Array, Any]:
        """(o float32 [B, M, T, HV, V], the states) of what each memory's tokens were prepared as."""
        kept = packed.last_at.shape[2]
        both = lambda x: x.reshape(-1, *x.shape[2:])
        inputs = jax.tree.map(lambda *each: both(jnp.stack(each, axis=1))[:, kept:], *many)
        inputs = over.weighed(inputs, both(packed.valid).astype(jnp.float32))
        rows = Rows(*(both(x)[:, kept:] for x in packed.rows))
        o, after = self._first.recur(inputs, rows, None if states is None else both(states))
        apart = lambda x: x.reshape(*packed.order.shape[:2], *x.shape[1:])
        if states is not None:
            after = jnp.where(packed.goes_on[..., None, None, None], apart(after), 0)
        return apart(over.read(inputs, o)), after

    def init_cache(self, batch: int, max_length: int, dtype: Any) -> Cache:
        own, count = self._first.init_cache(batch, max_length, dtype), self.config.memories
        states = jnp.zeros((batch, count, *own.state.shape[1:]), jnp.float32)
        taps, width = max(self.config.part.conv_size - 1, 0), self.router.kernel.shape[0]
        inputs = jnp.zeros((batch, count, taps, width), dtype)
        return Cache(states, inputs, own if self.config.shared else ())
