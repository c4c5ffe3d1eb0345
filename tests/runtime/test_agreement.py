"""Processes that are not about to do the same all stop, and say which one differs in what."""

import json
import threading

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from blip2_jax.runtime import agreement, distributed, state
from blip2_jax.runtime import mesh as meshes
from blip2_jax.runtime.agreement import ProcessesDiffer


@pytest.fixture
def processes(monkeypatch):
    """Runs a function in threads that meet as processes do; what each has raised, or None."""

    def run(count, function):
        meeting, table = threading.Barrier(count, timeout=20), [None] * count
        here, raised = threading.local(), [None] * count

        def gather(value):
            table[here.index] = json.dumps(value)
            meeting.wait()
            gathered = [json.loads(text) for text in table]
            meeting.wait()
            return gathered

        def one(index):
            here.index = index
            try:
                function(index)
            except Exception as error:
                raised[index] = error

        monkeypatch.setattr(distributed, "process_count", lambda: count)
        monkeypatch.setattr(distributed, "gather", gather)
        monkeypatch.setattr(distributed, "wait_for_all", lambda name: None)
        threads = [threading.Thread(target=one, args=(index,)) for index in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return raised

    return run


COMMON = {
    "recipe": "stage1",
    "versions": {"jax": "0.10"},
    "config": {"seed": 0, "optim": {"peak_lr": 1e-3}, "data": {"threads": 16, "workers": 0}},
    "data": {"records": 10, "digest": "ab"},
    "init": {"bert": "cd", "checkpoint": ""},
    "state": {"params/x": "float32[4]"},
}


def changed(path, value):
    facts = json.loads(json.dumps(COMMON))
    *parents, last = path
    holder = facts
    for name in parents:
        holder = holder[name]
    holder[last] = value
    return facts


@pytest.mark.parametrize(
    ("path", "value", "line"),
    [
        (("config", "seed"), 7, "config.seed: 0 elsewhere, 7 here"),
        (("config", "optim", "peak_lr"), 5e-3, "config.optim.peak_lr: 0.001 elsewhere, 0.005 here"),
        (("data", "digest"), "xy", "data.digest: 'ab' elsewhere, 'xy' here"),
        (("init", "bert"), "ef", "init.bert: 'cd' elsewhere, 'ef' here"),
        (("state", "params/x"), "float32[8]", r"state.params/x: 'float32\[4\]' else"),
        (("versions", "jax"), "0.9", "versions.jax: '0.10' elsewhere, '0.9' here"),
    ],
)
def test_the_odd_one_is_named_everywhere(processes, path, value, line):
    def work(index):
        with agreement.together("start") as facts:
            facts |= changed(path, value) if index == 2 else COMMON

    raised = processes(4, work)
    assert {type(error) for error in raised} == {ProcessesDiffer}
    assert len({str(error) for error in raised}) == 1
    with pytest.raises(ProcessesDiffer, match=rf"(?s)3 of 4 processes.*Process 2 \(.*{line}"):
        raise raised[0]
    assert "Process 1" not in str(raised[0])


def test_every_odd_one_is_named_and_long_lists_are_cut(processes):
    def work(index):
        with agreement.together("start") as facts:
            facts |= {"state": {f"{n:02}": index if index > 2 else 0 for n in range(50)}}

    message = str(processes(5, work)[0])
    assert "Process 3" in message and "Process 4" in message and "Process 2" not in message
    assert message.count("... and 30 more") == 2


def test_what_each_does_in_its_own_way_may_differ(processes):
    def work(index):
        with agreement.together("start") as facts:
            own = {"threads": index, "workers": index, "dir": f"/{index}/data"}
            facts |= changed(("config", "data"), {**own, "mixture": {"web": {"dir": str(index)}}})
            facts["config"]["evals"] = {
                "coco": {"data": {"dir": f"/{index}", "index_dir": own["dir"]}}
            }

    assert processes(3, work) == [None] * 3


def test_one_that_fails_stops_the_others_too(processes):
    def work(index):
        with agreement.together("load the towers") as facts:
            facts |= COMMON
            if index == 1:
                raise FileNotFoundError("no model.safetensors")

    first, second, third = processes(3, work)
    assert isinstance(second, FileNotFoundError)
    for error in (first, third):
        assert isinstance(error, ProcessesDiffer)
        assert "Process 1 (" in str(error)
        assert "cannot load the towers: FileNotFoundError: no model.safetensors" in str(error)


def test_all_that_fail_alike_say_it_themselves(processes):
    def work(index):
        with agreement.together("start"):
            raise ValueError("config.steps is 0")

    assert [str(error) for error in processes(2, work)] == ["config.steps is 0"] * 2


def test_what_runs_is_described_down_to_the_code(monkeypatch):
    first = agreement.program()
    assert first == agreement.program() and first["versions"]["jax"]

    with jax.default_matmul_precision("highest"):
        assert agreement.program() != first


def test_layouts_tell_shapes_dtypes_and_partitions():
    mesh = meshes.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})

    tree = {"a": jax.ShapeDtypeStruct((4, 2), jnp.bfloat16)}
    placed = state.with_shardings(tree, {"a": NamedSharding(mesh, P("fsdp"))})
    assert agreement.layout(placed) == {"a": f"bfloat16[4, 2] {P('fsdp')}"}
