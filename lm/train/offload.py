"""Optimizer state that lies in the host's memory, and comes to the device a parameter at a time."""

from collections import deque
from typing import Any

import jax
import optax

from lm.core.paths import flatten, merge, partition

# Parameters whose moments are on the device at a time: one is updated as others come and go.
AT_ONCE = 2


def streamed(transform: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns a transformation with the same state and updates, made one parameter at a time.

    Left to itself the compiler fetches moments early, and the device needs much of the room that
    they were to leave. Here those of a parameter wait in the host's memory until those of the
    last but one are back there.

    Args:
      transform: in which the update of a parameter depends on no other parameter.
    """

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, old = {}, _by_path(state)
        new, back = dict(old), deque(maxlen=AT_ONCE)
        for path in flatten(params):
            own_grads, own_params = _only(path, grads), _only(path, params)
            shapes = jax.eval_shape(transform.init, own_params)
            own = _with_leaves(shapes, old)
            if len(back) == AT_ONCE:
                own = _after(back[0], own)
            own = _moved(own, jax.memory.Space.Device)
            own_updates, own = transform.update(own_grads, own, own_params)
            own = _moved(own, jax.memory.Space.Host)
            back.append(jax.tree.leaves(own))
            updates = merge(updates, own_updates)
            new |= _by_path(own)
        return updates, _with_leaves(state, new)

    return optax.GradientTransformation(transform.init, update)


def _only(path: str, tree: Any) -> Any:
    """Returns a tree of parameters with the one of a path alone."""
    return partition(tree, lambda other: other == path)[0]


def _by_path(state: Any) -> dict[str, Any]:
    """Returns the leaves of an optimizer's state; those of one parameter alone have its paths."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(keys): leaf for keys, leaf in leaves}


def _with_leaves(state: Any, leaves: dict[str, Any]) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda keys, _: leaves[jax.tree_util.keystr(keys)], state
    )


def _moved(state: Any, space: Any) -> Any:
    """Returns a state in another memory, but for its numbers, which stay on the device."""
    return jax.tree.map(lambda leaf: jax.device_put(leaf, space) if leaf.ndim else leaf, state)


def _after(others: list[Any], state: Any) -> Any:
    """Returns a state that is there only once the moments among other arrays are."""
    moments = {path: leaf for path, leaf in _by_path(state).items() if leaf.ndim}
    others = [leaf for leaf in others if leaf.ndim]
    held, _ = jax.lax.optimization_barrier((moments, others))
    return _with_leaves(state, {**_by_path(state), **held})
