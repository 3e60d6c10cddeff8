"""A data set of PNG files in TFDS' format: array_record files and their metadata.

TFDS' own builder writes the features of a record in an order that differs between
processes. Here record i is image i, and the same images give the same bytes. A record
holds the PNG file unchanged, with its metadata.
"""

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ldm_jax.files import read_json
from ldm_jax.types import InputError, RunError

VERSION = "1.0.0"
SPLIT = "train"
FILE_FORMAT = "array_record"
DIGEST = "sha256"
"""Key of the content's digest in the metadata of a data set."""
METADATA_FILE = "metadata.json"
MAX_SHARD_BYTES = 2**28
ONE_RECORD_A_GROUP = "group_size:1"
"""TFDS' option of array_record: every record can be read by itself."""


class Record(NamedTuple):
    """One example."""

    png: Path
    """Image file."""
    label: int | None
    """Class; None in all records of a data set without classes."""
    caption: str | None
    """Caption; None in all records of a data set without captions."""


class Contents(NamedTuple):
    """Content of a data set."""

    records: Sequence[Record]
    """Records in order; at least one."""
    class_names: tuple[str, ...]
    """Names of the classes; () if there are none."""
    shape: tuple[int, int, int]
    """Height, width and channels of every image."""


def digest_of(contents: Contents) -> str:
    """Return the sha256 of the content of a data set, in order.

    Raises:
      OSError: If an image cannot be read.
    """
    digest = hashlib.sha256(json.dumps([contents.class_names, contents.shape]).encode())
    for record in contents.records:
        png = hashlib.sha256(record.png.read_bytes()).hexdigest()
        digest.update(json.dumps([png, record.label, record.caption]).encode())
    return digest.hexdigest()


def written_digest(folder: Path) -> str | None:
    """Return the digest of the data set in a folder of `data_set_folder`.

    Returns:
      The digest; "" if the folder holds something else, None if it does not exist.
    """
    if not folder.exists():
        return None
    try:
        return str(read_json(folder / METADATA_FILE)[DIGEST])
    except (InputError, KeyError):
        return ""


def data_set_folder(root: Path, name: str) -> Path:
    """Return the folder of a data set below TFDS' data folder."""
    return root / name / VERSION


def write_data_set(
    contents: Contents, root: Path, *, name: str, description: str, digest: str
) -> None:
    """Write a data set atomically; it replaces an existing one.

    Args:
      root: TFDS' `data_dir`; `ROOT.part` is made beside it and removed.
      name: Name of the data set, in lower case.
      description: Description in the metadata.
      digest: The `digest_of` the contents.

    Raises:
      OSError: If an image cannot be read, or a file cannot be written.
      RunError: If the records cannot be written.
    """
    part = root.with_name(root.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    folder, final = data_set_folder(part, name), data_set_folder(root, name)
    folder.mkdir(parents=True)
    final.parent.mkdir(parents=True, exist_ok=True)
    _write_files(contents, folder, name=name, description=description, digest=digest)
    if final.exists():
        os.replace(final, part / "replaced")
    os.replace(folder, final)
    shutil.rmtree(part)


def _write_files(
    contents: Contents, folder: Path, *, name: str, description: str, digest: str
) -> None:
    import tensorflow_datasets as tfds

    features = tfds.features.FeaturesDict(_features(contents))
    specs: Any = features.get_serialized_info()
    serializer = tfds.core.ExampleSerializer(specs)

    def serialize(record: Record) -> bytes:
        example = {"image": record.png.read_bytes()}
        details = {"label": record.label, "caption": record.caption}
        example |= {key: value for key, value in details.items() if value is not None}
        encoded = serializer.get_tf_example(features.encode_example(example))
        return encoded.SerializeToString(deterministic=True)

    records = contents.records
    total = sum(record.png.stat().st_size for record in records)
    num_shards = -(-total // MAX_SHARD_BYTES)
    cuts = [len(records) * i // num_shards for i in range(num_shards + 1)]
    shards = [records[a:b] for a, b in itertools.pairwise(cuts)]
    num_bytes = 0
    for i, shard in enumerate(shards):
        file = f"{name}-{SPLIT}.{FILE_FORMAT}-{i:05d}-of-{num_shards:05d}"
        num_bytes += _write_records(folder / file, map(serialize, shard))
    split = tfds.core.SplitInfo(
        name=SPLIT,
        shard_lengths=[len(shard) for shard in shards],
        num_bytes=num_bytes,
    )
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=features,
        split_infos=[split],
        version=VERSION,
        check_data=False,  # that needs TensorFlow
        description=description,
        supervised_keys=("image", "label") if contents.class_names else None,
        metadata=tfds.core.MetadataDict({DIGEST: digest}),
        disable_shuffling=True,  # record i is image i
    )


def _features(contents: Contents) -> dict[str, Any]:
    import numpy as np
    import tensorflow_datasets as tfds

    features: dict[str, Any] = {
        "image": tfds.features.Image(
            shape=contents.shape, dtype=np.uint8, encoding_format="png"
        )
    }
    if contents.class_names:
        features["label"] = tfds.features.ClassLabel(names=list(contents.class_names))
    if contents.records[0].caption is not None:
        features["caption"] = tfds.features.Text()
    return features


def _write_records(path: Path, records: Iterable[bytes]) -> int:
    """Write a shard; return the bytes of its records."""
    from array_record.python.array_record_module import ArrayRecordWriter

    num_bytes = 0
    try:
        writer = ArrayRecordWriter(str(path), ONE_RECORD_A_GROUP)
        for record in records:
            writer.write(record)
            num_bytes += len(record)
        writer.close()
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise RunError(
            f"{path} cannot be written ({reason[:200]}); make room there and give the "
            "same command"
        ) from None
    return num_bytes
