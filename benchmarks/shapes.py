"""What the embedded model has learned, on combinations of size, colour and shape that it never saw.

    PYTHONPATH=examples/shapes python benchmarks/shapes.py [--model DIR]

Recall@1 among 100 images of two objects with 100 distinct captions, in both directions, and after ITM has reranked
the first ten; how often a caption is nearer to its image than the same words with the objects exchanged, "b left of a";
and how often the peak of the last layer's attention, averaged over the queries, lies inside the one object of two that
the text names. Every object is of a held-out combination. Several draws, and medians.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import flax_qformer as fq
from flax_qformer.model_files import DEFAULT_MODEL
from flax_qformer.training.evaluation import Retrieval
from scenes import HELD_OUT, SIDE, Scene, Thing, draw_scene

IMAGES = 100
RERANKED = 10
CAPTION_TOKENS = 16
NAMES: dict[str, Callable[[Thing], str]] = {
    "red circle": lambda thing: f"{thing.colour} {thing.shape}",
    "a red circle": lambda thing: thing.describe(size=False),
    "a small red circle": Thing.describe,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=DEFAULT_MODEL, metavar="DIR")
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1000)
    options = parser.parse_args()
    processor = fq.Processor.from_pretrained(options.model)
    model, params = fq.from_pretrained(options.model, model_class=fq.Blip2ForPreTraining)
    search, look = Retrieval(model), attention(options.model)

    @jax.jit
    def nearness(params: Any, batch: dict[str, jax.Array]) -> jax.Array:
        variables = {"params": params}
        images = model.apply(variables, batch["pixel_values"], method="image_features")
        texts = model.apply(variables, batch["input_ids"], batch["attention_mask"], method="text_features")
        return jnp.einsum("bqd,bd->bq", images, texts).max(axis=1)

    figures: dict[str, list[float]] = {}
    for draw in range(options.draws):
        scenes = distinct_scenes(np.random.default_rng(options.seed + draw))
        images = [scene.draw() for scene in scenes.values()]
        batch = processor(images, list(scenes), max_length=CAPTION_TOKENS)
        found = search.evaluate(params, [({**batch, "image_id": np.arange(IMAGES)}, IMAGES)], RERANKED)
        for name in (name for name in found if name.endswith("recall@1")):
            figures.setdefault(name, []).append(found[name])
        false = processor(text=[exchanged(scene) for scene in scenes.values()], max_length=CAPTION_TOKENS)
        is_nearer = nearness(params, batch) > nearness(params, {**batch, **false})
        figures.setdefault("caption nearer than with its objects exchanged", []).append(float(np.mean(is_nearer)))
        for example, name_of in NAMES.items():
            texts = processor(text=[name_of(scene.things[0]) for scene in scenes.values()], max_length=CAPTION_TOKENS)
            points = look(batch["pixel_values"], texts)
            for what, is_hit in (("box", in_box), ("shape", Thing.covers)):
                hits = [is_hit(scene.things[0], *p) for scene, p in zip(scenes.values(), points, strict=True)]
                figures.setdefault(f"attention peak inside the {what} of {example!r}", []).append(float(np.mean(hits)))
    print(f"{IMAGES} images, {options.draws} draws: median (least to most)")
    for name, shares in figures.items():
        print(f"{name:55} {statistics.median(shares):6.1%}  ({min(shares):.0%} to {max(shares):.0%})")


def distinct_scenes(rng: np.random.Generator) -> dict[str, Scene]:
    """Scenes of two objects by their captions, no two of which say the same: "a above b" is "b below a"."""
    scenes: dict[str, Scene] = {}
    while len(scenes) < IMAGES:
        scene = draw_scene(rng, HELD_OUT)
        if Scene(scene.background, scene.things[::-1]).caption() not in scenes:
            scenes.setdefault(scene.caption(), scene)
    return scenes


def exchanged(scene: Scene) -> str:
    """The caption with its objects in each other's place, which is false."""
    first, second = (thing.describe() for thing in scene.things)
    return second + scene.caption().removeprefix(first).removesuffix(second) + first


def in_box(thing: Thing, x: float, y: float) -> bool:
    left, top, right, bottom = thing.box
    return left <= x <= right and top <= y <= bottom


def attention(path: str) -> Callable[[np.ndarray, dict[str, np.ndarray]], list[tuple[float, float]]]:
    """A function of images and texts to the peaks, x and y in pixels."""
    model, params = fq.from_pretrained(path, model_class=fq.Blip2QFormerModel)
    grid = model.config.vision_config.grid_size
    patch = SIDE / grid

    @jax.jit
    def peaks(pixel_values: jax.Array, texts: dict[str, jax.Array]) -> jax.Array:
        output = model.apply({"params": params}, pixel_values, **texts, output_attentions=True)
        maps = fq.attention_maps(output.cross_attentions, model.config)[:, -1].mean(axis=1)
        return maps.reshape(len(maps), -1).argmax(axis=1)

    def look(pixel_values: np.ndarray, texts: dict[str, np.ndarray]) -> list[tuple[float, float]]:
        return [((k % grid + 0.5) * patch, (k // grid + 0.5) * patch) for k in np.asarray(peaks(pixel_values, texts))]

    return look


if __name__ == "__main__":
    main()
