"""Data sets with one thing wrong. Rows and pictures of `Workshop.data`, spoiled; the command is `vlmtune check`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image

from vlmtune.data.check import CODES
from vlmtune.data.images import ORIENTATION

from .case import Case
from .workshop import Row, Thing, Workshop, box_row, messages_of, reply_of, words_row

Change = Callable[[list[Row], Path, Random], list[Row] | None]


def spoiled(change: Change, row=words_row, rows: int = 24, size=(80, 60), **config: Any) -> Callable[[Workshop], Path]:
    """A config on training data that `change` has spoiled."""
    return lambda shop: shop.config(shop.data("train", rows, row, size, change), **config)


def case(name: str, wrong: str, code: str, build: Callable[[Workshop], Path], says: str = "") -> Case:
    return Case(name, "data", wrong, build, CODES[code][1], says)


# ---- files ---------------------------------------------------------------------------------------------------------


def one_file(replace: Callable[[Path, Random], None]) -> Change:
    """Of the picture of one row."""

    def change(rows: list[Row], folder: Path, random: Random) -> None:
        replace(folder / image_of(random.choice(rows)), random)

    return change


def image_of(row: Row) -> str:
    return next(part["image"] for part in messages_of(row, "user")[0]["content"] if part["type"] == "image")


def truncate(file: Path, random: Random) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: random.randint(len(content) // 3, 2 * len(content) // 3)])


def bomb(file: Path, random: Random) -> None:
    Image.new("1", (random.randint(11_000, 12_000), 11_000)).save(file)


def blank(rows: list[Row], folder: Path, random: Random) -> None:
    for row in random.sample(rows, 4):
        Image.new("RGB", (80, 60)).save(folder / image_of(row))


def elsewhere(rows: list[Row], folder: Path, random: Random) -> None:
    for row in rows:
        content = messages_of(row, "user")[0]["content"]
        content[0]["image"] = f"/mnt/nfs/labelling/pictures/{content[0]['image']}"


# ---- texts and roles -----------------------------------------------------------------------------------------------


def replies(make: Callable[[str, int], str]) -> Change:
    """Each reply in words made anew. make: (reply, number of the row) -> reply."""

    def change(rows: list[Row], folder: Path, random: Random) -> None:
        for number, row in enumerate(rows):
            reply_of(row)["content"] = make(reply_of(row)["content"], number)

    return change


def questions(make: Callable[[str, Row], str]) -> Change:
    """Each question made anew. make: (question, row) -> question."""

    def change(rows: list[Row], folder: Path, random: Random) -> None:
        for row in rows:
            text = messages_of(row, "user")[0]["content"][1]
            text["text"] = make(text["text"], row)

    return change


def in_one(change: Change) -> Change:
    """The change for one row alone."""
    return lambda rows, folder, random: change([random.choice(rows)], folder, random)


def exchange_roles(rows: list[Row], folder: Path, random: Random) -> None:
    for row in rows:
        for message in row["messages"]:
            message["role"] = {"user": "assistant", "assistant": "user"}[message["role"]]


def exchange_texts(rows: list[Row], folder: Path, random: Random) -> None:
    """The pictures stay with the user."""
    for row in rows:
        user, reply = messages_of(row, "user")[0]["content"][1], reply_of(row)
        user["text"], reply["content"] = reply["content"], user["text"]


def mojibake(text: str, number: int) -> str:
    return f"Das Bild zeigt: größer, schöner. {text}".encode().decode("cp1252") if number % 3 == 0 else text


def contradict(rows: list[Row], folder: Path, random: Random) -> list[Row]:
    """Two people labelled the same pictures."""
    said = [
        {"id": f"{name}-{n}", "image": image_of(row), "question": "What colour is it?", "answer": answer}
        for n, row in enumerate(rows[:12])
        for name, answer in (("first", "red"), ("second", random.choice(["blue", "green"])))
    ]
    return random.sample(said, len(said))


def without_replies(rows: list[Row], folder: Path, random: Random) -> None:
    for row in rows:
        row["messages"] = messages_of(row, "user")


def llava(rows: list[Row], marks: int) -> list[Row]:
    """The same rows as LLaVA writes them. marks: `<image>` in each question."""
    return [
        {"id": row["id"], "image": image_of(row), "conversations": [
            {"from": "human", "value": "<image>\n" * marks + messages_of(row, "user")[0]["content"][1]["text"]},
            {"from": "gpt", "value": reply_of(row)["content"]},
        ]}
        for row in rows
    ]  # fmt: skip


def mixed_formats(rows: list[Row], folder: Path, random: Random) -> list[Row]:
    alpaca = [{"instruction": "Say it.", "input": "", "output": reply_of(row)["content"]} for row in rows[12:]]
    return [*rows[:12], *alpaca]


def cut_line(shop: Workshop) -> Path:
    """The last line ends in the middle, as after a full disk."""
    path = shop.data()
    path.write_text(path.read_text()[:-40])
    return shop.config(path)


def other_encoding(shop: Workshop) -> Path:
    path = shop.data(change=replies(lambda text, number: f"Größe. {text}"))
    path.write_bytes(path.read_text(encoding="utf-8").encode("latin-1"))
    return shop.config(path)


# ---- what rows share -----------------------------------------------------------------------------------------------


def leak(shop: Workshop) -> Path:
    """The split was made after the rows were doubled."""
    train, val = shop.data(), shop.data("val", 8)
    shop.made["val"] = val
    lines, held_out = train.read_text().splitlines(), val.read_text().splitlines()
    moved = [json.loads(line) for line in lines[:2]]
    for row in moved:
        messages_of(row, "user")[0]["content"][0]["image"] = str(train.parent / image_of(row))
    val.write_text("\n".join([*held_out, *map(json.dumps, moved)]) + "\n")
    return shop.config(train)


def leaked_images(shop: Workshop) -> Path:
    """Split by question, not by picture."""
    train, val = shop.data(), shop.data("val", 8, change=questions(lambda text, row: "Describe the picture."))
    shop.made["val"] = val
    for line, file in zip(train.read_text().splitlines(), sorted(val.parent.glob("*.png")), strict=False):
        file.write_bytes((train.parent / image_of(json.loads(line))).read_bytes())
    return shop.config(train)


def doubled(rows: list[Row], folder: Path, random: Random) -> list[Row]:
    return [*rows, *({**row, "id": f"again-{row['id']}"} for row in random.sample(rows, 6))]


# ---- boxes ---------------------------------------------------------------------------------------------------------


def boxes(make: Callable[[list[float], tuple[int, int], Random], list[float]]) -> Change:
    """Every box made anew. make: (box, size of its picture, random) -> box."""

    def change(rows: list[Row], folder: Path, random: Random) -> None:
        for row in rows:
            with Image.open(folder / image_of(row)) as image:
                size = image.size
            (part,) = reply_of(row)["content"]
            part["boxes"] = [make(box, size, random) for box in part["boxes"]]

    return change


def thousandths(box: list[float], size: tuple[int, int], random: Random) -> list[float]:
    return [round(1000 * value / side) for value, side in zip(box, (*size, *size), strict=True)]


def turned_by_exif(rows: list[Row], folder: Path, random: Random) -> None:
    """A phone held upright: the sensor's pixels lie on their side, and so do the boxes of a tool that ignores EXIF."""
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    for row in rows:
        with Image.open(folder / image_of(row)) as image:
            image.save(folder / image_of(row), exif=exif)


def box_in_words(name: str, image: str, thing: Thing, number: int) -> Row:
    row = box_row(name, image, thing, number)
    reply_of(row)["content"] = f"It is at {list(thing.box)}."
    return row


def other_pictures(rows: list[Row], folder: Path, random: Random) -> None:
    """Two lists were sorted in two ways before they were joined: every row has the picture of the next one."""
    names = [image_of(row) for row in rows]
    for row, name in zip(rows, [*names[1:], names[0]], strict=True):
        messages_of(row, "user")[0]["content"][0]["image"] = name


def mirrored(rows: list[Row], folder: Path, random: Random) -> None:
    for row in rows:
        with Image.open(folder / image_of(row)) as image:
            image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(folder / image_of(row))


def sorted_by_task(rows: list[Row], folder: Path, random: Random) -> list[Row]:
    return sorted(rows, key=lambda row: row["task"])


CASES = [
    case("missing_image", "One picture was never copied.", "image_missing", spoiled(one_file(lambda f, r: f.unlink())),
         "not found"),
    case("truncated_image", "A download of a picture broke off.", "image_corrupt", spoiled(one_file(truncate)),
         "cannot be decoded"),
    case("empty_image", "A picture has zero bytes.", "image_empty", spoiled(one_file(lambda f, r: f.write_bytes(b"")))),
    case("web_page_as_image", "The server sent an error page, which was saved as a picture.", "image_corrupt",
         spoiled(one_file(lambda f, r: f.write_text("<!DOCTYPE html><html>403 Forbidden</html>"))), "it is a web page"),
    case("lfs_pointer", "The repository was cloned without Git LFS.", "image_corrupt",
         spoiled(one_file(lambda f, r: f.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"))),
         "Git LFS"),
    case("decompression_bomb", "A scan of 11,000 x 11,000 pixels is among the pictures.", "image_bomb",
         spoiled(one_file(bomb))),
    case("extreme_aspect", "A strip of 1600 x 20 pixels is among the pictures.", "image_aspect",
         spoiled(one_file(lambda f, r: Image.effect_noise((1600, 20), 90).convert("RGB").save(f)))),
    case("thumbnail", "A thumbnail of 8 x 8 pixels is among the pictures.", "image_tiny",
         spoiled(one_file(lambda f, r: Image.effect_noise((8, 8), 90).convert("RGB").save(f)))),
    case("black_images", "Some pictures were exported black.", "image_blank", spoiled(blank)),
    case("paths_of_another_machine", "Paths are absolute and of the machine of the labelling.", "image_missing",
         spoiled(elsewhere), "/mnt/nfs/labelling"),
    case("typed_markers", "Replies were rendered with a chat template before.", "text_marker",
         spoiled(replies(lambda text, number: f"{text}<|im_end|>"))),
    case("placeholder_as_text", "Questions of typed messages still hold the <image> of another format.", "text_marker",
         spoiled(questions(lambda text, row: f"<image>\n{text}")), "marker <image>"),
    case("too_many_marks", "LLaVA rows have two <image> marks and one picture.", "unreadable",
         spoiled(lambda rows, folder, random: llava(rows, 2)), "2 <image> marks"),
    case("empty_reply", "A reply is empty.", "reply_empty",
         spoiled(in_one(replies(lambda text, number: ""))), "1 times"),
    case("no_replies", "Rows hold questions alone.", "reply_empty", spoiled(without_replies),
         "24 times"),
    case("one_reply_for_all", "The column of the reply is a constant.", "replies_alike",
         spoiled(replies(lambda text, number: "It is red."))),
    case("roles_exchanged", "User and assistant were mapped the wrong way round.", "image_in_reply",
         spoiled(exchange_roles)),
    case("texts_exchanged", "The columns of question and answer were exchanged.", "roles_swapped",
         spoiled(exchange_texts)),
    case("reply_in_question", "The question holds the answer.", "reply_told",
         spoiled(questions(lambda text, row: f"Say that {reply_of(row)['content']} {text}"))),
    case("contradicting_labels", "Two people labelled the same pictures, and both files were joined.", "contradiction",
         spoiled(contradict)),
    case("mojibake", "Texts in UTF-8 were read as Windows-1252.", "text_broken", spoiled(replies(mojibake))),
    case("wrong_encoding", "The file was saved as Latin-1.", "unreadable", other_encoding, "is not UTF-8"),
    case("cut_row", "The disk was full while the last line was written.", "unreadable", cut_line,
         "not valid JSON"),
    case("mixed_formats", "An Alpaca file was appended to one of messages.", "unreadable", spoiled(mixed_formats),
         "a row needs"),
    case("unknown_role", "Replies have the role 'model'.", "role_unknown",
         spoiled(lambda rows, folder, random: [reply_of(row).update(role="model") for row in rows] and None)),
    case("leaked_rows", "Held-out rows are in the training data.", "leak", leak),
    case("leaked_images", "The data was split by question, so pictures are in both.", "leak_image", leaked_images),
    case("duplicated_rows", "A quarter of the rows is there twice.", "duplicate_row", spoiled(doubled)),
    case("over_long_row", "A reply is a whole document.", "too_long",
         spoiled(in_one(replies(lambda text, number: text * 80)), data__max_length=512)),
    case("boxes_in_fractions", "Boxes go from 0 to 1.", "box_fraction",
         spoiled(boxes(lambda b, size, r: [v / s for v, s in zip(b, (*size, *size), strict=True)]), box_row)),
    case("boxes_in_thousandths", "Boxes were converted to Qwen's 0 to 1000 by hand.", "boxes_thousandths",
         spoiled(boxes(thousandths), box_row)),
    case("boxes_y_first", "Boxes are y1, x1, y2, x2.", "boxes_swapped",
         spoiled(boxes(lambda b, size, r: [b[1], b[0], b[3], b[2]]), box_row, size=(120, 50))),
    case("boxes_with_width", "Boxes are x, y, width, height, as in COCO.", "box_order",
         spoiled(boxes(lambda b, size, r: [b[0], b[1], b[2] - b[0], b[3] - b[1]]), box_row)),
    case("box_outside", "One box has a digit too many.", "box_outside",
         spoiled(in_one(boxes(lambda b, size, r: [b[0], b[1], b[2] * 10, b[3]])), box_row)),
    case("boxes_of_the_original", "Pictures were made smaller after they had been labelled.", "boxes_scaled",
         spoiled(boxes(lambda b, size, r: [2.5 * value for value in b]), box_row)),
    case("boxes_of_a_small_copy", "Boxes are those of copies of 40 % of the size.", "boxes_corner",
         spoiled(boxes(lambda b, size, r: [0.4 * value for value in b]), box_row, rows=40, size=(64, 64))),
    case("boxes_before_exif", "Boxes were drawn in a tool that ignores EXIF.", "boxes_turned",
         spoiled(turned_by_exif, box_row, size=(120, 50))),
    case("flat_box", "A box has no height.", "box_flat",
         spoiled(in_one(boxes(lambda b, size, r: [b[0], b[1], b[2], b[1]])), box_row)),
    case("boxes_as_text", "Boxes stand in the text of the replies.", "box_text",
         spoiled(lambda rows, folder, random: None, box_in_words)),
    case("limit_of_a_sorted_file", "limit takes the first rows of a file that is sorted by task.", "limit_of_sorted",
         spoiled(sorted_by_task, data__train__0__limit=8, train__length=4), "leaves out every row of"),
    Case("pictures_of_other_rows", "data", "Every row has the picture of the next one.", spoiled(other_pictures),
         "pictures and texts belong together"),
    Case("mirrored_pictures", "data", "Pictures were flipped, and left and right in the texts were not.",
         spoiled(mirrored), "pictures and texts belong together", "left"),
]  # fmt: skip
"""The last two are told by no file alone: they are misses."""
