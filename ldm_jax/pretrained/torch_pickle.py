"""Pickles of tensors, read without torch and without running foreign code.

A pickle is a program for a stack machine. Its instructions are listed first, to refuse
those that no checkpoint needs and to bound their number, then carried out by a machine
of this module, in which every global name is an inert object and every key of a
dictionary is of a kind whose hashes cannot be made to collide.
"""

import io
import math
import pickletools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ldm_jax.files import printable

MAX_PICKLE_BYTES = 16 * 2**20
"""Limit of the pickle without the tensors' bytes; Stable Diffusion has 0.2 MiB."""

MAX_STEPS = 2**20
"""Limit of instructions and of the items that they copy, some seconds of work; Stable
Diffusion with its average and its optimizer takes a tenth of it."""

MAX_KEY = 2**60
"""Limit of whole numbers as keys: Python hashes larger ones by their rest modulo
2**61 - 1, so that many could be made to collide, in quadratic time."""

MAX_DIMS = 32
MAX_ARGUMENTS = 8
MAX_ELEMENTS = 2**48

_OPCODES = frozenset(
    "PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 LONG4 "
    "BINFLOAT SHORT_BINSTRING BINSTRING SHORT_BINUNICODE BINUNICODE BINUNICODE8 "
    "SHORT_BINBYTES BINBYTES BINBYTES8 EMPTY_DICT EMPTY_LIST EMPTY_TUPLE EMPTY_SET "
    "TUPLE TUPLE1 TUPLE2 TUPLE3 APPEND APPENDS SETITEM SETITEMS ADDITEMS BINPUT "
    "LONG_BINPUT MEMOIZE BINGET LONG_BINGET GLOBAL STACK_GLOBAL REDUCE NEWOBJ BUILD "
    "BINPERSID".split()
)
"""Instructions of protocols 2 to 4, without extension codes, classes and text."""

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
    end: int
    """Where the bytes after it start."""


def load(data: Any, start: int = 0) -> Unpickled:
    """Read one pickle.

    Args:
      data: Bytes, or anything with slices of bytes; no more than `MAX_PICKLE_BYTES` of
        it are copied.
      start: Where the pickle starts.

    Returns:
      Its object of dicts, lists, tuples, strings, numbers and `StridedTensor`s.

    Raises:
      RefusedError: If it asks for anything else, or exceeds a limit.
      Exception: As the standard library raises on a malformed pickle.
    """
    stream = io.BytesIO(data[start : start + MAX_PICKLE_BYTES])
    program = _instructions(stream, len(data) - start)
    machine = _Machine()
    return Unpickled(machine.run(program), machine.storages, start + stream.tell())


def damaged(got: str) -> RefusedError:
    """Return the error of a damaged file."""
    return RefusedError(
        f"got a damaged torch checkpoint ({got}), wanted a whole one; try downloading "
        "it again"
    )


class _Global:
    """Value of a global name in a pickle: called by `_Machine` alone."""

    __slots__ = ("build", "dtype")

    def __init__(
        self, build: Callable[..., Any] | None = None, dtype: str | None = None
    ) -> None:
        self.build = build
        self.dtype = dtype


class _Ignored:
    """Placeholder of a value that no tensor depends on."""

    __slots__ = ()


class _OrderedDict(dict[Any, Any]):
    """An ordered dict as in torch's state dicts, without its `_metadata`."""

    __slots__ = ()


def _key(value: Any) -> Any:
    """Return a key of a dictionary or member of a set; refuse all but plain ones."""
    kind = type(value)
    if kind is int and not -MAX_KEY < value < MAX_KEY:
        raise damaged("a whole number beyond 2**60 is a key")
    if kind not in (str, bytes, int, bool, type(None), _Global):
        raise damaged(f"a key of type {kind.__name__}")
    return value


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


def _parameter(
    tensor: object, requires_grad: object, hooks: object, state: object = None
) -> StridedTensor:
    if type(tensor) is not StridedTensor:
        raise damaged("a parameter without a tensor")
    return tensor


def _on_device(tensor: object, *how: object) -> StridedTensor:
    return _parameter(tensor, None, None)


def _with_attributes(
    function: object, kind: object, args: object, state: object
) -> StridedTensor:
    """Read a tensor with attributes, or of a subclass, without them."""
    builds = (_tensor, _tensor_v2, _parameter)
    build = function.build if type(function) is _Global else None
    if build not in builds or build is None or type(args) is not tuple:
        raise damaged("a tensor without the function that makes it")
    if len(args) > MAX_ARGUMENTS:
        raise damaged("a tensor of too many arguments")
    return build(*args)


def _ordered_dict(items: Any = ()) -> _OrderedDict:
    """Copy a dictionary, or a list of pairs as Python 2 wrote it."""
    pairs = items.items() if isinstance(items, dict) else items
    return _OrderedDict([(_key(key), value) for key, value in pairs])


def _ignored(*args: object) -> _Ignored:
    return _Ignored()


_INERT_NAMES = {
    "torch": "float64 double float32 float float16 half bfloat16 int64 long int32 int "
    "int16 short int8 uint8 bool complex32 complex64 complex128 uint16 uint32 uint64 "
    "float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu strided "
    "contiguous_format Tensor DoubleTensor FloatTensor HalfTensor BFloat16Tensor "
    "LongTensor IntTensor ShortTensor CharTensor ByteTensor BoolTensor",
    "torch.nn.parameter": "Parameter",
    "pytorch_lightning.callbacks": "ModelCheckpoint EarlyStopping",
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
    ("torch._utils", "_rebuild_parameter_with_state"): _Global(_parameter),
    ("torch._utils", "_rebuild_device_tensor_from_cpu_tensor"): _Global(_on_device),
    ("torch._tensor", "_rebuild_from_type_v2"): _Global(_with_attributes),
    ("torch.serialization", "_get_layout"): _Global(_ignored),
    ("torch", "Size"): _Global(_size),
    ("torch", "device"): _Global(_ignored),
    ("collections", "OrderedDict"): _Global(_ordered_dict),
    ("numpy", "dtype"): _Global(_ignored),
    ("numpy.core.multiarray", "scalar"): _Global(_ignored),
    ("numpy.core.multiarray", "_reconstruct"): _Global(_ignored),
    ("numpy._core.multiarray", "scalar"): _Global(_ignored),
    ("numpy._core.multiarray", "_reconstruct"): _Global(_ignored),
    ("_codecs", "encode"): _Global(_ignored),
    ("collections", "Counter"): _Global(_ordered_dict),
    ("builtins", "bytearray"): _Global(_ignored),
    ("builtins", "complex"): _Global(_ignored),
    ("builtins", "set"): _Global(_ignored),
    ("__builtin__", "set"): _Global(_ignored),
    **{
        (module, name): _Global(dtype=code)
        for module in ("torch", "torch.cuda")
        for name, code in _CODE_BY_STORAGE.items()
    },
    **{
        (module, name): _Global()
        for module, names in _INERT_NAMES.items()
        for name in names.split()
    },
}
"""Every global name that a pickle may use; none contains a dot."""


class _Machine:
    """Carries out a pickle: builds containers and tensors, and collects storages."""

    def __init__(self) -> None:
        self.storages: dict[str, Storage] = {}
        self._stack: list[Any] = []
        self._marked: list[list[Any]] = []  # stacks below a mark
        self._memo: dict[int, Any] = {}
        self._steps = 0

    def run(self, program: list[tuple[str, Any]]) -> Any:
        """Carry out every instruction and return the object that is left."""
        for name, value in program:
            self._spend(1)
            if name in _CONSTANTS:
                self._stack.append(_CONSTANTS[name]())
            elif name in _LITERALS:
                self._stack.append(value)
            elif name in _FROM_MARK:
                self._collect(name)
            elif name in _FROM_STACK:
                self._gather(_FROM_STACK[name])
            else:
                self._act(name, value)
        return self._stack.pop()

    def _spend(self, steps: int) -> None:
        self._steps += steps
        if self._steps > MAX_STEPS:
            raise damaged(f"its pickle takes more than {MAX_STEPS} steps")

    def _collect(self, name: str) -> None:
        """Use all items above the last mark."""
        items, self._stack = self._stack, self._marked.pop()
        if name == "TUPLE":
            self._stack.append(tuple(items))
        elif name == "SETITEMS":
            self._set_items(items)
        elif name == "APPENDS":
            _of(list, self._stack[-1]).extend(items)
        else:
            _of(set, self._stack[-1]).update(map(_key, items))

    def _gather(self, count: int) -> None:
        """Make a tuple of the last items."""
        if len(self._stack) < count:
            raise damaged("its pickle lacks items")
        items = tuple(self._stack[-count:])
        self._stack[-count:] = [items]

    def _act(self, name: str, value: Any) -> None:
        stack = self._stack
        if name == "MARK":
            self._marked.append(stack)
            self._stack = []
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            slot = len(self._memo) if value is None else value
            if slot > self._steps:
                raise damaged(f"memo slot {slot}")
            self._memo[slot] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self._memo[value])
        elif name == "GLOBAL":
            stack.append(_find_global(*value.split(" ", 1)))
        elif name == "BINPERSID":
            stack.append(self._storage(stack.pop()))
        elif name not in ("PROTO", "FRAME", "STOP"):
            self._act_on_two(name, stack.pop())

    def _act_on_two(self, name: str, second: Any) -> None:
        stack = self._stack
        if name == "APPEND":
            _of(list, stack[-1]).append(second)
        elif name == "SETITEM":
            self._set_items([stack.pop(), second])
        elif name == "REDUCE":
            stack.append(self._call(stack.pop(), second))
        elif name == "STACK_GLOBAL":
            stack.append(_find_global(stack.pop(), second))
        elif name != "BUILD" or not isinstance(stack[-1], _HAVE_STATES):
            raise damaged(f"the instruction {name} for a {type(stack[-1]).__name__}")

    def _set_items(self, items: list[Any]) -> None:
        found = _of(dict, self._stack[-1])
        for key, value in zip(items[::2], items[1::2], strict=True):
            found[_key(key)] = value

    def _call(self, function: Any, args: Any) -> Any:
        if type(function) is not _Global or function.build is None:
            raise damaged("a name is called that is not a function")
        # What a function copies counts: a list that is made once may be copied often.
        self._spend(len(_of(tuple, args)))
        self._spend(sum(len(a) for a in args if isinstance(a, list | tuple | dict)))
        return function.build(*args)

    def _storage(self, pid: Any) -> Storage:
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


_HAVE_STATES = (_Global, _Ignored, _OrderedDict)
"""Values whose state is passed over."""
_CONSTANTS: Mapping[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_SET": set,
}
_LITERALS = frozenset(
    "BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT SHORT_BINSTRING BINSTRING "
    "SHORT_BINUNICODE BINUNICODE BINUNICODE8 SHORT_BINBYTES BINBYTES BINBYTES8".split()
)
_FROM_MARK = ("TUPLE", "SETITEMS", "APPENDS", "ADDITEMS")
_FROM_STACK = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def _of(kind: type, value: Any) -> Any:
    """Return a value of a type, or of ordered dicts where dictionaries are wanted."""
    if type(value) is kind or (kind is dict and type(value) is _OrderedDict):
        return value
    raise damaged(f"a {type(value).__name__} in place of a {kind.__name__}")


def _find_global(module_name: object, global_name: object) -> _Global:
    """Return the inert object of a name, or refuse it."""
    found = _GLOBALS.get((str(module_name), str(global_name)))
    if found is None:
        raise RefusedError(
            f"got a pickle that uses {printable(str(module_name))}."
            f"{printable(str(global_name))}, {_ADVICE}"
        )
    return found


def _instructions(stream: io.BytesIO, size: int) -> list[tuple[str, Any]]:
    """List the instructions of one pickle and leave the stream after its end."""
    found: list[tuple[str, Any]] = []
    try:
        for op, value, _ in pickletools.genops(stream):
            if op.name not in _OPCODES:
                names = f" {printable(value)}" if isinstance(value, str) else ""
                raise RefusedError(
                    f"got a pickle with the instruction {op.name}{names}, {_ADVICE}"
                )
            if len(found) >= MAX_STEPS:
                raise damaged(f"its pickle has more than {MAX_STEPS} instructions")
            if op.name.endswith("BINSTRING"):
                # Strings of Python 2 are bytes; invalid UTF-8 is never a key.
                value = str(value).encode("latin-1").decode("utf-8", "replace")
            found.append((op.name, value))
    except ValueError:
        if size > MAX_PICKLE_BYTES and stream.tell() == MAX_PICKLE_BYTES:
            raise damaged(
                f"its pickle is longer than {MAX_PICKLE_BYTES} bytes"
            ) from None
        raise
    return found
