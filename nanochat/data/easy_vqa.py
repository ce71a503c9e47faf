"""easy-VQA (Victor Zhou, MIT): coloured shapes at 64x64, 4,000 training and 1,000 test images in a PyPI package."""

from pathlib import Path

from nanochat.data.sample import Dataset, cut, find_image, vqa_sample
from nanochat.files import DataError

SPLITS = ("train", "fit", "val", "test")


def load(split: str = "train", strict: bool = False) -> Dataset:
    """Splits: "train", all training images; "val", 400 fixed ones of them; "fit", the other 3,600; "test", the test images.

    Raises:
        ImportError: the package is not installed.
        DataError: there is no such split; with `strict`, an image is missing.
    """
    if split not in SPLITS:
        raise DataError(f"easy_vqa has the splits {', '.join(SPLITS)}; there is no {split!r}")
    try:
        import easy_vqa
    except ImportError as error:
        raise ImportError("easy-VQA is in the package easy-vqa: pip install -e '.[train]'") from error

    read_questions = easy_vqa.get_test_questions if split == "test" else easy_vqa.get_train_questions
    folder = Path(easy_vqa.__file__).parent / "data" / ("test" if split == "test" else "train")
    samples, skipped = [], 0
    for row, (question, answer, image_id) in enumerate(zip(*read_questions(), strict=True)):
        path = find_image(folder / "images", f"{image_id}.png", f"{folder / 'questions.json'}: row {row}", strict)
        if path is None:
            skipped += 1
        else:
            samples.append(vqa_sample(path, question, answer))
    return Dataset(f"easy_vqa/{split}", "vqa", cut(samples, split, folder), skipped)
