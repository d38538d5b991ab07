"""The tiers around their layout in `core.tiers`: their files, and which tier a request gets.

`files` reads a directory of tiers, `tiering` puts a tier's static prompt into a request, `routing`
asks the router (`keepwarm.router`, pure) with what only a running deployment knows, and
`router_files` is what the router has on disk.
"""
