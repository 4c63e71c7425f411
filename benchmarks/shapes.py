"""What the embedded model has learned, on combinations of colour and shape that it never saw.

    python benchmarks/shapes.py [--model DIR]

Recall@1 among 100 images of two objects with 100 distinct captions, in both directions, and after ITM has reranked the
first ten; and how often the peak of the attention, averaged over layers and queries, lies inside the one object of two
that the text names. Both objects are of held-out combinations. Several draws, and medians.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import flax_qformer as fq
from flax_qformer.assets.shapes import HELD_OUT, Scene, Thing, draw_scene
from flax_qformer.source import DEFAULT_MODEL

IMAGES = 100
RERANKED = 10
CAPTION_TOKENS = 16
NAMES: dict[str, Callable[[Thing], str]] = {
    "red circle": lambda thing: f"{thing.colour} {thing.shape}",
    "a red circle": lambda thing: thing.describe(size=False),
    "a small red circle": lambda thing: thing.describe(),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=DEFAULT_MODEL, metavar="DIR")
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1000)
    options = parser.parse_args()
    processor = fq.Processor.from_pretrained(options.model)
    find, look = retrieval(options.model), attention(options.model)
    figures: dict[str, list[float]] = {}
    for draw in range(options.draws):
        scenes = distinct_scenes(np.random.default_rng(options.seed + draw))
        images = [scene.draw() for scene in scenes.values()]
        batch = processor(images, list(scenes), max_length=CAPTION_TOKENS)
        for name, share in find(batch).items():
            figures.setdefault(name, []).append(share)
        for example, name_of in NAMES.items():
            texts = processor(text=[name_of(scene.things[0]) for scene in scenes.values()], max_length=CAPTION_TOKENS)
            points = look(batch["pixel_values"], texts)
            for what, is_hit in (("box", in_box), ("shape", Scene.covers)):
                hits = [is_hit(scene, scene.things[0], *p) for scene, p in zip(scenes.values(), points, strict=True)]
                figures.setdefault(f"attention peak inside the {what} of {example!r}", []).append(float(np.mean(hits)))
    print(f"{IMAGES} images, {options.draws} draws: median (least to most)")
    for name, shares in figures.items():
        print(f"{name:55} {statistics.median(shares):6.1%}  ({min(shares):.0%} to {max(shares):.0%})")


def distinct_scenes(rng: np.random.Generator) -> dict[str, Scene]:
    """Scenes of two objects by their captions."""
    scenes: dict[str, Scene] = {}
    while len(scenes) < IMAGES:
        scene = draw_scene(rng, HELD_OUT)
        scenes.setdefault(scene.caption(), scene)
    return scenes


def in_box(scene: Scene, thing: Thing, x: float, y: float) -> bool:
    left, top, right, bottom = thing.box
    return left <= x * scene.width <= right and top <= y * scene.height <= bottom


def retrieval(path: str) -> Callable[[dict[str, np.ndarray]], dict[str, float]]:
    """A function of a batch of pairs to the shares that are found."""
    model, params = fq.from_pretrained(path, model_class=fq.Blip2ForPreTraining)
    variables = {"params": params}

    @jax.jit
    def features(pixel_values: jax.Array, input_ids: jax.Array, attention_mask: jax.Array) -> Any:
        states = model.apply(variables, pixel_values, method="encode_image").last_hidden_state
        image = model.apply(variables, encoder_hidden_states=states, method="image_features")
        text = model.apply(variables, input_ids, attention_mask, method="text_features")
        return states, jnp.einsum("iqd,td->iqt", image, text).max(axis=1).T

    @jax.jit
    def match(states: jax.Array, input_ids: jax.Array, attention_mask: jax.Array) -> jax.Array:
        return model.apply(variables, None, input_ids, attention_mask, encoder_hidden_states=states, method="match")

    def find(batch: dict[str, np.ndarray]) -> dict[str, float]:
        states, similarities = features(**batch)
        own = np.arange(len(similarities))
        best = np.argsort(-np.asarray(similarities), axis=1)[:, :RERANKED]
        text = (batch["input_ids"], batch["attention_mask"])
        scores = np.stack([match(states[best[:, k]], *text) for k in range(RERANKED)])
        reranked = best[own, scores.argmax(axis=0)]
        return {
            "text-to-image recall@1": float((best[:, 0] == own).mean()),
            "image-to-text recall@1": float((similarities.argmax(axis=0) == own).mean()),
            "text-to-image recall@1, reranked by ITM": float((reranked == own).mean()),
        }

    return find


def attention(path: str) -> Callable[[np.ndarray, dict[str, np.ndarray]], list[tuple[float, float]]]:
    """A function of images and texts to the peaks, x and y in parts of the width and the height."""
    model, params = fq.from_pretrained(path, model_class=fq.Blip2QFormerModel)
    grid = model.config.vision_config.grid_size

    @jax.jit
    def peaks(pixel_values: jax.Array, texts: dict[str, jax.Array]) -> jax.Array:
        output = model.apply({"params": params}, pixel_values, **texts, output_attentions=True)
        maps = fq.attention_maps(output.cross_attentions, model.config).mean(axis=(1, 2))
        return maps.reshape(len(maps), -1).argmax(axis=1)

    def look(pixel_values: np.ndarray, texts: dict[str, np.ndarray]) -> list[tuple[float, float]]:
        return [((k % grid + 0.5) / grid, (k // grid + 0.5) / grid) for k in np.asarray(peaks(pixel_values, texts))]

    return look


if __name__ == "__main__":
    main()
