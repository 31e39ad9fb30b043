"""Prepares TFDS's `gsm8k` from files on disk, without network and without TensorFlow.

    python -m grpo.data.prepare_gsm8k RAW_DIR DATA_DIR

RAW_DIR holds train.jsonl and test.jsonl of github.com/openai/grade-school-math; give DATA_DIR to
`TfdsProblems(data_dir=...)`.
"""

import argparse
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from tensorflow_datasets.text.gsm8k import gsm8k


def prepare(raw_dir: Path, data_dir: Path) -> dict[str, int]:
    """Writes the data set as array_record; returns the number of rows of each split.

    Raises:
      FileNotFoundError: train.jsonl or test.jsonl is not in `raw_dir`.
    """
    files = {split: raw_dir / f"{split}.jsonl" for split in ("train", "test")}
    for file in files.values():
        if not file.exists():
            raise FileNotFoundError(f"no {file}; it is part of github.com/openai/grade-school-math")
    builder = _builder_class(files)(data_dir=str(data_dir), file_format="array_record")
    builder.download_and_prepare()
    return {name: split.num_examples for name, split in builder.info.splits.items()}


def _builder_class(files: dict[str, Path]) -> Any:
    """TFDS's own builder but for where the text comes from."""

    class FromFiles(gsm8k.Gsm8k, skip_registration=True):  # type: ignore[call-arg]
        name = "gsm8k"

        def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
            del dl_manager  # nothing is downloaded
            return {split: self._generate_examples(file) for split, file in files.items()}

    return FromFiles


def main() -> None:
    """Runs the command line above."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("raw_dir", type=Path)
    parser.add_argument("data_dir", type=Path)
    args = parser.parse_args()
    print(prepare(args.raw_dir, args.data_dir))


if __name__ == "__main__":
    main()
