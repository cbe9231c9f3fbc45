"""Patterns as data: a masked stack computes what `hybridlm.model` does with the same parameters."""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import ratio_study
from hybridlm import member
from hybridlm import model as lm
from launch import grid
from launch.grid import Sweep, axis

HEADS = {"num_heads": 2, "head_dim": 8}


def test_masked_stack_is_the_model():
    mixer = "hgrn2"  # which has parameters of the whole stack besides
    fields = {f"mixers.{name}.{key}": value for name in (mixer, "full") for key, value in HEADS.items()}
    sizes = {
        "model.num_layers": 4,
        "model.d_model": 32,
        "model.vocab_size": 40,
        "data.slices": "",
        "data.num_pairs": 4,
    }
    sizes |= {"train.seq_len": 32, "train.batch_size": 2}
    runs = grid.runs(
        Sweep(
            "configs/mqar.py",
            [axis("ratio", "pure", "3:1", "full")],
            {"mixer": mixer, **fields, **sizes},
            match="parameters",
        )
    )
    program = ratio_study.Program(runs)
    full_RL, mask_RH = ratio_study.flags_and_masks(runs, program.shape)
    params_R, _ = program.init(program.seeds_R)
    noise = lambda p: (
        p + 0.1 * jax.random.normal(jax.random.key(p.size), p.shape)
    )  # zeros and ones tell nothing
    params_R = jax.tree.map(noise, params_R)
    batch = member.build_data(runs[0].config, "train").batch(0)
    assert sorted(set(mask_RH.sum(axis=1).tolist())) == sorted({r.config.model.mlp_hidden for r in runs})
    for r, run in enumerate(runs):
        masked = jax.tree.map(lambda leaf, r=r: leaf[r], params_R)
        definition = lm.build(run.config)
        hidden = program.hidden(masked, jnp.asarray(full_RL[r]), jnp.asarray(mask_RH[r]), batch)
        model = lm.merge(definition, unmasked(masked, definition, int(mask_RH[r].sum())))
        expected, _ = model(batch["tokens"], lm.Rows(batch["segment_ids"], batch["positions"]))
        np.testing.assert_allclose(hidden, expected, atol=2e-4, rtol=2e-4)


def unmasked(masked: dict, definition: lm.Definition, width: int) -> dict:
    """The parameters of ``definition`` that a masked stack's stand for."""
    params = {name: masked[name] for name in ("embedding", "final_norm")}
    params["segments"] = {}
    for s, segment in enumerate(lm.run_indices(definition.plan)):
        params["segments"][s] = {}
        for r, (_, layers) in enumerate(segment):
            own = jax.tree.map(lambda leaf, layers=layers: leaf[layers], masked["blocks"])
            kind = "full" if definition.layers[layers[0, 0]].kind == "attention" else "linear"
            mlp = {name: {"kernel": own["mlp"][name]["kernel"][..., :width]} for name in ("gate", "up")}
            mlp["down"] = {"kernel": own["mlp"]["down"]["kernel"][..., :width, :]}
            norms = {name: own[name] for name in ("mixer_norm", "mlp_norm")}
            params["segments"][s][r] = {"mixer": own[kind], "mlp": mlp, **norms}
    if "shared" in masked and any(spec.kind != "attention" for spec in definition.layers):
        linear = next(spec.name for spec in definition.layers if spec.kind != "attention")
        params["shared"] = {linear: masked["shared"]}
    return params
