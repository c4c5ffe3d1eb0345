import io
import json
import re
import struct

import jax.numpy as jnp
import pytest
from tensorboardX.proto.event_pb2 import Event

from blip2_jax.runtime import metrics


def write_steps(writer, steps):
    for step in steps:
        writer.write(step, {"loss": jnp.float32(1 / step)}, timing={"steps_per_second": 0.5})


def lines(workdir, name=metrics.METRICS_FILE):
    return (workdir / name).read_text().splitlines()


def test_a_resumed_run_leaves_the_file_of_one_that_never_stopped(tmp_path):
    with metrics.MetricsWriter(tmp_path / "whole") as writer:
        write_steps(writer, range(1, 11))
    with metrics.MetricsWriter(tmp_path / "parts") as writer:
        write_steps(writer, range(1, 8))
    with open(tmp_path / "parts" / metrics.METRICS_FILE, "a") as file:
        file.write('{"step": 8, "lo')  # Killed in the middle of a line.
    with metrics.MetricsWriter(tmp_path / "parts", restored_step=4) as writer:
        assert len(lines(tmp_path / "parts")) == 4
        write_steps(writer, range(5, 11))
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")
    assert len(lines(tmp_path / "parts", metrics.TIMING_FILE)) == 10


def test_a_run_from_the_start_drops_what_an_earlier_one_left(tmp_path):
    with metrics.MetricsWriter(tmp_path) as writer:
        write_steps(writer, [1, 2])
    with metrics.MetricsWriter(tmp_path) as writer:
        writer.write(0, {"loss": 3.0, "count": 2})
    assert json.loads(*lines(tmp_path)) == {"step": 0, "loss": 3.0, "count": 2}


@pytest.mark.parametrize("line", [b"broken", b"\0\0\0\0", b"\xff\xfe", b"12", b"{}", b""])
def test_a_damaged_line_inside_the_file_is_left_out_and_reported(tmp_path, capsys, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 2}\n{"st')
    assert metrics.read_jsonl(path) == [{"step": 1}, {"step": 2}]
    assert f"{path}, line 2 is damaged and left out" in capsys.readouterr().err
    with metrics.MetricsWriter(tmp_path, restored_step=1) as writer:
        assert writer.last_step == 1
    assert path.read_bytes() == b'{"step": 1}\n'


def test_only_scalars_are_metrics(tmp_path):
    with metrics.MetricsWriter(tmp_path) as writer:
        with pytest.raises(ValueError, match=r"'loss' has the shape \(2,\)"):
            writer.write(1, {"loss": jnp.zeros(2)})


def test_other_processes_write_nothing(tmp_path):
    with metrics.MetricsWriter(tmp_path / "run", active=False) as writer:
        writer.write(1, {"loss": 1.0}, echo=True)
    assert not (tmp_path / "run").exists()


def tensorboard_scalars(folder):
    """Reads TFRecords: length u64, its checksum u32, the event, its checksum u32."""
    found = []
    for path in folder.iterdir():
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + size])
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            data = data[16 + size :]
    return found


def test_tensorboard_shows_the_same_numbers(tmp_path, capsys):
    with metrics.MetricsWriter(tmp_path) as writer:
        writer.write(3, {"itc/loss": 0.5}, timing={"steps_per_second": 2.0}, echo=True)
    assert tensorboard_scalars(tmp_path / "tensorboard") == [
        (3, "itc/loss", 0.5),
        (3, "steps_per_second", 2.0),
    ]
    assert "step 3  itc/loss 0.5  steps_per_second 2" in capsys.readouterr().out


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_a_bar_on_a_terminal():
    out = Terminal()
    with metrics.Progress(10, initial=4, label="stage 1", file=out) as progress:
        for _ in range(6):
            progress.update(loss=0.25)
    last = out.getvalue().rstrip("\n").split("\r")[-1]
    assert last.startswith("stage 1: 100%")
    assert "10/10" in last


def test_progress_is_plain_lines_elsewhere():
    out = io.StringIO()
    with metrics.Progress(10, initial=8, label="stage 1", every_seconds=0, file=out) as progress:
        progress.update(loss=0.25)
        progress.update(loss=0.125)
    first, last = out.getvalue().splitlines()
    assert re.fullmatch(r"stage 1 step 9/10  \S+ step/s  00:0\d left  loss 0.25", first)
    assert last.startswith("stage 1 step 10/10") and last.endswith("loss 0.125")


def test_plain_lines_are_few():
    out = io.StringIO()
    with metrics.Progress(100, every_seconds=1000, file=out) as progress:
        for _ in range(100):
            progress.update()
    assert len(out.getvalue().splitlines()) == 1
