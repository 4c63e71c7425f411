"""Loss and gradients of one batch on meshes, into a file: `python sharded_step.py FILE [PROCESS PORT] MESH...`.

Of two processes, each passes half of the batch, or the whole batch if `tensor` spans both.
"""

import sys

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather

import flax_qformer as fq
from flax_qformer.parallel.mesh import batch_part, mesh_context, parse_mesh
from flax_qformer.training import pretraining_loss

CONFIG = fq.Blip2Config.from_dict(
    {
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 8,
            "image_size": 16,
            "patch_size": 8,
        },
        "qformer_config": {
            "vocab_size": 25,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 8,
            "intermediate_size": 64,
            "max_position_embeddings": 16,
            "cross_attention_frequency": 2,
        },
        "num_query_tokens": 3,
        "image_text_hidden_size": 16,
        "scan_layers": True,
    }
)


def main(file: str, *arguments: str) -> None:
    numbers = [argument for argument in arguments if argument.isdecimal()]
    if numbers:
        process, port = numbers
        jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=int(process))
    model, batch = fq.Blip2ForPreTraining(CONFIG), make_batch()
    shapes = jax.eval_shape(model.init, jax.random.key(0), batch["pixel_values"], batch["input_ids"])["params"]
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda leaf: 0.3 * rng.standard_normal(leaf.shape, np.float32), shapes)
    params["temp"] = np.float32(0.5)

    @jax.jit(static_argnames="mesh")
    def run(params: dict, batch: dict, mesh: jax.sharding.Mesh) -> tuple:
        def loss(params: dict) -> jax.Array:
            return pretraining_loss(model, params, {}, batch, jax.random.key(1))[0]

        with mesh_context(mesh):
            return jax.value_and_grad(loss)(params)

    results = {}
    for text in arguments[len(numbers) :]:
        mesh = fq.make_mesh(**parse_mesh(text))
        placed = fq.shard_params(jax.device_put(params), mesh)
        index, count = batch_part(mesh)
        part = {name: np.split(array, count)[index] for name, array in batch.items()}
        loss, gradients = run(placed, fq.shard_batch(part, mesh), mesh)
        split = sum(not leaf.is_fully_replicated for leaf in jax.tree.leaves(placed))
        gradients = jax.tree.leaves(process_allgather(gradients, tiled=True))
        results[text] = np.concatenate([[float(loss), split], *(leaf.ravel() for leaf in gradients)])
    if not jax.process_index():
        np.savez(file, **results)


def make_batch() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "pixel_values": rng.standard_normal((16, 16, 16, 3), np.float32),
        "input_ids": rng.integers(5, 24, (16, 6)).astype(np.int32),
        "attention_mask": (np.arange(6) < rng.integers(3, 7, (16, 1))).astype(np.int32),
        "image_id": np.arange(16, dtype=np.int32) // 2,
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
