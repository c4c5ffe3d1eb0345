"""What the compiler refuses is said in one line."""

from blip2_jax.planning import compilation


def test_what_does_not_fit_says_by_how_much():
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (23.13G) exceeds available HBM (15.75G)."
    )
    reason = compilation.why_it_does_not_run(message)
    assert "Temporaries alone need 23.13" in reason and "7.38 GiB too many" in reason


def test_what_the_compiler_cannot_do_there_is_not_called_too_large():
    message = "INTERNAL: RET_CHECK failure (a/b.cc:325) !x().Y() Ragged is not supported\nat ..."
    assert (
        compilation.why_it_does_not_run(message) == f"{compilation.REFUSED}Ragged is not supported"
    )
