"""Writing captions token by token in one compiled loop: greedily, by nucleus sampling, or by beam search.

The arithmetic is that of transformers 4.33's `generate`, which LAVIS calls: the score of a finished caption is its
log-probability divided by its length, and sampling uses at most the 50 likeliest tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

import flax.struct
import jax
import jax.numpy as jnp

from flax_qformer.models.qformer import KeyValue

NUM_BEAMS, MAX_LENGTH, MIN_LENGTH, TOP_P = 3, 30, 10, 0.9
"""LAVIS's defaults."""

TOP_K = 50

Cache: TypeAlias = tuple[KeyValue, ...]
Step: TypeAlias = Callable[[jax.Array, jax.Array, Cache, jax.Array], tuple[jax.Array, Cache]]


@dataclass(frozen=True)
class Rules:
    """Constraints on a caption.

    Attributes:
      start, end, pad: token ids.
      max_length, min_length: in tokens, `start` included; `end` is not allowed before `min_length`.
      repetition_penalty: divides the logits of tokens that are in the caption, or multiplies negative ones.
    """

    start: int
    end: int
    pad: int
    max_length: int
    min_length: int
    repetition_penalty: float = 1.0

    def apply(self, scores: jax.Array, ids: jax.Array, length: jax.Array) -> jax.Array:
        """scores: (rows, vocabulary), of the token after the first `length` tokens of ids: (rows, max_length)."""
        if self.repetition_penalty != 1.0:
            penalised = jnp.where(scores < 0, scores * self.repetition_penalty, scores / self.repetition_penalty)
            written = jnp.where(jnp.arange(ids.shape[1]) < length, ids, scores.shape[1])
            there = jax.vmap(lambda row: jnp.zeros(scores.shape[1], bool).at[row].set(True, mode="drop"))(written)
            scores = jnp.where(there, penalised, scores)
        too_short = (jnp.arange(scores.shape[1]) == self.end) & (length < self.min_length)
        return jnp.where(too_short, -jnp.inf, scores)


def write_caption(
    step: Step, past: Cache, rules: Rules, top_p: float | None = None, rng: jax.Array | None = None
) -> jax.Array:
    """Write the likeliest token at each step, or draw one from the fewest whose probability reaches `top_p`.

    Args:
      step: (tokens (rows,), mask (rows, past + 1), past, position) -> logits (rows, vocabulary), own keys and values.
      past: keys and values of the queries, each (rows, queries, heads, head_dim).
      rng: a key to draw with; None takes the likeliest tokens.

    Returns:
      (rows, max_length) int32: `start`, the caption, `end` and `pad`.
    """
    rows = len(past[0][0])

    def body(state: tuple) -> tuple:
        ids, length, finished, memory = state
        logits, memory = memory.follow(step, ids, length)
        scores = rules.apply(logits, ids, length)
        if rng is None:
            token = jnp.argmax(scores, axis=1)
        else:
            token = jax.random.categorical(jax.random.fold_in(rng, length), nucleus(scores, top_p))
        token = jnp.where(finished, rules.pad, token)
        return ids.at[:, length].set(token), length + 1, finished | (token == rules.end), memory

    def goes_on(state: tuple) -> jax.Array:
        _, length, finished, _ = state
        return (length < rules.max_length) & ~finished.all()

    start = (_begun(rows, rules), jnp.int32(1), jnp.zeros(rows, bool), _Memory.after(past, rules.max_length))
    return jax.lax.while_loop(goes_on, body, start)[0]


def nucleus(scores: jax.Array, top_p: float | None) -> jax.Array:
    """Keep the fewest of the 50 likeliest tokens whose probability reaches `top_p`; the others become -inf."""
    ordered = -jnp.sort(-scores, axis=-1)[..., :TOP_K]
    likelihood = jax.nn.softmax(ordered, axis=-1)
    # A token is kept if those before it do not reach top_p.
    before = jnp.cumsum(likelihood, axis=-1) - likelihood
    kept = (before < (1.0 if top_p is None else top_p)).sum(axis=-1, keepdims=True)
    return jnp.where(scores < jnp.take_along_axis(ordered, kept - 1, axis=-1), -jnp.inf, scores)


def search_caption(step: Step, past: Cache, rules: Rules, num_beams: int) -> jax.Array:
    """The likeliest caption that beam search finds; arguments and result are those of `write_caption`."""
    rows, width = len(past[0][0]), rules.max_length
    past = jax.tree.map(lambda x: jnp.repeat(x, num_beams, axis=0), past)

    def body(state: _Beams) -> _Beams:
        logits, memory = state.memory.follow(step, state.ids.reshape(-1, width), state.length)
        scores = rules.apply(jax.nn.log_softmax(logits), state.ids.reshape(-1, width), state.length)
        vocabulary = scores.shape[-1]
        totals = (scores + state.scores.reshape(-1, 1)).reshape(rows, num_beams * vocabulary)
        # Of 2 * num_beams candidates at most num_beams end, one for each beam: enough remain.
        best, flat = jax.lax.top_k(totals, 2 * num_beams)
        beam, token = flat // vocabulary, flat % vocabulary
        ends = token == rules.end

        ended = jnp.where(ends & (jnp.arange(2 * num_beams) < num_beams), best / state.length, -jnp.inf)
        finished = jnp.concatenate([state.finished_scores, ended], axis=1)
        finished_ids = jnp.concatenate([state.finished_ids, _pick(state.ids, beam)], axis=1)
        finished_lengths = jnp.concatenate([state.finished_lengths, jnp.full_like(beam, state.length)], axis=1)
        finished, kept = jax.lax.top_k(finished, num_beams)

        _, going = jax.lax.top_k(jnp.where(ends, -jnp.inf, best), num_beams)
        beam = jnp.take_along_axis(beam, going, axis=1)
        token = jnp.take_along_axis(token, going, axis=1)
        origin = (jnp.arange(rows)[:, None] * num_beams + beam).reshape(-1)
        after = _Beams(
            ids=_pick(state.ids, beam).at[:, :, state.length].set(token),
            scores=jnp.take_along_axis(best, going, axis=1),
            length=state.length + 1,
            memory=jax.tree.map(lambda x: x[origin], memory),
            finished_ids=_pick(finished_ids, kept),
            finished_scores=finished,
            finished_lengths=jnp.take_along_axis(finished_lengths, kept, axis=1),
            done=state.done | (finished[:, -1] >= best[:, 0] / (state.length + 1)),
        )
        # Finished rows stay unchanged.
        return replace(
            after,
            finished_ids=_where_rows(state.done, state.finished_ids, after.finished_ids),
            finished_scores=_where_rows(state.done, state.finished_scores, after.finished_scores),
            finished_lengths=_where_rows(state.done, state.finished_lengths, after.finished_lengths),
        )

    begun = _begun(rows * num_beams, rules).reshape(rows, num_beams, width)
    state = jax.lax.while_loop(
        lambda state: (state.length < rules.max_length) & ~state.done.all(),
        body,
        _Beams(
            ids=begun,
            # All beams start equal, so only the first counts.
            scores=jnp.broadcast_to(jnp.where(jnp.arange(num_beams) == 0, 0.0, -1e9), (rows, num_beams)),
            length=jnp.int32(1),
            memory=_Memory.after(past, rules.max_length),
            finished_ids=begun,
            finished_scores=jnp.full((rows, num_beams), -jnp.inf),
            finished_lengths=jnp.ones((rows, num_beams), jnp.int32),
            done=jnp.zeros(rows, bool),
        ),
    )
    # Unfinished captions count with their current score.
    going = jnp.where(state.done[:, None], -jnp.inf, state.scores / state.length)
    scores = jnp.concatenate([state.finished_scores, going], axis=1)
    ids = jnp.concatenate([state.finished_ids, state.ids], axis=1)
    lengths = jnp.concatenate([state.finished_lengths, jnp.full((rows, num_beams), state.length)], axis=1)
    best = jnp.argmax(scores, axis=1)[:, None]
    ids, length = _pick(ids, best)[:, 0], jnp.take_along_axis(lengths, best, axis=1)
    places = jnp.arange(width)
    return jnp.where(places < length, ids, jnp.where(places == length, rules.end, rules.pad))


@flax.struct.dataclass
class _Memory:
    """Keys and values of the queries and of the tokens so far, in arrays of their final size."""

    cache: Cache
    num_queries: int = flax.struct.field(pytree_node=False)

    @classmethod
    def after(cls, past: Cache, max_length: int) -> "_Memory":
        cache = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, max_length), (0, 0), (0, 0))), past)
        return cls(cache, past[0][0].shape[1])

    def follow(self, step: Step, ids: jax.Array, length: jax.Array) -> tuple[jax.Array, "_Memory"]:
        """Logits of the token after the first `length` tokens, and the memory including the last of these."""
        size, last = self.cache[0][0].shape[1], length - 1
        seen = jnp.append(jnp.arange(size) < self.num_queries + last, True)
        mask = jnp.broadcast_to(seen, (len(ids), size + 1))
        logits, own = step(ids[:, last], mask, self.cache, last)
        place = self.num_queries + last
        cache = jax.tree.map(
            lambda all_, one: jax.lax.dynamic_update_slice_in_dim(all_, one, place, axis=1), self.cache, own
        )
        return logits, replace(self, cache=cache)


@flax.struct.dataclass
class _Beams:
    """Unfinished captions, (rows, beams, max_length), and the best finished ones.

    Scores are log-probabilities; `finished_scores` are divided by the length.
    """

    ids: jax.Array
    scores: jax.Array
    length: jax.Array
    memory: _Memory
    finished_ids: jax.Array
    finished_scores: jax.Array
    finished_lengths: jax.Array
    done: jax.Array


def _begun(rows: int, rules: Rules) -> jax.Array:
    return jnp.full((rows, rules.max_length), rules.pad, jnp.int32).at[:, 0].set(rules.start)


def _pick(ids: jax.Array, index: jax.Array) -> jax.Array:
    """ids: (rows, beams, length), index: (rows, n) -> (rows, n, length)."""
    return jnp.take_along_axis(ids, index[:, :, None], axis=1)


def _where_rows(condition: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.where(condition.reshape(-1, *[1] * (x.ndim - 1)), x, y)
