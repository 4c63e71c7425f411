"""Make the assets of the package: `python -m flax_qformer.assets.make`.

The example image and the vocabulary are made here; the weights of the default model are random, from a seed.
"""

import json
import string

import numpy as np
import PIL.Image
import PIL.ImageDraw
from safetensors.numpy import save_file

from flax_qformer.config import Blip2Config, Blip2QFormerConfig, Blip2VisionConfig
from flax_qformer.convert.layouts import parameters
from flax_qformer.processor import ImageProcessor, image_settings_file
from flax_qformer.source import DEFAULT_MODEL, EXAMPLE_IMAGE

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = """
a an the of and with on in at to is are this that one two three some photo picture image drawing
left right above below over under behind beside between near front top bottom middle side
small big large tiny huge long short tall round flat old new young dark light bright striped dotted plain
red green blue yellow orange purple pink brown black white gray grey cyan magenta
circle square triangle rectangle star cross ring heart diamond ellipse line arrow shape
dog cat bird horse cow sheep fish bear rabbit mouse lion tiger elephant duck frog turtle bee butterfly
man woman boy girl child baby person people face hand
car bus train truck bike bicycle boat ship plane road street bridge wheel
house home door window roof table chair bed lamp book cup bottle bowl plate box bag clock phone ball toy teapot
hat shirt dress shoe shoes jacket coat
tree flower leaf grass rose apple banana cake bread egg
sky sun moon cloud sea water river beach mountain hill snow rain fire stone forest garden field city
""".split()

SIZE = 480


def main() -> None:
    letters = string.ascii_lowercase + string.digits
    pieces = [*letters, *string.punctuation, *(f"##{letter}" for letter in letters)]
    vocabulary = [*SPECIAL, *pieces, *dict.fromkeys(word for word in WORDS if len(word) > 1)]
    DEFAULT_MODEL.mkdir(parents=True, exist_ok=True)
    (DEFAULT_MODEL / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    config = _config(len(vocabulary) + 1)  # [DEC] is added on loading
    (DEFAULT_MODEL / "config.json").write_text(json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n")
    tokenizer = {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
    (DEFAULT_MODEL / "tokenizer_config.json").write_text(json.dumps(tokenizer, indent=2) + "\n")
    (DEFAULT_MODEL / "preprocessor_config.json").write_bytes(image_settings_file(ImageProcessor()))
    save_file(_weights(config), DEFAULT_MODEL / "model.safetensors", metadata={"format": "pt"})
    _example().save(EXAMPLE_IMAGE)


def _config(vocab_size: int) -> Blip2Config:
    return Blip2Config(
        vision_config=Blip2VisionConfig(
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=4,
            hidden_act="quick_gelu",
            layer_norm_eps=1e-5,
        ),
        qformer_config=Blip2QFormerConfig(
            vocab_size=vocab_size,
            hidden_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=256,
            max_position_embeddings=64,
            cross_attention_frequency=1,
        ),
        num_query_tokens=8,
    )


def _weights(config: Blip2Config) -> dict[str, np.ndarray]:
    """Random weights by upstream's names, scaled so that signals keep their size and attention has a preference."""
    rng = np.random.default_rng(0)
    positions = np.arange(config.qformer_config.max_position_embeddings)
    tensors: dict[str, np.ndarray] = {"embeddings.position_ids": positions[None]}
    for parameter in parameters(config, "diffusers"):
        drawn = rng.standard_normal(parameter.torch_shape, np.float32)
        if parameter.path.endswith("/kernel"):
            gain = 1.5 if parameter.path.endswith(("query/kernel", "key/kernel")) else 1.0
            drawn *= gain / np.sqrt(np.prod(parameter.torch_shape[1:]))
        elif parameter.path.endswith("/scale"):
            drawn = 1 + 0.1 * drawn
        elif parameter.path.endswith("/bias"):
            drawn *= 0.1
        elif parameter.path.endswith("position_embedding"):
            drawn *= 0.2
        tensors[parameter.name] = drawn
    return tensors


def _example() -> PIL.Image.Image:
    """A red circle left of a blue square, drawn four times as large and reduced for smooth edges."""
    image = PIL.Image.new("RGB", (4 * SIZE, 4 * SIZE * 3 // 4), (238, 236, 228))
    draw = PIL.ImageDraw.Draw(image)
    draw.ellipse((180, 420, 880, 1120), fill=(214, 40, 40))
    draw.rectangle((1120, 560, 1720, 1160), fill=(30, 90, 200))
    return image.resize((SIZE, SIZE * 3 // 4), PIL.Image.Resampling.LANCZOS)


if __name__ == "__main__":
    main()
