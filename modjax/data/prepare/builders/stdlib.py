"""TFDS data set of the running Python's standard library: English and code, no download."""

import tensorflow_datasets as tfds

from modjax.data.prepare.documents import stdlib_documents, stdlib_split


class Stdlib(tfds.core.GeneratorBasedBuilder):
    """Data set of the standard library's source files without tests, split by module."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}  # noqa: RUF012

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description="Python source files of the standard library that runs the builder.",
            features=tfds.features.FeaturesDict(
                {"id": tfds.features.Text(), "text": tfds.features.Text()}
            ),
            homepage="https://docs.python.org/3/library/",
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in ("train", "validation")}

    def _generate_examples(self, split):
        for document in stdlib_documents():
            if stdlib_split(document.id) == split:
                yield document.id, {"id": document.id, "text": document.text}
