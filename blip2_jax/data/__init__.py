"""Data: records from many sources, transformed, tokenized and made into batches.

`source` says what a source of records is, and `sources` opens those that a config or a path names:
`lists` (read by `layouts`, `fields` and `columns`), `tars`, `prepared` folders and `mixtures`.
`examples` makes arrays of a record, `batch_spec` says which, and `loader` makes batches of them, as
a pure function of the step.
"""
