"""easy-VQA (Victor Zhou, MIT): coloured shapes at 64x64, 4,000 training and 1,000 test images in a PyPI package."""

from pathlib import Path

from nanochat.data.rows import read_rows
from nanochat.data.sample import Dataset
from nanochat.errors import install
from nanochat.files import DataError

OWN_SPLITS = ("train", "test")
SPLITS = (*OWN_SPLITS, "fit", "val")


def load(name: str = "easy_vqa", split: str | None = "train", strict: bool = False) -> Dataset:
    """name: not used, there is only one easy-VQA.

    Splits: "train", all training images; "val", 400 fixed ones of them; "fit", the other 3,600; "test", the test images.

    Raises:
        ImportError: the package is not installed.
        DataError: there is no such split; with `strict`, an image is missing.
    """
    split = split or "train"
    if split not in SPLITS:
        raise DataError(f"easy_vqa has the splits {', '.join(SPLITS)}; there is no {split!r}")
    try:
        import easy_vqa
    except ImportError as error:
        raise ImportError(f"easy-VQA is in the package easy-vqa: {install('train')}") from error

    read_questions = easy_vqa.get_test_questions if split == "test" else easy_vqa.get_train_questions
    folder = Path(easy_vqa.__file__).parent / "data" / ("test" if split == "test" else "train")
    rows = (
        (
            f"{folder / 'questions.json'}: row {number}",
            {"image": f"images/{name}.png", "question": question, "answer": answer},
        )
        for number, (question, answer, name) in enumerate(zip(*read_questions(), strict=True))
    )
    data = read_rows(rows, folder, strict, "easy_vqa", split if split in ("fit", "val") else None)
    data.name = f"easy_vqa/{split}"
    return data
