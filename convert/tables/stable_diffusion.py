"""Names and axes that all parts of Stable Diffusion share. Parameter paths are diffusers' names, with three rules:

- The number of a block belongs to its name: `down_blocks.0.resnets.1` is `down_blocks_0/resnets_1`.
- The last part is Flax's: `kernel`, `scale` and `embedding` are PyTorch's `weight`.
- Attention has an axis of heads.
"""

import re

from flax_qformer.convert.axes import Parameter, concrete

AXES = (
    (r".*/(to_[qkv]|[qkv]_proj)/kernel", "(heads head_dim) width -> width heads head_dim"),
    (r".*/(to_[qkv]|[qkv]_proj)/bias", "(heads head_dim) -> heads head_dim"),
    (r".*/(to_out_0|out_proj)/kernel", "width (heads head_dim) -> heads head_dim width"),
)
"""Paths of attention's parameters, and how their axes move."""

AXES_BY_RANK = {
    ("kernel", 4): "out in y x -> y x in out",
    ("kernel", 2): "out in -> in out",
    ("embedding", 2): "rows width -> rows width",
    ("scale", 1): "width -> width",
    ("bias", 1): "width -> width",
}
"""How the axes of all other parameters move, by the last part of the path and the number of axes."""


def torch_name(path: str) -> str:
    """diffusers' name of a parameter. The numbers of `linear_1` and `linear_2` are not of blocks."""
    name = re.sub(r"(?<!linear)_(\d+)(?=/)", r".\1", path).replace("/", ".")
    return re.sub(r"\.(kernel|scale|embedding)$", ".weight", name)


def parameter_at(path: str, shape: tuple[int, ...]) -> Parameter:
    """The row of a parameter by its path and shape in Flax."""
    axes = next((axes for pattern, axes in AXES if re.fullmatch(pattern, path)), None)
    axes = axes or AXES_BY_RANK[path.rpartition("/")[2], len(shape)]
    sizes = dict(zip(axes.partition(" -> ")[2].split(), shape, strict=True))
    return concrete(path, torch_name(path), axes, sizes)
