import importlib.util
import inspect
import json
import struct
from pathlib import Path

import jax.numpy as jnp
import pytest
from tensorboardX.proto.event_pb2 import Event

from blip2_jax.runtime.jsonl import read_jsonl
from blip2_jax.runtime.metric_writers import (
    JsonlWriter,
    MetricWriter,
    MultiWriter,
    RunWriters,
    TensorBoardWriter,
)

METRICS, TIMING = "metrics.jsonl", "timing.jsonl"


def write_steps(writers, steps):
    for step in steps:
        writers.write(step, {"loss": jnp.float32(1 / step)}, timing={"steps_per_second": 0.5})


def lines(workdir, name=METRICS):
    return (workdir / name).read_text().splitlines()


def test_a_resumed_run_leaves_the_file_of_one_that_never_stopped(tmp_path):
    with RunWriters(tmp_path / "whole") as writers:
        write_steps(writers, range(1, 11))
    with RunWriters(tmp_path / "parts") as writers:
        write_steps(writers, range(1, 8))
    with open(tmp_path / "parts" / METRICS, "a") as file:
        file.write('{"step": 8, "lo')  # Killed in the middle of a line.
    with RunWriters(tmp_path / "parts", restored_step=4) as writers:
        assert len(lines(tmp_path / "parts")) == 4
        write_steps(writers, range(5, 11))
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")
    assert len(lines(tmp_path / "parts", TIMING)) == 10


def test_a_run_from_the_start_drops_what_an_earlier_one_left(tmp_path):
    with RunWriters(tmp_path) as writers:
        write_steps(writers, [1, 2])
    with RunWriters(tmp_path) as writers:
        writers.write(0, {"loss": 3.0, "count": 2})
    assert json.loads(*lines(tmp_path)) == {"step": 0, "loss": 3.0, "count": 2}


@pytest.mark.parametrize("line", [b"broken", b"\0\0\0\0", b"\xff\xfe", b"12", b"{}", b""])
def test_a_damaged_line_inside_the_file_is_left_out_and_reported(tmp_path, capsys, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 2}\n{"st')
    assert read_jsonl(path) == [{"step": 1}, {"step": 2}]
    assert f"{path}, line 2 is damaged and left out" in capsys.readouterr().err
    with RunWriters(tmp_path, restored_step=1) as writers:
        assert writers.last_step == 1
    assert path.read_bytes() == b'{"step": 1}\n'


def test_only_scalars_are_metrics(tmp_path):
    with RunWriters(tmp_path) as writers:
        with pytest.raises(ValueError, match=r"'loss' has the shape \(2,\)"):
            writers.write(1, {"loss": jnp.zeros(2)})


def test_other_processes_write_nothing(tmp_path):
    with RunWriters(tmp_path / "run", active=False) as writers:
        writers.write(1, {"loss": 1.0})
    assert not (tmp_path / "run").exists()


def tensorboard_scalars(folder):
    """Reads TFRecords: length u64, its checksum u32, the event, its checksum u32."""
    scalars = []
    for path in folder.iterdir():
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + size])
            scalars += [
                (event.step, value.tag, value.simple_value) for value in event.summary.value
            ]
            data = data[16 + size :]
    return scalars


def test_tensorboard_shows_the_same_numbers(tmp_path):
    with RunWriters(tmp_path) as writers:
        writers.write(3, {"itc/loss": 0.5}, timing={"steps_per_second": 2.0})
    assert tensorboard_scalars(tmp_path / "tensorboard") == [
        (3, "itc/loss", 0.5),
        (3, "steps_per_second", 2.0),
    ]


def clus_interface():
    """`clu.metric_writers.MetricWriter`, read from its file: the package asks for TensorFlow."""
    clu = Path(importlib.util.find_spec("clu").origin).parent
    spec = importlib.util.spec_from_file_location(
        "clu_metric_writers_interface", clu / "metric_writers" / "interface.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.MetricWriter


@pytest.mark.parametrize("writer", [MetricWriter, JsonlWriter, TensorBoardWriter, MultiWriter])
@pytest.mark.parametrize("name", ["write_scalars", "write_hparams", "flush", "close"])
def test_writers_have_the_signatures_of_clus(writer, name):
    ours, theirs = (inspect.signature(getattr(of, name)) for of in (writer, clus_interface()))
    assert list(ours.parameters) == list(theirs.parameters)
    kinds = [[p.kind for p in each.parameters.values()] for each in (ours, theirs)]
    assert kinds[0] == kinds[1]


def test_hyperparameters_are_shown_by_tensorboard_and_leave_the_lines_alone(tmp_path):
    with RunWriters(tmp_path) as writers:
        writers.metrics.write_hparams({"optim.peak_lr": 1e-4, "mesh": (1, 2)})
        writers.write(1, {"loss": 0.5})
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"optim.peak_lr" in events.read_bytes() and b"(1, 2)" in events.read_bytes()
    assert lines(tmp_path) == ['{"step": 1, "loss": 0.5}']


def test_another_writer_can_stand_beside(tmp_path):
    class Other:
        def __init__(self):
            self.written = {}

        def write_scalars(self, step, scalars):
            self.written[step] = dict(scalars)

        def write_hparams(self, hparams):
            pass

        def flush(self):
            pass

        def close(self):
            self.written["closed"] = True

    other = Other()
    writer = MultiWriter([JsonlWriter(tmp_path / METRICS), other])
    writer.write_scalars(2, {"loss": jnp.float32(0.25)})
    writer.close()
    assert other.written == {2: {"loss": 0.25}, "closed": True}
    assert lines(tmp_path) == ['{"step": 2, "loss": 0.25}']
