"""What goes in: records, mixed, transformed and made into batches; and the embedded world.

`sources` opens whatever holds records; `loader` makes batches of them, as a pure function of the
step.
"""
