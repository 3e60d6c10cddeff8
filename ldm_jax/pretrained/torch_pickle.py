"""Pickles of tensors, read without torch and without running foreign code.

A pickle is a program for a stack machine. It is read twice: first as a list of
instructions, to bound its cost, then by an unpickler in which every global name is an
inert object of this module, so that no instruction can call anything else.
"""

import io
import math
import pickle
import pickletools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ldm_jax.files import printable

MAX_PICKLE_BYTES = 64 * 2**20
"""Limit of the pickle without the tensors' bytes; Stable Diffusion has 0.2 MiB."""

MAX_TUPLE_DEPTH = 64
"""Limit of nesting: CPython hashes nested tuples on the C stack, without a limit."""

MAX_DIMS = 32
MAX_ELEMENTS = 2**48

_OPCODES = frozenset(
    "PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 LONG4 "
    "BINFLOAT SHORT_BINSTRING BINSTRING SHORT_BINUNICODE BINUNICODE BINUNICODE8 "
    "SHORT_BINBYTES BINBYTES BINBYTES8 EMPTY_DICT EMPTY_LIST EMPTY_TUPLE EMPTY_SET "
    "TUPLE TUPLE1 TUPLE2 TUPLE3 APPEND APPENDS SETITEM SETITEMS ADDITEMS BINPUT "
    "LONG_BINPUT MEMOIZE BINGET LONG_BINGET GLOBAL STACK_GLOBAL REDUCE NEWOBJ BUILD "
    "BINPERSID".split()
)
"""Instructions of protocols 2 to 4, without extension codes, INST, OBJ and text."""

_CODE_BY_STORAGE = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}


class RefusedError(Exception):
    """A file that is refused: the reason in one line, without the path."""


_ADVICE = (
    "wanted one of tensors and containers alone; nothing in it was run; try a "
    "safetensors file of the same weights"
)


class Storage(NamedTuple):
    """A flat array of which tensors are views."""

    key: str
    """Name in the file."""
    dtype: str
    """Element type, in safetensors' notation."""
    total: int
    """Elements of the whole storage."""
    start: int
    """First element of the view; above 0 only in files of torch < 0.4."""
    numel: int
    """Elements of the view."""


class StridedTensor(NamedTuple):
    """A tensor, checked to lie within its storage."""

    storage: Storage
    """Its storage."""
    offset: int
    """Index of its first element."""
    shape: tuple[int, ...]
    """Its shape."""
    strides: tuple[int, ...]
    """Elements between neighbours along each axis."""


class Unpickled(NamedTuple):
    """Result of a pickle."""

    content: Any
    """Its object."""
    storages: dict[str, Storage]
    """Storages that it refers to, by key."""


def load(stream: Any) -> Unpickled:
    """Read one pickle and leave the stream after its end.

    Args:
      stream: Binary, with `read`, `readline`, `seek` and `tell`.

    Returns:
      Dicts, lists, tuples, strings, numbers and `StridedTensor`s.

    Raises:
      RefusedError: If it asks for anything else, or exceeds a limit.
      Exception: As the standard library raises on a malformed pickle.
    """
    begin = stream.tell()
    _check_program(stream)
    size = stream.tell() - begin
    stream.seek(begin)
    unpickler = _WeightsUnpickler(stream.read(size))
    content = unpickler.load()
    return Unpickled(content, unpickler.storages)


def damaged(got: str) -> RefusedError:
    """Return the error of a damaged file."""
    return RefusedError(
        f"got a damaged torch checkpoint ({got}), wanted a whole one; try downloading "
        "it again"
    )


class _Global:
    """Value of a global name in a pickle: immutable, and not usable as a class."""

    __slots__ = ("_build", "dtype")

    def __init__(
        self, build: Callable[..., Any] | None = None, dtype: str | None = None
    ) -> None:
        self._build = build
        self.dtype = dtype

    def __call__(self, *args: Any) -> Any:
        if self._build is None:
            raise pickle.UnpicklingError("a name is called that is not a function")
        return self._build(*args)

    def __setstate__(self, state: object) -> None:
        """Ignore the state: without this method, BUILD would set attributes."""


class _Ignored:
    """Placeholder of a value that no tensor depends on."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        """Ignore the state."""


class _OrderedDict(dict[Any, Any]):
    """An ordered dict as in torch's state dicts, without its `_metadata`."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        """Ignore the state."""


def _whole(value: object, what: str) -> int:
    if type(value) is not int or not 0 <= value <= MAX_ELEMENTS:
        raise damaged(f"{what} is not a whole number from 0 to 2**48")
    return value


def _size(sizes: object = ()) -> tuple[int, ...]:
    if not isinstance(sizes, tuple | list) or len(sizes) > MAX_DIMS:
        raise damaged("a size is not a short list of numbers")
    return tuple(_whole(n, "a size or stride") for n in sizes)


def _tensor(
    storage: object, offset: object, shape: object, strides: object
) -> StridedTensor:
    """Check that a tensor lies within its storage before anything is allocated."""
    if type(storage) is not Storage:
        raise damaged("a tensor without a storage")
    tensor = StridedTensor(
        storage, _whole(offset, "an offset"), _size(shape), _size(strides)
    )
    if len(tensor.shape) != len(tensor.strides):
        raise damaged(f"shape {tensor.shape} has strides {tensor.strides}")
    numel = math.prod(tensor.shape)
    reach = sum(
        (n - 1) * by for n, by in zip(tensor.shape, tensor.strides, strict=True)
    )
    end = tensor.offset + reach + 1 if numel else tensor.offset
    if end > storage.numel or numel > storage.numel:
        raise damaged(
            f"a tensor of shape {tensor.shape}, strides {tensor.strides} and offset "
            f"{tensor.offset} does not fit its storage of {storage.numel}"
        )
    if math.prod(max(n, 1) for n in tensor.shape) > MAX_ELEMENTS:
        raise damaged(f"a tensor of shape {tensor.shape}")
    return tensor


def _tensor_v2(
    storage: object,
    offset: object,
    shape: object,
    strides: object,
    requires_grad: object,
    hooks: object,
    flags: object = None,
) -> StridedTensor:
    if flags:  # lazily negated or conjugated
        raise RefusedError(
            "got a tensor with lazy negation or conjugation, wanted plain numbers; try "
            "saving it with torch after resolve_neg()"
        )
    return _tensor(storage, offset, shape, strides)


def _parameter(tensor: object, requires_grad: object, hooks: object) -> StridedTensor:
    if type(tensor) is not StridedTensor:
        raise damaged("a parameter without a tensor")
    return tensor


def _ignored(*args: object) -> _Ignored:
    return _Ignored()


_INERT_NAMES = {
    "torch": "float64 double float32 float float16 half bfloat16 int64 long int32 int "
    "int16 short int8 uint8 bool complex64 complex128 strided contiguous_format",
    "pytorch_lightning.callbacks.model_checkpoint": "ModelCheckpoint",
    "pytorch_lightning.callbacks.early_stopping": "EarlyStopping",
    "lightning.pytorch.callbacks.model_checkpoint": "ModelCheckpoint",
    "lightning.pytorch.callbacks.early_stopping": "EarlyStopping",
    "numpy": "ndarray",
}
"""Names that may occur but not be called; Lightning uses the callbacks as keys."""

_GLOBALS: Mapping[tuple[str, str], _Global] = {
    ("torch._utils", "_rebuild_tensor"): _Global(_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): _Global(_tensor_v2),
    ("torch._utils", "_rebuild_parameter"): _Global(_parameter),
    ("torch", "Size"): _Global(_size),
    ("torch", "device"): _Global(_ignored),
    ("collections", "OrderedDict"): _Global(_OrderedDict),
    ("numpy", "dtype"): _Global(_ignored),
    ("numpy.core.multiarray", "scalar"): _Global(_ignored),
    ("numpy.core.multiarray", "_reconstruct"): _Global(_ignored),
    ("numpy._core.multiarray", "scalar"): _Global(_ignored),
    ("numpy._core.multiarray", "_reconstruct"): _Global(_ignored),
    ("_codecs", "encode"): _Global(_ignored),
    ("builtins", "set"): _Global(_ignored),
    ("__builtin__", "set"): _Global(_ignored),
    **{("torch", name): _Global(dtype=c) for name, c in _CODE_BY_STORAGE.items()},
    **{
        (module, name): _Global()
        for module, names in _INERT_NAMES.items()
        for name in names.split()
    },
}
"""Every global name that a pickle may use; none contains a dot."""


class _WeightsUnpickler(pickle.Unpickler):
    """Builds containers and `StridedTensor`s, and collects the storages."""

    def __init__(self, program: bytes) -> None:
        # Strings of Python 2 are bytes; invalid UTF-8 is never a key.
        super().__init__(io.BytesIO(program), encoding="utf-8", errors="replace")
        self.storages: dict[str, Storage] = {}

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        """Return the inert object of a name, or refuse it."""
        found = _GLOBALS.get((module_name, global_name))
        if found is None:
            raise RefusedError(
                f"got a pickle that uses {printable(module_name)}."
                f"{printable(global_name)}, {_ADVICE}"
            )
        return found

    def persistent_load(self, pid: Any, /) -> Storage:
        """Return the storage that a persistent id describes."""
        if type(pid) is not tuple or len(pid) not in (5, 6) or pid[0] != "storage":
            raise damaged("a persistent id that is not a storage")
        _, kind, key, _, numel, *view = pid
        if type(kind) is not _Global or kind.dtype is None or type(key) is not str:
            raise damaged("a storage without a type or a key")
        total = _whole(numel, "a storage's size")
        storage = Storage(key, kind.dtype, total, 0, total)
        if self.storages.setdefault(key, storage) != storage:
            raise damaged(f"storage {printable(key)} is described twice, differently")
        if not view or view[0] is None:
            return storage
        _, start, length = view[0]
        start, length = _whole(start, "a view's start"), _whole(length, "its length")
        if start + length > total:
            raise damaged(f"a view of storage {printable(key)} ends beyond it")
        return storage._replace(start=start, numel=length)


def _check_program(stream: Any) -> None:
    """Check one pickle's instructions and leave the stream after its end."""
    stack: list[int | None] = []  # depth of tuples; None is a mark
    memo: dict[int, int] = {}
    begin = stream.tell()
    for count, (op, arg, at) in enumerate(pickletools.genops(stream)):
        if op.name not in _OPCODES:
            names = f" {printable(arg)}" if isinstance(arg, str) else ""
            raise RefusedError(
                f"got a pickle with the instruction {op.name}{names}, {_ADVICE}"
            )
        if at - begin > MAX_PICKLE_BYTES or stream.tell() - begin > MAX_PICKLE_BYTES:
            raise damaged(f"its pickle is longer than {MAX_PICKLE_BYTES} bytes")
        if op.name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            slot = len(memo) if arg is None else int(arg)
            if slot > count:  # the unpickler allocates up to the highest slot
                raise damaged(f"memo slot {slot}")
            memo[slot] = stack[-1] or 0
        elif op.name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[int(arg or 0)])
        elif op.name == "MARK":
            stack.append(None)
        else:
            _apply(op, stack)


def _apply(op: pickletools.OpcodeInfo, stack: list[int | None]) -> None:
    """Apply an instruction to a stack of tuple depths."""
    num_popped = len(op.stack_before)
    depth = 0
    if pickletools.markobject in op.stack_before:
        while (item := stack.pop()) is not None:
            depth = max(depth, item)
        num_popped = op.stack_before.index(pickletools.markobject)
    for _ in range(num_popped):
        depth = max(depth, stack.pop() or 0)
    depth += op.name.startswith("TUPLE")
    if depth > MAX_TUPLE_DEPTH:
        raise damaged(f"tuples nested more than {MAX_TUPLE_DEPTH} deep")
    stack.extend([depth] * len(op.stack_after))
