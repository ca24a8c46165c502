"""The built-in data sets: TFDS builders over packages that are installed, prepared once."""

import contextlib
import hashlib
import io
from collections.abc import Mapping
from pathlib import Path

import tensorflow_datasets as tfds

from lmjax.data import cache
from lmjax.data.sources import quiet_tfds


def prepared(
    builder: type[tfds.core.GeneratorBasedBuilder], versions: Mapping[str, str | None], **options
) -> Path:
    """The directory of a data set, prepared on first use and found in the cache afterwards.

    Args:
      builder: its class.
      versions: of the packages that it is made from: others make another data set.
      options: for the class.
    """
    version = str(builder.VERSION)
    key = hashlib.sha256(repr((version, sorted(versions.items()))).encode()).hexdigest()
    directory = cache.cache_dir() / builder.name / key[:16]
    with cache.lock(directory):
        if not directory.exists():
            with cache.atomic_directory(directory) as temporary:
                _prepare(builder(data_dir=temporary, file_format="array_record", **options))
    return directory / builder.name / version


def _prepare(builder: tfds.core.GeneratorBasedBuilder) -> None:
    """Without TFDS's bars within bars and announcements, for so small a set."""
    offline = tfds.download.DownloadConfig(try_download_gcs=False)
    tfds.display_progress_bar(False)
    try:
        with quiet_tfds(), contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare(download_config=offline)
    finally:
        tfds.display_progress_bar(True)
