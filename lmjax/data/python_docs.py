"""`python_docs`: real English text that is on every user's machine already.

A TFDS data set over the documentation of the Python installation at hand: the language reference
behind `help("topic")` and the docstrings of the standard library and of the packages below, about
12 million characters. One document per topic or docstring. Modules are parsed, never imported.

Nothing is downloaded and nothing redistributed: each text stays under the license of the package
that it was installed with.
"""

import ast
import contextlib
import gc
import importlib.metadata
import logging
import platform
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

import tensorflow_datasets as tfds
from rich.console import Console
from rich.progress import track

from lmjax.data.built_in import prepared
from lmjax.data.sources import TFDS, document_hash

logger = logging.getLogger(__name__)

PYTHON = "python"  # the standard library and pydoc_data.topics
PACKAGES = (
    PYTHON,
    "numpy",
    "scipy",
    "matplotlib",
    "jax",
    "flax",
    "optax",
    "orbax-checkpoint",
)
MINIMUM_CHARACTERS = 100
VALIDATION_FRACTION = 0.05
# Tests and old syntax, much of it invalid on purpose; and packages that merely lie inside.
SKIPPED = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}


def python_docs(packages: tuple[str, ...] = PACKAGES) -> TFDS:
    """The built-in data set, prepared on first use (about 15 s) and found in the cache afterwards.

    Args:
      packages: names of installed distributions; those not installed are left out.

    Returns:
      A source with splits "train" and "validation" (5 percent, by document hash).

    Raises:
      ValueError: none of the packages has a documentation to read.
    """
    versions = {name: _version(name) for name in packages}
    source = TFDS(str(prepared(PythonDocs, versions, packages=packages)))
    for split in ("train", "validation"):
        logger.info(
            "python_docs %s: %s documents, sha256 %s",
            split,
            f"{source.num_documents(split):,}",
            source.fingerprint(split)[:16],
        )
    return source


class PythonDocs(tfds.core.GeneratorBasedBuilder):
    """The builder behind `python_docs`."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, packages: tuple[str, ...] = PACKAGES, **options):
        self.packages = packages
        super().__init__(**options)

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description="Topics and docstrings of the Python installation it was prepared on.",
            features=tfds.features.FeaturesDict({"text": tfds.features.Text()}),
        )

    def _split_generators(self, dl_manager):
        documents = collect_documents(self.packages)
        cut = VALIDATION_FRACTION * 2**64
        validation = {key: text for key, text in documents.items() if key < cut}
        train = {key: text for key, text in documents.items() if key >= cut}
        if not train or not validation:
            raise ValueError(
                f"python_docs found {len(documents)} documents in {', '.join(self.packages)}: "
                "name more packages, or train on files of your own"
            )
        return {
            "train": self._generate_examples(train),
            "validation": self._generate_examples(validation),
        }

    def _generate_examples(self, documents: dict[int, str]):
        for key, text in documents.items():
            yield f"{key:016x}", {"text": text}


def collect_documents(packages: tuple[str, ...]) -> dict[int, str]:
    """Every topic and docstring of at least 100 characters once, by its hash."""
    files = [path for name in packages for path in _python_files(name)]
    documents = {}
    console = Console(stderr=True)
    with _no_garbage_collection():
        for path in track(files, "reading documentation", console=console, transient=True):
            for text in _documents_in(path):
                text = text.encode("utf-8", "replace").decode().strip()
                if len(text) >= MINIMUM_CHARACTERS:
                    documents[document_hash(text)] = text
    return documents


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Syntax trees are huge and free of cycles: looking for some takes half the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _documents_in(path: Path) -> Iterator[str]:
    """The docstrings of a module, its classes and functions; of `topics.py`, the topics."""
    try:
        with warnings.catch_warnings(action="ignore"):  # escapes in other people's strings
            tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):  # templates, old syntax, undeclared encodings
        return
    if path.match("pydoc_data/topics.py"):
        for node in tree.body:
            if isinstance(node, ast.Assign):
                yield from ast.literal_eval(node.value).values()
        return
    statements = [tree]
    while statements:
        node = statements.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""
        # Definitions are statements; not looking into expressions saves most of the walk.
        statements.extend(getattr(node, "body", ()))
        statements.extend(getattr(node, "orelse", ()))


def _python_files(package: str) -> list[Path]:
    if package == PYTHON:
        library = Path(sysconfig.get_path("stdlib"))
        files = [path.relative_to(library) for path in library.rglob("*.py")]
    else:
        library = Path()
        try:
            files = importlib.metadata.distribution(package).files or []
        except importlib.metadata.PackageNotFoundError:
            files = []
    kept = [file for file in files if file.suffix == ".py" and not SKIPPED & set(file.parts)]
    return sorted(Path(file.locate()) if package != PYTHON else library / file for file in kept)


def _version(package: str) -> str | None:
    if package == PYTHON:
        return platform.python_version()
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
