"""Which backend computes a call, chosen while tracing; said once for each reason.

An op is a folder, a backend a module in it that the op names in its order of preference; the last one
computes everything everywhere. The others are kernels, imported only where they may run. A backend has a
function with the op's name that computes a call, and, if it is one of `KERNELS`,

    supports(call) -> str | None     why it cannot compute a call of these shapes and dtypes; needs no device
    runs_on(device) -> str | None    why it cannot run on a device of its platform
    self_test() -> str | None        why its results are wrong here; asked once a process, at first use
    kind(call)                       may be absent; else self_test takes it, and is asked once a kind

Fails closed: kernels that cannot be imported, refuse a call or fail their test are passed over.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import importlib
import logging
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import jax

KERNELS = {"hopper": "gpu", "triton": "gpu", "cudnn": "gpu"}  # by name, the platform that they are for
logger = logging.getLogger("pallas_kernels")


class Device(NamedTuple):
    """A kind of device: "cpu", "gpu" or "tpu", and a GPU's compute capability."""

    platform: str
    capability: str | None = None

    def before_ampere(self) -> str | None:
        """Why kernels for NVIDIA GPUs since Ampere cannot run on it, or None."""
        if float(self.capability or 0) >= 8.0:
            return None
        return f"compute capability {self.capability or 'unknown'} (NVIDIA, 8.0 or newer)"


H100 = Device("gpu", "9.0")

# These are part of the key of JAX's caches: what was traced under one value is not reused under another. All
# are made before anything is traced: what was traced without one would be traced, and lowered, once more.
_auto = jax.make_user_context(("auto",))
_target = jax.make_user_context(None)
_recorder = jax.make_user_context(None)
# Whether the kernel whose body is traced will be interpreted; Pallas's interpreter has not all instructions.
interpreted = jax.make_user_context(False)


class Choice(NamedTuple):
    """The backend of a call, and why those before it were passed over: (backend, reason) in their order."""

    op: str
    arrays: str
    backend: str
    refused: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        names: dict[str, list[str]] = {}
        for name, reason in self.refused:
            names.setdefault(reason, []).append(name)
        reasons = "".join(f"; not {', '.join(who)}: {reason}" for reason, who in names.items())
        return f"{self.op} runs on {self.backend}{reasons}"


@dataclasses.dataclass(frozen=True)
class Op:
    """name: of the op and of the function of its backends.  package: where these are.  backends: in order."""

    name: str
    package: str
    backends: tuple[str, ...]

    def compute(self, call: Any, backend: str = "auto") -> Any:
        """What the op returns for ``call``, a dataclass; its field `interpret`, if any, is for kernels.

        backend: "auto" for the first that can, "pallas" for the first of the kernels that can, or a name.

        Raises:
            ValueError: an unknown ``backend``, or one that cannot compute the call, with the reason.
        """
        choice = self.choose(call, backend)
        if _recorder.value is not None:
            _recorder.value.choices.append(choice)
            return getattr(self._module(self.backends[-1]), self.name)(call)
        if choice.refused:
            _log_once(f"{choice}", logging.WARNING if here().platform == "gpu" else logging.INFO)
        return getattr(self._module(choice.backend), self.name)(call)

    def choose(self, call: Any, backend: str = "auto") -> Choice:
        """The backend of ``call``; see `compute`."""
        refused: tuple[tuple[str, str], ...] = ()
        for name in self._candidates(backend):
            reason = self._refusal(name, call)
            if reason is None:
                return Choice(self.name, _arrays(call), name, refused)
            refused = (*refused, (name, reason))
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refused)
        raise ValueError(f"backend = {backend!r}: the kernels do not support this call: {reasons}")

    def _candidates(self, backend: str) -> list[str]:
        """The backends that ``backend`` names, in the order to try them."""
        allowed = dict.fromkeys(("auto", "reference", "xla", "pallas", *self.backends))
        wanted = _auto.value if backend == "auto" else (backend,)
        meant = {"auto": self.backends, "pallas": tuple(n for n in self.backends if n in KERNELS)}
        names = [name for one in wanted if one in allowed for name in meant.get(one, (one,))]
        if not names:
            raise ValueError(f"backend = {', '.join(wanted)!r}: must be one of {', '.join(allowed)}")
        return names

    def _refusal(self, name: str, call: Any) -> str | None:
        """Why backend ``name`` does not compute the call here, or None."""
        if name not in KERNELS:
            return None
        interpret = getattr(call, "interpret", False)
        device = here()
        if not interpret and device.platform != KERNELS[name]:
            return f"the platform is {device.platform}"
        try:
            module = self._module(name)
        except Exception as error:  # an unsuitable jax fails in many ways; each only means: no kernels here
            return f"it cannot be imported: {error}"
        reason = module.supports(call)
        if reason is None and not interpret:
            reason = module.runs_on(device)
            if reason is None and _target.value is None:
                reason = _self_test(module, *((module.kind(call),) if hasattr(module, "kind") else ()))
        return reason

    def _module(self, name: str) -> ModuleType:
        return importlib.import_module(f"{self.package}.{name}")


@contextlib.contextmanager
def auto_means(*backends: str) -> Iterator[None]:
    """Calls with backend="auto" traced inside use the first of ``backends`` that can compute them.

    To compare backends under a whole model. Names that an op does not have are passed over.
    """
    allowed = ("auto", "reference", "xla", "pallas", *KERNELS)
    for backend in backends:
        if backend not in allowed:
            raise ValueError(f"backend = {backend!r}: must be one of {', '.join(allowed)}")
    with _auto(backends):
        yield


@contextlib.contextmanager
def compiled_for(device: Device) -> Iterator[None]:
    """Calls traced inside are for ``device``, whatever is here: to compile ahead of time."""
    with _target(device):
        yield


def explain(
    function: Callable[..., Any], *args: Any, device: Device | None = None, **kwargs: Any
) -> list[Choice]:
    """The backends of the calls of ops inside ``function(*args, **kwargs)``; equal calls are listed once.

    function: an op or anything that calls ops, like a model's loss. Nothing is computed: arrays may be
    `jax.ShapeDtypeStruct`, also within containers; other arguments are passed as they are.
    device: None for the one that programs traced now will run on; `H100`, for instance, with no GPU here.

    Raises:
        ValueError: as the ops do.
    """
    leaves, tree = jax.tree.flatten((args, kwargs))
    traced = [i for i, leaf in enumerate(leaves) if hasattr(leaf, "shape") and hasattr(leaf, "dtype")]

    def run(arrays: list[Any]) -> None:
        values = dict(zip(traced, arrays, strict=True))
        args, kwargs = jax.tree.unflatten(tree, [values.get(i, leaf) for i, leaf in enumerate(leaves)])
        function(*args, **kwargs)

    recorder = _Recorder()
    with _recorder(recorder), _target(device) if device is not None else contextlib.nullcontext():
        jax.eval_shape(run, [leaves[i] for i in traced])
    return list(dict.fromkeys(recorder.choices))


def here() -> Device:
    """What a program traced now will run on: the default device's kind, or what `compiled_for` says."""
    if _target.value is not None:
        return _target.value
    device = jax.config.jax_default_device  # type: ignore[attr-defined]
    name = jax.default_backend() if device is None else getattr(device, "platform", str(device))
    if name not in ("gpu", "cuda", "rocm"):
        return Device(name)
    if not hasattr(device, "compute_capability"):
        device = jax.local_devices(backend=name)[0]
    return Device("gpu", getattr(device, "compute_capability", None))


class _Recorder:
    """Collects choices; compared by identity, so that every `explain` traces anew."""

    def __init__(self) -> None:
        self.choices: list[Choice] = []


def _arrays(call: Any) -> str:
    """ "q bfloat16[8, 4096, 16, 128], ..." """
    named = ((field.name, getattr(call, field.name)) for field in dataclasses.fields(call))
    return ", ".join(f"{name} {x.dtype}{list(x.shape)}" for name, x in named if hasattr(x, "dtype"))


@functools.cache
def _self_test(module: ModuleType, *kind: Any) -> str | None:
    # In a thread of its own: no trace, mesh or setting of the caller's reaches it.
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        try:
            return pool.submit(module.self_test, *kind).result()
        except Exception as error:
            return f"its self-test failed ({type(error).__name__}: {error})"


@functools.cache
def _log_once(message: str, level: int) -> None:
    logger.log(level, "%s", message)
