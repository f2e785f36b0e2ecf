"""A corpus of broken data: each is refused with one sentence that says what, where, and what to do about it.

A case writes its files into a folder and returns what the user would put into `path`. The complaint comes when the
source is opened or when one of its rows is read and its images are decoded: never a traceback, never a skipped row.
"""

from __future__ import annotations

import base64
import json
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from files_on_disk import (
    REPLY,
    picture_row,
    png,
    text_row,
    user,
    write_hub_cache,
    write_jsonl,
    write_parquet,
    write_tar,
)

from vlmtune.data.images import load_image
from vlmtune.data.sources import FileSource
from vlmtune.errors import VlmtuneError

Make = Callable[[Path], Path | str]


def file(name: str, content: bytes | str) -> Make:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return folder / name

    return make


def line(text: str | bytes) -> Make:
    """A .jsonl file whose third line, the second row, is broken."""
    good = json.dumps(text_row()).encode() + b"\n\n"
    return file("t.jsonl", good + (text.encode() if isinstance(text, str) else text) + b"\n" + good)


def row(value: Any) -> Make:
    return line(json.dumps({"id": "bad-7"} | value if isinstance(value, dict) else value))


def asks(*parts: Any) -> Make:
    return row({"messages": [user(*parts), REPLY]})


def replies(content: Any, **more: Any) -> Make:
    return row({"messages": [user("Hi"), {"role": "assistant", "content": content, **more}]})


def box(boxes: Any, **more: Any) -> Make:
    return asks({"type": "image", "image": "a.png"}, {"type": "box", "boxes": boxes, **more})


def llava(human: str, **more: Any) -> Make:
    return row({"conversations": [{"from": "human", "value": human}, {"from": "gpt", "value": "It is."}], **more})


def question(**more: Any) -> Make:
    return row({"question": "What?", "answer": "That."} | more)


def table(text: str | bytes, name: str = "t.csv") -> Make:
    return file(name, text)


def tar(members: dict[str, bytes], change: Callable[[bytes], bytes] = bytes) -> Make:
    def make(folder: Path) -> Path:
        path = write_tar(folder / "t.tar", members)
        path.write_bytes(change(path.read_bytes()))
        return path

    return make


def special(**fields: Any) -> Make:
    """A tar with one member that is no plain file."""

    def make(folder: Path) -> Path:
        with tarfile.open(folder / "t.tar", "w") as archive:
            info = tarfile.TarInfo("0.png")
            for name, value in fields.items():
                setattr(info, name, value)
            archive.addfile(info)
        return folder / "t.tar"

    return make


def parquet(rows: list[dict], change: Callable[[bytes], bytes] = bytes) -> Make:
    def make(folder: Path) -> Path:
        path = write_parquet(folder / "t.parquet", rows)
        path.write_bytes(change(path.read_bytes()))
        return path

    return make


def folder_of(*makes: Make) -> Make:
    def make(folder: Path) -> Path:
        for inner in makes:
            inner(folder)
        return folder

    return make


def saved(change: Callable[[Path], object]) -> Make:
    def make(folder: Path) -> Path:
        import datasets

        datasets.Dataset.from_list([{"question": "What?", "answer": "That."}]).save_to_disk(str(folder / "saved"))
        change(folder / "saved")
        return folder / "saved"

    return make


def saved_splits(folder: Path) -> Path:
    import datasets

    data = datasets.Dataset.from_list([{"question": "What?", "answer": "That."}])
    datasets.DatasetDict({"test": data}).save_to_disk(str(folder / "saved"))
    return folder / "saved"


def nothing(folder: Path) -> Path:
    return folder / "none.jsonl"


PICTURE = {"type": "image", "image": "a.png"}
ASK = {"question": "What?", "answer": "That."}
ABOUT = json.dumps(ASK).encode()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


SIZE = struct.pack(">IIBBBBB", 12_000, 12_000, 8, 2, 0, 0, 0)
BOMB = base64.b64encode(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", SIZE) + chunk(b"IDAT", b"")).decode()
BAD_7 = "t.jsonl:3 (sample bad-7)"

# name: (the broken data, what the complaint says, where, remedy)
CASES: dict[str, tuple[Make, str, str, str]] = {
    # ---- files and folders
    "missing file": (nothing, "does not exist", "none.jsonl", "does not exist"),
    "unknown ending": (file("t.xml", "<a/>"), "unknown ending '.xml'", "t.xml", "use .jsonl or .json, .csv"),
    "compressed": (file("t.tar.gz", "x"), "unknown ending '.gz'", "t.tar.gz", "unpack it first"),
    "no ending": (file("data", "x"), "unknown ending ''", "data", "use .jsonl"),
    "folder of pictures": (folder_of(), "holds nothing that can be read", "", "it needs .jsonl"),
    "folder of two kinds": (
        folder_of(file("a.csv", "question,answer\na,b\n"), line("{}")),
        "mixes .csv and .jsonl files", "", "name the file",
    ),
    "folder with a nameless split": (
        folder_of(file("train-0.csv", "question,answer\na,b\n"), file("more.csv", "question,answer\na,b\n")),
        "more.csv names no split, as other files there do", "", "rename or move it",
    ),
    "folder without the split": (
        folder_of(file("test-0.csv", "question,answer\na,b\n")), "has no split 'train'", "", "its files name test",
    ),
    # ---- JSON
    "empty jsonl": (file("t.jsonl", ""), "holds no rows", "t.jsonl", "holds no rows"),
    "blank jsonl": (file("t.jsonl", "\n \n\t\n"), "holds no rows", "t.jsonl", "holds no rows"),
    "empty json": (file("t.json", ""), "not valid JSON", "t.json", "mend it"),
    "empty list": (file("t.json", "[]"), "holds no rows", "t.json", "holds no rows"),
    "json object": (file("t.json", "{}"), "is a list of conversations, this is a dict", "t.json", "list"),
    "jsonl named json": (file("t.json", "{}\n{}\n"), "not valid JSON (Extra data", "t.json", "name it .jsonl"),
    "list named jsonl": (file("t.jsonl", "[\n{}\n]"), "not valid JSON", "t.jsonl:1", "mend or remove the line"),
    "torn line": (line('{"messages": [{"role":'), "not valid JSON", "t.jsonl:3", "mend or remove the line"),
    "two objects in a line": (line("{} {}"), "not valid JSON (Extra data", "t.jsonl:3", "mend or remove the line"),
    "latin-1": (line('{"messages": "ü"}'.encode("latin-1")), "not valid JSON", "t.jsonl:3", "mend or remove"),
    "utf-16": (line('{"messages": 1}'.encode("utf-16")), "not valid JSON", "t.jsonl:3", "mend or remove the line"),
    "NUL bytes": (line(b"\0\0\0\0"), "not valid JSON", "t.jsonl:3", "mend or remove the line"),
    "doubled key": (line('{"id": 1, "id": 2}'), "key 'id' given twice", "t.jsonl:3", "mend or remove the line"),
    "nested very deeply": (line("[" * 100_000), "nested too deeply", "t.jsonl:3", "mend or remove the line"),
    "half a character": (line('{"question": "\\ud83d"}'), "half a surrogate pair", "t.jsonl:3", "mend or remove"),
    "list as a row": (row([1, [2]]), "a row is a JSON object, this is list", "t.jsonl:3", "JSON object"),
    "null as a row": (row(None), "a row is a JSON object, this is NoneType", "t.jsonl:3", "JSON object"),
    "text as a row": (row("Hi"), "a row is a JSON object, this is str", "t.jsonl:3", "JSON object"),
    # ---- fields of a row
    "no known field": (row({"text": "Hi"}), "a row needs 'messages'", BAD_7, "this one has id, text"),
    "id is a list": (row({"id": [1], **ASK}), "'id' is a text, not [1]", "t.jsonl:3", "is a text"),
    "task is a number": (question(task=1.5), "'task' is a text, not 1.5", BAD_7, "is a text"),
    "meta is a text": (question(meta="x"), "'meta' is an object, not str", BAD_7, "is an object"),
    "weight": (question(weight=2.0), "no weights of samples", BAD_7, "give the source a weight, and remove the field"),
    "video": (question(video="a.mp4"), "videos are not read", BAD_7, "write frames as images, and remove the field"),
    "entity elsewhere": (question(entities=["cat"]), "entity 'cat' occurs in no reply", BAD_7, "write it as the reply"),
    "entities are numbers": (question(entities=[3]), "'entities' is a list of texts", BAD_7, "is a list of texts"),
    "two systems": (
        row({"messages": [{"role": "system", "content": "a"}, user("Hi"), REPLY], "system": "b"}),
        "'system' is a text", BAD_7, "without a system message of its own",
    ),
    # ---- messages
    "no messages": (row({"messages": []}), "at least one message", BAD_7, "at least one message"),
    "messages are a number": (row({"messages": 3}), "'messages' must be a list", BAD_7, "a list"),
    "messages are text": (row({"messages": "Hi"}), "'messages': not valid JSON", BAD_7, "it is a list of messages"),
    "message is a number": (row({"messages": [7]}), "message 1 needs 'role' and 'content'", BAD_7, "needs 'role'"),
    "nested lists": (row({"messages": [[user("Hi"), REPLY]]}), "message 1 needs 'role'", BAD_7, "'content'"),
    "null content": (replies(None), "message 2: 'content' is text or a list of parts", BAD_7, "list of parts"),
    "content is an object": (replies({"text": "x"}), "'content' is text or a list", BAD_7, "list of parts"),
    "unknown role": (row({"messages": [{"role": "bot", "content": "x"}]}), "unknown role 'bot'", BAD_7, "known: human"),
    "role is null": (row({"messages": [{"role": None, "content": "x"}]}), "unknown role None", BAD_7, "known: human"),
    "no reply": (row({"messages": [user("Hi")]}), "no assistant text to learn from", BAD_7, "add a reply"),
    "empty reply": (replies(" \n"), "no assistant text to learn from", BAD_7, "add a reply or remove the row"),
    "train is a text": (replies("x", train="false"), "'train' is true or false", BAD_7, "true or false"),
    "image in a reply": (
        replies([{"type": "text", "text": "x"}, PICTURE]), "an image into an assistant", BAD_7, "move it",
    ),
    "unknown part": (asks({"type": "audio", "audio": "x"}), "is not text, image, image_url", BAD_7, "box or point"),
    "part is a list": (asks(["text"]), 'part ["text"] is not text', BAD_7, "box or point"),
    "text part of a number": (asks({"type": "text", "text": 3}), "is not text, image", BAD_7, "box or point"),
    # ---- images
    "missing image": (asks({"type": "image", "image": "z.png"}), "image z.png not found; tried", BAD_7, "image_root"),
    "climbing path": (asks({"type": "image", "image": "../z.png"}), "leaves its folder", BAD_7, "image_root"),
    "hidden climb": (asks({"type": "image", "image": "x/../../z"}), "leaves its folder", BAD_7, "image_root"),
    "NUL in a path": (asks({"type": "image", "image": "a\0.png"}), "is not a path", BAD_7, "data:image/png;base64"),
    "pasted base64": (asks({"type": "image", "image": "iVBO" * 2000}), "is not a path", BAD_7, "data:image/png;base64"),
    "http": (asks({"type": "image", "image": "http://x.org/a.png"}), "is on the network", BAD_7, "download it"),
    "https": (asks({"type": "image_url", "image_url": {"url": "https://x"}}), "on the network", BAD_7, "download it"),
    "bad base64": (asks({"type": "image", "image": "data:image/png;base64,%"}), "not valid base64", BAD_7, "base64"),
    "bytes of no image": (
        asks({"type": "image", "image": "data:image/png;base64,aGVsbG8="}),
        "image 5 bytes cannot be decoded", "t.jsonl:3", "replace or remove it",
    ),
    "truncated image": (
        asks({"type": "image", "image": "data:image/png;base64," + base64.b64encode(png()[:50]).decode()}),
        "cannot be decoded", "t.jsonl:3", "replace or remove it",
    ),
    "huge image": (
        asks({"type": "image", "image": "data:image/png;base64," + BOMB}),
        "12000x12000 pixels, above the limit", "t.jsonl:3", "shrink it first",
    ),
    "images are numbers": (llava("<image>", images=[1, 2]), "'images' a list of paths", BAD_7, "not [1, 2]"),
    "images are objects": (llava("<image>", images=[{"url": "a.png"}]), "'images' a list of paths", BAD_7, "not [{"),
    "image is zero": (llava("<image>", image=0), "'image' is one path", BAD_7, "not 0"),
    "image and images": (
        llava("<image>", image="a.png", images=["a.png"]), "both 'image' and 'images'", BAD_7, "keep one",
    ),
    "mark without image": (
        llava("<image> What?"), "1 <image> marks in user text, but 0 images", BAD_7, "make them equal",
    ),
    "more images than marks": (llava("<image>", images=["a.png"] * 2), "1 <image> marks", BAD_7, "make them equal"),
    "bare image part": (asks({"type": "image"}), "is not text, image", BAD_7, "box or point"),
    "one part, two images": (
        row({"messages": [user({"type": "image"}), REPLY], "images": ["a.png", "a.png"]}),
        "2 images, but the messages use 1", BAD_7, "make them equal",
    ),
    "two parts, one image": (
        row({"messages": [user({"type": "image"}, {"type": "image"}), REPLY], "images": ["a.png"]}),
        "asks for image 1 (from 0) of 1", BAD_7, "add it or remove the part",
    ),
    "index of no image": (
        row({"messages": [user({"type": "image", "index": 5}), REPLY], "images": ["a.png"]}),
        "asks for image 5 (from 0) of 1", BAD_7, "add it or remove the part",
    ),
    "images without a user": (
        row({"messages": [REPLY], "images": ["a.png"]}), "no user message to put them into", BAD_7, "add one",
    ),
    # ---- boxes
    "three numbers": (box([[1, 2, 3]]), "box [1, 2, 3] is not [x1, y1, x2, y2]", BAD_7, "x1 <= x2"),
    "inverted": (box([[5, 0, 1, 4]]), "box [5, 0, 1, 4] is not", BAD_7, "x1 <= x2"),
    "NaN": (box([[0, 0, float("nan"), 4]]), "box [0, 0, nan, 4] is not", BAD_7, "x1 <= x2"),
    "infinite": (box([[0, 0, float("inf"), 4]]), "box [0, 0, inf, 4] is not", BAD_7, "x1 <= x2"),
    "beyond floats": (box([[0, 0, 10**400, 4]]), "box [0, 0, 1000", BAD_7, "x1 <= x2"),
    "strings": (box([["0", "0", "1", "4"]]), "box ['0', '0', '1', '4'] is not", BAD_7, "x1 <= x2"),
    "booleans": (box([[False, 0, 1, 4]]), "box [False, 0, 1, 4] is not", BAD_7, "x1 <= x2"),
    "a flat list": (box([0, 0, 1, 4]), "box 0 is not", BAD_7, "[x1, y1, x2, y2]"),
    "boxes are text": (box("0 0 1 4"), "is not text, image, image_url, image_ref, box or point", BAD_7, "box"),
    "box of no image": (box([[0, 0, 1, 1]], image=1), "refers to image 1 (from 0) of 1", BAD_7, "correct its 'image'"),
    "boxes beside messages": (
        row({**text_row(), "boxes": [[0, 0, 1, 1]]}), "have no place in it", "t.jsonl:3", "type box",
    ),
    "boxes of a question": (question(image="a.png", boxes=[[1, 2]]), "box [1, 2] is not", BAD_7, "x1 <= x2"),
    # ---- LLaVA, ShareGPT, Qwen-VL, questions, captions
    "no conversations": (row({"conversations": []}), "at least one message", BAD_7, "at least one message"),
    "no value": (row({"conversations": [{"from": "human"}]}), "needs 'from' and a text 'value'", BAD_7, "'value'"),
    "null value": (row({"conversations": [{"from": "gpt", "value": None}]}), "needs 'from'", BAD_7, "text 'value'"),
    "conversation of texts": (row({"conversations": ["Hi"]}), "message 1 needs 'from'", BAD_7, "'value'"),
    "unknown speaker": (
        row({"conversations": [{"from": "tool", "value": "x"}]}), "unknown role 'tool'", BAD_7, "known:",
    ),
    "open <img>": (llava("Picture 1: <img>a.png\nWhat?"), "do not come in pairs", BAD_7, "write <img>path</img>"),
    "missing <img>": (llava("Picture 1: <img>z.png</img>\nWhat?"), "image z.png not found", BAD_7, "correct the path"),
    "web <img>": (llava("<img>https://x.org/a.jpg</img>What?"), "is on the network", BAD_7, "download it"),
    "answer is a number": (question(answer=2), "'answer' is a text, not int", BAD_7, "is a text"),
    "no answer": (question(answer=None), "no assistant text to learn from", BAD_7, "add a reply"),
    "empty question": (question(question=" "), "'question' is empty", BAD_7, "fill it"),
    "caption of nothing": (row({"caption": "A cat."}), "a caption without an image", BAD_7, "add 'image'"),
    # ---- CSV and TSV
    "empty csv": (table(""), "holds no rows", "t.csv", "holds no rows"),
    "header only": (table("image,question,answer\n"), "holds no rows", "t.csv", "holds no rows"),
    "csv without answer": (
        table("image,question\na.png,What?\n"), "the header lacks answer", "t.csv:1", "name the columns",
    ),
    "csv of other columns": (
        table("a,b\n1,2\n"), "lacks question and answer (it has a, b)", "t.csv:1", "name the columns",
    ),
    "csv without a header": (table("a.png,What?,That.\n"), "the header lacks", "t.csv:1", "name the columns"),
    "doubled column": (
        table("question,answer,answer\na,b,c\n"), "'answer' stands in the header twice", "t.csv:1", "rename",
    ),
    "ragged, short": (table("question,answer\na,b\nc\n"), "1 cells under a header of 2", "t.csv:3", "quote cells"),
    "ragged, long": (table("question,answer\na,b,c\n"), "3 cells under a header of 2", "t.csv:2", "quote cells"),
    "open quote": (
        table('question,answer\na,b\n"c,d\ne,f\n'), "not valid CSV (unexpected end", "t.csv:3", "double those",
    ),
    "text after a quote": (table('question,answer\n"a"b,c\n'), "not valid CSV", "t.csv:2", "put cells with quotes"),
    "csv in latin-1": (table("question,answer\nü,b\n".encode("latin-1")), "not UTF-8", "t.csv:2", "save it as UTF-8"),
    "csv in utf-16": (table("question,answer\na,b\n".encode("utf-16")), "not UTF-8", "t.csv:1", "save it as UTF-8"),
    "commas in a tsv": (
        table("image,question,answer\na,b,c\n", "t.tsv"), "the header lacks", "t.tsv:1", "name the columns",
    ),
    "csv with a lost image": (
        table("image,question,answer\nz.png,a,b\n"), "z.png not found", "t.csv:2", "correct the path",
    ),
    "csv with odd boxes": (
        table("question,answer,boxes\na,b,1 2 3 4\n"), "'boxes': not valid JSON", "t.csv:2", "write [[x1",
    ),
    # ---- WebDataset
    "not a tar": (file("t.tar", b"hello" * 400), "not a tar file, or damaged", "t.tar", "copy it again"),
    "empty tar file": (file("t.tar", b""), "not a tar file", "t.tar", "copy it again"),
    "tar without members": (tar({}), "holds no rows", "t.tar", "holds no rows"),
    "tar of other things": (tar({"a.cls": b"1"}), "holds no rows", "t.tar", "holds no rows"),
    "tar cut in a member": (
        tar({"0.png": png() * 90, "0.json": ABOUT}, lambda b: b[:3000]), "truncated", "t.tar", "copy",
    ),
    "tar cut in a header": (
        tar({"0.png": png(), "0.json": ABOUT}, lambda b: b[:1200]), "the end mark of a tar is missing", "t.tar", "copy",
    ),
    "tar cut between members": (
        tar({"0.json": ABOUT, "1.json": ABOUT}, lambda b: b[:1024]), "the end mark of a tar is missing",
        "t.tar", "copy",
    ),
    "damaged header": (
        tar({"0.json": ABOUT, "1.json": ABOUT}, lambda b: b[:1024] + b"\xff" * 99 + b[1123:]),
        "bytes after byte 1,024 are no members", "t.tar", "make it again",
    ),
    "joined tars": (
        tar({"0.json": ABOUT}, lambda b: b + b), "several archives joined", "t.tar", "one file per archive",
    ),
    "tar climbing": (tar({"../0.json": ABOUT}), "'../0.json' leaves the archive", "t.tar", "with relative names"),
    "tar climbing inside": (tar({"a/../../0.json": ABOUT}), "leaves the archive", "t.tar", "with relative names"),
    "tar from the root": (tar({"/etc/0.json": ABOUT}), "'/etc/0.json' leaves the archive", "t.tar", "relative names"),
    "symbolic link in a tar": (
        special(type=tarfile.SYMTYPE, linkname="/etc/passwd"), "is a link, a device or sparse", "t.tar", "plain files",
    ),
    "hard link in a tar": (special(type=tarfile.LNKTYPE, linkname="x"), "is a link", "t.tar", "put plain files"),
    "device in a tar": (special(type=tarfile.CHRTYPE), "is a link, a device or sparse", "t.tar", "put plain files"),
    "image without json": (tar({"0.png": png()}), "no .json or .txt beside 0.png", "t.tar:0", "add what it shows"),
    "json of a member": (
        tar({"0.png": png(), "0.json": b"{"}), "not valid JSON", "t.tar:0.json", "mend or remove the member",
    ),
    "json list in a tar": (tar({"0.json": b"[1]"}), "a row is a JSON object, this is list", "t.tar:0", "JSON object"),
    "two texts of a key": (
        tar({"0.txt": b"a", "0.b.txt": b"b", "0.png": png()}), "two .txt members", "t.tar:0", "rename one",
    ),
    "latin-1 in a tar": (tar({"0.png": png(), "0.txt": b"\xfc"}), "not UTF-8", "t.tar:0.txt", "save it as UTF-8"),
    "caption of nothing in a tar": (tar({"0.txt": b"A cat."}), "a caption without an image", "t.tar:0", "add 'image'"),
    "two images, one mark": (
        tar({"0.a.png": png(), "0.b.png": png(),
        "0.json": json.dumps({"question": "<image>?", "answer": "x"}).encode()}),
        "1 <image> marks in user text, but 2 images", "t.tar:0 (sample t/0)", "make them equal",
    ),
    "broken picture in a tar": (tar({"0.png": b"hello", "0.json": ABOUT}), "cannot be decoded", "t.tar:0", "replace"),
    # ---- parquet and datasets
    "not a parquet": (
        file("t.parquet", b"hello" * 400), "not a parquet file, or truncated", "t.parquet", "copy it again",
    ),
    "empty parquet": (file("t.parquet", b""), "not a parquet file", "t.parquet", "copy it again"),
    "cut parquet": (parquet([ASK] * 9, lambda b: b[: len(b) // 2]), "or truncated", "t.parquet", "copy it again"),
    "damaged pages": (
        parquet([ASK] * 9, lambda b: b[:4] + b"\xff" * 60 + b[64:]), "row group 0 cannot be read",
        "t.parquet:1", "copy it again",
    ),
    "parquet without rows": (
        lambda folder: _empty_parquet(folder / "t.parquet"), "holds no rows", "t.parquet", "holds no rows",
    ),
    "parquet of other columns": (parquet([{"a": 1}]), "no column that holds a conversation", "t.parquet", "rename one"),
    "parquet without images": (
        parquet([{"messages": [{"role": "user",
        "content": [{"type": "image"}]}, REPLY | {"content": [{"type": "text"}]}]}]),
        'part {"type": "image"} is not text, image', "t.parquet:1 (sample t/0)", "box or point",
    ),
    "parquet of numbers": (parquet([{"messages": 3}]), "'messages' must be a list", "t.parquet:1", "a list"),
    "images of numbers": (parquet([ASK | {"images": [1, 2]}]), "'images' a list of paths", "t.parquet:1", "not [1, 2]"),
    "answers of numbers": (parquet([ASK | {"answer": 2}]), "'answer' is a text, not int", "t.parquet:1", "is a text"),
    "image struct of nulls": (
        parquet([ASK | {"image": {"bytes": None, "path": None}}]), "'image' is one path",
        "t.parquet:1", "{bytes, path}",
    ),
    "image struct of text": (
        parquet([ASK | {"image": {"bytes": "x"}}]), "'image' is one path", "t.parquet:1", "{bytes, path}",
    ),
    "broken picture in a table": (
        parquet([ASK | {"image": {"bytes": b"hello", "path": "a.png"}}]), "cannot be decoded", "t.parquet:1", "replace",
    ),
    "lost path in a table": (
        parquet([ASK | {"image": {"bytes": None, "path": "z.png"}}]), "z.png not found",
        "t.parquet:1", "correct the path",
    ),
    "saved without its data": (
        saved(lambda folder: next(folder.glob("*.arrow")).unlink()), "not from save_to_disk", "saved", "save it again",
    ),
    "saved with damaged state": (
        saved(lambda folder: (folder / "state.json").write_text("{")), "not from save_to_disk",
        "saved", "save it again",
    ),
    "saved without the split": (saved_splits, "has no split 'train'; it has test", "saved", "it has test"),
    "hub name of one part": (lambda folder: "hub:name", "write hub:owner/name", "hub:name", "hub:owner/name/config"),
    "hub data set of nobody": (
        lambda folder: "hub:nobody/nothing", "cannot be loaded", "hub:nobody/nothing, split 'train'", "download it",
    ),
    "hub path without a folder": (
        lambda folder: _hub(folder, ASK | {"image": {"bytes": None, "path": "a.png"}}),
        "has no folder to start from", "hub:owner/name/train:1", "set image_root",
    ),
}  # fmt: skip


def _empty_parquet(path: Path) -> Path:
    import pyarrow as pa
    from pyarrow import parquet as pq

    pq.write_table(pa.table({"question": pa.array([], pa.string()), "answer": pa.array([], pa.string())}), path)
    return path


def _hub(folder: Path, value: dict) -> str:
    write_hub_cache(folder.parent / "hub", "owner/name", [value])
    return "hub:owner/name"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.png").write_bytes(png())
    return tmp_path / "data"


def read_all(path: Path | str, cache: Path) -> None:
    """Open, read every row, decode every image: what a run does sooner or later."""
    source = FileSource(path, cache=cache)
    for index in range(source.size):
        sample = source[index]
        for image in sample.images:
            load_image(image.source, sample.origin)


@pytest.mark.parametrize("name", CASES)
def test_broken_data_is_refused_with_what_where_and_remedy(name, folder, tmp_path):
    make, what, where, remedy = CASES[name]
    path = make(folder)
    with pytest.raises(VlmtuneError) as caught:
        read_all(path, tmp_path / "cache")
    message = str(caught.value)
    assert what in message and remedy in message, message
    assert (where if where.startswith("hub:") else f"{folder}/{where}".rstrip("/")) in message, message
    assert message.endswith(".") and "\n" not in message and len(message) < 1000, message


def test_the_corpus_is_large_and_covers_every_ending():
    assert len(CASES) >= 150
    wheres = " ".join(where for _, _, where, _ in CASES.values())
    for ending in (".jsonl", ".json", ".csv", ".tsv", ".tar", ".parquet", "saved", "hub:"):
        assert ending in wheres


def test_a_broken_row_takes_no_other_row_with_it(folder):
    source = FileSource(line("{")(folder))
    assert (source.size, source[0].id, source[2].id) == (3, "row-0", "row-0")


def test_nothing_of_an_archive_lands_on_the_disk(tmp_path):
    path = write_tar(tmp_path / "t.tar", {"0.png": png(), "0.json": ABOUT})
    FileSource(path, cache=tmp_path / "cache")[0]
    outside = {p.name for p in tmp_path.iterdir()}
    assert outside == {"t.tar", "cache"}
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.suffix not in ("", ".bin", ".json")]


def test_a_pickle_in_an_archive_is_never_opened(tmp_path):
    """WebDataset's own reader unpickles members called .pyd, .pkl or .pickle; a pickle can run any program."""
    import pickle

    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    members = {"0.pkl": pickle.dumps(Bomb()), "0.pyd": pickle.dumps(Bomb()), "0.png": png(), "0.json": ABOUT}
    source = FileSource(write_tar(tmp_path / "t.tar", members))
    read_all(tmp_path / "t.tar", tmp_path / "cache")
    assert source.format.endswith("WebDataset tar (members not read: .pkl .pyd), 1 rows")
    assert not (tmp_path / "exploded").exists()


def test_complaints_do_not_print_the_bytes_of_an_image(tmp_path):
    rows = [
        {
            "question": "What?",
            "answer": "x",
            "images": [{"bytes": png() * 100, "path": None}, {"bytes": None, "path": None}],
        }
    ]
    source = FileSource(write_parquet(tmp_path / "t.parquet", rows))
    with pytest.raises(VlmtuneError, match=rf"not \[\{{\"bytes\": \"<{len(png()) * 100} bytes>\""):
        source[0]


def test_good_data_of_every_kind_passes_the_same_reading(tmp_path):
    """The corpus fails for the reasons it names, not because of how it is read."""
    (tmp_path / "a.png").write_bytes(png())
    picture = ASK | {"image": {"bytes": png(), "path": None}}
    for path in (
        write_jsonl(tmp_path / "t.jsonl", [text_row(), picture_row()]),
        write_tar(tmp_path / "t.tar", {"0.png": png(), "0.json": ABOUT}),
        write_parquet(tmp_path / "t.parquet", [picture] * 9),
        table("image,question,answer\na.png,What?,That.\n")(tmp_path),
        table("image\tquestion\tanswer\na.png\tWhat?\tThat.\n", "t.tsv")(tmp_path),
        saved(lambda folder: None)(tmp_path),
    ):
        read_all(path, tmp_path / "cache")
