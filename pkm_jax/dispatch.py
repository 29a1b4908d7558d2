"""One way to choose a kernel: by the platform that a program is lowered for.

An operation has a plain jnp reference, which runs everywhere, and can have kernels for NVIDIA GPUs
and for TPUs. The choice is a primitive of its own, which is traced as the reference's shapes and
lowered as one of them. So a program that is lowered for a GPU on a machine without one has the
kernels, and a kernel's module is imported only where a program for its device is lowered. Those for
TPUs have been compiled, but have run on none: `implementation='xla'` is without them, and updates
are without `rounding`.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from pkm_jax.console import warn_once
from pkm_jax.refusal import Refusal

Implementation = Literal['xla', 'gpu', 'tpu']


class Kernel(NamedTuple):
    """Two functions of a reference's arguments."""
    run: Callable           # and of `interpret: bool`; returns what the reference does
    unsupported: Callable   # of shapes: why the kernel cannot take such arrays; None if it can


@dataclasses.dataclass(frozen=True)
class Choice:
    """A function of arrays and static settings that is computed by plain JAX or by a kernel.

    A call takes an implementation and the function's arguments. The implementation is

    * None: the kernel for the platform that the program is lowered for, if there is one and it can
      take the arguments, else plain JAX; that a kernel cannot is logged once for each operation and
      reason;
    * 'xla': plain JAX;
    * 'gpu' or 'tpu': the kernel for that platform, interpreted where the program is lowered for
      another.

    It has no derivative of its own; its callers define them. Under `jax.vmap` it is plain JAX.

    Raises:
      Refusal: that kernel does not exist, or cannot take the arguments.
    """
    operation: str                  # for messages
    reference: Callable
    load: Callable[[], Kernel] | None           # imports the kernel for NVIDIA GPUs,
    load_tpu: Callable[[], Kernel] | None = None    # and that for TPUs

    def __call__(self, implementation: Implementation | None, *arrays: Any, **static: Any) -> Any:
        check_implementation(implementation)
        if implementation == 'xla':
            _record(self.operation, 'plain XLA')
            return self.reference(*arrays, **static)
        if implementation is not None:
            reason = self.kernel(implementation).unsupported(*_shapes(arrays), **static)
            if reason:
                raise _refused(self.operation, reason, implementation)
        shapes = jax.eval_shape(functools.partial(self.reference, **static), *arrays)
        leaves = choice_p.bind(*arrays, choice=self, forced=implementation,
                               static=tuple(sorted(static.items())), batched=())
        return jax.tree.unflatten(jax.tree.structure(shapes), leaves)

    def runs_kernel(
        self, platform: Implementation, implementation: Implementation | None, *arrays: Any,
        **static: Any,
    ) -> bool:
        """Whether such a call is the kernel for 'gpu' or 'tpu' in a program lowered for it; of the
        arrays shapes and dtypes are enough."""
        if _kernels_off or implementation not in (None, platform) or not self.has_kernel(platform):
            return False
        return not _supported(self, platform, arrays, tuple(static.items()), ())[1]

    def has_kernel(self, platform: Implementation) -> bool:
        """Whether there is one for 'gpu' or 'tpu', for some arguments at least."""
        return (self.load if platform == 'gpu' else self.load_tpu) is not None

    def kernel(self, platform: Implementation) -> Kernel:
        """The kernel for 'gpu' or 'tpu'.

        Raises:
          Refusal: there is none.
        """
        load = self.load if platform == 'gpu' else self.load_tpu
        if load is None:
            raise Refusal(f'implementation = {platform!r}: the {self.operation} has no such '
                          f'kernel. Leave it None for plain jnp there.')
        return load()


def check_implementation(implementation: str | None) -> None:
    """Refuses what is no implementation.

    Raises:
      Refusal: the name is unknown.
    """
    if implementation not in (None, 'xla', 'gpu', 'tpu'):
        raise Refusal(f"implementation = {implementation!r} is none of None, 'xla', 'gpu', 'tpu'.")


def _refused(operation, reason, implementation):
    return Refusal(f'implementation = {implementation!r}: the kernel of the {operation} does not '
                   f'support {reason}. Leave it None for plain jnp there.')


choice_p = Primitive('kernel_choice')
choice_p.multiple_results = True


def _plain(choice, static, batched):
    """The reference as a function of arrays that returns a list, mapped over what was batched."""
    function = functools.partial(choice.reference, **dict(static))
    for axes in batched:
        function = jax.vmap(function, axes)
    return lambda *arrays: jax.tree.leaves(function(*arrays))


@choice_p.def_abstract_eval
def _abstract(*arrays, choice, forced, static, batched):
    shapes = jax.eval_shape(_plain(choice, static, batched), *_shapes(arrays))
    return [ShapedArray(shape.shape, shape.dtype) for shape in shapes]


@choice_p.def_impl
def _run(*arrays, **settings):
    return _compiled(tuple(sorted(settings.items())))(*arrays)


@functools.cache
def _compiled(settings):
    return jax.jit(functools.partial(choice_p.bind, **dict(settings)))


def _batch(arrays, axes, *, choice, forced, static, batched):
    if forced:
        raise _refused(choice.operation, 'jax.vmap', forced)
    results = choice_p.bind(*arrays, choice=choice, forced=None, static=static,
                            batched=(*batched, tuple(axes)))
    return results, [0] * len(results)


batching.primitive_batchers[choice_p] = _batch


def _lower(context, *values, choice, forced, static, batched, platform=None):
    function, name = _plain(choice, static, batched), 'plain XLA'
    if forced:
        interpret = forced != platform
        function = _kernel(choice.kernel(forced), static, interpret)
        name = f'a {forced.upper()} kernel' + (', interpreted' if interpret else '')
    _record(choice.operation, name)
    return mlir.lower_fun(function)(context, *values)


def _lower_for(platform, context, *values, choice, forced, static, batched):
    if forced or _kernels_off or not choice.has_kernel(platform):
        return _lower(context, *values, choice=choice, forced=forced, static=static,
                      batched=batched, platform=platform)
    kernel, reason = _supported(choice, platform, context.avals_in, static, batched)
    if reason:
        warn_once(__name__, 'The kernel of the %s does not support %s: plain jnp instead, slower.',
                  choice.operation, reason)
        function = _plain(choice, static, batched)
    else:
        function = _kernel(kernel, static, interpret=False)
    _record(choice.operation, f'plain XLA, slower: no kernel for {reason}' if reason else
            f'a {platform.upper()} kernel')
    return mlir.lower_fun(function)(context, *values)


mlir.register_lowering(choice_p, _lower)
mlir.register_lowering(choice_p, functools.partial(_lower_for, 'tpu'), platform='tpu')
mlir.register_lowering(choice_p, functools.partial(_lower_for, 'gpu'), platform='cuda')


@contextlib.contextmanager
def without_kernels() -> Iterator[None]:
    """Where no implementation is asked for, what is lowered while this is entered is plain JAX, to
    compare with."""
    _kernels_off.append(True)
    try:
        yield
    finally:
        _kernels_off.pop()


_kernels_off: list[bool] = []


@contextlib.contextmanager
def recorded(before: dict[str, list[str]] | None = None) -> Iterator[dict[str, list[str]]]:
    """The ways in which each operation is made in what is traced and lowered while this is entered,
    by its name: 'plain XLA', 'a GPU kernel' and so on, each once; added to those of `before`."""
    found = {} if before is None else before
    _records.append(found)
    try:
        yield found
    finally:
        del _records[next(at for at, one in enumerate(_records) if one is found)]


_records: list[dict[str, list[str]]] = []


def _record(operation, implementation):
    for found in _records:
        ways = found.setdefault(operation, [])
        if implementation not in ways:
            ways.append(implementation)


def _supported(choice, platform, arrays, static, batched):
    """The kernel, and why not to use it."""
    if batched:
        return None, 'jax.vmap'
    try:
        kernel = choice.kernel(platform)
    except (ImportError, AttributeError) as error:      # a backend that this jax lacks
        return None, f'jax {jax.__version__} ({error})'
    return kernel, kernel.unsupported(*_shapes(arrays), **dict(static))


def _shapes(arrays):
    return [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays]


def _kernel(kernel, static, interpret):
    return lambda *arrays: jax.tree.leaves(
        kernel.run(*arrays, **dict(static), interpret=interpret))
