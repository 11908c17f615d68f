"""Functions with a hand-written backward pass that also have forward-mode derivatives.

`jax.custom_vjp` has no forward mode (jvp, jacfwd, hessian). `linear_call` has one, but cannot be
batched, which jacfwd requires. Here the linear map from the inputs' tangents to the output's is a
primitive whose transpose is the backward pass.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir

_tangent_p = Primitive("tangent")
_tangent_p.multiple_results = True


def with_backward(
    forward: Callable, tangent: Callable, backward: Callable, inputs: int | None = None
) -> Callable:
    """The function args → out with the given derivatives.

    forward: args → (out, saved), saved being a tree of what the derivatives need.
    tangent: (saved, *tangents of args) → tangent of out, linear in the tangents.
    backward: (saved, gradient of out) → tuple of the gradients of args.
    inputs: the number of leading args that have derivatives; None: all. An arg may be None.
    """

    @jax.custom_jvp
    def function(*args):
        return forward(*args)[0]

    @function.defjvp
    def _(args, tangents):
        out, saved = forward(*args)
        saved_leaves, saved_tree = jax.tree.flatten(saved)
        leaves, tree = jax.tree.flatten(tangents[:inputs])
        count = len(saved_leaves)

        def run(*flat):
            moves = jax.tree.unflatten(tree, flat[count:])
            return [tangent(jax.tree.unflatten(saved_tree, flat[:count]), *moves)]

        def transpose(*flat):
            return jax.tree.leaves(backward(jax.tree.unflatten(saved_tree, flat[:-1]), flat[-1]))

        (d_out,) = _bind(run, transpose, count, [*saved_leaves, *leaves])
        return out, d_out

    return function


def _bind(run: Callable, transpose: Callable, num_saved: int, flat: list) -> list:
    """run(*flat), which is linear in flat[num_saved:]."""
    jaxpr = jax.make_jaxpr(run)(*flat)
    return _tangent_p.bind(*flat, jaxpr=jaxpr, transpose=transpose, num_saved=num_saved)


@_tangent_p.def_impl
def _run(*flat, jaxpr, **_):
    return jaxpr_as_fun(jaxpr)(*flat)


@_tangent_p.def_abstract_eval
def _out_avals(*_, jaxpr, **__):
    return jaxpr.out_avals


def _transpose(grads, *flat, transpose, num_saved, **_):
    linear = flat[num_saved:]
    # JAX wants a gradient only for inputs that depend on what is differentiated.
    wanted = [ad.is_undefined_primal(each) for each in linear]
    if type(grads[0]) is ad.Zero:
        pairs = zip(linear, wanted, strict=True)
        gradients = [ad.Zero(each.aval) if w else None for each, w in pairs]
    else:
        gradients = transpose(*flat[:num_saved], grads[0])
    return [None] * num_saved + [g if w else None for g, w in zip(gradients, wanted, strict=True)]


def _jvp(primals, tangents, *, jaxpr, **_):
    """Second derivatives are JAX's own, of the tangent's formula."""
    moving = [i for i, each in enumerate(tangents) if type(each) is not ad.Zero]

    def run(*moved):
        flat: list[Any] = list(primals)
        for i, each in zip(moving, moved, strict=True):
            flat[i] = each
        return jaxpr_as_fun(jaxpr)(*flat)

    return jax.jvp(run, [primals[i] for i in moving], [tangents[i] for i in moving])


def _batch(flat, axes, *, jaxpr, transpose, num_saved):
    size = next(x.shape[axis] for x, axis in zip(flat, axes, strict=True) if axis is not None)
    flat = [
        jnp.broadcast_to(x, (size, *x.shape)) if axis is None else jnp.moveaxis(x, axis, 0)
        for x, axis in zip(flat, axes, strict=True)
    ]
    out = _bind(jax.vmap(jaxpr_as_fun(jaxpr)), jax.vmap(transpose), num_saved, flat)
    return out, [0] * len(out)


ad.primitive_jvps[_tangent_p] = _jvp
ad.primitive_transposes[_tangent_p] = _transpose
batching.primitive_batchers[_tangent_p] = _batch
mlir.register_lowering(_tangent_p, mlir.lower_fun(_run, multiple_results=True))
