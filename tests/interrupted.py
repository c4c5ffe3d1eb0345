"""Runs `blip2 WORDS` in this process, as the command does, and interrupts it at a named event.

    INTERRUPT=blip2_jax.train.Checkpointer.save:6:SIGKILL python -m tests.interrupted train ...

Once the 6th call of that function has returned, the process sends itself the signal. The function
has the name by which it is looked up, as in `mock.patch`; calls in other processes do not count.
What may follow, each after a colon:

    process=1    only the process with this JAX_PROCESS_ID sends itself the signal
    group        it goes to the whole process group
    until_true   the call is then repeated until it returns something true. For `Preemption.
                 should_stop`: JAX's service hears of a signal later, and no step is done before.
                 Processes that work as one all repeat it, the one that got the signal or not.

A command that ends well before its event leaves with 3. Without INTERRUPT it is the plain command.
A script of a test's own can say `interrupted.plant(EVENT)` itself.
"""

import functools
import importlib
import itertools
import os
import pkgutil
import signal
import sys
import types
from collections.abc import Callable

VARIABLE = "INTERRUPT"
NEVER = 3  # exit code of a command whose event did not happen


def plant(event: str) -> Callable[[], bool]:
    """Lies in wait for an event; returns a function that says whether it has happened."""
    try:
        name, number, kind, *more = event.split(":")
        last, sent = int(number), signal.Signals[kind]
        options = dict(word.partition("=")[::2] for word in more)
        if last < 1 or options.keys() - {"process", "group", "until_true"}:
            raise ValueError(event)
        place, _, attribute = name.rpartition(".")
        owner = pkgutil.resolve_name(place)
        function = getattr(owner, attribute)
    except (ValueError, KeyError, ImportError, AttributeError) as error:
        raise SystemExit(f"{VARIABLE}={event}: {type(error).__name__}: {error}") from error
    mine = options.get("process") in (None, os.environ.get("JAX_PROCESS_ID"))
    returned, happened = itertools.count(1), []

    @functools.wraps(function)
    def interrupted(*args, **kwargs):
        result = function(*args, **kwargs)
        if next(returned) == last:
            happened.append(True)
            if mine:
                os.kill(0 if "group" in options else os.getpid(), sent)
            while "until_true" in options and not result:
                result = function(*args, **kwargs)
        return result

    setattr(owner, attribute, interrupted)
    return lambda: bool(happened)


def main() -> int:
    """Runs the command; the event is planted once its modules are imported as they always are."""
    from blip2_jax import __main__ as blip2

    event = os.environ.get(VARIABLE)

    def has_happened():
        return not event

    def import_module(name):
        nonlocal has_happened
        module = importlib.import_module(name)
        if event:
            has_happened = plant(event)
        return module

    blip2.importlib = types.SimpleNamespace(import_module=import_module)
    code = blip2.main()
    if code == 0 and not has_happened():
        print(f"{VARIABLE}={event}: it has not happened", file=sys.stderr)
        return NEVER
    return code


if __name__ == "__main__":
    sys.exit(main())
