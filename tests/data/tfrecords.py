"""TFRecord files without TensorFlow."""

import struct

import tensorflow_datasets as tfds


def as_tfrecord(directory):
    """Rewrites a prepared ArrayRecord set, which TFDS itself can't do without TensorFlow."""
    builder = tfds.builder_from_directory(str(directory))
    records = builder.as_data_source("train").data_source
    [path] = directory.glob("*.array_record*")
    framed = [
        struct.pack("<QI", len(record), 0) + record + struct.pack("<I", 0)
        for record in records.__getitems__(range(len(records)))
    ]
    tfrecord = path.with_name(path.name.replace("array_record", "tfrecord"))
    tfrecord.write_bytes(b"".join(framed))
    path.unlink()
    info = directory / "dataset_info.json"
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    return tfrecord
