"""JAX in a process of its own: a line of JSON in, a line of JSON out, so that its runs take turns with ours.

    {"do": "load", "arrays": FILE.npz, "work": W, "kind": .., "options": {..}}  -> {"compile_seconds": s, "memory": ..}
    {"do": "time"}    -> {"seconds": s}
    {"do": "result"}  -> the figures by name
    {"do": "quit"}

The arrays are x, y, p.NAME for parameters and v.NAME for tangents. An answer {"error": ..} says what went wrong.
"""

import json
import sys
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax_models import MODELS, cross_entropy

first = partial(jax.tree.map, lambda leaf: leaf[0])


def nested(f, at, v, w):
    (value, slope), (_, second) = jax.jvp(lambda p: jax.jvp(f, (p,), (v,)), (at,), (w,))
    return value, slope, second


def square(f, at, directions):
    """vmap(vmap(jvp(jvp))) over all ordered pairs: 1 + 2K + K^2 components."""
    inner = jax.vmap(partial(nested, f), (None, None, 0))
    value, slope, second = jax.vmap(inner, (None, 0, None))(at, directions, directions)
    return value[0, 0], slope[:, 0], second


def pairs(f, at, directions):
    """vmap(jvp(jvp)) over the pairs i <= j."""
    k = len(jax.tree.leaves(directions)[0])
    rows, columns = np.triu_indices(k)
    take = lambda which: jax.tree.map(lambda leaf: leaf[which], directions)  # noqa: E731
    value, slope, second = jax.vmap(partial(nested, f), (None, 0, 0))(at, take(rows), take(columns))
    starts = np.flatnonzero(rows == columns)
    plane = jnp.zeros((k, k), second.dtype).at[rows, columns].set(second).at[columns, rows].set(second)
    return value[0], slope[starts], plane


def gauss_newton(output, loss, at, directions, plane):
    z = output(at)
    columns = jax.vmap(lambda v: jax.jvp(output, (at,), (v,))[1])(directions)
    return plane(loss, z, columns)


def plane_of(model, plane, curvature, p, v, x, y):
    if curvature == "ggn":
        return gauss_newton(lambda p: model(p, x), lambda z: cross_entropy(z, y), p, v, plane)
    return plane(lambda p: cross_entropy(model(p, x), y), p, v)


def planes(model, options, arrays):
    form = {"square": square, "pairs": pairs}[options["form"]]
    return partial(plane_of, model, form, options["curvature"]), ("value", "slopes", "plane")


def gradient(model, options, arrays):
    def evaluate(p, v, x, y):
        value, g = jax.value_and_grad(lambda p: cross_entropy(model(p, x), y))(p)
        parts = jax.tree.map(lambda a, b: jnp.tensordot(a, b, b.ndim), v, g)
        return value, sum(jax.tree.leaves(parts)), g

    return evaluate, ("value", "slopes")


def step(model, options, arrays):
    """Draw K directions, evaluate the plane, solve it, move: as FoMoH-KD does."""
    rate, key = 1e-6, jax.random.key(0)
    k = len(jax.tree.leaves(arrays["v"])[0])

    def evaluate(p, v, x, y):
        keys = jax.random.split(jax.random.fold_in(key, v), len(p))
        drawn = {n: jax.random.normal(s, (k, *p[n].shape)) for n, s in zip(p, keys, strict=True)}
        value, slopes, plane = plane_of(model, square, options["curvature"], p, drawn, x, y)
        kappa = -jnp.linalg.solve(plane + 1e-6 * jnp.eye(k), slopes)
        return value, {n: p[n] + rate * jnp.tensordot(kappa, drawn[n], 1) for n in p}

    return evaluate, ("value",)


def laplacian(model, options, arrays):
    def evaluate(p, v, x, y):
        f = lambda x: model(p, x)  # noqa: E731
        along = lambda e: nested(f, x, jnp.broadcast_to(e, x.shape), jnp.broadcast_to(e, x.shape))[2]  # noqa: E731
        return (jax.vmap(along)(jnp.eye(x.shape[-1], dtype=x.dtype)).sum(0),)

    return evaluate, ("laplacian",)


WORK = {f.__name__: f for f in (planes, gradient, step, laplacian)}


class Worker:
    def load(self, request):
        jax.config.update("jax_enable_x64", request["options"]["x64"])
        jax.config.update("jax_default_matmul_precision", request["options"]["precision"])
        stored = {name: jnp.asarray(array) for name, array in np.load(request["arrays"]).items()}
        arrays = {"x": stored["x"], "y": stored["y"], "p": {}, "v": {}}
        for name, array in stored.items():
            if name[:2] in ("p.", "v."):
                arrays[name[0]][name[2:]] = array
        model = partial(MODELS[request["kind"]], **request["model_options"])
        evaluate, self.names = WORK[request["work"]](model, request["options"], arrays)
        self.steps = request["work"] == "step"
        self.arguments = [arrays[name] for name in "pvxy"]
        if self.steps:
            self.arguments[1] = jnp.asarray(0)
        start = time.perf_counter()
        compiled = jax.jit(evaluate).lower(*self.arguments).compile()
        self.evaluate = compiled
        memory = compiled.memory_analysis()
        return {
            "compile_seconds": time.perf_counter() - start,
            "temporary_bytes": getattr(memory, "temp_size_in_bytes", None),
            "device": str(jax.devices()[0]),
        }

    def time(self, request):
        start = time.perf_counter()
        parts = jax.block_until_ready(self.evaluate(*self.arguments))
        seconds = time.perf_counter() - start
        if self.steps:
            self.arguments[:2] = [parts[1], self.arguments[1] + 1]
        return {"seconds": seconds}

    def result(self, request):
        parts = self.evaluate(*self.arguments)
        return {name: np.asarray(part).tolist() for name, part in zip(self.names, parts, strict=False)}


def main():
    worker = Worker()
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "quit":
            return
        try:
            answer = getattr(worker, request["do"])(request)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"[:500]}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
