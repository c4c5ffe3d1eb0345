"""Generated lists with all that goes wrong in lists: no traceback, no row lost, no rows joined.

FUZZ_FILES=2000 pytest tests/data/test_list_fuzz.py        more of them
"""

import io
import json
import os
import random
import re

import pytest

from blip2_jax.data import containers, lists

FILES = int(os.environ.get("FUZZ_FILES", "200"))
BLOCKS = 10  # tests that share them
MARK = re.compile(r"mark(\d+)z")  # stands in every text of a row, with the row's number

ODD = [
    None, "", "  ", 7, 3.5, float("nan"), True, [], {}, ["x", None, 4], {"a": {"b": [1]}}, "\ud83d",
    '"', "a\0b", "\ufeff", [[["deep"]]], -1, 10**30, "[1, 2", "{}", b"\xff\xfe",
]  # fmt: skip
EXTRA = ("answers", "question_id", "split", "url", "id", "conversations", "width")
WORDS = [
    "a cat", 'the "STOP" sign', "comma, comma", "semi; colon", "pipe | pipe", "tab\there",
    "naïve – 名", "\N{GRAPES}", "line\nbreak", "back\\slash", "it's", "#hash", "['list']",
]  # fmt: skip


def text_of(rng, number):
    return f"mark{number}z {rng.choice(WORDS)} {rng.choice(WORDS)}"


def make_row(rng, number, odd):
    """A row, and whether nothing is wrong with it."""
    row = {"image": f"photos/{number}.jpg", "caption": text_of(rng, number)}
    kind = rng.random()
    if kind < 0.3:
        row |= {"question": f"mark{number}z what?", "question_id": number, "answers": ["yes", "no"]}
    elif kind < 0.4:
        row["caption"] = [row["caption"], text_of(rng, number)]
    if rng.random() < 0.2:
        row["image_id"] = rng.choice([number, str(number), 0, "0", f"coco_{number}"])
    clean = rng.random() >= odd
    if not clean:
        for _ in range(rng.randint(1, 3)):
            name = rng.choice([*row, *EXTRA])
            if rng.random() < 0.3:
                row.pop(name, None)
            else:
                row[name] = rng.choice(ODD)
    return row, clean


def jsonable(value):
    return json.loads(json.dumps(value, default=repr)) if value is not None else None


# ------------------------------------------------------------------------------------- containers


def as_json(rng, rows):
    rows = jsonable(rows)
    form = rng.choice(["list", "data", "questions", "coco", "karpathy", "gqa", "columns", "map"])
    if form == "coco":
        images = [{"id": n, "file_name": row.get("image")} for n, row in enumerate(rows)]
        captions = [
            {"image_id": rng.choice([n, str(n)]), "caption": row.get("caption"), "id": n}
            for n, row in enumerate(rows)
        ]
        if rng.random() < 0.3:
            captions.append(rng.choice(["odd", None, {"caption": "of none"}, {"image_id": []}]))
            rng.choice(images).pop(rng.choice(["id", "file_name"]))
        return {"images": images, "annotations": captions}, None
    if form == "karpathy":
        for row in rows:
            row["sentences"] = [
                rng.choice([{"raw": row.pop("caption", 0)}, {"tokens": ["a", "b"]}])
            ]
            row |= {"filename": row.pop("image", None), "cocoid": row.get("image_id")}
        return {"images": rows}, len(rows)
    if form == "gqa":
        return {f"q{n}": row for n, row in enumerate(rows)}, len(rows)
    if form == "columns":
        names = sorted({name for row in rows for name in row} | {"image", "caption"})
        return {name: [row.get(name) for row in rows] for name in names}, len(rows)
    if form == "map":
        return {f"{n}.jpg": row.get("caption") for n, row in enumerate(rows)}, len(rows)
    return (rows, len(rows)) if form == "list" else ({form: rows}, len(rows))


def encoded(rng, text):
    """Bytes, and whether all of the text is in them."""
    name = rng.choice(["utf-8"] * 4 + ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
    if rng.random() < 0.1:
        return text.encode("latin-1", "replace"), False
    return text.encode(name, "surrogatepass"), True


def as_lines(rng, lines):
    ends = rng.choice([["\n"], ["\r\n"], ["\r"], ["\n", "\r\n", "\r"]])
    blank = ["\n"] if rng.random() < 0.2 else []
    return "".join(line + rng.choice(ends) + "".join(blank) for line in lines)


def plain(value):
    """A value as text; nothing where it has none."""
    if value is None or isinstance(value, (bool, float)):
        return None
    return str(value).replace("\ud83d", "?")


def cell(rng, value, delimiter, quoting):
    """A value in a table, and whether a quote in it was left open."""
    value = json.dumps(value) if isinstance(value, (list, dict)) else plain(value) or ""
    if quoting:
        if rng.random() < 0.05:
            form = rng.choice(['"{}', '{}"', '{} "', '"{}""'])
            return form.format(value.replace("\n", " ")), True
        if any(c in value for c in f'"\n\r{delimiter}') or rng.random() < 0.2:
            return '"' + value.replace('"', '""') + '"', False
        return value, False
    return re.sub(r"\s", " ", value).replace(delimiter, " "), False


def as_table(rng, rows, suffix):
    delimiter = "\t" if suffix == ".tsv" else rng.choice(",,,;|\t")
    quoting = delimiter in ",;"
    names = list(dict.fromkeys(name for row in rows for name in row))
    rng.shuffle(names)
    header = [rng.choice([n, n.upper(), f" {n} ", n.replace("_", " ").title()]) for n in names]
    lines, whole = [delimiter.join(header)], []
    for row in rows:
        cells = [cell(rng, row.get(name), delimiter, quoting) for name in names]
        lines.append(delimiter.join(text for text, _ in cells))
        whole.append(not any(open_ for _, open_ in cells))
        if rng.random() < 0.03:
            lines[-1] = lines[-1].rpartition(delimiter)[0] or delimiter
            whole[-1] = False
    # A row of one line without quotes is a line of its own whatever stands above it.
    lone = [ok and not set(line) & {'"', "\n"} for ok, line in zip(whole, lines[1:], strict=True)]
    return (
        as_lines(rng, lines),
        lone,
        None if quoting else sum(bool(x.strip(" ")) for x in lines[1:]),
    )


def as_arrow(rng, rows, suffix):
    import pyarrow
    import pyarrow.parquet

    columns = {}
    for name in sorted({name for row in rows for name in row}):
        values = [None if row.get(name) == {} else row.get(name) for row in rows]
        try:
            columns[name] = pyarrow.array(values)
        except (pyarrow.ArrowException, UnicodeEncodeError, OverflowError, ValueError):
            columns[name] = pyarrow.array(list(map(plain, values)), pyarrow.string())
    if rng.random() < 0.3:
        kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
        images = [
            {"bytes": rng.choice([b"png", None]), "path": rng.choice([None, "x.png"])} for _ in rows
        ]
        columns["image"] = pyarrow.array(images, kind)
    table = pyarrow.table(columns)
    out = io.BytesIO()
    if suffix == ".parquet":
        pyarrow.parquet.write_table(table, out, row_group_size=rng.choice([1, 3, 100]))
    else:
        make = pyarrow.ipc.new_stream if suffix == ".arrow" else pyarrow.ipc.new_file
        with make(out, table.schema) as writer:
            writer.write_table(table, max_chunksize=rng.choice([1, 3, 100]))
    return out.getvalue()


def make_file(rng, path):
    """Writes a list; returns which rows must be found, and how many there are if that is sure."""
    suffix = rng.choice([*containers.SUFFIXES, ".json", ".csv", ".csv"])
    odd = rng.choice([0.0, 0.2, 0.6])
    made = [make_row(rng, number, odd) for number in range(rng.randint(1, 12))]
    rows, clean = [row for row, _ in made], [ok for _, ok in made]
    count, sure = None, True
    if suffix in (".parquet", ".arrow", ".feather"):
        data, count = as_arrow(rng, rows, suffix), len(rows)
        clean = [False] * len(rows)  # columns of mixed types are made texts
    elif suffix == ".json":
        document, count = as_json(rng, rows)
        data, sure = encoded(rng, json.dumps(document, ensure_ascii=rng.random() < 0.5, indent=1))
        clean = [False] * len(rows)
    elif suffix in (".jsonl", ".ndjson"):
        lines = [json.dumps(jsonable(row)) for row in rows]
        if rng.random() < 0.2:
            broken = rng.choice(["{broken", "[1]", "null", "[" * 9999])
            lines.insert(rng.randrange(len(lines)), broken)
        count = len(lines)
        data, sure = encoded(rng, as_lines(rng, lines))
    else:
        text, lone, count = as_table(rng, rows, suffix)
        data, sure = encoded(rng, text)
        clean = [ok and alone for ok, alone in zip(clean, lone, strict=True)]
    if not sure:
        clean = [False] * len(rows)
    if rng.random() < 0.1 and data:  # damage
        at = rng.randrange(len(data))
        rest = rng.choice([b"", bytes([rng.randrange(256)]) + data[at + 1 :]])
        data = data[:at] + rest
        clean, count = [False] * len(rows), None
    path = path.with_suffix(suffix)
    path.write_bytes(data)
    return path, [n for n, ok in enumerate(clean) if ok], count if sure else None


# ----------------------------------------------------------------------------------------- checks


def texts_of(record):
    yield from record["captions"]
    for question in record.get("questions", []):
        yield question["question"]
        yield from question["answers"]


def check(path, wanted, count):
    try:
        source = lists.ListSource([str(path)], str(path.parent))
    except ValueError as error:
        assert type(error) is ValueError and str(path) in str(error), repr(error)
        str(error).encode()
        assert not wanted, error
        return False
    assert source.counts.read == source.counts.used + source.counts.skipped
    assert source.faults.count == source.counts.skipped
    assert count is None or source.counts.read == count
    found = set()
    for number in range(len(source)):
        record = source.without_image(number)
        json.dumps(record).encode()
        for text in texts_of(record):
            assert isinstance(text, str) and text.strip()
            assert text not in ("None", "nan", "True")
            marks = set(MARK.findall(text))
            assert len(marks) < 2, text
            found |= marks
    missing = {str(n) for n in wanted} - found
    assert not missing, (missing, source.faults.text())
    return True


@pytest.mark.parametrize("block", range(BLOCKS))
def test_no_list_is_read_wrongly_in_silence(tmp_path, block):
    read = 0
    for number in range(block, FILES, BLOCKS):
        rng = random.Random(number)
        path, wanted, count = make_file(rng, tmp_path / f"{number}.x")
        try:
            read += check(path, wanted, count)
        except Exception as error:
            error.add_note(f"file {number}: {path.read_bytes()[:2000]!r}")
            raise
    assert read > FILES / BLOCKS / 2  # most are of use
