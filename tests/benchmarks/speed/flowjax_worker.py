"""flowjax's planar layers, timed in a process and an environment of their own.

``python -m benchmarks.speed.flowjax_worker``, in the folder tests. Nothing runs between requests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..serving import serve, versions
from .timing import Local

UNROLLED_LAYERS, UNROLLED_NUMBERS = 32, 100_000  # compiling K layers one by one takes seconds


class Worker:
    """The layers of one problem, as flowjax offers them, jitted."""

    def __init__(self, file: str) -> None:
        import jax.numpy as jnp
        import numpy as np

        arrays = np.load(file)
        self.x = jnp.asarray(arrays["x"])
        self.forms = {"scan": _compiled(arrays["parameters"], unrolled=False)}
        (K, _), numbers = arrays["parameters"].shape, arrays["x"].size
        if K <= UNROLLED_LAYERS and numbers * K <= UNROLLED_NUMBERS:
            self.forms["chain"] = _compiled(arrays["parameters"], unrolled=True)
        self.calls: dict[str, Local] = {}
        self.chosen: dict[str, str] = {}
        for operation in ("train", "forward"):
            self._choose(operation)

    def _choose(self, operation: str) -> None:
        """Keep the form that is faster at this shape."""
        calls = {form: self._timed(made[operation]) for form, made in self.forms.items()}
        if len(calls) > 1:
            seconds = {form: min(call.slice(0.1) for _ in range(3)) for form, call in calls.items()}
        else:
            seconds = dict.fromkeys(calls, 0.0)
        self.chosen[operation] = min(seconds, key=seconds.__getitem__)
        self.calls[operation] = calls[self.chosen[operation]]

    def _timed(self, function: Callable[..., Any]) -> Local:
        import jax

        return Local(lambda: jax.block_until_ready(function(self.x)))

    def save(self, file: str) -> None:
        """Write y and log|det|, for the comparison with the others."""
        import numpy as np

        y, log_det = self.forms[self.chosen["forward"]]["forward"](self.x)
        np.savez(file, y=np.asarray(y), log_det=np.asarray(log_det))


def _compiled(parameters: Any, unrolled: bool) -> dict[str, Callable[..., Any]]:
    """Train and forward as jitted functions of x.

    The parameters are arguments of the jitted functions, as leaves: nothing is a constant that
    the compiler could fold, and no time goes into taking a module apart.
    """
    import equinox as eqx
    import jax
    import jax.numpy as jnp
    from flowjax.bijections import Chain, Planar, Scan

    def layer(row: Any) -> Planar:
        bare = Planar(jax.random.key(0), dim=(row.shape[-1] - 1) // 2)
        return eqx.tree_at(lambda planar: planar.params, bare, row)

    rows = jnp.asarray(parameters)
    stack = Chain([layer(row) for row in rows]) if unrolled else Scan(eqx.filter_vmap(layer)(rows))
    trained, fixed = eqx.partition(stack, eqx.is_inexact_array)
    leaves, tree = jax.tree.flatten(trained)

    def forward(leaves: Any, x: Any) -> Any:
        bijection = eqx.combine(jax.tree.unflatten(tree, leaves), fixed)
        return jax.vmap(bijection.transform_and_log_det)(x)

    def loss(leaves: Any, x: Any) -> Any:
        y, log_det = forward(leaves, x)
        return ((y**2).sum(-1) / 2 - log_det).mean()

    train, forward = jax.jit(jax.value_and_grad(loss)), jax.jit(forward)
    return {"train": lambda x: train(leaves, x), "forward": lambda x: forward(leaves, x)}


class Service:
    """Answers requests; it holds the layers of the problem that was loaded last."""

    worker: Worker

    def __call__(self, request: dict[str, Any]) -> dict[str, Any]:
        if request["do"] == "versions":
            return versions("jax", "flowjax")
        if request["do"] == "load":
            import jax

            jax.clear_caches()
            self.worker = Worker(request["file"])
            return self.worker.chosen
        if request["do"] == "save":
            self.worker.save(request["file"])
            return {}
        return {"seconds": self.worker.calls[request["operation"]].slice(request["seconds"])}


if __name__ == "__main__":
    serve(Service())
