"""The account of each request: what its prompt reused and what it didn't, and why.

`parts`, `difference`, `recent` and `explanation` decide, as functions of values; `record` is what
is kept of a request, `history` keeps it on disk, and the `explainer` puts them together behind the
reply, on a thread of its own. What it finds goes to the log, to `metrics` and to `tracing` as well.
The gateway hands over one `Ended` a request and knows no more.
"""
