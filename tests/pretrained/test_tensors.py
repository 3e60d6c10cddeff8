import io
import itertools
import json
import os
import pickle
import struct
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from ldm_jax.files import write_safetensors
from ldm_jax.pretrained import tensors as weights
from ldm_jax.pretrained import torch_checkpoint
from ldm_jax.pretrained import torch_pickle as pickles
from ldm_jax.pretrained.tensors import Entry, Tensors, open_tensors
from ldm_jax.types import InputError

MATRIX = np.arange(6, dtype=np.float32).reshape(2, 3)
FORMS = ("zip", "legacy")

# An assembler of pickles, protocol 2 as torch writes it.
TRUE, FALSE, NONE, EMPTY = b"\x88", b"\x89", b"N", b")"


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def text(string: str) -> bytes:
    return b"X" + struct.pack("<I", len(string.encode())) + string.encode()


def number(value: int) -> bytes:
    return b"\x8a\x0a" + value.to_bytes(10, "little", signed=True)


def row(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts) + b"t"


def table(**values: bytes) -> bytes:
    return b"}(" + b"".join(text(k) + v for k, v in values.items()) + b"u"


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + row(*arguments) + b"R"


def program(body: bytes) -> bytes:
    return b"\x80\x02" + body + b"."


def storage(kind: str = "Float", key: str = "0", numel: int = 6, view=()) -> bytes:
    parts = (text("storage"), name("torch", kind + "Storage"), text(key), text("cpu"))
    return row(*parts, number(numel), *view) + b"Q"


def tensor(where: bytes, shape=(2, 3), strides=(3, 1), offset: int = 0) -> bytes:
    size, step = row(*map(number, shape)), row(*map(number, strides))
    hooks = call(name("collections", "OrderedDict"))
    rebuild = name("torch._utils", "_rebuild_tensor_v2")
    return call(rebuild, where, number(offset), size, step, FALSE, hooks)


def write_zip(path: Path, body: bytes, storages=None, **changes) -> Path:
    with zipfile.ZipFile(path, "w", changes.get("compression", 0)) as archive:
        archive.writestr("a/data.pkl", program(body))
        archive.writestr("a/byteorder", changes.get("byteorder", "little"))
        for key, data in (storages or {}).items():
            archive.writestr(f"a/data/{key}", data)
        archive.writestr("a/version", "3\n")
    return path


def write_legacy(path: Path, body: bytes, storages=None, **changes) -> Path:
    itemsize = changes.get("itemsize", 4)
    system = {"protocol_version": 1001, "little_endian": True}
    system["little_endian"] = changes.get("little_endian", True)
    storages = storages or {}
    with path.open("wb") as file:
        for part in (0x1950A86A20F9469CFC6C, 1001, system):
            pickle.dump(part, file, protocol=2)
        file.write(program(body))
        pickle.dump(list(storages), file, protocol=2)
        for data in storages.values():
            file.write(struct.pack("<q", len(data) // itemsize) + data)
    return path


WRITERS = {"zip": write_zip, "legacy": write_legacy}


def write_checkpoint(form: str, folder: Path, body: bytes, storages=None, **changes):
    return WRITERS[form](folder / f"{form}.ckpt", body, storages, **changes)


def good(form: str, folder: Path) -> Path:
    body = table(w=tensor(storage()))
    return write_checkpoint(form, folder, body, {"0": MATRIX.tobytes()})


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        tensors = open_tensors(path)
        for key in tensors:
            tensors[key]
    message = str(caught.value)
    assert "\n" not in message and "try " in message and str(path.parent) in message
    return message.replace(str(path), "").replace(str(path.parent), "")


@pytest.mark.parametrize("form", FORMS)
def test_a_hand_made_checkpoint_is_read(form, tmp_path):
    tensors = open_tensors(good(form, tmp_path))
    assert list(tensors) == ["w"]
    assert (tensors.shape("w"), tensors.dtype("w")) == ((2, 3), "F32")
    assert np.array_equal(tensors["w"], MATRIX)


def test_open_tensors_detects_the_format_from_the_content(tmp_path):
    for suffix in (".bin", ".pth", ".pt", ""):
        path = good("legacy", tmp_path).rename(tmp_path / f"model{suffix}")
        assert list(open_tensors(path)) == ["w"]
    write_safetensors(tmp_path / "x.bin", {"v": MATRIX})
    assert list(open_tensors(tmp_path / "x.bin")) == ["v"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("kind", "dtype", "code"),
    [
        ("Double", np.float64, "F64"),
        ("Half", np.float16, "F16"),
        ("BFloat16", ml_dtypes.bfloat16, "BF16"),
    ],
)
def test_other_floats_are_read_as_float32_exactly(form, kind, dtype, code, tmp_path):
    values = np.asarray([0.5, -1.25, 3.0e-5, np.inf, np.nan, -0.0]).astype(dtype)
    body = table(w=tensor(storage(kind), (6,), (1,)))
    size = values.itemsize
    path = write_checkpoint(
        form, tmp_path, body, {"0": values.tobytes()}, itemsize=size
    )
    tensors = open_tensors(path)
    assert tensors.dtype("w") == code and tensors["w"].dtype == np.float32
    assert np.array_equal(tensors["w"], values.astype(np.float32), equal_nan=True)


@pytest.mark.parametrize(("kind", "dtype"), [("Long", np.int64), ("Byte", np.uint8)])
def test_integers_stay_integers(kind, dtype, tmp_path):
    body = table(w=tensor(storage(kind)))
    data = {"0": MATRIX.astype(dtype).tobytes()}
    array = open_tensors(write_zip(tmp_path / "a.pt", body, data))["w"]
    assert array.dtype == dtype and np.array_equal(array, MATRIX)


def test_a_double_that_float32_cannot_hold_is_refused(tmp_path):
    tensors = Tensors.from_arrays({"w": np.asarray([1e300])})
    with pytest.raises(InputError, match="beyond float32"):
        tensors["w"]


@pytest.mark.parametrize("form", FORMS)
def test_views_of_one_storage_are_read_by_offset_and_strides(form, tmp_path):
    body = table(
        a=tensor(storage()),
        transposed=tensor(storage(), (3, 2), (1, 3)),
        last_row=tensor(storage(), (3,), (1,), 3),
        column=tensor(storage(), (2, 1), (3, 1), 2),
        scalar=tensor(storage(), (), (), 5),
        empty=tensor(storage(), (0, 7), (7, 1), 6),
    )
    path = write_checkpoint(form, tmp_path, body, {"0": MATRIX.tobytes()})
    tensors = open_tensors(path)
    assert np.array_equal(tensors["transposed"], MATRIX.T)
    assert tensors["transposed"].flags.c_contiguous
    assert np.array_equal(tensors["last_row"], MATRIX[1])
    assert np.array_equal(tensors["column"], MATRIX[:, 2:])
    assert tensors["scalar"].shape == () and tensors["scalar"] == 5.0
    assert tensors["empty"].shape == (0, 7)


def test_a_storage_view_of_the_oldest_files_is_read(tmp_path):
    view = row(text("view"), number(2), number(3))
    body = table(w=tensor(storage(view=(view,)), (3,), (1,)))
    path = write_legacy(tmp_path / "a.pth", body, {"0": MATRIX.tobytes()})
    assert open_tensors(path)["w"].tolist() == [2.0, 3.0, 4.0]


@pytest.mark.parametrize("place", ["state_dict", "model"])
def test_the_state_dict_is_found_and_all_else_ignored(place, tmp_path):
    callback = name("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint")
    score = call(
        name("numpy.core.multiarray", "scalar"),
        call(name("numpy", "dtype"), text("f8"), FALSE, TRUE)
        + row(number(3), text("<"))
        + b"b",
        call(name("_codecs", "encode"), text("\x00"), text("latin1")),
    )
    body = table(
        epoch=number(3),
        callbacks=b"}" + callback + table(score=score) + b"s",
        optimizer_states=b"]" + tensor(storage(key="1"), (1,), (1,)) + b"a",
        **{place: table(w=tensor(storage()), steps=number(4))},
    )
    body = body[:-1] + text("dtype") + name("torch", "float32") + b"u"
    data = {"0": MATRIX.tobytes(), "1": bytes(24)}
    assert list(open_tensors(write_zip(tmp_path / "a.ckpt", body, data))) == ["w"]


def test_state_dict_attributes_and_parameter_wrappers_are_unwrapped(tmp_path):
    parameter = call(
        name("torch._utils", "_rebuild_parameter"), tensor(storage()), TRUE, NONE
    )
    body = call(name("collections", "OrderedDict")) + text("w") + parameter + b"s"
    body += table(_metadata=table(version=number(1))) + b"b"
    path = write_zip(tmp_path / "a.pt", body, {"0": MATRIX.tobytes()})
    assert np.array_equal(open_tensors(path)["w"], MATRIX)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_files_that_torch_writes_are_read(form, protocol, tmp_path):
    torch = pytest.importorskip("torch")
    base = torch.arange(12.0).reshape(3, 4)
    state = {
        "half": base.half(),
        "bfloat": base.bfloat16(),
        "double": base.double(),
        "transposed": base.t(),
        "sliced": base[1:, ::2],
        "tied": base,
        "parameter": torch.nn.Parameter(base),
        "scalar": torch.tensor(2.0),
        "empty": torch.empty(0, 5),
        "steps": torch.arange(3),
        "flag": torch.tensor([True, False]),
        **torch.nn.Conv2d(2, 3, 3).state_dict(prefix="conv."),
    }
    torch.save(
        {"state_dict": state, "epoch": 3, "shape": base.shape},
        tmp_path / "a.ckpt",
        pickle_protocol=protocol,
        _use_new_zipfile_serialization=form == "zip",
    )
    tensors = open_tensors(tmp_path / "a.ckpt")
    assert set(tensors) == set(state)
    for key, value in state.items():
        value = value.detach()
        wanted = (value.float() if value.is_floating_point() else value).numpy()
        assert (
            np.array_equal(tensors[key], wanted) and tensors.shape(key) == value.shape
        )
        assert tensors[key].dtype == wanted.dtype


@pytest.mark.parametrize("form", FORMS)
def test_the_state_dict_of_a_module_is_read(form, tmp_path):
    torch = pytest.importorskip("torch")
    state = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 2))
    state = state.state_dict()
    path = tmp_path / "a.pt"
    torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
    tensors = open_tensors(path)
    assert all(np.array_equal(tensors[k], state[k].numpy()) for k in state)
    assert list(tensors) == list(state)


class Evil:
    def __init__(self, function, *arguments):
        self.reduced = (function, arguments)

    def __reduce__(self):
        return self.reduced


def attack(module: str, attribute: str, *arguments: bytes):
    return call(name(module, attribute), *arguments)


def attacks(proof: Path) -> dict[str, bytes]:
    """Return pickles that would create the file `proof`, by the name in the refusal."""
    touch = text(f"touch {proof}")
    python = text(f"open({str(proof)!r}, 'w').close()")
    getattr_chain = call(
        attack("builtins", "getattr", attack("builtins", "__import__", text("os")))
    )
    return {
        "os.system": attack("os", "system", touch),
        "posix.system": attack("posix", "system", touch),
        "nt.system": attack("nt", "system", touch),
        "subprocess.getoutput": attack("subprocess", "getoutput", touch),
        "builtins.eval": attack("builtins", "eval", python),
        "builtins.exec": attack("builtins", "exec", python),
        "__builtin__.eval": attack("__builtin__", "eval", python),
        "builtins.open": attack("builtins", "open", text(str(proof)), text("w")),
        "builtins.getattr": getattr_chain,
        "builtins.__import__": attack("builtins", "__import__", text("antigravity")),
        "importlib.import_module": attack("importlib", "import_module", text("this")),
        "operator.attrgetter": attack("operator", "attrgetter", text("system")),
        "functools.partial": attack("functools", "partial", touch),
        "copyreg._reconstructor": attack("copyreg", "_reconstructor", touch),
        "copyreg.__newobj__": attack("copyreg", "__newobj__", touch),
        "torch.storage._load_from_bytes": attack(
            "torch.storage", "_load_from_bytes", touch
        ),
        "torch.load": attack("torch", "load", touch),
        "torch._utils.os": name("torch._utils", "os"),
        "numpy.load": attack("numpy", "load", touch),
        "torch.serialization.load": text("torch")
        + text("serialization.load")
        + b"\x93",
        "torch._utils._rebuild_tensor_v2.__globals__": text("torch._utils")
        + text("_rebuild_tensor_v2.__globals__")
        + b"\x93",
        "collections.OrderedDict.__init__": text("collections")
        + text("OrderedDict.__init__")
        + b"\x93",
        "ldm_jax.pretrained.torch_pickle.io": name(
            "ldm_jax.pretrained.torch_pickle", "io"
        ),
        "pytorch_lightning.callbacks.model_checkpoint.os": name(
            "pytorch_lightning.callbacks.model_checkpoint", "os"
        ),
        "os.popen": name("os", "popen") + EMPTY + b"\x81",  # NEWOBJ
        "INST os system": b"(" + touch + b"ios\nsystem\n",
        "OBJ": b"(" + name("os", "system") + touch + b"o",
        "EXT1": b"\x82\x01" + row(touch) + b"R",
        "EXT4": b"\x84\x01\x00\x00\x00" + row(touch) + b"R",
        "NEWOBJ_EX": name("os", "system") + row(touch) + b"}\x92",
        "PERSID": b"Pstorage\n",
    }


REAL = ["os.system", "posix.system", "subprocess.getoutput", "builtins.eval"]
REAL += ["builtins.exec", "__builtin__.eval", "INST os system", "OBJ"]


@pytest.mark.parametrize("attacked", REAL)
def test_the_attacks_of_these_tests_work_in_plain_pickle(attacked, tmp_path):
    pickle.loads(program(attacks(tmp_path / "proof")[attacked]))
    assert (tmp_path / "proof").exists()


@pytest.mark.parametrize("refused", attacks(Path("x")))
@pytest.mark.parametrize("form", FORMS)
def test_a_pickle_that_calls_a_foreign_function_is_refused_by_name(
    form, refused, tmp_path
):
    proof = tmp_path / "proof"
    body = table(w=tensor(storage()), x=attacks(proof)[refused])
    path = write_checkpoint(form, tmp_path, body, {"0": MATRIX.tobytes()})
    assert refused in refusal(path)
    assert not proof.exists()


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("form", FORMS)
def test_a_pickled_reduce_never_runs(form, protocol, tmp_path):
    proof = tmp_path / "proof"
    data = pickle.dumps({"w": Evil(os.system, f"touch {proof}")}, protocol=protocol)
    path = write_checkpoint(form, tmp_path, b"")
    path.write_bytes(path.read_bytes().replace(program(b""), data))
    if form == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a/data.pkl", data)
    message = refusal(path)
    assert "nothing in it was run" in message
    assert "posix.system" in message or protocol < 2
    assert not proof.exists()


def test_a_plain_pickle_never_runs(tmp_path):
    proof, path = tmp_path / "proof", tmp_path / "a.bin"
    path.write_bytes(pickle.dumps(Evil(eval, f"open({str(proof)!r}, 'w')")))
    assert "builtins.eval" in refusal(path)
    assert not proof.exists()


def test_a_plain_pickle_of_harmless_values_is_not_a_checkpoint(tmp_path):
    path = tmp_path / "a.pt"
    path.write_bytes(pickle.dumps({"w": 3}))
    assert "not a torch checkpoint" in refusal(path)


REBUILD = name("torch._utils", "_rebuild_tensor_v2")
ORDERED = name("collections", "OrderedDict")


@pytest.mark.parametrize(
    "body",
    [
        REBUILD + row(NONE, table(_build=ORDERED)) + b"b",
        REBUILD + table(__setstate__=ORDERED, __call__=ORDERED) + b"b",
        ORDERED + row(NONE, table(__call__=REBUILD)) + b"b",
        name("torch", "FloatStorage") + row(NONE, table(dtype=text("F64"))) + b"b",
        call(ORDERED) + table(__setstate__=REBUILD) + b"b" + EMPTY + b"b",
    ],
    ids=itertools.count(),
)
def test_the_build_opcode_changes_no_class_of_ours(body, tmp_path):
    both = table(x=body, w=tensor(storage()))
    path = write_zip(tmp_path / "a.pt", both, {"0": MATRIX.tobytes()})
    assert np.array_equal(open_tensors(path)["w"], MATRIX)
    assert np.array_equal(open_tensors(good("zip", tmp_path))["w"], MATRIX)


@pytest.mark.parametrize(
    "body",
    [
        tensor(storage()) + row(NONE, table(shape=EMPTY)) + b"b",
        tensor(storage()) + table(shape=EMPTY) + b"b",
        b"]" + table(__class__=NONE) + b"b",
        call(name("torch", "FloatStorage")),
        call(name("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint")),
        name("collections", "OrderedDict") + EMPTY + b"\x81",
        REBUILD + NONE + b"a",
        REBUILD + NONE + NONE + b"s",
        call(name("collections", "OrderedDict"), number(3)),
        call(name("torch._utils", "_rebuild_parameter"), NONE, TRUE, NONE),
        call(REBUILD, NONE, number(0), EMPTY, EMPTY, FALSE, NONE),
        text("storage") + b"Q",
        row(text("module"), NONE, NONE, NONE, NONE) + b"Q",
        row(text("storage"), text("F32"), text("0"), NONE, number(6)) + b"Q",
        storage(numel=-1),
        storage(numel=2**70),
        row(text("storage"), name("torch", "float32"), text("0"), NONE, number(6))
        + b"Q",
        row(text("storage"), name("torch", "FloatStorage"), NONE, NONE, number(6))
        + b"Q",
        storage() + storage("Double") + b"\x86",
        storage(view=(row(text("view"), number(4), number(3)),)),
        b"h\x07",
        b"r\xff\xff\xff\x7f",
        b"s",
        b"t",
        b"",
    ],
    ids=itertools.count(),
)
def test_an_invalid_pickle_is_refused(body, tmp_path):
    both = table(w=tensor(storage()), x=body)
    refusal(write_zip(tmp_path / "a.pt", both, {"0": MATRIX.tobytes()}))


@pytest.mark.parametrize(
    ("shape", "strides", "offset"),
    [
        ((2, 4), (4, 1), 0),
        ((2, 3), (3, 1), 1),
        ((2, 3), (4, 1), 0),
        ((3, 3), (1, 1), 0),  # would read within, but expands 6 elements to 9
        ((7,), (0,), 0),
        ((2**40,), (0,), 0),
        ((2**40, 2**40), (0, 0), 0),
        ((2**62,), (1,), 0),
        ((6,), (-1,), 5),
        ((6,), (1,), -1),
        ((-6,), (1,), 0),
        ((-2, -3), (3, 1), 0),
        ((2,), (2**62,), 0),
        ((0,), (1,), 7),
        ((0, 2**40, 2**40), (0, 0, 0), 0),
        ((2, 3), (1,), 0),
        ((1,) * 100, (1,) * 100, 0),
    ],
)
@pytest.mark.parametrize("form", FORMS)
def test_a_tensor_outside_its_storage_is_refused(
    form, shape, strides, offset, tmp_path
):
    body = table(w=tensor(storage(), shape, strides, offset))
    path = write_checkpoint(form, tmp_path, body, {"0": MATRIX.tobytes()})
    with pytest.raises(InputError, match="damaged"):
        open_tensors(path)  # already on opening


@pytest.mark.parametrize("size", [TRUE, text("3"), NONE, row(TRUE, TRUE), row(NONE)])
def test_a_tensor_size_that_is_not_of_numbers_is_refused(size, tmp_path):
    where = (storage(), number(0), size, row(number(1)), FALSE, NONE)
    path = write_zip(
        tmp_path / "a.pt", table(w=call(REBUILD, *where)), {"0": bytes(24)}
    )
    refusal(path)


@pytest.mark.parametrize("numel", [5, 7, 2**40])
@pytest.mark.parametrize("form", FORMS)
def test_a_storage_of_another_size_than_described_is_refused(form, numel, tmp_path):
    body = table(w=tensor(storage(numel=numel), (1,), (1,)))
    path = write_checkpoint(form, tmp_path, body, {"0": MATRIX.tobytes()})
    with pytest.raises(InputError, match="another size"):
        open_tensors(path)


@pytest.mark.parametrize("form", FORMS)
def test_a_missing_storage_is_refused(form, tmp_path):
    body = table(w=tensor(storage(key="../0")))
    path = write_checkpoint(form, tmp_path, body, {"0": MATRIX.tobytes()})
    assert "storage" in refusal(path)


def test_lazily_negated_tensors_are_refused(tmp_path):
    flags = table(neg=TRUE)
    where = (storage(), number(0), row(number(6)), row(number(1)), FALSE, NONE, flags)
    body = table(w=call(REBUILD, *where))
    path = write_zip(tmp_path / "a.pt", body, {"0": MATRIX.tobytes()})
    assert "negation" in refusal(path)


@pytest.mark.parametrize(
    "body",
    [
        b"}" + EMPTY + b"\x85" * 99_999 + b"Ns",  # CPython alone would crash on it
        b"}" + EMPTY + b"q\x00\x85q\x00h\x00\x85q\x00" * 33_333 + b"h\x00Ns",
        b"]" * 50_000 + b"a" * 49_999,
        b"(" * 50_000 + b"t" * 50_000,
    ],
    ids=["tuples", "memo", "lists", "marks"],
)
def test_deep_nesting_is_refused_and_does_not_crash(body, tmp_path):
    refusal(write_zip(tmp_path / "a.pt", body))


P61 = 2**61 - 1
COLLIDING = {
    "whole numbers": lambda i: number(P61 * i),
    "negative whole numbers": lambda i: number(-P61 * i),
    "tuples": lambda i: row(number(P61 * i)),
    "floats": lambda i: b"G" + struct.pack(">d", 2.0 ** (61 * i)),
    "sizes": lambda i: call(name("torch", "Size"), row(number(i))),
    "storages": lambda i: storage(key=f"{i}"),
    "tensors": lambda i: tensor(storage()),
    "lists": lambda i: b"]",
    "other objects": lambda i: call(name("torch", "device"), text("cpu")),
}


@pytest.mark.parametrize("form", ["dict", "items", "ordered", "set"])
@pytest.mark.parametrize("key", COLLIDING)
def test_a_key_whose_hash_can_be_chosen_is_refused(key, form, tmp_path):
    keys = [COLLIDING[key](i) for i in (1, 2)]
    items = [part for key in keys for part in (key, NONE)]
    body = {
        "dict": b"}" + b"".join(key + NONE + b"s" for key in keys),
        "items": b"}(" + b"".join(items) + b"u",
        "ordered": call(ORDERED, b"](" + b"".join(row(k, NONE) for k in keys) + b"e"),
        "set": b"\x8f(" + b"".join(keys) + b"\x90",
    }[form]
    both = table(w=tensor(storage()), x=body)
    path = write_zip(tmp_path / "a.pt", both, {"0": MATRIX.tobytes()})
    assert "key" in refusal(path)


def test_keys_of_trainers_are_read(tmp_path):
    """Places of parameters, their addresses in old files, classes of callbacks."""
    callback = name("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint")
    keys = [number(0), number(2**47), number(-1), callback, NONE, TRUE, text("a")]
    state = b"}" + b"".join(key + NONE + b"s" for key in keys)
    pairs = call(ORDERED, b"](" + row(text("v"), tensor(storage())) + b"e")
    body = table(state=state, state_dict=pairs)
    path = write_zip(tmp_path / "a.pt", body, {"0": MATRIX.tobytes()})
    assert np.array_equal(open_tensors(path)["v"], MATRIX)


FEW = 2**12
LONG = {
    "one byte": NONE * FEW,
    "marks": b"(" * FEW,
    "lists": b"]" * FEW,
    "memo": NONE + b"\x94" * FEW,
    # Lists that are made once and copied often: n steps of n items.
    "copies": b"]("
    + row(text("k"), NONE) * 200
    + b"eq\x00"
    + ORDERED
    + b"q\x01"
    + b"h\x01h\x00\x85R" * 200,
    "arguments": b"("
    + NONE * 200
    + b"tq\x00"
    + name("torch", "device")
    + b"q\x01"
    + b"h\x01h\x00R" * 200,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("body", LONG)
def test_a_pickle_of_too_many_steps_is_refused(form, body, tmp_path, monkeypatch):
    monkeypatch.setattr(pickles, "MAX_STEPS", FEW)
    path = write_checkpoint(form, tmp_path, LONG[body], {})
    assert f"more than {FEW} " in refusal(path)


@pytest.mark.parametrize("form", FORMS)
def test_a_pickle_of_too_many_bytes_is_refused(form, tmp_path, monkeypatch):
    monkeypatch.setattr(pickles, "MAX_PICKLE_BYTES", FEW)
    string = b"X" + struct.pack("<I", FEW) + bytes(FEW)
    for body in (string, b"c" + b"a" * FEW):
        path = write_checkpoint(form, tmp_path, body, {})
        assert f"longer than {FEW} bytes" in refusal(path)


def test_a_pickle_has_room_for_large_models_and_costs_seconds():
    """Some 40 steps a tensor, of which Stable Diffusion has 2,000 with its average."""
    assert 2**19 <= pickles.MAX_STEPS <= 2**21
    assert 2**22 <= pickles.MAX_PICKLE_BYTES <= 2**26


def test_a_zip_of_too_many_members_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_checkpoint, "MAX_DIRECTORY_BYTES", 2**17)
    data = {f"{i}": b"" for i in range(3000)}
    assert "members" in refusal(write_zip(tmp_path / "a.pt", b"}", data))


def test_the_state_dict_may_lie_in_another(tmp_path):
    body = table(state_dict=table(state_dict=table(w=tensor(storage()))))
    path = write_zip(tmp_path / "a.pt", body, {"0": MATRIX.tobytes()})
    assert list(open_tensors(path)) == ["w"]
    endless = b"}q\x00" + text("state_dict") + b"h\x00s"
    assert "without tensors" in refusal(write_zip(tmp_path / "b.pt", endless))


def test_a_huge_memo_slot_is_refused(tmp_path):
    body = NONE + b"r\xff\xff\xff\x0f"
    assert "memo slot" in refusal(write_zip(tmp_path / "a.pt", body))


def test_compressed_members_are_refused(tmp_path):
    body = table(w=tensor(storage(numel=2**20), (2**20,), (1,)))
    path = write_zip(
        tmp_path / "a.pt", body, {"0": bytes(2**22)}, compression=zipfile.ZIP_DEFLATED
    )
    assert "compressed" in refusal(path)


def test_big_endian_checkpoints_are_refused(tmp_path):
    zipped = write_zip(tmp_path / "a.pt", b"}", byteorder="big")
    legacy = write_legacy(tmp_path / "b.pt", b"}", little_endian=False)
    assert "big-endian" in refusal(zipped) and "big-endian" in refusal(legacy)


@pytest.mark.parametrize("names", [[], ["data.pkl"], ["a/data.pkl", "b/data.pkl"]])
def test_a_zip_that_is_not_one_checkpoint_is_refused(names, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for member in [*names, "a/readme"]:
            archive.writestr(member, program(b"}"))
    assert "data.pkl" in refusal(tmp_path / "a.zip")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_zip_with_two_members_of_one_name_is_refused(tmp_path):
    path = good("zip", tmp_path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("a/data.pkl", program(b"}"))
    refusal(path)
    path = good("zip", tmp_path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("a/data/0", bytes(24))
    assert "two members" in refusal(path)


@pytest.mark.parametrize("body", [b"}", b"]", NONE, table(epoch=number(3))])
def test_a_checkpoint_without_tensors_is_refused(body, tmp_path):
    assert "without tensors" in refusal(write_zip(tmp_path / "a.pt", body))


def small(form: str, folder: Path) -> Path:
    if form != "safetensors":
        return good(form, folder)
    write_safetensors(folder / "a.safetensors", {"w": MATRIX, "v": MATRIX})
    return folder / "a.safetensors"


@pytest.mark.parametrize("form", [*FORMS, "safetensors"])
def test_a_truncated_file_is_refused_at_every_length(form, tmp_path):
    path = small(form, tmp_path)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        refusal(path)


@pytest.mark.parametrize("form", [*FORMS, "safetensors"])
@pytest.mark.parametrize("flip", [0x01, 0x80, 0xFF])
def test_a_flipped_byte_raises_no_error_other_than_input_error(form, flip, tmp_path):
    path = small(form, tmp_path)
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1 :])
        try:
            tensors = open_tensors(path)
            arrays = [tensors[key] for key in tensors]
        except InputError:
            continue
        assert all(array.size <= 6 for array in arrays)


def test_a_flipped_weight_in_a_zip_is_detected(tmp_path):
    path = good("zip", tmp_path)
    data = MATRIX.tobytes()
    flipped = bytes([data[0] ^ 1]) + data[1:]
    path.write_bytes(path.read_bytes().replace(data, flipped))
    tensors = open_tensors(path)
    with pytest.raises(InputError, match="checksum"):
        tensors["w"]


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"\x80", b"PK\x03\x04", b"\x89PNG", b"{}", bytes(99)]
)
@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors", ".safetensors.index.json"])
def test_a_file_of_another_format_is_refused(content, suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    refusal(path)


@pytest.mark.parametrize("suffix", [".bin", ".ckpt", ".safetensors"])
def test_a_pointer_of_git_lfs_is_told(suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert "git lfs pull" in refusal(path)


def test_folders_pipes_and_missing_files_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "folder" in refusal(tmp_path)
    assert "ordinary" in refusal(tmp_path / "pipe")
    assert "No such file" in refusal(tmp_path / "none.ckpt")


def test_a_pickle_named_safetensors_is_refused(tmp_path):
    path = good("legacy", tmp_path).rename(tmp_path / "a.safetensors")
    assert ".ckpt" in refusal(path)


def write_raw(path: Path, header: dict, data: bytes) -> Path:
    head = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head + data)
    return path


ARRAYS = {
    "f32": MATRIX,
    "f16": MATRIX.astype(np.float16),
    "bf16": MATRIX.astype(ml_dtypes.bfloat16),
    "f64": MATRIX.astype(np.float64),
    "transposed": MATRIX.T,
    "strided": MATRIX[:, ::2],
    "big_endian": MATRIX.astype(">f4"),
    "i64": MATRIX.astype(np.int64),
    "flag": MATRIX > 2,
    "scalar": np.asarray(3.0, np.float32),
    "empty": np.zeros((0, 4), np.float32),
    "é\n": MATRIX,
}


def test_a_written_file_reads_back_equal(tmp_path):
    write_safetensors(tmp_path / "a.safetensors", ARRAYS, {"made by": "é"})
    tensors = open_tensors(tmp_path / "a.safetensors")
    assert set(tensors) == set(ARRAYS) and tensors.metadata == {"made by": "é"}
    for key, array in ARRAYS.items():
        assert tensors.shape(key) == array.shape
        assert np.array_equal(tensors[key], array)
        assert tensors.dtype("bf16") == "BF16"
        floating = key not in ("i64", "flag")
        assert tensors[key].dtype == (np.float32 if floating else array.dtype)


def test_the_safetensors_library_reads_our_files(tmp_path):
    write_safetensors(tmp_path / "a.safetensors", ARRAYS)
    with safe_open(tmp_path / "a.safetensors", framework="numpy") as file:
        assert set(file.keys()) == set(ARRAYS) and file.metadata() is None
        for key, array in ARRAYS.items():
            assert np.array_equal(file.get_tensor(key), array)


def test_equal_input_gives_equal_bytes(tmp_path):
    metadata = {c: c for c in "qwertyuiop"}
    write_safetensors(tmp_path / "a", ARRAYS, metadata)
    write_safetensors(
        tmp_path / "b",
        dict(reversed(ARRAYS.items())),
        dict(reversed(metadata.items())),
    )
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_every_tensor_starts_at_a_multiple_of_its_element_size(tmp_path):
    write_safetensors(tmp_path / "a", {"a": np.zeros(3, np.int8), **ARRAYS})
    content = (tmp_path / "a").read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    assert list(header) == sorted(header)
    for key, array in ARRAYS.items():
        assert (8 + size + header[key]["data_offsets"][0]) % array.itemsize == 0


@pytest.mark.parametrize(
    "bad",
    [{"w": np.asarray(["a"])}, {"w": np.asarray([1j])}, {"__metadata__": MATRIX}],
)
def test_a_file_is_written_whole_or_not_at_all(bad, tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"w": MATRIX})
    before = path.read_bytes()
    with pytest.raises(InputError):
        write_safetensors(path, {"v": MATRIX, **bad})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("place", ["none/a.safetensors", "file/a.safetensors", "dir"])
def test_write_safetensors_refuses_an_unwritable_path(place, tmp_path):
    (tmp_path / "dir").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):
        write_safetensors(tmp_path / place, {"w": MATRIX})
    assert {p.name for p in tmp_path.iterdir()} == {"dir", "file"}


@pytest.mark.parametrize(
    "header",
    [
        {"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}},
        {"w": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 8]}},
        {"w": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}},
        {"w": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}},
        {"w": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}},
        {"w": {"dtype": "F32", "shape": [0, 2**40, 2**40], "data_offsets": [0, 0]}},
        {"w": {"dtype": "O", "shape": [2], "data_offsets": [0, 8]}},
        {"w": 3},
        {"__metadata__": {"a": 3}},
        [],
    ],
)
def test_an_inconsistent_safetensors_header_is_refused(header, tmp_path):
    refusal(write_raw(tmp_path / "a.safetensors", header, bytes(8)))


def test_an_unsupported_element_type_is_refused_on_reading(tmp_path):
    header = {"w": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}}
    tensors = open_tensors(write_raw(tmp_path / "a.safetensors", header, bytes(8)))
    assert tensors.dtype("w") == "F8_E4M3"
    with pytest.raises(InputError, match="F8_E4M3"):
        tensors["w"]


def write_shards(folder: Path, places: dict[str, str]) -> Path:
    for shard in set(places.values()):
        arrays = {key: MATRIX for key, place in places.items() if place == shard}
        write_safetensors(folder / shard, arrays)
    return write_index(folder, places)


def write_index(folder: Path, places) -> Path:
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 48}, "weight_map": places}))
    return path


PLACES = {"a": "1.safetensors", "b": "2.safetensors", "c": "1.safetensors"}


def test_shards_are_read_as_one_file(tmp_path):
    tensors = open_tensors(write_shards(tmp_path, PLACES))
    assert set(tensors) == {"a", "b", "c"} and tensors.metadata["total_size"] == "48"
    assert np.array_equal(tensors["b"], MATRIX)


def test_an_index_of_a_variant_is_read(tmp_path):
    path = write_shards(tmp_path, PLACES)
    path = path.rename(tmp_path / "model.safetensors.index.fp16.json")
    assert len(open_tensors(path)) == 3


def test_a_missing_shard_is_refused_by_name(tmp_path):
    path = write_shards(tmp_path, PLACES)
    (tmp_path / "2.safetensors").unlink()
    assert "2.safetensors" in refusal(path)


@pytest.mark.parametrize(
    "places",
    [
        {**PLACES, "d": "1.safetensors"},
        {"a": "1.safetensors", "b": "2.safetensors"},
        {**PLACES, "b": "1.safetensors"},
    ],
)
def test_index_and_shards_must_list_the_same_keys(places, tmp_path):
    write_shards(tmp_path, PLACES)
    assert "in both" in refusal(write_index(tmp_path, places))


@pytest.mark.parametrize(
    "place",
    ["../x.safetensors", "{out}/x.safetensors", "a/../../x.safetensors", "..", "", "."]
    + ["a\\..\\x.safetensors", "link.safetensors", "folder/x.safetensors", 3, "\0"],
)
def test_a_shard_outside_the_folder_is_refused(place, tmp_path):
    inside = tmp_path / "in"
    (inside / "a").mkdir(parents=True)
    write_safetensors(tmp_path / "x.safetensors", {"w": MATRIX})
    (inside / "link.safetensors").symlink_to("../x.safetensors")
    (inside / "folder").symlink_to("..")
    if isinstance(place, str):
        place = place.format(out=tmp_path)
    path = write_index(inside, {"w": place})
    with pytest.raises(InputError, match=r"leaves the folder|wanted a \.safetensors"):
        open_tensors(path)


def test_a_loop_of_links_is_refused(tmp_path):
    (tmp_path / "x.safetensors").symlink_to("x.safetensors")
    refusal(write_index(tmp_path, {"w": "x.safetensors"}))


def test_a_shard_may_not_be_a_pickle(tmp_path):
    good("legacy", tmp_path)
    assert "legacy.ckpt" in refusal(write_index(tmp_path, {"w": "legacy.ckpt"}))


def test_shards_may_be_pickles_of_torch(tmp_path):
    for form in FORMS:
        good(form, tmp_path).rename(tmp_path / "pytorch_model-1.bin")
        path = tmp_path / "pytorch_model.bin.index.json"
        path.write_text(json.dumps({"weight_map": {"w": "pytorch_model-1.bin"}}))
        assert np.array_equal(open_tensors(path)["w"], MATRIX)


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "[" * 99_999]
)
def test_an_invalid_index_is_refused(content, tmp_path):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(content)
    refusal(path)


def never() -> np.ndarray:
    raise RuntimeError("was read")


LAZY = Tensors(
    {"a.w": Entry((2, 3), "F32", never), "a.b": Entry((3,), "F16", never)}
    | {"c": Entry((4,), "I64", never)},
    {"by": "us"},
)


def test_under_selects_and_strips_a_prefix():
    part = LAZY.under("a.")
    assert list(part) == ["w", "b"] and part.shape("w") == (2, 3)
    assert part.metadata == {"by": "us"}


def test_from_arrays_reads_like_a_file():
    tensors = Tensors.from_arrays(ARRAYS, {"by": "us"})
    assert tensors.metadata == {"by": "us"} and tensors.dtype("f16") == "F16"
    assert tensors["f16"].dtype == tensors["big_endian"].dtype == np.float32
    assert all(np.array_equal(tensors[key], ARRAYS[key]) for key in ARRAYS)


def test_a_missing_tensor_is_a_key_error():
    with pytest.raises(KeyError):
        LAZY["b"]
    with pytest.raises(KeyError):
        LAZY.shape("b")
    assert "b" not in LAZY and "c" in LAZY and len(LAZY) == 3


def test_match_keys_accepts_equal_keys_without_reading():
    weights.match_keys({"w": (2, 3), "b": (3,)}, LAZY.under("a."), what="the text")


def test_match_keys_names_and_counts_differences_in_one_line():
    wanted = {f"x{i}": (1,) for i in range(12)} | {"a.w": (3, 2), "c": (4,)}
    with pytest.raises(InputError) as caught:
        weights.match_keys(wanted, LAZY, what="a.ckpt as the UNet")
    message = str(caught.value)
    assert message.startswith("a.ckpt as the UNet: ") and "\n" not in message
    assert "12 missing (x0, x1, " in message and "x9, ...)" in message
    assert "x10" not in message
    assert "1 extra (a.b)" in message
    assert "1 of another shape (a.w: got (2, 3), wanted (3, 2))" in message
    assert "1 not floating (c: I64)" in message


@pytest.mark.parametrize("form", FORMS)
def test_opening_a_checkpoint_reads_no_tensor(form, tmp_path):
    path = good(form, tmp_path)
    before = open_tensors(path)
    stream = io.BytesIO(path.read_bytes())
    at = stream.getvalue().index(MATRIX.tobytes())
    with path.open("r+b") as file:
        file.seek(at)
        file.write(b"\xff")
    if form == "zip":
        with pytest.raises(InputError, match="checksum"):
            before["w"]
    else:
        assert before["w"][0, 0] != MATRIX[0, 0]
