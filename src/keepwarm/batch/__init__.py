"""The overnight loop: a pile of tasks, run in the order that reuses most, each ended exactly once.

Pure: `tasks` (lines in and out), `tree` (what tasks share), `night` (who runs what next), `planner`
(what a night will cost), `hours`, `report`, `picture`. Shell: `journal`, `runner`, `senders`,
`drop`, `ledger`, `service`.
"""
