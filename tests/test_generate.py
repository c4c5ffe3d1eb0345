"""`blip2 generate`: files, folders and patterns, resumed where it was stopped, bad images named."""

import json

import numpy as np
import pytest
from PIL import Image

from blip2_jax import generate
from tests.inference import published

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, and a folder of four images, of which one cannot be read."""
    root = tmp_path_factory.mktemp("generate")
    published.generation_folder(root / "model", "opt")
    (root / "photos").mkdir()
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.jpg", "d.png"):
        pixels = rng.integers(0, 256, (40, 30, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(root / "photos" / name)
    (root / "photos/c.png").write_bytes(b"no image")
    (root / "photos/notes.txt").write_text("no image, and not taken for one")
    return root


def run(folder, *arguments):
    # Few tokens, and none of the published minimum: the model's weights are random.
    short = ["--max_new_tokens=6", "--min_new_tokens=0", "--num_beams=2"]
    return generate.main([f"--model={folder}/model", *short, *arguments])


def test_a_line_an_image_and_bad_images_are_named(folder, capsys):
    assert run(folder, f"--image={folder}/photos") == 1
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert [line.split("\t")[0].rsplit("/")[-1] for line in lines] == [
        "a.png", "b.jpg", "c.png", "d.png",
    ]  # fmt: skip
    assert "not a readable image" in lines[2] and "c.png" in err
    assert "1 of 4 images could not be read" in err


def test_patterns_prompts_and_json(folder, capsys):
    assert run(folder, f"--image={folder}/photos/[ab].*", "--prompt=a red", "--json") == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [sorted(record) for record in records] == [["image", "text"]] * 2
    assert run(folder, f"--image={folder}/photos/a.png", "--question=how many?") == 0
    assert capsys.readouterr().out.count("\n") == 1


def test_a_stopped_request_goes_on_and_another_is_refused(folder, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    request = [f"--image={folder}/photos", f"--output={output}", "--batch_size=1"]
    assert run(folder, *request) == 1
    whole = output.read_text()
    lines = whole.splitlines(keepends=True)
    assert len(lines) == 5  # the request, and four images
    output.write_text("".join(lines[:3]) + lines[3][:9])  # killed in the middle of a line
    assert run(folder, *request) == 1
    assert output.read_text() == whole
    capsys.readouterr()
    assert run(folder, *request) == 0  # nothing left to do
    assert "4 of 4 images were done before" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="written by another request"):
        run(folder, *request, "--prompt=a red")
    (tmp_path / "mine.txt").write_text("my notes\n")
    with pytest.raises(SystemExit, match="not written by blip2 generate"):
        run(folder, f"--image={folder}/photos", f"--output={tmp_path}/mine.txt")
    assert (tmp_path / "mine.txt").read_text() == "my notes\n"


def test_a_stream_ends_in_the_greedy_text(folder, capsys):
    image = f"--image={folder}/photos/a.png"
    arguments = [f"--model={folder}/model", image, "--max_new_tokens=6", "--min_new_tokens=0"]
    assert generate.main([*arguments, "--num_beams=1", "--prompt="]) == 0
    plain = capsys.readouterr().out
    assert generate.main([*arguments, "--stream"]) == 0
    assert capsys.readouterr().out.split() == plain.split()


def test_images_are_found_in_folders_patterns_and_lists(tmp_path, monkeypatch, capsys):
    odd = tmp_path / "trip [1]"  # a pattern would find nothing here
    odd.mkdir()
    for name in ("b.JPG", "a.png", "paper.pdf", "clip.mpg", "notes.txt", "c.webp"):
        (odd / name).touch()
    expected = [f"{odd}/{name}" for name in ("a.png", "b.JPG", "c.webp")]
    assert generate.find_images([str(odd)]) == expected
    assert "3 other files are skipped (clip.mpg, notes.txt, paper.pdf)" in capsys.readouterr().err
    assert generate.find_images([f"{odd}/*.png", f"{odd}/a.png"]) == expected[:1]
    names = tmp_path / "list.txt"
    names.write_bytes(f"{odd}/c.webp\r\n\r\ntrip [1]/a.png\r\ngone.jpg\r\n".encode("utf-16"))
    monkeypatch.chdir("/")
    paths = [f"{odd}/c.webp", f"{odd}/a.png", "gone.jpg"]
    assert generate.find_images([f"@{names}"]) == paths
    with pytest.raises(ValueError, match="no such file"):
        generate.find_images(["@nowhere.txt"])


def test_scores_are_in_lines_and_json(folder, tmp_path, capsys):
    image, output = f"--image={folder}/photos/a.png", tmp_path / "out.jsonl"
    assert run(folder, image, "--return_scores", "--dtype=fp32") == 0
    name, text, score = capsys.readouterr().out.rstrip("\n").split("\t")
    assert name.endswith("a.png") and float(score) < 0
    arguments = [image, "--return_scores", "--num_return_sequences=2", "--no_repeat_ngram_size=2"]
    assert run(folder, *arguments, f"--output={output}") == 0
    row = json.loads(output.read_text().splitlines()[1])
    assert len(row["text"]) == len(row["log_prob"]) == len(row["token_log_probs"]) == 2
    assert row["log_prob"][0] == pytest.approx(sum(row["token_log_probs"][0]), abs=1e-3)
    with pytest.raises(SystemExit, match="written by another request"):
        run(folder, *arguments[:1], *arguments[2:], f"--output={output}")


def test_escapes_of_a_prompt_are_understood(folder, capsys):
    image = f"--image={folder}/photos/a.png"
    assert run(folder, image, r"--prompt=a\nred") == 0
    escaped = capsys.readouterr().out
    assert run(folder, image, "--prompt=a\nred") == 0
    assert capsys.readouterr().out == escaped


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--image=/nowhere/x.png"], "no such image"),
        (["--image=/nowhere/*.png"], "no such image"),
        (["--image={0}/photos", "--prompt=a", "--question=b"], "not both"),
        (["--image={0}/photos", "--top_p=1.5", "--do_sample"], "top_p is 1.5"),
        (["--image={0}/photos", "--batch_size=0"], "batch_size is 0"),
        (["--image={0}/photos", "--prompt=a <image> b"], "write <image> once, in front"),
        (["--image={0}/photos", "--stream", "--return_scores"], "--stream has no scores"),
    ],
)
def test_bad_requests(folder, arguments, message):
    with pytest.raises(SystemExit, match=message):
        run(folder, *(argument.format(folder) for argument in arguments))


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--max_length=9", "There is no --max_length. Did you mean --max_new_tokens"),
        ("--min_length=9", "There is no --min_length. Did you mean --min_new_tokens"),
        ("--num_captions=9", "There is no --num_captions. Did you mean --num_return_sequences"),
        ("--dtype=int8", "argument --dtype: dtype is 'int8'; it must be float32"),
    ],
)
def test_flags_that_are_others(folder, capsys, flag, message):
    with pytest.raises(SystemExit):
        run(folder, f"--image={folder}/photos", flag)
    assert message in capsys.readouterr().err


def test_a_model_that_is_none(folder):
    with pytest.raises(SystemExit, match="No config.json"):
        generate.main([f"--model={folder}/photos", f"--image={folder}/photos"])


def test_help_shows_the_published_defaults(capsys):
    with pytest.raises(SystemExit):
        generate.main(["--help"])
    shown = capsys.readouterr().out
    assert "Question: {} Short answer:" in shown and "repetition_penalty=1.5" in shown
    assert max(map(len, shown.splitlines())) <= 100
