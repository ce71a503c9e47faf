"""Rows of any source -> samples. One reader knows the fields that data sets have; a source only finds the rows.

A row becomes a valid sample, or is left out and counted with the reason (its image does not exist, it has a video), or raises
a DataError that names file and row. Nothing is left out silently: see `Dataset.notes`.
"""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from nanochat.data.conversations import IMAGE_TAG, LeftOut, count_images, images_first, left_out, normal_messages
from nanochat.data.image_files import find_image
from nanochat.data.sample import (
    Dataset,
    Sample,
    caption_sample,
    check_text,
    dataset_task,
    field_names,
    image_key,
    text_of,
    vqa_sample,
)
from nanochat.data.splits import cut
from nanochat.files import DataError, short_repr

# The names of one field, the usual one first
IMAGE_FIELDS = (
    "image", "images", "file", "file_name", "filename", "file_names", "image_path", "image_file", "image_name", "img",
    "img_path", "path",
)  # fmt: skip
CAPTION_FIELDS = ("caption", "captions", "text", "description", "comment", "sentence")
QUESTION_FIELDS = (("question", "answer"), ("query", "response"), ("instruction", "output"), ("prompt", "completion"))
TURN_FIELDS = ("messages", "conversations")
MISSING = "their picture is missing"
EXPECTED = (
    "expected an image with a question and an answer, or with captions, or messages (docs/DATA.md lists the fields)"
)


class RowReader:
    """Collects the samples of a source.

    root: the folder that image paths are relative to. strict: a missing image is an error. merge: captions of one image in
    several rows are references of one sample.
    """

    def __init__(self, root: Path, strict: bool = False, merge: bool = False):
        self.root, self.strict, self.merge = root, strict, merge
        self.samples: list[Sample] = []
        self.tasks: dict[str, None] = {}
        self.left_out: dict[str, list[str]] = {}
        self.fields: dict[str, bool] = {}  # name -> whether it is read
        self.unplaced = 0
        self.first_missing = ""
        self.merged: dict[str, int] = {}

    def add(self, where: str, row: dict) -> None:
        """Read a row.

        Raises:
            DataError: the row is malformed, or the rows have both questions and captions.
        """
        for name, value in row.items():
            if value is not None:
                self.fields.setdefault(name, False)
        try:
            task, sample = self._sample({name: value for name, value in row.items() if value is not None}, row, where)
        except LeftOut as reason:
            if self.strict:
                raise DataError(f"{where}: the row cannot be used: {reason}") from reason
            self.leave_out(where, str(reason))
            return
        self.tasks[task] = None
        if len(self.tasks) > 1:
            kinds = {"vqa": "questions", "caption": "captions", "messages": "messages"}
            mixed = " and ".join(kinds[task] for task in self.tasks)
            raise DataError(f"{where}: the file has {mixed}: split it into one file for each")
        if any(image is None for image in sample.images):
            self.leave_out(where, MISSING)
        elif task == "caption" and self.merge:
            self._merge(sample)
        else:
            self.samples.append(sample)

    def leave_out(self, where: str, reason: str) -> None:
        self.left_out.setdefault(reason, []).append(where)

    def dataset(self, name: str, split: str | None = None) -> Dataset:
        """The samples; of split "fit" or "val", if given. Raises DataError if there are none."""
        skipped = sum(map(len, self.left_out.values()))
        task = dataset_task(self.samples) if set(self.tasks) == {"messages"} else next(iter(self.tasks), "vqa")
        samples = cut(self.samples, split, self.root, name) if self.samples else []
        return Dataset(f"{name}/{split}" if split else name, task, samples, skipped, self.notes())

    def notes(self) -> list[str]:
        """What is read and what is left out, one line each."""
        read, other = ([name for name, used in self.fields.items() if used == wanted] for wanted in (True, False))
        notes = [f"fields read: {_listed(read)}" + (f"; not read: {_listed(other)}" if other else "")] if read else []
        for reason, rows in self.left_out.items():
            plural = "row" if len(rows) == 1 else "rows"
            detail = self.first_missing if reason == MISSING else ""
            notes.append(f"{len(rows)} {plural} left out: {reason} (first: {rows[0]}{detail})")
        if self.unplaced:
            notes.append(
                f"{self.unplaced} rows do not say where their pictures stand: put before the first question (mark them with "
                "<image> to choose)"
            )
        return notes

    def _merge(self, sample: Sample) -> None:
        key = image_key(sample.images[0])
        if key not in self.merged:
            self.merged[key] = len(self.samples)
            rows = (sample.where,) * len(sample.references)
            self.samples.append(replace(sample, reference_rows=rows))
            return
        first = self.samples[self.merged[key]]
        rows = (*first.reference_rows, *(sample.where,) * len(sample.references))
        references = (*first.references, *sample.references)
        self.samples[self.merged[key]] = replace(first, references=references, reference_rows=rows)

    def _use(self, *names: str) -> None:
        self.fields.update(dict.fromkeys(names, True))

    def _sample(self, row: dict, original: dict, where: str) -> tuple[str, Sample]:
        """(task, sample); an image of it is None if it does not exist. row: `original` without its nulls."""
        turns = self._turns(row, where)
        values = self._images(row, where)
        for kind in ("video", "audio"):  # where an image shows all, the name of its video is one more field
            if any(row.get(name) for name in (kind, f"{kind}s")) and (not values or _has_tag(turns, f"<{kind}>")):
                raise left_out(kind)
        if turns is not None:
            embedded: list = []
            messages = normal_messages(turns, len(values), where, embedded)
            self.unplaced += bool(values) and count_images(messages) == len(values) and not _placed(turns)
            references = row.get("references", [])
            if not isinstance(references, list):
                raise DataError(f"{where}: 'references' must be a list of texts, found {short_repr(references)}")
            if references:
                self._use("references")
            texts = tuple(check_text(text, "references", where) for text in references)
            return "messages", Sample(self._find(values + embedded, where), messages, texts, where)
        task, sample = self._one_question(row, original, where)
        if task == "vqa" and len(values) > 1:
            turns = [{"role": "user", "content": sample.question}, sample.messages[-1]]
            self.unplaced += 1
            return task, Sample(self._find(values, where), images_first(turns, len(values)), where=where)
        if len(values) != 1:
            found = f"found {len(values)} images" if values else f"found no image in {field_names(original)}"
            raise DataError(f"{where}: expected one image for a question or a caption, {found}")
        return task, replace(sample, images=self._find(values, where), where=where)

    def _find(self, values: list, where: str) -> tuple:
        found = tuple(find_image(self.root, value, where, self.strict) for value in values)
        if None in found and not self.first_missing:
            self.first_missing = f": {short_repr(values[found.index(None)])} below {self.root}"
        return found

    def _images(self, row: dict, where: str) -> list:
        found = [name for name in IMAGE_FIELDS if name in row]
        found += [name for name in row if name.endswith(("_file_name", "_file_names"))]
        if "image" in found and "images" in found:
            raise DataError(f"{where}: found both 'image' and 'images': keep the one that is meant")
        if not found:
            return []
        self._use(found[0])
        value = row[found[0]]
        return list(value) if isinstance(value, (list, tuple)) else [value]

    def _turns(self, row: dict, where: str) -> list | None:
        """The messages of a row as they are written, or None if it has none."""
        name = next((name for name in TURN_FIELDS if name in row), None)
        system = row.get("system")
        if name:
            self._use(name)
            turns = row[name]
            if not isinstance(turns, list):
                raise DataError(f"{where}: {name!r} must be a list of messages, found {short_repr(turns)}")
        else:
            for question, answer in QUESTION_FIELDS[1:]:
                if question in row and answer in row:
                    break
            else:
                return None
            self._use(question, answer)
            asked, answered = row[question], row[answer]
            if isinstance(asked, list) and isinstance(answered, list):
                turns = asked + answered  # TRL's prompt and completion are lists of messages
            else:
                asked = text_of(row, question, where)
                if question == "instruction" and row.get("input"):
                    self._use("input")
                    asked = f"{asked}\n{text_of(row, 'input', where)}"
                answered = text_of(row, answer, where)
                turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
            if row.get("history"):
                raise DataError(f"{where}: 'history' is not read: write the turns as 'messages'")
        if isinstance(system, str) and system.strip():
            self._use("system")
            turns = [{"role": "system", "content": system}, *turns]
        return turns

    def _one_question(self, row: dict, original: dict, where: str) -> tuple[str, Sample]:
        """(task, sample without its image) of a row with a question and an answer, or with captions. The texts are checked
        whether or not the image exists."""
        if "question" in row or "answer" in row:
            self._use("question", "answer")
            return "vqa", vqa_sample("", text_of(row, "question", where), text_of(row, "answer", where))
        name = next((name for name in CAPTION_FIELDS if name in row), None)
        if name is None:
            raise DataError(f"{where}: {EXPECTED}, found {field_names(original)}")
        self._use(name)
        captions = [row[name]] if isinstance(row[name], str) else row[name]
        if not isinstance(captions, list) or not captions:
            raise DataError(f"{where}: {name!r} must be a text or a list of texts, found {short_repr(captions)}")
        return "caption", caption_sample("", [check_text(caption, name, where) for caption in captions])


def read_rows(
    rows: Iterable[tuple[str, dict]], root: Path, strict: bool, name: str, split: str | None = None, merge: bool = False
) -> Dataset:
    """The dataset of ("file:row", row) pairs. split: "fit" or "val" if that part has to be cut from it. Raises as
    `RowReader`."""
    reader = RowReader(root, strict, merge)
    for where, row in rows:
        reader.add(where, row)
    return reader.dataset(name, split)


def _has_tag(turns: list | None, tag: str) -> bool:
    contents = [turn.get("content", turn.get("value")) for turn in turns or [] if isinstance(turn, dict)]
    return any(tag in content for content in contents if isinstance(content, str))


def _placed(turns: list) -> bool:
    """Whether turns as they are written say where an image stands."""
    contents = [turn.get("content") for turn in turns if isinstance(turn, dict)]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return _has_tag(turns, IMAGE_TAG) or any(isinstance(part, dict) and part.get("type") != "text" for part in parts)


def _listed(names: list[str]) -> str:
    shown = [name if name.isprintable() and len(name) < 40 else short_repr(name) for name in names[:10]]
    return ", ".join(shown) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
