"""Names of the autoencoder's attention, which diffusers renamed in 0.18. Checkpoints with either names are in use."""

import re
from collections.abc import Iterable

OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
"""The attention's layers since and before diffusers 0.18. Shapes and all other names are the same."""

_IN_ATTENTION = re.compile(r"(?<=\.attentions\.0\.)(to_[qkv]|to_out\.0)(?=\.)")
_OLD_ATTENTION = re.compile(rf".*\.attentions\.0\.({'|'.join(OLD_NAMES.values())})\.(weight|bias)")


def has_old_names(names: Iterable[str]) -> bool:
    """Whether an autoencoder's tensors have the names of before diffusers 0.18."""
    return any(map(_OLD_ATTENTION.fullmatch, names))


def old_name(name: str) -> str:
    """The name of a tensor before diffusers 0.18."""
    return _IN_ATTENTION.sub(lambda layer: OLD_NAMES[layer[0]], name)
