"""Read the next batch while a step runs."""

import jax
from jax.sharding import Mesh

from flax_qformer.data.batches import Batches
from flax_qformer.errors import InputError
from flax_qformer.parallel.mesh import shard_batch


class Prefetcher:
    """Places batches on the devices; `prefetch` reads the next step's first batch while the devices work.

    Attributes:
      state: the position in the data after the last batch that `take` returned; a prefetched batch does not count.
      epoch: passes over the data up to that position.
    """

    def __init__(self, batches: Batches, mesh: Mesh) -> None:
        self._batches, self._mesh = batches, mesh
        self._prefetched: dict[str, jax.Array] | InputError | None = None
        self._record_position()

    def take(self) -> dict[str, jax.Array]:
        """The next batch, sharded over the mesh.

        Raises:
          InputError: the batch cannot be read.
        """
        batch, self._prefetched = self._read() if self._prefetched is None else self._prefetched, None
        if isinstance(batch, InputError):
            raise batch
        self._record_position()
        return batch

    def prefetch(self) -> None:
        """Read the next batch. `take` raises its error, so that the current step can be saved first."""
        try:
            self._prefetched = self._read()
        except InputError as error:
            self._prefetched = error

    def _read(self) -> dict[str, jax.Array]:
        return shard_batch(next(self._batches), self._mesh)

    def _record_position(self) -> None:
        self.state, self.epoch = self._batches.get_state(), self._batches.epoch
