"""Write the package's example images, and the initial model of `train_default.sh`: `start.py DIR`.

The folder gets a vocabulary, a config and random weights from a seed.
"""

import argparse
import json
import string
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from flax_qformer.checkpoints.model_files import EXAMPLE_IMAGE
from flax_qformer.convert.axes import Parameter
from flax_qformer.convert.tables.qformer import parameters
from flax_qformer.models.config import Blip2Config, Blip2QFormerConfig, Blip2VisionConfig
from flax_qformer.models.pretraining import Blip2ForPreTraining
from scenes import HELD_OUT, SIDE, Scene, Thing, draw_scene

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = """
a an the of and with on in at to is are this that one two three some photo picture image drawing
left right above below over under behind beside between near front top bottom middle side
small big large tiny huge long short tall round flat old new young dark light bright striped dotted plain
red green blue yellow orange purple pink brown black white gray grey cyan magenta
maroon olive lime teal navy lavender beige salmon
circle square triangle rectangle star cross ring heart diamond ellipse line arrow shape
dog cat bird horse cow sheep fish bear rabbit mouse lion tiger elephant duck frog turtle bee butterfly
man woman boy girl child baby person people face hand
car bus train truck bike bicycle boat ship plane road street bridge wheel
house home door window roof table chair bed lamp book cup bottle bowl plate box bag clock phone ball toy teapot
hat shirt dress shoe shoes jacket coat
tree flower leaf grass rose apple banana cake bread egg
sky sun moon cloud sea water river beach mountain hill snow rain fire stone forest garden field city
""".split()

NUM_EXAMPLES = 17
EXAMPLE = (
    Thing("small", "red", "circle", (214, 40, 40), left=10, top=40),
    Thing("large", "blue", "square", (30, 90, 200), left=40, top=15),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="DIR")
    folder = parser.parse_args().folder
    letters = string.ascii_lowercase + string.digits
    pieces = [*letters, *string.punctuation, *(f"##{letter}" for letter in letters)]
    vocabulary = [*SPECIAL, *pieces, *dict.fromkeys(word for word in WORDS if len(word) > 1)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    config = _config(len(vocabulary) + 1)  # [DEC] is added on loading
    (folder / "config.json").write_text(json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n")
    save_file(_weights(config), folder / "model.safetensors", metadata={"format": "pt"})
    Scene((238, 236, 228), EXAMPLE).draw(scale=6).save(EXAMPLE_IMAGE)
    draw_examples(EXAMPLE_IMAGE.parent / "scenes")


def draw_examples(folder: Path) -> None:
    """A few scenes that the default model was not trained on, with their captions and the names of their things."""
    folder.mkdir(exist_ok=True)
    rng, rows = np.random.default_rng(7), []
    for number in range(NUM_EXAMPLES):
        scene, name = draw_scene(rng, HELD_OUT), f"{number:02}.png"
        scene.draw().save(folder / name)
        names = [f"{thing.colour} {thing.shape}" for thing in scene.things]
        rows.append({"file_name": name, "text": scene.caption(), "names": names})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _config(vocab_size: int) -> Blip2Config:
    return Blip2Config(
        vision_config=Blip2VisionConfig(
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=SIDE,
            patch_size=10,
            hidden_act="quick_gelu",
            layer_norm_eps=1e-5,
        ),
        qformer_config=Blip2QFormerConfig(
            vocab_size=vocab_size,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=256,
            max_position_embeddings=64,
            cross_attention_frequency=1,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        ),
        num_query_tokens=8,
        image_text_hidden_size=64,
    )


def draw_weight(rng: np.random.Generator, parameter: Parameter, shape: tuple[int, ...]) -> np.ndarray:
    """A random weight, float32. In small models, signals would fade with the usual standard deviation of 0.02."""
    drawn = rng.standard_normal(shape, np.float32)
    if parameter.path.endswith("/kernel"):
        drawn *= 0.8 / np.sqrt(np.prod(parameter.torch_shape[1:]))
    elif parameter.path.endswith("/scale"):
        drawn = np.ones_like(drawn)
    elif parameter.path.endswith("/bias"):
        drawn = np.zeros_like(drawn)
    else:
        drawn *= 0.2
    return drawn


def _weights(config: Blip2Config) -> dict[str, np.ndarray]:
    """Random weights by upstream's names; the patch positions start as sines and cosines."""
    rng = np.random.default_rng(0)
    tensors: dict[str, np.ndarray] = {}
    for parameter in parameters(config, "diffusers", Blip2ForPreTraining.parts):
        drawn = draw_weight(rng, parameter, parameter.torch_shape)
        tensors[parameter.name] = np.full_like(drawn, 0.07) if parameter.path == "temp" else drawn
    grid, width = config.vision_config.grid_size, config.vision_config.hidden_size
    waves = _waves(grid, width // 2)
    table = np.concatenate([np.repeat(waves, grid, axis=0), np.tile(waves, (grid, 1))], axis=1)
    tensors["visual_encoder.embeddings.position_embedding"][0, 1:] = 0.7 * table
    return tensors


def _waves(places: int, width: int) -> np.ndarray:
    """Sines and cosines, (places, width); nearby places have similar rows."""
    angles = np.arange(places)[:, None] * np.pi / 2 * places ** (-np.arange(width // 2) / (width // 2))
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


if __name__ == "__main__":
    main()
