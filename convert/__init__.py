"""PyTorch checkpoints to Flax parameter trees and back, without PyTorch."""

from flax_qformer.convert.trees import check_finite, check_shapes, convert, export, layout_of, parts_of

__all__ = ["check_finite", "check_shapes", "convert", "export", "layout_of", "parts_of"]
