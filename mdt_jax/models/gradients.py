"""Functions with a backward pass of their own, which JAX can differentiate forward, too.

`jax.custom_vjp` has no forward mode: no jvp, jacfwd or hessian. JAX's `linear_call` has one, but no
rule for the vmap that jacfwd makes of it. So here the linear map from the inputs' tangents to the
output's is a primitive, whose transpose is the backward pass.
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
    """The function args → out of forward(*args) = (out, kept), with these derivatives.

    kept: what the derivatives need. tangent(kept, *tangents of args) → tangent of out, a linear
    function. backward(kept, gradient of out) → gradients of args, as a tuple. inputs: how many of
    the args, from the first on, have derivatives; None: all. An arg may be None.
    """

    @jax.custom_jvp
    def function(*args):
        return forward(*args)[0]

    @function.defjvp
    def _(args, tangents):
        out, kept = forward(*args)
        kept_leaves, kept_tree = jax.tree.flatten(kept)
        leaves, tree = jax.tree.flatten(tangents[:inputs])

        def of_leaves(*flat):
            first = jax.tree.unflatten(kept_tree, flat[: len(kept_leaves)])
            return [tangent(first, *jax.tree.unflatten(tree, flat[len(kept_leaves) :]))]

        def of_gradient(*flat):
            return jax.tree.leaves(backward(jax.tree.unflatten(kept_tree, flat[:-1]), flat[-1]))

        (moved,) = _bind(of_leaves, of_gradient, len(kept_leaves), [*kept_leaves, *leaves])
        return out, moved

    return function


def _bind(run: Callable, transpose: Callable, kept: int, flat: list) -> list:
    """run(*flat), linear in all of `flat` but its first `kept`."""
    jaxpr = jax.make_jaxpr(run)(*flat)
    return _tangent_p.bind(*flat, jaxpr=jaxpr, transpose=transpose, kept=kept)


@_tangent_p.def_impl
def _run(*flat, jaxpr, **_):
    return jaxpr_as_fun(jaxpr)(*flat)


@_tangent_p.def_abstract_eval
def _out_avals(*_, jaxpr, **__):
    return jaxpr.out_avals


def _transpose(grads, *flat, transpose, kept, **_):
    linear = flat[kept:]
    if type(grads[0]) is ad.Zero:
        given = [ad.Zero(each.aval) if ad.is_undefined_primal(each) else None for each in linear]
    else:
        given = transpose(*flat[:kept], grads[0])
    # JAX passes zeros, and asks for no gradient, where an input does not depend on what varies.
    asked = [ad.is_undefined_primal(each) for each in linear]
    return [None] * kept + [g if a else None for g, a in zip(given, asked, strict=True)]


def _jvp(primals, tangents, *, jaxpr, **_):
    """As JAX differentiates the formula: of what is kept, it is not linear."""
    moving = [i for i, each in enumerate(tangents) if type(each) is not ad.Zero]

    def run(*moved):
        flat: list[Any] = list(primals)
        for i, each in zip(moving, moved, strict=True):
            flat[i] = each
        return jaxpr_as_fun(jaxpr)(*flat)

    return jax.jvp(run, [primals[i] for i in moving], [tangents[i] for i in moving])


def _batch(flat, axes, *, jaxpr, transpose, kept):
    size = next(x.shape[axis] for x, axis in zip(flat, axes, strict=True) if axis is not None)
    flat = [
        jnp.broadcast_to(x, (size, *x.shape)) if axis is None else jnp.moveaxis(x, axis, 0)
        for x, axis in zip(flat, axes, strict=True)
    ]
    out = _bind(jax.vmap(jaxpr_as_fun(jaxpr)), jax.vmap(transpose), kept, flat)
    return out, [0] * len(out)


ad.primitive_jvps[_tangent_p] = _jvp
ad.primitive_transposes[_tangent_p] = _transpose
batching.primitive_batchers[_tangent_p] = _batch
mlir.register_lowering(_tangent_p, mlir.lower_fun(_run, multiple_results=True))
